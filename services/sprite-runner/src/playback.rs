//! Turns records of an agent host's journal into events of the log, in order, each with the
//! checkpoint from which a successor yields exactly the events that follow. No I/O.
//!
//! Output is held back where it ends inside a character or in what may become a secret, while
//! records after it are appended. So a checkpoint names the first record that is not wholly in the
//! log, and says how much of what follows is in it all the same.

mod events;
mod output;
mod place;
mod previews;
mod streams;
#[cfg(test)]
mod tests;
mod tools;

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use bytes::Bytes;
use contract::{
    host::{
        self as agent_host, CustomToolResult, Input, Record, StepEnded, event, input, record,
        turn_ended,
    },
    session::{Checkpoint, OpenTool, Preview},
};
use prost::Message as _;

pub use crate::playback::{
    place::{Emitted, Place},
    previews::sent_bytes,
    tools::own_tool,
};
use crate::{
    host::{Gone, Incoming},
    mask::Masker,
    playback::{
        place::EVENT_BYTES_MIN,
        previews::Drafts,
        streams::{Mark, Stream},
    },
};

/// Which part of the journal the writer appends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// The output of set-up steps, which belongs to this stage. What lies below the offset is in
    /// the log.
    SetUp { stage: &'static str, logged_below: u64 },
    /// What lies between the start and the end of this turn.
    Turn(u32),
}

/// Events that are ready to append, in order. The id of a tool use is known only once it is in the
/// log.
#[derive(Debug)]
enum Ready {
    Output {
        stderr: bool,
        data: Bytes,
    },
    Dropped {
        bytes: u64,
    },
    /// With the number of the text of which parts were sent, if any.
    Event(agent_host::Event, u64),
    Requested(agent_host::DecisionRequested),
    Settled(agent_host::DecisionSettled),
    Input(agent_host::InputSettled),
}

#[derive(Debug)]
pub struct Playback {
    scope: Scope,
    masker: Masker,
    /// Where the next record is.
    position: u64,
    /// Where a successor reads from while the turn has not begun in the journal.
    begin: u64,
    records_through: u64,
    is_inside: bool,
    streams: [Stream; 2],
    /// How much output the log keeps of the scope. Of what exceeds it only the end is kept.
    output_bytes_max: u64,
    /// Bytes of typed events in the log, which keeps as many of them as of output.
    event_bytes: u64,
    /// Bytes that were dropped, and those of them that no event reports yet.
    dropped: u64,
    untold: u64,
    /// Where the newest event's checkpoint leads.
    emitted_offset: u64,
    marks: VecDeque<Mark>,
    /// Which stream the newest held output is of.
    newest: Option<bool>,
    ready: VecDeque<(Ready, Place)>,
    open_tools: VecDeque<OpenTool>,
    /// The tool use that was returned last, until its id is known.
    awaits_id: Option<OpenTool>,
    /// Kinds and texts of inputs.
    inputs: HashMap<String, (&'static str, String)>,
    /// Results of custom tools, by their inputs.
    results: HashMap<String, CustomToolResult>,
    accepted: HashSet<String>,
    steps: HashMap<String, StepEnded>,
    requests: BTreeSet<u64>,
    /// The message and the thought that are being written.
    drafts: Drafts,
    ended: Option<agent_host::TurnEnded>,
}

/// A turn's own input.
#[must_use]
pub fn turn_input(turn: u32) -> String {
    format!("turn-{turn}")
}

/// The input that starts a CLI ahead of the first turn.
pub const START_INPUT: &str = "start-cli";

/// Whether an input is one of the runner's own, of which the scheduler knows nothing.
fn is_own(id: &str) -> bool {
    id.starts_with("turn-") || id.starts_with("step-") || id == START_INPUT
}

fn kind_of(input: &Input) -> (&'static str, String) {
    match &input.kind {
        Some(input::Kind::Message(message)) => ("message", message.text.clone()),
        Some(input::Kind::Interrupt(_)) => ("interrupt", String::new()),
        Some(input::Kind::Decision(_)) => ("decision", String::new()),
        Some(input::Kind::CustomToolResult(_)) => ("tool_result", String::new()),
        _ => ("", String::new()),
    }
}

impl Playback {
    /// Continues from a checkpoint; the first record to push is the one at its offset.
    pub fn new(
        scope: Scope,
        masker: Masker,
        output_bytes_max: u64,
        checkpoint: &Checkpoint,
    ) -> Self {
        let stream = |seen, logged| Stream { seen, logged, ..Stream::default() };
        Self {
            is_inside: matches!(scope, Scope::SetUp { .. }) || checkpoint.records_through > 0,
            scope,
            masker,
            position: checkpoint.journal_offset,
            begin: checkpoint.journal_offset,
            records_through: checkpoint.records_through,
            streams: [
                stream(checkpoint.journal_stdout, checkpoint.stdout_offset),
                stream(checkpoint.journal_stderr, checkpoint.stderr_offset),
            ],
            output_bytes_max,
            event_bytes: checkpoint.event_bytes,
            dropped: checkpoint.output_dropped,
            untold: 0,
            emitted_offset: checkpoint.journal_offset,
            marks: VecDeque::new(),
            newest: None,
            ready: VecDeque::new(),
            open_tools: checkpoint.open_tools.iter().cloned().collect(),
            awaits_id: None,
            inputs: HashMap::new(),
            results: HashMap::new(),
            accepted: HashSet::new(),
            steps: HashMap::new(),
            requests: checkpoint.open_requests.iter().copied().collect(),
            drafts: Drafts::default(),
            ended: None,
        }
    }

