//! A deterministic simulation of the core: the decisions of this crate, around models of Postgres, the stream, the queue, runners,
//! schedulers and agents. Every step of every process may be the last before a crash; messages are lost, late and doubled; the stream is
//! lost, set back to a snapshot and trimmed. All waiting is by the database's clock, so that clocks of processes do not matter.
//!
//! Safety is checked after each step, liveness after a time without faults. A failure prints its seed:
//! `SIMULATION_SEED=n cargo test -p rules --test simulation` repeats it; `SIMULATION_STEPS=n` runs longer.

use std::{
    collections::{BTreeMap, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
};

use contract::session::{Checkpoint, Failure, Output, SessionEvent, TakenOver, Terminated, TurnEnded, TurnStarted, session_event::Kind};
use fastrand::Rng;
use rules::{
    chain::{self, Link, Mark},
    ending::{self, Ending, Log, Step},
    generation::{self, Condition, Known, Seen},
    ownership::{self, Held, Verdict},
    position::{self, Newest, Position},
    state::{self, State},
};
use time::{Duration, OffsetDateTime};
use types::{SessionStatus, TurnStatus};
use uuid::Uuid;

const SESSIONS: usize = 4;
const RUNNERS: usize = 3;
const SCHEDULERS: usize = 2;
/// A step takes ten milliseconds, more or less.
const LEASE: u64 = 200;
const CLAIM_GRACE: u64 = 1200;
const FAULTY_STEPS: usize = 6_000;
const HEALING_STEPS: usize = 60_000;
const TURN: u32 = 1;

/// The decisions under test, so that a wrong one can be planted.
#[derive(Clone, Copy)]
struct Decisions {
    link: fn(Option<Mark>, u64, Option<Mark>) -> Link,
    ending: fn(Ending, Log<'_>) -> Step,
    claim: fn(SessionStatus, ownership::Turn, Uuid) -> Verdict,
    position: for<'a> fn(Option<Newest<'a>>, Option<Newest<'a>>, u32, u32) -> Position,
}

const RIGHT: Decisions = Decisions { link: chain::link, ending: ending::step, claim: ownership::claim, position: position::position };

type Entry = (u64, usize, SessionEvent);

#[derive(Clone, Debug)]
struct Stream {
    created: i64,
    first: u64,
    last: u64,
    trimmed_through: u64,
    entries: Vec<Entry>,
}

impl Stream {
    fn newest(&self, session: usize) -> Option<(u64, &SessionEvent)> {
        self.entries.iter().rev().find(|(_, of, _)| *of == session).map(|(id, _, event)| (*id, event))
    }

    fn append(&mut self, session: usize, expected: u64, event: SessionEvent) -> Option<u64> {
        if self.newest(session).map_or(0, |(id, _)| id) != expected {
            return None;
        }
        self.last += 1;
        self.entries.push((self.last, session, event));
        Some(self.last)
    }
}

/// A session with its one turn, as Postgres has it.
#[derive(Clone, Debug)]
struct Row {
    session: SessionStatus,
    turn: TurnStatus,
    owner: Option<Uuid>,
    epoch: u32,
    claimed_at: u64,
    offer_after: u64,
    offers: u32,
    deadline_at: u64,
}

impl Row {
    fn is_open(&self) -> bool {
        matches!(self.turn, TurnStatus::Pending | TurnStatus::Running)
    }

    fn release(&mut self, now: u64) {
        (self.owner, self.offer_after, self.offers) = (None, now, 0);
    }
}

#[derive(Debug)]
struct Agent {
    size: u64,
    produced: u64,
    started: bool,
}

#[derive(Debug)]
struct Runner {
    lease: Uuid,
    registered: bool,
    holds: BTreeMap<usize, Hold>,
    /// What a heartbeat on its way says.
    heartbeat: Option<Vec<(Held, Option<u64>)>>,
    paused_until: u64,
}

#[derive(Clone, Debug)]
struct Hold {
    epoch: u32,
    phase: Phase,
}

#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a simulation holds a few of them")]
enum Phase {
    /// Claimed, with the newest persisted event and how far the projector was.
    Claimed {
        persisted: Option<Box<(u64, SessionEvent)>>,
        projected: u64,
    },
    Open {
        expected: u64,
        follows: Mark,
        floor: u64,
        checkpoint: Checkpoint,
        taken_over: bool,
        sent: Option<SessionEvent>,
        acked: Option<u64>,
    },
    Ended(u64),
}

/// An end that a scheduler is about to append.
#[derive(Debug)]
struct End {
    session: usize,
    ending: Ending,
    event: Option<(u64, SessionEvent)>,
    appended: Option<u64>,
}

#[derive(Debug, Default)]
struct Scheduler {
    projector: Option<(u64, Vec<Entry>)>,
    end: Option<End>,
    /// A stream that it recreated, and has not told Postgres of.
    recreated: Option<Seen>,
}

struct World {
    rng: Rng,
    decisions: Decisions,
    now: u64,
    faulty: bool,
    // Postgres.
    leases: BTreeMap<Uuid, u64>,
    rows: Vec<Row>,
    logs: Vec<Vec<(u64, SessionEvent)>>,
    projected: u64,
    known: Option<Known>,
    projector_lease: (u64, u64),
    streams_lease: (usize, u64),
    // The bus.
    stream: Option<Stream>,
    snapshot: Option<Stream>,
    streams_made: i64,
    queue: VecDeque<usize>,
    // Processes.
    agents: Vec<Agent>,
    runners: Vec<Runner>,
    schedulers: Vec<Scheduler>,
    next_uuid: u128,
    terminations: Vec<bool>,
    gaps: u64,
}

fn at(second: i64) -> OffsetDateTime {
    OffsetDateTime::UNIX_EPOCH + Duration::seconds(second)
}

impl World {
    fn new(seed: u64, decisions: Decisions) -> Self {
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
        let agents = (0..SESSIONS).map(|_| Agent { size: rng.u64(0..500), produced: 0, started: false }).collect();
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

    fn fresh_runner(&mut self) -> Runner {
        self.next_uuid += 1;
        let lease = Uuid::from_u128(self.next_uuid);
        Runner { lease, registered: false, holds: BTreeMap::new(), heartbeat: None, paused_until: 0 }
    }

    /// True once in so many times, while faults are injected.
    fn fault(&mut self, once_in: u32) -> bool {
        self.faulty && self.rng.u32(..once_in) == 0
    }

    fn step(&mut self) {
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

    fn something_fails(&mut self) {
        if !self.faulty {
            return;
        }
        match self.rng.u16(..300) {
            0..=29 => {
                let (runner, fresh) = (self.rng.usize(..RUNNERS), self.fresh_runner());
                self.runners[runner] = fresh;
            }
            30..=49 => {
                let (runner, until) = (self.rng.usize(..RUNNERS), self.now + self.rng.u64(1..600));
                self.runners[runner].paused_until = until;
            }
            50..=69 => {
                let scheduler = self.rng.usize(..SCHEDULERS);
                self.schedulers[scheduler] = Scheduler::default();
            }
            70..=79 => self.queue.clear(),
            80..=99 => {
                let session = self.rng.usize(..SESSIONS);
                self.queue.push_back(session);
            }
            100..=104 => self.stream = None,
            105..=134 => self.snapshot = self.stream.clone(),
            135..=164 => {
                if let (Some(snapshot), Some(_)) = (self.snapshot.take(), &self.stream) {
                    self.stream = Some(snapshot);
                }
            }
            165..=169 => self.leases.clear_all(),
            170..=173 => {
                let session = self.rng.usize(..SESSIONS);
                self.terminations[session] = true;
            }
            174..=189 => {
                if let Some(stream) = &mut self.stream {
                    let through = stream.first.midpoint(stream.last).min(self.projected);
                    if through >= stream.first {
                        stream.entries.retain(|(id, _, _)| *id > through);
                        (stream.first, stream.trimmed_through) = (through + 1, through);
                    }
                }
            }
            _ => {}
        }
    }

    fn agent_writes(&mut self) {
        let agent = self.rng.usize(..SESSIONS);
        let agent = &mut self.agents[agent];
        if agent.started && agent.produced < agent.size {
            agent.produced = (agent.produced + self.rng.u64(1..4)).min(agent.size);
        }
    }

    fn runner_steps(&mut self, index: usize) {
        if self.runners[index].paused_until > self.now || !self.runners[index].registered {
            return;
        }
        let holds: Vec<usize> = self.runners[index].holds.keys().copied().collect();
        if holds.is_empty() || self.rng.u8(..4) == 0 {
            self.claim(index);
            return;
        }
        let session = holds[self.rng.usize(..holds.len())];
        let Some(mut hold) = self.runners[index].holds.remove(&session) else { return };
        if self.work(session, &mut hold) {
            self.runners[index].holds.insert(session, hold);
        } else if !self.fault(4) {
            // The release may be lost, with the process or on the way.
            self.release(session, hold.epoch);
        }
    }

    fn release(&mut self, session: usize, epoch: u32) {
        let (now, row) = (self.now, &mut self.rows[session]);
        if row.epoch == epoch && row.owner.is_some() {
            row.release(now);
        }
    }

    fn claim(&mut self, index: usize) {
        let Some(session) = self.queue.pop_front() else { return };
        if self.fault(20) {
            self.queue.push_back(session);
        }
        let (lease, held) = (self.runners[index].lease, self.runners[index].holds.contains_key(&session));
        if held || !self.leases.contains_key(&lease) {
            return;
        }
        let row = &mut self.rows[session];
        let turn = ownership::Turn { status: row.turn, is_current: true, owner: row.owner };
        if (self.decisions.claim)(row.session, turn, lease) != Verdict::Run {
            return;
        }
        (row.owner, row.claimed_at, row.offer_after, row.offers) = (Some(lease), self.now, self.now, 0);
        row.epoch += 1;
        let epoch = row.epoch;
        // Read after the claim was committed.
        let projected = self.projected;
        let persisted = self.logs[session].last().cloned().map(Box::new);
        if !self.fault(10) {
            self.runners[index].holds.insert(session, Hold { epoch, phase: Phase::Claimed { persisted, projected } });
        }
    }

    /// One step of a runner's work on a turn. Returns whether it goes on.
    fn work(&mut self, session: usize, hold: &mut Hold) -> bool {
        let may_lose_acks = self.faulty;
        let Some(stream) = &mut self.stream else { return true };
        match &mut hold.phase {
            Phase::Ended(_) => true,
            Phase::Claimed { persisted, projected } => {
                let streamed = stream.newest(session);
                if streamed.is_none() && stream.trimmed_through > *projected {
                    return false;
                }
                let streamed = streamed.map(|(id, event)| Newest { id, event });
                let persisted = persisted.as_ref().map(|newest| Newest { id: newest.0, event: &newest.1 });
                match (self.decisions.position)(streamed, persisted, TURN, hold.epoch) {
                    Position::Open { expected, follows, checkpoint, .. } => {
                        let taken_over = hold.epoch == 1;
                        hold.phase = Phase::Open { expected, follows, floor: *projected, checkpoint, taken_over, sent: None, acked: None };
                        true
                    }
                    Position::Ended { id } => {
                        hold.phase = Phase::Ended(id);
                        true
                    }
                    Position::Terminated | Position::Superseded => false,
                }
            }
            Phase::Open { expected, follows, floor, checkpoint, taken_over, sent, acked } => {
                if let Some(id) = acked.take() {
                    if id <= *floor {
                        return false;
                    }
                    let event = sent.take().unwrap_or_default();
                    let (tag, ended) = (event.tag, matches!(event.kind, Some(Kind::TurnEnded(_))));
                    (*expected, *follows) = (id, Mark { id, tag });
                    if ended {
                        hold.phase = Phase::Ended(id);
                    }
                    return true;
                }
                if sent.is_none() {
                    let agent = &mut self.agents[session];
                    let offset = checkpoint.stdout_offset;
                    let kind = if !*taken_over {
                        *taken_over = true;
                        Kind::TakenOver(TakenOver {})
                    } else if !checkpoint.started {
                        checkpoint.started = true;
                        agent.started = true;
                        Kind::TurnStarted(TurnStarted::default())
                    } else if agent.produced > offset {
                        let size = self.rng.u64(1..=agent.produced - offset);
                        checkpoint.stdout_offset += size;
                        Kind::Output(Output { stderr: false, data: vec![b'x'; size as usize].into() })
                    } else if agent.produced == agent.size {
                        Kind::TurnEnded(TurnEnded { exit_code: Some(0), ..TurnEnded::default() })
                    } else {
                        return true;
                    };
                    *sent = Some(SessionEvent {
                        turn: TURN,
                        epoch: hold.epoch,
                        checkpoint: Some(checkpoint.clone()),
                        tag: self.rng.u64(..),
                        follows: Some(follows.id),
                        follows_tag: follows.tag,
                        kind: Some(kind),
                        ..SessionEvent::default()
                    });
                    return true;
                }
                let Some(event) = sent.clone() else { return true };
                match stream.append(session, *expected, event.clone()) {
                    Some(_) if may_lose_acks && self.rng.u8(..10) == 0 => true,
                    Some(id) => {
                        *acked = Some(id);
                        true
                    }
                    None => match stream.newest(session) {
                        Some((id, newest)) if *newest == event => {
                            *acked = Some(id);
                            true
                        }
                        _ => false,
                    },
                }
            }
        }
    }

    fn heartbeat(&mut self, index: usize) {
        if self.runners[index].paused_until > self.now {
            return;
        }
        let (lease, now) = (self.runners[index].lease, self.now);
        let Some(sent) = self.runners[index].heartbeat.take() else {
            let held = |(session, hold): (&usize, &Hold)| {
                let ended = if let Phase::Ended(id) = hold.phase { Some(id) } else { None };
                (Held { session: Uuid::from_u128(*session as u128), turn: TURN, epoch: hold.epoch }, ended)
            };
            let held = self.runners[index].holds.iter().map(held).collect();
            self.runners[index].heartbeat = Some(held);
            return;
        };
        if self.fault(10) {
            return;
        }
        let first = !self.runners[index].registered;
        if !first && !self.leases.contains_key(&lease) {
            let fresh = self.fresh_runner();
            let mut ended = std::mem::take(&mut self.runners[index].holds);
            ended.retain(|_, hold| matches!(hold.phase, Phase::Ended(_)));
            self.runners[index] = Runner { holds: ended, ..fresh };
            return;
        }
        self.leases.insert(lease, now + LEASE);
        let projected = self.projected;
        let owned: Vec<(Held, bool)> = (0..SESSIONS)
            .filter(|session| self.rows[*session].owner == Some(lease))
            .map(|session| {
                let row = &self.rows[session];
                let held = Held { session: Uuid::from_u128(session as u128), turn: TURN, epoch: row.epoch };
                (held, row.claimed_at + CLAIM_GRACE > now)
            })
            .collect();
        let held: Vec<Held> = sent.iter().map(|(held, _)| *held).collect();
        let mut differences = ownership::compare(&held, &owned);
        for (held, ended) in &sent {
            if ended.is_some_and(|id| id <= projected) && owned.iter().any(|(owned, _)| owned == held) {
                self.purge(held.session.as_u128() as usize);
                differences.forgotten.push(*held);
                differences.lost.push(*held);
            }
        }
        for held in &differences.forgotten {
            self.release(held.session.as_u128() as usize, held.epoch);
        }
        // The answer may be lost.
        if self.fault(10) {
            return;
        }
        self.runners[index].registered = true;
        for held in differences.lost {
            let session = held.session.as_u128() as usize;
            if self.runners[index].holds.get(&session).is_some_and(|hold| hold.epoch == held.epoch) {
                self.runners[index].holds.remove(&session);
            }
        }
    }

    fn purge(&mut self, session: usize) {
        if let Some(stream) = &mut self.stream {
            stream.entries.retain(|(_, of, _)| *of != session);
        }
    }

    fn reconcile(&mut self) {
        let now = self.now;
        let expired: Vec<Uuid> = self.leases.iter().filter(|(_, until)| **until < now).map(|(lease, _)| *lease).collect();
        for lease in expired {
            self.leases.remove(&lease);
            for row in self.rows.iter_mut().filter(|row| row.owner == Some(lease)) {
                row.owner = None;
            }
        }
        for (session, row) in self.rows.iter_mut().enumerate() {
            if row.is_open() && row.owner.is_none() && row.offer_after <= now {
                row.offers += 1;
                row.offer_after = now + u64::try_from(ownership::next_offer(row.offers).as_millis()).unwrap_or(u64::MAX) / 10;
                self.queue.push_back(session);
            }
        }
    }

    fn check_stream(&mut self, index: usize) {
        // One replica at a time, by a lease; one that died keeps it for a while.
        let (holder, until) = self.streams_lease;
        if holder != index && until > self.now {
            return;
        }
        self.streams_lease = (index, self.now + LEASE);
        if let Some(seen) = self.schedulers[index].recreated.take() {
            self.known = Some(Known { created_at: seen.created_at, high_watermark: seen.last_sequence });
            let now = self.now;
            for row in self.rows.iter_mut().filter(|row| row.is_open() && row.owner.is_none()) {
                row.release(now);
            }
            return;
        }
        let seen = self.stream.as_ref().map(|stream| Seen { created_at: at(stream.created), last_sequence: stream.last });
        match (generation::condition(self.known, self.projected, seen), seen) {
            (Condition::Intact, Some(seen)) => {
                self.known = Some(Known { created_at: seen.created_at, high_watermark: seen.last_sequence });
            }
            _ => {
                self.streams_made += 1;
                let first = generation::first_sequence(self.known, self.projected);
                let (created, last) = (self.streams_made, first - 1);
                self.stream = Some(Stream { created, first, last, trimmed_through: 0, entries: Vec::new() });
                self.schedulers[index].recreated = Some(Seen { created_at: at(created), last_sequence: last });
            }
        }
    }

    fn project(&mut self, index: usize) {
        let (epoch, until) = self.projector_lease;
        match self.schedulers[index].projector.take() {
            None => {
                if until > self.now {
                    return;
                }
                self.projector_lease = (epoch + 1, self.now + LEASE);
                self.schedulers[index].projector = Some((epoch + 1, Vec::new()));
            }
            Some((mine, batch)) if batch.is_empty() => {
                let Some(stream) = &self.stream else { return };
                let next = stream.entries.iter().filter(|(id, _, _)| *id > self.projected);
                let batch: Vec<_> = next.take(self.rng.usize(1..6)).cloned().collect();
                if batch.is_empty() && epoch == mine {
                    self.projector_lease.1 = self.now + LEASE;
                }
                self.schedulers[index].projector = Some((mine, batch));
            }
            Some((mine, batch)) => {
                // Another leads by now: nothing is written.
                if mine != epoch {
                    return;
                }
                self.projector_lease.1 = self.now + LEASE;
                self.write(&batch);
                self.schedulers[index].projector = Some((mine, Vec::new()));
            }
        }
    }

    fn write(&mut self, batch: &[Entry]) {
        let mut broken = Vec::new();
        for (id, session, event) in batch {
            let persisted = self.logs[*session].last().map(|(id, event)| Mark::of(*id, event));
            match (self.decisions.link)(persisted, *id, Mark::followed_by(event)) {
                Link::Continues => {
                    self.logs[*session].push((*id, event.clone()));
                    if let Some(kind) = &event.kind {
                        self.apply(*session, kind);
                    }
                }
                Link::Old => {}
                Link::Broken => broken.push(*session),
            }
            self.projected = self.projected.max(*id);
        }
        for session in broken {
            self.gaps += 1;
            self.purge(session);
            let (now, row) = (self.now, &mut self.rows[session]);
            if row.is_open() {
                row.release(now);
            }
        }
    }

    fn apply(&mut self, session: usize, kind: &Kind) {
        let row = &mut self.rows[session];
        let transition = state::next(State { session: row.session, current_turn: TURN, turn: Some(row.turn) }, TURN, kind);
        if let Some(status) = transition.turn {
            row.turn = status;
            if status != TurnStatus::Running {
                row.owner = None;
            }
        }
        row.session = transition.session.unwrap_or(row.session);
    }

    /// One step of ending a turn at its deadline, or a session for its user.
    fn end(&mut self, index: usize) {
        let Some(mut end) = self.schedulers[index].end.take() else {
            let overdue = (0..SESSIONS).find(|session| self.rows[*session].is_open() && self.rows[*session].deadline_at < self.now);
            let wanted =
                (0..SESSIONS).find(|session| self.terminations[*session] && self.rows[*session].session != SessionStatus::Terminated);
            let deadline = overdue.map(|session| (session, Ending::Deadline { turn: TURN }));
            if let Some((session, ending)) = wanted.map(|session| (session, Ending::Termination)).or(deadline) {
                self.schedulers[index].end = Some(End { session, ending, event: None, appended: None });
            }
            return;
        };
        let session = end.session;
        if let Some(id) = end.appended {
            // The projector applies it; a termination is applied in any case, once the projector has passed it.
            if self.projected >= id {
                self.apply(session, &Kind::Terminated(Terminated::default()));
            } else {
                self.schedulers[index].end = Some(end);
            }
            return;
        }
        let Some(stream) = &mut self.stream else { return };
        let persisted = self.logs[session].last().map(|(id, event)| (*id, event));
        let Some((expected, event)) = end.event.take() else {
            let streamed = stream.newest(session);
            if let Step::Append { expected, follows } =
                (self.decisions.ending)(end.ending, Log { streamed, persisted, projected: self.projected })
            {
                let kind = match end.ending {
                    Ending::Termination => Kind::Terminated(Terminated::default()),
                    Ending::Deadline { .. } => {
                        let failure = Some(Failure { stage: state::DEADLINE.to_owned(), message: String::new() });
                        Kind::TurnEnded(TurnEnded { failure, ..TurnEnded::default() })
                    }
                    // The model's users change nothing but what runs.
                    Ending::Update => return,
                };
                let checkpoint = streamed.and_then(|(_, event)| event.checkpoint.clone());
                end.event = Some((
                    expected,
                    SessionEvent {
                        turn: TURN,
                        epoch: 0,
                        checkpoint,
                        tag: self.rng.u64(..),
                        follows: Some(follows.id),
                        follows_tag: follows.tag,
                        kind: Some(kind),
                        ..SessionEvent::default()
                    },
                ));
                self.schedulers[index].end = Some(end);
            }
            return;
        };
        let appended = stream.append(session, expected, event).filter(|id| persisted.is_none_or(|(persisted, _)| *id > persisted));
        if let (Some(id), Ending::Termination) = (appended, end.ending) {
            end.appended = Some(id);
            self.schedulers[index].end = Some(end);
        }
    }

    fn check_safety(&self) {
        for (session, log) in self.logs.iter().enumerate() {
            let Some(((id, event), before)) = log.split_last() else { continue };
            let Some(kind) = &event.kind else { continue };
            if let Some((previous, before)) = before.last() {
                assert!(previous < id, "session {session}: ids do not grow");
                let ended = matches!(before.kind, Some(Kind::TurnEnded(_)));
                assert!(!ended || matches!(kind, Kind::Terminated(_)), "session {session}: {kind:?} after its end");
            }
            let offset_before =
                before.iter().rev().find_map(|(_, event)| event.checkpoint.as_ref()).map_or(0, |checkpoint| checkpoint.stdout_offset);
            match kind {
                Kind::Output(output) => {
                    let end = event.checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.stdout_offset);
                    assert_eq!(
                        end,
                        offset_before + output.data.len() as u64,
                        "session {session}: output lost or doubled at event {id}: {:#?}",
                        log.iter().rev().take(4).collect::<Vec<_>>()
                    );
                }
                Kind::TurnEnded(TurnEnded { exit_code: Some(0), .. }) => {
                    assert_eq!(offset_before, self.agents[session].size, "session {session}: completed without its output");
                }
                _ => {}
            }
            let settled = log.iter().any(|(_, event)| matches!(event.kind, Some(Kind::TurnEnded(_) | Kind::Terminated(_))));
            assert!(!settled || !self.rows[session].is_open(), "session {session}: its end is persisted and its turn is open");
        }
        for row in &self.rows {
            assert!(row.owner.is_none_or(|owner| row.is_open() && self.leases.contains_key(&owner)), "owned by an expired lease: {row:?}");
        }
    }

    /// Runs without faults until every session is settled.
    fn heal(&mut self) -> usize {
        self.faulty = false;
        for step in 0..HEALING_STEPS {
            let ended = |session: usize| {
                !self.rows[session].is_open() && (!self.terminations[session] || self.rows[session].session == SessionStatus::Terminated)
            };
            if (0..SESSIONS).all(ended) {
                return step;
            }
            self.step();
        }
        unreachable!("stuck: {:?}\nrunners {:?}\nstream {:?}\nprojected {}", self.rows, self.runners, self.stream, self.projected);
    }
}

/// A lease that is lost with its row releases its turns, as the foreign key does.
trait ClearAll {
    fn clear_all(&mut self);
}

impl ClearAll for BTreeMap<Uuid, u64> {
    fn clear_all(&mut self) {
        // Expired, and found so by the next pass.
        self.values_mut().for_each(|until| *until = 0);
    }
}

/// Runs worlds until so many steps were made. Returns the steps, and the first failure with its seed.
fn run(decisions: Decisions, first_seed: u64, steps: usize) -> (usize, u64, Option<(u64, String)>) {
    let (mut done, mut gaps, mut seed) = (0, 0, first_seed);
    while done < steps {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let mut world = World::new(seed, decisions);
            for _ in 0..FAULTY_STEPS {
                world.step();
            }
            (FAULTY_STEPS + world.heal(), world.gaps)
        }));
        match outcome {
            Ok((steps, found)) => (done, gaps) = (done + steps, gaps + found),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                return (done, gaps, Some((seed, text.unwrap_or_default())));
            }
        }
        seed += 1;
    }
    (done, gaps, None)
}

