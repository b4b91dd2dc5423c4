//! The scheduler against real Postgres and NATS, called as others call it; the vault beside it is
//! the real one too.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use bus::{Bus, RpcError};
use contract::{
    access,
    common::Empty,
    host::{self, WhenBusy, decision_settled::How, input_settled::Outcome},
    rpc,
    scheduler::{
        self as scheduler_messages, ArchiveSessionRequest, ChangeInputRequest,
        ClaimPreparationRequest, ClaimSpriteRequest, ClaimTurnRequest, CreateAgentRequest,
        CreateEnvironmentRequest, CreateSessionRequest, Cursor, DecideRequest,
        DeleteSessionRequest, EndPreparationRequest, FetchInputsRequest, FindOrphansRequest,
        FindTurnRequest, GetSessionRequest, HeartbeatReply, HeartbeatRequest, HeldTurn,
        InterruptRequest, ListPartsRequest, ListPermissionRequestsRequest, ListRequest, Once,
        PermissionRequest, PromptRequest, ReadEventsRequest, ReleaseTurnRequest, SendEventsRequest,
        SentEvent, SentMessage, Session, TerminateRequest, TurnSpec, UpdateAgentRequest,
        WithdrawInputRequest, claim_turn_reply::Verdict, sent_event::Kind as Sent,
    },
    session::{
        DecisionRequested, DecisionSettled, InputSettled, Output, SessionEvent, StopReason,
        TurnEnded, TurnStarted, session_event::Kind,
    },
    subject, topology,
};
use futures::future::join_all;
use prost::Message as _;
use rules::spares::Limits;
use scheduler::Retention;
use service::Lifecycle;
use sqlx::Connection as _;
use testkit::{Database, Nats, eventually};
use tokio::task::JoinSet;
use types::{ErrorCode, Partition, SessionId, UserId};
use uuid::Uuid;

#[path = "it/claims.rs"]
mod claims;
mod common;
#[path = "it/creation.rs"]
mod creation;
#[path = "it/deadlines.rs"]
mod deadlines;
#[path = "it/event_log.rs"]
mod event_log;
#[path = "it/inputs.rs"]
mod inputs;
#[path = "it/life.rs"]
mod life;
#[path = "it/managed.rs"]
mod managed;
#[path = "it/models.rs"]
mod models;
#[path = "it/random.rs"]
mod random;
#[path = "it/retention.rs"]
mod retention;
#[path = "it/spares.rs"]
mod spares;

const SOON: Duration = Duration::from_secs(5);

struct World {
    nats: Nats,
    database: Database,
    gateway: Bus,
    runner: Bus,
    spares: Limits,
    user: UserId,
    /// The lease that claims are made with; its heartbeats, as a runner sends them; and the turns
    /// that they name.
    lease: Uuid,
    heartbeats: JoinSet<()>,
    held: Arc<Mutex<Vec<HeldTurn>>>,
    _vault: testkit::services::Service,
}

