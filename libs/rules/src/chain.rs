//! The chain of a session's event log: each event names the one it continues.
//!
//! A stream that lost its tail, was restored from a snapshot or was written to by someone with an older view shows up here: an event
//! that does not continue the persisted log. It is never persisted over the gap; the log's owner reads the agent's output again.

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

/// Relates an event to the newest persisted one of its session (`None`: there is none). Events of earlier releases do not say what they
/// follow, and are taken as they come.
#[must_use]
pub fn link(persisted: Option<u64>, event_id: u64, follows: Option<u64>) -> Link {
    if persisted.is_some_and(|newest| event_id <= newest) {
        return Link::Old;
    }
    match follows {
        Some(follows) if follows != persisted.unwrap_or(0) => Link::Broken,
        _ => Link::Continues,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_next_event_continues_the_log() {
        assert_eq!(link(None, 7, Some(0)), Link::Continues);
        assert_eq!(link(Some(7), 9, Some(7)), Link::Continues);
        assert_eq!(link(Some(7), 7, Some(5)), Link::Old);
        assert_eq!(link(Some(7), 9, Some(8)), Link::Broken, "8 is missing");
        assert_eq!(link(Some(7), 9, Some(5)), Link::Broken, "its writer did not know 7");
        assert_eq!(link(None, 9, Some(8)), Link::Broken);
        assert_eq!(link(Some(7), 9, None), Link::Continues, "an earlier release");
    }
}
