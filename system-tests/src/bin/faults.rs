//! `make faults`: attacks a stack of its own, on loopback, and prints what became of its sessions.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use system_tests::faults::{self, FAULTS, Outcome, Plan};

/// Attack a stack and count what is lost.
#[derive(Parser)]
struct Args {
    /// The same seed disturbs in the same way
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[arg(long, default_value_t = 20)]
    sessions: usize,
    /// How long each session prints, in seconds
    #[arg(long, default_value_t = 8)]
    seconds: u64,
    /// How often each fault strikes
    #[arg(long, default_value_t = 2)]
    injections: usize,
    /// Faults whose name holds this text, and no others
    #[arg(long)]
    only: Option<String>,
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let plan = Plan {
        seed: args.seed,
        sessions: args.sessions,
        seconds: args.seconds,
        injections: args.injections,
    };
    let wanted = |name: &str| args.only.as_ref().is_none_or(|only| name.contains(only.as_str()));
    println!("seed {}\n{}", args.seed, Outcome::HEADER);
    let mut good = true;
    for fault in FAULTS.iter().filter(|fault| wanted(fault.name)) {
        // A stack for each, so that one fault's consequences are not another's.
        let stack = faults::stack().await?;
        match faults::attack(&stack, std::slice::from_ref(fault), fault.name, plan).await {
            Ok(outcome) => {
                good &= outcome.is_good();
                println!("{outcome}");
            }
            Err(error) => {
                good = false;
                println!("{:<32} {error:#}", fault.name);
            }
        }
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
