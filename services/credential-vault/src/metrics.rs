//! What the vault counts.

use metrics::describe_counter;

/// Names this service's metrics and says what they mean.
pub fn describe() {
    describe_counter!("aod_vault_operations_total", "encryptions, decryptions and rewraps, by operation and outcome");
}
