//! What was read of an agent's standard output and standard error, and how much of it is in the
//! log.

use std::collections::VecDeque;

use bytes::BytesMut;

/// How much of each stream's end is kept, for the diagnosis of a failure and as the end of output
/// that is dropped.
pub const TAIL_BYTES: usize = 64 << 10;

#[derive(Debug, Default)]
pub struct Stream {
    /// Bytes of the scope in the journal below the position, and of those in the log or dropped.
    pub seen: u64,
    pub logged: u64,
    /// What was read and is not in the log.
    pub held: BytesMut,
    pub tail: VecDeque<u8>,
}

/// A record of output that is not wholly in the log, and how much output the journal has below it.
#[derive(Debug, Clone, Copy)]
pub struct Mark {
    pub offset: u64,
    pub below: [u64; 2],
}

impl Stream {
    /// Keeps the end of what was read.
    pub fn keep_tail(&mut self, data: &[u8]) {
        let data = data.get(data.len().saturating_sub(TAIL_BYTES)..).unwrap_or_default();
        let excess = (self.tail.len() + data.len()).saturating_sub(TAIL_BYTES);
        self.tail.drain(..excess);
        self.tail.extend(data);
    }
}
