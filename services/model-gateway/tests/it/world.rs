//! The model gateway as processes, beside real Postgres, NATS, scheduler, vault and auth; the
//! provider counts what it is sent.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::post,
};
use bus::{Bus, vault::AcceptedKeys};
use contract::{
    access,
    auth::CreateUserRequest,
    common::Empty,
    rpc,
    scheduler::{
        BudgetChange, ClaimTurnRequest, CreateAgentRequest, CreateSessionRequest, GetBudgetRequest,
        HeartbeatRequest, LimitChange, SetBudgetRequest, claim_turn_reply::Verdict,
    },
    vault::PutCredentialRequest,
};
use futures::{StreamExt as _, stream};
use sealing::KeyPair;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use testkit::{Database, Nats, services::Service};
use tokio::{net::TcpListener, task::JoinSet};
use types::Partition;
use uuid::Uuid;

pub const SOON: Duration = Duration::from_secs(20);
pub const LONG: Duration = Duration::from_secs(90);
pub const KEY: &str = "the-users-own-key";
const ANTHROPIC: &str = "provider:anthropic";

pub async fn eventually<F: Future<Output = bool>>(what: &str, condition: impl Fn() -> F) {
    let begun = Instant::now();
    while !condition().await {
        assert!(begun.elapsed() < LONG, "{what}: not within {LONG:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// What the provider does next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mood {
    #[default]
    Answers,
    /// Refuses with this status, once.
    RefusesOnce(u16),
    /// Refuses with this status.
    Refuses(u16),
    /// Begins a response and leaves it at that.
    Hangs,
    /// Answers without a pause, with a text of so many bytes.
    Streams(usize),
}

/// Answers with a number of tokens that no other response has.
#[derive(Default)]
pub struct Provider {
    pub mood: Mutex<Mood>,
    pub requests: AtomicU64,
    /// Tokens of all responses that were begun.
    pub spent: AtomicU64,
    /// Of each request: who sent it, and what was spent before.
    pub seen: Mutex<Vec<(String, u64)>>,
}

impl Provider {
    pub fn is(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    pub fn mood(&self) -> Mood {
        let mut mood = self.mood.lock().unwrap();
        let now = *mood;
        if matches!(now, Mood::RefusesOnce(_)) {
            *mood = Mood::Answers;
        }
        now
    }

    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::SeqCst)
    }
}

async fn answer(
    State(provider): State<Arc<Provider>>,
    request: axum::http::Request<Body>,
) -> Response {
    assert_eq!(request.headers()["x-api-key"], KEY);
    let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
    let body: Value = serde_json::from_slice(&body).unwrap();
    let tokens = provider.requests.fetch_add(1, Ordering::SeqCst) + 1;
    let mood = provider.mood();
    if let Mood::Refuses(status) | Mood::RefusesOnce(status) = mood {
        let error = json!({ "type": "error", "error": { "type": "an_error", "message": "so says the provider" } });
        return (StatusCode::from_u16(status).unwrap(), [(header::RETRY_AFTER, "0")], Json(error))
            .into_response();
    }
    let before = provider.spent.fetch_add(tokens, Ordering::SeqCst);
    provider
        .seen
        .lock()
        .unwrap()
        .push((body["metadata"]["user_id"].as_str().unwrap().to_owned(), before));
    if let Mood::Streams(bytes) = mood {
        return streamed(tokens, bytes);
    }
    let start = json!({ "type": "message_start", "message": { "model": "m", "usage": { "input_tokens": 0, "output_tokens": 0 } } });
    let delta = json!({ "type": "message_delta", "usage": { "output_tokens": tokens } });
    let events = [start, delta, json!({ "type": "message_stop" })];
    let events =
        stream::iter(events.map(|event| Bytes::from(format!("event: x\ndata: {event}\n\n"))));
    let events = events.enumerate().then(move |(index, event)| async move {
        match mood {
            Mood::Hangs if index > 0 => std::future::pending().await,
            _ => tokio::time::sleep(Duration::from_millis(30 * index as u64)).await,
        }
        Ok::<_, std::io::Error>(event)
    });
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(events)).into_response()
}

