//! The commands and their arguments.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, CommandFactory as _, Parser, Subcommand, ValueEnum};
use secrecy::ExposeSecret as _;
use serde_json::{Map, Value, json};
use types::Evaluation;

use crate::{
    admin,
    budget::{LimitArgs, USAGE},
    client::{Api, ApiFailure, Page},
    credential::Kind,
    deploy, dev,
    output::{Output, Table},
    prompt::PromptArgs,
    run, secret_input,
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

/// Where the API is.
#[derive(Debug, Args)]
pub struct ApiArgs {
    /// URL of the API
    #[arg(long, env = "AOD_API_URL", default_value = "http://127.0.0.1:8777", global = true)]
    api_url: String,
}

/// Client commands of one kind of resource.
#[derive(Debug, Args)]
struct Client<C: Subcommand> {
    #[command(flatten)]
    api: ApiArgs,
    #[command(subcommand)]
    command: C,
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
    /// Print what model requests used: sums by day, agent, model, key or session
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
    /// Print the health of the API and of the services behind it; exits with 0 if healthy, needs no key
    Health(ApiArgs),
    /// Print shell completions
    #[command(after_help = "Example:\n  aod completions bash > /etc/bash_completion.d/aod")]
    Completions {
        /// Shell to complete for
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
struct UsageArgs {
    /// What to add up by
    #[arg(long, value_enum, default_value_t = GroupBy::Day)]
    by: GroupBy,
    /// Only sessions of this agent
    #[arg(long, value_name = "ID")]
    agent: Option<String>,
    /// First day in UTC, as 2026-01-31; 30 days before the last one by default
    #[arg(long, value_name = "DAY")]
    from: Option<String>,
    /// Last day; today by default
    #[arg(long, value_name = "DAY")]
    to: Option<String>,
    #[command(flatten)]
    page: Page,
}

/// What usage is added up by.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum GroupBy {
    Day,
    Agent,
    Model,
    Key,
    Session,
}

impl UsageArgs {
    async fn print(self, api: &Api, output: Output) -> Result<(), ApiFailure> {
        let by = self.by.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
        let mut query = format!("group_by={by}");
        for (name, value) in [("agent_id", &self.agent), ("from", &self.from), ("to", &self.to)] {
            if let Some(value) = value {
                query.push_str(&format!("&{name}={}", query_value(value)));
            }
        }
        list(api, &format!("/usage?{query}"), &self.page, output, USAGE).await
    }
}

/// Ids and days need no escapes; the rest is refused by the API.
fn query_value(text: &str) -> String {
    text.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_')).collect()
}

#[derive(Debug, Subcommand)]
enum Agents {
    /// List agents that are not archived, newest first
    List(Page),
    /// Print an agent
    Get {
        /// Id of the agent
        id: String,
    },
    /// Create an agent
    #[command(
        after_help = "Example:\n  aod agents create --name reviewer --runtime claude --model claude-sonnet-4-5 --system 'Review code.' --permission Bash=ask"
    )]
    Create {
        /// Name, at most 200 characters
        #[arg(long)]
        name: String,
        /// Model, with or without its provider: claude-sonnet-4-5 or anthropic/claude-sonnet-4-5
        #[arg(long)]
        model: String,
        /// Runtime: claude, codex, gemini, opencode, or shell where the deployment allows it
        #[arg(long)]
        runtime: String,
        /// System prompt
        #[arg(long)]
        system: Option<String>,
        /// Id of the environment that sessions use by default
        #[arg(long, value_name = "ID")]
        environment: Option<String>,
        /// What a tool may do without asking (allow, ask or deny); `*` at a name's end matches any rest; repeatable, the first match decides
        #[arg(long, value_name = "TOOL=EVALUATION", value_parser = permission, conflicts_with = "permissions")]
        permission: Vec<(String, Evaluation)>,
        /// Read the permissions from a JSON file, as the API takes them
        #[arg(long, value_name = "FILE")]
        permissions: Option<PathBuf>,
        #[command(flatten)]
        budget: LimitArgs,
    },
    /// Print the budget that the sessions of an agent share; with limits, change it first
    #[command(after_help = "Example:\n  aod agents budget AGENT --usd 20")]
    Budget {
        /// Id of the agent
        id: String,
        #[command(flatten)]
        limits: LimitArgs,
    },
    /// List the versions of an agent, newest first
    Versions {
        /// Id of the agent
        id: String,
        #[command(flatten)]
        page: Page,
    },
    /// Archive an agent: it can no longer be changed or start sessions
    Archive {
        /// Id of the agent
        id: String,
    },
}

