//! Headers on bus messages. Those that begin with `Nats-` belong to the server.

/// W3C trace context.
pub const TRACEPARENT: &str = "traceparent";
/// When the caller stops waiting, in milliseconds since the epoch.
pub const DEADLINE: &str = "Aod-Deadline";
/// Why a message is in the dead-letter stream.
pub const DLQ_REASON: &str = "Aod-Dlq-Reason";
/// The subject a dead letter was first sent to.
pub const DLQ_SUBJECT: &str = "Aod-Dlq-Subject";
/// A failed reply's `common.v1.Error`, in base64.
pub const ERROR: &str = "Aod-Error";
