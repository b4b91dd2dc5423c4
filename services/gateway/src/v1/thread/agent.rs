//! What an agent says and does, as events.

use contract::{
    host::{Evaluation, agent_error::Retry, event},
    session::AgentEvent,
};
use serde_json::json;

use crate::v1::{
    ids::EventId,
    thread::{
        Thread,
        entry::{Entry, part, result},
        names::{bare_name, error, tool_name},
        text::{Blocks, Content, Evaluated, ToolUse, object},
        totals::Totals,
    },
};

impl Thread {
    pub(super) fn agent(&mut self, agent: &AgentEvent, entry: &mut Entry<'_>) {
        let Some(kind) = agent.event.as_ref().and_then(|event| event.kind.as_ref()) else { return };
        match kind {
            event::Kind::Message(message) if message.text.is_empty() => {}
            event::Kind::Message(message) => {
                self.begin_span(entry);
                let id = self.text_id(agent, entry);
                entry.add_as(
                    id,
                    part::MAIN,
                    "agent.message",
                    Content { content: Blocks(&message.text) },
                );
            }
            event::Kind::Thinking(_) => {
                self.begin_span(entry);
                let id = self.text_id(agent, entry);
                entry.add_as(id, part::MAIN, "agent.thinking", json!({}));
            }
            event::Kind::ToolUse(tool) => {
                self.begin_span(entry);
                let (server, evaluation) = (tool.mcp_server.as_str(), tool.evaluation());
                self.use_tool(
                    &Tool { name: &tool.name, server, input: &tool.input_json, evaluation },
                    entry,
                );
            }
            event::Kind::ToolResult(outcome) => {
                if self.state.tools.remove(&agent.tool_use).is_some() {
                    result(
                        agent.tool_use,
                        agent.is_mcp,
                        &outcome.content,
                        outcome.is_error,
                        part::MAIN,
                        entry,
                    );
                }
            }
            event::Kind::ModelRequestEnded(ended) => {
                self.begin_span(entry);
                let usage = ended.usage.as_ref().map(Totals::from).unwrap_or_default();
                self.state.reported = self.state.reported.plus(usage);
                self.end_span(usage, false, entry);
            }
            event::Kind::Error(failed) => {
                let is_retrying = failed.retry() == Retry::Retrying;
                self.state.has_failed |= !is_retrying;
                let retry = if is_retrying { "retrying" } else { "exhausted" };
                entry.add(
                    part::ERROR,
                    "session.error",
                    error(&failed.kind, &failed.message, retry),
                );
                // The CLI waits and asks its model again.
                if is_retrying && failed.kind.starts_with("model_") && self.state.is_running {
                    entry.add(part::RESCHEDULED, "session.status_rescheduled", json!({}));
                    entry.add(part::RUNNING_AGAIN, "session.status_running", json!({}));
                }
            }
            event::Kind::ContextCompacted(_) => {
                entry.add(part::MAIN, "agent.thread_context_compacted", json!({}))
            }
            event::Kind::ConversationStarted(_) | event::Kind::Plan(_) | event::Kind::Delta(_) => {}
        }
    }

    /// A text of which parts were shown before has the id that those named.
    fn text_id(&self, agent: &AgentEvent, entry: &Entry<'_>) -> EventId {
        match u32::try_from(agent.text) {
            Ok(text @ 1..) => EventId::Text { turn: self.state.turn, text },
            _ => EventId::Log { id: entry.id, part: part::MAIN },
        }
    }

    pub(super) fn use_tool(&mut self, tool: &Tool<'_>, entry: &mut Entry<'_>) {
        let (evaluated_permission, evaluation) = match tool.evaluation {
            Evaluation::Ask => ("ask", "always_ask"),
            Evaluation::Deny => ("deny", "always_ask"),
            Evaluation::Allow | Evaluation::Unspecified => ("allow", "always_allow"),
        };
        let is_mcp = !tool.server.is_empty();
        let (kind, name) = match is_mcp {
            true => ("agent.mcp_tool_use", bare_name(tool.server, tool.name)),
            false => ("agent.tool_use", tool_name(tool.name)),
        };
        let fields = ToolUse {
            mcp_server_name: is_mcp.then_some(tool.server),
            name,
            input: object(tool.input),
            evaluated_permission,
            evaluation: Evaluated { r#type: evaluation },
            session_thread_id: None,
        };
        self.state.tools.insert(entry.id, is_mcp);
        entry.add(part::MAIN, kind, fields);
    }
}

pub struct Tool<'a> {
    pub name: &'a str,
    pub server: &'a str,
    pub input: &'a str,
    pub evaluation: Evaluation,
}
