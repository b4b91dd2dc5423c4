//! Child processes that end with the test process, however that ends.

use std::{
    process::{Child, Command, Stdio},
    sync::mpsc,
};

use anyhow::Context as _;

/// Starts a command that gets TERM when this process is gone. The kernel ties that to the thread that started it, so that thread stays.
pub fn spawn_tied(command: Command) -> anyhow::Result<Child> {
    let (sender, receiver) = mpsc::channel();
    let mut tied = Command::new("setpriv");
    // A command that is setpriv already says itself which signal it wants.
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

/// A port that is free now: at random, and not from the range that the kernel gives to outgoing connections, so that no other process takes
/// it before its server does.
///
/// # Errors
/// When none is free.
pub fn free_port() -> anyhow::Result<u16> {
    for _ in 0..1000 {
        let [a, b, ..] = *uuid::Uuid::new_v4().as_bytes();
        // Below are the blocks of `aod dev`.
        let port = 30_240 + u16::from_be_bytes([a, b]) % 2_500;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    anyhow::bail!("no free port")
}
