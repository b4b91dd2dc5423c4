//! What the CLI writes: lines for the adapter, and the events that come of them.

use std::collections::VecDeque;

use contract::host::{
    DecisionRequested, Evaluation, Event, Output, ToolUse, decision::Verdict, event,
    input_settled::Outcome, output::Stream, record, turn_ended::Reason,
};
use prost::Message as _;

use super::{Action, Core, Open, Program, REQUEST_BYTES_MAX, REQUESTS_MAX};
use crate::{
    adapters::{Ask, Effect, Out, Stdio, mcp_failed},
    custom_tools, http, permissions,
};

const LINE_BYTES_MAX: usize = 32 << 20;
const TEXT_BYTES_MAX: usize = 256 << 10;
/// Of one record of output.
const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// Of one event: a frame holds more.
const EVENT_BYTES_MAX: usize = 2 << 20;
/// Of the diffs of one tool result.
const DIFF_BYTES_MAX: usize = 1 << 20;
const CALLS_MAX: usize = 10_000;
const FAILED_MCP_MAX: usize = 100;
const EARLY_MAX: usize = 100;

impl Core {
    pub fn output(&mut self, stream: Stream, data: Vec<u8>, now: u64) {
        if data.is_empty() {
            return;
        }
        let is_protocol = stream == Stream::Stdout && self.stdio == Stdio::Protocol;
        let copy = if is_protocol { data.clone() } else { Vec::new() };
        self.record(record::Kind::Output(Output { stream: stream.into(), data: data.into() }));
        for part in copy.split_inclusive(|byte| *byte == b'\n') {
            if self.line.len() + part.len() > LINE_BYTES_MAX {
                self.line_is_too_long = true;
                self.line.clear();
            }
            if !self.line_is_too_long {
                self.line.extend_from_slice(part);
            }
            if part.ends_with(b"\n") {
                self.flush_line(now);
            }
        }
    }

    pub(super) fn flush_line(&mut self, now: u64) {
        let line = std::mem::take(&mut self.line);
        if !std::mem::take(&mut self.line_is_too_long) {
            let line = line.strip_suffix(b"\n").unwrap_or(&line);
            let mut out = Out::default();
            if !line.is_empty() {
                self.adapter.line(line, &mut out);
            }
            self.apply(out, now);
        }
    }

    pub fn http(&mut self, reply: &http::Reply, now: u64) {
        if let http::Reply::Event { data, .. } = reply {
            let line = [data.as_bytes(), b"\n"].concat();
            for part in line.chunks(OUTPUT_BYTES_MAX) {
                self.record(record::Kind::Output(Output {
                    stream: Stream::Stdout.into(),
                    data: part.to_vec().into(),
                }));
            }
        }
        let mut out = Out::default();
        self.adapter.http(reply, &mut out);
        self.apply(out, now);
    }

    /// An MCP server did not start: the CLI does not say so.
    pub fn mcp_failed(&mut self, server: &str) {
        // Some CLIs start each server more than once.
        if !self.failed_mcp.iter().any(|failed| failed == server)
            && self.failed_mcp.len() < FAILED_MCP_MAX
        {
            self.failed_mcp.push(server.to_owned());
            self.event(None, mcp_failed(server, "", false));
        }
    }

    pub(super) fn apply(&mut self, out: Out, now: u64) {
        let mut effects: VecDeque<Effect> = out.0.into();
        while let Some(effect) = effects.pop_front() {
            let mut more = Out::default();
            self.apply_one(effect, now, &mut more);
            // What an answer causes comes before what was said after the question.
            more.0.into_iter().rev().for_each(|effect| effects.push_front(effect));
        }
        self.advance(now);
    }

