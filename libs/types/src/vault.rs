//! Credentials of vaults (docs/managed-agents-api.md): what a session's agent shows to others, by
//! what it is for.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use zeroize::Zeroize;

use crate::environment::HostPattern;

/// The kind that documents of credentials are put into the credential vault with.
pub const DOCUMENT_KIND: &str = "vault_credential";

/// How many active credentials a vault may hold.
pub const CREDENTIALS_MAX: i64 = 20;
/// How long a value may be that is sent in a header.
pub const HEADER_BYTES_MAX: usize = 16 * 1024;
/// How many hosts a credential may be limited to.
pub const HOSTS_MAX: usize = 16;
/// How many vaults a session may be given.
pub const VAULTS_OF_SESSION_MAX: usize = 50;

/// What a credential is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuthKind {
    /// A variable of the agent.
    EnvironmentVariable,
    /// The `Authorization` of an MCP server.
    StaticBearer,
    /// The same, with an access token of OAuth that expires and may be refreshed.
    McpOauth,
}

impl AuthKind {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::EnvironmentVariable => "environment_variable",
            Self::StaticBearer => "static_bearer",
            Self::McpOauth => "mcp_oauth",
        }
    }

    /// Whether its value is the bearer token of an MCP server.
    #[must_use]
    pub const fn is_bearer(self) -> bool {
        matches!(self, Self::StaticBearer | Self::McpOauth)
    }
}

/// A credential as the vault encrypts it. Cannot be printed; wiped when dropped.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CredentialDocument {
    pub kind: AuthKind,
    /// A variable's name, or a server's URL as [`normal_url`] has it.
    pub key: String,
    pub value: String,
    /// Of [`AuthKind::EnvironmentVariable`]: the hosts ([`CredentialHost`]) that alone receive the
    /// value, which then is not in the sandbox.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Vec<String>>,
    /// Of [`AuthKind::McpOauth`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oauth: Option<OAuth>,
}

/// What is known of an access token.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OAuth {
    /// Unix time in seconds; none: it is used until its server refuses it.
    #[serde(default)]
    pub expires_at: Option<i64>,
    #[serde(default)]
    pub refresh: Option<Refresh>,
}

/// How another access token is obtained (RFC 6749, section 6).
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refresh {
    pub client_id: String,
    pub refresh_token: String,
    pub token_endpoint: String,
    pub token_endpoint_auth: ClientAuth,
    #[serde(default)]
    pub resource: Option<String>,
    #[serde(default)]
    pub scope: Option<String>,
}

/// How the client authenticates at the token endpoint.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientAuth {
    pub r#type: ClientAuthKind,
    #[serde(default)]
    pub client_secret: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClientAuthKind {
    None,
    ClientSecretBasic,
    ClientSecretPost,
}

impl Drop for Refresh {
    fn drop(&mut self) {
        self.refresh_token.zeroize();
        self.token_endpoint_auth.client_secret.zeroize();
    }
}

impl fmt::Debug for CredentialDocument {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("CredentialDocument")
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

impl Drop for CredentialDocument {
    fn drop(&mut self) {
        self.value.zeroize();
    }
}

/// A host that receives a credential's value over HTTPS: a name that may begin with `*.`, and its
/// port, which is 443 unless it is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CredentialHost<'a> {
    pattern: HostPattern<'a>,
    port: u16,
}

impl<'a> CredentialHost<'a> {
    /// `None` for what cannot name a host.
    #[must_use]
    pub fn parse(text: &'a str) -> Option<Self> {
        let (name, port) = match text.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => {
                (name, port.parse().ok().filter(|port| *port > 0)?)
            }
            _ => (text, 443),
        };
        Some(Self { pattern: HostPattern::parse(name)?, port })
    }

    #[must_use]
    pub fn names(&self, host: &str, port: u16) -> bool {
        self.port == port && self.pattern.allows(host)
    }
}

/// Whether a value can be sent in a header.
#[must_use]
pub fn fits_header(value: &str) -> bool {
    (1..=HEADER_BYTES_MAX).contains(&value.len())
        && value.bytes().all(|byte| (b' '..=b'~').contains(&byte))
}

