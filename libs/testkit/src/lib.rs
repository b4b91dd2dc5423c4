//! Real servers for tests. Never a mock of what can be started.
//!
//! One Postgres serves a whole run (`testkit-run COMMAND` starts it and passes its URL in
//! [`postgres::URL_VARIABLE`]); the process of a test that runs alone starts its own. Each test has
//! a database of its own, and a nats-server of its own.

pub mod bench;
pub mod containers;
pub mod https;
pub mod nats;
pub mod postgres;
mod process;
pub mod s3;
pub mod services;
pub mod tls;

pub use nats::Nats;
pub use postgres::Database;
pub use process::{free_port, spawn_tied};
pub use s3::S3;

use std::{future::Future, path::PathBuf, time::Duration};

/// The root file system of Sprites that the set-up makes.
pub fn rootfs() -> PathBuf {
    tools().join("rootfs")
}

/// Where the set-up installs what is not of the distribution.
fn tools() -> PathBuf {
    let of = |name: &str, below: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(|dir| PathBuf::from(dir).join(below))
    };
    let tools = of("AOD_TOOLS_DIR", "")
        .or_else(|| of("XDG_DATA_HOME", "aod/tools"))
        .or_else(|| of("HOME", ".local/share/aod/tools"));
    tools.unwrap_or_else(|| "/var/lib/aod/tools".into())
}

/// Where a program may be: the set-up's first, then those on PATH.
fn programs(name: &str) -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(tools().join("bin")).chain(std::env::split_paths(&path));
    folders.map(|folder| folder.join(name)).collect()
}

/// Waits until a condition holds, for 20 s at most. Tests wait on states, never on time.
///
/// # Panics
/// When it does not come to hold.
pub async fn eventually<F: Future<Output = bool>>(what: &str, condition: impl Fn() -> F) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    while tokio::time::Instant::now() < deadline {
        if condition().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    #[expect(clippy::panic, reason = "this is how a test fails")]
    {
        panic!("{what}: not within 60 s");
    }
}

/// The first release of gVisor whose kernel runs the programs of our root file system is later than
/// Debian 12's.
const OLDEST_GVISOR: u32 = 20_230_501;

/// Whether a `runsc` is there that can be used.
#[must_use]
pub fn has_gvisor() -> bool {
    let version = std::process::Command::new("runsc").arg("--version").output();
    let text = version
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    let release = text
        .split(|c: char| !c.is_ascii_digit())
        .find(|part| part.len() == 8)
        .and_then(|part| part.parse::<u32>().ok());
    let usable = release.is_some_and(|release| release >= OLDEST_GVISOR);
    if !usable {
        eprintln!("skipped: no runsc of {OLDEST_GVISOR} or later is installed");
    }
    usable
}
