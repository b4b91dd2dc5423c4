//! Derives the events of `/v1` from a session's log. One entry may become several events. Pure.
//!
//! Some events depend on what came before them: which requests are open, and what earlier turns
//! used. At the begin of a turn nothing is open, so [`Thread`] is built from there
//! ([`contract::rpc::FindTurn`]) and fed every entry that follows.

mod agent;
pub mod entry;
pub mod names;
#[cfg(test)]
mod tests;
mod text;
mod totals;

use std::collections::{BTreeMap, BTreeSet};

use contract::{
    host::{Evaluation, decision_settled::How, input_settled::Outcome},
    scheduler::{Agent, FindTurnReply},
    session::{self, ModelRequestEnded, SessionEvent, StopReason, TurnEnded, session_event::Kind},
};
use prost::Message as _;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use types::SessionId;

use crate::v1::{
    agents::Snapshot,
    ids::{EventId, Prefix},
    thread::{
        agent::Tool,
        entry::{Entry, Place, Shown, is_sent, main_id, part, result, text},
        names::error,
        text::{Blocks, Content},
        totals::Totals,
    },
};

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

/// What a place within a turn is known by.
#[derive(Debug)]
pub struct Within {
    /// The entry that the turn began with.
    pub started: u64,
    pub is_metered: bool,
    /// The CLI reports what each model request used. None of them is open at the place.
    pub reports_requests: bool,
    /// Tool uses without a result, and whether the tool is an MCP server's.
    pub tools: BTreeMap<u64, bool>,
}

/// A session's primary thread, up to some place of its log.
#[derive(Clone, Debug)]
pub struct Thread {
    id: String,
    agent_name: String,
    pub state: State,
}

/// What changed of a session.
fn changes(updated: &session::Updated) -> Value {
    let mut changes: Map<String, Value> =
        serde_json::from_str(&updated.changes).unwrap_or_default();
    if let Ok(agent) = Agent::decode(updated.agent.as_ref())
        && !updated.agent.is_empty()
    {
        changes.insert(
            "agent".to_owned(),
            serde_json::to_value(Snapshot::from(&agent)).unwrap_or_default(),
        );
    }
    changes.into()
}

impl Thread {
    /// As it is where a turn begins.
    pub fn at(session: SessionId, found: &FindTurnReply) -> Self {
        let usage = found.usage_before.as_ref().map(Totals::from).unwrap_or_default();
        let state = State { usage, turn: found.turn.saturating_sub(1), ..State::default() };
        Self {
            id: Prefix::Thread.encode(session.uuid()),
            agent_name: found.agent_name.clone(),
            state,
        }
    }

    /// As it is within a turn whose agent waits for no one. What the turn's requests used and
    /// whether it failed are not known here: [`Self::knows_end`].
    pub fn within(session: SessionId, found: &FindTurnReply, within: Within) -> Self {
        let mut thread = Self::at(session, found);
        let has_span = !within.is_metered && !within.reports_requests;
        thread.state = State {
            turn: found.turn,
            is_running: true,
            span: has_span.then_some(Place { entry: within.started, part: part::SPAN_START }),
            tools: within.tools,
            is_metered: within.is_metered,
            usage: thread.state.usage,
            ..State::default()
        };
        thread
    }

    /// Whether a thread that was built within a turn shows this end of the turn as one that was
    /// built at its begin does.
    pub fn knows_end(&self, ended: &TurnEnded, reports_requests: bool) -> bool {
        let knows_failure = ended.exit_code == Some(0) || self.state.has_failed;
        let knows_usage = !reports_requests || self.state.span.is_none();
        knows_failure && knows_usage
    }

