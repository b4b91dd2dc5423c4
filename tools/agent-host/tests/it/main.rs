//! The host as a process: started, attached to, killed.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod clis;
mod figures;
mod shell;
mod support;
