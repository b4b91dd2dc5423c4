//! The connection to NATS, and typed requests.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use async_nats::{Client, ConnectOptions, HeaderMap, Message, RequestErrorKind, jetstream};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use contract::{
    access::{self, Access},
    header,
    rpc::Rpc,
};
use prost::Message as _;
use sealing::KeyPair;
use secrecy::{ExposeSecret as _, SecretString};
use settings::Env;
use tokio::sync::watch;
use tracing::Instrument as _;
use types::{ErrorCode, limits::MESSAGE_BYTES_MAX};

use crate::{RpcError, trace};

/// Older servers silently ignore stream and consumer settings that they do not know.
const SERVER_VERSION_MIN: (u64, u64) = (2, 12);

/// How to reach the bus, and as whom.
#[derive(Clone, Debug)]
pub struct Config {
    /// `nats://host:port`, several separated by commas.
    pub url: String,
    /// One of [`access::ALL`].
    pub user: &'static str,
    pub password: SecretString,
    /// Certificates (PEM) of the server's certificate authority. With them, or with `tls://`, the
    /// connection must be encrypted.
    pub ca_file: Option<PathBuf>,
    /// Shown by the server's monitoring: `<service>/<instance>`.
    pub name: String,
}

impl Config {
    /// The settings of a service, as a user of the bus.
    pub fn from_env(env: &mut Env, access: &Access) -> Self {
        Self {
            ca_file: env
                .optional("NATS_CA_FILE", "certificate authority of a NATS server with TLS, as PEM")
                .map(PathBuf::from),
            url: env.parsed(
                "NATS_URL",
                "URLs of NATS servers, separated by commas; tls:// for TLS",
                "nats://127.0.0.1:4222".to_owned(),
            ),
            user: access.user,
            password: env.secret("NATS_PASSWORD", "NATS password of this service"),
            name: format!("{}/{}", access.user, std::process::id()),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("cannot connect to NATS at {url}: {source}")]
    Connect { url: String, source: async_nats::ConnectError },
    #[error("the NATS server is version {found}; 2.12 or later is needed")]
    ServerTooOld { found: String },
    #[error("the operating system provides no randomness")]
    NoRandomness,
    #[error(
        "the NATS server takes messages of {found} bytes; {MESSAGE_BYTES_MAX} are needed (max_payload)"
    )]
    PayloadTooSmall { found: usize },
}

/// A connection to the bus. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Bus {
    pub(crate) client: Client,
    pub(crate) jetstream: jetstream::Context,
    /// Number of connections so far: requests that were sent on an earlier one get no answer.
    pub(crate) connections: watch::Receiver<u64>,
    /// How often a subscription of this connection was too slow, so that messages were dropped.
    pub(crate) drops: watch::Receiver<u64>,
    /// What replies are sealed to, where others could read them.
    reply_key: Option<Arc<KeyPair>>,
}

impl Bus {
    /// Connects as a service. If the connection is lost later, it reconnects in the background, for
    /// as long as it takes.
    ///
    /// # Errors
    /// [`ConnectError`] when no server answers, or its version or configuration is not supported.
    pub async fn connect(config: &Config) -> Result<Self, ConnectError> {
        describe_metrics();
        let (counter, connections) = watch::channel(0_u64);
        let (dropped, drops) = watch::channel(0_u64);
        let servers: Vec<String> = config.url.split(',').map(|url| url.trim().to_owned()).collect();
        let mut options = ConnectOptions::with_user_and_password(
            config.user.to_owned(),
            config.password.expose_secret().to_owned(),
        )
        .name(&config.name)
        .custom_inbox_prefix(access::inbox(config.user))
        .connection_timeout(Duration::from_secs(5))
        .ping_interval(Duration::from_secs(10))
        .subscription_capacity(16 * 1024)
        .event_callback(move |event| {
            if event == async_nats::Event::Connected {
                // The first is the one that is waited for here.
                counter.send_if_modified(|connections| {
                    *connections += 1;
                    *connections > 1
                });
            }
            if matches!(event, async_nats::Event::SlowConsumer(_)) {
                dropped.send_modify(|drops| *drops += 1);
            }
            async move {
                match event {
                    async_nats::Event::Connected => tracing::info!("bus connected"),
                    other => {
                        metrics::counter!("aod_bus_connection_events_total").increment(1);
                        tracing::warn!(event = %other, "bus connection");
                    }
                }
            }
        })
        .reconnect_delay_callback(|attempt| Duration::from_millis((50 * attempt.min(40)) as u64));
        if let Some(ca_file) = &config.ca_file {
            options = options.add_root_certificates(ca_file.clone()).require_tls(true);
        }
        let client = options
            .connect(servers)
            .await
            .map_err(|source| ConnectError::Connect { url: config.url.clone(), source })?;
        let info = client.server_info();
        if !version_suffices(&info.version) {
            return Err(ConnectError::ServerTooOld { found: info.version });
        }
        if info.max_payload < MESSAGE_BYTES_MAX {
            return Err(ConnectError::PayloadTooSmall { found: info.max_payload });
        }
        let sealed = access::SEALED_REPLIES.contains(&config.user);
        let reply_key = sealed
            .then(|| KeyPair::generate().map(Arc::new))
            .transpose()
            .map_err(|_| ConnectError::NoRandomness)?;
        let mut jetstream = jetstream::new(client.clone());
        jetstream.set_timeout(Duration::from_secs(5));
        Ok(Self { client, jetstream, connections, drops, reply_key })
    }

