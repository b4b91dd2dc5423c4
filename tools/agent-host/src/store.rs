//! The journal's files: one folder of segments, each named by the offset at which it begins.
//!
//! Only the process that holds the host's lock writes. A record that was cut by a kill is removed
//! when the next host opens the journal. Each segment's room is reserved on the disk when it is
//! created, with [`RESERVED_BYTES`] more for [`Store::append_last`], so that a turn's end can be
//! written when the disk is full.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use contract::host::{Record, record};
use journal::{Found, HEADER_BYTES};
use prost::Message as _;
use rustix::fs::{FallocateFlags, fallocate};

use crate::{now_us, state::State};

pub const SEGMENT_BYTES: u64 = 4 << 20;
pub const RESERVED_BYTES: u64 = 512 << 10;
const SUFFIX: &str = ".seg";

/// The disk has no room for a further record.
#[derive(Debug)]
pub enum NotWritten {
    Full,
    Failed(io::Error),
}

/// A segment that is not whole yet.
const DRAFT: &str = "draft";

pub fn segment_path(folder: &Path, start: u64) -> PathBuf {
    folder.join(format!("{start:020}{SUFFIX}"))
}

/// Where the segments begin, ascending.
pub fn segments(folder: &Path) -> io::Result<Vec<u64>> {
    let names =
        fs::read_dir(folder)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut starts: Vec<u64> =
        names.filter_map(|name| name.strip_suffix(SUFFIX)?.parse().ok()).collect();
    starts.sort_unstable();
    Ok(starts)
}

#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    segment_bytes: u64,
    file: File,
    /// Where the last segment, and where the first one begins.
    start: u64,
    first: u64,
    end: u64,
    pub state: State,
}

impl Store {
    /// Opens the journal, or creates it, and removes a record that was cut.
    pub fn open(folder: &Path, segment_bytes: u64) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let _ = fs::remove_file(folder.join(DRAFT));
        let mut starts = segments(folder)?;
        while let Some(start) = starts.last().copied() {
            let file =
                OpenOptions::new().read(true).write(true).open(segment_path(folder, start))?;
            let (state, bytes) = replay(&file, start)?;
            // A segment that was created last and holds nothing yet tells less than the one before
            // it.
            if bytes == 0 && starts.len() > 1 {
                fs::remove_file(segment_path(folder, start))?;
                starts.pop();
                continue;
            }
            file.set_len(bytes)?;
            reserve(&file, segment_bytes);
            let first = starts.first().copied().unwrap_or(start);
            return Ok(Self {
                folder: folder.to_owned(),
                segment_bytes,
                file,
                start,
                first,
                end: start + bytes,
                state,
            });
        }
        let file = create(&segment_path(folder, 0))?;
        reserve(&file, segment_bytes);
        Ok(Self {
            folder: folder.to_owned(),
            segment_bytes,
            file,
            start: 0,
            first: 0,
            end: 0,
            state: State::default(),
        })
    }

    /// Bytes between the oldest record that is kept and the end.
    pub fn bytes(&self) -> u64 {
        self.end - self.first
    }

    #[cfg(test)]
    const fn end(&self) -> u64 {
        self.end
    }

    pub fn append(&mut self, kind: record::Kind) -> Result<(), NotWritten> {
        let record = Record { at_us: now_us(), kind: Some(kind) };
        let bytes = (HEADER_BYTES + record.encoded_len()) as u64;
        if self.end > self.start && self.end - self.start + bytes > self.segment_bytes {
            self.rotate()?;
        }
        self.write(&record)
    }

    /// Appends a record that must not fail for lack of room: into the room that is reserved for it.
    pub fn append_last(&mut self, kind: record::Kind) -> Result<(), NotWritten> {
        match self.append(kind.clone()) {
            Err(NotWritten::Full) => self.write(&Record { at_us: now_us(), kind: Some(kind) }),
            written => written,
        }
    }

    fn write(&mut self, record: &Record) -> Result<(), NotWritten> {
        let frame = journal::record_frame(self.end, record);
        if let Err(error) = self.file.write_all_at(&frame, self.end - self.start) {
            self.erase(frame.len());
            return Err(not_written(error));
        }
        self.end += frame.len() as u64;
        self.state.apply(record);
        Ok(())
    }

    /// Overwrites what a failed write left behind the end: bytes of the agent's, which must never
    /// be read as a frame.
    fn erase(&self, bytes: usize) {
        let end = self.end - self.start;
        let length = self.file.metadata().map_or(0, |metadata| metadata.len());
        let left = usize::try_from(length.saturating_sub(end)).unwrap_or(0).min(bytes);
        // The blocks are there: they were written a moment ago.
        let _ = self.file.write_all_at(&vec![0; left], end);
    }

    /// Continues in a new segment. It gets its name only once it is whole: a reader keeps a segment
    /// open that it has found, and would wait for ever in one that was taken back.
    fn rotate(&mut self) -> Result<(), NotWritten> {
        let draft = self.folder.join(DRAFT);
        let begun = self.begin_segment(&draft);
        if begun.is_err() {
            let _ = fs::remove_file(&draft);
        }
        let (file, bytes) = begun?;
        // What was reserved for the former segment and not used.
        let _ = self.file.set_len(self.end - self.start);
        self.file = file;
        self.start = self.end;
        self.end += bytes;
        Ok(())
    }

    /// The next segment with its snapshot, and the snapshot's bytes.
    fn begin_segment(&self, draft: &Path) -> Result<(File, u64), NotWritten> {
        let file = create(draft).map_err(not_written)?;
        let snapshot =
            Record { at_us: now_us(), kind: Some(record::Kind::Snapshot(self.state.snapshot())) };
        let frame = journal::record_frame(self.end, &snapshot);
        if !reserve(&file, self.segment_bytes) {
            return Err(NotWritten::Full);
        }
        file.write_all_at(&frame, 0).map_err(not_written)?;
        fs::rename(draft, segment_path(&self.folder, self.end)).map_err(not_written)?;
        Ok((file, frame.len() as u64))
    }

    /// Deletes the segments that lie below an offset. The last one stays.
    pub fn delete_below(&mut self, offset: u64) -> io::Result<()> {
        let starts = segments(&self.folder)?;
        for pair in starts.windows(2) {
            let &[start, next] = pair else { break };
            if next > offset || next > self.start {
                break;
            }
            fs::remove_file(segment_path(&self.folder, start))?;
            self.first = next;
        }
        Ok(())
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path)
}

