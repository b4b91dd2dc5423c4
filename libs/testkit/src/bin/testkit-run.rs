//! Runs a command with one Postgres for all its tests: `testkit-run cargo test`. Exits with the
//! command's exit code.

use std::process::{Command, ExitCode};

use anyhow::Context as _;
use testkit::postgres::{Server, URL_VARIABLE};

fn main() -> anyhow::Result<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    let program = args.next().context("usage: testkit-run COMMAND [ARG ...]")?;
    let server = Server::start()?;
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(server.ready())?;
    let status = Command::new(program).args(args).env(URL_VARIABLE, server.url()).status()?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from))
}
