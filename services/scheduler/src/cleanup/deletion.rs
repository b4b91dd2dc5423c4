//! Deletes sessions. The row is deleted at once; events, the stream's subject and secrets are
//! purged afterwards.

use std::time::Duration;

use bus::RpcError;
use contract::{
    common::Empty,
    rpc::{self, Rpc},
    scheduler::DeleteSessionRequest,
    session::{Deleted, SessionEvent, session_event::Kind},
    subject, topology,
    vault::{DeleteSecretsRequest, RevokeLeasesRequest, RevokeModelTokensRequest},
};
use prost::Message as _;
use tokio_util::sync::CancellationToken;
use types::{SessionId, SessionStatus, Timestamp, UserId};
use uuid::Uuid;

use crate::{
    Scheduler,
    db::idempotency,
    dispatch::outbox::{enqueue_destroy, enqueue_lifecycle_event},
    log::event_log,
    models,
    sessions::row::{lock, missing, partition},
    unsigned,
};

pub async fn delete(
    scheduler: Scheduler,
    request: DeleteSessionRequest,
) -> Result<Empty, RpcError> {
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    let session: SessionId = request.session_id.parse().map_err(|_| missing())?;
    idempotency::retried(|| delete_row(&scheduler, user, session)).await?;
    scheduler.due.outbox.notify_one();
    // It may be in preparation.
    scheduler.bus.hint(subject::terminate_hint(session)).await;
    Ok(Empty {})
}

async fn delete_row(
    scheduler: &Scheduler,
    user: UserId,
    session: SessionId,
) -> Result<(), RpcError> {
    let mut tx = scheduler.pool.begin().await?;
    let row = lock(&mut tx, session, Some(user)).await?.ok_or_else(missing)?;
    if matches!(row.status()?, SessionStatus::Pending | SessionStatus::Running) {
        return Err(
            RpcError::conflict("Cannot delete an active session").because("session_running")
        );
    }
    sqlx::query(
        "with gone as (
            delete from session where session_id = $1
            returning session_id, user_id, sprite, sprite_destroyed_at, secret_id, event_partition, agent_id, agent_version
         ), own as (
            -- The session's own versions of its agent. A scheduler of an earlier release did not write whose they are.
            delete from agent_version v using gone
            where v.session_id = gone.session_id
                or (v.agent_id = gone.agent_id and v.version = gone.agent_version and v.version < 0)
            returning v.agent_id, v.version, v.mcp_secret_id
         ), forgotten as (
            insert into unused_secret (secret_id)
            select secret_id from gone where secret_id is not null
            union
            select o.mcp_secret_id from own o
            where o.mcp_secret_id is not null
                -- One that overrides other fields has the secret of the version that it was made from.
                and not exists (select from agent_version v
                                where v.mcp_secret_id = o.mcp_secret_id
                                    and (v.agent_id, v.version) not in (select agent_id, version from own))
            on conflict do nothing
         )
         insert into deleted_session (session_id, user_id, sprite, sprite_destroyed_at, event_partition)
         select session_id, user_id, sprite, sprite_destroyed_at, event_partition from gone",
    )
    .bind(session.uuid())
    .execute(&mut *tx)
    .await?;
    sqlx::query("update file set state = 'deleted', state_since = now() where session_id = $1 and state <> 'deleted'")
        .bind(session.uuid())
        .execute(&mut *tx)
        .await?;
    if row.sprite_destroyed_at.is_none() {
        enqueue_destroy(&mut tx, session, &row.sprite).await?;
    }
    enqueue_lifecycle_event(&mut tx, &row, "deleted", unsigned(row.turn_count), None).await?;
    tx.commit().await?;
    Ok(())
}

const EVERY: Duration = Duration::from_secs(1);
/// One replica purges a session for no longer; then another may.
const PURGE_MAX: Duration = Duration::from_secs(60);
/// When a session that could not be purged is tried again.
const PURGE_AGAIN: Duration = Duration::from_secs(30);
/// Secrets, or sessions' tokens, in one request to the vault.
const AT_A_TIME: i64 = 100;
const VAULT_DEADLINE: Duration = Duration::from_secs(5);

pub const DUE: &str = "exists (select from deleted_session
             where (purged_at is null or sprite_destroyed_at is not null)
               and purge_after < now() and deleted_at < now() - interval '2 seconds')
     or exists (select from unused_secret)
     or exists (select from model_tokens_to_revoke)
     or (select min(created_at) from answered_once) < now() - interval '24 hours'";

/// Removes what deleted sessions have left. Replicas share the work by row locks; what one leaves
/// undone the next finds.
pub async fn run(scheduler: Scheduler, stop: CancellationToken) {
    service::whenever("deletion", &scheduler.due.deletions, EVERY, stop, || async {
        // Each part by itself: one that fails holds up no other.
        let parts = [
            purge(&scheduler).await,
            forget_secrets(&scheduler).await,
            revoke_model_tokens(&scheduler).await,
            forget_answers(&scheduler).await,
        ];
        parts.into_iter().collect::<Result<(), RpcError>>()
    })
    .await;
}

