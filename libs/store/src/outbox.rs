//! Messages that are published if, and only if, a transaction commits.
//!
//! A message is written in the transaction of the change that it reports. A relay takes rows,
//! publishes them with the row's id as message id, and deletes what was acknowledged; several
//! relays share the work by row locks. A relay that dies between publishing and deleting leaves a
//! row that is published again, and dropped by the stream as a duplicate.
//!
//! Messages are in lanes, one for each stream. A message that could not be published is postponed;
//! one that no stream accepts is moved to `outbox_dead`.
//!
//! Each schema that has an outbox makes its tables as migration 11 of the scheduler's does.

use std::time::Duration;

use sqlx::{PgConnection, PgPool, Row as _};
use uuid::Uuid;

/// A message on its way.
#[derive(Debug)]
pub struct Row {
    pub id: Uuid,
    pub subject: String,
    pub payload: Vec<u8>,
    pub traceparent: Option<String>,
    /// How often its publication has failed.
    pub attempts: u32,
    pub age: Duration,
}

/// Adds a message to the caller's transaction.
///
/// # Errors
/// When Postgres refuses.
pub async fn enqueue(
    tx: &mut PgConnection,
    subject: &str,
    payload: &[u8],
    traceparent: Option<&str>,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into outbox (outbox_id, subject, payload, traceparent) values ($1, $2, $3, $4)",
    )
    .bind(Uuid::now_v7())
    .bind(subject)
    .bind(payload)
    .bind(traceparent)
    .execute(tx)
    .await?;
    Ok(())
}

/// Lists the lanes in which messages are due: from one lane to the next by the index, however many
/// messages there are.
pub const DUE_LANES: &str = "with recursive lanes as (
         (select lane from outbox order by lane limit 1)
         union all
         select (select lane from outbox where lane > lanes.lane order by lane limit 1) from lanes where lanes.lane is not null
     )
     select lane from lanes
     where (select true from outbox where outbox.lane = lanes.lane and not_before <= now() limit 1)";

/// The lanes in which messages are due.
///
/// # Errors
/// When Postgres refuses.
pub async fn due_lanes(pool: &PgPool) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(DUE_LANES).fetch_all(pool).await
}

/// Takes a lane's messages that are due and that no other relay has taken, oldest first. They stay
/// taken until the transaction ends.
///
/// # Errors
/// When Postgres refuses.
pub async fn take(tx: &mut PgConnection, lane: &str, limit: i64) -> Result<Vec<Row>, sqlx::Error> {
    let rows = sqlx::query(
        "select outbox_id, subject, payload, traceparent, attempts, extract(epoch from now() - created_at)::float8
         from outbox
         where lane = $1 and not_before <= now()
         order by not_before, outbox_id
         limit $2
         for update skip locked",
    )
    .bind(lane)
    .bind(limit)
    .fetch_all(tx)
    .await?;
    rows.into_iter()
        .map(|row| {
            Ok(Row {
                id: row.try_get(0)?,
                subject: row.try_get(1)?,
                payload: row.try_get(2)?,
                traceparent: row.try_get(3)?,
                attempts: row.try_get::<i32, _>(4)?.unsigned_abs(),
                age: Duration::try_from_secs_f64(row.try_get(5)?).unwrap_or_default(),
            })
        })
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

/// Puts messages off that could not be published: they are due again after as long as each says.
///
/// # Errors
/// When Postgres refuses.
pub async fn postpone(
    tx: &mut PgConnection,
    messages: &[(Uuid, Duration)],
) -> Result<(), sqlx::Error> {
    let (ids, seconds): (Vec<Uuid>, Vec<f64>) =
        messages.iter().map(|(id, after)| (*id, after.as_secs_f64())).unzip();
    sqlx::query(
        "update outbox
         set attempts = attempts + 1, not_before = clock_timestamp() + make_interval(secs => after)
         from unnest($1::uuid[], $2::float8[]) as postponed (id, after)
         where outbox_id = id",
    )
    .bind(ids)
    .bind(seconds)
    .execute(tx)
    .await?;
    Ok(())
}

/// Sets messages aside that no stream will take, each with the reason.
///
/// # Errors
/// When Postgres refuses.
pub async fn set_aside(
    tx: &mut PgConnection,
    messages: &[(Uuid, &str)],
) -> Result<(), sqlx::Error> {
    let (ids, reasons): (Vec<Uuid>, Vec<&str>) = messages.iter().copied().unzip();
    sqlx::query(
        "with dead as (
             delete from outbox using unnest($1::uuid[], $2::text[]) as refused (id, reason)
             where outbox_id = id
             returning outbox_id, subject, payload, traceparent, created_at, reason
         )
         insert into outbox_dead (outbox_id, subject, payload, traceparent, created_at, reason)
         select outbox_id, subject, payload, traceparent, created_at, reason from dead",
    )
    .bind(ids)
    .bind(reasons)
    .execute(tx)
    .await?;
    Ok(())
}
