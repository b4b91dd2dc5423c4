//! What a session's log shows as under `/v1`: one entry may show as several events. Pure.
//!
//! Some events depend on what came before them: which requests are open, and what earlier turns used. At the begin of a turn nothing is
//! open, so [`Thread`] is built from there ([`contract::rpc::FindTurn`]) and fed every entry that follows.

use std::collections::{BTreeMap, BTreeSet};

use contract::{
    host::{Evaluation, ModelUsage, agent_error::Retry, decision_settled::How, event, input_settled::Outcome},
    scheduler::{Agent, FindTurnReply},
    session::{self, AgentEvent, ModelRequestEnded, SessionEvent, StopReason, TurnEnded, session_event::Kind},
};
use prost::Message as _;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use types::{InputId, SessionId};

use crate::v1::{
    agents::Snapshot,
    ids::{EventId, Prefix},
    time,
};

/// Where each event stands among those of its entry, and the last part of its id. These never change: clients keep ids.
mod part {
    pub const MESSAGE: u8 = 0;
    pub const RUNNING: u8 = 1;
    pub const THREAD_RUNNING: u8 = 2;
    pub const SPAN_START: u8 = 3;
    pub const MAIN: u8 = 4;
    pub const SPAN_END: u8 = 5;
    /// Results of calls that the turn's end leaves open.
    pub const RESULTS: std::ops::RangeInclusive<u8> = 6..=248;
    pub const ERROR: u8 = 249;
    pub const THREAD_END: u8 = 250;
    pub const USAGE: u8 = 251;
    pub const END: u8 = 252;
}

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

/// A place in a session's log: an entry, and a part of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    pub entry: u64,
    pub part: u8,
}

impl Place {
    /// After all of an entry.
    pub const fn after(entry: u64) -> Self {
        Self { entry, part: u8::MAX }
    }
}

/// An event of the API.
#[derive(Clone, Debug)]
pub struct Shown {
    pub place: Place,
    pub id: String,
    pub kind: &'static str,
    /// Microseconds since the epoch.
    pub at_us: i64,
    pub body: Map<String, Value>,
}

impl Shown {
    /// Nothing follows it.
    pub fn is_last(&self) -> bool {
        matches!(self.kind, "session.status_terminated" | "session.deleted")
    }

    /// The id after which a stream resumes most easily: the event's own, or where it stands in the log.
    pub fn resume_id(&self) -> String {
        match EventId::decode(&self.id) {
            Some(EventId::Text { .. }) => EventId::Log { id: self.place.entry, part: self.place.part }.encode(),
            _ => self.id.clone(),
        }
    }

    pub fn into_json(self) -> Value {
        Value::Object(self.body)
    }
}

/// Tokens and money.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    input: u64,
    output: u64,
    cache_read: u64,
    cache_write: u64,
    cost_micro_usd: u64,
}

impl From<&session::Usage> for Totals {
    fn from(usage: &session::Usage) -> Self {
        Self {
            input: usage.input_tokens.unwrap_or_default(),
            output: usage.output_tokens.unwrap_or_default(),
            cache_read: usage.cache_read_tokens.unwrap_or_default(),
            cache_write: usage.cache_write_tokens.unwrap_or_default(),
            cost_micro_usd: usage.cost_micro_usd.unwrap_or_default(),
        }
    }
}

impl From<&ModelUsage> for Totals {
    fn from(usage: &ModelUsage) -> Self {
        Self {
            input: usage.input_tokens,
            output: usage.output_tokens,
            cache_read: usage.cache_read_tokens,
            cache_write: usage.cache_write_tokens,
            cost_micro_usd: 0,
        }
    }
}

impl Totals {
    fn plus(self, other: Self) -> Self {
        Self {
            input: self.input.saturating_add(other.input),
            output: self.output.saturating_add(other.output),
            cache_read: self.cache_read.saturating_add(other.cache_read),
            cache_write: self.cache_write.saturating_add(other.cache_write),
            cost_micro_usd: self.cost_micro_usd.saturating_add(other.cost_micro_usd),
        }
    }

    fn minus(self, other: Self) -> Self {
        Self {
            input: self.input.saturating_sub(other.input),
            output: self.output.saturating_sub(other.output),
            cache_read: self.cache_read.saturating_sub(other.cache_read),
            cache_write: self.cache_write.saturating_sub(other.cache_write),
            cost_micro_usd: self.cost_micro_usd.saturating_sub(other.cost_micro_usd),
        }
    }

    /// A session's `usage`.
    pub fn of_session(self) -> Value {
        let mut usage = json!({
            "input_tokens": self.input,
            "output_tokens": self.output,
            "cache_read_input_tokens": self.cache_read,
            "cache_creation": { "ephemeral_5m_input_tokens": self.cache_write, "ephemeral_1h_input_tokens": 0 },
        });
        if self.cost_micro_usd > 0 {
            // Whole cents, as text.
            let cents = self.cost_micro_usd.div_ceil(10_000).to_string();
            usage["list_cost"] = json!({ "amount": cents, "currency": "USD" });
        }
        usage
    }

