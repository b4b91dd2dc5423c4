//! Request bodies, checked field by field. Several errors come together, in the shape of pydantic v2 (docs/api.md §1).

use std::{collections::BTreeMap, time::Duration};

use axum::{
    body::to_bytes,
    extract::{FromRequest, Request},
    http::StatusCode,
};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use types::{
    agent::REDACTED,
    limits::{BODY_BYTES_MAX, ITEMS_MAX, METADATA_BYTES_MAX},
};

use crate::error::ApiError;

/// A body that takes longer to arrive is not waited for.
const BODY_TIME_MAX: Duration = Duration::from_secs(30);

/// An answer shows so many errors at most, of so many bytes together: it does not grow with what was sent.
const ERRORS_MAX: usize = 100;
const ERRORS_BYTES_MAX: usize = 64 * 1024;
/// How much of what was sent an error shows.
const ECHO_BYTES_MAX: usize = 4096;
/// How long a message is, and a name in `loc`.
const MESSAGE_BYTES_MAX: usize = 512;

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

    /// Cut to what an answer shows of it.
    fn shortened(self) -> Self {
        let name = |part: Value| match part {
            Value::String(name) => shortened(&name, MESSAGE_BYTES_MAX).into(),
            index => index,
        };
        Self {
            kind: self.kind,
            loc: self.loc.into_iter().map(name).collect(),
            msg: shortened(&self.msg, MESSAGE_BYTES_MAX),
            input: echo(&self.input, &mut { ECHO_BYTES_MAX }),
        }
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
            Value::Object(object) => Ok(Fields { object, loc: Vec::new(), errors: Vec::new(), errors_bytes: 0 }),
            input => {
                let msg = "Input should be a valid dictionary".to_owned();
                Err(ApiError::fields(vec![FieldError { kind: "model_type", loc: Vec::new(), msg, input }.shortened()]))
            }
        }
    }

    /// The body as it is, for those who check it themselves.
    pub fn json(&self) -> Result<Value, ApiError> {
        serde_json::from_slice(&self.0).map_err(|_| ApiError::new(StatusCode::BAD_REQUEST, "Invalid JSON"))
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
    /// Of the errors as they are answered.
    errors_bytes: usize,
}

impl Fields {
    /// Null is the same as absent.
    fn get(&self, name: &str) -> Option<&Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// What a field holds, for one that may be of several types. Null is the same as absent.
    pub fn value(&self, name: &str) -> Option<&Value> {
        self.get(name)
    }

    /// Refuses every other field, so that none is accepted and ignored. Null is the same as absent.
    pub fn allow_only(&mut self, known: &[&str]) {
        let unknown = self.names().filter(|name| !known.contains(name) && !self.is_null(name));
        for name in unknown.map(str::to_owned).collect::<Vec<_>>() {
            self.error("extra_forbidden", &name, "this field is not supported", Value::Null);
        }
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
        let input = if secret { REDACTED.into() } else { input };
        self.add(FieldError { kind, loc, msg: msg.into(), input });
    }

    /// Remembers an error, as long as there is room for it in an answer.
    pub fn add(&mut self, error: FieldError) {
        if self.errors.len() >= ERRORS_MAX {
            return;
        }
        let error = error.shortened();
        let bytes = error.clone().into_json().to_string().len();
        if self.errors_bytes + bytes <= ERRORS_BYTES_MAX {
            self.errors_bytes += bytes;
            self.errors.push(error);
        }
    }

    /// Adds that the rules of the domain refuse a field, and why.
    pub fn refuse(&mut self, name: &str, why: &str) {
        let input = self.object.get(name).map(|value| echo(value, &mut { ECHO_BYTES_MAX })).unwrap_or_default();
        self.error("value_error", name, format!("Value error, {why}"), input);
    }

