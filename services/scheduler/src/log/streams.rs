//! The streams: created at the start, trimmed when they grow, and recreated when they are not the
//! ones that were published to.
//!
//! JetStream may be lost whole, come back without its tail, or be exchanged. Postgres knows each
//! stream's generation: when it was created, and the highest sequence seen or persisted. One
//! replica compares both every second. An EVENTS stream of another generation is deleted and
//! recreated above every id that anyone may have seen; writers then continue from what is
//! persisted. What waited in a lost queue is offered again by the reconciler.

use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use contract::topology::{self, StreamSpec};
use rules::generation::{self, Condition, Known, Seen};
use store::lease::{self, Lease};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use types::{Backoff, Partition};
use uuid::Uuid;

use crate::{EVENTS_BYTES_MIN, Scheduler, dispatch::reconciler, log::positions};

const EVERY: Duration = Duration::from_secs(1);
const LEASE: Duration = Duration::from_secs(10);
/// The longest that a pass may take.
const PASS_MAX: Duration = Duration::from_secs(30);
const LEASE_NAME: &str = "streams";
const READY_WITHIN: Duration = Duration::from_secs(60);
const RETRY: Backoff =
    Backoff { base: Duration::from_millis(100), max: Duration::from_secs(2), attempts: u32::MAX };

/// Creates what is missing before anything else starts, or waits until another replica has. A
/// cluster of NATS servers that has just started takes a while to elect its leaders.
///
/// # Errors
/// When the server refuses, kept another configuration than it was given, or does not answer for a
/// minute.
pub async fn ready(scheduler: &Scheduler) -> anyhow::Result<()> {
    let (owner, begun) = (Uuid::now_v7(), Instant::now());
    let mut attempt = 0;
    loop {
        match prepare(scheduler, owner).await {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) if begun.elapsed() > READY_WITHIN => return Err(error),
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "streams are not ready; will retry")
            }
        }
        attempt += 1;
        tokio::time::sleep(RETRY.jittered(attempt)).await;
    }
}

/// Returns whether the streams are there.
async fn prepare(scheduler: &Scheduler, owner: Uuid) -> anyhow::Result<bool> {
    if let Some(lease) = acquire(scheduler, owner).await? {
        let checked = async {
            configure(scheduler).await?;
            check(scheduler).await
        };
        let checked = checked.await;
        lease.release(&scheduler.pool).await?;
        return checked.map(|()| true);
    }
    // Another replica takes care of them. Where it died and a stream is missing, its lease expires.
    if exist(scheduler).await? {
        configure(scheduler).await?;
        return Ok(true);
    }
    Ok(false)
}

async fn exist(scheduler: &Scheduler) -> anyhow::Result<bool> {
    for spec in specs(scheduler).await? {
        if scheduler.bus.find_stream(&spec).await?.is_none() {
            return Ok(false);
        }
    }
    Ok(true)
}

async fn acquire(scheduler: &Scheduler, owner: Uuid) -> Result<Option<Lease>, sqlx::Error> {
    Ok(lease::acquire(&scheduler.pool, owner, &[LEASE_NAME.to_owned()], LEASE).await?.pop())
}

pub async fn run(scheduler: Scheduler, stop: CancellationToken) {
    let (owner, mut held): (_, Option<Lease>) = (Uuid::now_v7(), None);
    let mut ticks = service::ticks(EVERY);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let pass = async {
            held = match held.take() {
                Some(lease) => {
                    let mut connection = scheduler.pool.acquire().await?;
                    lease.extend(&mut connection, LEASE).await?.then_some(lease)
                }
                None => acquire(&scheduler, owner).await?,
            };
            if held.is_some() { check(&scheduler).await } else { Ok(()) }
        };
        match tokio::time::timeout(PASS_MAX, pass).await {
            Ok(Ok(())) => {}
            // The bus or Postgres does not answer: that is no loss.
            Ok(Err(error)) => {
                tracing::debug!(error = format!("{error:#}"), "streams cannot be checked now")
            }
            Err(_) => tracing::warn!("checking the streams took too long; will retry"),
        }
    }
    if let Some(lease) = held {
        let _ = tokio::time::timeout(EVERY, lease.release(&scheduler.pool)).await;
    }
}

