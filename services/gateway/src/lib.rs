//! HTTP and SSE to the world. Keeps nothing: any number of replicas serve the same.
//!
//! [`router`] is every public route on one page; a file per resource holds its handlers; [`body`] checks what is sent, in the shapes of
//! the contract; [`error`] is the one place where a failure becomes a status; [`stream`] follows sessions.

mod agents;
mod auth;
mod body;
mod credentials;
mod environments;
mod error;
mod health;
mod idempotency;
mod keys;
mod openapi;
mod page;
mod path;
mod router;
mod secrets;
mod sessions;
mod stream;
#[cfg(test)]
mod wire_tests;

use std::{io, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use anyhow::Context as _;
use axum::serve::Listener;
use bus::Bus;
use contract::access;
use service::{Env, Lifecycle};
use tokio::net::{TcpListener, TcpStream};
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use types::Runtime;

use crate::{auth::KeyCache, stream::hub::Hubs};

#[derive(Debug)]
pub struct Config {
    pub bus: bus::Config,
    pub addr: SocketAddr,
    pub api: ApiConfig,
}

/// What the API's behaviour depends on.
#[derive(Debug)]
pub struct ApiConfig {
    pub default_timeout_seconds: u32,
    pub default_session_limit: u32,
    pub shell_runtime: bool,
    pub stream_stale: Duration,
    pub slow_reader: Duration,
    pub cors_origins: Vec<String>,
    pub allowed_hosts: Vec<String>,
}

impl Config {
    pub fn from_env(env: &mut Env) -> Self {
        let list = |text: String| text.split(',').map(|item| item.trim().to_owned()).filter(|item| !item.is_empty()).collect();
        let config = Self {
            bus: bus::Config::from_env(env, &access::GATEWAY),
            addr: env.parsed("AOD_LISTEN_ADDR", "where the API listens", ([127, 0, 0, 1], 8777).into()),
            api: ApiConfig {
                default_timeout_seconds: env.parsed("DEFAULT_TIMEOUT", "a turn's timeout where none is given, in seconds", 600),
                default_session_limit: env.parsed(
                    "DEFAULT_MAX_CONCURRENT_SESSIONS",
                    "active sessions of a user without a limit of its own",
                    100,
                ),
                shell_runtime: env.parsed("ENABLE_SHELL_RUNTIME", "allow the shell runtime", false),
                stream_stale: env.seconds("STREAM_STALE_SECONDS", "how long a stream may be silent before it ends", 600),
                slow_reader: env.seconds(
                    "AOD_SLOW_READER_SECONDS",
                    "how long a client may take nothing before its connection is closed",
                    30,
                ),
                cors_origins: list(env.parsed("AOD_CORS_ORIGINS", "origins that browsers may call from", "*".to_owned())),
                allowed_hosts: list(env.parsed("ALLOWED_HOSTS", "Host headers that are answered", "*".to_owned())),
            },
        };
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
    config: Arc<ApiConfig>,
    keys: KeyCache,
    hubs: Arc<Hubs>,
    lifecycle: Lifecycle,
    stop: CancellationToken,
}

/// How long the gateway waits for another service before it answers 503.
const RPC_DEADLINE: Duration = Duration::from_secs(10);

impl App {
    async fn call<R: contract::rpc::Rpc>(&self, request: &R::Request) -> Result<R::Reply, error::ApiError> {
        Ok(self.bus.call::<R>(request, RPC_DEADLINE).await?)
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
    let bus = Bus::connect(&config.bus).await.context("bus")?;
    let connection = bus.clone();
    lifecycle.add_check("bus", move || connection.is_connected());
    let listener = TcpListener::bind(config.addr).await.with_context(|| format!("cannot listen on AOD_LISTEN_ADDR {}", config.addr))?;
    tracing::info!(addr = %config.addr, "listening");
    let app = App {
        keys: KeyCache::new(),
        hubs: Arc::new(Hubs::new(bus.clone(), lifecycle.tracker())),
        bus,
        config: Arc::new(config.api),
        lifecycle: lifecycle.clone(),
        stop: lifecycle.stop_token(),
    };
    let listener = Patient { listener, patience: app.config.slow_reader };
    let router = router::router(app);
    let stop = lifecycle.stop_token();
    lifecycle.spawn("http", async move {
        let served = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await;
        if let Err(error) = served {
            tracing::error!(%error, "http server ended");
        }
    });
    Ok(())
}

/// Accepts connections whose patience with a client that takes nothing is bounded.
/// A reader that is cut so resumes by id (contract §7).
struct Patient {
    listener: TcpListener,
    patience: Duration,
}

impl Listener for Patient {
    type Io = Pin<Box<TimeoutStream<TcpStream>>>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        let (stream, addr) = Listener::accept(&mut self.listener).await;
        // Events leave at once.
        let _ = stream.set_nodelay(true);
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(self.patience));
        (Box::pin(stream), addr)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}
