//! A Sprite's sandbox: user, mount, PID, IPC and UTS namespaces of its own, made by bubblewrap, over a root that is copied on write.
//!
//! A Sprite's root is a directory of its own disk. This machine's system directories are laid over it, and nothing else of this machine:
//! as root through overlays, so that a Sprite may change them for itself; otherwise read-only. A mask layer hides keys and passwords.
//!
//! A holder process keeps the namespaces alive. Commands enter them with [`crate::launch`]; killing the holder kills everything inside.
//! The holder outlives this server, so that a restart takes the Sprite up as it runs.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::Stdio,
    str::FromStr,
    time::Duration,
};

use rustix::{
    fs::{CWD, FileType, Mode, XattrFlags},
    mount::{MountFlags, UnmountFlags},
    process::{Pid, Signal},
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, Command},
};

use uuid::Uuid;

use crate::{
    disk::{Disks, Frozen},
    process::Process,
    seccomp,
};

/// The user that a Sprite's processes see themselves as (sprites-api.md §11.1).
const USER: &str = "sprite";
pub const HOME: &str = "/home/sprite";
/// Where the agent CLIs are mounted.
const AGENTS: &str = "/opt/agents";
const PATH: &str = "/opt/agents/bin:/.sprite/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const BOOT_MAX: Duration = Duration::from_secs(20);
/// A Sprite's users, but for its root, are these of the machine's, which are nobody's.
const FOREIGN_UIDS: u32 = 200_000;

/// What a Sprite sees of this machine. Where one is a link (`/bin` to `usr/bin`), the Sprite has the same link.
const SYSTEM: [&str; 10] = ["bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "etc", "var/lib/dpkg", "var/lib/apt"];
/// Within that, what it does not see.
const HIDDEN: [&str; 8] =
    ["etc/shadow", "etc/shadow-", "etc/gshadow", "etc/gshadow-", "etc/sudoers", "etc/sudoers.d", "etc/ssh", "etc/ssl/private"];
/// What a Sprite has of its own; the first three are its user's.
const OWN: [&str; 12] =
    ["home/sprite", "workspace", "srv", "root", "tmp", "var/tmp", "var/log", "var/cache", "var/lib", "opt", "var/spool", ".sprite"];
const OWN_OF_THE_USER: usize = 3;

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

/// Makes sandboxes of one kind.
#[derive(Debug)]
pub struct Sandboxes {
    overlay: bool,
    disks: Disks,
    /// What a Sprite's disk holds at most, where disks are images.
    disk_bytes: Option<u64>,
    /// What is made once for all Sprites: the mask, the first disk, the files that a Sprite only reads.
    shared: PathBuf,
    agents_dir: Option<PathBuf>,
    /// How much a file system in memory holds. Files there count as the Sprite's memory: were they all of it, nothing could run any more, not
    /// even what removes them.
    memory_files_bytes: u64,
}

/// The process that keeps a sandbox alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub process: Process,
    /// Whether it is in a network namespace of its own.
    own_network: bool,
    /// Whether it has users of its own, root among them.
    users: bool,
}

impl Sandboxes {
    /// Chooses the isolation and proves it with a sandbox.
    pub async fn prepare(
        isolation: Isolation,
        data_dir: &Path,
        agents_dir: Option<&Path>,
        disk_bytes: Option<u64>,
        memory_bytes: u64,
    ) -> Result<Self, SandboxError> {
        let root = rustix::process::geteuid().is_root();
        let overlay = match isolation {
            Isolation::Auto => root,
            Isolation::Overlay => true,
            Isolation::ReadOnly => false,
        };
        fs::create_dir_all(data_dir).map_err(io_error("the data directory cannot be made"))?;
        let data_dir = data_dir.canonicalize().map_err(io_error("the data directory cannot be found"))?;
        let shared = data_dir.join("shared");
        fs::DirBuilder::new().recursive(true).mode(0o755).create(&shared).map_err(io_error("the data directory cannot be written to"))?;
        let agents_dir = agents_dir.map(Path::to_path_buf);
        let mut sandboxes =
            Self { overlay, disks: Disks::Directories, disk_bytes, shared, agents_dir, memory_files_bytes: memory_bytes / 4 };
        sandboxes.share().map_err(io_error("what Sprites share cannot be made"))?;
        let disk_bytes = disk_bytes.filter(|_| overlay);
        let template = sandboxes.shared.join("template");
        let made = Disks::prepare(&template, disk_bytes, |content| sandboxes.fill(content)).await;
        sandboxes.disks = made.map_err(io_error("a first disk cannot be made"))?;
        let probe = data_dir.join("probe");
        let _ = fs::remove_dir_all(&probe);
        sandboxes.make_files(&probe).await?;
        let holder = sandboxes.boot(&probe, "probe", false).await?;
        sandboxes.destroy(&probe, Some(holder)).await;
        let kind = if overlay { "overlay" } else { "read-only root" };
        tracing::info!(isolation = kind, disks = ?sandboxes.disks, "sandboxes work; without a policy the network is this machine's own");
        Ok(sandboxes)
    }

