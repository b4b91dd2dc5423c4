//! How fast the whole stack is, each figure beside a floor of the same run: `make bench`, as root. `make bench ARGS=replay` measures what
//! is named so, and nothing else.
//!
//! Postgres, NATS, the sandboxes and this load share the machine. Machines differ and are noisy: read the ratios.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    sync::Mutex,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use axum::response::sse::{Event, Sse};
use contract::{
    host,
    session::{AgentEvent, SessionEvent, session_event},
};
use futures::{StreamExt as _, TryStreamExt as _, future::try_join_all, stream};
use prost::Message as _;
use rustix::process::Signal;
use serde_json::json;
use sprites::{ExecEvent, ExecRequest, Sprite};
use sqlx::{PgPool, postgres::PgPoolOptions, types::Uuid};
use system_tests::{Events, Options, Stack};
use testkit::bench::{Times, report_rate};
use tokio::{
    task::JoinSet,
    time::{Instant as Tick, sleep_until},
};

const OPTIONS: Options = Options {
    scripted_model: false,
    runners: 1,
    replicas: 1,
    nats_servers: 1,
    no_restart: false,
    settings: &[("DEFAULT_MAX_CONCURRENT_SESSIONS", "1000000"), ("AOD_MAX_STREAMS_PER_KEY", "1000000"), ("RUST_LOG", "error")],
};
const CALLERS: usize = 32;
const LOAD: Duration = Duration::from_secs(5);
const LINES: usize = 500;
/// Each line is the time at which it is printed, a hundred a second.
const CLOCK: &str = "perl -MTime::HiRes=time,sleep -e '$| = 1; for (1..500) { printf \"%.6f\\n\", time; sleep 0.01 }'";
const BULK_BYTES: usize = 100_000_000;
const BULK: &str = "head -c 100000000 /dev/zero | tr '\\0' x | fold -w 99";
const EVENTS: usize = 1_000_000;
const READERS: usize = 10_000;
/// Two hundred lines, when all readers are there.
const CUE: &str = "/home/sprite/cue";
const ON_CUE: &str = "until [ -e /home/sprite/cue ]; do sleep 0.05; done
    perl -MTime::HiRes=sleep -e '$| = 1; for (1..200) { print \"a line that an agent has printed\\n\"; sleep 0.002 }'";

#[tokio::main]
async fn main() -> Result<()> {
    // Cargo passes `--bench`.
    let wanted = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let is_wanted = |name: &str| name.contains(&wanted);
    if is_wanted("accept") {
        accept().await?;
    }
    if is_wanted("managed") {
        managed().await?;
    }
    if is_wanted("readers") {
        readers().await?;
    }
    let stack = Stack::start(OPTIONS).await?;
    if is_wanted("run") {
        run(&stack).await?;
    }
    if is_wanted("latency") {
        latency(&stack).await?;
    }
    if is_wanted("bulk") {
        bulk(&stack).await?;
    }
    if is_wanted("replay") {
        replay(&stack).await?;
    }
    Ok(())
}

/// Sessions accepted while no runner takes any.
async fn accept() -> Result<()> {
    let stack = Stack::start(OPTIONS).await?;
    let body = json!({ "agent_id": stack.agent("shell").await?, "prompt": "true" });
    Stack::signal(&stack.pids("sprite-runner"), Signal::STOP);
    let sessions = Mutex::new(Vec::new());
    let post = async || {
        let answer = stack.post("/sessions", body.clone()).await?;
        ensure!(answer.status == 202, "{answer:?}");
        let session: Uuid = answer.text("id").parse()?;
        sessions.lock().map_err(|_| anyhow::anyhow!("a caller panicked"))?.push(session);
        Ok(())
    };
    let begun = Instant::now();
    let callers = (0..CALLERS).map(async |_| {
        while begun.elapsed() < LOAD {
            post().await?;
        }
        anyhow::Ok(())
    });
    try_join_all(callers).await?;
    let accepted = sessions.lock().map_err(|_| anyhow::anyhow!("a caller panicked"))?.clone();
    let rate = per_second(accepted.len(), begun);

    let begun = Tick::now();
    let half = (0..(rate / 2.0 * LOAD.as_secs_f64()) as usize).map(async |number| {
        let due = begun + Duration::from_secs_f64(number as f64 / (rate / 2.0));
        sleep_until(due).await;
        post().await?;
        anyhow::Ok(due.elapsed())
    });
    let half = Times::new(try_join_all(half).await?);
    let floor = inserts(&stack, &accepted).await?;
    report_rate("accept a session", "sessions", rate, "the same rows straight into Postgres", floor);
    println!("accept a session, at half of that: {half}");
    Ok(())
}

