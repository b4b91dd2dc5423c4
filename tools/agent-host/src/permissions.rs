//! Which rule decides about a tool call.
//!
//! A rule names a tool, the beginning of tools' names followed by `*`, or `tool(pattern)`. A
//! pattern is compared with the call's command, path or address; `*` stands for anything, and
//! `words:*` for the words alone or followed by more. A command is a shell's text, and more than
//! one program may run in it: a rule that denies or asks matches when any part of it does, one that
//! allows only when there is but one part.

use contract::host::{Evaluation, PermissionRule, Permissions};
use serde_json::Value;

/// What a pattern is compared with, in this order.
const SUBJECTS: [&str; 10] = [
    "command",
    "cmd",
    "file_path",
    "filePath",
    "notebook_path",
    "path",
    "url",
    "query",
    "pattern",
    "title",
];
const COMMANDS: [&str; 2] = ["command", "cmd"];
/// Where one program of a shell's text ends and another may begin, or where what it does is decided
/// only as it runs.
const SEPARATORS: [char; 10] = [';', '&', '|', '\n', '\r', '(', ')', '`', '{', '}'];
const REDIRECTIONS: [char; 3] = ['<', '>', '$'];

/// The first rule that matches; unspecified where nothing does and no default is given.
pub fn evaluate(permissions: &Permissions, tool: &str, input_json: &str) -> Evaluation {
    let input = serde_json::from_str(input_json).unwrap_or_default();
    let found = permissions.rules.iter().find(|rule| matches(rule, tool, &input));
    found.map_or(permissions.otherwise(), PermissionRule::evaluation)
}

fn matches(rule: &PermissionRule, tool: &str, input: &Value) -> bool {
    if let Some((name, pattern)) = rule.tool.strip_suffix(')').and_then(|rule| rule.split_once('('))
    {
        return tool == name
            && subject(input).is_some_and(|subject| subject.matches(pattern, rule.evaluation()));
    }
    match rule.tool.strip_suffix('*') {
        Some(prefix) => tool.starts_with(prefix),
        None => tool == rule.tool,
    }
}

/// What a call is about.
struct Subject {
    text: String,
    is_command: bool,
}

fn subject(input: &Value) -> Option<Subject> {
    SUBJECTS.into_iter().find_map(|name| {
        let text = match input.get(name)? {
            Value::String(text) => text.clone(),
            Value::Array(words) => {
                words.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" ")
            }
            _ => return None,
        };
        Some(Subject { text, is_command: COMMANDS.contains(&name) })
    })
}

impl Subject {
    fn matches(&self, pattern: &str, evaluation: Evaluation) -> bool {
        let text = self.text.trim();
        match (self.is_command, evaluation) {
            (true, Evaluation::Allow) => {
                !text.contains(SEPARATORS) && !text.contains(REDIRECTIONS) && is_like(text, pattern)
            }
            (true, _) => {
                is_like(text, pattern)
                    || text.split(SEPARATORS).any(|part| is_like(part.trim(), pattern))
            }
            (false, _) => is_like(text, pattern),
        }
    }
}

fn is_like(text: &str, pattern: &str) -> bool {
    if let Some(words) = pattern.strip_suffix(":*") {
        return text
            .strip_prefix(words)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(' '));
    }
    let Some((first, rest)) = pattern.split_once('*') else { return text == pattern };
    let Some(mut text) = text.strip_prefix(first) else { return false };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let last = parts.pop().unwrap_or_default();
    for part in parts {
        // The earliest place leaves the most for the rest.
        let Some(at) = text.find(part) else { return false };
        text = text.get(at + part.len()..).unwrap_or_default();
    }
    text.ends_with(last)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decide(rules: &[(&str, Evaluation)], tool: &str, input: &Value) -> Evaluation {
        let rules = rules.iter().map(|(tool, evaluation)| PermissionRule {
            tool: (*tool).to_owned(),
            evaluation: (*evaluation).into(),
        });
        evaluate(
            &Permissions { rules: rules.collect(), otherwise: Evaluation::Ask.into() },
            tool,
            &input.to_string(),
        )
    }

    #[test]
    fn a_pattern_matches_the_command_path_or_address_of_a_call() {
        let rules = [
            ("Bash(git push *)", Evaluation::Deny),
            ("Bash(git:*)", Evaluation::Allow),
            ("Bash(npm run test*)", Evaluation::Allow),
            ("Edit(/workspace/*.rs)", Evaluation::Allow),
            ("mcp__*", Evaluation::Allow),
            ("WebFetch(https://example.org/*)", Evaluation::Allow),
        ];
        let bash =
            |command: &str| decide(&rules, "Bash", &serde_json::json!({ "command": command }));
        for (command, evaluation) in [
            ("git status", Evaluation::Allow),
            ("git", Evaluation::Allow),
            ("gitk", Evaluation::Ask),
            ("git push origin main", Evaluation::Deny),
            ("cd /x && git push origin main", Evaluation::Deny),
            ("echo $(git push --force origin)", Evaluation::Deny),
            ("git status; rm -rf /", Evaluation::Ask),
            ("git log > /etc/passwd", Evaluation::Ask),
            ("git log | sh", Evaluation::Ask),
            ("git log `id`", Evaluation::Ask),
            ("git log $X", Evaluation::Ask),
            ("git log\nrm x", Evaluation::Ask),
            ("npm run test:unit", Evaluation::Allow),
            ("rm x", Evaluation::Ask),
        ] {
            assert_eq!(bash(command), evaluation, "{command}");
        }
        let call = |tool: &str, name: &str, text: &str| {
            decide(&rules, tool, &serde_json::json!({ name: text }))
        };
        assert_eq!(call("Edit", "file_path", "/workspace/src/main.rs"), Evaluation::Allow);
        assert_eq!(call("Edit", "file_path", "/etc/main.rs"), Evaluation::Ask);
        assert_eq!(call("WebFetch", "url", "https://example.org/a;b"), Evaluation::Allow);
        assert_eq!(call("mcp__a__b", "x", ""), Evaluation::Allow);
        // A list of words, as one CLI sends it; and what has no subject is like no pattern.
        assert_eq!(
            decide(&rules, "Bash", &serde_json::json!({ "command": ["git", "diff"] })),
            Evaluation::Allow
        );
        assert_eq!(
            decide(&rules, "Bash", &serde_json::json!({ "other": "git diff" })),
            Evaluation::Ask
        );
    }

    proptest! {
        #[test]
        fn patterns_are_matched_as_a_regular_expression_would(text in "[ab ]{0,8}", pattern in "[ab *]{0,6}") {
            let expected = {
                // All ways to read the pattern.
                fn reads(text: &[u8], pattern: &[u8]) -> bool {
                    match pattern {
                        [] => text.is_empty(),
                        [b'*', rest @ ..] => (0..=text.len()).any(|at| reads(&text[at..], rest)),
                        [byte, rest @ ..] => text.first() == Some(byte) && reads(&text[1..], rest),
                    }
                }
                reads(text.as_bytes(), pattern.as_bytes())
            };
            prop_assert_eq!(is_like(&text, &pattern), expected);
        }

        #[test]
        fn an_allowed_command_is_one_program(command in "git [a-z;&|<>$`(){} \n]{0,12}") {
            let allowed = decide(&[("Bash(git *)", Evaluation::Allow)], "Bash", &serde_json::json!({ "command": command }));
            let is_one = !command.trim().contains([';', '&', '|', '<', '>', '$', '`', '(', ')', '{', '}', '\n']);
            prop_assert!(is_one || allowed == Evaluation::Ask, "{command}");
        }
    }
}
