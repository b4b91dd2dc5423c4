//! Vaults of the Managed Agents API. A session names vaults, and each claim of a turn finds out which
//! credentials those hold then.

use bus::RpcError;
use contract::{
    common::Empty,
    scheduler::{
        CreateVaultRequest, GetVaultRequest, ListRequest, ListVaultsReply, UpdateVaultRequest,
        Vault,
    },
};
use serde_json::{Map, Value};
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use types::{UserId, VaultId, agent::merge_limited_metadata, vault::AuthKind};
use uuid::Uuid;

use crate::{Scheduler, catalog::vault_credentials, db::page::OwnedList, micros, parsed_json};

macro_rules! vault_columns {
    () => {
        "vault_id, display_name, metadata, created_at, updated_at, archived_at"
    };
}

#[derive(sqlx::FromRow)]
pub struct VaultRow {
    vault_id: Uuid,
    display_name: String,
    metadata: Value,
    created_at: OffsetDateTime,
    updated_at: OffsetDateTime,
    pub archived_at: Option<OffsetDateTime>,
}

impl From<VaultRow> for Vault {
    fn from(row: VaultRow) -> Self {
        Self {
            vault_id: row.vault_id.to_string(),
            display_name: row.display_name,
            metadata: row.metadata.to_string(),
            created_at_us: micros(row.created_at),
            updated_at_us: micros(row.updated_at),
            archived_at_us: row.archived_at.map(micros),
        }
    }
}

fn missing() -> RpcError {
    RpcError::not_found("Vault not found")
}

pub fn archived() -> RpcError {
    RpcError::conflict("The vault is archived").because("vault_archived")
}

pub fn ids(user: &str, vault: &str) -> Result<(UserId, VaultId), RpcError> {
    Ok((user.parse().map_err(|_| missing())?, vault.parse().map_err(|_| missing())?))
}

pub fn object(text: &str) -> Result<Map<String, Value>, RpcError> {
    match parsed_json(if text.is_empty() { "{}" } else { text })? {
        Value::Object(object) => Ok(object),
        _ => Err(RpcError::invalid("Malformed metadata")),
    }
}

pub fn merged(current: &Value, change: Option<&str>) -> Result<Value, RpcError> {
    let current = current.as_object().cloned().unwrap_or_default();
    Ok(Value::Object(match change {
        None => current,
        Some(change) => {
            merge_limited_metadata(current, object(change)?).map_err(RpcError::invalid)?
        }
    }))
}

pub async fn find(
    connection: &mut PgConnection,
    user: UserId,
    vault: VaultId,
    lock: &str,
) -> Result<VaultRow, RpcError> {
    let sql = format!(
        "select {} from vault where vault_id = $1 and user_id = $2 {lock}",
        vault_columns!()
    );
    let row = sqlx::query_as(sqlx::AssertSqlSafe(sql))
        .bind(vault.uuid())
        .bind(user.uuid())
        .fetch_optional(connection);
    row.await?.ok_or_else(missing)
}

pub async fn create(scheduler: Scheduler, request: CreateVaultRequest) -> Result<Vault, RpcError> {
    let (user, vault) = ids(&request.user_id, &request.vault_id)?;
    sqlx::query("insert into vault (vault_id, user_id, display_name, metadata) values ($1, $2, $3, $4) on conflict (vault_id) do nothing")
        .bind(vault.uuid())
        .bind(user.uuid())
        .bind(&request.display_name)
        .bind(Value::Object(object(&request.metadata)?))
        .execute(&scheduler.pool)
        .await?;
    get(scheduler, GetVaultRequest { user_id: request.user_id, vault_id: request.vault_id }).await
}

pub async fn get(scheduler: Scheduler, request: GetVaultRequest) -> Result<Vault, RpcError> {
    let (user, vault) = ids(&request.user_id, &request.vault_id)?;
    Ok(find(&mut *scheduler.pool.acquire().await?, user, vault, "").await?.into())
}

