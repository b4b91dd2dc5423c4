//! Jobs that could not be handled, kept for an operator.

use async_nats::{
    HeaderMap,
    jetstream::stream::{RawMessageErrorKind, Stream},
};
use contract::{header, topology::DLQ};
use types::Timestamp;

use crate::{Bus, RpcError};

/// A job that was given up.
#[derive(Clone, Debug)]
pub struct DeadLetter {
    /// What it was: its subject in the work queue.
    pub subject: String,
    pub reason: String,
    pub dead_lettered_at: Timestamp,
}

impl Bus {
    /// The newest dead letters, the newest first.
    ///
    /// # Errors
    /// When the stream does not answer.
    pub async fn dead_letters(&self, limit: usize) -> Result<Vec<DeadLetter>, RpcError> {
        let stream: Stream =
            self.jetstream.get_stream(DLQ.name).await.map_err(RpcError::internal)?;
        let state = &stream.cached_info().state;
        let (mut sequence, mut letters) = (state.last_sequence, Vec::new());
        while sequence >= state.first_sequence.max(1) && letters.len() < limit {
            match stream.get_raw_message(sequence).await {
                Ok(message) => {
                    let text = |headers: &HeaderMap, name| {
                        headers.get(name).map(|value| value.as_str().to_owned()).unwrap_or_default()
                    };
                    letters.push(DeadLetter {
                        subject: text(&message.headers, header::DLQ_SUBJECT),
                        reason: text(&message.headers, header::DLQ_REASON),
                        dead_lettered_at: Timestamp::from_unix_micros(
                            i64::try_from(message.time.unix_timestamp_nanos() / 1000)
                                .unwrap_or_default(),
                        ),
                    });
                }
                // Deleted in between.
                Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => {}
                Err(error) => return Err(RpcError::internal(error)),
            }
            sequence -= 1;
        }
        Ok(letters)
    }
}
