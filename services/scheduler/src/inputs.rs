//! What users send to a session while its turn runs, and what its agent asks them: rows that the runner fetches and the event log
//! settles. What becomes of each is decided in [`rules::inputs`].

use std::collections::HashMap;

use bus::Failure;
use contract::{
    host::{self, DecisionRequested, InputSettled, WhenBusy as HostWhenBusy, decision::Verdict as HostVerdict, input::Kind as HostInput},
    scheduler::{
        ChangeInputRequest, Cursor, DecideRequest, FetchInputsReply, FetchInputsRequest, FindTurnReply, FindTurnRequest, Input,
        InterruptRequest, ListInputsReply, ListPartsRequest, ListPermissionRequestsReply, ListPermissionRequestsRequest, PermissionRequest,
        PromptRequest, QueuedInputs, SendEventsReply, SendEventsRequest, SentDecision, SentMessage, WithdrawInputRequest,
        sent_event::Kind as Sent,
    },
    session::{DecisionSettled, TurnEnded, Usage, session_event::Kind},
    subject,
};
use prost::Message as _;
use rules::inputs::{self, Change, Clock, Next};
use sqlx::{PgConnection, Row as _};
use time::OffsetDateTime;
use types::{
    InputId, InputKind, InputStatus, Permissions, RequestStatus, Runtime, SessionId, SessionStatus, Timestamp, TurnStatus, UserId, Verdict,
    limits::{PAGE_MAX, QUEUED_BYTES_MAX, QUEUED_INPUTS_MAX},
};
use uuid::Uuid;

use crate::{
    Scheduler, micros, once,
    page::{List, Window},
    quota,
    sessions::{
        row::{SessionRow, lock, missing},
        turns,
    },
    unsigned, without_nul,
};

