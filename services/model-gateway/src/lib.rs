//! The proxy between agents and model providers. An agent authenticates with its session's token,
//! and the gateway forwards the request with the user's key, which it redeems at the vault and
//! keeps only in memory. Stores nothing; any number of replicas serve the same agents.
//!
//! Requests to MCP servers and to repositories go through it as well, with the session's secrets
//! for these: [`mcp`], [`git`], and their common part [`routed`]; [`egress`] keeps them away from
//! private addresses.
//!
//! [`call`] decides which requests are forwarded; [`tokens`] redeems tokens; [`ledger`] asks the
//! scheduler before each request and reports what [`usage`] read of the response, with [`prices`],
//! many at a time by [`batches`];
//! [`proxy`] forwards requests and responses; [`refusal`] has the gateway's own answers, in the
//! providers' shapes; [`retry`] retries requests that a provider refuses temporarily; [`stored`]
//! finds references that a body must not contain; [`server`] limits connections, [`body`] memory,
//! and [`share`] what one session takes of either. docs/adr/0070-model-gateway.md has the reasons.

mod batches;
mod body;
mod call;
mod egress;
mod git;
mod ledger;
mod mcp;
pub mod metrics;
mod oauth;
mod prices;
mod proxy;
mod refusal;
mod retry;
mod routed;
mod scan;
mod server;
mod share;
mod stored;
mod tokens;
mod usage;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context as _;
use axum::{Router, routing::any};
use bus::{Bus, vault::AcceptedKeys};
use contract::access;
use reqwest::Url;
use service::{Env, Lifecycle};
use tokio::net::TcpListener;
use types::Provider;

pub use crate::retry::Retries;
use crate::{
    batches::Batches,
    body::Memory,
    egress::Egress,
    ledger::Ledger,
    oauth::Refresher,
    prices::Prices,
    proxy::Proxy,
    routed::Routed,
    share::{Pools, ShareLimits, Shares},
    tokens::Tokens,
};

/// Of the memory for bodies, one session may take one part of so many, or what one body needs.
const SESSION_FRACTION: usize = 8;
/// All sessions of a user together leave the rest of the memory and of the connections to others.
const USER_FRACTION: usize = 2;
/// Bodies to MCP servers, and answers of Git LFS, have memory of their own, one part of so many as
/// large: a server may hold on to a body for as long as it likes. One body may take what its
/// session may.
const ROUTED_FRACTION: usize = 4;
const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);
const GITHUB: &str = "https://github.com";
const IDLE_CONNECTION_MAX: Duration = Duration::from_secs(90);

#[derive(Debug)]
pub struct Config {
    pub bus: bus::Config,
    pub vault_keys: AcceptedKeys,
    pub addr: SocketAddr,
    pub upstreams: Upstreams,
    pub connections: usize,
    pub requests_per_session: usize,
    pub body_bytes_max: usize,
    pub bodies_bytes_max: usize,
    /// How long a provider may send nothing.
    pub silence: Duration,
    pub retries: Retries,
    /// `host:port` of MCP servers with private addresses.
    pub private_hosts: Vec<String>,
    /// Where GitHub's repositories are.
    pub github: Url,
    pub push_bytes_max: u64,
    /// A file of prices that come before the release's own.
    pub prices: Option<PathBuf>,
}

fn http_url(text: &str) -> Option<Url> {
    Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
}

/// Where each provider is.
#[derive(Clone, Debug)]
pub struct Upstreams {
    anthropic: Url,
    openai: Url,
    google: Url,
}

impl Upstreams {
    /// Reads configured addresses; the providers' own where none is.
    ///
    /// # Errors
    /// Names the provider whose address is not one of HTTP.
    pub fn new(configured: impl Fn(Provider) -> Option<String>) -> Result<Self, Provider> {
        let of = |provider: Provider| {
            let text =
                configured(provider).unwrap_or_else(|| format!("https://{}", provider.host()));
            http_url(&text).ok_or(provider)
        };
        Ok(Self {
            anthropic: of(Provider::Anthropic)?,
            openai: of(Provider::Openai)?,
            google: of(Provider::Google)?,
        })
    }

