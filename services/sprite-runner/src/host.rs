//! The connection to the agent host in a Sprite (docs/agent-host.md): its journal comes out, inputs
//! go in.
//!
//! One exec carries both. When it is cut, the next continues where the journal was read to, and
//! what the host has not accepted is sent again. A host that does not run is started; one that was
//! killed says so in the journal once it is started again.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use contract::host::{Control, Input, Persisted, Record, control, input};
use journal::{Decoder, Frame};
use sha2::{Digest as _, Sha256};
use sprites::{
    Client, Error, ExecEvent, ExecInput, ExecOutput, ExecRequest, OutsideSecret, Sprite,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
};
use tracing::Instrument as _;
use types::Backoff;
use zeroize::Zeroizing;

/// The host and its journal, which belong to the Sprite's root where the sandbox has one.
pub const DIR: &str = "/var/lib/aod-host";
/// Our own files, out of the agent's way: not in its home, which it may well delete.
pub const ROOT: &str = "/var/lib/aod";
/// Where a sandbox may have the program already.
const MOUNTED: &str = "/opt/aod/agent-host";
/// The host says that it is alive every 5 s.
const SILENCE_MAX: Duration = Duration::from_secs(15);
/// Between attempts; how long there are more is decided by [`Contact`].
const RETRY: Backoff =
    Backoff { base: Duration::from_millis(200), max: Duration::from_secs(15), attempts: u32::MAX };
/// A Sprite that was in contact under this claim is tried again for so long before another runner
/// tries, with a fresh lease.
const OUT_OF_CONTACT_MAX: Duration = Duration::from_secs(120);
/// A Sprite that never was in contact under this claim is given up after so long.
const NEVER_IN_CONTACT_MAX: Duration = Duration::from_secs(60);
/// Bytes of records between the reader and the log, beyond the last: a slow log slows the reader,
/// and through it the host.
const QUEUE_BYTES: usize = 4 << 20;
const QUEUE_RECORDS: usize = 4096;
/// How long a host is left alone that waits for a decision.
const REST: Duration = Duration::from_secs(60);
/// For [`Access::starts_max`], where the host is this runner's to start.
pub const STARTS_MAX: u32 = 5;
const STAYS: Duration = Duration::from_secs(60);

const HOST_ENDED: u8 = 0;
const HOST_LOST: u8 = 3;
const UNREADABLE: u8 = 4;
/// There is no program to run.
const NOT_INSTALLED: u8 = 111;

/// The agent host's program, as it is put into Sprites.
#[derive(Clone)]
pub struct Program {
    bytes: Bytes,
    sha256: Arc<str>,
}

impl std::fmt::Debug for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Program({})", self.sha256)
    }
}

impl Program {
    /// Reads the program: from the given file, else from the one beside the runner.
    ///
    /// # Errors
    /// When there is none.
    pub fn load(configured: Option<&str>) -> Result<Self, String> {
        let path = match configured {
            Some(path) => PathBuf::from(path),
            None => Self::find()?,
        };
        let bytes = std::fs::read(&path)
            .map_err(|error| format!("{} (AOD_AGENT_HOST): {error}", path.display()))?;
        let sha256: String =
            Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        tracing::info!(path = %path.display(), bytes = bytes.len(), sha256, "agent host found");
        Ok(Self { bytes: bytes.into(), sha256: sha256.into() })
    }

    fn find() -> Result<PathBuf, String> {
        let own =
            std::env::current_exe().map_err(|error| format!("the runner's own file: {error}"))?;
        let path = own.with_file_name("agent-host");
        if path.is_file() {
            return Ok(path);
        }
        Err(format!(
            "{} does not exist; `cargo xtask agent-host` builds it, and AOD_AGENT_HOST names another file",
            path.display()
        ))
    }

    fn uploaded(&self) -> String {
        format!("{ROOT}/agent-host-{}", self.sha256.get(..16).unwrap_or_default())
    }
}

/// When a Sprite last answered under this claim. Measured in time: long silences and often cut
/// sockets are no failures.
#[derive(Debug)]
struct Contact {
    claimed: Instant,
    last: Option<Instant>,
    attempt: u32,
}

/// What an interruption means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Retry(Duration),
    /// A fresh lease, or another runner, may do better.
    Release,
    Fail,
}

impl Contact {
    fn new() -> Self {
        Self { claimed: Instant::now(), last: None, attempt: 0 }
    }

