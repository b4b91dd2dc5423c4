//! Turns and steps: how they begin, run and end.

use contract::host::{
    CliExited, CliStarted, Message, ModelUsage, Step, StepEnded, StepStarted, TurnEnded,
    TurnStarted, decision_settled::How, event, host_ended, input, input_settled::Outcome, record,
    turn_ended::Reason,
};

use super::{Action, Core, KILLED_MS, Program, RunningStep, Turn, output::shorten};
use crate::adapters::{Close, Effect, Launch, Out, script};

/// How long a CLI that was asked to end may take.
const CLOSE_MS: u64 = 2_000;
/// How long a CLI may take until it accepts a message: its MCP servers may have to be installed
/// first.
const READY_MS: u64 = 180_000;

impl Core {
    /// Begins whatever can begin.
    pub(super) fn advance(&mut self, now: u64) {
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
                (Some(input::Kind::Message(message)), Program::None | Program::Cli { .. }) => {
                    self.begin_turn(&input.id, message, now)
                }
                (Some(input::Kind::Step(step)), Program::None) => {
                    self.begin_step(input.id, step, now)
                }
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

    /// Starts the CLI without a message, where nothing else is to be done.
    pub(super) fn start_cli(&mut self, input_id: String) {
        let is_free = !self.is_working() && self.state.queued.is_empty() && !self.stopping;
        match self.program {
            Program::Cli { ready: true } if is_free => self.settle(&input_id, Outcome::Applied, ""),
            Program::None if is_free && self.capabilities.stays_alive => {
                self.start_input = Some(input_id);
                let launch = self.adapter.launch(self.conversation().as_deref(), "");
                self.start(launch, String::new());
            }
            _ => self.settle(&input_id, Outcome::Refused, "the CLI cannot be started now"),
        }
    }

    /// Settles the input for which the CLI was started.
    pub(super) fn settle_start(&mut self, outcome: Outcome, message: &str) {
        if let Some(id) = self.start_input.take() {
            self.settle(&id, outcome, message);
        }
    }

    /// The conversation to resume.
    fn conversation(&self) -> Option<String> {
        Some(self.state.conversation_id.clone()).filter(|id| !id.is_empty())
    }

    fn begin_turn(&mut self, input_id: &str, message: Message, now: u64) {
        // First: what settles later is of the turn.
        self.settle_start(Outcome::Applied, "");
        let started = TurnStarted {
            turn: message.turn,
            input_id: input_id.to_owned(),
            timeout_seconds: message.timeout_seconds,
        };
        self.record(record::Kind::TurnStarted(started));
        let deadline =
            (message.timeout_seconds > 0).then(|| now + u64::from(message.timeout_seconds) * 1000);
        let (text, traceparent) = (message.text.clone(), message.traceparent.clone());
        self.turn = Some(Turn { message, delivered: false, ending: None, deadline });
        self.tell_early();
        self.idle_at = None;
        self.calls.clear();
        self.hidden.clear();
        self.custom_calls = 0;
        self.permitted.clear();
        match self.program {
            Program::None => {
                let launch = self.adapter.launch(self.conversation().as_deref(), &text);
                self.start(launch, traceparent);
            }
            Program::Cli { ready: true } => self.deliver(now),
            _ => {}
        }
    }

    fn begin_step(&mut self, input_id: String, step: Step, now: u64) {
        self.record(record::Kind::StepStarted(StepStarted {
            input_id: input_id.clone(),
            name: step.name.clone(),
        }));
        let launch = script(&step.script, false);
        let deadline =
            (step.timeout_seconds > 0).then(|| now + u64::from(step.timeout_seconds) * 1000);
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
            self.settle_start(Outcome::Refused, error);
            self.end_turn(Reason::Failed, None, error.to_owned(), None, now);
        }
        self.advance(now);
    }

    pub(super) fn deliver(&mut self, now: u64) {
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
    pub(super) fn end_work(&mut self, reason: Reason, now: u64) {
        let grace =
            if self.spec.kill_grace_ms == 0 { 10_000 } else { u64::from(self.spec.kill_grace_ms) };
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

    pub(super) fn end_turn(
        &mut self,
        reason: Reason,
        exit_code: Option<i32>,
        message: String,
        usage: Option<ModelUsage>,
        now: u64,
    ) {
        let Some(turn) = self.turn.take() else { return };
        let how = if matches!(self.program, Program::None) { How::Void } else { How::Withdrawn };
        self.settle_asks(how, now);
        self.waiting_since = None;
        let reason = turn.ending.unwrap_or(reason);
        let message = match turn.ending {
            Some(Reason::Failed) => {
                "The sandbox's disk is full: the agent's output could not be kept".to_owned()
            }
            Some(_) => String::new(),
            None => shorten(message),
        };
        let ended =
            TurnEnded { turn: turn.message.turn, reason: reason.into(), exit_code, message, usage };
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
                self.rest(now);
            }
        }
    }

    /// The CLI has nothing to do: it is kept for a while.
    pub(super) fn rest(&mut self, now: u64) {
        self.idle_at = Some(now + u64::from(self.spec.idle_seconds) * 1000);
    }

    pub(super) fn close(&mut self, now: u64) {
        self.program = Program::Closing;
        self.idle_at = None;
        self.kill_at = Some(now + CLOSE_MS);
        self.actions.push(match self.adapter.close() {
            Close::EndOfInput => Action::CloseInput,
            Close::Terminate => Action::Terminate,
        });
    }

    /// Ends a CLI that can begin or finish no turn.
    pub(super) fn end_cli(&mut self, now: u64) {
        self.actions.push(Action::Terminate);
        self.kill_at = Some(now + CLOSE_MS);
    }

    fn step_ended(&mut self, step: RunningStep, exit_code: Option<i32>, reason: Reason, now: u64) {
        let reason = step.ending.unwrap_or(reason);
        let duration_ms = now.saturating_sub(step.since);
        let ended = StepEnded {
            input_id: step.input_id.clone(),
            name: step.step.name,
            exit_code,
            reason: reason.into(),
            duration_ms,
        };
        self.record(record::Kind::StepEnded(ended));
        self.settle(&step.input_id, Outcome::Applied, "");
        self.kill_at = None;
        self.quiet_since = now;
    }

    /// Whether what the program leaves running may keep running.
    pub fn spares_leftovers(&self) -> bool {
        match (&self.step, &self.turn) {
            (Some(step), _) => step.ending.is_none(),
            (None, turn) => {
                !self.capabilities.stays_alive
                    && turn.as_ref().is_none_or(|turn| turn.ending.is_none())
            }
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
        self.settle_start(Outcome::Refused, "the CLI ended before it took a message");
        if let Program::Cli { .. } = self.program {
            self.flush_line(now);
        }
        let mut out = Out::default();
        self.adapter.exited(code, &mut out);
        self.program = Program::None;
        (self.idle_at, self.ready_by, self.kill_at) = (None, None, None);
        self.early.retain(|kind| !matches!(kind, event::Kind::ConversationStarted(_)));
        for effect in out.0 {
            if let Effect::TurnEnded { reason, message, usage } = effect {
                self.end_turn(reason, Some(code), message, usage, now);
            }
        }
        if self.turn.is_some() {
            let message =
                format!("The agent's process ended with status {code} before its turn did");
            self.end_turn(Reason::CliLost, Some(code), message, None, now);
        }
        self.actions.push(if spares { Action::SpareLeftovers } else { Action::Kill });
        self.advance(now);
    }
}
