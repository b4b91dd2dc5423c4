//! What the host does next: inputs, the CLI's output, exits and time go in, [`Action`]s come out. No I/O.

use std::collections::{HashMap, HashSet, VecDeque};

use contract::host::{
    Capabilities, CliExited, CliStarted, CustomToolResult, DecisionRequested, DecisionSettled, Evaluation, Event, HostEnded, HostStarted,
    Input, InputAccepted, InputSettled, Message, ModelUsage, Output, Spec, Step, StepEnded, StepStarted, ToolUse, TurnEnded, TurnStarted,
    WhenBusy, decision::Verdict, decision_settled::How, event, host_ended, input, input_settled::Outcome, output::Stream, record,
    turn_ended::Reason,
};
use prost::Message as _;

use crate::{
    adapters::{Adapter, Ask, Close, Effect, Launch, Out, Stdio, mcp_failed, script},
    custom_tools, http, permissions,
    state::State,
};

const LINE_BYTES_MAX: usize = 32 << 20;
const TEXT_BYTES_MAX: usize = 256 << 10;
/// Of one record of output.
const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// Of one event: a frame holds more.
const EVENT_BYTES_MAX: usize = 2 << 20;
/// Of the diffs of one tool result.
const DIFF_BYTES_MAX: usize = 1 << 20;
/// Of a request's texts: a snapshot with many open requests fits into a frame.
const REQUEST_BYTES_MAX: usize = 64 << 10;
const REQUESTS_MAX: usize = 16;
const INPUT_ID_BYTES_MAX: usize = 64;
/// A prompt that the API takes fits; and a snapshot with a full queue fits into a frame.
const MESSAGE_BYTES_MAX: usize = 3 << 20;
const QUEUE_BYTES_MAX: usize = MESSAGE_BYTES_MAX + (64 << 10);
const CALLS_MAX: usize = 10_000;
const FAILED_MCP_MAX: usize = 100;
/// How long a CLI that was asked to end may take, and one that was killed may be waited for.
const CLOSE_MS: u64 = 2_000;
const KILLED_MS: u64 = 10_000;
/// How long a CLI may take until it accepts a message: its MCP servers may have to be installed first.
const READY_MS: u64 = 180_000;

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
    /// Calls of custom tools, which the CLI tells of as calls of an MCP server.
    hidden: HashSet<String>,
    /// MCP servers that were told of.
    failed_mcp: Vec<String>,
    line: Vec<u8>,
    line_is_too_long: bool,
    /// When the program's processes are killed, and when a killed one is given up.
    kill_at: Option<u64>,
    give_up_at: Option<u64>,
    idle_at: Option<u64>,
    /// When a CLI that takes no message yet is given up.
    ready_by: Option<u64>,
    quiet_since: u64,
    stopping: bool,
    exited: bool,
    awake: bool,
    actions: Vec<Action>,
}

impl Core {
    /// Takes a journal over. `lost` says what ended what a former host had open.
    pub fn new(spec: Spec, adapter: Box<dyn Adapter>, capabilities: Capabilities, state: State, lost: Reason, now: u64) -> Self {
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
            failed_mcp: Vec::new(),
            line: Vec::new(),
            line_is_too_long: false,
            kill_at: None,
            give_up_at: None,
            idle_at: None,
            ready_by: None,
            quiet_since: now,
            stopping: false,
            exited: false,
            awake: false,
            actions: Vec::new(),
        };
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let generation = core.state.generation + 1;
        core.record(record::Kind::HostStarted(HostStarted { generation, version, capabilities: Some(capabilities) }));
        for request in core.state.requests.clone() {
            let settled = DecisionSettled { id: request.id, how: How::Void.into(), input_id: String::new() };
            core.record(record::Kind::DecisionSettled(settled));
        }
        let message = match lost {
            Reason::SandboxLost => "The sandbox restarted while the agent was running",
            _ => "The agent host was killed inside the sandbox",
        };
        if let Some(turn) = core.state.turn.clone() {
            let ended = TurnEnded { turn: turn.turn, reason: lost.into(), message: message.to_owned(), ..TurnEnded::default() };
            core.record(record::Kind::TurnEnded(ended));
        }
        if let Some(step) = core.state.step.clone() {
            let ended = StepEnded { input_id: step.input_id, name: step.name, reason: lost.into(), ..StepEnded::default() };
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
        let settled = InputSettled { id: id.to_owned(), outcome: outcome.into(), message: message.to_owned() };
        self.record(record::Kind::InputSettled(settled));
    }

    fn next_event_id(&self) -> u64 {
        self.state.last_event_id + 1
    }

    // --- inputs ---------------------------------------------------------------------------------

