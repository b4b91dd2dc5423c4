//! A realistic mix for hours: sessions with every runtime, follow-up prompts, interrupts,
//! permission requests and readers that reconnect, while a fault strikes every minute. Every event
//! is checked, and the processes are watched.

mod compare;
mod conversation;
mod plot;
mod usage;

use std::{
    collections::BTreeMap,
    fmt, fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use compare::Differences;
use fastrand::Rng;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};
pub use usage::ServiceUsage;
use usage::Usage;

use crate::{Options, RUNTIMES, Stack, Stuck, faults};

/// Conversations that are open when the time is over may take so long to end.
const DRAIN_MAX: Duration = Duration::from_secs(600);
const SAMPLES: u32 = 1000;
const SAMPLE_EVERY_MIN: Duration = Duration::from_secs(5);
const TROUBLES_MAX: usize = 200;
/// Of each log of a run that failed, from its end.
const LOG_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub time: Duration,
    /// Sessions at a time.
    pub sessions: usize,
    /// How many of them run an agent CLI; the others run a shell.
    pub agents: usize,
    /// None: no faults.
    pub fault_every: Option<Duration>,
    /// Where the logs of a run that failed are copied.
    pub logs: PathBuf,
}

/// What was done and seen so far.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub sessions: usize,
    /// By runtime.
    pub turns: BTreeMap<&'static str, usize>,
    pub queued: usize,
    pub interrupts: usize,
    pub decisions: usize,
    pub terminated: usize,
    /// Numbered lines that arrived.
    pub lines: usize,
    /// Persisted events.
    pub events: usize,
    /// Events that readers were shown, each compared with the log.
    pub shown: usize,
    pub connections: usize,
    differences: Differences,
    /// Turns that ended otherwise than planned, and requests that were refused.
    pub failed: usize,
    /// Turns, readers and requests that did not end.
    pub stuck: usize,
    pub worst_pause: Duration,
    /// What was wrong, in words.
    pub wrong: Vec<String>,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.sessions += other.sessions;
        for (runtime, turns) in other.turns {
            *self.turns.entry(runtime).or_default() += turns;
        }
        self.queued += other.queued;
        self.interrupts += other.interrupts;
        self.decisions += other.decisions;
        self.terminated += other.terminated;
        self.lines += other.lines;
        self.events += other.events;
        self.shown += other.shown;
        self.connections += other.connections;
        self.differences += other.differences;
        self.failed += other.failed;
        self.stuck += other.stuck;
        self.worst_pause = self.worst_pause.max(other.worst_pause);
        let room = TROUBLES_MAX.saturating_sub(self.wrong.len());
        self.wrong.extend(other.wrong.into_iter().take(room));
    }

    /// Whether nothing was lost, doubled, altered, stuck or failed.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.differences == Differences::default()
            && self.failed == 0
            && self.stuck == 0
            && self.wrong.is_empty()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Differences { lost, doubled, altered } = self.differences;
        let turns: usize = self.turns.values().sum();
        write!(
            f,
            "{} sessions, {turns} turns, {} events shown: {lost} lost, {doubled} doubled, {altered} altered, {} failed, {} stuck",
            self.sessions, self.shown, self.failed, self.stuck
        )
    }
}

/// What a run showed.
#[derive(Debug)]
pub struct Outcome {
    pub plan: Plan,
    pub time: Duration,
    /// Whether it was stopped before its time.
    pub is_cut_short: bool,
    pub tally: Tally,
    /// When each fault struck, in seconds since the beginning.
    pub faults: Vec<(f64, &'static str)>,
    pub services: Vec<ServiceUsage>,
    usage: Usage,
}

impl Outcome {
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.tally.is_good() && !self.services.iter().any(ServiceUsage::grows)
    }

