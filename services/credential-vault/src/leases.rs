//! Leases: the right of one piece of work to have some secrets unsealed for a while.

use bus::Failure;
use contract::{
    common::Empty,
    vault::{Bundle, BundledSecret, MintLeaseReply, MintLeaseRequest, RedeemLeaseReply, RedeemLeaseRequest, RevokeLeasesRequest},
};
use prost::Message as _;
use secrecy::ExposeSecret as _;
use sqlx::PgPool;
use types::{CredentialKind, LeaseId, SecretId, SessionId};
use uuid::Uuid;
use zeroize::{Zeroize as _, Zeroizing};

use crate::{
    Vault,
    secrets::{SecretRow, user},
};

/// No turn runs longer than this, so no lease needs to.
const TTL_SECONDS_MAX: u32 = 2 * 60 * 60;

pub async fn mint(vault: Vault, request: MintLeaseRequest) -> Result<MintLeaseReply, Failure> {
    let id = LeaseId::new();
    let secrets: Result<Vec<Uuid>, _> = request.secret_ids.iter().map(|id| id.parse::<SecretId>().map(SecretId::uuid)).collect();
    sqlx::query(
        "insert into lease (lease_id, user_id, session_id, purpose, credential_kinds, secret_ids, expires_at)
         values ($1, $2, $3, $4, $5, $6, now() + make_interval(secs => $7))",
    )
    .bind(id.uuid())
    .bind(user(&request.user_id)?.uuid())
    .bind(session(&request.session_id)?.uuid())
    .bind(&request.purpose)
    .bind(&request.credential_kinds)
    .bind(secrets.map_err(|_| Failure::invalid("Malformed secret id"))?)
    .bind(f64::from(request.ttl_seconds.clamp(1, TTL_SECONDS_MAX)))
    .execute(&vault.pool)
    .await
    .map_err(Failure::internal)?;
    Ok(MintLeaseReply { lease_id: id.to_string() })
}

#[derive(sqlx::FromRow)]
struct LeaseRow {
    user_id: Uuid,
    session_id: Uuid,
    credential_kinds: Vec<String>,
    secret_ids: Vec<Uuid>,
    usable: bool,
}

pub async fn redeem(vault: Vault, request: RedeemLeaseRequest) -> Result<RedeemLeaseReply, Failure> {
    let refused = || Failure::not_found("Lease not found, expired or revoked");
    let id: LeaseId = request.lease_id.parse().map_err(|_| refused())?;
    let lease: Option<LeaseRow> = sqlx::query_as(
        "select user_id, session_id, credential_kinds, secret_ids, (revoked_at is null and expires_at > now()) as usable
         from lease
         where lease_id = $1",
    )
    .bind(id.uuid())
    .fetch_optional(&vault.pool)
    .await
    .map_err(Failure::internal)?;
    let Some(lease) = lease.filter(|lease| lease.usable) else {
        audit(&vault.pool, id, None, &request.runner, "refused", &[]).await?;
        return Err(refused());
    };
    let mut bundle = bundle(&vault, &lease).await?;
    let kinds: Vec<String> = bundle.secrets.iter().map(|secret| secret.kind.clone()).collect();
    let plaintext = Zeroizing::new(bundle.encode_to_vec());
    bundle.secrets.iter_mut().for_each(|secret| secret.value.zeroize());
    let sealed = sealing::seal(&request.public_key, &plaintext, request.lease_id.as_bytes())
        .map_err(|error| Failure::invalid(format!("The lease cannot be sealed: {error}")))?;
    // Written before the answer leaves: there is no redemption without its audit.
    audit(&vault.pool, id, Some(lease.session_id), &request.runner, "granted", &kinds).await?;
    Ok(RedeemLeaseReply { sealed })
}

/// The lease's secrets, opened. Credentials that are gone meanwhile are left out; the deployment's Sprites token steps in.
async fn bundle(vault: &Vault, lease: &LeaseRow) -> Result<Bundle, Failure> {
    let rows: Vec<SecretRow> = sqlx::query_as(
        "select secret_id, user_id, kind, key_version, wrapped_key, ciphertext
         from secret
         where user_id = $1 and ((is_credential and kind = any($2)) or secret_id = any($3))",
    )
    .bind(lease.user_id)
    .bind(&lease.credential_kinds)
    .bind(&lease.secret_ids)
    .fetch_all(&vault.pool)
    .await
    .map_err(Failure::internal)?;
    let mut secrets = Vec::with_capacity(rows.len());
    for row in rows {
        let kind = row.kind.clone();
        secrets.push(BundledSecret { kind, value: vault.open(row)?.to_vec() });
    }
    let sprites = CredentialKind::Sprites.as_str();
    let wanted = lease.credential_kinds.iter().any(|kind| kind == sprites) && secrets.iter().all(|secret| secret.kind != sprites);
    if let (true, Some(shared)) = (wanted, &vault.shared_sprites_token) {
        secrets.push(BundledSecret { kind: sprites.to_owned(), value: shared.expose_secret().as_bytes().to_vec() });
    }
    Ok(Bundle { secrets })
}

async fn audit(pool: &PgPool, lease: LeaseId, session: Option<Uuid>, runner: &str, outcome: &str, kinds: &[String]) -> Result<(), Failure> {
    sqlx::query("insert into redemption (lease_id, session_id, runner, outcome, kinds) values ($1, $2, $3, $4, $5)")
        .bind(lease.uuid())
        .bind(session)
        .bind(runner)
        .bind(outcome)
        .bind(kinds)
        .execute(pool)
        .await
        .map_err(Failure::internal)?;
    Ok(())
}

pub async fn revoke(vault: Vault, request: RevokeLeasesRequest) -> Result<Empty, Failure> {
    sqlx::query("update lease set revoked_at = now() where session_id = $1 and revoked_at is null")
        .bind(session(&request.session_id)?.uuid())
        .execute(&vault.pool)
        .await
        .map_err(Failure::internal)?;
    Ok(Empty {})
}

fn session(text: &str) -> Result<SessionId, Failure> {
    text.parse().map_err(|_| Failure::not_found("Session not found"))
}