    pub fn input(&mut self, input: Input, now: u64) {
        if let Some(input::Kind::Persisted(persisted)) = &input.kind {
            self.actions.push(Action::Persisted(persisted.offset));
            return;
        }
        if input.id.is_empty() || input.id.len() > INPUT_ID_BYTES_MAX || self.state.has_accepted(&input.id) || self.exited {
            return;
        }
        self.quiet_since = now;
        let id = input.id.clone();
        let queued: usize = self.state.queued.iter().map(prost::Message::encoded_len).sum();
        let bytes = input.encoded_len();
        let refusal = match &input.kind {
            None => Some("this release of the agent host does not know this kind of input"),
            Some(_) if bytes > MESSAGE_BYTES_MAX => Some("the input is larger than 3 MiB"),
            Some(input::Kind::Message(_) | input::Kind::Step(_)) if queued + bytes > QUEUE_BYTES_MAX => Some("the queue is full"),
            Some(input::Kind::Message(_) | input::Kind::Step(_)) if self.stopping => Some("the session is stopping"),
            Some(_) => None,
        };
        if let Some(message) = refusal {
            let stub = Input { id: id.clone(), kind: None };
            self.record(record::Kind::InputAccepted(InputAccepted { input: Some(stub) }));
            self.settle(&id, Outcome::Refused, message);
            return;
        }
        self.record(record::Kind::InputAccepted(InputAccepted { input: Some(input.clone()) }));
        match input.kind {
            Some(input::Kind::Message(message)) if message.when_busy() == WhenBusy::Join => {
                // One that was delivered late belongs to no other turn.
                let is_its = self.turn.as_ref().is_some_and(|turn| message.turn == 0 || turn.message.turn == message.turn);
                if is_its && self.is_working() && self.steer(&message.text, now) {
                    self.settle(&id, Outcome::Applied, "");
                } else {
                    self.settle(&id, Outcome::Refused, NOT_JOINED);
                }
            }
            Some(input::Kind::Message(message)) if self.is_working() => match message.when_busy() {
                WhenBusy::Queue | WhenBusy::Join => {}
                WhenBusy::Steer if self.steer(&message.text, now) => self.settle(&id, Outcome::Applied, ""),
                WhenBusy::Steer | WhenBusy::Interrupt => self.end_work(Reason::Interrupted, now),
            },
            Some(input::Kind::Interrupt(interrupt)) => {
                let running = self.turn.as_ref().map(|turn| turn.message.turn);
                if interrupt.turn != 0 && running != Some(interrupt.turn) {
                    self.settle(&id, Outcome::Refused, "the turn does not run");
                } else {
                    // First: what settles after the turn's end is of no turn.
                    self.settle(&id, Outcome::Applied, "");
                    self.end_work(Reason::Interrupted, now);
                }
            }
            Some(input::Kind::Decision(decision)) => {
                self.decide(&id, decision.request, decision.verdict(), &decision.message, now);
            }
            Some(input::Kind::CustomToolResult(result)) => self.custom_tool_result(&id, result, now),
            Some(input::Kind::Withdraw(withdraw)) => {
                if self.state.queued.iter().any(|input| input.id == withdraw.input_id) {
                    self.settle(&withdraw.input_id, Outcome::Withdrawn, "");
                    self.settle(&id, Outcome::Applied, "");
                } else {
                    self.settle(&id, Outcome::Refused, "no such input is queued");
                }
            }
            Some(input::Kind::Stop(_)) => {
                self.settle(&id, Outcome::Applied, "");
                self.stopping = true;
                for queued in self.state.queued.clone() {
                    self.settle(&queued.id, Outcome::Withdrawn, "the session was stopped");
                }
                self.end_work(Reason::Stopped, now);
            }
            Some(input::Kind::Message(_) | input::Kind::Step(_) | input::Kind::Persisted(_)) | None => {}
        }
        self.advance(now);
    }

    fn steer(&mut self, text: &str, now: u64) -> bool {
        if !self.turn.as_ref().is_some_and(|turn| turn.delivered && turn.ending.is_none()) {
            return false;
        }
        let mut out = Out::default();
        let steered = self.adapter.steer(text, &mut out);
        self.apply(out, now);
        steered
    }

    fn decide(&mut self, input: &str, request: u64, verdict: Verdict, message: &str, now: u64) {
        let Some(index) = self.asks.iter().position(|open| open.id == request && !open.is_custom_tool) else {
            self.settle(input, Outcome::Refused, "no such request is open");
            return;
        };
        let how = match verdict {
            Verdict::Allow | Verdict::AllowForSession => How::Allowed,
            Verdict::Deny => How::Denied,
            Verdict::Unspecified => {
                self.settle(input, Outcome::Refused, "the decision has no verdict");
                return;
            }
        };
        let Open { key, .. } = self.asks.swap_remove(index);
        if verdict == Verdict::AllowForSession {
            let tool = self.state.requests.iter().find(|open| open.id == request).map(|open| open.tool.clone());
            self.allowed.extend(tool);
        }
        self.record(record::Kind::DecisionSettled(DecisionSettled { id: request, how: how.into(), input_id: input.to_owned() }));
        self.settle(input, Outcome::Applied, "");
        if how == How::Allowed {
            self.permitted.push(request);
        }
        self.resume_clock(now);
        let mut out = Out::default();
        self.adapter.decide(&key, verdict, message, &mut out);
        self.apply(out, now);
    }

    /// Settles every open request without an answer.
    fn settle_asks(&mut self, how: How, now: u64) {
        for open in std::mem::take(&mut self.asks) {
            self.record(record::Kind::DecisionSettled(DecisionSettled { id: open.id, how: how.into(), input_id: String::new() }));
            if open.is_custom_tool {
                self.answer_custom_tool(open.key, custom_tools::ENDED, true);
            }
        }
        self.resume_clock(now);
    }

    // --- custom tools ---------------------------------------------------------------------------

    /// The CLI calls a custom tool. Its user runs it: the call waits for the result.
    pub fn custom_tool_called(&mut self, call: String, name: String, input_json: String, now: u64) {
        let refusal = match &self.turn {
            None => Some(custom_tools::ENDED),
            Some(turn) if turn.ending.is_some() => Some(custom_tools::ENDED),
            Some(_) if !self.spec.custom_tools.iter().any(|tool| tool.name == name) => Some("There is no such tool"),
            Some(_) if input_json.len() > REQUEST_BYTES_MAX => Some("The input is larger than 64 KiB"),
            Some(_) if self.asks.len() >= REQUESTS_MAX => Some("Too many requests are open"),
            Some(_) => None,
        };
        if let Some(message) = refusal {
            self.answer_custom_tool(call, message, true);
            return;
        }
        let id = self.next_event_id();
        let request = DecisionRequested { id, tool: name, input_json, is_custom_tool: true, ..DecisionRequested::default() };
        self.record(record::Kind::DecisionRequested(request));
        self.asks.push(Open { id, key: call, is_custom_tool: true });
        self.waiting_since.get_or_insert(now);
        self.advance(now);
    }

