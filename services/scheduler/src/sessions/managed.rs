//! What the Managed Agents API does with sessions beyond the original one: their own versions of
//! agents, changes that the log shows, archiving. Statuses of both are projections of one row: see
//! `v1_status` in the migration.

use std::time::Duration;

use bus::RpcError;
use contract::{
    scheduler::{
        ArchiveSessionRequest, EnsureSessionSecretReply, EnsureSessionSecretRequest,
        GetSessionRequest, Session, UpdateSessionRequest,
    },
    session::{Terminated, Updated, session_event::Kind},
    subject,
};
use prost::Message as _;
use rules::ending::Ending;
use serde_json::{Map, Value};
use sqlx::{PgConnection, Row as _};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use types::{SessionId, SessionStatus, Timestamp, UserId, agent::merge_limited_metadata};
use uuid::Uuid;

use crate::{
    Scheduler,
    catalog::agents,
    db::idempotency,
    dispatch::ending::{self, Appended},
    inputs::At,
    log::projection,
    secret_id,
    sessions::{
        self,
        row::{self, lock, missing},
        termination::{AGAIN, PROJECTED_WITHIN},
    },
    unsigned,
};

const EVERY: Duration = Duration::from_secs(1);
const AT_A_TIME: i64 = 100;
/// How long a change waits for its event to be in the log. It is appended later where that takes
/// longer.
const APPENDED_WITHIN: Duration = Duration::from_secs(3);

/// A status of the Managed Agents API.
const RUNNING: &str = "running";

async fn v1_status(tx: &mut PgConnection, session: SessionId) -> Result<String, RpcError> {
    let status = sqlx::query_scalar("select v1_status(session) from session where session_id = $1")
        .bind(session.uuid());
    Ok(status.fetch_one(tx).await?)
}

pub async fn update(
    scheduler: Scheduler,
    request: UpdateSessionRequest,
) -> Result<Session, RpcError> {
    let (user, id): (UserId, SessionId) = (
        request.user_id.parse().map_err(|_| missing())?,
        request.session_id.parse().map_err(|_| missing())?,
    );
    let changed = idempotency::retried(|| async {
        let mut tx = scheduler.pool.begin().await?;
        let outcome = update_in(&mut tx, user, id, &request).await;
        idempotency::finish(tx, outcome).await
    })
    .await?;
    if changed {
        // A session that works gets the event when it is idle: its log belongs to its turn.
        let appended = append_updates(&scheduler, Some(id));
        if let Ok(Err(error)) = tokio::time::timeout(APPENDED_WITHIN, appended).await {
            tracing::warn!(session_id = %id, %error, "failed to append a session's update; will retry");
        }
    }
    let get = GetSessionRequest {
        user_id: request.user_id,
        session_id: request.session_id,
        recorded_through: 0,
        v1: true,
    };
    sessions::get(scheduler, get).await
}

/// Tells whether anything changed.
async fn update_in(
    tx: &mut PgConnection,
    user: UserId,
    id: SessionId,
    request: &UpdateSessionRequest,
) -> Result<bool, RpcError> {
    let row = lock(tx, id, Some(user)).await?.ok_or_else(missing)?;
    let mut changes = Map::new();
    let title = if request.clear_title {
        None
    } else {
        request.title.clone().or_else(|| row.title.clone())
    };
    if title != row.title {
        changes.insert("title".to_owned(), title.clone().into());
    }
    let mut metadata = row.metadata.clone();
    if let Some(patch) = &request.metadata {
        let patch: Map<String, Value> =
            serde_json::from_str(patch).map_err(|_| RpcError::invalid("Malformed metadata"))?;
        let current = row.metadata.as_object().cloned().unwrap_or_default();
        metadata =
            Value::Object(merge_limited_metadata(current, patch).map_err(RpcError::invalid)?);
    }
    if metadata != row.metadata {
        changes.insert("metadata".to_owned(), metadata.clone());
    }
    let mut version = row.agent_version;
    if let Some(changed) = &request.agent {
        let agent = row.agent_id.ok_or_else(|| {
            RpcError::conflict("The session's agent is gone").because("agent_missing")
        })?;
        if v1_status(tx, id).await? == RUNNING || row.status()?.is_active() {
            return Err(RpcError::conflict(
                "The agent of a running session cannot be changed: interrupt it first",
            )
            .because("session_running"));
        }
        // All of the agent is written: a change that was made meanwhile would be lost.
        if request.agent_row_version.is_some_and(|read| read != row.agent_version) {
            return Err(RpcError::conflict("The session's agent was changed by another request"));
        }
        version = agents::override_agent(tx, agent, id, changed).await?;
        changes.insert("agent".to_owned(), true.into());
    }
    if changes.is_empty() {
        return Ok(false);
    }
    sqlx::query("update session set title = $2, metadata = $3, agent_version = $4, updated_at = now() where session_id = $1")
        .bind(id.uuid())
        .bind(&title)
        .bind(&metadata)
        .bind(version)
        .execute(&mut *tx)
        .await?;
    sqlx::query("insert into session_update (update_id, session_id, changes, agent_version) values ($1, $2, $3, $4)")
        .bind(Uuid::now_v7())
        .bind(id.uuid())
        .bind(Value::Object(changes))
        .bind(version)
        .execute(&mut *tx)
        .await?;
    Ok(true)
}

