//! The file API (docs/sprites-api.md §6).

use std::{
    collections::HashMap,
    io,
    path::{Path as FilePath, PathBuf},
    time::Duration,
};

use axum::{
    Json,
    body::{Body, Bytes},
    extract::{
        Path, State,
        ws::{Message, WebSocket, WebSocketUpgrade},
    },
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};
use tokio_util::io::ReaderStream;
use types::Timestamp;

use super::{Api, ErrorResponse, Query, failure, invalid};
use crate::{
    files::{Root, absolute, watch::Watcher},
    isolation::holder::Holder,
};

const CHUNK_BYTES: usize = 256 * 1024;
/// How long a client that watches has to say what.
const SUBSCRIBE_MAX: Duration = Duration::from_secs(30);
const PATHS_MAX: usize = 100;
const KEEPALIVE: Duration = Duration::from_secs(15);

/// Who new files are for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum For {
    TheUser,
    Root,
}

/// A file operation, off the async threads, in the Sprite's root.
async fn in_root<T: Send + 'static>(
    api: &Api,
    name: &str,
    target: (PathBuf, For),
    operation: impl FnOnce(&Root, &FilePath) -> io::Result<T> + Send + 'static,
) -> Result<T, ErrorResponse> {
    in_sandbox(api, name, target, |_, root, path| operation(root, path)).await
}

/// A file operation that needs to know of the sandbox as well.
async fn in_sandbox<T: Send + 'static>(
    api: &Api,
    name: &str,
    (path, whose): (PathBuf, For),
    operation: impl FnOnce(Holder, &Root, &FilePath) -> io::Result<T> + Send + 'static,
) -> Result<T, ErrorResponse> {
    let sprite = api.registry.get(name)?;
    let holder = api.registry.wake(&sprite).await?;
    let _connection = sprite.connect();
    let owner = holder.user(if whose == For::Root { 0 } else { Holder::UID });
    let shown = path.clone();
    let done = tokio::task::spawn_blocking(move || {
        operation(holder, &Root::new(holder.root()?, owner), &path)
    })
    .await;
    match done {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(file_failure(&error, &shown)),
        Err(_) => Err(failure(StatusCode::INTERNAL_SERVER_ERROR, "the operation was interrupted")),
    }
}

fn file_failure(error: &io::Error, path: &FilePath) -> ErrorResponse {
    let (status, code) = match error.kind() {
        io::ErrorKind::NotFound => (StatusCode::NOT_FOUND, "ENOENT"),
        io::ErrorKind::AlreadyExists => (StatusCode::BAD_REQUEST, "EEXIST"),
        io::ErrorKind::NotADirectory => (StatusCode::BAD_REQUEST, "ENOTDIR"),
        io::ErrorKind::IsADirectory => (StatusCode::BAD_REQUEST, "EISDIR"),
        io::ErrorKind::PermissionDenied => (StatusCode::BAD_REQUEST, "EACCES"),
        io::ErrorKind::DirectoryNotEmpty => (StatusCode::BAD_REQUEST, "ENOTEMPTY"),
        io::ErrorKind::InvalidInput => (StatusCode::BAD_REQUEST, "EINVAL"),
        io::ErrorKind::StorageFull => (StatusCode::INSUFFICIENT_STORAGE, "ENOSPC"),
        _ => (StatusCode::INTERNAL_SERVER_ERROR, "EIO"),
    };
    let path = path.to_string_lossy();
    let text = if code == "ENOENT" {
        format!("{path}: no such file or directory")
    } else {
        format!("{path}: {error}")
    };
    (status, Json(json!({ "error": text, "code": code, "path": path }))).into_response().into()
}

fn target(query: &Query) -> (PathBuf, For) {
    let path =
        absolute(query.get("workingDir").unwrap_or("/"), query.get("path").unwrap_or_default());
    (path, if query.is("asRoot") { For::Root } else { For::TheUser })
}

