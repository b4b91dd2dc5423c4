//! What events of a session's log change of its inputs and of the requests of its agent.

use bus::RpcError;
use contract::{
    host::{DecisionRequested, InputSettled},
    session::{DecisionSettled, TurnEnded, session_event::Kind},
};
use rules::inputs::{self, Change, Clock};
use sqlx::{PgConnection, Row as _};
use time::OffsetDateTime;
use types::{InputId, InputKind, Permissions, RequestStatus, SessionId};

use crate::{
    inputs::{At, New, change, locked, open, requests::answer},
    micros,
    sessions::row::SessionRow,
    without_nul,
};

/// Whether an event is about inputs and requests alone.
pub fn concerns(kind: &Kind) -> bool {
    matches!(kind, Kind::DecisionRequested(_) | Kind::DecisionSettled(_) | Kind::InputSettled(_))
}

/// Applies an event that [`concerns`] inputs and requests. The session's row is locked.
pub async fn apply(
    tx: &mut PgConnection,
    session: &SessionRow,
    turn: u32,
    kind: &Kind,
    at: At,
) -> Result<(), RpcError> {
    let id = SessionId::from_uuid(session.session_id);
    match kind {
        Kind::InputSettled(event) => match &event.settled {
            Some(settled) => input_settled(tx, id, turn, settled, at).await,
            None => Ok(()),
        },
        Kind::DecisionRequested(event) => match &event.request {
            Some(request) => requested(tx, id, turn, event.tool_use, request, at).await,
            None => Ok(()),
        },
        Kind::DecisionSettled(event) => request_settled(tx, id, turn, event, at).await,
        _ => Ok(()),
    }
}

async fn input_settled(
    tx: &mut PgConnection,
    session: SessionId,
    turn: u32,
    settled: &InputSettled,
    at: At,
) -> Result<(), RpcError> {
    let Ok(input) = settled.id.parse::<InputId>() else { return Ok(()) };
    let Some(row) = locked(tx, session, input).await? else { return Ok(()) };
    change(
        tx,
        row.input_id,
        inputs::settled(row.rule()?, turn, settled.outcome()),
        &settled.message,
        Some(at),
    )
    .await
}

/// The clock of a turn that is not settled yet; its row is locked.
async fn clock(
    tx: &mut PgConnection,
    session: SessionId,
    turn: u32,
) -> Result<Option<Clock>, RpcError> {
    let row = sqlx::query(
        "select deadline_at, waiting_since from turn
         where session_id = $1 and turn_number = $2 and status in ('pending', 'running')
         for update",
    )
    .bind(session.uuid())
    .bind(i32::try_from(turn).unwrap_or(i32::MAX))
    .fetch_optional(tx)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let (deadline, waiting_since): (OffsetDateTime, Option<OffsetDateTime>) =
        (row.try_get(0)?, row.try_get(1)?);
    Ok(Some(Clock { deadline: micros(deadline), waiting_since: waiting_since.map(micros) }))
}

async fn set_clock(
    tx: &mut PgConnection,
    session: SessionId,
    turn: u32,
    clock: Clock,
) -> Result<(), RpcError> {
    let time = |us: i64| {
        OffsetDateTime::from_unix_timestamp_nanos(i128::from(us) * 1000).map_err(RpcError::internal)
    };
    sqlx::query("update turn set deadline_at = $3, waiting_since = $4 where session_id = $1 and turn_number = $2")
        .bind(session.uuid())
        .bind(i32::try_from(turn).unwrap_or(i32::MAX))
        .bind(time(clock.deadline)?)
        .bind(clock.waiting_since.map(time).transpose()?)
        .execute(tx)
        .await?;
    Ok(())
}

async fn requested(
    tx: &mut PgConnection,
    session: SessionId,
    turn: u32,
    tool_use: u64,
    request: &DecisionRequested,
    at: At,
) -> Result<(), RpcError> {
    let Some(clock) = clock(tx, session, turn).await? else { return Ok(()) };
    let permissions: Option<serde_json::Value> = sqlx::query_scalar(
        "select av.permissions from session s join agent_version av on av.agent_id = s.agent_id and av.version = s.agent_version
         where s.session_id = $1",
    )
    .bind(session.uuid())
    .fetch_optional(&mut *tx)
    .await?
    .flatten();
    let permissions: Permissions =
        permissions.and_then(|json| serde_json::from_value(json).ok()).unwrap_or_default();
    // A request whose tool use is not in the log is known by its own event.
    let id = if tool_use > 0 { tool_use } else { at.event_id };
    let (tool, input_json) = (without_nul(&request.tool), without_nul(&request.input_json));
    sqlx::query(
        "insert into permission_request as r (session_id, request_id, journal_id, turn_number, tool, input_json, diff, reason, status,
                                              decide_after, on_timeout, is_custom_tool)
         values ($1, $2, $3, $4, $5, $6, $7, $8, 'open', now() + make_interval(secs => $9), $10, $11)
         on conflict (session_id, request_id) do update
         set journal_id = excluded.journal_id, turn_number = excluded.turn_number, status = 'open', answer_id = null, settled_at = null,
             decide_after = excluded.decide_after",
    )
    .bind(session.uuid())
    .bind(id.cast_signed())
    .bind(request.id.cast_signed())
    .bind(i32::try_from(turn).unwrap_or(i32::MAX))
    .bind(&tool)
    .bind(&input_json)
    .bind(without_nul(&request.diff))
    .bind(without_nul(&request.reason))
    // Only its user knows what a custom tool returns.
    .bind(permissions.timeout_seconds.map(f64::from).filter(|_| !request.is_custom_tool))
    .bind(permissions.on_timeout.map_or("deny", types::permissions::TimeoutDecision::as_str))
    .bind(request.is_custom_tool)
    .execute(&mut *tx)
    .await?;
    set_clock(tx, session, turn, clock.asked(at.us)).await?;
    if request.is_custom_tool {
        return Ok(());
    }
    answer_again(tx, session, turn, id, &tool, &input_json).await
}

