//! The outbox's relay: what a transaction promised, published. Woken after each commit of this replica; a timer covers the others.

use std::time::Duration;

use bus::trace;
use futures::{StreamExt as _, stream::FuturesUnordered};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, field};
use types::Backoff;

use crate::Scheduler;

const BATCH: i64 = 256;
const POLL: Duration = Duration::from_millis(500);
const RETRY: Backoff = Backoff { base: Duration::from_millis(50), max: Duration::from_secs(2), attempts: u32::MAX };

pub async fn run(scheduler: Scheduler, stop: CancellationToken) {
    let mut failures = 0;
    loop {
        let stopping = stop.is_cancelled();
        match publish_batch(&scheduler).await {
            Ok(published) => {
                failures = 0;
                if published == BATCH as usize {
                    continue;
                }
                // A last pass after the stop, so that nothing waits for another replica.
                if stopping {
                    return;
                }
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = scheduler.outbox.notified() => {}
                    () = tokio::time::sleep(POLL) => {}
                }
            }
            Err(error) => {
                failures += 1;
                tracing::warn!(%error, "outbox not published; trying again");
                if stop.run_until_cancelled(tokio::time::sleep(RETRY.jittered(failures))).await.is_none() {
                    return;
                }
            }
        }
    }
}

/// Publishes what is due, several messages in flight; gives how many rows there were. What was not acknowledged stays.
async fn publish_batch(scheduler: &Scheduler) -> anyhow::Result<usize> {
    let mut tx = scheduler.pool.begin().await?;
    let rows = store::outbox::take(&mut tx, BATCH).await?;
    if rows.is_empty() {
        return Ok(0);
    }
    let count = rows.len();
    let mut in_flight = FuturesUnordered::new();
    for row in rows {
        let bus = scheduler.bus.clone();
        let span = tracing::info_span!("publish", otel.kind = "producer", trace_id = field::Empty);
        trace::follow(&span, row.traceparent.as_deref());
        let publish = async move {
            let appended = bus.append(row.subject.clone(), row.payload.into(), &row.id.to_string(), None).await;
            (row.id, row.subject, appended)
        };
        in_flight.push(publish.instrument(span));
    }
    let mut published = Vec::with_capacity(count);
    let mut failed = None;
    while let Some((id, subject, appended)) = in_flight.next().await {
        match appended {
            Ok(_) => published.push(id),
            Err(error) => failed = Some(anyhow::Error::from(error).context(subject)),
        }
    }
    store::outbox::delete(&mut tx, &published).await?;
    tx.commit().await?;
    match failed {
        Some(error) => Err(error),
        None => Ok(count),
    }
}
