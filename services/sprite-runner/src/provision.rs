//! Setting a new Sprite up, stage by stage, each stage an event. Every stage may be run twice: a successor begins with the first that
//! is not on record as done.

use std::time::{Duration, Instant};

use sprites::{Client, ExecRequest, Sprite};
use tracing::Instrument as _;
use types::{Runtime, Skill, Stage, StageState};

use crate::{
    ModelEndpoints,
    agent::{Agent, quote},
    diagnosis,
    record::{Fenced, Record},
    runtimes::{Adapter, Skills},
    secrets::Secrets,
    setup::{self, Setup, Step},
};

/// No single stage takes longer.
const STAGE_MAX: Duration = Duration::from_secs(600);
/// How much of a failed script's last words its user is told.
const TAIL_CHARS: usize = 2000;

const GIT_CREDENTIALS: &str = "/home/sprite/.aod/git-credentials";

/// Why provisioning stopped.
#[derive(Debug)]
pub enum StageFailed {
    Fenced(Fenced),
    Failed { stage: Stage, message: String },
}

impl From<Fenced> for StageFailed {
    fn from(fenced: Fenced) -> Self {
        Self::Fenced(fenced)
    }
}

pub struct Provisioning<'a> {
    pub client: &'a Client,
    pub sprite: &'a Sprite,
    pub setup: &'a Setup,
    pub secrets: &'a Secrets,
    pub agent: &'a Agent,
    pub runtime: Runtime,
    pub adapter: &'static dyn Adapter,
    pub models: &'a ModelEndpoints,
}

impl Provisioning<'_> {
    pub async fn run(&self, record: &mut Record) -> Result<(), StageFailed> {
        stage(record, Stage::CreateSprite, async { self.client.ensure(self.sprite.name()).await.map_err(|error| error.to_string()) })
            .await?;
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
            stage(record, Stage::GitCredentials, self.write_git_credentials(credentials)).await?;
        }
        let steps = self.setup.steps();
        if !steps.is_empty() {
            stage(record, Stage::ProvisionSetup, self.run_steps(steps)).await?;
        }
        let config = self.adapter.config_files(&self.secrets.fill_in(self.setup.mcp_servers.clone()), self.models);
        if !config.is_empty() {
            stage(record, Stage::RuntimeConfig, self.write_config(config)).await?;
        }
        if let Some(skills) = self.adapter.skills().filter(|_| !self.setup.skills.is_empty()) {
            stage(record, Stage::Skills, self.add_skills(skills)).await?;
        }
        Ok(())
    }

    async fn find(&self, executable: &str) -> Result<(), String> {
        let script = format!("command -v {}", quote(executable));
        let request = ExecRequest { argv: &["bash", "-c", &script], ..ExecRequest::default() };
        let found = self.sprite.run(&request, STAGE_MAX).await.map_err(|error| error.to_string())?;
        if found.code == 0 { Ok(()) } else { Err(format!("{executable} is not installed in the Sprite")) }
    }

    async fn write_env(&self) -> Result<(), String> {
        let env = self.agent.env_file(self.secrets);
        let (env, tools) = tokio::join!(self.sprite.write(Agent::ENV_FILE, env, 0o600), self.agent.write_tools(self.sprite));
        env.and(tools).map_err(|error| error.to_string())
    }

    async fn limit_network(&self, hosts: &[String]) -> Result<(), String> {
        let models = self.runtime.providers().iter().map(|provider| self.models.host(*provider));
        let hosts: Vec<String> = hosts.iter().cloned().chain(models).collect();
        let limited = self.sprite.limit_network(&hosts).await;
        limited.map_err(|error| format!("this sandbox cannot limit its network: {error}"))
    }

    async fn write_git_credentials(&self, credentials: String) -> Result<(), String> {
        self.sprite.write(GIT_CREDENTIALS, credentials, 0o600).await.map_err(|error| error.to_string())?;
        // A token is for its own repository, not for all of the host's.
        let script = format!(
            "git config --global credential.helper 'store --file {GIT_CREDENTIALS}' && \
             git config --global credential.https://github.com.useHttpPath true"
        );
        self.run_step(&Step { what: "setting git up".to_owned(), script }).await
    }

    async fn run_steps(&self, steps: Vec<Step>) -> Result<(), String> {
        for step in &steps {
            self.run_step(step).await?;
        }
        Ok(())
    }

    /// Runs a script with the session's variables. Its text goes by file: an argument would be seen in a URL. One at a time, and each
    /// runner's from a file of its own: a runner that lost its job may have left one running.
    async fn run_step(&self, step: &Step) -> Result<(), String> {
        let path = format!("/home/sprite/.aod/setup-{}.sh", self.setup.epoch);
        self.sprite.write(&path, step.script.clone(), 0o700).await.map_err(|error| error.to_string())?;
        let command = format!("set -a; . {}; set +a; exec flock /home/sprite/.aod/setup.lock bash {path}", Agent::ENV_FILE);
        let request = ExecRequest { argv: &["bash", "-c", &command], max_run_after_disconnect: Some(STAGE_MAX), ..ExecRequest::default() };
        let finished = self.sprite.run(&request, STAGE_MAX).await.map_err(|error| error.to_string())?;
        if finished.code == 0 {
            return Ok(());
        }
        let said = String::from_utf8_lossy(if finished.stderr.is_empty() { &finished.stdout } else { &finished.stderr }).into_owned();
        let skip = said.chars().count().saturating_sub(TAIL_CHARS);
        let tail: String = said.chars().skip(skip).collect();
        let cause = diagnosis::of_script(finished.code, &said, self.setup.allowed_hosts().is_some());
        let cause = cause.map(|cause| format!(": {cause}")).unwrap_or_default();
        Err(format!("{} exited with {}{cause}: {}", step.what, finished.code, tail.trim()))
    }

    async fn write_config(&self, files: Vec<(&'static str, String)>) -> Result<(), String> {
        for (path, content) in files {
            self.sprite.write(path, content, 0o600).await.map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    async fn add_skills(&self, skills: Skills) -> Result<(), String> {
        for skill in &self.setup.skills {
            match skill {
                Skill::Inline(skill) => {
                    let path = format!("{}/{}/SKILL.md", skills.folder, skill.name);
                    self.sprite.write(&path, setup::skill_file(skill), 0o644).await.map_err(|error| error.to_string())?;
                }
                Skill::Github(skill) => self.run_step(&setup::install_skill(skill, skills.installer_name)).await?,
            }
        }
        Ok(())
    }
}

/// Runs a stage and puts its course on record; one that is done is left alone.
async fn stage(record: &mut Record, stage: Stage, work: impl Future<Output = Result<(), String>>) -> Result<(), StageFailed> {
    if record.is_done(stage) {
        return Ok(());
    }
    record.stage(stage, StageState::Started, None, None).await?;
    let begun = Instant::now();
    let work = work.instrument(tracing::info_span!("stage", otel.name = stage.as_str()));
    let done = tokio::time::timeout(STAGE_MAX, work).await.unwrap_or_else(|_| Err(format!("not done after {} s", STAGE_MAX.as_secs())));
    let took = begun.elapsed();
    metrics::histogram!("aod_stage_seconds", "stage" => stage.as_str()).record(took);
    match done {
        Ok(()) => Ok(record.stage(stage, StageState::Done, Some(took), None).await?),
        Err(message) => {
            metrics::counter!("aod_stages_failed_total", "stage" => stage.as_str()).increment(1);
            let message = record.secrets.text(&message);
            record.stage(stage, StageState::Failed, Some(took), Some(message.clone())).await?;
            Err(StageFailed::Failed { stage, message })
        }
    }
}
