//! The only crate that speaks NATS.
//!
//! [`Bus`] connects and calls; [`responder`] serves requests; [`log`] appends to and follows the
//! streams; [`live`] subscribes to what they republish; [`work`] takes jobs from a work queue;
//! [`topology`] makes streams and consumers as the contract declares them.
//!
//! Policy lives here and not in handlers: deadlines, acknowledgements, redelivery, trace headers.

mod client;
pub mod dead_letters;
pub mod live;
pub mod log;
pub mod responder;
mod rpc_error;
pub mod topology;
pub mod trace;
pub mod vault;
pub mod work;

pub use client::{Bus, Config, ConnectError};
pub use rpc_error::RpcError;