    /// As [`Self::refuse`], for items of a field: says why of the first, shows it alone, and counts the others.
    pub fn refuse_items<'a>(&mut self, name: &str, mut items: impl Iterator<Item = &'a str>, why: impl FnOnce(&str) -> String) {
        let Some(first) = items.next() else { return };
        let more = match items.count() {
            0 => String::new(),
            more => format!(" (and {more} more)"),
        };
        let why = why(&shortened(first, MESSAGE_BYTES_MAX / 2));
        self.error("value_error", name, format!("Value error, {why}{more}"), first.into());
    }

    /// Refuses a text that holds nothing but white space; what is no text was refused already.
    pub fn refuse_blank(&mut self, name: &str) {
        if self.object.get(name).and_then(Value::as_str).is_some_and(|text| text.trim().is_empty()) {
            self.refuse(name, &format!("{name} must not be empty"));
        }
    }

    fn refuse_more_than(&mut self, name: &str, count: usize, max: usize) -> bool {
        if count > max {
            self.refuse(name, &format!("{name} holds {count} items; at most {max} are allowed"));
        }
        count > max
    }

    /// Refuses a body without these fields.
    pub fn require(&mut self, names: &[&str]) {
        for name in names {
            if !self.object.contains_key(*name) {
                self.missing(name);
            }
        }
    }

    fn missing(&mut self, name: &str) {
        let mut left = ECHO_BYTES_MAX;
        let input = Value::Object(echo_object(&self.object, &mut left));
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

    /// True or false.
    pub fn optional_bool(&mut self, name: &str) -> Option<bool> {
        match self.get(name)?.clone() {
            Value::Bool(value) => Some(value),
            other => {
                self.error("bool_type", name, "Input should be a valid boolean", other);
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

    /// An object of anything, but small.
    pub fn metadata(&mut self, name: &str) -> Option<Map<String, Value>> {
        let object = self.object(name)?;
        self.check_metadata(name, object.len(), &object);
        Some(object)
    }

    /// An object of texts, but small.
    pub fn string_metadata(&mut self, name: &str) -> Option<BTreeMap<String, String>> {
        let map = self.string_map(name)?;
        self.check_metadata(name, map.len(), &map);
        Some(map)
    }

    fn check_metadata(&mut self, name: &str, count: usize, value: &impl serde::Serialize) {
        if !self.refuse_more_than(name, count, ITEMS_MAX) {
            let bytes = serde_json::to_vec(value).map_or(0, |json| json.len());
            if bytes > METADATA_BYTES_MAX {
                self.refuse(name, &format!("{name} holds {bytes} bytes as JSON; at most {METADATA_BYTES_MAX} are allowed"));
            }
        }
    }

    /// An object of texts.
    pub fn string_map(&mut self, name: &str) -> Option<BTreeMap<String, String>> {
        let object = self.object(name)?;
        if self.refuse_more_than(name, object.len(), ITEMS_MAX) {
            return None;
        }
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
        if self.refuse_more_than(name, items.len(), ITEMS_MAX) {
            return None;
        }
        let mut texts = Vec::with_capacity(items.len());
        for (index, item) in items.into_iter().enumerate() {
            match item {
                Value::String(text) if !text.contains('\0') => texts.push(text),
                other => {
                    let loc = self.loc.iter().cloned().chain([name.into(), index.into()]).collect();
                    let msg = "Input should be a valid string".to_owned();
                    self.add(FieldError { kind: "string_type", loc, msg, input: other });
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
        if self.refuse_more_than(name, items.len(), max) {
            return None;
        }
        let mut values = Vec::with_capacity(items.len());
        for (index, item) in items.into_iter().enumerate() {
            let loc: Vec<Value> = self.loc.iter().cloned().chain([name.into(), index.into()]).collect();
            match item {
                Value::Object(object) => {
                    let mut fields = Self { object, loc, errors: Vec::new(), errors_bytes: 0 };
                    values.push(read(&mut fields));
                    fields.errors.into_iter().for_each(|error| self.add(error));
                }
                input => {
                    let msg = format!("Value error, {name}[{index}] must be an object");
                    self.add(FieldError { kind: "value_error", loc, msg, input });
                }
            }
        }
        Some(values)
    }

    /// Reads the object that a field holds.
    pub fn nested<T>(&mut self, name: &str, read: impl FnOnce(&mut Self) -> T) -> Option<T> {
        let object = self.object(name)?;
        let loc = self.loc.iter().cloned().chain([name.into()]).collect();
        let mut fields = Self { object, loc, errors: Vec::new(), errors_bytes: 0 };
        let value = read(&mut fields);
        fields.errors.into_iter().for_each(|error| self.add(error));
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

/// Fields whose contents no answer shows, not even the one that refuses them (docs/api.md §3 to §6).
fn is_secret(name: &str) -> bool {
    matches!(name, "authorization_token" | "env" | "env_vars" | "headers" | "secret_env_vars" | "secret_value" | "token" | "value")
}

/// What an error shows of a value: its beginning, without secrets. `left` is what it may still take, in bytes.
fn echo(value: &Value, left: &mut usize) -> Value {
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

fn echo_object(object: &Map<String, Value>, left: &mut usize) -> Map<String, Value> {
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

fn shortened(text: &str, bytes_max: usize) -> String {
    if text.len() <= bytes_max {
        return text.to_owned();
    }
    let (shown, _) = text.split_at(text.floor_char_boundary(bytes_max));
    format!("{shown}{CUT}")
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

    /// The answer to an environment of one field, and the time it took.
    fn refused(field: &str, value: Value) -> (usize, Duration) {
        let mut fields = Body::from_json(&json!({ "name": "x", field: value })).fields().unwrap();
        let begun = std::time::Instant::now();
        crate::environments::CreateEnvironment::read(&mut fields);
        crate::agents::CreateAgent::read(&mut fields);
        let errors = fields.errors;
        assert!(!errors.is_empty(), "{field}");
        let shown: Vec<Value> = errors.into_iter().map(FieldError::into_json).collect();
        (Value::from(shown).to_string().len(), begun.elapsed())
    }

    #[test]
    fn an_answer_does_not_grow_with_what_is_wrong() {
        let hosts = |count: usize| json!({ "type": "limited", "allowed_hosts": vec![""; count] });
        let vars = |count: usize| Value::Object((0..count).map(|n| (n.to_string(), "".into())).collect());
        let huge = "é/".repeat(1_000_000);
        for (field, value) in [
            ("networking", hosts(900)),
            ("networking", hosts(800_000)),
            ("networking", json!({ "type": "limited", "allowed_hosts": [huge] })),
            ("networking", json!({ "type": "limited", "allowed_hosts": vec![5; 900] })),
            ("env_vars", vars(900)),
            ("env_vars", vars(200_000)),
            ("env_vars", json!({ huge.clone(): 5 })),
            ("packages", vars(200_000)),
            ("packages", json!({ huge.clone(): [] })),
            ("packages", json!({ "apt": vec!["a b"; 800_000] })),
            ("metadata", vars(900)),
            ("metadata", json!({ "a": huge })),
            ("mcp_servers", json!(vec![vars(5000); 20])),
            ("skills", json!(vec![vars(5000); 20])),
            ("setup_script", huge.clone().into()),
            ("system", huge.clone().into()),
            ("name", json!(vec![vars(10); 10_000])),
        ] {
            let (bytes, time) = refused(field, value);
            assert!(bytes <= ERRORS_BYTES_MAX + 1024, "{field}: {bytes} bytes");
            assert!(time < Duration::from_secs(5), "{field}: {time:?}");
        }
    }

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
