//! Services (docs/sprites-api.md §9): definitions, states, and a stream of events for a while after
//! each call.

use std::{fs, sync::Arc, time::Duration};

use axum::{
    Json,
    body::Bytes,
    extract::{Path, State},
    http::StatusCode,
    response::Response,
};
use serde_json::{Value, json};
use tokio::sync::{
    broadcast::{self, error::RecvError},
    mpsc,
};
use types::Timestamp;

use super::{Api, ErrorResponse, Query, failure, invalid, lines};
use crate::{
    run::exec::{Stream, parse_signal},
    services::{Definition, Event, ServiceError, State as ServiceState, Unit, is_name, log_path},
    sprites::sprite::Sprite,
};

/// How long a response follows a service by default.
const WATCH: Duration = Duration::from_secs(5);
const WATCH_MAX: Duration = Duration::from_secs(3600);
const STOP_GRACE: Duration = Duration::from_secs(10);
/// A definition is kept in the Sprite's record, which every change rewrites.
const DEFINITION_BYTES_MAX: usize = 16 * 1024;
const LINES: usize = 100;
const LINES_MAX: usize = 10_000;

fn describe(sprite: &Sprite, name: &str, definition: &Definition) -> Value {
    let state = sprite.services.unit(name).map(|unit| unit.state()).unwrap_or_default();
    let ServiceState { status, process, started_at, error, restart_count, next_restart_at } = state;
    let mut described = json!({ "name": name, "status": status, "restart_count": restart_count });
    // Absent rather than empty: Go's client takes no empty times.
    let optional = [
        ("pid", process.map(|process| json!(process.pid))),
        ("started_at", started_at.map(|at| json!(at.to_string()))),
        ("next_restart_at", next_restart_at.map(|at| json!(at.to_string()))),
        ("error", error.map(|error| json!(error))),
    ];
    for (name, value) in optional {
        if let Some(value) = value {
            described[name] = value;
        }
    }
    json!({
        "name": name,
        "cmd": definition.cmd,
        "args": definition.args,
        "env": definition.env,
        "dir": definition.dir,
        "needs": definition.needs,
        "http_port": definition.http_port,
        "state": described,
    })
}

fn event_line(event: &Event, at: Timestamp) -> Value {
    let mut line = match event {
        Event::Started => json!({ "type": "started" }),
        Event::Output(Stream::Stdout, data) => json!({ "type": "stdout", "data": data }),
        Event::Output(Stream::Stderr, data) => json!({ "type": "stderr", "data": data }),
        Event::Exit(code) => json!({ "type": "exit", "exit_code": code }),
        Event::Error(why) => json!({ "type": "error", "data": why }),
        Event::Stopping => json!({ "type": "stopping" }),
        Event::Stopped(code) => json!({ "type": "stopped", "exit_code": code }),
    };
    line["timestamp"] = json!(at.unix_micros() / 1000);
    line
}

/// Tells what happens to a service for a while, or until it is stopped; then where its log is.
fn follow(
    api: &Api,
    name: &str,
    before: Vec<Value>,
    mut events: broadcast::Receiver<Event>,
    watch: Duration,
) -> Response {
    let (sender, receiver) = mpsc::channel(64);
    let log = format!("/.sprite/logs/services/{name}.log");
    let stop = api.registry.lifecycle.stop_token();
    let told = async move {
        for line in before {
            if sender.send(line).await.is_err() {
                return;
            }
        }
        let live = async {
            loop {
                match events.recv().await {
                    Ok(event) => {
                        let is_last = matches!(event, Event::Stopped(_));
                        if sender.send(event_line(&event, Timestamp::now())).await.is_err()
                            || is_last
                        {
                            return;
                        }
                    }
                    // A client that is slower than the service reads the rest in the log.
                    Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return,
                }
            }
        };
        let _ = tokio::time::timeout(watch.min(WATCH_MAX), live).await;
        let at = Timestamp::now().unix_micros() / 1000;
        let last = json!({ "type": "complete", "timestamp": at, "log_files": { "combined": log, "stdout": log, "stderr": log } });
        let _ = sender.send(last).await;
    };
    api.registry.lifecycle.tracker().spawn(async move { stop.run_until_cancelled(told).await });
    lines(receiver)
}

fn find(api: &Api, name: &str) -> Result<Arc<Sprite>, ErrorResponse> {
    Ok(api.registry.get(name)?)
}

fn find_unit(
    api: &Api,
    name: &str,
    service: &str,
) -> Result<(Arc<Sprite>, Arc<Unit>), ErrorResponse> {
    let sprite = find(api, name)?;
    // Before its Sprite was started there is a service, and nothing that keeps it.
    let unit = sprite.services.defined(&sprite, service)?;
    Ok((sprite, unit))
}

