//! The agent in its Sprite: its files, and how it is started.
//!
//! A turn's agent is a [`Job`], started by `launch.sh`, which becomes the CLI.

use std::time::Duration;

use bytes::Bytes;
use contract::scheduler::TurnSpec;
use secrecy::{ExposeSecret as _, SecretString};
use sprites::Sprite;
use types::{SessionId, Stage, StageState};

use crate::{
    ModelEndpoints,
    job::{self, Job},
    provision::StageFailed,
    record::Record,
    runtimes::{Adapter, CONVERSATION, Launch, Stdin, SystemPrompt},
    secrets::Secrets,
};

const LAUNCH: &str = include_str!("../scripts/launch.sh");
/// How long a turn's output is waited for once its agent has ended: filters that it writes through, children that end shortly after it.
const DRAIN: Duration = Duration::from_secs(2);

/// One turn's agent.
#[derive(Debug)]
pub struct Agent {
    turn_dir: String,
    settings: String,
    launch: String,
    prompt: Bytes,
    plain_vars: Vec<(String, String)>,
}

impl Agent {
    /// `working_dir`: where the agent works, if there is such a directory.
    pub fn new(
        session: SessionId,
        turn: u32,
        spec: &TurnSpec,
        adapter: &dyn Adapter,
        models: &ModelEndpoints,
        working_dir: Option<&str>,
    ) -> Self {
        let turn_dir = format!("{}/turn-{turn}", job::ROOT);
        let prompt_path = format!("{turn_dir}/prompt");
        let model_id = spec.model.split_once('/').map_or(spec.model.as_str(), |(_, id)| id);
        let launch = Launch { model: &spec.model, model_id, conversation_id: &spec.conversation_id, prompt_path: &prompt_path };
        let word = |arg: &String| if arg == CONVERSATION { format!("\"{CONVERSATION}\"") } else { quote(arg) };
        let line = |argv: Vec<String>| argv.iter().map(word).collect::<Vec<_>>().join(" ");
        let options = match adapter.system_prompt() {
            // Only the first turn brings the text; every turn of the CLI's needs it.
            SystemPrompt::Option { option, path } => format!("[ ! -s {path} ] || set -- \"$@\" {option} {path}"),
            SystemPrompt::Instructions(_) | SystemPrompt::Settings | SystemPrompt::BeforeThePrompt => String::new(),
        };
        let script = LAUNCH
            .replace("@prepare@", adapter.prepare())
            .replace("@find@", if turn > 1 { adapter.find_conversation(&launch) } else { ":".to_owned() }.as_str())
            .replace("@resume@", &line(adapter.resume(&launch)))
            .replace("@begin@", &line(adapter.begin(&launch)))
            .replace("@options@", &options);
        let traceparent = bus::trace::traceparent().unwrap_or_default();
        let launch_path = format!("{turn_dir}/launch.sh");
        let settings = Job {
            mark: format!("{session}/{turn}"),
            timeout: Duration::from_secs(spec.timeout_seconds.into()),
            drain: DRAIN,
            stdin: match adapter.stdin() {
                Stdin::Prompt => &prompt_path,
                Stdin::Empty => "/dev/null",
            },
            working_dirs: working_dir.into_iter().chain(["/workspace", "/home/sprite", "/"]).collect(),
            vars: vec![("TRACEPARENT", &traceparent)],
            // Not what BASH_ENV names: that is for the agent's own shells.
            argv: vec!["/bin/bash", "-p", &launch_path],
        }
        .settings();
        let prompt = match adapter.system_prompt() {
            SystemPrompt::BeforeThePrompt if !spec.system.is_empty() => format!("{}\n\n{}", spec.system, spec.prompt),
            _ => spec.prompt.clone(),
        };
        let prompt = if adapter.is_shell() { prompt.replace("\r\n", "\n") } else { prompt };
        let mut plain_vars = adapter.env(models);
        plain_vars.push(("AOD_SESSION_ID".to_owned(), session.to_string()));
        plain_vars.push(("AOD_MODEL".to_owned(), spec.model.clone()));
        Self { turn_dir, settings, launch: script, prompt: prompt.into(), plain_vars }
    }

    pub fn spool(&self, stderr: bool) -> String {
        format!("{}/{}", self.turn_dir, if stderr { "stderr" } else { "stdout" })
    }

    /// Later ones win: stored credentials, what the runtime and we set, the environment's variables, the session's own.
    pub fn env_file(&self, secrets: &Secrets) -> Vec<u8> {
        let plain = self.plain_vars.iter().map(|(name, value)| (name.clone(), SecretString::from(value.as_str())));
        let vars = secrets.credential_vars().into_iter().chain(plain).chain(secrets.vars());
        vars.flat_map(|(name, value)| format!("{name}={}\0", value.expose_secret()).into_bytes()).collect()
    }

    /// Puts the turn's files in place and its start on record. The agent itself is started by [`Self::follow_command`].
    pub async fn start(&self, sprite: &Sprite, record: &mut Record) -> Result<(), StageFailed> {
        if record.checkpoint.started {
            return Ok(());
        }
        record.stage(Stage::RuntimeStart, StageState::Started, None, None).await?;
        let path = |name: &str| format!("{}/{name}", self.turn_dir);
        let (job, launch, prompt) = (path("job"), path("launch.sh"), path("prompt"));
        let (job, launch, prompt) = tokio::join!(
            sprite.write(&job, self.settings.clone(), 0o600),
            sprite.write(&launch, self.launch.clone(), 0o700),
            sprite.write(&prompt, self.prompt.clone(), 0o600),
        );
        let written = job.and(launch).and(prompt);
        written.map_err(|error| StageFailed::Failed { stage: Stage::RuntimeStart, message: error.to_string() })?;
        Ok(record.started().await?)
    }

    /// Starts the agent if it was not, then follows its spool from the given offsets.
    pub fn follow_command(&self, stdout_offset: u64, stderr_offset: u64) -> String {
        job::follow_command(&self.turn_dir, "job", Some((stdout_offset, stderr_offset)))
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
