//! The API that a Sprite's own programs see, at `/.sprite/api.sock` (docs/sprites-api.md §11.1):
//! what holds it awake, its services, its checkpoints, its network policy to read. Nothing of any
//! other Sprite.

use std::{
    fs, io, os::fd::AsRawFd as _, os::unix::fs::PermissionsExt as _, sync::Arc, time::Duration,
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, Path, Request, State},
    http::{Method, StatusCode, Uri},
    response::{IntoResponse as _, Response},
    routing::get,
};
use hyper::{body::Incoming, service::service_fn};
use serde_json::{Value, json};
use service::connection::{ConnectionLimits, serve_connection};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    task::JoinSet,
};
use tower::ServiceExt as _;

use super::{Api, ErrorResponse, failure, invalid, not_served, parse_duration, routes};
use crate::{
    run::tasks::{Task, TaskError},
    sprites::sprite::Sprite,
    sync::locked,
};

const SOCKET: &str = "api.sock";
const NAME_CHARS_MAX: usize = 200;
/// Bounds of what one Sprite can hold of this server, which all Sprites share.
const BODY_BYTES_MAX: usize = 64 * 1024;
const HEAD_BYTES_MAX: usize = 16 * 1024;
const HEADERS_MAX: usize = 64;
/// Open connections; more wait in the kernel until one ends.
const CONNECTIONS_MAX: usize = 32;
const HEAD_TIME_MAX: Duration = Duration::from_secs(10);
/// A request's body has to be there, and its answer has to begin, within this time.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(60);
/// A client that reads nothing for so long is disconnected.
const WRITE_TIME_MAX: Duration = Duration::from_secs(30);
/// As long as the longest watch of a service.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(3700);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Opens the socket of a Sprite. The Sprite owns its server, and ends it.
pub fn open(api: &Api, sprite: &Arc<Sprite>) {
    match bind(sprite) {
        Ok(listener) => {
            let mut server = locked(&sprite.inside);
            server.abort_all();
            let router = router(api, sprite);
            server.spawn(serve(listener, router));
        }
        Err(error) => {
            tracing::warn!(%error, sprite = sprite.name(), "a Sprite has no management socket")
        }
    }
}

/// Accepts until the Sprite ends, which ends the connections too.
async fn serve(listener: UnixListener, router: Router) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let router = router.clone();
                connections.spawn(async move {
                    let _ =
                        tokio::time::timeout(CONNECTION_TIME_MAX, connection(stream, router)).await;
                    drop(slot);
                });
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

async fn connection(stream: UnixStream, router: Router) -> hyper::Result<()> {
    let service = service_fn(move |request: Request<Incoming>| {
        let answer = router.clone().oneshot(request.map(Body::new));
        async move {
            let late = || {
                failure(StatusCode::REQUEST_TIMEOUT, "the request took too long").into_response()
            };
            tokio::time::timeout(ANSWER_TIME_MAX, answer).await.unwrap_or_else(|_| Ok(late()))
        }
    });
    let limits = ConnectionLimits {
        head_time: HEAD_TIME_MAX,
        head_bytes: HEAD_BYTES_MAX,
        headers: HEADERS_MAX,
        write_time: WRITE_TIME_MAX,
    };
    serve_connection(stream, limits, service).await
}

