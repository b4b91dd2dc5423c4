//! Retention: removes old events by dropping the tables of their days, and old sessions one by one,
//! if an operator sets a limit. Also creates the tables of the next days, which must exist before
//! their day.

use std::time::Duration;

use bus::RpcError;
use contract::scheduler::DeleteSessionRequest;
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use types::ErrorCode;
use uuid::Uuid;

use crate::{Scheduler, cleanup::deletion};

/// How long things are kept; without a number, for ever.
#[derive(Clone, Copy, Debug, Default)]
pub struct Retention {
    pub event_days: Option<u16>,
    pub session_days: Option<u16>,
}

/// Any number that no other lock of ours has.
const LOCK: i64 = 0x0061_6f64_6461_7973;
const EVERY: Duration = Duration::from_secs(60);
const DAYS_AHEAD: i32 = 7;
const SESSIONS_AT_A_TIME: i64 = 100;
const TABLE_PREFIX: &str = "event_";
const LEASE: &str = "event-retention";
/// At most one day of events is dropped in this time, so that a wrong clock or setting is noticed
/// before everything is gone.
const DROP_EVERY: Duration = Duration::from_secs(60 * 60);
/// The clocks of Postgres and of this replica must agree so far.
const SKEW_MAX: Duration = Duration::from_secs(60 * 60);

pub async fn run(scheduler: Scheduler, retention: Retention, stop: CancellationToken) {
    let owner = Uuid::new_v4();
    service::periodically("retention", EVERY, stop, || keep(&scheduler, retention, owner)).await;
}

async fn keep(scheduler: &Scheduler, retention: Retention, owner: Uuid) -> anyhow::Result<()> {
    make_days(&scheduler.pool).await?;
    if let Some(days) = retention.event_days {
        drop_due_day(&scheduler.pool, days, owner).await?;
    }
    if let Some(days) = retention.session_days {
        delete_sessions(scheduler, days).await?;
    }
    Ok(())
}

/// Makes the tables of today and of the days to come, where they are not there. Today is Postgres'
/// day, in UTC.
///
/// A table is attached when it is finished, which reads and writes of the others do not notice.
/// That waits for no more than a second, for instance behind another change of tables; the next run
/// tries again.
///
/// # Errors
/// When Postgres refuses.
pub async fn make_days(pool: &PgPool) -> anyhow::Result<()> {
    if missing_days(&mut *pool.acquire().await?).await?.is_empty() {
        return Ok(());
    }
    let mut tx = pool.begin().await?;
    sqlx::raw_sql("set local lock_timeout = '1s'").execute(&mut *tx).await?;
    // Two replicas that make a table at once would both find it missing.
    let alone: bool = sqlx::query_scalar("select pg_try_advisory_xact_lock($1)")
        .bind(LOCK)
        .fetch_one(&mut *tx)
        .await?;
    if !alone {
        return Ok(());
    }
    for (table, day, next) in missing_days(&mut tx).await? {
        // Made of a date alone. With the constraint, attaching has nothing to check.
        let statement = format!(
            "create table {table} (like event including all, constraint day check (recorded_on >= '{day}' and recorded_on < '{next}'));
             alter table event attach partition {table} for values from ('{day}') to ('{next}');
             alter table {table} drop constraint day"
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(&mut *tx).await?;
    }
    tx.commit().await?;
    Ok(())
}

/// The days that have no table yet: its name, the day, and the day after.
async fn missing_days(
    connection: &mut PgConnection,
) -> Result<Vec<(String, String, String)>, sqlx::Error> {
    sqlx::query_as(
        "select $2 || to_char(day, 'YYYYMMDD'), to_char(day, 'YYYY-MM-DD'), to_char(day + 1, 'YYYY-MM-DD')
         from (select (now() at time zone 'utc')::date + ahead as day from generate_series(0, $1) as ahead) days
         where not exists (
             select from pg_inherits join pg_class on oid = inhrelid
             where inhparent = 'event'::regclass and relname = $2 || to_char(day, 'YYYYMMDD')
         )
         order by day",
    )
    .bind(DAYS_AHEAD)
    .bind(TABLE_PREFIX)
    .fetch_all(connection)
    .await
}

/// Drops the oldest table of the days that are over by so many days. Online: it is detached while
/// others read and write the rest. What an earlier attempt left half detached, or detached and not
/// dropped, is finished.
async fn drop_due_day(pool: &PgPool, days: u16, owner: Uuid) -> anyhow::Result<()> {
    // By Postgres' clock, which the days are named by.
    let due: Vec<(String, Option<bool>, f64)> = sqlx::query_as(
        "select c.relname::text, case when i.inhrelid is not null then i.inhdetachpending end, extract(epoch from now())::float8
         from pg_class c
         left join pg_inherits i on i.inhrelid = c.oid and i.inhparent = 'event'::regclass
         where c.relkind = 'r' and c.relnamespace = current_schema()::regnamespace and c.relname ~ ('^' || $2 || '[0-9]{8}$')
           and c.relname < $2 || to_char((now() at time zone 'utc')::date - $1, 'YYYYMMDD')
         order by c.relname",
    )
    .bind(i32::from(days))
    .bind(TABLE_PREFIX)
    .fetch_all(pool)
    .await?;
    // Detached already, by an attempt that did not get to the end: gone from the log.
    for (table, ..) in due.iter().filter(|(_, detach_pending, _)| detach_pending.is_none()) {
        drop_day(pool, table, None).await?;
    }
    let due: Vec<_> = due
        .into_iter()
        .filter_map(|(table, detach_pending, time)| Some((table, detach_pending?, time)))
        .collect();
    metrics::gauge!("aod_event_days_due").set(due.len() as f64);
    let Some((table, detach_pending, database_time)) = due.into_iter().next() else {
        return Ok(());
    };
    check_clocks(database_time, OffsetDateTime::now_utc().unix_timestamp() as f64)?;
    let Some(lease) =
        store::lease::acquire(pool, owner, &[LEASE.to_owned()], DROP_EVERY).await?.pop()
    else {
        return Ok(());
    };
    let dropped = drop_day(pool, &table, Some(detach_pending)).await;
    if dropped.is_err() {
        lease.release(pool).await?;
    }
    dropped?;
    metrics::counter!("aod_event_days_dropped_total").increment(1);
    tracing::info!(table, "dropped a day of events by EVENT_RETENTION_DAYS");
    Ok(())
}

/// Both in seconds since the epoch. Which of two clocks is wrong is not known: a day that is
/// dropped too early is gone.
fn check_clocks(postgres: f64, own: f64) -> anyhow::Result<()> {
    let skew = (postgres - own).abs();
    anyhow::ensure!(
        skew < SKEW_MAX.as_secs_f64(),
        "no events are dropped: the clocks of Postgres and the scheduler differ by {skew:.0} s"
    );
    Ok(())
}

/// `table` is a name that the database itself returned.
async fn drop_day(
    pool: &PgPool,
    table: &str,
    detach_pending: Option<bool>,
) -> Result<(), sqlx::Error> {
    let detach = match detach_pending {
        Some(false) => Some("concurrently"),
        Some(true) => Some("finalize"),
        None => None,
    };
    if let Some(how) = detach {
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
            "alter table event detach partition {table} {how}"
        )))
        .execute(pool)
        .await?;
    }
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!("drop table {table}"))).execute(pool).await?;
    Ok(())
}

