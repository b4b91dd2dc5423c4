//! How fast the whole stack is, each figure beside a floor of the same run: `make bench`, as root.
//! `make bench ARGS=replay` measures what is named so, and nothing else.
//!
//! Postgres, NATS, the sandboxes and this load share the machine. Machines differ and are noisy:
//! read the ratios.

mod accept;
mod agents;
mod idle;
mod managed;
mod readers;
mod replay;
mod turns;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures::StreamExt as _;
use sprites::Sprite;
use sqlx::{PgPool, postgres::PgPoolOptions};
use system_tests::{Events, Options, Stack};

const OPTIONS: Options = Options {
    scripted_model: false,
    runners: 1,
    replicas: 1,
    nats_servers: 1,
    no_restart: false,
    settings: &[
        ("DEFAULT_MAX_CONCURRENT_SESSIONS", "1000000"),
        ("AOD_MAX_STREAMS_PER_KEY", "1000000"),
        ("RUST_LOG", "error"),
    ],
};
const CALLERS: usize = 32;
const LOAD: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> Result<()> {
    // Cargo passes `--bench`.
    let wanted = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let is_wanted = |name: &str| name.contains(&wanted);
    if is_wanted("accept") {
        accept::accept().await?;
    }
    if is_wanted("managed") {
        managed::managed().await?;
    }
    if is_wanted("readers") {
        readers::readers().await?;
    }
    if is_wanted("idle") {
        idle::idle().await?;
    }
    if is_wanted("agents") {
        agents::agents().await?;
    }
    let turns = ["run", "latency", "bulk", "replay"];
    if turns.into_iter().any(is_wanted) {
        let stack = Stack::start(OPTIONS).await?;
        if is_wanted("run") {
            turns::run(&stack).await?;
        }
        if is_wanted("latency") {
            turns::latency(&stack).await?;
        }
        if is_wanted("bulk") {
            turns::bulk(&stack).await?;
        }
        if is_wanted("replay") {
            replay::replay(&stack).await?;
        }
    }
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
