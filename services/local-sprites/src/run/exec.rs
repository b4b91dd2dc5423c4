//! Commands in a Sprite: a process, its output to every client that is attached, its exit status.
//!
//! Output is never dropped while a client is attached: a slow client slows the process. With none
//! attached the newest output is kept for the next one, as much as the real service keeps.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fs, io,
    os::unix::ffi::OsStrExt as _,
    process::Stdio,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use rustix::process::Signal;
use service::Lifecycle;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    process::{Child, ChildStdin},
    sync::{mpsc, watch},
};
use types::Timestamp;

use crate::{
    isolation::{
        launch::{Launch, exit_code},
        process::Process,
        sandbox,
    },
    run::terminal::{Size, Terminal},
    sync::locked,
};

/// Bytes of one frame; well under every client's limit (docs/sprites-api.md §3.2).
const FRAME_BYTES: usize = 64 * 1024;
/// What is on its way from a command to this server.
const PIPE_BYTES: usize = 1024 * 1024;
/// What an attaching client is shown of the past.
const REPLAY_BYTES: usize = 64 * 1024;
/// Output that is shorter is copied into the replay.
const SHORT_BYTES: usize = 8 * 1024;
/// How long output that a daemon still holds open is waited for after the command's own exit.
const LINGER: Duration = Duration::from_millis(200);
/// A client that takes nothing for so long is not there any more.
const SEND_MAX: Duration = Duration::from_secs(300);
/// Ended sessions that are known to have ended.
const ENDED_KEPT: usize = 64;
const END_OF_FILE: u8 = 4;

