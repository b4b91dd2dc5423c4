//! The wire format of the Sprites API. Facts from the published clients and documents: names of fields, statuses, frames.

use std::{collections::HashMap, io, path::PathBuf, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{
        DefaultBodyLimit, FromRequestParts as _, Path, RawQuery, Request, State,
        ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade},
    },
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{any, get, post, put},
};
use rustix::process::Signal;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};
use subtle::ConstantTimeEq as _;
use tokio::sync::mpsc;
use tokio_util::{io::ReaderStream, task::TaskTracker};
use types::{SpriteName, Timestamp};
use url::form_urlencoded;

use crate::{
    exec::{self, ExecSession, Output, locked},
    files::{self, Root},
    network::Policy,
    registry::{Record, Registry, RegistryError, Sprite},
    sandbox::HOME,
};

const ORGANIZATION: &str = "local";
/// The JS client gives a silent socket up after 45 s (§3.5).
const KEEPALIVE: Duration = Duration::from_secs(15);
const BODY_BYTES_MAX: usize = 256 * 1024 * 1024;
/// How long the client has to close the socket after the exit frame.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

#[derive(Clone)]
struct Api {
    registry: Arc<Registry>,
    tasks: TaskTracker,
}

pub fn router(registry: Arc<Registry>, token: SecretString, tasks: TaskTracker) -> Router {
    let sprite = Router::new()
        .route("/", get(get_sprite).delete(delete_sprite))
        .route("/exec", get(exec_or_list).post(not_served))
        .route("/exec/{id}", get(attach))
        .route("/exec/{id}/kill", post(kill))
        .route("/fs/read", get(read_file))
        .route("/fs/write", put(write_file))
        .route("/fs/list", get(list_files))
        .route("/fs/delete", axum::routing::delete(delete_file))
        .route("/fs/rename", post(rename_file))
        .route("/fs/copy", post(copy_file))
        .route("/fs/chmod", post(chmod_file))
        .route("/policy/network", get(get_policy).post(set_policy))
        .route("/upgrade", post(|| async { StatusCode::NO_CONTENT }))
        .layer(middleware::from_fn(versioned));
    Router::new()
        .route("/v1/sprites", get(list_sprites).post(create_sprite))
        .nest("/v1/sprites/{name}", sprite)
        .fallback(any(not_served))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn_with_state(Arc::new(token), authenticate))
        .with_state(Api { registry, tasks })
}

