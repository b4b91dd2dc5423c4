//! The chain of a session's event log: each event names the one it continues.
//!
//! A stream that lost its tail, was restored from a snapshot or was written to by someone with an
//! older view shows up here: an event that does not continue the persisted log. It is never
//! persisted over the gap; the log's owner reads the agent's output again.

use contract::session::{SessionEvent, session_event::Kind};

/// Names one event of a session. An id alone does not: a stream that was set back gives it again,
/// to another event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    pub id: u64,
    pub tag: u64,
}

impl Mark {
    #[must_use]
    pub fn of(id: u64, event: &SessionEvent) -> Self {
        Self { id, tag: event.tag }
    }

    /// What an event follows, where it says so.
    #[must_use]
    pub fn followed_by(event: &SessionEvent) -> Option<Self> {
        Some(Self { id: event.follows?, tag: event.follows_tag })
    }
}

/// The Managed Agents API shows an event as up to so many, each a microsecond later than the one
/// before it.
pub const PARTS_MAX: i64 = 256;

/// The time of the event after the newest one: times ascend within a session, whatever its writers'
/// clocks say. After anything but raw output there is room for all that the newest event shows as.
#[must_use]
pub fn next_time(newest: Option<&SessionEvent>, now_us: i64) -> i64 {
    newest.map_or(now_us, |newest| {
        now_us.max(newest.at_us.saturating_add(step(newest.kind.as_ref())))
    })
}

/// How much later than an event of this kind the next one is at least, in microseconds.
#[must_use]
pub const fn step(newest: Option<&Kind>) -> i64 {
    match newest {
        Some(Kind::Output(_)) => 1,
        _ => PARTS_MAX,
    }
}

/// How an event of the stream relates to the persisted log of its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// The next event.
    Continues,
    /// Persisted already, or an id that was used before.
    Old,
    /// Something is missing in between, or the writer did not know the newest event.
    Broken,
}

/// Relates an event to the newest persisted one of its session (`None`: there is none). Events of
/// earlier releases do not name their predecessor and are always accepted.
#[must_use]
pub fn link(persisted: Option<Mark>, event_id: u64, follows: Option<Mark>) -> Link {
    if persisted.is_some_and(|newest| event_id <= newest.id) {
        return Link::Old;
    }
    match follows {
        Some(follows) if follows != persisted.unwrap_or_default() => Link::Broken,
        _ => Link::Continues,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_next_event_continues_the_log() {
        let mark = |id, tag| Some(Mark { id, tag });
        assert_eq!(link(None, 7, mark(0, 0)), Link::Continues);
        assert_eq!(link(mark(7, 1), 9, mark(7, 1)), Link::Continues);
        assert_eq!(link(mark(7, 1), 7, mark(5, 1)), Link::Old);
        assert_eq!(link(mark(7, 1), 9, mark(8, 1)), Link::Broken, "8 is missing");
        assert_eq!(link(mark(7, 1), 9, mark(5, 1)), Link::Broken, "its writer did not know 7");
        assert_eq!(link(mark(7, 1), 9, mark(7, 2)), Link::Broken, "that was another 7");
        assert_eq!(link(None, 9, mark(8, 1)), Link::Broken);
        assert_eq!(link(mark(7, 1), 9, None), Link::Continues, "an earlier release");
    }
}