/// Reserves space for a segment. Returns false if there is none; if the file system cannot reserve,
/// writes fail later.
fn reserve(file: &File, segment_bytes: u64) -> bool {
    !matches!(
        fallocate(file, FallocateFlags::KEEP_SIZE, 0, segment_bytes + RESERVED_BYTES),
        Err(rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT)
    )
}

fn not_written(error: io::Error) -> NotWritten {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::WriteZero => {
            NotWritten::Full
        }
        _ => NotWritten::Failed(error),
    }
}

/// The state at a segment's end, and how many of its bytes are whole records.
fn replay(file: &File, start: u64) -> io::Result<(State, u64)> {
    let length = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0)?;
    let mut state = State::default();
    let mut end = 0;
    while let Found::Frame { offset, payload } = journal::find(bytes.get(end..).unwrap_or_default())
    {
        let Ok(record) = Record::decode(payload) else { break };
        if offset != start + end as u64 {
            break;
        }
        state.apply(&record);
        end += HEADER_BYTES + payload.len();
    }
    Ok((state, end as u64))
}

#[cfg(test)]
mod tests {
    use contract::host::{
        Event, Input, InputAccepted, InputSettled, Message, Output, TurnEnded, TurnStarted, input,
        output,
    };
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn kinds() -> impl Strategy<Value = Vec<record::Kind>> {
        let input = |id: u8| {
            let message = Message { text: "x".repeat(usize::from(id)), ..Message::default() };
            Input { id: format!("i{}", id % 7), kind: Some(input::Kind::Message(message)) }
        };
        let kind = prop_oneof![
            vec(any::<u8>(), 0..60).prop_map(|data| record::Kind::Output(Output {
                stream: output::Stream::Stderr.into(),
                data: data.into()
            })),
            any::<u8>().prop_map(move |id| record::Kind::InputAccepted(InputAccepted {
                input: Some(input(id))
            })),
            (0_u8..7).prop_map(|id| record::Kind::InputSettled(InputSettled {
                id: format!("i{id}"),
                ..InputSettled::default()
            })),
            (0_u8..7).prop_map(|id| record::Kind::TurnStarted(TurnStarted {
                input_id: format!("i{id}"),
                ..TurnStarted::default()
            })),
            Just(record::Kind::TurnEnded(TurnEnded::default())),
            (1_u64..9).prop_map(|id| record::Kind::Event(Event { id, ..Event::default() })),
        ];
        vec(kind, 1..30)
    }

