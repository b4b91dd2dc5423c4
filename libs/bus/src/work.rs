//! Work-queue consumption. The handler decides what becomes of a job; this module acknowledges it,
//! extends its ack deadline while the handler decides, and releases it.

use std::{future::Future, sync::Arc, time::Duration};

use async_nats::jetstream::{
    AckKind,
    consumer::PullConsumer,
    message::{Acker, Message},
};
use bytes::Bytes;
use contract::{header, subject, topology::ConsumerSpec};
use futures::{StreamExt as _, future::BoxFuture};
use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument as _, field};
use types::Backoff;

use crate::{Bus, RpcError, topology::TopologyError, trace};

/// How long one pull waits at the server.
const PULL_EXPIRES: Duration = Duration::from_secs(5);
/// How long a released job is not delivered: until this process' own pull is withdrawn, so that the
/// job does not come straight back.
pub const HAND_BACK: Duration = Duration::from_millis(30);
const RECONNECT: Backoff =
    Backoff { base: Duration::from_millis(100), max: Duration::from_secs(2), attempts: u32::MAX };

/// A job as it was delivered.
#[derive(Clone, Debug)]
pub struct Job {
    pub subject: String,
    pub payload: Bytes,
    /// 1 the first time.
    pub delivery: u64,
}

/// What becomes of a job.
pub enum Outcome {
    Done,
    /// Acknowledge it, then run the work: the queue has done its part, and something else keeps the
    /// work alive.
    Accepted(BoxFuture<'static, ()>),
    /// Release it: deliver it again, to any worker, after this long.
    Retry(Duration),
    /// It can never be handled: dead-letter it with the reason.
    Reject(String),
}

/// Handles jobs until `stop`, at most `concurrency` at a time, each in its own task.
///
/// Progress acks extend the ack deadline of a job while its handler runs. After `stop` no new job
/// is begun and what was fetched is released; handlers are expected to watch the same token and to
/// return [`Outcome::Retry`] soon. Returns when every handler has returned.
pub async fn run<H, F>(
    bus: Bus,
    spec: &'static ConsumerSpec,
    concurrency: usize,
    stop: CancellationToken,
    handler: H,
) where
    H: Fn(Job) -> F + Send + Sync + 'static,
    F: Future<Output = Outcome> + Send + 'static,
{
    let (handler, tasks, permits) =
        (Arc::new(handler), TaskTracker::new(), Arc::new(Semaphore::new(concurrency)));
    let mut failures = 0;
    while !stop.is_cancelled() {
        let pulled = async {
            let consumer = bus.consumer(spec).await?;
            pull_jobs(&bus, &consumer, spec, &permits, &tasks, &stop, &handler).await
        };
        if let Err(error) = pulled.await {
            failures += 1;
            tracing::warn!(error = %Chain(&error), consumer = spec.name, "failed to pull jobs; will retry");
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(RECONNECT.jittered(failures)) => {}
            }
        }
    }
    tasks.close();
    tasks.wait().await;
}

async fn pull_jobs<H, F>(
    bus: &Bus,
    consumer: &PullConsumer,
    spec: &'static ConsumerSpec,
    permits: &Arc<Semaphore>,
    tasks: &TaskTracker,
    stop: &CancellationToken,
    handler: &Arc<H>,
) -> Result<(), TopologyError>
where
    H: Fn(Job) -> F + Send + Sync + 'static,
    F: Future<Output = Outcome> + Send + 'static,
{
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| TopologyError::Consumer {
        name: spec.name,
        source,
    };
    while !stop.is_cancelled() {
        // Pulls only with a free slot, and never more jobs than there are free slots.
        tokio::select! {
            () = stop.cancelled() => break,
            permit = permits.acquire() => drop(permit),
        }
        let free_slots = permits.available_permits().clamp(1, 64);
        let mut batch = consumer
            .batch()
            .max_messages(free_slots)
            .expires(PULL_EXPIRES)
            .messages()
            .await
            .map_err(|error| failed(error.into()))?;
        loop {
            let message = tokio::select! {
                // Unsubscribed by the drop: what is released goes to others at once.
                () = stop.cancelled() => return Ok(()),
                message = batch.next() => match message {
                    Some(message) => message.map_err(failed)?,
                    None => break,
                },
            };
            let Ok(permit) = permits.clone().try_acquire_owned() else {
                let _ = message.ack_with(AckKind::Nak(Some(HAND_BACK))).await;
                continue;
            };
            let (bus, handler) = (bus.clone(), handler.clone());
            tasks.spawn(async move {
                handle(&bus, spec, message, &*handler).await;
                drop(permit);
            });
        }
    }
    Ok(())
}

