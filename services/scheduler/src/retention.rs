//! What goes by age, where an operator wants that: events by dropping the tables of old days, sessions one by one. And the tables of
//! the days to come, which must be there before their day.

use std::time::Duration;

use bus::Failure;
use contract::scheduler::DeleteSessionRequest;
use sqlx::{PgPool, Row as _};
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

const EVERY: Duration = Duration::from_secs(60);
const DAYS_AHEAD: i64 = 7;
const SESSIONS_AT_A_TIME: i64 = 100;
const DAY: &[BorrowedFormatItem<'_>] = format_description!("[year][month][day]");
const TABLE_PREFIX: &str = "event_";

pub async fn run(scheduler: Scheduler, retention: Retention, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let kept = async {
            make_days(&scheduler.pool).await?;
            if let Some(days) = retention.event_days {
                drop_days(&scheduler.pool, days).await?;
            }
            if let Some(days) = retention.session_days {
                while delete_sessions(&scheduler, days).await? {}
            }
            anyhow::Ok(())
        };
        if let Some(Err(error)) = stop.run_until_cancelled(kept).await {
            tracing::warn!("{:#}", error.context("retention is not kept now; trying again"));
        }
    }
}

fn today() -> Date {
    OffsetDateTime::now_utc().date()
}

/// Makes the tables of today and of the days to come, where they are not there.
///
/// # Errors
/// When Postgres refuses.
pub async fn make_days(pool: &PgPool) -> anyhow::Result<()> {
    for ahead in 0..=DAYS_AHEAD {
        let day = today() + time::Duration::days(ahead);
        let (table, next) = (format!("{TABLE_PREFIX}{}", day.format(DAY)?), day + time::Duration::days(1));
        // Made of a date alone. Of two replicas at once, one finds it there.
        let statement = format!("create table if not exists {table} partition of event for values from ('{day}') to ('{next}')");
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(pool).await?;
    }
    Ok(())
}

/// Drops the tables of days that are over by so many days. Online: a table is detached while others read and write the rest.
async fn drop_days(pool: &PgPool, days: u16) -> anyhow::Result<()> {
    let oldest_kept = today() - time::Duration::days(i64::from(days));
    let tables: Vec<String> = sqlx::query_scalar(
        "select child.relname::text
         from pg_inherits
         join pg_class child on child.oid = inhrelid
         where inhparent = 'event'::regclass",
    )
    .fetch_all(pool)
    .await?;
    for table in tables {
        let day = table.strip_prefix(TABLE_PREFIX).and_then(|day| Date::parse(day, DAY).ok());
        let Some(day) = day.filter(|day| *day < oldest_kept) else { continue };
        let table = format!("{TABLE_PREFIX}{}", day.format(DAY)?);
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!("alter table event detach partition {table} concurrently"))).execute(pool).await?;
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!("drop table {table}"))).execute(pool).await?;
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
