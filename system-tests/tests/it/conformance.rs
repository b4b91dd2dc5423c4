//! Events of `/v1` while services are killed. `make conformance` runs Anthropic's SDKs.

use std::{
    path::Path,
    process::Command,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::StreamExt as _;
use rustix::process::Signal;
use serde_json::{Value, json};
use system_tests::{Options, Stack};

const MODEL: Options = Options {
    scripted_model: true,
    runners: 1,
    replicas: 1,
    nats_servers: 1,
    no_restart: false,
    settings: &[],
};
const PATIENCE: Duration = Duration::from_secs(240);

/// What the set-up installs, below the checkout.
fn installed(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv").join(path)
}

fn suite(file: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/conformance").join(file)
}

fn pinned(name: &str) -> String {
    let versions = include_str!("../../../scripts/versions.env");
    versions.lines().find_map(|line| line.strip_prefix(&format!("{name}="))).unwrap().to_owned()
}

/// Runs a suite to its end, which succeeds if every check passes.
async fn passes(stack: &Stack, mut command: Command) {
    command
        .env("BASE_URL", stack.ready_text("/api_url"))
        .env("API_KEY", stack.ready_text("/api_key"));
    let output =
        tokio::time::timeout(PATIENCE, tokio::task::spawn_blocking(move || command.output()));
    let output = output.await.unwrap().unwrap().unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{text}");
}

/// One after the other, for each starts many CLIs. All SDKs with all runtimes: `make conformance`.
#[tokio::test]
#[ignore = "takes minutes on two busy cores; run by hand and by `make conformance`"]
async fn the_newest_sdks_pass_the_suite_with_claude() {
    let stack = Stack::start(MODEL).await.unwrap();
    let mut command = Command::new(installed("node/node"));
    command.arg(suite("suite.mjs")).env("NODE_MODULES_OF", installed("anthropic-js"));
    passes(&stack, command).await;
    let mut command =
        Command::new(installed(&format!("anthropic-{}/bin/python", pinned("ANTHROPIC_VERSION"))));
    // 28 waits for all of the CLI's own retries, for minutes.
    command.arg(suite("suite.py")).args([
        "--runtimes",
        "claude",
        "--parallel",
        "2",
        "--skip",
        "28",
    ]);
    passes(&stack, command).await;
}

/// As `/v1` writes the id of a session: 22 digits of base 58.
fn managed(session: &str) -> String {
    const DIGITS: &[u8; 58] = b"123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";
    let mut bits = session.parse::<types::SessionId>().unwrap().uuid().as_u128();
    let mut digits: Vec<char> = Vec::new();
    for _ in 0..22 {
        digits.push(char::from(DIGITS[(bits % 58) as usize]));
        bits /= 58;
    }
    format!("sesn_01{}", digits.into_iter().rev().collect::<String>())
}

/// A client that reconnects behind the last event that it has.
struct Reader {
    url: String,
    key: String,
    seen: Arc<Mutex<Vec<Value>>>,
}

impl Reader {
    async fn run(self, mut last: String) {
        let client = client();
        loop {
            let url = format!("{}?after_id={last}", self.url);
            if let Ok(answer) = client.get(url).header("x-api-key", &self.key).send().await
                && answer.status().is_success()
            {
                let (mut bytes, mut text) = (answer.bytes_stream(), Vec::new());
                while let Some(Ok(chunk)) = bytes.next().await {
                    text.extend_from_slice(&chunk);
                    // What was cut off is sent again.
                    while let Some(end) = text.windows(2).position(|pair| pair == b"\n\n") {
                        let frame = String::from_utf8(text.drain(..end + 2).collect()).unwrap();
                        let Some(data) = frame.lines().find_map(|line| line.strip_prefix("data: "))
                        else {
                            continue;
                        };
                        let event: Value = serde_json::from_str(data).unwrap();
                        // Told before the log has it: it comes again.
                        if event["processed_at"].is_null() {
                            continue;
                        }
                        last = event["id"].as_str().unwrap().to_owned();
                        assert!(frame.contains(&format!("\nid: {last}\n")), "{frame}");
                        self.seen.lock().unwrap().push(event);
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Heartbeats come more often than it waits.
fn client() -> reqwest::Client {
    let times = reqwest::Client::builder()
        .connect_timeout(Duration::from_secs(2))
        .read_timeout(Duration::from_secs(15));
    times.build().unwrap()
}

fn count(events: &[Value], kind: &str) -> usize {
    events.iter().filter(|event| event["type"] == kind).count()
}

/// The events of a session, as `/v1` lists them.
async fn listed(stack: &Stack, path: &str) -> Vec<Value> {
    let answer = stack.get(path).await.ok().filter(|answer| answer.status == 200);
    answer.and_then(|answer| answer.body["data"].as_array().cloned()).unwrap_or_default()
}

async fn post(stack: &Stack, path: &str, body: &Value) -> Value {
    let url = format!("{}{path}", stack.ready_text("/api_url"));
    let answer = client()
        .post(url)
        .json(body)
        .header("x-api-key", stack.ready_text("/api_key"))
        .send()
        .await
        .unwrap();
    let status = answer.status();
    let body: Value = answer.json().await.unwrap();
    assert_eq!(status, 200, "{body}");
    body
}

#[tokio::test]
async fn a_custom_tools_result_reaches_the_agent_once_though_gateway_and_runner_are_killed() {
    let stack = Stack::start(MODEL).await.unwrap();
    let environment = post(&stack, "/v1/environments", &json!({ "name": "custom" })).await;
    let schema = json!({ "type": "object", "properties": { "question": { "type": "string" } } });
    let tool = json!({ "type": "custom", "name": "ask", "description": "Asks the client", "input_schema": schema });
    let agent = json!({ "name": "a", "model": "claude-sonnet-4-5", "tools": [tool] });
    let agent = post(&stack, "/v1/agents", &agent).await;
    let text = |text: &str| json!([{ "type": "text", "text": text }]);
    let message = json!({ "type": "user.message", "content": text("ask the client: how many?") });
    let session = json!({ "agent": agent["id"], "environment_id": environment["id"], "initial_events": [message] });
    let session = post(&stack, "/v1/sessions", &session).await;
    let path = format!("/v1/sessions/{}/events", session["id"].as_str().unwrap());
    testkit::eventually("the agent asks", || async {
        count(&listed(&stack, &path).await, "agent.custom_tool_use") == 1
    })
    .await;
    let events = listed(&stack, &path).await;
    let used = events.iter().find(|event| event["type"] == "agent.custom_tool_use").unwrap();
    assert_eq!(
        events.last().unwrap()["stop_reason"],
        json!({ "type": "requires_action", "event_ids": [used["id"]] })
    );

    Stack::signal(&stack.pids("gateway"), Signal::KILL);
    testkit::eventually("another gateway lists the same", || async {
        listed(&stack, &path).await == events
    })
    .await;
    // The result is there before the runner's successor is.
    Stack::signal(&stack.pids("sprite-runner"), Signal::KILL);
    let result = json!({ "type": "user.custom_tool_result", "custom_tool_use_id": used["id"], "content": text("forty-two") });
    post(&stack, &path, &json!({ "events": [result] })).await;
    let ends =
        |events: &[Value]| events.iter().any(|event| event["stop_reason"]["type"] == "end_turn");
    testkit::eventually("the turn ends", || async { ends(&listed(&stack, &path).await) }).await;
    let events = listed(&stack, &path).await;
    assert_eq!(
        (count(&events, "user.custom_tool_result"), count(&events, "agent.custom_tool_use")),
        (1, 1),
        "{events:?}"
    );
    let said = events
        .iter()
        .filter(|event| event["type"] == "agent.message")
        .map(|event| event["content"].to_string());
    assert!(said.collect::<String>().contains("forty-two"), "{events:?}");
}

#[tokio::test]
async fn a_reader_that_reconnects_by_id_sees_each_event_once_while_services_are_killed() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let session = stack.session("shell", "echo 0").await.unwrap();
    stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let path = format!("/v1/sessions/{}/events", managed(&session));
    let before = stack.get(&path).await.unwrap().body["data"].as_array().unwrap().clone();
    let last = before.last().unwrap()["id"].as_str().unwrap().to_owned();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let url = format!("{}{path}/stream", stack.ready_text("/api_url"));
    let reader = Reader { url, key: stack.ready_text("/api_key"), seen: seen.clone() };
    let mut reading = tokio::task::JoinSet::new();
    reading.spawn(reader.run(last));

    let client = client();
    // One key for all attempts: what was carried out though its answer was lost is not done twice.
    let accepted = async |path: &str, body: &Value, key: &str| {
        let sent = async {
            loop {
                let request = client
                    .post(format!("{}{path}", stack.ready_text("/api_url")))
                    .json(body)
                    .header("idempotency-key", key);
                match request.header("x-api-key", stack.ready_text("/api_key")).send().await {
                    Ok(answer) if answer.status() == 200 => return,
                    _ => tokio::time::sleep(Duration::from_millis(100)).await,
                }
            }
        };
        tokio::time::timeout(PATIENCE, sent).await.unwrap();
    };
    let environment = post(&stack, "/v1/environments", &json!({ "name": "faults" })).await;
    let agent = json!({ "name": "a", "model": "claude-sonnet-4-5", "metadata": { "aod.runtime": "shell" } });
    let agent = post(&stack, "/v1/agents", &agent).await;
    let services = ["gateway", "sprite-runner", "scheduler", "nats", "gateway"];
    for (turn, service) in services.into_iter().enumerate() {
        let content =
            json!([{ "type": "text", "text": format!("echo begin; sleep 1; echo {turn}") }]);
        let body = json!({ "events": [{ "type": "user.message", "content": content }] });
        accepted(&path, &body, &format!("turn {turn}")).await;
        tokio::time::sleep(Duration::from_millis(400)).await;
        let pids = stack.pids(service);
        assert!(!pids.is_empty(), "{service}");
        Stack::signal(&pids, Signal::KILL);
        let session =
            json!({ "agent": agent["id"], "environment_id": environment["id"], "title": service });
        accepted("/v1/sessions", &session, &format!("session {turn}")).await;
        testkit::eventually("the turn ends on the stream", || async {
            count(&seen.lock().unwrap(), "session.status_idle") == turn + 1
        })
        .await;
    }
    let mut listed = Vec::new();
    testkit::eventually("the list is read", || async {
        stack.get(&path).await.is_ok_and(|answer| answer.status == 200)
    })
    .await;
    listed.extend(stack.get(&path).await.unwrap().body["data"].as_array().unwrap().clone());
    reading.shutdown().await;
    let seen = seen.lock().unwrap().clone();
    let ids = |events: &[Value]| {
        events.iter().map(|event| event["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(ids(&seen), ids(&listed[before.len()..]));
    assert_eq!(count(&seen, "user.message"), services.len());
    let created = format!("/v1/sessions?agent_id={}&order=asc", agent["id"].as_str().unwrap());
    let created = stack.get(&created).await.unwrap().body["data"].as_array().unwrap().clone();
    assert_eq!(
        created.iter().map(|session| session["title"].as_str().unwrap()).collect::<Vec<_>>(),
        services
    );
    assert!(
        listed
            .windows(2)
            .all(|pair| pair[0]["processed_at"].as_str() < pair[1]["processed_at"].as_str())
    );
}
