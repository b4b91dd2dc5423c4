//! The key-encryption keys: how they are configured, and how data keys are wrapped by them.
//!
//! A key of 32 random bytes is used as it is. Any other text is a passphrase, which Argon2id
//! stretches: who holds a copy of the database and guesses pays 64 MiB and some tenths of a second
//! for each guess.

use std::collections::BTreeMap;

use aes_gcm::{
    Aes256Gcm, KeyInit as _, Nonce,
    aead::{Aead as _, Payload},
};
use argon2::Argon2;
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD},
};
use hkdf::Hkdf;
use sealing::KeyPair;
use secrecy::{ExposeSecret as _, SecretString};
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::envelope::EnvelopeError;

const NONCE_BYTES: usize = 12;
pub const KEY_BYTES: usize = 32;
/// Shorter keys can be guessed.
const KEY_CHARS_MIN: usize = 16;
/// The cost of one guess at a passphrase: 64 MiB, three passes.
const STRETCHING: argon2::Params = match argon2::Params::new(64 << 10, 3, 1, Some(KEY_BYTES)) {
    Ok(params) => params,
    Err(_) => argon2::Params::DEFAULT,
};
const PROOF_TEXT: &[u8] = b"aod vault";

/// Which key-encryption key wrapped a data key: from 1, and the newest has the highest.
pub type KeyVersion = i32;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum KeyringError {
    #[error(
        "FIELD_ENCRYPTION_KEY: key version {version} has {chars} characters; {KEY_CHARS_MIN} or more are needed"
    )]
    TooShort { version: KeyVersion, chars: usize },
    #[error("FIELD_ENCRYPTION_KEY holds key version {version} twice")]
    Twice { version: KeyVersion },
    #[error(
        "FIELD_ENCRYPTION_KEY: with several keys each is VERSION:KEY, on lines of their own or separated by spaces; entry {entry} is not"
    )]
    Malformed { entry: usize },
    #[error("FIELD_ENCRYPTION_KEY: key version {version} cannot be derived: no 64 MiB of memory")]
    Stretching { version: KeyVersion },
}

/// Every configured key, derived from what is configured.
pub struct Keyring {
    keys: BTreeMap<KeyVersion, Key>,
    newest: KeyVersion,
    shortest: usize,
}

/// The keys that are derived from one configured text.
struct Key {
    cipher: Aes256Gcm,
    /// What secrets are sealed to on their way here. Every replica has the same, and it changes
    /// with the key.
    sealing: KeyPair,
    /// The same text as earlier releases derived it, where that differs: secrets may be stored
    /// under it.
    unstretched: Option<Box<Self>>,
}

impl Key {
    fn derive(version: KeyVersion, text: &str) -> Result<Self, KeyringError> {
        let plain = Self::expand(version, text.as_bytes());
        if is_random(text) {
            return Ok(plain);
        }
        let mut stretched = Zeroizing::new([0_u8; KEY_BYTES]);
        // One passphrase is a key of its own under each version.
        let salt = format!("aod vault passphrase v{version}");
        Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, STRETCHING)
            .hash_password_into(text.as_bytes(), salt.as_bytes(), stretched.as_mut())
            .map_err(|_| KeyringError::Stretching { version })?;
        Ok(Self {
            unstretched: Some(Box::new(plain)),
            ..Self::expand(version, stretched.as_slice())
        })
    }

    fn expand(version: KeyVersion, material: &[u8]) -> Self {
        Self {
            cipher: Aes256Gcm::new(
                &(*derive(&format!("aod vault key-encryption key v{version}"), material)).into(),
            ),
            sealing: KeyPair::from_secret(&derive(
                &format!("aod vault sealing key v{version}"),
                material,
            )),
            unstretched: None,
        }
    }

    fn is_proven_by(&self, version: KeyVersion, proof: &[u8]) -> bool {
        decrypt(&self.cipher, proof, &proof_aad(version))
            .is_some_and(|text| text.as_slice() == PROOF_TEXT)
    }
}

/// Whether a text is 32 bytes or more in hex or base64, as `openssl rand` prints them.
fn is_random(text: &str) -> bool {
    let text = text.trim().trim_end_matches('=');
    let is_hex = text.len() >= 2 * KEY_BYTES && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let decoded = || STANDARD_NO_PAD.decode(text).or_else(|_| URL_SAFE_NO_PAD.decode(text));
    is_hex || decoded().is_ok_and(|bytes| bytes.len() >= KEY_BYTES)
}

