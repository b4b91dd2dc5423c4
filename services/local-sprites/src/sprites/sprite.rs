//! One Sprite: its persisted record, what is attached to its sandbox, and the lock that guards
//! both.

use std::{
    collections::BTreeMap,
    fs, io,
    ops::Deref,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::{sync::OwnedMutexGuard, task::JoinSet};
use types::Timestamp;
use uuid::Uuid;

use crate::{
    atomic::write_atomically,
    isolation::{
        cgroup::Cgroup,
        disk::Disks,
        holder::Holder,
        launch::{Launch, Privileges},
        runsc::Guest,
        sandbox::{SandboxError, Sandboxes},
    },
    network::{intercept::Interceptor, policy::Policy, proxy::EgressProxy},
    run::{
        exec::{self, ExecSession, Sessions},
        tasks::Tasks,
    },
    services::{Definition, Services},
    sync::locked,
};

/// What is kept of a Sprite on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    pub id: Uuid,
    pub name: String,
    pub created_at_us: i64,
    pub updated_at_us: i64,
    pub settings: Settings,
    pub policy: Policy,
    pub privileges: Option<PrivilegesPolicy>,
    pub memory_limit_mb: Option<u64>,
    pub services: BTreeMap<String, Definition>,
    /// Checkpoints made so far; their numbers are not used again.
    pub checkpoints_made: u32,
    pub holder: Option<Holder>,
    /// The image that it began from.
    #[serde(default)]
    pub from_image: Option<FromImage>,
}

/// What is told of the image that a Sprite began from.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct FromImage {
    /// How long the copy took.
    pub copied_ms: u64,
}

/// What a Sprite is created with, and what can be changed later.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Settings {
    pub labels: Vec<String>,
    pub environment: BTreeMap<String, String>,
    pub url_auth: Option<String>,
}

/// docs/sprites-api.md §8.2. Programs never gain rights by being started here, whatever it says;
/// there are no devices to give.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PrivilegesPolicy {
    #[serde(default)]
    pub profile: Privileges,
    #[serde(default)]
    pub devices: Vec<String>,
    #[serde(default)]
    pub no_new_privileges: bool,
}

/// Whether a Sprite's processes run, are stopped where they were, or are gone
/// (docs/sprites-api.md §2.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Running,
    Warm,
    Cold,
}

impl Status {
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Warm => "warm",
            Self::Cold => "cold",
        }
    }
}

/// Checkpoints of one Sprite at a time.
pub const CHECKPOINTS_MAX: usize = 5;

/// A Sprite.
#[derive(Debug)]
pub struct Sprite {
    dir: PathBuf,
    record: Mutex<Record>,
    life: Arc<tokio::sync::Mutex<Life>>,
    attached: Mutex<Attached>,
    last_used: Mutex<Instant>,
    /// Open connections that are no commands' clients.
    connections: AtomicUsize,
    /// How commands find its sandbox, where that has a kernel of its own.
    guest: Option<Guest>,
    pub sessions: Arc<Mutex<Sessions>>,
    pub services: Services,
    /// Puts the values of its secrets into what it sends.
    pub interceptor: Arc<Interceptor>,
    /// What holds it awake.
    pub tasks: Tasks,
    /// Serves its own management socket; ends with the Sprite.
    pub inside: Mutex<JoinSet<()>>,
}

/// What this server has attached to a Sprite's sandbox, while that is there.
#[derive(Debug, Default)]
pub struct Attached {
    /// Its limits.
    pub group: Option<Cgroup>,
    /// Its way out, where its network is limited or it has secrets outside.
    pub proxy: Option<Arc<EgressProxy>>,
    /// Carry its connections to private services that the deployment names.
    pub forwards: JoinSet<()>,
    /// Its processes are frozen.
    pub is_paused: bool,
}

/// The right to start, copy, pause, stop or delete a Sprite's sandbox. One at a time has it.
#[derive(Debug)]
pub struct Hold {
    sprite: Arc<Sprite>,
    life: OwnedMutexGuard<Life>,
}