pub async fn list(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ErrorResponse> {
    let sprite = find(&api, &name)?;
    Ok(Json(
        sprite
            .record()
            .services
            .iter()
            .map(|(name, definition)| describe(&sprite, name, definition))
            .collect(),
    ))
}

pub async fn get(
    State(api): State<Api>,
    Path((name, service)): Path<(String, String)>,
) -> Result<Json<Value>, ErrorResponse> {
    let sprite = find(&api, &name)?;
    match sprite.record().services.get(&service) {
        Some(definition) => Ok(Json(describe(&sprite, &service, definition))),
        None => Err(ServiceError::NotFound.into()),
    }
}

pub async fn put(
    State(api): State<Api>,
    Path((name, service)): Path<(String, String)>,
    query: Query,
    body: Bytes,
) -> Result<Response, ErrorResponse> {
    if !is_name(&service) {
        return Err(invalid(
            "a service's name is up to 63 letters, digits, '-', '_' and '.', and not \"signal\"",
        ));
    }
    if body.len() > DEFINITION_BYTES_MAX {
        return Err(failure(
            StatusCode::PAYLOAD_TOO_LARGE,
            "a service's definition is at most 16 KiB",
        ));
    }
    let mut definition: Definition = serde_json::from_slice(&body)
        .map_err(|error| invalid(format!("invalid service: {error}")))?;
    definition.stopped = false;
    if definition.cmd.is_empty() {
        return Err(invalid("cmd is required"));
    }
    let sprite = find(&api, &name)?;
    let holder = api.registry.wake(&sprite).await?;
    let unit = sprite.services.put(&sprite, &service, definition)?;
    // What ran under the old definition ends first.
    let _ = unit.stop(STOP_GRACE).await;
    let events = unit.watch();
    unit.start(&sprite, holder, &api.registry.lifecycle);
    Ok(follow(&api, &service, Vec::new(), events, query.duration("duration").unwrap_or(WATCH)))
}

pub async fn delete(
    State(api): State<Api>,
    Path((name, service)): Path<(String, String)>,
) -> Result<StatusCode, ErrorResponse> {
    let (sprite, unit) = find_unit(&api, &name, &service)?;
    let _ = unit.stop(STOP_GRACE).await;
    sprite.services.remove(&sprite, &service)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Whether its user wants a service to run is kept: it holds when the Sprite or this server is
/// restarted.
fn want(sprite: &Sprite, service: &str, stopped: bool) -> Result<(), ErrorResponse> {
    let change = |definition: &mut Definition| definition.stopped = stopped;
    Ok(sprite.change(|record| {
        let _ = record.services.get_mut(service).map(change);
    })?)
}

async fn begin(
    api: &Api,
    (name, service): (String, String),
    query: Query,
    ends_first: bool,
) -> Result<Response, ErrorResponse> {
    let (sprite, unit) = find_unit(api, &name, &service)?;
    want(&sprite, &service, false)?;
    let holder = api.registry.wake(&sprite).await?;
    if ends_first {
        let _ = unit.stop(STOP_GRACE).await;
    }
    let events = unit.watch();
    unit.start(&sprite, holder, &api.registry.lifecycle);
    Ok(follow(api, &service, Vec::new(), events, query.duration("duration").unwrap_or(WATCH)))
}

pub async fn start(
    State(api): State<Api>,
    Path(path): Path<(String, String)>,
    query: Query,
) -> Result<Response, ErrorResponse> {
    begin(&api, path, query, false).await
}

pub async fn restart(
    State(api): State<Api>,
    Path(path): Path<(String, String)>,
    query: Query,
) -> Result<Response, ErrorResponse> {
    begin(&api, path, query, true).await
}

pub async fn stop(
    State(api): State<Api>,
    Path((name, service)): Path<(String, String)>,
    query: Query,
) -> Result<Response, ErrorResponse> {
    let (sprite, unit) = find_unit(&api, &name, &service)?;
    let grace = query.duration("timeout").unwrap_or(STOP_GRACE).min(WATCH_MAX);
    if !unit.is_kept() {
        return Err(ServiceError::NotRunning.into());
    }
    want(&sprite, &service, true)?;
    let events = unit.watch();
    api.registry.lifecycle.tracker().spawn(async move { unit.stop(grace).await });
    Ok(follow(&api, &service, Vec::new(), events, grace + Duration::from_secs(5)))
}

pub async fn signal(
    State(api): State<Api>,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<StatusCode, ErrorResponse> {
    let body: Value = serde_json::from_slice(&body).map_err(|_| invalid("invalid JSON"))?;
    let text = |name: &str| body.get(name).and_then(Value::as_str).unwrap_or_default();
    let signal = parse_signal(text("signal")).ok_or_else(|| invalid("unknown signal"))?;
    let (_, unit) = find_unit(&api, &name, text("name"))?;
    unit.signal(signal)?;
    Ok(StatusCode::NO_CONTENT)
}

/// The newest lines of a service's log, then what happens to it.
pub async fn logs(
    State(api): State<Api>,
    Path((name, service)): Path<(String, String)>,
    query: Query,
) -> Result<Response, ErrorResponse> {
    let (sprite, unit) = find_unit(&api, &name, &service)?;
    let lines =
        query.get("lines").and_then(|text| text.parse().ok()).unwrap_or(LINES).min(LINES_MAX);
    let events = unit.watch();
    let log = fs::read_to_string(log_path(&sprite, &service)).unwrap_or_default();
    let all: Vec<_> = log.lines().collect();
    let before =
        all[all.len().saturating_sub(lines)..].iter().filter_map(|line| logged(line)).collect();
    Ok(follow(&api, &service, before, events, query.duration("duration").unwrap_or_default()))
}

/// A line of the log, as it was sent when it was written.
fn logged(line: &str) -> Option<Value> {
    let (at, rest) = line.split_once(" [")?;
    let (stream, data) = rest.split_once("] ")?;
    let stream = if stream == "stderr" { Stream::Stderr } else { Stream::Stdout };
    Some(event_line(&Event::Output(stream, format!("{data}\n")), at.parse().ok()?))
}
