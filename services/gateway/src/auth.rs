//! Who calls: the `Authorization` header, verified by the auth service, remembered for less than a second.

use std::time::Duration;

use axum::{
    extract::FromRequestParts,
    http::{header, request::Parts},
};
use bus::Failure;
use contract::{auth::VerifyKeyRequest, rpc};
use moka::future::Cache;
use types::{ApiKey, KeyHash};

use crate::{App, RPC_DEADLINE, error::ApiError};

/// A deactivated key stops working within a second (contract §2).
const REMEMBERED: Duration = Duration::from_millis(800);
const KEYS_MAX: u64 = 100_000;

/// The authenticated user. A handler that takes one is for users only.
#[derive(Clone, Debug)]
pub struct Caller {
    pub user_id: String,
    pub session_limit: Option<u32>,
}

/// Keys that were just verified. Concurrent requests with one key ask once.
#[derive(Clone)]
pub struct KeyCache(Cache<KeyHash, Caller>);

impl KeyCache {
    pub fn new() -> Self {
        Self(Cache::builder().max_capacity(KEYS_MAX).time_to_live(REMEMBERED).build())
    }
}

impl FromRequestParts<App> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let malformed = || ApiError::unauthorized("Missing or malformed Authorization header");
        let header = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).ok_or_else(malformed)?;
        let (scheme, token) = header.split_once(' ').ok_or_else(malformed)?;
        if !scheme.eq_ignore_ascii_case("bearer") || token.trim().is_empty() {
            return Err(malformed());
        }
        let key = ApiKey::parse(token.trim()).map_err(|_| ApiError::unauthorized("Invalid API key"))?;
        let hash = key.hash();
        let verified = app.keys.0.try_get_with(hash, verify(app, hash)).await;
        verified.map_err(|failure| ApiError::from((*failure).clone()))
    }
}

async fn verify(app: &App, hash: KeyHash) -> Result<Caller, Failure> {
    let request = VerifyKeyRequest { key_hash: hash.as_bytes().to_vec() };
    let reply = app.bus.call::<rpc::VerifyKey>(&request, RPC_DEADLINE).await?;
    Ok(Caller { user_id: reply.user_id, session_limit: reply.session_limit })
}
