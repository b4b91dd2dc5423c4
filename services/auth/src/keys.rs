//! API keys: verified by their hash, displayed by their prefix, deactivated instead of deleted.

use bus::RpcError;
use contract::auth::{
    CreateKeyRequest, DeactivateKeyRequest, Key, ListKeysReply, ListKeysRequest, VerifyKeyReply,
    VerifyKeyRequest,
};
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use types::{ErrorCode, KeyHash, KeyId, Timestamp, UserId, limits::PAGE_MAX};
use uuid::Uuid;

#[derive(sqlx::FromRow)]
struct Verified {
    key_id: Uuid,
    user_id: Uuid,
    is_active: bool,
    user_is_active: bool,
    expires_at: Option<OffsetDateTime>,
    session_limit: Option<i32>,
    used_recently: bool,
    session_expires_at: Option<OffsetDateTime>,
}

/// Who calls, with a key or from a console session. The texts of refusals are the contract's
/// (docs/api.md §2).
pub async fn verify(pool: PgPool, request: VerifyKeyRequest) -> Result<VerifyKeyReply, RpcError> {
    let refused = |message: &str| RpcError::new(ErrorCode::Unauthenticated, message);
    let hash =
        KeyHash::try_from(request.key_hash.as_slice()).map_err(|_| refused("Invalid API key"))?;
    // The index compares hashes of 256 random bits: its timing tells nothing about a key.
    let key: Verified = sqlx::query_as(
        "select k.key_id, k.user_id, k.is_active, a.is_active as user_is_active, k.expires_at, a.session_limit,
                coalesce(k.last_used_at > now() - interval '1 minute', false) as used_recently, found.session_expires_at
         from (
             select key_id, null::timestamptz as session_expires_at from api_key where key_hash = $1
             union all
             select key_id, expires_at from console_session where token_hash = $1
         ) found
         join api_key k using (key_id)
         join account a using (user_id)",
    )
    .bind(hash.as_bytes().as_slice())
    .fetch_optional(&pool)
    .await?
    .ok_or_else(|| refused("Invalid API key"))?;
    if key.session_expires_at.is_some_and(|expiry| expiry <= OffsetDateTime::now_utc()) {
        return Err(refused("Console session has expired"));
    }
    if !key.is_active || !key.user_is_active {
        return Err(refused("API key is inactive"));
    }
    if key.expires_at.is_some_and(|expiry| expiry <= OffsetDateTime::now_utc()) {
        return Err(refused("API key has expired"));
    }
    if !key.used_recently {
        sqlx::query(
            "update api_key set last_used_at = now() where key_id = $1 and coalesce(last_used_at < now() - interval '1 minute', true)",
        )
        .bind(key.key_id)
        .execute(&pool)
        .await?;
    }
    Ok(VerifyKeyReply {
        user_id: key.user_id.to_string(),
        key_id: key.key_id.to_string(),
        session_limit: key.session_limit.and_then(|limit| u32::try_from(limit).ok()),
    })
}

#[derive(sqlx::FromRow)]
struct KeyRow {
    key_id: Uuid,
    name: String,
    prefix: String,
    is_active: bool,
    created_at: OffsetDateTime,
    expires_at: Option<OffsetDateTime>,
    last_used_at: Option<OffsetDateTime>,
}

impl From<KeyRow> for Key {
    fn from(row: KeyRow) -> Self {
        let micros = |time: OffsetDateTime| Timestamp::from(time).unix_micros();
        Self {
            key_id: row.key_id.to_string(),
            name: row.name,
            prefix: row.prefix,
            is_active: row.is_active,
            created_at_us: micros(row.created_at),
            expires_at_us: row.expires_at.map(micros),
            last_used_at_us: row.last_used_at.map(micros),
        }
    }
}

/// Stores a key. The same key again, of the same user, is the one that is there.
pub async fn create(pool: PgPool, request: CreateKeyRequest) -> Result<Key, RpcError> {
    let mut connection = pool.acquire().await?;
    insert(&mut connection, request).await
}

