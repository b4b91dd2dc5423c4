//! Setting a new Sprite up, stage by stage, each stage an event. A successor begins with the first
//! that is not in the log as done; scripts run under the agent host, which runs each once,
//! whichever runner asks.

use std::{
    fmt,
    time::{Duration, Instant},
};

use contract::host::{Input, Step as HostStep, StepEnded, input, turn_ended::Reason};
use sprites::{Began, Client, ExecRequest, ImageDraft, Sprite};
use tracing::Instrument as _;
use types::{Runtime, Skill, Stage, StageState};

use crate::{
    ModelEndpoints,
    agent::traceparent,
    diagnosis,
    event_log::{EventLog, Fenced},
    host::{self, Gone, Link},
    playback::Playback,
    runtimes::{self, Adapter, Skills},
    secrets::{AtGateway, Secrets},
    setup::{self, Setup, Step},
    shell::quote,
    stopped::Stopped,
};

/// No single step takes longer.
const STAGE_MAX: Duration = Duration::from_secs(600);
/// How many bytes of the end of each output stream a failed script's message contains.
const TAIL_BYTES: usize = 2000;
/// How much of the journal is kept for a successor that has to tell what a failed script said.
const KEPT_BYTES: u64 = 64 << 20;

/// Directories that belong to a session, and temporary files: no part of an image.
const NOT_IN_IMAGES: [&str; 3] = [host::DIR, host::ROOT, "/tmp"];

const GIT_CREDENTIALS: &str = "/home/sprite/.aod/git-credentials";
/// The credentials with which git authenticates at the model gateway.
const GIT_SESSION: &str = "/home/sprite/.aod/git-session";

/// Why a stage's work stopped.
#[derive(Debug)]
enum Trouble {
    Fenced(Fenced),
    Released(String),
    Failed(String),
}

impl<T: fmt::Display> From<T> for Trouble {
    fn from(error: T) -> Self {
        Self::Failed(error.to_string())
    }
}

/// The agent host while it runs set-up steps.
pub struct StepRunner {
    pub link: Link,
    pub playback: Playback,
}

pub struct Provisioning<'a> {
    pub client: &'a Client,
    pub sprite: &'a Sprite,
    pub setup: &'a Setup,
    pub secrets: &'a Secrets,
    pub runtime: Runtime,
    pub adapter: &'static dyn Adapter,
    pub models: &'a ModelEndpoints,
    /// Where sandboxes reach the model gateway.
    pub gateway: Option<&'a str>,
    /// Whether the Sprite may have more than packages by now: it was prepared before.
    pub is_prepared: bool,
}

/// How git reaches repositories that need a token.
struct Git<'a> {
    /// The lines of a credential store.
    credentials: String,
    /// The model gateway, and the token that it is shown.
    at_gateway: Option<(&'a str, &'a str)>,
    /// Of repositories whose tokens the model gateway has.
    routes: Vec<(&'a str, &'a str)>,
}

impl Git<'_> {
    fn is_empty(&self) -> bool {
        self.credentials.is_empty() && self.at_gateway.is_none()
    }

    /// May be run again.
    fn script(&self) -> String {
        let mut script = String::from("set -e\n");
        if !self.credentials.is_empty() {
            // A token is for its own repository, not for all of the host's.
            script += &format!(
                "git config --global credential.helper 'store --file {GIT_CREDENTIALS}'\n\
                 git config --global credential.https://github.com.useHttpPath true\n"
            );
        }
        if let Some((gateway, _)) = self.at_gateway {
            script += &setup::lead_git(gateway, GIT_SESSION, self.routes.iter().copied());
        }
        script
    }
}