fn bind(sprite: &Sprite) -> io::Result<UnixListener> {
    let dir = sprite.inside_dir();
    let _ = fs::remove_file(dir.join(SOCKET));
    // A socket's path is short; the directory's may not be.
    let opened = fs::File::open(&dir)?;
    let listener = UnixListener::bind(format!("/proc/self/fd/{}/{SOCKET}", opened.as_raw_fd()))?;
    // Every user in the Sprite may use it.
    fs::set_permissions(dir.join(SOCKET), fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

#[derive(Clone)]
struct Inside {
    name: String,
    sprite: std::sync::Weak<Sprite>,
    whole: Router,
}

fn router(api: &Api, sprite: &Arc<Sprite>) -> Router {
    let inside = Inside {
        name: sprite.name(),
        sprite: Arc::downgrade(sprite),
        whole: routes(api, BODY_BYTES_MAX),
    };
    Router::new()
        .route("/v1/tasks", get(list).post(create).put(extend_named))
        .route("/v1/tasks/{task}", get(show).put(extend).delete(remove))
        .fallback(forward)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(inside)
}

/// The rest is the API's own, for this Sprite.
async fn forward(State(inside): State<Inside>, mut request: Request) -> Response {
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let Some(below) = path.strip_prefix("/v1") else { return not_served().await.into_response() };
    let own = ["/services", "/checkpoint"].iter().any(|own| below.starts_with(own));
    let to_read = below == "/policy/network" && request.method() == Method::GET;
    let Ok(uri) = format!("/v1/sprites/{}{below}", inside.name).parse::<Uri>() else {
        return not_served().await.into_response();
    };
    if !own && !to_read {
        return not_served().await.into_response();
    }
    *request.uri_mut() = uri;
    inside.whole.clone().oneshot(request).await.unwrap_or_else(|never| match never {})
}

impl Inside {
    fn sprite(&self) -> Result<Arc<Sprite>, ErrorResponse> {
        self.sprite.upgrade().ok_or_else(|| failure(StatusCode::NOT_FOUND, "sprite not found"))
    }

    fn set(&self, name: &str, body: &Value, replace: bool) -> Result<Json<Value>, ErrorResponse> {
        if name.is_empty() || name.chars().count() > NAME_CHARS_MAX {
            return Err(invalid("a task has a name, of at most 200 characters"));
        }
        let expire = match body.get("expire") {
            Some(Value::String(text)) => parse_duration(text),
            Some(seconds) => seconds.as_u64().map(Duration::from_secs),
            None => None,
        };
        let expire = expire
            .ok_or_else(|| invalid("expire is required: seconds, or a text such as \"5m\""))?;
        match self.sprite()?.tasks.set(name, expire, replace) {
            Ok(task) => Ok(Json(describe(name, &task))),
            Err(error @ TaskError::Exists) => {
                Err(failure(StatusCode::CONFLICT, &error.to_string()))
            }
            Err(error) => Err(invalid(error.to_string())),
        }
    }
}

fn describe(name: &str, task: &Task) -> Value {
    json!({ "name": name, "started_at": task.started_at.to_string(), "expires_at": task.expires_at.to_string() })
}

fn parse(body: &Bytes) -> Result<Value, ErrorResponse> {
    serde_json::from_slice(body).map_err(|_| invalid("invalid JSON"))
}

fn named(body: &Value) -> String {
    body.get("name").and_then(Value::as_str).unwrap_or_default().to_owned()
}

async fn list(State(inside): State<Inside>) -> Result<Json<Value>, ErrorResponse> {
    let tasks: Vec<_> =
        inside.sprite()?.tasks.list().iter().map(|(name, task)| describe(name, task)).collect();
    Ok(Json(json!({ "tasks": tasks })))
}

async fn create(State(inside): State<Inside>, body: Bytes) -> Result<Response, ErrorResponse> {
    let body = parse(&body)?;
    Ok((StatusCode::CREATED, inside.set(&named(&body), &body, false)?).into_response())
}

async fn extend_named(
    State(inside): State<Inside>,
    body: Bytes,
) -> Result<Json<Value>, ErrorResponse> {
    let body = parse(&body)?;
    inside.set(&named(&body), &body, true)
}

async fn extend(
    State(inside): State<Inside>,
    Path(task): Path<String>,
    body: Bytes,
) -> Result<Json<Value>, ErrorResponse> {
    inside.set(&task, &parse(&body)?, true)
}

async fn show(
    State(inside): State<Inside>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ErrorResponse> {
    match inside.sprite()?.tasks.get(&name) {
        Some(task) => Ok(Json(describe(&name, &task))),
        None => Err(failure(StatusCode::NOT_FOUND, "task not found")),
    }
}

async fn remove(
    State(inside): State<Inside>,
    Path(name): Path<String>,
) -> Result<StatusCode, ErrorResponse> {
    if inside.sprite()?.tasks.remove(&name) {
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(failure(StatusCode::NOT_FOUND, "task not found"))
    }
}