    fn of(&self, provider: Provider) -> &Url {
        match provider {
            Provider::Anthropic => &self.anthropic,
            Provider::Openai => &self.openai,
            Provider::Google => &self.google,
        }
    }
}

impl Config {
    pub fn from_env(env: &mut Env) -> Self {
        let anthropic = env.optional(
            "AOD_MODEL_BASE_URL_ANTHROPIC",
            "base URL for Anthropic's models, without /v1",
        );
        let openai =
            env.optional("AOD_MODEL_BASE_URL_OPENAI", "base URL for OpenAI's models, without /v1");
        let google = env
            .optional("AOD_MODEL_BASE_URL_GOOGLE", "base URL for Google's models, without /v1beta");
        let configured = move |provider| match provider {
            Provider::Anthropic => anthropic.clone(),
            Provider::Openai => openai.clone(),
            Provider::Google => google.clone(),
        };
        let upstreams = Upstreams::new(configured).or_else(|provider| {
            env.refuse(format!(
                "AOD_MODEL_BASE_URL_{} must be an http or https URL",
                provider.as_str().to_uppercase()
            ));
            Upstreams::new(|_| None)
        });
        Self {
            bus: bus::Config::from_env(env, &access::MODEL_GATEWAY),
            vault_keys: AcceptedKeys::from_env(env),
            addr: env.parsed("AOD_MODEL_GATEWAY_ADDR", "listen address for sandboxes", ([127, 0, 0, 1], 8780).into()),
            // The providers' own addresses are URLs.
            upstreams: upstreams.unwrap_or_else(|_: Provider| unreachable!("the providers' own addresses are URLs")),
            connections: env.parsed("AOD_MODEL_MAX_CONNECTIONS", "maximum number of open connections of sandboxes", 8192),
            requests_per_session: env.parsed(
                "AOD_MODEL_REQUESTS_PER_SESSION",
                "maximum number of a session's model requests at a time",
                64,
            ),
            body_bytes_max: env.parsed("AOD_MODEL_BODY_MAX_BYTES", "maximum size of a model request's body", 64 << 20),
            bodies_bytes_max: env.parsed(
                "AOD_MODEL_BODIES_MAX_BYTES",
                "maximum size of all request bodies that are held at a time",
                512 << 20,
            ),
            silence: env.seconds("AOD_MODEL_SILENCE_SECONDS", "how long a provider may send nothing before a request fails", 600),
            retries: Retries {
                times: env.parsed(
                    "AOD_MODEL_RETRIES",
                    "how often a request that a provider refuses temporarily (429, 503, 529) is retried; 0: every response is passed on unchanged",
                    4,
                ),
                wait_max: env.seconds("AOD_MODEL_RETRY_SECONDS", "total time that one request may wait for retries", 60),
            },
            private_hosts: {
                let hosts = env.optional(
                    "AOD_MODEL_GATEWAY_PRIVATE_HOSTS",
                    "comma-separated host:port: private addresses of MCP servers that may be reached; the same as the runners' setting",
                );
                types::route::hosts(&hosts.unwrap_or_default())
            },
            github: {
                let github = env.parsed("AOD_GITHUB_URL", "base URL for GitHub's repositories", GITHUB.to_owned());
                // GitHub's own address is a URL.
                http_url(&github)
                    .or_else(|| {
                        env.refuse("AOD_GITHUB_URL must be an http or https URL");
                        http_url(GITHUB)
                    })
                    .unwrap_or_else(|| unreachable!("GitHub's own address is a URL"))
            },
            push_bytes_max: env.parsed("AOD_GIT_PUSH_MAX_BYTES", "maximum size of a push to a repository", 2 << 30),
            prices: env
                .optional("AOD_MODEL_PRICES", "TOML file of list prices that override those of the release; see docs/budgets.md")
                .map(PathBuf::from),
        }
    }
}

