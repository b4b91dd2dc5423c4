//! The key-encryption keys in use: verified at the start, rotated while the service runs.

use anyhow::{Context as _, bail, ensure};
use bus::RpcError;
use contract::{
    common::Empty,
    vault::{KeyStatus, KeyStatusReply, RotateKeysReply, RotateKeysRequest, SealingKeyReply},
};
use sqlx::{PgConnection, PgPool};
use types::{SecretId, UserId};
use uuid::Uuid;

use crate::{
    Vault,
    envelope::{Binding, EnvelopeError},
    keyring::{KeyVersion, Keyring},
    secrets,
};

/// Rows that one request of a rotation re-wraps: well under a second's work.
const BATCH: i64 = 500;

/// Verifies that the configured keys are those that encrypted the stored secrets.
///
/// # Errors
/// Says which version is missing or wrong.
pub async fn verify(pool: &PgPool, keys: &mut Keyring) -> anyhow::Result<()> {
    let mut connection = pool.acquire().await?;
    let known: i64 =
        sqlx::query_scalar("select count(*) from key_version").fetch_one(&mut *connection).await?;
    if known == 0 {
        secrets::open_one(pool, keys)
            .await
            .context("the key does not open the secrets that are stored")?;
        register(&mut connection, keys, keys.newest()).await?;
        sqlx::query("insert into current_key (version) values ($1) on conflict do nothing")
            .bind(keys.newest())
            .execute(&mut *connection)
            .await?;
    }
    let proofs: Vec<(KeyVersion, Vec<u8>, bool)> = sqlx::query_as(
        "select v.version, v.proof,
                exists (select 1 from secret s where s.key_version = v.version) or exists (select 1 from current_key c where c.version = v.version)
         from key_version v
         order by v.version",
    )
    .fetch_all(&mut *connection)
    .await?;
    for (version, proof, in_use) in proofs {
        if keys.holds(version) {
            if !keys.is_proven_by(version, &proof) && keys.use_unstretched(version, &proof) {
                tracing::warn!(
                    version,
                    "key-encryption key is a passphrase that is not stretched; rotate to a new version"
                );
            }
            ensure!(
                keys.is_proven_by(version, &proof),
                "key version {version} is not the key that it was when it encrypted"
            );
        } else if in_use {
            bail!(
                "key version {version} is in use and is not configured; add it back as {version}:KEY"
            );
        }
    }
    Ok(())
}

/// Registers a version with its proof: from then on no other key is accepted under its number.
async fn register(
    connection: &mut PgConnection,
    keys: &Keyring,
    version: KeyVersion,
) -> anyhow::Result<()> {
    let proof = keys.proof(version).context("the key is not configured")??;
    sqlx::query("insert into key_version (version, proof) values ($1, $2) on conflict do nothing")
        .bind(version)
        .bind(proof)
        .execute(&mut *connection)
        .await?;
    let proof: Vec<u8> = sqlx::query_scalar("select proof from key_version where version = $1")
        .bind(version)
        .fetch_one(&mut *connection)
        .await?;
    ensure!(
        keys.is_proven_by(version, &proof),
        "another replica has another key as version {version}"
    );
    Ok(())
}

/// The version to encrypt with. It stays so until the transaction ends.
pub async fn current(tx: &mut PgConnection) -> Result<KeyVersion, RpcError> {
    sqlx::query_scalar("select version from current_key for share")
        .fetch_one(tx)
        .await
        .map_err(RpcError::from)
}

#[derive(sqlx::FromRow)]
struct Wrapped {
    secret_id: Uuid,
    user_id: Uuid,
    kind: String,
    key_version: KeyVersion,
    wrapped_key: Vec<u8>,
}