/// Removes the events of deleted sessions, a moment after the deletion, when nothing writes them
/// any more.
async fn purge(scheduler: &Scheduler) -> Result<(), RpcError> {
    while let Some(session) = next_to_purge(scheduler).await? {
        if let Err(error) = purge_one(scheduler, session).await {
            tracing::warn!(%error, session_id = %session, "failed to purge a deleted session; will retry");
            sqlx::query("update deleted_session set purge_after = now() + make_interval(secs => $2) where session_id = $1")
                .bind(session.uuid())
                .bind(PURGE_AGAIN.as_secs_f64())
                .execute(&scheduler.pool)
                .await?;
        }
    }
    Ok(())
}

/// The deleted session that is due longest; the others' turn comes while it is worked on.
async fn next_to_purge(scheduler: &Scheduler) -> Result<Option<SessionId>, RpcError> {
    let session: Option<Uuid> = sqlx::query_scalar(
        "update deleted_session set purge_after = now() + make_interval(secs => $1)
         where session_id = (
             select session_id
             from deleted_session
             where (purged_at is null or sprite_destroyed_at is not null)
               and purge_after < now() and deleted_at < now() - interval '2 seconds'
             order by purge_after
             limit 1
             for update skip locked
         )
         returning session_id",
    )
    .bind(PURGE_MAX.as_secs_f64())
    .fetch_optional(&scheduler.pool)
    .await?;
    Ok(session.map(SessionId::from_uuid))
}

async fn purge_one(scheduler: &Scheduler, session: SessionId) -> Result<(), RpcError> {
    let (number, was_purged): (i16, bool) = sqlx::query_as(
        "select event_partition, purged_at is not null from deleted_session where session_id = $1",
    )
    .bind(session.uuid())
    .fetch_one(&scheduler.pool)
    .await?;
    let partition = partition(number)?;
    event_log::purge(&scheduler.pool, session).await?;
    models::purge(&scheduler.pool, session).await?;
    let log = subject::session_log(session, partition);
    if !was_purged {
        // Nothing else tells those who follow an idle session.
        let deleted = SessionEvent {
            at_us: Timestamp::now().unix_micros(),
            kind: Some(Kind::Deleted(Deleted {})),
            ..SessionEvent::default()
        };
        let told = scheduler
            .bus
            .publish(log.clone(), deleted.encode_to_vec().into(), &format!("deleted-{session}"))
            .await;
        told.map_err(RpcError::internal)?;
    }
    scheduler
        .bus
        .purge(topology::events(partition).name, &log)
        .await
        .map_err(RpcError::internal)?;
    let mut tx = scheduler.pool.begin().await?;
    // Its Sprite is gone too: then nothing is left, and nothing refers to its leases. The user's
    // account is searched once more.
    let done = sqlx::query(
        "with done as (delete from deleted_session where session_id = $1 and sprite_destroyed_at is not null returning user_id)
         insert into sprite_sweep (user_id, queued_at) select user_id, 'epoch' from done
         on conflict (user_id) do update set changed_at = now()",
    )
    .bind(session.uuid())
    .execute(&mut *tx)
    .await?;
    if done.rows_affected() > 0 {
        let revoke = RevokeLeasesRequest { session_id: session.to_string() };
        scheduler.bus.call::<rpc::RevokeLeases>(&revoke, VAULT_DEADLINE).await?;
    } else {
        sqlx::query("update deleted_session set purged_at = now(), purge_after = now() where session_id = $1")
            .bind(session.uuid())
            .execute(&mut *tx)
            .await?;
    }
    tx.commit().await?;
    Ok(())
}

async fn forget_secrets(scheduler: &Scheduler) -> Result<(), RpcError> {
    let (listed, forgotten) = (
        "select secret_id from unused_secret limit $1",
        "delete from unused_secret where secret_id = any($1)",
    );
    tell_vault::<rpc::DeleteSecrets>(scheduler, listed, forgotten, |secret_ids| {
        DeleteSecretsRequest { secret_ids }
    })
    .await
}

/// An agent whose session ended must not call models for as long as its sandbox cannot be deleted.
async fn revoke_model_tokens(scheduler: &Scheduler) -> Result<(), RpcError> {
    let (listed, forgotten) = (
        "select session_id from model_tokens_to_revoke limit $1",
        "delete from model_tokens_to_revoke where session_id = any($1)",
    );
    tell_vault::<rpc::RevokeModelTokens>(scheduler, listed, forgotten, |session_ids| {
        RevokeModelTokensRequest { session_ids }
    })
    .await
}

/// Tells the vault of the ids that a statement lists, and forgets them once it knows.
async fn tell_vault<R: Rpc>(
    scheduler: &Scheduler,
    listed: &'static str,
    forgotten: &'static str,
    request: impl FnOnce(Vec<String>) -> R::Request,
) -> Result<(), RpcError> {
    let ids: Vec<Uuid> =
        sqlx::query_scalar(listed).bind(AT_A_TIME).fetch_all(&scheduler.pool).await?;
    if ids.is_empty() {
        return Ok(());
    }
    scheduler
        .bus
        .call::<R>(&request(ids.iter().map(Uuid::to_string).collect()), VAULT_DEADLINE)
        .await?;
    sqlx::query(forgotten).bind(ids).execute(&scheduler.pool).await?;
    Ok(())
}

/// Idempotency keys are kept for a day.
async fn forget_answers(scheduler: &Scheduler) -> Result<(), RpcError> {
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
