//! What the gateway counts.

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram};

/// Names this service's metrics and says what they mean.
pub fn describe() {
    describe_counter!("aod_http_requests_total", "requests answered, by route, method and status");
    describe_histogram!("aod_http_request_seconds", Unit::Seconds, "from a request's head to its answer's head");
    describe_counter!("aod_http_connections_total", "connections accepted");
    describe_counter!("aod_auth_failures_total", "requests with a key that is not known");
    describe_gauge!("aod_stream_clients", "clients that follow a session");
    describe_gauge!("aod_followed_sessions", "sessions that they follow");
    describe_histogram!("aod_stream_first_event_seconds", Unit::Seconds, "from a stream's start to its first event on record");
    describe_gauge!(
        "aod_sessions_read_from_postgres",
        "sessions that they follow in Postgres, for the live subscription missed something or is interrupted"
    );
    describe_counter!("aod_live_gaps_total", "entries that a live subscription missed, and that were read from Postgres");
    describe_counter!("aod_stream_fallbacks_total", "slow readers that went back to the record");
    describe_counter!("aod_stream_cuts_total", "readers that were cut for taking nothing");
    // There from the beginning: an increase from nothing is none to Prometheus.
    counter!("aod_stream_cuts_total").increment(0);
}
