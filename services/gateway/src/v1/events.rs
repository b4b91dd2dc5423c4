//! `GET /v1/sessions/{id}/events` and `…/events/stream`: a session's events, in pages of either order, or followed live.

use axum::{Json, body::Body, extract::State, http::HeaderMap, response::Response};
use contract::{
    rpc,
    scheduler::{Cursor, FindTurnReply, FindTurnRequest, Input, ListPartsRequest},
    session::{SessionEvent, session_event::Kind},
};
use prost::Message as _;
use serde_json::Value;
use types::{ErrorCode, SessionId, limits::PAGE_MAX};
use utoipa::IntoParams;

use crate::{
    App,
    auth::Caller,
    error::ApiError,
    stream::{
        self,
        follow::{Follower, Managed, View},
        history::{self, PAGE_BYTES},
    },
    v1::{
        ids::{EventId, PathId, Prefix},
        listing::{Filter, Listing, Log, Read},
        page::{Limits, LongPageParams, Order, Page, Start, Wanted},
        previews::Previews,
        query::{Query, bad},
        thread::{Thread, entry::Place},
    },
};

const LIMITS: Limits = Limits { default: 1000, max: 1000 };
const DELTAS: [&str; 2] = ["agent.message", "agent.thinking"];
const DELTAS_MAX: usize = 100;

#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes a query")]
pub struct ListParams {
    #[param(pattern = "^(asc|desc)$")]
    order: Option<String>,
    /// Only events of these types
    #[param(rename = "types[]")]
    types: Option<Vec<String>>,
    /// Only events that were processed later; also `gte`, `lt` and `lte`
    #[param(rename = "created_at[gt]")]
    created_at_gt: Option<String>,
}

fn found_request(caller: &Caller, session_id: SessionId, before: u64) -> FindTurnRequest {
    FindTurnRequest { user_id: caller.user_id.clone(), session_id: session_id.to_string(), before, ..FindTurnRequest::default() }
}

fn session(id: &str) -> Result<SessionId, ApiError> {
    Prefix::Session.find(id)?.parse().map_err(|_| ApiError::not_found("Session"))
}

/// List the events of a session
///
/// In the order of `processed_at`; what is queued stands behind it.
#[utoipa::path(get, path = "/v1/sessions/{id}/events", tag = "managed-agents", operation_id = "sessions_events_list",
    params(("id" = String, Path, description = "The session's id"), LongPageParams, ListParams),
    responses((status = 200, description = "A page of events", body = Page<Object>)))]
pub async fn list(State(app): State<App>, caller: Caller, PathId(id): PathId, query: Query) -> Result<Json<Page<Value>>, ApiError> {
    let session = session(&id)?;
    let (wanted, filter) = (Wanted::read(&query, LIMITS, Order::Ascending)?, Filter::read(&query)?);
    let mut listing = Listing::new(Remote { app, caller, session }, session, filter, wanted.limit as usize);
    let from = wanted.start.as_ref().map(|start| &start.row);
    let next = match wanted.order {
        Order::Ascending => listing.ascending(from).await?,
        Order::Descending => listing.descending(from).await?,
    };
    let next_page = next.map(|row| Start { order: wanted.order, backwards: false, row }.encode());
    Ok(Json(Page { data: listing.into_data(), next_page }))
}

/// A session's log, as the scheduler has it.
struct Remote {
    app: App,
    caller: Caller,
    session: SessionId,
}

impl Log for Remote {
    async fn find(&self, before: u64) -> Result<FindTurnReply, ApiError> {
        self.app.call::<rpc::FindTurn>(&found_request(&self.caller, self.session, before)).await
    }