    /// Applies the next entry of the log, and appends what it shows as.
    pub fn apply(&mut self, id: u64, event: &SessionEvent, shown: &mut Vec<Shown>) {
        // Entries of earlier releases have no time.
        let at_us = if event.at_us > 0 { event.at_us } else { id.cast_signed() };
        let mut entry = Entry { id, at_us, shown };
        let entry = &mut entry;
        match &event.kind {
            Some(Kind::TurnStarted(started)) => {
                entry.add_sent(
                    &started.input_id,
                    "user.message",
                    Content { content: Blocks(&started.prompt) },
                );
                self.begin(event.turn, entry);
                self.state.is_metered = started.is_metered;
                self.begin_span(entry);
            }
            Some(Kind::ModelRequestStarted(_)) => {
                entry.add(part::SPAN_START, "span.model_request_start", json!({}))
            }
            Some(Kind::ModelRequestEnded(ended)) => end_of_request(ended, entry),
            Some(Kind::TurnEnded(ended)) => self.end(event.turn, ended, entry),
            Some(Kind::Terminated(_)) => self.terminate(entry),
            Some(Kind::Deleted(_)) => entry.add(part::END, "session.deleted", json!({})),
            Some(Kind::Updated(updated)) => {
                entry.add(part::MAIN, "session.updated", changes(updated))
            }
            Some(Kind::Agent(agent)) => self.agent(agent, entry),
            Some(Kind::DecisionRequested(requested)) => {
                let request = requested.request.clone().unwrap_or_default();
                let mut tool_use = requested.tool_use;
                if request.is_custom_tool {
                    tool_use = id;
                    let input = serde_json::from_str::<Map<String, Value>>(&request.input_json)
                        .unwrap_or_default();
                    let body =
                        json!({ "name": request.tool, "input": input, "session_thread_id": null });
                    entry.add(part::MAIN, "agent.custom_tool_use", body);
                } else if tool_use == 0 {
                    tool_use = id;
                    let tool = Tool {
                        name: &request.tool,
                        server: "",
                        input: &request.input_json,
                        evaluation: Evaluation::Ask,
                    };
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
                    (true, Some(_)) => self.show_running(entry),
                    // The turn ends, or the same is asked again.
                    (true, None) => {}
                }
            }
            Some(Kind::InputSettled(input)) => {
                let settled = input.settled.clone().unwrap_or_default();
                match (settled.outcome(), input.kind.as_str()) {
                    (Outcome::Applied, "message") => {
                        entry.add_sent(
                            &settled.id,
                            "user.message",
                            Content { content: Blocks(&input.text) },
                        );
                    }
                    (Outcome::Applied, "interrupt") => {
                        entry.add_sent(&settled.id, "user.interrupt", json!({}))
                    }
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
        self.show_running(entry);
    }

    fn show_running(&mut self, entry: &mut Entry<'_>) {
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
        entry.add(
            part::USAGE,
            "session.usage",
            json!({ "usage": self.state.usage.of_session(), "budget": null }),
        );
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
                entry.add_sent(
                    &unstarted.input_id,
                    "user.message",
                    Content { content: Blocks(&unstarted.prompt) },
                );
            }
            self.begin(turn, entry);
        }
        let reason = ended.stop_reason();
        let is_stop =
            matches!(reason, StopReason::Interrupted | StopReason::Refused | StopReason::Budget);
        let has_failed = reason == StopReason::Limit || (ended.exit_code != Some(0) && !is_stop);
        let usage = ended.usage.as_ref().map(Totals::from).unwrap_or_default();
        self.end_span(usage.minus(self.state.reported), has_failed, entry);
        let open = std::mem::take(&mut self.state.tools);
        for (part, (tool_use, is_mcp)) in part::RESULTS.zip(open) {
            let content =
                if reason == StopReason::Interrupted { "interrupted" } else { "the turn ended" };
            result(tool_use, is_mcp, content, true, part, entry);
        }
        let is_terminal = rules::state::leaves_nothing(turn, ended);
        if has_failed && (is_terminal || !self.state.has_failed) {
            let message = ended
                .failure
                .as_ref()
                .map_or("The agent failed", |failure| failure.message.as_str());
            let kind = if reason == StopReason::Limit {
                "tool_use_limit_reached_error"
            } else {
                "unknown_error"
            };
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
            StopReason::Refused => {
                ("refusal", json!({ "type": "refusal", "category": null, "explanation": null }))
            }
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

    /// The turn that runs, if one does.
    pub fn running_turn(&self) -> Option<u32> {
        self.state.is_running.then_some(self.state.turn)
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
