//! A Sprite's sandbox: user, mount, PID, IPC and UTS namespaces of its own, made by bubblewrap, over a root that is copied on write.
//!
//! A Sprite's root is a directory of its own. This machine's system directories are laid over it, and nothing else of this machine:
//! as root through overlays, so that a Sprite may change them for itself; otherwise read-only. A mask layer hides keys and passwords.
//!
//! A holder process keeps the namespaces alive. Commands enter them with `nsenter`; killing the holder kills everything inside. The
//! holder outlives this server, so that a restart takes the Sprite up as it runs.

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
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    process::Command,
};

use crate::network;

/// The user that a Sprite's processes see themselves as (sprites-api.md §11.1).
const USER: &str = "sprite";
const UID: &str = "1001";
pub const HOME: &str = "/home/sprite";
/// Where the agent CLIs are mounted.
const AGENTS: &str = "/opt/agents";
pub const PATH: &str = "/opt/agents/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const BOOT_MAX: Duration = Duration::from_secs(20);

/// What a Sprite sees of this machine. Where one is a link (`/bin` to `usr/bin`), the Sprite has the same link.
const SYSTEM: [&str; 10] = ["bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "etc", "var/lib/dpkg", "var/lib/apt"];
/// Within that, what it does not see.
const HIDDEN: [&str; 8] =
    ["etc/shadow", "etc/shadow-", "etc/gshadow", "etc/gshadow-", "etc/sudoers", "etc/sudoers.d", "etc/ssh", "etc/ssl/private"];
/// What a Sprite has of its own.
const OWN: [&str; 10] = ["home/sprite", "root", "tmp", "workspace", "var/tmp", "var/log", "var/cache", "var/lib", "srv", "opt"];

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
    mask: PathBuf,
    agents_dir: Option<PathBuf>,
}

/// The process that keeps a sandbox alive. Its start time tells it from a later process of the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub pid: i32,
    start_time: u64,
    /// Whether it is in a network namespace of its own.
    #[serde(default)]
    own_network: bool,
}

impl Sandboxes {
    /// Chooses the isolation and proves it with a sandbox.
    pub async fn prepare(isolation: Isolation, data_dir: &Path, agents_dir: Option<&Path>) -> Result<Self, SandboxError> {
        let root = rustix::process::geteuid().is_root();
        let overlay = match isolation {
            Isolation::Auto => root,
            Isolation::Overlay => true,
            Isolation::ReadOnly => false,
        };
        fs::create_dir_all(data_dir).map_err(io_error("the data directory cannot be made"))?;
        let data_dir = data_dir.canonicalize().map_err(io_error("the data directory cannot be found"))?;
        let sandboxes = Self { overlay, mask: data_dir.join("mask"), agents_dir: agents_dir.map(Path::to_path_buf) };
        if overlay {
            sandboxes.build_mask().map_err(io_error("the mask layer cannot be made"))?;
        }
        let probe = data_dir.join("probe");
        let _ = fs::remove_dir_all(&probe);
        sandboxes.make_files(&probe)?;
        let holder = sandboxes.boot(&probe, "probe", false).await?;
        sandboxes.destroy(&probe, Some(holder)).await;
        let kind = if overlay { "overlay" } else { "read-only root" };
        tracing::info!(
            isolation = kind,
            "sandboxes work; without a policy the network is this machine's own, and resources are not limited"
        );
        Ok(sandboxes)
    }

    /// Writes a new Sprite's files.
    pub fn make_files(&self, dir: &Path) -> Result<(), SandboxError> {
        let make = || -> io::Result<()> {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
            let root = dir.join("files");
            for own in OWN {
                fs::create_dir_all(root.join(own))?;
            }
            fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
            for name in SYSTEM {
                match fs::read_link(Path::new("/").join(name)) {
                    Ok(link) => std::os::unix::fs::symlink(link, root.join(name))?,
                    Err(_) if self.overlay => {
                        for part in ["upper", "work", "merged"] {
                            fs::create_dir_all(layer(dir, name).join(part))?;
                        }
                    }
                    Err(_) => {}
                }
            }
            if self.overlay {
                self.link_agents(&layer(dir, "usr").join("upper/local/bin"))?;
                give_root_in_name(|name| layer(dir, name).join("upper"))?;
            }
            let etc = if self.overlay { layer(dir, "etc").join("upper") } else { dir.to_path_buf() };
            for (file, entry) in [("passwd", format!("{USER}:x:{UID}:{UID}::{HOME}:/bin/bash\n")), ("group", format!("{USER}:x:{UID}:\n"))]
            {
                let mut text = fs::read_to_string(Path::new("/etc").join(file)).unwrap_or_default();
                text.push_str(&entry);
                fs::write(etc.join(file), text)?;
            }
            Ok(())
        };
        make().map_err(io_error("a Sprite's files cannot be made"))
    }

