//! Builds the agent host's specification of a session's agent, and a turn's message to it.

use std::{collections::BTreeMap, time::Duration};

use contract::{
    host::{
        Evaluation, Input, Message, PermissionRule, Permissions, Spec, Variable, WhenBusy, input,
    },
    scheduler::TurnSpec,
};
use prost::Message as _;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use types::{Runtime, SessionId, limits::KILL_GRACE};
use zeroize::Zeroizing;

use crate::{
    ModelEndpoints, playback,
    runtimes::{Adapter, MCP_FAILURES},
    secrets::Secrets,
    setup::Setup,
};

/// How long output of children that an agent or a step left running is waited for.
const DRAIN: Duration = Duration::from_secs(2);

/// A session's agent, without its secrets.
#[derive(Debug)]
pub struct Agent {
    spec: Spec,
    plain_vars: Vec<(String, String)>,
    prompt: String,
}

impl Agent {
    /// # Errors
    /// When the scheduler sent what this runner does not understand.
    pub fn new(
        session: SessionId,
        spec: &TurnSpec,
        (runtime, adapter): (Runtime, &dyn Adapter),
        models: &ModelEndpoints,
        setup: &Setup,
        idle: Duration,
    ) -> Result<Self, serde_json::Error> {
        let model_id = spec.model.split_once('/').map_or(spec.model.as_str(), |(_, id)| id);
        let is_shell = runtime == Runtime::Shell;
        // A shell has no instructions of its own: it runs them first.
        let prompt = match (is_shell, spec.system.is_empty()) {
            (true, false) => format!("{}\n\n{}", spec.system, spec.prompt),
            _ => spec.prompt.clone(),
        };
        let mut plain_vars = adapter.env(models);
        plain_vars.push(("AOD_SESSION_ID".to_owned(), session.to_string()));
        plain_vars.push(("AOD_MODEL".to_owned(), spec.model.clone()));
        let spec = Spec {
            session_id: session.to_string(),
            runtime: runtime.as_str().to_owned(),
            model: if runtime == Runtime::Opencode {
                spec.model.clone()
            } else {
                model_id.to_owned()
            },
            system: if is_shell { String::new() } else { spec.system.clone() },
            conversation_id: spec.conversation_id.clone(),
            working_directories: setup
                .working_dir()
                .into_iter()
                .chain(["/workspace"])
                .map(str::to_owned)
                .collect(),
            idle_seconds: u32::try_from(idle.as_secs()).unwrap_or(u32::MAX),
            kill_grace_ms: u32::try_from(KILL_GRACE.as_millis()).unwrap_or(u32::MAX),
            drain_quiet_ms: u32::try_from(DRAIN.as_millis()).unwrap_or(u32::MAX),
            permissions: permissions(&spec.permissions)?,
            refused_log: "/.sprite/policy/refused".to_owned(),
            tasks_socket: "/.sprite/api.sock".to_owned(),
            mcp_servers: crate::runtimes::mcp_names(setup.mcp_servers.clone())
                .into_iter()
                .map(|server| server.name)
                .collect(),
            custom_tools: spec.custom_tools.clone(),
            partial_messages: spec.previews,
            mcp_failures: if adapter.tells_of_mcp_servers() {
                String::new()
            } else {
                MCP_FAILURES.to_owned()
            },
            ..Spec::default()
        };
        Ok(Self {
            spec,
            plain_vars,
            // A browser's text fields send line ends that a shell takes for parts of names.
            prompt: if is_shell { prompt.replace("\r\n", "\n") } else { prompt },
        })
    }

    /// Adds variables that the sandbox server wants its programs to have.
    pub fn add_variables(&mut self, variables: BTreeMap<String, String>) {
        self.plain_vars.extend(variables);
    }

    /// The specification of the session's host. Later variables win: stored credentials, what the
    /// runtime and we set, the environment's variables, the session's own.
    pub fn spec(&self, secrets: &Secrets, revision: String) -> Zeroizing<Vec<u8>> {
        let plain = self
            .plain_vars
            .iter()
            .map(|(name, value)| (name.clone(), SecretString::from(value.as_str())));
        let vars = secrets.credential_vars().into_iter().chain(plain).chain(secrets.vars());
        let env: Vec<Variable> = vars
            .map(|(name, value)| Variable { name, value: value.expose_secret().to_owned() })
            .collect();
        let append_path = program_folders(&env);
        Zeroizing::new(Spec { env, append_path, revision, ..self.spec.clone() }.encode_to_vec())
    }

