//! What a stolen part of the system can do: nothing beyond its own job. The servers enforce it,
//! with the configuration that deployments have.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, push};
use contract::{
    access::{self, Access},
    rpc, subject,
};
use sqlx::{Connection as _, PgConnection};
use system_tests::{Options, Stack};
use testkit::Nats;

const A_MOMENT: Duration = Duration::from_millis(300);

/// A connection that does what its thief wants, and what the server said about it.
struct Thief {
    client: async_nats::Client,
    errors: tokio::sync::mpsc::UnboundedReceiver<String>,
}

impl Thief {
    async fn of(nats: &Nats, access: &Access) -> Self {
        Self::login(nats, access.user).await
    }

    async fn login(nats: &Nats, user: &str) -> Self {
        let (sender, errors) = tokio::sync::mpsc::unbounded_channel();
        let options = async_nats::ConnectOptions::with_user_and_password(
            user.to_owned(),
            nats.password(user),
        )
        .custom_inbox_prefix(access::inbox(user))
        .event_callback(move |event| {
            let _ = sender.send(event.to_string());
            std::future::ready(())
        });
        Self { client: options.connect(nats.url()).await.unwrap(), errors }
    }

    async fn is_refused(&mut self) -> bool {
        let _ = self.client.flush().await;
        let refused = async {
            while let Some(error) = self.errors.recv().await {
                if error.to_lowercase().contains("permissions violation") {
                    return true;
                }
            }
            false
        };
        tokio::time::timeout(A_MOMENT, refused).await.unwrap_or(false)
    }

    async fn may_publish(&mut self, subject: &str) -> bool {
        self.client.publish(subject.to_owned(), "".into()).await.unwrap();
        !self.is_refused().await
    }

    async fn may_subscribe(&mut self, subject: &str) -> bool {
        let subscription = self.client.subscribe(subject.to_owned()).await.unwrap();
        let refused = self.is_refused().await;
        drop(subscription);
        !refused
    }
}

#[tokio::test]
async fn users_cannot_subscribe_beyond_their_permissions() {
    let nats = Nats::start().unwrap();
    let _streams = nats.with_streams().await.unwrap();
    let all = access::ALL;
    for access in &all {
        let mut thief = Thief::of(&nats, access).await;
        for subject in
            [">", "aod.>", "aod.rpc.>", "aod.log.>", "aod.cmd.>", "$JS.>", "$SYS.>", "_INBOX.>"]
        {
            assert!(!thief.may_subscribe(subject).await, "{} listens to {subject}", access.user);
        }
        for other in all.iter().filter(|other| other.user != access.user) {
            let subject = format!("{}.>", other.inbox());
            assert!(
                !thief.may_subscribe(&subject).await,
                "{} reads the answers to {}",
                access.user,
                other.user
            );
        }
        let own = format!("{}.x", access.inbox());
        assert!(
            thief.may_subscribe(&own).await,
            "{} cannot hear its own answers: the check checks nothing",
            access.user
        );
    }
}

#[tokio::test]
async fn the_servers_own_account_reports_on_them_and_hears_nothing_of_ours() {
    let nats = Nats::start().unwrap();
    let scheduler = nats.with_streams().await.unwrap();
    let system = Thief::login(&nats, access::SYSTEM).await;
    let report = system.client.request("$SYS.REQ.SERVER.PING.JSZ", "".into()).await.unwrap();
    let report: serde_json::Value = serde_json::from_slice(&report.payload).unwrap();
    assert!(report["data"]["streams"].as_u64() >= Some(4), "{report}");

    let mut heard = system.client.subscribe("aod.>").await.unwrap();
    let mut thief = Thief::of(&nats, &access::RUNNER).await;
    system.client.flush().await.unwrap();
    let log = subject::session_log(types::SessionId::new(), types::Partition::FIRST);
    assert!(thief.may_publish(&log).await);
    system.client.publish(log, "".into()).await.unwrap();
    assert!(
        futures::StreamExt::next(&mut heard)
            .await
            .is_some_and(|message| message.payload.is_empty()),
        "its own message is heard"
    );
    assert!(
        tokio::time::timeout(A_MOMENT, futures::StreamExt::next(&mut heard)).await.is_err(),
        "and the runner's is not"
    );
    drop(scheduler);
}