    fn of_request(self) -> Value {
        json!({
            "input_tokens": self.input,
            "output_tokens": self.output,
            "cache_creation_input_tokens": self.cache_write,
            "cache_read_input_tokens": self.cache_read,
        })
    }
}

/// What the events so far leave open.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The turn that runs, or ran last.
    turn: u32,
    is_running: bool,
    /// Where the model request began that has not ended.
    span: Option<Place>,
    /// Tool uses without a result, and whether the tool is an MCP server's.
    tools: BTreeMap<u64, bool>,
    /// Tool uses that wait for a confirmation.
    asks: BTreeSet<u64>,
    /// Of requests that show their tool use themselves: the journal's id, and the entry.
    #[serde(default)]
    own: BTreeMap<u64, u64>,
    /// The agent said that it failed.
    has_failed: bool,
    /// What the turn's requests used, as far as they were reported one by one.
    reported: Totals,
    /// The log shows the turn's model requests: nothing else is taken for one.
    #[serde(default)]
    is_metered: bool,
    /// What ended turns used.
    usage: Totals,
}

/// A session's primary thread, up to some place of its log.
#[derive(Clone, Debug)]
pub struct Thread {
    id: String,
    agent_name: String,
    pub state: State,
}

/// The events of one entry.
struct Entry<'a> {
    id: u64,
    at_us: i64,
    shown: &'a mut Vec<Shown>,
}

impl Entry<'_> {
    fn add(&mut self, part: u8, kind: &'static str, body: Value) {
        let id = EventId::Log { id: self.id, part };
        self.add_as(id, part, kind, body);
    }

    fn add_as(&mut self, id: EventId, part: u8, kind: &'static str, body: Value) {
        let place = Place { entry: self.id, part };
        let at_us = self.at_us.saturating_add(i64::from(part));
        let mut event = Map::new();
        let id = id.encode();
        event.insert("id".to_owned(), id.clone().into());
        event.insert("type".to_owned(), kind.into());
        if let Value::Object(fields) = body {
            event.extend(fields);
        }
        event.insert("processed_at".to_owned(), time(at_us).into());
        self.shown.push(Shown { place, id, kind, at_us, body: event });
    }

    /// What a user sent has the id that its sender was told.
    fn add_sent(&mut self, input_id: &str, kind: &'static str, body: Value) {
        let id = input_id.parse().map_or(EventId::Log { id: self.id, part: part::MESSAGE }, EventId::Input);
        self.add_as(id, part::MESSAGE, kind, body);
    }
}

fn main_id(entry: u64) -> String {
    EventId::Log { id: entry, part: part::MAIN }.encode()
}

/// The id of the tool use that a permission request is about.
pub fn tool_use_of(request: u64) -> String {
    main_id(request)
}

/// The permission request that a tool use's id stands for.
pub fn request_of(tool_use_id: &str) -> Option<u64> {
    match EventId::decode(tool_use_id)? {
        EventId::Log { id, part: part::MAIN } => Some(id),
        _ => None,
    }
}

/// An event that was sent and is not in the log yet.
pub fn sent_id(input_id: &str) -> String {
    input_id.parse::<InputId>().map_or_else(|_| input_id.to_owned(), |id| EventId::Input(id).encode())
}

/// A decision of a time-out was sent by no one.
fn is_sent(input_id: &str) -> bool {
    !input_id.is_empty() && input_id.parse::<InputId>().is_ok_and(InputId::is_sent)
}

pub fn text(text: &str) -> Value {
    if text.is_empty() { json!([]) } else { json!([{ "type": "text", "text": text }]) }
}

/// What changed of a session.
fn changes(updated: &session::Updated) -> Value {
    let mut changes: Map<String, Value> = serde_json::from_str(&updated.changes).unwrap_or_default();
    if let Ok(agent) = Agent::decode(updated.agent.as_ref())
        && !updated.agent.is_empty()
    {
        changes.insert("agent".to_owned(), serde_json::to_value(Snapshot::from(&agent)).unwrap_or_default());
    }
    changes.into()
}

impl Thread {
    /// As it is where a turn begins.
    pub fn at(session: SessionId, found: &FindTurnReply) -> Self {
        let usage = found.usage_before.as_ref().map(Totals::from).unwrap_or_default();
        let state = State { usage, turn: found.turn.saturating_sub(1), ..State::default() };
        Self { id: Prefix::Thread.encode(session.uuid()), agent_name: found.agent_name.clone(), state }
    }

