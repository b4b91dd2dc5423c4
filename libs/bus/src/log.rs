//! Durable streams: appending with an expected sequence, publishing with a message id, reading the
//! newest entry, following.

use std::time::Duration;

use async_nats::jetstream::{
    self,
    consumer::{DeliverPolicy, pull::OrderedConfig},
    context::PublishErrorKind,
    message::PublishMessage,
    stream::{LastRawMessageErrorKind, RawMessageErrorKind},
};
use bytes::Bytes;
use futures::{Stream, StreamExt as _};

use crate::{
    Bus,
    client::{reconnected, trace_headers},
};

/// An acknowledgement takes milliseconds; one that takes longer is most likely lost.
const ACK_WAIT: Duration = Duration::from_secs(5);

/// An append that failed, or whose result is not known.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// Another writer appended to the subject since: the writer's view is stale.
    #[error("another writer appended first")]
    Superseded,
    /// Not acknowledged; it may be in the stream nevertheless.
    #[error("the append was not acknowledged")]
    Unacknowledged(#[source] jetstream::context::PublishError),
}

impl AppendError {
    /// Whether the message is larger than the server takes: it will never be in a stream.
    #[must_use]
    pub fn is_too_large(&self) -> bool {
        self.kind() == Some(PublishErrorKind::MaxPayloadExceeded)
    }

    /// Whether no stream has the subject.
    #[must_use]
    pub fn has_no_stream(&self) -> bool {
        self.kind() == Some(PublishErrorKind::StreamNotFound)
    }

