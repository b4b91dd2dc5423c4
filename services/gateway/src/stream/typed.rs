//! The typed view of a session's log: what `GET /sessions/{id}/events` shows. Pure.
//!
//! One event of the log is one event here, under the same id; raw output and the log's internal
//! entries are left out. The shapes of `agent.*` events are those of the Managed Agents API.

use contract::{
    host::{
        self, DecisionSettled, Evaluation, agent_error::Retry, decision_settled::How, event,
        input_settled::Outcome,
    },
    session::{
        self, AgentEvent, BudgetNotice, ModelRequestEnded, SessionEvent, StopReason, TurnEnded,
        session_event::Kind,
    },
};
use serde::Serialize;
use serde_json::value::RawValue;
use types::Timestamp;
use utoipa::ToSchema;

/// An event of a session.
#[derive(Debug, Serialize, ToSchema)]
pub struct TypedEvent {
    /// Ascends within the session, and never changes. Ids have gaps.
    pub id: u64,
    #[serde(flatten)]
    pub body: Body,
    pub turn: u32,
    /// When it happened: later than every earlier event of the session.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub processed_at: Option<String>,
}

/// What happened.
#[derive(Debug, Serialize, ToSchema)]
#[serde(tag = "type")]
pub enum Body {
    /// A turn began.
    #[serde(rename = "session.status_running")]
    Running {
        prompt: String,
        /// The queued message that became the turn.
        #[serde(skip_serializing_if = "Option::is_none")]
        input_id: Option<String>,
    },
    /// A turn ended.
    #[serde(rename = "session.status_idle")]
    Idle {
        stop_reason: Stop,
        #[serde(skip_serializing_if = "Option::is_none")]
        exit_code: Option<i32>,
        #[serde(skip_serializing_if = "Option::is_none")]
        failure: Option<Failure>,
        #[serde(skip_serializing_if = "Option::is_none")]
        usage: Option<Usage>,
    },
    #[serde(rename = "session.status_terminated")]
    Terminated,
    /// The last event of a stream; never listed.
    #[serde(rename = "session.deleted")]
    Deleted,
    /// Provisioning continues.
    #[serde(rename = "session.stage")]
    Stage {
        stage: String,
        /// `started`, `done` or `failed`.
        state: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        duration_ms: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        message: Option<String>,
        /// True if the result was restored from an image instead of being built.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        restored: bool,
    },
    /// A set-up step printed something.
    #[serde(rename = "session.stage_output")]
    StageOutput {
        stage: String,
        /// `stdout` or `stderr`.
        stream: &'static str,
        data: String,
    },
    /// The agent printed more than is kept: this many bytes of its output were dropped here.
    #[serde(rename = "session.output_dropped")]
    OutputDropped { bytes: u64 },
    /// A message joined the running turn.
    #[serde(rename = "user.message")]
    UserMessage { content: Vec<Text>, input_id: String },
    #[serde(rename = "user.interrupt")]
    UserInterrupt { input_id: String },
    /// An input had no effect.
    #[serde(rename = "session.input_refused")]
    InputRefused { input_id: String, message: String },
    /// The agent waits for a decision on a tool use: `POST /sessions/{id}/requests/{tool_use_id}`.
    #[serde(rename = "session.permission_requested")]
    PermissionRequested {
        tool_use_id: u64,
        name: String,
        #[schema(value_type = Object)]
        input: Box<RawValue>,
        /// A unified diff of what the tool would change, where the agent gives one.
        #[serde(skip_serializing_if = "String::is_empty")]
        diff: String,
        #[serde(skip_serializing_if = "String::is_empty")]
        reason: String,
    },
    #[serde(rename = "session.permission_settled")]
    PermissionSettled {
        tool_use_id: u64,
        decision: Decision,
        #[serde(skip_serializing_if = "Option::is_none")]
        input_id: Option<String>,
    },
    /// The CLI began or resumed its conversation.
    #[serde(rename = "agent.conversation_started")]
    ConversationStarted { conversation_id: String, model: String, resumed: bool },
    #[serde(rename = "agent.message")]
    Message {
        content: Vec<Text>,
        /// Cut off by an interrupt.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        aborted: bool,
        #[serde(skip_serializing_if = "Option::is_none")]
        parent_tool_use_id: Option<u64>,
    },
    #[serde(rename = "agent.thinking")]
    Thinking {
        /// What the CLI reports of it; often empty.
        #[serde(skip_serializing_if = "String::is_empty")]
        text: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        parent_tool_use_id: Option<u64>,
    },
    #[serde(rename = "agent.tool_use")]
    ToolUse {
        name: String,
        #[schema(value_type = Object)]
        input: Box<RawValue>,
        #[serde(skip_serializing_if = "Option::is_none")]
        evaluated_permission: Option<&'static str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        parent_tool_use_id: Option<u64>,
    },
    #[serde(rename = "agent.mcp_tool_use")]
    McpToolUse {
        mcp_server_name: String,
        name: String,
        #[schema(value_type = Object)]
        input: Box<RawValue>,
        #[serde(skip_serializing_if = "Option::is_none")]
        evaluated_permission: Option<&'static str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        parent_tool_use_id: Option<u64>,
    },
    #[serde(rename = "agent.tool_result")]
    ToolResult {
        tool_use_id: Option<u64>,
        content: Vec<Text>,
        is_error: bool,
        #[serde(skip_serializing_if = "Option::is_none")]
        exit_code: Option<i32>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        changes: Vec<Change>,
        #[serde(skip_serializing_if = "Option::is_none")]
        parent_tool_use_id: Option<u64>,
    },
    #[serde(rename = "agent.mcp_tool_result")]
    McpToolResult {
        mcp_tool_use_id: Option<u64>,
        content: Vec<Text>,
        is_error: bool,
        #[serde(skip_serializing_if = "Option::is_none")]
        parent_tool_use_id: Option<u64>,
    },
    #[serde(rename = "agent.plan")]
    Plan { entries: Vec<PlanEntry> },
    #[serde(rename = "agent.thread_context_compacted")]
    ContextCompacted,
    /// The model gateway sent a request to a provider.
    #[serde(rename = "span.model_request_start")]
    ModelRequestStart { provider: String, model: String },
    #[serde(rename = "span.model_request_end")]
    ModelRequestEnd {
        /// The event that shows its start; absent where the CLI reports requests itself.
        #[serde(skip_serializing_if = "Option::is_none")]
        model_request_start_id: Option<u64>,
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        is_error: bool,
        /// Null: not known.
        model_usage: Option<ModelUsage>,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// More than 80 percent of a budget is used; or all of it, and no more model requests are
    /// sent.
    #[serde(rename = "session.budget")]
    Budget {
        /// `warning` or `reached`.
        state: &'static str,
        /// Whose budget: `session`, `agent`, `user` or `deployment`.
        scope: String,
        /// `cost_usd`, `tokens`, `requests` or `seconds`.
        limit: &'static str,
        used: f64,
        max: f64,
    },
    #[serde(rename = "session.error")]
    Error { error: AgentError },
}

/// Why a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Stop {
    /// The agent was done.
    EndTurn,
    /// Its user interrupted it.
    Interrupted,
    /// A limit of the agent's: turns, tokens or budget.
    Limit,
    /// The model refused.
    Refusal,
    /// A budget is used up. Prompts are taken again once it is raised.
    BudgetReached,
    /// `exit_code` and `failure` tell more.
    Failed,
}

