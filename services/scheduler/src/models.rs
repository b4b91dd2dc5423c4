//! Model requests as the model gateway reports them: checks of budgets and policies before, usage
//! after, and events for the session's log.
//!
//! [`admission`] begins them and [`settlement`] ends them, as rows of [`requests`]; [`unlimited`] does
//! both for sessions without limits; [`limits`] reads budgets and policies, which [`budgets`] sets;
//! [`entries`] are what runners append to logs; [`sums`] adds up totals.
//! docs/adr/0130-metering.md has the reasons.

/// Adds what a request used to what its turn used before.
macro_rules! add_up {
    () => {
        "on conflict (session_id, turn_number) do update
         set requests = u.requests + excluded.requests, unknown = u.unknown + excluded.unknown,
             unpriced = u.unpriced + excluded.unpriced, input_tokens = u.input_tokens + excluded.input_tokens,
             output_tokens = u.output_tokens + excluded.output_tokens,
             cache_read_tokens = u.cache_read_tokens + excluded.cache_read_tokens,
             cache_write_tokens = u.cache_write_tokens + excluded.cache_write_tokens,
             reasoning_tokens = u.reasoning_tokens + excluded.reasoning_tokens,
             cost_micro_usd = u.cost_micro_usd + excluded.cost_micro_usd, model = excluded.model"
    };
}

pub mod admission;
pub mod budgets;
pub mod entries;
pub mod limits;
pub mod requests;
pub mod settlement;
mod sums;
pub mod unlimited;

use std::time::Duration;

use bus::RpcError;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use types::SessionId;

use crate::Scheduler;

const EVERY: Duration = Duration::from_secs(2);

pub fn due() -> String {
    format!("{} or {} or {}", settlement::lost(), sums::TO_ADD_UP, sums::to_forget())
}

/// Settles requests of lost gateways, adds up totals, and removes what is no longer needed. Safe to
/// run in several replicas at once.
pub async fn run(scheduler: Scheduler, stop: CancellationToken) {
    service::whenever("model requests", &scheduler.due.model_requests, EVERY, stop, || async {
        let parts = [
            settlement::settle_lost(&scheduler).await,
            sums::add_up(&scheduler.pool).await,
            sums::forget(&scheduler.pool).await,
        ];
        parts.into_iter().collect::<Result<(), RpcError>>()
    })
    .await;
}

/// Removes what belongs to a session that was deleted. Its requests stay until they are in the
/// totals.
pub async fn purge(pool: &PgPool, session: SessionId) -> Result<(), RpcError> {
    for statement in [
        "delete from model_entry where session_id = $1",
        "delete from model_meter where session_id = $1",
        "delete from turn_usage where session_id = $1",
        "delete from model_limit where scope = 'session' and scope_id = $1",
    ] {
        sqlx::query(statement).bind(session.uuid()).execute(pool).await?;
    }
    Ok(())
}
