//! A user's quota of active sessions (docs/api.md §2). Concurrent creations cannot exceed it.
//!
//! Counts include only what is committed. Far below a large quota, creations share a lock and do
//! not wait for one another: at most as many as Postgres has connections are in flight, and all of
//! them fit. Near the quota, or if it is small, they run one at a time.

use bus::RpcError;
use sqlx::PgConnection;
use types::{ErrorCode, UserId};

/// Quotas up to this are not worth the distinction.
const SMALL: u32 = 1000;

/// Makes sure that there is room for one more, until the transaction ends.
///
/// # Errors
/// When there is none.
pub async fn enforce(tx: &mut PgConnection, user: UserId, limit: u32) -> Result<(), RpcError> {
    let lock = format!("(hashtextextended('quota {user}', 0))");
    if limit > SMALL {
        // Made of an id alone. A lock cannot be exchanged for the other kind; it goes with its
        // savepoint.
        let shared = format!("savepoint quota; select pg_advisory_xact_lock_shared{lock}");
        sqlx::raw_sql(sqlx::AssertSqlSafe(shared)).execute(&mut *tx).await?;
        let (active, under_way) = count(tx, user).await?;
        if active + under_way < i64::from(limit) {
            return Ok(());
        }
        sqlx::raw_sql("rollback to savepoint quota").execute(&mut *tx).await?;
    }
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!("select pg_advisory_xact_lock{lock}")))
        .execute(&mut *tx)
        .await?;
    let (active, _) = count(tx, user).await?;
    if active < i64::from(limit) {
        return Ok(());
    }
    let message = format!(
        "Concurrent session limit reached ({active}/{limit}). Terminate an active session before starting a new one."
    );
    Err(RpcError::new(ErrorCode::ResourceExhausted, message)
        .with_number("limit", i64::from(limit))
        .with_number("active", active))
}

/// A user's active sessions, and how many creations can be under way at most.
async fn count(tx: &mut PgConnection, user: UserId) -> Result<(i64, i64), RpcError> {
    sqlx::query_as(
        "select coalesce(sum(sessions), 0), current_setting('max_connections')::bigint
         from active_sessions
         where user_id = $1",
    )
    .bind(user.uuid())
    .fetch_one(tx)
    .await
    .map_err(RpcError::from)
}
