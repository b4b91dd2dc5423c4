//! For operators: users, keys, quotas and credentials, straight on the bus.

use std::{path::PathBuf, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bus::{Bus, Failure, dead_letters::DeadLetter, vault::AcceptedKeys};
use clap::{Args, Subcommand};
use contract::{
    access,
    auth::{
        BootstrapRequest, CreateKeyRequest, CreateUserRequest, DeactivateKeyRequest, FindUserRequest, Key, ListKeysRequest,
        ListUsersRequest, SetQuotaRequest, SetUserActiveRequest, User,
    },
    common::Empty,
    rpc::{self, Rpc},
    scheduler::{Budget, BudgetLimits, GetBudgetRequest, ListUsageRequest, ModelsChange, SetBudgetRequest, UsageSum},
    vault::{
        Credential, DeleteCredentialRequest, KeyStatus, ListCredentialsRequest, ListRedemptionsRequest, PutCredentialRequest, Redemption,
        RotateKeysRequest,
    },
};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};
use types::{ApiKey, Timestamp, limits::PAGE_MAX};

use crate::{
    budget::{Limit as BudgetLimit, LimitArgs, USAGE, count},
    credential::Kind,
    dev,
    output::{Output, Table},
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
    /// Manage what model requests may use, and how many there may be
    #[command(subcommand)]
    Budget(Budgets),
    /// Print what model requests used: sums by day, agent, model, key, session or user
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

#[derive(Debug, Subcommand)]
enum Vault {
    /// Print which key versions are in use
    Status,
    /// Re-wrap all secrets with the newest key version (safe to interrupt and rerun)
    Rotate,
}

#[derive(Debug, Subcommand)]
enum Users {
    /// Create a user
    Create {
        /// Name of the user
        name: String,
    },
    /// List users
    List,
    /// Disable a user: none of its keys work until it is enabled again
    Disable {
        /// Name of the user
        name: String,
    },
    /// Enable a disabled user
    Enable {
        /// Name of the user
        name: String,
    },
}

#[derive(Debug, Subcommand)]
enum Keys {
    /// Create a key; it is shown only once
    #[command(after_help = "Example:\n  aod admin key create alice --expires-in-days 90")]
    Create {
        /// Name of the user
        user: String,
        /// What the key is for
        #[arg(long, default_value = "operator")]
        name: String,
        /// Days until the key expires; without this it never does
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..=36_500))]
        expires_in_days: Option<u32>,
    },
    /// List the keys of a user
    List {
        /// Name of the user
        user: String,
    },
    /// Deactivate a key
    Revoke {
        /// Name of the user
        user: String,
        /// Id of the key
        id: String,
    },
}

#[derive(Debug, Subcommand)]
enum Quotas {
    /// Set the limit of a user
    Set {
        /// Name of the user
        user: String,
        /// A number from 1, or `default`
        limit: Limit,
    },
}

#[derive(Debug, Subcommand)]
enum Budgets {
    /// Print a budget: what may be used, and what was
    #[command(after_help = "Example:\n  aod admin budget get user alice")]
    Get(BudgetOf),
    /// Set limits of a budget; those that are not named stay as they are
    #[command(
        after_help = "Examples:\n  aod admin budget set user alice --usd 100\n  aod admin budget set deployment --usd 2000 --tokens default\n  aod admin budget set user alice --allow-model 'claude-*' --requests-per-minute 60"
    )]
    Set {
        #[command(flatten)]
        of: BudgetOf,
        #[command(flatten)]
        limits: LimitArgs,
        /// Model requests of each session per minute, or `default`
        #[arg(long, value_parser = count)]
        requests_per_minute: Option<BudgetLimit>,
        /// Allow only this model; `*` at the end matches any rest; repeatable
        #[arg(long, value_name = "MODEL")]
        allow_model: Vec<String>,
        /// Allow every model again
        #[arg(long, conflicts_with = "allow_model")]
        allow_all_models: bool,
    },
    /// Remove a budget's own limits and forget what was used; the deployment's defaults apply
    Clear(BudgetOf),
}

