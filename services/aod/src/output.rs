//! Output: columns for people, JSON for programs.

use std::io::{ErrorKind, Write as _};

use clap::ValueEnum;
use serde_json::Value;

/// Writes a line to standard error. Unlike `eprintln!` it does not panic where that is closed or
/// full.
macro_rules! note {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($arg)*);
    }};
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Text,
    Json,
}

/// The columns of a list.
#[derive(Clone, Copy, Debug)]
pub struct Table(pub &'static [&'static str]);

impl Output {
    /// One resource.
    pub fn one(self, value: &Value) {
        match (self, value) {
            (Self::Text, Value::Object(object)) => {
                let width = object.keys().map(String::len).max().unwrap_or_default();
                for (name, value) in object {
                    print(&format!("{name:<width$}  {}", cell(value)));
                }
            }
            _ => print(&format!("{value:#}")),
        }
    }

    /// A list of resources.
    pub fn list(self, rows: &[Value], table: Table) {
        if self == Self::Json {
            print(&format!("{:#}", Value::from(rows.to_vec())));
            return;
        }
        let header = table.0.iter().map(|name| name.to_uppercase()).collect::<Vec<_>>();
        let cells = rows.iter().map(|row| {
            table
                .0
                .iter()
                .map(|name| cell(row.get(name).unwrap_or(&Value::Null)))
                .collect::<Vec<_>>()
        });
        let lines: Vec<Vec<String>> = std::iter::once(header).chain(cells).collect();
        let width = |column: usize| {
            lines
                .iter()
                .filter_map(|line| line.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or_default()
        };
        let widths: Vec<usize> = (0..table.0.len()).map(width).collect();
        for line in &lines {
            let padded: Vec<String> =
                line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            print(padded.join("  ").trim_end());
        }
    }
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.lines().next().unwrap_or_default().chars().take(80).collect(),
        other => other.to_string(),
    }
}

/// Exit status after a closed pipe: what a shell reports for SIGPIPE.
const EXIT_CLOSED_PIPE: i32 = 141;

/// Writes a line to standard output.
pub fn print(line: &str) {
    write(format!("{line}\n").as_bytes());
}

/// Writes to standard output. Ends the process where that fails: without a message after a closed
/// pipe (`| head`), with one after any other error, so that a full disk is never mistaken for
/// success.
pub fn write(bytes: &[u8]) {
    let mut stdout = std::io::stdout().lock();
    let Err(error) = stdout.write_all(bytes).and_then(|()| stdout.flush()) else { return };
    if error.kind() == ErrorKind::BrokenPipe {
        std::process::exit(EXIT_CLOSED_PIPE);
    }
    note!("aod: cannot write to standard output: {error}");
    std::process::exit(1);
}
