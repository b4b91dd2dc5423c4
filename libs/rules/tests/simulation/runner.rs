//! Runners and their agents: claims, the log that a turn writes, and heartbeats.

use contract::session::{
    Output, SessionEvent, TakenOver, TurnEnded, TurnStarted, session_event::Kind,
};
use rules::{
    chain::Mark,
    ownership::{self, Held, Verdict},
    position::{Newest, Position},
};
use uuid::Uuid;

use crate::{
    model::{Hold, Phase, Runner},
    world::{LEASE, SESSIONS, TURN, World},
};

const CLAIM_GRACE: u64 = 1200;

impl World {
    pub fn agent_writes(&mut self) {
        let agent = self.rng.usize(..SESSIONS);
        let agent = &mut self.agents[agent];
        if agent.started && agent.produced < agent.size {
            agent.produced = (agent.produced + self.rng.u64(1..4)).min(agent.size);
        }
    }

    pub fn runner_steps(&mut self, index: usize) {
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
        let (lease, held) =
            (self.runners[index].lease, self.runners[index].holds.contains_key(&session));
        if held || !self.leases.contains_key(&lease) {
            return;
        }
        let row = &mut self.rows[session];
        let turn = ownership::Turn { status: row.turn, is_current: true, owner: row.owner };
        if (self.decisions.claim)(row.session, turn, lease) != Verdict::Run {
            return;
        }
        (row.owner, row.claimed_at, row.offer_after, row.offers) =
            (Some(lease), self.now, self.now, 0);
        row.epoch += 1;
        let epoch = row.epoch;
        // Read after the claim was committed.
        let projected = self.projected;
        let persisted = self.logs[session].last().cloned().map(Box::new);
        if !self.fault(10) {
            self.runners[index]
                .holds
                .insert(session, Hold { epoch, phase: Phase::Claimed { persisted, projected } });
        }
    }

    /// One step of a runner's work on a turn. Returns whether it continues.
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
                let persisted =
                    persisted.as_ref().map(|newest| Newest { id: newest.0, event: &newest.1 });
                match (self.decisions.position)(streamed, persisted, TURN, hold.epoch) {
                    Position::Open { expected, follows, checkpoint, .. } => {
                        let taken_over = hold.epoch == 1;
                        hold.phase = Phase::Open {
                            expected,
                            follows,
                            floor: *projected,
                            checkpoint: *checkpoint,
                            taken_over,
                            sent: None,
                            acked: None,
                        };
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
                        Kind::Output(Output {
                            stderr: false,
                            data: vec![b'x'; size as usize].into(),
                        })
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

    pub fn heartbeat(&mut self, index: usize) {
        if self.runners[index].paused_until > self.now {
            return;
        }
        let (lease, now) = (self.runners[index].lease, self.now);
        let Some(sent) = self.runners[index].heartbeat.take() else {
            let held = |(session, hold): (&usize, &Hold)| {
                let ended = if let Phase::Ended(id) = hold.phase { Some(id) } else { None };
                (
                    Held {
                        session: Uuid::from_u128(*session as u128),
                        turn: TURN,
                        epoch: hold.epoch,
                    },
                    ended,
                )
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
                let held = Held {
                    session: Uuid::from_u128(session as u128),
                    turn: TURN,
                    epoch: row.epoch,
                };
                (held, row.claimed_at + CLAIM_GRACE > now)
            })
            .collect();
        let held: Vec<Held> = sent.iter().map(|(held, _)| *held).collect();
        let mut differences = ownership::compare(&held, &owned);
        for (held, ended) in &sent {
            if ended.is_some_and(|id| id <= projected)
                && owned.iter().any(|(owned, _)| owned == held)
            {
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
            if self.runners[index].holds.get(&session).is_some_and(|hold| hold.epoch == held.epoch)
            {
                self.runners[index].holds.remove(&session);
            }
        }
    }
}
