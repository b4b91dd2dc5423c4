//! The metrics of the vault.

use metrics::{counter, describe_counter};

/// Names this service's metrics and says what they mean.
pub fn describe() {
    describe_counter!(
        "aod_vault_operations_total",
        "encryptions, decryptions and rewraps, by operation and outcome"
    );
    // There from the beginning: an increase from nothing is none to Prometheus.
    for operation in ["encrypt", "decrypt", "rewrap"] {
        counter!("aod_vault_operations_total", "operation" => operation, "outcome" => "failed")
            .increment(0);
    }
}
