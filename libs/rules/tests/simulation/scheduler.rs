//! Schedulers: they offer turns, recreate the stream, project it, and end turns and sessions.

use contract::session::{Failure, SessionEvent, Terminated, TurnEnded, session_event::Kind};
use rules::{
    chain::{Link, Mark},
    ending::{Ending, Log, Step},
    generation::{self, Condition, Known, Seen},
    ownership,
    state::{self, State},
};
use time::{Duration, OffsetDateTime};
use types::{SessionStatus, TurnStatus};
use uuid::Uuid;

use crate::{
    model::{End, Entry, Stream},
    world::{LEASE, SESSIONS, TURN, World},
};

/// How long a termination waits for the projector.
const PROJECTED_WITHIN: u64 = 800;

fn at(second: i64) -> OffsetDateTime {
    OffsetDateTime::UNIX_EPOCH + Duration::seconds(second)
}

impl World {
    pub fn purge(&mut self, session: usize) {
        if let Some(stream) = &mut self.stream {
            stream.entries.retain(|(_, of, _)| *of != session);
        }
    }

    pub fn reconcile(&mut self) {
        let now = self.now;
        let expired: Vec<Uuid> = self
            .leases
            .iter()
            .filter(|(_, until)| **until < now)
            .map(|(lease, _)| *lease)
            .collect();
        for lease in expired {
            self.leases.remove(&lease);
            for row in self.rows.iter_mut().filter(|row| row.owner == Some(lease)) {
                row.owner = None;
            }
        }
        let rng = &mut self.rng;
        for (session, row) in self.rows.iter_mut().enumerate() {
            if row.is_open() && row.owner.is_none() && row.offer_after <= now {
                row.offers += 1;
                row.offer_after = now
                    + u64::try_from(ownership::OFFERS.spread(row.offers, rng.f64()).as_millis())
                        .unwrap_or(u64::MAX)
                        / 10;
                self.queue.push_back(session);
            }
        }
    }

    pub fn check_stream(&mut self, index: usize) {
        // What creates streams knows nothing of earlier ones.
        let Some(stream) = &mut self.stream else {
            self.streams_made += 1;
            self.stream = Some(Stream {
                created: self.streams_made,
                first: 1,
                last: 0,
                trimmed_through: 0,
                entries: Vec::new(),
            });
            return;
        };
        // One replica at a time, by a lease; one that died keeps it for a while.
        let (holder, until) = self.streams_lease;
        if holder != index && until > self.now {
            return;
        }
        self.streams_lease = (index, self.now + LEASE);
        let seen = Seen { created_at: at(stream.created), last_sequence: stream.last };
        let now_known =
            Some(Known { created_at: seen.created_at, high_watermark: seen.last_sequence });
        if let Some(through) = self.schedulers[index].raised.take() {
            (self.known, self.projected) = (now_known, self.projected.max(through));
            let now = self.now;
            for row in self.rows.iter_mut().filter(|row| row.is_open() && row.owner.is_none()) {
                row.release(now);
            }
            return;
        }
        match generation::condition(self.known, self.projected, seen) {
            Condition::Intact => self.known = now_known,
            Condition::Exchanged | Condition::SetBack => {
                let through = generation::first_sequence(self.known, self.projected, seen) - 1;
                let highest = self.known.map_or(0, |known| known.high_watermark);
                self.known = Some(Known {
                    created_at: OffsetDateTime::UNIX_EPOCH,
                    high_watermark: highest.max(self.projected),
                });
                (stream.first, stream.last) = (through + 1, through);
                stream.trimmed_through = through;
                stream.entries.clear();
                self.schedulers[index].raised = Some(through);
            }
        }
    }

    pub fn project(&mut self, index: usize) {
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
        let transition = state::next(
            State { session: row.session, current_turn: TURN, turn: Some(row.turn) },
            TURN,
            kind,
        );
        if let Some(status) = transition.turn {
            row.turn = status;
            if status != TurnStatus::Running {
                row.owner = None;
            }
        }
        row.session = transition.session.unwrap_or(row.session);
    }

    /// One step of ending a turn at its deadline, or a session for its user.
    pub fn end(&mut self, index: usize) {
        let Some(mut end) = self.schedulers[index].end.take() else {
            let overdue = (0..SESSIONS).find(|session| {
                self.rows[*session].is_open() && self.rows[*session].deadline_at < self.now
            });
            let wanted = (0..SESSIONS).find(|session| {
                self.terminations[*session]
                    && self.rows[*session].session != SessionStatus::Terminated
            });
            let deadline = overdue.map(|session| (session, Ending::Deadline { turn: TURN }));
            if let Some((session, ending)) =
                wanted.map(|session| (session, Ending::Termination)).or(deadline)
            {
                self.schedulers[index].end =
                    Some(End { session, ending, event: None, appended: None });
            }
            return;
        };
        let session = end.session;
        if let Some((id, until)) = end.appended {
            // The projector applies it; a termination is applied in any case, once the projector
            // has passed it. Where the stream was lost before, the user is told to try again.
            if self.projected >= id {
                self.apply(session, &Kind::Terminated(Terminated::default()));
            } else if self.now < until {
                self.schedulers[index].end = Some(end);
            }
            return;
        }
        let Some(stream) = &mut self.stream else { return };
        let persisted = self.logs[session].last().map(|(id, event)| (*id, event));
        let Some((expected, event)) = end.event.take() else {
            let streamed = stream.newest(session);
            if let Step::Append { expected, follows } = (self.decisions.ending)(
                end.ending,
                Log { streamed, persisted, projected: self.projected },
            ) {
                let kind = match end.ending {
                    Ending::Termination => Kind::Terminated(Terminated::default()),
                    Ending::Deadline { .. } => {
                        let failure = Some(Failure {
                            stage: state::DEADLINE.to_owned(),
                            message: String::new(),
                        });
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
        let appended = stream
            .append(session, expected, event)
            .filter(|id| persisted.is_none_or(|(persisted, _)| *id > persisted));
        if let (Some(id), Ending::Termination) = (appended, end.ending) {
            end.appended = Some((id, self.now + PROJECTED_WITHIN));
            self.schedulers[index].end = Some(end);
        }
    }
}
