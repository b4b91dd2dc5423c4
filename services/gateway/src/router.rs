//! Every public route.

use std::time::Instant;

use axum::{
    Router,
    extract::{MatchedPath, Request, State},
    http::{HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
};
use bus::trace::{self, TraceContext};
use tower_http::{
    catch_panic::CatchPanicLayer,
    cors::{AllowOrigin, CorsLayer},
};

use utoipa::OpenApi as _;
use utoipa_axum::{router::OpenApiRouter, routes};
use utoipa_swagger_ui::SwaggerUi;

use crate::{App, agents, credentials, environments, error::ApiError, health, idempotency, keys, openapi, sessions, stream};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Every route, and the document that describes them. A route is registered by its description: they cannot part ways.
pub fn routes() -> (Router<App>, utoipa::openapi::OpenApi) {
    let (router, document) = OpenApiRouter::with_openapi(openapi::Base::openapi())
        .routes(routes!(agents::list, agents::create))
        .routes(routes!(agents::get, agents::update))
        .routes(routes!(agents::archive))
        .routes(routes!(agents::versions))
        .routes(routes!(environments::list, environments::create))
        .routes(routes!(environments::get, environments::update))
        .routes(routes!(environments::archive))
        .routes(routes!(environments::delete))
        .routes(routes!(environments::versions))
        .routes(routes!(sessions::list, sessions::create))
        .routes(routes!(sessions::get))
        .routes(routes!(sessions::turns))
        .routes(routes!(sessions::prompt))
        .routes(routes!(stream::stream))
        .routes(routes!(sessions::terminate))
        .routes(routes!(sessions::delete))
        .routes(routes!(credentials::list))
        .routes(routes!(credentials::put, credentials::delete))
        .routes(routes!(keys::list, keys::create))
        .routes(routes!(keys::deactivate))
        .routes(routes!(health::health))
        .routes(routes!(health::livez))
        .routes(routes!(health::readyz))
        .split_for_parts();
    (router, openapi::complete(document))
}

pub fn router(app: App) -> Router {
    let cors = cors(&app.config.cors_origins);
    let (router, document) = routes();
    router
        // The page that shows the document, with all that it needs.
        .merge(SwaggerUi::new("/docs").url("/openapi.json", document))
        .method_not_allowed_fallback(|| async { ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "Method not allowed") })
        .fallback(|| async { ApiError::new(StatusCode::NOT_FOUND, "Not found") })
        // Outermost last: origins, panics, hosts, then request id and trace.
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
        .expose_headers([REQUEST_ID, header::RETRY_AFTER, idempotency::REPLAYED])
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
