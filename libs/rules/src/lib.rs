//! The decisions of the core, without any I/O: who owns a turn, what an event changes, whether an
//! event continues its log, who may end a turn, when a stream is not the one that was published to.
//!
//! The scheduler and the runner read what a decision needs, decide here, and write the result.
//! `tests/simulation.rs` puts all of it together with a model of Postgres, the stream and the
//! queue, and lets everything fail that can.

pub mod budget;
pub mod chain;
pub mod ending;
pub mod generation;
pub mod inputs;
pub mod ownership;
pub mod position;
pub mod spares;
pub mod state;
