//! Following a session's typed events over server-sent events, from turn to turn until the session ends.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use bus::Failure;
use bytes::Bytes;
use contract::scheduler::ReadEventsReply;
use futures::{Stream, future::BoxFuture};
use serde_json::json;
use tokio::{sync::watch, time::Instant};
use types::{Backoff, ErrorCode, Partition, SessionId};

use crate::{
    App,
    stream::{
        event::{Event, anonymous_frame},
        history,
        hub::Hub,
        open::OpenStream,
        tail::Read,
    },
};

const HEARTBEAT: Duration = Duration::from_secs(10);
/// What is written to the socket at a time.
const CHUNK_BYTES: usize = 64 * 1024;
const EVENTS_AT_A_TIME: usize = 512;
/// Between reads of an event log that has nothing new, or cannot be read. The first is made at once.
const RETRY: Backoff = Backoff { base: Duration::from_millis(5), max: Duration::from_secs(1), attempts: u32::MAX };

/// What a request brought.
enum Answer {
    Page(Result<ReadEventsReply, Failure>),
    /// The event is persisted, or was waited for long enough.
    Persisted(u64),
}

/// One connection.
pub struct Follower {
    app: App,
    session: SessionId,
    stream: OpenStream,
    hub: Arc<Hub>,
    changes: watch::Receiver<u64>,
    user_id: String,
    cursor: u64,
    /// Events up to this one are persisted.
    persisted: u64,
    pending: VecDeque<Arc<Event>>,
    request: Option<BoxFuture<'static, Answer>>,
    /// Requests in a row that brought nothing.
    attempts: u32,
    /// The hub's tail begins after this event: everything up to it is read from Postgres.
    floor: u64,
    state: State,
}

#[derive(PartialEq, Eq)]
enum State {
    Starting,
    Following,
    Ended,
}

impl Follower {
    /// Subscribes before anything is read: nothing is appended in between unseen.
    pub fn new(app: App, user_id: String, stream: OpenStream, (session, partition): (SessionId, Partition), after: u64) -> Self {
        let hub = app.hubs.join(session, partition);
        let changes = hub.changes();
        Self {
            app,
            session,
            stream,
            hub,
            changes,
            user_id,
            cursor: after,
            persisted: 0,
            pending: VecDeque::new(),
            request: None,
            attempts: 0,
            floor: 0,
            state: State::Starting,
        }
    }

    /// The bytes of the response. Nothing is read ahead of what the socket takes.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes, Infallible>> {
        futures::stream::unfold(self, |mut follower| async move { Some((Ok(follower.next().await?), follower)) })
    }

    async fn next(&mut self) -> Option<Bytes> {
        match self.state {
            State::Starting => {
                self.state = State::Following;
                return Some(Bytes::from_static(b": following\n\n"));
            }
            State::Ended => return None,
            State::Following => {}
        }
        let heartbeat_at = Instant::now() + HEARTBEAT;
        loop {
            let bytes = self.render();
            if !bytes.is_empty() {
                return Some(bytes);
            }
            if self.state == State::Ended {
                return None;
            }
            if self.request.is_none()
                && let Some(event) = self.pending.front()
            {
                self.request = Some(self.ask_persisted(event.id));
            } else if self.request.is_none() {
                // Before the tail is looked at: what changes from here on wakes.
                self.changes.mark_unchanged();
                match self.hub.read(self.cursor, EVENTS_AT_A_TIME) {
                    Read::Events(events) => {
                        self.attempts = 0;
                        self.pending.extend(events);
                        continue;
                    }
                    Read::Deleted => return self.end(&json!({ "type": "session.deleted" })),
                    Read::Behind { floor } => {
                        self.floor = floor;
                        self.request = Some(self.ask_page());
                    }
                    Read::Unknown if self.attempts == 0 => self.request = Some(self.ask_page()),
                    Read::Unknown | Read::Wait => {}
                }
            }
            let answered = async {
                match &mut self.request {
                    Some(request) => request.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                answer = answered => {
                    self.request = None;
                    if let Some(end) = self.apply(answer) {
                        return Some(end);
                    }
                }
                changed = self.changes.changed() => {
                    if changed.is_err() {
                        return None;
                    }
                    self.attempts = 0;
                }
                () = self.app.ending.closing.cancelled() => return None,
                reason = self.stream.refused() => return self.end(&json!({ "type": "error", "message": reason })),
                () = tokio::time::sleep_until(heartbeat_at) => return Some(Bytes::from_static(b": heartbeat\n\n")),
            }
        }
    }

    /// Turns pending events into bytes: a chunk's worth, up to an event that has to be persisted before it is shown.
    fn render(&mut self) -> Bytes {
        let mut bytes = Vec::new();
        let persisted = self.persisted;
        while bytes.len() < CHUNK_BYTES && self.state != State::Ended {
            let Some(event) = self.pending.pop_front_if(|event| event.id <= persisted || !event.changes_state()) else { break };
            self.cursor = self.cursor.max(event.id);
            if let Some(frame) = event.typed() {
                bytes.extend_from_slice(frame);
            }
            if event.is_last() {
                self.state = State::Ended;
            }
        }
        bytes.into()
    }

    fn apply(&mut self, answer: Answer) -> Option<Bytes> {
        let page = match answer {
            Answer::Page(page) => page,
            Answer::Persisted(id) => {
                self.persisted = self.persisted.max(id);
                return None;
            }
        };
        match page {
            Ok(page) if page.session_deleted => return self.end(&json!({ "type": "session.deleted" })),
            Ok(page) if page.events.is_empty() => {
                self.attempts += 1;
                if page.projected >= self.floor && self.floor > self.cursor {
                    (self.cursor, self.attempts) = (self.floor, 0);
                }
            }
            Ok(page) => {
                self.attempts = 0;
                self.persisted = page.events.last().map_or(0, |event| event.event_id).max(self.persisted);
                self.pending.extend(page.events.into_iter().map(|event| Arc::new(Event::decode_typed(event.event_id, event.payload))));
            }
            Err(error) if error.code == ErrorCode::NotFound => return self.end(&json!({ "type": "session.deleted" })),
            Err(error) => {
                self.attempts += 1;
                tracing::debug!(session_id = %self.session, %error, attempt = self.attempts, "event log cannot be read; will retry");
            }
        }
        None
    }

    fn end(&mut self, last: &serde_json::Value) -> Option<Bytes> {
        self.state = State::Ended;
        Some(anonymous_frame(last))
    }

    fn ask_persisted(&self, id: u64) -> BoxFuture<'static, Answer> {
        let (bus, hub, user_id) = (self.app.bus.clone(), self.hub.clone(), self.user_id.clone());
        Box::pin(async move {
            hub.session_at_end(&bus, &user_id, id).await;
            Answer::Persisted(id)
        })
    }

    fn ask_page(&self) -> BoxFuture<'static, Answer> {
        let (bus, session, after) = (self.app.bus.clone(), self.session, self.cursor);
        let max_bytes = history::page_bytes(self.stream.count_all());
        let delay = if self.attempts == 0 { Duration::ZERO } else { RETRY.jittered(self.attempts) };
        Box::pin(async move {
            tokio::time::sleep(delay).await;
            Answer::Page(history::read_page(&bus, session, after, max_bytes).await)
        })
    }
}
