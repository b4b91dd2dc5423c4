//! The audit log: which runner redeemed which lease, and which attempts were refused.

use bus::RpcError;
use contract::vault::{ListRedemptionsReply, ListRedemptionsRequest, Redemption};
use sqlx::PgPool;
use time::OffsetDateTime;
use types::{LeaseId, SessionId, Timestamp, limits::PAGE_MAX};
use uuid::Uuid;

use crate::Vault;

#[derive(sqlx::FromRow)]
struct Row {
    redemption_id: i64,
    redeemed_at: OffsetDateTime,
    lease_id: Uuid,
    session_id: Option<Uuid>,
    purpose: Option<String>,
    runner: String,
    outcome: String,
    kinds: Vec<String>,
}

impl From<Row> for Redemption {
    fn from(row: Row) -> Self {
        Self {
            redemption_id: row.redemption_id,
            redeemed_at_us: Timestamp::from(row.redeemed_at).unix_micros(),
            lease_id: LeaseId::from_uuid(row.lease_id).to_string(),
            session_id: row.session_id.map(|id| SessionId::from_uuid(id).to_string()),
            purpose: row.purpose,
            runner: row.runner,
            outcome: row.outcome,
            kinds: row.kinds,
        }
    }
}

/// A redemption to record.
pub struct Redeemed<'a> {
    pub lease: LeaseId,
    pub session: Option<Uuid>,
    pub purpose: Option<&'a str>,
    pub runner: &'a str,
    pub outcome: Outcome,
    pub kinds: &'a [String],
}

#[derive(Clone, Copy)]
pub enum Outcome {
    Granted,
    Refused,
}

impl Outcome {
    fn as_str(self) -> &'static str {
        match self {
            Self::Granted => "granted",
            Self::Refused => "refused",
        }
    }
}

/// Records a redemption, unless one of the same lease by the same runner with the same outcome was
/// recorded within so many seconds.
pub async fn write_unless_repeated(
    pool: &PgPool,
    redeemed: &Redeemed<'_>,
    within_seconds: f64,
) -> Result<(), RpcError> {
    sqlx::query(
        "insert into redemption (lease_id, session_id, purpose, runner, outcome, kinds)
         select $1, $2, $3, $4, $5, $6
         where not exists (
             select from redemption
             where lease_id = $1 and runner = $4 and outcome = $5 and redeemed_at > now() - make_interval(secs => $7))",
    )
    .bind(redeemed.lease.uuid())
    .bind(redeemed.session)
    .bind(redeemed.purpose)
    .bind(redeemed.runner)
    .bind(redeemed.outcome.as_str())
    .bind(redeemed.kinds)
    .bind(within_seconds)
    .execute(pool)
    .await?;
    Ok(())
}

/// Records a redemption. The first one that was granted starts the time in which the lease may be
/// redeemed again.
pub async fn write(pool: &PgPool, redeemed: &Redeemed<'_>) -> Result<(), RpcError> {
    sqlx::query(
        "with first as (
            update lease set redeemed_at = now() where lease_id = $1 and redeemed_at is null and $5 = 'granted'
         )
         insert into redemption (lease_id, session_id, purpose, runner, outcome, kinds) values ($1, $2, $3, $4, $5, $6)",
    )
        .bind(redeemed.lease.uuid())
        .bind(redeemed.session)
        .bind(redeemed.purpose)
        .bind(redeemed.runner)
        .bind(redeemed.outcome.as_str())
        .bind(redeemed.kinds)
        .execute(pool)
        .await?;
    Ok(())
}

/// Lists a page of redemptions, newest first.
pub async fn list(
    vault: Vault,
    request: ListRedemptionsRequest,
) -> Result<ListRedemptionsReply, RpcError> {
    let session = request.session_id.as_deref().map(str::parse::<SessionId>).transpose();
    let session = session.map_err(|_| RpcError::not_found("Session not found"))?;
    let rows: Vec<Row> = sqlx::query_as(
        "select redemption_id, redeemed_at, lease_id, session_id, purpose, runner, outcome, kinds
         from redemption
         where ($1::uuid is null or session_id = $1) and redemption_id < $2
         order by redemption_id desc
         limit $3",
    )
    .bind(session.map(SessionId::uuid))
    .bind(request.before.unwrap_or(i64::MAX))
    .bind(i64::from(request.limit.clamp(1, PAGE_MAX)))
    .fetch_all(&vault.pool)
    .await?;
    Ok(ListRedemptionsReply { redemptions: rows.into_iter().map(Redemption::from).collect() })
}
