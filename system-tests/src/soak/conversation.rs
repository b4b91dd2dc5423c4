//! Conversations as users have them, each judged when it has ended.

use std::{pin::pin, time::Duration};

use anyhow::{Result, ensure};
use fastrand::Rng;
use futures::future::{Either, select, try_join_all};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

use super::{Agents, Tally, compare::compare};
use crate::{
    RUNTIMES, Stack, Stuck,
    faults::{TURN_MAX, file_in_sandbox},
    lines::{Counted, OWN_COPY, Program},
    reader::{Reader, Route},
};

const TURNS_MAX: usize = 4;
/// How long a program prints, about.
const SECONDS: std::ops::RangeInclusive<u64> = 2..=15;
const POLL: Duration = Duration::from_millis(300);
/// A CLI needs seconds to start, and more on a busy machine.
const TIMEOUT_SECONDS: u32 = 300;
/// Lines that a CLI's command prints.
const COMMAND_LINES: usize = 30;
const REPLAY_MAX: Duration = Duration::from_secs(120);

/// What a user does while a turn runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Wait,
    /// Sends the next prompt already.
    Queue,
    Interrupt,
    Terminate,
}

struct Turn {
    prompt: String,
    action: Action,
    after: Duration,
    /// The exit code of a turn that is left alone.
    code: i64,
    told: Told,
}

/// What of a turn is checked.
enum Told {
    /// The numbered lines of a program.
    Lines(Program),
    /// What the agent says holds each of these once.
    Once(Vec<String>),
    /// What the agent says holds this.
    Text(String),
    Nothing,
}

/// What became of a conversation as a whole.
struct Driven {
    /// How many turns there were.
    turns: usize,
    is_terminated: bool,
    has_failed: bool,
    /// A command was denied: what the agent says then is not checked.
    was_denied: bool,
}

/// A conversation with a shell, whose programs print numbered lines.
pub(super) async fn with_shell(
    stack: &Stack,
    agents: &Agents,
    rng: &mut Rng,
    tally: &mut Tally,
) -> Result<()> {
    let (count, mut first) = (rng.usize(1..=TURNS_MAX), 1);
    let mut turns: Vec<Turn> = Vec::new();
    for number in 1..=count {
        let is_last = number == count;
        let code = if is_last && rng.u8(..4) == 0 { i64::from(rng.u8(1..100)) } else { 0 };
        let seconds = rng.u64(SECONDS);
        let program = Program::new(rng, first, seconds, code);
        first = program.numbers.end;
        let is_queued = turns.last().is_some_and(|turn| turn.action == Action::Queue);
        let action = match rng.u8(..10) {
            0 | 1 if !is_last => Action::Queue,
            0 if !is_queued => Action::Terminate,
            2 | 3 if !is_queued => Action::Interrupt,
            _ => Action::Wait,
        };
        let after = Duration::from_millis(rng.u64(300..seconds * 1000));
        turns.push(Turn {
            prompt: program.text.clone(),
            action,
            after,
            code,
            told: Told::Lines(program),
        });
    }
    hold(stack, "shell", &agents.shell, turns, rng, tally).await
}

/// A conversation with an agent CLI, which talks to the scripted model.
pub(super) async fn with_cli(
    stack: &Stack,
    agents: &Agents,
    runtime: usize,
    rng: &mut Rng,
    tally: &mut Tally,
) -> Result<()> {
    let number = runtime % RUNTIMES.len();
    let (name, ..) = RUNTIMES[number];
    let asks = rng.u8(..3) == 0;
    let agent = if asks { &agents.asking[number] } else { &agents.plain[number] };
    let count = rng.usize(2..=TURNS_MAX);
    let first_token = format!("soak{:08x}", rng.u32(..));
    let mut turns: Vec<Turn> = Vec::new();
    for number in 1..=count {
        let token =
            if number == 1 { first_token.clone() } else { format!("soak{:08x}", rng.u32(..)) };
        let is_queued = turns.last().is_some_and(|turn| turn.action == Action::Queue);
        // The first one is what later ones are asked about.
        let kind = if number == 1 { rng.u8(..6) } else { rng.u8(..10) };
        let (prompt, told, mut action) = match kind {
            0..=3 => {
                let told = (1..=COMMAND_LINES).map(|line| format!("{token} {line}.")).collect();
                (
                    format!("run: seq -f '{token} %g.' 1 {COMMAND_LINES}; sleep 1"),
                    Told::Once(told),
                    Action::Wait,
                )
            }
            4 | 5 => (format!("hello {token}"), Told::Text(token), Action::Wait),
            6 | 7 => (
                "what was my first message?".to_owned(),
                Told::Text(first_token.clone()),
                Action::Wait,
            ),
            _ if is_queued => ("slowly".to_owned(), Told::Nothing, Action::Wait),
            _ => ("slowly".to_owned(), Told::Nothing, Action::Interrupt),
        };
        if number < count && action == Action::Wait && rng.u8(..5) == 0 {
            action = Action::Queue;
        }
        turns.push(Turn {
            prompt,
            action,
            after: Duration::from_millis(rng.u64(300..6000)),
            code: 0,
            told,
        });
    }
    hold(stack, name, agent, turns, rng, tally).await
}

