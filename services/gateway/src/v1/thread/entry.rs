//! The events that are derived from one entry of the log, and their ids.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use types::InputId;

use crate::v1::{
    ids::EventId,
    thread::text::{self, Blocks, ToolResult},
    time,
};

/// Where each event stands among those of its entry, and the last part of its id. These never
/// change: clients keep ids.
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
    /// After an error that passes. An entry that has these has no end.
    pub const RESCHEDULED: u8 = 250;
    pub const RUNNING_AGAIN: u8 = 251;
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
    /// JSON.
    pub body: String,
}

impl Shown {
    /// Nothing follows it.
    pub fn is_last(&self) -> bool {
        matches!(self.kind, "session.status_terminated" | "session.deleted")
    }

    /// The id after which a stream resumes most easily: the event's own, or where it stands in the
    /// log.
    pub fn resume_id(&self) -> String {
        match EventId::decode(&self.id) {
            Some(EventId::Text { .. }) => {
                EventId::Log { id: self.place.entry, part: self.place.part }.encode()
            }
            _ => self.id.clone(),
        }
    }

    #[cfg(test)]
    pub fn value(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

/// The events of one entry.
pub struct Entry<'a> {
    pub id: u64,
    pub at_us: i64,
    pub shown: &'a mut Vec<Shown>,
}

impl Entry<'_> {
    pub fn add(&mut self, part: u8, kind: &'static str, fields: impl Serialize) {
        let id = EventId::Log { id: self.id, part };
        self.add_as(id, part, kind, fields);
    }

    pub fn add_as(&mut self, id: EventId, part: u8, kind: &'static str, fields: impl Serialize) {
        let place = Place { entry: self.id, part };
        let at_us = self.at_us.saturating_add(i64::from(part));
        let id = id.encode();
        let body = text::event(&id, kind, &fields, &time(at_us));
        self.shown.push(Shown { place, id, kind, at_us, body });
    }

    /// An event that a user sent has the id that was returned to its sender.
    pub fn add_sent(&mut self, input_id: &str, kind: &'static str, fields: impl Serialize) {
        let id = input_id
            .parse()
            .map_or(EventId::Log { id: self.id, part: part::MESSAGE }, EventId::Input);
        self.add_as(id, part::MESSAGE, kind, fields);
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
    input_id
        .parse::<InputId>()
        .map_or_else(|_| input_id.to_owned(), |id| EventId::Input(id).encode())
}

/// A decision of a time-out was sent by no one.
pub fn is_sent(input_id: &str) -> bool {
    !input_id.is_empty() && input_id.parse::<InputId>().is_ok_and(InputId::is_sent)
}

pub fn text(text: &str) -> Value {
    if text.is_empty() { json!([]) } else { json!([{ "type": "text", "text": text }]) }
}

pub fn result(
    tool_use: u64,
    is_mcp: bool,
    content: &str,
    is_error: bool,
    part: u8,
    entry: &mut Entry<'_>,
) {
    let (kind, id) = (
        if is_mcp { "agent.mcp_tool_result" } else { "agent.tool_result" },
        Some(main_id(tool_use)),
    );
    let (tool_use_id, mcp_tool_use_id) = if is_mcp { (None, id) } else { (id, None) };
    entry.add(
        part,
        kind,
        ToolResult { tool_use_id, mcp_tool_use_id, content: Blocks(content), is_error },
    );
}
