//! Projects the EVENTS streams into Postgres and advances sessions and turns.
//!
//! One replica at a time projects a partition, in the stream's order, so that a session's persisted
//! log never has a hole below its newest event: readers may take a page of it for complete. Each
//! batch is one transaction: the lease, the events, what follows from them, and how far the
//! projector got. Acknowledgements to the stream would not do: an unacknowledged event is
//! redelivered behind newer ones.
//!
//! Each event names the one it continues. An event that does not continue the persisted log is
//! never persisted: the session's subject is purged and its turn released, so that the next runner
//! continues from the persisted log and reads the agent's output again.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use bus::log::Entry;
use contract::{
    session::{SessionEvent, session_event::Kind},
    subject, topology,
};
use futures::{FutureExt as _, StreamExt as _};
use prost::Message as _;
use rules::chain::{self, Link, Mark};
use sqlx::{Connection as _, PgConnection, Row as _};
use store::lease::{self, Lease};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use types::{Backoff, Partition, SessionId};
use uuid::Uuid;

use crate::{
    Scheduler,
    inputs::{self, At},
    log::{
        positions::{self, partitions, projected_through},
        projection::{Applied, apply},
    },
    metrics::Observation,
};

const BATCH: usize = 1000;
/// A batch is in memory several times over while it is written.
const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// How long a projector leads without a sign of life. Each batch extends the lease, and an idle
/// projector does so too.
const LEASE: Duration = Duration::from_secs(2);
const IDLE: Duration = Duration::from_millis(700);
/// The longest that one step in Postgres or on the bus may take. A connection that is slower is
/// dropped.
const STEP_MAX: Duration = Duration::from_secs(5);
const RETRY: Backoff =
    Backoff { base: Duration::from_millis(100), max: Duration::from_secs(2), attempts: u32::MAX };

/// Whether no one projects a partition.
pub const DUE: &str = "exists (select from recorded r
             where not exists (select from lease l where l.name = 'projector:' || r.stream and l.expires_at > now()))";

/// Projects the partitions that no other replica projects.
pub async fn run(scheduler: Scheduler, stop: CancellationToken) {
    let owner = Uuid::now_v7();
    let (mut led, mut projectors) = (BTreeSet::new(), JoinSet::new());
    let mut failures = 0;
    loop {
        let wait = async {
            match failures {
                0 => scheduler.due.projections.notified().await,
                failures => tokio::time::sleep(RETRY.jittered(failures)).await,
            }
        };
        tokio::select! {
            () = stop.cancelled() => break,
            Some(ended) = projectors.join_next() => {
                match ended {
                    Ok(partition) => led.remove(&partition),
                    Err(_) => break,
                };
                // At once: the lease was released, and may well be acquired again.
                failures = failures.max(1);
                continue;
            }
            () = wait => {}
        }
        let acquired = async {
            let free = partitions(&scheduler.pool)
                .await?
                .into_iter()
                .filter(|partition| !led.contains(partition));
            let names: Vec<_> = free.map(lease_name).collect();
            if names.is_empty() {
                Ok(Vec::new())
            } else {
                lease::acquire(&scheduler.pool, owner, &names, LEASE).await
            }
        };
        match step(acquired).await {
            Ok(leases) => {
                failures = 0;
                for lease in leases {
                    let Some(partition) =
                        lease.name.strip_prefix("projector:").and_then(topology::partition_of)
                    else {
                        continue;
                    };
                    led.insert(partition);
                    projectors.spawn(lead(scheduler.clone(), partition, lease, stop.clone()));
                }
            }
            Err(error) => {
                failures += 1;
                tracing::warn!(
                    error = format!("{error:#}"),
                    "failed to look for partitions to project; will retry"
                );
            }
        }
    }
    while projectors.join_next().await.is_some() {}
}

fn lease_name(partition: Partition) -> String {
    format!("projector:{}", topology::events(partition).name)
}

/// Runs one step under its time limit.
async fn step<T, E: Into<anyhow::Error>>(
    work: impl Future<Output = Result<T, E>>,
) -> anyhow::Result<T> {
    match tokio::time::timeout(STEP_MAX, work).await {
        Ok(done) => done.map_err(Into::into),
        Err(_) => anyhow::bail!("no answer within {} s", STEP_MAX.as_secs()),
    }
}

async fn lead(
    scheduler: Scheduler,
    partition: Partition,
    lease: Lease,
    stop: CancellationToken,
) -> Partition {
    if let Err(error) = project(&scheduler, partition, &lease, &stop).await {
        tracing::warn!(
            partition = partition.number(),
            error = format!("{error:#}"),
            "projecting was interrupted; will retry"
        );
    }
    let _ = step(lease.release(&scheduler.pool)).await;
    partition
}

