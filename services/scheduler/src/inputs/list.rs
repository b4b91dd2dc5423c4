//! A session's inputs, page by page.

use bus::RpcError;
use contract::scheduler::{Cursor, Input, ListInputsReply, ListPartsRequest};
use sqlx::Row as _;
use types::SessionId;
use uuid::Uuid;

use crate::{
    Scheduler,
    db::page::{List, PageStart},
    inputs::{InputRow, check_owner, input_columns, whose},
    unsigned,
};

pub async fn list(
    scheduler: Scheduler,
    request: ListPartsRequest,
) -> Result<ListInputsReply, RpcError> {
    let keys =
        "select input_id from input where session_id = $1 and (created_at, input_id) < ($3, $4)
                order by created_at desc, input_id desc limit $2 + 1";
    page(&scheduler, &request, request.after.as_ref(), keys).await
}

/// Those of which it is not yet known what becomes of them, oldest first. Takes no lock.
pub async fn list_open(
    scheduler: Scheduler,
    request: ListPartsRequest,
) -> Result<ListInputsReply, RpcError> {
    let start = Cursor { position: 0, id: Uuid::nil().to_string() };
    let keys = "select input_id from input
                where session_id = $1 and status in ('queued', 'delivered') and (created_at, input_id) > ($3, $4)
                order by created_at, input_id limit $2 + 1";
    page(&scheduler, &request, Some(request.after.as_ref().unwrap_or(&start)), keys).await
}

async fn page(
    scheduler: &Scheduler,
    request: &ListPartsRequest,
    after: Option<&Cursor>,
    keys: &str,
) -> Result<ListInputsReply, RpcError> {
    let (user, id) = whose(&request.user_id, &request.id)?;
    check_owner(scheduler, user, id).await?;
    let start = PageStart::by_time(request.limit, after)?;
    let list = List {
        keys,
        table: "input",
        by_key: "input_id",
        bytes: "octet_length(text) + octet_length(deny_message) + octet_length(reason) + 500",
        columns: input_columns!(),
    };
    let page = list.read(&scheduler.pool, |query| {
        query.bind(id.uuid()).bind(start.limit).bind(start.time).bind(start.id)
    });
    let (rows, has_more): (Vec<InputRow>, _) = page.await?;
    Ok(ListInputsReply { inputs: rows.into_iter().map(Input::from).collect(), has_more })
}

/// Of a session: how many messages wait for its turn to end, and which of its requests is open
/// longest.
pub async fn waiting(
    scheduler: &Scheduler,
    session: SessionId,
) -> Result<(u32, Option<(u64, String)>), RpcError> {
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
    let (queued, request, tool): (i32, Option<i64>, Option<String>) =
        (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    Ok((unsigned(queued), request.map(i64::cast_unsigned).zip(tool)))
}
