//! The Managed Agents API under `/v1` (docs/managed-agents-api.md): a second view of the resources
//! that the routes without `/v1` show.
//!
//! [`error`] turns every failed answer under `/v1` into Anthropic's envelope; [`ids`] has the
//! prefixed forms of ids; [`page`] the cursors; [`query`] the query strings. A file per resource
//! reads and shows it. What may be done is decided by the scheduler, for both views.

pub mod agents;
pub mod environments;
pub mod error;
pub mod events;
pub mod files;
pub mod ids;
pub mod listing;
pub mod metadata;
pub mod model;
pub mod page;
pub mod path;
pub mod previews;
pub mod query;
pub mod resources;
pub mod send;
pub mod sessions;
pub mod thread;
pub mod threads;
pub mod tools;
pub mod vault_credentials;
pub mod vaults;

use types::Timestamp;

/// A time as this API writes it.
pub fn time(micros: i64) -> String {
    let mut text = Timestamp::from_unix_micros(micros).to_string();
    if let Some(utc) = text.strip_suffix("+00:00").map(str::len) {
        text.truncate(utc);
        text.push('Z');
    }
    text
}