/// How often a caller's request is answered, with so many callers.
async fn rate(stack: &Stack, path: &str, body: &serde_json::Value, status: u16) -> Result<f64> {
    let begun = Instant::now();
    let callers = (0..CALLERS).map(async |_| {
        let mut count = 0;
        while begun.elapsed() < LOAD {
            let answer = stack.post(path, body.clone()).await?;
            ensure!(answer.status == status, "{answer:?}");
            count += 1;
        }
        anyhow::Ok(count)
    });
    let counts: Vec<usize> = try_join_all(callers).await?;
    Ok(per_second(counts.into_iter().sum(), begun))
}

/// The Managed Agents API beside the original one.
async fn managed() -> Result<()> {
    let stack = Stack::start(OPTIONS).await?;
    let made = stack.post("/v1/environments", json!({ "name": "bench" })).await?;
    let environment = made.text("id").to_owned();
    let agent = json!({ "name": "bench", "model": "claude-sonnet-4-5", "metadata": { "aod.runtime": "shell" } });
    let agent = stack.post("/v1/agents", agent).await?.text("id").to_owned();
    let message = |text: &str| json!({ "type": "user.message", "content": [{ "type": "text", "text": text }] });
    let session = |events: serde_json::Value| json!({ "agent": agent, "environment_id": environment, "initial_events": events });

    let made = stack.post("/v1/sessions", session(json!([]))).await?;
    let path = format!("/v1/sessions/{}/events", made.text("id"));
    let (url, key) = (format!("{}{path}/stream", stack.ready_text("/api_url")), stack.ready_text("/api_key"));
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
                text.push_str(&String::from_utf8_lossy(&bytes.next().await.context("the stream ended")??));
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
    println!("managed: from the message's POST to session.status_running: {}", Times::new(started));
    list(&stack, made.text("id")).await?;

    Stack::signal(&stack.pids("sprite-runner"), Signal::STOP);
    let original = json!({ "agent_id": stack.agent("shell").await?, "prompt": "true" });
    let floor = rate(&stack, "/sessions", &original, 202).await?;
    let ours = rate(&stack, "/v1/sessions", &session(json!([message("true")])), 200).await?;
    report_rate("managed: accept a session", "sessions", ours, "POST /sessions", floor);
    Ok(())
}

/// A list of a hundred thousand events, a thousand a page.
async fn list(stack: &Stack, session: &str) -> Result<()> {
    const LISTED: i64 = 100_000;
    let pool = database(stack).await?;
    // Written by no turn: a message that is told so often.
    let said = host::AgentMessage { text: "a line that an agent has said".to_owned(), ..Default::default() };
    let event = host::Event { kind: Some(host::event::Kind::Message(said)), ..Default::default() };
    let kind = Some(session_event::Kind::Agent(AgentEvent { event: Some(event), ..AgentEvent::default() }));
    let payload = SessionEvent { turn: 1, at_us: 1, kind, ..SessionEvent::default() }.encode_to_vec();
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
    let copy = format!("copy (select event_id, payload from scheduler.event where session_id = '{id}' order by event_id) to stdout");
    let mut connection = pool.acquire().await?;
    let mut copied = connection.copy_out_raw(&copy).await?;
    while let Some(data) = copied.next().await {
        data?;
    }
    report_rate("managed: list events", "events", ours, "COPY of the same rows out of Postgres", per_second(count, begun));
    Ok(())
}

