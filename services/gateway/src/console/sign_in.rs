//! Sign-in of browsers: an API key is exchanged for a token in a cookie, so that no script and no
//! storage of the browser holds the key.
//!
//! The cookie is `HttpOnly` and `SameSite=Strict`, and counts only on requests that carry the
//! header `X-Aod-Console`. Other origins of the same site, which `SameSite` does not keep out,
//! cannot send that header: the API's CORS policy does not allow it.

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header, request::Parts},
    response::{IntoResponse as _, Response},
};
use bus::RpcError;
use contract::{
    auth::{
        self, CreateConsoleSessionRequest, EndConsoleSessionRequest, FindConsoleSessionRequest,
    },
    rpc,
};
use serde::Serialize;
use types::{ApiKey, ConsoleToken, ErrorCode, KeyHash};

use crate::{App, agents::time, auth::Caller, body::Body, error::ApiError};

/// Requests of the console carry it, whatever its value.
const CONSOLE: HeaderName = HeaderName::from_static("x-aod-console");
const COOKIE: &str = "aod_console";
/// Over HTTPS: browsers then refuse a cookie of that name that another host or an unencrypted page
/// sets.
const SECURE_COOKIE: &str = "__Host-aod_console";

/// Who is signed in.
#[derive(Serialize)]
pub struct ConsoleSession {
    user: String,
    key_name: String,
    /// The key's first 12 characters.
    key_prefix: String,
    expires_at: String,
    /// Runtimes that agents may have here.
    runtimes: Vec<&'static str>,
    default_timeout: u32,
}

impl ConsoleSession {
    fn new(app: &App, session: auth::ConsoleSession) -> Self {
        Self {
            user: session.user_name,
            key_name: session.key_name,
            key_prefix: session.key_prefix,
            expires_at: time(session.expires_at_us),
            runtimes: app.runtimes().iter().map(|runtime| runtime.as_str()).collect(),
            default_timeout: app.config.default_timeout_seconds,
        }
    }
}

/// The token of the console session that a request belongs to. None where other sites may have
/// caused the request.
pub fn token(headers: &HeaderMap) -> Option<ConsoleToken> {
    if !is_of_the_console(headers) {
        return None;
    }
    let cookies = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let named = |name: &'static str| {
        move |pair: &str| {
            let (key, value) = pair.split_once('=')?;
            (key.trim() == name).then(|| ConsoleToken::parse(value.trim()).ok()).flatten()
        }
    };
    let pairs: Vec<&str> = cookies.flat_map(|value| value.split(';')).collect();
    [SECURE_COOKIE, COOKIE].into_iter().find_map(|name| pairs.iter().copied().find_map(named(name)))
}

fn is_of_the_console(headers: &HeaderMap) -> bool {
    let from_here = headers.get("sec-fetch-site").is_none_or(|site| site == "same-origin");
    headers.contains_key(CONSOLE) && from_here
}

/// Sign in with an API key.
pub async fn sign_in(
    State(app): State<App>,
    parts: Parts,
    body: Body,
) -> Result<Response, ApiError> {
    if !is_of_the_console(&parts.headers) {
        return Err(ApiError::new(StatusCode::FORBIDDEN, "Sign in from the console's own page"));
    }
    let mut fields = body.fields()?;
    let key = fields.string("api_key", 200);
    fields.finish()?;
    let (token, client) =
        (ConsoleToken::generate().map_err(RpcError::internal)?, app.limits.client(&parts));
    let created = match ApiKey::parse(key.trim()) {
        Ok(key) => {
            let request = CreateConsoleSessionRequest {
                key_hash: key.hash().as_bytes().to_vec(),
                token_hash: token.hash().as_bytes().to_vec(),
                expires_in_seconds: app.config.console_session_seconds,
            };
            app.bus.call::<rpc::CreateConsoleSession>(&request, crate::RPC_DEADLINE).await
        }
        Err(_) => Err(RpcError::new(ErrorCode::Unauthenticated, "Invalid API key")),
    };
    if created.as_ref().is_err_and(|failure| failure.code == ErrorCode::Unauthenticated) {
        app.limits
            .note_failure(client)
            .map_err(|later| ApiError::try_later("Too many failed authentications", later))?;
    }
    let session = ConsoleSession::new(&app, created?);
    let cookie = cookie(&parts.headers, token.reveal(), app.config.console_session_seconds);
    Ok((StatusCode::CREATED, [(header::SET_COOKIE, cookie?)], Json(session)).into_response())
}

