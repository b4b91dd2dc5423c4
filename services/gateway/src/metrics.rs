//! What the gateway counts.

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram};

/// Names this service's metrics and says what they mean.
pub fn describe() {
    describe_counter!("aod_http_requests_total", "requests answered, by route, method and status");
    describe_histogram!(
        "aod_http_request_seconds",
        Unit::Seconds,
        "time from a request's headers to its response's headers"
    );
    describe_counter!("aod_http_connections_total", "connections accepted");
    describe_counter!("aod_auth_failures_total", "requests with an unknown API key");
    describe_gauge!("aod_stream_clients", "open event streams of clients");
    describe_gauge!("aod_followed_sessions", "sessions with at least one open stream");
    describe_histogram!(
        "aod_stream_first_event_seconds",
        Unit::Seconds,
        "time from a stream's start to its first persisted event"
    );
    describe_gauge!(
        "aod_sessions_read_from_postgres",
        "followed sessions that are read from Postgres, because the live subscription missed an event or is interrupted"
    );
    describe_counter!(
        "aod_live_gaps_total",
        "events that a live subscription missed and that were read from Postgres"
    );
    describe_counter!(
        "aod_stream_fallbacks_total",
        "slow readers that fell back to the event log in Postgres"
    );
    describe_counter!(
        "aod_stream_cuts_total",
        "connections closed because the client accepted nothing"
    );
    // There from the beginning: an increase from nothing is none to Prometheus.
    counter!("aod_stream_cuts_total").increment(0);
}
