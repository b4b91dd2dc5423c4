//! Subjects that carry a key. Keys come from id types, which cannot hold `.`, `*`, `>` or a space.

use prost::Message as _;
use types::{Partition, SessionId, SpriteName, UserId};

use crate::runner::{DestroySprite, RunTurn, SweepSprites};

/// The event log of a session. The last word is the number of the partition, except for the first,
/// so that each partition has a pattern.
#[must_use]
pub fn session_log(session: SessionId, partition: Partition) -> String {
    match partition.number() {
        0 => format!("aod.log.session.v1.{session}"),
        number => format!("aod.log.session.v1.{session}.{number}"),
    }
}

/// Where the server publishes the entries of a session's log again, for plain subscribers.
#[must_use]
pub fn session_live(session: SessionId, partition: Partition) -> String {
    match partition.number() {
        0 => format!("aod.live.session.v1.{session}"),
        number => format!("aod.live.session.v1.{session}.{number}"),
    }
}

/// Returns the session of an event log's subject.
#[must_use]
pub fn parse_session_log(subject: &str) -> Option<SessionId> {
    let key = subject.strip_prefix("aod.log.session.v1.")?;
    key.split_once('.').map_or(key, |(session, _)| session).parse().ok()
}

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

#[must_use]
pub fn sprite_sweep(user: UserId) -> String {
    format!("aod.cmd.runner.v1.sprite.sweep.{user}")
}

pub const SPRITE_SWEEPS: &str = "aod.cmd.runner.v1.sprite.sweep.*";

/// A job of the work queue: the message that its subject announces.
#[derive(Clone, Debug, PartialEq)]
pub enum RunnerJob {
    RunTurn(RunTurn),
    DestroySprite(DestroySprite),
    SweepSprites(SweepSprites),
}

