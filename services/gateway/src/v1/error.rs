//! Failed answers under `/v1`: Anthropic's error envelope, whichever layer refused the request, and
//! the `request-id` of every answer.

use axum::{
    extract::Request,
    http::{HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use bus::trace;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use crate::error::{ApiError, Refusal};

pub const REQUEST_ID: HeaderName = HeaderName::from_static("request-id");
/// Both SDKs repeat a request that was answered 408, 409, 429 or 5xx, unless this header says no.
pub const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// A failed answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct Envelope {
    #[schema(pattern = "^error$")]
    r#type: &'static str,
    error: Described,
    #[schema(example = "req_4bf92f3577b34da6a3ce929d0e0e4736")]
    request_id: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct Described {
    #[schema(example = "invalid_request_error")]
    r#type: &'static str,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct Details {
    #[schema(example = "environment_archived")]
    error_code: String,
}

pub fn is_under_v1(path: &str) -> bool {
    path.strip_prefix("/v1").is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Gives every answer under `/v1` its request id, and every failed one the envelope.
pub async fn envelope(request: Request, next: Next) -> Response {
    if !is_under_v1(request.uri().path()) {
        return next.run(request).await;
    }
    let changes_something =
        !matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    let mut response = next.run(request).await;
    let id = trace::id().map(|id| format!("req_{id}"));
    if let Some(refusal) = response.extensions_mut().remove::<Refusal>() {
        response = refused(response, refusal, changes_something, id.clone());
    }
    if let Some(Ok(id)) = id.as_deref().map(HeaderValue::from_str) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

fn refused(
    original: Response,
    refusal: Refusal,
    changes_something: bool,
    request_id: Option<String>,
) -> Response {
    let status = status(original.status(), refusal.reason.as_deref());
    let error = Described {
        r#type: kind(status),
        message: message(refusal.detail),
        details: refusal.reason.map(|error_code| Details { error_code: error_code.into_string() }),
    };
    let mut response =
        (status, axum::Json(Envelope { r#type: "error", error, request_id })).into_response();
    for name in [header::WWW_AUTHENTICATE, header::RETRY_AFTER] {
        if let Some(value) = original.headers().get(&name) {
            response.headers_mut().insert(name, value.clone());
        }
    }
    // A state that refuses a request refuses its repetition. What may have been done would be done
    // twice.
    if status == StatusCode::CONFLICT || (changes_something && refusal.may_have_happened) {
        response.headers_mut().insert(SHOULD_RETRY, HeaderValue::from_static("false"));
    }
    response
}

/// Validation is answered 400, never 422. So is a request that the state of a resource refuses,
/// where the scheduler names the state: 409 is for requests that lost a race. A method that a route
/// does not have is a route that there is not.
fn status(original: StatusCode, reason: Option<&str>) -> StatusCode {
    match original {
        StatusCode::UNPROCESSABLE_ENTITY => StatusCode::BAD_REQUEST,
        StatusCode::CONFLICT if reason.is_some() => StatusCode::BAD_REQUEST,
        StatusCode::METHOD_NOT_ALLOWED => StatusCode::NOT_FOUND,
        other => other,
    }
}

fn kind(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        402 => "billing_error",
        403 => "permission_error",
        404 => "not_found_error",
        408 | 504 => "timeout_error",
        409 => "conflict_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        529 => "overloaded_error",
        500.. => "api_error",
        _ => "invalid_request_error",
    }
}

/// A sentence, also where several fields are wrong.
fn message(detail: Value) -> String {
    let errors = match detail {
        Value::String(text) => return text,
        Value::Array(errors) => errors,
        other => return other.to_string(),
    };
    let described = errors.iter().map(|error| {
        let loc = error["loc"].as_array().into_iter().flatten();
        let loc: Vec<String> =
            loc.map(|part| part.as_str().map_or_else(|| part.to_string(), str::to_owned)).collect();
        let text = error["msg"].as_str().unwrap_or_default();
        let text = text.strip_prefix("Value error, ").unwrap_or(text);
        if loc.is_empty() { text.to_owned() } else { format!("{}: {text}", loc.join(".")) }
    });
    described.collect::<Vec<_>>().join("; ")
}

/// A field that is refused.
pub fn refused_field(field: &str, why: &str) -> ApiError {
    let why = why.strip_prefix(field).and_then(|why| why.strip_prefix(": ")).unwrap_or(why);
    ApiError::new(StatusCode::BAD_REQUEST, &format!("{field}: {why}"))
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;
    use bus::RpcError;
    use serde_json::json;
    use types::ErrorCode;

    use super::*;
    use crate::body::FieldError;

    async fn shown(error: ApiError, changes_something: bool) -> (u16, Value, Option<String>) {
        let mut response = error.into_response();
        let refusal = response.extensions_mut().remove::<Refusal>().unwrap();
        let response = refused(response, refusal, changes_something, None);
        let retry =
            response.headers().get(SHOULD_RETRY).map(|value| value.to_str().unwrap().to_owned());
        let status = response.status().as_u16();
        (
            status,
            serde_json::from_slice(&to_bytes(response.into_body(), 1 << 20).await.unwrap())
                .unwrap(),
            retry,
        )
    }

    #[tokio::test]
    async fn field_errors_become_one_sentence_and_400() {
        let errors = vec![
            FieldError::value("name", "must not be empty", "".into()),
            FieldError::value("model", "is required", Value::Null),
        ];
        let (status, body, retry) = shown(ApiError::fields(errors), true).await;
        assert_eq!(status, 400);
        let error = json!({ "type": "invalid_request_error", "message": "name: must not be empty; model: is required" });
        assert_eq!(body, json!({ "type": "error", "error": error, "request_id": null }));
        assert_eq!(retry, None);
    }

    #[tokio::test]
    async fn a_lost_race_is_409_and_a_state_is_400_and_neither_is_repeated_by_an_sdk() {
        let (status, body, retry) =
            shown(RpcError::conflict("Version mismatch: expected 3, got 2").into(), true).await;
        assert_eq!(
            (status, body["error"]["type"].as_str(), retry.as_deref()),
            (409, Some("conflict_error"), Some("false"))
        );
        let failure = RpcError::conflict("Environment is archived").because("environment_archived");
        let (status, body, _) = shown(failure.into(), true).await;
        assert_eq!(
            (status, body["error"]["details"]["error_code"].as_str()),
            (400, Some("environment_archived"))
        );
    }

    #[tokio::test]
    async fn requests_that_may_have_taken_effect_are_not_repeated() {
        for (code, changes, expected) in [
            (ErrorCode::Unavailable, true, None),
            (ErrorCode::DeadlineExceeded, true, Some("false")),
            (ErrorCode::Internal, true, Some("false")),
            (ErrorCode::DeadlineExceeded, false, None),
        ] {
            let (status, _, retry) = shown(RpcError::new(code, "x").into(), changes).await;
            assert!(status >= 500);
            assert_eq!(retry.as_deref(), expected, "{code} {changes}");
        }
    }
}
