//! W3C trace context: a span's place in its trace, as a header that goes with requests and
//! messages.
//!
//! Spans are `tracing`'s; the chassis gives them their ids (`service::telemetry`). Without it
//! nothing here has an id.

use std::collections::HashMap;

use contract::header;
use opentelemetry::{
    Context,
    propagation::TextMapPropagator as _,
    trace::{SpanContext, TraceContextExt as _},
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// `00-`, 32 digits, `-`, 16 digits, `-01`.
const TRACEPARENT_BYTES: usize = 55;

/// Makes a span part of the trace that a `traceparent` names, of a new one where it names none, and
/// shows the trace's id in the span's field `trace_id`.
pub fn follow(span: &Span, traceparent: Option<&str>) {
    // Fails where there is no telemetry: then there is no trace either.
    let _ = span.set_parent(parent(traceparent));
    if let Some(id) = id_of(span) {
        span.record("trace_id", id);
    }
}

/// The `traceparent` of the work at hand.
#[must_use]
pub fn traceparent() -> Option<String> {
    let mut headers = HashMap::new();
    TraceContextPropagator::new().inject_context(&Span::current().context(), &mut headers);
    headers.remove(header::TRACEPARENT)
}

/// The id of the trace that the work at hand belongs to: 32 hex digits, what logs and error answers
/// show.
#[must_use]
pub fn id() -> Option<String> {
    id_of(&Span::current())
}

fn id_of(span: &Span) -> Option<String> {
    let context: SpanContext = span.context().span().span_context().clone();
    context.is_valid().then(|| context.trace_id().to_string())
}

fn parent(traceparent: Option<&str>) -> Context {
    // The propagator takes shorter ids than there are.
    let headers = traceparent
        .filter(|value| value.len() >= TRACEPARENT_BYTES)
        .map(|value| (header::TRACEPARENT.to_owned(), value.to_owned()));
    TraceContextPropagator::new()
        .extract_with_context(&Context::new(), &headers.into_iter().collect::<HashMap<_, _>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invalid_header_starts_a_new_trace() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(
            parent(Some(good)).span().span_context().trace_id().to_string(),
            "0af7651916cd43dd8448eb211c80319c"
        );
        for bad in [
            "",
            "00-1-2-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        ] {
            assert!(!parent(Some(bad)).span().span_context().is_valid(), "{bad}");
        }
    }
}
