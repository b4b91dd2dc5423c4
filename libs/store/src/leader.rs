//! One replica at a time: a session-level advisory lock, held by the very connection that does the work. A leader whose connection is
//! lost has lost both at once, so it can never write beside its successor.

use sqlx::{Connection as _, PgConnection, PgPool};

/// A connection that holds the lock.
#[derive(Debug)]
pub struct Leadership {
    connection: PgConnection,
}

impl Leadership {
    /// Takes the lock if nobody has it.
    ///
    /// # Errors
    /// When Postgres cannot be reached.
    pub async fn try_acquire(pool: &PgPool, key: i64) -> Result<Option<Self>, sqlx::Error> {
        let mut connection = pool.acquire().await?.detach();
        let acquired: bool = sqlx::query_scalar("select pg_try_advisory_lock($1)").bind(key).fetch_one(&mut connection).await?;
        if acquired {
            return Ok(Some(Self { connection }));
        }
        connection.close().await?;
        Ok(None)
    }

    /// The connection that holds the lock: the leader's writes go through it.
    pub fn connection(&mut self) -> &mut PgConnection {
        &mut self.connection
    }

    /// Gives the lock back.
    pub async fn resign(self) {
        let _ = self.connection.close().await;
    }
}