    /// Names the stage that the following output belongs to.
    pub fn enter_stage(&mut self, name: &'static str) {
        if let Scope::SetUp { stage, .. } = &mut self.scope {
            *stage = name;
        }
    }

    /// What an input is, for the event that says what became of it.
    pub fn knows(&mut self, input: &Input) {
        if !is_own(&input.id) {
            self.inputs.insert(input.id.clone(), kind_of(input));
            if let Some(input::Kind::CustomToolResult(result)) = &input.kind {
                self.results.insert(input.id.clone(), result.clone());
            }
        }
    }

    /// Takes the record between two offsets.
    pub fn push(&mut self, offset: u64, next: u64, record: Record) {
        if self.ended.is_some() {
            // It belongs to the next reader: the position stays at the end of the turn.
            return;
        }
        let repeated = offset < self.records_through;
        match record.kind {
            Some(record::Kind::Output(output)) if self.is_inside => {
                self.push_output(offset, next, &output)
            }
            Some(record::Kind::TurnStarted(started)) if self.scope == Scope::Turn(started.turn) => {
                self.is_inside = true;
                self.records_through = self.records_through.max(next);
            }
            Some(record::Kind::TurnEnded(ended))
                if self.is_inside && self.scope == Scope::Turn(ended.turn) =>
            {
                self.flush(true);
                self.ended = Some(ended);
            }
            // Partial messages are in the log as the messages that they become.
            Some(record::Kind::Event(agent_host::Event {
                kind: Some(event::Kind::Delta(delta)),
                ..
            })) if self.is_inside && self.is_of_turn() && !repeated => {
                self.drafts.write(&self.masker, delta);
            }
            Some(record::Kind::Event(agent_host::Event {
                kind: Some(event::Kind::Delta(_)),
                ..
            })) => {}
            Some(record::Kind::Event(agent_host::Event { kind: None, .. })) => {}
            Some(record::Kind::Event(event))
                if self.is_inside && self.is_of_turn() && !repeated =>
            {
                let text = self.drafts.written(&event);
                let bytes = event.encoded_len().max(EVENT_BYTES_MIN) as u64;
                if self.event_bytes >= self.output_bytes_max {
                    self.drop_event(next, bytes);
                } else {
                    self.event_bytes += bytes;
                    self.emit_at(next, Ready::Event(event, text));
                }
            }
            Some(record::Kind::DecisionRequested(request))
                if self.is_inside && self.is_of_turn() =>
            {
                self.requests.insert(request.id);
                if !repeated {
                    self.emit_at(next, Ready::Requested(request));
                }
            }
            Some(record::Kind::DecisionSettled(settled)) if self.is_inside && self.is_of_turn() => {
                self.requests.remove(&settled.id);
                if !repeated {
                    self.emit_at(next, Ready::Settled(settled));
                }
            }
            Some(record::Kind::InputAccepted(accepted)) => {
                if let Some(input) = accepted.input {
                    self.knows(&input);
                    self.accepted.insert(input.id);
                }
            }
            Some(record::Kind::InputSettled(settled)) if self.refuses_the_turn(&settled) => {
                let reason = turn_ended::Reason::Stopped.into();
                self.ended = Some(agent_host::TurnEnded {
                    reason,
                    message: settled.message,
                    ..agent_host::TurnEnded::default()
                });
            }
            Some(record::Kind::InputSettled(settled))
                if !is_own(&settled.id) && self.is_inside && self.is_of_turn() && !repeated =>
            {
                self.emit_at(next, Ready::Input(settled));
            }
            Some(record::Kind::Snapshot(snapshot)) => {
                self.accepted.extend(snapshot.accepted);
                if self.is_inside {
                    self.requests.extend(snapshot.requests.iter().map(|request| request.id));
                }
            }
            Some(record::Kind::StepStarted(_)) if !self.is_of_turn() => {
                self.is_inside = true;
                self.streams.iter_mut().for_each(|stream| stream.tail.clear());
            }
            // What a CLI prints before its first message is no output of the set-up.
            Some(record::Kind::CliStarted(_)) if !self.is_of_turn() => self.is_inside = false,
            Some(record::Kind::StepEnded(ended)) => {
                self.flush(true);
                self.steps.insert(ended.input_id.clone(), ended);
            }
            _ => {}
        }
        self.position = next;
    }

