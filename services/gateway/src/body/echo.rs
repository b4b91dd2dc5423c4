//! What an error shows of what was sent: its beginning, without secrets.

use serde_json::{Map, Value};
use types::agent::REDACTED;

/// How much of what was sent an error shows.
pub const ECHO_BYTES_MAX: usize = 4096;

/// Fields whose contents no answer shows, not even the one that refuses them
/// (docs/api.md §3 to §6).
pub fn is_secret(name: &str) -> bool {
    matches!(
        name,
        "authorization_token"
            | "env"
            | "env_vars"
            | "headers"
            | "secret_env_vars"
            | "secret_value"
            | "token"
            | "value"
    )
}

/// What an error shows of a value: its beginning, without secrets. `left` is what it may still
/// take, in bytes.
pub fn echo(value: &Value, left: &mut usize) -> Value {
    match value {
        Value::String(text) => {
            let shown = shortened(text, *left);
            *left = left.saturating_sub(text.len());
            shown.into()
        }
        Value::Array(items) => {
            let mut shown = Vec::new();
            for item in items {
                if *left == 0 {
                    shown.push(CUT.into());
                    break;
                }
                *left = left.saturating_sub(1);
                shown.push(echo(item, left));
            }
            shown.into()
        }
        Value::Object(object) => echo_object(object, left).into(),
        other => {
            *left = left.saturating_sub(8);
            other.clone()
        }
    }
}

pub fn echo_object(object: &Map<String, Value>, left: &mut usize) -> Map<String, Value> {
    let mut shown = Map::new();
    for (name, value) in object {
        if *left == 0 {
            shown.insert(CUT.to_owned(), CUT.into());
            break;
        }
        let key = shortened(name, *left);
        *left = left.saturating_sub(name.len() + 1);
        let value = if is_secret(name) { REDACTED.into() } else { echo(value, left) };
        shown.insert(key, value);
    }
    shown
}

/// Stands for what is not shown.
const CUT: &str = "…";

pub fn shortened(text: &str, bytes_max: usize) -> String {
    if text.len() <= bytes_max {
        return text.to_owned();
    }
    let (shown, _) = text.split_at(text.floor_char_boundary(bytes_max));
    format!("{shown}{CUT}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    proptest! {
        #[test]
        fn an_echo_is_bounded_and_whole_where_it_fits(text: String, repeated in 0_usize..2000) {
            let value = json!({ "a": [text.repeat(repeated), { text.clone(): [1, null, true] }] });
            let shown = echo(&value, &mut { ECHO_BYTES_MAX });
            let raw: usize = text.len() * (repeated + 1) + 64;
            if raw <= ECHO_BYTES_MAX && !is_secret(&text) {
                prop_assert_eq!(shown, value);
            } else {
                prop_assert!(shown.to_string().len() <= 6 * ECHO_BYTES_MAX + 256);
            }
        }
    }
}