async fn project(
    scheduler: &Scheduler,
    partition: Partition,
    lease: &Lease,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    // A connection of its own: one that hangs is dropped with this future, and holds up no one
    // else.
    let mut connection = step(scheduler.pool.acquire()).await?.detach();
    let spec = topology::events(partition);
    // Shown by pg_stat_activity.
    let name = format!("scheduler projector {}", spec.name);
    step(
        sqlx::query("select set_config('application_name', $1, false)")
            .bind(name)
            .execute(&mut connection),
    )
    .await?;
    let from = step(projected_through(&scheduler.pool, partition)).await? + 1;
    let mut stream = step(scheduler.bus.follow(spec.name, spec.subjects.concat(), from)).await?;
    tracing::debug!(stream = spec.name, from, "projecting");
    while !stop.is_cancelled() {
        let Ok(first) = tokio::time::timeout(IDLE, stream.next()).await else {
            ensure!(step(lease.extend(&mut connection, LEASE)).await?, "another replica leads");
            continue;
        };
        let first = first.context("the stream ended")??;
        let (mut last, mut bytes, mut entries) = (first.sequence, first.payload.len(), vec![first]);
        // As many as there are, without waiting for more.
        while entries.len() < BATCH
            && bytes < BATCH_BYTES
            && let Some(Some(entry)) = stream.next().now_or_never()
        {
            let entry = entry?;
            (last, bytes) = (entry.sequence, bytes + entry.payload.len());
            entries.push(entry);
        }
        step(remove_foreign(scheduler, partition, &entries)).await?;
        let woken = step(write(scheduler, &mut connection, partition, lease, &entries)).await?;
        metrics::counter!("aod_events_recorded_total").increment(entries.len() as u64);
        scheduler.projected.of(partition).send_replace(last);
        if woken {
            scheduler.due.outbox.notify_one();
        }
    }
    let _ = connection.close().await;
    Ok(())
}

/// Removes from the stream what no service wrote, so that it fences off no writer.
async fn remove_foreign(
    scheduler: &Scheduler,
    partition: Partition,
    entries: &[Entry],
) -> anyhow::Result<()> {
    for entry in entries.iter().filter(|entry| entry.is_foreign) {
        tracing::error!(
            subject = entry.subject,
            event_id = entry.sequence,
            "removing an event that no service wrote"
        );
        scheduler.bus.remove(topology::events(partition).name, entry.sequence).await?;
    }
    Ok(())
}

/// An event that continues its session's log.
struct Accepted<'a> {
    session: SessionId,
    entry: &'a Entry,
    event: SessionEvent,
}

/// Writes a batch and what follows from it. Returns whether the outbox got something.
async fn write(
    scheduler: &Scheduler,
    connection: &mut PgConnection,
    partition: Partition,
    lease: &Lease,
    entries: &[Entry],
) -> anyhow::Result<bool> {
    let mut tx = connection.begin().await?;
    ensure!(lease.extend(&mut tx, LEASE).await?, "another replica leads");
    let (accepted, broken) = follow_chains(&mut tx, entries).await?;
    let sessions: Vec<_> = accepted.iter().map(|accepted| accepted.session.uuid()).collect();
    let ids: Vec<_> = accepted.iter().map(|accepted| accepted.entry.sequence as i64).collect();
    // Any 64 bits: Postgres has no unsigned integers.
    let tags: Vec<_> = accepted.iter().map(|accepted| accepted.event.tag.cast_signed()).collect();
    let payloads: Vec<_> =
        accepted.iter().map(|accepted| accepted.entry.payload.as_ref()).collect();
    let outputs: Vec<_> = accepted
        .iter()
        .map(|accepted| matches!(accepted.event.kind, Some(Kind::Output(_))))
        .collect();
    sqlx::query(
        "with written as (
            insert into event (session_id, event_id, recorded_on, payload, is_output)
            select e.session_id, e.event_id, (now() at time zone 'utc')::date, e.payload, e.is_output
            from unnest($1::uuid[], $2::bigint[], $3::bytea[], $5::boolean[]) as e (session_id, event_id, payload, is_output)
            join session s using (session_id)
            on conflict do nothing
         )
         insert into event_log as l (session_id, last_event_id, last_tag, first_day, last_day)
         select distinct on (e.session_id)
                e.session_id, e.event_id, e.tag, (s.created_at at time zone 'utc')::date, (now() at time zone 'utc')::date
         from unnest($1::uuid[], $2::bigint[], $4::bigint[]) as e (session_id, event_id, tag)
         join session s using (session_id)
         order by e.session_id, e.event_id desc
         on conflict (session_id) do update
         set last_event_id = excluded.last_event_id, last_tag = excluded.last_tag, last_day = greatest(l.last_day, excluded.last_day)",
    )
    .bind(&sessions)
    .bind(&ids)
    .bind(&payloads)
    .bind(&tags)
    .bind(&outputs)
    .execute(&mut *tx)
    .await?;
    let (mut observations, mut hints, mut woken) = (Vec::new(), Vec::new(), false);
    for Accepted { session, event, entry } in &accepted {
        if let Some(kind) = event.kind.as_ref().filter(|kind| changes_state(kind)) {
            woken = true;
            let at = At::new(entry.sequence, event.at_us);
            let Applied { observation, inputs_wait } =
                apply(&mut tx, *session, event.turn, kind, at).await?;
            observations.extend(observation);
            hints.extend(inputs_wait.then_some(*session));
        }
    }
    for session in &broken {
        repair(scheduler, &mut tx, partition, *session).await?;
    }
    let through = entries.last().map(|entry| entry.sequence).unwrap_or_default();
    positions::pass(&mut tx, topology::events(partition).name, through).await?;
    tx.commit().await?;
    observations.into_iter().for_each(Observation::count);
    for session in hints {
        scheduler.bus.hint(subject::inputs_hint(session)).await;
    }
    Ok(woken)
}

