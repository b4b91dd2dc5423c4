//! Migrations, run by one replica at a time on a connection of their own.
//!
//! A statement that waits for a lock on a table makes every later statement on that table wait
//! behind it. So a migration waits for a second, gives up its place, and retries. One that builds
//! an index concurrently, outside of a transaction (its file begins with `-- no-transaction`),
//! blocks no other session and may take hours: it has no limit.

use std::{borrow::Cow, time::Duration};

use sqlx::{
    ConnectOptions as _, Connection as _, PgConnection, SqlStr,
    migrate::{MigrateError, Migration, MigrationType, Migrator},
    postgres::PgConnectOptions,
};

use crate::{OpenError, Step, trusted};

/// A number that no other lock uses. Locks are per database, and each service has its own schema:
/// the schema is hashed to the second half.
const LOCK: i32 = 0x616f_646d;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a migration waits for a lock before it gives way, and how long until it tries again.
const LOCK_TIMEOUT: &str = "1s";
const RETRY: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(200);
const LOCK_NOT_AVAILABLE: &str = "55P03";

/// Brings the schema up to date. Returns when it is, by this replica or another.
///
/// # Errors
/// [`OpenError`].
pub async fn run(options: PgConnectOptions, steps: &[Step]) -> Result<(), OpenError> {
    let connecting = tokio::time::timeout(CONNECT_TIMEOUT, options.connect()).await;
    let mut connection =
        connecting.unwrap_or(Err(sqlx::Error::PoolTimedOut)).map_err(OpenError::Connect)?;
    // Polled instead of waited for: a waiting statement has a snapshot, for which the replica that
    // has the lock would wait while it builds an index concurrently.
    while !try_lock(&mut connection).await.map_err(OpenError::Connect)? {
        tokio::time::sleep(POLL).await;
    }
    for step in steps {
        apply(&mut connection, step).await?;
    }
    let _ = connection.close().await;
    Ok(())
}

async fn try_lock(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("select pg_try_advisory_lock($1, hashtext(current_schema()))")
        .bind(LOCK)
        .fetch_one(connection)
        .await
}

async fn apply(connection: &mut PgConnection, step: &Step) -> Result<(), OpenError> {
    let (version, description, sql) = *step;
    let concurrent = sql.starts_with("-- no-transaction");
    if concurrent {
        drop_invalid_indexes(connection).await.map_err(OpenError::Connect)?;
    }
    let lock_timeout =
        format!("set lock_timeout = '{}'", if concurrent { "0" } else { LOCK_TIMEOUT });
    sqlx::raw_sql(trusted(lock_timeout))
        .execute(&mut *connection)
        .await
        .map_err(OpenError::Connect)?;
    let migration = Migration::new(
        version,
        Cow::Borrowed(description),
        MigrationType::Simple,
        SqlStr::from_static(sql),
        concurrent,
    );
    // What is there and not known here is another step's, or a newer release's, which only adds: an
    // old replica starts again during an upgrade, and after a rollback.
    let migrator = Migrator {
        migrations: Cow::Owned(vec![migration]),
        ignore_missing: true,
        locking: false,
        ..Migrator::DEFAULT
    };
    loop {
        match migrator.run_direct(None, &mut *connection, false).await {
            Err(error) if is_locked_out(&error) => {
                tracing::warn!(
                    version,
                    description,
                    "migration waits for a lock that another transaction holds; will retry"
                );
                tokio::time::sleep(RETRY).await;
            }
            outcome => return Ok(outcome?),
        }
    }
}

fn is_locked_out(error: &MigrateError) -> bool {
    let (MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _)) = error else {
        return false;
    };
    error
        .as_database_error()
        .and_then(sqlx::error::DatabaseError::code)
        .is_some_and(|code| code == LOCK_NOT_AVAILABLE)
}

/// Drops what is left of indexes whose concurrent build was interrupted. They cost writes, serve no
/// query, and their names are taken.
async fn drop_invalid_indexes(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let names: Vec<String> = sqlx::query_scalar(
        "select quote_ident(c.relname)
         from pg_index i
         join pg_class c on c.oid = i.indexrelid
         where not i.indisvalid and c.relkind = 'i' and c.relnamespace = current_schema()::regnamespace",
    )
    .fetch_all(&mut *connection)
    .await?;
    for name in names {
        tracing::warn!(index = name, "dropping an index whose build was interrupted");
        sqlx::raw_sql(trusted(format!("drop index concurrently if exists {name}")))
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}
