//! Streams and consumers, with every limit written out. `bus::topology` creates them and reports
//! differences.

use std::time::Duration;

use types::Partition;

use crate::subject;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const GIB: i64 = 1024 * 1024 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retention {
    /// Kept until a limit is reached.
    Limits,
    /// Kept until acknowledged.
    WorkQueue,
}

#[derive(Clone, Copy, Debug)]
pub struct StreamSpec {
    pub name: &'static str,
    pub subjects: &'static [&'static str],
    pub retention: Retention,
    pub max_age: Duration,
    pub max_bytes: i64,
    /// A full stream refuses what is new, rather than lose what it holds.
    pub refuse_when_full: bool,
    pub duplicate_window: Duration,
    /// Where the server publishes each stored message again, for plain subscribers.
    pub republish: Option<Republish>,
}

/// A mapping of subjects: what is stored under `from` is published under `to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Republish {
    pub from: &'static str,
    pub to: &'static str,
}

/// Consumers that a stream may have. nats-server 2.15 takes -1 for 1000.
pub const CONSUMERS_MAX: i32 = 100_000;

#[derive(Clone, Copy, Debug)]
pub struct ConsumerSpec {
    pub stream: &'static str,
    pub name: &'static str,
    pub filters: &'static [&'static str],
    pub ack_wait: Duration,
    pub max_ack_pending: i64,
}

pub const JOBS: StreamSpec = StreamSpec {
    name: "JOBS",
    subjects: &["aod.cmd.>"],
    retention: Retention::WorkQueue,
    max_age: DAY.saturating_mul(30),
    max_bytes: GIB,
    refuse_when_full: true,
    duplicate_window: Duration::from_secs(600),
    republish: None,
};

/// The first partition of the sessions' event logs. The scheduler trims what is persisted when room
/// is needed. A full stream refuses events, and writers wait: its size is how far the projector may
/// lag behind.
pub const EVENTS: StreamSpec = StreamSpec {
    name: "EVENTS",
    subjects: &["aod.log.session.v1.*"],
    retention: Retention::Limits,
    max_age: DAY.saturating_mul(3),
    max_bytes: 8 * GIB,
    refuse_when_full: true,
    duplicate_window: Duration::from_secs(120),
    republish: Some(Republish { from: "aod.log.session.v1.>", to: "aod.live.session.v1.>" }),
};

pub const LIFECYCLE: StreamSpec = StreamSpec {
    name: "LIFECYCLE",
    subjects: &["aod.evt.>"],
    retention: Retention::Limits,
    max_age: DAY.saturating_mul(7),
    max_bytes: GIB,
    refuse_when_full: false,
    duplicate_window: Duration::from_secs(600),
    republish: None,
};

pub const DLQ: StreamSpec = StreamSpec {
    name: "DLQ",
    subjects: &["aod.dlq.>"],
    retention: Retention::Limits,
    max_age: DAY.saturating_mul(30),
    max_bytes: GIB,
    refuse_when_full: false,
    duplicate_window: Duration::from_secs(120),
    republish: None,
};

static PARTITIONS: [StreamSpec; Partition::COUNT_MAX as usize] = [
    EVENTS,
    partition("EVENTS_1", &["aod.log.session.v1.*.1"]),
    partition("EVENTS_2", &["aod.log.session.v1.*.2"]),
    partition("EVENTS_3", &["aod.log.session.v1.*.3"]),
    partition("EVENTS_4", &["aod.log.session.v1.*.4"]),
    partition("EVENTS_5", &["aod.log.session.v1.*.5"]),
    partition("EVENTS_6", &["aod.log.session.v1.*.6"]),
    partition("EVENTS_7", &["aod.log.session.v1.*.7"]),
];

const fn partition(name: &'static str, subjects: &'static [&'static str]) -> StreamSpec {
    StreamSpec { name, subjects, ..EVENTS }
}

/// The stream that holds the records of a partition's sessions.
#[must_use]
pub fn events(partition: Partition) -> &'static StreamSpec {
    &PARTITIONS[usize::from(partition.number())]
}

/// The partition that a stream is, where it is one.
#[must_use]
pub fn partition_of(stream: &str) -> Option<Partition> {
    Partition::all().find(|partition| events(*partition).name == stream)
}

/// Beside those of the partitions.
pub const OTHERS: [StreamSpec; 3] = [JOBS, LIFECYCLE, DLQ];

/// All streams of a deployment with these partitions.
pub fn streams(
    partitions: impl IntoIterator<Item = Partition>,
) -> impl Iterator<Item = StreamSpec> {
    OTHERS.into_iter().chain(partitions.into_iter().map(|partition| *events(partition)))
}

/// Room for one event of the greatest size, and others beside it.
pub const EVENTS_BYTES_MIN: i64 = 1024 * 1024;

/// All streams of a deployment with these partitions, which share `events_max_bytes` evenly.
#[must_use]
pub fn sized_streams(partitions: &[Partition], events_max_bytes: i64) -> Vec<StreamSpec> {
    let count = i64::try_from(partitions.len()).unwrap_or(i64::MAX).max(1);
    let max_bytes = (events_max_bytes / count).max(EVENTS_BYTES_MIN);
    let sized = |spec: StreamSpec| match partition_of(spec.name) {
        Some(_) => StreamSpec { max_bytes, ..spec },
        None => spec,
    };
    streams(partitions.iter().copied()).map(sized).collect()
}

/// All runners share it: a job goes to one of them, and comes back when that one falls silent.
pub const RUNNER: ConsumerSpec = ConsumerSpec {
    stream: JOBS.name,
    name: "runner",
    filters: &[subject::TURN_RUNS, subject::SPRITE_DESTROYS, subject::SPRITE_SWEEPS],
    ack_wait: types::limits::JOB_LEASE,
    max_ack_pending: 100_000,
};

pub const CONSUMERS: [ConsumerSpec; 1] = [RUNNER];

#[cfg(test)]
mod tests {
    use types::SessionId;

    use super::*;
    use crate::access;

    #[test]
    fn a_sessions_record_is_in_the_stream_of_its_partition_and_in_no_other() {
        let session = SessionId::new();
        for partition in Partition::all() {
            let log = subject::session_log(session, partition);
            let holds = |spec: &StreamSpec| {
                spec.subjects.iter().any(|pattern| access::matches(pattern, &log))
            };
            let streams: Vec<_> =
                streams(Partition::all()).filter(holds).map(|spec| spec.name).collect();
            assert_eq!(streams, [events(partition).name]);
            assert_eq!(partition_of(events(partition).name), Some(partition));
        }
        assert_eq!(partition_of("JOBS"), None);
    }
}
