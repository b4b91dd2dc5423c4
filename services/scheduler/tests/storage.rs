//! What the scheduler asks of Postgres, against real servers.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use bus::Bus;
use contract::{access, common::Empty, rpc, scheduler::CreateAgentRequest};
use scheduler::Retention;
use service::Lifecycle;
use sqlx::{Connection as _, PgConnection};
use testkit::{Database, Nats, eventually, postgres::Server};
use types::{ErrorCode, UserId};

const SOON: Duration = Duration::from_secs(15);

struct World {
    gateway: Bus,
    user: UserId,
    nats: Nats,
}

impl World {
    async fn start(database: &Database) -> Self {
        let nats = Nats::start().unwrap();
        Self::run_scheduler(&nats, database).await;
        let gateway = nats.connect(&access::GATEWAY).await.unwrap();
        eventually("the scheduler answers", || async { gateway.call::<rpc::SchedulerHealth>(&Empty {}, SOON).await.is_ok() }).await;
        Self { gateway, user: UserId::new(), nats }
    }

    async fn run_scheduler(nats: &Nats, database: &Database) {
        let config = scheduler::Config {
            bus: nats.config(&access::SCHEDULER),
            store: database.config("scheduler"),
            sprite_name_prefix: "aod".to_owned(),
            stream_replicas: 1,
            events_max_bytes: contract::topology::EVENTS.max_bytes,
            event_partitions: std::num::NonZeroU8::MIN,
            orphan_sweep: Duration::from_secs(900),
            retention: Retention { event_days: None, session_days: None },
        };
        scheduler::run(config, Lifecycle::new()).await.unwrap();
    }

    fn agent(&self) -> CreateAgentRequest {
        CreateAgentRequest {
            user_id: self.user.to_string(),
            name: "a".to_owned(),
            model: "none".to_owned(),
            runtime: "shell".to_owned(),
            metadata: "{}".to_owned(),
            skills: "[]".to_owned(),
            mcp_servers: "[]".to_owned(),
            ..CreateAgentRequest::default()
        }
    }
}

#[tokio::test]
async fn requests_are_unavailable_while_postgres_is_away() {
    let server = Server::start().unwrap();
    let database = Database::create_on(server.url().to_owned()).await.unwrap();
    let world = World::start(&database).await;
    world.gateway.call::<rpc::CreateAgent>(&world.agent(), SOON).await.unwrap();
    drop(server);
    let failure = world.gateway.call::<rpc::CreateAgent>(&world.agent(), SOON).await.unwrap_err();
    assert_eq!((failure.code, failure.message.as_str()), (ErrorCode::Unavailable, "The database is not available"));
}

/// Waits until so many messages are in the outbox, and so many set aside.
async fn outbox_holds(admin: &mut PgConnection, waiting: i64, dead: i64) {
    for _ in 0..200 {
        let counts: (i64, i64) =
            sqlx::query_as("select (select count(*) from scheduler.outbox), (select count(*) from scheduler.outbox_dead)")
                .fetch_one(&mut *admin)
                .await
                .unwrap();
        if counts == (waiting, dead) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the outbox does not come to hold {waiting} messages and {dead} set aside");
}

#[tokio::test]
async fn messages_that_no_stream_takes_hold_up_no_others_and_are_set_aside() {
    let database = Database::create().await.unwrap();
    let _world = World::start(&database).await;
    let mut admin = database.admin().await.unwrap();
    // More than a batch, for a partition that has no stream.
    sqlx::query(
        "insert into scheduler.outbox (outbox_id, subject, payload)
         select gen_random_uuid(), 'aod.log.session.v1.' || gen_random_uuid() || '.5', '' from generate_series(1, 600)",
    )
    .execute(&mut admin)
    .await
    .unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    for _ in 0..5 {
        let begun = Instant::now();
        sqlx::query(
            "insert into scheduler.outbox (outbox_id, subject, payload)
             select gen_random_uuid(), 'aod.' || kind || gen_random_uuid(), ''
             from unnest(array['evt.scheduler.v1.session.completed.', 'cmd.runner.v1.turn.run.', 'log.session.v1.']) as kind",
        )
        .execute(&mut admin)
        .await
        .unwrap();
        outbox_holds(&mut admin, 600, 0).await;
        assert!(begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
    }
    // After an hour without a stream, and at once where a message is too large for any.
    sqlx::query("update scheduler.outbox set created_at = now() - interval '61 minutes', not_before = now()")
        .execute(&mut admin)
        .await
        .unwrap();
    sqlx::query(
        "insert into scheduler.outbox (outbox_id, subject, payload)
         values (gen_random_uuid(), 'aod.cmd.runner.v1.turn.run.x', convert_to(repeat('x', 9000000), 'UTF8'))",
    )
    .execute(&mut admin)
    .await
    .unwrap();
    outbox_holds(&mut admin, 0, 601).await;
    let reasons: Vec<(String, i64)> = sqlx::query_as("select reason, count(*) from scheduler.outbox_dead group by reason order by 2")
        .fetch_all(&mut admin)
        .await
        .unwrap();
    assert_eq!(reasons, [("larger than a message may be".to_owned(), 1), ("no stream has its subject".to_owned(), 600)]);
}

/// `pg_dump` reads in one transaction for as long as it takes.
#[tokio::test]
async fn a_day_is_made_and_events_are_written_while_a_backup_reads() {
    let database = Database::create().await.unwrap();
    let world = World::start(&database).await;
    let mut admin = database.admin().await.unwrap();
    let last: String = sqlx::query_scalar("select max(relname)::text from pg_class where relname like 'event\\_2_______'")
        .fetch_one(&mut admin)
        .await
        .unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!("drop table scheduler.{last}"))).execute(&mut admin).await.unwrap();
    let mut backup = database.admin().await.unwrap();
    sqlx::raw_sql("begin isolation level repeatable read; select count(*) from scheduler.event").execute(&mut backup).await.unwrap();

    let replica = World::run_scheduler(&world.nats, &database);
    let writes = async {
        for id in 0..50_i64 {
            let insert = sqlx::query("insert into scheduler.event (session_id, event_id, payload) values (gen_random_uuid(), $1, '')");
            let written = tokio::time::timeout(Duration::from_millis(500), insert.bind(id).execute(&mut admin)).await;
            written.expect("a write waits").unwrap();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::join!(replica, writes);
    let there: bool = sqlx::query_scalar("select exists (select from pg_inherits join pg_class on oid = inhrelid where relname = $1)")
        .bind(last)
        .fetch_one(&mut admin)
        .await
        .unwrap();
    assert!(there, "the day's table is made while the backup reads");
    backup.close().await.unwrap();
}