#[derive(Debug, Subcommand)]
enum Envs {
    /// List environments that are not archived, newest first
    List(Page),
    /// Print an environment
    Get {
        /// Id of the environment
        id: String,
    },
    /// Create an environment
    #[command(after_help = "Example:\n  aod envs create --name python --setup-script setup.sh --env-file .env")]
    Create {
        /// Name, unique among your active environments
        #[arg(long)]
        name: String,
        /// Bash script that sets up the sandbox
        #[arg(long, value_name = "FILE")]
        setup_script: Option<PathBuf>,
        /// File of NAME=VALUE lines; empty lines and lines that start with # are skipped
        #[arg(long, value_name = "FILE")]
        env_file: Option<PathBuf>,
    },
    /// List the versions of an environment, newest first
    Versions {
        /// Id of the environment
        id: String,
        #[command(flatten)]
        page: Page,
    },
    /// Archive an environment: it can no longer be changed or used by new sessions
    Archive {
        /// Id of the environment
        id: String,
    },
    /// Delete an environment that no session refers to
    Delete {
        /// Id of the environment
        id: String,
    },
}

#[derive(Debug, Subcommand)]
enum Sessions {
    /// List sessions, newest first
    List(Page),
    /// Print a session
    Get {
        /// Id of the session
        id: String,
    },
    /// Start a session without following it; `aod run` follows
    #[command(after_help = "Example:\n  aod sessions create --agent AGENT 'write a haiku'")]
    Create {
        /// Id of the agent
        #[arg(long, value_name = "ID")]
        agent: String,
        /// Seconds for each turn, 10 to 3600
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<u32>,
        #[command(flatten)]
        budget: LimitArgs,
        #[command(flatten)]
        prompt: PromptArgs,
    },
    /// Print the budget of a session; with limits, change it first
    #[command(after_help = "Example:\n  aod sessions budget SESSION --usd 10")]
    Budget {
        /// Id of the session
        id: String,
        #[command(flatten)]
        limits: LimitArgs,
    },
    /// List the turns of a session, oldest first
    Turns {
        /// Id of the session
        id: String,
        #[command(flatten)]
        page: Page,
    },
    /// Start the next turn of a session without following it
    #[command(after_help = "Example:\n  aod sessions prompt SESSION --when-busy queue 'and then run the tests'")]
    Prompt {
        /// Id of the session
        id: String,
        /// What to do while a turn runs
        #[arg(long, value_enum)]
        when_busy: Option<WhenBusy>,
        #[command(flatten)]
        prompt: PromptArgs,
    },
    /// Interrupt the running turn; the session goes on
    Interrupt {
        /// Id of the session
        id: String,
    },
    /// List what was sent to a session while its turns ran, newest first
    Inputs {
        /// Id of the session
        id: String,
        #[command(flatten)]
        page: Page,
    },
    /// Change the text of a queued message
    Edit {
        /// Id of the session
        id: String,
        /// Id of the input
        input: String,
        #[command(flatten)]
        prompt: PromptArgs,
    },
    /// Withdraw a queued message
    Withdraw {
        /// Id of the session
        id: String,
        /// Id of the input
        input: String,
    },
    /// List the permission requests of a session, newest first
    Requests {
        /// Id of the session
        id: String,
        #[command(flatten)]
        page: Page,
    },
    /// Allow what the agent asks for
    #[command(after_help = "Example:\n  aod sessions approve SESSION")]
    Approve {
        /// Id of the session
        id: String,
        /// Id of the request; not needed while only one is open
        request: Option<u64>,
        /// Do not ask about this tool again in this session
        #[arg(long)]
        for_session: bool,
    },
    /// Deny what the agent asks for
    #[command(after_help = "Example:\n  aod sessions deny SESSION --message 'Use the staging database.'")]
    Deny {
        /// Id of the session
        id: String,
        /// Id of the request; not needed while only one is open
        request: Option<u64>,
        /// What the model reads
        #[arg(long)]
        message: Option<String>,
    },
    /// Stop a session and delete its sandbox
    Terminate {
        /// Id of the session
        id: String,
    },
    /// Delete a session that is not active, with its output
    Delete {
        /// Id of the session
        id: String,
    },
}

