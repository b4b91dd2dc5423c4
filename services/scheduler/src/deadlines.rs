//! The backstop: a turn that nobody settled by its deadline is settled here, with a reason.
//!
//! Takes no input and asks the table each time, so that it does the same after a crash as on any other day.

use std::time::Duration;

use bus::Failure;
use contract::{
    session::{self, SessionEvent, TurnEnded, session_event::Kind},
    subject,
};
use sqlx::{PgConnection, Row as _};
use tokio_util::sync::CancellationToken;
use types::SessionId;
use uuid::Uuid;

use crate::{
    Scheduler,
    metrics::{Observation, Outcome},
    sessions::{SessionRow, enqueue, lock, session_columns},
    termination::{enqueue_destroy, tell},
    unsigned,
};

const EVERY: Duration = Duration::from_secs(1);
const BATCH: i64 = 100;

pub async fn run(scheduler: Scheduler, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        if let Err(error) = settle_overdue(&scheduler).await {
            tracing::warn!(%error, "deadlines cannot be checked");
        }
    }
}

async fn settle_overdue(scheduler: &Scheduler) -> Result<(), Failure> {
    let overdue = sqlx::query(
        "select session_id, turn_number, timeout_seconds, status, handed_back_reason
         from turn
         where status in ('pending', 'running') and deadline_at < now()
         order by deadline_at
         limit $1",
    )
    .bind(BATCH)
    .fetch_all(&scheduler.pool)
    .await
    .map_err(Failure::internal)?;
    for row in overdue {
        let session = SessionId::from_uuid(row.try_get::<Uuid, _>(0).map_err(Failure::internal)?);
        let turn: i32 = row.try_get(1).map_err(Failure::internal)?;
        let timeout: i32 = row.try_get(2).map_err(Failure::internal)?;
        let message = match row.try_get::<&str, _>(3).map_err(Failure::internal)? {
            "pending" => {
                let reason: Option<String> = row.try_get(4).map_err(Failure::internal)?;
                format!("Turn could not be started in time: {}", reason.as_deref().unwrap_or("no runner finished setting it up"))
            }
            _ => format!("Turn timed out after {timeout}s"),
        };
        let mut tx = scheduler.pool.begin().await.map_err(Failure::internal)?;
        if let Some(session) = lock(&mut tx, session, None).await? {
            metrics::counter!("aod_deadline_settlements_total").increment(1);
            let runtime = session.runtime.clone();
            let seconds = settle(&mut tx, session, turn, &message).await?;
            tx.commit().await.map_err(Failure::internal)?;
            if let Some(seconds) = seconds {
                Observation::Ended { runtime, outcome: Outcome::Deadline, seconds }.count();
            }
            scheduler.outbox.notify_one();
        }
    }
    Ok(())
}

/// Fails a turn that is not settled yet, with its session: the state, the record's event, the Sprite's end, the fact for others.
/// Gives how many seconds the turn took, if it was this that ended it.
pub async fn settle(tx: &mut PgConnection, session: SessionRow, turn: i32, message: &str) -> Result<Option<f64>, Failure> {
    let id = SessionId::from_uuid(session.session_id);
    let seconds: Option<f64> = sqlx::query_scalar(
        "update turn set status = 'failed', ended_at = now()
         where session_id = $1 and turn_number = $2 and status in ('pending', 'running')
         returning extract(epoch from now() - created_at)::float8",
    )
    .bind(id.uuid())
    .bind(turn)
    .fetch_optional(&mut *tx)
    .await
    .map_err(Failure::internal)?;
    if seconds.is_none() {
        return Ok(None);
    }
    let failed: Option<SessionRow> = sqlx::query_as(concat!(
        "update session
         set status = 'failed', failure_stage = 'deadline', failure_message = $3, updated_at = now()
         where session_id = $1 and turn_count = $2 and status in ('pending', 'running')
         returning ",
        session_columns!()
    ))
    .bind(id.uuid())
    .bind(turn)
    .bind(message)
    .fetch_optional(&mut *tx)
    .await
    .map_err(Failure::internal)?;
    let Some(failed) = failed else { return Ok(seconds) };
    let failure = session::Failure { stage: "deadline".to_owned(), message: message.to_owned() };
    let ended = TurnEnded { failure: Some(failure), ..TurnEnded::default() };
    let event = SessionEvent { turn: unsigned(turn), epoch: 0, follows: None, checkpoint: None, kind: Some(Kind::TurnEnded(ended)) };
    enqueue(tx, &subject::session_log(id, failed.partition()?), &event).await?;
    enqueue_destroy(tx, &failed).await?;
    tell(tx, &failed, &failed.status, unsigned(turn)).await?;
    Ok(seconds)
}
