//! Sends secrets to the vault: seals them to its public key as they arrive, and keeps only a
//! reference.

use bus::RpcError;
use contract::{
    rpc,
    vault::{DeleteSecretsRequest, PutSecretRequest},
};
use serde::Serialize;
use types::{ErrorCode, SecretId};
use zeroize::Zeroizing;

use crate::{App, error::ApiError};

/// What a document of secrets belongs to.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// An environment's variables.
    EnvVars,
    /// The headers and variables of an agent's MCP servers.
    McpServers,
    /// A session's own variables, and its repositories' tokens.
    Session,
    /// A credential of a vault of `/v1`.
    VaultCredential,
}

impl Kind {
    const fn as_str(self) -> &'static str {
        match self {
            Self::EnvVars => "env_vars",
            Self::McpServers => "mcp_servers",
            Self::Session => "session",
            Self::VaultCredential => types::vault::DOCUMENT_KIND,
        }
    }
}

/// A document in the vault.
#[derive(Clone, Debug)]
pub struct Kept {
    pub id: String,
    /// Made just now: if nothing comes to refer to it, it has to go.
    fresh: bool,
}

impl App {
    /// Keeps a document. One that follows another keeps that one's values where it says `***`, and
    /// its id where it is equal.
    pub async fn keep(
        &self,
        user_id: &str,
        kind: Kind,
        value: &impl Serialize,
        base: Option<String>,
    ) -> Result<Kept, ApiError> {
        let value = Zeroizing::new(serde_json::to_vec(value).map_err(RpcError::internal)?);
        let sealed = Some(self.seal(user_id, kind.as_str(), &value).await?);
        let keep_redacted = matches!(kind, Kind::McpServers);
        let request = PutSecretRequest {
            user_id: user_id.to_owned(),
            kind: kind.as_str().to_owned(),
            sealed,
            base_secret_id: base.clone(),
            keep_redacted,
            secret_id: SecretId::new().to_string(),
            ..PutSecretRequest::default()
        };
        let id = self.call::<rpc::PutSecret>(&request).await?.secret_id;
        Ok(Kept { fresh: base.as_ref() != Some(&id), id })
    }

    /// Gives a document under an id the members of another, or stores that one if there is none.
    pub async fn merge(
        &self,
        user_id: &str,
        kind: Kind,
        value: &impl Serialize,
        secret_id: String,
    ) -> Result<(), ApiError> {
        let value = Zeroizing::new(serde_json::to_vec(value).map_err(RpcError::internal)?);
        let sealed = Some(self.seal(user_id, kind.as_str(), &value).await?);
        let (user_id, kind) = (user_id.to_owned(), kind.as_str().to_owned());
        let request = PutSecretRequest {
            user_id,
            kind,
            sealed,
            secret_id,
            merge: true,
            ..PutSecretRequest::default()
        };
        self.call::<rpc::PutSecret>(&request).await?;
        Ok(())
    }

    /// Sees to it that a document which nothing came to refer to does not stay behind.
    pub async fn forget_unless_used<T>(
        &self,
        kept: Option<Kept>,
        result: &Result<T, RpcError>,
        used: impl FnOnce(&T) -> bool,
    ) {
        let Some(kept) = kept.filter(|kept| kept.fresh) else { return };
        let unused = match result {
            Ok(reply) => !used(reply),
            // It may have been done all the same.
            Err(failure) => !matches!(
                failure.code,
                ErrorCode::Unavailable | ErrorCode::DeadlineExceeded | ErrorCode::Internal
            ),
        };
        if unused {
            self.forget(kept.id).await;
        }
    }

    /// Deletes a document that nothing refers to.
    pub async fn forget(&self, secret_id: String) {
        if let Err(error) = self
            .call::<rpc::DeleteSecrets>(&DeleteSecretsRequest { secret_ids: vec![secret_id] })
            .await
        {
            tracing::warn!(?error, "failed to delete an unused secret");
        }
    }
}
