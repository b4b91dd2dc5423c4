//! Answers with an `ETag`, which are not sent again to a client that names it.

use std::convert::Infallible;

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, HeaderValue, StatusCode, header, request::Parts},
    response::{IntoResponse as _, Response},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use crate::error::ApiError;

/// Of a digest that no one but the answer's reader compares with another.
const TAG_BYTES: usize = 12;

/// The answers that a client has, by its `If-None-Match`.
#[derive(Debug)]
pub struct Known(Vec<String>);

impl<S: Sync> FromRequestParts<S> for Known {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self::read(&parts.headers))
    }
}

impl Known {
    fn read(headers: &HeaderMap) -> Self {
        let values = headers.get_all(header::IF_NONE_MATCH).iter();
        let tags = values
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            // A proxy that compresses marks the tag as weak.
            .map(|tag| tag.trim().trim_start_matches("W/").to_owned());
        Self(tags.collect())
    }

    /// Answers with the body as JSON, or with 304 if the client has it.
    ///
    /// # Errors
    /// 500 if the body is not JSON.
    pub fn answer(&self, body: &impl Serialize) -> Result<Response, ApiError> {
        let json = serde_json::to_vec(body).map_err(|error| {
            tracing::error!(%error, "failed to write an answer as JSON");
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "Internal error")
        })?;
        let digest = Sha256::digest(&json);
        let digest = digest.get(..TAG_BYTES).unwrap_or(&digest);
        let tag = format!("\"{}\"", URL_SAFE_NO_PAD.encode(digest));
        let mut response = if self.0.iter().any(|known| *known == tag || known == "*") {
            StatusCode::NOT_MODIFIED.into_response()
        } else {
            ([(header::CONTENT_TYPE, "application/json")], json).into_response()
        };
        if let Ok(tag) = HeaderValue::try_from(tag) {
            response.headers_mut().insert(header::ETAG, tag);
        }
        Ok(response)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn answer(if_none_match: &'static str, body: &Value) -> (u16, String) {
        let value = HeaderValue::from_static(if_none_match);
        let known = Known::read(&HeaderMap::from_iter([(header::IF_NONE_MATCH, value)]));
        let response = known.answer(body).unwrap();
        let tag = response.headers().get(header::ETAG).unwrap().to_str().unwrap().to_owned();
        (response.status().as_u16(), tag)
    }

    #[test]
    fn a_body_is_not_sent_again_until_it_changes() {
        let body = json!({ "data": [1] });
        let (first, tag) = answer("", &body);
        assert_eq!(first, 200);
        for known in [tag.clone(), format!("W/{tag}"), format!("\"old\", {tag}"), "*".to_owned()] {
            let known: &'static str = known.leak();
            assert_eq!(answer(known, &body), (304, tag.clone()), "{known}");
        }
        let (changed, other) = answer(tag.leak(), &json!({ "data": [2] }));
        assert_eq!(changed, 200);
        assert_eq!(answer("\"old\"", &json!({ "data": [2] })), (200, other));
    }
}
