//! The scheduler against real Postgres and NATS, called as others call it; the vault beside it is the real one too.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use bus::{Bus, Failure};
use contract::{
    access,
    common::Empty,
    host::{self, WhenBusy, decision_settled::How, input_settled::Outcome},
    rpc,
    scheduler::{
        self as scheduler_messages, ArchiveSessionRequest, ChangeInputRequest, ClaimSpriteRequest, ClaimTurnRequest, CreateAgentRequest,
        CreateEnvironmentRequest, CreateSessionRequest, Cursor, DecideRequest, DeleteSessionRequest, FetchInputsRequest, FindTurnRequest,
        GetSessionRequest, HeartbeatReply, HeartbeatRequest, HeldTurn, InterruptRequest, ListPartsRequest, ListPermissionRequestsRequest,
        Once, PermissionRequest, PromptRequest, ReadEventsRequest, ReleaseTurnRequest, SendEventsRequest, SentEvent, SentMessage, Session,
        TerminateRequest, TurnSpec, UpdateAgentRequest, WithdrawInputRequest, claim_turn_reply::Verdict, sent_event::Kind as Sent,
    },
    session::{
        DecisionRequested, DecisionSettled, InputSettled, Output, SessionEvent, StopReason, TurnEnded, TurnStarted, session_event::Kind,
    },
    subject,
};
use futures::future::join_all;
use prost::Message as _;
use scheduler::Retention;
use service::Lifecycle;
use sqlx::Connection as _;
use testkit::{Database, Nats, eventually};
use types::{ErrorCode, Partition, SessionId, UserId};
use uuid::Uuid;

#[path = "it/models.rs"]
mod models;

const SOON: Duration = Duration::from_secs(5);

struct World {
    nats: Nats,
    database: Database,
    gateway: Bus,
    runner: Bus,
    user: UserId,
    /// The lease that claims are made with.
    lease: Uuid,
    _vault: testkit::services::Service,
}

impl World {
    async fn start() -> Self {
        let (nats, database) = (Nats::start().unwrap(), Database::create().await.unwrap());
        let settings = [
            ("NATS_URL", &*nats.url()),
            ("NATS_PASSWORD", &*nats.password(access::VAULT.user)),
            ("DATABASE_URL", &*database.url("vault")),
            ("FIELD_ENCRYPTION_KEY", "0123456789abcdef"),
        ];
        let vault = testkit::services::start("credential-vault", &settings).unwrap();
        let gateway = nats.connect(&access::GATEWAY).await.unwrap();
        eventually("the vault answers", || async { gateway.call::<rpc::VaultHealth>(&Empty {}, SOON).await.is_ok() }).await;
        let world = Self {
            gateway,
            _vault: vault,
            runner: nats.connect(&access::RUNNER).await.unwrap(),
            nats,
            database,
            user: UserId::new(),
            lease: Uuid::now_v7(),
        };
        world.run_scheduler(&Lifecycle::new()).await;
        world
    }

    async fn run_scheduler(&self, lifecycle: &Lifecycle) {
        self.run_scheduler_with(lifecycle, None).await;
    }

    async fn run_scheduler_with(&self, lifecycle: &Lifecycle, files: Option<files::Files>) {
        let config = scheduler::Config {
            bus: self.nats.config(&access::SCHEDULER),
            store: self.database.config("scheduler"),
            sprite_name_prefix: "aod".to_owned(),
            deployment_id: "deployment-of-tests".into(),
            stream_replicas: 1,
            events_max_bytes: contract::topology::EVENTS.max_bytes,
            event_partitions: std::num::NonZeroU8::MIN,
            orphan_sweep: Duration::from_secs(900),
            retention: Retention { event_days: Some(3), session_days: Some(3) },
            files: scheduler::FileSettings { store: files, user_bytes_max: u64::MAX, days: None },
            model_defaults: scheduler::ModelDefaults::default(),
        };
        scheduler::run(config, lifecycle.clone()).await.unwrap();
    }

    async fn heartbeat(&self, lease: Uuid, first: bool, held: Vec<HeldTurn>) -> HeartbeatReply {
        let request = HeartbeatRequest { runner_lease: lease.to_string(), runner: "r".to_owned(), first, held };
        self.runner.call::<rpc::Heartbeat>(&request, SOON).await.unwrap()
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
        spec
    }

    async fn agent(&self) -> String {
        let request = self.new_agent();
        self.gateway.call::<rpc::CreateAgent>(&request, SOON).await.unwrap().agent.unwrap().agent_id
    }

    fn new_agent(&self) -> CreateAgentRequest {
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

    async fn create(&self, agent: &str, limit: u32) -> Result<Session, Failure> {
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
        let idle = CreateSessionRequest { is_v1: true, prompt: String::new(), ..self.session_of(agent, 100) };
        self.gateway.call::<rpc::CreateSession>(&idle, SOON).await.unwrap().session.unwrap().session_id
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
        self.gateway.call::<rpc::SendEvents>(&send, SOON).await.map(drop).map_err(|failure| failure.code)
    }

    async fn archive(&self, session: &str) -> Result<Session, Failure> {
        let request = ArchiveSessionRequest { user_id: self.user.to_string(), session_id: session.to_owned() };
        self.gateway.call::<rpc::ArchiveSession>(&request, SOON * 2).await
    }

    async fn get(&self, session: &str, recorded_through: u64) -> Session {
        let request = GetSessionRequest { user_id: self.user.to_string(), session_id: session.to_owned(), recorded_through, v1: false };
        self.gateway.call::<rpc::GetSession>(&request, SOON).await.unwrap()
    }

    async fn append(&self, session: &str, turn: u32, kind: Kind) -> u64 {
        let session: SessionId = session.parse().unwrap();
        let event = SessionEvent { turn, epoch: 1, checkpoint: None, kind: Some(kind), ..SessionEvent::default() };
        let id = SessionId::new().to_string();
        self.runner.publish(subject::session_log(session, Partition::FIRST), event.encode_to_vec().into(), &id).await.unwrap()
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
        let end = self.append(session, turn, Kind::TurnEnded(TurnEnded { exit_code: Some(0), ..TurnEnded::default() })).await;
        self.get(session, end).await
    }
}

#[tokio::test]
async fn of_concurrent_creates_exactly_the_quota_gets_through() {
    let world = World::start().await;
    let agent = world.agent().await;
    let results = join_all((0..50).map(|_| world.create(&agent, 10))).await;
    let (created, refused): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    assert_eq!((created.len(), refused.len()), (10, 40));
    let failure = refused.into_iter().next().unwrap().unwrap_err();
    assert_eq!(failure.message, "Concurrent session limit reached (10/10). Terminate an active session before starting a new one.");
    assert_eq!((failure.code, failure.numbers["limit"], failure.numbers["active"]), (ErrorCode::ResourceExhausted, 10, 10));
}

/// What a gateway does whose scheduler dies with a request, or is slow: the same is asked of another, also while the first is at it.
#[tokio::test]
async fn a_creation_that_is_asked_of_two_schedulers_takes_effect_once() {
    let world = World::start().await;
    world.run_scheduler(&Lifecycle::new()).await;
    let agent_id = Uuid::now_v7().to_string();
    let agent = CreateAgentRequest { agent_id: agent_id.clone(), ..world.new_agent() };
    let key = |key: &str| Some(Once { key: key.to_owned(), body_hash: vec![1], is_of_one_request: false });
    let json = "{}".to_owned();
    let environment = CreateEnvironmentRequest {
        user_id: world.user.to_string(),
        name: "e".to_owned(),
        packages: json.clone(),
        networking: json,
        environment_id: Uuid::now_v7().to_string(),
        ..CreateEnvironmentRequest::default()
    };
    for once in [None, key("a")] {
        let agent = CreateAgentRequest { once: once.clone(), ..agent.clone() };
        for created in join_all((0..5).map(|_| world.gateway.call::<rpc::CreateAgent>(&agent, SOON))).await {
            let created = created.unwrap();
            assert_eq!((created.agent.unwrap().agent_id, created.replayed), (agent_id.clone(), false));
        }
        // Its name is taken: by itself.
        let environment = CreateEnvironmentRequest { once, ..environment.clone() };
        for created in join_all((0..5).map(|_| world.gateway.call::<rpc::CreateEnvironment>(&environment, SOON))).await {
            let created = created.unwrap();
            assert_eq!((created.environment.unwrap().environment_id, created.replayed), (environment.environment_id.clone(), false));
        }
    }
    for (limit, once) in [(1, None), (2, key("b")), (5000, None)] {
        let session_id = Uuid::now_v7().to_string();
        let request = CreateSessionRequest { session_id: session_id.clone(), once: once.clone(), ..world.session_of(&agent_id, limit) };
        for created in join_all((0..5).map(|_| world.gateway.call::<rpc::CreateSession>(&request, SOON))).await {
            let created = created.unwrap();
            assert_eq!((created.session.unwrap().session_id, created.replayed), (session_id.clone(), false));
        }
        if once.is_some() {
            let of_the_client = CreateSessionRequest { session_id: Uuid::now_v7().to_string(), ..request };
            let replay = world.gateway.call::<rpc::CreateSession>(&of_the_client, SOON).await.unwrap();
            assert_eq!((replay.session.unwrap().session_id, replay.replayed), (session_id, true));
        }
    }
    let turns: Vec<(i64, i64)> = sqlx::query_as("select (select count(*) from scheduler.session), count(*) from scheduler.turn")
        .fetch_all(&mut world.database.admin().await.unwrap())
        .await
        .unwrap();
    assert_eq!(turns, [(3, 3)]);
    world.counts_are_right().await;

    // The id of another's is refused, and tells nothing.
    let stranger = CreateAgentRequest { user_id: UserId::new().to_string(), ..agent };
    let failure = world.gateway.call::<rpc::CreateAgent>(&stranger, SOON).await.unwrap_err();
    assert_eq!(failure.code, ErrorCode::Conflict);
}

#[tokio::test]
async fn a_prompt_that_is_asked_of_two_schedulers_is_one_turn() {
    let world = World::start().await;
    world.run_scheduler(&Lifecycle::new()).await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    world.complete(&session, 1).await;
    let prompt = |key: &str| PromptRequest {
        user_id: world.user.to_string(),
        session_id: session.clone(),
        prompt: "again".to_owned(),
        timeout_seconds: 60,
        once: Some(Once { key: key.to_owned(), body_hash: Vec::new(), is_of_one_request: true }),
        ..PromptRequest::default()
    };
    let request = prompt("one");
    for prompted in join_all((0..5).map(|_| world.gateway.call::<rpc::Prompt>(&request, SOON))).await {
        assert_eq!(prompted.unwrap().session.unwrap().turn_count, 2);
    }
    let failure = world.gateway.call::<rpc::Prompt>(&prompt("two"), SOON).await.unwrap_err();
    assert_eq!((failure.code, failure.message.as_str()), (ErrorCode::Conflict, "Session already has a pending turn"));
}

/// Creations that go side by side far below a large quota, and one by one near it, let no more through either.
#[tokio::test]
async fn a_large_quota_is_kept_too_and_what_ends_makes_room() {
    const LIMIT: u32 = 1200;
    let world = World::start().await;
    let agent = world.agent().await;
    let mut sessions = Vec::new();
    for _ in 0..27 {
        let created = join_all((0..50).map(|_| world.create(&agent, LIMIT))).await;
        sessions.extend(created.into_iter().flatten());
    }
    assert_eq!(sessions.len(), LIMIT as usize);
    assert!(world.create(&agent, LIMIT).await.is_err());
    for session in &sessions[..3] {
        assert_eq!(world.complete(&session.session_id, 1).await.status, "completed");
    }
    let created = join_all((0..20).map(|_| world.create(&agent, LIMIT))).await;
    assert_eq!(created.iter().filter(|created| created.is_ok()).count(), 3);
    world.counts_are_right().await;
}

#[tokio::test]
async fn a_turns_end_completes_the_session_and_one_of_racing_prompts_wins() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    assert_eq!(world.complete(&session, 1).await.status, "completed");
    let request = PromptRequest {
        user_id: world.user.to_string(),
        session_id: session.clone(),
        prompt: "again".to_owned(),
        timeout_seconds: 60,
        ..PromptRequest::default()
    };
    let results = join_all((0..20).map(|_| world.gateway.call::<rpc::Prompt>(&request, SOON))).await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    let refused = results.into_iter().find_map(Result::err).unwrap();
    assert_eq!((refused.code, refused.message.as_str()), (ErrorCode::Conflict, "Session already has a pending turn"));
    let now = world.get(&session, 0).await;
    assert_eq!((now.turn_count, now.status.as_str(), now.exit_code), (2, "pending", None));
}

