//! What the model says. A script is a list of rules; the first whose `when` is in the prompt
//! answers, step by step: one step for each time the model is asked within a turn, so that a tool
//! call has its follow-up.
//!
//! Texts may hold `{prompt}`, `{first_prompt}`, `{tool_result}`, `{mark}`, `{after}` (what stands
//! behind `when` in the prompt) and `{asked_at}` (microseconds since the epoch).

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::is;

#[derive(Debug)]
pub struct Script {
    rules: Vec<Rule>,
    /// How often each prompt has failed that fails for a while.
    failed: Mutex<HashMap<String, usize>>,
}

/// Prompts whose failures are remembered.
const FAILED_MAX: usize = 1000;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    when: String,
    steps: Vec<Step>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Step {
    text: String,
    /// How often the text is said.
    repeat: Option<usize>,
    /// Between words.
    delay_ms: u64,
    /// Its name; where CLIs call it differently, all its names with `|` between.
    tool: Option<String>,
    input: Value,
    /// A command, run by whichever tool the CLI has for that; after `tool`, where that one is not
    /// offered.
    shell: Option<String>,
    /// Fails with this HTTP status.
    status: Option<String>,
    error: String,
    /// How often it fails before it says its text. Always, if this is not set.
    fails: Option<usize>,
}

/// What was asked, as far as a script can see it.
#[derive(Debug, Default)]
pub struct Question {
    pub prompt: String,
    pub first_prompt: String,
    pub tool_result: String,
    /// How often the model has answered within the turn.
    pub answered: usize,
    /// Whether a tool was looked for within the turn.
    pub searched: bool,
    pub tools: Vec<String>,
    /// The first `MARK-` with a number anywhere in the request: proves that something reached the
    /// model.
    pub mark: String,
}

/// The items of a request, and what a person wrote in them.
pub struct Conversation<'a> {
    pub items: &'a [Value],
    /// Those after the last prompt.
    pub since: &'a [Value],
    pub prompt: String,
    pub first_prompt: String,
}

impl<'a> Conversation<'a> {
    /// Reads the items of a field; `written` is what a person wrote in one of them.
    pub fn read(request: &'a Value, field: &str, written: fn(&Value) -> String) -> Self {
        let items =
            request.get(field).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let is_prompt = |item: &&Value| is(item, "role", "user") && !written(item).is_empty();
        let last = items.iter().rposition(|item| is_prompt(&item));
        Self {
            items,
            since: items.get(last.map_or(0, |index| index + 1)..).unwrap_or_default(),
            prompt: last.and_then(|index| items.get(index)).map(written).unwrap_or_default(),
            first_prompt: items.iter().find(is_prompt).map(written).unwrap_or_default(),
        }
    }
}

/// See [`Question::mark`].
#[must_use]
pub fn mark(request: &Value) -> String {
    let text = request.to_string();
    let Some((_, after)) = text.split_once("MARK-") else { return "no mark".to_owned() };
    format!("MARK-{}", after.chars().take_while(char::is_ascii_digit).collect::<String>())
}

#[derive(Debug, PartialEq)]
pub enum Answer {
    Say { text: String, tool: Option<(String, Value)>, delay: Duration },
    Fail { status: u16, message: String },
}

impl Script {
    /// # Errors
    /// Never, unless the program was built with a broken script.
    pub fn built_in() -> anyhow::Result<Self> {
        Self::parse(include_str!("../script.json"))
    }

    /// # Errors
    /// When the text is no script.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let rules: Vec<Rule> = serde_json::from_str(text).context("not a script")?;
        ensure!(rules.iter().all(|rule| !rule.steps.is_empty()), "a rule without steps");
        Ok(Self { rules, failed: Mutex::default() })
    }

    #[must_use]
    pub fn answer(&self, question: &Question) -> Answer {
        let done = || Answer::Say { text: "Done.".to_owned(), tool: None, delay: Duration::ZERO };
        let Some(rule) = self.rules.iter().find(|rule| question.prompt.contains(&rule.when)) else {
            return done();
        };
        let Some(step) = rule.steps.get(question.answered) else { return done() };
        let after = question.prompt.split_once(&rule.when).map_or("", |(_, after)| after).trim();
        let asked_at = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_micros().to_string();
        let fill = |text: &str| {
            text.replace("{prompt}", &question.prompt)
                .replace("{first_prompt}", &question.first_prompt)
                .replace("{tool_result}", &question.tool_result)
                .replace("{after}", after)
                .replace("{mark}", &question.mark)
                .replace("{asked_at}", &asked_at)
        };
        if let Some(status) = step.status.as_ref().filter(|_| self.fails(step, question)) {
            return Answer::Fail {
                status: fill(status).parse().unwrap_or(500),
                message: fill(&step.error),
            };
        }
        // A tool that was not offered is not called: CLIs also ask for titles and the like.
        let named = step.tool.as_ref().and_then(|names| {
            names.split('|').find(|name| question.tools.iter().any(|tool| tool == name))
        });
        let named = named.map(|name| (name.to_owned(), fill_json(&step.input, &fill)));
        let tool = named
            .or_else(|| search_call(question, step.tool.as_deref()?))
            .or_else(|| shell_call(&question.tools, &fill(step.shell.as_deref()?)));
        Answer::Say {
            text: fill(&step.text).repeat(step.repeat.unwrap_or(1)),
            tool,
            delay: Duration::from_millis(step.delay_ms),
        }
    }
}

