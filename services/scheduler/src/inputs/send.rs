//! Events that a user sends together, of any kind: all take effect, or none does.

use bus::RpcError;
use contract::{
    scheduler::{
        Input, PromptRequest, QueuedInputs, SendEventsReply, SendEventsRequest, SentMessage,
        sent_event::Kind as Sent,
    },
    subject,
};
use prost::Message as _;
use rules::inputs::Change;
use sqlx::PgConnection;
use types::{InputKind, SessionId, SessionStatus, UserId};

use crate::{
    Scheduler,
    db::idempotency,
    inputs::{
        New, change,
        interrupts::{interrupt_in, open_interrupt},
        queue::enqueue,
        requests::{answer, awaited, decide_in},
        whose,
    },
    micros,
    sessions::{
        quota,
        row::{SessionRow, lock, missing},
        turns,
    },
    unsigned,
};

/// Events that are sent together: all take effect, or none does.
pub async fn send(
    scheduler: Scheduler,
    request: SendEventsRequest,
) -> Result<SendEventsReply, RpcError> {
    let (user, id) = whose(&request.user_id, &request.session_id)?;
    let reply = idempotency::retried(|| async {
        let mut tx = scheduler.pool.begin().await?;
        let outcome = send_in(&mut tx, user, id, &request).await;
        idempotency::finish(tx, outcome).await
    })
    .await?;
    scheduler.due.outbox.notify_one();
    scheduler.bus.hint(subject::inputs_hint(id)).await;
    let queued: Vec<Input> =
        reply.inputs.iter().filter(|input| input.settled_at_us.is_none()).cloned().collect();
    if !reply.replayed && !queued.is_empty() {
        scheduler
            .bus
            .publish_hint(
                subject::queued_inputs(id),
                QueuedInputs { inputs: queued, ..QueuedInputs::default() }.encode_to_vec().into(),
            )
            .await;
    }
    Ok(reply)
}

async fn send_in(
    tx: &mut PgConnection,
    user: UserId,
    id: SessionId,
    request: &SendEventsRequest,
) -> Result<SendEventsReply, RpcError> {
    let route = format!("sessions/{id}/events");
    if let Some(reply) =
        idempotency::earlier::<SendEventsReply>(tx, user, &route, request.once.as_ref()).await?
    {
        return Ok(SendEventsReply { replayed: true, ..reply });
    }
    let mut reply = SendEventsReply::default();
    for event in &request.events {
        let session = lock(tx, id, Some(user)).await?.ok_or_else(missing)?;
        if session.status()? == SessionStatus::Terminated {
            return Err(RpcError::conflict("Session is terminated and takes no more events")
                .because("session_terminated"));
        }
        let input = match &event.kind {
            Some(Sent::Message(message)) => send_message(tx, session, message, request).await?,
            Some(Sent::Interrupt(_))
                if session.status()?.is_active()
                    && open_interrupt(tx, &session).await?.is_none() =>
            {
                interrupt_in(tx, &session, &request.key_id).await?
            }
            // Nothing is to be interrupted, or is being interrupted already. Each event has an id
            // of its own.
            Some(Sent::Interrupt(_)) => {
                let row = New::of(InputKind::Interrupt, &request.key_id).insert(tx, id).await?;
                change(tx, row.input_id, Change::Applied, "", None).await?;
                Input { settled_at_us: Some(micros(row.created_at)), ..Input::from(row) }
            }
            Some(Sent::Decision(decision)) => decide_in(tx, &session, decision, &request.key_id)
                .await
                .map(|(_, answer)| answer)
                .map_err(not_pending)?,
            Some(Sent::ToolResult(result)) => {
                let row = awaited(tx, id, result.request_id, true).await.map_err(not_pending)?;
                let (kind, turn) = (InputKind::ToolResult, unsigned(row.turn_number));
                let new = New {
                    text: &result.text,
                    is_error: result.is_error,
                    ..New::of(kind, &request.key_id)
                };
                answer(tx, id, turn, result.request_id, new).await?.into()
            }
            None => return Err(RpcError::invalid("Unknown event")),
        };
        reply.inputs.push(input);
    }
    idempotency::remember(tx, user, &route, request.once.as_ref(), &reply).await?;
    Ok(reply)
}

/// Names why an answer was refused that no one waits for.
fn not_pending(failure: RpcError) -> RpcError {
    let is_other = !matches!(failure.code, types::ErrorCode::NotFound | types::ErrorCode::Conflict);
    if is_other {
        failure
    } else {
        RpcError::conflict(failure.message).because("tool_use_not_pending")
    }
}

/// Begins a turn of a session that is not busy, also of one whose turn failed; else it is queued.
async fn send_message(
    tx: &mut PgConnection,
    session: SessionRow,
    message: &SentMessage,
    request: &SendEventsRequest,
) -> Result<Input, RpcError> {
    let prompt = PromptRequest {
        prompt: message.text.clone(),
        timeout_seconds: request.timeout_seconds,
        key_id: request.key_id.clone(),
        ..PromptRequest::default()
    };
    if session.status()?.is_active() {
        return enqueue(tx, &session, &prompt, false).await;
    }
    if session.sprite_destroyed_at.is_some() {
        return Err(RpcError::conflict("The session's sandbox is gone; start a new session")
            .because("session_terminated"));
    }
    // A gateway of an earlier release sends none.
    if let Some(limit) = request.session_limit {
        quota::enforce(tx, UserId::from_uuid(session.user_id), limit).await?;
    }
    let (id, turn) = (SessionId::from_uuid(session.session_id), session.turn_count + 1);
    let new = New {
        text: &prompt.prompt,
        timeout_seconds: prompt.timeout_seconds,
        ..New::of(InputKind::Message, &prompt.key_id)
    };
    let row = new.of_turn(turn).insert(tx, id).await?;
    let input = Some(row.input_id);
    turns::begin(tx, &session, &prompt.prompt, prompt.timeout_seconds, input).await?;
    Ok(row.into())
}
