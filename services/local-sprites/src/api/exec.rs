//! Commands over WebSockets, their list, and how they are ended (docs/sprites-api.md §3 and §4).

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    body::Bytes,
    extract::{
        FromRequestParts as _, Path, Request, State,
        ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade},
    },
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use types::Timestamp;

use super::{Api, ErrorResponse, Query, failure, invalid, lines, parse_duration};
use crate::{
    isolation::sandbox::HOME,
    run::{
        exec::{self, Event, ExecSession},
        terminal::Size,
    },
    sprites::sprite::Sprite,
    sync::locked,
};

/// The JS client gives a silent socket up after 45 s (docs/sprites-api.md §3.5).
const KEEPALIVE: Duration = Duration::from_secs(15);
/// How long the client has to close the socket after the exit frame.
const CLOSE_WAIT: Duration = Duration::from_secs(1);
/// A command without a terminal keeps running so long after its last client is gone
/// (docs/sprites-api.md §3.1).
const MAX_RUN_AFTER_DISCONNECT: Duration = Duration::from_secs(10);
const KILL_GRACE: Duration = Duration::from_secs(10);
const KILL_GRACE_MAX: Duration = Duration::from_secs(600);
const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;
const STDIN: u8 = 0;
const EXIT: u8 = 3;
const STDIN_END: u8 = 4;

/// Reads a command from a query; its terminal too, where the way it is asked for can have one.
pub fn request(query: &Query, terminal_allowed: bool) -> Result<exec::Request, ErrorResponse> {
    let mut argv = query.all("cmd");
    let path = query.get("path").filter(|path| !path.is_empty());
    match (argv.first_mut(), path) {
        (Some(program), Some(path)) => *program = path.to_owned(),
        (None, path) => argv.push(path.unwrap_or("bash").to_owned()),
        (Some(_), None) => {}
    }
    let null = |text: &String| text.contains('\0');
    if argv.iter().any(null) || query.all("env").iter().any(null) {
        return Err(invalid("a command holds no null characters"));
    }
    let number = |name: &str, default: u16| {
        query.get(name).and_then(|text| text.parse().ok()).filter(|n| *n > 0).unwrap_or(default)
    };
    let usual = Size::default();
    let terminal = (terminal_allowed && query.is("tty"))
        .then(|| Size { cols: number("cols", usual.cols), rows: number("rows", usual.rows) });
    let usual_run = if terminal.is_some() { Duration::ZERO } else { MAX_RUN_AFTER_DISCONNECT };
    let detachable = query.is("detachable");
    let max_run = query.duration("max_run_after_disconnect").unwrap_or(if detachable {
        Duration::ZERO
    } else {
        usual_run
    });
    Ok(exec::Request {
        argv,
        env: query
            .all("env")
            .into_iter()
            .filter_map(|pair| pair.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned())))
            .collect(),
        dir: query.get("dir").filter(|dir| !dir.is_empty()).unwrap_or(HOME).to_owned(),
        stdin: query.is("stdin"),
        terminal,
        max_run_after_disconnect: (!max_run.is_zero()).then_some(max_run),
    })
}

pub async fn start_or_list(
    State(api): State<Api>,
    Path(name): Path<String>,
    query: Query,
    request: Request,
) -> Result<Response, ErrorResponse> {
    let sprite = api.registry.get(&name)?;
    let (mut parts, _) = request.into_parts();
    let Ok(upgrade) = WebSocketUpgrade::from_request_parts(&mut parts, &()).await else {
        return Ok(list(&sprite).into_response());
    };
    if let Some(id) = query.get("id") {
        return attach_to(&api, &sprite, id, upgrade, &parts.headers);
    }
    let request = self::request(&query, true)?;
    // Started only when the socket is there: no output is made before a client listens.
    Ok(accept(upgrade, move |socket| async move {
        let started = match api.registry.wake(&sprite).await {
            Ok(holder) => ExecSession::start(
                sprite.start_of(holder, &request),
                request,
                &api.registry.lifecycle,
            )
            .map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match started {
            Ok((session, output)) => {
                Conversation { api, session, is_owner: true, drops_first_end: false }
                    .hold(socket, output)
                    .await
            }
            Err(message) => refuse(socket, &message).await,
        }
    }))
}

fn accept<F: Future<Output = ()> + Send + 'static>(
    upgrade: WebSocketUpgrade,
    talk: impl FnOnce(WebSocket) -> F + Send + 'static,
) -> Response {
    let mut response =
        upgrade.max_message_size(MESSAGE_BYTES_MAX).write_buffer_size(0).on_upgrade(talk);
    response.headers_mut().insert("x-sprite-capabilities", HeaderValue::from_static("signal"));
    response
}

fn list(sprite: &Sprite) -> Json<Value> {
    let describe = |session: &Arc<ExecSession>| {
        let (quiet, bytes_per_second) = session.activity();
        let last =
            Timestamp::now().unix_micros() - i64::try_from(quiet.as_micros()).unwrap_or_default();
        json!({
            "id": session.id,
            "command": session.command(),
            "workdir": session.dir,
            "created": session.created.to_string(),
            "bytes_per_second": bytes_per_second,
            "is_active": quiet < Duration::from_secs(5),
            "last_activity": Timestamp::from_unix_micros(last).to_string(),
            "tty": session.terminal().is_some(),
        })
    };
    let sessions: Vec<_> = locked(&sprite.sessions).all().iter().map(describe).collect();
    Json(json!({ "count": sessions.len(), "sessions": sessions }))
}

