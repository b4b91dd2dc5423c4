//! Commands in a sandbox with a kernel of its own: gVisor, by `runsc exec`.
//!
//! Its namespaces cannot be joined from outside. The launcher starts `runsc exec`, which hands the
//! command's standard streams to gVisor's kernel and ends as the command does. That program passes
//! on signals for terminals alone, so a relay between the two sends all others into the sandbox.

use std::{
    ffi::OsString,
    fs,
    io::{self, Write as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::process::{CommandExt as _, ExitStatusExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use crate::isolation::{
    holder::Holder,
    launch::{exit_code, variables},
};

/// The first argument of this program as a relay of signals.
pub const RELAY_COMMAND: &str = "relay-signals";
pub const PROGRAM: &str = "runsc";

/// The network is the namespace that the server has made, by the machine's network stack: what
/// keeps a Sprite from private addresses are routes there. The server reads and writes files too,
/// so `runsc` may keep none in its own memory.
pub const FLAGS: [&str; 7] = [
    "--platform=systrap",
    "--network=host",
    "--file-access=shared",
    "--overlay2=none",
    "--host-uds=open",
    "--host-fifo=open",
    "--ignore-cgroups",
];

const EXIT_NOT_FOUND: u8 = 127;
/// What `runsc exec` ends with when it did not start the command.
const EXIT_OF_RUNSC: u8 = 128;
const EXIT_KILLED: u8 = 137;
/// How long a command may take until it can be sent signals.
const START_MAX: Duration = Duration::from_secs(10);
/// How long a sandbox that was killed may take to be gone.
const DEATH_MAX: Duration = Duration::from_millis(500);
const KILL: i32 = 9;
/// The signals of the API that a program can catch.
const PASSED_ON: [i32; 8] = [1, 2, 3, 10, 12, 15, 18, 28];

/// A container, as `runsc` finds it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Guest {
    /// Where `runsc` keeps what it knows of this container.
    pub state: PathBuf,
    pub id: String,
}

impl Guest {
    fn runsc(&self) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg("--root").arg(&self.state).args(["--log", "/dev/null"]);
        command
    }

    /// The process that serves the container's files.
    pub fn gofer(&self) -> Option<i32> {
        let file = self.state.join(format!("{0}_sandbox:{0}.state", self.id));
        let state: serde_json::Value = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
        state.get("goferPid")?.as_i64()?.try_into().ok()
    }
}

/// What the launcher starts in a container.
#[derive(Debug)]
pub struct Start<'a> {
    pub guest: &'a Guest,
    pub holder: Holder,
    pub dir: &'a Path,
    pub terminal: bool,
    pub program: OsString,
    pub arguments: Vec<OsString>,
}

/// Runs a command to its end, with this process's standard streams.
///
/// # Errors
/// When `runsc` cannot be started.
pub fn run(start: &Start<'_>) -> io::Result<u8> {
    let guest = start.guest;
    let process = process_json(start)?;
    let own = std::process::id();
    let target = Target { pid_file: guest.state.join(format!("exec.{own}")), guest };
    let mut exec = guest.runsc();
    exec.arg("exec").arg("--process").arg(format!("/proc/{own}/fd/{}", process.as_raw_fd()));
    exec.arg("--internal-pid-file").arg(&target.pid_file).arg(&guest.id);
    let mut command = if start.terminal {
        let mut command = Command::new("/usr/bin/setsid");
        command.args(["--ctty", "--"]);
        command
    } else {
        let mut command = Command::new("/proc/self/exe");
        command.args([RELAY_COMMAND, &serde_json::to_string(guest)?]).arg(&target.pid_file);
        command.process_group(0);
        command
    };
    command.arg(exec.get_program()).args(exec.get_args());
    let status = command.status()?;
    if let Some(signal) = status.signal() {
        // It ended the program that passes it on, and not the command.
        target.send(signal);
    }
    let code = match exit_code(status) {
        _ if !start.holder.is_alive() => EXIT_KILLED,
        EXIT_OF_RUNSC if target.pid().is_none() => EXIT_NOT_FOUND,
        // What runs the command ends before the sandbox that dies under it.
        EXIT_OF_RUNSC if dies_within(start.holder, DEATH_MAX) => EXIT_KILLED,
        code => code,
    };
    let _ = fs::remove_file(&target.pid_file);
    Ok(code)
}