/// What a prompt does while a turn runs.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum WhenBusy {
    /// Refuse the prompt
    Reject,
    /// Begin the next turn with it
    Queue,
    /// The same, and interrupt the running turn
    Interrupt,
    /// Have it join the running turn
    Steer,
}

impl WhenBusy {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Reject => "reject",
            Self::Queue => "queue",
            Self::Interrupt => "interrupt",
            Self::Steer => "steer",
        }
    }
}

fn permission(text: &str) -> Result<(String, Evaluation), String> {
    let rule = text.rsplit_once('=').filter(|(tool, _)| !tool.is_empty());
    let rule = rule.and_then(|(tool, evaluation)| Some((tool.to_owned(), evaluation.parse().ok()?)));
    rule.ok_or_else(|| "expected TOOL=allow, TOOL=ask or TOOL=deny".to_owned())
}

/// Returns an agent's permissions as the API takes them; null where none were given.
fn permissions(rules: &[(String, Evaluation)], file: Option<&Path>) -> Result<Value, ApiFailure> {
    if let Some(path) = file {
        let text = read_file(path)?;
        return serde_json::from_str(&text).map_err(|error| ApiFailure::Local(format!("{}: {error}", path.display())));
    }
    let rules: Vec<Value> = rules.iter().map(|(tool, evaluation)| json!({ "tool": tool, "evaluation": evaluation.as_str() })).collect();
    Ok(if rules.is_empty() { Value::Null } else { json!({ "rules": rules }) })
}

#[derive(Debug, Subcommand)]
enum Credentials {
    /// List stored credentials; values are never shown
    List,
    /// Store a credential; its value is asked for, or read from standard input
    #[command(after_help = "Example:\n  aod credentials set provider:anthropic < key.txt")]
    Set {
        /// What the credential is for
        kind: Kind,
    },
    /// Delete a credential
    Delete {
        /// What the credential is for
        kind: Kind,
    },
}

#[derive(Debug, Subcommand)]
enum Keys {
    /// List API keys, newest first
    List(Page),
    /// Create an API key; it is shown only once
    Create {
        /// Name, at most 100 characters
        #[arg(long)]
        name: String,
    },
    /// Deactivate an API key
    Revoke {
        /// Id of the key
        id: String,
    },
}

impl Cli {
    pub async fn run(self) -> ExitCode {
        let output = self.output;
        match self.command {
            Command::Dev(args) => dev::run(args).await,
            Command::Admin(args) => finish("aod admin", args.run(output).await.map(|()| ExitCode::SUCCESS)),
            Command::Deploy(args) => finish("aod deploy", args.run().await.map(|()| ExitCode::SUCCESS)),
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
            Command::Run { api, args } => finish("aod", async { run::run(&api.connect()?, *args, output).await }.await),
            Command::Logs { api, args } => finish("aod", async { run::logs(&api.connect()?, args, output).await }.await),
            Command::Agents(client) => client.call(output).await,
            Command::Envs(client) => client.call(output).await,
            Command::Sessions(client) => client.call(output).await,
            Command::Usage { api, args } => {
                finish("aod", async { args.print(&api.connect()?, output).await.map(|()| ExitCode::SUCCESS) }.await)
            }
            Command::Credentials(client) => client.call(output).await,
            Command::Keys(client) => client.call(output).await,
        }
    }
}

