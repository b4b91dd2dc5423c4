//! Whether the service works, and whether this process does.

use std::time::Duration;

use axum::{Json, extract::State, http::StatusCode};
use contract::{common::Empty, rpc};
use serde_json::{Value, json};

use crate::App;

const DEADLINE: Duration = Duration::from_secs(2);

/// A real query of every service, and a real encryption in the vault.
pub async fn health(State(app): State<App>) -> (StatusCode, Json<Value>) {
    let (auth, vault, scheduler) = tokio::join!(
        app.bus.call::<rpc::AuthHealth>(&Empty {}, DEADLINE),
        app.bus.call::<rpc::VaultHealth>(&Empty {}, DEADLINE),
        app.bus.call::<rpc::SchedulerHealth>(&Empty {}, DEADLINE),
    );
    let checks =
        [("nats", app.bus.is_connected()), ("auth", auth.is_ok()), ("scheduler", scheduler.is_ok()), ("credential_vault", vault.is_ok())];
    let healthy = checks.iter().all(|(_, ok)| *ok);
    let word = |ok: bool| if ok { "ok" } else { "failed" };
    let checks: serde_json::Map<_, _> = checks.into_iter().map(|(name, ok)| (name.to_owned(), Value::from(word(ok)))).collect();
    let status = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(json!({ "status": if healthy { "ok" } else { "unhealthy" }, "checks": checks })))
}

pub async fn livez() -> &'static str {
    "ok\n"
}

pub async fn readyz(State(app): State<App>) -> (StatusCode, String) {
    match app.lifecycle.unready() {
        reasons if reasons.is_empty() => (StatusCode::OK, "ok\n".to_owned()),
        reasons => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {}\n", reasons.join(", "))),
    }
}