/// What a client receives from a command. If the channel closes before the exit, the command keeps
/// running without this client.
#[derive(Clone, Debug)]
pub enum Event {
    /// The stream's byte, and output of it.
    Output(Bytes),
    Exit(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stream {
    Stdout = 1,
    Stderr = 2,
}

/// What to run.
#[derive(Debug)]
pub struct Request {
    pub argv: Vec<String>,
    pub env: Vec<(String, String)>,
    pub dir: String,
    pub stdin: bool,
    pub terminal: Option<Size>,
    /// How long the command keeps running when its last client is gone; for ever where none.
    pub max_run_after_disconnect: Option<Duration>,
}

/// What a Sprite gives a command.
#[derive(Debug)]
pub struct Start {
    pub launch: Launch,
    /// The environment that the Sprite was created with.
    pub environment: BTreeMap<String, String>,
    pub sessions: Arc<Mutex<Sessions>>,
}

/// The commands of a Sprite, by id.
#[derive(Debug, Default)]
pub struct Sessions {
    running: HashMap<String, Arc<ExecSession>>,
    ended: VecDeque<String>,
}

impl Sessions {
    pub fn get(&self, id: &str) -> Option<Arc<ExecSession>> {
        self.running.get(id).cloned()
    }

    /// Whether there was such a command, not long ago.
    pub fn has_ended(&self, id: &str) -> bool {
        self.ended.iter().any(|ended| ended == id)
    }

    pub fn all(&self) -> Vec<Arc<ExecSession>> {
        let mut all: Vec<_> = self.running.values().cloned().collect();
        all.sort_by_key(|session| session.created);
        all
    }

    fn end(&mut self, id: &str) {
        self.running.remove(id);
        self.ended.push_back(id.to_owned());
        if self.ended.len() > ENDED_KEPT {
            self.ended.pop_front();
        }
    }
}

/// A running command. Exited ones are forgotten at once.
#[derive(Debug)]
pub struct ExecSession {
    pub id: String,
    pub created: Timestamp,
    pub dir: String,
    argv: Vec<String>,
    launcher: Process,
    has_own_kernel: bool,
    terminal: Option<(Arc<Terminal>, Mutex<Size>)>,
    clients: Mutex<Clients>,
    stdin: mpsc::Sender<Option<Bytes>>,
    exit: watch::Receiver<Option<u8>>,
}

#[derive(Debug)]
struct Clients {
    attached: Vec<mpsc::Sender<Event>>,
    replay: Replay,
    /// Bytes of output so far.
    seen: usize,
    last_activity: Instant,
    /// Nothing will come any more but this.
    exit: Option<u8>,
}

impl ExecSession {
    /// Starts a command and attaches the first client.
    pub fn start(
        start: Start,
        request: Request,
        lifecycle: &Lifecycle,
    ) -> io::Result<(Arc<Self>, mpsc::Receiver<Event>)> {
        let Start { launch, environment, sessions } = start;
        let mut variables = sandbox::environment(launch.holder);
        variables.extend(environment);
        if request.terminal.is_some() {
            variables.push(("TERM".to_owned(), "xterm-256color".to_owned()));
        }
        variables.extend(request.env.iter().cloned());
        let mut command = launch.command(&request.argv, variables)?;
        let mut terminal = None;
        if let Some(size) = request.terminal {
            let (master, slave) = Terminal::open(launch.holder, size)?;
            command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
            terminal = Some((Arc::new(master), Mutex::new(size)));
        } else {
            command
                .stdin(if request.stdin { Stdio::piped() } else { Stdio::null() })
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
        }
        let mut child = command.spawn()?;
        // Its own ends of the terminal are closed here: the last one that is open is the Sprite's.
        drop(command);
        let launcher = child.id().and_then(|id| Process::find(i32::try_from(id).ok()?));
        let launcher =
            launcher.ok_or_else(|| io::Error::other("the command ended before it began"))?;
        let (stdin_tx, stdin_rx) = mpsc::channel(16);
        let (exit_tx, exit) = watch::channel(None);
        let session = Arc::new(Self {
            id: launcher.pid.to_string(),
            created: Timestamp::now(),
            dir: request.dir,
            argv: request.argv,
            launcher,
            has_own_kernel: launch.holder.has_own_kernel(),
            terminal,
            clients: Mutex::new(Clients::default()),
            stdin: stdin_tx,
            exit,
        });
        let output = session.attach();
        locked(&sessions).running.insert(session.id.clone(), session.clone());
        let tasks = lifecycle.tracker();
        match (&session.terminal, child.stdin.take()) {
            (Some((terminal, _)), _) => {
                drop(tasks.spawn(type_into(terminal.clone(), stdin_rx, lifecycle.clone())))
            }
            (None, Some(stdin)) => drop(tasks.spawn(feed(stdin, stdin_rx, lifecycle.clone()))),
            (None, None) => {}
        }
        let supervise =
            session.clone().supervise(sessions, child, exit_tx, request.max_run_after_disconnect);
        let stop = lifecycle.stop_token();
        // At a stop the command is left alone, and its clients hear no exit.
        tasks.spawn(async move { stop.run_until_cancelled(supervise).await });
        Ok((session, output))
    }

    /// Output from now on, after a replay of the newest.
    pub fn attach(&self) -> mpsc::Receiver<Event> {
        let mut clients = locked(&self.clients);
        // Room for the whole replay, so that it never waits.
        let replay = clients.replay.all();
        let (sender, receiver) = mpsc::channel(16 + replay.len());
        for output in replay {
            let _ = sender.try_send(Event::Output(output));
        }
        match clients.exit {
            Some(code) => drop(sender.try_send(Event::Exit(code))),
            None => clients.attached.push(sender),
        }
        receiver
    }

    /// Disconnects all clients; the command keeps running.
    pub fn disconnect(&self) {
        locked(&self.clients).attached.clear();
    }

    /// Bytes for the command's standard input; `None` ends it. Ignored by a command that reads
    /// none.
    pub async fn feed(&self, data: Option<Bytes>) {
        locked(&self.clients).last_activity = Instant::now();
        let _ = self.stdin.send(data).await;
    }

    /// Sends a signal to the command's process group; with a terminal, to the one in the
    /// foreground.
    pub fn signal(&self, signal: Signal) {
        // A kernel of its own knows its foreground group; what started the command passes signals
        // on.
        let terminal = self.terminal.as_ref().filter(|_| !self.has_own_kernel);
        match terminal.and_then(|(terminal, _)| terminal.foreground()) {
            Some(group) => drop(rustix::process::kill_process_group(group, signal)),
            None => self.launcher.signal_command(signal),
        }
    }

    /// Ends the command for certain.
    pub fn kill(&self) {
        if self.terminal.is_some() && !self.has_own_kernel {
            self.signal(Signal::KILL);
        }
        self.launcher.signal_command(Signal::KILL);
    }

    pub fn resize(&self, size: Size) {
        if let Some((terminal, current)) = &self.terminal
            && terminal.resize(size).is_ok()
        {
            *locked(current) = size;
        }
    }

    /// The terminal's size, where there is one.
    pub fn terminal(&self) -> Option<Size> {
        self.terminal.as_ref().map(|(_, size)| *locked(size))
    }

    /// The exit status, once there is one.
    pub fn exit(&self) -> watch::Receiver<Option<u8>> {
        self.exit.clone()
    }

    pub fn is_attached(&self) -> bool {
        locked(&self.clients).attached.iter().any(|client| !client.is_closed())
    }

    /// What runs now: what a command became is not always what was asked for.
    pub fn command(&self) -> String {
        let running = || {
            let pid = self.launcher.child()?;
            let executable = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
            let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let arguments =
                line.split(|byte| *byte == 0).skip(1).filter(|argument| !argument.is_empty());
            let words = std::iter::once(executable.as_os_str().as_bytes()).chain(arguments);
            Some(words.map(String::from_utf8_lossy).collect::<Vec<_>>().join(" "))
        };
        let running = if self.has_own_kernel { None } else { running() };
        running.unwrap_or_else(|| self.argv.join(" "))
    }

    pub fn asked_command(&self) -> String {
        self.argv.join(" ")
    }

    /// How long nothing was written or read, and how much was written in a second, on average.
    pub fn activity(&self) -> (Duration, f64) {
        let age = (Timestamp::now().unix_micros() - self.created.unix_micros()).max(1);
        let clients = locked(&self.clients);
        (clients.last_activity.elapsed(), clients.seen as f64 * 1e6 / age as f64)
    }

    async fn supervise(
        self: Arc<Self>,
        sessions: Arc<Mutex<Sessions>>,
        mut child: Child,
        exit: watch::Sender<Option<u8>>,
        max_run: Option<Duration>,
    ) {
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let pumps = async {
            match &self.terminal {
                Some((terminal, _)) => self.pump_terminal(terminal).await,
                None => drop(tokio::join!(
                    self.pump(stdout, Stream::Stdout),
                    self.pump(stderr, Stream::Stderr)
                )),
            }
        };
        let mut pumps = std::pin::pin!(pumps);
        let mut drained = false;
        let status = {
            let mut abandoned = std::pin::pin!(self.abandoned(max_run));
            let mut killed = false;
            loop {
                tokio::select! {
                    status = child.wait() => break status,
                    () = &mut pumps, if !drained => drained = true,
                    () = &mut abandoned, if !killed => {
                        killed = true;
                        self.kill();
                    }
                }
            }
        };
        if !drained {
            // What the command wrote is in the pipes; a daemon that keeps them open is not waited
            // for.
            let _ = self.drain(pumps).await;
        }
        let code = status.map_or(u8::MAX, exit_code);
        locked(&sessions).end(&self.id);
        let attached = {
            let mut clients = locked(&self.clients);
            clients.exit = Some(code);
            std::mem::take(&mut clients.attached)
        };
        exit.send_replace(Some(code));
        for client in attached {
            let _ = client.send_timeout(Event::Exit(code), SEND_MAX).await;
        }
    }

    /// Waits for the pipes to end, or to be silent for a while.
    async fn drain(&self, mut pumps: std::pin::Pin<&mut impl Future<Output = ()>>) {
        loop {
            let before = locked(&self.clients).seen;
            if tokio::time::timeout(LINGER, &mut pumps).await.is_ok()
                || locked(&self.clients).seen == before
            {
                return;
            }
        }
    }

    async fn pump(&self, pipe: Option<impl AsyncRead + Unpin + std::os::fd::AsFd>, stream: Stream) {
        let Some(mut pipe) = pipe else { return };
        let _ = rustix::pipe::fcntl_setpipe_size(&pipe, PIPE_BYTES);
        let mut buffer = BytesMut::with_capacity(FRAME_BYTES);
        loop {
            buffer.put_u8(stream as u8);
            match (&mut pipe).take(FRAME_BYTES as u64 - 1).read_buf(&mut buffer).await {
                Ok(read) if read > 0 => self.publish(buffer.split().freeze()).await,
                _ => return,
            }
            if buffer.capacity() < FRAME_BYTES / 2 {
                buffer.reserve(FRAME_BYTES);
            }
        }
    }

    async fn pump_terminal(&self, terminal: &Terminal) {
        let mut buffer = BytesMut::new();
        loop {
            buffer.put_u8(Stream::Stdout as u8);
            match terminal.read(&mut buffer).await {
                Ok(read) if read > 0 => self.publish(buffer.split().freeze()).await,
                _ => return,
            }
        }
    }

    async fn publish(&self, output: Bytes) {
        let attached = {
            let mut clients = locked(&self.clients);
            clients.remember(&output);
            clients.attached.clone()
        };
        for client in attached {
            if client.send_timeout(Event::Output(output.clone()), SEND_MAX).await.is_err() {
                locked(&self.clients).attached.retain(|other| !other.same_channel(&client));
            }
        }
    }

    /// Returns when no client has been attached for as long as the command may keep running alone.
    async fn abandoned(&self, max_run: Option<Duration>) {
        const CHECK: Duration = Duration::from_millis(500);
        let Some(max_run) = max_run else { return std::future::pending().await };
        let mut alone = Duration::ZERO;
        while alone < max_run {
            tokio::time::sleep(CHECK.min(max_run)).await;
            let attached = {
                let mut clients = locked(&self.clients);
                clients.attached.retain(|client| !client.is_closed());
                !clients.attached.is_empty()
            };
            alone = if attached { Duration::ZERO } else { alone + CHECK.min(max_run) };
        }
    }
}

impl Default for Clients {
    fn default() -> Self {
        Self {
            attached: Vec::new(),
            replay: Replay::default(),
            seen: 0,
            last_activity: Instant::now(),
            exit: None,
        }
    }
}

impl Clients {
    fn remember(&mut self, output: &Bytes) {
        self.last_activity = Instant::now();
        self.seen += output.len() - 1;
        self.replay.push(output);
    }
}

/// The newest output, at most [`REPLAY_BYTES`] of it.
#[derive(Debug, Default)]
struct Replay {
    older: VecDeque<Bytes>,
    /// Short outputs in a row of one stream, as one: each by itself would keep the block that it
    /// was read into, which is far larger.
    newest: BytesMut,
    held: usize,
}

impl Replay {
    fn push(&mut self, output: &Bytes) {
        self.held += output.len();
        if self.newest.first() == output.first() && self.newest.len() + output.len() <= SHORT_BYTES
        {
            self.newest.extend_from_slice(&output[1..]);
            self.held -= 1;
        } else {
            if !self.newest.is_empty() {
                self.older.push_back(self.newest.split().freeze());
            }
            if output.len() < SHORT_BYTES {
                self.newest = BytesMut::from(&output[..]);
            } else {
                self.older.push_back(output.clone());
            }
        }
        while self.held > REPLAY_BYTES
            && let Some(oldest) = self.older.pop_front()
        {
            self.held -= oldest.len();
        }
    }

    fn all(&self) -> Vec<Bytes> {
        let newest = (!self.newest.is_empty()).then(|| self.newest.clone().freeze());
        self.older.iter().cloned().chain(newest).collect()
    }
}

async fn feed(
    mut stdin: ChildStdin,
    mut data: mpsc::Receiver<Option<Bytes>>,
    lifecycle: Lifecycle,
) {
    let stop = lifecycle.stop_token();
    let feed = async {
        while let Some(Some(bytes)) = data.recv().await {
            if stdin.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    stop.run_until_cancelled(feed).await;
}

async fn type_into(
    terminal: Arc<Terminal>,
    mut data: mpsc::Receiver<Option<Bytes>>,
    lifecycle: Lifecycle,
) {
    let stop = lifecycle.stop_token();
    let typing = async {
        while let Some(bytes) = data.recv().await {
            let typed = bytes.unwrap_or_else(|| Bytes::from_static(&[END_OF_FILE]));
            if terminal.write_all(&typed).await.is_err() {
                return;
            }
        }
    };
    stop.run_until_cancelled(typing).await;
}

/// `TERM`, `SIGTERM`, `term` or `15`.
pub fn parse_signal(text: &str) -> Option<Signal> {
    let upper = text.to_ascii_uppercase();
    Some(match upper.strip_prefix("SIG").unwrap_or(&upper) {
        "HUP" | "1" => Signal::HUP,
        "INT" | "2" => Signal::INT,
        "QUIT" | "3" => Signal::QUIT,
        "KILL" | "9" => Signal::KILL,
        "USR1" | "10" => Signal::USR1,
        "USR2" | "12" => Signal::USR2,
        "TERM" | "15" => Signal::TERM,
        "CONT" | "18" => Signal::CONT,
        "STOP" | "19" => Signal::STOP,
        "WINCH" | "28" => Signal::WINCH,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_replay_is_the_newest_output_in_few_blocks() {
        let mut replay = Replay::default();
        let mut whole = Vec::new();
        let sizes = [2, 3, 2, 700, 2, 9_000, 5, FRAME_BYTES];
        for number in 0..100_000_u32 {
            let stream = if number % 50 == 0 { Stream::Stderr } else { Stream::Stdout };
            // The long ones come rarely, and not among the last.
            let is_rare = number < 60_000 && number % 1_000 == 0;
            let size = if is_rare { sizes[(number / 1_000) as usize % 8] } else { 3 };
            let mut output = vec![number as u8; size];
            output[0] = stream as u8;
            whole.extend(output[1..].iter().map(|byte| (output[0], *byte)));
            replay.push(&output.into());
        }
        let shown = replay.all();
        let bytes: Vec<_> =
            shown.iter().flat_map(|out| out[1..].iter().map(|byte| (out[0], *byte))).collect();
        assert!(whole.ends_with(&bytes));
        let held: usize = shown.iter().map(Bytes::len).sum();
        assert_eq!(held, replay.held);
        assert!((REPLAY_BYTES / 2..=REPLAY_BYTES).contains(&held), "{held}");
        // Two for each change of the stream.
        assert!(shown.len() < 2_000, "{} blocks", shown.len());
    }
}
