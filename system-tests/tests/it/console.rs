//! The web console in a real browser: `console/e2e/console.mjs` uses it as a person does.

use std::{path::Path, process::Stdio, time::Duration};

use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};
use system_tests::{Options, Stack};
use tokio::process::Command;

const MODEL: Options = Options {
    scripted_model: true,
    runners: 1,
    replicas: 1,
    nats_servers: 1,
    no_restart: false,
    settings: &[],
};
/// Events of the long session.
const LONG: i64 = 100_000;
const PATIENCE: Duration = Duration::from_secs(600);

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// A session with 100,000 messages, the same one again and again, between its first events and its
/// end.
async fn long_session(stack: &Stack) -> String {
    let agent = json!({ "name": "Long", "runtime": "claude", "model": "claude-sonnet-4-5" });
    let agent = stack.post("/agents", agent).await.unwrap();
    let session = stack
        .post("/sessions", json!({ "agent_id": agent.text("id"), "prompt": "a message" }))
        .await
        .unwrap();
    let id = session.text("id").to_owned();
    testkit::eventually("the turn ends", async || {
        stack
            .get(&format!("/sessions/{id}"))
            .await
            .is_ok_and(|session| session.text("status") == "completed")
    })
    .await;
    let page = stack.get(&format!("/sessions/{id}/events")).await.unwrap();
    let events = page.body["data"].as_array().unwrap();
    let number = |event: &Value| event["id"].as_i64().unwrap();
    let message = number(events.iter().find(|event| event["type"] == "agent.message").unwrap());
    let end = number(events.last().unwrap());
    let mut database = PgConnection::connect(&stack.ready_text("/database_url")).await.unwrap();
    let move_end =
        "update scheduler.event set event_id = $2 where session_id = $1::uuid and event_id = $3";
    sqlx::query(move_end)
        .bind(&id)
        .bind(end + LONG)
        .bind(end)
        .execute(&mut database)
        .await
        .unwrap();
    let repeat = "insert into scheduler.event (session_id, event_id, payload)
                  select session_id, number, payload from scheduler.event, generate_series($2, $3 - 1) as number
                  where session_id = $1::uuid and event_id = $4";
    sqlx::query(repeat)
        .bind(&id)
        .bind(end)
        .bind(end + LONG)
        .bind(message)
        .execute(&mut database)
        .await
        .unwrap();
    id
}

/// Runs a script of `console/e2e` against the stack, and returns what it prints.
async fn browse(stack: &Stack, script: &str, settings: &[(&str, &str)]) -> String {
    assert!(
        root().join("console/node_modules/playwright-core").exists(),
        "run `make console` first"
    );
    let node = root().join(".venv/node/node");
    let mut command = Command::new(if node.exists() { node } else { "node".into() });
    command
        .arg(root().join("console/e2e").join(script))
        .env("AOD_API_URL", stack.ready_text("/api_url"))
        .env("AOD_API_TOKEN", stack.ready_text("/api_key"))
        .envs(settings.iter().copied())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(PATIENCE, command.output()).await.unwrap().unwrap();
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    println!("{out}");
    out.into_owned()
}

#[tokio::test]
async fn a_person_uses_the_console_in_a_browser() {
    let stack = Stack::start(MODEL).await.unwrap();
    let long = long_session(&stack).await;
    let ready = stack.data_dir().join("ready.json");
    let screenshot = std::env::temp_dir().join("console-failure.png");
    let settings = [
        ("AOD_LONG_SESSION", long.as_str()),
        ("AOD_READY_FILE", ready.to_str().unwrap()),
        ("FAILURE_SCREENSHOT", screenshot.to_str().unwrap()),
    ];
    browse(&stack, "console.mjs", &settings).await;
}

