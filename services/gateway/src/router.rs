//! Every public route.

use std::time::Instant;

use axum::{
    Router,
    extract::{MatchedPath, Request, State},
    http::{HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
};
use bus::trace;
use tower_http::{
    catch_panic::CatchPanicLayer,
    cors::{AllowHeaders, AllowOrigin, CorsLayer},
};
use tracing::{Instrument as _, field};
use utoipa::OpenApi as _;
use utoipa_axum::{router::OpenApiRouter, routes};
use utoipa_swagger_ui::SwaggerUi;

use crate::{
    App, agents, budgets, console, credentials, environments, error::ApiError, health, idempotency,
    inputs, keys, openapi, server, sessions, stream, v1,
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Every route, and the document that describes them. A route is registered by its description:
/// they cannot part ways.
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
        .routes(routes!(stream::events::events))
        .routes(routes!(inputs::list_inputs))
        .routes(routes!(inputs::change_input, inputs::withdraw_input))
        .routes(routes!(inputs::interrupt))
        .routes(routes!(inputs::list_requests))
        .routes(routes!(inputs::decide))
        .routes(routes!(sessions::terminate))
        .routes(routes!(sessions::delete))
        .routes(routes!(budgets::of_session, budgets::change_of_session))
        .routes(routes!(budgets::of_agent, budgets::change_of_agent))
        .routes(routes!(budgets::usage))
        .routes(routes!(credentials::list))
        .routes(routes!(credentials::put, credentials::delete))
        .routes(routes!(keys::list, keys::create))
        .routes(routes!(keys::deactivate))
        .routes(routes!(health::health))
        .routes(routes!(health::livez))
        .routes(routes!(health::readyz))
        .routes(routes!(v1::agents::list, v1::agents::create))
        .routes(routes!(v1::agents::get, v1::agents::update))
        .routes(routes!(v1::agents::archive))
        .routes(routes!(v1::agents::versions))
        .routes(routes!(v1::environments::list, v1::environments::create))
        .routes(routes!(v1::environments::get, v1::environments::update, v1::environments::delete))
        .routes(routes!(v1::environments::archive))
        .routes(routes!(v1::events::list, v1::send::send))
        .routes(routes!(v1::events::stream))
        .routes(routes!(v1::threads::list))
        .routes(routes!(v1::threads::get))
        .routes(routes!(v1::threads::list_events))
        .routes(routes!(v1::threads::stream))
        .routes(routes!(v1::sessions::list, v1::sessions::create))
        .routes(routes!(v1::sessions::get, v1::sessions::update, v1::sessions::delete))
        .routes(routes!(v1::sessions::archive))
        .routes(routes!(v1::resources::list, v1::resources::add))
        .routes(routes!(v1::resources::get, v1::resources::update, v1::resources::remove))
        .routes(routes!(v1::files::list, v1::files::upload))
        .routes(routes!(v1::files::get, v1::files::delete))
        .routes(routes!(v1::files::download))
        .routes(routes!(v1::vaults::list, v1::vaults::create))
        .routes(routes!(v1::vaults::get, v1::vaults::update, v1::vaults::delete))
        .routes(routes!(v1::vaults::archive))
        .routes(routes!(v1::vault_credentials::list, v1::vault_credentials::create))
        .routes(routes!(
            v1::vault_credentials::get,
            v1::vault_credentials::update,
            v1::vault_credentials::delete
        ))
        .routes(routes!(v1::vault_credentials::archive))
        .split_for_parts();
    (router, openapi::complete(document))
}

pub fn router(app: App) -> Router {
    let cors = cors(&app.config.cors_origins);
    let (router, document) = routes();
    router
        // The page that shows the document, with all that it needs.
        .merge(SwaggerUi::new("/docs").url("/openapi.json", document))
        .merge(console::routes())
        .method_not_allowed_fallback(|| async {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "Method not allowed")
        })
        .fallback(|| async { ApiError::new(StatusCode::NOT_FOUND, "Not found") })
        // Outermost last: origins, panics, hosts, the errors of /v1, then request id and trace,
        // then what browsers may do.
        .layer(cors)
        .layer(CatchPanicLayer::custom(|_: Box<dyn std::any::Any + Send>| {
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "Internal error").into_response()
        }))
        .layer(middleware::from_fn_with_state(app.clone(), check_host))
        .layer(middleware::from_fn(v1::error::envelope))
        .layer(middleware::from_fn(observe))
        .layer(middleware::from_fn(protect))
        .layer(middleware::from_fn_with_state(app.shutdown.clone(), server::close_connections))
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
        .allow_methods([Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE])
        // Whatever an SDK adds. No header carries a right by itself: cookies are not sent, for
        // credentials are not allowed.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([
            REQUEST_ID,
            v1::error::REQUEST_ID,
            v1::error::SHOULD_RETRY,
            header::RETRY_AFTER,
            header::ETAG,
            idempotency::REPLAYED,
        ])
        .max_age(std::time::Duration::from_secs(86_400))
}