/// The part of a file that a `Range` header asks for; `bytes=A-` and `bytes=A-B` alone, which is
/// what readers need that lost their place.
fn range(headers: &HeaderMap) -> Option<(u64, Option<u64>)> {
    let (first, last) =
        headers.get(header::RANGE)?.to_str().ok()?.strip_prefix("bytes=")?.split_once('-')?;
    let last = if last.is_empty() { None } else { Some(last.parse().ok()?) };
    Some((first.parse().ok()?, last)).filter(|(first, last)| last.is_none_or(|last| last >= *first))
}

pub async fn read(
    State(api): State<Api>,
    Path(name): Path<String>,
    query: Query,
    headers: HeaderMap,
) -> Result<Response, ErrorResponse> {
    let range = range(&headers);
    let offset = range.map_or(0, |(first, _)| first);
    let (file, size) =
        in_root(&api, &name, target(&query), move |root, path| root.read(path, offset)).await?;
    let file = tokio::fs::File::from_std(file);
    let binary = (header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    let Some((first, last)) = range else {
        return Ok(([binary], Body::from_stream(ReaderStream::with_capacity(file, CHUNK_BYTES)))
            .into_response());
    };
    if first >= size {
        return Ok((
            StatusCode::RANGE_NOT_SATISFIABLE,
            [(header::CONTENT_RANGE, format!("bytes */{size}"))],
        )
            .into_response());
    }
    let end = last.map_or(size, |last| last.saturating_add(1).min(size));
    let shown = HeaderValue::try_from(format!("bytes {first}-{}/{size}", end - 1))
        .unwrap_or_else(|_| HeaderValue::from_static(""));
    let headers = [binary, (header::CONTENT_RANGE, shown)];
    // To the end means what is there by then: a file that grows is read on.
    let body = match last {
        None => Body::from_stream(ReaderStream::with_capacity(file, CHUNK_BYTES)),
        Some(_) => Body::from_stream(ReaderStream::with_capacity(
            tokio::io::AsyncReadExt::take(file, end - first),
            CHUNK_BYTES,
        )),
    };
    Ok((StatusCode::PARTIAL_CONTENT, headers, body).into_response())
}

pub async fn write(
    State(api): State<Api>,
    Path(name): Path<String>,
    query: Query,
    body: Bytes,
) -> Result<Json<Value>, ErrorResponse> {
    let mode = parse_mode(query.get("mode").unwrap_or("0644"))
        .ok_or_else(|| invalid("mode is not octal"))?;
    let parents = query.get("mkdirParents").or_else(|| query.get("mkdir")) != Some("false");
    let (target, size) = (target(&query), body.len());
    let path = target.0.clone();
    in_root(&api, &name, target, move |root, path| root.write(path, &body, mode, parents)).await?;
    Ok(Json(json!({ "path": path.to_string_lossy(), "size": size, "mode": format!("{mode:04o}") })))
}

fn parse_mode(text: &str) -> Option<u32> {
    u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777)
}

pub async fn list(
    State(api): State<Api>,
    Path(name): Path<String>,
    query: Query,
) -> Result<Json<Value>, ErrorResponse> {
    let (target, recursive) = (target(&query), query.is("recursive"));
    let path = target.0.clone();
    let mut entries =
        in_root(&api, &name, target, move |root, path| root.list(path, recursive)).await?;
    if let Some(pattern) = query.get("pattern") {
        let pattern =
            glob::Pattern::new(pattern).map_err(|_| invalid("pattern is not a glob pattern"))?;
        entries.retain(|entry| pattern.matches(&entry.name));
    }
    Ok(Json(json!({ "path": path.to_string_lossy(), "count": entries.len(), "entries": entries })))
}

