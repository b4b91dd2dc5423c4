//! The Anthropic Messages API, as far as Claude Code uses it.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Body,
    extract::{DefaultBodyLimit, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use serde_json::{Value, json};

use crate::{
    BAD_KEY, is, parts,
    script::{Answer, Conversation, Question, Script, TOOL_SEARCH, mark},
    unique_id,
};

pub fn router(script: Arc<Script>) -> Router {
    Router::new()
        .route("/v1/messages", post(messages))
        .route("/v1/messages/count_tokens", post(|| async { Json(json!({ "input_tokens": 100 })) }))
        .route("/v1/models", get(|| async { Json(json!({ "data": [], "has_more": false })) }))
        .layer(DefaultBodyLimit::max(64 << 20))
        .with_state(script)
}

fn failure(status: StatusCode, kind: &str, message: &str) -> Response {
    (status, Json(json!({ "type": "error", "error": { "type": kind, "message": message } })))
        .into_response()
}

async fn messages(State(script): State<Arc<Script>>, headers: HeaderMap, body: Bytes) -> Response {
    let bearer = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    let key = headers
        .get("x-api-key")
        .and_then(|value| value.to_str().ok())
        .or(bearer)
        .unwrap_or_default();
    if key.is_empty() || key == BAD_KEY {
        return failure(StatusCode::UNAUTHORIZED, "authentication_error", "invalid x-api-key");
    }
    let Ok(request) = serde_json::from_slice::<Value>(&body) else {
        return failure(StatusCode::BAD_REQUEST, "invalid_request_error", "the body is not JSON");
    };
    match script.answer(&question(&request)) {
        Answer::Fail { status, message } => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            let kind = match status.as_u16() {
                429 => "rate_limit_error",
                529 => "overloaded_error",
                400 => "invalid_request_error",
                _ => "api_error",
            };
            failure(status, kind, &message)
        }
        Answer::Say { text, tool, delay } => {
            let message =
                Message { model: request.get("model").cloned().unwrap_or_default(), text, tool };
            if request.get("stream").and_then(Value::as_bool) == Some(true) {
                message.stream(delay)
            } else {
                Json(message.whole()).into_response()
            }
        }
    }
}

fn blocks(message: &Value) -> Vec<Value> {
    match message.get("content") {
        Some(Value::String(text)) => vec![json!({ "type": "text", "text": text })],
        Some(Value::Array(blocks)) => blocks.clone(),
        _ => Vec::new(),
    }
}

/// Returns what the user wrote, without the reminders and notes that the CLI adds.
fn written(message: &Value) -> String {
    let texts = blocks(message)
        .into_iter()
        .filter_map(|block| block.get("text").and_then(Value::as_str).map(str::to_owned));
    let own = texts
        .filter_map(|text| text.split("<system-reminder>").next().map(|own| own.trim().to_owned()));
    own.filter(|text| !text.is_empty() && !NOTES.iter().any(|note| text.starts_with(note)))
        .collect::<Vec<_>>()
        .join("\n")
}

/// How the notes begin that the CLI adds to user messages: after an interrupt, and when a tool was
/// loaded on demand.
const NOTES: [&str; 2] = ["[Request interrupted", "Tool loaded."];

/// Whether the assistant searched for a tool that the CLI loads on demand.
fn searches(message: &Value) -> bool {
    blocks(message)
        .iter()
        .any(|block| is(block, "type", "tool_use") && is(block, "name", TOOL_SEARCH))
}

fn question(request: &Value) -> Question {
    // A prompt may stand beside the result of a tool that was interrupted.
    let Conversation { items, since, prompt, first_prompt } =
        Conversation::read(request, "messages", written);
    let result = items.iter().rev().flat_map(blocks).find(|block| is(block, "type", "tool_result"));
    Question {
        mark: mark(request),
        prompt,
        first_prompt,
        tool_result: result.as_ref().map(written).unwrap_or_default(),
        answered: since
            .iter()
            .filter(|message| is(message, "role", "assistant") && !searches(message))
            .count(),
        searched: since.iter().any(searches),
        tools: request
            .get("tools")
            .and_then(Value::as_array)
            .map(|tools| {
                tools
                    .iter()
                    .filter_map(|tool| tool.get("name")?.as_str().map(str::to_owned))
                    .collect()
            })
            .unwrap_or_default(),
    }
}

