//! Errors and shapes of the public contract, and the published client.

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
    for bad in
        [b"{".as_slice(), b"", b"\xff\xfe", "[".repeat(50_000).as_bytes(), br#"{"name": "\ud800"}"#]
    {
        let (status, _, body) = raw(Method::POST, "/agents", bearer, bad.to_vec()).await;
        assert_eq!(
            (status, &body["detail"]),
            (400, &json!("Invalid JSON")),
            "{:?}",
            String::from_utf8_lossy(&bad[..bad.len().min(20)])
        );
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
            json!(
                "Unknown runtime: x. Must be one of: ['claude', 'codex', 'gemini', 'opencode', 'shell']"
            ),
        ),
        (
            json!({ "name": "n", "model": "openai/o3", "runtime": "claude" }),
            422,
            json!(
                "Runtime claude cannot serve model openai/o3: provider openai not in ['anthropic']"
            ),
        ),
        (
            json!({ "name": "n", "model": "acme/x", "runtime": "claude" }),
            422,
            json!([{ "type": "value_error", "loc": ["model"], "msg": "Value error, Unknown model: acme/x", "input": "acme/x" }]),
        ),
        (
            json!({ "name": "n", "model": "m", "runtime": "claude", "environment_id": "x" }),
            404,
            json!("Environment not found"),
        ),
    ];
    for (body, status, detail) in cases {
        let answer = stack.post("/agents", body.clone()).await.unwrap();
        assert_eq!((answer.status, &answer.body["detail"]), (status, &detail), "{body}");
    }

    for path in ["/agents/x", "/agents/00000000-0000-4000-8000-000000000000"] {
        let answer = stack.get(path).await.unwrap();
        assert_eq!((answer.status, answer.text("detail")), (404, "Agent not found"));
    }
    for path in [
        "/sessions/x",
        "/sessions/x/turns",
        "/sessions/x/stream",
        "/sessions/00000000-0000-4000-8000-000000000000/stream",
    ] {
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
        let answer = stack
            .post("/sessions", json!({ "agent_id": agent, "prompt": "x", "timeout": timeout }))
            .await
            .unwrap();
        assert_eq!((answer.status, &answer.body["detail"][0]["type"]), (422, &json!(kind)));
    }
    let answer = stack
        .post(
            "/sessions",
            json!({ "agent_id": agent, "prompt": "x", "timeout": "60", "unknown": 1 }),
        )
        .await
        .unwrap();
    assert_eq!(answer.status, 202, "{answer:?}");
    let claude = stack.agent("claude").await.unwrap();
    let answer =
        stack.post("/sessions", json!({ "agent_id": claude, "prompt": "x" })).await.unwrap();
    assert_eq!(
        (answer.status, answer.text("detail")),
        (400, "No API key configured for runtime: claude")
    );
    assert_eq!(
        stack
            .call(Method::PUT, "/credentials/nonsense", Some(json!({ "value": "x" })))
            .await
            .unwrap()
            .status,
        404
    );
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
        (
            answer.status().as_u16(),
            answer.json::<Value>().await.unwrap()["detail"].as_str().unwrap_or_default().to_owned(),
        )
    };
    assert_eq!(answer(&key).await.0, 200);
    let expired = stack
        .post("/api-keys", json!({ "name": "old", "expires_at": "2020-01-01T00:00:00Z" }))
        .await
        .unwrap();
    assert_eq!(answer(expired.text("key")).await, (401, "API key has expired".to_owned()));
    assert_eq!(
        stack.post("/api-keys", json!({ "name": "x", "expires_at": "soon" })).await.unwrap().status,
        422
    );
    assert!(!stack.get("/api-keys").await.unwrap().body.to_string().contains(&key));
    assert_eq!(
        stack
            .call(Method::DELETE, &format!("/api-keys/{}", created.text("id")), None)
            .await
            .unwrap()
            .status,
        200
    );
    // Within a second, on every gateway.
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    assert_eq!(answer(&key).await, (401, "API key is inactive".to_owned()));

    let put = stack
        .call(
            Method::PUT,
            "/credentials/provider:openai",
            Some(json!({ "value": "sk-sentinel-abcd" })),
        )
        .await
        .unwrap();
    assert_eq!((put.status, put.text("hint")), (200, "abcd"));
    let list = stack.get("/credentials").await.unwrap();
    assert!(
        !list.body.to_string().contains("sentinel")
            && list.body.to_string().contains("provider:openai")
    );
    let delete = || stack.call(Method::DELETE, "/credentials/provider:openai", None);
    assert_eq!(delete().await.unwrap().text("detail"), "Credential deleted");
    assert_eq!(delete().await.unwrap().text("detail"), "Credential not found");
}