#[tokio::test]
async fn each_may_ask_for_its_own_job_and_nothing_else() {
    let nats = Nats::start().unwrap();
    let _streams = nats.with_streams().await.unwrap();
    let session = types::SessionId::new();
    let log = subject::session_log(session, types::Partition::FIRST);
    let elsewhere = subject::session_log(session, types::Partition::new(3).unwrap());
    let forbidden: [(&Access, &[&str]); 7] = [
        (
            &access::GATEWAY,
            &[
                "aod.rpc.vault.v1.lease.mint",
                "aod.rpc.vault.v1.lease.redeem",
                "aod.rpc.vault.v1.key.rotate",
                "aod.rpc.vault.v1.audit.list",
                "aod.rpc.scheduler.v1.turn.claim",
                "aod.rpc.scheduler.v1.sprite.claim",
                "aod.rpc.auth.v1.user.create",
                "aod.rpc.auth.v1.quota.set",
                "aod.cmd.runner.v1.turn.run.x",
                "aod.evt.scheduler.v1.session.completed.x",
                "aod.hint.runner.v1.session.terminate.x",
                "$JS.API.STREAM.DELETE.EVENTS",
                "$JS.API.STREAM.PURGE.EVENTS",
                "$JS.API.STREAM.PURGE.EVENTS_1",
                "$JS.API.STREAM.MSG.GET.JOBS",
                "$JS.API.CONSUMER.MSG.NEXT.JOBS.runner",
                "$JS.API.CONSUMER.CREATE.JOBS.x",
                &log,
                &elsewhere,
            ],
        ),
        (
            &access::RUNNER,
            &[
                "aod.rpc.vault.v1.lease.mint",
                "aod.rpc.vault.v1.credential.list",
                "aod.rpc.vault.v1.secret.put",
                "aod.rpc.vault.v1.key.rotate",
                "aod.rpc.scheduler.v1.session.delete",
                "aod.rpc.auth.v1.key.create",
                "aod.cmd.runner.v1.turn.run.x",
                "aod.evt.scheduler.v1.session.completed.x",
                "$JS.API.STREAM.DELETE.EVENTS",
                "$JS.API.STREAM.PURGE.EVENTS",
                "$JS.API.STREAM.PURGE.EVENTS_1",
                "$JS.API.CONSUMER.CREATE.EVENTS.x",
                "$JS.API.CONSUMER.CREATE.EVENTS_7.x",
                "$JS.API.CONSUMER.DELETE.JOBS.runner",
            ],
        ),
        (
            &access::EVENTS,
            &[
                &log,
                &elsewhere,
                "aod.evt.scheduler.v1.session.completed.x",
                "aod.rpc.auth.v1.key.verify",
                "aod.rpc.vault.v1.credential.list",
                "aod.rpc.scheduler.v1.session.list",
                "$JS.API.STREAM.DELETE.LIFECYCLE",
                "$JS.API.STREAM.PURGE.LIFECYCLE",
                "$JS.API.STREAM.MSG.DELETE.LIFECYCLE",
                "$JS.API.CONSUMER.CREATE.JOBS.x",
            ],
        ),
        (
            &access::SCHEDULER,
            &[
                "$JS.API.STREAM.CREATE.EVENTS",
                "$JS.API.STREAM.CREATE.EVENTS_7",
                "$JS.API.STREAM.CREATE.x",
                "$JS.API.STREAM.UPDATE.EVENTS",
                "$JS.API.STREAM.UPDATE.LIFECYCLE",
                "$JS.API.STREAM.DELETE.EVENTS",
                "$JS.API.STREAM.RESTORE.EVENTS",
                "aod.rpc.vault.v1.lease.redeem",
                "aod.rpc.auth.v1.key.create",
            ],
        ),
        (
            &access::STREAMS,
            &[
                "$JS.API.STREAM.CREATE.x",
                "$JS.API.STREAM.DELETE.EVENTS",
                "$JS.API.STREAM.PURGE.EVENTS",
                "$JS.API.STREAM.MSG.GET.EVENTS",
                "$JS.API.CONSUMER.CREATE.EVENTS.x",
                "aod.rpc.vault.v1.lease.redeem",
                "aod.rpc.auth.v1.key.create",
                &log,
            ],
        ),
        (
            &access::AUTH,
            &[
                "aod.rpc.vault.v1.credential.list",
                "aod.rpc.scheduler.v1.session.list",
                "aod.hint.runner.v1.session.terminate.x",
                "_INBOX_runner.x",
                "$JS.API.STREAM.LIST",
                &log,
            ],
        ),
        (
            &access::VAULT,
            &[
                "aod.rpc.auth.v1.key.create",
                "aod.rpc.scheduler.v1.session.list",
                "aod.hint.runner.v1.session.terminate.x",
                "_INBOX_events.x",
                "$JS.API.STREAM.LIST",
                &log,
            ],
        ),
    ];
    for (access, subjects) in forbidden {
        let mut thief = Thief::of(&nats, access).await;
        for subject in subjects {
            assert!(!thief.may_publish(subject).await, "{} publishes to {subject}", access.user);
        }
    }
    let mut gateway = Thief::of(&nats, &access::GATEWAY).await;
    assert!(gateway.may_publish("aod.rpc.auth.v1.key.verify").await, "the check checks nothing");
    let mut nobody = async_nats::ConnectOptions::new().max_reconnects(1).connect(nats.url()).await;
    assert!(nobody.is_err(), "{:?}", nobody.as_mut().map(|_| ()));
}