    /// Starts the sandbox of a Sprite whose files are there.
    pub async fn boot(&self, dir: &Path, hostname: &str, own_network: bool) -> Result<Holder, SandboxError> {
        let booted = self.start_holder(dir, hostname, own_network).await;
        // The sandbox has its own view of the overlays; this machine's table of mounts is left as it was.
        self.unmount(dir);
        booted
    }

    async fn start_holder(&self, dir: &Path, hostname: &str, own_network: bool) -> Result<Holder, SandboxError> {
        let mut command = Command::new("bwrap");
        command.args(["--unshare-user", "--uid", UID, "--gid", UID, "--unshare-pid", "--unshare-ipc", "--unshare-uts"]);
        if own_network {
            command.arg("--unshare-net");
        }
        command.args(["--hostname", hostname]);
        command.arg("--bind").arg(dir.join("files")).arg("/");
        for name in Self::system_dirs() {
            let path = Path::new("/").join(name);
            if self.overlay {
                let merged = self.mount(dir, name).map_err(io_error("the overlay cannot be mounted"))?;
                command.arg("--bind").arg(merged).arg(path);
            } else {
                command.arg("--ro-bind").arg(&path).arg(&path);
            }
        }
        if !self.overlay {
            for file in ["passwd", "group"] {
                command.arg("--ro-bind").arg(dir.join(file)).arg(Path::new("/etc").join(file));
            }
        }
        command.args(["--proc", "/proc", "--tmpfs", "/run"]);
        if self.overlay {
            command.args(["--dev", "/dev", "--tmpfs", "/dev/shm"]);
        } else {
            bind_devices(&mut command);
        }
        if let Some(agents) = &self.agents_dir {
            command.arg("--ro-bind").arg(agents).arg(AGENTS);
        }
        for file in files_beside_the_overlay() {
            command.arg("--ro-bind").arg(&file).arg(&file);
        }
        command.args(["--chdir", HOME, "--info-fd", "2", "--", "/bin/sh", "-c", "echo ready; exec >&-; exec sleep infinity"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).env_clear().env("PATH", PATH);
        // A group of its own: a signal to the server's group does not reach it.
        command.process_group(0);
        let mut child = command.spawn().map_err(io_error("bwrap cannot be started (is bubblewrap installed?)"))?;
        // bwrap tells the holder's number, or what is wrong, on standard error; the holder itself tells when all is set up.
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let mut report = String::new();
        let ready = async {
            let (mut stdout, mut stderr) = (BufReader::new(stdout?), stderr?);
            let mut line = String::new();
            let (told, set_up) = tokio::join!(stderr.read_to_string(&mut report), stdout.read_line(&mut line));
            (told.is_ok() && set_up.is_ok() && line == "ready\n").then_some(())
        };
        let ready = tokio::time::timeout(BOOT_MAX, ready).await.ok().flatten();
        let info: serde_json::Value = serde_json::from_str(&report).unwrap_or_default();
        let pid = info.get("child-pid").and_then(serde_json::Value::as_i64).and_then(|pid| i32::try_from(pid).ok());
        let (Some(()), Some(pid)) = (ready, pid) else {
            let _ = child.start_kill();
            return Err(SandboxError::Boot(report.trim().to_owned()));
        };
        // Tokio reaps the process when the handle is gone: nothing is left behind either way.
        drop(child);
        let start_time = start_time(pid).ok_or_else(|| SandboxError::Boot("it ended at once".to_owned()))?;
        Ok(Holder { pid, start_time, own_network })
    }

    /// Whether a sandbox's network can be limited here: its namespace is entered from outside, which takes root.
    pub fn can_limit_network(&self) -> bool {
        self.overlay
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
                let _ = rustix::mount::unmount(layer(dir, name).join("merged"), UnmountFlags::DETACH);
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
    fn mount(&self, dir: &Path, name: &str) -> io::Result<PathBuf> {
        let (layer, mask) = (layer(dir, name), self.mask.join(name));
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
        let _ = fs::remove_dir_all(&self.mask);
        fs::DirBuilder::new().recursive(true).mode(0o755).create(&self.mask)?;
        HIDDEN.iter().try_for_each(|path| self.hide(Path::new(path)))
    }

    fn hide(&self, path: &Path) -> io::Result<()> {
        let Ok(metadata) = fs::symlink_metadata(Path::new("/").join(path)) else { return Ok(()) };
        let masked = self.mask.join(path);
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
fn layer(dir: &Path, name: &str) -> PathBuf {
    dir.join("layers").join(name.replace('/', "-"))
}

fn opaque(dir: &Path) -> io::Result<()> {
    Ok(rustix::fs::setxattr(dir, "trusted.overlay.opaque", b"y", XattrFlags::empty())?)
}

impl Holder {
    /// Whether the sandbox still runs.
    pub fn is_alive(self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }

    /// The Sprite's root, as this server can open it.
    pub fn root(self) -> io::Result<File> {
        File::open(format!("/proc/{}/root", self.pid))
    }

    /// Whether this is the sandbox that a policy asks for.
    pub fn has_own_network(self) -> bool {
        self.own_network
    }

    /// A command that runs inside, with its own environment and directory.
    pub fn enter(self, dir: &str, argv: &[String], env: &[(String, String)]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg("--target").arg(self.pid.to_string());
        command.args(["--user", "--mount", "--pid", "--ipc", "--uts", "--preserve-credentials"]);
        if self.own_network {
            command.arg("--net");
        }
        command.args(["--", "/usr/bin/env", "-C", dir, "--"]);
        command.args(argv).env_clear().envs([("PATH", PATH), ("HOME", HOME), ("USER", USER), ("LANG", "C.UTF-8")]);
        if self.own_network {
            command.envs(network::proxy_variables());
        }
        command.envs(env.iter().map(|(name, value)| (name, value)));
        command.process_group(0);
        command
    }

    /// Kills every process of the sandbox and waits until they are gone.
    pub async fn kill(self) {
        if !self.is_alive() {
            return;
        }
        if let Some(pid) = Pid::from_raw(self.pid) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        for _ in 0..200 {
            if !self.is_alive() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tracing::warn!(pid = self.pid, "a sandbox does not die");
    }
}

/// When a process started, in clock ticks since the boot; none for one that is gone or a zombie.
fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Writes a file so that a reader sees the old content or the new, never a part.
pub fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    let draft = path.with_extension("draft");
    let mut file = File::create(&draft)?;
    file.write_all(content)?;
    file.sync_data()?;
    fs::rename(draft, path)
}
/// A `sudo`, which set-up scripts and package managers expect; and a package manager that does without a second user.
fn give_root_in_name(upper: impl Fn(&str) -> PathBuf) -> io::Result<()> {
    let bin = upper("usr").join("local/bin");
    fs::create_dir_all(&bin)?;
    fs::write(bin.join("sudo"), include_str!("../scripts/sudo.sh"))?;
    fs::set_permissions(bin.join("sudo"), fs::Permissions::from_mode(0o755))?;
    let apt = upper("etc").join("apt/apt.conf.d");
    fs::create_dir_all(&apt)?;
    fs::write(apt.join("99local-sprites"), "APT::Sandbox::User \"root\";\n")?;
    // What it downloaded is another user's here.
    let lists = upper("var/lib/apt").join("lists");
    fs::create_dir_all(lists.join("partial"))?;
    opaque(&lists)
}

/// How names are resolved, where an overlay of `/etc` does not show it: files that are links into `/run`, which is the Sprite's own, and
/// files that are mounts themselves, as in containers.
fn files_beside_the_overlay() -> Vec<PathBuf> {
    let device = |path: &Path| fs::metadata(path).ok().map(|metadata| metadata.dev());
    let beside = |path: &PathBuf| path.starts_with("/run") || device(path) != device(Path::new("/etc"));
    let files = ["/etc/resolv.conf", "/etc/hosts"].into_iter().filter_map(|file| fs::canonicalize(file).ok());
    files.filter(beside).collect()
}
