//! Commands in a Sprite: a process, its output to every client that is attached, its exit status.
//!
//! Output is never dropped while somebody is attached: a slow client slows the process. With nobody attached the newest output is kept
//! for the next one, as much as the real service keeps.

use std::{
    collections::VecDeque,
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use rustix::process::{Pid, Signal};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    process::{Child, ChildStdin},
    sync::{mpsc, watch},
};
use tokio_util::task::TaskTracker;
use types::Timestamp;

use crate::{registry::Sprite, sandbox::Holder};

/// Bytes of one frame; well under every client's limit (sprites-api.md §3.2).
const FRAME_BYTES: usize = 64 * 1024;
/// What an attaching client is shown of the past.
const REPLAY_BYTES: usize = 64 * 1024;
/// How long output that a daemon still holds open is waited for after the command's own exit.
const LINGER: Duration = Duration::from_millis(200);

/// Output of one of the two streams.
#[derive(Clone, Debug)]
pub struct Output {
    pub stderr: bool,
    pub data: Bytes,
}

/// What to run.
#[derive(Debug)]
pub struct Request {
    pub argv: Vec<String>,
    pub env: Vec<(String, String)>,
    pub dir: String,
    pub stdin: bool,
    /// How long the command goes on when its last client is gone.
    pub max_run_after_disconnect: Duration,
}

/// A running command. Exited ones are forgotten at once.
#[derive(Debug)]
pub struct ExecSession {
    pub id: String,
    pub command: String,
    pub dir: String,
    pub created: Timestamp,
    group: Option<Pid>,
    clients: Mutex<Clients>,
    stdin: mpsc::Sender<Option<Bytes>>,
    exit: watch::Receiver<Option<u8>>,
}

#[derive(Debug, Default)]
struct Clients {
    attached: Vec<mpsc::Sender<Output>>,
    replay: VecDeque<Output>,
    /// Grows with every byte of output.
    seen: usize,
    /// No output will come any more.
    ended: bool,
}

impl ExecSession {
    /// Starts a command and attaches the first client.
    pub fn start(
        sprite: &Arc<Sprite>,
        holder: Holder,
        request: Request,
        tasks: &TaskTracker,
    ) -> std::io::Result<(Arc<Self>, mpsc::Receiver<Output>)> {
        let mut command = holder.enter(&request.dir, &request.argv, &request.env);
        let stdin = if request.stdin { Stdio::piped() } else { Stdio::null() };
        let mut child = command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        let (stdin_tx, stdin_rx) = mpsc::channel(16);
        let (exit_tx, exit) = watch::channel(None);
        let session = Arc::new(Self {
            id: child.id().unwrap_or_default().to_string(),
            command: request.argv.join(" "),
            dir: request.dir,
            created: Timestamp::now(),
            group,
            clients: Mutex::default(),
            stdin: stdin_tx,
            exit,
        });
        let output = session.attach();
        locked(&sprite.sessions).insert(session.id.clone(), session.clone());
        if let Some(stdin) = child.stdin.take() {
            tasks.spawn(feed(stdin, stdin_rx));
        }
        tasks.spawn(session.clone().supervise(sprite.clone(), child, exit_tx, request.max_run_after_disconnect));
        Ok((session, output))
    }

    /// Output from now on, after a replay of the newest.
    pub fn attach(&self) -> mpsc::Receiver<Output> {
        let mut clients = locked(&self.clients);
        // Room for the whole replay, so that it never waits.
        let (sender, receiver) = mpsc::channel(16 + clients.replay.len());
        for output in &clients.replay {
            let _ = sender.try_send(output.clone());
        }
        if !clients.ended {
            clients.attached.push(sender);
        }
        receiver
    }

    /// Bytes for the command's standard input; `None` ends it. Ignored by a command that reads none.
    pub async fn feed(&self, data: Option<Bytes>) {
        let _ = self.stdin.send(data).await;
    }

    /// Sends a signal to the command's process group.
    pub fn signal(&self, signal: Signal) {
        if let Some(group) = self.group {
            let _ = rustix::process::kill_process_group(group, signal);
        }
    }

