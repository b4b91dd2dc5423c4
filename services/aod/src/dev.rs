//! `aod dev`: the whole stack as child processes on this machine, on loopback alone.
//!
//! [`tools`] finds the programs; [`data`] is the data directory and what is kept in it; [`stack`]
//! says what is started, in which order and with which settings; [`supervisor`] keeps it running
//! and ends it; [`bootstrap`] makes the first user.

mod bootstrap;
mod data;
mod settings;
mod stack;
mod supervisor;
mod tools;

use std::{
    fmt,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::PathBuf,
    process::ExitCode,
};

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use crate::dev::{data::DataDir, stack::Stack, tools::Tools};

/// Runs the whole stack on this machine: Postgres, NATS, the six services and a sandbox server.
#[derive(Debug, Args)]
#[command(
    after_help = "Settings of a service (docs/configuration.md) that are set in the environment are passed on to it.\n\n\
                        Examples:\n  aod dev --scripted-model\n  EVENT_RETENTION_DAYS=7 aod dev --port 0 --ready-file ready.json"
)]
pub struct DevArgs {
    /// Directory of all data, secrets and logs; a later start continues with it
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// Port of the API on 127.0.0.1; 0 chooses a free one
    #[arg(long, default_value_t = 8777)]
    port: u16,
    /// Write URLs, keys and process ids to this file as JSON once everything is ready
    #[arg(long)]
    ready_file: Option<PathBuf>,
    /// Serve a scripted model, so that agents need no provider key and no network
    #[arg(long)]
    scripted_model: bool,
    /// Put providers' keys into sandboxes instead of sending agents' requests through the model
    /// gateway
    #[arg(long)]
    no_model_gateway: bool,
    /// URL of another Sprites API for the runners; store its token with `aod credentials set
    /// backend:sprites`
    #[arg(long, env = "SPRITES_BASE_URL")]
    sprites_url: Option<String>,
    /// Number of runners
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    runners: u16,
    /// Number of NATS servers; three keep three copies of each stream, and any one of them may fail
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=5))]
    nats_servers: u16,
    /// Replicas of each other service; further gateways and model gateways listen on ports of their
    /// own. AOD_MODEL_GATEWAY_URL may name a balancer in front of the model gateways
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=8))]
    replicas: u16,
    /// Do not restart processes that exit
    #[arg(long)]
    no_restart: bool,
}

/// Why the stack is not started.
#[derive(Debug)]
pub enum DevError {
    /// Something on this machine is in the way: one line says what.
    Unfit(String),
    /// A part did not come up.
    Broken(String),
}

impl fmt::Display for DevError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unfit(text) | Self::Broken(text) => f.write_str(text),
        }
    }
}

impl DevError {
    fn broken(error: impl fmt::Display) -> Self {
        Self::Broken(error.to_string())
    }
}

pub async fn run(args: DevArgs) -> ExitCode {
    match serve(args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            note!("aod dev: {error}");
            match error {
                DevError::Unfit(_) => ExitCode::from(2),
                DevError::Broken(_) => ExitCode::FAILURE,
            }
        }
    }
}

async fn serve(args: DevArgs) -> Result<(), DevError> {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return Err(DevError::Broken("signals cannot be received".to_owned()));
    };
    let api = SocketAddr::from((Ipv4Addr::LOCALHOST, args.port));
    TcpListener::bind(api).map_err(|error| {
        DevError::Unfit(format!(
            "port {} cannot be used: {error}; choose another with --port, or 0 for a free one",
            args.port
        ))
    })?;
    let tools = Tools::find(args.scripted_model)?;
    let data = DataDir::open(args.data_dir.clone(), &tools)?;
    let mut stack = Stack::new(tools, data, api, args)?;

    let begun = std::time::Instant::now();
    let started = tokio::select! {
        started = stack.start() => started,
        _ = terminate.recv() => Err(DevError::Broken("stopped while starting".to_owned())),
        _ = interrupt.recv() => Err(DevError::Broken("stopped while starting".to_owned())),
    };
    if let Err(error) = started {
        stack.stop().await;
        return Err(error);
    }
    welcome(&stack, begun.elapsed());
    let ended = tokio::select! {
        error = stack.watch() => Err(error),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    note!("aod dev: stopping");
    stack.stop().await;
    ended
}

/// Writes to standard output. A closed pipe does not end the stack.
fn announce(text: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stdout(), "{text}");
}

fn welcome(stack: &Stack, took: std::time::Duration) {
    let (url, key) = (stack.api_url(), stack.api_key());
    announce(&format!(
        "Agent on Demand is ready after {:.1} s. Data and logs: {}\n\n  URL  {url}\n  key  {key}\n",
        took.as_secs_f64(),
        stack.data_dir().display()
    ));
    let (runtime, model, prompt) = if stack.has_model() {
        ("claude", "claude-sonnet-4-5", "write a haiku")
    } else {
        ("shell", "none", "echo hi")
    };
    announce(&format!(
        "export AOD_API_URL={url} AOD_API_TOKEN={key}\n\
         curl -s $AOD_API_URL/agents -H \"Authorization: Bearer $AOD_API_TOKEN\" -d '{{\"name\":\"first\",\"model\":\"{model}\",\"runtime\":\"{runtime}\"}}'\n\
         curl -s $AOD_API_URL/sessions -H \"Authorization: Bearer $AOD_API_TOKEN\" -d '{{\"agent_id\":\"ID of the agent\",\"prompt\":\"{prompt}\"}}'\n\
         curl -sN $AOD_API_URL/sessions/ID_of_the_session/stream -H \"Authorization: Bearer $AOD_API_TOKEN\"\n\n\
         Ctrl-C stops everything."
    ));
}

/// How the operator reaches the bus of the stack that runs on a data directory.
pub fn operator(data_dir: Option<PathBuf>) -> Result<bus::Config, String> {
    let dir = data_dir.map_or_else(data::default_dir, Ok).map_err(|error| error.to_string())?;
    let path = dir.join(data::READY_FILE);
    let text = std::fs::read_to_string(&path).map_err(|error| {
        format!(
            "NATS_URL is not set, and no `aod dev` runs here ({} cannot be read: {error})",
            path.display()
        )
    })?;
    let unreadable = || format!("{} is not of this version of aod", path.display());
    let running: serde_json::Value = serde_json::from_str(&text).map_err(|_| unreadable())?;
    let mut url: url::Url = running
        .get("nats_url")
        .and_then(serde_json::Value::as_str)
        .and_then(|url| url.parse().ok())
        .ok_or_else(unreadable)?;
    let password = url.password().unwrap_or_default().to_owned();
    let _ = (url.set_username(""), url.set_password(None));
    Ok(crate::admin::operator::operator_config(url.to_string(), password.into(), None))
}
