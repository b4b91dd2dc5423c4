//! Setting a new Sprite up, stage by stage, each stage an event. Every stage may be run twice: a successor begins with the first that
//! is not on record as done.

use std::{
    fmt,
    time::{Duration, Instant},
};

use sprites::{Client, ExecRequest, Sprite};
use tracing::Instrument as _;
use types::{Runtime, SessionId, Skill, Stage, StageState};

use crate::{
    ModelEndpoints,
    agent::{Agent, quote},
    diagnosis,
    follow::{self, Contact, Gone},
    job::{self, Job, Status},
    record::{Fenced, Record},
    runtimes::{self, Adapter, Skills},
    secrets::Secrets,
    setup::{self, Setup, Step},
};

/// No single stage takes longer.
const STAGE_MAX: Duration = Duration::from_secs(600);
/// How much of a failed script's last words its user is told, of each stream.
const TAIL_BYTES: usize = 2000;
/// How long a step's output is waited for once its script has ended.
const DRAIN: Duration = Duration::from_secs(1);

/// How long a failure waits for what the script said.
const SAID_DEADLINE: Duration = Duration::from_secs(20);

const GIT_CREDENTIALS: &str = "/home/sprite/.aod/git-credentials";

/// Why provisioning stopped.
#[derive(Debug)]
pub enum StageFailed {
    Fenced(Fenced),
    /// Another attempt may go on where this one stopped.
    Released(String),
    Failed {
        stage: Stage,
        message: String,
    },
}

/// Why a stage's work stopped.
#[derive(Debug)]
enum Trouble {
    Released(String),
    Failed(String),
}

impl<T: fmt::Display> From<T> for Trouble {
    fn from(error: T) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<Fenced> for StageFailed {
    fn from(fenced: Fenced) -> Self {
        Self::Fenced(fenced)
    }
}

pub struct Provisioning<'a> {
    pub client: &'a Client,
    pub sprite: &'a Sprite,
    pub session: SessionId,
    pub setup: &'a Setup,
    pub secrets: &'a Secrets,
    pub agent: &'a Agent,
    pub runtime: Runtime,
    pub adapter: &'static dyn Adapter,
    pub models: &'a ModelEndpoints,
}