pub async fn update(scheduler: Scheduler, request: UpdateVaultRequest) -> Result<Vault, RpcError> {
    let (user, vault) = ids(&request.user_id, &request.vault_id)?;
    let mut tx = scheduler.pool.begin().await?;
    let row = find(&mut tx, user, vault, "for update").await?;
    if row.archived_at.is_some() {
        return Err(archived());
    }
    let name = request.display_name.as_ref().unwrap_or(&row.display_name);
    let metadata = merged(&row.metadata, request.metadata.as_deref())?;
    if *name == row.display_name && metadata == row.metadata {
        return Ok(row.into());
    }
    let changed: VaultRow = sqlx::query_as(concat!(
        "update vault set display_name = $2, metadata = $3, updated_at = now() where vault_id = $1 returning ",
        vault_columns!()
    ))
    .bind(vault.uuid())
    .bind(name)
    .bind(metadata)
    .fetch_one(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(changed.into())
}

pub async fn list(scheduler: Scheduler, request: ListRequest) -> Result<ListVaultsReply, RpcError> {
    let list = OwnedList {
        owned: "vault",
        table: "vault",
        bytes: "octet_length(metadata::text) + octet_length(display_name) + 500",
        columns: vault_columns!(),
    };
    let (rows, has_more): (Vec<VaultRow>, _) = list.read(&scheduler.pool, &request).await?;
    Ok(ListVaultsReply { vaults: rows.into_iter().map(Vault::from).collect(), has_more })
}

/// Archives a vault and its credentials; their secrets go. Archiving it again is no error.
pub async fn archive(scheduler: Scheduler, request: GetVaultRequest) -> Result<Vault, RpcError> {
    let (user, vault) = ids(&request.user_id, &request.vault_id)?;
    let mut tx = scheduler.pool.begin().await?;
    let row = find(&mut tx, user, vault, "for update").await?;
    if row.archived_at.is_some() {
        return Ok(row.into());
    }
    vault_credentials::archive_some(&mut tx, vault, None).await?;
    let archived: VaultRow = sqlx::query_as(concat!(
        "update vault set archived_at = now(), updated_at = now() where vault_id = $1 returning ",
        vault_columns!()
    ))
    .bind(vault.uuid())
    .fetch_one(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(archived.into())
}

/// Sessions that name the vault continue without it.
pub async fn delete(scheduler: Scheduler, request: GetVaultRequest) -> Result<Empty, RpcError> {
    let (user, vault) = ids(&request.user_id, &request.vault_id)?;
    let mut tx = scheduler.pool.begin().await?;
    find(&mut tx, user, vault, "for update").await?;
    vault_credentials::forget_secrets(&mut tx, vault, None).await?;
    sqlx::query("delete from vault where vault_id = $1")
        .bind(vault.uuid())
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(Empty {})
}

/// Refuses vaults that a new session cannot be given; returns the names of the variables that they
/// bring.
pub async fn check(
    tx: &mut PgConnection,
    user: UserId,
    vaults: &Value,
) -> Result<Vec<String>, RpcError> {
    let ids = vault_ids(vaults);
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let found: Vec<(Uuid, bool)> =
        sqlx::query_as("select vault_id, archived_at is not null from vault where user_id = $1 and vault_id = any($2) for share")
            .bind(user.uuid())
            .bind(&ids)
            .fetch_all(&mut *tx)
            .await?;
    if ids.iter().any(|id| found.iter().all(|(found, _)| found != id)) {
        return Err(missing().because("vault_not_found"));
    }
    if found.iter().any(|(_, is_archived)| *is_archived) {
        return Err(archived());
    }
    let names = sqlx::query_scalar("select key from vault_credential where vault_id = any($1) and kind = $2 and archived_at is null")
        .bind(&ids)
        .bind(AuthKind::EnvironmentVariable.as_str())
        .fetch_all(tx)
        .await?;
    Ok(names)
}

/// The secrets of a session's vaults as they are now. Of two credentials for the same thing that of
/// the earlier vault counts.
pub async fn secrets(pool: &PgPool, vaults: &Value) -> Result<Vec<Uuid>, RpcError> {
    let ids = vault_ids(vaults);
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let secrets = sqlx::query_scalar(
        "select distinct on (c.kind = $2, c.key) c.secret_id
         from unnest($1::uuid[]) with ordinality as named (vault_id, place)
         join vault_credential c using (vault_id)
         where c.archived_at is null
         order by c.kind = $2, c.key, named.place, c.created_at desc",
    )
    .bind(&ids)
    .bind(AuthKind::EnvironmentVariable.as_str())
    .fetch_all(pool)
    .await?;
    Ok(secrets)
}

fn vault_ids(vaults: &Value) -> Vec<Uuid> {
    vaults.as_array().into_iter().flatten().filter_map(|id| id.as_str()?.parse().ok()).collect()
}