impl Provisioning<'_> {
    /// What comes before the agent host: the Sprite itself.
    pub async fn create(&self, log: &mut EventLog) -> Result<(), Stopped> {
        if let Some(course) = Course::begin(log, Stage::CreateSprite).await? {
            let created = timed(Stage::CreateSprite, self.create_sprite()).await;
            // In the log before anything depends on it.
            if let Ok(Some((image, restored_ms))) = &created {
                (log.checkpoint.image, log.checkpoint.restored_ms) = (image.clone(), *restored_ms);
            }
            course.end(log, created.map(drop)).await?;
        }
        if let Some(executable) = self.adapter.executable() {
            stage(log, Stage::InstallRuntime, self.find(executable)).await?;
        }
        // In force before anything that the user wrote runs.
        if let Some(hosts) = self.setup.allowed_hosts() {
            stage(log, Stage::NetworkPolicy, self.limit_network(&hosts)).await?;
        }
        Ok(())
    }

    /// Returns the image that the Sprite was to begin from, with how long its copy took if it did.
    async fn create_sprite(&self) -> Result<Option<(String, Option<u64>)>, Trouble> {
        let Some(image) = self.setup.image().filter(|_| self.installs_without_variables()) else {
            self.client.ensure(self.sprite.name()).await?;
            return Ok(None);
        };
        Ok(match self.client.ensure_from(self.sprite.name(), &image).await? {
            Began::FromImage(took) => {
                Some((image, Some(u64::try_from(took.as_millis()).unwrap_or(u64::MAX))))
            }
            Began::Empty => Some((image, None)),
            Began::WithoutImages => None,
        })
    }

    /// Whether no variables of the user's are there while packages are installed: an installer may
    /// write them down.
    fn installs_without_variables(&self) -> bool {
        self.secrets.vars().is_empty()
    }

    /// What depends on the environment alone. Comes before all that belongs to the session, so that
    /// the disk can be kept for the next one.
    pub async fn install_packages(
        &self,
        log: &mut EventLog,
        host: &mut StepRunner,
    ) -> Result<(), Stopped> {
        stage(log, Stage::EnvFile, host.reach()).await?;
        let mut steps = self.setup.package_steps();
        // Earlier releases installed packages in the set-up.
        if steps.is_empty() || log.is_done(Stage::ProvisionSetup) {
            return Ok(());
        }
        let Some(course) = Course::begin(log, Stage::Packages).await? else { return Ok(()) };
        if let Some(took_ms) = log.checkpoint.restored_ms {
            return Ok(log.restored(Stage::Packages, took_ms).await?);
        }
        let image = Some(log.checkpoint.image.clone())
            .filter(|image| !image.is_empty() && self.installs_without_variables());
        if image.is_some() {
            // What installers do not know, they do not write down.
            let names: Vec<String> =
                self.secrets.credential_vars().into_iter().map(|(name, _)| name).collect();
            for step in &mut steps {
                step.script = format!("unset -v {}\n{}", names.join(" "), step.script);
            }
        }
        let done = self.run_steps((Stage::Packages, 0), &steps, log, host).await;
        let draft = match (&done, image) {
            (Ok(()), Some(image)) if !self.is_prepared => self.draft_image(&image).await,
            _ => None,
        };
        course.end(log, done).await?;
        // The stage's end is in the log, or no one else wrote it, so no other runner had the session
        // by then: nothing of the session was on the disk when it was copied.
        if let Some(draft) = draft
            && log.is_undisturbed().await
            && let Err(error) = self.sprite.keep_image(draft).await
        {
            tracing::info!(%error, "failed to keep an image of the installed packages");
        }
        Ok(())
    }

    async fn draft_image(&self, image: &str) -> Option<ImageDraft> {
        match self.sprite.draft_image(image, &NOT_IN_IMAGES).await {
            Ok(draft) => Some(draft),
            // Another session's is there, or the server is set to keep none.
            Err(sprites::Error::Conflict { .. } | sprites::Error::NotFound { .. }) => None,
            Err(error) => {
                tracing::info!(%error, "failed to copy the disk for an image");
                None
            }
        }
    }

    /// All else.
    pub async fn set_up(&self, log: &mut EventLog, host: &mut StepRunner) -> Result<(), Stopped> {
        let git = self.git();
        if !git.is_empty()
            && let Some(course) = Course::begin(log, Stage::GitCredentials).await?
        {
            let done = self.set_git_up(git, log, host).await;
            course.end(log, done).await?;
        }
        let steps = self.setup.steps();
        if !steps.is_empty()
            && let Some(course) = Course::begin(log, Stage::ProvisionSetup).await?
        {
            let packages = self.setup.package_steps().len();
            let done = self.run_steps((Stage::ProvisionSetup, packages), &steps, log, host).await;
            course.end(log, done).await?;
        }
        let config = self.config_files();
        if !config.is_empty() {
            stage(log, Stage::RuntimeConfig, self.write_config(config)).await?;
        }
        if let Some(skills) = self.adapter.skills().filter(|_| !self.setup.skills.is_empty())
            && let Some(course) = Course::begin(log, Stage::Skills).await?
        {
            let done = self.add_skills(skills, log, host).await;
            course.end(log, done).await?;
        }
        Ok(())
    }

    /// The CLI's configuration, by path; it may hold secrets of MCP servers.
    pub fn config_files(&self) -> Vec<(&'static str, String)> {
        self.config_with(self.secrets.route_token().unwrap_or_default())
    }

    /// The configuration but for the token that is shown to the model gateway, which is another for
    /// each claim and stays good.
    pub fn config_without_token(&self) -> Vec<(&'static str, String)> {
        self.config_with("")
    }

    fn config_with(&self, token: &str) -> Vec<(&'static str, String)> {
        let gateway = self.gateway.unwrap_or_default();
        let at_gateway =
            |path: &str| AtGateway { url: format!("{gateway}/{path}"), token: token.to_owned() };
        let servers =
            runtimes::mcp_names(self.secrets.fill_in(self.setup.mcp_servers.clone(), at_gateway));
        self.adapter.config_files(&servers, self.models)
    }

    /// Rewrites the configuration, for an agent or tokens that may have changed since the turn
    /// before.
    pub async fn renew_config(&self) -> Result<(), String> {
        for (path, content) in self.config_files() {
            self.sprite.write(path, content, 0o600).await.map_err(|error| error.to_string())?;
        }
        let git = self.git();
        if git.is_empty() {
            return Ok(());
        }
        self.write_git_files(&git).await.map_err(|error| error.to_string())?;
        let request =
            ExecRequest { argv: &["bash", "-c", &git.script()], ..ExecRequest::default() };
        match self.sprite.run(&request, STAGE_MAX).await.map_err(|error| error.to_string())?.code {
            0 => {}
            // The agent can break its own configuration of git, and repair it: its turns continue.
            code => tracing::warn!(exit_code = code, "failed to renew the configuration of git"),
        }
        Ok(())
    }

    /// How git reaches the session's repositories.
    fn git(&self) -> Git<'_> {
        let at_gateway = self
            .gateway
            .zip(self.secrets.route_token())
            .filter(|_| self.secrets.repository_routes().next().is_some());
        let routes = self.secrets.repository_routes().collect();
        Git { credentials: self.setup.git_credentials(self.secrets), at_gateway, routes }
    }

    async fn write_git_files(&self, git: &Git<'_>) -> Result<(), sprites::Error> {
        if !git.credentials.is_empty() {
            self.sprite.write(GIT_CREDENTIALS, git.credentials.clone(), 0o600).await?;
        }
        if let Some((_, token)) = git.at_gateway {
            self.sprite
                .write(GIT_SESSION, format!("username=session\npassword={token}\n"), 0o600)
                .await?;
        }
        Ok(())
    }

    async fn find(&self, executable: &str) -> Result<(), Trouble> {
        let script = format!("command -v {}", quote(executable));
        let request = ExecRequest { argv: &["bash", "-c", &script], ..ExecRequest::default() };
        let found = self.sprite.run(&request, STAGE_MAX).await?;
        if found.code == 0 {
            Ok(())
        } else {
            Err(format!("{executable} is not installed in the Sprite").into())
        }
    }

    async fn limit_network(&self, hosts: &[String]) -> Result<(), Trouble> {
        let models = self.runtime.providers().iter().map(|provider| self.models.host(*provider));
        // The policy holds for what goes that way as well: the model gateway refuses it.
        let gateway = self.gateway.filter(|_| self.secrets.route_token().is_some());
        let gateway =
            gateway.and_then(|url| reqwest::Url::parse(url).ok()?.host_str().map(str::to_owned));
        let hosts: Vec<String> = hosts.iter().cloned().chain(models).chain(gateway).collect();
        let limited = self.sprite.limit_network(&hosts).await;
        limited.map_err(|error| format!("this sandbox cannot limit its network: {error}").into())
    }

    async fn set_git_up(
        &self,
        git: Git<'_>,
        log: &mut EventLog,
        host: &mut StepRunner,
    ) -> Result<(), Trouble> {
        self.write_git_files(&git).await?;
        let step = Step { what: "setting git up".to_owned(), script: git.script() };
        self.run_steps((Stage::GitCredentials, 0), &[step], log, host).await
    }

    /// Runs scripts one after the other, with the session's variables. `before`: the stage's steps
    /// that are not among them.
    async fn run_steps(
        &self,
        (stage, before): (Stage, usize),
        steps: &[Step],
        log: &mut EventLog,
        host: &mut StepRunner,
    ) -> Result<(), Trouble> {
        // Earlier releases ran packages as the first steps of the set-up: a step has the same id,
        // whichever release asks the host for it.
        let named = if stage == Stage::Packages { Stage::ProvisionSetup } else { stage };
        let ids: Vec<String> = (before + 1..=before + steps.len())
            .map(|number| format!("step-{named}-{number}"))
            .collect();
        host.playback.enter_stage(stage.as_str());
        for (number, step) in steps.iter().enumerate() {
            let (Some(id), Some(later)) = (ids.get(number), ids.get(number + 1..)) else { break };
            let ended = host.run(id, later, step, log).await?;
            let code = match ended.reason() {
                Reason::TimedOut => {
                    return Err(format!(
                        "{} was not done after {} s",
                        step.what,
                        STAGE_MAX.as_secs()
                    )
                    .into());
                }
                Reason::HostLost => {
                    return Err(
                        format!("{} was ended: the agent host was killed", step.what).into()
                    );
                }
                Reason::SandboxLost => {
                    return Err(format!("{} was ended: the sandbox restarted", step.what).into());
                }
                _ => ended.exit_code.and_then(|code| u8::try_from(code).ok()),
            };
            let Some(code) = code else {
                return Err(format!("{} could not be run", step.what).into());
            };
            if code != 0 {
                let (stdout, stderr) = (host.playback.tail(false), host.playback.tail(true));
                let cause = diagnosis::of_script(
                    code,
                    &format!("{stderr}\n{stdout}"),
                    self.setup.allowed_hosts().is_some(),
                );
                let cause = cause.map(|cause| format!(": {cause}")).unwrap_or_default();
                return Err(format!(
                    "{} exited with {code}{cause}: {}",
                    step.what,
                    last_words(&stdout, &stderr)
                )
                .into());
            }
        }
        Ok(())
    }

    async fn write_config(&self, files: Vec<(&'static str, String)>) -> Result<(), Trouble> {
        self.sprite.write(runtimes::MCP_START_PATH, runtimes::MCP_START, 0o755).await?;
        for (path, content) in files {
            self.sprite.write(path, content, 0o600).await?;
        }
        Ok(())
    }

    async fn add_skills(
        &self,
        skills: Skills,
        log: &mut EventLog,
        host: &mut StepRunner,
    ) -> Result<(), Trouble> {
        let mut steps = Vec::new();
        for skill in &self.setup.skills {
            match skill {
                Skill::Inline(skill) => {
                    let path = format!("{}/{}/SKILL.md", skills.folder, skill.name);
                    self.sprite.write(&path, types::skill::skill_file(skill), 0o644).await?;
                }
                Skill::Github(skill) => {
                    steps.push(setup::install_skill(skill, skills.installer_name))
                }
            }
        }
        self.run_steps((Stage::Skills, 0), &steps, log, host).await
    }
}

