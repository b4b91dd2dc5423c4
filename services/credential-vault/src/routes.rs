//! Divides a session's secrets: what the model gateway adds to requests on its routes, and what the
//! session's sandbox gets. No I/O.

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use contract::vault::{BundledSecret, Refreshable, Route, RouteHeader, RouteKind};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};
use types::{
    route::holds_variable,
    vault::{self, CredentialDocument},
};
use zeroize::{Zeroize as _, Zeroizing};

/// The kinds of documents that hold secrets of routes.
const MCP_SERVERS: &str = "mcp_servers";
const SESSION: &str = "session";
const AUTHORIZATION: &str = "Authorization";
/// The user name with which GitHub accepts a token as the password.
const GIT_USER: &str = "x-access-token";

/// Takes the secrets of routes out of a session's documents, and returns the routes with what
/// requests are sent with. A header that refers to a variable of the sandbox stays: it is known
/// there alone.
pub fn divide(mut routes: Vec<Route>, secrets: &mut Vec<BundledSecret>) -> Vec<Route> {
    for secret in
        secrets.iter_mut().filter(|secret| secret.kind == MCP_SERVERS || secret.kind == SESSION)
    {
        let Ok(Value::Object(mut document)) = serde_json::from_slice(&secret.value) else {
            continue;
        };
        for route in &mut routes {
            match (route.kind(), secret.kind.as_str()) {
                (RouteKind::Mcp, MCP_SERVERS) => take_headers(route, &mut document),
                (RouteKind::Git, SESSION) => take_token(route, &mut document),
                _ => {}
            }
        }
        secret.value.zeroize();
        secret.value = Value::Object(document).to_string().into_bytes();
    }
    secrets.retain_mut(|secret| !is_bearer_of(secret, &mut routes));
    routes
}

fn take_headers(route: &mut Route, document: &mut Map<String, Value>) {
    let Some(Value::Object(headers)) = document.get_mut(&route.name) else { return };
    headers.retain(|name, value| match value {
        Value::String(value) if !holds_variable(value) => {
            route.headers.push(RouteHeader { name: name.clone(), value: std::mem::take(value) });
            false
        }
        _ => true,
    });
}

fn take_token(route: &mut Route, document: &mut Map<String, Value>) {
    let Some(Value::Object(tokens)) = document.get_mut("tokens") else { return };
    if let Some(Value::String(token)) = tokens.remove(&route.name) {
        let user = Zeroizing::new(format!("{GIT_USER}:{}", *Zeroizing::new(token)));
        authorize(route, format!("Basic {}", BASE64.encode(user.as_bytes())));
    }
}

/// Whether a secret is the token that a vault of the Managed Agents API holds for a route's server,
/// which then has it.
fn is_bearer_of(secret: &mut BundledSecret, routes: &mut [Route]) -> bool {
    if secret.kind != vault::DOCUMENT_KIND {
        return false;
    }
    let Ok(credential) = serde_json::from_slice::<CredentialDocument>(&secret.value) else {
        return false;
    };
    let is_for = |route: &&mut Route| {
        let (is_mcp, url) = (route.kind() == RouteKind::Mcp, vault::normal_url(&route.url));
        is_mcp && credential.kind.is_bearer() && url.is_some_and(|url| url == credential.key)
    };
    let mut is_taken = false;
    for route in routes.iter_mut().filter(is_for) {
        authorize(route, format!("Bearer {}", credential.value));
        route.refreshable = refreshable(&credential, &secret.secret_id);
        is_taken = true;
    }
    if is_taken {
        secret.value.zeroize();
    }
    is_taken
}

fn refreshable(credential: &CredentialDocument, secret_id: &str) -> Option<Refreshable> {
    let oauth = credential.oauth.as_ref().filter(|oauth| oauth.refresh.is_some())?;
    Some(Refreshable {
        secret_id: secret_id.to_owned(),
        token_hash: Sha256::digest(&credential.value).to_vec(),
        expires_at: oauth.expires_at,
    })
}

