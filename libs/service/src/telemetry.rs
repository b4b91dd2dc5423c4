//! Logs to standard error: text for people, JSON for machines. `RUST_LOG` sets the level.

use tracing_subscriber::{EnvFilter, filter::LevelFilter, fmt};

/// Libraries that print what they carry at level TRACE, secrets among it. They are held at DEBUG, whatever `RUST_LOG` says.
const CARRIERS: [&str; 3] = ["async_nats", "tokio_tungstenite", "tungstenite"];

/// Sets the process's subscriber; a second call changes nothing.
pub fn init(json: bool) {
    let mut filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,async_nats=warn,sqlx=warn"));
    // Where nobody asks for TRACE there is nothing to hold.
    for carrier in CARRIERS {
        let capped = filter.max_level_hint().is_none_or(|level| level == LevelFilter::TRACE);
        if let (true, Ok(directive)) = (capped, format!("{carrier}=debug").parse()) {
            filter = filter.add_directive(directive);
        }
    }
    let logs = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let _ = if json { logs.json().flatten_event(true).try_init() } else { logs.with_ansi(false).try_init() };
}
