//! The command line, as a person types it.

use std::process::Output;

use serde_json::Value;
use system_tests::{Options, Stack};

fn run(stack: &Stack, args: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = stack.aod(args).unwrap().output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

#[tokio::test]
async fn run_leaves_with_the_turns_code_and_prints_its_output() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let (code, stdout, stderr) = run(&stack, &["run", "--runtime", "shell", "echo hi; echo oops >&2; exit 3"]);
    assert_eq!((code, stdout.as_str()), (Some(3), "hi\n"));
    assert!(stderr.contains("oops") && stderr.contains("create_sprite"), "{stderr}");

    let session = stderr.lines().find_map(|line| line.strip_prefix("session ")).unwrap();
    let (code, stdout, _) = run(&stack, &["logs", session]);
    assert_eq!((code, stdout.as_str()), (Some(3), "hi\n"));
    let (code, stdout, _) = run(&stack, &["--output", "json", "sessions", "list"]);
    let sessions: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, sessions[0]["id"].as_str(), &sessions[0]["exit_code"]), (Some(0), Some(session), &Value::from(3)));
    // A second run finds the first one's agent.
    assert_eq!(run(&stack, &["run", "--runtime", "shell", "true"]).0, Some(0));
    assert_eq!(stack.get("/agents").await.unwrap().body["data"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn an_error_says_what_to_do() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let (code, _, stderr) = run(&stack, &["run", "hello"]);
    assert_eq!(code, Some(1));
    assert!(
        stderr.contains("No API key configured for runtime: claude") && stderr.contains("aod credentials set provider:anthropic"),
        "{stderr}"
    );
    let output = stack.aod(&["agents", "list"]).unwrap().env("AOD_API_TOKEN", "aod_wrong").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("AOD_API_TOKEN must hold a valid key"));
    let output = stack.aod(&["agents", "list"]).unwrap().env("AOD_API_URL", "http://127.0.0.1:9").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("Is the service running?"));
    let (code, stdout, _) = run(&stack, &["completions", "bash"]);
    assert!(code == Some(0) && stdout.contains("complete -F"));
}
