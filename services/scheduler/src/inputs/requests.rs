//! What an agent asks its user: permission requests, and calls of custom tools, with their answers.

use std::collections::HashMap;

use bus::RpcError;
use contract::{
    scheduler::{
        DecideRequest, Input, ListPermissionRequestsReply, ListPermissionRequestsRequest,
        PermissionRequest, SentDecision,
    },
    subject,
};
use sqlx::PgConnection;
use time::OffsetDateTime;
use types::{InputKind, RequestStatus, Runtime, SessionId, Verdict, limits::PAGE_MAX};
use uuid::Uuid;

use crate::{
    Scheduler,
    db::page::List,
    inputs::{InputRow, New, check_owner, input_columns, whose},
    micros,
    sessions::row::{SessionRow, lock, missing},
    unsigned,
};

#[derive(sqlx::FromRow)]
pub(super) struct RequestRow {
    request_id: i64,
    pub(super) turn_number: i32,
    tool: String,
    input_json: String,
    diff: String,
    reason: String,
    status: String,
    answer_id: Option<Uuid>,
    created_at: OffsetDateTime,
    settled_at: Option<OffsetDateTime>,
}

const REQUEST_COLUMNS: &str = "request_id, turn_number, tool, input_json, diff, reason, status, answer_id, created_at, settled_at";

impl RequestRow {
    fn with_answer(self, answer: Option<Input>) -> PermissionRequest {
        PermissionRequest {
            request_id: self.request_id.cast_unsigned(),
            turn: unsigned(self.turn_number),
            tool: self.tool,
            input_json: self.input_json,
            diff: self.diff,
            reason: self.reason,
            status: self.status,
            created_at_us: micros(self.created_at),
            settled_at_us: self.settled_at.map(micros),
            answer,
        }
    }
}

/// Writes a decision, and that it answers a request.
pub(super) async fn answer(
    tx: &mut PgConnection,
    session: SessionId,
    turn: u32,
    request: u64,
    new: New<'_>,
) -> Result<InputRow, RpcError> {
    let new = New { turn: i32::try_from(turn).ok(), request: Some(request.cast_signed()), ..new };
    let row = new.insert(tx, session).await?;
    sqlx::query(
        "update permission_request set answer_id = $3 where session_id = $1 and request_id = $2",
    )
    .bind(session.uuid())
    .bind(request.cast_signed())
    .bind(row.input_id)
    .execute(tx)
    .await?;
    Ok(row)
}

pub async fn list(
    scheduler: Scheduler,
    request: ListPermissionRequestsRequest,
) -> Result<ListPermissionRequestsReply, RpcError> {
    let (user, id) = whose(&request.user_id, &request.session_id)?;
    check_owner(&scheduler, user, id).await?;
    let before = request.after.as_ref().map_or(i64::MAX, |cursor| cursor.position);
    let list = List {
        keys: "select request_id from permission_request
               where session_id = $1 and request_id < $3 and ($4::text is null or status = $4) and not is_custom_tool
               order by request_id desc limit $2 + 1",
        table: "permission_request",
        by_key: "session_id = $1 and request_id",
        bytes: "octet_length(input_json) + octet_length(diff) + octet_length(reason) + 5000",
        columns: REQUEST_COLUMNS,
    };
    let limit = i64::from(request.limit.clamp(1, PAGE_MAX));
    let page = list.read(&scheduler.pool, |query| {
        query.bind(id.uuid()).bind(limit).bind(before).bind(request.status.clone())
    });
    let (rows, has_more): (Vec<RequestRow>, _) = page.await?;
    let answers: Vec<Uuid> = rows.iter().filter_map(|row| row.answer_id).collect();
    let answers: Vec<InputRow> = sqlx::query_as(concat!(
        "select ",
        input_columns!(),
        " from input where input_id = any($1)"
    ))
    .bind(answers)
    .fetch_all(&scheduler.pool)
    .await?;
    let mut answers: HashMap<Uuid, Input> =
        answers.into_iter().map(|row| (row.input_id, row.into())).collect();
    let requests = rows.into_iter().map(|row| {
        let answer = row.answer_id.and_then(|id| answers.remove(&id));
        row.with_answer(answer)
    });
    Ok(ListPermissionRequestsReply { requests: requests.collect(), has_more })
}

/// A request's row, locked.
async fn request_row(
    tx: &mut PgConnection,
    session: SessionId,
    request: u64,
    is_custom_tool: bool,
) -> Result<Option<RequestRow>, RpcError> {
    let row = sqlx::query_as(
        "select request_id, turn_number, tool, input_json, diff, reason, status, answer_id, created_at, settled_at
         from permission_request where session_id = $1 and request_id = $2 and is_custom_tool = $3 for update",
    );
    Ok(row
        .bind(session.uuid())
        .bind(request.cast_signed())
        .bind(is_custom_tool)
        .fetch_optional(tx)
        .await?)
}