/// The rows of sessions that were accepted, written once more.
async fn inserts(stack: &Stack, sessions: &[Uuid]) -> Result<f64> {
    let pool = database(stack).await?;
    sqlx::raw_sql(
        "create schema bench;
         create table bench.session (like scheduler.session including all);
         create table bench.turn (like scheduler.turn including all);
         create table bench.outbox (like scheduler.outbox including all)",
    )
    .execute(&pool)
    .await?;
    let begun = Instant::now();
    let callers = sessions.chunks(sessions.len().div_ceil(CALLERS)).map(async |sessions| {
        for session in sessions {
            let mut tx = pool.begin().await?;
            for insert in [
                "insert into bench.session select * from scheduler.session where session_id = $1",
                "insert into bench.turn select * from scheduler.turn where session_id = $1",
                "insert into bench.outbox (outbox_id, subject, payload) values ($1, 'aod.cmd.runner.v1.turn.run', decode(repeat('00', 300), 'hex'))",
            ] {
                sqlx::query(insert).bind(session).execute(&mut *tx).await?;
            }
            tx.commit().await?;
        }
        anyhow::Ok(())
    });
    try_join_all(callers).await?;
    Ok(per_second(sessions.len(), begun))
}

/// A session that says one word, in a sandbox made for it.
async fn run(stack: &Stack) -> Result<()> {
    let (mut first, mut number) = (Vec::new(), 0);
    let whole = Times::of(30, async || {
        let begun = Instant::now();
        let mut events = session(stack, "echo hi").await?;
        events.next().await?.context("no event")?;
        first.push(begun.elapsed());
        while events.next().await?.is_some() {}
        Ok(())
    })
    .await?;
    let client = client(stack)?;
    let by_hand = Times::of(30, async || {
        number += 1;
        let name = format!("bench-{number}").parse()?;
        client.ensure(&name).await?;
        let request = ExecRequest { argv: &["bash", "-c", "echo hi"], ..ExecRequest::default() };
        ensure!(client.sprite(name).exec(&request).await?.finish().await?.code == 0);
        Ok(())
    })
    .await?;
    println!("POST to the first event at the client: {}", Times::new(first));
    whole.report("POST to the exit of `echo hi`, in a new sandbox", "a sandbox and a command by hand", &by_hand);
    Ok(())
}

/// From the agent's write to the client's line.
async fn latency(stack: &Stack) -> Result<()> {
    let mut events = session(stack, CLOCK).await?;
    let mut ours = Vec::new();
    while let Some(event) = events.next().await? {
        ours.extend(ages(event["data"].as_str().unwrap_or_default())?);
    }
    let sprite = sprite(stack, "bench-latency").await?;
    let mut exec = sprite.exec(&ExecRequest { argv: &["bash", "-c", CLOCK], ..ExecRequest::default() }).await?;
    let mut floor = Vec::new();
    while let ExecEvent::Stdout(data) = exec.next().await? {
        floor.extend(ages(std::str::from_utf8(&data)?)?);
    }
    ensure!((ours.len(), floor.len()) == (LINES, LINES), "lines are missing: {}, {}", ours.len(), floor.len());
    Times::new(ours).report("a line from the agent to the client", "by the sandbox's own WebSocket", &Times::new(floor));
    Ok(())
}

/// How long ago the times were that these lines name.
fn ages(lines: &str) -> Result<Vec<Duration>> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
    lines.lines().map(|line| Ok(Duration::from_secs_f64((now - line.parse::<f64>()?).max(0.0)))).collect()
}