#[tokio::test]
async fn an_unavailable_service_is_reported_at_once_by_name() {
    let stack = Stack::start(Options { no_restart: true, ..Options::default() }).await.unwrap();
    Stack::signal(&stack.pids("scheduler"), rustix::process::Signal::KILL);
    testkit::eventually("the scheduler is missed", || async {
        stack.get("/health").await.unwrap().status == 503
    })
    .await;
    let health = stack.get("/health").await.unwrap();
    assert_eq!(
        (&health.body["checks"]["scheduler"], &health.body["checks"]["auth"]),
        (&json!("failed"), &json!("ok"))
    );
    let begun = std::time::Instant::now();
    let answer = stack.get("/agents").await.unwrap();
    assert_eq!((answer.status, answer.text("detail")), (503, "scheduler is not available"));
    assert!(
        answer.headers.contains_key("retry-after")
            && begun.elapsed() < std::time::Duration::from_secs(8)
    );
}

#[tokio::test]
async fn a_burst_of_output_arrives_whole() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let session = stack
        .session("shell", "head -c 20000000 /dev/zero | tr '\\0' x; echo; seq 1 200000 >&2")
        .await
        .unwrap();
    let begun = std::time::Instant::now();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let of = |stream: &str| {
        events
            .iter()
            .filter(|event| event["stream"] == stream)
            .filter_map(|event| event["data"].as_str())
            .collect::<String>()
    };
    assert_eq!(
        of("stdout").len(),
        20_000_001,
        "{} events, the last {:?}",
        events.len(),
        events.last()
    );
    let expected: String = (1..=200_000).map(|i| format!("{i}\n")).collect();
    assert!(of("stderr") == expected, "stderr is whole");
    println!("21 MB in {:?}, {} events", begun.elapsed(), events.len());
}

