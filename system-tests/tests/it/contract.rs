//! Errors and shapes of the public contract, and the published client.

use std::process::Command;

use reqwest::Method;
use serde_json::{Value, json};
use system_tests::{Options, Stack};

#[tokio::test]
async fn every_wrong_request_is_answered_with_what_was_wrong() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let (url, key) = (stack.ready_text("/api_url"), stack.ready_text("/api_key"));
    let raw = async |method: Method, path: &str, auth: Option<&str>, body: Vec<u8>| {
        let request = stack.http.request(method, format!("{url}{path}")).body(body);
        let request = match auth {
            Some(auth) => request.header("authorization", auth),
            None => request,
        };
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        (status, headers, response.json::<Value>().await.unwrap_or_default())
    };

    for (auth, detail) in [
        (None, "Missing or malformed Authorization header"),
        (Some("Basic x"), "Missing or malformed Authorization header"),
        (Some("Bearer "), "Missing or malformed Authorization header"),
        (Some("Bearer nonsense"), "Invalid API key"),
        (Some("Bearer aod_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"), "Invalid API key"),
    ] {
        let (status, headers, body) = raw(Method::GET, "/agents", auth, Vec::new()).await;
        assert_eq!((status, body["detail"].as_str()), (401, Some(detail)), "{auth:?}");
        assert_eq!(headers["www-authenticate"], "Bearer");
        assert_eq!(headers["x-request-id"].to_str().unwrap(), body["request_id"]);
    }

    let bearer = format!("Bearer {key}");
    let bearer = Some(bearer.as_str());
    for bad in [b"{".as_slice(), b"", b"\xff\xfe", "[".repeat(50_000).as_bytes(), br#"{"name": "\ud800"}"#] {
        let (status, _, body) = raw(Method::POST, "/agents", bearer, bad.to_vec()).await;
        assert_eq!((status, &body["detail"]), (400, &json!("Invalid JSON")), "{:?}", String::from_utf8_lossy(&bad[..bad.len().min(20)]));
    }
    let (status, _, body) = raw(Method::POST, "/agents", bearer, b"[]".to_vec()).await;
    assert_eq!((status, &body["detail"][0]["type"]), (422, &json!("model_type")));
    let (status, _, body) = raw(Method::POST, "/agents", bearer, vec![b' '; 2_621_441]).await;
    assert_eq!((status, &body["detail"]), (413, &json!("Request body too large")));
    let (status, _, body) = raw(Method::GET, "/nothing", None, Vec::new()).await;
    assert_eq!((status, &body["detail"]), (404, &json!("Not found")));
    let (status, headers, body) = raw(Method::PATCH, "/agents", bearer, Vec::new()).await;
    assert_eq!((status, &body["detail"]), (405, &json!("Method not allowed")));
    let allow = headers["allow"].to_str().unwrap();
    assert!(allow.contains("GET") && allow.contains("POST"), "{allow}");

    let cases = [
        (
            json!({}),
            422,
            json!([{ "type": "missing", "loc": ["name"], "msg": "Field required", "input": {} },
                                { "type": "missing", "loc": ["model"], "msg": "Field required", "input": {} },
                                { "type": "missing", "loc": ["runtime"], "msg": "Field required", "input": {} }]),
        ),
        (
            json!({ "name": "n", "model": "m", "runtime": "x" }),
            400,
            json!("Unknown runtime: x. Must be one of: ['claude', 'codex', 'gemini', 'opencode', 'shell']"),
        ),
        (
            json!({ "name": "n", "model": "openai/o3", "runtime": "claude" }),
            422,
            json!("Runtime claude cannot serve model openai/o3: provider openai not in ['anthropic']"),
        ),
        (
            json!({ "name": "n", "model": "acme/x", "runtime": "claude" }),
            422,
            json!([{ "type": "value_error", "loc": ["model"], "msg": "Value error, Unknown model: acme/x", "input": "acme/x" }]),
        ),
        (json!({ "name": "n", "model": "m", "runtime": "claude", "environment_id": "x" }), 404, json!("Environment not found")),
    ];
    for (body, status, detail) in cases {
        let answer = stack.post("/agents", body.clone()).await.unwrap();
        assert_eq!((answer.status, &answer.body["detail"]), (status, &detail), "{body}");
    }

    for path in ["/agents/x", "/agents/00000000-0000-4000-8000-000000000000"] {
        let answer = stack.get(path).await.unwrap();
        assert_eq!((answer.status, answer.text("detail")), (404, "Agent not found"));
    }
    for path in ["/sessions/x", "/sessions/x/turns", "/sessions/x/stream", "/sessions/00000000-0000-4000-8000-000000000000/stream"] {
        let answer = stack.get(path).await.unwrap();
        assert_eq!((answer.status, answer.text("detail")), (404, "Session not found"), "{path}");
    }
    let session = stack.session("shell", "true").await.unwrap();
    for since in ["x", "-1", "1.5"] {
        let answer = stack.get(&format!("/sessions/{session}/stream?since={since}")).await.unwrap();
        assert_eq!((answer.status, answer.text("detail")), (400, "since must be an integer"));
    }
    let agent = stack.agent("shell").await.unwrap();
    for (timeout, kind) in [
        (json!(9), "greater_than_equal"),
        (json!(3601), "less_than_equal"),
        (json!("x"), "int_parsing"),
        (json!(10.5), "int_from_float"),
        (json!([]), "int_type"),
    ] {
        let answer = stack.post("/sessions", json!({ "agent_id": agent, "prompt": "x", "timeout": timeout })).await.unwrap();
        assert_eq!((answer.status, &answer.body["detail"][0]["type"]), (422, &json!(kind)));
    }
    let answer = stack.post("/sessions", json!({ "agent_id": agent, "prompt": "x", "timeout": "60", "unknown": 1 })).await.unwrap();
    assert_eq!(answer.status, 202, "{answer:?}");
    let claude = stack.agent("claude").await.unwrap();
    let answer = stack.post("/sessions", json!({ "agent_id": claude, "prompt": "x" })).await.unwrap();
    assert_eq!((answer.status, answer.text("detail")), (400, "No API key configured for runtime: claude"));
    assert_eq!(stack.call(Method::PUT, "/credentials/nonsense", Some(json!({ "value": "x" }))).await.unwrap().status, 404);
}

