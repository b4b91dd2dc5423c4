//! One connection to a session's stream: reads what [`Progress`] asks for, and writes what the
//! socket takes.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use bus::RpcError;
use bytes::Bytes;
use contract::{
    rpc,
    scheduler::{GetSessionRequest, ReadEventsReply, RecordedEvent, Session},
};
use futures::{Stream, future::BoxFuture};
use tokio::{sync::watch, task::JoinSet, time::Instant};
use types::{Backoff, ErrorCode, Partition, SessionId, SessionStatus};

use crate::{
    App, RPC_DEADLINE,
    auth::Caller,
    stream::{
        answer_to,
        event::{Event, OutputFrame, StreamEvent, TERMINATED, Visible, anonymous_frame},
        history::{self, Stored},
        hub::{Hub, session_once_persisted},
        open::OpenStream,
        progress::{EndOfLog, Progress},
        tail::Read,
    },
};

const HEARTBEAT: Duration = Duration::from_secs(15);
/// What is written to the socket at a time.
const CHUNK_BYTES: usize = 64 * 1024;
/// Events that are taken from a hub at a time.
const EVENTS_AT_A_TIME: usize = 512;
/// How long the end of a settled session may take to arrive where Postgres does not have it: it may
/// have had it once.
const END_WAIT: Duration = Duration::from_secs(30);
/// Between reads of an event log that has nothing new, or cannot be read. The first is made at
/// once.
const RETRY: Backoff =
    Backoff { base: Duration::from_millis(5), max: Duration::from_secs(1), attempts: u32::MAX };

/// One connection.
pub struct Reader {
    app: App,
    caller: Caller,
    session_id: SessionId,
    partition: Partition,
    runtime: String,
    provider: Option<String>,
    stream: OpenStream,
    progress: Progress,
    pending: VecDeque<Pending>,
    /// An output event of which a part was written.
    partial: Option<OutputFrame>,
    /// Whether the turn's end at the front of `pending` ends the stream; by its event.
    verdict: Option<(u64, bool)>,
    hub: Option<(Arc<Hub>, watch::Receiver<u64>)>,
    request: Option<BoxFuture<'static, Answer>>,
    /// The page after the one that is being sent.
    ahead: Option<PageAhead>,
    /// Requests in a row that brought nothing.
    attempts: u32,
    /// The hub's tail begins after this event: everything up to it is read from Postgres.
    floor: u64,
    state: State,
    last_event_at: Instant,
    /// When bytes were handed to the socket that it has not asked for more since.
    handed_at: Option<Instant>,
    /// Where a settled session's end has not come yet: when to stop waiting for it.
    end_due: Option<Instant>,
    /// When the client came, until the first event.
    silent_since: Option<Instant>,
    /// Sent last, without an id to resume from.
    farewell: Option<Bytes>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Starting,
    Reading,
    /// The event log was read to its end, and the session is asked for; for the second time in a
    /// row or not.
    AtEnd {
        is_second: bool,
    },
    Ended,
}

/// An event that is to be sent.
enum Pending {
    Shared(Arc<Event>),
    Stored(Stored),
}

/// A page that is read while what precedes it is sent.
struct PageAhead {
    after: u64,
    page: JoinSet<Result<ReadEventsReply, RpcError>>,
}

/// What a request brought.
enum Answer {
    Page(Result<ReadEventsReply, RpcError>),
    /// The session, and the newest persisted event before it was asked for.
    Session(Result<Session, RpcError>, Option<Event>),
    /// The session once a turn's end was persisted.
    TurnEnd {
        id: u64,
        turn: u32,
        session: Option<Session>,
    },
}

impl Reader {
    pub fn new(
        app: App,
        caller: Caller,
        stream: OpenStream,
        (session_id, partition): (SessionId, Partition),
        session: Session,
        since: u64,
    ) -> Self {
        let mut reader = Self {
            progress: Progress::new(since, session.turn_count),
            app,
            caller,
            session_id,
            partition,
            runtime: session.runtime,
            provider: session.provider,
            stream,
            pending: VecDeque::new(),
            partial: None,
            verdict: None,
            hub: None,
            request: None,
            ahead: None,
            attempts: 0,
            floor: 0,
            state: State::Starting,
            last_event_at: Instant::now(),
            silent_since: Some(Instant::now()),
            handed_at: None,
            end_due: None,
            farewell: None,
        };
        // Subscribed before the history is read: nothing is appended in between unseen.
        if session.status.parse().is_ok_and(SessionStatus::is_active) {
            reader.join();
        }
        reader
    }

