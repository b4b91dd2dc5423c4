//! A Sprite's certificate authority: its programs trust it, and no one else does.

use std::{
    collections::HashMap,
    fs,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    sync::{Arc, Mutex},
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use time::{Duration, OffsetDateTime};

use crate::sync::locked;

/// Longer than any Sprite lives.
const VALID: Duration = Duration::days(3650);
/// Clocks differ.
const VALID_BEFORE: Duration = Duration::days(1);
/// Hosts whose certificates are kept.
const HOSTS_MAX: usize = 256;
/// What connections speak within TLS.
pub const PROTOCOL: &[u8] = b"http/1.1";

pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Of every host.
    key: KeyPair,
    hosts: Mutex<HashMap<String, Arc<ServerConfig>>>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Authority").finish_non_exhaustive()
    }
}

impl Authority {
    /// A new one, and its certificate. What `publish` does with that is done before the key is
    /// kept in a file, for the server that takes the Sprite up: a kept authority is known to its
    /// Sprite.
    ///
    /// # Errors
    /// When the file cannot be written, or `publish` fails.
    pub fn create(
        key_file: &Path,
        publish: impl FnOnce(&str) -> io::Result<()>,
    ) -> io::Result<Self> {
        let key = KeyPair::generate().map_err(io::Error::other)?;
        publish(&params().self_signed(&key).map_err(io::Error::other)?.pem())?;
        let mut options = fs::OpenOptions::new();
        let mut file =
            options.write(true).create(true).truncate(true).mode(0o600).open(key_file)?;
        file.write_all(key.serialize_pem().as_bytes())?;
        file.sync_data()?;
        Self::with_key(key)
    }

    /// The one whose key a file holds.
    ///
    /// # Errors
    /// When there is none.
    pub fn load(key_file: &Path) -> io::Result<Self> {
        let key = fs::read_to_string(key_file)?;
        Self::with_key(KeyPair::from_pem(&key).map_err(io::Error::other)?)
    }

    fn with_key(key: KeyPair) -> io::Result<Self> {
        Ok(Self {
            issuer: Issuer::new(params(), key),
            key: KeyPair::generate().map_err(io::Error::other)?,
            hosts: Mutex::default(),
        })
    }

    /// How this server shows itself as a host.
    ///
    /// # Errors
    /// When no certificate can be made for the name.
    pub fn server_of(&self, host: &str) -> io::Result<Arc<ServerConfig>> {
        let mut hosts = locked(&self.hosts);
        if let Some(config) = hosts.get(host) {
            return Ok(config.clone());
        }
        let config = Arc::new(self.certify(host)?);
        if hosts.len() >= HOSTS_MAX {
            hosts.clear();
        }
        hosts.insert(host.to_owned(), config.clone());
        Ok(config)
    }

    fn certify(&self, host: &str) -> io::Result<ServerConfig> {
        let mut params = CertificateParams::new(vec![host.to_owned()]).map_err(io::Error::other)?;
        params.distinguished_name.push(DnType::CommonName, "Agent on Demand, intercepted host");
        (params.not_before, params.not_after) = validity();
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&self.key, &self.issuer).map_err(io::Error::other)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        let mut config =
            ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
                .with_safe_default_protocol_versions()
                .and_then(|builder| {
                    builder
                        .with_no_client_auth()
                        .with_single_cert(vec![certificate.der().clone()], key)
                })
                .map_err(io::Error::other)?;
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(config)
    }
}

fn params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "Agent on Demand, one sandbox's authority");
    (params.not_before, params.not_after) = validity();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    params
}

fn validity() -> (OffsetDateTime, OffsetDateTime) {
    let now = OffsetDateTime::now_utc();
    (now - VALID_BEFORE, now + VALID)
}