#[tokio::test]
async fn a_key_and_a_credential_work_as_long_as_they_are_there() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let created = stack.post("/api-keys", json!({ "name": "second" })).await.unwrap();
    let key = created.text("key").to_owned();
    assert_eq!((created.status, key.len()), (201, 47));
    let agents = format!("{}/agents", stack.ready_text("/api_url"));
    let answer = async |key: &str| {
        let answer = stack.http.get(&agents).bearer_auth(key).send().await.unwrap();
        (answer.status().as_u16(), answer.json::<Value>().await.unwrap()["detail"].as_str().unwrap_or_default().to_owned())
    };
    assert_eq!(answer(&key).await.0, 200);
    let expired = stack.post("/api-keys", json!({ "name": "old", "expires_at": "2020-01-01T00:00:00Z" })).await.unwrap();
    assert_eq!(answer(expired.text("key")).await, (401, "API key has expired".to_owned()));
    assert_eq!(stack.post("/api-keys", json!({ "name": "x", "expires_at": "soon" })).await.unwrap().status, 422);
    assert!(!stack.get("/api-keys").await.unwrap().body.to_string().contains(&key));
    assert_eq!(stack.call(Method::DELETE, &format!("/api-keys/{}", created.text("id")), None).await.unwrap().status, 200);
    // Within a second, on every gateway.
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    assert_eq!(answer(&key).await, (401, "API key is inactive".to_owned()));

    let put = stack.call(Method::PUT, "/credentials/provider:openai", Some(json!({ "value": "sk-sentinel-abcd" }))).await.unwrap();
    assert_eq!((put.status, put.text("hint")), (200, "abcd"));
    let list = stack.get("/credentials").await.unwrap();
    assert!(!list.body.to_string().contains("sentinel") && list.body.to_string().contains("provider:openai"));
    let delete = || stack.call(Method::DELETE, "/credentials/provider:openai", None);
    assert_eq!(delete().await.unwrap().text("detail"), "Credential deleted");
    assert_eq!(delete().await.unwrap().text("detail"), "Credential not found");
}

