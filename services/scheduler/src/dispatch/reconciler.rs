//! Finds unsettled turns without an owner and offers them again, whatever the reason: a dead
//! runner, a lost or set-back queue, a restored backup and a lost answer all look the same here.
//!
//! Every replica runs it, several at once: locked rows are skipped, and a second offer costs only a
//! message.

use std::time::{Duration, Instant};

use contract::{runner::RunTurn, subject};
use futures::future::join_all;
use rules::ownership;
use sqlx::Row as _;
use tokio_util::sync::CancellationToken;
use types::{SessionId, SpriteName};
use uuid::Uuid;

use crate::{
    Scheduler,
    dispatch::outbox::{destroy_job, enqueue},
    inputs,
    sessions::row::lock,
    unsigned,
};

const EVERY: Duration = Duration::from_millis(250);
/// The longest that a pass may take.
const PASS_MAX: Duration = Duration::from_secs(5);
/// A slower pass means that Postgres is busy, so that heartbeats may be late as well.
const SMOOTH: Duration = Duration::from_millis(700);
const BATCH: i64 = 256;
/// What is left of the lease of a runner that was silent for long enough.
const SILENT_REST: Duration = ownership::LEASE.saturating_sub(ownership::SILENCE);
/// How long NATS may take to answer that a subject has no subscriber. It answers nothing else.
const PRESENCE_MAX: Duration = Duration::from_millis(100);
/// How many passes there are from one check of the queues to the next.
const QUEUES_EVERY: u32 = 8;

pub async fn run(scheduler: Scheduler, stop: CancellationToken) {
    let mut ticks = service::ticks(EVERY);
    let mut smooth_since: Option<Instant> = None;
    let mut last_pass = Instant::now();
    let mut passes = 0_u32;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
            () = scheduler.released.notified() => {}
        }
        // A lease may look expired because its heartbeats could not be written. So leases expire
        // only in front of a replica for which bus, Postgres and its own process were all fast for
        // as long as a lease lasts.
        let late = last_pass.elapsed() > EVERY + SMOOTH;
        if late || !scheduler.bus.is_connected() {
            smooth_since = None;
        }
        last_pass = Instant::now();
        let may_expire = smooth_since.is_some_and(|since| since.elapsed() >= ownership::LEASE);
        passes = passes.wrapping_add(1);
        let queues_too = passes.is_multiple_of(QUEUES_EVERY);
        match tokio::time::timeout(PASS_MAX, pass(&scheduler, may_expire, queues_too)).await {
            Ok(Ok(offered)) => {
                if offered > 0 {
                    scheduler.due.outbox.notify_one();
                }
                smooth_since = if last_pass.elapsed() > SMOOTH {
                    None
                } else {
                    smooth_since.or(Some(Instant::now()))
                };
            }
            Ok(Err(error)) => {
                smooth_since = None;
                tracing::warn!(error = format!("{error:#}"), "reconciler pass failed; will retry");
            }
            Err(_) => {
                smooth_since = None;
                tracing::warn!("reconciler pass took too long; will retry");
            }
        }
    }
}

async fn pass(scheduler: &Scheduler, may_expire: bool, queues_too: bool) -> anyhow::Result<usize> {
    if queues_too {
        begin_queued(scheduler).await?;
    }
    let due = due(scheduler).await?;
    let mut offered = 0;
    let have_expired = may_expire && due.leases && expire_leases(scheduler).await?;
    if due.turns || have_expired {
        offered += offer_turns(scheduler).await?;
    }
    if due.destructions {
        offered += offer_destructions(scheduler).await?;
    }
    Ok(offered)
}

/// What there is to do, in one statement, for most of the time there is nothing.
#[derive(sqlx::FromRow)]
struct Due {
    leases: bool,
    turns: bool,
    destructions: bool,
}

/// Of one parameter: what is left of the lease of a silent runner, in seconds.
const DUE: &str =
    "select exists (select from runner_lease where expires_at < now() + make_interval(secs => $1)) as leases,
            exists (select from turn where owner is null and status in ('pending', 'running') and offer_after <= now()) as turns,
            exists (select from session
                    where destroy_after <= now() and destroy_after is not null and sprite_destroyed_at is null)
            or exists (select from deleted_session where destroy_after <= now() and sprite_destroyed_at is null) as destructions";