impl StepRunner {
    /// Waits until the host runs.
    async fn reach(&mut self) -> Result<(), Trouble> {
        self.playback.absorb(self.link.next().await).map_err(trouble)
    }

    /// Runs a step, or finds that it was run. Meanwhile the journal is read and appended to the
    /// log.
    async fn run(
        &mut self,
        id: &str,
        later: &[String],
        step: &Step,
        log: &mut EventLog,
    ) -> Result<StepEnded, Trouble> {
        let host_step = HostStep {
            name: step.what.clone(),
            script: step.script.clone(),
            timeout_seconds: STAGE_MAX.as_secs().try_into().unwrap_or(0),
            traceparent: traceparent(),
        };
        self.link.send(Input { id: id.to_owned(), kind: Some(input::Kind::Step(host_step)) });
        loop {
            while let Some(emitted) = self.playback.next() {
                let id = log.play(emitted).await.map_err(Trouble::Fenced)?;
                self.playback.appended(id);
            }
            if let Some(ended) = self.playback.step(id, later) {
                self.link.accepted(id.to_owned());
                return Ok(ended);
            }
            let mut incoming = Some(self.link.next().await);
            while let Some(came) = incoming {
                self.playback.absorb(came).map_err(trouble)?;
                incoming = if self.playback.is_drained() { self.link.try_next() } else { None };
            }
            self.playback.settle();
            if let Some(offset) = self.playback.persisted().checked_sub(KEPT_BYTES) {
                self.link.persisted(offset);
            }
        }
    }
}

