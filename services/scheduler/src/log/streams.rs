//! The streams: waited for at the start, trimmed when they grow, and emptied when they are not the
//! ones that were published to. `aod deploy streams` creates them, as a user of its own.
//!
//! JetStream may be lost whole, come back without its tail, or be exchanged. Postgres knows each
//! stream's generation: when it was created, and the highest sequence seen or persisted. One
//! replica compares both every second. An EVENTS stream of another generation is purged, and
//! continues above every id that anyone may have seen; writers then continue from what is
//! persisted. What waited in a lost queue is offered again by the reconciler.

use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use bus::topology::StreamInfo;
use contract::topology::{self, StreamSpec};
use rules::generation::{self, Condition, Known, Seen};
use store::lease::{self, Lease};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use types::{Backoff, Partition};
use uuid::Uuid;

use crate::{Scheduler, dispatch::reconciler, log::positions};

const EVERY: Duration = Duration::from_secs(1);
const LEASE: Duration = Duration::from_secs(10);
/// How often the lease is extended.
const EXTEND_EVERY: Duration = Duration::from_secs(3);
/// The longest that a pass may take.
const PASS_MAX: Duration = Duration::from_secs(30);
const LEASE_NAME: &str = "streams";
const READY_WITHIN: Duration = Duration::from_secs(60);
const RETRY: Backoff =
    Backoff { base: Duration::from_millis(100), max: Duration::from_secs(2), attempts: u32::MAX };

/// Waits until the streams are there, before anything else starts. A cluster of NATS servers that
/// has just started takes a while to elect its leaders.
///
/// # Errors
/// When a stream is missing for a minute, or the server does not answer for so long.
pub async fn ready(scheduler: &Scheduler) -> anyhow::Result<()> {
    let (owner, begun) = (Uuid::now_v7(), Instant::now());
    let mut attempt = 0;
    while let Err(error) = prepare(scheduler, owner).await {
        if begun.elapsed() > READY_WITHIN {
            return Err(error);
        }
        tracing::warn!(error = format!("{error:#}"), "streams are not ready; will retry");
        attempt += 1;
        tokio::time::sleep(RETRY.jittered(attempt)).await;
    }
    Ok(())
}

async fn prepare(scheduler: &Scheduler, owner: Uuid) -> anyhow::Result<()> {
    let specs = specs(scheduler, &recorded(scheduler).await?);
    for spec in &specs {
        if scheduler.bus.find_stream(spec).await?.is_none() {
            bail!("stream {} does not exist: {}", spec.name, how_to_create(&specs));
        }
        if let Some(partition) = topology::partition_of(spec.name) {
            positions::begin_partition(&scheduler.pool, partition).await?;
        }
    }
    // Otherwise another replica takes care of them.
    if let Some(lease) = acquire(scheduler, owner).await? {
        let checked = check(scheduler).await;
        lease.release(&scheduler.pool).await?;
        checked?;
    }
    Ok(())
}

/// Sessions may have more partitions than the setting says by now.
fn how_to_create(specs: &[StreamSpec]) -> String {
    let numbers = specs.iter().filter_map(|spec| topology::partition_of(spec.name));
    let count = numbers.map(|partition| partition.number() + 1).max().unwrap_or(1);
    format!("run `aod deploy streams` with EVENT_PARTITIONS={count}")
}

async fn acquire(scheduler: &Scheduler, owner: Uuid) -> Result<Option<Lease>, sqlx::Error> {
    Ok(lease::acquire(&scheduler.pool, owner, &[LEASE_NAME.to_owned()], LEASE).await?.pop())
}

pub async fn run(scheduler: Scheduler, stop: CancellationToken) {
    let (owner, mut held): (_, Option<(Lease, Instant)>) = (Uuid::now_v7(), None);
    let mut missing = BTreeSet::new();
    let mut ticks = service::ticks(EVERY);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let pass = async {
            let asked_at = Instant::now();
            held = match held.take() {
                Some((lease, extended_at)) if extended_at.elapsed() < EXTEND_EVERY => {
                    Some((lease, extended_at))
                }
                Some((lease, _)) => {
                    let mut connection = scheduler.pool.acquire().await?;
                    let extended = lease.extend(&mut connection, LEASE).await?;
                    extended.then_some((lease, asked_at))
                }
                None => acquire(&scheduler, owner).await?.map(|lease| (lease, asked_at)),
            };
            if held.is_some() { check(&scheduler).await } else { Ok(BTreeSet::new()) }
        };
        match tokio::time::timeout(PASS_MAX, pass).await {
            Ok(Ok(found)) => {
                for stream in found.difference(&missing) {
                    let recorded = recorded(&scheduler).await;
                    let help =
                        recorded.map(|recorded| how_to_create(&specs(&scheduler, &recorded)));
                    let help = help.unwrap_or_default();
                    tracing::error!(stream, help, "stream does not exist");
                }
                missing = found;
            }
            // The bus or Postgres does not answer: that is no loss.
            Ok(Err(error)) => {
                tracing::debug!(error = format!("{error:#}"), "streams cannot be checked now")
            }
            Err(_) => tracing::warn!("checking the streams took too long; will retry"),
        }
    }
    if let Some((lease, _)) = held {
        let _ = tokio::time::timeout(EVERY, lease.release(&scheduler.pool)).await;
    }
}