    /// Applies the next entry of the log, and appends what it shows as.
    pub fn apply(&mut self, id: u64, event: &SessionEvent, shown: &mut Vec<Shown>) {
        // Entries of earlier releases have no time.
        let at_us = if event.at_us > 0 { event.at_us } else { id.cast_signed() };
        let mut entry = Entry { id, at_us, shown };
        let entry = &mut entry;
        match &event.kind {
            Some(Kind::TurnStarted(started)) => {
                entry.add_sent(&started.input_id, "user.message", json!({ "content": text(&started.prompt) }));
                self.begin(event.turn, entry);
                self.state.is_metered = started.is_metered;
                self.begin_span(entry);
            }
            Some(Kind::ModelRequestStarted(_)) => entry.add(part::SPAN_START, "span.model_request_start", json!({})),
            Some(Kind::ModelRequestEnded(ended)) => end_of_request(ended, entry),
            Some(Kind::TurnEnded(ended)) => self.end(event.turn, ended, entry),
            Some(Kind::Terminated(_)) => self.terminate(entry),
            Some(Kind::Deleted(_)) => entry.add(part::END, "session.deleted", json!({})),
            Some(Kind::Updated(updated)) => entry.add(part::MAIN, "session.updated", changes(updated)),
            Some(Kind::Agent(agent)) => self.agent(agent, entry),
            Some(Kind::DecisionRequested(requested)) => {
                let request = requested.request.clone().unwrap_or_default();
                let mut tool_use = requested.tool_use;
                if request.is_custom_tool {
                    tool_use = id;
                    let input = serde_json::from_str::<Map<String, Value>>(&request.input_json).unwrap_or_default();
                    let body = json!({ "name": request.tool, "input": input, "session_thread_id": null });
                    entry.add(part::MAIN, "agent.custom_tool_use", body);
                } else if tool_use == 0 {
                    tool_use = id;
                    let tool = Tool { name: &request.tool, server: "", input: &request.input_json, evaluation: Evaluation::Ask };
                    self.use_tool(&tool, entry);
                    self.state.own.insert(request.id, id);
                }
                self.state.asks.insert(tool_use);
                self.wait(entry);
            }
            Some(Kind::DecisionSettled(settled)) => {
                let decision = settled.settled.clone().unwrap_or_default();
                let own = self.state.own.remove(&decision.id).filter(|_| settled.tool_use == 0);
                let tool_use = own.unwrap_or(settled.tool_use);
                if !self.state.asks.remove(&tool_use) {
                    return;
                }
                let result = match decision.how() {
                    How::Allowed => Some("allow"),
                    How::Denied => Some("deny"),
                    How::Withdrawn | How::Void | How::Unspecified => None,
                };
                if let Some(sent) = &settled.result {
                    let body = json!({
                        "custom_tool_use_id": main_id(tool_use),
                        "content": text(&sent.text),
                        "is_error": sent.is_error,
                    });
                    entry.add_sent(&decision.input_id, "user.custom_tool_result", body);
                } else if let Some(result) = result.filter(|_| is_sent(&decision.input_id)) {
                    let body = json!({ "tool_use_id": main_id(tool_use), "result": result });
                    entry.add_sent(&decision.input_id, "user.tool_confirmation", body);
                }
                match (self.state.asks.is_empty(), result) {
                    (false, _) => self.wait(entry),
                    (true, Some(_)) => self.go_on(entry),
                    // The turn ends, or the same is asked again.
                    (true, None) => {}
                }
            }
            Some(Kind::InputSettled(input)) => {
                let settled = input.settled.clone().unwrap_or_default();
                match (settled.outcome(), input.kind.as_str()) {
                    (Outcome::Applied, "message") => {
                        entry.add_sent(&settled.id, "user.message", json!({ "content": text(&input.text) }));
                    }
                    (Outcome::Applied, "interrupt") => entry.add_sent(&settled.id, "user.interrupt", json!({})),
                    _ => {}
                }
            }
            // Raw output, set-up and what is between ourselves have no place here.
            Some(
                Kind::Output(_)
                | Kind::OutputDropped(_)
                | Kind::Stage(_)
                | Kind::StageOutput(_)
                | Kind::TakenOver(_)
                | Kind::BudgetNotice(_),
            )
            | None => {}
        }
    }

    fn of_thread(&self, more: Value) -> Value {
        let mut body = json!({ "session_thread_id": self.id, "agent_name": self.agent_name });
        if let (Value::Object(body), Value::Object(more)) = (&mut body, more) {
            body.extend(more);
        }
        body
    }

    fn begin(&mut self, turn: u32, entry: &mut Entry<'_>) {
        let usage = self.state.usage;
        self.state = State { turn, usage, ..State::default() };
        self.go_on(entry);
    }

    fn go_on(&mut self, entry: &mut Entry<'_>) {
        self.state.is_running = true;
        entry.add(part::RUNNING, "session.status_running", json!({}));
        entry.add(part::THREAD_RUNNING, "session.thread_status_running", self.of_thread(json!({})));
    }

    /// The agent waits for its user.
    fn wait(&mut self, entry: &mut Entry<'_>) {
        let ids: Vec<String> = self.state.asks.iter().map(|ask| main_id(*ask)).collect();
        self.idle(&json!({ "type": "requires_action", "event_ids": ids }), &Value::Null, entry);
    }

