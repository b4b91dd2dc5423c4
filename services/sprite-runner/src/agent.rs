//! The agent in its Sprite: its files, and how it is started.
//!
//! `run-agent.sh` runs the CLI detached and spools its output to files, then writes its exit status, atomically. It never depends on
//! anybody watching, starts at most once however often it is called, and enforces the turn's timeout itself.

use std::iter;

use bytes::Bytes;
use contract::scheduler::TurnSpec;
use secrecy::{ExposeSecret as _, SecretString};
use sprites::Sprite;
use types::{SessionId, Stage, StageState, limits::KILL_GRACE};

use crate::{
    ModelEndpoints,
    provision::StageFailed,
    record::Record,
    runtimes::{Adapter, CONVERSATION, Launch, Stdin},
    secrets::Secrets,
};

const RUN_AGENT: &str = include_str!("../scripts/run-agent.sh");
const FOLLOW: &str = include_str!("../scripts/follow.pl");
/// Where pip, cargo and go put what they install for a user: after what the Sprite has, and looked up by set-up scripts and agents alike.
const OWN_PROGRAMS: &str = "PATH=$PATH:$HOME/.local/bin:${CARGO_HOME:-$HOME/.cargo}/bin:${GOBIN:-${GOPATH:-$HOME/go}/bin}\n";
const FOLLOW_PATH: &str = "/home/sprite/.aod/follow.pl";

/// One turn's agent.
#[derive(Debug)]
pub struct Agent {
    turn_dir: String,
    script: String,
    prompt: Bytes,
    plain_vars: Vec<(String, String)>,
}

impl Agent {
    /// What the session's processes find in their environment. Sourced by a shell.
    pub const ENV_FILE: &'static str = "/home/sprite/.aod/env";

    pub fn new(session: SessionId, turn: u32, spec: &TurnSpec, adapter: &dyn Adapter, models: &ModelEndpoints) -> Self {
        let turn_dir = format!("/home/sprite/.aod/turn-{turn}");
        let prompt_path = format!("{turn_dir}/prompt");
        let model_id = spec.model.split_once('/').map_or(spec.model.as_str(), |(_, id)| id);
        let launch = Launch { model: &spec.model, model_id, conversation_id: &spec.conversation_id, prompt_path: &prompt_path };
        let word = |arg: &String| if arg == CONVERSATION { format!("\"{CONVERSATION}\"") } else { quote(arg) };
        let line = |argv: Vec<String>| argv.iter().map(word).collect::<Vec<_>>().join(" ");
        let find = if turn > 1 { adapter.find_conversation(&launch) } else { String::new() };
        let stdin = match adapter.stdin() {
            Stdin::Prompt => "prompt",
            Stdin::Empty => "/dev/null",
        };
        let traceparent = bus::trace::traceparent().unwrap_or_default();
        let settings = [
            ("TIMEOUT", spec.timeout_seconds.to_string()),
            ("KILL_GRACE", KILL_GRACE.as_secs().to_string()),
            ("MARK", format!("{session}/{turn}")),
            ("STDIN", stdin.to_owned()),
            ("ENV_FILE", Self::ENV_FILE.to_owned()),
            ("TRACE", quote(&traceparent)),
        ];
        let settings: String = settings.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
        let script = RUN_AGENT
            .replace("# @settings@\n", &settings)
            .replace("@prepare@", adapter.prepare())
            .replace("@find@", &find)
            .replace("@resume@", &line(adapter.resume(&launch)))
            .replace("@begin@", &line(adapter.begin(&launch)));
        let prompt = if spec.system.is_empty() { spec.prompt.clone() } else { format!("{}\n\n{}", spec.system, spec.prompt) };
        let mut plain_vars = adapter.env(models);
        plain_vars.push(("AOD_SESSION_ID".to_owned(), session.to_string()));
        plain_vars.push(("AOD_MODEL".to_owned(), spec.model.clone()));
        Self { turn_dir, script, prompt: prompt.into(), plain_vars }
    }

    pub fn spool(&self, stderr: bool) -> String {
        format!("{}/{}", self.turn_dir, if stderr { "stderr" } else { "stdout" })
    }

    /// Later lines win: where programs are, stored credentials, what the runtime and we set, the environment's variables, the session's own.
    pub fn env_file(&self, secrets: &Secrets) -> String {
        let plain = self.plain_vars.iter().map(|(name, value)| (name.clone(), SecretString::from(value.as_str())));
        let vars = secrets.credential_vars().into_iter().chain(plain).chain(secrets.vars());
        let lines = vars.map(|(name, value)| format!("{name}={}\n", quote(value.expose_secret())));
        iter::once(OWN_PROGRAMS.to_owned()).chain(lines).collect()
    }

    /// What every turn of the session uses.
    pub async fn write_tools(&self, sprite: &Sprite) -> Result<(), sprites::Error> {
        sprite.write(FOLLOW_PATH, FOLLOW, 0o700).await
    }

    /// Puts the turn's files in place and its start on record. The agent itself is started by [`Self::follow_command`].
    pub async fn start(&self, sprite: &Sprite, record: &mut Record) -> Result<(), StageFailed> {
        if record.checkpoint.started {
            return Ok(());
        }
        record.stage(Stage::RuntimeStart, StageState::Started, None, None).await?;
        let (script_path, prompt_path) = (format!("{}/run-agent.sh", self.turn_dir), format!("{}/prompt", self.turn_dir));
        let (script, prompt) =
            tokio::join!(sprite.write(&script_path, self.script.clone(), 0o700), sprite.write(&prompt_path, self.prompt.clone(), 0o600),);
        script.and(prompt).map_err(|error| StageFailed::Failed { stage: Stage::RuntimeStart, message: error.to_string() })?;
        Ok(record.started().await?)
    }

    /// Starts the agent if it was not, then follows its spool from the given offsets.
    pub fn follow_command(&self, stdout_offset: u64, stderr_offset: u64) -> String {
        format!("bash {0}/run-agent.sh && exec perl {FOLLOW_PATH} {0} {stdout_offset} {stderr_offset}", self.turn_dir)
    }
}

/// One word of a POSIX shell.
pub fn quote(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "@%+=:,./-_".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(50))]
        #[test]
        fn a_shell_reads_what_was_quoted(text in "[^\0]*") {
            let script = format!("printf %s {}", quote(&text));
            let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
            prop_assert_eq!(output.stdout, text.as_bytes());
        }
    }
}
