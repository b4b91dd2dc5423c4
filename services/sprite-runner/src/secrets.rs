//! A session's secrets, redeemed for one piece of work and forgotten with it.

use std::{collections::BTreeMap, time::Duration};

use bus::Failure;
use contract::{
    rpc,
    vault::{Bundle, RedeemLeaseRequest},
};
use prost::Message as _;
use sealing::OneTimeKey;
use secrecy::{ExposeSecret as _, SecretString};
use types::CredentialKind;
use zeroize::Zeroize as _;

use crate::Runner;

const DEADLINE: Duration = Duration::from_secs(10);
/// The kind that an environment's variables are put into the vault with: a JSON object.
const ENV_VARS: &str = "env_vars";

/// Secrets by what they are for. Cannot be printed; wiped when dropped.
#[derive(Debug)]
pub struct Secrets(BTreeMap<String, SecretString>);

impl Secrets {
    /// Opens a lease with a key made for this one time.
    ///
    /// # Errors
    /// When the vault refuses or does not answer.
    pub async fn redeem(runner: &Runner, lease_id: &str) -> Result<Self, Failure> {
        let key = OneTimeKey::generate().map_err(Failure::internal)?;
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

    pub fn credential(&self, kind: CredentialKind) -> Option<&SecretString> {
        self.0.get(kind.as_str())
    }

    /// The stored credentials, under the variables that the CLIs read.
    pub fn credential_vars(&self) -> Vec<(String, SecretString)> {
        let var = |kind: CredentialKind| Some((kind.env_var()?.to_owned(), self.credential(kind)?.clone()));
        CredentialKind::ALL.into_iter().filter_map(var).collect()
    }

    /// The environment's own variables, by name.
    pub fn environment_vars(&self) -> Vec<(String, SecretString)> {
        let vars: BTreeMap<String, String> =
            self.0.get(ENV_VARS).and_then(|text| serde_json::from_str(text.expose_secret()).ok()).unwrap_or_default();
        vars.into_iter().map(|(name, value)| (name, value.into())).collect()
    }
}
