//! Serving requests, as a NATS micro-service: `nats micro ls` and `nats micro stats` show it.

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use async_nats::{
    HeaderMap, PublishError,
    service::{Service, ServiceExt as _, error::Error as ServiceError},
};
use contract::{header, rpc::Rpc};
use futures::StreamExt as _;
use prost::Message as _;
use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument as _, field};
use types::{ErrorCode, limits::MESSAGE_BYTES_MAX};

use crate::{Bus, Failure, client::unix_millis, trace};

/// Requests of one subject in hand at a time; more are refused rather than queued.
const CONCURRENCY: usize = 512;
const SETTLE_MAX: Duration = Duration::from_secs(5);

/// A service's endpoints. Each request runs in its own task, ends by its caller's deadline, and is always answered.
///
/// `S` is what the handlers work with: each gets a clone of it.
pub struct Responder<S> {
    state: S,
    /// Its endpoints live as long as it does: their tasks hold it.
    service: Arc<Service>,
    client: async_nats::Client,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl<S: Clone + Send + Sync + 'static> Responder<S> {
    /// # Errors
    /// When the connection is closed for good.
    pub async fn start(bus: &Bus, name: &str, state: S, tasks: TaskTracker, stop: CancellationToken) -> Result<Self, Failure> {
        let service = bus.client.service_builder().queue_group(name).start(name, "1.0.0").await.map_err(Failure::internal)?;
        Ok(Self { state, service: Arc::new(service), client: bus.client.clone(), tasks, stop })
    }

    /// Serves one kind of request until the stop.
    ///
    /// # Errors
    /// When the subject cannot be subscribed to.
    pub async fn serve<R, H, F>(&self, handler: H) -> Result<(), Failure>
    where
        R: Rpc,
        H: Fn(S, R::Request) -> F + Send + Sync + 'static,
        F: Future<Output = Result<R::Reply, Failure>> + Send + 'static,
    {
        let mut endpoint =
            self.service.endpoint_builder().name(endpoint_name(R::SUBJECT)).add(R::SUBJECT).await.map_err(Failure::internal)?;
        // The server knows of it before anybody is told that we are ready.
        settle(&self.client).await?;
        let (handler, permits) = (Arc::new(handler), Arc::new(Semaphore::new(CONCURRENCY)));
        let (state, service, tasks, stop) = (self.state.clone(), self.service.clone(), self.tasks.clone(), self.stop.clone());
        self.tasks.spawn(async move {
            let mut stopping = false;
            loop {
                let request = tokio::select! {
                    // No more are delivered from here on; those that were are served before the loop ends.
                    () = stop.cancelled(), if !stopping => {
                        stopping = true;
                        if endpoint.stop().await.is_err() {
                            break;
                        }
                        continue;
                    }
                    request = endpoint.next() => match request { Some(request) => request, None => break },
                };
                if is_delivery(&request.message) {
                    tracing::warn!(subject = R::SUBJECT, "a stream's message came as a request; not served");
                    continue;
                }
                let Ok(permit) = permits.clone().try_acquire_owned() else {
                    answer(&request, R::SUBJECT, Err::<R::Reply, _>(Failure::new(ErrorCode::Unavailable, "The service is overloaded")))
                        .await;
                    continue;
                };
                let (state, handler) = (state.clone(), handler.clone());
                tasks.spawn(async move {
                    let headers = request.message.headers.as_ref();
                    let text = |name| headers.and_then(|headers: &HeaderMap| headers.get(name)).map(|value| value.as_str().to_owned());
                    let span = tracing::info_span!(
                        "serve",
                        otel.kind = "server",
                        subject = R::SUBJECT,
                        trace_id = field::Empty,
                        code = field::Empty
                    );
                    trace::follow(&span, text(header::TRACEPARENT).as_deref());
                    let left =
                        time_left(text(header::TIMEOUT).as_deref(), text(header::DEADLINE).as_deref(), unix_millis(SystemTime::now()));
                    let work = async {
                        let message = R::Request::decode(request.message.payload.clone())
                            .map_err(|error| Failure::invalid(format!("Malformed request: {error}")))?;
                        handler(state, message).await
                    };
                    let started = Instant::now();
                    let result = tokio::time::timeout(left, work.instrument(span.clone()))
                        .await
                        .unwrap_or_else(|_| Err(Failure::new(ErrorCode::DeadlineExceeded, "The service ran out of time")));
                    span.record("code", observe(R::SUBJECT, started.elapsed(), result.as_ref().err()));
                    answer(&request, R::SUBJECT, result).await;
                    drop(permit);
                });
            }
            // Requests that were accepted still get their answers: the tracker waits for them.
            drop(service);
        });
        Ok(())
    }
}

