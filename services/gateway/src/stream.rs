//! The stream of a session (docs/api.md §7): history from the event log in Postgres, in bounded
//! pages, then what is appended live.
//!
//! [`events`] are the typed events, [`typed`] their shapes, [`follow`] one connection that follows
//! them. [`reader`] is one connection and [`progress`] its pure part; [`hub`] follows a session for
//! all its readers and [`tail`] is its pure part; [`history`] reads pages; [`event`] is what
//! clients see of an event; [`open`] counts the streams of each key.

pub mod event;
pub mod events;
pub mod follow;
pub mod history;
pub mod hub;
pub mod open;
mod progress;
mod reader;
mod tail;
pub mod typed;

use axum::{
    body::Body,
    extract::{Query, State, rejection::QueryRejection},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use contract::{
    rpc,
    scheduler::{GetSessionRequest, Session},
};
use futures::future::BoxFuture;
use serde::Deserialize;
use types::{Partition, SessionId, SessionStatus};

use utoipa::{IntoParams, ToSchema};

use crate::{
    App,
    auth::Caller,
    error::ApiError,
    limits::TryLater,
    page::bad_query,
    path::{Id, IdParams},
    stream::{
        event::Event,
        open::{OpenStream, TooManyStreams},
        reader::Reader,
    },
};

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Params {
    /// Only events with a greater id follow
    #[param(pattern = "^[0-9]*$")]
    since: Option<String>,
}

#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "describes a header")]
pub struct LastEventId {
    /// As `since`, which it overrides
    #[param(rename = "Last-Event-ID", pattern = "^[0-9]*$")]
    last_event_id: Option<String>,
}

/// A server-sent event.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes what is written line by line")]
pub struct ServerSentEvent {
    /// Where a client that reconnects resumes. Absent on `start`, `turn_start` and `stale`.
    #[schema(pattern = "^[0-9]+$")]
    id: Option<String>,
    /// A `StreamEvent` as JSON, in ASCII.
    data: String,
}

/// Follow a session
///
/// Server-sent events: the session's history, then live events until its current turn ends. A
/// comment is sent after 15 s of silence. A browser's `EventSource` reconnects after the end with
/// `Last-Event-ID`; status 204 makes it stop.
#[utoipa::path(get, path = "/sessions/{id}/stream", tag = "sessions", params(IdParams, Params, LastEventId),
    responses((status = 200, description = "Server-sent events, one `data:` line each", body = ServerSentEvent, content_type = "text/event-stream"),
              (status = 204, description = "The current turn has ended, and `Last-Event-ID` is its last event")))]
pub async fn stream(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
    params: Result<Query<Params>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let (session_id, session) = find(&app, &caller, id).await?;
    let Query(params) = params.map_err(|_| bad_query("Malformed query"))?;
    let last_event_id = last_event_id(&headers);
    let since = resume_point("since", params.since.as_deref())?;
    let resumed = last_event_id.map(|text| resume_point("since", Some(text))).transpose()?;
    let since = resumed.unwrap_or(since);
    if let Some(last) = resumed
        && has_end(&app, session_id, &session, last).await?
    {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let (partition, open) = (partition(&session)?, open(&app, &caller)?);
    let reader = Reader::new(app, caller, open, (session_id, partition), session, since);
    Ok(sse(Body::from_stream(reader.into_stream())))
}

/// A session of the caller's.
pub async fn find(
    app: &App,
    caller: &Caller,
    id: String,
) -> Result<(SessionId, Session), ApiError> {
    let session_id: SessionId = id.parse().map_err(|_| ApiError::not_found("Session"))?;
    let request = GetSessionRequest {
        user_id: caller.user_id.clone(),
        session_id: id,
        recorded_through: 0,
        v1: false,
    };
    Ok((session_id, app.call::<rpc::GetSession>(&request).await?))
}

pub fn partition(session: &Session) -> Result<Partition, ApiError> {
    let partition = Partition::new(session.event_partition);
    partition.ok_or_else(|| {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "This gateway is older than the session")
    })
}

pub fn open(app: &App, caller: &Caller) -> Result<OpenStream, ApiError> {
    app.streams.open(app, caller.key).map_err(|TooManyStreams { max }| {
        let detail = format!("This API key has {max} streams open, as many as it may. Close some, or have several readers share one.");
        ApiError::try_later(&detail, TryLater { seconds: 5 })
    })
}

pub fn sse(body: Body) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-cache"),
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, body).into_response()
}

/// What a client that reconnects had last.
pub fn last_event_id(headers: &HeaderMap) -> Option<&str> {
    headers
        .get("last-event-id")
        .map(|value| value.to_str().unwrap_or("?"))
        .filter(|text| !text.is_empty())
}

/// Whether a client that has an event has the end of the session's current turn.
async fn has_end(
    app: &App,
    session_id: SessionId,
    session: &Session,
    last: u64,
) -> Result<bool, ApiError> {
    let Some(settled) =
        session.status.parse::<SessionStatus>().ok().filter(|status| !status.is_active())
    else {
        return Ok(false);
    };
    let page = history::read_page(&app.bus, session_id, last, 1).await?;
    let newest = page.newest.map(|event| Event::decode(event.event_id, event.payload));
    Ok(newest.is_some_and(|newest| {
        newest.id <= last && progress::is_end_of(&newest, settled, session.turn_count)
    }))
}

/// Waits for the answer to a request; for ever if none is under way.
async fn answer_to<T>(request: &mut Option<BoxFuture<'static, T>>) -> T {
    match request {
        Some(request) => request.await,
        None => std::future::pending().await,
    }
}

/// The id after which events are wanted.
fn resume_point(name: &str, text: Option<&str>) -> Result<u64, ApiError> {
    let invalid = || ApiError::new(StatusCode::BAD_REQUEST, &format!("{name} must be an integer"));
    let Some(text) = text.map(str::trim).filter(|text| !text.is_empty()) else { return Ok(0) };
    let digits = text.strip_prefix('+').unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(invalid());
    }
    // Past every id: nothing follows it.
    Ok(digits.parse().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_text_is_a_resume_point_or_refused(text in "\\PC{0,30}|[ +0-9]{0,30}") {
            if let (Ok(point), Ok(number)) = (resume_point("since", Some(&text)), text.trim().parse::<u64>()) {
                prop_assert_eq!(point, number);
            }
        }
    }

    #[test]
    fn a_resume_point_is_a_number_that_is_not_negative() {
        assert_eq!(resume_point("since", None).ok(), Some(0));
        assert_eq!(resume_point("since", Some(" 7 ")).ok(), Some(7));
        assert_eq!(resume_point("since", Some("99999999999999999999999")).ok(), Some(u64::MAX));
        for bad in ["-1", "x", "1.5", "+", "٣"] {
            assert!(resume_point("since", Some(bad)).is_err(), "{bad}");
        }
    }
}
