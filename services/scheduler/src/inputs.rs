//! What users send to a session while its turn runs, and what its agent asks them: rows that the
//! runner fetches and the event log settles. What becomes of each is decided in [`rules::inputs`].
//!
//! Here is the row of an input. Users [`send`] messages, which wait in a [`queue`], [`interrupts`],
//! and answers to [`requests`]; runners fetch them ([`delivery`]); [`events`] settle them. [`list`]
//! and [`find`] read.

pub mod delivery;
pub mod events;
pub mod find;
pub mod interrupts;
pub mod list;
pub mod queue;
pub mod requests;
pub mod send;

use bus::RpcError;
use contract::scheduler::Input;
use rules::inputs::{self, Change};
use sqlx::PgConnection;
use time::OffsetDateTime;
use types::{InputId, InputKind, InputStatus, SessionId, Timestamp, UserId, Verdict};
use uuid::Uuid;

use crate::{Scheduler, micros, sessions::row::missing, unsigned, without_nul};

fn input_missing() -> RpcError {
    RpcError::not_found("Input not found")
}

#[derive(Debug, sqlx::FromRow)]
struct InputRow {
    input_id: Uuid,
    kind: String,
    status: String,
    text: String,
    timeout_seconds: i32,
    steers: bool,
    turn_number: Option<i32>,
    request_id: Option<i64>,
    verdict: Option<String>,
    deny_message: String,
    reason: String,
    is_error: bool,
    key_id: Option<Uuid>,
    created_at: OffsetDateTime,
    delivered_at: Option<OffsetDateTime>,
    settled_at: Option<OffsetDateTime>,
}

macro_rules! input_columns {
    () => {
        "input_id, kind, status, text, timeout_seconds, steers, turn_number, request_id, verdict, deny_message, reason, is_error, key_id,
         created_at, delivered_at, settled_at"
    };
}
use input_columns;

impl InputRow {
    fn rule(&self) -> Result<inputs::Input, RpcError> {
        let unknown = |()| {
            RpcError::internal(format!("input {} cannot be read by this release", self.input_id))
        };
        Ok(inputs::Input {
            kind: self.kind.parse().map_err(unknown)?,
            steers: self.steers,
            turn: self.turn_number.map(unsigned),
            status: self.status.parse().map_err(unknown)?,
        })
    }
}

impl From<InputRow> for Input {
    fn from(row: InputRow) -> Self {
        Self {
            input_id: InputId::from_uuid(row.input_id).to_string(),
            kind: row.kind,
            status: row.status,
            text: row.text,
            timeout_seconds: unsigned(row.timeout_seconds),
            steers: row.steers,
            turn: row.turn_number.map(unsigned),
            request_id: row.request_id.map(i64::cast_unsigned),
            verdict: row.verdict.unwrap_or_default(),
            deny_message: row.deny_message,
            message: row.reason,
            is_error: row.is_error,
            key_id: row.key_id.map(|id| id.to_string()).unwrap_or_default(),
            created_at_us: micros(row.created_at),
            delivered_at_us: row.delivered_at.map(micros),
            settled_at_us: row.settled_at.map(micros),
        }
    }
}

/// An input that is to be written.
struct New<'a> {
    kind: InputKind,
    status: InputStatus,
    text: &'a str,
    timeout_seconds: u32,
    steers: bool,
    turn: Option<i32>,
    request: Option<i64>,
    verdict: Option<Verdict>,
    deny_message: &'a str,
    is_error: bool,
    key: Option<Uuid>,
}

