//! Child processes that end with the test process, however it ends.

use std::{
    process::{Child, Command, Stdio},
    sync::mpsc,
};

use anyhow::Context as _;

/// Starts a command that receives TERM when this process ends. The kernel sends it when the thread
/// that started the command exits, so that thread is kept.
pub fn spawn_tied(command: &Command) -> anyhow::Result<Child> {
    let (sender, receiver) = mpsc::channel();
    let mut tied = Command::new("setpriv");
    // A command that already runs setpriv names its own signal.
    if command.get_program() != "setpriv" {
        tied.args(["--pdeathsig", "TERM", "--"]).arg(command.get_program());
    }
    tied.args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => tied.env(name, value),
            None => tied.env_remove(name),
        };
    }
    tied.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    std::thread::spawn(move || {
        let _ = sender.send(tied.spawn());
        loop {
            std::thread::park();
        }
    });
    receiver.recv()?.context("setpriv (util-linux) starts the servers of tests")
}

/// Returns a random port that is free now. It is outside of the range that the kernel uses for
/// outgoing connections, so that none of these takes it before the server does.
///
/// # Errors
/// When no port is free.
pub fn free_port() -> anyhow::Result<u16> {
    for _ in 0..1000 {
        let [a, b, ..] = *uuid::Uuid::new_v4().as_bytes();
        // The ports below are those of `aod dev`.
        let port = 30_240 + u16::from_be_bytes([a, b]) % 2_500;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    anyhow::bail!("no free port")
}
