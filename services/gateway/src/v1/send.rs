//! `POST /v1/sessions/{id}/events`: what a user sends to a session, all or nothing.

use axum::{
    Json,
    extract::State,
    http::HeaderValue,
    response::{IntoResponse as _, Response},
};
use contract::{
    rpc,
    scheduler::{
        Input, SendEventsReply, SendEventsRequest, SentDecision, SentEvent, SentInterrupt,
        SentMessage, SentToolResult, sent_event::Kind as Sent,
    },
};
use serde::Serialize;
use serde_json::{Map, Value};
use types::limits::{DENY_MESSAGE_CHARS_MAX, TIMEOUT_SECONDS_MAX};
use utoipa::ToSchema;

use crate::{
    App,
    auth::Caller,
    body::Body,
    error::ApiError,
    idempotency::{IdempotencyKey, IdempotencyParams, REPLAYED},
    v1::{
        ids::{PathId, Prefix},
        query::bad,
        thread::entry::{request_of, sent_id, text},
        time,
    },
};

const EVENTS_MAX: usize = 50;

/// Events to send.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes a body")]
pub struct SendEvents {
    /// `user.message`, `user.interrupt`, `user.tool_confirmation` and `user.custom_tool_result`
    #[schema(value_type = Vec<Object>, min_items = 1, max_items = 50)]
    events: Vec<Value>,
}

/// The events that were sent.
#[derive(Serialize, ToSchema)]
pub struct SentEvents {
    /// With `id`, and `processed_at`, which is null until the agent has them.
    #[schema(value_type = Vec<Object>)]
    data: Vec<Value>,
}

/// Send events to a session
///
/// All take effect, or none does. A message begins a turn, or waits for the end of the running one.
#[utoipa::path(post, path = "/v1/sessions/{id}/events", tag = "managed-agents", operation_id = "sessions_events_send",
    params(("id" = String, Path, description = "The session's id"), IdempotencyParams), request_body = SendEvents,
    responses((status = 200, description = "The events, with their ids", body = SentEvents)))]
