//! What a stack takes that has nothing to do.

use std::{collections::BTreeMap, fs, time::Duration};

use anyhow::{Context as _, Result};
use system_tests::{Options, Stack, idle::follow};
use testkit::bench::{Figure, Measured};

use crate::{LOAD, OPTIONS};

const WATCHED: Duration = Duration::from_secs(20);
/// The kernel counts CPU time in hundredths of a second.
const TICKS_PER_SECOND: f64 = 100.0;

pub async fn idle() -> Result<()> {
    let stack = Stack::start(Options {
        replicas: 4,
        settings: &[("EVENT_PARTITIONS", "4"), ("RUST_LOG", "error")],
        ..OPTIONS
    })
    .await?;
    let (cores, _) = watch(&stack).await?;
    let postgres = cores.get("postgres").copied().unwrap_or_default();
    Figure::new(
        "idle: Postgres with 4 schedulers and 4 partitions",
        Measured::amount(postgres, "cores"),
    )
    .report()?;
    drop(stack);

    let stack = Stack::start(OPTIONS).await?;
    let agent = stack.agent("shell").await?;
    let mut followed = Vec::new();
    for sessions in [0, 1, 100, 1000] {
        followed.extend(follow(&stack, &agent, sessions - followed.len()).await?);
        let (cores, memory) = watch(&stack).await?;
        let what = format!("idle: the stack, followed idle sessions: {sessions}");
        let used = Measured::amount(cores.values().sum(), "cores");
        Figure::new(&format!("{what}; CPU"), used).report()?;
        let memory = Measured::amount(memory, "MB");
        Figure::new(&format!("{what}; memory"), memory).report()?;
    }
    Ok(())
}

/// The cores that each service used over a while, and the memory of all.
async fn watch(stack: &Stack) -> Result<(BTreeMap<String, f64>, f64)> {
    // What it has just done is over.
    tokio::time::sleep(LOAD).await;
    let before = ticks(stack)?;
    tokio::time::sleep(WATCHED).await;
    let mut used = ticks(stack)?;
    for (service, after) in &mut used {
        *after = (*after - before.get(service).copied().unwrap_or_default())
            / TICKS_PER_SECOND
            / WATCHED.as_secs_f64();
    }
    let mut memory = 0.0;
    for (_, pid) in stack.processes() {
        // A process of Postgres may have ended meanwhile.
        let Ok(text) = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")) else { continue };
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss")?;
        memory += line.trim().trim_end_matches(" kB").parse::<f64>()? * 1024.0 / 1e6;
    }
    Ok((used, memory))
}

/// CPU time of each service so far.
fn ticks(stack: &Stack) -> Result<BTreeMap<String, f64>> {
    let mut used = BTreeMap::new();
    for (service, pid) in stack.processes() {
        let Ok(text) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        let (_, fields) = text.rsplit_once(") ").context("no fields")?;
        // Of the process, and of children that ended.
        let times = fields.split(' ').skip(11).take(4).map(str::parse::<f64>);
        *used.entry(service).or_insert(0.0) += times.sum::<Result<f64, _>>()?;
    }
    Ok(used)
}