impl Keyring {
    /// Reads `FIELD_ENCRYPTION_KEY`: one key, which is version 1; or several as `VERSION:KEY`,
    /// separated by white space.
    ///
    /// # Errors
    /// [`KeyringError`]; none says anything about a key but its length.
    pub fn parse(configured: &SecretString) -> Result<Self, KeyringError> {
        let text = configured.expose_secret();
        let versioned: Vec<Option<(KeyVersion, &str)>> =
            text.split_whitespace().map(versioned).collect();
        let entries = if versioned.iter().any(Option::is_some) {
            let entries = versioned
                .into_iter()
                .enumerate()
                .map(|(index, entry)| entry.ok_or(KeyringError::Malformed { entry: index + 1 }));
            entries.collect::<Result<Vec<_>, _>>()?
        } else {
            vec![(1, text)]
        };
        let (mut keys, mut newest, mut shortest) = (BTreeMap::new(), 1, usize::MAX);
        for (version, key) in entries {
            let chars = key.chars().count();
            if chars < KEY_CHARS_MIN {
                return Err(KeyringError::TooShort { version, chars });
            }
            if keys.insert(version, Key::derive(version, key)?).is_some() {
                return Err(KeyringError::Twice { version });
            }
            newest = newest.max(version);
            shortest = shortest.min(chars);
        }
        Ok(Self { keys, newest, shortest })
    }

    /// The shortest configured key, in characters.
    pub fn shortest(&self) -> usize {
        self.shortest
    }

    /// The version that a rotation leads to.
    pub fn newest(&self) -> KeyVersion {
        self.newest
    }

    pub fn holds(&self, version: KeyVersion) -> bool {
        self.keys.contains_key(&version)
    }

    pub fn versions(&self) -> impl Iterator<Item = KeyVersion> + '_ {
        self.keys.keys().copied()
    }

    /// What secrets that are on their way here are sealed to, while this version encrypts.
    pub fn sealing(&self, version: KeyVersion) -> Option<&KeyPair> {
        self.keys.get(&version).map(|key| &key.sealing)
    }

    /// Wraps a data key; none where the version is not configured.
    pub fn wrap(
        &self,
        version: KeyVersion,
        data_key: &[u8],
        aad: &[u8],
    ) -> Option<Result<Vec<u8>, EnvelopeError>> {
        Some(encrypt(&self.keys.get(&version)?.cipher, data_key, aad))
    }

    /// Unwraps a data key: none where the version is not configured, then none where it does not
    /// open.
    pub fn unwrap(
        &self,
        version: KeyVersion,
        wrapped: &[u8],
        aad: &[u8],
    ) -> Option<Option<Zeroizing<Vec<u8>>>> {
        Some(decrypt(&self.keys.get(&version)?.cipher, wrapped, aad))
    }

    /// The proof of a version: a text that only this very key decrypts; none where the version is
    /// not configured.
    pub fn proof(&self, version: KeyVersion) -> Option<Result<Vec<u8>, EnvelopeError>> {
        self.wrap(version, PROOF_TEXT, &proof_aad(version))
    }

    /// Whether the configured key is the one that made the proof.
    pub fn is_proven_by(&self, version: KeyVersion, proof: &[u8]) -> bool {
        self.keys.get(&version).is_some_and(|key| key.is_proven_by(version, proof))
    }

    /// Uses a passphrase as earlier releases did, where the proof was made so. Returns whether it
    /// was.
    pub fn use_unstretched(&mut self, version: KeyVersion, proof: &[u8]) -> bool {
        let Some(key) = self.keys.get_mut(&version) else { return false };
        match key.unstretched.take() {
            Some(plain) if plain.is_proven_by(version, proof) => {
                *key = *plain;
                true
            }
            other => {
                key.unstretched = other;
                false
            }
        }
    }
}

fn versioned(entry: &str) -> Option<(KeyVersion, &str)> {
    let (version, key) = entry.split_once(':')?;
    let version = version.parse().ok().filter(|version| *version > 0)?;
    Some((version, key))
}

fn proof_aad(version: KeyVersion) -> Vec<u8> {
    format!("aod vault key proof\0{version}").into_bytes()
}

fn derive(label: &str, material: &[u8]) -> Zeroizing<[u8; KEY_BYTES]> {
    let mut key = Zeroizing::new([0_u8; KEY_BYTES]);
    // 32 bytes are far from what HKDF can give.
    let _ = Hkdf::<Sha256>::new(None, material).expand(label.as_bytes(), key.as_mut());
    key
}

