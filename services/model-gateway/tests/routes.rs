//! The model gateway as a process' worth of it, between real clients and real servers: git itself,
//! and an MCP server over HTTP. Vault and auth are responders: the one seals what a test gives it,
//! the other knows every user.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::disallowed_methods, reason = "the runtime of a test owns its tasks")]

use std::{
    collections::VecDeque,
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, Method, StatusCode},
    response::{IntoResponse as _, Response},
    routing::any,
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bus::{Bus, RpcError, responder::Responder};
use contract::{
    access,
    auth::CheckUserReply,
    common::Empty,
    rpc,
    vault::{
        Bundle, ClaimRefreshReply, ClaimRefreshRequest, FinishRefreshRequest,
        RedeemModelTokenReply, RedeemModelTokenRequest, RefreshState, Refreshable, Route,
        RouteHeader, RouteKind, SealingKeyReply,
    },
};
use futures::StreamExt as _;
use model_gateway::{Config, Retries, Upstreams};
use prost::Message as _;
use sealing::KeyPair;
use serde_json::{Value, json};
use service::Lifecycle;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use testkit::{Nats, eventually, tls::Tls};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, Command},
};
use types::{SessionId, UserId, vault::DOCUMENT_KIND};

const TOKEN: &str = "aod_session_of_this_test";
const SECRET: &str = "SENTINEL-secret";

/// What the vault answers. Cheap to clone.
#[derive(Clone)]
struct Vault {
    session: SessionId,
    user: UserId,
    routes: Arc<Mutex<Vec<Route>>>,
    /// What it answers from the next redemptions on.
    later: Arc<Mutex<VecDeque<Vec<Route>>>>,
    /// What values are sealed to.
    key: Arc<KeyPair>,
    /// How an access token is refreshed; null: another gateway has done it.
    refresh: Arc<Mutex<Value>>,
    /// What refreshes came to: an access token, or whether it was refused.
    finished: Arc<Mutex<Vec<Result<String, bool>>>>,
}

impl Vault {
    fn new() -> Self {
        Self {
            session: SessionId::new(),
            user: UserId::new(),
            routes: Arc::default(),
            later: Arc::default(),
            key: Arc::new(KeyPair::generate().unwrap()),
            refresh: Arc::default(),
            finished: Arc::default(),
        }
    }

    async fn claim_refresh(
        self,
        request: ClaimRefreshRequest,
    ) -> Result<ClaimRefreshReply, RpcError> {
        let refresh = self.refresh.lock().unwrap().clone();
        if refresh.is_null() {
            let state = RefreshState::Current.into();
            return Ok(ClaimRefreshReply { state, ..ClaimRefreshReply::default() });
        }
        let (key, context) = (&request.public_key, &request.session_token_hash);
        let sealed = sealing::seal(key, refresh.to_string().as_bytes(), context).unwrap();
        let state = RefreshState::Granted.into();
        Ok(ClaimRefreshReply { state, sealed, user_id: self.user.to_string() })
    }

    async fn finish_refresh(self, request: FinishRefreshRequest) -> Result<Empty, RpcError> {
        let finished = match request.sealed {
            Some(sealed) => {
                let context = bus::vault::context(&self.user.to_string(), DOCUMENT_KIND);
                let change = self.key.open(&sealed.sealed, &context).unwrap();
                let change: Value = serde_json::from_slice(&change).unwrap();
                Ok(change["value"].as_str().unwrap().to_owned())
            }
            None => Err(request.is_refused),
        };
        if let Ok(token) = &finished {
            for route in self.routes.lock().unwrap().iter_mut() {
                route.headers.iter_mut().for_each(|header| header.value.clone_from(token));
                route.refreshable = Some(refreshable(token, None));
            }
        }
        self.finished.lock().unwrap().push(finished);
        Ok(Empty {})
    }

