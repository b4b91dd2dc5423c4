//! The stream, to the letter of the contract (docs/api.md §7).

use std::time::{Duration, Instant};

use futures::StreamExt as _;
use serde_json::{Value, json};
use system_tests::{Options, Stack};

/// A client for streams: they are as long as their sessions.
fn unlimited() -> reqwest::Client {
    reqwest::Client::builder().build().unwrap()
}

async fn raw(stack: &Stack, session: &str, header: Option<(&str, &str)>) -> String {
    let url = format!("{}/sessions/{session}/stream", stack.ready_text("/api_url"));
    let mut request = unlimited().get(url).bearer_auth(stack.ready_text("/api_key"));
    if let Some((name, value)) = header {
        request = request.header(name, value);
    }
    let response = request.send().await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    assert_eq!(
        (&response.headers()["cache-control"], &response.headers()["x-accel-buffering"]),
        (&"no-cache".parse().unwrap(), &"no".parse().unwrap())
    );
    response.text().await.unwrap()
}

#[tokio::test]
async fn every_streamed_line_has_the_form_of_the_contract() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let session = stack.session("shell", "echo é").await.unwrap();
    let text = raw(&stack, &session, None).await;
    assert!(text.is_ascii());
    let blocks: Vec<&str> = text.trim_end().split("\n\n").collect();
    let start = format!(
        r#"data: {{"type":"start","runtime":"shell","provider":null,"session_id":"{session}"}}"#
    );
    assert_eq!(blocks[0], start);
    for block in &blocks[1..] {
        let lines: Vec<&str> = block.lines().collect();
        let event: Value =
            serde_json::from_str(lines.last().unwrap().strip_prefix("data: ").unwrap()).unwrap();
        match event["type"].as_str().unwrap() {
            "turn_start" => assert_eq!(lines.len(), 1),
            _ => assert_eq!(lines, [&*format!("id: {}", event["id"]), lines[1]]),
        }
    }
    let last = blocks.last().unwrap().lines().next().unwrap().strip_prefix("id: ").unwrap();
    // Behind the end is only the start.
    let begun = Instant::now();
    for since in [last, "99999999999999999999"] {
        let url =
            format!("{}/sessions/{session}/stream?since={since}", stack.ready_text("/api_url"));
        let response =
            unlimited().get(url).bearer_auth(stack.ready_text("/api_key")).send().await.unwrap();
        assert_eq!(response.text().await.unwrap(), format!("{start}\n\n"));
        // A browser's EventSource reconnects for ever, but after this.
        assert_eq!(resumed(&stack, &session, since).await, 204);
    }
    assert!(begun.elapsed() < Duration::from_secs(20));
    let before: u64 = last.parse::<u64>().unwrap() - 1;
    assert_eq!(resumed(&stack, &session, &before.to_string()).await, 200);
}

/// The status that a client which resumes from an event gets.
async fn resumed(stack: &Stack, session: &str, last_event_id: &str) -> u16 {
    let url = format!("{}/sessions/{session}/stream?since=0", stack.ready_text("/api_url"));
    let request = unlimited()
        .get(url)
        .bearer_auth(stack.ready_text("/api_key"))
        .header("last-event-id", last_event_id);
    request.send().await.unwrap().status().as_u16()
}

#[tokio::test]
async fn a_reader_beyond_the_end_harms_no_other() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let session = stack
        .session("shell", "sleep 1; for i in $(seq 40); do echo line $i; sleep 0.1; done")
        .await
        .unwrap();
    let _beyond = [
        stack.stream(&session, u64::MAX).await.unwrap(),
        stack.stream(&session, 1_000_000_000_000_000).await.unwrap(),
    ];
    let mut events = stack.stream(&session, 0).await.unwrap();
    events.until_output("line 1\n").await.unwrap();
    let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
    events.until_output("line 2\n").await.unwrap();
    while let Some(event) = events.next().await.unwrap() {
        longest = longest.max(last.elapsed());
        last = Instant::now();
        if event["type"] == "exit" {
            assert!(longest < Duration::from_secs(8), "a pause of {longest:?}");
            return;
        }
    }
    panic!("no exit");
}

