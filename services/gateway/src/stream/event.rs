//! What clients see of an event. Encoded once, and shared by all who read it.

use std::{
    io::{self, Write as _},
    sync::OnceLock,
};

use bytes::Bytes;
use contract::session::{Output, SessionEvent, session_event::Kind};
use prost::Message as _;
use serde::Serialize;
use serde_json::ser::Formatter;
use utoipa::ToSchema;

use crate::stream::typed::TypedEvent;

pub const TERMINATED: &str = "Session terminated";

/// An event of a session's log.
#[derive(Debug)]
pub struct Event {
    pub id: u64,
    pub turn: u32,
    pub kind: Visible,
    /// All of it, where it is not output.
    source: Option<Box<SessionEvent>>,
    typed: OnceLock<Option<Bytes>>,
}

/// What an event is to a reader.
#[derive(Debug)]
pub enum Visible {
    /// A stage: its lines as they are sent.
    Stage(Bytes),
    /// Output: preceded by `turn_start` where the turn is new to the connection.
    Output(Bytes),
    /// A turn's end: sent only while it is the current turn's.
    TurnEnd(Bytes),
    Terminated(Bytes),
    /// Something between ourselves.
    Hidden,
}

/// What a stream carries.
#[derive(Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum StreamEvent<'a> {
    /// First on every connection.
    Start { runtime: &'a str, provider: Option<&'a str>, session_id: String },
    /// Provisioning continues.
    Stage {
        id: u64,
        stage: &'a str,
        /// `started`, `done` or `failed`.
        state: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        duration_ms: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        message: Option<&'a str>,
        /// True if the result was restored from an image instead of being built.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        restored: bool,
    },
    /// Before a turn's first output on this connection. Without an `id:` line.
    TurnStart { id: u64, turn: u32 },
    /// What the agent prints.
    #[expect(dead_code, reason = "describes what OutputFrame writes")]
    Output {
        id: u64,
        /// `stdout` or `stderr`.
        stream: &'a str,
        data: &'a str,
        turn: u32,
    },
    /// The current turn exited: the stream ends.
    Exit { id: u64, code: i32, turn: u32 },
    /// The current turn failed without an exit code: the stream ends.
    Error { id: u64, message: &'a str, turn: u32 },
    /// The session was terminated: the stream ends.
    Terminated { id: u64, message: &'a str },
    /// There was no event for a long time: this connection ends.
    Stale { id: u64, message: &'a str },
}

impl Event {
    /// Reads an event of the log. One that cannot be read is hidden.
    #[must_use]
    pub fn decode(id: u64, payload: Bytes) -> Self {
        Self::new(id, SessionEvent::decode(payload).unwrap_or_default())
    }

    /// As [`Self::decode`], for those who read the typed view alone: output is hidden.
    #[must_use]
    pub fn decode_typed(id: u64, payload: Bytes) -> Self {
        let mut event = SessionEvent::decode(payload).unwrap_or_default();
        event.kind = event.kind.filter(|kind| !matches!(kind, Kind::Output(_)));
        Self::new(id, event)
    }

    #[must_use]
    pub fn new(id: u64, event: SessionEvent) -> Self {
        let turn = event.turn;
        if let Some(Kind::Output(output)) = event.kind {
            return Self::shown(
                id,
                turn,
                Visible::Output(OutputFrame::new(id, turn, output).whole()),
            );
        }
        let kind = match &event.kind {
            Some(Kind::Stage(stage)) => Visible::Stage(frame(
                id,
                &StreamEvent::Stage {
                    id,
                    stage: &stage.stage,
                    state: &stage.state,
                    duration_ms: stage.duration_ms,
                    message: stage.message.as_deref(),
                    restored: stage.restored,
                },
            )),
            Some(Kind::TurnEnded(ended)) => {
                Visible::TurnEnd(match (ended.exit_code, &ended.failure) {
                    (Some(code), _) => frame(id, &StreamEvent::Exit { id, code, turn }),
                    (None, failure) => {
                        let message = failure
                            .as_ref()
                            .map_or("Session failed", |failure| failure.message.as_str());
                        frame(id, &StreamEvent::Error { id, message, turn })
                    }
                })
            }
            Some(Kind::Terminated(_)) => {
                Visible::Terminated(frame(id, &StreamEvent::Terminated { id, message: TERMINATED }))
            }
            // GET /sessions/{id}/events shows what is not raw output.
            Some(
                Kind::Output(_)
                | Kind::TurnStarted(_)
                | Kind::TakenOver(_)
                | Kind::Agent(_)
                | Kind::StageOutput(_)
                | Kind::DecisionRequested(_)
                | Kind::DecisionSettled(_)
                | Kind::InputSettled(_)
                | Kind::Deleted(_)
                | Kind::Updated(_)
                | Kind::ModelRequestStarted(_)
                | Kind::ModelRequestEnded(_)
                | Kind::BudgetNotice(_)
                | Kind::OutputDropped(_),
            )
            | None => Visible::Hidden,
        };
        Self { source: Some(Box::new(event)), ..Self::shown(id, turn, kind) }
    }

    pub fn shown(id: u64, turn: u32, kind: Visible) -> Self {
        Self { id, turn, kind, source: None, typed: OnceLock::new() }
    }

    /// The entry of the log, where it is not output.
    pub fn source(&self) -> Option<&SessionEvent> {
        self.source.as_deref()
    }

    /// Reports that the session is idle: the event that is looked for precedes it.
    pub fn is_update(&self) -> bool {
        matches!(
            self.source.as_ref().and_then(|source| source.kind.as_ref()),
            Some(Kind::Updated(_))
        )
    }

    /// A client that sees it may ask for what it changed: it is shown once that is persisted.
    pub fn changes_state(&self) -> bool {
        let kind = self.source.as_ref().and_then(|source| source.kind.as_ref());
        matches!(
            kind,
            Some(
                Kind::TurnStarted(_)
                    | Kind::TurnEnded(_)
                    | Kind::DecisionRequested(_)
                    | Kind::DecisionSettled(_)
                    | Kind::InputSettled(_)
            )
        )
    }

    /// Nothing follows it in the typed view.
    pub fn is_last(&self) -> bool {
        let kind = self.source.as_ref().and_then(|source| source.kind.as_ref());
        matches!(kind, Some(Kind::Terminated(_) | Kind::Deleted(_)))
    }

    /// The event's lines in the typed view, written once for all readers. None where that leaves it
    /// out.
    pub fn typed(&self) -> Option<&Bytes> {
        let write = || {
            TypedEvent::of(self.id, self.source.as_deref()?.clone())
                .map(|event| frame(self.id, &event))
        };
        self.typed.get_or_init(write).as_ref()
    }

    /// Bytes that the event occupies.
    #[must_use]
    pub fn size(&self) -> usize {
        // The typed view is about as large as what it shows.
        let source = self.source.as_ref().map_or(0, |source| 2 * source.encoded_len() + 256);
        let frame = match &self.kind {
            Visible::Stage(frame)
            | Visible::Output(frame)
            | Visible::TurnEnd(frame)
            | Visible::Terminated(frame) => frame.len(),
            Visible::Hidden => 0,
        };
        source + frame + 64
    }
}

/// An SSE event with an id line.
fn frame(id: u64, body: &impl Serialize) -> Bytes {
    let mut bytes = format!("id: {id}\ndata: ").into_bytes();
    write_ascii(&mut bytes, body);
    bytes.extend_from_slice(b"\n\n");
    bytes.into()
}

/// An SSE event that says what it is; with an id, a reader resumes from it.
pub fn named_frame(name: &str, id: Option<&str>, body: &impl Serialize) -> Bytes {
    let mut bytes = format!("event: {name}\n").into_bytes();
    if let Some(id) = id {
        bytes.extend_from_slice(format!("id: {id}\n").as_bytes());
    }
    bytes.extend_from_slice(&anonymous_frame(body));
    bytes.into()
}

/// As [`named_frame`], of a body that is JSON already.
pub fn json_frame(name: &str, id: &str, body: &str) -> Bytes {
    let mut bytes = format!("event: {name}\nid: {id}\ndata: ").into_bytes();
    // Writing into memory does not fail. What is beyond ASCII in JSON is in strings.
    let _ = Ascii.write_string_fragment(&mut bytes, body);
    bytes.extend_from_slice(b"\n\n");
    bytes.into()
}

/// An SSE event without one: a reader that resumes does not resume from it.
pub fn anonymous_frame(body: &impl Serialize) -> Bytes {
    let mut bytes = b"data: ".to_vec();
    write_ascii(&mut bytes, body);
    bytes.extend_from_slice(b"\n\n");
    bytes.into()
}

/// An output event's lines, written piece by piece: what they hold escaped is up to six times as
/// large.
#[derive(Debug)]
pub struct OutputFrame {
    pub id: u64,
    pub turn: u32,
    output: Output,
    /// Bytes of the output that were written; none before the head was.
    at: Option<usize>,
}

/// The part of a [`SessionEvent`] that readers of its output see. The rest is not decoded.
#[derive(Clone, PartialEq, prost::Message)]
struct OutputEvent {
    #[prost(uint32, tag = "1")]
    turn: u32,
    #[prost(message, optional, tag = "11")]
    output: Option<Output>,
}

impl OutputFrame {
    pub fn new(id: u64, turn: u32, output: Output) -> Self {
        Self { id, turn, output, at: None }
    }

    /// Reads an event of the log where it is output.
    #[must_use]
    pub fn decode(id: u64, payload: Bytes) -> Option<Self> {
        let event = OutputEvent::decode(payload).ok()?;
        Some(Self::new(id, event.turn, event.output?))
    }

    fn whole(mut self) -> Bytes {
        let mut bytes = Vec::with_capacity(self.output.data.len() + 128);
        self.write(&mut bytes, usize::MAX);
        bytes.into()
    }

    /// Appends until `bytes` holds some `size` bytes. Returns whether the frame is complete.
    pub fn write(&mut self, bytes: &mut Vec<u8>, size: usize) -> bool {
        let Self { id, turn, output, at } = self;
        let mut done = at.unwrap_or_else(|| {
            let stream = if output.stderr { "stderr" } else { "stdout" };
            // Writing into memory does not fail.
            let _ = write!(
                bytes,
                "id: {id}\ndata: {{\"type\":\"output\",\"id\":{id},\"stream\":\"{stream}\",\"data\":\""
            );
            0
        });
        // Chunks end at characters, so that what is invalid here is invalid in the whole.
        'chunks: for chunk in output.data.get(done..).unwrap_or_default().utf8_chunks() {
            let mut valid = chunk.valid();
            while !valid.is_empty() {
                if bytes.len() >= size {
                    break 'chunks;
                }
                let (piece, rest) = valid.split_at(valid.floor_char_boundary(PIECE_BYTES));
                escape(bytes, piece);
                done += piece.len();
                valid = rest;
            }
            if bytes.len() >= size {
                break;
            }
            if !chunk.invalid().is_empty() {
                bytes.extend_from_slice(br"\ufffd");
                done += chunk.invalid().len();
            }
        }
        *at = Some(done);
        let is_complete = done == output.data.len();
        if is_complete {
            let _ = write!(bytes, "\",\"turn\":{turn}}}\n\n");
        }
        is_complete
    }
}

/// Output that is escaped between two looks at the size.
const PIECE_BYTES: usize = 4096;

/// Bytes at the beginning that are the same in a JSON string in ASCII.
fn plain_bytes(text: &[u8]) -> usize {
    let is_special = |byte: &u8| !matches!(byte, b' '..=b'~') || matches!(byte, b'"' | b'\\');
    // Without a branch for each byte, which lets the compiler compare many at a time.
    let is_plain =
        |chunk: &&[u8; 16]| !chunk.iter().fold(false, |found, byte| found | is_special(byte));
    let (chunks, _) = text.as_chunks();
    let plain = 16 * chunks.iter().take_while(is_plain).count();
    let (_, rest) = text.split_at(plain);
    plain + rest.iter().position(is_special).unwrap_or(rest.len())
}

/// Appends the inside of a JSON string in ASCII.
fn escape(bytes: &mut Vec<u8>, text: &str) {
    let mut rest = text;
    while !rest.is_empty() {
        let (plain, special) = rest.split_at(plain_bytes(rest.as_bytes()));
        bytes.extend_from_slice(plain.as_bytes());
        let mut characters = special.chars();
        match characters.next() {
            Some('\n') => bytes.extend_from_slice(br"\n"),
            Some('"') => bytes.extend_from_slice(br#"\""#),
            Some('\\') => bytes.extend_from_slice(br"\\"),
            Some('\t') => bytes.extend_from_slice(br"\t"),
            Some('\r') => bytes.extend_from_slice(br"\r"),
            Some(character) => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    bytes.extend_from_slice(format!("\\u{unit:04x}").as_bytes());
                }
            }
            None => {}
        }
        rest = characters.as_str();
    }
}