    fn idle(&mut self, reason: &Value, details: &Value, entry: &mut Entry<'_>) {
        let stop = json!({ "stop_reason": reason, "stop_details": details });
        entry.add(part::THREAD_END, "session.thread_status_idle", self.of_thread(stop.clone()));
        entry.add(part::USAGE, "session.usage", json!({ "usage": self.state.usage.of_session(), "budget": null }));
        entry.add(part::END, "session.status_idle", stop);
    }

    fn begin_span(&mut self, entry: &mut Entry<'_>) {
        if self.state.is_running && self.state.span.is_none() && !self.state.is_metered {
            entry.add(part::SPAN_START, "span.model_request_start", json!({}));
            self.state.span = Some(Place { entry: entry.id, part: part::SPAN_START });
        }
    }

    fn end_span(&mut self, usage: Totals, is_error: bool, entry: &mut Entry<'_>) {
        let Some(Place { entry: id, part }) = self.state.span.take() else { return };
        let start = EventId::Log { id, part }.encode();
        let body = json!({ "model_request_start_id": start, "is_error": is_error, "model_usage": usage.of_request() });
        entry.add(part::SPAN_END, "span.model_request_end", body);
    }

    fn end(&mut self, turn: u32, ended: &TurnEnded, entry: &mut Entry<'_>) {
        if !self.state.is_running || self.state.turn != turn {
            // It ended before its agent began.
            if let Some(unstarted) = &ended.unstarted {
                entry.add_sent(&unstarted.input_id, "user.message", json!({ "content": text(&unstarted.prompt) }));
            }
            self.begin(turn, entry);
        }
        let reason = ended.stop_reason();
        let is_stop = matches!(reason, StopReason::Interrupted | StopReason::Refused | StopReason::Budget);
        let has_failed = reason == StopReason::Limit || (ended.exit_code != Some(0) && !is_stop);
        let usage = ended.usage.as_ref().map(Totals::from).unwrap_or_default();
        self.end_span(usage.minus(self.state.reported), has_failed, entry);
        let open = std::mem::take(&mut self.state.tools);
        for (part, (tool_use, is_mcp)) in part::RESULTS.zip(open) {
            let content = text(if reason == StopReason::Interrupted { "interrupted" } else { "the turn ended" });
            result(tool_use, is_mcp, &content, true, part, entry);
        }
        let is_terminal = rules::state::leaves_nothing(ended);
        if has_failed && (is_terminal || !self.state.has_failed) {
            let message = ended.failure.as_ref().map_or("The agent failed", |failure| failure.message.as_str());
            let kind = if reason == StopReason::Limit { "tool_use_limit_reached_error" } else { "unknown_error" };
            let retry = if is_terminal { "terminal" } else { "exhausted" };
            entry.add(part::ERROR, "session.error", error(kind, message, retry));
        }
        let usage = self.state.usage.plus(usage);
        self.state = State { turn, usage, ..State::default() };
        if is_terminal {
            self.terminate(entry);
            return;
        }
        let (reason, details) = match reason {
            StopReason::Budget => ("budget_reached", Value::Null),
            StopReason::Refused => ("refusal", json!({ "type": "refusal", "category": null, "explanation": null })),
            _ if has_failed => ("retries_exhausted", Value::Null),
            _ => ("end_turn", Value::Null),
        };
        self.idle(&json!({ "type": reason }), &details, entry);
    }

    fn terminate(&mut self, entry: &mut Entry<'_>) {
        let State { turn, usage, .. } = self.state;
        self.state = State { turn, usage, ..State::default() };
        entry.add(part::THREAD_END, "session.thread_status_terminated", self.of_thread(json!({})));
        entry.add(part::END, "session.status_terminated", json!({}));
    }

