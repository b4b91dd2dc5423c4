//! What the model gateway recorded and a session's log is to show. The runner of its turn fetches
//! entries by their numbers and appends them; how far it got stands in the log's checkpoints.

use bus::RpcError;
use contract::{
    scheduler::{FetchModelRequestsReply, FetchModelRequestsRequest, MeterEntry, meter_entry},
    session::{BudgetNotice, Usage},
    subject,
};
use prost::Message as _;
use sqlx::{PgConnection, Row as _};
use types::SessionId;
use uuid::Uuid;

use crate::{
    Scheduler,
    sessions::{row::missing, usage},
    unsigned,
};

const AT_A_TIME: i64 = 200;

/// Adds an entry under the number that the session's meter was set to.
pub async fn add(
    tx: &mut PgConnection,
    session: Uuid,
    number: i64,
    kind: meter_entry::Kind,
) -> Result<(), RpcError> {
    sqlx::query("insert into model_entry (session_id, number, payload) values ($1, $2, $3)")
        .bind(session)
        .bind(number)
        .bind(payload(kind))
        .execute(tx)
        .await?;
    Ok(())
}

/// Without its number, which its row has.
pub fn payload(kind: meter_entry::Kind) -> Vec<u8> {
    MeterEntry { number: 0, kind: Some(kind) }.encode_to_vec()
}

pub async fn hint(scheduler: &Scheduler, session: SessionId) {
    scheduler.bus.hint(subject::models_hint(session)).await;
}

/// Ignored if the claim is stale.
pub async fn fetch(
    scheduler: Scheduler,
    request: FetchModelRequestsRequest,
) -> Result<FetchModelRequestsReply, RpcError> {
    let session: SessionId = request.session_id.parse().map_err(|_| missing())?;
    let turn = i32::try_from(request.turn).map_err(|_| missing())?;
    let row = sqlx::query(
        "select t.epoch, (select count(*) from model_request r where r.session_id = $1 and r.status = 'open'),
                u.input_tokens, u.output_tokens, u.cache_read_tokens, u.cache_write_tokens,
                case when u.unpriced = 0 then u.cost_micro_usd end, u.reasoning_tokens, u.model,
                case when m.reached_turn = $2 then m.reached end, case when m.failed_turn = $2 then m.failure end
         from turn t
         left join turn_usage u using (session_id, turn_number)
         left join model_meter m using (session_id)
         where t.session_id = $1 and t.turn_number = $2",
    )
    .bind(session.uuid())
    .bind(turn)
    .fetch_optional(&scheduler.pool)
    .await?;
    let row = row.ok_or_else(missing)?;
    if unsigned(row.try_get(0)?) != request.epoch {
        return Ok(FetchModelRequestsReply::default());
    }
    let rows: Vec<(i64, Vec<u8>)> =
        sqlx::query_as("select number, payload from model_entry where session_id = $1 and number > $2 order by number limit $3")
            .bind(session.uuid())
            .bind(i64::try_from(request.after).unwrap_or(i64::MAX))
            .bind(AT_A_TIME)
            .fetch_all(&scheduler.pool)
            .await?;
    let entry = |(number, payload): &(i64, Vec<u8>)| {
        let entry = MeterEntry::decode(payload.as_slice()).ok()?;
        Some(MeterEntry { number: number.unsigned_abs(), ..entry })
    };
    let entries = rows.iter().filter_map(entry).collect();
    let open: i64 = row.try_get(1)?;
    let reasoning_tokens = row.try_get::<Option<i64>, _>(7)?.map(i64::unsigned_abs);
    let turn_usage =
        Usage { reasoning_tokens, model: row.try_get(8)?, ..usage::of_columns(&row, 2)? };
    let reached: Option<Vec<u8>> = row.try_get(9)?;
    Ok(FetchModelRequestsReply {
        entries,
        open: u32::try_from(open).unwrap_or(u32::MAX),
        turn_usage: Some(turn_usage).filter(|usage| usage.input_tokens.is_some()),
        budget_reached: reached.and_then(|reached| BudgetNotice::decode(reached.as_slice()).ok()),
        failure: row.try_get::<Option<String>, _>(10)?.unwrap_or_default(),
    })
}
