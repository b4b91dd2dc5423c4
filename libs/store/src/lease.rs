//! Work that one replica does at a time, by rows of a table `lease (name, owner, epoch,
//! expires_at)`.
//!
//! A holder extends its lease in the transaction of each step of its work ([`Lease::extend`]); the
//! row's lock then keeps a successor out until that transaction ends, and a holder that lost its
//! lease is refused and rolls back. Nothing depends on a connection: a lease expires whether or not
//! its holder's connection still exists, and the table works through connection poolers.

use std::time::Duration;

use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

/// The right to do a piece of work, until it expires or another replica takes it over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    pub name: String,
    owner: Uuid,
    epoch: i64,
}

/// Acquires those of the leases that no other replica holds: new ones, and expired ones.
///
/// # Errors
/// When Postgres refuses.
pub async fn acquire(
    pool: &PgPool,
    owner: Uuid,
    names: &[String],
    ttl: Duration,
) -> Result<Vec<Lease>, sqlx::Error> {
    // One cheap read while all are held by others, which is nearly always.
    let free: Vec<String> = sqlx::query_scalar(
        "select name from unnest($1::text[]) as wanted (name)
         where not exists (select from lease where lease.name = wanted.name and expires_at > now())",
    )
    .bind(names)
    .fetch_all(pool)
    .await?;
    if free.is_empty() {
        return Ok(Vec::new());
    }
    let acquired: Vec<(String, i64)> = sqlx::query_as(
        "insert into lease as l (name, owner, epoch, expires_at)
         select name, $2, 1, now() + make_interval(secs => $3) from unnest($1::text[]) as wanted (name)
         on conflict (name) do update set owner = $2, epoch = l.epoch + 1, expires_at = excluded.expires_at where l.expires_at <= now()
         returning name, epoch",
    )
    .bind(&free)
    .bind(owner)
    .bind(ttl.as_secs_f64())
    .fetch_all(pool)
    .await?;
    Ok(acquired.into_iter().map(|(name, epoch)| Lease { name, owner, epoch }).collect())
}

impl Lease {
    /// Extends the lease, and locks it against successors until the caller's transaction ends.
    /// Returns whether it is still held.
    ///
    /// # Errors
    /// When Postgres refuses.
    pub async fn extend(&self, tx: &mut PgConnection, ttl: Duration) -> Result<bool, sqlx::Error> {
        let extended =
            sqlx::query("update lease set expires_at = now() + make_interval(secs => $4) where name = $1 and owner = $2 and epoch = $3")
                .bind(&self.name)
                .bind(self.owner)
                .bind(self.epoch)
                .bind(ttl.as_secs_f64())
                .execute(tx)
                .await?;
        Ok(extended.rows_affected() == 1)
    }

    /// Lets another replica acquire the lease at once.
    ///
    /// # Errors
    /// When Postgres refuses.
    pub async fn release(&self, pool: &PgPool) -> Result<(), sqlx::Error> {
        sqlx::query(
            "update lease set expires_at = now() where name = $1 and owner = $2 and epoch = $3",
        )
        .bind(&self.name)
        .bind(self.owner)
        .bind(self.epoch)
        .execute(pool)
        .await?;
        Ok(())
    }
}