    fn agent(&mut self, agent: &AgentEvent, entry: &mut Entry<'_>) {
        let Some(kind) = agent.event.as_ref().and_then(|event| event.kind.as_ref()) else { return };
        match kind {
            event::Kind::Message(message) if message.text.is_empty() => {}
            event::Kind::Message(message) => {
                self.begin_span(entry);
                let id = self.text_id(agent, entry);
                entry.add_as(id, part::MAIN, "agent.message", json!({ "content": text(&message.text) }));
            }
            event::Kind::Thinking(_) => {
                self.begin_span(entry);
                let id = self.text_id(agent, entry);
                entry.add_as(id, part::MAIN, "agent.thinking", json!({}));
            }
            event::Kind::ToolUse(tool) => {
                self.begin_span(entry);
                let (server, evaluation) = (tool.mcp_server.as_str(), tool.evaluation());
                self.use_tool(&Tool { name: &tool.name, server, input: &tool.input_json, evaluation }, entry);
            }
            event::Kind::ToolResult(outcome) => {
                if self.state.tools.remove(&agent.tool_use).is_some() {
                    result(agent.tool_use, agent.is_mcp, &text(&outcome.content), outcome.is_error, part::MAIN, entry);
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
                entry.add(part::ERROR, "session.error", error(&failed.kind, &failed.message, retry));
            }
            event::Kind::ContextCompacted(_) => entry.add(part::MAIN, "agent.thread_context_compacted", json!({})),
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

    /// The turn that runs, if one does.
    pub fn running_turn(&self) -> Option<u32> {
        self.state.is_running.then_some(self.state.turn)
    }

    fn use_tool(&mut self, tool: &Tool<'_>, entry: &mut Entry<'_>) {
        let input = serde_json::from_str::<Map<String, Value>>(tool.input).unwrap_or_default();
        let (permission, evaluation) = match tool.evaluation {
            Evaluation::Ask => ("ask", "always_ask"),
            Evaluation::Deny => ("deny", "always_ask"),
            Evaluation::Allow | Evaluation::Unspecified => ("allow", "always_allow"),
        };
        let common = json!({ "evaluated_permission": permission, "evaluation": { "type": evaluation }, "session_thread_id": null });
        let is_mcp = !tool.server.is_empty();
        let (kind, mut body) = match is_mcp {
            true => {
                let name = bare_name(tool.server, tool.name);
                ("agent.mcp_tool_use", json!({ "mcp_server_name": tool.server, "name": name, "input": input }))
            }
            false => ("agent.tool_use", json!({ "name": tool_name(tool.name), "input": input })),
        };
        if let (Value::Object(body), Value::Object(common)) = (&mut body, common) {
            body.extend(common);
        }
        self.state.tools.insert(entry.id, is_mcp);
        entry.add(part::MAIN, kind, body);
    }
}

/// A start that is not in the log has no end either.
fn end_of_request(ended: &ModelRequestEnded, entry: &mut Entry<'_>) {
    if ended.started == 0 {
        return;
    }
    let start = EventId::Log { id: ended.started, part: part::SPAN_START }.encode();
    let mut usage = ended.usage.as_ref().map(Totals::from).unwrap_or_default();
    usage.input = usage.input.saturating_sub(usage.cache_read.saturating_add(usage.cache_write));
    let body = json!({ "model_request_start_id": start, "is_error": !ended.error.is_empty(), "model_usage": usage.of_request() });
    entry.add(part::SPAN_END, "span.model_request_end", body);
}

struct Tool<'a> {
    name: &'a str,
    server: &'a str,
    input: &'a str,
    evaluation: Evaluation,
}

fn result(tool_use: u64, is_mcp: bool, content: &Value, is_error: bool, part: u8, entry: &mut Entry<'_>) {
    let (kind, field) = match is_mcp {
        true => ("agent.mcp_tool_result", "mcp_tool_use_id"),
        false => ("agent.tool_result", "tool_use_id"),
    };
    entry.add(part, kind, json!({ field: main_id(tool_use), "content": content, "is_error": is_error }));
}

fn error(kind: &str, message: &str, retry: &str) -> Value {
    let kind = if ERRORS.contains(&kind) { kind } else { "unknown_error" };
    json!({ "error": { "type": kind, "message": message, "retry_status": { "type": retry } } })
}

/// Each CLI has a way of its own to name a server's tools.
fn bare_name<'a>(server: &str, name: &'a str) -> &'a str {
    let prefixes = [format!("mcp__{server}__"), format!("mcp_{server}_"), format!("{server}_")];
    prefixes.iter().find_map(|prefix| name.strip_prefix(prefix.as_str())).unwrap_or(name)
}