pub async fn attach(
    State(api): State<Api>,
    Path((name, id)): Path<(String, String)>,
    request: Request,
) -> Result<Response, ErrorResponse> {
    let sprite = api.registry.get(&name)?;
    let (mut parts, _) = request.into_parts();
    match WebSocketUpgrade::from_request_parts(&mut parts, &()).await {
        Ok(upgrade) => attach_to(&api, &sprite, &id, upgrade, &parts.headers),
        Err(_) => Err(not_found(&id)),
    }
}

fn not_found(id: &str) -> ErrorResponse {
    failure(StatusCode::NOT_FOUND, &format!("session not found: {id}"))
}

fn attach_to(
    api: &Api,
    sprite: &Arc<Sprite>,
    id: &str,
    upgrade: WebSocketUpgrade,
    headers: &axum::http::HeaderMap,
) -> Result<Response, ErrorResponse> {
    let session = locked(&sprite.sessions).get(id).ok_or_else(|| not_found(id))?;
    // sprites-py sends an end of input before it can know that it is attached to a terminal, where
    // that would log a shell out (docs/sprites-api.md §3.7).
    let is_python = headers
        .get(header::USER_AGENT)
        .is_some_and(|agent| agent.as_bytes().starts_with(b"sprites-py"));
    let drops_first_end = is_python && session.terminal().is_some();
    let (api, sprite) = (api.clone(), sprite.clone());
    Ok(accept(upgrade, move |socket| async move {
        // A paused Sprite is resumed when a client attaches.
        if api.registry.wake(&sprite).await.is_ok() {
            let output = session.attach();
            Conversation { api, session, is_owner: false, drops_first_end }
                .hold(socket, output)
                .await;
        }
    }))
}

/// Bytes for a command's standard input, or its end.
type Input = Option<Bytes>;

/// One client of a command.
struct Conversation {
    api: Api,
    session: Arc<ExecSession>,
    is_owner: bool,
    drops_first_end: bool,
}

