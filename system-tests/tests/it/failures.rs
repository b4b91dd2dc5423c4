//! What goes wrong for users, and what they are told: each in words that say what to do.

use axum::{Router, http::StatusCode};
use futures::future::join_all;
use serde_json::{Value, json};
use system_tests::{Options, Stack};
use tokio::task::JoinSet;

/// A session whose set-up fails; what it is told.
async fn failure(stack: &Stack, environment: Value, resources: Value) -> Value {
    let mut body = json!({ "name": format!("e-{}", fastrand::u64(..)) });
    body.as_object_mut().unwrap().extend(environment.as_object().unwrap().clone());
    let environment = stack.post("/environments", body).await.unwrap();
    assert_eq!(environment.status, 201, "{environment:?}");
    let agent = stack.agent("shell").await.unwrap();
    let body = json!({ "agent_id": agent, "environment_id": environment.text("id"), "prompt": "true", "resources": resources });
    let session = stack.post("/sessions", body).await.unwrap();
    assert_eq!(session.status, 202, "{session:?}");
    let events = stack.stream(session.text("id"), 0).await.unwrap().all().await.unwrap();
    let session = stack.get(&format!("/sessions/{}", session.text("id"))).await.unwrap();
    assert_eq!(session.text("status"), "failed", "{session:?}");
    let failure = session.body["failure"].clone();
    assert_eq!(events.last().unwrap()["message"], failure["message"]);
    failure
}

/// A server that refuses to serve its repositories.
async fn locked_git_server() -> (String, u16, JoinSet<()>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let locked =
        || async { (StatusCode::UNAUTHORIZED, [("www-authenticate", "Basic realm=\"git\"")]) };
    let mut serving = JoinSet::new();
    serving
        .spawn(async move { axum::serve(listener, Router::new().fallback(locked)).await.unwrap() });
    (format!("http://{addr}/"), addr.port(), serving)
}

#[tokio::test]
async fn each_way_in_which_a_set_up_fails_has_its_own_words() {
    let settings = &[("LOCAL_SPRITES_DISK_MB", "160"), ("LOCAL_SPRITES_MEMORY_MB", "192")];
    let (git, port, _serving) = locked_git_server().await;
    let stack =
        Stack::start(Options { settings, ..Options::default() }.reaching(&[port])).await.unwrap();
    let as_github = json!({ "env_vars": {
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": format!("url.{git}.insteadOf"), "GIT_CONFIG_VALUE_0": "https://github.com/",
    }});
    let repository =
        json!([{ "type": "github_repository", "url": "https://github.com/o/private" }]);
    let nobody = "aod-no-such-package-4711";
    let limited = json!({ "type": "limited", "allowed_hosts": ["example.com"] });
    let cases = [
        (
            json!({ "setup_script": "echo first; echo the reason >&2; exit 3" }),
            json!([]),
            "the setup script exited with 3: the reason",
        ),
        (
            json!({ "setup_script": "head -c 200M /dev/zero >/workspace/big" }),
            json!([]),
            "the sandbox's disk is full",
        ),
        (
            json!({ "setup_script": "python3 -c 'x = bytearray(600 << 20)'" }),
            json!([]),
            "the sandbox ran out of memory",
        ),
        (
            json!({ "packages": { "pip": [nobody] } }),
            json!([]),
            "installing pip packages exited with 1: there is no such package",
        ),
        (json!({ "packages": { "npm": [nobody] } }), json!([]), "there is no such package"),
        (json!({ "packages": { "apt": [nobody] } }), json!([]), "there is no such package"),
        (
            as_github,
            repository,
            "o/private exited with 128: there is no such repository, or its authorization_token",
        ),
        (
            json!({ "networking": limited, "packages": { "pip": [nobody] } }),
            json!([]),
            "the environment's network policy blocks",
        ),
    ];
    let told = join_all(cases.iter().map(async |(environment, resources, words)| {
        let failure = failure(&stack, environment.clone(), resources.clone()).await;
        let installs = environment.get("packages").is_some();
        (words, if installs { "packages" } else { "provision_setup" }, failure)
    }))
    .await;
    for (words, stage, failure) in told {
        assert!(failure["message"].as_str().unwrap().contains(*words), "{words}: {failure}");
        assert_eq!(failure["stage"], stage);
    }
}

/// Where the CLIs are not installed: said by the session, and by the command line with what to do
/// about it.
#[tokio::test]
async fn a_cli_that_is_not_installed_is_named() {
    let tools = tempfile::tempdir().unwrap();
    #[expect(clippy::disallowed_methods, reason = "a test has no settings of its own")]
    let var = |name: &str| std::env::var(name).ok();
    let data =
        var("XDG_DATA_HOME").unwrap_or_else(|| format!("{}/.local/share", var("HOME").unwrap()));
    let installed = var("AOD_TOOLS_DIR").unwrap_or_else(|| format!("{data}/aod/tools"));
    for entry in std::fs::read_dir(installed)
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name() != "agents")
    {
        let target = std::fs::canonicalize(entry.path()).unwrap();
        std::os::unix::fs::symlink(target, tools.path().join(entry.file_name())).unwrap();
    }
    let tools: &'static str = Box::leak(tools.path().to_str().unwrap().to_owned().into_boxed_str());
    let settings = Box::leak(Box::new([("AOD_TOOLS_DIR", tools)]));
    let stack = Stack::start(Options { scripted_model: true, settings, ..Options::default() })
        .await
        .unwrap();
    let models = [
        ("claude", "claude-sonnet-4-5"),
        ("codex", "gpt-5.2-codex"),
        ("gemini", "gemini-2.5-pro"),
        ("opencode", "openai/gpt-5.2"),
    ];
    for (runtime, model) in models {
        let agent = stack
            .post("/agents", json!({ "name": runtime, "model": model, "runtime": runtime }))
            .await
            .unwrap();
        let session = stack
            .post("/sessions", json!({ "agent_id": agent.text("id"), "prompt": "hello" }))
            .await
            .unwrap();
        stack.stream(session.text("id"), 0).await.unwrap().all().await.unwrap();
        let session = stack.get(&format!("/sessions/{}", session.text("id"))).await.unwrap();
        let failure = &session.body["failure"];
        assert_eq!(failure["stage"], "install_runtime", "{session:?}");
        assert!(
            failure["message"].as_str().unwrap().contains(&format!("{runtime} is not installed")),
            "{failure}"
        );
        let output = stack.aod(&["run", "--runtime", runtime, "hello"]).unwrap().output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && said.contains(&format!("make setup AGENTS={runtime}")),
            "{runtime}: {said}"
        );
    }
    // What needs no CLI works all the same.
    let output = stack.aod(&["run", "--runtime", "shell", "echo hi"]).unwrap().output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "hi\n");
}
