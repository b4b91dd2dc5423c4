//! Refusals of the gateway's own, in the shape that the provider's tools understand.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use serde_json::{Value, json};
use types::Provider;

use crate::ledger::Refused;

/// Why the gateway answers itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The token is missing, unknown, expired or revoked.
    Token,
    /// The user has no credential for this provider.
    NoCredential,
    Unsupported,
    /// The body names something that is stored at the provider, where other sessions' things are
    /// too.
    Stored(&'static str),
    /// The body is not JSON in UTF-8 as it is.
    Encoded,
    TooLarge,
    /// The body did not arrive whole.
    Body,
    /// More requests of one session at once than are allowed, or more bytes than the gateway holds.
    Busy,
    /// A budget or a policy: asking again does not help.
    NotAllowed(String),
    /// The session asks too often: seconds to wait.
    TooOften(String, u32),
    /// The vault, the scheduler or the bus does not answer.
    Unavailable,
    /// The provider cannot be reached, or did not answer in time.
    Provider(&'static str),
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::For(why) => Self::NotAllowed(why),
            Refused::Rate(why, seconds) => Self::TooOften(why, seconds),
            Refused::Unavailable => Self::Unavailable,
        }
    }
}

impl Refusal {
    fn status(&self) -> StatusCode {
        match self {
            Self::Token | Self::NoCredential => StatusCode::UNAUTHORIZED,
            Self::Unsupported => StatusCode::NOT_FOUND,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            // CLIs ask again after most other statuses.
            Self::Body | Self::NotAllowed(_) | Self::Stored(_) | Self::Encoded => {
                StatusCode::BAD_REQUEST
            }
            Self::Busy | Self::TooOften(..) => StatusCode::TOO_MANY_REQUESTS,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::Provider(_) => StatusCode::BAD_GATEWAY,
        }
    }

    pub fn message(&self, provider: Provider) -> String {
        match self {
            Self::Token => "Model gateway: invalid API key: this session's token is not known, has expired or was revoked".to_owned(),
            Self::NoCredential => format!("Model gateway: invalid API key: no credential is stored for {provider}"),
            Self::Unsupported => "Model gateway: this request is not passed on to the provider".to_owned(),
            Self::Stored(name) => format!("Model gateway: {name} is not passed on: sessions share what is stored at the provider"),
            Self::Encoded => "Model gateway: the body must be JSON in UTF-8, without a content encoding".to_owned(),
            Self::TooLarge => "Model gateway: the request is too large".to_owned(),
            Self::Body => "Model gateway: the request's body did not arrive".to_owned(),
            Self::Busy => "Model gateway: too many requests at a time; try again".to_owned(),
            Self::NotAllowed(why) | Self::TooOften(why, _) => format!("Model gateway: {why}"),
            Self::Unavailable => "Model gateway: the credential cannot be read at the moment; try again".to_owned(),
            Self::Provider(why) => format!("Model gateway: {}: {why}", provider.host()),
        }
    }

    /// What the provider's tools read.
    fn body(&self, provider: Provider) -> Value {
        let (status, message) = (self.status(), self.message(provider));
        match provider {
            Provider::Anthropic => {
                let kind = match status.as_u16() {
                    401 => "authentication_error",
                    404 => "not_found_error",
                    413 => "request_too_large",
                    429 => "rate_limit_error",
                    400 => "invalid_request_error",
                    _ => "api_error",
                };
                json!({ "type": "error", "error": { "type": kind, "message": message } })
            }
            Provider::Openai => {
                let (kind, code) = match status.as_u16() {
                    401 => ("invalid_request_error", "invalid_api_key"),
                    429 => ("rate_limit_error", "rate_limit_exceeded"),
                    400..=499 => ("invalid_request_error", "invalid_request"),
                    _ => ("server_error", "server_error"),
                };
                json!({ "error": { "type": kind, "code": code, "message": message, "param": null } })
            }
            Provider::Google => {
                let name = match status.as_u16() {
                    401 => "UNAUTHENTICATED",
                    404 => "NOT_FOUND",
                    429 => "RESOURCE_EXHAUSTED",
                    400 | 413 => "INVALID_ARGUMENT",
                    503 => "UNAVAILABLE",
                    _ => "INTERNAL",
                };
                json!({ "error": { "code": status.as_u16(), "message": message, "status": name } })
            }
        }
    }

    pub fn response(&self, provider: Provider) -> Response {
        let mut response = (self.status(), Json(self.body(provider))).into_response();
        match self {
            Self::Busy | Self::Unavailable => {
                response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            Self::TooOften(_, seconds) => {
                response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(*seconds));
            }
            // The SDKs of Anthropic and OpenAI read it.
            Self::NotAllowed(_) | Self::Stored(_) | Self::Encoded => {
                response.headers_mut().insert("x-should-retry", HeaderValue::from_static("false"));
            }
            _ => {}
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_provider_gets_its_own_shape() {
        let of = |provider| Refusal::Token.body(provider);
        assert_eq!(of(Provider::Anthropic)["error"]["type"], "authentication_error");
        assert_eq!(of(Provider::Openai)["error"]["code"], "invalid_api_key");
        assert_eq!(of(Provider::Google)["error"]["status"], "UNAUTHENTICATED");
        assert_eq!(Refusal::Unavailable.response(Provider::Openai).headers()["retry-after"], "1");
    }
}
