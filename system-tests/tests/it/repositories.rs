//! Repositories that want a token: cloned with it, pushed to with it by the agent's own git, and
//! each with its own.

use axum::{
    Json, Router,
    routing::{get, post},
};
use serde_json::{Value, json};
use system_tests::{Options, Stack};

use tokio::task::JoinSet;

use crate::git::{GitServer, PrivateGitHub};

fn repository(name: &str, token: Option<&str>) -> Value {
    let url = format!("https://github.com/{name}");
    let mut resource = json!({ "type": "github_repository", "url": url, "mount_path": format!("/workspace/{name}") });
    if let Some(token) = token {
        resource["authorization_token"] = token.into();
    }
    resource
}

async fn run(
    stack: &Stack,
    github: &PrivateGitHub,
    resources: Value,
    prompt: &str,
) -> (String, Vec<Value>) {
    run_in(stack, json!({ "env_vars": github.as_github() }), resources, prompt).await
}

async fn run_in(
    stack: &Stack,
    mut environment: Value,
    resources: Value,
    prompt: &str,
) -> (String, Vec<Value>) {
    environment["name"] = types::SessionId::new().to_string().into();
    let environment = stack.post("/environments", environment).await.unwrap();
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
    let github = PrivateGitHub::start(&[
        ("acme/one", "ghp_one/@:"),
        ("acme/two", "ghp_two"),
        ("acme/other", "ghp_other"),
    ])
    .await;
    let stack = Stack::start(
        Options::default().with("AOD_GITHUB_URL", github.url()).reaching(&[github.port]),
    )
    .await
    .unwrap();
    let resources = json!([
        repository("acme/one", Some("ghp_one/@:")),
        repository("acme/two", Some("ghp_two"))
    ]);
    let prompt = r#"
        git config --global user.name Agent; git config --global user.email agent@example.org
        for name in one two; do
            cd /workspace/acme/$name && echo $name >file && git add file && git commit -qm "by the agent" && git push -q 2>&1 && echo pushed $name
        done
        export GIT_TERMINAL_PROMPT=0
        git clone -q https://github.com/acme/other /tmp/other 2>&1 || echo not the other
        git -C /workspace/acme/one config remote.origin.url; stat -c %a ~/.aod/git-session
        git -C /workspace/acme/one remote get-url origin | sed 's,//[^/]*/,//gateway/,'; ls ~/.aod/git-credentials 2>/dev/null
        grep -rl 'ghp[_]' /workspace ~ /tmp 2>/dev/null || echo no token"#;
    let (session, events) = run(&stack, &github, resources, prompt).await;
    let said = output(&events);
    for wanted in [
        "pushed one\n",
        "pushed two\n",
        "not the other\n",
        "https://github.com/acme/one\n600\nhttp://gateway/git/github.com/acme/one\nno token\n",
    ] {
        assert!(said.contains(wanted), "{wanted}: {said}\n{:?}", events.last());
    }
    for name in ["one", "two"] {
        assert_eq!(github.git(&format!("acme/{name}"), &["show", "main:file"]).await, name);
    }
    // Both tokens are exchanged at GitHub, and one of them in the session.
    github.set_token("acme/one", "ghp_newer");
    github.set_token("acme/two", "ghp_unknown");
    let sessions = stack.get("/v1/sessions").await.unwrap();
    let path =
        format!("/v1/sessions/{}/resources", sessions.body["data"][0]["id"].as_str().unwrap());
    let listed = stack.get(&path).await.unwrap().body["data"].clone();
    let one = listed
        .as_array()
        .unwrap()
        .iter()
        .find(|resource| resource["mount_path"] == "/workspace/acme/one")
        .unwrap();
    let path = format!("{path}/{}", one["id"].as_str().unwrap());
    let exchanged = stack.post(&path, json!({ "authorization_token": "ghp_newer" })).await.unwrap();
    assert!(
        exchanged.status == 200 && exchanged.body["updated_at"] != one["updated_at"],
        "{exchanged:?}"
    );
    assert!(!exchanged.body.to_string().contains("ghp_"), "{exchanged:?}");
    for bad in [
        json!({}),
        json!({ "authorization_token": "a b" }),
        json!({ "authorization_token": "t", "url": "x" }),
    ] {
        assert_eq!(stack.post(&path, bad.clone()).await.unwrap().status, 400, "{bad}");
    }
    let again = r#"
        for name in one two; do
            cd /workspace/acme/$name && git commit -q --allow-empty -m again && git push -q 2>/dev/null && echo pushed $name || echo refused $name
        done
        grep -rl 'ghp[_]' /workspace ~ /tmp 2>/dev/null || echo no token
        touch ~/.gitconfig.lock"#;
    let answer = stack
        .post(&format!("/sessions/{session}/prompt"), json!({ "prompt": again }))
        .await
        .unwrap();
    assert_eq!(answer.status, 202, "{answer:?}");
    let since = events.last().unwrap()["id"].as_u64().unwrap();
    let events = stack.stream(&session, since).await.unwrap().all().await.unwrap();
    let said = output(&events);
    assert!(said.contains("pushed one\nrefused two\nno token\n"), "{said}");
    // Git cannot be set up again beside a lock that an agent left: the turn that can remove it
    // begins all the same.
    let since = events.last().unwrap()["id"].as_u64().unwrap();
    let answer = stack
        .post(
            &format!("/sessions/{session}/prompt"),
            json!({ "prompt": "rm ~/.gitconfig.lock && echo removed" }),
        )
        .await
        .unwrap();
    assert_eq!(answer.status, 202, "{answer:?}");
    let said = output(&stack.stream(&session, since).await.unwrap().all().await.unwrap());
    assert!(said.contains("removed\n"), "{said}");
}