/// Connects and begins to serve.
///
/// # Errors
/// When the bus cannot be reached or the address cannot be bound.
pub async fn run(config: Config, lifecycle: Lifecycle) -> anyhow::Result<()> {
    crate::metrics::describe();
    let name: Arc<str> = config.bus.name.clone().into();
    let bus = Bus::connect(&config.bus).await.context("bus")?;
    let connection = bus.clone();
    lifecycle.add_check("bus", move || connection.is_connected());
    let listener = TcpListener::bind(config.addr)
        .await
        .with_context(|| format!("cannot listen on AOD_MODEL_GATEWAY_ADDR {}", config.addr))?;
    tracing::info!(addr = %config.addr, "listening");
    let client = || {
        reqwest::Client::builder()
            .connect_timeout(CONNECT_TIME_MAX)
            .pool_idle_timeout(IDLE_CONNECTION_MAX)
            .tcp_nodelay(true)
            .redirect(reqwest::redirect::Policy::none())
    };
    let http = client().read_timeout(config.silence).build()?;
    let routed_bytes = config.bodies_bytes_max / ROUTED_FRACTION;
    let routed_bytes_of_session = routed_bytes / SESSION_FRACTION;
    let units = |bytes: usize, least: usize| bytes.max(least).div_ceil(body::UNIT);
    let share = ShareLimits {
        requests: config.requests_per_session,
        session: Pools {
            body_units: units(config.bodies_bytes_max / SESSION_FRACTION, config.body_bytes_max),
            routed_units: units(routed_bytes_of_session, 1),
            connections: config.requests_per_session.saturating_mul(2),
        },
        user: Pools {
            body_units: units(config.bodies_bytes_max / USER_FRACTION, config.body_bytes_max),
            routed_units: units(routed_bytes / USER_FRACTION, 1),
            connections: config.connections / USER_FRACTION,
        },
    };
    let batches = Batches::start(bus.clone(), &lifecycle);
    let prices = Prices::load(config.prices.as_deref())?;
    let ledger = Ledger::new(bus.clone(), batches, prices, lifecycle.tracker());
    lifecycle.spawn("lease", ledger.clone().renew(lifecycle.stop_token()));
    let refresher_bus = bus.clone();
    let tokens = Tokens::new(bus, name, Shares::new(share));
    let memory = Memory::new(config.bodies_bytes_max, config.body_bytes_max);
    let egress = Egress::new(config.private_hosts);
    // A proxy would resolve names itself, to private addresses too.
    let mcp =
        client().read_timeout(config.silence).dns_resolver(egress.clone()).no_proxy().build()?;
    let routed = Routed {
        oauth: Refresher {
            bus: refresher_bus,
            vault_keys: config.vault_keys,
            http: mcp.clone(),
            egress: egress.clone(),
            tasks: lifecycle.tracker(),
        },
        tokens: tokens.clone(),
        memory: Memory::new(routed_bytes, routed_bytes_of_session.min(config.body_bytes_max)),
        mcp,
        egress,
        // It would give up a push that takes longer: the response begins after it.
        git: client().build()?,
        github: Arc::new(config.github),
        push_bytes_max: config.push_bytes_max,
        silence: config.silence,
    };
    let proxy = Proxy {
        ledger,
        tokens,
        upstreams: Arc::new(config.upstreams),
        http,
        retries: config.retries,
        memory,
    };
    let routes = Router::new()
        .route("/mcp/{*path}", any(mcp::handle))
        .route("/git/{*path}", any(git::handle))
        .with_state(routed);
    let router = Router::new().fallback(proxy::handle).with_state(proxy).merge(routes);
    lifecycle.spawn(
        "http",
        server::serve(listener, router, config.connections.max(1), lifecycle.stop_token()),
    );
    Ok(())
}