    fn apply_one(&mut self, effect: Effect, now: u64, more: &mut Out) {
        match effect {
            Effect::Ready => {
                if let Program::Cli { ready } = &mut self.program {
                    *ready = true;
                    self.ready_by = None;
                    if self.turn.is_none() {
                        self.settle_start(Outcome::Applied, "");
                        self.rest(now);
                    } else if self
                        .turn
                        .as_ref()
                        .is_some_and(|turn| !turn.delivered && turn.ending.is_none())
                    {
                        self.deliver(now);
                    } else if self.turn.as_ref().is_some_and(|turn| !turn.delivered) {
                        self.end_turn(Reason::Interrupted, None, String::new(), None, now);
                    }
                }
            }
            Effect::Conversation { id, model } => {
                let resumed = self.state.conversation_id == id;
                let kind = event::Kind::ConversationStarted(contract::host::ConversationStarted {
                    conversation_id: id,
                    model,
                    resumed,
                });
                self.event(None, kind);
            }
            Effect::Send(line) => {
                self.actions.push(Action::Send([line.as_bytes(), b"\n"].concat()))
            }
            Effect::Http(request) => self.actions.push(Action::Http(request)),
            Effect::Event { parent, kind } => {
                if self.spec.partial_messages || !matches!(kind, event::Kind::Delta(_)) {
                    self.event(parent.as_deref(), kind);
                }
            }
            Effect::ToolUse { parent, tool } => self.tool_use(parent.as_deref(), tool),
            Effect::ToolResult { call, .. } if self.hidden.remove(&call) => {}
            Effect::ToolResult { call, mut result } => {
                result.tool_use = self.calls.get(&call).copied().unwrap_or_default();
                result.content = shorten(result.content);
                let mut room = DIFF_BYTES_MAX;
                for change in &mut result.changes {
                    if change.diff.len() > room {
                        change.diff = format!("[{} bytes left out]", change.diff.len());
                    }
                    room = room.saturating_sub(change.diff.len());
                }
                self.event(None, event::Kind::ToolResult(result));
            }
            Effect::Unusable => self.end_cli(now),
            Effect::Ask(ask) => self.ask(ask, now, more),
            Effect::Unask { key } => {
                self.withdraw(|open| !open.is_custom_tool && open.key == key, now);
            }
            Effect::TurnEnded { reason, message, usage } => {
                if self.turn.as_ref().is_some_and(|turn| turn.delivered) {
                    self.end_turn(reason, None, message, usage, now);
                }
            }
        }
    }

    /// What a CLI said while no turn ran.
    pub(super) fn tell_early(&mut self) {
        for kind in std::mem::take(&mut self.early) {
            self.event(None, kind);
        }
    }

    fn event(&mut self, parent: Option<&str>, kind: event::Kind) {
        let kind = match kind {
            event::Kind::Message(mut message) => {
                message.text = shorten(message.text);
                event::Kind::Message(message)
            }
            event::Kind::Thinking(mut thinking) => {
                thinking.text = shorten(thinking.text);
                event::Kind::Thinking(thinking)
            }
            event::Kind::Error(mut error) => {
                error.message = shorten(error.message);
                event::Kind::Error(error)
            }
            event::Kind::Plan(mut plan) => {
                plan.entries.iter_mut().for_each(|entry| {
                    entry.text = shorten_to(std::mem::take(&mut entry.text), REQUEST_BYTES_MAX)
                });
                event::Kind::Plan(plan)
            }
            other => other,
        };
        // An MCP server may fail after the end of the turn that began without it. Other errors
        // between turns are of the turn that ended. A conversation that is opened before its first
        // message begins with that: the CLIs do not keep one that is empty.
        let is_of_next = match &kind {
            event::Kind::Error(error) => error.kind.starts_with("mcp_"),
            event::Kind::ConversationStarted(_) => true,
            _ => false,
        };
        if is_of_next && !self.is_working() {
            if self.early.len() < EARLY_MAX {
                self.early.push(kind);
            }
            return;
        }
        let parent = parent.and_then(|call| self.calls.get(call)).copied().unwrap_or_default();
        let mut event = Event { id: self.next_event_id(), parent, kind: Some(kind) };
        let bytes = event.encoded_len();
        if bytes > EVENT_BYTES_MAX {
            // The raw output has it.
            let message = format!("an event of {bytes} bytes was left out");
            event.kind = Some(event::Kind::Error(contract::host::AgentError {
                kind: "unknown_error".to_owned(),
                message,
                ..Default::default()
            }));
        }
        self.record(record::Kind::Event(event));
    }

