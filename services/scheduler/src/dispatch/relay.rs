//! Publishes the outbox. Woken after each commit of this replica; commits of other replicas are
//! noticed by [`crate::due`].
//!
//! Each lane of the outbox, which is a stream, is emptied by itself. Within a lane, what is
//! acknowledged leaves without waiting for the slowest, and what fails is due again later, behind
//! what is due now.

use std::{collections::BTreeMap, time::Duration};

use bus::{log::AppendError, trace};
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use store::outbox::Row;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, field};
use types::Backoff;
use uuid::Uuid;

use crate::Scheduler;

const BATCH: i64 = 256;
/// How long a batch waits for its slowest acknowledgements. What is published after all is dropped
/// by the stream as a duplicate.
const BATCH_WAIT: Duration = Duration::from_secs(1);
/// The longest that a batch may take with its statements.
const BATCH_MAX: Duration = Duration::from_secs(15);
const RETRY: Backoff =
    Backoff { base: Duration::from_millis(50), max: Duration::from_secs(5), attempts: u32::MAX };
/// Streams are made again within seconds: a message that has had none for so long is for one that
/// is not meant to be.
const STREAM_MISSING_MAX: Duration = Duration::from_secs(60 * 60);

pub fn due() -> String {
    format!("exists ({})", store::outbox::DUE_LANES)
}

pub async fn run(scheduler: Scheduler, stop: CancellationToken) {
    let mut relay =
        Relay { scheduler: &scheduler, lanes: FuturesUnordered::new(), busy: BTreeMap::new() };
    let mut failures = 0;
    loop {
        // A last pass after the stop, so that nothing waits for another replica.
        let last = stop.is_cancelled();
        let mut retry_after = None;
        match due_lanes(&scheduler).await {
            Ok(due) => {
                failures = 0;
                relay.begin(due);
            }
            Err(error) => {
                failures += 1;
                retry_after = Some(RETRY.jittered(failures));
                tracing::warn!("{:#}", error.context("outbox cannot be read; will retry"));
            }
        }
        if last {
            while relay.lanes.next().await.is_some() {}
            return;
        }
        tokio::select! {
            () = stop.cancelled() => {}
            () = scheduler.due.outbox.notified() => {}
            () = elapsed(retry_after) => {}
            () = relay.lane_to_look_at() => {}
        }
    }
}

async fn elapsed(wait: Option<Duration>) {
    match wait {
        Some(wait) => tokio::time::sleep(wait).await,
        None => std::future::pending().await,
    }
}

/// The lanes that are being emptied.
struct Relay<'a> {
    scheduler: &'a Scheduler,
    lanes: FuturesUnordered<BoxFuture<'a, (String, bool)>>,
    /// Whether each was found due once more meanwhile.
    busy: BTreeMap<String, bool>,
}

impl Relay<'_> {
    fn begin(&mut self, due: Vec<String>) {
        for lane in due {
            match self.busy.get_mut(&lane) {
                Some(again) => *again = true,
                None => {
                    self.busy.insert(lane.clone(), false);
                    self.lanes.push(empty(self.scheduler, lane).boxed());
                }
            }
        }
    }

    /// Returns when a lane is done that may have become due again. (One whose messages another
    /// replica has taken is due all the while.)
    async fn lane_to_look_at(&mut self) {
        while let Some((lane, took_some)) = self.lanes.next().await {
            let again = self.busy.remove(&lane).unwrap_or_default();
            if again || took_some {
                return;
            }
        }
        std::future::pending().await
    }
}

async fn due_lanes(scheduler: &Scheduler) -> anyhow::Result<Vec<String>> {
    // Nothing can leave: waiting is no failed attempt.
    if !scheduler.bus.is_connected() {
        return Ok(Vec::new());
    }
    Ok(tokio::time::timeout(BATCH_MAX, store::outbox::due_lanes(&scheduler.pool)).await??)
}

