//! Resources of `/v1` on the whole stack: vaults, and what sessions are given.

mod files;

use std::sync::{Arc, Mutex};

use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};
use system_tests::{Options, Stack};
use testkit::{https::Https, tls::Tls};

use crate::runtimes::mcp_over_http;

/// What clients of `/v1` do.
pub struct Client<'a> {
    stack: &'a Stack,
    agent: String,
    environment: String,
}

impl<'a> Client<'a> {
    pub async fn new(stack: &'a Stack, agent: Value) -> Self {
        let agent = created(stack, "/v1/agents", agent).await;
        let environment = created(stack, "/v1/environments", json!({ "name": "e" })).await;
        Self { stack, agent, environment }
    }

    async fn shell(stack: &'a Stack) -> Self {
        Self::new(stack, json!({ "name": "s", "model": "claude-sonnet-4-5", "metadata": { "aod.runtime": "shell" } })).await
    }

    pub async fn session(&self, more: Value) -> String {
        let mut body = json!({ "agent": self.agent, "environment_id": self.environment });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        created(self.stack, "/v1/sessions", body).await
    }

    /// One turn; what the agent said and what its tools and scripts printed.
    async fn turn(&self, session: &str, text: &str) -> String {
        let path = format!("/v1/sessions/{session}/events");
        let idle = async || {
            let events =
                self.stack.get(&path).await.unwrap().body["data"].as_array().unwrap().clone();
            (
                events.iter().filter(|event| event["type"] == "session.status_idle").count(),
                events.is_empty(),
            )
        };
        let (before, is_first) = idle().await;
        let output = async |since: u64| {
            self.stack.stream(&ours(session), since).await.unwrap().all().await.unwrap()
        };
        let since =
            if is_first { 0 } else { output(0).await.last().unwrap()["id"].as_u64().unwrap() };
        let message =
            json!({ "type": "user.message", "content": [{ "type": "text", "text": text }] });
        let sent = self.stack.post(&path, json!({ "events": [message] })).await.unwrap();
        assert_eq!(sent.status, 200, "{sent:?}");
        testkit::eventually("the turn ends", || async { idle().await.0 > before }).await;
        let said: String =
            output(since).await.iter().filter_map(|event| event["data"].as_str()).collect();
        said.trim().to_owned()
    }
}

/// The original API's id of a session.
pub fn ours(session: &str) -> String {
    const DIGITS: &[u8; 58] = b"123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";
    let digit = |byte: u8| DIGITS.iter().position(|digit| *digit == byte).unwrap() as u128;
    let bits = session
        .strip_prefix("sesn_01")
        .unwrap()
        .bytes()
        .fold(0, |bits: u128, byte| bits * 58 + digit(byte));
    types::SessionId::from_uuid(uuid::Uuid::from_u128(bits)).to_string()
}

/// The id of what a request creates.
pub async fn created(stack: &Stack, path: &str, body: Value) -> String {
    let made = stack.post(path, body).await.unwrap();
    assert_eq!(made.status, 200, "{path}: {made:?}");
    made.text("id").to_owned()
}

/// A key of another user.
fn foreign_key(stack: &Stack) -> String {
    let data = stack.data_dir().to_str().unwrap();
    let admin = |args: &[&str]| {
        let output = stack
            .aod(&[&["--output", "json", "admin", "--data-dir", data], args].concat())
            .unwrap()
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<Value>(&output.stdout).unwrap_or_default()
    };
    admin(&["user", "create", "mallory"]);
    admin(&["key", "create", "mallory"])["key"].as_str().unwrap().to_owned()
}

async fn status_for(
    stack: &Stack,
    key: &str,
    method: Method,
    path: &str,
    body: Option<Value>,
) -> u16 {
    let request = stack
        .http
        .request(method, format!("{}{path}", stack.ready_text("/api_url")))
        .bearer_auth(key);
    let request = if let Some(body) = body { request.json(&body) } else { request };
    request.send().await.unwrap().status().as_u16()
}

