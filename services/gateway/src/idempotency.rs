//! `Idempotency-Key`: a request that creates takes effect once, however often it is sent
//! (docs/api.md §1).

use axum::{
    Json,
    extract::FromRequestParts,
    http::{HeaderName, HeaderValue, StatusCode, request::Parts},
    response::{IntoResponse, Response},
};
use contract::scheduler::Once;
use serde::Serialize;
use types::limits::IDEMPOTENCY_KEY_CHARS_MAX;
use utoipa::IntoParams;
use uuid::Uuid;

use crate::{body::Body, error::ApiError};

pub const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// The request's key, where it has one.
#[derive(Debug)]
pub struct IdempotencyKey(Option<String>);

#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "describes a header")]
pub struct IdempotencyParams {
    /// The same key with the same body gets the same answer for 24 hours, and creates once
    #[param(rename = "Idempotency-Key", min_length = 1, max_length = 255, pattern = "^[ -~]+$")]
    idempotency_key: Option<String>,
}

impl<S: Send + Sync> FromRequestParts<S> for IdempotencyKey {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let Some(value) = parts.headers.get("idempotency-key") else { return Ok(Self(None)) };
        let printable = |text: &&str| {
            (1..=IDEMPOTENCY_KEY_CHARS_MAX).contains(&text.len())
                && text.bytes().all(|c| c.is_ascii_graphic() || c == b' ')
        };
        let key = value.to_str().ok().filter(printable);
        let bad = || {
            ApiError::new(
                StatusCode::BAD_REQUEST,
                "Idempotency-Key must be 1 to 255 printable ASCII characters",
            )
        };
        Ok(Self(Some(key.ok_or_else(bad)?.to_owned())))
    }
}

impl IdempotencyKey {
    pub fn once(self, body: &Body) -> Option<Once> {
        self.0.map(|key| Once { key, body_hash: body.sha256(), is_of_one_request: false })
    }

    /// As [`Self::once`]; without a key of the client's, under one that makes this request's own
    /// attempts one.
    pub fn once_or_own(self, body: &Body) -> Once {
        let own = || Once {
            key: Uuid::now_v7().to_string(),
            body_hash: Vec::new(),
            is_of_one_request: true,
        };
        self.once(body).unwrap_or_else(own)
    }
}

/// The answer to a request that created something, now or when its key was first used.
#[derive(Debug)]
pub struct Created<T> {
    pub status: StatusCode,
    pub body: T,
    pub replayed: bool,
}

impl<T: Serialize> IntoResponse for Created<T> {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body)).into_response();
        if self.replayed {
            response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
        }
        response
    }
}
