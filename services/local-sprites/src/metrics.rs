//! The metrics of this server.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

/// Names the metrics and says what they mean.
pub fn describe() {
    describe_gauge!("local_sprites_sprites", "existing Sprites, running or not");
    describe_counter!(
        "local_sprites_requests_total",
        "requests answered, by route and status; a WebSocket counts when it opens"
    );
    describe_histogram!(
        "local_sprites_request_seconds",
        Unit::Seconds,
        "time from a request's headers to its response's headers, by route"
    );
}
