//! `GET /v1/sessions/{id}/events` and `…/events/stream`: a session's events, in pages of either order, or followed live.

use std::collections::{HashSet, VecDeque};

use axum::{Json, body::Body, extract::State, http::HeaderMap, response::Response};
use contract::{
    rpc,
    scheduler::{Cursor, FindTurnReply, FindTurnRequest},
    session::SessionEvent,
};
use prost::Message as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use types::{ErrorCode, SessionId};
use utoipa::IntoParams;

use crate::{
    App,
    auth::Caller,
    error::ApiError,
    stream::{
        self,
        follow::{Follower, From, Managed, View},
        history::{self, PAGE_BYTES},
    },
    v1::{
        ids::{EventId, PathId, Prefix},
        page::{Limits, Order, Page, Start, Wanted},
        query::{Query, bad},
        send,
        thread::{Place, Shown, TYPES, Thread},
    },
};

const LIMITS: Limits = Limits { default: 1000, max: 1000 };
/// Pages of the log that one answer may take: raw output lies between events, and is read over.
const LOG_PAGES: usize = 32;
/// Turns that one answer may look through, newest first.
const TURNS: usize = 64;
const DELTAS: [&str; 2] = ["agent.message", "agent.thinking"];
const DELTAS_MAX: usize = 100;
/// Where queued events stand: behind the log.
const QUEUED: u64 = u64::MAX;

#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes a query")]
pub struct ListParams {
    /// How many events at most
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
    /// Where the page begins: the `next_page` of the page before
    page: Option<String>,
    #[param(pattern = "^(asc|desc)$")]
    order: Option<String>,
    /// Only events of these types
    #[param(rename = "types[]")]
    types: Option<Vec<String>>,
    /// Only events that were processed later; also `gte`, `lt` and `lte`
    #[param(rename = "created_at[gt]")]
    created_at_gt: Option<String>,
}

/// Which events are wanted.
struct Filter {
    types: HashSet<String>,
    /// Microseconds; both included.
    times: std::ops::RangeInclusive<i64>,
}

impl Filter {
    fn read(query: &Query) -> Result<Self, ApiError> {
        let types: HashSet<String> = query.all("types").map(str::to_owned).collect();
        if let Some(unknown) = types.iter().find(|name| !TYPES.contains(&name.as_str())) {
            return Err(bad(&format!("types: '{unknown}' is no type of an event")));
        }
        let time = |name: &str| query.time(&format!("created_at[{name}]"));
        let from = time("gte")?.into_iter().chain(time("gt")?.map(|at| at.saturating_add(1))).max().unwrap_or(i64::MIN);
        let to = time("lte")?.into_iter().chain(time("lt")?.map(|at| at.saturating_sub(1))).min().unwrap_or(i64::MAX);
        Ok(Self { types, times: from..=to })
    }

    fn takes(&self, event: &Shown) -> bool {
        self.takes_type(event.kind) && self.times.contains(&event.at_us) && event.kind != "session.deleted"
    }

    fn takes_type(&self, kind: &str) -> bool {
        self.types.is_empty() || self.types.contains(kind)
    }

    /// An event that is not processed has no time to compare.
    fn takes_queued(&self, event: &Value) -> bool {
        self.takes_type(event["type"].as_str().unwrap_or_default()) && self.times == (i64::MIN..=i64::MAX)
    }
}

/// Where a page of ascending order begins: before an entry of the log, in the state that the thread has there.
#[derive(Serialize, Deserialize)]
struct Resume {
    state: crate::v1::thread::State,
    after: Place,
}

fn found_request(caller: &Caller, session_id: SessionId, before: u64) -> FindTurnRequest {
    FindTurnRequest { user_id: caller.user_id.clone(), session_id: session_id.to_string(), before, input_id: String::new() }
}

fn session(id: &str) -> Result<SessionId, ApiError> {
    Prefix::Session.find(id)?.parse().map_err(|_| ApiError::not_found("Session"))
}

/// List the events of a session
///
/// In the order of `processed_at`; what is queued stands behind it.
#[utoipa::path(get, path = "/v1/sessions/{id}/events", tag = "managed-agents", operation_id = "sessions_events_list",
    params(("id" = String, Path, description = "The session's id"), ListParams),
    responses((status = 200, description = "A page of events", body = Page<Object>)))]
pub async fn list(State(app): State<App>, caller: Caller, PathId(id): PathId, query: Query) -> Result<Json<Page<Value>>, ApiError> {
    let session = session(&id)?;
    let (wanted, filter) = (Wanted::read(&query, LIMITS, Order::Ascending)?, Filter::read(&query)?);
    let mut list = List { app, caller, session, filter, limit: wanted.limit as usize, data: Vec::new() };
    let next = match (wanted.order, wanted.start) {
        (Order::Ascending, start) => list.ascending(start.map(|start| start.row)).await?,
        (Order::Descending, start) => list.descending(start.map(|start| start.row)).await?,
    };
    let next_page = next.map(|row| Start { order: wanted.order, backwards: false, row }.encode());
    Ok(Json(Page { data: list.data, next_page }))
}