    async fn redeem(
        self,
        request: RedeemModelTokenRequest,
    ) -> Result<RedeemModelTokenReply, RpcError> {
        if request.token_hash != Sha256::digest(TOKEN).as_slice() {
            return Err(RpcError::not_found("Token not found, expired or revoked"));
        }
        if let Some(routes) = self.later.lock().unwrap().pop_front() {
            *self.routes.lock().unwrap() = routes;
        }
        let bundle = Bundle { routes: self.routes.lock().unwrap().clone(), ..Bundle::default() };
        let sealed =
            sealing::seal(&request.public_key, &bundle.encode_to_vec(), &request.token_hash)
                .unwrap();
        Ok(RedeemModelTokenReply {
            user_id: self.user.to_string(),
            session_id: self.session.to_string(),
            sealed,
        })
    }
}

struct Gateway {
    url: String,
    vault: Vault,
    http: reqwest::Client,
    lifecycle: Lifecycle,
    _vault_and_auth: [Bus; 2],
    _nats: Nats,
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.lifecycle.stop_token().cancel();
    }
}

impl Gateway {
    async fn start(private_hosts: &[String], github: &str) -> Self {
        Self::with_silence(private_hosts, github, Duration::from_secs(60)).await
    }

    async fn with_silence(private_hosts: &[String], github: &str, silence: Duration) -> Self {
        let nats = Nats::start().unwrap();
        let (vault_bus, lifecycle) =
            (nats.connect(&access::VAULT).await.unwrap(), Lifecycle::new());
        let vault = Vault::new();
        let responder = Responder::new(
            &vault_bus,
            "credential-vault",
            vault.clone(),
            lifecycle.tracker(),
            lifecycle.stop_token(),
        );
        responder.serve::<rpc::RedeemModelToken, _, _>(Vault::redeem).await.unwrap();
        responder.serve::<rpc::ClaimRefresh, _, _>(Vault::claim_refresh).await.unwrap();
        responder.serve::<rpc::FinishRefresh, _, _>(Vault::finish_refresh).await.unwrap();
        responder
            .serve::<rpc::SealingKey, _, _>(|vault, _| async move {
                Ok(SealingKeyReply { key_version: 1, public_key: vault.key.public().to_vec() })
            })
            .await
            .unwrap();
        let auth_bus = nats.connect(&access::AUTH).await.unwrap();
        let auth =
            Responder::new(&auth_bus, "auth", (), lifecycle.tracker(), lifecycle.stop_token());
        auth.serve::<rpc::CheckUser, _, _>(|(), _| async {
            Ok(CheckUserReply { is_active: true })
        })
        .await
        .unwrap();
        let addr = ([127, 0, 0, 1], testkit::free_port().unwrap()).into();
        let config = Config {
            bus: nats.config(&access::MODEL_GATEWAY),
            vault_keys: bus::vault::AcceptedKeys::default(),
            addr,
            upstreams: Upstreams::new(|_| None).unwrap(),
            connections: 256,
            requests_per_session: 16,
            body_bytes_max: 1 << 20,
            bodies_bytes_max: 16 << 20,
            silence,
            retries: Retries { times: 0, wait_max: Duration::ZERO },
            private_hosts: private_hosts.to_vec(),
            github: github.parse().unwrap(),
            push_bytes_max: 8 << 20,
            prices: None,
        };
        model_gateway::run(config, lifecycle.clone()).await.unwrap();
        let http = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()
            .unwrap();
        Self {
            url: format!("http://{addr}"),
            vault,
            http,
            lifecycle,
            _vault_and_auth: [vault_bus, auth_bus],
            _nats: nats,
        }
    }

    fn routes(&self, routes: Vec<Route>) {
        *self.vault.routes.lock().unwrap() = routes;
    }

    async fn ask(&self, method: Method, path: &str, body: &str) -> reqwest::Response {
        let request = self
            .http
            .request(method, format!("{}/{path}", self.url))
            .header("aod-session-token", TOKEN);
        request
            .header("content-type", "application/json")
            .body(body.to_owned())
            .send()
            .await
            .unwrap()
    }
}

fn route(kind: RouteKind, path: &str, url: &str, headers: &[(&str, &str)]) -> Route {
    let headers = headers
        .iter()
        .map(|(name, value)| RouteHeader { name: (*name).to_owned(), value: (*value).to_owned() });
    Route {
        kind: kind.into(),
        path: path.to_owned(),
        url: url.to_owned(),
        headers: headers.collect(),
        ..Route::default()
    }
}

