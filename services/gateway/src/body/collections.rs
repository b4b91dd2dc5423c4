//! Fields that hold objects and lists.

use std::collections::BTreeMap;

use serde_json::{Map, Value};
use types::limits::{ITEMS_MAX, METADATA_BYTES_MAX};

use crate::body::{
    field_error::FieldError,
    fields::{Fields, WITHOUT_NUL},
};

impl Fields {
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
                    other => {
                        fields.error("string_type", &key, "Input should be a valid string", other)
                    }
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
    pub fn objects<T>(
        &mut self,
        name: &str,
        max: usize,
        mut read: impl FnMut(&mut Self) -> T,
    ) -> Option<Vec<T>> {
        let items = self.list(name)?;
        if self.refuse_more_than(name, items.len(), max) {
            return None;
        }
        let mut values = Vec::with_capacity(items.len());
        for (index, item) in items.into_iter().enumerate() {
            let loc: Vec<Value> =
                self.loc.iter().cloned().chain([name.into(), index.into()]).collect();
            match item {
                Value::Object(object) => {
                    let mut fields = Self::of(object, loc);
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
        let mut fields = Self::of(object, loc);
        let value = read(&mut fields);
        fields.errors.into_iter().for_each(|error| self.add(error));
        Some(value)
    }

    fn within(&mut self, name: &str, read: impl FnOnce(&mut Self)) {
        self.loc.push(name.into());
        read(self);
        self.loc.pop();
    }
}

fn has_nul(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(items) => items.iter().any(has_nul),
        Value::Object(object) => {
            object.iter().any(|(key, value)| key.contains('\0') || has_nul(value))
        }
        _ => false,
    }
}
