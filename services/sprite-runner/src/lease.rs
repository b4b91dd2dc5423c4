//! This runner's lease, and the turns that it holds under it.
//!
//! Each heartbeat reports which turns this process works on. The reply names those that it no
//! longer owns, because they are settled or another runner claimed them. An expired lease is not
//! extended: its turns stop here, and the next heartbeat begins a new lease.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use contract::{
    rpc,
    scheduler::{HeartbeatReply, HeartbeatRequest, HeldTurn},
    subject,
};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use types::{SessionId, random_fraction};
use uuid::Uuid;

use bus::Bus;

const EVERY: Duration = Duration::from_millis(600);
/// A third of it passes before another scheduler is asked.
const DEADLINE: Duration = Duration::from_millis(1500);

type Key = (SessionId, u32);

/// The turns that this process holds. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Turns {
    state: Arc<Mutex<State>>,
    /// The lease that the scheduler knows, once it knows one.
    lease: watch::Sender<Option<Uuid>>,
}

#[derive(Debug, Default)]
struct State {
    held: HashMap<Key, Entry>,
}

#[derive(Debug)]
struct Entry {
    /// Known once the claim was answered.
    epoch: Option<u32>,
    /// The id of the turn's end, once it is in the log.
    ended: Option<u64>,
    lost: CancellationToken,
    inputs: Arc<Notify>,
}

/// A turn that this process holds, until it is dropped.
#[derive(Debug)]
pub struct Hold {
    turns: Turns,
    key: Key,
    /// Cancelled when the turn is not this runner's any more.
    pub lost: CancellationToken,
    /// Notified when inputs of the turn wait at the scheduler.
    pub inputs: Arc<Notify>,
}

impl Turns {
    pub fn new() -> Self {
        Self { state: Arc::default(), lease: watch::Sender::new(None) }
    }

    /// The lease to claim turns with.
    pub fn lease(&self) -> Option<Uuid> {
        *self.lease.borrow()
    }

    /// Waits until the scheduler knows this runner.
    pub async fn registered(&self) {
        let _ = self.lease.subscribe().wait_for(Option::is_some).await;
    }

    /// Begins to hold a turn; `None` where this process holds it already.
    pub fn hold(&self, session: SessionId, turn: u32) -> Option<Hold> {
        let (key, lost, inputs) =
            ((session, turn), CancellationToken::new(), Arc::new(Notify::new()));
        let mut state = self.lock();
        if state.held.contains_key(&key) {
            return None;
        }
        state.held.insert(
            key,
            Entry { epoch: None, ended: None, lost: lost.clone(), inputs: inputs.clone() },
        );
        Some(Hold { turns: self.clone(), key, lost, inputs })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self) -> Vec<HeldTurn> {
        let state = self.lock();
        let held = state.held.iter().filter_map(|((session, turn), entry)| {
            Some(HeldTurn {
                session_id: session.to_string(),
                turn: *turn,
                epoch: entry.epoch?,
                ended: entry.ended,
            })
        });
        held.collect()
    }

    fn lose(&self, turns: &[HeldTurn]) {
        let mut state = self.lock();
        for turn in turns {
            let Ok(session) = turn.session_id.parse() else { continue };
            let key = (session, turn.turn);
            let Some(entry) = state.held.get(&key).filter(|entry| entry.epoch == Some(turn.epoch))
            else {
                continue;
            };
            entry.lost.cancel();
            if entry.ended.is_some() {
                state.held.remove(&key);
            }
        }
    }

    /// Tells turns of inputs that wait for them.
    fn tell_of_inputs(&self, turns: &[HeldTurn]) {
        let state = self.lock();
        for turn in turns {
            let Ok(session) = turn.session_id.parse() else { continue };
            if let Some(entry) = state
                .held
                .get(&(session, turn.turn))
                .filter(|entry| entry.epoch == Some(turn.epoch))
            {
                entry.inputs.notify_one();
            }
        }
    }

