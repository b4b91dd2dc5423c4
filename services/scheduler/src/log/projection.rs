//! Applies an event to its turn, its session and their inputs, in the transaction that persists it.

use bus::RpcError;
use contract::session::{TurnEnded, session_event::Kind};
use rules::state::{self, State, Transition};
use sqlx::{PgConnection, Row as _};
use types::{SessionId, TurnStatus, limits::SETTLE_GRACE};

use crate::{
    dispatch::outbox::{enqueue_destroy, enqueue_lifecycle_event},
    inputs::{self, At},
    metrics::{Observation, Outcome},
    sessions::row::{SessionRow, lock, session_columns},
    unsigned, without_nul,
};

/// What applying an event has changed.
#[derive(Default)]
pub struct Applied {
    pub observation: Option<Observation>,
    /// Inputs wait for the runner of the turn that began.
    pub inputs_wait: bool,
}

/// Applies an event to its turn and session. Idempotent: see [`state::next`].
pub async fn apply(
    tx: &mut PgConnection,
    id: SessionId,
    event_turn: u32,
    kind: &Kind,
    at: At,
) -> Result<Applied, RpcError> {
    let Some(session) = lock(tx, id, None).await? else { return Ok(Applied::default()) };
    if inputs::events::concerns(kind) {
        inputs::events::apply(tx, &session, event_turn, kind, at).await?;
        return Ok(Applied::default());
    }
    let current_turn = unsigned(session.turn_count);
    // A termination ends whichever turn there is.
    let number = if matches!(kind, Kind::Terminated(_)) { current_turn } else { event_turn };
    let turn = sqlx::query(
        "select status, extract(epoch from now() - created_at)::float8, waiting_since is not null,
                exists (select from input where session_id = $1 and status in ('queued', 'delivered'))
         from turn where session_id = $1 and turn_number = $2 for update",
    )
    .bind(id.uuid())
    .bind(i32::try_from(number).unwrap_or(i32::MAX))
    .fetch_optional(&mut *tx)
    .await?;
    let (mut status, mut seconds, mut has_requests, mut has_inputs) = (None, 0.0, false, false);
    if let Some(turn) = turn {
        let text: &str = turn.try_get(0)?;
        status = Some(
            text.parse()
                .map_err(|()| RpcError::internal(format!("a turn has the status {text}")))?,
        );
        (seconds, has_requests, has_inputs) =
            (turn.try_get(1)?, turn.try_get(2)?, turn.try_get(3)?);
    }
    let transition =
        state::next(State { session: session.status()?, current_turn, turn: status }, number, kind);
    if transition == Transition::default() {
        return Ok(Applied::default());
    }
    let ended = match kind {
        Kind::TurnEnded(ended) => ended.clone(),
        _ => TurnEnded::default(),
    };
    if let Some(status) = transition.turn {
        let is_metered = matches!(kind, Kind::TurnStarted(started) if started.is_metered);
        update_turn(tx, id, number, (status, is_metered), &ended).await?;
    }
    let inputs_wait = has_inputs
        && transition.turn == Some(TurnStatus::Running)
        && inputs::events::turn_started(tx, id, number, at).await?;
    if transition.turn.is_some_and(|status| status != TurnStatus::Running) {
        if has_inputs {
            inputs::events::turn_ended(tx, id, number, &ended, at).await?;
        }
        if has_requests {
            inputs::events::void_requests(tx, id).await?;
        }
    }
    let archived = matches!(kind, Kind::Terminated(terminated) if terminated.archived);
    let session = update_session(tx, session, &transition, &ended, archived).await?;
    if transition.session.is_some_and(|status| !status.is_active()) {
        enqueue_lifecycle_event(tx, &session, &session.status, number, ended.usage.clone()).await?;
    }
    if transition.destroy {
        enqueue_destroy(tx, id, &session.sprite).await?;
    }
    if has_inputs {
        inputs::queue::begin_next(tx, &session, Some(at)).await?;
    }
    let runtime = session.runtime;
    let observation = transition.turn.map(|status| match status {
        TurnStatus::Running => Observation::Started { runtime, seconds },
        _ => Observation::Ended { runtime, outcome: Outcome::of(kind), seconds },
    });
    Ok(Applied { observation, inputs_wait })
}

async fn update_turn(
    tx: &mut PgConnection,
    id: SessionId,
    number: u32,
    (status, is_metered): (TurnStatus, bool),
    ended: &TurnEnded,
) -> Result<(), RpcError> {
    let number = i32::try_from(number).unwrap_or(i32::MAX);
    if status == TurnStatus::Running {
        // From here on the turn's own timeout counts, and the set-up's no longer does.
        sqlx::query(
            "update turn set status = $3, started_at = now(), deadline_at = now() + make_interval(secs => timeout_seconds + $4),
                    is_metered = $5
             where session_id = $1 and turn_number = $2",
        )
        .bind(id.uuid())
        .bind(number)
        .bind(status.as_str())
        .bind(SETTLE_GRACE.as_secs_f64())
        .bind(is_metered)
        .execute(tx)
        .await?;
        return Ok(());
    }
    let count = |count: Option<u64>| count.and_then(|count| i64::try_from(count).ok());
    let usage = ended.usage.clone().unwrap_or_default();
    sqlx::query(
        "update turn
         set status = $3, exit_code = $4, ended_at = now(), owner = null, waiting_since = null, input_tokens = $5, output_tokens = $6, cost_micro_usd = $7,
             model_used = $8, cache_read_tokens = $9, cache_write_tokens = $10
         where session_id = $1 and turn_number = $2",
    )
    .bind(id.uuid())
    .bind(number)
    .bind(status.as_str())
    .bind(ended.exit_code)
    .bind(count(usage.input_tokens))
    .bind(count(usage.output_tokens))
    .bind(count(usage.cost_micro_usd))
    .bind(usage.model.as_deref().map(without_nul))
    .bind(count(usage.cache_read_tokens))
    .bind(count(usage.cache_write_tokens))
    .execute(tx)
    .await?;
    Ok(())
}

async fn update_session(
    tx: &mut PgConnection,
    session: SessionRow,
    transition: &Transition,
    ended: &TurnEnded,
    archived: bool,
) -> Result<SessionRow, RpcError> {
    let Some(status) = transition.session else { return Ok(session) };
    let failure = ended.failure.as_ref();
    sqlx::query_as(concat!(
        "update session
         set status = $2, exit_code = coalesce($3, exit_code), failure_stage = coalesce($4, failure_stage),
             failure_message = coalesce($5, failure_message), updated_at = now(),
             archived_at = case when $6 then coalesce(archived_at, now()) else archived_at end
         where session_id = $1
         returning ",
        session_columns!()
    ))
    .bind(session.session_id)
    .bind(status.as_str())
    .bind(ended.exit_code)
    .bind(failure.map(|failure| without_nul(&failure.stage)))
    .bind(failure.map(|failure| without_nul(&failure.message)))
    .bind(archived)
    .fetch_one(tx)
    .await
    .map_err(Into::into)
}
