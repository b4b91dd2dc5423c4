//! A host in a folder of its own, and readers of its journal.

use std::{
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use contract::host::{
    Control, Decision, Input, Interrupt, Message, Output, Persisted, Record, Spec, Step, Stop,
    TurnEnded, decision::Verdict, input, record,
};
use journal::{Decoder, Frame};
use prost::Message as _;

pub const TIMEOUT: Duration = Duration::from_secs(30);

/// The host under test: another build of it with `AOD_AGENT_HOST`.
pub fn program() -> PathBuf {
    std::env::var_os("AOD_AGENT_HOST")
        .map_or_else(|| env!("CARGO_BIN_EXE_agent-host").into(), PathBuf::from)
}

pub struct Host {
    pub folder: tempfile::TempDir,
    pub spec: Spec,
}

impl Host {
    pub fn new(spec: Spec) -> Self {
        let folder = tempfile::Builder::new().prefix("agent-host-").tempdir().unwrap();
        let session = folder.path().file_name().unwrap().to_str().unwrap().to_owned();
        Self { folder, spec: Spec { session_id: session, linger_seconds: 60, ..spec } }
    }

    pub fn shell() -> Self {
        Self::new(Spec { runtime: "shell".to_owned(), ..Spec::default() })
    }

    pub fn dir(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    pub fn start(&self) {
        let spec = self.folder.path().join("spec");
        std::fs::write(&spec, self.spec.encode_to_vec()).unwrap();
        let mut command = Command::new(program());
        let output = command
            .args(["start", "--dir"])
            .arg(self.dir())
            .arg("--spec")
            .arg(spec)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    pub fn attach(&self, from: u64) -> Attached {
        let mut command = Command::new(program());
        command.args(["attach", "--dir"]).arg(self.dir()).args(["--from", &from.to_string()]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (sender, chunks) = channel();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 256 << 10];
            while let Ok(read) = stdout.read(&mut buffer) {
                if read == 0 || sender.send(buffer[..read].to_vec()).is_err() {
                    break;
                }
            }
        });
        Attached { child, stdin, chunks, decoder: Decoder::new(from) }
    }

    /// What the journal's first segment holds.
    pub fn whole_journal(&self) -> (Vec<record::Kind>, u64) {
        let mut decoder = Decoder::new(0);
        decoder.push(
            &std::fs::read(self.dir().join("journal").join(format!("{:020}.seg", 0))).unwrap(),
        );
        let mut kinds = Vec::new();
        while let Ok(Some(Frame::Record { record, .. })) = decoder.next() {
            kinds.extend(record.kind);
        }
        (kinds, decoder.offset())
    }

    /// The pid of the host's process, which is the only one with the folder as `run --dir`.
    pub fn pid(&self) -> Option<i32> {
        let wanted = format!("run\0--dir\0{}\0", self.dir().display());
        let processes = std::fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.unwrap().file_name().into_string().ok());
        let is_host = |pid: &i32| {
            std::fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).ends_with(&wanted))
        };
        processes.filter_map(|name| name.parse().ok()).find(is_host)
    }

    pub fn kill(&self) {
        let pid = self.pid().expect("no host runs");
        kill(pid);
        eventually(|| !Path::new(&format!("/proc/{pid}")).exists() || is_zombie(pid));
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(pid) = self.pid() {
            kill(pid);
        }
        let mark = format!("AOD_HOST_SESSION={}", self.spec.session_id);
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
            if environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes()) {
                kill(pid);
            }
        }
    }
}

pub fn kill(pid: i32) {
    let _ = rustix::process::kill_process(
        rustix::process::Pid::from_raw(pid).unwrap(),
        rustix::process::Signal::KILL,
    );
}

fn is_zombie(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z"))
}

/// Ends the test's own `sleep` of that many seconds.
pub fn end_sleep(seconds: &str) {
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if line == format!("sleep\0{seconds}\0").as_bytes() {
            kill(entry.file_name().to_str().unwrap().parse().unwrap());
        }
    }
}

/// Whether a process with this word in its command line runs.
pub fn is_running(word: &str) -> bool {
    std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(word)
            && !String::from_utf8_lossy(&line).contains("agent-host")
    })
}

