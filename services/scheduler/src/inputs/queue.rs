//! Messages for a session that is busy: they wait for the end of its turn, and the oldest begins
//! the next one.

use bus::RpcError;
use contract::scheduler::{ChangeInputRequest, Input, PromptRequest, WithdrawInputRequest};
use rules::inputs::{self, Change, Next};
use sqlx::PgConnection;
use types::{
    InputId, InputKind, InputStatus, SessionId, SessionStatus,
    limits::{QUEUED_BYTES_MAX, QUEUED_INPUTS_MAX},
};

use crate::{
    Scheduler,
    inputs::{At, InputRow, New, change, input_columns, input_missing, locked, open, whose},
    sessions::{
        row::{SessionRow, lock, missing},
        turns,
    },
    unsigned,
};

/// A message for a session that is busy.
pub async fn enqueue(
    tx: &mut PgConnection,
    session: &SessionRow,
    request: &PromptRequest,
    steers: bool,
) -> Result<Input, RpcError> {
    let id = SessionId::from_uuid(session.session_id);
    let (count, bytes): (i64, i64) = sqlx::query_as(
        "select count(*), coalesce(sum(octet_length(text)), 0)::bigint from input
         where session_id = $1 and kind = 'message' and status in ('queued', 'delivered')",
    )
    .bind(id.uuid())
    .fetch_one(&mut *tx)
    .await?;
    check_queue(count, bytes, request.prompt.len())?;
    let new = New {
        text: &request.prompt,
        timeout_seconds: request.timeout_seconds,
        steers,
        turn: steers.then_some(session.turn_count),
        ..New::of(InputKind::Message, &request.key_id)
    };
    Ok(new.insert(tx, id).await?.into())
}

fn check_queue(count: i64, bytes: i64, more: usize) -> Result<(), RpcError> {
    if count >= QUEUED_INPUTS_MAX as i64 {
        return Err(RpcError::conflict(format!(
            "{QUEUED_INPUTS_MAX} messages are queued already: withdraw one or wait"
        )));
    }
    if usize::try_from(bytes).unwrap_or(usize::MAX).saturating_add(more) > QUEUED_BYTES_MAX {
        return Err(RpcError::conflict(format!(
            "The queued messages would hold more than {QUEUED_BYTES_MAX} bytes together"
        )));
    }
    Ok(())
}

/// The messages of a new session that wait for the end of its first turn.
pub async fn enqueue_others(
    tx: &mut PgConnection,
    session: SessionId,
    others: &[String],
    timeout_seconds: u32,
    key_id: &str,
) -> Result<(), RpcError> {
    check_queue(others.len() as i64, 0, others.iter().map(String::len).sum())?;
    for text in others {
        let new = New { text, timeout_seconds, ..New::of(InputKind::Message, key_id) };
        new.insert(tx, session).await?;
    }
    Ok(())
}

/// Begins the next turn from the oldest queued message, or refuses the queued messages. `session`
/// is as the turn's end left it, and `at` is where that stands, if it is known.
pub async fn begin_next(
    tx: &mut PgConnection,
    session: &SessionRow,
    at: Option<At>,
) -> Result<(), RpcError> {
    let id = SessionId::from_uuid(session.session_id);
    let status: SessionStatus = session.status()?;
    match inputs::next(status, session.sprite_destroyed_at.is_none()) {
        Next::Nothing => Ok(()),
        Next::Refuse(reason) => {
            for row in open(tx, id).await? {
                change(tx, row.input_id, Change::Refused(Some(reason)), "", at).await?;
            }
            Ok(())
        }
        Next::Begin => {
            let waiting = open(tx, id).await?;
            for row in waiting {
                if row.rule()?.is_queued() {
                    return begin(tx, session, row).await;
                }
            }
            Ok(())
        }
    }
}

async fn begin(
    tx: &mut PgConnection,
    session: &SessionRow,
    input: InputRow,
) -> Result<(), RpcError> {
    let turn = session.turn_count + 1;
    // A message that a host knows by its id already would be ignored as a repetition.
    let input_id = input.delivered_at.is_none().then_some(input.input_id);
    turns::begin(tx, session, &input.text, unsigned(input.timeout_seconds), input_id).await?;
    sqlx::query(
        "update input set status = 'delivered', turn_number = $2, delivered_at = coalesce(delivered_at, now()) where input_id = $1",
    )
    .bind(input.input_id)
    .bind(turn)
    .execute(tx)
    .await?;
    Ok(())
}

/// A message that has not left the queue; its row and the session's are locked.
async fn queued(
    tx: &mut PgConnection,
    user: &str,
    session: &str,
    input: &str,
) -> Result<InputRow, RpcError> {
    let (user, id) = whose(user, session)?;
    lock(tx, id, Some(user)).await?.ok_or_else(missing)?;
    let input: InputId = input.parse().map_err(|_| input_missing())?;
    let row = locked(tx, id, input).await?.ok_or_else(input_missing)?;
    if row.kind != InputKind::Message.as_str() || row.status != InputStatus::Queued.as_str() {
        return Err(RpcError::conflict("Input is not queued any more"));
    }
    Ok(row)
}

pub async fn change_text(
    scheduler: Scheduler,
    request: ChangeInputRequest,
) -> Result<Input, RpcError> {
    let mut tx = scheduler.pool.begin().await?;
    let row = queued(&mut tx, &request.user_id, &request.session_id, &request.input_id).await?;
    let others: i64 = sqlx::query_scalar(
        "select coalesce(sum(octet_length(text)), 0)::bigint from input
         where session_id = (select session_id from input where input_id = $1) and input_id <> $1 and status in ('queued', 'delivered')",
    )
    .bind(row.input_id)
    .fetch_one(&mut *tx)
    .await?;
    check_queue(0, others, request.text.len())?;
    let row: InputRow = sqlx::query_as(concat!(
        "update input set text = $2 where input_id = $1 returning ",
        input_columns!()
    ))
    .bind(row.input_id)
    .bind(&request.text)
    .fetch_one(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(row.into())
}

pub async fn withdraw(
    scheduler: Scheduler,
    request: WithdrawInputRequest,
) -> Result<Input, RpcError> {
    let mut tx = scheduler.pool.begin().await?;
    let row = queued(&mut tx, &request.user_id, &request.session_id, &request.input_id).await?;
    let row: InputRow = sqlx::query_as(concat!(
        "update input set status = 'withdrawn', settled_at = now() where input_id = $1 returning ",
        input_columns!()
    ))
    .bind(row.input_id)
    .fetch_one(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(row.into())
}
