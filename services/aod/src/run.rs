//! `aod run` and `aod logs`: sessions as a person watches them.

use std::{io::Write as _, process::ExitCode, time::Duration};

use clap::Args;
use serde_json::{Value, json};

use crate::{
    client::{
        Api, ApiFailure,
        stream::{Next, follow},
    },
    output::{Output, print},
};

#[derive(Debug, Args)]
pub struct RunArgs {
    /// claude, codex, gemini, opencode; shell where the deployment allows it
    #[arg(long, default_value = "claude")]
    runtime: String,
    /// The model; by default one that suits the runtime
    #[arg(long)]
    model: Option<String>,
    /// An agent that exists, instead of one made for this
    #[arg(long, conflicts_with_all = ["runtime", "model"])]
    agent: Option<String>,
    /// A completed session to go on with
    #[arg(long, conflicts_with_all = ["runtime", "model", "agent"])]
    session: Option<String>,
    /// Seconds for the turn, 10 to 3600
    #[arg(long)]
    timeout: Option<u32>,
    /// Print what the agent writes as it is, without making it readable
    #[arg(long)]
    raw: bool,
    prompt: String,
}

#[derive(Debug, Args)]
pub struct LogsArgs {
    session: String,
    /// Go on as long as the session does
    #[arg(short, long)]
    follow: bool,
    /// Only events after this id
    #[arg(long, default_value_t = 0)]
    since: u64,
    /// Print what the agent writes as it is, without making it readable
    #[arg(long)]
    raw: bool,
}

pub async fn run(api: &Api, args: RunArgs, output: Output) -> Result<ExitCode, ApiFailure> {
    let (session, turn) = match &args.session {
        Some(session) => {
            let body = json!({ "prompt": args.prompt, "timeout": args.timeout });
            (session.clone(), api.post(&format!("/sessions/{session}/prompt"), &body).await?)
        }
        None => {
            let agent = match &args.agent {
                Some(agent) => agent.clone(),
                None => find_or_create_agent(api, &args).await?,
            };
            let created = api.post("/sessions", &json!({ "agent_id": agent, "prompt": args.prompt, "timeout": args.timeout })).await?;
            (text(&created, "id").to_owned(), created)
        }
    };
    eprintln!("session {session}");
    let turn = turn.get("current_turn").and_then(Value::as_u64).unwrap_or(1);
    watch(api, &session, 0, None, Printer { output, raw: args.raw, only_turn: Some(turn), partial: String::new() }).await
}

pub async fn logs(api: &Api, args: LogsArgs, output: Output) -> Result<ExitCode, ApiFailure> {
    let idle = (!args.follow).then_some(Duration::from_millis(700));
    watch(api, &args.session, args.since, idle, Printer { output, raw: args.raw, only_turn: None, partial: String::new() }).await
}

/// The agent of an earlier run with the same runtime and model, or a new one.
async fn find_or_create_agent(api: &Api, args: &RunArgs) -> Result<String, ApiFailure> {
    let model = args.model.clone().unwrap_or_else(|| default_model(&args.runtime).to_owned());
    let name = format!("aod run: {} {model}", args.runtime);
    let agents = api.list("/agents").await?;
    if let Some(agent) = agents.iter().find(|agent| text(agent, "name") == name && text(agent, "runtime") == args.runtime) {
        return Ok(text(agent, "id").to_owned());
    }
    let agent = api.post("/agents", &json!({ "name": name, "model": model, "runtime": args.runtime })).await?;
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

async fn watch(api: &Api, session: &str, since: u64, idle: Option<Duration>, mut printer: Printer) -> Result<ExitCode, ApiFailure> {
    let mut code = ExitCode::SUCCESS;
    let following = follow(api, session, since, idle, |event| {
        printer.print(event);
        match text(event, "type") {
            "exit" => {
                code = ExitCode::from(event.get("code").and_then(Value::as_u64).and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
            }
            "error" | "terminated" => code = ExitCode::FAILURE,
            _ => return Next::Continue,
        }
        Next::Stop
    });
    tokio::select! {
        followed = following => followed?,
        _ = tokio::signal::ctrl_c() => {
            eprintln!("\nNo longer following; the session goes on. To follow again: aod logs -f {session}\nTo stop it: aod sessions terminate {session}");
            return Ok(ExitCode::from(130));
        }
    }
    Ok(code)
}

/// Prints events for a person: output to standard output, everything else to standard error.
struct Printer {
    output: Output,
    raw: bool,
    only_turn: Option<u64>,
    /// A line of standard output that is not whole yet.
    partial: String,
}

impl Printer {
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
            "stage" => self.stage(event),
            "output" if text(event, "stream") == "stderr" => {
                let _ = write!(std::io::stderr(), "{}", text(event, "data"));
            }
            "output" if self.raw => {
                let _ = write!(std::io::stdout(), "{}", text(event, "data"));
                let _ = std::io::stdout().flush();
            }
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
                    Some(code) => eprintln!("exit code {code}"),
                }
            }
            "error" | "terminated" | "stale" => eprintln!("{}", text(event, "message")),
            _ => {}
        }
    }

    /// Stages belong to the first turn; later ones have none of their own but the start.
    fn stage(&self, event: &Value) {
        if self.only_turn.is_some_and(|turn| turn > 1) {
            return;
        }
        let duration = event.get("duration_ms").and_then(Value::as_u64).map(|ms| format!(" ({ms} ms)")).unwrap_or_default();
        match text(event, "state") {
            "done" => eprintln!("· {}{duration}", text(event, "stage")),
            "failed" => eprintln!("✗ {}{duration}: {}", text(event, "stage"), text(event, "message")),
            _ => {}
        }
    }
}

/// A line of the agent's: the CLIs' JSON made readable, anything else as it is.
fn show_line(line: &str) {
    let Some(record) = serde_json::from_str::<Value>(line).ok().filter(Value::is_object) else { return print(line) };
    let blocks = record.pointer("/message/content").and_then(Value::as_array).cloned().unwrap_or_default();
    match text(&record, "type") {
        "assistant" => {
            for block in &blocks {
                match text(block, "type") {
                    "text" => print(text(block, "text")),
                    "tool_use" => print(&format!("→ {} {}", text(block, "name"), block.get("input").unwrap_or(&Value::Null))),
                    _ => {}
                }
            }
        }
        "user" => {
            for block in blocks.iter().filter(|block| text(block, "type") == "tool_result") {
                let result = block
                    .get("content")
                    .and_then(Value::as_str)
                    .map(str::to_owned)
                    .unwrap_or_else(|| block.get("content").map(Value::to_string).unwrap_or_default());
                result.lines().for_each(|line| print(&format!("← {line}")));
            }
        }
        "result" if record.get("is_error").and_then(Value::as_bool) == Some(true) => print(&format!("✗ {}", text(&record, "result"))),
        "system" | "result" | "rate_limit_event" | "stream_event" => {}
        _ => print(line),
    }
}
