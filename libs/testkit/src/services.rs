//! Services as they are deployed: their own binaries, for tests of their neighbours.

use std::{
    path::PathBuf,
    process::{Child, Command},
};

use anyhow::Context as _;

use crate::process::spawn_tied;

/// A running service, killed when dropped.
#[derive(Debug)]
pub struct Service(Child);

/// Where `cargo build` puts our binaries: beside this one, or a folder above a test's own.
///
/// # Errors
/// When the binary was not built.
pub fn binary(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let found =
        own.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.is_file());
    found
        .with_context(|| format!("{name} is not beside {}: run `cargo build` first", own.display()))
}

/// Starts a service with these settings.
///
/// # Errors
/// When its binary was not built.
pub fn start(name: &str, settings: &[(&str, &str)]) -> anyhow::Result<Service> {
    let mut command = Command::new(binary(name)?);
    command.env("AOD_ADMIN_ADDR", "127.0.0.1:0").envs(settings.iter().copied());
    Ok(Service(spawn_tied(&command)?))
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
