//! Random tokens that clients hold: API keys (docs/api.md §2) and the cookies of console sessions.

use std::{fmt, marker::PhantomData};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use secrecy::{ExposeSecret as _, SecretString};
use sha2::{Digest as _, Sha256};

/// Length of 32 random bytes in URL-safe base64 without padding.
const BODY_CHARS: usize = 43;
/// How much of a key is kept for display.
const DISPLAYED: usize = 12;

/// The purpose of a token. Tokens of one kind are never accepted as another.
pub trait TokenKind {
    /// How their text begins.
    const PREFIX: &'static str;
}

/// Marks [`ApiKey`]s.
#[derive(Debug)]
pub struct OfApi;

impl TokenKind for OfApi {
    const PREFIX: &'static str = "aod_";
}

/// Marks [`ConsoleToken`]s.
#[derive(Debug)]
pub struct OfConsole;

impl TokenKind for OfConsole {
    const PREFIX: &'static str = "aodc_";
}

/// A raw API key as its owner holds it: shown once and never stored.
pub type ApiKey = Token<OfApi>;

/// The token in the cookie of a browser that is signed in.
pub type ConsoleToken = Token<OfConsole>;

/// A prefix and 32 random bytes in URL-safe base64 without padding. Never printed.
pub struct Token<K>(SecretString, PhantomData<K>);

impl<K> Clone for Token<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone(), PhantomData)
    }
}

impl<K: TokenKind> fmt::Debug for Token<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}***", K::PREFIX)
    }
}

/// The text cannot be a token of this kind, whatever the database holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an API key")]
pub struct MalformedKey;

impl<K: TokenKind> Token<K> {
    /// Creates a token from the operating system's randomness.
    ///
    /// # Errors
    /// When the operating system provides no randomness.
    pub fn generate() -> Result<Self, getrandom::Error> {
        let mut bytes = [0_u8; 32];
        getrandom::fill(&mut bytes)?;
        Ok(Self(format!("{}{}", K::PREFIX, URL_SAFE_NO_PAD.encode(bytes)).into(), PhantomData))
    }

    /// # Errors
    /// [`MalformedKey`] for a text that no token of this kind can look like.
    pub fn parse(text: &str) -> Result<Self, MalformedKey> {
        let body = text.strip_prefix(K::PREFIX).ok_or(MalformedKey)?;
        let url_safe = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'_';
        if body.len() != BODY_CHARS || !body.bytes().all(url_safe) {
            return Err(MalformedKey);
        }
        Ok(Self(text.to_owned().into(), PhantomData))
    }

    #[must_use]
    pub fn hash(&self) -> KeyHash {
        KeyHash(Sha256::digest(self.reveal().as_bytes()).into())
    }

    /// Returns the token itself, for the one response that hands it out.
    #[must_use]
    pub fn reveal(&self) -> &str {
        self.0.expose_secret()
    }
}

impl ApiKey {
    /// Returns the first 12 characters: enough to tell keys apart, useless to an attacker.
    #[must_use]
    pub fn display_prefix(&self) -> String {
        self.reveal().chars().take(DISPLAYED).collect()
    }
}

/// SHA-256 of a token: all that is stored, and all that crosses the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KeyHash([u8; 32]);

impl KeyHash {
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
                prop_assert_eq!(text.len(), 47);
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
        for text in [
            "",
            "aod_",
            "aod_short",
            &"x".repeat(47),
            &format!("aod_{}", "é".repeat(21)),
            &format!("aod_{}=", "a".repeat(42)),
        ] {
            assert_eq!(ApiKey::parse(text).err(), Some(MalformedKey), "{text}");
        }
        for text in
            ["", "aodc_", &format!("aodc_{}=", "a".repeat(42)), &format!("aodc_{}", "é".repeat(21))]
        {
            assert_eq!(ConsoleToken::parse(text).err(), Some(MalformedKey), "{text}");
        }
    }

    #[test]
    fn a_console_token_is_no_api_key_and_a_key_is_no_console_token() {
        let (token, key) = (ConsoleToken::generate().unwrap(), ApiKey::generate().unwrap());
        assert_eq!(ConsoleToken::parse(token.reveal()).unwrap().hash(), token.hash());
        assert!(
            ApiKey::parse(token.reveal()).is_err() && ConsoleToken::parse(key.reveal()).is_err()
        );
        assert!(!format!("{token:?}").contains(&token.reveal()[5..]));
    }
}
