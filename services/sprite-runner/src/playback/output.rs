//! Output of an agent: what may be appended of it, what is held back, and what is dropped beyond
//! the limit.

use bytes::BytesMut;
use contract::host as agent_host;
use types::limits::OUTPUT_EVENT_BYTES_MAX;

use crate::{
    mask::Piece,
    playback::{
        Playback, Ready, Scope,
        streams::{Mark, TAIL_BYTES},
    },
};

/// How much journal may follow output that is held back.
const HELD_BACK_MAX: u64 = 16 << 20;

/// How much output is dropped between two events that say so. Less than what the runner keeps of
/// the journal.
const DROPPED_STEP: u64 = 4 << 20;

impl Playback {
    pub(super) fn push_output(&mut self, offset: u64, next: u64, output: &agent_host::Output) {
        let stderr = output.stream == agent_host::output::Stream::Stderr as i32;
        if self.newest.is_some_and(|newest| newest != stderr) {
            self.flush(false);
        }
        let below = [self.streams[0].seen, self.streams[1].seen];
        let stream = &mut self.streams[usize::from(stderr)];
        stream.keep_tail(&output.data);
        self.position = next;
        if matches!(self.scope, Scope::SetUp { logged_below, .. } if offset < logged_below) {
            return;
        }
        let known = stream.logged + stream.held.len() as u64;
        stream.seen += output.data.len() as u64;
        let new = usize::try_from(stream.seen.saturating_sub(known))
            .unwrap_or(usize::MAX)
            .min(output.data.len());
        if new == 0 {
            return;
        }
        stream
            .held
            .extend_from_slice(output.data.get(output.data.len() - new..).unwrap_or_default());
        self.marks.push_back(Mark { offset, below });
        if self.marks.front().is_some_and(|oldest| offset - oldest.offset > HELD_BACK_MAX) {
            // The other stream has held back its last bytes for so long that the journal could not
            // be deleted.
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

    /// Emits what is held; at the end of the turn or the step (`last`) also the end of output that
    /// exceeds the limit.
    pub(super) fn flush(&mut self, last: bool) {
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

    /// Leaves an event out of the log, because the turn exceeds the limit of typed events.
    pub(super) fn drop_event(&mut self, next: u64, bytes: u64) {
        self.flush(false);
        (self.position, self.records_through) = (next, next);
        self.untold += bytes;
        if self.untold >= DROPPED_STEP {
            self.tell_dropped();
        }
    }

    /// No other event's checkpoint covers bytes that were dropped silently.
    pub(super) fn tell_dropped(&mut self) {
        let bytes = std::mem::take(&mut self.untold);
        if bytes > 0 {
            self.emit(Ready::Dropped { bytes });
        }
    }

    /// A record is in the log when what the journal has below the next one is.
    fn drop_marks(&mut self) {
        while !self.marks.is_empty() {
            let below = self
                .marks
                .get(1)
                .map_or([self.streams[0].seen, self.streams[1].seen], |next| next.below);
            if below.iter().zip(&self.streams).any(|(below, stream)| *below > stream.logged) {
                return;
            }
            self.marks.pop_front();
        }
    }

    /// The last that was written to a stream.
    pub fn tail(&self, stderr: bool) -> String {
        let bytes: Vec<u8> = self.streams[usize::from(stderr)].tail.iter().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}