/// No sandbox is deleted here: there is no runner.
#[tokio::test]
async fn a_terminated_session_loses_its_model_tokens_before_its_sandbox() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    world.heartbeat(world.lease, true, Vec::new()).await;
    let claim = ClaimTurnRequest {
        session_id: session.clone(),
        turn: 1,
        runner: "r".to_owned(),
        runner_lease: world.lease.to_string(),
        public_key: vec![9; 32],
        model_token_hash: vec![7; 32],
    };
    world.runner.call::<rpc::ClaimTurn>(&claim, SOON).await.unwrap();
    let revoked = async || {
        let revoked = sqlx::query_scalar::<_, bool>("select revoked_at is not null from vault.model_token");
        revoked.fetch_all(&mut world.database.admin().await.unwrap()).await.unwrap()
    };
    assert_eq!(revoked().await, [false]);
    let request = TerminateRequest { user_id: world.user.to_string(), session_id: session };
    world.gateway.call::<rpc::Terminate>(&request, SOON).await.unwrap();
    eventually("the token is revoked", || async { revoked().await == [true] }).await;
}

/// A message that wakes an idle session counts as a creation does.
#[tokio::test]
async fn messages_to_idle_sessions_are_subject_to_the_quota() {
    let world = World::start().await;
    let agent = world.agent().await;
    let mut replies = Vec::new();
    for _ in 0..3 {
        let session = world.create_idle(&agent).await;
        // The second message of a session is queued: it is active already.
        for _ in 0..2 {
            replies.push(world.send_message(&session, 2).await);
        }
    }
    assert_eq!(replies, [Ok(()), Ok(()), Ok(()), Ok(()), Err(ErrorCode::ResourceExhausted), Err(ErrorCode::ResourceExhausted)]);
    world.counts_are_right().await;
}

#[tokio::test]
async fn a_session_without_a_turn_can_be_terminated_archived_and_deleted() {
    let world = World::start().await;
    let agent = world.agent().await;
    let (terminated, archived) = (world.create_idle(&agent).await, world.create_idle(&agent).await);
    let request = TerminateRequest { user_id: world.user.to_string(), session_id: terminated.clone() };
    assert_eq!(world.gateway.call::<rpc::Terminate>(&request, SOON).await.unwrap().status, "terminated");
    let reply = world.archive(&archived).await.unwrap();
    assert_eq!((reply.status.as_str(), reply.archived_at_us.is_some()), ("terminated", true));
    // Again, and of one that was terminated, it is no error.
    assert!(world.archive(&archived).await.is_ok() && world.archive(&terminated).await.is_ok());
    for session_id in [terminated, archived] {
        assert_eq!(world.send_message(&session_id, 10).await, Err(ErrorCode::Conflict));
        let delete = DeleteSessionRequest { user_id: world.user.to_string(), session_id };
        world.gateway.call::<rpc::DeleteSession>(&delete, SOON).await.unwrap();
    }
}

/// An accepted message is never killed by an archiving that was accepted too.
#[tokio::test]
async fn of_a_message_and_an_archiving_at_once_one_is_accepted() {
    let world = World::start().await;
    let agent = world.agent().await;
    for _ in 0..20 {
        let session = world.create_idle(&agent).await;
        let (sent, archived) = tokio::join!(world.send_message(&session, 100), world.archive(&session));
        let status = world.get(&session, 0).await.status;
        match (sent, archived) {
            (Ok(()), Err(failure)) => assert_eq!((failure.code, status.as_str()), (ErrorCode::Conflict, "pending")),
            (Err(code), Ok(_)) => assert_eq!((code, status.as_str()), (ErrorCode::Conflict, "terminated")),
            both => unreachable!("{both:?}"),
        }
    }
}

#[tokio::test]
async fn terminate_wins_over_a_late_completion_and_only_once() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    let request = TerminateRequest { user_id: world.user.to_string(), session_id: session.clone() };
    assert_eq!(world.gateway.call::<rpc::Terminate>(&request, SOON).await.unwrap().status, "terminated");
    assert_eq!(world.gateway.call::<rpc::Terminate>(&request, SOON).await.unwrap_err().message, "Session is already terminated");
    assert_eq!(world.complete(&session, 1).await.status, "terminated");
    let verdict = world.claim(&session, 1).await;
    assert!(matches!(verdict, Verdict::Settled(settled) if settled.destroy.is_some()), "what exists of its Sprite has to go");
}