/// Takes out of what a sandbox gets what only a refresh needs.
pub fn without_refresh(secrets: &mut [BundledSecret]) {
    for secret in secrets.iter_mut().filter(|secret| secret.kind == vault::DOCUMENT_KIND) {
        let Ok(mut credential) = serde_json::from_slice::<CredentialDocument>(&secret.value) else {
            continue;
        };
        if credential.oauth.take().is_some() {
            secret.value.zeroize();
            secret.value = serde_json::to_vec(&credential).unwrap_or_default();
        }
    }
}

fn authorize(route: &mut Route, value: String) {
    route.headers.retain(|header| !header.name.eq_ignore_ascii_case(AUTHORIZATION));
    route.headers.push(RouteHeader { name: AUTHORIZATION.to_owned(), value });
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn secret(kind: &str, value: &Value) -> BundledSecret {
        let value = value.to_string().into_bytes();
        BundledSecret { kind: kind.to_owned(), value, ..BundledSecret::default() }
    }

    fn route(kind: RouteKind, name: &str, url: &str) -> Route {
        Route { kind: kind.into(), name: name.to_owned(), url: url.to_owned(), ..Route::default() }
    }

    fn headers(route: &Route) -> Vec<(&str, &str)> {
        route.headers.iter().map(|header| (header.name.as_str(), header.value.as_str())).collect()
    }

    #[test]
    fn secrets_of_routes_are_taken_out_and_others_stay() {
        let mut secrets = vec![
            secret(
                MCP_SERVERS,
                &json!({ "one": { "X-Key": "SENTINEL1", "Authorization": "Bearer ${TOKEN}" }, "local": { "VAR": "stays" }, "two": { "Authorization": "SENTINEL2" } }),
            ),
            secret(
                SESSION,
                &json!({ "env": { "A": "stays" }, "tokens": { "/w/r": "SENTINEL3", "/w/direct": "stays" } }),
            ),
            secret(
                vault::DOCUMENT_KIND,
                &json!({ "kind": "static_bearer", "key": "https://two.example/mcp", "value": "SENTINEL4" }),
            ),
            secret(
                vault::DOCUMENT_KIND,
                &json!({ "kind": "environment_variable", "key": "B", "value": "stays" }),
            ),
            secret("env_vars", &json!({ "C": "stays" })),
        ];
        let routes = vec![
            route(RouteKind::Mcp, "one", "https://one.example/mcp"),
            route(RouteKind::Mcp, "two", "https://TWO.example:443/mcp/"),
            route(RouteKind::Git, "/w/r", "https://github.com/o/r"),
            route(RouteKind::Git, "/w/public", "https://github.com/o/public"),
        ];
        let routes = divide(routes, &mut secrets);
        assert_eq!(headers(&routes[0]), [("X-Key", "SENTINEL1")]);
        assert_eq!(headers(&routes[1]), [("Authorization", "Bearer SENTINEL4")]);
        let basic = BASE64.encode("x-access-token:SENTINEL3");
        assert_eq!(headers(&routes[2]), [("Authorization", format!("Basic {basic}").as_str())]);
        assert!(routes[3].headers.is_empty());
        let left: Vec<String> =
            secrets.iter().map(|secret| String::from_utf8(secret.value.clone()).unwrap()).collect();
        assert!(!left.concat().contains("SENTINEL"), "{left:?}");
        assert_eq!(left.concat().matches("stays").count(), 5, "{left:?}");
        assert!(left[0].contains("${TOKEN}"));
        assert!(!format!("{routes:?}").contains("SENTINEL"));
    }

    #[test]
    fn without_routes_nothing_is_taken() {
        let document = json!({ "one": { "X-Key": "k" } });
        let mut secrets =
            vec![secret(MCP_SERVERS, &document), secret("provider:openai", &json!("not json"))];
        assert!(divide(Vec::new(), &mut secrets).is_empty());
        assert_eq!(serde_json::from_slice::<Value>(&secrets[0].value).unwrap(), document);
    }
}
