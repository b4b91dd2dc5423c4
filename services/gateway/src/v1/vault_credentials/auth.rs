//! What bodies say of a credential's `auth`: what is shown of it, and what the vault stores. Pure.

use bus::RpcError;
use serde_json::{Map, Value, json};
use types::{
    Timestamp,
    environment::{check_variable, is_variable},
    limits::BODY_BYTES_MAX,
    vault::{
        AuthKind, ClientAuthKind, CredentialDocument, CredentialHost, HEADER_BYTES_MAX, HOSTS_MAX,
        fits_header, merge, normal_url,
    },
};

use crate::{
    body::Fields,
    error::ApiError,
    v1::{error::refused_field, vaults::NAME_CHARS_MAX},
};

const URL_CHARS_MAX: usize = 2048;
/// The limit of an HTTP header.
const TOKEN_BYTES_MAX: usize = HEADER_BYTES_MAX;

/// What a body says of `auth`.
#[derive(Debug, PartialEq)]
pub struct Auth {
    kind: AuthKind,
    key: Option<String>,
    /// As it is shown.
    shown: Value,
    /// The secret; of an update it may be absent.
    value: Option<String>,
    /// Of `environment_variable`, where its networking is named: the hosts that it is limited to.
    hosts: Option<Option<Vec<String>>>,
    /// Of `mcp_oauth`: what the document says besides, or what changes of it.
    oauth: Option<Value>,
}

/// What an update does with the secret that the vault keeps.
#[derive(Default)]
pub enum SecretUpdate {
    #[default]
    Unchanged,
    /// The stored document is given these members. In place: a refresh of an access token that runs
    /// at the same time changes the document as well.
    Members(Map<String, Value>),
    /// Another document takes its place.
    Document(CredentialDocument),
}

#[derive(Default)]
pub struct AuthUpdate {
    /// What is shown from now on; none where that does not change.
    pub shown: Option<Value>,
    pub secret: SecretUpdate,
}

impl Auth {
    /// What is shown of a new credential, and what is stored.
    pub fn created(self) -> Result<(Value, CredentialDocument), ApiError> {
        let Self { kind, key: Some(key), shown, value: Some(value), hosts, oauth } = self else {
            return Err(refused_field("auth", "is incomplete"));
        };
        if kind == AuthKind::EnvironmentVariable {
            check_use(&shown, Some(&value))?;
        }
        let oauth = oauth.map(serde_json::from_value).transpose().map_err(RpcError::internal)?;
        let hosts = hosts.flatten();
        Ok((shown, CredentialDocument { kind, key, value, hosts, oauth }))
    }

    /// What an update changes of a credential that is shown so until now.
    pub fn update(self, mut shown: Value) -> Result<AuthUpdate, ApiError> {
        if shown["type"] != self.kind.as_str() {
            return Err(refused_field("auth.type", "cannot be changed: create another credential"));
        }
        let mut members = Map::new();
        match (self.kind, self.value) {
            (AuthKind::EnvironmentVariable, value) => {
                if let (Some(name), Some(value)) = (shown["secret_name"].as_str(), &value) {
                    check_variable(name, value)
                        .map_err(|why| refused_field("auth.secret_value", &why.to_string()))?;
                }
                if let Some(hosts) = self.hosts {
                    shown["networking"] = Value::Null;
                    members.insert("hosts".to_owned(), json!(hosts));
                }
                merge(&mut shown, self.shown);
                check_use(&shown, value.as_deref())?;
                members.extend(value.map(|value| ("value".to_owned(), value.into())));
            }
            (AuthKind::McpOauth, value) => {
                let oauth = self.oauth.unwrap_or_default();
                if !shown["refresh"].is_object() && !oauth["refresh"].is_null() {
                    return Err(refused_field(
                        "auth.refresh",
                        "the credential has none: create another credential",
                    ));
                }
                members.insert("oauth".to_owned(), oauth);
                members.extend(value.map(|value| ("value".to_owned(), value.into())));
                merge(&mut shown, self.shown);
            }
            (AuthKind::StaticBearer, None) => return Ok(AuthUpdate::default()),
            (kind @ AuthKind::StaticBearer, Some(value)) => {
                let key = shown["mcp_server_url"].as_str().and_then(normal_url).unwrap_or_default();
                let document = CredentialDocument { kind, key, value, hosts: None, oauth: None };
                return Ok(AuthUpdate { shown: None, secret: SecretUpdate::Document(document) });
            }
        }
        let secret = match members.is_empty() {
            true => SecretUpdate::Unchanged,
            false => SecretUpdate::Members(members),
        };
        Ok(AuthUpdate { shown: Some(shown), secret })
    }
}

