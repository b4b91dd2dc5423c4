//! What the model gateway counts.

use metrics::{describe_counter, describe_histogram};

/// Names this service's metrics and says what they mean.
pub fn describe() {
    describe_counter!("aod_model_requests_total", "requests to model providers, by provider and outcome (the status, or refused, failed)");
    describe_histogram!("aod_model_first_byte_seconds", "time until a provider's response begins, by provider");
    describe_counter!("aod_model_token_redemptions_total", "redemptions of sessions' tokens at the vault, by outcome");
}
