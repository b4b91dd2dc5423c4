//! Classifies a request of an agent: its provider, and whether the gateway forwards it.

use std::fmt;

use axum::http::{HeaderMap, Method, header};
use types::Provider;

/// A request that is passed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    pub provider: Provider,
    /// The path at the provider, with its leading slash.
    pub path: String,
}

impl Call {
    /// Whether a model generates or embeds: not what counts tokens or lists models, which costs
    /// nothing.
    pub fn is_metered(&self) -> bool {
        let is_free =
            ["/count_tokens", ":countTokens", "/models"].iter().any(|end| self.path.ends_with(end));
        let is_of_model = self.provider != Provider::Google && self.path.contains("/models/");
        !is_free && !is_of_model && (self.provider != Provider::Google || self.path.contains(':'))
    }
}

/// Why a request is not passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotACall {
    /// The path names no provider.
    UnknownProvider,
    /// Agents do not need this path of the provider.
    Unsupported(Provider),
}

/// A secret that a client shows; cannot be printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Shown {
    pub token: String,
    pub scheme: Scheme,
}

impl fmt::Debug for Shown {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Shown").field("scheme", &self.scheme).finish_non_exhaustive()
    }
}

/// How a client shows its token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    Bearer,
    /// `x-api-key`, `x-goog-api-key`, or Google's `key` in the query.
    ApiKey,
}

/// Reads `/{provider}/{path}`. Only what agents use is passed on: files, batches and stored
/// responses belong to the key's account, which sessions of other agents share.
///
/// # Errors
/// [`NotACall`].
pub fn read(method: &Method, path: &str) -> Result<Call, NotACall> {
    let (name, rest) = path
        .strip_prefix('/')
        .and_then(|path| path.split_once('/'))
        .ok_or(NotACall::UnknownProvider)?;
    let provider: Provider = name.parse().map_err(|()| NotACall::UnknownProvider)?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._:@/".contains(c);
    let clean = rest.chars().all(plain)
        && rest.split('/').all(|part| !part.is_empty() && part.chars().any(|c| c != '.'));
    if clean && is_supported(provider, method, rest) {
        return Ok(Call { provider, path: format!("/{rest}") });
    }
    Err(NotACall::Unsupported(provider))
}

fn is_supported(provider: Provider, method: &Method, path: &str) -> bool {
    let (get, post) = (method == Method::GET, method == Method::POST);
    match provider {
        Provider::Anthropic => match path {
            "v1/messages" | "v1/messages/count_tokens" => post,
            path => get && (path == "v1/models" || path.starts_with("v1/models/")),
        },
        Provider::Openai => match path {
            "v1/responses" | "v1/responses/compact" | "v1/chat/completions" => post,
            path => get && (path == "v1/models" || path.starts_with("v1/models/")),
        },
        Provider::Google => {
            let Some(path) = path.strip_prefix("v1beta/").or_else(|| path.strip_prefix("v1/"))
            else {
                return false;
            };
            let method = path
                .strip_prefix("models/")
                .and_then(|path| path.split_once(':'))
                .map(|(_, method)| method);
            match method {
                Some(
                    "generateContent"
                    | "streamGenerateContent"
                    | "countTokens"
                    | "embedContent"
                    | "batchEmbedContents",
                ) => post,
                Some(_) => false,
                None => get && (path == "models" || path.starts_with("models/")),
            }
        }
    }
}

/// The token that a client shows, wherever its provider's tools put it.
pub fn shown(headers: &HeaderMap, query: Option<&str>) -> Option<Shown> {
    let text =
        |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let api_key = text("x-api-key").or_else(|| text("x-goog-api-key")).or_else(|| in_query(query?));
    let bearer = || {
        text(header::AUTHORIZATION.as_str())?
            .strip_prefix("Bearer ")
            .map(|token| token.trim().to_owned())
    };
    match api_key.filter(|key| !key.is_empty()) {
        Some(token) => Some(Shown { token, scheme: Scheme::ApiKey }),
        None => bearer().map(|token| Shown { token, scheme: Scheme::Bearer }),
    }
}

const QUERY_KEY: &str = "key";

fn in_query(query: &str) -> Option<String> {
    url::form_urlencoded::parse(query.as_bytes())
        .find(|(name, _)| name == QUERY_KEY)
        .map(|(_, value)| value.into_owned())
}

