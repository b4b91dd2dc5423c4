//! Messages sealed to an X25519 public key: the bus between sender and recipient reads nothing.
//!
//! `sealed = sender's ephemeral public key (32) || AES-256-GCM ciphertext`, under a key derived
//! with HKDF-SHA256 from the shared secret and both public keys. Each message has an ephemeral key
//! and so a derived key of its own: the nonce is fixed.

use aes_gcm::{
    Aes256Gcm, KeyInit as _, Nonce,
    aead::{Aead as _, Payload},
};
use hkdf::Hkdf;
use sha2::Sha256;
use x25519_dalek::{PublicKey, SharedSecret, StaticSecret};
use zeroize::Zeroizing;

const INFO: &[u8] = b"aod sealed bundle v1";
const NONCE: [u8; 12] = [0; 12];
const KEY_BYTES: usize = 32;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    #[error("the public key is not an X25519 key")]
    BadPublicKey,
    #[error("the operating system gives no randomness")]
    NoRandomness,
    #[error("the message cannot be sealed")]
    Failed,
}

/// Sealed to another key, bound to another context, or tampered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the sealed message cannot be opened")]
pub struct OpenError;

/// Length of what sealing adds to a message, in bytes.
pub const OVERHEAD: usize = KEY_BYTES + 16;

/// A recipient's key pair. The secret half never leaves it and is wiped with it.
pub struct KeyPair(StaticSecret);

impl std::fmt::Debug for KeyPair {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("KeyPair").finish_non_exhaustive()
    }
}

impl KeyPair {
    /// The pair that belongs to a secret of 32 random bytes.
    #[must_use]
    pub fn from_secret(secret: &[u8; KEY_BYTES]) -> Self {
        Self(StaticSecret::from(*secret))
    }

    /// # Errors
    /// [`SealError::NoRandomness`].
    pub fn generate() -> Result<Self, SealError> {
        let mut bytes = Zeroizing::new([0_u8; KEY_BYTES]);
        getrandom::fill(bytes.as_mut()).map_err(|_| SealError::NoRandomness)?;
        Ok(Self(StaticSecret::from(*bytes)))
    }

    #[must_use]
    pub fn public(&self) -> [u8; KEY_BYTES] {
        PublicKey::from(&self.0).to_bytes()
    }

    /// Opens what was sealed to this key. `context` must be what the sealer used.
    ///
    /// # Errors
    /// [`OpenError`], without saying why: an attacker learns nothing from it.
    pub fn open(&self, sealed: &[u8], context: &[u8]) -> Result<Zeroizing<Vec<u8>>, OpenError> {
        let (sender, ciphertext) = sealed.split_first_chunk::<KEY_BYTES>().ok_or(OpenError)?;
        let sender = PublicKey::from(*sender);
        let shared = self.0.diffie_hellman(&sender);
        let cipher = cipher(&shared, &sender, &PublicKey::from(&self.0)).ok_or(OpenError)?;
        let payload = Payload { msg: ciphertext, aad: context };
        cipher.decrypt(&Nonce::from(NONCE), payload).map(Zeroizing::new).map_err(|_| OpenError)
    }
}

/// Seals `plaintext` to a public key, bound to `context`.
///
/// # Errors
/// [`SealError`].
pub fn seal(recipient: &[u8], plaintext: &[u8], context: &[u8]) -> Result<Vec<u8>, SealError> {
    let recipient = PublicKey::from(
        <[u8; KEY_BYTES]>::try_from(recipient).map_err(|_| SealError::BadPublicKey)?,
    );
    let ephemeral = KeyPair::generate()?;
    let sender = PublicKey::from(&ephemeral.0);
    let shared = ephemeral.0.diffie_hellman(&recipient);
    let cipher = cipher(&shared, &sender, &recipient).ok_or(SealError::BadPublicKey)?;
    let ciphertext = cipher
        .encrypt(&Nonce::from(NONCE), Payload { msg: plaintext, aad: context })
        .map_err(|_| SealError::Failed)?;
    Ok([sender.as_bytes().as_slice(), &ciphertext].concat())
}

/// `None` for a public key of small order, whose shared secret anybody can guess.
fn cipher(shared: &SharedSecret, sender: &PublicKey, recipient: &PublicKey) -> Option<Aes256Gcm> {
    if !shared.was_contributory() {
        return None;
    }
    let mut key = Zeroizing::new([0_u8; KEY_BYTES]);
    let info = [INFO, sender.as_bytes(), recipient.as_bytes()].concat();
    Hkdf::<Sha256>::new(None, shared.as_bytes()).expand(&info, key.as_mut()).ok()?;
    Aes256Gcm::new_from_slice(key.as_ref()).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_the_right_key_and_context_open_a_bundle() {
        let (key, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let sealed = seal(&key.public(), b"secret", b"lease 1").unwrap();
        assert!(!sealed.windows(6).any(|window| window == b"secret"));
        assert_eq!(other.open(&sealed, b"lease 1").err(), Some(OpenError));
        assert_eq!(key.open(&sealed, b"lease 2").err(), Some(OpenError));
        assert_eq!(key.open(&sealed, b"lease 1").unwrap().as_slice(), b"secret");
    }

    #[test]
    fn a_worthless_public_key_is_refused() {
        assert_eq!(seal(&[0; 32], b"x", b""), Err(SealError::BadPublicKey));
        assert_eq!(seal(&[1; 31], b"x", b""), Err(SealError::BadPublicKey));
    }

    proptest! {
        #[test]
        fn a_changed_byte_never_opens(plaintext: Vec<u8>, index: prop::sample::Index, flip in 1_u8..) {
            let key = KeyPair::generate().unwrap();
            let mut sealed = seal(&key.public(), &plaintext, b"").unwrap();
            let index = index.index(sealed.len());
            sealed[index] ^= flip;
            prop_assert_eq!(key.open(&sealed, b"").err(), Some(OpenError));
        }

        #[test]
        fn garbage_never_opens(sealed: Vec<u8>) {
            prop_assert_eq!(KeyPair::generate().unwrap().open(&sealed, b"").err(), Some(OpenError));
        }
    }
}