fn finish<E: std::fmt::Display>(name: &str, result: Result<ExitCode, E>) -> ExitCode {
    result.unwrap_or_else(|error| {
        note!("{name}: {error}");
        ExitCode::FAILURE
    })
}

impl ApiArgs {
    fn connect(&self) -> Result<Api, ApiFailure> {
        Api::from_env(&self.api_url)
    }
}

/// A command that calls the API and prints the answer.
trait Call: Subcommand {
    async fn call(self, api: &Api, output: Output) -> Result<(), ApiFailure>;
}

impl<C: Call> Client<C> {
    async fn call(self, output: Output) -> ExitCode {
        finish("aod", async { self.command.call(&self.api.connect()?, output).await.map(|()| ExitCode::SUCCESS) }.await)
    }
}

/// Prints one page of a list, and on standard error how to get the next one.
async fn list(api: &Api, path: &str, page: &Page, output: Output, table: Table) -> Result<(), ApiFailure> {
    let (rows, next) = api.page(path, page).await?;
    output.list(&rows, table);
    if let Some(cursor) = next {
        note!("There are more: repeat the command with --cursor {cursor}");
    }
    Ok(())
}

const VERSIONS: Table = Table(&["version", "name", "created_at"]);

impl Call for Agents {
    async fn call(self, api: &Api, output: Output) -> Result<(), ApiFailure> {
        const AGENTS: Table = Table(&["id", "name", "runtime", "model", "created_at"]);
        match self {
            Self::List(page) => list(api, "/agents", &page, output, AGENTS).await?,
            Self::Get { id } => output.one(&api.get(&format!("/agents/{id}")).await?),
            Self::Create { name, model, runtime, system, environment, permission, permissions: file, budget } => {
                let permissions = permissions(&permission, file.as_deref())?;
                let body = json!({
                    "name": name, "model": model, "runtime": runtime, "system": system, "environment_id": environment,
                    "permissions": permissions, "budget": budget.body(),
                });
                output.one(&api.post("/agents", &body).await?);
            }
            Self::Budget { id, limits } => output.one(&change_budget(api, &format!("/agents/{id}/budget"), &limits).await?),
            Self::Versions { id, page } => list(api, &format!("/agents/{id}/versions"), &page, output, VERSIONS).await?,
            Self::Archive { id } => output.one(&api.post(&format!("/agents/{id}/archive"), &Value::Null).await?),
        }
        Ok(())
    }
}

/// Changes a budget where limits are given, and returns it.
async fn change_budget(api: &Api, path: &str, limits: &LimitArgs) -> Result<Value, ApiFailure> {
    if limits.is_empty() { api.get(path).await } else { api.patch(path, &limits.body()).await }
}

impl Call for Envs {
    async fn call(self, api: &Api, output: Output) -> Result<(), ApiFailure> {
        const ENVS: Table = Table(&["id", "name", "version", "created_at"]);
        match self {
            Self::List(page) => list(api, "/environments", &page, output, ENVS).await?,
            Self::Get { id } => output.one(&api.get(&format!("/environments/{id}")).await?),
            Self::Create { name, setup_script, env_file } => {
                let script = setup_script.map(|path| read_file(&path)).transpose()?;
                let variables = env_file.map(|path| read_variables(&path)).transpose()?.unwrap_or_default();
                output.one(&api.post("/environments", &json!({ "name": name, "setup_script": script, "env_vars": variables })).await?);
            }
            Self::Versions { id, page } => list(api, &format!("/environments/{id}/versions"), &page, output, VERSIONS).await?,
            Self::Archive { id } => output.one(&api.post(&format!("/environments/{id}/archive"), &Value::Null).await?),
            Self::Delete { id } => output.one(&api.delete(&format!("/environments/{id}/delete")).await?),
        }
        Ok(())
    }
}

