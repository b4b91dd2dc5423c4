//! Refreshes of access tokens: one at a time for each credential, over all replicas of the model
//! gateway. A refresh token that its server replaced is stored before the new access token is used.

use bus::RpcError;
use contract::{
    common::Empty,
    vault::{ClaimRefreshReply, ClaimRefreshRequest, FinishRefreshRequest, RefreshState},
};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use sqlx::PgConnection;
use types::{
    SecretId, UserId,
    vault::{CredentialDocument, DOCUMENT_KIND, OAuth, Refresh},
};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::{
    Vault,
    envelope::Binding,
    keys,
    secrets::{SecretRow, merge_into, unseal},
};

/// How long a claim lasts whose holder says nothing: longer than it tries.
const CLAIM_SECONDS: f64 = 120.0;

/// Grants the right to refresh, if the access token is still the one that is no longer good.
pub async fn claim(
    vault: Vault,
    request: ClaimRefreshRequest,
) -> Result<ClaimRefreshReply, RpcError> {
    let missing = || RpcError::not_found("Token or secret not found");
    let secret: SecretId = request.secret_id.parse().map_err(|_| missing())?;
    let claim: Uuid =
        request.claim_id.parse().map_err(|_| RpcError::invalid("Malformed claim id"))?;
    let mut tx = vault.pool.begin().await?;
    let user: Option<Uuid> = sqlx::query_scalar(
        "select user_id from model_token
         where token_hash = $1 and revoked_at is null and expires_at > now() and $2 = any(secret_ids)",
    )
    .bind(&request.session_token_hash)
    .bind(secret.uuid())
    .fetch_optional(&mut *tx)
    .await?;
    let user = user.ok_or_else(missing)?;
    let row = lock(&mut tx, secret).await?.filter(|row| row.user_id == user);
    let document = document(&vault, row.ok_or_else(missing)?)?;
    let reply = |state: RefreshState| ClaimRefreshReply {
        state: state.into(),
        user_id: UserId::from_uuid(user).to_string(),
        ..ClaimRefreshReply::default()
    };
    if Sha256::digest(&document.value).as_slice() != request.token_hash {
        return Ok(reply(RefreshState::Current));
    }
    let Some(OAuth { refresh: Some(refresh), .. }) = &document.oauth else {
        return Ok(reply(RefreshState::Refused));
    };
    let held: Option<(bool, Option<Vec<u8>>)> = sqlx::query_as(
        "select claimed_until > now() and claim_id <> $2, refused from oauth_refresh where secret_id = $1",
    )
    .bind(secret.uuid())
    .bind(claim)
    .fetch_optional(&mut *tx)
    .await?;
    match held {
        Some((_, Some(refused))) if refused == digest(refresh) => {
            return Ok(reply(RefreshState::Refused));
        }
        Some((true, _)) => return Ok(reply(RefreshState::Busy)),
        _ => {}
    }
    sqlx::query(
        "insert into oauth_refresh (secret_id, claim_id, claimed_until) values ($1, $2, now() + make_interval(secs => $3))
         on conflict (secret_id) do update set claim_id = $2, claimed_until = excluded.claimed_until, refused = null",
    )
    .bind(secret.uuid())
    .bind(claim)
    .bind(CLAIM_SECONDS)
    .execute(&mut *tx)
    .await?;
    let plaintext = Zeroizing::new(serde_json::to_vec(refresh).map_err(RpcError::internal)?);
    let sealed = sealing::seal(&request.public_key, &plaintext, &request.session_token_hash)
        .map_err(|error| RpcError::invalid(format!("The grant cannot be sealed: {error}")))?;
    tx.commit().await?;
    Ok(ClaimRefreshReply { sealed, ..reply(RefreshState::Granted) })
}

/// Stores what a refresh brought. The claim is enough: the session may have ended meanwhile, and
/// its server knows no other refresh token any more.
pub async fn finish(vault: Vault, request: FinishRefreshRequest) -> Result<Empty, RpcError> {
    let missing = || RpcError::not_found("Claim not found");
    let secret: SecretId = request.secret_id.parse().map_err(|_| missing())?;
    let claim: Uuid = request.claim_id.parse().map_err(|_| missing())?;
    let mut tx = vault.pool.begin().await?;
    // Before the claim, as when it was made.
    let row = lock(&mut tx, secret).await?.ok_or_else(missing)?;
    let user = UserId::from_uuid(row.user_id);
    let document = document(&vault, row)?;
    let ended = sqlx::query(
        "update oauth_refresh set claimed_until = now(), claim_id = $3, refused = $4
         where secret_id = $1 and claim_id = $2",
    );
    let refresh = document.oauth.as_ref().and_then(|oauth| oauth.refresh.as_ref());
    let refused = refresh.filter(|_| request.is_refused).map(digest);
    let ended = ended.bind(secret.uuid()).bind(claim).bind(Uuid::new_v4()).bind(refused);
    // One that was repeated, or overtaken.
    if ended.execute(&mut *tx).await?.rows_affected() == 0 {
        return Ok(Empty {});
    }
    if request.sealed.is_some() {
        let user_id = user.to_string();
        let change = unseal(&vault, Vec::new(), request.sealed, &user_id, DOCUMENT_KIND)?;
        let change: Value = serde_json::from_slice(&change)
            .map_err(|_| RpcError::invalid("The change is not a JSON object"))?;
        let version = keys::current(&mut tx).await?;
        let binding = Binding { user, kind: DOCUMENT_KIND, secret };
        merge_into(&vault, &mut tx, &binding, version, change).await?;
    }
    tx.commit().await?;
    Ok(Empty {})
}

/// Forgets the claim and the refusal of a secret that its user changes. A refresh that is under way
/// has asked with what was there before: what it brings is worth nothing any more.
pub async fn overtake(tx: &mut PgConnection, secret: SecretId) -> Result<(), RpcError> {
    sqlx::query("delete from oauth_refresh where secret_id = $1")
        .bind(secret.uuid())
        .execute(tx)
        .await?;
    Ok(())
}

async fn lock(tx: &mut PgConnection, secret: SecretId) -> Result<Option<SecretRow>, RpcError> {
    let row = sqlx::query_as(
        "select secret_id, user_id, kind, key_version, wrapped_key, ciphertext
         from secret where secret_id = $1 and kind = $2 and not is_credential for update",
    );
    Ok(row.bind(secret.uuid()).bind(DOCUMENT_KIND).fetch_optional(tx).await?)
}

fn document(vault: &Vault, row: SecretRow) -> Result<CredentialDocument, RpcError> {
    let plaintext = row.open(&vault.keys)?;
    serde_json::from_slice(&plaintext).map_err(RpcError::internal)
}

fn digest(refresh: &Refresh) -> Vec<u8> {
    Sha256::digest(&refresh.refresh_token).to_vec()
}
