//! A running stack for black-box tests: `aod dev`, spoken to over HTTP as any user would.

mod agents;
pub mod faults;
pub mod idle;
pub mod reference;
mod stack;
mod stream;

pub use agents::for_each_agent;
pub use stack::{Answer, Options, Stack};
pub use stream::Events;
