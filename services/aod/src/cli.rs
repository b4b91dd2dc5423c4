//! The commands and their arguments.

mod agents;
mod call;
mod credentials;
mod environments;
pub mod files;
mod keys;
pub mod sessions;
mod usage;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};

use crate::{
    admin,
    cli::{
        agents::Agents,
        call::{ApiArgs, Client, finish},
        credentials::Credentials,
        environments::Envs,
        keys::Keys,
        sessions::Sessions,
        usage::UsageArgs,
    },
    deploy, dev,
    output::Output,
    run,
};

/// Run AI coding agents in sandboxes and stream what they do
#[derive(Debug, Parser)]
#[command(
    name = "aod",
    version,
    about = "Run AI coding agents in sandboxes and stream what they do",
    after_help = "Client commands read the API key from AOD_API_TOKEN.\n\n\
                  Exit status: 0 on success, 1 on failure, 2 on wrong usage; `aod run` exits with the turn's exit code.\n\n\
                  Examples:\n  aod dev --scripted-model\n  aod run 'write a haiku'\n  aod run --runtime shell 'echo hi'\n  aod logs -f SESSION",
    max_term_width = 100
)]
pub struct Cli {
    /// Output format
    #[arg(long, value_enum, default_value_t = Output::Text, global = true)]
    output: Output,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a prompt in a new session and print its output; exits with the turn's exit code
    #[command(after_help = run::RUN_EXAMPLES)]
    Run {
        #[command(flatten)]
        api: ApiArgs,
        #[command(flatten)]
        args: Box<run::RunArgs>,
    },
    /// Print a session's output; with -f also what it writes from now on
    #[command(after_help = "Examples:\n  aod logs SESSION\n  aod logs -f --since 1200 SESSION")]
    Logs {
        #[command(flatten)]
        api: ApiArgs,
        #[command(flatten)]
        args: run::LogsArgs,
    },
    /// Manage agents: what a session runs (runtime, model, instructions)
    Agents(Client<Agents>),
    /// Manage environments: how sandboxes are set up
    Envs(Client<Envs>),
    /// Manage sessions: one agent running turn after turn in one sandbox
    Sessions(Client<Sessions>),
    /// Print the usage of model requests, summed by day, agent, model, key or session
    #[command(after_help = "Example:\n  aod usage --by agent --from 2026-01-01")]
    Usage {
        #[command(flatten)]
        api: ApiArgs,
        #[command(flatten)]
        args: UsageArgs,
    },
    /// Manage credentials: the keys that agents call models with
    Credentials(Client<Credentials>),
    /// Manage API keys
    Keys(Client<Keys>),
    /// Manage users, keys, quotas and stored secrets as the operator, over NATS
    Admin(admin::AdminArgs),
    /// Prepare a deployment: generate secrets, create database roles and schemas
    #[command(subcommand)]
    Deploy(deploy::DeployArgs),
    /// Run the whole stack on this machine until Ctrl-C
    Dev(dev::DevArgs),
    /// Print the health of the API and of the services behind it; exits with 0 if healthy, needs no
    /// key
    Health(ApiArgs),
    /// Print shell completions
    #[command(after_help = "Example:\n  aod completions bash > /etc/bash_completion.d/aod")]
    Completions {
        /// Shell to complete for
        shell: clap_complete::Shell,
    },
}

impl Cli {
    pub async fn run(self) -> ExitCode {
        let output = self.output;
        match self.command {
            Command::Dev(args) => dev::run(args).await,
            Command::Admin(args) => {
                finish("aod admin", args.run(output).await.map(|()| ExitCode::SUCCESS))
            }
            Command::Deploy(args) => {
                finish("aod deploy", args.run().await.map(|()| ExitCode::SUCCESS))
            }
            Command::Completions { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Self::command(), "aod", &mut script);
                crate::output::write(&script);
                ExitCode::SUCCESS
            }
            Command::Health(api) => {
                let health = crate::client::health(&api.api_url).await;
                finish(
                    "aod",
                    health.map(|(healthy, checks)| {
                        output.one(&checks);
                        if healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE }
                    }),
                )
            }
            Command::Run { api, args } => {
                finish("aod", async { run::run(&api.connect()?, *args, output).await }.await)
            }
            Command::Logs { api, args } => {
                finish("aod", async { run::logs(&api.connect()?, args, output).await }.await)
            }
            Command::Agents(client) => client.call(output).await,
            Command::Envs(client) => client.call(output).await,
            Command::Sessions(client) => client.call(output).await,
            Command::Usage { api, args } => finish(
                "aod",
                async { args.print(&api.connect()?, output).await.map(|()| ExitCode::SUCCESS) }
                    .await,
            ),
            Command::Credentials(client) => client.call(output).await,
            Command::Keys(client) => client.call(output).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Visits every command with what leads to it.
    fn visit(command: &clap::Command, path: &str, check: &mut impl FnMut(&clap::Command, &str)) {
        check(command, path);
        command
            .get_subcommands()
            .for_each(|sub| visit(sub, &format!("{path} {}", sub.get_name()), check));
    }

    #[test]
    fn every_command_argument_and_flag_has_a_help_text() {
        Cli::command().debug_assert();
        let mut missing = Vec::new();
        visit(&Cli::command(), "aod", &mut |command, path| {
            if command.get_about().is_none() {
                missing.push(path.to_owned());
            }
            missing.extend(
                command
                    .get_arguments()
                    .filter(|arg| arg.get_help().is_none())
                    .map(|arg| format!("{path}: {}", arg.get_id())),
            );
        });
        assert!(missing.is_empty(), "{missing:?}");
    }

    #[test]
    fn only_commands_that_call_the_api_take_its_url() {
        visit(&Cli::command(), "aod", &mut |command, path| {
            let takes_url = command.get_arguments().any(|arg| arg.get_id() == "api_url");
            let is_client = [
                "run",
                "logs",
                "agents",
                "envs",
                "sessions",
                "usage",
                "credentials",
                "keys",
                "health",
            ];
            let depth = path.split(' ').count();
            assert!(depth != 2 || takes_url == is_client.contains(&command.get_name()), "{path}");
        });
        Cli::try_parse_from(["aod", "sessions", "list", "--api-url", "http://x"]).unwrap();
        Cli::try_parse_from(["aod", "dev", "--api-url", "http://x"]).unwrap_err();
    }
}
