//! `metadata`: at most 16 texts by name. A change names what it changes; null deletes a key, and so
//! does an empty text.

use serde_json::{Map, Value};
use types::agent::{METADATA_KEYS_MAX, merge_limited_metadata};

use crate::body::Fields;

const KEY_CHARS_MAX: usize = 64;
const VALUE_CHARS_MAX: usize = 512;

/// A body's metadata as a change: an empty text deletes a key, as the scheduler has it.
pub fn read(fields: &mut Fields) -> Option<Map<String, Value>> {
    let object = fields.object("metadata")?;
    if object.keys().any(|key| !(1..=KEY_CHARS_MAX).contains(&key.chars().count())) {
        fields.refuse("metadata", &format!("a key must hold 1 to {KEY_CHARS_MAX} characters"));
    }
    let mut change = Map::new();
    for (key, value) in object {
        match value {
            Value::Null => {
                change.insert(key, "".into());
            }
            Value::String(text) if text.chars().count() > VALUE_CHARS_MAX => {
                fields.refuse(
                    "metadata",
                    &format!("the value of {key} must hold at most {VALUE_CHARS_MAX} characters"),
                );
            }
            Value::String(text) => {
                change.insert(key, text.into());
            }
            _ => fields.refuse("metadata", &format!("the value of {key} must be a text or null")),
        }
    }
    check(fields, &change);
    Some(change)
}

/// Refuses more keys than there may be.
fn check(fields: &mut Fields, change: &Map<String, Value>) {
    if change.values().filter(|value| *value != "").count() > METADATA_KEYS_MAX {
        fields.refuse("metadata", &format!("must hold at most {METADATA_KEYS_MAX} keys"));
    }
}

/// What a resource's metadata is after a change.
///
/// # Errors
/// When it would hold too many keys.
pub fn merged(current: &str, change: &Map<String, Value>) -> Result<Map<String, Value>, String> {
    merge_limited_metadata(serde_json::from_str(current).unwrap_or_default(), change.clone())
}

/// As it is shown: the original API takes values of any type.
pub fn shown(text: &str) -> Map<String, Value> {
    let metadata: Map<String, Value> = serde_json::from_str(text).unwrap_or_default();
    let as_text = |value: Value| if value.is_string() { value } else { value.to_string().into() };
    metadata.into_iter().map(|(key, value)| (key, as_text(value))).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::body::Body;

    #[test]
    fn null_deletes_a_key_and_what_is_no_text_is_refused() {
        let change = |metadata: Value| {
            let mut fields = Body::from_json(&json!({ "metadata": metadata })).fields().unwrap();
            let change = read(&mut fields).unwrap_or_default();
            fields.finish().map(|()| change).map_err(|_| ())
        };
        let delete = change(json!({ "a": null, "b": "x" })).unwrap();
        assert_eq!(
            Value::Object(merged(r#"{"a":"1","c":2}"#, &delete).unwrap()),
            json!({ "c": 2, "b": "x" })
        );
        assert_eq!(Value::Object(shown(r#"{"c":2,"d":"x"}"#)), json!({ "c": "2", "d": "x" }));
        for bad in [
            json!({ "a": 5 }),
            json!({ "": "x" }),
            json!({ "a": "x".repeat(513) }),
            json!({ "k".repeat(65): "x" }),
            json!(5),
        ] {
            assert!(change(bad).is_err());
        }
        let many: Map<String, Value> = (0..17).map(|n| (n.to_string(), "x".into())).collect();
        assert!(change(many.clone().into()).is_err());
        assert!(merged(r#"{"a":"1"}"#, &many.into_iter().take(16).collect()).is_err());
    }
}
