//! A model that answers from a script, on the wire formats of the real ones, so that the real agent CLIs run with no key and no
//! network: for demos, for tests, for users' own CI.
//!
//! [`script`] is what it says; [`anthropic`] is how: the Messages API, streamed or whole.

mod anthropic;
mod script;

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use anyhow::Context as _;
use service::{Env, Lifecycle};
use tokio::net::TcpListener;

pub use script::Script;

#[derive(Debug)]
pub struct Config {
    pub addr: SocketAddr,
    pub script: Option<PathBuf>,
}

impl Config {
    pub fn from_env(env: &mut Env) -> Self {
        Self {
            addr: env.parsed("SCRIPTED_MODEL_ADDR", "where the model listens", ([127, 0, 0, 1], 8779).into()),
            script: env.optional("SCRIPTED_MODEL_SCRIPT", "a script file; the built-in one where none is given").map(Into::into),
        }
    }
}

/// Reads the script and begins to serve.
///
/// # Errors
/// When the script cannot be read, or the address cannot be bound.
pub async fn run(config: Config, lifecycle: Lifecycle) -> anyhow::Result<()> {
    let script = match &config.script {
        None => Script::built_in()?,
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("SCRIPTED_MODEL_SCRIPT {}", path.display()))?;
            Script::parse(&text).with_context(|| format!("SCRIPTED_MODEL_SCRIPT {}", path.display()))?
        }
    };
    let listener = TcpListener::bind(config.addr).await.with_context(|| format!("cannot listen on SCRIPTED_MODEL_ADDR {}", config.addr))?;
    let router = anthropic::router(Arc::new(script));
    let stop = lifecycle.stop_token();
    lifecycle.spawn("http", async move {
        tokio::select! {
            () = stop.cancelled() => {}
            served = axum::serve(listener, router) => if let Err(error) = served { tracing::error!(%error, "http server ended") },
        }
    });
    Ok(())
}