    /// The CLI waits for a result no longer.
    pub fn custom_tool_cancelled(&mut self, call: &str, now: u64) {
        self.withdraw(|open| open.is_custom_tool && open.key == call, now);
        self.advance(now);
    }

    /// A server of the CLI's is gone, with the calls that came through it.
    pub fn custom_tools_gone(&mut self, server: u64, now: u64) {
        let prefix = format!("{server}:");
        while self.asks.iter().any(|open| open.is_custom_tool && open.key.starts_with(&prefix)) {
            self.withdraw(|open| open.is_custom_tool && open.key.starts_with(&prefix), now);
        }
        self.advance(now);
    }

    fn custom_tool_result(&mut self, input: &str, result: CustomToolResult, now: u64) {
        let Some(index) = self.asks.iter().position(|open| open.id == result.request && open.is_custom_tool) else {
            return self.settle(input, Outcome::Refused, "no such call of a custom tool waits");
        };
        let Open { id, key, .. } = self.asks.swap_remove(index);
        self.record(record::Kind::DecisionSettled(DecisionSettled { id, how: How::Allowed.into(), input_id: input.to_owned() }));
        self.settle(input, Outcome::Applied, "");
        self.resume_clock(now);
        self.answer_custom_tool(key, &result.text, result.is_error);
    }

    fn answer_custom_tool(&mut self, call: String, text: &str, is_error: bool) {
        self.actions.push(Action::CustomToolResult { call, text: text.to_owned(), is_error });
    }

    fn withdraw(&mut self, is_meant: impl Fn(&Open) -> bool, now: u64) {
        if let Some(index) = self.asks.iter().position(is_meant) {
            let Open { id, .. } = self.asks.swap_remove(index);
            self.record(record::Kind::DecisionSettled(DecisionSettled { id, how: How::Withdrawn.into(), input_id: String::new() }));
            self.resume_clock(now);
        }
    }

    /// A turn's time stands still while a decision is awaited.
    fn resume_clock(&mut self, now: u64) {
        if !self.asks.is_empty() {
            return;
        }
        if let (Some(since), Some(turn)) = (self.waiting_since.take(), &mut self.turn) {
            turn.deadline = turn.deadline.map(|deadline| deadline + (now - since));
        }
    }

    // --- what runs ------------------------------------------------------------------------------

    /// Begins whatever can begin.
    fn advance(&mut self, now: u64) {
        if self.stopping && !self.is_working() {
            match self.program {
                Program::None if !self.exited => {
                    self.exited = true;
                    self.actions.push(Action::Kill);
                    self.exit(host_ended::Reason::Stopped);
                }
                Program::Cli { .. } => self.close(now),
                _ => {}
            }
            return;
        }
        if !self.is_working()
            && let Some(input) = self.state.queued.first().cloned()
        {
            match (input.kind, self.program) {
                (Some(input::Kind::Message(message)), Program::None | Program::Cli { .. }) => self.begin_turn(&input.id, message, now),
                (Some(input::Kind::Step(step)), Program::None) => self.begin_step(input.id, step, now),
                (Some(input::Kind::Step(_)), Program::Cli { .. }) => self.close(now),
                _ => {}
            }
        }
        let awake = self.is_working() && self.asks.is_empty();
        if awake != self.awake {
            self.awake = awake;
            self.actions.push(Action::Awake(awake));
        }
    }

    fn begin_turn(&mut self, input_id: &str, message: Message, now: u64) {
        let started = TurnStarted { turn: message.turn, input_id: input_id.to_owned(), timeout_seconds: message.timeout_seconds };
        self.record(record::Kind::TurnStarted(started));
        let deadline = (message.timeout_seconds > 0).then(|| now + u64::from(message.timeout_seconds) * 1000);
        let (text, traceparent) = (message.text.clone(), message.traceparent.clone());
        self.turn = Some(Turn { message, delivered: false, ending: None, deadline });
        self.idle_at = None;
        self.calls.clear();
        self.hidden.clear();
        self.permitted.clear();
        match self.program {
            Program::None => {
                let conversation = Some(self.state.conversation_id.clone()).filter(|id| !id.is_empty());
                let launch = self.adapter.launch(conversation.as_deref(), &text);
                self.start(launch, traceparent);
            }
            Program::Cli { ready: true } => self.deliver(now),
            _ => {}
        }
    }

    fn begin_step(&mut self, input_id: String, step: Step, now: u64) {
        self.record(record::Kind::StepStarted(StepStarted { input_id: input_id.clone(), name: step.name.clone() }));
        let launch = script(&step.script, false);
        let deadline = (step.timeout_seconds > 0).then(|| now + u64::from(step.timeout_seconds) * 1000);
        let traceparent = step.traceparent.clone();
        self.step = Some(RunningStep { input_id, step, since: now, deadline, ending: None });
        self.start(launch, traceparent);
    }

    fn start(&mut self, mut launch: Launch, traceparent: String) {
        if !traceparent.is_empty() {
            launch.env.push(("TRACEPARENT".to_owned(), traceparent));
        }
        self.program = Program::Starting;
        self.stdio = launch.stdio;
        self.line.clear();
        self.line_is_too_long = false;
        self.actions.push(Action::Start(launch));
    }

