//! The fields of an object: texts, numbers and flags, and what is wrong with them.

use serde_json::{Map, Value};
use types::agent::REDACTED;

use crate::{
    body::{
        echo::{ECHO_BYTES_MAX, echo, echo_object, is_secret, shortened},
        field_error::{FieldError, MESSAGE_BYTES_MAX},
        integer::coerce_integer,
    },
    error::ApiError,
};

/// An answer shows so many errors at most, of so many bytes together: it does not grow with what
/// was sent.
const ERRORS_MAX: usize = 100;
const ERRORS_BYTES_MAX: usize = 64 * 1024;

/// An object's fields, read one after the other; what is wrong is remembered until
/// [`Self::finish`].
pub struct Fields {
    pub(super) object: Map<String, Value>,
    pub(super) loc: Vec<Value>,
    pub(super) errors: Vec<FieldError>,
    /// Of the errors as they are answered.
    errors_bytes: usize,
}

/// Neither Postgres nor any shell can hold one.
pub const WITHOUT_NUL: &str = "text must not contain NUL";

impl Fields {
    /// The fields of an object that stands at `loc` in the body.
    pub fn of(object: Map<String, Value>, loc: Vec<Value>) -> Self {
        Self { object, loc, errors: Vec::new(), errors_bytes: 0 }
    }

    /// Null is the same as absent.
    pub(super) fn get(&self, name: &str) -> Option<&Value> {
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

    pub(super) fn error(
        &mut self,
        kind: &'static str,
        name: &str,
        msg: impl Into<String>,
        input: Value,
    ) {
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
        let input = self
            .object
            .get(name)
            .map(|value| echo(value, &mut { ECHO_BYTES_MAX }))
            .unwrap_or_default();
        self.error("value_error", name, format!("Value error, {why}"), input);
    }

    /// As [`Self::refuse`], for items of a field: says why of the first, shows it alone, and counts
    /// the others.
    pub fn refuse_items<'a>(
        &mut self,
        name: &str,
        mut items: impl Iterator<Item = &'a str>,
        why: impl FnOnce(&str) -> String,
    ) {
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
        if self.object.get(name).and_then(Value::as_str).is_some_and(|text| text.trim().is_empty())
        {
            self.refuse(name, &format!("{name} must not be empty"));
        }
    }

    pub(super) fn refuse_more_than(&mut self, name: &str, count: usize, max: usize) -> bool {
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
                self.error(
                    "string_too_long",
                    name,
                    format!("String should have at most {chars_max} characters"),
                    text.into(),
                );
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
                self.error(
                    "greater_than_equal",
                    name,
                    format!("Input should be greater than or equal to {min}"),
                    input,
                );
                None
            }
            Ok(number) if number > max => {
                self.error(
                    "less_than_equal",
                    name,
                    format!("Input should be less than or equal to {max}"),
                    input,
                );
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

    /// # Errors
    /// 422 with all that was wrong.
    pub fn finish(self) -> Result<(), ApiError> {
        if self.errors.is_empty() { Ok(()) } else { Err(ApiError::fields(self.errors)) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::body::Body;

    fn fields(text: &str) -> Fields {
        Body(text.into()).fields().unwrap()
    }

    #[test]
    fn several_errors_come_together_in_field_order() {
        let mut fields = fields(
            r#"{"name": 5, "timeout": "x", "metadata": [], "list": [{}, 3, {"a": 1}], "env": {"A": 1}}"#,
        );
        fields.string("name", 200);
        fields.string("prompt", 200);
        fields.integer("timeout", 10, 3600);
        fields.object("metadata");
        fields.objects("list", 3, |item| item.string("a", 9));
        fields.string_map("env");
        let errors: Vec<_> = fields
            .errors
            .iter()
            .map(|error| (error.kind, Value::from(error.loc.clone()).to_string()))
            .collect();
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
        let vars =
            |count: usize| Value::Object((0..count).map(|n| (n.to_string(), "".into())).collect());
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
        let mut fields =
            fields(r#"{"a": "\u0000", "b": {"x": [{"\u0000": 1}]}, "c": {"x": "\\u0000"}}"#);
        fields.string("a", 9);
        fields.object("b");
        fields.object("c");
        assert_eq!(fields.errors.len(), 2);
    }
}