    /// Tells what an agent's process was started with: all but the token for the model gateway,
    /// which is another for each claim and stays good. Stored keys are part of it.
    pub fn revision(&self, secrets: &Secrets, config: &[(&'static str, String)]) -> String {
        let mut digest = Sha256::new().chain_update(self.spec.encode_to_vec());
        let mut add = |text: &str| {
            digest.update([&(text.len() as u64).to_be_bytes(), text.as_bytes()].concat())
        };
        for (name, value) in &self.plain_vars {
            add(name);
            add(value);
        }
        for (name, value) in secrets.stored_vars().into_iter().chain(secrets.vars()) {
            add(&name);
            add(value.expose_secret());
        }
        for (path, content) in config {
            add(path);
            add(content);
        }
        digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The message that begins a turn. It interrupts a turn that still runs, which no one owns any
    /// more.
    pub fn message(&self, turn: u32, timeout_seconds: u32) -> Input {
        let message = Message {
            turn,
            text: self.prompt.clone(),
            timeout_seconds,
            when_busy: WhenBusy::Interrupt.into(),
            traceparent: traceparent(),
        };
        Input { id: playback::turn_input(turn), kind: Some(input::Kind::Message(message)) }
    }
}

/// The trace of the turn at hand, for the processes that are started for it.
pub fn traceparent() -> String {
    bus::trace::traceparent().unwrap_or_default()
}

/// Where pip, cargo and go put programs.
fn program_folders(env: &[Variable]) -> Vec<String> {
    let value = |name: &str| {
        env.iter()
            .rev()
            .find(|variable| variable.name == name && !variable.value.is_empty())
            .map(|variable| &variable.value)
    };
    let below =
        |name: &str, usual: &str| format!("{}/bin", value(name).map_or(usual, String::as_str));
    let go = value("GOBIN").cloned().unwrap_or_else(|| below("GOPATH", "~/go"));
    vec!["~/.local/bin".to_owned(), below("CARGO_HOME", "~/.cargo"), go]
}

/// An agent's permissions, as the scheduler keeps them.
#[derive(Deserialize)]
struct Rules {
    #[serde(default)]
    default: Option<Verdict>,
    #[serde(default)]
    rules: Vec<Rule>,
}

#[derive(Deserialize)]
struct Rule {
    tool: String,
    evaluation: Verdict,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Allow,
    Ask,
    Deny,
}

impl Verdict {
    fn evaluation(self) -> i32 {
        match self {
            Self::Allow => Evaluation::Allow,
            Self::Ask => Evaluation::Ask,
            Self::Deny => Evaluation::Deny,
        }
        .into()
    }
}

fn permissions(json: &str) -> Result<Option<Permissions>, serde_json::Error> {
    if json.is_empty() {
        return Ok(None);
    }
    let Rules { default, rules } = serde_json::from_str(json)?;
    let rules = rules
        .into_iter()
        .map(|rule| PermissionRule { tool: rule.tool, evaluation: rule.evaluation.evaluation() })
        .collect();
    Ok(Some(Permissions { rules, otherwise: default.map_or(0, Verdict::evaluation) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_are_read_as_the_scheduler_keeps_them() {
        assert_eq!(permissions("").unwrap(), None);
        let read = permissions(
            r#"{"default":"ask","rules":[{"tool":"Bash","evaluation":"deny"},{"tool":"Read","evaluation":"allow"}]}"#,
        );
        let rule = |tool: &str, evaluation: Evaluation| PermissionRule {
            tool: tool.to_owned(),
            evaluation: evaluation.into(),
        };
        let rules = vec![rule("Bash", Evaluation::Deny), rule("Read", Evaluation::Allow)];
        assert_eq!(read.unwrap(), Some(Permissions { rules, otherwise: Evaluation::Ask.into() }));
        // Permissions that cannot be read allow nothing.
        assert!(permissions(r#"{"default":"maybe"}"#).is_err());
    }

    #[test]
    fn programs_are_found_where_the_users_variables_put_them() {
        let env = [("CARGO_HOME", "/c"), ("GOPATH", "/g")]
            .map(|(name, value)| Variable { name: name.to_owned(), value: value.to_owned() });
        assert_eq!(program_folders(&env), ["~/.local/bin", "/c/bin", "/g/bin"]);
        assert_eq!(program_folders(&[]), ["~/.local/bin", "~/.cargo/bin", "~/go/bin"]);
    }
}
