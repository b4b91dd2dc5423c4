//! What the scheduler asks of Postgres, against real servers.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use bus::Bus;
use contract::{
    access,
    common::Empty,
    rpc,
    scheduler::{
        CreateAgentRequest, CreateEnvironmentRequest, Cursor, GetSessionRequest, ListPartsRequest,
        ListRequest,
    },
    topology,
};
use futures::future::join_all;
use service::Lifecycle;
use sqlx::{Connection as _, PgConnection};
use testkit::{Database, Nats, eventually, postgres::Server};
use types::{ErrorCode, Partition, UserId};
use uuid::Uuid;

mod common;

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
        eventually("the scheduler answers", || async {
            gateway.call::<rpc::SchedulerHealth>(&Empty {}, SOON).await.is_ok()
        })
        .await;
        Self { gateway, user: UserId::new(), nats }
    }

    async fn run_scheduler(nats: &Nats, database: &Database) {
        Self::run_scheduler_of("deployment-of-tests", &Lifecycle::new(), nats, database)
            .await
            .unwrap();
    }

    async fn run_scheduler_of(
        deployment_id: &str,
        lifecycle: &Lifecycle,
        nats: &Nats,
        database: &Database,
    ) -> anyhow::Result<()> {
        nats.create_streams([Partition::FIRST]).await?;
        scheduler::run(Self::config(deployment_id, 1, nats, database), lifecycle.clone()).await
    }

    fn config(
        deployment_id: &str,
        partitions: u8,
        nats: &Nats,
        database: &Database,
    ) -> scheduler::Config {
        scheduler::Config {
            deployment_id: deployment_id.into(),
            event_partitions: partitions.try_into().unwrap(),
            ..common::config(nats, database)
        }
    }

    fn agent(&self) -> CreateAgentRequest {
        common::shell_agent(self.user)
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
    assert_eq!(
        (failure.code, failure.message.as_str()),
        (ErrorCode::Unavailable, "The database is not available")
    );
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
async fn messages_that_no_stream_accepts_delay_no_others_and_are_set_aside() {
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
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
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
    let reasons: Vec<(String, i64)> = sqlx::query_as(
        "select reason, count(*) from scheduler.outbox_dead group by reason order by 2",
    )
    .fetch_all(&mut admin)
    .await
    .unwrap();
    assert_eq!(
        reasons,
        [
            ("larger than a message may be".to_owned(), 1),
            ("no stream has its subject".to_owned(), 600)
        ]
    );
}

/// `pg_dump` reads in one transaction for as long as it takes.
#[tokio::test]
async fn a_table_that_is_locked_holds_up_no_work_but_its_own() {
    let database = Database::create().await.unwrap();
    let _world = World::start(&database).await;
    let (mut admin, mut locking) =
        (database.admin().await.unwrap(), database.admin().await.unwrap());
    // As `vacuum full` does.
    let mut locked = locking.begin().await.unwrap();
    sqlx::query("lock table scheduler.file in access exclusive mode")
        .execute(&mut *locked)
        .await
        .unwrap();
    // What wakes a scheduler at its start is over.
    tokio::time::sleep(Duration::from_secs(2)).await;
    // As another replica does.
    sqlx::query(
        "insert into scheduler.outbox (outbox_id, subject, payload)
         values (gen_random_uuid(), 'aod.evt.scheduler.v1.session.completed.' || gen_random_uuid(), '')",
    )
    .execute(&mut admin)
    .await
    .unwrap();
    outbox_holds(&mut admin, 0, 0).await;
    locked.rollback().await.unwrap();
}

#[tokio::test]
async fn a_day_is_made_and_events_are_written_while_a_backup_reads() {
    let database = Database::create().await.unwrap();
    let world = World::start(&database).await;
    let mut admin = database.admin().await.unwrap();
    let last: String = sqlx::query_scalar(
        "select max(relname)::text from pg_class where relname like 'event\\_2_______'",
    )
    .fetch_one(&mut admin)
    .await
    .unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!("drop table scheduler.{last}")))
        .execute(&mut admin)
        .await
        .unwrap();
    let mut backup = database.admin().await.unwrap();
    sqlx::raw_sql("begin isolation level repeatable read; select count(*) from scheduler.event")
        .execute(&mut backup)
        .await
        .unwrap();

    let replica = World::run_scheduler(&world.nats, &database);
    let writes = async {
        for id in 0..50_i64 {
            let insert = sqlx::query(
                "insert into scheduler.event (session_id, event_id, payload) values (gen_random_uuid(), $1, '')",
            );
            let written =
                tokio::time::timeout(Duration::from_secs(5), insert.bind(id).execute(&mut admin))
                    .await;
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

/// Reads a whole list page by page; how many rows each page had.
async fn pages<T>(
    mut page: impl AsyncFnMut(Option<Cursor>) -> (Vec<T>, bool),
    cursor: impl Fn(&T) -> Cursor,
) -> Vec<usize> {
    let (mut counts, mut after) = (Vec::new(), None);
    loop {
        let (rows, has_more) = page(after).await;
        counts.push(rows.len());
        if !has_more {
            return counts;
        }
        after = rows.last().map(&cursor);
    }
}

#[tokio::test]
async fn lists_of_the_largest_rows_are_read_page_by_page() {
    const ROWS: usize = 9;
    let large = "x".repeat(2_500_000);
    let json = format!(r#"{{"k":"{large}"}}"#);
    let database = Database::create().await.unwrap();
    let world = World::start(&database).await;
    let user = world.user.to_string();
    let by_time = |position, id: &str| Cursor { position, id: id.to_owned() };
    let by_number = |number: u32| Cursor { position: number.into(), id: String::new() };
    let list = |limit, after| ListRequest {
        user_id: user.clone(),
        limit,
        after,
        ..ListRequest::default()
    };
    let parts = |id: &str, after| ListPartsRequest {
        user_id: user.clone(),
        id: id.to_owned(),
        limit: 1000,
        after,
    };
    let gateway = &world.gateway;

    let (mut agent, mut environment) = (String::new(), String::new());
    for n in 0..ROWS {
        let request = CreateAgentRequest { metadata: json.clone(), ..world.agent() };
        agent =
            gateway.call::<rpc::CreateAgent>(&request, SOON).await.unwrap().agent.unwrap().agent_id;
        let request = CreateEnvironmentRequest {
            user_id: user.clone(),
            name: n.to_string(),
            packages: "{}".to_owned(),
            networking: "{}".to_owned(),
            setup_script: large.clone(),
            ..CreateEnvironmentRequest::default()
        };
        environment = gateway
            .call::<rpc::CreateEnvironment>(&request, SOON)
            .await
            .unwrap()
            .environment
            .unwrap()
            .environment_id;
    }
    let mut admin = database.admin().await.unwrap();
    let copies = "with one as (select * from scheduler.agent_version where agent_id = $1)
         insert into scheduler.agent_version (agent_id, version, name, description, system, model, runtime, metadata, skills, mcp_servers)
         select agent_id, n, name, description, system, model, runtime, metadata, skills, mcp_servers from one, generate_series(2, 9) as n";
    sqlx::query(copies).bind(agent.parse::<Uuid>().unwrap()).execute(&mut admin).await.unwrap();
    let copies = "with one as (select * from scheduler.environment_version where environment_id = $1)
         insert into scheduler.environment_version (environment_id, version, name, packages, setup_script, networking, env_var_names)
         select environment_id, n, name, packages, setup_script, networking, env_var_names from one, generate_series(2, 9) as n";
    sqlx::query(copies)
        .bind(environment.parse::<Uuid>().unwrap())
        .execute(&mut admin)
        .await
        .unwrap();
    let session = Uuid::new_v4();
    sqlx::query(
        "insert into scheduler.session (session_id, user_id, agent_id, agent_version, runtime, sprite, conversation_id, metadata, status, turn_count)
         select case when n = 1 then $1 else gen_random_uuid() end, $2, $3, 1, 'shell', 's', gen_random_uuid(),
                jsonb_build_object('k', repeat('x', 2500000)), 'completed', 9
         from generate_series(1, 9) as n",
    )
    .bind(session)
    .bind(world.user.uuid())
    .bind(agent.parse::<Uuid>().unwrap())
    .execute(&mut admin)
    .await
    .unwrap();
    sqlx::query(
        "insert into scheduler.turn (session_id, turn_number, prompt, timeout_seconds, status, deadline_at)
         select $1, n, repeat('x', 2500000), 60, 'completed', now() from generate_series(1, 9) as n",
    )
    .bind(session)
    .execute(&mut admin)
    .await
    .unwrap();

    let agents = async |after| {
        let reply = gateway.call::<rpc::ListAgents>(&list(1000, after), SOON).await.unwrap();
        (reply.agents, reply.has_more)
    };
    // Two rows reach the bound of bytes.
    let expected = [2, 2, 2, 2, 1];
    assert_eq!(pages(agents, |row| by_time(row.created_at_us, &row.agent_id)).await, expected);
    let versions = async |after| {
        let reply =
            gateway.call::<rpc::ListAgentVersions>(&parts(&agent, after), SOON).await.unwrap();
        (reply.agents, reply.has_more)
    };
    assert_eq!(pages(versions, |row| by_number(row.version)).await, expected);
    let environments = async |after| {
        let reply = gateway.call::<rpc::ListEnvironments>(&list(1000, after), SOON).await.unwrap();
        (reply.environments, reply.has_more)
    };
    assert_eq!(
        pages(environments, |row| by_time(row.created_at_us, &row.environment_id)).await,
        expected
    );
    let versions = async |after| {
        let reply = gateway
            .call::<rpc::ListEnvironmentVersions>(&parts(&environment, after), SOON)
            .await
            .unwrap();
        (reply.environments, reply.has_more)
    };
    assert_eq!(pages(versions, |row| by_number(row.version)).await, expected);
    for filter in [None, Some(agent.clone())] {
        let sessions = async |after| {
            let request = ListRequest { agent_id: filter.clone(), ..list(1000, after) };
            let reply = gateway.call::<rpc::ListSessions>(&request, SOON).await.unwrap();
            (reply.sessions, reply.has_more)
        };
        assert_eq!(
            pages(sessions, |row| by_time(row.created_at_us, &row.session_id)).await,
            expected
        );
    }
    let turns = async |after| {
        let reply = gateway
            .call::<rpc::ListTurns>(&parts(&session.to_string(), after), SOON)
            .await
            .unwrap();
        (reply.turns, reply.has_more)
    };
    assert_eq!(pages(turns, |row| by_number(row.turn_number)).await, expected);
}

#[tokio::test]
async fn a_page_of_small_rows_ends_with_its_limit() {
    let database = Database::create().await.unwrap();
    let world = World::start(&database).await;
    for _ in 0..10 {
        world.gateway.call::<rpc::CreateAgent>(&world.agent(), SOON).await.unwrap();
    }
    for (limit, expected) in [(10, vec![10]), (11, vec![10]), (5, vec![5, 5]), (9, vec![9, 1])] {
        let agents = async |after| {
            let request = ListRequest {
                user_id: world.user.to_string(),
                limit,
                after,
                ..ListRequest::default()
            };
            let reply = world.gateway.call::<rpc::ListAgents>(&request, SOON).await.unwrap();
            (reply.agents, reply.has_more)
        };
        assert_eq!(
            pages(agents, |row| Cursor { position: row.created_at_us, id: row.agent_id.clone() })
                .await,
            expected
        );
    }
    let nobody =
        ListRequest { user_id: UserId::new().to_string(), limit: 10, ..ListRequest::default() };
    let reply = world.gateway.call::<rpc::ListAgents>(&nobody, SOON).await.unwrap();
    assert!(reply.agents.is_empty() && !reply.has_more);
}

/// Accounts of users that did nothing cost nothing.
#[tokio::test]
async fn the_accounts_of_users_whose_sessions_changed_are_searched_and_no_others() {
    let database = Database::create().await.unwrap();
    let world = World::start(&database).await;
    let mut admin = database.admin().await.unwrap();
    let [idle, active, deleted, purged] = [(); 4].map(|()| Uuid::new_v4());
    for (user, age) in [(idle, "2 hours"), (active, "10 minutes")] {
        sqlx::query(
            "insert into scheduler.session (session_id, user_id, agent_version, runtime, sprite, conversation_id, metadata, status, turn_count, updated_at)
             values (gen_random_uuid(), $1, 1, 'shell', 's', gen_random_uuid(), '{}', 'completed', 1, now() - $2::interval)",
        )
        .bind(user)
        .bind(age)
        .execute(&mut admin)
        .await
        .unwrap();
    }
    sqlx::query("insert into scheduler.deleted_session (session_id, user_id, sprite) values (gen_random_uuid(), $1, 's')")
        .bind(deleted)
        .execute(&mut admin)
        .await
        .unwrap();
    // The last search was 16 minutes ago, of users long idle as well; one row has been idle for so
    // long that it is forgotten.
    sqlx::query(
        "insert into scheduler.sprite_sweep (user_id, queued_at, changed_at)
         values ($1, now() - interval '16 minutes', now() - interval '1 day'), ($2, now() - interval '16 minutes', now()),
                ($3, now() - interval '8 days', now() - interval '8 days')",
    )
    .bind(idle)
    .bind(purged)
    .bind(Uuid::new_v4())
    .execute(&mut admin)
    .await
    .unwrap();
    World::run_scheduler(&world.nats, &database).await;
    let mut searched = Vec::new();
    for _ in 0..100 {
        searched =
            sqlx::query_scalar::<_, Uuid>("select user_id from scheduler.sprite_sweep where queued_at > now() - interval '1 minute'")
                .fetch_all(&mut admin)
                .await
                .unwrap();
        if searched.len() >= 3 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    searched.sort();
    let mut expected = [active, deleted, purged];
    expected.sort();
    assert_eq!(searched, expected);
    let known: i64 = sqlx::query_scalar("select count(*) from scheduler.sprite_sweep")
        .fetch_one(&mut admin)
        .await
        .unwrap();
    assert_eq!(known, 4);
    // A backup is restored: the accounts of users whose later sessions it does not know are
    // searched too.
    world.gateway.call::<rpc::CreateAgent>(&world.agent(), SOON).await.unwrap();
    sqlx::raw_sql("update scheduler.sprite_sweep set queued_at = now() - interval '1 day', changed_at = now() - interval '1 day'")
        .execute(&mut admin)
        .await
        .unwrap();
    World::run_scheduler(&world.nats, &database).await;
    eventually("everyone's account is searched", || async {
        let searched = "select exists (select from scheduler.sprite_sweep where user_id = $1 and queued_at > now() - interval '1 minute')";
        sqlx::query_scalar(searched).bind(world.user.uuid()).fetch_one(&mut database.admin().await.unwrap()).await.unwrap()
    })
    .await;
}

/// A staging system that starts from a copy of production's database, with the same Sprites token.
#[tokio::test]
async fn a_copy_of_the_database_is_refused_until_it_is_adopted_and_names_no_sprite_of_the_other_then()
 {
    let database = Database::create().await.unwrap();
    let (production, lifecycle) = (Nats::start().unwrap(), Lifecycle::new());
    World::run_scheduler_of("production", &lifecycle, &production, &database).await.unwrap();
    let mut admin = database.admin().await.unwrap();
    let name = "select deployment_id from scheduler.deployment";
    let before: String = sqlx::query_scalar(name).fetch_one(&mut admin).await.unwrap();
    sqlx::query(
        "with sessions as (
             insert into scheduler.session (session_id, user_id, agent_version, runtime, sprite, conversation_id, metadata, status, turn_count)
             select gen_random_uuid(), gen_random_uuid(), 1, 'shell', 'aod-' || $1 || '-' || n, gen_random_uuid(), '{}', status, 1
             from unnest(array['completed', 'running']) with ordinality as s (status, n)
             returning session_id, status
         )
         insert into scheduler.turn (session_id, turn_number, prompt, timeout_seconds, status, deadline_at)
         select session_id, 1, 'p', 60, status, now() + interval '1 hour' from sessions",
    )
    .bind(&before)
    .execute(&mut admin)
    .await
    .unwrap();

    // The database is the copy from here on.
    lifecycle.stop_token().cancel();
    lifecycle.tracker().close();
    lifecycle.tracker().wait().await;
    sqlx::query(
        "insert into scheduler.spare (session_id, user_id, agent_id, agent_version, collects_outputs, runtime, sprite, conversation_id,
                                      event_partition, state)
         select gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), 1, false, 'shell', 'aod-' || $1 || '-spare', gen_random_uuid(), 0,
                'ready'",
    )
    .bind(&before)
    .execute(&mut admin)
    .await
    .unwrap();
    let (staging, lifecycle) = (Nats::start().unwrap(), Lifecycle::new());
    let refused =
        World::run_scheduler_of("staging", &lifecycle, &staging, &database).await.unwrap_err();
    assert!(
        refused.to_string().starts_with("this database belongs to another deployment"),
        "{refused}"
    );
    store::provision::adopt(&mut admin).await.unwrap();
    let spares = sqlx::query_scalar::<_, i64>("select count(*) from scheduler.spare");
    assert_eq!(spares.fetch_one(&mut admin).await.unwrap(), 0, "the copy would destroy them");
    World::run_scheduler_of("staging", &lifecycle, &staging, &database).await.unwrap();
    let adopted: String = sqlx::query_scalar(name).fetch_one(&mut admin).await.unwrap();
    assert_ne!(adopted, before);
    let sprites: Vec<String> = sqlx::query_scalar("select sprite from scheduler.session")
        .fetch_all(&mut admin)
        .await
        .unwrap();
    assert!(
        sprites.len() == 2 && sprites.iter().all(|sprite| sprite.contains(&adopted)),
        "{sprites:?}"
    );
    for _ in 0..200 {
        let active =
            "select count(*) from scheduler.session where status in ('pending', 'running')";
        if sqlx::query_scalar::<_, i64>(active).fetch_one(&mut admin).await.unwrap() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("what ran when the copy was made does not end");
}

/// When the projector lags, every reader that is behind waits for it.
#[tokio::test]
async fn however_many_wait_for_the_projector_one_asks_postgres() {
    const WAITING: usize = 200;
    let database = Database::create().await.unwrap();
    let world = World::start(&database).await;
    let mut admin = database.admin().await.unwrap();
    let session: Uuid = sqlx::query_scalar(
        "insert into scheduler.session (session_id, user_id, agent_version, runtime, sprite, conversation_id, metadata, status, turn_count)
         values (gen_random_uuid(), $1, 1, 'shell', 's', gen_random_uuid(), '{}', 'completed', 1) returning session_id",
    )
    .bind(world.user.uuid())
    .fetch_one(&mut admin)
    .await
    .unwrap();
    let commits = async || {
        // Statistics are written once in a while.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let count = "select xact_commit from pg_stat_database where datname = current_database()";
        sqlx::query_scalar::<_, i64>(count)
            .fetch_one(&mut database.admin().await.unwrap())
            .await
            .unwrap()
    };
    let before = commits().await;
    let request = GetSessionRequest {
        user_id: world.user.to_string(),
        session_id: session.to_string(),
        recorded_through: 1_000_000,
        v1: false,
    };
    let waiting = join_all(
        (0..WAITING)
            .map(|_| world.gateway.call::<rpc::GetSession>(&request, Duration::from_secs(3))),
    )
    .await;
    assert!(waiting.iter().all(Result::is_err));
    // Each was tried twice, and looked its session up; the scheduler's own loops make some. One
    // query each 50 ms would be 12,000.
    let made = commits().await - before;
    assert!(made < 1500, "{made} transactions");
    // All of them hear of it.
    let persisted = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        sqlx::query("update scheduler.recorded set event_id = 1000000")
            .execute(&mut admin)
            .await
            .unwrap();
    };
    let waiting =
        join_all((0..WAITING).map(|_| world.gateway.call::<rpc::GetSession>(&request, SOON)));
    let (waiting, ()) = tokio::join!(waiting, persisted);
    assert!(waiting.iter().all(Result::is_ok));
}

/// Who may create a stream can have it store whatever others send.
#[tokio::test]
async fn a_scheduler_waits_for_the_streams_and_creates_none() {
    let (database, nats) = (Database::create().await.unwrap(), Nats::start().unwrap());
    let config = World::config("deployment-of-tests", 2, &nats, &database);
    let create = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let bus = nats.connect(&access::SCHEDULER).await.unwrap();
        for stream in topology::streams(Partition::all().take(2)) {
            assert!(bus.find_stream(&stream).await.unwrap().is_none(), "{}", stream.name);
            bus.ensure_stream(&stream, 1).await.unwrap_err();
        }
        nats.create_streams(Partition::all().take(2)).await.unwrap();
    };
    let (started, ()) = tokio::join!(scheduler::run(config, Lifecycle::new()), create);
    started.unwrap();
}

