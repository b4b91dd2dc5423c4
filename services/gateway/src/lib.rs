//! Serves HTTP and server-sent events to clients. Stores nothing, so any number of replicas serve
//! the same clients.
//!
//! [`router`] is every public route on one page; a file per resource holds its handlers; [`body`]
//! validates requests, with the errors of docs/api.md; [`error`] is the one place where a failure
//! becomes a status; [`stream`] follows sessions.

mod agents;
mod auth;
mod body;
mod budgets;
mod console;
mod credential_kinds;
mod credentials;
mod environments;
mod error;
mod etag;
mod health;
mod idempotency;
mod inputs;
mod keys;
mod limits;
pub mod metrics;
mod openapi;
mod page;
mod path;
mod router;
mod secrets;
mod server;
mod sessions;
mod stream;
#[cfg_attr(not(test), expect(dead_code, reason = "the routes that follow use the rest of it"))]
mod v1;
#[cfg(test)]
mod wire_tests;

use std::{net::SocketAddr, num::NonZeroU32, sync::Arc, time::Duration};

use anyhow::Context as _;
use bus::{Bus, vault::AcceptedKeys};
use contract::access;
use service::{Env, Lifecycle};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use types::Runtime;

use crate::{
    auth::KeyCache,
    credential_kinds::CredentialKinds,
    health::HealthCache,
    limits::RateLimits,
    stream::{hub::Hubs, open::OpenStreams},
    v1::files::FileStore,
};

#[derive(Debug)]
pub struct Config {
    pub bus: bus::Config,
    pub addr: SocketAddr,
    /// How long requests are still taken after the stop was asked for.
    pub drain: Duration,
    pub api: ApiConfig,
    pub vault_keys: AcceptedKeys,
    pub files: FileStore,
}

/// What the API's behaviour depends on.
#[derive(Debug)]
pub struct ApiConfig {
    pub default_timeout_seconds: u32,
    pub default_session_limit: u32,
    pub shell_runtime: bool,
    pub stream_stale: Duration,
    pub slow_reader: Duration,
    pub streams_per_key: usize,
    /// How long a browser stays signed in to the console.
    pub console_session_seconds: u32,
    pub cors_origins: Vec<String>,
    pub allowed_hosts: Vec<String>,
    pub connections: usize,
    pub limits: limits::Settings,
}

impl Config {
    pub fn from_env(env: &mut Env) -> Self {
        let list = |text: String| {
            text.split(',')
                .map(|item| item.trim().to_owned())
                .filter(|item| !item.is_empty())
                .collect()
        };
        let config = Self {
            bus: bus::Config::from_env(env, &access::GATEWAY),
            vault_keys: AcceptedKeys::from_env(env),
            files: FileStore::new(
                files::Files::from_env(env),
                env.parsed("AOD_FILE_MAX_BYTES", "maximum size of an uploaded file", 100 << 20),
            ),
            addr: env.parsed("AOD_LISTEN_ADDR", "listen address of the API", ([127, 0, 0, 1], 8777).into()),
            drain: Duration::from_secs(env.parsed(
                "AOD_DRAIN_SECONDS",
                "how long requests are still accepted after SIGTERM; must exceed the idle timeout of a load balancer's connections",
                5,
            )),
            api: ApiConfig {
                default_timeout_seconds: env.parsed("DEFAULT_TIMEOUT", "default timeout of a turn, in seconds", 600),
                default_session_limit: env.parsed(
                    "DEFAULT_MAX_CONCURRENT_SESSIONS",
                    "maximum number of active sessions of a user without a quota",
                    100,
                ),
                shell_runtime: env.parsed("ENABLE_SHELL_RUNTIME", "allow the shell runtime", false),
                stream_stale: env.seconds("STREAM_STALE_SECONDS", "how long a stream may be without events before it ends", 600),
                slow_reader: env.seconds(
                    "AOD_SLOW_READER_SECONDS",
                    "how long a client may accept no data before its connection is closed",
                    30,
                ),
                streams_per_key: env.parsed("AOD_MAX_STREAMS_PER_KEY", "maximum number of open streams per API key on this gateway", 2000),
                console_session_seconds: env.parsed(
                    "AOD_CONSOLE_SESSION_SECONDS",
                    "how long a browser stays signed in to the console",
                    86_400,
                ),
                cors_origins: list(env.parsed("AOD_CORS_ORIGINS", "comma-separated origins from which browsers may call", "*".to_owned())),
                allowed_hosts: list(env.parsed(
                    "ALLOWED_HOSTS",
                    "comma-separated accepted Host headers; .example.com matches the domain and its subdomains",
                    "*".to_owned(),
                )),
                connections: env.parsed("AOD_MAX_CONNECTIONS", "maximum number of open connections", 16_384),
                limits: limits::Settings {
                    failures_per_minute: NonZeroU32::new(env.parsed(
                        "AOD_AUTH_FAILURES_PER_MINUTE",
                        "failed authentications per address before further failures are answered 429; valid keys are never limited; 0: no limit",
                        60,
                    )),
                    requests_per_second: NonZeroU32::new(env.parsed(
                        "AOD_REQUESTS_PER_SECOND",
                        "maximum requests per second of one API key on this gateway; 0: no limit",
                        0,
                    )),
                    trusted_proxies: env.parsed("AOD_TRUSTED_PROXIES", "number of proxies in front that append to X-Forwarded-For", 0),
                },
            },
        };
        if env.is_production() {
            if config.api.allowed_hosts.iter().any(|host| host == "*") {
                env.refuse(
                    "ALLOWED_HOSTS must name the hosts that are answered (AOD_ENV=production)",
                );
            }
            if config.api.shell_runtime {
                env.refuse("ENABLE_SHELL_RUNTIME must be off (AOD_ENV=production)");
            }
        }
        if config.api.streams_per_key == 0 {
            env.refuse("AOD_MAX_STREAMS_PER_KEY must be at least 1");
        }
        if config.api.console_session_seconds == 0 {
            env.refuse("AOD_CONSOLE_SESSION_SECONDS must be at least 1");
        }
        if config.api.connections == 0 {
            env.refuse("AOD_MAX_CONNECTIONS must be at least 1");
        }
        if !(10..=3600).contains(&config.api.default_timeout_seconds) {
            env.refuse("DEFAULT_TIMEOUT must be from 10 to 3600");
        }
        config
    }
}