/// Deletes the sessions that were settled so many days ago, as their users would. One that cannot
/// be deleted holds up no other.
async fn delete_sessions(scheduler: &Scheduler, days: u16) -> anyhow::Result<()> {
    let (mut after, mut failed) = ((OffsetDateTime::UNIX_EPOCH, Uuid::nil()), 0);
    loop {
        let rows: Vec<(Uuid, Uuid, OffsetDateTime)> = sqlx::query_as(
            "select session_id, user_id, updated_at
             from session
             where status in ('completed', 'failed', 'terminated') and updated_at < now() - make_interval(days => $1)
               and updated_at >= $2 and (updated_at, session_id) > ($2, $3)
             order by updated_at, session_id
             limit $4",
        )
        .bind(i32::from(days))
        .bind(after.0)
        .bind(after.1)
        .bind(SESSIONS_AT_A_TIME)
        .fetch_all(&scheduler.pool)
        .await?;
        for (session, user, updated_at) in &rows {
            after = (*updated_at, *session);
            let request =
                DeleteSessionRequest { session_id: session.to_string(), user_id: user.to_string() };
            match deletion::delete(scheduler.clone(), request).await {
                // Prompted again, or deleted, a moment ago.
                Ok(_) | Err(RpcError { code: ErrorCode::Conflict | ErrorCode::NotFound, .. }) => {}
                Err(error) => {
                    failed += 1;
                    tracing::warn!(%error, session_id = %session, "session not deleted by SESSION_RETENTION_DAYS; will retry");
                }
            }
        }
        if (rows.len() as i64) < SESSIONS_AT_A_TIME {
            break;
        }
    }
    anyhow::ensure!(failed == 0, "{failed} sessions are not deleted");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_wrong_on_either_side_drops_nothing() {
        const YEAR: f64 = 365.0 * 86400.0;
        let now = 1.8e9;
        for (postgres, own) in [(now, now), (now, now + 3599.0), (now - 3599.0, now)] {
            check_clocks(postgres, own).unwrap();
        }
        for (postgres, own) in
            [(now + YEAR, now), (now, now + YEAR), (now - 3600.0, now), (0.0, now), (f64::NAN, now)]
        {
            let error = check_clocks(postgres, own).unwrap_err().to_string();
            assert!(error.contains("clocks of Postgres and the scheduler differ"), "{error}");
        }
    }
}