    /// Puts a tool use into the journal, once for each call.
    fn tool_use(&mut self, parent: Option<&str>, mut tool: ToolUse) {
        if self.is_custom_tool(&tool.mcp_server, &tool.name) {
            if self.hidden.len() < CALLS_MAX {
                self.hidden.insert(tool.call_id);
            }
            return;
        }
        if self.calls.contains_key(&tool.call_id) {
            return;
        }
        if self.calls.len() < CALLS_MAX {
            self.calls.insert(tool.call_id.clone(), self.next_event_id());
        }
        tool.evaluation = self.evaluate(&tool.name, &tool.input_json).into();
        tool.input_json = shorten_json(tool.input_json, TEXT_BYTES_MAX);
        self.event(parent, event::Kind::ToolUse(tool));
    }

    /// Whether a tool is one of the host's own MCP server.
    fn is_custom_tool(&self, server: &str, name: &str) -> bool {
        !self.spec.custom_tools.is_empty()
            && (server == custom_tools::SERVER || name.contains(custom_tools::PREFIX))
    }

    fn evaluate(&self, tool: &str, input_json: &str) -> Evaluation {
        if self.allowed.iter().any(|allowed| allowed == tool) {
            return Evaluation::Allow;
        }
        let Some(permissions) = &self.spec.permissions else { return Evaluation::Allow };
        match permissions::evaluate(permissions, tool, input_json) {
            Evaluation::Unspecified => Evaluation::Allow,
            evaluation => evaluation,
        }
    }

    fn ask(&mut self, ask: Ask, now: u64, more: &mut Out) {
        if self.is_custom_tool(&ask.mcp_server, &ask.tool) {
            if self.hidden.len() < CALLS_MAX {
                self.hidden.insert(ask.call);
            }
            // Its user decides by the result.
            return self.adapter.decide(&ask.key, Verdict::Allow, "", more);
        }
        let tool = ToolUse {
            name: ask.tool.clone(),
            mcp_server: ask.mcp_server,
            input_json: ask.input_json.clone(),
            call_id: ask.call.clone(),
            evaluation: 0,
        };
        self.tool_use(None, tool);
        let id = self.calls.get(&ask.call).copied().unwrap_or(self.state.last_event_id);
        let ending = self.turn.as_ref().is_none_or(|turn| turn.ending.is_some());
        match self.evaluate(&ask.tool, &ask.input_json) {
            _ if ending => self.adapter.decide(&ask.key, Verdict::Deny, "The turn is ending", more),
            Evaluation::Allow | Evaluation::Unspecified => {
                self.adapter.decide(&ask.key, Verdict::Allow, "", more)
            }
            Evaluation::Deny => self.adapter.decide(
                &ask.key,
                Verdict::Deny,
                "The session's rules do not permit this tool",
                more,
            ),
            Evaluation::Ask if self.permitted.contains(&id) => {
                self.adapter.decide(&ask.key, Verdict::Allow, "", more)
            }
            Evaluation::Ask => {
                if self.asks.iter().any(|open| open.id == id || open.key == ask.key) {
                    return;
                }
                if self.asks.len() >= REQUESTS_MAX {
                    return self.adapter.decide(
                        &ask.key,
                        Verdict::Deny,
                        "Too many permission requests are open",
                        more,
                    );
                }
                let input_json = shorten_json(ask.input_json, REQUEST_BYTES_MAX);
                let [diff, reason] =
                    [ask.diff, ask.reason].map(|text| shorten_to(text, REQUEST_BYTES_MAX));
                let request = DecisionRequested {
                    id,
                    tool: ask.tool,
                    input_json,
                    diff,
                    reason,
                    is_custom_tool: false,
                };
                self.record(record::Kind::DecisionRequested(request));
                self.asks.push(Open { id, key: ask.key, is_custom_tool: false });
                self.waiting_since.get_or_insert(now);
            }
        }
    }
}

/// A text that fits into an event; the raw output has all of it.
pub(super) fn shorten(text: String) -> String {
    shorten_to(text, TEXT_BYTES_MAX)
}

fn shorten_to(mut text: String, max: usize) -> String {
    if text.len() > max {
        let left_out = text.len() - max;
        let mut end = max;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push_str(&format!("\n[{left_out} bytes left out]"));
    }
    text
}

/// A tool's input; one that is too long becomes a text.
fn shorten_json(text: String, max: usize) -> String {
    if text.len() <= max {
        return text;
    }
    serde_json::json!({ "shortened": shorten_to(text, max) }).to_string()
}
