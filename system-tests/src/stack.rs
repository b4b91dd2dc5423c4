//! `aod dev` as a child process, and calls to its API.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use reqwest::Method;
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{faults::with_children, stream::Events};

/// Longer than any part of a stack is away.
const OUTAGE_MAX: Duration = Duration::from_secs(180);

/// Something that did not end, or was not answered, when it should have been.
#[derive(Debug)]
pub struct Stuck(pub String);

impl std::fmt::Display for Stuck {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Stuck {}

/// How to start the stack.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    pub scripted_model: bool,
    pub runners: u16,
    /// Of each other service.
    pub replicas: u16,
    pub nats_servers: u16,
    pub no_restart: bool,
    /// Settings of the services.
    pub settings: &'static [(&'static str, &'static str)],
}

impl Options {
    /// With ports of this machine's loopback that Sprites reach at their own: there is no other way
    /// from one to a test's server.
    pub fn reaching(self, ports: &[u16]) -> Self {
        let hosts: Vec<String> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        self.with("LOCAL_SPRITES_PRIVATE_HOSTS", hosts.join(","))
    }

    /// With another setting of the services.
    pub fn with(self, name: &'static str, value: String) -> Self {
        let setting = (name, &*Box::leak(value.into_boxed_str()));
        let settings = self.settings.iter().copied().chain([setting]).collect::<Vec<_>>();
        Self { settings: Box::leak(settings.into_boxed_slice()), ..self }
    }
}

/// A running stack, ended when dropped.
pub struct Stack {
    child: Child,
    data: TempDir,
    pub http: reqwest::Client,
    /// Without a limit on the whole: a stream is as long as its session.
    streams: reqwest::Client,
}

/// An answer of the API.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub body: Value,
}

impl Answer {
    /// A text field of the body; empty where there is none.
    #[must_use]
    pub fn text(&self, name: &str) -> &str {
        self.body.get(name).and_then(Value::as_str).unwrap_or_default()
    }
}

impl Stack {
    /// Starts a stack in a data directory of its own and waits until it is ready.
    ///
    /// # Errors
    /// With the stack's own words, when it does not come up.
    pub async fn start(options: Options) -> anyhow::Result<Self> {
        let data = tempfile::Builder::new().prefix("aod-system-").tempdir()?;
        Self::start_in(data, options).await
    }

