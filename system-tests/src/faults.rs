//! The promise under attack: sessions print numbered lines while parts of the stack are killed, stopped, paused and restarted. Then
//! what was streamed, what is replayed and what the spool holds are compared.

use std::{
    collections::BTreeMap,
    fmt,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use fastrand::Rng;
use futures::future::try_join_all;
use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{Options, Stack};

/// One way to disturb the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    pub name: &'static str,
    services: &'static [&'static str],
    how: How,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Signal(Signal),
    /// Stopped for a while, then woken.
    Pause(Duration),
    /// Killed, and all that the streams hold is gone.
    LoseStreams,
}

const fn kill(name: &'static str, services: &'static [&'static str]) -> Fault {
    Fault { name, services, how: How::Signal(Signal::KILL) }
}

const fn stop(name: &'static str, services: &'static [&'static str]) -> Fault {
    Fault { name, services, how: How::Signal(Signal::TERM) }
}

const fn pause(name: &'static str, services: &'static [&'static str], seconds: u64) -> Fault {
    Fault { name, services, how: How::Pause(Duration::from_secs(seconds)) }
}

/// Every fault that the suite knows.
pub const FAULTS: &[Fault] = &[
    kill("runner killed", &["sprite-runner"]),
    stop("runner stopped", &["sprite-runner"]),
    pause("runner paused past its lease", &["sprite-runner"], 4),
    kill("scheduler killed", &["scheduler"]),
    stop("scheduler stopped", &["scheduler"]),
    kill("gateway killed", &["gateway"]),
    stop("gateway stopped", &["gateway"]),
    kill("auth and vault killed", &["auth", "credential-vault"]),
    stop("auth and vault stopped", &["auth", "credential-vault"]),
    kill("NATS killed", &["nats"]),
    stop("NATS stopped", &["nats"]),
    pause("NATS paused", &["nats"], 4),
    kill("Postgres killed", &["postgres"]),
    // INT is how Postgres is asked to end without waiting for its clients.
    Fault { how: How::Signal(Signal::INT), ..stop("Postgres stopped", &["postgres"]) },
    pause("Postgres paused", &["postgres"], 5),
    pause("Postgres paused for a minute", &["postgres"], 60),
    kill("local-sprites killed", &["local-sprites"]),
    stop("local-sprites stopped", &["local-sprites"]),
    Fault { how: How::LoseStreams, ..kill("the JetStream store lost", &["nats"]) },
];

/// The faults after which nothing at all may be lost, doubled or failed; without those that take long.
#[must_use]
pub fn harmless() -> Vec<Fault> {
    let harmless = |fault: &&Fault| match fault.how {
        How::LoseStreams => false,
        How::Pause(time) => time < Duration::from_secs(10),
        How::Signal(_) => true,
    };
    FAULTS.iter().filter(harmless).copied().collect()
}

/// A fault by its name.
#[must_use]
pub fn named(name: &str) -> Option<Fault> {
    FAULTS.iter().find(|fault| fault.name == name).copied()
}

/// How to attack.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub seed: u64,
    pub sessions: usize,
    /// How long each session prints, about.
    pub seconds: u64,
    pub injections: usize,
}

/// What a fault did.
#[derive(Debug)]
pub struct Outcome {
    pub fault: &'static str,
    pub injected: usize,
    pub sessions: usize,
    pub lines: usize,
    pub lost: usize,
    pub doubled: usize,
    /// Turns that ended otherwise than their scripts did.
    pub failed: usize,
    /// The longest silence of a session that prints all the time.
    pub worst_pause: Duration,
    /// What was wrong, in words.
    pub wrong: Vec<String>,
}

impl Outcome {
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.wrong.is_empty()
    }

    pub const HEADER: &'static str = "fault                         injected  sessions    lines  lost  doubled  failed  worst pause";
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:<28} {:>9} {:>9} {:>8} {:>5} {:>8} {:>7} {:>10.2} s",
            self.fault,
            self.injected,
            self.sessions,
            self.lines,
            self.lost,
            self.doubled,
            self.failed,
            self.worst_pause.as_secs_f64()
        )?;
        for wrong in &self.wrong {
            write!(f, "\n    {wrong}")?;
        }
        Ok(())
    }
}

/// A stack for attacks: what dies is started again.
///
/// # Errors
/// When it does not start.
pub async fn stack() -> Result<Stack> {
    Stack::start(Options { runners: 2, ..Options::default() }).await
}