    /// What a Sprite's disk holds at most; none where it is a directory.
    pub fn disk_bytes(&self) -> Option<u64> {
        self.disk_bytes.filter(|_| self.disks == Disks::Images)
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
        if self.overlay {
            self.build_mask()?;
        }
        for (file, entry) in [
            ("passwd", format!("{USER}:x:{uid}:{uid}::{HOME}:/bin/bash\n", uid = Holder::UID)),
            ("group", format!("{USER}:x:{}:\n", Holder::UID)),
        ] {
            let mut text = fs::read_to_string(Path::new("/etc").join(file)).unwrap_or_default();
            text.push_str(&entry);
            fs::write(self.shared.join(file), text)?;
        }
        fs::write(self.shared.join("seccomp.bpf"), seccomp::program()?)?;
        script(&self.shared.join("sprite-env"), include_str!("../scripts/sprite-env.sh"))
    }

    /// The content of a new Sprite's disk.
    fn fill(&self, content: &Path) -> io::Result<()> {
        let root = content.join("files");
        for own in OWN {
            fs::create_dir_all(root.join(own))?;
        }
        for open in ["tmp", "var/tmp"] {
            fs::set_permissions(root.join(open), fs::Permissions::from_mode(0o1777))?;
        }
        for name in SYSTEM {
            match fs::read_link(Path::new("/").join(name)) {
                Ok(link) => std::os::unix::fs::symlink(link, root.join(name))?,
                Err(_) if self.overlay => {
                    for part in ["upper", "work", "merged"] {
                        fs::create_dir_all(layer(content, name).join(part))?;
                    }
                }
                Err(_) => {}
            }
        }
        if !self.overlay {
            return Ok(());
        }
        for own in &OWN[..OWN_OF_THE_USER] {
            let owner = Some(Holder::owner_outside(Holder::UID));
            std::os::unix::fs::chown(root.join(own), owner, owner)?;
        }
        let upper = |name: &str| layer(content, name).join("upper");
        for file in ["passwd", "group"] {
            fs::copy(self.shared.join(file), upper("etc").join(file))?;
        }
        let bin = upper("usr").join("local/bin");
        fs::create_dir_all(&bin)?;
        self.link_agents(&bin)?;
        script(&bin.join("sudo"), include_str!("../scripts/sudo.sh"))?;
        // What this machine's package manager downloaded is for another user.
        let lists = upper("var/lib/apt").join("lists");
        fs::create_dir_all(&lists)?;
        opaque(&lists)
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
            // Somebody else's may be there by now.
            tracing::debug!(%error, "no spare disk");
            let _ = fs::remove_dir_all(draft);
        }
    }

    /// Starts the sandbox of a Sprite whose files are there.
    pub async fn boot(&self, dir: &Path, hostname: &str, own_network: bool) -> Result<Holder, SandboxError> {
        let booted = self.start_holder(dir, hostname, own_network).await;
        // The sandbox has its own view of the mounts; this machine's table is left as it was.
        self.unmount(dir);
        booted
    }

    async fn start_holder(&self, dir: &Path, hostname: &str, own_network: bool) -> Result<Holder, SandboxError> {
        let content = self.disks.mount(dir).await.map_err(io_error("the disk cannot be mounted"))?;
        let mut command = self.bubblewrap();
        command.args(["--unshare-pid", "--unshare-ipc", "--unshare-uts"]);
        if own_network {
            command.arg("--unshare-net");
        }
        command.args(["--hostname", hostname]);
        command.arg("--bind").arg(content.join("files")).arg("/");
        for name in Self::system_dirs() {
            let path = Path::new("/").join(name);
            if self.overlay {
                let merged = self.mount(&content, name).map_err(io_error("the overlay cannot be mounted"))?;
                command.arg("--bind").arg(merged).arg(path);
            } else {
                command.arg("--ro-bind").arg(&path).arg(&path);
            }
        }
        if !self.overlay {
            for file in ["passwd", "group"] {
                command.arg("--ro-bind").arg(self.shared.join(file)).arg(Path::new("/etc").join(file));
            }
        }
        command.arg("--ro-bind").arg(dir.join("inside")).arg("/.sprite");
        let size = self.memory_files_bytes.to_string();
        command.args(["--proc", "/proc", "--size", &size, "--tmpfs", "/run"]);
        if self.overlay {
            hide_kernel(&mut command);
        }
        if self.overlay {
            command.args(["--dev", "/dev", "--size", &size, "--tmpfs", "/dev/shm"]);
        } else {
            bind_devices(&mut command);
        }
        if let Some(agents) = &self.agents_dir {
            command.arg("--ro-bind").arg(agents).arg(AGENTS);
        }
        for file in files_beside_the_overlay() {
            command.arg("--ro-bind").arg(&file).arg(&file);
        }
        command.args([
            "--cap-drop",
            "ALL",
            "--chdir",
            HOME,
            "--info-fd",
            "2",
            "--",
            "/bin/sh",
            "-c",
            "echo ready; exec >&-; exec sleep infinity",
        ]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).env_clear().env("PATH", PATH);
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
        Ok(Holder { process, own_network, users: self.overlay })
    }

    /// Bubblewrap in a user namespace: as root with all of a Sprite's users, which only we can give it; otherwise with one.
    fn bubblewrap(&self) -> Command {
        let program = self.shared.join("seccomp.bpf");
        let wrapped = r#"exec 9<"$1"; shift; exec bwrap --seccomp 9 "$@""#;
        let mut command = if self.overlay {
            let mut command = Command::new("unshare");
            command.args(["--user", "--", "/bin/sh", "-c", &format!("echo unshared; read -r _; {wrapped}"), "sh"]).arg(program);
            command
        } else {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", wrapped, "sh"]).arg(program);
            command.args(["--unshare-user", "--uid", &Holder::UID.to_string(), "--gid", &Holder::UID.to_string()]);
            command
        };
        command.kill_on_drop(false);
        command
    }

    /// Bubblewrap tells the holder's number, or what is wrong, on standard error; the holder itself tells when all is set up.
    async fn await_ready(&self, child: &mut Child, report: &mut String) -> io::Result<()> {
        let broken = || io::Error::other("it has no standard streams");
        let mut stdin = child.stdin.take().ok_or_else(broken)?;
        let (mut stdout, mut stderr) = (BufReader::new(child.stdout.take().ok_or_else(broken)?), child.stderr.take().ok_or_else(broken)?);
        let mut line = String::new();
        if self.overlay {
            stdout.read_line(&mut line).await?;
            if line == "unshared\n" {
                let pid = child.id().ok_or_else(broken)?;
                give_users(pid)?;
                stdin.write_all(b"go\n").await?;
            }
            line.clear();
        }
        drop(stdin);
        let (told, set_up) = tokio::join!(stderr.read_to_string(report), stdout.read_line(&mut line));
        told?;
        set_up?;
        if line == "ready\n" { Ok(()) } else { Err(io::Error::other("it ended at once")) }
    }

    /// Whether a sandbox's network can be limited here: its namespace is entered from outside, which takes root.
    pub fn can_limit_network(&self) -> bool {
        self.overlay
    }

    /// The owner of what the file API makes, as this server names it; none where a Sprite has one user.
    pub fn owner(&self) -> Option<u32> {
        self.overlay.then(|| Holder::owner_outside(Holder::UID))
    }

    pub fn has_users(&self) -> bool {
        self.overlay
    }

    /// Copies a Sprite's disk as it is now; what runs in it waits meanwhile.
    pub async fn snapshot(&self, dir: &Path, holder: Option<Holder>, to: &Path) -> io::Result<()> {
        let frozen = match holder {
            Some(holder) if self.disks == Disks::Images => Some(Frozen::freeze(holder.root_path()).await?),
            _ => None,
        };
        let copied = self.disks.copy(dir, to).await;
        if let Some(frozen) = frozen {
            frozen.thaw().await?;
        }
        copied
    }

    /// Ends everything inside and deletes the files.
    pub async fn destroy(&self, dir: &Path, holder: Option<Holder>) {
        if let Some(holder) = holder {
            holder.kill().await;
        }
        self.unmount(dir);
        let dir = dir.to_path_buf();
        let removed = tokio::task::spawn_blocking(move || fs::remove_dir_all(dir)).await;
        if let Ok(Err(error)) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "a Sprite's files cannot be deleted");
        }
    }

    fn unmount(&self, dir: &Path) {
        if self.overlay {
            for name in Self::system_dirs() {
                let _ = rustix::mount::unmount(layer(&dir.join("disk"), name).join("merged"), UnmountFlags::DETACH);
            }
            if self.disks == Disks::Images {
                Disks::unmount(dir);
            }
        }
    }

    /// Login shells set a PATH of their own: there the CLIs are found too.
    fn link_agents(&self, bin: &Path) -> io::Result<()> {
        let Some(agents) = &self.agents_dir else { return Ok(()) };
        fs::create_dir_all(bin)?;
        for entry in fs::read_dir(agents.join("bin"))? {
            let name = entry?.file_name();
            std::os::unix::fs::symlink(Path::new(AGENTS).join("bin").join(&name), bin.join(&name))?;
        }
        Ok(())
    }

    /// The system directories that are no links here.
    fn system_dirs() -> impl Iterator<Item = &'static str> {
        SYSTEM.into_iter().filter(|name| fs::symlink_metadata(Path::new("/").join(name)).is_ok_and(|metadata| metadata.is_dir()))
    }

    /// Lays a Sprite's own changes over a system directory; gives where.
    fn mount(&self, content: &Path, name: &str) -> io::Result<PathBuf> {
        let (layer, mask) = (layer(content, name), self.mask().join(name));
        let merged = layer.join("merged");
        // What a killed server left mounted is mounted anew.
        let _ = rustix::mount::unmount(&merged, UnmountFlags::DETACH);
        let mask = if mask.exists() { format!("{}:", mask.display()) } else { String::new() };
        let (upper, work) = (layer.join("upper"), layer.join("work"));
        let options = format!("lowerdir={mask}/{name},upperdir={},workdir={}", upper.display(), work.display());
        let options = std::ffi::CString::new(options).map_err(io::Error::other)?;
        rustix::mount::mount("overlay", &merged, "overlay", MountFlags::empty(), options.as_c_str())?;
        Ok(merged)
    }

    /// The layer that hides: an opaque directory where one is to look empty, a whiteout where a file is not to be.
    fn build_mask(&self) -> io::Result<()> {
        let _ = fs::remove_dir_all(self.mask());
        fs::create_dir_all(self.mask())?;
        HIDDEN.iter().try_for_each(|path| self.hide(Path::new(path)))
    }

    fn mask(&self) -> PathBuf {
        self.shared.join("mask")
    }

    fn hide(&self, path: &Path) -> io::Result<()> {
        let Ok(metadata) = fs::symlink_metadata(Path::new("/").join(path)) else { return Ok(()) };
        let masked = self.mask().join(path);
        if let Some(parent) = masked.parent() {
            fs::create_dir_all(parent)?;
        }
        if metadata.is_dir() {
            fs::create_dir_all(&masked)?;
            opaque(&masked)
        } else {
            rustix::fs::mknodat(CWD, &masked, FileType::CharacterDevice, Mode::empty(), 0)?;
            Ok(())
        }
    }
}

