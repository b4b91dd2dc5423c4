//! Logs to standard error, text for people or JSON for machines; `RUST_LOG` sets the level. Traces
//! by OTLP, where `OTEL_*` says to.
//!
//! A trace's id is there with and without an exporter: it is the request's id, in answers and in
//! log lines.

use std::time::Duration;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::ExporterBuildError;
use opentelemetry_sdk::{
    Resource,
    trace::{Sampler, SdkTracerProvider},
};
use tracing_subscriber::{
    EnvFilter, Layer as _, filter::LevelFilter, fmt, layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};

use crate::Env;

/// Libraries that print what they carry at level TRACE, secrets among it. They are held at DEBUG,
/// whatever `RUST_LOG` says.
const CARRIERS: [&str; 3] = ["async_nats", "tokio_tungstenite", "tungstenite"];
/// How long an exit waits for a collector to take the last spans.
const FLUSH_MAX: Duration = Duration::from_secs(2);

/// Settings of logs and traces.
#[derive(Debug)]
pub struct Settings {
    json_logs: bool,
    export_traces: bool,
}

impl Settings {
    pub fn from_env(env: &mut Env) -> Self {
        let json_logs = env.parsed("AOD_LOG_JSON", "log lines as JSON", false);
        env.optional(
            "RUST_LOG",
            "log filter: a level, or one for each module, as in info,sprite_runner=debug",
        );
        let endpoint = env.optional(
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            "URL of the trace collector (OTLP over HTTP, protobuf); no traces if unset",
        );
        let traces = env.optional(
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            "the same as a complete URL, with /v1/traces",
        );
        // The exporter reads the rest by itself, as the standard has it.
        env.optional(
            "OTEL_EXPORTER_OTLP_HEADERS",
            "headers for the collector: comma-separated name=value",
        );
        env.optional(
            "OTEL_RESOURCE_ATTRIBUTES",
            "resource attributes of every span: comma-separated name=value",
        );
        env.optional(
            "OTEL_TRACES_SAMPLER",
            "which traces are sent; parentbased_always_on if unset",
        );
        env.optional("OTEL_TRACES_SAMPLER_ARG", "ratio of the sampler, 0 to 1, if it has one");
        let disabled = env.parsed("OTEL_SDK_DISABLED", "disable traces", false);
        Self { json_logs, export_traces: !disabled && (endpoint.is_some() || traces.is_some()) }
    }
}

/// The process's telemetry. Spans that wait to be sent are sent when it is dropped.
#[derive(Debug)]
pub struct Telemetry {
    tracer: SdkTracerProvider,
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Err(error) = self.tracer.shutdown_with_timeout(FLUSH_MAX) {
            tracing::warn!(%error, "failed to send the last spans");
        }
    }
}

/// Sets the process's subscriber; a second one changes nothing. Not to be called within a runtime:
/// the exporter has one of its own.
///
/// # Errors
/// When an endpoint is no URL.
pub fn init(service: &'static str, settings: &Settings) -> Result<Telemetry, ExporterBuildError> {
    let provider = SdkTracerProvider::builder()
        .with_resource(Resource::builder().with_service_name(service).build());
    let provider = if settings.export_traces {
        provider
            .with_batch_exporter(opentelemetry_otlp::SpanExporter::builder().with_http().build()?)
    } else {
        // Ids, and nothing kept for anybody.
        provider.with_sampler(Sampler::AlwaysOff)
    };
    let tracer = provider.build();
    let traces = tracing_opentelemetry::layer()
        .with_tracer(tracer.tracer("aod"))
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
        // Spans have their parents from `tracing`; nothing reads OpenTelemetry's own context, which
        // would be exchanged whenever a span is entered.
        .with_context_activation(false)
        .with_filter(LevelFilter::INFO);
    let logs = fmt::layer().with_writer(std::io::stderr);
    let logs = if settings.json_logs {
        logs.json().flatten_event(true).boxed()
    } else {
        logs.with_ansi(false).boxed()
    };
    let _ =
        tracing_subscriber::registry().with(logs.with_filter(log_filter())).with(traces).try_init();
    Ok(Telemetry { tracer })
}

fn log_filter() -> EnvFilter {
    let mut filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new("info,async_nats=warn,sqlx=warn"));
    // Without TRACE there is nothing to limit.
    for carrier in CARRIERS {
        let capped = filter.max_level_hint().is_none_or(|level| level == LevelFilter::TRACE);
        if let (true, Ok(directive)) = (capped, format!("{carrier}=debug").parse()) {
            filter = filter.add_directive(directive);
        }
    }
    filter
}