pub async fn insert(
    connection: &mut PgConnection,
    request: CreateKeyRequest,
) -> Result<Key, RpcError> {
    let user: UserId =
        request.user_id.parse().map_err(|_| RpcError::not_found("User not found"))?;
    let hash = KeyHash::try_from(request.key_hash.as_slice())
        .map_err(|_| RpcError::invalid("A key's hash has 32 bytes"))?;
    let expires_at = request
        .expires_at_us
        .map(|micros| OffsetDateTime::from_unix_timestamp_nanos(i128::from(micros) * 1000));
    let expires_at = expires_at
        .transpose()
        .map_err(|_| RpcError::invalid("The expiry is out of range").at_field("expires_at", ""))?;
    let created_by =
        Some(&request.created_by_key_id).filter(|id| !id.is_empty()).map(|id| id.parse::<KeyId>());
    let created_by = created_by.transpose().map_err(|_| RpcError::invalid("Malformed key id"))?;
    let row: Result<KeyRow, sqlx::Error> = sqlx::query_as(
        // `least` ignores nulls: a key without an expiry bounds nothing.
        "insert into api_key (key_id, user_id, key_hash, prefix, name, expires_at)
         values ($1, $2, $3, $4, $5, least($6, (select expires_at from api_key where key_id = $7)))
         on conflict (key_hash) do update set key_hash = excluded.key_hash where api_key.user_id = excluded.user_id
         returning key_id, name, prefix, is_active, created_at, expires_at, last_used_at",
    )
    .bind(KeyId::new().uuid())
    .bind(user.uuid())
    .bind(hash.as_bytes().as_slice())
    .bind(request.prefix)
    .bind(request.name)
    .bind(expires_at)
    .bind(created_by.map(KeyId::uuid))
    .fetch_one(connection)
    .await;
    match row {
        Ok(row) => Ok(row.into()),
        Err(error) if store::violates(&error, "api_key_user_id_fkey") => {
            Err(RpcError::not_found("User not found"))
        }
        Err(error) => Err(RpcError::internal(error)),
    }
}

pub async fn list(pool: PgPool, request: ListKeysRequest) -> Result<ListKeysReply, RpcError> {
    let user: UserId =
        request.user_id.parse().map_err(|_| RpcError::not_found("User not found"))?;
    let after = request
        .after_key_id
        .as_deref()
        .map(str::parse::<KeyId>)
        .transpose()
        .map_err(|_| RpcError::invalid("Invalid cursor"))?;
    let limit = request.limit.clamp(1, PAGE_MAX) as usize;
    // Ids are made in the order of time.
    let mut rows: Vec<KeyRow> = sqlx::query_as(
        "select key_id, name, prefix, is_active, created_at, expires_at, last_used_at
         from api_key
         where user_id = $1 and ($2::uuid is null or key_id < $2)
         order by key_id desc
         limit $3",
    )
    .bind(user.uuid())
    .bind(after.map(KeyId::uuid))
    .bind(limit as i64 + 1)
    .fetch_all(&pool)
    .await?;
    let has_more = rows.len() > limit;
    rows.truncate(limit);
    Ok(ListKeysReply { keys: rows.into_iter().map(Key::from).collect(), has_more })
}

pub async fn deactivate(pool: PgPool, request: DeactivateKeyRequest) -> Result<Key, RpcError> {
    let missing = || RpcError::not_found("API key not found");
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    let key: KeyId = request.key_id.parse().map_err(|_| missing())?;
    let row: Option<KeyRow> = sqlx::query_as(
        "update api_key
         set is_active = false
         where key_id = $1 and user_id = $2
         returning key_id, name, prefix, is_active, created_at, expires_at, last_used_at",
    )
    .bind(key.uuid())
    .bind(user.uuid())
    .fetch_optional(&pool)
    .await?;
    row.map(Key::from).ok_or_else(missing)
}