fn variable(name: &str, value: &str) -> Value {
    let networking = json!({ "type": "unrestricted" });
    json!({ "auth": { "type": "environment_variable", "secret_name": name, "secret_value": value, "networking": networking } })
}

#[tokio::test]
async fn a_vaults_variables_reach_its_sessions_and_follow_rotation() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let client = Client::shell(&stack).await;
    let (vault, later) = (
        created(&stack, "/v1/vaults", json!({ "display_name": "v", "metadata": { "a": "b" } }))
            .await,
        created(&stack, "/v1/vaults", json!({ "display_name": "later" })).await,
    );
    let credentials = format!("/v1/vaults/{vault}/credentials");
    let credential = created(&stack, &credentials, variable("ROTATED", "SENTINEL-one")).await;
    for (name, value) in [("ROTATED", "SENTINEL-shadowed"), ("LATER", "SENTINEL-later")] {
        created(&stack, &format!("/v1/vaults/{later}/credentials"), variable(name, value)).await;
    }
    let session = client.session(json!({ "vault_ids": [vault, later] })).await;
    // By length and digest: what the shell prints is searched for the values.
    let show = "for v in ROTATED LATER; do printf '%s %s;' $v \"$(printf %s \"${!v}\" | sha256sum | cut -c1-8)\"; done; echo";
    let digest = |text: &str| {
        let script = "printf %s \"$0\" | sha256sum | cut -c1-8";
        let output = std::process::Command::new("sh").args(["-c", script, text]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let expected = |rotated: &str, later: &str| {
        format!("ROTATED {};LATER {};", digest(rotated), digest(later))
    };
    assert_eq!(client.turn(&session, show).await, expected("SENTINEL-one", "SENTINEL-later"));

    // The agent's process of the first turn is still there: the second one gets the new value.
    let rotate =
        json!({ "auth": { "type": "environment_variable", "secret_value": "SENTINEL-two" } });
    let rotated = stack.post(&format!("{credentials}/{credential}"), rotate).await.unwrap();
    assert_eq!(rotated.status, 200, "{rotated:?}");
    assert_eq!(client.turn(&session, show).await, expected("SENTINEL-two", "SENTINEL-later"));

    // Archived, its secret is gone and its name is free; the next vault's credential counts.
    let archived =
        stack.post(&format!("{credentials}/{credential}/archive"), json!({})).await.unwrap();
    assert!(archived.body["archived_at"].is_string(), "{archived:?}");
    assert_eq!(client.turn(&session, show).await, expected("SENTINEL-shadowed", "SENTINEL-later"));
    created(&stack, &credentials, variable("ROTATED", "SENTINEL-three")).await;
    assert_eq!(client.turn(&session, show).await, expected("SENTINEL-three", "SENTINEL-later"));

    // A deleted vault takes its credentials along; the session continues.
    let deleted = stack.call(Method::DELETE, &format!("/v1/vaults/{later}"), None).await.unwrap();
    assert_eq!((deleted.status, deleted.text("type")), (200, "vault_deleted"));
    assert_eq!(client.turn(&session, show).await, expected("SENTINEL-three", ""));

    let mut told = String::new();
    for path in [
        format!("/v1/sessions/{session}"),
        format!("/v1/sessions/{session}/events"),
        format!("/v1/vaults/{vault}"),
        format!("{credentials}?include_archived=true"),
        format!("{credentials}/{credential}"),
        "/v1/vaults".to_owned(),
    ] {
        let answer = stack.get(&path).await.unwrap();
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        told += &answer.body.to_string();
    }
    assert!(!told.contains("SENTINEL"), "{told}");
}

#[tokio::test]
async fn a_variable_for_named_hosts_is_a_placeholder_to_the_agent_and_a_value_to_its_hosts() {
    let tls = Tls::generate().unwrap();
    let (listed, other) = (Https::start(&tls).await.unwrap(), Https::start(&tls).await.unwrap());
    let options = Options::default()
        .reaching(&[listed.port, other.port])
        .with("LOCAL_SPRITES_CA_FILE", tls.ca_file().display().to_string());
    let stack = Stack::start(options).await.unwrap();
    let client = Client::shell(&stack).await;
    let vault = created(&stack, "/v1/vaults", json!({ "display_name": "v" })).await;
    let credentials = format!("/v1/vaults/{vault}/credentials");
    let host = format!("127.0.0.1:{}", listed.port);
    let networking = json!({ "type": "limited", "allowed_hosts": [host] });
    let auth = json!({ "type": "environment_variable", "secret_name": "KEY", "secret_value": "SENTINEL-one", "networking": networking });
    let credential = created(&stack, &credentials, json!({ "auth": auth })).await;
    let session = client.session(json!({ "vault_ids": [vault] })).await;
    let send = format!(
        "echo ${{KEY%_*}}; curl -sS -o /dev/null -w '%{{http_code}}\n' -H \"Authorization: Bearer $KEY\" https://{host}/"
    );
    let by_other_programs = format!(
        "cat >/tmp/repo.sh <<'E'\ngit -c http.extraHeader=\"X-Git: $KEY\" ls-remote https://{host}/r 2>&1 | tail -1\nE\nbash /tmp/repo.sh >/dev/null; \
         node -e 'fetch(process.argv[1], {{headers: {{\"X-Node\": process.env.KEY}}}}).then(r => console.log(r.status))' https://{host}/node"
    );
    let elsewhere =
        format!("curl -skS -o /dev/null -H \"X-Key: $KEY\" https://127.0.0.1:{}/", other.port);
    let said = client.turn(&session, &format!("{send}; {by_other_programs}; {elsewhere}")).await;
    assert_eq!(said, "aod_placeholder\n200\n200");
    let received = |https: &Https| https.heads().concat();
    for header in ["authorization: Bearer", "x-git:", "x-node:"] {
        assert!(
            received(&listed).contains(&format!("{header} SENTINEL-one\n")),
            "{header}: {:?}",
            listed.heads()
        );
    }
    assert!(received(&other).contains("x-key: aod_placeholder_"), "{:?}", other.heads());

    // Rotated between turns; a sandbox server that restarts in a turn gets it again.
    let rotate =
        json!({ "auth": { "type": "environment_variable", "secret_value": "SENTINEL-two" } });
    let rotated = stack.post(&format!("{credentials}/{credential}"), rotate).await.unwrap();
    assert_eq!(rotated.status, 200, "{rotated:?}");
    assert_eq!(client.turn(&session, &send).await, "aod_placeholder\n200");
    assert!(received(&listed).contains("Bearer SENTINEL-two"), "{:?}", listed.heads());
    let again = format!(
        "for n in $(seq 150); do curl -sS -o /dev/null -H \"X-Again: $KEY\" https://{host}/; sleep 0.1; done 2>/dev/null; echo done"
    );
    let sent_again = async |since: usize| {
        testkit::eventually("the value is sent", async || {
            listed.heads()[since..].concat().contains("x-again: SENTINEL-two\n")
        })
        .await;
    };
    let (said, ()) = tokio::join!(client.turn(&session, &again), async {
        sent_again(0).await;
        let before = stack.pids("local-sprites");
        Stack::signal(&before, Signal::TERM);
        testkit::eventually("another server", async || {
            stack.pids("local-sprites") != before && !stack.pids("local-sprites").is_empty()
        })
        .await;
        sent_again(listed.heads().len()).await;
    });
    assert_eq!(said, "done");

    // Limited no more, the value is the agent's.
    let lift = json!({ "auth": { "type": "environment_variable", "networking": { "type": "unrestricted" } } });
    let lifted = stack.post(&format!("{credentials}/{credential}"), lift).await.unwrap();
    assert_eq!(lifted.body["auth"]["networking"], json!({ "type": "unrestricted" }), "{lifted:?}");
    let length = client.turn(&session, "echo ${#KEY} $HTTPS_PROXY").await;
    assert_eq!(length, "SENTINEL-two".len().to_string());
    // Archived, it is gone.
    let archived =
        stack.post(&format!("{credentials}/{credential}/archive"), json!({})).await.unwrap();
    assert_eq!(archived.status, 200, "{archived:?}");
    assert_eq!(client.turn(&session, "echo ${KEY:-none}").await, "none");
    assert!(!received(&other).contains("SENTINEL"), "{:?}", other.heads());
}

/// As Fly.io's Sprites cannot.
#[tokio::test]
async fn sandboxes_that_cannot_limit_a_value_to_hosts_do_not_get_it() {
    let settings = &[("LOCAL_SPRITES_ISOLATION", "readonly")];
    let stack = Stack::start(Options { settings, ..Options::default() }).await.unwrap();
    let client = Client::shell(&stack).await;
    let vault = created(&stack, "/v1/vaults", json!({ "display_name": "v" })).await;
    let credentials = format!("/v1/vaults/{vault}/credentials");
    let networking = json!({ "type": "limited", "allowed_hosts": ["api.example.com"] });
    let auth = json!({ "type": "environment_variable", "secret_name": "KEY", "secret_value": "SENTINEL-one", "networking": networking });
    created(&stack, &credentials, json!({ "auth": auth })).await;
    let session = client.session(json!({ "vault_ids": [vault] })).await;
    let path = format!("/v1/sessions/{session}/events");
    let message =
        json!({ "type": "user.message", "content": [{ "type": "text", "text": "echo ${#KEY}" }] });
    let sent = stack.post(&path, json!({ "events": [message] })).await.unwrap();
    assert_eq!(sent.status, 200, "{sent:?}");
    // It was not set up: it has no later turn without what the first one was to do.
    testkit::eventually("the session ends", async || {
        stack.get(&format!("/v1/sessions/{session}")).await.unwrap().text("status") == "terminated"
    })
    .await;
    let told = stack.get(&path).await.unwrap().body["data"].to_string();
    assert!(told.contains("limited networking (KEY) cannot be used"), "{told}");
}

/// Its sandbox was never created: a second turn would find none.
#[tokio::test]
async fn a_session_whose_first_turn_fails_before_its_set_up_ends() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let key = Some(json!({ "value": "SENTINEL-key" }));
    let stored = stack.call(Method::PUT, "/credentials/provider:anthropic", key).await.unwrap();
    assert!((200..300).contains(&stored.status), "{stored:?}");
    let client = Client::new(&stack, json!({ "name": "c", "model": "claude-sonnet-4-5" })).await;
    let vault = created(&stack, "/v1/vaults", json!({ "display_name": "v" })).await;
    let address = variable("ANTHROPIC_BASE_URL", "http://127.0.0.1:9");
    created(&stack, &format!("/v1/vaults/{vault}/credentials"), address).await;
    let session = client.session(json!({ "vault_ids": [vault] })).await;
    let path = format!("/v1/sessions/{session}/events");
    let message =
        json!({ "type": "user.message", "content": [{ "type": "text", "text": "echo one" }] });
    let sent = stack.post(&path, json!({ "events": [message] })).await.unwrap();
    assert_eq!(sent.status, 200, "{sent:?}");
    let status = async || {
        let shown = stack.get(&format!("/v1/sessions/{session}")).await.unwrap();
        shown.text("status").to_owned()
    };
    testkit::eventually("the turn ends", async || status().await != "running").await;
    assert_eq!(status().await, "terminated");
    let told = stack.get(&path).await.unwrap().body["data"].to_string();
    assert!(told.contains("sets ANTHROPIC_BASE_URL without a key"), "{told}");
}