/// Nonce and ciphertext.
pub fn encrypt(cipher: &Aes256Gcm, plaintext: &[u8], aad: &[u8]) -> Result<Vec<u8>, EnvelopeError> {
    let mut nonce = [0_u8; NONCE_BYTES];
    getrandom::fill(&mut nonce).map_err(|_| EnvelopeError::NoRandomness)?;
    let ciphertext = cipher
        .encrypt(&Nonce::from(nonce), Payload { msg: plaintext, aad })
        .map_err(|_| EnvelopeError::Encrypt)?;
    Ok([nonce.as_slice(), &ciphertext].concat())
}

pub fn decrypt(cipher: &Aes256Gcm, sealed: &[u8], aad: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let (nonce, ciphertext) = sealed.split_first_chunk::<NONCE_BYTES>()?;
    cipher.decrypt(&Nonce::from(*nonce), Payload { msg: ciphertext, aad }).ok().map(Zeroizing::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Vec<KeyVersion>, KeyringError> {
        Keyring::parse(&text.to_owned().into()).map(|keys| keys.versions().collect())
    }

    #[test]
    fn a_single_key_is_version_1_and_several_name_their_versions() {
        assert_eq!(parse("0123456789abcdef"), Ok(vec![1]));
        assert_eq!(parse("a passphrase of several words"), Ok(vec![1]));
        assert_eq!(parse("2:abcdef0123456789\n1:0123456789abcdef\n"), Ok(vec![1, 2]));
        assert_eq!(parse("too short"), Err(KeyringError::TooShort { version: 1, chars: 9 }));
        assert_eq!(
            parse("1:0123456789abcdef 2:short"),
            Err(KeyringError::TooShort { version: 2, chars: 5 })
        );
        assert_eq!(
            parse("1:0123456789abcdef 1:abcdef0123456789"),
            Err(KeyringError::Twice { version: 1 })
        );
        assert_eq!(
            parse("1:0123456789abcdef abcdef0123456789"),
            Err(KeyringError::Malformed { entry: 2 })
        );
        assert_eq!(
            parse("1:0123456789abcdef 0:abcdef0123456789"),
            Err(KeyringError::Malformed { entry: 2 })
        );
    }

    #[test]
    fn a_key_is_known_by_its_proof() {
        let keys =
            Keyring::parse(&"1:0123456789abcdef 2:abcdef0123456789".to_owned().into()).unwrap();
        let proof = keys.proof(1).unwrap().unwrap();
        assert!(keys.is_proven_by(1, &proof));
        assert!(!keys.is_proven_by(2, &proof));
        let other = Keyring::parse(&"1:abcdef0123456789".to_owned().into()).unwrap();
        assert!(!other.is_proven_by(1, &proof));
    }

    #[test]
    fn a_passphrase_is_stretched_and_32_random_bytes_are_not() {
        let is_stretched = |text: &str| {
            Keyring::parse(&text.to_owned().into()).unwrap().keys[&1].unstretched.is_some()
        };
        for random in [
            "8f0c3b6a1d2e4f5061728394a5b6c7d8e9fa0b1c2d3e4f5061728394a5b6c7d8",
            "q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJA=",
            "q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJA=\n",
            "-_3vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJA",
        ] {
            assert!(!is_stretched(random), "{random}");
        }
        for passphrase in [
            "correct horse battery staple, and so on and on",
            "0123456789abcdef",
            "q83vEjRWeJCrze8SNFZ4kKvN7xI",
        ] {
            assert!(is_stretched(passphrase), "{passphrase}");
        }
    }

    #[test]
    fn a_passphrase_that_an_earlier_release_used_works_as_it_did() {
        let text = "an old passphrase, long enough";
        let proof =
            encrypt(&Key::expand(1, text.as_bytes()).cipher, PROOF_TEXT, &proof_aad(1)).unwrap();
        let mut keys = Keyring::parse(&text.to_owned().into()).unwrap();
        assert!(!keys.is_proven_by(1, &proof));
        assert!(keys.use_unstretched(1, &proof) && keys.is_proven_by(1, &proof));
        let mut other = Keyring::parse(&"another passphrase, as long".to_owned().into()).unwrap();
        assert!(!other.use_unstretched(1, &proof) && !other.is_proven_by(1, &proof));
    }

    #[test]
    fn replicas_share_a_sealing_key_which_changes_with_the_version() {
        let public = |text: &str, version| {
            Keyring::parse(&text.to_owned().into()).unwrap().sealing(version).map(KeyPair::public)
        };
        assert_eq!(
            public("0123456789abcdef", 1),
            public("1:0123456789abcdef 2:abcdef0123456789", 1)
        );
        assert_ne!(
            public("1:0123456789abcdef 2:0123456789abcdef", 1),
            public("1:0123456789abcdef 2:0123456789abcdef", 2)
        );
        assert_eq!(public("0123456789abcdef", 2), None);
    }
}