#[tokio::test]
async fn what_is_down_is_answered_at_once_and_named() {
    let stack = Stack::start(Options { no_restart: true, ..Options::default() }).await.unwrap();
    Stack::signal(&stack.pids("scheduler"), rustix::process::Signal::KILL);
    testkit::eventually("the scheduler is missed", || async { stack.get("/health").await.unwrap().status == 503 }).await;
    let health = stack.get("/health").await.unwrap();
    assert_eq!((&health.body["checks"]["scheduler"], &health.body["checks"]["auth"]), (&json!("failed"), &json!("ok")));
    let begun = std::time::Instant::now();
    let answer = stack.get("/agents").await.unwrap();
    assert_eq!((answer.status, answer.text("detail")), (503, "scheduler is not available"));
    assert!(answer.headers.contains_key("retry-after") && begun.elapsed() < std::time::Duration::from_secs(2));
}

#[tokio::test]
async fn lists_come_in_pages_newest_first() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let mut made = Vec::new();
    for _ in 0..5 {
        made.push(stack.agent("shell").await.unwrap());
    }
    made.reverse();
    let (mut seen, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = stack.get(&format!("/agents?limit=2{cursor}")).await.unwrap().body;
        seen.extend(page["data"].as_array().unwrap().iter().map(|agent| agent["id"].as_str().unwrap().to_owned()));
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(seen, made);
    for bad in ["limit=0", "limit=1001", "limit=x", "cursor=%00", "cursor=zzzz"] {
        assert_eq!(stack.get(&format!("/agents?{bad}")).await.unwrap().status, 400, "{bad}");
    }
}

#[tokio::test]
async fn output_of_every_nasty_kind_arrives_as_it_was_written() {
    let stack = Stack::start(Options::default()).await.unwrap();
    // U+2028, U+0085, an emoji split across writes, invalid bytes, NUL.
    let prompt =
        r"printf 'a\342\200\250b\302\205c'; printf '\360\237'; sleep 0.3; printf '\230\200'; printf '\377x\000y'; printf 'end\342\202'";
    let session = stack.session("shell", prompt).await.unwrap();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let output: String = events.iter().filter_map(|event| event["data"].as_str()).collect();
    assert_eq!(output, "a\u{2028}b\u{85}c😀\u{fffd}x\0yend\u{fffd}");
}

#[tokio::test]
async fn a_burst_of_output_arrives_whole() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let session = stack.session("shell", "head -c 20000000 /dev/zero | tr '\\0' x; echo; seq 1 200000 >&2").await.unwrap();
    let begun = std::time::Instant::now();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let of = |stream: &str| {
        events.iter().filter(|event| event["stream"] == stream).filter_map(|event| event["data"].as_str()).collect::<String>()
    };
    assert_eq!(of("stdout").len(), 20_000_001, "{} events, the last {:?}", events.len(), events.last());
    let expected: String = (1..=200_000).map(|i| format!("{i}\n")).collect();
    assert!(of("stderr") == expected, "stderr is whole");
    println!("21 MB in {:?}, {} events", begun.elapsed(), events.len());
}

#[tokio::test]
async fn the_published_python_client_works_unmodified() {
    let stack = Stack::start(Options { scripted_model: true, ..Options::default() }).await.unwrap();
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(root.join("../.venv/bin/python"))
        .arg(root.join("clients/sdk_first_steps.py"))
        .env("AOD_API_URL", stack.ready_text("/api_url"))
        .env("AOD_API_TOKEN", stack.ready_text("/api_key"))
        .env("SPRITES_URL", stack.ready_text("/sprites_url"))
        .env("SPRITES_TOKEN", stack.ready_text("/sprites_token"))
        .output()
        .expect("`make setup` makes the Python environment");
    assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
}
