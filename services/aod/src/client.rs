//! Client of the public API.

pub mod stream;

use std::time::Duration;

use reqwest::{Method, Response, StatusCode};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::Value;

/// Why a call failed, in words for the person who typed the command.
#[derive(Debug, thiserror::Error)]
pub enum ApiFailure {
    #[error("{0}")]
    Local(String),
    #[error("cannot reach {url}: {reason}{hint}")]
    Unreachable { url: String, reason: String, hint: String },
    #[error("{}", explain(*status, detail))]
    Refused { status: StatusCode, detail: String },
}

/// The API's own words, and what to do about them where that is known.
fn explain(status: StatusCode, detail: &str) -> String {
    let hint = if let Some(runtime) = detail.strip_prefix("No API key configured for runtime: ") {
        let kind = match runtime {
            "codex" => "provider:openai",
            "gemini" => "provider:google",
            _ => "provider:anthropic",
        };
        format!("\nStore one first (it is read from standard input): aod credentials set {kind}")
    } else if detail == "No backend credentials configured" {
        "\nStore a Sprites token first (it is read from standard input): aod credentials set backend:sprites".to_owned()
    } else if detail == "Host not allowed" {
        "\nThe gateway's setting ALLOWED_HOSTS must name the host of AOD_API_URL.".to_owned()
    } else if detail.starts_with("Unknown runtime: shell.") {
        "\nThe gateway runs it with ENABLE_SHELL_RUNTIME=true.".to_owned()
    } else if status == StatusCode::UNAUTHORIZED {
        "\nAOD_API_TOKEN must hold a valid key; `aod dev` prints one when it starts.".to_owned()
    } else {
        String::new()
    };
    format!("{detail} ({}){hint}", status.as_u16())
}

/// An API and a key.
#[derive(Debug)]
pub struct Api {
    http: reqwest::Client,
    base_url: String,
    is_loopback: bool,
    token: SecretString,
}

impl Api {
    /// Uses the key in `AOD_API_TOKEN`: secrets are never arguments.
    pub fn from_env(base_url: &str) -> Result<Self, ApiFailure> {
        let token = std::env::var_os("AOD_API_TOKEN").unwrap_or_default();
        let token = checked_token(&token.to_string_lossy())?;
        Self::new(base_url, token)
    }

    pub fn new(base_url: &str, token: SecretString) -> Result<Self, ApiFailure> {
        let url = checked_url(base_url)?;
        let is_loopback = is_loopback(&url);
        let mut http =
            reqwest::Client::builder().connect_timeout(Duration::from_secs(10)).user_agent("aod");
        if is_loopback {
            // No proxy reaches this machine's own loopback.
            http = http.no_proxy();
        }
        let http = http.build().map_err(|error| ApiFailure::Local(cause(&error)))?;
        Ok(Self {
            http,
            base_url: base_url.trim().trim_end_matches('/').to_owned(),
            is_loopback,
            token,
        })
    }

    pub async fn get(&self, path: &str) -> Result<Value, ApiFailure> {
        self.call(Method::GET, path, None).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, ApiFailure> {
        self.call(Method::POST, path, Some(body)).await
    }

    pub async fn put(&self, path: &str, body: &Value) -> Result<Value, ApiFailure> {
        self.call(Method::PUT, path, Some(body)).await
    }

    pub async fn patch(&self, path: &str, body: &Value) -> Result<Value, ApiFailure> {
        self.call(Method::PATCH, path, Some(body)).await
    }

    pub async fn delete(&self, path: &str) -> Result<Value, ApiFailure> {
        self.call(Method::DELETE, path, None).await
    }

    /// The items of a list's first page.
    /// Returns one page of a list.
    pub async fn page(
        &self,
        path: &str,
        page: &Page,
    ) -> Result<(Vec<Value>, Option<String>), ApiFailure> {
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        query.append_pair("limit", &page.limit.to_string());
        if let Some(cursor) = &page.cursor {
            query.append_pair("cursor", cursor);
        }
        let separator = if path.contains('?') { '&' } else { '?' };
        let answer = self.get(&format!("{path}{separator}{}", query.finish())).await?;
        let has_more = answer.get("has_more").and_then(Value::as_bool).unwrap_or_default();
        let next = answer
            .get("next_cursor")
            .and_then(Value::as_str)
            .filter(|_| has_more)
            .map(str::to_owned);
        Ok((answer.get("data").and_then(Value::as_array).cloned().unwrap_or_default(), next))
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, ApiFailure> {
        // In a change, null says something else than what is absent.
        let is_change = method == Method::PATCH;
        let request = self
            .http
            .request(method, format!("{}{path}", self.base_url))
            .bearer_auth(self.token.expose_secret());
        let request = request.timeout(Duration::from_secs(30));
        let request = match body {
            Some(Value::Null) | None => request,
            Some(body) if is_change => request.json(body),
            // What was not given is not sent.
            Some(body) => request.json(&without_nulls(body)),
        };
        let response = self.checked(request.send().await).await?;
        response.json().await.map_err(|error| self.unreachable(&error))
    }

    async fn checked(
        &self,
        response: Result<Response, reqwest::Error>,
    ) -> Result<Response, ApiFailure> {
        let response = response.map_err(|error| self.unreachable(&error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body: Value = response.json().await.unwrap_or_default();
        let detail = match body.get("detail") {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Array(errors)) => {
                errors.iter().map(describe_field_error).collect::<Vec<_>>().join("; ")
            }
            _ => status.to_string(),
        };
        Err(ApiFailure::Refused { status, detail })
    }

    fn unreachable(&self, error: &reqwest::Error) -> ApiFailure {
        let reason = if error.is_timeout() {
            "no answer in time".to_owned()
        } else if error.is_decode() {
            "the answer is not JSON; is this the URL of Agent on Demand?".to_owned()
        } else {
            cause(error)
        };
        let hint = match proxies() {
            _ if self.is_loopback && error.is_connect() => {
                "\nIs the service running? `aod dev` starts one on this machine.".to_owned()
            }
            proxies if !self.is_loopback && !proxies.is_empty() => {
                format!(
                    "\nA proxy is configured: {}. NO_PROXY exempts hosts from it.",
                    proxies.join(", ")
                )
            }
            _ => String::new(),
        };
        ApiFailure::Unreachable { url: self.base_url.clone(), reason, hint }
    }
}

/// Which page of a list to fetch.
#[derive(Clone, Debug, clap::Args)]
pub struct Page {
    /// Print at most this many entries
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub limit: u32,
    /// Start at the cursor that the previous page ended with
    #[arg(long)]
    pub cursor: Option<String>,
}

impl Default for Page {
    fn default() -> Self {
        Self { limit: 1000, cursor: None }
    }
}

/// Returns the innermost cause, which says more than the layers around it.
fn cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// Returns the key without surrounding white space: files and copied text end with a line end.
fn checked_token(token: &str) -> Result<SecretString, ApiFailure> {
    let token = token.trim();
    if token.is_empty() {
        return Err(ApiFailure::Local(
            "AOD_API_TOKEN is not set; `aod dev` prints a key when it starts".to_owned(),
        ));
    }
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(ApiFailure::Local(
            "AOD_API_TOKEN holds characters that no API key has; a key is `aod_` and 43 letters, digits, `-` or `_`".to_owned(),
        ));
    }
    Ok(token.into())
}

fn checked_url(text: &str) -> Result<url::Url, ApiFailure> {
    let url = url::Url::parse(text.trim())
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    url.ok_or_else(|| {
        ApiFailure::Local(format!("{text:?} is not an API URL: AOD_API_URL or --api-url must start with http:// or https://"))
    })
}

fn is_loopback(url: &url::Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(url::Host::Ipv4(addr)) => addr.is_loopback(),
        Some(url::Host::Ipv6(addr)) => addr.is_loopback(),
        None => false,
    }
}

/// Returns the names of the proxy variables that are set. Their values may hold passwords.
fn proxies() -> Vec<&'static str> {
    let names =
        ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"];
    names
        .into_iter()
        .filter(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))
        .collect()
}

