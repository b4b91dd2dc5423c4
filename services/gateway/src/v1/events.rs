//! `GET /v1/sessions/{id}/events` and `…/events/stream`: a session's events, in pages of either
//! order, or followed live.

use std::ops::Range;

use axum::{
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::{Buf as _, Bytes};
use contract::{
    rpc,
    scheduler::{Cursor, FindTurnReply, FindTurnRequest, Input, ListPartsRequest, ReadEventsReply},
    session::{SessionEvent, session_event::Kind},
};
use prost::{Message as _, encoding::decode_varint};
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
        page::{Limits, LongPageParams, Order, Start, Wanted},
        previews::Previews,
        query::{Query, bad},
        thread::{Thread, entry::Place},
    },
};

const LIMITS: Limits = Limits { default: 1000, max: 1000 };
/// Of the log, for a page of a list: most pages are made of one.
const LIST_BYTES: u32 = 1024 * 1024;
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
    FindTurnRequest {
        user_id: caller.user_id.clone(),
        session_id: session_id.to_string(),
        before,
        ..FindTurnRequest::default()
    }
}

fn session(id: &str) -> Result<SessionId, ApiError> {
    Prefix::Session.find(id)?.parse().map_err(|_| ApiError::not_found("Session"))
}

/// List the events of a session
///
/// In the order of `processed_at`; queued messages come last.
#[utoipa::path(get, path = "/v1/sessions/{id}/events", tag = "managed-agents", operation_id = "sessions_events_list",
    params(("id" = String, Path, description = "The session's id"), LongPageParams, ListParams),
    responses((status = 200, description = "A page of events", body = Page<Object>)))]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
    query: Query,
) -> Result<Events, ApiError> {
    let session = session(&id)?;
    let (wanted, filter) = (Wanted::read(&query, LIMITS, Order::Ascending)?, Filter::read(&query)?);
    let mut listing =
        Listing::new(Remote { app, caller, session }, session, filter, wanted.limit as usize);
    let from = wanted.start.as_ref().map(|start| &start.row);
    let next = match wanted.order {
        Order::Ascending => listing.ascending(from).await?,
        Order::Descending => listing.descending(from).await?,
    };
    let next_page = next.map(|row| Start { order: wanted.order, backwards: false, row }.encode());
    Ok(Events { data: listing.into_data(), next_page })
}

/// A page of events that are JSON already.
pub struct Events {
    data: Vec<String>,
    next_page: Option<String>,
}