fn refreshable(token: &str, expires_at: Option<i64>) -> Refreshable {
    let token_hash = Sha256::digest(token).to_vec();
    Refreshable { secret_id: "s".to_owned(), token_hash, expires_at }
}

// --- MCP ---

/// An MCP server that wants a header, and a record of what it was asked.
#[derive(Clone)]
struct Server {
    secret: Arc<Mutex<String>>,
    asked: Arc<Mutex<Vec<(Method, String, HeaderMap)>>>,
    /// Where `/elsewhere` redirects.
    other: Arc<Mutex<String>>,
    /// What `/token` answers.
    token: Arc<Mutex<(u16, &'static str)>>,
    /// What its stream sends next.
    events: Arc<tokio::sync::Notify>,
}

impl Server {
    /// Returns its address as well.
    async fn start() -> (Self, String) {
        let server = Self {
            secret: Arc::new(Mutex::new(SECRET.to_owned())),
            asked: Arc::default(),
            other: Arc::default(),
            token: Arc::default(),
            events: Arc::default(),
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let router = Router::new().route("/{*path}", any(answer)).with_state(server.clone());
        tokio::spawn(axum::serve(listener, router).into_future());
        (server, host)
    }

    fn count(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

async fn answer(
    State(server): State<Server>,
    method: Method,
    uri: axum::http::Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    server.asked.lock().unwrap().push((method.clone(), uri.to_string(), headers.clone()));
    match uri.path() {
        "/moved" => {
            return (StatusCode::TEMPORARY_REDIRECT, [("location", "/mcp?key=1")]).into_response();
        }
        "/token" => {
            let (status, body) = *server.token.lock().unwrap();
            return (StatusCode::from_u16(status).unwrap(), body).into_response();
        }
        // It reads what it is sent, and says nothing.
        "/silent" => std::future::pending().await,
        "/elsewhere" => {
            return (
                StatusCode::TEMPORARY_REDIRECT,
                [("location", server.other.lock().unwrap().clone())],
            )
                .into_response();
        }
        _ => {}
    }
    if headers
        .get("x-key")
        .is_none_or(|key| key.as_bytes() != server.secret.lock().unwrap().as_bytes())
    {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    if method == Method::GET {
        let events =
            futures::stream::unfold((server.events.clone(), 0), |(events, count)| async move {
                events.notified().await;
                Some((
                    Ok::<_, std::convert::Infallible>(format!("data: {count}\n\n")),
                    (events, count + 1),
                ))
            });
        return ([("content-type", "text/event-stream")], Body::from_stream(events))
            .into_response();
    }
    let said = String::from_utf8_lossy(&body).into_owned();
    ([("mcp-session-id", "s-1"), ("set-cookie", "a=b")], Json(json!({ "said": said })))
        .into_response()
}

#[tokio::test]
async fn an_mcp_server_gets_its_secret_from_the_gateway_and_clients_stream_both_ways() {
    let (server, host) = Server::start().await;
    let gateway = Gateway::start(std::slice::from_ref(&host), "http://127.0.0.1:9").await;
    let url = format!("http://{host}/mcp?key=1");
    gateway.routes(vec![route(RouteKind::Mcp, "mcp/echo-1", &url, &[("X-Key", SECRET)])]);

    let posted = gateway.ask(Method::POST, "mcp/echo-1", "hello").await;
    assert_eq!(
        (posted.status().as_u16(), posted.headers()["mcp-session-id"].to_str().unwrap()),
        (200, "s-1")
    );
    assert!(!posted.headers().contains_key("set-cookie"));
    assert_eq!(posted.json::<Value>().await.unwrap()["said"], "hello");
    let (_, uri, headers) = server.asked.lock().unwrap().last().unwrap().clone();
    assert_eq!(uri, "/mcp?key=1");
    assert!(!format!("{headers:?}").contains(TOKEN), "{headers:?}");
    assert_eq!(gateway.ask(Method::DELETE, "mcp/echo-1", "").await.status(), 200);

    // Each event as it comes: the next is not sent before the first has arrived.
    let mut stream = gateway.ask(Method::GET, "mcp/echo-1", "").await.bytes_stream();
    for count in 0..3 {
        server.events.notify_one();
        let event = tokio::time::timeout(Duration::from_secs(60), stream.next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        assert_eq!(event, format!("data: {count}\n\n"));
    }
    drop(stream);

    // Neither another path, nor another method, nor a body without a bound.
    assert_eq!(gateway.ask(Method::POST, "mcp/echo-1/../x", "").await.status(), 404);
    assert_eq!(gateway.ask(Method::POST, "mcp/echo-2", "").await.status(), 404);
    assert_eq!(gateway.ask(Method::PUT, "mcp/echo-1", "").await.status(), 405);
    assert_eq!(gateway.ask(Method::POST, "mcp/echo-1", &"x".repeat(2 << 20)).await.status(), 413);
    let without_token =
        gateway.http.post(format!("{}/mcp/echo-1", gateway.url)).send().await.unwrap();
    assert_eq!(without_token.status(), 401);
    let wrong = gateway
        .http
        .post(format!("{}/mcp/echo-1", gateway.url))
        .header("aod-session-token", "wrong")
        .send()
        .await
        .unwrap();
    assert_eq!(wrong.status(), 403);
}

#[tokio::test]
async fn a_secret_follows_no_redirect_to_another_host_and_reaches_no_private_address() {
    let ((server, host), (other, other_host), (unnamed, unnamed_host)) =
        (Server::start().await, Server::start().await, Server::start().await);
    let gateway = Gateway::start(&[host.clone(), other_host.clone()], "http://127.0.0.1:9").await;
    *server.other.lock().unwrap() = format!("http://{other_host}/mcp");
    let to = |path: &str, url: String| route(RouteKind::Mcp, path, &url, &[("X-Key", SECRET)]);
    gateway.routes(vec![
        to("mcp/moved", format!("http://{host}/moved")),
        to("mcp/elsewhere", format!("http://{host}/elsewhere")),
        to("mcp/private", format!("http://{unnamed_host}/mcp")),
        to(
            "mcp/name",
            format!("http://localhost:{}/mcp", unnamed_host.rsplit_once(':').unwrap().1),
        ),
        Route { is_refused: true, ..to("mcp/refused", format!("http://{host}/mcp")) },
    ]);
    assert_eq!(
        gateway.ask(Method::POST, "mcp/moved", "hello").await.json::<Value>().await.unwrap()["said"],
        "hello"
    );
    let elsewhere = gateway.ask(Method::POST, "mcp/elsewhere", "hello").await;
    assert_eq!((elsewhere.status().as_u16(), elsewhere.headers().get("location")), (502, None));
    assert_eq!(other.count(), 0);
    let count = server.count();
    for (path, status) in [("mcp/private", 403), ("mcp/name", 502), ("mcp/refused", 403)] {
        assert_eq!(gateway.ask(Method::POST, path, "hello").await.status(), status, "{path}");
    }
    assert_eq!((unnamed.count(), server.count()), (0, count));
}

#[tokio::test]
async fn a_secret_that_was_replaced_and_a_route_that_is_new_are_redeemed_at_once() {
    let (server, host) = Server::start().await;
    let gateway = Gateway::start(std::slice::from_ref(&host), "http://127.0.0.1:9").await;
    let url = format!("http://{host}/mcp");
    gateway.routes(vec![route(RouteKind::Mcp, "mcp/echo", &url, &[("X-Key", SECRET)])]);
    assert_eq!(gateway.ask(Method::POST, "mcp/echo", "").await.status(), 200);
    "another".clone_into(&mut server.secret.lock().unwrap());
    let renewed = [("X-Key", "another")];
    gateway.routes(vec![
        route(RouteKind::Mcp, "mcp/echo", &url, &renewed),
        route(RouteKind::Mcp, "mcp/new", &url, &renewed),
    ]);
    eventually("the new secret is used", || async {
        gateway.ask(Method::POST, "mcp/echo", "").await.status() == 200
    })
    .await;
    assert_eq!(gateway.ask(Method::POST, "mcp/new", "").await.status(), 200);
}

#[tokio::test]
async fn a_request_asks_its_token_endpoint_once_and_no_other_address() {
    let ((server, host), (endpoint, token_host)) = (Server::start().await, Server::start().await);
    let ((other, other_host), (unnamed, unnamed_host)) =
        (Server::start().await, Server::start().await);
    let named = [host.clone(), token_host.clone(), other_host.clone()];
    let gateway = Gateway::start(&named, "http://127.0.0.1:9").await;
    *endpoint.other.lock().unwrap() = format!("http://{other_host}/token");
    let unnamed_port = unnamed_host.rsplit_once(':').unwrap().1;
    // (the endpoint, what it answers, the server's token, the status of the request, what the vault
    // is told)
    let named = format!("http://{token_host}/token");
    let cases = [
        (named.clone(), (500, "{}"), "new", 502, Err(false)),
        (named.clone(), (403, "<html>"), "new", 502, Err(false)),
        (named.clone(), (400, r#"{"error":"invalid_grant"}"#), "new", 401, Err(true)),
        (named.clone(), (200, r#"{"access_token":"new"}"#), "new", 200, Ok("new")),
        // A server that wants something else is not the endpoint's fault.
        (named.clone(), (200, r#"{"access_token":"new"}"#), "other", 401, Ok("new")),
        (format!("http://{token_host}/elsewhere"), (200, "{}"), "new", 502, Err(false)),
        (format!("http://{unnamed_host}/token"), (200, "{}"), "new", 502, Err(false)),
        (format!("http://localhost:{unnamed_port}/token"), (200, "{}"), "new", 502, Err(false)),
    ];
    for (number, (token_endpoint, answer, good, status, told)) in cases.into_iter().enumerate() {
        good.clone_into(&mut server.secret.lock().unwrap());
        *endpoint.token.lock().unwrap() = answer;
        *gateway.vault.refresh.lock().unwrap() = json!({
            "client_id": "c",
            "refresh_token": "r",
            "token_endpoint": token_endpoint,
            "token_endpoint_auth": { "type": "none" },
        });
        let path = format!("mcp/{number}");
        let url = format!("http://{host}/mcp");
        let old = route(RouteKind::Mcp, &path, &url, &[("X-Key", "old")]);
        gateway.routes(vec![Route { refreshable: Some(refreshable("old", Some(1))), ..old }]);
        let (before, told_before) =
            (endpoint.count(), gateway.vault.finished.lock().unwrap().len());
        let answered = gateway.ask(Method::POST, &path, "hello").await.status();
        assert_eq!(answered, status, "{token_endpoint} {answer:?}");
        let is_asked = token_endpoint.contains(&token_host);
        assert_eq!(endpoint.count(), before + usize::from(is_asked), "{token_endpoint} {answer:?}");
        let finished = gateway.vault.finished.lock().unwrap()[told_before..].to_vec();
        assert_eq!(finished, [told.map(str::to_owned)], "{token_endpoint} {answer:?}");
    }
    assert_eq!((other.count(), unnamed.count()), (0, 0));
}

#[tokio::test]
async fn a_token_that_another_gateway_refreshed_is_used_at_once() {
    let (server, host) = Server::start().await;
    let gateway = Gateway::start(std::slice::from_ref(&host), "http://127.0.0.1:9").await;
    "new".clone_into(&mut server.secret.lock().unwrap());
    let with = |token: &str| {
        let url = format!("http://{host}/mcp");
        let route = route(RouteKind::Mcp, "mcp/echo", &url, &[("X-Key", token)]);
        vec![Route { refreshable: Some(refreshable(token, None)), ..route }]
    };
    // The first redemption, after the server's 401, and after the refresh.
    let answers = ["old", "old", "new"].map(with);
    gateway.vault.later.lock().unwrap().extend(answers);
    assert_eq!(gateway.ask(Method::POST, "mcp/echo", "hello").await.status(), 200);
}

#[tokio::test]
async fn a_server_that_does_not_answer_holds_no_more_memory_than_its_sessions_share() {
    let (server, host) = Server::start().await;
    let gateway = Gateway::start(std::slice::from_ref(&host), "http://127.0.0.1:9").await;
    gateway.routes(vec![route(
        RouteKind::Mcp,
        "mcp/silent",
        &format!("http://{host}/silent"),
        &[],
    )]);
    let body = "x".repeat(300 << 10);
    let held = gateway
        .http
        .post(format!("{}/mcp/silent", gateway.url))
        .header("aod-session-token", TOKEN)
        .body(body.clone())
        .send();
    let mut asked = tokio::task::JoinSet::new();
    asked.spawn(held);
    eventually("the server has it", || async { server.count() == 1 }).await;
    // 16 MiB for bodies of model requests: an eighth of a quarter of that for one session's
    // requests to servers.
    assert_eq!(gateway.ask(Method::POST, "mcp/silent", &body).await.status(), 429);
    assert_eq!(gateway.ask(Method::POST, "mcp/silent", &"x".repeat(600 << 10)).await.status(), 413);
}

/// A proxy resolves names itself, and its own address is often private: requests of this test that
/// went to one would fail.
#[tokio::test]
async fn no_proxy_of_the_environment_comes_between_the_gateway_and_mcp_servers() {
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args([
        "--exact",
        "an_mcp_server_gets_its_secret_from_the_gateway_and_clients_stream_both_ways",
    ]);
    again
        .env("HTTP_PROXY", "http://127.0.0.1:9")
        .env_remove("NO_PROXY")
        .env_remove("no_proxy")
        .kill_on_drop(true);
    let output =
        tokio::time::timeout(Duration::from_secs(180), again.output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

// --- git ---

/// GitHub with repositories that want a token, over HTTP. Ended when dropped.
struct GitHub {
    served: TempDir,
    _tls: Tls,
    _server: Child,
    url: String,
}

impl GitHub {
    async fn start(repositories: &[(&str, &str)]) -> Self {
        let (served, tls) = (tempfile::tempdir().unwrap(), Tls::generate().unwrap());
        let mut server = Command::new("python3");
        server
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../../system-tests/git/private_github.py"))
            .arg(served.path());
        server
            .arg(tls.certificate_file())
            .arg(tls.key_file())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        let mut server = server.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).await.unwrap();
        let github = Self {
            served,
            _tls: tls,
            _server: server,
            url: format!("http://127.0.0.1:{}", line.trim()),
        };
        for (name, token) in repositories {
            let path = github.served.path().join(name);
            std::fs::create_dir_all(&path).unwrap();
            let made = "git init -q --bare -b main && git config http.receivepack true && git config uploadpack.allowFilter true &&
                        git update-ref refs/heads/main $(git -c user.name=t -c user.email=t@example.org commit-tree -m first \
                            $(git hash-object -t tree -w /dev/null))";
            assert_eq!(shell(&path, made).await, (0, String::new()));
            std::fs::write(path.join("token"), token).unwrap();
        }
        github
    }
}

/// Runs a script with a home of its own, and returns its status and what it said.
async fn shell(folder: &Path, script: &str) -> (i32, String) {
    let mut command = Command::new("bash");
    command
        .args(["-c", script])
        .current_dir(folder)
        .env("HOME", folder)
        .env("GIT_TERMINAL_PROMPT", "0")
        .env_remove("XDG_CONFIG_HOME");
    command.env("NO_PROXY", "127.0.0.1").stdin(Stdio::null()).kill_on_drop(true);
    let output =
        tokio::time::timeout(Duration::from_secs(120), command.output()).await.unwrap().unwrap();
    (
        output.status.code().unwrap(),
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim().to_owned(),
    )
}

/// As the runner sets git up in a sandbox.
async fn lead_git(home: &Path, gateway: &str, repository: &str) {
    std::fs::write(home.join("session"), format!("username=session\npassword={TOKEN}\n")).unwrap();
    let script = format!(
        "git config --global credential.{gateway}.helper '!cat ~/session; :'
         git config --global url.{gateway}/git/github.com/{repository}.insteadOf https://github.com/{repository}
         git config --global user.name t; git config --global user.email t@example.org"
    );
    assert_eq!(shell(home, &script).await, (0, String::new()));
}

/// The first line of an answer to a path as it stands: clients of HTTP take dot segments out.
async fn status_of(gateway: &str, path: &str) -> String {
    let mut stream =
        tokio::net::TcpStream::connect(gateway.trim_start_matches("http://")).await.unwrap();
    let credential = BASE64.encode(format!("session:{TOKEN}"));
    let head = format!(
        "GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Basic {credential}\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer.lines().next().unwrap_or_default().to_owned()
}

fn git_route(repository: &str, token: &str) -> Route {
    let credential = format!("Basic {}", BASE64.encode(format!("x-access-token:{token}")));
    let (path, url) =
        (format!("git/github.com/{repository}"), format!("https://github.com/{repository}"));
    route(RouteKind::Git, &path, &url, &[("Authorization", &credential)])
}

#[tokio::test]
async fn git_clones_pushes_and_fetches_by_the_gateway_and_never_sees_the_token() {
    let github = GitHub::start(&[("acme/one", SECRET), ("acme/two", SECRET)]).await;
    let gateway = Gateway::start(&[], &github.url).await;
    gateway.routes(vec![git_route("acme/one", SECRET)]);
    let home = tempfile::tempdir().unwrap();
    lead_git(home.path(), &gateway.url, "acme/one").await;
    // A push of more than git's buffer is sent in chunks.
    let script = "set -e
        git clone -q --depth=1 --no-single-branch --filter=blob:none https://github.com/acme/one one
        cd one; git config remote.origin.url
        head -c 3000000 /dev/urandom >large; git add .; git commit -qm second; git push -q origin HEAD
        cd ..; git clone -q https://github.com/acme/one.git again; cmp one/large again/large
        cd again; echo x >small; git add .; git commit -qm third; git push -q; cd ../one; git pull -q; cat small";
    assert_eq!(shell(home.path(), script).await, (0, "https://github.com/acme/one\nx".to_owned()));
    assert_eq!(
        shell(&github.served.path().join("acme/one"), "git log --format=%s main").await.1,
        "third\nsecond\nfirst"
    );
    let (_, found) = shell(
        home.path(),
        &format!("grep -rlaF -e {SECRET} -e $(printf x-access-token:{SECRET} | base64) . "),
    )
    .await;
    assert_eq!(found, "");

    // One that is too large ends as a failure and changes nothing.
    let script = "cd one; head -c 9000000 /dev/urandom >larger; git add .; git commit -qm fourth; git push -q";
    let (code, said) = shell(home.path(), script).await;
    assert_ne!(code, 0, "{said}");
    assert_eq!(
        shell(&github.served.path().join("acme/one"), "git log -1 --format=%s main").await.1,
        "third"
    );

    // Another repository, though the token would do: not by the gateway.
    let (code, said) = shell(
        home.path(),
        &format!(
            "git -c http.followRedirects=false clone -q {}/git/github.com/acme/two",
            gateway.url
        ),
    )
    .await;
    assert!(code != 0 && !home.path().join("two").exists(), "{said}");
    let of = |path: &str| {
        let request = gateway
            .http
            .get(format!("{}/git/{path}", gateway.url))
            .basic_auth("session", Some(TOKEN));
        async move { request.send().await.unwrap() }
    };
    let neighbour = of("github.com/acme/one-two/info/refs?service=git-upload-pack").await;
    let location = "https://github.com/acme/one-two/info/refs?service=git-upload-pack";
    assert_eq!(
        (neighbour.status().as_u16(), neighbour.headers()["location"].to_str().unwrap()),
        (302, location)
    );
    for path in [
        "github.com/acme/one/../two/info/refs",
        "github.com/acme/one%2f..%2ftwo/info/refs",
        "github.com/acme/one/HEAD",
    ] {
        let status = status_of(&gateway.url, &format!("/git/{path}?service=git-upload-pack")).await;
        assert_eq!(status, "HTTP/1.1 404 Not Found", "{path}");
    }
    let asked = gateway
        .http
        .get(format!("{}/git/github.com/acme/one/info/refs?service=git-upload-pack", gateway.url));
    assert_eq!(
        asked.send().await.unwrap().headers()["www-authenticate"],
        "Basic realm=\"model gateway\""
    );
}

#[tokio::test]
async fn a_repository_that_may_not_be_reached_says_why_and_git_keeps_its_credential() {
    let github = GitHub::start(&[("acme/one", "another token")]).await;
    for (route, why) in [
        (git_route("acme/one", SECRET), "authorization_token is refused"),
        (
            Route { is_refused: true, ..git_route("acme/one", SECRET) },
            "refused by the network policy",
        ),
    ] {
        let (gateway, home) =
            (Gateway::start(&[], &github.url).await, tempfile::tempdir().unwrap());
        lead_git(home.path(), &gateway.url, "acme/one").await;
        gateway.routes(vec![route]);
        let (code, said) = shell(home.path(), "git clone -q https://github.com/acme/one one").await;
        assert!(code != 0 && !said.contains(SECRET), "{said}");
        assert!(
            said.contains(why) && said.contains("The requested URL returned error: 403"),
            "{said}"
        );
    }
}

/// A server that answers what a test says.
async fn canned(answer: String) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let answer = answer.clone();
            tokio::spawn(async move {
                let mut head = [0; 4096];
                let _ = stream.read(&mut head).await;
                let _ = stream.write_all(answer.as_bytes()).await;
            });
        }
    });
    url
}

#[tokio::test]
async fn neither_a_redirect_nor_an_answer_of_git_lfs_receives_the_token() {
    let echo = format!(
        "{{\"Authorization\":\"Basic {}\"}}",
        BASE64.encode(format!("x-access-token:{SECRET}"))
    );
    for (answer, path, method) in [
        (
            "HTTP/1.1 301 Moved Permanently\r\nlocation: https://evil.example/\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                .to_owned(),
            "info/refs?service=git-upload-pack",
            Method::GET,
        ),
        (
            format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{echo}", echo.len()),
            "info/lfs/objects/batch",
            Method::POST,
        ),
    ] {
        let gateway = Gateway::start(&[], &canned(answer).await).await;
        gateway.routes(vec![git_route("acme/one", SECRET)]);
        let url = format!("{}/git/github.com/acme/one/{path}", gateway.url);
        let answered = gateway.http.request(method, url).basic_auth("session", Some(TOKEN)).body("").send().await.unwrap();
        assert_eq!((answered.status().as_u16(), answered.headers().get("location")), (502, None), "{path}");
        assert!(!answered.text().await.unwrap().contains("evil"));
    }
}

#[tokio::test]
async fn a_push_may_take_longer_than_a_server_may_be_silent() {
    let (_server, host) = Server::start().await;
    let gateway =
        Gateway::with_silence(&[], &format!("http://{host}"), Duration::from_secs(6)).await;
    let headers = [("X-Key", SECRET)];
    gateway.routes(vec![route(
        RouteKind::Git,
        "git/github.com/acme/one",
        "https://github.com/acme/one",
        &headers,
    )]);
    let pack = futures::stream::unfold(0, |count| async move {
        tokio::time::sleep(Duration::from_millis(500)).await;
        (count < 16).then(|| (Ok::<_, std::convert::Infallible>("x"), count + 1))
    });
    let push =
        gateway.http.post(format!("{}/git/github.com/acme/one/git-receive-pack", gateway.url));
    let push = push.basic_auth("session", Some(TOKEN)).body(reqwest::Body::wrap_stream(pack));
    let answer =
        tokio::time::timeout(Duration::from_secs(120), push.send()).await.unwrap().unwrap();
    assert_eq!(
        (answer.status().as_u16(), answer.json::<Value>().await.unwrap()["said"].clone()),
        (200, json!("x".repeat(16)))
    );
}