    fn join(&mut self) {
        let hub = self.app.hubs.join(self.session_id, self.partition);
        let changes = hub.changes();
        self.hub = Some((hub, changes));
    }

    /// The bytes of the response. Nothing is read ahead of what the socket takes.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes, Infallible>> {
        futures::stream::unfold(self, |mut reader| async move {
            reader.handed_at = None;
            let bytes = reader.next().await?;
            reader.handed_at = Some(Instant::now());
            Some((Ok(bytes), reader))
        })
    }

    async fn next(&mut self) -> Option<Bytes> {
        if self.state == State::Starting {
            self.state = State::Reading;
            return Some(anonymous_frame(&StreamEvent::Start {
                runtime: &self.runtime,
                provider: self.provider.as_deref(),
                session_id: self.session_id.to_string(),
            }));
        }
        let heartbeat_at = Instant::now() + HEARTBEAT;
        loop {
            let cursor = self.progress.cursor;
            let bytes = self.render();
            if self.progress.cursor != cursor {
                self.last_event_at = Instant::now();
            }
            if !bytes.is_empty() {
                return Some(bytes);
            }
            if self.state == State::Ended {
                return self.farewell.take();
            }
            if self.plan() && self.wait(heartbeat_at).await {
                return Some(Bytes::from_static(b": heartbeat\n\n"));
            }
        }
    }

    /// Turns pending events into bytes: a chunk's worth, up to a turn's end that has to be asked
    /// about, or the end of the stream.
    fn render(&mut self) -> Bytes {
        let mut bytes = Vec::new();
        while bytes.len() < CHUNK_BYTES && self.state != State::Ended {
            if let Some(frame) = &mut self.partial {
                if frame.write(&mut bytes, CHUNK_BYTES) {
                    self.partial = None;
                }
                continue;
            }
            let Some(next) = self.pending.front() else { break };
            let event = match next {
                Pending::Shared(event) => event.clone(),
                Pending::Stored(stored) => {
                    if let Some(frame) = OutputFrame::decode(stored.id, stored.payload.clone()) {
                        self.announce(frame.id, frame.turn, &mut bytes);
                        self.pass(frame.id);
                        self.partial = Some(frame);
                        continue;
                    }
                    Arc::new(Event::decode(stored.id, stored.payload.clone()))
                }
            };
            let frame = match &event.kind {
                Visible::Hidden => None,
                Visible::Stage(frame) => Some(frame),
                Visible::Output(frame) => {
                    self.announce(event.id, event.turn, &mut bytes);
                    Some(frame)
                }
                Visible::TurnEnd(frame) => match self.verdict {
                    Some((id, is_end)) if id == event.id => is_end.then_some(frame),
                    _ if self.progress.may_end(event.turn) => break,
                    _ => None,
                },
                Visible::Terminated(frame) => Some(frame),
            };
            if frame.is_some() && matches!(event.kind, Visible::TurnEnd(_) | Visible::Terminated(_))
            {
                self.state = State::Ended;
            }
            self.pass(event.id);
            if let Some(frame) = frame {
                if bytes.is_empty() && frame.len() >= CHUNK_BYTES {
                    // Shared by all who read it.
                    return frame.clone();
                }
                bytes.extend_from_slice(frame);
            }
        }
        bytes.into()
    }

    fn announce(&mut self, id: u64, turn: u32, bytes: &mut Vec<u8>) {
        if self.progress.begins_turn(turn) {
            bytes.extend_from_slice(&anonymous_frame(&StreamEvent::TurnStart { id, turn }));
        }
    }

    fn pass(&mut self, id: u64) {
        self.pending.pop_front();
        self.progress.cursor = id;
        if let Some(opened) = self.silent_since.take() {
            metrics::histogram!("aod_stream_first_event_seconds").record(opened.elapsed());
        }
    }

    /// Makes the request that is needed next, or takes what the hub has. Returns whether there is
    /// something to wait for.
    fn plan(&mut self) -> bool {
        if self.request.is_some() {
            return true;
        }
        if let Some(pending) = self.pending.front() {
            // Only a turn's end waits here.
            if let Pending::Shared(event) = pending {
                self.request = Some(self.ask_turn_end(event.id, event.turn));
            } else if let Some(Pending::Stored(stored)) = self.pending.pop_front() {
                let event = Arc::new(Event::decode(stored.id, stored.payload));
                self.pending.push_front(Pending::Shared(event));
            }
            return self.request.is_some();
        }
        let Some((hub, changes)) = &mut self.hub else {
            // What the event log ends with decides what to do then.
            self.request = Some(self.ask_page());
            return true;
        };
        // Before the tail is looked at: what changes from here on wakes.
        changes.mark_unchanged();
        match hub.read(self.progress.cursor, EVENTS_AT_A_TIME) {
            Read::Events(events) => {
                self.attempts = 0;
                self.pending.extend(events.into_iter().map(Pending::Shared));
                false
            }
            Read::Wait => true,
            // Until the hub knows more.
            Read::Unknown if self.attempts > 0 => true,
            Read::Unknown => {
                self.request = Some(self.ask_page());
                true
            }
            Read::Behind { floor } => {
                if self.floor != floor && self.floor > 0 {
                    metrics::counter!("aod_stream_fallbacks_total").increment(1);
                }
                self.floor = floor;
                self.request = Some(self.ask_page());
                true
            }
            Read::Deleted => {
                self.end_as_deleted();
                false
            }
        }
    }

    /// Waits for the request or the hub, or until the stream ends. Returns whether the connection
    /// has to be kept alive.
    async fn wait(&mut self, heartbeat_at: Instant) -> bool {
        let stale_at = self.last_event_at + self.app.config.stream_stale;
        let until = [Some(heartbeat_at), Some(stale_at), self.end_due]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(heartbeat_at);
        let is_asking = self.request.is_some();
        let changed = async {
            match &mut self.hub {
                // What was asked for comes before what the hub has.
                Some((_, changes)) if !is_asking => {
                    if changes.changed().await.is_err() {
                        std::future::pending::<()>().await;
                    }
                }
                _ => std::future::pending().await,
            }
        };
        let answered = answer_to(&mut self.request);
        tokio::select! {
            answer = answered => {
                self.request = None;
                self.apply(answer);
                return false;
            }
            () = changed => {
                self.attempts = 0;
                return false;
            }
            () = self.app.shutdown.closing.cancelled() => {
                self.state = State::Ended;
                return false;
            }
            reason = self.stream.refused() => {
                let turn = self.progress.turn_count();
                self.end(&StreamEvent::Error { id: self.progress.cursor, message: &reason, turn });
                return false;
            }
            () = tokio::time::sleep_until(until) => {}
        }
        let now = Instant::now();
        if self.end_due.is_some_and(|due| now >= due) {
            self.state = State::Ended;
        } else if now >= stale_at {
            let message = format!("No output for {}s", self.app.config.stream_stale.as_secs());
            self.end(&StreamEvent::Stale { id: self.progress.cursor, message: &message });
        } else {
            return now >= heartbeat_at;
        }
        false
    }

    fn apply(&mut self, answer: Answer) {
        match answer {
            Answer::Page(Ok(page)) if page.session_deleted => self.end_as_deleted(),
            Answer::Page(Ok(page)) if page.events.is_empty() => self.at_end_of_page(page),
            Answer::Page(Ok(page)) => {
                self.attempts = 0;
                self.read_ahead(&page.events);
                self.pending
                    .extend(page.events.into_iter().map(|event| Pending::Stored(event.into())));
            }
            Answer::Page(Err(error)) => self.retry(&error),
            Answer::Session(Err(error), _) if error.code == ErrorCode::NotFound => {
                self.end_as_deleted()
            }
            Answer::Session(Err(error), _) => self.retry(&error),
            Answer::Session(Ok(session), newest) => self.at_end_of_log(&session, newest.as_ref()),
            Answer::TurnEnd { id, turn, session } => {
                let session =
                    session.map(|session| (session.turn_count, session.status.parse().ok()));
                self.verdict = Some((id, self.progress.is_end(turn, session)));
            }
        }
    }

    fn retry(&mut self, error: &RpcError) {
        self.attempts += 1;
        tracing::debug!(session_id = %self.session_id, %error, attempt = self.attempts, "event log cannot be read; will retry");
    }

    /// Nothing after the cursor is persisted.
    fn at_end_of_page(&mut self, page: ReadEventsReply) {
        if self.hub.is_some() {
            self.attempts += 1;
            if page.projected >= self.floor && self.floor > self.progress.cursor {
                self.progress.cursor = self.floor;
                self.attempts = 0;
            }
            return;
        }
        self.attempts = 0;
        if self.state == State::Reading {
            self.state = State::AtEnd { is_second: false };
        }
        let newest = page.newest.map(|event| Event::decode(event.event_id, event.payload));
        self.request = Some(self.ask_session(newest));
    }

    fn at_end_of_log(&mut self, session: &Session, newest: Option<&Event>) {
        self.progress.learn_turn_count(session.turn_count);
        let is_second = self.state == State::AtEnd { is_second: true };
        let end = self.progress.at_end_of_log(session.status.parse().ok(), newest, is_second);
        match end {
            EndOfLog::Ended => self.state = State::Ended,
            EndOfLog::ReadAgain => self.state = State::AtEnd { is_second: true },
            EndOfLog::Follow | EndOfLog::EndMissing => {
                self.state = State::Reading;
                self.end_due = (end == EndOfLog::EndMissing).then(|| Instant::now() + END_WAIT);
                self.join();
            }
        }
    }

    /// A session that is gone had ended: with what the hub has of it, or terminated.
    fn end_as_deleted(&mut self) {
        if let Some((hub, _)) = &self.hub
            && let Some(end) = hub.end_after(self.progress.cursor)
        {
            self.verdict = Some((end.id, true));
            self.pending.push_back(Pending::Shared(end));
            return;
        }
        self.end(&StreamEvent::Terminated { id: self.progress.cursor, message: TERMINATED });
    }

    fn end(&mut self, last: &StreamEvent<'_>) {
        self.state = State::Ended;
        self.farewell = Some(anonymous_frame(last));
    }

    /// Begins to read the next page where this one was full.
    fn read_ahead(&mut self, page: &[RecordedEvent]) {
        let streams = self.stream.count_all();
        let Some(last) = page.last().filter(|_| history::has_room_ahead(streams, page)) else {
            return;
        };
        let (bus, session, after) = (self.app.bus.clone(), self.session_id, last.event_id);
        let max_bytes = history::page_bytes(streams);
        let mut page = JoinSet::new();
        page.spawn(async move { history::read_page(&bus, session, after, max_bytes).await });
        self.ahead = Some(PageAhead { after, page });
    }

    fn ask_page(&mut self) -> BoxFuture<'static, Answer> {
        let (bus, session, after) = (self.app.bus.clone(), self.session_id, self.progress.cursor);
        if let Some(mut ahead) = self.ahead.take().filter(|ahead| ahead.after == after) {
            return Box::pin(async move {
                let page = ahead.page.join_next().await.and_then(Result::ok);
                Answer::Page(page.unwrap_or_else(|| Err(RpcError::internal("no page was read"))))
            });
        }
        let max_bytes = history::page_bytes(self.stream.count_all());
        let delay = self.delay();
        Box::pin(async move {
            tokio::time::sleep(delay).await;
            Answer::Page(history::read_page(&bus, session, after, max_bytes).await)
        })
    }

    fn ask_session(&self, newest: Option<Event>) -> BoxFuture<'static, Answer> {
        let (bus, delay) = (self.app.bus.clone(), self.delay());
        let request = GetSessionRequest {
            user_id: self.caller.user_id.clone(),
            session_id: self.session_id.to_string(),
            recorded_through: 0,
            v1: false,
        };
        Box::pin(async move {
            tokio::time::sleep(delay).await;
            Answer::Session(bus.call::<rpc::GetSession>(&request, RPC_DEADLINE).await, newest)
        })
    }

    fn ask_turn_end(&self, id: u64, turn: u32) -> BoxFuture<'static, Answer> {
        let (bus, user_id, session_id) =
            (self.app.bus.clone(), self.caller.user_id.clone(), self.session_id);
        let hub = self.hub.as_ref().map(|(hub, _)| hub.clone());
        Box::pin(async move {
            let session = match hub {
                Some(hub) => hub.session_at_end(&bus, &user_id, id).await,
                None => session_once_persisted(&bus, &user_id, session_id, id).await,
            };
            Answer::TurnEnd { id, turn, session }
        })
    }

    fn delay(&self) -> Duration {
        if self.attempts == 0 { Duration::ZERO } else { RETRY.jittered(self.attempts) }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if self.handed_at.is_some_and(|handed| handed.elapsed() >= self.app.config.slow_reader) {
            metrics::counter!("aod_stream_cuts_total").increment(1);
            tracing::info!(session_id = %self.session_id, cursor = self.progress.cursor, "closed slow SSE connection");
        }
    }
}