/// A server's URL as credentials are matched by: scheme and host in lower case, without the default
/// port, a slash at the end, or a fragment. None: it is no URL of HTTP with a host and without a
/// user.
#[must_use]
pub fn normal_url(text: &str) -> Option<String> {
    let (scheme, rest) = text.trim().split_once("://")?;
    let scheme = scheme.to_ascii_lowercase();
    let default_port = match scheme.as_str() {
        "https" => ":443",
        "http" => ":80",
        _ => return None,
    };
    let rest = rest.split('#').next().unwrap_or_default();
    let at = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(at);
    let authority = authority.to_ascii_lowercase();
    let host = authority.strip_suffix(default_port).unwrap_or(&authority);
    let plain = |c: char| !c.is_control() && !c.is_whitespace() && !"@\\<>\"".contains(c);
    if host.is_empty()
        || host.starts_with(':')
        || !host.chars().all(plain)
        || !path.chars().all(plain)
    {
        return None;
    }
    let (path, query) =
        path.split_once('?').map_or((path, None), |(path, query)| (path, Some(query)));
    let query = query.map(|query| format!("?{query}")).unwrap_or_default();
    Some(format!("{scheme}://{host}{}{query}", path.trim_end_matches('/')))
}

/// Gives a document the members of another, also within objects; those that it does not name stay.
pub fn merge(document: &mut Value, change: Value) {
    match (document, change) {
        (Value::Object(document), Value::Object(change)) => {
            for (name, value) in change {
                merge(document.entry(name).or_insert(Value::Null), value);
            }
        }
        (document, change) => *document = change,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn urls_that_mean_the_same_server_are_one() {
        let normal = Some("https://mcp.example.com/sse".to_owned());
        for text in [
            "https://mcp.example.com/sse",
            "HTTPS://MCP.Example.com:443/sse/",
            "https://mcp.example.com/sse#x",
        ] {
            assert_eq!(normal_url(text), normal, "{text}");
        }
        for other in [
            "https://mcp.example.com/SSE",
            "http://mcp.example.com/sse",
            "https://mcp.example.com:8443/sse",
            "https://mcp.example.com/sse?a=1",
        ] {
            assert!(normal_url(other).is_some_and(|url| Some(url) != normal), "{other}");
        }
        for bad in [
            "",
            "mcp.example.com",
            "ftp://a/",
            "https://",
            "https:///x",
            "https://u@h/",
            "https://a b/",
        ] {
            assert_eq!(normal_url(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_credentials_host_is_reached_at_its_own_port() {
        let names = |text: &str, host: &str, port: u16| {
            CredentialHost::parse(text).unwrap().names(host, port)
        };
        assert!(names("api.example.com", "API.example.com.", 443));
        assert!(!names("api.example.com", "api.example.com", 8443));
        assert!(!names("api.example.com", "api.example.com.evil.com", 443));
        assert!(names("*.example.com:8443", "api.example.com", 8443));
        assert!(!names("*.example.com:8443", "example.com", 8443));
        for bad in ["", "*", "https://a", "a:", "a:0", "a:65536", "a:b", "a b", "a/b", ":443"] {
            assert_eq!(CredentialHost::parse(bad), None, "{bad}");
        }
        assert!(fits_header("Bearer a b") && !fits_header("") && !fits_header("a\nb"));
    }

    #[test]
    fn a_change_keeps_fields_that_it_does_not_name() {
        let mut document =
            serde_json::json!({ "env": { "A": "1" }, "tokens": { "/a": "old", "/b": "b" } });
        merge(
            &mut document,
            serde_json::json!({ "env": {}, "tokens": { "/a": "new", "/c": "c" } }),
        );
        assert_eq!(
            document,
            serde_json::json!({ "env": { "A": "1" }, "tokens": { "/a": "new", "/b": "b", "/c": "c" } })
        );
    }

    #[test]
    fn a_document_shows_no_value() {
        let document = CredentialDocument {
            kind: AuthKind::StaticBearer,
            key: "k".to_owned(),
            value: "SENTINEL".to_owned(),
            hosts: None,
            oauth: None,
        };
        assert!(!format!("{document:?}").contains("SENTINEL"));
        let text = serde_json::to_string(&document).unwrap();
        assert_eq!(serde_json::from_str::<CredentialDocument>(&text).unwrap(), document);
    }

    proptest! {
        #[test]
        fn a_normal_url_is_its_own(text in "(https?://[a-zA-Z0-9.:/?#@ -]{0,30})|\\PC*") {
            if let Some(normal) = normal_url(&text) {
                prop_assert_eq!(normal_url(&normal), Some(normal.clone()));
            }
        }
    }
}