    async fn read(&self, after: u64, limit: usize) -> Result<Read, ApiError> {
        let page = history::read_shown_entries(&self.app.bus, self.session, after, limit, PAGE_BYTES).await?;
        if page.session_deleted {
            return Err(ApiError::not_found("Session"));
        }
        let entries = page.events.into_iter().map(|event| {
            let size = event.payload.len();
            (event.event_id, SessionEvent::decode(event.payload).unwrap_or_default(), size)
        });
        let entries: Vec<_> = entries.collect();
        Ok(match page.read_through {
            _ if !entries.is_empty() => Read::Entries(entries),
            through if through > after => Read::Output { through },
            _ => Read::End,
        })
    }

    async fn queue(&self) -> Result<Vec<Input>, ApiError> {
        let mut inputs: Vec<Input> = Vec::new();
        loop {
            let after = inputs.last().map(|last| Cursor { position: last.created_at_us, id: last.input_id.clone() });
            let (user_id, id) = (self.caller.user_id.clone(), self.session.to_string());
            let request = ListPartsRequest { user_id, id, limit: PAGE_MAX, after };
            let page = self.app.call::<rpc::ListOpenInputs>(&request).await?;
            let has_more = page.has_more && !page.inputs.is_empty();
            inputs.extend(page.inputs);
            if !has_more {
                return Ok(inputs);
            }
        }
    }
}

#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes a query")]
pub struct StreamParams {
    /// `agent.message` and `agent.thinking`: such events are also shown while they are written, by `event_start` and `event_delta`
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
    let find = |before| FindTurnRequest { wants_previews: !deltas.is_empty(), ..found_request(&caller, session_id, before) };
    let (found, from) = match after {
        None => {
            let newest = history::newest(&app.bus, session_id).await?.ok_or_else(|| ApiError::not_found("Session"))?;
            (app.call::<rpc::FindTurn>(&find(newest.saturating_add(1))).await?, Place::after(newest))
        }
        Some(EventId::Log { id, part }) => (app.call::<rpc::FindTurn>(&find(id)).await?, Place { entry: id, part }),
        Some(EventId::Text { turn, text }) => {
            let found = app.call::<rpc::FindTurn>(&FindTurnRequest { turn, ..find(0) }).await?;
            let entry = find_text(&app, session_id, &found, (turn, text)).await?;
            (found, Place::after(entry.ok_or_else(|| bad("after_id: unknown event"))?))
        }
        Some(EventId::Input(input)) => {
            let request = FindTurnRequest { input_id: input.to_string(), ..find(0) };
            let found = app.bus.call::<rpc::FindTurn>(&request, crate::RPC_DEADLINE).await.map_err(|failure| match failure.code {
                ErrorCode::NotFound => bad("after_id: unknown event"),
                _ => failure.into(),
            })?;
            let from = if found.is_within { Place { entry: found.after, part: 0 } } else { Place::after(found.after) };
            (found, from)
        }
    };
    let (partition, open) = (stream::partition(&session)?, stream::open(&app, &caller)?);
    let managed = Managed::new(Thread::at(session_id, &found), from, Previews::of(&deltas));
    let view = View::Managed(Box::new(managed));
    let follower = Follower::new(app, caller.user_id, open, (session_id, partition), found.begun_after, view);
    Ok(stream::sse(Body::from_stream(follower.into_stream())))
}

/// Where a text that was shown while it was written stands in the log.
async fn find_text(app: &App, session: SessionId, found: &FindTurnReply, (turn, text): (u32, u32)) -> Result<Option<u64>, ApiError> {
    let mut after = found.begun_after;
    loop {
        let page = history::read_shown(&app.bus, session, after, PAGE_BYTES).await?;
        after = page.events.last().map_or(page.read_through, |event| event.event_id).max(after);
        let is_end = page.events.is_empty() && page.read_through == 0;
        for event in page.events {
            let entry = SessionEvent::decode(event.payload).unwrap_or_default();
            match entry.kind {
                Some(Kind::Agent(agent)) if entry.turn == turn && agent.text == u64::from(text) => return Ok(Some(event.event_id)),
                _ if entry.turn > turn => return Ok(None),
                _ => {}
            }
        }
        if is_end {
            return Ok(None);
        }
    }
}
