//! Starts, watches, restarts and stops child processes.

use std::{
    fs::OpenOptions,
    io::Read as _,
    net::SocketAddr,
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal};
use tokio::process::{Child, Command};
use types::Backoff;

use crate::dev::{DevError, data::User, tools::Tools};

const RESTART: Backoff =
    Backoff { base: Duration::from_millis(50), max: Duration::from_secs(5), attempts: u32::MAX };
/// One that ran this long had started well.
const STARTED_WELL: Duration = Duration::from_secs(10);

/// How to start a child, and how to know that it is up.
#[derive(Debug)]
pub struct Spec {
    pub name: String,
    /// Under which name it is listed: the runners share one.
    pub service: &'static str,
    pub program: PathBuf,
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    pub user: Option<User>,
    /// What asks it to end.
    pub stop_signal: Signal,
    /// Up when this answers: `/readyz` over HTTP, or a mere connection.
    pub probe: Probe,
    pub log: PathBuf,
}

#[derive(Clone, Copy, Debug)]
pub enum Probe {
    Connect(SocketAddr),
    Ready(SocketAddr),
}

#[derive(Debug)]
pub struct Process {
    pub spec: Spec,
    child: Option<Child>,
    started_at: Instant,
    deaths: u32,
    restart_at: Option<Instant>,
}

impl Process {
    pub fn start(spec: Spec, tools: &Tools) -> Result<Self, DevError> {
        let mut process =
            Self { spec, child: None, started_at: Instant::now(), deaths: 0, restart_at: None };
        process.spawn(tools)?;
        Ok(process)
    }

    fn spawn(&mut self, tools: &Tools) -> Result<(), DevError> {
        let spec = &self.spec;
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&spec.log)
            .map_err(DevError::broken)?;
        let signal = if spec.stop_signal == Signal::INT { "INT" } else { "TERM" };
        // Whatever becomes of this process, its children do not outlive it.
        let mut command = Command::from(tools.tied(&spec.program, spec.user.as_ref(), signal));
        command.args(&spec.args).env_clear().envs(spec.env.iter().map(|(k, v)| (k, v)));
        let log_too = log.try_clone().map_err(DevError::broken)?;
        // A group of its own: Ctrl-C reaches this process alone, which ends the others in order.
        command.stdin(Stdio::null()).stdout(log).stderr(log_too).process_group(0).current_dir("/");
        self.child = Some(command.spawn().map_err(|error| {
            DevError::Broken(format!("{} cannot be started: {error}", spec.name))
        })?);
        self.started_at = Instant::now();
        self.restart_at = None;
        Ok(())
    }

    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().and_then(Child::id)
    }

    /// Waits until the child answers.
    pub async fn ready(&mut self, limit: Duration) -> Result<(), DevError> {
        let deadline = Instant::now() + limit;
        while !self.spec.probe.answers().await {
            if let Some(status) = self.ended() {
                return Err(DevError::Broken(format!(
                    "{} ended with {status} while starting:\n{}",
                    self.spec.name,
                    self.log_tail()
                )));
            }
            if Instant::now() > deadline {
                return Err(DevError::Broken(format!(
                    "{} is not up after {} s:\n{}",
                    self.spec.name,
                    limit.as_secs(),
                    self.log_tail()
                )));
            }
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
        Ok(())
    }

    fn ended(&mut self) -> Option<ExitStatus> {
        self.child.as_mut().and_then(|child| child.try_wait().ok().flatten())
    }

    /// Notices a death, and starts the child again when it is time. Returns when the list of
    /// processes has changed. Safe to interrupt.
    pub async fn tend(&mut self, restart: bool, tools: &Tools) {
        loop {
            if let Some(child) = &mut self.child {
                let Ok(status) = child.wait().await else { break };
                self.child = None;
                self.deaths =
                    if self.started_at.elapsed() > STARTED_WELL { 1 } else { self.deaths + 1 };
                let delay = RESTART.jittered(self.deaths);
                note!(
                    "aod dev: {} ended with {status}{}",
                    self.spec.name,
                    if restart { "; starting it again" } else { "" }
                );
                self.restart_at = restart.then(|| Instant::now() + delay);
                if !restart {
                    return;
                }
            }
            let Some(at) = self.restart_at else { break };
            tokio::time::sleep_until(at.into()).await;
            match self.spawn(tools) {
                Ok(()) => return,
                Err(error) => {
                    note!("aod dev: {error}");
                    self.restart_at = Some(Instant::now() + RESTART.max);
                }
            }
        }
        std::future::pending().await
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) =
            self.pid().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw)
        {
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// Ends the child: asked first, then forced.
    pub async fn stop(&mut self, limit: Duration) {
        self.signal(self.spec.stop_signal);
        let Some(child) = &mut self.child else { return };
        if tokio::time::timeout(limit, child.wait()).await.is_err() {
            note!("aod dev: {} does not end; killing it", self.spec.name);
            let _ = child.kill().await;
        }
        self.child = None;
    }

    fn log_tail(&self) -> String {
        let mut text = String::new();
        let _ =
            std::fs::File::open(&self.spec.log).and_then(|mut file| file.read_to_string(&mut text));
        let lines: Vec<&str> = text.lines().collect();
        lines.get(lines.len().saturating_sub(8)..).unwrap_or_default().join("\n")
    }
}

impl Probe {
    async fn answers(self) -> bool {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let answered = async {
            match self {
                Self::Connect(addr) => tokio::net::TcpStream::connect(addr).await.is_ok(),
                Self::Ready(addr) => {
                    let Ok(mut stream) = tokio::net::TcpStream::connect(addr).await else {
                        return false;
                    };
                    let request = format!(
                        "GET /readyz HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n"
                    );
                    let mut answer = String::new();
                    let _ = stream.write_all(request.as_bytes()).await;
                    let _ = stream.read_to_string(&mut answer).await;
                    answer.starts_with("HTTP/1.1 200")
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(1), answered).await.unwrap_or(false)
    }
}