fn setting(name: &str) -> Option<u64> {
    #[expect(clippy::disallowed_methods, reason = "a test's own settings")]
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn nothing_is_lost_doubled_or_stuck_whatever_fails() {
    let seed = setting("SIMULATION_SEED").unwrap_or_else(|| fastrand::u64(..1 << 40));
    let steps = setting("SIMULATION_STEPS").unwrap_or(1_000_000) as usize;
    let (done, gaps, failure) = run(RIGHT, seed, steps);
    println!("{done} steps from seed {seed}; {gaps} gaps were found and repaired");
    assert!(
        failure.is_none(),
        "SIMULATION_SEED={} repeats it: {}",
        failure.as_ref().map_or(0, |(seed, _)| *seed),
        failure.map(|(_, text)| text).unwrap_or_default()
    );
    assert!(gaps > 0 || steps < 1_000_000, "the faults did not break a single chain");
}

/// Each of these mistakes was made, or nearly. The simulation has to notice it.
#[test]
fn a_planted_mistake_is_found() {
    let mistakes: [(&str, Decisions); 4] = [
        ("events are persisted whatever they follow", Decisions { link: |_, _, _| Link::Continues, ..RIGHT }),
        (
            "a deadline does not look whether the turn has ended",
            Decisions {
                ending: |_, log| {
                    let newest = log.streamed.map_or(0, |(id, _)| id);
                    Step::Append {
                        expected: newest,
                        follows: log.streamed.or(log.persisted).map_or(Mark::default(), |(id, event)| Mark::of(id, event)),
                    }
                },
                ..RIGHT
            },
        ),
        (
            "events are told apart by their ids alone",
            Decisions {
                link: |persisted, id, follows| {
                    let by_id = |mark: Mark| Mark { tag: 0, ..mark };
                    chain::link(persisted.map(by_id), id, follows.map(by_id))
                },
                ..RIGHT
            },
        ),
        (
            "a runner always goes on from the stream",
            Decisions { position: |streamed, _, turn, epoch| position::position(streamed, None, turn, epoch), ..RIGHT },
        ),
    ];
    let found: Vec<_> = mistakes.iter().map(|(mistake, decisions)| (*mistake, run(*decisions, 1, 3_000_000).2)).collect();
    for (mistake, failure) in found {
        assert!(failure.is_some(), "not noticed: {mistake}");
    }
}
