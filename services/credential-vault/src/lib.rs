//! The only place where a secret is encrypted or decrypted. Schema `vault`; holds the
//! key-encryption keys.
//!
//! [`keyring`] holds the key-encryption keys, [`envelope`] is how a secret lies in the table;
//! [`secrets`], [`leases`], [`model_tokens`], [`oauth`], [`keys`] and [`audit`] are what others may ask for.

mod audit;
mod envelope;
mod keyring;
mod keys;
mod leases;
pub mod metrics;
mod model_tokens;
mod oauth;
mod routes;
mod secrets;

use std::sync::Arc;

use anyhow::Context as _;
use bus::{Bus, RpcError, responder::Responder};
use contract::{access, common, rpc};
use secrecy::{ExposeSecret as _, SecretString};
use service::{Env, Lifecycle};
use sqlx::PgPool;

use crate::{envelope::Binding, keyring::Keyring};

#[derive(Debug)]
pub struct Config {
    pub bus: bus::Config,
    pub store: store::Config,
    pub encryption_key: SecretString,
    /// A Sprites token for users who stored none.
    pub shared_sprites_token: Option<SecretString>,
}

/// As `openssl rand -base64 32` gives more.
const PRODUCTION_KEY_CHARS_MIN: usize = 32;

impl Config {
    pub fn from_env(env: &mut Env) -> Self {
        let config = Self {
            bus: bus::Config::from_env(env, &access::VAULT),
            store: store::Config::from_env(env),
            encryption_key: env.secret(
                "FIELD_ENCRYPTION_KEY",
                "key-encryption keys: 32 random bytes in base64 or hex, or several as VERSION:KEY; any other text is stretched by Argon2id",
            ),
            shared_sprites_token: env
                .optional_secret("SPRITES_API_KEY", "Sprites API token of the deployment, for users without their own"),
        };
        let production = env.is_production();
        // One that is missing was refused already.
        if !config.encryption_key.expose_secret().is_empty() {
            match Keyring::parse(&config.encryption_key) {
                Err(error) => env.refuse(error.to_string()),
                Ok(keys) if production && keys.shortest() < PRODUCTION_KEY_CHARS_MIN => {
                    env.refuse(format!(
                        "FIELD_ENCRYPTION_KEY: keys have {PRODUCTION_KEY_CHARS_MIN} characters or more (AOD_ENV=production)"
                    ));
                }
                Ok(_) => {}
            }
        }
        config
    }
}

const MIGRATIONS: &[store::Step] = &[
    (
        1,
        "secrets and leases",
        include_str!("../../../migrations/vault/0001_secrets_and_leases.sql"),
    ),
    (2, "key versions", include_str!("../../../migrations/vault/0002_key_versions.sql")),
    (30, "leases of one key", include_str!("../../../migrations/vault/0030_leases_of_one_key.sql")),
    (
        60,
        "tokens for the model gateway",
        include_str!("../../../migrations/vault/0060_model_tokens.sql"),
    ),
    (160, "routes of the model gateway", include_str!("../../../migrations/vault/0160_routes.sql")),
    (210, "refreshes of oauth", include_str!("../../../migrations/vault/0210_oauth_refreshes.sql")),
];

/// The state of the handlers.
#[derive(Clone)]
struct Vault {
    pool: PgPool,
    keys: Arc<Keyring>,
    shared_sprites_token: Option<Arc<SecretString>>,
}

/// Connects, proves that the key opens what is stored, and begins to serve.
///
/// # Errors
/// When Postgres or the bus cannot be reached, or the key is not the one that the stored secrets
/// were encrypted with.
pub async fn run(config: Config, lifecycle: Lifecycle) -> anyhow::Result<()> {
    crate::metrics::describe();
    let pool = store::open(&config.store, "credential-vault", MIGRATIONS).await?;
    lifecycle.spawn("pool", store::observe(pool.clone(), lifecycle.stop_token()));
    let mut keys = Keyring::parse(&config.encryption_key)?;
    keys::verify(&pool, &mut keys).await.context("FIELD_ENCRYPTION_KEY")?;
    let vault = Vault {
        pool: pool.clone(),
        keys: Arc::new(keys),
        shared_sprites_token: config.shared_sprites_token.map(Arc::new),
    };
    let bus = Bus::connect(&config.bus).await.context("bus")?;
    let connection = bus.clone();
    lifecycle.add_check("bus", move || connection.is_connected());

    let responder = Responder::new(
        &bus,
        "credential-vault",
        vault,
        lifecycle.tracker(),
        lifecycle.stop_token(),
    );
    responder.serve::<rpc::PutCredential, _, _>(secrets::put_credential).await?;
    responder.serve::<rpc::ListCredentials, _, _>(secrets::list_credentials).await?;
    responder.serve::<rpc::DeleteCredential, _, _>(secrets::delete_credential).await?;
    responder.serve::<rpc::PutSecret, _, _>(secrets::put_secret).await?;
    responder.serve::<rpc::DeleteSecrets, _, _>(secrets::delete_secrets).await?;
    responder.serve::<rpc::FindAccounts, _, _>(secrets::find_accounts).await?;
    responder.serve::<rpc::MintLease, _, _>(leases::mint).await?;
    responder.serve::<rpc::RedeemLease, _, _>(leases::redeem).await?;
    responder.serve::<rpc::RevokeLeases, _, _>(leases::revoke).await?;
    responder.serve::<rpc::RedeemModelToken, _, _>(model_tokens::redeem).await?;
    responder.serve::<rpc::RevokeModelTokens, _, _>(model_tokens::revoke).await?;
    responder.serve::<rpc::ClaimRefresh, _, _>(oauth::claim).await?;
    responder.serve::<rpc::FinishRefresh, _, _>(oauth::finish).await?;
    responder.serve::<rpc::RotateKeys, _, _>(keys::rotate).await?;
    responder.serve::<rpc::KeyStatus, _, _>(keys::status).await?;
    responder.serve::<rpc::SealingKey, _, _>(keys::sealing_key).await?;
    responder.serve::<rpc::ListRedemptions, _, _>(audit::list).await?;
    // Last, so that every other request is served once this check answers.
    responder.serve::<rpc::VaultHealth, _, _>(health).await?;
    lifecycle.spawn("leases", leases::forget_expired(pool, lifecycle.stop_token()));
    Ok(())
}

/// A real encryption and decryption, and a real query.
async fn health(vault: Vault, _: common::Empty) -> Result<common::Empty, RpcError> {
    let binding =
        Binding { user: types::UserId::new(), kind: "health", secret: types::SecretId::new() };
    let sealed =
        vault.keys.encrypt(vault.keys.newest(), b"health", &binding).map_err(RpcError::internal)?;
    vault.keys.decrypt(&sealed, &binding).map_err(RpcError::internal)?;
    sqlx::query("select 1 from secret limit 1").fetch_optional(&vault.pool).await?;
    Ok(common::Empty {})
}
