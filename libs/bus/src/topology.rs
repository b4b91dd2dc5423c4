//! Creates streams and consumers as the contract declares them, and reports differences.

use std::time::SystemTime;

use async_nats::jetstream::{
    ErrorCode,
    consumer::{AckPolicy, PullConsumer, pull},
    context::{GetStreamError, GetStreamErrorKind},
    stream::{Config, DiscardPolicy, Republish, RetentionPolicy, StorageType, Stream},
};
use contract::topology::{CONSUMERS_MAX, ConsumerSpec, Retention, StreamSpec};

use crate::Bus;

#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    #[error("stream {name} cannot be made or changed")]
    Stream { name: &'static str, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("stream {name} does not exist")]
    StreamNotFound { name: &'static str },
    #[error("consumer {name} cannot be made or read")]
    Consumer { name: &'static str, source: Box<dyn std::error::Error + Send + Sync> },
    /// The server accepted a setting and then did not keep it.
    #[error("{name} differs from what was declared: {what}")]
    Drift { name: &'static str, what: String },
}

/// The state of a stream.
#[derive(Clone, Copy, Debug)]
pub struct StreamInfo {
    /// When it was created; tells it apart from an earlier or later stream of the same name.
    pub created_at: SystemTime,
    pub messages: u64,
    pub first_sequence: u64,
    /// Sequence of the newest message that it has had.
    pub last_sequence: u64,
    pub bytes: u64,
    pub bytes_max: u64,
    /// Sequence of the newest message that was removed from its beginning; 0 if none was.
    pub trimmed_through: u64,
}

/// Numbers of messages of a consumer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backlog {
    /// Not delivered yet.
    pub waiting: u64,
    /// Delivered and not acknowledged.
    pub in_flight: u64,
}

impl Bus {
    /// Creates or updates a stream, which only the user `streams` may.
    ///
    /// # Errors
    /// [`TopologyError`]: also when the server kept another configuration than the one it was
    /// given.
    pub async fn ensure_stream(
        &self,
        spec: &StreamSpec,
        replicas: usize,
    ) -> Result<(), TopologyError> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| TopologyError::Stream {
            name: spec.name,
            source,
        };
        let existing = self.jetstream.get_stream(spec.name).await.ok();
        let first_sequence =
            existing.as_ref().and_then(|stream| stream.cached_info().config.first_sequence);
        let mut config = Config {
            name: spec.name.to_owned(),
            subjects: spec.subjects.iter().map(ToString::to_string).collect(),
            retention: match spec.retention {
                Retention::Limits => RetentionPolicy::Limits,
                Retention::WorkQueue => RetentionPolicy::WorkQueue,
            },
            max_age: spec.max_age,
            max_bytes: spec.max_bytes,
            discard: if spec.refuse_when_full { DiscardPolicy::New } else { DiscardPolicy::Old },
            duplicate_window: spec.duplicate_window,
            storage: StorageType::File,
            num_replicas: replicas,
            max_message_size: -1,
            max_messages: -1,
            max_messages_per_subject: -1,
            max_consumers: CONSUMERS_MAX,
            republish: spec.republish.map(|republish| Republish {
                source: republish.from.to_owned(),
                destination: republish.to.to_owned(),
                headers_only: false,
            }),
            first_sequence,
            ..Config::default()
        };
        if let Err(error) = self.jetstream.create_or_update_stream(config.clone()).await {
            // Servers before 2.15 do not change this limit of a stream that exists; there, its -1
            // means no limit.
            let unlimited =
                existing.filter(|stream| stream.cached_info().config.max_consumers == -1);
            config.max_consumers = unlimited.map(|_| -1).ok_or_else(|| failed(error.into()))?;
            self.jetstream
                .create_or_update_stream(config.clone())
                .await
                .map_err(|error| failed(error.into()))?;
        }
        let kept = self
            .jetstream
            .get_stream(spec.name)
            .await
            .map_err(|error| failed(error.into()))?
            .cached_info()
            .config
            .clone();
        let same = kept.subjects == config.subjects
            && kept.retention == config.retention
            && kept.max_age == config.max_age
            && kept.max_bytes == config.max_bytes
            && kept.discard == config.discard
            && kept.max_consumers == config.max_consumers
            && kept.republish == config.republish
            && kept.duplicate_window == config.duplicate_window;
        if same {
            Ok(())
        } else {
            Err(TopologyError::Drift { name: spec.name, what: format!("{kept:?}") })
        }
    }

    /// Returns the state of a stream; `None` if it does not exist.
    ///
    /// # Errors
    /// [`TopologyError`] when the server does not answer.
    pub async fn find_stream(
        &self,
        spec: &StreamSpec,
    ) -> Result<Option<StreamInfo>, TopologyError> {
        match self.stream_info(spec).await {
            Ok(info) => Ok(Some(info)),
            Err(TopologyError::StreamNotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns the state of a stream.
    ///
    /// # Errors
    /// [`TopologyError`] when the server does not answer or the stream does not exist.
    pub async fn stream_info(&self, spec: &StreamSpec) -> Result<StreamInfo, TopologyError> {
        let stream =
            self.jetstream.get_stream(spec.name).await.map_err(|error| {
                match is_not_found(&error) {
                    true => TopologyError::StreamNotFound { name: spec.name },
                    false => TopologyError::Stream { name: spec.name, source: error.into() },
                }
            })?;
        let info = stream.cached_info();
        let begun = info.config.first_sequence.unwrap_or(1).max(1);
        Ok(StreamInfo {
            created_at: SystemTime::from(info.created),
            first_sequence: info.state.first_sequence,
            last_sequence: info.state.last_sequence,
            messages: info.state.messages,
            bytes: info.state.bytes,
            bytes_max: u64::try_from(info.config.max_bytes).unwrap_or(u64::MAX),
            trimmed_through: if info.state.first_sequence > begun {
                info.state.first_sequence - 1
            } else {
                0
            },
        })
    }

    /// Creates or updates a durable pull consumer.
    ///
    /// # Errors
    /// [`TopologyError`].
    pub async fn ensure_consumer(&self, spec: &ConsumerSpec) -> Result<(), TopologyError> {
        let stream = self.stream_of(spec).await?;
        let config = pull::Config {
            durable_name: Some(spec.name.to_owned()),
            filter_subjects: spec.filters.iter().map(ToString::to_string).collect(),
            ack_policy: AckPolicy::Explicit,
            ack_wait: spec.ack_wait,
            // No limit: at a limit the server keeps a job and never delivers it again. The
            // scheduler limits attempts.
            max_deliver: -1,
            max_ack_pending: spec.max_ack_pending,
            ..pull::Config::default()
        };
        let consumer = stream
            .create_consumer(config.clone())
            .await
            .map_err(|error| consumer_failed(spec, error.into()))?;
        let kept = &consumer.cached_info().config;
        let filters = if kept.filter_subjects.is_empty() {
            vec![kept.filter_subject.clone()]
        } else {
            kept.filter_subjects.clone()
        };
        if filters == config.filter_subjects
            && kept.ack_wait == config.ack_wait
            && kept.max_ack_pending == config.max_ack_pending
        {
            Ok(())
        } else {
            Err(TopologyError::Drift { name: spec.name, what: format!("{kept:?}") })
        }
    }

    /// Returns how many messages wait for a consumer, and how many are in flight.
    ///
    /// # Errors
    /// [`TopologyError`] when the server does not answer.
    pub async fn backlog(&self, spec: &ConsumerSpec) -> Result<Backlog, TopologyError> {
        let consumer = self.consumer(spec).await?;
        let info = consumer.cached_info();
        Ok(Backlog {
            waiting: info.num_pending,
            in_flight: u64::try_from(info.num_ack_pending).unwrap_or_default(),
        })
    }

    /// The stream of a consumer.
    async fn stream_of(&self, spec: &ConsumerSpec) -> Result<Stream<()>, TopologyError> {
        let stream = self.jetstream.get_stream_no_info(spec.stream).await;
        stream.map_err(|error| consumer_failed(spec, error.into()))
    }

    /// A consumer that another service creates.
    pub(crate) async fn consumer(
        &self,
        spec: &ConsumerSpec,
    ) -> Result<PullConsumer, TopologyError> {
        let stream = self.stream_of(spec).await?;
        stream.get_consumer(spec.name).await.map_err(|source| consumer_failed(spec, source))
    }
}

fn consumer_failed(
    spec: &ConsumerSpec,
    source: Box<dyn std::error::Error + Send + Sync>,
) -> TopologyError {
    TopologyError::Consumer { name: spec.name, source }
}

fn is_not_found(error: &GetStreamError) -> bool {
    matches!(error.kind(), GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND)
}