/// Runs sessions, disturbs them, and judges what became of them.
///
/// # Errors
/// When the attack itself cannot be carried out.
pub async fn attack(stack: &Stack, faults: &[Fault], name: &'static str, plan: Plan) -> Result<Outcome> {
    let mut rng = Rng::with_seed(plan.seed);
    let scripts: Vec<Script> = (0..plan.sessions).map(|_| Script::new(&mut rng, plan.seconds)).collect();
    let agent = stack.agent("shell").await?;
    let started = try_join_all(scripts.iter().map(|script| script.start(stack, &agent))).await?;
    let follow = try_join_all(started.iter().map(|session| follow(stack, session)));
    let disturb = async {
        // Turns are under way, most of them.
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let long = faults.iter().any(|fault| matches!(fault.how, How::Pause(time) if time >= Duration::from_secs(10)));
        let injections = if long { 1 } else { plan.injections };
        for injection in 0..injections {
            let fault = faults.get(rng.usize(..faults.len())).context("no faults")?;
            inject(stack, fault, &mut rng).await.with_context(|| format!("injection {injection}: {}", fault.name))?;
            let rest = plan.seconds * 1000 / (injections as u64 + 1);
            tokio::time::sleep(Duration::from_millis(rng.u64(rest / 2..=rest))).await;
        }
        Ok::<_, anyhow::Error>(injections)
    };
    let (followed, disturbed) = tokio::join!(follow, disturb);
    let injected = disturbed?;
    let mut outcome = Outcome {
        fault: name,
        injected,
        sessions: plan.sessions,
        lines: 0,
        lost: 0,
        doubled: 0,
        failed: 0,
        worst_pause: Duration::ZERO,
        wrong: Vec::new(),
    };
    let may_repeat = faults.iter().any(|fault| fault.how == How::LoseStreams);
    for ((session, script), live) in started.iter().zip(&scripts).zip(followed?) {
        judge(stack, session, script, live, may_repeat, &mut outcome).await.with_context(|| format!("session {session}"))?;
    }
    Ok(outcome)
}

/// A program that prints numbered lines of varied size at varied speed, and exits with a code of its own.
struct Script {
    text: String,
    lines: usize,
    code: i64,
}

impl Script {
    fn new(rng: &mut Rng, seconds: u64) -> Self {
        let pause_ms = rng.u64(5..60);
        let lines = usize::try_from(seconds * 1000 / (pause_ms + 1)).unwrap_or(1);
        let (width, code, seed) = (rng.usize(1..400), i64::from(rng.u8(0..100)), rng.u32(..));
        let text = format!(
            "exec perl -e '$|=1; srand({seed}); for $i (1..{lines}) {{ print \"$i \", \"x\" x int(rand({width})), \"\\n\"; select(undef, undef, undef, rand({}) / 1000) }} exit {code}'",
            pause_ms * 2
        );
        Self { text, lines, code }
    }

    /// Starts the session, however often that takes; an idempotency key keeps it one.
    async fn start(&self, stack: &Stack, agent: &str) -> Result<String> {
        let answer = stack.post("/sessions", json!({ "agent_id": agent, "prompt": self.text, "timeout": 300 })).await?;
        ensure!(answer.status == 202, "{answer:?}");
        Ok(answer.text("id").to_owned())
    }
}

async fn inject(stack: &Stack, fault: &Fault, rng: &mut Rng) -> Result<()> {
    let mut pids: Vec<u32> = fault.services.iter().flat_map(|service| stack.pids(service)).collect();
    ensure!(!pids.is_empty(), "{:?} do not run", fault.services);
    // Of several runners, one; and now and then all.
    if fault.services == ["sprite-runner"] && rng.u8(..3) > 0 {
        pids = vec![pids[rng.usize(..pids.len())]];
    }
    match fault.how {
        How::Signal(signal) => Stack::signal(&pids, signal),
        How::Pause(time) => {
            Stack::signal(&pids, Signal::STOP);
            tokio::time::sleep(time).await;
            Stack::signal(&pids, Signal::CONT);
        }
        How::LoseStreams => {
            // Stopped first, so that it is not up again before its files are gone.
            Stack::signal(&pids, Signal::STOP);
            std::fs::remove_dir_all(stack.data_dir().join("nats/store"))?;
            Stack::signal(&pids, Signal::KILL);
        }
    }
    Ok(())
}

/// What a stream showed that was open throughout, by reconnecting.
struct Followed {
    stdout: String,
    end: Value,
    ids: Vec<u64>,
    worst_pause: Duration,
    connections: usize,
}