/// As providers stream it: events of some hundred bytes, several in each packet.
fn streamed(tokens: u64, bytes: usize) -> Response {
    const TEXT: usize = 200;
    const AT_ONCE: usize = 80;
    let event = |event: &Value| format!("event: x\ndata: {event}\n\n");
    let text = event(
        &json!({ "type": "content_block_delta", "index": 0, "delta": { "type": "text_delta", "text": "x".repeat(TEXT) } }),
    );
    let chunk = Bytes::from(text.repeat(AT_ONCE.min(bytes.div_ceil(TEXT))));
    let start = event(
        &json!({ "type": "message_start", "message": { "model": "m", "usage": { "input_tokens": 1, "output_tokens": 0 } } }),
    );
    let end = event(&json!({ "type": "message_delta", "usage": { "output_tokens": tokens } }))
        + &event(&json!({ "type": "message_stop" }));
    let chunks = std::iter::repeat_n(chunk.clone(), bytes.div_ceil(chunk.len()));
    let all = std::iter::once(Bytes::from(start)).chain(chunks).chain([Bytes::from(end)]);
    (
        [(header::CONTENT_TYPE, "text/event-stream")],
        Body::from_stream(stream::iter(all.map(Ok::<_, std::io::Error>))),
    )
        .into_response()
}

pub fn body(token: &str) -> String {
    json!({ "model": "claude-x", "max_tokens": 500, "stream": true, "messages": [], "metadata": { "user_id": token } }).to_string()
}

pub struct World {
    pub nats: Nats,
    pub database: Database,
    pub provider: Arc<Provider>,
    pub upstream: String,
    pub gateway: Bus,
    pub operator: Bus,
    pub runner: Bus,
    pub user: String,
    pub agent: String,
    pub http: reqwest::Client,
    _services: Vec<Service>,
    _server: JoinSet<std::io::Result<()>>,
}

