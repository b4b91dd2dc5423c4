//! What an agent host's journal means for the log: records go in, in order, and events come out, each with the checkpoint from which a
//! successor yields exactly the events that follow. No I/O.
//!
//! Output is held back where it ends inside a character or in what may become a secret, while records after it are appended. So a
//! checkpoint names the first record that is not wholly in the log, and says how much of what follows is in it all the same.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use bytes::{Bytes, BytesMut};
use contract::{
    host::{self as agent_host, CustomToolResult, Input, Record, StepEnded, event, input, record, turn_ended},
    session::{
        AgentEvent, Checkpoint, DecisionRequested, DecisionSettled, InputSettled, OpenTool, Output, OutputDropped, Preview, StageOutput,
        session_event::Kind,
    },
};
use prost::Message as _;
use types::limits::OUTPUT_EVENT_BYTES_MAX;

use crate::{
    host::{Gone, Incoming},
    mask::{Masker, Piece},
};

/// Tool uses without a result that are remembered: a result that comes later names none.
const OPEN_TOOLS_MAX: usize = 1000;
/// How much journal may follow output that is held back.
const HELD_BACK_MAX: u64 = 16 << 20;
/// How much of each stream's end is kept, for the diagnosis of a failure and as the end of output that is dropped.
const TAIL_BYTES: usize = 64 << 10;
/// How much output is dropped between two events that say so. Less than what the runner keeps of the journal.
const DROPPED_STEP: u64 = 4 << 20;

/// What of the journal belongs to the writer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// The output of set-up steps, which belongs to this stage. What lies below the offset is in the log.
    SetUp { stage: &'static str, logged_below: u64 },
    /// What lies between the start and the end of this turn.
    Turn(u32),
}

/// An event to append, with what its checkpoint says.
#[derive(Debug, PartialEq)]
pub struct Emitted {
    pub kind: Kind,
    pub place: Place,
}

impl Emitted {
    /// Bytes of the agent's output in it, or of what it asks: an agent may ask as fast as it prints.
    pub fn output_bytes(&self) -> usize {
        match &self.kind {
            Kind::Output(output) => output.data.len(),
            Kind::StageOutput(output) => output.data.len(),
            Kind::DecisionRequested(requested) => requested.encoded_len(),
            _ => 0,
        }
    }
}

/// The part of a checkpoint that a playback moves.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Place {
    journal_offset: u64,
    journal: [u64; 2],
    logged: [u64; 2],
    dropped: u64,
    records_through: u64,
    open_tools: Vec<OpenTool>,
    open_requests: Vec<u64>,
}

impl Place {
    pub fn apply(self, checkpoint: &mut Checkpoint) {
        checkpoint.journal_offset = self.journal_offset;
        [checkpoint.journal_stdout, checkpoint.journal_stderr] = self.journal;
        [checkpoint.stdout_offset, checkpoint.stderr_offset] = self.logged;
        checkpoint.output_dropped = self.dropped;
        checkpoint.records_through = self.records_through;
        checkpoint.open_tools = self.open_tools;
        checkpoint.open_requests = self.open_requests;
    }
}

#[derive(Debug, Default)]
struct Stream {
    /// Bytes of the scope in the journal below the position, and of those in the log or dropped.
    seen: u64,
    logged: u64,
    /// What was read and is not in the log.
    held: BytesMut,
    tail: VecDeque<u8>,
}

/// A record of output that is not wholly in the log, and how much output the journal has below it.
#[derive(Debug, Clone, Copy)]
struct Mark {
    offset: u64,
    below: [u64; 2],
}

/// A text that the agent is writing.
#[derive(Debug)]
struct Writing {
    text: u64,
    /// What may be the beginning of a secret.
    held: Bytes,
    /// How many bytes were sent, without secrets.
    sent: u64,
}

/// What is ready, in order. The ids of tool uses are known only when those are in the log.
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
    /// Bytes that were dropped, and those of them that no event tells of yet.
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
    writing: [Option<Writing>; 2],
    previews: Vec<Preview>,
    ended: Option<agent_host::TurnEnded>,
}

/// A turn's own input.
#[must_use]
pub fn turn_input(turn: u32) -> String {
    format!("turn-{turn}")
}

