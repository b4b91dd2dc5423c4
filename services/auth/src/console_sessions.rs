//! Browsers that are signed in: each holds a token instead of the API key, which expires and can be
//! revoked by itself.

use bus::RpcError;
use contract::{
    auth::{
        ConsoleSession, CreateConsoleSessionRequest, EndConsoleSessionRequest,
        FindConsoleSessionRequest, VerifyKeyRequest,
    },
    common::Empty,
};
use sqlx::PgPool;
use time::OffsetDateTime;
use types::{ErrorCode, KeyHash, Timestamp};

use crate::keys;

/// Sign-ins of one key that are kept; the oldest end first.
const SESSIONS_PER_KEY_MAX: i64 = 50;

fn refused() -> RpcError {
    RpcError::new(ErrorCode::Unauthenticated, "Console session has ended")
}

fn hash(bytes: &[u8]) -> Result<KeyHash, RpcError> {
    KeyHash::try_from(bytes).map_err(|_| refused())
}

/// Signs in with a key that works.
pub async fn create(
    pool: PgPool,
    request: CreateConsoleSessionRequest,
) -> Result<ConsoleSession, RpcError> {
    let token = hash(&request.token_hash)?;
    let key =
        keys::verify(pool.clone(), VerifyKeyRequest { key_hash: request.key_hash.clone() }).await?;
    let mut tx = pool.begin().await?;
    // Only an API key signs in: a console session has a hash too.
    let inserted = sqlx::query(
        "insert into console_session (token_hash, key_id, expires_at)
         select $1, key_id, now() + make_interval(secs => $3) from api_key where key_hash = $2
         on conflict (token_hash) do update set expires_at = excluded.expires_at where console_session.key_id = excluded.key_id",
    )
    .bind(token.as_bytes().as_slice())
    .bind(&request.key_hash)
    .bind(f64::from(request.expires_in_seconds))
    .execute(&mut *tx)
    .await?;
    if inserted.rows_affected() == 0 {
        return Err(RpcError::new(ErrorCode::Unauthenticated, "Invalid API key"));
    }
    // An expired session stays for a day, so that its browser is told that it expired.
    sqlx::query(
        "delete from console_session
         where key_id = $1::uuid
           and (expires_at < now() - interval '1 day'
                or token_hash in (select token_hash from console_session where key_id = $1::uuid order by created_at desc offset $2))",
    )
    .bind(&key.key_id)
    .bind(SESSIONS_PER_KEY_MAX)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    find(pool, FindConsoleSessionRequest { token_hash: request.token_hash }).await
}

#[derive(sqlx::FromRow)]
struct Row {
    user_name: String,
    key_name: String,
    prefix: String,
    expires_at: OffsetDateTime,
}

pub async fn find(
    pool: PgPool,
    request: FindConsoleSessionRequest,
) -> Result<ConsoleSession, RpcError> {
    let row: Option<Row> = sqlx::query_as(
        "select a.name as user_name, k.name as key_name, k.prefix, s.expires_at
         from console_session s
         join api_key k using (key_id)
         join account a using (user_id)
         where s.token_hash = $1",
    )
    .bind(hash(&request.token_hash)?.as_bytes().as_slice())
    .fetch_optional(&pool)
    .await?;
    let row = row.ok_or_else(refused)?;
    Ok(ConsoleSession {
        user_name: row.user_name,
        key_name: row.key_name,
        key_prefix: row.prefix,
        expires_at_us: Timestamp::from(row.expires_at).unix_micros(),
    })
}

/// Signs out. Idempotent.
pub async fn end(pool: PgPool, request: EndConsoleSessionRequest) -> Result<Empty, RpcError> {
    sqlx::query("delete from console_session where token_hash = $1")
        .bind(hash(&request.token_hash)?.as_bytes().as_slice())
        .execute(&pool)
        .await?;
    Ok(Empty {})
}
