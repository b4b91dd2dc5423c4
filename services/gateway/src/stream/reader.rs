//! One connection to a session's stream.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use contract::{
    rpc,
    scheduler::{GetSessionRequest, ReadEventsRequest, Session},
};
use futures::Stream;
use tokio::time::Instant;
use types::{Backoff, Partition, SessionId, SessionStatus};

use crate::{
    App, RPC_DEADLINE,
    auth::Caller,
    stream::{
        event::{Event, StreamEvent, Visible, anonymous_frame},
        hub::{Behind, Hub},
    },
};

const HEARTBEAT: Duration = Duration::from_secs(15);
const PAGE_EVENTS: u32 = 2000;
/// What is written to the socket at a time.
const CHUNK_BYTES: usize = 64 * 1024;
/// How long the end of a settled session may take to arrive where nothing of it is on record: it may have been there once.
const END_WAIT: Duration = Duration::from_secs(30);
/// How long a turn's end waits for the record, so that a client which asks next finds what it was told.
const RECORD_WAIT: Duration = Duration::from_secs(5);
const RETRY: Backoff = Backoff { base: Duration::from_millis(50), max: Duration::from_secs(1), attempts: 20 };

/// Where a connection is in its session's stream.
pub struct Reader {
    app: App,
    caller: Caller,
    session_id: SessionId,
    partition: Partition,
    runtime: String,
    provider: Option<String>,
    /// The newest turn that is known of.
    turn_count: u32,
    /// The last event that was passed.
    cursor: u64,
    /// The turn whose `turn_start` was sent last.
    announced_turn: Option<u32>,
    pending: VecDeque<Arc<Event>>,
    hub: Option<Arc<Hub>>,
    state: State,
    last_event_at: Instant,
    /// When bytes were handed to the socket that it has not asked for more since.
    handed_at: Option<Instant>,
    failures: u32,
    /// Where a settled session's end has not come yet: when to stop waiting for it.
    end_due: Option<Instant>,
    /// When the client came, until the first event.
    silent_since: Option<Instant>,
    /// The last event on record, where the record held nothing new.
    newest: Option<Event>,
}

#[derive(PartialEq, Eq)]
enum State {
    Starting,
    Reading,
    Ended,
}

impl Reader {
    pub fn new(app: App, caller: Caller, session_id: SessionId, partition: Partition, session: Session, since: u64) -> Self {
        metrics::gauge!("aod_stream_clients").increment(1);
        Self {
            app,
            caller,
            session_id,
            partition,
            runtime: session.runtime,
            provider: session.provider,
            turn_count: session.turn_count,
            cursor: since,
            announced_turn: None,
            pending: VecDeque::new(),
            hub: None,
            state: State::Starting,
            last_event_at: Instant::now(),
            silent_since: Some(Instant::now()),
            handed_at: None,
            failures: 0,
            end_due: None,
            newest: None,
        }
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
        loop {
            match self.state {
                State::Ended => return None,
                State::Starting => {
                    self.state = State::Reading;
                    return Some(anonymous_frame(&StreamEvent::Start {
                        runtime: &self.runtime,
                        provider: self.provider.as_deref(),
                        session_id: self.session_id.to_string(),
                    }));
                }
                State::Reading => {}
            }
            if !self.pending.is_empty() {
                if let Some(opened) = self.silent_since.take() {
                    metrics::histogram!("aod_stream_first_event_seconds").record(opened.elapsed());
                }
                let bytes = self.render().await;
                if !bytes.is_empty() {
                    return Some(bytes);
                }
                continue;
            }
            if let Some(bytes) = self.fetch().await {
                return Some(bytes);
            }
        }
    }

    /// Turns pending events into bytes, up to a chunk's worth or the end of the stream.
    async fn render(&mut self) -> Bytes {
        let mut bytes = BytesMut::new();
        while bytes.len() < CHUNK_BYTES
            && let Some(event) = self.pending.pop_front()
        {
            self.cursor = event.id;
            self.last_event_at = Instant::now();
            match &event.kind {
                Visible::Hidden => {}
                Visible::Stage(frame) => bytes.extend_from_slice(frame),
                Visible::Output(frame) => {
                    if self.announced_turn != Some(event.turn) {
                        self.announced_turn = Some(event.turn);
                        bytes.extend_from_slice(&anonymous_frame(&StreamEvent::TurnStart { id: event.id, turn: event.turn }));
                    }
                    bytes.extend_from_slice(frame);
                }
                Visible::TurnEnd(frame) => {
                    if self.is_current_end(&event).await {
                        bytes.extend_from_slice(frame);
                        self.state = State::Ended;
                        break;
                    }
                }
                Visible::Terminated(frame) => {
                    bytes.extend_from_slice(frame);
                    self.state = State::Ended;
                    break;
                }
            }
        }
        bytes.freeze()
    }

    /// Whether a turn's end is the session's: not that of an older turn, and not overtaken by a termination.
    async fn is_current_end(&mut self, event: &Event) -> bool {
        if event.turn < self.turn_count {
            return false;
        }
        match self.session(event.id, RECORD_WAIT).await {
            Some(session) => {
                self.turn_count = session.turn_count;
                event.turn == session.turn_count && session.status != SessionStatus::Terminated.as_str()
            }
            // The record is late; the end is true all the same.
            None => true,
        }
    }

