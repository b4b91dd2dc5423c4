//! What a service writes, on its way to its log, with no line lost or doubled, whenever this server
//! is killed.
//!
//! The service writes to two named pipes that it holds open itself: with no server to read them it
//! waits. One system call moves bytes from a pipe into a spool, so that they are always in one of
//! the two. From there lines go to the log; the position file then says how far the spools are
//! logged and how long the log was. What a killed server logged beyond that is cut off, and logged
//! again by the next one.

use std::{
    fmt::Write as _,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::Stdio,
};

use rustix::{
    fs::{CWD, FallocateFlags, FileType, Mode, fallocate},
    pipe::{SpliceFlags, splice},
};
use tokio::net::unix::pipe;
use types::Timestamp;

use crate::run::exec::Stream;

const LOG_BYTES_MAX: u64 = 10 * 1024 * 1024;
/// A longer line is cut.
const LINE_BYTES_MAX: usize = 64 * 1024;
/// How much is moved at once: what a pipe holds.
const MOVE_BYTES_MAX: usize = 64 * 1024;
/// So much of a spool is logged before its room is given back.
const SPOOL_BYTES_MAX: u64 = 1024 * 1024;

/// The files of one service's output.
pub struct Files {
    /// Pipes, spools and position, which this server alone sees, begin with this.
    own: PathBuf,
    /// What the Sprite can read.
    log: PathBuf,
}

impl Files {
    pub fn new(dir: &Path, name: &str, log: PathBuf) -> Self {
        Self { own: dir.join(name), log }
    }

    fn own(&self, kind: &str) -> PathBuf {
        let mut path = self.own.clone().into_os_string();
        path.push(".");
        path.push(kind);
        path.into()
    }

    /// The writing ends for the service: stdout and stderr. It opens them for reading too, and so
    /// never has to wait for a reader to come.
    pub fn writers(&self) -> io::Result<[Stdio; 2]> {
        let open =
            |kind| OpenOptions::new().read(true).write(true).open(self.own(kind)).map(Stdio::from);
        Ok([open("stdout")?, open("stderr")?])
    }

    /// Forgets everything but the log.
    pub fn remove(&self) {
        for kind in ["stdout", "stderr", "stdout.spool", "stderr.spool", "position"] {
            let _ = fs::remove_file(self.own(kind));
        }
    }
}

pub struct Output {
    stdout: Source,
    stderr: Source,
    log: Log,
    position: File,
}

impl Output {
    /// Takes up where an earlier server was stopped or killed; makes what is not there.
    pub fn open(files: &Files) -> io::Result<Self> {
        if let Some(dir) = files.own.parent() {
            fs::create_dir_all(dir)?;
        }
        let position = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(files.own("position"))?;
        let known = Position::read(&position)?;
        let source = |kind: &str, logged| {
            Source::open(&files.own(kind), &files.own(&format!("{kind}.spool")), logged)
        };
        let stdout = source("stdout", known.map_or(0, |known| known.stdout))?;
        let stderr = source("stderr", known.map_or(0, |known| known.stderr))?;
        Ok(Self {
            stdout,
            stderr,
            log: Log::open(&files.log, known.map(|known| known.log))?,
            position,
        })
    }

    /// The next lines of either, which are in the log by now. Loses nothing when it is dropped
    /// before it is done.
    pub async fn next(&mut self) -> io::Result<Vec<(Stream, String)>> {
        // There may always be more, and others want to run too.
        tokio::task::yield_now().await;
        loop {
            for (stream, bytes) in
                [(Stream::Stdout, self.stdout.whole()), (Stream::Stderr, self.stderr.whole())]
            {
                if bytes > 0 {
                    return self.record(stream, bytes);
                }
            }
            tokio::select! {
                moved = self.stdout.fill() => moved?,
                moved = self.stderr.fill() => moved?,
            }
        }
    }

    /// What ended without an end of line.
    pub fn rest(&mut self) -> io::Result<Vec<(Stream, String)>> {
        let (stdout, stderr) = (self.stdout.held.len(), self.stderr.held.len());
        Ok([self.record(Stream::Stdout, stdout)?, self.record(Stream::Stderr, stderr)?].concat())
    }

    /// Logs the first `bytes` of what is held.
    fn record(&mut self, stream: Stream, bytes: usize) -> io::Result<Vec<(Stream, String)>> {
        if self.log.is_full() {
            self.log.rotate()?;
            self.note()?;
        }
        let source = if stream == Stream::Stdout { &mut self.stdout } else { &mut self.stderr };
        let lines = source.held[..bytes]
            .split_inclusive(|byte| *byte == b'\n')
            .flat_map(|line| line.chunks(LINE_BYTES_MAX));
        let lines: Vec<_> =
            lines.map(|line| (stream, String::from_utf8_lossy(line).into_owned())).collect();
        self.log.append(&lines)?;
        source.held.drain(..bytes);
        source.logged += bytes as u64;
        // Noted before anything of the spool goes: until then it may have to be logged again.
        self.note()?;
        let source = if stream == Stream::Stdout { &mut self.stdout } else { &mut self.stderr };
        if source.trim()? {
            self.note()?;
        }
        Ok(lines)
    }