impl Call for Sessions {
    async fn call(self, api: &Api, output: Output) -> Result<(), ApiFailure> {
        const SESSIONS: Table = Table(&["id", "status", "runtime", "exit_code", "turn_count", "created_at"]);
        const INPUTS: Table = Table(&["id", "kind", "status", "turn", "created_at", "text"]);
        const REQUESTS: Table = Table(&["id", "turn", "tool", "status", "created_at", "input"]);
        const TURNS: Table = Table(&["turn_number", "status", "exit_code", "started_at", "ended_at", "prompt"]);
        match self {
            Self::List(page) => list(api, "/sessions", &page, output, SESSIONS).await?,
            Self::Get { id } => output.one(&api.get(&format!("/sessions/{id}")).await?),
            Self::Create { agent, timeout, budget, prompt } => {
                let body = json!({ "agent_id": agent, "prompt": prompt.read()?, "timeout": timeout, "budget": budget.body() });
                output.one(&api.post("/sessions", &body).await?);
            }
            Self::Budget { id, limits } => output.one(&change_budget(api, &format!("/sessions/{id}/budget"), &limits).await?),
            Self::Turns { id, page } => list(api, &format!("/sessions/{id}/turns"), &page, output, TURNS).await?,
            Self::Prompt { id, when_busy, prompt } => {
                let body = json!({ "prompt": prompt.read()?, "when_busy": when_busy.map(WhenBusy::name) });
                output.one(&api.post(&format!("/sessions/{id}/prompt"), &body).await?);
            }
            Self::Interrupt { id } => output.one(&api.post(&format!("/sessions/{id}/interrupt"), &Value::Null).await?),
            Self::Inputs { id, page } => list(api, &format!("/sessions/{id}/inputs"), &page, output, INPUTS).await?,
            Self::Edit { id, input, prompt } => {
                output.one(&api.patch(&format!("/sessions/{id}/inputs/{input}"), &json!({ "text": prompt.read()? })).await?);
            }
            Self::Withdraw { id, input } => output.one(&api.delete(&format!("/sessions/{id}/inputs/{input}")).await?),
            Self::Requests { id, page } => list(api, &format!("/sessions/{id}/requests"), &page, output, REQUESTS).await?,
            Self::Approve { id, request, for_session } => {
                let decision = if for_session { "allow_for_session" } else { "allow" };
                output.one(&decide(api, &id, request, decision, None).await?);
            }
            Self::Deny { id, request, message } => output.one(&decide(api, &id, request, "deny", message.as_deref()).await?),
            Self::Terminate { id } => output.one(&api.post(&format!("/sessions/{id}/terminate"), &Value::Null).await?),
            Self::Delete { id } => output.one(&api.delete(&format!("/sessions/{id}/delete")).await?),
        }
        Ok(())
    }
}

/// Answers a permission request: the one that is named, or the only one that is open.
pub async fn decide(api: &Api, session: &str, request: Option<u64>, decision: &str, message: Option<&str>) -> Result<Value, ApiFailure> {
    let request = match request {
        Some(request) => request,
        None => only_request(api, session).await?,
    };
    let body = json!({ "decision": decision, "message": message });
    api.post(&format!("/sessions/{session}/requests/{request}"), &body).await
}

async fn only_request(api: &Api, session: &str) -> Result<u64, ApiFailure> {
    let answer = api.get(&format!("/sessions/{session}/requests?status=open")).await?;
    let requests = answer.get("data").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    // Those that were answered are still open until the agent has read it.
    let open: Vec<&Value> = requests.iter().filter(|request| request.get("answer").is_none_or(Value::is_null)).collect();
    match open.as_slice() {
        [] => Err(ApiFailure::Local("no permission request is open".to_owned())),
        [request] => Ok(request.get("id").and_then(Value::as_u64).unwrap_or_default()),
        several => {
            let ids: Vec<String> = several.iter().map(|request| format!("{} ({})", request["id"], request["tool"])).collect();
            Err(ApiFailure::Local(format!("several permission requests are open, name one: {}", ids.join(", "))))
        }
    }
}