/// One session that prints as fast as it can.
async fn bulk(stack: &Stack) -> Result<()> {
    let mut events = session(stack, BULK).await?;
    let (mut begun, mut bytes) = (None, 0);
    while let Some(event) = events.next().await? {
        if let Some(data) = event["data"].as_str() {
            begun.get_or_insert_with(Instant::now);
            bytes += data.len();
        }
    }
    let ours = bytes as f64 / 1e6 / begun.context("no output")?.elapsed().as_secs_f64();
    let sprite = sprite(stack, "bench-bulk").await?;
    let make = format!("{BULK} >/tmp/spool");
    let made = sprite.exec(&ExecRequest { argv: &["bash", "-c", &make], ..ExecRequest::default() }).await?.finish().await?;
    ensure!(made.code == 0, "{made:?}");
    let begun = Instant::now();
    let (mut exec, mut read) = (sprite.exec(&ExecRequest { argv: &["cat", "/tmp/spool"], ..ExecRequest::default() }).await?, 0);
    while let ExecEvent::Stdout(data) = exec.next().await? {
        read += data.len();
    }
    ensure!(bytes == read && bytes > BULK_BYTES, "{bytes} bytes of {read} arrived");
    report_rate(
        "output of one session",
        "MB",
        ours,
        "reading the spool file from the sandbox",
        read as f64 / 1e6 / begun.elapsed().as_secs_f64(),
    );
    Ok(())
}

/// A session with a million events, from the first and from the last but one. It ends with a termination: for a turn's end the stream
/// waits until the recorder has come to its id, which it never does to one that is made up.
async fn replay(stack: &Stack) -> Result<()> {
    let id = stack.session("shell", "echo a line that an agent has printed").await?;
    stack.stream(&id, 0).await?.all().await?;
    let terminated = stack.post(&format!("/sessions/{id}/terminate"), json!({})).await?;
    ensure!(terminated.status == 200, "{terminated:?}");
    let events = stack.stream(&id, 0).await?.all().await?;
    let output = events.iter().find(|event| event["type"] == "output").and_then(|event| event["id"].as_i64()).context("no output")?;
    let end = events.last().and_then(|event| event["id"].as_i64()).context("no end")?;
    let pool = database(stack).await?;
    // The recorder may be a moment behind the stream.
    testkit::eventually("the session is persisted", async || {
        let count = sqlx::query_scalar::<_, i64>("select count(*) from scheduler.event where event_id = $1").bind(end);
        count.fetch_one(&pool).await.is_ok_and(|count| count == 1)
    })
    .await;
    let last = end + i64::try_from(EVENTS)?;
    let mut tx = pool.begin().await?;
    sqlx::query("update scheduler.event set event_id = $1 where event_id = $2").bind(last).bind(end).execute(&mut *tx).await?;
    sqlx::query(
        "insert into scheduler.event (session_id, event_id, payload)
         select session_id, number, payload from scheduler.event, generate_series($1::bigint, $2::bigint - 1) as number where event_id = $3",
    )
    .bind(end)
    .bind(last)
    .bind(output)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    sqlx::query("analyze scheduler.event").execute(&pool).await?;

    let begun = Instant::now();
    let count = count_events(stack, &id, 0).await?;
    let ours = per_second(count, begun);
    ensure!(count == EVENTS + events.len(), "{count} events");
    let begun = Instant::now();
    let mut connection = pool.acquire().await?;
    let copy = format!(
        "copy (select event_id, payload from scheduler.event where session_id = '{id}' order by event_id) to stdout (format binary)"
    );
    let mut copied = connection.copy_out_raw(&copy).await?;
    while let Some(data) = copied.next().await {
        data?;
    }
    report_rate("replay", "events", ours, "COPY of the same rows out of Postgres", per_second(count, begun));
    let resume = Times::of(100, async || {
        // The stream's start and the last.
        ensure!(count_events(stack, &id, u64::try_from(last - 1)?).await? == 2);
        Ok(())
    });
    println!("resume at the end of a million events: {}", resume.await?);
    Ok(())
}