/// Every stream of this deployment.
fn specs(scheduler: &Scheduler, recorded: &HashMap<String, Recorded>) -> Vec<StreamSpec> {
    let with_sessions = recorded
        .iter()
        .filter(|(_, recorded)| recorded.persisted.is_some())
        .filter_map(|(stream, _)| topology::partition_of(stream));
    let mut partitions: BTreeSet<_> = with_sessions.collect();
    partitions.extend(Partition::all().take(scheduler.event_partitions.get().into()));
    topology::streams(partitions).collect()
}

/// Compares each stream with its generation, and puts right what differs. Returns the streams that
/// do not exist.
async fn check(scheduler: &Scheduler) -> anyhow::Result<BTreeSet<&'static str>> {
    let recorded = recorded(scheduler).await?;
    let mut missing = BTreeSet::new();
    for spec in specs(scheduler, &recorded) {
        let partition = topology::partition_of(spec.name);
        let Recorded { known, persisted } = recorded.get(spec.name).copied().unwrap_or_default();
        let persisted = persisted.unwrap_or_default();
        let Some(info) = scheduler.bus.find_stream(&spec).await? else {
            missing.insert(spec.name);
            continue;
        };
        let seen = seen(&info);
        match generation::condition(known, persisted, seen) {
            Condition::Intact => {
                if known.is_none_or(|known| known.high_watermark != seen.last_sequence) {
                    remember(&mut *scheduler.pool.acquire().await?, &spec, seen).await?;
                }
                if let Some(partition) = partition {
                    trim(scheduler, &spec, &info, partition).await?;
                }
            }
            condition => {
                metrics::counter!("aod_streams_lost_total").increment(1);
                tracing::error!(
                    stream = spec.name,
                    ?condition,
                    persisted,
                    "stream was lost, replaced or set back"
                );
                restore(scheduler, &spec, known, persisted, seen)
                    .await
                    .with_context(|| format!("{} is {condition:?}", spec.name))?;
            }
        }
    }
    for consumer in topology::CONSUMERS.iter().filter(|consumer| !missing.contains(consumer.stream))
    {
        if scheduler.bus.backlog(consumer).await.is_err() {
            scheduler.bus.ensure_consumer(consumer).await?;
        }
    }
    Ok(missing)
}

/// Makes a stream the one that is published to from now on. What is known of it is written last: a
/// replica that dies before leaves the stream in question, and the next pass does all of it again.
async fn restore(
    scheduler: &Scheduler,
    spec: &StreamSpec,
    known: Option<Known>,
    persisted: u64,
    seen: Seen,
) -> anyhow::Result<()> {
    // What a queue or the lifecycle stream still holds is true; a log that differs from the
    // persisted one is not.
    let begins_at = match topology::partition_of(spec.name) {
        Some(_) => generation::first_sequence(known, persisted, seen),
        None => 1,
    };
    if begins_at > 1 {
        let highest = known.map_or(0, |known| known.high_watermark).max(persisted);
        let in_question = Seen { created_at: OffsetDateTime::UNIX_EPOCH, last_sequence: highest };
        remember(&mut *scheduler.pool.acquire().await?, spec, in_question).await?;
        scheduler.bus.trim(spec.name, begins_at - 1).await?;
    }
    for consumer in topology::CONSUMERS.iter().filter(|consumer| consumer.stream == spec.name) {
        scheduler.bus.ensure_consumer(consumer).await?;
    }
    let seen = self::seen(&scheduler.bus.stream_info(spec).await?);
    let mut tx = scheduler.pool.begin().await?;
    reconciler::offer_all(&mut tx).await?;
    if begins_at > 1 {
        // Nothing below is going to be persisted: a runner does not wait for it.
        positions::pass(&mut tx, spec.name, begins_at - 1).await?;
    }
    remember(&mut tx, spec, seen).await?;
    tx.commit().await?;
    Ok(())
}

/// What Postgres has of a stream.
#[derive(Clone, Copy, Default)]
struct Recorded {
    known: Option<Known>,
    /// The id of the newest persisted event, of a partition in which sessions were created.
    persisted: Option<u64>,
}

async fn recorded(scheduler: &Scheduler) -> Result<HashMap<String, Recorded>, sqlx::Error> {
    type Row = (String, Option<OffsetDateTime>, Option<i64>, Option<i64>);
    let rows: Vec<Row> = sqlx::query_as(
        "select stream, created_at, high_watermark, event_id from stream_generation full join recorded using (stream)",
    )
    .fetch_all(&scheduler.pool)
    .await?;
    let recorded = |(stream, created_at, high_watermark, event_id): Row| {
        let known = created_at.zip(high_watermark).map(|(created_at, high_watermark)| Known {
            created_at,
            high_watermark: high_watermark.unsigned_abs(),
        });
        (stream, Recorded { known, persisted: event_id.map(i64::unsigned_abs) })
    };
    Ok(rows.into_iter().map(recorded).collect())
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

fn seen(info: &StreamInfo) -> Seen {
    Seen { created_at: micros(info.created_at.into()), last_sequence: info.last_sequence }
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
    info: &StreamInfo,
    partition: Partition,
) -> anyhow::Result<()> {
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