/// A Sprite's root is this machine's to the kernel, which lets it write there what all of the machine goes by. What is mounted over
/// them cannot be taken away without rights that nothing in a Sprite has, and no other `/proc` can be mounted while it is there.
fn hide_kernel(command: &mut Command) {
    for read_only in ["/proc/sys", "/proc/fs", "/proc/acpi", "/proc/scsi"] {
        command.args(["--ro-bind-try", read_only, read_only]);
    }
    for file in ["/proc/kcore", "/proc/sysrq-trigger"] {
        if Path::new(file).exists() {
            command.args(["--ro-bind", "/dev/null", file]);
        }
    }
}

/// The devices that programs expect. For its own `--dev` bwrap would put a second user namespace inside the first where it is not root,
/// and then nobody could enter the sandbox from outside.
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

/// Where a Sprite's own changes to a system directory are kept.
fn layer(content: &Path, name: &str) -> PathBuf {
    content.join("layers").join(name.replace('/', "-"))
}

fn opaque(dir: &Path) -> io::Result<()> {
    Ok(rustix::fs::setxattr(dir, "trusted.overlay.opaque", b"y", XattrFlags::empty())?)
}

impl Holder {
    /// The user that commands run as, within.
    pub const UID: u32 = 1001;
    /// Users that a sandbox has, numbered from 0, where it has users of its own.
    pub const UIDS: u32 = 65_536;

