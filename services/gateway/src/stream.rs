//! The stream of a session (contract §7): history from the record in bounded pages until it meets the bus, then the bus.
//!
//! [`event`] is what clients see of an event; [`hub`] follows a session once for all its readers; [`reader`] is one connection.

pub mod event;
pub mod hub;
mod reader;

use axum::{
    body::Body,
    extract::{Path, Query, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use contract::{rpc, scheduler::GetSessionRequest};
use serde::Deserialize;
use types::SessionId;

use crate::{App, auth::Caller, error::ApiError, stream::reader::Reader};

#[derive(Debug, Deserialize)]
pub struct Params {
    since: Option<String>,
}

pub async fn stream(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
    Query(params): Query<Params>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let session_id: SessionId = id.parse().map_err(|_| ApiError::not_found("Session"))?;
    let request = GetSessionRequest { user_id: caller.user_id.clone(), session_id: id, recorded_through: 0 };
    let session = app.call::<rpc::GetSession>(&request).await?;
    let last_event_id = headers.get("last-event-id").map(|value| value.to_str().unwrap_or("?")).filter(|text| !text.is_empty());
    let since = resume_point(last_event_id.or(params.since.as_deref()))?;
    let reader = Reader::new(app, caller, session_id, session, since);
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-cache"),
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    Ok((headers, Body::from_stream(reader.into_stream())).into_response())
}

/// The id after which events are wanted.
fn resume_point(text: Option<&str>) -> Result<u64, ApiError> {
    let invalid = || ApiError::new(StatusCode::BAD_REQUEST, "since must be an integer");
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
    use super::*;

    #[test]
    fn a_resume_point_is_a_number_that_is_not_negative() {
        assert_eq!(resume_point(None).ok(), Some(0));
        assert_eq!(resume_point(Some(" 7 ")).ok(), Some(7));
        assert_eq!(resume_point(Some("99999999999999999999999")).ok(), Some(u64::MAX));
        for bad in ["-1", "x", "1.5", "+", "٣"] {
            assert!(resume_point(Some(bad)).is_err(), "{bad}");
        }
    }
}