async fn due(scheduler: &Scheduler) -> Result<Due, sqlx::Error> {
    sqlx::query_as(DUE).bind(SILENT_REST.as_secs_f64()).fetch_one(&scheduler.pool).await
}

/// Deletes the leases of runners that sent no heartbeat, and of silent ones that are not connected
/// either. Returns whether there were any. The foreign key clears the owner of their turns.
async fn expire_leases(scheduler: &Scheduler) -> anyhow::Result<bool> {
    let silent: Vec<Uuid> = sqlx::query_scalar(
        "select lease_id from runner_lease
         where expires_at between now() and now() + make_interval(secs => $1) limit $2",
    )
    .bind(SILENT_REST.as_secs_f64())
    .bind(BATCH)
    .fetch_all(&scheduler.pool)
    .await?;
    let absent = join_all(silent.into_iter().map(async |lease| {
        let presence = subject::lease_presence(lease);
        (!scheduler.bus.may_be_followed(presence, PRESENCE_MAX).await).then_some(lease)
    }));
    let absent: Vec<Uuid> = absent.await.into_iter().flatten().collect();
    // A heartbeat may have come meanwhile.
    let expired: Vec<String> = sqlx::query_scalar(
        "delete from runner_lease
         where lease_id in (
            select lease_id from runner_lease
            where expires_at < now() + make_interval(secs => $1) and (expires_at < now() or lease_id = any($2))
            for update skip locked
         )
         returning runner",
    )
    .bind(SILENT_REST.as_secs_f64())
    .bind(absent)
    .fetch_all(&scheduler.pool)
    .await?;
    for runner in &expired {
        metrics::counter!("aod_runner_leases_expired_total").increment(1);
        tracing::warn!(runner, "runner lease expired; releasing its turns");
    }
    Ok(!expired.is_empty())
}

/// Begins turns from messages that wait in sessions where nothing runs: the transaction that ended
/// their last turn was an earlier release's.
async fn begin_queued(scheduler: &Scheduler) -> anyhow::Result<()> {
    let sessions: Vec<Uuid> = sqlx::query_scalar(
        "select distinct i.session_id
         from input i
         join session s using (session_id)
         where i.status in ('queued', 'delivered') and i.kind = 'message' and i.turn_number is null and s.status not in ('pending', 'running')
         limit $1",
    )
    .bind(BATCH)
    .fetch_all(&scheduler.pool)
    .await?;
    for session in sessions {
        let mut tx = scheduler.pool.begin().await?;
        if let Some(row) = lock(&mut tx, SessionId::from_uuid(session), None).await? {
            inputs::queue::begin_next(&mut tx, &row, None).await?;
        }
        tx.commit().await?;
        scheduler.due.outbox.notify_one();
    }
    Ok(())
}