    #[must_use]
    pub fn json(&self) -> Value {
        let Differences { lost, doubled, altered } = self.tally.differences;
        let mut faults: BTreeMap<&str, usize> = BTreeMap::new();
        for (_, name) in &self.faults {
            *faults.entry(name).or_default() += 1;
        }
        json!({
            "is_good": self.is_good(),
            "is_cut_short": self.is_cut_short,
            "seed": self.plan.seed,
            "seconds": self.time.as_secs(),
            "sessions_at_a_time": self.plan.sessions,
            "agents_at_a_time": self.plan.agents,
            "sessions": self.tally.sessions,
            "turns": self.tally.turns,
            "queued_prompts": self.tally.queued,
            "interrupts": self.tally.interrupts,
            "decisions": self.tally.decisions,
            "terminated": self.tally.terminated,
            "lines": self.tally.lines,
            "events": self.tally.events,
            "events_shown": self.tally.shown,
            "connections": self.tally.connections,
            "lost": lost,
            "doubled": doubled,
            "altered": altered,
            "failed": self.tally.failed,
            "stuck": self.tally.stuck,
            "worst_pause_seconds": self.tally.worst_pause.as_secs_f64(),
            "wrong": self.tally.wrong,
            "faults": faults,
            "services": self.services.iter().map(ServiceUsage::json).collect::<Vec<_>>(),
            "processes": self.usage.json(),
        })
    }

    /// Memory and descriptors over time.
    #[must_use]
    pub fn svg(&self) -> String {
        plot::svg(&self.usage.0, &self.faults, self.time.as_secs_f64())
    }
}

/// The ids of the agents that sessions run.
struct Agents {
    shell: String,
    /// By runtime, as in `RUNTIMES`.
    plain: Vec<String>,
    /// The same, which ask before they use their shell.
    asking: Vec<String>,
}

impl Agents {
    async fn create(stack: &Stack) -> Result<Self> {
        let create = async |runtime: &str, model: &str, permissions: Value| {
            let body = json!({ "name": "soak", "model": model, "runtime": runtime, "permissions": permissions });
            let answer = stack.insist(Method::POST, "/agents", Some(body)).await?;
            ensure!(answer.status == 201, "{answer:?}");
            anyhow::Ok(answer.text("id").to_owned())
        };
        let (mut plain, mut asking) = (Vec::new(), Vec::new());
        for (runtime, model, shell, _) in RUNTIMES {
            plain.push(create(runtime, model, Value::Null).await?);
            asking.push(
                create(
                    runtime,
                    model,
                    json!({ "rules": [{ "tool": shell, "evaluation": "ask" }] }),
                )
                .await?,
            );
        }
        Ok(Self { shell: stack.agent("shell").await?, plain, asking })
    }
}

