//! A session's secrets, redeemed for one piece of work and forgotten with it.

use std::{collections::BTreeMap, time::Duration};

use bus::RpcError;
use contract::{
    rpc,
    vault::{Bundle, RedeemLeaseRequest, Route, RouteKind},
};
use prost::Message as _;
use sealing::KeyPair;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use sprites::OutsideSecret;
use types::{
    CredentialKind, McpServer, Provider, SessionId,
    agent::{McpTransport, REDACTED},
    route::SESSION_HEADER,
    vault::{self, AuthKind, CredentialDocument},
};
use zeroize::{Zeroize as _, Zeroizing};

use crate::{Runner, mask::Masker};

const DEADLINE: Duration = Duration::from_secs(10);
/// The kinds that documents are put into the vault with. Each is a JSON object.
const ENV_VARS: &str = "env_vars";
const MCP_SERVERS: &str = "mcp_servers";
const SESSION: &str = "session";

/// A session's own secrets, as the gateway put them.
#[derive(Default, Deserialize)]
#[serde(default)]
struct SessionDocument {
    env: BTreeMap<String, String>,
    /// By the path that their repositories lie at.
    tokens: BTreeMap<String, String>,
}

/// The token with which an agent authenticates at the model gateway. Generated for a claim; good
/// for its session alone, and for nothing but the model gateway.
#[derive(Debug)]
pub struct ModelToken(SecretString);

impl ModelToken {
    /// # Errors
    /// When the operating system gives no randomness.
    pub fn generate() -> Result<Self, getrandom::Error> {
        let mut bytes = Zeroizing::new([0_u8; 32]);
        getrandom::fill(bytes.as_mut())?;
        let hex: Zeroizing<String> =
            bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into();
        Ok(Self(format!("aod_session_{}", hex.as_str()).into()))
    }

    /// Its SHA-256, which other services know.
    pub fn hash(&self) -> Vec<u8> {
        Sha256::digest(self.0.expose_secret().as_bytes()).to_vec()
    }
}

/// Where a server is reached by way of the model gateway.
pub struct AtGateway {
    pub url: String,
    pub token: String,
}

/// Secrets by what they are for. Cannot be printed; wiped when dropped.
#[derive(Debug)]
pub struct Secrets {
    values: BTreeMap<String, SecretString>,
    /// Of the session's vaults: one for each variable and each server.
    credentials: Vec<CredentialDocument>,
    /// Where the deployment has a model gateway: the credentials that the agent's token stands for
    /// there.
    proxied: Vec<CredentialKind>,
    /// If the deployment has a model gateway: routes whose secrets it adds, which are not here.
    routes: Vec<Route>,
    model_token: Option<ModelToken>,
    /// Whose turn it is; none where no agent is run.
    session: Option<SessionId>,
}

impl Secrets {
    /// Opens a lease with the key that was made for its claim.
    ///
    /// # Errors
    /// When the vault refuses or does not answer.
    pub async fn redeem(runner: &Runner, lease_id: &str, key: &KeyPair) -> Result<Self, RpcError> {
        let request = RedeemLeaseRequest {
            lease_id: lease_id.to_owned(),
            public_key: key.public().to_vec(),
            runner: runner.name.to_string(),
        };
        let reply = runner.bus.call::<rpc::RedeemLease>(&request, DEADLINE).await?;
        let plaintext = key.open(&reply.sealed, lease_id.as_bytes()).map_err(RpcError::internal)?;
        let bundle = Bundle::decode(plaintext.as_slice()).map_err(RpcError::internal)?;
        let (mut values, mut credentials) = (BTreeMap::new(), Vec::new());
        for mut secret in bundle.secrets {
            if secret.kind == vault::DOCUMENT_KIND {
                credentials
                    .extend(serde_json::from_slice::<CredentialDocument>(&secret.value).ok());
            } else if let Ok(text) = std::str::from_utf8(&secret.value) {
                values.insert(std::mem::take(&mut secret.kind), SecretString::from(text));
            }
            secret.value.zeroize();
        }
        let proxied = bundle.proxied_kinds.iter().filter_map(|kind| kind.parse().ok()).collect();
        let routes = bundle.routes;
        Ok(Self { values, credentials, proxied, routes, model_token: None, session: None })
    }

