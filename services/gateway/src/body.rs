//! Request bodies, checked field by field. Several errors come together, in the shape of pydantic v2 (contract §1).

use std::{collections::BTreeMap, time::Duration};

use axum::{
    body::to_bytes,
    extract::{FromRequest, Request},
    http::StatusCode,
};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use types::{agent::REDACTED, limits::BODY_BYTES_MAX};

use crate::error::ApiError;

/// A body that takes longer to arrive is not waited for.
const BODY_TIME_MAX: Duration = Duration::from_secs(30);

/// One thing that is wrong with one field.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldError {
    kind: &'static str,
    loc: Vec<Value>,
    msg: String,
    input: Value,
}

impl FieldError {
    /// A value that the rules of the domain refuse.
    pub fn value(field: &str, text: &str, input: Value) -> Self {
        let text = text.strip_prefix("Value error, ").unwrap_or(text);
        Self { kind: "value_error", loc: vec![field.into()], msg: format!("Value error, {text}"), input }
    }

    pub fn into_json(self) -> Value {
        json!({ "type": self.kind, "loc": self.loc, "msg": self.msg, "input": self.input })
    }
}

/// A JSON body as it came. It may hold secrets: it cannot be printed.
pub struct Body(Vec<u8>);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let bytes = tokio::time::timeout(BODY_TIME_MAX, to_bytes(request.into_body(), BODY_BYTES_MAX)).await;
        let bytes = bytes.map_err(|_| ApiError::new(StatusCode::REQUEST_TIMEOUT, "Request body took too long"))?;
        let bytes = bytes.map_err(|_| ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "Request body too large"))?;
        Ok(Self(bytes.into()))
    }
}

impl Body {
    /// The body's fields.
    pub fn fields(&self) -> Result<Fields, ApiError> {
        let value: Value = serde_json::from_slice(&self.0).map_err(|_| ApiError::new(StatusCode::BAD_REQUEST, "Invalid JSON"))?;
        match value {
            Value::Object(object) => Ok(Fields { object, loc: Vec::new(), errors: Vec::new() }),
            input => {
                let msg = "Input should be a valid dictionary".to_owned();
                Err(ApiError::fields(vec![FieldError { kind: "model_type", loc: Vec::new(), msg, input }]))
            }
        }
    }

    #[cfg(test)]
    pub fn from_json(value: &Value) -> Self {
        Self(value.to_string().into_bytes())
    }

    pub fn sha256(&self) -> Vec<u8> {
        Sha256::digest(&self.0).to_vec()
    }
}

/// An object's fields, read one after the other; what is wrong is remembered until [`Self::finish`].
pub struct Fields {
    object: Map<String, Value>,
    loc: Vec<Value>,
    errors: Vec<FieldError>,
}

impl Fields {
    /// Null is the same as absent.
    fn get(&self, name: &str) -> Option<&Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// Whether the field is there and null.
    pub fn is_null(&self, name: &str) -> bool {
        self.object.get(name).is_some_and(Value::is_null)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.object.keys().map(String::as_str)
    }

    fn error(&mut self, kind: &'static str, name: &str, msg: impl Into<String>, input: Value) {
        let loc: Vec<Value> = self.loc.iter().cloned().chain([name.into()]).collect();
        // What is missing is shown with what is there beside it.
        let secret = kind != "missing" && loc.iter().filter_map(Value::as_str).any(is_secret);
        let input = if secret { REDACTED.into() } else { without_secrets(input) };
        self.errors.push(FieldError { kind, loc, msg: msg.into(), input });
    }

    pub fn add(&mut self, error: FieldError) {
        self.errors.push(error);
    }

    /// Adds that the rules of the domain refuse a field, and why.
    pub fn refuse(&mut self, name: &str, why: &str) {
        let input = self.object.get(name).cloned().unwrap_or_default();
        self.error("value_error", name, format!("Value error, {why}"), input);
    }

    fn missing(&mut self, name: &str) {
        let input = Value::Object(self.object.clone());
        self.error("missing", name, "Field required", input);
    }

    /// A text that must be there.
    pub fn string(&mut self, name: &str, chars_max: usize) -> String {
        match self.object.get(name) {
            None => {
                self.missing(name);
                String::new()
            }
            Some(Value::Null) => {
                self.error("string_type", name, "Input should be a valid string", Value::Null);
                String::new()
            }
            Some(_) => self.optional_string(name, chars_max).unwrap_or_default(),
        }
    }

