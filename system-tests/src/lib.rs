//! A running stack for black-box tests: `aod dev`, spoken to over HTTP as any user would.

mod agents;
pub mod faults;
pub mod idle;
mod lines;
mod reader;
pub mod reference;
pub mod soak;
mod stack;
mod stream;

pub use agents::{RUNTIMES, for_each_agent};
pub use stack::{Answer, Options, Stack, Stuck};
pub use stream::Events;