#[tokio::test]
async fn vaults_are_paged_patched_archived_and_their_users_own() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let client = Client::shell(&stack).await;
    let mut vaults = Vec::new();
    for number in 0..3 {
        vaults.push(
            created(
                &stack,
                "/v1/vaults",
                json!({ "display_name": format!("v{number}"), "metadata": { "a": "1", "b": "2" } }),
            )
            .await,
        );
    }
    let (mut listed, mut page) = (Vec::new(), String::new());
    loop {
        let answer = stack.get(&format!("/v1/vaults?limit=1{page}")).await.unwrap();
        listed.extend(
            answer.body["data"]
                .as_array()
                .unwrap()
                .iter()
                .map(|vault| vault["id"].as_str().unwrap().to_owned()),
        );
        let Some(next) = answer.body["next_page"].as_str() else { break };
        page = format!("&page={next}");
    }
    assert_eq!(listed.iter().rev().collect::<Vec<_>>(), vaults.iter().collect::<Vec<_>>());

    let path = format!("/v1/vaults/{}", vaults[0]);
    let patched = stack
        .post(&path, json!({ "display_name": "w", "metadata": { "a": null, "c": "3" } }))
        .await
        .unwrap();
    assert_eq!(
        (patched.text("display_name"), &patched.body["metadata"]),
        ("w", &json!({ "b": "2", "c": "3" }))
    );
    let credentials = format!("{path}/credentials");
    let credential = created(&stack, &credentials, variable("NAME", "value")).await;
    let again = stack.post(&credentials, variable("NAME", "other")).await.unwrap();
    assert_eq!((again.status, again.body["error"]["type"].as_str()), (409, Some("conflict_error")));
    assert_eq!(again.headers["x-should-retry"], "false");
    let bearer = |url: &str| json!({ "auth": { "type": "static_bearer", "mcp_server_url": url, "token": "t" } });
    created(&stack, &credentials, bearer("https://mcp.example/sse")).await;
    assert_eq!(
        stack.post(&credentials, bearer("HTTPS://mcp.example:443/sse/")).await.unwrap().status,
        409
    );
    // A server has one token, of whichever kind.
    let oauth = json!({ "type": "mcp_oauth", "mcp_server_url": "https://mcp.example/sse", "access_token": "t" });
    assert_eq!(stack.post(&credentials, json!({ "auth": oauth })).await.unwrap().status, 409);

    for (path, body, field) in [
        ("/v1/vaults".to_owned(), json!({}), "display_name"),
        ("/v1/vaults".to_owned(), json!({ "display_name": " " }), "display_name"),
        ("/v1/vaults".to_owned(), json!({ "display_name": "x", "nope": 1 }), "nope"),
        (credentials.clone(), json!({}), "auth"),
        (credentials.clone(), json!({ "auth": { "type": "mcp_oauth" } }), "access_token"),
        (
            credentials.clone(),
            json!({ "auth": { "type": "static_bearer", "token": "t" } }),
            "mcp_server_url",
        ),
        (credentials.clone(), variable("1", "x"), "secret_name"),
        (
            format!("{credentials}/{credential}"),
            json!({ "auth": { "type": "static_bearer", "token": "t" } }),
            "auth.type",
        ),
        (format!("{credentials}/{credential}"), variable("OTHER", "x"), "secret_name"),
    ] {
        let refused = stack.post(&path, body.clone()).await.unwrap();
        let told = refused.body["error"]["message"].as_str().unwrap_or_default();
        assert!(refused.status == 400 && told.contains(field), "{body}: {refused:?}");
    }

    // Another user finds none of it.
    let foreign = foreign_key(&stack);
    for (method, path, body) in [
        (Method::GET, path.clone(), None),
        (Method::POST, path.clone(), Some(json!({ "display_name": "mine" }))),
        (Method::POST, format!("{path}/archive"), None),
        (Method::DELETE, path.clone(), None),
        (Method::GET, credentials.clone(), None),
        (Method::POST, credentials.clone(), Some(variable("MINE", "x"))),
        (Method::GET, format!("{credentials}/{credential}"), None),
        (
            Method::POST,
            format!("{credentials}/{credential}"),
            Some(json!({ "display_name": "mine" })),
        ),
        (Method::POST, format!("{credentials}/{credential}/archive"), None),
        (Method::DELETE, format!("{credentials}/{credential}"), None),
    ] {
        assert_eq!(
            status_for(&stack, &foreign, method.clone(), &path, body).await,
            404,
            "{method} {path}"
        );
    }
    let key = stack.ready_text("/sprites_token");
    assert_eq!(
        status_for(
            &stack,
            &foreign,
            Method::PUT,
            "/credentials/backend:sprites",
            Some(json!({ "value": key }))
        )
        .await,
        200
    );
    let body = json!({ "name": "s", "model": "claude-sonnet-4-5", "metadata": { "aod.runtime": "shell" } });
    let url = stack.ready_text("/api_url");
    let send = async |path: &str, body: Value| {
        let answer = stack
            .http
            .post(format!("{url}{path}"))
            .bearer_auth(&foreign)
            .json(&body)
            .send()
            .await
            .unwrap();
        (answer.status().as_u16(), answer.json::<Value>().await.unwrap())
    };
    let (agent, environment) = (
        send("/v1/agents", body).await.1,
        send("/v1/environments", json!({ "name": "e" })).await.1,
    );
    let theirs = json!({ "agent": agent["id"], "environment_id": environment["id"], "vault_ids": [vaults[0]] });
    assert_eq!(send("/v1/sessions", theirs).await.0, 404);

    // An archived vault is readable, takes no credentials, and no new session.
    let archived = stack.post(&format!("{path}/archive"), json!({})).await.unwrap();
    assert!(archived.body["archived_at"].is_string(), "{archived:?}");
    assert_eq!(
        stack.post(&format!("{path}/archive"), json!({})).await.unwrap().body,
        archived.body
    );
    let left = stack.get(&format!("{credentials}?include_archived=true")).await.unwrap();
    assert!(
        left.body["data"]
            .as_array()
            .unwrap()
            .iter()
            .all(|credential| credential["archived_at"].is_string()),
        "{left:?}"
    );
    for (path, body) in [
        (path.clone(), json!({ "display_name": "x" })),
        (credentials.clone(), variable("NEW", "x")),
        (
            "/v1/sessions".to_owned(),
            json!({ "agent": client.agent, "environment_id": client.environment, "vault_ids": [vaults[0]] }),
        ),
    ] {
        let refused = stack.post(&path, body).await.unwrap();
        assert_eq!(
            (refused.status, refused.body["error"]["details"]["error_code"].as_str()),
            (400, Some("vault_archived")),
            "{refused:?}"
        );
    }
    assert_eq!(stack.get("/v1/vaults").await.unwrap().body["data"].as_array().unwrap().len(), 2);
    assert_eq!(
        stack.get("/v1/vaults?include_archived=true").await.unwrap().body["data"]
            .as_array()
            .unwrap()
            .len(),
        3
    );
    let gone = stack.call(Method::DELETE, &path, None).await.unwrap();
    assert_eq!(gone.status, 200, "{gone:?}");
    assert_eq!(stack.get(&path).await.unwrap().status, 404);
}