#[tokio::test]
async fn a_sprite_may_be_deleted_of_a_terminated_failed_or_deleted_session_alone() {
    let world = World::start().await;
    let agent = world.agent().await;
    let claim = async |session: &str| {
        let request = ClaimSpriteRequest { session_id: session.to_owned(), runner: "r".to_owned(), ..ClaimSpriteRequest::default() };
        world.runner.call::<rpc::ClaimSprite>(&request, SOON).await.map(|claim| claim.sprite)
    };
    let session = world.create(&agent, 10).await.unwrap().session_id;
    let refused = async |session: &str| claim(session).await.unwrap_err().code == ErrorCode::NotFound;
    assert!(refused(&session).await, "pending");
    world.run(&session, 1).await;
    world.append(&session, 1, Kind::TurnStarted(TurnStarted::default())).await;
    eventually("it runs", || async { world.get(&session, 0).await.status == "running" }).await;
    assert!(refused(&session).await, "running");
    // Whatever else may be wrong: the status decides.
    execute(&world, "update scheduler.session set destroy_after = now() + interval '1 day'").await;
    assert!(refused(&session).await, "running, marked by mistake");
    execute(&world, "update scheduler.session set destroy_after = null").await;
    world.complete(&session, 1).await;
    assert!(refused(&session).await, "completed");
    let delete = DeleteSessionRequest { user_id: world.user.to_string(), session_id: session.clone() };
    world.gateway.call::<rpc::DeleteSession>(&delete, SOON).await.unwrap();
    assert!(claim(&session).await.is_ok(), "deleted");

    let terminated = world.create(&agent, 10).await.unwrap().session_id;
    let request = TerminateRequest { user_id: world.user.to_string(), session_id: terminated.clone() };
    world.gateway.call::<rpc::Terminate>(&request, SOON).await.unwrap();
    assert!(claim(&terminated).await.is_ok(), "terminated");
}

#[tokio::test]
async fn every_claim_raises_the_epoch_until_the_turn_is_settled() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    for expected in 1..=3 {
        assert_eq!(world.run(&session, 1).await.epoch, expected);
    }
    world.complete(&session, 1).await;
    let verdict = world.claim(&session, 1).await;
    assert!(matches!(verdict, Verdict::Settled(settled) if settled.destroy.is_none()));
}

#[tokio::test]
async fn an_overdue_turn_is_settled_with_a_reason() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    let mut admin = world.database.admin().await.unwrap();
    sqlx::query("update scheduler.turn set deadline_at = now() - interval '1 second'").execute(&mut admin).await.unwrap();
    eventually("the session fails", || async { world.get(&session, 0).await.status == "failed" }).await;
    assert_eq!(
        world.get(&session, 0).await.failure.unwrap().message,
        "Turn could not be started in time: no runner finished setting it up"
    );
}

#[tokio::test]
async fn two_schedulers_record_every_event_once_and_in_order() {
    let world = World::start().await;
    world.run_scheduler(&Lifecycle::new()).await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    let mut ids = Vec::new();
    for n in 0..300 {
        ids.push(world.append(&session, 1, Kind::Output(Output { stderr: false, data: format!("{n}").into() })).await);
    }
    world.get(&session, *ids.last().unwrap()).await;
    let mut read = Vec::new();
    loop {
        let request = ReadEventsRequest {
            session_id: session.clone(),
            after: read.last().copied().unwrap_or(0),
            limit: 64,
            max_bytes: 0,
            before: None,
            without_output: false,
        };
        let page = world.gateway.call::<rpc::ReadEvents>(&request, SOON).await.unwrap().events;
        if page.is_empty() {
            break;
        }
        read.extend(page.into_iter().map(|event| event.event_id));
    }
    assert_eq!(read, ids);
}

#[tokio::test]
async fn an_event_that_cannot_be_read_holds_up_nothing() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    let id: SessionId = session.parse().unwrap();
    world.runner.publish(subject::session_log(id, Partition::FIRST), vec![0xff; 20].into(), "garbage").await.unwrap();
    // One of an unknown session.
    world.append(&SessionId::new().to_string(), 1, Kind::TurnStarted(TurnStarted::default())).await;
    assert_eq!(world.complete(&session, 1).await.status, "completed");
}

/// Who may ask JetStream chooses where the server puts its answer.
#[tokio::test]
async fn an_entry_that_no_service_wrote_is_removed_and_fences_off_no_writer() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    let log = subject::session_log(session.parse().unwrap(), Partition::FIRST);
    let started = world.append(&session, 1, Kind::TurnStarted(TurnStarted::default())).await;
    let reader = access::EVENTS;
    let options = async_nats::ConnectOptions::with_user_and_password(reader.user.to_owned(), world.nats.password(reader.user));
    let reader = options.custom_inbox_prefix(reader.inbox()).connect(world.nats.url()).await.unwrap();
    for _ in 0..3 {
        reader.publish_with_reply("$JS.API.INFO", log.clone(), "".into()).await.unwrap();
    }
    reader.flush().await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    eventually("the log ends where it did", || async {
        world.runner.last("EVENTS", &log).await.unwrap().is_some_and(|last| last.sequence == started)
    })
    .await;
    let end = Kind::TurnEnded(TurnEnded { exit_code: Some(0), ..TurnEnded::default() });
    let end = world.append(&session, 1, end).await;
    assert_eq!(world.get(&session, end).await.status, "completed");
}

#[tokio::test]
async fn a_later_edit_changes_nothing_for_a_sessions_next_turn() {
    let world = World::start().await;
    let agent = world.agent().await;
    let session = world.create(&agent, 10).await.unwrap().session_id;
    world.complete(&session, 1).await;
    let change = UpdateAgentRequest {
        user_id: world.user.to_string(),
        agent_id: agent,
        version: 1,
        model: Some("newer".to_owned()),
        ..UpdateAgentRequest::default()
    };
    assert_eq!(world.gateway.call::<rpc::UpdateAgent>(&change, SOON).await.unwrap().version, 2);
    let prompt = PromptRequest {
        user_id: world.user.to_string(),
        session_id: session.clone(),
        prompt: "again".to_owned(),
        timeout_seconds: 60,
        ..PromptRequest::default()
    };
    world.gateway.call::<rpc::Prompt>(&prompt, SOON).await.unwrap();
    let spec = world.run(&session, 2).await;
    assert_eq!((spec.model.as_str(), spec.prompt.as_str(), spec.system.as_str()), ("none", "again", ""));
}

/// What a session is, by the contract alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Model {
    status: &'static str,
    turn: u32,
}

impl Model {
    fn is_active(self) -> bool {
        matches!(self.status, "pending" | "running")
    }
}

/// Random courses of everything that can happen to a session, each step compared with what the contract says of it.
#[tokio::test]
async fn whatever_happens_in_whatever_order_the_state_is_the_contracts() {
    let seed = fastrand::u64(..);
    let mut rng = fastrand::Rng::with_seed(seed);
    let world = World::start().await;
    let agent = world.agent().await;
    let user = world.user.to_string();
    for course in 0..40 {
        let session = world.create(&agent, 1000).await.unwrap().session_id;
        let mut model = Some(Model { status: "pending", turn: 1 });
        let mut log = vec![format!("seed {seed}, course {course}")];
        for _ in 0..10 {
            let Some(now) = model else { break };
            let (ids, step) = ((user.clone(), session.clone()), rng.u8(..7));
            log.push(format!("{now:?}, step {step}"));
            match step {
                0 => {
                    let request = PromptRequest {
                        user_id: ids.0,
                        session_id: ids.1,
                        prompt: "p".to_owned(),
                        timeout_seconds: 60,
                        ..PromptRequest::default()
                    };
                    let done = world.gateway.call::<rpc::Prompt>(&request, SOON).await;
                    assert_eq!(done.is_ok(), now.status == "completed", "{log:?}");
                    if done.is_ok() {
                        model = Some(Model { status: "pending", turn: now.turn + 1 });
                    }
                }
                1 => {
                    let done = world.gateway.call::<rpc::Terminate>(&TerminateRequest { user_id: ids.0, session_id: ids.1 }, SOON).await;
                    assert_eq!(done.is_ok(), now.status != "terminated", "{log:?}");
                    model = Some(Model { status: "terminated", ..now });
                }
                2 => {
                    let request = DeleteSessionRequest { user_id: ids.0, session_id: ids.1 };
                    let done = world.gateway.call::<rpc::DeleteSession>(&request, SOON).await;
                    assert_eq!(done.is_ok(), !now.is_active(), "{log:?}");
                    if done.is_ok() {
                        model = None;
                    }
                }
                3 => {
                    let id = world.append(&session, now.turn, Kind::TurnStarted(TurnStarted::default())).await;
                    world.get(&session, id).await;
                    if now.status == "pending" {
                        model = Some(Model { status: "running", ..now });
                    }
                }
                // A takeover: another claim, and it changes nothing that a user sees.
                4 => {
                    let verdict = world.claim(&session, now.turn).await;
                    assert_eq!(matches!(verdict, Verdict::Run(_)), now.is_active(), "{log:?}");
                }
                // The end of this turn, or once more that of the one before.
                _ => {
                    let (code, stale) = (i32::from(rng.u8(..2)), now.turn > 1 && rng.bool());
                    let turn = if stale { now.turn - 1 } else { now.turn };
                    let id =
                        world.append(&session, turn, Kind::TurnEnded(TurnEnded { exit_code: Some(code), ..TurnEnded::default() })).await;
                    world.get(&session, id).await;
                    if now.is_active() && !stale {
                        model = Some(Model { status: if code == 0 { "completed" } else { "failed" }, ..now });
                    }
                }
            }
            let request = GetSessionRequest { user_id: user.clone(), session_id: session.clone(), recorded_through: 0, v1: false };
            let seen = world.gateway.call::<rpc::GetSession>(&request, SOON).await.ok();
            let seen = seen.map(|session| (session.status, session.turn_count));
            assert_eq!(seen, model.map(|model| (model.status.to_owned(), model.turn)), "{log:?}");
        }
    }
    world.counts_are_right().await;
}

