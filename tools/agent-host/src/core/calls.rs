//! Calls of custom tools, which the session's user runs, and the time that a turn waits for
//! answers.

use contract::host::{
    CustomToolResult, DecisionRequested, DecisionSettled, decision_settled::How,
    input_settled::Outcome, record,
};

use super::{Action, CUSTOM_CALLS_MAX, Core, Open, REQUEST_BYTES_MAX, REQUESTS_MAX};
use crate::custom_tools;

impl Core {
    /// The CLI calls a custom tool. Its user runs it: the call waits for the result.
    pub fn custom_tool_called(&mut self, call: String, name: String, input_json: String, now: u64) {
        let refusal = match &self.turn {
            None => Some(custom_tools::ENDED),
            Some(turn) if turn.ending.is_some() => Some(custom_tools::ENDED),
            Some(_) if !self.spec.custom_tools.iter().any(|tool| tool.name == name) => {
                Some("There is no such tool")
            }
            Some(_) if input_json.len() > REQUEST_BYTES_MAX => {
                Some("The input is larger than 64 KiB")
            }
            Some(_) if self.asks.len() >= REQUESTS_MAX => Some("Too many requests are open"),
            Some(_) if self.custom_calls >= CUSTOM_CALLS_MAX => {
                Some("Too many calls of custom tools in this turn")
            }
            Some(_) => None,
        };
        if let Some(message) = refusal {
            self.answer_custom_tool(call, message, true);
            return;
        }
        self.custom_calls += 1;
        let id = self.next_event_id();
        let request = DecisionRequested {
            id,
            tool: name,
            input_json,
            is_custom_tool: true,
            ..DecisionRequested::default()
        };
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

    pub(super) fn custom_tool_result(&mut self, input: &str, result: CustomToolResult, now: u64) {
        let Some(index) =
            self.asks.iter().position(|open| open.id == result.request && open.is_custom_tool)
        else {
            return self.settle(input, Outcome::Refused, "no such call of a custom tool waits");
        };
        let Open { id, key, .. } = self.asks.swap_remove(index);
        self.record(record::Kind::DecisionSettled(DecisionSettled {
            id,
            how: How::Allowed.into(),
            input_id: input.to_owned(),
        }));
        self.settle(input, Outcome::Applied, "");
        self.resume_clock(now);
        self.answer_custom_tool(key, &result.text, result.is_error);
    }

    pub(super) fn answer_custom_tool(&mut self, call: String, text: &str, is_error: bool) {
        self.actions.push(Action::CustomToolResult { call, text: text.to_owned(), is_error });
    }

    pub(super) fn withdraw(&mut self, is_meant: impl Fn(&Open) -> bool, now: u64) {
        if let Some(index) = self.asks.iter().position(is_meant) {
            let Open { id, .. } = self.asks.swap_remove(index);
            self.record(record::Kind::DecisionSettled(DecisionSettled {
                id,
                how: How::Withdrawn.into(),
                input_id: String::new(),
            }));
            self.resume_clock(now);
        }
    }

    /// A turn's time stands still while a decision is awaited.
    pub(super) fn resume_clock(&mut self, now: u64) {
        if !self.asks.is_empty() {
            return;
        }
        if let (Some(since), Some(turn)) = (self.waiting_since.take(), &mut self.turn) {
            turn.deadline = turn.deadline.map(|deadline| deadline + (now - since));
        }
    }
}