impl Script {
    fn fails(&self, step: &Step, question: &Question) -> bool {
        let Some(fails) = step.fails else { return true };
        // CLIs also ask for titles and the like, without tools.
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if question.tools.is_empty()
            || (failed.len() >= FAILED_MAX && !failed.contains_key(&question.prompt))
        {
            return false;
        }
        let count = failed.entry(question.prompt.clone()).or_default();
        *count += 1;
        *count <= fails
    }
}

/// By which Claude Code's models look for a tool that is there and not offered yet.
pub const TOOL_SEARCH: &str = "ToolSearch";

fn search_call(question: &Question, names: &str) -> Option<(String, Value)> {
    let can_search = !question.searched && question.tools.iter().any(|tool| tool == TOOL_SEARCH);
    let name = names.split('|').next().filter(|name| can_search && name.starts_with("mcp__"))?;
    Some((TOOL_SEARCH.to_owned(), serde_json::json!({ "query": format!("select:{name}") })))
}

/// What each CLI calls its shell, and its shell the command.
const SHELLS: [(&str, &str); 4] = [
    ("Bash", "command"),
    ("exec_command", "cmd"),
    ("run_shell_command", "command"),
    ("bash", "command"),
];

fn shell_call(tools: &[String], command: &str) -> Option<(String, Value)> {
    let (name, argument) =
        SHELLS.into_iter().find(|(name, _)| tools.iter().any(|tool| tool == name))?;
    let mut input = serde_json::json!({ argument: command });
    if name != "exec_command" {
        input.as_object_mut()?.insert("description".to_owned(), "As the script says".into());
    }
    Some((name.to_owned(), input))
}

fn fill_json(value: &Value, fill: &impl Fn(&str) -> String) -> Value {
    match value {
        Value::String(text) => Value::String(fill(text)),
        Value::Array(items) => items.iter().map(|item| fill_json(item, fill)).collect(),
        Value::Object(object) => {
            object.iter().map(|(key, value)| (key.clone(), fill_json(value, fill))).collect()
        }
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_call_has_its_follow_up() {
        let script = Script::built_in().unwrap();
        let mut question = Question {
            prompt: "run: echo hi".to_owned(),
            tools: vec!["Bash".to_owned()],
            ..Question::default()
        };
        let Answer::Say { tool: Some((name, input)), .. } = script.answer(&question) else {
            panic!("no tool call")
        };
        assert_eq!((name.as_str(), input["command"].as_str()), ("Bash", Some("echo hi")));
        (question.answered, question.tool_result) = (1, "hi".to_owned());
        assert_eq!(
            script.answer(&question),
            Answer::Say {
                text: "The command said:\nhi".to_owned(),
                tool: None,
                delay: Duration::ZERO
            }
        );
    }

    #[test]
    fn an_error_is_a_status() {
        let question = Question { prompt: "fail with 529".to_owned(), ..Question::default() };
        let expected = Answer::Fail { status: 529, message: "The script says so.".to_owned() };
        assert_eq!(Script::built_in().unwrap().answer(&question), expected);
    }

    #[test]
    fn an_error_may_pass() {
        let (script, tools) = (Script::built_in().unwrap(), vec!["Bash".to_owned()]);
        let question = Question {
            prompt: "a: fail for a while with 529".to_owned(),
            tools,
            ..Question::default()
        };
        let answers: Vec<_> = (0..7)
            .map(|_| matches!(script.answer(&question), Answer::Fail { status: 529, .. }))
            .collect();
        assert_eq!(answers, [true, true, true, true, true, false, false]);
        assert!(
            matches!(script.answer(&question), Answer::Say { text, .. } if text == "It works now.")
        );
    }
}