/// What every request works with. Cheap to clone.
#[derive(Clone)]
struct App {
    bus: Bus,
    vault_keys: AcceptedKeys,
    config: Arc<ApiConfig>,
    keys: KeyCache,
    credential_kinds: CredentialKinds,
    limits: RateLimits,
    health: HealthCache,
    hubs: Arc<Hubs>,
    streams: OpenStreams,
    files: FileStore,
    lifecycle: Lifecycle,
    shutdown: server::Shutdown,
}

/// How long the gateway waits for another service before it answers 503.
const RPC_DEADLINE: Duration = Duration::from_secs(10);

impl App {
    async fn call<R: contract::rpc::Rpc>(
        &self,
        request: &R::Request,
    ) -> Result<R::Reply, error::ApiError> {
        Ok(self.bus.call::<R>(request, RPC_DEADLINE).await?)
    }

    /// Seals a secret for its way to the vault.
    async fn seal(
        &self,
        user_id: &str,
        kind: &str,
        value: &[u8],
    ) -> Result<contract::vault::SealedValue, error::ApiError> {
        Ok(self.bus.seal_for_vault(&self.vault_keys, user_id, kind, value, RPC_DEADLINE).await?)
    }

    fn runtimes(&self) -> &'static [Runtime] {
        if self.config.shell_runtime { &Runtime::ALL } else { &Runtime::AGENTS }
    }
}

/// Connects and begins to serve.
///
/// # Errors
/// When the bus cannot be reached or the address cannot be bound.
pub async fn run(config: Config, lifecycle: Lifecycle) -> anyhow::Result<()> {
    crate::metrics::describe();
    config.files.check().await?;
    let bus = Bus::connect(&config.bus).await.context("bus")?;
    let connection = bus.clone();
    lifecycle.add_check("bus", move || connection.is_connected());
    let listener = TcpListener::bind(config.addr)
        .await
        .with_context(|| format!("cannot listen on AOD_LISTEN_ADDR {}", config.addr))?;
    tracing::info!(addr = %config.addr, "listening");
    let shutdown = server::Shutdown {
        lifecycle: lifecycle.clone(),
        drain: config.drain,
        closing: CancellationToken::new(),
    };
    let app = App {
        keys: KeyCache::new(),
        credential_kinds: CredentialKinds::new(),
        limits: RateLimits::new(&config.api.limits),
        health: HealthCache::new(),
        hubs: Arc::new(Hubs::new(bus.clone(), lifecycle.tracker())),
        streams: OpenStreams::new(config.api.streams_per_key, lifecycle.tracker()),
        bus,
        vault_keys: config.vault_keys,
        files: config.files,
        config: Arc::new(config.api),
        lifecycle: lifecycle.clone(),
        shutdown: shutdown.clone(),
    };
    let limits = server::HttpLimits {
        connections: app.config.connections,
        write_timeout: app.config.slow_reader,
    };
    lifecycle.spawn("limits", app.limits.clone().tidy(lifecycle.stop_token()));
    lifecycle.spawn("http", server::serve(listener, router::router(app), limits, shutdown));
    Ok(())
}
