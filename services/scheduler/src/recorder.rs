//! The recorder: what the streams of events hold, written to Postgres, and the states moved along by it.
//!
//! One replica at a time records a partition, in the stream's order, so that the record of a session never has a hole below its newest event:
//! readers may take a page of it for complete. How far it got is in the same transaction as what it wrote, so that whoever goes on
//! begins with the next event. Acknowledgements to the stream would not do: one that is missing comes back late, and out of order.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use anyhow::Context as _;
use bus::{Failure, log::Entry};
use contract::{
    session::{SessionEvent, TurnEnded, session_event::Kind},
    subject, topology,
};
use futures::{FutureExt as _, StreamExt as _};
use prost::Message as _;
use service::Lifecycle;
use sqlx::{Connection as _, PgConnection, PgPool};
use store::leader::Leadership;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use types::{Backoff, Partition, SessionId, limits::SETTLE_GRACE};

use crate::{
    Scheduler,
    metrics::{Observation, Outcome},
    sessions::{SessionRow, lock, session_columns},
    termination::tell_end,
    unsigned,
};

/// Of the first partition; those of the others follow. Any numbers that no other lock of ours has.
const LOCK: i64 = 0x0061_6f64_7265_6331;
const BATCH: usize = 1000;
/// A batch is in memory several times over while it is written.
const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// How soon a partition that another replica begins is recorded here too.
const PARTITIONS_EVERY: Duration = Duration::from_secs(1);
const IDLE: Duration = Duration::from_secs(1);
const RETRY: Backoff = Backoff { base: Duration::from_millis(100), max: Duration::from_secs(2), attempts: u32::MAX };
/// How many events can have been in a lost stream without being recorded. Ids must not come twice.
const UNRECORDED_MAX: u64 = 1_000_000;

/// How far this replica has recorded each partition: its newest event.
#[derive(Clone, Default)]
pub struct Recorded(Arc<[watch::Sender<u64>; Partition::COUNT_MAX as usize]>);

impl Recorded {
    pub fn of(&self, partition: Partition) -> &watch::Sender<u64> {
        &self.0[usize::from(partition.number())]
    }
}

/// Puts it on record that sessions are born in these partitions, for every replica to see.
pub async fn begin_partitions(scheduler: &Scheduler) -> Result<(), sqlx::Error> {
    let streams: Vec<_> =
        Partition::all().take(scheduler.event_partitions.get().into()).map(|partition| topology::events(partition).name).collect();
    sqlx::query("insert into recorded (stream, event_id) select stream, 0 from unnest($1::text[]) as stream on conflict do nothing")
        .bind(streams)
        .execute(&scheduler.pool)
        .await?;
    Ok(())
}

/// The partitions in which sessions are born or were.
pub async fn partitions(scheduler: &Scheduler) -> Result<Vec<Partition>, sqlx::Error> {
    let streams: Vec<String> = sqlx::query_scalar("select stream from recorded order by stream").fetch_all(&scheduler.pool).await?;
    Ok(streams.iter().filter_map(|stream| topology::partition_of(stream)).collect())
}

/// Where a stream that is made anew has to begin: above every id that anybody may have seen.
pub async fn first_sequence(pool: &PgPool, partition: Partition) -> Result<u64, sqlx::Error> {
    Ok(match recorded_through(pool, partition).await? {
        0 => 1,
        through => through + UNRECORDED_MAX,
    })
}

/// The newest event of a partition that is on record.
pub async fn recorded_through(pool: &PgPool, partition: Partition) -> Result<u64, sqlx::Error> {
    let stream = topology::events(partition).name;
    let through: Option<i64> =
        sqlx::query_scalar("select event_id from recorded where stream = $1").bind(stream).fetch_optional(pool).await?;
    Ok(through.map_or(0, i64::unsigned_abs))
}

/// A recorder for each partition; one that another replica begins has its own here too.
pub async fn run(scheduler: Scheduler, lifecycle: Lifecycle) {
    let (stop, mut begun) = (lifecycle.stop_token(), BTreeSet::new());
    let mut ticks = tokio::time::interval(PARTITIONS_EVERY);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        for partition in partitions(&scheduler).await.unwrap_or_default() {
            if begun.insert(partition) {
                lifecycle.spawn("recorder", record_partition(scheduler.clone(), partition, stop.clone()));
            }
        }
    }
}

