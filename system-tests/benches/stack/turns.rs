//! Turns of the shell runtime: from their request to their end, a line's way, and much output.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use sprites::{ExecEvent, ExecRequest};
use system_tests::Stack;
use testkit::bench::{Figure, Measured, Times};

use crate::{client, session, sprite};

const LINES: usize = 500;
/// Each line is the time at which it is printed, a hundred a second.
const CLOCK: &str = "perl -MTime::HiRes=time,sleep -e '$| = 1; for (1..500) { printf \"%.6f\\n\", time; sleep 0.01 }'";
const BULK_BYTES: usize = 100_000_000;
const BULK: &str = "head -c 100000000 /dev/zero | tr '\\0' x | fold -w 99";

/// A session that says one word, in a sandbox made for it.
pub async fn run(stack: &Stack) -> Result<()> {
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
    Figure::new("run: from POST to the first event at the client", &Times::new(first)).report()?;
    let whole = Figure::new("run: from POST to the exit of `echo hi`, in a new sandbox", &whole);
    whole.beside("a sandbox and a command without our code", &by_hand).report()
}

/// From the agent's write to the client's line.
pub async fn latency(stack: &Stack) -> Result<()> {
    let mut events = session(stack, CLOCK).await?;
    let mut ours = Vec::new();
    while let Some(event) = events.next().await? {
        ours.extend(ages(event["data"].as_str().unwrap_or_default())?);
    }
    let sprite = sprite(stack, "bench-latency").await?;
    let mut exec = sprite
        .exec(&ExecRequest { argv: &["bash", "-c", CLOCK], ..ExecRequest::default() })
        .await?;
    let mut floor = Vec::new();
    while let ExecEvent::Stdout(data) = exec.next().await? {
        floor.extend(ages(std::str::from_utf8(&data)?)?);
    }
    ensure!(
        (ours.len(), floor.len()) == (LINES, LINES),
        "lines are missing: {}, {}",
        ours.len(),
        floor.len()
    );
    let line = Figure::new("latency: a line from the agent to the client", &Times::new(ours));
    line.beside("the sandbox's own WebSocket", &Times::new(floor)).report()
}

/// How long ago the times were that these lines name.
fn ages(lines: &str) -> Result<Vec<Duration>> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
    lines
        .lines()
        .map(|line| Ok(Duration::from_secs_f64((now - line.parse::<f64>()?).max(0.0))))
        .collect()
}

/// One session that prints as fast as it can.
pub async fn bulk(stack: &Stack) -> Result<()> {
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
    let made = sprite
        .exec(&ExecRequest { argv: &["bash", "-c", &make], ..ExecRequest::default() })
        .await?
        .finish()
        .await?;
    ensure!(made.code == 0, "{made:?}");
    let begun = Instant::now();
    let (mut exec, mut read) = (
        sprite
            .exec(&ExecRequest { argv: &["cat", "/tmp/spool"], ..ExecRequest::default() })
            .await?,
        0,
    );
    while let ExecEvent::Stdout(data) = exec.next().await? {
        read += data.len();
    }
    ensure!(bytes == read && bytes > BULK_BYTES, "{bytes} bytes of {read} arrived");
    let floor = read as f64 / 1e6 / begun.elapsed().as_secs_f64();
    let output = Figure::new("bulk: one session's output", Measured::rate(ours, "MB"));
    output.beside("reading the file of it from the sandbox", Measured::rate(floor, "MB")).report()
}
