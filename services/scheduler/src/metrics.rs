//! The metrics of the scheduler. Gauges are set by [`crate::gauges`].

use contract::session::session_event::Kind;
use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, histogram};
use rules::state::DEADLINE;

/// Names this service's metrics and says what they mean.
pub fn describe() {
    describe_counter!("aod_turns_ended_total", "turns that ended, by runtime and outcome");
    describe_histogram!(
        "aod_turn_seconds",
        Unit::Seconds,
        "time from a prompt's acceptance to the persisted end of its turn"
    );
    describe_histogram!(
        "aod_turn_start_seconds",
        Unit::Seconds,
        "time from a prompt's acceptance to the persisted start of its agent"
    );
    describe_histogram!(
        "aod_turn_wait_seconds",
        Unit::Seconds,
        "time from a prompt's acceptance to its first claim by a runner"
    );
    describe_counter!(
        "aod_deadline_settlements_total",
        "turns that the scheduler ended at their deadline"
    );
    describe_counter!("aod_events_recorded_total", "events persisted in Postgres");
    describe_counter!(
        "aod_event_log_gaps_total",
        "events that did not continue their session's persisted log"
    );
    describe_counter!(
        "aod_runner_leases_expired_total",
        "runners that sent no heartbeat and lost their turns"
    );
    describe_counter!(
        "aod_turns_offered_again_total",
        "offers of turns that had no owner, beyond the first"
    );
    describe_counter!(
        "aod_events_trimmed_total",
        "persisted events removed from the stream to make room"
    );
    describe_counter!("aod_event_days_dropped_total", "days of events removed by retention");
    describe_gauge!(
        "aod_event_days_due",
        "days of events that retention has yet to remove, one each hour"
    );
    describe_counter!("aod_streams_lost_total", "streams that were lost, replaced or set back");
    describe_gauge!("aod_turns_pending", "turns whose agent has not started");
    describe_gauge!(
        "aod_oldest_pending_turn_seconds",
        Unit::Seconds,
        "age of the oldest turn whose agent has not started"
    );
    describe_gauge!("aod_turns_running", "turns whose agent is running");
    describe_gauge!("aod_outbox_messages", "messages that wait to be published");
    describe_gauge!(
        "aod_oldest_outbox_message_seconds",
        Unit::Seconds,
        "age of the oldest message that waits to be published"
    );
    describe_gauge!(
        "aod_outbox_dead_messages",
        "messages that no stream accepts, moved to outbox_dead"
    );
    describe_gauge!("aod_spares", "prepared sandboxes that no session has, by state");
    describe_counter!("aod_spares_adopted_total", "prepared sandboxes that new sessions got");
    describe_counter!("aod_spares_ended_total", "prepared sandboxes that no session got");
    describe_gauge!(
        "aod_deleted_sessions_to_purge",
        "deleted sessions whose events are not purged yet"
    );
    describe_gauge!("aod_recorder_lag_events", "events in the stream that are not persisted yet");
    describe_gauge!("aod_jobs_waiting", "jobs that no runner has claimed; scale runners by this");
    describe_gauge!("aod_jobs_in_hand", "jobs delivered to runners and not acknowledged");
    describe_gauge!("aod_stream_bytes", Unit::Bytes, "size of each stream of the bus");
    describe_gauge!("aod_stream_bytes_max", Unit::Bytes, "the size at which each stream is full");
    describe_gauge!("aod_dead_letters", "dead-lettered jobs");
    describe_counter!(
        "aod_model_admissions_total",
        "checks of model requests, by outcome (admitted, waits, budget, rate, refused)"
    );
    describe_counter!("aod_budgets_reached_total", "budgets that ended a turn, by scope");
    describe_counter!(
        "aod_budget_warnings_total",
        "budgets of which more than 80 percent are used"
    );
    describe_counter!(
        "aod_model_requests_lost_total",
        "model requests whose gateway was lost: what they used is unknown"
    );
    // There from the beginning: an increase from nothing is none to Prometheus.
    counter!("aod_deadline_settlements_total").increment(0);
    counter!("aod_streams_lost_total").increment(0);
    counter!("aod_event_log_gaps_total").increment(0);
    counter!("aod_runner_leases_expired_total").increment(0);
}

/// How a turn ended, for a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Completed,
    /// The agent's exit status was not 0.
    Failed,
    /// A stage of the set-up failed.
    Provisioning,
    Timeout,
    /// The Sprite restarted under its agent.
    Sandbox,
    /// Settled by the backstop.
    Deadline,
    Terminated,
}

impl Outcome {
    pub fn of(kind: &Kind) -> Self {
        let Kind::TurnEnded(ended) = kind else { return Self::Terminated };
        match (ended.exit_code, ended.failure.as_ref().map(|failure| failure.stage.as_str())) {
            (Some(0), _) => Self::Completed,
            (Some(_), _) | (None, None) => Self::Failed,
            (None, Some(DEADLINE)) => Self::Deadline,
            (None, Some("timeout")) => Self::Timeout,
            (None, Some("sandbox")) => Self::Sandbox,
            (None, Some(_)) => Self::Provisioning,
        }
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Provisioning => "provisioning",
            Self::Timeout => "timeout",
            Self::Sandbox => "sandbox",
            Self::Deadline => "deadline",
            Self::Terminated => "terminated",
        }
    }
}

/// What happened to a turn: counted when it is committed.
#[derive(Debug)]
pub enum Observation {
    Started { runtime: String, seconds: f64 },
    Ended { runtime: String, outcome: Outcome, seconds: f64 },
}

impl Observation {
    pub fn count(self) {
        match self {
            Self::Started { runtime, seconds } => {
                histogram!("aod_turn_start_seconds", "runtime" => runtime).record(seconds)
            }
            Self::Ended { runtime, outcome, seconds } => {
                counter!("aod_turns_ended_total", "runtime" => runtime.clone(), "outcome" => outcome.as_str()).increment(1);
                histogram!("aod_turn_seconds", "runtime" => runtime).record(seconds);
            }
        }
    }
}