/// All at once on one session: termination wins over everything but deletion, and nothing is in between.
#[tokio::test]
async fn whatever_happens_at_once_ends_in_one_state() {
    let world = World::start().await;
    let agent = world.agent().await;
    let user = world.user.to_string();
    for round in 0..30 {
        let session = world.create(&agent, 1000).await.unwrap().session_id;
        if round % 2 == 0 {
            world.complete(&session, 1).await;
        }
        let prompt = PromptRequest {
            user_id: user.clone(),
            session_id: session.clone(),
            prompt: "p".to_owned(),
            timeout_seconds: 60,
            ..PromptRequest::default()
        };
        let terminate = TerminateRequest { user_id: user.clone(), session_id: session.clone() };
        let delete = DeleteSessionRequest { user_id: user.clone(), session_id: session.clone() };
        let (prompted, terminated, deleted, _, ended) = tokio::join!(
            world.gateway.call::<rpc::Prompt>(&prompt, SOON),
            world.gateway.call::<rpc::Terminate>(&terminate, SOON),
            world.gateway.call::<rpc::DeleteSession>(&delete, SOON),
            world.claim(&session, 1),
            world.append(&session, 1, Kind::TurnEnded(TurnEnded { exit_code: Some(0), ..TurnEnded::default() })),
        );
        assert!(terminated.is_ok() || deleted.is_ok(), "round {round}: {terminated:?}, {deleted:?}");
        // Written down, whatever became of the session.
        eventually("the end is recorded", || async {
            let through: Option<i64> = sqlx::query_scalar("select event_id from scheduler.recorded")
                .fetch_optional(&mut world.database.admin().await.unwrap())
                .await
                .unwrap();
            through.is_some_and(|through| through.unsigned_abs() >= ended)
        })
        .await;
        let request = GetSessionRequest { user_id: user.clone(), session_id: session.clone(), recorded_through: 0, v1: false };
        match world.gateway.call::<rpc::GetSession>(&request, SOON).await {
            Ok(now) => {
                assert!(deleted.is_err());
                assert_eq!((now.status.as_str(), now.turn_count), ("terminated", 1 + u32::from(prompted.is_ok())));
            }
            Err(failure) => assert!(deleted.is_ok() && failure.code == ErrorCode::NotFound),
        }
    }
    world.counts_are_right().await;
}

#[tokio::test]
async fn what_is_old_goes_and_what_is_not_stays() {
    let world = World::start().await;
    let agent = world.agent().await;
    let (old, new) = (world.create(&agent, 10).await.unwrap().session_id, world.create(&agent, 10).await.unwrap().session_id);
    let active = world.create(&agent, 10).await.unwrap().session_id;
    for session in [&old, &new] {
        world.complete(session, 1).await;
    }
    let mut admin = world.database.admin().await.unwrap();
    let mut run = async |statement: &'static str| sqlx::raw_sql(statement).execute(&mut admin).await.unwrap();
    run("create table scheduler.event_20200101 partition of scheduler.event for values from ('2020-01-01') to ('2020-01-02');
         insert into scheduler.event (session_id, event_id, recorded_on, payload)
         select session_id, event_id - 1000000, '2020-01-01', payload from scheduler.event;
         alter table scheduler.event_20200101 owner to scheduler;
         create table scheduler.event_20200102 (detached_and_not_dropped integer);
         alter table scheduler.event_20200102 owner to scheduler")
    .await;
    let id: Uuid = old.parse().unwrap();
    for session in [id, active.parse().unwrap()] {
        sqlx::query("update scheduler.session set updated_at = now() - interval '4 days' where session_id = $1")
            .bind(session)
            .execute(&mut world.database.admin().await.unwrap())
            .await
            .unwrap();
    }
    // Another replica, which does what is to be done when it starts.
    world.run_scheduler(&Lifecycle::new()).await;
    let get = async |session: &str| {
        let request = GetSessionRequest { user_id: world.user.to_string(), session_id: session.to_owned(), recorded_through: 0, v1: false };
        world.gateway.call::<rpc::GetSession>(&request, SOON).await
    };
    eventually("the old session is gone", || async { get(&old).await.is_err_and(|failure| failure.code == ErrorCode::NotFound) }).await;
    eventually("the old day is gone", || async {
        let there: bool = sqlx::query_scalar(
            "select coalesce(to_regclass('scheduler.event_20200101'), to_regclass('scheduler.event_20200102')) is not null",
        )
        .fetch_one(&mut world.database.admin().await.unwrap())
        .await
        .unwrap();
        !there
    })
    .await;
    // An active session is never old, and a stream whose first events are gone goes on with the next.
    assert!(get(&active).await.is_ok() && get(&new).await.is_ok());
    let read = ReadEventsRequest { session_id: new, after: 0, limit: 100, max_bytes: 0, before: None, without_output: false };
    assert_eq!(world.gateway.call::<rpc::ReadEvents>(&read, SOON).await.unwrap().events.len(), 2);
}

/// A setting or a clock that is wrong is noticed before everything is gone.
#[tokio::test]
async fn one_day_of_events_is_dropped_in_an_hour_whichever_replica_starts() {
    let world = World::start().await;
    let mut admin = world.database.admin().await.unwrap();
    for day in ["20200103", "20200104", "20200105"] {
        let (year, month, date) = (&day[..4], &day[4..6], day[6..].parse::<u32>().unwrap());
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
            "create table scheduler.event_{day} partition of scheduler.event
                 for values from ('{year}-{month}-{date}') to ('{year}-{month}-{}');
             alter table scheduler.event_{day} owner to scheduler",
            date + 1
        )))
        .execute(&mut admin)
        .await
        .unwrap();
    }
    let days = async || {
        sqlx::query_scalar::<_, String>("select relname::text from pg_class where relname like 'event\\_2020____' order by 1")
            .fetch_all(&mut world.database.admin().await.unwrap())
            .await
            .unwrap()
    };
    for left in [&["event_20200104", "event_20200105"] as &[_], &["event_20200105"]] {
        for _ in 0..3 {
            world.run_scheduler(&Lifecycle::new()).await;
        }
        eventually("the oldest day is gone", || async { days().await == left }).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(days().await, left, "and no other");
        // An hour later.
        sqlx::raw_sql("update scheduler.lease set expires_at = now() where name = 'event-retention'").execute(&mut admin).await.unwrap();
    }
}

#[tokio::test]
async fn a_turn_that_no_runner_can_run_fails_with_the_last_reason() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    let release = async |epoch, reason: &str| {
        let request = ReleaseTurnRequest { session_id: session.clone(), turn: 1, epoch, reason: reason.to_owned() };
        world.runner.call::<rpc::ReleaseTurn>(&request, SOON).await.unwrap();
    };
    let epoch = world.run(&session, 1).await.epoch;
    release(epoch, "no sandbox to be had").await;
    // A stale claim releases nothing.
    release(epoch + 1, "nonsense").await;
    assert_eq!(world.get(&session, 0).await.waiting_on.as_deref(), Some("another attempt: no sandbox to be had"));
    // Takeovers without a failure do not count.
    for _ in 0..110 {
        let epoch = world.run(&session, 1).await.epoch;
        release(epoch, "").await;
    }
    for _ in 0..100 {
        let epoch = world.run(&session, 1).await.epoch;
        release(epoch, "no sandbox to be had").await;
    }
    eventually("the turn is given up", || async { world.get(&session, 0).await.status == "failed" }).await;
    assert!(matches!(world.claim(&session, 1).await, Verdict::Settled(_)));
    let now = world.get(&session, 0).await;
    assert_eq!(
        (now.status.as_str(), now.failure.unwrap().message.as_str()),
        ("failed", "Given up after 100 attempts: no sandbox to be had")
    );
}