struct List {
    app: App,
    caller: Caller,
    session: SessionId,
    filter: Filter,
    limit: usize,
    data: Vec<Value>,
}

fn unknown_cursor() -> ApiError {
    bad("page: unknown cursor")
}

impl List {
    async fn find(&self, before: u64) -> Result<FindTurnReply, ApiError> {
        self.app.call::<rpc::FindTurn>(&found_request(&self.caller, self.session, before)).await
    }

    /// A page of the log's entries; `None`: it ends there.
    async fn read(&self, after: u64) -> Result<Option<Vec<(u64, SessionEvent)>>, ApiError> {
        let page = history::read_page(&self.app.bus, self.session, after, PAGE_BYTES).await?;
        if page.session_deleted {
            return Err(ApiError::not_found("Session"));
        }
        let read = page.events.into_iter().map(|event| (event.event_id, SessionEvent::decode(event.payload).unwrap_or_default()));
        let events: Vec<_> = read.collect();
        Ok((!events.is_empty()).then_some(events))
    }

    async fn ascending(&mut self, start: Option<Cursor>) -> Result<Option<Cursor>, ApiError> {
        // Asked before the log is read: what leaves the queue meanwhile is in both, and shown once.
        let found = self.find(1).await?;
        let mut thread = Thread::at(self.session, &found);
        let (mut cursor, mut after) = (0, Place::default());
        if let Some(start) = &start {
            cursor = start.position.cast_unsigned();
            if cursor == QUEUED {
                return self.queued(&found, &HashSet::new(), Some(&start.id), false);
            }
            let resume: Resume = serde_json::from_str(&start.id).map_err(|_| unknown_cursor())?;
            (thread.state, after) = (resume.state, resume.after);
        }
        let mut sent = HashSet::new();
        for _ in 0..LOG_PAGES {
            let Some(entries) = self.read(cursor).await? else { return self.queued(&found, &sent, None, false) };
            for (id, entry) in entries {
                // Without what one entry may show as, the page may end within it.
                let before = (self.data.len() + usize::from(u8::MAX) > self.limit).then(|| thread.state.clone());
                let mut shown = Vec::new();
                thread.apply(id, &entry, &mut shown);
                for event in shown {
                    if event.place <= after {
                        continue;
                    }
                    if event.kind.starts_with("user.") {
                        sent.insert(event.id.clone());
                    }
                    if !self.filter.takes(&event) {
                        continue;
                    }
                    if self.data.len() == self.limit {
                        return self.resume(cursor, before.unwrap_or_default(), after).map(Some);
                    }
                    after = event.place;
                    self.data.push(event.into_json());
                }
                cursor = id;
            }
        }
        self.resume(cursor, thread.state, Place::after(cursor)).map(Some)
    }

    fn resume(&self, cursor: u64, state: crate::v1::thread::State, after: Place) -> Result<Cursor, ApiError> {
        let id = serde_json::to_string(&Resume { state, after }).map_err(|_| unknown_cursor())?;
        Ok(Cursor { position: cursor.cast_signed(), id })
    }

    /// What is sent and not in the log yet, after one of them.
    fn queued(
        &mut self,
        found: &FindTurnReply,
        sent: &HashSet<String>,
        after: Option<&str>,
        newest_first: bool,
    ) -> Result<Option<Cursor>, ApiError> {
        let queued = found.open_inputs.iter().filter_map(send::queued);
        let mut queued: Vec<Value> = queued.filter(|event| self.filter.takes_queued(event)).collect();
        queued.retain(|event| event["id"].as_str().is_none_or(|id| !sent.contains(id)));
        if newest_first {
            queued.reverse();
        }
        let skip = after.and_then(|after| queued.iter().position(|event| event["id"] == after)).map_or(0, |index| index + 1);
        for event in queued.into_iter().skip(skip) {
            if self.data.len() == self.limit {
                let last = self.data.last().and_then(|event| event["id"].as_str()).unwrap_or_default().to_owned();
                return Ok(Some(Cursor { position: QUEUED.cast_signed(), id: last }));
            }
            self.data.push(event);
        }
        Ok(None)
    }

