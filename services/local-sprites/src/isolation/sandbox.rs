//! A Sprite's sandbox: a container that an OCI runtime makes, with user, mount, PID, IPC, UTS and network namespaces of its own.
//!
//! Its root is an image of a Linux system, read-only and the same for all, under a layer of the Sprite's own disk. It holds nothing of
//! this machine. The owners of the image's files say which of this machine's user ids the Sprites' users are; none of them may be a
//! user of this machine.
//!
//! A holder process keeps the namespaces alive. Commands enter them with [`crate::isolation::launch`]; killing the holder kills everything inside.
//! The holder outlives this server, so that a restart takes the Sprite up as it runs.
//!
//! Without root, bubblewrap makes a sandbox with one user over the image, read-only.

use std::{
    fmt, fs, io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, lchown},
    path::{Path, PathBuf},
    process::Stdio,
    str::FromStr,
    time::Duration,
};

use rustix::mount::{MountFlags, UnmountFlags};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    process::{Child, Command},
};
use uuid::Uuid;

use crate::{
    isolation::{
        disk::{Disks, Frozen},
        holder::{Holder, Network},
        launch,
        oci::{self, Access},
        process::Process,
        runtime::{Program, Runtime},
        seccomp,
    },
    network::{
        Forward,
        uplink::{self, Namespace},
    },
};

/// The user that a Sprite's processes see themselves as (docs/sprites-api.md §11.1).
const USER: &str = "sprite";
pub const HOME: &str = "/home/sprite";
/// Where the agent CLIs are mounted.
const AGENTS: &str = "/opt/agents";
/// Where the agent host is mounted: one file.
const AGENT_HOST: &str = "/opt/aod/agent-host";
const PATH: &str = "/opt/agents/bin:/.sprite/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const BOOT_MAX: Duration = Duration::from_secs(20);
/// Directories of the Sprite's user.
const USERS_DIRECTORIES: [&str; 3] = ["home/sprite", "workspace", "srv"];
/// Without root: what can be written to.
const WRITABLE: [&str; 5] = ["home/sprite", "workspace", "srv", "tmp", "var/tmp"];
/// What is made anew in such a sandbox.
const NOT_OF_THE_IMAGE: [&str; 9] = ["dev", "home", "opt", "proc", "run", "srv", "sys", "tmp", "workspace"];
/// What something is mounted on.
const MOUNT_POINTS: [&str; 5] = [".sprite", "opt/agents", "opt/aod", "dev", "proc"];
/// Keeps the namespaces, and reaps every process of the Sprite that ends.
const HOLDER: [&str; 3] = ["/bin/sh", "-c", "trap '' CHLD; exec sleep infinity"];
/// Where sandboxes are put together: users that this machine does not know have to reach their roots.
const RUN_DIR: &str = "/run";

/// How Sprites are kept apart from this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isolation {
    Auto,
    Overlay,
    ReadOnly,
}

impl FromStr for Isolation {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Auto, Self::Overlay, Self::ReadOnly].into_iter().find(|isolation| isolation.to_string() == text).ok_or(())
    }
}

impl fmt::Display for Isolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Overlay => "overlay",
            Self::ReadOnly => "readonly",
        })
    }
}