    fn note(&self) -> io::Result<()> {
        Position { stdout: self.stdout.logged, stderr: self.stderr.logged, log: self.log.len }
            .write(&self.position)
    }
}

/// How far the spools are logged, and how long the log is with that; in bytes.
#[derive(Clone, Copy)]
struct Position {
    stdout: u64,
    stderr: u64,
    log: u64,
}

impl Position {
    const BYTES: usize = 24;

    /// None where nothing was noted yet.
    fn read(file: &File) -> io::Result<Option<Self>> {
        let mut bytes = [0; Self::BYTES];
        match file.read_exact_at(&mut bytes, 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            other => other?,
        }
        let number = |at: usize| {
            bytes[at..at + 8].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
        };
        Ok(Some(Self { stdout: number(0), stderr: number(8), log: number(16) }))
    }

    /// In one write within one page, which a kill cannot split.
    fn write(self, file: &File) -> io::Result<()> {
        let numbers = [self.stdout, self.stderr, self.log].map(u64::to_le_bytes);
        file.write_all_at(numbers.as_flattened(), 0)
    }
}

/// One stream of a service: its pipe, and the spool behind it.
struct Source {
    pipe: pipe::Receiver,
    spool: File,
    spooled: u64,
    logged: u64,
    /// Up to here its room was given back.
    trimmed: u64,
    /// The spool from `logged` on.
    held: Vec<u8>,
}

impl Source {
    fn open(pipe: &Path, spool: &Path, logged: u64) -> io::Result<Self> {
        match rustix::fs::mknodat(CWD, pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0) {
            Err(error) if error != rustix::io::Errno::EXIST => return Err(error.into()),
            _ => {}
        }
        // Opened for writing too, so that it never ends.
        let pipe = pipe::OpenOptions::new().read_write(true).open_receiver(pipe)?;
        let spool = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(spool)?;
        let spooled = spool.metadata()?.len();
        // Shorter: it was started over, and that was not noted any more.
        let logged = if logged > spooled { 0 } else { logged };
        let mut held = vec![0; usize::try_from(spooled - logged).map_err(io::Error::other)?];
        spool.read_exact_at(&mut held, logged)?;
        Ok(Self { pipe, spool, spooled, logged, trimmed: 0, held })
    }

    /// How much of what is held is whole lines, or the beginning of one that is too long.
    fn whole(&self) -> usize {
        match self.held.iter().rposition(|byte| *byte == b'\n') {
            Some(end) => end + 1,
            None if self.held.len() >= LINE_BYTES_MAX => LINE_BYTES_MAX,
            None => 0,
        }
    }

    /// Waits for output, and moves it into the spool.
    async fn fill(&mut self) -> io::Result<()> {
        loop {
            self.pipe.readable().await?;
            let mut end = self.spooled;
            let splice = || {
                Ok(splice(
                    &self.pipe,
                    None,
                    &self.spool,
                    Some(&mut end),
                    MOVE_BYTES_MAX,
                    SpliceFlags::NONBLOCK,
                )?)
            };
            let moved = match self.pipe.try_io(splice) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                moved => moved?,
            };
            let before = self.held.len();
            self.held.resize(before + moved, 0);
            self.spool.read_exact_at(&mut self.held[before..], self.spooled)?;
            self.spooled = end;
            return Ok(());
        }
    }

    /// Gives back the room of what is logged; true where the spool was started over. A busy
    /// service's may never be logged whole: there a hole is left, and offsets stay what they are.
    fn trim(&mut self) -> io::Result<bool> {
        if self.logged - self.trimmed < SPOOL_BYTES_MAX {
            return Ok(false);
        }
        if self.held.is_empty() {
            self.spool.set_len(0)?;
            (self.spooled, self.logged, self.trimmed) = (0, 0, 0);
            return Ok(true);
        }
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.spool, hole, self.trimmed, self.logged - self.trimmed)?;
        self.trimmed = self.logged;
        Ok(false)
    }
}

struct Log {
    path: PathBuf,
    file: File,
    len: u64,
}

