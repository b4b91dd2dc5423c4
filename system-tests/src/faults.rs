//! The promise under attack: sessions print numbered lines while parts of the stack are killed,
//! stopped, paused and restarted. Then what was streamed, what is replayed and what the agent wrote
//! are compared.

use std::{fmt, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use fastrand::Rng;
use futures::future::try_join_all;
use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    Options, Stack, idle,
    lines::{Counted, OWN_COPY, Program},
    reader::{Reader, Route},
};

/// One way to disturb the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    pub name: &'static str,
    services: &'static [&'static str],
    how: How,
    /// The time limit of the turns that are disturbed, in seconds.
    timeout: u32,
    before: Before,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Signal(Signal),
    /// Stopped for a while, with all child processes, then continued.
    Pause(Duration),
    /// Killed, and all that the streams hold is gone.
    LoseStreams,
    /// Killed, and the streams come back as they were a while ago.
    SetStreamsBack,
    /// The connection over which events are projected hangs: its server process is stopped for a
    /// while, and nothing else.
    HangProjector(Duration),
    /// Every unsettled turn gets a second job.
    SecondJobs,
    /// Signalled again and again, in turn, as by one deployment after another.
    SignalOften(Signal),
    /// Killed while so many other sessions, which wait and print nothing, are followed as well.
    KillBesideFollowed(usize),
}

/// What comes before the agent in the sessions that are disturbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    Nothing,
    /// A set-up script that takes some seconds and fails where it is run twice.
    SetUp,
}

