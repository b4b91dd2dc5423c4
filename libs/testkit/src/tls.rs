//! A throw-away certificate authority, and one server certificate of it for this machine.

use std::path::PathBuf;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

/// PEM files, gone when dropped.
#[derive(Debug)]
pub struct Tls(TempDir);

impl Tls {
    /// # Errors
    /// When the files cannot be written.
    pub fn generate() -> anyhow::Result<Self> {
        let mut authority = CertificateParams::new(Vec::new())?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority_key = KeyPair::generate()?;
        let authority_pem = authority.self_signed(&authority_key)?.pem();
        let issuer = Issuer::new(authority, authority_key);
        let key = KeyPair::generate()?;
        let server = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()])?
            .signed_by(&key, &issuer)?;
        let tls = Self(tempfile::Builder::new().prefix("aod-tls-").tempdir()?);
        std::fs::write(tls.ca_file(), authority_pem)?;
        std::fs::write(tls.certificate_file(), server.pem())?;
        std::fs::write(tls.key_file(), key.serialize_pem())?;
        Ok(tls)
    }

    /// Who signed the certificate.
    #[must_use]
    pub fn ca_file(&self) -> PathBuf {
        self.0.path().join("ca.pem")
    }

    #[must_use]
    pub fn certificate_file(&self) -> PathBuf {
        self.0.path().join("server.pem")
    }

    #[must_use]
    pub fn key_file(&self) -> PathBuf {
        self.0.path().join("server.key")
    }
}
