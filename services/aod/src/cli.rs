//! The commands and their arguments.

use std::{path::PathBuf, process::ExitCode};

use clap::{CommandFactory as _, Parser, Subcommand};
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};

use crate::{
    admin,
    client::{Api, ApiFailure},
    credential::Kind,
    deploy, dev,
    output::{Output, Table},
    run, secret_input,
};

/// Run AI coding agents in sandboxes, and follow what they do.
#[derive(Debug, Parser)]
#[command(name = "aod", version, about, max_term_width = 100)]
pub struct Cli {
    /// The API to call
    #[arg(long, env = "AOD_API_URL", default_value = "http://127.0.0.1:8777", global = true)]
    api_url: String,
    /// How answers are printed
    #[arg(long, value_enum, default_value_t = Output::Text, global = true)]
    output: Output,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a prompt in a new session and follow it; the exit code is the turn's
    Run(run::RunArgs),
    /// Print what a session has shown, and with -f what it goes on to show
    Logs(run::LogsArgs),
    /// Agents: templates that sessions run
    #[command(subcommand)]
    Agents(Agents),
    /// Environments: how sandboxes are set up
    #[command(subcommand)]
    Envs(Envs),
    /// Sessions: an agent running, turn after turn
    #[command(subcommand)]
    Sessions(Sessions),
    /// Credentials: what agents call models with
    #[command(subcommand)]
    Credentials(Credentials),
    /// API keys
    #[command(subcommand)]
    Keys(Keys),
    /// For operators: users, keys, quotas, credentials
    Admin(admin::AdminArgs),
    /// For setting a deployment up: its secrets, and what the services need in Postgres
    #[command(subcommand)]
    Deploy(deploy::DeployArgs),
    /// Run the whole stack on this machine
    Dev(dev::DevArgs),
    /// Whether the API and all that is behind it is healthy; 0 if it is. Needs no key
    Health,
    /// Print completions for a shell
    Completions { shell: clap_complete::Shell },
}

#[derive(Debug, Subcommand)]
enum Agents {
    List,
    Get {
        id: String,
    },
    Create {
        #[arg(long)]
        name: String,
        #[arg(long)]
        model: String,
        #[arg(long)]
        runtime: String,
        /// Instructions that precede the first prompt
        #[arg(long)]
        system: Option<String>,
        #[arg(long)]
        environment: Option<String>,
    },
    /// The versions of an agent, newest first
    Versions {
        id: String,
    },
    Archive {
        id: String,
    },
}

#[derive(Debug, Subcommand)]
enum Envs {
    List,
    Get {
        id: String,
    },
    Create {
        #[arg(long)]
        name: String,
        /// A bash script that sets the sandbox up
        #[arg(long)]
        setup_script: Option<PathBuf>,
        /// A file of NAME=value lines
        #[arg(long)]
        env_file: Option<PathBuf>,
    },
    /// The versions of an environment, newest first
    Versions {
        id: String,
    },
    Archive {
        id: String,
    },
    /// Delete an environment that no session refers to
    Delete {
        id: String,
    },
}

#[derive(Debug, Subcommand)]
enum Sessions {
    List,
    Get {
        id: String,
    },
    Create {
        #[arg(long)]
        agent: String,
        /// Seconds for each turn, 10 to 3600
        #[arg(long)]
        timeout: Option<u32>,
        prompt: String,
    },
    /// The turns of a session
    Turns {
        id: String,
    },
    /// The next turn of a completed session
    Prompt {
        id: String,
        prompt: String,
    },
    Terminate {
        id: String,
    },
    /// Delete a session that is not active, with all that belongs to it
    Delete {
        id: String,
    },
}

#[derive(Debug, Subcommand)]
enum Credentials {
    List,
    /// Store a credential; its value is read from standard input
    Set {
        kind: Kind,
    },
    Delete {
        kind: Kind,
    },
}

#[derive(Debug, Subcommand)]
enum Keys {
    List,
    /// Make a key; it is shown this once
    Create {
        #[arg(long)]
        name: String,
    },
    Revoke {
        id: String,
    },
}

impl Cli {
    pub async fn run(self) -> ExitCode {
        match self.command {
            Command::Dev(args) => return dev::run(args).await,
            Command::Admin(args) => {
                return match args.run(self.output).await {
                    Ok(()) => ExitCode::SUCCESS,
                    Err(error) => {
                        eprintln!("aod admin: {error}");
                        ExitCode::FAILURE
                    }
                };
            }
            Command::Deploy(args) => {
                return match args.run().await {
                    Ok(()) => ExitCode::SUCCESS,
                    Err(error) => {
                        eprintln!("aod deploy: {error}");
                        ExitCode::FAILURE
                    }
                };
            }
            Command::Health => {
                return match crate::client::health(&self.api_url).await {
                    Ok((healthy, checks)) => {
                        self.output.one(&checks);
                        if healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE }
                    }
                    Err(error) => {
                        eprintln!("aod: {error}");
                        ExitCode::FAILURE
                    }
                };
            }
            Command::Completions { shell } => {
                clap_complete::generate(shell, &mut Self::command(), "aod", &mut std::io::stdout());
                return ExitCode::SUCCESS;
            }
            _ => {}
        }
        let done = async {
            let api = Api::from_env(&self.api_url)?;
            match self.command {
                Command::Run(args) => run::run(&api, args, self.output).await,
                Command::Logs(args) => run::logs(&api, args, self.output).await,
                command => command.call(&api, self.output).await.map(|()| ExitCode::SUCCESS),
            }
        };
        done.await.unwrap_or_else(|error: ApiFailure| {
            eprintln!("aod: {error}");
            ExitCode::FAILURE
        })
    }
}

