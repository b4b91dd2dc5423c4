//! The events that are derived from one entry of the log, and their ids.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use types::InputId;

use crate::v1::{ids::EventId, time};

/// Where each event stands among those of its entry, and the last part of its id. These never change: clients keep ids.
pub mod part {
    pub const MESSAGE: u8 = 0;
    pub const RUNNING: u8 = 1;
    pub const THREAD_RUNNING: u8 = 2;
    pub const SPAN_START: u8 = 3;
    pub const MAIN: u8 = 4;
    pub const SPAN_END: u8 = 5;
    /// Results of calls that the turn's end leaves open.
    pub const RESULTS: std::ops::RangeInclusive<u8> = 6..=248;
    pub const ERROR: u8 = 249;
    pub const THREAD_END: u8 = 250;
    pub const USAGE: u8 = 251;
    pub const END: u8 = 252;
}

/// A place in a session's log: an entry, and a part of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    pub entry: u64,
    pub part: u8,
}

impl Place {
    /// After all of an entry.
    pub const fn after(entry: u64) -> Self {
        Self { entry, part: u8::MAX }
    }
}

/// An event of the API.
#[derive(Clone, Debug)]
pub struct Shown {
    pub place: Place,
    pub id: String,
    pub kind: &'static str,
    /// Microseconds since the epoch.
    pub at_us: i64,
    pub body: Map<String, Value>,
}

impl Shown {
    /// Nothing follows it.
    pub fn is_last(&self) -> bool {
        matches!(self.kind, "session.status_terminated" | "session.deleted")
    }

    /// The id after which a stream resumes most easily: the event's own, or where it stands in the log.
    pub fn resume_id(&self) -> String {
        match EventId::decode(&self.id) {
            Some(EventId::Text { .. }) => EventId::Log { id: self.place.entry, part: self.place.part }.encode(),
            _ => self.id.clone(),
        }
    }

    pub fn into_json(self) -> Value {
        Value::Object(self.body)
    }
}

/// The events of one entry.
pub struct Entry<'a> {
    pub id: u64,
    pub at_us: i64,
    pub shown: &'a mut Vec<Shown>,
}

impl Entry<'_> {
    pub fn add(&mut self, part: u8, kind: &'static str, body: Value) {
        let id = EventId::Log { id: self.id, part };
        self.add_as(id, part, kind, body);
    }

    pub fn add_as(&mut self, id: EventId, part: u8, kind: &'static str, body: Value) {
        let place = Place { entry: self.id, part };
        let at_us = self.at_us.saturating_add(i64::from(part));
        let mut event = Map::new();
        let id = id.encode();
        event.insert("id".to_owned(), id.clone().into());
        event.insert("type".to_owned(), kind.into());
        if let Value::Object(fields) = body {
            event.extend(fields);
        }
        event.insert("processed_at".to_owned(), time(at_us).into());
        self.shown.push(Shown { place, id, kind, at_us, body: event });
    }

    /// An event that a user sent has the id that was returned to its sender.
    pub fn add_sent(&mut self, input_id: &str, kind: &'static str, body: Value) {
        let id = input_id.parse().map_or(EventId::Log { id: self.id, part: part::MESSAGE }, EventId::Input);
        self.add_as(id, part::MESSAGE, kind, body);
    }
}

pub fn main_id(entry: u64) -> String {
    EventId::Log { id: entry, part: part::MAIN }.encode()
}

/// The id of the tool use that a permission request is about.
pub fn tool_use_of(request: u64) -> String {
    main_id(request)
}

/// The permission request that a tool use's id stands for.
pub fn request_of(tool_use_id: &str) -> Option<u64> {
    match EventId::decode(tool_use_id)? {
        EventId::Log { id, part: part::MAIN } => Some(id),
        _ => None,
    }
}

/// An event that was sent and is not in the log yet.
pub fn sent_id(input_id: &str) -> String {
    input_id.parse::<InputId>().map_or_else(|_| input_id.to_owned(), |id| EventId::Input(id).encode())
}

/// A decision of a time-out was sent by no one.
pub fn is_sent(input_id: &str) -> bool {
    !input_id.is_empty() && input_id.parse::<InputId>().is_ok_and(InputId::is_sent)
}

pub fn text(text: &str) -> Value {
    if text.is_empty() { json!([]) } else { json!([{ "type": "text", "text": text }]) }
}

pub fn result(tool_use: u64, is_mcp: bool, content: &Value, is_error: bool, part: u8, entry: &mut Entry<'_>) {
    let (kind, field) = match is_mcp {
        true => ("agent.mcp_tool_result", "mcp_tool_use_id"),
        false => ("agent.tool_result", "tool_use_id"),
    };
    entry.add(part, kind, json!({ field: main_id(tool_use), "content": content, "is_error": is_error }));
}