    /// Those of a session's turn, with the token that was named in the claim of these secrets.
    pub fn of_turn(self, session: SessionId, model_token: Option<ModelToken>) -> Self {
        Self { session: Some(session), model_token, ..self }
    }

    /// Finds every value in texts.
    pub fn masker(&self) -> Masker {
        let mut values: Vec<Zeroizing<String>> = Vec::new();
        values.extend(self.credentials.iter().map(|credential| credential.value.clone().into()));
        values
            .extend(self.model_token.iter().map(|token| token.0.expose_secret().to_owned().into()));
        for (kind, secret) in &self.values {
            match kind.as_str() {
                ENV_VARS | MCP_SERVERS | SESSION => collect_texts(self.document(kind), &mut values),
                _ => values.push(secret.expose_secret().to_owned().into()),
            }
        }
        Masker::new(values.iter().map(|value| value.as_str()))
    }

    pub fn credential(&self, kind: CredentialKind) -> Option<&SecretString> {
        self.values.get(kind.as_str())
    }

    /// Under the variables that the CLIs read: the stored credentials, or the token that stands for
    /// them.
    pub fn credential_vars(&self) -> Vec<(String, SecretString)> {
        let own: Vec<Provider> =
            Provider::ALL.into_iter().filter(|provider| self.is_proxied(*provider)).collect();
        let proxied = |kind: CredentialKind| {
            let proxied = self.proxied.contains(&kind) && own.contains(&provider_of(kind)?);
            self.model_token.as_ref().filter(|_| proxied).map(|token| token.0.clone())
        };
        let var = |kind: CredentialKind| {
            Some((
                kind.env_var()?.to_owned(),
                self.credential(kind).cloned().or_else(|| proxied(kind))?,
            ))
        };
        CredentialKind::ALL.into_iter().filter_map(var).collect()
    }

    /// The stored credentials that are in the sandbox, under the variables that the CLIs read.
    pub fn stored_vars(&self) -> Vec<(String, SecretString)> {
        let var = |kind: CredentialKind| {
            Some((kind.env_var()?.to_owned(), self.credential(kind)?.clone()))
        };
        CredentialKind::ALL.into_iter().filter_map(var).collect()
    }

    /// Whether the sandbox may have stored credentials: these, or those of an earlier claim that
    /// were removed since. A model gateway keeps them outside.
    pub fn may_be_in_sandbox(&self) -> bool {
        self.model_token.is_none()
    }

    /// Whether the agent's requests to a provider go through the model gateway. Those of a session
    /// that brings a key or an address of its own do not: the gateway would not know the key.
    pub fn is_proxied(&self, provider: Provider) -> bool {
        let stored = self.proxied.iter().any(|kind| provider_of(*kind) == Some(provider));
        stored
            && self.model_token.is_some()
            && !self.vars().iter().any(|(name, _)| own_variables(provider).contains(&name.as_str()))
    }

