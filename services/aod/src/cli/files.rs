//! Files that commands read.

use std::path::Path;

use serde_json::{Map, Value};

use crate::client::ApiFailure;

/// Reads a whole file as text.
pub fn read_file(path: &Path) -> Result<String, ApiFailure> {
    std::fs::read_to_string(path)
        .map_err(|error| ApiFailure::Local(format!("cannot read {}: {error}", path.display())))
}

/// Reads a file of `NAME=VALUE` lines. A line without `=` is an error, for it would be lost in
/// silence.
pub fn read_variables(path: &Path) -> Result<Map<String, Value>, ApiFailure> {
    let text = read_file(path)?;
    let lines = text
        .lines()
        .zip(1..)
        .filter(|(line, _)| !line.trim().is_empty() && !line.trim_start().starts_with('#'));
    let variable = |(line, number): (&str, u32)| {
        let wrong =
            || ApiFailure::Local(format!("{}, line {number}: not NAME=VALUE", path.display()));
        line.split_once('=')
            .map(|(name, value)| (name.trim().to_owned(), value.into()))
            .ok_or_else(wrong)
    };
    lines.map(variable).collect()
}
