//! Users, API keys and quotas. Schema `auth`; holds no secret but the hashes of keys.

mod console_sessions;
mod keys;
mod users;

use anyhow::Context as _;
use bus::{Bus, responder::Responder};
use contract::{access, common, rpc};
use service::{Env, Lifecycle};
use sqlx::PgPool;

#[derive(Debug)]
pub struct Config {
    pub bus: bus::Config,
    pub store: store::Config,
}

impl Config {
    pub fn from_env(env: &mut Env) -> Self {
        Self { bus: bus::Config::from_env(env, &access::AUTH), store: store::Config::from_env(env) }
    }
}

const MIGRATIONS: &[store::Step] = &[
    (1, "users and keys", include_str!("../../../migrations/auth/0001_users_and_keys.sql")),
    (40, "console sessions", include_str!("../../../migrations/auth/0040_console_sessions.sql")),
];

/// Connects and begins to serve.
///
/// # Errors
/// When Postgres or the bus cannot be reached.
pub async fn run(config: Config, lifecycle: Lifecycle) -> anyhow::Result<()> {
    let pool = store::open(&config.store, "auth", MIGRATIONS).await?;
    lifecycle.spawn("pool", store::observe(pool.clone(), lifecycle.stop_token()));
    let bus = Bus::connect(&config.bus).await.context("bus")?;
    let connection = bus.clone();
    lifecycle.add_check("bus", move || connection.is_connected());

    let responder = Responder::new(&bus, "auth", pool, lifecycle.tracker(), lifecycle.stop_token());
    responder.serve::<rpc::VerifyKey, _, _>(keys::verify).await?;
    responder.serve::<rpc::CreateConsoleSession, _, _>(console_sessions::create).await?;
    responder.serve::<rpc::FindConsoleSession, _, _>(console_sessions::find).await?;
    responder.serve::<rpc::EndConsoleSession, _, _>(console_sessions::end).await?;
    responder.serve::<rpc::CreateKey, _, _>(keys::create).await?;
    responder.serve::<rpc::ListKeys, _, _>(keys::list).await?;
    responder.serve::<rpc::DeactivateKey, _, _>(keys::deactivate).await?;
    responder.serve::<rpc::FindUser, _, _>(users::find).await?;
    responder.serve::<rpc::CreateUser, _, _>(users::create).await?;
    responder.serve::<rpc::ListUsers, _, _>(users::list).await?;
    responder.serve::<rpc::SetUserActive, _, _>(users::set_active).await?;
    responder.serve::<rpc::CheckUser, _, _>(users::check).await?;
    responder.serve::<rpc::SetQuota, _, _>(users::set_quota).await?;
    responder.serve::<rpc::Bootstrap, _, _>(users::bootstrap).await?;
    responder.serve::<rpc::EnsureUser, _, _>(users::ensure).await?;
    // Last, so that every other request is served once this check answers.
    responder.serve::<rpc::AuthHealth, _, _>(health).await?;
    Ok(())
}

async fn health(pool: PgPool, _: common::Empty) -> Result<common::Empty, bus::RpcError> {
    sqlx::query("select 1 from account limit 1").fetch_optional(&pool).await?;
    Ok(common::Empty {})
}
