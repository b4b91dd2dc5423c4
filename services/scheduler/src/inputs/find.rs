//! Where a turn begins in its session's log, and from where a reader that has seen an input
//! continues.

use bus::RpcError;
use contract::scheduler::{FindTurnReply, FindTurnRequest};
use rules::inputs;
use sqlx::Row as _;
use types::{InputId, SessionId};

use crate::{
    Scheduler,
    inputs::{input_missing, whose},
    sessions::{row::missing, usage},
    unsigned,
};

/// Where a turn begins in its session's log.
pub async fn find_turn(
    scheduler: Scheduler,
    request: FindTurnRequest,
) -> Result<FindTurnReply, RpcError> {
    let (user, id) = whose(&request.user_id, &request.session_id)?;
    let row: Option<(Option<String>, String)> = sqlx::query_as(
        "select av.name, s.runtime from session s left join agent_version av on av.agent_id = s.agent_id and av.version = s.agent_version
         where s.session_id = $1 and s.user_id = $2",
    )
    .bind(id.uuid())
    .bind(user.uuid())
    .fetch_optional(&scheduler.pool)
    .await?;
    let (agent_name, runtime) = row.ok_or_else(missing)?;
    if request.wants_previews {
        sqlx::query(
            "update session set wants_previews = true where session_id = $1 and not wants_previews",
        )
        .bind(id.uuid())
        .execute(&scheduler.pool)
        .await?;
    }
    let (mut before, mut reply) = (
        request.before,
        FindTurnReply {
            agent_name: agent_name.unwrap_or_default(),
            runtime,
            ..FindTurnReply::default()
        },
    );
    if !request.input_id.is_empty() {
        let input = request.input_id.parse().map_err(|_| input_missing())?;
        let place = place(&scheduler, id, input).await?.ok_or_else(input_missing)?;
        (reply.after, reply.is_within) = (place.event_id, place.is_within);
        before = if place.is_within { place.event_id } else { place.event_id.saturating_add(1) };
    }
    // A turn of an earlier release does not say where it begins: the log is read from its start
    // then.
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
    Ok(FindTurnReply {
        turn: if begun_after.is_some() { unsigned(row.try_get(0)?) } else { 0 },
        begun_after: begun_after.unwrap_or_default().unsigned_abs(),
        usage_before: Some(usage::of_columns(&row, 2)?),
        ..reply
    })
}

/// The position from which a reader that has seen an input continues. `None`: the session has no
/// such input.
async fn place(
    scheduler: &Scheduler,
    session: SessionId,
    input: InputId,
) -> Result<Option<inputs::Place>, RpcError> {
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
    let status = status
        .parse()
        .map_err(|()| RpcError::internal(format!("an input has the status {status}")))?;
    let id =
        |index: usize| row.try_get::<Option<i64>, _>(index).map(|id| id.map(i64::unsigned_abs));
    Ok(Some(inputs::place(status, id(1)?, id(2)?, id(3)?.unwrap_or_default())))
}