    pub fn started(&mut self, pid: u32, cwd: &str, now: u64) {
        if let Some(step) = &self.step {
            self.program = Program::Step;
            if step.ending.is_some() {
                self.actions.push(Action::Terminate);
            }
            return;
        }
        if self.turn.as_ref().is_some_and(|turn| turn.ending.is_some()) {
            self.actions.push(Action::Terminate);
        }
        let resumed = !self.state.conversation_id.is_empty() && self.capabilities.stays_alive;
        self.record(record::Kind::CliStarted(CliStarted { pid, resumed }));
        self.program = Program::Cli { ready: false };
        self.ready_by = Some(now + READY_MS);
        let mut out = Out::default();
        self.adapter.started(cwd, &mut out);
        self.apply(out, now);
    }

    pub fn start_failed(&mut self, error: &str, now: u64) {
        self.program = Program::None;
        if let Some(step) = self.step.take() {
            self.step_ended(step, None, Reason::Failed, now);
        } else {
            self.end_turn(Reason::Failed, None, error.to_owned(), None, now);
        }
        self.advance(now);
    }

    fn deliver(&mut self, now: u64) {
        let Some(turn) = &mut self.turn else { return };
        turn.delivered = true;
        let text = std::mem::take(&mut turn.message.text);
        let id = self.state.turn.as_ref().map(|turn| turn.input_id.clone()).unwrap_or_default();
        self.settle(&id, Outcome::Applied, "");
        let mut out = Out::default();
        self.adapter.message(&text, &mut out);
        self.apply(out, now);
    }

    /// Ends the running turn or step, politely where the CLI can.
    fn end_work(&mut self, reason: Reason, now: u64) {
        let grace = if self.spec.kill_grace_ms == 0 { 10_000 } else { u64::from(self.spec.kill_grace_ms) };
        if let Some(step) = &mut self.step {
            if step.ending.is_none() {
                step.ending = Some(reason);
                self.kill_at = Some(now + grace);
                if self.program == Program::Step {
                    self.actions.push(Action::Terminate);
                }
            }
            return;
        }
        let Some(turn) = &mut self.turn else { return };
        if turn.ending.is_some() {
            return;
        }
        turn.ending = Some(reason);
        self.kill_at = Some(now + grace);
        let mut out = Out::default();
        if turn.delivered && self.adapter.interrupt(&mut out) {
            // Requests that the adapter does not withdraw are void for the CLI all the same.
            self.apply(out, now);
        } else if matches!(self.program, Program::Cli { .. }) {
            self.actions.push(Action::Terminate);
        }
    }

    fn end_turn(&mut self, reason: Reason, exit_code: Option<i32>, message: String, usage: Option<ModelUsage>, now: u64) {
        let Some(turn) = self.turn.take() else { return };
        let how = if matches!(self.program, Program::None) { How::Void } else { How::Withdrawn };
        self.settle_asks(how, now);
        self.waiting_since = None;
        let reason = turn.ending.unwrap_or(reason);
        let message = match turn.ending {
            Some(Reason::Failed) => "The sandbox's disk is full: the agent's output could not be kept".to_owned(),
            Some(_) => String::new(),
            None => shorten(message),
        };
        let ended = TurnEnded { turn: turn.message.turn, reason: reason.into(), exit_code, message, usage };
        self.record(record::Kind::TurnEnded(ended));
        self.kill_at = None;
        self.quiet_since = now;
        if matches!(self.program, Program::Cli { .. }) {
            if reason == Reason::TimedOut {
                // Whatever the CLI left running has had its time as well.
                self.program = Program::Closing;
                self.give_up_at = Some(now + KILLED_MS);
                self.actions.push(Action::Kill);
            } else {
                self.idle_at = Some(now + u64::from(self.spec.idle_seconds) * 1000);
            }
        }
    }

    fn close(&mut self, now: u64) {
        self.program = Program::Closing;
        self.idle_at = None;
        self.kill_at = Some(now + CLOSE_MS);
        self.actions.push(match self.adapter.close() {
            Close::EndOfInput => Action::CloseInput,
            Close::Terminate => Action::Terminate,
        });
    }

    /// Ends a CLI that can begin or finish no turn.
    fn end_cli(&mut self, now: u64) {
        self.actions.push(Action::Terminate);
        self.kill_at = Some(now + CLOSE_MS);
    }

    fn step_ended(&mut self, step: RunningStep, exit_code: Option<i32>, reason: Reason, now: u64) {
        let reason = step.ending.unwrap_or(reason);
        let duration_ms = now.saturating_sub(step.since);
        let ended = StepEnded { input_id: step.input_id.clone(), name: step.step.name, exit_code, reason: reason.into(), duration_ms };
        self.record(record::Kind::StepEnded(ended));
        self.settle(&step.input_id, Outcome::Applied, "");
        self.kill_at = None;
        self.quiet_since = now;
    }

    /// Whether what the program leaves running may go on.
    pub fn spares_leftovers(&self) -> bool {
        match (&self.step, &self.turn) {
            (Some(step), _) => step.ending.is_none(),
            (None, turn) => !self.capabilities.stays_alive && turn.as_ref().is_none_or(|turn| turn.ending.is_none()),
        }
    }

    /// The program is gone, and all that it wrote was passed to [`Self::output`].
    pub fn exited(&mut self, code: i32, now: u64) {
        if matches!(self.program, Program::None) {
            return;
        }
        self.give_up_at = None;
        let spares = self.spares_leftovers();
        if let Some(step) = self.step.take() {
            self.program = Program::None;
            let reason = if code == 0 { Reason::Completed } else { Reason::Failed };
            self.step_ended(step, Some(code), reason, now);
            self.actions.push(if spares { Action::SpareLeftovers } else { Action::Kill });
            self.advance(now);
            return;
        }
        self.record(record::Kind::CliExited(CliExited { exit_code: code, message: String::new() }));
        if let Program::Cli { .. } = self.program {
            self.flush_line(now);
        }
        let mut out = Out::default();
        self.adapter.exited(code, &mut out);
        self.program = Program::None;
        (self.idle_at, self.ready_by, self.kill_at) = (None, None, None);
        for effect in out.0 {
            if let Effect::TurnEnded { reason, message, usage } = effect {
                self.end_turn(reason, Some(code), message, usage, now);
            }
        }
        if self.turn.is_some() {
            let message = format!("The agent's process ended with status {code} before its turn did");
            self.end_turn(Reason::CliLost, Some(code), message, None, now);
        }
        self.actions.push(if spares { Action::SpareLeftovers } else { Action::Kill });
        self.advance(now);
    }