    /// Whether the connection is up right now.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.client.connection_state() == async_nats::connection::State::Connected
    }

    /// Later connections than the current one.
    pub(crate) fn next_connection(&self) -> watch::Receiver<u64> {
        let mut connections = self.connections.clone();
        connections.mark_unchanged();
        connections
    }

    /// Sends a request and waits for its answer, at most `deadline`. A retry-safe request is sent
    /// once more if there was no responder, or no reply within a third of the time: a service may
    /// be restarting, or may have died with the request.
    ///
    /// # Errors
    /// The failure of the other side; `Unavailable` when no one serves the subject,
    /// `DeadlineExceeded` when no reply came.
    pub async fn call<R: Rpc>(
        &self,
        request: &R::Request,
        deadline: Duration,
    ) -> Result<R::Reply, RpcError> {
        let call = async {
            if !R::RETRY_SAFE {
                return self.call_once::<R>(request, deadline).await;
            }
            let until = Instant::now() + deadline;
            match self.call_once::<R>(request, deadline / 3).await {
                Err(failure) if failure.code == ErrorCode::Unavailable => {
                    tokio::time::sleep(Duration::from_millis(100).min(deadline / 4)).await;
                }
                Err(failure) if failure.code == ErrorCode::DeadlineExceeded => {}
                answer => return answer,
            }
            self.call_once::<R>(request, until.saturating_duration_since(Instant::now())).await
        };
        call.instrument(tracing::info_span!("call", otel.kind = "client", subject = R::SUBJECT))
            .await
    }

    async fn call_once<R: Rpc>(
        &self,
        request: &R::Request,
        deadline: Duration,
    ) -> Result<R::Reply, RpcError> {
        let mut headers = trace_headers();
        headers.insert(header::TIMEOUT, deadline.as_millis().to_string());
        headers.insert(header::DEADLINE, unix_millis(SystemTime::now() + deadline).to_string());
        if let Some(key) = &self.reply_key {
            headers.insert(header::REPLY_KEY, STANDARD.encode(key.public()));
        }
        let message = async_nats::Request::new()
            .payload(request.encode_to_vec().into())
            .headers(headers)
            .timeout(Some(deadline));
        let mut connections = self.next_connection();
        let reply = tokio::select! {
            reply = self.client.send_request(R::SUBJECT, message) => reply,
            // Its answer does not come on another connection than the one it was asked on.
            () = reconnected(&mut connections) => return Err(RpcError::unavailable("The message bus")),
        };
        let reply = reply.map_err(|error| match error.kind() {
            RequestErrorKind::NoResponders => RpcError::unavailable(owner(R::SUBJECT)),
            RequestErrorKind::TimedOut => RpcError::new(
                ErrorCode::DeadlineExceeded,
                format!("{} did not answer in time", owner(R::SUBJECT)),
            ),
            RequestErrorKind::MaxPayloadExceeded => {
                RpcError::internal(format!("{}: {error}", R::SUBJECT))
            }
            _ => {
                tracing::warn!(%error, subject = R::SUBJECT, "request not sent");
                RpcError::unavailable("The message bus")
            }
        })?;
        if let Some(error) = reply.headers.as_ref().and_then(|headers| headers.get(header::ERROR)) {
            return Err(RpcError::from_header(error.as_str())
                .unwrap_or_else(|| RpcError::internal("an error header that cannot be read")));
        }
        let payload = self.unseal(R::SUBJECT, &reply)?;
        R::Reply::decode(payload).map_err(RpcError::internal)
    }

    /// Returns the message of a reply. Services of the previous release do not seal replies.
    fn unseal(&self, subject: &str, reply: &Message) -> Result<Bytes, RpcError> {
        match (&self.reply_key, is_marked(reply, header::SEALED)) {
            (_, false) => Ok(reply.payload.clone()),
            (Some(key), true) => key
                .open(&reply.payload, subject.as_bytes())
                .map(|message| Bytes::copy_from_slice(&message))
                .map_err(RpcError::internal),
            (None, true) => Err(RpcError::internal("a sealed reply that was not asked for")),
        }
    }

    /// Publishes a hint: at most once, to current subscribers.
    pub async fn hint(&self, subject: String) {
        self.publish_hint(subject, Bytes::new()).await;
    }

    /// Publishes a message as a hint: at most once, to current subscribers.
    pub async fn publish_hint(&self, subject: String, message: Bytes) {
        let mut headers = HeaderMap::new();
        headers.insert(header::HINT, "1");
        if let Err(error) = self.client.publish_with_headers(subject, headers, message).await {
            tracing::debug!(%error, "hint not sent");
        }
    }

    /// Whether anyone may be subscribed to a subject: false only if the server said that no one is.
    /// Those who follow hints there do not see this.
    pub async fn may_be_followed(&self, subject: String, limit: Duration) -> bool {
        let question = async_nats::Request::new().timeout(Some(limit));
        let answer = self.client.send_request(subject, question).await;
        !answer.is_err_and(|error| error.kind() == RequestErrorKind::NoResponders)
    }

    /// Subscribes to hints on a subject.
    ///
    /// # Errors
    /// When the connection is closed for good.
    pub async fn hints(
        &self,
        subject: String,
    ) -> Result<impl futures::Stream<Item = ()> + Unpin + use<>, RpcError> {
        use futures::StreamExt as _;
        Ok(self.hint_messages(subject).await?.map(|_| ()))
    }

    /// Subscribes to messages that [`Self::publish_hint`] sends.
    ///
    /// # Errors
    /// When the connection is closed for good.
    pub async fn hint_messages(
        &self,
        subject: String,
    ) -> Result<impl futures::Stream<Item = Bytes> + Unpin + use<>, RpcError> {
        use futures::StreamExt as _;
        let subscription = self.client.subscribe(subject).await.map_err(RpcError::internal)?;
        Ok(subscription
            .filter(|message| std::future::ready(is_hint(message)))
            .map(|message| message.payload))
    }

    /// Sends everything that is buffered, so that an exit loses nothing. Waits for `limit` at most.
    pub async fn flush(&self, limit: Duration) {
        let _ = tokio::time::timeout(limit, self.client.flush()).await;
    }
}