/// Why a message of the work queue is not a job.
#[derive(Debug, thiserror::Error)]
pub enum MalformedJob {
    #[error("unknown kind of job")]
    UnknownKind,
    #[error("malformed job: {0}")]
    Payload(#[from] prost::DecodeError),
}

impl RunnerJob {
    /// Reads a job from its subject ([`turn_run`], [`sprite_destroy`], [`sprite_sweep`]) and
    /// payload.
    ///
    /// # Errors
    /// [`MalformedJob`] for another subject, or a payload that is not its message.
    pub fn parse(subject: &str, payload: &[u8]) -> Result<Self, MalformedJob> {
        let is = |pattern: &str| {
            pattern.strip_suffix('*').is_some_and(|start| subject.starts_with(start))
        };
        if is(TURN_RUNS) {
            Ok(Self::RunTurn(RunTurn::decode(payload)?))
        } else if is(SPRITE_DESTROYS) {
            Ok(Self::DestroySprite(DestroySprite::decode(payload)?))
        } else if is(SPRITE_SWEEPS) {
            Ok(Self::SweepSprites(SweepSprites::decode(payload)?))
        } else {
            Err(MalformedJob::UnknownKind)
        }
    }
}

/// The subject of a lifecycle event, such as `session.completed`.
#[must_use]
pub fn session_lifecycle(what: &str, session: SessionId) -> String {
    format!("aod.evt.scheduler.v1.session.{what}.{session}")
}

/// Wakes the runner that works for a session which was terminated.
#[must_use]
pub fn terminate_hint(session: SessionId) -> String {
    format!("aod.hint.runner.v1.session.terminate.{session}")
}

/// Tells the runner that works for a session of new inputs: it fetches them.
#[must_use]
pub fn inputs_hint(session: SessionId) -> String {
    format!("aod.hint.runner.v1.session.inputs.{session}")
}

/// Subscribed to by the runner that has this lease, for as long as it is connected.
#[must_use]
pub fn lease_presence(lease: impl std::fmt::Display) -> String {
    format!("aod.hint.runner.v1.lease.present.{lease}")
}

/// Tells those who follow a session what was just queued for it, and what its agent is writing.
#[must_use]
pub fn queued_inputs(session: SessionId) -> String {
    format!("aod.queued.session.v1.{session}")
}

/// Tells the runner that works for a session of new entries of the model gateway: it fetches them.
#[must_use]
pub fn models_hint(session: SessionId) -> String {
    format!("aod.hint.runner.v1.session.models.{session}")
}

#[must_use]
pub fn dead_letter(owner: &str) -> String {
    format!("aod.dlq.{owner}.v1.message.rejected")
}

/// Describes what is published, for the documents of the bus.
#[derive(Debug)]
pub struct Publication {
    pub name: &'static str,
    pub address: &'static str,
    /// The keys of the address, and what they are.
    pub parameters: &'static [(&'static str, &'static str)],
    /// `module::Message`, as in this crate; none where the subject says it all.
    pub message: Option<&'static str>,
    pub meaning: &'static str,
}

const SESSION: (&str, &str) = ("session", "The session's id");

pub const PUBLICATIONS: &[Publication] = &[
    Publication {
        name: "SessionLog",
        address: "aod.log.session.v1.{session}",
        parameters: &[SESSION],
        message: Some("session::SessionEvent"),
        meaning: "The event log of a session, in order: stages, output, ends of turns. The sequence in the stream EVENTS is the public event id.",
    },
    Publication {
        name: "SessionLogOfPartition",
        address: "aod.log.session.v1.{session}.{partition}",
        parameters: &[SESSION, ("partition", "The session's partition, 1 to 7")],
        message: Some("session::SessionEvent"),
        meaning: "The event log of a session that belongs to another partition than the first, which depends on EVENT_PARTITIONS when the session was created. Partition 3 is the stream EVENTS_3.",
    },
    Publication {
        name: "SessionLive",
        address: "aod.live.session.v1.{session}",
        parameters: &[SESSION],
        message: Some("session::SessionEvent"),
        meaning: "Each event of SessionLog, republished by the NATS server when it is stored, at most once. The header Nats-Sequence is the event id, Nats-Last-Sequence the id of the session's previous event: if it is not the last one that you received, you missed events.",
    },
    Publication {
        name: "SessionLiveOfPartition",
        address: "aod.live.session.v1.{session}.{partition}",
        parameters: &[SESSION, ("partition", "The session's partition, 1 to 7")],
        message: Some("session::SessionEvent"),
        meaning: "Each event of SessionLogOfPartition, republished.",
    },
    Publication {
        name: "SessionLifecycle",
        address: "aod.evt.scheduler.v1.session.{what}.{session}",
        parameters: &[("what", "`completed`, `failed`, `terminated` or `deleted`"), SESSION],
        message: Some("scheduler::SessionChanged"),
        meaning: "A lifecycle event for other services, at least once. Stored in the stream LIFECYCLE.",
    },
    Publication {
        name: "RunTurn",
        address: "aod.cmd.runner.v1.turn.run.{session}",
        parameters: &[SESSION],
        message: Some("runner::RunTurn"),
        meaning: "Asks one of the runners to run a turn, or to prepare a session for its first one. Stored in the work queue JOBS until it is acknowledged.",
    },
    Publication {
        name: "DestroySprite",
        address: "aod.cmd.runner.v1.sprite.destroy.{sprite}",
        parameters: &[("sprite", "The Sprite's name")],
        message: Some("runner::DestroySprite"),
        meaning: "Asks one of the runners to delete a Sprite. Stored in the work queue JOBS until it is acknowledged.",
    },
    Publication {
        name: "SweepSprites",
        address: "aod.cmd.runner.v1.sprite.sweep.{user}",
        parameters: &[("user", "The user's id")],
        message: Some("runner::SweepSprites"),
        meaning: "Asks one of the runners to search an account for orphaned Sprites. Stored in the work queue JOBS until it is acknowledged.",
    },
    Publication {
        name: "TerminateHint",
        address: "aod.hint.runner.v1.session.terminate.{session}",
        parameters: &[SESSION],
        message: None,
        meaning: "Wakes the runner of a session that was terminated. A lost hint only costs latency.",
    },
    Publication {
        name: "InputsHint",
        address: "aod.hint.runner.v1.session.inputs.{session}",
        parameters: &[SESSION],
        message: None,
        meaning: "Tells the runner of a session that new inputs are queued. A lost hint only costs latency: heartbeats report them too.",
    },
    Publication {
        name: "LeasePresence",
        address: "aod.hint.runner.v1.lease.present.{lease}",
        parameters: &[("lease", "The lease's id")],
        message: None,
        meaning: "Not read by anyone: NATS answers whether the runner that has the lease is connected, when its heartbeat is late.",
    },
    Publication {
        name: "QueuedInputs",
        address: "aod.queued.session.v1.{session}",
        parameters: &[SESSION],
        message: Some("scheduler::QueuedInputs"),
        meaning: "What was just queued for a session, and parts of texts that its agent is writing, at most once: streams of the Managed Agents API show both before the event log has them.",
    },
    Publication {
        name: "ModelsHint",
        address: "aod.hint.runner.v1.session.models.{session}",
        parameters: &[SESSION],
        message: None,
        meaning: "Tells the runner of a session that a model request began or ended. A lost hint only costs latency: the runner asks before the turn ends.",
    },
    Publication {
        name: "DeadLetter",
        address: "aod.dlq.{owner}.v1.message.rejected",
        parameters: &[("owner", "The service that could not handle the message")],
        message: None,
        meaning: "A message that could not be handled, unchanged, with the reason in a header. Stored in the stream DLQ.",
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_live_subject_is_the_logs_subject_republished() {
        let session = SessionId::new();
        for partition in Partition::all() {
            let republish = crate::topology::events(partition).republish.unwrap();
            let (from, to) =
                (republish.from.trim_end_matches('>'), republish.to.trim_end_matches('>'));
            assert_eq!(
                session_log(session, partition).replacen(from, to, 1),
                session_live(session, partition)
            );
        }
    }

    #[test]
    fn a_logs_subject_gives_its_session_back() {
        let session = SessionId::new();
        for partition in Partition::all() {
            assert_eq!(parse_session_log(&session_log(session, partition)), Some(session));
        }
        assert_eq!(parse_session_log("aod.log.session.v1.x"), None);
        assert_eq!(parse_session_log("aod.evt.scheduler.v1.session.completed"), None);
    }

    #[test]
    fn jobs_are_read_by_their_subjects() {
        let (session, user) = (SessionId::new(), UserId::new());
        let run = RunTurn { session_id: session.to_string(), turn: 1 };
        let job = RunnerJob::parse(&turn_run(session), &run.encode_to_vec()).unwrap();
        assert_eq!(job, RunnerJob::RunTurn(run.clone()));
        let sweep = RunnerJob::parse(&sprite_sweep(user), &[]).unwrap();
        assert_eq!(sweep, RunnerJob::SweepSprites(SweepSprites::default()));
        let destroy = RunnerJob::parse(&SPRITE_DESTROYS.replace('*', "aod-x"), &[]).unwrap();
        assert_eq!(destroy, RunnerJob::DestroySprite(DestroySprite::default()));
        assert!(matches!(
            RunnerJob::parse("aod.cmd.runner.v1.other", &[]),
            Err(MalformedJob::UnknownKind)
        ));
        assert!(matches!(
            RunnerJob::parse(&turn_run(session), &[0xff]),
            Err(MalformedJob::Payload(_))
        ));
    }
}
