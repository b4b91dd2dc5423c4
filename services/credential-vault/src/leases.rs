//! Leases: the time-limited right of one turn or job to redeem some secrets.

use std::time::Duration;

use bus::RpcError;
use contract::{
    common::Empty,
    vault::{
        Bundle, BundledSecret, MintLeaseReply, MintLeaseRequest, RedeemLeaseReply,
        RedeemLeaseRequest, RevokeLeasesRequest, Routes,
    },
};
use prost::Message as _;
use secrecy::ExposeSecret as _;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use types::{CredentialKind, LeaseId, SecretId, SessionId};
use uuid::Uuid;
use zeroize::{Zeroize as _, Zeroizing};

use crate::{
    Vault,
    audit::{self, Outcome, Redeemed},
    model_tokens, routes,
    secrets::{SecretRow, user},
};

/// No turn runs longer than this, so no lease needs to.
const TTL_SECONDS_MAX: u32 = 2 * 60 * 60;
/// How long after its first redemption a lease may be redeemed again: the answer may have been
/// lost.
const REPEAT_SECONDS: f64 = 60.0;
const FORGET_INTERVAL: Duration = Duration::from_secs(600);
const FORGET_AT_A_TIME: u64 = 10_000;

pub async fn mint(vault: Vault, request: MintLeaseRequest) -> Result<MintLeaseReply, RpcError> {
    let id = LeaseId::new();
    let secrets: Result<Vec<Uuid>, _> =
        request.secret_ids.iter().map(|id| id.parse::<SecretId>().map(SecretId::uuid)).collect();
    let (user, session) = (user(&request.user_id)?.uuid(), session(&request.session_id)?.uuid());
    let secrets = secrets.map_err(|_| RpcError::invalid("Malformed secret id"))?;
    let routes = request
        .routes
        .as_ref()
        .filter(|_| !request.model_token_hash.is_empty())
        .map(Routes::encode_to_vec);
    let (own_kinds, proxied_kinds) = match request.model_token_hash.is_empty() {
        true => (request.credential_kinds, Vec::new()),
        false => model_tokens::split(request.credential_kinds),
    };
    let mut tx = vault.pool.begin().await?;
    if !request.model_token_hash.is_empty() {
        model_tokens::register(&mut tx, &request.model_token_hash, user, session, &proxied_kinds)
            .await?;
        if let Some(routes) = &routes {
            model_tokens::route(&mut tx, session, routes, &secrets).await?;
        }
    }
    sqlx::query(
        "insert into lease (lease_id, user_id, session_id, purpose, credential_kinds, secret_ids, expires_at, epoch, public_key, proxied_kinds,
                            routes)
         values ($1, $2, $3, $4, $5, $6, now() + make_interval(secs => $7), $8, $9, $10, $11)",
    )
    .bind(id.uuid())
    .bind(user)
    .bind(session)
    .bind(&request.purpose)
    .bind(&own_kinds)
    .bind(secrets)
    .bind(f64::from(request.ttl_seconds.clamp(1, TTL_SECONDS_MAX)))
    .bind(i64::from(request.epoch))
    .bind(Some(request.public_key).filter(|key| !key.is_empty()))
    .bind(&proxied_kinds)
    .bind(routes)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(MintLeaseReply { lease_id: id.to_string() })
}

#[derive(sqlx::FromRow)]
struct LeaseRow {
    user_id: Uuid,
    session_id: Uuid,
    purpose: String,
    credential_kinds: Vec<String>,
    secret_ids: Vec<Uuid>,
    /// Stored credentials that are left to the model gateway.
    proxied_kinds: Vec<String>,
    routes: Option<Vec<u8>>,
    /// None where a runner of the release before claimed.
    public_key: Option<Vec<u8>>,
    usable: bool,
}

