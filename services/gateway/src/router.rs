//! Every public route.

use std::time::Instant;

use axum::{
    Router,
    extract::{MatchedPath, Request, State},
    http::{HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
    routing::{delete, get, post, put},
};
use bus::trace::{self, TraceContext};
use tower_http::{
    catch_panic::CatchPanicLayer,
    cors::{AllowOrigin, CorsLayer},
};

use crate::{App, agents, credentials, environments, error::ApiError, health, keys, sessions, stream};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

pub fn router(app: App) -> Router {
    let cors = cors(&app.config.cors_origins);
    Router::new()
        // For whoever watches over the service.
        .route("/health", get(health::health))
        .route("/livez", get(health::livez))
        .route("/readyz", get(health::readyz))
        // For users.
        .route("/agents", get(agents::list).post(agents::create))
        .route("/agents/{id}", get(agents::get))
        .route("/environments", get(environments::list).post(environments::create))
        .route("/environments/{id}", get(environments::get))
        .route("/sessions", get(sessions::list).post(sessions::create))
        .route("/sessions/{id}", get(sessions::get))
        .route("/sessions/{id}/turns", get(sessions::turns))
        .route("/sessions/{id}/prompt", post(sessions::prompt))
        .route("/sessions/{id}/terminate", post(sessions::terminate))
        .route("/sessions/{id}/stream", get(stream::stream))
        .route("/credentials", get(credentials::list))
        .route("/credentials/{kind}", put(credentials::put).delete(credentials::delete))
        .route("/api-keys", get(keys::list).post(keys::create))
        .route("/api-keys/{id}", delete(keys::deactivate))
        .method_not_allowed_fallback(|| async { ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "Method not allowed") })
        .fallback(|| async { ApiError::new(StatusCode::NOT_FOUND, "Not found") })
        // Outermost last: request id and trace, then hosts, then panics, then origins.
        .layer(cors)
        .layer(CatchPanicLayer::custom(|_: Box<dyn std::any::Any + Send>| {
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "Internal error").into_response()
        }))
        .layer(middleware::from_fn_with_state(app.clone(), check_host))
        .layer(middleware::from_fn(observe))
        .with_state(app)
}

fn cors(origins: &[String]) -> CorsLayer {
    let allow = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()))
    };
    CorsLayer::new()
        .allow_origin(allow)
        .allow_methods([Method::GET, Method::POST, Method::PUT, Method::DELETE])
        .allow_headers([
            header::AUTHORIZATION,
            header::CONTENT_TYPE,
            HeaderName::from_static("last-event-id"),
            HeaderName::from_static("idempotency-key"),
        ])
        .expose_headers([REQUEST_ID, header::RETRY_AFTER])
        .max_age(std::time::Duration::from_secs(86_400))
}

/// Gives every request a trace, whose id is the request's, and every response its id.
async fn observe(request: Request, next: Next) -> Response {
    let parent = request.headers().get(contract::header::TRACEPARENT).and_then(|value| value.to_str().ok()).and_then(TraceContext::parse);
    let context = parent.unwrap_or_else(TraceContext::root);
    let route = request.extensions().get::<MatchedPath>().map_or_else(|| "unmatched".to_owned(), |path| path.as_str().to_owned());
    let (method, begun) = (request.method().clone(), Instant::now());
    let mut response = trace::scope(context, next.run(request)).await;
    if let Ok(id) = HeaderValue::from_str(&context.trace_id()) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    let status = response.status().as_u16();
    metrics::counter!("aod_http_requests_total", "route" => route.clone(), "method" => method.to_string(), "status" => status.to_string())
        .increment(1);
    metrics::histogram!("aod_http_request_seconds", "route" => route.clone()).record(begun.elapsed());
    tracing::debug!(request = %context.trace_id(), %method, route, status, "request");
    response
}

async fn check_host(State(app): State<App>, request: Request, next: Next) -> Response {
    let allowed = &app.config.allowed_hosts;
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let host = host.rsplit_once(':').map_or(host, |(name, _)| name);
    if allowed.iter().any(|allowed| allowed == "*" || allowed.eq_ignore_ascii_case(host)) {
        next.run(request).await
    } else {
        ApiError::new(StatusCode::BAD_REQUEST, "Host not allowed").into_response()
    }
}
