//! Authentication: the `Authorization` header or the console's cookie, verified by the auth service
//! and cached for less than a second.

use std::time::Duration;

use axum::{
    extract::FromRequestParts,
    http::{header, request::Parts},
};
use bus::RpcError;
use contract::{auth::VerifyKeyRequest, rpc};
use moka::future::Cache;
use types::{ApiKey, ErrorCode, KeyHash};

use crate::{App, RPC_DEADLINE, console, error::ApiError, v1::error::is_under_v1};

/// A deactivated key stops working within a second (docs/api.md §2).
const REMEMBERED: Duration = Duration::from_millis(800);
const KEYS_MAX: u64 = 100_000;

/// The authenticated user. A handler that takes one is for users only.
#[derive(Clone, Debug)]
pub struct Caller {
    pub user_id: String,
    pub session_limit: Option<u32>,
    pub key_id: String,
    pub key: KeyHash,
    /// Signed in to the console by a cookie.
    pub is_browser: bool,
}

/// Keys that were just verified. Concurrent requests with one key send one request to auth.
#[derive(Clone)]
pub struct KeyCache(Cache<KeyHash, Caller>);

impl KeyCache {
    pub fn new() -> Self {
        Self(Cache::builder().max_capacity(KEYS_MAX).time_to_live(REMEMBERED).build())
    }

    /// Removes the key of a console session that was signed out, so that it ends at once on this
    /// gateway.
    pub async fn forget(&self, key: KeyHash) {
        self.0.invalidate(&key).await;
    }
}

impl FromRequestParts<App> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let (hash, is_browser) = match (
            bearer(parts).or_else(|| x_api_key(parts)),
            console::sign_in::token(&parts.headers),
        ) {
            (Some(key), _) => (ApiKey::parse(key).ok().map(|key| key.hash()), false),
            (None, Some(token)) => (Some(token.hash()), true),
            (None, None) => {
                return Err(ApiError::unauthorized("Missing or malformed Authorization header"));
            }
        };
        let client = app.limits.client(parts);
        let verified = match hash {
            Some(hash) => verify(app, hash).await.map(|caller| Caller { is_browser, ..caller }),
            None => Err(RpcError::new(ErrorCode::Unauthenticated, "Invalid API key")),
        };
        if verified.as_ref().is_err_and(|failure| failure.code == ErrorCode::Unauthenticated) {
            app.limits
                .note_failure(client)
                .map_err(|later| ApiError::try_later("Too many failed authentications", later))?;
        }
        let caller = verified?;
        if let Some(hash) = hash {
            app.limits
                .check_rate(hash)
                .map_err(|later| ApiError::try_later("Too many requests", later))?;
        }
        Ok(caller)
    }
}

fn bearer(parts: &Parts) -> Option<&str> {
    let (scheme, token) =
        parts.headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    Some(token.trim()).filter(|token| scheme.eq_ignore_ascii_case("bearer") && !token.is_empty())
}

/// The header of Anthropic's SDKs.
fn x_api_key(parts: &Parts) -> Option<&str> {
    let value = parts.headers.get("x-api-key").filter(|_| is_under_v1(parts.uri.path()))?;
    value.to_str().ok().map(str::trim).filter(|key| !key.is_empty())
}

/// Returns the user of a valid key.
///
/// # Errors
/// `Unauthenticated` with the reason if the key is not valid; other codes when auth does not
/// answer.
pub async fn verify(app: &App, key: KeyHash) -> Result<Caller, RpcError> {
    let ask = async {
        let request = VerifyKeyRequest { key_hash: key.as_bytes().to_vec() };
        let reply = app.bus.call::<rpc::VerifyKey>(&request, RPC_DEADLINE).await?;
        Ok(Caller {
            user_id: reply.user_id,
            session_limit: reply.session_limit,
            key_id: reply.key_id,
            key,
            is_browser: false,
        })
    };
    app.keys
        .0
        .try_get_with(key, ask)
        .await
        .map_err(|failure: std::sync::Arc<RpcError>| (*failure).clone())
}