    fn kind(&self) -> Option<PublishErrorKind> {
        match self {
            Self::Superseded => None,
            Self::Unacknowledged(error) => Some(error.kind()),
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the stream cannot be read")]
pub struct ReadError(#[source] Box<dyn std::error::Error + Send + Sync>);

/// An entry of a stream.
#[derive(Clone, Debug)]
pub struct Entry {
    pub sequence: u64,
    pub subject: String,
    pub payload: Bytes,
    /// The sequence that the writer expected to be the subject's last (0: none), if it named one. A
    /// follower sees by it what it has missed.
    pub follows: Option<u64>,
    /// Whether no service wrote it: the server itself answers requests to any reply subject, also
    /// to that of a log. What services write has headers.
    pub is_foreign: bool,
}

impl Bus {
    /// Appends to a log with one writer, and waits for the stream's acknowledgement: succeeds only
    /// while `expected` is the subject's last sequence (0: it has none). Returns the new sequence.
    ///
    /// The server checks the expectation first, so that a repeated append fails as superseded if
    /// the first one was stored: compare the newest entry ([`Self::last`]).
    ///
    /// # Errors
    /// [`AppendError`].
    pub async fn append(
        &self,
        subject: String,
        payload: Bytes,
        expected: u64,
    ) -> Result<u64, AppendError> {
        self.send(subject, message(payload).expected_last_subject_sequence(expected)).await
    }

    /// Publishes a message to its stream, and waits for the acknowledgement. Returns its sequence.
    /// Within the stream's deduplication window a message id makes it idempotent.
    ///
    /// # Errors
    /// [`AppendError::Unacknowledged`].
    pub async fn publish(
        &self,
        subject: String,
        payload: Bytes,
        message_id: &str,
    ) -> Result<u64, AppendError> {
        self.send(subject, message(payload).message_id(message_id)).await
    }

    async fn send(&self, subject: String, message: PublishMessage) -> Result<u64, AppendError> {
        let mut connections = self.next_connection();
        let ack = self
            .jetstream
            .send_publish(subject, message)
            .await
            .map_err(AppendError::Unacknowledged)?;
        let ack = tokio::select! {
            ack = ack => ack,
            // Sent on a lost connection: its acknowledgement does not arrive on another one.
            () = reconnected(&mut connections) => Err(PublishErrorKind::BrokenPipe.into()),
            () = tokio::time::sleep(ACK_WAIT) => Err(PublishErrorKind::TimedOut.into()),
        };
        match ack {
            Ok(ack) => Ok(ack.sequence),
            Err(error) if error.kind() == PublishErrorKind::WrongLastSequence => {
                Err(AppendError::Superseded)
            }
            Err(error) => Err(AppendError::Unacknowledged(error)),
        }
    }

    /// The newest entry of a subject.
    ///
    /// # Errors
    /// [`ReadError`] when the stream does not answer.
    pub async fn last(
        &self,
        stream: &'static str,
        subject: &str,
    ) -> Result<Option<Entry>, ReadError> {
        let stream = self
            .jetstream
            .get_stream_no_info(stream)
            .await
            .map_err(|error| ReadError(error.into()))?;
        match stream.get_last_raw_message_by_subject(subject).await {
            Ok(message) => Ok(Some(Entry {
                sequence: message.sequence,
                subject: message.subject.to_string(),
                follows: follows(&message.headers),
                is_foreign: message.headers.is_empty(),
                payload: message.payload,
            })),
            Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(None),
            Err(error) => Err(ReadError(error.into())),
        }
    }

    /// Removes every entry of a subject. Sequences are not used again.
    ///
    /// # Errors
    /// [`ReadError`] when the stream does not answer.
    pub async fn purge(&self, stream: &'static str, subject: &str) -> Result<(), ReadError> {
        let stream = self
            .jetstream
            .get_stream_no_info(stream)
            .await
            .map_err(|error| ReadError(error.into()))?;
        stream.purge().filter(subject).await.map_err(|error| ReadError(error.into()))?;
        Ok(())
    }

    /// Removes one entry. The subject's last sequence is then that of the previous entry. Succeeds
    /// if it is already gone.
    ///
    /// # Errors
    /// [`ReadError`] when the stream does not answer.
    pub async fn remove(&self, stream: &'static str, sequence: u64) -> Result<(), ReadError> {
        let stream = self
            .jetstream
            .get_stream_no_info(stream)
            .await
            .map_err(|error| ReadError(error.into()))?;
        match stream.delete_message(sequence).await {
            Ok(_) => Ok(()),
            Err(error) => match stream.get_raw_message(sequence).await {
                Err(missing) if missing.kind() == RawMessageErrorKind::NoMessageFound => Ok(()),
                _ => Err(ReadError(error.into())),
            },
        }
    }

    /// Removes every entry up to a sequence.
    ///
    /// # Errors
    /// [`ReadError`] when the stream does not answer.
    pub async fn trim(&self, stream: &'static str, through: u64) -> Result<(), ReadError> {
        let stream = self
            .jetstream
            .get_stream_no_info(stream)
            .await
            .map_err(|error| ReadError(error.into()))?;
        stream.purge().sequence(through + 1).await.map_err(|error| ReadError(error.into()))?;
        Ok(())
    }

    /// Follows one subject from a sequence on, in order. Messages that are trimmed before they are
    /// delivered are left out; [`Entry::follows`] shows that.
    ///
    /// # Errors
    /// [`ReadError`] when the stream does not answer. Errors within the stream of entries are
    /// final: follow again from the last entry. A lost connection is such an error: the server may
    /// have dropped the consumer, and finding that out takes half a minute.
    pub async fn follow(
        &self,
        stream: &'static str,
        subject: String,
        from_sequence: u64,
    ) -> Result<impl Stream<Item = Result<Entry, ReadError>> + Send + Unpin + use<>, ReadError>
    {
        // Named, so that permissions can restrict on which stream a consumer is created.
        let name = self.client.new_inbox().rsplit('.').next().unwrap_or_default().to_owned();
        let config = OrderedConfig {
            name: Some(name),
            filter_subject: subject,
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: from_sequence.max(1) },
            ..OrderedConfig::default()
        };
        let connections = self.next_connection();
        let stream = self
            .jetstream
            .get_stream_no_info(stream)
            .await
            .map_err(|error| ReadError(error.into()))?;
        let consumer =
            stream.create_consumer(config).await.map_err(|error| ReadError(error.into()))?;
        let messages = consumer.messages().await.map_err(|error| ReadError(error.into()))?;
        let entries = messages.map(|message| {
            let message = message.map_err(|error| ReadError(error.into()))?;
            let sequence = message.info().map_err(ReadError)?.stream_sequence;
            let follows = message.headers.as_ref().and_then(follows);
            let is_foreign = message.headers.as_ref().is_none_or(async_nats::HeaderMap::is_empty);
            Ok(Entry {
                sequence,
                subject: message.subject.to_string(),
                payload: message.payload.clone(),
                follows,
                is_foreign,
            })
        });
        let until_reconnected = futures::stream::unfold(
            (entries, Some(connections)),
            |(mut entries, connections)| async move {
                let mut connections = connections?;
                tokio::select! {
                    biased;
                    entry = entries.next() => entry.map(|entry| (entry, (entries, Some(connections)))),
                    () = reconnected(&mut connections) => Some((Err(ReadError("the connection was lost".into())), (entries, None))),
                }
            },
        );
        Ok(until_reconnected.boxed())
    }
}

fn message(payload: Bytes) -> PublishMessage {
    PublishMessage::build().payload(payload).headers(trace_headers())
}

fn follows(headers: &async_nats::HeaderMap) -> Option<u64> {
    headers.get(async_nats::header::NATS_EXPECTED_LAST_SUBJECT_SEQUENCE)?.as_str().parse().ok()
}