#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("{what}: {source}")]
    Io { what: &'static str, source: io::Error },
    #[error("the sandbox did not start: {0}")]
    Boot(String),
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> SandboxError {
    move |source| SandboxError::Io { what, source }
}

/// What this server is told about sandboxes.
#[derive(Clone, Debug)]
pub struct Kind {
    pub isolation: Isolation,
    pub runtime: Program,
    /// The image of a Linux system that all Sprites have.
    pub rootfs: PathBuf,
    pub agents_dir: Option<PathBuf>,
    /// The static program that runs agents inside.
    pub agent_host: Option<PathBuf>,
    pub disk_bytes: Option<u64>,
    pub memory_bytes: u64,
    /// Ports of this machine's loopback that Sprites find at their own.
    pub loopback_ports: Vec<u16>,
    /// Other private services that Sprites reach.
    pub forwards: Vec<Forward>,
    /// Tells servers of one machine apart.
    pub instance: String,
    /// Whether this machine has control groups to write to.
    pub cgroups: bool,
}

/// Makes sandboxes of one kind.
#[derive(Debug)]
pub struct Sandboxes {
    kind: Kind,
    /// The runtime, and the first of the machine's user ids that a Sprite's are; none without root.
    containers: Option<Containers>,
    disks: Disks,
    /// What is made once for all Sprites: the first disk, the files that a Sprite only reads.
    shared: PathBuf,
    /// How much a file system in memory holds. Files there count as the Sprite's memory: were they all of it, nothing could run any more, not
    /// even what removes them.
    memory_files_bytes: u64,
}

#[derive(Debug)]
struct Containers {
    runtime: Runtime,
    first_user: u32,
    /// Where sandboxes are put together.
    run_dir: PathBuf,
}

impl Sandboxes {
    /// Chooses the isolation and proves it with a sandbox.
    pub async fn prepare(kind: Kind, data_dir: &Path) -> Result<Self, SandboxError> {
        let root = match kind.isolation {
            Isolation::Auto => rustix::process::geteuid().is_root(),
            Isolation::Overlay => true,
            Isolation::ReadOnly => false,
        };
        fs::create_dir_all(data_dir).map_err(io_error("the data directory cannot be made"))?;
        let data_dir = data_dir.canonicalize().map_err(io_error("the data directory cannot be found"))?;
        let shared = data_dir.join("shared");
        fs::DirBuilder::new().recursive(true).mode(0o755).create(&shared).map_err(io_error("the data directory cannot be written to"))?;
        let no_rootfs = io_error("LOCAL_SPRITES_ROOTFS has no Linux system (scripts/rootfs.sh makes one)");
        let rootfs = kind.rootfs.canonicalize().and_then(|dir| Ok((fs::metadata(dir.join("bin/sh"))?, dir))).map_err(no_rootfs)?.1;
        let containers = match root {
            true => Some(Containers::prepare(&kind, &rootfs)?),
            false => None,
        };
        let memory_files_bytes = kind.memory_bytes / 4;
        let agent_host = kind.agent_host.as_deref().map(program_for_all).transpose();
        let agent_host = agent_host.map_err(io_error("LOCAL_SPRITES_AGENT_HOST is no program that everyone may run"))?;
        let kind = Kind { rootfs, agent_host, ..kind };
        let disk_bytes = kind.disk_bytes.filter(|_| root);
        let mut sandboxes = Self { kind, containers, disks: Disks::Directories, shared, memory_files_bytes };
        sandboxes.share().map_err(io_error("what Sprites share cannot be made"))?;
        let template = sandboxes.shared.join("template");
        let made = Disks::prepare(&template, disk_bytes, |content| sandboxes.fill(content)).await;
        sandboxes.disks = made.map_err(io_error("a first disk cannot be made"))?;
        let probe = data_dir.join("probe");
        sandboxes.destroy(&probe, None).await;
        sandboxes.make_files(&probe).await?;
        let network = if root { Network::Public } else { Network::Machine };
        let holder = sandboxes.boot(&probe, "probe", network).await?;
        sandboxes.destroy(&probe, Some(holder)).await;
        let runtime = if root { sandboxes.kind.runtime.name() } else { "bubblewrap, with a read-only root" };
        tracing::info!(runtime, rootfs = %sandboxes.kind.rootfs.display(), disks = ?sandboxes.disks, "sandboxes work");
        Ok(sandboxes)
    }

    /// Removes containers of this server that no known Sprite has.
    pub async fn remove_strays(&self, known: &[String]) {
        let Some(containers) = &self.containers else { return };
        for id in containers.runtime.list().into_iter().filter(|id| !known.contains(id)) {
            let _ = containers.runtime.delete(&id).await;
        }
    }

    /// What a Sprite's disk holds at most; none where it is a directory.
    pub fn disk_bytes(&self) -> Option<u64> {
        self.kind.disk_bytes.filter(|_| self.disks == Disks::Images)
    }

    pub fn forwards(&self) -> &[Forward] {
        &self.kind.forwards
    }

    pub fn disks(&self) -> Disks {
        self.disks
    }

    /// What is the same for all Sprites, and theirs to read only.
    fn share(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.shared)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with("spare") {
                // Another server's, of another template perhaps.
                fs::remove_dir_all(entry.path())?;
            }
        }
        for (file, entry) in [
            ("passwd", format!("{USER}:x:{uid}:{uid}::{HOME}:/bin/bash\n", uid = Holder::UID)),
            ("group", format!("{USER}:x:{}:\n", Holder::UID)),
        ] {
            let mut text = fs::read_to_string(self.kind.rootfs.join("etc").join(file)).unwrap_or_default();
            if !text.contains(&format!("\n{USER}:")) {
                text.push_str(&entry);
            }
            fs::write(self.shared.join(file), text)?;
        }
        if self.containers.is_none() {
            fs::write(self.shared.join("seccomp.bpf"), seccomp::program()?)?;
            fs::write(self.shared.join("hosts"), hosts("sprite", &[]))?;
        }
        script(&self.shared.join("sprite-env"), include_str!("../../scripts/sprite-env.sh"))
    }

    /// The content of a new Sprite's disk: the layer over the image, or, without root, the directories that can be written to.
    fn fill(&self, content: &Path) -> io::Result<()> {
        let upper = content.join("upper");
        let Some(containers) = &self.containers else {
            return WRITABLE.iter().try_for_each(|own| fs::create_dir_all(upper.join(own)));
        };
        fs::create_dir_all(content.join("work"))?;
        for own in USERS_DIRECTORIES.iter().chain(&MOUNT_POINTS).chain(&["etc", "usr/local/bin"]) {
            fs::create_dir_all(upper.join(own))?;
        }
        for file in ["passwd", "group"] {
            fs::copy(self.shared.join(file), upper.join("etc").join(file))?;
        }
        let bin = upper.join("usr/local/bin");
        self.link_agents(&bin)?;
        script(&bin.join("sudo"), include_str!("../../scripts/sudo.sh"))?;
        give(&upper, containers.first_user)?;
        let user = Some(containers.first_user + Holder::UID);
        USERS_DIRECTORIES.iter().try_for_each(|own| lchown(upper.join(own), user, user))
    }

    /// Writes a new Sprite's files.
    pub async fn make_files(&self, dir: &Path) -> Result<(), SandboxError> {
        let make = async {
            if fs::rename(self.spare(), dir).is_err() {
                self.copy_template(dir).await?;
            }
            // What the server tells the Sprite; nothing that the Sprite writes is there.
            for part in ["inside/bin", "inside/policy", "inside/logs/services"] {
                fs::create_dir_all(dir.join(part))?;
            }
            fs::copy(self.shared.join("sprite-env"), dir.join("inside/bin/sprite-env"))?;
            fs::write(dir.join("inside/version.txt"), concat!(env!("CARGO_PKG_VERSION"), "\n"))
        };
        make.await.map_err(io_error("a Sprite's files cannot be made"))
    }

    async fn copy_template(&self, dir: &Path) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        self.disks.copy(&self.shared.join("template"), dir).await
    }

    fn spare(&self) -> PathBuf {
        self.shared.join("spare")
    }

    /// Copies a disk ahead, so that the next Sprite does not wait for that. Not having one is no harm.
    pub async fn make_spare(&self) {
        if self.spare().exists() {
            return;
        }
        let draft = self.shared.join(format!("spare.{}", Uuid::new_v4().simple()));
        let copied = self.copy_template(&draft).await.and_then(|()| fs::rename(&draft, self.spare()));
        if let Err(error) = copied {
            // Another request's may be there by now.
            tracing::debug!(%error, "no spare disk");
            let _ = fs::remove_dir_all(draft);
        }
    }

    /// Starts the sandbox of a Sprite whose files are there.
    pub async fn boot(&self, dir: &Path, hostname: &str, network: Network) -> Result<Holder, SandboxError> {
        let Some(containers) = &self.containers else { return self.boot_as_user(dir, hostname).await };
        let booted = self.boot_container(containers, dir, hostname, network).await;
        // The sandbox has its own view of the mounts; the root in this machine's table is not needed any more.
        let _ = rustix::mount::unmount(containers.place(dir).join("root"), UnmountFlags::DETACH);
        match booted {
            // The disk neither: nothing is left mounted when this server is killed.
            Ok(_) => self.unmount_disk(dir),
            Err(_) => self.end(dir, None).await,
        }
        booted
    }

    async fn boot_container(&self, containers: &Containers, dir: &Path, hostname: &str, network: Network) -> Result<Holder, SandboxError> {
        let id = container_id(dir);
        let place = containers.place(dir);
        let root = place.join("root");
        fs::create_dir_all(&root).map_err(io_error("/run cannot be written to"))?;
        let mount = async {
            let content = self.mount_disk(dir).await?;
            self.mount_root(&content, &root).map_err(io_error("the root file system cannot be mounted"))
        };
        let addresses = self.kind.forwards.iter().map(|forward| forward.address).collect();
        let (mounted, namespace) = tokio::join!(mount, Namespace::make(place.join("net"), addresses));
        mounted?;
        let namespace = namespace.map_err(io_error("a network namespace cannot be made"))?;
        let bundle = dir.join("bundle");
        fs::create_dir_all(&bundle).map_err(io_error("a Sprite's files cannot be made"))?;
        let resolver = if network == Network::Public { format!("nameserver {}\n", uplink::NAME_SERVER) } else { String::new() };
        for (file, text) in [("hosts", hosts(hostname, &self.kind.forwards)), ("resolv.conf", resolver)] {
            let write = || fs::write(bundle.join(file), text).and_then(|()| give(&bundle.join(file), containers.first_user));
            write().map_err(io_error("a Sprite's files cannot be made"))?;
        }
        let mut binds = vec![
            ("/.sprite", dir.join("inside"), Access::ReadOnly),
            ("/etc/hosts", bundle.join("hosts"), Access::ReadWrite),
            ("/etc/resolv.conf", bundle.join("resolv.conf"), Access::ReadWrite),
        ];
        binds.extend(self.kind.agents_dir.clone().map(|agents| (AGENTS, agents, Access::ReadOnly)));
        binds.extend(self.kind.agent_host.clone().map(|file| (AGENT_HOST, file, Access::ReadOnly)));
        let cgroups = self.kind.cgroups.then(|| format!("/{}-containers/{id}", self.kind.instance));
        let config = oci::Sandbox {
            root: &root,
            hostname,
            users: (containers.first_user, Holder::UIDS),
            network: namespace.path(),
            cgroups: cgroups.as_deref(),
            memory_files_bytes: self.memory_files_bytes,
            binds,
            command: &HOLDER,
            path: PATH,
        };
        let config = config.config();
        let connect = async {
            match network {
                Network::Public => namespace.connect(&self.kind.loopback_ports, bundle.join("uplink")).await.map(Some),
                Network::Machine | Network::Limited => Ok(None),
            }
        };
        let (started, uplink) = tokio::join!(containers.runtime.start(&id, &bundle, &config), connect);
        let end_uplink = |error: io::Error| {
            if let Ok(Some(uplink)) = &uplink {
                uplink.kill();
            }
            SandboxError::Boot(error.to_string())
        };
        let pid = started.map_err(end_uplink)?;
        let uplink = uplink.map_err(|error| SandboxError::Boot(error.to_string()))?;
        let gone = || SandboxError::Boot("it ended at once".to_owned());
        let process = Process::find(pid).ok_or_else(gone)?;
        launch::limit_namespace(pid).await.map_err(io_error("the user namespace cannot be limited"))?;
        Ok(Holder { process, network, uplink, first_user: Some(containers.first_user) })
    }

    async fn mount_disk(&self, dir: &Path) -> Result<PathBuf, SandboxError> {
        self.disks.mount(dir).await.map_err(io_error("the disk cannot be mounted"))
    }

    /// Lays a Sprite's own layer over the image.
    fn mount_root(&self, content: &Path, root: &Path) -> io::Result<()> {
        let (upper, work) = (content.join("upper"), content.join("work"));
        let options = format!("lowerdir={},upperdir={},workdir={}", self.kind.rootfs.display(), upper.display(), work.display());
        let options = std::ffi::CString::new(options).map_err(io::Error::other)?;
        Ok(rustix::mount::mount("overlay", root, "overlay", MountFlags::NODEV | MountFlags::NOSUID, options.as_c_str())?)
    }

    async fn boot_as_user(&self, dir: &Path, hostname: &str) -> Result<Holder, SandboxError> {
        let content = self.mount_disk(dir).await?;
        let mut command = self.bubblewrap();
        command.args(["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--hostname", hostname]);
        command.arg("--tmpfs").arg("/");
        let entries = fs::read_dir(&self.kind.rootfs).map_err(io_error("the root file system cannot be read"))?.flatten();
        for entry in entries.filter(|entry| !NOT_OF_THE_IMAGE.iter().any(|own| entry.file_name() == *own)) {
            let there = Path::new("/").join(entry.file_name());
            match fs::read_link(entry.path()) {
                Ok(link) => command.arg("--symlink").arg(link).arg(there),
                Err(_) => command.arg("--ro-bind").arg(entry.path()).arg(there),
            };
        }
        for own in WRITABLE {
            command.arg("--bind").arg(content.join("upper").join(own)).arg(Path::new("/").join(own));
        }
        for file in ["passwd", "group", "hosts"] {
            command.arg("--ro-bind").arg(self.shared.join(file)).arg(Path::new("/etc").join(file));
        }
        command.args(["--ro-bind-try", "/etc/resolv.conf", "/etc/resolv.conf"]);
        command.arg("--ro-bind").arg(dir.join("inside")).arg("/.sprite");
        command.args(["--proc", "/proc", "--size", &self.memory_files_bytes.to_string(), "--tmpfs", "/run"]);
        bind_devices(&mut command);
        if let Some(agents) = &self.kind.agents_dir {
            command.arg("--ro-bind").arg(agents).arg(AGENTS);
        }
        if let Some(file) = &self.kind.agent_host {
            command.arg("--ro-bind").arg(file).arg(AGENT_HOST);
        }
        command.args(["--cap-drop", "ALL", "--chdir", HOME, "--info-fd", "2", "--", "/bin/sh", "-c"]);
        command.arg("echo ready; exec >&-; exec sleep infinity");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).env_clear().env("PATH", PATH);
        // A group of its own: a signal to the server's group does not reach it.
        command.process_group(0);
        let mut child = command.spawn().map_err(io_error("bwrap cannot be started (is bubblewrap installed?)"))?;
        let mut report = String::new();
        let ready = tokio::time::timeout(BOOT_MAX, self.await_ready(&mut child, &mut report)).await;
        let info: serde_json::Value = serde_json::from_str(&report).unwrap_or_default();
        let pid = info.get("child-pid").and_then(serde_json::Value::as_i64).and_then(|pid| i32::try_from(pid).ok());
        let (Ok(Ok(())), Some(pid)) = (&ready, pid) else {
            let _ = child.start_kill();
            let why = match ready {
                Ok(Err(error)) if report.trim().is_empty() => error.to_string(),
                _ => report.trim().to_owned(),
            };
            return Err(SandboxError::Boot(why));
        };
        // Tokio reaps the process when the handle is gone: nothing is left behind either way.
        drop(child);
        let process = Process::find(pid).ok_or_else(|| SandboxError::Boot("it ended at once".to_owned()))?;
        Ok(Holder { process, network: Network::Machine, uplink: None, first_user: None })
    }

    /// Bubblewrap in a user namespace with one user.
    fn bubblewrap(&self) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", r#"exec 9<"$1"; shift; exec bwrap --seccomp 9 "$@""#, "sh"]).arg(self.shared.join("seccomp.bpf"));
        command.args(["--unshare-user", "--uid", &Holder::UID.to_string(), "--gid", &Holder::UID.to_string()]);
        command.kill_on_drop(false);
        command
    }

    /// Bubblewrap tells the holder's number, or what is wrong, on standard error; the holder itself tells when all is set up.
    async fn await_ready(&self, child: &mut Child, report: &mut String) -> io::Result<()> {
        let broken = || io::Error::other("it has no standard streams");
        let (mut stdout, mut stderr) = (BufReader::new(child.stdout.take().ok_or_else(broken)?), child.stderr.take().ok_or_else(broken)?);
        let mut line = String::new();
        let (told, set_up) = tokio::join!(stderr.read_to_string(report), stdout.read_line(&mut line));
        told?;
        set_up?;
        if line == "ready\n" { Ok(()) } else { Err(io::Error::other("it ended at once")) }
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

    /// The first of this machine's user ids that Sprites' users are; none where a Sprite has one user.
    pub fn first_user(&self) -> Option<u32> {
        self.containers.as_ref().map(|containers| containers.first_user)
    }

    /// The owner of what the file API makes, as this server names it; none where a Sprite has one user.
    pub fn owner(&self) -> Option<u32> {
        self.first_user().map(|first| first + Holder::UID)
    }

    /// Copies a Sprite's disk as it is now; what runs in it waits meanwhile.
    pub async fn snapshot(&self, dir: &Path, holder: Option<Holder>, to: &Path) -> io::Result<()> {
        let frozen = match holder {
            // The same file system once more, to freeze it by.
            Some(_) if self.disks == Disks::Images => Some(Frozen::freeze(self.disks.mount(dir).await?).await?),
            _ => None,
        };
        let copied = self.disks.copy(dir, to).await;
        if let Some(frozen) = frozen {
            frozen.thaw().await?;
        }
        self.unmount_disk(dir);
        copied
    }

    fn unmount_disk(&self, dir: &Path) {
        if self.disks == Disks::Images {
            Disks::unmount(dir);
        }
    }

    /// What a killed server left waiting goes on.
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
            let _ = containers.runtime.delete(&container_id(dir)).await;
            let place = containers.place(dir);
            Namespace::remove(&place.join("net"));
            let _ = rustix::mount::unmount(place.join("root"), UnmountFlags::DETACH);
            let _ = fs::remove_dir_all(place);
        }
        self.unmount_disk(dir);
    }

    /// Ends everything inside and deletes the files.
    pub async fn destroy(&self, dir: &Path, holder: Option<Holder>) {
        self.end(dir, holder).await;
        let dir = dir.to_path_buf();
        let removed = tokio::task::spawn_blocking(move || fs::remove_dir_all(dir)).await;
        if let Ok(Err(error)) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "a Sprite's files cannot be deleted");
        }
    }

    /// Login shells set a PATH of their own: there the CLIs are found too.
    fn link_agents(&self, bin: &Path) -> io::Result<()> {
        let Some(agents) = &self.kind.agents_dir else { return Ok(()) };
        fs::create_dir_all(bin)?;
        for entry in fs::read_dir(agents.join("bin"))? {
            let name = entry?.file_name();
            std::os::unix::fs::symlink(Path::new(AGENTS).join("bin").join(&name), bin.join(&name))?;
        }
        Ok(())
    }
}

