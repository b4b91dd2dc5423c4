//! Sessions that are created without a message: their sandboxes are ready when it comes.

use std::{collections::BTreeSet, fs};

use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};
use system_tests::{Options, Stack};

use crate::v1::{created, ours};

const OPTIONS: Options = Options {
    scripted_model: true,
    runners: 1,
    replicas: 1,
    nats_servers: 1,
    no_restart: false,
    settings: &[("RUST_LOG", "info")],
};

/// A session of `/v1` without a message, in an environment with this set-up script.
async fn session(stack: &Stack, runtime: &str, setup_script: &str) -> String {
    let agent = json!({
        "name": "a",
        "model": "claude-sonnet-4-5",
        "metadata": { "aod.runtime": runtime },
        "tools": [{ "type": "agent_toolset_20260401" }],
    });
    let agent = created(stack, "/v1/agents", agent).await;
    let name = format!("{runtime} {setup_script}");
    let environment = json!({ "name": name, "setup_script": setup_script });
    assert_eq!(stack.post("/environments", environment).await.unwrap().status, 201);
    // Set-up scripts are of the original API.
    let listed = stack.get("/v1/environments").await.unwrap();
    let environments = listed.body["data"].as_array().unwrap();
    let environment =
        environments.iter().find(|environment| environment["name"] == name.as_str()).unwrap();
    let environment = &environment["id"];
    created(stack, "/v1/sessions", json!({ "agent": agent, "environment_id": environment })).await
}

async fn events(stack: &Stack, session: &str) -> Vec<Value> {
    let path = format!("/v1/sessions/{session}/events?limit=1000");
    stack.get(&path).await.unwrap().body["data"].as_array().unwrap().clone()
}

/// The raw events of the session's only turn, which ends meanwhile.
async fn turn(stack: &Stack, session: &str, text: &str) -> Vec<Value> {
    let message = json!({ "type": "user.message", "content": [{ "type": "text", "text": text }] });
    let path = format!("/v1/sessions/{session}/events");
    let sent = stack.post(&path, json!({ "events": [message] })).await.unwrap();
    assert_eq!(sent.status, 200, "{sent:?}");
    stack.stream(&ours(session), 0).await.unwrap().all().await.unwrap()
}

fn output(events: &[Value]) -> String {
    events.iter().filter_map(|event| event["data"].as_str()).collect()
}

/// Whether the runner has said this of a session.
fn is_logged(stack: &Stack, session: &str, text: &str) -> bool {
    let log = fs::read_to_string(stack.data_dir().join("logs/sprite-runner-1.log"));
    let id = ours(session);
    log.unwrap_or_default().lines().any(|line| line.contains(text) && line.contains(&id))
}

/// Processes of this machine whose command lines contain a text.
fn running(text: &str) -> BTreeSet<u32> {
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_meant = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).replace('\0', " ").contains(text)
    };
    pids.filter(is_meant).collect()
}

/// The process of a session's Claude Code, once it takes messages.
async fn waiting_cli(stack: &Stack, session: &str) -> BTreeSet<u32> {
    let prepared = || async { is_logged(stack, session, "session is prepared") };
    testkit::eventually("the session is prepared", prepared).await;
    let id = ours(session);
    let is_its = |pid: &u32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        String::from_utf8_lossy(&environment).contains(&id)
    };
    running("--input-format stream-json").into_iter().filter(is_its).collect()
}

#[tokio::test]
async fn the_first_message_finds_its_sandbox_set_up_and_its_cli_waiting() {
    let stack = Stack::start(OPTIONS).await.unwrap();
    let session = session(&stack, "claude", "echo ran >>/workspace/ran; echo installed").await;
    let cli = waiting_cli(&stack, &session).await;
    assert_eq!(cli.len(), 1, "{cli:?}");
    let shown = stack.get(&format!("/v1/sessions/{session}")).await.unwrap();
    assert_eq!((shown.text("status"), events(&stack, &session).await.len()), ("idle", 0));

    let events = turn(&stack, &session, "run: cat /workspace/ran").await;
    assert_eq!(events.last().unwrap()["code"], 0, "{events:?}");
    assert_eq!(waiting_cli(&stack, &session).await, cli, "another process answered");
    let typed =
        stack.get(&format!("/sessions/{}/events?limit=1000", ours(&session))).await.unwrap();
    let of_stages: String = typed.body["data"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|event| !event["stage"].is_null())
        .filter_map(|event| event["data"].as_str())
        .collect();
    assert_eq!(of_stages, "installed\n", "the set-up's output is in the log once, and no other");
    let said = output(&events);
    assert!(said.contains("The command said:\\nran"), "{said}");
    assert!(!said.contains("ran\\nran"), "the set-up ran twice: {said}");
    let mut done: Vec<&str> = events
        .iter()
        .filter(|event| event["state"] == "done")
        .filter_map(|event| event["stage"].as_str())
        .collect();
    let all = done.len();
    done.sort_unstable();
    done.dedup();
    assert!(done.contains(&"provision_setup") && done.len() == all, "{events:?}");
}

