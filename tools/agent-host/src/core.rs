//! What the host does next: inputs, the CLI's output, exits and time go in, [`Action`]s come out.
//! No I/O.

mod calls;
mod clock;
mod inputs;
mod output;
#[cfg(test)]
mod tests;
mod work;

use std::collections::{HashMap, HashSet};

use contract::host::{
    Capabilities, DecisionSettled, HostStarted, Input, InputSettled, Message, Spec, Step,
    StepEnded, TurnEnded, WhenBusy, decision_settled::How, event, input, input_settled::Outcome,
    record, turn_ended::Reason,
};

use crate::{
    adapters::{Adapter, Launch, Stdio},
    http,
    state::State,
};

/// Of a request's texts: a snapshot with many open requests fits into a frame.
const REQUEST_BYTES_MAX: usize = 64 << 10;
const REQUESTS_MAX: usize = 16;
/// Calls of custom tools in a turn. Each is kept in the log, and is not part of the output, whose
/// size is limited.
const CUSTOM_CALLS_MAX: usize = 2_000;
/// A prompt that the API takes fits; and a snapshot with a full queue fits into a frame.
const MESSAGE_BYTES_MAX: usize = 3 << 20;
/// How long a program that was killed may be waited for.
const KILLED_MS: u64 = 10_000;

#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    Record(record::Kind),
    Start(Launch),
    Send(Vec<u8>),
    Http(http::Request),
    CloseInput,
    /// SIGTERM to all that belongs to turns, or to the running step.
    Terminate,
    /// SIGKILL to the same, until nothing is left.
    Kill,
    /// What a finished step or program left running is not ended later.
    SpareLeftovers,
    Persisted(u64),
    /// A call of a custom tool has its result.
    CustomToolResult {
        call: String,
        text: String,
        is_error: bool,
    },
    /// Whether the sandbox has to stay awake.
    Awake(bool),
    Exit,
}

/// What the agent waits for.
struct Open {
    id: u64,
    /// The adapter's name for it, or the custom tool's call.
    key: String,
    is_custom_tool: bool,
}

struct Turn {
    message: Message,
    /// The CLI has the message.
    delivered: bool,
    /// Why the host ends the turn, where it does.
    ending: Option<Reason>,
    deadline: Option<u64>,
}

struct RunningStep {
    input_id: String,
    step: Step,
    since: u64,
    deadline: Option<u64>,
    ending: Option<Reason>,
}

const NOT_JOINED: &str = "no running turn takes a message";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Program {
    None,
    Starting,
    /// The CLI runs; `ready`: it takes messages.
    Cli {
        ready: bool,
    },
    Closing,
    Step,
}

pub struct Core {
    spec: Spec,
    adapter: Box<dyn Adapter>,
    capabilities: Capabilities,
    state: State,
    program: Program,
    stdio: Stdio,
    turn: Option<Turn>,
    step: Option<RunningStep>,
    /// Messages whose text is in the state's queue; the session's rules.
    allowed: Vec<String>,
    asks: Vec<Open>,
    /// Calls of this turn that were allowed: some CLIs ask more than once about one.
    permitted: Vec<u64>,
    waiting_since: Option<u64>,
    calls: HashMap<String, u64>,
    /// Calls of custom tools, which the CLI reports as calls of an MCP server.
    hidden: HashSet<String>,
    /// How many custom tools were called in this turn.
    custom_calls: usize,
    /// MCP servers whose failure was reported.
    failed_mcp: Vec<String>,
    /// What occurred between turns and is of the next one, which reports it.
    early: Vec<event::Kind>,
    line: Vec<u8>,
    line_is_too_long: bool,
    /// When the program's processes are killed, and when a killed one is given up.
    kill_at: Option<u64>,
    give_up_at: Option<u64>,
    idle_at: Option<u64>,
    /// When a CLI that takes no message yet is given up.
    ready_by: Option<u64>,
    /// The input for which the CLI was started, until it takes a message or is given one.
    start_input: Option<String>,
    quiet_since: u64,
    stopping: bool,
    exited: bool,
    awake: bool,
    actions: Vec<Action>,
}

impl Core {
    /// Takes a journal over. `lost` says what ended what a former host had open.
    pub fn new(
        spec: Spec,
        adapter: Box<dyn Adapter>,
        capabilities: Capabilities,
        state: State,
        lost: Reason,
        now: u64,
    ) -> Self {
        let mut core = Self {
            spec,
            adapter,
            capabilities,
            state,
            program: Program::None,
            stdio: Stdio::Output,
            turn: None,
            step: None,
            allowed: Vec::new(),
            asks: Vec::new(),
            permitted: Vec::new(),
            waiting_since: None,
            calls: HashMap::new(),
            hidden: HashSet::new(),
            custom_calls: 0,
            failed_mcp: Vec::new(),
            early: Vec::new(),
            line: Vec::new(),
            line_is_too_long: false,
            kill_at: None,
            give_up_at: None,
            idle_at: None,
            ready_by: None,
            start_input: None,
            quiet_since: now,
            stopping: false,
            exited: false,
            awake: false,
            actions: Vec::new(),
        };
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let generation = core.state.generation + 1;
        core.record(record::Kind::HostStarted(HostStarted {
            generation,
            version,
            capabilities: Some(capabilities),
        }));
        for request in core.state.requests.clone() {
            let settled =
                DecisionSettled { id: request.id, how: How::Void.into(), input_id: String::new() };
            core.record(record::Kind::DecisionSettled(settled));
        }
        let message = match lost {
            Reason::SandboxLost => "The sandbox restarted while the agent was running",
            _ => "The agent host was killed inside the sandbox",
        };
        if let Some(turn) = core.state.turn.clone() {
            let ended = TurnEnded {
                turn: turn.turn,
                reason: lost.into(),
                message: message.to_owned(),
                ..TurnEnded::default()
            };
            core.record(record::Kind::TurnEnded(ended));
        }
        if let Some(step) = core.state.step.clone() {
            let ended = StepEnded {
                input_id: step.input_id,
                name: step.name,
                reason: lost.into(),
                ..StepEnded::default()
            };
            core.record(record::Kind::StepEnded(ended));
        }
        // Accepted a moment before the end of the host that could have passed it on.
        let joins = |input: &Input| matches!(&input.kind, Some(input::Kind::Message(message)) if message.when_busy() == WhenBusy::Join);
        for message in core.state.queued.clone().into_iter().filter(joins) {
            core.settle(&message.id, Outcome::Refused, NOT_JOINED);
        }
        core.advance(now);
        core
    }

    pub fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    #[cfg(test)]
    pub fn state(&self) -> &State {
        &self.state
    }

    pub const fn is_working(&self) -> bool {
        self.turn.is_some() || self.step.is_some()
    }

    fn record(&mut self, kind: record::Kind) {
        self.state.apply(&contract::host::Record { at_us: 0, kind: Some(kind.clone()) });
        self.actions.push(Action::Record(kind));
    }

    fn settle(&mut self, id: &str, outcome: Outcome, message: &str) {
        let settled = InputSettled {
            id: id.to_owned(),
            outcome: outcome.into(),
            message: message.to_owned(),
        };
        self.record(record::Kind::InputSettled(settled));
    }

    fn next_event_id(&self) -> u64 {
        self.state.last_event_id + 1
    }
}
