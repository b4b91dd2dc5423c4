//! Typed events for a person. What the agent says and does goes to standard output, everything
//! about it to standard error.

use std::{collections::HashMap, fmt::Write as _};

use serde_json::Value;

use super::text;

/// Of a tool's input, as one line.
const INPUT_CHARS_MAX: usize = 400;

#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    Out(String),
    Note(String),
}

/// Turns events into lines. Pure, but for the names of tools whose results are still to come.
#[derive(Debug, Default)]
pub struct Renderer {
    tools: HashMap<u64, String>,
    /// Whether an agent's own event was shown.
    pub agent_seen: bool,
}

impl Renderer {
    pub fn render(&mut self, event: &Value) -> Vec<Line> {
        let mut lines = Vec::new();
        let kind = text(event, "type");
        self.agent_seen |= kind.starts_with("agent.");
        let indent = if event.get("parent_tool_use_id").is_some() { "  " } else { "" };
        let mut out = |line: &str| lines.push(Line::Out(format!("{indent}{line}")));
        match kind {
            "agent.message" => {
                contents(event).for_each(|text| text.lines().for_each(&mut out));
                if event.get("aborted").and_then(Value::as_bool) == Some(true) {
                    out("… (cut off)");
                }
            }
            "agent.tool_use" | "agent.mcp_tool_use" => {
                let server = event
                    .get("mcp_server_name")
                    .and_then(Value::as_str)
                    .map(|server| format!("{server}/"))
                    .unwrap_or_default();
                let name = format!("{server}{}", text(event, "name"));
                out(&format!("→ {name} {}", input(event)));
                if let Some(id) = event.get("id").and_then(Value::as_u64) {
                    self.tools.insert(id, name);
                }
            }
            "agent.tool_result" | "agent.mcp_tool_result" => {
                let tool = event
                    .get("tool_use_id")
                    .or_else(|| event.get("mcp_tool_use_id"))
                    .and_then(Value::as_u64);
                let tool = tool.and_then(|tool| self.tools.remove(&tool)).unwrap_or_default();
                let failed = event.get("is_error").and_then(Value::as_bool) == Some(true);
                let mark = if failed { "✗" } else { "←" };
                contents(event)
                    .for_each(|text| text.lines().for_each(|line| out(&format!("{mark} {line}"))));
                if let Some(code) =
                    event.get("exit_code").and_then(Value::as_i64).filter(|code| *code != 0)
                {
                    out(&format!("{mark} {tool}: exit code {code}"));
                }
                for change in list(event, "changes") {
                    out(&format!("{mark} {}", text(change, "path")));
                    text(change, "diff").lines().for_each(|line| out(&format!("    {line}")));
                }
            }
            "agent.plan" => {
                for entry in list(event, "entries") {
                    let mark = match text(entry, "status") {
                        "completed" => "☑",
                        "in_progress" => "▶",
                        _ => "☐",
                    };
                    out(&format!("{mark} {}", text(entry, "text")));
                }
            }
            "session.permission_requested" => {
                out(&format!("? {} {}", text(event, "name"), input(event)));
                text(event, "diff").lines().for_each(|line| out(&format!("    {line}")));
                if !text(event, "reason").is_empty() {
                    out(&format!("  {}", text(event, "reason")));
                }
            }
            _ => lines.extend(note(event, kind).map(Line::Note)),
        }
        lines
    }
}

/// What is said about the session itself.
fn note(event: &Value, kind: &str) -> Option<String> {
    Some(match kind {
        "session.stage" => return stage(event),
        "session.stage_output" => text(event, "data")
            .lines()
            .map(|line| format!("  | {line}"))
            .collect::<Vec<_>>()
            .join("\n"),
        "agent.thinking" => {
            format!("· {}", text(event, "text").lines().next().filter(|line| !line.is_empty())?)
        }
        "agent.thread_context_compacted" => "· the conversation was compacted".to_owned(),
        "session.error" => {
            let error = event.get("error")?;
            let again =
                error.pointer("/retry_status/type").and_then(Value::as_str) == Some("retrying");
            format!("✗ {}{}", text(error, "message"), if again { " (will retry)" } else { "" })
        }
        "session.permission_settled" => match text(event, "decision") {
            "void" => "· the agent was lost while it asked".to_owned(),
            "withdrawn" => "· the agent does not ask any more".to_owned(),
            decision => format!("· {decision}"),
        },
        "session.output_dropped" => {
            let bytes = event.get("bytes").and_then(Value::as_u64).unwrap_or_default();
            format!(
                "· {bytes} bytes of the agent's output were dropped: it printed more than is kept"
            )
        }
        "session.input_refused" => format!("· not sent: {}", text(event, "message")),
        "user.message" => {
            contents(event).map(|text| format!("» {text}")).collect::<Vec<_>>().join("\n")
        }
        "session.status_idle" => return idle(event),
        "session.status_terminated" => "Session terminated".to_owned(),
        "session.deleted" => "Session deleted".to_owned(),
        _ => return None,
    })
}

/// The end of a stage of the set-up, as a line.
pub fn stage(event: &Value) -> Option<String> {
    let restored =
        if event.get("restored") == Some(&Value::Bool(true)) { ", restored" } else { "" };
    let duration = event
        .get("duration_ms")
        .and_then(Value::as_u64)
        .map(|ms| format!(" ({ms} ms{restored})"))
        .unwrap_or_default();
    match text(event, "state") {
        "done" => Some(format!("· {}{duration}", text(event, "stage"))),
        "failed" => {
            Some(format!("✗ {}{duration}: {}", text(event, "stage"), text(event, "message")))
        }
        _ => None,
    }
}