    async fn descending(&mut self, start: Option<Cursor>) -> Result<Option<Cursor>, ApiError> {
        // Exclusive.
        let mut end = Place { entry: QUEUED, part: 0 };
        let is_queued = start.as_ref().is_none_or(|start| start.position.cast_unsigned() == QUEUED);
        if let Some(start) = &start
            && !is_queued
        {
            end = Place { entry: start.position.cast_unsigned(), part: start.id.parse().map_err(|_| unknown_cursor())? };
        }
        let mut found = self.find(if end.entry == QUEUED { 0 } else { end.entry }).await?;
        if is_queued {
            let after = start.map(|start| start.id);
            // Where the log has one of them by now, it is told twice rather than not at all.
            if let Some(next) = self.queued(&found, &HashSet::new(), after.as_deref(), true)? {
                return Ok(Some(next));
            }
        }
        for _ in 0..TURNS {
            let turn = self.turn_before(&found, end).await?;
            for event in turn.into_iter().rev() {
                if self.data.len() == self.limit {
                    let Place { entry, part } = event.place;
                    // The place after it.
                    return Ok(Some(Cursor { position: entry.cast_signed(), id: part.saturating_add(1).to_string() }));
                }
                self.data.push(event.into_json());
            }
            if found.begun_after == 0 {
                return Ok(None);
            }
            end = Place { entry: found.begun_after.saturating_add(1), part: 0 };
            found = self.find(found.begun_after).await?;
        }
        Ok(Some(Cursor { position: end.entry.cast_signed(), id: end.part.to_string() }))
    }

    /// The last events of a turn before a place: one more than the page takes.
    async fn turn_before(&self, found: &FindTurnReply, end: Place) -> Result<VecDeque<Shown>, ApiError> {
        let (mut thread, mut cursor, mut last) = (Thread::at(self.session, found), found.begun_after, VecDeque::new());
        let keep = self.limit - self.data.len() + 1;
        while let Some(entries) = self.read(cursor).await? {
            for (id, entry) in entries {
                if id > end.entry {
                    return Ok(last);
                }
                let mut shown = Vec::new();
                thread.apply(id, &entry, &mut shown);
                last.extend(shown.into_iter().filter(|event| event.place < end && self.filter.takes(event)));
                while last.len() > keep {
                    last.pop_front();
                }
                cursor = id;
            }
        }
        Ok(last)
    }
}

#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes a query")]
pub struct StreamParams {
    /// Accepted for `agent.message` and `agent.thinking`: no previews are sent, for events come whole
    #[param(rename = "event_deltas[]")]
    event_deltas: Option<Vec<String>>,
    /// Events after this one are sent first; `Last-Event-ID` does the same
    after_id: Option<String>,
}

/// Follow the events of a session
///
/// Server-sent events from now on, or from `after_id` on, across turns until the session is terminated or deleted. A comment is sent
/// after 10 s of silence.
#[utoipa::path(get, path = "/v1/sessions/{id}/events/stream", tag = "managed-agents", operation_id = "sessions_events_stream",
    params(("id" = String, Path, description = "The session's id"), StreamParams),
    responses((status = 200, description = "Server-sent events: `event:` with the type, `id:`, one `data:` line", body = String,
               content_type = "text/event-stream")))]
pub async fn stream(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
    query: Query,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let (session_id, session) = stream::find(&app, &caller, Prefix::Session.find(&id)?).await?;
    let deltas: Vec<&str> = query.all("event_deltas").collect();
    if deltas.len() > DELTAS_MAX || deltas.iter().any(|delta| !DELTAS.contains(delta)) {
        return Err(bad("event_deltas: must be at most 100 of 'agent.message' and 'agent.thinking'"));
    }
    let after = stream::last_event_id(&headers).or_else(|| query.one("after_id"));
    let after = after.map(|text| EventId::decode(text).ok_or_else(|| bad("after_id: unknown event"))).transpose()?;
    // What is appended while this is read follows the place, and is shown.
    let (before, from) = match after {
        None => {
            let newest = history::newest(&app.bus, session_id).await?.ok_or_else(|| ApiError::not_found("Session"))?;
            (newest.saturating_add(1), From::Place(Place::after(newest)))
        }
        Some(EventId::Log { id, part }) => (id, From::Place(Place { entry: id, part })),
        Some(id @ EventId::Input(_)) => (0, From::Id(id.encode())),
    };
    let request = found_request(&caller, session_id, before);
    let (found, from) = match after {
        Some(EventId::Input(input)) => {
            let of_input = FindTurnRequest { input_id: input.to_string(), ..request.clone() };
            match app.bus.call::<rpc::FindTurn>(&of_input, crate::RPC_DEADLINE).await {
                Ok(found) => (found, from),
                // It is in the queue still: nothing that follows it has been shown but the turn that runs.
                Err(failure) if failure.code == ErrorCode::NotFound => {
                    let found = app.call::<rpc::FindTurn>(&request).await?;
                    let from = From::Place(Place::after(found.begun_after));
                    (found, from)
                }
                Err(failure) => return Err(failure.into()),
            }
        }
        _ => (app.call::<rpc::FindTurn>(&request).await?, from),
    };
    let (partition, open) = (stream::partition(&session)?, stream::open(&app, &caller)?);
    let view = View::Managed(Box::new(Managed::new(Thread::at(session_id, &found), from)));
    let follower = Follower::new(app, caller.user_id, open, (session_id, partition), found.begun_after, view);
    Ok(stream::sse(Body::from_stream(follower.into_stream())))
}
