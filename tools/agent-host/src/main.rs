//! The agent host: runs an agent CLI inside a sandbox, speaks the CLI's own two-way protocol, and
//! keeps a journal of everything.
//!
//! [`host`] is the process, [`core`] decides what it does, [`adapters`] know the CLIs; [`store`]
//! writes the journal, [`state`] is what a journal says is open, [`attach`] carries it to the
//! runner; [`process`] starts and ends programs, [`prepare`] works in the user's home.
//! docs/agent-host.md describes how a runner uses it.

mod adapters;
mod attach;
mod client;
mod core;
mod custom_tools;
mod host;
mod http;
mod permissions;
mod prepare;
mod process;
mod state;
mod store;

use std::{path::Path, process::ExitCode};

const USAGE: &str = "\
Run an agent CLI inside a sandbox and keep a journal of what it does

Usage:
  agent-host start --dir DIR --spec FILE    Start the host detached, unless it runs; return when it serves
                             [--keep]       Leave a host alone that runs under another revision
  agent-host attach --dir DIR --from OFFSET Write the journal from an offset; pass inputs on from standard input
  agent-host dump --dir DIR                 Print the journal for people
  agent-host runtimes                       Print what each runtime supports, as Markdown
  agent-host root COMMAND ...               Become root first, where the sandbox lets its user; the CLI keeps running as that user

Exit status of attach: 0 the host ended, 3 the host was lost (start it again), 4 the journal has no such offset";

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    // Whom programs run as, where the host became root.
    let mut user = String::new();
    match arguments.first().map(String::as_str) {
        Some("root") => {
            arguments.remove(0);
            user = process::become_root(&arguments);
        }
        Some("root-of") if arguments.len() > 1 => {
            arguments.remove(0);
            user = arguments.remove(0);
        }
        _ => {}
    }
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let failed = |message: &str| {
        eprintln!("agent-host: {message}");
        ExitCode::FAILURE
    };
    match words.as_slice() {
        ["start", "--dir", dir, "--spec", spec, keep @ ..] if matches!(keep, [] | ["--keep"]) => {
            match host::start(Path::new(dir), Path::new(spec), &user, !keep.is_empty()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(message) => failed(&message),
            }
        }
        ["attach", "--dir", dir, "--from", offset] => {
            let Ok(offset) = offset.parse() else { return failed("the offset is not a number") };
            attach::run(Path::new(dir), offset).unwrap_or_else(|error| failed(&error.to_string()))
        }
        ["dump", "--dir", dir] => {
            attach::dump(Path::new(dir)).unwrap_or_else(|error| failed(&error.to_string()))
        }
        ["runtimes"] => {
            print!("{}", adapters::document());
            ExitCode::SUCCESS
        }
        // What the host itself starts, or its CLI.
        ["run", "--dir", dir] => host::run(Path::new(dir)),
        ["tools", name] => custom_tools::serve(name),
        ["exec", ..] => process::exec(arguments.get(1..).unwrap_or_default()),
        ["--help" | "-h" | "help"] => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

/// A variable of this process's environment, where it is text.
fn variable(name: &str) -> Option<String> {
    std::env::var_os(name)?.into_string().ok()
}

/// A word that no one guesses.
fn random_hex() -> String {
    let mut bytes = [0_u8; 16];
    // Without random bytes there is no secret to keep: the file is part of every sandbox.
    let _ = std::fs::File::open("/dev/urandom")
        .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut bytes));
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Microseconds since the epoch.
fn now_us() -> u64 {
    let elapsed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    elapsed.map_or(0, |elapsed| u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX))
}

/// Milliseconds of a clock that only goes forward, and on while the sandbox sleeps.
fn monotonic_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1000
        + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000
}