/// Whether an input is one of the runner's own, of which the scheduler knows nothing.
fn is_own(id: &str) -> bool {
    id.starts_with("turn-") || id.starts_with("step-")
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
    /// Goes on from a checkpoint; the first record to push is the one at its offset.
    pub fn new(scope: Scope, masker: Masker, output_bytes_max: u64, checkpoint: &Checkpoint) -> Self {
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
            writing: [None, None],
            previews: Vec::new(),
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
            Some(record::Kind::Output(output)) if self.is_inside => self.push_output(offset, next, &output),
            Some(record::Kind::TurnStarted(started)) if self.scope == Scope::Turn(started.turn) => {
                self.is_inside = true;
                self.records_through = self.records_through.max(next);
            }
            Some(record::Kind::TurnEnded(ended)) if self.is_inside && self.scope == Scope::Turn(ended.turn) => {
                self.flush(true);
                self.ended = Some(ended);
            }
            // Partial messages are in the log as the messages that they become.
            Some(record::Kind::Event(agent_host::Event { kind: Some(event::Kind::Delta(delta)), .. }))
                if self.is_inside && self.is_of_turn() && !repeated =>
            {
                self.write(delta);
            }
            Some(record::Kind::Event(agent_host::Event { kind: Some(event::Kind::Delta(_)), .. })) => {}
            Some(record::Kind::Event(agent_host::Event { kind: None, .. })) => {}
            Some(record::Kind::Event(event)) if self.is_inside && self.is_of_turn() && !repeated => {
                let text = self.written(&event);
                self.emit_at(next, Ready::Event(event, text));
            }
            Some(record::Kind::DecisionRequested(request)) if self.is_inside && self.is_of_turn() => {
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
                self.ended = Some(agent_host::TurnEnded { reason, message: settled.message, ..agent_host::TurnEnded::default() });
            }
            Some(record::Kind::InputSettled(settled)) if !is_own(&settled.id) && self.is_inside && self.is_of_turn() && !repeated => {
                self.emit_at(next, Ready::Input(settled));
            }
            Some(record::Kind::Snapshot(snapshot)) => {
                self.accepted.extend(snapshot.accepted);
                if self.is_inside {
                    self.requests.extend(snapshot.requests.iter().map(|request| request.id));
                }
            }
            Some(record::Kind::StepStarted(_)) => self.streams.iter_mut().for_each(|stream| stream.tail.clear()),
            Some(record::Kind::StepEnded(ended)) => {
                self.flush(true);
                self.steps.insert(ended.input_id.clone(), ended);
            }
            _ => {}
        }
        self.position = next;
    }

    /// Adds to a text that is being written.
    fn write(&mut self, delta: agent_host::Delta) {
        let writing = &mut self.writing[usize::from(delta.thinking)];
        let is_same = writing.as_ref().is_some_and(|writing| writing.text == delta.text);
        if !is_same {
            *writing = Some(Writing { text: delta.text, held: Bytes::new(), sent: 0 });
        }
        let Some(writing) = writing else { return };
        writing.held = [&writing.held[..], delta.content.as_bytes()].concat().into();
        while let Some(piece) = self.masker.next(&mut writing.held, false) {
            let content = String::from_utf8_lossy(&piece.data).into_owned();
            let offset = writing.sent;
            writing.sent += content.len() as u64;
            self.previews.push(Preview { turn: 0, text: writing.text, is_thinking: delta.thinking, offset, content });
        }
    }

    /// The number of the text that an event is the whole of; 0: no part of it was written before.
    fn written(&mut self, event: &agent_host::Event) -> u64 {
        let writing = match &event.kind {
            // A subagent's texts come whole.
            _ if event.parent != 0 => None,
            Some(event::Kind::Message(_)) => self.writing[0].take(),
            Some(event::Kind::Thinking(_)) => self.writing[1].take(),
            _ => None,
        };
        writing.map_or(0, |writing| writing.text)
    }

    /// Parts of texts that were written since this was called last.
    pub fn previews(&mut self) -> Vec<Preview> {
        std::mem::take(&mut self.previews)
    }

    /// Whether the host will not begin the turn.
    fn refuses_the_turn(&self, settled: &agent_host::InputSettled) -> bool {
        let refused = settled.outcome == agent_host::input_settled::Outcome::Refused as i32;
        refused && matches!(self.scope, Scope::Turn(turn) if settled.id == turn_input(turn))
    }

    fn is_of_turn(&self) -> bool {
        matches!(self.scope, Scope::Turn(_))
    }

    fn push_output(&mut self, offset: u64, next: u64, output: &agent_host::Output) {
        let stderr = output.stream == agent_host::output::Stream::Stderr as i32;
        if self.newest.is_some_and(|newest| newest != stderr) {
            self.flush(false);
        }
        let below = [self.streams[0].seen, self.streams[1].seen];
        let stream = &mut self.streams[usize::from(stderr)];
        keep_tail(&mut stream.tail, &output.data);
        self.position = next;
        if matches!(self.scope, Scope::SetUp { logged_below, .. } if offset < logged_below) {
            return;
        }
        let known = stream.logged + stream.held.len() as u64;
        stream.seen += output.data.len() as u64;
        let new = usize::try_from(stream.seen.saturating_sub(known)).unwrap_or(usize::MAX).min(output.data.len());
        if new == 0 {
            return;
        }
        stream.held.extend_from_slice(output.data.get(output.data.len() - new..).unwrap_or_default());
        self.marks.push_back(Mark { offset, below });
        if self.marks.front().is_some_and(|oldest| offset - oldest.offset > HELD_BACK_MAX) {
            // The other stream has held back its last bytes for so long that the journal could not be deleted.
            match self.is_over_limit() {
                true => self.drop_output(!stderr, 0, true),
                false => self.flush_stream(!stderr, true, 1),
            }
        }
        self.newest = Some(stderr);
        if self.streams[usize::from(stderr)].held.len() >= OUTPUT_EVENT_BYTES_MAX {
            self.flush_stream(stderr, false, OUTPUT_EVENT_BYTES_MAX);
        }
    }

    /// Nothing more has come for now: what is held is emitted as far as it may be.
    pub fn settle(&mut self) {
        self.flush(false);
    }

    /// Emits what is held; at the end of the turn or the step (`last`) also the end of output that exceeds the limit.
    fn flush(&mut self, last: bool) {
        if last {
            self.tell_dropped();
        }
        let newest = self.newest.take().unwrap_or_default();
        self.flush_stream(!newest, last, 1);
        self.flush_stream(newest, last, 1);
    }

    /// Emits what a stream holds while it is at least `least` bytes.
    fn flush_stream(&mut self, stderr: bool, last: bool, least: usize) {
        loop {
            if !last && self.is_over_limit() {
                return self.drop_output(stderr, TAIL_BYTES, false);
            }
            if self.streams[usize::from(stderr)].held.len() < least {
                return;
            }
            let Some(Piece { consumed, data }) = self.take_piece(stderr, last) else { return };
            self.tell_dropped();
            self.streams[usize::from(stderr)].logged += consumed;
            self.drop_marks();
            self.emit(Ready::Output { stderr, data });
        }
    }

    fn take_piece(&mut self, stderr: bool, last: bool) -> Option<Piece> {
        let stream = &mut self.streams[usize::from(stderr)];
        let mut data = std::mem::take(&mut stream.held).freeze();
        let piece = self.masker.next(&mut data, last);
        // Neither copies unless a piece still refers to the same bytes.
        stream.held = data.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&*shared));
        piece
    }

    fn is_over_limit(&self) -> bool {
        let handled: u64 = self.streams.iter().map(|stream| stream.logged).sum();
        handled.saturating_sub(self.dropped) >= self.output_bytes_max
    }

    /// Drops what a stream holds but for its end.
    fn drop_output(&mut self, stderr: bool, keep: usize, last: bool) {
        // A piece is at most one event's.
        let least = if keep > 0 { keep + OUTPUT_EVENT_BYTES_MAX } else { 1 };
        while self.streams[usize::from(stderr)].held.len() >= least {
            let Some(Piece { consumed, .. }) = self.take_piece(stderr, last) else { return };
            self.streams[usize::from(stderr)].logged += consumed;
            self.dropped += consumed;
            self.untold += consumed;
            self.drop_marks();
            if self.untold >= DROPPED_STEP {
                self.tell_dropped();
            }
        }
    }

    /// No other event's checkpoint covers bytes that were dropped silently.
    fn tell_dropped(&mut self) {
        let bytes = std::mem::take(&mut self.untold);
        if bytes > 0 {
            self.emit(Ready::Dropped { bytes });
        }
    }

    /// A record is in the log when what the journal has below the next one is.
    fn drop_marks(&mut self) {
        while !self.marks.is_empty() {
            let below = self.marks.get(1).map_or([self.streams[0].seen, self.streams[1].seen], |next| next.below);
            if below.iter().zip(&self.streams).any(|(below, stream)| *below > stream.logged) {
                return;
            }
            self.marks.pop_front();
        }
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
            dropped: self.dropped,
            records_through: self.records_through,
            open_tools: Vec::new(),
            open_requests: self.requests.iter().copied().collect(),
        }
    }

    /// The next event to append. After one that shows a tool use, [`Self::appended`] has to be called before the next.
    pub fn next(&mut self) -> Option<Emitted> {
        let (ready, mut place) = self.ready.pop_front()?;
        let kind = match ready {
            Ready::Output { stderr, data } => match self.scope {
                Scope::SetUp { stage, .. } => Kind::StageOutput(StageOutput { stage: stage.to_owned(), stderr, data: data.into() }),
                Scope::Turn(_) => Kind::Output(Output { stderr, data }),
            },
            Ready::Dropped { bytes } => Kind::OutputDropped(OutputDropped { bytes }),
            Ready::Event(event, text) => Kind::Agent(AgentEvent { text, ..self.agent_event(event) }),
            Ready::Requested(mut request) => {
                let tool_use = self.tool(request.id).map(|tool| tool.event_id).unwrap_or_default();
                self.mask(&mut request.input_json);
                self.mask(&mut request.diff);
                self.mask(&mut request.reason);
                if tool_use == 0 {
                    // Its own event shows it, under an id that is known once it is in the log.
                    self.awaits_id = Some(OpenTool { journal_id: request.id, event_id: 0, is_mcp: false });
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
                Kind::InputSettled(InputSettled { settled: Some(settled), text, kind: kind.to_owned() })
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
                if let Some(index) = self.open_tools.iter().rposition(|tool| tool.journal_id == result.tool_use) {
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

    /// How a set-up step ended. One that a later step followed ended well, though its end is no longer in the journal.
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

    /// The last that was written to a stream.
    pub fn tail(&self, stderr: bool) -> String {
        let bytes: Vec<u8> = self.streams[usize::from(stderr)].tail.iter().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Adds the pair of a tool use; the oldest goes where there are too many.
pub fn remember(tools: &mut VecDeque<OpenTool>, tool: OpenTool) {
    if tools.len() >= OPEN_TOOLS_MAX {
        tools.pop_front();
    }
    tools.push_back(tool);
}

/// What a reader adds to the checkpoint of an event: the event itself, where it shows a tool use.
pub fn own_tool(kind: Option<&Kind>, id: u64, checkpoint: &mut Checkpoint) {
    let (journal_id, is_mcp) = match kind {
        Some(Kind::Agent(AgentEvent { event: Some(event), is_mcp, .. })) if matches!(event.kind, Some(event::Kind::ToolUse(_))) => {
            (event.id, *is_mcp)
        }
        Some(Kind::DecisionRequested(DecisionRequested { request: Some(request), tool_use: 0 })) => (request.id, false),
        _ => return,
    };
    let mut tools: VecDeque<OpenTool> = std::mem::take(&mut checkpoint.open_tools).into();
    remember(&mut tools, OpenTool { journal_id, event_id: id, is_mcp });
    checkpoint.open_tools = tools.into();
}

fn keep_tail(tail: &mut VecDeque<u8>, data: &[u8]) {
    let data = data.get(data.len().saturating_sub(TAIL_BYTES)..).unwrap_or_default();
    let excess = (tail.len() + data.len()).saturating_sub(TAIL_BYTES);
    tail.drain(..excess);
    tail.extend(data);
}

/// The texts of an event that the agent wrote.
fn texts_of(kind: &mut event::Kind) -> Vec<&mut String> {
    match kind {
        event::Kind::Message(message) => vec![&mut message.text],
        event::Kind::Thinking(thinking) => vec![&mut thinking.text],
        event::Kind::ToolUse(tool) => vec![&mut tool.input_json],
        event::Kind::ToolResult(result) => {
            let changes = result.changes.iter_mut().flat_map(|change| [&mut change.path, &mut change.diff]);
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

#[cfg(test)]
mod tests {
    use contract::host::{
        AgentMessage, Decision, DecisionRequested, DecisionSettled, InputAccepted, InputSettled, StepStarted, ToolResult, ToolUse,
        TurnEnded, TurnStarted,
    };
    use proptest::{collection::vec, prelude::*, sample::Index};

    use super::*;

    const TURN: u32 = 7;
    const SECRET: &str = "sk-sentinel-12345";

    /// A journal: each record with its offset and the next one's.
    type Journal = Vec<(u64, u64, Record)>;

    fn journal(kinds: Vec<record::Kind>) -> Journal {
        let mut offset = 3;
        let place = |kind: record::Kind| {
            let record = Record { at_us: 1, kind: Some(kind) };
            let from = offset;
            offset += 16 + prost::Message::encoded_len(&record) as u64;
            (from, offset, record)
        };
        kinds.into_iter().map(place).collect()
    }

    fn output(stderr: bool, data: &[u8]) -> record::Kind {
        record::Kind::Output(agent_host::Output { stream: i32::from(stderr), data: data.to_vec().into() })
    }

    fn event(id: u64, kind: event::Kind) -> record::Kind {
        record::Kind::Event(agent_host::Event { id, parent: 0, kind: Some(kind) })
    }

    fn tool_use(id: u64, server: &str) -> record::Kind {
        event(id, event::Kind::ToolUse(ToolUse { mcp_server: server.to_owned(), ..ToolUse::default() }))
    }

    fn tool_result(id: u64, of: u64) -> record::Kind {
        event(id, event::Kind::ToolResult(ToolResult { tool_use: of, ..ToolResult::default() }))
    }

    fn started(turn: u32) -> record::Kind {
        record::Kind::TurnStarted(TurnStarted { turn, ..TurnStarted::default() })
    }

    fn ended(turn: u32) -> record::Kind {
        record::Kind::TurnEnded(TurnEnded { turn, ..TurnEnded::default() })
    }

    /// What may stand in a turn, of whatever the agent does.
    fn inside() -> impl Strategy<Value = Vec<record::Kind>> {
        let text = prop_oneof!["[a-z\u{e9}\u{1f600}\n]{0,12}", Just(format!("<{SECRET}>")), Just("sk-sentinel-1".to_owned())];
        let bytes = prop_oneof![4 => text.prop_map(String::into_bytes), 1 => vec(any::<u8>(), 0..6)];
        let piece = prop_oneof![
            6 => (any::<bool>(), bytes).prop_map(|(stderr, data)| (0, stderr, data)),
            4 => (1_u8..7).prop_map(|kind| (kind, false, Vec::new())),
        ];
        (vec(piece, 0..24), vec(any::<Index>(), 0..24)).prop_map(|(pieces, cuts)| {
            let (mut kinds, mut id, mut open, mut asked) = (Vec::new(), 10, Vec::new(), Vec::new());
            for (number, (kind, stderr, data)) in pieces.into_iter().enumerate() {
                id += 1;
                match kind {
                    // Cut anywhere, within characters and secrets.
                    0 => {
                        let cut = cuts.get(number).map_or(0, |cut| cut.index(data.len() + 1));
                        kinds.extend([output(stderr, &data[..cut]), output(stderr, &data[cut..])]);
                    }
                    1 => {
                        open.push(id);
                        kinds.push(tool_use(id, if id % 2 == 0 { "server" } else { "" }));
                    }
                    2 => kinds.extend(open.pop().map(|of| tool_result(id, of))),
                    3 => {
                        let id = format!("input-{id}");
                        let decision = Some(input::Kind::Decision(Decision::default()));
                        let accepted = InputAccepted { input: Some(Input { id: id.clone(), kind: decision }) };
                        kinds.push(record::Kind::InputAccepted(accepted));
                        kinds.push(record::Kind::InputSettled(InputSettled { id, ..InputSettled::default() }));
                    }
                    4 => kinds.extend(open.last().map(|id| {
                        asked.push(*id);
                        record::Kind::DecisionRequested(DecisionRequested { id: *id, ..DecisionRequested::default() })
                    })),
                    // A custom tool's, which no event shows but this one.
                    5 => {
                        asked.push(id);
                        let request = DecisionRequested { id, is_custom_tool: true, ..DecisionRequested::default() };
                        kinds.push(record::Kind::DecisionRequested(request));
                    }
                    _ => kinds
                        .extend(asked.pop().map(|id| record::Kind::DecisionSettled(DecisionSettled { id, ..DecisionSettled::default() }))),
                }
            }
            kinds
        })
    }

    /// The log: each event with its checkpoint. Ids are positions in it.
    #[derive(Clone, Default)]
    struct Log(Vec<(Kind, Checkpoint)>);

    impl Log {
        /// What a successor finds: the newest event's checkpoint and, where that shows a tool use, its own.
        fn checkpoint(&self, beginning: &Checkpoint) -> Checkpoint {
            let Some((kind, checkpoint)) = self.0.last() else { return beginning.clone() };
            let mut checkpoint = checkpoint.clone();
            own_tool(Some(kind), self.0.len() as u64, &mut checkpoint);
            checkpoint
        }

        fn append(&mut self, playback: &mut Playback, most: usize) {
            for _ in 0..most {
                let Some(emitted) = playback.next() else { return };
                let mut checkpoint = Checkpoint { started: true, ..Checkpoint::default() };
                emitted.place.apply(&mut checkpoint);
                self.0.push((emitted.kind, checkpoint));
                playback.appended(self.0.len() as u64);
            }
        }

        /// What a reader sees: both streams as they are joined, and the other events, whose references are to positions among themselves.
        fn seen(&self) -> ([Vec<u8>; 2], Vec<String>) {
            let (mut streams, mut events, mut numbers) = ([Vec::new(), Vec::new()], Vec::new(), HashMap::from([(0, 0)]));
            for (index, (kind, _)) in self.0.iter().enumerate() {
                match kind {
                    Kind::Output(output) => streams[usize::from(output.stderr)].extend_from_slice(&output.data),
                    kind => {
                        numbers.insert(index as u64 + 1, events.len() as u64 + 1);
                        let mut kind = kind.clone();
                        match &mut kind {
                            Kind::Agent(event) => event.tool_use = numbers[&event.tool_use],
                            Kind::DecisionRequested(event) => event.tool_use = numbers[&event.tool_use],
                            Kind::DecisionSettled(event) => event.tool_use = numbers[&event.tool_use],
                            _ => {}
                        }
                        events.push(format!("{kind:?}"));
                    }
                }
            }
            (streams, events)
        }
    }

    fn play_on(
        log: &mut Log,
        journal: &Journal,
        beginning: &Checkpoint,
        (masker, output_bytes_max): (&Masker, u64),
        records: usize,
        events: usize,
        settle: &[bool],
    ) -> bool {
        let checkpoint = log.checkpoint(beginning);
        let mut playback = Playback::new(Scope::Turn(TURN), masker.clone(), output_bytes_max, &checkpoint);
        // A runner that takes over fetches what is not settled.
        for (_, _, record) in journal {
            if let Some(record::Kind::InputAccepted(InputAccepted { input: Some(input) })) = &record.kind {
                playback.knows(input);
            }
        }
        let from = journal.iter().position(|(offset, ..)| *offset == checkpoint.journal_offset).unwrap_or(journal.len());
        for (number, (offset, next, record)) in journal.iter().skip(from).take(records).enumerate() {
            playback.push(*offset, *next, record.clone());
            if settle.get(number % settle.len().max(1)).copied().unwrap_or_default() {
                playback.settle();
                log.append(&mut playback, events);
            }
        }
        log.append(&mut playback, events);
        playback.ended().is_some() && playback.is_drained()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]

        /// Runners that are cut off after any record and any append, one after the other, write what one alone writes: each thing once.
        #[test]
        fn takeovers_at_any_checkpoint_yield_the_same_events_once(
            inside in inside(),
            before in inside(),
            masked: bool,
            runs in vec((0_usize..12, 0_usize..6, vec(any::<bool>(), 1..5)), 0..12),
        ) {
            // An earlier turn, and what an idle CLI says between turns, are no part of this one.
            let kinds = [vec![started(TURN - 1)], before.clone(), vec![ended(TURN - 1)], before, vec![started(TURN)], inside, vec![ended(TURN)]];
            let journal = journal(kinds.concat());
            let masker = if masked { Masker::new([SECRET]) } else { Masker::default() };
            let beginning = Checkpoint { started: true, journal_offset: 3, ..Checkpoint::default() };
            let (mut whole, mut cut) = (Log::default(), Log::default());
            prop_assert!(play_on(&mut whole, &journal, &beginning, (&masker, u64::MAX), usize::MAX, usize::MAX, &[false]));
            for (records, events, settle) in runs {
                play_on(&mut cut, &journal, &beginning, (&masker, u64::MAX), records, events, &settle);
            }
            prop_assert!(play_on(&mut cut, &journal, &beginning, (&masker, u64::MAX), usize::MAX, usize::MAX, &[true]));
            prop_assert_eq!(whole.seen(), cut.seen());
            if masked {
                let (streams, _) = whole.seen();
                prop_assert!(streams.iter().all(|stream| !String::from_utf8_lossy(stream).contains(SECRET)));
            }
            // No piece ends inside a character, nor is one too large for an event.
            for (kind, _) in &cut.0 {
                if let Kind::Output(output) = kind {
                    prop_assert!(output.data.len() <= OUTPUT_EVENT_BYTES_MAX && !output.data.is_empty());
                }
            }
        }

        /// What a checkpoint says is in the log is in the log: the journal below it is not needed any more.
        #[test]
        fn all_below_a_checkpoint_is_in_the_log(inside in inside()) {
            let journal = journal([vec![started(TURN)], inside, vec![ended(TURN)]].concat());
            let beginning = Checkpoint { started: true, journal_offset: 3, ..Checkpoint::default() };
            let masker = Masker::new([SECRET]);
            let mut whole = Log::default();
            play_on(&mut whole, &journal, &beginning, (&masker, u64::MAX), usize::MAX, usize::MAX, &[true]);
            for kept in 0..whole.0.len() {
                let mut log = Log(whole.0[..kept].to_vec());
                let below = log.checkpoint(&beginning).journal_offset;
                let rest: Journal = journal.iter().filter(|(offset, ..)| *offset >= below).cloned().collect();
                play_on(&mut log, &rest, &beginning, (&masker, u64::MAX), usize::MAX, usize::MAX, &[false]);
                prop_assert_eq!(log.seen(), whole.seen(), "from event {}", kept);
            }
        }
    }

    #[test]
    fn neighbouring_output_is_one_event_as_large_as_events_may_be() {
        let data = vec![b'x'; OUTPUT_EVENT_BYTES_MAX / 2 + 1];
        let journal = journal(vec![started(TURN), output(false, &data), output(false, &data), output(true, b"e"), ended(TURN)]);
        let beginning = Checkpoint { started: true, journal_offset: 3, ..Checkpoint::default() };
        let mut log = Log::default();
        play_on(&mut log, &journal, &beginning, (&Masker::default(), u64::MAX), usize::MAX, usize::MAX, &[false]);
        let sizes: Vec<usize> = log.0.iter().map(|(kind, _)| if let Kind::Output(output) = kind { output.data.len() } else { 0 }).collect();
        assert_eq!(sizes, [OUTPUT_EVENT_BYTES_MAX, 2, 1]);
    }

    /// What a turn printed on stdout and on stderr, record by record.
    fn printed() -> impl Strategy<Value = Vec<(bool, usize)>> {
        vec((prop::bool::weighted(0.2), 0_usize..90_000), 0..40)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Beyond the limit the middle is dropped, and the events say how much, wherever runners are cut off.
        #[test]
        fn output_beyond_the_limit_keeps_its_beginning_and_its_end(
            printed in printed(),
            limit in 0_u64..2_000_000,
            runs in vec((0_usize..30, 0_usize..6), 0..8),
        ) {
            let (mut written, mut kinds) = ([Vec::new(), Vec::new()], vec![started(TURN)]);
            for (number, (stderr, length)) in printed.iter().enumerate() {
                let data: Vec<u8> = (0..*length).map(|at| b'a' + ((at + 7 * number) % 26) as u8).collect();
                written[usize::from(*stderr)].extend_from_slice(&data);
                kinds.push(output(*stderr, &data));
                if number % 5 == 4 {
                    kinds.push(tool_use(number as u64, ""));
                }
            }
            kinds.push(ended(TURN));
            let journal = journal(kinds);
            let beginning = Checkpoint { started: true, journal_offset: 3, ..Checkpoint::default() };
            let masker = Masker::default();
            let mut log = Log::default();
            for (records, events) in runs {
                play_on(&mut log, &journal, &beginning, (&masker, limit), records, events, &[true]);
            }
            prop_assert!(play_on(&mut log, &journal, &beginning, (&masker, limit), usize::MAX, usize::MAX, &[true, false]));
            let (kept, _) = log.seen();
            let all: usize = written.iter().map(Vec::len).sum();
            let kept_bytes: usize = kept.iter().map(Vec::len).sum();
            let dropped: u64 = log.0.iter().map(|(kind, _)| if let Kind::OutputDropped(dropped) = kind { dropped.bytes } else { 0 }).sum();
            prop_assert_eq!(kept_bytes as u64 + dropped, all as u64);
            prop_assert_eq!(log.0.last().map_or(0, |(_, checkpoint)| checkpoint.output_dropped), dropped);
            let most = limit + 2 * (TAIL_BYTES + 2 * OUTPUT_EVENT_BYTES_MAX) as u64;
            prop_assert!(kept_bytes as u64 <= most, "{} of {}", kept_bytes, most);
            prop_assert!(dropped == 0 || kept_bytes as u64 >= limit);
            for (kept, written) in kept.iter().zip(&written) {
                let end = kept.len().min(TAIL_BYTES);
                prop_assert!(written.ends_with(&kept[kept.len() - end..]));
                let same = kept.iter().zip(written).take_while(|(kept, written)| kept == written).count();
                prop_assert!(written.ends_with(&kept[same..]));
            }
        }
    }

    #[test]
    fn texts_of_events_show_no_secret() {
        let message = event::Kind::Message(AgentMessage { text: format!("the key is {SECRET}"), aborted: false });
        let journal = journal(vec![started(TURN), event(1, message), ended(TURN)]);
        let beginning = Checkpoint { started: true, journal_offset: 3, ..Checkpoint::default() };
        let mut log = Log::default();
        play_on(&mut log, &journal, &beginning, (&Masker::new([SECRET]), u64::MAX), usize::MAX, usize::MAX, &[false]);
        assert!(format!("{:?}", log.0).contains("the key is ***"));
    }

    /// A successor reads a set-up's journal from its beginning: it knows what was said, and appends what is not in the log.
    #[test]
    fn a_set_up_is_read_again_without_being_told_twice() {
        let step = |id: &str| record::Kind::StepStarted(StepStarted { input_id: id.to_owned(), name: String::new() });
        let end = |id: &str| record::Kind::StepEnded(StepEnded { input_id: id.to_owned(), exit_code: Some(3), ..StepEnded::default() });
        let journal =
            journal(vec![step("a"), output(false, b"one"), end("a"), step("b"), output(false, b"two"), output(true, b"three"), end("b")]);
        let play = |checkpoint: &Checkpoint, records: usize| {
            let scope = Scope::SetUp { stage: "provision_setup", logged_below: checkpoint.journal_offset };
            let mut playback = Playback::new(scope, Masker::default(), u64::MAX, checkpoint);
            journal.iter().take(records).for_each(|(offset, next, record)| playback.push(*offset, *next, record.clone()));
            playback.settle();
            let (mut said, mut last) = (String::new(), checkpoint.clone());
            while let Some(emitted) = playback.next() {
                if let Kind::StageOutput(output) = &emitted.kind {
                    said.push_str(std::str::from_utf8(&output.data).unwrap());
                }
                emitted.place.apply(&mut last);
            }
            (said, last, playback)
        };
        let beginning = Checkpoint::default();
        assert_eq!(play(&beginning, 7).0, "onetwothree");
        for cut in 0..7 {
            let (first, checkpoint, _) = play(&beginning, cut);
            let (second, _, playback) = play(&checkpoint, 7);
            assert_eq!(first + &second, "onetwothree", "cut after {cut}");
            assert_eq!((playback.tail(false), playback.tail(true)), ("two".to_owned(), "three".to_owned()));
            assert_eq!(playback.step("a", &[]).unwrap().exit_code, Some(3));
        }
    }
}
