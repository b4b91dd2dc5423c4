//! `aod run` and `aod logs`: run a session and print its events for a person.

mod typed;
mod watch;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::Args;
use serde_json::{Map, Value, json};

use crate::{
    cli::sessions::WhenBusy,
    client::{
        Api, ApiFailure, Page,
        stream::{Next, Source, follow},
    },
    output::{Output, print, write},
    prompt::PromptArgs,
};

/// Examples of `aod run`.
pub const RUN_EXAMPLES: &str = "Examples:
  aod run 'write a haiku'
  aod run --session SESSION 'and another one'
  aod run --runtime codex --repo https://github.com/owner/repo 'fix the failing test'
  aod run --secret-env NPM_TOKEN --env CI=true --prompt-file task.md
  git diff | aod run --runtime claude -";

#[derive(Debug, Args)]
pub struct RunArgs {
    /// Runtime: claude, codex, gemini, opencode, or shell where the deployment allows it
    #[arg(long, default_value = "claude")]
    runtime: String,
    /// Model; the default depends on the runtime
    #[arg(long)]
    model: Option<String>,
    /// Id of an existing agent, instead of a new one for the runtime and model
    #[arg(long, value_name = "ID", conflicts_with_all = ["runtime", "model"])]
    agent: Option<String>,
    /// Id of a completed session: run the prompt as its next turn
    #[arg(long, value_name = "ID", conflicts_with_all = ["runtime", "model", "agent", "environment", "env", "secret_env", "repo", "metadata"])]
    session: Option<String>,
    /// With --session: what to do while a turn of it runs
    #[arg(long, value_enum, requires = "session")]
    when_busy: Option<WhenBusy>,
    /// Id of the environment
    #[arg(long, value_name = "ID")]
    environment: Option<String>,
    /// Set an environment variable of the agent; repeatable
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// Pass on a variable of this process, or a file's content, as a secret; repeatable
    #[arg(long, value_name = "NAME|NAME=@FILE", value_parser = secret_source)]
    secret_env: Vec<SecretSource>,
    /// Clone a GitHub repository, by default to /workspace/<repo>; repeatable
    #[arg(long, value_name = "URL[=PATH]")]
    repo: Vec<String>,
    /// Attach metadata to the session; repeatable
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// Seconds for the turn, 10 to 3600
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u32>,
    /// Print the session's id and exit without following it
    #[arg(long)]
    detach: bool,
    /// Print output as the agent writes it, instead of a readable form
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    prompt: PromptArgs,
}

#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Id of the session
    session: String,
    /// Continue until the session's turn ends
    #[arg(short, long)]
    follow: bool,
    /// Print only events after this event id
    #[arg(long, default_value_t = 0, value_name = "ID")]
    since: u64,
    /// Print output as the agent writes it, instead of a readable form
    #[arg(long)]
    raw: bool,
}

