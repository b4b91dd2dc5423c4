//! Environments: how a sandbox is set up. Values of variables are in the vault.

use bus::RpcError;
use contract::{
    common::Empty,
    scheduler::{
        CreateEnvironmentReply, CreateEnvironmentRequest, Environment, GetEnvironmentRequest,
        ListEnvironmentsReply, ListPartsRequest, ListRequest, UpdateEnvironmentRequest,
    },
};
use serde_json::Value;
use sqlx::PgConnection;
use time::OffsetDateTime;
use types::{EnvironmentId, UserId};
use uuid::Uuid;

use crate::{
    Scheduler,
    db::{
        idempotency,
        page::{List, OwnedList, PageStart, check_size},
    },
    micros, now, parsed_json, secret_id, unsigned, version_mismatch,
};

#[derive(Clone, PartialEq, sqlx::FromRow)]
struct EnvironmentRow {
    environment_id: Uuid,
    name: String,
    packages: Value,
    setup_script: String,
    networking: Value,
    env_var_names: Vec<String>,
    env_vars_secret_id: Option<Uuid>,
    description: Option<String>,
    metadata: Value,
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
            env_vars_secret_id: row.env_vars_secret_id.map(|id| id.to_string()),
            description: row.description,
            metadata: row.metadata.to_string(),
        }
    }
}

pub fn missing() -> RpcError {
    RpcError::not_found("Environment not found")
}

/// Whether an environment of the user is archived; `None` when there is no such environment.
pub async fn find_archived(
    tx: &mut PgConnection,
    user: UserId,
    id: EnvironmentId,
) -> Result<Option<bool>, RpcError> {
    sqlx::query_scalar("select archived_at is not null from environment where environment_id = $1 and user_id = $2")
        .bind(id.uuid())
        .bind(user.uuid())
        .fetch_optional(tx)
        .await
        .map_err(RpcError::from)
}

/// A name that another active environment of the user has is refused by the table itself.
fn refused(error: sqlx::Error, name: &str) -> RpcError {
    if store::violates(&error, "environment_name_is_unique") {
        RpcError::conflict(format!("An active environment named '{name}' exists."))
    } else {
        idempotency::not_inserted(error, "environment_pkey")
    }
}

fn metadata(text: &str) -> Result<Value, RpcError> {
    if text.is_empty() { Ok(Value::Object(serde_json::Map::new())) } else { parsed_json(text) }
}

pub async fn create(
    scheduler: Scheduler,
    request: CreateEnvironmentRequest,
) -> Result<CreateEnvironmentReply, RpcError> {
    let outcome = idempotency::retried(|| async {
        let mut tx = scheduler.pool.begin().await?;
        let outcome = create_in(&mut tx, request.clone()).await;
        idempotency::finish(tx, outcome).await
    })
    .await;
    let (user_id, environment_id) = (request.user_id, request.environment_id.clone());
    let earlier = async {
        let environment =
            get(scheduler.clone(), GetEnvironmentRequest { user_id, environment_id }).await?;
        Ok(CreateEnvironmentReply { environment: Some(environment), replayed: false })
    };
    idempotency::or_created_earlier(outcome, &request.environment_id, earlier).await
}

/// The route of idempotency keys of creations.
const ROUTE: &str = "environments";

async fn create_in(
    tx: &mut PgConnection,
    request: CreateEnvironmentRequest,
) -> Result<CreateEnvironmentReply, RpcError> {
    let user: UserId =
        request.user_id.parse().map_err(|_| RpcError::not_found("User not found"))?;
    let id = idempotency::chosen(&request.environment_id, EnvironmentId::new)?;
    let earlier = idempotency::earlier_creation::<Environment>(
        tx,
        user,
        ROUTE,
        request.once.as_ref(),
        &request.environment_id,
    );
    if let Some(environment) = earlier.await? {
        return Ok(CreateEnvironmentReply {
            replayed: environment.environment_id != request.environment_id,
            environment: Some(environment),
        });
    }
    let now = now();
    let row = EnvironmentRow {
        environment_id: id.uuid(),
        name: request.name,
        packages: parsed_json(&request.packages)?,
        setup_script: request.setup_script,
        networking: parsed_json(&request.networking)?,
        env_var_names: request.env_var_names,
        env_vars_secret_id: secret_id(request.env_vars_secret_id.as_deref())?,
        description: request.description,
        metadata: metadata(&request.metadata)?,
        version: 1,
        created_at: now,
        updated_at: now,
        archived_at: None,
    };
    sqlx::query(
        "insert into environment (environment_id, user_id, name, created_at, updated_at, description, metadata)
         values ($1, $2, $3, $4, $4, $5, $6)",
    )
    .bind(row.environment_id)
    .bind(user.uuid())
    .bind(&row.name)
    .bind(now)
    .bind(&row.description)
    .bind(&row.metadata)
    .execute(&mut *tx)
    .await
    .map_err(|error| refused(error, &row.name))?;
    insert_version(tx, &row).await?;
    let environment = Environment::from(row);
    idempotency::remember(tx, user, ROUTE, request.once.as_ref(), &environment).await?;
    Ok(CreateEnvironmentReply { environment: Some(environment), replayed: false })
}

