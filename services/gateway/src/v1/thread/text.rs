//! Events as JSON text. They are written once, in the form in which they are sent: a list shows a
//! hundred thousand of them a second.

use std::borrow::Cow;

use serde::{Serialize, Serializer, ser::SerializeSeq as _};
use serde_json::{
    Map, Value,
    value::{RawValue, to_raw_value},
};

/// The fields of an event around those of its type.
pub fn event(id: &str, kind: &str, fields: &impl Serialize, processed_at: &str) -> String {
    // Ids, types and times need no escaping.
    let mut text = Vec::with_capacity(256);
    for part in [r#"{"id":""#, id, r#"","type":""#, kind, r#"""#] {
        text.extend_from_slice(part.as_bytes());
    }
    let begin = text.len();
    // A vector grows, and no map here has keys that are not texts: this cannot fail.
    if serde_json::to_writer(&mut text, fields).is_err() || !text[begin..].starts_with(b"{\"") {
        text.truncate(begin);
    } else {
        text[begin] = b',';
        text.pop();
    }
    for part in [r#","processed_at":""#, processed_at, r#""}"#] {
        text.extend_from_slice(part.as_bytes());
    }
    String::from_utf8(text).unwrap_or_default()
}

/// The blocks of a text: none where it is empty.
#[derive(Clone, Copy)]
pub struct Blocks<'a>(pub &'a str);

#[derive(Serialize)]
struct Block<'a> {
    r#type: &'static str,
    text: &'a str,
}

impl Serialize for Blocks<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut blocks = serializer.serialize_seq(None)?;
        if !self.0.is_empty() {
            blocks.serialize_element(&Block { r#type: "text", text: self.0 })?;
        }
        blocks.end()
    }
}

/// What holds blocks and nothing else.
#[derive(Serialize)]
pub struct Content<'a> {
    pub content: Blocks<'a>,
}

#[derive(Serialize)]
pub struct ToolResult<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_use_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mcp_tool_use_id: Option<String>,
    pub content: Blocks<'a>,
    pub is_error: bool,
}

#[derive(Serialize)]
pub struct ToolUse<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mcp_server_name: Option<&'a str>,
    pub name: &'a str,
    pub input: Cow<'a, RawValue>,
    pub evaluated_permission: &'static str,
    pub evaluation: Evaluated,
    pub session_thread_id: Option<&'static str>,
}

#[derive(Serialize)]
pub struct Evaluated {
    pub r#type: &'static str,
}

/// The object that a text is, in one line, or an empty one.
pub fn object(text: &str) -> Cow<'_, RawValue> {
    let raw =
        serde_json::from_str::<&RawValue>(text).ok().filter(|value| value.get().starts_with('{'));
    match raw {
        // Between its tokens: texts have none.
        Some(raw) if raw.get().contains(['\n', '\r']) => {
            let value: Option<Value> = serde_json::from_str(raw.get()).ok();
            value
                .and_then(|value| to_raw_value(&value).ok())
                .map_or(Cow::Borrowed(RawValue::NULL), Cow::Owned)
        }
        Some(raw) => Cow::Borrowed(raw),
        None => to_raw_value(&Map::new()).map_or(Cow::Borrowed(RawValue::NULL), Cow::Owned),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_event_is_one_object() {
        let read = |fields: &Value| {
            serde_json::from_str::<Value>(&event("sevt_1", "a.b", fields, "now")).unwrap()
        };
        assert_eq!(
            read(&json!({})),
            json!({ "id": "sevt_1", "type": "a.b", "processed_at": "now" })
        );
        let fields = json!({ "text": "\"}\u{2028}", "more": { "x": [] } });
        assert_eq!(
            read(&fields),
            json!({ "id": "sevt_1", "type": "a.b", "text": "\"}\u{2028}", "more": { "x": [] }, "processed_at": "now" })
        );
        assert_eq!(
            serde_json::to_value(Content { content: Blocks("") }).unwrap(),
            json!({ "content": [] })
        );
        assert_eq!(
            [r#" {"a": 1}"#, "{\n\"a\": 1}", "[]", "{", ""]
                .map(|text| object(text).get().to_owned()),
            [r#"{"a": 1}"#, r#"{"a":1}"#, "{}", "{}", "{}"]
        );
        assert_eq!(
            serde_json::to_value(Blocks("a")).unwrap(),
            json!([{ "type": "text", "text": "a" }])
        );
    }
}