impl Conversation {
    /// Output out, input and signals in, the exit status last.
    async fn hold(mut self, mut socket: WebSocket, mut output: mpsc::Receiver<Event>) {
        let size = self.session.terminal();
        let info = json!({
            "type": "session_info",
            "session_id": self.session.id,
            "command": self.session.asked_command(),
            "created": self.session.created.unix_micros() / 1_000_000,
            "cols": size.map_or(0, |size| size.cols),
            "rows": size.map_or(0, |size| size.rows),
            "is_owner": self.is_owner,
            "tty": size.is_some(),
        });
        if socket.send(Message::text(info.to_string())).await.is_err() {
            return;
        }
        let dropped = self.api.faults.drop_after();
        let mut dropped = std::pin::pin!(async {
            match dropped {
                Some(after) => tokio::time::sleep(after).await,
                None => std::future::pending().await,
            }
        });
        let mut keepalive = tokio::time::interval(KEEPALIVE);
        keepalive.reset();
        let mut sent_bytes = 0;
        // What the command does not read yet. Its output is read meanwhile, or each would wait for
        // the other for ever.
        let mut held: Option<Input> = None;
        loop {
            let sent = tokio::select! {
                event = output.recv() => match event {
                    Some(Event::Output(frame)) => {
                        keepalive.reset();
                        sent_bytes += frame.len();
                        if self.api.faults.loses_output(sent_bytes) {
                            continue;
                        }
                        // A terminal's bytes come as they are.
                        let frame = if size.is_some() { frame.slice(1..) } else { frame };
                        socket.send(Message::Binary(frame)).await
                    }
                    Some(Event::Exit(code)) => return finish(socket, code, size.is_some()).await,
                    // Cut off, by a pause or a stop of this server: the command keeps running.
                    None => return,
                },
                _ = keepalive.tick() => socket.send(Message::text(r#"{"type":"keepalive"}"#)).await,
                () = self.session.feed(held.clone().flatten()), if held.is_some() => {
                    held = None;
                    Ok(())
                }
                message = socket.recv(), if held.is_none() => match message {
                    Some(Ok(message)) => {
                        held = self.take(message, size.is_some());
                        Ok(())
                    }
                    _ => return,
                },
                () = &mut dropped => return,
            };
            if sent.is_err() {
                return;
            }
        }
    }

    /// Does what a message says; gives what of it the command is to read.
    fn take(&mut self, message: Message, terminal: bool) -> Option<Input> {
        match message {
            Message::Binary(bytes) if terminal => {
                let is_first = std::mem::take(&mut self.drops_first_end);
                (!(is_first && bytes[..] == [STDIN_END])).then_some(Some(bytes))
            }
            Message::Binary(bytes) => match bytes.first() {
                Some(&STDIN) => Some(Some(bytes.slice(1..))),
                Some(&STDIN_END) => Some(None),
                _ => None,
            },
            Message::Text(text) => {
                self.control(&serde_json::from_str(&text).unwrap_or_default());
                None
            }
            _ => None,
        }
    }

    fn control(&self, control: &Value) {
        let text = |name: &str| control.get(name).and_then(Value::as_str);
        let number = |name: &str| {
            control
                .get(name)
                .and_then(Value::as_u64)
                .and_then(|n| u16::try_from(n).ok())
                .filter(|n| *n > 0)
        };
        match text("type") {
            Some("signal") => {
                if let Some(signal) = text("signal").and_then(exec::parse_signal) {
                    self.session.signal(signal);
                }
            }
            Some("resize") => {
                if let (Some(cols), Some(rows)) = (number("cols"), number("rows")) {
                    self.session.resize(Size { cols, rows });
                }
            }
            // Unknown ones may come from clients that are newer.
            _ => {}
        }
    }
}

/// The command never ran: its reason on standard error, and the status of a shell that finds no
/// command.
async fn refuse(mut socket: WebSocket, message: &str) {
    let mut frame = vec![exec::Stream::Stderr as u8];
    frame.extend_from_slice(message.as_bytes());
    frame.push(b'\n');
    if socket.send(Message::binary(frame)).await.is_ok() {
        finish(socket, 127, false).await;
    }
}

/// The exit, then a moment for the client to close first (docs/sprites-api.md §3.6).
async fn finish(mut socket: WebSocket, code: u8, terminal: bool) {
    let exit = json!({ "type": "exit", "exit_code": code }).to_string();
    if !terminal && socket.send(Message::binary(vec![EXIT, code])).await.is_err() {
        return;
    }
    if socket.send(Message::text(exit)).await.is_err() {
        return;
    }
    // The JS client waits for the close of a terminal, and knows the status by its code alone.
    let close = if terminal && code != 0 { 4000 + u16::from(code) } else { 1000 };
    if !terminal {
        let _ = tokio::time::timeout(CLOSE_WAIT, async {
            while let Some(Ok(_)) = socket.recv().await {}
        })
        .await;
    }
    if socket
        .send(Message::Close(Some(CloseFrame { code: close, reason: "".into() })))
        .await
        .is_ok()
    {
        let _ = tokio::time::timeout(CLOSE_WAIT, async {
            while let Some(Ok(_)) = socket.recv().await {}
        })
        .await;
    }
}

pub async fn kill(
    State(api): State<Api>,
    Path((name, id)): Path<(String, String)>,
    query: Query,
    body: Bytes,
) -> Result<Response, ErrorResponse> {
    let sprite = api.registry.get(&name)?;
    let found = locked(&sprite.sessions).get(&id);
    let Some(session) = found else {
        let ended = locked(&sprite.sessions).has_ended(&id);
        return Err(if ended {
            failure(StatusCode::GONE, &format!("session has exited: {id}"))
        } else {
            not_found(&id)
        });
    };
    // Some clients send a query, some a JSON body (docs/sprites-api.md §4.2).
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let signal = query
        .get("signal")
        .or_else(|| body.get("signal").and_then(Value::as_str))
        .unwrap_or("SIGTERM")
        .to_owned();
    let number = exec::parse_signal(&signal).ok_or_else(|| invalid("unknown signal"))?;
    let in_body = match body.get("timeout") {
        Some(Value::String(text)) => parse_duration(text),
        Some(seconds) => {
            seconds.as_f64().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        }
        None => None,
    };
    let grace = query.duration("timeout").or(in_body).unwrap_or(KILL_GRACE).min(KILL_GRACE_MAX);
    let (sender, receiver) = mpsc::channel(8);
    let stop = api.registry.lifecycle.stop_token();
    let ending = end(session, signal, number, grace, sender);
    api.registry.lifecycle.tracker().spawn(async move { stop.run_until_cancelled(ending).await });
    Ok(lines(receiver))
}

/// Signals a command, waits, and ends it by force; continues when the client is gone.
async fn end(
    session: Arc<ExecSession>,
    signal: String,
    number: Signal,
    grace: Duration,
    tell: mpsc::Sender<Value>,
) {
    let say = async |line: Value| drop(tell.send(line).await);
    session.signal(number);
    say(json!({ "type": "signal", "message": format!("Sent {signal}"), "signal": signal, "pid": session.id.parse::<i64>().ok() })).await;
    let mut exit = session.exit();
    if !grace.is_zero() {
        if tokio::time::timeout(grace, exit.wait_for(Option::is_some)).await.is_ok() {
            say(json!({ "type": "exited", "message": "Process exited" })).await;
        } else {
            say(json!({ "type": "timeout", "message": "Process did not exit in time" })).await;
            session.kill();
            let _ =
                tokio::time::timeout(Duration::from_secs(5), exit.wait_for(Option::is_some)).await;
            say(json!({ "type": "killed", "message": "Process killed" })).await;
        }
    }
    let code = *exit.borrow();
    say(json!({ "type": "complete", "exit_code": code })).await;
}