/// Reads `auth` of a new credential, or of an update, which names what changes.
pub fn read(auth: &mut Fields, is_new: bool) -> Option<Auth> {
    match auth.named_string("type", BODY_BYTES_MAX)?.as_str() {
        "environment_variable" => Some(read_variable(auth, is_new)),
        "static_bearer" => Some(read_bearer(auth, is_new)),
        "mcp_oauth" => Some(read_oauth(auth, is_new)),
        _ => {
            auth.refuse("type", "must be 'environment_variable', 'static_bearer' or 'mcp_oauth'");
            None
        }
    }
}

/// A text that a new credential needs, and that an update may name.
fn secret(auth: &mut Fields, name: &str, is_new: bool) -> Option<String> {
    let value = if is_new {
        auth.named_string(name, BODY_BYTES_MAX)
    } else {
        auth.optional_string(name, BODY_BYTES_MAX)
    };
    if value.as_deref() == Some("") {
        auth.refuse(name, &format!("{name} must not be empty"));
    }
    if !is_new && auth.is_null(name) {
        auth.refuse(name, "cannot be null");
    }
    value
}

fn read_variable(auth: &mut Fields, is_new: bool) -> Auth {
    auth.allow_only(&["type", "secret_name", "secret_value", "networking", "injection_location"]);
    let name = key(auth, "secret_name", is_new, NAME_CHARS_MAX);
    if name.as_deref().is_some_and(|name| !is_variable(name)) {
        auth.refuse(
            "secret_name",
            "must be the name of a variable: letters, digits and _, and no digit first",
        );
    }
    let value = secret(auth, "secret_value", is_new);
    if let (Some(name), Some(value)) = (&name, &value)
        && let Err(why) = check_variable(name, value)
    {
        auth.refuse("secret_name", &why.to_string());
    }
    if is_new && auth.value("networking").is_none() {
        auth.refuse("networking", "networking is required");
    }
    if !is_new && auth.is_null("networking") {
        auth.refuse("networking", "cannot be null");
    }
    let hosts = auth.nested("networking", read_hosts).flatten();
    if auth.is_null("injection_location") {
        auth.refuse("injection_location", "cannot be null");
    }
    let location = auth.nested("injection_location", |location| {
        location.allow_only(&["header", "body"]);
        ["header", "body"].map(|part| (part, location.optional_bool(part)))
    });
    let mut shown = Map::new();
    if is_new {
        shown.insert("type".to_owned(), AuthKind::EnvironmentVariable.as_str().into());
        shown.insert("secret_name".to_owned(), name.clone().into());
    }
    let mut places = Map::new();
    if let Some(hosts) = &hosts {
        let networking = match hosts {
            None => json!({ "type": "unrestricted" }),
            Some(hosts) => json!({ "type": "limited", "allowed_hosts": hosts }),
        };
        shown.insert("networking".to_owned(), networking);
        // Where nothing is said of them: all that there are.
        places.insert("header".to_owned(), true.into());
        places.insert("body".to_owned(), hosts.is_none().into());
    }
    for (part, wanted) in location.into_iter().flatten() {
        if let Some(wanted) = wanted.or(is_new.then_some(false)) {
            places.insert(part.to_owned(), wanted.into());
        }
    }
    if !places.is_empty() {
        shown.insert("injection_location".to_owned(), places.into());
    }
    let kind = AuthKind::EnvironmentVariable;
    Auth { kind, key: name, shown: shown.into(), value, hosts, oauth: None }
}

