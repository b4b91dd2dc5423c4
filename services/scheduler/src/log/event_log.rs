//! The persisted event log of a session: read and removed by the days on which it was written.
//!
//! Events are kept in a table for each day, by the thousand where they are kept for ever. A query
//! that does not name the day opens and locks every one of them. So each query here names its days,
//! as literals: parameters would be known too late to leave tables out of a plan that is kept
//! (docs/adr/0001-event-log-reads-name-their-days.md).

use bus::RpcError;
use contract::scheduler::RecordedEvent;
use sqlx::{AssertSqlSafe, PgPool, Row as _, postgres::PgRow};
use time::Date;
use types::SessionId;

/// A page of the log: at most this many bytes and one event more, so that an answer fits a message.
const PAGE_BYTES_MAX: u32 = 4 * 1024 * 1024;
/// Of an event of an earlier release: what kind it is stands in its first bytes.
const HEAD_BYTES: u32 = 1000;
const DELETED_AT_A_TIME: u64 = 10_000;

/// The days on which a session's events were written, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Days {
    first: Date,
    last: Date,
    /// The last day that is known to have events, where one is.
    newest: Option<Date>,
}

impl Days {
    /// `None` when the session is not known.
    async fn of(pool: &PgPool, session: SessionId) -> Result<Option<Self>, sqlx::Error> {
        // What is written while this is read may be of the next day. A session's row is older than
        // its events: it is believed more than the log's own first day, which a projector of the
        // release before did not keep.
        let row = sqlx::query(
            "select least(l.first_day, (s.created_at at time zone 'utc')::date),
                    case when l.last_day < today - 1 then l.last_day else today + 1 end,
                    l.last_day
             from (select $1::uuid as session_id, (now() at time zone 'utc')::date as today) asked
             left join session s using (session_id)
             left join event_log l using (session_id)",
        )
        .bind(session.uuid())
        .fetch_one(pool)
        .await?;
        let first: Option<Date> = row.try_get(0)?;
        let (last, newest) = (row.try_get(1)?, row.try_get(2)?);
        Ok(first.map(|first| Self { first, last, newest }))
    }

    /// As a condition of SQL. It holds dates alone.
    fn condition(self) -> String {
        format!("recorded_on between '{}' and '{}'", self.first, self.last)
    }
}

fn page_query(days: Days) -> String {
    // The running total stops the page before it grows too large; its first event is always in it.
    format!(
        "select event_id, payload
         from (
             select event_id, payload, sum(length(payload)) over (order by event_id rows unbounded preceding) - length(payload) as before
             from (
                 select event_id, payload
                 from event
                 where session_id = $1 and event_id > $2 and {}
                 order by event_id
                 limit $3
             ) page
         ) sized
         where before < $4
         order by event_id",
        days.condition()
    )
}

fn backward_query(days: Days) -> String {
    format!(
        "select event_id, payload
         from (
             select event_id, payload, sum(length(payload)) over (order by event_id desc rows unbounded preceding) - length(payload) as after
             from (
                 select event_id, payload
                 from event
                 where session_id = $1 and event_id < $2 and {}
                 order by event_id desc
                 limit $3
             ) page
         ) sized
         where after < $4
         order by event_id desc",
        days.condition()
    )
}

/// As [`page_query`], without raw output, which is not read at all where its table has an index of
/// the rest. What an earlier release wrote is decided by its payload: where a whole page of it is
/// output, the last row alone is returned, without a payload.
fn shown_query(from: From, days: Days) -> String {
    let (follows, order, last) = match from {
        From::After(_) => (">", "asc", "max"),
        From::Before(_) => ("<", "desc", "min"),
    };
    format!(
        "select event_id, case when is_shown then payload end as payload
         from (
             select event_id, payload, is_shown, {last}(event_id) over () as read_through,
                    sum(case when is_shown then length(payload) else 0 end) over (order by event_id {order} rows unbounded preceding) - length(payload) as before
             from (
                 select event_id, payload, is_output is false or not event_is_output(substring(payload from 1 for {HEAD_BYTES})) as is_shown
                 from event
                 where session_id = $1 and event_id {follows} $2 and is_output is not true and {}
                 order by event_id {order}
                 limit $3
             ) page
         ) sized
         where (is_shown and before < $4) or (not is_shown and event_id = read_through)
         order by event_id {order}",
        days.condition()
    )
}

