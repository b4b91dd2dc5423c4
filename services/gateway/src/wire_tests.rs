//! Snapshots of the answers to invalid bodies, and of the routes that the OpenAPI document
//! describes.

use axum::{body::to_bytes, response::IntoResponse as _};
use serde_json::{Value, json};

use crate::{
    agents::{CreateAgent, UpdateAgent},
    body::{Body, Fields},
    environments::{CreateEnvironment, UpdateEnvironment},
    inputs::{ChangeInput, Decision},
    router,
    sessions::CreateSession,
};

/// The answer to a body, as its reader sees it.
async fn refusal<T>(body: Value, read: impl FnOnce(&mut Fields) -> T) -> Value {
    let mut fields = Body::from_json(&body).fields().unwrap();
    read(&mut fields);
    let Err(error) = fields.finish() else { return json!("accepted") };
    let response = error.into_response();
    let status = response.status().as_u16();
    let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
    json!({ "status": status, "body": serde_json::from_slice::<Value>(&body).unwrap() })
}

macro_rules! refusals {
    ($read:expr, $($body:tt),* $(,)?) => {{
        let mut answers = Vec::new();
        $(
            let body = json!($body);
            answers.push(json!({ "sent": body.clone(), "answer": refusal(body, $read).await }));
        )*
        answers
    }};
}

#[tokio::test]
async fn wrong_agents() {
    let many: Vec<Value> =
        (0..21).map(|n| json!({ "name": format!("s{n}"), "url": "https://x" })).collect();
    let answers = refusals!(
        CreateAgent::read,
        {},
        { "name": null, "model": 5, "runtime": [] },
        { "name": "n\u{0}", "model": "m", "runtime": "claude", "metadata": "x" },
        { "name": "n", "model": "m", "runtime": "claude", "mcp_servers": "x", "skills": {} },
        { "name": "n", "model": "m", "runtime": "claude", "mcp_servers": [5, {}, { "name": "a" }, { "name": "a", "type": "stdio" }, { "name": "b", "type": "ftp" }] },
        { "name": "n", "model": "m", "runtime": "claude", "mcp_servers": [{ "name": "a", "url": "u", "headers": { "X": 1 } }, { "name": "a", "url": "", "headers": [] }] },
        { "name": "n", "model": "m", "runtime": "claude", "mcp_servers": many },
        { "name": "n", "model": "m", "runtime": "claude", "skills": [{ "name": "A b", "description": 5 }, { "name": "a", "description": "d", "content": "c", "x": 1 }] },
        { "name": "n", "model": "m", "runtime": "claude", "skills": [{ "type": "gitlab", "source": "x" }, { "type": "github", "content": "c" }] },
        { "name": "n", "model": "m", "runtime": "claude", "skills": [{ "name": "a", "description": "", "content": "" }, { "type": "github", "source": "o/r", "name": "a" }] },
        { "name": "n", "model": "m", "runtime": "claude", "skills": [{ "type": "github", "source": "o/r" }, { "type": "github", "source": "o/r" }, { "type": "github", "source": "o/r", "name": "a" }] },
    );
    insta::assert_json_snapshot!(answers);
    let long = json!({ "name": "x".repeat(201), "model": "x".repeat(101), "runtime": "r" });
    let answer = refusal(long, CreateAgent::read).await;
    let messages: Vec<_> = answer["body"]["detail"]
        .as_array()
        .unwrap()
        .iter()
        .map(|error| error["msg"].clone())
        .collect();
    assert_eq!(
        messages,
        ["String should have at most 200 characters", "String should have at most 100 characters"]
    );
    let skill =
        json!({ "name": "a", "description": "x".repeat(1025), "content": "x".repeat(65_537) });
    let answer = refusal(
        json!({ "name": "n", "model": "m", "runtime": "r", "skills": [skill] }),
        CreateAgent::read,
    )
    .await;
    let messages: Vec<_> = answer["body"]["detail"]
        .as_array()
        .unwrap()
        .iter()
        .map(|error| error["msg"].clone())
        .collect();
    assert_eq!(
        messages,
        [
            "String should have at most 1024 characters",
            "Value error, content must be at most 65536 bytes"
        ]
    );
}

#[tokio::test]
async fn wrong_changes() {
    insta::assert_json_snapshot!(refusals!(
        UpdateAgent::read,
        {},
        { "version": null },
        { "version": 1.5, "name": 1 },
        { "version": "x" },
        { "version": " 7 ", "environment_id": null, "name": null, "metadata": null },
        { "version": 1e300 },
    ));
    insta::assert_json_snapshot!(
        refusals!(UpdateEnvironment::read, { "version": [] }, { "version": true, "packages": { "brew": [] } })
    );
}

