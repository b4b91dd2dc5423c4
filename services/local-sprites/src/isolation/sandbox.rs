//! A Sprite's sandbox: a container that an OCI runtime creates, with user, mount, PID, IPC, UTS and
//! network namespaces of its own.
//!
//! Its root is an image of a Linux system, read-only and the same for all, under a layer of the
//! Sprite's own disk. It holds nothing of this machine. No user of it is a user of this machine
//! ([`crate::isolation::users`]).
//!
//! A holder process keeps the namespaces alive. Commands enter them with
//! [`crate::isolation::launch`]; killing the holder kills everything inside. The holder outlives
//! this server, so that a restart takes the Sprite up as it runs.
//!
//! Without root, bubblewrap makes a sandbox with one user over the image, read-only.

mod as_root;
mod as_user;
mod containers;
mod error;
mod files;
mod inside;
mod kind;
mod proof;

use std::{
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use rustix::mount::UnmountFlags;

pub use crate::isolation::sandbox::{
    containers::container_id,
    error::SandboxError,
    inside::{HOME, environment},
    kind::{Isolation, Kind},
};
use crate::{
    files::tree,
    isolation::{
        disk::{Disks, Frozen},
        holder::{Holder, Network},
        launch::{Launch, Privileges},
        runsc::Guest,
        runtime::Program,
        sandbox::{
            containers::{Containers, conceal},
            error::io_error,
            kind::program_for_all,
            proof::Proof,
        },
    },
    network::private_hosts::Forward,
};

/// How long a first command may take.
const CHECK_MAX: Duration = Duration::from_secs(30);

/// Makes sandboxes of one kind.
#[derive(Debug)]
pub struct Sandboxes {
    kind: Kind,
    /// The runtime, and which of the machine's users are in which container; none without root.
    containers: Option<Containers>,
    disks: Disks,
    /// What is made once for all Sprites: the first disk, the files that a Sprite only reads.
    shared: PathBuf,
    /// How much a file system in memory holds. Files there count as the Sprite's memory: were they
    /// all of it, nothing could run any more, not even what removes them.
    memory_files_bytes: u64,
    /// That sandboxes as root work here.
    proof: Option<Proof>,
}

impl Sandboxes {
    /// Chooses the isolation and proves it with a sandbox, unless a server before this one did.
    pub async fn prepare(kind: Kind, data_dir: &Path) -> Result<Self, SandboxError> {
        let root = match kind.isolation {
            Isolation::Auto => rustix::process::geteuid().is_root(),
            Isolation::Overlay => true,
            Isolation::ReadOnly => false,
        };
        fs::create_dir_all(data_dir).map_err(io_error("the data directory cannot be made"))?;
        let data_dir =
            data_dir.canonicalize().map_err(io_error("the data directory cannot be found"))?;
        let shared = data_dir.join("shared");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&shared)
            .map_err(io_error("the data directory cannot be written to"))?;
        let no_rootfs =
            io_error("LOCAL_SPRITES_ROOTFS has no Linux system (scripts/rootfs.sh makes one)");
        let rootfs = kind
            .rootfs
            .canonicalize()
            .and_then(|dir| Ok((fs::metadata(dir.join("bin/sh"))?, dir)))
            .map_err(no_rootfs)?
            .1;
        let containers = match root {
            true => Some(Containers::prepare(&kind, &rootfs)?),
            false => None,
        };
        let memory_files_bytes = kind.memory_bytes / 4;
        let agent_host = kind.agent_host.as_deref().map(program_for_all).transpose();
        let agent_host = agent_host
            .map_err(io_error("LOCAL_SPRITES_AGENT_HOST is no program that everyone may run"))?;
        let kind = Kind { rootfs, agent_host, ..kind };
        let disk_bytes = kind.disk_bytes.filter(|_| root);
        let mut sandboxes = Self {
            kind,
            containers,
            disks: Disks::Directories,
            shared,
            memory_files_bytes,
            proof: None,
        };
        sandboxes.share().map_err(io_error("what Sprites share cannot be made"))?;
        let template = sandboxes.template();
        let made = Disks::prepare(&template, disk_bytes, |content| sandboxes.fill(content)).await;
        sandboxes.disks = made.map_err(io_error("a first disk cannot be made"))?;
        sandboxes.proof = sandboxes.own_proof();
        let is_proven = sandboxes.proof.as_ref().is_some_and(Proof::holds);
        if is_proven {
            sandboxes.separate_users();
        } else {
            sandboxes.prove(&data_dir.join("probe")).await?;
        }
        let runtime =
            if root { sandboxes.kind.runtime.name() } else { "bubblewrap, with a read-only root" };
        tracing::info!(
            runtime,
            rootfs = %sandboxes.kind.rootfs.display(),
            disks = ?sandboxes.disks,
            own_user_ids = sandboxes.containers.as_ref().is_some_and(|containers| containers.users.are_separate()),
            proven_before = is_proven,
            "sandboxes work"
        );
        Ok(sandboxes)
    }

    fn own_proof(&self) -> Option<Proof> {
        let containers = self.containers.as_ref()?;
        let kind = format!("{} {:?}", self.fingerprint(), self.kind);
        Proof::new(containers.proof(), &kind, containers.runtime.program())
    }

    /// Starts a first sandbox and ends it.
    async fn prove(&mut self, probe: &Path) -> Result<(), SandboxError> {
        self.destroy(probe, None).await;
        self.make_files(probe).await?;
        let network = if self.containers.is_some() { Network::Public } else { Network::Machine };
        let holder = self.boot_first(probe, network).await?;
        let works = self.check_programs(probe, holder).await;
        self.destroy(probe, Some(holder)).await;
        works?;
        // That Sprites cannot have user ids of their own may have another cause at the next start.
        if let (Some(proof), Some(containers)) = (&self.proof, &self.containers)
            && containers.users.are_separate() == containers.may_separate()
            && let Err(error) = proof.write()
        {
            tracing::warn!(%error, "the next server will try a first sandbox again");
        }
        Ok(())
    }

    fn separate_users(&mut self) {
        if let Some(containers) =
            self.containers.as_mut().filter(|containers| containers.may_separate())
        {
            containers.users.separate();
        }
    }

    /// Starts a first sandbox, with user ids of its own if that works here, as all others from then
    /// on.
    async fn boot_first(&mut self, dir: &Path, network: Network) -> Result<Holder, SandboxError> {
        const NAME: &str = "probe";
        if let Some(containers) = &self.containers
            && containers.may_separate()
            && let Some(first_user) = containers.users.trial()
        {
            let mut tried = self.boot_as_root(containers, dir, NAME, network, first_user).await;
            if tried.is_err() {
                // What failed may be another thing, once.
                tried = self.boot_as_root(containers, dir, NAME, network, first_user).await;
            }
            match tried {
                Ok(holder) => {
                    self.separate_users();
                    return Ok(holder);
                }
                Err(error) => tracing::warn!(
                    %error,
                    "all Sprites have the same user ids on this machine: none starts with its own"
                ),
            }
        }
        self.boot(dir, NAME, network).await
    }

    /// Proves that a sandbox's own kernel runs the programs of the root file system: old ones do
    /// not.
    async fn check_programs(&self, dir: &Path, holder: Holder) -> Result<(), SandboxError> {
        if !holder.has_own_kernel() {
            return Ok(());
        }
        let launch = Launch {
            holder,
            guest: self.guest(dir),
            limits: Vec::new(),
            privileges: Privileges::Minimal,
            dir: "/".into(),
            terminal: false,
            held: false,
        };
        let argv = ["ls", "-l", "/usr"].map(str::to_owned);
        let mut command = launch
            .command(&argv, environment(holder))
            .map_err(io_error("the first command cannot be started"))?;
        command.stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(CHECK_MAX, command.output())
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut));
        let output = output.flatten().map_err(io_error("the first command failed"))?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let why = "this release of runsc cannot run the programs of LOCAL_SPRITES_ROOTFS (Debian 13's, 20240729, can)";
        Err(SandboxError::Boot(format!("{why}: {}", said.lines().next().unwrap_or_default())))
    }

    /// How commands find the sandbox of a Sprite, where it has a kernel of its own.
    pub fn guest(&self, dir: &Path) -> Option<Guest> {
        let containers = self.containers.as_ref()?;
        (containers.runtime.program() == Program::Runsc)
            .then(|| containers.runtime.guest(&container_id(dir)))
    }

    /// The runtime's name, where Sprites' programs have no rights but those of their user.
    pub fn runtime_without_privileges(&self) -> Option<Program> {
        self.containers
            .as_ref()
            .map(|containers| containers.runtime.program())
            .filter(|program| *program == Program::Runsc)
    }

    /// Removes containers of this server that no known Sprite has.
    pub async fn remove_strays(&self, known: &[String]) {
        let Some(containers) = &self.containers else { return };
        for id in containers.list().into_iter().filter(|id| !known.contains(id)) {
            containers.remove(&id).await;
        }
    }

    /// What a Sprite's disk holds at most; none where it is a directory.
    pub fn disk_bytes(&self) -> Option<u64> {
        self.kind.disk_bytes.filter(|_| self.disks == Disks::Images)
    }

    /// The root file system that Sprites are made of.
    pub fn image(&self) -> &Path {
        &self.kind.rootfs
    }

    /// Another for each root file system, and for all else that a Sprite's disk only fits with;
    /// the same after a restart.
    pub fn fingerprint(&self) -> String {
        let mut hasher = DefaultHasher::new();
        let kind = &self.kind;
        (env!("CARGO_PKG_VERSION"), &kind.rootfs, kind.disk_bytes, &kind.agents_dir)
            .hash(&mut hasher);
        let containers = self.containers.as_ref();
        containers
            .map(|containers| (containers.users.image(), containers.runtime.program().name()))
            .hash(&mut hasher);
        (self.disks == Disks::Images).hash(&mut hasher);
        // What a new root file system, and an upgrade within one, changes.
        for path in ["", "etc/os-release", "var/lib/dpkg/status"] {
            let metadata = fs::metadata(kind.rootfs.join(path)).ok();
            metadata
                .map(|metadata| (metadata.ino(), metadata.mtime(), metadata.mtime_nsec()))
                .hash(&mut hasher);
        }
        format!("{:016x}", hasher.finish())
    }

    pub fn forwards(&self) -> &[Forward] {
        &self.kind.forwards
    }

    pub fn disks(&self) -> Disks {
        self.disks
    }

    /// Starts the sandbox of a Sprite whose files are there.
    pub async fn boot(
        &self,
        dir: &Path,
        hostname: &str,
        network: Network,
    ) -> Result<Holder, SandboxError> {
        let Some(containers) = &self.containers else {
            return self.boot_as_user(dir, hostname).await;
        };
        let first_user = containers.users.take(&container_id(dir)).ok_or_else(|| {
            SandboxError::Boot(
                "all ranges of user ids are in use: delete Sprites, or wait until idle ones are stopped".to_owned(),
            )
        })?;
        let booted = self.boot_as_root(containers, dir, hostname, network, first_user).await;
        if let (Err(_), Some(proof)) = (&booted, &self.proof) {
            proof.take_back();
        }
        booted
    }

    async fn boot_as_root(
        &self,
        containers: &Containers,
        dir: &Path,
        hostname: &str,
        network: Network,
        first_user: u32,
    ) -> Result<Holder, SandboxError> {
        let booted = self.boot_container(containers, dir, hostname, network, first_user).await;
        // The sandbox has its own view of the mounts; the root in this machine's table is not
        // needed any more.
        let _ = rustix::mount::unmount(containers.place(dir).join("root"), UnmountFlags::DETACH);
        let booted = booted.and_then(|holder| {
            conceal(&containers.place(dir)).map(|()| holder).map_err(io_error("a mount stays"))
        });
        if booted.is_err() {
            self.end(dir, None).await;
        }
        booted
    }

    async fn mount_disk(&self, dir: &Path) -> Result<PathBuf, SandboxError> {
        self.disks.mount(dir).await.map_err(io_error("the disk cannot be mounted"))
    }

    /// What the network of a Sprite is under a policy.
    ///
    /// # Errors
    /// When a policy cannot be put into force here: that takes root.
    pub fn network(&self, limited: bool) -> Option<Network> {
        match (self.containers.is_some(), limited) {
            (true, true) => Some(Network::Limited),
            (true, false) => Some(Network::Public),
            (false, true) => None,
            (false, false) => Some(Network::Machine),
        }
    }

    /// Whether Sprites have several users.
    pub fn have_users(&self) -> bool {
        self.containers.is_some()
    }

    /// A sandbox of the server before this one still runs.
    pub fn adopt(&self, dir: &Path, holder: Holder) {
        if let (Some(containers), Some(first_user)) = (&self.containers, holder.user(0)) {
            containers.users.keep(container_id(dir), first_user);
        }
    }

    /// Copies a Sprite's disk as it is now; what runs in it waits meanwhile.
    pub async fn snapshot(&self, dir: &Path, holder: Option<Holder>, to: &Path) -> io::Result<()> {
        let frozen = match holder {
            // The same file system once more, to freeze it by.
            Some(_) if self.disks == Disks::Images => {
                Some(Frozen::freeze(self.disks.mount(dir).await?).await?)
            }
            _ => None,
        };
        let copied = self.disks.copy(dir, to).await;
        if let Some(frozen) = frozen {
            frozen.thaw().await?;
        }
        self.disks.unmount_image(dir);
        copied
    }

    /// Releases what a killed server left frozen.
    pub async fn release(&self, dir: &Path) {
        if self.disks == Disks::Images {
            // Mounted here only while it was frozen; elsewhere this does nothing.
            Frozen::release(Disks::content(dir)).await;
            Disks::unmount(dir);
        }
    }

    /// Ends everything inside; the disk stays.
    pub async fn end(&self, dir: &Path, holder: Option<Holder>) {
        if let Some(holder) = holder {
            holder.kill().await;
        }
        if let Some(containers) = &self.containers {
            containers.remove(&container_id(dir)).await;
            // Processes that cannot be killed yet stay the only ones of their users.
            if holder.is_none_or(|holder| !holder.is_alive()) {
                containers.users.release(&container_id(dir));
            }
        }
        self.disks.unmount_image(dir);
    }

    /// Ends everything inside and deletes the files.
    pub async fn destroy(&self, dir: &Path, holder: Option<Holder>) {
        self.end(dir, holder).await;
        let dir = dir.to_path_buf();
        let removed = tokio::task::spawn_blocking(move || tree::remove(&dir)).await;
        if let Ok(Err(error)) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "a Sprite's files cannot be deleted");
        }
    }
}
