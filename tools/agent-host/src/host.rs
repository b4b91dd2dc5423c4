//! The host's process: carries out what [`Core`] decides, and tells it what happens. One thread waits for everything.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Read as _, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
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

use contract::host::{Input, Spec, Stop, input, output::Stream, record, turn_ended::Reason};
use journal::{Decoder, Frame};
use prost::Message as _;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fs::{FlockOperation, flock},
    process::{Pid, Signal},
};

use crate::{
    adapters::{self, Launch},
    client,
    core::{Action, Core},
    custom_tools::{self, Told},
    http, monotonic_ms,
    process::{self, Program, User},
    store::{NotWritten, SEGMENT_BYTES, Store},
};

const READ_BYTES: usize = 256 << 10;
/// What waits for the host from the CLI's server; its sender waits then.
/// Lines of one read that become events.
const MCP_FAILURES_MAX: usize = 20;
const HTTP_REPLIES: usize = 256;
const CLIENTS_MAX: usize = 16;
/// How long output waits for room on the disk.
const FULL_MS: u64 = 30_000;
/// How long a finished program's output is read at most, while background processes write on.
const DRAIN_MS: u64 = 2_000;
/// Outputs of finished programs that background processes still hold open.
const LATE_MAX: usize = 64;
const AWAKE_MS: u64 = 60_000;
const JOURNAL_BYTES_MAX: u64 = 1 << 30;
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
/// `user`: whom programs run as, where the specification names no one.
pub fn start(dir: &Path, spec: &Path, user: &str) -> Result<(), String> {
    let failed = |what: &str, error: io::Error| format!("{what}: {error}");
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|error| failed("cannot create the folder", error))?;
    let bytes = fs::read(spec).map_err(|error| failed("cannot read the specification", error))?;
    let mut spec = Spec::decode(bytes.as_slice()).map_err(|error| format!("the specification is not valid: {error}"))?;
    if spec.user.is_empty() {
        user.clone_into(&mut spec.user);
    }
    let former = fs::read_to_string(revision_path(dir)).unwrap_or_default();
    if !spec.revision.is_empty() && spec.revision != former {
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
        stdin.write_all(&spec.encode_to_vec()).map_err(|error| failed("cannot pass the specification on", error))?;
    }
    let mut answer = String::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(4096).read_to_string(&mut answer).map_err(|error| failed("cannot read the host's answer", error))?;
    }
    match answer.trim() {
        "ready" | "running" => Ok(()),
        "" => Err("the host ended before it served".to_owned()),
        message => Err(message.to_owned()),
    }
}

/// Ends a host that runs under another specification, and waits until it is gone.
fn end_running(dir: &Path) -> Result<(), String> {
    // Without a host there is nobody to connect to.
    let Ok(mut stream) = UnixStream::connect(socket_path(dir)) else { return Ok(()) };
    // Unlike any before, since a host ignores an id that it knows.
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let id = format!("restart-{}-{}", since_epoch.as_nanos(), std::process::id());
    let stop = Input { id, kind: Some(input::Kind::Stop(Stop {})) };
    let _ = stream.set_write_timeout(Some(Duration::from_secs(5)));
    stream.write_all(&journal::input_frame(&stop)).map_err(|error| format!("cannot end the running host: {error}"))?;
    let lock = OpenOptions::new().write(true).open(lock_path(dir)).map_err(|error| format!("cannot open the lock: {error}"))?;
    for _ in 0..RESTART_MS / RESTART_POLL_MS {
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(RESTART_POLL_MS));
    }
    Err("the running host did not end".to_owned())
}

/// `agent-host run`: the host itself. Reads its specification from standard input, answers `ready`, `running` or an error, and serves.
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
    /// What background processes write after their program's end goes nowhere; without a reader they would be killed.
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Listener,
    Wake,
    Client(usize),
    Tools,
    ToolsClient(usize),
    Stdout,
    Stderr,
    Exit,
    Late(usize),
}

