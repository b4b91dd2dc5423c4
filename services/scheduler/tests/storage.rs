//! What the scheduler asks of Postgres, against real servers.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use bus::Bus;
use contract::{access, common::Empty, rpc, scheduler::CreateAgentRequest};
use scheduler::Retention;
use service::Lifecycle;
use testkit::{Database, Nats, eventually, postgres::Server};
use types::{ErrorCode, UserId};

const SOON: Duration = Duration::from_secs(15);

struct World {
    gateway: Bus,
    user: UserId,
    _nats: Nats,
}

impl World {
    async fn start(database: &Database) -> Self {
        let nats = Nats::start().unwrap();
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
        let gateway = nats.connect(&access::GATEWAY).await.unwrap();
        eventually("the scheduler answers", || async { gateway.call::<rpc::SchedulerHealth>(&Empty {}, SOON).await.is_ok() }).await;
        Self { gateway, user: UserId::new(), _nats: nats }
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