impl Containers {
    fn prepare(kind: &Kind, rootfs: &Path) -> Result<Self, SandboxError> {
        let owner = fs::metadata(rootfs).map_err(io_error("LOCAL_SPRITES_ROOTFS cannot be read"))?.uid();
        if owner < Holder::UIDS {
            let why = "LOCAL_SPRITES_ROOTFS belongs to users of this machine; scripts/rootfs.sh gives its files to users that this machine does not have";
            return Err(SandboxError::Boot(why.to_owned()));
        }
        let run_dir = Path::new(RUN_DIR).join(&kind.instance);
        let make = || {
            fs::create_dir_all(&run_dir)?;
            // Traversable, and no more, for users that this machine does not know.
            fs::set_permissions(&run_dir, fs::Permissions::from_mode(0o711))
        };
        make().map_err(io_error("/run cannot be written to"))?;
        share_inotify();
        Ok(Self { runtime: Runtime::new(kind.runtime, run_dir.join("runtime"), kind.cgroups), first_user: owner, run_dir })
    }
}

impl Containers {
    /// Where a sandbox is put together, and its network is while it lives.
    fn place(&self, dir: &Path) -> PathBuf {
        self.run_dir.join(container_id(dir))
    }
}

/// Inotify instances count against the creator of the user namespace, which is root for all Sprites. Each Sprite has a limit of its own; this
/// is so that they do not take them from each other.
fn share_inotify() {
    const FILE: &str = "/proc/sys/fs/inotify/max_user_instances";
    const INSTANCES: u32 = 8192;
    let now = fs::read_to_string(FILE).ok().and_then(|text| text.trim().parse::<u32>().ok());
    if now.is_some_and(|now| now < INSTANCES) {
        match fs::write(FILE, INSTANCES.to_string()) {
            Ok(()) => tracing::info!(instances = INSTANCES, "raised this machine's limit of inotify instances"),
            Err(error) => tracing::warn!(%error, "Sprites share the inotify instances that this machine allows its root"),
        }
    }
}