impl Host {
    /// None: another host runs.
    fn open(dir: &Path, spec: &[u8]) -> Result<Option<Self>, String> {
        let failed = |what: &str, error: io::Error| format!("{what}: {error}");
        let mut options = OpenOptions::new();
        let lock = options.write(true).create(true).truncate(false).mode(0o600).open(lock_path(dir));
        let lock = lock.map_err(|error| failed("cannot open the lock", error))?;
        if !take_lock(&lock) {
            return Ok(None);
        }
        let mut spec = Spec::decode(spec).map_err(|error| format!("the specification is not valid: {error}"))?;
        let mut tools = None;
        if !spec.custom_tools.is_empty() {
            let (listener, name) = custom_tools::listen().map_err(|error| failed("cannot offer custom tools", error))?;
            spec.tools_command = custom_tools::command(&name);
            spec.mcp_servers.push(custom_tools::SERVER.to_owned());
            tools = Some(listener);
        }
        let runtime = adapters::find(&spec.runtime).ok_or_else(|| format!("runtime {} is not known", spec.runtime))?;
        let user = User::find(&spec.user)?;
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).map_err(|error| failed("subreaper", error.into()))?;
        // Above the agent, where that is permitted: what runs out of memory is not the supervisor.
        let _ = fs::write("/proc/self/oom_score_adj", "-900");
        // Nor do programs of the same user look into it.
        let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);

        let (run_path, run) = (dir.join("sandbox-run"), process::sandbox_run());
        let lost = if fs::read_to_string(&run_path).is_ok_and(|former| former != run) { Reason::SandboxLost } else { Reason::HostLost };
        let store = Store::open(&journal_path(dir), SEGMENT_BYTES).map_err(|error| failed("cannot open the journal", error))?;
        fs::write(&run_path, run).map_err(|error| failed("cannot write to the folder", error))?;
        fs::write(revision_path(dir), &spec.revision).map_err(|error| failed("cannot write to the folder", error))?;
        process::end_marked(&user, &spec.session_id);

        let _ = fs::remove_file(socket_path(dir));
        let listener = UnixListener::bind(socket_path(dir)).map_err(|error| failed("cannot listen", error))?;
        listener.set_nonblocking(true).map_err(|error| failed("cannot listen", error))?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|error| failed("eventfd", error.into()))?;
        let refused_bytes = fs::metadata(&spec.refused_log).map_or(0, |metadata| metadata.len());
        let mcp_failures_bytes = fs::symlink_metadata(&spec.mcp_failures).map_or(0, |metadata| metadata.len());
        let now = monotonic_ms();
        let core = Core::new(spec.clone(), (runtime.new)(&spec), runtime.capabilities, store.state.clone(), lost, now);
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

    // --- what the core wants --------------------------------------------------------------------

    fn carry_out(&mut self) -> io::Result<()> {
        loop {
            for action in self.core.take_actions() {
                match action {
                    // Neither waits for room: they make it, or end what takes it.
                    Action::Persisted(offset) => self.store.delete_below(offset)?,
                    Action::Terminate => process::signal(&self.tree(), Signal::TERM),
                    Action::Kill => self.kill(),
                    action => self.actions.push_back(action),
                }
            }
            let Some(action) = self.actions.pop_front() else { return Ok(()) };
            if let Some(unwritten) = self.carry_out_one(action)? {
                self.actions.push_front(unwritten);
                return Ok(());
            }
        }
    }

    /// Gives the action back where the disk has no room for its record.
    fn carry_out_one(&mut self, action: Action) -> io::Result<Option<Action>> {
        match action {
            Action::Record(kind) => return self.write(kind),
            Action::Start(launch) => self.start_program(&launch),
            Action::Send(line) => {
                if let Some(running) = &mut self.running {
                    running.to_cli.extend(line);
                }
            }
            Action::CloseInput => {
                if let Some(running) = &mut self.running {
                    running.close_input = true;
                }
            }
            Action::Http(request) => client::send(request, client::Replies { sender: self.http.0.clone(), wake: self.wake.try_clone()? }),
            Action::CustomToolResult { call, text, is_error } => {
                self.tools_clients.iter_mut().for_each(|client| client.answer(&call, &text, is_error));
            }
            Action::SpareLeftovers => self.spared = process::descendants(rustix::process::getpid(), &[]),
            Action::Awake(awake) => {
                self.awake = awake;
                self.awake_at = 0;
                if !awake && !self.spec.tasks_socket.is_empty() {
                    client::let_sleep(&self.spec.tasks_socket);
                }
            }
            Action::Exit => self.exit = true,
            Action::Persisted(_) | Action::Terminate | Action::Kill => {}
        }
        self.write_to_program();
        Ok(None)
    }

    fn write(&mut self, kind: record::Kind) -> io::Result<Option<Action>> {
        let is_bulk = matches!(kind, record::Kind::Output(_) | record::Kind::Event(_));
        let now = monotonic_ms();
        let give_up = self.full_since.is_some_and(|since| now - since > FULL_MS);
        let written = if is_bulk && !give_up { self.store.append(kind.clone()) } else { self.store.append_last(kind.clone()) };
        match written {
            Ok(()) => {
                if !give_up {
                    self.full_since = None;
                }
                Ok(None)
            }
            Err(NotWritten::Failed(error)) => Err(error),
            Err(NotWritten::Full) if give_up && is_bulk => Ok(None),
            Err(NotWritten::Full) => {
                let since = *self.full_since.get_or_insert(now);
                if now - since > FULL_MS {
                    self.core.journal_is_full(now);
                }
                Ok(Some(Action::Record(kind)))
            }
        }
    }

    fn start_program(&mut self, launch: &Launch) {
        let folder = process::folder(&self.spec, &self.user);
        let prepared = process::prepare(&self.spec, &self.user, launch);
        let started = prepared.and_then(|()| process::start(&self.spec, &self.user, &folder, launch));
        let now = monotonic_ms();
        match started {
            Ok(program) => {
                let pid = program.pid.as_raw_nonzero().get().unsigned_abs();
                self.running = Some(Running {
                    program,
                    to_cli: VecDeque::new(),
                    close_input: false,
                    input_closed: false,
                    stdout_open: true,
                    stderr_open: true,
                    exit: None,
                    quiet_since: now,
                    gone_since: now,
                });
                self.core.started(pid, &folder, now);
            }
            Err(error) => self.core.start_failed(&format!("{} could not be started: {error}", self.spec.runtime), now),
        }
    }

    // --- waiting --------------------------------------------------------------------------------

    /// Whether the program's output may be read: what was read is written, and the journal has room.
    fn takes_output(&self) -> bool {
        let max = if self.spec.journal_bytes_max == 0 { JOURNAL_BYTES_MAX } else { self.spec.journal_bytes_max };
        let is_gone = self.running.as_ref().is_some_and(|running| running.exit.is_some());
        self.actions.is_empty() && (is_gone || self.store.bytes() < max)
    }

    fn wait(&self) -> io::Result<Vec<(Source, PollFlags)>> {
        let mut waited = vec![(Source::Listener, self.listener.as_fd(), PollFlags::IN), (Source::Wake, self.wake.as_fd(), PollFlags::IN)];
        waited.extend(self.clients.iter().enumerate().map(|(index, client)| (Source::Client(index), client.stream.as_fd(), PollFlags::IN)));
        waited.extend(self.tools.iter().map(|listener| (Source::Tools, listener.as_fd(), PollFlags::IN)));
        waited.extend(self.tools_clients.iter().enumerate().map(|(index, client)| {
            let write = if client.has_more() { PollFlags::OUT } else { PollFlags::empty() };
            (Source::ToolsClient(index), client.stream.as_fd(), PollFlags::IN | write)
        }));
        waited.extend(self.late.iter().enumerate().map(|(index, fd)| (Source::Late(index), fd.as_fd(), PollFlags::IN)));
        if let Some(running) = &self.running {
            let read = if self.takes_output() { PollFlags::IN } else { PollFlags::empty() };
            let write = if running.to_cli.is_empty() || running.input_closed { PollFlags::empty() } else { PollFlags::OUT };
            if running.stdout_open && !(read | write).is_empty() {
                waited.push((Source::Stdout, running.program.stdout.as_fd(), read | write));
            }
            if running.stderr_open && !read.is_empty() {
                waited.push((Source::Stderr, running.program.stderr.as_fd(), read));
            }
            if running.exit.is_none() {
                waited.push((Source::Exit, running.program.pidfd.as_fd(), PollFlags::IN));
            }
        }
        let mut fds: Vec<PollFd<'_>> = waited.iter().map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
        let now = monotonic_ms();
        let mut timeout = self.core.next_tick().map_or(1000, |at| at.saturating_sub(now)).min(1000);
        if let Some(running) = self.running.as_ref().filter(|running| running.exit.is_some()) {
            let quiet = (running.quiet_since + self.drain_quiet_ms()).min(running.gone_since + DRAIN_MS);
            timeout = timeout.min(quiet.saturating_sub(now));
        }
        if !self.actions.is_empty() {
            timeout = timeout.min(250);
        }
        let timespec = Timespec {
            tv_sec: i64::try_from(timeout / 1000).unwrap_or(1),
            tv_nsec: i64::try_from(timeout % 1000).unwrap_or(0) * 1_000_000,
        };
        match poll(&mut fds, Some(&timespec)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let events = waited.iter().zip(&fds).map(|((source, ..), fd)| (*source, fd.revents()));
        Ok(events.filter(|(_, events)| !events.is_empty()).collect())
    }

    fn drain_quiet_ms(&self) -> u64 {
        if self.spec.drain_quiet_ms == 0 { 500 } else { u64::from(self.spec.drain_quiet_ms) }
    }

    fn handle(&mut self, ready: &[(Source, PollFlags)]) {
        let (mut gone, mut silent, mut tools_gone) = (Vec::new(), Vec::new(), Vec::new());
        for (source, events) in ready {
            match source {
                Source::Listener => {
                    while let Ok((stream, _)) = self.listener.accept() {
                        if stream.set_nonblocking(true).is_ok() {
                            self.clients.push(Client { stream, decoder: Decoder::of_inputs() });
                        }
                    }
                }
                Source::Tools => self.accept_tools_clients(),
                Source::ToolsClient(index) => {
                    if !self.read_tools_client(*index) {
                        tools_gone.push(*index);
                    }
                }
                Source::Wake => {
                    let _ = rustix::io::read(&self.wake, &mut [0; 8]);
                }
                Source::Client(index) => {
                    if !self.read_client(*index) {
                        gone.push(*index);
                    }
                }
                Source::Stdout => {
                    if events.contains(PollFlags::OUT) {
                        self.write_to_program();
                    }
                    if self.takes_output() {
                        self.read_output(Stream::Stdout);
                    }
                }
                Source::Stderr => self.read_output(Stream::Stderr),
                Source::Late(index) => {
                    let read = self.late.get(*index).map(|fd| rustix::io::read(fd, &mut [0; 64 << 10]));
                    if !matches!(read, Some(Ok(1..) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR))) {
                        silent.push(*index);
                    }
                }
                Source::Exit => {}
            }
        }
        if self.takes_output()
            && let Ok(reply) = self.http.1.try_recv()
        {
            self.core.http(&reply, monotonic_ms());
            while let Ok(reply) = self.http.1.try_recv() {
                self.core.http(&reply, monotonic_ms());
            }
        }
        for index in silent.into_iter().rev() {
            self.late.remove(index);
        }
        for index in gone.into_iter().rev() {
            self.clients.remove(index);
        }
        for index in tools_gone.into_iter().rev() {
            self.core.custom_tools_gone(self.tools_clients.remove(index).number, monotonic_ms());
        }
        let surplus = self.clients.len().saturating_sub(CLIENTS_MAX);
        self.clients.drain(..surplus);
    }

    fn accept_tools_clients(&mut self) {
        while let Some(Ok((stream, _))) = self.tools.as_ref().map(UnixListener::accept) {
            self.tools_accepted += 1;
            let client = custom_tools::Client::new(stream, self.tools_accepted, &self.spec.custom_tools);
            // Each process of the CLI has one.
            if self.tools_clients.len() < CLIENTS_MAX {
                self.tools_clients.extend(client);
            }
        }
    }

    /// False: the server is gone.
    fn read_tools_client(&mut self, index: usize) -> bool {
        let Some(client) = self.tools_clients.get_mut(index) else { return true };
        client.write();
        let Some(told) = client.read() else { return false };
        for told in told {
            let now = monotonic_ms();
            match told {
                Told::Called { call, name, input_json } => self.core.custom_tool_called(call, name, input_json, now),
                Told::Cancelled { call } => self.core.custom_tool_cancelled(&call, now),
            }
        }
        true
    }

    /// False: the client is gone, or sends what is no input.
    fn read_client(&mut self, index: usize) -> bool {
        let Some(client) = self.clients.get_mut(index) else { return true };
        let mut buffer = vec![0; 64 << 10];
        match client.stream.read(&mut buffer) {
            Ok(0) => return false,
            Ok(bytes) => client.decoder.push(buffer.get(..bytes).unwrap_or_default()),
            Err(error) => return matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
        loop {
            match client.decoder.next() {
                Ok(Some(Frame::Input(input))) => self.core.input(input, monotonic_ms()),
                Ok(Some(_)) => {}
                Ok(None) => return true,
                Err(_) => return false,
            }
        }
    }

    // --- the program ----------------------------------------------------------------------------

    fn write_to_program(&mut self) {
        let Some(running) = &mut self.running else { return };
        if !running.program.has_stdin {
            running.to_cli.clear();
            return;
        }
        while !running.to_cli.is_empty() && !running.input_closed {
            let (part, _) = running.to_cli.as_slices();
            match rustix::net::send(&running.program.stdout, part, rustix::net::SendFlags::NOSIGNAL) {
                Ok(sent) => drop(running.to_cli.drain(..sent)),
                Err(rustix::io::Errno::AGAIN) => return,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => running.input_closed = true,
            }
        }
        if running.close_input && !running.input_closed {
            running.input_closed = true;
            let _ = rustix::net::shutdown(&running.program.stdout, rustix::net::Shutdown::Write);
        }
    }

    fn read_output(&mut self, stream: Stream) {
        self.read_refusals();
        self.read_mcp_failures();
        let Some(running) = &mut self.running else { return };
        let (fd, open) = match stream {
            Stream::Stdout => (&running.program.stdout, &mut running.stdout_open),
            Stream::Stderr => (&running.program.stderr, &mut running.stderr_open),
        };
        if !*open {
            return;
        }
        let mut buffer = vec![0; READ_BYTES];
        match rustix::io::read(fd, &mut buffer) {
            // A socket whose other end is closed with data unread resets.
            Ok(0) | Err(rustix::io::Errno::CONNRESET) => *open = false,
            Ok(bytes) => {
                buffer.truncate(bytes);
                running.quiet_since = monotonic_ms();
                self.core.output(stream, buffer, monotonic_ms());
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(_) => *open = false,
        }
    }

    /// What the sandbox's network refused is told as errors of the program's.
    fn read_refusals(&mut self) {
        if self.spec.refused_log.is_empty() || self.running.is_none() {
            return;
        }
        let added = process::read_from(Path::new(&self.spec.refused_log), self.refused_bytes);
        let Some(end) = added.iter().rposition(|byte| *byte == b'\n') else { return };
        self.refused_bytes += end as u64 + 1;
        let text = String::from_utf8_lossy(added.get(..end).unwrap_or_default()).into_owned();
        let told: String = text.lines().map(|line| format!("refused by the network policy: {line}\n")).collect();
        self.core.output(Stream::Stderr, told.into_bytes(), monotonic_ms());
    }

    /// Which MCP servers did not start, where their CLI does not say so.
    fn read_mcp_failures(&mut self) {
        if self.spec.mcp_failures.is_empty() || self.running.is_none() {
            return;
        }
        let added = process::read_own(Path::new(&self.spec.mcp_failures), self.user.uid, self.mcp_failures_bytes);
        let Some(end) = added.iter().rposition(|byte| *byte == b'\n') else { return };
        self.mcp_failures_bytes += end as u64 + 1;
        let text = String::from_utf8_lossy(added.get(..end).unwrap_or_default()).into_owned();
        text.lines().filter(|line| !line.is_empty()).take(MCP_FAILURES_MAX).for_each(|line| self.core.mcp_failed(line));
    }

    fn reap(&mut self) {
        for (pid, code) in process::reap() {
            self.spared.retain(|spared| *spared != pid);
            if let Some(running) = self.running.as_mut().filter(|running| running.program.pid == pid) {
                running.exit = Some(code);
                running.gone_since = monotonic_ms();
                running.quiet_since = running.gone_since;
            }
        }
    }

    /// Tells of a program's exit once its output is read: to its end, or until background processes are quiet.
    fn finish_program(&mut self) {
        let Some(running) = &self.running else { return };
        let Some(code) = running.exit else { return };
        let now = monotonic_ms();
        let is_read = !running.stdout_open && !running.stderr_open;
        let is_quiet = now >= (running.quiet_since + self.drain_quiet_ms()).min(running.gone_since + DRAIN_MS);
        if self.takes_output() && (is_read || is_quiet) {
            self.read_refusals();
            if !is_read && self.core.spares_leftovers() {
                const NOTE: &str =
                    "[aod] processes that were left running still write to this output; what they write from now on is lost\n";
                self.core.output(Stream::Stderr, NOTE.as_bytes().to_vec(), now);
            }
            if let Some(running) = self.running.take() {
                let open = [(running.stdout_open, running.program.stdout), (running.stderr_open, running.program.stderr)];
                self.late.extend(open.into_iter().filter(|(open, _)| *open).map(|(_, fd)| fd));
                self.late.drain(..self.late.len().saturating_sub(LATE_MAX));
            }
            self.core.exited(code, now);
        }
    }

    fn tree(&self) -> Vec<Pid> {
        process::descendants(rustix::process::getpid(), &self.spared)
    }

    /// Ends everything that belongs to turns; a process that forks all the time is caught by repetition.
    fn kill(&mut self) {
        for _ in 0..200 {
            let tree = self.tree();
            if tree.is_empty() {
                break;
            }
            // Stopped first: what is stopped starts nothing new while the others are found.
            process::signal(&tree, Signal::STOP);
            process::signal(&tree, Signal::KILL);
            std::thread::sleep(Duration::from_millis(2));
            self.reap();
        }
    }

    fn stay_awake(&mut self) {
        let now = monotonic_ms();
        if self.awake && now >= self.awake_at && !self.spec.tasks_socket.is_empty() {
            self.awake_at = now + AWAKE_MS;
            client::stay_awake(&self.spec.tasks_socket);
        }
    }
}

/// A reader that checks for a host holds the lock for a moment.
fn take_lock(lock: &File) -> bool {
    (0..20).any(|attempt| {
        if attempt > 0 {
            std::thread::sleep(Duration::from_millis(10));
        }
        flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok()
    })
}
