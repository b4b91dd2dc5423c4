//! What this server counts.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

/// Names the metrics and says what they mean.
pub fn describe() {
    describe_gauge!("local_sprites_sprites", "existing Sprites, running or not");
    describe_counter!("local_sprites_requests_total", "requests answered, by route and status; a WebSocket's counts as it opens");
    describe_histogram!("local_sprites_request_seconds", Unit::Seconds, "from a request's head to its answer's head, by route");
}
