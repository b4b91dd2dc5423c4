//! The turns of a session.

use std::time::Duration;

use bus::{RpcError, trace};
use contract::{
    runner::RunTurn,
    scheduler::{ListPartsRequest, ListTurnsReply, Turn},
    session, subject,
};
use prost::Message as _;
use sqlx::{PgConnection, Postgres, postgres::PgArguments, query::QueryAs};
use time::OffsetDateTime;
use types::{
    SessionId, UserId,
    limits::{PROVISIONING_MAX, SETTLE_GRACE},
};
use uuid::Uuid;

use super::row::{SessionRow, find, missing};
use crate::{
    Scheduler,
    db::page::{List, PageStart},
    dispatch::outbox::enqueue,
    micros, unsigned,
};

/// A pending turn that is to be written.
pub struct NewTurn<'a> {
    pub session: SessionId,
    pub number: i32,
    pub prompt: &'a str,
    pub timeout_seconds: u32,
    /// The message that became it.
    pub input: Option<Uuid>,
}

/// A statement that writes a session and returns its row. With the same statement its next turn is
/// written, and the job that runs it, unless the prompt is null. [`NewTurn::bind`] binds the
/// parameters up to `$9`.
macro_rules! beginning_turn {
    ($session:expr, $more:literal) => {
        concat!(
            "with written as (", $session, " returning ", $crate::sessions::row::session_columns!(), "),
             turn as (
                 insert into turn (session_id, turn_number, prompt, timeout_seconds, status, deadline_at, offers, offer_after, input_id, begun_after)
                 select session_id, turn_count, $1, $2, 'pending', now() + make_interval(secs => $3), 1, now() + make_interval(secs => $4), $5,
                        coalesce((select last_event_id from event_log where event_log.session_id = written.session_id), 0)
                 from written where $1 is not null
                 returning session_id, turn_number, begun_after
             ), job as (
                 insert into outbox (outbox_id, subject, payload, traceparent) select $6, $7, $8, $9 from turn
             )", $more, "
             select ", $crate::sessions::row::session_columns!(), " from written"
        )
    };
}
pub(crate) use beginning_turn;

impl<'q> NewTurn<'q> {
    /// Binds the first nine parameters of a statement that [`beginning_turn`] made.
    pub fn bind(
        turn: Option<&Self>,
        statement: &'static str,
    ) -> QueryAs<'q, Postgres, SessionRow, PgArguments> {
        let deadline = |seconds: u32| {
            PROVISIONING_MAX + Duration::from_secs(u64::from(seconds)) + SETTLE_GRACE
        };
        let job = turn.map(|turn| {
            RunTurn { session_id: turn.session.to_string(), turn: unsigned(turn.number) }
                .encode_to_vec()
        });
        sqlx::query_as(statement)
            .bind(turn.map(|turn| turn.prompt))
            .bind(turn.map(|turn| i32::try_from(turn.timeout_seconds).unwrap_or(i32::MAX)))
            .bind(turn.map(|turn| deadline(turn.timeout_seconds).as_secs_f64()))
            .bind(rules::ownership::OFFERS.jittered(1).as_secs_f64())
            .bind(turn.and_then(|turn| turn.input))
            .bind(Uuid::now_v7())
            .bind(turn.map(|turn| subject::turn_run(turn.session)))
            .bind(job)
            .bind(trace::traceparent())
    }
}

/// A job that prepares a session for its first turn. Should it be lost, the first turn does what is
/// missing.
pub async fn prepare(tx: &mut PgConnection, session: SessionId) -> Result<(), RpcError> {
    let job = RunTurn { session_id: session.to_string(), turn: 0 };
    enqueue(tx, &subject::turn_run(session), &job).await
}

/// The next turn of a session whose turn is settled; `input` became it.
pub async fn begin(
    tx: &mut PgConnection,
    session: &SessionRow,
    prompt: &str,
    timeout_seconds: u32,
    input: Option<Uuid>,
) -> Result<SessionRow, RpcError> {
    let turn = NewTurn {
        session: SessionId::from_uuid(session.session_id),
        number: session.turn_count + 1,
        prompt,
        timeout_seconds,
        input,
    };
    let row = NewTurn::bind(Some(&turn), BEGIN)
        .bind(session.session_id)
        .bind(turn.number)
        .fetch_one(tx)
        .await?;
    Ok(row)
}

const BEGIN: &str = beginning_turn!(
    "update session
     set status = 'pending', exit_code = null, failure_stage = null, failure_message = null, turn_count = $11, updated_at = now()
     where session_id = $10",
    ""
);

#[derive(sqlx::FromRow)]
struct TurnRow {
    turn_number: i32,
    prompt: String,
    status: String,
    exit_code: Option<i32>,
    created_at: OffsetDateTime,
    started_at: Option<OffsetDateTime>,
    ended_at: Option<OffsetDateTime>,
    input_tokens: Option<i64>,
    output_tokens: Option<i64>,
    cost_micro_usd: Option<i64>,
    model_used: Option<String>,
}

impl TurnRow {
    fn usage(&self) -> Option<session::Usage> {
        let count = |count: Option<i64>| count.map(i64::unsigned_abs);
        let usage = session::Usage {
            input_tokens: count(self.input_tokens),
            output_tokens: count(self.output_tokens),
            cost_micro_usd: count(self.cost_micro_usd),
            model: self.model_used.clone(),
            ..session::Usage::default()
        };
        (usage != session::Usage::default()).then_some(usage)
    }
}

pub async fn list(
    scheduler: Scheduler,
    request: ListPartsRequest,
) -> Result<ListTurnsReply, RpcError> {
    let id: SessionId = request.id.parse().map_err(|_| missing())?;
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    find(&scheduler.pool, id, user).await?;
    let start = PageStart::by_number_upwards(request.limit, request.after.as_ref());
    let list = List {
        keys: "select turn_number from turn where session_id = $1 and turn_number > $3 order by turn_number limit $2 + 1",
        table: "turn_used",
        by_key: "session_id = $1 and turn_number",
        bytes: "octet_length(prompt) + 500",
        columns: "turn_number, prompt, status, exit_code, created_at, started_at, ended_at, input_tokens, output_tokens, cost_micro_usd,
                  model_used",
    };
    let page = list
        .read(&scheduler.pool, |query| query.bind(id.uuid()).bind(start.limit).bind(start.number));
    let (rows, has_more): (Vec<TurnRow>, _) = page.await?;
    let turn = |row: TurnRow| Turn {
        usage: row.usage(),
        turn_number: unsigned(row.turn_number),
        prompt: row.prompt,
        status: row.status,
        exit_code: row.exit_code,
        created_at_us: micros(row.created_at),
        started_at_us: row.started_at.map(micros),
        ended_at_us: row.ended_at.map(micros),
    };
    Ok(ListTurnsReply { turns: rows.into_iter().map(turn).collect(), has_more })
}
