//! The streams, made at the start, trimmed when they grow, and made again when they are lost: JetStream may be lost whole.
//!
//! What Postgres holds is enough to go on. A stream of events that is made anew begins above every id that anybody may have seen, and
//! the jobs that were lost with their stream are queued again: they are harmless twice.

use std::time::Duration;

use bus::Failure;
use contract::{runner::RunTurn, subject, topology};
use sqlx::Row as _;
use tokio_util::sync::CancellationToken;
use types::{Partition, SessionId, SpriteName};
use uuid::Uuid;

use crate::{EVENTS_BYTES_MIN, Scheduler, recorder, sessions::enqueue, termination::destroy_job, unsigned};

const EVERY: Duration = Duration::from_secs(1);

/// Makes the streams and consumers as they are declared.
///
/// # Errors
/// When the server refuses, or kept something else.
pub async fn ensure(scheduler: &Scheduler) -> anyhow::Result<()> {
    recorder::begin_partitions(scheduler).await?;
    let partitions = recorder::partitions(scheduler).await?;
    let share = scheduler.events_max_bytes / i64::try_from(partitions.len().max(1))?;
    for mut stream in topology::streams(partitions) {
        let mut first = 1;
        if let Some(partition) = topology::partition_of(stream.name) {
            stream.max_bytes = share.max(EVENTS_BYTES_MIN);
            first = recorder::first_sequence(&scheduler.pool, partition).await?;
        }
        scheduler.bus.ensure_stream(&stream, first, scheduler.stream_replicas).await?;
    }
    for consumer in &topology::CONSUMERS {
        scheduler.bus.ensure_consumer(consumer).await?;
    }
    Ok(())
}

pub async fn run(scheduler: Scheduler, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let Ok(partitions) = recorder::partitions(&scheduler).await else { continue };
        let streams: Vec<_> = topology::streams(partitions.iter().copied()).collect();
        match scheduler.bus.missing_streams(&streams).await {
            Ok(missing) if missing.is_empty() => {
                for partition in partitions {
                    if let Err(error) = trim(&scheduler, partition).await {
                        tracing::debug!("{:#}", error.context("events are not trimmed now"));
                    }
                }
            }
            Ok(missing) => {
                tracing::error!(?missing, "streams are lost; making them anew");
                metrics::counter!("aod_streams_lost_total").increment(missing.len() as u64);
                if let Err(error) = restore(&scheduler, &missing).await {
                    tracing::warn!("{:#}", error.context("streams are not made yet; trying again"));
                }
            }
            // Nobody answers: that is no loss.
            Err(_) => {}
        }
    }
}

/// Makes room in the stream of events before it is full: of what is recorded, the older half goes.
async fn trim(scheduler: &Scheduler, partition: Partition) -> anyhow::Result<()> {
    let stream = topology::events(partition);
    let extent = scheduler.bus.extent(stream).await?;
    if extent.bytes <= extent.bytes_max / 2 {
        return Ok(());
    }
    let middle = extent.first_sequence.midpoint(extent.last_sequence);
    let through = middle.min(recorder::recorded_through(&scheduler.pool, partition).await?);
    if through >= extent.first_sequence {
        scheduler.bus.trim(stream.name, through).await?;
        metrics::counter!("aod_events_trimmed_total").increment(through + 1 - extent.first_sequence);
    }
    Ok(())
}

async fn restore(scheduler: &Scheduler, missing: &[&'static str]) -> anyhow::Result<()> {
    // Before the stream is there again: a replica that dies in between leaves it missing, and another does all of it.
    if missing.iter().any(|stream| *stream == topology::JOBS.name || topology::partition_of(stream).is_some()) {
        let queued = queue_again(scheduler).await?;
        tracing::warn!(queued, "jobs of what is under way are queued again");
    }
    ensure(scheduler).await?;
    scheduler.outbox.notify_one();
    Ok(())
}

/// Queues every turn that is not settled, and every Sprite that has to go.
async fn queue_again(scheduler: &Scheduler) -> Result<usize, Failure> {
    let mut tx = scheduler.pool.begin().await.map_err(Failure::internal)?;
    let turns = sqlx::query("select session_id, turn_number from turn where status in ('pending', 'running')")
        .fetch_all(&mut *tx)
        .await
        .map_err(Failure::internal)?;
    for row in &turns {
        let session = SessionId::from_uuid(row.try_get::<Uuid, _>(0).map_err(Failure::internal)?);
        let turn = unsigned(row.try_get(1).map_err(Failure::internal)?);
        enqueue(&mut tx, &subject::turn_run(session), &RunTurn { session_id: session.to_string(), turn }).await?;
    }
    let sprites = sqlx::query(
        "select session_id, sprite from session where status = 'terminated' and sprite_destroyed_at is null
         union all
         select session_id, sprite from deleted_session where sprite_destroyed_at is null",
    )
    .fetch_all(&mut *tx)
    .await
    .map_err(Failure::internal)?;
    for row in &sprites {
        let session = SessionId::from_uuid(row.try_get::<Uuid, _>(0).map_err(Failure::internal)?);
        let sprite: SpriteName = row.try_get::<String, _>(1).map_err(Failure::internal)?.parse().map_err(Failure::internal)?;
        destroy_job(&mut tx, session, &sprite).await?;
    }
    tx.commit().await.map_err(Failure::internal)?;
    Ok(turns.len() + sprites.len())
}