    /// A frame came.
    fn made(&mut self, now: Instant) {
        (self.last, self.attempt) = (Some(now), 0);
    }

    /// `unauthorized`: the credentials were refused, which more attempts with the same do not
    /// change.
    fn interrupted(&mut self, now: Instant, unauthorized: bool) -> Next {
        let attempt = self.attempt;
        self.attempt += 1;
        match self.last {
            Some(_) if unauthorized => Next::Release,
            Some(last) if now.duration_since(last) > OUT_OF_CONTACT_MAX => Next::Release,
            None if now.duration_since(self.claimed) > NEVER_IN_CONTACT_MAX => Next::Fail,
            // The first time is most often a socket that was dropped: no wait.
            _ => Next::Retry(if attempt == 0 { Duration::ZERO } else { RETRY.jittered(attempt) }),
        }
    }
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Sprites(#[from] Error),
    #[error("the agent host fell silent")]
    Silent,
    #[error(transparent)]
    Damaged(#[from] journal::Damaged),
    /// Whole messages of the connection were lost, and nothing came after them.
    #[error("what the agent host wrote before journal offset {0} did not come")]
    Missed(u64),
    #[error("the agent host could not be started: {0}")]
    NotStarted(String),
    #[error("the connection to the agent host ended with status {code}: {said}")]
    Ended { code: u8, said: String },
    /// The journal does not have the offset: its first and its next one.
    #[error("the agent host's journal holds {first} to {end} only")]
    Unreadable { first: u64, end: u64 },
    /// The owner wants no connection for now.
    #[error("at rest")]
    Rest,
    #[error("no one reads")]
    Unread,
}

/// Why no further connection is made.
#[derive(Debug)]
pub enum Gone {
    /// A fresh lease, or another runner, may do better.
    Released(String),
    Failed(String),
    /// The journal that the turn continues in does not exist any more.
    JournalLost,
    SandboxLost,
}

/// What comes from the host.
#[derive(Debug)]
pub enum Incoming {
    /// A connection is made, which reads from this offset.
    Attached(u64),
    Record {
        offset: u64,
        next: u64,
        record: Record,
        /// The record's room in the queue.
        _room: OwnedSemaphorePermit,
    },
    Gone(Gone),
}

#[derive(Debug)]
enum Command {
    Send(Input),
    /// The host accepted it.
    Accepted(String),
    Persisted(u64),
    Rest,
}

/// What a connection takes.
pub struct Access {
    pub client: Client,
    pub sprite: Sprite,
    pub program: Program,
    /// The specification of a host that has to be started.
    pub spec: Zeroizing<Vec<u8>>,
    /// Secrets that the sandbox server holds, in memory alone.
    pub outside: Vec<OutsideSecret>,
    pub from: u64,
    /// Whether a host was started before, and most likely still runs.
    pub may_run: bool,
    /// Whether one that runs with another specification continues.
    pub keeps_host: bool,
    /// How often a host is started that does not stay.
    pub starts_max: u32,
    /// Whether nothing is lost where the journal does not have the offset: then it is read from its
    /// beginning.
    pub may_skip: bool,
}

/// A connection, kept up by a task that ends with this.
pub struct Link {
    incoming: mpsc::Receiver<Incoming>,
    commands: mpsc::UnboundedSender<Command>,
    /// Its only task; it ends with this.
    _task: JoinSet<()>,
}

impl Link {
    pub fn open(access: Access) -> Self {
        let (sender, incoming) = mpsc::channel(QUEUE_RECORDS);
        // Bounded by what a session may queue; a full channel would let its ends wait for each
        // other.
        let (commands, received) = mpsc::unbounded_channel();
        let worker = Worker {
            decoder: Decoder::new(access.from),
            may_run: access.may_run,
            is_again: false,
            access,
            contact: Contact::new(),
            starts: 0,
            outbox: Vec::new(),
            persisted: None,
            commands: received,
            incoming: sender,
            room: Arc::new(Semaphore::new(QUEUE_BYTES)),
        };
        let mut task = JoinSet::new();
        task.spawn(worker.run().in_current_span());
        Self { incoming, commands, _task: task }
    }

    pub async fn next(&mut self) -> Incoming {
        let ended = || Incoming::Gone(Gone::Failed("the connection's task ended".to_owned()));
        self.incoming.recv().await.unwrap_or_else(ended)
    }

    /// What has come already.
    pub fn try_next(&mut self) -> Option<Incoming> {
        self.incoming.try_recv().ok()
    }

    /// Sends an input, on each connection, until [`Self::accepted`].
    pub fn send(&self, input: Input) {
        self.command(Command::Send(input));
    }

    pub fn accepted(&self, id: String) {
        self.command(Command::Accepted(id));
    }

    /// Lets the host delete the journal below this offset.
    pub fn persisted(&self, offset: u64) {
        self.command(Command::Persisted(offset));
    }

    /// Closes the connection, so that the sandbox may sleep; it is made again for an input, or in a
    /// minute.
    pub fn rest(&self) {
        self.command(Command::Rest);
    }

    fn command(&self, command: Command) {
        // If the task has ended, its last message is on the way.
        let _ = self.commands.send(command);
    }
}

struct Worker {
    access: Access,
    decoder: Decoder,
    may_run: bool,
    /// Whether a connection was tried before.
    is_again: bool,
    contact: Contact,
    starts: u32,
    /// What the host has not accepted.
    outbox: Vec<Input>,
    persisted: Option<u64>,
    commands: mpsc::UnboundedReceiver<Command>,
    incoming: mpsc::Sender<Incoming>,
    room: Arc<Semaphore>,
}

impl Worker {
    async fn run(mut self) {
        let gone = loop {
            let broken = self.connect().await;
            match self.after(broken).await {
                Ok(()) => {}
                Err(Some(gone)) => break gone,
                Err(None) => return,
            }
        };
        let _ = self.incoming.send(Incoming::Gone(gone)).await;
    }

    /// Waits until the next connection is due. None: no one wants one.
    async fn after(&mut self, broken: Broken) -> Result<(), Option<Gone>> {
        match &broken {
            Broken::Unread => return Err(None),
            Broken::Rest => {
                self.rest().await;
                return Ok(());
            }
            Broken::Ended { code: HOST_ENDED | HOST_LOST, .. } => {
                self.may_run = false;
                if self.starts < self.access.starts_max {
                    return Ok(());
                }
                return Err(Some(Gone::Failed(format!(
                    "the agent host was started {} times and did not stay",
                    self.starts
                ))));
            }
            Broken::Unreadable { first, .. }
                if self.access.may_skip && *first != self.decoder.offset() =>
            {
                self.decoder = Decoder::new(*first);
                return Ok(());
            }
            Broken::Unreadable { .. } => return Err(Some(Gone::JournalLost)),
            Broken::Ended { code: NOT_INSTALLED, .. } => {
                let path = self.access.program.uploaded();
                match self
                    .access
                    .sprite
                    .write(&path, self.access.program.bytes.clone(), 0o755)
                    .await
                {
                    Ok(()) => return Ok(()),
                    Err(error) => {
                        tracing::info!(%error, "failed to upload the agent host; will retry")
                    }
                }
            }
            _ => {}
        }
        if matches!(broken, Broken::Sprites(Error::NotFound { .. }))
            && matches!(self.access.client.exists(self.access.sprite.name()).await, Ok(false))
        {
            return Err(Some(Gone::SandboxLost));
        }
        // A frame that was cut off is read again from its beginning.
        self.decoder = Decoder::new(self.decoder.offset());
        let unauthorized = matches!(broken, Broken::Sprites(Error::Unauthorized { .. }));
        let next = self.contact.interrupted(Instant::now(), unauthorized);
        tracing::info!(%broken, ?next, "connection to the agent host was interrupted");
        metrics::counter!("aod_follow_interruptions_total").increment(1);
        match next {
            Next::Retry(delay) => {
                tokio::time::sleep(delay).await;
                Ok(())
            }
            Next::Release => Err(Some(Gone::Released(format!(
                "its sandbox can no longer be followed: {broken}"
            )))),
            Next::Fail => Err(Some(Gone::Failed(broken.to_string()))),
        }
    }

    async fn rest(&mut self) {
        self.decoder = Decoder::new(self.decoder.offset());
        let until = tokio::time::Instant::now() + REST;
        while let Ok(Some(command)) = tokio::time::timeout_at(until, self.commands.recv()).await {
            let wakes = matches!(command, Command::Send(_));
            take(command, &mut self.outbox, &mut self.persisted);
            if wakes {
                return;
            }
        }
    }

    async fn connect(&mut self) -> Broken {
        // The sandbox server may be another one, which does not have them.
        if std::mem::replace(&mut self.is_again, true)
            && !self.access.outside.is_empty()
            && let Err(error) = self.access.sprite.set_secrets(&self.access.outside).await
        {
            return error.into();
        }
        let script = if self.may_run { self.attach_script() } else { self.start_script() };
        let spec = self.spec_path();
        if !self.may_run {
            self.starts += 1;
            if let Err(error) =
                self.access.sprite.write(&spec, self.access.spec.to_vec(), 0o600).await
            {
                return error.into();
            }
        }
        let argv = ["bash", "-c", &script];
        let request = ExecRequest {
            argv: &argv,
            dir: "/",
            max_run_after_disconnect: Some(Duration::from_secs(1)),
            stdin: true,
        };
        let exec = match self.access.sprite.exec(&request).await {
            Ok(exec) => exec,
            Err(error) => return error.into(),
        };
        let (mut output, mut input) = exec.split();
        let (begun, mut attached) = (Instant::now(), false);
        let (read, written) = (
            read(
                &mut output,
                &mut attached,
                &mut self.decoder,
                &mut self.contact,
                &self.incoming,
                &self.room,
            ),
            write(&mut input, &mut self.outbox, &mut self.persisted, &mut self.commands),
        );
        let broken = tokio::select! {
            broken = read => broken,
            broken = written => broken,
        };
        input.close().await;
        self.may_run |= attached;
        if begun.elapsed() > STAYS {
            self.starts = 0;
        }
        broken
    }

    fn spec_path(&self) -> String {
        format!("{ROOT}/spec")
    }

    fn attach_script(&self) -> String {
        format!(
            "rm -f {spec}; bin={MOUNTED}; [ -x $bin ] || bin={uploaded}; [ -x $bin ] || exit {NOT_INSTALLED}\n\
             exec $bin root attach --dir {DIR} --from {from}",
            spec = self.spec_path(),
            uploaded = self.access.program.uploaded(),
            from = self.decoder.offset(),
        )
    }

    fn start_script(&self) -> String {
        format!(
            "is_ours() {{ [ -x $1 ] && [ \"$(sha256sum <$1)\" = '{sha256}  -' ]; }}\n\
             bin={MOUNTED}; is_ours $bin || {{ bin={uploaded}; is_ours $bin; }} || {{ rm -f {spec}; exit {NOT_INSTALLED}; }}\n\
             $bin root start --dir {DIR} --spec {spec}{keep} </dev/null; status=$?; rm -f {spec}; [ $status = 0 ] || exit 1\n\
             exec $bin root attach --dir {DIR} --from {from}",
            sha256 = self.access.program.sha256,
            uploaded = self.access.program.uploaded(),
            spec = self.spec_path(),
            keep = if self.access.keeps_host { " --keep" } else { "" },
            from = self.decoder.offset(),
        )
    }
}

fn take(command: Command, outbox: &mut Vec<Input>, persisted: &mut Option<u64>) -> bool {
    match command {
        Command::Send(input) => {
            if !outbox.iter().any(|queued| queued.id == input.id) {
                outbox.push(input);
            }
        }
        Command::Accepted(id) => outbox.retain(|input| input.id != id),
        Command::Persisted(offset) => *persisted = Some(offset),
        Command::Rest => return false,
    }
    true
}

async fn write(
    exec: &mut ExecInput,
    outbox: &mut Vec<Input>,
    persisted: &mut Option<u64>,
    commands: &mut mpsc::UnboundedReceiver<Command>,
) -> Broken {
    for input in outbox.iter() {
        if let Err(error) = exec.send(&journal::input_frame(input)).await {
            return error.into();
        }
    }
    loop {
        if let Some(offset) = persisted.take() {
            let input = Input {
                id: String::new(),
                kind: Some(input::Kind::Persisted(Persisted { offset })),
            };
            if let Err(error) = exec.send(&journal::input_frame(&input)).await {
                return error.into();
            }
        }
        let Some(command) = commands.recv().await else { return Broken::Unread };
        let sent = outbox.len();
        if !take(command, outbox, persisted) {
            return Broken::Rest;
        }
        for input in outbox.get(sent..).unwrap_or_default() {
            if let Err(error) = exec.send(&journal::input_frame(input)).await {
                return error.into();
            }
        }
    }
}

async fn read(
    exec: &mut ExecOutput,
    attached: &mut bool,
    decoder: &mut Decoder,
    contact: &mut Contact,
    incoming: &mpsc::Sender<Incoming>,
    room: &Arc<Semaphore>,
) -> Broken {
    let (mut said, mut unreadable) = (Vec::new(), None);
    loop {
        let event = match tokio::time::timeout(SILENCE_MAX, exec.next()).await {
            Ok(Ok(event)) => event,
            Ok(Err(error)) => return error.into(),
            Err(_) => return Broken::Silent,
        };
        match event {
            ExecEvent::Stdout(data) => decoder.push(&data),
            ExecEvent::Stderr(data) => {
                said.extend_from_slice(data.get(..data.len().min(500)).unwrap_or_default());
                said.truncate(2000);
            }
            ExecEvent::Exit(code) => {
                let said = String::from_utf8_lossy(&said).trim().to_owned();
                return match unreadable {
                    Some((first, end)) if code == UNREADABLE => Broken::Unreadable { first, end },
                    _ if code == 1 && !*attached => Broken::NotStarted(said),
                    _ => Broken::Ended { code, said },
                };
            }
        }
        loop {
            let frame = match decoder.next() {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(damaged) => return damaged.into(),
            };
            let message = match frame {
                Frame::Record { offset, next, record } => {
                    let bytes =
                        usize::try_from(next - offset).unwrap_or(QUEUE_BYTES).min(QUEUE_BYTES);
                    let Ok(permit) = room
                        .clone()
                        .acquire_many_owned(u32::try_from(bytes).unwrap_or(u32::MAX))
                        .await
                    else {
                        return Broken::Unread;
                    };
                    *attached = true;
                    Some(Incoming::Record { offset, next, record, _room: permit })
                }
                Frame::Control(Control { kind: Some(control::Kind::Unreadable(gap)) }) => {
                    unreadable = Some((gap.first, gap.end));
                    None
                }
                Frame::Control(Control { kind: Some(control::Kind::Alive(alive)) })
                    if alive.offset > decoder.offset() =>
                {
                    return Broken::Missed(alive.offset);
                }
                Frame::Control(Control { kind: Some(control::Kind::Alive(_)) }) if !*attached => {
                    *attached = true;
                    Some(Incoming::Attached(decoder.offset()))
                }
                Frame::Control(_) | Frame::Input(_) => None,
            };
            contact.made(Instant::now());
            if let Some(message) = message
                && incoming.send(message).await.is_err()
            {
                return Broken::Unread;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_healthy_turn_outlives_cut_sockets_and_refused_credentials() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let mut contact = Contact { claimed: begun, last: None, attempt: 0 };
        assert_eq!(contact.interrupted(at(0), false), Next::Retry(Duration::ZERO));
        for second in 1..60 {
            assert!(
                matches!(contact.interrupted(at(second), second % 2 == 0), Next::Retry(_)),
                "{second}"
            );
        }
        assert_eq!(contact.interrupted(at(61), false), Next::Fail, "never in contact");
        assert_eq!(contact.interrupted(at(61), true), Next::Fail);
        for round in 0..50 {
            contact.made(at(100 + round));
            assert_eq!(
                contact.interrupted(at(101 + round), false),
                Next::Retry(Duration::ZERO),
                "cut again and again"
            );
        }
        assert!(matches!(contact.interrupted(at(269), false), Next::Retry(_)));
        assert_eq!(contact.interrupted(at(270), false), Next::Release);
        contact.made(at(300));
        assert_eq!(contact.interrupted(at(301), true), Next::Release, "a fresh lease may be good");
    }

    #[test]
    fn an_input_is_sent_until_the_host_accepts_it() {
        let input = |id: &str| Input { id: id.to_owned(), kind: None };
        let (mut outbox, mut persisted) = (Vec::new(), None);
        for command in [
            Command::Send(input("a")),
            Command::Send(input("b")),
            Command::Send(input("a")),
            Command::Accepted("a".to_owned()),
        ] {
            assert!(take(command, &mut outbox, &mut persisted));
        }
        assert_eq!(outbox, [input("b")]);
        assert!(!take(Command::Rest, &mut outbox, &mut persisted));
    }
}