/// What became of a permission request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    Allowed,
    Denied,
    /// The agent no longer asks.
    Withdrawn,
    /// The agent's process was lost while it asked.
    Void,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(tag = "type", rename = "text")]
pub struct Text {
    text: String,
}

/// A file that a tool changed.
#[derive(Debug, Serialize, ToSchema)]
pub struct Change {
    path: String,
    /// A unified diff, or the hunks of one.
    diff: String,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct PlanEntry {
    text: String,
    /// `pending`, `in_progress` or `completed`.
    status: String,
}

/// A turn's usage; what the agent did not report is absent.
#[derive(Debug, Serialize, ToSchema)]
pub struct Usage {
    #[serde(skip_serializing_if = "Option::is_none")]
    input_tokens: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    output_tokens: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_read_input_tokens: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_creation_input_tokens: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cost_usd: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<String>,
}

/// One model request's usage.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelUsage {
    input_tokens: u64,
    output_tokens: u64,
    cache_creation_input_tokens: u64,
    cache_read_input_tokens: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    model: String,
    /// By the provider's list price; absent where the model has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    cost_usd: Option<f64>,
    /// The response was cut off: the provider may have counted more.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    is_partial: bool,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct Failure {
    stage: String,
    message: String,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct AgentError {
    #[serde(rename = "type")]
    kind: String,
    message: String,
    retry_status: RetryStatus,
}

/// Whether the agent tries again.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum RetryStatus {
    Retrying,
    Exhausted,
}