/// Who may read a stream chooses where its messages are delivered to, and no permission limits
/// that: the services must.
#[tokio::test]
async fn a_stream_that_is_delivered_to_a_service_is_neither_hint_nor_request() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let session = stack
        .session("shell", "for i in $(seq 20); do echo line $i; sleep 0.2; done")
        .await
        .unwrap();
    let mut events = stack.stream(&session, 0).await.unwrap();
    events.until_output("line 1\n").await.unwrap();
    let url = url::Url::parse(&stack.ready_text("/events_url")).unwrap();
    let password = url.password().unwrap().to_owned();
    let reader = async_nats::ConnectOptions::with_user_and_password(
        access::EVENTS.user.to_owned(),
        password,
    );
    let address = format!("{}:{}", url.host_str().unwrap(), url.port().unwrap());
    let reader = reader.custom_inbox_prefix(access::EVENTS.inbox()).connect(address).await.unwrap();
    let stream = async_nats::jetstream::new(reader).get_stream_no_info("EVENTS").await.unwrap();
    let id: types::SessionId = session.parse().unwrap();
    for (name, deliver_subject) in
        [("a", subject::terminate_hint(id)), ("b", rpc::RPCS[0].subject.to_owned())]
    {
        let deliver = push::Config {
            name: Some(name.to_owned()),
            deliver_subject,
            ack_policy: AckPolicy::None,
            // Heartbeats have no reply subject.
            idle_heartbeat: Duration::from_millis(200),
            ..push::Config::default()
        };
        // Should the server come to refuse this, so much the better: then the test is to go.
        stream.create_consumer(deliver).await.unwrap();
    }
    // A runner that took it for a termination deletes the Sprite, and the turn has no end for a
    // long while.
    let ended = tokio::time::timeout(Duration::from_secs(90), events.all()).await.unwrap().unwrap();
    assert_eq!(ended.last().unwrap().pointer("/code"), Some(&0.into()), "{:?}", ended.last());
}

#[tokio::test]
async fn a_role_of_postgres_sees_its_own_schema_and_no_other() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let mut admin = PgConnection::connect(&stack.ready_text("/database_url")).await.unwrap();
    let tables: Vec<(String, String)> =
        sqlx::query_as("select schemaname, tablename from pg_tables where schemaname in ('auth', 'vault', 'scheduler')")
            .fetch_all(&mut admin)
            .await
            .unwrap();
    assert!(tables.len() > 12, "{tables:?}");
    for role in store::provision::SERVICES {
        let mut connection =
            PgConnection::connect(&stack.ready_text("/database_url")).await.unwrap();
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!("set session authorization {role}")))
            .execute(&mut connection)
            .await
            .unwrap();
        for (schema, table) in &tables {
            let read = sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
                "select * from {schema}.{table} limit 1"
            )))
            .execute(&mut connection)
            .await;
            assert_eq!(read.is_ok(), schema == role, "{role} on {schema}.{table}: {read:?}");
        }
        for forbidden in [
            "create schema other",
            "create table public.x (y int)",
            "create role other",
            "select pg_read_file('/etc/passwd')",
            "copy (select 1) to program 'id'",
        ] {
            let done = sqlx::raw_sql(forbidden).execute(&mut connection).await;
            assert!(done.is_err(), "{role}: {forbidden}");
        }
    }
}