/// The hosts that a variable's value is limited to; `Some(None)`: it is not limited.
fn read_hosts(networking: &mut Fields) -> Option<Option<Vec<String>>> {
    match networking.named_string("type", BODY_BYTES_MAX)?.as_str() {
        "unrestricted" => {
            networking.allow_only(&["type"]);
            Some(None)
        }
        "limited" => {
            networking.allow_only(&["type", "allowed_hosts"]);
            let hosts = networking.strings("allowed_hosts").unwrap_or_default();
            if hosts.is_empty() || hosts.len() > HOSTS_MAX {
                networking.refuse("allowed_hosts", &format!("must be 1 to {HOSTS_MAX} hosts"));
            }
            let bad = hosts
                .iter()
                .map(String::as_str)
                .filter(|host| CredentialHost::parse(host).is_none());
            networking.refuse_items("allowed_hosts", bad, |host| {
                format!("must be a host name, which may begin with *. and have a port: {host:?}")
            });
            Some(Some(hosts))
        }
        _ => {
            networking.refuse("type", "must be 'limited' or 'unrestricted'");
            None
        }
    }
}

/// Whether a variable can be used as `auth` says, once it has this value.
fn check_use(auth: &Value, value: Option<&str>) -> Result<(), ApiError> {
    let location = &auth["injection_location"];
    let wanted = ["header", "body"].map(|part| location[part] == true);
    let is_limited = auth["networking"]["type"] == "limited";
    if is_limited && wanted != [true, false] {
        return Err(refused_field(
            "auth.injection_location",
            "must be {\"header\": true, \"body\": false} where networking is limited: values are put into headers alone",
        ));
    }
    if !is_limited && wanted != [true, true] {
        return Err(refused_field(
            "auth.injection_location",
            "header and body must both be true where networking is unrestricted: the value is a variable of the agent, and may be used anywhere",
        ));
    }
    if is_limited && value.is_some_and(|value| !fits_header(value)) {
        return Err(refused_field(
            "auth.secret_value",
            &format!(
                "must be at most {HEADER_BYTES_MAX} printable ASCII characters where networking is limited: it is sent in headers"
            ),
        ));
    }
    Ok(())
}

fn read_bearer(auth: &mut Fields, is_new: bool) -> Auth {
    auth.allow_only(&["type", "mcp_server_url", "token"]);
    let (url, normal) = server_url(auth, is_new);
    let value = token(auth, "token", is_new);
    let shown = json!({ "type": AuthKind::StaticBearer.as_str(), "mcp_server_url": url });
    Auth { kind: AuthKind::StaticBearer, key: normal, shown, value, hosts: None, oauth: None }
}

/// An MCP server's URL: as it is shown, and as credentials are matched by.
fn server_url(auth: &mut Fields, is_new: bool) -> (Option<String>, Option<String>) {
    let url = key(auth, "mcp_server_url", is_new, URL_CHARS_MAX);
    let normal = url.as_deref().and_then(normal_url);
    if url.is_some() && normal.is_none() {
        auth.refuse("mcp_server_url", "must be an http or https URL without a user");
    }
    (url, normal)
}

/// A secret that is sent in a header.
fn token(auth: &mut Fields, name: &str, is_new: bool) -> Option<String> {
    let value = secret(auth, name, is_new);
    if value.as_deref().is_some_and(|token| {
        token.len() > TOKEN_BYTES_MAX || !token.bytes().all(|byte| (b'!'..=b'~').contains(&byte))
    }) {
        auth.refuse(
            name,
            &format!("must be at most {TOKEN_BYTES_MAX} printable ASCII characters without spaces"),
        );
    }
    value
}

/// What an update names takes the place of what was there; a new access token without `expires_at`
/// has no known end.
fn read_oauth(auth: &mut Fields, is_new: bool) -> Auth {
    auth.allow_only(&["type", "mcp_server_url", "access_token", "expires_at", "refresh"]);
    let (url, normal) = server_url(auth, is_new);
    let value = token(auth, "access_token", is_new);
    let (mut shown, mut oauth) = (Map::new(), Map::new());
    if is_new {
        shown.insert("type".to_owned(), AuthKind::McpOauth.as_str().into());
        shown.insert("mcp_server_url".to_owned(), url.into());
    }
    let is_cleared = auth.is_null("expires_at");
    let expires_at = auth.optional_string("expires_at", NAME_CHARS_MAX);
    let parsed = expires_at.as_deref().map(str::parse::<Timestamp>);
    if matches!(parsed, Some(Err(_))) {
        auth.refuse("expires_at", "must be a time such as 2026-01-31T12:00:00Z");
    }
    if is_new || is_cleared || expires_at.is_some() || value.is_some() {
        shown.insert("expires_at".to_owned(), expires_at.into());
        let seconds = parsed.and_then(Result::ok).map(|at| at.unix_micros().div_euclid(1_000_000));
        oauth.insert("expires_at".to_owned(), seconds.into());
    }
    if !is_new && auth.is_null("refresh") {
        auth.refuse("refresh", "cannot be removed: create another credential");
    }
    if let Some((refresh_shown, refresh)) =
        auth.nested("refresh", |refresh| read_refresh(refresh, is_new))
    {
        shown.insert("refresh".to_owned(), refresh_shown);
        oauth.insert("refresh".to_owned(), refresh);
    } else if is_new {
        shown.insert("refresh".to_owned(), Value::Null);
    }
    Auth {
        kind: AuthKind::McpOauth,
        key: normal,
        shown: shown.into(),
        value,
        hosts: None,
        oauth: Some(oauth.into()),
    }
}

