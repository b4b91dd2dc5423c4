//! The Sprites of this server: made, found, listed, changed, deleted. A restart finds them as they were.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use service::Lifecycle;
use tokio::task::JoinSet;
use types::{SpriteName, Timestamp};
use uuid::Uuid;

use crate::{
    budget::{self, Budget, Space},
    cgroup::{Cgroup, Cgroups, SharedLimits},
    checkpoint,
    exec::{Sessions, locked},
    launch::{Launch, Privileges},
    network::{Forward, Gate, Policy},
    sandbox::{Holder, Network, SandboxError, Sandboxes, container_id, write_atomically},
    services::{Definition, Services},
    tasks::Tasks,
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
    holder: Option<Holder>,
}

/// What a Sprite is created with, and what can be changed later.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Settings {
    pub labels: Vec<String>,
    pub environment: BTreeMap<String, String>,
    pub url_auth: Option<String>,
}

/// docs/sprites-api.md §8.2. Programs never gain rights by being started here, whatever it says; there are no devices to give.
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

/// Whether a Sprite's processes run, are stopped where they were, or are gone (docs/sprites-api.md §2.3).
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

/// A Sprite.
#[derive(Debug)]
pub struct Sprite {
    dir: PathBuf,
    record: Mutex<Record>,
    /// Held while the sandbox is started, copied or paused, or the Sprite deleted.
    boot: tokio::sync::Mutex<Life>,
    /// Its limits, while its sandbox is there.
    group: Mutex<Option<Cgroup>>,
    /// Its way out, where its network is limited and its sandbox is running.
    gate: Mutex<Option<Arc<Gate>>>,
    /// Carry its connections to private services that the deployment names.
    forwards: Mutex<JoinSet<()>>,
    paused: AtomicBool,
    last_used: Mutex<Instant>,
    /// Open connections that are no commands' clients.
    connections: AtomicUsize,
    /// The owner of what the file API makes, as this machine names it.
    owner: Option<u32>,
    pub sessions: Mutex<Sessions>,
    pub services: Services,
    /// What holds it awake.
    pub tasks: Tasks,
    /// Serves its own management socket; ends with the Sprite.
    pub inside: Mutex<JoinSet<()>>,
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
pub enum Life {
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
    #[error("the network policy cannot be put into force: {0}")]
    Network(#[source] io::Error),
    #[error("the limits cannot be set: {0}")]
    Limits(#[source] io::Error),
    #[error("checkpoint not found")]
    NoCheckpoint,
    #[error("a Sprite has at most {} checkpoints; delete one first", crate::checkpoint::CHECKPOINTS_MAX)]
    TooManyCheckpoints,
    #[error("the disk and its checkpoints would hold more than the Sprite's disk limit; delete a checkpoint first")]
    CheckpointsTooLarge,
    #[error("the checkpoint failed: {0}")]
    Checkpoint(#[source] io::Error),
    #[error("the Sprite's record cannot be kept: {0}")]
    Record(#[from] io::Error),
}

#[derive(Debug)]
pub struct Registry {
    dir: PathBuf,
    pub(crate) sandboxes: Sandboxes,
    cgroups: Cgroups,
    budget: Budget,
    /// The memory of all Sprites together.
    memory_bytes: Option<u64>,
    /// What limited Sprites may reach although it is private: the deployment's own services.
    private_hosts: Arc<[String]>,
    sprites: Mutex<BTreeMap<String, Arc<Sprite>>>,
    /// No Sprite is made or started any more.
    closed: AtomicBool,
    pub(crate) lifecycle: Lifecycle,
}

impl Registry {
    /// Takes up the Sprites that are on disk. What was half made is deleted.
    pub async fn load(
        data_dir: &Path,
        sandboxes: Sandboxes,
        cgroups: Cgroups,
        budget: Budget,
        private_hosts: Vec<String>,
        lifecycle: Lifecycle,
    ) -> io::Result<Arc<Self>> {
        let dir = data_dir.canonicalize()?.join("sprites");
        fs::create_dir_all(&dir)?;
        let total = [budget::machine_memory(), cgroups.own_memory_limit()].into_iter().flatten().min();
        let memory_bytes = total.map(|total| budget.memory(total));
        let limits = SharedLimits { memory_bytes, cpu_milli: budget.cpu_milli, processes: budget::processes() };
        if let Err(error) = cgroups.limit_all(limits) {
            tracing::warn!(%error, ?limits, "failed to limit what all Sprites use together");
        }
        let registry = Arc::new(Self {
            dir,
            sandboxes,
            cgroups,
            budget,
            memory_bytes,
            private_hosts: private_hosts.into(),
            sprites: Mutex::default(),
            closed: AtomicBool::new(false),
            lifecycle,
        });
        for entry in fs::read_dir(&registry.dir)? {
            let path = entry?.path();
            match fs::read(path.join("sprite.json")) {
                Ok(bytes) => match serde_json::from_slice::<Record>(&bytes) {
                    Ok(record) => registry.take_up(path, record).await?,
                    Err(error) => tracing::warn!(%error, path = %path.display(), "a Sprite of another version is left alone"),
                },
                Err(_) => registry.sandboxes.destroy(&path, None).await,
            }
        }
        let known: Vec<String> = registry.all().iter().map(|sprite| container_id(sprite.dir())).collect();
        registry.sandboxes.remove_strays(&known).await;
        tracing::info!(sprites = locked(&registry.sprites).len(), "Sprites taken up");
        Ok(registry)
    }

    /// What runs in a Sprite goes on; its way out, its services' keeper and its socket ended with the server that was here before.
    async fn take_up(self: &Arc<Self>, path: PathBuf, record: Record) -> io::Result<()> {
        self.sandboxes.disks().recover(&path)?;
        let (name, holder) = (record.name.clone(), record.holder.filter(|holder| holder.is_alive()));
        let sprite = Arc::new(Sprite::new(path, record, self.sandboxes.owner()));
        locked(&self.sprites).insert(name.clone(), sprite.clone());
        let Some(holder) = holder else {
            // What it left behind when it ended is removed.
            self.sandboxes.end(&sprite.dir, sprite.record().holder).await;
            return Ok(());
        };
        self.sandboxes.release(&sprite.dir).await;
        let attached = async {
            self.limit(&sprite)?;
            if let Some(group) = &*locked(&sprite.group) {
                let _ = group.freeze(false);
            }
            self.open_gate(&sprite, holder)
        };
        if let Err(error) = attached.await {
            tracing::warn!(%error, sprite = name, "a Sprite that was taken up is cut off");
        }
        sprite.services.start_all(&sprite, holder, &self.lifecycle);
        Ok(())
    }

    /// Opens what this server carries of a Sprite's traffic: the way out of a limited one, and the ways to private services.
    fn open_gate(&self, sprite: &Sprite, holder: Holder) -> Result<(), RegistryError> {
        let policy = sprite.record().policy;
        let gate = match holder.network() {
            Network::Limited => {
                let told = sprite.inside_dir().join("policy/refused");
                Some(Gate::open(holder.process.pid, policy, self.private_hosts.clone(), told).map_err(RegistryError::Network)?)
            }
            Network::Machine | Network::Public => None,
        };
        if let Some(before) = std::mem::replace(&mut *locked(&sprite.gate), gate) {
            before.close();
        }
        let forwards = match holder.network() {
            Network::Public => Forward::open_all(self.sandboxes.forwards(), holder.process.pid).map_err(RegistryError::Network)?,
            Network::Machine | Network::Limited => JoinSet::new(),
        };
        *locked(&sprite.forwards) = forwards;
        Ok(())
    }

    fn limit(&self, sprite: &Sprite) -> Result<Cgroup, RegistryError> {
        let record = sprite.record();
        let group = self.cgroups.group(&record.id.simple().to_string()).map_err(RegistryError::Limits)?;
        if let Some(limit) = record.memory_limit_mb {
            group.limit_memory(limit << 20).map_err(RegistryError::Limits)?;
        }
        *locked(&sprite.group) = Some(group.clone());
        Ok(group)
    }

    /// Puts rules into force. Between limited and unlimited the sandbox is started anew, and what runs in it ends.
    pub async fn set_policy(self: &Arc<Self>, name: &str, policy: Policy) -> Result<(), RegistryError> {
        let (registry, sprite) = (self.clone(), self.get(name)?);
        let network = self.sandboxes.network(policy.is_limited()).ok_or(RegistryError::Unlimited)?;
        self.uninterrupted(async move {
            let _life = sprite.hold().await?;
            locked(&sprite.record).policy = policy.clone();
            // A Sprite may read its own rules (docs/sprites-api.md §8.1).
            fs::write(sprite.inside_dir().join("policy/network.json"), serde_json::to_vec(&policy).map_err(io::Error::other)?)?;
            match sprite.holder() {
                Some(holder) if holder.network() == network => {
                    if let Some(gate) = locked(&sprite.gate).as_ref() {
                        gate.set_policy(policy);
                    }
                    sprite.keep_record()
                }
                Some(_) => registry.reboot(&sprite).await.map(|_| ()),
                None => sprite.keep_record(),
            }
        })
        .await
    }

    /// The memory that a Sprite may use; this server's default where none.
    pub fn set_memory_limit(&self, name: &str, limit_mb: Option<u64>) -> Result<(), RegistryError> {
        let sprite = self.get(name)?;
        let bytes = limit_mb.map_or(self.cgroups.default_memory_bytes(), |mb| mb << 20);
        if let Some(group) = &*locked(&sprite.group) {
            group.limit_memory(bytes).map_err(RegistryError::Limits)?;
        }
        sprite.change(|record| record.memory_limit_mb = limit_mb)
    }

    /// Runs work that must not be left half done when whoever asked for it goes away.
    pub(crate) async fn uninterrupted<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, RegistryError>> + Send + 'static,
    ) -> Result<T, RegistryError> {
        self.lifecycle.tracker().spawn(work).await.unwrap_or(Err(RegistryError::Closed))
    }

    pub async fn create(self: &Arc<Self>, name: SpriteName, settings: Settings) -> Result<Arc<Sprite>, RegistryError> {
        let registry = self.clone();
        let made = self.uninterrupted(async move { registry.make(&name, settings).await }).await;
        self.prepare_next();
        made
    }

    /// Has a disk ready for the next Sprite.
    pub fn prepare_next(self: &Arc<Self>) {
        let registry = self.clone();
        self.lifecycle.tracker().spawn(async move { registry.sandboxes.make_spare().await });
    }

    async fn make(&self, name: &SpriteName, settings: Settings) -> Result<Arc<Sprite>, RegistryError> {
        let now = Timestamp::now().unix_micros();
        let record = Record {
            id: Uuid::new_v4(),
            name: name.to_string(),
            created_at_us: now,
            updated_at_us: now,
            settings,
            policy: Policy::default(),
            privileges: None,
            memory_limit_mb: None,
            services: BTreeMap::new(),
            checkpoints_made: 0,
            holder: None,
        };
        // A directory of its own for each life of a name: a deletion that still goes on does not touch a new one.
        let dir = self.dir.join(format!("{name}.{}", record.id.simple()));
        let sprite = Arc::new(Sprite::new(dir, record, self.sandboxes.owner()));
        let mut booting = sprite.boot.lock().await;
        {
            let mut sprites = locked(&self.sprites);
            if self.closed.load(Ordering::SeqCst) {
                return Err(RegistryError::Closed);
            }
            if sprites.contains_key(name.as_str()) {
                return Err(RegistryError::Exists);
            }
            sprites.insert(name.to_string(), sprite.clone());
        }
        let made = async {
            self.sandboxes.make_files(&sprite.dir).await?;
            self.boot(&sprite).await
        };
        if let Err(error) = made.await {
            *booting = Life::Deleted;
            locked(&self.sprites).remove(name.as_str());
            self.sandboxes.destroy(&sprite.dir, None).await;
            return Err(error);
        }
        drop(booting);
        Ok(sprite)
    }

    pub fn get(&self, name: &str) -> Result<Arc<Sprite>, RegistryError> {
        locked(&self.sprites).get(name).cloned().ok_or(RegistryError::NotFound)
    }

    pub fn count(&self) -> usize {
        locked(&self.sprites).len()
    }

    pub fn all(&self) -> Vec<Arc<Sprite>> {
        locked(&self.sprites).values().cloned().collect()
    }

    /// At most `limit` Sprites whose names begin with `prefix`, after a name; and whether there are more.
    pub fn list(&self, prefix: &str, after: &str, limit: usize) -> (Vec<Arc<Sprite>>, bool) {
        let sprites = locked(&self.sprites);
        let mut matching = sprites.iter().filter(|(name, _)| name.starts_with(prefix) && name.as_str() > after);
        let page = matching.by_ref().take(limit).map(|(_, sprite)| sprite.clone()).collect();
        (page, matching.next().is_some())
    }

    pub async fn delete(self: &Arc<Self>, name: &str) -> Result<(), RegistryError> {
        let sprite = locked(&self.sprites).remove(name).ok_or(RegistryError::NotFound)?;
        let registry = self.clone();
        self.uninterrupted(async move {
            let mut life = sprite.boot.lock().await;
            *life = Life::Deleted;
            locked(&sprite.inside).abort_all();
            sprite.services.forget_all();
            registry.end(&sprite).await;
            registry.sandboxes.destroy(&sprite.dir, None).await;
            Ok(())
        })
        .await
    }

    /// Ends what runs in a Sprite. Whoever calls holds its `boot`.
    pub(crate) async fn end(&self, sprite: &Sprite) {
        if let Some(gate) = locked(&sprite.gate).take() {
            gate.close();
        }
        locked(&sprite.forwards).abort_all();
        let group = locked(&sprite.group).take();
        if sprite.paused.swap(false, Ordering::SeqCst)
            && let Some(group) = &group
        {
            // What is frozen does not even die.
            let _ = group.freeze(false);
        }
        self.sandboxes.end(&sprite.dir, sprite.record().holder).await;
        if let Some(group) = group {
            group.remove().await;
        }
    }

    /// The Sprite's sandbox, started where it is not running.
    pub async fn wake(self: &Arc<Self>, sprite: &Arc<Sprite>) -> Result<Holder, RegistryError> {
        if let Some(holder) = self.awake(sprite).await? {
            return Ok(holder);
        }
        let (registry, sprite) = (self.clone(), sprite.clone());
        self.uninterrupted(async move {
            // Somebody else may have done it, or deleted it, meanwhile.
            if let Some(holder) = registry.awake(&sprite).await? {
                return Ok(holder);
            }
            let _life = sprite.hold().await?;
            registry.boot(&sprite).await
        })
        .await
    }

    async fn awake(&self, sprite: &Sprite) -> Result<Option<Holder>, RegistryError> {
        let _life = sprite.hold().await?;
        sprite.touch();
        let holder = sprite.holder();
        if holder.is_some() && sprite.paused.swap(false, Ordering::SeqCst) {
            let group = locked(&sprite.group).clone();
            group.map_or(Ok(()), |group| group.freeze(false)).map_err(RegistryError::Limits)?;
        }
        Ok(holder)
    }

    pub fn budget(&self) -> Budget {
        self.budget
    }

    /// The file system that holds the disks.
    pub fn disk_space(&self) -> Option<Space> {
        let stat = rustix::fs::statvfs(&self.dir).ok()?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        Some(Space { total_bytes: bytes(stat.f_blocks), free_bytes: bytes(stat.f_bavail) })
    }

    /// The memory that all Sprites together use, and may use.
    pub fn memory(&self) -> Option<(u64, u64)> {
        Some((self.cgroups.memory_used()?, self.memory_bytes?))
    }

    /// Refuses to start a Sprite while the machine's disk is nearly full.
    fn check_disk(&self, sprite: &Sprite) -> Result<(), RegistryError> {
        let Some(disk) = self.disk_space().filter(|disk| self.budget.is_full(*disk)) else { return Ok(()) };
        let all: Vec<u64> = self.all().iter().map(|sprite| checkpoint::disk_bytes(sprite.dir())).collect();
        let average = all.iter().sum::<u64>() / (all.len() as u64).max(1);
        if self.budget.may_start(disk, checkpoint::disk_bytes(sprite.dir()), average) { Ok(()) } else { Err(RegistryError::DiskFull) }
    }

    /// Freezes a Sprite that nobody is connected to.
    pub async fn pause_unused(&self, sprite: &Sprite, after: Duration) -> Result<(), RegistryError> {
        let _life = sprite.hold().await?;
        if sprite.is_in_use() { Ok(()) } else { self.freeze(sprite, after) }
    }

    /// Stops a frozen Sprite, unless somebody woke it meanwhile.
    pub async fn stop_unused(&self, sprite: &Sprite) -> Result<(), RegistryError> {
        let _life = sprite.hold().await?;
        if sprite.status() == Status::Warm && !sprite.is_in_use() {
            self.end(sprite).await;
        }
        Ok(())
    }

    /// Stops all that runs in a Sprite where it is, and cuts its connections: what the real service does with an idle one.
    pub async fn pause(&self, sprite: &Sprite, after: Duration) -> Result<(), RegistryError> {
        let _life = sprite.hold().await?;
        self.freeze(sprite, after)
    }

    /// Whoever calls holds the Sprite's `boot`.
    fn freeze(&self, sprite: &Sprite, after: Duration) -> Result<(), RegistryError> {
        let group = locked(&sprite.group).clone();
        // Somebody may have come meanwhile.
        if sprite.idle() > after
            && sprite.holder().is_some()
            && let Some(group) = group
        {
            group.freeze(true).map_err(RegistryError::Limits)?;
            sprite.paused.store(true, Ordering::SeqCst);
            sprite.disconnect();
        }
        Ok(())
    }

    /// Ends all that runs in a Sprite; its disk stays.
    pub async fn stop(&self, sprite: &Sprite) -> Result<(), RegistryError> {
        let _life = sprite.hold().await?;
        self.end(sprite).await;
        Ok(())
    }

    /// Ends all that runs in a Sprite and starts its sandbox anew.
    pub async fn restart(self: &Arc<Self>, name: &str) -> Result<Holder, RegistryError> {
        let (registry, sprite) = (self.clone(), self.get(name)?);
        self.uninterrupted(async move {
            let _life = sprite.hold().await?;
            registry.reboot(&sprite).await
        })
        .await
    }

    pub(crate) async fn reboot(&self, sprite: &Arc<Sprite>) -> Result<Holder, RegistryError> {
        self.end(sprite).await;
        self.boot(sprite).await
    }

    /// Whoever calls holds the Sprite's `boot`.
    pub(crate) async fn boot(&self, sprite: &Arc<Sprite>) -> Result<Holder, RegistryError> {
        let record = sprite.record();
        let holder = match sprite.holder() {
            // Somebody was faster.
            Some(holder) => return Ok(holder),
            None if self.closed.load(Ordering::SeqCst) => return Err(RegistryError::Closed),
            None => {
                let network = self.sandboxes.network(record.policy.is_limited()).ok_or(RegistryError::Unlimited)?;
                self.check_disk(sprite)?;
                // What is left of one that ended by itself is in the way.
                self.sandboxes.end(&sprite.dir, record.holder).await;
                self.sandboxes.boot(&sprite.dir, &record.name, network).await?
            }
        };
        locked(&sprite.record).holder = Some(holder);
        let attached = async {
            sprite.keep_record()?;
            self.limit(sprite)?.add(holder.process.pid).map_err(RegistryError::Limits)?;
            self.open_gate(sprite, holder)
        };
        if let Err(error) = attached.await {
            // Nothing runs without its limits.
            self.end(sprite).await;
            return Err(error);
        }
        sprite.touch();
        sprite.services.start_all(sprite, holder, &self.lifecycle);
        Ok(holder)
    }

    /// Ends what runs in all Sprites, once and for all: none is started any more. Their files stay.
    pub async fn kill_all(&self) {
        self.closed.store(true, Ordering::SeqCst);
        let kill = |sprite: Arc<Sprite>| async move {
            // One that is being started right now is waited for.
            *sprite.boot.lock().await = Life::Deleted;
            self.end(&sprite).await;
        };
        futures::future::join_all(self.all().into_iter().map(kill)).await;
        self.cgroups.remove();
    }
}

impl Sprite {
    fn new(dir: PathBuf, record: Record, owner: Option<u32>) -> Self {
        Self {
            dir,
            record: Mutex::new(record),
            boot: tokio::sync::Mutex::new(Life::Usable),
            group: Mutex::default(),
            gate: Mutex::default(),
            forwards: Mutex::default(),
            paused: AtomicBool::new(false),
            last_used: Mutex::new(Instant::now()),
            connections: AtomicUsize::new(0),
            owner,
            sessions: Mutex::default(),
            services: Services::default(),
            tasks: Tasks::default(),
            inside: Mutex::default(),
        }
    }

    /// Waits until nobody else starts, copies or deletes the Sprite, and keeps it so.
    pub(crate) async fn hold(&self) -> Result<tokio::sync::MutexGuard<'_, Life>, RegistryError> {
        let life = self.boot.lock().await;
        if *life == Life::Deleted { Err(RegistryError::NotFound) } else { Ok(life) }
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

    pub fn owner(&self) -> Option<u32> {
        self.owner
    }

    /// The sandbox, while it is there.
    pub fn holder(&self) -> Option<Holder> {
        locked(&self.record).holder.filter(|holder| holder.is_alive())
    }

    pub fn status(&self) -> Status {
        match self.holder() {
            Some(_) if self.paused.load(Ordering::SeqCst) => Status::Warm,
            Some(_) => Status::Running,
            None => Status::Cold,
        }
    }

    /// How a command of this Sprite starts.
    pub fn launch(&self, holder: Holder, dir: PathBuf, terminal: bool) -> Launch {
        let limits = locked(&self.group).as_ref().map(Cgroup::entrances).unwrap_or_default();
        let privileges = locked(&self.record).privileges.as_ref().map(|policy| policy.profile).unwrap_or_default();
        Launch { holder, limits, privileges, dir, terminal, held: false }
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

    /// Whether somebody is connected to it, or to a command in it.
    pub fn is_in_use(&self) -> bool {
        self.connections.load(Ordering::SeqCst) > 0 || locked(&self.sessions).all().iter().any(|session| session.is_attached())
    }

    fn touch(&self) {
        *locked(&self.last_used) = Instant::now();
    }

    /// Cuts its clients off; what they started goes on.
    pub fn disconnect(&self) {
        for session in locked(&self.sessions).all() {
            session.disconnect();
        }
    }

    /// How long nobody used it; none at all while something holds it awake (docs/sprites-api.md §11.3).
    pub fn idle(&self) -> Duration {
        if self.tasks.any() {
            return Duration::ZERO;
        }
        let used = locked(&self.last_used).elapsed();
        let sessions = locked(&self.sessions).all();
        let idle_session = |session: &Arc<crate::exec::ExecSession>| match session.terminal() {
            Some(_) if session.is_attached() => Duration::ZERO,
            _ => session.activity().0,
        };
        sessions.iter().map(idle_session).fold(used, Duration::min)
    }
}