async fn authenticate(State(token): State<Arc<SecretString>>, request: Request, next: Next) -> Response {
    let sent = request.headers().get(header::AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    if sent.is_some_and(|sent| sent.ct_eq(token.expose_secret().as_bytes()).into()) {
        next.run(request).await
    } else {
        failure(StatusCode::UNAUTHORIZED, "authentication failed")
    }
}

async fn versioned(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    response.headers_mut().insert("sprite-version", HeaderValue::from_static("v0.0.1-rc48"));
    response
}

fn failure(status: StatusCode, message: &str) -> Response {
    (status, Json(json!({ "error": message }))).into_response()
}

async fn not_served() -> Response {
    failure(StatusCode::NOT_FOUND, "not found")
}

impl IntoResponse for RegistryError {
    fn into_response(self) -> Response {
        let status = match self {
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Exists => StatusCode::CONFLICT,
            Self::Closed => StatusCode::SERVICE_UNAVAILABLE,
            Self::Unlimited => StatusCode::NOT_IMPLEMENTED,
            Self::Sandbox(_) | Self::Record(_) | Self::Network(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        if status.is_server_error() {
            tracing::error!(error = %self, "request failed");
        }
        failure(status, &self.to_string())
    }
}

fn describe(record: &Record) -> Value {
    let created = Timestamp::from_unix_micros(record.created_at_us).to_string();
    json!({
        "id": format!("sprite-{}", record.id),
        "name": record.name,
        "organization": ORGANIZATION,
        "url": format!("http://{}.localhost", record.name),
        "url_settings": { "auth": "sprite" },
        "status": record.status(),
        "created_at": created,
        "updated_at": created,
        "labels": record.labels,
    })
}

async fn create_sprite(State(api): State<Api>, body: Bytes) -> Response {
    let Ok(body) = serde_json::from_slice::<Value>(&body) else { return failure(StatusCode::BAD_REQUEST, "invalid JSON") };
    let Some(name) = body.get("name").and_then(Value::as_str) else { return failure(StatusCode::BAD_REQUEST, "name is required") };
    let Ok(name) = name.parse::<SpriteName>() else { return failure(StatusCode::BAD_REQUEST, "name is not a DNS label") };
    let labels =
        body.get("labels").and_then(Value::as_array).map(|labels| labels.iter().filter_map(|l| l.as_str().map(str::to_owned)).collect());
    match api.registry.create(name, labels.unwrap_or_default()).await {
        Ok(record) => (StatusCode::CREATED, Json(describe(&record))).into_response(),
        Err(error) => error.into_response(),
    }
}

async fn list_sprites(State(api): State<Api>, RawQuery(query): RawQuery) -> Json<Value> {
    let query = Query::parse(query);
    let limit = query.get("max_results").and_then(|text| text.parse().ok()).unwrap_or(50_usize).clamp(1, 500);
    let (records, has_more) =
        api.registry.list(query.get("prefix").unwrap_or_default(), query.get("continuation_token").unwrap_or_default(), limit);
    let token = has_more.then(|| records.last().map(|record| record.name.clone())).flatten();
    let running = records.iter().filter(|record| record.status() == "running").count();
    Json(json!({
        "name": ORGANIZATION,
        "sprites": records.iter().map(describe).collect::<Vec<_>>(),
        "has_more": has_more,
        "next_continuation_token": token,
        "running": running,
        "warm": 0,
        "cold": records.len() - running,
    }))
}

async fn get_sprite(State(api): State<Api>, Path(name): Path<String>) -> Result<Json<Value>, RegistryError> {
    Ok(Json(describe(&api.registry.get(&name)?.record())))
}

async fn delete_sprite(State(api): State<Api>, Path(name): Path<String>) -> Result<StatusCode, RegistryError> {
    api.registry.delete(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn get_policy(State(api): State<Api>, Path(name): Path<String>) -> Result<Json<Policy>, RegistryError> {
    Ok(Json(api.registry.get(&name)?.record().policy))
}

async fn set_policy(State(api): State<Api>, Path(name): Path<String>, body: Bytes) -> Result<StatusCode, Response> {
    let wrong = |why: String| (StatusCode::BAD_REQUEST, Json(json!({ "error": format!("invalid network policy: {why}") }))).into_response();
    let policy: Policy = serde_json::from_slice(&body).map_err(|error| wrong(error.to_string()))?;
    if let Some(problem) = policy.problem() {
        return Err(wrong(problem));
    }
    api.registry.set_policy(&name, policy).await.map_err(IntoResponse::into_response)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Query parameters in order, repeated ones kept, `+` a space.
struct Query(Vec<(String, String)>);

impl Query {
    fn parse(raw: Option<String>) -> Self {
        Self(form_urlencoded::parse(raw.unwrap_or_default().as_bytes()).into_owned().collect())
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    fn all(&self, name: &str) -> Vec<String> {
        self.0.iter().filter(|(key, _)| key == name).map(|(_, value)| value.clone()).collect()
    }

    fn is(&self, name: &str) -> bool {
        self.get(name) == Some("true")
    }
}

async fn exec_or_list(State(api): State<Api>, Path(name): Path<String>, RawQuery(query): RawQuery, request: Request) -> Response {
    let sprite = match api.registry.get(&name) {
        Ok(sprite) => sprite,
        Err(error) => return error.into_response(),
    };
    let (mut parts, _) = request.into_parts();
    let Ok(upgrade) = WebSocketUpgrade::from_request_parts(&mut parts, &()).await else { return list_sessions(&sprite).into_response() };
    let query = Query::parse(query);
    if let Some(id) = query.get("id") {
        return attach_to(&sprite, id, upgrade);
    }
    if query.is("tty") {
        return failure(StatusCode::BAD_REQUEST, "this server runs commands without a terminal (tty=false)");
    }
    let argv = query.all("cmd");
    if argv.is_empty() {
        return failure(StatusCode::BAD_REQUEST, "cmd is required");
    }
    let env = query.all("env").into_iter().filter_map(|pair| pair.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()))).collect();
    let request = exec::Request {
        argv,
        env,
        dir: query.get("dir").filter(|dir| !dir.is_empty()).unwrap_or(HOME).to_owned(),
        stdin: query.is("stdin"),
        max_run_after_disconnect: query.get("max_run_after_disconnect").and_then(parse_duration).unwrap_or(Duration::from_secs(10)),
    };
    // Started only when the socket is there: no output is made before somebody listens.
    prepare(upgrade).on_upgrade(move |socket| async move {
        let started = match api.registry.wake(&sprite).await {
            Ok(holder) => ExecSession::start(&sprite, holder, request, &api.tasks).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match started {
            Ok((session, output)) => converse(socket, session, output, true).await,
            Err(message) => refuse(socket, &message).await,
        }
    })
}

fn prepare(upgrade: WebSocketUpgrade) -> WebSocketUpgrade {
    upgrade.max_message_size(16 * 1024 * 1024).write_buffer_size(0)
}

fn list_sessions(sprite: &Sprite) -> Json<Value> {
    let sessions: Vec<_> = locked(&sprite.sessions)
        .values()
        .map(|session| {
            json!({
                "id": session.id,
                "command": session.command,
                "workdir": session.dir,
                "created": session.created.to_string(),
                "bytes_per_second": 0,
                "is_active": session.is_attached(),
                "tty": false,
            })
        })
        .collect();
    Json(json!({ "count": sessions.len(), "sessions": sessions }))
}

async fn attach(State(api): State<Api>, Path((name, id)): Path<(String, String)>, request: Request) -> Response {
    let sprite = match api.registry.get(&name) {
        Ok(sprite) => sprite,
        Err(error) => return error.into_response(),
    };
    let (mut parts, _) = request.into_parts();
    match WebSocketUpgrade::from_request_parts(&mut parts, &()).await {
        Ok(upgrade) => attach_to(&sprite, &id, upgrade),
        Err(_) => failure(StatusCode::NOT_FOUND, &format!("session not found: {id}")),
    }
}

fn attach_to(sprite: &Sprite, id: &str, upgrade: WebSocketUpgrade) -> Response {
    let Some(session) = locked(&sprite.sessions).get(id).cloned() else {
        return failure(StatusCode::NOT_FOUND, &format!("session not found: {id}"));
    };
    prepare(upgrade).on_upgrade(move |socket| async move {
        let output = session.attach();
        converse(socket, session, output, false).await;
    })
}

/// One client of a command: output out, input and signals in, the exit status last.
async fn converse(mut socket: WebSocket, session: Arc<ExecSession>, mut output: mpsc::Receiver<Output>, is_owner: bool) {
    let info = json!({
        "type": "session_info",
        "session_id": session.id,
        "command": session.command,
        "created": session.created.unix_micros() / 1_000_000,
        "cols": 0,
        "rows": 0,
        "is_owner": is_owner,
        "tty": false,
    });
    if socket.send(Message::text(info.to_string())).await.is_err() {
        return;
    }
    let mut keepalive = tokio::time::interval(KEEPALIVE);
    keepalive.reset();
    loop {
        let sent = tokio::select! {
            frame = output.recv() => match frame {
                Some(Output { stderr, data }) => {
                    keepalive.reset();
                    let mut bytes = Vec::with_capacity(data.len() + 1);
                    bytes.push(if stderr { 2 } else { 1 });
                    bytes.extend_from_slice(&data);
                    socket.send(Message::binary(bytes)).await
                }
                None => break,
            },
            _ = keepalive.tick() => socket.send(Message::text(r#"{"type":"keepalive"}"#)).await,
            message = socket.recv() => match message {
                Some(Ok(message)) => {
                    take_input(&session, message).await;
                    Ok(())
                }
                _ => return,
            },
        };
        if sent.is_err() {
            return;
        }
    }
    let mut exit = session.exit();
    let code = exit.wait_for(Option::is_some).await.ok().and_then(|code| *code).unwrap_or(255);
    finish(socket, code).await;
}

async fn take_input(session: &ExecSession, message: Message) {
    match message {
        Message::Binary(bytes) => match bytes.first() {
            Some(0) => session.feed(Some(bytes.slice(1..))).await,
            Some(4) => session.feed(None).await,
            _ => {}
        },
        Message::Text(text) => {
            let control: Value = serde_json::from_str(&text).unwrap_or_default();
            if control.get("type").and_then(Value::as_str) == Some("signal")
                && let Some(signal) = control.get("signal").and_then(Value::as_str).and_then(exec::parse_signal)
            {
                session.signal(signal);
            }
        }
        _ => {}
    }
}

/// The command never ran: its reason on standard error, and the status of a shell that finds no command.
async fn refuse(mut socket: WebSocket, message: &str) {
    let mut frame = vec![2];
    frame.extend_from_slice(message.as_bytes());
    frame.push(b'\n');
    if socket.send(Message::binary(frame)).await.is_ok() {
        finish(socket, 127).await;
    }
}

/// The exit frame, then a moment for the client to close first (§3.6).
async fn finish(mut socket: WebSocket, code: u8) {
    let exit = json!({ "type": "exit", "exit_code": code });
    if socket.send(Message::binary(vec![3, code])).await.is_err() || socket.send(Message::text(exit.to_string())).await.is_err() {
        return;
    }
    let _ = tokio::time::timeout(CLOSE_WAIT, async { while let Some(Ok(_)) = socket.recv().await {} }).await;
    let _ = socket.send(Message::Close(Some(CloseFrame { code: 1000, reason: "".into() }))).await;
}

async fn kill(State(api): State<Api>, Path((name, id)): Path<(String, String)>, RawQuery(query): RawQuery, body: Bytes) -> Response {
    let sprite = match api.registry.get(&name) {
        Ok(sprite) => sprite,
        Err(error) => return error.into_response(),
    };
    let Some(session) = locked(&sprite.sessions).get(&id).cloned() else {
        return failure(StatusCode::NOT_FOUND, &format!("session not found: {id}"));
    };
    // Some clients send a query, some a JSON body (§4.2).
    let (query, body): (_, Value) = (Query::parse(query), serde_json::from_slice(&body).unwrap_or_default());
    let signal = query.get("signal").or_else(|| body.get("signal").and_then(Value::as_str)).unwrap_or("TERM").to_owned();
    let Some(signal_number) = exec::parse_signal(&signal) else { return failure(StatusCode::BAD_REQUEST, "unknown signal") };
    let grace = query.get("timeout").and_then(parse_duration);
    let grace = grace.or_else(|| body.get("timeout").and_then(Value::as_u64).map(Duration::from_secs)).unwrap_or(Duration::from_secs(10));
    let mut lines = vec![json!({ "type": "signal", "message": format!("Sent {signal}"), "signal": signal, "pid": id })];
    session.signal(signal_number);
    let mut exit = session.exit();
    if !grace.is_zero() {
        if tokio::time::timeout(grace, exit.wait_for(Option::is_some)).await.is_ok() {
            lines.push(json!({ "type": "exited", "message": "Process exited" }));
        } else {
            lines.push(json!({ "type": "timeout", "message": "Process did not exit in time" }));
            session.signal(Signal::KILL);
            let _ = tokio::time::timeout(Duration::from_secs(5), exit.wait_for(Option::is_some)).await;
            lines.push(json!({ "type": "killed", "message": "Process killed" }));
        }
    }
    let code = *exit.borrow();
    lines.push(json!({ "type": "complete", "exit_code": code }));
    let body: String = lines.iter().map(|line| format!("{line}\n")).collect();
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

/// Go's durations: `10s`, `1.5s`, `2m`, `0`.
fn parse_duration(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at(text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len()));
    let seconds = match unit {
        "" | "s" => 1.0,
        "ms" => 0.001,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()
}

/// A file operation, off the async threads, in the Sprite's root.
async fn in_root<T: Send + 'static>(
    api: &Api,
    name: &str,
    path: PathBuf,
    operation: impl FnOnce(&Root, &std::path::Path) -> io::Result<T> + Send + 'static,
) -> Result<T, Response> {
    let sprite = api.registry.get(name).map_err(IntoResponse::into_response)?;
    let holder = api.registry.wake(&sprite).await.map_err(IntoResponse::into_response)?;
    let shown = path.clone();
    let done = tokio::task::spawn_blocking(move || operation(&Root::new(holder.root()?), &path)).await;
    match done {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(file_failure(&error, &shown)),
        Err(_) => Err(failure(StatusCode::INTERNAL_SERVER_ERROR, "the operation was interrupted")),
    }
}

fn file_failure(error: &io::Error, path: &std::path::Path) -> Response {
    let (status, code) = match error.kind() {
        io::ErrorKind::NotFound => (StatusCode::NOT_FOUND, "ENOENT"),
        io::ErrorKind::AlreadyExists => (StatusCode::BAD_REQUEST, "EEXIST"),
        io::ErrorKind::NotADirectory => (StatusCode::BAD_REQUEST, "ENOTDIR"),
        io::ErrorKind::IsADirectory => (StatusCode::BAD_REQUEST, "EISDIR"),
        io::ErrorKind::PermissionDenied => (StatusCode::BAD_REQUEST, "EACCES"),
        io::ErrorKind::DirectoryNotEmpty => (StatusCode::BAD_REQUEST, "ENOTEMPTY"),
        io::ErrorKind::InvalidInput => (StatusCode::BAD_REQUEST, "EINVAL"),
        _ => (StatusCode::INTERNAL_SERVER_ERROR, "EIO"),
    };
    let path = path.to_string_lossy();
    let text = if code == "ENOENT" { format!("{path}: no such file or directory") } else { format!("{path}: {error}") };
    (status, Json(json!({ "error": text, "code": code, "path": path }))).into_response()
}

fn target(query: &Query) -> PathBuf {
    files::absolute(query.get("workingDir").unwrap_or("/"), query.get("path").unwrap_or_default())
}

async fn read_file(
    State(api): State<Api>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, Response> {
    let range = headers.get(header::RANGE).and_then(|value| value.to_str().ok()).map(str::to_owned);
    // Ranges to the end alone: what a reader needs that lost its place.
    let offset = range.as_deref().and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<u64>().ok());
    let (file, size) = in_root(&api, &name, target(&Query::parse(query)), move |root, path| root.read(path, offset.unwrap_or(0))).await?;
    let body = |file| Body::from_stream(ReaderStream::with_capacity(tokio::fs::File::from_std(file), 256 * 1024));
    let binary = (header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    Ok(match offset {
        None => ([binary], body(file)).into_response(),
        Some(offset) if offset >= size => {
            (StatusCode::RANGE_NOT_SATISFIABLE, [(header::CONTENT_RANGE, format!("bytes */{size}"))]).into_response()
        }
        Some(offset) => {
            let range =
                HeaderValue::try_from(format!("bytes {offset}-{}/{size}", size - 1)).unwrap_or_else(|_| HeaderValue::from_static(""));
            (StatusCode::PARTIAL_CONTENT, [binary, (header::CONTENT_RANGE, range)], body(file)).into_response()
        }
    })
}

async fn write_file(
    State(api): State<Api>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
    body: Bytes,
) -> Result<Json<Value>, Response> {
    let query = Query::parse(query);
    let mode = parse_mode(query.get("mode").unwrap_or("0644")).ok_or_else(bad_request("mode is not octal"))?;
    let parents = query.get("mkdirParents").or_else(|| query.get("mkdir")) != Some("false");
    let (path, size) = (target(&query), body.len());
    in_root(&api, &name, path.clone(), move |root, path| root.write(path, &body, mode, parents)).await?;
    Ok(Json(json!({ "path": path.to_string_lossy(), "size": size, "mode": format!("{mode:04o}") })))
}

fn parse_mode(text: &str) -> Option<u32> {
    u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777)
}

fn bad_request(message: &'static str) -> impl FnOnce() -> Response {
    move || failure(StatusCode::BAD_REQUEST, message)
}

async fn list_files(State(api): State<Api>, Path(name): Path<String>, RawQuery(query): RawQuery) -> Result<Json<Value>, Response> {
    let path = target(&Query::parse(query));
    let entries = in_root(&api, &name, path.clone(), Root::list).await?;
    Ok(Json(json!({ "path": path.to_string_lossy(), "count": entries.len(), "entries": entries })))
}

async fn delete_file(State(api): State<Api>, Path(name): Path<String>, RawQuery(query): RawQuery) -> Result<Json<Value>, Response> {
    let query = Query::parse(query);
    let (path, recursive) = (target(&query), query.is("recursive"));
    in_root(&api, &name, path.clone(), move |root, path| root.delete(path, recursive)).await?;
    Ok(Json(json!({ "deleted": [path.to_string_lossy()], "count": 1 })))
}

/// The JSON bodies of the calls that change files.
struct Change(HashMap<String, Value>);

impl Change {
    fn parse(body: &Bytes) -> Option<Self> {
        serde_json::from_slice(body).map(Self).ok()
    }

    fn text(&self, name: &str) -> &str {
        self.0.get(name).and_then(Value::as_str).unwrap_or_default()
    }

    fn path(&self, name: &str) -> PathBuf {
        files::absolute(self.text("workingDir"), self.text(name))
    }
}

async fn rename_file(State(api): State<Api>, Path(name): Path<String>, body: Bytes) -> Result<Json<Value>, Response> {
    let change = Change::parse(&body).ok_or_else(bad_request("invalid JSON"))?;
    let (source, dest) = (change.path("source"), change.path("dest"));
    let to = dest.clone();
    in_root(&api, &name, source.clone(), move |root, from| root.rename(from, &to)).await?;
    Ok(Json(json!({ "source": source.to_string_lossy(), "dest": dest.to_string_lossy() })))
}

async fn copy_file(State(api): State<Api>, Path(name): Path<String>, body: Bytes) -> Result<Json<Value>, Response> {
    let change = Change::parse(&body).ok_or_else(bad_request("invalid JSON"))?;
    let (source, dest) = (change.path("source"), change.path("dest"));
    let to = dest.clone();
    let size = in_root(&api, &name, source.clone(), move |root, from| root.copy(from, &to)).await?;
    let copied = json!([{ "source": source.to_string_lossy(), "dest": dest.to_string_lossy() }]);
    Ok(Json(json!({ "copied": copied, "count": 1, "totalBytes": size })))
}

async fn chmod_file(State(api): State<Api>, Path(name): Path<String>, body: Bytes) -> Result<Json<Value>, Response> {
    let change = Change::parse(&body).ok_or_else(bad_request("invalid JSON"))?;
    let (path, mode) = (change.path("path"), parse_mode(change.text("mode")).ok_or_else(bad_request("mode is not octal"))?);
    in_root(&api, &name, path.clone(), move |root, path| root.chmod(path, mode)).await?;
    Ok(Json(json!({ "affected": [{ "path": path.to_string_lossy(), "mode": format!("{mode:04o}") }], "count": 1 })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_gos() {
        assert_eq!(parse_duration("1.5s"), Some(Duration::from_millis(1500)));
        assert_eq!(parse_duration("0"), Some(Duration::ZERO));
        assert_eq!(parse_duration("2m"), Some(Duration::from_secs(120)));
        assert_eq!(parse_duration("-1s"), None);
        assert_eq!(parse_duration("x"), None);
    }
}