impl World {
    pub async fn start() -> Self {
        let (nats, database) = (Nats::start().unwrap(), Database::create().await.unwrap());
        nats.create_streams([Partition::FIRST]).await.unwrap();
        let provider = Arc::new(Provider::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new()
            .route("/v1/messages", post(answer))
            .route("/v1/messages/count_tokens", post(answer))
            .with_state(provider.clone());
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, router).await });
        let started = |name: &str, user: &str, schema: &str, more: (&str, &str)| {
            let (url, password, store) = (nats.url(), nats.password(user), database.url(schema));
            let settings = [
                ("NATS_URL", &*url),
                ("NATS_PASSWORD", &*password),
                ("DATABASE_URL", &*store),
                more,
            ];
            testkit::services::start(name, &settings).unwrap()
        };
        let services = vec![
            started("auth", access::AUTH.user, "auth", ("LOG_LEVEL", "info")),
            started(
                "credential-vault",
                access::VAULT.user,
                "vault",
                ("FIELD_ENCRYPTION_KEY", "0123456789abcdef"),
            ),
            started(
                "scheduler",
                access::SCHEDULER.user,
                "scheduler",
                ("AOD_DEPLOYMENT_ID", "deployment-of-tests"),
            ),
        ];
        let gateway = nats.connect(&access::GATEWAY).await.unwrap();
        let operator = nats.connect(&access::OPERATOR).await.unwrap();
        eventually("the services answer", || async {
            gateway.call::<rpc::AuthHealth>(&Empty {}, SOON).await.is_ok()
                && gateway.call::<rpc::VaultHealth>(&Empty {}, SOON).await.is_ok()
                && gateway.call::<rpc::SchedulerHealth>(&Empty {}, SOON).await.is_ok()
        })
        .await;
        let user = operator
            .call::<rpc::CreateUser>(&CreateUserRequest { name: "u".to_owned() }, SOON)
            .await
            .unwrap()
            .user_id;
        for (kind, value) in [(ANTHROPIC, KEY), ("backend:sprites", "s")] {
            let sealed = gateway
                .seal_for_vault(&AcceptedKeys::default(), &user, kind, value.as_bytes(), SOON)
                .await
                .unwrap();
            let put = PutCredentialRequest {
                user_id: user.clone(),
                kind: kind.to_owned(),
                sealed: Some(sealed),
                ..PutCredentialRequest::default()
            };
            gateway.call::<rpc::PutCredential>(&put, SOON).await.unwrap();
        }
        let agent = CreateAgentRequest {
            user_id: user.clone(),
            name: "a".to_owned(),
            model: "anthropic/claude-x".to_owned(),
            runtime: "claude".to_owned(),
            metadata: "{}".to_owned(),
            skills: "[]".to_owned(),
            mcp_servers: "[]".to_owned(),
            ..CreateAgentRequest::default()
        };
        let agent =
            gateway.call::<rpc::CreateAgent>(&agent, SOON).await.unwrap().agent.unwrap().agent_id;
        let runner = nats.connect(&access::RUNNER).await.unwrap();
        let http = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0).build().unwrap();
        Self {
            nats,
            database,
            provider,
            upstream,
            gateway,
            operator,
            runner,
            user,
            agent,
            http,
            _services: services,
            _server: server,
        }
    }

    /// A process of the gateway, and its address.
    pub async fn model_gateway(&self) -> (Service, String) {
        let address =
            std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let (url, password) = (self.nats.url(), self.nats.password(access::MODEL_GATEWAY.user));
        let settings = [
            ("NATS_URL", &*url),
            ("NATS_PASSWORD", &*password),
            ("AOD_MODEL_GATEWAY_ADDR", &*address),
            ("AOD_MODEL_BASE_URL_ANTHROPIC", &*self.upstream),
        ];
        let process = testkit::services::start("model-gateway", &settings).unwrap();
        eventually("the gateway listens", || async {
            tokio::net::TcpStream::connect(&address).await.is_ok()
        })
        .await;
        (process, format!("http://{address}/anthropic/v1/messages"))
    }

    /// A token of a session whose turn was claimed.
    pub async fn token(&self) -> String {
        let request = CreateSessionRequest {
            user_id: self.user.clone(),
            agent_id: self.agent.clone(),
            prompt: "p".to_owned(),
            timeout_seconds: 600,
            credential_kinds: vec![ANTHROPIC.to_owned(), "backend:sprites".to_owned()],
            session_limit: 1000,
            metadata: "{}".to_owned(),
            resources: "[]".to_owned(),
            ..CreateSessionRequest::default()
        };
        let session = self
            .gateway
            .call::<rpc::CreateSession>(&request, SOON)
            .await
            .unwrap()
            .session
            .unwrap()
            .session_id;
        let (lease, token) = (Uuid::now_v7().to_string(), Uuid::new_v4().to_string());
        let beat = HeartbeatRequest {
            runner_lease: lease.clone(),
            runner: "r".to_owned(),
            first: true,
            held: Vec::new(),
        };
        self.runner.call::<rpc::Heartbeat>(&beat, SOON).await.unwrap();
        let claim = ClaimTurnRequest {
            session_id: session,
            turn: 1,
            runner: "r".to_owned(),
            runner_lease: lease,
            public_key: KeyPair::generate().unwrap().public().to_vec(),
            model_token_hash: Sha256::digest(token.as_bytes()).to_vec(),
            routing: None,
        };
        let claimed = self.runner.call::<rpc::ClaimTurn>(&claim, SOON).await.unwrap().verdict;
        assert!(matches!(claimed, Some(Verdict::Run(_))), "{claimed:?}");
        token
    }

    /// What a CLI sends: its estimate is above what the provider answers with.
    pub fn ask(&self, url: &str, token: &str) -> reqwest::RequestBuilder {
        self.http.post(url).header("x-api-key", token).timeout(LONG).body(body(token))
    }

    /// What was answered, or that the connection broke.
    pub async fn send(&self, url: &str, token: &str) -> Result<(u16, String), reqwest::Error> {
        let response = self.ask(url, token).send().await?;
        Ok((response.status().as_u16(), response.text().await?))
    }

    pub fn budget(&self) -> GetBudgetRequest {
        GetBudgetRequest { scope: "user".to_owned(), scope_id: self.user.clone(), user_id: None }
    }

    pub async fn limit(&self, tokens: u64) {
        let change = BudgetChange {
            tokens: Some(LimitChange { max: Some(tokens) }),
            ..BudgetChange::default()
        };
        let request = SetBudgetRequest { of: Some(self.budget()), change: Some(change) };
        self.operator.call::<rpc::SetBudget>(&request, SOON).await.unwrap();
    }

    pub async fn numbers(&self, query: &'static str) -> Vec<i64> {
        sqlx::query_scalar(query)
            .fetch_all(&mut self.database.admin().await.unwrap())
            .await
            .unwrap()
    }

    /// The leases of gateways that are gone ran out long ago. Those alive renew theirs every five
    /// seconds.
    pub async fn forward_lost_gateways(&self) {
        let statements = "update scheduler.model_gateway set expires_at = now() - interval '1 hour'
                          where expires_at < now() + interval '15 seconds';
                          update scheduler.model_request r set started_at = now() - interval '1 hour'
                          from scheduler.model_gateway g
                          where r.gateway_id = g.gateway_id and r.status = 'open' and g.expires_at < now()";
        sqlx::raw_sql(statements).execute(&mut self.database.admin().await.unwrap()).await.unwrap();
    }
}
