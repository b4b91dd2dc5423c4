//! What an adapter needs done in the user's home before its CLI starts. Runs as the user: links
//! that the agent laid lead no further than the agent itself could go.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use serde_json::{Value, json};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Writes a file below the home, with mode 0600.
    Write { path: String, text: String },
    /// Of the files below `folder` whose names end with `suffix`: keeps the largest as `name`
    /// beside where it was, deletes the others.
    KeepLargest { folder: String, suffix: String, name: String },
}

pub fn to_json(actions: &[Action]) -> String {
    let action = |action: &Action| match action {
        Action::Write { path, text } => json!({ "write": path, "text": text }),
        Action::KeepLargest { folder, suffix, name } => {
            json!({ "keep_largest": folder, "suffix": suffix, "name": name })
        }
    };
    Value::Array(actions.iter().map(action).collect()).to_string()
}

/// Carries out the actions on standard input.
pub fn run() -> ExitCode {
    let mut text = String::new();
    let home = PathBuf::from(crate::variable("HOME").unwrap_or_else(|| "/".to_owned()));
    if std::io::stdin().read_to_string(&mut text).is_err() {
        return ExitCode::FAILURE;
    }
    let actions: Value = serde_json::from_str(&text).unwrap_or_default();
    let done =
        actions.as_array().into_iter().flatten().all(|action| carry_out(&home, action).is_ok());
    if done { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn carry_out(home: &Path, action: &Value) -> std::io::Result<()> {
    let field = |name: &str| action.get(name).and_then(Value::as_str);
    if let (Some(path), Some(text)) = (field("write"), field("text")) {
        let path = home.join(path);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let draft = path.with_extension("draft");
        fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&draft)?
            .write_all(text.as_bytes())?;
        return fs::rename(draft, path);
    }
    if let (Some(folder), Some(suffix), Some(name)) =
        (field("keep_largest"), field("suffix"), field("name"))
    {
        let mut files = Vec::new();
        collect(&home.join(folder), suffix, 4, &mut files);
        files.sort();
        if let Some((_, largest)) = files.pop() {
            for (_, other) in files {
                fs::remove_file(other)?;
            }
            fs::rename(&largest, largest.with_file_name(name))?;
        }
    }
    Ok(())
}

fn collect(folder: &Path, suffix: &str, depth: usize, files: &mut Vec<(u64, PathBuf)>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() && depth > 0 {
            collect(&entry.path(), suffix, depth - 1, files);
        } else if kind.is_file() && entry.file_name().to_string_lossy().ends_with(suffix) {
            files.push((entry.metadata().map_or(0, |metadata| metadata.len()), entry.path()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_file_of_a_conversation_is_kept_under_a_name_of_long_ago() {
        let home = tempfile::tempdir().unwrap();
        let chats = home.path().join("tmp/project/chats");
        fs::create_dir_all(&chats).unwrap();
        fs::write(chats.join("session-2026-11-25T10-00-c0ffee12.jsonl"), "long conversation")
            .unwrap();
        fs::write(chats.join("session-2026-11-25T10-05-c0ffee12.jsonl"), "short").unwrap();
        fs::write(chats.join("session-2026-11-25T10-05-other123.jsonl"), "other").unwrap();
        let action = Action::KeepLargest {
            folder: "tmp".to_owned(),
            suffix: "-c0ffee12.jsonl".to_owned(),
            name: "session-2020-01-01T00-00-c0ffee12.jsonl".to_owned(),
        };
        for action in
            serde_json::from_str::<Value>(&to_json(&[action])).unwrap().as_array().unwrap()
        {
            carry_out(home.path(), action).unwrap();
        }
        let mut names: Vec<String> = fs::read_dir(&chats)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(
            names,
            ["session-2020-01-01T00-00-c0ffee12.jsonl", "session-2026-11-25T10-05-other123.jsonl"]
        );
        assert_eq!(fs::read_to_string(chats.join(&names[0])).unwrap(), "long conversation");
    }
}
