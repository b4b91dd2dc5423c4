//! Serves requests: one queue subscription per subject, shared with the other replicas of the
//! service.

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use async_nats::{Client, HeaderMap, Message, PublishError, Subscriber};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use contract::{access, header, rpc::Rpc};
use futures::{FutureExt as _, StreamExt as _};
use prost::Message as _;
use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument as _, field};
use types::{ErrorCode, limits::MESSAGE_BYTES_MAX};

use crate::{Bus, RpcError, client::unix_millis, trace};

/// Requests of one subject in flight at a time; more are refused rather than queued.
const CONCURRENCY: usize = 512;
const SETTLE_MAX: Duration = Duration::from_secs(5);
/// More digits than a server parses: it treats the limit as zero and ends the subscription at once,
/// while the client continues to deliver what is on the wire. A plain unsubscribe, and the client's
/// own drain, drop that.
const NOW: u64 = u64::MAX;

/// A service's endpoints. Each request runs in its own task, ends by its caller's deadline, and is
/// always answered.
///
/// `S` is the state of the handlers: each call gets a clone.
pub struct Responder<S> {
    state: S,
    /// The queue group of the service's replicas.
    group: String,
    client: Client,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl<S: Clone + Send + Sync + 'static> Responder<S> {
    #[must_use]
    pub fn new(
        bus: &Bus,
        group: &str,
        state: S,
        tasks: TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        Self { state, group: group.to_owned(), client: bus.client.clone(), tasks, stop }
    }

    /// Serves one kind of request until the stop. Requests that the server has routed here by then
    /// are still served.
    ///
    /// # Errors
    /// When the subject cannot be subscribed to.
    pub async fn serve<R, H, F>(&self, handler: H) -> Result<(), RpcError>
    where
        R: Rpc,
        H: Fn(S, R::Request) -> F + Send + Sync + 'static,
        F: Future<Output = Result<R::Reply, RpcError>> + Send + 'static,
    {
        let requests = self
            .client
            .queue_subscribe(R::SUBJECT, self.group.clone())
            .await
            .map_err(RpcError::internal)?;
        // The server must know the subscription before this service reports that it is ready.
        settle(&self.client).await?;
        let endpoint = Arc::new(Endpoint {
            client: self.client.clone(),
            inboxes: access::callers(R::SUBJECT)
                .map(|user| format!("{}.", access::inbox(user)))
                .collect(),
            permits: Arc::new(Semaphore::new(CONCURRENCY)),
            tasks: self.tasks.clone(),
        });
        let accept = {
            let (endpoint, state, handler) =
                (endpoint.clone(), self.state.clone(), Arc::new(handler));
            move |request| endpoint.accept::<R, S, H, F>(request, state.clone(), handler.clone())
        };
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            receive(requests, &endpoint.client, stop, accept).await;
            // The last replies must be sent before the process exits.
            let _ = endpoint.permits.acquire_many(CONCURRENCY as u32).await;
            let _ = settle(&endpoint.client).await;
        });
        Ok(())
    }
}

/// Delivers requests until the stop, then those that are still on the wire.
async fn receive(
    mut requests: Subscriber,
    client: &Client,
    stop: CancellationToken,
    accept: impl Fn(Message),
) {
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            request = requests.next() => match request { Some(request) => accept(request), None => return },
        }
    }
    if requests.unsubscribe_after(NOW).await.is_err() {
        return;
    }
    let mut settled = std::pin::pin!(settle(client));
    loop {
        tokio::select! {
            _ = &mut settled => break,
            request = requests.next() => match request { Some(request) => accept(request), None => return },
        }
    }
    // Delivered before the server confirmed, and not yet taken.
    while let Some(Some(request)) = requests.next().now_or_never() {
        accept(request);
    }
}

/// What the requests of one subject share.
struct Endpoint {
    client: Client,
    /// Prefixes of the inboxes of users that may send the request.
    inboxes: Vec<String>,
    permits: Arc<Semaphore>,
    tasks: TaskTracker,
}

impl Endpoint {
    /// Serves a request in a task of its own.
    fn accept<R, S, H, F>(self: &Arc<Self>, request: Message, state: S, handler: Arc<H>)
    where
        R: Rpc,
        S: Send + 'static,
        H: Fn(S, R::Request) -> F + Send + Sync + 'static,
        F: Future<Output = Result<R::Reply, RpcError>> + Send + 'static,
    {
        if !self.may_answer(request.reply.as_deref()) {
            // A user who may create consumers can have messages of a stream delivered to any
            // subject, and any request can name any reply.
            tracing::warn!(
                subject = R::SUBJECT,
                reply = request.reply.as_deref(),
                "request refused: its reply subject is no caller's inbox"
            );
            metrics::counter!("aod_bus_requests_refused_total", "subject" => R::SUBJECT)
                .increment(1);
            return;
        }
        let (endpoint, permit) = (self.clone(), self.permits.clone().try_acquire_owned());
        self.tasks.spawn(async move {
            let result = match &permit {
                Ok(_) => serve_one::<R, S, H, F>(&request, state, &*handler).await,
                Err(_) => Err(RpcError::new(ErrorCode::Unavailable, "The service is overloaded")),
            };
            if let Err(error) = endpoint.answer(request, R::SUBJECT, result).await {
                tracing::warn!(%error, subject = R::SUBJECT, "answer not sent");
            }
            drop(permit);
        });
    }

    fn may_answer(&self, reply: Option<&str>) -> bool {
        reply.is_some_and(|reply| self.inboxes.iter().any(|inbox| reply.starts_with(inbox)))
    }

