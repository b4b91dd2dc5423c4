//! Pages of lists: `?limit=` and an opaque `?cursor=`.

use axum::{
    extract::{FromRequestParts, Query},
    http::{StatusCode, request::Parts},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use contract::scheduler::{Cursor, ListRequest};
use prost::Message as _;
use serde::Deserialize;
use serde_json::{Value, json};
use types::limits::PAGE_MAX;

use crate::{auth::Caller, error::ApiError};

/// Which page of a list is wanted.
#[derive(Debug)]
pub struct Page {
    limit: u32,
    before: Option<Cursor>,
}

#[derive(Deserialize)]
struct Params {
    limit: Option<String>,
    cursor: Option<String>,
}

impl<S: Send + Sync> FromRequestParts<S> for Page {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let bad = |text: &str| ApiError::new(StatusCode::BAD_REQUEST, text);
        let Query(params) = Query::<Params>::from_request_parts(parts, state).await.map_err(|_| bad("Malformed query"))?;
        let limit = params.limit.map(|text| text.parse::<u32>().ok().filter(|limit| (1..=PAGE_MAX).contains(limit)));
        let limit = match limit {
            None => PAGE_MAX,
            Some(Some(limit)) => limit,
            Some(None) => return Err(bad("limit must be an integer from 1 to 1000")),
        };
        let before = params.cursor.map(|text| decode(&text).ok_or_else(|| bad("Invalid cursor"))).transpose()?;
        Ok(Self { limit, before })
    }
}

impl Page {
    pub fn request(self, caller: Caller) -> ListRequest {
        ListRequest { user_id: caller.user_id, limit: self.limit, before: self.before }
    }
}

/// The list envelope. `last` is where the next page begins.
pub fn envelope(data: Vec<Value>, has_more: bool, last: Option<(i64, String)>) -> axum::Json<Value> {
    let next = last.filter(|_| has_more).map(|(created_at_us, id)| encode(&Cursor { created_at_us, id }));
    axum::Json(json!({ "data": data, "has_more": has_more, "next_cursor": next }))
}

fn encode(cursor: &Cursor) -> String {
    URL_SAFE_NO_PAD.encode(cursor.encode_to_vec())
}

fn decode(text: &str) -> Option<Cursor> {
    Cursor::decode(URL_SAFE_NO_PAD.decode(text).ok()?.as_slice()).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_cursor_survives_its_text(created_at_us: i64, id: String) {
            let cursor = Cursor { created_at_us, id };
            prop_assert_eq!(decode(&encode(&cursor)), Some(cursor));
        }

        #[test]
        fn garbage_is_no_panic(text: String) {
            let _ = decode(&text);
        }
    }
}
