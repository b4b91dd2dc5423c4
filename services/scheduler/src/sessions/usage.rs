//! What sessions used: sums over their turns.

use std::collections::HashMap;

use bus::RpcError;
use contract::{scheduler::Session, session::Usage};
use sqlx::{Row as _, postgres::PgRow};
use uuid::Uuid;

use crate::Scheduler;

/// Reads five columns from the one at `first`: input, output, cache read and cache write tokens,
/// and the cost.
pub fn of_columns(row: &PgRow, first: usize) -> Result<Usage, sqlx::Error> {
    let count = |index: usize| {
        row.try_get::<Option<i64>, _>(first + index).map(|count| count.map(i64::unsigned_abs))
    };
    Ok(Usage {
        input_tokens: count(0)?,
        output_tokens: count(1)?,
        cache_read_tokens: count(2)?,
        cache_write_tokens: count(3)?,
        cost_micro_usd: count(4)?,
        ..Usage::default()
    })
}

/// Fills in the usage of sessions and how long their turns ran, which only the Managed Agents API
/// shows.
pub async fn complete(scheduler: &Scheduler, sessions: &mut [Session]) -> Result<(), RpcError> {
    let ids: Vec<Uuid> =
        sessions.iter().filter_map(|session| session.session_id.parse().ok()).collect();
    let rows = sqlx::query(
        "select session_id, sum(input_tokens)::bigint, sum(output_tokens)::bigint, sum(cache_read_tokens)::bigint,
                sum(cache_write_tokens)::bigint, sum(cost_micro_usd)::bigint,
                coalesce(sum(extract(epoch from coalesce(ended_at, now()) - started_at) * 1000000), 0)::bigint
         from turn_used where session_id = any($1) group by session_id",
    )
    .bind(&ids)
    .fetch_all(&scheduler.pool)
    .await?;
    let mut used = HashMap::with_capacity(rows.len());
    for row in rows {
        used.insert(
            row.try_get::<Uuid, _>(0)?.to_string(),
            (of_columns(&row, 1)?, row.try_get::<i64, _>(6)?),
        );
    }
    for session in sessions {
        let (usage, active_us) = used.remove(&session.session_id).unwrap_or_default();
        (session.usage, session.active_us) = (Some(usage), active_us);
    }
    Ok(())
}