/// Readers of one session, all there before it prints, in a gateway that has seen nothing else.
async fn readers() -> Result<()> {
    let stack = Stack::start(OPTIONS).await?;
    let id = stack.session("shell", ON_CUE).await?;
    let mut first = stack.stream(&id, 0).await?;
    while first.next().await?.context("no start")?["stage"] != "runtime_start" {}
    let memory = resident_kb(&stack)?;
    // Each reader has a connection of its own, which ends with it.
    let http = reqwest::Client::builder().pool_max_idle_per_host(0).build()?;
    let (url, key) = (format!("{}/sessions/{id}/stream", stack.ready_text("/api_url")), stack.ready_text("/api_key"));
    let opened = stream::iter(0..READERS).map(|_| http.get(&url).bearer_auth(&key).send()).buffer_unordered(CALLERS);
    let streams = opened.try_collect::<Vec<_>>().await?;
    let grown = (resident_kb(&stack)? - memory) / READERS as f64;

    let client = client(&stack)?;
    let name = client.list("aod-").await?.pop().context("no sandbox")?.parse()?;
    let begun = Instant::now();
    let mut counting: JoinSet<_> = streams.into_iter().map(count).collect();
    client.sprite(name).write(CUE, "", 0o644).await?;
    let (mut counts, mut total) = (BTreeSet::new(), 0);
    while let Some(counted) = counting.join_next().await {
        let events = counted??;
        counts.insert(events);
        total += events;
    }
    let ours = per_second(total, begun);
    let texts: Vec<_> = stack.stream(&id, 0).await?.all().await?.iter().map(ToString::to_string).collect();
    ensure!(counts.iter().eq([&texts.len()]), "some readers missed events: {counts:?} of {}", texts.len());

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/", listener.local_addr()?);
    let (cue, waiting) = tokio::sync::watch::channel(());
    let answer = async move || {
        let (texts, mut waiting) = (texts.clone(), waiting.clone());
        let events = stream::once(async move { waiting.changed().await }).flat_map(move |_| stream::iter(texts.clone()));
        Sse::new(events.map(|text| Ok::<_, Infallible>(Event::default().data(text))))
    };
    let router = axum::Router::new().route("/", axum::routing::get(answer));
    let mut server = JoinSet::new();
    server.spawn(axum::serve(listener, router).into_future());
    // Both ends of these are in this process: half as many, for the sake of its open files.
    let opened = stream::iter(0..READERS / 2).map(|_| http.get(&url).send()).buffer_unordered(CALLERS);
    let streams = opened.try_collect::<Vec<_>>().await?;
    let begun = Instant::now();
    let mut counting: JoinSet<_> = streams.into_iter().map(count).collect();
    cue.send_replace(());
    let mut total = 0;
    while let Some(counted) = counting.join_next().await {
        total += counted??;
    }
    report_rate("events to 10000 readers at once", "events", ours, "axum, out of memory", per_second(total, begun));
    println!("a reader of a live session: {grown:.1} KB of the gateway");
    Ok(())
}

async fn session(stack: &Stack, prompt: &str) -> Result<Events> {
    stack.stream(&stack.session("shell", prompt).await?, 0).await
}

async fn count_events(stack: &Stack, session: &str, since: u64) -> Result<usize> {
    count(stack.open_stream(session, since).await?).await
}

/// The events of a stream to its end: what ends with an empty line, and is no heartbeat.
async fn count(response: reqwest::Response) -> Result<usize> {
    let (mut body, mut count, mut before) = (response.bytes_stream(), 0, b'\n');
    while let Some(bytes) = body.next().await {
        for byte in bytes? {
            // A field `data` begins each event's line; its name alone begins with a `d`.
            count += usize::from(before == b'\n' && byte == b'd');
            before = byte;
        }
    }
    Ok(count)
}

fn client(stack: &Stack) -> Result<sprites::Client> {
    let token = stack.ready_text("/sprites_token").into();
    Ok(sprites::Client::new(sprites::http_client()?, &stack.ready_text("/sprites_url"), token))
}

async fn sprite(stack: &Stack, name: &str) -> Result<Sprite> {
    let (client, name) = (client(stack)?, name.parse()?);
    client.ensure(&name).await?;
    Ok(client.sprite(name))
}

async fn database(stack: &Stack) -> Result<PgPool> {
    Ok(PgPoolOptions::new().max_connections(16).connect(&stack.ready_text("/database_url")).await?)
}

/// Of the gateway.
fn resident_kb(stack: &Stack) -> Result<f64> {
    let pid = *stack.pids("gateway").first().context("no gateway")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

fn per_second(count: usize, begun: Instant) -> f64 {
    count as f64 / begun.elapsed().as_secs_f64()
}
