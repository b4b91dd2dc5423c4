//! Logs to standard error: text for people, JSON for machines. `RUST_LOG` sets the level.

use tracing_subscriber::{EnvFilter, fmt};

/// Sets the process's subscriber; a second call changes nothing.
pub fn init(json: bool) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,async_nats=warn,sqlx=warn"));
    let logs = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let _ = if json { logs.json().flatten_event(true).try_init() } else { logs.with_ansi(false).try_init() };
}
