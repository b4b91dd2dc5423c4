//! Tokens that agents show to the model gateway instead of a provider's key. The vault stores their
//! hashes, and which credentials and which [`routes`] they stand for.

use bus::RpcError;
use contract::{
    common::Empty,
    vault::{
        Bundle, BundledSecret, RedeemModelTokenReply, RedeemModelTokenRequest,
        RevokeModelTokensRequest, RouteKind, Routes,
    },
};
use prost::Message as _;
use sqlx::{PgPool, Postgres, Transaction};
use types::{CredentialKind, LeaseId, SessionId, UserId};
use uuid::Uuid;
use zeroize::{Zeroize as _, Zeroizing};

use crate::{
    Vault,
    audit::{self, Outcome, Redeemed},
    routes,
    secrets::SecretRow,
};

pub const HASH_BYTES: usize = 32;
/// How long after the session's last claim, or its own last use, a token is good: longer than an
/// agent waits for a decision. It ends with its session anyway.
const LIFE_SECONDS: f64 = 7.0 * 24.0 * 60.0 * 60.0;
/// How long a token is kept after it expired. A session's next claim renews it: the configuration
/// of its CLI holds the token of its first turn. Tokens of sessions that ended are revoked, and
/// deleted after a day.
const EXPIRED_KEPT_SECONDS: f64 = 400.0 * 24.0 * 60.0 * 60.0;
/// A model gateway redeems a token again each minute while it is used: the audit shows the first
/// time within this.
const AUDIT_EVERY_SECONDS: f64 = 60.0 * 60.0;
const PURPOSE: &str = "models";

/// The kinds that a lease holds itself, and those that are left to the model gateway.
pub fn split(kinds: Vec<String>) -> (Vec<String>, Vec<String>) {
    kinds.into_iter().partition(|kind| kind == CredentialKind::Sprites.as_str())
}

