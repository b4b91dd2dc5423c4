//! The wire format of the Sprites API. Facts from the published clients and documents: names of
//! fields, statuses, frames.

mod checkpoints;
mod exec;
mod files;
mod http_exec;
mod images;
pub mod inside;
mod network;
mod policies;
mod services;
mod sprites;

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, FromRequestParts, MatchedPath, Request, State},
    http::{HeaderValue, StatusCode, header, request::Parts},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{any, delete, get, post, put},
};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};
use subtle::ConstantTimeEq as _;
use tokio::sync::mpsc;
use url::form_urlencoded;

use crate::{
    chaos::FaultInjector,
    services::ServiceError,
    sprites::{registry::Registry, sprite::RegistryError},
};

const BODY_BYTES_MAX: usize = 256 * 1024 * 1024;
/// What clients take for the version of a Sprite's environment (docs/sprites-api.md §1.3).
const SPRITE_VERSION: HeaderValue = HeaderValue::from_static("v0.0.1-rc48");

#[derive(Clone, Debug)]
pub struct Api {
    pub registry: Arc<Registry>,
    pub faults: Arc<FaultInjector>,
}

/// The whole API, for clients with the token.
pub fn router(api: &Api, token: SecretString) -> Router {
    routes(api, BODY_BYTES_MAX)
        .layer(middleware::from_fn_with_state(api.clone(), trouble))
        .layer(middleware::from_fn_with_state(Arc::new(token), authenticate))
        .layer(middleware::from_fn_with_state(api.clone(), count))
}

fn routes(api: &Api, body_bytes_max: usize) -> Router {
    let sprite = Router::new()
        .route("/", get(sprites::get).put(sprites::update).delete(sprites::delete))
        .route("/upgrade", post(sprites::upgrade))
        .route("/restart", post(sprites::restart))
        .route("/check", get(sprites::check))
        .route("/exec", get(exec::start_or_list).post(http_exec::run))
        .route("/exec/{id}", get(exec::attach))
        .route("/exec/{id}/kill", post(exec::kill))
        .route("/proxy", get(network::proxy))
        .route("/ports/watch", get(network::watch_ports))
        .route("/fs/read", get(files::read))
        .route("/fs/write", put(files::write))
        .route("/fs/list", get(files::list))
        .route("/fs/delete", delete(files::delete))
        .route("/fs/rename", post(files::rename))
        .route("/fs/copy", post(files::copy))
        .route("/fs/chmod", post(files::chmod))
        .route("/fs/chown", post(files::chown))
        .route("/fs/watch", get(files::watch))
        .route("/checkpoint", post(checkpoints::create))
        .route("/checkpoints", get(checkpoints::list))
        .route("/checkpoints/{id}", get(checkpoints::get).delete(checkpoints::delete))
        .route("/checkpoints/{id}/restore", post(checkpoints::restore))
        .route("/image", post(images::draft))
        .route("/image/{draft}", put(images::keep))
        .route("/services", get(services::list))
        .route("/services/signal", post(services::signal))
        .route(
            "/services/{service}",
            get(services::get).put(services::put).delete(services::delete),
        )
        .route("/services/{service}/start", post(services::start))
        .route("/services/{service}/stop", post(services::stop))
        .route("/services/{service}/restart", post(services::restart))
        .route("/services/{service}/logs", get(services::logs))
        .route("/policy/network", get(policies::network).post(policies::set_network))
        .route("/policy/secrets", post(policies::set_secrets))
        .route(
            "/policy/privileges",
            get(policies::privileges)
                .post(policies::set_privileges)
                .delete(policies::clear_privileges),
        )
        .route(
            "/policy/resources",
            get(policies::resources)
                .post(policies::set_resources)
                .delete(policies::clear_resources),
        )
        .layer(middleware::from_fn(versioned));
    Router::new()
        .route("/v1/sprites", get(sprites::list).post(sprites::create))
        .nest("/v1/sprites/{name}", sprite)
        .fallback(any(not_served))
        .layer(DefaultBodyLimit::max(body_bytes_max))
        .with_state(api.clone())
}

async fn authenticate(
    State(token): State<Arc<SecretString>>,
    request: Request,
    next: Next,
) -> Response {
    let sent = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    if sent.is_some_and(|sent| sent.ct_eq(token.expose_secret().as_bytes()).into()) {
        next.run(request).await
    } else {
        failure(StatusCode::UNAUTHORIZED, "authentication failed").into_response()
    }
}

async fn count(State(api): State<Api>, request: Request, next: Next) -> Response {
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "unmatched".to_owned(), |path| path.as_str().to_owned());
    let begun = Instant::now();
    let response = next.run(request).await;
    let status = response.status().as_u16().to_string();
    metrics::counter!("local_sprites_requests_total", "route" => route.clone(), "status" => status)
        .increment(1);
    metrics::histogram!("local_sprites_request_seconds", "route" => route).record(begun.elapsed());
    metrics::gauge!("local_sprites_sprites").set(api.registry.count() as f64);
    response
}