fn newest_query(days: Days) -> String {
    format!(
        "select event_id, payload from event where session_id = $1 and {} order by event_id desc limit 1",
        days.condition()
    )
}

/// Which events of a log a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// Those that follow one, oldest first.
    After(u64),
    /// Those before one, newest first.
    Before(u64),
}

/// At most `limit` events, and fewer where they hold more than `max_bytes` (0: [`PAGE_BYTES_MAX`]).
pub async fn page(
    pool: &PgPool,
    session: SessionId,
    from: From,
    limit: u32,
    max_bytes: u32,
) -> Result<Vec<RecordedEvent>, RpcError> {
    let Some(days) = Days::of(pool, session).await? else { return Ok(Vec::new()) };
    let (query, bound) = match from {
        From::After(after) => (page_query(days), after),
        From::Before(before) => (backward_query(days), before),
    };
    let events = read(pool, &query, session, bound, limit, max_bytes).await?;
    Ok(events
        .map(|(event_id, payload)| RecordedEvent {
            event_id,
            payload: payload.unwrap_or_default().into(),
        })
        .collect())
}

/// What a query of this module selects, in its order: ids, and payloads where it selects them. They
/// come as one row of arrays: the client enters and leaves the current span several times for each
/// row, which takes longer than all else about an event.
async fn read(
    pool: &PgPool,
    query: &str,
    session: SessionId,
    bound: u64,
    limit: u32,
    max_bytes: u32,
) -> Result<impl Iterator<Item = (u64, Option<Vec<u8>>)> + use<>, RpcError> {
    let max_bytes = if max_bytes == 0 { PAGE_BYTES_MAX } else { max_bytes.min(PAGE_BYTES_MAX) };
    let query = format!("select array_agg(event_id), array_agg(payload) from ({query}) as events");
    let row = sqlx::query(AssertSqlSafe(query))
        .bind(session.uuid())
        .bind(i64::try_from(bound).unwrap_or(i64::MAX))
        .bind(i64::from(limit.clamp(1, 5000)))
        .bind(i64::from(max_bytes))
        .fetch_one(pool)
        .await?;
    let ids: Option<Vec<i64>> = row.try_get(0)?;
    let payloads: Option<Vec<Option<Vec<u8>>>> = row.try_get(1)?;
    let ids = ids.unwrap_or_default().into_iter().map(i64::unsigned_abs);
    Ok(ids.zip(payloads.unwrap_or_default()))
}

/// A page of a log without its raw output.
#[derive(Debug, Default)]
pub struct Shown {
    pub events: Vec<RecordedEvent>,
    /// Where there are no events: nothing but output between the bound and this one, which is
    /// included; 0: nothing at all.
    pub read_through: u64,
}

/// As [`page`], of the events that are not raw output.
pub async fn shown(
    pool: &PgPool,
    session: SessionId,
    from: From,
    limit: u32,
    max_bytes: u32,
) -> Result<Shown, RpcError> {
    let Some(days) = Days::of(pool, session).await? else { return Ok(Shown::default()) };
    let (From::After(bound) | From::Before(bound)) = from;
    let events = read(pool, &shown_query(from, days), session, bound, limit, max_bytes).await?;
    let mut shown = Shown::default();
    for (event_id, payload) in events {
        match payload {
            Some(payload) => shown.events.push(RecordedEvent { event_id, payload: payload.into() }),
            None if shown.events.is_empty() => shown.read_through = event_id,
            None => {}
        }
    }
    Ok(shown)
}

