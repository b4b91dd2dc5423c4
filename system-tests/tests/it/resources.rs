//! Agents, environments and sessions under races, repetition and deletion.

use std::collections::BTreeSet;

use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};
use system_tests::{Answer, Options, Stack};
use testkit::eventually;

use crate::git::PrivateGitHub;

async fn put(stack: &Stack, path: &str, body: Value) -> Answer {
    stack.call(Method::PUT, path, Some(body)).await.unwrap()
}

/// A number out of the stack's own Postgres.
async fn count(stack: &Stack, query: &'static str) -> i64 {
    let mut connection = PgConnection::connect(&stack.ready_text("/database_url")).await.unwrap();
    sqlx::query_scalar(query).fetch_one(&mut connection).await.unwrap()
}

#[tokio::test]
async fn of_fifty_changes_to_one_version_one_wins_and_no_version_is_missing() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let agent = format!("/agents/{}", stack.agent("shell").await.unwrap());
    let environment = stack
        .post("/environments", json!({ "name": "e", "env_vars": { "A": "0" } }))
        .await
        .unwrap();
    let environment = format!("/environments/{}", environment.text("id"));
    for (path, field) in [(&agent, "system"), (&environment, "setup_script")] {
        for version in 1..=4 {
            let changes = (0..50).map(|n| {
                let mut body =
                    json!({ "version": version, "env_vars": { "A": format!("{version}-{n}") } });
                body[field] = format!("{version}-{n}").into();
                put(&stack, path, body)
            });
            let (won, lost): (Vec<_>, Vec<_>) =
                join_all(changes).await.into_iter().partition(|answer| answer.status == 200);
            assert_eq!((won.len(), won[0].body["version"].as_u64()), (1, Some(version + 1)));
            let mismatch = format!("Version mismatch: expected {}, got {version}", version + 1);
            assert!(
                lost.iter().all(
                    |answer| (answer.status, answer.text("detail")) == (409, mismatch.as_str())
                ),
                "{lost:?}"
            );
            assert_eq!(stack.get(path).await.unwrap().body[field], won[0].body[field]);
        }
        let versions = stack.get(&format!("{path}/versions")).await.unwrap();
        let numbers: Vec<_> = versions.body["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(|version| version["version"].as_u64().unwrap())
            .collect();
        assert_eq!(numbers, [5, 4, 3, 2, 1]);
    }
    // Of the losers' variables nothing stays in the vault.
    assert_eq!(count(&stack, "select count(*) from vault.secret where kind = 'env_vars'").await, 5);
}

#[tokio::test]
async fn of_fifty_sessions_against_a_quota_of_ten_ten_are_made() {
    let stack = Stack::start(Options {
        settings: &[("DEFAULT_MAX_CONCURRENT_SESSIONS", "10")],
        ..Options::default()
    })
    .await
    .unwrap();
    let agent = stack.agent("shell").await.unwrap();
    let body = json!({ "agent_id": agent, "prompt": "sleep 60" });
    let answers = join_all((0..50).map(|_| stack.post("/sessions", body.clone()))).await;
    let (made, refused): (Vec<_>, Vec<_>) =
        answers.into_iter().map(Result::unwrap).partition(|answer| answer.status == 202);
    assert_eq!((made.len(), refused.len()), (10, 40));
    for answer in &refused {
        assert_eq!(
            (answer.status, &answer.body["limit"], &answer.body["active"]),
            (429, &json!(10), &json!(10))
        );
        assert!(answer.headers.contains_key("retry-after"));
    }
    for session in made {
        let path = format!("/sessions/{}/terminate", session.text("id"));
        assert_eq!(stack.post(&path, Value::Null).await.unwrap().status, 200);
    }
    assert_eq!(stack.post("/sessions", body).await.unwrap().status, 202);
}

#[tokio::test]
async fn of_twenty_prompts_on_a_completed_session_one_is_accepted() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let session = stack.session("shell", "true").await.unwrap();
    stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let path = format!("/sessions/{session}/prompt");
    let answers = join_all(
        (0..20).map(|n| stack.post(&path, json!({ "prompt": format!("echo {n}; sleep 6") }))),
    )
    .await;
    let mut statuses: Vec<_> = answers.into_iter().map(|answer| answer.unwrap().status).collect();
    statuses.sort_unstable();
    assert_eq!((statuses[0], &statuses[1..]), (202, [409; 19].as_slice()));
    // The state is refused before the body is looked at.
    let running = stack.post(&path, json!({ "prompt": 5 })).await.unwrap();
    assert_eq!(running.status, 409, "{running:?}");
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    assert_eq!(events.iter().filter(|event| event["type"] == "output").count(), 1);
    let bad = stack.post(&path, json!({ "prompt": 5 })).await.unwrap();
    assert_eq!(bad.status, 422);
}