/// A container is called as its Sprite's directory: by something that no other ever has.
pub fn container_id(dir: &Path) -> String {
    let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    name.rsplit('.').next().unwrap_or_default().to_owned()
}

fn hosts(hostname: &str, forwards: &[Forward]) -> String {
    let named = forwards.iter().filter(|forward| forward.address.is_loopback());
    let named: String = named.map(|forward| format!("{} {}\n", forward.address, forward.host)).collect();
    format!("127.0.0.1 localhost\n::1 localhost ip6-localhost\n127.0.1.1 {hostname}\n{named}")
}

/// Gives a tree to a sandbox's root.
fn give(path: &Path, owner: u32) -> io::Result<()> {
    lchown(path, Some(owner), Some(owner))?;
    if fs::symlink_metadata(path)?.is_dir() {
        for entry in fs::read_dir(path)? {
            give(&entry?.path(), owner)?;
        }
    }
    Ok(())
}

/// The file at a path that a sandbox's users, whom this machine does not know, may run.
fn program_for_all(path: &Path) -> io::Result<PathBuf> {
    const READ_AND_RUN: u32 = 0o005;
    let path = path.canonicalize()?;
    let metadata = fs::metadata(&path)?;
    let usable = metadata.is_file() && metadata.mode() & READ_AND_RUN == READ_AND_RUN;
    if usable { Ok(path) } else { Err(io::ErrorKind::PermissionDenied.into()) }
}

