//! The closed set of error codes that services answer with. Each maps to one HTTP status, in the gateway.

use std::{fmt, str::FromStr};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// The request itself is wrong, whatever the state of the system.
    InvalidArgument,
    /// A field holds a value that the rules of the domain refuse.
    Unprocessable,
    Unauthenticated,
    NotFound,
    /// The state of the resource refuses the request.
    Conflict,
    /// A quota or a limit is used up.
    ResourceExhausted,
    /// A dependency is down or slow; the same request may work later.
    Unavailable,
    DeadlineExceeded,
    /// A defect of ours.
    Internal,
}

impl ErrorCode {
    pub const ALL: [Self; 9] = [
        Self::InvalidArgument,
        Self::Unprocessable,
        Self::Unauthenticated,
        Self::NotFound,
        Self::Conflict,
        Self::ResourceExhausted,
        Self::Unavailable,
        Self::DeadlineExceeded,
        Self::Internal,
    ];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InvalidArgument => "invalid_argument",
            Self::Unprocessable => "unprocessable",
            Self::Unauthenticated => "unauthenticated",
            Self::NotFound => "not_found",
            Self::Conflict => "conflict",
            Self::ResourceExhausted => "resource_exhausted",
            Self::Unavailable => "unavailable",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::Internal => "internal",
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for ErrorCode {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|code| code.as_str() == text).ok_or(())
    }
}