impl TypedEvent {
    /// None for what the typed view leaves out.
    #[must_use]
    pub fn of(id: u64, event: SessionEvent) -> Option<Self> {
        let processed_at =
            (event.at_us != 0).then(|| Timestamp::from_unix_micros(event.at_us).to_string());
        Some(Self { id, turn: event.turn, processed_at, body: body(event.kind?)? })
    }
}

fn body(kind: Kind) -> Option<Body> {
    Some(match kind {
        Kind::Output(_) | Kind::TakenOver(_) | Kind::Updated(_) => return None,
        Kind::TurnStarted(started) => {
            Body::Running { prompt: started.prompt, input_id: present(started.input_id) }
        }
        Kind::TurnEnded(ended) => idle(ended),
        Kind::Terminated(_) => Body::Terminated,
        Kind::Deleted(_) => Body::Deleted,
        Kind::Stage(stage) => Body::Stage {
            stage: stage.stage,
            state: stage.state,
            duration_ms: stage.duration_ms,
            message: stage.message,
            restored: stage.restored,
        },
        Kind::StageOutput(output) => Body::StageOutput {
            stage: output.stage,
            stream: if output.stderr { "stderr" } else { "stdout" },
            data: String::from_utf8_lossy(&output.data).into_owned(),
        },
        Kind::OutputDropped(dropped) => Body::OutputDropped { bytes: dropped.bytes },
        Kind::Agent(agent) => return agent_event(agent),
        // Custom tools are the Managed Agents API's.
        Kind::DecisionRequested(session::DecisionRequested { request: Some(request), .. })
            if request.is_custom_tool =>
        {
            return None;
        }
        Kind::DecisionSettled(session::DecisionSettled { result: Some(_), .. }) => return None,
        Kind::DecisionRequested(requested) => {
            let host::DecisionRequested { tool, input_json, diff, reason, .. } =
                requested.request.unwrap_or_default();
            Body::PermissionRequested {
                tool_use_id: requested.tool_use,
                name: tool,
                input: json(input_json),
                diff,
                reason,
            }
        }
        Kind::DecisionSettled(settled) => {
            let tool_use_id = settled.tool_use;
            let settled: DecisionSettled = settled.settled.unwrap_or_default();
            let decision = match settled.how() {
                How::Allowed => Decision::Allowed,
                How::Denied => Decision::Denied,
                How::Withdrawn => Decision::Withdrawn,
                How::Void | How::Unspecified => Decision::Void,
            };
            Body::PermissionSettled { tool_use_id, decision, input_id: present(settled.input_id) }
        }
        Kind::InputSettled(input) => return input_settled(input),
        Kind::ModelRequestStarted(started) => {
            Body::ModelRequestStart { provider: started.provider, model: started.model }
        }
        Kind::ModelRequestEnded(ended) => model_request_end(ended),
        Kind::BudgetNotice(notice) => budget(notice),
    })
}

fn model_request_end(ended: ModelRequestEnded) -> Body {
    let model = ended.model;
    let usage = |usage: session::Usage| {
        let (read, written) = (
            usage.cache_read_tokens.unwrap_or_default(),
            usage.cache_write_tokens.unwrap_or_default(),
        );
        ModelUsage {
            // Without those that were read from or into a cache.
            input_tokens: usage
                .input_tokens
                .unwrap_or_default()
                .saturating_sub(read.saturating_add(written)),
            output_tokens: usage.output_tokens.unwrap_or_default(),
            cache_creation_input_tokens: written,
            cache_read_input_tokens: read,
            model,
            cost_usd: usage.cost_micro_usd.map(|cost| cost as f64 / 1e6),
            is_partial: ended.is_partial,
        }
    };
    Body::ModelRequestEnd {
        model_request_start_id: Some(ended.started).filter(|id| *id > 0),
        is_error: !ended.error.is_empty(),
        model_usage: ended.usage.map(usage),
        error: present(ended.error),
    }
}

fn budget(notice: BudgetNotice) -> Body {
    let (limit, unit) = match notice.limit.as_str() {
        "cost" => ("cost_usd", 1e6),
        "tokens" => ("tokens", 1.0),
        "requests" => ("requests", 1.0),
        _ => ("seconds", 1.0),
    };
    let state = if notice.is_reached { "reached" } else { "warning" };
    Body::Budget {
        state,
        scope: notice.scope,
        limit,
        used: notice.used as f64 / unit,
        max: notice.max as f64 / unit,
    }
}