/// The last event that is persisted.
pub async fn newest(pool: &PgPool, session: SessionId) -> Result<Option<RecordedEvent>, RpcError> {
    let Some(days) = Days::of(pool, session).await? else { return Ok(None) };
    let days = Days { first: days.newest.unwrap_or(days.first), ..days };
    let row = sqlx::query(AssertSqlSafe(newest_query(days)))
        .bind(session.uuid())
        .fetch_optional(pool)
        .await?;
    Ok(row.as_ref().map(event).transpose()?)
}

fn event(row: &PgRow) -> Result<RecordedEvent, sqlx::Error> {
    Ok(RecordedEvent {
        event_id: row.try_get::<i64, _>(0)?.unsigned_abs(),
        payload: row.try_get::<Vec<u8>, _>(1)?.into(),
    })
}

/// Removes the log of a session that is deleted. Safe to interrupt and rerun.
pub async fn purge(pool: &PgPool, session: SessionId) -> Result<(), RpcError> {
    // Without a row there is no log, or one of the release before, which may be of any day.
    let condition =
        Days::of(pool, session).await?.map_or_else(|| "true".to_owned(), Days::condition);
    let statement = format!(
        "delete from event
         where session_id = $1 and {condition}
           and event_id in (select event_id from event where session_id = $1 and {condition} order by event_id limit {DELETED_AT_A_TIME})"
    );
    loop {
        let deleted = sqlx::query(AssertSqlSafe(statement.clone()))
            .bind(session.uuid())
            .execute(pool)
            .await?;
        if deleted.rows_affected() < DELETED_AT_A_TIME {
            break;
        }
    }
    sqlx::query("delete from event_log where session_id = $1")
        .bind(session.uuid())
        .execute(pool)
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use contract::session::{
        AgentEvent, Checkpoint, Output, SessionEvent, TurnStarted, session_event::Kind,
    };
    use prost::Message as _;
    use sqlx::PgConnection;
    use testkit::Database;
    use tokio::time::Instant;

    use super::*;

    /// A database as it is after so many days, with a session of today.
    async fn after_days(days: i32) -> (PgPool, SessionId) {
        let database = Database::create().await.unwrap();
        let pool =
            store::open(&database.config("scheduler"), "test", crate::MIGRATIONS).await.unwrap();
        let mut connection = pool.acquire().await.unwrap();
        for from in (1..=days).step_by(50) {
            // Few at a time: a transaction locks all that it makes.
            let make = format!(
                "do $$ declare day date; begin
                     for ago in {from}..{} loop
                         day := (now() at time zone 'utc')::date - ago;
                         execute format('create table %I partition of event for values from (%L) to (%L)',
                                        'event_' || to_char(day, 'YYYYMMDD'), day, day + 1);
                     end loop;
                 end $$",
                (from + 49).min(days)
            );
            sqlx::raw_sql(AssertSqlSafe(make)).execute(&mut *connection).await.unwrap();
        }
        let session = SessionId::new();
        sqlx::query(
            "with today as (select (now() at time zone 'utc')::date as day),
                  events as (insert into event (session_id, event_id, recorded_on, payload)
                             select $1, id, day, convert_to(repeat('x', 100), 'UTF8') from today, generate_series(1, 2000) as id)
             insert into event_log (session_id, last_event_id, first_day, last_day) select $1, 2000, day, day from today",
        )
        .bind(session.uuid())
        .execute(&mut *connection)
        .await
        .unwrap();
        sqlx::raw_sql("analyze event").execute(&mut *connection).await.unwrap();
        (pool, session)
    }

    #[tokio::test]
    async fn events_of_today_and_of_days_to_come_are_compressed_by_lz4() {
        let (pool, _) = after_days(3).await;
        // One that the service makes, and not a migration.
        let ahead = "do $$ begin execute 'drop table event_' || to_char((now() at time zone 'utc')::date + 2, 'YYYYMMDD'); end $$";
        sqlx::raw_sql(ahead).execute(&pool).await.unwrap();
        crate::log::retention::make_days(&pool).await.unwrap();
        let methods: Vec<(String, String)> = sqlx::query_as(
            "select relname::text, attcompression::text
             from pg_attribute join pg_class on pg_class.oid = attrelid join pg_inherits on inhrelid = attrelid
             where inhparent = 'event'::regclass and attname = 'payload'
               and relname >= 'event_' || to_char((now() at time zone 'utc')::date, 'YYYYMMDD')",
        )
        .fetch_all(&pool)
        .await
        .unwrap();
        assert!(
            methods.len() > 3 && methods.iter().all(|(_, method)| method == "l"),
            "{methods:?}"
        );
    }

    async fn tables_in_plan(
        connection: &mut PgConnection,
        query: String,
        session: SessionId,
    ) -> usize {
        let plan: Vec<String> = sqlx::query_scalar(AssertSqlSafe(format!("explain {query}")))
            .bind(session.uuid())
            .bind(0_i64)
            .bind(100_i64)
            .bind(i64::from(PAGE_BYTES_MAX))
            .fetch_all(connection)
            .await
            .unwrap();
        plan.iter().filter(|line| line.contains(" on event_")).count()
    }

    #[tokio::test]
    async fn reading_a_log_costs_the_same_however_many_days_are_kept() {
        let (pool, session) = after_days(400).await;
        let days = Days::of(&pool, session).await.unwrap().unwrap();
        let mut connection = pool.acquire().await.unwrap();
        // The plan that is kept for every session, not one for this.
        sqlx::raw_sql("set plan_cache_mode = force_generic_plan")
            .execute(&mut *connection)
            .await
            .unwrap();
        assert!(tables_in_plan(&mut connection, page_query(days), session).await <= 2);
        let newest = newest_query(days)
            .replace("$1", "$1 and $2::bigint + $3::bigint + $4::bigint is not null");
        assert!(tables_in_plan(&mut connection, newest, session).await <= 2);
        assert_eq!(page(&pool, session, From::After(1900), 1000, 0).await.unwrap().len(), 100);
        let ids = |events: Vec<RecordedEvent>| {
            events.iter().map(|event| event.event_id).collect::<Vec<_>>()
        };
        assert_eq!(
            ids(page(&pool, session, From::Before(u64::MAX), 3, 0).await.unwrap()),
            [2000, 1999, 1998]
        );
        assert_eq!(
            ids(page(&pool, session, From::Before(1998), 5, 1).await.unwrap()),
            [1997],
            "bounded in bytes"
        );
        assert!(page(&pool, session, From::Before(1), 10, 0).await.unwrap().is_empty());
        assert_eq!(super::newest(&pool, session).await.unwrap().unwrap().event_id, 2000);
        purge(&pool, session).await.unwrap();
        assert!(page(&pool, session, From::After(0), 10, 0).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_page_without_output_reads_no_output_rows() {
        let (pool, session) = after_days(3).await;
        let says = |kind: Kind, checkpoint: Checkpoint| {
            let times = SessionEvent {
                turn: 300,
                epoch: 2,
                follows: Some(1 << 40),
                follows_tag: 5,
                tag: 90,
                at_us: 1 << 50,
                ..SessionEvent::default()
            };
            SessionEvent { kind: Some(kind), checkpoint: Some(checkpoint), ..times }.encode_to_vec()
        };
        let checkpoint = Checkpoint {
            stages_done: vec!["Z".repeat(90)],
            journal_offset: 90,
            open_requests: vec![90; 90],
            ..Checkpoint::default()
        };
        let output = says(
            Kind::Output(Output { stderr: false, data: vec![b'Z'; 9000].into() }),
            checkpoint.clone(),
        );
        let message = says(
            Kind::TurnStarted(TurnStarted { prompt: "Z".to_owned(), ..TurnStarted::default() }),
            checkpoint,
        );
        let agent = says(Kind::Agent(AgentEvent::default()), Checkpoint::default());
        // Of this release, and of an earlier one, which did not say what is output.
        for (from, is_output) in [(3001, Some(true)), (5000, None)] {
            sqlx::query(
                "insert into event (session_id, event_id, payload, is_output)
                 select $1, id, $3, $4 from generate_series($2, $2 + 1499) as id",
            )
            .bind(session.uuid())
            .bind(from)
            .bind(&output)
            .bind(is_output)
            .execute(&pool)
            .await
            .unwrap();
        }
        for (id, payload, is_output) in
            [(4700_i64, &message, Some(false)), (6600, &agent, None), (6601, &message, None)]
        {
            sqlx::query("insert into event (session_id, event_id, payload, is_output) values ($1, $2, $3, $4)")
                .bind(session.uuid())
                .bind(id)
                .bind(payload)
                .bind(is_output)
                .execute(&pool)
                .await
                .unwrap();
        }
        let (mut after, mut read, mut pages) = (2000, Vec::new(), 0);
        loop {
            let page = shown(&pool, session, From::After(after), 1000, 0).await.unwrap();
            pages += 1;
            after = page.events.last().map_or(page.read_through, |event| event.event_id);
            if after == 0 {
                break;
            }
            read.extend(page.events.into_iter().map(|event| event.event_id));
        }
        assert_eq!(read, [4700, 6600, 6601]);
        // Two of earlier output, whose rows are looked at, but none of 13 MB of this release's.
        assert!(pages <= 5, "{pages} pages");
        let (mut before, mut read, mut pages) = (7000, Vec::new(), 0);
        loop {
            let page = shown(&pool, session, From::Before(before), 1000, 0).await.unwrap();
            pages += 1;
            before = page.events.last().map_or(page.read_through, |event| event.event_id);
            read.extend(
                page.events.into_iter().map(|event| event.event_id).filter(|id| *id > 2000),
            );
            if before <= 2000 {
                break;
            }
        }
        assert_eq!((read, pages), (vec![6601, 6600, 4700], 3), "newest first");
        let bounded = shown(&pool, session, From::Before(6601), 1000, 1).await.unwrap().events;
        assert_eq!(
            bounded.iter().map(|event| event.event_id).collect::<Vec<_>>(),
            [6600],
            "bounded in bytes"
        );
        let bounded = shown(&pool, session, From::After(6500), 1000, 1).await.unwrap().events;
        assert_eq!(
            bounded.iter().map(|event| event.event_id).collect::<Vec<_>>(),
            [6600],
            "bounded in bytes"
        );

        let mut connection = pool.acquire().await.unwrap();
        sqlx::raw_sql("analyze event; set plan_cache_mode = force_generic_plan")
            .execute(&mut *connection)
            .await
            .unwrap();
        let days = Days::of(&pool, session).await.unwrap().unwrap();
        for from in [From::After(0), From::Before(0)] {
            assert!(tables_in_plan(&mut connection, shown_query(from, days), session).await <= 2);
        }
        let indexes: i64 =
            sqlx::query_scalar("select count(*) from pg_indexes where indexname like 'event\\_2%\\_session_id_event_id_idx'")
                .fetch_one(&mut *connection)
                .await
                .unwrap();
        assert!(indexes >= 7, "the days to come have the index of what is not output");
    }

    #[tokio::test]
    #[ignore = "a measurement"]
    async fn page_latency_by_days_kept() {
        for days in [8, 100, 365, 800] {
            let (pool, session) = after_days(days).await;
            let mut times = Vec::new();
            for _ in 0..500 {
                let begun = Instant::now();
                page(&pool, session, From::After(1900), 100, 0).await.unwrap();
                times.push(begun.elapsed());
            }
            times.sort();
            let unnamed = "select event_id, payload from event where session_id = $1 and event_id > $2 order by event_id limit 100";
            let mut before = Vec::new();
            for _ in 0..100 {
                let begun = Instant::now();
                sqlx::query(unnamed)
                    .bind(session.uuid())
                    .bind(1900_i64)
                    .fetch_all(&pool)
                    .await
                    .unwrap();
                before.push(begun.elapsed());
            }
            before.sort();
            let ms = |time: Duration| time.as_secs_f64() * 1e3;
            println!(
                "{days} days: p50 {:.2} ms, p99 {:.2} ms; without the days p50 {:.2} ms",
                ms(times[250]),
                ms(times[495]),
                ms(before[50])
            );
        }
    }
}