/// The devices that programs expect. For its own `--dev` bwrap would put a second user namespace inside the first where it is not root,
/// and then the sandbox could not be entered from outside.
fn bind_devices(command: &mut Command) {
    command.args(["--tmpfs", "/dev", "--dir", "/dev/shm"]);
    for device in ["null", "zero", "full", "random", "urandom", "tty"] {
        let path = Path::new("/dev").join(device);
        command.arg("--dev-bind").arg(&path).arg(&path);
    }
    for (target, link) in [("fd", "fd"), ("fd/0", "stdin"), ("fd/1", "stdout"), ("fd/2", "stderr")] {
        command.arg("--symlink").arg(Path::new("/proc/self").join(target)).arg(Path::new("/dev").join(link));
    }
}

/// The environment that every command has.
pub fn environment(holder: Holder) -> Vec<(&'static str, String)> {
    let own = [("PATH", PATH), ("HOME", HOME), ("USER", USER), ("LOGNAME", USER), ("SHELL", "/bin/bash"), ("LANG", "C.UTF-8")];
    let mut environment: Vec<_> = own.into_iter().map(|(name, value)| (name, value.to_owned())).collect();
    if holder.network() == Network::Limited {
        environment.extend(crate::network::proxy_variables());
    }
    environment
}

fn script(path: &Path, text: &str) -> io::Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}