/// The secret that a session keeps its tokens in: the one that it has, or the one that the request
/// names. Its next turn renews what its sandbox has of them.
pub async fn ensure_secret(
    scheduler: Scheduler,
    request: EnsureSessionSecretRequest,
) -> Result<EnsureSessionSecretReply, RpcError> {
    let (user, id): (UserId, SessionId) = (
        request.user_id.parse().map_err(|_| missing())?,
        request.session_id.parse().map_err(|_| missing())?,
    );
    let new = secret_id(Some(&request.secret_id))?;
    let mut tx = scheduler.pool.begin().await?;
    let row = lock(&mut tx, id, Some(user)).await?.ok_or_else(missing)?;
    if row.archived_at.is_some() || row.sprite_destroyed_at.is_some() {
        return Err(RpcError::conflict("The session is terminated").because("session_terminated"));
    }
    let secret: Uuid = sqlx::query_scalar(
        "update session set secret_id = coalesce(secret_id, $2), tokens_changed_at = now(), updated_at = now()
         where session_id = $1 returning secret_id",
    )
    .bind(id.uuid())
    .bind(new)
    .fetch_one(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(EnsureSessionSecretReply { secret_id: secret.to_string() })
}

pub const DUE: &str = "exists (select from session_update)";

/// Appends what changed of sessions to their logs, once they are idle.
pub async fn run(scheduler: Scheduler, stop: CancellationToken) {
    let due = &scheduler.due.session_updates;
    service::whenever("session updates", due, EVERY, stop, || append_updates(&scheduler, None))
        .await;
}

/// Appends the updates of one session, or of all that are idle. The row goes after its event is in
/// the log: a crash between the two appends it again, which the event's id shows.
async fn append_updates(scheduler: &Scheduler, session: Option<SessionId>) -> Result<(), RpcError> {
    let rows = sqlx::query(
        "select u.update_id, u.session_id, u.changes, u.agent_version
         from session_update u join session s using (session_id)
         where ($1::uuid is null or session_id = $1) and s.status not in ('pending', 'running', 'terminated')
         order by hashtextextended(session_id::text, $3), u.update_id limit $2",
    )
    .bind(session.map(SessionId::uuid))
    .bind(AT_A_TIME)
    // In another order each time: sessions whose logs cannot be written hold up no others.
    .bind(Uuid::new_v4().as_u64_pair().1.cast_signed())
    .fetch_all(&scheduler.pool)
    .await?;
    let mut failed = None;
    for row in rows {
        let (update, session): (Uuid, Uuid) = (row.try_get(0)?, row.try_get(1)?);
        if failed == Some(session) {
            continue;
        }
        let id = SessionId::from_uuid(session);
        if let Err(error) =
            append_update(scheduler, update, id, row.try_get(2)?, row.try_get(3)?).await
        {
            tracing::warn!(%error, session_id = %id, "failed to append a session's update; will retry");
            failed = Some(session);
        }
    }
    sqlx::query("delete from session_update u using session s where s.session_id = u.session_id and s.status = 'terminated'")
        .execute(&scheduler.pool)
        .await?;
    Ok(())
}

async fn append_update(
    scheduler: &Scheduler,
    update: Uuid,
    id: SessionId,
    changes: Value,
    version: i32,
) -> Result<(), RpcError> {
    // One replica at a time; the lock ends with the transaction.
    let mut tx = scheduler.pool.begin().await?;
    let mine =
        sqlx::query("select from session_update where update_id = $1 for update skip locked")
            .bind(update)
            .fetch_optional(&mut *tx);
    if mine.await?.is_none() {
        return Ok(());
    }
    let row: Option<(i16, i32, String, Option<Uuid>)> = sqlx::query_as(
        "select event_partition, turn_count, status, agent_id from session where session_id = $1",
    )
    .bind(id.uuid())
    .fetch_optional(&mut *tx)
    .await?;
    let Some((partition, turn, status, agent)) = row else { return Ok(()) };
    if status.parse().is_ok_and(|status: SessionStatus| status.is_active()) {
        return Ok(());
    }
    let agent = match agent.filter(|_| changes.get("agent").is_some()) {
        Some(agent) => agents::find_versions(&mut tx, &[agent], &[version]).await?.pop(),
        None => None,
    };
    let agent = agent.map(|agent| agent.encode_to_vec()).unwrap_or_default();
    let updated = Updated { update_id: update.to_string(), changes: changes.to_string(), agent };
    let kind = Kind::Updated(updated);
    match ending::append(
        scheduler,
        id,
        row::partition(partition)?,
        Ending::Update,
        unsigned(turn),
        &kind,
    )
    .await?
    {
        Appended::Here(_) | Appended::Before => {
            sqlx::query("delete from session_update where update_id = $1")
                .bind(update)
                .execute(&mut *tx)
                .await?;
            tx.commit().await?;
        }
        // The next round tries again.
        Appended::Later => {}
    }
    Ok(())
}

/// Archivings at a time: each holds a connection while it appends to the log, which needs another.
static ARCHIVINGS: Semaphore = Semaphore::const_new(4);

/// Archives a session that is idle: it is terminated, and lists leave it out. Archiving it again is
/// no error.
pub async fn archive(
    scheduler: Scheduler,
    request: ArchiveSessionRequest,
) -> Result<Session, RpcError> {
    let (user, id): (UserId, SessionId) = (
        request.user_id.parse().map_err(|_| missing())?,
        request.session_id.parse().map_err(|_| missing())?,
    );
    let archived = async {
        let _permit = ARCHIVINGS.acquire().await.map_err(RpcError::internal)?;
        while !archive_in(&scheduler, user, id).await? {
            tokio::time::sleep(AGAIN).await;
        }
        Ok::<_, RpcError>(())
    };
    tokio::time::timeout(PROJECTED_WITHIN, archived)
        .await
        .map_err(|_| RpcError::unavailable("The event log"))??;
    scheduler.due.outbox.notify_one();
    // It may be in preparation.
    scheduler.bus.hint(subject::terminate_hint(id)).await;
    let get = GetSessionRequest {
        user_id: request.user_id,
        session_id: request.session_id,
        recorded_through: 0,
        v1: true,
    };
    sessions::get(scheduler, get).await
}

/// Archives a session, or returns false where that is not possible now. The row is locked from the
/// check until the termination is applied: a message is accepted before it, and the session is not
/// idle, or after it, and the session takes none.
async fn archive_in(scheduler: &Scheduler, user: UserId, id: SessionId) -> Result<bool, RpcError> {
    let mut tx = scheduler.pool.begin().await?;
    let row = lock(&mut tx, id, Some(user)).await?.ok_or_else(missing)?;
    if v1_status(&mut tx, id).await? == RUNNING {
        return Err(RpcError::conflict("A running session cannot be archived: interrupt it first")
            .because("session_running"));
    }
    if row.status()? != SessionStatus::Terminated {
        let (partition, turn) = (row.partition()?, unsigned(row.turn_count));
        let kind = Kind::Terminated(Terminated { archived: true });
        let event_id =
            match ending::append(scheduler, id, partition, Ending::Termination, turn, &kind).await?
            {
                Appended::Here(event_id) => event_id,
                // Terminated by a request that has not applied it yet.
                Appended::Before => 0,
                Appended::Later => return Ok(false),
            };
        let at = At::new(event_id, Timestamp::now().unix_micros());
        projection::apply(&mut tx, id, turn, &kind, at).await?;
    }
    sqlx::query("update session set archived_at = coalesce(archived_at, now()), updated_at = now() where session_id = $1")
        .bind(id.uuid())
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(true)
}