    /// A text that must be there; the message names it, for the list that it is in does not.
    pub fn named_string(&mut self, name: &str, chars_max: usize) -> Option<String> {
        if self.get(name).is_none() {
            self.refuse(name, &format!("{name} is required"));
        }
        self.optional_string(name, chars_max)
    }

    pub fn optional_string(&mut self, name: &str, chars_max: usize) -> Option<String> {
        match self.get(name)?.clone() {
            Value::String(text) if text.chars().count() > chars_max => {
                self.error("string_too_long", name, format!("String should have at most {chars_max} characters"), text.into());
                None
            }
            Value::String(text) if text.contains('\0') => {
                self.refuse(name, WITHOUT_NUL);
                None
            }
            Value::String(text) => Some(text),
            other => {
                self.error("string_type", name, "Input should be a valid string", other);
                None
            }
        }
    }

    /// One of a few words.
    pub fn literal(&mut self, name: &str, allowed: &str) {
        match self.object.get(name) {
            None => self.missing(name),
            Some(value) if value == allowed => {}
            Some(other) => {
                let input = other.clone();
                self.error("literal_error", name, format!("Input should be '{allowed}'"), input);
            }
        }
    }

    /// A whole number within bounds; `"60"` and `60.0` are 60.
    pub fn integer(&mut self, name: &str, min: i64, max: i64) -> Option<i64> {
        let input = self.get(name)?.clone();
        match coerce_integer(&input) {
            Ok(number) if number < min => {
                self.error("greater_than_equal", name, format!("Input should be greater than or equal to {min}"), input);
                None
            }
            Ok(number) if number > max => {
                self.error("less_than_equal", name, format!("Input should be less than or equal to {max}"), input);
                None
            }
            Ok(number) => Some(number),
            Err((kind, message)) => {
                self.error(kind, name, message, input);
                None
            }
        }
    }

    /// A whole number that must be there.
    pub fn required_integer(&mut self, name: &str) -> i64 {
        if self.is_null(name) {
            self.error("int_type", name, "Input should be a valid integer", Value::Null);
        } else if self.get(name).is_none() {
            self.missing(name);
        }
        self.integer(name, i64::MIN, i64::MAX).unwrap_or_default()
    }

    /// An object of anything.
    pub fn object(&mut self, name: &str) -> Option<Map<String, Value>> {
        match self.get(name)?.clone() {
            Value::Object(object) => {
                if object.iter().any(|(key, value)| key.contains('\0') || has_nul(value)) {
                    self.refuse(name, WITHOUT_NUL);
                }
                Some(object)
            }
            other => {
                self.error("dict_type", name, "Input should be a valid dictionary", other);
                None
            }
        }
    }

    /// An object of texts.
    pub fn string_map(&mut self, name: &str) -> Option<BTreeMap<String, String>> {
        let object = self.object(name)?;
        let mut map = BTreeMap::new();
        self.within(name, |fields| {
            for (key, value) in object {
                match value {
                    Value::String(text) => {
                        map.insert(key, text);
                    }
                    other => fields.error("string_type", &key, "Input should be a valid string", other),
                }
            }
        });
        Some(map)
    }

    /// A list of texts.
    pub fn strings(&mut self, name: &str) -> Option<Vec<String>> {
        let items = self.list(name)?;
        let mut texts = Vec::with_capacity(items.len());
        for (index, item) in items.into_iter().enumerate() {
            match item {
                Value::String(text) if !text.contains('\0') => texts.push(text),
                other => {
                    let loc = self.loc.iter().cloned().chain([name.into(), index.into()]).collect();
                    let msg = "Input should be a valid string".to_owned();
                    self.errors.push(FieldError { kind: "string_type", loc, msg, input: other });
                }
            }
        }
        Some(texts)
    }

    fn list(&mut self, name: &str) -> Option<Vec<Value>> {
        match self.get(name)?.clone() {
            Value::Array(items) => Some(items),
            other => {
                self.error("list_type", name, "Input should be a valid list", other);
                None
            }
        }
    }

