//! The main job: the real Claude Code, against the scripted model, through HTTP.

use serde_json::{Value, json};
use system_tests::{Options, Stack};
use types::Runtime;

const MODEL: Options = Options {
    scripted_model: true,
    runners: 1,
    replicas: 1,
    nats_servers: 1,
    no_restart: false,
    settings: &[],
};

fn text<'a>(event: &'a Value, name: &str) -> &'a str {
    event[name].as_str().unwrap_or_default()
}

fn output(events: &[Value], turn: u64) -> String {
    events.iter().filter(|event| event["turn"] == turn).map(|event| text(event, "data")).collect()
}

#[tokio::test]
async fn claude_runs_a_tool_in_its_sprite_and_remembers_it_in_the_next_turn() {
    let stack = Stack::start(MODEL).await.unwrap();
    let session = stack.session(Runtime::Claude.as_str(), "write a haiku").await.unwrap();
    let live = stack.stream(&session, 0).await.unwrap().all().await.unwrap();

    let stages: Vec<_> = live
        .iter()
        .filter(|event| event["type"] == "stage")
        .map(|event| (text(event, "stage"), text(event, "state")))
        .collect();
    let mut expected = Vec::new();
    for stage in ["create_sprite", "install_runtime", "env_file", "runtime_config"] {
        expected.extend([(stage, "started"), (stage, "done")]);
    }
    expected.push(("runtime_start", "started"));
    assert_eq!(stages, expected);
    assert_eq!(
        (text(&live[0], "type"), text(&live[0], "runtime"), text(&live[0], "session_id")),
        ("start", "claude", session.as_str())
    );
    let said = output(&live, 1);
    assert!(said.contains("I write the haiku to a file."), "{said}");
    assert!(
        said.contains(r#""name":"Write""#) && said.contains("a frog jumps into the shell"),
        "{said}"
    );
    let end = live.last().unwrap();
    assert_eq!((&end["type"], &end["code"], &end["turn"]), (&json!("exit"), &json!(0), &json!(1)));

    // The tool's effect is in the Sprite, and nowhere on this machine.
    let sprites = stack.ready_text("/sprites_url");
    let list: Value = stack
        .http
        .get(format!("{sprites}/v1/sprites"))
        .bearer_auth(stack.ready_text("/sprites_token"))
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    let sprite = list["sprites"][0]["name"].as_str().unwrap();
    let read = |path: &str| {
        stack
            .http
            .get(format!("{sprites}/v1/sprites/{sprite}/fs/read?workingDir=/&path={path}"))
            .bearer_auth(stack.ready_text("/sprites_token"))
            .send()
    };
    assert!(read("/workspace/haiku.txt").await.unwrap().text().await.unwrap().contains("Old pond"));
    assert!(!std::path::Path::new("/workspace/haiku.txt").exists());

    // What was told is so: the record is not behind the stream.
    let now = stack.get(&format!("/sessions/{session}")).await.unwrap();
    assert_eq!((now.text("status"), &now.body["exit_code"]), ("completed", &json!(0)));

    let next = stack
        .post(
            &format!("/sessions/{session}/prompt"),
            json!({ "prompt": "what was my first message?" }),
        )
        .await
        .unwrap();
    assert_eq!((next.status, &next.body["current_turn"]), (202, &json!(2)));
    let since = end["id"].as_u64().unwrap();
    let second = stack.stream(&session, since).await.unwrap().all().await.unwrap();
    assert!(output(&second, 2).contains("Your first message was: write a haiku"), "{second:?}");
    assert!(second.iter().all(|event| event["id"].as_u64().is_none_or(|id| id > since)));

    // A replay shows the same events; of the first turn its output, and not its end.
    let replay = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let mut both: Vec<Value> = live[..live.len() - 1].to_vec();
    both.extend_from_slice(&second[1..]);
    assert_eq!(replay, both);
    let turns = stack.get(&format!("/sessions/{session}/turns")).await.unwrap();
    let turns: Vec<_> = turns.body["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|turn| (turn["turn_number"].clone(), text(turn, "status").to_owned()))
        .collect();
    assert_eq!(turns, [(json!(1), "completed".to_owned()), (json!(2), "completed".to_owned())]);
}

#[tokio::test]
async fn a_model_that_fails_fails_the_turn_with_the_agents_own_words() {
    let stack = Stack::start(MODEL).await.unwrap();
    let session = stack.session("claude", "fail with 400").await.unwrap();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    assert!(output(&events, 1).contains("The script says so."), "{events:?}");
    assert_eq!(
        (&events.last().unwrap()["type"], &events.last().unwrap()["code"]),
        (&json!("exit"), &json!(1))
    );
    assert_eq!(stack.get(&format!("/sessions/{session}")).await.unwrap().text("status"), "failed");
    let refused =
        stack.post(&format!("/sessions/{session}/prompt"), json!({ "prompt": "x" })).await.unwrap();
    assert_eq!(
        (refused.status, refused.text("detail")),
        (409, "Session has failed and cannot be resumed. Start a new session.")
    );
}

#[tokio::test]
async fn terminate_kills_the_process_in_the_sprite_and_the_sprite() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let marker = format!("7{:09}", std::process::id());
    let session =
        stack.session("shell", &format!("trap '' TERM; echo begun; sleep {marker}")).await.unwrap();
    let mut events = stack.stream(&session, 0).await.unwrap();
    events.until_output("begun").await.unwrap();
    testkit::eventually("the process runs", || async { is_running(&marker) }).await;
    let answer = stack.post(&format!("/sessions/{session}/terminate"), json!({})).await.unwrap();
    assert_eq!((answer.status, answer.text("status")), (200, "terminated"));
    let rest = events.all().await.unwrap();
    assert_eq!(
        (&rest.last().unwrap()["type"], &rest.last().unwrap()["message"]),
        (&json!("terminated"), &json!("Session terminated"))
    );
    testkit::eventually("the process is gone", || async { !is_running(&marker) }).await;
    let sprites = format!("{}/v1/sprites", stack.ready_text("/sprites_url"));
    testkit::eventually("the Sprite is gone", || async {
        let list = stack
            .http
            .get(&sprites)
            .bearer_auth(stack.ready_text("/sprites_token"))
            .send()
            .await
            .unwrap();
        list.json::<Value>().await.unwrap()["sprites"].as_array().unwrap().is_empty()
    })
    .await;
    let again = stack.post(&format!("/sessions/{session}/terminate"), json!({})).await.unwrap();
    assert_eq!((again.status, again.text("detail")), (409, "Session is already terminated"));
    // A stream of a terminated session replays and ends.
    let replay = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    assert_eq!(replay.last().unwrap()["type"], "terminated");
}

#[tokio::test]
async fn terminate_in_the_middle_of_provisioning_leaves_no_sprite() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let environment = stack
        .post("/environments", json!({ "name": "slow", "setup_script": "sleep 600" }))
        .await
        .unwrap();
    let agent = stack.agent("shell").await.unwrap();
    let body =
        json!({ "agent_id": agent, "prompt": "true", "environment_id": environment.text("id") });
    let session = stack.post("/sessions", body).await.unwrap().text("id").to_owned();
    let mut events = stack.stream(&session, 0).await.unwrap();
    while events.next().await.unwrap().unwrap()["stage"] != "provision_setup" {}
    assert_eq!(
        stack.post(&format!("/sessions/{session}/terminate"), json!({})).await.unwrap().status,
        200
    );
    assert_eq!(events.all().await.unwrap().last().unwrap()["type"], "terminated");
    let sprites = format!("{}/v1/sprites", stack.ready_text("/sprites_url"));
    testkit::eventually("the Sprite is gone", || async {
        let list = stack
            .http
            .get(&sprites)
            .bearer_auth(stack.ready_text("/sprites_token"))
            .send()
            .await
            .unwrap();
        list.json::<Value>().await.unwrap()["sprites"].as_array().unwrap().is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_turn_that_takes_too_long_is_killed_with_everything_it_started() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let marker = format!("8{:09}", std::process::id());
    let agent = stack.agent("shell").await.unwrap();
    let prompt = format!("echo begun; (trap '' TERM; sleep {marker}) & wait");
    let session = stack
        .post("/sessions", json!({ "agent_id": agent, "prompt": prompt, "timeout": 10 }))
        .await
        .unwrap()
        .text("id")
        .to_owned();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let end = events.last().unwrap();
    assert_eq!(
        (&end["type"], &end["message"]),
        (&json!("error"), &json!("Turn timed out after 10s"))
    );
    assert!(!is_running(&marker));
    let now = stack.get(&format!("/sessions/{session}")).await.unwrap();
    assert_eq!(
        (now.text("status"), &now.body["exit_code"], &now.body["failure"]["stage"]),
        ("failed", &Value::Null, &json!("timeout"))
    );
}

#[tokio::test]
async fn an_environments_variables_and_setup_script_are_there_before_the_agent() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let body = json!({ "name": "e", "env_vars": { "GREETING": "it's \"quoted\"\nand long" }, "setup_script": "echo \"$GREETING\" > /workspace/greeting" });
    let environment = stack.post("/environments", body).await.unwrap();
    assert_eq!(
        (environment.status, &environment.body["env_var_names"]),
        (201, &json!(["GREETING"]))
    );
    assert!(!environment.body.to_string().contains("quoted"));
    let agent = stack.agent("shell").await.unwrap();
    let run = async |environment: &str| {
        let body = json!({ "agent_id": agent, "prompt": "cat greeting; printf %s \"$GREETING\"", "environment_id": environment });
        let session = stack.post("/sessions", body).await.unwrap().text("id").to_owned();
        stack.stream(&session, 0).await.unwrap().all().await.unwrap()
    };
    let events = run(environment.text("id")).await;
    assert_eq!(output(&events, 1), "it's \"quoted\"\nand long\nit's \"quoted\"\nand long");
    let broken = stack
        .post("/environments", json!({ "name": "b", "setup_script": "echo not today >&2; exit 4" }))
        .await
        .unwrap();
    let events = run(broken.text("id")).await;
    let message =
        "Provisioning failed at provision_setup: the setup script exited with 4: not today";
    assert_eq!(events.last().unwrap()["message"], message);
}

fn is_running(marker: &str) -> bool {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes.filter_map(|process| std::fs::read(process.path().join("cmdline")).ok()).any(|line| {
        let line = String::from_utf8_lossy(&line).into_owned();
        line.starts_with("sleep\0") && line.contains(marker)
    })
}
