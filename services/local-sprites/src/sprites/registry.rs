//! The registry: creates, finds, lists, changes and deletes Sprites. It is persisted, so that a
//! restart finds them unchanged.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use service::Lifecycle;
use tokio::task::JoinSet;
use types::{SpriteName, Timestamp};
use uuid::Uuid;

use crate::{
    isolation::{
        cgroup::{Cgroup, Cgroups, SharedLimits},
        holder::{Holder, Network},
        sandbox::{Sandboxes, container_id},
    },
    network::{
        policy::Policy,
        private_hosts::Forward,
        proxy::{EgressProxy, Reach},
        substitution::Secrets,
    },
    sprites::{
        budget::{self, Budget, Space},
        image::{ImageKey, ImageLimits, Images},
        sprite::{FromImage, Hold, Record, RegistryError, Settings, Sprite, Status},
    },
    sync::locked,
};

/// Sprites that a start takes up, or deletes, at a time.
const LOADED_AT_A_TIME: usize = 16;

#[derive(Debug)]
pub struct Registry {
    dir: PathBuf,
    pub(crate) sandboxes: Sandboxes,
    cgroups: Cgroups,
    budget: Budget,
    /// None where none are kept.
    pub(crate) images: Option<Images>,
    /// The bytes of the copies of disks that are under way.
    pub(super) copying: AtomicU64,
    /// The memory of all Sprites together.
    memory_bytes: Option<u64>,
    reach: Reach,
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
        (budget, images): (Budget, ImageLimits),
        reach: Reach,
        lifecycle: Lifecycle,
    ) -> io::Result<Arc<Self>> {
        let dir = data_dir.canonicalize()?.join("sprites");
        fs::create_dir_all(&dir)?;
        let total =
            [budget::machine_memory(), cgroups.own_memory_limit()].into_iter().flatten().min();
        let memory_bytes = total.map(|total| budget.memory(total));
        let limits = SharedLimits {
            memory_bytes,
            cpu_milli: budget.cpu_milli,
            processes: budget::processes(),
        };
        if let Err(error) = cgroups.limit_all(limits) {
            tracing::warn!(%error, ?limits, "failed to limit all Sprites together");
        }
        // Without root a disk has one owner, and packages go elsewhere.
        let images = match sandboxes.have_users() {
            true => Images::load(
                &data_dir.canonicalize()?,
                &sandboxes.fingerprint(),
                images,
                sandboxes.disks(),
            )?,
            false => None,
        };
        let registry = Arc::new(Self {
            dir,
            sandboxes,
            cgroups,
            budget,
            images,
            copying: AtomicU64::new(0),
            memory_bytes,
            reach,
            sprites: Mutex::default(),
            closed: AtomicBool::new(false),
            lifecycle,
        });
        // Many at a time: each waits for programs of the system.
        stream::iter(fs::read_dir(&registry.dir)?)
            .map(Ok)
            .try_for_each_concurrent(LOADED_AT_A_TIME, |entry| registry.load_one(entry))
            .await?;
        let known: Vec<String> =
            registry.all().iter().map(|sprite| container_id(sprite.dir())).collect();
        registry.sandboxes.remove_strays(&known).await;
        tracing::info!(sprites = locked(&registry.sprites).len(), "adopted running Sprites");
        Ok(registry)
    }

    async fn load_one(self: &Arc<Self>, entry: io::Result<fs::DirEntry>) -> io::Result<()> {
        let path = entry?.path();
        match fs::read(path.join("sprite.json")) {
            Ok(bytes) => match serde_json::from_slice::<Record>(&bytes) {
                Ok(record) => self.take_up(path, record).await?,
                Err(error) => {
                    tracing::warn!(%error, path = %path.display(), "a Sprite of another version is left alone")
                }
            },
            Err(_) => self.sandboxes.destroy(&path, None).await,
        }
        Ok(())
    }

    /// What runs in a Sprite keeps running; its way out, its services' keeper and its socket ended
    /// with the server that was here before.
    async fn take_up(self: &Arc<Self>, path: PathBuf, record: Record) -> io::Result<()> {
        self.sandboxes.disks().recover(&path)?;
        let (name, holder) =
            (record.name.clone(), record.holder.filter(|holder| holder.is_alive()));
        let sprite = Arc::new(Sprite::new(path, record, &self.sandboxes));
        locked(&self.sprites).insert(name.clone(), sprite.clone());
        let Some(holder) = holder else {
            // What it left behind when it ended is removed.
            self.sandboxes.end(sprite.dir(), sprite.record().holder).await;
            return Ok(());
        };
        self.sandboxes.adopt(sprite.dir(), holder);
        self.sandboxes.release(sprite.dir()).await;
        let attached = async {
            self.limit(&sprite)?;
            if let Some(group) = &sprite.attached().group {
                let _ = group.freeze(false);
            }
            self.open_network(&sprite, holder)
        };
        if let Err(error) = attached.await {
            tracing::warn!(%error, sprite = name, "an adopted Sprite has lost its network");
        }
        sprite.services.start_all(&sprite, holder, &self.lifecycle);
        Ok(())
    }

    /// Opens what this server carries of a Sprite's traffic: the way out of a limited one, and the
    /// ways to private services.
    fn open_network(&self, sprite: &Sprite, holder: Holder) -> Result<(), RegistryError> {
        // That of a sandbox that ended by itself.
        if let Some(before) = sprite.attached().proxy.take() {
            before.close();
        }
        self.open_proxy(sprite, holder)?;
        let forwards = match holder.network() {
            Network::Public => Forward::open_all(self.sandboxes.forwards(), holder.process.pid)
                .map_err(RegistryError::Network)?,
            Network::Machine | Network::Limited => JoinSet::new(),
        };
        sprite.attached().forwards = forwards;
        Ok(())
    }

    /// Opens the proxy of a Sprite that needs one and has none yet.
    fn open_proxy(&self, sprite: &Sprite, holder: Holder) -> Result<(), RegistryError> {
        let is_needed = match holder.network() {
            Network::Limited => true,
            Network::Public => sprite.interceptor.is_used(),
            Network::Machine => false,
        };
        if !is_needed || sprite.attached().proxy.is_some() {
            return Ok(());
        }
        let proxy = EgressProxy::open(
            holder.process.pid,
            sprite.record().policy,
            sprite.interceptor.clone(),
            self.reach.clone(),
            sprite.inside_dir().join("policy/refused"),
        );
        sprite.attached().proxy = Some(proxy.map_err(RegistryError::Network)?);
        Ok(())
    }

    /// Replaces the secrets whose values stay outside of a Sprite, and returns the variables that
    /// its programs need for that. What runs is not ended.
    pub async fn set_secrets(
        self: &Arc<Self>,
        name: &str,
        secrets: Secrets,
    ) -> Result<BTreeMap<String, String>, RegistryError> {
        let (registry, sprite) = (self.clone(), self.get(name)?);
        self.uninterrupted(async move {
            let hold = sprite.hold().await?;
            let limited = sprite.record().policy.is_limited();
            let network = match registry.sandboxes.network(limited) {
                Some(network @ (Network::Public | Network::Limited)) => network,
                // Without secrets nothing is asked of it.
                _ if secrets.is_empty() => return Ok(BTreeMap::new()),
                _ => return Err(RegistryError::Unintercepted),
            };
            let image = registry.sandboxes.image();
            sprite.interceptor.set_secrets(secrets, &sprite.inside_dir(), image)?;
            if let Some(holder) = hold.holder() {
                registry.open_proxy(&sprite, holder)?;
            }
            Ok(sprite.interceptor.variables(network))
        })
        .await
    }

    fn limit(&self, sprite: &Sprite) -> Result<Cgroup, RegistryError> {
        let record = sprite.record();
        let group =
            self.cgroups.group(&record.id.simple().to_string()).map_err(RegistryError::Limits)?;
        if let Some(limit) = record.memory_limit_mb {
            group.limit_memory(limit << 20).map_err(RegistryError::Limits)?;
        }
        sprite.attached().group = Some(group.clone());
        Ok(group)
    }

    /// Puts rules into force. Between limited and unlimited the sandbox is restarted, and what runs
    /// in it ends.
    pub async fn set_policy(
        self: &Arc<Self>,
        name: &str,
        policy: Policy,
    ) -> Result<(), RegistryError> {
        let (registry, sprite) = (self.clone(), self.get(name)?);
        let network =
            self.sandboxes.network(policy.is_limited()).ok_or(RegistryError::Unlimited)?;
        self.uninterrupted(async move {
            let hold = sprite.hold().await?;
            sprite.change(|record| record.policy = policy.clone())?;
            // A Sprite may read its own rules (docs/sprites-api.md §8.1).
            fs::write(
                sprite.inside_dir().join("policy/network.json"),
                serde_json::to_vec(&policy).map_err(io::Error::other)?,
            )?;
            match sprite.holder() {
                Some(holder) if holder.network() == network => {
                    if let Some(proxy) = &sprite.attached().proxy {
                        proxy.set_policy(policy);
                    }
                    Ok(())
                }
                Some(_) => registry.reboot(&hold).await.map(|_| ()),
                None => Ok(()),
            }
        })
        .await
    }

    /// The memory that a Sprite may use; this server's default where none.
    pub fn set_memory_limit(&self, name: &str, limit_mb: Option<u64>) -> Result<(), RegistryError> {
        let sprite = self.get(name)?;
        let bytes = limit_mb.map_or(self.cgroups.default_memory_bytes(), |mb| mb << 20);
        if let Some(group) = &sprite.attached().group {
            group.limit_memory(bytes).map_err(RegistryError::Limits)?;
        }
        sprite.change(|record| record.memory_limit_mb = limit_mb)
    }

    /// Runs work that must not be left half done when its request is dropped.
    pub(crate) async fn uninterrupted<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, RegistryError>> + Send + 'static,
    ) -> Result<T, RegistryError> {
        self.lifecycle.tracker().spawn(work).await.unwrap_or(Err(RegistryError::Closed))
    }

    pub async fn create(
        self: &Arc<Self>,
        name: SpriteName,
        settings: Settings,
        image: Option<ImageKey>,
    ) -> Result<Arc<Sprite>, RegistryError> {
        let registry = self.clone();
        let made =
            self.uninterrupted(async move { registry.make(&name, settings, image).await }).await;
        self.prepare_next();
        made
    }

    /// Has a disk ready for the next Sprite.
    pub fn prepare_next(self: &Arc<Self>) {
        let registry = self.clone();
        self.lifecycle.tracker().spawn(async move { registry.sandboxes.make_spare().await });
    }

    async fn make(
        &self,
        name: &SpriteName,
        settings: Settings,
        image: Option<ImageKey>,
    ) -> Result<Arc<Sprite>, RegistryError> {
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
            from_image: None,
        };
        // A directory of its own for each life of a name: a deletion that is still under way does
        // not touch a new one.
        let dir = self.dir.join(format!("{name}.{}", record.id.simple()));
        let sprite = Arc::new(Sprite::new(dir, record, &self.sandboxes));
        let mut hold = sprite.hold().await?;
        let existing = {
            let mut sprites = locked(&self.sprites);
            if self.closed.load(Ordering::SeqCst) {
                return Err(RegistryError::Closed);
            }
            let existing = sprites.get(name.as_str()).cloned();
            if existing.is_none() {
                sprites.insert(name.to_string(), sprite.clone());
            }
            existing
        };
        if let Some(existing) = existing {
            // Another request may be creating it: only then is it known what it begins from.
            existing.hold().await?;
            return Err(RegistryError::Exists);
        }
        let mut made = match image {
            Some(image) => self.begin_from(&image, &hold).await,
            None => None,
        };
        if made.is_none() {
            let plain = async {
                self.sandboxes.make_files(sprite.dir()).await?;
                self.boot(&hold).await
            };
            made = Some(plain.await);
        }
        if let Some(Err(error)) = made {
            hold.mark_deleted();
            locked(&self.sprites).remove(name.as_str());
            self.sandboxes.destroy(sprite.dir(), None).await;
            return Err(error);
        }
        drop(hold);
        Ok(sprite)
    }

    /// Starts a new Sprite with a copy of an image. None: there is no such image, no room for a copy
    /// of it, or none that a Sprite starts with, and nothing of it is left.
    async fn begin_from(
        &self,
        key: &ImageKey,
        sprite: &Hold,
    ) -> Option<Result<Holder, RegistryError>> {
        let images = self.images.as_ref()?;
        let (image, begun) = (images.find(key)?, Instant::now());
        let room = self.room_for_copy(images.bytes_of(&image)).ok()?;
        let started = async {
            self.sandboxes.copy_disk(&image, sprite.dir()).await?;
            drop(room);
            let copied_ms = begun.elapsed().as_millis().try_into().unwrap_or(u64::MAX);
            self.sandboxes.make_files(sprite.dir()).await?;
            sprite.change(|record| record.from_image = Some(FromImage { copied_ms }))?;
            self.boot(sprite).await
        };
        match started.await {
            // It may be deleted meanwhile, and is no good otherwise.
            Err(error @ (RegistryError::Record(_) | RegistryError::Sandbox(_))) => {
                tracing::warn!(%error, %key, "an image cannot be used");
                self.sandboxes.destroy(sprite.dir(), None).await;
                sprite.forget_image();
                images.remove(key);
                None
            }
            started => Some(started),
        }
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

    /// At most `limit` Sprites whose names begin with `prefix`, after a name; and whether there are
    /// more.
    pub fn list(&self, prefix: &str, after: &str, limit: usize) -> (Vec<Arc<Sprite>>, bool) {
        let sprites = locked(&self.sprites);
        let mut matching =
            sprites.iter().filter(|(name, _)| name.starts_with(prefix) && name.as_str() > after);
        let page = matching.by_ref().take(limit).map(|(_, sprite)| sprite.clone()).collect();
        (page, matching.next().is_some())
    }

    pub async fn delete(self: &Arc<Self>, name: &str) -> Result<(), RegistryError> {
        let sprite = locked(&self.sprites).remove(name).ok_or(RegistryError::NotFound)?;
        let registry = self.clone();
        self.uninterrupted(async move {
            let mut hold = sprite.hold_for_good().await;
            hold.mark_deleted();
            locked(&sprite.inside).abort_all();
            sprite.services.forget_all();
            registry.end(&hold).await;
            registry.sandboxes.destroy(sprite.dir(), sprite.record().holder).await;
            Ok(())
        })
        .await
    }

    /// Ends what runs in a Sprite.
    pub(crate) async fn end(&self, sprite: &Hold) {
        let attached = std::mem::take(&mut *sprite.attached());
        if let Some(proxy) = attached.proxy {
            proxy.close();
        }
        if let Some(group) = attached.group.as_ref().filter(|_| attached.is_paused) {
            // What is frozen does not even die.
            let _ = group.freeze(false);
        }
        self.sandboxes.end(sprite.dir(), sprite.record().holder).await;
        if let Some(group) = attached.group {
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
            // Another request may have done it, or deleted it, meanwhile.
            if let Some(holder) = registry.awake(&sprite).await? {
                return Ok(holder);
            }
            registry.boot(&sprite.hold().await?).await
        })
        .await
    }

    async fn awake(&self, sprite: &Arc<Sprite>) -> Result<Option<Holder>, RegistryError> {
        let hold = sprite.hold().await?;
        hold.touch();
        let holder = hold.holder();
        let mut attached = hold.attached();
        if holder.is_some() && std::mem::take(&mut attached.is_paused) {
            attached
                .group
                .as_ref()
                .map_or(Ok(()), |group| group.freeze(false))
                .map_err(RegistryError::Limits)?;
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
        let Some(disk) = self.disk_space().filter(|disk| self.budget.is_full(*disk)) else {
            return Ok(());
        };
        let all: Vec<u64> = self.all().iter().map(|sprite| sprite.disk_bytes()).collect();
        let average = all.iter().sum::<u64>() / (all.len() as u64).max(1);
        if self.budget.may_start(disk, sprite.disk_bytes(), average) {
            Ok(())
        } else {
            Err(RegistryError::DiskFull)
        }
    }

    /// Freezes a Sprite that no one is connected to.
    pub async fn pause_unused(
        &self,
        sprite: &Arc<Sprite>,
        after: Duration,
    ) -> Result<(), RegistryError> {
        let hold = sprite.hold().await?;
        if sprite.is_in_use() { Ok(()) } else { freeze(&hold, after) }
    }

    /// Stops a frozen Sprite, unless it was woken meanwhile.
    pub async fn stop_unused(&self, sprite: &Arc<Sprite>) -> Result<(), RegistryError> {
        let hold = sprite.hold().await?;
        if sprite.status() == Status::Warm && !sprite.is_in_use() {
            self.end(&hold).await;
        }
        Ok(())
    }

    /// Stops all that runs in a Sprite where it is, and cuts its connections: what the real service
    /// does with an idle one.
    pub async fn pause(&self, sprite: &Arc<Sprite>, after: Duration) -> Result<(), RegistryError> {
        freeze(&sprite.hold().await?, after)
    }

    /// Ends all that runs in a Sprite; its disk stays.
    pub async fn stop(&self, sprite: &Arc<Sprite>) -> Result<(), RegistryError> {
        self.end(&sprite.hold().await?).await;
        Ok(())
    }

    /// Ends all that runs in a Sprite and restarts its sandbox.
    pub async fn restart(self: &Arc<Self>, name: &str) -> Result<Holder, RegistryError> {
        let (registry, sprite) = (self.clone(), self.get(name)?);
        self.uninterrupted(async move { registry.reboot(&sprite.hold().await?).await }).await
    }

    async fn reboot(&self, sprite: &Hold) -> Result<Holder, RegistryError> {
        self.end(sprite).await;
        self.boot(sprite).await
    }

    /// Starts a Sprite's sandbox, where it is not running.
    pub(crate) async fn boot(&self, sprite: &Hold) -> Result<Holder, RegistryError> {
        let record = sprite.record();
        let holder = match sprite.holder() {
            // Another request was faster.
            Some(holder) => return Ok(holder),
            None if self.closed.load(Ordering::SeqCst) => return Err(RegistryError::Closed),
            None => {
                let network = self
                    .sandboxes
                    .network(record.policy.is_limited())
                    .ok_or(RegistryError::Unlimited)?;
                self.check_disk(sprite)?;
                // What is left of one that ended by itself is in the way.
                self.sandboxes.end(sprite.dir(), record.holder).await;
                self.sandboxes.boot(sprite.dir(), &record.name, network).await?
            }
        };
        let attached = async {
            sprite.keep_holder(holder)?;
            self.limit(sprite)?.add_all(|| holder.processes()).map_err(RegistryError::Limits)?;
            self.open_network(sprite, holder)
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
            let mut hold = sprite.hold_for_good().await;
            hold.mark_deleted();
            self.end(&hold).await;
        };
        futures::future::join_all(self.all().into_iter().map(kill)).await;
        self.cgroups.remove();
    }
}

/// Freezes what runs in a Sprite that has not been used for so long.
fn freeze(sprite: &Hold, after: Duration) -> Result<(), RegistryError> {
    // It may have been used meanwhile.
    if sprite.idle() <= after || sprite.holder().is_none() {
        return Ok(());
    }
    let mut attached = sprite.attached();
    if let Some(group) = &attached.group {
        group.freeze(true).map_err(RegistryError::Limits)?;
        attached.is_paused = true;
        drop(attached);
        sprite.disconnect();
    }
    Ok(())
}
