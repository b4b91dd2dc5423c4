//! `aod keys`.

use clap::Subcommand;
use serde_json::json;

use crate::{
    cli::call::{Call, list},
    client::{Api, ApiFailure, Page},
    output::{Output, Table},
};

#[derive(Debug, Subcommand)]
pub enum Keys {
    /// List API keys, newest first
    List(Page),
    /// Create an API key; it is shown only once
    Create {
        /// Name, at most 100 characters
        #[arg(long)]
        name: String,
    },
    /// Deactivate an API key
    Revoke {
        /// Id of the key
        id: String,
    },
}

impl Call for Keys {
    async fn call(self, api: &Api, output: Output) -> Result<(), ApiFailure> {
        const KEYS: Table = Table(&["id", "name", "prefix", "is_active", "last_used_at"]);
        match self {
            Self::List(page) => list(api, "/api-keys", &page, output, KEYS).await?,
            Self::Create { name } => {
                output.one(&api.post("/api-keys", &json!({ "name": name })).await?)
            }
            Self::Revoke { id } => output.one(&api.delete(&format!("/api-keys/{id}")).await?),
        }
        Ok(())
    }
}