/// Brings the streams that exist to their declared configuration, and creates those of partitions
/// that are new.
async fn configure(scheduler: &Scheduler) -> anyhow::Result<()> {
    let specs = specs(scheduler).await?;
    // First those that exist: they may have to give room to others.
    for spec in &specs {
        if scheduler.bus.find_stream(spec).await?.is_some() {
            scheduler.bus.ensure_stream(spec, 1, scheduler.stream_replicas).await?;
        }
    }
    for spec in &specs {
        let Some(partition) = topology::partition_of(spec.name) else { continue };
        if scheduler.bus.find_stream(spec).await?.is_none() && !is_known(scheduler, spec).await? {
            create(scheduler, spec, 1).await?;
            let info = scheduler.bus.stream_info(spec).await?;
            let seen = Seen {
                created_at: micros(info.created_at.into()),
                last_sequence: info.last_sequence,
            };
            let mut connection = scheduler.pool.acquire().await?;
            remember(&mut connection, spec, seen).await?;
        }
        // Persisted once its stream exists: no other replica takes it for lost.
        positions::begin_partition(&scheduler.pool, partition).await?;
    }
    Ok(())
}

async fn is_known(scheduler: &Scheduler, spec: &StreamSpec) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "select exists (select from stream_generation where stream = $1) or exists (select from recorded where stream = $1 and event_id > 0)",
    )
    .bind(spec.name)
    .fetch_one(&scheduler.pool)
    .await
}

/// Every stream of this deployment, with its share of the room for events.
async fn specs(scheduler: &Scheduler) -> anyhow::Result<Vec<StreamSpec>> {
    let mut partitions: BTreeSet<_> =
        positions::partitions(&scheduler.pool).await?.into_iter().collect();
    partitions.extend(Partition::all().take(scheduler.event_partitions.get().into()));
    let share = scheduler.events_max_bytes / i64::try_from(partitions.len())?;
    let sized = |mut spec: StreamSpec| {
        if topology::partition_of(spec.name).is_some() {
            spec.max_bytes = share.max(EVENTS_BYTES_MIN);
        }
        spec
    };
    Ok(topology::streams(partitions).map(sized).collect())
}

/// Compares each stream with its generation, and puts right what differs.
async fn check(scheduler: &Scheduler) -> anyhow::Result<()> {
    let generations = generations(scheduler).await?;
    for spec in specs(scheduler).await? {
        let partition = topology::partition_of(spec.name);
        let persisted = match partition {
            Some(partition) => positions::projected_through(&scheduler.pool, partition).await?,
            None => 0,
        };
        let known = generations.get(spec.name).copied();
        let info = scheduler.bus.find_stream(&spec).await?;
        let seen = info.map(|info| Seen {
            created_at: micros(info.created_at.into()),
            last_sequence: info.last_sequence,
        });
        let condition = generation::condition(known, persisted, seen);
        match (condition, seen) {
            (Condition::Intact, Some(seen)) => {
                if known.is_none_or(|known| known.high_watermark != seen.last_sequence) {
                    remember(&mut *scheduler.pool.acquire().await?, &spec, seen).await?;
                }
            }
            _ => restore(scheduler, &spec, condition, known, persisted)
                .await
                .with_context(|| format!("{} is {condition:?}", spec.name))?,
        }
        if let (Condition::Intact, Some(partition)) = (condition, partition) {
            trim(scheduler, &spec, partition).await?;
        }
    }
    for consumer in &topology::CONSUMERS {
        if scheduler.bus.backlog(consumer).await.is_err() {
            scheduler.bus.ensure_consumer(consumer).await?;
        }
    }
    Ok(())
}