/// Registers a token of a session, and renews the session's other tokens: a process from an earlier
/// turn may still hold one.
pub async fn register(
    tx: &mut Transaction<'_, Postgres>,
    token_hash: &[u8],
    user: Uuid,
    session: Uuid,
    kinds: &[String],
) -> Result<(), RpcError> {
    if token_hash.len() != HASH_BYTES {
        return Err(RpcError::invalid("Malformed token hash"));
    }
    sqlx::query(
        "insert into model_token (token_hash, token_id, user_id, session_id, credential_kinds, expires_at)
         values ($1, $2, $3, $4, $5, now() + make_interval(secs => $6))
         on conflict (token_hash) do nothing",
    )
    .bind(token_hash)
    .bind(LeaseId::new().uuid())
    .bind(user)
    .bind(session)
    .bind(kinds)
    .bind(LIFE_SECONDS)
    .execute(&mut **tx)
    .await?;
    sqlx::query(
        "update model_token set expires_at = now() + make_interval(secs => $2)
         where session_id = $1 and revoked_at is null and expires_at < now() + make_interval(secs => $2)",
    )
    .bind(session)
    .bind(LIFE_SECONDS)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

pub async fn revoke(vault: Vault, request: RevokeModelTokensRequest) -> Result<Empty, RpcError> {
    let sessions: Result<Vec<SessionId>, ()> =
        request.session_ids.iter().map(|id| id.parse().map_err(drop)).collect();
    let sessions: Vec<Uuid> = sessions
        .map_err(|()| RpcError::invalid("Malformed session id"))?
        .into_iter()
        .map(SessionId::uuid)
        .collect();
    revoke_of(&vault.pool, &sessions).await?;
    Ok(Empty {})
}

pub async fn revoke_of(pool: &PgPool, sessions: &[Uuid]) -> Result<(), RpcError> {
    sqlx::query("update model_token set revoked_at = now() where session_id = any($1) and revoked_at is null")
        .bind(sessions)
        .execute(pool)
        .await?;
    Ok(())
}

/// Replaces what a session's tokens stand for besides credentials: a process or a file of an
/// earlier turn may still hold one of them.
pub async fn route(
    tx: &mut Transaction<'_, Postgres>,
    session: Uuid,
    routes: &[u8],
    secrets: &[Uuid],
) -> Result<(), RpcError> {
    sqlx::query("update model_token set routes = $2, secret_ids = $3 where session_id = $1 and revoked_at is null")
        .bind(session)
        .bind(routes)
        .bind(secrets)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

#[derive(sqlx::FromRow)]
struct TokenRow {
    token_id: Uuid,
    user_id: Uuid,
    session_id: Uuid,
    credential_kinds: Vec<String>,
    routes: Option<Vec<u8>>,
    secret_ids: Vec<Uuid>,
}

pub async fn redeem(
    vault: Vault,
    request: RedeemModelTokenRequest,
) -> Result<RedeemModelTokenReply, RpcError> {
    let token: Option<TokenRow> = sqlx::query_as(
        "update model_token set expires_at = now() + make_interval(secs => $2)
         where token_hash = $1 and revoked_at is null and expires_at > now()
         returning token_id, user_id, session_id, credential_kinds, routes, secret_ids",
    )
    .bind(&request.token_hash)
    .bind(LIFE_SECONDS)
    .fetch_optional(&vault.pool)
    .await?;
    let token = token.ok_or_else(|| RpcError::not_found("Token not found, expired or revoked"))?;
    let rows: Vec<SecretRow> = sqlx::query_as(
        "select secret_id, user_id, kind, key_version, wrapped_key, ciphertext
         from secret where user_id = $1 and ((is_credential and kind = any($2)) or (not is_credential and secret_id = any($3)))",
    )
    .bind(token.user_id)
    .bind(&token.credential_kinds)
    .bind(&token.secret_ids)
    .fetch_all(&vault.pool)
    .await?;
    let mut bundle = Bundle::default();
    for row in rows {
        let (kind, secret_id) = (row.kind.clone(), row.secret_id.to_string());
        let value = row.open(&vault.keys)?.to_vec();
        bundle.secrets.push(BundledSecret { kind, value, secret_id });
    }
    let routes =
        Routes::decode(token.routes.as_deref().unwrap_or_default()).map_err(RpcError::internal)?;
    bundle.routes = routes::divide(routes.routes, &mut bundle.secrets);
    // A server that has no secret may have had one when its route was written into the sandbox; a
    // repository has another way.
    bundle.routes.retain(|route| route.kind() == RouteKind::Mcp || !route.headers.is_empty());
    bundle.secrets.retain_mut(|secret| {
        let is_credential = token.credential_kinds.contains(&secret.kind);
        if !is_credential {
            secret.value.zeroize();
        }
        is_credential
    });
    let routed = bundle
        .routes
        .iter()
        .filter(|route| !route.headers.is_empty())
        .map(|route| route_kind(route.kind()));
    let mut kinds: Vec<String> = bundle
        .secrets
        .iter()
        .map(|secret| secret.kind.as_str())
        .chain(routed)
        .map(str::to_owned)
        .collect();
    kinds.dedup();
    let plaintext = Zeroizing::new(bundle.encode_to_vec());
    bundle.secrets.iter_mut().for_each(|secret| secret.value.zeroize());
    bundle
        .routes
        .iter_mut()
        .flat_map(|route| &mut route.headers)
        .for_each(|header| header.value.zeroize());
    let sealed = sealing::seal(&request.public_key, &plaintext, &request.token_hash)
        .map_err(|error| RpcError::invalid(format!("The credentials cannot be sealed: {error}")))?;
    // Written before the answer leaves: there is no redemption without its audit.
    let redeemed = Redeemed {
        lease: LeaseId::from_uuid(token.token_id),
        session: Some(token.session_id),
        purpose: Some(PURPOSE),
        runner: &request.gateway,
        outcome: Outcome::Granted,
        kinds: &kinds,
    };
    audit::write_unless_repeated(&vault.pool, &redeemed, AUDIT_EVERY_SECONDS).await?;
    Ok(RedeemModelTokenReply {
        user_id: UserId::from_uuid(token.user_id).to_string(),
        session_id: SessionId::from_uuid(token.session_id).to_string(),
        sealed,
    })
}

/// What the audit calls a route's secret.
fn route_kind(kind: RouteKind) -> &'static str {
    match kind {
        RouteKind::Mcp => "mcp_header",
        RouteKind::Git => "repository_token",
        RouteKind::Unspecified => "",
    }
}

/// Deletes tokens that ended long ago, a batch at a time.
pub async fn forget_some(pool: &PgPool, limit: i64) -> Result<u64, sqlx::Error> {
    let forgotten = sqlx::query(
        "delete from model_token where token_hash = any (array(
             select token_hash from model_token
             where expires_at < now() - make_interval(secs => $2) or revoked_at < now() - interval '1 day' limit $1 for update skip locked
         ))",
    );
    Ok(forgotten.bind(limit).bind(EXPIRED_KEPT_SECONDS).execute(pool).await?.rows_affected())
}
