//! The OpenAI Responses API, as far as Codex and opencode use it: over HTTP, and over the WebSocket
//! that Codex tries first.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Body,
    extract::{
        DefaultBodyLimit, State, WebSocketUpgrade,
        ws::{Message, WebSocket},
    },
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::post,
};
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use serde_json::{Value, json};

use crate::{
    BAD_KEY, is, parts,
    script::{Answer, Conversation, Question, Script, mark},
    unique_id,
};

pub fn router(script: Arc<Script>) -> Router {
    Router::new()
        .route("/v1/responses", post(over_http).get(over_websocket))
        .layer(DefaultBodyLimit::max(64 << 20))
        .with_state(script)
}

fn failure(status: StatusCode, message: &str) -> Value {
    let (kind, code) = match status.as_u16() {
        401 => ("invalid_request_error", "invalid_api_key"),
        429 => ("rate_limit_error", "rate_limit_exceeded"),
        400..=499 => ("invalid_request_error", "invalid_request"),
        _ => ("server_error", "server_error"),
    };
    json!({ "error": { "type": kind, "code": code, "message": message, "param": null } })
}

fn refused(status: StatusCode, message: &str) -> Response {
    (status, Json(failure(status, message))).into_response()
}

/// Whether a key came with the request, and one that is taken.
fn has_key(headers: &HeaderMap) -> bool {
    let bearer = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    bearer.is_some_and(|key| !key.is_empty() && key != BAD_KEY)
}

const WRONG_KEY: &str = "Incorrect API key provided";

async fn over_http(State(script): State<Arc<Script>>, headers: HeaderMap, body: Bytes) -> Response {
    if !has_key(&headers) {
        return refused(StatusCode::UNAUTHORIZED, WRONG_KEY);
    }
    let Ok(request) = serde_json::from_slice::<Value>(&body) else {
        return refused(StatusCode::BAD_REQUEST, "the body is not JSON");
    };
    match script.answer(&question(&request)) {
        Answer::Fail { status, message } => refused(
            StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            &message,
        ),
        Answer::Say { text, tool, delay } => {
            let mut events = events(&request, &text, tool, delay);
            if request.get("stream").and_then(Value::as_bool) != Some(true) {
                let whole =
                    events.pop().and_then(|mut last| last.get_mut("response").map(Value::take));
                return Json(whole).into_response();
            }
            let body = stream::iter(events).then(move |event| async move {
                let name = pause(&event, delay).await;
                Ok::<_, Infallible>(format!("event: {name}\ndata: {event}\n\n"))
            });
            ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(body)).into_response()
        }
    }
}

async fn over_websocket(
    State(script): State<Arc<Script>>,
    headers: HeaderMap,
    upgrade: WebSocketUpgrade,
) -> Response {
    if !has_key(&headers) {
        return refused(StatusCode::UNAUTHORIZED, WRONG_KEY);
    }
    upgrade.max_message_size(64 << 20).on_upgrade(move |socket| converse(socket, script))
}

