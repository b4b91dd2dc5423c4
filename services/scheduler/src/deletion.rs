//! Deleting sessions. The row goes at once; what else there is of the session goes after it: events, the stream's subject, secrets.

use std::time::Duration;

use bus::Failure;
use contract::{
    common::Empty,
    rpc,
    scheduler::DeleteSessionRequest,
    subject, topology,
    vault::{DeleteSecretsRequest, RevokeLeasesRequest},
};
use sqlx::Row as _;
use tokio_util::sync::CancellationToken;
use types::{SessionId, SessionStatus, UserId};
use uuid::Uuid;

use crate::{
    Scheduler, once,
    sessions::{lock, missing, partition},
    termination::{enqueue_destroy, tell},
    unsigned,
};

pub async fn delete(scheduler: Scheduler, request: DeleteSessionRequest) -> Result<Empty, Failure> {
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    let session: SessionId = request.session_id.parse().map_err(|_| missing())?;
    once::retried(|| delete_row(&scheduler, user, session)).await?;
    scheduler.outbox.notify_one();
    Ok(Empty {})
}

async fn delete_row(scheduler: &Scheduler, user: UserId, session: SessionId) -> Result<(), Failure> {
    let mut tx = scheduler.pool.begin().await?;
    let row = lock(&mut tx, session, Some(user)).await?.ok_or_else(missing)?;
    if matches!(row.status()?, SessionStatus::Pending | SessionStatus::Running) {
        return Err(Failure::conflict("Cannot delete an active session"));
    }
    sqlx::query(
        "with gone as (
            delete from session where session_id = $1
            returning session_id, user_id, sprite, sprite_destroyed_at, secret_id, event_partition
         ), forgotten as (
            insert into unused_secret (secret_id) select secret_id from gone where secret_id is not null
         )
         insert into deleted_session (session_id, user_id, sprite, sprite_destroyed_at, event_partition)
         select session_id, user_id, sprite, sprite_destroyed_at, event_partition from gone",
    )
    .bind(session.uuid())
    .execute(&mut *tx)
    .await?;
    if row.sprite_destroyed_at.is_none() {
        enqueue_destroy(&mut tx, &row).await?;
    }
    tell(&mut tx, &row, "deleted", unsigned(row.turn_count)).await?;
    tx.commit().await?;
    Ok(())
}

const EVERY: Duration = Duration::from_secs(1);
const EVENTS_AT_A_TIME: i64 = 10_000;
const SECRETS_AT_A_TIME: i64 = 100;
const VAULT_DEADLINE: Duration = Duration::from_secs(5);

/// Removes what deleted sessions have left. Replicas share the work by row locks; what one leaves undone the next finds.
pub async fn run(scheduler: Scheduler, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let swept = async {
            while purge_one(&scheduler).await? {}
            forget_secrets(&scheduler).await?;
            forget_answers(&scheduler).await
        };
        if let Some(Err(error)) = stop.run_until_cancelled(swept).await {
            tracing::warn!(%error, "what was deleted is not yet removed; trying again");
        }
    }
}

/// Removes one deleted session's events; false when there is none. A moment after the deletion, when nothing writes them any more.
async fn purge_one(scheduler: &Scheduler) -> Result<bool, Failure> {
    let mut tx = scheduler.pool.begin().await?;
    let row = sqlx::query(
        "select session_id, event_partition
         from deleted_session
         where deleted_at < now() - interval '2 seconds' and (purged_at is null or sprite_destroyed_at is not null)
         limit 1
         for update skip locked",
    )
    .fetch_optional(&mut *tx)
    .await?;
    let Some(row) = row else { return Ok(false) };
    let session = SessionId::from_uuid(row.try_get::<Uuid, _>(0)?);
    let partition = partition(row.try_get(1)?)?;
    loop {
        let deleted = sqlx::query(
            "delete from event
             where session_id = $1 and event_id in (select event_id from event where session_id = $1 order by event_id limit $2)",
        )
        .bind(session.uuid())
        .bind(EVENTS_AT_A_TIME)
        .execute(&scheduler.pool)
        .await?;
        if deleted.rows_affected() < EVENTS_AT_A_TIME.unsigned_abs() {
            break;
        }
    }
    scheduler.bus.purge(topology::events(partition).name, &subject::session_log(session, partition)).await.map_err(Failure::internal)?;
    // Its Sprite is gone too: then nothing is left, and nothing refers to its leases.
    let done = sqlx::query("delete from deleted_session where session_id = $1 and sprite_destroyed_at is not null")
        .bind(session.uuid())
        .execute(&mut *tx)
        .await?;
    if done.rows_affected() > 0 {
        let revoke = RevokeLeasesRequest { session_id: session.to_string() };
        scheduler.bus.call::<rpc::RevokeLeases>(&revoke, VAULT_DEADLINE).await?;
    } else {
        sqlx::query("update deleted_session set purged_at = now() where session_id = $1").bind(session.uuid()).execute(&mut *tx).await?;
    }
    tx.commit().await?;
    Ok(true)
}

async fn forget_secrets(scheduler: &Scheduler) -> Result<(), Failure> {
    let ids: Vec<Uuid> =
        sqlx::query_scalar("select secret_id from unused_secret limit $1").bind(SECRETS_AT_A_TIME).fetch_all(&scheduler.pool).await?;
    if ids.is_empty() {
        return Ok(());
    }
    let request = DeleteSecretsRequest { secret_ids: ids.iter().map(Uuid::to_string).collect() };
    scheduler.bus.call::<rpc::DeleteSecrets>(&request, VAULT_DEADLINE).await?;
    sqlx::query("delete from unused_secret where secret_id = any($1)").bind(ids).execute(&scheduler.pool).await?;
    Ok(())
}

/// Idempotency keys are kept for a day.
async fn forget_answers(scheduler: &Scheduler) -> Result<(), Failure> {
    sqlx::query(
        "delete from answered_once
         where (user_id, route, key) in (
             select user_id, route, key from answered_once where created_at < now() - interval '24 hours' limit 1000
         )",
    )
    .execute(&scheduler.pool)
    .await?;
    Ok(())
}
