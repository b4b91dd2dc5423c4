//! Ends of turns that do not come from a runner: deadlines and terminations. Both append to the
//! session's log and leave the rest to the projector, so that the log alone decides who was first.

use std::time::Duration;

use bus::{RpcError, log::AppendError};
use bytes::Bytes;
use contract::{
    session::{self, SessionEvent, TurnEnded, TurnStarted, session_event::Kind},
    subject, topology,
};
use prost::Message as _;
use rules::{
    chain,
    ending::{self, Ending, Log, Step},
    state::DEADLINE,
};
use sqlx::Row as _;
use tokio_util::sync::CancellationToken;
use types::{Backoff, InputId, Partition, SessionId, Timestamp};
use uuid::Uuid;

use crate::{
    Scheduler,
    dispatch::outbox::enqueue,
    inputs::{self, At},
    log::{event_log, positions, projection},
    sessions::row::partition,
    unsigned,
};

const EVERY: Duration = Duration::from_secs(1);
const BATCH: i64 = 100;
/// Appends that were overtaken by another writer.
const ATTEMPTS: u32 = 20;
const RETRY: Backoff =
    Backoff { base: Duration::from_millis(5), max: Duration::from_millis(100), attempts: u32::MAX };
/// A turn whose deadline is over by so much is ended without the log: the bus has been away all
/// this time.
const WITHOUT_LOG_AFTER: Duration = Duration::from_secs(15 * 60);

/// The result of an attempt to end a turn or session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended {
    /// The end is in the log, with this id.
    Here(u64),
    /// The log had ended before.
    Before,
    /// Not possible now: the projector is behind, the stream has to be recreated, or others keep
    /// writing.
    Later,
}

/// Appends an end to a session's log, if the log is still where it is thought to be.
///
/// # Errors
/// When Postgres or the bus does not answer.
pub async fn append(
    scheduler: &Scheduler,
    session: SessionId,
    partition: Partition,
    ending: Ending,
    turn: u32,
    kind: &Kind,
) -> Result<Appended, RpcError> {
    let (stream, log) =
        (topology::events(partition).name, subject::session_log(session, partition));
    let unavailable = || RpcError::unavailable("The event log");
    let mut sent: Option<Vec<u8>> = None;
    for attempt in 1..=ATTEMPTS {
        let projected = projected_through(scheduler, partition).await?;
        let streamed = scheduler.bus.last(stream, &log).await.map_err(|_| unavailable())?;
        let streamed = streamed.map(|entry| (entry.sequence, entry.payload));
        // Read last: what the projector has passed is persisted by now.
        let persisted = event_log::newest(&scheduler.pool, session)
            .await?
            .map(|event| (event.event_id, event.payload));
        let (streamed_event, persisted_event) = (decode(&streamed)?, decode(&persisted)?);
        let state = Log {
            streamed: streamed_event.as_ref().map(|(id, event)| (*id, event)),
            persisted: persisted_event.as_ref().map(|(id, event)| (*id, event)),
            projected,
        };
        let (expected, follows) = match (ending::step(ending, state), &streamed) {
            (Step::Ended, Some((id, payload))) if sent.as_deref() == Some(payload.as_ref()) => {
                return Ok(Appended::Here(*id));
            }
            (Step::Ended, _) => return Ok(Appended::Before),
            (Step::Wait, _) => return Ok(Appended::Later),
            (Step::Append { expected, follows }, _) => (expected, follows),
        };
        let newest = [&streamed_event, &persisted_event]
            .into_iter()
            .flatten()
            .find(|(id, _)| *id == follows.id);
        let newest = newest.map(|(_, event)| event);
        let event = SessionEvent {
            turn,
            epoch: 0,
            checkpoint: newest.and_then(|event| event.checkpoint.clone()),
            follows: Some(follows.id),
            follows_tag: follows.tag,
            tag: Uuid::new_v4().as_u64_pair().1,
            at_us: chain::next_time(newest, Timestamp::now().unix_micros()),
            kind: Some(kind.clone()),
        };
        let payload = event.encode_to_vec();
        let floor = persisted.map_or(0, |(id, _)| id);
        match scheduler.bus.append(log.clone(), payload.clone().into(), expected).await {
            Ok(sequence) if sequence > floor => return Ok(Appended::Here(sequence)),
            // Below ids that were used: the stream was set back, and is about to be recreated.
            Ok(_) => return Ok(Appended::Later),
            Err(AppendError::Superseded) => {}
            Err(AppendError::Unacknowledged(error)) => {
                tracing::debug!(%session, %error, "the turn's end was not acknowledged; checking the log");
            }
        }
        sent = Some(payload);
        tokio::time::sleep(RETRY.jittered(attempt)).await;
    }
    Ok(Appended::Later)
}

async fn projected_through(scheduler: &Scheduler, partition: Partition) -> Result<u64, RpcError> {
    positions::projected_through(&scheduler.pool, partition).await.map_err(Into::into)
}

fn decode(event: &Option<(u64, Bytes)>) -> Result<Option<(u64, SessionEvent)>, RpcError> {
    let Some((id, payload)) = event else { return Ok(None) };
    let event = SessionEvent::decode(payload.clone())
        .map_err(|_| RpcError::internal("the newest event cannot be read by this release"))?;
    Ok(Some((*id, event)))
}

pub const DUE: &str =
    "exists (select from turn where status in ('pending', 'running') and deadline_at < now() and waiting_since is null)
     or exists (select from permission_request where status = 'open' and answer_id is null and decide_after < now())";

