//! One thing that is wrong with one field, in the shape of pydantic v2.

use serde_json::{Value, json};

use crate::body::echo::{ECHO_BYTES_MAX, echo, shortened};

/// How long a message is, and a name in `loc`.
pub const MESSAGE_BYTES_MAX: usize = 512;

/// One thing that is wrong with one field.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldError {
    pub kind: &'static str,
    pub loc: Vec<Value>,
    pub msg: String,
    pub input: Value,
}

impl FieldError {
    /// A value that the rules of the domain refuse.
    pub fn value(field: &str, text: &str, input: Value) -> Self {
        let text = text.strip_prefix("Value error, ").unwrap_or(text);
        Self {
            kind: "value_error",
            loc: vec![field.into()],
            msg: format!("Value error, {text}"),
            input,
        }
    }

    pub fn into_json(self) -> Value {
        json!({ "type": self.kind, "loc": self.loc, "msg": self.msg, "input": self.input })
    }

    /// Cut to what an answer shows of it.
    pub fn shortened(self) -> Self {
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
