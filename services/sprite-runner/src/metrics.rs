//! The metrics of a runner.

use bus::work::Outcome;
use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge};

/// Describes the metrics of this service.
pub fn describe() {
    describe_gauge!("aod_runner_jobs", "jobs and turns that this runner works on");
    describe_gauge!(
        "aod_runner_capacity",
        "maximum number of jobs and turns that this runner works on at a time"
    );
    describe_counter!(
        "aod_runner_leases_lost_total",
        "leases that expired because this runner's heartbeats did not arrive"
    );
    describe_histogram!(
        "aod_stage_seconds",
        Unit::Seconds,
        "duration of the stages of a session's set-up"
    );
    describe_counter!("aod_stages_failed_total", "failed stages");
    describe_histogram!(
        "aod_first_output_seconds",
        Unit::Seconds,
        "time from a turn's claim to the first persisted byte of its agent"
    );
    describe_counter!("aod_output_bytes_total", Unit::Bytes, "output appended to event logs");
    describe_counter!("aod_takeovers_total", "turns taken over from another runner");
    describe_counter!(
        "aod_leases_lost_total",
        "turns whose log another writer continued, or that were terminated"
    );
    describe_counter!(
        "aod_follow_interruptions_total",
        "connections to an agent's output that were lost and reopened"
    );
    describe_counter!(
        "aod_outputs_failed_total",
        "turns after which some files of the agent could not be stored"
    );
    describe_counter!("aod_orphans_deleted_total", "orphaned Sprites that were deleted");
    describe_counter!(
        "aod_sprites_requests_total",
        "calls of the Sprites API, by operation and outcome"
    );
    describe_counter!("aod_sprites_retries_total", "retries of calls of the Sprites API");
    describe_histogram!(
        "aod_sprites_request_seconds",
        Unit::Seconds,
        "duration of calls of the Sprites API, including retries"
    );
    // Start at 0: Prometheus sees no increase in a series that begins with 1.
    counter!("aod_takeovers_total").increment(0);
    counter!("aod_follow_interruptions_total").increment(0);
    counter!("aod_orphans_deleted_total").increment(0);
}

/// Counts a job in `aod_runner_jobs` until it has been handled and the work that it led to has
/// ended.
pub async fn counted(job: impl Future<Output = Outcome>) -> Outcome {
    let counted = Counted::new();
    match job.await {
        Outcome::Accepted(work) => Outcome::Accepted(Box::pin(async move {
            work.await;
            drop(counted);
        })),
        outcome => outcome,
    }
}

/// One of `aod_runner_jobs`.
struct Counted;

impl Counted {
    fn new() -> Self {
        gauge!("aod_runner_jobs").increment(1);
        Self
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        gauge!("aod_runner_jobs").decrement(1);
    }
}
