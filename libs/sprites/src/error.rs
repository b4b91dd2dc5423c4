//! Errors of calls, in words that a user can act on.

use std::time::Duration;

use reqwest::{Response, StatusCode, header};
use serde_json::Value;

/// A failed call. Messages hold no URL: a URL can carry what a command was given.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the Sprites API refused the credentials: {message}")]
    Unauthorized { message: String },
    #[error("not found by the Sprites API: {message}")]
    NotFound { message: String },
    #[error("the Sprites API reports a conflict: {message}")]
    Conflict { message: String },
    #[error("the Sprites API limits requests: {message}")]
    RateLimited { message: String, retry_after: Option<Duration> },
    #[error("the Sprites API refused the request (status {}): {message}", status.as_u16())]
    Rejected { status: StatusCode, message: String },
    #[error("the Sprites API failed (status {}): {message}", status.as_u16())]
    Failed { status: StatusCode, message: String, retry_after: Option<Duration> },
    #[error("the Sprites API cannot be reached: {0}")]
    Transport(String),
    #[error("the Sprites API did not answer in time")]
    Timeout,
    /// The connection ended and no exit status had come: the command may have succeeded, failed, or
    /// still run.
    #[error("the connection was lost before the command's exit status came")]
    Interrupted,
}

impl Error {
    /// Converts an error of the HTTP client, without its URL.
    pub(crate) fn transport(error: reqwest::Error) -> Self {
        if error.is_timeout() {
            return Self::Timeout;
        }
        let error = error.without_url();
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(source) = cause {
            text = source.to_string();
            cause = source.source();
        }
        Self::Transport(text)
    }

    pub(crate) async fn from_response(response: Response) -> Self {
        let (status, header) = (response.status(), retry_after(response.headers()));
        let body = tokio::time::timeout(Duration::from_secs(5), response.text())
            .await
            .ok()
            .and_then(Result::ok)
            .unwrap_or_default();
        Self::from_status(status, &body, header)
    }

    pub(crate) fn from_status(status: StatusCode, body: &str, header: Option<Duration>) -> Self {
        let (message, in_body) = describe(body);
        // The body's own hint wins (docs/sprites-api.md §1.2).
        let retry_after = in_body.or(header);
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Self::Unauthorized { message },
            StatusCode::NOT_FOUND => Self::NotFound { message },
            StatusCode::CONFLICT => Self::Conflict { message },
            StatusCode::TOO_MANY_REQUESTS => Self::RateLimited { message, retry_after },
            status if status.is_server_error() => Self::Failed { status, message, retry_after },
            status => Self::Rejected { status, message },
        }
    }

    /// Returns the value of the metric label `outcome`.
    #[must_use]
    pub(crate) const fn kind(&self) -> &'static str {
        match self {
            Self::Unauthorized { .. } => "unauthorized",
            Self::NotFound { .. } => "not_found",
            Self::Conflict { .. } => "conflict",
            Self::RateLimited { .. } => "rate_limited",
            Self::Rejected { .. } => "rejected",
            Self::Failed { .. } => "failed",
            Self::Transport(_) => "transport",
            Self::Timeout => "timeout",
            Self::Interrupted => "interrupted",
        }
    }

    /// Whether the same call may succeed later.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::RateLimited { .. }
                | Self::Failed { .. }
                | Self::Transport(_)
                | Self::Timeout
                | Self::Interrupted
        )
    }

    /// Returns how long the server asked to wait.
    #[must_use]
    pub const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited { retry_after, .. } | Self::Failed { retry_after, .. } => {
                *retry_after
            }
            _ => None,
        }
    }
}

pub(crate) fn retry_after(headers: &header::HeaderMap) -> Option<Duration> {
    headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

/// Returns the message of a body, shortened, and its `retry_after_seconds`.
fn describe(body: &str) -> (String, Option<Duration>) {
    let Ok(json) = serde_json::from_str::<Value>(body) else {
        let text = body.trim();
        let text = if text.starts_with('<') { "an HTML page" } else { text };
        return (text.chars().take(300).collect(), None);
    };
    let text = |name: &str| json.get(name).and_then(Value::as_str);
    let message = text("message")
        .or_else(|| text("error"))
        .unwrap_or("no reason given")
        .chars()
        .take(300)
        .collect();
    (
        message,
        json.get("retry_after_seconds")
            .and_then(Value::as_u64)
            .filter(|seconds| *seconds > 0)
            .map(Duration::from_secs),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn html_bodies_are_not_shown() {
        let error =
            Error::from_status(StatusCode::BAD_GATEWAY, "<html><body>secrets</body></html>", None);
        assert_eq!(error.to_string(), "the Sprites API failed (status 502): an HTML page");
    }

    #[test]
    fn retry_after_of_the_body_takes_precedence_over_the_header() {
        let body = r#"{"error":"sprite_creation_rate_limited","message":"slow down","retry_after_seconds":7}"#;
        let error =
            Error::from_status(StatusCode::TOO_MANY_REQUESTS, body, Some(Duration::from_secs(1)));
        assert_eq!(error.retry_after(), Some(Duration::from_secs(7)));
        assert!(error.is_transient() && error.to_string().ends_with("slow down"));
    }
}