    async fn answer<M: prost::Message>(
        &self,
        request: Message,
        subject: &str,
        result: Result<M, RpcError>,
    ) -> Result<(), PublishError> {
        let Some(reply) = request.reply else { return Ok(()) };
        let mut headers = HeaderMap::new();
        let payload = result.and_then(|message| {
            let payload =
                match request.headers.as_ref().and_then(|headers| headers.get(header::REPLY_KEY)) {
                    None => message.encode_to_vec(),
                    Some(key) => {
                        headers.insert(header::SEALED, "1");
                        seal(key.as_str(), &message.encode_to_vec(), subject)?
                    }
                };
            // Refused at once, so that the caller does not wait in vain.
            match payload.len() {
                bytes if bytes > MESSAGE_BYTES_MAX => {
                    Err(RpcError::internal(format!("an answer of {bytes} bytes to {subject}")))
                }
                _ => Ok(payload),
            }
        });
        let payload = payload.unwrap_or_else(|failure| {
            headers = HeaderMap::new();
            headers.insert(header::ERROR, failure.to_header());
            Vec::new()
        });
        self.client.publish_with_headers(reply, headers, Bytes::from(payload)).await
    }
}

/// Seals a reply to the key that its caller named.
fn seal(key: &str, message: &[u8], subject: &str) -> Result<Vec<u8>, RpcError> {
    let key = STANDARD.decode(key).map_err(|_| RpcError::invalid("Malformed reply key"))?;
    sealing::seal(&key, message, subject.as_bytes())
        .map_err(|error| RpcError::invalid(format!("The reply cannot be sealed: {error}")))
}

async fn serve_one<R, S, H, F>(
    request: &Message,
    state: S,
    handler: &H,
) -> Result<R::Reply, RpcError>
where
    R: Rpc,
    H: Fn(S, R::Request) -> F,
    F: Future<Output = Result<R::Reply, RpcError>>,
{
    let text = |name| {
        request
            .headers
            .as_ref()
            .and_then(|headers| headers.get(name))
            .map(|value| value.as_str().to_owned())
    };
    let span = tracing::info_span!(
        "serve",
        otel.kind = "server",
        subject = R::SUBJECT,
        trace_id = field::Empty,
        code = field::Empty
    );
    trace::follow(&span, text(header::TRACEPARENT).as_deref());
    let left = time_left(
        text(header::TIMEOUT).as_deref(),
        text(header::DEADLINE).as_deref(),
        unix_millis(SystemTime::now()),
    );
    let work = async {
        let message = R::Request::decode(request.payload.clone())
            .map_err(|error| RpcError::invalid(format!("Malformed request: {error}")))?;
        handler(state, message).await
    };
    let started = Instant::now();
    let result =
        tokio::time::timeout(left, work.instrument(span.clone())).await.unwrap_or_else(|_| {
            Err(RpcError::new(ErrorCode::DeadlineExceeded, "The service ran out of time"))
        });
    span.record("code", observe(R::SUBJECT, started.elapsed(), result.as_ref().err()));
    result
}

/// Returns when the server has processed everything that was sent before: a message to ourselves
/// comes back behind it. (A flush ends when the bytes have left.)
async fn settle(client: &Client) -> Result<(), RpcError> {
    let inbox = client.new_inbox();
    let mut echo = client.subscribe(inbox.clone()).await.map_err(RpcError::internal)?;
    client.publish(inbox, Bytes::new()).await.map_err(RpcError::internal)?;
    match tokio::time::timeout(SETTLE_MAX, echo.next()).await {
        Ok(Some(_)) => Ok(()),
        _ => Err(RpcError::unavailable("The message bus")),
    }
}

/// Counts a served request and returns its code.
fn observe(subject: &'static str, elapsed: Duration, failure: Option<&RpcError>) -> &'static str {
    let code = failure.map_or("ok", |failure| failure.code.as_str());
    metrics::counter!("aod_bus_requests_total", "subject" => subject, "code" => code).increment(1);
    metrics::histogram!("aod_bus_request_seconds", "subject" => subject).record(elapsed);
    code
}

/// The longest that a request may take, also where its caller does not say.
const TIMEOUT_MAX: Duration = Duration::from_secs(60);

/// How long the caller still waits: as its header says, or by the clock if it is of the previous
/// release. `now` in milliseconds since the epoch.
fn time_left(timeout: Option<&str>, deadline: Option<&str>, now: u128) -> Duration {
    let number = |text: Option<&str>| text.and_then(|text| text.parse::<u128>().ok());
    let left =
        number(timeout).or_else(|| number(deadline).map(|deadline| deadline.saturating_sub(now)));
    left.map_or(TIMEOUT_MAX, |left| {
        Duration::from_millis(u64::try_from(left).unwrap_or(u64::MAX)).min(TIMEOUT_MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_does_not_depend_on_clocks_and_a_deadline_alone_does() {
        let ms = Duration::from_millis;
        assert_eq!(
            time_left(Some("3000"), Some("1"), 1_000_000),
            ms(3000),
            "the caller's clock is far behind"
        );
        assert_eq!(time_left(None, Some("5000"), 4000), ms(1000));
        assert_eq!(time_left(None, Some("5000"), 6000), ms(0));
        assert_eq!(time_left(None, None, 0), TIMEOUT_MAX);
        assert_eq!(time_left(Some("99999999"), None, 0), TIMEOUT_MAX);
        assert_eq!(time_left(Some("x"), Some("y"), 0), TIMEOUT_MAX);
    }
}
