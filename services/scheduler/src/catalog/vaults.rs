//! Vaults of the Managed Agents API and their credentials. Their secrets are at the credential
//! vault; a session names vaults, and each claim of a turn finds out which credentials those hold
//! then.

use bus::RpcError;
use contract::{
    common::Empty,
    scheduler::{
        CreateVaultCredentialRequest, CreateVaultRequest, GetVaultCredentialRequest,
        GetVaultRequest, ListRequest, ListVaultCredentialsReply, ListVaultCredentialsRequest,
        ListVaultsReply, UpdateVaultCredentialRequest, UpdateVaultRequest, Vault, VaultCredential,
    },
};
use serde_json::{Map, Value};
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use types::{
    UserId, VaultCredentialId, VaultId,
    agent::merge_limited_metadata,
    vault::{AuthKind, CREDENTIALS_MAX},
};
use uuid::Uuid;

use crate::{
    Scheduler,
    db::{
        idempotency,
        page::{List, OwnedList, PageStart},
    },
    micros, parsed_json, secret_id,
};

macro_rules! vault_columns {
    () => {
        "vault_id, display_name, metadata, created_at, updated_at, archived_at"
    };
}

macro_rules! credential_columns {
    () => {
        "credential_id, vault_id, display_name, metadata, auth, secret_id, created_at, updated_at, archived_at"
    };
}