/// What `turn` says of a session's first turn.
async fn owner(world: &World, session: &str) -> Option<Uuid> {
    let id: Uuid = session.parse().unwrap();
    sqlx::query_scalar("select owner from scheduler.turn where session_id = $1 and turn_number = 1")
        .bind(id)
        .fetch_one(&mut world.database.admin().await.unwrap())
        .await
        .unwrap()
}

async fn execute(world: &World, statement: &'static str) {
    sqlx::raw_sql(statement).execute(&mut world.database.admin().await.unwrap()).await.unwrap();
}

#[tokio::test]
async fn a_second_job_for_an_owned_turn_is_ignored_until_its_lease_expires() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    let (first, second) = (Uuid::now_v7(), Uuid::now_v7());
    assert!(matches!(world.claim_with(first, &session, 1).await, Verdict::Run(spec) if spec.epoch == 1));
    assert!(matches!(world.claim_with(second, &session, 1).await, Verdict::Owned(_)));
    // The first runner falls silent: its turn has no owner any more, and is offered again.
    eventually("the turn is offered again", || async { owner(&world, &session).await.is_none() }).await;
    assert!(matches!(world.claim_with(second, &session, 1).await, Verdict::Run(spec) if spec.epoch == 2));
    assert!(world.heartbeat(first, false, Vec::new()).await.expired);
    let claim = ClaimTurnRequest {
        session_id: session,
        turn: 1,
        runner: "r".to_owned(),
        runner_lease: first.to_string(),
        ..ClaimTurnRequest::default()
    };
    let verdict = world.runner.call::<rpc::ClaimTurn>(&claim, SOON).await.unwrap().verdict.unwrap();
    assert!(matches!(verdict, Verdict::LeaseExpired(_)));
}

#[tokio::test]
async fn a_heartbeat_finds_turns_that_were_lost_and_turns_that_were_forgotten() {
    let world = World::start().await;
    let agent = world.agent().await;
    let (mine, others) = (world.create(&agent, 10).await.unwrap().session_id, world.create(&agent, 10).await.unwrap().session_id);
    world.run(&mine, 1).await;
    world.claim_with(Uuid::now_v7(), &others, 1).await;
    let held = |session: &String| HeldTurn { session_id: session.clone(), turn: 1, epoch: 1, ended: None };
    let reply = world.heartbeat(world.lease, false, vec![held(&mine), held(&others)]).await;
    assert_eq!(reply.lost, [held(&others)]);
    // The answer to its claim was lost: this runner does not know that it owns the turn.
    world.heartbeat(world.lease, false, Vec::new()).await;
    assert_eq!(owner(&world, &mine).await, Some(world.lease), "the answer may be on its way");
    execute(&world, "update scheduler.turn set claimed_at = now() - interval '1 minute'").await;
    world.heartbeat(world.lease, false, Vec::new()).await;
    assert_eq!(owner(&world, &mine).await, None);
}

/// An end that lies below what the projector has passed was lost with its stream.
#[tokio::test]
async fn a_turn_whose_end_was_lost_is_offered_again() {
    let world = World::start().await;
    let agent = world.agent().await;
    let session = world.create(&agent, 10).await.unwrap().session_id;
    world.run(&session, 1).await;
    let other = world.create(&agent, 10).await.unwrap().session_id;
    world.complete(&other, 1).await;
    let held = HeldTurn { session_id: session.clone(), turn: 1, epoch: 1, ended: Some(1) };
    assert_eq!(world.heartbeat(world.lease, false, vec![held.clone()]).await.lost, [held].map(|held| HeldTurn { ended: None, ..held }));
    assert_eq!(owner(&world, &session).await, None);
}

#[tokio::test]
async fn an_event_that_does_not_continue_the_log_is_not_persisted_and_its_turn_is_released() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    world.run(&session, 1).await;
    let log = subject::session_log(session.parse().unwrap(), Partition::FIRST);
    let event = |follows, text: &str| SessionEvent {
        turn: 1,
        epoch: 1,
        follows: Some(follows),
        checkpoint: None,
        kind: Some(Kind::Output(Output { stderr: false, data: text.to_owned().into() })),
        ..SessionEvent::default()
    };
    let first = world.runner.append(log.clone(), event(0, "one").encode_to_vec().into(), 0).await.unwrap();
    // Something is missing between the two.
    let broken = world.runner.append(log.clone(), event(first + 1, "three").encode_to_vec().into(), first).await.unwrap();
    world.get(&session, broken).await;
    let read = ReadEventsRequest { session_id: session.clone(), after: 0, limit: 10, max_bytes: 0, before: None, without_output: false };
    let events = world.gateway.call::<rpc::ReadEvents>(&read, SOON).await.unwrap().events;
    assert_eq!(events.iter().map(|event| event.event_id).collect::<Vec<_>>(), [first]);
    assert_eq!(owner(&world, &session).await, None, "the next claimant reads the output again");
    assert!(world.runner.last("EVENTS", &log).await.unwrap().is_none(), "and continues the persisted log");
    let again = world.runner.append(log, event(first, "two").encode_to_vec().into(), 0).await.unwrap();
    world.get(&session, again).await;
    assert_eq!(world.gateway.call::<rpc::ReadEvents>(&read, SOON).await.unwrap().events.len(), 2);
}

/// A store that lost its tail, or that was exchanged for another: the stream is recreated above every id that was used.
#[tokio::test]
async fn a_stream_that_is_not_the_one_that_was_published_to_is_recreated() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    world.complete(&session, 1).await;
    let scheduler = world.nats.connect(&access::SCHEDULER).await.unwrap();
    let begins_at = async || scheduler.extent(&contract::topology::EVENTS).await.map_or(0, |extent| extent.last_sequence + 1);
    for statement in [
        "update scheduler.stream_generation set high_watermark = high_watermark + 30",
        "update scheduler.stream_generation set created_at = created_at - interval '1 second'",
    ] {
        let before = begins_at().await;
        execute(&world, statement).await;
        eventually("the stream begins far above", || async { begins_at().await > before + 900_000 }).await;
        let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
        assert_eq!(world.complete(&session, 1).await.status, "completed", "and is projected");
    }
}

#[tokio::test]
async fn a_deadline_never_overrules_an_end_that_waits_to_be_projected() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    world.append(&session, 1, Kind::TurnStarted(TurnStarted::default())).await;
    eventually("it runs", || async { world.get(&session, 0).await.status == "running" }).await;
    // Nothing is projected while another replica seems to lead.
    execute(&world, "update scheduler.lease set epoch = epoch + 1, owner = gen_random_uuid(), expires_at = now() + interval '4 seconds' where name like 'projector%'").await;
    world.append(&session, 1, Kind::TurnEnded(TurnEnded { exit_code: Some(0), ..TurnEnded::default() })).await;
    execute(&world, "update scheduler.turn set deadline_at = now() - interval '1 minute'").await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(world.get(&session, 0).await.status, "running");
    eventually("the end is projected", || async { world.get(&session, 0).await.status != "running" }).await;
    let now = world.get(&session, 0).await;
    assert_eq!((now.status.as_str(), now.exit_code), ("completed", Some(0)));
}