#[derive(Debug, Args)]
struct BudgetOf {
    /// Whose budget
    #[arg(value_enum)]
    scope: Scope,
    /// Name of the user, or id of the agent or session; none for the deployment
    #[arg(required_if_eq_any([("scope", "user"), ("scope", "agent"), ("scope", "session")]))]
    name: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Scope {
    Session,
    Agent,
    User,
    Deployment,
}

impl Scope {
    const fn name(self) -> &'static str {
        match self {
            Self::Session => "session",
            Self::Agent => "agent",
            Self::User => "user",
            Self::Deployment => "deployment",
        }
    }
}

#[derive(Debug, Args)]
struct UsageArgs {
    /// What to add up by: day, agent, model, key, session or user
    #[arg(long, default_value = "user")]
    by: String,
    /// Only of this user
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// First day in UTC, as 2026-01-31; 30 days before the last one by default
    #[arg(long, value_name = "DAY")]
    from: Option<String>,
    /// Last day; today by default
    #[arg(long, value_name = "DAY")]
    to: Option<String>,
    /// Print at most this many sums
    #[arg(long, default_value_t = 100)]
    limit: u32,
}

#[derive(Clone, Debug)]
struct Limit(Option<u32>);

impl std::str::FromStr for Limit {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "default" => Ok(Self(None)),
            text => text.parse().ok().filter(|limit| *limit > 0).map(|limit| Self(Some(limit))).ok_or("a number from 1, or `default`"),
        }
    }
}

#[derive(Debug, Subcommand)]
enum Credentials {
    /// Store a credential; its value is asked for, or read from standard input
    Set {
        /// Name of the user
        user: String,
        /// What the credential is for
        kind: Kind,
    },
    /// List the stored credentials of a user; values are never shown
    List {
        /// Name of the user
        user: String,
    },
    /// Delete a credential
    Delete {
        /// Name of the user
        user: String,
        /// What the credential is for
        kind: Kind,
    },
}

