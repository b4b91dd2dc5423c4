//! Policies of a Sprite: network, privileges and resources (docs/sprites-api.md §8).

use axum::{
    Json,
    body::Bytes,
    extract::{Path, State},
    http::StatusCode,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Api, ErrorResponse, invalid};
use crate::{
    isolation::launch::Privileges,
    network::{
        policy::Policy,
        substitution::{Secret, Secrets},
    },
    sprites::sprite::PrivilegesPolicy,
};

const MEMORY_MB_MIN: u64 = 64;
const MEMORY_MB_MAX: u64 = 1 << 20;

fn parse<'a, T: Deserialize<'a>>(what: &str, body: &'a Bytes) -> Result<T, ErrorResponse> {
    serde_json::from_slice(body).map_err(|error| invalid(format!("invalid {what} policy: {error}")))
}

pub async fn network(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<Json<Policy>, ErrorResponse> {
    Ok(Json(api.registry.get(&name)?.record().policy))
}

pub async fn set_network(
    State(api): State<Api>,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<StatusCode, ErrorResponse> {
    let policy: Policy = parse("network", &body)?;
    if let Some(problem) = policy.problem() {
        return Err(invalid(format!("invalid network policy: {problem}")));
    }
    api.registry.set_policy(&name, policy).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SecretsPolicy {
    secrets: Vec<Secret>,
}

/// An addition of this server (docs/sprites-api.md §8.4).
pub async fn set_secrets(
    State(api): State<Api>,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<Json<Value>, ErrorResponse> {
    // Not with the parser's words: they may quote a value.
    let policy: SecretsPolicy =
        serde_json::from_slice(&body).map_err(|_| invalid("invalid secrets policy"))?;
    let secrets = Secrets::new(policy.secrets)
        .map_err(|problem| invalid(format!("invalid secrets policy: {problem}")))?;
    Ok(Json(json!({ "environment": api.registry.set_secrets(&name, secrets).await? })))
}

pub async fn privileges(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<Json<PrivilegesPolicy>, ErrorResponse> {
    Ok(Json(api.registry.get(&name)?.record().privileges.unwrap_or_default()))
}

/// Holds for what is started from now on.
pub async fn set_privileges(
    State(api): State<Api>,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<StatusCode, ErrorResponse> {
    let policy: PrivilegesPolicy = parse("privileges", &body)?;
    if !policy.devices.is_empty() {
        return Err(invalid("this server has no devices to give"));
    }
    if let Some(runtime) = api
        .registry
        .sandboxes
        .runtime_without_privileges()
        .filter(|_| policy.profile != Privileges::Minimal)
    {
        return Err(invalid(format!(
            "with {runtime} programs have no rights but those of their user: only minimal is supported"
        )));
    }
    let sprite = api.registry.get(&name)?;
    sprite.change(|record| record.privileges = Some(policy))?;
    Ok(StatusCode::NO_CONTENT)
}

pub async fn clear_privileges(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<StatusCode, ErrorResponse> {
    api.registry.get(&name)?.change(|record| record.privileges = None)?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
struct ResourcesPolicy {
    memory: Option<Memory>,
}

#[derive(Deserialize)]
struct Memory {
    limit_mb: Option<u64>,
}

pub async fn resources(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ErrorResponse> {
    let limit = api.registry.get(&name)?.record().memory_limit_mb;
    Ok(Json(match limit {
        Some(limit_mb) => json!({ "memory": { "limit_mb": limit_mb, "autoscale": false } }),
        None => json!({}),
    }))
}

pub async fn set_resources(
    State(api): State<Api>,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<StatusCode, ErrorResponse> {
    let policy: ResourcesPolicy = parse("resources", &body)?;
    let limit_mb = policy.memory.and_then(|memory| memory.limit_mb);
    if limit_mb.is_some_and(|limit| !(MEMORY_MB_MIN..=MEMORY_MB_MAX).contains(&limit)) {
        let range = format!("memory.limit_mb is between {MEMORY_MB_MIN} and {MEMORY_MB_MAX}");
        return Err(invalid(range));
    }
    api.registry.set_memory_limit(&name, limit_mb)?;
    Ok(StatusCode::NO_CONTENT)
}

pub async fn clear_resources(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<StatusCode, ErrorResponse> {
    api.registry.set_memory_limit(&name, None)?;
    Ok(StatusCode::NO_CONTENT)
}