impl Call for Credentials {
    async fn call(self, api: &Api, output: Output) -> Result<(), ApiFailure> {
        const CREDENTIALS: Table = Table(&["kind", "hint", "updated_at"]);
        match self {
            // There is one of each kind at most.
            Self::List => output.list(&api.page("/credentials", &Page::default()).await?.0, CREDENTIALS),
            Self::Set { kind } => {
                let value = secret_input::read().map_err(ApiFailure::Local)?;
                output.one(&api.put(&format!("/credentials/{}", kind.name()), &json!({ "value": value.expose_secret() })).await?);
            }
            Self::Delete { kind } => output.one(&api.delete(&format!("/credentials/{}", kind.name())).await?),
        }
        Ok(())
    }
}

impl Call for Keys {
    async fn call(self, api: &Api, output: Output) -> Result<(), ApiFailure> {
        const KEYS: Table = Table(&["id", "name", "prefix", "is_active", "last_used_at"]);
        match self {
            Self::List(page) => list(api, "/api-keys", &page, output, KEYS).await?,
            Self::Create { name } => output.one(&api.post("/api-keys", &json!({ "name": name })).await?),
            Self::Revoke { id } => output.one(&api.delete(&format!("/api-keys/{id}")).await?),
        }
        Ok(())
    }
}

/// Reads a whole file as text.
pub fn read_file(path: &Path) -> Result<String, ApiFailure> {
    std::fs::read_to_string(path).map_err(|error| ApiFailure::Local(format!("cannot read {}: {error}", path.display())))
}

/// Reads a file of `NAME=VALUE` lines. A line without `=` is an error, for it would be lost in silence.
fn read_variables(path: &Path) -> Result<Map<String, Value>, ApiFailure> {
    let text = read_file(path)?;
    let lines = text.lines().zip(1..).filter(|(line, _)| !line.trim().is_empty() && !line.trim_start().starts_with('#'));
    let variable = |(line, number): (&str, u32)| {
        let wrong = || ApiFailure::Local(format!("{}, line {number}: not NAME=VALUE", path.display()));
        line.split_once('=').map(|(name, value)| (name.trim().to_owned(), value.into())).ok_or_else(wrong)
    };
    lines.map(variable).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Visits every command with what leads to it.
    fn visit(command: &clap::Command, path: &str, check: &mut impl FnMut(&clap::Command, &str)) {
        check(command, path);
        command.get_subcommands().for_each(|sub| visit(sub, &format!("{path} {}", sub.get_name()), check));
    }

    #[test]
    fn every_command_argument_and_flag_has_a_help_text() {
        Cli::command().debug_assert();
        let mut missing = Vec::new();
        visit(&Cli::command(), "aod", &mut |command, path| {
            if command.get_about().is_none() {
                missing.push(path.to_owned());
            }
            missing.extend(command.get_arguments().filter(|arg| arg.get_help().is_none()).map(|arg| format!("{path}: {}", arg.get_id())));
        });
        assert!(missing.is_empty(), "{missing:?}");
    }

    #[test]
    fn only_commands_that_call_the_api_take_its_url() {
        visit(&Cli::command(), "aod", &mut |command, path| {
            let takes_url = command.get_arguments().any(|arg| arg.get_id() == "api_url");
            let is_client = ["run", "logs", "agents", "envs", "sessions", "usage", "credentials", "keys", "health"];
            let depth = path.split(' ').count();
            assert!(depth != 2 || takes_url == is_client.contains(&command.get_name()), "{path}");
        });
        Cli::try_parse_from(["aod", "sessions", "list", "--api-url", "http://x"]).unwrap();
        Cli::try_parse_from(["aod", "dev", "--api-url", "http://x"]).unwrap_err();
    }
}