async fn hold(
    stack: &Stack,
    runtime: &'static str,
    agent: &str,
    turns: Vec<Turn>,
    rng: &mut Rng,
    tally: &mut Tally,
) -> Result<()> {
    let first = turns.first().map(|turn| turn.prompt.as_str()).unwrap_or_default();
    let body = json!({ "agent_id": agent, "prompt": first, "timeout": TIMEOUT_SECONDS });
    let created = stack.insist(Method::POST, "/sessions", Some(body)).await?;
    ensure!(created.status == 202, "{created:?}");
    let session = created.text("id").to_owned();
    let held = hold_in(stack, runtime, &session, &turns, rng, tally)
        .await
        .map_err(|error| error.context(format!("{runtime} {session}")));
    if held.is_err() {
        // It does not burden those that follow.
        let _ = stack.insist(Method::POST, &format!("/sessions/{session}/terminate"), None).await;
    }
    let deleted =
        stack.insist(Method::DELETE, &format!("/sessions/{session}/delete"), None).await?;
    ensure!(
        held.is_err() || matches!(deleted.status, 200 | 404),
        "{runtime} {session} is not deleted: {deleted:?}"
    );
    held
}

async fn hold_in(
    stack: &Stack,
    runtime: &'static str,
    session: &str,
    turns: &[Turn],
    rng: &mut Rng,
    tally: &mut Tally,
) -> Result<()> {
    let mut readers = vec![
        Reader::new(stack, session, Route::Output),
        Reader::new(stack, session, Route::Output).restless(rng.fork()),
        Reader::new(stack, session, Route::Typed).restless(rng.fork()),
    ];
    let last = turns.len() as u64;
    let read = try_join_all(
        readers
            .iter_mut()
            .map(|reader| reader.read_to_end_of(last, TURN_MAX * 2 * (TURNS_MAX as u32))),
    );
    let driven =
        match select(pin!(drive(stack, runtime, session, turns, rng, tally)), pin!(read)).await {
            Either::Left((driven, read)) => {
                let driven = driven?;
                let read = timeout(REPLAY_MAX, read).await;
                read.map_err(|_| {
                    Stuck(format!("a reader sees no end {REPLAY_MAX:?} after the last turn"))
                })??;
                driven
            }
            Either::Right((read, drive)) => {
                read?;
                drive.await?
            }
        };

    let mut log = Reader::new(stack, session, Route::Output);
    log.read_to_end_of(last, REPLAY_MAX).await?;
    let mut typed = Reader::new(stack, session, Route::Typed);
    typed.read_pages().await?;
    tally.events += log.seen.len() + typed.seen.len();
    for reader in &readers {
        tally.shown += reader.seen.len();
        tally.connections += reader.connections;
        let of_route = if reader.route() == Route::Output { &log } else { &typed };
        let mut differences = compare(&of_route.seen, &reader.seen);
        if reader.stdout != of_route.stdout && differences == Default::default() {
            differences.altered += 1;
        }
        if differences != Default::default() {
            let reader = format!("{:?} reader, {} connections", reader.route(), reader.connections);
            tally.wrong.push(format!("{runtime} {session}: {reader}: {differences:?}"));
        }
        tally.differences += differences;
    }
    if runtime == "shell" {
        // Programs print all the time; the first reader stays connected while it can.
        let steady = readers.first().map(|reader| reader.worst_pause);
        tally.worst_pause = tally.worst_pause.max(steady.unwrap_or_default());
        judge_lines(stack, session, turns, &driven, &log, tally).await
    } else {
        judge_what_was_said(runtime, session, turns, &driven, &typed, tally);
        Ok(())
    }
}