impl Deref for Hold {
    type Target = Arc<Sprite>;

    fn deref(&self) -> &Arc<Sprite> {
        &self.sprite
    }
}

impl Hold {
    /// The Sprite is gone for all who wait for it.
    pub fn mark_deleted(&mut self) {
        *self.life = Life::Deleted;
    }
}

/// An open connection to a Sprite.
#[derive(Debug)]
pub struct Connection(Arc<Sprite>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.touch();
        self.0.connections.fetch_sub(1, Ordering::SeqCst);
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Life {
    Usable,
    Deleted,
}

#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    #[error("sprite not found")]
    NotFound,
    #[error("sprite already exists")]
    Exists,
    #[error("service temporarily unavailable, please retry")]
    Closed,
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error("this server's disk is nearly full: delete Sprites or checkpoints, then retry")]
    DiskFull,
    #[error("this server cannot limit a Sprite's network: it does not run as root")]
    Unlimited,
    #[error("this server cannot keep secrets outside of a Sprite: it does not run as root")]
    Unintercepted,
    #[error("the network policy cannot be put into force: {0}")]
    Network(#[source] io::Error),
    #[error("the limits cannot be set: {0}")]
    Limits(#[source] io::Error),
    #[error("checkpoint not found")]
    NoCheckpoint,
    #[error("a Sprite has at most {} checkpoints; delete one first", CHECKPOINTS_MAX)]
    TooManyCheckpoints,
    #[error(
        "the disk and its checkpoints would hold more than the Sprite's disk limit; delete a checkpoint first"
    )]
    CheckpointsTooLarge,
    #[error("the checkpoint failed: {0}")]
    Checkpoint(#[source] io::Error),
    #[error("this server keeps no images")]
    NoImages,
    #[error("there is an image with this key")]
    ImageExists,
    #[error("draft not found")]
    NoDraft,
    #[error("the disk cannot be copied: {0}")]
    Image(#[source] io::Error),
    #[error("the Sprite's record cannot be kept: {0}")]
    Record(#[from] io::Error),
}

impl Sprite {
    pub fn new(dir: PathBuf, record: Record, sandboxes: &Sandboxes) -> Self {
        let guest = sandboxes.guest(&dir);
        Self {
            interceptor: Arc::new(Interceptor::of(&dir)),
            dir,
            record: Mutex::new(record),
            life: Arc::new(tokio::sync::Mutex::new(Life::Usable)),
            attached: Mutex::default(),
            last_used: Mutex::new(Instant::now()),
            connections: AtomicUsize::new(0),
            guest,
            sessions: Arc::default(),
            services: Services::default(),
            tasks: Tasks::default(),
            inside: Mutex::default(),
        }
    }

    /// Waits until no one else starts, copies or deletes the Sprite, and keeps it so.
    pub async fn hold(self: &Arc<Self>) -> Result<Hold, RegistryError> {
        let hold = self.hold_for_good().await;
        if *hold.life == Life::Deleted { Err(RegistryError::NotFound) } else { Ok(hold) }
    }

    /// As [`Self::hold`], also where the Sprite is deleted.
    pub async fn hold_for_good(self: &Arc<Self>) -> Hold {
        Hold { sprite: self.clone(), life: self.life.clone().lock_owned().await }
    }

    pub fn attached(&self) -> MutexGuard<'_, Attached> {
        locked(&self.attached)
    }

    pub fn record(&self) -> Record {
        locked(&self.record).clone()
    }

    pub fn name(&self) -> String {
        locked(&self.record).name.clone()
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the Sprite sees, and only reads, at `/.sprite`.
    pub fn inside_dir(&self) -> PathBuf {
        self.dir.join("inside")
    }

    /// The sandbox, while it is there.
    pub fn holder(&self) -> Option<Holder> {
        locked(&self.record).holder.filter(|holder| holder.is_alive())
    }

    pub fn status(&self) -> Status {
        match self.holder() {
            Some(_) if self.attached().is_paused => Status::Warm,
            Some(_) => Status::Running,
            None => Status::Cold,
        }
    }

    /// How a command of this Sprite starts.
    pub fn launch(&self, holder: Holder, dir: PathBuf, terminal: bool) -> Launch {
        let limits = self.attached().group.as_ref().map(Cgroup::entrances).unwrap_or_default();
        let privileges = locked(&self.record)
            .privileges
            .as_ref()
            .map(|policy| policy.profile)
            .unwrap_or_default();
        Launch { holder, guest: self.guest.clone(), limits, privileges, dir, terminal, held: false }
    }

    /// What a client's command is started with.
    pub fn start_of(&self, holder: Holder, request: &exec::Request) -> exec::Start {
        exec::Start {
            launch: self.launch(holder, PathBuf::from(&request.dir), request.terminal.is_some()),
            environment: self.environment(),
            sessions: self.sessions.clone(),
        }
    }

    /// The blocks of this machine that its disk and its checkpoints take; 0 where disks are
    /// directories.
    pub fn disk_bytes(&self) -> u64 {
        let copies = fs::read_dir(self.checkpoints_dir()).into_iter().flatten().flatten();
        Disks::image_bytes(&self.dir)
            + copies.map(|copy| Disks::image_bytes(&copy.path())).sum::<u64>()
    }

    pub fn checkpoints_dir(&self) -> PathBuf {
        self.dir.join("checkpoints")
    }

    /// The environment that it was created with.
    pub fn environment(&self) -> BTreeMap<String, String> {
        locked(&self.record).settings.environment.clone()
    }

    /// Changes what is kept of it.
    pub fn change(&self, change: impl FnOnce(&mut Record)) -> Result<(), RegistryError> {
        {
            let mut record = locked(&self.record);
            change(&mut record);
            record.updated_at_us = Timestamp::now().unix_micros();
        }
        self.keep_record()
    }

    /// It did not begin from an image after all; nothing of it is on disk yet.
    pub fn forget_image(&self) {
        let mut record = locked(&self.record);
        (record.from_image, record.holder) = (None, None);
    }

    /// Keeps which sandbox is the Sprite's, for a server that takes it up.
    pub fn keep_holder(&self, holder: Holder) -> Result<(), RegistryError> {
        locked(&self.record).holder = Some(holder);
        self.keep_record()
    }

    fn keep_record(&self) -> Result<(), RegistryError> {
        // Written while locked: the newest is what stays.
        let record = locked(&self.record);
        let bytes = serde_json::to_vec(&*record).map_err(io::Error::other)?;
        Ok(write_atomically(&self.dir.join("sprite.json"), &bytes)?)
    }

    /// Holds the Sprite in use until the guard is dropped.
    pub fn connect(self: &Arc<Self>) -> Connection {
        self.connections.fetch_add(1, Ordering::SeqCst);
        Connection(self.clone())
    }

    /// Whether a client is connected to it, or to a command in it.
    pub fn is_in_use(&self) -> bool {
        self.connections.load(Ordering::SeqCst) > 0
            || locked(&self.sessions).all().iter().any(|session| session.is_attached())
    }

    pub fn touch(&self) {
        *locked(&self.last_used) = Instant::now();
    }

    /// Cuts its clients off; what they started keeps running.
    pub fn disconnect(&self) {
        for session in locked(&self.sessions).all() {
            session.disconnect();
        }
    }

    /// How long it has been unused; zero while something holds it awake
    /// (docs/sprites-api.md §11.3).
    pub fn idle(&self) -> Duration {
        if self.tasks.any() {
            return Duration::ZERO;
        }
        let used = locked(&self.last_used).elapsed();
        let sessions = locked(&self.sessions).all();
        let idle_session = |session: &Arc<ExecSession>| match session.terminal() {
            Some(_) if session.is_attached() => Duration::ZERO,
            _ => session.activity().0,
        };
        sessions.iter().map(idle_session).fold(used, Duration::min)
    }
}
