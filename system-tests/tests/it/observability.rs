//! What an operator sees: one trace from the request to the agent, metrics with the names that
//! dashboards and alerts use.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, body::Bytes, extract::State, routing::post};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse},
    common::v1::any_value::Value as Attribute,
    trace::v1::Span,
};
use prost::Message as _;
use serde_json::json;
use system_tests::{Options, Stack};
use tokio::task::JoinSet;

/// Spans as they came, with the service that sent them.
type Spans = Arc<Mutex<Vec<(String, Span)>>>;

/// Takes what exporters send, as a collector does; gives its address, and its owner.
async fn collector(spans: Spans) -> (String, JoinSet<()>) {
    async fn take(State(spans): State<Spans>, body: Bytes) -> Vec<u8> {
        for sent in ExportTraceServiceRequest::decode(body).unwrap().resource_spans {
            let attributes = sent.resource.unwrap().attributes;
            let name = attributes
                .into_iter()
                .find(|attribute| attribute.key == "service.name")
                .and_then(|attribute| attribute.value?.value);
            let Some(Attribute::StringValue(name)) = name else {
                panic!("a service without a name")
            };
            let new = sent
                .scope_spans
                .into_iter()
                .flat_map(|scope| scope.spans)
                .map(|span| (name.clone(), span));
            spans.lock().unwrap().extend(new);
        }
        ExportTraceServiceResponse::default().encode_to_vec()
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let router = Router::new().route("/v1/traces", post(take)).with_state(spans);
    let mut serving = JoinSet::new();
    serving.spawn(async move { axum::serve(listener, router).await.unwrap() });
    (format!("http://{addr}"), serving)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn a_trace_leads_from_the_request_to_the_agent() {
    let spans = Spans::default();
    let (endpoint, _collector) = collector(spans.clone()).await;
    let endpoint: &'static str = Box::leak(endpoint.into_boxed_str());
    let settings = Box::leak(Box::new([
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint),
        ("OTEL_BSP_SCHEDULE_DELAY", "200"),
    ]));
    let stack = Stack::start(Options { settings, ..Options::default() }).await.unwrap();
    let agent = stack.agent("shell").await.unwrap();
    let body = json!({ "agent_id": agent, "prompt": "echo at-$TRACEPARENT-", "secret_env_vars": { "TOKEN": "a-secret-value" } });
    let posted = stack.post("/sessions", body).await.unwrap();
    assert_eq!(posted.status, 202, "{posted:?}");
    let trace = posted.headers["x-request-id"].to_str().unwrap().to_owned();
    let events = stack.stream(posted.text("id"), 0).await.unwrap().all().await.unwrap();
    let output: String = events.iter().filter_map(|event| event["data"].as_str()).collect();
    assert!(output.contains(&format!("at-00-{trace}-")), "{output}");

    let wanted: BTreeSet<(&str, &str)> = [
        ("gateway", "POST /sessions"),
        ("gateway", "call"),
        ("scheduler", "serve"),
        ("scheduler", "publish"),
        ("sprite-runner", "job"),
        ("sprite-runner", "turn"),
        ("sprite-runner", "create_sprite"),
        ("sprite-runner", "sprites create"),
        ("sprite-runner", "sprites exec"),
        ("credential-vault", "serve"),
    ]
    .into();
    let of_trace = || -> Vec<(String, Span)> {
        spans
            .lock()
            .unwrap()
            .iter()
            .filter(|(_, span)| hex(&span.trace_id) == trace)
            .cloned()
            .collect()
    };
    let mut found = Vec::new();
    for _ in 0..100 {
        found = of_trace();
        let names: BTreeSet<(&str, &str)> =
            found.iter().map(|(service, span)| (service.as_str(), span.name.as_str())).collect();
        if wanted.is_subset(&names) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let names: BTreeSet<(&str, &str)> =
        found.iter().map(|(service, span)| (service.as_str(), span.name.as_str())).collect();
    assert!(wanted.is_subset(&names), "{:?} are missing in {names:?}", wanted.difference(&names));
    // One tree: everything hangs on the request.
    let ids: BTreeSet<_> = found.iter().map(|(_, span)| span.span_id.clone()).collect();
    let roots: Vec<_> = found
        .iter()
        .filter(|(_, span)| !ids.contains(&span.parent_span_id))
        .map(|(_, span)| &span.name)
        .collect();
    assert_eq!(roots, ["POST /sessions"]);
    // What the CLI was told to belong to is there too.
    let parent = output.split(&format!("{trace}-")).nth(1).unwrap().split('-').next().unwrap();
    assert!(ids.iter().any(|id| hex(id) == parent), "{parent}");
    // The next turn's processes belong to the next request's trace.
    let prompted = stack
        .post(
            &format!("/sessions/{}/prompt", posted.text("id")),
            json!({ "prompt": "echo at-$TRACEPARENT-" }),
        )
        .await
        .unwrap();
    let next = prompted.headers["x-request-id"].to_str().unwrap().to_owned();
    let since = events.last().unwrap()["id"].as_u64().unwrap();
    let events = stack.stream(posted.text("id"), since).await.unwrap().all().await.unwrap();
    let output: String = events.iter().filter_map(|event| event["data"].as_str()).collect();
    assert!(next != trace && output.contains(&format!("at-00-{next}-")), "{output}");
    let text = format!("{:?}", spans.lock().unwrap());
    for secret in
        ["a-secret-value", &stack.ready_text("/api_key"), &stack.ready_text("/sprites_token")]
    {
        assert!(!text.contains(secret), "a span holds {secret}");
    }
}

/// The samples of a page of metrics, without comments.
async fn metrics(stack: &Stack, service: &str) -> String {
    let url = stack.ready_text(&format!("/services/{service}/0/admin_url"));
    stack.http.get(format!("{url}/metrics")).send().await.unwrap().text().await.unwrap()
}

#[tokio::test]
async fn metrics_count_events_and_name_no_user() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let good = stack.session("shell", "echo hello").await.unwrap();
    stack.stream(&good, 0).await.unwrap().all().await.unwrap();
    let bad = stack.session("shell", "exit 3").await.unwrap();
    stack.stream(&bad, 0).await.unwrap().all().await.unwrap();
    // Gauges are set every five seconds.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let mut pages = BTreeMap::new();
    for service in
        ["gateway", "auth", "credential-vault", "scheduler", "sprite-runner", "local-sprites"]
    {
        pages.insert(service, metrics(&stack, service).await);
    }
    for (service, sample) in [
        ("scheduler", "aod_turns_ended_total{runtime=\"shell\",outcome=\"completed\"} 1"),
        ("scheduler", "aod_turns_ended_total{runtime=\"shell\",outcome=\"failed\"} 1"),
        ("scheduler", "aod_turn_seconds_count{runtime=\"shell\"} 2"),
        ("scheduler", "aod_turn_start_seconds_count{runtime=\"shell\"} 2"),
        ("scheduler", "aod_turn_wait_seconds_count 2"),
        ("scheduler", "aod_jobs_waiting 0"),
        ("scheduler", "aod_recorder_lag_events 0"),
        ("scheduler", "aod_dead_letters 0"),
        ("scheduler", "aod_db_connections{state="),
        ("sprite-runner", "aod_stage_seconds_count{stage=\"create_sprite\"} 2"),
        ("sprite-runner", "aod_first_output_seconds_count 1"),
        ("sprite-runner", "aod_sprites_requests_total{operation=\"create\",outcome=\"ok\"} 2"),
        ("sprite-runner", "aod_runner_capacity 64"),
        ("gateway", "aod_stream_first_event_seconds_count 2"),
        (
            "gateway",
            "aod_http_requests_total{route=\"/sessions\",method=\"POST\",status=\"202\"} 2",
        ),
        ("gateway", "# HELP aod_http_requests_total"),
        ("credential-vault", "aod_vault_operations_total{operation=\"encrypt\",outcome=\"ok\"}"),
        ("local-sprites", "local_sprites_requests_total{route=\"/v1/sprites\",status=\"201\"} 2"),
        ("local-sprites", "local_sprites_request_seconds_count{route=\"/v1/sprites/{name}/exec\"}"),
        ("local-sprites", "local_sprites_sprites "),
        ("auth", "aod_bus_requests_total{subject=\"aod.rpc.auth.v1.key.verify\",code=\"ok\"}"),
    ] {
        let page = &pages[service];
        assert!(page.contains(sample), "{service} has no {sample}: {page}");
    }
    for (service, page) in &pages {
        for id in [&good, &bad] {
            assert!(!page.contains(id.as_str()), "{service} names a session in its metrics");
        }
    }
}

#[test]
fn the_reference_of_settings_is_what_the_services_say() {
    let committed = std::fs::read_to_string(format!(
        "{}/../{}",
        env!("CARGO_MANIFEST_DIR"),
        system_tests::reference::PATH
    ))
    .unwrap();
    assert!(
        committed == system_tests::reference::render().unwrap(),
        "{} differs: run `make reference`",
        system_tests::reference::PATH
    );
}
