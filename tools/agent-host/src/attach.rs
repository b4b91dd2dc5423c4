//! `agent-host attach`: writes the journal from an offset to standard output, and passes inputs
//! from standard input on to the host.
//!
//! It reads the journal's files itself, so that a host that was killed takes nothing along. Only
//! whole, undamaged frames are written.

use std::{
    fs::File,
    io::{self, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{fs::FileExt as _, net::UnixStream},
    },
    path::{Path, PathBuf},
    process::ExitCode,
};

use contract::host::{Alive, Control, Ended, HostLost, Record, Unreadable, control, record};
use journal::{Found, HEADER_BYTES};
use prost::Message as _;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FlockOperation, flock, inotify},
};

use crate::{
    host::{journal_path, lock_path, socket_path},
    monotonic_ms,
    store::{segment_path, segments},
};

const READ_BYTES: usize = 1 << 20;
const ALIVE_MS: u64 = 5_000;
/// How long a host that hung up may take to let go of its lock, if it has ended.
const HUNG_UP_MS: u64 = 200;

/// No host runs, and the journal has no end.
pub const HOST_LOST: u8 = 3;
/// The journal has no record at the offset.
pub const UNREADABLE: u8 = 4;

/// The journal's files as one sequence of frames.
struct Tail {
    folder: PathBuf,
    segment: Option<(u64, File)>,
    buffer: Vec<u8>,
    /// Where the buffer begins.
    offset: u64,
    ended: bool,
}

enum Step {
    /// That many bytes at the buffer's beginning are whole frames.
    Frames(usize),
    /// Nothing more is written yet.
    Wait,
    Unreadable {
        first: u64,
        end: u64,
    },
}

impl Tail {
    fn new(folder: PathBuf, offset: u64) -> Self {
        Self { folder, segment: None, buffer: Vec::new(), offset, ended: false }
    }

    /// Reads what there is, and finds the whole frames in it.
    fn step(&mut self) -> io::Result<Step> {
        let starts = match segments(&self.folder) {
            Ok(starts) => starts,
            // The journal was deleted under its host.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Step::Unreadable { first: 0, end: 0 });
            }
            Err(error) => return Err(error),
        };
        let (start, file) = match &self.segment {
            Some(segment) => segment,
            None => {
                let first = starts.first().copied().unwrap_or(0);
                let Some(start) = starts.iter().rev().find(|start| **start <= self.offset).copied()
                else {
                    return Ok(if starts.is_empty() && self.offset == 0 {
                        Step::Wait
                    } else {
                        Step::Unreadable { first, end: first }
                    });
                };
                let file = match File::open(segment_path(&self.folder, start)) {
                    Ok(file) => file,
                    // Deleted a moment ago.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        return Ok(Step::Unreadable { first, end: first });
                    }
                    Err(error) => return Err(error),
                };
                self.segment.insert((start, file))
            }
        };
        let kept = self.buffer.len();
        self.buffer.resize(kept + READ_BYTES, 0);
        let read = file.read_at(
            self.buffer.get_mut(kept..).unwrap_or_default(),
            self.offset - start + kept as u64,
        )?;
        self.buffer.truncate(kept + read);
        let mut whole = 0;
        while let Found::Frame { offset, payload } =
            journal::find(self.buffer.get(whole..).unwrap_or_default())
        {
            if offset != self.offset + whole as u64 {
                break;
            }
            self.ended = is_end(payload);
            whole += HEADER_BYTES + payload.len();
        }
        if whole > 0 {
            return Ok(Step::Frames(whole));
        }
        if starts.contains(&self.offset) && *start != self.offset {
            self.segment = None;
            self.buffer.clear();
            return self.step();
        }
        let length = file.metadata()?.len();
        if self.offset - start > length {
            return Ok(Step::Unreadable {
                first: starts.first().copied().unwrap_or(0),
                end: start + length,
            });
        }
        if read == 0 || journal::find(&self.buffer) == Found::Damaged {
            // What lies here is no frame: perhaps one that is being written, that found no room, or
            // what a host that was killed left. It is read again.
            self.buffer.clear();
        }
        Ok(Step::Wait)
    }

    fn take(&mut self, bytes: usize) {
        self.buffer.drain(..bytes);
        self.offset += bytes as u64;
    }
}

/// Cheap for output, which is most of a journal.
fn is_end(payload: &[u8]) -> bool {
    payload.len() < 4096
        && Record::decode(payload)
            .is_ok_and(|record| matches!(record.kind, Some(record::Kind::HostEnded(_))))
}

fn tell(kind: control::Kind) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(&journal::control_frame(&Control { kind: Some(kind) }))?;
    stdout.flush()
}