#[tokio::test]
async fn a_session_that_is_terminated_and_deleted_ends_its_streams() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let mut sessions = Vec::new();
    for _ in 0..6 {
        let session = stack.session("shell", "echo begun; sleep 60").await.unwrap();
        let mut events = stack.stream(&session, 0).await.unwrap();
        events.until_output("begun").await.unwrap();
        sessions.push((session, events));
    }
    for (session, _) in &sessions {
        assert_eq!(
            stack.post(&format!("/sessions/{session}/terminate"), json!({})).await.unwrap().status,
            200
        );
        assert_eq!(
            stack
                .call(reqwest::Method::DELETE, &format!("/sessions/{session}/delete"), None)
                .await
                .unwrap()
                .status,
            200
        );
    }
    let begun = Instant::now();
    for (session, events) in sessions {
        let rest = events.all().await.unwrap();
        assert_eq!(rest.last().unwrap()["type"], "terminated", "{session}: {rest:?}");
        assert_eq!(rest.iter().filter(|event| event["type"] == "terminated").count(), 1);
    }
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_stream_ends_soon_after_its_key_stops_working() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let session = stack.session("shell", "echo begun; sleep 60").await.unwrap();
    let key = stack.post("/api-keys", json!({ "name": "short" })).await.unwrap();
    let url = format!("{}/sessions/{session}/stream", stack.ready_text("/api_url"));
    let stream = unlimited().get(url).bearer_auth(key.text("key")).send().await.unwrap();
    assert_eq!(stream.status(), 200);
    let path = format!("/api-keys/{}", key.text("id"));
    assert_eq!(stack.call(reqwest::Method::DELETE, &path, None).await.unwrap().status, 200);
    let begun = Instant::now();
    let text = stream.text().await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    let last: Value =
        serde_json::from_str(text.trim_end().rsplit_once("data: ").unwrap().1).unwrap();
    assert_eq!((&last["type"], &last["message"]), (&json!("error"), &json!("API key is inactive")));
}

#[tokio::test]
async fn a_key_has_a_bounded_number_of_streams() {
    let stack = Stack::start(Options {
        settings: &[("AOD_MAX_STREAMS_PER_KEY", "3")],
        ..Options::default()
    })
    .await
    .unwrap();
    let session = stack.session("shell", "sleep 60").await.unwrap();
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(stack.open_stream(&session, 0).await.unwrap());
    }
    let path = format!("/sessions/{session}/stream");
    let refused = stack.get(&path).await.unwrap();
    assert_eq!((refused.status, &refused.headers["retry-after"]), (429, &"5".parse().unwrap()));
    assert!(refused.text("detail").starts_with("This API key has 3 streams open"), "{refused:?}");
    streams.pop();
    testkit::eventually("one may be opened again", || async {
        stack.open_stream(&session, 0).await.is_ok()
    })
    .await;
}

