//! Migrations and connections, on a real server.

use std::time::{Duration, Instant};

use sqlx::Connection as _;
use store::Step;
use testkit::{Database, eventually};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

const OLD: &[Step] = &[(1, "first", "create table first (id int)")];
const NEW: &[Step] = &[OLD[0], (2, "second", "create table second (id int)")];
const INDEX: Step = (
    3,
    "index",
    "-- no-transaction\ncreate index concurrently if not exists first_by_id on first (id)",
);

/// In an upgrade old replicas start again beside new ones; and a rollback is one to the release
/// before.
#[tokio::test]
async fn a_release_starts_on_the_schema_of_the_next() {
    let database = Database::create().await.unwrap();
    let config = database.config("auth");
    for steps in [OLD, NEW, OLD, NEW] {
        store::open(&config, "test", steps).await.unwrap();
    }
}

/// Each waits for the other's migrations; an index that is built concurrently waits for no replica
/// that waits.
#[tokio::test]
async fn replicas_that_start_together_migrate_once() {
    let database = Database::create().await.unwrap();
    let config = database.config("auth");
    let steps = &[NEW[0], NEW[1], INDEX];
    let (one, two, three) = tokio::join!(
        store::open(&config, "test", steps),
        store::open(&config, "test", steps),
        store::open(&config, "test", steps)
    );
    assert!(one.is_ok() && two.is_ok() && three.is_ok());
}

#[tokio::test]
async fn an_index_whose_build_was_interrupted_is_built_again() {
    let database = Database::create().await.unwrap();
    let config = database.config("auth");
    store::open(&config, "test", OLD).await.unwrap();
    let mut admin = database.admin().await.unwrap();
    // What a build leaves that is interrupted, by a duplicate here.
    sqlx::raw_sql("insert into auth.first values (1), (1)").execute(&mut admin).await.unwrap();
    sqlx::raw_sql("create unique index concurrently first_by_id on auth.first (id)")
        .execute(&mut admin)
        .await
        .unwrap_err();
    store::open(&config, "test", &[OLD[0], INDEX]).await.unwrap();
    let valid: bool =
        sqlx::query_scalar("select indisvalid and not indisunique from pg_index where indexrelid = 'auth.first_by_id'::regclass")
            .fetch_one(&mut admin)
            .await
            .unwrap();
    assert!(valid);
}

/// A migration that cannot have its table's lock gives way to who uses the table, and tries again.
#[tokio::test]
async fn a_migration_that_waits_for_a_lock_blocks_no_other_session() {
    let database = Database::create().await.unwrap();
    let config = database.config("auth");
    store::open(&config, "test", OLD).await.unwrap();
    let mut backup = database.admin().await.unwrap();
    sqlx::raw_sql("begin; select count(*) from auth.first").execute(&mut backup).await.unwrap();
    let steps = [OLD[0], (2, "column", "alter table first add column name text")];
    let upgrade = async { store::open(&config, "test", &steps).await.map(drop) };
    let others = async {
        let mut user = database.admin().await.unwrap();
        eventually("the migration waits for the lock", || async {
            let waits = "select exists (select from pg_locks where not granted and relation = 'auth.first'::regclass)";
            sqlx::query_scalar(waits).fetch_one(&mut database.admin().await.unwrap()).await.unwrap()
        })
        .await;
        let begun = Instant::now();
        sqlx::raw_sql("insert into auth.first (id) values (1)").execute(&mut user).await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        assert!(sqlx::raw_sql("select name from auth.first").execute(&mut user).await.is_err());
        backup.close().await.unwrap();
    };
    let (upgraded, ()) = tokio::join!(upgrade, others);
    upgraded.unwrap();
    sqlx::raw_sql("select name from auth.first")
        .execute(&mut database.admin().await.unwrap())
        .await
        .unwrap();
}

