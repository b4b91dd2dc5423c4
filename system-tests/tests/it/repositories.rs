//! Repositories that want a token: cloned with it, pushed to with it by the agent's own git, and each with its own.

use serde_json::{Value, json};
use system_tests::{Options, Stack};

use crate::git::PrivateGitHub;

fn repository(name: &str, token: Option<&str>) -> Value {
    let url = format!("https://github.com/{name}");
    let mut resource = json!({ "type": "github_repository", "url": url, "mount_path": format!("/workspace/{name}") });
    if let Some(token) = token {
        resource["authorization_token"] = token.into();
    }
    resource
}

async fn run(stack: &Stack, github: &PrivateGitHub, resources: Value, prompt: &str) -> (String, Vec<Value>) {
    let environment =
        stack.post("/environments", json!({ "name": types::SessionId::new().to_string(), "env_vars": github.as_github() })).await.unwrap();
    let agent = stack.agent("shell").await.unwrap();
    let body = json!({ "agent_id": agent, "environment_id": environment.text("id"), "prompt": prompt, "resources": resources });
    let session = stack.post("/sessions", body).await.unwrap();
    assert_eq!(session.status, 202, "{session:?}");
    let session = session.text("id").to_owned();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    (session, events)
}

fn output(events: &[Value]) -> String {
    events.iter().filter_map(|event| event["data"].as_str()).collect()
}

#[tokio::test]
async fn an_agent_pushes_to_each_private_repository_with_its_own_token() {
    let github = PrivateGitHub::start(&[("acme/one", "ghp_one/@:"), ("acme/two", "ghp_two"), ("acme/other", "ghp_other")]).await;
    let stack = Stack::start(Options::default().reaching(&[github.port])).await.unwrap();
    let resources = json!([repository("acme/one", Some("ghp_one/@:")), repository("acme/two", Some("ghp_two"))]);
    let prompt = r#"
        git config --global user.name Agent; git config --global user.email agent@example.org
        for name in one two; do
            cd /workspace/acme/$name && echo $name >file && git add file && git commit -qm "by the agent" && git push -q 2>&1 && echo pushed $name
        done
        export GIT_TERMINAL_PROMPT=0
        git clone -q https://github.com/acme/other /tmp/other 2>&1 || echo not the other
        git -C /workspace/acme/one remote get-url origin; stat -c %a ~/.aod/git-credentials"#;
    let (_, events) = run(&stack, &github, resources, prompt).await;
    let said = output(&events);
    for wanted in ["pushed one\n", "pushed two\n", "not the other\n", "https://github.com/acme/one\n600\n"] {
        assert!(said.contains(wanted), "{wanted}: {said}\n{:?}", events.last());
    }
    for name in ["one", "two"] {
        assert_eq!(github.git(&format!("acme/{name}"), &["show", "main:file"]).await, name);
    }
}

#[tokio::test]
async fn a_private_repository_without_its_token_is_a_clear_failure() {
    let github = PrivateGitHub::start(&[("acme/one", "ghp_right")]).await;
    let stack = Stack::start(Options::default().reaching(&[github.port])).await.unwrap();
    for token in [None, Some("ghp_wrong_4711")] {
        let (session, events) = run(&stack, &github, json!([repository("acme/one", token)]), "true").await;
        let failure = stack.get(&format!("/sessions/{session}")).await.unwrap().body["failure"].clone();
        let message = failure["message"].as_str().unwrap();
        assert!(message.contains("there is no such repository, or its authorization_token"), "{failure}");
        assert!(!format!("{failure}{events:?}").contains("4711"), "{failure} {events:?}");
    }
}
