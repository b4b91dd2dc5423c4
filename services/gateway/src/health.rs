//! Whether the service works, and whether this process does.

use std::time::Duration;

use axum::{Json, extract::State, http::StatusCode};
use contract::{common::Empty, rpc};
use serde::Serialize;
use utoipa::ToSchema;

use crate::App;

const DEADLINE: Duration = Duration::from_secs(2);

/// `ok` or `failed` for each part.
#[derive(Serialize, ToSchema)]
pub struct Checks {
    nats: &'static str,
    auth: &'static str,
    scheduler: &'static str,
    credential_vault: &'static str,
}

/// Whether the service works.
#[derive(Serialize, ToSchema)]
pub struct Health {
    /// `ok` or `unhealthy`.
    status: &'static str,
    checks: Checks,
}

/// Check the whole service
///
/// A real query of every service, and a real encryption in the vault.
#[utoipa::path(get, path = "/health", tag = "health", security(()),
    responses((status = 200, description = "All is well", body = Health), (status = 503, description = "Something is not", body = Health)))]
pub async fn health(State(app): State<App>) -> (StatusCode, Json<Health>) {
    let (auth, vault, scheduler) = tokio::join!(
        app.bus.call::<rpc::AuthHealth>(&Empty {}, DEADLINE),
        app.bus.call::<rpc::VaultHealth>(&Empty {}, DEADLINE),
        app.bus.call::<rpc::SchedulerHealth>(&Empty {}, DEADLINE),
    );
    let connected = app.bus.is_connected();
    let healthy = connected && auth.is_ok() && vault.is_ok() && scheduler.is_ok();
    let word = |ok: bool| if ok { "ok" } else { "failed" };
    let checks = Checks {
        nats: word(connected),
        auth: word(auth.is_ok()),
        scheduler: word(scheduler.is_ok()),
        credential_vault: word(vault.is_ok()),
    };
    let status = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(Health { status: if healthy { "ok" } else { "unhealthy" }, checks }))
}

/// Whether this process lives
#[utoipa::path(get, path = "/livez", tag = "health", security(()),
    responses((status = 200, description = "It does", body = String, content_type = "text/plain")))]
pub async fn livez() -> &'static str {
    "ok\n"
}

/// Whether this process can serve
#[utoipa::path(get, path = "/readyz", tag = "health", security(()),
    responses((status = 200, description = "It can", body = String, content_type = "text/plain"),
              (status = 503, description = "It cannot, and why", body = String, content_type = "text/plain")))]
pub async fn readyz(State(app): State<App>) -> (StatusCode, String) {
    match app.lifecycle.unready() {
        reasons if reasons.is_empty() => (StatusCode::OK, "ok\n".to_owned()),
        reasons => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {}\n", reasons.join(", "))),
    }
}
