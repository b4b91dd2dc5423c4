//! The inputs of a turn, as its runner fetches them for the agent host.

use std::collections::HashMap;

use bus::RpcError;
use contract::{
    host::{
        self, WhenBusy as HostWhenBusy, decision::Verdict as HostVerdict, input::Kind as HostInput,
    },
    scheduler::{FetchInputsReply, FetchInputsRequest},
};
use sqlx::Row as _;
use types::{
    InputId, InputKind, InputStatus, SessionId, TurnStatus, Verdict, limits::QUEUED_BYTES_MAX,
};

use crate::{
    Scheduler,
    inputs::{InputRow, open},
    sessions::row::{lock, missing},
    unsigned,
};

/// The inputs that a turn's runner sends to the agent host. They are delivered from now on, and
/// again until the log settles them.
pub async fn fetch(
    scheduler: Scheduler,
    request: FetchInputsRequest,
) -> Result<FetchInputsReply, RpcError> {
    let id: SessionId = request.session_id.parse().map_err(|_| missing())?;
    let mut tx = scheduler.pool.begin().await?;
    if lock(&mut tx, id, None).await?.is_none() {
        return Ok(FetchInputsReply::default());
    }
    let turn = sqlx::query("select status, epoch, owner is not null from turn where session_id = $1 and turn_number = $2")
        .bind(id.uuid())
        .bind(i32::try_from(request.turn).unwrap_or(i32::MAX))
        .fetch_optional(&mut *tx)
        .await?;
    let Some(turn) = turn else { return Ok(FetchInputsReply::default()) };
    let (status, epoch, is_owned): (&str, i32, bool) =
        (turn.try_get(0)?, turn.try_get(1)?, turn.try_get(2)?);
    // Before its agent runs, an interrupt would find nothing to interrupt.
    if status != TurnStatus::Running.as_str() || unsigned(epoch) != request.epoch || !is_owned {
        return Ok(FetchInputsReply::default());
    }
    let (mut inputs, mut delivered, mut bytes) = (Vec::new(), Vec::new(), 0);
    let journal_ids: HashMap<i64, i64> =
        sqlx::query_as("select request_id, journal_id from permission_request where session_id = $1 and status = 'open'")
            .bind(id.uuid())
            .fetch_all(&mut *tx)
            .await?
            .into_iter()
            .collect();
    for row in open(&mut tx, id).await? {
        if !row.rule()?.is_for(request.turn) {
            continue;
        }
        bytes += row.text.len() + row.deny_message.len();
        if bytes > QUEUED_BYTES_MAX && !inputs.is_empty() {
            break;
        }
        if row.status == InputStatus::Queued.as_str() {
            delivered.push(row.input_id);
        }
        inputs.extend(for_host(row, request.turn, &journal_ids));
    }
    sqlx::query(
        "update input set status = 'delivered', delivered_at = now() where input_id = any($1)",
    )
    .bind(&delivered)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(FetchInputsReply { inputs })
}

/// An input as the agent host takes it.
fn for_host(row: InputRow, turn: u32, journal_ids: &HashMap<i64, i64>) -> Option<host::Input> {
    let kind = match row.kind.parse().ok()? {
        InputKind::Message => HostInput::Message(host::Message {
            turn,
            text: row.text,
            timeout_seconds: unsigned(row.timeout_seconds),
            when_busy: HostWhenBusy::Join.into(),
            ..host::Message::default()
        }),
        InputKind::Interrupt => HostInput::Interrupt(host::Interrupt { turn }),
        InputKind::Decision => {
            let verdict = match row.verdict?.parse().ok()? {
                Verdict::Allow => HostVerdict::Allow,
                Verdict::AllowForSession => HostVerdict::AllowForSession,
                Verdict::Deny => HostVerdict::Deny,
            };
            let request = journal_ids.get(&row.request_id?)?.cast_unsigned();
            HostInput::Decision(host::Decision {
                request,
                verdict: verdict.into(),
                message: row.deny_message,
            })
        }
        InputKind::ToolResult => {
            let request = journal_ids.get(&row.request_id?)?.cast_unsigned();
            HostInput::CustomToolResult(host::CustomToolResult {
                request,
                text: row.text,
                is_error: row.is_error,
            })
        }
    };
    Some(host::Input { id: InputId::from_uuid(row.input_id).to_string(), kind: Some(kind) })
}
