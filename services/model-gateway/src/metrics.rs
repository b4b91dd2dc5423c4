//! The metrics of the model gateway.

use metrics::{describe_counter, describe_histogram};

/// Names this service's metrics and says what they mean.
pub fn describe() {
    describe_counter!(
        "aod_model_requests_total",
        "requests to model providers, by provider and outcome (the status, or refused, failed)"
    );
    describe_histogram!(
        "aod_model_first_byte_seconds",
        "time until a provider's response begins, by provider"
    );
    describe_counter!(
        "aod_model_tokens_total",
        "tokens that providers reported, by provider and kind (input, with those of caches; output)"
    );
    describe_counter!(
        "aod_model_retries_total",
        "retries after a provider's refusal, by provider and status"
    );
    describe_counter!(
        "aod_model_ends_dropped_total",
        "model requests whose end could not be reported to the scheduler"
    );
    describe_counter!(
        "aod_model_routed_requests_total",
        "requests to MCP servers and repositories, by kind (mcp, git) and outcome (the status, or refused, failed)"
    );
    describe_counter!(
        "aod_oauth_refreshes_total",
        "refreshes of access tokens of MCP servers, by outcome: renewed, refused or failed"
    );
    describe_counter!(
        "aod_model_token_redemptions_total",
        "redemptions of sessions' tokens at the vault, by outcome"
    );
}