/// As everything else does: two that lock in opposite orders are ended by Postgres, a termination or a whole batch.
#[tokio::test]
async fn the_projector_locks_a_session_before_its_turn() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    world.run(&session, 1).await;
    let id: Uuid = session.parse().unwrap();
    let (mut locker, mut watcher) = (world.database.admin().await.unwrap(), world.database.admin().await.unwrap());
    for kind in [Kind::TurnStarted(TurnStarted::default()), Kind::TurnEnded(TurnEnded { exit_code: Some(0), ..TurnEnded::default() })] {
        let mut tx = locker.begin().await.unwrap();
        sqlx::query("select from scheduler.session where session_id = $1 for update").bind(id).execute(&mut *tx).await.unwrap();
        let event = world.append(&session, 1, kind).await;
        let waits =
            "select exists (select from pg_stat_activity where wait_event_type = 'Lock' and application_name like 'scheduler projector%')";
        let mut is_waiting = false;
        for _ in 0..100 {
            is_waiting = sqlx::query_scalar(waits).fetch_one(&mut watcher).await.unwrap();
            if is_waiting {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(is_waiting, "the projector does not wait for the session");
        // It has not locked the turn: whoever has the session gets it.
        let turn = "select from scheduler.turn where session_id = $1 and turn_number = 1 for update nowait";
        sqlx::query(turn).bind(id).execute(&mut *tx).await.unwrap();
        tx.commit().await.unwrap();
        world.get(&session, event).await;
    }
    assert_eq!(world.get(&session, 0).await.status, "completed");
}

/// The deadline is the last resort of all turns: one that cannot be ended keeps none of the others.
#[tokio::test]
async fn a_turn_that_cannot_be_ended_holds_up_no_other_deadline() {
    let world = World::start().await;
    let agent = world.agent().await;
    let mut sessions = Vec::new();
    for _ in 0..3 {
        let session = world.create(&agent, 10).await.unwrap().session_id;
        world.run(&session, 1).await;
        let started = world.append(&session, 1, Kind::TurnStarted(TurnStarted::default())).await;
        assert_eq!(world.get(&session, started).await.status, "running");
        sessions.push(session);
    }
    // The newest event of the first, as a later release might write it.
    let log = subject::session_log(sessions[0].parse().unwrap(), Partition::FIRST);
    world.runner.publish(log, vec![0xff; 9].into(), "unreadable").await.unwrap();
    execute(&world, "update scheduler.turn set deadline_at = now() - interval '1 minute'").await;
    let first: Uuid = sessions[0].parse().unwrap();
    sqlx::query("update scheduler.turn set deadline_at = now() - interval '2 minutes' where session_id = $1")
        .bind(first)
        .execute(&mut world.database.admin().await.unwrap())
        .await
        .unwrap();
    for session in &sessions[1..] {
        eventually("the others end", || async { world.get(session, 0).await.status == "failed" }).await;
        let failure = world.get(session, 0).await.failure.unwrap();
        assert_eq!(failure.message, "Turn timed out after 60s");
    }
}

// --- inputs and permission requests ------------------------------------------------------------

impl World {
    /// A session of a runtime, its first turn running; the claim's epoch.
    async fn running(&self, runtime: &str, permissions: &str) -> (String, TurnSpec) {
        let request = CreateAgentRequest {
            user_id: self.user.to_string(),
            name: "a".to_owned(),
            system: "be brief".to_owned(),
            model: if runtime == "gemini" { "google/g" } else { "anthropic/c" }.to_owned(),
            runtime: runtime.to_owned(),
            metadata: "{}".to_owned(),
            skills: "[]".to_owned(),
            mcp_servers: "[]".to_owned(),
            permissions: permissions.to_owned(),
            ..CreateAgentRequest::default()
        };
        let agent = self.gateway.call::<rpc::CreateAgent>(&request, SOON).await.unwrap().agent.unwrap().agent_id;
        let request = CreateSessionRequest {
            user_id: self.user.to_string(),
            agent_id: agent,
            prompt: "first".to_owned(),
            timeout_seconds: 60,
            credential_kinds: vec!["backend:sprites".to_owned(), "provider:anthropic".to_owned(), "provider:google".to_owned()],
            session_limit: 100,
            metadata: "{}".to_owned(),
            resources: "[]".to_owned(),
            ..CreateSessionRequest::default()
        };
        let session = self.gateway.call::<rpc::CreateSession>(&request, SOON).await.unwrap().session.unwrap().session_id;
        let spec = self.begin(&session, 1).await;
        (session, spec)
    }

    async fn begin(&self, session: &str, turn: u32) -> TurnSpec {
        let spec = self.run(session, turn).await;
        let started = self.append(session, turn, Kind::TurnStarted(TurnStarted::default())).await;
        self.get(session, started).await;
        spec
    }

    async fn prompt(&self, session: &str, prompt: &str, when_busy: &str) -> Result<Session, Failure> {
        let request = PromptRequest {
            user_id: self.user.to_string(),
            session_id: session.to_owned(),
            prompt: prompt.to_owned(),
            timeout_seconds: 60,
            when_busy: when_busy.to_owned(),
            key_id: KEY.to_owned(),
            ..PromptRequest::default()
        };
        Ok(self.gateway.call::<rpc::Prompt>(&request, SOON).await?.session.unwrap())
    }

    async fn fetch(&self, session: &str, turn: u32, epoch: u32) -> Vec<host::Input> {
        let request = FetchInputsRequest { session_id: session.to_owned(), turn, epoch };
        self.runner.call::<rpc::FetchInputs>(&request, SOON).await.unwrap().inputs
    }

    /// Inputs by their texts, and what became of them, oldest first.
    async fn inputs(&self, session: &str) -> Vec<(String, String, String)> {
        let request = ListPartsRequest { user_id: self.user.to_string(), id: session.to_owned(), limit: 100, after: None };
        let inputs = self.gateway.call::<rpc::ListInputs>(&request, SOON).await.unwrap().inputs;
        let describe = |input: scheduler_messages::Input| {
            assert!(input.key_id == KEY || input.key_id.is_empty(), "{input:?}");
            (if input.text.is_empty() { input.kind } else { input.text }, input.status, input.message)
        };
        inputs.into_iter().rev().map(describe).collect()
    }

    async fn requests(&self, session: &str) -> Vec<PermissionRequest> {
        let request = ListPermissionRequestsRequest {
            user_id: self.user.to_string(),
            session_id: session.to_owned(),
            limit: 100,
            ..ListPermissionRequestsRequest::default()
        };
        self.gateway.call::<rpc::ListPermissionRequests>(&request, SOON).await.unwrap().requests
    }

    async fn decide(&self, session: &str, request_id: u64, verdict: &str, message: &str) -> Result<PermissionRequest, Failure> {
        let request = DecideRequest {
            user_id: self.user.to_string(),
            session_id: session.to_owned(),
            request_id,
            verdict: verdict.to_owned(),
            message: message.to_owned(),
            key_id: KEY.to_owned(),
        };
        self.gateway.call::<rpc::Decide>(&request, SOON).await
    }

    async fn ended(&self, session: &str, turn: u32, code: i32, stop_reason: StopReason) -> Session {
        let ended = TurnEnded { exit_code: Some(code), stop_reason: stop_reason.into(), ..TurnEnded::default() };
        let end = self.append(session, turn, Kind::TurnEnded(ended)).await;
        self.get(session, end).await
    }

    async fn settled(&self, session: &str, turn: u32, input: &str, outcome: Outcome, message: &str) {
        let settled = host::InputSettled { id: input.to_owned(), outcome: outcome.into(), message: message.to_owned() };
        let event = InputSettled { settled: Some(settled), ..InputSettled::default() };
        let id = self.append(session, turn, Kind::InputSettled(event)).await;
        self.get(session, id).await;
    }

    /// The agent asks; the id of its tool use is 1000 and the journal's id of the request.
    async fn asks(&self, session: &str, turn: u32, journal_id: u64) -> u64 {
        let request = host::DecisionRequested {
            id: journal_id,
            tool: "Bash".to_owned(),
            input_json: r#"{"command":"rm x"}"#.to_owned(),
            ..host::DecisionRequested::default()
        };
        let tool_use = 1000 + journal_id;
        let id = self.append(session, turn, Kind::DecisionRequested(DecisionRequested { request: Some(request), tool_use })).await;
        self.get(session, id).await;
        tool_use
    }

    async fn answered(&self, session: &str, turn: u32, journal_id: u64, how: How, input: &str) {
        let settled = host::DecisionSettled { id: journal_id, how: how.into(), input_id: input.to_owned() };
        let event = DecisionSettled { settled: Some(settled), tool_use: 1000 + journal_id, ..DecisionSettled::default() };
        let id = self.append(session, turn, Kind::DecisionSettled(event)).await;
        self.get(session, id).await;
    }
}

const KEY: &str = "0190a0b0-0000-7000-8000-000000000001";

fn row(text: &str, status: &str, reason: &str) -> (String, String, String) {
    (text.to_owned(), status.to_owned(), reason.to_owned())
}

#[tokio::test]
async fn queued_messages_begin_the_next_turns_in_order_and_can_be_changed_until_then() {
    let world = World::start().await;
    let (session, spec) = world.running("claude", "").await;
    assert_eq!(spec.system, "be brief");
    let refused = world.prompt(&session, "no", "").await.unwrap_err();
    assert_eq!((refused.code, refused.message.as_str()), (ErrorCode::Conflict, "Session is already running"));
    let mut ids = Vec::new();
    for text in ["second", "third", "fourth"] {
        let accepted = world.prompt(&session, text, "queue").await.unwrap();
        assert_eq!((accepted.status.as_str(), accepted.turn_count), ("running", 1));
        ids.push(accepted.input.unwrap().input_id);
    }
    assert_eq!(world.get(&session, 0).await.queued_inputs, Some(3));
    assert!(world.fetch(&session, 1, spec.epoch).await.is_empty(), "a queued message waits in the scheduler");

    let (user_id, session_id) = (world.user.to_string(), session.clone());
    let change = ChangeInputRequest { user_id, session_id, input_id: ids[0].clone(), text: "second, changed".to_owned() };
    world.gateway.call::<rpc::ChangeInput>(&change, SOON).await.unwrap();
    let (user_id, session_id) = (world.user.to_string(), session.clone());
    let withdraw = WithdrawInputRequest { user_id, session_id, input_id: ids[1].clone() };
    assert_eq!(world.gateway.call::<rpc::WithdrawInput>(&withdraw, SOON).await.unwrap().status, "withdrawn");
    let again = world.gateway.call::<rpc::WithdrawInput>(&withdraw, SOON).await.unwrap_err();
    assert_eq!((again.code, again.message.as_str()), (ErrorCode::Conflict, "Input is not queued any more"));

    let after = world.ended(&session, 1, 0, StopReason::EndTurn).await;
    assert_eq!((after.status.as_str(), after.turn_count), ("pending", 2), "the next turn begins in the transaction of the end");
    let spec = world.begin(&session, 2).await;
    assert_eq!((spec.prompt.as_str(), spec.input_id.as_str(), spec.system.as_str()), ("second, changed", ids[0].as_str(), "be brief"));
    let refused = world.gateway.call::<rpc::ChangeInput>(&change, SOON).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Conflict);

    // A turn that fails refuses the queued messages.
    assert_eq!(world.ended(&session, 2, 1, StopReason::Unspecified).await.status, "failed");
    let expected = [row("second, changed", "applied", ""), row("third", "withdrawn", ""), row("fourth", "refused", "the session failed")];
    assert_eq!(world.inputs(&session).await, expected);
    assert_eq!(world.prompt(&session, "no", "queue").await.unwrap_err().code, ErrorCode::Conflict);
    world.counts_are_right().await;
}

