//! The server as its users meet it: its binary, real sandboxes, the published clients.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod budget;
mod chaos;
mod clients;
mod escape;
mod images;
mod isolation;
mod lifetime;
mod runsc;
mod secrets;
mod server;
mod users;