fn trouble(gone: Gone) -> Trouble {
    match gone {
        Gone::Released(reason) => Trouble::Released(reason),
        Gone::Failed(why) => Trouble::Failed(why),
        Gone::JournalLost => Trouble::Failed("the agent host's journal was deleted".to_owned()),
        Gone::SandboxLost => Trouble::Failed("the sandbox disappeared".to_owned()),
    }
}

/// The end of a failed script's output. The cause may be on either stream: a warning on one does
/// not hide the error on the other.
fn last_words(stdout: &str, stderr: &str) -> String {
    let tail = |text: &str| {
        let text = text.trim();
        let from = text.ceil_char_boundary(text.len().saturating_sub(TAIL_BYTES));
        text.get(from..).unwrap_or_default().to_owned()
    };
    match (tail(stdout), tail(stderr)) {
        (one, other) if one.is_empty() || other.is_empty() => one + &other,
        (stdout, stderr) => format!("{stderr}\n(standard output:)\n{stdout}"),
    }
}

/// A stage that was begun.
struct Course {
    stage: Stage,
    begun: Instant,
}

impl Course {
    /// None: the stage is done.
    async fn begin(log: &mut EventLog, stage: Stage) -> Result<Option<Self>, Stopped> {
        if log.is_done(stage) {
            return Ok(None);
        }
        log.stage(stage, StageState::Started, None, None).await?;
        Ok(Some(Self { stage, begun: Instant::now() }))
    }