#[tokio::test]
async fn a_static_bearer_reaches_its_mcp_server_and_follows_rotation() {
    let token = Arc::new(Mutex::new("first-token".to_owned()));
    let (url, port, _server) = mcp_over_http(token.clone()).await;
    let stack =
        Stack::start(Options { scripted_model: true, ..Options::default() }.reaching(&[port]))
            .await
            .unwrap();
    let allowed = json!({ "type": "mcp_toolset", "mcp_server_name": "echo", "default_config": { "permission_policy": { "type": "always_allow" } } });
    let agent = json!({
        "name": "m",
        "model": "claude-sonnet-4-5",
        "tools": [{ "type": "agent_toolset_20260401" }, allowed],
        "mcp_servers": [{ "type": "url", "name": "echo", "url": url }],
    });
    let client = Client::new(&stack, agent).await;
    let vault = created(&stack, "/v1/vaults", json!({ "display_name": "v" })).await;
    let credentials = format!("/v1/vaults/{vault}/credentials");
    // Spelled otherwise, it is the same server.
    let auth = json!({ "type": "static_bearer", "mcp_server_url": format!("{}/", url.to_uppercase().replace("/MCP", "/mcp")), "token": "first-token" });
    let credential = created(&stack, &credentials, json!({ "auth": auth })).await;
    // That of a later vault does not count, though it is of another kind.
    let later = created(&stack, "/v1/vaults", json!({ "display_name": "later" })).await;
    let other = json!({ "type": "mcp_oauth", "mcp_server_url": url, "access_token": "other" });
    let others = format!("/v1/vaults/{later}/credentials");
    created(&stack, &others, json!({ "auth": other })).await;
    let session = client.session(json!({ "vault_ids": [vault, later] })).await;
    let said = client.turn(&session, "echo by MCP: seven").await;
    assert!(said.contains("seven over HTTP"), "{said}");
    *token.lock().unwrap() = "second-token".to_owned();
    let rotate = json!({ "auth": { "type": "static_bearer", "token": "second-token" } });
    assert_eq!(
        stack.post(&format!("{credentials}/{credential}"), rotate).await.unwrap().status,
        200
    );
    let said = client.turn(&session, "echo by MCP: eight").await;
    assert!(said.contains("eight over HTTP"), "{said}");
}