/// Sends a runner's heartbeats, so that a slow machine's test does not lose its turns.
async fn keep(runner: Bus, lease: Uuid, held: Arc<Mutex<Vec<HeldTurn>>>) {
    let _presence = runner.hints(subject::lease_presence(lease)).await.unwrap();
    loop {
        let request = heartbeat(lease, false, held.lock().unwrap().clone());
        drop(runner.call::<rpc::Heartbeat>(&request, SOON).await);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

fn heartbeat(runner_lease: Uuid, first: bool, held: Vec<HeldTurn>) -> HeartbeatRequest {
    HeartbeatRequest { runner_lease: runner_lease.to_string(), runner: "r".to_owned(), first, held }
}

impl World {
    async fn start() -> Self {
        Self::start_with(Limits::default()).await
    }

    async fn start_with(spares: Limits) -> Self {
        let (nats, database) = (Nats::start().unwrap(), Database::create().await.unwrap());
        let settings = [
            ("NATS_URL", &*nats.url()),
            ("NATS_PASSWORD", &*nats.password(access::VAULT.user)),
            ("DATABASE_URL", &*database.url("vault")),
            ("FIELD_ENCRYPTION_KEY", "0123456789abcdef"),
        ];
        let vault = testkit::services::start("credential-vault", &settings).unwrap();
        let gateway = nats.connect(&access::GATEWAY).await.unwrap();
        eventually("the vault answers", || async {
            gateway.call::<rpc::VaultHealth>(&Empty {}, SOON).await.is_ok()
        })
        .await;
        let mut world = Self {
            gateway,
            _vault: vault,
            heartbeats: JoinSet::new(),
            held: Arc::default(),
            runner: nats.connect(&access::RUNNER).await.unwrap(),
            nats,
            database,
            spares,
            user: UserId::new(),
            lease: Uuid::now_v7(),
        };
        world.nats.create_streams([Partition::FIRST]).await.unwrap();
        world.run_scheduler(&Lifecycle::new()).await;
        world.heartbeats.spawn(keep(world.runner.clone(), world.lease, world.held.clone()));
        world
    }

    /// A world, and the id of an agent in it.
    async fn with_agent() -> (Self, String) {
        let world = Self::start().await;
        let agent = world.agent().await;
        (world, agent)
    }

    async fn run_scheduler(&self, lifecycle: &Lifecycle) {
        self.run_scheduler_with(lifecycle, None).await;
    }

    async fn run_scheduler_with(&self, lifecycle: &Lifecycle, files: Option<files::Files>) {
        let config = scheduler::Config {
            retention: Retention { event_days: Some(3), session_days: Some(3) },
            spares: self.spares,
            files: scheduler::FileSettings { store: files, user_bytes_max: u64::MAX, days: None },
            ..common::config(&self.nats, &self.database)
        };
        scheduler::run(config, lifecycle.clone()).await.unwrap();
    }

    async fn heartbeat(&self, lease: Uuid, first: bool, held: Vec<HeldTurn>) -> HeartbeatReply {
        let request = heartbeat(lease, first, held);
        self.runner.call::<rpc::Heartbeat>(&request, SOON).await.unwrap()
    }

    /// Its runner dies.
    fn fall_silent(&mut self) {
        self.heartbeats.abort_all();
    }

    /// Claims a turn with a valid lease.
    async fn claim_with(&self, lease: Uuid, session: &str, turn: u32) -> Verdict {
        self.heartbeat(lease, true, Vec::new()).await;
        let claim = ClaimTurnRequest {
            session_id: session.to_owned(),
            turn,
            runner: "r".to_owned(),
            runner_lease: lease.to_string(),
            ..ClaimTurnRequest::default()
        };
        self.runner.call::<rpc::ClaimTurn>(&claim, SOON).await.unwrap().verdict.unwrap()
    }

    async fn claim(&self, session: &str, turn: u32) -> Verdict {
        self.claim_with(self.lease, session, turn).await
    }

    /// Claims a turn that is to be run.
    async fn run(&self, session: &str, turn: u32) -> TurnSpec {
        let verdict = self.claim(session, turn).await;
        let Verdict::Run(spec) = verdict else { unreachable!("{verdict:?}") };
        let held =
            HeldTurn { session_id: session.to_owned(), turn, epoch: spec.epoch, ended: None };
        self.held.lock().unwrap().push(held);
        spec
    }

    async fn agent(&self) -> String {
        let request = self.new_agent();
        self.gateway.call::<rpc::CreateAgent>(&request, SOON).await.unwrap().agent.unwrap().agent_id
    }

    fn new_agent(&self) -> CreateAgentRequest {
        common::shell_agent(self.user)
    }

    fn prompt_of(&self, session: &str) -> PromptRequest {
        PromptRequest {
            user_id: self.user.to_string(),
            session_id: session.to_owned(),
            prompt: "again".to_owned(),
            timeout_seconds: 60,
            ..PromptRequest::default()
        }
    }

    async fn create(&self, agent: &str, limit: u32) -> Result<Session, RpcError> {
        let request = self.session_of(agent, limit);
        Ok(self.gateway.call::<rpc::CreateSession>(&request, SOON).await?.session.unwrap())
    }

    fn session_of(&self, agent: &str, limit: u32) -> CreateSessionRequest {
        CreateSessionRequest {
            user_id: self.user.to_string(),
            agent_id: agent.to_owned(),
            prompt: "echo".to_owned(),
            timeout_seconds: 60,
            credential_kinds: vec!["backend:sprites".to_owned()],
            session_limit: limit,
            metadata: "{}".to_owned(),
            resources: "[]".to_owned(),
            ..CreateSessionRequest::default()
        }
    }

    /// A session of the Managed Agents API that has no message yet.
    async fn create_idle(&self, agent: &str) -> String {
        let idle = CreateSessionRequest {
            is_v1: true,
            prompt: String::new(),
            ..self.session_of(agent, 100)
        };
        self.gateway
            .call::<rpc::CreateSession>(&idle, SOON)
            .await
            .unwrap()
            .session
            .unwrap()
            .session_id
    }

    async fn send_message(&self, session: &str, limit: u32) -> Result<(), ErrorCode> {
        let message = SentMessage { text: "echo".to_owned() };
        let send = SendEventsRequest {
            user_id: self.user.to_string(),
            session_id: session.to_owned(),
            events: vec![SentEvent { kind: Some(Sent::Message(message)) }],
            timeout_seconds: 60,
            session_limit: Some(limit),
            ..SendEventsRequest::default()
        };
        self.gateway
            .call::<rpc::SendEvents>(&send, SOON)
            .await
            .map(drop)
            .map_err(|failure| failure.code)
    }

    async fn archive(&self, session: &str) -> Result<Session, RpcError> {
        let request = ArchiveSessionRequest {
            user_id: self.user.to_string(),
            session_id: session.to_owned(),
        };
        self.gateway.call::<rpc::ArchiveSession>(&request, SOON * 2).await
    }

    async fn get(&self, session: &str, recorded_through: u64) -> Session {
        let request = GetSessionRequest {
            user_id: self.user.to_string(),
            session_id: session.to_owned(),
            recorded_through,
            v1: false,
        };
        self.gateway.call::<rpc::GetSession>(&request, SOON).await.unwrap()
    }

    async fn append(&self, session: &str, turn: u32, kind: Kind) -> u64 {
        let session: SessionId = session.parse().unwrap();
        let event = SessionEvent {
            turn,
            epoch: 1,
            checkpoint: None,
            kind: Some(kind),
            ..SessionEvent::default()
        };
        let id = SessionId::new().to_string();
        self.runner
            .publish(
                subject::session_log(session, Partition::FIRST),
                event.encode_to_vec().into(),
                &id,
            )
            .await
            .unwrap()
    }

    /// What quotas are checked by is what there is.
    async fn counts_are_right(&self) {
        let (counted, active): (i64, i64) = sqlx::query_as(
            "select (select coalesce(sum(sessions), 0) from scheduler.active_sessions),
                    (select count(*) from scheduler.session where status in ('pending', 'running'))",
        )
        .fetch_one(&mut self.database.admin().await.unwrap())
        .await
        .unwrap();
        assert_eq!(counted, active);
    }

    async fn complete(&self, session: &str, turn: u32) -> Session {
        self.append(session, turn, Kind::TurnStarted(TurnStarted::default())).await;
        let end = self
            .append(
                session,
                turn,
                Kind::TurnEnded(TurnEnded { exit_code: Some(0), ..TurnEnded::default() }),
            )
            .await;
        self.get(session, end).await
    }
}

async fn execute(world: &World, statement: &'static str) {
    sqlx::raw_sql(statement).execute(&mut world.database.admin().await.unwrap()).await.unwrap();
}

/// Returns the owner of a session's first turn.
async fn owner(world: &World, session: &str) -> Option<Uuid> {
    let id: Uuid = session.parse().unwrap();
    sqlx::query_scalar("select owner from scheduler.turn where session_id = $1 and turn_number = 1")
        .bind(id)
        .fetch_one(&mut world.database.admin().await.unwrap())
        .await
        .unwrap()
}
