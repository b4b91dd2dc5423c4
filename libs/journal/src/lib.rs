//! The frames of the agent host's journal.
//!
//! A journal is a sequence of [`Record`]s at ascending offsets. Each lies in a frame: its offset in
//! the journal (u64), the payload's length (u32), a CRC-32 of both and of the payload (u32), all
//! little-endian, then the payload. A frame that is cut off, damaged, repeated, or read at another
//! offset than its own is never mistaken for a record.
//!
//! `agent-host attach` writes the same frames to its standard output, with [`Control`] frames
//! between them at the offset [`OUTSIDE`], and reads [`Input`]s in frames at that offset.

use contract::host::{Control, Input, Record};
use prost::Message as _;

/// The offset of frames that do not belong to the journal.
pub const OUTSIDE: u64 = u64::MAX;
pub const HEADER_BYTES: usize = 16;
/// The largest payload.
pub const PAYLOAD_BYTES_MAX: usize = 4 << 20;

/// The bytes are not a frame, and cannot become one with more bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the bytes at journal offset {offset} are not a frame")]
pub struct Damaged {
    pub offset: u64,
}

/// What some bytes begin with.
#[derive(Debug, PartialEq, Eq)]
pub enum Found<'a> {
    /// A whole frame; its size is that of the payload and [`HEADER_BYTES`].
    Frame {
        offset: u64,
        payload: &'a [u8],
    },
    /// The beginning of a frame.
    Incomplete,
    Damaged,
}

fn checksum(header: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header);
    hasher.update(payload);
    hasher.finalize()
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// Appends a frame.
///
/// Payloads over [`PAYLOAD_BYTES_MAX`] make frames that no reader accepts: writers keep to it.
pub fn encode(offset: u64, payload: &[u8], into: &mut Vec<u8>) {
    let start = into.len();
    into.extend_from_slice(&offset.to_le_bytes());
    into.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes());
    let sum = checksum(into.get(start..).unwrap_or_default(), payload);
    into.extend_from_slice(&sum.to_le_bytes());
    into.extend_from_slice(payload);
}

/// The frame of a record at its offset.
#[must_use]
pub fn record_frame(offset: u64, record: &Record) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER_BYTES + record.encoded_len());
    encode(offset, &record.encode_to_vec(), &mut frame);
    frame
}

/// The frame of an input, as `attach` reads it.
#[must_use]
pub fn input_frame(input: &Input) -> Vec<u8> {
    let mut frame = Vec::new();
    encode(OUTSIDE, &input.encode_to_vec(), &mut frame);
    frame
}

/// The frame of a control message, as `attach` writes it.
#[must_use]
pub fn control_frame(control: &Control) -> Vec<u8> {
    let mut frame = Vec::new();
    encode(OUTSIDE, &control.encode_to_vec(), &mut frame);
    frame
}

/// Finds the frame at the beginning of `bytes`, whatever its offset.
#[must_use]
pub fn find(bytes: &[u8]) -> Found<'_> {
    let (Some(offset), Some(length), Some(sum)) =
        (array(bytes, 0), array(bytes, 8), array(bytes, 12))
    else {
        return Found::Incomplete;
    };
    let length = u32::from_le_bytes(length) as usize;
    if length > PAYLOAD_BYTES_MAX {
        return Found::Damaged;
    }
    let Some(payload) = bytes.get(HEADER_BYTES..HEADER_BYTES + length) else {
        return Found::Incomplete;
    };
    if checksum(bytes.get(..12).unwrap_or_default(), payload) != u32::from_le_bytes(sum) {
        return Found::Damaged;
    }
    Found::Frame { offset: u64::from_le_bytes(offset), payload }
}

/// A frame that a [`Decoder`] found.
#[derive(Debug, Clone, PartialEq)]
pub enum Frame {
    /// A record, and the offset of the record after it: a reader's checkpoint.
    Record {
        offset: u64,
        next: u64,
        /// Its kind is absent if this release does not know it.
        record: Record,
    },
    Control(Control),
    Input(Input),
}