/// Returns whether the API is healthy, and its checks.
pub async fn health(base_url: &str) -> Result<(bool, Value), ApiFailure> {
    let api = Api::new(base_url, SecretString::default())?;
    let request = api.http.get(format!("{}/health", api.base_url)).timeout(Duration::from_secs(30));
    let response = request.send().await.map_err(|error| api.unreachable(&error))?;
    let healthy = response.status().is_success();
    Ok((healthy, response.json().await.map_err(|error| api.unreachable(&error))?))
}

fn describe_field_error(error: &Value) -> String {
    let text = |name: &str| error.get(name).and_then(Value::as_str).unwrap_or_default();
    let loc: Vec<String> = error
        .get("loc")
        .and_then(Value::as_array)
        .map(|parts| {
            parts
                .iter()
                .map(|part| part.as_str().map_or_else(|| part.to_string(), str::to_owned))
                .collect()
        })
        .unwrap_or_default();
    format!("{}: {}", loc.join("."), text("msg"))
}

fn without_nulls(body: &Value) -> Value {
    match body {
        Value::Object(object) => object
            .iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect(),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_what_to_do_about_it() {
        for (status, detail, hint) in [
            (400, "No API key configured for runtime: codex", "credentials set provider:openai"),
            (400, "No backend credentials configured", "credentials set backend:sprites"),
            (400, "Host not allowed", "ALLOWED_HOSTS"),
            (400, "Unknown runtime: shell. Must be one of: ['claude']", "ENABLE_SHELL_RUNTIME"),
            (401, "Invalid API key", "AOD_API_TOKEN"),
        ] {
            let text = explain(StatusCode::from_u16(status).unwrap(), detail);
            assert!(text.starts_with(detail) && text.contains(hint), "{text}");
        }
        let unknown = explain(StatusCode::CONFLICT, "No turn is running");
        assert_eq!(unknown, "No turn is running (409)");
    }

    #[test]
    fn keys_lose_line_ends_and_nothing_else() {
        for text in ["aod_x", "aod_x\n", "aod_x\r\n", " aod_x\r"] {
            assert_eq!(checked_token(text).unwrap().expose_secret(), "aod_x");
        }
        for text in ["", "\n", "aod_x\naod_y", "aod_\u{e9}"] {
            assert!(
                checked_token(text).unwrap_err().to_string().contains("AOD_API_TOKEN"),
                "{text:?}"
            );
        }
    }

    #[test]
    fn urls_without_a_scheme_are_refused_by_name() {
        for text in
            ["127.0.0.1:8777", "localhost:8777", "example.com", "ftp://example.com", "http://", ""]
        {
            assert!(checked_url(text).unwrap_err().to_string().contains("AOD_API_URL"), "{text:?}");
        }
        for (text, loopback) in [
            ("http://localhost:1", true),
            ("http://127.0.0.2", true),
            ("http://[::1]:1", true),
            ("https://example.com/api", false),
        ] {
            assert_eq!(is_loopback(&checked_url(text).unwrap()), loopback, "{text}");
        }
    }
}