async fn record_partition(scheduler: Scheduler, partition: Partition, stop: CancellationToken) {
    let mut failures = 0;
    while !stop.is_cancelled() {
        match Leadership::try_acquire(&scheduler.pool, LOCK + i64::from(partition.number())).await {
            Ok(Some(mut leadership)) => {
                let recorded = record(&scheduler, partition, &mut leadership, &stop, &mut failures).await;
                leadership.resign().await;
                if let Err(error) = recorded {
                    failures += 1;
                    tracing::warn!("{:#}", error.context("recording was interrupted; trying again"));
                }
            }
            Ok(None) => failures = 1,
            Err(error) => {
                failures += 1;
                tracing::warn!(%error, "recorder cannot reach Postgres; trying again");
            }
        }
        let _ = stop.run_until_cancelled(tokio::time::sleep(RETRY.jittered(failures))).await;
    }
}

async fn record(
    scheduler: &Scheduler,
    partition: Partition,
    leadership: &mut Leadership,
    stop: &CancellationToken,
    failures: &mut u32,
) -> anyhow::Result<()> {
    let from = recorded_through(&scheduler.pool, partition).await? + 1;
    let spec = topology::events(partition);
    let mut stream = scheduler.bus.follow(spec.name, spec.subjects.concat(), from).await?;
    while !stop.is_cancelled() {
        let Ok(first) = tokio::time::timeout(IDLE, stream.next()).await else {
            // The lock is in this connection: losing one is losing the other.
            leadership.connection().ping().await?;
            continue;
        };
        let first = first.context("the stream ended")??;
        let (mut last, mut bytes, mut entries) = (first.sequence, first.payload.len(), vec![first]);
        // As many as there are, and no waiting for more.
        while entries.len() < BATCH
            && bytes < BATCH_BYTES
            && let Some(Some(entry)) = stream.next().now_or_never()
        {
            let entry = entry?;
            (last, bytes) = (entry.sequence, bytes + entry.payload.len());
            entries.push(entry);
        }
        let woken = write(leadership.connection(), spec.name, &entries).await?;
        *failures = 0;
        metrics::counter!("aod_events_recorded_total").increment(entries.len() as u64);
        scheduler.recorded.of(partition).send_replace(last);
        if woken {
            scheduler.outbox.notify_one();
        }
    }
    Ok(())
}

/// Writes a batch and what follows from it; tells whether the outbox got something.
async fn write(connection: &mut PgConnection, stream: &str, entries: &[Entry]) -> anyhow::Result<bool> {
    let (mut sessions, mut ids, mut payloads, mut changes) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for entry in entries {
        let event = SessionEvent::decode(entry.payload.clone());
        let (Some(session), Ok(event)) = (subject::parse_session_log(&entry.subject), event) else {
            tracing::error!(subject = entry.subject, sequence = entry.sequence, "event cannot be read; left out of the record");
            continue;
        };
        sessions.push(session.uuid());
        ids.push(i64::try_from(entry.sequence)?);
        payloads.push(entry.payload.as_ref());
        match event.kind {
            Some(Kind::TurnStarted(_)) => changes.push((session, event.turn, Change::Started)),
            Some(Kind::TurnEnded(ended)) => changes.push((session, event.turn, Change::Ended(ended))),
            _ => {}
        }
    }
    let mut tx = connection.begin().await?;
    sqlx::query(
        "with written as (
            insert into event (session_id, event_id, recorded_on, payload)
            select e.session_id, e.event_id, (now() at time zone 'utc')::date, e.payload
            from unnest($1::uuid[], $2::bigint[], $3::bytea[]) as e (session_id, event_id, payload)
            join session s using (session_id)
            on conflict do nothing
            returning session_id, event_id, recorded_on
         )
         insert into event_log as l (session_id, last_event_id, first_day, last_day)
         select w.session_id, max(w.event_id), min((s.created_at at time zone 'utc')::date), max(w.recorded_on)
         from written w
         join session s using (session_id)
         group by w.session_id
         on conflict (session_id) do update
         set last_event_id = greatest(l.last_event_id, excluded.last_event_id), last_day = greatest(l.last_day, excluded.last_day)",
    )
    .bind(&sessions)
    .bind(&ids)
    .bind(&payloads)
    .execute(&mut *tx)
    .await?;
    let woken = !changes.is_empty();
    let mut observations = Vec::new();
    for (session, turn, change) in changes {
        observations.extend(change.apply(&mut tx, session, i32::try_from(turn)?).await?);
    }
    sqlx::query(
        "insert into recorded (stream, event_id) values ($1, $2)
         on conflict (stream) do update set event_id = greatest(recorded.event_id, excluded.event_id)",
    )
    .bind(stream)
    .bind(entries.last().map(|entry| entry.sequence as i64).unwrap_or_default())
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    observations.into_iter().for_each(Observation::count);
    Ok(woken)
}

