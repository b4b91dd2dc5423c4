//! Users: owners of everything else. For operators.

use bus::RpcError;
use contract::auth::{
    BootstrapRequest, CheckUserReply, CheckUserRequest, CreateKeyRequest, CreateUserRequest,
    EnsureUserRequest, FindUserRequest, Key, ListUsersReply, ListUsersRequest, SetQuotaRequest,
    SetUserActiveRequest, User,
};
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use types::{Timestamp, UserId, limits::PAGE_MAX};
use uuid::Uuid;

use crate::keys;

const NAME_CHARS_MAX: usize = 150;

#[derive(sqlx::FromRow)]
struct UserRow {
    user_id: Uuid,
    name: String,
    is_active: bool,
    session_limit: Option<i32>,
    created_at: OffsetDateTime,
}

impl From<UserRow> for User {
    fn from(row: UserRow) -> Self {
        Self {
            user_id: row.user_id.to_string(),
            name: row.name,
            is_active: row.is_active,
            session_limit: row.session_limit.and_then(|limit| u32::try_from(limit).ok()),
            created_at_us: Timestamp::from(row.created_at).unix_micros(),
        }
    }
}

fn missing() -> RpcError {
    RpcError::not_found("User not found")
}

fn check_name(name: &str) -> Result<(), RpcError> {
    let printable = name.chars().all(|c| !c.is_control());
    if (1..=NAME_CHARS_MAX).contains(&name.chars().count()) && printable {
        return Ok(());
    }
    Err(RpcError::invalid(format!("A user's name has 1 to {NAME_CHARS_MAX} printable characters")))
}

/// Finds the user of that name, or makes it.
pub async fn ensure(pool: PgPool, request: EnsureUserRequest) -> Result<User, RpcError> {
    match create(pool.clone(), CreateUserRequest { name: request.name.clone() }).await {
        Err(failure) if failure.code == types::ErrorCode::Conflict => {
            find(pool, FindUserRequest { name: request.name }).await
        }
        created => created,
    }
}

pub async fn create(pool: PgPool, request: CreateUserRequest) -> Result<User, RpcError> {
    check_name(&request.name)?;
    let mut connection = pool.acquire().await?;
    insert(&mut connection, &request.name)
        .await?
        .map(User::from)
        .ok_or_else(|| RpcError::conflict(format!("A user named '{}' exists.", request.name)))
}

async fn insert(connection: &mut PgConnection, name: &str) -> Result<Option<UserRow>, RpcError> {
    sqlx::query_as(
        "insert into account (user_id, name) values ($1, $2)
         on conflict (name) do nothing
         returning user_id, name, is_active, session_limit, created_at",
    )
    .bind(UserId::new().uuid())
    .bind(name)
    .fetch_optional(connection)
    .await
    .map_err(RpcError::from)
}

pub async fn find(pool: PgPool, request: FindUserRequest) -> Result<User, RpcError> {
    let row: Option<UserRow> = sqlx::query_as(
        "select user_id, name, is_active, session_limit, created_at from account where name = $1",
    )
    .bind(&request.name)
    .fetch_optional(&pool)
    .await?;
    row.map(User::from).ok_or_else(missing)
}

pub async fn list(pool: PgPool, request: ListUsersRequest) -> Result<ListUsersReply, RpcError> {
    let mut rows: Vec<UserRow> =
        sqlx::query_as("select user_id, name, is_active, session_limit, created_at from account where name > $1 order by name limit $2")
            .bind(request.after_name)
            .bind(i64::from(PAGE_MAX) + 1)
            .fetch_all(&pool)
            .await?;
    let has_more = rows.len() > PAGE_MAX as usize;
    rows.truncate(PAGE_MAX as usize);
    Ok(ListUsersReply { users: rows.into_iter().map(User::from).collect(), has_more })
}

/// A user that is not active has no active key.
pub async fn set_active(pool: PgPool, request: SetUserActiveRequest) -> Result<User, RpcError> {
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    let row: Option<UserRow> = sqlx::query_as(
        "update account set is_active = $2 where user_id = $1
         returning user_id, name, is_active, session_limit, created_at",
    )
    .bind(user.uuid())
    .bind(request.is_active)
    .fetch_optional(&pool)
    .await?;
    row.map(User::from).ok_or_else(missing)
}

/// For services that keep working for a user without one of the user's keys.
pub async fn check(pool: PgPool, request: CheckUserRequest) -> Result<CheckUserReply, RpcError> {
    let Ok(user) = request.user_id.parse::<UserId>() else {
        return Ok(CheckUserReply { is_active: false });
    };
    let is_active: Option<bool> =
        sqlx::query_scalar("select is_active from account where user_id = $1")
            .bind(user.uuid())
            .fetch_optional(&pool)
            .await?;
    Ok(CheckUserReply { is_active: is_active == Some(true) })
}

pub async fn set_quota(pool: PgPool, request: SetQuotaRequest) -> Result<User, RpcError> {
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    let limit =
        request.session_limit.map(i32::try_from).transpose().ok().filter(|limit| *limit != Some(0));
    let limit =
        limit.ok_or_else(|| RpcError::invalid("A limit is a number from 1 to 2147483647"))?;
    let row: Option<UserRow> = sqlx::query_as(
        "update account set session_limit = $2 where user_id = $1
         returning user_id, name, is_active, session_limit, created_at",
    )
    .bind(user.uuid())
    .bind(limit)
    .fetch_optional(&pool)
    .await?;
    row.map(User::from).ok_or_else(missing)
}

/// The first user and key, where there is no user yet: of two at once, one.
pub async fn bootstrap(pool: PgPool, request: BootstrapRequest) -> Result<Key, RpcError> {
    check_name(&request.user_name)?;
    let mut tx = pool.begin().await?;
    sqlx::query("lock table account in exclusive mode").execute(&mut *tx).await?;
    let taken: bool =
        sqlx::query_scalar("select exists (select 1 from account)").fetch_one(&mut *tx).await?;
    let user = if taken { None } else { insert(&mut tx, &request.user_name).await? };
    let user = user.ok_or_else(|| {
        RpcError::conflict(
            "This deployment already has users; create keys with `aod admin key create`",
        )
    })?;
    let key = CreateKeyRequest {
        user_id: user.user_id.to_string(),
        name: request.key_name,
        key_hash: request.key_hash,
        prefix: request.prefix,
        expires_at_us: None,
        ..CreateKeyRequest::default()
    };
    let key = keys::insert(&mut tx, key).await?;
    tx.commit().await?;
    Ok(key)
}