    /// The machine's number of one of a sandbox's users.
    pub fn owner_outside(inside: u32) -> u32 {
        if inside == 0 { 0 } else { FOREIGN_UIDS + inside }
    }

    /// Whether the sandbox still runs.
    pub fn is_alive(self) -> bool {
        self.process.is_alive()
    }

    /// The Sprite's root, as this server can open it.
    pub fn root(self) -> io::Result<File> {
        File::open(self.root_path())
    }

    fn root_path(self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.process.pid))
    }

    /// What a killed server left waiting goes on.
    pub async fn release(self) {
        Frozen::release(self.root_path()).await;
    }

    /// Whether this is the sandbox that a policy asks for.
    pub fn has_own_network(self) -> bool {
        self.own_network
    }

    pub fn has_users(self) -> bool {
        self.users
    }

    /// Whether a process, as this server numbers them, is one of the sandbox's.
    pub fn contains(self, pid: i32) -> bool {
        let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        namespace(self.process.pid).is_some_and(|own| namespace(pid) == Some(own))
    }

    /// Kills every process of the sandbox and waits until they are gone.
    pub async fn kill(self) {
        if !self.is_alive() {
            return;
        }
        if let Some(pid) = Pid::from_raw(self.process.pid) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        for _ in 0..200 {
            if !self.is_alive() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tracing::warn!(pid = self.process.pid, "a sandbox does not die");
    }
}

