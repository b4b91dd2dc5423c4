//! Ending a turn or a session from outside of its runner: a deadline, or a user's termination. Both append to the log, with the
//! expectation that nothing was appended since; so the log alone decides who was first.

use contract::session::{SessionEvent, session_event::Kind};

/// What is to be ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// One turn, which is overdue.
    Deadline { turn: u32 },
    /// The session, whatever it does.
    Termination,
}

/// What is known of the log.
#[derive(Clone, Copy, Debug)]
pub struct Log<'a> {
    /// The newest event in the stream.
    pub streamed: Option<(u64, &'a SessionEvent)>,
    /// The id of the newest persisted event; 0: none.
    pub persisted: u64,
    /// How far the projector got in the stream.
    pub projected: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Append the end, if `expected` is still the subject's last sequence. It continues the event `follows`.
    Append { expected: u64, follows: u64 },
    /// Decide again later: the projector has not caught up.
    Wait,
    /// The log has ended already.
    Ended,
}

/// Decides how to end. A deadline is judged on complete information: while events wait to be projected, the turn may have ended.
#[must_use]
pub fn step(ending: Ending, log: Log<'_>) -> Step {
    let Some((sequence, event)) = log.streamed else {
        return Step::Append { expected: 0, follows: log.persisted };
    };
    if matches!(event.kind, Some(Kind::Terminated(_))) {
        return Step::Ended;
    }
    let on_its_way = sequence > log.projected;
    if let Ending::Deadline { turn } = ending
        && sequence > log.persisted
    {
        if event.turn > turn || (event.turn == turn && matches!(event.kind, Some(Kind::TurnEnded(_)))) {
            return Step::Ended;
        }
        if on_its_way {
            return Step::Wait;
        }
    }
    // An event that the projector passed without persisting it is not part of the log.
    let follows = if on_its_way { sequence.max(log.persisted) } else { log.persisted };
    Step::Append { expected: sequence, follows }
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
        let deadline = |event, projected| {
            step(Ending::Deadline { turn: 1 }, Log { streamed: Some((9, event)), persisted: 9.min(projected), projected })
        };
        assert_eq!(deadline(&output, 9), Step::Append { expected: 9, follows: 9 });
        assert_eq!(deadline(&output, 8), Step::Wait);
        assert_eq!(deadline(&ended, 8), Step::Ended, "its exit is on the way to Postgres");
    }

    #[test]
    fn a_termination_is_appended_once_and_never_below_persisted_events() {
        let (output, terminated) = (event(1, Kind::Output(Output::default())), event(1, Kind::Terminated(Terminated {})));
        let termination = |streamed, persisted| step(Ending::Termination, Log { streamed, persisted, projected: 0 });
        assert_eq!(termination(Some((9, &output)), 5), Step::Append { expected: 9, follows: 9 });
        assert_eq!(termination(Some((9, &terminated)), 9), Step::Ended);
        assert_eq!(termination(Some((9, &output)), 12), Step::Append { expected: 9, follows: 12 }, "the stream was set back");
        assert_eq!(termination(None, 12), Step::Append { expected: 0, follows: 12 }, "the stream was trimmed");
    }
}
