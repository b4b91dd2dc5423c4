//! The host's process: carries out what [`Core`] decides, and passes events to it. One thread waits
//! for everything.

mod actions;
mod poll;
mod program;

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt as _, OpenOptionsExt as _},
            net::{UnixListener, UnixStream},
            process::CommandExt as _,
        },
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    time::Duration,
};

use contract::host::{Input, Spec, Stop, input, turn_ended::Reason};
use journal::Decoder;
use prost::Message as _;
use rustix::{
    event::{EventfdFlags, eventfd},
    fs::{FlockOperation, flock},
    io::Errno,
    net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with},
    process::Pid,
};

use crate::{
    adapters,
    core::{Action, Core},
    custom_tools, http, monotonic_ms,
    process::{self, Program, User},
    store::{SEGMENT_BYTES, Store},
};

/// Replies to requests of the adapter that wait for the host; senders wait when there are more.
const HTTP_REPLIES: usize = 256;
/// How long a finished program's output is read at most, while background processes write on.
const DRAIN_MS: u64 = 2_000;
/// How long a host with another specification may take to end: longer than a CLI is given.
const RESTART_MS: u64 = 20_000;
const RESTART_POLL_MS: u64 = 5;

pub fn lock_path(dir: &Path) -> PathBuf {
    dir.join("lock")
}

pub fn socket_path(dir: &Path) -> PathBuf {
    dir.join("sock")
}

/// The revision of the specification of the host that runs, or ran last.
fn revision_path(dir: &Path) -> PathBuf {
    dir.join("revision")
}

pub fn journal_path(dir: &Path) -> PathBuf {
    dir.join("journal")
}

/// `agent-host start`: starts the host detached, unless it runs, and returns when it serves.
///
/// `user`: whom programs run as, where the specification names no one. `keeps`: a host of another
/// revision continues.
pub fn start(dir: &Path, spec: &Path, user: &str, keeps: bool) -> Result<(), String> {
    let failed = |what: &str, error: io::Error| format!("{what}: {error}");
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|error| failed("cannot create the folder", error))?;
    let bytes = fs::read(spec).map_err(|error| failed("cannot read the specification", error))?;
    let mut spec = Spec::decode(bytes.as_slice())
        .map_err(|error| format!("the specification is not valid: {error}"))?;
    if spec.user.is_empty() {
        user.clone_into(&mut spec.user);
    }
    let former = fs::read_to_string(revision_path(dir)).unwrap_or_default();
    if !keeps && !spec.revision.is_empty() && spec.revision != former {
        end_running(dir)?;
    }
    let mut command = Command::new(process::SELF);
    command
        .arg0("agent-host")
        .arg("run")
        .arg("--dir")
        .arg(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .current_dir("/");
    let mut child = command.spawn().map_err(|error| failed("cannot start the host", error))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin
            .write_all(&spec.encode_to_vec())
            .map_err(|error| failed("cannot pass the specification on", error))?;
    }
    let mut answer = String::new();
    if let Some(stdout) = child.stdout.take() {
        stdout
            .take(4096)
            .read_to_string(&mut answer)
            .map_err(|error| failed("cannot read the host's answer", error))?;
    }
    match answer.trim() {
        "ready" | "running" => Ok(()),
        "" => Err("the host ended before it served".to_owned()),
        message => Err(message.to_owned()),
    }
}

/// Ends a host that runs under another specification, and waits until it is gone.
fn end_running(dir: &Path) -> Result<(), String> {
    // Without a host there is nothing to connect to.
    let Ok(mut stream) = UnixStream::connect(socket_path(dir)) else { return Ok(()) };
    // Unlike any before, since a host ignores an id that it knows.
    let since_epoch =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let id = format!("restart-{}-{}", since_epoch.as_nanos(), std::process::id());
    let stop = Input { id, kind: Some(input::Kind::Stop(Stop {})) };
    let _ = stream.set_write_timeout(Some(Duration::from_secs(5)));
    stream
        .write_all(&journal::input_frame(&stop))
        .map_err(|error| format!("cannot end the running host: {error}"))?;
    let lock = OpenOptions::new()
        .write(true)
        .open(lock_path(dir))
        .map_err(|error| format!("cannot open the lock: {error}"))?;
    for _ in 0..RESTART_MS / RESTART_POLL_MS {
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(RESTART_POLL_MS));
    }
    Err("the running host did not end".to_owned())
}