async fn insert_version(tx: &mut PgConnection, row: &EnvironmentRow) -> Result<(), RpcError> {
    // Fields that are changed one by one could add up to more than an answer may hold.
    let names = row.env_var_names.iter().map(String::len).sum::<usize>();
    let documents = [&row.packages, &row.networking, &row.metadata]
        .map(|value| value.to_string().len())
        .into_iter()
        .sum::<usize>();
    let texts = [&row.name, &row.setup_script].map(String::len).into_iter().sum::<usize>()
        + row.description.as_ref().map_or(0, String::len);
    check_size("environment", texts + names + documents)?;
    sqlx::query(
        "insert into environment_version (environment_id, version, name, packages, setup_script, networking, env_var_names,
                                          env_vars_secret_id, created_at)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
    )
    .bind(row.environment_id)
    .bind(row.version)
    .bind(&row.name)
    .bind(&row.packages)
    .bind(&row.setup_script)
    .bind(&row.networking)
    .bind(&row.env_var_names)
    .bind(row.env_vars_secret_id)
    .bind(row.updated_at)
    .execute(tx)
    .await?;
    Ok(())
}

/// Reads an environment with its newest version.
async fn find(
    executor: impl sqlx::PgExecutor<'_>,
    user: UserId,
    environment: EnvironmentId,
) -> Result<Option<EnvironmentRow>, sqlx::Error> {
    sqlx::query_as(
        "select e.environment_id, e.name, v.packages, v.setup_script, v.networking, v.env_var_names, v.env_vars_secret_id,
                e.description, e.metadata, e.version, e.created_at, e.updated_at, e.archived_at
         from environment e
         join environment_version v using (environment_id, version)
         where e.environment_id = $1 and e.user_id = $2",
    )
    .bind(environment.uuid())
    .bind(user.uuid())
    .fetch_optional(executor)
    .await
}

/// Checks in the contract's order (docs/api.md §5); a real change is a new version.
pub async fn update(
    scheduler: Scheduler,
    request: UpdateEnvironmentRequest,
) -> Result<Environment, RpcError> {
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    let environment: EnvironmentId = request.environment_id.parse().map_err(|_| missing())?;
    let mut tx = scheduler.pool.begin().await?;
    // Locked by itself: a lock within the join below would see the row's newest version beside the
    // join's older one.
    sqlx::query("select from environment where environment_id = $1 and user_id = $2 for update")
        .bind(environment.uuid())
        .bind(user.uuid())
        .execute(&mut *tx)
        .await?;
    let current = find(&mut *tx, user, environment).await?.ok_or_else(missing)?;
    if current.archived_at.is_some() {
        return Err(RpcError::conflict("Cannot update an archived environment")
            .because("environment_archived"));
    }
    version_mismatch(current.version, request.version, request.secrets_of_version)?;

    let mut new = current.clone();
    new.name = request.name.unwrap_or(new.name);
    new.setup_script = request.setup_script.unwrap_or(new.setup_script);
    if let Some(packages) = &request.packages {
        new.packages = parsed_json(packages)?;
    }
    if let Some(networking) = &request.networking {
        new.networking = parsed_json(networking)?;
    }
    if let Some(vars) = request.env_vars {
        new.env_vars_secret_id = secret_id(vars.secret_id.as_deref())?;
        new.env_var_names = vars.names;
    }
    let changes_version = new != current;
    if request.clear_description || request.description.is_some() {
        new.description = request.description;
    }
    if let Some(text) = &request.metadata {
        new.metadata = metadata(text)?;
    }
    if new == current {
        return Ok(current.into());
    }
    new.version += i32::from(changes_version);
    new.updated_at = now();
    sqlx::query(
        "update environment set name = $2, version = $3, updated_at = $4, description = $5, metadata = $6 where environment_id = $1",
    )
    .bind(new.environment_id)
    .bind(&new.name)
    .bind(new.version)
    .bind(new.updated_at)
    .bind(&new.description)
    .bind(&new.metadata)
    .execute(&mut *tx)
    .await
    .map_err(|error| refused(error, &new.name))?;
    if changes_version {
        insert_version(&mut tx, &new).await?;
    }
    tx.commit().await?;
    Ok(new.into())
}

