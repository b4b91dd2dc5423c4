//! The event log in Postgres and its streams: projected, read, trimmed, and removed by age.

pub mod event_log;
pub mod positions;
pub mod projection;
pub mod projector;
pub mod retention;
pub mod streams;
