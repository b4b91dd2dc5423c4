//! Following a session's typed events over server-sent events, from turn to turn until the session
//! ends.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use bus::RpcError;
use bytes::Bytes;
use contract::scheduler::{QueuedInputs, ReadEventsReply};
use futures::{Stream, future::BoxFuture};
use serde_json::json;
use tokio::{
    sync::{broadcast, watch},
    time::Instant,
};
use types::{Backoff, ErrorCode, InputId, Partition, SessionId, Timestamp};

use crate::{
    App,
    stream::{
        answer_to,
        event::{Event, anonymous_frame, json_frame, named_frame},
        history,
        hub::Hub,
        open::OpenStream,
        tail::Read,
    },
    v1::{
        self,
        ids::EventId,
        previews::Previews,
        send,
        thread::{Thread, entry::Place},
    },
};

const HEARTBEAT: Duration = Duration::from_secs(10);
/// What is written to the socket at a time.
const CHUNK_BYTES: usize = 64 * 1024;
const EVENTS_AT_A_TIME: usize = 512;
/// Between reads of an event log that has nothing new, or cannot be read. The first is made at
/// once.
const RETRY: Backoff =
    Backoff { base: Duration::from_millis(5), max: Duration::from_secs(1), attempts: u32::MAX };

/// Events of users whose ids a connection remembers: those that come as queued afterwards are old.
const PROCESSED_MAX: usize = 256;

/// What a request brought.
enum Answer {
    Page(Result<ReadEventsReply, RpcError>),
    /// The event is persisted; in the typed view, or was waited for long enough.
    Persisted(u64),
}

/// One connection.
pub struct Follower {
    app: App,
    session: SessionId,
    stream: OpenStream,
    hub: Arc<Hub>,
    changes: watch::Receiver<u64>,
    /// Only of the managed view.
    queued: Option<broadcast::Receiver<Arc<QueuedInputs>>>,
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
    view: View,
}

/// What a connection shows of the log.
pub enum View {
    /// `GET /sessions/{id}/events`.
    Typed,
    /// `GET /v1/sessions/{id}/events/stream`.
    Managed(Box<Managed>),
}

/// A thread that is built from the begin of a turn, and shown from some place on.
pub struct Managed {
    thread: Thread,
    /// Events after this place are shown.
    from: Place,
    /// Ids of the newest events of the session's user that the log has.
    processed: VecDeque<String>,
    previews: Previews,
}

impl Managed {
    pub const fn new(thread: Thread, from: Place, previews: Previews) -> Self {
        Self { thread, from, processed: VecDeque::new(), previews }
    }

    /// The frames of what the log does not have yet. They carry no SSE id: a client that reconnects
    /// continues after the last event that has its place.
    fn queued(&mut self, inputs: &QueuedInputs) -> Bytes {
        let mut bytes = Vec::new();
        for event in inputs.inputs.iter().filter_map(send::queued) {
            let (id, kind) = (
                event["id"].as_str().unwrap_or_default(),
                event["type"].as_str().unwrap_or_default(),
            );
            if !self.processed.iter().any(|processed| processed == id) {
                bytes.extend_from_slice(&named_frame(kind, None, &event));
            }
        }
        let running = self.thread.running_turn();
        for (kind, event) in
            inputs.previews.iter().flat_map(|preview| self.previews.show(preview, running))
        {
            bytes.extend_from_slice(&named_frame(kind, None, &event));
        }
        bytes.into()
    }

    /// Appends the frames of what an entry shows as. Returns whether nothing follows it.
    fn render(&mut self, event: &Event, bytes: &mut Vec<u8>) -> bool {
        let Some(source) = event.source() else { return false };
        let mut shown = Vec::new();
        self.thread.apply(event.id, source, &mut shown);
        let mut is_last = false;
        for event in shown {
            is_last |= event.is_last();
            if event.kind.starts_with("user.") {
                self.processed.truncate(PROCESSED_MAX - 1);
                self.processed.push_front(event.id.clone());
            }
            // A session that had ended already: its reader is told so.
            if event.place > self.from || event.is_last() {
                self.previews.ended(&event.id);
                let (kind, id) = (event.kind, event.resume_id());
                bytes.extend_from_slice(&json_frame(kind, &id, &event.body));
            }
        }
        is_last
    }
}

#[derive(PartialEq, Eq)]
enum State {
    Starting,
    Following,
    Ended,
}

impl Follower {
    /// Subscribes before anything is read: nothing is appended in between unseen.
    pub fn new(
        app: App,
        user_id: String,
        stream: OpenStream,
        (session, partition): (SessionId, Partition),
        after: u64,
        view: View,
    ) -> Self {
        let hub = app.hubs.join(session, partition);
        let changes = hub.changes();
        let queued = matches!(view, View::Managed(_)).then(|| hub.queued());
        Self {
            app,
            session,
            stream,
            hub,
            changes,
            queued,
            user_id,
            cursor: after,
            persisted: 0,
            pending: VecDeque::new(),
            request: None,
            attempts: 0,
            floor: 0,
            state: State::Starting,
            view,
        }
    }

