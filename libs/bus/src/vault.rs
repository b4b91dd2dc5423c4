//! Secrets on their way to the vault: sealed to its public key, so that the bus carries none in the
//! clear.

use std::{sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use contract::{common::Empty, rpc, vault::SealedValue};
use settings::Env;

use crate::{Bus, RpcError};

const KEY_BYTES: usize = 32;

/// The vault's public keys that a caller accepts. Without any it accepts the one that the bus
/// brings.
#[derive(Clone, Debug, Default)]
pub struct AcceptedKeys(Arc<[Vec<u8>]>);

impl AcceptedKeys {
    /// Reads `AOD_VAULT_PUBLIC_KEYS`.
    pub fn from_env(env: &mut Env) -> Self {
        let configured = env.optional(
            "AOD_VAULT_PUBLIC_KEYS",
            "accepted public keys of the vault (see `aod admin vault status`), separated by commas; empty: the one that the bus returns",
        );
        Self::parse(configured.as_deref().unwrap_or_default()).unwrap_or_else(|()| {
            env.refuse(format!("AOD_VAULT_PUBLIC_KEYS must hold keys of {KEY_BYTES} bytes in base64, separated by commas"));
            Self::default()
        })
    }

    /// # Errors
    /// When one is no key.
    #[expect(clippy::result_unit_err, reason = "there is one way to be wrong")]
    pub fn parse(text: &str) -> Result<Self, ()> {
        let keys = text.split(',').map(str::trim).filter(|key| !key.is_empty());
        let keys = keys
            .map(|key| STANDARD.decode(key).ok().filter(|key| key.len() == KEY_BYTES).ok_or(()));
        Ok(Self(keys.collect::<Result<Vec<_>, ()>>()?.into()))
    }

    fn accept(&self, key: &[u8]) -> bool {
        self.0.is_empty() || self.0.iter().any(|accepted| accepted == key)
    }
}

impl Bus {
    /// Seals a user's secret of a kind to the vault's current public key. The key is asked for each
    /// time, so that a rotation needs no other step.
    ///
    /// # Errors
    /// When the vault does not answer, or the key is none of those that are accepted.
    pub async fn seal_for_vault(
        &self,
        accepted: &AcceptedKeys,
        user: &str,
        kind: &str,
        value: &[u8],
        deadline: Duration,
    ) -> Result<SealedValue, RpcError> {
        let key = self.call::<rpc::SealingKey>(&Empty {}, deadline).await?;
        if !accepted.accept(&key.public_key) {
            tracing::error!(
                key = STANDARD.encode(&key.public_key),
                "the vault's public key is not in AOD_VAULT_PUBLIC_KEYS; refusing to send secrets"
            );
            return Err(RpcError::unavailable("The vault"));
        }
        let sealed = sealing::seal(&key.public_key, value, &context(user, kind))
            .map_err(RpcError::internal)?;
        Ok(SealedValue { key_version: key.key_version, sealed })
    }
}

/// What a sealed value is bound to.
#[must_use]
pub fn context(user: &str, kind: &str) -> Vec<u8> {
    format!("aod secret\0{user}\0{kind}").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_are_configured_exclude_all_others() {
        let key = STANDARD.encode([1; 32]);
        assert!(AcceptedKeys::parse("").unwrap().accept(&[7; 32]));
        let accepted =
            AcceptedKeys::parse(&format!("{key}, {}", STANDARD.encode([2; 32]))).unwrap();
        assert!(
            accepted.accept(&[1; 32]) && accepted.accept(&[2; 32]) && !accepted.accept(&[3; 32])
        );
        assert!(
            AcceptedKeys::parse(&STANDARD.encode([1; 31])).is_err()
                && AcceptedKeys::parse("x").is_err()
        );
    }
}
