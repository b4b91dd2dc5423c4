//! The Managed Agents API.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use contract::{
    host,
    session::{AgentEvent, SessionEvent, session_event},
};
use futures::StreamExt as _;
use prost::Message as _;
use rustix::process::Signal;
use serde_json::json;
use sqlx::types::Uuid;
use system_tests::Stack;
use testkit::bench::{Figure, Measured, Times};

use crate::{LOAD, OPTIONS, accept::rate, database, per_second};

/// The Managed Agents API beside the original one.
pub async fn managed() -> Result<()> {
    let stack = Stack::start(OPTIONS).await?;
    let made = stack.post("/v1/environments", json!({ "name": "bench" })).await?;
    let environment = made.text("id").to_owned();
    let agent = json!({ "name": "bench", "model": "claude-sonnet-4-5", "metadata": { "aod.runtime": "shell" } });
    let agent = stack.post("/v1/agents", agent).await?.text("id").to_owned();
    let message = |text: &str| json!({ "type": "user.message", "content": [{ "type": "text", "text": text }] });
    let session = |events: serde_json::Value| json!({ "agent": agent, "environment_id": environment, "initial_events": events });

    let made = stack.post("/v1/sessions", session(json!([]))).await?;
    let path = format!("/v1/sessions/{}/events", made.text("id"));
    let (url, key) =
        (format!("{}{path}/stream", stack.ready_text("/api_url")), stack.ready_text("/api_key"));
    let http = reqwest::Client::builder().connect_timeout(LOAD).read_timeout(4 * LOAD).build()?;
    let mut bytes = http.get(&url).bearer_auth(&key).send().await?.bytes_stream();
    let mut text = String::new();
    let mut until = async |kind: &str| {
        let frame = format!("event: session.status_{kind}\n");
        // Comments come for as long as the stream is open.
        let shown = tokio::time::timeout(4 * LOAD, async {
            loop {
                if let Some(at) = text.find(&frame) {
                    text.drain(..at + frame.len());
                    return anyhow::Ok(());
                }
                text.push_str(&String::from_utf8_lossy(
                    &bytes.next().await.context("the stream ended")??,
                ));
            }
        });
        shown.await.with_context(|| format!("no session.status_{kind}"))?
    };
    // In a sandbox that is there: the first turn makes it.
    stack.post(&path, json!({ "events": [message("true")] })).await?;
    until("idle").await?;
    let mut started = Vec::new();
    for _ in 0..100 {
        let begun = Instant::now();
        let sent = stack.post(&path, json!({ "events": [message("true")] })).await?;
        ensure!(sent.status == 200, "{sent:?}");
        until("running").await?;
        started.push(begun.elapsed());
        until("idle").await?;
    }
    Figure::new("managed: from a message's POST to session.status_running", &Times::new(started))
        .report()?;
    list(&stack, made.text("id")).await?;

    Stack::signal(&stack.pids("sprite-runner"), Signal::STOP);
    let original = json!({ "agent_id": stack.agent("shell").await?, "prompt": "true" });
    let floor = rate(&stack, "/sessions", &original, 202).await?;
    let ours = rate(&stack, "/v1/sessions", &session(json!([message("true")])), 200).await?;
    let accepted = Figure::new(
        "managed: sessions accepted, with initial_events",
        Measured::rate(ours, "sessions"),
    );
    accepted.beside("POST /sessions", Measured::rate(floor, "sessions")).report()
}

/// A list of a hundred thousand events, a thousand a page.
async fn list(stack: &Stack, session: &str) -> Result<()> {
    const LISTED: i64 = 100_000;
    let pool = database(stack).await?;
    // Written by no turn: a message that is told so often.
    let said = host::AgentMessage {
        text: "a line that an agent has said".to_owned(),
        ..Default::default()
    };
    let event = host::Event { kind: Some(host::event::Kind::Message(said)), ..Default::default() };
    let kind = Some(session_event::Kind::Agent(AgentEvent {
        event: Some(event),
        ..AgentEvent::default()
    }));
    let payload =
        SessionEvent { turn: 1, at_us: 1, kind, ..SessionEvent::default() }.encode_to_vec();
    let newest = "select session_id, event_id from scheduler.event order by event_id desc limit 1";
    let (id, last): (Uuid, i64) = sqlx::query_as(newest).fetch_one(&pool).await?;
    sqlx::query(
        "insert into scheduler.event (session_id, event_id, payload)
         select $1, number, $2 from generate_series($3::bigint, $4::bigint) as number",
    )
    .bind(id)
    .bind(payload)
    .bind(last + 1)
    .bind(last + LISTED)
    .execute(&pool)
    .await?;
    sqlx::query("analyze scheduler.event").execute(&pool).await?;
    let (begun, mut count, mut page) = (Instant::now(), 0, String::new());
    loop {
        let answer = stack.get(&format!("/v1/sessions/{session}/events?limit=1000{page}")).await?;
        ensure!(answer.status == 200, "{answer:?}");
        count += answer.body["data"].as_array().context("no events")?.len();
        let Some(next) = answer.body["next_page"].as_str() else { break };
        page = format!("&page={next}");
    }
    ensure!(count > LISTED as usize, "{count} events");
    let ours = per_second(count, begun);
    let begun = Instant::now();
    let copy = format!(
        "copy (select event_id, payload from scheduler.event where session_id = '{id}' order by event_id) to stdout"
    );
    let mut connection = pool.acquire().await?;
    let mut copied = connection.copy_out_raw(&copy).await?;
    while let Some(data) = copied.next().await {
        data?;
    }
    let listed = Figure::new(
        "managed: a list of 100,000 events, 1,000 a page",
        Measured::rate(ours, "events"),
    );
    listed
        .beside(
            "COPY of the rows out of Postgres",
            Measured::rate(per_second(count, begun), "events"),
        )
        .report()
}
