//! Streams and consumers, with every limit written out. `bus::topology` makes them so and reports what differs.

use std::time::Duration;

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
}

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
};

/// The scheduler trims what is recorded when room is needed. Full, it refuses, and whoever writes waits: its size is how far the recorder
/// may lag behind.
pub const EVENTS: StreamSpec = StreamSpec {
    name: "EVENTS",
    subjects: &[subject::SESSION_LOGS],
    retention: Retention::Limits,
    max_age: DAY.saturating_mul(3),
    max_bytes: 8 * GIB,
    refuse_when_full: true,
    duplicate_window: Duration::from_secs(120),
};

pub const LIFECYCLE: StreamSpec = StreamSpec {
    name: "LIFECYCLE",
    subjects: &["aod.evt.>"],
    retention: Retention::Limits,
    max_age: DAY.saturating_mul(7),
    max_bytes: GIB,
    refuse_when_full: false,
    duplicate_window: Duration::from_secs(600),
};

pub const DLQ: StreamSpec = StreamSpec {
    name: "DLQ",
    subjects: &["aod.dlq.>"],
    retention: Retention::Limits,
    max_age: DAY.saturating_mul(30),
    max_bytes: GIB,
    refuse_when_full: false,
    duplicate_window: Duration::from_secs(120),
};

pub const STREAMS: [StreamSpec; 4] = [JOBS, EVENTS, LIFECYCLE, DLQ];

/// All runners share it: a job goes to one of them, and comes back when that one falls silent.
pub const RUNNER: ConsumerSpec = ConsumerSpec {
    stream: JOBS.name,
    name: "runner",
    filters: &[subject::TURN_RUNS, subject::SPRITE_DESTROYS, subject::SPRITE_SWEEPS],
    ack_wait: types::limits::JOB_LEASE,
    max_ack_pending: 100_000,
};

pub const CONSUMERS: [ConsumerSpec; 1] = [RUNNER];
