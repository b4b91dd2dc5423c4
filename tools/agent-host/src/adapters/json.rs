//! Reading what CLIs print, where anything may be absent or of another type.

use contract::host::{AgentError, agent_error::Retry, event};
use serde_json::Value;

/// The text at a JSON pointer; empty where there is none.
pub fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

pub fn number(value: &Value, pointer: &str) -> u64 {
    value.pointer(pointer).and_then(Value::as_u64).unwrap_or_default()
}

pub fn array<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The texts of a content: a text, or blocks with texts.
pub fn content(value: Option<&Value>) -> String {
    match value {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(blocks)) => {
            let texts = blocks.iter().map(|block| match text(block, "/text") {
                "" => text(block, "/content/text"),
                text => text,
            });
            texts.filter(|text| !text.is_empty()).collect::<Vec<_>>().join("\n")
        }
        _ => String::new(),
    }
}

/// An amount of dollars in millionths.
pub fn micro_dollars(value: &Value, pointer: &str) -> Option<u64> {
    let dollars = value.pointer(pointer)?.as_f64()?;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked to be a small positive number"
    )]
    (0.0..1e9).contains(&dollars).then(|| (dollars * 1e6).round() as u64)
}

/// The key whose member `by` is greatest.
pub fn greatest(object: Option<&Value>, by: &str) -> Option<String> {
    let of = |value: &Value| value.get(by).and_then(Value::as_u64).unwrap_or_default();
    object?.as_object()?.iter().max_by_key(|(_, value)| of(value)).map(|(key, _)| key.clone())
}

/// The Managed Agents API's error type for an HTTP status.
pub fn error_kind(status: &str) -> &'static str {
    match status {
        "429" => "model_rate_limited_error",
        "529" | "503" => "model_overloaded_error",
        "402" => "billing_error",
        "" | "null" => "unknown_error",
        _ => "model_request_failed_error",
    }
}

/// An MCP server that the CLI continues without.
pub fn mcp_failed(server: &str, why: &str, wants_login: bool) -> event::Kind {
    let message = match (wants_login, why) {
        (true, _) => format!(
            "The MCP server {server} wants its user to log in; the turn continues without it"
        ),
        (false, "") => {
            format!("The MCP server {server} did not start; the turn continues without it")
        }
        (false, why) => {
            format!("The MCP server {server} did not start; the turn continues without it: {why}")
        }
    };
    let kind =
        if wants_login { "mcp_authentication_failed_error" } else { "mcp_connection_failed_error" };
    event::Kind::Error(AgentError {
        kind: kind.to_owned(),
        message,
        retry: Retry::Exhausted.into(),
    })
}
