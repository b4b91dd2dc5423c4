//! Sandboxes that are prepared for sessions which do not exist yet.

use std::{collections::BTreeSet, fs};

use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};
use sprites::Client;
use system_tests::{Options, Stack};

const OPTIONS: Options = Options {
    scripted_model: true,
    runners: 1,
    replicas: 1,
    nats_servers: 1,
    no_restart: false,
    settings: &[("RUST_LOG", "info"), ("AOD_SPARE_SESSIONS_MAX", "1")],
};

/// Processes of this machine with a text in one of their files, and that file.
fn processes(file: &str, text: &str) -> Vec<(u32, String)> {
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let read = |pid: u32| {
        let content = fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        (pid, String::from_utf8_lossy(&content).into_owned())
    };
    pids.map(read).filter(|(_, content)| content.contains(text)).collect()
}

/// The processes of waiting Claude Codes, by the sessions that they are of.
fn clis() -> BTreeSet<(String, u32)> {
    let clis = processes("cmdline", "--input-format\0stream-json").into_iter();
    let with_session = |(pid, _): (u32, String)| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let environment = String::from_utf8_lossy(&environment).into_owned();
        let session =
            environment.split('\0').find_map(|var| var.strip_prefix("AOD_SESSION_ID="))?;
        Some((session.to_owned(), pid))
    };
    clis.filter_map(with_session).collect()
}

const SET_UP: &str = "echo ran >>/workspace/ran; echo installed";

/// An agent of Claude Code in an environment with a set-up script.
async fn agent(stack: &Stack, set_up: &str) -> Value {
    let environment = json!({ "name": "e", "setup_script": set_up });
    let environment = stack.post("/environments", environment).await.unwrap();
    assert_eq!(environment.status, 201, "{environment:?}");
    let agent = json!({
        "name": "a",
        "runtime": "claude",
        "model": "anthropic/claude-sonnet-4-5",
        "environment_id": environment.text("id"),
    });
    let agent = stack.post("/agents", agent).await.unwrap();
    assert_eq!(agent.status, 201, "{agent:?}");
    agent.body
}

async fn session(stack: &Stack, agent: &Value, prompt: &str) -> String {
    let session = json!({ "agent_id": agent["id"], "prompt": prompt });
    let session = stack.post("/sessions", session).await.unwrap();
    assert_eq!(session.status, 202, "{session:?}");
    session.text("id").to_owned()
}

/// The turn's raw events, until it ends.
async fn events(stack: &Stack, session: &str) -> Vec<Value> {
    let events = stack.stream(session, 0).await.unwrap().all().await.unwrap();
    assert_eq!(events.last().unwrap()["code"], 0, "{events:?}");
    events
}

async fn spares(stack: &Stack, state: &str) -> String {
    let url = format!("{}/metrics", stack.ready_text("/services/scheduler/0/admin_url"));
    let page = stack.http.get(url).send().await.unwrap().text().await.unwrap();
    let name = format!("aod_spares{{state=\"{state}\"}} ");
    page.lines().find_map(|line| line.strip_prefix(&name)).unwrap_or_default().to_owned()
}

/// The session and the process of the spare that is ready, after two sessions of the agent.
async fn spare(stack: &Stack, agent: &Value) -> (String, u32) {
    let mut sessions = Vec::new();
    for _ in 0..2 {
        let session = session(stack, agent, "hello").await;
        events(stack, &session).await;
        sessions.push(session);
    }
    let is_ready = || async { spares(stack, "ready").await == "1" };
    testkit::eventually("a spare is ready", is_ready).await;
    // Other tests may run beside this one.
    let log = fs::read_to_string(stack.data_dir().join("logs/sprite-runner-1.log")).unwrap();
    let prepared: Vec<&str> = log.lines().filter(|line| line.contains("is prepared")).collect();
    let is_spare =
        |(session, _): &(String, u32)| prepared.iter().any(|line| line.contains(session));
    let spares: Vec<_> = clis().into_iter().filter(is_spare).collect();
    let [spare] = &*spares else { panic!("{spares:?} {prepared:?}") };
    let listed = stack.get("/sessions").await.unwrap();
    let listed: Vec<&str> = listed.body["data"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|session| session["id"].as_str())
        .collect();
    sessions.reverse();
    assert_eq!(listed, sessions);
    spare.clone()
}