impl Command {
    async fn call(self, api: &Api, output: Output) -> Result<(), ApiFailure> {
        const AGENTS: Table = Table(&["id", "name", "runtime", "model", "created_at"]);
        const ENVS: Table = Table(&["id", "name", "version", "created_at"]);
        const VERSIONS: Table = Table(&["version", "name", "created_at"]);
        const SESSIONS: Table = Table(&["id", "status", "runtime", "exit_code", "turn_count", "created_at"]);
        const TURNS: Table = Table(&["turn_number", "status", "exit_code", "started_at", "ended_at", "prompt"]);
        const CREDENTIALS: Table = Table(&["kind", "hint", "updated_at"]);
        const KEYS: Table = Table(&["id", "name", "prefix", "is_active", "last_used_at"]);
        match self {
            Self::Agents(Agents::List) => output.list(&api.list("/agents").await?, AGENTS),
            Self::Agents(Agents::Get { id }) => output.one(&api.get(&format!("/agents/{id}")).await?),
            Self::Agents(Agents::Create { name, model, runtime, system, environment }) => {
                let body = json!({ "name": name, "model": model, "runtime": runtime, "system": system, "environment_id": environment });
                output.one(&api.post("/agents", &body).await?);
            }
            Self::Agents(Agents::Versions { id }) => output.list(&api.list(&format!("/agents/{id}/versions")).await?, VERSIONS),
            Self::Agents(Agents::Archive { id }) => output.one(&api.post(&format!("/agents/{id}/archive"), &Value::Null).await?),
            Self::Envs(Envs::Versions { id }) => output.list(&api.list(&format!("/environments/{id}/versions")).await?, VERSIONS),
            Self::Envs(Envs::Archive { id }) => output.one(&api.post(&format!("/environments/{id}/archive"), &Value::Null).await?),
            Self::Envs(Envs::Delete { id }) => output.one(&api.delete(&format!("/environments/{id}/delete")).await?),
            Self::Envs(Envs::List) => output.list(&api.list("/environments").await?, ENVS),
            Self::Envs(Envs::Get { id }) => output.one(&api.get(&format!("/environments/{id}")).await?),
            Self::Envs(Envs::Create { name, setup_script, env_file }) => {
                let script = setup_script.map(|path| read_file(&path)).transpose()?;
                let vars = env_file.map(|path| read_file(&path)).transpose()?.unwrap_or_default();
                let vars: serde_json::Map<String, Value> = vars
                    .lines()
                    .filter(|line| !line.trim().is_empty() && !line.starts_with('#'))
                    .filter_map(|line| line.split_once('=').map(|(name, value)| (name.trim().to_owned(), value.into())))
                    .collect();
                output.one(&api.post("/environments", &json!({ "name": name, "setup_script": script, "env_vars": vars })).await?);
            }
            Self::Sessions(Sessions::List) => output.list(&api.list("/sessions").await?, SESSIONS),
            Self::Sessions(Sessions::Get { id }) => output.one(&api.get(&format!("/sessions/{id}")).await?),
            Self::Sessions(Sessions::Create { agent, timeout, prompt }) => {
                output.one(&api.post("/sessions", &json!({ "agent_id": agent, "prompt": prompt, "timeout": timeout })).await?);
            }
            Self::Sessions(Sessions::Turns { id }) => output.list(&api.list(&format!("/sessions/{id}/turns")).await?, TURNS),
            Self::Sessions(Sessions::Prompt { id, prompt }) => {
                output.one(&api.post(&format!("/sessions/{id}/prompt"), &json!({ "prompt": prompt })).await?);
            }
            Self::Sessions(Sessions::Terminate { id }) => output.one(&api.post(&format!("/sessions/{id}/terminate"), &Value::Null).await?),
            Self::Sessions(Sessions::Delete { id }) => output.one(&api.delete(&format!("/sessions/{id}/delete")).await?),
            Self::Credentials(Credentials::List) => output.list(&api.list("/credentials").await?, CREDENTIALS),
            Self::Credentials(Credentials::Set { kind }) => {
                let value = secret_input::read().map_err(ApiFailure::Local)?;
                output.one(&api.put(&format!("/credentials/{}", kind.name()), &json!({ "value": value.expose_secret() })).await?);
            }
            Self::Credentials(Credentials::Delete { kind }) => output.one(&api.delete(&format!("/credentials/{}", kind.name())).await?),
            Self::Keys(Keys::List) => output.list(&api.list("/api-keys").await?, KEYS),
            Self::Keys(Keys::Create { name }) => output.one(&api.post("/api-keys", &json!({ "name": name })).await?),
            Self::Keys(Keys::Revoke { id }) => output.one(&api.delete(&format!("/api-keys/{id}")).await?),
            Self::Run(_) | Self::Logs(_) | Self::Dev(_) | Self::Admin(_) | Self::Deploy(_) | Self::Health | Self::Completions { .. } => {}
        }
        Ok(())
    }
}

fn read_file(path: &PathBuf) -> Result<String, ApiFailure> {
    std::fs::read_to_string(path).map_err(|error| ApiFailure::Local(format!("{} cannot be read: {error}", path.display())))
}
