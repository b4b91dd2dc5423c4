//! A world: what Postgres, the bus and the processes hold, and one step after another.

use std::collections::{BTreeMap, VecDeque};

use contract::session::SessionEvent;
use fastrand::Rng;
use rules::generation::Known;
use types::{SessionStatus, TurnStatus};
use uuid::Uuid;

use crate::{
    decisions::Decisions,
    model::{Agent, Row, Runner, Scheduler, Stream},
};

pub const SESSIONS: usize = 4;
pub const RUNNERS: usize = 3;
pub const SCHEDULERS: usize = 2;

/// A step takes ten milliseconds, more or less.
pub const LEASE: u64 = 200;

pub const TURN: u32 = 1;

pub struct World {
    pub rng: Rng,
    pub decisions: Decisions,
    pub now: u64,
    pub faulty: bool,
    // Postgres.
    pub leases: BTreeMap<Uuid, u64>,
    pub rows: Vec<Row>,
    pub logs: Vec<Vec<(u64, SessionEvent)>>,
    pub projected: u64,
    pub known: Option<Known>,
    pub projector_lease: (u64, u64),
    pub streams_lease: (usize, u64),
    // The bus.
    pub stream: Option<Stream>,
    pub snapshot: Option<Stream>,
    pub streams_made: i64,
    pub queue: VecDeque<usize>,
    // Processes.
    pub agents: Vec<Agent>,
    pub runners: Vec<Runner>,
    pub schedulers: Vec<Scheduler>,
    pub next_uuid: u128,
    pub terminations: Vec<bool>,
    pub gaps: u64,
}

impl World {
    pub fn new(seed: u64, decisions: Decisions) -> Self {
        let mut rng = Rng::with_seed(seed);
        let row = |rng: &mut Rng| Row {
            session: SessionStatus::Pending,
            turn: TurnStatus::Pending,
            owner: None,
            epoch: 0,
            claimed_at: 0,
            offer_after: 200,
            offers: 1,
            // Most have time enough; some are overdue while they run.
            deadline_at: if rng.u8(..4) == 0 { rng.u64(500..6000) } else { u64::MAX },
        };
        let rows: Vec<_> = (0..SESSIONS).map(|_| row(&mut rng)).collect();
        let agents = (0..SESSIONS)
            .map(|_| Agent { size: rng.u64(0..500), produced: 0, started: false })
            .collect();
        let mut world = Self {
            rng,
            decisions,
            now: 1,
            faulty: true,
            leases: BTreeMap::new(),
            rows,
            logs: vec![Vec::new(); SESSIONS],
            projected: 0,
            known: None,
            projector_lease: (0, 0),
            streams_lease: (0, 0),
            stream: None,
            snapshot: None,
            streams_made: 0,
            queue: (0..SESSIONS).collect(),
            agents,
            runners: Vec::new(),
            schedulers: (0..SCHEDULERS).map(|_| Scheduler::default()).collect(),
            next_uuid: 1,
            terminations: vec![false; SESSIONS],
            gaps: 0,
        };
        world.runners = (0..RUNNERS).map(|_| world.fresh_runner()).collect();
        world
    }

    pub fn fresh_runner(&mut self) -> Runner {
        self.next_uuid += 1;
        let lease = Uuid::from_u128(self.next_uuid);
        Runner {
            lease,
            registered: false,
            holds: BTreeMap::new(),
            heartbeat: None,
            paused_until: 0,
        }
    }

    /// True once in so many times, while faults are injected.
    pub fn fault(&mut self, once_in: u32) -> bool {
        self.faulty && self.rng.u32(..once_in) == 0
    }

    pub fn step(&mut self) {
        self.now += self.rng.u64(1..3);
        match self.rng.u8(..100) {
            0..=9 => self.agent_writes(),
            10..=49 => {
                let runner = self.rng.usize(..RUNNERS);
                self.runner_steps(runner);
            }
            50..=64 => {
                let scheduler = self.rng.usize(..SCHEDULERS);
                self.project(scheduler);
            }
            65..=74 => self.reconcile(),
            75..=79 => {
                let scheduler = self.rng.usize(..SCHEDULERS);
                self.check_stream(scheduler);
            }
            80..=87 => {
                let scheduler = self.rng.usize(..SCHEDULERS);
                self.end(scheduler);
            }
            88..=95 => {
                let runner = self.rng.usize(..RUNNERS);
                self.heartbeat(runner);
            }
            _ => self.something_fails(),
        }
        self.check_safety();
    }
}