/// Gives every request a trace, whose id is the request's, and every response its id.
async fn observe(request: Request, next: Next) -> Response {
    let parent = request
        .headers()
        .get(contract::header::TRACEPARENT)
        .and_then(|value| value.to_str().ok())
        .map(str::to_owned);
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "unmatched".to_owned(), |path| path.as_str().to_owned());
    let (method, begun) = (request.method().clone(), Instant::now());
    let span = tracing::info_span!(
        "request",
        otel.kind = "server",
        otel.name = format!("{method} {route}"),
        http.request.method = %method,
        http.route = route,
        http.response.status_code = field::Empty,
        trace_id = field::Empty,
    );
    trace::follow(&span, parent.as_deref());
    let id = span.in_scope(trace::id);
    let mut response = next.run(request).instrument(span.clone()).await;
    if let Some(Ok(id)) = id.as_deref().map(HeaderValue::from_str) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    let status = response.status().as_u16();
    metrics::counter!("aod_http_requests_total", "route" => route.clone(), "method" => method_label(&method), "status" => status.to_string())
        .increment(1);
    metrics::histogram!("aod_http_request_seconds", "route" => route.clone())
        .record(begun.elapsed());
    span.record("http.response.status_code", status);
    span.in_scope(|| tracing::debug!("answered"));
    response
}

/// For a metric: a client may call its method anything.
fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}

/// Probes come by address, and learn nothing.
const PROBES: [&str; 2] = ["/livez", "/readyz"];

async fn check_host(State(app): State<App>, request: Request, next: Next) -> Response {
    let host =
        request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let allowed = app.config.allowed_hosts.iter().any(|allowed| is_host(allowed, host));
    if allowed || PROBES.contains(&request.uri().path()) {
        next.run(request).await
    } else {
        ApiError::new(StatusCode::BAD_REQUEST, "Host not allowed").into_response()
    }
}

/// Whether a `Host` header, with its port or without, is meant by an entry of `ALLOWED_HOSTS`.
fn is_host(allowed: &str, host: &str) -> bool {
    let has_port = host
        .rsplit_once(':')
        .is_some_and(|(_, port)| port.bytes().all(|byte| byte.is_ascii_digit()));
    let name = if has_port { host.rsplit_once(':').map_or(host, |(name, _)| name) } else { host };
    let name = name.to_ascii_lowercase();
    match (allowed, allowed.to_ascii_lowercase()) {
        ("*", _) => true,
        (_, domain) if domain.starts_with('.') => {
            name.ends_with(&domain) || domain.strip_prefix('.') == Some(&name)
        }
        (_, exact) => name == exact,
    }
}

/// What browsers may do with an answer: nothing but show the documentation and the console.
async fn protect(request: Request, next: Next) -> Response {
    let policy = match request.uri().path() {
        path if path.starts_with("/docs") => {
            "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"
        }
        path if path.starts_with("/console") => console::CONTENT_SECURITY_POLICY,
        _ => "default-src 'none'; frame-ancestors 'none'",
    };
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    for (name, value) in [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CONTENT_SECURITY_POLICY, policy),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_matched_with_and_without_ports() {
        for (allowed, host, expected) in [
            ("*", "", true),
            ("api.example.com", "API.example.com:8777", true),
            ("api.example.com", "api.example.com.evil.org", false),
            (".example.com", "a.b.example.com", true),
            (".example.com", "example.com:80", true),
            (".example.com", "evilexample.com", false),
            ("[::1]", "[::1]:8777", true),
            ("[::1]", "[::1]", true),
            ("127.0.0.1", "127.0.0.1", true),
            ("127.0.0.1", "", false),
        ] {
            assert_eq!(is_host(allowed, host), expected, "{allowed} {host}");
        }
    }
}