pub async fn archive(
    scheduler: Scheduler,
    request: GetEnvironmentRequest,
) -> Result<Environment, RpcError> {
    let environment: EnvironmentId = request.environment_id.parse().map_err(|_| missing())?;
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    let archived = sqlx::query(
        "update environment
         set archived_at = now(), updated_at = now()
         where environment_id = $1 and user_id = $2 and archived_at is null",
    )
    .bind(environment.uuid())
    .bind(user.uuid())
    .execute(&scheduler.pool)
    .await?;
    let environment = get(scheduler, request).await?;
    if archived.rows_affected() == 0 {
        Err(RpcError::conflict("Environment is already archived"))
    } else {
        Ok(environment)
    }
}

/// Sessions hold on to their environment; its variables' values go with it.
pub async fn delete(
    scheduler: Scheduler,
    request: GetEnvironmentRequest,
) -> Result<Empty, RpcError> {
    let environment: EnvironmentId = request.environment_id.parse().map_err(|_| missing())?;
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    let mut tx = scheduler.pool.begin().await?;
    sqlx::query(
        "insert into unused_secret (secret_id)
         select distinct v.env_vars_secret_id
         from environment e
         join environment_version v using (environment_id)
         where e.environment_id = $1 and e.user_id = $2 and v.env_vars_secret_id is not null
         on conflict do nothing",
    )
    .bind(environment.uuid())
    .bind(user.uuid())
    .execute(&mut *tx)
    .await?;
    let deleted = sqlx::query("delete from environment where environment_id = $1 and user_id = $2")
        .bind(environment.uuid())
        .bind(user.uuid())
        .execute(&mut *tx)
        .await;
    match deleted {
        Ok(deleted) if deleted.rows_affected() == 0 => Err(missing()),
        Ok(_) => {
            tx.commit().await?;
            Ok(Empty {})
        }
        Err(error) if store::violates(&error, "session_environment_id_fkey") => {
            Err(RpcError::conflict("Cannot delete environment with existing sessions")
                .because("environment_in_use"))
        }
        Err(error) => Err(RpcError::internal(error)),
    }
}

pub async fn get(
    scheduler: Scheduler,
    request: GetEnvironmentRequest,
) -> Result<Environment, RpcError> {
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    let environment: EnvironmentId = request.environment_id.parse().map_err(|_| missing())?;
    find(&scheduler.pool, user, environment).await?.map(Environment::from).ok_or_else(missing)
}

pub async fn list(
    scheduler: Scheduler,
    request: ListRequest,
) -> Result<ListEnvironmentsReply, RpcError> {
    let list = OwnedList {
        owned: "environment",
        table: "environment e join environment_version v using (environment_id, version)",
        bytes: VERSION_BYTES,
        columns: "environment_id, e.name, v.packages, v.setup_script, v.networking, v.env_var_names, v.env_vars_secret_id, e.description,
                  e.metadata, version, e.created_at, e.updated_at, e.archived_at",
    };
    let (rows, has_more): (Vec<EnvironmentRow>, _) = list.read(&scheduler.pool, &request).await?;
    Ok(ListEnvironmentsReply {
        environments: rows.into_iter().map(Environment::from).collect(),
        has_more,
    })
}

/// The size of a version `v` in an answer, at least.
const VERSION_BYTES: &str = "octet_length(v.name) + octet_length(v.setup_script) + octet_length(v.packages::text)
                             + octet_length(v.networking::text) + octet_length(v.env_var_names::text) + 20000";

/// The snapshots of an environment, newest first. Both times of each are the snapshot's.
pub async fn versions(
    scheduler: Scheduler,
    request: ListPartsRequest,
) -> Result<ListEnvironmentsReply, RpcError> {
    let environment: EnvironmentId = request.id.parse().map_err(|_| missing())?;
    get(
        scheduler.clone(),
        GetEnvironmentRequest { user_id: request.user_id, environment_id: request.id },
    )
    .await?;
    let start = PageStart::by_number_downwards(request.limit, request.after.as_ref());
    let list = List {
        keys: "select version from environment_version where environment_id = $1 and version < $3 order by version desc limit $2 + 1",
        table: "environment_version v",
        by_key: "environment_id = $1 and version",
        bytes: VERSION_BYTES,
        columns: "environment_id, name, packages, setup_script, networking, env_var_names, env_vars_secret_id, null as description,
                  '{}'::jsonb as metadata, version, created_at, created_at as updated_at, null::timestamptz as archived_at",
    };
    let page = list.read(&scheduler.pool, |query| {
        query.bind(environment.uuid()).bind(start.limit).bind(start.number)
    });
    let (rows, has_more): (Vec<EnvironmentRow>, _) = page.await?;
    Ok(ListEnvironmentsReply {
        environments: rows.into_iter().map(Environment::from).collect(),
        has_more,
    })
}
