//! Models of what processes hold: the stream, rows of Postgres, runners, schedulers and agents.

use std::collections::BTreeMap;

use contract::session::{Checkpoint, SessionEvent};
use rules::{chain::Mark, ending::Ending, ownership::Held};
use types::{SessionStatus, TurnStatus};
use uuid::Uuid;

pub type Entry = (u64, usize, SessionEvent);

#[derive(Clone, Debug)]
pub struct Stream {
    pub created: i64,
    pub first: u64,
    pub last: u64,
    pub trimmed_through: u64,
    pub entries: Vec<Entry>,
}

impl Stream {
    pub fn newest(&self, session: usize) -> Option<(u64, &SessionEvent)> {
        self.entries
            .iter()
            .rev()
            .find(|(_, of, _)| *of == session)
            .map(|(id, _, event)| (*id, event))
    }

    pub fn append(&mut self, session: usize, expected: u64, event: SessionEvent) -> Option<u64> {
        if self.newest(session).map_or(0, |(id, _)| id) != expected {
            return None;
        }
        self.last += 1;
        self.entries.push((self.last, session, event));
        Some(self.last)
    }
}

/// A session with its one turn, as Postgres has it.
#[derive(Clone, Debug)]
pub struct Row {
    pub session: SessionStatus,
    pub turn: TurnStatus,
    pub owner: Option<Uuid>,
    pub epoch: u32,
    pub claimed_at: u64,
    pub offer_after: u64,
    pub offers: u32,
    pub deadline_at: u64,
}

impl Row {
    pub fn is_open(&self) -> bool {
        matches!(self.turn, TurnStatus::Pending | TurnStatus::Running)
    }

    pub fn release(&mut self, now: u64) {
        (self.owner, self.offer_after, self.offers) = (None, now, 0);
    }
}

#[derive(Debug)]
pub struct Agent {
    pub size: u64,
    pub produced: u64,
    pub started: bool,
}

#[derive(Debug)]
pub struct Runner {
    pub lease: Uuid,
    pub registered: bool,
    pub holds: BTreeMap<usize, Hold>,
    /// What a heartbeat on its way says.
    pub heartbeat: Option<Vec<(Held, Option<u64>)>>,
    pub paused_until: u64,
}

#[derive(Clone, Debug)]
pub struct Hold {
    pub epoch: u32,
    pub phase: Phase,
}

#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a simulation holds a few of them")]
pub enum Phase {
    /// Claimed, with the newest persisted event and how far the projector was.
    Claimed {
        persisted: Option<Box<(u64, SessionEvent)>>,
        projected: u64,
    },
    Open {
        expected: u64,
        follows: Mark,
        floor: u64,
        checkpoint: Checkpoint,
        taken_over: bool,
        sent: Option<SessionEvent>,
        acked: Option<u64>,
    },
    Ended(u64),
}

/// An end that a scheduler is about to append.
#[derive(Debug)]
pub struct End {
    pub session: usize,
    pub ending: Ending,
    pub event: Option<(u64, SessionEvent)>,
    /// The id of the termination in the stream, and until when the projector is waited for.
    pub appended: Option<(u64, u64)>,
}

#[derive(Debug, Default)]
pub struct Scheduler {
    pub projector: Option<(u64, Vec<Entry>)>,
    pub end: Option<End>,
    /// Up to where it emptied the stream, and has not told Postgres of.
    pub raised: Option<u64>,
}