/// What the first process of a service has in memory, in kB.
fn resident_kb(stack: &Stack, service: &str) -> u64 {
    let status =
        std::fs::read_to_string(format!("/proc/{}/status", stack.pids(service)[0])).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[tokio::test]
async fn readers_of_history_that_take_nothing_cost_little_memory() {
    let stack = Stack::start(Options::default()).await.unwrap();
    // Bytes that are no UTF-8 take six times as many on the wire.
    let session =
        stack.session("shell", "head -c 12000000 /dev/zero | tr '\\0' '\\377'").await.unwrap();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let characters: usize = events
        .iter()
        .filter_map(|event| event["data"].as_str())
        .map(|data| data.chars().count())
        .sum();
    assert_eq!(characters, 12_000_000);
    // Another gateway, whose allocator has nothing left over.
    Stack::signal(&stack.pids("gateway"), rustix::process::Signal::KILL);
    testkit::eventually("a gateway is back", || async {
        stack.get("/health").await.is_ok_and(|health| health.status == 200)
    })
    .await;
    let before = resident_kb(&stack, "gateway");
    let mut readers = Vec::new();
    for _ in 0..20 {
        readers.push(stack.open_stream(&session, 0).await.unwrap());
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    let each = resident_kb(&stack, "gateway").saturating_sub(before) / 20;
    println!("{each} kB for each reader");
    assert!(each < 1024, "{each} kB for each reader");
}

#[tokio::test]
async fn more_sessions_are_followed_than_a_stream_has_consumers_by_default() {
    const FOLLOWED: usize = 1100;
    let settings = &[("DEFAULT_MAX_CONCURRENT_SESSIONS", "5000")];
    let stack = Stack::start(Options { settings, ..Options::default() }).await.unwrap();
    let agent = stack.agent("shell").await.unwrap();
    let followed = system_tests::idle::follow(&stack, &agent, FOLLOWED).await.unwrap();
    // The projector starts over, beside all who follow.
    Stack::signal(&stack.pids("scheduler"), rustix::process::Signal::KILL);
    testkit::eventually("the scheduler is back", || async {
        stack.get("/health").await.is_ok_and(|health| health.status == 200)
    })
    .await;
    for (session, events) in followed.into_iter().rev().step_by(100) {
        assert_eq!(
            stack.post(&format!("/sessions/{session}/terminate"), json!({})).await.unwrap().status,
            200
        );
        assert_eq!(events.all().await.unwrap().last().unwrap()["type"], "terminated");
    }
}

/// Prints what many readers cost who each follow a session of their own: `cargo test … -- --ignored
/// --nocapture idle_sessions`.
#[tokio::test]
#[ignore = "measures memory, with ten thousand connections"]
async fn idle_sessions_that_are_followed_cost_little_memory() {
    const FOLLOWED: usize = 10_000;
    const SUBSCRIBED: usize = 100_000;
    const CONNECTIONS: usize = 4;
    let settings = &[
        ("AOD_MAX_STREAMS_PER_KEY", "100000"),
        ("DEFAULT_MAX_CONCURRENT_SESSIONS", "100000"),
        ("STREAM_STALE_SECONDS", "3600"),
        ("RUST_LOG", "error"),
    ];
    let stack = Stack::start(Options { settings, ..Options::default() }).await.unwrap();
    let agent = stack.agent("shell").await.unwrap();
    let measure = || (resident_kb(&stack, "nats"), resident_kb(&stack, "gateway"));
    let report = |what: &str, number: usize, before: (u64, u64), after: (u64, u64)| {
        let each = |before: u64, after: u64| after.saturating_sub(before) as f64 / number as f64;
        let (nats, gateway) = (each(before.0, after.0), each(before.1, after.1));
        println!(
            "{number} {what}: NATS {} MB, {nats:.2} kB each; gateway {} MB, {gateway:.2} kB each",
            after.0 / 1000,
            after.1 / 1000
        );
        (nats, gateway)
    };
    let before = measure();
    let begun = std::time::Instant::now();
    let followed = system_tests::idle::follow(&stack, &agent, FOLLOWED).await.unwrap();
    println!("followed within {:.1} s", begun.elapsed().as_secs_f64());
    let (nats, gateway) = report("followed sessions", FOLLOWED, before, measure());
    assert!(nats < 5.0 && gateway < 100.0, "a consumer took 45 kB of NATS");
    drop(followed);

    // As many gateways would.
    let before = measure();
    let begun = std::time::Instant::now();
    let mut subscriptions = Vec::with_capacity(SUBSCRIBED);
    let url = url::Url::parse(&stack.ready_text("/events_url")).unwrap();
    let address = format!("{}:{}", url.host_str().unwrap(), url.port().unwrap());
    for _ in 0..CONNECTIONS {
        let options = async_nats::ConnectOptions::with_user_and_password(
            "events".to_owned(),
            url.password().unwrap().to_owned(),
        );
        let client = options.connect(&address).await.unwrap();
        for _ in 0..SUBSCRIBED / CONNECTIONS {
            subscriptions.push(
                client
                    .subscribe(format!("aod.live.session.v1.{}", types::SessionId::new()))
                    .await
                    .unwrap(),
            );
        }
        client.flush().await.unwrap();
    }
    println!("subscribed within {:.1} s", begun.elapsed().as_secs_f64());
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (nats, _) = report("subscriptions", SUBSCRIBED, before, measure());
    assert!(nats < 5.0);
    // What is published meanwhile arrives.
    let session = stack.session("shell", "echo heard").await.unwrap();
    stack.stream(&session, 0).await.unwrap().until_output("heard").await.unwrap();
}

#[tokio::test]
async fn a_stream_without_events_sends_heartbeats_and_goes_stale() {
    let stack =
        Stack::start(Options { settings: &[("STREAM_STALE_SECONDS", "17")], ..Options::default() })
            .await
            .unwrap();
    let session = stack.session("shell", "echo begun; sleep 40").await.unwrap();
    let text = raw(&stack, &session, None).await;
    assert!(text.contains("begun"));
    let (before, last) = text.trim_end().rsplit_once("\n\n").unwrap();
    assert!(before.ends_with(": heartbeat"), "{text}");
    let stale: Value = serde_json::from_str(last.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!((&stale["type"], &stale["message"]), (&json!("stale"), &json!("No output for 17s")));
    // Only the connection ended.
    assert_eq!(stack.get(&format!("/sessions/{session}")).await.unwrap().text("status"), "running");
}

#[tokio::test]
async fn a_reader_that_reads_nothing_is_disconnected_and_slows_no_other() {
    let stack = Stack::start(Options {
        settings: &[("AOD_SLOW_READER_SECONDS", "3")],
        ..Options::default()
    })
    .await
    .unwrap();
    let lines = 4_000_000;
    let session = stack.session("shell", &format!("seq {lines}; sleep 8; echo end")).await.unwrap();
    let open = async || {
        let url = format!("{}/sessions/{session}/stream", stack.ready_text("/api_url"));
        unlimited()
            .get(url)
            .bearer_auth(stack.ready_text("/api_key"))
            .send()
            .await
            .unwrap()
            .bytes_stream()
    };
    let expected: String =
        (1..=lines).map(|n| format!("{n}\n")).chain(["end\n".to_owned()]).collect();
    let mut stalled = open().await;
    let mut head = stalled.next().await.unwrap().unwrap().to_vec();
    let begun = Instant::now();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let output: String = events.iter().filter_map(|event| event["data"].as_str()).collect();
    assert!(
        output == expected && begun.elapsed() < Duration::from_secs(180),
        "{:?}",
        begun.elapsed()
    );
    // Long since cut: what had been sent is there, then nothing, not the end.
    while let Some(Ok(bytes)) = stalled.next().await {
        head.extend_from_slice(&bytes);
    }
    let whole = head.windows(2).rposition(|pair| pair == b"\n\n").unwrap();
    let text = std::str::from_utf8(&head[..whole]).unwrap();
    assert!(!text.contains(r#""type":"exit""#), "it was not cut");
    // It resumes by id, and nothing is missing or doubled.
    let seen: Vec<Value> = text
        .split("\n\n")
        .filter_map(|block| serde_json::from_str(block.split_once("data: ")?.1).ok())
        .collect();
    let last = seen.iter().rev().find_map(|event| event["id"].as_u64()).unwrap();
    let rest = stack.stream(&session, last).await.unwrap().all().await.unwrap();
    let output: String =
        seen.iter().chain(&rest).filter_map(|event| event["data"].as_str()).collect();
    assert!(output == expected);
}

#[tokio::test]
async fn typed_events_are_listed_and_followed_from_turn_to_turn() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let session = stack.session("shell", "seq 20000; echo é >&2").await.unwrap();
    let url = format!("{}/sessions/{session}/events?stream=true", stack.ready_text("/api_url"));
    let follow = |after: &str| {
        unlimited()
            .get(&url)
            .bearer_auth(stack.ready_text("/api_key"))
            .header("last-event-id", after.to_owned())
            .send()
    };
    let mut followed = follow("0").await.unwrap();
    assert_eq!(followed.headers()["content-type"], "text/event-stream");
    let mut text = String::new();
    until_idle(&mut followed, &mut text, 1).await;
    let answer = stack
        .post(&format!("/sessions/{session}/prompt"), json!({ "prompt": "exit 3" }))
        .await
        .unwrap();
    assert_eq!(answer.status, 202);
    until_idle(&mut followed, &mut text, 2).await;
    let streamed: Vec<Value> = text
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(|json| serde_json::from_str(json).unwrap())
        .collect();
    let (mut listed, mut after) = (Vec::new(), 0);
    loop {
        let page =
            stack.get(&format!("/sessions/{session}/events?limit=3&after={after}")).await.unwrap();
        assert_eq!(page.status, 200);
        listed.extend(page.body["data"].as_array().unwrap().clone());
        if page.body["has_more"] == false {
            break;
        }
        after = page.body["last_id"].as_u64().unwrap();
    }
    assert_eq!(streamed, listed);
    let of_type =
        |name: &str| listed.iter().filter(|event| event["type"] == name).collect::<Vec<_>>();
    let (running, idle) = (of_type("session.status_running"), of_type("session.status_idle"));
    assert_eq!((&running[1]["prompt"], &running[1]["turn"]), (&json!("exit 3"), &json!(2)));
    assert_eq!(
        (&idle[0]["stop_reason"]["type"], &idle[0]["exit_code"]),
        (&json!("end_turn"), &json!(0))
    );
    assert_eq!(
        (&idle[1]["stop_reason"]["type"], &idle[1]["exit_code"]),
        (&json!("failed"), &json!(3))
    );
    assert!(listed.windows(2).all(|pair| pair[0]["id"].as_u64() < pair[1]["id"].as_u64()));
    assert!(
        listed
            .windows(2)
            .all(|pair| pair[0]["processed_at"].as_str() < pair[1]["processed_at"].as_str())
    );
    // A client that resumes gets the rest, once.
    let resume_at = listed.len() - 2;
    let (mut resumed, mut rest) =
        (follow(&listed[resume_at]["id"].to_string()).await.unwrap(), String::new());
    until_idle(&mut resumed, &mut rest, 1).await;
    assert_eq!(rest.matches("data: ").count(), 1);
    assert_eq!(
        stack
            .call(reqwest::Method::DELETE, &format!("/sessions/{session}/delete"), None)
            .await
            .unwrap()
            .status,
        200
    );
    while let Some(chunk) =
        tokio::time::timeout(Duration::from_secs(10), followed.chunk()).await.unwrap().unwrap()
    {
        text.push_str(std::str::from_utf8(&chunk).unwrap());
    }
    assert!(text.contains("\"type\":\"session.deleted\""), "{text}");
}

/// Reads until so many turns have ended.
async fn until_idle(response: &mut reqwest::Response, text: &mut String, turns: usize) {
    while text.matches("session.status_idle").count() < turns || !text.ends_with("\n\n") {
        let chunk = tokio::time::timeout(Duration::from_secs(30), response.chunk())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        text.push_str(std::str::from_utf8(&chunk).unwrap());
    }
}

#[tokio::test]
async fn a_turn_that_prints_too_much_keeps_its_beginning_its_end_and_its_exit_code() {
    let settings = &[
        ("AOD_TURN_OUTPUT_MAX_BYTES", "1000000"),
        ("AOD_SESSION_OUTPUT_BYTES_PER_SECOND", "4000000"),
    ];
    let stack = Stack::start(Options { settings, ..Options::default() }).await.unwrap();
    let session = stack
        .session("shell", "echo first; seq 10000000 10999999; echo last; exit 3")
        .await
        .unwrap();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let text: String = events.iter().filter_map(|event| event["data"].as_str()).collect();
    assert!(text.starts_with("first\n10000000\n") && text.ends_with("10999999\nlast\n"));
    assert_eq!(events.last().unwrap()["code"], 3);

    let page = stack.get(&format!("/sessions/{session}/events?limit=1000")).await.unwrap();
    let dropped = page.body["data"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|event| event["type"] == "session.output_dropped");
    let dropped: u64 = dropped.map(|event| event["bytes"].as_u64().unwrap()).sum();
    assert_eq!(text.len() as u64 + dropped, 9_000_000 + 6 + 5);
    assert!(text.len() < 1_500_000, "{}", text.len());
}