fn dies_within(holder: Holder, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    while holder.is_alive() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    !holder.is_alive()
}

/// What `runsc` is told about the command, in memory: the environment may hold secrets.
fn process_json(start: &Start<'_>) -> io::Result<OwnedFd> {
    let text = |text: &OsString| text.to_string_lossy().into_owned();
    let args: Vec<_> = std::iter::once(&start.program).chain(&start.arguments).map(text).collect();
    let env: Vec<_> =
        variables().map(|(name, value)| format!("{}={}", text(&name), text(&value))).collect();
    let none: [&str; 0] = [];
    let process = json!({
        "terminal": start.terminal,
        "user": { "uid": Holder::UID, "gid": Holder::UID, "umask": 0o022 },
        "args": args,
        "env": env,
        "cwd": start.dir,
        "capabilities": { "bounding": none, "effective": none, "permitted": none, "inheritable": none, "ambient": none },
        "noNewPrivileges": true,
    });
    let file = rustix::fs::memfd_create("process", MemfdFlags::CLOEXEC)?;
    fs::File::from(file.try_clone()?).write_all(&serde_json::to_vec(&process)?)?;
    Ok(file)
}

/// A command that runs in a container.
struct Target<'a> {
    guest: &'a Guest,
    /// Has its number, as the container counts, once it has started.
    pid_file: PathBuf,
}

impl Target<'_> {
    fn pid(&self) -> Option<u32> {
        fs::read_to_string(&self.pid_file).ok()?.trim().parse().ok()
    }

    /// Sends a signal to the command and its process group, which it leads.
    fn send(&self, signal: i32) {
        let until = Instant::now() + START_MAX;
        let pid = loop {
            match self.pid() {
                Some(pid) => break pid.to_string(),
                None if Instant::now() > until => return,
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        let signal = signal.to_string();
        let user = format!("{0}:{0}", Holder::UID);
        let mut group = self.guest.runsc();
        group.args(["exec", "--user", &user, "--cwd", "/", &self.guest.id]);
        group.args(["/bin/sh", "-c", "kill -$1 -- -$2", "sh", &signal, &pid]);
        if !ran(group) || signal == KILL.to_string() {
            let mut one = self.guest.runsc();
            one.args(["kill", "--pid", &pid, &self.guest.id, &signal]);
            ran(one);
        }
    }
}

fn ran(mut command: Command) -> bool {
    let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Runs the relay: a container and the file with the command's number there, then what to run.
/// Ends as that does.
pub fn relay_main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let guest =
        arguments.next().and_then(|text| serde_json::from_str::<Guest>(text.to_str()?).ok());
    let (Some(guest), Some(pid_file), Some(program)) = (guest, arguments.next(), arguments.next())
    else {
        eprintln!("local-sprites: {RELAY_COMMAND} is for the server itself");
        return ExitCode::from(2);
    };
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).process_group(0);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let status = runtime.and_then(|runtime| {
        let status = runtime.block_on(relay(&guest, pid_file.into(), command));
        // Signals that are still under way are for a command that has ended.
        runtime.shutdown_background();
        status
    });
    match status {
        Ok(status) => ExitCode::from(exit_code(status)),
        Err(error) => {
            eprintln!("local-sprites: {PROGRAM}: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn relay(
    guest: &Guest,
    pid_file: PathBuf,
    mut command: tokio::process::Command,
) -> io::Result<ExitStatus> {
    let (sender, mut signals) = tokio::sync::mpsc::channel(16);
    let mut listeners = tokio::task::JoinSet::new();
    for number in PASSED_ON {
        let mut caught = signal(SignalKind::from_raw(number))?;
        let sender = sender.clone();
        listeners.spawn(async move {
            while caught.recv().await.is_some() && sender.send(number).await.is_ok() {}
        });
    }
    let mut child = command.spawn()?;
    let mut sending = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            status = child.wait() => return status,
            Some(number) = signals.recv() => {
                let (guest, pid_file) = (guest.clone(), pid_file.clone());
                sending.spawn_blocking(move || Target { guest: &guest, pid_file }.send(number));
            }
        }
    }
}
