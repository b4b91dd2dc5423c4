//! The web console in a real browser: `console/e2e/console.mjs` uses it as a person does.

use std::{path::Path, process::Stdio, time::Duration};

use serde_json::json;
use system_tests::{Options, Stack};
use tokio::process::Command;

const MODEL: Options = Options { scripted_model: true, runners: 1, replicas: 1, nats_servers: 1, no_restart: false, settings: &[] };
const PATIENCE: Duration = Duration::from_secs(300);

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

#[tokio::test]
async fn a_person_uses_the_console_in_a_browser() {
    let stack = Stack::start(MODEL).await.unwrap();
    let script = root().join("console/e2e/console.mjs");
    assert!(root().join("console/node_modules/playwright-core").exists(), "run `make console` first");
    let node = root().join(".venv/node/node");
    let mut command = Command::new(if node.exists() { node } else { "node".into() });
    command
        .arg(script)
        .env("AOD_API_URL", stack.ready("/api_url").as_str().unwrap())
        .env("AOD_API_TOKEN", stack.ready("/api_key").as_str().unwrap())
        .env("AOD_READY_FILE", stack.data_dir().join("ready.json"))
        .env("FAILURE_SCREENSHOT", std::env::temp_dir().join("console-failure.png"))
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(PATIENCE, command.output()).await.unwrap().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    println!("{out}");
}

/// A console session ends when its time is over, when it is signed out, and with its key.
#[tokio::test]
async fn a_console_session_ends_with_its_time_and_with_its_key() {
    let stack = Stack::start(Options { settings: &[("AOD_CONSOLE_SESSION_SECONDS", "2")], scripted_model: false, ..MODEL }).await.unwrap();
    let base = stack.ready("/api_url").as_str().unwrap().to_owned();
    let sign_in = async |key: &str| {
        let request = stack.http.post(format!("{base}/console/session")).header("X-Aod-Console", "1").json(&json!({ "api_key": key }));
        let answer = request.send().await.unwrap();
        let cookie = answer.headers().get("set-cookie").map(|cookie| cookie.to_str().unwrap().split(';').next().unwrap().to_owned());
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
    let own = stack.ready("/api_key").as_str().unwrap().to_owned();
    let (created, cookie) = sign_in(&own).await;
    assert_eq!((created, status(&cookie, true).await, status(&cookie, false).await), (201, 200, 401));
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(status(&cookie, true).await, 401);

    let key = stack.post("/api-keys", json!({ "name": "temporary" })).await.unwrap();
    let (_, cookie) = sign_in(key.text("key")).await;
    stack.call(reqwest::Method::DELETE, &format!("/api-keys/{}", key.text("id")), None).await.unwrap();
    testkit::eventually("the session ends with its key", || async { status(&cookie, true).await == 401 }).await;
}
