//! What the end of a turn in the journal means for its user.

use contract::{
    host::{self as agent_host, turn_ended::Reason},
    session::{BudgetNotice, Failure, StopReason, TurnEnded, Usage},
};
use types::Runtime;

use crate::diagnosis::{self, Cause};

/// How many bytes at the end of each output stream are searched for the cause of a failure.
const PRINTED_BYTES: usize = 8 << 10;

/// The stage of a failure that is the agent's own.
const AGENT: &str = "agent";
/// The stage of a turn's end at a budget.
const BUDGET: &str = "budget";

/// A turn's end as the agent host reports it, and what explains it.
pub struct Outcome<'a> {
    pub runtime: Runtime,
    pub ended: &'a agent_host::TurnEnded,
    pub timeout_seconds: u32,
    /// The end of the agent's standard output, and of its standard error.
    pub printed: [String; 2],
}

impl Outcome<'_> {
    /// `refused`: why the model gateway's last request failed; empty if it did not.
    pub fn turn_ended(&self, refused: &str) -> TurnEnded {
        let Self { runtime, ended, .. } = *self;
        let usage = ended.usage.as_ref().map(usage);
        let exited = |code: i32, stop_reason: StopReason, failure: Option<Failure>| TurnEnded {
            exit_code: Some(code),
            failure,
            usage: usage.clone(),
            stop_reason: stop_reason.into(),
            ..TurnEnded::default()
        };
        let without_code = |stage: &str, message: String| TurnEnded {
            failure: Some(Failure { stage: stage.to_owned(), message }),
            usage: usage.clone(),
            ..TurnEnded::default()
        };
        let agent_failed = |message: String| Some(Failure { stage: AGENT.to_owned(), message });
        let code = ended.exit_code.unwrap_or(1);
        match ended.reason() {
            Reason::Completed if runtime == Runtime::Shell => {
                exited(ended.exit_code.unwrap_or(0), StopReason::EndTurn, None)
            }
            Reason::Completed => exited(0, StopReason::EndTurn, None),
            Reason::Interrupted => exited(0, StopReason::Interrupted, None),
            Reason::TimedOut => {
                // CLIs retry a failing model for longer than many turns may take.
                let cause =
                    (runtime != Runtime::Shell).then(|| self.cause(None, &ended.message)).flatten();
                let hint = cause
                    .map(|cause| format!(". Its last output suggests that {cause}"))
                    .unwrap_or_default();
                let message = format!("Turn timed out after {}s{hint}", self.timeout_seconds);
                without_code("timeout", message)
            }
            // A script's own status, whatever it is.
            Reason::Failed if runtime == Runtime::Shell && ended.message.is_empty() => {
                exited(code, StopReason::EndTurn, None)
            }
            Reason::Failed => {
                let what = ended.exit_code.map_or_else(
                    || "The agent failed".to_owned(),
                    |code| format!("The agent exited with {code}"),
                );
                let said = format!("{refused}\n{}", ended.message);
                let cause = self.cause(ended.exit_code, &said).map(|cause| cause.to_string());
                let cause = cause.or_else(|| {
                    [refused, &ended.message]
                        .into_iter()
                        .find(|said| !said.is_empty())
                        .map(str::to_owned)
                });
                let failure = cause.and_then(|cause| agent_failed(format!("{what}: {cause}")));
                exited(code, StopReason::Unspecified, failure)
            }
            Reason::Limit => {
                let message = or(&ended.message, "The agent reached a limit");
                exited(code, StopReason::Limit, agent_failed(message))
            }
            Reason::Refused => {
                let message = or(&ended.message, "The model refused");
                exited(code, StopReason::Refused, agent_failed(message))
            }
            Reason::CliLost => {
                let cause = self
                    .cause(ended.exit_code, "")
                    .map(|cause| format!(": {cause}"))
                    .unwrap_or_default();
                let what = or(&ended.message, "The agent's process ended before its turn did");
                without_code("sandbox", format!("{what}{cause}"))
            }
            Reason::HostLost | Reason::SandboxLost | Reason::Stopped | Reason::Unspecified => {
                let message = or(&ended.message, "The agent was stopped inside the sandbox");
                without_code("sandbox", message)
            }
        }
    }

    /// The cause of the agent's end, if the end of its output names one; `code`: none if it was
    /// killed.
    fn cause(&self, code: Option<i32>, message: &str) -> Option<Cause> {
        let [stdout, stderr] = self.printed.each_ref().map(|printed| tail(printed));
        let said = [message, stdout, stderr].join("\n");
        diagnosis::of_agent(code.and_then(|code| u8::try_from(code).ok()), &said)
    }
}

/// The end of a turn whose last model request a budget refused, whatever its CLI reports.
pub fn at_budget(ended: TurnEnded, reached: &BudgetNotice) -> TurnEnded {
    if ended.stop_reason() == StopReason::Interrupted {
        return ended;
    }
    let failure =
        Some(Failure { stage: BUDGET.to_owned(), message: rules::budget::message(reached) });
    TurnEnded { exit_code: Some(1), failure, stop_reason: StopReason::Budget.into(), ..ended }
}

fn tail(text: &str) -> &str {
    let from = text.ceil_char_boundary(text.len().saturating_sub(PRINTED_BYTES));
    text.get(from..).unwrap_or_default()
}

fn or(message: &str, otherwise: &str) -> String {
    if message.is_empty() { otherwise } else { message }.to_owned()
}

