//! What a journal says is open: rebuilt by replaying records, carried over in a snapshot at the
//! start of each segment.

use std::collections::VecDeque;

use contract::host::{
    DecisionRequested, Input, Record, Snapshot, StepStarted, TurnStarted, event, input, record,
};

/// How many accepted ids are remembered. A repeated input comes from a runner that has not seen its
/// acceptance, so from the recent past.
pub const ACCEPTED_MAX: usize = 1000;

#[derive(Debug, Clone, Default, PartialEq)]
pub struct State {
    pub generation: u32,
    pub accepted: VecDeque<String>,
    /// Messages that no turn has taken, and steps that have not begun.
    pub queued: Vec<Input>,
    pub turn: Option<TurnStarted>,
    pub step: Option<StepStarted>,
    pub requests: Vec<DecisionRequested>,
    pub last_event_id: u64,
    pub conversation_id: String,
    /// The last record was a host's orderly end.
    pub ended: bool,
}

impl State {
    pub fn apply(&mut self, record: &Record) {
        let Some(kind) = &record.kind else { return };
        self.ended = matches!(kind, record::Kind::HostEnded(_));
        match kind {
            record::Kind::HostStarted(host) => self.generation = host.generation,
            record::Kind::Snapshot(snapshot) => *self = Self::from_snapshot(snapshot),
            record::Kind::InputAccepted(accepted) => {
                let Some(input) = &accepted.input else { return };
                if self.accepted.len() == ACCEPTED_MAX {
                    self.accepted.pop_front();
                }
                self.accepted.push_back(input.id.clone());
                if matches!(input.kind, Some(input::Kind::Message(_) | input::Kind::Step(_))) {
                    self.queued.push(input.clone());
                }
            }
            record::Kind::InputSettled(settled) => {
                self.queued.retain(|input| input.id != settled.id)
            }
            record::Kind::DecisionRequested(request) => {
                self.last_event_id = self.last_event_id.max(request.id);
                self.requests.push(request.clone());
            }
            record::Kind::DecisionSettled(settled) => {
                self.requests.retain(|request| request.id != settled.id)
            }
            record::Kind::TurnStarted(turn) => {
                self.queued.retain(|input| input.id != turn.input_id);
                self.turn = Some(turn.clone());
            }
            record::Kind::TurnEnded(_) => self.turn = None,
            record::Kind::StepStarted(step) => {
                self.queued.retain(|input| input.id != step.input_id);
                self.step = Some(step.clone());
            }
            record::Kind::StepEnded(_) => self.step = None,
            record::Kind::Event(event) => {
                self.last_event_id = self.last_event_id.max(event.id);
                if let Some(event::Kind::ConversationStarted(started)) = &event.kind {
                    self.conversation_id.clone_from(&started.conversation_id);
                }
            }
            record::Kind::Output(_)
            | record::Kind::CliStarted(_)
            | record::Kind::CliExited(_)
            | record::Kind::HostEnded(_) => {}
        }
    }

    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            generation: self.generation,
            accepted: self.accepted.iter().cloned().collect(),
            queued: self.queued.clone(),
            turn: self.turn.clone(),
            step: self.step.clone(),
            requests: self.requests.clone(),
            last_event_id: self.last_event_id,
            conversation_id: self.conversation_id.clone(),
        }
    }

    fn from_snapshot(snapshot: &Snapshot) -> Self {
        Self {
            generation: snapshot.generation,
            accepted: snapshot.accepted.iter().cloned().collect(),
            queued: snapshot.queued.clone(),
            turn: snapshot.turn.clone(),
            step: snapshot.step.clone(),
            requests: snapshot.requests.clone(),
            last_event_id: snapshot.last_event_id,
            conversation_id: snapshot.conversation_id.clone(),
            ended: false,
        }
    }

    pub fn has_accepted(&self, id: &str) -> bool {
        self.accepted.iter().any(|accepted| accepted == id)
    }
}