/// Sends prompts, interrupts and answers as planned.
async fn drive(
    stack: &Stack,
    runtime: &'static str,
    session: &str,
    turns: &[Turn],
    rng: &mut Rng,
    tally: &mut Tally,
) -> Result<Driven> {
    let path = format!("/sessions/{session}");
    let mut driven =
        Driven { turns: 0, is_terminated: false, has_failed: false, was_denied: false };
    let mut is_sent = true;
    for (number, turn) in turns.iter().enumerate() {
        if !is_sent {
            let body = json!({ "prompt": turn.prompt, "timeout": TIMEOUT_SECONDS });
            let answer = stack.insist(Method::POST, &format!("{path}/prompt"), Some(body)).await?;
            ensure!(answer.status == 202, "prompt: {answer:?}");
        }
        driven.turns += 1;
        *tally.turns.entry(runtime).or_default() += 1;
        is_sent = false;
        match turn.action {
            Action::Wait => {}
            Action::Queue => {
                sleep(turn.after).await;
                let next =
                    turns.get(number + 1).map(|turn| turn.prompt.as_str()).unwrap_or_default();
                let body =
                    json!({ "prompt": next, "timeout": TIMEOUT_SECONDS, "when_busy": "queue" });
                let answer =
                    stack.insist(Method::POST, &format!("{path}/prompt"), Some(body)).await?;
                ensure!(answer.status == 202, "queued prompt: {answer:?}");
                tally.queued += 1;
                is_sent = true;
            }
            Action::Interrupt => {
                sleep(turn.after).await;
                let answer = stack.insist(Method::POST, &format!("{path}/interrupt"), None).await?;
                // The turn may have ended.
                ensure!(matches!(answer.status, 202 | 409), "interrupt: {answer:?}");
                tally.interrupts += usize::from(answer.status == 202);
            }
            Action::Terminate => {
                sleep(turn.after).await;
                let answer = stack.insist(Method::POST, &format!("{path}/terminate"), None).await?;
                // One that was answered with 503 may have taken effect.
                ensure!(matches!(answer.status, 200 | 409), "terminate: {answer:?}");
                tally.terminated += 1;
                driven.is_terminated = true;
            }
        }
        let state = settled(stack, &path, rng, tally, &mut driven).await?;
        let (status, code) =
            (state["status"].as_str().unwrap_or_default(), state["exit_code"].as_i64());
        let was_interrupted =
            turn.action == Action::Interrupt && (status, code) == ("completed", Some(0));
        let expected = if turn.code == 0 { "completed" } else { "failed" };
        // What follows a queued prompt has been waited for already.
        let is_as_planned = driven.is_terminated && status == "terminated"
            || was_interrupted
            || is_sent && status != "terminated"
            || (status, code) == (expected, Some(turn.code));
        if !is_as_planned {
            driven.has_failed = true;
            tally.failed += 1;
            let last = last_events(stack, &path).await?;
            tally.wrong.push(format!(
                "{runtime} {session}: turn {} ({:?}, to end with {}) is {status}, {code:?}, {}; the last events: {last}",
                number + 1,
                turn.action,
                turn.code,
                state["failure"],
            ));
        }
        if driven.is_terminated || status != "completed" && !is_sent {
            break;
        }
    }
    Ok(driven)
}

/// The newest typed events, for a report.
async fn last_events(stack: &Stack, path: &str) -> Result<String> {
    let page =
        stack.insist(Method::GET, &format!("{path}/events?order=desc&limit=6"), None).await?.body;
    let events = page["data"].as_array().into_iter().flatten();
    let events: Vec<String> =
        events.map(|event| format!("{} {}", event["processed_at"], event["type"])).collect();
    Ok(events.join(", "))
}