    /// Parts of texts that were written since this was called last.
    pub fn previews(&mut self) -> Vec<Preview> {
        self.drafts.take_previews()
    }

    /// Whether the host will not begin the turn.
    fn refuses_the_turn(&self, settled: &agent_host::InputSettled) -> bool {
        let refused = settled.outcome == agent_host::input_settled::Outcome::Refused as i32;
        refused && matches!(self.scope, Scope::Turn(turn) if settled.id == turn_input(turn))
    }

    fn is_of_turn(&self) -> bool {
        matches!(self.scope, Scope::Turn(_))
    }

    fn emit_at(&mut self, next: u64, ready: Ready) {
        self.flush(false);
        self.tell_dropped();
        (self.position, self.records_through) = (next, next);
        self.emit(ready);
    }

    fn emit(&mut self, ready: Ready) {
        let place = self.place();
        self.emitted_offset = place.journal_offset;
        self.ready.push_back((ready, place));
    }

    /// Whether the turn has begun in the journal.
    pub const fn has_begun(&self) -> bool {
        self.is_inside
    }

    /// What a checkpoint says now, without the open tools.
    fn place(&self) -> Place {
        let logged = [self.streams[0].logged, self.streams[1].logged];
        let (journal_offset, journal) = match self.marks.front() {
            _ if !self.is_inside => (self.begin, [0, 0]),
            Some(mark) => (mark.offset, mark.below),
            None => (self.position, [self.streams[0].seen, self.streams[1].seen]),
        };
        Place {
            journal_offset,
            journal,
            logged,
            event_bytes: self.event_bytes,
            dropped: self.dropped,
            records_through: self.records_through,
            open_tools: Vec::new(),
            open_requests: self.requests.iter().copied().collect(),
        }
    }

    /// Whether anything is left to append.
    pub fn is_drained(&self) -> bool {
        self.ready.is_empty()
    }

    /// Takes what came from the host.
    pub fn absorb(&mut self, incoming: Incoming) -> Result<(), Gone> {
        match incoming {
            Incoming::Attached(_) => Ok(()),
            Incoming::Record { offset, next, record, .. } => {
                self.push(offset, next, record);
                Ok(())
            }
            Incoming::Gone(gone) => Err(gone),
        }
    }

    /// Where the next record is.
    pub const fn position(&self) -> u64 {
        self.position
    }

    /// Everything below is in the log, once what is ready is.
    pub fn persisted(&self) -> u64 {
        if self.untold > 0 { self.emitted_offset } else { self.place().journal_offset }
    }

    /// The checkpoint after all that was returned.
    pub fn checkpoint(&self) -> Place {
        Place { open_tools: self.open_tools.iter().cloned().collect(), ..self.place() }
    }

    /// How the turn ended, once it has.
    pub fn ended(&self) -> Option<&agent_host::TurnEnded> {
        self.ended.as_ref()
    }

    /// How a set-up step ended. One that a later step followed ended well, though its end is no
    /// longer in the journal.
    pub fn step(&self, id: &str, later: &[String]) -> Option<StepEnded> {
        let followed = || later.iter().any(|later| self.accepted.contains(later));
        let well = || StepEnded {
            input_id: id.to_owned(),
            exit_code: Some(0),
            reason: turn_ended::Reason::Completed.into(),
            ..StepEnded::default()
        };
        self.steps.get(id).cloned().or_else(|| followed().then(well))
    }

    /// Whether the host has an input.
    pub fn has_accepted(&self, id: &str) -> bool {
        self.accepted.contains(id)
    }

    /// Whether the agent waits for a decision.
    pub fn awaits_decision(&self) -> bool {
        !self.requests.is_empty()
    }
}