#[derive(sqlx::FromRow)]
struct VaultRow {
    vault_id: Uuid,
    display_name: String,
    metadata: Value,
    created_at: OffsetDateTime,
    updated_at: OffsetDateTime,
    archived_at: Option<OffsetDateTime>,
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

#[derive(sqlx::FromRow)]
struct CredentialRow {
    credential_id: Uuid,
    vault_id: Uuid,
    display_name: Option<String>,
    metadata: Value,
    auth: Value,
    secret_id: Option<Uuid>,
    created_at: OffsetDateTime,
    updated_at: OffsetDateTime,
    archived_at: Option<OffsetDateTime>,
}

impl From<CredentialRow> for VaultCredential {
    fn from(row: CredentialRow) -> Self {
        Self {
            credential_id: row.credential_id.to_string(),
            vault_id: row.vault_id.to_string(),
            display_name: row.display_name,
            metadata: row.metadata.to_string(),
            auth: row.auth.to_string(),
            secret_id: row.secret_id.map(|id| id.to_string()),
            created_at_us: micros(row.created_at),
            updated_at_us: micros(row.updated_at),
            archived_at_us: row.archived_at.map(micros),
        }
    }
}

fn missing() -> RpcError {
    RpcError::not_found("Vault not found")
}

fn credential_missing() -> RpcError {
    RpcError::not_found("Credential not found")
}

fn archived() -> RpcError {
    RpcError::conflict("The vault is archived").because("vault_archived")
}

fn ids(user: &str, vault: &str) -> Result<(UserId, VaultId), RpcError> {
    Ok((user.parse().map_err(|_| missing())?, vault.parse().map_err(|_| missing())?))
}

fn object(text: &str) -> Result<Map<String, Value>, RpcError> {
    match parsed_json(if text.is_empty() { "{}" } else { text })? {
        Value::Object(object) => Ok(object),
        _ => Err(RpcError::invalid("Malformed metadata")),
    }
}

fn merged(current: &Value, change: Option<&str>) -> Result<Value, RpcError> {
    let current = current.as_object().cloned().unwrap_or_default();
    Ok(Value::Object(match change {
        None => current,
        Some(change) => {
            merge_limited_metadata(current, object(change)?).map_err(RpcError::invalid)?
        }
    }))
}

async fn find(
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
    archive_credentials(&mut tx, vault, None).await?;
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

/// One credential of a vault, or all of them.
async fn archive_credentials(
    tx: &mut PgConnection,
    vault: VaultId,
    one: Option<VaultCredentialId>,
) -> Result<(), RpcError> {
    forget_secrets(tx, vault, one).await?;
    sqlx::query(
        "update vault_credential set secret_id = null, archived_at = now(), updated_at = now()
         where vault_id = $1 and ($2::uuid is null or credential_id = $2) and archived_at is null",
    )
    .bind(vault.uuid())
    .bind(one.map(VaultCredentialId::uuid))
    .execute(tx)
    .await?;
    Ok(())
}

/// The credential vault deletes them after the transaction.
async fn forget_secrets(
    tx: &mut PgConnection,
    vault: VaultId,
    one: Option<VaultCredentialId>,
) -> Result<(), RpcError> {
    sqlx::query(
        "insert into unused_secret (secret_id)
         select secret_id from vault_credential
         where vault_id = $1 and ($2::uuid is null or credential_id = $2) and secret_id is not null
         for update
         on conflict do nothing",
    )
    .bind(vault.uuid())
    .bind(one.map(VaultCredentialId::uuid))
    .execute(tx)
    .await?;
    Ok(())
}

/// Sessions that name the vault continue without it.
pub async fn delete(scheduler: Scheduler, request: GetVaultRequest) -> Result<Empty, RpcError> {
    let (user, vault) = ids(&request.user_id, &request.vault_id)?;
    let mut tx = scheduler.pool.begin().await?;
    find(&mut tx, user, vault, "for update").await?;
    forget_secrets(&mut tx, vault, None).await?;
    sqlx::query("delete from vault where vault_id = $1")
        .bind(vault.uuid())
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(Empty {})
}

// --- credentials ---------------------------------------------------------------------------------

async fn find_credential(
    connection: &mut PgConnection,
    vault: VaultId,
    credential: VaultCredentialId,
    lock: &str,
) -> Result<CredentialRow, RpcError> {
    let sql = format!(
        "select {} from vault_credential where vault_id = $1 and credential_id = $2 {lock}",
        credential_columns!()
    );
    let row = sqlx::query_as(sqlx::AssertSqlSafe(sql))
        .bind(vault.uuid())
        .bind(credential.uuid())
        .fetch_optional(connection);
    row.await?.ok_or_else(credential_missing)
}

pub async fn create_credential(
    scheduler: Scheduler,
    request: CreateVaultCredentialRequest,
) -> Result<VaultCredential, RpcError> {
    let (user, vault) = ids(&request.user_id, &request.vault_id)?;
    let credential: VaultCredentialId =
        request.credential_id.parse().map_err(|_| credential_missing())?;
    let mut tx = scheduler.pool.begin().await?;
    // Locked: credentials are counted.
    if find(&mut tx, user, vault, "for update").await?.archived_at.is_some() {
        return Err(archived());
    }
    if let Ok(earlier) = find_credential(&mut tx, vault, credential, "").await {
        return Ok(earlier.into());
    }
    let active: i64 = sqlx::query_scalar(
        "select count(*) from vault_credential where vault_id = $1 and archived_at is null",
    )
    .bind(vault.uuid())
    .fetch_one(&mut *tx)
    .await?;
    if active >= CREDENTIALS_MAX {
        return Err(RpcError::conflict(format!(
            "A vault holds at most {CREDENTIALS_MAX} credentials"
        ))
        .because("vault_full"));
    }
    // A server has one token, of whichever kind.
    let is_taken: bool = sqlx::query_scalar(
        "select exists (
             select from vault_credential
             where vault_id = $1 and key = $2 and (kind = $4) = ($3 = $4) and archived_at is null
         )",
    )
    .bind(vault.uuid())
    .bind(&request.key)
    .bind(&request.kind)
    .bind(AuthKind::EnvironmentVariable.as_str())
    .fetch_one(&mut *tx)
    .await?;
    if is_taken {
        let message = format!("The vault has an active credential for {}", request.key);
        return Err(RpcError::conflict(message));
    }
    let row: Result<CredentialRow, sqlx::Error> = sqlx::query_as(concat!(
        "insert into vault_credential (credential_id, vault_id, display_name, metadata, kind, key, auth, secret_id)
         values ($1, $2, $3, $4, $5, $6, $7, $8) returning ",
        credential_columns!()
    ))
    .bind(credential.uuid())
    .bind(vault.uuid())
    .bind(&request.display_name)
    .bind(Value::Object(object(&request.metadata)?))
    .bind(&request.kind)
    .bind(&request.key)
    .bind(parsed_json(&request.auth)?)
    .bind(secret_id(Some(&request.secret_id))?)
    .fetch_one(&mut *tx)
    .await;
    let row = row.map_err(|error| idempotency::not_inserted(error, "vault_credential_pkey"))?;
    tx.commit().await?;
    Ok(row.into())
}

pub async fn get_credential(
    scheduler: Scheduler,
    request: GetVaultCredentialRequest,
) -> Result<VaultCredential, RpcError> {
    let (user, vault) = ids(&request.user_id, &request.vault_id)?;
    let credential = request.credential_id.parse().map_err(|_| credential_missing())?;
    let mut connection = scheduler.pool.acquire().await?;
    find(&mut connection, user, vault, "").await?;
    Ok(find_credential(&mut connection, vault, credential, "").await?.into())
}

pub async fn update_credential(
    scheduler: Scheduler,
    request: UpdateVaultCredentialRequest,
) -> Result<VaultCredential, RpcError> {
    let (user, vault) = ids(&request.user_id, &request.vault_id)?;
    let credential: VaultCredentialId =
        request.credential_id.parse().map_err(|_| credential_missing())?;
    let mut tx = scheduler.pool.begin().await?;
    find(&mut tx, user, vault, "for update").await?;
    let row = find_credential(&mut tx, vault, credential, "for update").await?;
    if row.archived_at.is_some() {
        return Err(RpcError::conflict("The credential is archived").because("credential_archived"));
    }
    let name = if request.clear_display_name {
        None
    } else {
        request.display_name.clone().or_else(|| row.display_name.clone())
    };
    let metadata = merged(&row.metadata, request.metadata.as_deref())?;
    let secret = secret_id(request.secret_id.as_deref())?;
    let auth = request.auth.as_deref().map(parsed_json).transpose()?.unwrap_or(row.auth.clone());
    let is_same = name == row.display_name && metadata == row.metadata && auth == row.auth;
    if is_same && secret.is_none() {
        return Ok(row.into());
    }
    if let Some(secret) = secret {
        // A repeated request finds its own secret there.
        sqlx::query(
            "insert into unused_secret (secret_id) select secret_id from vault_credential where credential_id = $1 and secret_id <> $2
             on conflict do nothing",
        )
        .bind(credential.uuid())
        .bind(secret)
        .execute(&mut *tx)
        .await?;
    }
    let changed: CredentialRow = sqlx::query_as(concat!(
        "update vault_credential
         set display_name = $2, metadata = $3, secret_id = coalesce($4, secret_id), auth = $5, updated_at = now()
         where credential_id = $1
         returning ",
        credential_columns!()
    ))
    .bind(credential.uuid())
    .bind(name)
    .bind(metadata)
    .bind(secret)
    .bind(auth)
    .fetch_one(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(changed.into())
}

pub async fn list_credentials(
    scheduler: Scheduler,
    request: ListVaultCredentialsRequest,
) -> Result<ListVaultCredentialsReply, RpcError> {
    let (user, vault) = ids(&request.user_id, &request.vault_id)?;
    find(&mut *scheduler.pool.acquire().await?, user, vault, "").await?;
    let start = PageStart::by_time(request.limit, request.after.as_ref())?;
    let keys = format!(
        "select credential_id from vault_credential where vault_id = $1 and (created_at, credential_id) < ($3, $4) and {}
         order by created_at desc, credential_id desc limit $2 + 1",
        if request.include_archived { "true" } else { "archived_at is null" }
    );
    let list = List {
        keys: &keys,
        table: "vault_credential",
        by_key: "credential_id",
        bytes: "octet_length(metadata::text) + octet_length(auth::text) + coalesce(octet_length(display_name), 0) + 500",
        columns: credential_columns!(),
    };
    let page = list
        .read(&scheduler.pool, |query| {
            query.bind(vault.uuid()).bind(start.limit).bind(start.time).bind(start.id)
        })
        .await?;
    let (rows, has_more): (Vec<CredentialRow>, _) = page;
    Ok(ListVaultCredentialsReply {
        credentials: rows.into_iter().map(VaultCredential::from).collect(),
        has_more,
    })
}

/// Archives a credential; its secret goes, and its key is free. Archiving it again is no error.
pub async fn archive_credential(
    scheduler: Scheduler,
    request: GetVaultCredentialRequest,
) -> Result<VaultCredential, RpcError> {
    let (user, vault) = ids(&request.user_id, &request.vault_id)?;
    let credential: VaultCredentialId =
        request.credential_id.parse().map_err(|_| credential_missing())?;
    let mut tx = scheduler.pool.begin().await?;
    find(&mut tx, user, vault, "for update").await?;
    find_credential(&mut tx, vault, credential, "").await?;
    archive_credentials(&mut tx, vault, Some(credential)).await?;
    let row = find_credential(&mut tx, vault, credential, "").await?;
    tx.commit().await?;
    Ok(row.into())
}

pub async fn delete_credential(
    scheduler: Scheduler,
    request: GetVaultCredentialRequest,
) -> Result<Empty, RpcError> {
    let (user, vault) = ids(&request.user_id, &request.vault_id)?;
    let credential: VaultCredentialId =
        request.credential_id.parse().map_err(|_| credential_missing())?;
    let mut tx = scheduler.pool.begin().await?;
    find(&mut tx, user, vault, "for update").await?;
    find_credential(&mut tx, vault, credential, "").await?;
    forget_secrets(&mut tx, vault, Some(credential)).await?;
    sqlx::query("delete from vault_credential where credential_id = $1")
        .bind(credential.uuid())
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(Empty {})
}

// --- of sessions ---------------------------------------------------------------------------------

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
