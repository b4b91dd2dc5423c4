//! Where one connection is in its session's stream, and when that ends. Pure: [`super::reader`]
//! reads and writes.

use types::SessionStatus;

use crate::stream::event::{Event, Visible};

/// What a reader has passed.
#[derive(Debug)]
pub struct Progress {
    /// The last event that was passed.
    pub cursor: u64,
    /// The newest turn that is known of.
    turn_count: u32,
    /// The turn whose `turn_start` was sent last.
    announced_turn: Option<u32>,
}

/// What follows where the event log in Postgres was read to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndOfLog {
    /// The client has the end already.
    Ended,
    /// The end was persisted after the page was read.
    ReadAgain,
    /// More is to come.
    Follow,
    /// The session is settled and nothing says how: its end may still be on its way.
    EndMissing,
}

impl Progress {
    pub fn new(since: u64, turn_count: u32) -> Self {
        Self { cursor: since, turn_count, announced_turn: None }
    }

    pub fn turn_count(&self) -> u32 {
        self.turn_count
    }

    pub fn learn_turn_count(&mut self, turn_count: u32) {
        self.turn_count = self.turn_count.max(turn_count);
    }

    /// Passes an event with output. Returns whether its turn has to be announced before.
    pub fn begins_turn(&mut self, turn: u32) -> bool {
        self.announced_turn.replace(turn) != Some(turn)
    }

    /// Whether a turn's end may be the session's: an older turn's is not.
    pub fn may_end(&self, turn: u32) -> bool {
        turn >= self.turn_count
    }

    /// Whether a turn's end is the session's, by the session as it was once the end was persisted:
    /// not when another turn was begun since, nor when a termination came first. Without an answer
    /// the end is true all the same: it is only persisted late.
    pub fn is_end(&mut self, turn: u32, session: Option<(u32, Option<SessionStatus>)>) -> bool {
        let Some((turn_count, status)) = session else { return self.may_end(turn) };
        self.learn_turn_count(turn_count);
        turn == turn_count && status != Some(SessionStatus::Terminated)
    }

    /// What follows when nothing after the cursor is persisted. `newest` is the newest persisted
    /// event, `status` the session's status asked for after that; `is_second` where that was
    /// [`EndOfLog::ReadAgain`] before.
    pub fn at_end_of_log(
        &self,
        status: Option<SessionStatus>,
        newest: Option<&Event>,
        is_second: bool,
    ) -> EndOfLog {
        let Some(status) = status.filter(|status| !status.is_active()) else {
            return EndOfLog::Follow;
        };
        match newest {
            Some(newest) if is_end_of(newest, status, self.turn_count) => {
                if newest.id <= self.cursor { EndOfLog::Ended } else { EndOfLog::ReadAgain }
            }
            _ if !is_second => EndOfLog::ReadAgain,
            _ if status == SessionStatus::Completed => EndOfLog::Ended,
            _ => EndOfLog::EndMissing,
        }
    }
}

/// Whether nothing follows an event in a session that is settled so, at this turn.
pub fn is_end_of(event: &Event, settled: SessionStatus, turn: u32) -> bool {
    match event.kind {
        Visible::Terminated(_) => true,
        Visible::TurnEnd(_) => settled != SessionStatus::Terminated && event.turn == turn,
        _ => event.is_update() && settled != SessionStatus::Terminated && event.turn == turn,
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn event(id: u64, turn: u32, kind: Visible) -> Event {
        Event::shown(id, turn, kind)
    }

    fn turn_end(id: u64, turn: u32) -> Event {
        event(id, turn, Visible::TurnEnd(Bytes::new()))
    }

    #[test]
    fn a_turns_output_is_announced_once() {
        let mut progress = Progress::new(0, 2);
        assert_eq!([1, 1, 2, 2].map(|turn| progress.begins_turn(turn)), [true, false, true, false]);
    }

    #[test]
    fn only_the_current_turns_end_ends_a_stream() {
        let mut progress = Progress::new(0, 2);
        assert!(!progress.may_end(1) && progress.may_end(2));
        // Not persisted in time.
        assert!(progress.is_end(2, None));
        assert!(!progress.is_end(2, Some((2, Some(SessionStatus::Terminated)))));
        assert!(progress.is_end(2, Some((2, Some(SessionStatus::Completed)))));
        // Prompted again since.
        assert!(!progress.is_end(2, Some((3, Some(SessionStatus::Pending)))));
        assert!(!progress.may_end(2) && progress.is_end(3, Some((3, None))));
    }

    #[test]
    fn a_log_without_its_end_is_read_again_and_then_waited_for() {
        let progress = Progress::new(7, 1);
        for status in [None, Some(SessionStatus::Pending), Some(SessionStatus::Running)] {
            assert_eq!(progress.at_end_of_log(status, None, true), EndOfLog::Follow);
        }
        let (failed, completed) = (Some(SessionStatus::Failed), Some(SessionStatus::Completed));
        assert_eq!(progress.at_end_of_log(failed, Some(&turn_end(7, 1)), false), EndOfLog::Ended);
        assert_eq!(
            progress.at_end_of_log(failed, Some(&turn_end(8, 1)), true),
            EndOfLog::ReadAgain
        );
        let output = event(7, 1, Visible::Output(Bytes::new()));
        assert_eq!(progress.at_end_of_log(failed, Some(&output), false), EndOfLog::ReadAgain);
        assert_eq!(progress.at_end_of_log(failed, Some(&output), true), EndOfLog::EndMissing);
        assert_eq!(progress.at_end_of_log(failed, None, true), EndOfLog::EndMissing);
        assert_eq!(progress.at_end_of_log(completed, None, true), EndOfLog::Ended);
        // Overtaken by a termination, whose event is missing.
        let terminated = Some(SessionStatus::Terminated);
        assert_eq!(
            progress.at_end_of_log(terminated, Some(&turn_end(7, 1)), true),
            EndOfLog::EndMissing
        );
        let end = event(7, 0, Visible::Terminated(Bytes::new()));
        assert_eq!(progress.at_end_of_log(terminated, Some(&end), false), EndOfLog::Ended);
        // A client beyond the end has the end.
        assert_eq!(
            Progress::new(u64::MAX, 1).at_end_of_log(completed, Some(&turn_end(7, 1)), false),
            EndOfLog::Ended
        );
    }
}
