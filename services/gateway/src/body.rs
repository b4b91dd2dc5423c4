//! Request bodies, checked field by field. Several errors come together, in the shape of pydantic v2 (contract §1).

use axum::{
    body::to_bytes,
    extract::{FromRequest, Request},
    http::StatusCode,
};
use serde_json::{Map, Value, json};
use types::limits::BODY_BYTES_MAX;

use crate::error::ApiError;

/// One thing that is wrong with one field.
#[derive(Debug, PartialEq)]
pub struct FieldError {
    kind: &'static str,
    loc: Vec<Value>,
    msg: String,
    input: Value,
}

impl FieldError {
    fn new(kind: &'static str, loc: &[&str], msg: impl Into<String>, input: Value) -> Self {
        Self { kind, loc: loc.iter().map(|part| Value::from(*part)).collect(), msg: msg.into(), input }
    }

    /// A value that the rules of the domain refuse.
    pub fn value(field: &str, text: &str, input: Value) -> Self {
        let text = text.strip_prefix("Value error, ").unwrap_or(text);
        Self::new("value_error", &[field], format!("Value error, {text}"), input)
    }

    pub fn into_json(self) -> Value {
        json!({ "type": self.kind, "loc": self.loc, "msg": self.msg, "input": self.input })
    }
}

/// A JSON body as it came; parsed, but not looked at.
#[derive(Debug)]
pub struct Body(Vec<u8>);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let bytes = to_bytes(request.into_body(), BODY_BYTES_MAX).await;
        let bytes = bytes.map_err(|_| ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "Request body too large"))?;
        Ok(Self(bytes.into()))
    }
}

impl Body {
    /// The body's fields.
    pub fn fields(&self) -> Result<Fields, ApiError> {
        let value: Value = serde_json::from_slice(&self.0).map_err(|_| ApiError::new(StatusCode::BAD_REQUEST, "Invalid JSON"))?;
        match value {
            Value::Object(object) => Ok(Fields { object, errors: Vec::new() }),
            other => Err(ApiError::fields(vec![FieldError::new("model_type", &[], "Input should be a valid dictionary", other)])),
        }
    }
}

/// An object's fields, read one after the other; what is wrong is remembered until [`Self::finish`].
#[derive(Debug)]
pub struct Fields {
    object: Map<String, Value>,
    errors: Vec<FieldError>,
}

impl Fields {
    /// Null is the same as absent.
    fn get(&self, name: &str) -> Option<&Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    pub fn add(&mut self, error: FieldError) {
        self.errors.push(error);
    }

    /// A text that must be there.
    pub fn string(&mut self, name: &str, chars_max: usize) -> String {
        match self.object.get(name) {
            None => {
                let input = Value::Object(self.object.clone());
                self.errors.push(FieldError::new("missing", &[name], "Field required", input));
                String::new()
            }
            Some(Value::Null) => {
                self.errors.push(FieldError::new("string_type", &[name], "Input should be a valid string", Value::Null));
                String::new()
            }
            Some(_) => self.optional_string(name, chars_max).unwrap_or_default(),
        }
    }

    pub fn optional_string(&mut self, name: &str, chars_max: usize) -> Option<String> {
        match self.get(name)?.clone() {
            Value::String(text) if text.chars().count() > chars_max => {
                let message = format!("String should have at most {chars_max} characters");
                self.errors.push(FieldError::new("string_too_long", &[name], message, text.into()));
                None
            }
            Value::String(text) => Some(text),
            other => {
                self.errors.push(FieldError::new("string_type", &[name], "Input should be a valid string", other));
                None
            }
        }
    }

    /// A whole number within bounds; `"60"` and `60.0` are 60.
    pub fn integer(&mut self, name: &str, min: i64, max: i64) -> Option<i64> {
        let input = self.get(name)?.clone();
        match coerce_integer(&input) {
            Ok(number) if number < min => {
                self.errors.push(FieldError::new(
                    "greater_than_equal",
                    &[name],
                    format!("Input should be greater than or equal to {min}"),
                    input,
                ));
                None
            }
            Ok(number) if number > max => {
                self.errors.push(FieldError::new(
                    "less_than_equal",
                    &[name],
                    format!("Input should be less than or equal to {max}"),
                    input,
                ));
                None
            }
            Ok(number) => Some(number),
            Err((kind, message)) => {
                self.errors.push(FieldError::new(kind, &[name], message, input));
                None
            }
        }
    }

    pub fn object(&mut self, name: &str) -> Map<String, Value> {
        match self.get(name).cloned() {
            None => Map::new(),
            Some(Value::Object(object)) => object,
            Some(other) => {
                self.errors.push(FieldError::new("dict_type", &[name], "Input should be a valid dictionary", other));
                Map::new()
            }
        }
    }

    /// An object whose values are texts.
    pub fn string_map(&mut self, name: &str) -> Map<String, Value> {
        let object = self.object(name);
        for (key, value) in &object {
            if !value.is_string() {
                self.errors.push(FieldError::new("string_type", &[name, key], "Input should be a valid string", value.clone()));
            }
        }
        object
    }

    /// A field whose support is still to come: said plainly, rather than taken and not honoured.
    pub fn not_yet(&mut self, name: &str) {
        let empty = match self.get(name) {
            None => true,
            Some(Value::Array(list)) => list.is_empty(),
            Some(Value::Object(object)) => object.is_empty(),
            Some(_) => false,
        };
        if !empty {
            let input = self.get(name).cloned().unwrap_or_default();
            self.errors.push(FieldError::value(name, &format!("{name} are not supported by this version"), input));
        }
    }

    /// # Errors
    /// 422 with all that was wrong.
    pub fn finish(self) -> Result<(), ApiError> {
        if self.errors.is_empty() { Ok(()) } else { Err(ApiError::fields(self.errors)) }
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
            let digits = text.strip_suffix(".0").unwrap_or(text);
            digits.parse().map_err(|_| PARSING)
        }
        _ => Err(("int_type", "Input should be a valid integer")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(text: &str) -> Fields {
        Body(text.into()).fields().unwrap()
    }

    #[test]
    fn several_errors_come_together_in_field_order() {
        let mut fields = fields(r#"{"name": 5, "timeout": "x", "metadata": []}"#);
        fields.string("name", 200);
        fields.string("prompt", 200);
        fields.integer("timeout", 10, 3600);
        fields.object("metadata");
        let kinds: Vec<_> = fields.errors.iter().map(|error| (error.kind, error.loc[0].as_str().unwrap().to_owned())).collect();
        let expected = [("string_type", "name"), ("missing", "prompt"), ("int_parsing", "timeout"), ("dict_type", "metadata")];
        assert_eq!(kinds, expected.map(|(kind, name)| (kind, name.to_owned())));
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

    #[test]
    fn what_is_no_json_object_is_refused() {
        assert!(Body(b"{".to_vec()).fields().is_err());
        assert!(Body(b"[1]".to_vec()).fields().is_err());
        assert!(Body("[".repeat(100_000).into_bytes()).fields().is_err());
        assert!(Body(br#"{"a": "\ud800"}"#.to_vec()).fields().is_err());
    }
}