impl New<'_> {
    fn of(kind: InputKind, key_id: &str) -> Self {
        let key = key_id.parse().ok();
        Self {
            kind,
            status: InputStatus::Queued,
            text: "",
            timeout_seconds: 0,
            steers: false,
            turn: None,
            request: None,
            verdict: None,
            deny_message: "",
            is_error: false,
            key,
        }
    }

    /// A message whose turn begins with it.
    fn of_turn(self, turn: i32) -> Self {
        Self { status: InputStatus::Delivered, turn: Some(turn), ..self }
    }

    async fn insert(self, tx: &mut PgConnection, session: SessionId) -> Result<InputRow, RpcError> {
        let is_of_timeout = self.kind == InputKind::Decision && self.key.is_none();
        let id = if is_of_timeout { InputId::of_timeout() } else { InputId::new() };
        let row = sqlx::query_as(concat!(
            "insert into input (input_id, session_id, kind, text, timeout_seconds, steers, turn_number, request_id, verdict,
                                deny_message, key_id, is_error, status, sent_after, delivered_at)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13,
                     coalesce((select last_event_id from event_log where session_id = $2), 0),
                     case when $13 = 'delivered' then now() end)
             returning ",
            input_columns!()
        ))
        .bind(id.uuid())
        .bind(session.uuid())
        .bind(self.kind.as_str())
        .bind(self.text)
        .bind(i32::try_from(self.timeout_seconds).unwrap_or(i32::MAX))
        .bind(self.steers)
        .bind(self.turn)
        .bind(self.request)
        .bind(self.verdict.map(Verdict::as_str))
        .bind(self.deny_message)
        .bind(self.key)
        .bind(self.is_error)
        .bind(self.status.as_str())
        .fetch_one(tx)
        .await?;
        Ok(row)
    }
}

/// Those of a session's inputs of which it is not yet known what becomes of them, oldest first.
async fn open(tx: &mut PgConnection, session: SessionId) -> Result<Vec<InputRow>, RpcError> {
    let rows = sqlx::query_as(concat!(
        "select ",
        input_columns!(),
        " from input where session_id = $1 and status in ('queued', 'delivered') order by created_at, input_id for update"
    ));
    Ok(rows.bind(session.uuid()).fetch_all(tx).await?)
}

/// An input of a session; its row is locked.
async fn locked(
    tx: &mut PgConnection,
    session: SessionId,
    input: InputId,
) -> Result<Option<InputRow>, RpcError> {
    let row = sqlx::query_as(concat!(
        "select ",
        input_columns!(),
        " from input where input_id = $1 and session_id = $2 for update"
    ));
    Ok(row.bind(input.uuid()).bind(session.uuid()).fetch_optional(tx).await?)
}

/// Changes an input; `at` is where the event stands that does so, if one does.
async fn change(
    tx: &mut PgConnection,
    input: Uuid,
    change: Change,
    reason: &str,
    at: Option<At>,
) -> Result<(), RpcError> {
    let (status, reason) = match change {
        Change::Keep => return Ok(()),
        Change::Queued => {
            sqlx::query("update input set status = 'queued', steers = false, turn_number = null where input_id = $1")
                .bind(input)
                .execute(tx)
                .await?;
            return Ok(());
        }
        Change::Applied => (InputStatus::Applied, ""),
        Change::Refused(ours) => (InputStatus::Refused, ours.unwrap_or(reason)),
    };
    sqlx::query("update input set status = $2, reason = $3, settled_at = now(), settled_by = coalesce(settled_by, $4) where input_id = $1")
        .bind(input)
        .bind(status.as_str())
        .bind(without_nul(reason))
        .bind(at.map(|at| at.event_id.cast_signed()))
        .execute(tx)
        .await?;
    Ok(())
}

/// Where and when an event stands in its session's log.
#[derive(Clone, Copy, Debug)]
pub struct At {
    pub event_id: u64,
    /// Microseconds since the epoch.
    pub us: i64,
}

impl At {
    pub fn new(event_id: u64, at_us: i64) -> Self {
        // Events of earlier releases have no time.
        Self { event_id, us: if at_us > 0 { at_us } else { Timestamp::now().unix_micros() } }
    }
}

fn whose(user: &str, session: &str) -> Result<(UserId, SessionId), RpcError> {
    Ok((user.parse().map_err(|_| missing())?, session.parse().map_err(|_| missing())?))
}

async fn check_owner(
    scheduler: &Scheduler,
    user: UserId,
    session: SessionId,
) -> Result<(), RpcError> {
    let found = sqlx::query("select from session where session_id = $1 and user_id = $2")
        .bind(session.uuid())
        .bind(user.uuid());
    found.fetch_optional(&scheduler.pool).await?.map(|_| ()).ok_or_else(missing)
}