/// Follows the journal until the host's end; returns early where standard output is closed.
pub fn run(dir: &Path, from: u64) -> io::Result<ExitCode> {
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    let folder = journal_path(dir);
    match inotify::add_watch(
        &watch,
        &folder,
        inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO,
    ) {
        Ok(_) => {}
        Err(rustix::io::Errno::NOENT) if from == 0 => {
            tell(control::Kind::HostLost(HostLost {}))?;
            return Ok(ExitCode::from(HOST_LOST));
        }
        Err(rustix::io::Errno::NOENT) => {
            tell(control::Kind::Unreadable(Unreadable { first: 0, end: 0 }))?;
            return Ok(ExitCode::from(UNREADABLE));
        }
        Err(error) => return Err(error.into()),
    }
    let mut host = UnixStream::connect(socket_path(dir)).ok();
    let mut tail = Tail::new(folder, from);
    // A reader that is at the end hears at once that it is.
    let (mut stdin_open, mut input, mut told) =
        (true, Vec::new(), monotonic_ms().saturating_sub(ALIVE_MS));
    let (mut host_is_gone, mut was_connected, mut hung_up_at) = (false, host.is_some(), None);
    loop {
        match tail.step()? {
            Step::Frames(bytes) => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(tail.buffer.get(..bytes).unwrap_or_default())?;
                stdout.flush()?;
                drop(stdout);
                tail.take(bytes);
                told = monotonic_ms();
                host_is_gone = false;
                if !input.is_empty() || tail.ended {
                    pass_inputs(&mut host, &mut input);
                }
                // Inputs are not kept waiting by a long journal.
                wait(&watch, host.as_ref(), stdin_open, 0, &mut input, &mut stdin_open)?;
                pass_inputs(&mut host, &mut input);
                continue;
            }
            Step::Unreadable { first, end } => {
                tell(control::Kind::Unreadable(Unreadable { first, end }))?;
                return Ok(ExitCode::from(UNREADABLE));
            }
            Step::Wait => {}
        }
        if is_free(dir) {
            // Read once more after the lock was seen free: a host's last words come before it lets
            // go.
            if !host_is_gone {
                host_is_gone = true;
                continue;
            }
            if tail.ended {
                tell(control::Kind::Ended(Ended {}))?;
                return Ok(ExitCode::SUCCESS);
            }
            tell(control::Kind::HostLost(HostLost {}))?;
            return Ok(ExitCode::from(HOST_LOST));
        }
        host_is_gone = false;
        let now = monotonic_ms();
        if host.is_none() && was_connected {
            // It prefers newer connections. What it had not read of this one is lost, and only a
            // new connection of the sender sends it again.
            if now - *hung_up_at.get_or_insert(now) >= HUNG_UP_MS {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
        } else if host.is_none() {
            host = UnixStream::connect(socket_path(dir)).ok();
            was_connected = host.is_some();
        }
        if now - told >= ALIVE_MS {
            tell(control::Kind::Alive(Alive { offset: tail.offset }))?;
            told = now;
        }
        let open = stdin_open;
        let timeout = hung_up_at.map_or(1000, |_| 50);
        let hung_up = wait(&watch, host.as_ref(), open, timeout, &mut input, &mut stdin_open)?;
        if hung_up {
            host = None;
        }
        pass_inputs(&mut host, &mut input);
    }
}

/// Waits for the journal, an input or the host's end. True: the host hung up.
fn wait(
    watch: &OwnedFd,
    host: Option<&UnixStream>,
    reads_stdin: bool,
    timeout_ms: i64,
    input: &mut Vec<u8>,
    stdin_open: &mut bool,
) -> io::Result<bool> {
    let stdin = io::stdin();
    let stdout = io::stdout();
    let mut fds = vec![
        PollFd::from_borrowed_fd(watch.as_fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::empty()),
    ];
    // Without a host no input is taken: the sender keeps it.
    let stdin_index = (reads_stdin && host.is_some() && input.is_empty()).then(|| {
        fds.push(PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN));
        fds.len() - 1
    });
    let host_index = host.map(|host| {
        let flags = if input.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT };
        fds.push(PollFd::from_borrowed_fd(host.as_fd(), flags));
        fds.len() - 1
    });
    match poll(
        &mut fds,
        Some(&Timespec { tv_sec: timeout_ms / 1000, tv_nsec: (timeout_ms % 1000) * 1_000_000 }),
    ) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let events = |index: Option<usize>| {
        index.and_then(|index| fds.get(index)).map_or(PollFlags::empty(), PollFd::revents)
    };
    if events(Some(1)).intersects(PollFlags::ERR | PollFlags::HUP) {
        return Err(io::ErrorKind::BrokenPipe.into());
    }
    if !events(Some(0)).is_empty() {
        let mut events = [0; 4096];
        while rustix::io::read(watch, &mut events).is_ok_and(|read| read > 0) {}
    }
    if !events(stdin_index).is_empty() {
        let mut buffer = [0; 64 << 10];
        match rustix::io::read(&stdin, &mut buffer) {
            Ok(0) | Err(_) => *stdin_open = false,
            Ok(read) => input.extend_from_slice(buffer.get(..read).unwrap_or_default()),
        }
    }
    Ok(events(host_index).intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::RDHUP))
}

/// Passes bytes of inputs on. What a host that is gone did not take is dropped: its sender has no
/// acceptance in the journal.
fn pass_inputs(host: &mut Option<UnixStream>, input: &mut Vec<u8>) {
    let Some(stream) = host else {
        input.clear();
        return;
    };
    if !input.is_empty() {
        if stream.write_all(input).is_err() {
            *host = None;
        }
        input.clear();
    }
}

/// Whether no host holds the lock.
fn is_free(dir: &Path) -> bool {
    File::open(lock_path(dir))
        .is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockShared).is_ok())
}

/// Reads a whole file of frames; for people and tests.
pub fn dump(dir: &Path) -> io::Result<ExitCode> {
    let mut tail =
        Tail::new(journal_path(dir), segments(&journal_path(dir))?.first().copied().unwrap_or(0));
    let mut stdout = io::stdout().lock();
    while let Step::Frames(bytes) = tail.step()? {
        let mut rest = tail.buffer.get(..bytes).unwrap_or_default();
        while let Found::Frame { offset, payload } = journal::find(rest) {
            if let Ok(record) = Record::decode(payload) {
                writeln!(stdout, "{offset} {:?}", record.kind)?;
            }
            rest = rest.get(HEADER_BYTES + payload.len()..).unwrap_or_default();
        }
        tail.take(bytes);
    }
    Ok(ExitCode::SUCCESS)
}