impl Provisioning<'_> {
    pub async fn run(&self, record: &mut Record, contact: &mut Contact) -> Result<(), StageFailed> {
        stage(record, Stage::CreateSprite, async { Ok(self.client.ensure(self.sprite.name()).await?) }).await?;
        if let Some(executable) = self.adapter.executable() {
            stage(record, Stage::InstallRuntime, self.find(executable)).await?;
        }
        // In force before anything that the user wrote runs.
        if let Some(hosts) = self.setup.allowed_hosts() {
            stage(record, Stage::NetworkPolicy, self.limit_network(hosts)).await?;
        }
        stage(record, Stage::EnvFile, self.write_env()).await?;
        let credentials = self.setup.git_credentials(self.secrets);
        if !credentials.is_empty() {
            stage(record, Stage::GitCredentials, self.write_git_credentials(credentials, contact)).await?;
        }
        let steps = self.setup.steps();
        if !steps.is_empty() {
            stage(record, Stage::ProvisionSetup, self.run_steps(steps, contact)).await?;
        }
        let servers = runtimes::mcp_names(self.secrets.fill_in(self.setup.mcp_servers.clone()));
        let mut config = self.adapter.config_files(&servers, self.models, &self.setup.system);
        config
            .extend(self.adapter.system_prompt().path().map(|path| (path, self.setup.system.clone())).filter(|(_, text)| !text.is_empty()));
        if !config.is_empty() {
            stage(record, Stage::RuntimeConfig, self.write_config(config)).await?;
        }
        if let Some(skills) = self.adapter.skills().filter(|_| !self.setup.skills.is_empty()) {
            stage(record, Stage::Skills, self.add_skills(skills, contact)).await?;
        }
        Ok(())
    }

    async fn find(&self, executable: &str) -> Result<(), Trouble> {
        let script = format!("command -v {}", quote(executable));
        let request = ExecRequest { argv: &["bash", "-c", &script], ..ExecRequest::default() };
        let found = self.sprite.run(&request, STAGE_MAX).await?;
        if found.code == 0 { Ok(()) } else { Err(format!("{executable} is not installed in the Sprite").into()) }
    }

    async fn write_env(&self) -> Result<(), Trouble> {
        let env = self.agent.env_file(self.secrets);
        let (env, tools) = tokio::join!(self.sprite.write(job::ENV_FILE, env, 0o600), job::write_tools(self.sprite));
        Ok(env.and(tools)?)
    }

    async fn limit_network(&self, hosts: &[String]) -> Result<(), Trouble> {
        let models = self.runtime.providers().iter().map(|provider| self.models.host(*provider));
        let hosts: Vec<String> = hosts.iter().cloned().chain(models).collect();
        let limited = self.sprite.limit_network(&hosts).await;
        limited.map_err(|error| format!("this sandbox cannot limit its network: {error}").into())
    }

    async fn write_git_credentials(&self, credentials: String, contact: &mut Contact) -> Result<(), Trouble> {
        self.sprite.write(GIT_CREDENTIALS, credentials, 0o600).await?;
        // A token is for its own repository, not for all of the host's.
        let script = format!(
            "git config --global credential.helper 'store --file {GIT_CREDENTIALS}' && \
             git config --global credential.https://github.com.useHttpPath true"
        );
        self.run_step("git", &Step { what: "setting git up".to_owned(), script }, contact).await
    }

    async fn run_steps(&self, steps: Vec<Step>, contact: &mut Contact) -> Result<(), Trouble> {
        for (number, step) in steps.iter().enumerate() {
            self.run_step(&format!("setup-{}", number + 1), step, contact).await?;
        }
        Ok(())
    }

    /// Runs a script once, with the session's variables, whoever follows it: a successor finds it under way, or done. Its text goes by
    /// file: an argument would be seen in a URL. Each claim writes files of its own, since a script may not change while it runs.
    async fn run_step(&self, name: &str, step: &Step, contact: &mut Contact) -> Result<(), Trouble> {
        let epoch = self.setup.epoch;
        let dir = format!("{}/{name}", job::ROOT);
        let (script_path, job) = (format!("{dir}/script-{epoch}"), format!("job-{epoch}"));
        let settings = Job {
            mark: format!("{}/{name}", self.session),
            timeout: STAGE_MAX,
            drain: DRAIN,
            stdin: "/dev/null",
            working_dirs: vec!["/home/sprite", "/"],
            vars: Vec::new(),
            argv: vec!["/bin/bash", &script_path],
        }
        .settings();
        let job_path = format!("{dir}/{job}");
        let (script, settings) =
            tokio::join!(self.sprite.write(&script_path, step.script.clone(), 0o700), self.sprite.write(&job_path, settings, 0o600));
        script.and(settings)?;
        let status = follow::job(self.client, self.sprite, &job::follow_command(&dir, &job, None), contact).await;
        let status = status.map_err(|gone| match gone {
            Gone::Released(reason) => Trouble::Released(reason),
            Gone::Failed(why) => Trouble::Failed(format!("{} can no longer be followed: {why}", step.what)),
        })?;
        let code = match status {
            Status::Exited { code: 0, .. } => return Ok(()),
            Status::Exited { code, .. } => code,
            Status::TimedOut => return Err(format!("{} was not done after {} s", step.what, STAGE_MAX.as_secs()).into()),
            Status::Killed => return Err(format!("{} was ended: the process that supervises it was killed", step.what).into()),
            Status::Lost => return Err(format!("{} was ended: the sandbox restarted", step.what).into()),
        };
        let (stdout, stderr) = tokio::join!(self.said(&dir, "stdout"), self.said(&dir, "stderr"));
        let cause = diagnosis::of_script(code, &format!("{stderr}\n{stdout}"), self.setup.allowed_hosts().is_some());
        let cause = cause.map(|cause| format!(": {cause}")).unwrap_or_default();
        Err(format!("{} exited with {code}{cause}: {}", step.what, last_words(&stdout, &stderr)).into())
    }

    /// The end of what a step printed; nothing where it cannot be read.
    async fn said(&self, dir: &str, stream: &str) -> String {
        let path = format!("{dir}/{stream}");
        let request = ExecRequest { argv: &["tail", "-c", "65536", &path], dir: "/", ..ExecRequest::default() };
        let finished = self.sprite.run(&request, SAID_DEADLINE).await;
        finished.map(|finished| String::from_utf8_lossy(&finished.stdout).into_owned()).unwrap_or_default()
    }

    async fn write_config(&self, files: Vec<(&'static str, String)>) -> Result<(), Trouble> {
        for (path, content) in files {
            self.sprite.write(path, content, 0o600).await?;
        }
        Ok(())
    }

    async fn add_skills(&self, skills: Skills, contact: &mut Contact) -> Result<(), Trouble> {
        for (number, skill) in self.setup.skills.iter().enumerate() {
            match skill {
                Skill::Inline(skill) => {
                    let path = format!("{}/{}/SKILL.md", skills.folder, skill.name);
                    self.sprite.write(&path, types::skill::skill_file(skill), 0o644).await?;
                }
                Skill::Github(skill) => {
                    let step = setup::install_skill(skill, skills.installer_name);
                    self.run_step(&format!("skill-{}", number + 1), &step, contact).await?;
                }
            }
        }
        Ok(())
    }
}