/// The sum of input tokens, including those read from and written to a cache.
fn usage(used: &agent_host::ModelUsage) -> Usage {
    Usage {
        input_tokens: Some(used.input_tokens + used.cache_read_tokens + used.cache_write_tokens),
        output_tokens: Some(used.output_tokens),
        cost_micro_usd: used.cost_micro_usd,
        model: Some(used.model.clone()).filter(|model| !model.is_empty()),
        cache_read_tokens: Some(used.cache_read_tokens),
        cache_write_tokens: Some(used.cache_write_tokens),
        reasoning_tokens: Some(used.reasoning_tokens),
    }
}

#[cfg(test)]
mod tests {
    use contract::host::ModelUsage;
    use proptest::prelude::*;

    use super::*;

    fn end(
        runtime: Runtime,
        ended: &agent_host::TurnEnded,
        stderr: &str,
        refused: &str,
    ) -> TurnEnded {
        let printed = [String::new(), stderr.to_owned()];
        Outcome { runtime, ended, timeout_seconds: 60, printed }.turn_ended(refused)
    }

    fn ended(reason: Reason, exit_code: Option<i32>, message: &str) -> agent_host::TurnEnded {
        let message = message.to_owned();
        agent_host::TurnEnded { reason: reason.into(), exit_code, message, ..Default::default() }
    }

    #[test]
    fn a_scripts_status_is_the_turns_and_is_no_failure() {
        for reason in [Reason::Completed, Reason::Failed] {
            let end = end(Runtime::Shell, &ended(reason, Some(7), ""), "429", "");
            assert_eq!((end.exit_code, end.failure.clone()), (Some(7), None));
            assert_eq!(end.stop_reason(), StopReason::EndTurn);
        }
    }

    #[test]
    fn an_interrupted_turn_did_not_fail() {
        let end = end(Runtime::Claude, &ended(Reason::Interrupted, Some(130), "cut"), "", "");
        assert_eq!((end.exit_code, end.failure.clone()), (Some(0), None));
        assert_eq!(end.stop_reason(), StopReason::Interrupted);
    }

    #[test]
    fn an_agents_failure_names_its_cause_before_the_clis_own_words() {
        let message = |ended: &agent_host::TurnEnded, stderr: &str, refused: &str| {
            let failure = end(Runtime::Claude, ended, stderr, refused).failure;
            failure.map(|failure| (failure.stage, failure.message))
        };
        let agent = |text: &str| Some(("agent".to_owned(), text.to_owned()));
        let failed = ended(Reason::Failed, Some(1), "");
        assert_eq!(message(&failed, "tests failed", ""), None);
        assert_eq!(
            message(&failed, "error: 401", ""),
            agent("The agent exited with 1: the model's provider refused the API key")
        );
        assert_eq!(message(&failed, "", "no route"), agent("The agent exited with 1: no route"));
        let crashed = ended(Reason::Failed, None, "it crashed");
        assert_eq!(message(&crashed, "", ""), agent("The agent failed: it crashed"));
        assert_eq!(message(&crashed, "", "no route"), agent("The agent failed: no route"));
    }

    #[test]
    fn a_timeout_says_what_the_cli_was_retrying() {
        let timed_out = ended(Reason::TimedOut, None, "");
        let message = |runtime: Runtime, stderr: &str| {
            end(runtime, &timed_out, stderr, "").failure.map(|failure| failure.message)
        };
        let timeout = "Turn timed out after 60s";
        assert_eq!(message(Runtime::Claude, "").as_deref(), Some(timeout));
        assert_eq!(
            message(Runtime::Claude, "overloaded"),
            Some(format!("{timeout}. Its last output suggests that the model's provider failed"))
        );
        // What a script prints is no CLI's report.
        assert_eq!(message(Runtime::Shell, "overloaded").as_deref(), Some(timeout));
    }

    #[test]
    fn input_tokens_include_those_of_the_cache() {
        let used = ModelUsage {
            input_tokens: 1,
            cache_read_tokens: 20,
            cache_write_tokens: 300,
            ..ModelUsage::default()
        };
        assert_eq!(usage(&used).input_tokens, Some(321));
        assert_eq!(usage(&used).model, None);
    }

    #[test]
    fn a_budget_ends_a_turn_unless_its_user_interrupted_it() {
        let completed = end(Runtime::Claude, &ended(Reason::Completed, Some(0), ""), "", "");
        let stopped = at_budget(completed, &BudgetNotice::default());
        assert_eq!(stopped.stop_reason(), StopReason::Budget);
        assert_eq!(stopped.failure.map(|failure| failure.stage).as_deref(), Some("budget"));
        let interrupted = end(Runtime::Claude, &ended(Reason::Interrupted, None, ""), "", "");
        assert_eq!(at_budget(interrupted.clone(), &BudgetNotice::default()), interrupted);
    }

    proptest! {
        /// Whatever a host reports, a turn has a status or says why it has none.
        #[test]
        fn every_turn_has_a_status_or_a_failure(
            reason in -1..20i32,
            exit_code in proptest::option::of(any::<i32>()),
            message in ".{0,20}",
            printed in "\\PC{0,40}",
            runtime in proptest::sample::select(vec![
                Runtime::Shell, Runtime::Claude, Runtime::Codex, Runtime::Gemini, Runtime::Opencode,
            ]),
        ) {
            let ended = agent_host::TurnEnded { reason, exit_code, message, ..Default::default() };
            let end = end(runtime, &ended, &printed.repeat(400), "");
            prop_assert!(end.exit_code.is_some() || end.failure.is_some());
        }
    }
}
