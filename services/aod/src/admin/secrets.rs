//! Credentials of users, and the keys that stored secrets are encrypted with.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bus::vault::AcceptedKeys;
use clap::Subcommand;
use contract::{
    common::Empty,
    rpc,
    vault::{
        Credential, DeleteCredentialRequest, KeyStatus, ListCredentialsRequest,
        PutCredentialRequest, RotateKeysRequest,
    },
};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};

use crate::{
    admin::operator::{AdminError, DEADLINE, Operator, time},
    credential::Kind,
    output::Table,
};

#[derive(Debug, Subcommand)]
pub enum Credentials {
    /// Store a credential; prompts for the value, or reads it from standard input
    Set {
        /// Name of the user
        user: String,
        /// What the credential is for
        kind: Kind,
    },
    /// List the stored credentials of a user; values are never shown
    List {
        /// Name of the user
        user: String,
    },
    /// Delete a credential
    Delete {
        /// Name of the user
        user: String,
        /// What the credential is for
        kind: Kind,
    },
}

#[derive(Debug, Subcommand)]
pub enum Vault {
    /// Print which key versions are in use
    Status,
    /// Re-wrap all secrets with the newest key version (safe to interrupt and rerun)
    Rotate,
}

impl Operator {
    pub(super) async fn credentials(
        &self,
        command: Credentials,
        value: Option<SecretString>,
    ) -> Result<(), AdminError> {
        const CREDENTIALS: Table = Table(&["kind", "hint", "updated_at"]);
        match command {
            Credentials::Set { user, kind } => {
                let user_id = self.user(user).await?;
                let (kind, value) = (kind.name(), value.unwrap_or_default());
                let value = value.expose_secret().as_bytes();
                let sealed = Some(
                    self.bus
                        .seal_for_vault(&AcceptedKeys::default(), &user_id, &kind, value, DEADLINE)
                        .await?,
                );
                let request = PutCredentialRequest {
                    user_id,
                    kind,
                    sealed,
                    ..PutCredentialRequest::default()
                };
                let stored = self.call::<rpc::PutCredential>(&request).await?;
                self.output.one(&describe_credential(&stored));
            }
            Credentials::List { user } => {
                let user_id = self.user(user).await?;
                let stored = self
                    .call::<rpc::ListCredentials>(&ListCredentialsRequest { user_id })
                    .await?
                    .credentials;
                self.output
                    .list(&stored.iter().map(describe_credential).collect::<Vec<_>>(), CREDENTIALS);
            }
            Credentials::Delete { user, kind } => {
                let user_id = self.user(user).await?;
                self.call::<rpc::DeleteCredential>(&DeleteCredentialRequest {
                    user_id,
                    kind: kind.name(),
                })
                .await?;
                self.output.one(&json!({ "detail": "Credential deleted" }));
            }
        }
        Ok(())
    }

    pub(super) async fn vault(&self, command: Vault) -> Result<(), AdminError> {
        const KEY_VERSIONS: Table =
            Table(&["version", "is_current", "is_configured", "secrets", "public_key"]);
        match command {
            Vault::Status => {
                let keys = self.call::<rpc::KeyStatus>(&Empty {}).await?.keys;
                self.output
                    .list(&keys.iter().map(describe_key_version).collect::<Vec<_>>(), KEY_VERSIONS);
            }
            Vault::Rotate => self.rotate().await?,
        }
        Ok(())
    }

    /// Step by step, until no secret of an older version is left.
    async fn rotate(&self) -> Result<(), AdminError> {
        let (mut rotated, mut damaged, mut after) = (0, Vec::new(), None);
        loop {
            let step =
                self.call::<rpc::RotateKeys>(&RotateKeysRequest { after_secret_id: after }).await?;
            rotated += step.rotated;
            damaged.extend(step.damaged_secret_ids);
            note!("{rotated} moved to key version {}, {} left", step.version, step.remaining);
            let at_the_end = step.last_secret_id.is_none();
            after = step.last_secret_id;
            if !damaged.is_empty() && at_the_end {
                let ids = damaged.join(", ");
                return Err(AdminError::Local(format!(
                    "{} secrets do not open and were left as they are: {ids}",
                    damaged.len()
                )));
            }
            if step.remaining == 0 {
                let detail = format!(
                    "Every secret is under key version {}; older keys may be removed from FIELD_ENCRYPTION_KEY",
                    step.version
                );
                self.output
                    .one(&json!({ "detail": detail, "version": step.version, "rotated": rotated }));
                return Ok(());
            }
        }
    }
}

fn describe_credential(credential: &Credential) -> Value {
    // The deployment's own token has no date.
    let updated_at = (credential.updated_at_us > 0).then(|| time(credential.updated_at_us));
    json!({ "kind": credential.kind, "hint": credential.hint, "updated_at": updated_at })
}

fn describe_key_version(key: &KeyStatus) -> Value {
    json!({
        "version": key.version,
        "is_current": key.is_current,
        "is_configured": key.is_configured,
        "secrets": key.secrets,
        "public_key": STANDARD.encode(&key.public_key),
    })
}