/// What a failed script said last. The cause may be on either stream: a warning on the one does not hide the error on the other.
fn last_words(stdout: &str, stderr: &str) -> String {
    let tail = |text: &str| {
        let text = text.trim();
        let from = (text.len().saturating_sub(TAIL_BYTES)..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or_default();
        text.get(from..).unwrap_or_default().to_owned()
    };
    match (tail(stdout), tail(stderr)) {
        (one, other) if one.is_empty() || other.is_empty() => one + &other,
        (stdout, stderr) => format!("{stderr}\n(standard output:)\n{stdout}"),
    }
}

/// Runs a stage and puts its course on record; one that is done is left alone.
async fn stage(record: &mut Record, stage: Stage, work: impl Future<Output = Result<(), Trouble>>) -> Result<(), StageFailed> {
    if record.is_done(stage) {
        return Ok(());
    }
    record.stage(stage, StageState::Started, None, None).await?;
    let begun = Instant::now();
    let work = work.instrument(tracing::info_span!("stage", otel.name = stage.as_str()));
    let done =
        tokio::time::timeout(STAGE_MAX, work).await.unwrap_or_else(|_| Err(format!("not done after {} s", STAGE_MAX.as_secs()).into()));
    let took = begun.elapsed();
    metrics::histogram!("aod_stage_seconds", "stage" => stage.as_str()).record(took);
    match done {
        Ok(()) => Ok(record.stage(stage, StageState::Done, Some(took), None).await?),
        Err(Trouble::Released(reason)) => Err(StageFailed::Released(reason)),
        Err(Trouble::Failed(message)) => {
            metrics::counter!("aod_stages_failed_total", "stage" => stage.as_str()).increment(1);
            let message = record.secrets.text(&message);
            record.stage(stage, StageState::Failed, Some(took), Some(message.clone())).await?;
            Err(StageFailed::Failed { stage, message })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_streams_of_a_failed_script_are_told() {
        assert_eq!(last_words("", " why\n"), "why");
        assert_eq!(last_words("why\n", "\n"), "why");
        assert_eq!(last_words("FAILED: refused\n", "npm warn\n"), "npm warn\n(standard output:)\nFAILED: refused");
        assert_eq!(last_words(&"\u{e9}".repeat(5000), "").len(), 2000);
    }
}