/// What an event does to its turn and session. Each applies once: a settled turn and a terminated session stay as they are.
enum Change {
    Started,
    Ended(TurnEnded),
}

impl Change {
    async fn apply(self, tx: &mut PgConnection, session: SessionId, turn: i32) -> Result<Option<Observation>, Failure> {
        match self {
            Self::Started => started(tx, session, turn).await,
            Self::Ended(ended) => Self::ended(tx, session, turn, ended).await,
        }
    }

    async fn ended(tx: &mut PgConnection, id: SessionId, turn: i32, ended: TurnEnded) -> Result<Option<Observation>, Failure> {
        let Some(session) = lock(tx, id, None).await? else { return Ok(None) };
        // Postgres keeps no NUL in text.
        let clean = |text: String| text.replace('\0', "\u{fffd}");
        let count = |count: Option<u64>| count.and_then(|count| i64::try_from(count).ok());
        let usage = ended.usage.clone().unwrap_or_default();
        let status = if ended.exit_code == Some(0) { "completed" } else { "failed" };
        let outcome = Outcome::of(&ended);
        let seconds: Option<f64> = sqlx::query_scalar(
            "update turn
             set status = $3, exit_code = $4, ended_at = now(), input_tokens = $5, output_tokens = $6, cost_micro_usd = $7, model_used = $8
             where session_id = $1 and turn_number = $2 and status in ('pending', 'running')
             returning extract(epoch from now() - created_at)::float8",
        )
        .bind(id.uuid())
        .bind(turn)
        .bind(status)
        .bind(ended.exit_code)
        .bind(count(usage.input_tokens))
        .bind(count(usage.output_tokens))
        .bind(count(usage.cost_micro_usd))
        .bind(usage.model.clone().map(clean))
        .fetch_optional(&mut *tx)
        .await
        .map_err(Failure::internal)?;
        let Some(seconds) = seconds else { return Ok(None) };
        let observation = Some(Observation::Ended { runtime: session.runtime.clone(), outcome, seconds });
        if session.turn_count != turn || !session.status()?.is_active() {
            return Ok(observation);
        }
        let (stage, message) = ended.failure.map(|failure| (clean(failure.stage), clean(failure.message))).unzip();
        let row: SessionRow = sqlx::query_as(concat!(
            "update session
             set status = $2, exit_code = $3, failure_stage = $4, failure_message = $5, updated_at = now()
             where session_id = $1
             returning ",
            session_columns!()
        ))
        .bind(id.uuid())
        .bind(status)
        .bind(ended.exit_code)
        .bind(stage)
        .bind(message)
        .fetch_one(&mut *tx)
        .await
        .map_err(Failure::internal)?;
        tell_end(tx, &row, &row.status, unsigned(turn), ended.usage).await?;
        Ok(observation)
    }
}

async fn started(tx: &mut PgConnection, id: SessionId, turn: i32) -> Result<Option<Observation>, Failure> {
    // From here on the turn's own timeout counts, and provisioning no longer does.
    let started: Option<(f64, String)> = sqlx::query_as(
        "with started as (
            update turn
            set status = 'running', started_at = now(), deadline_at = now() + make_interval(secs => timeout_seconds + $3)
            where session_id = $1 and turn_number = $2 and status = 'pending'
            returning session_id, created_at
         )
         update session s
         set status = 'running', updated_at = now()
         from started
         where s.session_id = started.session_id and s.status = 'pending' and s.turn_count = $2
         returning extract(epoch from now() - started.created_at)::float8, s.runtime",
    )
    .bind(id.uuid())
    .bind(turn)
    .bind(SETTLE_GRACE.as_secs_f64())
    .fetch_optional(tx)
    .await
    .map_err(Failure::internal)?;
    Ok(started.map(|(seconds, runtime)| Observation::Started { runtime, seconds }))
}
