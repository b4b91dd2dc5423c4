//! Messages that must leave if, and only if, a transaction commits.
//!
//! A message is written in the transaction of the change it tells of. A relay takes rows, publishes them with the row's id as message
//! id, and deletes what was acknowledged; several relays share the work by row locks. A relay that dies between publishing and deleting
//! leaves a row that is published again, and dropped by the stream as a duplicate.
//!
//! Each schema that has an outbox makes its table so:
//! `outbox (outbox_id uuid primary key, subject text, payload bytea, traceparent text, created_at timestamptz)`.

use sqlx::{PgConnection, Row as _};
use uuid::Uuid;

/// A message on its way.
#[derive(Debug)]
pub struct Row {
    pub id: Uuid,
    pub subject: String,
    pub payload: Vec<u8>,
    pub traceparent: Option<String>,
}

/// Adds a message to the caller's transaction.
///
/// # Errors
/// When Postgres refuses.
pub async fn enqueue(tx: &mut PgConnection, subject: &str, payload: &[u8], traceparent: Option<&str>) -> Result<(), sqlx::Error> {
    sqlx::query("insert into outbox (outbox_id, subject, payload, traceparent) values ($1, $2, $3, $4)")
        .bind(Uuid::now_v7())
        .bind(subject)
        .bind(payload)
        .bind(traceparent)
        .execute(tx)
        .await?;
    Ok(())
}

/// Takes the oldest messages that no other relay has in hand. They stay taken until the transaction ends.
///
/// # Errors
/// When Postgres refuses.
pub async fn take(tx: &mut PgConnection, limit: i64) -> Result<Vec<Row>, sqlx::Error> {
    let rows = sqlx::query(
        "select outbox_id, subject, payload, traceparent
         from outbox
         order by outbox_id
         limit $1
         for update skip locked",
    )
    .bind(limit)
    .fetch_all(tx)
    .await?;
    rows.into_iter()
        .map(|row| Ok(Row { id: row.try_get(0)?, subject: row.try_get(1)?, payload: row.try_get(2)?, traceparent: row.try_get(3)? }))
        .collect()
}

/// Forgets messages that were acknowledged.
///
/// # Errors
/// When Postgres refuses.
pub async fn delete(tx: &mut PgConnection, ids: &[Uuid]) -> Result<(), sqlx::Error> {
    sqlx::query("delete from outbox where outbox_id = any($1)").bind(ids).execute(tx).await?;
    Ok(())
}
