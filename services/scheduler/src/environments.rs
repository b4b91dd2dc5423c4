//! Environments: how a sandbox is set up. Values of variables are in the vault.

use bus::Failure;
use contract::scheduler::{CreateEnvironmentRequest, Environment, GetEnvironmentRequest, ListEnvironmentsReply, ListRequest};
use serde_json::Value;
use sqlx::PgPool;
use time::OffsetDateTime;
use types::{EnvironmentId, SecretId, UserId};
use uuid::Uuid;

use crate::{Scheduler, micros, page_size, page_start, unsigned};

#[derive(sqlx::FromRow)]
struct EnvironmentRow {
    environment_id: Uuid,
    name: String,
    packages: Value,
    setup_script: String,
    networking: Value,
    env_var_names: Vec<String>,
    version: i32,
    created_at: OffsetDateTime,
    updated_at: OffsetDateTime,
    archived_at: Option<OffsetDateTime>,
}

impl From<EnvironmentRow> for Environment {
    fn from(row: EnvironmentRow) -> Self {
        Self {
            environment_id: row.environment_id.to_string(),
            name: row.name,
            packages: row.packages.to_string(),
            setup_script: row.setup_script,
            networking: row.networking.to_string(),
            env_var_names: row.env_var_names,
            version: unsigned(row.version),
            created_at_us: micros(row.created_at),
            updated_at_us: micros(row.updated_at),
            archived_at_us: row.archived_at.map(micros),
        }
    }
}

pub fn missing() -> Failure {
    Failure::not_found("Environment not found")
}

/// Whether an environment of the user is archived; `None` when there is no such environment.
pub async fn find_archived(pool: &PgPool, user: UserId, id: EnvironmentId) -> Result<Option<bool>, Failure> {
    sqlx::query_scalar("select archived_at is not null from environment where environment_id = $1 and user_id = $2")
        .bind(id.uuid())
        .bind(user.uuid())
        .fetch_optional(pool)
        .await
        .map_err(Failure::internal)
}

pub async fn create(scheduler: Scheduler, request: CreateEnvironmentRequest) -> Result<Environment, Failure> {
    let user: UserId = request.user_id.parse().map_err(|_| Failure::not_found("User not found"))?;
    let json = |text: &str| serde_json::from_str::<Value>(text).map_err(|_| Failure::invalid("Malformed environment"));
    let secret = request.env_vars_secret_id.as_deref().map(str::parse::<SecretId>).transpose();
    let row: Result<EnvironmentRow, sqlx::Error> = sqlx::query_as(
        "with e as (
            insert into environment (environment_id, user_id, name) values ($1, $2, $3)
            returning *
         ), v as (
            insert into environment_version
                (environment_id, version, name, packages, setup_script, networking, env_var_names, env_vars_secret_id)
            values ($1, 1, $3, $4, $5, $6, $7, $8)
            returning *
         )
         select e.environment_id, e.name, v.packages, v.setup_script, v.networking, v.env_var_names,
                e.version, e.created_at, e.updated_at, e.archived_at
         from e, v",
    )
    .bind(EnvironmentId::new().uuid())
    .bind(user.uuid())
    .bind(&request.name)
    .bind(json(&request.packages)?)
    .bind(request.setup_script)
    .bind(json(&request.networking)?)
    .bind(request.env_var_names)
    .bind(secret.map_err(|_| Failure::invalid("Malformed secret id"))?.map(SecretId::uuid))
    .fetch_one(&scheduler.pool)
    .await;
    match row {
        Ok(row) => Ok(row.into()),
        Err(error) if store::violates(&error, "environment_name_is_unique") => {
            Err(Failure::conflict(format!("An active environment named '{}' exists.", request.name)))
        }
        Err(error) => Err(Failure::internal(error)),
    }
}

pub async fn get(scheduler: Scheduler, request: GetEnvironmentRequest) -> Result<Environment, Failure> {
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    let environment: EnvironmentId = request.environment_id.parse().map_err(|_| missing())?;
    let row: Option<EnvironmentRow> = sqlx::query_as(
        "select e.environment_id, e.name, v.packages, v.setup_script, v.networking, v.env_var_names,
                e.version, e.created_at, e.updated_at, e.archived_at
         from environment e
         join environment_version v using (environment_id, version)
         where e.environment_id = $1 and e.user_id = $2",
    )
    .bind(environment.uuid())
    .bind(user.uuid())
    .fetch_optional(&scheduler.pool)
    .await
    .map_err(Failure::internal)?;
    row.map(Environment::from).ok_or_else(missing)
}

pub async fn list(scheduler: Scheduler, request: ListRequest) -> Result<ListEnvironmentsReply, Failure> {
    let user: UserId = request.user_id.parse().map_err(|_| Failure::not_found("User not found"))?;
    let (limit, (time, id)) = (page_size(request.limit), page_start(request.before.as_ref())?);
    let mut rows: Vec<EnvironmentRow> = sqlx::query_as(
        "select e.environment_id, e.name, v.packages, v.setup_script, v.networking, v.env_var_names,
                e.version, e.created_at, e.updated_at, e.archived_at
         from environment e
         join environment_version v using (environment_id, version)
         where e.user_id = $1 and e.archived_at is null and (e.created_at, e.environment_id) < ($2, $3)
         order by e.created_at desc, e.environment_id desc
         limit $4",
    )
    .bind(user.uuid())
    .bind(time)
    .bind(id)
    .bind(limit as i64 + 1)
    .fetch_all(&scheduler.pool)
    .await
    .map_err(Failure::internal)?;
    let has_more = rows.len() > limit;
    rows.truncate(limit);
    Ok(ListEnvironmentsReply { environments: rows.into_iter().map(Environment::from).collect(), has_more })
}