/// JSON in pure ASCII: the published client splits lines at U+0085, U+2028 and U+2029 too
/// (docs/api.md §7).
fn write_ascii(bytes: &mut Vec<u8>, body: &impl Serialize) {
    let mut serializer = serde_json::Serializer::with_formatter(bytes, Ascii);
    // Writing into memory does not fail, and no body of ours has keys that are no strings.
    let _ = body.serialize(&mut serializer);
}

struct Ascii;

impl Formatter for Ascii {
    /// What is beyond ASCII in JSON that comes ready-made is in strings.
    fn write_raw_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        self.write_string_fragment(writer, fragment)
    }

    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let mut rest = fragment;
        while let Some(at) = rest.find(|c: char| !c.is_ascii() || c == '\x7f') {
            let (plain, special) = rest.split_at(at);
            writer.write_all(plain.as_bytes())?;
            let mut characters = special.chars();
            if let Some(character) = characters.next() {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
            rest = characters.as_str();
        }
        writer.write_all(rest.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use contract::session::{Checkpoint, Terminated};
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn output(data: &[u8]) -> String {
        let kind = Some(Kind::Output(Output { stderr: false, data: Bytes::copy_from_slice(data) }));
        let payload =
            SessionEvent { turn: 2, epoch: 1, kind, ..SessionEvent::default() }.encode_to_vec();
        let Visible::Output(frame) = Event::decode(9, payload.into()).kind else {
            panic!("hidden")
        };
        String::from_utf8(frame.to_vec()).unwrap()
    }

    #[test]
    fn an_output_event_is_two_lines_of_ascii() {
        assert_eq!(
            output("a\u{2028}😀\u{85}\0\"\n".as_bytes()),
            "id: 9\ndata: {\"type\":\"output\",\"id\":9,\"stream\":\"stdout\",\"data\":\"a\\u2028\\ud83d\\ude00\\u0085\\u0000\\\"\\n\",\"turn\":2}\n\n"
        );
        assert!(output(b"\xff").contains("\\ufffd"));
    }

    #[test]
    fn stored_output_is_read_without_the_rest_of_its_event() {
        let kind = Kind::Output(Output { stderr: true, data: Bytes::from_static(b"line\n") });
        let checkpoint =
            Checkpoint { stages_done: vec!["provision".to_owned()], ..Checkpoint::default() };
        let event = SessionEvent {
            turn: 3,
            epoch: 2,
            checkpoint: Some(checkpoint),
            at_us: 5,
            kind: Some(kind),
            ..SessionEvent::default()
        };
        let payload = Bytes::from(event.encode_to_vec());
        let frame = OutputFrame::decode(7, payload.clone()).unwrap();
        let Visible::Output(whole) = Event::decode(7, payload).kind else { panic!("hidden") };
        assert_eq!((frame.turn, frame.whole()), (3, whole));
        let other = SessionEvent { kind: Some(Kind::Terminated(Terminated::default())), ..event };
        assert!(OutputFrame::decode(7, other.encode_to_vec().into()).is_none());
    }

    proptest! {
        #[test]
        fn any_text_comes_back(text: String) {
            let frame = output(text.as_bytes());
            prop_assert!(frame.is_ascii());
            let json: Value = serde_json::from_str(frame.split_once("data: ").unwrap().1.trim_end()).unwrap();
            prop_assert_eq!(json["data"].as_str(), Some(text.as_str()));
        }

        #[test]
        fn pieces_are_the_whole(data: Vec<u8>, text: String, repeated in 1_usize..4000, size in 1_usize..9000) {
            let data: Bytes = [data, text.into_bytes()].concat().repeat(repeated).into();
            let output = Output { stderr: true, data: data.clone() };
            let mut frame = OutputFrame::new(7, 3, output.clone());
            let (mut pieces, mut is_complete) = (Vec::new(), false);
            while !is_complete {
                let mut piece = Vec::new();
                is_complete = frame.write(&mut piece, size);
                prop_assert!(piece.len() <= size + 6 * PIECE_BYTES + 200);
                pieces.extend(piece);
            }
            prop_assert!(pieces == OutputFrame::new(7, 3, output).whole());
            let text = std::str::from_utf8(&pieces).unwrap();
            let json: Value = serde_json::from_str(text.split_once("data: ").unwrap().1).unwrap();
            let expected = serde_json::json!({ "type": "output", "id": 7, "stream": "stderr", "data": String::from_utf8_lossy(&data), "turn": 3 });
            prop_assert!(json == expected);
        }
    }
}