/// The API's name of a tool that the CLIs have under names of their own; other tools keep theirs.
fn tool_name(name: &str) -> &str {
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

#[cfg(test)]
mod tests {
    use contract::{
        host::{AgentMessage, CustomToolResult, DecisionRequested, DecisionSettled, Event, InputSettled, Thinking, ToolResult, ToolUse},
        session::TurnStarted,
    };
    use proptest::prelude::*;

    use super::*;

    fn thread() -> Thread {
        Thread::at(SessionId::new(), &FindTurnReply { turn: 1, agent_name: "a".to_owned(), ..FindTurnReply::default() })
    }

    fn agent(kind: event::Kind, tool_use: u64) -> Kind {
        Kind::Agent(AgentEvent { event: Some(Event { id: 1, parent: 0, kind: Some(kind) }), tool_use, ..AgentEvent::default() })
    }

    fn started() -> Kind {
        Kind::TurnStarted(TurnStarted { prompt: "hi".to_owned(), ..TurnStarted::default() })
    }

    fn tool(evaluation: Evaluation) -> Kind {
        agent(event::Kind::ToolUse(ToolUse { name: "Bash".to_owned(), evaluation: evaluation.into(), ..ToolUse::default() }), 0)
    }

    fn said(text: &str) -> Kind {
        agent(event::Kind::Message(AgentMessage { text: text.to_owned(), ..AgentMessage::default() }), 0)
    }

    fn ended(exit_code: i32, reason: StopReason) -> Kind {
        let usage = Some(session::Usage { input_tokens: Some(9), output_tokens: Some(4), ..session::Usage::default() });
        Kind::TurnEnded(TurnEnded { exit_code: Some(exit_code), stop_reason: reason.into(), usage, ..TurnEnded::default() })
    }

    fn asked(tool_use: u64) -> Kind {
        Kind::DecisionRequested(session::DecisionRequested { request: Some(DecisionRequested::default()), tool_use })
    }

    fn decided(tool_use: u64, input: InputId) -> Kind {
        let settled = DecisionSettled { how: How::Allowed.into(), input_id: input.to_string(), ..DecisionSettled::default() };
        Kind::DecisionSettled(session::DecisionSettled { settled: Some(settled), tool_use, ..session::DecisionSettled::default() })
    }

    /// Entries 10, 11, … of turn 1, a millisecond apart.
    fn play(thread: &mut Thread, kinds: Vec<Kind>) -> Vec<Shown> {
        let mut shown = Vec::new();
        for (index, kind) in kinds.into_iter().enumerate() {
            let at_us = 1_000_000 + 1000 * index as i64;
            thread.apply(10 + index as u64, &SessionEvent { turn: 1, at_us, kind: Some(kind), ..SessionEvent::default() }, &mut shown);
        }
        shown
    }

    fn kinds(shown: &[Shown]) -> Vec<&'static str> {
        shown.iter().map(|event| event.kind).collect()
    }

    #[test]
    fn a_plain_turn_shows_in_the_order_of_the_reference() {
        let shown = play(&mut thread(), vec![started(), said("Hi."), ended(0, StopReason::EndTurn)]);
        assert_eq!(
            kinds(&shown),
            [
                "user.message",
                "session.status_running",
                "session.thread_status_running",
                "span.model_request_start",
                "agent.message",
                "span.model_request_end",
                "session.thread_status_idle",
                "session.usage",
                "session.status_idle"
            ]
        );
        assert_eq!(shown[5].body["model_request_start_id"], shown[3].id);
        assert_eq!(shown[5].body["model_usage"]["output_tokens"], 4);
        assert_eq!(shown[7].body["usage"]["input_tokens"], 9);
        assert_eq!(shown[8].body["stop_reason"], json!({ "type": "end_turn" }));
    }

    #[test]
    fn a_text_that_was_shown_while_it_was_written_has_the_id_that_was_shown() {
        let written = |kind, text| match agent(kind, 0) {
            Kind::Agent(event) => Kind::Agent(AgentEvent { text, ..event }),
            other => other,
        };
        let message = event::Kind::Message(AgentMessage { text: "Hi.".to_owned(), ..AgentMessage::default() });
        let thought = event::Kind::Thinking(Thinking::default());
        let shown = play(&mut thread(), vec![started(), written(thought, 4), written(message, 5), said("whole")]);
        let [.., thought, message, whole] = &shown[..] else { unreachable!() };
        assert_eq!(thought.id, EventId::Text { turn: 1, text: 4 }.encode());
        assert_eq!((message.kind, &message.id), ("agent.message", &EventId::Text { turn: 1, text: 5 }.encode()));
        assert_eq!(message.resume_id(), main_id(12));
        assert_eq!((whole.id.as_str(), whole.resume_id()), (main_id(13).as_str(), main_id(13)));
    }

    #[test]
    fn usage_adds_up_over_turns() {
        let mut thread = thread();
        play(&mut thread, vec![started(), ended(0, StopReason::EndTurn)]);
        let shown = play(&mut thread, vec![started(), ended(0, StopReason::EndTurn)]);
        let usage = shown.iter().find(|event| event.kind == "session.usage").unwrap();
        assert_eq!(usage.body["usage"]["output_tokens"], 8);
    }

    #[test]
    fn two_asks_are_answered_one_after_the_other() {
        let input = InputId::new();
        let shown = play(
            &mut thread(),
            vec![
                started(),
                tool(Evaluation::Ask),
                tool(Evaluation::Ask),
                asked(11),
                asked(12),
                decided(11, input),
                decided(12, InputId::new()),
            ],
        );
        let idle: Vec<_> = shown.iter().filter(|event| event.kind == "session.status_idle").collect();
        let ids = |index: usize| idle[index].body["stop_reason"]["event_ids"].clone();
        let (one, two) = (main_id(11), main_id(12));
        assert_eq!([ids(0), ids(1), ids(2)], [json!([one]), json!([one, two]), json!([two])]);
        let confirmation = shown.iter().find(|event| event.kind == "user.tool_confirmation").unwrap();
        assert_eq!((confirmation.id.as_str(), &confirmation.body["tool_use_id"]), (sent_id(&input.to_string()).as_str(), &json!(one)));
        assert_eq!(shown.last().unwrap().kind, "session.thread_status_running");
        let used = shown.iter().find(|event| event.kind == "agent.tool_use").unwrap();
        assert_eq!((&used.body["name"], &used.body["evaluated_permission"]), (&json!("bash"), &json!("ask")));
        assert_eq!(request_of(&used.id), Some(11));
    }

    #[test]
    fn a_request_without_a_tool_use_is_settled_by_the_id_that_the_host_gave_it() {
        let asked = |id| {
            let request = Some(DecisionRequested { id, ..DecisionRequested::default() });
            Kind::DecisionRequested(session::DecisionRequested { request, tool_use: 0 })
        };
        let settled = |id, input: InputId| {
            let settled = Some(DecisionSettled { id, how: How::Denied.into(), input_id: input.to_string() });
            Kind::DecisionSettled(session::DecisionSettled { settled, ..session::DecisionSettled::default() })
        };
        let entries = vec![started(), asked(5), asked(6), settled(6, InputId::new()), settled(5, InputId::of_timeout())];
        let shown = play(&mut thread(), entries);
        let used = shown.iter().filter(|event| event.kind == "agent.tool_use").map(|event| &event.id).collect::<Vec<_>>();
        let after: Vec<_> = shown.iter().filter(|event| event.place.entry >= 13).collect();
        assert_eq!((after[0].kind, &after[0].body["tool_use_id"]), ("user.tool_confirmation", &json!(used[1])));
        assert_eq!(after[3].body["stop_reason"]["event_ids"], json!([used[0]]));
        // No one sent the decision of a time-out.
        let last: Vec<_> = after.iter().filter(|event| event.place.entry == 14).map(|event| event.kind).collect();
        assert_eq!(last, ["session.status_running", "session.thread_status_running"]);
    }

    #[test]
    fn a_custom_tool_waits_for_its_result() {
        let request = DecisionRequested { id: 5, tool: "ask".to_owned(), is_custom_tool: true, ..DecisionRequested::default() };
        let asked = Kind::DecisionRequested(session::DecisionRequested { request: Some(request), tool_use: 0 });
        let input = InputId::new();
        let settled = DecisionSettled { how: How::Allowed.into(), input_id: input.to_string(), ..DecisionSettled::default() };
        let result = Some(CustomToolResult { text: "42".to_owned(), ..CustomToolResult::default() });
        let settled = Kind::DecisionSettled(session::DecisionSettled { settled: Some(settled), tool_use: 11, result });
        let shown = play(&mut thread(), vec![started(), asked, settled, said("Thanks."), ended(0, StopReason::EndTurn)]);
        let of = |kind: &str| shown.iter().find(|event| event.kind == kind).unwrap();
        let used = of("agent.custom_tool_use");
        assert_eq!(request_of(&used.id), Some(11));
        assert_eq!(of("session.status_idle").body["stop_reason"], json!({ "type": "requires_action", "event_ids": [used.id] }));
        let result = of("user.custom_tool_result");
        assert_eq!((&result.id, &result.body["custom_tool_use_id"]), (&sent_id(&input.to_string()), &json!(used.id)));
        assert_eq!(result.body["content"], text("42"));
        let after: Vec<_> = kinds(&shown).into_iter().skip_while(|kind| *kind != "user.custom_tool_result").take(4).collect();
        assert_eq!(after, ["user.custom_tool_result", "session.status_running", "session.thread_status_running", "agent.message"]);
        assert!(!shown.iter().any(|event| event.kind == "agent.tool_result"));
    }

    #[test]
    fn an_interrupt_closes_open_calls_and_spans() {
        let input = InputId::new();
        let settled = InputSettled { id: input.to_string(), outcome: Outcome::Applied.into(), ..InputSettled::default() };
        let interrupt = session::InputSettled { settled: Some(settled), kind: "interrupt".to_owned(), ..session::InputSettled::default() };
        let entries = vec![started(), tool(Evaluation::Allow), Kind::InputSettled(interrupt), ended(0, StopReason::Interrupted)];
        let shown = play(&mut thread(), entries);
        let result = shown.iter().find(|event| event.kind == "agent.tool_result").unwrap();
        assert_eq!((&result.body["is_error"], &result.body["tool_use_id"]), (&json!(true), &json!(main_id(11))));
        assert!(shown.iter().any(|event| event.kind == "user.interrupt" && event.id == sent_id(&input.to_string())));
        assert_eq!(shown.last().unwrap().body["stop_reason"]["type"], "end_turn");
    }

    #[test]
    fn a_failed_turn_says_why_and_leaves_the_session_idle() {
        let shown = play(&mut thread(), vec![started(), ended(1, StopReason::EndTurn)]);
        let error = shown.iter().find(|event| event.kind == "session.error").unwrap();
        assert_eq!(error.body["error"]["retry_status"]["type"], "exhausted");
        assert_eq!(shown.last().unwrap().body["stop_reason"]["type"], "retries_exhausted");
    }

    #[test]
    fn a_set_up_that_failed_shows_the_message_and_terminates() {
        let failure = Some(session::Failure { stage: "provision_setup".to_owned(), message: "no".to_owned() });
        let input = InputId::new();
        let unstarted = Some(TurnStarted { prompt: "hi".to_owned(), input_id: input.to_string(), ..TurnStarted::default() });
        let shown = play(&mut thread(), vec![Kind::TurnEnded(TurnEnded { failure, unstarted, ..TurnEnded::default() })]);
        assert_eq!(kinds(&shown)[..3], ["user.message", "session.status_running", "session.thread_status_running"]);
        assert_eq!((shown[0].id.as_str(), &shown[0].body["content"][0]["text"]), (sent_id(&input.to_string()).as_str(), &json!("hi")));
        assert!(shown.last().unwrap().is_last());
    }

    fn any_kind() -> impl Strategy<Value = Kind> {
        let result = |id| agent(event::Kind::ToolResult(ToolResult::default()), id);
        prop_oneof![
            Just(started()),
            Just(said("x")),
            Just(tool(Evaluation::Ask)),
            (10_u64..40).prop_map(result),
            (10_u64..40).prop_map(asked),
            (10_u64..40).prop_map(|id| decided(id, InputId::new())),
            Just(ended(0, StopReason::EndTurn)),
            Just(ended(1, StopReason::Unspecified)),
            Just(ended(0, StopReason::Interrupted)),
            Just(agent(event::Kind::ModelRequestEnded(contract::host::ModelRequestEnded::default()), 0)),
        ]
    }

    #[test]
    fn requests_that_the_model_gateway_counted_are_the_spans_and_no_others() {
        let started = TurnStarted { prompt: "hi".to_owned(), is_metered: true, ..TurnStarted::default() };
        let request = |number: u64| format!("request-{number}");
        let begun = |number| Kind::ModelRequestStarted(session::ModelRequestStarted { request_id: request(number), ..Default::default() });
        let usage = session::Usage { input_tokens: Some(12), output_tokens: Some(5), cache_read_tokens: Some(2), ..Default::default() };
        let ended = |started| Kind::ModelRequestEnded(ModelRequestEnded { started, usage: Some(usage.clone()), ..Default::default() });
        let end = TurnEnded { stop_reason: StopReason::Budget.into(), exit_code: Some(1), ..TurnEnded::default() };
        let kinds = [Kind::TurnStarted(started), begun(1), begun(2), ended(3), ended(2), Kind::TurnEnded(end)];
        let (mut thread, mut shown) = (Thread::at(SessionId::new(), &FindTurnReply::default()), Vec::new());
        for (id, kind) in (1..).zip(kinds) {
            thread.apply(id, &SessionEvent { turn: 1, kind: Some(kind), ..SessionEvent::default() }, &mut shown);
        }
        let of = |kind: &str| shown.iter().filter(|event| event.kind == kind).collect::<Vec<_>>();
        let starts = of("span.model_request_start");
        let ends = of("span.model_request_end");
        assert_eq!((starts.len(), ends.len()), (2, 2));
        assert_eq!(ends[0].body["model_request_start_id"], starts[1].id.as_str());
        assert_eq!(ends[1].body["model_request_start_id"], starts[0].id.as_str());
        let counts = json!({ "input_tokens": 10, "output_tokens": 5, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 2 });
        assert_eq!(ends[0].body["model_usage"], counts);
        assert_eq!(of("session.status_idle")[0].body["stop_reason"]["type"], "budget_reached");
        assert!(of("session.error").is_empty());
    }

    proptest! {
        /// Ids differ, times and places ascend, results follow their uses, and a thread that is resumed from a kept state shows the same.
        #[test]
        fn random_logs_show_in_order(entries in proptest::collection::vec(any_kind(), 0..30), cut in 0_usize..30) {
            let mut thread = thread();
            let (mut shown, mut resumed) = (Vec::new(), None::<(Thread, Vec<Shown>)>);
            let mut at_us = 0;
            for (index, kind) in entries.iter().enumerate() {
                if index == cut {
                    let kept = serde_json::from_str(&serde_json::to_string(&thread.state).unwrap()).unwrap();
                    resumed = Some((Thread { state: kept, ..thread.clone() }, Vec::new()));
                }
                let event = SessionEvent { turn: 1, at_us: at_us + 1, kind: Some(kind.clone()), ..SessionEvent::default() };
                at_us += rules::chain::step(Some(kind));
                let id = 10 + index as u64;
                thread.apply(id, &event, &mut shown);
                if let Some((resumed, again)) = &mut resumed {
                    resumed.apply(id, &event, again);
                }
            }
            if let Some((_, again)) = resumed {
                let rest: Vec<_> = shown[shown.len() - again.len()..].iter().map(|event| &event.body).collect();
                prop_assert_eq!(rest, again.iter().map(|event| &event.body).collect::<Vec<_>>());
            }
            let ids: BTreeSet<_> = shown.iter().map(|event| &event.id).collect();
            prop_assert_eq!(ids.len(), shown.len());
            prop_assert!(shown.iter().all(|event| TYPES.contains(&event.kind)));
            prop_assert!(shown.windows(2).all(|pair| pair[0].place < pair[1].place && pair[0].at_us < pair[1].at_us));
            for event in shown.iter().filter(|event| event.kind == "agent.tool_result") {
                let used = shown.iter().find(|used| event.body["tool_use_id"] == used.id).unwrap();
                prop_assert!(used.place < event.place && used.kind == "agent.tool_use");
            }
        }
    }
}
