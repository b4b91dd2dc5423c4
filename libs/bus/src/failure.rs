//! What a request fails with, on both sides of the bus.

use std::collections::HashMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use contract::common;
use prost::Message as _;
use types::ErrorCode;

/// A failed request. The message is safe to show to the caller's caller; causes are logged where they happen.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message} ({code})")]
pub struct Failure {
    pub code: ErrorCode,
    pub message: String,
    /// Numbers that belong to the message, such as a quota's.
    pub numbers: HashMap<String, i64>,
    /// The field at fault, where one is.
    pub field: Option<Box<Field>>,
}

/// A field, and what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    pub name: String,
    pub input: String,
}

impl Failure {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), numbers: HashMap::new(), field: None }
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::NotFound, message)
    }

    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Conflict, message)
    }

    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidArgument, message)
    }

    /// A defect of ours: the cause goes to the log, never to the caller.
    pub fn internal(cause: impl std::fmt::Display) -> Self {
        tracing::error!(%cause, "request failed");
        Self::new(ErrorCode::Internal, "Internal error")
    }

    /// A dependency that does not answer.
    pub fn unavailable(what: &str) -> Self {
        Self::new(ErrorCode::Unavailable, format!("{what} is not available"))
    }

    #[must_use]
    pub fn with_number(mut self, name: &str, value: i64) -> Self {
        self.numbers.insert(name.to_owned(), value);
        self
    }

    #[must_use]
    pub fn at_field(mut self, field: &str, input: &str) -> Self {
        self.field = Some(Box::new(Field { name: field.to_owned(), input: input.to_owned() }));
        self
    }

    pub(crate) fn to_header(&self) -> String {
        let error = common::Error {
            code: self.code.as_str().to_owned(),
            message: self.message.clone(),
            numbers: self.numbers.clone(),
            field: self.field.as_ref().map(|field| field.name.clone()),
            input: self.field.as_ref().map(|field| field.input.clone()),
        };
        STANDARD.encode(error.encode_to_vec())
    }

    pub(crate) fn from_header(text: &str) -> Option<Self> {
        let error = common::Error::decode(STANDARD.decode(text).ok()?.as_slice()).ok()?;
        let input = error.input.unwrap_or_default();
        let field = error.field.map(|name| Box::new(Field { name, input }));
        Some(Self { code: error.code.parse().ok()?, message: error.message, numbers: error.numbers, field })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_survives_the_wire() {
        let failure = Failure::new(ErrorCode::ResourceExhausted, "too many\nlines é").with_number("limit", 3).at_field("model", "x");
        assert_eq!(Failure::from_header(&failure.to_header()), Some(failure));
        assert_eq!(Failure::from_header("%"), None);
    }
}