/// Publishes what is due in a lane; returns the lane, and whether there was anything.
async fn empty(scheduler: &Scheduler, lane: String) -> (String, bool) {
    let mut took_some = false;
    loop {
        match tokio::time::timeout(BATCH_MAX, publish_batch(scheduler, &lane)).await {
            Ok(Ok(count)) => {
                took_some |= count > 0;
                if count < BATCH as usize {
                    return (lane, took_some);
                }
            }
            Ok(Err(error)) => {
                tracing::warn!(
                    "{:#}",
                    error.context(format!("outbox lane {lane} is not published; will retry"))
                );
                return (lane, false);
            }
            Err(_) => {
                tracing::warn!(lane, "publishing a batch of the outbox took too long; will retry");
                return (lane, false);
            }
        }
    }
}

/// Publishes a batch, its messages in flight together; returns how many it took.
async fn publish_batch(scheduler: &Scheduler, lane: &str) -> anyhow::Result<usize> {
    let mut tx = scheduler.pool.begin().await?;
    let rows = store::outbox::take(&mut tx, lane, BATCH).await?;
    if rows.is_empty() {
        return Ok(0);
    }
    let count = rows.len();
    let mut waiting: BTreeMap<Uuid, u32> = rows.iter().map(|row| (row.id, row.attempts)).collect();
    let mut in_flight: FuturesUnordered<_> =
        rows.into_iter().map(|row| publish(scheduler, row)).collect();
    let (mut published, mut postponed, mut dead) =
        (Vec::with_capacity(count), Vec::new(), Vec::new());
    let wait = tokio::time::sleep(BATCH_WAIT);
    tokio::pin!(wait);
    loop {
        let (id, fate) = tokio::select! {
            done = in_flight.next() => match done { Some(done) => done, None => break },
            () = &mut wait => break,
        };
        let attempts = waiting.remove(&id).unwrap_or_default();
        match fate {
            Fate::Published => published.push(id),
            Fate::Failed => postponed.push((id, RETRY.jittered(attempts + 1))),
            Fate::Dead(reason) => dead.push((id, reason)),
        }
    }
    if !waiting.is_empty() {
        tracing::warn!(
            lane,
            messages = waiting.len(),
            "messages were not acknowledged in time; will retry"
        );
    }
    postponed.extend(waiting.into_iter().map(|(id, attempts)| (id, RETRY.jittered(attempts + 1))));
    store::outbox::delete(&mut tx, &published).await?;
    if !postponed.is_empty() {
        store::outbox::postpone(&mut tx, &postponed).await?;
    }
    if !dead.is_empty() {
        store::outbox::set_aside(&mut tx, &dead).await?;
    }
    tx.commit().await?;
    Ok(count)
}

/// The result of publishing a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Published,
    Failed,
    Dead(&'static str),
}

fn fate(appended: &Result<u64, AppendError>, age: Duration) -> Fate {
    match appended {
        Ok(_) => Fate::Published,
        Err(error) if error.is_too_large() => Fate::Dead("larger than a message may be"),
        Err(error) if error.has_no_stream() && age > STREAM_MISSING_MAX => {
            Fate::Dead("no stream has its subject")
        }
        Err(_) => Fate::Failed,
    }
}

async fn publish(scheduler: &Scheduler, row: Row) -> (Uuid, Fate) {
    let span = tracing::info_span!("publish", otel.kind = "producer", trace_id = field::Empty);
    trace::follow(&span, row.traceparent.as_deref());
    let id = row.id.to_string();
    let appended = scheduler
        .bus
        .publish(row.subject.clone(), row.payload.into(), &id)
        .instrument(span.clone())
        .await;
    let fate = fate(&appended, row.age);
    if let Err(error) = appended {
        let _entered = span.entered();
        match fate {
            Fate::Dead(reason) => {
                tracing::error!(%error, subject = row.subject, outbox_id = %row.id, reason, "message set aside")
            }
            _ => {
                tracing::warn!(%error, subject = row.subject, attempts = row.attempts, "message not published; will retry")
            }
        }
    }
    (row.id, fate)
}