    /// The exit status, once there is one.
    pub fn exit(&self) -> watch::Receiver<Option<u8>> {
        self.exit.clone()
    }

    pub fn is_attached(&self) -> bool {
        !locked(&self.clients).attached.is_empty()
    }

    async fn supervise(self: Arc<Self>, sprite: Arc<Sprite>, mut child: Child, exit: watch::Sender<Option<u8>>, linger: Duration) {
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let pumps = async {
            tokio::join!(self.pump(stdout, false), self.pump(stderr, true));
        };
        let mut pumps = std::pin::pin!(pumps);
        let mut drained = false;
        let status = {
            let mut abandoned = std::pin::pin!(self.abandoned(linger));
            let mut killed = false;
            loop {
                tokio::select! {
                    status = child.wait() => break status,
                    () = &mut pumps, if !drained => drained = true,
                    () = &mut abandoned, if !killed => {
                        killed = true;
                        self.signal(Signal::KILL);
                    }
                }
            }
        };
        if !drained {
            // What the command wrote is in the pipes; a daemon that keeps them open is not waited for.
            let _ = self.drain(pumps).await;
        }
        locked(&sprite.sessions).remove(&self.id);
        {
            let mut clients = locked(&self.clients);
            clients.ended = true;
            clients.attached.clear();
        }
        exit.send_replace(Some(status.map_or(255, exit_code)));
    }

    /// Waits for the pipes to end, or to be silent for a while.
    async fn drain(&self, mut pumps: std::pin::Pin<&mut impl Future<Output = ()>>) {
        loop {
            let before = locked(&self.clients).seen;
            if tokio::time::timeout(LINGER, &mut pumps).await.is_ok() || locked(&self.clients).seen == before {
                return;
            }
        }
    }

    async fn pump(&self, pipe: Option<impl AsyncRead + Unpin>, stderr: bool) {
        let Some(mut pipe) = pipe else { return };
        let mut buffer = BytesMut::with_capacity(FRAME_BYTES);
        while let Ok(read) = pipe.read_buf(&mut buffer).await {
            if read == 0 {
                return;
            }
            self.publish(Output { stderr, data: buffer.split().freeze() }).await;
            buffer.reserve(FRAME_BYTES);
        }
    }

    async fn publish(&self, output: Output) {
        let attached = {
            let mut clients = locked(&self.clients);
            clients.remember(output.clone());
            clients.attached.clone()
        };
        for client in attached {
            let _ = client.send(output.clone()).await;
        }
        locked(&self.clients).attached.retain(|client| !client.is_closed());
    }

    /// Returns when nobody has been attached for `linger`.
    async fn abandoned(&self, linger: Duration) {
        const CHECK: Duration = Duration::from_millis(500);
        let mut alone = Duration::ZERO;
        while alone < linger {
            tokio::time::sleep(CHECK.min(linger)).await;
            let attached = {
                let mut clients = locked(&self.clients);
                clients.attached.retain(|client| !client.is_closed());
                !clients.attached.is_empty()
            };
            alone = if attached { Duration::ZERO } else { alone + CHECK.min(linger) };
        }
    }
}

impl Clients {
    fn remember(&mut self, output: Output) {
        self.seen += output.data.len();
        self.replay.push_back(output);
        let mut held: usize = self.replay.iter().map(|output| output.data.len()).sum();
        while held > REPLAY_BYTES
            && let Some(oldest) = self.replay.pop_front()
        {
            held -= oldest.data.len();
        }
    }
}

async fn feed(mut stdin: ChildStdin, mut data: mpsc::Receiver<Option<Bytes>>) {
    while let Some(Some(bytes)) = data.recv().await {
        if stdin.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

/// The one-byte status: signals are 128 + n.
fn exit_code(status: std::process::ExitStatus) -> u8 {
    use std::os::unix::process::ExitStatusExt as _;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    u8::try_from(code).unwrap_or(255)
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
        _ => return None,
    })
}

pub fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
