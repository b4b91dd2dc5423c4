//! Stored secrets: a user's credentials, and what else refers to a secret by its id.

use bus::RpcError;
use contract::{
    common::Empty,
    vault::{
        Credential, DeleteCredentialRequest, DeleteSecretsRequest, FindAccountsReply,
        FindAccountsRequest, ListCredentialsReply, ListCredentialsRequest, PutCredentialRequest,
        PutSecretReply, PutSecretRequest, SealedValue,
    },
};
use serde_json::Value;
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use types::{
    CredentialKind, ErrorCode, SecretId, Timestamp, UserId, agent::keep_redacted, vault::merge,
};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::{
    Vault,
    envelope::{Binding, Sealed},
    keyring::{KeyVersion, Keyring},
    keys, oauth,
};

const CREDENTIAL_BYTES_MAX: usize = 16 * 1024;

#[derive(sqlx::FromRow)]
pub struct SecretRow {
    pub secret_id: Uuid,
    pub user_id: Uuid,
    pub kind: String,
    pub key_version: i32,
    pub wrapped_key: Vec<u8>,
    pub ciphertext: Vec<u8>,
}

impl SecretRow {
    pub fn open(self, keys: &Keyring) -> Result<Zeroizing<Vec<u8>>, RpcError> {
        let binding = Binding {
            user: UserId::from_uuid(self.user_id),
            kind: &self.kind,
            secret: SecretId::from_uuid(self.secret_id),
        };
        let sealed = Sealed {
            key_version: self.key_version,
            wrapped_key: self.wrapped_key,
            ciphertext: self.ciphertext,
        };
        keys.decrypt(&sealed, &binding).map_err(RpcError::internal)
    }
}

/// Opens one stored secret, if there is any.
///
/// # Errors
/// When it does not open.
pub async fn open_one(pool: &PgPool, keys: &Keyring) -> anyhow::Result<()> {
    let row: Option<SecretRow> = sqlx::query_as(
        "select secret_id, user_id, kind, key_version, wrapped_key, ciphertext from secret limit 1",
    )
    .fetch_optional(pool)
    .await?;
    if let Some(row) = row {
        row.open(keys)?;
    }
    Ok(())
}

#[derive(sqlx::FromRow)]
struct CredentialRow {
    kind: String,
    hint: String,
    created_at: OffsetDateTime,
    updated_at: OffsetDateTime,
}

impl From<CredentialRow> for Credential {
    fn from(row: CredentialRow) -> Self {
        let micros = |time: OffsetDateTime| Timestamp::from(time).unix_micros();
        Self {
            kind: row.kind,
            hint: row.hint,
            created_at_us: micros(row.created_at),
            updated_at_us: micros(row.updated_at),
        }
    }
}

