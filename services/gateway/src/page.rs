//! Pages of lists: `?limit=` and an opaque `?cursor=`.

use axum::{
    extract::{FromRequestParts, Query},
    http::{StatusCode, request::Parts},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use contract::scheduler::{Cursor, ListPartsRequest, ListRequest};
use prost::Message as _;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use types::{limits::PAGE_MAX, model::quoted};
use utoipa::{IntoParams, ToSchema};

use crate::{auth::Caller, error::ApiError};

/// Which page of a list is wanted.
#[derive(Debug)]
pub struct Page {
    pub limit: u32,
    pub after: Option<Cursor>,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct PageParams {
    /// How many items at most: 1 to 1000, 1000 by default
    #[param(value_type = Option<u32>, minimum = 1, maximum = 1000)]
    limit: Option<String>,
    /// Where the page begins: the `next_cursor` of the page before
    cursor: Option<String>,
}

pub fn bad_query(text: &str) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, text)
}

/// Reads the parameters of a query.
///
/// # Errors
/// 400 for a query that cannot be read.
pub async fn read_query<T: DeserializeOwned + 'static>(
    parts: &mut Parts,
    state: &(impl Send + Sync),
) -> Result<T, ApiError> {
    let params = Query::<T>::from_request_parts(parts, state).await;
    params.map(|Query(params)| params).map_err(|_| bad_query("Malformed query"))
}

/// # Errors
/// 400 for an unknown status.
pub fn check_status(
    status: Option<&str>,
    known: impl Iterator<Item = &'static str> + Clone,
) -> Result<(), ApiError> {
    match status {
        Some(status) if !known.clone().any(|name| name == status) => {
            Err(bad_query(&format!("status must be one of: {}", quoted(known))))
        }
        _ => Ok(()),
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Page {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let params: PageParams = read_query(parts, state).await?;
        let limit = params
            .limit
            .map(|text| text.parse::<u32>().ok().filter(|limit| (1..=PAGE_MAX).contains(limit)));
        let limit = match limit {
            None => PAGE_MAX,
            Some(Some(limit)) => limit,
            Some(None) => return Err(bad_query("limit must be an integer from 1 to 1000")),
        };
        let after = params
            .cursor
            .map(|text| decode(&text).ok_or_else(|| bad_query("Invalid cursor")))
            .transpose()?;
        Ok(Self { limit, after })
    }
}

impl Page {
    pub fn request(self, caller: Caller) -> ListRequest {
        ListRequest {
            user_id: caller.user_id,
            limit: self.limit,
            after: self.after,
            ..ListRequest::default()
        }
    }

    /// Of the versions of an agent or an environment, or the turns of a session.
    pub fn request_parts(self, caller: Caller, id: String) -> ListPartsRequest {
        ListPartsRequest { user_id: caller.user_id, id, limit: self.limit, after: self.after }
    }
}

/// A page of a list.
#[derive(Serialize, ToSchema)]
pub struct Listed<T> {
    data: Vec<T>,
    /// Whether more follow.
    has_more: bool,
    /// Where the next page begins.
    next_cursor: Option<String>,
}

/// Describes a page's rows; the next page begins after the last one.
pub fn listed<R, T>(
    rows: Vec<R>,
    has_more: bool,
    cursor: impl Fn(&R) -> Cursor,
    describe: impl Fn(R) -> T,
) -> axum::Json<Listed<T>> {
    let next_cursor = rows.last().filter(|_| has_more).map(|row| encode(&cursor(row)));
    axum::Json(Listed { data: rows.into_iter().map(describe).collect(), has_more, next_cursor })
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
        fn a_cursor_survives_its_text(position: i64, id: String) {
            let cursor = Cursor { position, id };
            prop_assert_eq!(decode(&encode(&cursor)), Some(cursor));
        }

        #[test]
        fn garbage_is_no_panic(text: String) {
            let _ = decode(&text);
        }
    }
}