    async fn end(self, log: &mut EventLog, done: Result<(), Trouble>) -> Result<(), Stopped> {
        let (stage, took) = (self.stage, self.begun.elapsed());
        metrics::histogram!("aod_stage_seconds", "stage" => stage.as_str()).record(took);
        match done {
            Ok(()) => Ok(log.stage(stage, StageState::Done, Some(took), None).await?),
            Err(Trouble::Fenced(fenced)) => Err(fenced.into()),
            Err(Trouble::Released(reason)) => Err(Stopped::Released(reason)),
            Err(Trouble::Failed(message)) => {
                metrics::counter!("aod_stages_failed_total", "stage" => stage.as_str())
                    .increment(1);
                let message = log.secrets.text(&message);
                log.stage(stage, StageState::Failed, Some(took), Some(message.clone())).await?;
                let message = format!("Provisioning failed at {stage}: {message}");
                Err(Stopped::failed(stage.as_str(), message))
            }
        }
    }
}

/// Runs a stage and puts its course into the log; one that is done is left alone.
async fn stage(
    log: &mut EventLog,
    stage: Stage,
    work: impl Future<Output = Result<(), Trouble>>,
) -> Result<(), Stopped> {
    let Some(course) = Course::begin(log, stage).await? else { return Ok(()) };
    let done = timed(stage, work).await;
    course.end(log, done).await
}

/// Limits the time of a stage's work.
async fn timed<T>(
    stage: Stage,
    work: impl Future<Output = Result<T, Trouble>>,
) -> Result<T, Trouble> {
    let work = work.instrument(tracing::info_span!("stage", otel.name = stage.as_str()));
    tokio::time::timeout(STAGE_MAX, work)
        .await
        .unwrap_or_else(|_| Err(format!("not done after {} s", STAGE_MAX.as_secs()).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_streams_of_a_failed_script_are_reported() {
        assert_eq!(last_words("", " why\n"), "why");
        assert_eq!(last_words("why\n", "\n"), "why");
        assert_eq!(
            last_words("FAILED: refused\n", "npm warn\n"),
            "npm warn\n(standard output:)\nFAILED: refused"
        );
        assert_eq!(last_words(&"\u{e9}".repeat(5000), "").len(), 2000);
    }
}