/// What is shown of it, and what is stored.
fn read_refresh(refresh: &mut Fields, is_new: bool) -> (Value, Value) {
    refresh.allow_only(&[
        "client_id",
        "refresh_token",
        "token_endpoint",
        "token_endpoint_auth",
        "resource",
        "scope",
    ]);
    let (mut shown, mut stored) = (Map::new(), Map::new());
    for name in ["client_id", "token_endpoint"] {
        if let Some(text) = key(refresh, name, is_new, URL_CHARS_MAX) {
            shown.insert(name.to_owned(), text.clone().into());
            stored.insert(name.to_owned(), text.into());
        }
    }
    let endpoint = stored.get("token_endpoint").and_then(Value::as_str);
    if endpoint.is_some_and(|url| normal_url(url).is_none()) {
        refresh.refuse("token_endpoint", "must be an http or https URL without a user");
    }
    if let Some(token) = token(refresh, "refresh_token", is_new) {
        stored.insert("refresh_token".to_owned(), token.into());
    }
    if !is_new && refresh.value("resource").is_some() {
        refresh.refuse("resource", "cannot be changed: create another credential");
    }
    for name in ["resource", "scope"] {
        let is_cleared = refresh.is_null(name);
        let text = refresh.optional_string(name, URL_CHARS_MAX);
        if is_new || is_cleared || text.is_some() {
            shown.insert(name.to_owned(), text.clone().into());
            stored.insert(name.to_owned(), text.into());
        }
    }
    if is_new && refresh.value("token_endpoint_auth").is_none() {
        refresh.refuse("token_endpoint_auth", "token_endpoint_auth is required");
    }
    if let Some(Some((kind, secret))) = refresh.nested("token_endpoint_auth", read_client_auth) {
        shown.insert("token_endpoint_auth".to_owned(), json!({ "type": kind }));
        stored.insert(
            "token_endpoint_auth".to_owned(),
            json!({ "type": kind, "client_secret": secret }),
        );
    }
    (shown.into(), stored.into())
}

/// A client's way to authenticate, and its secret. An update names both.
fn read_client_auth(auth: &mut Fields) -> Option<(ClientAuthKind, Option<String>)> {
    auth.allow_only(&["type", "client_secret"]);
    let kind = match auth.named_string("type", BODY_BYTES_MAX)?.as_str() {
        "none" => ClientAuthKind::None,
        "client_secret_basic" => ClientAuthKind::ClientSecretBasic,
        "client_secret_post" => ClientAuthKind::ClientSecretPost,
        _ => {
            auth.refuse("type", "must be 'none', 'client_secret_basic' or 'client_secret_post'");
            return None;
        }
    };
    let secret = auth.optional_string("client_secret", TOKEN_BYTES_MAX);
    if secret.as_deref().unwrap_or_default().is_empty() != (kind == ClientAuthKind::None) {
        auth.refuse("client_secret", "is required, unless the type is 'none'");
    }
    Some((kind, secret))
}