pub async fn send(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
    key: IdempotencyKey,
    body: Body,
) -> Result<Response, ApiError> {
    let session_id = Prefix::Session.find(&id)?;
    let events = parse(&body.json()?)?;
    let request = SendEventsRequest {
        user_id: caller.user_id,
        session_id,
        events: events.clone(),
        once: Some(key.once_or_own(&body)),
        key_id: caller.key_id,
        timeout_seconds: TIMEOUT_SECONDS_MAX,
        session_limit: Some(caller.session_limit.unwrap_or(app.config.default_session_limit)),
    };
    let SendEventsReply { inputs, replayed } = app.call::<rpc::SendEvents>(&request).await?;
    let data = events.into_iter().zip(inputs).map(|(event, input)| shown(&event, &input)).collect();
    let mut response = Json(SentEvents { data }).into_response();
    if replayed {
        response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

/// An event that was sent, as its sender sees it before the log has it.
fn shown(event: &SentEvent, input: &Input) -> Value {
    let mut body = Map::new();
    body.insert("id".to_owned(), sent_id(&input.input_id).into());
    match &event.kind {
        Some(Sent::Message(message)) => {
            body.insert("type".to_owned(), "user.message".into());
            body.insert("content".to_owned(), text(&message.text));
        }
        Some(Sent::Interrupt(_)) => {
            body.insert("type".to_owned(), "user.interrupt".into());
        }
        Some(Sent::Decision(decision)) => {
            body.insert("type".to_owned(), "user.tool_confirmation".into());
            body.insert(
                "tool_use_id".to_owned(),
                super::thread::entry::tool_use_of(decision.request_id).into(),
            );
            body.insert("result".to_owned(), decision.verdict.clone().into());
            if !decision.deny_message.is_empty() {
                body.insert("deny_message".to_owned(), decision.deny_message.clone().into());
            }
        }
        Some(Sent::ToolResult(result)) => {
            body.insert("type".to_owned(), "user.custom_tool_result".into());
            body.insert(
                "custom_tool_use_id".to_owned(),
                super::thread::entry::tool_use_of(result.request_id).into(),
            );
            body.insert("content".to_owned(), text(&result.text));
            body.insert("is_error".to_owned(), result.is_error.into());
        }
        None => {}
    }
    body.insert(
        "processed_at".to_owned(),
        input.settled_at_us.map_or(Value::Null, |at| time(at).into()),
    );
    Value::Object(body)
}

/// An input that the log does not have yet, as the list shows it.
pub fn queued(input: &Input) -> Option<Value> {
    let kind = match input.kind.as_str() {
        "message" => Sent::Message(SentMessage { text: input.text.clone() }),
        "interrupt" => Sent::Interrupt(SentInterrupt {}),
        // One of a time-out was sent by no one.
        "decision" if !input.key_id.is_empty() => Sent::Decision(SentDecision {
            request_id: input.request_id.unwrap_or_default(),
            verdict: if input.verdict == "deny" { "deny" } else { "allow" }.to_owned(),
            deny_message: input.deny_message.clone(),
        }),
        "tool_result" => Sent::ToolResult(SentToolResult {
            request_id: input.request_id.unwrap_or_default(),
            text: input.text.clone(),
            is_error: input.is_error,
        }),
        _ => return None,
    };
    Some(shown(&SentEvent { kind: Some(kind) }, &Input { settled_at_us: None, ..input.clone() }))
}

/// Reads the body: every field is known, for what is not heeded is refused.
fn parse(body: &Value) -> Result<Vec<SentEvent>, ApiError> {
    let Value::Object(fields) = body else { return Err(bad("the body must be an object")) };
    known(fields, "", &["events"])?;
    let Some(Value::Array(events)) = fields.get("events") else {
        return Err(bad("events: must be a list"));
    };
    if events.is_empty() || events.len() > EVENTS_MAX {
        return Err(bad(&format!("events: must have 1 to {EVENTS_MAX} items")));
    }
    events
        .iter()
        .enumerate()
        .map(|(index, event)| parse_event(event, &format!("events.{index}.")))
        .collect()
}

fn parse_event(event: &Value, at: &str) -> Result<SentEvent, ApiError> {
    let Value::Object(fields) = event else {
        return Err(bad(&format!("{}: must be an object", at.trim_end_matches('.'))));
    };
    let kind = match string(fields, "type", at)? {
        "user.message" => {
            known(fields, at, &["type", "content"])?;
            Sent::Message(SentMessage { text: content(fields, at)? })
        }
        "user.interrupt" => {
            known(fields, at, &["type", "session_thread_id"])?;
            Sent::Interrupt(SentInterrupt {})
        }
        "user.tool_confirmation" => {
            known(
                fields,
                at,
                &["type", "tool_use_id", "result", "deny_message", "session_thread_id"],
            )?;
            Sent::Decision(confirmation(fields, at)?)
        }
        "user.custom_tool_result" => {
            known(
                fields,
                at,
                &["type", "custom_tool_use_id", "content", "is_error", "session_thread_id"],
            )?;
            Sent::ToolResult(tool_result(fields, at)?)
        }
        other => {
            let can = "user.message, user.interrupt, user.tool_confirmation and user.custom_tool_result can";
            return Err(bad(&format!("{at}type: '{other}' cannot be sent; {can}")));
        }
    };
    Ok(SentEvent { kind: Some(kind) })
}

fn confirmation(fields: &Map<String, Value>, at: &str) -> Result<SentDecision, ApiError> {
    let request_id = request_of(string(fields, "tool_use_id", at)?);
    let request_id = request_id.ok_or_else(|| {
        bad(&format!("{at}tool_use_id: no such tool use waits for a confirmation"))
    })?;
    let verdict = string(fields, "result", at)?;
    if !["allow", "deny"].contains(&verdict) {
        return Err(bad(&format!("{at}result: must be 'allow' or 'deny'")));
    }
    let deny_message = match fields.get("deny_message") {
        None | Some(Value::Null) => "",
        Some(_) if verdict != "deny" => {
            return Err(bad(&format!("{at}deny_message: is for the result 'deny'")));
        }
        Some(_) => string(fields, "deny_message", at)?,
    };
    if deny_message.chars().count() > DENY_MESSAGE_CHARS_MAX {
        return Err(bad(&format!(
            "{at}deny_message: must have at most {DENY_MESSAGE_CHARS_MAX} characters"
        )));
    }
    Ok(SentDecision {
        request_id,
        verdict: verdict.to_owned(),
        deny_message: deny_message.to_owned(),
    })
}

fn tool_result(fields: &Map<String, Value>, at: &str) -> Result<SentToolResult, ApiError> {
    let request_id = request_of(string(fields, "custom_tool_use_id", at)?);
    let request_id = request_id.ok_or_else(|| {
        bad(&format!("{at}custom_tool_use_id: no such tool use waits for a result"))
    })?;
    let is_absent = matches!(fields.get("content"), None | Some(Value::Null));
    let text = if is_absent { String::new() } else { texts(fields, at)? };
    let is_error = match fields.get("is_error") {
        None | Some(Value::Null) => false,
        Some(is_error) => {
            is_error.as_bool().ok_or_else(|| bad(&format!("{at}is_error: must be a boolean")))?
        }
    };
    Ok(SentToolResult { request_id, text, is_error })
}

/// The text of a message.
fn content(fields: &Map<String, Value>, at: &str) -> Result<String, ApiError> {
    let text = texts(fields, at)?;
    if text.trim().is_empty() {
        Err(bad(&format!("{at}content: must have text")))
    } else {
        Ok(text)
    }
}

/// Blocks of text are joined by an empty line.
fn texts(fields: &Map<String, Value>, at: &str) -> Result<String, ApiError> {
    let Some(Value::Array(blocks)) = fields.get("content") else {
        return Err(bad(&format!("{at}content: must be a list")));
    };
    let mut texts = Vec::new();
    for (index, block) in blocks.iter().enumerate() {
        let at = format!("{at}content.{index}.");
        let Value::Object(block) = block else {
            return Err(bad(&format!("{}: must be an object", at.trim_end_matches('.'))));
        };
        match string(block, "type", &at)? {
            "text" => {
                known(block, &at, &["type", "text"])?;
                texts.push(string(block, "text", &at)?);
            }
            other => {
                return Err(bad(&format!(
                    "{at}type: '{other}' blocks are not supported; send text"
                )));
            }
        }
    }
    Ok(texts.join("\n\n"))
}

fn string<'a>(fields: &'a Map<String, Value>, name: &str, at: &str) -> Result<&'a str, ApiError> {
    let text = fields
        .get(name)
        .and_then(Value::as_str)
        .ok_or_else(|| bad(&format!("{at}{name}: must be a string")))?;
    // Postgres keeps no NUL in text.
    if text.contains('\0') {
        Err(bad(&format!("{at}{name}: must not contain NUL")))
    } else {
        Ok(text)
    }
}

