//! The agent CLIs. Each adapter is a pure state machine in one file: lines of the CLI and inputs go
//! in, [`Effect`]s come out. A further runtime is one file and one line in [`ALL`].

mod claude;
mod codex;
mod gemini;
mod json;
mod opencode;
mod shell;

use contract::host::{
    Capabilities, ModelUsage, Spec, ToolResult, ToolUse, capabilities, decision::Verdict, event,
    turn_ended,
};

pub use json::mcp_failed;
pub use shell::script;

use crate::{http, prepare};

/// What a CLI's file declares.
pub struct Runtime {
    pub name: &'static str,
    /// The pinned version that its transcripts are of.
    pub version: &'static str,
    pub protocol: &'static str,
    /// What tools are called in events and in permission rules.
    pub tools: &'static str,
    /// What the CLI's protocol does not tell or do.
    pub gaps: &'static str,
    pub capabilities: Capabilities,
    pub new: fn(&Spec) -> Box<dyn Adapter>,
}

/// What a CLI that keeps a conversation can do at its best; each file says what its own cannot.
const CONVERSES: Capabilities = Capabilities {
    steer: true,
    permission_requests: true,
    deny_with_message: true,
    partial_messages: true,
    usage: capabilities::Usage::PerTurn as i32,
    fork: true,
    interrupt: true,
    stays_alive: true,
};

pub const ALL: [&Runtime; 5] =
    [&claude::RUNTIME, &codex::RUNTIME, &gemini::RUNTIME, &opencode::RUNTIME, &shell::RUNTIME];

/// Adds what a model request used to what its turn used.
fn add_usage(turn: &mut ModelUsage, request: &ModelUsage) {
    turn.input_tokens += request.input_tokens;
    turn.output_tokens += request.output_tokens;
    turn.cache_read_tokens += request.cache_read_tokens;
    turn.cache_write_tokens += request.cache_write_tokens;
    turn.reasoning_tokens += request.reasoning_tokens;
    turn.model.clone_from(&request.model);
    if let Some(cost) = request.cost_micro_usd {
        *turn.cost_micro_usd.get_or_insert_default() += cost;
    }
}

pub fn find(name: &str) -> Option<&'static Runtime> {
    ALL.into_iter().find(|runtime| runtime.name == name)
}

/// docs/runtimes.md.
pub fn document() -> String {
    let mut text = "\
# What each runtime supports

Generated from the adapters of the agent host: `cargo run -p agent-host -- runtimes > docs/runtimes.md`. The tests in `tools/agent-host/tests/it/clis.rs` run each CLI of the pinned version against the scripted model and prove the rows.

"
    .to_owned();
    let names = ALL.map(|runtime| runtime.name).join(" | ");
    text.push_str(&format!("| | {names} |\n|{}\n", " --- |".repeat(ALL.len() + 1)));
    let mut row = |what: &str, cell: &dyn Fn(&'static Runtime) -> &'static str| {
        text.push_str(&format!("| {what} | {} |\n", ALL.map(cell).join(" | ")));
    };
    let yes = |yes: bool| if yes { "yes" } else { "no" };
    row("version", &|runtime| {
        if runtime.version.is_empty() { "any bash" } else { runtime.version }
    });
    row("protocol", &|runtime| runtime.protocol);
    row("the process serves several turns", &|runtime| yes(runtime.capabilities.stays_alive));
    row("a turn can be interrupted", &|runtime| yes(runtime.capabilities.interrupt));
    row("a message can join a running turn", &|runtime| yes(runtime.capabilities.steer));
    row("tools can be asked about", &|runtime| yes(runtime.capabilities.permission_requests));
    row("a denial's reason reaches the model", &|runtime| {
        yes(runtime.capabilities.deny_with_message)
    });
    row("partial messages", &|runtime| yes(runtime.capabilities.partial_messages));
    row("usage", &|runtime| match runtime.capabilities.usage() {
        capabilities::Usage::None => "no",
        capabilities::Usage::PerTurn => "per turn",
        capabilities::Usage::PerRequest => "per model request",
    });
    row("the CLI can fork a conversation (no input of the host does yet)", &|runtime| {
        yes(runtime.capabilities.fork)
    });
    row("names of tools in events and rules", &|runtime| runtime.tools);
    row("known gaps", &|runtime| runtime.gaps);
    text
}

/// How a program's standard streams are connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stdio {
    /// One socket pair is standard input and output, another standard error: neither can be opened
    /// through `/proc`.
    Protocol,
    /// Nothing to read, and a pipe each for output and errors, which programs may open as
    /// `/dev/stdout`.
    Output,
}

