//! The client of the public API.

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
    #[error("{url} cannot be reached ({reason}). Is the service running? `aod dev` starts one here.")]
    Unreachable { url: String, reason: String },
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
    token: SecretString,
}

impl Api {
    /// With the key in `AOD_API_TOKEN`: a secret is no argument.
    pub fn from_env(base_url: &str) -> Result<Self, ApiFailure> {
        let token = std::env::vars().find(|(name, _)| name == "AOD_API_TOKEN").map(|(_, value)| value).filter(|token| !token.is_empty());
        let missing = || ApiFailure::Local("AOD_API_TOKEN is not set; `aod dev` prints a key when it starts".to_owned());
        Self::new(base_url, token.ok_or_else(missing)?.into())
    }

    pub fn new(base_url: &str, token: SecretString) -> Result<Self, ApiFailure> {
        let http = reqwest::Client::builder().connect_timeout(Duration::from_secs(10)).user_agent("aod").build();
        let http = http.map_err(|error| ApiFailure::Local(error.to_string()))?;
        Ok(Self { http, base_url: base_url.trim_end_matches('/').to_owned(), token })
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

    pub async fn delete(&self, path: &str) -> Result<Value, ApiFailure> {
        self.call(Method::DELETE, path, None).await
    }

    /// The items of a list's first page.
    pub async fn list(&self, path: &str) -> Result<Vec<Value>, ApiFailure> {
        let answer = self.get(path).await?;
        Ok(answer.get("data").and_then(Value::as_array).cloned().unwrap_or_default())
    }

    async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, ApiFailure> {
        let request = self.http.request(method, format!("{}{path}", self.base_url)).bearer_auth(self.token.expose_secret());
        let request = request.timeout(Duration::from_secs(30));
        let request = match body {
            Some(Value::Null) | None => request,
            // What was not given is not sent.
            Some(body) => request.json(&without_nulls(body)),
        };
        let response = self.checked(request.send().await).await?;
        response.json().await.map_err(|error| self.unreachable(&error))
    }

    async fn checked(&self, response: Result<Response, reqwest::Error>) -> Result<Response, ApiFailure> {
        let response = response.map_err(|error| self.unreachable(&error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body: Value = response.json().await.unwrap_or_default();
        let detail = match body.get("detail") {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Array(errors)) => errors.iter().map(describe_field_error).collect::<Vec<_>>().join("; "),
            _ => status.to_string(),
        };
        Err(ApiFailure::Refused { status, detail })
    }

    fn unreachable(&self, error: &reqwest::Error) -> ApiFailure {
        let reason = if error.is_timeout() {
            "no answer in time"
        } else if error.is_connect() {
            "no connection"
        } else {
            "the answer broke off"
        };
        ApiFailure::Unreachable { url: self.base_url.clone(), reason: reason.to_owned() }
    }
}

/// What the API says of its health, and whether that is good.
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
        .map(|parts| parts.iter().map(|part| part.as_str().map_or_else(|| part.to_string(), str::to_owned)).collect())
        .unwrap_or_default();
    format!("{}: {}", loc.join("."), text("msg"))
}

fn without_nulls(body: &Value) -> Value {
    match body {
        Value::Object(object) => object.iter().filter(|(_, value)| !value.is_null()).map(|(k, v)| (k.clone(), v.clone())).collect(),
        other => other.clone(),
    }
}