/// Where a secret variable comes from: values are never arguments, which other users of the machine
/// can read.
#[derive(Clone, Debug)]
struct SecretSource {
    name: String,
    file: Option<PathBuf>,
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

fn secret_source(text: &str) -> Result<SecretSource, String> {
    match text.split_once('=') {
        None if !text.is_empty() => Ok(SecretSource { name: text.to_owned(), file: None }),
        Some((name, file)) if !name.is_empty() && file.len() > 1 && file.starts_with('@') => {
            Ok(SecretSource { name: name.to_owned(), file: Some(file[1..].into()) })
        }
        _ => Err(
            "expected NAME or NAME=@FILE; a value would be visible to other users of this machine"
                .to_owned(),
        ),
    }
}

impl SecretSource {
    fn read(&self) -> Result<String, ApiFailure> {
        match &self.file {
            Some(path) => {
                Ok(crate::cli::files::read_file(path)?.trim_end_matches(['\r', '\n']).to_owned())
            }
            None => {
                let value = std::env::var_os(&self.name).and_then(|value| value.into_string().ok());
                value.ok_or_else(|| {
                    ApiFailure::Local(format!(
                        "--secret-env {0}: the variable {0} is not set",
                        self.name
                    ))
                })
            }
        }
    }
}

/// Returns a repository as the API takes it. A URL has no `=`, so what follows one is the mount
/// path.
fn resource(text: &str) -> Value {
    let (url, mount_path) =
        text.split_once('=').map_or((text, None), |(url, path)| (url, Some(path)));
    let mut resource = json!({ "type": "github_repository", "url": url });
    if let (Some(object), Some(path)) = (resource.as_object_mut(), mount_path) {
        object.insert("mount_path".to_owned(), path.into());
    }
    resource
}

impl RunArgs {
    /// Returns the body of `POST /sessions`. The API has one kind of session variables, so plain
    /// ones are sent as secrets too.
    fn session_body(&self, agent: &str, prompt: &str) -> Result<Value, ApiFailure> {
        let mut variables: Map<String, Value> =
            self.env.iter().map(|(name, value)| (name.clone(), value.clone().into())).collect();
        for source in &self.secret_env {
            variables.insert(source.name.clone(), source.read()?.into());
        }
        let metadata: Map<String, Value> = self
            .metadata
            .iter()
            .map(|(name, value)| (name.clone(), value.clone().into()))
            .collect();
        Ok(json!({
            "agent_id": agent,
            "prompt": prompt,
            "timeout": self.timeout,
            "environment_id": self.environment,
            "resources": self.repo.iter().map(|repo| resource(repo)).collect::<Vec<_>>(),
            "secret_env_vars": variables,
            "metadata": metadata,
        }))
    }
}

pub async fn run(api: &Api, mut args: RunArgs, output: Output) -> Result<ExitCode, ApiFailure> {
    let prompt = std::mem::take(&mut args.prompt).read()?;
    let (session, turn) = match &args.session {
        Some(session) => {
            let body = json!({ "prompt": prompt, "timeout": args.timeout, "when_busy": args.when_busy.map(WhenBusy::name) });
            (session.clone(), api.post(&format!("/sessions/{session}/prompt"), &body).await?)
        }
        None => {
            let agent = match &args.agent {
                Some(agent) => agent.clone(),
                None => find_or_create_agent(api, &args).await?,
            };
            let created = api.post("/sessions", &args.session_body(&agent, &prompt)?).await?;
            (text(&created, "id").to_owned(), created)
        }
    };
    if args.detach {
        match output {
            Output::Json => output.one(&turn),
            Output::Text => print(&session),
        }
        return Ok(ExitCode::SUCCESS);
    }
    note!("session {session}");
    let current = turn.get("current_turn").and_then(Value::as_u64).unwrap_or(1);
    // A message that waits begins a turn of its own; one that joins the running turn is part of it.
    let waits = turn.pointer("/input/when_busy").and_then(Value::as_str) == Some("queue");
    let turn = if waits { queued_turn(api, &session, &turn).await? } else { current };
    if shows_typed_events(api, &session, output, args.raw).await? {
        let watched = watch::watch(api, &session, 0, Some(turn), OnInterrupt::Interrupt).await?;
        if watched.agent_seen {
            return Ok(watched.code);
        }
        // A CLI that could not start has said why in its output.
    }
    follow_output(
        api,
        &session,
        0,
        None,
        Printer::new(output, args.raw, Some(turn)),
        OnInterrupt::Interrupt,
    )
    .await
}

pub async fn logs(api: &Api, args: LogsArgs, output: Output) -> Result<ExitCode, ApiFailure> {
    let idle = (!args.follow).then_some(Duration::from_millis(700));
    if shows_typed_events(api, &args.session, output, args.raw).await? {
        let watched = match args.follow {
            true => watch::watch(api, &args.session, args.since, None, OnInterrupt::Detach).await?,
            false => watch::list(api, &args.session, args.since).await?,
        };
        // A session of an earlier release has no typed events.
        if watched.agent_seen || args.since > 0 {
            return Ok(watched.code);
        }
    }
    follow_output(
        api,
        &args.session,
        args.since,
        idle,
        Printer::new(output, args.raw, None),
        OnInterrupt::Detach,
    )
    .await
}

/// Whether a session's typed events are shown instead of its output: a shell has output alone.
async fn shows_typed_events(
    api: &Api,
    session: &str,
    output: Output,
    raw: bool,
) -> Result<bool, ApiFailure> {
    if raw || output == Output::Json {
        return Ok(false);
    }
    Ok(text(&api.get(&format!("/sessions/{session}")).await?, "runtime") != "shell")
}

/// Waits until a queued message begins a turn, and returns its number.
async fn queued_turn(api: &Api, session: &str, accepted: &Value) -> Result<u64, ApiFailure> {
    let id = accepted.pointer("/input/id").and_then(Value::as_str).unwrap_or_default();
    note!(
        "queued; waiting for the running turn to end. Withdraw it: aod sessions withdraw {session} {id}"
    );
    loop {
        let answer = api.get(&format!("/sessions/{session}/inputs")).await?;
        let inputs =
            answer.get("data").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let Some(input) = inputs.iter().find(|input| text(input, "id") == id) else {
            return Err(ApiFailure::Local("the message is not in the session's queue".to_owned()));
        };
        if let Some(turn) = input.get("turn").and_then(Value::as_u64) {
            return Ok(turn);
        }
        if text(input, "status") != "queued" {
            return Err(ApiFailure::Local(format!(
                "the message was {}: {}",
                text(input, "status"),
                text(input, "reason")
            )));
        }
        tokio::time::sleep(QUEUE_POLL).await;
    }
}

const QUEUE_POLL: Duration = Duration::from_millis(500);

/// What Ctrl-C does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OnInterrupt {
    /// Interrupts the turn; the second one stops following.
    Interrupt,
    /// Stops following.
    Detach,
}