fn changes_state(kind: &Kind) -> bool {
    matches!(kind, Kind::TurnStarted(_) | Kind::TurnEnded(_) | Kind::Terminated(_))
        || inputs::events::concerns(kind)
}

/// Splits a batch into the events that continue their sessions' logs, and the sessions whose chain
/// is broken.
async fn follow_chains<'a>(
    tx: &mut PgConnection,
    entries: &'a [Entry],
) -> anyhow::Result<(Vec<Accepted<'a>>, BTreeSet<SessionId>)> {
    let mut read = Vec::with_capacity(entries.len());
    for entry in entries.iter().filter(|entry| !entry.is_foreign) {
        match (
            subject::parse_session_log(&entry.subject),
            SessionEvent::decode(entry.payload.clone()),
        ) {
            (Some(session), Ok(event)) => read.push(Accepted { session, entry, event }),
            _ => tracing::error!(
                subject = entry.subject,
                event_id = entry.sequence,
                "skipped an unreadable event"
            ),
        }
    }
    let sessions: BTreeSet<Uuid> = read.iter().map(|each| each.session.uuid()).collect();
    // Sessions that were deleted have no row: what still comes of them is dropped.
    let rows = sqlx::query(
        "select session_id, last_event_id, last_tag from session left join event_log using (session_id) where session_id = any($1)",
    )
    .bind(sessions.into_iter().collect::<Vec<_>>())
    .fetch_all(&mut *tx)
    .await?;
    let mut newest = HashMap::with_capacity(rows.len());
    for row in rows {
        let (id, tag): (Option<i64>, Option<i64>) = (row.try_get(1)?, row.try_get(2)?);
        let mark =
            id.map(|id| Mark { id: id.unsigned_abs(), tag: tag.map_or(0, i64::cast_unsigned) });
        newest.insert(row.try_get::<Uuid, _>(0)?, mark);
    }
    let (mut accepted, mut broken) = (Vec::with_capacity(read.len()), BTreeSet::new());
    for each in read {
        let Some(persisted) = newest.get_mut(&each.session.uuid()) else { continue };
        let follows = Mark::followed_by(&each.event);
        let mut link = chain::link(*persisted, each.entry.sequence, follows);
        if link == Link::Broken && !broken.contains(&each.session) {
            // The log's end is kept in a row of its own since this release: an earlier one may have
            // written events without it.
            *persisted = newest_persisted(tx, each.session).await?;
            link = chain::link(*persisted, each.entry.sequence, follows);
        }
        match link {
            Link::Continues => {
                *persisted = Some(Mark::of(each.entry.sequence, &each.event));
                accepted.push(each);
            }
            Link::Old => {
                tracing::warn!(session = %each.session, event_id = each.entry.sequence, "skipped an event whose id was used")
            }
            Link::Broken => {
                if broken.insert(each.session) {
                    tracing::error!(
                        session = %each.session,
                        event_id = each.entry.sequence,
                        follows = each.event.follows,
                        persisted = persisted.map(|mark| mark.id),
                        "event does not continue the persisted log; its turn is released to read the output again"
                    );
                }
            }
        }
    }
    Ok((accepted, broken))
}

async fn newest_persisted(
    tx: &mut PgConnection,
    session: SessionId,
) -> anyhow::Result<Option<Mark>> {
    let newest: Option<(i64, Vec<u8>)> = sqlx::query_as(
        "select event_id, payload from event where session_id = $1 order by event_id desc limit 1",
    )
    .bind(session.uuid())
    .fetch_optional(tx)
    .await?;
    newest
        .map(|(id, payload)| {
            Ok(Mark::of(id.unsigned_abs(), &SessionEvent::decode(payload.as_slice())?))
        })
        .transpose()
}

/// Has a broken log continued from its persisted end. The subject is purged before the position
/// moves on: should this process die in between, the events come again and are refused again, or
/// are gone and were never persisted.
async fn repair(
    scheduler: &Scheduler,
    tx: &mut PgConnection,
    partition: Partition,
    session: SessionId,
) -> anyhow::Result<()> {
    metrics::counter!("aod_event_log_gaps_total").increment(1);
    scheduler
        .bus
        .purge(topology::events(partition).name, &subject::session_log(session, partition))
        .await?;
    sqlx::query(
        "update turn set owner = null, offer_after = now(), offers = 0
         where session_id = $1 and status in ('pending', 'running')",
    )
    .bind(session.uuid())
    .execute(tx)
    .await?;
    Ok(())
}