/// Ends turns that no one ended by their deadline. Takes no input and asks the table each time, so
/// that it does the same after a crash as on any other day.
pub async fn run_deadlines(scheduler: Scheduler, stop: CancellationToken) {
    let mut ticks = service::ticks(EVERY);
    let mut next = async || {
        ticks.tick().await;
        scheduler.due.endings.notified().await;
        ticks.reset();
    };
    while stop.run_until_cancelled(next()).await.is_some() {
        match tokio::time::timeout(Duration::from_secs(30), end_overdue(&scheduler)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(%error, "failed to look for overdue turns; will retry")
            }
            Err(_) => tracing::warn!("looking for overdue turns took too long; will retry"),
        }
        match tokio::time::timeout(
            Duration::from_secs(30),
            inputs::requests::decide_overdue(&scheduler),
        )
        .await
        {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(%error, "failed to look for overdue permission requests; will retry")
            }
            Err(_) => {
                tracing::warn!("looking for overdue permission requests took too long; will retry")
            }
        }
    }
}

#[derive(Debug)]
struct Overdue {
    session: SessionId,
    partition: Partition,
    turn: u32,
    message: String,
    /// Whether the log is waited for no longer.
    without_log: bool,
    /// What its agent would have begun with.
    unstarted: Option<TurnStarted>,
}

async fn end_overdue(scheduler: &Scheduler) -> Result<(), RpcError> {
    let rows = sqlx::query(
        "select t.session_id, t.turn_number, t.timeout_seconds, t.status, t.handed_back_reason, s.event_partition,
                t.deadline_at < now() - make_interval(secs => $2), t.failures, t.prompt, t.input_id
         from turn t
         join session s using (session_id)
         where t.status in ('pending', 'running') and t.deadline_at < now() and t.waiting_since is null
         order by t.deadline_at
         limit $1",
    )
    .bind(BATCH)
    .bind(WITHOUT_LOG_AFTER.as_secs_f64())
    .fetch_all(&scheduler.pool)
    .await?;
    for row in rows {
        let overdue = overdue(&row)?;
        let ended = end(scheduler, &overdue).await;
        if let Err(error) = ended {
            tracing::warn!(session = %overdue.session, turn = overdue.turn, %error, "failed to end an overdue turn; will retry");
        }
    }
    Ok(())
}

fn overdue(row: &sqlx::postgres::PgRow) -> Result<Overdue, RpcError> {
    let read = || -> Result<_, sqlx::Error> {
        let (id, turn, timeout): (Uuid, i32, i32) =
            (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let (status, reason): (&str, Option<&str>) = (row.try_get(3)?, row.try_get(4)?);
        let (number, without_log, failures): (i16, bool, i32) =
            (row.try_get(5)?, row.try_get(6)?, row.try_get(7)?);
        let (prompt, input): (String, Option<Uuid>) = (row.try_get(8)?, row.try_get(9)?);
        let input_id = input.map(|id| InputId::from_uuid(id).to_string()).unwrap_or_default();
        Ok((
            id,
            turn,
            timeout,
            status,
            reason,
            number,
            without_log,
            failures,
            TurnStarted { prompt, input_id, ..TurnStarted::default() },
        ))
    };
    let (id, turn, timeout, status, reason, number, without_log, failures, begin) = read()?;
    let unstarted = (status == "pending").then_some(begin);
    let message = match (status, unsigned(failures) > rules::ownership::FAILURES_MAX) {
        (_, true) => {
            let reason = reason.map(|reason| format!(": {reason}")).unwrap_or_default();
            format!("Given up after {} attempts{reason}", rules::ownership::FAILURES_MAX)
        }
        ("pending", _) => format!(
            "Turn could not be started in time: {}",
            reason.unwrap_or("no runner finished setting it up")
        ),
        _ => format!("Turn timed out after {timeout}s"),
    };
    Ok(Overdue {
        session: SessionId::from_uuid(id),
        partition: partition(number)?,
        turn: unsigned(turn),
        message,
        without_log,
        unstarted,
    })
}

async fn end(scheduler: &Scheduler, overdue: &Overdue) -> Result<(), RpcError> {
    let failure = session::Failure { stage: DEADLINE.to_owned(), message: overdue.message.clone() };
    let unstarted = overdue.unstarted.clone();
    let kind =
        Kind::TurnEnded(TurnEnded { failure: Some(failure), unstarted, ..TurnEnded::default() });
    let (session, turn) = (overdue.session, overdue.turn);
    let appended =
        append(scheduler, session, overdue.partition, Ending::Deadline { turn }, turn, &kind).await;
    match appended {
        Ok(Appended::Here(_)) => {
            metrics::counter!("aod_deadline_settlements_total").increment(1);
            tracing::info!(%session, turn, message = overdue.message, "ended an overdue turn");
            Ok(())
        }
        _ if overdue.without_log => {
            tracing::error!(%session, turn, "ended an overdue turn without its log, which could not be written for too long");
            metrics::counter!("aod_deadline_settlements_total").increment(1);
            let mut tx = scheduler.pool.begin().await?;
            let at = At::new(0, Timestamp::now().unix_micros());
            let observation =
                projection::apply(&mut tx, session, turn, &kind, at).await?.observation;
            let event = SessionEvent {
                turn,
                at_us: Timestamp::now().unix_micros(),
                kind: Some(kind),
                ..SessionEvent::default()
            };
            enqueue(&mut tx, &subject::session_log(session, overdue.partition), &event).await?;
            tx.commit().await?;
            scheduler.due.outbox.notify_one();
            if let Some(observation) = observation {
                observation.count();
            }
            Ok(())
        }
        Ok(Appended::Before | Appended::Later) => Ok(()),
        Err(error) => Err(error),
    }
}