/// One request after the other; ends with the socket.
async fn converse(mut socket: WebSocket, script: Arc<Script>) {
    // A request may continue from the answer before, and then holds only what is new.
    let (mut conversation, mut tools) = (Vec::new(), Value::Null);
    while let Some(Ok(message)) = socket.recv().await {
        let Message::Text(text) = message else { continue };
        let mut request: Value = serde_json::from_str(&text).unwrap_or_default();
        if let Some(request) = request.as_object_mut() {
            let new = request.get("input").and_then(Value::as_array).cloned().unwrap_or_default();
            if !request.contains_key("previous_response_id") {
                conversation.clear();
            }
            conversation.extend(new);
            request.insert("input".to_owned(), conversation.clone().into());
            tools = request.entry("tools").or_insert(tools).clone();
        }
        let answer = match is(&request, "type", "response.create") {
            // Codex warms the connection up with a request that shall generate nothing.
            true if request.get("generate").and_then(Value::as_bool) == Some(false) => {
                Answer::Say { text: String::new(), tool: None, delay: Duration::ZERO }
            }
            true => script.answer(&question(&request)),
            false => Answer::Fail { status: 400, message: "not a response.create".to_owned() },
        };
        let (events, delay) = match answer {
            Answer::Say { text, tool, delay } => (events(&request, &text, tool, delay), delay),
            Answer::Fail { status, message } => {
                let mut event = failure(
                    StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
                    &message,
                );
                if let Some(event) = event.as_object_mut() {
                    event.extend([
                        ("type".to_owned(), json!("error")),
                        ("status".to_owned(), json!(status)),
                    ]);
                }
                (vec![event], Duration::ZERO)
            }
        };
        for event in events {
            if is(&event, "type", "response.output_item.done") {
                conversation.extend(event.get("item").cloned());
            }
            pause(&event, delay).await;
            if socket.send(Message::Text(event.to_string().into())).await.is_err() {
                return;
            }
        }
    }
}

async fn pause(event: &Value, delay: Duration) -> String {
    let name = event.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    if !delay.is_zero() && name == "response.output_text.delta" {
        tokio::time::sleep(delay).await;
    }
    name
}

/// What a person wrote: the CLI's own contexts, in tags, left out.
fn written(item: &Value) -> String {
    let texts: Vec<&str> = match item.get("content") {
        Some(Value::String(text)) => vec![text],
        Some(Value::Array(parts)) => {
            parts.iter().filter_map(|part| part.get("text")?.as_str()).collect()
        }
        _ => Vec::new(),
    };
    texts
        .into_iter()
        .map(str::trim)
        .filter(|text| !text.is_empty() && !text.starts_with('<'))
        .collect::<Vec<_>>()
        .join("\n")
}

fn question(request: &Value) -> Question {
    let Conversation { items, since, prompt, first_prompt } =
        Conversation::read(request, "input", written);
    let result = items
        .iter()
        .rev()
        .find(|item| is(item, "type", "function_call_output"))
        .and_then(|item| item.get("output"));
    Question {
        mark: mark(request),
        prompt,
        first_prompt,
        tool_result: match result {
            Some(Value::String(text)) => text.trim().to_owned(),
            Some(Value::Array(parts)) => parts
                .iter()
                .filter_map(|part| part.get("text")?.as_str())
                .collect::<Vec<_>>()
                .join("\n"),
            _ => String::new(),
        },
        answered: since.iter().filter(|item| is(item, "type", "function_call")).count(),
        searched: false,
        tools: request
            .get("tools")
            .and_then(Value::as_array)
            .map(|tools| tools.iter().flat_map(names).collect())
            .unwrap_or_default(),
    }
}

/// A tool's name; those of a namespace, with it before them.
fn names(tool: &Value) -> Vec<String> {
    let Some(name) = tool.get("name").and_then(Value::as_str) else { return Vec::new() };
    match tool.get("tools").and_then(Value::as_array) {
        Some(members) => {
            members.iter().flat_map(names).map(|member| format!("{name}__{member}")).collect()
        }
        None => vec![name.to_owned()],
    }
}