/// Whether a stream sent this, and nobody asked: whoever may make consumers can have a stream's messages delivered to any subject, also
/// to one that they may not publish to.
fn is_delivery(message: &async_nats::Message) -> bool {
    message.reply.as_ref().is_none_or(|reply| reply.starts_with("$JS."))
}

/// Returns when the server has taken note of everything that was sent before: a message to ourselves comes back behind it. (A flush
/// ends when the bytes have left.)
async fn settle(client: &async_nats::Client) -> Result<(), Failure> {
    let inbox = client.new_inbox();
    let mut echo = client.subscribe(inbox.clone()).await.map_err(Failure::internal)?;
    client.publish(inbox, bytes::Bytes::new()).await.map_err(Failure::internal)?;
    match tokio::time::timeout(SETTLE_MAX, echo.next()).await {
        Ok(Some(_)) => Ok(()),
        _ => Err(Failure::unavailable("The message bus")),
    }
}

async fn answer<M: prost::Message>(request: &async_nats::service::Request, subject: &str, result: Result<M, Failure>) {
    let sent = match result {
        // Larger than a message: told at once, for the caller would wait for nothing.
        Ok(reply) if reply.encoded_len() > MESSAGE_BYTES_MAX => {
            refuse(request, &Failure::internal(format!("an answer of {} bytes to {subject}", reply.encoded_len()))).await
        }
        Ok(reply) => request.respond(Ok(reply.encode_to_vec().into())).await,
        Err(failure) => refuse(request, &failure).await,
    };
    if let Err(error) = sent {
        tracing::warn!(%error, subject, "answer not sent");
    }
}

async fn refuse(request: &async_nats::service::Request, failure: &Failure) -> Result<(), PublishError> {
    let mut headers = HeaderMap::new();
    headers.insert(header::ERROR, failure.to_header());
    let error = ServiceError { status: failure.code.as_str().to_owned(), code: 1 + failure.code as usize };
    request.respond_with_headers(Err(error), headers).await
}

/// Counts a request that was served; gives its code.
fn observe(subject: &'static str, elapsed: Duration, failure: Option<&Failure>) -> &'static str {
    let code = failure.map_or("ok", |failure| failure.code.as_str());
    metrics::counter!("aod_bus_requests_total", "subject" => subject, "code" => code).increment(1);
    metrics::histogram!("aod_bus_request_seconds", "subject" => subject).record(elapsed);
    code
}

/// The longest that a request may take, also where its caller does not say.
const TIMEOUT_MAX: Duration = Duration::from_secs(60);

/// How long the caller still waits: as it says, or by the clock where it is of the release before. `now` in milliseconds since the epoch.
fn time_left(timeout: Option<&str>, deadline: Option<&str>, now: u128) -> Duration {
    let number = |text: Option<&str>| text.and_then(|text| text.parse::<u128>().ok());
    let left = number(timeout).or_else(|| number(deadline).map(|deadline| deadline.saturating_sub(now)));
    left.map_or(TIMEOUT_MAX, |left| Duration::from_millis(u64::try_from(left).unwrap_or(u64::MAX)).min(TIMEOUT_MAX))
}

/// `aod.rpc.auth.v1.key.verify` → `key-verify`: names of endpoints hold no dots.
fn endpoint_name(subject: &str) -> String {
    subject.split('.').skip(4).collect::<Vec<_>>().join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_does_not_depend_on_clocks_and_a_deadline_alone_does() {
        let ms = Duration::from_millis;
        assert_eq!(time_left(Some("3000"), Some("1"), 1_000_000), ms(3000), "the caller's clock is far behind");
        assert_eq!(time_left(None, Some("5000"), 4000), ms(1000));
        assert_eq!(time_left(None, Some("5000"), 6000), ms(0));
        assert_eq!(time_left(None, None, 0), TIMEOUT_MAX);
        assert_eq!(time_left(Some("99999999"), None, 0), TIMEOUT_MAX);
        assert_eq!(time_left(Some("x"), Some("y"), 0), TIMEOUT_MAX);
    }
}
