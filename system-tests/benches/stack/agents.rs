//! What a person waits for, with the real Claude Code and a model that answers at once.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sprites::{ExecEvent, ExecRequest};
use system_tests::{Events, Options, Stack};
use testkit::bench::{Figure, Times};
use types::Timestamp;

use crate::{OPTIONS, sprite};

const COLD: usize = 5;
const PREPARED: usize = 10;
/// What a client does between the session's creation and its first message: more than a
/// preparation takes.
const BEFORE_MESSAGE: Duration = Duration::from_secs(4);
/// The second session has the first spare made.
const UNPREPARED: usize = 2;
const FOLLOW_UPS: usize = 20;
const DECISIONS: usize = 10;

pub async fn agents() -> Result<()> {
    let stack = Stack::start(Options { scripted_model: true, ..OPTIONS }).await?;
    let agent =
        json!({ "name": "bench", "runtime": "claude", "model": "anthropic/claude-sonnet-4-5" });
    let agent = made(&stack, "/agents", agent, 201).await?;
    let (mut cold, mut last) = (Vec::new(), None);
    for _ in 0..COLD {
        let begun = Instant::now();
        let mut chat = Chat::begin(&stack, &agent, "hello").await?;
        chat.until("agent.message").await?;
        cold.push(begun.elapsed());
        chat.until("session.status_idle").await?;
        last = Some(chat);
    }
    let mut by_hand = Vec::new();
    for number in 0..COLD {
        by_hand.push(plain_start(&stack, number).await?);
    }
    let cold = Figure::new(
        "agents: Claude Code's first words, from POST, in a new sandbox",
        &Times::new(cold),
    );
    cold.beside("`claude -p` in a new sandbox, by hand", &Times::new(by_hand)).report()?;

    prepared(&stack).await?;
    with_spares().await?;

    let mut chat = last.context("no session")?;
    let (mut asked, mut follow_ups) = (Vec::new(), Vec::new());
    for _ in 0..FOLLOW_UPS {
        let (begun, posted) = (Instant::now(), Timestamp::now().unix_micros());
        chat.prompt("when were you asked?").await?;
        let message = chat.until("agent.message").await?;
        follow_ups.push(begun.elapsed());
        let text = message["content"][0]["text"].as_str().context("no text")?;
        asked.push(Duration::from_micros(text.parse::<i64>()?.abs_diff(posted)));
        chat.until("session.status_idle").await?;
    }
    let asked =
        Figure::new("agents: from a follow-up's POST to the model's request", &Times::new(asked));
    asked.report()?;
    Figure::new(
        "agents: Claude Code's first words on a follow-up, from POST",
        &Times::new(follow_ups),
    )
    .report()?;

    let rules = json!({ "rules": [{ "tool": "Bash", "evaluation": "ask" }] });
    let asks = json!({ "name": "asks", "runtime": "claude", "model": "anthropic/claude-sonnet-4-5", "permissions": rules });
    let asks = made(&stack, "/agents", asks, 201).await?;
    let mut chat = Chat::begin(&stack, &asks, "run: echo hi").await?;
    let mut decided = Vec::new();
    for number in 0..DECISIONS {
        if number > 0 {
            chat.prompt("run: echo hi").await?;
        }
        let request = chat.until("session.permission_requested").await?;
        let begun = Instant::now();
        let route = format!("/sessions/{}/requests/{}", chat.session, request["tool_use_id"]);
        let answer = stack.post(&route, json!({ "decision": "allow" })).await?;
        ensure!(answer.status == 200, "{answer:?}");
        chat.until("agent.tool_result").await?;
        decided.push(begun.elapsed());
        chat.until("session.status_idle").await?;
    }
    Figure::new(
        "agents: from the decision on a permission request to the tool's result",
        &Times::new(decided),
    )
    .report()
}

