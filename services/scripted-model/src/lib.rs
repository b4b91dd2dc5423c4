//! A model that answers from a script, on the wire formats of the real ones, so that the real agent
//! CLIs run with no key and no network: for demos, for tests, for users' own CI.
//!
//! [`script`] is what it says; the others are how: [`anthropic`] the Messages API, [`openai`] the
//! Responses API, [`google`] the Gemini API.

mod anthropic;
mod google;
mod openai;
mod script;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context as _;
use axum::{Router, http::StatusCode, routing::get};
use serde_json::Value;
use service::{Env, Lifecycle};
use tokio::net::TcpListener;

pub use script::Script;

/// A key that is always refused, for trying out what then happens.
const BAD_KEY: &str = "invalid";
/// Text of one delta of a long answer.
const DELTA_CHARS: usize = 4096;

/// A trickle goes word by word, anything else in large parts.
fn parts(text: &str, delay: Duration) -> Vec<String> {
    if !delay.is_zero() {
        return text.split_inclusive(' ').map(str::to_owned).collect();
    }
    let characters: Vec<char> = text.chars().collect();
    characters.chunks(DELTA_CHARS).map(|chunk| chunk.iter().collect()).collect()
}

/// One that nothing else in the conversation has: a CLI takes messages of one id for one message.
fn unique_id(prefix: &str) -> String {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_nanos());
    format!("{prefix}_{now:x}")
}

fn is(value: &Value, name: &str, text: &str) -> bool {
    value.get(name).and_then(Value::as_str) == Some(text)
}

#[derive(Debug)]
pub struct Config {
    pub addr: SocketAddr,
    pub script: Option<PathBuf>,
}

impl Config {
    pub fn from_env(env: &mut Env) -> Self {
        Self {
            addr: env.parsed(
                "SCRIPTED_MODEL_ADDR",
                "listen address of the model",
                ([127, 0, 0, 1], 8779).into(),
            ),
            script: env
                .optional("SCRIPTED_MODEL_SCRIPT", "script file; the built-in script if unset")
                .map(Into::into),
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
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("SCRIPTED_MODEL_SCRIPT {}", path.display()))?;
            Script::parse(&text)
                .with_context(|| format!("SCRIPTED_MODEL_SCRIPT {}", path.display()))?
        }
    };
    let listener = TcpListener::bind(config.addr)
        .await
        .with_context(|| format!("cannot listen on SCRIPTED_MODEL_ADDR {}", config.addr))?;
    let script = Arc::new(script);
    let apis =
        [anthropic::router(script.clone()), openai::router(script.clone()), google::router(script)];
    let router = apis.into_iter().fold(Router::new(), Router::merge);
    let router = router
        .route("/", get(|| async { "scripted model\n" }))
        .fallback(|| async { (StatusCode::NOT_FOUND, "Not found\n") });
    let stop = lifecycle.stop_token();
    lifecycle.spawn("http", async move {
        tokio::select! {
            () = stop.cancelled() => {}
            served = axum::serve(listener, router) => if let Err(error) = served { tracing::error!(%error, "http server ended") },
        }
    });
    Ok(())
}