    /// The variable with which the session sends requests to an address of its own, if it brings no
    /// key for it: stored keys are at the model gateway, and go to no other address.
    pub fn address_without_key(&self, provider: Provider) -> Option<&'static str> {
        let stored = self.proxied.iter().any(|kind| provider_of(*kind) == Some(provider));
        let vars = self.vars();
        let is_set = |name: &str| vars.iter().any(|(set, _)| set == name);
        let (address, keys) = own_variables(provider).split_last()?;
        (stored
            && self.model_token.is_some()
            && is_set(address)
            && !keys.iter().any(|key| is_set(key)))
        .then_some(*address)
    }

    /// Whether all of the agent's model requests go through the model gateway.
    pub fn is_metered(&self) -> bool {
        let has_own = |provider: Provider| {
            self.vars().iter().any(|(name, _)| own_variables(provider).contains(&name.as_str()))
        };
        self.model_token.is_some()
            && !self.proxied.is_empty()
            && !Provider::ALL.into_iter().any(has_own)
    }

    fn document<T: DeserializeOwned + Default>(&self, kind: &str) -> T {
        self.values
            .get(kind)
            .and_then(|text| serde_json::from_str(text.expose_secret()).ok())
            .unwrap_or_default()
    }

    /// The environment's variables, then those of vaults, then the session's own: later ones
    /// override.
    pub fn vars(&self) -> Vec<(String, SecretString)> {
        let environment: BTreeMap<String, String> = self.document(ENV_VARS);
        let session: SessionDocument = self.document(SESSION);
        let of_vaults = self
            .credentials
            .iter()
            .filter(|credential| credential.kind == AuthKind::EnvironmentVariable);
        let of_vaults = of_vaults.filter_map(|credential| {
            let value = match credential.hosts {
                None => credential.value.clone(),
                Some(_) => self.placeholder(&credential.key)?,
            };
            Some((credential.key.clone(), value))
        });
        environment
            .into_iter()
            .chain(of_vaults)
            .chain(session.env)
            .map(|(name, value)| (name, value.into()))
            .collect()
    }

    /// What the agent has in place of a variable's value: the same in all turns of a session.
    fn placeholder(&self, name: &str) -> Option<String> {
        let digest = Sha256::new()
            .chain_update(self.session?.to_string())
            .chain_update([0])
            .chain_update(name);
        let hex: String =
            digest.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        Some(format!("aod_placeholder_{hex}"))
    }

    /// The variables of vaults whose values are not in the sandbox, by name.
    pub fn outside(&self) -> BTreeMap<String, OutsideSecret> {
        let session: SessionDocument = self.document(SESSION);
        let of = |credential: &CredentialDocument| {
            let is_overridden = session.env.contains_key(&credential.key);
            let outside = OutsideSecret {
                placeholder: self.placeholder(&credential.key)?,
                value: credential.value.as_str().into(),
                hosts: credential.hosts.clone().filter(|_| !is_overridden)?,
            };
            Some((credential.key.clone(), outside))
        };
        self.credentials.iter().filter_map(of).collect()
    }

    /// The token that a vault holds for an MCP server.
    fn bearer(&self, url: &str) -> Option<&str> {
        let url = vault::normal_url(url)?;
        let is_for =
            |credential: &&CredentialDocument| credential.kind.is_bearer() && credential.key == url;
        self.credentials.iter().find(is_for).map(|credential| credential.value.as_str())
    }

    /// The tokens of repositories, by the path that those lie at.
    pub fn repository_tokens(&self) -> BTreeMap<String, SecretString> {
        let session: SessionDocument = self.document(SESSION);
        session.tokens.into_iter().map(|(path, token)| (path, token.into())).collect()
    }

    /// The token that is shown to the model gateway on routes, where there are any.
    pub fn route_token(&self) -> Option<&str> {
        self.model_token
            .as_ref()
            .filter(|_| !self.routes.is_empty())
            .map(|token| token.0.expose_secret())
    }

    /// Repositories that are reached by way of the model gateway: the URL of each, and its path
    /// there.
    pub fn repository_routes(&self) -> impl Iterator<Item = (&str, &str)> {
        let git = self.routes.iter().filter(|route| route.kind() == RouteKind::Git);
        git.map(|route| (route.url.as_str(), route.path.as_str()))
    }

    /// MCP servers with the values that are redacted everywhere else. Those that have secrets at
    /// the model gateway are reached there, by what `at_gateway` makes of their paths.
    pub fn fill_in(
        &self,
        servers: Vec<McpServer>,
        at_gateway: impl Fn(&str) -> AtGateway,
    ) -> Vec<McpServer> {
        let is_of = |route: &&Route, server: &McpServer| {
            route.kind() == RouteKind::Mcp && route.name == server.name
        };
        let led = |mut server: McpServer| {
            let Some(route) = self.routes.iter().find(|route| is_of(route, &server)) else {
                return server;
            };
            if let McpTransport::Url { url, headers } = &mut server.transport {
                let AtGateway { url: address, token } = at_gateway(&route.path);
                *url = address;
                headers.retain(|_, value| value != REDACTED);
                headers.insert(SESSION_HEADER.to_owned(), token);
            }
            server
        };
        self.filled(servers).into_iter().map(led).collect()
    }

    fn filled(&self, mut servers: Vec<McpServer>) -> Vec<McpServer> {
        let values: BTreeMap<String, BTreeMap<String, String>> = self.document(MCP_SERVERS);
        for server in &mut servers {
            if let Some(values) = values.get(&server.name) {
                server.secrets_mut().extend(values.clone());
            }
            if let McpTransport::Url { url, headers } = &mut server.transport
                && let Some(token) = self.bearer(url)
            {
                headers.retain(|name, _| !name.eq_ignore_ascii_case("authorization"));
                headers.insert("Authorization".to_owned(), format!("Bearer {token}"));
            }
        }
        servers
    }
}

