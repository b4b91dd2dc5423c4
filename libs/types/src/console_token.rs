//! Tokens of console sessions: `aodc_` and 32 random bytes in URL-safe base64 without padding.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use secrecy::{ExposeSecret as _, SecretString};

use crate::{KeyHash, MalformedKey};

const PREFIX: &str = "aodc_";
const LENGTH: usize = 48;

/// What a browser that is signed in holds in its cookie. It is not an API key: neither is taken for the other.
#[derive(Clone, Debug)]
pub struct ConsoleToken(SecretString);

impl ConsoleToken {
    /// A fresh token from the operating system's randomness.
    ///
    /// # Errors
    /// When the operating system gives no randomness.
    pub fn generate() -> Result<Self, getrandom::Error> {
        let mut bytes = [0_u8; 32];
        getrandom::fill(&mut bytes)?;
        Ok(Self(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes)).into()))
    }

    /// # Errors
    /// [`MalformedKey`] for a text that no token can look like.
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

    /// The token itself, for the one answer that sets the cookie.
    #[must_use]
    pub fn reveal(&self) -> &str {
        self.0.expose_secret()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ApiKey;

    #[test]
    fn a_token_is_no_api_key_and_a_key_is_no_token() {
        let (token, key) = (ConsoleToken::generate().unwrap(), ApiKey::generate().unwrap());
        assert_eq!(ConsoleToken::parse(token.reveal()).unwrap().hash(), token.hash());
        assert!(ApiKey::parse(token.reveal()).is_err() && ConsoleToken::parse(key.reveal()).is_err());
        assert!(!format!("{token:?}").contains(token.reveal()));
        for text in ["", "aodc_", &format!("aodc_{}=", "a".repeat(42)), &format!("aodc_{}", "é".repeat(21))] {
            assert_eq!(ConsoleToken::parse(text).err(), Some(MalformedKey), "{text}");
        }
    }
}
