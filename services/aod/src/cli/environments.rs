//! `aod envs`.

use std::path::PathBuf;

use clap::Subcommand;
use serde_json::{Value, json};

use crate::{
    cli::{
        call::{Call, VERSIONS, list},
        files::{read_file, read_variables},
    },
    client::{Api, ApiFailure, Page},
    output::{Output, Table},
};

#[derive(Debug, Subcommand)]
pub enum Envs {
    /// List environments that are not archived, newest first
    List(Page),
    /// Print an environment
    Get {
        /// Id of the environment
        id: String,
    },
    /// Create an environment
    #[command(
        after_help = "Example:\n  aod envs create --name python --setup-script setup.sh --env-file .env"
    )]
    Create {
        /// Name, unique among your active environments
        #[arg(long)]
        name: String,
        /// Bash script that sets up the sandbox
        #[arg(long, value_name = "FILE")]
        setup_script: Option<PathBuf>,
        /// File of NAME=VALUE lines; empty lines and lines that start with # are skipped
        #[arg(long, value_name = "FILE")]
        env_file: Option<PathBuf>,
    },
    /// List the versions of an environment, newest first
    Versions {
        /// Id of the environment
        id: String,
        #[command(flatten)]
        page: Page,
    },
    /// Archive an environment: it can no longer be changed or used by new sessions
    Archive {
        /// Id of the environment
        id: String,
    },
    /// Delete an environment that no session refers to
    Delete {
        /// Id of the environment
        id: String,
    },
}

impl Call for Envs {
    async fn call(self, api: &Api, output: Output) -> Result<(), ApiFailure> {
        const ENVS: Table = Table(&["id", "name", "version", "created_at"]);
        match self {
            Self::List(page) => list(api, "/environments", &page, output, ENVS).await?,
            Self::Get { id } => output.one(&api.get(&format!("/environments/{id}")).await?),
            Self::Create { name, setup_script, env_file } => {
                let script = setup_script.map(|path| read_file(&path)).transpose()?;
                let variables =
                    env_file.map(|path| read_variables(&path)).transpose()?.unwrap_or_default();
                output.one(
                    &api.post(
                        "/environments",
                        &json!({ "name": name, "setup_script": script, "env_vars": variables }),
                    )
                    .await?,
                );
            }
            Self::Versions { id, page } => {
                list(api, &format!("/environments/{id}/versions"), &page, output, VERSIONS).await?
            }
            Self::Archive { id } => {
                output.one(&api.post(&format!("/environments/{id}/archive"), &Value::Null).await?)
            }
            Self::Delete { id } => {
                output.one(&api.delete(&format!("/environments/{id}/delete")).await?)
            }
        }
        Ok(())
    }
}
