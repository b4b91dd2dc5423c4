//! Request bodies, checked field by field. Several errors come together, in the shape of pydantic
//! v2 (docs/api.md §1).

mod collections;
mod echo;
pub mod field_error;
mod fields;
mod integer;

use std::time::Duration;

use axum::{
    body::to_bytes,
    extract::{FromRequest, Request},
    http::StatusCode,
};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use types::limits::BODY_BYTES_MAX;

pub use crate::body::{field_error::FieldError, fields::Fields};
use crate::error::ApiError;

/// A body that takes longer to arrive is not waited for.
const BODY_TIME_MAX: Duration = Duration::from_secs(30);

/// A JSON body as it came. It may hold secrets: it cannot be printed.
pub struct Body(Vec<u8>);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let bytes =
            tokio::time::timeout(BODY_TIME_MAX, to_bytes(request.into_body(), BODY_BYTES_MAX))
                .await;
        let bytes = bytes.map_err(|_| {
            ApiError::new(StatusCode::REQUEST_TIMEOUT, "Request body took too long")
        })?;
        let bytes = bytes
            .map_err(|_| ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "Request body too large"))?;
        Ok(Self(bytes.into()))
    }
}

impl Body {
    /// The body's fields.
    pub fn fields(&self) -> Result<Fields, ApiError> {
        let value: Value = serde_json::from_slice(&self.0)
            .map_err(|_| ApiError::new(StatusCode::BAD_REQUEST, "Invalid JSON"))?;
        match value {
            Value::Object(object) => Ok(Fields::of(object, Vec::new())),
            input => {
                let msg = "Input should be a valid dictionary".to_owned();
                Err(ApiError::fields(vec![
                    FieldError { kind: "model_type", loc: Vec::new(), msg, input }.shortened(),
                ]))
            }
        }
    }

    /// The body as it is, for those who check it themselves.
    pub fn json(&self) -> Result<Value, ApiError> {
        serde_json::from_slice(&self.0)
            .map_err(|_| ApiError::new(StatusCode::BAD_REQUEST, "Invalid JSON"))
    }

    #[cfg(test)]
    pub fn from_json(value: &Value) -> Self {
        Self(value.to_string().into_bytes())
    }

    pub fn sha256(&self) -> Vec<u8> {
        Sha256::digest(&self.0).to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_that_are_not_json_objects_are_refused() {
        assert!(Body(b"{".to_vec()).fields().is_err());
        assert!(Body(b"[1]".to_vec()).fields().is_err());
        assert!(Body("[".repeat(100_000).into_bytes()).fields().is_err());
        assert!(Body(br#"{"a": "\ud800"}"#.to_vec()).fields().is_err());
    }
}