/// A token endpoint: rotates refresh tokens, and ends the grant if one is used twice.
#[derive(Clone)]
struct TokenEndpoint {
    /// What the MCP server demands.
    access_token: Arc<Mutex<String>>,
    /// The refresh token that is good now; none: the grant has ended.
    refresh_token: Arc<Mutex<Option<String>>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl TokenEndpoint {
    async fn start(&self) -> (String, u16, tokio::task::JoinSet<std::io::Result<()>>) {
        use axum::{Json, extract::State, http::HeaderMap, http::StatusCode};
        let answer = async |State(endpoint): State<Self>, headers: HeaderMap, body: String| {
            // client:s3cr3t/+
            let basic = headers["authorization"] == "Basic Y2xpZW50OnMzY3IzdCUyRiUyQg==";
            let form: std::collections::BTreeMap<String, String> =
                reqwest::Url::parse(&format!("http://x/?{body}"))
                    .unwrap()
                    .query_pairs()
                    .into_owned()
                    .collect();
            let count = {
                let mut asked = endpoint.asked.lock().unwrap();
                asked.push(body.clone());
                asked.len()
            };
            // Long enough for all who find the token expired to ask.
            tokio::time::sleep(std::time::Duration::from_millis(300)).await;
            let mut good = endpoint.refresh_token.lock().unwrap();
            let is_good = basic
                && form["grant_type"] == "refresh_token"
                && form["scope"] == "tools"
                && good.as_ref() == Some(&form["refresh_token"]);
            if !is_good {
                *good = None;
                return (StatusCode::BAD_REQUEST, Json(json!({ "error": "invalid_grant" })));
            }
            let (access, refresh) = (format!("access-{count}"), format!("refresh-{count}"));
            *endpoint.access_token.lock().unwrap() = access.clone();
            *good = Some(refresh.clone());
            let answer = json!({ "access_token": access, "token_type": "Bearer", "expires_in": 3600, "refresh_token": refresh });
            (StatusCode::OK, Json(answer))
        };
        let router = axum::Router::new()
            .route("/token", axum::routing::post(answer))
            .with_state(self.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut server = tokio::task::JoinSet::new();
        server.spawn(axum::serve(listener, router).into_future());
        (format!("http://{address}/token"), address.port(), server)
    }

    fn count(&self) -> usize {
        self.asked.lock().unwrap().len()
    }

    /// As after the access token's life.
    fn expire(&self) {
        *self.access_token.lock().unwrap() = "expired".to_owned();
    }
}

#[tokio::test]
async fn an_access_token_is_refreshed_on_its_way_to_the_mcp_server() {
    let endpoint = TokenEndpoint {
        access_token: Arc::new(Mutex::new("access-0".to_owned())),
        refresh_token: Arc::new(Mutex::new(Some("refresh-0".to_owned()))),
        asked: Arc::default(),
    };
    let (url, port, _server) = mcp_over_http(endpoint.access_token.clone()).await;
    let (token_endpoint, token_port, _token_server) = endpoint.start().await;
    let options = Options { scripted_model: true, ..Options::default() };
    let stack = Stack::start(options.reaching(&[port, token_port])).await.unwrap();
    let allowed = json!({ "type": "mcp_toolset", "mcp_server_name": "echo", "default_config": { "permission_policy": { "type": "always_allow" } } });
    let agent = json!({
        "name": "m",
        "model": "claude-sonnet-4-5",
        "tools": [{ "type": "agent_toolset_20260401" }, allowed],
        "mcp_servers": [{ "type": "url", "name": "echo", "url": url }],
    });
    let client = Client::new(&stack, agent).await;
    let vault = created(&stack, "/v1/vaults", json!({ "display_name": "v" })).await;
    let credentials = format!("/v1/vaults/{vault}/credentials");
    let auth = json!({
        "type": "mcp_oauth",
        "mcp_server_url": url,
        "access_token": "access-0",
        "refresh": {
            "client_id": "client",
            "refresh_token": "refresh-0",
            "token_endpoint": token_endpoint,
            "token_endpoint_auth": { "type": "client_secret_basic", "client_secret": "s3cr3t/+" },
            "scope": "tools",
        },
    });
    let credential = created(&stack, &credentials, json!({ "auth": auth })).await;
    let session = client.session(json!({ "vault_ids": [vault] })).await;
    let said = client.turn(&session, "echo by MCP: one").await;
    assert!(said.contains("one over HTTP"), "{said}");
    assert_eq!(endpoint.count(), 0, "it is not refreshed before its time");

    // Of several sessions at once, one refreshes: the endpoint takes each refresh token once.
    for word in ["two", "three"] {
        endpoint.expire();
        let before = endpoint.count();
        let others = [client.session(json!({ "vault_ids": [vault] })).await, session.clone()];
        let prompt = format!("echo by MCP: {word}");
        let said =
            futures::future::join_all(others.iter().map(|session| client.turn(session, &prompt)));
        for said in said.await {
            assert!(said.contains(&format!("{word} over HTTP")), "{said}");
        }
        assert_eq!(endpoint.count(), before + 1, "{:?}", endpoint.asked.lock().unwrap());
    }

    let path = format!("{credentials}/{credential}");
    let shown = stack.get(&path).await.unwrap().body;
    for secret in ["access-", "refresh-", "s3cr3t"] {
        assert!(!shown.to_string().contains(secret), "{shown}");
    }
    assert_eq!(
        (&shown["auth"]["refresh"]["token_endpoint_auth"], &shown["auth"]["refresh"]["client_id"]),
        (&json!({ "type": "client_secret_basic" }), &json!("client"))
    );

    // A grant that has ended is not asked for again, until the user brings another.
    endpoint.expire();
    *endpoint.refresh_token.lock().unwrap() = None;
    let before = endpoint.count();
    for _ in 0..2 {
        let said = client.turn(&session, "echo by MCP: four").await;
        assert!(!said.contains("four over HTTP"), "{said}");
    }
    assert_eq!(endpoint.count(), before + 1);
    *endpoint.access_token.lock().unwrap() = "access-9".to_owned();
    *endpoint.refresh_token.lock().unwrap() = Some("refresh-9".to_owned());
    let expired = "2020-01-01T00:00:00Z";
    let rotate = json!({ "auth": { "type": "mcp_oauth", "access_token": "access-8", "expires_at": expired, "refresh": { "refresh_token": "refresh-9" } } });
    let rotated = stack.post(&path, rotate).await.unwrap();
    assert_eq!((rotated.status, &rotated.body["auth"]["expires_at"]), (200, &json!(expired)));
    assert_eq!(rotated.body["auth"]["refresh"]["client_id"], "client");
    let session = client.session(json!({ "vault_ids": [vault] })).await;
    let said = client.turn(&session, "echo by MCP: five").await;
    assert!(said.contains("five over HTTP"), "{said}");
    assert_eq!(endpoint.count(), before + 2, "it is refreshed before it is sent");
}

// --- files
// -----------------------------------------------------------------------------------------