/// What frames at [`OUTSIDE`] hold on a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outside {
    Controls,
    Inputs,
}

/// Finds the frames of a stream, however its bytes are cut.
#[derive(Debug)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Length of the frames at the beginning of the buffer that were returned.
    taken: usize,
    offset: u64,
    outside: Outside,
}

impl Decoder {
    /// Reads what `attach --from OFFSET` writes, or a journal from that offset.
    #[must_use]
    pub const fn new(offset: u64) -> Self {
        Self { buffer: Vec::new(), taken: 0, offset, outside: Outside::Controls }
    }

    /// Reads inputs.
    #[must_use]
    pub const fn of_inputs() -> Self {
        Self { buffer: Vec::new(), taken: 0, offset: 0, outside: Outside::Inputs }
    }

    /// Where the next record begins: where a reader continues.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes that are not yet a whole frame.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.buffer.len() - self.taken
    }

    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// Returns the next whole frame; none if more bytes are needed.
    ///
    /// # Errors
    /// When the bytes are not a frame, or a record does not continue the one before. Then the
    /// stream is unusable: open a new one at [`Self::offset`].
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator would hide that more bytes may follow"
    )]
    pub fn next(&mut self) -> Result<Option<Frame>, Damaged> {
        let damaged = Damaged { offset: self.offset };
        let (offset, payload) = match find(self.buffer.get(self.taken..).unwrap_or_default()) {
            Found::Incomplete => return Ok(None),
            Found::Damaged => return Err(damaged),
            Found::Frame { offset, payload } => (offset, payload),
        };
        let bytes = HEADER_BYTES + payload.len();
        let frame = match (offset, self.outside) {
            (OUTSIDE, Outside::Controls) => {
                Frame::Control(Control::decode(payload).map_err(|_| damaged)?)
            }
            (OUTSIDE, Outside::Inputs) => {
                Frame::Input(Input::decode(payload).map_err(|_| damaged)?)
            }
            (_, Outside::Controls) if offset == self.offset => {
                let next = offset + bytes as u64;
                Frame::Record {
                    offset,
                    next,
                    record: Record::decode(payload).map_err(|_| damaged)?,
                }
            }
            _ => return Err(damaged),
        };
        if let Frame::Record { next, .. } = &frame {
            self.offset = *next;
        }
        self.taken += bytes;
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use contract::host::{Alive, Output, control, record};
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn output(data: Vec<u8>) -> Record {
        Record {
            at_us: 1,
            kind: Some(record::Kind::Output(Output { stream: 0, data: data.into() })),
        }
    }

    /// Frames in a row from an offset, and the offset after each.
    fn journal(start: u64, records: &[Record]) -> (Vec<u8>, Vec<u64>) {
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        for record in records {
            bytes.extend(record_frame(start + bytes.len() as u64, record));
            ends.push(start + bytes.len() as u64);
        }
        (bytes, ends)
    }

    fn read(decoder: &mut Decoder) -> (Vec<Record>, bool) {
        let mut records = Vec::new();
        loop {
            match decoder.next() {
                Ok(Some(Frame::Record { record, .. })) => records.push(record),
                Ok(Some(_)) => {}
                Ok(None) => return (records, true),
                Err(_) => return (records, false),
            }
        }
    }

    fn records() -> impl Strategy<Value = Vec<Record>> {
        vec(vec(any::<u8>(), 0..40).prop_map(output), 1..8)
    }

    proptest! {
        #[test]
        fn a_cut_journal_yields_exactly_the_records_that_are_whole(records in records(), start in 0_u64..1 << 40) {
            let (bytes, ends) = journal(start, &records);
            for cut in 0..=bytes.len() {
                let mut decoder = Decoder::new(start);
                decoder.push(&bytes[..cut]);
                let whole = ends.iter().filter(|end| **end <= start + cut as u64).count();
                let (read, ok) = read(&mut decoder);
                prop_assert!(ok && read == records[..whole]);
                prop_assert_eq!(decoder.offset(), if whole == 0 { start } else { ends[whole - 1] });
                // The remaining bytes yield the remaining records.
                decoder.push(&bytes[cut..]);
                prop_assert_eq!(self::read(&mut decoder).0, &records[whole..]);
            }
        }

        #[test]
        fn damage_is_never_taken_for_a_record(records in records(), at in any::<prop::sample::Index>(), flip in 1_u8..=255) {
            let (mut bytes, ends) = journal(7, &records);
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            let whole = ends.iter().filter(|end| **end <= 7 + at as u64).count();
            let mut decoder = Decoder::new(7);
            decoder.push(&bytes);
            prop_assert_eq!(read(&mut decoder).0, &records[..whole]);
        }

        #[test]
        fn garbage_behind_a_journal_adds_nothing(records in records(), garbage in vec(any::<u8>(), 0..80)) {
            let (mut bytes, _) = journal(0, &records);
            bytes.extend(garbage);
            let mut decoder = Decoder::new(0);
            decoder.push(&bytes);
            prop_assert_eq!(read(&mut decoder).0, records);
        }

        #[test]
        fn a_frame_that_is_repeated_left_out_or_moved_is_refused(records in records(), pick in any::<prop::sample::Index>(), repeat: bool) {
            let (bytes, ends) = journal(0, &records);
            let index = pick.index(records.len());
            let start = if index == 0 { 0 } else { ends[index - 1] } as usize;
            let end = ends[index] as usize;
            let changed = if repeat { [&bytes[..end], &bytes[start..]].concat() } else { [&bytes[..start], &bytes[end..]].concat() };
            let mut decoder = Decoder::new(0);
            decoder.push(&changed);
            let (read, ok) = read(&mut decoder);
            prop_assert_eq!(read.len(), if repeat { index + 1 } else { index });
            prop_assert!(!ok || (!repeat && index + 1 == records.len()));
        }

        #[test]
        fn arbitrary_bytes_neither_panic_nor_fill_memory(bytes in vec(any::<u8>(), 0..200), cut in 1_usize..40) {
            let mut decoder = Decoder::of_inputs();
            for part in bytes.chunks(cut) {
                decoder.push(part);
                while let Ok(Some(_)) = decoder.next() {}
                prop_assert!(decoder.pending() <= HEADER_BYTES + PAYLOAD_BYTES_MAX);
            }
        }
    }

    #[test]
    fn control_frames_stand_between_records_and_move_no_offset() {
        let alive = Control { kind: Some(control::Kind::Alive(Alive::default())) };
        let one = record_frame(0, &output(b"one".to_vec()));
        let two = record_frame(one.len() as u64, &output(b"two".to_vec()));
        let mut decoder = Decoder::new(0);
        decoder.push(&[one.clone(), control_frame(&alive), two.clone()].concat());
        assert!(matches!(decoder.next(), Ok(Some(Frame::Record { .. }))));
        assert_eq!(decoder.next(), Ok(Some(Frame::Control(alive))));
        assert!(matches!(decoder.next(), Ok(Some(Frame::Record { .. }))));
        assert_eq!(decoder.offset(), (one.len() + two.len()) as u64);
    }

    #[test]
    fn unknown_fields_of_a_later_release_are_skipped() {
        // Field 99, a string: a kind that does not exist yet.
        let payload = [&[0x08, 0x05][..], &[0x9a, 0x06, 0x02, b'h', b'i'][..]].concat();
        let mut frame = Vec::new();
        encode(0, &payload, &mut frame);
        let mut decoder = Decoder::new(0);
        decoder.push(&frame);
        let Ok(Some(Frame::Record { record, .. })) = decoder.next() else { panic!("not read") };
        assert_eq!((record.at_us, record.kind), (5, None));
    }
}
