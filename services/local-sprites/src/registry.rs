//! The Sprites of this server: made, found, listed, deleted. A restart finds them as they were.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use serde::{Deserialize, Serialize};
use tokio_util::task::TaskTracker;
use types::{SpriteName, Timestamp};
use uuid::Uuid;

use crate::{
    exec::ExecSession,
    files::Root,
    network::{Gate, Policy},
    sandbox::{Holder, SandboxError, Sandboxes, write_atomically},
};

/// What is kept of a Sprite on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    pub id: Uuid,
    pub name: String,
    pub created_at_us: i64,
    #[serde(default)]
    pub labels: Vec<String>,
    #[serde(default)]
    pub policy: Policy,
    holder: Option<Holder>,
}

/// A Sprite.
#[derive(Debug)]
pub struct Sprite {
    dir: PathBuf,
    record: Mutex<Record>,
    /// Held while the sandbox is started, or the Sprite deleted.
    boot: tokio::sync::Mutex<Life>,
    /// Its way out, where its network is limited and its sandbox is running.
    gate: Mutex<Option<Arc<Gate>>>,
    pub sessions: Mutex<HashMap<String, Arc<ExecSession>>>,
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
    #[error("this server cannot limit a Sprite's network: it does not run as root")]
    Unlimited,
    #[error("the network policy cannot be put into force: {0}")]
    Network(#[source] io::Error),
    #[error("the Sprite's record cannot be kept: {0}")]
    Record(#[from] io::Error),
}

#[derive(Debug)]
pub struct Registry {
    dir: PathBuf,
    sandboxes: Sandboxes,
    /// What limited Sprites may reach although it is private: the deployment's own services.
    private_hosts: Arc<[String]>,
    sprites: Mutex<BTreeMap<String, Arc<Sprite>>>,
    /// No Sprite is made or started any more.
    closed: AtomicBool,
    tasks: TaskTracker,
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    /// Takes up the Sprites that are on disk. What was half made is deleted.
    pub async fn load(data_dir: PathBuf, sandboxes: Sandboxes, private_hosts: Vec<String>, tasks: TaskTracker) -> io::Result<Self> {
        let dir = data_dir.join("sprites");
        fs::create_dir_all(&dir)?;
        let mut sprites = BTreeMap::new();
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            let record = fs::read(path.join("sprite.json")).ok().and_then(|bytes| serde_json::from_slice::<Record>(&bytes).ok());
            match record {
                Some(record) => {
                    sprites.insert(record.name.clone(), Arc::new(Sprite::new(path, record)));
                }
                None => sandboxes.destroy(&path, None).await,
            }
        }
        tracing::info!(sprites = sprites.len(), "Sprites taken up");
        let registry = Self {
            dir,
            sandboxes,
            private_hosts: private_hosts.into(),
            sprites: Mutex::new(sprites),
            closed: AtomicBool::new(false),
            tasks,
        };
        // What runs in them goes on; their ways out ended with the server that was here before.
        let running: Vec<_> = locked(&registry.sprites).values().cloned().collect();
        for sprite in running {
            if let Some(holder) = sprite.record().holder.filter(|holder| holder.is_alive())
                && let Err(error) = registry.open_gate(&sprite, holder)
            {
                tracing::warn!(%error, sprite = sprite.record().name, "a limited Sprite is cut off");
            }
        }
        Ok(registry)
    }

    /// Opens the way out of a limited Sprite.
    fn open_gate(&self, sprite: &Sprite, holder: Holder) -> Result<(), RegistryError> {
        let policy = sprite.record().policy;
        let gate = match holder.has_own_network() {
            true => Some(Gate::open(holder.pid, policy, self.private_hosts.clone(), sprite.files()?).map_err(RegistryError::Network)?),
            false => None,
        };
        if let Some(before) = std::mem::replace(&mut *locked(&sprite.gate), gate) {
            before.close();
        }
        Ok(())
    }

    /// Puts rules into force. Between limited and unlimited the sandbox is started anew, and what runs in it ends.
    pub async fn set_policy(self: &Arc<Self>, name: &str, policy: Policy) -> Result<(), RegistryError> {
        let (registry, sprite) = (self.clone(), self.get(name)?);
        if policy.is_limited() && !self.sandboxes.can_limit_network() {
            return Err(RegistryError::Unlimited);
        }
        self.uninterrupted(async move {
            let life = sprite.boot.lock().await;
            if *life == Life::Deleted {
                return Err(RegistryError::NotFound);
            }
            let limited = policy.is_limited();
            locked(&sprite.record).policy = policy.clone();
            sprite.show_policy(&policy)?;
            match sprite.record().holder.filter(|holder| holder.is_alive()) {
                Some(holder) if holder.has_own_network() == limited => {
                    if let Some(gate) = locked(&sprite.gate).as_ref() {
                        gate.set_policy(policy);
                    }
                    sprite.keep_record()
                }
                Some(holder) => {
                    holder.kill().await;
                    registry.boot(&sprite).await.map(|_| ())
                }
                None => sprite.keep_record(),
            }
        })
        .await
    }

    /// Runs work that must not be left half done when whoever asked for it goes away.
    async fn uninterrupted<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, RegistryError>> + Send + 'static,
    ) -> Result<T, RegistryError> {
        self.tasks.spawn(work).await.unwrap_or(Err(RegistryError::Closed))
    }

    pub async fn create(self: &Arc<Self>, name: SpriteName, labels: Vec<String>) -> Result<Record, RegistryError> {
        let registry = self.clone();
        self.uninterrupted(async move { registry.make(&name, labels).await }).await
    }

