//! Subjects that carry a key. Keys come from id types, which cannot hold `.`, `*`, `>` or a space.

use types::{SessionId, SpriteName};

/// A session's record.
#[must_use]
pub fn session_log(session: SessionId) -> String {
    format!("aod.log.session.v1.{session}")
}

/// The session a record's subject belongs to.
#[must_use]
pub fn parse_session_log(subject: &str) -> Option<SessionId> {
    subject.strip_prefix("aod.log.session.v1.")?.parse().ok()
}

pub const SESSION_LOGS: &str = "aod.log.session.v1.*";

#[must_use]
pub fn turn_run(session: SessionId) -> String {
    format!("aod.cmd.runner.v1.turn.run.{session}")
}

pub const TURN_RUNS: &str = "aod.cmd.runner.v1.turn.run.*";

#[must_use]
pub fn sprite_destroy(sprite: &SpriteName) -> String {
    format!("aod.cmd.runner.v1.sprite.destroy.{sprite}")
}

pub const SPRITE_DESTROYS: &str = "aod.cmd.runner.v1.sprite.destroy.*";

/// A fact for other services: `session.completed` and the like.
#[must_use]
pub fn session_lifecycle(what: &str, session: SessionId) -> String {
    format!("aod.evt.scheduler.v1.session.{what}.{session}")
}

/// Wakes the runner that works for a session which was terminated.
#[must_use]
pub fn terminate_hint(session: SessionId) -> String {
    format!("aod.hint.runner.v1.session.terminate.{session}")
}

#[must_use]
pub fn dead_letter(owner: &str) -> String {
    format!("aod.dlq.{owner}.v1.message.rejected")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_logs_subject_gives_its_session_back() {
        let session = SessionId::new();
        assert_eq!(parse_session_log(&session_log(session)), Some(session));
        assert_eq!(parse_session_log("aod.log.session.v1.x"), None);
        assert_eq!(parse_session_log("aod.evt.scheduler.v1.session.completed"), None);
    }
}