/// Why a command failed, as the command prints it.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error("{0}")]
    Local(String),
    #[error(transparent)]
    Connect(#[from] bus::ConnectError),
    #[error("{}", .0.message)]
    Refused(#[from] Failure),
}

const DEADLINE: Duration = Duration::from_secs(10);

impl AdminArgs {
    pub async fn run(self, output: Output) -> Result<(), AdminError> {
        // Asked for before anything is connected: people take their time.
        let value = match &self.command {
            Admin::Credential(Credentials::Set { .. }) => Some(secret_input::read().map_err(AdminError::Local)?),
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
    let ca_file = env.optional("NATS_CA_FILE", "certificate authority of a NATS server with TLS, as PEM").map(PathBuf::from);
    match env.finish() {
        settings::Verdict::Refused(problems) => Err(AdminError::Local(problems)),
        _ => Ok(operator_config(url, password, ca_file)),
    }
}

/// The bus, as its user `operator`.
pub fn operator_config(url: String, password: SecretString, ca_file: Option<PathBuf>) -> bus::Config {
    bus::Config { url, user: access::OPERATOR.user, password, ca_file, name: format!("aod-admin/{}", std::process::id()) }
}

struct Operator {
    bus: Bus,
    output: Output,
}

impl Operator {
    async fn call<R: Rpc>(&self, request: &R::Request) -> Result<R::Reply, AdminError> {
        Ok(self.bus.call::<R>(request, DEADLINE).await?)
    }

    async fn user(&self, name: String) -> Result<String, AdminError> {
        Ok(self.call::<rpc::FindUser>(&FindUserRequest { name }).await?.user_id)
    }

    async fn run(self, command: Admin, value: Option<SecretString>) -> Result<(), AdminError> {
        const USERS: Table = Table(&["name", "id", "is_active", "session_limit", "created_at"]);
        const KEYS: Table = Table(&["id", "name", "prefix", "is_active", "expires_at", "last_used_at"]);
        const KEY_VERSIONS: Table = Table(&["version", "is_current", "is_configured", "secrets", "public_key"]);
        const CREDENTIALS: Table = Table(&["kind", "hint", "updated_at"]);
        match command {
            Admin::Bootstrap { user } => {
                let key = new_key()?;
                let request = BootstrapRequest {
                    user_name: user,
                    key_name: "bootstrap".to_owned(),
                    key_hash: key.hash().as_bytes().to_vec(),
                    prefix: key.display_prefix(),
                };
                let made = self.call::<rpc::Bootstrap>(&request).await?;
                self.show_new_key(&made, &key);
            }
            Admin::User(Users::Create { name }) => {
                self.output.one(&describe_user(&self.call::<rpc::CreateUser>(&CreateUserRequest { name }).await?));
            }
            Admin::User(Users::List) => {
                let (mut users, mut request) = (Vec::new(), ListUsersRequest::default());
                loop {
                    let page = self.call::<rpc::ListUsers>(&request).await?;
                    request.after_name = page.users.last().map(|user| user.name.clone()).unwrap_or_default();
                    users.extend(page.users);
                    if !page.has_more {
                        break;
                    }
                }
                self.output.list(&users.iter().map(describe_user).collect::<Vec<_>>(), USERS);
            }
            Admin::User(Users::Disable { name }) => self.set_active(name, false).await?,
            Admin::User(Users::Enable { name }) => self.set_active(name, true).await?,
            Admin::Key(Keys::Create { user, name, expires_in_days }) => {
                let user_id = self.user(user).await?;
                let key = new_key()?;
                let expires_at_us = expires_in_days.map(|days| Timestamp::now().unix_micros() + i64::from(days) * 86_400_000_000);
                let request = CreateKeyRequest {
                    user_id,
                    name,
                    key_hash: key.hash().as_bytes().to_vec(),
                    prefix: key.display_prefix(),
                    expires_at_us,
                    ..CreateKeyRequest::default()
                };
                let made = self.call::<rpc::CreateKey>(&request).await?;
                self.show_new_key(&made, &key);
            }
            Admin::Key(Keys::List { user }) => {
                let user_id = self.user(user).await?;
                let request = ListKeysRequest { user_id, limit: PAGE_MAX, after_key_id: None };
                let keys = self.call::<rpc::ListKeys>(&request).await?.keys;
                self.output.list(&keys.iter().map(describe_key).collect::<Vec<_>>(), KEYS);
            }
            Admin::Key(Keys::Revoke { user, id }) => {
                let user_id = self.user(user).await?;
                let key = self.call::<rpc::DeactivateKey>(&DeactivateKeyRequest { user_id, key_id: id }).await?;
                self.output.one(&describe_key(&key));
            }
            Admin::Quota(Quotas::Set { user, limit }) => {
                let user_id = self.user(user).await?;
                let user = self.call::<rpc::SetQuota>(&SetQuotaRequest { user_id, session_limit: limit.0 }).await?;
                self.output.one(&describe_user(&user));
            }
            Admin::Budget(command) => self.budget(command).await?,
            Admin::Usage(args) => self.usage(args).await?,
            Admin::Credential(Credentials::Set { user, kind }) => {
                let user_id = self.user(user).await?;
                let (kind, value) = (kind.name(), value.unwrap_or_default());
                let value = value.expose_secret().as_bytes();
                let sealed = Some(self.bus.seal_for_vault(&AcceptedKeys::default(), &user_id, &kind, value, DEADLINE).await?);
                let request = PutCredentialRequest { user_id, kind, sealed, ..PutCredentialRequest::default() };
                let stored = self.call::<rpc::PutCredential>(&request).await?;
                self.output.one(&describe_credential(&stored));
            }
            Admin::Credential(Credentials::List { user }) => {
                let user_id = self.user(user).await?;
                let stored = self.call::<rpc::ListCredentials>(&ListCredentialsRequest { user_id }).await?.credentials;
                self.output.list(&stored.iter().map(describe_credential).collect::<Vec<_>>(), CREDENTIALS);
            }
            Admin::Credential(Credentials::Delete { user, kind }) => {
                let user_id = self.user(user).await?;
                self.call::<rpc::DeleteCredential>(&DeleteCredentialRequest { user_id, kind: kind.name() }).await?;
                self.output.one(&json!({ "detail": "Credential deleted" }));
            }
            Admin::Vault(Vault::Status) => {
                let keys = self.call::<rpc::KeyStatus>(&Empty {}).await?.keys;
                self.output.list(&keys.iter().map(describe_key_version).collect::<Vec<_>>(), KEY_VERSIONS);
            }
            Admin::Vault(Vault::Rotate) => self.rotate().await?,
            Admin::DeadLetters { limit } => self.dead_letters(limit).await?,
            Admin::Audit { session, limit } => self.audit(session, limit).await?,
        }
        Ok(())
    }

    /// Step by step, until no secret of an older version is left.
    async fn rotate(&self) -> Result<(), AdminError> {
        let (mut rotated, mut damaged, mut after) = (0, Vec::new(), None);
        loop {
            let step = self.call::<rpc::RotateKeys>(&RotateKeysRequest { after_secret_id: after }).await?;
            rotated += step.rotated;
            damaged.extend(step.damaged_secret_ids);
            note!("{rotated} moved to key version {}, {} left", step.version, step.remaining);
            let at_the_end = step.last_secret_id.is_none();
            after = step.last_secret_id;
            if !damaged.is_empty() && at_the_end {
                let ids = damaged.join(", ");
                return Err(AdminError::Local(format!("{} secrets do not open and were left as they are: {ids}", damaged.len())));
            }
            if step.remaining == 0 {
                let detail =
                    format!("Every secret is under key version {}; older keys may be removed from FIELD_ENCRYPTION_KEY", step.version);
                self.output.one(&json!({ "detail": detail, "version": step.version, "rotated": rotated }));
                return Ok(());
            }
        }
    }

    async fn dead_letters(&self, limit: usize) -> Result<(), AdminError> {
        const LETTERS: Table = Table(&["buried_at", "subject", "reason"]);
        let letters = self.bus.dead_letters(limit).await?;
        let describe = |letter: &DeadLetter| {
            json!({
                "buried_at": letter.buried_at.to_string(),
                "subject": letter.subject,
                "reason": letter.reason,
            })
        };
        self.output.list(&letters.iter().map(describe).collect::<Vec<_>>(), LETTERS);
        Ok(())
    }

    async fn audit(&self, session_id: Option<String>, limit: u32) -> Result<(), AdminError> {
        const REDEMPTIONS: Table = Table(&["redeemed_at", "session", "purpose", "runner", "outcome", "kinds"]);
        let (mut redemptions, mut before) = (Vec::new(), None);
        while redemptions.len() < limit as usize {
            let page = (limit - u32::try_from(redemptions.len()).unwrap_or(limit)).min(PAGE_MAX);
            let request = ListRedemptionsRequest { session_id: session_id.clone(), limit: page, before };
            let reply = self.call::<rpc::ListRedemptions>(&request).await?.redemptions;
            before = reply.last().map(|redemption| redemption.redemption_id);
            redemptions.extend(reply.iter().map(describe_redemption));
            if reply.len() < page as usize {
                break;
            }
        }
        self.output.list(&redemptions, REDEMPTIONS);
        Ok(())
    }

    async fn budget(&self, command: Budgets) -> Result<(), AdminError> {
        let budget = match command {
            Budgets::Get(of) => self.call::<rpc::GetBudget>(&self.budget_of(of).await?).await?,
            Budgets::Clear(of) => self.call::<rpc::ClearBudget>(&self.budget_of(of).await?).await?,
            Budgets::Set { of, limits, requests_per_minute, allow_model, allow_all_models } => {
                let mut change = limits.change();
                change.requests_per_minute = requests_per_minute.map(BudgetLimit::change);
                let names_models = allow_all_models || !allow_model.is_empty();
                change.allowed_models = names_models.then_some(ModelsChange { models: allow_model });
                let request = SetBudgetRequest { of: Some(self.budget_of(of).await?), change: Some(change) };
                self.call::<rpc::SetBudget>(&request).await?
            }
        };
        self.output.one(&describe_budget(&budget));
        Ok(())
    }

    async fn budget_of(&self, of: BudgetOf) -> Result<GetBudgetRequest, AdminError> {
        let scope_id = match (of.scope, of.name) {
            (Scope::User, Some(name)) => self.user(name).await?,
            (Scope::Deployment, Some(_)) => return Err(AdminError::Local("the deployment has no name".to_owned())),
            (_, name) => name.unwrap_or_default(),
        };
        Ok(GetBudgetRequest { scope: of.scope.name().to_owned(), scope_id, user_id: None })
    }

    async fn usage(&self, args: UsageArgs) -> Result<(), AdminError> {
        let user_id = match args.user {
            Some(name) => Some(self.user(name).await?),
            None => None,
        };
        let (mut sums, mut after) = (Vec::new(), None);
        while sums.len() < args.limit as usize {
            let limit = (args.limit - u32::try_from(sums.len()).unwrap_or(args.limit)).min(PAGE_MAX);
            let (from_day, to_day) = (args.from.clone(), args.to.clone());
            let (user_id, group_by) = (user_id.clone(), args.by.clone());
            let request = ListUsageRequest { user_id, group_by, from_day, to_day, limit, after, ..ListUsageRequest::default() };
            let page = self.call::<rpc::ListUsage>(&request).await?;
            after = page.sums.last().map(|sum| sum.group.clone());
            sums.extend(page.sums.iter().map(describe_sum));
            if !page.has_more {
                break;
            }
        }
        self.output.list(&sums, USAGE);
        Ok(())
    }

    async fn set_active(&self, name: String, is_active: bool) -> Result<(), AdminError> {
        let user_id = self.user(name).await?;
        let user = self.call::<rpc::SetUserActive>(&SetUserActiveRequest { user_id, is_active }).await?;
        self.output.one(&describe_user(&user));
        Ok(())
    }

    fn show_new_key(&self, made: &Key, key: &ApiKey) {
        let mut described = describe_key(made);
        if let Some(object) = described.as_object_mut() {
            object.insert("key".to_owned(), key.reveal().into());
        }
        self.output.one(&described);
    }
}

fn new_key() -> Result<ApiKey, AdminError> {
    ApiKey::generate().map_err(|error| AdminError::Local(format!("no randomness: {error}")))
}

fn time(micros: i64) -> String {
    Timestamp::from_unix_micros(micros).to_string()
}

fn describe_user(user: &User) -> Value {
    json!({
        "name": user.name,
        "id": user.user_id,
        "is_active": user.is_active,
        "session_limit": user.session_limit,
        "created_at": time(user.created_at_us),
    })
}

fn describe_limits(limits: Option<&BudgetLimits>) -> Value {
    let limits = limits.copied().unwrap_or_default();
    json!({
        "usd": limits.cost_micro_usd.map(|micro| micro as f64 / 1e6),
        "tokens": limits.tokens,
        "requests": limits.requests,
        "seconds": limits.seconds,
    })
}

fn describe_budget(budget: &Budget) -> Value {
    json!({
        "scope": budget.scope,
        "id": budget.scope_id,
        "limits": describe_limits(budget.max.as_ref()),
        "used": describe_limits(budget.used.as_ref()),
        "reserved": describe_limits(budget.reserved.as_ref()),
        "own_limits": describe_limits(budget.own.as_ref()),
        "requests_per_minute": budget.requests_per_minute,
        "allowed_models": budget.allowed_models,
    })
}

fn describe_sum(sum: &UsageSum) -> Value {
    json!({
        "group": sum.group,
        "requests": sum.requests,
        "unknown": sum.unknown,
        "unpriced": sum.unpriced,
        "input_tokens": sum.input_tokens,
        "output_tokens": sum.output_tokens,
        "cache_read_tokens": sum.cache_read_tokens,
        "cache_write_tokens": sum.cache_write_tokens,
        "cost_usd": sum.cost_micro_usd as f64 / 1e6,
    })
}

fn describe_key(key: &Key) -> Value {
    json!({
        "id": key.key_id,
        "name": key.name,
        "prefix": key.prefix,
        "is_active": key.is_active,
        "created_at": time(key.created_at_us),
        "expires_at": key.expires_at_us.map(time),
        "last_used_at": key.last_used_at_us.map(time),
    })
}

fn describe_credential(credential: &Credential) -> Value {
    // The deployment's own token has no date.
    let updated_at = (credential.updated_at_us > 0).then(|| time(credential.updated_at_us));
    json!({ "kind": credential.kind, "hint": credential.hint, "updated_at": updated_at })
}

fn describe_key_version(key: &KeyStatus) -> Value {
    json!({
        "version": key.version,
        "is_current": key.is_current,
        "is_configured": key.is_configured,
        "secrets": key.secrets,
        "public_key": STANDARD.encode(&key.public_key),
    })
}

fn describe_redemption(redemption: &Redemption) -> Value {
    json!({
        "redeemed_at": time(redemption.redeemed_at_us),
        "session": redemption.session_id,
        "purpose": redemption.purpose,
        "runner": redemption.runner,
        "outcome": redemption.outcome,
        "kinds": redemption.kinds.join(","),
        "lease": redemption.lease_id,
    })
}
