//! The row of a model request. [`super::admission`] begins one, [`super::settlement`] ends it.
//!
//! Code that writes about a session's requests locks its row of `model_meter` first, then the
//! budgets' rows, session first and deployment last. Each transaction is short: a budget's row is
//! held for as long as Postgres takes to commit.

use std::time::Duration;

use bus::RpcError;
use contract::{
    common::Empty,
    scheduler::{BeginModelRequestRequest, RenewModelGatewayRequest},
};
use rules::budget::Estimate;
use sqlx::PgConnection;
use types::SessionId;
use uuid::Uuid;

use crate::{
    Scheduler, db::idempotency, models::limits::Owners, sessions::row::missing, without_nul,
};

/// How long a gateway's requests stay open without a sign of life.
pub(super) const GATEWAY_LEASE: Duration = Duration::from_secs(30);
/// Names have fewer characters. They are parts of keys of indexes.
const NAME_CHARS_MAX: usize = 200;
/// No request used more: sums of such counts do not overflow.
pub const COUNT_MAX: u64 = 1_000_000_000_000;

pub async fn renew(
    scheduler: Scheduler,
    request: RenewModelGatewayRequest,
) -> Result<Empty, RpcError> {
    sqlx::query(
        "insert into model_gateway (gateway_id, expires_at) values ($1, now() + make_interval(secs => $2))
         on conflict (gateway_id) do update set expires_at = excluded.expires_at",
    )
    .bind(uuid(&request.gateway_id)?)
    .bind(GATEWAY_LEASE.as_secs_f64())
    .execute(&scheduler.pool)
    .await?;
    Ok(Empty {})
}

fn uuid(text: &str) -> Result<Uuid, RpcError> {
    text.parse().map_err(|_| RpcError::invalid("Malformed id"))
}

fn name(text: &str) -> String {
    without_nul(text).chars().take(NAME_CHARS_MAX).collect()
}

/// A request as the gateway names it.
pub(super) struct Named {
    pub id: Uuid,
    pub session: SessionId,
    pub gateway: Uuid,
    pub provider: String,
    pub model: String,
    pub key: String,
    pub estimate: Estimate,
}

impl Named {
    pub fn read(request: BeginModelRequestRequest) -> Result<Self, RpcError> {
        Ok(Self {
            id: uuid(&request.request_id)?,
            session: request.session_id.parse().map_err(|_| missing())?,
            gateway: uuid(&request.gateway_id)?,
            provider: name(&request.provider),
            model: name(&request.model),
            key: name(&request.key),
            estimate: Estimate {
                cost: request.estimated_cost_micro_usd,
                tokens: request.estimated_tokens,
            },
        })
    }
}

/// Converts the error of an insert of a request. If another attempt of it was faster, the
/// transaction runs again and finds that one.
pub(super) fn not_inserted(error: sqlx::Error) -> RpcError {
    let rolled_back = store::violates(&error, "model_request_pkey");
    let failure = idempotency::not_inserted(error, "model_request_pkey");
    RpcError { rolled_back: failure.rolled_back || rolled_back, ..failure }
}

pub(super) async fn insert(
    tx: &mut PgConnection,
    named: &Named,
    owners: &Owners,
    turn: i32,
    is_budgeted: bool,
) -> Result<(), RpcError> {
    let held = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    sqlx::query(
        "insert into model_request (request_id, session_id, user_id, agent_id, turn_number, gateway_id, provider, model, key, status,
                                    is_budgeted, held_tokens, held_cost_micro_usd)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, 'open', $10, $11, $12)",
    )
    .bind(named.id)
    .bind(owners.session)
    .bind(owners.user)
    .bind(owners.agent)
    .bind(turn)
    .bind(named.gateway)
    .bind(&named.provider)
    .bind(&named.model)
    .bind(&named.key)
    .bind(is_budgeted)
    .bind(if is_budgeted { held(named.estimate.tokens) } else { 0 })
    .bind(if is_budgeted { held(named.estimate.cost.unwrap_or_default()) } else { 0 })
    .execute(tx)
    .await
    .map_err(not_inserted)?;
    Ok(())
}