struct Soak {
    stack: Stack,
    agents: Agents,
    begun: Instant,
    until: Instant,
    tally: Mutex<Tally>,
    faults: Mutex<Vec<(f64, &'static str)>>,
    usage: Mutex<Usage>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the mix until its time is over or `stopped` is ready, and reports its progress every 30 s.
///
/// # Errors
/// When the stack does not start.
pub async fn run(
    plan: Plan,
    stopped: impl Future<Output = ()>,
    report: impl Fn(String),
) -> Result<Outcome> {
    let stack =
        Stack::start(Options { scripted_model: plan.agents > 0, ..faults::OPTIONS }).await?;
    let agents = Agents::create(&stack).await?;
    let begun = Instant::now();
    let (tally, struck, usage) = Default::default();
    let soak = Arc::new(Soak {
        stack,
        agents,
        begun,
        until: begun + plan.time,
        tally,
        faults: struck,
        usage,
    });
    let (mut rng, mut slots) = (Rng::with_seed(plan.seed), JoinSet::new());
    for number in 0..plan.sessions.max(plan.agents) {
        slots.spawn(soak.clone().slot((number < plan.agents).then_some(number), rng.fork()));
    }
    let ended = async { while slots.join_next().await.is_some() {} };
    let is_cut_short = tokio::select! {
        () = ended => false,
        () = soak.strike(plan.fault_every, rng, &report) => false,
        () = soak.watch(plan.time) => false,
        () = soak.tell(&report) => false,
        () = sleep_until(soak.until + DRAIN_MAX) => false,
        () = stopped => true,
    };
    let left = slots.len();
    slots.shutdown().await;
    let mut tally = lock(&soak.tally).clone();
    if !is_cut_short && left > 0 {
        tally.stuck += left;
        tally.wrong.push(format!("{left} conversations did not end within {DRAIN_MAX:?}"));
    }
    let (usage, faults) = (std::mem::take(&mut *lock(&soak.usage)), lock(&soak.faults).clone());
    let time = begun.elapsed();
    let services = usage.by_service(time.as_secs_f64());
    let outcome = Outcome { plan, time, is_cut_short, tally, faults, services, usage };
    if !outcome.is_good() {
        keep_logs(soak.stack.data_dir(), &outcome.plan.logs).context("keep the logs")?;
    }
    Ok(outcome)
}

impl Soak {
    fn seconds(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }

    /// Holds one conversation after the other; with the CLI of that number first, or with a shell.
    async fn slot(self: Arc<Self>, cli: Option<usize>, mut rng: Rng) {
        let mut number = cli.unwrap_or_default();
        while Instant::now() < self.until {
            sleep(Duration::from_millis(rng.u64(..3000))).await;
            let mut tally = Tally::default();
            let held = match cli {
                Some(_) => {
                    conversation::with_cli(&self.stack, &self.agents, number, &mut rng, &mut tally)
                        .await
                }
                None => {
                    conversation::with_shell(&self.stack, &self.agents, &mut rng, &mut tally).await
                }
            };
            number += 1;
            tally.sessions = 1;
            if let Err(error) = held {
                let is_stuck = error.downcast_ref::<Stuck>().is_some();
                *(if is_stuck { &mut tally.stuck } else { &mut tally.failed }) += 1;
                tally.wrong.push(format!("{error:#}"));
            }
            for wrong in &mut tally.wrong {
                *wrong = format!("after {:.0} s: {wrong}", self.seconds());
            }
            lock(&self.tally).add(tally);
        }
    }

    /// Injects one fault after the other, in random order, until the time is over. Never returns.
    async fn strike(&self, every: Option<Duration>, mut rng: Rng, report: &impl Fn(String)) {
        let mut left = Vec::new();
        while let Some(every) = every {
            sleep(every).await;
            if Instant::now() > self.until {
                break;
            }
            if left.is_empty() {
                left = faults::harmless();
                rng.shuffle(&mut left);
            }
            let Some(fault) = left.pop() else { break };
            lock(&self.faults).push((self.seconds(), fault.name));
            if let Err(error) = faults::inject(&self.stack, &fault, &mut rng).await {
                lock(&self.faults).pop();
                report(format!("not injected: {}: {error:#}", fault.name));
            }
        }
        std::future::pending().await
    }

    /// Samples the processes. Never returns.
    async fn watch(&self, time: Duration) {
        let every = (time / SAMPLES).max(SAMPLE_EVERY_MIN);
        loop {
            lock(&self.usage).sample(&self.stack, self.seconds());
            sleep(every).await;
        }
    }

    /// Never returns.
    async fn tell(&self, report: &impl Fn(String)) {
        loop {
            sleep(Duration::from_secs(30)).await;
            let seconds = self.begun.elapsed().as_secs();
            let (tally, faults) = (lock(&self.tally).to_string(), lock(&self.faults).clone());
            let last =
                faults.last().map(|(_, name)| format!(", the last: {name}")).unwrap_or_default();
            report(format!(
                "{:02}:{:02}:{:02}  {tally}; {} faults{last}",
                seconds / 3600,
                seconds / 60 % 60,
                seconds % 60,
                faults.len()
            ));
        }
    }
}

/// Copies the end of each log.
fn keep_logs(data: &Path, to: &Path) -> Result<()> {
    use std::io::{Read as _, Seek as _, SeekFrom};
    let _ = fs::remove_dir_all(to);
    fs::create_dir_all(to)?;
    let logs = fs::read_dir(data.join("logs"))?.flatten().map(|entry| entry.path());
    for path in logs.chain([data.join("dev.log")]).filter(|path| path.is_file()) {
        let mut file = fs::File::open(&path)?;
        let begin = file.metadata()?.len().saturating_sub(LOG_BYTES_MAX);
        file.seek(SeekFrom::Start(begin))?;
        let mut end = Vec::new();
        file.take(LOG_BYTES_MAX).read_to_end(&mut end)?;
        fs::write(to.join(path.file_name().unwrap_or_default()), end)?;
    }
    Ok(())
}
