//! What strangers can do to the gateway, and what it tells browsers.

use std::time::{Duration, Instant};

use contract::access;
use reqwest::Method;
use serde_json::json;
use system_tests::{Options, Stack};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use types::ApiKey;

fn address(stack: &Stack) -> String {
    stack.ready_text("/api_url").trim_start_matches("http://").to_owned()
}

/// When the server closes a connection on which this comes, byte by byte.
async fn closed_after(stack: &Stack, bytes: &[u8], pause: Duration) -> Duration {
    let begun = Instant::now();
    let mut connection = TcpStream::connect(address(stack)).await.unwrap();
    let (mut read, mut write) = connection.split();
    let trickle = async {
        for byte in bytes {
            if write.write_all(&[*byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(pause).await;
        }
        std::future::pending::<()>().await;
    };
    let mut answer = Vec::new();
    tokio::select! {
        () = trickle => {}
        _ = read.read_to_end(&mut answer) => {}
        () = tokio::time::sleep(Duration::from_secs(70)) => {}
    }
    begun.elapsed()
}

#[tokio::test]
async fn slow_connections_are_closed_and_delay_no_other() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let key = stack.ready_text("/api_key");
    let head = format!("GET /agents HTTP/1.1\r\nhost: x\r\nx-slow: {}", "a".repeat(1000));
    let body = format!(
        "POST /agents HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: 5000\r\n\r\n"
    );
    let (silent, slow_head, slow_body) = tokio::join!(
        closed_after(&stack, b"", Duration::ZERO),
        closed_after(&stack, head.as_bytes(), Duration::from_millis(100)),
        async {
            let mut connection = TcpStream::connect(address(&stack)).await.unwrap();
            connection.write_all(body.as_bytes()).await.unwrap();
            let (begun, mut answer) = (Instant::now(), vec![0; 1000]);
            let read = tokio::time::timeout(Duration::from_secs(70), connection.read(&mut answer))
                .await
                .unwrap()
                .unwrap();
            assert!(
                answer[..read].starts_with(b"HTTP/1.1 408"),
                "{}",
                String::from_utf8_lossy(&answer[..read])
            );
            begun.elapsed()
        },
    );
    for (what, took) in [("silent", silent), ("slow head", slow_head), ("slow body", slow_body)] {
        assert!((25..60).contains(&took.as_secs()), "{what}: {took:?}");
    }
    // Three hundred of them, and another client is served at once.
    let mut idle = Vec::new();
    for _ in 0..300 {
        idle.push(TcpStream::connect(address(&stack)).await.unwrap());
    }
    let begun = Instant::now();
    assert_eq!(stack.get("/agents").await.unwrap().status, 200);
    assert!(begun.elapsed() < Duration::from_secs(15));
    // A head that is too large is refused before it is there.
    let mut connection = TcpStream::connect(address(&stack)).await.unwrap();
    let large = format!("GET / HTTP/1.1\r\nhost: x\r\nx-large: {}\r\n\r\n", "a".repeat(200_000));
    let _ = connection.write_all(large.as_bytes()).await;
    let mut answer = vec![0; 100];
    let read = connection.read(&mut answer).await.unwrap_or(0);
    assert!(
        read == 0 || answer.starts_with(b"HTTP/1.1 431"),
        "{}",
        String::from_utf8_lossy(&answer)
    );
}

#[tokio::test]
async fn guessing_keys_is_slowed_and_a_key_has_its_rate() {
    let settings = &[("AOD_AUTH_FAILURES_PER_MINUTE", "5"), ("AOD_REQUESTS_PER_SECOND", "50")];
    let stack = Stack::start(Options { settings, ..Options::default() }).await.unwrap();
    assert_eq!(stack.get("/agents").await.unwrap().status, 200);
    let url = format!("{}/agents", stack.ready_text("/api_url"));
    let guess = async || {
        let guessed = ApiKey::generate().unwrap();
        let response = stack.http.get(&url).bearer_auth(guessed.reveal()).send().await.unwrap();
        (response.status().as_u16(), response.headers().get("retry-after").cloned())
    };
    for _ in 0..5 {
        assert_eq!(guess().await.0, 401);
    }
    let (status, retry_after) = guess().await;
    assert_eq!((status, retry_after.unwrap().to_str().unwrap()), (429, "60"));
    // A valid key is not refused.
    assert_eq!(stack.get("/agents").await.unwrap().status, 200);

    let asked = futures::future::join_all((0..300).map(|_| stack.get("/agents"))).await;
    let refused: Vec<_> =
        asked.into_iter().map(Result::unwrap).filter(|answer| answer.status == 429).collect();
    assert!((100..300).contains(&refused.len()), "{}", refused.len());
    assert_eq!(refused[0].text("detail"), "Too many requests");
    let wait: u64 = refused[0].headers["retry-after"].to_str().unwrap().parse().unwrap();
    tokio::time::sleep(Duration::from_secs(wait)).await;
    assert_eq!(stack.get("/agents").await.unwrap().status, 200);
}

#[tokio::test]
async fn a_revoked_key_ends_on_every_gateway_within_a_second() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let secrets = std::fs::read_to_string(stack.data_dir().join("secrets.json")).unwrap();
    let secrets: serde_json::Value = serde_json::from_str(&secrets).unwrap();
    let passwords = secrets["nats_passwords"].as_array().unwrap();
    let password = passwords.iter().find(|pair| pair[0] == "gateway").unwrap()[1].as_str().unwrap();
    let nats = format!("nats://{}", stack.ready_text("/events_url").rsplit('@').next().unwrap());
    let listen = format!("127.0.0.1:{}", testkit::free_port().unwrap());
    let settings = [
        ("NATS_URL", nats.as_str()),
        ("NATS_PASSWORD", password),
        ("AOD_LISTEN_ADDR", listen.as_str()),
    ];
    let _second = testkit::services::start("gateway", &settings).unwrap();

    let key = stack.post("/api-keys", json!({ "name": "to be revoked" })).await.unwrap();
    let gateways = [stack.ready_text("/api_url"), format!("http://{listen}")];
    let status = async |gateway: &str| {
        let answer =
            stack.http.get(format!("{gateway}/agents")).bearer_auth(key.text("key")).send().await;
        answer.map_or(0, |answer| answer.status().as_u16())
    };
    for gateway in &gateways {
        testkit::eventually("the key works", async || status(gateway).await == 200).await;
    }
    let revoked =
        stack.call(Method::DELETE, &format!("/api-keys/{}", key.text("id")), None).await.unwrap();
    assert!(revoked.status < 300, "{revoked:?}");
    let begun = Instant::now();
    for gateway in &gateways {
        while status(gateway).await != 401 {
            assert!(begun.elapsed() < Duration::from_secs(10), "{gateway} still takes it");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Three keys with a stream each: one is deactivated, one expires, and one's user is disabled.
#[tokio::test]
async fn a_stream_ends_within_five_seconds_of_its_key() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let data = stack.data_dir().to_str().unwrap();
    let admin = |args: &[&str]| {
        let output = stack
            .aod(&[&["--output", "json", "admin", "--data-dir", data], args].concat())
            .unwrap()
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap_or_default()
    };
    admin(&["user", "create", "mallory"]);
    let foreign = admin(&["key", "create", "mallory"])["key"].as_str().unwrap().to_owned();
    let expires_at =
        types::Timestamp::from_unix_micros(types::Timestamp::now().unix_micros() + 6_000_000)
            .to_string();
    let revoked = stack.post("/api-keys", json!({ "name": "revoked" })).await.unwrap();
    let expiring = stack
        .post("/api-keys", json!({ "name": "expiring", "expires_at": expires_at }))
        .await
        .unwrap();

    let api = stack.ready_text("/api_url");
    let session_of = async |key: &str| {
        let post = async |path: &str, body: serde_json::Value| {
            let sent = stack
                .http
                .post(format!("{api}{path}"))
                .bearer_auth(key)
                .json(&body)
                .send()
                .await
                .unwrap();
            let answer = sent.json::<serde_json::Value>().await.unwrap();
            answer["id"].as_str().unwrap_or_else(|| panic!("{path}: {answer}")).to_owned()
        };
        let agent = post(
            "/agents",
            json!({ "name": "a", "model": "claude-sonnet-4-5", "runtime": "shell" }),
        )
        .await;
        post(
            "/sessions",
            json!({ "agent_id": agent, "prompt": "while :; do echo x; sleep 0.2; done" }),
        )
        .await
    };
    let stream_of = async |key: &str, session: &str| {
        let url = format!("{api}/sessions/{session}/stream");
        stack.http.get(url).bearer_auth(key).send().await.unwrap().error_for_status().unwrap()
    };
    let token = stack.ready_text("/sprites_token");
    let put = stack
        .http
        .put(format!("{api}/credentials/backend:sprites"))
        .bearer_auth(&foreign)
        .json(&json!({ "value": token }));
    put.send().await.unwrap().error_for_status().unwrap();
    let own = session_of(&stack.ready_text("/api_key")).await;
    let theirs = session_of(&foreign).await;
    let streams = [
        stream_of(revoked.text("key"), &own).await,
        stream_of(expiring.text("key"), &own).await,
        stream_of(&foreign, &theirs).await,
        stream_of(&stack.ready_text("/api_key"), &own).await,
    ];
    #[expect(clippy::disallowed_methods, reason = "it ends with the test's runtime")]
    let mut ends = streams.map(|mut stream| {
        tokio::spawn(async move {
            while let Ok(Some(_)) = stream.chunk().await {}
            Instant::now()
        })
    });
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (expired_at, begun) = (Instant::now() + Duration::from_secs(5), Instant::now());
    assert!(
        stack
            .call(Method::DELETE, &format!("/api-keys/{}", revoked.text("id")), None)
            .await
            .unwrap()
            .status
            < 300
    );
    admin(&["user", "disable", "mallory"]);
    for (index, from) in [(0, begun), (2, begun), (1, expired_at)] {
        let end = tokio::time::timeout(Duration::from_secs(60), &mut ends[index])
            .await
            .expect("the stream did not end")
            .unwrap();
        assert!(
            end < from + Duration::from_secs(15),
            "stream {index} ended after {:?}",
            end - begun
        );
    }
    assert!(!ends[3].is_finished(), "a key that works keeps its stream");
}

#[tokio::test]
async fn responses_have_security_headers_for_browsers() {
    let settings = &[("ALLOWED_HOSTS", "127.0.0.1,.example.com")];
    let stack = Stack::start(Options { settings, ..Options::default() }).await.unwrap();
    for path in ["/agents", "/nowhere", "/docs/", "/livez"] {
        let headers = stack.call(Method::GET, path, None).await.unwrap().headers;
        let header = |name: &str| {
            headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
        };
        assert_eq!(header("x-content-type-options"), "nosniff", "{path}");
        assert_eq!(header("x-frame-options"), "DENY", "{path}");
        assert!(header("content-security-policy").contains("frame-ancestors 'none'"), "{path}");
        assert!(!header("cache-control").is_empty(), "{path}");
    }
    let as_host = async |host: &str, path: &str| {
        let url = format!("{}{path}", stack.ready_text("/api_url"));
        let request =
            stack.http.get(url).header("host", host).bearer_auth(stack.ready_text("/api_key"));
        request.send().await.unwrap().status().as_u16()
    };
    assert_eq!(as_host("evil.org", "/agents").await, 400);
    assert_eq!(as_host("api.example.com:443", "/agents").await, 200);
    assert_eq!(as_host("10.0.0.7:8777", "/readyz").await, 200, "probes come by address");
    let refused = stack.post("/agents", json!({ "name": "x".repeat(3_000_000) })).await.unwrap();
    assert_eq!(refused.status, 413);
}

/// A client with a service's password sends garbled requests: each is answered quickly, and the
/// services continue.
#[tokio::test]
async fn garbage_on_the_bus_is_answered_and_harms_no_service() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let session = stack.session("shell", "true").await.unwrap();
    stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let secrets = std::fs::read_to_string(stack.data_dir().join("secrets.json")).unwrap();
    let secrets: serde_json::Value = serde_json::from_str(&secrets).unwrap();
    let address = stack.ready_text("/events_url").rsplit('@').next().unwrap().to_owned();
    let mut random = fastrand::Rng::with_seed(20_261_124);
    let (mut asked, mut refused) = (0, 0);
    for access in [access::GATEWAY, access::RUNNER, access::SCHEDULER, access::OPERATOR] {
        let passwords = secrets["nats_passwords"].as_array().unwrap();
        let password = passwords.iter().find(|pair| pair[0] == access.user).unwrap()[1]
            .as_str()
            .unwrap()
            .to_owned();
        let options =
            async_nats::ConnectOptions::with_user_and_password(access.user.to_owned(), password);
        let client = options.custom_inbox_prefix(access.inbox()).connect(&address).await.unwrap();
        for rpc in contract::rpc::RPCS.iter().filter(|rpc| {
            access.publish.iter().any(|allowed| access::matches(allowed, rpc.subject))
        }) {
            for round in 0..40 {
                let payload = match round % 4 {
                    0 => (0..random.usize(..200)).map(|_| random.u8(..)).collect(),
                    // Fields that are there, with texts that are ids, or are not.
                    1 => fields(&mut random, &session),
                    2 => fields(&mut random, "'; drop table session; --\0\u{202e}"),
                    _ => fields(&mut random, &"x".repeat(10_000)),
                };
                // Some wait for what does not come, until their caller's deadline.
                let deadline =
                    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap()
                        + Duration::from_millis(500);
                let mut headers = async_nats::HeaderMap::new();
                headers.insert(contract::header::DEADLINE, deadline.as_millis().to_string());
                let reply = client.request_with_headers(rpc.subject, headers, payload.into());
                let reply = tokio::time::timeout(Duration::from_secs(30), reply).await;
                let reply =
                    reply.unwrap_or_else(|_| panic!("{} did not answer", rpc.subject)).unwrap();
                asked += 1;
                refused += u32::from(reply.headers.is_some());
            }
        }
    }
    assert!(asked > 1000 && refused > asked / 2, "{asked} {refused}");
    for process in
        ["gateway", "auth", "credential-vault", "scheduler", "sprite-runner", "model-gateway"]
    {
        let log = std::fs::read_dir(stack.data_dir().join("logs"))
            .unwrap()
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(process));
        for entry in log {
            let text = std::fs::read_to_string(entry.path()).unwrap();
            assert!(!text.contains("panicked"), "{text}");
        }
    }
    assert_eq!(stack.get("/health").await.unwrap().status, 200);
    let session = stack.session("shell", "echo still here").await.unwrap();
    stack.stream(&session, 0).await.unwrap().until_output("still here").await.unwrap();
}

/// A message of some fields, as protobuf writes them.
fn fields(random: &mut fastrand::Rng, text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for number in 1..=random.u8(1..8) {
        if random.bool() {
            bytes.push(number << 3 | 2);
            let mut length = text.len();
            while length >= 128 {
                bytes.push((length & 127) as u8 | 128);
                length >>= 7;
            }
            bytes.push(length as u8);
            bytes.extend_from_slice(text.as_bytes());
        } else {
            bytes.extend([number << 3, random.u8(..128)]);
        }
    }
    bytes
}
