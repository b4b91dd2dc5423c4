//! `GET /sessions/{id}/events`: the typed events of a session, in pages or followed live.

use axum::{
    Json,
    body::Body,
    extract::{Query, State, rejection::QueryRejection},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use contract::session::{SessionEvent, session_event::Kind};
use prost::Message as _;
use serde::{Deserialize, Serialize};
use types::limits::PAGE_MAX;
use utoipa::{IntoParams, ToSchema};

use crate::{
    App,
    auth::Caller,
    error::ApiError,
    page::bad_query,
    path::{Id, IdParams},
    stream::{
        LastEventId,
        follow::{Follower, View},
        history::{self, PAGE_BYTES},
        last_event_id, open, partition, resume_point, sse,
        typed::TypedEvent,
    },
};

/// Pages of the log that one answer may take: raw output lies between typed events, and is read
/// over.
const LOG_PAGES: usize = 32;
/// An answer that holds so much is complete.
const ANSWER_BYTES: usize = 4 * 1024 * 1024;

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Params {
    /// Only events with a greater id
    #[param(pattern = "^[0-9]*$")]
    after: Option<String>,
    /// Only events with a smaller id, newest first. Pages only
    #[param(pattern = "^[0-9]*$")]
    before: Option<String>,
    /// `asc` (the default), or `desc`: the newest first, as with `before`. Pages only
    #[param(pattern = "^(asc|desc)$")]
    order: Option<String>,
    /// How many events at most: 1 to 1000, 1000 by default. Pages only
    #[param(value_type = Option<u32>, minimum = 1, maximum = 1000)]
    limit: Option<String>,
    /// `true` follows the session: the same as `Accept: text/event-stream`
    stream: Option<bool>,
}

/// Some typed events, in order.
#[derive(Serialize, ToSchema)]
pub struct EventPage {
    data: Vec<TypedEvent>,
    /// Whether the log has more events. A page may be shorter than `limit`, and empty, while it
    /// does.
    has_more: bool,
    /// Where the next page begins: its `after`; with the newest first, its `before`.
    last_id: u64,
}

/// Which way a list of events is read, and from where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    After(u64),
    Before(u64),
}

impl Direction {
    fn of(params: &Params) -> Result<Self, ApiError> {
        let backward = match params.order.as_deref() {
            None => params.before.is_some(),
            Some("asc") => false,
            Some("desc") => true,
            Some(_) => return Err(bad_query("order must be 'asc' or 'desc'")),
        };
        match backward {
            false if params.before.is_some() => Err(bad_query("before is for the order 'desc'")),
            true if params.after.is_some() => Err(bad_query("after is for the order 'asc'")),
            false => Ok(Self::After(resume_point("after", params.after.as_deref())?)),
            true => Ok(Self::Before(
                params
                    .before
                    .as_deref()
                    .map_or(Ok(u64::MAX), |before| resume_point("before", Some(before)))?,
            )),
        }
    }
}

/// List or follow typed events
///
/// What the agent does, under the names of the Managed Agents API: messages, tool uses and their
/// results, plans, usage, errors, permission requests, and the session's own events. With `Accept:
/// text/event-stream` or `stream=true`: all events after `after` or `Last-Event-ID`, then live
/// events, across turns until the session is terminated or deleted; a comment is sent after 10 s of
/// silence.
#[utoipa::path(get, path = "/sessions/{id}/events", tag = "sessions", params(IdParams, Params, LastEventId),
    responses((status = 200, description = "A page of events; with `Accept: text/event-stream`, one `data:` line with each `TypedEvent`",
               content((EventPage = "application/json"), (super::ServerSentEvent = "text/event-stream")))))]
pub async fn events(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
    params: Result<Query<Params>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let (session_id, session) = super::find(&app, &caller, id).await?;
    let Query(params) = params.map_err(|_| bad_query("Malformed query"))?;
    let after = resume_point("after", params.after.as_deref())?;
    let accepts = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    if params
        .stream
        .unwrap_or_else(|| accepts.is_some_and(|accepts| accepts.contains("text/event-stream")))
    {
        let after = last_event_id(&headers)
            .map(|text| resume_point("Last-Event-ID", Some(text)))
            .transpose()?
            .unwrap_or(after);
        let (partition, open) = (partition(&session)?, open(&app, &caller)?);
        let follower =
            Follower::new(app, caller.user_id, open, (session_id, partition), after, View::Typed);
        return Ok(sse(Body::from_stream(follower.into_stream())));
    }
    let direction = Direction::of(&params)?;
    let limit = match params
        .limit
        .map(|text| text.parse::<u32>().ok().filter(|limit| (1..=PAGE_MAX).contains(limit)))
    {
        None => PAGE_MAX,
        Some(Some(limit)) => limit,
        Some(None) => return Err(bad_query("limit must be an integer from 1 to 1000")),
    } as usize;
    let (Direction::After(start) | Direction::Before(start)) = direction;
    let mut page = EventPage { data: Vec::new(), has_more: true, last_id: start };
    let mut bytes = 0;
    'pages: for _ in 0..LOG_PAGES {
        let read = match direction {
            Direction::After(_) => {
                history::read_page(&app.bus, session_id, page.last_id, PAGE_BYTES).await?
            }
            Direction::Before(_) => {
                history::read_page_before(&app.bus, session_id, page.last_id, PAGE_BYTES).await?
            }
        };
        if read.session_deleted {
            return Err(ApiError::not_found("Session"));
        }
        if read.events.is_empty() {
            page.has_more = false;
            // An empty log has no event that the next page could begin at.
            page.last_id = if page.last_id == u64::MAX { 0 } else { page.last_id };
            break;
        }
        for recorded in read.events {
            if page.data.len() == limit || bytes > ANSWER_BYTES {
                break 'pages;
            }
            let size = recorded.payload.len();
            let event = SessionEvent::decode(recorded.payload).unwrap_or_default();
            if !matches!(event.kind, Some(Kind::Output(_)))
                && let Some(event) = TypedEvent::of(recorded.event_id, event)
            {
                page.data.push(event);
                bytes += size;
            }
            page.last_id = recorded.event_id;
        }
    }
    Ok((StatusCode::OK, Json(page)).into_response())
}
