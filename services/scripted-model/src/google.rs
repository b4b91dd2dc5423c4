//! The Gemini API (`generateContent`, streamed or whole), as far as Gemini CLI and opencode use it.

use std::{convert::Infallible, sync::Arc};

use axum::{
    Json, Router,
    body::Body,
    extract::{DefaultBodyLimit, Path, Query, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::post,
};
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    BAD_KEY, parts,
    script::{Answer, Conversation, Question, Script, mark},
};

pub fn router(script: Arc<Script>) -> Router {
    Router::new()
        .route("/v1beta/models/{call}", post(generate))
        .layer(DefaultBodyLimit::max(64 << 20))
        .with_state(script)
}

#[derive(Deserialize)]
struct Key {
    key: Option<String>,
}

fn refused(status: StatusCode, message: &str) -> Response {
    let name = match status.as_u16() {
        400 => "INVALID_ARGUMENT",
        401 | 403 => "PERMISSION_DENIED",
        404 => "NOT_FOUND",
        429 => "RESOURCE_EXHAUSTED",
        503 => "UNAVAILABLE",
        _ => "INTERNAL",
    };
    (
        status,
        Json(json!({ "error": { "code": status.as_u16(), "message": message, "status": name } })),
    )
        .into_response()
}

async fn generate(
    State(script): State<Arc<Script>>,
    Path(call): Path<String>,
    Query(query): Query<Key>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let key = headers
        .get("x-goog-api-key")
        .and_then(|value| value.to_str().ok())
        .or(query.key.as_deref())
        .unwrap_or_default();
    if key.is_empty() || key == BAD_KEY {
        return refused(StatusCode::BAD_REQUEST, "API key not valid. Please pass a valid API key.");
    }
    let Some((model, method)) = call.split_once(':') else {
        return refused(StatusCode::NOT_FOUND, "no such method");
    };
    let Ok(request) = serde_json::from_slice::<Value>(&body) else {
        return refused(StatusCode::BAD_REQUEST, "the body is not JSON");
    };
    let streamed = match method {
        "countTokens" => return Json(json!({ "totalTokens": 100 })).into_response(),
        "generateContent" => false,
        "streamGenerateContent" => true,
        _ => return refused(StatusCode::NOT_FOUND, "no such method"),
    };
    match script.answer(&question(&request)) {
        Answer::Fail { status, message } => refused(
            StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            &message,
        ),
        Answer::Say { text, tool, delay } if streamed => {
            let mut chunks: Vec<Value> = parts(&text, delay)
                .into_iter()
                .map(|text| chunk(model, vec![json!({ "text": text })], None))
                .collect();
            chunks.push(chunk(model, tool.into_iter().map(call_part).collect(), Some(&text)));
            let body = stream::iter(chunks).then(move |chunk| async move {
                tokio::time::sleep(delay).await;
                Ok::<_, Infallible>(format!("data: {chunk}\n\n"))
            });
            ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(body)).into_response()
        }
        Answer::Say { text, tool, .. } => {
            let parts = [json!({ "text": text })]
                .into_iter()
                .chain(tool.into_iter().map(call_part))
                .collect();
            Json(chunk(model, parts, Some(&text))).into_response()
        }
    }
}

fn call_part((name, args): (String, Value)) -> Value {
    json!({ "functionCall": { "name": name, "args": args } })
}

/// A part of the answer; the last one has the whole text's usage.
fn chunk(model: &str, mut parts: Vec<Value>, whole: Option<&str>) -> Value {
    if parts.is_empty() {
        parts.push(json!({ "text": "" }));
    }
    let mut candidate = json!({ "content": { "role": "model", "parts": parts }, "index": 0 });
    let mut chunk = json!({ "modelVersion": model });
    if let (Some(text), Some(candidate), Some(chunk)) =
        (whole, candidate.as_object_mut(), chunk.as_object_mut())
    {
        candidate.insert("finishReason".to_owned(), "STOP".into());
        let tokens = 1 + text.len() / 4;
        let usage = json!({ "promptTokenCount": 100, "candidatesTokenCount": tokens, "totalTokenCount": 100 + tokens });
        chunk.insert("usageMetadata".to_owned(), usage);
    }
    if let Some(chunk) = chunk.as_object_mut() {
        chunk.insert("candidates".to_owned(), json!([candidate]));
    }
    chunk
}

fn content_parts(content: &Value) -> &[Value] {
    content.get("parts").and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// What a person wrote: the CLI's own contexts, in tags, left out.
fn written(content: &Value) -> String {
    let texts =
        content_parts(content).iter().filter_map(|part| part.get("text")?.as_str()).map(str::trim);
    texts.filter(|text| !text.is_empty() && !text.starts_with('<')).collect::<Vec<_>>().join("\n")
}

fn question(request: &Value) -> Question {
    let Conversation { items, since, prompt, first_prompt } =
        Conversation::read(request, "contents", written);
    let has_call = |content: &&Value| {
        content_parts(content).iter().any(|part| part.get("functionCall").is_some())
    };
    let result = items
        .iter()
        .rev()
        .flat_map(content_parts)
        .find_map(|part| part.get("functionResponse")?.get("response"));
    let tools = request.get("tools").and_then(Value::as_array).into_iter().flatten();
    let declared = tools
        .filter_map(|tool| {
            tool.get("functionDeclarations").or(tool.get("function_declarations"))?.as_array()
        })
        .flatten();
    Question {
        mark: mark(request),
        prompt,
        first_prompt,
        tool_result: match result
            .map(|result| (result.get("output").and_then(Value::as_str), result))
        {
            Some((Some(output), _)) => output.trim().to_owned(),
            Some((None, result)) => result.to_string(),
            None => String::new(),
        },
        answered: since.iter().filter(has_call).count(),
        searched: false,
        tools: declared.filter_map(|tool| tool.get("name")?.as_str().map(str::to_owned)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_prompt_is_the_last_message_of_a_person() {
        let request = json!({ "contents": [
            { "role": "user", "parts": [{ "text": "<session_context>x" }, { "text": "one\n" }] },
            { "role": "model", "parts": [{ "text": "1" }] },
            { "role": "user", "parts": [{ "text": "two" }] },
            { "role": "model", "parts": [{ "functionCall": { "name": "run_shell_command", "args": {} } }] },
            { "role": "user", "parts": [{ "functionResponse": { "name": "run_shell_command", "response": { "output": "out\n" } } }] },
        ], "tools": [{ "functionDeclarations": [{ "name": "run_shell_command" }] }] });
        let question = question(&request);
        assert_eq!((question.prompt.as_str(), question.first_prompt.as_str()), ("two", "one"));
        assert_eq!((question.tool_result.as_str(), question.answered), ("out", 1));
        assert_eq!(question.tools, ["run_shell_command"]);
    }

    #[test]
    fn the_last_chunk_contains_the_usage() {
        assert_eq!(chunk("m", Vec::new(), Some("abcd"))["usageMetadata"]["totalTokenCount"], 102);
        assert_eq!(parts("a b", Duration::from_millis(1)), ["a ", "b"]);
    }
}
