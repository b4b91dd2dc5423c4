//! Envelope encryption: AES-256-GCM under a fresh data key for each secret; the data key wrapped,
//! with AES-256-GCM too, by a versioned key-encryption key. Associated data binds both to the
//! owner, the kind and the id, so that a row moved to another place does not open.

use aes_gcm::{Aes256Gcm, KeyInit as _};
use types::{SecretId, UserId};
use zeroize::Zeroizing;

use crate::keyring::{KEY_BYTES, KeyVersion, Keyring, decrypt, encrypt};

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
    pub key_version: KeyVersion,
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
    #[error("key version {version} encrypts, and is not configured here")]
    UnknownCurrentKey { version: KeyVersion },
    #[error("secret {secret} was encrypted with key version {version}, which is not configured")]
    UnknownKey { secret: SecretId, version: KeyVersion },
    #[error("secret {secret} was tampered with, or the key is wrong")]
    Damaged { secret: SecretId },
}

impl Keyring {
    pub fn encrypt(
        &self,
        version: KeyVersion,
        plaintext: &[u8],
        binding: &Binding<'_>,
    ) -> Result<Sealed, EnvelopeError> {
        counted("encrypt", self.seal(version, plaintext, binding))
    }

    pub fn decrypt(
        &self,
        sealed: &Sealed,
        binding: &Binding<'_>,
    ) -> Result<Zeroizing<Vec<u8>>, EnvelopeError> {
        counted("decrypt", self.open(sealed, binding))
    }

    /// A data key, wrapped by another version. What it encrypts stays as it is.
    pub fn rewrap(
        &self,
        from: KeyVersion,
        wrapped_key: &[u8],
        to: KeyVersion,
        binding: &Binding<'_>,
    ) -> Result<Vec<u8>, EnvelopeError> {
        counted("rewrap", self.wrap_anew(from, wrapped_key, to, binding))
    }

    fn seal(
        &self,
        version: KeyVersion,
        plaintext: &[u8],
        binding: &Binding<'_>,
    ) -> Result<Sealed, EnvelopeError> {
        let mut data_key = Zeroizing::new([0_u8; KEY_BYTES]);
        getrandom::fill(data_key.as_mut()).map_err(|_| EnvelopeError::NoRandomness)?;
        let cipher =
            Aes256Gcm::new_from_slice(data_key.as_ref()).map_err(|_| EnvelopeError::Encrypt)?;
        let aad = binding.associated_data();
        let wrapped_key = self
            .wrap(version, data_key.as_ref(), &aad)
            .ok_or(EnvelopeError::UnknownCurrentKey { version })??;
        Ok(Sealed {
            key_version: version,
            wrapped_key,
            ciphertext: encrypt(&cipher, plaintext, &aad)?,
        })
    }

    fn open(
        &self,
        sealed: &Sealed,
        binding: &Binding<'_>,
    ) -> Result<Zeroizing<Vec<u8>>, EnvelopeError> {
        let damaged = || EnvelopeError::Damaged { secret: binding.secret };
        let aad = binding.associated_data();
        let data_key =
            self.data_key(sealed.key_version, &sealed.wrapped_key, &aad, binding.secret)?;
        let cipher = Aes256Gcm::new_from_slice(&data_key).map_err(|_| damaged())?;
        decrypt(&cipher, &sealed.ciphertext, &aad).ok_or_else(damaged)
    }

    fn wrap_anew(
        &self,
        from: KeyVersion,
        wrapped_key: &[u8],
        to: KeyVersion,
        binding: &Binding<'_>,
    ) -> Result<Vec<u8>, EnvelopeError> {
        let aad = binding.associated_data();
        let data_key = self.data_key(from, wrapped_key, &aad, binding.secret)?;
        self.wrap(to, &data_key, &aad).ok_or(EnvelopeError::UnknownCurrentKey { version: to })?
    }

    fn data_key(
        &self,
        version: KeyVersion,
        wrapped: &[u8],
        aad: &[u8],
        secret: SecretId,
    ) -> Result<Zeroizing<Vec<u8>>, EnvelopeError> {
        let opened = self
            .unwrap(version, wrapped, aad)
            .ok_or(EnvelopeError::UnknownKey { secret, version })?;
        opened.ok_or(EnvelopeError::Damaged { secret })
    }
}

fn counted<T>(
    operation: &'static str,
    result: Result<T, EnvelopeError>,
) -> Result<T, EnvelopeError> {
    let outcome = if result.is_ok() { "ok" } else { "failed" };
    metrics::counter!("aod_vault_operations_total", "operation" => operation, "outcome" => outcome)
        .increment(1);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keyring(text: &str) -> Keyring {
        Keyring::parse(&text.to_owned().into()).unwrap()
    }

    #[test]
    fn a_secret_opens_only_where_it_belongs() {
        let keys = keyring("0123456789abcdef");
        let binding =
            Binding { user: UserId::new(), kind: "provider:anthropic", secret: SecretId::new() };
        let sealed = keys.encrypt(1, b"sk-secret", &binding).unwrap();
        assert_eq!(keys.decrypt(&sealed, &binding).unwrap().as_slice(), b"sk-secret");
        let damaged = Err(EnvelopeError::Damaged { secret: binding.secret });
        assert_eq!(
            keys.decrypt(&sealed, &Binding { kind: "provider:openai", ..binding }).map(|_| ()),
            damaged
        );
        assert_eq!(
            keys.decrypt(&sealed, &Binding { user: UserId::new(), ..binding }).map(|_| ()),
            damaged
        );
        assert_eq!(keyring("another key, 16+").decrypt(&sealed, &binding).map(|_| ()), damaged);
    }

    #[test]
    fn a_damaged_row_is_an_error_that_names_it() {
        let keys = keyring("0123456789abcdef");
        let binding = Binding { user: UserId::new(), kind: "k", secret: SecretId::new() };
        let sealed = || keys.encrypt(1, b"value", &binding).unwrap();
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
        assert_eq!(
            keys.decrypt(&row, &binding).map(|_| ()),
            Err(EnvelopeError::UnknownKey { secret: binding.secret, version: 9 })
        );
    }

    #[test]
    fn a_rewrapped_secret_opens_without_the_old_key_version() {
        let keys = keyring("1:0123456789abcdef 2:abcdef0123456789");
        let binding = Binding { user: UserId::new(), kind: "k", secret: SecretId::new() };
        let old = keys.encrypt(1, b"value", &binding).unwrap();
        let wrapped_key = keys.rewrap(1, &old.wrapped_key, 2, &binding).unwrap();
        let new = Sealed { key_version: 2, wrapped_key, ciphertext: old.ciphertext };
        assert_eq!(
            keyring("2:abcdef0123456789").decrypt(&new, &binding).unwrap().as_slice(),
            b"value"
        );
        let moved = keys.rewrap(1, &old.wrapped_key, 2, &Binding { kind: "other", ..binding });
        assert_eq!(moved, Err(EnvelopeError::Damaged { secret: binding.secret }));
    }
}