pub async fn put_credential(
    vault: Vault,
    request: PutCredentialRequest,
) -> Result<Credential, RpcError> {
    let value = unseal(&vault, request.value, request.sealed, &request.user_id, &request.kind)?;
    let user = user(&request.user_id)?;
    let kind: CredentialKind =
        request.kind.parse().map_err(|_| RpcError::not_found("Credential not found"))?;
    let text = std::str::from_utf8(&value)
        .ok()
        .filter(|text| !text.is_empty() && text.len() <= CREDENTIAL_BYTES_MAX);
    let text = text.filter(|text| !text.contains(['\0', '\n', '\r'])).ok_or_else(|| {
        let message =
            format!("Value error, a credential is one line of 1 to {CREDENTIAL_BYTES_MAX} bytes");
        RpcError::new(ErrorCode::Unprocessable, message).at_field("value", "***")
    })?;
    let hint = hint(text);
    let mut tx = vault.pool.begin().await?;
    // The id of a credential that is replaced stays, for the encryption is bound to it.
    let fresh = SecretId::new();
    let id: Uuid = sqlx::query_scalar(
        "insert into secret (secret_id, user_id, kind, is_credential, hint, key_version, wrapped_key, ciphertext)
         values ($1, $2, $3, true, '', 0, '', '')
         on conflict (user_id, kind) where is_credential do update set updated_at = now()
         returning secret_id",
    )
    .bind(fresh.uuid())
    .bind(user.uuid())
    .bind(kind.as_str())
    .fetch_one(&mut *tx)
    .await?;
    let binding = Binding { user, kind: kind.as_str(), secret: SecretId::from_uuid(id) };
    let version = keys::current(&mut tx).await?;
    let sealed = vault.keys.encrypt(version, &value, &binding).map_err(RpcError::internal)?;
    let row: CredentialRow = sqlx::query_as(
        "update secret
         set hint = $2, key_version = $3, wrapped_key = $4, ciphertext = $5
         where secret_id = $1
         returning kind, hint, created_at, updated_at",
    )
    .bind(id)
    .bind(hint)
    .bind(sealed.key_version)
    .bind(sealed.wrapped_key)
    .bind(sealed.ciphertext)
    .fetch_one(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(row.into())
}

pub async fn list_credentials(
    vault: Vault,
    request: ListCredentialsRequest,
) -> Result<ListCredentialsReply, RpcError> {
    let rows = credentials(&vault.pool, user(&request.user_id)?).await?;
    let mut credentials: Vec<Credential> = rows.into_iter().map(Credential::from).collect();
    // A deployment's own token serves everybody; it is no user's, so it shows no hint and cannot be
    // deleted.
    let sprites = CredentialKind::Sprites.as_str();
    if vault.shared_sprites_token.is_some()
        && credentials.iter().all(|credential| credential.kind != sprites)
    {
        credentials.push(Credential { kind: sprites.to_owned(), ..Credential::default() });
    }
    Ok(ListCredentialsReply { credentials })
}

/// Reads no token: two users that stored the same one count as two accounts.
pub async fn find_accounts(
    vault: Vault,
    request: FindAccountsRequest,
) -> Result<FindAccountsReply, RpcError> {
    let users: Vec<Uuid> =
        request.user_ids.iter().map(|id| user(id).map(UserId::uuid)).collect::<Result<_, _>>()?;
    let mut accounts: Vec<Uuid> =
        sqlx::query_scalar("select user_id from secret where user_id = any($1) and is_credential and kind = $2 order by user_id")
            .bind(&users)
            .bind(CredentialKind::Sprites.as_str())
            .fetch_all(&vault.pool)
            .await?;
    if vault.shared_sprites_token.is_some() {
        let sharing = users.into_iter().find(|user| accounts.binary_search(user).is_err());
        accounts.extend(sharing);
    }
    Ok(FindAccountsReply {
        user_ids: accounts.into_iter().map(|id| UserId::from_uuid(id).to_string()).collect(),
    })
}

async fn credentials(pool: &PgPool, user: UserId) -> Result<Vec<CredentialRow>, RpcError> {
    sqlx::query_as("select kind, hint, created_at, updated_at from secret where user_id = $1 and is_credential order by kind")
        .bind(user.uuid())
        .fetch_all(pool)
        .await
        .map_err(RpcError::from)
}

pub async fn delete_credential(
    vault: Vault,
    request: DeleteCredentialRequest,
) -> Result<Empty, RpcError> {
    let deleted =
        sqlx::query("delete from secret where user_id = $1 and kind = $2 and is_credential")
            .bind(user(&request.user_id)?.uuid())
            .bind(&request.kind)
            .execute(&vault.pool)
            .await?;
    if deleted.rows_affected() == 0 {
        Err(RpcError::not_found("Credential not found"))
    } else {
        Ok(Empty {})
    }
}

/// Keeps a document of secrets. One that follows another takes over what is redacted in it, and is
/// that other where nothing changed.
pub async fn put_secret(
    vault: Vault,
    request: PutSecretRequest,
) -> Result<PutSecretReply, RpcError> {
    let value = unseal(&vault, request.value, request.sealed, &request.user_id, &request.kind)?;
    let user = user(&request.user_id)?;
    let malformed = || RpcError::invalid("A secret is a JSON object");
    let new: Value = serde_json::from_slice(&value).map_err(|_| malformed())?;
    let base = match &request.base_secret_id {
        None => None,
        Some(id) => Some(read(&vault, user, id, &request.kind).await?),
    };
    let new = if request.keep_redacted {
        keep_redacted(new, base.as_ref())
            .ok_or_else(|| RpcError::invalid("A redacted value has nothing that it could keep"))?
    } else {
        new
    };
    if let (Some(id), true) = (request.base_secret_id, base.as_ref() == Some(&new)) {
        return Ok(PutSecretReply { secret_id: id });
    }
    let value = Zeroizing::new(new.to_string());
    let id = match request.secret_id.as_str() {
        "" => SecretId::new(),
        id => id.parse().map_err(|_| RpcError::invalid("The id is not a lowercase UUID"))?,
    };
    let binding = Binding { user, kind: &request.kind, secret: id };
    let mut tx = vault.pool.begin().await?;
    let version = keys::current(&mut tx).await?;
    let sealed =
        vault.keys.encrypt(version, value.as_bytes(), &binding).map_err(RpcError::internal)?;
    let inserted = sqlx::query(
        "insert into secret (secret_id, user_id, kind, is_credential, hint, key_version, wrapped_key, ciphertext)
         values ($1, $2, $3, false, '', $4, $5, $6)
         on conflict (secret_id) do nothing",
    )
    .bind(id.uuid())
    .bind(user.uuid())
    .bind(binding.kind)
    .bind(sealed.key_version)
    .bind(sealed.wrapped_key)
    .bind(sealed.ciphertext)
    .execute(&mut *tx)
    .await?;
    if request.merge && inserted.rows_affected() == 0 {
        merge_into(&vault, &mut tx, &binding, version, new).await?;
        oauth::overtake(&mut tx, id).await?;
    }
    tx.commit().await?;
    Ok(PutSecretReply { secret_id: id.to_string() })
}

/// Merges a change into a stored document. Its id stays, so leases that refer to it get the new
/// values.
pub async fn merge_into(
    vault: &Vault,
    tx: &mut PgConnection,
    binding: &Binding<'_>,
    version: i32,
    change: Value,
) -> Result<(), RpcError> {
    let row: Option<SecretRow> = sqlx::query_as(
        "select secret_id, user_id, kind, key_version, wrapped_key, ciphertext
         from secret
         where secret_id = $1 and user_id = $2 and kind = $3 and not is_credential
         for update",
    )
    .bind(binding.secret.uuid())
    .bind(binding.user.uuid())
    .bind(binding.kind)
    .fetch_optional(&mut *tx)
    .await?;
    let stored = row.ok_or_else(|| RpcError::not_found("Secret not found"))?.open(&vault.keys)?;
    let mut document = serde_json::from_slice(&stored).map_err(RpcError::internal)?;
    merge(&mut document, change);
    let merged = Zeroizing::new(document.to_string());
    let sealed =
        vault.keys.encrypt(version, merged.as_bytes(), binding).map_err(RpcError::internal)?;
    sqlx::query("update secret set key_version = $2, wrapped_key = $3, ciphertext = $4, updated_at = now() where secret_id = $1")
        .bind(binding.secret.uuid())
        .bind(sealed.key_version)
        .bind(sealed.wrapped_key)
        .bind(sealed.ciphertext)
        .execute(tx)
        .await?;
    Ok(())
}

/// A user's document of a kind.
async fn read(vault: &Vault, user: UserId, id: &str, kind: &str) -> Result<Value, RpcError> {
    let missing = || RpcError::not_found("Secret not found");
    let id: SecretId = id.parse().map_err(|_| missing())?;
    let row: Option<SecretRow> = sqlx::query_as(
        "select secret_id, user_id, kind, key_version, wrapped_key, ciphertext
         from secret
         where secret_id = $1 and user_id = $2 and kind = $3 and not is_credential",
    )
    .bind(id.uuid())
    .bind(user.uuid())
    .bind(kind)
    .fetch_optional(&vault.pool)
    .await?;
    let plaintext = row.ok_or_else(missing)?.open(&vault.keys)?;
    serde_json::from_slice(&plaintext).map_err(RpcError::internal)
}

pub async fn delete_secrets(
    vault: Vault,
    request: DeleteSecretsRequest,
) -> Result<Empty, RpcError> {
    let ids: Vec<Uuid> = request
        .secret_ids
        .iter()
        .filter_map(|id| id.parse::<SecretId>().ok())
        .map(SecretId::uuid)
        .collect();
    sqlx::query("delete from secret where secret_id = any($1) and not is_credential")
        .bind(ids)
        .execute(&vault.pool)
        .await?;
    Ok(Empty {})
}

/// A value as it was before it was sealed to this vault.
pub fn unseal(
    vault: &Vault,
    clear: Vec<u8>,
    sealed: Option<SealedValue>,
    user: &str,
    kind: &str,
) -> Result<Zeroizing<Vec<u8>>, RpcError> {
    let Some(sealed) = sealed else { return Ok(Zeroizing::new(clear)) };
    // A version that was removed since its key was asked for.
    let key = KeyVersion::try_from(sealed.key_version)
        .ok()
        .and_then(|version| vault.keys.sealing(version));
    let key = key.ok_or_else(|| RpcError::unavailable("The key that the value is sealed to"))?;
    key.open(&sealed.sealed, &bus::vault::context(user, kind))
        .map_err(|_| RpcError::invalid("The sealed value does not open"))
}

pub fn user(text: &str) -> Result<UserId, RpcError> {
    text.parse().map_err(|_| RpcError::not_found("User not found"))
}

/// The last four characters; none of a value so short that four would give it away.
fn hint(value: &str) -> String {
    let count = value.chars().count();
    if count < 12 { String::new() } else { value.chars().skip(count - 4).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_value_gives_no_hint() {
        assert_eq!(hint("sk-ant-12345"), "2345");
        assert_eq!(hint("short"), "");
    }
}
