//! The decisions under test.

use rules::{
    chain::{self, Link, Mark},
    ending::{self, Ending, Log, Step},
    ownership::{self, Verdict},
    position::{self, Newest, Position},
};
use types::SessionStatus;
use uuid::Uuid;

/// The decisions under test, so that a wrong one can be planted.
#[derive(Clone, Copy)]
pub struct Decisions {
    pub link: fn(Option<Mark>, u64, Option<Mark>) -> Link,
    pub ending: fn(Ending, Log<'_>) -> Step,
    pub claim: fn(SessionStatus, ownership::Turn, Uuid) -> Verdict,
    pub position: for<'a> fn(Option<Newest<'a>>, Option<Newest<'a>>, u32, u32) -> Position,
}

pub const RIGHT: Decisions = Decisions {
    link: chain::link,
    ending: ending::step,
    claim: ownership::claim,
    position: position::position,
};