pub fn eventually(mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + TIMEOUT;
    while !condition() {
        assert!(Instant::now() < until, "waited in vain");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub struct Attached {
    pub child: Child,
    stdin: ChildStdin,
    chunks: Receiver<Vec<u8>>,
    pub decoder: Decoder,
}

impl Attached {
    pub fn send(&mut self, id: &str, kind: input::Kind) {
        let frame = journal::input_frame(&Input { id: id.to_owned(), kind: Some(kind) });
        self.stdin.write_all(&frame).unwrap();
    }

    pub fn message(&mut self, turn: u32, text: &str) {
        self.send(&format!("message-{turn}"), message(turn, text, 0));
    }

    pub fn interrupt(&mut self, id: &str) {
        self.send(id, input::Kind::Interrupt(Interrupt::default()));
    }

    pub fn decide(&mut self, id: &str, request: u64, verdict: Verdict, message: &str) {
        self.send(
            id,
            input::Kind::Decision(Decision {
                request,
                verdict: verdict.into(),
                message: message.to_owned(),
            }),
        );
    }

    pub fn persisted(&mut self) {
        let offset = self.decoder.offset();
        self.send("", input::Kind::Persisted(Persisted { offset }));
    }

    pub fn stop(&mut self) {
        self.send("stop", input::Kind::Stop(Stop {}));
    }

    pub fn step(&mut self, name: &str, script: &str, timeout_seconds: u32) {
        self.send(
            name,
            input::Kind::Step(Step {
                name: name.to_owned(),
                script: script.to_owned(),
                timeout_seconds,
                ..Step::default()
            }),
        );
    }

    fn next(&mut self, until: Instant) -> Result<Frame, Option<Control>> {
        loop {
            match self.decoder.next().unwrap() {
                Some(Frame::Control(control))
                    if matches!(control.kind, Some(contract::host::control::Kind::Alive(_))) => {}
                Some(Frame::Control(control)) => return Err(Some(control)),
                Some(frame) => return Ok(frame),
                None => {
                    match self.chunks.recv_timeout(until.saturating_duration_since(Instant::now()))
                    {
                        Ok(chunk) => self.decoder.push(&chunk),
                        Err(RecvTimeoutError::Disconnected | RecvTimeoutError::Timeout) => {
                            return Err(None);
                        }
                    }
                }
            }
        }
    }

    /// Reads until a record is found, that one included.
    pub fn until(&mut self, mut found: impl FnMut(&record::Kind) -> bool) -> Vec<record::Kind> {
        let deadline = Instant::now() + TIMEOUT;
        let mut kinds: Vec<record::Kind> = Vec::new();
        loop {
            match self.next(deadline) {
                Ok(Frame::Record { record: Record { kind: Some(kind), .. }, .. }) => {
                    let last = found(&kind);
                    kinds.push(kind);
                    if last {
                        return kinds;
                    }
                }
                Ok(_) => {}
                Err(control) => panic!("ended with {control:?} after\n{}", show(&kinds)),
            }
        }
    }

    /// Reads to the end of the stream.
    pub fn rest(&mut self) -> (Vec<record::Kind>, Option<Control>) {
        let deadline = Instant::now() + TIMEOUT;
        let mut kinds = Vec::new();
        loop {
            match self.next(deadline) {
                Ok(Frame::Record { record, .. }) => kinds.extend(record.kind),
                Ok(_) => {}
                Err(control) => return (kinds, control),
            }
        }
    }

    /// Runs a turn to its end.
    pub fn turn(&mut self, turn: u32, text: &str) -> (Vec<record::Kind>, TurnEnded) {
        self.message(turn, text);
        self.turn_ended()
    }

    pub fn turn_ended(&mut self) -> (Vec<record::Kind>, TurnEnded) {
        let kinds = self.until(|kind| matches!(kind, record::Kind::TurnEnded(_)));
        let Some(record::Kind::TurnEnded(ended)) = kinds.last().cloned() else { panic!("no end") };
        (kinds, ended)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn message(turn: u32, text: &str, timeout_seconds: u32) -> input::Kind {
    input::Kind::Message(Message {
        turn,
        text: text.to_owned(),
        timeout_seconds,
        ..Message::default()
    })
}

/// What was written to standard output and standard error.
pub fn output(kinds: &[record::Kind]) -> (String, String) {
    let of = |stream: i32| {
        let parts = kinds.iter().filter_map(|kind| match kind {
            record::Kind::Output(Output { stream: of, data }) if *of == stream => {
                Some(data.to_vec())
            }
            _ => None,
        });
        String::from_utf8_lossy(&parts.collect::<Vec<_>>().concat()).into_owned()
    };
    (of(0), of(1))
}

/// Records for people, each shortened.
pub fn show(kinds: &[record::Kind]) -> String {
    let lines = kinds.iter().map(|kind| {
        let mut line = match kind {
            record::Kind::Output(output) => {
                format!("Output({}): {}", output.stream, String::from_utf8_lossy(&output.data))
            }
            kind => format!("{kind:?}"),
        };
        line.truncate(line.floor_char_boundary(600));
        line
    });
    lines.collect::<Vec<_>>().join("\n")
}
