//! A hub follows one session on the bus, once, for all the readers that this gateway has of it.
//!
//! It keeps the newest events in a ring of bounded size. A reader takes from the ring what comes after its own place; one that has
//! fallen out of the ring reads the record instead, until it is back. So no reader has a buffer of its own, and none slows another.
//! A hub lives as long as somebody reads.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use bus::Bus;
use contract::{subject, topology};
use futures::StreamExt as _;
use tokio::sync::watch;
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use types::{Backoff, Partition, SessionId};

use crate::stream::event::Event;

const RING_EVENTS_MAX: usize = 4096;
const RING_BYTES_MAX: usize = 4 * 1024 * 1024;
const RETRY: Backoff = Backoff { base: Duration::from_millis(50), max: Duration::from_secs(2), attempts: u32::MAX };

/// The hubs of this gateway.
pub struct Hubs {
    bus: Bus,
    tasks: TaskTracker,
    hubs: Mutex<HashMap<SessionId, Weak<Hub>>>,
}

/// One followed session.
pub struct Hub {
    ring: Mutex<Ring>,
    /// The newest event's id.
    newest: watch::Sender<u64>,
    _stop: DropGuard,
}

/// What comes up to `floor` has to be read from the record.
#[derive(Clone, Copy, Debug)]
pub struct Behind {
    pub floor: u64,
}

/// Every event after `floor`, as far as the bus has brought them.
struct Ring {
    floor: u64,
    events: VecDeque<Arc<Event>>,
    bytes: usize,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hubs {
    pub fn new(bus: Bus, tasks: TaskTracker) -> Self {
        Self { bus, tasks, hubs: Mutex::default() }
    }

    /// The session's hub; a new one follows the bus from `after`.
    pub fn join(&self, session: SessionId, partition: Partition, after: u64) -> Arc<Hub> {
        let mut hubs = locked(&self.hubs);
        if let Some(hub) = hubs.get(&session).and_then(Weak::upgrade) {
            return hub;
        }
        hubs.retain(|_, hub| hub.strong_count() > 0);
        let stop = CancellationToken::new();
        let ring = Ring { floor: after, events: VecDeque::new(), bytes: 0 };
        let hub = Arc::new(Hub { ring: Mutex::new(ring), newest: watch::Sender::new(after), _stop: stop.clone().drop_guard() });
        hubs.insert(session, Arc::downgrade(&hub));
        metrics::gauge!("aod_followed_sessions").set(hubs.len() as f64);
        let follow = follow(self.bus.clone(), session, partition, after, Arc::downgrade(&hub));
        self.tasks.spawn(async move {
            stop.run_until_cancelled(follow).await;
        });
        hub
    }
}

async fn follow(bus: Bus, session: SessionId, partition: Partition, mut after: u64, hub: Weak<Hub>) {
    let mut failures = 0;
    loop {
        let followed = async {
            let mut entries = bus.follow(topology::events(partition).name, subject::session_log(session, partition), after + 1).await?;
            while let Some(entry) = entries.next().await {
                let entry = entry?;
                failures = 0;
                // A consumer that was made anew may begin with what is known.
                if entry.sequence <= after {
                    continue;
                }
                let Some(hub) = hub.upgrade() else { break };
                // The entry before it was never delivered here: it was trimmed, and is on record.
                if !entry.follows.is_some_and(|before| before <= after && (before > 0 || after == 0)) {
                    hub.skip_to(entry.sequence - 1);
                }
                after = entry.sequence;
                hub.push(Event::decode(entry.sequence, entry.payload));
            }
            Ok::<_, bus::log::ReadError>(())
        };
        if let Err(error) = followed.await {
            tracing::info!(%session, %error, "following was interrupted; going on");
        }
        if hub.strong_count() == 0 {
            return;
        }
        failures += 1;
        tokio::time::sleep(RETRY.jittered(failures)).await;
    }
}

impl Hub {
    /// Up to here the record has what the ring has not.
    fn skip_to(&self, floor: u64) {
        let mut ring = locked(&self.ring);
        *ring = Ring { floor, events: VecDeque::new(), bytes: 0 };
    }

    fn push(&self, event: Event) {
        let id = event.id;
        {
            let mut ring = locked(&self.ring);
            ring.bytes += event.size();
            ring.events.push_back(Arc::new(event));
            while ring.events.len() > RING_EVENTS_MAX || ring.bytes > RING_BYTES_MAX {
                let Some(oldest) = ring.events.pop_front() else { break };
                ring.bytes -= oldest.size();
                ring.floor = oldest.id;
            }
        }
        self.newest.send_replace(id);
    }

    /// Tells of new events.
    pub fn newest(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }

    /// Events after `cursor`, at most `limit`.
    ///
    /// # Errors
    /// [`Behind`] when the ring no longer reaches back that far.
    pub fn after(&self, cursor: u64, limit: usize) -> Result<Vec<Arc<Event>>, Behind> {
        let ring = locked(&self.ring);
        if cursor < ring.floor {
            return Err(Behind { floor: ring.floor });
        }
        let from = ring.events.partition_point(|event| event.id <= cursor);
        Ok(ring.events.iter().skip(from).take(limit).cloned().collect())
    }
}