    /// Stops all turns: their lease is gone.
    fn lose_all(&self) {
        let mut state = self.lock();
        state.held.values().for_each(|entry| entry.lost.cancel());
        state.held.retain(|_, entry| entry.ended.is_none());
    }

    /// Sends heartbeats until the stop, and after it until every turn was released.
    pub async fn keep(self, bus: Bus, runner: Arc<str>, stop: CancellationToken) {
        let (mut lease, mut first) = (Uuid::now_v7(), true);
        // Kept for the scheduler to find that this runner is connected.
        let mut _presence = bus.hints(subject::lease_presence(lease)).await;
        while !(stop.is_cancelled() && self.lock().held.values().all(|entry| entry.ended.is_some()))
        {
            let request = HeartbeatRequest {
                runner_lease: lease.to_string(),
                runner: runner.to_string(),
                first,
                held: self.held(),
            };
            match bus.call::<rpc::Heartbeat>(&request, DEADLINE).await {
                Ok(HeartbeatReply { expired: true, .. }) => {
                    tracing::warn!(%lease, "runner lease expired; stopping its turns");
                    metrics::counter!("aod_runner_leases_lost_total").increment(1);
                    self.lease.send_replace(None);
                    self.lose_all();
                    (lease, first) = (Uuid::now_v7(), true);
                    _presence = bus.hints(subject::lease_presence(lease)).await;
                    continue;
                }
                Ok(reply) => {
                    self.lose(&reply.lost);
                    self.tell_of_inputs(&reply.with_inputs);
                    if first {
                        first = false;
                        self.lease.send_replace(Some(lease));
                    }
                }
                Err(error) => tracing::debug!(%error, "heartbeat not answered; will retry"),
            }
            // A stop does not wait: it ends with the last turn.
            let pause = EVERY.mul_f64(0.9 + random_fraction() / 5.0);
            tokio::time::sleep(if stop.is_cancelled() { pause / 6 } else { pause }).await;
        }
    }
}

impl Hold {
    /// The claim was answered.
    pub fn claimed(&self, epoch: u32) {
        if let Some(entry) = self.turns.lock().held.get_mut(&self.key) {
            entry.epoch = Some(epoch);
        }
    }

    /// The turn's end is in the log, with this id. The turn is held until the end is persisted,
    /// without occupying anything.
    pub fn ended(self, id: u64) {
        if let Some(entry) = self.turns.lock().held.get_mut(&self.key) {
            entry.ended = Some(id);
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.turns.lock();
        if state.held.get(&self.key).is_some_and(|entry| entry.ended.is_none()) {
            state.held.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(session: SessionId, epoch: u32) -> [HeldTurn; 1] {
        [HeldTurn { session_id: session.to_string(), turn: 1, epoch, ended: None }]
    }

    #[test]
    fn a_turn_is_held_once_and_lost_by_its_epoch() {
        let (turns, session) = (Turns::new(), SessionId::new());
        let hold = turns.hold(session, 1).unwrap();
        assert!(
            turns.hold(session, 1).is_none() && turns.held().is_empty(),
            "held, and not claimed yet"
        );
        hold.claimed(3);
        assert_eq!(turns.held().len(), 1);
        turns.lose(&lost(session, 2));
        assert!(!hold.lost.is_cancelled(), "that was an earlier claim");
        turns.lose(&lost(session, 3));
        assert!(hold.lost.is_cancelled());
        drop(hold);
        assert!(turns.hold(session, 1).is_some());
    }

    #[test]
    fn an_ended_turn_is_held_until_the_scheduler_has_settled_it() {
        let (turns, session) = (Turns::new(), SessionId::new());
        let hold = turns.hold(session, 1).unwrap();
        hold.claimed(1);
        hold.ended(77);
        assert_eq!(turns.held()[0].ended, Some(77));
        turns.lose(&lost(session, 1));
        assert!(turns.held().is_empty() && turns.hold(session, 1).is_some());
    }
}