/// A session that was created without a message, as SDKs of `/v1` do it: its sandbox is ready by
/// the first one.
async fn prepared(stack: &Stack) -> Result<()> {
    let agent = json!({ "name": "bench", "model": "claude-sonnet-4-5", "metadata": { "aod.runtime": "claude" } });
    let agent = made(stack, "/v1/agents", agent, 200).await?;
    let environment = made(stack, "/v1/environments", json!({ "name": "bench" }), 200).await?;
    let mut times = Vec::new();
    for _ in 0..PREPARED {
        let session = json!({ "agent": agent, "environment_id": environment });
        let session = made(stack, "/v1/sessions", session, 200).await?;
        let path = format!("/v1/sessions/{session}/events");
        let events = stack.events(0, &format!("{path}/stream")).await?;
        tokio::time::sleep(BEFORE_MESSAGE).await;
        let mut chat = Chat { stack, session, events };
        let begun = Instant::now();
        let message =
            json!({ "type": "user.message", "content": [{ "type": "text", "text": "hello" }] });
        let sent = stack.post(&path, json!({ "events": [message] })).await?;
        ensure!(sent.status == 200, "{sent:?}");
        chat.until("agent.message").await?;
        times.push(begun.elapsed());
        chat.until("session.status_idle").await?;
    }
    Figure::new(
        "agents: Claude Code's first words, from the first message of a prepared session",
        &Times::new(times),
    )
    .report()
}

/// Sessions that are created alike, each after the spare that it gets is ready.
async fn with_spares() -> Result<()> {
    let options = OPTIONS.with("AOD_SPARE_SESSIONS_MAX", "1".to_owned());
    let stack = Stack::start(Options { scripted_model: true, ..options }).await?;
    let agent =
        json!({ "name": "bench", "runtime": "claude", "model": "anthropic/claude-sonnet-4-5" });
    let agent = made(&stack, "/agents", agent, 201).await?;
    let mut times = Vec::new();
    for number in 0..PREPARED + UNPREPARED {
        let begun = Instant::now();
        let mut chat = Chat::begin(&stack, &agent, "hello").await?;
        chat.until("agent.message").await?;
        if number >= UNPREPARED {
            times.push(begun.elapsed());
        }
        chat.until("session.status_idle").await?;
        tokio::time::sleep(BEFORE_MESSAGE).await;
    }
    Figure::new("agents: Claude Code's first words, from POST, with a spare", &Times::new(times))
        .report()
}

/// A session and its typed events.
struct Chat<'a> {
    stack: &'a Stack,
    session: String,
    events: Events,
}

impl<'a> Chat<'a> {
    async fn begin(stack: &'a Stack, agent: &str, prompt: &str) -> Result<Self> {
        let session =
            made(stack, "/sessions", json!({ "agent_id": agent, "prompt": prompt }), 202).await?;
        let events =
            stack.events(0, &format!("/sessions/{session}/events?stream=true&after=0")).await?;
        Ok(Self { stack, session, events })
    }

    async fn prompt(&self, prompt: &str) -> Result<()> {
        let answer = self
            .stack
            .post(&format!("/sessions/{}/prompt", self.session), json!({ "prompt": prompt }))
            .await?;
        ensure!(answer.status == 202, "{answer:?}");
        Ok(())
    }

    async fn until(&mut self, kind: &str) -> Result<Value> {
        loop {
            let event = self
                .events
                .next()
                .await?
                .with_context(|| format!("the stream ended before {kind}"))?;
            if event["type"] == kind {
                return Ok(event);
            }
        }
    }
}

async fn made(stack: &Stack, path: &str, body: Value, status: u16) -> Result<String> {
    let answer = stack.post(path, body).await?;
    ensure!(answer.status == status, "{answer:?}");
    Ok(answer.text("id").to_owned())
}

/// From nothing to the CLI's first words, in a sandbox that is made for it.
async fn plain_start(stack: &Stack, number: usize) -> Result<Duration> {
    let pid = *stack.pids("scripted-model").first().context("no model")?;
    let environment = String::from_utf8(fs::read(format!("/proc/{pid}/environ"))?)?;
    let model = environment
        .split('\0')
        .find_map(|entry| entry.strip_prefix("SCRIPTED_MODEL_ADDR="))
        .context("no address")?;
    let begun = Instant::now();
    let sprite = sprite(stack, &format!("bench-claude-{number}")).await?;
    let command =
        format!("ANTHROPIC_BASE_URL=http://{model} ANTHROPIC_API_KEY=none claude -p hello");
    let mut exec = sprite
        .exec(&ExecRequest { argv: &["bash", "-lc", &command], ..ExecRequest::default() })
        .await?;
    loop {
        match exec.next().await? {
            ExecEvent::Stdout(_) => return Ok(begun.elapsed()),
            ExecEvent::Stderr(_) => {}
            ExecEvent::Exit(code) => anyhow::bail!("claude said nothing, exit {code}"),
        }
    }
}
