//! Setting a new Sprite up, stage by stage, each stage an event. Every stage may be run twice: a successor begins with the first that
//! is not on record as done.

use std::time::{Duration, Instant};

use contract::scheduler::TurnSpec;
use sprites::{Client, ExecRequest, Sprite};
use types::{Stage, StageState};

use crate::{
    agent::{Agent, quote},
    record::{Fenced, Record},
    runtimes::Adapter,
    secrets::Secrets,
};

/// No single stage takes longer.
const STAGE_MAX: Duration = Duration::from_secs(600);
/// How much of a failed script's last words its user is told.
const TAIL_CHARS: usize = 2000;

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
    pub spec: &'a TurnSpec,
    pub secrets: &'a Secrets,
    pub agent: &'a Agent,
    pub adapter: &'static dyn Adapter,
}

impl Provisioning<'_> {
    pub async fn run(&self, record: &mut Record) -> Result<(), StageFailed> {
        stage(record, Stage::CreateSprite, async { self.client.ensure(self.sprite.name()).await.map_err(|error| error.to_string()) })
            .await?;
        if let Some(executable) = self.adapter.executable() {
            stage(record, Stage::InstallRuntime, self.find(executable)).await?;
        }
        stage(record, Stage::EnvFile, self.write_env()).await?;
        if let Some(script) = self.setup_script() {
            stage(record, Stage::ProvisionSetup, self.run_setup(script)).await?;
        }
        if !self.adapter.config_files().is_empty() {
            stage(record, Stage::RuntimeConfig, self.write_config()).await?;
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

    /// The environment's own script. (Packages come with the other managers' support.)
    fn setup_script(&self) -> Option<&str> {
        let script = self.spec.environment.as_ref().map(|environment| environment.setup_script.as_str())?;
        (!script.trim().is_empty()).then_some(script)
    }

    async fn run_setup(&self, script: &str) -> Result<(), String> {
        const PATH: &str = "/home/sprite/.aod/setup.sh";
        self.sprite.write(PATH, script.to_owned(), 0o700).await.map_err(|error| error.to_string())?;
        let command = format!("set -a; . {}; set +a; exec bash {PATH}", Agent::ENV_FILE);
        let request = ExecRequest { argv: &["bash", "-c", &command], max_run_after_disconnect: Some(STAGE_MAX), ..ExecRequest::default() };
        let finished = self.sprite.run(&request, STAGE_MAX).await.map_err(|error| error.to_string())?;
        if finished.code == 0 {
            return Ok(());
        }
        let said = String::from_utf8_lossy(if finished.stderr.is_empty() { &finished.stdout } else { &finished.stderr }).into_owned();
        let skip = said.chars().count().saturating_sub(TAIL_CHARS);
        let tail: String = said.chars().skip(skip).collect();
        Err(format!("the setup script exited with {}: {}", finished.code, tail.trim()))
    }

    async fn write_config(&self) -> Result<(), String> {
        for (path, content) in self.adapter.config_files() {
            self.sprite.write(path, content, 0o600).await.map_err(|error| error.to_string())?;
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
    let done = tokio::time::timeout(STAGE_MAX, work).await.unwrap_or_else(|_| Err(format!("not done after {} s", STAGE_MAX.as_secs())));
    let took = begun.elapsed();
    metrics::histogram!("aod_stage_seconds", "stage" => stage.as_str()).record(took);
    match done {
        Ok(()) => Ok(record.stage(stage, StageState::Done, Some(took), None).await?),
        Err(message) => {
            record.stage(stage, StageState::Failed, Some(took), Some(message.clone())).await?;
            Err(StageFailed::Failed { stage, message })
        }
    }
}