async fn offer_turns(scheduler: &Scheduler) -> anyhow::Result<usize> {
    let mut tx = scheduler.pool.begin().await?;
    let due = sqlx::query(
        "select session_id, turn_number, offers
         from turn
         where owner is null and status in ('pending', 'running') and offer_after <= now()
         order by offer_after
         limit $1
         for update skip locked",
    )
    .bind(BATCH)
    .fetch_all(&mut *tx)
    .await?;
    if due.is_empty() {
        return Ok(0);
    }
    let (mut sessions, mut turns, mut waits) = (Vec::new(), Vec::new(), Vec::new());
    for row in &due {
        let (session, turn, offers): (Uuid, i32, i32) =
            (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        sessions.push(session);
        turns.push(turn);
        waits.push(ownership::OFFERS.jittered(unsigned(offers) + 1).as_secs_f64());
        let session = SessionId::from_uuid(session);
        let job = RunTurn { session_id: session.to_string(), turn: unsigned(turn) };
        enqueue(&mut tx, &subject::turn_run(session), &job).await?;
    }
    sqlx::query(
        "update turn t
         set offers = t.offers + 1, offer_after = now() + make_interval(secs => d.wait)
         from unnest($1::uuid[], $2::integer[], $3::float8[]) as d (session_id, turn_number, wait)
         where t.session_id = d.session_id and t.turn_number = d.turn_number",
    )
    .bind(&sessions)
    .bind(&turns)
    .bind(&waits)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    metrics::counter!("aod_turns_offered_again_total").increment(due.len() as u64);
    Ok(due.len())
}

/// Offers jobs for Sprites that are still to be deleted, in case the queue was lost; a job in the
/// queue is retried by itself. Less and less often, since a Sprite cannot be deleted if its user's
/// credentials are missing.
async fn offer_destructions(scheduler: &Scheduler) -> anyhow::Result<usize> {
    let mut tx = scheduler.pool.begin().await?;
    let mut offered = 0;
    for statement in [
        "with due as (
            select session_id from session
            where destroy_after <= now() and destroy_after is not null and sprite_destroyed_at is null
            limit $1 for update skip locked
         )
         update session s set destroy_after = now() + greatest('10 minutes', least('1 day', now() - s.updated_at))
         from due where s.session_id = due.session_id
         returning s.session_id, s.sprite",
        "with due as (
            select session_id from deleted_session
            where destroy_after <= now() and sprite_destroyed_at is null
            limit $1 for update skip locked
         )
         update deleted_session s set destroy_after = now() + greatest('10 minutes', least('1 day', now() - s.deleted_at))
         from due where s.session_id = due.session_id
         returning s.session_id, s.sprite",
    ] {
        let due = sqlx::query(statement).bind(BATCH).fetch_all(&mut *tx).await?;
        offered += due.len();
        for row in due {
            let sprite: SpriteName = row.try_get::<String, _>(1)?.parse()?;
            destroy_job(&mut tx, SessionId::from_uuid(row.try_get(0)?), &sprite).await?;
        }
    }
    tx.commit().await?;
    Ok(offered)
}

/// Offers all waiting turns again at the next pass, because the queue was lost or lost messages.
///
/// # Errors
/// When Postgres refuses.
pub async fn offer_all(tx: &mut sqlx::PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query("update turn set offer_after = now(), offers = 0 where owner is null and status in ('pending', 'running')")
        .execute(&mut *tx)
        .await?;
    sqlx::query("update session set destroy_after = now() where destroy_after is not null and sprite_destroyed_at is null")
        .execute(&mut *tx)
        .await?;
    sqlx::query("update deleted_session set destroy_after = now() where destroy_after is not null and sprite_destroyed_at is null")
        .execute(tx)
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use sqlx::AssertSqlSafe;
    use testkit::Database;

    use super::*;

    #[tokio::test]
    async fn to_look_for_work_costs_the_same_however_much_waits_or_is_done() {
        let database = Database::create().await.unwrap();
        let pool =
            store::open(&database.config("scheduler"), "test", crate::MIGRATIONS).await.unwrap();
        let many = "
            insert into session (session_id, user_id, agent_version, runtime, sprite, conversation_id, metadata, status, turn_count,
                                 sprite_destroyed_at, destroy_after)
            select gen_random_uuid(), gen_random_uuid(), 1, 'shell', 'done-' || number, gen_random_uuid(), '{}', 'completed', 1,
                   case when number % 10 > 0 then now() end, now() + interval '1 day'
            from generate_series(1, 20000) as number;
            insert into turn (session_id, turn_number, prompt, timeout_seconds, status, deadline_at, offer_after)
            select session_id, number, 'x', 60, case when number = 2 then 'pending' else 'completed' end, now(),
                   now() + interval '1 day'
            from session, generate_series(1, 2) as number where number = 1 or sprite_destroyed_at is null;
            insert into deleted_session (session_id, user_id, sprite, destroy_after)
            select gen_random_uuid(), gen_random_uuid(), 'gone-' || number, now() + interval '1 day'
            from generate_series(1, 20000) as number";
        sqlx::raw_sql(many).execute(&pool).await.unwrap();
        sqlx::raw_sql("vacuum analyze session, turn, deleted_session")
            .execute(&pool)
            .await
            .unwrap();
        let plan: Vec<String> = sqlx::query_scalar(AssertSqlSafe(format!("explain {DUE}")))
            .bind(SILENT_REST.as_secs_f64())
            .fetch_all(&pool)
            .await
            .unwrap();
        let plan = plan.join("\n");
        for index in ["turn_without_owner", "sprite_to_destroy", "deleted_sprite_to_destroy"] {
            assert!(plan.contains(&format!("using {index} ")), "{index}: {plan}");
        }
    }
}