/// One step of a rotation: the newest key encrypts from here on, and some data keys are wrapped by
/// it. Idempotent and safe to run concurrently.
pub async fn rotate(vault: Vault, request: RotateKeysRequest) -> Result<RotateKeysReply, RpcError> {
    let newest = vault.keys.newest();
    let after = request.after_secret_id.as_deref().map(str::parse::<SecretId>).transpose();
    let after = after
        .map_err(|_| RpcError::invalid("Malformed secret id"))?
        .map_or(Uuid::nil(), SecretId::uuid);
    make_current(&vault, newest).await?;

    let mut tx = vault.pool.begin().await?;
    let rows: Vec<Wrapped> = sqlx::query_as(
        "select secret_id, user_id, kind, key_version, wrapped_key
         from secret
         where key_version < $1 and secret_id > $2
         order by secret_id
         limit $3
         for update",
    )
    .bind(newest)
    .bind(after)
    .bind(BATCH)
    .fetch_all(&mut *tx)
    .await?;
    let last = rows.last().map(|row| SecretId::from_uuid(row.secret_id).to_string());
    let (mut ids, mut wrapped_keys, mut damaged) = (Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        let secret = SecretId::from_uuid(row.secret_id);
        let binding = Binding { user: UserId::from_uuid(row.user_id), kind: &row.kind, secret };
        match vault.keys.rewrap(row.key_version, &row.wrapped_key, newest, &binding) {
            Ok(wrapped) => {
                ids.push(row.secret_id);
                wrapped_keys.push(wrapped);
            }
            Err(error @ EnvelopeError::Damaged { .. }) => {
                tracing::error!(%error, "rotation skipped a secret");
                damaged.push(secret.to_string());
            }
            Err(error) => {
                return Err(RpcError::conflict(format!("The rotation cannot continue: {error}")));
            }
        }
    }
    sqlx::query(
        "update secret s
         set key_version = $3, wrapped_key = n.wrapped_key
         from unnest($1::uuid[], $2::bytea[]) as n (secret_id, wrapped_key)
         where s.secret_id = n.secret_id",
    )
    .bind(&ids)
    .bind(&wrapped_keys)
    .bind(newest)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    let remaining: i64 = sqlx::query_scalar("select count(*) from secret where key_version < $1")
        .bind(newest)
        .fetch_one(&vault.pool)
        .await?;
    Ok(RotateKeysReply {
        version: unsigned(newest),
        rotated: ids.len() as u64,
        remaining: remaining.unsigned_abs(),
        last_secret_id: last,
        damaged_secret_ids: damaged,
    })
}

/// Waits for those who encrypt with the version before.
async fn make_current(vault: &Vault, newest: KeyVersion) -> Result<(), RpcError> {
    let mut tx = vault.pool.begin().await?;
    register(&mut tx, &vault.keys, newest)
        .await
        .map_err(|error| RpcError::conflict(format!("{error:#}")))?;
    sqlx::query("update current_key set version = $1 where version < $1")
        .bind(newest)
        .execute(&mut *tx)
        .await?;
    let current: KeyVersion =
        sqlx::query_scalar("select version from current_key").fetch_one(&mut *tx).await?;
    tx.commit().await?;
    if current > newest {
        let message = format!(
            "Key version {current} encrypts already; the newest configured here is {newest}"
        );
        return Err(RpcError::conflict(message));
    }
    Ok(())
}

/// Every version that is in use or configured.
pub async fn status(vault: Vault, _: Empty) -> Result<KeyStatusReply, RpcError> {
    let counts: Vec<(KeyVersion, i64)> = sqlx::query_as(
        "select v.version, count(s.secret_id)
         from (select version from key_version union select unnest($1::int[])) v
         left join secret s on s.key_version = v.version
         group by v.version
         order by v.version",
    )
    .bind(vault.keys.versions().collect::<Vec<_>>())
    .fetch_all(&vault.pool)
    .await?;
    let current: KeyVersion =
        sqlx::query_scalar("select version from current_key").fetch_one(&vault.pool).await?;
    let keys = counts.into_iter().map(|(version, secrets)| KeyStatus {
        version: unsigned(version),
        is_current: version == current,
        is_configured: vault.keys.holds(version),
        secrets: secrets.unsigned_abs(),
        public_key: vault
            .keys
            .sealing(version)
            .map(|key| key.public().to_vec())
            .unwrap_or_default(),
    });
    Ok(KeyStatusReply { keys: keys.collect() })
}

/// The public key of the version that encrypts, which every replica has while keys are rotated.
pub async fn sealing_key(vault: Vault, _: Empty) -> Result<SealingKeyReply, RpcError> {
    let current: KeyVersion =
        sqlx::query_scalar("select version from current_key").fetch_one(&vault.pool).await?;
    let key = vault
        .keys
        .sealing(current)
        .ok_or_else(|| RpcError::internal(EnvelopeError::UnknownCurrentKey { version: current }))?;
    Ok(SealingKeyReply { key_version: unsigned(current), public_key: key.public().to_vec() })
}

fn unsigned(version: KeyVersion) -> u32 {
    version.unsigned_abs()
}
