//! Headers on bus messages. Those that begin with `Nats-` belong to the server.

/// W3C trace context.
pub const TRACEPARENT: &str = "traceparent";
/// How long the caller still waits, in milliseconds. A duration, so that clocks need not agree.
pub const TIMEOUT: &str = "Aod-Timeout-Ms";
/// When the caller stops waiting, in milliseconds since the epoch. Sent beside [`TIMEOUT`], and
/// read without it, for peers of the release before; to be removed in the release after.
pub const DEADLINE: &str = "Aod-Deadline";
/// Why a message is in the dead-letter stream.
pub const DLQ_REASON: &str = "Aod-Dlq-Reason";
/// The subject a dead letter was first sent to.
pub const DLQ_SUBJECT: &str = "Aod-Dlq-Subject";
/// A failed reply's `common.v1.Error`, in base64.
pub const ERROR: &str = "Aod-Error";
/// Marks a hint: nothing that a stream delivers or a server answers carries it.
pub const HINT: &str = "Aod-Hint";
/// The X25519 public key, in base64, that a request's reply is to be sealed to.
pub const REPLY_KEY: &str = "Aod-Reply-Key";
/// Marks a sealed reply.
pub const SEALED: &str = "Aod-Sealed";
