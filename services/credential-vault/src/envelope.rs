//! Envelope encryption: AES-256-GCM under a fresh data key for each secret; the data key wrapped, with AES-256-GCM too, by a
//! versioned key-encryption key. Associated data binds both to the owner, the kind and the id, so that a row moved to another place
//! does not open.

use aes_gcm::{
    Aes256Gcm, KeyInit as _, Nonce,
    aead::{Aead as _, Payload},
};
use hkdf::Hkdf;
use secrecy::{ExposeSecret as _, SecretString};
use sha2::Sha256;
use types::{SecretId, UserId};
use zeroize::Zeroizing;

const NONCE_BYTES: usize = 12;
const KEY_BYTES: usize = 32;

/// What a secret belongs to. Opening it for anything else fails.
#[derive(Debug)]
pub struct Binding<'a> {
    pub user: UserId,
    pub kind: &'a str,
    pub secret: SecretId,
}

impl Binding<'_> {
    fn associated_data(&self) -> Vec<u8> {
        format!("aod vault v1\0{}\0{}\0{}", self.user, self.kind, self.secret).into_bytes()
    }
}

/// A secret as it lies in the table.
#[derive(Debug, PartialEq)]
pub struct Sealed {
    pub key_version: i32,
    /// Nonce and ciphertext of the data key.
    pub wrapped_key: Vec<u8>,
    /// Nonce and ciphertext of the secret.
    pub ciphertext: Vec<u8>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum EnvelopeError {
    #[error("the operating system gives no randomness")]
    NoRandomness,
    #[error("encryption failed")]
    Encrypt,
    #[error("secret {secret} was encrypted with key version {version}, which is not configured")]
    UnknownKey { secret: SecretId, version: i32 },
    #[error("secret {secret} was tampered with, or the key is wrong")]
    Damaged { secret: SecretId },
}

/// The key-encryption keys. The newest encrypts; all of them decrypt.
pub struct Keyring {
    current: i32,
    keys: Vec<(i32, Aes256Gcm)>,
}

impl Keyring {
    /// Key version 1, derived from the configured secret.
    pub fn derive(secret: &SecretString) -> Result<Self, EnvelopeError> {
        let mut key = Zeroizing::new([0_u8; KEY_BYTES]);
        Hkdf::<Sha256>::new(None, secret.expose_secret().as_bytes())
            .expand(b"aod vault key-encryption key v1", key.as_mut())
            .map_err(|_| EnvelopeError::Encrypt)?;
        let cipher = Aes256Gcm::new_from_slice(key.as_ref()).map_err(|_| EnvelopeError::Encrypt)?;
        Ok(Self { current: 1, keys: vec![(1, cipher)] })
    }

    pub fn encrypt(&self, plaintext: &[u8], binding: &Binding<'_>) -> Result<Sealed, EnvelopeError> {
        let mut data_key = Zeroizing::new([0_u8; KEY_BYTES]);
        getrandom::fill(data_key.as_mut()).map_err(|_| EnvelopeError::NoRandomness)?;
        let cipher = Aes256Gcm::new_from_slice(data_key.as_ref()).map_err(|_| EnvelopeError::Encrypt)?;
        let aad = binding.associated_data();
        let (version, wrapping) = self.keys.iter().find(|(version, _)| *version == self.current).ok_or(EnvelopeError::Encrypt)?;
        Ok(Sealed {
            key_version: *version,
            wrapped_key: encrypt(wrapping, data_key.as_ref(), &aad)?,
            ciphertext: encrypt(&cipher, plaintext, &aad)?,
        })
    }

    pub fn decrypt(&self, sealed: &Sealed, binding: &Binding<'_>) -> Result<Zeroizing<Vec<u8>>, EnvelopeError> {
        let damaged = || EnvelopeError::Damaged { secret: binding.secret };
        let (_, wrapping) = self
            .keys
            .iter()
            .find(|(version, _)| *version == sealed.key_version)
            .ok_or(EnvelopeError::UnknownKey { secret: binding.secret, version: sealed.key_version })?;
        let aad = binding.associated_data();
        let data_key = decrypt(wrapping, &sealed.wrapped_key, &aad).ok_or_else(damaged)?;
        let cipher = Aes256Gcm::new_from_slice(&data_key).map_err(|_| damaged())?;
        decrypt(&cipher, &sealed.ciphertext, &aad).ok_or_else(damaged)
    }
}

fn encrypt(cipher: &Aes256Gcm, plaintext: &[u8], aad: &[u8]) -> Result<Vec<u8>, EnvelopeError> {
    let mut nonce = [0_u8; NONCE_BYTES];
    getrandom::fill(&mut nonce).map_err(|_| EnvelopeError::NoRandomness)?;
    let ciphertext = cipher.encrypt(&Nonce::from(nonce), Payload { msg: plaintext, aad }).map_err(|_| EnvelopeError::Encrypt)?;
    Ok([nonce.as_slice(), &ciphertext].concat())
}

fn decrypt(cipher: &Aes256Gcm, sealed: &[u8], aad: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let (nonce, ciphertext) = sealed.split_first_chunk::<NONCE_BYTES>()?;
    cipher.decrypt(&Nonce::from(*nonce), Payload { msg: ciphertext, aad }).ok().map(Zeroizing::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keyring(text: &str) -> Keyring {
        Keyring::derive(&text.to_owned().into()).unwrap()
    }

    #[test]
    fn a_secret_opens_only_where_it_belongs() {
        let keys = keyring("0123456789abcdef");
        let binding = Binding { user: UserId::new(), kind: "provider:anthropic", secret: SecretId::new() };
        let sealed = keys.encrypt(b"sk-secret", &binding).unwrap();
        assert_eq!(keys.decrypt(&sealed, &binding).unwrap().as_slice(), b"sk-secret");
        let damaged = Err(EnvelopeError::Damaged { secret: binding.secret });
        assert_eq!(keys.decrypt(&sealed, &Binding { kind: "provider:openai", ..binding }).map(|_| ()), damaged);
        assert_eq!(keys.decrypt(&sealed, &Binding { user: UserId::new(), ..binding }).map(|_| ()), damaged);
        assert_eq!(keyring("another key, 16+").decrypt(&sealed, &binding).map(|_| ()), damaged);
    }

    #[test]
    fn a_damaged_row_is_an_error_that_names_it() {
        let keys = keyring("0123456789abcdef");
        let binding = Binding { user: UserId::new(), kind: "k", secret: SecretId::new() };
        let sealed = || keys.encrypt(b"value", &binding).unwrap();
        let damaged = Err(EnvelopeError::Damaged { secret: binding.secret });
        for index in [0, 12, 20] {
            let mut row = sealed();
            row.ciphertext[index] ^= 1;
            assert_eq!(keys.decrypt(&row, &binding).map(|_| ()), damaged);
        }
        let mut row = sealed();
        row.wrapped_key = sealed().wrapped_key;
        assert_eq!(keys.decrypt(&row, &binding).map(|_| ()), damaged, "swapped");
        let mut row = sealed();
        row.ciphertext.truncate(5);
        assert_eq!(keys.decrypt(&row, &binding).map(|_| ()), damaged, "truncated");
        let row = Sealed { key_version: 9, ..sealed() };
        assert_eq!(keys.decrypt(&row, &binding).map(|_| ()), Err(EnvelopeError::UnknownKey { secret: binding.secret, version: 9 }));
    }
}
