//! The command line, as a person types it.

use std::{
    io::Write as _,
    process::{Command, Output, Stdio},
};

use serde_json::Value;
use system_tests::{Options, Stack};

fn run(stack: &Stack, args: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = stack.aod(args).unwrap().output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

#[tokio::test]
async fn run_leaves_with_the_turns_code_and_prints_its_output() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let (code, stdout, stderr) =
        run(&stack, &["run", "--runtime", "shell", "echo hi; echo oops >&2; exit 3"]);
    assert_eq!((code, stdout.as_str()), (Some(3), "hi\n"));
    assert!(stderr.contains("oops") && stderr.contains("create_sprite"), "{stderr}");

    let session = stderr.lines().find_map(|line| line.strip_prefix("session ")).unwrap();
    let (code, stdout, _) = run(&stack, &["logs", session]);
    assert_eq!((code, stdout.as_str()), (Some(3), "hi\n"));
    let (code, stdout, _) = run(&stack, &["--output", "json", "sessions", "list"]);
    let sessions: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(
        (code, sessions[0]["id"].as_str(), &sessions[0]["exit_code"]),
        (Some(0), Some(session), &Value::from(3))
    );
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
        stderr.contains("No API key configured for runtime: claude")
            && stderr.contains("aod credentials set provider:anthropic"),
        "{stderr}"
    );
    let output =
        stack.aod(&["agents", "list"]).unwrap().env("AOD_API_TOKEN", "aod_wrong").output().unwrap();
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("AOD_API_TOKEN must hold a valid key")
    );
    let output = stack
        .aod(&["agents", "list"])
        .unwrap()
        .env("AOD_API_URL", "http://127.0.0.1:9")
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("Is the service running?"));
    let (code, stdout, _) = run(&stack, &["completions", "bash"]);
    assert!(code == Some(0) && stdout.contains("complete -F"));
}

/// Runs a line of bash in which `$aod` is the command.
fn shell(stack: &Stack, line: &str) -> (Option<i32>, String, String) {
    let aod = stack.aod(&[]).unwrap();
    let mut bash = Command::new("bash");
    bash.args(["-o", "pipefail", "-c", line]).env("aod", aod.get_program());
    bash.envs(aod.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .env_remove("RUST_BACKTRACE");
    let Output { status, stdout, stderr } = bash.output().unwrap();
    (
        status.code(),
        String::from_utf8_lossy(&stdout).into_owned(),
        String::from_utf8_lossy(&stderr).into_owned(),
    )
}

/// As `grep`, `git` and `curl` do: a reader that has seen enough ends the command without a word;
/// what cannot be written is an error.
#[tokio::test]
async fn a_closed_pipe_ends_a_command_and_a_full_disk_fails_it() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let (code, session, _) = shell(&stack, "$aod run --detach --runtime shell 'seq 100000'");
    assert_eq!(code, Some(0));
    let session = session.trim();
    let (code, last, _) = shell(&stack, &format!("$aod logs -f {session} | tail -n 1"));
    assert_eq!((code, &*last), (Some(0), "100000\n"));
    let logs = format!("$aod logs {session}");
    let json = format!("$aod --output json logs {session}");
    for command in ["$aod completions bash", "$aod completions zsh", "$aod --help", &logs, &json] {
        let (code, _, stderr) = shell(&stack, &format!("{command} | head -n 1"));
        assert!(
            matches!(code, Some(0 | 141)) && !stderr.contains("panicked"),
            "{command}: {code:?} {stderr}"
        );
    }
    let run = "$aod run --runtime shell 'echo x'";
    for command in [
        "$aod agents list",
        "$aod --output json sessions list",
        "$aod completions fish",
        "$aod health",
        &logs,
        run,
    ] {
        let (code, _, stderr) = shell(&stack, &format!("{command} >/dev/full"));
        assert_eq!(code, Some(1), "{command}: {stderr}");
        assert!(
            stderr.contains("cannot write to standard output: No space left on device"),
            "{command}: {stderr}"
        );
    }
    // Nothing is said to a standard error that takes nothing, and the command's code is its own.
    assert_eq!(
        shell(&stack, "$aod run --runtime shell 'echo x; exit 3' 2>/dev/full"),
        (Some(3), "x\n".to_owned(), String::new())
    );
}