    async fn make(&self, name: &SpriteName, labels: Vec<String>) -> Result<Record, RegistryError> {
        let record = Record {
            id: Uuid::new_v4(),
            name: name.to_string(),
            created_at_us: Timestamp::now().unix_micros(),
            labels,
            policy: Policy::default(),
            holder: None,
        };
        // A directory of its own for each life of a name: a deletion that still goes on does not touch a new one.
        let sprite = Arc::new(Sprite::new(self.dir.join(format!("{name}.{}", record.id.simple())), record));
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
            self.sandboxes.make_files(&sprite.dir)?;
            self.boot(&sprite).await
        };
        if let Err(error) = made.await {
            *booting = Life::Deleted;
            locked(&self.sprites).remove(name.as_str());
            self.sandboxes.destroy(&sprite.dir, None).await;
            return Err(error);
        }
        Ok(sprite.record())
    }

    pub fn get(&self, name: &str) -> Result<Arc<Sprite>, RegistryError> {
        locked(&self.sprites).get(name).cloned().ok_or(RegistryError::NotFound)
    }

    /// At most `limit` Sprites whose names begin with `prefix`, after a name; and whether there are more.
    pub fn list(&self, prefix: &str, after: &str, limit: usize) -> (Vec<Record>, bool) {
        let sprites = locked(&self.sprites);
        let mut matching = sprites.values().filter(|sprite| {
            let name = &locked(&sprite.record).name;
            name.starts_with(prefix) && name.as_str() > after
        });
        let page = matching.by_ref().take(limit).map(|sprite| sprite.record()).collect();
        (page, matching.next().is_some())
    }

    pub async fn delete(self: &Arc<Self>, name: &str) -> Result<(), RegistryError> {
        let sprite = locked(&self.sprites).remove(name).ok_or(RegistryError::NotFound)?;
        let registry = self.clone();
        self.uninterrupted(async move {
            let mut life = sprite.boot.lock().await;
            *life = Life::Deleted;
            if let Some(gate) = locked(&sprite.gate).take() {
                gate.close();
            }
            registry.sandboxes.destroy(&sprite.dir, sprite.record().holder).await;
            Ok(())
        })
        .await
    }

    /// The Sprite's sandbox, started where it is not running.
    pub async fn wake(self: &Arc<Self>, sprite: &Arc<Sprite>) -> Result<Holder, RegistryError> {
        let life = sprite.boot.lock().await;
        if *life == Life::Deleted {
            return Err(RegistryError::NotFound);
        }
        if let Some(holder) = sprite.record().holder.filter(|holder| holder.is_alive()) {
            return Ok(holder);
        }
        drop(life);
        let (registry, sprite) = (self.clone(), sprite.clone());
        self.uninterrupted(async move {
            let life = sprite.boot.lock().await;
            // Somebody else may have done it, or deleted it, meanwhile.
            match sprite.record().holder.filter(|holder| holder.is_alive()) {
                _ if *life == Life::Deleted => Err(RegistryError::NotFound),
                Some(holder) => Ok(holder),
                None => registry.boot(&sprite).await,
            }
        })
        .await
    }

    async fn boot(&self, sprite: &Sprite) -> Result<Holder, RegistryError> {
        let record = sprite.record();
        let holder = self.sandboxes.boot(&sprite.dir, &record.name, record.policy.is_limited()).await?;
        locked(&sprite.record).holder = Some(holder);
        sprite.keep_record()?;
        self.open_gate(sprite, holder)?;
        Ok(holder)
    }

    /// Ends what runs in all Sprites, once and for all: none is started any more. Their files stay.
    pub async fn kill_all(&self) {
        self.closed.store(true, Ordering::SeqCst);
        let sprites: Vec<_> = locked(&self.sprites).values().cloned().collect();
        let kill = |sprite: Arc<Sprite>| async move {
            // One that is being started right now is waited for.
            *sprite.boot.lock().await = Life::Deleted;
            if let Some(holder) = sprite.record().holder {
                holder.kill().await;
            }
        };
        futures::future::join_all(sprites.into_iter().map(kill)).await;
    }
}

impl Sprite {
    fn new(dir: PathBuf, record: Record) -> Self {
        Self {
            dir,
            record: Mutex::new(record),
            boot: tokio::sync::Mutex::new(Life::Usable),
            gate: Mutex::default(),
            sessions: Mutex::default(),
        }
    }

    pub fn record(&self) -> Record {
        locked(&self.record).clone()
    }

    /// The Sprite's own files, whether it runs or not. What it put there leads nowhere else.
    fn files(&self) -> io::Result<Root> {
        Ok(Root::new(File::open(self.dir.join("files"))?))
    }

    /// Lets a Sprite read its own rules (sprites-api.md §8.1).
    fn show_policy(&self, policy: &Policy) -> io::Result<()> {
        self.files()?.write(Path::new("/.sprite/policy/network.json"), &serde_json::to_vec(policy)?, 0o644, true)
    }

    fn keep_record(&self) -> Result<(), RegistryError> {
        let record = serde_json::to_vec(&self.record()).map_err(io::Error::other)?;
        Ok(write_atomically(&self.dir.join("sprite.json"), &record)?)
    }
}

impl Record {
    /// `running` while the sandbox is up; `cold` when only its files are there.
    pub fn status(&self) -> &'static str {
        if self.holder.is_some_and(Holder::is_alive) { "running" } else { "cold" }
    }
}
