//! Starts a sandbox without root: bubblewrap, with one user, over the image.

use std::{fs, io, path::Path, process::Stdio, time::Duration};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    process::{Child, Command},
};

use crate::isolation::{
    holder::{Holder, Network},
    process::Process,
    sandbox::{
        Sandboxes,
        error::{SandboxError, io_error},
        files::WRITABLE,
        inside::{AGENT_HOST, AGENTS, HOME, PATH},
    },
};

const BOOT_MAX: Duration = Duration::from_secs(20);

/// What such a sandbox has of its own, not of the image.
const NOT_OF_THE_IMAGE: [&str; 9] =
    ["dev", "home", "opt", "proc", "run", "srv", "sys", "tmp", "workspace"];

impl Sandboxes {
    pub(super) async fn boot_as_user(
        &self,
        dir: &Path,
        hostname: &str,
    ) -> Result<Holder, SandboxError> {
        let content = self.mount_disk(dir).await?;
        let mut command = self.bubblewrap();
        command.args(["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--hostname", hostname]);
        command.arg("--tmpfs").arg("/");
        let entries = fs::read_dir(&self.kind.rootfs)
            .map_err(io_error("the root file system cannot be read"))?
            .flatten();
        for entry in
            entries.filter(|entry| !NOT_OF_THE_IMAGE.iter().any(|own| entry.file_name() == *own))
        {
            let there = Path::new("/").join(entry.file_name());
            match fs::read_link(entry.path()) {
                Ok(link) => command.arg("--symlink").arg(link).arg(there),
                Err(_) => command.arg("--ro-bind").arg(entry.path()).arg(there),
            };
        }
        for own in WRITABLE {
            command
                .arg("--bind")
                .arg(content.join("upper").join(own))
                .arg(Path::new("/").join(own));
        }
        for file in ["passwd", "group", "hosts"] {
            command.arg("--ro-bind").arg(self.shared.join(file)).arg(Path::new("/etc").join(file));
        }
        command.args(["--ro-bind-try", "/etc/resolv.conf", "/etc/resolv.conf"]);
        command.arg("--ro-bind").arg(dir.join("inside")).arg("/.sprite");
        command.args([
            "--proc",
            "/proc",
            "--size",
            &self.memory_files_bytes.to_string(),
            "--tmpfs",
            "/run",
        ]);
        bind_devices(&mut command);
        if let Some(agents) = &self.kind.agents_dir {
            command.arg("--ro-bind").arg(agents).arg(AGENTS);
        }
        if let Some(file) = &self.kind.agent_host {
            command.arg("--ro-bind").arg(file).arg(AGENT_HOST);
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
        ]);
        command.arg("echo ready; exec >&-; exec sleep infinity");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .env_clear()
            .env("PATH", PATH);
        // A group of its own: a signal to the server's group does not reach it.
        command.process_group(0);
        let mut child = command
            .spawn()
            .map_err(io_error("bwrap cannot be started (is bubblewrap installed?)"))?;
        let mut report = String::new();
        let ready = tokio::time::timeout(BOOT_MAX, self.await_ready(&mut child, &mut report)).await;
        let info: serde_json::Value = serde_json::from_str(&report).unwrap_or_default();
        let pid = info
            .get("child-pid")
            .and_then(serde_json::Value::as_i64)
            .and_then(|pid| i32::try_from(pid).ok());
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
        let process =
            Process::find(pid).ok_or_else(|| SandboxError::Boot("it ended at once".to_owned()))?;
        Ok(Holder {
            process,
            network: Network::Machine,
            uplink: None,
            first_user: None,
            gofer: None,
        })
    }

    /// Bubblewrap in a user namespace with one user.
    fn bubblewrap(&self) -> Command {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", r#"exec 9<"$1"; shift; exec bwrap --seccomp 9 "$@""#, "sh"])
            .arg(self.shared.join("seccomp.bpf"));
        command.args([
            "--unshare-user",
            "--uid",
            &Holder::UID.to_string(),
            "--gid",
            &Holder::UID.to_string(),
        ]);
        command.kill_on_drop(false);
        command
    }

    /// Bubblewrap tells the holder's number, or what is wrong, on standard error; the holder itself
    /// tells when all is set up.
    async fn await_ready(&self, child: &mut Child, report: &mut String) -> io::Result<()> {
        let broken = || io::Error::other("it has no standard streams");
        let (mut stdout, mut stderr) = (
            BufReader::new(child.stdout.take().ok_or_else(broken)?),
            child.stderr.take().ok_or_else(broken)?,
        );
        let mut line = String::new();
        let (told, set_up) =
            tokio::join!(stderr.read_to_string(report), stdout.read_line(&mut line));
        told?;
        set_up?;
        if line == "ready\n" { Ok(()) } else { Err(io::Error::other("it ended at once")) }
    }
}

/// The devices that programs expect. For its own `--dev` bwrap would put a second user namespace
/// inside the first where it is not root, and then the sandbox could not be entered from outside.
fn bind_devices(command: &mut Command) {
    command.args(["--tmpfs", "/dev", "--dir", "/dev/shm"]);
    for device in ["null", "zero", "full", "random", "urandom", "tty"] {
        let path = Path::new("/dev").join(device);
        command.arg("--dev-bind").arg(&path).arg(&path);
    }
    for (target, link) in [("fd", "fd"), ("fd/0", "stdin"), ("fd/1", "stdout"), ("fd/2", "stderr")]
    {
        command
            .arg("--symlink")
            .arg(Path::new("/proc/self").join(target))
            .arg(Path::new("/dev").join(link));
    }
}