/// A query without the token in it.
pub fn without_key(query: &str) -> String {
    let is_key = |pair: &&str| {
        url::form_urlencoded::parse(pair.as_bytes()).any(|(name, _)| name == QUERY_KEY)
    };
    query.split('&').filter(|pair| !is_key(pair)).collect::<Vec<_>>().join("&")
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_requests_that_agents_use_are_forwarded() {
        let passed = |method: Method, path: &str| read(&method, path).map(|call| call.path);
        for (method, path) in [
            (Method::POST, "/anthropic/v1/messages"),
            (Method::POST, "/anthropic/v1/messages/count_tokens"),
            (Method::GET, "/anthropic/v1/models/claude-x"),
            (Method::POST, "/openai/v1/responses"),
            (Method::POST, "/openai/v1/chat/completions"),
            (Method::GET, "/openai/v1/models"),
            (Method::POST, "/google/v1beta/models/gemini-2.5-pro:streamGenerateContent"),
        ] {
            assert_eq!(
                passed(method, path).as_deref(),
                Ok(path
                    .trim_start_matches('/')
                    .split_once('/')
                    .map(|(_, rest)| format!("/{rest}"))
                    .unwrap()
                    .as_str())
            );
        }
        for (method, path) in [
            (Method::GET, "/openai/v1/responses/resp_of_another_session"),
            (Method::GET, "/openai/v1/files"),
            (Method::POST, "/anthropic/v1/messages/batches"),
            (Method::POST, "/anthropic/v1/../v1/messages"),
            (Method::POST, "/anthropic//v1/messages"),
            (Method::POST, "/anthropic/v1%2fmessages"),
            (Method::DELETE, "/openai/v1/models/x"),
            (Method::POST, "/google/v1beta/cachedContents"),
        ] {
            assert!(
                matches!(passed(method.clone(), path), Err(NotACall::Unsupported(_))),
                "{method} {path}"
            );
        }
        assert_eq!(passed(Method::POST, "/v1/messages"), Err(NotACall::UnknownProvider));
        assert_eq!(passed(Method::GET, "/"), Err(NotACall::UnknownProvider));
    }

    #[test]
    fn a_token_is_found_where_the_providers_tools_put_it() {
        let headers = |name: &'static str, value: &'static str| {
            HeaderMap::from_iter([(name.parse().unwrap(), HeaderValue::from_static(value))])
        };
        let key = |token: &str| Some(Shown { token: token.to_owned(), scheme: Scheme::ApiKey });
        assert_eq!(shown(&headers("x-api-key", "a"), None), key("a"));
        assert_eq!(shown(&headers("x-goog-api-key", "a"), None), key("a"));
        assert_eq!(shown(&HeaderMap::new(), Some("alt=sse&key=a")), key("a"));
        assert_eq!(
            shown(&headers("authorization", "Bearer a"), None),
            Some(Shown { token: "a".to_owned(), scheme: Scheme::Bearer })
        );
        assert_eq!(shown(&HeaderMap::new(), Some("alt=sse")), None);
        assert_eq!(without_key("alt=sse&key=a&x=1"), "alt=sse&x=1");
        assert_eq!(without_key("k%65y=a"), "");
    }

    #[test]
    fn every_request_that_a_provider_charges_for_is_metered() {
        let metered = |method: Method, path: &str| read(&method, path).unwrap().is_metered();
        assert!(
            metered(Method::POST, "/anthropic/v1/messages")
                && metered(Method::POST, "/openai/v1/responses")
        );
        assert!(metered(
            Method::POST,
            "/google/v1beta/models/gemini-2.5-pro:streamGenerateContent"
        ));
        assert!(
            !metered(Method::POST, "/anthropic/v1/messages/count_tokens")
                && !metered(Method::GET, "/openai/v1/models/x")
        );
        assert!(!metered(Method::POST, "/google/v1beta/models/gemini-2.5-pro:countTokens"));
        assert!(
            !metered(Method::GET, "/google/v1beta/models/gemini-2.5-pro")
                && !metered(Method::GET, "/google/v1beta/models")
        );
    }

    proptest! {
        #[test]
        fn no_path_leaves_its_provider(path in "/(anthropic|openai|google)/[a-z0-9.%/:]{0,40}") {
            if let Ok(call) = read(&Method::POST, &path).or_else(|_| read(&Method::GET, &path)) {
                prop_assert!(call.path.starts_with("/v1") && !call.path.contains("..") && !call.path.contains('%'));
            }
        }
    }
}