/// A program to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    pub argv: Vec<String>,
    /// The last argument: a file with this text, which does not show in lists of processes.
    pub script: Option<String>,
    /// Below the session's variables.
    pub env: Vec<(String, String)>,
    pub stdio: Stdio,
    /// Done as the user before the start.
    pub prepare: Vec<prepare::Action>,
    /// Whether the program and all that it starts are ended with the turn: true for all but set-up
    /// steps.
    pub belongs_to_turns: bool,
}

/// What an adapter wants done.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// The CLI takes a message now.
    Ready,
    Conversation {
        id: String,
        model: String,
    },
    /// A line for the CLI's standard input, without its end.
    Send(String),
    Http(http::Request),
    /// Something the agent did; `parent` is the call id of the subagent's tool use.
    Event {
        parent: Option<String>,
        kind: event::Kind,
    },
    ToolUse {
        parent: Option<String>,
        tool: ToolUse,
    },
    /// `call` is the tool use's `call_id`.
    ToolResult {
        call: String,
        result: ToolResult,
    },
    Ask(Ask),
    /// The process can begin no turn: it is ended, and its exit is the turn's end.
    Unusable,
    /// The CLI no longer waits for an answer.
    Unask {
        key: String,
    },
    TurnEnded {
        reason: turn_ended::Reason,
        message: String,
        usage: Option<ModelUsage>,
    },
}

/// The CLI waits for a decision.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Ask {
    /// The adapter's name for the request.
    pub key: String,
    /// The call id of the tool use.
    pub call: String,
    pub tool: String,
    pub mcp_server: String,
    pub input_json: String,
    pub diff: String,
    pub reason: String,
}

/// The effects of one step.
#[derive(Debug, Default)]
pub struct Out(pub Vec<Effect>);

impl Out {
    pub fn push(&mut self, effect: Effect) {
        self.0.push(effect);
    }

    pub fn event(&mut self, kind: event::Kind) {
        self.0.push(Effect::Event { parent: None, kind });
    }
}

/// How a CLI that is no longer needed ends of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Close {
    EndOfInput,
    Terminate,
}

/// A CLI's protocol. Whatever the CLI prints, no method panics, and no end of a turn is reported
/// that the CLI did not report.
pub trait Adapter {
    /// The program for a message. `conversation` is the one to resume. Forgets what a former
    /// process had open.
    fn launch(&mut self, conversation: Option<&str>, first_message: &str) -> Launch;

    /// The process runs, in that folder.
    fn started(&mut self, cwd: &str, out: &mut Out);

    /// Begins a turn. Called only after [`Effect::Ready`] and while no turn runs.
    fn message(&mut self, text: &str, out: &mut Out);

    /// Adds a message to the running turn. False: the CLI cannot.
    fn steer(&mut self, _text: &str, _out: &mut Out) -> bool {
        false
    }

    /// Ends the running turn politely. False: the CLI cannot, and its processes are ended instead.
    fn interrupt(&mut self, _out: &mut Out) -> bool {
        false
    }

    fn decide(&mut self, _key: &str, _verdict: Verdict, _message: &str, _out: &mut Out) {}

    /// A line of standard output, without its end.
    fn line(&mut self, _line: &[u8], _out: &mut Out) {}

    fn http(&mut self, _reply: &http::Reply, _out: &mut Out) {}

    /// The process is gone: what its exit means for the running turn, where it is an end.
    fn exited(&mut self, _code: i32, _out: &mut Out) {}

    fn close(&self) -> Close {
        Close::EndOfInput
    }
}

#[cfg(test)]
mod tests;