    // --- what the CLI says ----------------------------------------------------------------------

    pub fn output(&mut self, stream: Stream, data: Vec<u8>, now: u64) {
        if data.is_empty() {
            return;
        }
        let is_protocol = stream == Stream::Stdout && self.stdio == Stdio::Protocol;
        let copy = if is_protocol { data.clone() } else { Vec::new() };
        self.record(record::Kind::Output(Output { stream: stream.into(), data: data.into() }));
        for part in copy.split_inclusive(|byte| *byte == b'\n') {
            if self.line.len() + part.len() > LINE_BYTES_MAX {
                self.line_is_too_long = true;
                self.line.clear();
            }
            if !self.line_is_too_long {
                self.line.extend_from_slice(part);
            }
            if part.ends_with(b"\n") {
                self.flush_line(now);
            }
        }
    }

    fn flush_line(&mut self, now: u64) {
        let line = std::mem::take(&mut self.line);
        if !std::mem::take(&mut self.line_is_too_long) {
            let line = line.strip_suffix(b"\n").unwrap_or(&line);
            let mut out = Out::default();
            if !line.is_empty() {
                self.adapter.line(line, &mut out);
            }
            self.apply(out, now);
        }
    }

    pub fn http(&mut self, reply: &http::Reply, now: u64) {
        if let http::Reply::Event { data, .. } = reply {
            let line = [data.as_bytes(), b"\n"].concat();
            for part in line.chunks(OUTPUT_BYTES_MAX) {
                self.record(record::Kind::Output(Output { stream: Stream::Stdout.into(), data: part.to_vec().into() }));
            }
        }
        let mut out = Out::default();
        self.adapter.http(reply, &mut out);
        self.apply(out, now);
    }

    /// An MCP server did not start: the CLI does not say so.
    pub fn mcp_failed(&mut self, server: &str) {
        // Some CLIs start each server more than once.
        if !self.failed_mcp.iter().any(|failed| failed == server) && self.failed_mcp.len() < FAILED_MCP_MAX {
            self.failed_mcp.push(server.to_owned());
            self.event(None, mcp_failed(server, "", false));
        }
    }

    fn apply(&mut self, out: Out, now: u64) {
        let mut effects: VecDeque<Effect> = out.0.into();
        while let Some(effect) = effects.pop_front() {
            let mut more = Out::default();
            self.apply_one(effect, now, &mut more);
            // What an answer causes comes before what was said after the question.
            more.0.into_iter().rev().for_each(|effect| effects.push_front(effect));
        }
        self.advance(now);
    }

    fn apply_one(&mut self, effect: Effect, now: u64, more: &mut Out) {
        match effect {
            Effect::Ready => {
                if let Program::Cli { ready } = &mut self.program {
                    *ready = true;
                    self.ready_by = None;
                    if self.turn.as_ref().is_some_and(|turn| !turn.delivered && turn.ending.is_none()) {
                        self.deliver(now);
                    } else if self.turn.as_ref().is_some_and(|turn| !turn.delivered) {
                        self.end_turn(Reason::Interrupted, None, String::new(), None, now);
                    }
                }
            }
            Effect::Conversation { id, model } => {
                let resumed = self.state.conversation_id == id;
                let kind = event::Kind::ConversationStarted(contract::host::ConversationStarted { conversation_id: id, model, resumed });
                self.event(None, kind);
            }
            Effect::Send(line) => self.actions.push(Action::Send([line.as_bytes(), b"\n"].concat())),
            Effect::Http(request) => self.actions.push(Action::Http(request)),
            Effect::Event { parent, kind } => {
                if self.spec.partial_messages || !matches!(kind, event::Kind::Delta(_)) {
                    self.event(parent.as_deref(), kind);
                }
            }
            Effect::ToolUse { parent, tool } => self.tool_use(parent.as_deref(), tool),
            Effect::ToolResult { call, .. } if self.hidden.remove(&call) => {}
            Effect::ToolResult { call, mut result } => {
                result.tool_use = self.calls.get(&call).copied().unwrap_or_default();
                result.content = shorten(result.content);
                let mut room = DIFF_BYTES_MAX;
                for change in &mut result.changes {
                    if change.diff.len() > room {
                        change.diff = format!("[{} bytes left out]", change.diff.len());
                    }
                    room = room.saturating_sub(change.diff.len());
                }
                self.event(None, event::Kind::ToolResult(result));
            }
            Effect::Unusable => self.end_cli(now),
            Effect::Ask(ask) => self.ask(ask, now, more),
            Effect::Unask { key } => {
                self.withdraw(|open| !open.is_custom_tool && open.key == key, now);
            }
            Effect::TurnEnded { reason, message, usage } => {
                if self.turn.as_ref().is_some_and(|turn| turn.delivered) {
                    self.end_turn(reason, None, message, usage, now);
                }
            }
        }
    }

