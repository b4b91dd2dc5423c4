//! Interrupts of the turn that runs.

use bus::RpcError;
use contract::{
    scheduler::{Input, InterruptRequest},
    subject,
};
use sqlx::PgConnection;
use types::{InputKind, SessionId};

use crate::{
    Scheduler,
    db::idempotency,
    inputs::{InputRow, New, open, whose},
    sessions::row::{SessionRow, lock, missing},
};

/// The interrupt of a session's newest turn that is on its way.
pub(super) async fn open_interrupt(
    tx: &mut PgConnection,
    session: &SessionRow,
) -> Result<Option<InputRow>, RpcError> {
    let open = open(tx, SessionId::from_uuid(session.session_id)).await?;
    let is_of_turn = |row: &InputRow| {
        row.kind == InputKind::Interrupt.as_str() && row.turn_number == Some(session.turn_count)
    };
    Ok(open.into_iter().find(is_of_turn))
}

/// Has the running turn interrupted; once, however often it is asked for.
pub async fn interrupt_in(
    tx: &mut PgConnection,
    session: &SessionRow,
    key_id: &str,
) -> Result<Input, RpcError> {
    if let Some(row) = open_interrupt(tx, session).await? {
        return Ok(row.into());
    }
    let id = SessionId::from_uuid(session.session_id);
    let new = New { turn: Some(session.turn_count), ..New::of(InputKind::Interrupt, key_id) };
    Ok(new.insert(tx, id).await?.into())
}

pub async fn interrupt(scheduler: Scheduler, request: InterruptRequest) -> Result<Input, RpcError> {
    let (user, id) = whose(&request.user_id, &request.session_id)?;
    let input = idempotency::retried(|| async {
        let mut tx = scheduler.pool.begin().await?;
        let session = lock(&mut tx, id, Some(user)).await?.ok_or_else(missing)?;
        if !session.status()?.is_active() {
            return Err(RpcError::conflict("No turn is running"));
        }
        let input = interrupt_in(&mut tx, &session, &request.key_id).await?;
        tx.commit().await?;
        Ok(input)
    })
    .await?;
    scheduler.bus.hint(subject::inputs_hint(id)).await;
    Ok(input)
}