pub async fn delete(
    State(api): State<Api>,
    Path(name): Path<String>,
    query: Query,
    body: Bytes,
) -> Result<Json<Value>, ErrorResponse> {
    // The clients send a query, the documents say a body.
    let (target, recursive) = match Change::parse(&body) {
        Some(change) if query.get("path").is_none() => {
            (change.target("path"), change.is("recursive"))
        }
        _ => (target(&query), query.is("recursive")),
    };
    let deleted =
        in_root(&api, &name, target, move |root, path| root.delete(path, recursive)).await?;
    let deleted: Vec<_> = deleted.iter().map(|path| path.to_string_lossy()).collect();
    Ok(Json(json!({ "deleted": deleted, "count": deleted.len() })))
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

    fn is(&self, name: &str) -> bool {
        self.0.get(name).and_then(Value::as_bool).unwrap_or_default()
    }

    fn path(&self, name: &str) -> PathBuf {
        absolute(self.text("workingDir"), self.text(name))
    }

    fn target(&self, name: &str) -> (PathBuf, For) {
        (self.path(name), if self.is("asRoot") { For::Root } else { For::TheUser })
    }
}

pub async fn rename(
    State(api): State<Api>,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<Json<Value>, ErrorResponse> {
    let change = Change::parse(&body).ok_or_else(|| invalid("invalid JSON"))?;
    let (source, dest) = (change.target("source"), change.path("dest"));
    let (from, to) = (source.0.clone(), dest.clone());
    in_root(&api, &name, source, move |root, from| root.rename(from, &dest)).await?;
    Ok(Json(json!({ "source": from.to_string_lossy(), "dest": to.to_string_lossy() })))
}

pub async fn copy(
    State(api): State<Api>,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<Json<Value>, ErrorResponse> {
    let change = Change::parse(&body).ok_or_else(|| invalid("invalid JSON"))?;
    let (source, dest, recursive) =
        (change.target("source"), change.path("dest"), change.is("recursive"));
    let (copied, bytes) =
        in_root(&api, &name, source, move |root, from| root.copy(from, &dest, recursive)).await?;
    let show = |(source, dest): &(PathBuf, PathBuf)| json!({ "source": source.to_string_lossy(), "dest": dest.to_string_lossy() });
    Ok(Json(
        json!({ "copied": copied.iter().map(show).collect::<Vec<_>>(), "count": copied.len(), "totalBytes": bytes }),
    ))
}

pub async fn chmod(
    State(api): State<Api>,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<Json<Value>, ErrorResponse> {
    let change = Change::parse(&body).ok_or_else(|| invalid("invalid JSON"))?;
    let mode = parse_mode(change.text("mode")).ok_or_else(|| invalid("mode is not octal"))?;
    let recursive = change.is("recursive");
    let changed = in_root(&api, &name, change.target("path"), move |root, path| {
        root.chmod(path, mode, recursive)
    })
    .await?;
    let show =
        |path: &PathBuf| json!({ "path": path.to_string_lossy(), "mode": format!("{mode:04o}") });
    Ok(Json(
        json!({ "affected": changed.iter().map(show).collect::<Vec<_>>(), "count": changed.len() }),
    ))
}

pub async fn chown(
    State(api): State<Api>,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<Json<Value>, ErrorResponse> {
    let change = Change::parse(&body).ok_or_else(|| invalid("invalid JSON"))?;
    if !api.registry.sandboxes.have_users() {
        return Err(failure(
            StatusCode::NOT_IMPLEMENTED,
            "a Sprite has one user on this server, which does not run as root",
        ));
    }
    let recursive = change.is("recursive");
    let (uid, gid) = (
        change.0.get("uid").cloned().unwrap_or_default(),
        change.0.get("gid").cloned().unwrap_or_default(),
    );
    let changed = in_sandbox(&api, &name, change.target("path"), move |holder, root, path| {
        let outside = |within: u32| holder.user(within);
        let (uid, gid) = (id_of(root, "/etc/passwd", &uid)?, id_of(root, "/etc/group", &gid)?);
        let paths = root.chown(path, uid.and_then(outside), gid.and_then(outside), recursive)?;
        Ok((paths, uid, gid))
    });
    let (paths, uid, gid) = changed.await?;
    let show = |path: &PathBuf| json!({ "path": path.to_string_lossy(), "uid": uid, "gid": gid });
    Ok(Json(
        json!({ "affected": paths.iter().map(show).collect::<Vec<_>>(), "count": paths.len() }),
    ))
}

/// A number, or a name that the Sprite's own table has.
fn id_of(root: &Root, table: &str, id: &Value) -> io::Result<Option<u32>> {
    use io::Read as _;
    let unknown =
        || io::Error::new(io::ErrorKind::InvalidInput, format!("unknown user or group {id}"));
    let text = match id {
        Value::Null => return Ok(None),
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.clone(),
        _ => return Err(unknown()),
    };
    if let Ok(number) = text.parse::<u32>() {
        return if number < Holder::UIDS { Ok(Some(number)) } else { Err(unknown()) };
    }
    let mut known = String::new();
    root.read(FilePath::new(table), 0)?.0.take(1 << 20).read_to_string(&mut known)?;
    let named = known
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.first() == Some(&text.as_str()));
    named
        .and_then(|fields| fields.get(2)?.parse().ok())
        .filter(|id| *id < Holder::UIDS)
        .map(Some)
        .ok_or_else(unknown)
}

pub async fn watch(
    State(api): State<Api>,
    Path(name): Path<String>,
    upgrade: WebSocketUpgrade,
) -> Result<Response, ErrorResponse> {
    let sprite = api.registry.get(&name)?;
    let holder = api.registry.wake(&sprite).await?;
    let connection = sprite.connect();
    Ok(upgrade.on_upgrade(move |mut socket| async move {
        let _connection = connection;
        if let Err(error) = tell_changes(&mut socket, holder).await {
            let _ =
                socket.send(text(&json!({ "type": "error", "message": error.to_string() }))).await;
        }
        let _ = socket.send(Message::Close(None)).await;
    }))
}

fn text(value: &Value) -> Message {
    Message::text(value.to_string())
}

async fn tell_changes(socket: &mut WebSocket, holder: Holder) -> io::Result<()> {
    let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, why.to_owned());
    let Ok(Some(Ok(Message::Text(subscription)))) =
        tokio::time::timeout(SUBSCRIBE_MAX, socket.recv()).await
    else {
        return Err(invalid("a subscription is expected"));
    };
    let subscription: Value =
        serde_json::from_str(&subscription).map_err(|_| invalid("a subscription is JSON"))?;
    let working_dir = subscription.get("workingDir").and_then(Value::as_str).unwrap_or("/");
    let paths = subscription
        .get("paths")
        .and_then(Value::as_array)
        .ok_or_else(|| invalid("paths is required"))?;
    let paths: Vec<_> = paths
        .iter()
        .filter_map(|path| Some(absolute(working_dir, path.as_str()?)))
        .take(PATHS_MAX)
        .collect();
    let recursive = subscription.get("recursive").and_then(Value::as_bool).unwrap_or_default();
    let root = || Ok::<_, io::Error>(Root::new(holder.root()?, None));
    let mut watcher = Watcher::new(root()?, recursive)?;
    for path in &paths {
        watcher.add(path).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", path.display()))
        })?;
    }
    let shown: Vec<_> = paths.iter().map(|path| path.to_string_lossy()).collect();
    let _ = socket.send(text(&json!({ "type": "subscribed", "paths": shown }))).await;
    let root = root()?;
    let mut keepalive = tokio::time::interval(KEEPALIVE);
    loop {
        let messages = tokio::select! {
            events = watcher.next() => events?.into_iter().map(|event| {
                let entry = root.list(&event.path, false).ok().filter(|_| !event.is_dir).and_then(|mut entries| entries.pop());
                text(&json!({
                    "type": "event",
                    "path": event.path.to_string_lossy(),
                    "event": event.change.name(),
                    "timestamp": Timestamp::now().to_string(),
                    "size": entry.map_or(0, |entry| entry.size),
                    "isDir": event.is_dir,
                }))
            }).collect(),
            _ = keepalive.tick() => vec![Message::Ping(Bytes::new())],
            message = socket.recv() => match message {
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Ok(()),
                Some(Ok(_)) => continue,
            },
        };
        for message in messages {
            if socket.send(message).await.is_err() {
                return Ok(());
            }
        }
    }
}