/// Returns the agent of an earlier run with the same runtime and model, or creates one.
async fn find_or_create_agent(api: &Api, args: &RunArgs) -> Result<String, ApiFailure> {
    let model = args.model.clone().unwrap_or_else(|| default_model(&args.runtime).to_owned());
    let name = format!("aod run: {} {model}", args.runtime);
    let mut page = Page::default();
    loop {
        let (agents, next) = api.page("/agents", &page).await?;
        if let Some(agent) = agents
            .iter()
            .find(|agent| text(agent, "name") == name && text(agent, "runtime") == args.runtime)
        {
            return Ok(text(agent, "id").to_owned());
        }
        if next.is_none() {
            break;
        }
        page.cursor = next;
    }
    let agent = api
        .post("/agents", &json!({ "name": name, "model": model, "runtime": args.runtime }))
        .await?;
    Ok(text(&agent, "id").to_owned())
}

fn default_model(runtime: &str) -> &'static str {
    match runtime {
        "codex" => "openai/gpt-5-codex",
        "gemini" => "google/gemini-2.5-pro",
        "shell" => "none",
        _ => "anthropic/claude-sonnet-4-5",
    }
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value.get(name).and_then(Value::as_str).unwrap_or_default()
}

async fn follow_output(
    api: &Api,
    session: &str,
    since: u64,
    idle: Option<Duration>,
    mut printer: Printer,
    mut on_interrupt: OnInterrupt,
) -> Result<ExitCode, ApiFailure> {
    let (mut code, mut overtaken) = (ExitCode::SUCCESS, None);
    let only_turn = printer.only_turn;
    {
        let following = follow(api, session, Source::Output, since, idle, |event| {
            printer.print(event);
            match text(event, "type") {
                // A queued message began the next turn at once: the stream shows the end of the
                // newest turn alone.
                "turn_start"
                    if only_turn.is_some_and(|turn| {
                        event.get("turn").and_then(Value::as_u64) > Some(turn)
                    }) =>
                {
                    overtaken = only_turn;
                }
                "exit" => code = exit_code(event.get("code")),
                "error" | "terminated" => code = ExitCode::FAILURE,
                _ => return Next::Continue,
            }
            Next::Stop
        });
        let mut following = std::pin::pin!(following);
        loop {
            tokio::select! {
                followed = &mut following => {
                    followed?;
                    break;
                }
                _ = tokio::signal::ctrl_c() => {
                    if !interrupt_or_detach(api, session, &mut on_interrupt).await {
                        return Ok(ExitCode::from(130));
                    }
                }
            }
        }
    }
    match overtaken {
        Some(turn) => code_of(api, session, turn).await,
        None => Ok(code),
    }
}

/// A turn without an exit code has failed.
fn exit_code(code: Option<&Value>) -> ExitCode {
    ExitCode::from(
        code.and_then(Value::as_u64).and_then(|code| u8::try_from(code).ok()).unwrap_or(1),
    )
}

/// Does what Ctrl-C does. Returns whether to keep following.
async fn interrupt_or_detach(api: &Api, session: &str, on_interrupt: &mut OnInterrupt) -> bool {
    if std::mem::replace(on_interrupt, OnInterrupt::Detach) == OnInterrupt::Interrupt {
        match api.post(&format!("/sessions/{session}/interrupt"), &Value::Null).await {
            Ok(_) => {
                note!("\nInterrupting the turn; press Ctrl-C again to stop following");
                return true;
            }
            Err(error) => note!("\ncannot interrupt the turn: {error}"),
        }
    }
    note!(
        "\nStopped following; the session continues. Follow it again: aod logs -f {session}\nStop it: aod sessions terminate {session}"
    );
    false
}

/// Returns the exit code of a turn that ended.
async fn code_of(api: &Api, session: &str, turn: u64) -> Result<ExitCode, ApiFailure> {
    let mut page = Page::default();
    loop {
        let (turns, next) = api.page(&format!("/sessions/{session}/turns"), &page).await?;
        if let Some(turn) =
            turns.iter().find(|each| each.get("turn_number").and_then(Value::as_u64) == Some(turn))
        {
            return Ok(exit_code(turn.get("exit_code")));
        }
        if next.is_none() {
            return Ok(ExitCode::FAILURE);
        }
        page.cursor = next;
    }
}