#[tokio::test]
async fn an_interrupt_reaches_the_turns_owner_alone_until_the_log_settles_it() {
    let world = World::start().await;
    let (session, spec) = world.running("shell", "").await;
    let interrupt = InterruptRequest { user_id: world.user.to_string(), session_id: session.clone(), key_id: KEY.to_owned() };
    let input = world.gateway.call::<rpc::Interrupt>(&interrupt, SOON).await.unwrap();
    let again = world.gateway.call::<rpc::Interrupt>(&interrupt, SOON).await.unwrap();
    assert_eq!(input.input_id, again.input_id, "one interrupt at a time");

    let held = HeldTurn { session_id: session.clone(), turn: 1, epoch: spec.epoch, ended: None };
    assert_eq!(world.heartbeat(world.lease, false, vec![held.clone()]).await.with_inputs, [held]);
    assert!(world.fetch(&session, 1, spec.epoch + 1).await.is_empty() && world.fetch(&session, 2, spec.epoch).await.is_empty());
    for _ in 0..2 {
        let fetched = world.fetch(&session, 1, spec.epoch).await;
        assert_eq!(
            fetched,
            [host::Input { id: input.input_id.clone(), kind: Some(host::input::Kind::Interrupt(host::Interrupt { turn: 1 })) }]
        );
    }
    assert_eq!(world.inputs(&session).await, [row("interrupt", "delivered", "")]);
    assert_eq!(world.ended(&session, 1, 0, StopReason::Interrupted).await.status, "completed");
    assert_eq!(world.inputs(&session).await, [row("interrupt", "applied", "")]);
    let refused = world.gateway.call::<rpc::Interrupt>(&interrupt, SOON).await.unwrap_err();
    assert_eq!((refused.code, refused.message.as_str()), (ErrorCode::Conflict, "No turn is running"));

    // One that comes too late, together with a message that waits for the end.
    world.prompt(&session, "next", "").await.unwrap();
    world.begin(&session, 2).await;
    world.prompt(&session, "after", "interrupt").await.unwrap();
    let after = world.ended(&session, 2, 0, StopReason::EndTurn).await;
    assert_eq!((after.status.as_str(), after.turn_count), ("pending", 3));
    let inputs = world.inputs(&session).await;
    assert_eq!(inputs[1..], [row("after", "delivered", ""), row("interrupt", "refused", "the turn had ended")]);
}

#[tokio::test]
async fn a_reader_finds_its_place_after_whatever_was_sent() {
    let world = World::start().await;
    let (session, _) = world.running("shell", "").await;
    let find = async |input_id: &str| {
        let (user_id, session_id, input_id) = (world.user.to_string(), session.clone(), input_id.to_owned());
        let found = world.gateway.call::<rpc::FindTurn>(&FindTurnRequest { user_id, session_id, before: 0, input_id }, SOON).await?;
        Ok::<_, Failure>((found.turn, found.after, found.is_within))
    };
    let mut queued = Vec::new();
    for _ in 0..3 {
        queued.push(world.prompt(&session, &"x".repeat(2_000_000), "queue").await.unwrap().input.unwrap().input_id);
    }
    let interrupt = InterruptRequest { user_id: world.user.to_string(), session_id: session.clone(), key_id: KEY.to_owned() };
    let late = world.gateway.call::<rpc::Interrupt>(&interrupt, SOON).await.unwrap().input_id;

    // No reader waits for those who write, and a queue of many bytes is read in pages.
    let mut writer = world.database.admin().await.unwrap();
    let mut tx = writer.begin().await.unwrap();
    sqlx::query("select from scheduler.input for update").execute(&mut *tx).await.unwrap();
    let (mut open, mut after, mut pages) = (Vec::new(), None, 0);
    loop {
        let list = ListPartsRequest { user_id: world.user.to_string(), id: session.clone(), limit: 100, after };
        let page = world.gateway.call::<rpc::ListOpenInputs>(&list, SOON).await.unwrap();
        open.extend(page.inputs.iter().map(|input| input.input_id.clone()));
        after = page.inputs.last().map(|last| Cursor { position: last.created_at_us, id: last.input_id.clone() });
        pages += 1;
        if !page.has_more {
            break;
        }
    }
    assert_eq!((&open[..3], open.get(3), pages > 1), (&queued[..], Some(&late), true));
    let (turn, newest, is_within) = find(&queued[0]).await.unwrap();
    assert_eq!((turn, is_within), (1, false), "what is queued follows all that is in the log");
    tx.rollback().await.unwrap();

    let ended = TurnEnded { exit_code: Some(0), stop_reason: StopReason::EndTurn.into(), ..TurnEnded::default() };
    let end = world.append(&session, 1, Kind::TurnEnded(ended)).await;
    world.get(&session, end).await;
    assert!(newest < end);
    assert_eq!(find(&late).await.unwrap(), (1, end, true), "the turn's end refused it, and nothing shows it");
    assert_eq!(find(&queued[2]).await.unwrap(), (2, end, false));
    world.run(&session, 2).await;
    let started = world.append(&session, 2, Kind::TurnStarted(TurnStarted::default())).await;
    world.get(&session, started).await;
    assert_eq!(find(&queued[0]).await.unwrap(), (2, started, true));
    let (user_id, session_id, input_id) = (world.user.to_string(), session.clone(), queued[1].clone());
    world.gateway.call::<rpc::WithdrawInput>(&WithdrawInputRequest { user_id, session_id, input_id }, SOON).await.unwrap();
    assert_eq!(find(&queued[1]).await.unwrap(), (1, newest, false), "where it was when it was sent");
    assert_eq!(find(KEY).await.unwrap_err().code, ErrorCode::NotFound);
}

#[tokio::test]
async fn a_message_that_cannot_join_its_turn_begins_the_next_one() {
    let world = World::start().await;
    let (session, _) = world.running("gemini", "").await;
    let refused = world.prompt(&session, "no", "steer").await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Unprocessable);
    assert!(refused.message.contains("gemini"), "{refused:?}");

    let (session, spec) = world.running("claude", "").await;
    world.prompt(&session, "joins", "steer").await.unwrap();
    world.prompt(&session, "too late", "steer").await.unwrap();
    let fetched = world.fetch(&session, 1, spec.epoch).await;
    let joins =
        |input: &host::Input| matches!(&input.kind, Some(host::input::Kind::Message(message)) if message.when_busy() == WhenBusy::Join);
    assert!(fetched.len() == 2 && fetched.iter().all(joins), "{fetched:?}");
    world.settled(&session, 1, &fetched[0].id, Outcome::Applied, "").await;
    // Twice: a runner that took over wrote it again.
    world.settled(&session, 1, &fetched[0].id, Outcome::Refused, "late").await;
    world.settled(&session, 1, &fetched[1].id, Outcome::Refused, "no running turn takes a message").await;
    assert_eq!(world.inputs(&session).await, [row("joins", "applied", ""), row("too late", "queued", "")]);
    world.ended(&session, 1, 0, StopReason::EndTurn).await;
    let spec = world.begin(&session, 2).await;
    assert_eq!((spec.prompt.as_str(), spec.input_id.as_str()), ("too late", ""), "a host knows that id already");
    assert_eq!(world.inputs(&session).await, [row("joins", "applied", ""), row("too late", "applied", "")]);
}

