//! Ending a turn or a session from outside of its runner: a deadline, or a user's termination. Both
//! append to the log, with the expectation that nothing was appended since; so the log alone
//! decides who was first.

use contract::session::{SessionEvent, session_event::Kind};

use crate::chain::Mark;

/// What is to be ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// One turn, which is overdue.
    Deadline { turn: u32 },
    /// The session, whatever it does.
    Termination,
    /// Nothing: an idle session's change is told.
    Update,
}

/// What is known of the log: its newest event in the stream and in Postgres, each with its id.
#[derive(Clone, Copy, Debug)]
pub struct Log<'a> {
    pub streamed: Option<(u64, &'a SessionEvent)>,
    pub persisted: Option<(u64, &'a SessionEvent)>,
    /// How far the projector got in the stream.
    pub projected: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Append the end, if `expected` is still the subject's last sequence. It continues the event
    /// `follows`.
    Append { expected: u64, follows: Mark },
    /// Decide again later: the projector has not caught up.
    Wait,
    /// The log has ended already.
    Ended,
}

/// Decides how to end. A deadline is judged on complete information: while events wait to be
/// projected, the turn may have ended.
#[must_use]
pub fn step(ending: Ending, log: Log<'_>) -> Step {
    // What the projector has passed is persisted, or was not part of the log.
    let waiting = log.streamed.filter(|(id, _)| *id > log.projected);
    let newest = waiting.or(log.persisted);
    let kind = newest.and_then(|(_, event)| event.kind.as_ref());
    if matches!(kind, Some(Kind::Terminated(_))) {
        return Step::Ended;
    }
    if let (Ending::Deadline { turn }, Some((_, event))) = (ending, newest) {
        if event.turn > turn || (event.turn == turn && matches!(kind, Some(Kind::TurnEnded(_)))) {
            return Step::Ended;
        }
        if waiting.is_some() {
            return Step::Wait;
        }
    }
    Step::Append {
        expected: log.streamed.map_or(0, |(id, _)| id),
        follows: newest.map_or(Mark::default(), |(id, event)| Mark::of(id, event)),
    }
}

#[cfg(test)]
mod tests {
    use contract::session::{Output, Terminated, TurnEnded};

    use super::*;

    fn event(turn: u32, kind: Kind) -> SessionEvent {
        SessionEvent { turn, kind: Some(kind), ..SessionEvent::default() }
    }

    #[test]
    fn a_deadline_waits_for_the_projector_and_never_overrules_an_end() {
        let output = event(1, Kind::Output(Output::default()));
        let ended = event(1, Kind::TurnEnded(TurnEnded::default()));
        let deadline = |streamed, persisted, projected| {
            step(Ending::Deadline { turn: 1 }, Log { streamed, persisted, projected })
        };
        assert_eq!(
            deadline(Some((9, &output)), Some((9, &output)), 9),
            Step::Append { expected: 9, follows: Mark { id: 9, tag: 0 } }
        );
        assert_eq!(deadline(Some((9, &output)), Some((7, &output)), 8), Step::Wait);
        assert_eq!(
            deadline(Some((9, &ended)), Some((7, &output)), 8),
            Step::Ended,
            "its exit is on the way to Postgres"
        );
        assert_eq!(
            deadline(None, Some((7, &ended)), 8),
            Step::Ended,
            "its exit was trimmed from the stream"
        );
        assert_eq!(
            deadline(Some((9, &ended)), Some((7, &output)), 20),
            Step::Append { expected: 9, follows: Mark { id: 7, tag: 0 } },
            "the exit was lost"
        );
    }

    #[test]
    fn a_termination_is_appended_once() {
        let (output, terminated) = (
            event(1, Kind::Output(Output::default())),
            event(1, Kind::Terminated(Terminated::default())),
        );
        let termination = |streamed, persisted| {
            step(Ending::Termination, Log { streamed, persisted, projected: 8 })
        };
        assert_eq!(
            termination(Some((9, &output)), Some((5, &output))),
            Step::Append { expected: 9, follows: Mark { id: 9, tag: 0 } }
        );
        assert_eq!(termination(Some((9, &terminated)), Some((5, &output))), Step::Ended);
        assert_eq!(
            termination(Some((4, &output)), Some((8, &output))),
            Step::Append { expected: 4, follows: Mark { id: 8, tag: 0 } },
            "set back"
        );
        assert_eq!(
            termination(None, Some((8, &output))),
            Step::Append { expected: 0, follows: Mark { id: 8, tag: 0 } },
            "trimmed"
        );
    }
}