/// `agent-host run`: the host itself. Reads its specification from standard input, answers `ready`,
/// `running` or an error, and serves.
pub fn run(dir: &Path) -> ExitCode {
    let answer = |text: &str| {
        let mut stdout = io::stdout();
        let _ = stdout.write_all(text.as_bytes());
        let _ = stdout.flush();
        // Waiting readers read to the end.
        if let Ok(null) = OpenOptions::new().read(true).write(true).open("/dev/null") {
            let _ = rustix::stdio::dup2_stdout(&null);
            let _ = rustix::stdio::dup2_stdin(&null);
        }
    };
    let mut bytes = Vec::new();
    let read = io::stdin().read_to_end(&mut bytes);
    let _ = rustix::process::setsid();
    let _ = rustix::thread::set_name(c"agent-host");
    let host = match read.map_err(|error| error.to_string()).and_then(|_| Host::open(dir, &bytes)) {
        Ok(Some(host)) => host,
        Ok(None) => {
            answer("running");
            return ExitCode::SUCCESS;
        }
        Err(message) => {
            answer(&message);
            return ExitCode::FAILURE;
        }
    };
    answer("ready");
    match host.serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// A connected `attach`.
struct Client {
    stream: UnixStream,
    decoder: Decoder,
}

struct Running {
    program: Program,
    to_cli: VecDeque<u8>,
    close_input: bool,
    input_closed: bool,
    stdout_open: bool,
    stderr_open: bool,
    exit: Option<i32>,
    /// Since when nothing was read, once the program is gone.
    quiet_since: u64,
    gone_since: u64,
}

struct Host {
    dir: PathBuf,
    spec: Spec,
    user: User,
    store: Store,
    core: Core,
    /// Held as long as this process lives.
    _lock: File,
    listener: UnixListener,
    clients: Vec<Client>,
    /// MCP servers of the custom tools, where there are any.
    tools: Option<UnixListener>,
    tools_clients: Vec<custom_tools::Client>,
    tools_accepted: u64,
    running: Option<Running>,
    /// What background processes write after their program's end goes nowhere; without a reader
    /// they would be killed.
    late: VecDeque<OwnedFd>,
    /// In order: a line for the CLI waits until the records before it are written.
    actions: VecDeque<Action>,
    full_since: Option<u64>,
    spared: Vec<Pid>,
    refused_bytes: u64,
    mcp_failures_bytes: u64,
    awake: bool,
    awake_at: u64,
    http: (SyncSender<http::Reply>, Receiver<http::Reply>),
    wake: OwnedFd,
    exit: bool,
}

impl Host {
    /// None: another host runs.
    fn open(dir: &Path, spec: &[u8]) -> Result<Option<Self>, String> {
        let failed = |what: &str, error: io::Error| format!("{what}: {error}");
        let mut options = OpenOptions::new();
        let lock =
            options.write(true).create(true).truncate(false).mode(0o600).open(lock_path(dir));
        let lock = lock.map_err(|error| failed("cannot open the lock", error))?;
        if !take_lock(dir, &lock) {
            return Ok(None);
        }
        let mut spec = Spec::decode(spec)
            .map_err(|error| format!("the specification is not valid: {error}"))?;
        let mut tools = None;
        if !spec.custom_tools.is_empty() {
            let (listener, name) = custom_tools::listen()
                .map_err(|error| failed("cannot offer custom tools", error))?;
            spec.tools_command = custom_tools::command(&name);
            spec.mcp_servers.push(custom_tools::SERVER.to_owned());
            tools = Some(listener);
        }
        let runtime = adapters::find(&spec.runtime)
            .ok_or_else(|| format!("runtime {} is not known", spec.runtime))?;
        let user = User::find(&spec.user)?;
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
            .map_err(|error| failed("subreaper", error.into()))?;
        // Above the agent, where that is permitted: what runs out of memory is not the supervisor.
        let _ = fs::write("/proc/self/oom_score_adj", "-900");
        // Nor do programs of the same user look into it.
        let _ =
            rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);

        let (run_path, run) = (dir.join("sandbox-run"), process::sandbox_run());
        let lost = if fs::read_to_string(&run_path).is_ok_and(|former| former != run) {
            Reason::SandboxLost
        } else {
            Reason::HostLost
        };
        let store = Store::open(&journal_path(dir), SEGMENT_BYTES)
            .map_err(|error| failed("cannot open the journal", error))?;
        fs::write(&run_path, run).map_err(|error| failed("cannot write to the folder", error))?;
        fs::write(revision_path(dir), &spec.revision)
            .map_err(|error| failed("cannot write to the folder", error))?;
        process::end_marked(&user, &spec.session_id);

        let _ = fs::remove_file(socket_path(dir));
        let listener =
            UnixListener::bind(socket_path(dir)).map_err(|error| failed("cannot listen", error))?;
        listener.set_nonblocking(true).map_err(|error| failed("cannot listen", error))?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| failed("eventfd", error.into()))?;
        let refused_bytes = fs::metadata(&spec.refused_log).map_or(0, |metadata| metadata.len());
        let mcp_failures_bytes =
            fs::symlink_metadata(&spec.mcp_failures).map_or(0, |metadata| metadata.len());
        let now = monotonic_ms();
        let core = Core::new(
            spec.clone(),
            (runtime.new)(&spec),
            runtime.capabilities,
            store.state.clone(),
            lost,
            now,
        );
        Ok(Some(Self {
            dir: dir.to_owned(),
            spec,
            user,
            store,
            core,
            _lock: lock,
            listener,
            clients: Vec::new(),
            tools,
            tools_clients: Vec::new(),
            tools_accepted: 0,
            running: None,
            late: VecDeque::new(),
            actions: VecDeque::new(),
            full_since: None,
            spared: Vec::new(),
            refused_bytes,
            mcp_failures_bytes,
            awake: false,
            awake_at: 0,
            http: sync_channel(HTTP_REPLIES),
            wake,
            exit: false,
        }))
    }

    fn serve(mut self) -> io::Result<()> {
        while !self.exit {
            self.carry_out()?;
            if self.exit {
                break;
            }
            let ready = self.wait()?;
            self.handle(&ready);
            self.reap();
            self.finish_program();
            self.stay_awake();
            self.core.tick(!self.clients.is_empty() || !self.late.is_empty(), monotonic_ms());
        }
        let _ = fs::remove_file(socket_path(&self.dir));
        Ok(())
    }
}

/// A reader that checks for a host holds the lock for a moment. A host that holds it also serves.
fn take_lock(dir: &Path, lock: &File) -> bool {
    for attempt in 0..20 {
        if attempt > 0 {
            std::thread::sleep(Duration::from_millis(10));
        }
        if flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return true;
        }
        if is_served(dir) {
            return false;
        }
    }
    false
}

/// Whether a host listens. One that hangs may have as many connections waiting as its socket takes:
/// another would wait without end.
fn is_served(dir: &Path) -> bool {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    SocketAddrUnix::new(socket_path(dir)).is_ok_and(|address| {
        socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).is_ok_and(|socket| {
            matches!(net::connect(socket, &address), Ok(()) | Err(Errno::AGAIN))
        })
    })
}
