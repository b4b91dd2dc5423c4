//! Requests that take effect once, however often they come (docs/api.md §1, `Idempotency-Key`).
//!
//! The answer is written in the transaction of the change that it reports: a crash at any moment
//! leaves both or neither.

use std::time::Duration;

use bus::RpcError;
use contract::scheduler::Once;
use prost::Message;
use sqlx::{PgConnection, PgTransaction, Row as _};
use types::{Backoff, ErrorCode, UserId};

/// Returns the answer to an earlier request with the same key; none without a key.
///
/// # Errors
/// When such a request is under way, or had another body.
pub async fn earlier<R: Message + Default>(
    tx: &mut PgConnection,
    user: UserId,
    route: &str,
    once: Option<&Once>,
) -> Result<Option<R>, RpcError> {
    let Some(once) = once else { return Ok(None) };
    let lock = format!("{user} {route} {}", once.key);
    // Held until the transaction ends.
    if once.is_of_one_request {
        wait_for_earlier_attempts(tx, &lock).await?;
    } else {
        let alone = sqlx::query_scalar("select pg_try_advisory_xact_lock(hashtextextended($1, 1))")
            .bind(lock)
            .fetch_one(&mut *tx);
        if !alone.await? {
            return Err(RpcError::conflict(
                "A request with this Idempotency-Key is still in progress",
            ));
        }
    }
    answered(tx, user, route, once).await
}

/// The answer to an earlier request with the same key, whose lock is held.
async fn answered<R: Message + Default>(
    tx: &mut PgConnection,
    user: UserId,
    route: &str,
    once: &Once,
) -> Result<Option<R>, RpcError> {
    let row = sqlx::query(
        "select body_hash, reply
         from answered_once
         where user_id = $1 and route = $2 and key = $3 and created_at > now() - interval '24 hours'",
    )
    .bind(user.uuid())
    .bind(route)
    .bind(&once.key)
    .fetch_optional(tx)
    .await?;
    let Some(row) = row else { return Ok(None) };
    if row.try_get::<Vec<u8>, _>(0)? != once.body_hash {
        return Err(RpcError::new(
            ErrorCode::Unprocessable,
            "This Idempotency-Key was used with another request body",
        ));
    }
    let reply: Vec<u8> = row.try_get(1)?;
    R::decode(reply.as_slice()).map(Some).map_err(RpcError::internal)
}

/// Like [`earlier`], for a creation with an id that the caller chose. Waits for other attempts of
/// the same request first.
pub async fn earlier_creation<R: Message + Default>(
    tx: &mut PgConnection,
    user: UserId,
    route: &str,
    once: Option<&Once>,
    id: &str,
) -> Result<Option<R>, RpcError> {
    let Some(known) = once else { return Ok(None) };
    wait_for_earlier_attempts(tx, id).await?;
    // The caller of one request chose both its key and the id.
    if known.is_of_one_request {
        return answered(tx, user, route, known).await;
    }
    earlier(tx, user, route, once).await
}

/// Waits until other attempts of the same request have ended, in this replica or in another.
/// `request` is what they share.
pub async fn wait_for_earlier_attempts(
    tx: &mut PgConnection,
    request: &str,
) -> Result<(), RpcError> {
    sqlx::query("select pg_advisory_xact_lock(hashtextextended($1, 2))")
        .bind(request)
        .execute(tx)
        .await?;
    Ok(())
}

/// The outcome of a creation under an id that its caller chose. Where it failed, an earlier attempt
/// may have made what is asked for: that is then the reason for which it failed, or the answer all
/// the same.
pub async fn or_created_earlier<R>(
    outcome: Result<R, RpcError>,
    id: &str,
    find: impl Future<Output = Result<R, RpcError>>,
) -> Result<R, RpcError> {
    match outcome {
        Err(failure) if !id.is_empty() => find.await.map_err(|_| failure),
        outcome => outcome,
    }
}

/// Returns the id that the caller chose for what it creates, or a new one.
///
/// # Errors
/// When the text is not an id.
pub fn chosen<I: std::str::FromStr>(id: &str, new: impl FnOnce() -> I) -> Result<I, RpcError> {
    if id.is_empty() {
        Ok(new())
    } else {
        id.parse().map_err(|_| RpcError::invalid("The id is not a lowercase UUID"))
    }
}

/// Converts the error of an insert. If the id exists already, another attempt of the same request
/// was faster.
pub fn not_inserted(error: sqlx::Error, primary_key: &str) -> RpcError {
    if store::violates(&error, primary_key) {
        RpcError::conflict("It exists already")
    } else {
        error.into()
    }
}

/// Stores the answer in the transaction of the change that it reports.
pub async fn remember(
    tx: &mut PgConnection,
    user: UserId,
    route: &str,
    once: Option<&Once>,
    reply: &impl Message,
) -> Result<(), RpcError> {
    let Some(once) = once else { return Ok(()) };
    // A row that is older than a day may still be there.
    sqlx::query(
        "insert into answered_once (user_id, route, key, body_hash, reply)
         values ($1, $2, $3, $4, $5)
         on conflict (user_id, route, key) do update set body_hash = $4, reply = $5, created_at = now()",
    )
    .bind(user.uuid())
    .bind(route)
    .bind(&once.key)
    .bind(&once.body_hash)
    .bind(reply.encode_to_vec())
    .execute(tx)
    .await?;
    Ok(())
}

/// Ends the transaction before its outcome is returned, so that an immediate retry does not find
/// its key in use.
pub async fn finish<T>(tx: PgTransaction<'_>, outcome: Result<T, RpcError>) -> Result<T, RpcError> {
    match outcome {
        Ok(reply) => tx.commit().await.map(|()| reply).map_err(RpcError::from),
        Err(failure) => {
            // Where that fails the connection is lost, and the key with it.
            let _ = tx.rollback().await;
            Err(failure)
        }
    }
}

/// Runs a whole transaction again, a few times, while Postgres rolls it back in favour of others: a
/// deadlock, or a conflict of writes.
pub async fn retried<T, F>(mut transaction: impl FnMut() -> F) -> Result<T, RpcError>
where
    F: Future<Output = Result<T, RpcError>>,
{
    for attempt in 1..CONFLICT.attempts {
        match transaction().await {
            Err(failure) if failure.rolled_back => {
                tokio::time::sleep(CONFLICT.jittered(attempt)).await
            }
            outcome => return outcome,
        }
    }
    transaction().await
}

const CONFLICT: Backoff =
    Backoff { base: Duration::from_millis(10), max: Duration::from_millis(200), attempts: 4 };