struct Message {
    model: Value,
    text: String,
    tool: Option<(String, Value)>,
}

impl Message {
    fn usage(&self) -> Value {
        json!({ "input_tokens": 100, "output_tokens": 1 + self.text.len() / 4 })
    }

    fn stop_reason(&self) -> &'static str {
        if self.tool.is_some() { "tool_use" } else { "end_turn" }
    }

    fn whole(&self) -> Value {
        let mut content = Vec::new();
        if !self.text.is_empty() {
            content.push(json!({ "type": "text", "text": self.text }));
        }
        if let Some((name, input)) = &self.tool {
            content.push(json!({ "type": "tool_use", "id": unique_id("toolu"), "name": name, "input": input }));
        }
        json!({ "id": unique_id("msg"), "type": "message", "role": "assistant", "model": self.model, "content": content,
                "stop_reason": self.stop_reason(), "stop_sequence": null, "usage": self.usage() })
    }

    fn stream(self, delay: Duration) -> Response {
        let mut events = vec![json!({ "type": "message_start", "message": {
            "id": unique_id("msg"), "type": "message", "role": "assistant", "model": self.model, "content": [],
            "stop_reason": null, "stop_sequence": null, "usage": { "input_tokens": 100, "output_tokens": 1 } } })];
        let mut index = 0;
        if !self.text.is_empty() || self.tool.is_none() {
            events.push(json!({ "type": "content_block_start", "index": index, "content_block": { "type": "text", "text": "" } }));
            for part in parts(&self.text, delay) {
                events.push(json!({ "type": "content_block_delta", "index": index, "delta": { "type": "text_delta", "text": part } }));
            }
            events.push(json!({ "type": "content_block_stop", "index": index }));
            index += 1;
        }
        if let Some((name, input)) = &self.tool {
            let block =
                json!({ "type": "tool_use", "id": unique_id("toolu"), "name": name, "input": {} });
            events.push(
                json!({ "type": "content_block_start", "index": index, "content_block": block }),
            );
            let delta = json!({ "type": "input_json_delta", "partial_json": input.to_string() });
            events.push(json!({ "type": "content_block_delta", "index": index, "delta": delta }));
            events.push(json!({ "type": "content_block_stop", "index": index }));
        }
        let delta = json!({ "stop_reason": self.stop_reason(), "stop_sequence": null });
        events.push(json!({ "type": "message_delta", "delta": delta, "usage": self.usage() }));
        events.push(json!({ "type": "message_stop" }));
        let body = stream::iter(events).then(move |event| async move {
            let name = event.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
            if !delay.is_zero() && name == "content_block_delta" {
                tokio::time::sleep(delay).await;
            }
            Ok::<_, Infallible>(format!("event: {name}\ndata: {event}\n\n"))
        });
        ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(body)).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prompt_is_the_last_message_of_a_person() {
        let request = json!({ "messages": [
            { "role": "user", "content": "one" },
            { "role": "assistant", "content": "1" },
            { "role": "user", "content": [{ "type": "text", "text": "<system-reminder>x</system-reminder>" }, { "type": "text", "text": "two" }] },
            { "role": "assistant", "content": [{ "type": "tool_use", "id": "t", "name": "Bash", "input": {} }] },
            { "role": "user", "content": [{ "type": "tool_result", "tool_use_id": "t", "content": "out" }, { "type": "text", "text": "<system-reminder>" }] },
        ], "tools": [{ "name": "Bash" }] });
        let question = question(&request);
        assert_eq!((question.prompt.as_str(), question.first_prompt.as_str()), ("two", "one"));
        assert_eq!((question.tool_result.as_str(), question.answered), ("out", 1));
        assert_eq!(question.tools, ["Bash"]);
    }
}
