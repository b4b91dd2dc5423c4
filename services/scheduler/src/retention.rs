//! What goes by age, where an operator wants that: events by dropping the tables of old days, sessions one by one. And the tables of
//! the days to come, which must be there before their day.

use std::time::Duration;

use bus::Failure;
use contract::scheduler::DeleteSessionRequest;
use sqlx::{PgConnection, PgPool, Row as _};
use store::leader::Leadership;
use time::{Date, OffsetDateTime, format_description::BorrowedFormatItem, macros::format_description};
use tokio_util::sync::CancellationToken;
use types::ErrorCode;
use uuid::Uuid;

use crate::{Scheduler, deletion};

/// How long things are kept; without a number, for ever.
#[derive(Clone, Copy, Debug, Default)]
pub struct Retention {
    pub event_days: Option<u16>,
    pub session_days: Option<u16>,
}

/// Any number that no other lock of ours has.
const LOCK: i64 = 0x0061_6f64_6461_7973;
const EVERY: Duration = Duration::from_secs(60);
const DAYS_AHEAD: i64 = 7;
const SESSIONS_AT_A_TIME: i64 = 100;
const DAY: &[BorrowedFormatItem<'_>] = format_description!("[year][month][day]");
const TABLE_PREFIX: &str = "event_";

pub async fn run(scheduler: Scheduler, retention: Retention, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        if let Some(Err(error)) = stop.run_until_cancelled(keep(&scheduler, retention)).await {
            tracing::warn!("{:#}", error.context("retention is not kept now; trying again"));
        }
    }
}

async fn keep(scheduler: &Scheduler, retention: Retention) -> anyhow::Result<()> {
    make_days(&scheduler.pool).await?;
    if let Some(days) = retention.event_days
        && let Some(mut leadership) = Leadership::try_acquire(&scheduler.pool, LOCK).await?
    {
        let dropped = drop_days(leadership.connection(), days).await;
        leadership.resign().await;
        dropped?;
    }
    if let Some(days) = retention.session_days {
        while delete_sessions(scheduler, days).await? {}
    }
    Ok(())
}

fn today() -> Date {
    OffsetDateTime::now_utc().date()
}

/// Makes the tables of today and of the days to come, where they are not there.
///
/// # Errors
/// When Postgres refuses.
pub async fn make_days(pool: &PgPool) -> anyhow::Result<()> {
    let mut tx = pool.begin().await?;
    // Two replicas that make a table at once would both find it missing.
    sqlx::query("select pg_advisory_xact_lock($1)").bind(LOCK).execute(&mut *tx).await?;
    for ahead in 0..=DAYS_AHEAD {
        let day = today() + time::Duration::days(ahead);
        let (table, next) = (format!("{TABLE_PREFIX}{}", day.format(DAY)?), day + time::Duration::days(1));
        // Made of a date alone.
        let statement = format!("create table if not exists {table} partition of event for values from ('{day}') to ('{next}')");
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(&mut *tx).await?;
    }
    tx.commit().await?;
    Ok(())
}

/// Drops the tables of days that are over by so many days. Online: a table is detached while others read and write the rest. What an
/// earlier attempt left half detached, or detached and not dropped, is finished.
async fn drop_days(connection: &mut PgConnection, days: u16) -> anyhow::Result<()> {
    let oldest_kept = today() - time::Duration::days(i64::from(days));
    let tables = sqlx::query(
        "select c.relname::text, i.inhdetachpending
         from pg_class c
         left join pg_inherits i on i.inhrelid = c.oid and i.inhparent = 'event'::regclass
         where c.relkind = 'r' and c.relnamespace = current_schema()::regnamespace and c.relname ~ '^event_[0-9]{8}$'",
    )
    .fetch_all(&mut *connection)
    .await?;
    for row in tables {
        let name: String = row.try_get(0)?;
        let day = name.strip_prefix(TABLE_PREFIX).and_then(|day| Date::parse(day, DAY).ok());
        let Some(day) = day.filter(|day| *day < oldest_kept) else { continue };
        let table = format!("{TABLE_PREFIX}{}", day.format(DAY)?);
        let detach = match row.try_get::<Option<bool>, _>(1)? {
            Some(false) => Some("concurrently"),
            Some(true) => Some("finalize"),
            None => None,
        };
        if let Some(how) = detach {
            sqlx::raw_sql(sqlx::AssertSqlSafe(format!("alter table event detach partition {table} {how}")))
                .execute(&mut *connection)
                .await?;
        }
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!("drop table {table}"))).execute(&mut *connection).await?;
        metrics::counter!("aod_event_days_dropped_total").increment(1);
        tracing::info!(%day, "events of a day are dropped, by EVENT_RETENTION_DAYS");
    }
    Ok(())
}

/// Deletes sessions that were settled so many days ago, as their users would; true when there may be more.
async fn delete_sessions(scheduler: &Scheduler, days: u16) -> anyhow::Result<bool> {
    let rows = sqlx::query(
        "select session_id, user_id
         from session
         where status in ('completed', 'failed', 'terminated') and updated_at < now() - make_interval(days => $1)
         limit $2",
    )
    .bind(i32::from(days))
    .bind(SESSIONS_AT_A_TIME)
    .fetch_all(&scheduler.pool)
    .await?;
    for row in &rows {
        let request =
            DeleteSessionRequest { session_id: row.try_get::<Uuid, _>(0)?.to_string(), user_id: row.try_get::<Uuid, _>(1)?.to_string() };
        match deletion::delete(scheduler.clone(), request).await {
            // Prompted again, or deleted, a moment ago.
            Ok(_) | Err(Failure { code: ErrorCode::Conflict | ErrorCode::NotFound, .. }) => {}
            Err(failure) => return Err(failure.into()),
        }
    }
    Ok(rows.len() as i64 == SESSIONS_AT_A_TIME)
}