pub async fn redeem(
    vault: Vault,
    request: RedeemLeaseRequest,
) -> Result<RedeemLeaseReply, RpcError> {
    let refused = || RpcError::not_found("Lease not found, expired, revoked or redeemed");
    let id: LeaseId = request.lease_id.parse().map_err(|_| refused())?;
    // A runner that claimed the work meanwhile has a lease of a higher epoch.
    let lease: Option<LeaseRow> = sqlx::query_as(
        "select user_id, session_id, purpose, credential_kinds, secret_ids, routes, public_key,
                array(
                    select kind from secret
                    where secret.user_id = lease.user_id and is_credential and kind = any(lease.proxied_kinds)
                ) as proxied_kinds,
                revoked_at is null and expires_at > now()
                and (redeemed_at is null or redeemed_at > now() - make_interval(secs => $2))
                and (public_key is null or public_key = $3)
                and not exists (
                    select 1 from lease later
                    where later.session_id = lease.session_id and later.purpose = lease.purpose and later.epoch > lease.epoch
                ) as usable
         from lease
         where lease_id = $1",
    )
    .bind(id.uuid())
    .bind(REPEAT_SECONDS)
    .bind(&request.public_key)
    .fetch_optional(&vault.pool)
    .await?;
    let write_down = async |lease: Option<&LeaseRow>, outcome, kinds: &[String]| {
        let (session, purpose) =
            (lease.map(|lease| lease.session_id), lease.map(|lease| lease.purpose.as_str()));
        audit::write(
            &vault.pool,
            &Redeemed { lease: id, session, purpose, runner: &request.runner, outcome, kinds },
        )
        .await
    };
    let lease = match lease {
        Some(lease) if lease.usable => lease,
        unusable => {
            write_down(unusable.as_ref(), Outcome::Refused, &[]).await?;
            return Err(refused());
        }
    };
    let mut bundle = bundle(&vault, &lease).await?;
    let routes =
        Routes::decode(lease.routes.as_deref().unwrap_or_default()).map_err(RpcError::internal)?;
    // The claimant learns which routes there are, and nothing that is sent on them.
    bundle.routes = routes::divide(routes.routes, &mut bundle.secrets);
    bundle.routes.retain(|route| !route.headers.is_empty());
    bundle.routes.iter_mut().for_each(|route| route.refreshable = None);
    routes::without_refresh(&mut bundle.secrets);
    for header in bundle.routes.iter_mut().flat_map(|route| std::mem::take(&mut route.headers)) {
        drop(Zeroizing::new(header.value));
    }
    let kinds: Vec<String> = bundle.secrets.iter().map(|secret| secret.kind.clone()).collect();
    let plaintext = Zeroizing::new(bundle.encode_to_vec());
    bundle.secrets.iter_mut().for_each(|secret| secret.value.zeroize());
    let key = lease.public_key.as_ref().unwrap_or(&request.public_key);
    let sealed = sealing::seal(key, &plaintext, request.lease_id.as_bytes())
        .map_err(|error| RpcError::invalid(format!("The lease cannot be sealed: {error}")))?;
    // Written before the answer leaves: there is no redemption without its audit.
    write_down(Some(&lease), Outcome::Granted, &kinds).await?;
    Ok(RedeemLeaseReply { sealed })
}

/// Leases that ended long ago are forgotten; who redeemed them stays in the audit.
pub async fn forget_expired(pool: PgPool, stop: CancellationToken) {
    service::periodically("leases", FORGET_INTERVAL, stop, || async {
        // As many as there are: two for each session add up to millions a day.
        while forget_some(&pool).await? == FORGET_AT_A_TIME {}
        while model_tokens::forget_some(&pool, FORGET_AT_A_TIME as i64).await? == FORGET_AT_A_TIME {
        }
        Ok::<_, sqlx::Error>(())
    })
    .await;
}

async fn forget_some(pool: &PgPool) -> Result<u64, sqlx::Error> {
    let forgotten = sqlx::query(
        "delete from lease where lease_id = any (array(
             select lease_id from lease where expires_at < now() - interval '1 day' order by expires_at limit $1 for update skip locked
         ))",
    )
    .bind(FORGET_AT_A_TIME as i64)
    .execute(pool)
    .await?;
    Ok(forgotten.rows_affected())
}

/// The lease's secrets, opened. Credentials that are gone meanwhile are left out; the deployment's
/// Sprites token steps in.
async fn bundle(vault: &Vault, lease: &LeaseRow) -> Result<Bundle, RpcError> {
    let rows: Vec<SecretRow> = sqlx::query_as(
        "select secret_id, user_id, kind, key_version, wrapped_key, ciphertext
         from secret
         where user_id = $1 and ((is_credential and kind = any($2)) or secret_id = any($3))",
    )
    .bind(lease.user_id)
    .bind(&lease.credential_kinds)
    .bind(&lease.secret_ids)
    .fetch_all(&vault.pool)
    .await?;
    let mut secrets = Vec::with_capacity(rows.len());
    for row in rows {
        let kind = row.kind.clone();
        secrets.push(BundledSecret {
            kind,
            value: row.open(&vault.keys)?.to_vec(),
            ..BundledSecret::default()
        });
    }
    let sprites = CredentialKind::Sprites.as_str();
    let wanted = lease.credential_kinds.iter().any(|kind| kind == sprites)
        && secrets.iter().all(|secret| secret.kind != sprites);
    if let (true, Some(shared)) = (wanted, &vault.shared_sprites_token) {
        secrets.push(BundledSecret {
            kind: sprites.to_owned(),
            value: shared.expose_secret().as_bytes().to_vec(),
            ..BundledSecret::default()
        });
    }
    Ok(Bundle { secrets, proxied_kinds: lease.proxied_kinds.clone(), routes: Vec::new() })
}

pub async fn revoke(vault: Vault, request: RevokeLeasesRequest) -> Result<Empty, RpcError> {
    let session = session(&request.session_id)?.uuid();
    sqlx::query("update lease set revoked_at = now() where session_id = $1 and revoked_at is null")
        .bind(session)
        .execute(&vault.pool)
        .await?;
    model_tokens::revoke_of(&vault.pool, &[session]).await?;
    Ok(Empty {})
}

fn session(text: &str) -> Result<SessionId, RpcError> {
    text.parse().map_err(|_| RpcError::not_found("Session not found"))
}