const fn kill(name: &'static str, services: &'static [&'static str]) -> Fault {
    Fault { name, services, how: How::Signal(Signal::KILL), timeout: 300, before: Before::Nothing }
}

const fn stop(name: &'static str, services: &'static [&'static str]) -> Fault {
    Fault { how: How::Signal(Signal::TERM), ..kill(name, services) }
}

const fn pause(name: &'static str, services: &'static [&'static str], seconds: u64) -> Fault {
    Fault { how: How::Pause(Duration::from_secs(seconds)), ..kill(name, services) }
}

/// Every fault that the suite knows.
pub const FAULTS: &[Fault] = &[
    kill("runner killed", &["sprite-runner"]),
    stop("runner stopped", &["sprite-runner"]),
    pause("runner paused past its lease", &["sprite-runner"], 4),
    Fault {
        how: How::SignalOften(Signal::TERM),
        before: Before::SetUp,
        ..kill("runners restarted during set-up", &["sprite-runner"])
    },
    Fault { before: Before::SetUp, ..kill("runners killed during set-up", &["sprite-runner"]) },
    kill("scheduler killed", &["scheduler"]),
    // Killed all together: the projectors restart while 1,500 sessions are followed.
    Fault {
        how: How::KillBesideFollowed(1500),
        ..kill("schedulers killed, 1500 followed", &["scheduler"])
    },
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
    // Longer than the turns' time limit and the grace after it: they end meanwhile, and nothing of
    // that reaches Postgres.
    Fault { timeout: 12, ..pause("Postgres away past deadlines", &["postgres"], 90) },
    Fault {
        how: How::HangProjector(Duration::from_secs(15)),
        ..kill("the projector's connection hangs", &["postgres"])
    },
    kill("local-sprites killed", &["local-sprites"]),
    stop("local-sprites stopped", &["local-sprites"]),
    Fault { how: How::LoseStreams, ..kill("the JetStream store lost", &["nats"]) },
    // A scheduler then starts on an empty store.
    Fault {
        how: How::LoseStreams,
        ..kill("the store and schedulers lost", &["nats", "scheduler"])
    },
    Fault { how: How::SetStreamsBack, ..kill("the JetStream store set back", &["nats"]) },
    Fault { how: How::SecondJobs, ..kill("two jobs for each turn", &["postgres"]) },
];

/// The faults after which nothing at all may be lost, doubled or failed; without those that take
/// long.
#[must_use]
pub fn harmless() -> Vec<Fault> {
    let harmless = |fault: &&Fault| match fault.how {
        How::LoseStreams
        | How::SetStreamsBack
        | How::HangProjector(_)
        | How::KillBesideFollowed(_) => false,
        How::Pause(time) => time < Duration::from_secs(10),
        How::Signal(_) | How::SecondJobs => fault.before == Before::Nothing,
        How::SignalOften(_) => false,
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

    pub const HEADER: &'static str = "fault                             injected  sessions    lines  lost  doubled  failed  worst pause";
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:<32} {:>9} {:>9} {:>8} {:>5} {:>8} {:>7} {:>10.2} s",
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

/// For attacks: two of everything, and what dies is started again.
pub const OPTIONS: Options = Options {
    scripted_model: false,
    runners: 2,
    replicas: 2,
    nats_servers: 1,
    no_restart: false,
    // Idle sessions that are followed count as active ones.
    settings: &[("DEFAULT_MAX_CONCURRENT_SESSIONS", "5000")],
};

/// A stack for attacks.
///
/// # Errors
/// When it does not start.
pub async fn stack() -> Result<Stack> {
    Stack::start(OPTIONS).await
}

/// Longer than any turn takes: its time limit, and the grace after it.
pub(crate) const TURN_MAX: Duration = Duration::from_secs(400);

/// Runs sessions, disturbs them, and judges what became of them.
///
/// # Errors
/// When the attack itself cannot be carried out.
pub async fn attack(
    stack: &Stack,
    faults: &[Fault],
    name: &'static str,
    plan: Plan,
) -> Result<Outcome> {
    let mut rng = Rng::with_seed(plan.seed);
    let programs: Vec<Program> = (0..plan.sessions)
        .map(|_| {
            let code = rng.u8(0..100).into();
            Program::new(&mut rng, 1, plan.seconds, code)
        })
        .collect();
    let agent = stack.agent("shell").await?;
    let timeout = faults.iter().map(|fault| fault.timeout).min().unwrap_or(300);
    let environment = match faults.iter().find(|fault| fault.before == Before::SetUp) {
        Some(_) => Some(environment_with_a_slow_script(stack).await?),
        None => None,
    };
    let followed = faults
        .iter()
        .map(|fault| if let How::KillBesideFollowed(number) = fault.how { number } else { 0 })
        .max();
    let idle = idle::follow(stack, &agent, followed.unwrap_or_default()).await?;
    let started = try_join_all(
        programs
            .iter()
            .map(|program| start(stack, program, &agent, environment.as_deref(), timeout)),
    )
    .await?;
    let follow = try_join_all(started.iter().map(|session| follow(stack, session)));
    let disturb = async {
        // Turns are under way, most of them.
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let long =
            faults.iter().any(|fault| matches!(fault.how, How::Pause(time) | How::HangProjector(time) if time >= Duration::from_secs(10)));
        let injections = if long { 1 } else { plan.injections };
        for injection in 0..injections {
            let fault = faults.get(rng.usize(..faults.len())).context("no faults")?;
            inject(stack, fault, &mut rng)
                .await
                .with_context(|| format!("injection {injection}: {}", fault.name))?;
            let rest = plan.seconds * 1000 / (injections as u64 + 1);
            tokio::time::sleep(Duration::from_millis(rng.u64(rest / 2..=rest))).await;
        }
        Ok::<_, anyhow::Error>(injections)
    };
    let (followed, disturbed) = tokio::join!(follow, disturb);
    let injected = disturbed?;
    drop(idle);
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
    let may_repeat =
        faults.iter().any(|fault| matches!(fault.how, How::LoseStreams | How::SetStreamsBack));
    for ((session, program), (live, end)) in started.iter().zip(&programs).zip(followed?) {
        judge(stack, session, program, &live, &end, may_repeat, &mut outcome)
            .await
            .with_context(|| format!("session {session}"))?;
    }
    Ok(outcome)
}

/// Starts a session that runs this program; its id.
async fn start(
    stack: &Stack,
    program: &Program,
    agent: &str,
    environment: Option<&str>,
    timeout: u32,
) -> Result<String> {
    let body = json!({ "agent_id": agent, "environment_id": environment, "prompt": program.text, "timeout": timeout });
    let answer = stack.post("/sessions", body).await?;
    ensure!(answer.status == 202, "{answer:?}");
    Ok(answer.text("id").to_owned())
}

/// Disturbs a stack once.
///
/// # Errors
/// When that cannot be done, such as when a service does not run.
pub(crate) async fn inject(stack: &Stack, fault: &Fault, rng: &mut Rng) -> Result<()> {
    let mut pids: Vec<u32> =
        fault.services.iter().flat_map(|service| stack.pids(service)).collect();
    ensure!(!pids.is_empty(), "{:?} do not run", fault.services);
    // Of several runners, one; and now and then all.
    if fault.services == ["sprite-runner"] && rng.u8(..3) > 0 {
        pids = vec![pids[rng.usize(..pids.len())]];
    }
    match fault.how {
        How::Signal(signal) => Stack::signal(&pids, signal),
        How::KillBesideFollowed(_) => Stack::signal(&pids, Signal::KILL),
        How::SignalOften(signal) => {
            for _ in 0..3 {
                for service in fault.services {
                    for pid in stack.pids(service) {
                        Stack::signal(&[pid], signal);
                        tokio::time::sleep(Duration::from_millis(700)).await;
                    }
                }
            }
        }
        How::Pause(time) => {
            // Postgres works in child processes: stopping the first one alone would stop new
            // connections only.
            let tree: Vec<u32> = pids.iter().flat_map(|pid| with_children(*pid)).collect();
            Stack::signal(&tree, Signal::STOP);
            tokio::time::sleep(time).await;
            Stack::signal(&tree, Signal::CONT);
        }
        How::LoseStreams => {
            // Stopped first, so that nothing is up again before the files are gone.
            Stack::signal(&pids, Signal::STOP);
            std::fs::remove_dir_all(stack.data_dir().join("nats/store"))?;
            Stack::signal(&pids, Signal::KILL);
        }
        How::SetStreamsBack => {
            let (store, copy) =
                (stack.data_dir().join("nats/store"), stack.data_dir().join("nats/copy"));
            Stack::signal(&pids, Signal::STOP);
            run(Command::new("cp").arg("--archive").arg(&store).arg(&copy))?;
            Stack::signal(&pids, Signal::CONT);
            tokio::time::sleep(SET_BACK).await;
            Stack::signal(&pids, Signal::STOP);
            std::fs::remove_dir_all(&store)?;
            std::fs::rename(&copy, &store)?;
            Stack::signal(&pids, Signal::KILL);
        }
        How::HangProjector(time) => {
            let statement = "select pid from pg_stat_activity where application_name like 'scheduler projector%'";
            let hung: Vec<u32> =
                sql(stack, statement)?.lines().filter_map(|pid| pid.parse().ok()).collect();
            ensure!(!hung.is_empty(), "no connection of a projector is found");
            Stack::signal(&hung, Signal::STOP);
            tokio::time::sleep(time).await;
            Stack::signal(&hung, Signal::CONT);
        }
        How::SecondJobs => {
            // A message RunTurn, written by hand: the session's id in field 1, the turn in field 2.
            sql(
                stack,
                "insert into scheduler.outbox (outbox_id, subject, payload)
                 select gen_random_uuid(), 'aod.cmd.runner.v1.turn.run.' || session_id,
                        decode('0a24', 'hex') || convert_to(session_id::text, 'UTF8') || decode('1001', 'hex')
                 from scheduler.turn where status in ('pending', 'running')",
            )?;
        }
    }
    Ok(())
}

/// An environment whose script leaves a mark, and fails where it finds one.
async fn environment_with_a_slow_script(stack: &Stack) -> Result<String> {
    let script =
        "set -e; mkdir /home/sprite/once; for i in 1 2 3 4 5 6 7; do echo set-up $i; sleep 1; done";
    let body = json!({ "name": types::SessionId::new().to_string(), "setup_script": script });
    let answer = stack.post("/environments", body).await?;
    ensure!(answer.status == 201, "{answer:?}");
    Ok(answer.text("id").to_owned())
}

/// How far the streams are set back.
const SET_BACK: Duration = Duration::from_secs(2);

/// A process and its children.
pub(crate) fn with_children(pid: u32) -> Vec<u32> {
    let children =
        std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    std::iter::once(pid)
        .chain(children.split_whitespace().filter_map(|child| child.parse().ok()))
        .collect()
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// Runs a statement in the stack's database, as its owner.
pub(crate) fn sql(stack: &Stack, statement: &str) -> Result<String> {
    let url = stack.ready_text("/database_url");
    run(Command::new("psql").args([
        "--no-psqlrc",
        "--tuples-only",
        "--no-align",
        "--set",
        "ON_ERROR_STOP=1",
        "--command",
        statement,
        &url,
    ]))
}

/// Follows a stream to its end; the reader, and the end.
async fn follow<'a>(stack: &'a Stack, session: &'a str) -> Result<(Reader<'a>, Value)> {
    let mut reader = Reader::new(stack, session, Route::Output);
    let end = reader.read_to_end_of(1, TURN_MAX).await?;
    Ok((reader, end))
}

async fn judge(
    stack: &Stack,
    session: &str,
    program: &Program,
    live: &Reader<'_>,
    end: &Value,
    may_repeat: bool,
    outcome: &mut Outcome,
) -> Result<()> {
    let mut wrong = Vec::new();
    outcome.worst_pause = outcome.worst_pause.max(live.worst_pause);
    let failed = end["type"] != "exit" || end["code"] != program.code;
    if failed {
        outcome.failed += 1;
        wrong.push(format!("ended with {end} and not with exit code {}", program.code));
    }
    if !live.ids_ascend() {
        wrong.push("ids do not grow".to_owned());
    }
    let replay = stack.stream(session, 0).await?.all().await?;
    let replayed: String = replay
        .iter()
        .filter(|event| event["stream"] == "stdout")
        .filter_map(|event| event["data"].as_str())
        .collect();
    // What was shown and not yet recorded when the store was lost is shown again: the record alone
    // is what counts.
    let shown = if may_repeat { &replayed } else { &live.stdout };
    if replayed != *shown {
        wrong.push(format!(
            "the replay has {} bytes of output, the open stream had {}",
            replayed.len(),
            live.stdout.len()
        ));
    }
    let counted = Counted::of(shown);
    let (missing, doubled) =
        (counted.missing(if failed { 0..0 } else { program.numbers.clone() }), counted.doubled());
    outcome.lines += counted.lines();
    outcome.lost += missing.len();
    outcome.doubled += doubled;
    if !missing.is_empty() || doubled > 0 {
        let first: Vec<_> = missing.iter().take(5).collect();
        wrong.push(format!("{} lines lost (first {first:?}), {doubled} doubled", missing.len()));
    }
    if !failed {
        let written = file_in_sandbox(stack, session, OWN_COPY).await?;
        if written != replayed {
            wrong.push(format!(
                "the agent wrote {} bytes, the replay has {}",
                written.len(),
                replayed.len()
            ));
        }
    }
    let state = stack.get(&format!("/sessions/{session}")).await?;
    let expected = if program.code == 0 { "completed" } else { "failed" };
    if !failed
        && (state.text("status"), state.body["exit_code"].as_i64())
            != (expected, Some(program.code))
    {
        wrong.push(format!("its state is {}", state.body));
    }
    outcome.wrong.extend(
        wrong
            .into_iter()
            .map(|wrong| format!("session {session} ({} connections): {wrong}", live.connections)),
    );
    stack.call(Method::DELETE, &format!("/sessions/{session}/delete"), None).await?;
    Ok(())
}

/// What a file of a session's sandbox holds.
///
/// # Errors
/// When there is no such file.
pub async fn file_in_sandbox(stack: &Stack, session: &str, path: &str) -> Result<String> {
    let base = format!("{}/v1/sprites", stack.ready_text("/sprites_url"));
    let token = stack.ready_text("/sprites_token");
    let get = async |path: &str, query: &[(&str, &str)]| -> reqwest::Result<String> {
        let request = stack.http.get(format!("{base}{path}")).query(query).bearer_auth(&token);
        request.send().await?.error_for_status()?.text().await
    };
    let tail = session.replace('-', "").split_off(12);
    let list: Value = serde_json::from_str(&get("", &[("max_results", "1000")]).await?)?;
    let names = list["sprites"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|sprite| sprite["name"].as_str());
    let name = names
        .into_iter()
        .find(|name| name.ends_with(&tail))
        .context("the session has no sandbox")?
        .to_owned();
    Ok(get(&format!("/{name}/fs/read"), &[("path", path), ("workingDir", "/")]).await?)
}