    fn event(&mut self, parent: Option<&str>, kind: event::Kind) {
        let kind = match kind {
            event::Kind::Message(mut message) => {
                message.text = shorten(message.text);
                event::Kind::Message(message)
            }
            event::Kind::Thinking(mut thinking) => {
                thinking.text = shorten(thinking.text);
                event::Kind::Thinking(thinking)
            }
            event::Kind::Error(mut error) => {
                error.message = shorten(error.message);
                event::Kind::Error(error)
            }
            event::Kind::Plan(mut plan) => {
                plan.entries.iter_mut().for_each(|entry| entry.text = shorten_to(std::mem::take(&mut entry.text), REQUEST_BYTES_MAX));
                event::Kind::Plan(plan)
            }
            other => other,
        };
        let parent = parent.and_then(|call| self.calls.get(call)).copied().unwrap_or_default();
        let mut event = Event { id: self.next_event_id(), parent, kind: Some(kind) };
        let bytes = event.encoded_len();
        if bytes > EVENT_BYTES_MAX {
            // The raw output has it.
            let message = format!("an event of {bytes} bytes was left out");
            event.kind =
                Some(event::Kind::Error(contract::host::AgentError { kind: "unknown_error".to_owned(), message, ..Default::default() }));
        }
        self.record(record::Kind::Event(event));
    }

    /// Puts a tool use into the journal, once for each call.
    fn tool_use(&mut self, parent: Option<&str>, mut tool: ToolUse) {
        if self.is_custom_tool(&tool.mcp_server, &tool.name) {
            if self.hidden.len() < CALLS_MAX {
                self.hidden.insert(tool.call_id);
            }
            return;
        }
        if self.calls.contains_key(&tool.call_id) {
            return;
        }
        if self.calls.len() < CALLS_MAX {
            self.calls.insert(tool.call_id.clone(), self.next_event_id());
        }
        tool.evaluation = self.evaluate(&tool.name, &tool.input_json).into();
        tool.input_json = shorten_json(tool.input_json, TEXT_BYTES_MAX);
        self.event(parent, event::Kind::ToolUse(tool));
    }

    /// Whether a tool is one of the host's own MCP server.
    fn is_custom_tool(&self, server: &str, name: &str) -> bool {
        !self.spec.custom_tools.is_empty() && (server == custom_tools::SERVER || name.contains(custom_tools::PREFIX))
    }

    fn evaluate(&self, tool: &str, input_json: &str) -> Evaluation {
        if self.allowed.iter().any(|allowed| allowed == tool) {
            return Evaluation::Allow;
        }
        let Some(permissions) = &self.spec.permissions else { return Evaluation::Allow };
        match permissions::evaluate(permissions, tool, input_json) {
            Evaluation::Unspecified => Evaluation::Allow,
            evaluation => evaluation,
        }
    }

    fn ask(&mut self, ask: Ask, now: u64, more: &mut Out) {
        if self.is_custom_tool(&ask.mcp_server, &ask.tool) {
            if self.hidden.len() < CALLS_MAX {
                self.hidden.insert(ask.call);
            }
            // Its user decides by the result.
            return self.adapter.decide(&ask.key, Verdict::Allow, "", more);
        }
        let tool = ToolUse {
            name: ask.tool.clone(),
            mcp_server: ask.mcp_server,
            input_json: ask.input_json.clone(),
            call_id: ask.call.clone(),
            evaluation: 0,
        };
        self.tool_use(None, tool);
        let id = self.calls.get(&ask.call).copied().unwrap_or(self.state.last_event_id);
        let ending = self.turn.as_ref().is_none_or(|turn| turn.ending.is_some());
        match self.evaluate(&ask.tool, &ask.input_json) {
            _ if ending => self.adapter.decide(&ask.key, Verdict::Deny, "The turn is ending", more),
            Evaluation::Allow | Evaluation::Unspecified => self.adapter.decide(&ask.key, Verdict::Allow, "", more),
            Evaluation::Deny => self.adapter.decide(&ask.key, Verdict::Deny, "The session's rules do not permit this tool", more),
            Evaluation::Ask if self.permitted.contains(&id) => self.adapter.decide(&ask.key, Verdict::Allow, "", more),
            Evaluation::Ask => {
                if self.asks.iter().any(|open| open.id == id || open.key == ask.key) {
                    return;
                }
                if self.asks.len() >= REQUESTS_MAX {
                    return self.adapter.decide(&ask.key, Verdict::Deny, "Too many permission requests are open", more);
                }
                let input_json = shorten_json(ask.input_json, REQUEST_BYTES_MAX);
                let [diff, reason] = [ask.diff, ask.reason].map(|text| shorten_to(text, REQUEST_BYTES_MAX));
                let request = DecisionRequested { id, tool: ask.tool, input_json, diff, reason, is_custom_tool: false };
                self.record(record::Kind::DecisionRequested(request));
                self.asks.push(Open { id, key: ask.key, is_custom_tool: false });
                self.waiting_since.get_or_insert(now);
            }
        }
    }

    // --- time -----------------------------------------------------------------------------------

    /// `has_clients`: someone reads the journal.
    pub fn tick(&mut self, has_clients: bool, now: u64) {
        let due = |at: Option<u64>| at.is_some_and(|at| at <= now);
        let turn_deadline = self.turn.as_ref().and_then(|turn| turn.deadline).filter(|_| self.waiting_since.is_none());
        if due(turn_deadline) || due(self.step.as_ref().and_then(|step| step.deadline)) {
            self.end_work(Reason::TimedOut, now);
        }
        if due(self.kill_at) {
            self.kill_at = None;
            if !matches!(self.program, Program::None) {
                self.give_up_at = Some(now + KILLED_MS);
                self.actions.push(Action::Kill);
            }
        }
        if due(self.ready_by) {
            self.ready_by = None;
            self.end_cli(now);
        }
        if due(self.give_up_at) {
            self.exited(137, now);
        }
        if due(self.idle_at) && !self.is_working() {
            self.close(now);
        }
        let linger = if self.spec.linger_seconds == 0 { 600 } else { u64::from(self.spec.linger_seconds) } * 1000;
        let is_idle = !self.is_working() && self.state.queued.is_empty() && self.program == Program::None;
        if has_clients {
            self.quiet_since = now;
        } else if is_idle && !self.exited && now.saturating_sub(self.quiet_since) >= linger {
            self.exit(host_ended::Reason::Lingered);
        }
    }

