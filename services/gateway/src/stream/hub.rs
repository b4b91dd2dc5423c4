//! A hub follows one session for all the readers that this gateway has of it: by a live
//! subscription, and by the event log in Postgres where that missed something or is interrupted. It
//! keeps the newest events in a [`Tail`]; readers take from it what comes after their own place,
//! and read the event log in Postgres themselves where they have fallen behind it. So no reader has
//! a buffer of its own, and none slows another. A hub lives as long as it has readers.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use bus::{
    Bus, RpcError,
    live::{Entry, Interrupted, Live},
};
use contract::{
    rpc,
    scheduler::{GetSessionRequest, QueuedInputs, ReadEventsReply, Session},
    subject, topology,
};
use futures::{StreamExt as _, future::BoxFuture};
use prost::Message as _;
use tokio::{
    sync::{Semaphore, broadcast, watch},
    time::Instant,
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use types::{Backoff, ErrorCode, Partition, SessionId, random_fraction};

use crate::stream::{
    event::Event,
    history::{self, PAGE_BYTES},
    tail::{Last, Need, Read, Tail},
};

/// Requests of all hubs together, to NATS and to the scheduler each.
const REQUESTS_MAX: usize = 64;
/// Between reads of the event log while it has to tell what the subscription does not.
const RETRY: Backoff =
    Backoff { base: Duration::from_millis(10), max: Duration::from_secs(1), attempts: u32::MAX };
/// The stream is asked first where a log ends; Postgres when it takes longer than this.
const STREAM_WAIT: Duration = Duration::from_millis(250);
/// How often a silent hub compares itself with Postgres. Only that shows messages that were lost
/// between servers of a NATS cluster.
const CHECK_INTERVAL: Duration = Duration::from_secs(60);
/// Messages about queued inputs that a slow reader may be behind.
const QUEUED_MAX: usize = 64;
/// How long a turn's end waits until it is persisted, so that a client's next request agrees with
/// it.
const PERSISTED_WAIT: Duration = Duration::from_secs(5);

/// The hubs of this gateway.
pub struct Hubs {
    bus: Bus,
    tasks: TaskTracker,
    requests: Arc<Semaphore>,
    hubs: Mutex<HashMap<SessionId, Weak<Hub>>>,
}

/// One followed session.
pub struct Hub {
    session: SessionId,
    shared: Arc<Shared>,
    hubs: Weak<Hubs>,
    _stop: DropGuard,
}

struct Shared {
    tail: Mutex<Tail>,
    /// Changes with the tail.
    changes: watch::Sender<u64>,
    /// Inputs that were just queued, and texts that the agent is writing. A slow reader misses some
    /// and finds them in the event log later.
    queued: broadcast::Sender<Arc<QueuedInputs>>,
    /// The last turn's end that was asked about: its event, and the session at that time.
    ended: tokio::sync::Mutex<Option<(u64, Option<Session>)>>,
    /// Events up to this one are known to be persisted.
    persisted: tokio::sync::Mutex<u64>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hubs {
    pub fn new(bus: Bus, tasks: TaskTracker) -> Self {
        Self {
            bus,
            tasks,
            requests: Arc::new(Semaphore::new(REQUESTS_MAX)),
            hubs: Mutex::default(),
        }
    }

    /// Returns the session's hub; a new one subscribes at once.
    pub fn join(self: &Arc<Self>, session: SessionId, partition: Partition) -> Arc<Hub> {
        let mut hubs = locked(&self.hubs);
        if let Some(hub) = hubs.get(&session).and_then(Weak::upgrade) {
            return hub;
        }
        let stop = CancellationToken::new();
        let (tail, changes) = (Mutex::new(Tail::new()), watch::Sender::new(0));
        let queued = broadcast::Sender::new(QUEUED_MAX);
        let shared = Arc::new(Shared {
            tail,
            changes,
            queued,
            ended: tokio::sync::Mutex::default(),
            persisted: tokio::sync::Mutex::default(),
        });
        let hub = Arc::new(Hub {
            session,
            shared: shared.clone(),
            hubs: Arc::downgrade(self),
            _stop: stop.clone().drop_guard(),
        });
        hubs.insert(session, Arc::downgrade(&hub));
        metrics::gauge!("aod_followed_sessions").set(hubs.len() as f64);
        let follower = Follower {
            bus: self.bus.clone(),
            requests: self.requests.clone(),
            session,
            partition,
            shared,
            gap: None,
        };
        self.tasks.spawn(async move {
            stop.run_until_cancelled(follower.run()).await;
        });
        hub
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        let Some(hubs) = self.hubs.upgrade() else { return };
        let mut hubs = locked(&hubs.hubs);
        // Another may have taken its place.
        if hubs.get(&self.session).is_some_and(|hub| hub.strong_count() == 0) {
            hubs.remove(&self.session);
            metrics::gauge!("aod_followed_sessions").set(hubs.len() as f64);
        }
    }
}

impl Hub {
    /// Changes whenever [`Self::read`] may return something else.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    /// What is queued for the session from now on.
    pub fn queued(&self) -> broadcast::Receiver<Arc<QueuedInputs>> {
        self.shared.queued.subscribe()
    }

    /// Events after `cursor`, at most `limit`.
    pub fn read(&self, cursor: u64, limit: usize) -> Read {
        locked(&self.shared.tail).read(cursor, limit)
    }

    /// The event after `cursor` that may end the stream.
    pub fn end_after(&self, cursor: u64) -> Option<Arc<Event>> {
        locked(&self.shared.tail).end_after(cursor)
    }

    /// The session as it is once an event is persisted. Readers of the same event share the answer.
    /// `None` where none came in time.
    pub async fn session_at_end(&self, bus: &Bus, user_id: &str, event_id: u64) -> Option<Session> {
        let mut ended = self.shared.ended.lock().await;
        if let Some((id, session)) = &*ended
            && *id == event_id
        {
            return session.clone();
        }
        let session = session_once_persisted(bus, user_id, self.session, event_id).await;
        *ended = Some((event_id, session.clone()));
        session
    }

    /// Waits until an event is persisted, or the session is deleted, however long that takes.
    /// Readers share the requests.
    pub async fn persisted(&self, bus: &Bus, user_id: &str, event_id: u64) {
        until_answered(|| async {
            let mut persisted = self.shared.persisted.lock().await;
            if *persisted < event_id {
                ask_session(bus, user_id, self.session, event_id).await?;
                *persisted = event_id;
            }
            Ok(())
        })
        .await;
    }
}

/// Asks until there is an answer; that the session does not exist any more is one.
async fn until_answered<F: Future<Output = Result<(), RpcError>>>(ask: impl Fn() -> F) {
    for attempts in 1.. {
        match ask().await {
            Err(failure) if failure.code != ErrorCode::NotFound => {
                tracing::debug!(%failure, attempts, "an event is not known to be persisted; will retry");
                tokio::time::sleep(RETRY.jittered(attempts)).await;
            }
            _ => return,
        }
    }
}

/// The session as it is once an event is persisted. `None` where no answer came in time.
pub async fn session_once_persisted(
    bus: &Bus,
    user_id: &str,
    session: SessionId,
    event_id: u64,
) -> Option<Session> {
    ask_session(bus, user_id, session, event_id).await.ok()
}

async fn ask_session(
    bus: &Bus,
    user_id: &str,
    session: SessionId,
    event_id: u64,
) -> Result<Session, RpcError> {
    let request = GetSessionRequest {
        user_id: user_id.to_owned(),
        session_id: session.to_string(),
        recorded_through: event_id,
        v1: false,
    };
    bus.call::<rpc::GetSession>(&request, PERSISTED_WAIT).await
}

/// What fills a hub's tail.
struct Follower {
    bus: Bus,
    requests: Arc<Semaphore>,
    session: SessionId,
    partition: Partition,
    shared: Arc<Shared>,
    /// Counted while the subscription does not tell everything.
    gap: Option<Unfollowed>,
}

enum Answer {
    Last(Option<Last>, Option<u64>),
    Newest(u64),
    Page(ReadEventsReply),
    Deleted,
    Failed(RpcError),
}

type Request = BoxFuture<'static, Answer>;

impl Follower {
    async fn run(mut self) {
        let mut live = self.subscribe().await;
        let mut queued = self.bus.hint_messages(subject::queued_inputs(self.session)).await.ok();
        let (mut last, mut page) = (None::<Request>, None::<Request>);
        let (mut attempts, mut check_at) = (0, next_check());
        loop {
            let (need, is_unknown, end) = {
                let tail = locked(&self.shared.tail);
                (tail.need(), tail.is_unknown(), tail.end())
            };
            match need {
                Need::Nothing => (self.gap, last, attempts) = (None, None, 0),
                Need::Last => {
                    self.gap.get_or_insert_with(Unfollowed::new);
                    last.get_or_insert_with(|| {
                        self.ask_last(is_unknown, RETRY.jittered(attempts).min(pause(attempts)))
                    });
                    let delay =
                        if is_unknown { STREAM_WAIT } else { RETRY.jittered(attempts.max(1)) };
                    page.get_or_insert_with(|| {
                        if is_unknown { self.ask_newest(delay) } else { self.ask_page(end, delay) }
                    });
                }
                Need::Persisted { after } => {
                    self.gap.get_or_insert_with(Unfollowed::new);
                    page.get_or_insert_with(|| {
                        self.ask_page(after, RETRY.jittered(attempts).min(pause(attempts)))
                    });
                }
            }
            tokio::select! {
                entry = live.next() => match entry {
                    Ok(entry) => {
                        check_at = next_check();
                        if self.offer(entry) {
                            // What was asked for before does not tell of it.
                            (page, attempts) = (None, 0);
                        }
                    }
                    Err(Interrupted) => {
                        locked(&self.shared.tail).interrupt();
                        (last, page, attempts) = (None, None, 0);
                        if live.is_closed() {
                            tokio::time::sleep(RETRY.max).await;
                            live = self.subscribe().await;
                        }
                    }
                },
                message = async {
                    match &mut queued {
                        Some(queued) => queued.next().await,
                        None => std::future::pending().await,
                    }
                } => match message.map(QueuedInputs::decode) {
                    // No one may listen.
                    Some(Ok(inputs)) => drop(self.shared.queued.send(Arc::new(inputs))),
                    Some(Err(_)) => {}
                    None => queued = None,
                },
                answer = pending(&mut last) => {
                    // A page that was asked for before does not tell what came until now.
                    (last, page) = (None, None);
                    attempts += u32::from(matches!(answer, Answer::Failed(_)));
                    self.apply(answer);
                }
                answer = pending(&mut page) => {
                    page = None;
                    attempts = if matches!(&answer, Answer::Page(page) if !page.events.is_empty()) { 0 } else { attempts + 1 };
                    self.apply(answer);
                }
                () = tokio::time::sleep_until(check_at) => {
                    check_at = next_check();
                    page.get_or_insert_with(|| self.ask_page(end, Duration::ZERO));
                }
            }
        }
    }

    async fn subscribe(&self) -> Live {
        let mut attempts = 0;
        loop {
            match self.bus.live(self.session, self.partition).await {
                Ok(live) => return live,
                // The connection is closed for good: the process is about to end.
                Err(_) => tokio::time::sleep(RETRY.jittered(attempts)).await,
            }
            attempts += 1;
        }
    }

    fn offer(&self, entry: Entry) -> bool {
        let is_gap = locked(&self.shared.tail).offer(entry);
        if is_gap {
            metrics::counter!("aod_live_gaps_total").increment(1);
        }
        self.shared.changes.send_modify(|change| *change += 1);
        is_gap
    }

    fn apply(&self, answer: Answer) {
        let mut tail = locked(&self.shared.tail);
        match answer {
            Answer::Last(last, newest) => tail.join(last, newest),
            Answer::Newest(newest) => tail.start_without_stream(newest),
            Answer::Page(page) => {
                let events = page
                    .events
                    .into_iter()
                    .map(|event| Event::decode(event.event_id, event.payload));
                tail.add_persisted(events, page.projected);
            }
            Answer::Deleted => tail.delete(),
            Answer::Failed(error) => {
                tracing::debug!(session_id = %self.session, %error, "a followed session's event log cannot be read; will retry");
                return;
            }
        }
        drop(tail);
        self.shared.changes.send_modify(|change| *change += 1);
    }

    /// Asks the stream where the log ends; where it holds nothing of it and `needs_newest`,
    /// Postgres too.
    fn ask_last(&self, needs_newest: bool, delay: Duration) -> Request {
        let (bus, requests, session, partition) =
            (self.bus.clone(), self.requests.clone(), self.session, self.partition);
        Box::pin(async move {
            tokio::time::sleep(delay).await;
            let permit = requests.acquire_owned().await;
            let stream = topology::events(partition).name;
            let answer = match bus.last(stream, &subject::session_log(session, partition)).await {
                Ok(Some(last)) => {
                    let entry = Entry {
                        sequence: last.sequence,
                        previous: last.follows.unwrap_or_default(),
                        payload: last.payload,
                    };
                    Answer::Last(Some(Last { entry, follows: last.follows }), None)
                }
                Ok(None) if !needs_newest => Answer::Last(None, None),
                Ok(None) => match history::newest(&bus, session).await {
                    Ok(Some(newest)) => Answer::Last(None, Some(newest)),
                    Ok(None) => Answer::Deleted,
                    Err(failure) => Answer::Failed(failure),
                },
                Err(error) => {
                    tracing::debug!(session_id = %session, error = %anyhow::Error::new(error).root_cause(), "failed to read a log's last event; will retry");
                    Answer::Failed(RpcError::unavailable("The message bus"))
                }
            };
            drop(permit);
            answer
        })
    }

    fn ask_newest(&self, delay: Duration) -> Request {
        let (bus, requests, session) = (self.bus.clone(), self.requests.clone(), self.session);
        Box::pin(async move {
            tokio::time::sleep(delay).await;
            let _permit = requests.acquire_owned().await;
            match history::newest(&bus, session).await {
                Ok(Some(newest)) => Answer::Newest(newest),
                Ok(None) => Answer::Deleted,
                Err(failure) => Answer::Failed(failure),
            }
        })
    }

    fn ask_page(&self, after: u64, delay: Duration) -> Request {
        let (bus, requests, session) = (self.bus.clone(), self.requests.clone(), self.session);
        Box::pin(async move {
            tokio::time::sleep(delay).await;
            let _permit = requests.acquire_owned().await;
            match history::read_page(&bus, session, after, PAGE_BYTES).await {
                Ok(page) if page.session_deleted => Answer::Deleted,
                Ok(page) => Answer::Page(page),
                Err(failure) => Answer::Failed(failure),
            }
        })
    }
}

/// The answer to a request, where there is one.
async fn pending(request: &mut Option<Request>) -> Answer {
    match request {
        Some(request) => request.await,
        None => std::future::pending().await,
    }
}

/// The first attempt is made at once.
fn pause(attempts: u32) -> Duration {
    if attempts == 0 { Duration::ZERO } else { Duration::MAX }
}

fn next_check() -> Instant {
    Instant::now() + CHECK_INTERVAL.mul_f64(0.5 + random_fraction() / 2.0)
}

/// A session whose subscription does not tell everything at the moment.
struct Unfollowed;

impl Unfollowed {
    fn new() -> Self {
        metrics::gauge!("aod_sessions_read_from_postgres").increment(1);
        Self
    }
}

impl Drop for Unfollowed {
    fn drop(&mut self) {
        metrics::gauge!("aod_sessions_read_from_postgres").decrement(1);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test]
    async fn an_event_that_is_not_persisted_yet_is_waited_for() {
        for (last, code) in [(4, None), (3, Some(ErrorCode::NotFound))] {
            let asked = Cell::new(0);
            until_answered(|| async {
                asked.set(asked.get() + 1);
                match code {
                    _ if asked.get() < last => Err(RpcError::unavailable("The scheduler")),
                    Some(code) => Err(RpcError::new(code, "gone")),
                    None => Ok(()),
                }
            })
            .await;
            assert_eq!(asked.get(), last);
        }
    }
}
