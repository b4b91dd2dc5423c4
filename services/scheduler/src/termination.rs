//! Ending sessions: by their users, and the clean-up after.

use std::time::Duration;

use bus::Failure;
use contract::{
    common::Empty,
    rpc,
    runner::DestroySprite,
    scheduler::{Session, SessionChanged, SpriteDestroyedRequest, TerminateRequest},
    session::{SessionEvent, Terminated, Usage, session_event::Kind},
    subject,
    vault::RevokeLeasesRequest,
};
use sqlx::PgConnection;
use types::{SessionId, SessionStatus, SpriteName, Timestamp, UserId};

use crate::{
    Scheduler,
    metrics::{Observation, Outcome},
    sessions::{SessionRow, enqueue, lock, missing, session_columns},
};

/// Terminates from any state but terminated. The state is settled here and now; what runs is stopped by what follows from it:
/// the record's last event fences the runner off, a hint wakes it, and a job deletes the Sprite whoever made it.
pub async fn terminate(scheduler: Scheduler, request: TerminateRequest) -> Result<Session, Failure> {
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    let session: SessionId = request.session_id.parse().map_err(|_| missing())?;
    let mut tx = scheduler.pool.begin().await.map_err(Failure::internal)?;
    let row = lock(&mut tx, session, Some(user)).await?.ok_or_else(missing)?;
    if row.status()? == SessionStatus::Terminated {
        return Err(Failure::conflict("Session is already terminated"));
    }
    let ended: Option<f64> = sqlx::query_scalar(
        "update turn set status = 'failed', ended_at = now() where session_id = $1 and status in ('pending', 'running')
         returning extract(epoch from now() - created_at)::float8",
    )
    .bind(session.uuid())
    .fetch_optional(&mut *tx)
    .await
    .map_err(Failure::internal)?;
    let turn = u32::try_from(row.turn_count).unwrap_or_default();
    let event = SessionEvent { turn, follows: None, epoch: 0, checkpoint: None, kind: Some(Kind::Terminated(Terminated {})) };
    enqueue(&mut tx, &subject::session_log(session, row.partition()?), &event).await?;
    enqueue_destroy(&mut tx, &row).await?;
    let row: SessionRow = sqlx::query_as(concat!(
        "update session
         set status = 'terminated', updated_at = now()
         where session_id = $1
         returning ",
        session_columns!()
    ))
    .bind(session.uuid())
    .fetch_one(&mut *tx)
    .await
    .map_err(Failure::internal)?;
    tell(&mut tx, &row, &row.status, turn).await?;
    tx.commit().await.map_err(Failure::internal)?;
    scheduler.outbox.notify_one();
    scheduler.bus.hint(subject::terminate_hint(session)).await;
    if let Some(seconds) = ended {
        Observation::Ended { runtime: row.runtime.clone(), outcome: Outcome::Terminated, seconds }.count();
    }
    Ok(row.into())
}

/// The job that deletes a session's Sprite.
pub async fn enqueue_destroy(tx: &mut PgConnection, row: &SessionRow) -> Result<(), Failure> {
    let sprite: SpriteName = row.sprite.parse().map_err(Failure::internal)?;
    destroy_job(tx, SessionId::from_uuid(row.session_id), &sprite).await
}

pub async fn destroy_job(tx: &mut PgConnection, session: SessionId, sprite: &SpriteName) -> Result<(), Failure> {
    let job = DestroySprite { session_id: session.to_string(), sprite: sprite.to_string() };
    enqueue(tx, &subject::sprite_destroy(sprite), &job).await
}

/// Tells other services what became of a session: its new status, or `deleted`.
pub async fn tell(tx: &mut PgConnection, row: &SessionRow, what: &str, turn: u32) -> Result<(), Failure> {
    tell_end(tx, row, what, turn, None).await
}

/// As [`tell`], of a turn that ended by itself.
pub async fn tell_end(tx: &mut PgConnection, row: &SessionRow, what: &str, turn: u32, usage: Option<Usage>) -> Result<(), Failure> {
    let session = SessionId::from_uuid(row.session_id);
    let fact = SessionChanged {
        session_id: session.to_string(),
        user_id: row.user_id.to_string(),
        status: row.status.clone(),
        turn,
        exit_code: row.exit_code,
        at_us: Timestamp::now().unix_micros(),
        usage,
    };
    enqueue(tx, &subject::session_lifecycle(what, session), &fact).await
}

/// A Sprite is gone: nothing of the session needs secrets any more.
pub async fn sprite_destroyed(scheduler: Scheduler, request: SpriteDestroyedRequest) -> Result<Empty, Failure> {
    let session: SessionId = request.session_id.parse().map_err(|_| missing())?;
    sqlx::query("update session set sprite_destroyed_at = now() where session_id = $1 and sprite_destroyed_at is null")
        .bind(session.uuid())
        .execute(&scheduler.pool)
        .await
        .map_err(Failure::internal)?;
    sqlx::query("update deleted_session set sprite_destroyed_at = now() where session_id = $1")
        .bind(session.uuid())
        .execute(&scheduler.pool)
        .await
        .map_err(Failure::internal)?;
    scheduler.bus.call::<rpc::RevokeLeases>(&RevokeLeasesRequest { session_id: session.to_string() }, Duration::from_secs(5)).await
}
