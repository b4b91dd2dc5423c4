//! Real servers for tests. Never a mock of what can be started.
//!
//! One Postgres serves a whole run (`testkit-run COMMAND` starts it and tells the tests by [`postgres::URL_VARIABLE`]); where a test
//! runs alone, its process starts one for itself. Each test has a database of its own, and a nats-server of its own.

pub mod bench;
pub mod docker;
pub mod nats;
pub mod postgres;
mod process;
pub mod services;
pub mod tls;

pub use nats::Nats;
pub use postgres::Database;
pub use process::{free_port, spawn_tied};

use std::{future::Future, time::Duration};

/// Waits until a condition holds, for 20 s at most. Tests wait on states, never on time.
///
/// # Panics
/// When it does not come to hold.
pub async fn eventually<F: Future<Output = bool>>(what: &str, condition: impl Fn() -> F) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while tokio::time::Instant::now() < deadline {
        if condition().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    #[expect(clippy::panic, reason = "this is how a test fails")]
    {
        panic!("{what}: not within 20 s");
    }
}
