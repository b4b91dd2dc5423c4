//! Users: owners of everything else.

use bus::Failure;
use contract::auth::{EnsureUserRequest, User};
use sqlx::PgPool;
use types::UserId;
use uuid::Uuid;

/// Finds the user of that name, or makes it.
pub async fn ensure(pool: PgPool, request: EnsureUserRequest) -> Result<User, Failure> {
    if request.name.is_empty() || request.name.chars().count() > 150 {
        return Err(Failure::invalid("A user's name has 1 to 150 characters"));
    }
    sqlx::query("insert into account (user_id, name) values ($1, $2) on conflict (name) do nothing")
        .bind(UserId::new().uuid())
        .bind(&request.name)
        .execute(&pool)
        .await
        .map_err(Failure::internal)?;
    let id: Uuid = sqlx::query_scalar("select user_id from account where name = $1")
        .bind(&request.name)
        .fetch_one(&pool)
        .await
        .map_err(Failure::internal)?;
    Ok(User { user_id: UserId::from_uuid(id).to_string(), name: request.name })
}