#[tokio::test]
async fn a_key_makes_a_request_take_effect_once() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let send = async |path: &str, key: &str, body: Value| {
        let url = format!("{}{path}", stack.ready_text("/api_url"));
        let request = stack
            .http
            .post(url)
            .bearer_auth(stack.ready_text("/api_key"))
            .header("idempotency-key", key)
            .json(&body);
        let response = request.send().await.unwrap();
        let replayed =
            response.headers().get("idempotent-replayed").is_some_and(|value| value == "true");
        (response.status().as_u16(), replayed, response.json::<Value>().await.unwrap())
    };
    let agent = stack.agent("shell").await.unwrap();
    let session = stack.session("shell", "true").await.unwrap();
    stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let server = json!([{ "name": "m", "url": "https://x", "headers": { "A": "s3cret" } }]);
    for (path, body, status) in [
        (
            "/agents".to_owned(),
            json!({ "name": "a", "model": "m", "runtime": "shell", "mcp_servers": server }),
            201,
        ),
        ("/environments".to_owned(), json!({ "name": "once", "env_vars": { "A": "s3cret" } }), 201),
        (
            "/sessions".to_owned(),
            json!({ "agent_id": agent, "prompt": "echo hi", "secret_env_vars": { "A": "s3cret" } }),
            202,
        ),
        (format!("/sessions/{session}/prompt"), json!({ "prompt": "sleep 1" }), 202),
    ] {
        let (first, replayed, made) = send(&path, "k 1", body.clone()).await;
        assert_eq!((first, replayed), (status, false), "{path}: {made}");
        // Also right after one another.
        for _ in 0..20 {
            assert_eq!(
                send(&path, "k 1", body.clone()).await,
                (status, true, made.clone()),
                "{path}"
            );
        }
        let mut other = body.clone();
        other["name"] = "other".into();
        let (refused, _, answer) = send(&path, "k 1", other).await;
        assert_eq!(
            (refused, &answer["detail"]),
            (422, &json!("This Idempotency-Key was used with another request body")),
            "{path}"
        );
        for bad in ["", &"x".repeat(256)] {
            assert_eq!(send(&path, bad, body.clone()).await.0, 400);
        }
    }
    // A refusal leaves the key free.
    for _ in 0..20 {
        let unknown = json!({ "agent_id": types::AgentId::new().to_string(), "prompt": "echo hi" });
        assert_eq!(send("/sessions", "k 2", unknown).await.0, 404);
    }
    // At once: one takes effect, the others see its answer or that it is under way.
    let body = json!({ "name": "racing", "model": "m", "runtime": "shell" });
    let answers = join_all((0..20).map(|_| send("/agents", "race", body.clone()))).await;
    let ids: BTreeSet<_> = answers
        .iter()
        .filter(|(status, ..)| *status == 201)
        .map(|(.., body)| body["id"].to_string())
        .collect();
    assert_eq!(ids.len(), 1);
    for (status, _, body) in &answers {
        assert!(
            *status == 201
                || (*status, &body["detail"])
                    == (409, &json!("A request with this Idempotency-Key is still in progress"))
        );
    }
    let named = |name: &str, list: &Value| {
        list["data"].as_array().unwrap().iter().filter(|item| item["name"] == name).count()
    };
    assert_eq!(named("racing", &stack.get("/agents").await.unwrap().body), 1);
    assert_eq!(named("once", &stack.get("/environments").await.unwrap().body), 1);
    assert_eq!(
        stack.get(&format!("/sessions/{session}/turns")).await.unwrap().body["data"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    // Repetitions left no secret behind.
    assert_eq!(count(&stack, "select count(*) from vault.secret where not is_credential").await, 3);
}

#[tokio::test]
async fn lists_come_in_pages_and_can_be_filtered() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let mut agents = Vec::new();
    for _ in 0..5 {
        agents.push(stack.agent("shell").await.unwrap());
    }
    let agent = &agents[0];
    for version in 1..5 {
        put(
            &stack,
            &format!("/agents/{agent}"),
            json!({ "version": version, "system": format!("{version}") }),
        )
        .await;
        stack.post("/environments", json!({ "name": format!("{version}") })).await.unwrap();
        stack.post("/api-keys", json!({ "name": format!("{version}") })).await.unwrap();
    }
    let environment = stack.get("/environments").await.unwrap().body["data"][0]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let mut sessions = Vec::new();
    for body in [
        json!({ "agent_id": agent, "prompt": "true" }),
        json!({ "agent_id": agent, "prompt": "exit 1", "environment_id": environment }),
        json!({ "agent_id": agents[1], "prompt": "true", "environment_id": environment }),
    ] {
        let session = stack.post("/sessions", body).await.unwrap().text("id").to_owned();
        stack.stream(&session, 0).await.unwrap().all().await.unwrap();
        sessions.push(session);
    }
    for _ in 0..3 {
        stack
            .post(&format!("/sessions/{}/prompt", sessions[0]), json!({ "prompt": "true" }))
            .await
            .unwrap();
        stack.stream(&sessions[0], 0).await.unwrap().all().await.unwrap();
    }
    for (path, at_least) in [
        ("/agents", 5),
        (&*format!("/agents/{agent}/versions"), 5),
        ("/environments", 4),
        ("/sessions", 3),
        (&*format!("/sessions/{}/turns", sessions[0]), 4),
        ("/api-keys", 5),
    ] {
        let whole = stack.get(path).await.unwrap().body;
        assert!(
            whole["data"].as_array().unwrap().len() >= at_least
                && whole["has_more"] == false
                && whole["next_cursor"].is_null(),
            "{path}: {whole}"
        );
        let (mut seen, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = stack.get(&format!("{path}?limit=2{cursor}")).await.unwrap().body;
            seen.extend(page["data"].as_array().unwrap().iter().cloned());
            assert_eq!(page["has_more"].as_bool(), Some(!page["next_cursor"].is_null()));
            match page["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        // The keys' times of use keep changing.
        let strip = |items: &[Value]| {
            items
                .iter()
                .map(|item| {
                    (item["id"].clone(), item["version"].clone(), item["turn_number"].clone())
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(strip(&seen), strip(whole["data"].as_array().unwrap()), "{path}");
        for bad in ["limit=0", "limit=1001", "limit=x", "cursor=%00", "cursor=zzzz"] {
            assert_eq!(
                stack.get(&format!("{path}?{bad}")).await.unwrap().status,
                400,
                "{path}?{bad}"
            );
        }
    }
    let ids = async |query: &str| {
        let answer = stack.get(&format!("/sessions?{query}")).await.unwrap();
        assert_eq!(answer.status, 200, "{query}: {answer:?}");
        answer.body["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(|item| item["id"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(ids(&format!("agent_id={agent}")).await, [sessions[1].clone(), sessions[0].clone()]);
    assert_eq!(
        ids(&format!("environment_id={environment}&status=completed")).await,
        [sessions[2].clone()]
    );
    assert_eq!(ids("status=failed").await, [sessions[1].clone()]);
    assert_eq!(ids("status=running").await, Vec::<String>::new());
    for bad in ["status=done", "agent_id=x", "environment_id=X"] {
        assert_eq!(stack.get(&format!("/sessions?{bad}")).await.unwrap().status, 400, "{bad}");
    }
}

#[tokio::test]
async fn secrets_of_every_kind_reach_the_sandbox_and_no_answer() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let vars = json!({ "FROM_ENVIRONMENT": "sentinel-1", "BOTH": "sentinel-2" });
    let environment =
        stack.post("/environments", json!({ "name": "e", "env_vars": vars })).await.unwrap();
    assert_eq!(environment.body["env_var_names"], json!(["BOTH", "FROM_ENVIRONMENT"]));
    let servers =
        json!([{ "name": "m", "type": "stdio", "command": "c", "env": { "T": "sentinel-3" } }]);
    let agent = json!({ "name": "a", "model": "m", "runtime": "shell", "environment_id": environment.text("id"), "mcp_servers": servers });
    let agent = stack.post("/agents", agent).await.unwrap();
    assert_eq!(agent.body["mcp_servers"][0]["env"]["T"], "***");
    let own = json!({ "BOTH": "sentinel-4", "OWN": "it's \"sentinel-5\"\nhere" });
    let prompt = r#"printf '%s|%s|%s|%s' "$FROM_ENVIRONMENT" "$BOTH" "$OWN" "$AOD_MODEL" | md5sum"#;
    let session = stack
        .post(
            "/sessions",
            json!({ "agent_id": agent.text("id"), "prompt": prompt, "secret_env_vars": own }),
        )
        .await
        .unwrap();
    let output =
        stack.stream(session.text("id"), 0).await.unwrap().until_output("-\n").await.unwrap();
    // The digest of what the four hold: `sentinel-1|sentinel-4|it's "sentinel-5"` and so on.
    assert!(output.starts_with("044c1f0b37d3f521"), "{output}");
    for answer in [environment, agent, session] {
        assert!(!answer.body.to_string().contains("sentinel"), "{answer:?}");
    }
    for path in ["/agents", "/environments", "/sessions"] {
        assert!(!stack.get(path).await.unwrap().body.to_string().contains("sentinel"));
    }
    // A value that is not stored cannot be kept.
    let id = stack.get("/agents").await.unwrap().body["data"][0]["id"].as_str().unwrap().to_owned();
    let unknown = json!([{ "name": "m", "type": "stdio", "command": "c", "env": { "U": "***" } }]);
    let refused =
        put(&stack, &format!("/agents/{id}"), json!({ "version": 1, "mcp_servers": unknown }))
            .await;
    assert_eq!(
        (refused.status, &refused.body["detail"][0]["loc"]),
        (422, &json!(["mcp_servers"])),
        "{refused:?}"
    );
    let detached =
        put(&stack, &format!("/agents/{id}"), json!({ "version": 1, "environment_id": null }))
            .await;
    assert_eq!(
        (detached.status, &detached.body["environment_id"], &detached.body["version"]),
        (200, &Value::Null, &json!(2))
    );
}

#[tokio::test]
async fn a_deleted_session_leaves_nothing() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let agent = stack.agent("shell").await.unwrap();
    let body = json!({ "agent_id": agent, "prompt": "seq 1000", "secret_env_vars": { "A": "x" } });
    let session = stack.post("/sessions", body).await.unwrap().text("id").to_owned();
    stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    assert!(count(&stack, "select count(*) from scheduler.event").await > 0);
    let deleted =
        stack.call(Method::DELETE, &format!("/sessions/{session}/delete"), None).await.unwrap();
    assert_eq!((deleted.status, deleted.text("detail")), (200, "Session deleted"));
    assert_eq!(stack.get(&format!("/sessions/{session}/stream")).await.unwrap().status, 404);
    for (what, query) in [
        ("events", "select count(*) from scheduler.event"),
        ("turns", "select count(*) from scheduler.turn"),
        ("deletions under way", "select count(*) from scheduler.deleted_session"),
        ("unused secrets", "select count(*) from scheduler.unused_secret"),
        ("secrets", "select count(*) from vault.secret where not is_credential"),
        (
            "leases",
            "select count(*) from vault.lease where revoked_at is null and purpose <> 'sweep'",
        ),
    ] {
        eventually(&format!("no {what}"), || async { count(&stack, query).await == 0 }).await;
    }
    let sprites = stack
        .http
        .get(format!("{}/v1/sprites", stack.ready_text("/sprites_url")))
        .bearer_auth(stack.ready_text("/sprites_token"));
    let sprites: Value = sprites.send().await.unwrap().json().await.unwrap();
    assert_eq!(sprites["sprites"], json!([]));
}

#[tokio::test]
async fn an_agents_configuration_is_written_into_its_sandbox() {
    let stack = Stack::start(Options { scripted_model: true, ..Options::default() }).await.unwrap();
    let skill =
        json!({ "name": "greet", "description": "how to greet", "content": "# Say hello\n" });
    let servers = json!([{ "name": "files", "type": "stdio", "command": "true", "env": { "TOKEN": "sentinel" } }]);
    let agent = json!({ "name": "a", "model": "claude-sonnet-4-5", "runtime": "claude", "skills": [skill], "mcp_servers": servers });
    let agent = stack.post("/agents", agent).await.unwrap().text("id").to_owned();
    let session = stack
        .post("/sessions", json!({ "agent_id": agent, "prompt": "write a haiku" }))
        .await
        .unwrap();
    let events = stack.stream(session.text("id"), 0).await.unwrap().all().await.unwrap();
    let done: Vec<_> = events
        .iter()
        .filter(|event| event["state"] == "done")
        .map(|event| event["stage"].as_str().unwrap())
        .collect();
    assert_eq!(done, ["create_sprite", "install_runtime", "env_file", "runtime_config", "skills"]);
    assert_eq!(events.last().unwrap()["code"], 0);
    let sprites = async |path: &str, query: &[(&str, &str)]| {
        let request = stack
            .http
            .get(format!("{}/v1/sprites{path}", stack.ready_text("/sprites_url")))
            .query(query);
        request
            .bearer_auth(stack.ready_text("/sprites_token"))
            .send()
            .await
            .unwrap()
            .error_for_status()
            .unwrap()
            .text()
            .await
            .unwrap()
    };
    let list: Value = serde_json::from_str(&sprites("", &[]).await).unwrap();
    let name = list["sprites"][0]["name"].as_str().unwrap();
    let file = async |path: &str| {
        sprites(&format!("/{name}/fs/read"), &[("path", path), ("workingDir", "/")]).await
    };
    let skill = "---\nname: greet\ndescription: \"how to greet\"\n---\n\n# Say hello\n";
    assert_eq!(file("/home/sprite/.claude/skills/greet/SKILL.md").await, skill);
    let config: Value = serde_json::from_str(&file("/home/sprite/.claude.json").await).unwrap();
    assert_eq!(config["mcpServers"]["files"]["env"]["TOKEN"], "sentinel");
    assert!(!Value::from(events).to_string().contains("sentinel"));
}

/// Set-up scripts and package managers write as root, and see their own system alone.
#[tokio::test]
async fn sudo_changes_the_sandbox_and_nothing_else() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let prompt = "sudo id -u; sudo -E -n TOLD=yes env | grep TOLD; sudo touch /usr/bin/made-by-sudo && ls /usr/bin/made-by-sudo; \
                  sudo -u nobody id -un";
    let session = stack.session("shell", prompt).await.unwrap();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let said: String = events
        .iter()
        .filter(|event| event["stream"] == "stdout")
        .filter_map(|event| event["data"].as_str())
        .collect();
    assert_eq!(said, "0\nTOLD=yes\n/usr/bin/made-by-sudo\nnobody\n", "{events:?}");
    assert!(!std::path::Path::new("/usr/bin/made-by-sudo").exists());
}

/// A sandbox that cannot limit its network runs nothing that wants it limited.
#[tokio::test]
async fn a_network_that_cannot_be_limited_is_a_failure_and_not_an_open_network() {
    let settings = &[("LOCAL_SPRITES_ISOLATION", "readonly")];
    let stack = Stack::start(Options { settings, ..Options::default() }).await.unwrap();
    let environment = json!({ "name": "e", "setup_script": "echo ran", "networking": { "type": "limited", "allowed_hosts": ["x.org"] } });
    let environment = stack.post("/environments", environment).await.unwrap().text("id").to_owned();
    let agent = stack.agent("shell").await.unwrap();
    let session = json!({ "agent_id": agent, "prompt": "echo ran", "environment_id": environment });
    let session = stack.post("/sessions", session).await.unwrap().text("id").to_owned();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let last = events.last().unwrap();
    assert!(
        last["message"]
            .as_str()
            .unwrap()
            .starts_with("Provisioning failed at network_policy: this sandbox cannot limit"),
        "{last}"
    );
    assert!(events.iter().all(|event| event["type"] != "output"));
    let session = stack.get(&format!("/sessions/{session}")).await.unwrap();
    assert_eq!(
        (session.text("status"), &session.body["failure"]["stage"]),
        ("failed", &json!("network_policy"))
    );
}

/// Real clones from a real git server in GitHub's place.
#[tokio::test]
async fn a_repository_is_cloned_to_its_mount_path() {
    let github = PrivateGitHub::start(&[("o/r", "ghp_sentinel")]).await;
    let stack = Stack::start(
        Options::default().with("AOD_GITHUB_URL", github.url()).reaching(&[github.port]),
    )
    .await
    .unwrap();
    let agent = stack.agent("shell").await.unwrap();
    let resources = json!([
        { "type": "github_repository", "url": "https://github.com/o/r.git", "authorization_token": "ghp_sentinel" },
        { "type": "github_repository", "url": "https://github.com/o/r", "authorization_token": "ghp_sentinel", "mount_path": "/workspace/second one" },
    ]);
    let prompt = "git -C /workspace/r log --format=%s; git -C '/workspace/second one' log --format=%s; ls /workspace; \
                  sudo grep -rlsI ghp_sentinel /home /etc /var /tmp /workspace || echo no token";
    let session = json!({ "agent_id": agent, "prompt": prompt, "resources": resources });
    let session = stack.post("/sessions", session).await.unwrap().text("id").to_owned();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let output: String = events.iter().filter_map(|event| event["data"].as_str()).collect();
    assert_eq!(output, "first\nfirst\nr\nsecond one\nno token\n", "{:?}", events.last());
    assert_eq!(events.last().unwrap()["code"], 0);
    let done: Vec<_> = events
        .iter()
        .filter(|event| event["state"] == "done")
        .map(|event| event["stage"].as_str().unwrap())
        .collect();
    assert_eq!(done, ["create_sprite", "env_file", "git_credentials", "provision_setup"]);
}
