//! A Sprites-compatible server on this machine, so that nobody needs an account.
//!
//! [`sandbox`] makes a Sprite's namespaces and root; [`registry`] keeps the Sprites; [`exec`] runs commands in them; [`files`] is the
//! file API; [`api`] speaks the wire format of the Sprites API. What is not served answers 404.

mod api;
mod exec;
mod files;
mod network;
mod registry;
mod sandbox;

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use anyhow::Context as _;
use axum::serve::ListenerExt as _;
use secrecy::SecretString;
use service::{Env, Lifecycle};
use tokio::net::TcpListener;

use crate::{
    registry::Registry,
    sandbox::{Isolation, Sandboxes},
};

#[derive(Debug)]
pub struct Config {
    pub addr: SocketAddr,
    pub token: SecretString,
    pub data_dir: PathBuf,
    pub agents_dir: Option<PathBuf>,
    pub isolation: Isolation,
    pub private_hosts: Vec<String>,
}

impl Config {
    pub fn from_env(env: &mut Env) -> Self {
        Self {
            addr: env.parsed("LOCAL_SPRITES_ADDR", "where the API listens", ([127, 0, 0, 1], 8778).into()),
            token: env.secret("LOCAL_SPRITES_TOKEN", "the bearer token that callers must send"),
            data_dir: env.required("LOCAL_SPRITES_DATA_DIR", "where the Sprites' files are kept").into(),
            agents_dir: env.optional("LOCAL_SPRITES_AGENTS_DIR", "installed agent CLIs, mounted read-only at /opt/agents").map(Into::into),
            isolation: env.parsed("LOCAL_SPRITES_ISOLATION", "overlay (as root), readonly, or auto", Isolation::Auto),
            private_hosts: {
                let hosts = env.optional(
                    "LOCAL_SPRITES_PRIVATE_HOSTS",
                    "hosts, or host:port, that Sprites with a network policy may reach although they are private, separated by commas",
                );
                hosts.unwrap_or_default().split(',').map(|host| host.trim().to_owned()).filter(|host| !host.is_empty()).collect()
            },
        }
    }
}

/// Serves until a signal: on SIGINT (Ctrl-C) what runs in the Sprites is ended too; on SIGTERM, as for a restart, it runs on.
///
/// Proves first that a sandbox can be made here, and takes up the Sprites that are there.
///
/// # Errors
/// When this machine cannot isolate a Sprite, or the address cannot be bound.
pub async fn run(config: Config, lifecycle: Lifecycle) -> anyhow::Result<()> {
    let sandboxes = Sandboxes::prepare(config.isolation, &config.data_dir, config.agents_dir.as_deref()).await?;
    let registry = Arc::new(
        Registry::load(config.data_dir, sandboxes, config.private_hosts, lifecycle.tracker()).await.context("LOCAL_SPRITES_DATA_DIR")?,
    );
    let listener = TcpListener::bind(config.addr).await.with_context(|| format!("cannot listen on LOCAL_SPRITES_ADDR {}", config.addr))?;
    let router = api::router(registry.clone(), config.token, lifecycle.tracker());
    let (stop, life) = (lifecycle.stop_token(), lifecycle.clone());
    lifecycle.spawn("api", async move {
        // Small frames leave at once.
        let listener = listener.tap_io(|stream| {
            let _ = stream.set_nodelay(true);
        });
        let serve = axum::serve(listener, router);
        // Open sockets are not waited for: their clients attach again.
        tokio::select! {
            () = stop.cancelled() => {}
            served = serve => if let Err(error) = served { tracing::error!(%error, "api ended") },
        }
        // Otherwise they run on, and the next server takes them up.
        if life.was_interrupted() {
            registry.kill_all().await;
        }
    });
    Ok(())
}
