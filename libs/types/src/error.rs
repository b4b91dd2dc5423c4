//! The closed set of error codes that services answer with. Each maps to one HTTP status, in the
//! gateway.

use crate::session::named;

named! {
    ErrorCode {
        /// The request itself is wrong, whatever the state of the system.
        InvalidArgument = "invalid_argument",
        /// A field holds a value that the rules of the domain refuse.
        Unprocessable = "unprocessable",
        Unauthenticated = "unauthenticated",
        NotFound = "not_found",
        /// The state of the resource refuses the request.
        Conflict = "conflict",
        /// A quota or a limit is used up.
        ResourceExhausted = "resource_exhausted",
        /// A dependency is down or slow; the same request may work later.
        Unavailable = "unavailable",
        DeadlineExceeded = "deadline_exceeded",
        /// A defect of ours.
        Internal = "internal",
    }
}