/// Those that wait for another replica's lease keep no connection busy and open none.
#[tokio::test]
async fn schedulers_that_stand_by_open_no_connections_and_ask_little() {
    const REPLICAS: usize = 4;
    let (database, nats) = (Database::create().await.unwrap(), Nats::start().unwrap());
    nats.create_streams(Partition::all().take(4)).await.unwrap();
    let _replicas = join_all((0..REPLICAS).map(async |_| {
        let lifecycle = Lifecycle::new();
        scheduler::run(
            World::config("deployment-of-tests", 4, &nats, &database),
            lifecycle.clone(),
        )
        .await
        .unwrap();
        lifecycle
    }))
    .await;
    let mut admin = database.admin().await.unwrap();
    let projectors =
        "select count(*) from pg_stat_activity where application_name like 'scheduler projector%'";
    for _ in 0..1200 {
        if sqlx::query_scalar::<_, i64>(projectors).fetch_one(&mut admin).await.unwrap() == 4 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(
        sqlx::query_scalar::<_, i64>(projectors).fetch_one(&mut admin).await.unwrap(),
        4,
        "each partition has one"
    );
    let mut counts = async || {
        // Statistics are written once in a while.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let counts =
            "select sessions, xact_commit from pg_stat_database where datname = current_database()";
        sqlx::query_as::<_, (i64, i64)>(counts).fetch_one(&mut admin).await.unwrap()
    };
    // Each standby opened a dozen a second once, ninety in all. On a busy machine projectors lose
    // their leases, and open one each time: then it is measured again.
    let mut measured = Vec::new();
    for _ in 0..8 {
        let (before, begun) = (counts().await, Instant::now());
        tokio::time::sleep(Duration::from_secs(4)).await;
        let (after, seconds) = (counts().await, begun.elapsed().as_secs_f64());
        let (connections, commits) =
            ((after.0 - before.0) as f64 / seconds, (after.1 - before.1) as f64 / seconds);
        println!("{connections:.2} connections and {commits:.0} transactions a second");
        measured.push((connections, commits));
        // Some seven of each replica, which looks for work of all its loops twice a second and for
        // turns four times, and six for the leases of the projectors.
        if connections < 5.0 && commits < 80.0 {
            return;
        }
    }
    panic!("connections and transactions a second: {measured:?}");
}

/// What grows with the sessions that there are, measured: `cargo test -p scheduler --test storage
/// busy -- --ignored --nocapture`.
#[tokio::test]
#[ignore = "a measurement"]
async fn a_busy_year_slows_nothing_down() {
    let database = Database::create().await.unwrap();
    let world = World::start(&database).await;
    let mut admin = database.admin().await.unwrap();
    let request = world.agent();
    let agents =
        join_all((0..2).map(|_| world.gateway.call::<rpc::CreateAgent>(&request, SOON))).await;
    let agents: Vec<Uuid> = agents
        .into_iter()
        .map(|agent| agent.unwrap().agent.unwrap().agent_id.parse().unwrap())
        .collect();
    // A million sessions of 10,000 users in a year; every fifth is one user's, of whose two agents
    // the second was used a hundred times.
    sqlx::query(
        "insert into scheduler.session (session_id, user_id, agent_id, agent_version, runtime, sprite, conversation_id, metadata, status, turn_count,
                                        created_at, updated_at, sprite_destroyed_at)
         select gen_random_uuid(),
                case when n % 5 = 0 then $1 else md5((n % 10000)::text)::uuid end,
                case when n % 5 = 0 then case when n % 10000 = 0 then $3 else $2 end end,
                1, 'shell', 'aod-00000000-' || n, gen_random_uuid(), '{\"team\": \"blue\"}', 'completed', 1, at, at, at
         from generate_series(1, 1000000) as n, lateral (select now() - interval '365 days' * n / 1000000 as at) time",
    )
    .bind(world.user.uuid())
    .bind(agents[0])
    .bind(agents[1])
    .execute(&mut admin)
    .await
    .unwrap();
    sqlx::raw_sql("vacuum analyze scheduler.session").execute(&mut admin).await.unwrap();
    let median = |mut times: Vec<Duration>| {
        times.sort();
        times[times.len() / 2]
    };
    for (what, agent, limit) in [
        ("GET /sessions?limit=50", None, 50),
        ("GET /sessions?limit=1000", None, 1000),
        ("GET /sessions?agent_id= of the much used agent", Some(agents[0]), 50),
        ("GET /sessions?agent_id= of the little used agent", Some(agents[1]), 50),
    ] {
        let mut times = Vec::new();
        for _ in 0..20 {
            let request = ListRequest {
                user_id: world.user.to_string(),
                limit,
                agent_id: agent.map(|id| id.to_string()),
                ..ListRequest::default()
            };
            let begun = Instant::now();
            let reply = world.gateway.call::<rpc::ListSessions>(&request, SOON).await.unwrap();
            times.push(begun.elapsed());
            assert!(reply.has_more && reply.sessions.len() == limit as usize);
        }
        println!("{what}: {:?}", median(times));
    }
    // A pass of every loop, that of retention with nothing to do included.
    for (what, statement) in [
        (
            "retention",
            "select session_id from scheduler.session
             where status in ('completed', 'failed', 'terminated') and updated_at < now() - interval '366 days'
               and updated_at >= '1970-01-01' and (updated_at, session_id) > ('1970-01-01', '00000000-0000-0000-0000-000000000000')
             order by updated_at, session_id limit 100",
        ),
        ("sweep", "select distinct user_id from scheduler.session where updated_at > now() - interval '1 hour'"),
    ] {
        let mut times = Vec::new();
        for _ in 0..20 {
            let begun = Instant::now();
            sqlx::query(statement).fetch_all(&mut admin).await.unwrap();
            times.push(begun.elapsed());
        }
        println!("{what}: {:?}", median(times));
    }
}