/// Who is signed in.
pub async fn current(
    State(app): State<App>,
    caller: Caller,
) -> Result<Json<ConsoleSession>, ApiError> {
    let request = FindConsoleSessionRequest { token_hash: hash(caller.key) };
    let session = app.call::<rpc::FindConsoleSession>(&request).await?;
    Ok(Json(ConsoleSession::new(&app, session)))
}

/// Sign out: the session ends on every gateway, and the browser forgets its cookie. Also answers a
/// session that has ended already.
pub async fn sign_out(State(app): State<App>, headers: HeaderMap) -> Result<Response, ApiError> {
    if !is_of_the_console(&headers) {
        return Err(ApiError::new(StatusCode::FORBIDDEN, "Sign out from the console's own page"));
    }
    if let Some(token) = token(&headers) {
        app.call::<rpc::EndConsoleSession>(&EndConsoleSessionRequest {
            token_hash: hash(token.hash()),
        })
        .await?;
        app.keys.forget(token.hash()).await;
    }
    let cookie = cookie(&headers, "", 0)?;
    Ok((
        StatusCode::OK,
        [(header::SET_COOKIE, cookie)],
        Json(serde_json::json!({ "detail": "Signed out" })),
    )
        .into_response())
}

fn hash(hash: KeyHash) -> Vec<u8> {
    hash.as_bytes().to_vec()
}

/// A page that was loaded over HTTPS says so in `Origin`, also where a proxy ends TLS.
fn cookie(headers: &HeaderMap, value: &str, seconds: u32) -> Result<HeaderValue, ApiError> {
    let secure = headers
        .get(header::ORIGIN)
        .is_some_and(|origin| origin.as_bytes().starts_with(b"https://"));
    let (name, secure) = if secure { (SECURE_COOKIE, "; Secure") } else { (COOKIE, "") };
    let text =
        format!("{name}={value}; Path=/; HttpOnly; SameSite=Strict; Max-Age={seconds}{secure}");
    HeaderValue::from_str(&text).map_err(|error| RpcError::internal(error).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| {
                (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
            })
            .collect()
    }

    #[test]
    fn a_cookie_counts_only_on_requests_that_no_other_origin_can_send() {
        let fresh = ConsoleToken::generate().unwrap();
        let cookie = format!("theme=dark; aod_console={}", fresh.reveal());
        let found =
            |pairs: &[(&'static str, &str)]| token(&headers(pairs)).map(|token| token.hash());
        assert_eq!(found(&[("cookie", &cookie), ("x-aod-console", "1")]), Some(fresh.hash()));
        assert_eq!(
            found(&[
                ("cookie", &cookie),
                ("x-aod-console", "1"),
                ("sec-fetch-site", "same-origin")
            ]),
            Some(fresh.hash())
        );
        assert_eq!(found(&[("cookie", &cookie)]), None);
        for site in ["cross-site", "same-site", "none"] {
            assert_eq!(
                found(&[("cookie", &cookie), ("x-aod-console", "1"), ("sec-fetch-site", site)]),
                None,
                "{site}"
            );
        }
        assert_eq!(found(&[("cookie", "aod_console=nonsense"), ("x-aod-console", "1")]), None);
    }

    #[test]
    fn a_cookie_is_secure_where_the_page_is() {
        let of = |origin: &str| {
            cookie(&headers(&[("origin", origin)]), "t", 60).unwrap().to_str().unwrap().to_owned()
        };
        assert_eq!(
            of("http://127.0.0.1:8777"),
            "aod_console=t; Path=/; HttpOnly; SameSite=Strict; Max-Age=60"
        );
        assert_eq!(
            of("https://aod.example.com"),
            "__Host-aod_console=t; Path=/; HttpOnly; SameSite=Strict; Max-Age=60; Secure"
        );
    }
}