/// An answer that a lost agent did not receive is sent again when the same is asked again.
async fn answer_again(
    tx: &mut PgConnection,
    session: SessionId,
    turn: u32,
    id: u64,
    tool: &str,
    input_json: &str,
) -> Result<(), RpcError> {
    let earlier = sqlx::query(
        "select r.request_id, i.verdict, i.deny_message, i.key_id
         from permission_request r join input i on i.input_id = r.answer_id
         where r.session_id = $1 and r.turn_number = $2 and r.status = 'void' and r.tool = $3 and r.input_json = $4 and i.status = 'refused'
             and not r.is_custom_tool
         order by r.request_id desc limit 1",
    )
    .bind(session.uuid())
    .bind(i32::try_from(turn).unwrap_or(i32::MAX))
    .bind(tool)
    .bind(input_json)
    .fetch_optional(&mut *tx)
    .await?;
    let Some(earlier) = earlier else { return Ok(()) };
    let verdict = earlier.try_get::<Option<String>, _>(1)?.and_then(|verdict| verdict.parse().ok());
    let deny_message: String = earlier.try_get(2)?;
    let new = New {
        verdict,
        deny_message: &deny_message,
        key: earlier.try_get(3)?,
        ..New::of(InputKind::Decision, "")
    };
    answer(tx, session, turn, id, new).await?;
    sqlx::query(
        "update permission_request set answer_id = null where session_id = $1 and request_id = $2",
    )
    .bind(session.uuid())
    .bind(earlier.try_get::<i64, _>(0)?)
    .execute(tx)
    .await?;
    Ok(())
}

async fn request_settled(
    tx: &mut PgConnection,
    session: SessionId,
    turn: u32,
    event: &DecisionSettled,
    at: At,
) -> Result<(), RpcError> {
    let Some(settled) = &event.settled else { return Ok(()) };
    let Some(status) = inputs::request_settled(settled.how()) else { return Ok(()) };
    let request: Option<i64> = sqlx::query_scalar(
        "update permission_request
         set status = $4, settled_at = now(), answer_id = coalesce($5, answer_id)
         where session_id = $1 and status = 'open' and (request_id = $2 or ($2 = 0 and journal_id = $3))
         returning request_id",
    )
    .bind(session.uuid())
    .bind(event.tool_use.cast_signed())
    .bind(settled.id.cast_signed())
    .bind(status.as_str())
    .bind(settled.input_id.parse::<InputId>().ok().map(InputId::uuid))
    .fetch_optional(&mut *tx)
    .await?;
    if let Ok(answer) = settled.input_id.parse::<InputId>() {
        // This event shows the answer, whichever told first what became of it.
        sqlx::query("update input set settled_by = $3 where input_id = $1 and session_id = $2")
            .bind(answer.uuid())
            .bind(session.uuid())
            .bind(at.event_id.cast_signed())
            .execute(&mut *tx)
            .await?;
    }
    let Some(request) = request else { return Ok(()) };
    if matches!(status, RequestStatus::Void | RequestStatus::Withdrawn) {
        // A decision on its way finds no one who asks.
        for row in open(tx, session).await?.iter().filter(|row| row.request_id == Some(request)) {
            change(tx, row.input_id, Change::Refused(Some(inputs::NOT_OPEN)), "", Some(at)).await?;
        }
    }
    let still_open: i64 = sqlx::query_scalar(
        "select count(*) from permission_request where session_id = $1 and status = 'open'",
    )
    .bind(session.uuid())
    .fetch_one(&mut *tx)
    .await?;
    match clock(tx, session, turn).await? {
        Some(clock) => {
            set_clock(
                tx,
                session,
                turn,
                clock.answered(at.us, usize::try_from(still_open).unwrap_or_default()),
            )
            .await
        }
        None => Ok(()),
    }
}

/// Settles what a turn's begin settles. Tells whether inputs wait for the turn's runner.
pub async fn turn_started(
    tx: &mut PgConnection,
    session: SessionId,
    turn: u32,
    at: At,
) -> Result<bool, RpcError> {
    let mut waiting = false;
    for row in open(tx, session).await? {
        let rule = row.rule()?;
        waiting |= rule.is_for(turn);
        change(tx, row.input_id, inputs::turn_started(rule, turn), "", Some(at)).await?;
    }
    Ok(waiting)
}

/// Settles what is left of a turn that ended.
pub async fn turn_ended(
    tx: &mut PgConnection,
    session: SessionId,
    turn: u32,
    ended: &TurnEnded,
    at: At,
) -> Result<(), RpcError> {
    for row in open(tx, session).await? {
        change(tx, row.input_id, inputs::turn_ended(row.rule()?, turn, ended), "", Some(at))
            .await?;
    }
    Ok(())
}

/// A turn that ended no longer asks.
pub async fn void_requests(tx: &mut PgConnection, session: SessionId) -> Result<(), RpcError> {
    sqlx::query("update permission_request set status = 'void', settled_at = now() where session_id = $1 and status = 'open'")
        .bind(session.uuid())
        .execute(&mut *tx)
        .await?;
    Ok(())
}
