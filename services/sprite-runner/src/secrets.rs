//! A session's secrets, redeemed for one piece of work and forgotten with it.

use std::{collections::BTreeMap, time::Duration};

use bus::Failure;
use contract::{
    rpc,
    vault::{Bundle, RedeemLeaseRequest},
};
use prost::Message as _;
use sealing::KeyPair;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use types::{CredentialKind, McpServer};
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

/// Secrets by what they are for. Cannot be printed; wiped when dropped.
#[derive(Debug)]
pub struct Secrets(BTreeMap<String, SecretString>);

impl Secrets {
    /// Opens a lease with the key that was made for its claim.
    ///
    /// # Errors
    /// When the vault refuses or does not answer.
    pub async fn redeem(runner: &Runner, lease_id: &str, key: &KeyPair) -> Result<Self, Failure> {
        let request =
            RedeemLeaseRequest { lease_id: lease_id.to_owned(), public_key: key.public().to_vec(), runner: runner.name.to_string() };
        let reply = runner.bus.call::<rpc::RedeemLease>(&request, DEADLINE).await?;
        let plaintext = key.open(&reply.sealed, lease_id.as_bytes()).map_err(Failure::internal)?;
        let bundle = Bundle::decode(plaintext.as_slice()).map_err(Failure::internal)?;
        let mut secrets = BTreeMap::new();
        for mut secret in bundle.secrets {
            if let Ok(text) = std::str::from_utf8(&secret.value) {
                secrets.insert(std::mem::take(&mut secret.kind), SecretString::from(text));
            }
            secret.value.zeroize();
        }
        Ok(Self(secrets))
    }

    /// Finds every value in texts.
    pub fn masker(&self) -> Masker {
        let mut values: Vec<Zeroizing<String>> = Vec::new();
        for (kind, secret) in &self.0 {
            match kind.as_str() {
                ENV_VARS | MCP_SERVERS | SESSION => collect_texts(self.document(kind), &mut values),
                _ => values.push(secret.expose_secret().to_owned().into()),
            }
        }
        Masker::new(values.iter().map(|value| value.as_str()))
    }

    pub fn credential(&self, kind: CredentialKind) -> Option<&SecretString> {
        self.0.get(kind.as_str())
    }

    /// The stored credentials, under the variables that the CLIs read.
    pub fn credential_vars(&self) -> Vec<(String, SecretString)> {
        let var = |kind: CredentialKind| Some((kind.env_var()?.to_owned(), self.credential(kind)?.clone()));
        CredentialKind::ALL.into_iter().filter_map(var).collect()
    }

    fn document<T: DeserializeOwned + Default>(&self, kind: &str) -> T {
        self.0.get(kind).and_then(|text| serde_json::from_str(text.expose_secret()).ok()).unwrap_or_default()
    }

    /// The environment's variables, then the session's own, which override them.
    pub fn vars(&self) -> Vec<(String, SecretString)> {
        let environment: BTreeMap<String, String> = self.document(ENV_VARS);
        let session: SessionDocument = self.document(SESSION);
        environment.into_iter().chain(session.env).map(|(name, value)| (name, value.into())).collect()
    }

    /// The tokens of repositories, by the path that those lie at.
    pub fn repository_tokens(&self) -> BTreeMap<String, SecretString> {
        let session: SessionDocument = self.document(SESSION);
        session.tokens.into_iter().map(|(path, token)| (path, token.into())).collect()
    }

    /// MCP servers with the values that are redacted everywhere else.
    pub fn fill_in(&self, mut servers: Vec<McpServer>) -> Vec<McpServer> {
        let values: BTreeMap<String, BTreeMap<String, String>> = self.document(MCP_SERVERS);
        for server in &mut servers {
            if let Some(values) = values.get(&server.name) {
                server.secrets_mut().extend(values.clone());
            }
        }
        servers
    }
}

fn collect_texts(value: Value, texts: &mut Vec<Zeroizing<String>>) {
    match value {
        Value::String(text) => texts.push(text.into()),
        Value::Array(values) => values.into_iter().for_each(|value| collect_texts(value, texts)),
        Value::Object(fields) => fields.into_iter().for_each(|(_, value)| collect_texts(value, texts)),
        _ => {}
    }
}
