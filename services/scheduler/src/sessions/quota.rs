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

/// Whether a creation takes the lock of a quota alone.
pub const fn is_alone(limit: u32) -> bool {
    limit <= SMALL
}

/// Takes the lock of a user's quota, alone or with others, until the transaction ends. True if
/// there is then room for one more, and for those that share the lock.
macro_rules! has_room {
    ($user:literal, $limit:literal, $is_alone:literal) => {
        concat!(
            "lock_active_sessions(",
            $user,
            ", ",
            $is_alone,
            ")
                 + case when ",
            $is_alone,
            " then 0 else current_setting('max_connections')::bigint end < ",
            $limit
        )
    };
}
pub(crate) use has_room;

/// Makes sure that there is room for one more, until the transaction ends.
///
/// # Errors
/// When there is none.
pub async fn enforce(tx: &mut PgConnection, user: UserId, limit: u32) -> Result<(), RpcError> {
    if !is_alone(limit) {
        // A lock cannot be exchanged for the other kind; it goes with its savepoint.
        sqlx::raw_sql("savepoint quota").execute(&mut *tx).await?;
        let has_room = sqlx::query_scalar(concat!("select ", has_room!("$1", "$2", "false")))
            .bind(user.uuid())
            .bind(i64::from(limit));
        if has_room.fetch_one(&mut *tx).await? {
            return Ok(());
        }
        sqlx::raw_sql("rollback to savepoint quota").execute(&mut *tx).await?;
    }
    let active: i64 = sqlx::query_scalar("select lock_active_sessions($1, true)")
        .bind(user.uuid())
        .fetch_one(tx)
        .await?;
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
