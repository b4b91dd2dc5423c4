//! The state machine of sessions and turns: what an event of the log changes. The only place that
//! decides a status.

use contract::session::{StopReason, TurnEnded, session_event::Kind};
use types::{SessionStatus, Stage, TurnStatus};

/// The failure stage of turns that the scheduler ended at their deadline.
pub const DEADLINE: &str = "deadline";

/// A session and one of its turns, as they are persisted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    pub session: SessionStatus,
    /// The session's newest turn.
    pub current_turn: u32,
    /// The status of the turn that the event is about, if there is one: a session may begin without
    /// a message.
    pub turn: Option<TurnStatus>,
}

/// What an event changes; `None` leaves it as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transition {
    pub session: Option<SessionStatus>,
    pub turn: Option<TurnStatus>,
    /// The Sprite must be destroyed.
    pub destroy: bool,
}

/// Decides what an event about `event_turn` changes. Each event applies once: a settled turn and a
/// terminated session stay as they are.
#[must_use]
pub fn next(state: State, event_turn: u32, kind: &Kind) -> Transition {
    let open = matches!(state.turn, Some(TurnStatus::Pending | TurnStatus::Running));
    let current = event_turn == state.current_turn && state.session.is_active();
    match kind {
        Kind::TurnStarted(_) if state.turn == Some(TurnStatus::Pending) => Transition {
            turn: Some(TurnStatus::Running),
            session: (current && state.session == SessionStatus::Pending)
                .then_some(SessionStatus::Running),
            destroy: false,
        },
        Kind::TurnEnded(ended) if open => {
            let (turn, session) = match ended.exit_code == Some(0) {
                true => (TurnStatus::Completed, SessionStatus::Completed),
                // The session continues once its budget is raised.
                false if ended.stop_reason() == StopReason::Budget => {
                    (TurnStatus::Failed, SessionStatus::Completed)
                }
                false => (TurnStatus::Failed, SessionStatus::Failed),
            };
            Transition {
                turn: Some(turn),
                session: current.then_some(session),
                destroy: current && leaves_nothing(event_turn, ended),
            }
        }
        Kind::Terminated(_) if state.session != SessionStatus::Terminated => Transition {
            turn: open.then_some(TurnStatus::Failed),
            session: Some(SessionStatus::Terminated),
            destroy: true,
        },
        _ => Transition::default(),
    }
}

/// Whether a turn's end leaves an unusable Sprite: its set-up failed, or its deadline passed. The
/// first turn sets the Sprite up, and later ones rely on that: whatever failed before the first one
/// began, its Sprite is not set up, and may not even exist.
#[must_use]
pub fn leaves_nothing(turn: u32, ended: &TurnEnded) -> bool {
    let is_not_set_up = turn == 1 && ended.unstarted.is_some();
    ended.exit_code.is_none()
        && ended.failure.as_ref().is_some_and(|failure| {
            is_not_set_up || failure.stage == DEADLINE || failure.stage.parse::<Stage>().is_ok()
        })
}

#[cfg(test)]
mod tests {
    use contract::session::{Failure, Terminated, TurnStarted};
    use proptest::prelude::*;

    use super::*;

    fn kinds() -> impl Strategy<Value = Kind> {
        let failure = prop_oneof![
            Just(None),
            Just(Some("deadline")),
            Just(Some("provision_setup")),
            Just(Some("timeout"))
        ];
        prop_oneof![
            Just(Kind::TurnStarted(TurnStarted::default())),
            Just(Kind::Terminated(Terminated::default())),
            (proptest::option::of(0..3), failure).prop_map(|(exit_code, stage)| {
                let failure =
                    stage.map(|stage| Failure { stage: stage.to_owned(), message: String::new() });
                Kind::TurnEnded(TurnEnded { exit_code, failure, ..TurnEnded::default() })
            }),
        ]
    }

    proptest! {
        /// A turn settles once, a terminated session stays terminated, and an event of an earlier
        /// turn never changes the session.
        #[test]
        fn random_event_sequences_settle_each_turn_once(events in proptest::collection::vec((1_u32..3, kinds()), 0..20)) {
            let (mut session, mut turns) = (SessionStatus::Pending, [TurnStatus::Completed, TurnStatus::Pending]);
            for (event_turn, kind) in events {
                let turn = turns[event_turn as usize - 1];
                let transition = next(State { session, current_turn: 2, turn: Some(turn) }, event_turn, &kind);
                let open = matches!(turn, TurnStatus::Pending | TurnStatus::Running);
                prop_assert!(open || transition.turn.is_none());
                if let Some(status) = transition.turn {
                    turns[event_turn as usize - 1] = status;
                }
                if let Some(status) = transition.session {
                    prop_assert_ne!(session, SessionStatus::Terminated);
                    prop_assert!(event_turn == 2 || status == SessionStatus::Terminated);
                    session = status;
                }
                prop_assert!(!transition.destroy || transition.session.is_some());
                prop_assert_eq!(session.is_active(), matches!(turns[1], TurnStatus::Pending | TurnStatus::Running) && session != SessionStatus::Terminated);
            }
        }
    }

    #[test]
    fn a_session_without_a_turn_can_be_terminated() {
        let state = State { session: SessionStatus::Completed, current_turn: 0, turn: None };
        let terminated =
            Transition { session: Some(SessionStatus::Terminated), turn: None, destroy: true };
        assert_eq!(next(state, 0, &Kind::Terminated(Terminated::default())), terminated);
        for kind in
            [Kind::TurnStarted(TurnStarted::default()), Kind::TurnEnded(TurnEnded::default())]
        {
            assert_eq!(next(state, 1, &kind), Transition::default());
        }
    }

    #[test]
    fn a_failed_setup_destroys_its_sprite_and_a_failed_agent_does_not() {
        let state = State {
            session: SessionStatus::Running,
            current_turn: 1,
            turn: Some(TurnStatus::Running),
        };
        let ended = |exit_code, stage: Option<&str>| {
            let failure =
                stage.map(|stage| Failure { stage: stage.to_owned(), message: String::new() });
            next(
                state,
                1,
                &Kind::TurnEnded(TurnEnded { exit_code, failure, ..TurnEnded::default() }),
            )
            .destroy
        };
        assert!(ended(None, Some("provision_setup")) && ended(None, Some("deadline")));
        assert!(
            !ended(Some(1), None)
                && !ended(Some(1), Some("agent"))
                && !ended(None, Some("timeout"))
                && !ended(Some(0), None)
        );
    }

    #[test]
    fn a_first_turn_that_fails_before_it_begins_destroys_its_sprite_and_a_later_one_does_not() {
        let destroys = |turn, unstarted| {
            let state = State {
                session: SessionStatus::Pending,
                current_turn: turn,
                turn: Some(TurnStatus::Pending),
            };
            let failure = Some(Failure { stage: "credentials".to_owned(), message: String::new() });
            let ended = TurnEnded { failure, unstarted, ..TurnEnded::default() };
            next(state, turn, &Kind::TurnEnded(ended)).destroy
        };
        let unstarted = Some(TurnStarted::default());
        assert!(destroys(1, unstarted.clone()));
        assert!(!destroys(2, unstarted) && !destroys(1, None));
    }
}