fn idle(ended: TurnEnded) -> Body {
    let stop_reason = match ended.stop_reason() {
        StopReason::Budget => Stop::BudgetReached,
        StopReason::Interrupted => Stop::Interrupted,
        StopReason::Limit => Stop::Limit,
        StopReason::Refused => Stop::Refusal,
        StopReason::EndTurn | StopReason::Unspecified if ended.exit_code == Some(0) => {
            Stop::EndTurn
        }
        StopReason::EndTurn | StopReason::Unspecified => Stop::Failed,
    };
    Body::Idle {
        stop_reason,
        exit_code: ended.exit_code,
        failure: ended
            .failure
            .map(|failure| Failure { stage: failure.stage, message: failure.message }),
        usage: ended.usage.map(|usage| Usage {
            input_tokens: usage.input_tokens,
            output_tokens: usage.output_tokens,
            cache_read_input_tokens: usage.cache_read_tokens,
            cache_creation_input_tokens: usage.cache_write_tokens,
            cost_usd: usage.cost_micro_usd.map(|micro| micro as f64 / 1e6),
            model: usage.model,
        }),
    }
}

fn input_settled(input: session::InputSettled) -> Option<Body> {
    let settled = input.settled.unwrap_or_default();
    match (settled.outcome(), input.kind.as_str()) {
        (Outcome::Applied, "message") => {
            Some(Body::UserMessage { content: text(input.text), input_id: settled.id })
        }
        (Outcome::Applied, "interrupt") => Some(Body::UserInterrupt { input_id: settled.id }),
        (Outcome::Refused, _) => {
            Some(Body::InputRefused { input_id: settled.id, message: settled.message })
        }
        // A decision shows as its request's end.
        _ => None,
    }
}

fn agent_event(agent: AgentEvent) -> Option<Body> {
    let parent_tool_use_id = positive(agent.parent);
    Some(match agent.event?.kind? {
        event::Kind::ConversationStarted(started) => Body::ConversationStarted {
            conversation_id: started.conversation_id,
            model: started.model,
            resumed: started.resumed,
        },
        event::Kind::Message(message) => Body::Message {
            content: text(message.text),
            aborted: message.aborted,
            parent_tool_use_id,
        },
        event::Kind::Thinking(thinking) => {
            Body::Thinking { text: thinking.text, parent_tool_use_id }
        }
        event::Kind::ToolUse(tool) => {
            let evaluated_permission = match tool.evaluation() {
                Evaluation::Unspecified => None,
                Evaluation::Allow => Some("allow"),
                Evaluation::Ask => Some("ask"),
                Evaluation::Deny => Some("deny"),
            };
            let (name, input) = (tool.name, json(tool.input_json));
            match present(tool.mcp_server) {
                Some(mcp_server_name) => {
                    // Each CLI has a way of its own to name a server's tools; permission rules know
                    // them by that name.
                    let prefixes = [
                        format!("mcp__{mcp_server_name}__"),
                        format!("mcp_{mcp_server_name}_"),
                        format!("{mcp_server_name}_"),
                    ];
                    let bare = prefixes
                        .iter()
                        .find_map(|prefix| name.strip_prefix(prefix))
                        .map(str::to_owned);
                    let name = bare.unwrap_or(name);
                    Body::McpToolUse {
                        mcp_server_name,
                        name,
                        input,
                        evaluated_permission,
                        parent_tool_use_id,
                    }
                }
                None => Body::ToolUse { name, input, evaluated_permission, parent_tool_use_id },
            }
        }
        event::Kind::ToolResult(result) => {
            let (content, is_error) = (text(result.content), result.is_error);
            match agent.is_mcp {
                true => Body::McpToolResult {
                    mcp_tool_use_id: positive(agent.tool_use),
                    content,
                    is_error,
                    parent_tool_use_id,
                },
                false => Body::ToolResult {
                    tool_use_id: positive(agent.tool_use),
                    content,
                    is_error,
                    exit_code: result.exit_code,
                    changes: result
                        .changes
                        .into_iter()
                        .map(|change| Change { path: change.path, diff: change.diff })
                        .collect(),
                    parent_tool_use_id,
                },
            }
        }
        event::Kind::Plan(plan) => Body::Plan {
            entries: plan
                .entries
                .into_iter()
                .map(|entry| PlanEntry { text: entry.text, status: entry.status })
                .collect(),
        },
        event::Kind::ModelRequestEnded(ended) => {
            let usage = ended.usage.unwrap_or_default();
            Body::ModelRequestEnd {
                model_request_start_id: None,
                is_error: false,
                error: None,
                model_usage: Some(ModelUsage {
                    input_tokens: usage.input_tokens,
                    output_tokens: usage.output_tokens,
                    cache_creation_input_tokens: usage.cache_write_tokens,
                    cache_read_input_tokens: usage.cache_read_tokens,
                    model: usage.model,
                    cost_usd: None,
                    is_partial: false,
                }),
            }
        }
        event::Kind::Error(error) => {
            let retry_status = match error.retry() {
                Retry::Retrying => RetryStatus::Retrying,
                Retry::Exhausted | Retry::Unspecified => RetryStatus::Exhausted,
            };
            Body::Error {
                error: AgentError { kind: error.kind, message: error.message, retry_status },
            }
        }
        event::Kind::ContextCompacted(_) => Body::ContextCompacted,
        event::Kind::Delta(_) => return None,
    })
}