/// Writes a file so that a reader sees the old content or the new, never a part.
pub fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    let draft = path.with_extension("draft");
    let mut file = File::create(&draft)?;
    file.write_all(content)?;
    file.sync_data()?;
    fs::rename(draft, path)
}

/// The environment that every command has.
pub fn environment(holder: Holder) -> Vec<(&'static str, String)> {
    let own = [("PATH", PATH), ("HOME", HOME), ("USER", USER), ("LOGNAME", USER), ("SHELL", "/bin/bash"), ("LANG", "C.UTF-8")];
    let mut environment: Vec<_> = own.into_iter().map(|(name, value)| (name, value.to_owned())).collect();
    if holder.own_network {
        environment.extend(crate::network::proxy_variables());
    }
    environment
}

/// Gives a new user namespace a Sprite's users. Its root is this server's, and the others are nobody's.
fn give_users(pid: u32) -> io::Result<()> {
    for map in ["uid_map", "gid_map"] {
        let users = format!("0 0 1\n1 {} {}\n", Holder::owner_outside(1), Holder::UIDS - 1);
        fs::write(format!("/proc/{pid}/{map}"), users)?;
    }
    Ok(())
}

fn script(path: &Path, text: &str) -> io::Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

/// How names are resolved, where an overlay of `/etc` does not show it: files that are links into `/run`, which is the Sprite's own, and
/// files that are mounts themselves, as in containers.
fn files_beside_the_overlay() -> Vec<PathBuf> {
    let device = |path: &Path| fs::metadata(path).ok().map(|metadata| metadata.dev());
    let beside = |path: &PathBuf| path.starts_with("/run") || device(path) != device(Path::new("/etc"));
    let files = ["/etc/resolv.conf", "/etc/hosts"].into_iter().filter_map(|file| fs::canonicalize(file).ok());
    files.filter(beside).collect()
}
