//! Postgres for services: a bounded connection pool, migrations, one role and schema per service,
//! an outbox, leases.

pub mod lease;
mod migrate;
pub mod outbox;
pub mod provision;

use std::{str::FromStr as _, time::Duration};

use secrecy::{ExposeSecret as _, SecretString};
use settings::Env;
use sqlx::{
    AssertSqlSafe, PgConnection,
    postgres::{PgConnectOptions, PgPool, PgPoolOptions},
};
use tokio_util::sync::CancellationToken;

/// How long a request waits for a connection. Less than a third of what callers wait for an answer,
/// so that they learn why there is none.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);
const LIFETIME: Duration = Duration::from_secs(5 * 60);
const OBSERVE_EVERY: Duration = Duration::from_secs(5);

/// How to reach a service's own database.
#[derive(Debug)]
pub struct Config {
    pub url: SecretString,
    pub max_connections: u32,
}

impl Config {
    pub fn from_env(env: &mut Env) -> Self {
        Self {
            url: env.secret("DATABASE_URL", "postgres:// URL of this service's own role"),
            max_connections: env.parsed(
                "AOD_DATABASE_CONNECTIONS",
                "maximum number of connections to Postgres",
                16,
            ),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("DATABASE_URL is not a postgres:// URL")]
    Url(#[source] sqlx::Error),
    #[error("Postgres cannot be reached: {0}")]
    Connect(#[source] sqlx::Error),
    #[error("migrations failed: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
}

/// A migration: its number, its name, its SQL. Forward only.
pub type Step = (i64, &'static str, &'static str);

/// Connects as a service and brings its schema up to date, one replica at a time.
///
/// # Errors
/// [`OpenError`].
pub async fn open(config: &Config, name: &str, steps: &[Step]) -> Result<PgPool, OpenError> {
    let options = PgConnectOptions::from_str(config.url.expose_secret()).map_err(OpenError::Url)?;
    let options = options.application_name(name).options([
        // A client that vanished without a word, with its machine say, loses its locks within
        // seconds.
        ("tcp_keepalives_idle", "5"),
        ("tcp_keepalives_interval", "2"),
        ("tcp_keepalives_count", "3"),
        ("tcp_user_timeout", "10s"),
    ]);
    migrate::run(options.clone(), steps).await?;
    let options = options.options([
        // No statement of ours takes long: one that does is stuck, and its locks hold up others.
        ("statement_timeout", "30s"),
        // A replica that was paused, or lost its machine, in the middle of a transaction.
        ("idle_in_transaction_session_timeout", "10s"),
        // Less than callers wait, so that they learn why: a server process that is stopped keeps
        // its locks, which no setting of its own ends.
        ("lock_timeout", "5s"),
        // A statement whose client is gone, as after `kill -9`, ends and gives its locks back.
        ("client_connection_check_interval", "2s"),
    ]);
    let pool = PgPoolOptions::new()
        .max_connections(config.max_connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        // The pool takes its connections in turn, so that none is idle for long: what a busy moment
        // opened goes by its age.
        .max_lifetime(LIFETIME)
        // In place of sqlx's own ping, and not for each query: a server that became a standby was
        // restarted, so a connection that was used a moment ago still leads to a primary.
        .test_before_acquire(false)
        .before_acquire(|connection, meta| {
            Box::pin(async move {
                if meta.idle_for < TRUSTED_FOR { Ok(true) } else { is_primary(connection).await }
            })
        })
        .after_connect(|connection, _| {
            Box::pin(async {
                if is_primary(connection).await? {
                    Ok(())
                } else {
                    Err(sqlx::Error::Protocol(NOT_PRIMARY.to_owned()))
                }
            })
        })
        .connect_with(options)
        .await
        .map_err(OpenError::Connect)?;
    Ok(pool)
}

/// How long a connection that was used is taken to work.
const TRUSTED_FOR: Duration = Duration::from_secs(1);
const NOT_PRIMARY: &str = "the Postgres server is a standby; it takes no writes";

async fn is_primary(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("select not pg_is_in_recovery()").fetch_one(connection).await
}

/// Reports a pool's connections as metrics, until the stop.
pub async fn observe(pool: PgPool, stop: CancellationToken) {
    metrics::describe_gauge!("aod_db_connections", "connections to Postgres, by state");
    metrics::describe_gauge!("aod_db_connections_max", "maximum number of connections to Postgres");
    metrics::gauge!("aod_db_connections_max").set(f64::from(pool.options().get_max_connections()));
    while stop.run_until_cancelled(tokio::time::sleep(OBSERVE_EVERY)).await.is_some() {
        let (all, idle) = (f64::from(pool.size()), pool.num_idle() as f64);
        metrics::gauge!("aod_db_connections", "state" => "idle").set(idle);
        metrics::gauge!("aod_db_connections", "state" => "used").set((all - idle).max(0.0));
    }
}

/// Whether an error is the violation of a named constraint.
#[must_use]
pub fn violates(error: &sqlx::Error, constraint: &str) -> bool {
    matches!(error, sqlx::Error::Database(database) if database.constraint() == Some(constraint))
}

/// SQL that was put together from parts which are known to be safe.
pub(crate) fn trusted(sql: String) -> AssertSqlSafe<String> {
    AssertSqlSafe(sql)
}
