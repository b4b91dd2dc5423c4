//! `SKILL.md`: the YAML front matter that CLIs know a skill by, and the text below it.

use serde_json::{Map, Value};

use crate::agent::InlineSkill;

/// Errors of the front matter of a `SKILL.md`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the front matter between the first two '---' lines is not YAML: {0}")]
pub struct FrontMatterError(String);

/// A text in its two parts.
#[derive(Debug, PartialEq)]
struct Parts<'a> {
    /// The YAML and what it says; `None` for a text without front matter.
    front_matter: Option<(&'a str, Map<String, Value>)>,
    body: &'a str,
}

/// Line ends as CLIs read them, and nothing before the first line that says something.
fn normalized(content: &str) -> String {
    let content = content.strip_prefix('\u{feff}').unwrap_or(content).replace("\r\n", "\n");
    let blank: usize =
        content.split_inclusive('\n').take_while(|line| line.trim().is_empty()).map(str::len).sum();
    content.get(blank..).unwrap_or_default().to_owned()
}

/// Expects a normalized text. A rule (`---`) that nothing closes, or with plain text up to the next
/// one, is part of the body.
fn split(text: &str) -> Result<Parts<'_>, FrontMatterError> {
    let without = Parts { front_matter: None, body: text };
    let mut lines = text.split_inclusive('\n');
    let Some(first) = lines.next().filter(|line| line.trim_end() == "---") else {
        return Ok(without);
    };
    let mut yaml_bytes = 0;
    for line in lines {
        if line.trim_end() != "---" {
            yaml_bytes += line.len();
            continue;
        }
        let yaml = text.get(first.len()..first.len() + yaml_bytes).unwrap_or_default();
        let body = text.get(first.len() + yaml_bytes + line.len()..).unwrap_or_default();
        let value = if yaml.trim().is_empty() { Value::Null } else { parse(yaml)? };
        return Ok(match value {
            Value::Object(fields) => Parts { front_matter: Some((yaml, fields)), body },
            Value::Null => Parts { front_matter: Some((yaml, Map::new())), body },
            _ => without,
        });
    }
    Ok(without)
}

fn parse(yaml: &str) -> Result<Value, FrontMatterError> {
    serde_saphyr::from_str(yaml).map_err(|error| {
        let first_line =
            error.to_string().lines().next().unwrap_or_default().chars().take(200).collect();
        FrontMatterError(first_line)
    })
}

/// # Errors
/// When the content begins with front matter that no YAML parser reads.
pub fn check_content(content: &str) -> Result<(), FrontMatterError> {
    split(&normalized(content)).map(|_| ())
}

/// The text of the skill's `SKILL.md`. The author's front matter stays as it is; a name or a
/// description that it lacks is the skill's own.
#[must_use]
pub fn skill_file(skill: &InlineSkill) -> String {
    let text = normalized(&skill.content);
    let parts = split(&text).unwrap_or(Parts { front_matter: None, body: &text });
    let (yaml, mut fields) = parts.front_matter.unwrap_or_default();
    let own = [("description", &skill.description), ("name", &skill.name)];
    let missing = own.map(|(key, value)| {
        fields.get(key).and_then(Value::as_str).is_none_or(str::is_empty).then_some((key, value))
    });
    if missing == [None, None] {
        return format!("---\n{yaml}---\n{}", parts.body);
    }
    for (key, value) in missing.into_iter().flatten() {
        fields.shift_insert(0, key.to_owned(), value.as_str().into());
    }
    // JSON is YAML.
    let plain = |key: &String| {
        key.bytes().all(|c| c.is_ascii_alphabetic() || c == b'_' || c == b'-') && !key.is_empty()
    };
    let key =
        |key: &String| if plain(key) { key.clone() } else { Value::from(key.as_str()).to_string() };
    let value = |value: &Value| match value.as_str() {
        Some(text) if is_plain(text) => text.to_owned(),
        _ => value.to_string(),
    };
    let lines: String =
        fields.iter().map(|(name, field)| format!("{}: {}\n", key(name), value(field))).collect();
    format!("---\n{lines}---\n\n{}", parts.body.trim_start_matches('\n'))
}

/// A skill's name that no YAML reader takes for anything but a text.
fn is_plain(text: &str) -> bool {
    const OTHER: [&str; 10] = ["true", "false", "null", "yes", "no", "on", "off", "y", "n", "nan"];
    text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-')
        && !OTHER.contains(&text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(content: &str) -> String {
        skill_file(&InlineSkill {
            name: "sea".to_owned(),
            description: "Knows: \"blue\"".to_owned(),
            content: content.to_owned(),
        })
    }

    #[test]
    fn front_matter_is_found_whatever_is_around_it() {
        let own = "---\nname: own\ndescription: The author's: \"words\"\n---\nLook.\n";
        let own = own.replace("The author's: \"words\"", "The author's words");
        for content in [
            own.clone(),
            own.replace('\n', "\r\n"),
            format!("\u{feff}{own}"),
            format!("\n \r\n{own}"),
            own.replacen("---", "---  ", 1),
        ] {
            assert_eq!(file(&content), own, "{content:?}");
        }
    }

    #[test]
    fn a_text_without_front_matter_gets_it() {
        let added = "---\nname: sea\ndescription: \"Knows: \\\"blue\\\"\"\n---\n\n";
        for body in [
            "Look.",
            "---\nText below a rule.\n",
            "---\nText between two rules.\n---\nMore.",
            "----\nname: x\n---\n",
            "",
        ] {
            assert_eq!(file(body), format!("{added}{body}"), "{body:?}");
        }
        assert_eq!(file("---\n---\nLook."), format!("{added}Look."), "empty front matter");
    }

    #[test]
    fn missing_author_fields_are_added_and_others_kept() {
        let text = file(
            "---\nallowed-tools: [Bash, Read]\n\"an odd key\": {a: 1}\nname: own\n---\n\nLook.",
        );
        assert_eq!(
            text,
            "---\ndescription: \"Knows: \\\"blue\\\"\"\nallowed-tools: [\"Bash\",\"Read\"]\n\"an odd key\": {\"a\":1}\nname: own\n---\n\nLook."
        );
    }

    #[test]
    fn front_matter_that_is_no_yaml_is_refused_with_the_parsers_reason() {
        for content in [
            "---\nname: x\ndescription: use when: asked\n---\n",
            "---\nname: [x\n---\n",
            "---\r\nname: 'x\r\n---\r\n",
        ] {
            let refused = check_content(content).expect_err(content).to_string();
            assert!(refused.contains("not YAML: ") && refused.len() < 400, "{refused}");
        }
        assert_eq!(check_content("---\nno front matter\n"), Ok(()));
    }

    proptest! {
        #[test]
        fn every_accepted_content_becomes_a_file_with_a_name_and_a_description(content in "(\u{feff}|\r?\n| |---|name: a\r?\n|description: b\n|[a-z:\\[{'\"#&*!|>-]{0,4}\r?\n){0,10}") {
            let text = file(&content);
            let parts = split(&text).unwrap();
            let (_, fields) = parts.front_matter.unwrap();
            prop_assert!(fields["name"].is_string() && fields["description"].is_string());
        }
    }
}
