//! API keys (docs/api.md §2): `aod_` and 32 random bytes in URL-safe base64 without padding, 47 characters.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use secrecy::{ExposeSecret as _, SecretString};
use sha2::{Digest as _, Sha256};

const PREFIX: &str = "aod_";
const LENGTH: usize = 47;
/// How much of a key is kept for display.
const DISPLAYED: usize = 12;

/// A raw key as its owner holds it. Shown once, never stored, never printed.
#[derive(Clone, Debug)]
pub struct ApiKey(SecretString);

/// The text cannot be an API key, whatever the database holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an API key")]
pub struct MalformedKey;

impl ApiKey {
    /// A fresh key from the operating system's randomness.
    ///
    /// # Errors
    /// When the operating system gives no randomness.
    pub fn generate() -> Result<Self, getrandom::Error> {
        let mut bytes = [0_u8; 32];
        getrandom::fill(&mut bytes)?;
        Ok(Self(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes)).into()))
    }

    /// # Errors
    /// [`MalformedKey`] for a text that no key can look like.
    pub fn parse(text: &str) -> Result<Self, MalformedKey> {
        let body = text.strip_prefix(PREFIX).ok_or(MalformedKey)?;
        let url_safe = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'_';
        if text.len() != LENGTH || !body.bytes().all(url_safe) {
            return Err(MalformedKey);
        }
        Ok(Self(text.to_owned().into()))
    }

    #[must_use]
    pub fn hash(&self) -> KeyHash {
        KeyHash::of(self.0.expose_secret())
    }

    /// The first 12 characters: enough to tell keys apart, useless to an attacker.
    #[must_use]
    pub fn display_prefix(&self) -> String {
        self.0.expose_secret().chars().take(DISPLAYED).collect()
    }

    /// The key itself, for the one answer that shows it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        self.0.expose_secret()
    }
}

/// SHA-256 of a key: all that is stored, and all that crosses the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    pub(crate) fn of(text: &str) -> Self {
        Self(Sha256::digest(text.as_bytes()).into())
    }

    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl TryFrom<&[u8]> for KeyHash {
    type Error = MalformedKey;

    fn try_from(bytes: &[u8]) -> Result<Self, MalformedKey> {
        bytes.try_into().map(Self).map_err(|_| MalformedKey)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_text_is_a_key_or_refused_and_a_key_is_its_text(text in "\\PC{0,60}|aod_[A-Za-z0-9_-]{40,46}|aod_\\PC{43}") {
            if let Ok(key) = ApiKey::parse(&text) {
                prop_assert_eq!(key.reveal(), &text);
                prop_assert_eq!(text.len(), LENGTH);
                prop_assert!(text.is_ascii());
            }
        }
    }

    #[test]
    fn a_generated_key_has_the_published_form() {
        let key = ApiKey::generate().unwrap();
        assert_eq!(key.reveal().len(), 47);
        assert_eq!(ApiKey::parse(key.reveal()).unwrap().hash(), key.hash());
        assert_eq!(key.display_prefix(), key.reveal()[..12]);
        assert!(!format!("{key:?}").contains(&key.reveal()[4..]));
    }

    #[test]
    fn other_texts_are_refused_before_any_lookup() {
        for text in ["", "aod_", "aod_short", &"x".repeat(47), &format!("aod_{}", "é".repeat(21)), &format!("aod_{}=", "a".repeat(42))] {
            assert_eq!(ApiKey::parse(text).err(), Some(MalformedKey), "{text}");
        }
    }
}
