//! Resources of `/v1` on the whole stack: vaults, files, and what sessions are given.

use std::sync::{Arc, Mutex};

use reqwest::Method;
use serde_json::{Value, json};
use system_tests::{Options, Stack};

use crate::runtimes::mcp_over_http;

/// What clients of `/v1` do.
struct Client<'a> {
    stack: &'a Stack,
    agent: String,
    environment: String,
}

impl<'a> Client<'a> {
    async fn new(stack: &'a Stack, agent: Value) -> Self {
        let agent = created(stack, "/v1/agents", agent).await;
        let environment = created(stack, "/v1/environments", json!({ "name": "e" })).await;
        Self { stack, agent, environment }
    }

    async fn shell(stack: &'a Stack) -> Self {
        Self::new(stack, json!({ "name": "s", "model": "claude-sonnet-4-5", "metadata": { "aod.runtime": "shell" } })).await
    }

    async fn session(&self, more: Value) -> String {
        let mut body = json!({ "agent": self.agent, "environment_id": self.environment });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        created(self.stack, "/v1/sessions", body).await
    }

    /// One turn; what the agent said and what its tools and scripts printed.
    async fn turn(&self, session: &str, text: &str) -> String {
        let path = format!("/v1/sessions/{session}/events");
        let idle = async || {
            let events = self.stack.get(&path).await.unwrap().body["data"].as_array().unwrap().clone();
            (events.iter().filter(|event| event["type"] == "session.status_idle").count(), events.is_empty())
        };
        let (before, is_first) = idle().await;
        let output = async |since: u64| self.stack.stream(&ours(session), since).await.unwrap().all().await.unwrap();
        let since = if is_first { 0 } else { output(0).await.last().unwrap()["id"].as_u64().unwrap() };
        let message = json!({ "type": "user.message", "content": [{ "type": "text", "text": text }] });
        let sent = self.stack.post(&path, json!({ "events": [message] })).await.unwrap();
        assert_eq!(sent.status, 200, "{sent:?}");
        testkit::eventually("the turn ends", || async { idle().await.0 > before }).await;
        let said: String = output(since).await.iter().filter_map(|event| event["data"].as_str()).collect();
        said.trim().to_owned()
    }
}

/// The original API's id of a session.
fn ours(session: &str) -> String {
    const DIGITS: &[u8; 58] = b"123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";
    let digit = |byte: u8| DIGITS.iter().position(|digit| *digit == byte).unwrap() as u128;
    let bits = session.strip_prefix("sesn_01").unwrap().bytes().fold(0, |bits: u128, byte| bits * 58 + digit(byte));
    types::SessionId::from_uuid(uuid::Uuid::from_u128(bits)).to_string()
}

/// The id of what a request creates.
async fn created(stack: &Stack, path: &str, body: Value) -> String {
    let made = stack.post(path, body).await.unwrap();
    assert_eq!(made.status, 200, "{path}: {made:?}");
    made.text("id").to_owned()
}

/// A key of another user.
fn foreign_key(stack: &Stack) -> String {
    let data = stack.data_dir().to_str().unwrap();
    let admin = |args: &[&str]| {
        let output = stack.aod(&[&["--output", "json", "admin", "--data-dir", data], args].concat()).unwrap().output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<Value>(&output.stdout).unwrap_or_default()
    };
    admin(&["user", "create", "mallory"]);
    admin(&["key", "create", "mallory"])["key"].as_str().unwrap().to_owned()
}

