//! Where a failure becomes an HTTP answer: the one place that knows statuses and the public error
//! body (docs/api.md §1).

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use bus::{RpcError, trace};
use serde::Serialize;
use serde_json::{Map, Value};
use types::ErrorCode;
use utoipa::ToSchema;

use crate::{body::field_error::FieldError, limits::TryLater};

/// A failed request, as its caller sees it.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    detail: Value,
    numbers: Box<[(String, i64)]>,
    retry_after_seconds: Option<u32>,
    reason: Option<Box<str>>,
    may_have_happened: bool,
}

/// What [`crate::v1::error`] makes its own body of: an extension of every failed answer.
#[derive(Clone, Debug)]
pub struct Refusal {
    pub detail: Value,
    /// A fixed word, where the failure has one.
    pub reason: Option<Box<str>>,
    /// Whether the request may have been carried out all the same.
    pub may_have_happened: bool,
}

impl ApiError {
    pub fn new(status: StatusCode, detail: &str) -> Self {
        Self::of(status, detail.into())
    }

    fn of(status: StatusCode, detail: Value) -> Self {
        Self {
            status,
            detail,
            numbers: Box::default(),
            retry_after_seconds: None,
            reason: None,
            may_have_happened: false,
        }
    }

    pub fn fields(errors: Vec<FieldError>) -> Self {
        let detail = errors.into_iter().map(FieldError::into_json).collect();
        Self::of(StatusCode::UNPROCESSABLE_ENTITY, Value::Array(detail))
    }

    pub fn not_found(resource: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, &format!("{resource} not found"))
    }

    pub fn is_not_found(&self) -> bool {
        self.status == StatusCode::NOT_FOUND
    }

    pub fn try_later(detail: &str, later: TryLater) -> Self {
        Self {
            retry_after_seconds: Some(later.seconds),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, detail)
        }
    }

    /// Names the reason by a fixed word.
    pub fn because(self, reason: &str) -> Self {
        Self { reason: Some(reason.into()), ..self }
    }

    pub fn unauthorized(detail: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, detail)
    }
}

impl From<RpcError> for ApiError {
    fn from(failure: RpcError) -> Self {
        let (status, retry_after_seconds) = match failure.code {
            ErrorCode::InvalidArgument => (StatusCode::BAD_REQUEST, None),
            ErrorCode::Unprocessable => (StatusCode::UNPROCESSABLE_ENTITY, None),
            ErrorCode::Unauthenticated => (StatusCode::UNAUTHORIZED, None),
            ErrorCode::NotFound => (StatusCode::NOT_FOUND, None),
            ErrorCode::Conflict => (StatusCode::CONFLICT, None),
            ErrorCode::ResourceExhausted => (StatusCode::TOO_MANY_REQUESTS, Some(5)),
            ErrorCode::Unavailable | ErrorCode::DeadlineExceeded => {
                (StatusCode::SERVICE_UNAVAILABLE, Some(1))
            }
            ErrorCode::Internal => (StatusCode::INTERNAL_SERVER_ERROR, None),
        };
        if let (ErrorCode::Unprocessable, Some(field)) = (failure.code, failure.field) {
            return Self::fields(vec![FieldError::value(
                &field.name,
                &failure.message,
                field.input.into(),
            )]);
        }
        let numbers = failure.numbers.into_iter().collect();
        let may_have_happened =
            matches!(failure.code, ErrorCode::DeadlineExceeded | ErrorCode::Internal);
        Self {
            status,
            detail: failure.message.into(),
            numbers,
            retry_after_seconds,
            reason: failure.reason.map(String::into_boxed_str),
            may_have_happened,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut body = Map::new();
        body.insert("detail".to_owned(), self.detail.clone());
        body.extend(self.numbers.into_iter().map(|(name, number)| (name, number.into())));
        if let Some(id) = trace::id() {
            body.insert("request_id".to_owned(), id.into());
        }
        let mut response = (self.status, axum::Json(Value::Object(body))).into_response();
        if self.status == StatusCode::UNAUTHORIZED {
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(seconds) = self.retry_after_seconds {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        let Self { detail, reason, may_have_happened, .. } = self;
        response.extensions_mut().insert(Refusal { detail, reason, may_have_happened });
        response
    }
}

/// The answer to a deletion.
#[derive(Serialize, ToSchema)]
pub struct Detail {
    detail: &'static str,
}

impl Detail {
    pub fn new(detail: &'static str) -> axum::Json<Self> {
        axum::Json(Self { detail })
    }
}

/// The body of every failure.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes what is built field by field")]
pub struct ErrorBody {
    detail: ErrorDetail,
    /// The id of the request, for its logs.
    request_id: Option<String>,
    /// For a quota: how many sessions may be active.
    limit: Option<u32>,
    /// Of a quota: how many are.
    active: Option<u32>,
}

/// What went wrong: a sentence, or every field that is missing or wrong.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "describes what is built field by field")]
pub enum ErrorDetail {
    Text(String),
    Fields(Vec<FieldErrorBody>),
}

/// What is wrong with one field.
#[derive(Serialize, ToSchema)]
pub struct FieldErrorBody {
    #[schema(example = "missing")]
    r#type: String,
    /// Where: names of fields, and indexes of lists.
    loc: Vec<Value>,
    msg: String,
    /// What was sent there.
    input: Value,
}