impl IntoResponse for Events {
    fn into_response(self) -> Response {
        let mut body = String::with_capacity(
            self.data.iter().map(|event| event.len() + 1).sum::<usize>() + 256,
        );
        body.push_str(r#"{"data":["#);
        for (index, event) in self.data.iter().enumerate() {
            if index > 0 {
                body.push(',');
            }
            body.push_str(event);
        }
        body.push_str(r#"],"next_page":"#);
        // A cursor needs no escaping.
        match self.next_page {
            Some(next) => body.extend(["\"", &next, "\""]),
            None => body.push_str("null"),
        }
        body.push('}');
        ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], body)
            .into_response()
    }
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
        let page =
            history::read_shown_entries(&self.app.bus, self.session, after, limit, LIST_BYTES)
                .await?;
        read_of(page, |page| page.read_through > after, shown_entry)
    }

    async fn read_before(&self, before: u64, limit: usize) -> Result<Read, ApiError> {
        let mut page = history::read_shown_entries_before(
            &self.app.bus,
            self.session,
            before,
            limit,
            LIST_BYTES,
        )
        .await?;
        page.events.reverse();
        let entry = |payload: Bytes| SessionEvent::decode(payload).unwrap_or_default();
        read_of(page, |page| page.read_through > 0, entry)
    }

    async fn queue(&self) -> Result<Vec<Input>, ApiError> {
        let mut inputs: Vec<Input> = Vec::new();
        loop {
            let after = inputs
                .last()
                .map(|last| Cursor { position: last.created_at_us, id: last.input_id.clone() });
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

fn read_of(
    page: ReadEventsReply,
    has_output: impl Fn(&ReadEventsReply) -> bool,
    decode: impl Fn(Bytes) -> SessionEvent,
) -> Result<Read, ApiError> {
    if page.session_deleted {
        return Err(ApiError::not_found("Session"));
    }
    if page.events.is_empty() {
        return Ok(if has_output(&page) {
            Read::Output { through: page.read_through }
        } else {
            Read::End
        });
    }
    let entries = page
        .events
        .into_iter()
        .map(|event| (event.event_id, event.payload.len(), decode(event.payload)));
    Ok(Read::Entries(entries.map(|(id, size, entry)| (id, entry, size)).collect()))
}

/// An entry without its checkpoint, which is the larger part of most of them and shows as nothing.
fn shown_entry(payload: Bytes) -> SessionEvent {
    let entry = match checkpoint_of(&payload) {
        Some(range) => {
            SessionEvent::decode(payload.slice(..range.start).chain(payload.slice(range.end..)))
        }
        None => SessionEvent::decode(payload),
    };
    entry.unwrap_or_default()
}

/// Where the checkpoint is in the bytes of a `SessionEvent`, whose fields are in the order of their
/// numbers: two numbers come before it.
fn checkpoint_of(payload: &[u8]) -> Option<Range<usize>> {
    let mut rest = payload;
    loop {
        let begin = payload.len() - rest.len();
        match decode_varint(&mut rest).ok()? {
            // `turn` and `epoch`.
            8 | 16 => _ = decode_varint(&mut rest).ok()?,
            // `checkpoint`.
            26 => {
                let size = usize::try_from(decode_varint(&mut rest).ok()?).ok()?;
                let end = (payload.len() - rest.len()).checked_add(size)?;
                return (end <= payload.len()).then_some(begin..end);
            }
            _ => return None,
        }
    }
}

#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes a query")]
pub struct StreamParams {
    /// `agent.message` and `agent.thinking`: such events are also shown while they are written, by
    /// `event_start` and `event_delta`
    #[param(rename = "event_deltas[]")]
    event_deltas: Option<Vec<String>>,
    /// Events after this one are sent first; `Last-Event-ID` does the same
    after_id: Option<String>,
}

/// Follow the events of a session
///
/// Server-sent events from now on, or from `after_id` on, across turns until the session is
/// terminated or deleted. A comment is sent after 10 s of silence.
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
        return Err(bad(
            "event_deltas: must be at most 100 of 'agent.message' and 'agent.thinking'",
        ));
    }
    let after = stream::last_event_id(&headers).or_else(|| query.one("after_id"));
    let after = after
        .map(|text| EventId::decode(text).ok_or_else(|| bad("after_id: unknown event")))
        .transpose()?;
    // What is appended while this is read follows the place, and is shown.
    let find = |before| FindTurnRequest {
        wants_previews: !deltas.is_empty(),
        ..found_request(&caller, session_id, before)
    };
    let (found, from) = match after {
        None => {
            let newest = history::newest(&app.bus, session_id)
                .await?
                .ok_or_else(|| ApiError::not_found("Session"))?;
            (
                app.call::<rpc::FindTurn>(&find(newest.saturating_add(1))).await?,
                Place::after(newest),
            )
        }
        Some(EventId::Log { id, part }) => {
            (app.call::<rpc::FindTurn>(&find(id)).await?, Place { entry: id, part })
        }
        Some(EventId::Text { turn, text }) => {
            let found = app.call::<rpc::FindTurn>(&FindTurnRequest { turn, ..find(0) }).await?;
            let entry = find_text(&app, session_id, &found, (turn, text)).await?;
            (found, Place::after(entry.ok_or_else(|| bad("after_id: unknown event"))?))
        }
        Some(EventId::Input(input)) => {
            let request = FindTurnRequest { input_id: input.to_string(), ..find(0) };
            let found =
                app.bus.call::<rpc::FindTurn>(&request, crate::RPC_DEADLINE).await.map_err(
                    |failure| match failure.code {
                        ErrorCode::NotFound => bad("after_id: unknown event"),
                        _ => failure.into(),
                    },
                )?;
            let from = if found.is_within {
                Place { entry: found.after, part: 0 }
            } else {
                Place::after(found.after)
            };
            (found, from)
        }
    };
    let (partition, open) = (stream::partition(&session)?, stream::open(&app, &caller)?);
    let managed = Managed::new(Thread::at(session_id, &found), from, Previews::of(&deltas));
    let view = View::Managed(Box::new(managed));
    let follower =
        Follower::new(app, caller.user_id, open, (session_id, partition), found.begun_after, view);
    Ok(stream::sse(Body::from_stream(follower.into_stream())))
}

/// Where a text that was shown while it was written stands in the log.
async fn find_text(
    app: &App,
    session: SessionId,
    found: &FindTurnReply,
    (turn, text): (u32, u32),
) -> Result<Option<u64>, ApiError> {
    let mut after = found.begun_after;
    loop {
        let page = history::read_shown(&app.bus, session, after, PAGE_BYTES).await?;
        after = page.events.last().map_or(page.read_through, |event| event.event_id).max(after);
        let is_end = page.events.is_empty() && page.read_through == 0;
        for event in page.events {
            let entry = SessionEvent::decode(event.payload).unwrap_or_default();
            match entry.kind {
                Some(Kind::Agent(agent)) if entry.turn == turn && agent.text == u64::from(text) => {
                    return Ok(Some(event.event_id));
                }
                _ if entry.turn > turn => return Ok(None),
                _ => {}
            }
        }
        if is_end {
            return Ok(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use contract::session::{AgentEvent, Checkpoint};

    use super::*;

    #[test]
    fn an_entry_is_read_without_its_checkpoint() {
        let kind = Some(Kind::Agent(AgentEvent { tool_use: 9, ..AgentEvent::default() }));
        let entry = SessionEvent {
            turn: 300,
            epoch: 2,
            follows: Some(7),
            tag: 5,
            at_us: 1 << 50,
            kind,
            ..SessionEvent::default()
        };
        let checkpoint = Checkpoint {
            stages_done: vec!["a".repeat(200)],
            open_requests: vec![1; 50],
            ..Checkpoint::default()
        };
        for whole in [SessionEvent { checkpoint: Some(checkpoint), ..entry.clone() }, entry.clone()]
        {
            assert_eq!(shown_entry(whole.encode_to_vec().into()), entry);
        }
        assert_eq!(shown_entry(Bytes::new()), SessionEvent::default());
        assert_eq!(checkpoint_of(&[26, 200]), None);
    }
}
