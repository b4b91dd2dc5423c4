//! Claims turns, drives the Sprites API, and appends events. Stores nothing: any other runner can
//! replace one that dies.
//!
//! [`jobs`] decides what a job means now; [`lease`] owns turns by heartbeats; [`turn`] runs one,
//! [`stopped`] says why one cannot continue, and [`outcome`] what its end means; [`prepare`] does
//! what precedes the first one; [`provision`] sets the Sprite up; [`host`] is the connection to the
//! agent host, which runs set-up steps and the [`agent`]; [`inputs`] fetches inputs of a running
//! turn; [`meter`] fetches what the model gateway recorded; [`playback`] decides which events the
//! host's journal becomes; [`pace`] slows down agents that print too fast; [`event_log`] appends
//! events to the session's log as its only writer; [`runtimes`] knows what the CLIs need.

mod agent;
mod destroy;
mod diagnosis;
mod event_log;
mod files;
mod host;
mod inputs;
mod jobs;
mod lease;
mod mask;
mod meter;
pub mod metrics;
mod outcome;
mod pace;
mod playback;
mod prepare;
mod provision;
mod runtimes;
mod secrets;
mod setup;
mod shell;
mod stopped;
mod sweep;
mod turn;
mod utf8;

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use bus::Bus;
use contract::{access, scheduler::Routing, topology};
use service::{Env, Lifecycle};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use types::Provider;

pub use crate::pace::OutputLimits;
use crate::secrets::ModelToken;

/// Preparations use at most this share of a runner's capacity: turns are waited for.
const PREPARATIONS_SHARE: usize = 4;

#[derive(Debug)]
pub struct Config {
    pub bus: bus::Config,
    pub sprites_base_url: String,
    pub concurrency: usize,
    pub models: ModelEndpoints,
    /// The model gateway's address, as sandboxes reach it.
    pub model_gateway: Option<String>,
    /// `host:port` of MCP servers with private addresses.
    pub private_hosts: Vec<String>,
    /// Whether a session's secrets are masked in what its agent prints.
    pub mask_output: bool,
    pub output: OutputLimits,
    /// How long an agent's process is kept after its turn.
    pub agent_idle: Duration,
    /// The agent host's file, where it is not beside the runner.
    pub agent_host: Option<String>,
    /// Where files are stored, and how large one of an agent may be.
    pub files: Option<::files::Files>,
    pub file_bytes_max: u64,
}

/// Where each provider's models are, when not at the provider's own address.
#[derive(Clone, Debug, Default)]
pub struct ModelEndpoints {
    pub anthropic: Option<String>,
    pub openai: Option<String>,
    pub google: Option<String>,
}

impl ModelEndpoints {
    #[must_use]
    pub fn base_url(&self, provider: Provider) -> Option<&str> {
        match provider {
            Provider::Anthropic => self.anthropic.as_deref(),
            Provider::Openai => self.openai.as_deref(),
            Provider::Google => self.google.as_deref(),
        }
    }

    /// The host of a provider's models: what an agent has to reach whatever else it may.
    #[must_use]
    pub fn host(&self, provider: Provider) -> String {
        let configured = self
            .base_url(provider)
            .and_then(|url| reqwest::Url::parse(url).ok()?.host_str().map(str::to_owned));
        configured.unwrap_or_else(|| provider.host().to_owned())
    }
}

impl Config {
    pub fn from_env(env: &mut Env) -> Self {
        Self {
            bus: bus::Config::from_env(env, &access::RUNNER),
            sprites_base_url: env.parsed("SPRITES_BASE_URL", "base URL of the Sprites API", "https://api.sprites.dev".to_owned()),
            concurrency: env.parsed("AOD_RUNNER_CONCURRENCY", "maximum number of sessions that this runner works on at a time", 64),
            models: ModelEndpoints {
                anthropic: env.optional("AOD_MODEL_BASE_URL_ANTHROPIC", "base URL for Anthropic's models, without /v1"),
                openai: env.optional("AOD_MODEL_BASE_URL_OPENAI", "base URL for OpenAI's models, without /v1"),
                google: env.optional("AOD_MODEL_BASE_URL_GOOGLE", "base URL for Google's models, without /v1beta"),
            },
            model_gateway: env.optional(
                "AOD_MODEL_GATEWAY_URL",
                "URL at which sandboxes reach the model gateway; empty: no model gateway, so its secrets are put into sandboxes",
            ),
            private_hosts: {
                let hosts = env.optional(
                    "AOD_MODEL_GATEWAY_PRIVATE_HOSTS",
                    "comma-separated host:port: private addresses of MCP servers that the model gateway may reach; the same as the model gateway's setting",
                );
                types::route::hosts(&hosts.unwrap_or_default())
            },
            mask_output: env.parsed("AOD_MASK_SECRETS", "mask a session's secrets in its agent's output as ***", false),
            output: OutputLimits {
                bytes_max: env.parsed(
                    "AOD_TURN_OUTPUT_MAX_BYTES",
                    "maximum size of a turn's output, and separately of its typed events; beyond it only the last 64 KiB of each stream are kept, and an event says how much was dropped",
                    1 << 30,
                ),
                bytes_per_second: env.parsed(
                    "AOD_SESSION_OUTPUT_BYTES_PER_SECOND",
                    "sustained rate at which a session's output is stored; an agent that exceeds it by more than eight seconds' worth is slowed down; 0: no limit",
                    64 << 20,
                ),
            },
            agent_idle: Duration::from_secs(env.parsed(
                "AOD_AGENT_IDLE_SECONDS",
                "how long an agent's process is kept for its next turn; 0: not at all",
                300,
            )),
            agent_host: env.optional("AOD_AGENT_HOST", "path of the agent host, if not beside the runner's executable"),
            files: ::files::Files::from_env(env),
            file_bytes_max: env.parsed("AOD_FILE_MAX_BYTES", "maximum size of a file that an agent wrote", 100 << 20),
        }
    }
}