/// The browser uses little while an agent writes about 50 events a second, as Claude Code does
/// when neither the model nor its tools take time.
#[tokio::test]
async fn a_busy_session_is_followed_with_little_of_a_core_and_without_growing() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("script.json");
    let text = "I look at **the next file**, and say `what` I find there in a sentence or two.";
    let steps = vec![json!({ "text": text, "shell": "seq 12" }); 2000];
    std::fs::write(&script, json!([{ "when": "keep at it", "steps": steps }]).to_string()).unwrap();
    let script = script.to_str().unwrap().to_owned();
    let stack = Stack::start(MODEL.with("SCRIPTED_MODEL_SCRIPT", script)).await.unwrap();
    let report: Value = serde_json::from_str(&browse(&stack, "busy.mjs", &[]).await).unwrap();
    let number = |path: &str| report.pointer(path).and_then(Value::as_f64).unwrap();
    // On a machine that runs other tests too, the agent is slower and events wait longer.
    assert!(number("/events_per_second") > 10.0, "{report}");
    assert!(number("/cpu_share") < 0.3, "{report}");
    assert!(number("/event_to_pixel_ms/p50") < 250.0, "{report}");
    assert!(number("/heap_mb/after") < number("/heap_mb/before") + 4.0, "{report}");
}

/// A console session ends when its time is over, when it is signed out, and with its key.
#[tokio::test]
async fn a_console_session_ends_with_its_time_and_with_its_key() {
    let stack = Stack::start(Options {
        settings: &[("AOD_CONSOLE_SESSION_SECONDS", "2")],
        scripted_model: false,
        ..MODEL
    })
    .await
    .unwrap();
    let base = stack.ready_text("/api_url");
    let sign_in = async |key: &str| {
        let request = stack
            .http
            .post(format!("{base}/console/session"))
            .header("X-Aod-Console", "1")
            .json(&json!({ "api_key": key }));
        let answer = request.send().await.unwrap();
        let cookie = answer
            .headers()
            .get("set-cookie")
            .map(|cookie| cookie.to_str().unwrap().split(';').next().unwrap().to_owned());
        (answer.status().as_u16(), cookie.unwrap_or_default())
    };
    let status = async |cookie: &str, header: bool| {
        let mut request = stack.http.get(format!("{base}/sessions")).header("Cookie", cookie);
        if header {
            request = request.header("X-Aod-Console", "1");
        }
        request.send().await.unwrap().status().as_u16()
    };
    assert_eq!(sign_in("aod_wrong").await.0, 401);
    let own = stack.ready_text("/api_key");
    let (created, cookie) = sign_in(&own).await;
    assert_eq!(
        (created, status(&cookie, true).await, status(&cookie, false).await),
        (201, 200, 401)
    );
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(status(&cookie, true).await, 401);

    let key = stack.post("/api-keys", json!({ "name": "temporary" })).await.unwrap();
    let (_, cookie) = sign_in(key.text("key")).await;
    // A stolen cookie makes no key that outlives it, nor does a key that expires.
    let by_cookie = stack
        .http
        .post(format!("{base}/api-keys"))
        .header("Cookie", &cookie)
        .header("X-Aod-Console", "1");
    assert_eq!(by_cookie.json(&json!({ "name": "mine" })).send().await.unwrap().status(), 403);
    let expires_at = "2199-01-01T00:00:00Z";
    let short = stack
        .post("/api-keys", json!({ "name": "short", "expires_at": expires_at }))
        .await
        .unwrap();
    let by_short = stack
        .http
        .post(format!("{base}/api-keys"))
        .bearer_auth(short.text("key"))
        .json(&json!({ "name": "long" }));
    let long: serde_json::Value = by_short.send().await.unwrap().json().await.unwrap();
    assert_eq!(long["expires_at"], short.body["expires_at"]);
    stack
        .call(reqwest::Method::DELETE, &format!("/api-keys/{}", key.text("id")), None)
        .await
        .unwrap();
    testkit::eventually("the session ends with its key", || async {
        status(&cookie, true).await == 401
    })
    .await;
}
