//! Credentials in vaults of the Managed Agents API. Their secrets are at the credential vault.

use bus::RpcError;
use contract::{
    common::Empty,
    scheduler::{
        CreateVaultCredentialRequest, GetVaultCredentialRequest, ListVaultCredentialsReply,
        ListVaultCredentialsRequest, UpdateVaultCredentialRequest, VaultCredential,
    },
};
use serde_json::Value;
use sqlx::PgConnection;
use time::OffsetDateTime;
use types::{
    VaultCredentialId, VaultId,
    vault::{AuthKind, CREDENTIALS_MAX},
};
use uuid::Uuid;

use crate::{
    Scheduler,
    catalog::vaults,
    db::{
        idempotency,
        page::{List, PageStart},
    },
    micros, parsed_json, secret_id,
};

macro_rules! credential_columns {
    () => {
        "credential_id, vault_id, display_name, metadata, auth, secret_id, created_at, updated_at, archived_at"
    };
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
    RpcError::not_found("Credential not found")
}

async fn find(
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
    row.await?.ok_or_else(missing)
}

pub async fn create(
    scheduler: Scheduler,
    request: CreateVaultCredentialRequest,
) -> Result<VaultCredential, RpcError> {
    let (user, vault) = vaults::ids(&request.user_id, &request.vault_id)?;
    let credential: VaultCredentialId = request.credential_id.parse().map_err(|_| missing())?;
    let mut tx = scheduler.pool.begin().await?;
    // Locked: credentials are counted.
    if vaults::find(&mut tx, user, vault, "for update").await?.archived_at.is_some() {
        return Err(vaults::archived());
    }
    if let Ok(earlier) = find(&mut tx, vault, credential, "").await {
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
    .bind(Value::Object(vaults::object(&request.metadata)?))
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

pub async fn get(
    scheduler: Scheduler,
    request: GetVaultCredentialRequest,
) -> Result<VaultCredential, RpcError> {
    let (user, vault) = vaults::ids(&request.user_id, &request.vault_id)?;
    let credential = request.credential_id.parse().map_err(|_| missing())?;
    let mut connection = scheduler.pool.acquire().await?;
    vaults::find(&mut connection, user, vault, "").await?;
    Ok(find(&mut connection, vault, credential, "").await?.into())
}

pub async fn update(
    scheduler: Scheduler,
    request: UpdateVaultCredentialRequest,
) -> Result<VaultCredential, RpcError> {
    let (user, vault) = vaults::ids(&request.user_id, &request.vault_id)?;
    let credential: VaultCredentialId = request.credential_id.parse().map_err(|_| missing())?;
    let mut tx = scheduler.pool.begin().await?;
    vaults::find(&mut tx, user, vault, "for update").await?;
    let row = find(&mut tx, vault, credential, "for update").await?;
    if row.archived_at.is_some() {
        return Err(RpcError::conflict("The credential is archived").because("credential_archived"));
    }
    let name = if request.clear_display_name {
        None
    } else {
        request.display_name.clone().or_else(|| row.display_name.clone())
    };
    let metadata = vaults::merged(&row.metadata, request.metadata.as_deref())?;
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

pub async fn list(
    scheduler: Scheduler,
    request: ListVaultCredentialsRequest,
) -> Result<ListVaultCredentialsReply, RpcError> {
    let (user, vault) = vaults::ids(&request.user_id, &request.vault_id)?;
    vaults::find(&mut *scheduler.pool.acquire().await?, user, vault, "").await?;
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
pub async fn archive(
    scheduler: Scheduler,
    request: GetVaultCredentialRequest,
) -> Result<VaultCredential, RpcError> {
    let (user, vault) = vaults::ids(&request.user_id, &request.vault_id)?;
    let credential: VaultCredentialId = request.credential_id.parse().map_err(|_| missing())?;
    let mut tx = scheduler.pool.begin().await?;
    vaults::find(&mut tx, user, vault, "for update").await?;
    find(&mut tx, vault, credential, "").await?;
    archive_some(&mut tx, vault, Some(credential)).await?;
    let row = find(&mut tx, vault, credential, "").await?;
    tx.commit().await?;
    Ok(row.into())
}

pub async fn delete(
    scheduler: Scheduler,
    request: GetVaultCredentialRequest,
) -> Result<Empty, RpcError> {
    let (user, vault) = vaults::ids(&request.user_id, &request.vault_id)?;
    let credential: VaultCredentialId = request.credential_id.parse().map_err(|_| missing())?;
    let mut tx = scheduler.pool.begin().await?;
    vaults::find(&mut tx, user, vault, "for update").await?;
    find(&mut tx, vault, credential, "").await?;
    forget_secrets(&mut tx, vault, Some(credential)).await?;
    sqlx::query("delete from vault_credential where credential_id = $1")
        .bind(credential.uuid())
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(Empty {})
}

/// Archives one credential of a vault, or all of them.
pub async fn archive_some(
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
pub async fn forget_secrets(
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
