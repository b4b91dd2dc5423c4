//! `aod credentials`.

use clap::Subcommand;
use secrecy::ExposeSecret as _;
use serde_json::json;

use crate::{
    cli::call::Call,
    client::{Api, ApiFailure, Page},
    credential::Kind,
    output::{Output, Table},
    secret_input,
};

#[derive(Debug, Subcommand)]
pub enum Credentials {
    /// List stored credentials; values are never shown
    List,
    /// Store a credential; prompts for the value, or reads it from standard input
    #[command(after_help = "Example:\n  aod credentials set provider:anthropic < key.txt")]
    Set {
        /// What the credential is for
        kind: Kind,
    },
    /// Delete a credential
    Delete {
        /// What the credential is for
        kind: Kind,
    },
}

impl Call for Credentials {
    async fn call(self, api: &Api, output: Output) -> Result<(), ApiFailure> {
        const CREDENTIALS: Table = Table(&["kind", "hint", "updated_at"]);
        match self {
            // There is one of each kind at most.
            Self::List => {
                output.list(&api.page("/credentials", &Page::default()).await?.0, CREDENTIALS)
            }
            Self::Set { kind } => {
                let value = secret_input::read().map_err(ApiFailure::Local)?;
                output.one(
                    &api.put(
                        &format!("/credentials/{}", kind.name()),
                        &json!({ "value": value.expose_secret() }),
                    )
                    .await?,
                );
            }
            Self::Delete { kind } => {
                output.one(&api.delete(&format!("/credentials/{}", kind.name())).await?)
            }
        }
        Ok(())
    }
}