#[tokio::test]
async fn keys_urls_and_proxies_work_or_are_named() {
    let stack = Stack::start(Options::default()).await.unwrap();
    for end in ["\n", "\r\n", "\r", " ", "\t\n"] {
        let key = format!("{}{end}", stack.ready_text("/api_key"));
        assert!(
            stack
                .aod(&["keys", "list"])
                .unwrap()
                .env("AOD_API_TOKEN", key)
                .output()
                .unwrap()
                .status
                .success(),
            "{end:?}"
        );
    }
    let refusal = |command: &mut Command| {
        let Output { status, stderr, .. } = command.output().unwrap();
        let stderr = String::from_utf8(stderr).unwrap();
        assert_eq!(status.code(), Some(1), "{stderr}");
        stderr
    };
    for (key, named) in [
        ("aod_a\naod_b", "AOD_API_TOKEN holds characters"),
        ("aod_\u{e9}", "AOD_API_TOKEN holds"),
        (" \n", "AOD_API_TOKEN is not set"),
    ] {
        let stderr = refusal(stack.aod(&["keys", "list"]).unwrap().env("AOD_API_TOKEN", key));
        assert!(stderr.contains(named), "{key:?}: {stderr}");
    }

    let url = stack.ready_text("/api_url");
    let address = url.strip_prefix("http://").unwrap();
    for works in [&url, &format!("{url}/"), &format!(" {url}\n")] {
        assert!(
            stack
                .aod(&["keys", "list"])
                .unwrap()
                .env("AOD_API_URL", works)
                .output()
                .unwrap()
                .status
                .success(),
            "{works:?}"
        );
    }
    for wrong in [address, "localhost", "ftp://127.0.0.1", "http://", "/run/aod.sock"] {
        let stderr = refusal(stack.aod(&["health"]).unwrap().env("AOD_API_URL", wrong));
        assert!(
            stderr.contains(&format!("{wrong:?} is not an API URL"))
                && stderr.contains("http:// or https://"),
            "{wrong}: {stderr}"
        );
    }

    let proxies = ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"];
    for variable in proxies {
        let dead = "http://127.0.0.1:9";
        assert!(
            stack.aod(&["health"]).unwrap().env(variable, dead).output().unwrap().status.success(),
            "{variable}, to loopback"
        );
        if variable != "HTTPS_PROXY" {
            let mut elsewhere = stack.aod(&["health"]).unwrap();
            let stderr =
                refusal(elsewhere.env(variable, dead).env("AOD_API_URL", "http://aod.example.org"));
            assert!(stderr.contains(&format!("A proxy is configured: {variable}")), "{stderr}");
        }
    }
}

#[tokio::test]
async fn prompts_come_as_arguments_from_files_and_from_standard_input() {
    let stack = Stack::start(Options::default()).await.unwrap();
    // More than an argument may hold.
    let prompt = format!("echo {} | wc -c\n", "x".repeat(200_000));
    let file = stack.data_dir().join("prompt.sh");
    std::fs::write(&file, &prompt).unwrap();
    let given = |args: &[&str], input: &str| {
        let mut command = stack.aod(&[&["run", "--runtime", "shell"], args].concat()).unwrap();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Where it is not read, the pipe is closed.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
        (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
    };
    for (args, input) in [
        (&["-"] as &[&str], &*prompt),
        (&[], &prompt),
        (&["--prompt-file", file.to_str().unwrap()], ""),
    ] {
        let (code, stdout, stderr) = given(args, input);
        assert_eq!((code, stdout.trim()), (Some(0), "200001"), "{args:?}: {stderr}");
    }
    for (args, input, said) in [
        (&["-"] as &[&str], " \n", "the prompt is empty"),
        (&[], "", "the prompt is empty"),
        (&["--prompt-file", "/nowhere/prompt"], "", "/nowhere/prompt"),
    ] {
        let (code, _, stderr) = given(args, input);
        assert!(code == Some(1) && stderr.contains(said), "{args:?}: {code:?} {stderr}");
    }

    // What is detached can be followed by its id.
    let (code, stdout, stderr) =
        given(&["--detach", "--env", "A=b", "--metadata", "k=v", "echo $A"], "");
    let id = stdout.trim();
    assert!(code == Some(0) && id.parse::<types::SessionId>().is_ok(), "{stdout}{stderr}");
    let (code, stdout, _) = run(&stack, &["logs", "--follow", id]);
    assert_eq!((code, stdout.as_str()), (Some(0), "b\n"));
    assert_eq!(stack.get(&format!("/sessions/{id}")).await.unwrap().body["metadata"]["k"], "v");
    let (code, stdout, _) =
        run(&stack, &["--output", "json", "run", "--detach", "--session", id, "true"]);
    let turn: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(
        (code, turn["id"].as_str(), &turn["current_turn"]),
        (Some(0), Some(id), &Value::from(2))
    );
}
