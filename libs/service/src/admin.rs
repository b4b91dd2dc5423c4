//! Health and metrics, on a listener of their own, which clients do not reach.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr},
    process::ExitCode,
    time::Duration,
};

use axum::{Router, http::StatusCode, routing::get};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;

use crate::Lifecycle;

/// Bounds of histograms, from a query to a long turn.
const SECONDS: [f64; 17] = [
    0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0,
    900.0, 3600.0,
];

/// Serves `/livez` (the process runs), `/readyz` (it should get traffic) and `/metrics` until the
/// stop.
///
/// # Errors
/// When the address cannot be bound.
pub async fn serve(addr: SocketAddr, lifecycle: &Lifecycle) -> std::io::Result<()> {
    let metrics = recorder();
    let readiness = lifecycle.clone();
    let router = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route(
            "/readyz",
            get(move || async move {
                match readiness.unready() {
                    reasons if reasons.is_empty() => (StatusCode::OK, "ok\n".to_owned()),
                    reasons => (
                        StatusCode::SERVICE_UNAVAILABLE,
                        format!("not ready: {}\n", reasons.join(", ")),
                    ),
                }
            }),
        )
        .route(
            "/metrics",
            get(move || async move { metrics.map(|handle| handle.render()).unwrap_or_default() }),
        );
    let listener = TcpListener::bind(addr).await?;
    tracing::info!(addr = %listener.local_addr()?, "admin endpoints");
    let stop = lifecycle.stop_token();
    lifecycle.spawn("admin", async move {
        let served =
            axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await;
        if let Err(error) = served {
            tracing::error!(%error, "admin endpoints ended");
        }
    });
    Ok(())
}

/// Asks the running process whether it is ready: the health check of containers that contain only
/// the service.
pub(crate) fn check_ready(addr: SocketAddr) -> ExitCode {
    const WAIT: Duration = Duration::from_secs(2);
    let ask = || -> std::io::Result<String> {
        let mut connection = std::net::TcpStream::connect_timeout(
            &SocketAddr::from((Ipv4Addr::LOCALHOST, addr.port())),
            WAIT,
        )?;
        connection.set_read_timeout(Some(WAIT))?;
        connection.write_all(b"GET /readyz HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        connection.take(4096).read_to_string(&mut answer)?;
        Ok(answer)
    };
    match ask() {
        Ok(answer) if answer.split(' ').nth(1) == Some("200") => ExitCode::SUCCESS,
        Ok(answer) => {
            eprintln!("{}", answer.lines().last().unwrap_or_default());
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("not ready: {error}");
            ExitCode::FAILURE
        }
    }
}

fn recorder() -> Option<PrometheusHandle> {
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)
        .ok()?;
    builder.install_recorder().ok()
}
