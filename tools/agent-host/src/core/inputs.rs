//! What clients send: messages, steps, interrupts, decisions.

use contract::host::{
    DecisionSettled, Input, InputAccepted, WhenBusy, decision::Verdict, decision_settled::How,
    input, input_settled::Outcome, record, turn_ended::Reason,
};
use prost::Message as _;

use super::{Action, Core, MESSAGE_BYTES_MAX, NOT_JOINED, Open};
use crate::{adapters::Out, custom_tools};

const INPUT_ID_BYTES_MAX: usize = 64;
const QUEUE_BYTES_MAX: usize = MESSAGE_BYTES_MAX + (64 << 10);

impl Core {
    pub fn input(&mut self, input: Input, now: u64) {
        if let Some(input::Kind::Persisted(persisted)) = &input.kind {
            self.actions.push(Action::Persisted(persisted.offset));
            return;
        }
        if input.id.is_empty()
            || input.id.len() > INPUT_ID_BYTES_MAX
            || self.state.has_accepted(&input.id)
            || self.exited
        {
            return;
        }
        self.quiet_since = now;
        let id = input.id.clone();
        let queued: usize = self.state.queued.iter().map(prost::Message::encoded_len).sum();
        let bytes = input.encoded_len();
        let refusal = match &input.kind {
            None => Some("this release of the agent host does not know this kind of input"),
            Some(_) if bytes > MESSAGE_BYTES_MAX => Some("the input is larger than 3 MiB"),
            Some(input::Kind::Message(_) | input::Kind::Step(_))
                if queued + bytes > QUEUE_BYTES_MAX =>
            {
                Some("the queue is full")
            }
            Some(input::Kind::Message(_) | input::Kind::Step(_)) if self.stopping => {
                Some("the session is stopping")
            }
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
                let is_its = self
                    .turn
                    .as_ref()
                    .is_some_and(|turn| message.turn == 0 || turn.message.turn == message.turn);
                if is_its && self.is_working() && self.steer(&message.text, now) {
                    self.settle(&id, Outcome::Applied, "");
                } else {
                    self.settle(&id, Outcome::Refused, NOT_JOINED);
                }
            }
            Some(input::Kind::Message(message)) if self.is_working() => match message.when_busy() {
                WhenBusy::Queue | WhenBusy::Join => {}
                WhenBusy::Steer if self.steer(&message.text, now) => {
                    self.settle(&id, Outcome::Applied, "")
                }
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
            Some(input::Kind::CustomToolResult(result)) => {
                self.custom_tool_result(&id, result, now)
            }
            Some(input::Kind::Withdraw(withdraw)) => {
                if self.state.queued.iter().any(|input| input.id == withdraw.input_id) {
                    self.settle(&withdraw.input_id, Outcome::Withdrawn, "");
                    self.settle(&id, Outcome::Applied, "");
                } else {
                    self.settle(&id, Outcome::Refused, "no such input is queued");
                }
            }
            Some(input::Kind::StartCli(_)) => self.start_cli(id),
            Some(input::Kind::Stop(_)) => {
                self.settle(&id, Outcome::Applied, "");
                self.stopping = true;
                for queued in self.state.queued.clone() {
                    self.settle(&queued.id, Outcome::Withdrawn, "the session was stopped");
                }
                self.end_work(Reason::Stopped, now);
            }
            Some(input::Kind::Message(_) | input::Kind::Step(_) | input::Kind::Persisted(_))
            | None => {}
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

    pub(super) fn decide(
        &mut self,
        input: &str,
        request: u64,
        verdict: Verdict,
        message: &str,
        now: u64,
    ) {
        let Some(index) =
            self.asks.iter().position(|open| open.id == request && !open.is_custom_tool)
        else {
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
            let tool = self
                .state
                .requests
                .iter()
                .find(|open| open.id == request)
                .map(|open| open.tool.clone());
            self.allowed.extend(tool);
        }
        self.record(record::Kind::DecisionSettled(DecisionSettled {
            id: request,
            how: how.into(),
            input_id: input.to_owned(),
        }));
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
    pub(super) fn settle_asks(&mut self, how: How, now: u64) {
        for open in std::mem::take(&mut self.asks) {
            self.record(record::Kind::DecisionSettled(DecisionSettled {
                id: open.id,
                how: how.into(),
                input_id: String::new(),
            }));
            if open.is_custom_tool {
                self.answer_custom_tool(open.key, custom_tools::ENDED, true);
            }
        }
        self.resume_clock(now);
    }
}
