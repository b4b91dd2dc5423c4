//! A Sprites API that misbehaves: bounded retries, then a turn that fails with a stage and a reason
//! its user can act on.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    Router,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::any,
};
use reqwest::Method;
use rustix::process::Signal;
use serde_json::json;
use sprites::{Client, Error};
use system_tests::{Options, Stack};
use types::SpriteName;

/// A server that answers from a list, and with its last answer ever after; and how often it was
/// asked.
async fn troubled(answers: Vec<fn() -> Response>) -> (Client, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = asked.clone();
    let router = Router::new().fallback(any(move || {
        let index = counter.fetch_add(1, Ordering::SeqCst);
        let answer = answers[index.min(answers.len() - 1)];
        async move { answer() }
    }));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    #[expect(clippy::disallowed_methods, reason = "it ends with the test's runtime")]
    tokio::task::spawn(async move { axum::serve(listener, router).await });
    (Client::new(sprites::http_client().unwrap(), &url, "token".to_owned().into()), asked)
}

fn name() -> SpriteName {
    "aod-test".parse().unwrap()
}

fn page() -> Response {
    (StatusCode::BAD_GATEWAY, "<html>bad gateway</html>").into_response()
}

fn broken() -> Response {
    (
        StatusCode::INTERNAL_SERVER_ERROR,
        r#"{"error":"service temporarily unavailable, please retry"}"#,
    )
        .into_response()
}

fn limited() -> Response {
    let body = r#"{"error":"sprite_creation_rate_limited","message":"10 a minute","retry_after_seconds":1}"#;
    (StatusCode::TOO_MANY_REQUESTS, [("retry-after", "30")], body).into_response()
}

fn missing() -> Response {
    (StatusCode::NOT_FOUND, r#"{"error":"sprite not found"}"#).into_response()
}

fn made() -> Response {
    (StatusCode::CREATED, "{}").into_response()
}

fn conflict() -> Response {
    (StatusCode::CONFLICT, r#"{"error":"sprite already exists"}"#).into_response()
}

#[tokio::test]
async fn trouble_that_passes_is_outlived() {
    for (answers, calls) in
        [(vec![page as fn() -> Response, broken, made], 3), (vec![broken, conflict], 2)]
    {
        let (client, asked) = troubled(answers).await;
        client.ensure(&name()).await.unwrap();
        assert_eq!(asked.load(Ordering::SeqCst), calls);
    }
    let (client, asked) = troubled(vec![missing, missing, made]).await;
    client.sprite(name()).write("/x", "x", 0o600).await.unwrap();
    assert_eq!(asked.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn the_wait_for_a_rate_limit_follows_its_body() {
    let (client, asked) = troubled(vec![limited, made]).await;
    let begun = Instant::now();
    client.ensure(&name()).await.unwrap();
    let waited = begun.elapsed();
    assert!(waited >= Duration::from_secs(1) && waited < Duration::from_secs(20), "{waited:?}");
    assert_eq!(asked.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn permanent_refusals_are_not_retried() {
    let refused = || StatusCode::UNAUTHORIZED.into_response();
    let (client, asked) = troubled(vec![refused]).await;
    assert!(matches!(client.ensure(&name()).await, Err(Error::Unauthorized { .. })));
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    let (client, asked) = troubled(vec![missing]).await;
    assert!(matches!(
        client.sprite(name()).write("/x", "x", 0o600).await,
        Err(Error::NotFound { .. })
    ));
    assert_eq!(asked.load(Ordering::SeqCst), 3, "a 404 may be spurious, but not for ever");
}

#[tokio::test]
async fn a_refused_sprites_token_fails_the_turn_with_that_reason() {
    let stack = Stack::start(Options::default()).await.unwrap();
    stack
        .call(
            Method::PUT,
            "/credentials/backend:sprites",
            Some(json!({ "value": "not-the-token" })),
        )
        .await
        .unwrap();
    let session = stack.session("shell", "true").await.unwrap();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let message = "Provisioning failed at create_sprite: the Sprites API refused the credentials: authentication failed";
    assert_eq!(
        (&events.last().unwrap()["type"], &events.last().unwrap()["message"]),
        (&json!("error"), &json!(message))
    );
    let now = stack.get(&format!("/sessions/{session}")).await.unwrap();
    assert_eq!(
        (now.text("status"), &now.body["failure"]),
        ("failed", &json!({ "stage": "create_sprite", "message": message }))
    );
}

#[tokio::test]
async fn a_sprites_api_that_is_down_fails_the_turn_after_bounded_retries() {
    let stack = Stack::start(Options { no_restart: true, ..Options::default() }).await.unwrap();
    Stack::signal(&stack.pids("local-sprites"), Signal::KILL);
    let begun = Instant::now();
    let session = stack.session("shell", "true").await.unwrap();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let message = events.last().unwrap()["message"].as_str().unwrap();
    assert!(
        message
            .starts_with("Provisioning failed at create_sprite: the Sprites API cannot be reached"),
        "{message}"
    );
    assert!(begun.elapsed() < Duration::from_secs(120), "{:?}", begun.elapsed());
}

/// Pauses, cut sockets, lost output, a slow creation, false answers: what the real service does now
/// and then, all at once and often.
#[tokio::test]
async fn a_turn_loses_no_output_to_faults_of_the_real_service() {
    const CHAOS: &[(&str, &str)] = &[(
        "LOCAL_SPRITES_CHAOS",
        "pause=2,drop-sockets=40,lose-output=65536,slow-create=1,spurious=5",
    )];
    let stack = Stack::start(Options { settings: CHAOS, ..Options::default() }).await.unwrap();
    // Bursts, and silences in which the Sprite would be paused, were it not held awake.
    let script =
        "for burst in 1 2 3; do seq $((burst * 20000 - 19999)) $((burst * 20000)); sleep 3; done";
    let session = stack.session("shell", script).await.unwrap();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let last = events.last().unwrap();
    assert_eq!((&last["type"], &last["code"]), (&json!("exit"), &json!(0)), "{last}");
    let output: String = events
        .iter()
        .filter(|event| event["stream"] == "stdout")
        .filter_map(|event| event["data"].as_str())
        .collect();
    let expected: String = (1..=60_000).map(|number| format!("{number}\n")).collect();
    assert!(output == expected, "{} bytes of {}", output.len(), expected.len());
    // The next turn wakes what was paused meanwhile.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let answer = stack
        .post(&format!("/sessions/{session}/prompt"), json!({ "prompt": "echo awake" }))
        .await
        .unwrap();
    assert_eq!(answer.status, 202, "{answer:?}");
    let since = events.iter().filter_map(|event| event["id"].as_u64()).max().unwrap();
    let second = stack.stream(&session, since).await.unwrap().all().await.unwrap();
    assert!(second.iter().any(|event| event["data"] == "awake\n"), "{second:?}");
}