/// The state that all jobs share.
#[derive(Clone, Debug)]
struct Runner {
    bus: Bus,
    http: reqwest::Client,
    sprites_base_url: Arc<str>,
    models: Arc<ModelEndpoints>,
    model_gateway: Option<Arc<str>>,
    /// Loopback addresses that are not the sandbox's own.
    private_hosts: Arc<[String]>,
    mask_output: bool,
    output: OutputLimits,
    agent_idle: Duration,
    /// What is put into Sprites to run agents.
    program: host::Program,
    /// The turns that this process holds.
    turns: lease::Turns,
    /// Sessions that are prepared at a time.
    preparations: Arc<Semaphore>,
    files: Option<::files::Files>,
    file_bytes_max: u64,
    /// Shown in audits: which process redeemed a lease.
    name: Arc<str>,
    stop: CancellationToken,
}

impl Runner {
    /// The token for the model gateway that is named in a claim; none without a model gateway.
    fn model_token(&self) -> Result<Option<ModelToken>, getrandom::Error> {
        self.model_gateway.as_ref().map(|_| ModelToken::generate()).transpose()
    }

    /// What a claim says of MCP servers and repositories; nothing without a model gateway.
    fn routing(&self) -> Option<Routing> {
        let gateway = self.model_gateway.as_ref();
        gateway.map(|_| Routing { private_hosts: self.private_hosts.to_vec() })
    }

    /// Where a session's agent finds the models.
    fn models_of(&self, secrets: &secrets::Secrets) -> ModelEndpoints {
        let of = |provider: Provider| match &self.model_gateway {
            Some(gateway) if secrets.is_proxied(provider) => Some(format!("{gateway}/{provider}")),
            _ => self.models.base_url(provider).map(str::to_owned),
        };
        ModelEndpoints {
            anthropic: of(Provider::Anthropic),
            openai: of(Provider::Openai),
            google: of(Provider::Google),
        }
    }
}

/// Connects and begins to take jobs.
///
/// # Errors
/// When the bus cannot be reached, or there is no agent host to put into Sprites.
pub async fn run(config: Config, lifecycle: Lifecycle) -> anyhow::Result<()> {
    crate::metrics::describe();
    let name = config.bus.name.clone();
    let program = host::Program::load(config.agent_host.as_deref())
        .map_err(|error| anyhow::anyhow!("the agent host: {error}"))?;
    if let Some(files) = &config.files {
        files.check().await?;
    }
    let bus = Bus::connect(&config.bus).await.context("bus")?;
    let connection = bus.clone();
    lifecycle.add_check("bus", move || connection.is_connected());
    let runner = Runner {
        bus: bus.clone(),
        http: sprites::http_client()?,
        sprites_base_url: config.sprites_base_url.into(),
        models: Arc::new(config.models),
        model_gateway: config.model_gateway.map(|url| url.trim_end_matches('/').into()),
        private_hosts: config.private_hosts.into(),
        mask_output: config.mask_output,
        output: config.output,
        agent_idle: config.agent_idle,
        program,
        turns: lease::Turns::new(),
        preparations: Arc::new(Semaphore::new(config.concurrency.div_ceil(PREPARATIONS_SHARE))),
        files: config.files,
        file_bytes_max: config.file_bytes_max,
        name: name.into(),
        stop: lifecycle.stop_token(),
    };
    let stop = lifecycle.stop_token();
    let heartbeats =
        runner.turns.clone().keep(bus.clone(), runner.name.clone(), lifecycle.stop_token());
    lifecycle.spawn("heartbeats", heartbeats);
    lifecycle.spawn("jobs", async move {
        let concurrency = config.concurrency.max(1);
        ::metrics::gauge!("aod_runner_capacity").set(concurrency as f64);
        let turns = runner.turns.clone();
        if stop.run_until_cancelled(turns.registered()).await.is_none() {
            return;
        }
        bus::work::run(bus.clone(), &topology::RUNNER, concurrency, stop, move |job| {
            crate::metrics::counted(jobs::handle(runner.clone(), job))
        })
        .await;
        // Releases must be sent before the process exits.
        bus.flush(Duration::from_secs(2)).await;
    });
    Ok(())
}
