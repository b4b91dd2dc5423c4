//! Every process is replaced, one after the other, while clients work: what an upgrade without a
//! pause is made of.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::StreamExt as _;
use reqwest::{Method, RequestBuilder, Response};
use rustix::process::Signal;
use serde_json::{Value, json};
use system_tests::{Options, Stack};
use tokio::task::JoinSet;

const LINES: usize = 60;
const CLIENTS: usize = 4;

/// A client behind a load balancer: it asks another gateway where one takes no connection, and
/// nothing else is forgiven. It keeps an idle connection for less than the drain, so that it never
/// picks one in the moment in which a gateway ends it.
#[derive(Clone)]
struct Client {
    http: reqwest::Client,
    key: String,
    urls: Arc<[String]>,
    next: Arc<AtomicUsize>,
}

impl Client {
    async fn send(
        &self,
        method: Method,
        path: &str,
        prepare: impl Fn(RequestBuilder) -> RequestBuilder,
    ) -> Response {
        for _ in 0..50 {
            let url = &self.urls[self.next.fetch_add(1, Ordering::Relaxed) % self.urls.len()];
            let request = prepare(
                self.http.request(method.clone(), format!("{url}{path}")).bearer_auth(&self.key),
            );
            match request.send().await {
                Ok(response) => return response,
                Err(error) if error.is_connect() => {
                    tokio::time::sleep(Duration::from_millis(20)).await
                }
                Err(error) => panic!("{method} {path} broke off: {error:?}"),
            }
        }
        panic!("no gateway takes connections");
    }

    async fn json(&self, method: Method, path: &str, body: Option<&Value>) -> Value {
        let response = self
            .send(method.clone(), path, |request| {
                if let Some(body) = body { request.json(body) } else { request }
            })
            .await;
        let (status, answer) = (response.status(), response.text().await.unwrap());
        assert!(status.is_success(), "{method} {path}: {status} {answer}");
        serde_json::from_str(&answer).unwrap()
    }

    /// Follows a session to its end, again by the last id where a gateway ends the stream because
    /// it stops; gives the output, the end and how often the stream was cut.
    async fn follow(&self, session: &str) -> (String, Value, usize) {
        let (mut output, mut last_id, mut cuts) = (String::new(), 0, 0);
        loop {
            let response = self
                .send(
                    Method::GET,
                    &format!("/sessions/{session}/stream?since={last_id}"),
                    |request| request,
                )
                .await;
            assert_eq!(response.status(), 200);
            let (mut body, mut buffer) = (response.bytes_stream(), Vec::new());
            while let Some(Ok(bytes)) = body.next().await {
                buffer.extend_from_slice(&bytes);
                while let Some(end) = buffer.windows(2).position(|pair| pair == b"\n\n") {
                    let block = String::from_utf8(buffer.drain(..end + 2).collect()).unwrap();
                    let Some(data) = block.lines().find_map(|line| line.strip_prefix("data: "))
                    else {
                        continue;
                    };
                    let event: Value = serde_json::from_str(data).unwrap();
                    // A turn's start has no id of its own.
                    if let Some(id) = block.lines().find_map(|line| line.strip_prefix("id: ")) {
                        let id: u64 = id.parse().unwrap();
                        assert!(id > last_id, "{event} after {last_id}");
                        last_id = id;
                    }
                    output.push_str(event["data"].as_str().unwrap_or_default());
                    if event["type"] == "exit" {
                        return (output, event, cuts);
                    }
                }
            }
            cuts += 1;
            assert!(cuts < 20, "a stream that is cut again and again");
        }
    }
}

/// Replaces each process of a service, the next when the one before is ready.
async fn roll(stack: &Stack, service: &str) {
    for old in stack.pids(service) {
        Stack::signal(&[old], Signal::TERM);
        testkit::eventually("a new process is there", || async {
            let now = stack.pids(service);
            now.len() == 2 && !now.contains(&old)
        })
        .await;
        for number in 0..2 {
            let url = format!(
                "{}/readyz",
                stack.ready_text(&format!("/services/{service}/{number}/admin_url"))
            );
            testkit::eventually("it is ready", || async {
                stack
                    .http
                    .get(&url)
                    .send()
                    .await
                    .is_ok_and(|response| response.status().is_success())
            })
            .await;
        }
    }
}

#[tokio::test]
async fn a_rolling_restart_of_everything_fails_no_request_and_loses_no_output() {
    let settings = &[("AOD_DRAIN_SECONDS", "2"), ("AOD_STOP_GRACE_SECONDS", "10")];
    let stack = Stack::start(Options { runners: 2, replicas: 2, settings, ..Options::default() })
        .await
        .unwrap();
    let agent = stack.agent("shell").await.unwrap();
    let urls: Vec<String> = stack
        .ready("/api_urls")
        .as_array()
        .unwrap()
        .iter()
        .map(|url| url.as_str().unwrap().to_owned())
        .collect();
    assert_eq!(urls.len(), 2);
    let client = Client {
        http: reqwest::Client::builder().pool_idle_timeout(Duration::from_secs(1)).build().unwrap(),
        key: stack.ready_text("/api_key"),
        urls: urls.into(),
        next: Arc::default(),
    };
    let rolled = Arc::new(AtomicBool::new(false));
    let expected: String = (1..=LINES).map(|i| format!("line {i}\n")).collect();
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let (client, agent, rolled, expected) =
            (client.clone(), agent.clone(), rolled.clone(), expected.clone());
        clients.spawn(async move {
            let (mut turns, mut cuts) = (0, 0);
            while !rolled.load(Ordering::Relaxed) {
                let prompt = format!("for i in $(seq {LINES}); do echo line $i; sleep 0.03; done");
                let session = client
                    .json(
                        Method::POST,
                        "/sessions",
                        Some(&json!({ "agent_id": agent, "prompt": prompt })),
                    )
                    .await;
                let path = format!("/sessions/{}", session["id"].as_str().unwrap());
                let (output, end, cut) = client.follow(session["id"].as_str().unwrap()).await;
                assert_eq!((output, &end["code"]), (expected.clone(), &json!(0)));
                assert_eq!(client.json(Method::GET, &path, None).await["status"], "completed");
                client.json(Method::POST, &format!("{path}/terminate"), None).await;
                (turns, cuts) = (turns + 1, cuts + cut);
            }
            (turns, cuts)
        });
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    for service in ["auth", "credential-vault", "scheduler", "sprite-runner", "gateway"] {
        roll(&stack, service).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    rolled.store(true, Ordering::Relaxed);
    let (mut turns, mut cuts) = (0, 0);
    while let Some(done) = clients.join_next().await {
        let done = done.unwrap();
        (turns, cuts) = (turns + done.0, cuts + done.1);
    }
    println!("{turns} turns, {cuts} streams resumed");
    assert!(turns > CLIENTS && cuts > 0, "{turns} turns, {cuts} cuts");
}