    /// As [`Self::start`], on the data of an earlier stack.
    ///
    /// # Errors
    /// With the stack's own words, when it does not come up.
    pub async fn start_in(data: TempDir, options: Options) -> anyhow::Result<Self> {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "TERM", "--"]).arg(testkit::services::binary("aod")?);
        command
            .arg("dev")
            .arg("--data-dir")
            .arg(data.path())
            .arg("--ready-file")
            .arg(data.path().join("ready.json"));
        command.args([
            "--port",
            &testkit::free_port()?.to_string(),
            "--runners",
            &options.runners.max(1).to_string(),
        ]);
        command.args([
            "--replicas",
            &options.replicas.max(1).to_string(),
            "--nats-servers",
            &options.nats_servers.max(1).to_string(),
        ]);
        if options.scripted_model {
            command.arg("--scripted-model");
        }
        if options.no_restart {
            command.arg("--no-restart");
        }
        command.envs(options.settings.iter().copied());
        let log = std::fs::File::create(data.path().join("dev.log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // The kernel ties the child to the thread that starts it: one that stays.
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let _ = sender.send(command.spawn());
            loop {
                std::thread::park();
            }
        });
        let child = receiver.recv()??;
        let http = reqwest::Client::builder().timeout(Duration::from_secs(60)).build()?;
        let streams =
            reqwest::Client::builder().connect_timeout(Duration::from_secs(10)).build()?;
        let mut stack = Self { child, data, http, streams };
        let begun = Instant::now();
        while !stack.ready_file().exists() {
            let ended = stack.child.try_wait()?;
            if ended.is_some() || begun.elapsed() > Duration::from_secs(60) {
                bail!("the stack is not ready ({ended:?}): {}", stack.log());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(stack)
    }

    fn ready_file(&self) -> PathBuf {
        self.data.path().join("ready.json")
    }

    /// What `aod dev` has printed.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.data.path().join("dev.log")).unwrap_or_default()
    }

    #[must_use]
    pub fn data_dir(&self) -> &Path {
        self.data.path()
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A field of the ready file, as it is now.
    #[must_use]
    pub fn ready(&self, pointer: &str) -> Value {
        let text = std::fs::read_to_string(self.ready_file()).unwrap_or_default();
        serde_json::from_str::<Value>(&text)
            .ok()
            .and_then(|ready| ready.pointer(pointer).cloned())
            .unwrap_or_default()
    }

    /// As [`Self::ready`], of a text.
    #[must_use]
    pub fn ready_text(&self, pointer: &str) -> String {
        self.ready(pointer).as_str().unwrap_or_default().to_owned()
    }

    /// The processes of a service.
    #[must_use]
    pub fn pids(&self, service: &str) -> Vec<u32> {
        let list = self.ready(&format!("/services/{service}"));
        let pids = list
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|process| process.get("pid")?.as_u64());
        pids.filter_map(|pid| u32::try_from(pid).ok()).collect()
    }

    /// Every process of the stack, those of Postgres included, with its service.
    #[must_use]
    pub fn processes(&self) -> Vec<(String, u32)> {
        let services = self.ready("/services");
        let names = services.as_object().into_iter().flat_map(|services| services.keys().cloned());
        let own =
            names.flat_map(|name| self.pids(&name).into_iter().map(move |pid| (name.clone(), pid)));
        let all = own.chain([("aod dev".to_owned(), self.pid())]);
        all.flat_map(|(name, pid)| {
            let tree = if name == "postgres" { with_children(pid) } else { vec![pid] };
            tree.into_iter().map(move |pid| (name.clone(), pid))
        })
        .collect()
    }

    /// Returns the runner that owns a session's turn, according to the runners' logs; waits until
    /// there is one.
    ///
    /// # Errors
    /// When none has it within 20 s.
    pub async fn runner_of(&self, session: &str) -> anyhow::Result<u32> {
        for _ in 0..1000 {
            for process in self.ready("/services/sprite-runner").as_array().into_iter().flatten() {
                let log = process.get("log").and_then(Value::as_str).unwrap_or_default();
                if std::fs::read_to_string(log).unwrap_or_default().contains(session) {
                    let pid = process.get("pid").and_then(Value::as_u64).context("no pid")?;
                    return Ok(u32::try_from(pid)?);
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        bail!("no runner has session {session}")
    }

    /// Sends a request with the stack's key.
    ///
    /// # Errors
    /// When no answer comes.
    pub async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> anyhow::Result<Answer> {
        let request = self.http.request(method, format!("{}{path}", self.ready_text("/api_url")));
        self.send(request, body).await
    }

    async fn send(
        &self,
        request: reqwest::RequestBuilder,
        body: Option<Value>,
    ) -> anyhow::Result<Answer> {
        let request = request.bearer_auth(self.ready_text("/api_key"));
        let request = match body {
            Some(body) => request.json(&body),
            None => request,
        };
        let response = request.send().await?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await?;
        Ok(Answer {
            status,
            headers,
            body: serde_json::from_str(&text).unwrap_or(Value::String(text)),
        })
    }

    /// Sends a request again and again, through one gateway after the other, until it is answered
    /// by something else than an outage.
    ///
    /// # Errors
    /// [`Stuck`], when it is not within three minutes.
    pub async fn insist(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> anyhow::Result<Answer> {
        let (key, begun, mut attempt) = (uuid::Uuid::new_v4().to_string(), Instant::now(), 0);
        loop {
            let request =
                self.http.request(method.clone(), format!("{}{path}", self.gateway(attempt)));
            let answer = self.send(request.header("idempotency-key", &key), body.clone()).await;
            let is_outage = match &answer {
                Ok(answer) => {
                    answer.status == 503
                        || answer.status == 409
                            && answer.text("detail").contains("still in progress")
                }
                Err(_) => true,
            };
            if !is_outage {
                return answer;
            }
            if begun.elapsed() > OUTAGE_MAX {
                return Err(Stuck(format!(
                    "{method} {path}: no answer for {OUTAGE_MAX:?}; the last: {answer:?}"
                ))
                .into());
            }
            attempt += 1;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// The URL of one of the gateways, by any number.
    fn gateway(&self, number: usize) -> String {
        let urls = self.ready("/api_urls");
        let urls = urls.as_array().map(Vec::as_slice).unwrap_or_default();
        urls.get(number % urls.len().max(1)).and_then(Value::as_str).unwrap_or_default().to_owned()
    }

    /// # Errors
    /// When no answer comes.
    pub async fn get(&self, path: &str) -> anyhow::Result<Answer> {
        self.call(Method::GET, path, None).await
    }

    /// # Errors
    /// When no answer comes.
    pub async fn post(&self, path: &str, body: Value) -> anyhow::Result<Answer> {
        self.call(Method::POST, path, Some(body)).await
    }

    /// A new agent; its id.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn agent(&self, runtime: &str) -> anyhow::Result<String> {
        let body = json!({ "name": "test", "model": "claude-sonnet-4-5", "runtime": runtime });
        let answer = self.post("/agents", body).await?;
        ensure!(answer.status == 201, "{answer:?}");
        Ok(answer.text("id").to_owned())
    }

    /// A new session of a new agent; its id.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn session(&self, runtime: &str, prompt: &str) -> anyhow::Result<String> {
        let agent = self.agent(runtime).await?;
        let answer = self.post("/sessions", json!({ "agent_id": agent, "prompt": prompt })).await?;
        ensure!(answer.status == 202, "{answer:?}");
        Ok(answer.text("id").to_owned())
    }

    /// A session's stream, from after an event.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn stream(&self, session: &str, since: u64) -> anyhow::Result<Events> {
        Ok(Events::new(self.open_stream(session, since).await?))
    }

    /// As [`Self::stream`], unread.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn open_stream(
        &self,
        session: &str,
        since: u64,
    ) -> anyhow::Result<reqwest::Response> {
        self.open(format!(
            "{}/sessions/{session}/stream?since={since}",
            self.ready_text("/api_url")
        ))
        .await
    }

    /// A stream of one of the gateways, by any number.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn events(&self, gateway: usize, path: &str) -> anyhow::Result<Events> {
        Ok(Events::new(self.open(format!("{}{path}", self.gateway(gateway))).await?))
    }

    async fn open(&self, url: String) -> anyhow::Result<reqwest::Response> {
        let response =
            self.streams.get(url).bearer_auth(self.ready_text("/api_key")).send().await?;
        ensure!(response.status().is_success(), "stream: {}", response.status());
        Ok(response)
    }

    /// The command line, pointed at this stack.
    ///
    /// # Errors
    /// When it was not built.
    pub fn aod(&self, args: &[&str]) -> anyhow::Result<Command> {
        let mut command = Command::new(testkit::services::binary("aod")?);
        command
            .args(args)
            .env("AOD_API_URL", self.ready_text("/api_url"))
            .env("AOD_API_TOKEN", self.ready_text("/api_key"));
        Ok(command)
    }

    /// Sends a signal to processes.
    pub fn signal(pids: &[u32], signal: Signal) {
        for pid in pids.iter().filter_map(|pid| Pid::from_raw(i32::try_from(*pid).ok()?)) {
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// Ends the stack, as a user would; gives its data for another.
    ///
    /// # Errors
    /// When it does not end within 10 s, or not well.
    pub fn stop(mut self) -> anyhow::Result<TempDir> {
        Self::signal(&[self.child.id()], Signal::TERM);
        let begun = Instant::now();
        let status = loop {
            match self.child.try_wait()? {
                Some(status) => break status,
                None if begun.elapsed() > Duration::from_secs(10) => {
                    bail!("not ended within 10 s: {}", self.log())
                }
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        ensure!(status.success(), "ended with {status}: {}", self.log());
        let replacement = tempfile::tempdir().context("tempdir")?;
        Ok(std::mem::replace(&mut self.data, replacement))
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.data.disable_cleanup(true);
            eprintln!("what the stack logged stays in {}", self.data.path().display());
        }
        Self::signal(&[self.child.id()], Signal::TERM);
        let _ = self.child.wait();
    }
}