#[tokio::test]
async fn the_third_session_finds_its_sandbox_set_up_and_its_cli_waiting() {
    let stack = Stack::start(OPTIONS).await.unwrap();
    let agent = agent(&stack, SET_UP).await;
    let (id, pid) = spare(&stack, &agent).await;
    assert_eq!(stack.get(&format!("/sessions/{id}")).await.unwrap().status, 404);

    let adopted = session(&stack, &agent, "run: cat /workspace/ran").await;
    assert_eq!(adopted, id);
    let events = events(&stack, &adopted).await;
    assert!(clis().contains(&(id.clone(), pid)), "another process answered");
    let said: String = events.iter().filter_map(|event| event["data"].as_str()).collect();
    assert!(said.contains("The command said:\\nran"), "{said}");
    assert!(!said.contains("ran\\nran"), "the set-up ran twice: {said}");
    let log = stack.get(&format!("/sessions/{id}/events?limit=1000")).await.unwrap();
    let of_stages: String = log.body["data"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|event| !event["stage"].is_null())
        .filter_map(|event| event["data"].as_str())
        .collect();
    assert_eq!(of_stages, "installed\n", "the set-up's output is in the log once, and no other");
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
async fn a_changed_agent_gets_no_sandbox_that_was_prepared_for_the_earlier_one() {
    let stack = Stack::start(OPTIONS).await.unwrap();
    let agent = agent(&stack, SET_UP).await;
    let (id, pid) = spare(&stack, &agent).await;
    let change = json!({ "version": agent["version"], "system": "Be brief." });
    let path = format!("/agents/{}", agent["id"].as_str().unwrap());
    let changed = stack.call(Method::PUT, &path, Some(change)).await.unwrap();
    assert_eq!(changed.status, 200, "{changed:?}");
    let next = session(&stack, &agent, "hello").await;
    assert_ne!(next, id);
    events(&stack, &next).await;
    testkit::eventually("its sandbox is gone", || async { !clis().contains(&(id.clone(), pid)) })
        .await;
}

#[tokio::test]
async fn a_session_whose_prepared_sandbox_is_gone_gets_another() {
    let stack = Stack::start(OPTIONS).await.unwrap();
    let agent = agent(&stack, SET_UP).await;
    let (id, _) = spare(&stack, &agent).await;
    let client = Client::new(
        sprites::http_client().unwrap(),
        &stack.ready_text("/sprites_url"),
        stack.ready_text("/sprites_token").into(),
    );
    let tail = id.replace('-', "").split_off(12);
    let names = client.list("aod-").await.unwrap();
    let name = names.iter().find(|name| name.ends_with(&tail)).unwrap();
    client.delete(&name.parse().unwrap()).await.unwrap();

    assert_eq!(session(&stack, &agent, "run: cat /workspace/ran").await, id);
    let said: String =
        events(&stack, &id).await.iter().filter_map(|event| event["data"].as_str()).collect();
    assert!(said.contains("The command said:\\nran"), "{said}");
}

#[tokio::test]
async fn no_session_waits_for_a_spare_whose_runner_died() {
    let stack = Stack::start(OPTIONS).await.unwrap();
    let agent = agent(&stack, "sleep 5.9375").await;
    let first = session(&stack, &agent, "hello").await;
    let second = session(&stack, &agent, "hello").await;
    let all_sleep = || async { processes("cmdline", "sleep\x005.9375").len() == 3 };
    testkit::eventually("a spare is set up beside the sessions", all_sleep).await;
    Stack::signal(&stack.pids("sprite-runner"), Signal::KILL);
    let third = session(&stack, &agent, "hello").await;
    for session in [first, second, third] {
        events(&stack, &session).await;
    }
}