/// Makes a stream the one that is published to from now on. What is known of it is written last: a
/// replica that dies before leaves the stream in question, and the next pass does all of it again.
async fn restore(
    scheduler: &Scheduler,
    spec: &StreamSpec,
    condition: Condition,
    known: Option<Known>,
    persisted: u64,
) -> anyhow::Result<()> {
    let is_log = topology::partition_of(spec.name).is_some();
    if condition != Condition::New {
        metrics::counter!("aod_streams_lost_total").increment(1);
        tracing::error!(
            stream = spec.name,
            ?condition,
            persisted,
            "stream was lost, replaced or set back"
        );
    }
    // What a queue or the lifecycle stream still holds is true; a log that differs from the
    // persisted one is not.
    if is_log && matches!(condition, Condition::Exchanged | Condition::SetBack) {
        scheduler.bus.delete_stream(spec).await?;
    }
    if is_log || matches!(condition, Condition::New | Condition::Lost) {
        create(scheduler, spec, generation::first_sequence(known, persisted)).await?;
    }
    for consumer in topology::CONSUMERS.iter().filter(|consumer| consumer.stream == spec.name) {
        scheduler.bus.ensure_consumer(consumer).await?;
    }
    let info = scheduler.bus.stream_info(spec).await?;
    let seen =
        Seen { created_at: micros(info.created_at.into()), last_sequence: info.last_sequence };
    let mut tx = scheduler.pool.begin().await?;
    if condition != Condition::New {
        reconciler::offer_all(&mut tx).await?;
    }
    remember(&mut tx, spec, seen).await?;
    tx.commit().await?;
    Ok(())
}

async fn create(
    scheduler: &Scheduler,
    spec: &StreamSpec,
    first_sequence: u64,
) -> anyhow::Result<()> {
    Ok(scheduler.bus.ensure_stream(spec, first_sequence, scheduler.stream_replicas).await?)
}

/// What is known of each stream.
async fn generations(scheduler: &Scheduler) -> Result<HashMap<String, Known>, sqlx::Error> {
    let rows: Vec<(String, OffsetDateTime, i64)> =
        sqlx::query_as("select stream, created_at, high_watermark from stream_generation")
            .fetch_all(&scheduler.pool)
            .await?;
    let known = |(stream, created_at, high_watermark): (_, _, i64)| {
        (stream, Known { created_at, high_watermark: high_watermark.unsigned_abs() })
    };
    Ok(rows.into_iter().map(known).collect())
}

async fn remember(
    connection: &mut sqlx::PgConnection,
    spec: &StreamSpec,
    seen: Seen,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into stream_generation (stream, created_at, high_watermark) values ($1, $2, $3)
         on conflict (stream) do update set created_at = $2, high_watermark = $3",
    )
    .bind(spec.name)
    .bind(seen.created_at)
    .bind(seen.last_sequence as i64)
    .execute(connection)
    .await?;
    Ok(())
}

/// As precise as Postgres keeps it.
fn micros(time: OffsetDateTime) -> OffsetDateTime {
    time.replace_microsecond(time.microsecond()).unwrap_or(time)
}

/// Makes room in a stream of events before it is full: removes the older half, as far as it is
/// persisted.
async fn trim(
    scheduler: &Scheduler,
    spec: &StreamSpec,
    partition: Partition,
) -> anyhow::Result<()> {
    let info = scheduler.bus.stream_info(spec).await?;
    if info.bytes <= info.bytes_max / 2 {
        return Ok(());
    }
    let middle = info.first_sequence.midpoint(info.last_sequence);
    let through = middle.min(positions::projected_through(&scheduler.pool, partition).await?);
    if through >= info.first_sequence {
        scheduler.bus.trim(spec.name, through).await?;
        metrics::counter!("aod_events_trimmed_total").increment(through + 1 - info.first_sequence);
    }
    Ok(())
}