async fn handle<H, F>(bus: &Bus, spec: &ConsumerSpec, message: Message, handler: &H)
where
    H: Fn(Job) -> F + Send + Sync,
    F: Future<Output = Outcome> + Send,
{
    let delivery = message.info().map_or(1, |info| u64::try_from(info.delivered).unwrap_or(1));
    let parent = message
        .headers
        .as_ref()
        .and_then(|headers| headers.get(header::TRACEPARENT))
        .map(|value| value.as_str().to_owned());
    let span = tracing::info_span!(
        "job",
        otel.kind = "consumer",
        consumer = spec.name,
        delivery,
        trace_id = field::Empty
    );
    trace::follow(&span, parent.as_deref());
    let (message, acker) = message.split();
    let job = Job { subject: message.subject.to_string(), payload: message.payload, delivery };
    if delivery > 1 {
        metrics::counter!("aod_jobs_redelivered_total", "consumer" => spec.name).increment(1);
    }
    let outcome =
        keep_in_flight(&acker, spec.ack_wait / 3, handler(job.clone()).instrument(span)).await;
    let settled = match outcome {
        Outcome::Done => acker.double_ack().await,
        Outcome::Accepted(work) => {
            if let Err(error) = acker.double_ack().await {
                tracing::debug!(%error, subject = job.subject, "acknowledgement not sent; the job will be delivered again and ignored");
            }
            work.await;
            return;
        }
        Outcome::Retry(delay) => acker.ack_with(AckKind::Nak(Some(delay))).await,
        Outcome::Reject(reason) => {
            tracing::error!(subject = job.subject, reason, "job rejected");
            match bus.dead_letter(&job, &reason).await {
                Ok(()) => acker.ack_with(AckKind::Term).await,
                // Not dead-lettered, so not acknowledged: it is delivered again.
                Err(_) => acker.ack_with(AckKind::Nak(Some(Duration::from_secs(5)))).await,
            }
        }
    };
    if let Err(error) = settled {
        tracing::warn!(%error, subject = job.subject, "failed to acknowledge a job; it will be redelivered");
    }
}

/// Runs the work, and extends its ack deadline meanwhile.
async fn keep_in_flight<F: Future>(acker: &Acker, every: Duration, work: F) -> F::Output {
    let mut work = std::pin::pin!(work);
    let mut ticks = tokio::time::interval(every);
    ticks.tick().await;
    loop {
        tokio::select! {
            outcome = &mut work => return outcome,
            _ = ticks.tick() => if let Err(error) = acker.ack_with(AckKind::Progress).await {
                tracing::debug!(%error, "progress not sent");
            },
        }
    }
}

impl Bus {
    async fn dead_letter(&self, job: &Job, reason: &str) -> Result<(), RpcError> {
        let owner = job.subject.split('.').nth(2).unwrap_or("unknown").to_owned();
        let mut headers = async_nats::HeaderMap::new();
        headers.insert(header::DLQ_SUBJECT, job.subject.as_str());
        headers.insert(header::DLQ_REASON, reason.replace(['\r', '\n'], " "));
        let ack = self
            .jetstream
            .publish_with_headers(subject::dead_letter(&owner), headers, job.payload.clone())
            .await;
        ack.map_err(RpcError::internal)?.await.map_err(RpcError::internal)?;
        Ok(())
    }
}

/// An error with all its causes, in one line.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}
