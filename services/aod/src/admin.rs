//! `aod admin`: operators manage users, keys, quotas and credentials, directly over NATS.

mod budgets;
mod keys;
pub mod operator;
mod records;
mod secrets;
mod users;

use std::path::PathBuf;

use bus::Bus;
use clap::{Args, Subcommand};
use secrecy::SecretString;

use crate::{
    admin::{
        budgets::{Budgets, UsageArgs},
        keys::Keys,
        operator::{AdminError, Operator, operator_config},
        secrets::{Credentials, Vault},
        users::{Quotas, Users},
    },
    dev,
    output::Output,
    secret_input,
};

#[derive(Debug, Args)]
#[command(
    after_help = "Connects to NATS_URL as the user `operator` with NATS_PASSWORD or NATS_PASSWORD_FILE; NATS_CA_FILE names the certificate \
                        authority of a server with TLS. Without NATS_URL, connects to the stack that `aod dev` runs on this machine."
)]
pub struct AdminArgs {
    /// Data directory of the `aod dev` stack to manage
    #[arg(long, global = true, conflicts_with = "nats_url")]
    data_dir: Option<PathBuf>,
    /// URL of NATS
    #[arg(long, env = "NATS_URL", global = true, hide_env_values = true)]
    nats_url: Option<String>,
    #[command(subcommand)]
    command: Admin,
}

#[derive(Debug, Subcommand)]
enum Admin {
    /// Create the first user and API key of an empty deployment; the key is shown only once
    Bootstrap {
        /// Name of the user
        #[arg(long, default_value = "admin")]
        user: String,
    },
    /// Manage users
    #[command(subcommand)]
    User(Users),
    /// Manage the API keys of a user
    #[command(subcommand)]
    Key(Keys),
    /// Manage how many sessions a user may have active at once
    #[command(subcommand)]
    Quota(Quotas),
    /// Manage budgets and policies of model requests
    #[command(subcommand)]
    Budget(Budgets),
    /// Print the usage of model requests, summed by day, agent, model, key, session or user
    #[command(after_help = "Example:\n  aod admin usage --by user --from 2026-01-01")]
    Usage(UsageArgs),
    /// Manage the credentials of a user
    #[command(subcommand)]
    Credential(Credentials),
    /// Manage the keys that stored secrets are encrypted with
    #[command(subcommand)]
    Vault(Vault),
    /// List dead-lettered jobs, newest first
    DeadLetters {
        /// Print at most this many jobs
        #[arg(long, default_value_t = 100)]
        limit: usize,
    },
    /// List which runner redeemed which secrets, newest first
    Audit {
        /// Only redemptions of this session
        #[arg(long)]
        session: Option<String>,
        /// Print at most this many redemptions
        #[arg(long, default_value_t = 100)]
        limit: u32,
    },
}

impl AdminArgs {
    pub async fn run(self, output: Output) -> Result<(), AdminError> {
        // Asked for before anything is connected: people take their time.
        let value = match &self.command {
            Admin::Credential(Credentials::Set { .. }) => {
                Some(secret_input::read().map_err(AdminError::Local)?)
            }
            _ => None,
        };
        let config = match self.nats_url {
            Some(url) => bus_at(url)?,
            None => dev::operator(self.data_dir).map_err(AdminError::Local)?,
        };
        let operator = Operator { bus: Bus::connect(&config).await?, output };
        operator.run(self.command, value).await
    }
}

fn bus_at(url: String) -> Result<bus::Config, AdminError> {
    let mut env = service::Env::from_process("aod admin", "");
    let password = env.secret("NATS_PASSWORD", "the operator's password on the bus");
    let ca_file = env
        .optional("NATS_CA_FILE", "certificate authority of a NATS server with TLS, as PEM")
        .map(PathBuf::from);
    match env.finish() {
        settings::Verdict::Refused(problems) => Err(AdminError::Local(problems)),
        _ => Ok(operator_config(url, password, ca_file)),
    }
}

impl Operator {
    async fn run(self, command: Admin, value: Option<SecretString>) -> Result<(), AdminError> {
        match command {
            Admin::Bootstrap { user } => self.bootstrap(user).await,
            Admin::User(command) => self.users(command).await,
            Admin::Key(command) => self.keys(command).await,
            Admin::Quota(command) => self.quotas(command).await,
            Admin::Budget(command) => self.budget(command).await,
            Admin::Usage(args) => self.usage(args).await,
            Admin::Credential(command) => self.credentials(command, value).await,
            Admin::Vault(command) => self.vault(command).await,
            Admin::DeadLetters { limit } => self.dead_letters(limit).await,
            Admin::Audit { session, limit } => self.audit(session, limit).await,
        }
    }
}
