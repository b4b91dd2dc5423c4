//! Ending sessions: by their users, and the clean-up after.

use std::time::Duration;

use bus::Failure;
use contract::{
    common::Empty,
    rpc,
    runner::DestroySprite,
    scheduler::{Session, SessionChanged, SpriteDestroyedRequest, TerminateRequest},
    session::{Terminated, Usage, session_event::Kind},
    subject,
    vault::RevokeLeasesRequest,
};
use rules::ending::Ending;
use sqlx::PgConnection;
use types::{SessionId, SessionStatus, SpriteName, Timestamp, UserId};

use crate::{
    Scheduler,
    ending::{self, Appended},
    inputs::At,
    projector,
    sessions::{self, SessionRow, enqueue, missing, session_columns},
    unsigned,
};

/// Long enough for a projector that takes over from one that died.
const PROJECTED_WITHIN: Duration = Duration::from_secs(8);
const AGAIN: Duration = Duration::from_millis(100);

/// Terminates from any state but terminated. The termination is an event of the session's log: the log's order decides whether a turn
/// ended before. What runs is stopped by what follows from it: the event fences the runner off, a hint wakes it, and a job deletes the
/// Sprite.
pub async fn terminate(scheduler: Scheduler, request: TerminateRequest) -> Result<Session, Failure> {
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    let session: SessionId = request.session_id.parse().map_err(|_| missing())?;
    let row = find(&scheduler, session, user).await?;
    let already = || Failure::conflict("Session is already terminated");
    if row.status()? == SessionStatus::Terminated {
        return Err(already());
    }
    let (partition, turn) = (row.partition()?, unsigned(row.turn_count));
    let kind = Kind::Terminated(Terminated {});
    let appended = async {
        loop {
            match ending::append(&scheduler, session, partition, Ending::Termination, turn, &kind).await? {
                Appended::Here(id) => return Ok(id),
                Appended::Before => return Err(already()),
                Appended::Later => tokio::time::sleep(AGAIN).await,
            }
        }
    };
    let unavailable = || Failure::unavailable("The event log");
    let id = tokio::time::timeout(PROJECTED_WITHIN, appended).await.map_err(|_| unavailable())??;
    scheduler.bus.hint(subject::terminate_hint(session)).await;
    let projected = sessions::wait_until_recorded(&scheduler, session, id);
    tokio::time::timeout(PROJECTED_WITHIN, projected).await.map_err(|_| unavailable())??;
    // The projector has applied it, unless the log was found broken before it: a termination holds all the same.
    let mut tx = scheduler.pool.begin().await?;
    let at = At::new(id, Timestamp::now().unix_micros());
    let observation = projector::apply(&mut tx, session, turn, &kind, at).await?.observation;
    tx.commit().await?;
    scheduler.outbox.notify_one();
    if let Some(observation) = observation {
        observation.count();
    }
    Ok(find(&scheduler, session, user).await?.into())
}

async fn find(scheduler: &Scheduler, session: SessionId, user: UserId) -> Result<SessionRow, Failure> {
    let row = sqlx::query_as(concat!("select ", session_columns!(), " from session where session_id = $1 and user_id = $2"))
        .bind(session.uuid())
        .bind(user.uuid())
        .fetch_optional(&scheduler.pool)
        .await?;
    row.ok_or_else(missing)
}

/// Has a session's Sprite destroyed: now by a job, and by further ones until it is gone. The session may be deleted already.
pub async fn enqueue_destroy(tx: &mut PgConnection, row: &SessionRow) -> Result<(), Failure> {
    for table in [
        "update session set destroy_after = now() + interval '10 minutes' where session_id = $1",
        "update deleted_session set destroy_after = now() + interval '10 minutes' where session_id = $1",
    ] {
        sqlx::query(table).bind(row.session_id).execute(&mut *tx).await?;
    }
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
        .await?;
    sqlx::query("update deleted_session set sprite_destroyed_at = now() where session_id = $1")
        .bind(session.uuid())
        .execute(&scheduler.pool)
        .await?;
    scheduler.bus.call::<rpc::RevokeLeases>(&RevokeLeasesRequest { session_id: session.to_string() }, Duration::from_secs(5)).await
}