fn provider_of(kind: CredentialKind) -> Option<Provider> {
    match kind {
        CredentialKind::Provider(provider) => Some(provider),
        CredentialKind::ClaudeOauth => Some(Provider::Anthropic),
        CredentialKind::Sprites => None,
    }
}

/// The variables by which a user gives a session's CLI a key or, the last one, an address of the
/// user's own.
fn own_variables(provider: Provider) -> &'static [&'static str] {
    match provider {
        Provider::Anthropic => &[
            "ANTHROPIC_API_KEY",
            "ANTHROPIC_AUTH_TOKEN",
            "CLAUDE_CODE_OAUTH_TOKEN",
            "ANTHROPIC_BASE_URL",
        ],
        Provider::Openai => &["OPENAI_API_KEY", "OPENAI_BASE_URL"],
        Provider::Google => &[
            "GEMINI_API_KEY",
            "GOOGLE_API_KEY",
            "GOOGLE_GENERATIVE_AI_API_KEY",
            "GOOGLE_GEMINI_BASE_URL",
        ],
    }
}

fn collect_texts(value: Value, texts: &mut Vec<Zeroizing<String>>) {
    match value {
        Value::String(text) => texts.push(text.into()),
        Value::Array(values) => values.into_iter().for_each(|value| collect_texts(value, texts)),
        Value::Object(fields) => {
            fields.into_iter().for_each(|(_, value)| collect_texts(value, texts))
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secrets(proxied: &[CredentialKind], env: &str) -> Secrets {
        let values = BTreeMap::from([(SESSION.to_owned(), SecretString::from(env))]);
        let model_token = Some(ModelToken::generate().unwrap());
        Secrets {
            values,
            credentials: Vec::new(),
            proxied: proxied.to_vec(),
            routes: Vec::new(),
            model_token,
            session: Some(SessionId::new()),
        }
    }

    #[test]
    fn keys_that_are_in_the_sandbox_are_told_from_tokens_that_stand_for_them() {
        let (anthropic, openai) = (
            CredentialKind::Provider(Provider::Anthropic),
            CredentialKind::Provider(Provider::Openai),
        );
        let values = [anthropic, CredentialKind::Sprites]
            .map(|kind| (kind.as_str().to_owned(), SecretString::from("key")));
        let secrets = Secrets { values: values.into(), ..secrets(&[openai], "{}") };
        let names = |vars: Vec<(String, SecretString)>| {
            vars.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert_eq!(names(secrets.credential_vars()), ["ANTHROPIC_API_KEY", "OPENAI_API_KEY"]);
        assert_eq!(names(secrets.stored_vars()), ["ANTHROPIC_API_KEY"]);
    }

    #[test]
    fn a_sandbox_may_have_a_key_that_was_removed_since_where_no_model_gateway_keeps_keys() {
        let with_gateway = secrets(&[CredentialKind::Provider(Provider::Openai)], "{}");
        assert!(!with_gateway.may_be_in_sandbox());
        assert!(Secrets { model_token: None, ..secrets(&[], "{}") }.may_be_in_sandbox());
    }

    #[test]
    fn a_token_stands_for_the_credentials_unless_the_session_brings_its_own() {
        let (anthropic, openai) = (
            CredentialKind::Provider(Provider::Anthropic),
            CredentialKind::Provider(Provider::Openai),
        );
        let names = |secrets: &Secrets| {
            secrets.credential_vars().into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        let proxied = secrets(&[anthropic, openai, CredentialKind::ClaudeOauth], "{}");
        assert_eq!(
            names(&proxied),
            ["ANTHROPIC_API_KEY", "OPENAI_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN"]
        );
        let token = proxied.credential_vars().remove(0).1;
        assert_eq!(
            proxied.model_token.as_ref().unwrap().hash(),
            Sha256::digest(token.expose_secret()).to_vec()
        );
        assert!(proxied.is_proxied(Provider::Anthropic) && !proxied.is_proxied(Provider::Google));
        let own = secrets(&[anthropic, openai], r#"{"env":{"ANTHROPIC_AUTH_TOKEN":"mine"}}"#);
        assert_eq!(names(&own), ["OPENAI_API_KEY"]);
        assert!(!own.is_proxied(Provider::Anthropic) && own.is_proxied(Provider::Openai));
        assert!(proxied.is_metered() && !own.is_metered() && !secrets(&[], "{}").is_metered());
        assert_ne!(proxied.model_token.unwrap().hash(), own.model_token.unwrap().hash());
    }

    #[test]
    fn an_address_of_the_sessions_own_needs_a_key_of_its_own() {
        let anthropic = CredentialKind::Provider(Provider::Anthropic);
        let named = |stored: &[CredentialKind], env: &str| {
            secrets(stored, env).address_without_key(Provider::Anthropic)
        };
        let address = r#"{"env":{"ANTHROPIC_BASE_URL":"http://m"}}"#;
        assert_eq!(named(&[anthropic], address), Some("ANTHROPIC_BASE_URL"));
        assert_eq!(
            named(
                &[anthropic],
                r#"{"env":{"ANTHROPIC_BASE_URL":"http://m","ANTHROPIC_AUTH_TOKEN":"mine"}}"#
            ),
            None
        );
        assert_eq!((named(&[anthropic], "{}"), named(&[], address)), (None, None));
        let without_gateway = Secrets { model_token: None, ..secrets(&[anthropic], address) };
        assert_eq!(without_gateway.address_without_key(Provider::Anthropic), None);
    }

    #[test]
    fn credentials_of_vaults_become_variables_and_the_authorization_of_their_server() {
        let credential = |kind, key: &str, value: &str| CredentialDocument {
            kind,
            key: key.to_owned(),
            value: value.to_owned(),
            hosts: None,
            oauth: None,
        };
        let mut secrets = secrets(&[], r#"{"env":{"A":"session"}}"#);
        secrets
            .values
            .insert(ENV_VARS.to_owned(), r#"{"A":"environment","B":"environment"}"#.into());
        secrets.credentials = vec![
            credential(AuthKind::EnvironmentVariable, "B", "vault"),
            credential(AuthKind::StaticBearer, "https://mcp.example/sse", "token"),
        ];
        let vars: BTreeMap<String, String> = secrets
            .vars()
            .into_iter()
            .map(|(name, value)| (name, value.expose_secret().to_owned()))
            .collect();
        assert_eq!(
            vars,
            BTreeMap::from(
                [("A", "session"), ("B", "vault")]
                    .map(|(name, value)| (name.to_owned(), value.to_owned()))
            )
        );
        let server = |url: &str| {
            let headers = BTreeMap::from([("authorization".to_owned(), "Basic x".to_owned())]);
            McpServer {
                name: "s".to_owned(),
                transport: McpTransport::Url { url: url.to_owned(), headers },
            }
        };
        let nowhere = |_: &str| -> AtGateway { unreachable!("there are no routes") };
        let filled =
            |url: &str| secrets.fill_in(vec![server(url)], nowhere).remove(0).secrets().clone();
        assert_eq!(
            filled("https://MCP.example:443/sse/"),
            BTreeMap::from([("Authorization".to_owned(), "Bearer token".to_owned())])
        );
        assert_eq!(filled("https://mcp.example/other"), server("").secrets().clone());
    }

    #[test]
    fn a_variable_for_named_hosts_is_a_placeholder_in_the_sandbox() {
        let credential = |key: &str| CredentialDocument {
            kind: AuthKind::EnvironmentVariable,
            key: key.to_owned(),
            value: format!("SENTINEL-{key}"),
            hosts: Some(vec!["api.example.com".to_owned()]),
            oauth: None,
        };
        let mut secrets = secrets(&[], r#"{"env":{"OVERRIDDEN":"session"}}"#);
        secrets.credentials = vec![credential("A"), credential("B"), credential("OVERRIDDEN")];
        let values = |secrets: &Secrets| -> Vec<String> {
            secrets.vars().iter().map(|(_, value)| value.expose_secret().to_owned()).collect()
        };
        let vars = values(&secrets);
        assert!(!vars.concat().contains("SENTINEL") && vars[0] != vars[1], "{vars:?}");
        let outside = secrets.outside();
        assert_eq!(outside.keys().collect::<Vec<_>>(), ["A", "B"]);
        assert_eq!(outside["A"].placeholder, vars[0]);
        assert_eq!(outside["A"].value.expose_secret(), "SENTINEL-A");
        // As in the next turn, with another value.
        secrets.credentials[0].value = "SENTINEL-rotated".to_owned();
        assert_eq!(values(&secrets), vars);
        assert_eq!(secrets.masker().text("SENTINEL-rotated"), "***");
        secrets.session = Some(SessionId::new());
        assert_ne!(values(&secrets), vars);
    }

    #[test]
    fn a_server_with_a_route_is_reached_at_the_model_gateway_without_its_secrets() {
        let mut secrets = secrets(&[], "{}");
        let route = |kind: RouteKind, name: &str, path: &str| Route {
            kind: kind.into(),
            name: name.to_owned(),
            path: path.to_owned(),
            url: "https://github.com/o/r".to_owned(),
            ..Route::default()
        };
        secrets.routes = vec![
            route(RouteKind::Mcp, "led", "mcp/led-1"),
            route(RouteKind::Git, "direct", "git/github.com/o/r"),
        ];
        // What refers to a variable of the sandbox is all that the lease holds of this server.
        secrets.values.insert(
            MCP_SERVERS.to_owned(),
            r#"{"led":{"X-Plain":"${NAME}"},"direct":{"X-Key":"key"}}"#.into(),
        );
        let server = |name: &str| {
            let headers =
                ["X-Plain", "X-Key"].map(|header| (header.to_owned(), REDACTED.to_owned()));
            McpServer {
                name: name.to_owned(),
                transport: McpTransport::Url {
                    url: "https://x/".to_owned(),
                    headers: headers.into(),
                },
            }
        };
        let at_gateway = |path: &str| AtGateway {
            url: format!("http://gateway/{path}"),
            token: "token".to_owned(),
        };
        let servers = secrets.fill_in(vec![server("led"), server("direct")], at_gateway);
        let headers = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        let url = "http://gateway/mcp/led-1".to_owned();
        let led = McpTransport::Url {
            url,
            headers: headers(&[("X-Plain", "${NAME}"), (SESSION_HEADER, "token")]),
        };
        assert!(servers[0].transport == led);
        assert_eq!(servers[1].secrets()["X-Key"], "key");
        assert_eq!(
            secrets.repository_routes().collect::<Vec<_>>(),
            [("https://github.com/o/r", "git/github.com/o/r")]
        );
        assert!(secrets.route_token().is_some());
    }
}
