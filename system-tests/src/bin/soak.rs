//! `make soak`: a realistic mix on a stack of its own, on loopback, with a fault every minute, and
//! a verdict.

use std::{fs, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clap::Parser;
use system_tests::soak::{self, Outcome, Plan, ServiceUsage};

/// Run sessions for hours, inject faults, check every event and watch memory
#[derive(Parser)]
#[command(
    after_help = "Writes soak.json and soak.svg, and after a failure logs/, below target/soak. Ctrl-C ends it with what was seen so far.\n\n\
                        Example:\n  soak --minutes 10 --sessions 12 --agents 2"
)]
struct Args {
    /// How long sessions are started, in hours
    #[arg(long, conflicts_with = "minutes")]
    hours: Option<f64>,
    /// How long sessions are started, in minutes; 10 by default
    #[arg(long)]
    minutes: Option<f64>,
    /// The same seed runs the same mix
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Sessions at a time; the default suits two cores
    #[arg(long, default_value_t = 12)]
    sessions: usize,
    /// How many of these sessions run an agent CLI instead of a shell
    #[arg(long, default_value_t = 2)]
    agents: usize,
    /// Seconds from one fault to the next; 0: no faults
    #[arg(long, default_value_t = 60)]
    fault_every: u64,
    /// Directory of the results; target/soak by default
    #[arg(long)]
    out: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let hours = args.hours.or(args.minutes.map(|minutes| minutes / 60.0)).unwrap_or(1.0 / 6.0);
    let out = match args.out {
        Some(out) => out,
        // This program is in target/debug.
        None => {
            std::env::current_exe()?.ancestors().nth(2).context("no target directory")?.join("soak")
        }
    };
    let plan = Plan {
        seed: args.seed,
        time: Duration::try_from_secs_f64(hours * 3600.0)?,
        sessions: args.sessions,
        agents: args.agents,
        fault_every: (args.fault_every > 0).then(|| Duration::from_secs(args.fault_every)),
        logs: out.join("logs"),
    };
    let stopped = async {
        let _ = tokio::signal::ctrl_c().await;
    };
    let outcome = soak::run(plan, stopped, |line| println!("{line}")).await?;
    fs::create_dir_all(&out)?;
    fs::write(out.join("soak.json"), format!("{}\n", outcome.json()))?;
    fs::write(out.join("soak.svg"), outcome.svg())?;
    print(&outcome);
    println!("\n{}", out.join("soak.json").display());
    println!("{}", out.join("soak.svg").display());
    if !outcome.is_good() {
        println!("{}", outcome.plan.logs.display());
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn print(outcome: &Outcome) {
    let tally = &outcome.tally;
    println!("\n{tally}");
    let turns: Vec<String> =
        tally.turns.iter().map(|(runtime, turns)| format!("{turns} {runtime}")).collect();
    println!("turns: {}", turns.join(", "));
    println!(
        "{} queued prompts, {} interrupts, {} decisions, {} terminations; {} numbered lines, {} events persisted; readers connected {} times",
        tally.queued,
        tally.interrupts,
        tally.decisions,
        tally.terminated,
        tally.lines,
        tally.events,
        tally.connections
    );
    println!(
        "{} faults; the longest pause of output: {:.1} s",
        outcome.faults.len(),
        tally.worst_pause.as_secs_f64()
    );
    println!(
        "\nservice           processes  longest    memory      most      growth  descriptors  most    growth"
    );
    for service in &outcome.services {
        println!("{}", row(service));
    }
    for wrong in &tally.wrong {
        println!("    {wrong}");
    }
    let cut_short = if outcome.is_cut_short { ", cut short" } else { "" };
    let verdict = if outcome.is_good() { "good" } else { "FAILED" };
    println!("\n{verdict} after {:.1} min{cut_short}", outcome.time.as_secs_f64() / 60.0);
}

fn row(usage: &ServiceUsage) -> String {
    let mb = |bytes: f64| bytes / (1024.0 * 1024.0);
    let growth =
        |growth: Option<f64>| growth.map_or("-".to_owned(), |growth| format!("{growth:+.1}/h"));
    format!(
        "{:<17} {:>9} {:>4} min {:>6.1} MB {:>6.1} MB {:>11} {:>12} {:>5} {:>9}{}",
        usage.service,
        usage.processes,
        usage.longest_life.as_secs() / 60,
        mb(usage.memory_bytes as f64),
        mb(usage.memory_bytes_max as f64),
        growth(usage.memory_growth.map(mb)),
        usage.descriptors,
        usage.descriptors_max,
        growth(usage.descriptors_growth),
        if usage.grows() { "  GROWS" } else { "" }
    )
}