#[tokio::test]
async fn a_private_repository_without_its_token_is_a_clear_failure() {
    let github = PrivateGitHub::start(&[("acme/one", "ghp_right")]).await;
    let stack = Stack::start(
        Options::default().with("AOD_GITHUB_URL", github.url()).reaching(&[github.port]),
    )
    .await
    .unwrap();
    for token in [None, Some("ghp_wrong_4711")] {
        let (session, events) =
            run(&stack, &github, json!([repository("acme/one", token)]), "true").await;
        let failure =
            stack.get(&format!("/sessions/{session}")).await.unwrap().body["failure"].clone();
        let message = failure["message"].as_str().unwrap();
        assert!(
            message.contains("there is no such repository, or its authorization_token"),
            "{failure}"
        );
        assert!(!format!("{failure}{events:?}").contains("4711"), "{failure} {events:?}");
    }
}

/// Sessions of one stack, each with its own fields: what they print and how they end.
async fn run_each<const N: usize>(stack: &Stack, sessions: [Value; N]) -> [(String, Value); N] {
    let agent = stack.agent("shell").await.unwrap();
    let mut ended = Vec::new();
    for mut session in sessions {
        session["agent_id"] = agent.clone().into();
        let session = stack.post("/sessions", session).await.unwrap();
        assert_eq!(session.status, 202, "{session:?}");
        let events = stack.stream(session.text("id"), 0).await.unwrap().all().await.unwrap();
        ended.push((output(&events), events.last().unwrap().clone()));
    }
    ended.try_into().unwrap()
}

#[tokio::test]
async fn an_agent_works_where_its_session_says_and_commits_as_its_repositories_say() {
    let served = GitServer::serving(
        "o/r",
        &[("hello", "from the repository\n"), ("part/here", "in a part of it\n")],
    )
    .await;
    let stack = Stack::start(Options::default().reaching(&[served.port])).await.unwrap();
    let vars = served.as_github();
    let author = json!({ "name": "Ann O'Neil", "email": "ann@example.org" });
    let one =
        json!([{ "type": "github_repository", "url": "https://github.com/o/r", "author": author }]);
    let two = json!([
        { "type": "github_repository", "url": "https://github.com/o/r", "author": author },
        { "type": "github_repository", "url": "https://github.com/o/r", "mount_path": "/workspace/second one" },
    ]);
    let commit = "git commit -q --allow-empty -m x; git log -1 --format='%an <%ae>'";
    let setup = json!({ "name": "e", "setup_script": "mkdir /workspace/made" });
    let made = stack.post("/environments", setup).await.unwrap().text("id").to_owned();
    let [whole, part, second, empty, missing] = run_each(
        &stack,
        [
            json!({ "prompt": format!("pwd; {commit}"), "resources": one, "secret_env_vars": vars }),
            json!({ "prompt": "pwd; cat here", "resources": one, "secret_env_vars": vars, "working_directory": "/workspace/r/part" }),
            json!({ "prompt": format!("pwd; {commit}"), "resources": two, "secret_env_vars": vars, "working_directory": "/workspace/second one" }),
            json!({ "prompt": "pwd", "environment_id": made, "working_directory": "/workspace/made" }),
            json!({ "prompt": "pwd", "resources": one, "secret_env_vars": vars, "working_directory": "/workspace/r/none" }),
        ],
    )
    .await;
    assert_eq!(whole.0, "/workspace/r\nAnn O'Neil <ann@example.org>\n", "{}", whole.1);
    assert_eq!(part.0, "/workspace/r/part\nin a part of it\n", "{}", part.1);
    assert_eq!(
        second.0, "/workspace/second one\nAgent on Demand <agent@agent-on-demand.invalid>\n",
        "{}",
        second.1
    );
    assert_eq!(empty.0, "/workspace/made\n", "{}", empty.1);
    let told = missing.1["message"].as_str().unwrap_or_default();
    assert!(
        told.contains("entering the working directory")
            && told.contains("No such file or directory"),
        "{}",
        missing.1
    );

    let agent = stack.agent("shell").await.unwrap();
    for bad in ["r", "/workspace/../x", "/workspace/", ""] {
        let body = json!({ "agent_id": agent, "prompt": "true", "working_directory": bad });
        assert_eq!(stack.post("/sessions", body).await.unwrap().status, 422, "{bad:?}");
    }
}

