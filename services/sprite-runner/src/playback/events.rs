//! The events that records become: without secrets, and with the ids that tool uses have in the
//! log.

use contract::{
    host::{self as agent_host, event},
    session::{
        AgentEvent, DecisionRequested, DecisionSettled, InputSettled, OpenTool, Output,
        OutputDropped, StageOutput, session_event::Kind,
    },
};

use crate::playback::{Emitted, Playback, Ready, Scope, tools::remember};

impl Playback {
    /// The next event to append. After one that shows a tool use, [`Self::appended`] has to be
    /// called before the next.
    pub fn next(&mut self) -> Option<Emitted> {
        let (ready, mut place) = self.ready.pop_front()?;
        let kind = match ready {
            Ready::Output { stderr, data } => match self.scope {
                Scope::SetUp { stage, .. } => Kind::StageOutput(StageOutput {
                    stage: stage.to_owned(),
                    stderr,
                    data: data.into(),
                }),
                Scope::Turn(_) => Kind::Output(Output { stderr, data }),
            },
            Ready::Dropped { bytes } => Kind::OutputDropped(OutputDropped { bytes }),
            Ready::Event(event, text) => {
                Kind::Agent(AgentEvent { text, ..self.agent_event(event) })
            }
            Ready::Requested(mut request) => {
                let tool_use = self.tool(request.id).map(|tool| tool.event_id).unwrap_or_default();
                self.mask(&mut request.input_json);
                self.mask(&mut request.diff);
                self.mask(&mut request.reason);
                if tool_use == 0 {
                    // Its own event shows it, under an id that is known once it is in the log.
                    self.awaits_id =
                        Some(OpenTool { journal_id: request.id, event_id: 0, is_mcp: false });
                }
                Kind::DecisionRequested(DecisionRequested { request: Some(request), tool_use })
            }
            Ready::Settled(settled) => {
                let tool_use = self.tool(settled.id).map(|tool| tool.event_id).unwrap_or_default();
                let mut result = self.results.remove(&settled.input_id);
                if let Some(result) = &mut result {
                    self.mask(&mut result.text);
                }
                Kind::DecisionSettled(DecisionSettled { settled: Some(settled), tool_use, result })
            }
            Ready::Input(settled) => {
                let (kind, text) = self.inputs.get(&settled.id).cloned().unwrap_or_default();
                let joined = settled.outcome == agent_host::input_settled::Outcome::Applied as i32;
                let mut text = if joined { text } else { String::new() };
                self.mask(&mut text);
                Kind::InputSettled(InputSettled {
                    settled: Some(settled),
                    text,
                    kind: kind.to_owned(),
                })
            }
        };
        place.open_tools = self.open_tools.iter().cloned().collect();
        Some(Emitted { kind, place })
    }

    /// The event that [`Self::next`] returned is in the log, with this id.
    pub fn appended(&mut self, event_id: u64) {
        if let Some(tool) = self.awaits_id.take() {
            remember(&mut self.open_tools, OpenTool { event_id, ..tool });
        }
    }

    fn tool(&self, journal_id: u64) -> Option<&OpenTool> {
        self.open_tools.iter().rev().find(|tool| tool.journal_id == journal_id)
    }

    fn agent_event(&mut self, mut event: agent_host::Event) -> AgentEvent {
        let (mut tool_use, mut is_mcp) = (0, false);
        let parent = self.tool(event.parent).map(|tool| tool.event_id).unwrap_or_default();
        match &event.kind {
            Some(event::Kind::ToolUse(tool)) => {
                is_mcp = !tool.mcp_server.is_empty();
                self.awaits_id = Some(OpenTool { journal_id: event.id, event_id: 0, is_mcp });
            }
            Some(event::Kind::ToolResult(result)) => {
                if let Some(index) =
                    self.open_tools.iter().rposition(|tool| tool.journal_id == result.tool_use)
                {
                    let tool = self.open_tools.remove(index).unwrap_or_default();
                    (tool_use, is_mcp) = (tool.event_id, tool.is_mcp);
                }
            }
            _ => {}
        }
        if let Some(kind) = &mut event.kind {
            texts_of(kind).into_iter().for_each(|text| self.mask(text));
        }
        AgentEvent { event: Some(event), tool_use, parent, is_mcp, text: 0 }
    }

    fn mask(&self, text: &mut String) {
        if self.masker.has_secrets() {
            *text = self.masker.text(text);
        }
    }
}

/// The texts of an event that the agent wrote.
fn texts_of(kind: &mut event::Kind) -> Vec<&mut String> {
    match kind {
        event::Kind::Message(message) => vec![&mut message.text],
        event::Kind::Thinking(thinking) => vec![&mut thinking.text],
        event::Kind::ToolUse(tool) => vec![&mut tool.input_json],
        event::Kind::ToolResult(result) => {
            let changes =
                result.changes.iter_mut().flat_map(|change| [&mut change.path, &mut change.diff]);
            std::iter::once(&mut result.content).chain(changes).collect()
        }
        event::Kind::Plan(plan) => plan.entries.iter_mut().map(|entry| &mut entry.text).collect(),
        event::Kind::Error(error) => vec![&mut error.message],
        event::Kind::ConversationStarted(_)
        | event::Kind::ModelRequestEnded(_)
        | event::Kind::ContextCompacted(_)
        | event::Kind::Delta(_) => Vec::new(),
    }
}
