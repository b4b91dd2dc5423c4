//! What stands in a path.

use axum::{
    extract::{FromRequestParts, Path},
    http::{StatusCode, request::Parts},
};
use utoipa::IntoParams;

use crate::error::ApiError;

/// The `{id}` of a path, or another word there. Whether anything has that name is for its owner to
/// say.
#[derive(Debug)]
pub struct Id(pub String);

/// The `{id}` of a path, and the id of a part after it.
#[derive(Debug)]
pub struct Part(pub String, pub String);

impl<S: Send + Sync> FromRequestParts<S> for Part {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Path((id, part)) = Path::from_request_parts(parts, state)
            .await
            .map_err(|_| ApiError::new(StatusCode::NOT_FOUND, "Not found"))?;
        Ok(Self(id, part))
    }
}

#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "describes a path")]
pub struct IdParams {
    /// The resource's id
    #[param(format = Uuid)]
    id: String,
}

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        // Not even text.
        let Path(id) = Path::from_request_parts(parts, state)
            .await
            .map_err(|_| ApiError::new(StatusCode::NOT_FOUND, "Not found"))?;
        Ok(Self(id))
    }
}