#[tokio::test]
async fn wrong_environments() {
    insta::assert_json_snapshot!(refusals!(
        CreateEnvironment::read,
        { "name": "n", "packages": [] },
        { "name": "n", "packages": { "brew": ["x"], "pip": "x", "apt": [1, "jq"], "npm": ["-g", "ok"], "go": null } },
        { "name": "n", "env_vars": { "1A": "x", "B": 2 } },
        { "name": "n", "networking": { "type": "none" } },
        { "name": "n", "networking": { "type": "limited", "allowed_hosts": "x" } },
        { "name": "n", "networking": { "type": "limited", "allowed_hosts": ["http://x", "*.ok.org", 5] } },
        { "name": "n", "networking": "limited", "setup_script": 1 },
    ));
}

#[tokio::test]
async fn wrong_sessions() {
    insta::assert_json_snapshot!(refusals!(
        CreateSession::read,
        {},
        { "agent_id": "a", "prompt": "p", "timeout": 9 },
        { "agent_id": "a", "prompt": "p", "timeout": 3601 },
        { "agent_id": "a", "prompt": "p", "timeout": "60.5" },
        { "agent_id": "a", "prompt": "p", "timeout": "60", "metadata": { "a": 1 } },
        { "agent_id": "a", "prompt": "p", "secret_env_vars": { "A-B": "x" } },
        { "agent_id": "a", "prompt": "p", "resources": ["x", { "type": "gitlab", "url": "https://gitlab.com/o/r", "mount_path": "/" }] },
        { "agent_id": "a", "prompt": "p", "resources": [{ "url": "https://github.com/o/r", "mount_path": "/a/../b", "authorization_token": "a b" }] },
        { "agent_id": "a", "prompt": "p", "resources": [{ "type": "github_repository", "url": "https://github.com/o/r" }, { "type": "github_repository", "url": "https://github.com/x/r" }] },
    ));
}

#[tokio::test]
async fn wrong_permissions() {
    let agent = |permissions: Value| json!({ "name": "n", "model": "m", "runtime": "claude", "permissions": permissions });
    let mut answers = Vec::new();
    for permissions in [
        json!("ask"),
        json!({ "default": "maybe", "rules": "x" }),
        json!({ "default": 1, "rules": [{}, 5, { "tool": "", "evaluation": "ask" }, { "tool": "a*b", "evaluation": null }] }),
        json!({ "rules": [{ "tool": "Bash", "evaluation": "never" }, { "tool": "mcp__*", "evaluation": "deny" }] }),
        json!({ "timeout_seconds": 0, "on_timeout": "ask" }),
        json!({ "rules": (0..101).map(|n| json!({ "tool": format!("t{n}"), "evaluation": "ask" })).collect::<Vec<_>>() }),
        json!({ "default": "ask", "rules": [{ "tool": "*", "evaluation": "allow" }], "timeout_seconds": 60, "on_timeout": "allow" }),
    ] {
        let answer = refusal(agent(permissions.clone()), CreateAgent::read).await;
        let errors = answer["body"]["detail"].as_array().cloned().unwrap_or_default();
        let errors: Vec<_> =
            errors.iter().map(|error| json!([error["loc"], error["msg"]])).collect();
        let sent = if errors.is_empty() {
            permissions
        } else {
            json!(permissions.to_string().chars().take(200).collect::<String>())
        };
        answers.push(json!({ "sent": sent, "errors": errors }));
    }
    insta::assert_json_snapshot!(answers);
}

#[tokio::test]
async fn wrong_inputs() {
    insta::assert_json_snapshot!(
        refusals!(ChangeInput::read, {}, { "text": " " }, { "text": 5 }, { "text": "fine" })
    );
    insta::assert_json_snapshot!(refusals!(
        Decision::read,
        {},
        { "decision": "yes" },
        { "decision": "allow", "message": "why" },
        { "decision": "deny", "message": 5 },
        { "decision": "deny", "message": "not that" },
        { "decision": "allow_for_session" },
    ));
}

#[test]
fn the_document_describes_these_routes_each_with_its_answers() {
    let document = serde_json::to_value(router::routes().1).unwrap();
    assert_eq!(document["openapi"], "3.1.0");
    let mut routes = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let statuses: Vec<_> =
                operation["responses"].as_object().unwrap().keys().cloned().collect();
            routes.push(format!("{} {path} -> {}", method.to_uppercase(), statuses.join(" ")));
            for (status, response) in operation["responses"].as_object().unwrap() {
                let content = &response["content"]["application/json"];
                assert!(
                    status.starts_with(['2', '3'])
                        || path.ends_with('z')
                        || !content["schema"].is_null(),
                    "{method} {path} {status}"
                );
                assert!(
                    !status.starts_with('4') || status == "404" || !content["example"].is_null(),
                    "{method} {path} {status}"
                );
            }
        }
    }
    insta::assert_snapshot!(routes.join("\n"));
}