/// A session that waits for a lock gets an error within seconds, and what a client leaves behind
/// ends by itself.
#[tokio::test]
async fn a_transaction_that_hangs_holds_others_up_for_seconds_and_no_longer() {
    let database = Database::create().await.unwrap();
    let config = database.config("auth");
    let pool = store::open(&config, "test", OLD).await.unwrap();
    sqlx::query("insert into first values (1)").execute(&pool).await.unwrap();
    // Without limits, as a server process that was stopped in the middle of a transaction.
    let mut admin = database.admin().await.unwrap();
    sqlx::raw_sql("begin; update auth.first set id = 2").execute(&mut admin).await.unwrap();
    let begun = Instant::now();
    let refused = sqlx::query("update first set id = 3").execute(&pool).await.unwrap_err();
    assert_eq!(
        refused.as_database_error().and_then(|error| error.code()).as_deref(),
        Some("55P03"),
        "{refused}"
    );
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    sqlx::raw_sql("rollback").execute(&mut admin).await.unwrap();

    // A client that is paused in a transaction.
    let mut paused = pool.begin().await.unwrap();
    sqlx::query("update first set id = 4").execute(&mut *paused).await.unwrap();
    let begun = Instant::now();
    sqlx::raw_sql("set lock_timeout = 0; update auth.first set id = 5")
        .execute(&mut admin)
        .await
        .unwrap();
    assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", begun.elapsed());
    assert!(paused.commit().await.is_err());

    // A client that is gone while its statement runs, with its runtime: nothing reads the rest of
    // the answer.
    let client =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    client.spawn(async move {
        let pool = store::open(&config, "test", OLD).await.unwrap();
        sqlx::raw_sql("begin; update first set id = 6; select pg_sleep(25)").execute(&pool).await
    });
    eventually("it runs", || async {
        let running = "select count(*) from pg_stat_activity where query like '%pg_sleep(25)%' and wait_event = 'PgSleep'";
        sqlx::query_scalar::<_, i64>(running).fetch_one(&pool).await.unwrap() == 1
    })
    .await;
    client.shutdown_background();
    let begun = Instant::now();
    sqlx::raw_sql("update auth.first set id = 7").execute(&mut admin).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

/// A server that becomes a standby is restarted. Connections that were used a moment ago are not
/// checked again, and new ones are refused until it is a primary.
#[tokio::test]
async fn a_server_that_became_a_standby_is_neither_written_to_nor_read_from() {
    let mut server = testkit::postgres::Server::start().unwrap();
    let database = Database::create_on(server.url().to_owned()).await.unwrap();
    let pool = store::open(&database.config("auth"), "test", OLD).await.unwrap();
    let stop = CancellationToken::new();
    // Each writes all the time, so that its connection is never idle.
    let mut writers = JoinSet::new();
    for writer in 0..4 {
        let (pool, stop) = (pool.clone(), stop.clone());
        writers.spawn(async move {
            let mut written = Vec::new();
            for id in (writer..).step_by(4) {
                if stop.is_cancelled() {
                    break;
                }
                let insert = sqlx::query("insert into first values ($1)").bind(id);
                if insert.execute(&pool).await.is_ok() {
                    written.push(id);
                }
            }
            written
        });
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    server.demote().unwrap();
    server.ready().await.unwrap();
    for _ in 0..2 {
        let read = sqlx::query("select from first").fetch_all(&pool).await;
        assert!(read.is_err(), "a standby was read from");
    }
    let mut admin = database.admin().await.unwrap();
    let before: i64 =
        sqlx::query_scalar("select count(*) from auth.first").fetch_one(&mut admin).await.unwrap();
    sqlx::query("select pg_promote()").execute(&mut admin).await.unwrap();
    let count = async || {
        sqlx::query_scalar("select count(*) from first").fetch_one(&pool).await.unwrap_or(0)
    };
    eventually("it is written to again", async || count().await > before).await;
    stop.cancel();
    for written in writers.join_all().await {
        let kept = sqlx::query("select from first where id = any($1)").bind(&written);
        assert_eq!(kept.fetch_all(&pool).await.unwrap().len(), written.len());
    }
}