/// Prints events for a person: output to standard output, everything else to standard error.
struct Printer {
    output: Output,
    raw: bool,
    only_turn: Option<u64>,
    /// Start of a line of standard output that has not ended yet.
    partial: String,
    /// Runtime of the session, from the `start` event.
    runtime: String,
}

/// Exit code of a shell whose command does not exist.
const NOT_FOUND: i64 = 127;

impl Printer {
    fn new(output: Output, raw: bool, only_turn: Option<u64>) -> Self {
        Self { output, raw, only_turn, partial: String::new(), runtime: String::new() }
    }

    /// Says how to install the runtime's CLI where it is missing.
    fn explain_missing(&self) {
        if !matches!(self.runtime.as_str(), "" | "shell") {
            let runtime = &self.runtime;
            note!(
                "{runtime} is not installed in the sandbox. With `aod dev`: make setup AGENTS={runtime}, then start it again. Elsewhere: install it on the sandbox's PATH."
            );
        }
    }

    fn print(&mut self, event: &Value) {
        if self.output == Output::Json {
            print(&event.to_string());
            return;
        }
        let other_turn = |turn: u64| self.only_turn.is_some_and(|only| only != turn);
        if event.get("turn").and_then(Value::as_u64).is_some_and(other_turn) {
            return;
        }
        match text(event, "type") {
            "start" => text(event, "runtime").clone_into(&mut self.runtime),
            "stage" => self.stage(event),
            "output" if text(event, "stream") == "stderr" => {
                use std::io::Write as _;
                let _ = std::io::stderr().write_all(text(event, "data").as_bytes());
            }
            "output" if self.raw => write(text(event, "data").as_bytes()),
            "output" => {
                self.partial.push_str(text(event, "data"));
                while let Some(end) = self.partial.find('\n') {
                    let line: String = self.partial.drain(..=end).collect();
                    show_line(line.trim_end_matches('\n'));
                }
            }
            "exit" => {
                if !self.partial.is_empty() {
                    show_line(&std::mem::take(&mut self.partial));
                }
                match event.get("code").and_then(Value::as_i64) {
                    Some(0) | None => {}
                    Some(code) => {
                        note!("exit code {code}");
                        if code == NOT_FOUND {
                            self.explain_missing();
                        }
                    }
                }
            }
            "error" | "terminated" | "stale" => {
                note!("{}", text(event, "message"));
                if text(event, "message").contains("is not installed") {
                    self.explain_missing();
                }
            }
            _ => {}
        }
    }

    /// Stages belong to the first turn; later ones have none of their own but the start.
    fn stage(&self, event: &Value) {
        if self.only_turn.is_some_and(|turn| turn > 1) {
            return;
        }
        if let Some(line) = typed::stage(event) {
            note!("{line}");
        }
    }
}

/// A line of the agent's: the CLIs' JSON made readable, anything else as it is.
fn show_line(line: &str) {
    let Some(record) = serde_json::from_str::<Value>(line).ok().filter(Value::is_object) else {
        return print(line);
    };
    let blocks =
        record.pointer("/message/content").and_then(Value::as_array).cloned().unwrap_or_default();
    match text(&record, "type") {
        "assistant" => {
            for block in &blocks {
                match text(block, "type") {
                    "text" => print(text(block, "text")),
                    "tool_use" => print(&format!(
                        "→ {} {}",
                        text(block, "name"),
                        block.get("input").unwrap_or(&Value::Null)
                    )),
                    _ => {}
                }
            }
        }
        "user" => {
            for block in blocks.iter().filter(|block| text(block, "type") == "tool_result") {
                let result =
                    block.get("content").and_then(Value::as_str).map(str::to_owned).unwrap_or_else(
                        || block.get("content").map(Value::to_string).unwrap_or_default(),
                    );
                result.lines().for_each(|line| print(&format!("← {line}")));
            }
        }
        "result" if record.get("is_error").and_then(Value::as_bool) == Some(true) => {
            print(&format!("✗ {}", text(&record, "result")))
        }
        "system" | "result" | "rate_limit_event" | "stream_event" => {}
        _ => print(line),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_never_an_argument() {
        assert!(secret_source("TOKEN").is_ok() && secret_source("TOKEN=@/run/token").is_ok());
        for text in ["", "=", "TOKEN=", "TOKEN=hunter2", "TOKEN=@", "=@file"] {
            assert!(secret_source(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_repository_may_name_its_mount_path() {
        let url = "https://github.com/owner/repo";
        assert_eq!(resource(url), json!({ "type": "github_repository", "url": url }));
        let mounted = json!({ "type": "github_repository", "url": url, "mount_path": "/src" });
        assert_eq!(resource(&format!("{url}=/src")), mounted);
    }
}
