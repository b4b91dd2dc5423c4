//! Writes jobs and lifecycle events to the outbox, in the transaction of the change.
//! [`crate::dispatch::relay`] publishes them.

use bus::{RpcError, trace};
use contract::{runner::DestroySprite, scheduler::SessionChanged, session::Usage, subject};
use sqlx::PgConnection;
use types::{SessionId, SpriteName, Timestamp};

use crate::sessions::row::SessionRow;

/// Adds a message to the transaction, as part of the trace at hand.
pub async fn enqueue(
    tx: &mut PgConnection,
    subject: &str,
    message: &impl prost::Message,
) -> Result<(), RpcError> {
    let traceparent = trace::traceparent();
    store::outbox::enqueue(tx, subject, &message.encode_to_vec(), traceparent.as_deref())
        .await
        .map_err(RpcError::from)
}

/// Has a session's Sprite destroyed: now by a job, and by further ones until it is gone. The
/// session may be deleted already. Its agent's tokens are revoked meanwhile.
pub async fn enqueue_destroy(
    tx: &mut PgConnection,
    session: SessionId,
    sprite: &str,
) -> Result<(), RpcError> {
    for statement in [
        "update session set destroy_after = now() + interval '10 minutes' where session_id = $1",
        "update deleted_session set destroy_after = now() + interval '10 minutes' where session_id = $1",
        "insert into model_tokens_to_revoke (session_id) values ($1) on conflict do nothing",
    ] {
        sqlx::query(statement).bind(session.uuid()).execute(&mut *tx).await?;
    }
    let sprite: SpriteName = sprite.parse().map_err(RpcError::internal)?;
    destroy_job(tx, session, &sprite).await
}

pub async fn destroy_job(
    tx: &mut PgConnection,
    session: SessionId,
    sprite: &SpriteName,
) -> Result<(), RpcError> {
    let job = DestroySprite { session_id: session.to_string(), sprite: sprite.to_string() };
    enqueue(tx, &subject::sprite_destroy(sprite), &job).await
}

/// Enqueues a lifecycle event for other services: a session's new status, or `deleted`; with the
/// usage of a turn that ended by itself.
pub async fn enqueue_lifecycle_event(
    tx: &mut PgConnection,
    row: &SessionRow,
    what: &str,
    turn: u32,
    usage: Option<Usage>,
) -> Result<(), RpcError> {
    let session = SessionId::from_uuid(row.session_id);
    let event = SessionChanged {
        session_id: session.to_string(),
        user_id: row.user_id.to_string(),
        status: row.status.clone(),
        turn,
        exit_code: row.exit_code,
        at_us: Timestamp::now().unix_micros(),
        usage,
    };
    enqueue(tx, &subject::session_lifecycle(what, session), &event).await
}