fn input_missing() -> Failure {
    Failure::not_found("Input not found")
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

impl InputRow {
    fn rule(&self) -> Result<inputs::Input, Failure> {
        let unknown = |()| Failure::internal(format!("input {} cannot be read by this release", self.input_id));
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

    async fn insert(self, tx: &mut PgConnection, session: SessionId) -> Result<InputRow, Failure> {
        let is_of_timeout = self.kind == InputKind::Decision && self.key.is_none();
        let id = if is_of_timeout { InputId::of_timeout() } else { InputId::new() };
        let row = sqlx::query_as(concat!(
            "insert into input (input_id, session_id, kind, status, text, timeout_seconds, steers, turn_number, request_id, verdict,
                                deny_message, key_id, is_error, sent_after)
             values ($1, $2, $3, 'queued', $4, $5, $6, $7, $8, $9, $10, $11, $12,
                     coalesce((select last_event_id from event_log where session_id = $2), 0))
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
        .fetch_one(tx)
        .await?;
        Ok(row)
    }
}

/// Those of a session's inputs of which it is not yet known what becomes of them, oldest first.
async fn open(tx: &mut PgConnection, session: SessionId) -> Result<Vec<InputRow>, Failure> {
    let rows = sqlx::query_as(concat!(
        "select ",
        input_columns!(),
        " from input where session_id = $1 and status in ('queued', 'delivered') order by created_at, input_id for update"
    ));
    Ok(rows.bind(session.uuid()).fetch_all(tx).await?)
}

/// Changes an input; `at` is where the event stands that does so, if one does.
async fn change(tx: &mut PgConnection, input: Uuid, change: Change, reason: &str, at: Option<At>) -> Result<(), Failure> {
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

// --- what events change ----------------------------------------------------------------------

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

/// Whether an event is about inputs and requests alone.
pub fn concerns(kind: &Kind) -> bool {
    matches!(kind, Kind::DecisionRequested(_) | Kind::DecisionSettled(_) | Kind::InputSettled(_))
}

/// Applies an event that [`concerns`] inputs and requests. The session's row is locked.
pub async fn apply(tx: &mut PgConnection, session: &SessionRow, turn: u32, kind: &Kind, at: At) -> Result<(), Failure> {
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

async fn input_settled(tx: &mut PgConnection, session: SessionId, turn: u32, settled: &InputSettled, at: At) -> Result<(), Failure> {
    let Ok(input) = settled.id.parse::<InputId>() else { return Ok(()) };
    let row: Option<InputRow> =
        sqlx::query_as(concat!("select ", input_columns!(), " from input where input_id = $1 and session_id = $2 for update"))
            .bind(input.uuid())
            .bind(session.uuid())
            .fetch_optional(&mut *tx)
            .await?;
    let Some(row) = row else { return Ok(()) };
    change(tx, row.input_id, inputs::settled(row.rule()?, turn, settled.outcome()), &settled.message, Some(at)).await
}

/// The clock of a turn that is not settled yet; its row is locked.
async fn clock(tx: &mut PgConnection, session: SessionId, turn: u32) -> Result<Option<Clock>, Failure> {
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
    let (deadline, waiting_since): (OffsetDateTime, Option<OffsetDateTime>) = (row.try_get(0)?, row.try_get(1)?);
    Ok(Some(Clock { deadline: micros(deadline), waiting_since: waiting_since.map(micros) }))
}

async fn set_clock(tx: &mut PgConnection, session: SessionId, turn: u32, clock: Clock) -> Result<(), Failure> {
    let time = |us: i64| OffsetDateTime::from_unix_timestamp_nanos(i128::from(us) * 1000).map_err(Failure::internal);
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
) -> Result<(), Failure> {
    let Some(clock) = clock(tx, session, turn).await? else { return Ok(()) };
    let permissions: Option<serde_json::Value> = sqlx::query_scalar(
        "select av.permissions from session s join agent_version av on av.agent_id = s.agent_id and av.version = s.agent_version
         where s.session_id = $1",
    )
    .bind(session.uuid())
    .fetch_optional(&mut *tx)
    .await?
    .flatten();
    let permissions: Permissions = permissions.and_then(|json| serde_json::from_value(json).ok()).unwrap_or_default();
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
async fn answer_again(tx: &mut PgConnection, session: SessionId, turn: u32, id: u64, tool: &str, input_json: &str) -> Result<(), Failure> {
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
    let new = New { verdict, deny_message: &deny_message, key: earlier.try_get(3)?, ..New::of(InputKind::Decision, "") };
    answer(tx, session, turn, id, new).await?;
    sqlx::query("update permission_request set answer_id = null where session_id = $1 and request_id = $2")
        .bind(session.uuid())
        .bind(earlier.try_get::<i64, _>(0)?)
        .execute(tx)
        .await?;
    Ok(())
}

/// Writes a decision, and that it answers a request.
async fn answer(tx: &mut PgConnection, session: SessionId, turn: u32, request: u64, new: New<'_>) -> Result<InputRow, Failure> {
    let new = New { turn: i32::try_from(turn).ok(), request: Some(request.cast_signed()), ..new };
    let row = new.insert(tx, session).await?;
    sqlx::query("update permission_request set answer_id = $3 where session_id = $1 and request_id = $2")
        .bind(session.uuid())
        .bind(request.cast_signed())
        .bind(row.input_id)
        .execute(tx)
        .await?;
    Ok(row)
}

async fn request_settled(tx: &mut PgConnection, session: SessionId, turn: u32, event: &DecisionSettled, at: At) -> Result<(), Failure> {
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
    let still_open: i64 = sqlx::query_scalar("select count(*) from permission_request where session_id = $1 and status = 'open'")
        .bind(session.uuid())
        .fetch_one(&mut *tx)
        .await?;
    match clock(tx, session, turn).await? {
        Some(clock) => set_clock(tx, session, turn, clock.answered(at.us, usize::try_from(still_open).unwrap_or_default())).await,
        None => Ok(()),
    }
}

/// Settles what a turn's begin settles. Tells whether inputs wait for the turn's runner.
pub async fn turn_started(tx: &mut PgConnection, session: SessionId, turn: u32, at: At) -> Result<bool, Failure> {
    let mut waiting = false;
    for row in open(tx, session).await? {
        let rule = row.rule()?;
        waiting |= rule.is_for(turn);
        change(tx, row.input_id, inputs::turn_started(rule, turn), "", Some(at)).await?;
    }
    Ok(waiting)
}

/// Settles what is left of a turn that ended.
pub async fn turn_ended(tx: &mut PgConnection, session: SessionId, turn: u32, ended: &TurnEnded, at: At) -> Result<(), Failure> {
    for row in open(tx, session).await? {
        change(tx, row.input_id, inputs::turn_ended(row.rule()?, turn, ended), "", Some(at)).await?;
    }
    Ok(())
}

/// A turn that ended asks no more.
pub async fn void_requests(tx: &mut PgConnection, session: SessionId) -> Result<(), Failure> {
    sqlx::query("update permission_request set status = 'void', settled_at = now() where session_id = $1 and status = 'open'")
        .bind(session.uuid())
        .execute(&mut *tx)
        .await?;
    Ok(())
}

/// Begins the next turn from the oldest queued message, or refuses the queued messages. `session` is as the turn's end left it, and `at`
/// is where that stands, if it is known.
pub async fn go_on(tx: &mut PgConnection, session: &SessionRow, at: Option<At>) -> Result<(), Failure> {
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

async fn begin(tx: &mut PgConnection, session: &SessionRow, input: InputRow) -> Result<(), Failure> {
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

// --- what runners ask ------------------------------------------------------------------------

/// The inputs that a turn's runner sends to the agent host. They are delivered from now on, and again until the log settles them.
pub async fn fetch(scheduler: Scheduler, request: FetchInputsRequest) -> Result<FetchInputsReply, Failure> {
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
    let (status, epoch, is_owned): (&str, i32, bool) = (turn.try_get(0)?, turn.try_get(1)?, turn.try_get(2)?);
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
    sqlx::query("update input set status = 'delivered', delivered_at = now() where input_id = any($1)")
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
            HostInput::Decision(host::Decision { request, verdict: verdict.into(), message: row.deny_message })
        }
        InputKind::ToolResult => {
            let request = journal_ids.get(&row.request_id?)?.cast_unsigned();
            HostInput::CustomToolResult(host::CustomToolResult { request, text: row.text, is_error: row.is_error })
        }
    };
    Some(host::Input { id: InputId::from_uuid(row.input_id).to_string(), kind: Some(kind) })
}

// --- what users ask --------------------------------------------------------------------------

/// Events that are sent together: all take effect, or none does.
pub async fn send(scheduler: Scheduler, request: SendEventsRequest) -> Result<SendEventsReply, Failure> {
    let (user, id) = whose(&request.user_id, &request.session_id)?;
    let reply = once::retried(|| async {
        let mut tx = scheduler.pool.begin().await?;
        let outcome = send_in(&mut tx, user, id, &request).await;
        once::finish(tx, outcome).await
    })
    .await?;
    scheduler.outbox.notify_one();
    scheduler.bus.hint(subject::inputs_hint(id)).await;
    let queued: Vec<Input> = reply.inputs.iter().filter(|input| input.settled_at_us.is_none()).cloned().collect();
    if !reply.replayed && !queued.is_empty() {
        scheduler
            .bus
            .tell(subject::queued_inputs(id), QueuedInputs { inputs: queued, ..QueuedInputs::default() }.encode_to_vec().into())
            .await;
    }
    Ok(reply)
}

async fn send_in(tx: &mut PgConnection, user: UserId, id: SessionId, request: &SendEventsRequest) -> Result<SendEventsReply, Failure> {
    let route = format!("sessions/{id}/events");
    if let Some(reply) = once::earlier::<SendEventsReply>(tx, user, &route, request.once.as_ref()).await? {
        return Ok(SendEventsReply { replayed: true, ..reply });
    }
    let mut reply = SendEventsReply::default();
    for event in &request.events {
        let session = lock(tx, id, Some(user)).await?.ok_or_else(missing)?;
        if session.status()? == SessionStatus::Terminated {
            return Err(Failure::conflict("Session is terminated and takes no more events").because("session_terminated"));
        }
        let input = match &event.kind {
            Some(Sent::Message(message)) => send_message(tx, session, message, request).await?,
            Some(Sent::Interrupt(_)) if session.status()?.is_active() && open_interrupt(tx, &session).await?.is_none() => {
                interrupt_in(tx, &session, &request.key_id).await?
            }
            // Nothing is to be interrupted, or is being interrupted already. Each event has an id of its own.
            Some(Sent::Interrupt(_)) => {
                let row = New::of(InputKind::Interrupt, &request.key_id).insert(tx, id).await?;
                change(tx, row.input_id, Change::Applied, "", None).await?;
                Input { settled_at_us: Some(micros(row.created_at)), ..Input::from(row) }
            }
            Some(Sent::Decision(decision)) => {
                decide_in(tx, &session, decision, &request.key_id).await.map(|(_, answer)| answer).map_err(not_pending)?
            }
            Some(Sent::ToolResult(result)) => {
                let row = awaited(tx, id, result.request_id, true).await.map_err(not_pending)?;
                let (kind, turn) = (InputKind::ToolResult, unsigned(row.turn_number));
                let new = New { text: &result.text, is_error: result.is_error, ..New::of(kind, &request.key_id) };
                answer(tx, id, turn, result.request_id, new).await?.into()
            }
            None => return Err(Failure::invalid("Unknown event")),
        };
        reply.inputs.push(input);
    }
    once::remember(tx, user, &route, request.once.as_ref(), &reply).await?;
    Ok(reply)
}

/// Names why an answer was refused that no one waits for.
fn not_pending(failure: Failure) -> Failure {
    let is_other = !matches!(failure.code, types::ErrorCode::NotFound | types::ErrorCode::Conflict);
    if is_other { failure } else { Failure::conflict(failure.message).because("tool_use_not_pending") }
}

/// Begins a turn of a session that is not busy, also of one whose turn failed; else it is queued.
async fn send_message(
    tx: &mut PgConnection,
    session: SessionRow,
    message: &SentMessage,
    request: &SendEventsRequest,
) -> Result<Input, Failure> {
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
        return Err(Failure::conflict("The session's sandbox is gone; start a new session").because("session_terminated"));
    }
    // A gateway of an earlier release sends none.
    if let Some(limit) = request.session_limit {
        quota::enforce(tx, UserId::from_uuid(session.user_id), limit).await?;
    }
    let new = New { text: &prompt.prompt, timeout_seconds: prompt.timeout_seconds, ..New::of(InputKind::Message, &prompt.key_id) };
    let row = new.insert(tx, SessionId::from_uuid(session.session_id)).await?;
    let input_id = row.input_id;
    begin(tx, &session, row).await?;
    let row: InputRow =
        sqlx::query_as(concat!("select ", input_columns!(), " from input where input_id = $1")).bind(input_id).fetch_one(tx).await?;
    Ok(row.into())
}

/// Where a turn begins in its session's log.
pub async fn find_turn(scheduler: Scheduler, request: FindTurnRequest) -> Result<FindTurnReply, Failure> {
    let (user, id) = whose(&request.user_id, &request.session_id)?;
    let name: Option<Option<String>> = sqlx::query_scalar(
        "select av.name from session s left join agent_version av on av.agent_id = s.agent_id and av.version = s.agent_version
         where s.session_id = $1 and s.user_id = $2",
    )
    .bind(id.uuid())
    .bind(user.uuid())
    .fetch_optional(&scheduler.pool)
    .await?;
    let agent_name = name.ok_or_else(missing)?.unwrap_or_default();
    if request.wants_previews {
        sqlx::query("update session set wants_previews = true where session_id = $1 and not wants_previews")
            .bind(id.uuid())
            .execute(&scheduler.pool)
            .await?;
    }
    let (mut before, mut reply) = (request.before, FindTurnReply { agent_name, ..FindTurnReply::default() });
    if !request.input_id.is_empty() {
        let input = request.input_id.parse().map_err(|_| input_missing())?;
        let place = place(&scheduler, id, input).await?.ok_or_else(input_missing)?;
        (reply.after, reply.is_within) = (place.event_id, place.is_within);
        before = if place.is_within { place.event_id } else { place.event_id.saturating_add(1) };
    }
    // A turn of an earlier release does not say where it begins: the log is read from its start then.
    let row = sqlx::query(
        "with found as (
             select turn_number, begun_after
             from turn
             where session_id = $1 and ($2 = 0 or coalesce(begun_after, 0) < $2) and ($3 = 0 or turn_number = $3)
             order by turn_number desc
             limit 1
         )
         select f.turn_number, f.begun_after, coalesce(sum(t.input_tokens), 0)::bigint,
                coalesce(sum(t.output_tokens), 0)::bigint, coalesce(sum(t.cache_read_tokens), 0)::bigint,
                coalesce(sum(t.cache_write_tokens), 0)::bigint, sum(t.cost_micro_usd)::bigint
         from found f
         left join turn_used t on t.session_id = $1 and t.turn_number < f.turn_number and f.begun_after is not null
         group by 1, 2",
    )
    .bind(id.uuid())
    .bind(i64::try_from(before).unwrap_or(i64::MAX))
    .bind(i32::try_from(request.turn).unwrap_or(i32::MAX))
    .fetch_optional(&scheduler.pool)
    .await?;
    let Some(row) = row else { return Ok(reply) };
    let begun_after: Option<i64> = row.try_get(1)?;
    let count = |index: usize| row.try_get::<Option<i64>, _>(index).map(|count| count.map(i64::unsigned_abs));
    Ok(FindTurnReply {
        turn: if begun_after.is_some() { unsigned(row.try_get(0)?) } else { 0 },
        begun_after: begun_after.unwrap_or_default().unsigned_abs(),
        usage_before: Some(Usage {
            input_tokens: count(2)?,
            output_tokens: count(3)?,
            cache_read_tokens: count(4)?,
            cache_write_tokens: count(5)?,
            cost_micro_usd: count(6)?,
            ..Usage::default()
        }),
        ..reply
    })
}

/// The position from which a reader that has seen an input continues. `None`: the session has no such input.
async fn place(scheduler: &Scheduler, session: SessionId, input: InputId) -> Result<Option<inputs::Place>, Failure> {
    let row = sqlx::query(
        "select i.status, i.settled_by, coalesce(i.sent_after, t.begun_after), coalesce(l.last_event_id, 0)
         from input i
         left join turn t on t.session_id = i.session_id and t.turn_number = i.turn_number
         left join event_log l on l.session_id = i.session_id
         where i.input_id = $1 and i.session_id = $2",
    )
    .bind(input.uuid())
    .bind(session.uuid())
    .fetch_optional(&scheduler.pool)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let status: &str = row.try_get(0)?;
    let status = status.parse().map_err(|()| Failure::internal(format!("an input has the status {status}")))?;
    let id = |index: usize| row.try_get::<Option<i64>, _>(index).map(|id| id.map(i64::unsigned_abs));
    Ok(Some(inputs::place(status, id(1)?, id(2)?, id(3)?.unwrap_or_default())))
}

/// A message for a session that is busy.
pub async fn enqueue(tx: &mut PgConnection, session: &SessionRow, request: &PromptRequest, steers: bool) -> Result<Input, Failure> {
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

fn check_queue(count: i64, bytes: i64, more: usize) -> Result<(), Failure> {
    if count >= QUEUED_INPUTS_MAX as i64 {
        return Err(Failure::conflict(format!("{QUEUED_INPUTS_MAX} messages are queued already: withdraw one or wait")));
    }
    if usize::try_from(bytes).unwrap_or(usize::MAX).saturating_add(more) > QUEUED_BYTES_MAX {
        return Err(Failure::conflict(format!("The queued messages would hold more than {QUEUED_BYTES_MAX} bytes together")));
    }
    Ok(())
}

/// The messages that a new session begins with: the first begins a turn, the others wait for its end.
pub async fn begin_with(
    tx: &mut PgConnection,
    session: SessionRow,
    messages: &[String],
    timeout_seconds: u32,
    key_id: &str,
) -> Result<SessionRow, Failure> {
    let id = SessionId::from_uuid(session.session_id);
    let Some((first, others)) = messages.split_first() else { return Ok(session) };
    let new = |text| New { text, timeout_seconds, ..New::of(InputKind::Message, key_id) };
    check_queue(others.len() as i64, 0, others.iter().map(String::len).sum())?;
    let input = new(first).insert(tx, id).await?;
    for text in others {
        new(text).insert(tx, id).await?;
    }
    begin(tx, &session, input).await?;
    lock(tx, id, None).await?.ok_or_else(missing)
}

/// Has the running turn interrupted; once, however often it is asked for.
/// The interrupt of a session's newest turn that is on its way.
async fn open_interrupt(tx: &mut PgConnection, session: &SessionRow) -> Result<Option<InputRow>, Failure> {
    let open = open(tx, SessionId::from_uuid(session.session_id)).await?;
    let is_of_turn = |row: &InputRow| row.kind == InputKind::Interrupt.as_str() && row.turn_number == Some(session.turn_count);
    Ok(open.into_iter().find(is_of_turn))
}

pub async fn interrupt_in(tx: &mut PgConnection, session: &SessionRow, key_id: &str) -> Result<Input, Failure> {
    if let Some(row) = open_interrupt(tx, session).await? {
        return Ok(row.into());
    }
    let id = SessionId::from_uuid(session.session_id);
    let new = New { turn: Some(session.turn_count), ..New::of(InputKind::Interrupt, key_id) };
    Ok(new.insert(tx, id).await?.into())
}

pub async fn interrupt(scheduler: Scheduler, request: InterruptRequest) -> Result<Input, Failure> {
    let (user, id) = whose(&request.user_id, &request.session_id)?;
    let input = once::retried(|| async {
        let mut tx = scheduler.pool.begin().await?;
        let session = lock(&mut tx, id, Some(user)).await?.ok_or_else(missing)?;
        if !session.status()?.is_active() {
            return Err(Failure::conflict("No turn is running"));
        }
        let input = interrupt_in(&mut tx, &session, &request.key_id).await?;
        tx.commit().await?;
        Ok(input)
    })
    .await?;
    scheduler.bus.hint(subject::inputs_hint(id)).await;
    Ok(input)
}

fn whose(user: &str, session: &str) -> Result<(UserId, SessionId), Failure> {
    Ok((user.parse().map_err(|_| missing())?, session.parse().map_err(|_| missing())?))
}

async fn check_owner(scheduler: &Scheduler, user: UserId, session: SessionId) -> Result<(), Failure> {
    let found = sqlx::query("select from session where session_id = $1 and user_id = $2").bind(session.uuid()).bind(user.uuid());
    found.fetch_optional(&scheduler.pool).await?.map(|_| ()).ok_or_else(missing)
}

const INPUT_BYTES: &str = "octet_length(text) + octet_length(deny_message) + octet_length(reason) + 500";

pub async fn list(scheduler: Scheduler, request: ListPartsRequest) -> Result<ListInputsReply, Failure> {
    let (user, id) = whose(&request.user_id, &request.id)?;
    check_owner(&scheduler, user, id).await?;
    let window = Window::by_time(request.limit, request.after.as_ref())?;
    let list = List {
        keys: "select input_id from input where session_id = $1 and (created_at, input_id) < ($3, $4)
               order by created_at desc, input_id desc limit $2 + 1",
        table: "input",
        by_key: "input_id",
        bytes: INPUT_BYTES,
        columns: input_columns!(),
    };
    let page = list.read(&scheduler.pool, |query| query.bind(id.uuid()).bind(window.limit).bind(window.time).bind(window.id));
    let (rows, has_more): (Vec<InputRow>, _) = page.await?;
    Ok(ListInputsReply { inputs: rows.into_iter().map(Input::from).collect(), has_more })
}

/// Those of which it is not yet known what becomes of them, oldest first. Takes no lock.
pub async fn list_open(scheduler: Scheduler, request: ListPartsRequest) -> Result<ListInputsReply, Failure> {
    let (user, id) = whose(&request.user_id, &request.id)?;
    check_owner(&scheduler, user, id).await?;
    let start = Cursor { position: 0, id: Uuid::nil().to_string() };
    let window = Window::by_time(request.limit, Some(request.after.as_ref().unwrap_or(&start)))?;
    let list = List {
        keys: "select input_id from input
               where session_id = $1 and status in ('queued', 'delivered') and (created_at, input_id) > ($3, $4)
               order by created_at, input_id limit $2 + 1",
        table: "input",
        by_key: "input_id",
        bytes: INPUT_BYTES,
        columns: input_columns!(),
    };
    let page = list.read(&scheduler.pool, |query| query.bind(id.uuid()).bind(window.limit).bind(window.time).bind(window.id));
    let (rows, has_more): (Vec<InputRow>, _) = page.await?;
    Ok(ListInputsReply { inputs: rows.into_iter().map(Input::from).collect(), has_more })
}

/// A message that has not left the queue; its row and the session's are locked.
async fn queued(tx: &mut PgConnection, user: &str, session: &str, input: &str) -> Result<InputRow, Failure> {
    let (user, id) = whose(user, session)?;
    lock(tx, id, Some(user)).await?.ok_or_else(missing)?;
    let input: InputId = input.parse().map_err(|_| input_missing())?;
    let row: Option<InputRow> =
        sqlx::query_as(concat!("select ", input_columns!(), " from input where input_id = $1 and session_id = $2 for update"))
            .bind(input.uuid())
            .bind(id.uuid())
            .fetch_optional(tx)
            .await?;
    let row = row.ok_or_else(input_missing)?;
    if row.kind != InputKind::Message.as_str() || row.status != InputStatus::Queued.as_str() {
        return Err(Failure::conflict("Input is not queued any more"));
    }
    Ok(row)
}

pub async fn change_text(scheduler: Scheduler, request: ChangeInputRequest) -> Result<Input, Failure> {
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
    let row: InputRow = sqlx::query_as(concat!("update input set text = $2 where input_id = $1 returning ", input_columns!()))
        .bind(row.input_id)
        .bind(&request.text)
        .fetch_one(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(row.into())
}

pub async fn withdraw(scheduler: Scheduler, request: WithdrawInputRequest) -> Result<Input, Failure> {
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

#[derive(sqlx::FromRow)]
struct RequestRow {
    request_id: i64,
    turn_number: i32,
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

pub async fn requests(scheduler: Scheduler, request: ListPermissionRequestsRequest) -> Result<ListPermissionRequestsReply, Failure> {
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
    let page = list.read(&scheduler.pool, |query| query.bind(id.uuid()).bind(limit).bind(before).bind(request.status.clone()));
    let (rows, has_more): (Vec<RequestRow>, _) = page.await?;
    let answers: Vec<Uuid> = rows.iter().filter_map(|row| row.answer_id).collect();
    let answers: Vec<InputRow> = sqlx::query_as(concat!("select ", input_columns!(), " from input where input_id = any($1)"))
        .bind(answers)
        .fetch_all(&scheduler.pool)
        .await?;
    let mut answers: HashMap<Uuid, Input> = answers.into_iter().map(|row| (row.input_id, row.into())).collect();
    let requests = rows.into_iter().map(|row| {
        let answer = row.answer_id.and_then(|id| answers.remove(&id));
        row.with_answer(answer)
    });
    Ok(ListPermissionRequestsReply { requests: requests.collect(), has_more })
}

/// A request's row, locked.
async fn request_row(tx: &mut PgConnection, session: SessionId, request: u64, is_custom_tool: bool) -> Result<Option<RequestRow>, Failure> {
    let row = sqlx::query_as(
        "select request_id, turn_number, tool, input_json, diff, reason, status, answer_id, created_at, settled_at
         from permission_request where session_id = $1 and request_id = $2 and is_custom_tool = $3 for update",
    );
    Ok(row.bind(session.uuid()).bind(request.cast_signed()).bind(is_custom_tool).fetch_optional(tx).await?)
}

/// A request that has no answer yet; its row is locked.
async fn awaited(tx: &mut PgConnection, session: SessionId, request: u64, is_custom_tool: bool) -> Result<RequestRow, Failure> {
    let row = request_row(tx, session, request, is_custom_tool).await?.ok_or_else(|| Failure::not_found("Request not found"))?;
    if row.answer_id.is_some() {
        return Err(Failure::conflict("Request has been answered already"));
    }
    if row.status != RequestStatus::Open.as_str() {
        return Err(Failure::conflict("Request is not open any more"));
    }
    Ok(row)
}

pub async fn decide(scheduler: Scheduler, request: DecideRequest) -> Result<PermissionRequest, Failure> {
    let (user, id) = whose(&request.user_id, &request.session_id)?;
    let mut tx = scheduler.pool.begin().await?;
    let session = lock(&mut tx, id, Some(user)).await?.ok_or_else(missing)?;
    let sent = SentDecision { request_id: request.request_id, verdict: request.verdict, deny_message: request.message };
    let (row, answer) = decide_in(&mut tx, &session, &sent, &request.key_id).await?;
    tx.commit().await?;
    scheduler.bus.hint(subject::inputs_hint(id)).await;
    Ok(row.with_answer(Some(answer)))
}

async fn decide_in(tx: &mut PgConnection, session: &SessionRow, sent: &SentDecision, key_id: &str) -> Result<(RequestRow, Input), Failure> {
    let id = SessionId::from_uuid(session.session_id);
    let verdict: Verdict = sent.verdict.parse().map_err(|()| Failure::invalid("Unknown decision"))?;
    let row = awaited(tx, id, sent.request_id, false).await?;
    let runtime: Runtime = session.runtime.parse().map_err(|()| Failure::internal("a session has an unknown runtime"))?;
    if !sent.deny_message.is_empty() && !runtime.capabilities().deny_with_message {
        let message = format!("Runtime {runtime} cannot pass on the message of a denial");
        return Err(Failure::new(types::ErrorCode::Unprocessable, message));
    }
    let new = New { verdict: Some(verdict), deny_message: &sent.deny_message, ..New::of(InputKind::Decision, key_id) };
    let answer = answer(tx, id, unsigned(row.turn_number), sent.request_id, new).await?;
    Ok((row, answer.into()))
}

/// Decides requests whose users did not in time, as their agents say.
pub async fn decide_overdue(scheduler: &Scheduler) -> Result<(), Failure> {
    let overdue: Vec<(Uuid, i64)> = sqlx::query_as(
        "select session_id, request_id from permission_request
         where status = 'open' and answer_id is null and decide_after < now()
         order by decide_after limit 100",
    )
    .fetch_all(&scheduler.pool)
    .await?;
    for (session, request) in overdue {
        let id = SessionId::from_uuid(session);
        let mut tx = scheduler.pool.begin().await?;
        if lock(&mut tx, id, None).await?.is_none() {
            continue;
        }
        let Some(row) = request_row(&mut tx, id, request.cast_unsigned(), false).await? else { continue };
        if row.answer_id.is_some() || row.status != RequestStatus::Open.as_str() {
            continue;
        }
        let how: Option<String> = sqlx::query_scalar("select on_timeout from permission_request where session_id = $1 and request_id = $2")
            .bind(session)
            .bind(request)
            .fetch_one(&mut *tx)
            .await?;
        let verdict = how.and_then(|how| how.parse().ok()).unwrap_or(Verdict::Deny);
        let new = New { verdict: Some(verdict), ..New::of(InputKind::Decision, "") };
        answer(&mut tx, id, unsigned(row.turn_number), row.request_id.cast_unsigned(), new).await?;
        tx.commit().await?;
        scheduler.bus.hint(subject::inputs_hint(id)).await;
        tracing::info!(session_id = %id, request_id = request, %verdict, "decided a permission request that was not answered in time");
    }
    Ok(())
}

/// Of a session: how many messages wait for its turn to end, and which of its requests is open longest.
pub async fn waiting(scheduler: &Scheduler, session: SessionId) -> Result<(u32, Option<(u64, String)>), Failure> {
    let row = sqlx::query(
        "select (select count(*) from input where session_id = $1 and kind = 'message' and status = 'queued')::integer, r.request_id, r.tool
         from (select 1) one
         left join lateral (
             select request_id, tool from permission_request
             where session_id = $1 and status = 'open' and answer_id is null and not is_custom_tool order by request_id limit 1
         ) r on true",
    )
    .bind(session.uuid())
    .fetch_one(&scheduler.pool)
    .await?;
    let (queued, request, tool): (i32, Option<i64>, Option<String>) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    Ok((unsigned(queued), request.map(i64::cast_unsigned).zip(tool)))
}
