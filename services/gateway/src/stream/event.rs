//! What clients see of an event. Encoded once, and shared by all who read it.

use std::io;

use bytes::Bytes;
use contract::session::{SessionEvent, session_event::Kind};
use prost::Message as _;
use serde::Serialize;
use serde_json::ser::Formatter;
use types::SessionStatus;
use utoipa::ToSchema;

/// An event of a session's record.
#[derive(Debug)]
pub struct Event {
    pub id: u64,
    pub turn: u32,
    pub kind: Visible,
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
    /// Provisioning goes on.
    Stage {
        id: u64,
        stage: &'a str,
        /// `started`, `done` or `failed`.
        state: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        duration_ms: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        message: Option<&'a str>,
    },
    /// Before a turn's first output on this connection. Without an `id:` line.
    TurnStart { id: u64, turn: u32 },
    /// What the agent prints.
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
    /// Nothing came for long: this connection ends.
    Stale { id: u64, message: &'a str },
}

impl Event {
    /// Reads an event of the record. What cannot be read is hidden.
    #[must_use]
    pub fn decode(id: u64, payload: Bytes) -> Self {
        let event = SessionEvent::decode(payload).unwrap_or_default();
        let turn = event.turn;
        let kind = match &event.kind {
            Some(Kind::Stage(stage)) => Visible::Stage(frame(
                id,
                &StreamEvent::Stage {
                    id,
                    stage: &stage.stage,
                    state: &stage.state,
                    duration_ms: stage.duration_ms,
                    message: stage.message.as_deref(),
                },
            )),
            Some(Kind::Output(output)) => {
                let stream = if output.stderr { "stderr" } else { "stdout" };
                // Chunks end at characters, so that what is invalid here is invalid in the whole.
                let data = String::from_utf8_lossy(&output.data);
                Visible::Output(frame(id, &StreamEvent::Output { id, stream, data: &data, turn }))
            }
            Some(Kind::TurnEnded(ended)) => Visible::TurnEnd(match (ended.exit_code, &ended.failure) {
                (Some(code), _) => frame(id, &StreamEvent::Exit { id, code, turn }),
                (None, failure) => {
                    let message = failure.as_ref().map_or("Session failed", |failure| failure.message.as_str());
                    frame(id, &StreamEvent::Error { id, message, turn })
                }
            }),
            Some(Kind::Terminated(_)) => Visible::Terminated(frame(id, &StreamEvent::Terminated { id, message: "Session terminated" })),
            Some(Kind::TurnStarted(_) | Kind::TakenOver(_)) | None => Visible::Hidden,
        };
        Self { id, turn, kind }
    }

    /// Whether nothing follows in a session that is settled so, at this turn.
    #[must_use]
    pub fn is_end(&self, settled: SessionStatus, turn: u32) -> bool {
        match self.kind {
            Visible::Terminated(_) => true,
            Visible::TurnEnd(_) => settled != SessionStatus::Terminated && self.turn == turn,
            _ => false,
        }
    }

    /// Bytes that the event occupies.
    #[must_use]
    pub fn size(&self) -> usize {
        match &self.kind {
            Visible::Stage(frame) | Visible::Output(frame) | Visible::TurnEnd(frame) | Visible::Terminated(frame) => frame.len() + 64,
            Visible::Hidden => 64,
        }
    }
}

/// An SSE event with an id line.
fn frame(id: u64, body: &StreamEvent<'_>) -> Bytes {
    let mut bytes = format!("id: {id}\ndata: ").into_bytes();
    write_ascii(&mut bytes, body);
    bytes.extend_from_slice(b"\n\n");
    bytes.into()
}

/// An SSE event without one: a reader that resumes does not resume from it.
pub fn anonymous_frame(body: &StreamEvent<'_>) -> Bytes {
    let mut bytes = b"data: ".to_vec();
    write_ascii(&mut bytes, body);
    bytes.extend_from_slice(b"\n\n");
    bytes.into()
}

/// JSON in pure ASCII: the published client splits lines at U+0085, U+2028 and U+2029 too (contract §7).
fn write_ascii(bytes: &mut Vec<u8>, body: &impl Serialize) {
    let mut serializer = serde_json::Serializer::with_formatter(bytes, Ascii);
    // Writing into memory does not fail, and no body of ours has keys that are no strings.
    let _ = body.serialize(&mut serializer);
}

struct Ascii;

impl Formatter for Ascii {
    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
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
    use contract::session::Output;
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn output(data: &[u8]) -> String {
        let kind = Some(Kind::Output(Output { stderr: false, data: Bytes::copy_from_slice(data) }));
        let payload = SessionEvent { turn: 2, epoch: 1, follows: None, checkpoint: None, kind }.encode_to_vec();
        let Visible::Output(frame) = Event::decode(9, payload.into()).kind else { panic!("hidden") };
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

    proptest! {
        #[test]
        fn any_text_comes_back(text: String) {
            let frame = output(text.as_bytes());
            prop_assert!(frame.is_ascii());
            let json: Value = serde_json::from_str(frame.split_once("data: ").unwrap().1.trim_end()).unwrap();
            prop_assert_eq!(json["data"].as_str(), Some(text.as_str()));
        }
    }
}