#[tokio::test]
async fn a_request_is_answered_once_and_its_turn_waits_without_a_deadline() {
    let world = World::start().await;
    let (session, spec) = world.running("claude", r#"{"default":"ask"}"#).await;
    assert_eq!(spec.permissions, r#"{"rules":[],"default":"ask"}"#);
    let request = world.asks(&session, 1, 7).await;
    assert_eq!(world.get(&session, 0).await.waiting_on.unwrap(), format!("a decision on Bash (request {request})"));

    // Far beyond its deadline, the turn waits on.
    execute(
        &world,
        "update scheduler.turn set deadline_at = deadline_at - interval '1 hour', waiting_since = waiting_since - interval '1 hour'",
    )
    .await;
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(world.get(&session, 0).await.status, "running");

    assert_eq!(world.decide(&session, request + 1, "allow", "").await.unwrap_err().code, ErrorCode::NotFound);
    let answers = join_all((0..5).map(|_| world.decide(&session, request, "deny", "not that"))).await;
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 1);
    let refused = answers.into_iter().find_map(Result::err).unwrap();
    assert_eq!((refused.code, refused.message.as_str()), (ErrorCode::Conflict, "Request has been answered already"));
    assert!(world.fetch(&session, 1, spec.epoch).await.is_empty(), "its owner's lease has expired");
    let epoch = world.run(&session, 1).await.epoch;
    let fetched = world.fetch(&session, 1, epoch).await;
    let decision = host::Decision { request: 7, verdict: host::decision::Verdict::Deny.into(), message: "not that".to_owned() };
    assert_eq!(fetched[0].kind, Some(host::input::Kind::Decision(decision)));

    world.answered(&session, 1, 7, How::Denied, &fetched[0].id).await;
    world.settled(&session, 1, &fetched[0].id, Outcome::Applied, "").await;
    let requests = world.requests(&session).await;
    let answer = requests[0].answer.clone().unwrap();
    assert_eq!((requests[0].status.as_str(), answer.status.as_str(), answer.key_id.as_str()), ("denied", "applied", KEY));
    let left: f64 = sqlx::query_scalar("select extract(epoch from deadline_at - now())::float8 from scheduler.turn")
        .fetch_one(&mut world.database.admin().await.unwrap())
        .await
        .unwrap();
    assert!((60.0..=121.0).contains(&left), "the time that it waited is not its own: {left} s are left");
    assert_eq!(world.ended(&session, 1, 0, StopReason::EndTurn).await.status, "completed");
}

#[tokio::test]
async fn an_answer_that_a_lost_agent_missed_is_sent_again_when_it_asks_again() {
    let world = World::start().await;
    let (session, spec) = world.running("claude", r#"{"default":"ask"}"#).await;
    let request = world.asks(&session, 1, 7).await;
    world.decide(&session, request, "allow", "").await.unwrap();
    world.answered(&session, 1, 7, How::Void, "").await;
    assert_eq!(world.inputs(&session).await, [row("decision", "refused", "the agent does not ask any more")]);
    world.asks(&session, 1, 9).await;
    let fetched = world.fetch(&session, 1, spec.epoch).await;
    let Some(host::input::Kind::Decision(decision)) = &fetched[0].kind else { unreachable!("{fetched:?}") };
    assert_eq!((decision.request, decision.verdict()), (9, host::decision::Verdict::Allow));
    world.answered(&session, 1, 9, How::Allowed, &fetched[0].id).await;
    world.settled(&session, 1, &fetched[0].id, Outcome::Applied, "").await;
    // The same once more is another question.
    let request = world.asks(&session, 1, 11).await;
    assert!(world.fetch(&session, 1, spec.epoch).await.is_empty());
    world.ended(&session, 1, 0, StopReason::Interrupted).await;
    assert_eq!(world.requests(&session).await[0].status, "void");
    assert_eq!(world.decide(&session, request, "allow", "").await.unwrap_err().message, "Request is not open any more");
}

#[tokio::test]
async fn an_agent_may_say_how_a_request_is_decided_that_no_one_answers() {
    let world = World::start().await;
    let (session, spec) = world.running("claude", r#"{"default":"ask","timeout_seconds":1,"on_timeout":"allow"}"#).await;
    world.asks(&session, 1, 7).await;
    eventually("the request is decided", || async { !world.fetch(&session, 1, spec.epoch).await.is_empty() }).await;
    let fetched = world.fetch(&session, 1, spec.epoch).await;
    let Some(host::input::Kind::Decision(decision)) = &fetched[0].kind else { unreachable!("{fetched:?}") };
    assert_eq!(decision.verdict(), host::decision::Verdict::Allow);
    assert_eq!(world.requests(&session).await[0].answer.as_ref().unwrap().key_id, "", "no one answered");
}

#[tokio::test]
async fn a_runtime_that_cannot_ask_takes_no_permissions() {
    let world = World::start().await;
    let request = CreateAgentRequest {
        user_id: world.user.to_string(),
        model: "none".to_owned(),
        runtime: "shell".to_owned(),
        metadata: "{}".to_owned(),
        skills: "[]".to_owned(),
        mcp_servers: "[]".to_owned(),
        permissions: r#"{"rules":[{"tool":"Bash","evaluation":"deny"}]}"#.to_owned(),
        ..CreateAgentRequest::default()
    };
    let refused = world.gateway.call::<rpc::CreateAgent>(&request, SOON).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Unprocessable);
    assert!(refused.message.contains("shell"), "{refused:?}");
}

/// Between any two steps of a gateway: a row without bytes, bytes with a row that was never finished, bytes that no row knows.
#[tokio::test]
async fn what_a_killed_process_left_of_a_file_is_removed() {
    let world = World::start().await;
    let directory = tempfile::tempdir().unwrap();
    let store = files::Files::open(&format!("file://{}", directory.path().display())).unwrap();
    let chunk = || futures::stream::iter([Ok::<_, ()>(bytes::Bytes::from_static(b"bytes"))]);
    let request = |id: &str| scheduler_messages::GetFileRequest { user_id: world.user.to_string(), file_id: id.to_owned() };
    let mut ids = Vec::new();
    for _ in 0..4 {
        let create = scheduler_messages::CreateFileRequest {
            user_id: world.user.to_string(),
            file_id: types::FileId::new().to_string(),
            filename: "f".to_owned(),
            mime_type: "text/plain".to_owned(),
        };
        ids.push(world.gateway.call::<rpc::CreateFile>(&create, SOON).await.unwrap().file_id);
    }
    let [whole, deleted, unfinished, without_bytes] = [&ids[0], &ids[1], &ids[2], &ids[3]];
    for id in [whole, deleted, unfinished] {
        store.write(id.parse().unwrap(), 100, chunk()).await.unwrap();
    }
    for id in [whole, deleted] {
        let commit = scheduler_messages::CommitFileRequest {
            user_id: world.user.to_string(),
            file_id: id.clone(),
            size_bytes: 5,
            sha256: vec![1; 32],
            expires_in_seconds: None,
        };
        for _ in 0..2 {
            world.gateway.call::<rpc::CommitFile>(&commit, SOON).await.unwrap();
        }
    }
    world.gateway.call::<rpc::DeleteFile>(&request(deleted), SOON).await.unwrap();
    // A row is pending for an hour, and bytes without a row are looked for after two.
    let mut connection = world.database.admin().await.unwrap();
    for id in [unfinished, without_bytes] {
        let age = sqlx::query("update scheduler.file set state_since = now() - interval '2 hours' where file_id = $1::uuid").bind(id);
        age.execute(&mut connection).await.unwrap();
    }
    let lost = Uuid::now_v7();
    store.write(lost, 100, chunk()).await.unwrap();
    let name = lost.simple().to_string();
    let path = directory.path().join("objects").join(&name[name.len() - 2..]).join(&name);
    let three_hours_ago = std::time::SystemTime::now() - Duration::from_secs(3 * 60 * 60);
    std::fs::File::options().write(true).open(path).unwrap().set_modified(three_hours_ago).unwrap();

    world.run_scheduler_with(&Lifecycle::new(), Some(store.clone())).await;
    eventually("one object and one row are left", || async {
        use futures::TryStreamExt as _;
        let objects: Vec<Uuid> = store.older_than(Duration::ZERO, 10).try_concat().await.unwrap();
        let mut connection = world.database.admin().await.unwrap();
        let rows: Vec<Uuid> = sqlx::query_scalar("select file_id from scheduler.file").fetch_all(&mut connection).await.unwrap();
        objects == [whole.parse::<Uuid>().unwrap()] && rows == objects
    })
    .await;
    assert!(world.gateway.call::<rpc::GetFile>(&request(whole), SOON).await.is_ok());
    assert_eq!(world.gateway.call::<rpc::GetFile>(&request(unfinished), SOON).await.unwrap_err().code, ErrorCode::NotFound);
}
