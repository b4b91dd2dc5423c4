//! An event to append, and what its checkpoint says of the journal.

use contract::session::{Checkpoint, OpenTool, session_event::Kind};
use prost::Message as _;

/// An event to append, with what its checkpoint says.
#[derive(Debug, PartialEq)]
pub struct Emitted {
    pub kind: Kind,
    pub place: Place,
}

/// The size that even a small event counts as, since storing and sending it has a fixed cost.
pub(super) const EVENT_BYTES_MIN: usize = 512;

impl Emitted {
    /// Bytes that the agent caused: a program in its CLI's place may tell and ask as fast as it
    /// prints.
    pub fn output_bytes(&self) -> usize {
        match &self.kind {
            Kind::Output(output) => output.data.len(),
            Kind::StageOutput(output) => output.data.len(),
            // What is dropped has been read all the same.
            Kind::OutputDropped(dropped) => usize::try_from(dropped.bytes).unwrap_or(usize::MAX),
            Kind::Agent(event) => event.encoded_len().max(EVENT_BYTES_MIN),
            Kind::DecisionRequested(requested) => requested.encoded_len().max(EVENT_BYTES_MIN),
            _ => 0,
        }
    }
}

/// The part of a checkpoint that a playback moves.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Place {
    pub journal_offset: u64,
    pub journal: [u64; 2],
    pub logged: [u64; 2],
    pub dropped: u64,
    pub event_bytes: u64,
    pub records_through: u64,
    pub open_tools: Vec<OpenTool>,
    pub open_requests: Vec<u64>,
}

impl Place {
    pub fn apply(self, checkpoint: &mut Checkpoint) {
        checkpoint.journal_offset = self.journal_offset;
        [checkpoint.journal_stdout, checkpoint.journal_stderr] = self.journal;
        [checkpoint.stdout_offset, checkpoint.stderr_offset] = self.logged;
        checkpoint.output_dropped = self.dropped;
        checkpoint.event_bytes = self.event_bytes;
        checkpoint.records_through = self.records_through;
        checkpoint.open_tools = self.open_tools;
        checkpoint.open_requests = self.open_requests;
    }
}