#[tokio::test]
async fn a_session_whose_runner_dies_while_preparing_it_loses_nothing() {
    let stack = Stack::start(OPTIONS).await.unwrap();
    let session = session(&stack, "claude", "echo ran >>/workspace/ran; sleep 4.8125").await;
    testkit::eventually("the set-up runs", || async { !running("sleep 4.8125").is_empty() }).await;
    Stack::signal(&stack.pids("sprite-runner"), Signal::KILL);
    let events = turn(&stack, &session, "run: cat /workspace/ran").await;
    assert_eq!(events.last().unwrap()["code"], 0, "{events:?}");
    let said = output(&events);
    assert!(said.contains("The command said:\\nran") && !said.contains("ran\\nran"), "{said}");
}

#[tokio::test]
async fn a_message_during_the_preparation_is_answered_once_and_a_failed_set_up_is_reported() {
    let stack = Stack::start(OPTIONS).await.unwrap();
    let early = session(&stack, "claude", "echo ran >>/workspace/ran; sleep 1.8125").await;
    testkit::eventually("the set-up runs", || async { !running("sleep 1.8125").is_empty() }).await;
    let events = turn(&stack, &early, "run: cat /workspace/ran").await;
    assert_eq!(events.last().unwrap()["code"], 0, "{events:?}");
    let said = output(&events);
    assert!(said.contains("The command said:\\nran") && !said.contains("ran\\nran"), "{said}");

    let failing = session(&stack, "shell", "echo because >&2; exit 3").await;
    let failed = || async { is_logged(&stack, &failing, "session is not prepared") };
    testkit::eventually("the preparation fails", failed).await;
    let shown = stack.get(&format!("/v1/sessions/{failing}")).await.unwrap();
    assert_eq!(shown.text("status"), "idle", "{shown:?}");
    let events = turn(&stack, &failing, "true").await;
    let end = events.last().unwrap();
    assert_eq!(
        end["message"],
        "Provisioning failed at provision_setup: the setup script exited with 3: because",
        "{events:?}"
    );
}

#[tokio::test]
async fn a_session_that_is_deleted_while_it_is_prepared_leaves_no_sandbox() {
    let stack = Stack::start(OPTIONS).await.unwrap();
    let session = session(&stack, "shell", "sleep 300.8125").await;
    testkit::eventually("the set-up runs", || async { !running("sleep 300.8125").is_empty() })
        .await;
    let deleted = stack.call(Method::DELETE, &format!("/v1/sessions/{session}"), None).await;
    assert_eq!(deleted.as_ref().unwrap().status, 200, "{deleted:?}");
    testkit::eventually("the sandbox is gone", || async { running("sleep 300.8125").is_empty() })
        .await;
}

#[tokio::test]
async fn a_session_that_is_changed_while_its_set_up_runs_keeps_the_set_up() {
    let stack = Stack::start(OPTIONS).await.unwrap();
    let session = session(&stack, "claude", "sleep 6.8125; echo ran >>/workspace/ran").await;
    testkit::eventually("the set-up runs", || async { !running("sleep 6.8125").is_empty() }).await;
    // Its CLI will report partial messages: it takes another specification of the host.
    let followed = format!("/v1/sessions/{session}/events/stream?event_deltas[]=agent.message");
    let _following = stack.events(0, &followed).await.unwrap();
    let events = turn(&stack, &session, "run: cat /workspace/ran").await;
    assert_eq!(events.last().unwrap()["code"], 0, "{events:?}");
    let said = output(&events);
    assert!(said.contains("The command said:\\nran") && !said.contains("ran\\nran"), "{said}");
}

#[tokio::test]
async fn a_permission_that_is_tightened_before_the_first_message_holds() {
    let stack = Stack::start(OPTIONS).await.unwrap();
    let session = session(&stack, "claude", "").await;
    assert_eq!(waiting_cli(&stack, &session).await.len(), 1);
    let asks = json!({ "enabled": true, "permission_policy": { "type": "always_ask" } });
    let tools = json!([{ "type": "agent_toolset_20260401", "default_config": asks }]);
    let path = format!("/v1/sessions/{session}");
    let updated = stack.post(&path, json!({ "agent": { "tools": tools } })).await.unwrap();
    assert_eq!(updated.status, 200, "{updated:?}");
    let text = json!([{ "type": "text", "text": "run: touch /workspace/ran" }]);
    let message = json!({ "events": [{ "type": "user.message", "content": text }] });
    let sent = stack.post(&format!("{path}/events"), message).await.unwrap();
    assert_eq!(sent.status, 200, "{sent:?}");
    let asked = || async {
        let events = events(&stack, &session).await;
        events.iter().any(|event| event["stop_reason"]["type"] == "requires_action")
    };
    testkit::eventually("the command is asked about", asked).await;
}
