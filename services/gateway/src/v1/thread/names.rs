//! The names that the API has for events, errors and tools.

use serde_json::{Value, json};

/// Every name that the `types[]` filter of the event list takes.
pub const TYPES: [&str; 41] = [
    "user.message",
    "user.interrupt",
    "user.tool_confirmation",
    "user.custom_tool_result",
    "user.tool_result",
    "user.define_outcome",
    "system.message",
    "agent.message",
    "agent.thinking",
    "agent.tool_use",
    "agent.tool_result",
    "agent.mcp_tool_use",
    "agent.mcp_tool_result",
    "agent.custom_tool_use",
    "agent.thread_context_compacted",
    "agent.thread_message_sent",
    "agent.thread_message_received",
    "session.status_running",
    "session.status_idle",
    "session.status_rescheduled",
    "session.status_terminated",
    "session.error",
    "session.updated",
    "session.usage",
    "session.thread_created",
    "session.thread_status_running",
    "session.thread_status_idle",
    "session.thread_status_rescheduled",
    "session.thread_status_terminated",
    "span.model_request_start",
    "span.model_request_end",
    "span.outcome_evaluation_start",
    "span.outcome_evaluation_ongoing",
    "span.outcome_evaluation_end",
    "workflow_run.created",
    "workflow_run.status_running",
    "workflow_run.status_idle",
    "workflow_run.status_ended",
    "workflow_run.phase_started",
    "workflow_run.phase_ended",
    "workflow_run.error",
];

/// The kinds of errors that the API names.
const ERRORS: [&str; 7] = [
    "model_overloaded_error",
    "model_rate_limited_error",
    "model_request_failed_error",
    "billing_error",
    "tool_use_limit_reached_error",
    "compaction_limit_reached_error",
    "mcp_connection_failed_error",
];

pub fn error(kind: &str, message: &str, retry: &str) -> Value {
    let kind = if ERRORS.contains(&kind) { kind } else { "unknown_error" };
    json!({ "error": { "type": kind, "message": message, "retry_status": { "type": retry } } })
}

/// Each CLI has a way of its own to name a server's tools.
pub fn bare_name<'a>(server: &str, name: &'a str) -> &'a str {
    let prefixes = [format!("mcp__{server}__"), format!("mcp_{server}_"), format!("{server}_")];
    prefixes.iter().find_map(|prefix| name.strip_prefix(prefix.as_str())).unwrap_or(name)
}

/// The API's name of a tool that the CLIs have under names of their own; other tools keep theirs.
pub fn tool_name(name: &str) -> &str {
    match name {
        "Bash" | "bash" | "command_execution" | "run_shell_command" | "shell" => "bash",
        "Read" | "read" | "read_file" => "read",
        "Write" | "write" | "write_file" => "write",
        "Edit" | "edit" | "replace" => "edit",
        "Glob" | "glob" => "glob",
        "Grep" | "grep" | "search_file_content" => "grep",
        "WebFetch" | "web_fetch" | "webfetch" => "web_fetch",
        "WebSearch" | "web_search" | "websearch" | "google_web_search" => "web_search",
        other => other,
    }
}