    /// When [`Self::tick`] has something to do, at the latest.
    pub fn next_tick(&self) -> Option<u64> {
        let turn = self.turn.as_ref().filter(|turn| turn.ending.is_none()).and_then(|turn| turn.deadline);
        let turn = turn.filter(|_| self.waiting_since.is_none());
        let step = self.step.as_ref().filter(|step| step.ending.is_none()).and_then(|step| step.deadline);
        [turn, step, self.kill_at, self.give_up_at, self.idle_at, self.ready_by].into_iter().flatten().min()
    }

    fn exit(&mut self, reason: host_ended::Reason) {
        self.exited = true;
        self.record(record::Kind::HostEnded(HostEnded { reason: reason.into(), message: String::new() }));
        self.actions.push(Action::Exit);
    }

    /// The journal cannot take what the program writes, and no room came: what is running ends.
    pub fn journal_is_full(&mut self, now: u64) {
        self.end_work(Reason::Failed, now);
    }
}

/// A text that fits into an event; the raw output has all of it.
fn shorten(text: String) -> String {
    shorten_to(text, TEXT_BYTES_MAX)
}

fn shorten_to(mut text: String, max: usize) -> String {
    if text.len() > max {
        let left_out = text.len() - max;
        let mut end = max;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push_str(&format!("\n[{left_out} bytes left out]"));
    }
    text
}

/// A tool's input; one that is too long is told as a text.
fn shorten_json(text: String, max: usize) -> String {
    if text.len() <= max {
        return text;
    }
    serde_json::json!({ "shortened": shorten_to(text, max) }).to_string()
}

#[cfg(test)]
mod tests {
    use contract::host::{Interrupt, TurnEnded, Withdraw};
    use proptest::prelude::*;

    use super::*;
    use crate::adapters::find;

    fn core(state: State) -> Core {
        let spec = Spec { runtime: "shell".to_owned(), ..Spec::default() };
        let runtime = find("shell").unwrap();
        Core::new(spec.clone(), (runtime.new)(&spec), runtime.capabilities, state, Reason::HostLost, 0)
    }

    fn message(id: u32, when_busy: WhenBusy) -> Input {
        let message = Message { turn: id, text: format!("echo {id}"), when_busy: when_busy.into(), ..Message::default() };
        Input { id: format!("m{id}"), kind: Some(input::Kind::Message(message)) }
    }

    /// A CLI whose turn ends as soon as it is interrupted.
    struct Prompt;

    impl Adapter for Prompt {
        fn launch(&mut self, _: Option<&str>, _: &str) -> Launch {
            script("", false)
        }

        fn started(&mut self, _: &str, out: &mut Out) {
            out.push(Effect::Ready);
        }

        fn message(&mut self, _: &str, _: &mut Out) {}

        fn interrupt(&mut self, out: &mut Out) -> bool {
            out.push(Effect::TurnEnded { reason: Reason::Interrupted, message: String::new(), usage: None });
            true
        }
    }

    /// A turn of [`Prompt`] that has the message.
    fn running() -> Core {
        let tools = vec![contract::host::CustomTool { name: "ask".to_owned(), ..Default::default() }];
        let spec = Spec { runtime: "shell".to_owned(), custom_tools: tools, ..Spec::default() };
        let capabilities = find("claude").unwrap().capabilities;
        let mut core = Core::new(spec, Box::new(Prompt), capabilities, State::default(), Reason::HostLost, 0);
        core.input(message(1, WhenBusy::Queue), 0);
        core.started(1, "/", 0);
        core.take_actions();
        core
    }

    fn records(core: &mut Core) -> Vec<record::Kind> {
        let record = |action| if let Action::Record(kind) = action { Some(kind) } else { None };
        core.take_actions().into_iter().filter_map(record).collect()
    }

    #[test]
    fn an_interrupt_is_settled_before_the_turn_that_it_ends() {
        let mut core = running();
        core.input(Input { id: "i".to_owned(), kind: Some(input::Kind::Interrupt(Interrupt::default())) }, 1);
        let records = records(&mut core);
        let settled = records.iter().position(|kind| matches!(kind, record::Kind::InputSettled(settled) if settled.id == "i"));
        let ended = records.iter().position(|kind| matches!(kind, record::Kind::TurnEnded(_)));
        assert!(settled.is_some() && settled < ended, "{records:?}");
    }

    #[test]
    fn a_custom_tool_waits_for_its_result_and_takes_the_first() {
        let mut core = running();
        core.custom_tool_called("1:7".to_owned(), "ask".to_owned(), "{}".to_owned(), 1);
        let requested = records(&mut core).into_iter().find_map(|kind| match kind {
            record::Kind::DecisionRequested(request) if request.is_custom_tool => Some(request.id),
            _ => None,
        });
        let request = requested.unwrap();
        let result = |id: &str, text: &str| {
            let result = CustomToolResult { request, text: text.to_owned(), is_error: false };
            Input { id: id.to_owned(), kind: Some(input::Kind::CustomToolResult(result)) }
        };
        // A decision is no result.
        let decision = contract::host::Decision { request, verdict: Verdict::Allow.into(), message: String::new() };
        core.input(Input { id: "d".to_owned(), kind: Some(input::Kind::Decision(decision)) }, 2);
        for (id, text) in [("r", "yes"), ("r", "yes"), ("s", "no")] {
            core.input(result(id, text), 2);
        }
        let answers: Vec<_> = core.take_actions().into_iter().filter(|action| matches!(action, Action::CustomToolResult { .. })).collect();
        assert_eq!(answers, [Action::CustomToolResult { call: "1:7".to_owned(), text: "yes".to_owned(), is_error: false }]);
        assert!(core.state().requests.is_empty());
    }

