//! Whether the service works, and whether this process does.

use std::time::Duration;

use axum::{Json, extract::State, http::StatusCode};
use contract::{common::Empty, rpc};
use moka::future::Cache;
use serde::Serialize;
use utoipa::ToSchema;

use crate::App;

const DEADLINE: Duration = Duration::from_secs(2);
/// Requests within this time share one answer, for the route takes no key.
const REMEMBERED: Duration = Duration::from_secs(1);

/// The last answer.
#[derive(Clone)]
pub struct HealthCache(Cache<(), Checks>);

impl HealthCache {
    pub fn new() -> Self {
        Self(Cache::builder().max_capacity(1).time_to_live(REMEMBERED).build())
    }
}

/// `ok` or `failed` for each part.
#[derive(Clone, Copy, Serialize, ToSchema)]
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

const OK: &str = "ok";

impl Checks {
    fn are_ok(self) -> bool {
        [self.nats, self.auth, self.scheduler, self.credential_vault]
            .into_iter()
            .all(|check| check == OK)
    }
}

/// Check the whole service
///
/// Runs a query in every service and an encryption in the vault, at most once a second.
#[utoipa::path(get, path = "/health", tag = "health", security(()),
    responses((status = 200, description = "All dependencies are healthy", body = Health), (status = 503, description = "At least one dependency is not", body = Health)))]
pub async fn health(State(app): State<App>) -> (StatusCode, Json<Health>) {
    let checks = app.health.0.get_with((), check(&app)).await;
    let (status, word) = if checks.are_ok() {
        (StatusCode::OK, OK)
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "unhealthy")
    };
    (status, Json(Health { status: word, checks }))
}

async fn check(app: &App) -> Checks {
    let (auth, vault, scheduler) = tokio::join!(
        app.bus.call::<rpc::AuthHealth>(&Empty {}, DEADLINE),
        app.bus.call::<rpc::VaultHealth>(&Empty {}, DEADLINE),
        app.bus.call::<rpc::SchedulerHealth>(&Empty {}, DEADLINE),
    );
    let word = |ok: bool| if ok { OK } else { "failed" };
    Checks {
        nats: word(app.bus.is_connected()),
        auth: word(auth.is_ok()),
        scheduler: word(scheduler.is_ok()),
        credential_vault: word(vault.is_ok()),
    }
}

/// Liveness probe
#[utoipa::path(get, path = "/livez", tag = "health", security(()),
    responses((status = 200, description = "The process is running", body = String, content_type = "text/plain")))]
pub async fn livez() -> &'static str {
    "ok\n"
}

/// Readiness probe
#[utoipa::path(get, path = "/readyz", tag = "health", security(()),
    responses((status = 200, description = "The service is ready", body = String, content_type = "text/plain"),
              (status = 503, description = "The service is not ready, and why", body = String, content_type = "text/plain")))]
pub async fn readyz(State(app): State<App>) -> (StatusCode, String) {
    match app.lifecycle.unready() {
        reasons if reasons.is_empty() => (StatusCode::OK, "ok\n".to_owned()),
        reasons => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {}\n", reasons.join(", ")))
        }
    }
}
