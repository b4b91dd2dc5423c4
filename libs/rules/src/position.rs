//! Where a runner that claimed a turn continues its session's log.

use contract::session::{Checkpoint, SessionEvent, session_event::Kind};

use crate::chain::Mark;

/// The newest event of a session, from the stream or from Postgres.
#[derive(Clone, Copy, Debug)]
pub struct Newest<'a> {
    pub id: u64,
    pub event: &'a SessionEvent,
}

/// Where to continue.
#[derive(Clone, Debug, PartialEq)]
pub enum Position {
    /// Append with `expected` as the subject's last sequence; the next event continues the event
    /// `follows`, which was written at `at_us`.
    Open { expected: u64, follows: Mark, checkpoint: Box<Checkpoint>, at_us: i64 },
    /// The turn's end is in the log, with this id.
    Ended { id: u64 },
    /// The session was terminated.
    Terminated,
    /// A later claim has written.
    Superseded,
}

/// Decides from the newest event in the stream and the newest persisted one, which the claim
/// brought. The later of the two counts: a stream may have been trimmed, recreated or set back.
/// What is appended to one that was set back may get an id that was used before, which its
/// acknowledgement shows.
#[must_use]
pub fn position(
    streamed: Option<Newest<'_>>,
    persisted: Option<Newest<'_>>,
    turn: u32,
    epoch: u32,
) -> Position {
    let expected = streamed.map_or(0, |newest| newest.id);
    let Some(newest) = [persisted, streamed].into_iter().flatten().max_by_key(|newest| newest.id)
    else {
        return Position::Open {
            expected,
            follows: Mark::default(),
            checkpoint: Box::default(),
            at_us: 0,
        };
    };
    let open = |checkpoint: Checkpoint| Position::Open {
        expected,
        follows: Mark::of(newest.id, newest.event),
        checkpoint: Box::new(checkpoint),
        at_us: newest.event.at_us,
    };
    match &newest.event.kind {
        Some(Kind::Terminated(_)) => Position::Terminated,
        _ if newest.event.turn != turn => open(following(newest.event.checkpoint.as_ref())),
        Some(Kind::TurnEnded(_)) => Position::Ended { id: newest.id },
        _ if newest.event.epoch > epoch => Position::Superseded,
        _ => open(newest.event.checkpoint.clone().unwrap_or_default()),
    }
}

/// A new turn's checkpoint: the agent host's journal and the model gateway's entries continue, all
/// else begins.
fn following(former: Option<&Checkpoint>) -> Checkpoint {
    let Some(former) = former else { return Checkpoint::default() };
    Checkpoint {
        journal_offset: former.journal_offset,
        metered_through: former.metered_through,
        open_model_requests: former.open_model_requests.clone(),
        ..Checkpoint::default()
    }
}

#[cfg(test)]
mod tests {
    use contract::session::{Output, TakenOver, TurnEnded};

    use super::*;

    fn event(epoch: u32, kind: Kind, stdout_offset: u64) -> SessionEvent {
        let checkpoint = Some(Checkpoint { stdout_offset, ..Checkpoint::default() });
        SessionEvent {
            turn: 1,
            epoch,
            checkpoint,
            tag: 1,
            kind: Some(kind),
            ..SessionEvent::default()
        }
    }

    #[test]
    fn the_later_of_stream_and_claim_counts() {
        let output = event(1, Kind::Output(Output::default()), 70);
        let taken_over = event(1, Kind::TakenOver(TakenOver {}), 40);
        let (output, taken_over) =
            (SessionEvent { at_us: 9, ..output }, SessionEvent { at_us: 5, ..taken_over });
        let (streamed, persisted) =
            (Newest { id: 9, event: &output }, Newest { id: 5, event: &taken_over });
        let open = |expected, id: u64, stdout_offset| Position::Open {
            expected,
            follows: Mark { id, tag: u64::from(id > 0) },
            checkpoint: Box::new(Checkpoint { stdout_offset, ..Checkpoint::default() }),
            at_us: id as i64,
        };
        assert_eq!(position(Some(streamed), Some(persisted), 1, 2), open(9, 9, 70));
        assert_eq!(position(None, Some(persisted), 1, 2), open(0, 5, 40));
        assert_eq!(
            position(Some(Newest { id: 4, event: &output }), Some(persisted), 1, 2),
            open(4, 5, 40),
            "set back"
        );
        assert_eq!(position(None, None, 1, 1), open(0, 0, 0));
        assert_eq!(
            position(Some(streamed), None, 2, 1),
            open(9, 9, 0),
            "an earlier turn's checkpoint is not this one's"
        );
    }

    #[test]
    fn a_turn_continues_in_the_journal_where_the_one_before_it_ended() {
        let checkpoint = Checkpoint {
            journal_offset: 4711,
            journal_stdout: 9,
            stdout_offset: 9,
            started: true,
            metered_through: 3,
            ..Checkpoint::default()
        };
        let ended = SessionEvent {
            checkpoint: Some(checkpoint),
            ..event(1, Kind::TurnEnded(TurnEnded::default()), 0)
        };
        let Position::Open { checkpoint, .. } =
            position(Some(Newest { id: 9, event: &ended }), None, 2, 1)
        else {
            panic!("not open")
        };
        assert_eq!(
            *checkpoint,
            Checkpoint { journal_offset: 4711, metered_through: 3, ..Checkpoint::default() }
        );
    }

    #[test]
    fn an_ended_or_superseded_turn_is_left_alone() {
        let (ended, later) = (
            event(1, Kind::TurnEnded(TurnEnded::default()), 0),
            event(3, Kind::TakenOver(TakenOver {}), 0),
        );
        assert_eq!(
            position(Some(Newest { id: 9, event: &ended }), None, 1, 2),
            Position::Ended { id: 9 }
        );
        assert_eq!(
            position(Some(Newest { id: 9, event: &later }), None, 1, 2),
            Position::Superseded
        );
    }
}
