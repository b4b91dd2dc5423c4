//! Ending sessions: by their users, and the clean-up after.

use std::time::Duration;

use bus::RpcError;
use contract::{
    common::Empty,
    rpc,
    scheduler::{Session, SpriteDestroyedRequest, TerminateRequest},
    session::{Terminated, session_event::Kind},
    subject,
    vault::RevokeLeasesRequest,
};
use rules::ending::Ending;
use types::{SessionId, SessionStatus, Timestamp, UserId};

use crate::{
    Scheduler,
    dispatch::ending::{self, Appended},
    inputs::At,
    log::{positions, projection},
    sessions::row::{find, missing},
    unsigned,
};

/// Long enough for a projector that takes over from one that died.
pub const PROJECTED_WITHIN: Duration = Duration::from_secs(8);
pub const AGAIN: Duration = Duration::from_millis(100);

/// Terminates from any state but terminated. The termination is an event of the session's log: the
/// log's order decides whether a turn ended before. What runs is stopped by what follows from it:
/// the event fences the runner off, a hint wakes it, and a job deletes the Sprite.
pub async fn terminate(
    scheduler: Scheduler,
    request: TerminateRequest,
) -> Result<Session, RpcError> {
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    let session: SessionId = request.session_id.parse().map_err(|_| missing())?;
    let row = find(&scheduler.pool, session, user).await?;
    let already = || RpcError::conflict("Session is already terminated");
    if row.status()? == SessionStatus::Terminated {
        return Err(already());
    }
    let (partition, turn) = (row.partition()?, unsigned(row.turn_count));
    let kind = Kind::Terminated(Terminated::default());
    let appended = async {
        loop {
            match ending::append(&scheduler, session, partition, Ending::Termination, turn, &kind)
                .await?
            {
                Appended::Here(id) => return Ok(id),
                Appended::Before => {
                    // By another request; or by one that died before its event was applied.
                    apply(&scheduler, session, turn, &kind, 0).await?;
                    return Err(already());
                }
                Appended::Later => tokio::time::sleep(AGAIN).await,
            }
        }
    };
    let unavailable = || RpcError::unavailable("The event log");
    let id =
        tokio::time::timeout(PROJECTED_WITHIN, appended).await.map_err(|_| unavailable())??;
    scheduler.bus.hint(subject::terminate_hint(session)).await;
    let projected = positions::wait_until_projected(&scheduler, session, id);
    tokio::time::timeout(PROJECTED_WITHIN, projected).await.map_err(|_| unavailable())??;
    // The projector has applied it, unless the log was found broken before it: a termination holds
    // all the same.
    apply(&scheduler, session, turn, &kind, id).await?;
    Ok(find(&scheduler.pool, session, user).await?.into())
}

async fn apply(
    scheduler: &Scheduler,
    session: SessionId,
    turn: u32,
    kind: &Kind,
    event_id: u64,
) -> Result<(), RpcError> {
    let mut tx = scheduler.pool.begin().await?;
    let at = At::new(event_id, Timestamp::now().unix_micros());
    let observation = projection::apply(&mut tx, session, turn, kind, at).await?.observation;
    tx.commit().await?;
    scheduler.due.outbox.notify_one();
    if let Some(observation) = observation {
        observation.count();
    }
    Ok(())
}

/// A Sprite is gone: nothing of the session needs secrets any more.
pub async fn sprite_destroyed(
    scheduler: Scheduler,
    request: SpriteDestroyedRequest,
) -> Result<Empty, RpcError> {
    let session: SessionId = request.session_id.parse().map_err(|_| missing())?;
    sqlx::query("update session set sprite_destroyed_at = now() where session_id = $1 and sprite_destroyed_at is null")
        .bind(session.uuid())
        .execute(&scheduler.pool)
        .await?;
    sqlx::query("update deleted_session set sprite_destroyed_at = now() where session_id = $1")
        .bind(session.uuid())
        .execute(&scheduler.pool)
        .await?;
    scheduler
        .bus
        .call::<rpc::RevokeLeases>(
            &RevokeLeasesRequest { session_id: session.to_string() },
            Duration::from_secs(5),
        )
        .await
}