    /// A list of objects, each read in turn.
    pub fn objects<T>(&mut self, name: &str, max: usize, mut read: impl FnMut(&mut Self) -> T) -> Option<Vec<T>> {
        let items = self.list(name)?;
        if items.len() > max {
            self.refuse(name, &format!("{name} holds {} items; at most {max} are allowed", items.len()));
            return None;
        }
        let mut values = Vec::with_capacity(items.len());
        for (index, item) in items.into_iter().enumerate() {
            let loc: Vec<Value> = self.loc.iter().cloned().chain([name.into(), index.into()]).collect();
            match item {
                Value::Object(object) => {
                    let mut fields = Self { object, loc, errors: Vec::new() };
                    values.push(read(&mut fields));
                    self.errors.extend(fields.errors);
                }
                input => {
                    let msg = format!("Value error, {name}[{index}] must be an object");
                    self.errors.push(FieldError { kind: "value_error", loc, msg, input });
                }
            }
        }
        Some(values)
    }

    /// Reads the object that a field holds.
    pub fn nested<T>(&mut self, name: &str, read: impl FnOnce(&mut Self) -> T) -> Option<T> {
        let object = self.object(name)?;
        let loc = self.loc.iter().cloned().chain([name.into()]).collect();
        let mut fields = Self { object, loc, errors: Vec::new() };
        let value = read(&mut fields);
        self.errors.extend(fields.errors);
        Some(value)
    }

    fn within(&mut self, name: &str, read: impl FnOnce(&mut Self)) {
        self.loc.push(name.into());
        read(self);
        self.loc.pop();
    }

    /// # Errors
    /// 422 with all that was wrong.
    pub fn finish(self) -> Result<(), ApiError> {
        if self.errors.is_empty() { Ok(()) } else { Err(ApiError::fields(self.errors)) }
    }
}

/// Fields whose contents no answer shows, not even the one that refuses them (contract §3 to §6).
fn is_secret(name: &str) -> bool {
    matches!(name, "authorization_token" | "env" | "env_vars" | "headers" | "secret_env_vars" | "value")
}

fn without_secrets(input: Value) -> Value {
    match input {
        Value::Object(object) => {
            let shown = object.into_iter().map(|(name, value)| {
                let value = if is_secret(&name) { REDACTED.into() } else { without_secrets(value) };
                (name, value)
            });
            shown.collect()
        }
        Value::Array(items) => items.into_iter().map(without_secrets).collect(),
        other => other,
    }
}

/// Neither Postgres nor any shell can hold one.
const WITHOUT_NUL: &str = "text must not contain NUL";

fn has_nul(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(items) => items.iter().any(has_nul),
        Value::Object(object) => object.iter().any(|(key, value)| key.contains('\0') || has_nul(value)),
        _ => false,
    }
}

