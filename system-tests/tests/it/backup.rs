//! A backup, and a restore onto servers that know nothing: as docs/upgrade.md tells it.

use std::{path::PathBuf, process::Command};

use rustix::process::Signal;
use serde_json::{Value, json};
use system_tests::{Options, Stack};

const NO_RESTART: Options = Options {
    scripted_model: false,
    runners: 1,
    replicas: 1,
    nats_servers: 1,
    no_restart: true,
    settings: &[],
};

/// A tool of Postgres, run on the stack's database.
fn postgres(stack: &Stack, tool: &str, args: &[&str]) {
    let folders = glob::glob("/usr/lib/postgresql/*/bin").unwrap().flatten();
    let program = folders
        .map(|folder| folder.join(tool))
        .find(|path| path.exists())
        .unwrap_or_else(|| PathBuf::from(tool));
    let output = Command::new(program)
        .args(args)
        .arg("--dbname")
        .arg(stack.ready_text("/database_url"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{tool}: {}", String::from_utf8_lossy(&output.stderr));
}

async fn replay(stack: &Stack, session: &str) -> Vec<Value> {
    stack.stream(session, 0).await.unwrap().all().await.unwrap()
}

#[tokio::test]
async fn a_backup_is_restored_and_its_sessions_continue() {
    let stack = Stack::start(NO_RESTART).await.unwrap();
    let agent = stack.agent("shell").await.unwrap();
    let body = json!({ "agent_id": agent, "prompt": "echo 4711 >remembered; echo begun", "secret_env_vars": { "TOKEN": "kept-by-the-vault" } });
    let session = stack.post("/sessions", body).await.unwrap().text("id").to_owned();
    let before = replay(&stack, &session).await;
    assert_eq!(before.last().unwrap()["code"], 0, "{before:?}");
    let dump = tempfile::NamedTempFile::new().unwrap();
    postgres(&stack, "pg_dump", &["--format=custom", "--file", dump.path().to_str().unwrap()]);

    // The servers' data is lost; the secrets, the key-encryption key among them, were kept
    // elsewhere.
    let data = stack.stop().unwrap();
    for lost in ["postgres", "nats/store"] {
        std::fs::remove_dir_all(data.path().join(lost)).unwrap();
    }
    let empty = Stack::start_in(data, NO_RESTART).await.unwrap();
    for service in ["gateway", "sprite-runner", "scheduler", "credential-vault", "auth"] {
        Stack::signal(&empty.pids(service), Signal::TERM);
    }
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    // The roles stay: they are the servers', and have their passwords.
    postgres(
        &empty,
        "psql",
        &["--quiet", "--command", "drop schema auth, vault, scheduler cascade"],
    );
    postgres(&empty, "pg_restore", &["--exit-on-error", dump.path().to_str().unwrap()]);
    let data = empty.stop().unwrap();
    std::fs::remove_dir_all(data.path().join("nats/store")).unwrap();

    let restored = Stack::start_in(data, NO_RESTART).await.unwrap();
    assert_eq!(replay(&restored, &session).await, before, "the same events, with the same ids");
    // Its agent, its secrets and its memory are there: the Sprite was not lost.
    let prompted = restored
        .post(
            &format!("/sessions/{session}/prompt"),
            json!({ "prompt": "cat remembered; echo $TOKEN" }),
        )
        .await
        .unwrap();
    assert_eq!(prompted.status, 202, "{prompted:?}");
    let after = replay(&restored, &session).await;
    let output: String = after.iter().filter_map(|event| event["data"].as_str()).collect();
    assert_eq!(
        (output.as_str(), &after.last().unwrap()["code"]),
        ("begun\n4711\nkept-by-the-vault\n", &json!(0))
    );
    assert_eq!(&after[..before.len() - 1], &before[..before.len() - 1]);
    let ids: Vec<u64> = after
        .iter()
        .filter(|event| event["type"] != "turn_start")
        .filter_map(|event| event["id"].as_u64())
        .collect();
    assert!(ids.is_sorted_by(|a, b| a < b), "{ids:?}");
}