/// A request that has no answer yet; its row is locked.
pub(super) async fn awaited(
    tx: &mut PgConnection,
    session: SessionId,
    request: u64,
    is_custom_tool: bool,
) -> Result<RequestRow, RpcError> {
    let row = request_row(tx, session, request, is_custom_tool)
        .await?
        .ok_or_else(|| RpcError::not_found("Request not found"))?;
    if row.answer_id.is_some() {
        return Err(RpcError::conflict("Request has been answered already"));
    }
    if row.status != RequestStatus::Open.as_str() {
        return Err(RpcError::conflict("Request is not open any more"));
    }
    Ok(row)
}

pub async fn decide(
    scheduler: Scheduler,
    request: DecideRequest,
) -> Result<PermissionRequest, RpcError> {
    let (user, id) = whose(&request.user_id, &request.session_id)?;
    let mut tx = scheduler.pool.begin().await?;
    let session = lock(&mut tx, id, Some(user)).await?.ok_or_else(missing)?;
    let sent = SentDecision {
        request_id: request.request_id,
        verdict: request.verdict,
        deny_message: request.message,
    };
    let (row, answer) = decide_in(&mut tx, &session, &sent, &request.key_id).await?;
    tx.commit().await?;
    scheduler.bus.hint(subject::inputs_hint(id)).await;
    Ok(row.with_answer(Some(answer)))
}

pub(super) async fn decide_in(
    tx: &mut PgConnection,
    session: &SessionRow,
    sent: &SentDecision,
    key_id: &str,
) -> Result<(RequestRow, Input), RpcError> {
    let id = SessionId::from_uuid(session.session_id);
    let verdict: Verdict =
        sent.verdict.parse().map_err(|()| RpcError::invalid("Unknown decision"))?;
    let row = awaited(tx, id, sent.request_id, false).await?;
    let runtime: Runtime = session
        .runtime
        .parse()
        .map_err(|()| RpcError::internal("a session has an unknown runtime"))?;
    if !sent.deny_message.is_empty() && !runtime.capabilities().deny_with_message {
        let message = format!("Runtime {runtime} cannot pass on the message of a denial");
        return Err(RpcError::new(types::ErrorCode::Unprocessable, message));
    }
    let new = New {
        verdict: Some(verdict),
        deny_message: &sent.deny_message,
        ..New::of(InputKind::Decision, key_id)
    };
    let answer = answer(tx, id, unsigned(row.turn_number), sent.request_id, new).await?;
    Ok((row, answer.into()))
}

/// Decides requests whose users did not in time, as their agents say.
pub async fn decide_overdue(scheduler: &Scheduler) -> Result<(), RpcError> {
    let overdue: Vec<(Uuid, i64)> = sqlx::query_as(
        "select session_id, request_id from permission_request
         where status = 'open' and answer_id is null and decide_after < now()
         order by decide_after limit 100",
    )
    .fetch_all(&scheduler.pool)
    .await?;
    for (session, request) in overdue {
        let session = SessionId::from_uuid(session);
        if let Err(error) = decide_by_default(scheduler, session, request.cast_unsigned()).await {
            tracing::warn!(session_id = %session, request_id = request, %error, "failed to decide an overdue permission request; will retry");
        }
    }
    Ok(())
}

async fn decide_by_default(
    scheduler: &Scheduler,
    id: SessionId,
    request: u64,
) -> Result<(), RpcError> {
    let mut tx = scheduler.pool.begin().await?;
    if lock(&mut tx, id, None).await?.is_none() {
        return Ok(());
    }
    let Some(row) = request_row(&mut tx, id, request, false).await? else { return Ok(()) };
    if row.answer_id.is_some() || row.status != RequestStatus::Open.as_str() {
        return Ok(());
    }
    let how: Option<String> = sqlx::query_scalar(
        "select on_timeout from permission_request where session_id = $1 and request_id = $2",
    )
    .bind(id.uuid())
    .bind(request.cast_signed())
    .fetch_one(&mut *tx)
    .await?;
    let verdict = how.and_then(|how| how.parse().ok()).unwrap_or(Verdict::Deny);
    let new = New { verdict: Some(verdict), ..New::of(InputKind::Decision, "") };
    answer(&mut tx, id, unsigned(row.turn_number), request, new).await?;
    tx.commit().await?;
    scheduler.bus.hint(subject::inputs_hint(id)).await;
    tracing::info!(session_id = %id, request_id = request, %verdict, "decided a permission request that was not answered in time");
    Ok(())
}