    /// The bytes of the response. Nothing is read ahead of what the socket takes.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes, Infallible>> {
        futures::stream::unfold(self, |mut follower| async move {
            Some((Ok(follower.next().await?), follower))
        })
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
                && let Some(id) = self.first_unpersisted()
            {
                self.request = Some(self.ask_persisted(id));
            } else if self.request.is_none() {
                // Before the tail is looked at: what changes from here on wakes.
                self.changes.mark_unchanged();
                match self.hub.read(self.cursor, EVENTS_AT_A_TIME) {
                    Read::Events(events) => {
                        self.attempts = 0;
                        self.pending.extend(events);
                        continue;
                    }
                    Read::Deleted => return self.end_as_deleted(),
                    Read::Behind { floor } => {
                        self.floor = floor;
                        self.request = Some(self.ask_page());
                    }
                    Read::Unknown if self.attempts == 0 => self.request = Some(self.ask_page()),
                    Read::Unknown | Read::Wait => {}
                }
            }
            let answered = answer_to(&mut self.request);
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
                queued = next_queued(&mut self.queued) => {
                    if let View::Managed(managed) = &mut self.view {
                        let bytes = managed.queued(&queued);
                        if !bytes.is_empty() {
                            return Some(bytes);
                        }
                    }
                }
                () = self.app.shutdown.closing.cancelled() => return None,
                reason = self.stream.refused() => return self.end_refused(&reason),
                () = tokio::time::sleep_until(heartbeat_at) => return Some(Bytes::from_static(b": heartbeat\n\n")),
            }
        }
    }

    /// Turns pending events into bytes: a chunk's worth, up to an event that has to be persisted
    /// before it is shown.
    fn render(&mut self) -> Bytes {
        let mut bytes = Vec::new();
        let persisted = self.persisted;
        while bytes.len() < CHUNK_BYTES && self.state != State::Ended {
            let waits = |event: &Event| match self.view {
                View::Typed => event.changes_state(),
                // A client that sees an event also finds it in the list.
                View::Managed(_) => event.source().is_some(),
            };
            let Some(event) =
                self.pending.pop_front_if(|event| event.id <= persisted || !waits(event))
            else {
                break;
            };
            self.cursor = self.cursor.max(event.id);
            let is_last = match &mut self.view {
                View::Typed => {
                    if let Some(frame) = event.typed() {
                        bytes.extend_from_slice(frame);
                    }
                    event.is_last()
                }
                View::Managed(managed) => managed.render(&event, &mut bytes),
            };
            if is_last {
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
            Ok(page) if page.session_deleted => return self.end_as_deleted(),
            Ok(page) if page.events.is_empty() && page.read_through > self.cursor => {
                (self.cursor, self.attempts) = (page.read_through, 0);
            }
            Ok(page) if page.events.is_empty() => {
                self.attempts += 1;
                if page.projected >= self.floor && self.floor > self.cursor {
                    (self.cursor, self.attempts) = (self.floor, 0);
                }
            }
            Ok(page) => {
                self.attempts = 0;
                self.persisted =
                    page.events.last().map_or(0, |event| event.event_id).max(self.persisted);
                self.pending.extend(
                    page.events
                        .into_iter()
                        .map(|event| Arc::new(Event::decode_typed(event.event_id, event.payload))),
                );
            }
            Err(error) if error.code == ErrorCode::NotFound => return self.end_as_deleted(),
            Err(error) => {
                self.attempts += 1;
                tracing::debug!(session_id = %self.session, %error, attempt = self.attempts, "event log cannot be read; will retry");
            }
        }
        None
    }

    /// The event that the next one to be shown waits for: in the managed view all that is there,
    /// which saves requests.
    fn first_unpersisted(&self) -> Option<u64> {
        match self.view {
            View::Typed => self.pending.front().map(|event| event.id),
            View::Managed(_) => self.pending.back().map(|event| event.id),
        }
    }

    fn end_as_deleted(&mut self) -> Option<Bytes> {
        self.state = State::Ended;
        const NAME: &str = "session.deleted";
        Some(match self.view {
            View::Typed => anonymous_frame(&json!({ "type": NAME })),
            View::Managed(_) => {
                let id = EventId::Input(InputId::new()).encode();
                let now = v1::time(Timestamp::now().unix_micros());
                named_frame(NAME, None, &json!({ "id": id, "type": NAME, "processed_at": now }))
            }
        })
    }

    fn end_refused(&mut self, reason: &str) -> Option<Bytes> {
        self.state = State::Ended;
        Some(match self.view {
            View::Typed => anonymous_frame(&json!({ "type": "error", "message": reason })),
            View::Managed(_) => {
                let error = json!({ "type": "authentication_error", "message": reason });
                named_frame("error", None, &json!({ "type": "error", "error": error }))
            }
        })
    }

    fn ask_persisted(&self, id: u64) -> BoxFuture<'static, Answer> {
        let (bus, hub, user_id) = (self.app.bus.clone(), self.hub.clone(), self.user_id.clone());
        let shows_all = matches!(self.view, View::Managed(_));
        Box::pin(async move {
            if shows_all {
                hub.persisted(&bus, &user_id, id).await;
            } else {
                hub.session_at_end(&bus, &user_id, id).await;
            }
            Answer::Persisted(id)
        })
    }

    fn ask_page(&self) -> BoxFuture<'static, Answer> {
        let (bus, session, after) = (self.app.bus.clone(), self.session, self.cursor);
        let max_bytes = history::page_bytes(self.stream.count_all());
        let delay = if self.attempts == 0 { Duration::ZERO } else { RETRY.jittered(self.attempts) };
        Box::pin(async move {
            tokio::time::sleep(delay).await;
            // Neither view shows raw output.
            Answer::Page(history::read_shown(&bus, session, after, max_bytes).await)
        })
    }
}

/// What is queued next. Waits for ever where nothing more comes.
async fn next_queued(
    queued: &mut Option<broadcast::Receiver<Arc<QueuedInputs>>>,
) -> Arc<QueuedInputs> {
    while let Some(receiver) = queued {
        match receiver.recv().await {
            Ok(inputs) => return inputs,
            Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => *queued = None,
        }
    }
    std::future::pending().await
}
