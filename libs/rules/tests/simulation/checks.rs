//! What has to hold: safety after each step, and liveness without faults.

use contract::session::{TurnEnded, session_event::Kind};
use types::SessionStatus;

use crate::world::{SESSIONS, World};

const HEALING_STEPS: usize = 60_000;

impl World {
    pub fn check_safety(&self) {
        for (session, log) in self.logs.iter().enumerate() {
            let Some(((id, event), before)) = log.split_last() else { continue };
            let Some(kind) = &event.kind else { continue };
            if let Some((previous, before)) = before.last() {
                assert!(previous < id, "session {session}: ids do not grow");
                let ended = matches!(before.kind, Some(Kind::TurnEnded(_)));
                assert!(
                    !ended || matches!(kind, Kind::Terminated(_)),
                    "session {session}: {kind:?} after its end"
                );
            }
            let offset_before = before
                .iter()
                .rev()
                .find_map(|(_, event)| event.checkpoint.as_ref())
                .map_or(0, |checkpoint| checkpoint.stdout_offset);
            match kind {
                Kind::Output(output) => {
                    let end =
                        event.checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.stdout_offset);
                    assert_eq!(
                        end,
                        offset_before + output.data.len() as u64,
                        "session {session}: output lost or doubled at event {id}: {:#?}",
                        log.iter().rev().take(4).collect::<Vec<_>>()
                    );
                }
                Kind::TurnEnded(TurnEnded { exit_code: Some(0), .. }) => {
                    assert_eq!(
                        offset_before, self.agents[session].size,
                        "session {session}: completed without its output"
                    );
                }
                _ => {}
            }
            let settled = log.iter().any(|(_, event)| {
                matches!(event.kind, Some(Kind::TurnEnded(_) | Kind::Terminated(_)))
            });
            assert!(
                !settled || !self.rows[session].is_open(),
                "session {session}: its end is persisted and its turn is open"
            );
        }
        for row in &self.rows {
            assert!(
                row.owner.is_none_or(|owner| row.is_open() && self.leases.contains_key(&owner)),
                "owned by an expired lease: {row:?}"
            );
        }
    }

    /// Runs without faults until every session is settled.
    pub fn heal(&mut self) -> usize {
        self.faulty = false;
        for step in 0..HEALING_STEPS {
            let ended = |session: usize| {
                !self.rows[session].is_open()
                    && (!self.terminations[session]
                        || self.rows[session].session == SessionStatus::Terminated)
            };
            if (0..SESSIONS).all(ended) {
                return step;
            }
            self.step();
        }
        unreachable!(
            "stuck: {:?}\nrunners {:?}\nstream {:?}\nprojected {}",
            self.rows, self.runners, self.stream, self.projected
        );
    }
}