fn text(text: String) -> Vec<Text> {
    if text.is_empty() { Vec::new() } else { vec![Text { text }] }
}

/// What a CLI gave as JSON, as it is; a text where it is none.
fn json(text: String) -> Box<RawValue> {
    let empty = || RawValue::from_string("{}".to_owned());
    let raw = match text.is_empty() {
        true => empty(),
        false => RawValue::from_string(text).or_else(|_| empty()),
    };
    raw.unwrap_or_else(|_| RawValue::NULL.to_owned())
}

fn present(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn positive(id: u64) -> Option<u64> {
    (id > 0).then_some(id)
}

#[cfg(test)]
mod tests {
    use contract::host::{Event, ToolResult, ToolUse};
    use serde_json::json;

    use super::*;

    fn shown(kind: Kind) -> Option<serde_json::Value> {
        let event =
            SessionEvent { turn: 2, at_us: 1_500_000, kind: Some(kind), ..SessionEvent::default() };
        TypedEvent::of(7, event).map(|event| serde_json::to_value(event).unwrap())
    }

    fn agent(kind: event::Kind, tool_use: u64, is_mcp: bool) -> Kind {
        Kind::Agent(AgentEvent {
            event: Some(Event { id: 3, parent: 0, kind: Some(kind) }),
            tool_use,
            is_mcp,
            ..AgentEvent::default()
        })
    }

    #[test]
    fn a_tool_use_and_its_result_are_paired_by_id() {
        let tool = ToolUse {
            name: "Bash".to_owned(),
            input_json: r#"{"command":"ls"}"#.to_owned(),
            ..ToolUse::default()
        };
        assert_eq!(
            shown(agent(event::Kind::ToolUse(tool), 0, false)).unwrap(),
            json!({ "id": 7, "type": "agent.tool_use", "name": "Bash", "input": { "command": "ls" }, "turn": 2,
                    "processed_at": "1970-01-01T00:00:01.500000+00:00" })
        );
        let result =
            ToolResult { content: "a\n".to_owned(), exit_code: Some(0), ..ToolResult::default() };
        assert_eq!(
            shown(agent(event::Kind::ToolResult(result.clone()), 6, false)).unwrap(),
            json!({ "id": 7, "type": "agent.tool_result", "tool_use_id": 6, "content": [{ "type": "text", "text": "a\n" }],
                    "is_error": false, "exit_code": 0, "turn": 2, "processed_at": "1970-01-01T00:00:01.500000+00:00" })
        );
        assert_eq!(
            shown(agent(event::Kind::ToolResult(result), 6, true)).unwrap()["mcp_tool_use_id"],
            6
        );
    }

    #[test]
    fn an_input_that_is_no_json_does_not_break_the_page() {
        let tool =
            ToolUse { name: "x".to_owned(), input_json: "{\"cut".to_owned(), ..ToolUse::default() };
        assert_eq!(shown(agent(event::Kind::ToolUse(tool), 0, false)).unwrap()["input"], json!({}));
    }

    #[test]
    fn the_end_of_a_turn_has_a_reason() {
        let idle = |ended| {
            shown(Kind::TurnEnded(ended)).unwrap()["stop_reason"]["type"]
                .as_str()
                .unwrap()
                .to_owned()
        };
        let ended = |exit_code, reason: StopReason| TurnEnded {
            exit_code,
            stop_reason: reason.into(),
            ..TurnEnded::default()
        };
        assert_eq!(idle(ended(Some(0), StopReason::Interrupted)), "interrupted");
        assert_eq!(idle(ended(Some(0), StopReason::Unspecified)), "end_turn");
        assert_eq!(idle(ended(None, StopReason::Unspecified)), "failed");
    }

    #[test]
    fn raw_output_is_left_to_the_stream() {
        assert!(
            shown(Kind::Output(session::Output::default())).is_none()
                && shown(Kind::TakenOver(session::TakenOver {})).is_none()
        );
    }
}
