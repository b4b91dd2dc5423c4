//! Totals per user, day, agent, key and model. Requests are added up a moment after they are
//! settled, many at a time: no row is written by every request.

use bus::RpcError;
use sqlx::PgPool;

const AT_A_TIME: i64 = 2000;
const KEPT_DAYS: i32 = 7;

/// Whether there are requests to add up.
pub const TO_ADD_UP: &str = "exists (select from model_request
             where status <> 'open' and not is_summed and (status = 'settled' or ended_at < now() - interval '1 hour'))";

/// Adds settled requests to the totals of their day. Unknown ones wait for an hour, in case their
/// usage is still reported.
pub async fn add_up(pool: &PgPool) -> Result<(), RpcError> {
    loop {
        let summed = sqlx::query(
            "with batch as (
                 select request_id from model_request
                 where status <> 'open' and not is_summed and (status = 'settled' or ended_at < now() - interval '1 hour')
                 order by ended_at limit $1 for update skip locked
             ), summed as (
                 update model_request r set is_summed = true from batch b where r.request_id = b.request_id returning r.*
             ), totals as (
                 select (started_at at time zone 'utc')::date as day, user_id,
                        coalesce(agent_id, '00000000-0000-0000-0000-000000000000') as agent_id, key, provider,
                        -- An earlier release stored names that no index holds.
                        left(model, 200) as model, count(*) as requests,
                        count(*) filter (where status = 'unknown') as unknown,
                        count(*) filter (where input_tokens is not null and cost_micro_usd is null) as unpriced,
                        coalesce(sum(input_tokens), 0) as input_tokens, coalesce(sum(output_tokens), 0) as output_tokens,
                        coalesce(sum(cache_read_tokens), 0) as cache_read_tokens,
                        coalesce(sum(cache_write_tokens), 0) as cache_write_tokens,
                        coalesce(sum(cost_micro_usd), 0) as cost_micro_usd
                 from summed group by 1, 2, 3, 4, 5, 6
             ), written as (
                 insert into usage_day as d (day, user_id, agent_id, key, provider, model, requests, unknown, unpriced, input_tokens,
                                             output_tokens, cache_read_tokens, cache_write_tokens, cost_micro_usd)
                 select day, user_id, agent_id, key, provider, model, requests, unknown, unpriced, input_tokens, output_tokens,
                        cache_read_tokens, cache_write_tokens, cost_micro_usd
                 from totals order by user_id, day, agent_id, key, provider, model
                 on conflict (user_id, day, agent_id, key, provider, model) do update
                 set requests = d.requests + excluded.requests, unknown = d.unknown + excluded.unknown,
                     unpriced = d.unpriced + excluded.unpriced, input_tokens = d.input_tokens + excluded.input_tokens,
                     output_tokens = d.output_tokens + excluded.output_tokens,
                     cache_read_tokens = d.cache_read_tokens + excluded.cache_read_tokens,
                     cache_write_tokens = d.cache_write_tokens + excluded.cache_write_tokens,
                     cost_micro_usd = d.cost_micro_usd + excluded.cost_micro_usd
             )
             select count(*) from batch",
        );
        let summed: i64 = sqlx::Row::try_get(&summed.bind(AT_A_TIME).fetch_one(pool).await?, 0)?;
        if summed < AT_A_TIME {
            return Ok(());
        }
    }
}

/// Whether there is anything to remove.
pub fn to_forget() -> String {
    let old = format!("< now() - make_interval(days => {KEPT_DAYS})");
    format!(
        "(select min(ended_at) from model_request where is_summed) {old}
         or (select min(recorded_at) from model_entry) {old}
         or exists (select from model_gateway where expires_at {old})"
    )
}

pub async fn forget(pool: &PgPool) -> Result<(), RpcError> {
    for statement in [
        "delete from model_request where request_id in (
             select request_id from model_request where is_summed and ended_at < now() - make_interval(days => $1) limit $2)",
        "delete from model_entry where (session_id, number) in (
             select session_id, number from model_entry where recorded_at < now() - make_interval(days => $1) limit $2)",
        "delete from model_gateway where gateway_id in (
             select gateway_id from model_gateway where expires_at < now() - make_interval(days => $1) limit $2)",
    ] {
        sqlx::query(statement).bind(KEPT_DAYS).bind(AT_A_TIME).execute(pool).await?;
    }
    Ok(())
}
