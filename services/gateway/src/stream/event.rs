//! What clients see of an event. Encoded once, and shared by all who read it.

use std::io;

use bytes::Bytes;
use contract::session::{SessionEvent, session_event::Kind};
use prost::Message as _;
use serde::Serialize;
use serde_json::{Value, json, ser::Formatter};

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

impl Event {
    /// Reads an event of the record. What cannot be read is hidden.
    #[must_use]
    pub fn decode(id: u64, payload: Bytes) -> Self {
        let event = SessionEvent::decode(payload).unwrap_or_default();
        let turn = event.turn;
        let kind = match event.kind {
            Some(Kind::Stage(stage)) => {
                let mut body = json!({ "type": "stage", "id": id, "stage": stage.stage, "state": stage.state });
                if let Some(object) = body.as_object_mut() {
                    object.extend(stage.duration_ms.map(|ms| ("duration_ms".to_owned(), ms.into())));
                    object.extend(stage.message.map(|message| ("message".to_owned(), message.into())));
                }
                Visible::Stage(frame(id, &body))
            }
            Some(Kind::Output(output)) => {
                // Chunks end at characters, so that what is invalid here is invalid in the whole.
                let body = OutputBody {
                    kind: "output",
                    id,
                    stream: if output.stderr { "stderr" } else { "stdout" },
                    data: &String::from_utf8_lossy(&output.data),
                    turn,
                };
                Visible::Output(frame(id, &body))
            }
            Some(Kind::TurnEnded(ended)) => Visible::TurnEnd(match (ended.exit_code, ended.failure) {
                (Some(code), _) => frame(id, &json!({ "type": "exit", "id": id, "code": code, "turn": turn })),
                (None, failure) => {
                    let message = failure.map_or_else(|| "Session failed".to_owned(), |failure| failure.message);
                    frame(id, &json!({ "type": "error", "id": id, "message": message, "turn": turn }))
                }
            }),
            Some(Kind::Terminated(_)) => {
                Visible::Terminated(frame(id, &json!({ "type": "terminated", "id": id, "message": "Session terminated" })))
            }
            Some(Kind::TurnStarted(_) | Kind::TakenOver(_)) | None => Visible::Hidden,
        };
        Self { id, turn, kind }
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

#[derive(Serialize)]
struct OutputBody<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    id: u64,
    stream: &'static str,
    data: &'a str,
    turn: u32,
}

/// An SSE event with an id line.
fn frame(id: u64, body: &impl Serialize) -> Bytes {
    let mut bytes = format!("id: {id}\ndata: ").into_bytes();
    write_ascii(&mut bytes, body);
    bytes.extend_from_slice(b"\n\n");
    bytes.into()
}

/// An SSE event without one: a reader that resumes does not resume from it.
pub fn anonymous_frame(body: &Value) -> Bytes {
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

    use super::*;

    fn output(data: &[u8]) -> String {
        let kind = Some(Kind::Output(Output { stderr: false, data: Bytes::copy_from_slice(data) }));
        let payload = SessionEvent { turn: 2, epoch: 1, checkpoint: None, kind }.encode_to_vec();
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
