//! Query strings of `/v1`. Unknown parameters are ignored: older SDKs send `beta=true` everywhere.

use axum::{
    extract::{FromRequestParts, Query as Pairs},
    http::{StatusCode, request::Parts},
};
use types::Timestamp;

use crate::error::ApiError;

/// The parameters of a query, in their order.
#[derive(Debug)]
pub struct Query(Vec<(String, String)>);

pub fn bad(text: &str) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, text)
}

impl<S: Send + Sync> FromRequestParts<S> for Query {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let pairs = Pairs::from_request_parts(parts, state).await;
        pairs.map(|Pairs(pairs)| Self(pairs)).map_err(|_| bad("Malformed query"))
    }
}

impl Query {
    /// A parameter's value; an empty one counts as absent.
    pub fn one(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(key, value)| key == name && !value.is_empty())
            .map(|(_, value)| value.as_str())
    }

    /// The values of a list: `name[]=a&name[]=b`, or `name=a&name=b`.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let is_named = move |key: &str| {
            key.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest == "[]")
        };
        self.0.iter().filter(move |(key, _)| is_named(key)).map(|(_, value)| value.as_str())
    }

    /// # Errors
    /// 400 for another word.
    pub fn flag(&self, name: &str) -> Result<bool, ApiError> {
        match self.one(name) {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => Err(bad(&format!("{name}: must be true or false"))),
        }
    }

    /// # Errors
    /// 400 for what is no whole number from 1 to `max`.
    pub fn number(&self, name: &str, max: u32) -> Result<Option<u32>, ApiError> {
        let Some(text) = self.one(name) else { return Ok(None) };
        let number = text.parse().ok().filter(|number| (1..=max).contains(number));
        number.map(Some).ok_or_else(|| bad(&format!("{name}: must be an integer from 1 to {max}")))
    }

    /// In microseconds since the epoch.
    ///
    /// # Errors
    /// 400 for what is no RFC 3339 time.
    pub fn time(&self, name: &str) -> Result<Option<i64>, ApiError> {
        let Some(text) = self.one(name) else { return Ok(None) };
        // A `+` that was not escaped is a space by now.
        let time = text.replace(' ', "+").parse::<Timestamp>();
        time.map(|time| Some(time.unix_micros()))
            .map_err(|_| bad(&format!("{name}: must be an RFC 3339 time")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_taken_with_and_without_brackets() {
        let query = Query(
            [("a[]", "1"), ("a", "2"), ("ab", "3"), ("a[]", "4")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
        );
        assert_eq!(query.all("a").collect::<Vec<_>>(), ["1", "2", "4"]);
        assert_eq!(query.number("ab", 3).unwrap(), Some(3));
        assert!(
            query.number("ab", 2).is_err()
                && query.flag("ab").is_err()
                && query.time("ab").is_err()
        );
    }
}
