//! A running stack for black-box tests: `aod dev`, spoken to over HTTP as any user would.

pub mod faults;
pub mod idle;
pub mod reference;
mod stack;
mod stream;

pub use stack::{Answer, Options, Stack};
pub use stream::Events;