async fn status_for(stack: &Stack, key: &str, method: Method, path: &str, body: Option<Value>) -> u16 {
    let request = stack.http.request(method, format!("{}{path}", stack.ready_text("/api_url"))).bearer_auth(key);
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
        created(&stack, "/v1/vaults", json!({ "display_name": "v", "metadata": { "a": "b" } })).await,
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
    let expected = |rotated: &str, later: &str| format!("ROTATED {};LATER {};", digest(rotated), digest(later));
    assert_eq!(client.turn(&session, show).await, expected("SENTINEL-one", "SENTINEL-later"));

    // The agent's process of the first turn is still there: the second one gets the new value.
    let rotate = json!({ "auth": { "type": "environment_variable", "secret_value": "SENTINEL-two" } });
    let rotated = stack.post(&format!("{credentials}/{credential}"), rotate).await.unwrap();
    assert_eq!(rotated.status, 200, "{rotated:?}");
    assert_eq!(client.turn(&session, show).await, expected("SENTINEL-two", "SENTINEL-later"));

    // Archived, its secret is gone and its name is free; the next vault's credential counts.
    let archived = stack.post(&format!("{credentials}/{credential}/archive"), json!({})).await.unwrap();
    assert!(archived.body["archived_at"].is_string(), "{archived:?}");
    assert_eq!(client.turn(&session, show).await, expected("SENTINEL-shadowed", "SENTINEL-later"));
    created(&stack, &credentials, variable("ROTATED", "SENTINEL-three")).await;
    assert_eq!(client.turn(&session, show).await, expected("SENTINEL-three", "SENTINEL-later"));

    // A deleted vault takes its credentials along; the session goes on.
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
async fn vaults_are_paged_patched_archived_and_their_users_own() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let client = Client::shell(&stack).await;
    let mut vaults = Vec::new();
    for number in 0..3 {
        vaults
            .push(created(&stack, "/v1/vaults", json!({ "display_name": format!("v{number}"), "metadata": { "a": "1", "b": "2" } })).await);
    }
    let (mut listed, mut page) = (Vec::new(), String::new());
    loop {
        let answer = stack.get(&format!("/v1/vaults?limit=1{page}")).await.unwrap();
        listed.extend(answer.body["data"].as_array().unwrap().iter().map(|vault| vault["id"].as_str().unwrap().to_owned()));
        let Some(next) = answer.body["next_page"].as_str() else { break };
        page = format!("&page={next}");
    }
    assert_eq!(listed.iter().rev().collect::<Vec<_>>(), vaults.iter().collect::<Vec<_>>());

    let path = format!("/v1/vaults/{}", vaults[0]);
    let patched = stack.post(&path, json!({ "display_name": "w", "metadata": { "a": null, "c": "3" } })).await.unwrap();
    assert_eq!((patched.text("display_name"), &patched.body["metadata"]), ("w", &json!({ "b": "2", "c": "3" })));
    let credentials = format!("{path}/credentials");
    let credential = created(&stack, &credentials, variable("NAME", "value")).await;
    let again = stack.post(&credentials, variable("NAME", "other")).await.unwrap();
    assert_eq!((again.status, again.body["error"]["type"].as_str()), (409, Some("conflict_error")));
    assert_eq!(again.headers["x-should-retry"], "false");
    let bearer = |url: &str| json!({ "auth": { "type": "static_bearer", "mcp_server_url": url, "token": "t" } });
    created(&stack, &credentials, bearer("https://mcp.example/sse")).await;
    assert_eq!(stack.post(&credentials, bearer("HTTPS://mcp.example:443/sse/")).await.unwrap().status, 409);

    for (path, body, field) in [
        ("/v1/vaults".to_owned(), json!({}), "display_name"),
        ("/v1/vaults".to_owned(), json!({ "display_name": " " }), "display_name"),
        ("/v1/vaults".to_owned(), json!({ "display_name": "x", "nope": 1 }), "nope"),
        (credentials.clone(), json!({}), "auth"),
        (credentials.clone(), json!({ "auth": { "type": "mcp_oauth" } }), "auth.type"),
        (credentials.clone(), json!({ "auth": { "type": "static_bearer", "token": "t" } }), "mcp_server_url"),
        (credentials.clone(), variable("1", "x"), "secret_name"),
        (format!("{credentials}/{credential}"), json!({ "auth": { "type": "static_bearer", "token": "t" } }), "auth.type"),
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
        (Method::POST, format!("{credentials}/{credential}"), Some(json!({ "display_name": "mine" }))),
        (Method::POST, format!("{credentials}/{credential}/archive"), None),
        (Method::DELETE, format!("{credentials}/{credential}"), None),
    ] {
        assert_eq!(status_for(&stack, &foreign, method.clone(), &path, body).await, 404, "{method} {path}");
    }
    let key = stack.ready_text("/sprites_token");
    assert_eq!(status_for(&stack, &foreign, Method::PUT, "/credentials/backend:sprites", Some(json!({ "value": key }))).await, 200);
    let body = json!({ "name": "s", "model": "claude-sonnet-4-5", "metadata": { "aod.runtime": "shell" } });
    let url = stack.ready_text("/api_url");
    let send = async |path: &str, body: Value| {
        let answer = stack.http.post(format!("{url}{path}")).bearer_auth(&foreign).json(&body).send().await.unwrap();
        (answer.status().as_u16(), answer.json::<Value>().await.unwrap())
    };
    let (agent, environment) = (send("/v1/agents", body).await.1, send("/v1/environments", json!({ "name": "e" })).await.1);
    let theirs = json!({ "agent": agent["id"], "environment_id": environment["id"], "vault_ids": [vaults[0]] });
    assert_eq!(send("/v1/sessions", theirs).await.0, 404);

    // An archived vault is readable, takes no credentials, and no new session.
    let archived = stack.post(&format!("{path}/archive"), json!({})).await.unwrap();
    assert!(archived.body["archived_at"].is_string(), "{archived:?}");
    assert_eq!(stack.post(&format!("{path}/archive"), json!({})).await.unwrap().body, archived.body);
    let left = stack.get(&format!("{credentials}?include_archived=true")).await.unwrap();
    assert!(left.body["data"].as_array().unwrap().iter().all(|credential| credential["archived_at"].is_string()), "{left:?}");
    for (path, body) in [
        (path.clone(), json!({ "display_name": "x" })),
        (credentials.clone(), variable("NEW", "x")),
        ("/v1/sessions".to_owned(), json!({ "agent": client.agent, "environment_id": client.environment, "vault_ids": [vaults[0]] })),
    ] {
        let refused = stack.post(&path, body).await.unwrap();
        assert_eq!((refused.status, refused.body["error"]["details"]["error_code"].as_str()), (400, Some("vault_archived")), "{refused:?}");
    }
    assert_eq!(stack.get("/v1/vaults").await.unwrap().body["data"].as_array().unwrap().len(), 2);
    assert_eq!(stack.get("/v1/vaults?include_archived=true").await.unwrap().body["data"].as_array().unwrap().len(), 3);
    let gone = stack.call(Method::DELETE, &path, None).await.unwrap();
    assert_eq!(gone.status, 200, "{gone:?}");
    assert_eq!(stack.get(&path).await.unwrap().status, 404);
}

#[tokio::test]
async fn a_static_bearer_reaches_its_mcp_server_and_follows_rotation() {
    let token = Arc::new(Mutex::new("first-token".to_owned()));
    let (url, port, _server) = mcp_over_http(token.clone()).await;
    let stack = Stack::start(Options { scripted_model: true, ..Options::default() }.reaching(&[port])).await.unwrap();
    let allowed =
        json!({ "type": "mcp_toolset", "mcp_server_name": "echo", "default_config": { "permission_policy": { "type": "always_allow" } } });
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
    let session = client.session(json!({ "vault_ids": [vault] })).await;
    let said = client.turn(&session, "echo by MCP: seven").await;
    assert!(said.contains("seven over HTTP"), "{said}");
    *token.lock().unwrap() = "second-token".to_owned();
    let rotate = json!({ "auth": { "type": "static_bearer", "token": "second-token" } });
    assert_eq!(stack.post(&format!("{credentials}/{credential}"), rotate).await.unwrap().status, 200);
    let said = client.turn(&session, "echo by MCP: eight").await;
    assert!(said.contains("eight over HTTP"), "{said}");
}