fn idle(event: &Value) -> Option<String> {
    let mut note = String::new();
    if let Some(failure) = event.get("failure").filter(|failure| !failure.is_null()) {
        note.push_str(text(failure, "message"));
    }
    let reason = match event.pointer("/stop_reason/type").and_then(Value::as_str) {
        Some("interrupted") => "interrupted",
        Some("limit") => "stopped at a limit of the agent",
        Some("refusal") => "the model refused",
        _ => "",
    };
    if note.is_empty() {
        note.push_str(reason);
    }
    if let Some(code) = event.get("exit_code").and_then(Value::as_i64).filter(|code| *code != 0) {
        let separator = if note.is_empty() { "" } else { "\n" };
        let _ = write!(note, "{separator}exit code {code}");
    }
    (!note.is_empty()).then_some(note)
}

fn contents(event: &Value) -> impl Iterator<Item = &str> {
    list(event, "content").iter().map(|block| text(block, "text"))
}

fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value.get(name).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

/// A tool's input as one line.
fn input(event: &Value) -> String {
    let input = event.get("input").unwrap_or(&Value::Null);
    // Of a tool with one argument, the argument.
    let whole = match input.as_object().map(|object| object.iter().collect::<Vec<_>>()).as_deref() {
        Some([(_, Value::String(text))]) => text.replace('\n', "⏎"),
        _ => input.to_string(),
    };
    let mut shown: String = whole.chars().take(INPUT_CHARS_MAX).collect();
    if shown.len() < whole.len() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn shown(events: &[Value]) -> Vec<String> {
        let mut renderer = Renderer::default();
        let line = |line: Line| match line {
            Line::Out(line) => line,
            Line::Note(line) => format!("({line})"),
        };
        events.iter().flat_map(|event| renderer.render(event)).map(line).collect()
    }

    #[test]
    fn a_turn_reads_like_a_conversation() {
        let events = [
            json!({ "type": "session.status_running", "id": 1, "turn": 1, "prompt": "p" }),
            json!({ "type": "agent.thinking", "id": 2, "turn": 1 }),
            json!({ "type": "agent.message", "id": 3, "turn": 1, "content": [{ "type": "text", "text": "I look.\nNow." }] }),
            json!({ "type": "agent.tool_use", "id": 4, "turn": 1, "name": "Bash", "input": { "command": "ls\nfalse" } }),
            json!({ "type": "session.permission_requested", "id": 5, "turn": 1, "tool_use_id": 4, "name": "Bash", "input": { "a": 1, "b": 2 }, "diff": "-x\n+y" }),
            json!({ "type": "session.permission_settled", "id": 6, "turn": 1, "tool_use_id": 4, "decision": "allowed" }),
            json!({ "type": "agent.tool_result", "id": 7, "turn": 1, "tool_use_id": 4, "content": [{ "type": "text", "text": "a.txt" }], "is_error": true, "exit_code": 1,
                    "changes": [{ "path": "b.txt", "diff": "+new" }] }),
            json!({ "type": "agent.mcp_tool_use", "id": 8, "turn": 1, "mcp_server_name": "files", "name": "read", "input": {}, "parent_tool_use_id": 4 }),
            json!({ "type": "agent.plan", "id": 9, "turn": 1, "entries": [{ "text": "one", "status": "completed" }, { "text": "two", "status": "pending" }] }),
            json!({ "type": "session.error", "id": 10, "turn": 1, "error": { "type": "x", "message": "busy", "retry_status": { "type": "retrying" } } }),
            json!({ "type": "session.status_idle", "id": 11, "turn": 1, "stop_reason": { "type": "interrupted" }, "exit_code": 0 }),
            json!({ "type": "something.new", "id": 12, "turn": 1 }),
        ];
        let expected = [
            "I look.",
            "Now.",
            "→ Bash ls⏎false",
            "? Bash {\"a\":1,\"b\":2}",
            "    -x",
            "    +y",
            "(· allowed)",
            "✗ a.txt",
            "✗ Bash: exit code 1",
            "✗ b.txt",
            "    +new",
            "  → files/read {}",
            "☑ one",
            "☐ two",
            "(✗ busy (will retry))",
            "(interrupted)",
        ];
        assert_eq!(shown(&events), expected);
    }

    #[test]
    fn a_failed_turn_has_a_reason_and_an_exit_code() {
        let idle = |event: Value| shown(&[event]);
        let failure = json!({ "stage": "timeout", "message": "Turn timed out after 60s" });
        assert_eq!(
            idle(
                json!({ "type": "session.status_idle", "stop_reason": { "type": "failed" }, "failure": failure })
            ),
            ["(Turn timed out after 60s)"]
        );
        assert_eq!(
            idle(
                json!({ "type": "session.status_idle", "stop_reason": { "type": "failed" }, "exit_code": 3 })
            ),
            ["(exit code 3)"]
        );
        assert!(idle(json!({ "type": "session.status_idle", "stop_reason": { "type": "end_turn" }, "exit_code": 0 })).is_empty());
    }
}