fn known(fields: &Map<String, Value>, at: &str, names: &[&str]) -> Result<(), ApiError> {
    match fields.keys().find(|key| !names.contains(&key.as_str())) {
        Some(unknown) => Err(bad(&format!("{at}{unknown}: is not supported"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::v1::thread::entry::tool_use_of;

    fn refusal(event: Value) -> String {
        use axum::response::IntoResponse as _;
        let error = parse(&json!({ "events": [event] })).err().unwrap().into_response();
        error
            .extensions()
            .get::<crate::error::Refusal>()
            .unwrap()
            .detail
            .as_str()
            .unwrap()
            .to_owned()
    }

    #[test]
    fn fields_without_effect_are_refused_by_name() {
        let message = |content: Value| json!({ "type": "user.message", "content": content });
        assert_eq!(
            refusal(message(json!([{ "type": "image" }]))),
            "events.0.content.0.type: 'image' blocks are not supported; send text"
        );
        assert_eq!(refusal(message(json!([]))), "events.0.content: must have text");
        let nul = json!([{ "type": "text", "text": "a\0b" }]);
        assert_eq!(refusal(message(nul)), "events.0.content.0.text: must not contain NUL");
        let confirmation = |result: &str| json!({ "type": "user.tool_confirmation", "tool_use_id": tool_use_of(7), "result": result, "deny_message": "no" });
        assert_eq!(
            refusal(confirmation("allow")),
            "events.0.deny_message: is for the result 'deny'"
        );
        assert!(parse(&json!({ "events": [confirmation("deny")] })).is_ok());
        assert_eq!(
            refusal(json!({ "type": "user.interrupt", "message": "x" })),
            "events.0.message: is not supported"
        );
        assert!(
            refusal(json!({ "type": "nope" })).starts_with("events.0.type: 'nope' cannot be sent")
        );
        assert!(parse(&json!({ "events": [] })).is_err() && parse(&json!([])).is_err());
    }

    proptest! {
        #[test]
        fn any_text_of_a_message_arrives_whole(text in "\\PC{0,40}[a-z]\\PC{0,40}") {
            let event = json!({ "type": "user.message", "content": [{ "type": "text", "text": text }] });
            let events = parse(&json!({ "events": [event] })).ok().unwrap();
            prop_assert_eq!(events, vec![SentEvent { kind: Some(Sent::Message(SentMessage { text })) }]);
        }
    }
}