/// Whether a service sent this message as a hint. A user who may read a stream can have the server
/// send other messages to the same subject: a stream's messages, which have a reply subject,
/// heartbeats, which have a status, and answers, which have no headers.
fn is_hint(message: &Message) -> bool {
    message.reply.is_none() && message.status.is_none() && is_marked(message, header::HINT)
}

fn is_marked(message: &Message, header: &str) -> bool {
    message
        .headers
        .as_ref()
        .and_then(|headers| headers.get(header))
        .is_some_and(|value| value.as_str() == "1")
}

/// Describes the metrics of this crate.
fn describe_metrics() {
    metrics::describe_counter!("aod_bus_requests_total", "requests served, by subject and code");
    metrics::describe_counter!(
        "aod_bus_requests_refused_total",
        "requests whose reply subject is no caller's inbox, by subject"
    );
    metrics::describe_histogram!(
        "aod_bus_request_seconds",
        metrics::Unit::Seconds,
        "requests served, by subject"
    );
    metrics::describe_counter!(
        "aod_bus_connection_events_total",
        "lost connections to NATS, and other connection events"
    );
    metrics::describe_counter!(
        "aod_jobs_redelivered_total",
        "jobs that were delivered more than once"
    );
}

/// Returns when there is a new connection: requests that were sent on the current one get no
/// answer.
pub(crate) async fn reconnected(connections: &mut watch::Receiver<u64>) {
    if connections.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

pub(crate) fn trace_headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    if let Some(traceparent) = trace::traceparent() {
        headers.insert(header::TRACEPARENT, traceparent);
    }
    headers
}

pub(crate) fn unix_millis(time: SystemTime) -> u128 {
    time.duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_millis())
}

/// The name of the service that serves a subject.
fn owner(subject: &str) -> &str {
    subject.split('.').nth(2).unwrap_or("service")
}

fn version_suffices(version: &str) -> bool {
    let mut parts = version.split('.').map(|part| part.parse::<u64>().ok());
    matches!((parts.next(), parts.next()), (Some(Some(major)), Some(Some(minor))) if (major, minor) >= SERVER_VERSION_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_servers_are_refused() {
        assert!(
            version_suffices("2.12.0")
                && version_suffices("2.15.1")
                && version_suffices("3.0.0-RC.1")
        );
        assert!(
            !version_suffices("2.9.10") && !version_suffices("1.99.0") && !version_suffices("dev")
        );
    }
}