async fn follow(stack: &Stack, session: &str) -> Result<Followed> {
    let mut followed = Followed { stdout: String::new(), end: Value::Null, ids: Vec::new(), worst_pause: Duration::ZERO, connections: 0 };
    let begun = Instant::now();
    let mut last_output = None;
    while begun.elapsed() < Duration::from_secs(400) {
        let since = followed.ids.last().copied().unwrap_or_default();
        followed.connections += 1;
        if let Ok(mut events) = stack.stream(session, since).await {
            while let Ok(Some(event)) = events.next().await {
                let kind = event["type"].as_str().unwrap_or_default();
                if let (Some(id), true) = (event["id"].as_u64(), kind != "turn_start" && kind != "stale") {
                    followed.ids.push(id);
                }
                if kind == "output" && event["stream"] == "stdout" {
                    followed.stdout.push_str(event["data"].as_str().unwrap_or_default());
                    let now = Instant::now();
                    if let Some(last) = last_output.replace(now) {
                        followed.worst_pause = followed.worst_pause.max(now - last);
                    }
                }
                if matches!(kind, "exit" | "error" | "terminated") {
                    followed.end = event;
                    return Ok(followed);
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    bail!("session {session} did not end: {:?}", stack.get(&format!("/sessions/{session}")).await.map(|answer| answer.body))
}

async fn judge(stack: &Stack, session: &str, script: &Script, live: Followed, may_repeat: bool, outcome: &mut Outcome) -> Result<()> {
    let mut wrong = Vec::new();
    outcome.worst_pause = outcome.worst_pause.max(live.worst_pause);
    let failed = live.end["type"] != "exit" || live.end["code"] != script.code;
    if failed {
        outcome.failed += 1;
        wrong.push(format!("ended with {} and not with exit code {}", live.end, script.code));
    }
    if !live.ids.is_sorted_by(|one, next| one < next) {
        wrong.push("ids do not grow".to_owned());
    }
    let replay = stack.stream(session, 0).await?.all().await?;
    let replayed: String = replay.iter().filter(|event| event["stream"] == "stdout").filter_map(|event| event["data"].as_str()).collect();
    // What was shown and not yet recorded when the store was lost is shown again: the record alone is what counts.
    let shown = if may_repeat { &replayed } else { &live.stdout };
    if replayed != *shown {
        wrong.push(format!("the replay has {} bytes of output, the open stream had {}", replayed.len(), live.stdout.len()));
    }
    let mut times: BTreeMap<usize, usize> = BTreeMap::new();
    for line in shown.lines() {
        if let Some(number) = line.split(' ').next().and_then(|number| number.parse().ok()) {
            *times.entry(number).or_default() += 1;
        }
    }
    let printed = if failed { times.len() } else { script.lines };
    let (lost, doubled) = (printed.saturating_sub(times.len()), times.values().filter(|times| **times > 1).count());
    outcome.lines += times.len();
    outcome.lost += lost;
    outcome.doubled += doubled;
    if lost > 0 || doubled > 0 {
        let missing: Vec<usize> = (1..=printed).filter(|number| !times.contains_key(number)).take(5).collect();
        wrong.push(format!("{lost} lines lost (first {missing:?}), {doubled} doubled"));
    }
    if !failed {
        let spool = spool(stack, session).await?;
        if spool != replayed {
            wrong.push(format!("the spool holds {} bytes, the replay {}", spool.len(), replayed.len()));
        }
    }
    let state = stack.get(&format!("/sessions/{session}")).await?;
    let expected = if script.code == 0 { "completed" } else { "failed" };
    if !failed && (state.text("status"), state.body["exit_code"].as_i64()) != (expected, Some(script.code)) {
        wrong.push(format!("its state is {}", state.body));
    }
    outcome.wrong.extend(wrong.into_iter().map(|wrong| format!("session {session} ({} connections): {wrong}", live.connections)));
    stack.call(Method::DELETE, &format!("/sessions/{session}/delete"), None).await?;
    Ok(())
}

/// The agent's own file, in its sandbox.
async fn spool(stack: &Stack, session: &str) -> Result<String> {
    let base = format!("{}/v1/sprites", stack.ready_text("/sprites_url"));
    let token = stack.ready_text("/sprites_token");
    let get = async |path: &str, query: &[(&str, &str)]| -> reqwest::Result<String> {
        let request = stack.http.get(format!("{base}{path}")).query(query).bearer_auth(&token);
        request.send().await?.error_for_status()?.text().await
    };
    let tail = session.replace('-', "").split_off(12);
    let list: Value = serde_json::from_str(&get("", &[("max_results", "1000")]).await?)?;
    let names = list["sprites"].as_array().into_iter().flatten().filter_map(|sprite| sprite["name"].as_str());
    let name = names.into_iter().find(|name| name.ends_with(&tail)).context("the session has no sandbox")?.to_owned();
    let file = "/home/sprite/.aod/turn-1/stdout";
    Ok(get(&format!("/{name}/fs/read"), &[("path", file), ("workingDir", "/")]).await?)
}