impl Log {
    /// Opens it at a length that was noted, where one was; it is shorter where it was started over
    /// since.
    fn open(path: &Path, noted: Option<u64>) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let mut len = file.metadata()?.len();
        if let Some(noted) = noted.filter(|noted| *noted < len) {
            file.set_len(noted)?;
            len = noted;
        }
        Ok(Self { path: path.to_owned(), file, len })
    }

    fn is_full(&self) -> bool {
        self.len > LOG_BYTES_MAX
    }

    fn rotate(&mut self) -> io::Result<()> {
        fs::rename(&self.path, self.path.with_extension("log.1"))?;
        *self = Self::open(&self.path, None)?;
        Ok(())
    }

    fn append(&mut self, lines: &[(Stream, String)]) -> io::Result<()> {
        let (now, mut text) = (Timestamp::now(), String::new());
        for (stream, line) in lines {
            let name = if *stream == Stream::Stdout { "stdout" } else { "stderr" };
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{now} [{name}] {}", line.trim_end_matches('\n'));
        }
        if let Err(error) = self.file.write_all(text.as_bytes()) {
            // A full disk may have taken a part.
            self.file.set_len(self.len)?;
            return Err(error);
        }
        self.len += text.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(dir: &Path) -> Files {
        Files::new(dir, "web", dir.join("web.log"))
    }

    fn write(files: &Files, text: &str) {
        let mut pipe = OpenOptions::new().read(true).write(true).open(files.own("stdout")).unwrap();
        pipe.write_all(text.as_bytes()).unwrap();
        // What the service does: its end outlives the server's.
        std::mem::forget(pipe);
    }

    fn logged(files: &Files) -> Vec<String> {
        fs::read_to_string(&files.log)
            .unwrap()
            .lines()
            .map(|line| line.split_once("] ").unwrap().1.to_owned())
            .collect()
    }

    async fn follow(output: &mut Output, lines: usize) {
        let mut followed = 0;
        while followed < lines {
            followed += output.next().await.unwrap().len();
        }
        assert_eq!(followed, lines);
    }

    /// As a kill leaves it: the files of one moment, whatever was done to them afterwards.
    #[tokio::test]
    async fn a_server_killed_anywhere_between_pipe_and_position_loses_and_doubles_no_line() {
        let dir = tempfile::tempdir().unwrap();
        let files = files(dir.path());
        let mut output = Output::open(&files).unwrap();
        write(&files, "one\n");
        follow(&mut output, 1).await;
        write(&files, "two\nthr");
        // Killed with a line in the spool and none in the pipe.
        output.stdout.fill().await.unwrap();
        drop(output);
        let mut output = Output::open(&files).unwrap();
        follow(&mut output, 1).await;
        // Killed after the log, before the position.
        let position = fs::read(files.own("position")).unwrap();
        write(&files, "ee\nfour\n");
        follow(&mut output, 2).await;
        write(&files, "four\n");
        drop(output);
        fs::write(files.own("position"), position).unwrap();
        assert_eq!(logged(&files), ["one", "two", "three", "four"]);
        let mut output = Output::open(&files).unwrap();
        assert_eq!(logged(&files), ["one", "two"]);
        follow(&mut output, 3).await;
        assert_eq!(logged(&files), ["one", "two", "three", "four", "four"]);
    }

    #[tokio::test]
    async fn spool_and_log_rotate_and_a_kill_meanwhile_repeats_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let files = files(dir.path());
        let mut output = Output::open(&files).unwrap();
        let line = "x".repeat(30_000) + "\n";
        for _ in 0..40 {
            write(&files, &line);
            follow(&mut output, 1).await;
        }
        let spool = fs::metadata(files.own("stdout.spool")).unwrap().len();
        assert!(spool < SPOOL_BYTES_MAX, "{spool}");
        // Killed when the spool was started over, before that was noted.
        let before = logged(&files).len();
        output.stdout.spool.set_len(0).unwrap();
        drop(output);
        let mut output = Output::open(&files).unwrap();
        assert_eq!(logged(&files).len(), before);
        write(&files, "next\n");
        follow(&mut output, 1).await;
        assert_eq!(logged(&files).len(), before + 1);
        // The log was started over, and the position is from before.
        output.log.rotate().unwrap();
        drop(output);
        let mut output = Output::open(&files).unwrap();
        write(&files, "last\n");
        follow(&mut output, 1).await;
        assert_eq!(logged(&files), ["last"]);
    }

    /// Each read ends within a line: the spool is never logged whole.
    #[tokio::test]
    async fn the_spool_of_a_busy_service_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let files = files(dir.path());
        let mut output = Output::open(&files).unwrap();
        write(&files, "begun ");
        for _ in 0..200 {
            write(&files, &("x".repeat(30_000) + "\nbegun "));
            follow(&mut output, 1).await;
        }
        let spool = fs::metadata(files.own("stdout.spool")).unwrap();
        let room = std::os::unix::fs::MetadataExt::blocks(&spool) * 512;
        assert!(
            spool.len() > 5 * SPOOL_BYTES_MAX && room < 2 * SPOOL_BYTES_MAX,
            "{room} bytes for {}",
            spool.len()
        );
        drop(output);
        let mut output = Output::open(&files).unwrap();
        write(&files, "ended\n");
        follow(&mut output, 1).await;
        let lines = logged(&files);
        assert_eq!((lines.len(), lines.last().unwrap().as_str()), (201, "begun ended"));
    }

    #[tokio::test]
    async fn a_line_that_does_not_end_is_cut_and_last_words_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let files = files(dir.path());
        let mut output = Output::open(&files).unwrap();
        write(&files, &"x".repeat(LINE_BYTES_MAX));
        follow(&mut output, 1).await;
        write(&files, "rest");
        assert!(
            tokio::time::timeout(std::time::Duration::from_millis(50), output.next())
                .await
                .is_err()
        );
        assert_eq!(output.rest().unwrap(), [(Stream::Stdout, "rest".to_owned())]);
        assert_eq!(logged(&files).iter().map(String::len).collect::<Vec<_>>(), [LINE_BYTES_MAX, 4]);
    }
}