fn coerce_integer(value: &Value) -> Result<i64, (&'static str, &'static str)> {
    const PARSING: (&str, &str) = ("int_parsing", "Input should be a valid integer, unable to parse string as an integer");
    const FRACTION: (&str, &str) = ("int_from_float", "Input should be a valid integer, got a number with a fractional part");
    let whole = |number: f64| if number.fract() == 0.0 && number.abs() < 9.0e15 { Ok(number as i64) } else { Err(FRACTION) };
    match value {
        Value::Bool(flag) => Ok(i64::from(*flag)),
        // Larger than any of ours: out of bounds, whichever way.
        Value::Number(number) if number.is_u64() => Ok(number.as_i64().unwrap_or(i64::MAX)),
        Value::Number(number) => number.as_i64().map_or_else(|| whole(number.as_f64().unwrap_or(f64::NAN)), Ok),
        Value::String(text) => {
            let text = text.trim();
            let digits = text.split_once('.').filter(|(_, zeros)| zeros.bytes().all(|c| c == b'0')).map_or(text, |(digits, _)| digits);
            digits.parse().map_err(|_| PARSING)
        }
        _ => Err(("int_type", "Input should be a valid integer")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fields(text: &str) -> Fields {
        Body(text.into()).fields().unwrap()
    }

    #[test]
    fn several_errors_come_together_in_field_order() {
        let mut fields = fields(r#"{"name": 5, "timeout": "x", "metadata": [], "list": [{}, 3, {"a": 1}], "env": {"A": 1}}"#);
        fields.string("name", 200);
        fields.string("prompt", 200);
        fields.integer("timeout", 10, 3600);
        fields.object("metadata");
        fields.objects("list", 3, |item| item.string("a", 9));
        fields.string_map("env");
        let errors: Vec<_> = fields.errors.iter().map(|error| (error.kind, Value::from(error.loc.clone()).to_string())).collect();
        let expected = [
            ("string_type", r#"["name"]"#),
            ("missing", r#"["prompt"]"#),
            ("int_parsing", r#"["timeout"]"#),
            ("dict_type", r#"["metadata"]"#),
            ("missing", r#"["list",0,"a"]"#),
            ("string_type", r#"["list",2,"a"]"#),
            ("value_error", r#"["list",1]"#),
            ("string_type", r#"["env","A"]"#),
        ];
        let mut sorted = expected.map(|(kind, loc)| (kind, loc.to_owned()));
        sorted.swap(5, 6);
        assert_eq!(errors, sorted);
    }

    #[test]
    fn integers_are_taken_as_pydantic_takes_them() {
        for (text, expected) in
            [("60", Ok(60)), ("\"60\"", Ok(60)), ("60.0", Ok(60)), ("\" 60 \"", Ok(60)), ("\"60.0\"", Ok(60)), ("true", Ok(1))]
        {
            assert_eq!(coerce_integer(&serde_json::from_str(text).unwrap()), expected, "{text}");
        }
        for (text, kind) in [("60.5", "int_from_float"), ("\"x\"", "int_parsing"), ("[]", "int_type"), ("1e300", "int_from_float")] {
            assert_eq!(coerce_integer(&serde_json::from_str(text).unwrap()).unwrap_err().0, kind, "{text}");
        }
        assert_eq!(coerce_integer(&serde_json::from_str("18446744073709551615").unwrap()), Ok(i64::MAX));
    }

    proptest! {
        #[test]
        fn an_integer_is_the_same_in_every_spelling(number in -1_000_000_000_000_i64..1_000_000_000_000, zeros in 0_usize..4) {
            let point = if zeros == 0 { String::new() } else { format!(".{}", "0".repeat(zeros)) };
            for text in [format!("{number}"), format!("{number}.0"), format!("\"{number}\""), format!("\" {number}{point} \"")] {
                prop_assert_eq!(coerce_integer(&serde_json::from_str(&text).unwrap()), Ok(number), "{}", text);
            }
        }

        #[test]
        fn no_text_panics(text: String, number: f64) {
            let _ = coerce_integer(&text.clone().into());
            let _ = coerce_integer(&number.into());
            let _ = Body(text.into()).fields();
        }
    }

    #[test]
    fn what_is_no_json_object_is_refused() {
        assert!(Body(b"{".to_vec()).fields().is_err());
        assert!(Body(b"[1]".to_vec()).fields().is_err());
        assert!(Body("[".repeat(100_000).into_bytes()).fields().is_err());
        assert!(Body(br#"{"a": "\ud800"}"#.to_vec()).fields().is_err());
    }

    #[test]
    fn a_refusal_shows_no_secret() {
        let mut fields = fields(
            r#"{"secret_env_vars": {"A-B": "sentinel", "C": 5}, "value": "sentinel\u0000", "env_vars": "sentinel",
                "list": [{"headers": {"X": "sentinel"}}, "x"]}"#,
        );
        fields.string("agent_id", 9);
        fields.string("value", 99);
        fields.string_map("env_vars");
        fields.string_map("secret_env_vars");
        fields.refuse("secret_env_vars", "bad name");
        fields.objects("list", 9, |item| item.string("name", 9));
        fields.refuse("list", "bad list");
        let shown: Vec<Value> = fields.errors.into_iter().map(FieldError::into_json).collect();
        assert_eq!(shown.len(), 8, "{shown:?}");
        assert!(!Value::from(shown).to_string().contains("sentinel"));
    }

    #[test]
    fn text_with_nul_is_refused_wherever_it_hides() {
        let mut fields = fields(r#"{"a": "\u0000", "b": {"x": [{"\u0000": 1}]}, "c": {"x": "\\u0000"}}"#);
        fields.string("a", 9);
        fields.object("b");
        fields.object("c");
        assert_eq!(fields.errors.len(), 2);
    }
}