fn events(
    request: &Value,
    text: &str,
    tool: Option<(String, Value)>,
    delay: Duration,
) -> Vec<Value> {
    let id = unique_id("resp");
    let response = |status: &str, output: &[Value]| {
        let output_tokens = 1 + text.len() / 4;
        json!({ "id": id, "object": "response", "created_at": 1_700_000_000, "status": status, "model": request.get("model"),
                "output": output, "parallel_tool_calls": false, "tool_choice": "auto", "tools": [], "error": null,
                "incomplete_details": null,
                "usage": { "input_tokens": 100, "input_tokens_details": { "cached_tokens": 0 }, "output_tokens": output_tokens,
                           "output_tokens_details": { "reasoning_tokens": 0 }, "total_tokens": 100 + output_tokens } })
    };
    let mut events =
        vec![json!({ "type": "response.created", "response": response("in_progress", &[]) })];
    let mut output = Vec::new();
    if !text.is_empty() || tool.is_none() {
        let id = unique_id("msg");
        let message = |status: &str, content: Value| json!({ "type": "message", "id": id, "role": "assistant", "status": status, "content": content });
        let part = |text: &str| json!({ "type": "output_text", "text": text, "annotations": [] });
        events.push(json!({ "type": "response.output_item.added", "output_index": 0, "item": message("in_progress", json!([])) }));
        events
            .push(json!({ "type": "response.content_part.added", "item_id": id, "output_index": 0, "content_index": 0, "part": part("") }));
        for delta in parts(text, delay) {
            events.push(
                json!({ "type": "response.output_text.delta", "item_id": id, "output_index": 0, "content_index": 0, "delta": delta }),
            );
        }
        events.push(json!({ "type": "response.output_text.done", "item_id": id, "output_index": 0, "content_index": 0, "text": text }));
        events.push(
            json!({ "type": "response.content_part.done", "item_id": id, "output_index": 0, "content_index": 0, "part": part(text) }),
        );
        output.push(message("completed", json!([part(text)])));
        events.push(json!({ "type": "response.output_item.done", "output_index": 0, "item": output.last() }));
    }
    if let Some((name, input)) = tool {
        let (id, call_id, index) = (unique_id("fc"), unique_id("call"), output.len());
        let (namespace, name) = name
            .rsplit_once("__")
            .filter(|_| name.starts_with("mcp__"))
            .map_or((None, name.as_str()), |(space, name)| (Some(space), name));
        let mut call = json!({ "type": "function_call", "id": id, "call_id": call_id, "name": name, "arguments": "", "status": "in_progress" });
        if let (Some(namespace), Some(call)) = (namespace, call.as_object_mut()) {
            call.insert("namespace".to_owned(), namespace.into());
        }
        events.push(
            json!({ "type": "response.output_item.added", "output_index": index, "item": call }),
        );
        if let Some(call) = call.as_object_mut() {
            call.extend([
                ("arguments".to_owned(), input.to_string().into()),
                ("status".to_owned(), "completed".into()),
            ]);
        }
        events.push(
            json!({ "type": "response.function_call_arguments.delta", "item_id": id, "output_index": index, "delta": input.to_string() }),
        );
        events.push(json!({ "type": "response.function_call_arguments.done", "item_id": id, "output_index": index, "arguments": input.to_string() }));
        events.push(
            json!({ "type": "response.output_item.done", "output_index": index, "item": call }),
        );
        output.push(call);
    }
    events
        .push(json!({ "type": "response.completed", "response": response("completed", &output) }));
    for (number, event) in events.iter_mut().enumerate() {
        if let Some(event) = event.as_object_mut() {
            event.insert("sequence_number".to_owned(), number.into());
        }
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prompt_is_the_last_message_of_a_person() {
        let request = json!({ "input": [
            { "type": "message", "role": "user", "content": [{ "type": "input_text", "text": "<environment_context>x" }] },
            { "type": "message", "role": "user", "content": [{ "type": "input_text", "text": "one\n" }] },
            { "type": "message", "role": "assistant", "content": [{ "type": "output_text", "text": "1" }] },
            { "type": "message", "role": "user", "content": [{ "type": "input_text", "text": "two" }] },
            { "type": "function_call", "call_id": "c", "name": "exec_command", "arguments": "{}" },
            { "type": "function_call_output", "call_id": "c", "output": "out\n" },
        ], "tools": [{ "type": "function", "name": "exec_command" }] });
        let question = question(&request);
        assert_eq!((question.prompt.as_str(), question.first_prompt.as_str()), ("two", "one"));
        assert_eq!((question.tool_result.as_str(), question.answered), ("out", 1));
        assert_eq!(question.tools, ["exec_command"]);
    }
}