/// What a credential is for: it does not change.
fn key(auth: &mut Fields, name: &str, is_new: bool, chars_max: usize) -> Option<String> {
    if is_new {
        return auth.named_string(name, chars_max);
    }
    if auth.value(name).is_some() {
        auth.refuse(name, "cannot be changed: create another credential");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::Body;

    fn read(auth: Value, is_new: bool) -> Result<Auth, String> {
        let mut fields = Body::from_json(&json!({ "auth": auth })).fields().unwrap();
        let auth = fields.nested("auth", |auth| super::read(auth, is_new)).flatten();
        fields.finish().map_err(|error| format!("{error:?}"))?;
        Ok(auth.unwrap())
    }

    #[test]
    fn a_variable_is_read_and_its_value_is_not_shown() {
        let unrestricted = json!({ "type": "unrestricted" });
        let auth = json!({ "type": "environment_variable", "secret_name": "A", "secret_value": "SENTINEL", "networking": unrestricted });
        let read_auth = read(auth, true).unwrap();
        assert_eq!(
            (read_auth.key.as_deref(), read_auth.value.as_deref()),
            (Some("A"), Some("SENTINEL"))
        );
        assert!(!read_auth.shown.to_string().contains("SENTINEL"));
        let with = |name: &str, value: Value| {
            let mut auth = json!({ "type": "environment_variable", "secret_name": "A", "secret_value": "SENTINEL", "networking": unrestricted });
            auth[name] = value;
            read(auth, true)
        };
        for (name, value) in [
            ("secret_name", json!("A-B")),
            ("secret_name", json!("")),
            ("secret_name", json!("AOD_TURN")),
            ("secret_value", json!("")),
            ("secret_value", json!("x\0")),
            ("secret_value", Value::Null),
            ("networking", json!({ "type": "limited" })),
            ("networking", json!({ "type": "limited", "allowed_hosts": [] })),
            ("networking", json!({ "type": "limited", "allowed_hosts": ["https://a.example"] })),
            ("networking", json!({ "type": "limited", "allowed_hosts": vec!["a.example"; 17] })),
            ("networking", json!({ "type": "unrestricted", "allowed_hosts": ["a.example"] })),
            ("networking", Value::Null),
            ("networking", json!({})),
            ("injection_location", json!({ "header": "yes" })),
            ("injection_location", Value::Null),
            ("token", json!("t")),
        ] {
            let refused = with(name, value.clone()).unwrap_err();
            assert!(!refused.contains("SENTINEL"), "{name} {value}: {refused}");
        }
        assert!(with("injection_location", json!({ "header": true, "body": true })).is_ok());
    }

    #[test]
    fn a_variable_for_named_hosts_is_put_into_headers_alone() {
        let limited =
            json!({ "type": "limited", "allowed_hosts": ["a.example", "*.b.example:8443"] });
        let of = |networking: &Value, location: Value| {
            let mut auth = json!({ "type": "environment_variable", "secret_name": "A", "secret_value": "v", "networking": networking });
            if !location.is_null() {
                auth["injection_location"] = location;
            }
            read(auth, true).unwrap()
        };
        let auth = of(&limited, Value::Null);
        let hosts = ["a.example", "*.b.example:8443"].map(str::to_owned).to_vec();
        assert_eq!(auth.hosts, Some(Some(hosts)));
        assert_eq!(auth.shown["networking"], limited);
        assert_eq!(auth.shown["injection_location"], json!({ "header": true, "body": false }));
        let unrestricted = json!({ "type": "unrestricted" });
        for (networking, location, is_usable) in [
            (&limited, Value::Null, true),
            (&limited, json!({ "header": true }), true),
            (&limited, json!({ "header": true, "body": true }), false),
            (&limited, json!({ "body": true }), false),
            (&limited, json!({}), false),
            (&unrestricted, Value::Null, true),
            (&unrestricted, json!({ "header": true, "body": true }), true),
            (&unrestricted, json!({ "header": true }), false),
        ] {
            let auth = of(networking, location.clone());
            let used = check_use(&auth.shown, Some("v"));
            assert_eq!(used.is_ok(), is_usable, "{networking} {location}");
        }
        assert!(check_use(&auth.shown, Some("two\nlines")).is_err());
        // An update names what changes.
        let update = |change: Value| {
            let mut auth = json!({ "type": "environment_variable" });
            merge(&mut auth, change);
            read(auth, false).unwrap()
        };
        assert_eq!(update(json!({ "secret_value": "w" })).shown, json!({}));
        let auth = update(json!({ "networking": unrestricted }));
        assert_eq!(auth.hosts, Some(None));
        assert_eq!(auth.shown["injection_location"], json!({ "header": true, "body": true }));
        let auth = update(json!({ "injection_location": { "body": false } }));
        assert_eq!(auth.shown, json!({ "injection_location": { "body": false } }));
        assert!(
            read(json!({ "type": "environment_variable", "networking": null }), false).is_err()
        );
    }

    #[test]
    fn a_bearer_is_kept_under_its_servers_normal_url() {
        let bearer = |url: &str, token: &str| {
            read(json!({ "type": "static_bearer", "mcp_server_url": url, "token": token }), true)
        };
        let auth = bearer("HTTPS://Mcp.Example:443/sse/", "t").unwrap();
        assert_eq!(auth.key.as_deref(), Some("https://mcp.example/sse"));
        assert_eq!(auth.shown["mcp_server_url"], "HTTPS://Mcp.Example:443/sse/");
        for (url, token) in [
            ("x", "t"),
            ("https://a/", ""),
            ("https://a/", "a b"),
            ("https://a/", "a\nb"),
            ("https://u@a/", "t"),
        ] {
            assert!(bearer(url, token).is_err(), "{url} {token}");
        }
        assert!(read(json!({ "type": "mcp_oauth" }), true).is_err());
    }

    #[test]
    fn an_update_changes_no_key() {
        assert_eq!(
            read(json!({ "type": "static_bearer", "token": "t" }), false).unwrap().value.as_deref(),
            Some("t")
        );
        assert_eq!(read(json!({ "type": "environment_variable" }), false).unwrap().value, None);
        for auth in [
            json!({ "type": "static_bearer", "mcp_server_url": "https://a/" }),
            json!({ "type": "environment_variable", "secret_name": "B" }),
            json!({ "type": "environment_variable", "secret_value": null }),
        ] {
            assert!(read(auth.clone(), false).is_err(), "{auth}");
        }
    }

    fn document(update: AuthUpdate) -> Value {
        match update.secret {
            SecretUpdate::Unchanged => Value::Null,
            SecretUpdate::Members(members) => json!({ "members": members }),
            SecretUpdate::Document(document) => json!({ "document": document }),
        }
    }

    #[test]
    fn a_credential_does_not_become_one_of_another_type() {
        let bearer = read(json!({ "type": "static_bearer", "token": "t" }), false).unwrap();
        assert!(bearer.update(json!({ "type": "mcp_oauth" })).is_err());
    }

    #[test]
    fn an_update_without_a_new_token_stores_nothing() {
        let shown = json!({ "type": "static_bearer", "mcp_server_url": "https://a/" });
        let update = read(json!({ "type": "static_bearer" }), false).unwrap().update(shown.clone());
        assert_eq!(document(update.unwrap()), Value::Null);
        let renewed = read(json!({ "type": "static_bearer", "token": "t" }), false).unwrap();
        let stored = document(renewed.update(shown).unwrap());
        assert_eq!(stored["document"]["key"], json!("https://a"));
    }

    #[test]
    fn new_networking_takes_the_place_of_the_former_one() {
        let shown = json!({
            "type": "environment_variable",
            "secret_name": "A",
            "networking": { "type": "limited", "allowed_hosts": ["a.example"] },
            "injection_location": { "header": true, "body": false },
        });
        let change =
            json!({ "type": "environment_variable", "networking": { "type": "unrestricted" } });
        let update = read(change, false).unwrap().update(shown.clone()).unwrap();
        let networking = update.shown.as_ref().unwrap()["networking"].clone();
        assert_eq!(networking, json!({ "type": "unrestricted" }));
        assert_eq!(document(update), json!({ "members": { "hosts": null } }));
        // What the variable's name does not allow is refused, although only the value is new.
        let bad = json!({ "type": "environment_variable", "secret_value": "two\nlines" });
        assert!(read(bad, false).unwrap().update(shown).is_err());
    }

    #[test]
    fn a_refresh_is_renewed_in_place_and_added_to_no_credential() {
        let change = json!({ "type": "mcp_oauth", "access_token": "new", "refresh": { "refresh_token": "r" } });
        let update = |refresh: Value| {
            let shown =
                json!({ "type": "mcp_oauth", "mcp_server_url": "https://a/", "refresh": refresh });
            read(change.clone(), false).unwrap().update(shown)
        };
        assert!(update(Value::Null).is_err());
        let stored = document(update(json!({ "client_id": "c", "scope": "s" })).unwrap());
        assert_eq!(
            stored["members"],
            json!({ "value": "new", "oauth": { "expires_at": null, "refresh": { "refresh_token": "r" } } })
        );
    }
}
