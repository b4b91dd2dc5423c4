//! `aod`: client of the public API, operator commands, and `aod dev`, which runs the whole stack on
//! one machine.

#[macro_use]
mod output;
mod admin;
mod budget;
mod cli;
mod client;
mod credential;
mod deploy;
mod dev;
mod prompt;
mod random;
mod run;
mod secret_input;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    // One thread: children that are to end with this process are tied to the thread that started
    // them.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime {
        Ok(runtime) => runtime.block_on(cli::Cli::parse().run()),
        Err(error) => {
            note!("aod: cannot start: {error}");
            ExitCode::FAILURE
        }
    }
}
