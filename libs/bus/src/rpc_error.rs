//! The error of a request, on both sides of the bus.

use std::collections::HashMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use contract::common;
use prost::Message as _;
use types::ErrorCode;

/// A failed request. The message is safe to show to the caller's caller; causes are logged where
/// they happen.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message} ({code})")]
pub struct RpcError {
    pub code: ErrorCode,
    pub message: String,
    /// Numbers that belong to the message, such as a quota's.
    pub numbers: HashMap<String, i64>,
    /// The field at fault, where one is.
    pub field: Option<Box<Field>>,
    /// A fixed word for why, where callers tell failures of one code apart: the state of a resource
    /// that refuses a request.
    pub reason: Option<String>,
    /// Whether Postgres rolled the transaction back in favour of others, so that it may be run
    /// again. Does not cross the bus.
    pub rolled_back: bool,
}

/// A field, and what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    pub name: String,
    pub input: String,
}

impl RpcError {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            numbers: HashMap::new(),
            field: None,
            reason: None,
            rolled_back: false,
        }
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

    #[must_use]
    pub fn because(mut self, reason: &str) -> Self {
        self.reason = Some(reason.to_owned());
        self
    }

    pub(crate) fn to_header(&self) -> String {
        let error = common::Error {
            code: self.code.as_str().to_owned(),
            message: self.message.clone(),
            numbers: self.numbers.clone(),
            field: self.field.as_ref().map(|field| field.name.clone()),
            input: self.field.as_ref().map(|field| field.input.clone()),
            reason: self.reason.clone(),
        };
        STANDARD.encode(error.encode_to_vec())
    }

    pub(crate) fn from_header(text: &str) -> Option<Self> {
        let error = common::Error::decode(STANDARD.decode(text).ok()?.as_slice()).ok()?;
        let input = error.input.unwrap_or_default();
        let field = error.field.map(|name| Box::new(Field { name, input }));
        let (code, reason) = (error.code.parse().ok()?, error.reason);
        Some(Self {
            code,
            message: error.message,
            numbers: error.numbers,
            field,
            reason,
            rolled_back: false,
        })
    }
}

/// Errors of Postgres: `Unavailable` where the same request may succeed later, a defect of ours
/// otherwise.
#[cfg(feature = "postgres")]
impl From<sqlx::Error> for RpcError {
    fn from(error: sqlx::Error) -> Self {
        let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code);
        let code = code.as_deref().unwrap_or_default();
        if !is_unavailable(&error, code) {
            return Self::internal(error);
        }
        tracing::warn!(%error, "Postgres is not available");
        Self {
            rolled_back: matches!(code, DEADLOCK_DETECTED | SERIALIZATION_FAILURE),
            ..Self::unavailable("The database")
        }
    }
}

#[cfg(feature = "postgres")]
const DEADLOCK_DETECTED: &str = "40P01";
#[cfg(feature = "postgres")]
const SERIALIZATION_FAILURE: &str = "40001";

/// Whether an error says nothing about the request. `code` is its SQLSTATE.
#[cfg(feature = "postgres")]
fn is_unavailable(error: &sqlx::Error, code: &str) -> bool {
    use sqlx::Error;
    let transient = matches!(
        error,
        Error::PoolTimedOut
            | Error::PoolClosed
            | Error::WorkerCrashed
            | Error::Io(_)
            | Error::Tls(_)
            | Error::BeginFailed
    );
    // Connections (08), shutdown and start-up (57P), resources such as connections, disk or memory
    // (53); a cancelled statement, a wait for a lock or an idle transaction that took too long; and
    // a server that is read-only, as after a failover.
    transient
        || code.starts_with("08")
        || code.starts_with("57P")
        || code.starts_with("53")
        || matches!(
            code,
            "57014" | "55P03" | "25P03" | "25006" | DEADLOCK_DETECTED | SERIALIZATION_FAILURE
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_survives_the_wire() {
        let failure = RpcError::new(ErrorCode::ResourceExhausted, "too many\nlines é")
            .with_number("limit", 3)
            .at_field("model", "x")
            .because("limit");
        assert_eq!(RpcError::from_header(&failure.to_header()), Some(failure));
        assert_eq!(RpcError::from_header("%"), None);
    }
}