/// Whatever is sent: an answer of the 4xx sort, quickly, or a connection that is closed.
#[tokio::test]
async fn nothing_that_is_sent_is_answered_with_500() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let (url, key) = (stack.ready_text("/api_url"), stack.ready_text("/api_key"));
    let host = url.strip_prefix("http://").unwrap().to_owned();
    let auth = format!("Authorization: Bearer {key}\r\n");
    let session = stack.session("shell", "true").await.unwrap();
    let post = |body: &[u8]| {
        [
            format!(
                "POST /agents HTTP/1.1\r\nHost: x\r\n{auth}Content-Length: {}\r\n\r\n",
                body.len()
            )
            .as_bytes(),
            body,
        ]
        .concat()
    };
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\n{auth}\r\n").into_bytes();
    let nested = |open: &str, close: &str| {
        format!(
            r#"{{"name":"n","model":"m","runtime":"shell","metadata":{{"a":{}1{}}}}}"#,
            open.repeat(200),
            close.repeat(200)
        )
    };
    let with = |field: &str| {
        format!(r#"{{"name":"n","model":"m","runtime":"shell",{field}}}"#).into_bytes()
    };
    let requests: Vec<(&str, Vec<u8>, u16)> = vec![
        ("deep nesting", post(nested("[", "]").as_bytes()), 400),
        ("deeper nesting", post("[".repeat(2_000_000).as_bytes()), 400),
        ("a huge number", post(&with(&format!(r#""metadata":{{"a":{}}}"#, "9".repeat(100_000)))), 400),
        ("a huge exponent", post(&with(r#""metadata":{"a":1e400}"#)), 400),
        ("a small exponent", post(&with(r#""metadata":{"a":1e-400}"#)), 201),
        ("a lone surrogate", post(&with(r#""system":"\ud800""#)), 400),
        ("a lone surrogate for a key", post(&with(r#""metadata":{"\udfff":"x"}"#)), 400),
        ("NUL", post(&with(r#""metadata":{"a":["\u0000"]}"#)), 422),
        ("bad UTF-8", post(&[&b"{\"name\":\""[..], b"\xc3\x28", b"\"}"].concat()), 400),
        ("a byte order mark", post(b"\xef\xbb\xbf{}"), 400),
        ("a doubled field", post(&with(r#""name":5"#)), 422),
        ("the largest body", post(&with(&format!(r#""description":"{}""#, "x".repeat(2_621_440 - 65)))), 201),
        ("a text that is too large", post(&with(&format!(r#""system":"{}""#, "x".repeat(262_145)))), 422),
        ("a body that is too large", post(&vec![b' '; 2_621_441]), 413),
        ("a body of NULs", post(&[0; 1000]), 400),
        ("no such path, encoded", get("/agents/%ff"), 404),
        ("a path out of the tree", get("/agents/..%2f..%2fetc"), 404),
        ("a bad query", get("/agents?limit=%ff"), 400),
        ("a query of junk", get("/agents?&&=&%=&limit"), 400),
        ("a stream from nowhere", get(&format!("/sessions/{session}/stream?since=%00")), 400),
        ("a long path", get(&format!("/agents/{}", "a".repeat(7000))), 404),
        ("a longer path", get(&format!("/agents/{}", "a".repeat(70_000))), 414),
        ("a flood of headers", format!("GET /agents HTTP/1.1\r\nHost: x\r\n{}\r\n", "X-A: b\r\n".repeat(500)).into_bytes(), 431),
        ("a large header", format!("GET /agents HTTP/1.1\r\nHost: x\r\nX-A: {}\r\n\r\n", "b".repeat(1_000_000)).into_bytes(), 431),
        ("a key of bytes", b"GET /agents HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n\r\n".to_vec(), 401),
        (
            "an idempotency key of bytes",
            format!("POST /agents HTTP/1.1\r\nHost: x\r\n{auth}Idempotency-Key: \u{e9}\r\nContent-Length: 2\r\n\r\n{{}}").into_bytes(),
            400,
        ),
        ("a length that lies", format!("POST /agents HTTP/1.1\r\nHost: x\r\n{auth}Content-Length: x\r\n\r\n").into_bytes(), 400),
        (
            "two lengths",
            format!("POST /agents HTTP/1.1\r\nHost: x\r\n{auth}Content-Length: 2\r\nContent-Length: 3\r\n\r\n{{}}").into_bytes(),
            400,
        ),
        ("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00".to_vec(), 400),
        ("an odd method", format!("BREW /agents HTTP/1.1\r\nHost: x\r\n{auth}\r\n").into_bytes(), 405),
    ];
    for (what, request, expected) in requests {
        let status = raw_status(&host, &request).await;
        assert_eq!(status, Some(expected), "{what}");
    }
    assert_eq!(stack.get("/health").await.unwrap().status, 200);
}

/// The status that a raw request is answered with.
async fn raw_status(host: &str, request: &[u8]) -> Option<u16> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut socket = tokio::net::TcpStream::connect(host).await.unwrap();
    let (mut reader, mut writer) = socket.split();
    let (mut answer, mut buffer) = (Vec::new(), [0; 4096]);
    // An answer may come before all of the request was taken.
    let write = async {
        let _ = writer.write_all(request).await;
        std::future::pending::<()>().await;
    };
    let read = async {
        while !answer.windows(2).any(|pair| pair == b"\r\n") {
            match reader.read(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(count) => answer.extend_from_slice(&buffer[..count]),
            }
        }
    };
    tokio::select! {
        () = write => {}
        () = read => {}
        () = tokio::time::sleep(std::time::Duration::from_secs(10)) => {}
    }
    std::str::from_utf8(&answer).ok()?.split(' ').nth(1)?.parse().ok()
}

#[tokio::test]
async fn a_browser_may_call_from_another_origin() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let session = stack.session("shell", "echo hi").await.unwrap();
    let url = format!("{}/sessions/{session}/stream", stack.ready_text("/api_url"));
    let wanted = "authorization,content-type,last-event-id,idempotency-key,x-api-key,anthropic-version,x-stainless-os";
    let preflight =
        stack.http.request(Method::OPTIONS, &url).header("origin", "https://app.example");
    let preflight = preflight
        .header("access-control-request-method", "GET")
        .header("access-control-request-headers", wanted);
    let answer = preflight.send().await.unwrap();
    assert_eq!(
        (
            answer.status().as_u16(),
            answer.headers()["access-control-allow-origin"].to_str().unwrap()
        ),
        (200, "*")
    );
    let allowed =
        answer.headers()["access-control-allow-headers"].to_str().unwrap().to_ascii_lowercase();
    assert!(wanted.split(',').all(|header| allowed.contains(header)), "{allowed}");
    let methods = answer.headers()["access-control-allow-methods"].to_str().unwrap().to_owned();
    assert!(
        ["GET", "POST", "PUT", "DELETE"].iter().all(|method| methods.contains(method)),
        "{methods}"
    );
    let stream = stack
        .http
        .get(&url)
        .header("origin", "https://app.example")
        .bearer_auth(stack.ready_text("/api_key"))
        .send()
        .await
        .unwrap();
    assert_eq!(stream.headers()["access-control-allow-origin"], "*");
    assert!(stream.text().await.unwrap().contains("hi\\n"));
    // A refusal can be read too, with its request id.
    let refused =
        stack.http.get(&url).header("origin", "https://app.example").send().await.unwrap();
    assert_eq!(
        (refused.status().as_u16(), &refused.headers()["access-control-allow-origin"]),
        (401, &"*".parse().unwrap())
    );
    let exposed = refused.headers()["access-control-expose-headers"].to_str().unwrap();
    assert!(
        ["x-request-id", "request-id", "x-should-retry"]
            .iter()
            .all(|name| exposed.split(',').any(|shown| shown == *name)),
        "{exposed}"
    );
}

#[tokio::test]
async fn the_document_is_shown_by_a_page_that_needs_no_other_host() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let url = stack.ready_text("/api_url");
    let text = async |path: &str| {
        stack
            .http
            .get(format!("{url}{path}"))
            .send()
            .await
            .unwrap()
            .error_for_status()
            .unwrap()
            .text()
            .await
            .unwrap()
    };
    let page = text("/docs").await;
    let assets: Vec<&str> = page
        .split(['"', '\''])
        .filter(|part| part.ends_with(".js") || part.ends_with(".css"))
        .collect();
    assert!(assets.len() >= 3 && !page.contains("https://") && !page.contains("http://"), "{page}");
    for asset in assets {
        assert!(!text(&format!("/docs/{}", asset.trim_start_matches("./"))).await.is_empty());
    }
    assert!(text("/docs/swagger-initializer.js").await.contains("/openapi.json"));
    let document: Value = serde_json::from_str(&text("/openapi.json").await).unwrap();
    assert_eq!(document["openapi"], "3.1.0");
    // What is described is there, and wants a key unless it says otherwise; what is not described
    // is refused.
    for (path, item) in document["paths"].as_object().unwrap() {
        let path = path
            .replace("{id}", "00000000-0000-4000-8000-000000000000")
            .replace("{kind}", "provider:openai");
        for method in ["GET", "PUT", "POST", "DELETE", "PATCH"] {
            let operation = &item[method.to_lowercase()];
            let answer = stack
                .http
                .request(method.parse().unwrap(), format!("{url}{path}"))
                .send()
                .await
                .unwrap();
            let open = !operation["security"].is_null();
            let expected = if operation.is_null() {
                // There, a method that a route does not have is no route.
                if path.starts_with("/v1/") { 404 } else { 405 }
            } else if open {
                200
            } else {
                401
            };
            assert_eq!(answer.status().as_u16(), expected, "{method} {path}");
        }
    }
}