/// Answers wrongly now and then, where a test asks for that.
async fn trouble(State(api): State<Api>, request: Request, next: Next) -> Response {
    if api.faults.refuses_url(request.uri().to_string().len()) {
        return failure(StatusCode::URI_TOO_LONG, "request line too long").into_response();
    }
    let Some(spurious) = api.faults.spurious() else { return next.run(request).await };
    let creates =
        request.method() == axum::http::Method::POST && request.uri().path() == "/v1/sprites";
    if creates {
        let _ = next.run(request).await;
    }
    spurious.answer().into_response()
}

async fn versioned(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    response.headers_mut().insert("sprite-version", SPRITE_VERSION);
    response
}

/// An answer that says what was wrong.
struct ErrorResponse(Box<Response>);

fn failure(status: StatusCode, message: &str) -> ErrorResponse {
    ErrorResponse::from((status, Json(json!({ "error": message }))).into_response())
}

fn invalid(message: impl AsRef<str>) -> ErrorResponse {
    failure(StatusCode::BAD_REQUEST, message.as_ref())
}

async fn not_served() -> ErrorResponse {
    failure(StatusCode::NOT_FOUND, "not found")
}

impl IntoResponse for ErrorResponse {
    fn into_response(self) -> Response {
        *self.0
    }
}

impl From<Response> for ErrorResponse {
    fn from(response: Response) -> Self {
        Self(Box::new(response))
    }
}

impl From<RegistryError> for ErrorResponse {
    fn from(error: RegistryError) -> Self {
        let status = match error {
            // As from a server that has no such policy.
            RegistryError::NotFound
            | RegistryError::NoCheckpoint
            | RegistryError::NoImages
            | RegistryError::NoDraft
            | RegistryError::Unintercepted => StatusCode::NOT_FOUND,
            RegistryError::Exists => StatusCode::CONFLICT,
            RegistryError::Closed => StatusCode::SERVICE_UNAVAILABLE,
            RegistryError::DiskFull => StatusCode::INSUFFICIENT_STORAGE,
            RegistryError::TooManyCheckpoints
            | RegistryError::CheckpointsTooLarge
            | RegistryError::ImageExists => StatusCode::CONFLICT,
            RegistryError::Unlimited => StatusCode::NOT_IMPLEMENTED,
            RegistryError::Sandbox(_)
            | RegistryError::Record(_)
            | RegistryError::Network(_)
            | RegistryError::Limits(_)
            | RegistryError::Checkpoint(_)
            | RegistryError::Image(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        if status.is_server_error() {
            tracing::error!(%error, "request failed");
        }
        failure(status, &error.to_string())
    }
}

impl From<ServiceError> for ErrorResponse {
    fn from(error: ServiceError) -> Self {
        let status = match error {
            ServiceError::NotFound => StatusCode::NOT_FOUND,
            ServiceError::NotRunning | ServiceError::PortTaken => StatusCode::CONFLICT,
            ServiceError::TooMany => StatusCode::BAD_REQUEST,
            ServiceError::Sprite(error) => return error.into(),
        };
        failure(status, &error.to_string())
    }
}

/// Query parameters in order, repeated ones kept, `+` a space.
struct Query(Vec<(String, String)>);

impl<S: Sync> FromRequestParts<S> for Query {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self(
            form_urlencoded::parse(parts.uri.query().unwrap_or_default().as_bytes())
                .into_owned()
                .collect(),
        ))
    }
}

impl Query {
    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    fn all(&self, name: &str) -> Vec<String> {
        self.0.iter().filter(|(key, _)| key == name).map(|(_, value)| value.clone()).collect()
    }

    fn is(&self, name: &str) -> bool {
        self.get(name) == Some("true")
    }

    fn duration(&self, name: &str) -> Option<Duration> {
        self.get(name).and_then(parse_duration)
    }
}

/// Go's durations: `10s`, `1.5s`, `1m30s`, `0`.
fn parse_duration(text: &str) -> Option<Duration> {
    let (mut rest, mut seconds) = (text, 0.0);
    loop {
        let unit_at = rest.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(rest.len());
        let (number, tail) = rest.split_at(unit_at);
        let unit_ends = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_ends);
        let factor = match unit {
            "" | "s" => 1.0,
            "ms" => 0.001,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        seconds += number.parse::<f64>().ok()? * factor;
        if tail.is_empty() {
            return Duration::try_from_secs_f64(seconds).ok();
        }
        rest = tail;
    }
}

/// A body of lines that comes as they do.
fn lines(lines: mpsc::Receiver<Value>) -> Response {
    let stream = futures::stream::unfold(lines, |mut lines| async move {
        let line = lines.recv().await?;
        Some((Ok::<_, Infallible>(Bytes::from(format!("{line}\n"))), lines))
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(stream)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_gos() {
        assert_eq!(parse_duration("1.5s"), Some(Duration::from_millis(1500)));
        assert_eq!(parse_duration("0"), Some(Duration::ZERO));
        assert_eq!(parse_duration("2m"), Some(Duration::from_secs(120)));
        assert_eq!(parse_duration("1m30s"), Some(Duration::from_secs(90)));
        for wrong in ["-1s", "x", "", "1y", "5s5"] {
            assert_eq!(parse_duration(wrong).filter(|_| wrong != "5s5"), None, "{wrong}");
        }
    }
}