    #[test]
    fn what_a_turn_or_a_server_leaves_open_of_custom_tools_is_withdrawn() {
        let mut core = running();
        core.custom_tool_called("1:1".to_owned(), "ask".to_owned(), "{}".to_owned(), 1);
        core.custom_tool_called("2:1".to_owned(), "ask".to_owned(), "{}".to_owned(), 1);
        core.custom_tool_called("2:2".to_owned(), "nope".to_owned(), "{}".to_owned(), 1);
        assert_eq!(core.state().requests.len(), 2, "an unknown tool is refused");
        core.custom_tools_gone(1, 1);
        assert_eq!(core.state().requests.len(), 1);
        core.take_actions();
        core.input(Input { id: "i".to_owned(), kind: Some(input::Kind::Interrupt(Interrupt::default())) }, 1);
        assert!(core.state().requests.is_empty());
        let answers = core.take_actions().into_iter().filter(|action| matches!(action, Action::CustomToolResult { is_error: true, .. }));
        assert_eq!(answers.count(), 1);
    }

    #[derive(Debug, Clone)]
    enum Happening {
        Deliver(Input),
        ProgramExits,
        HostIsKilled,
        TimePasses(u64),
    }

    fn happenings() -> impl Strategy<Value = Vec<Happening>> {
        let busy = prop_oneof![Just(WhenBusy::Queue), Just(WhenBusy::Interrupt), Just(WhenBusy::Steer), Just(WhenBusy::Join)];
        let happening = prop_oneof![
            4 => (1_u32..6, busy).prop_map(|(id, busy)| Happening::Deliver(message(id, busy))),
            1 => (0_u32..4).prop_map(|id| Happening::Deliver(Input { id: format!("i{id}"), kind: Some(input::Kind::Interrupt(Interrupt::default())) })),
            1 => (0_u32..6).prop_map(|id| {
                let withdraw = Withdraw { input_id: format!("m{id}") };
                Happening::Deliver(Input { id: format!("w{id}"), kind: Some(input::Kind::Withdraw(withdraw)) })
            }),
            3 => Just(Happening::ProgramExits),
            1 => Just(Happening::HostIsKilled),
            1 => (1_u64..20_000).prop_map(Happening::TimePasses),
        ];
        proptest::collection::vec(happening, 1..40)
    }

    proptest! {
        /// Deliveries repeated, late and in any order, exits, kills of the host: each message is one turn at most, turns follow one
        /// another, each that began ends once, and at rest nothing that was accepted is left over.
        #[test]
        fn every_accepted_message_is_one_turn_or_none(happenings in happenings()) {
            let mut core = core(State::default());
            let (mut now, mut records, mut runs) = (0, Vec::new(), false);
            let mut settle = |core: &mut Core, now: u64, runs: &mut bool| {
                loop {
                    let actions = core.take_actions();
                    if actions.is_empty() {
                        return;
                    }
                    for action in actions {
                        match action {
                            Action::Record(kind) => records.push(kind),
                            Action::Start(_) => {
                                assert!(!*runs, "two programs");
                                *runs = true;
                                core.started(1, "/", now);
                            }
                            Action::Kill | Action::Terminate if *runs => {
                                *runs = false;
                                core.exited(143, now);
                            }
                            _ => {}
                        }
                    }
                }
            };
            let rest = [Happening::TimePasses(1), Happening::ProgramExits].into_iter().cycle().take(40);
            for happening in happenings.into_iter().chain(rest) {
                match happening {
                    Happening::Deliver(input) => core.input(input, now),
                    Happening::ProgramExits if runs => {
                        runs = false;
                        core.exited(0, now);
                    }
                    Happening::ProgramExits => {}
                    Happening::HostIsKilled => {
                        runs = false;
                        core = self::core(core.state().clone());
                    }
                    Happening::TimePasses(ms) => {
                        now += ms;
                        core.tick(true, now);
                    }
                }
                settle(&mut core, now, &mut runs);
            }
            let mut open: Option<u32> = None;
            let mut turns = Vec::new();
            for kind in &records {
                match kind {
                    record::Kind::TurnStarted(started) => {
                        prop_assert!(open.is_none() && !turns.contains(&started.turn), "{records:?}");
                        open = Some(started.turn);
                        turns.push(started.turn);
                    }
                    record::Kind::TurnEnded(TurnEnded { turn, .. }) => prop_assert_eq!(open.take(), Some(*turn)),
                    _ => {}
                }
            }
            let settled = |id: &str| records.iter().filter(|kind| matches!(kind, record::Kind::InputSettled(settled) if settled.id == id)).count();
            for kind in &records {
                if let record::Kind::InputAccepted(accepted) = kind {
                    let id = &accepted.input.as_ref().unwrap().id;
                    prop_assert!(settled(id) <= 1, "{id} settled twice");
                }
            }
            prop_assert!(open.is_none() && core.state().queued.is_empty(), "{:?}", core.state());
            let began = |id: &str| records.iter().any(|kind| matches!(kind, record::Kind::TurnStarted(turn) if turn.input_id == id));
            for kind in &records {
                if let record::Kind::InputAccepted(InputAccepted { input: Some(Input { id, kind: Some(input::Kind::Message(message)) }) }) = kind {
                    prop_assert!(message.when_busy() != WhenBusy::Join || !began(id), "{id} became a turn");
                }
            }
        }
    }
}