/// A server of Git LFS with one file, at any path below its own.
async fn lfs_server(oid: String, content: &'static str) -> (u16, JoinSet<std::io::Result<()>>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let batch = async move |Json(asked): Json<Value>| {
        assert_eq!(
            (&asked["operation"], &asked["objects"][0]["oid"]),
            (&json!("download"), &json!(oid))
        );
        let download = json!({ "download": { "href": format!("http://127.0.0.1:{port}/object") } });
        let object = json!({ "oid": oid, "size": content.len(), "authenticated": true, "actions": download });
        (
            [("content-type", "application/vnd.git-lfs+json")],
            json!({ "transfer": "basic", "objects": [object] }).to_string(),
        )
    };
    let router = Router::new()
        .route("/lfs/objects/batch", post(batch))
        .route("/object", get(async move || content));
    let mut server = JoinSet::new();
    server.spawn(axum::serve(listener, router).into_future());
    (port, server)
}

/// With the distribution's own git-lfs, which the environment installs.
#[tokio::test]
async fn files_in_git_lfs_are_fetched_where_that_is_asked_for() {
    const CONTENT: &str = "what the pointer stands for\n";
    let oid = sha256(CONTENT);
    let pointer = format!(
        "version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {}\n",
        CONTENT.len()
    );
    let attributes = "*.bin filter=lfs diff=lfs merge=lfs -text\n";
    let served =
        GitServer::serving("o/r", &[("large.bin", &pointer), (".gitattributes", attributes)]).await;
    let (port, _lfs) = lfs_server(oid, CONTENT).await;
    let stack = Stack::start(Options::default().reaching(&[served.port, port])).await.unwrap();
    let mut vars = served.as_github();
    vars["GIT_CONFIG_COUNT"] = "2".into();
    vars["GIT_CONFIG_KEY_1"] = "lfs.url".into();
    vars["GIT_CONFIG_VALUE_1"] = format!("http://127.0.0.1:{port}/lfs").into();
    let environment = json!({ "name": "e", "packages": { "apt": ["git-lfs"] }, "env_vars": vars });
    let with = stack.post("/environments", environment).await.unwrap().text("id").to_owned();
    let without = stack
        .post("/environments", json!({ "name": "f", "env_vars": vars }))
        .await
        .unwrap()
        .text("id")
        .to_owned();
    let resources = |lfs: bool| json!([{ "type": "github_repository", "url": "https://github.com/o/r", "lfs": lfs }]);
    let prompt = "cat large.bin; git status --short";
    let [fetched, left, not_there] = run_each(
        &stack,
        [
            json!({ "prompt": prompt, "environment_id": with, "resources": resources(true) }),
            json!({ "prompt": prompt, "environment_id": with, "resources": resources(false) }),
            json!({ "prompt": prompt, "environment_id": without, "resources": resources(true) }),
        ],
    )
    .await;
    assert_eq!(fetched.0, CONTENT, "{}", fetched.1);
    assert_eq!(left.0, pointer, "{}", left.1);
    assert!(
        not_there.1["message"]
            .as_str()
            .is_some_and(|text| text.contains("git-lfs is not installed")),
        "{}",
        not_there.1
    );
}

/// The questions pass the model gateway, which adds the token; the objects are fetched and sent
/// directly.
#[tokio::test]
async fn an_agent_pushes_and_fetches_git_lfs_of_a_private_repository_without_its_token() {
    let github = PrivateGitHub::start(&[("acme/one", "ghp_one")]).await;
    let stack = Stack::start(
        Options::default().with("AOD_GITHUB_URL", github.url()).reaching(&[github.port]),
    )
    .await
    .unwrap();
    let environment = json!({ "packages": { "apt": ["git-lfs"] }, "env_vars": github.as_github() });
    let mut resource = repository("acme/one", Some("ghp_one"));
    let push = r#"
        cd /workspace/acme/one && git lfs install --local >/dev/null && git lfs track '*.bin' >/dev/null
        echo "what the pointer stands for" >large.bin && git add . && git commit -qm large && git push -q 2>&1 && echo pushed
        grep -rl 'ghp[_]' /workspace ~ /tmp 2>/dev/null || echo no token"#;
    let pushing = run_in(&stack, environment.clone(), json!([resource]), push).await;
    assert!(output(&pushing.1).ends_with("pushed\nno token\n"), "{:#?}", pushing.1);
    let pointer = github.git("acme/one", &["show", "main:large.bin"]).await;
    assert!(pointer.starts_with("version https://git-lfs.github.com/spec/v1\n"), "{pointer}");
    resource["lfs"] = true.into();
    let fetch =
        "cat /workspace/acme/one/large.bin; grep -rl 'ghp[_]' /workspace ~ /tmp || echo no token";
    let fetching = run_in(&stack, environment, json!([resource]), fetch).await;
    assert_eq!(output(&fetching.1), "what the pointer stands for\nno token\n", "{:#?}", fetching.1);
}

fn sha256(text: &str) -> String {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
    let output = std::process::Command::new("sha256sum").arg(file.path()).output().unwrap();
    String::from_utf8(output.stdout).unwrap().split(' ').next().unwrap().to_owned()
}