    /// The session as it is once the record holds an event.
    async fn session(&self, recorded_through: u64, deadline: Duration) -> Option<Session> {
        let request = GetSessionRequest { user_id: self.caller.user_id.clone(), session_id: self.session_id.to_string(), recorded_through };
        self.app.bus.call::<rpc::GetSession>(&request, deadline).await.ok()
    }

    /// Gets more events, from the ring or the record; gives bytes only to keep the connection alive, or to say goodbye.
    async fn fetch(&mut self) -> Option<Bytes> {
        if let Some(hub) = self.hub.clone() {
            match hub.after(self.cursor, RING_TAKE) {
                Ok(events) if events.is_empty() => return self.wait(&hub).await,
                Ok(events) => self.pending.extend(events),
                // Too slow for the ring, or the bus has left something out: back to the record.
                Err(Behind { floor }) => {
                    metrics::counter!("aod_stream_fallbacks_total").increment(1);
                    self.catch_up(floor).await;
                }
            }
            return None;
        }
        if self.read_page().await && self.pending.is_empty() {
            self.reach_the_end_of_the_record().await;
        }
        None
    }

    /// Reads the next page of the record; false when it could not be read.
    async fn read_page(&mut self) -> bool {
        let request = ReadEventsRequest { session_id: self.session_id.to_string(), after: self.cursor, limit: PAGE_EVENTS };
        match self.app.bus.call::<rpc::ReadEvents>(&request, RPC_DEADLINE).await {
            Ok(reply) => {
                self.failures = 0;
                self.newest = reply.newest.map(|event| Event::decode(event.event_id, event.payload));
                let events = reply.events.into_iter().map(|event| Arc::new(Event::decode(event.event_id, event.payload)));
                self.pending.extend(events);
                true
            }
            Err(error) => {
                self.failures += 1;
                match RETRY.delay(self.failures) {
                    Some(delay) => tokio::time::sleep(delay).await,
                    None => {
                        tracing::warn!(session = %self.session_id, %error, "record cannot be read; ending a stream");
                        self.state = State::Ended;
                    }
                }
                false
            }
        }
    }

    /// Reads on in the record until the ring has what comes next.
    async fn catch_up(&mut self, floor: u64) {
        if !self.read_page().await || !self.pending.is_empty() {
            return;
        }
        // Nothing up to the floor is left to read, once the record reaches so far.
        if self.session(floor, RECORD_WAIT).await.is_some() && self.read_page().await && self.pending.is_empty() {
            self.cursor = floor;
        }
    }

    /// All that is on record was read: the rest comes from the bus, if any is to come.
    async fn reach_the_end_of_the_record(&mut self) {
        let status = match self.session(0, RPC_DEADLINE).await {
            Some(session) => {
                self.turn_count = session.turn_count;
                session.status.parse::<SessionStatus>().ok()
            }
            None => None,
        };
        match status {
            // Its end is on record: it came between the page and the status, or the client has it already and resumes behind it.
            Some(SessionStatus::Completed) => {
                if self.read_page().await && self.pending.is_empty() {
                    self.state = State::Ended;
                }
                return;
            }
            // Settled by the scheduler, perhaps: then its end is still on its way. Or the client has it already.
            Some(settled @ (SessionStatus::Failed | SessionStatus::Terminated)) => match &self.newest {
                Some(newest) if newest.is_end(settled, self.turn_count) => {
                    // One that came right after the page was read is in the next.
                    if newest.id <= self.cursor {
                        self.state = State::Ended;
                    }
                    return;
                }
                Some(_) => {}
                None => self.end_due = Some(Instant::now() + END_WAIT),
            },
            _ => {}
        }
        self.hub = Some(self.app.hubs.join(self.session_id, self.partition, self.cursor));
    }

    /// Waits for the next event, a heartbeat's time, or the end of everybody's patience.
    async fn wait(&mut self, hub: &Hub) -> Option<Bytes> {
        let mut newest = hub.newest();
        if *newest.borrow_and_update() > self.cursor {
            return None;
        }
        let stale_at = self.last_event_at + self.app.config.stream_stale;
        let until = [Some(Instant::now() + HEARTBEAT), Some(stale_at), self.end_due].into_iter().flatten().min()?;
        tokio::select! {
            _ = newest.changed() => return None,
            () = self.app.ending.closing.cancelled() => {
                self.state = State::Ended;
                return None;
            }
            () = tokio::time::sleep_until(until) => {}
        }
        let now = Instant::now();
        if self.end_due.is_some_and(|due| now >= due) {
            self.state = State::Ended;
            return None;
        }
        if now >= stale_at {
            self.state = State::Ended;
            let seconds = self.app.config.stream_stale.as_secs();
            let message = format!("No output for {seconds}s");
            return Some(anonymous_frame(&StreamEvent::Stale { id: self.cursor, message: &message }));
        }
        Some(Bytes::from_static(b": heartbeat\n\n"))
    }
}

const RING_TAKE: usize = 512;

impl Drop for Reader {
    fn drop(&mut self) {
        metrics::gauge!("aod_stream_clients").decrement(1);
        if self.handed_at.is_some_and(|handed| handed.elapsed() >= self.app.config.slow_reader) {
            metrics::counter!("aod_stream_cuts_total").increment(1);
            tracing::info!(session = %self.session_id, cursor = self.cursor, "a reader that took nothing was cut");
        }
    }
}
