//! The stream, to the letter of the contract (§7).

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
async fn every_line_is_what_the_contract_says() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let session = stack.session("shell", "echo é").await.unwrap();
    let text = raw(&stack, &session, None).await;
    assert!(text.is_ascii());
    let blocks: Vec<&str> = text.trim_end().split("\n\n").collect();
    let start = format!(r#"data: {{"type":"start","runtime":"shell","provider":null,"session_id":"{session}"}}"#);
    assert_eq!(blocks[0], start);
    for block in &blocks[1..] {
        let lines: Vec<&str> = block.lines().collect();
        let event: Value = serde_json::from_str(lines.last().unwrap().strip_prefix("data: ").unwrap()).unwrap();
        match event["type"].as_str().unwrap() {
            "turn_start" => assert_eq!(lines.len(), 1),
            _ => assert_eq!(lines, [&*format!("id: {}", event["id"]), lines[1]]),
        }
    }
    let last = blocks.last().unwrap().lines().next().unwrap().strip_prefix("id: ").unwrap();
    // The header wins; what lies behind the end is only the start.
    assert_eq!(raw(&stack, &session, Some(("last-event-id", last))).await, format!("{start}\n\n"));
    let begun = Instant::now();
    assert_eq!(raw(&stack, &session, Some(("last-event-id", "99999999999999999999"))).await, format!("{start}\n\n"));
    assert!(begun.elapsed() < Duration::from_secs(2));
}

#[tokio::test]
async fn a_silent_stream_beats_and_goes_stale() {
    let stack = Stack::start(Options { settings: &[("STREAM_STALE_SECONDS", "17")], ..Options::default() }).await.unwrap();
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
async fn a_reader_that_takes_nothing_is_cut_and_slows_nobody() {
    let stack = Stack::start(Options { settings: &[("AOD_SLOW_READER_SECONDS", "3")], ..Options::default() }).await.unwrap();
    let lines = 4_000_000;
    let session = stack.session("shell", &format!("seq {lines}; sleep 8; echo end")).await.unwrap();
    let open = async || {
        let url = format!("{}/sessions/{session}/stream", stack.ready_text("/api_url"));
        unlimited().get(url).bearer_auth(stack.ready_text("/api_key")).send().await.unwrap().bytes_stream()
    };
    let expected: String = (1..=lines).map(|n| format!("{n}\n")).chain(["end\n".to_owned()]).collect();
    let mut stalled = open().await;
    let mut head = stalled.next().await.unwrap().unwrap().to_vec();
    let begun = Instant::now();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let output: String = events.iter().filter_map(|event| event["data"].as_str()).collect();
    assert!(output == expected && begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    // Long since cut: what had been sent is there, then nothing, not the end.
    while let Some(Ok(bytes)) = stalled.next().await {
        head.extend_from_slice(&bytes);
    }
    let whole = head.windows(2).rposition(|pair| pair == b"\n\n").unwrap();
    let text = std::str::from_utf8(&head[..whole]).unwrap();
    assert!(!text.contains(r#""type":"exit""#), "it was not cut");
    // It goes on by id, and nothing is missing or doubled.
    let seen: Vec<Value> = text.split("\n\n").filter_map(|block| serde_json::from_str(block.split_once("data: ")?.1).ok()).collect();
    let last = seen.iter().rev().find_map(|event| event["id"].as_u64()).unwrap();
    let rest = stack.stream(&session, last).await.unwrap().all().await.unwrap();
    let output: String = seen.iter().chain(&rest).filter_map(|event| event["data"].as_str()).collect();
    assert!(output == expected);
}