    fn whole(folder: &Path) -> Vec<u8> {
        let starts = segments(folder).unwrap();
        starts
            .into_iter()
            .flat_map(|start| fs::read(segment_path(folder, start)).unwrap())
            .collect()
    }

    fn decode(bytes: &[u8], from: u64) -> Vec<record::Kind> {
        let mut decoder = journal::Decoder::new(from);
        decoder.push(bytes);
        let mut kinds = Vec::new();
        while let Ok(Some(journal::Frame::Record { record, .. })) = decoder.next() {
            kinds.extend(record.kind.filter(|kind| !matches!(kind, record::Kind::Snapshot(_))));
        }
        kinds
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// A kill between any two bytes of the last segment: everything before is there, the state
        /// is that of what is there, and the journal continues.
        #[test]
        fn a_journal_cut_anywhere_opens_at_its_last_whole_record(kinds in kinds(), cut in any::<prop::sample::Index>()) {
            let folder = tempfile::tempdir().unwrap();
            let mut store = Store::open(folder.path(), 256).unwrap();
            for kind in &kinds {
                store.append(kind.clone()).unwrap();
            }
            let last = segment_path(folder.path(), store.start);
            drop(store);
            let bytes = fs::read(&last).unwrap();
            fs::write(&last, &bytes[..cut.index(bytes.len() + 1)]).unwrap();
            let mut store = Store::open(folder.path(), 256).unwrap();
            let kept = decode(&whole(folder.path()), 0);
            prop_assert_eq!(&kept[..], &kinds[..kept.len()]);
            let mut expected = State::default();
            kept.iter().for_each(|kind| expected.apply(&Record { at_us: 0, kind: Some(kind.clone()) }));
            prop_assert_eq!(&store.state, &expected);
            store.append(kinds[0].clone()).unwrap();
            prop_assert_eq!(decode(&whole(folder.path()), 0).len(), kept.len() + 1);
        }

        /// What is persisted may go; a host that opens what is left knows all that was open.
        #[test]
        fn deleting_segments_loses_no_state(kinds in kinds(), offset in any::<prop::sample::Index>()) {
            let folder = tempfile::tempdir().unwrap();
            let mut store = Store::open(folder.path(), 256).unwrap();
            for kind in &kinds {
                store.append(kind.clone()).unwrap();
            }
            let (end, state) = (store.end(), store.state.clone());
            let offset = offset.index(usize::try_from(end).unwrap() + 1) as u64;
            let before = decode(&whole(folder.path()), 0);
            store.delete_below(offset).unwrap();
            let first = segments(folder.path()).unwrap()[0];
            prop_assert!(first <= offset && store.bytes() == end - first);
            prop_assert!(before.ends_with(&decode(&whole(folder.path()), first)));
            drop(store);
            let store = Store::open(folder.path(), 256).unwrap();
            prop_assert_eq!((store.end(), &store.state), (end, &state));
        }
    }

    #[test]
    fn a_segment_without_its_first_record_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), 256).unwrap();
        store
            .append(record::Kind::TurnStarted(TurnStarted { turn: 3, ..TurnStarted::default() }))
            .unwrap();
        let end = store.end();
        drop(store);
        fs::write(segment_path(folder.path(), end), [0; 9]).unwrap();
        let store = Store::open(folder.path(), 256).unwrap();
        assert_eq!((store.end(), store.state.turn.map(|turn| turn.turn)), (end, Some(3)));
        assert_eq!(segments(folder.path()).unwrap(), [0]);
    }
}