/// Waits until a session neither runs nor is about to, and answers what it asks meanwhile; its
/// state.
async fn settled(
    stack: &Stack,
    path: &str,
    rng: &mut Rng,
    tally: &mut Tally,
    driven: &mut Driven,
) -> Result<Value> {
    let begun = Instant::now();
    loop {
        let state = stack.insist(Method::GET, path, None).await?.body;
        if !matches!(state["status"].as_str(), Some("pending" | "running")) {
            return Ok(state);
        }
        if state["waiting_on"].as_str().is_some_and(|text| text.starts_with("a decision")) {
            let open = stack
                .insist(Method::GET, &format!("{path}/requests?status=open"), None)
                .await?
                .body;
            for request in open["data"].as_array().into_iter().flatten() {
                let decision = if rng.u8(..4) == 0 { "deny" } else { "allow" };
                let answer = stack
                    .insist(
                        Method::POST,
                        &format!("{path}/requests/{}", request["id"]),
                        Some(json!({ "decision": decision })),
                    )
                    .await?;
                // An earlier attempt may have been heard.
                ensure!(matches!(answer.status, 200 | 409), "decision: {answer:?}");
                tally.decisions += 1;
                driven.was_denied |= decision == "deny";
            }
        }
        // A queued turn is waited for with the one before it.
        if begun.elapsed() > TURN_MAX * 2 {
            return Err(Stuck(format!("{state} is not settled after {:?}", TURN_MAX * 2)).into());
        }
        sleep(POLL).await;
    }
}

/// Compares what was planned and what the agent wrote with the log.
async fn judge_lines(
    stack: &Stack,
    session: &str,
    turns: &[Turn],
    driven: &Driven,
    log: &Reader<'_>,
    tally: &mut Tally,
) -> Result<()> {
    let counted = Counted::of(&log.stdout);
    let (mut lost, mut cut) = (Vec::new(), Vec::new());
    for turn in turns.iter().take(driven.turns) {
        let Told::Lines(program) = &turn.told else { continue };
        let is_whole = matches!(turn.action, Action::Wait | Action::Queue) && !driven.has_failed;
        let mut expected = program.numbers.clone();
        if !is_whole {
            let last = counted.last(expected.clone());
            cut.push(last);
            expected.end = last.map_or(expected.start, |last| last + 1);
        }
        lost.extend(counted.missing(expected));
    }
    // Termination deletes the sandbox, and so does a failure of it.
    if !driven.is_terminated && !driven.has_failed && counted.lines() > 0 {
        let written = own_copy(stack, session).await?;
        let written = Counted::of(&written);
        lost.extend(written.numbers().filter(|number| !counted.contains(*number)));
        // Only the last line of a program that was killed may be missing in its copy.
        let more = counted
            .numbers()
            .filter(|number| !written.contains(*number) && !cut.contains(&Some(*number)))
            .count();
        if more > 0 {
            tally.differences.altered += more;
            tally.wrong.push(format!(
                "shell {session}: {more} lines are in the log that the agent did not write"
            ));
        }
    }
    tally.lines += counted.lines();
    tally.differences.lost += lost.len();
    tally.differences.doubled += counted.doubled();
    if !lost.is_empty() || counted.doubled() > 0 {
        let first: Vec<_> = lost.iter().take(5).collect();
        tally.wrong.push(format!(
            "shell {session}: {} lines lost (first {first:?}), {} doubled",
            lost.len(),
            counted.doubled()
        ));
    }
    Ok(())
}

/// The sandboxes' server may be away.
async fn own_copy(stack: &Stack, session: &str) -> Result<String> {
    let begun = Instant::now();
    loop {
        match file_in_sandbox(stack, session, OWN_COPY).await {
            Err(_) if begun.elapsed() < REPLAY_MAX => sleep(POLL).await,
            other => return other,
        }
    }
}

fn judge_what_was_said(
    runtime: &str,
    session: &str,
    turns: &[Turn],
    driven: &Driven,
    typed: &Reader<'_>,
    tally: &mut Tally,
) {
    let judged = if driven.has_failed { driven.turns.saturating_sub(1) } else { driven.turns };
    for (number, turn) in turns.iter().take(judged).enumerate() {
        let said = typed.said.get(&(number as u64 + 1)).map(String::as_str).unwrap_or_default();
        let (mut lost, mut doubled) = (0, 0);
        match &turn.told {
            Told::Once(_) if driven.was_denied => {}
            Told::Once(texts) => {
                let times = texts.iter().map(|text| said.matches(text.as_str()).count());
                for times in times {
                    lost += usize::from(times == 0);
                    doubled += usize::from(times > 1);
                }
                tally.lines += texts.len() - lost;
            }
            Told::Text(text) => lost += usize::from(!said.contains(text.as_str())),
            Told::Lines(_) | Told::Nothing => {}
        }
        if lost + doubled > 0 {
            tally.wrong.push(format!(
                "{runtime} {session}: turn {}: {lost} lost, {doubled} doubled in {said:?}",
                number + 1
            ));
        }
        tally.differences.lost += lost;
        tally.differences.doubled += doubled;
    }
}
