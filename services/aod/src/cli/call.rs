//! How a command calls the API and prints the answer.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::Value;

use crate::{
    budget::LimitArgs,
    client::{Api, ApiFailure, Page},
    output::{Output, Table},
};

/// Where the API is.
#[derive(Debug, Args)]
pub struct ApiArgs {
    /// URL of the API
    #[arg(long, env = "AOD_API_URL", default_value = "http://127.0.0.1:8777", global = true)]
    pub api_url: String,
}

impl ApiArgs {
    pub fn connect(&self) -> Result<Api, ApiFailure> {
        Api::from_env(&self.api_url)
    }
}

/// Client commands of one kind of resource.
#[derive(Debug, Args)]
pub struct Client<C: Subcommand> {
    #[command(flatten)]
    pub api: ApiArgs,
    #[command(subcommand)]
    pub command: C,
}

pub fn finish<E: std::fmt::Display>(name: &str, result: Result<ExitCode, E>) -> ExitCode {
    result.unwrap_or_else(|error| {
        note!("{name}: {error}");
        ExitCode::FAILURE
    })
}

/// A command that calls the API and prints the answer.
pub trait Call: Subcommand {
    async fn call(self, api: &Api, output: Output) -> Result<(), ApiFailure>;
}

impl<C: Call> Client<C> {
    pub async fn call(self, output: Output) -> ExitCode {
        finish(
            "aod",
            async {
                self.command.call(&self.api.connect()?, output).await.map(|()| ExitCode::SUCCESS)
            }
            .await,
        )
    }
}

/// Prints one page of a list, and on standard error how to get the next one.
pub async fn list(
    api: &Api,
    path: &str,
    page: &Page,
    output: Output,
    table: Table,
) -> Result<(), ApiFailure> {
    let (rows, next) = api.page(path, page).await?;
    output.list(&rows, table);
    if let Some(cursor) = next {
        note!("There are more: repeat the command with --cursor {cursor}");
    }
    Ok(())
}

pub const VERSIONS: Table = Table(&["version", "name", "created_at"]);

/// Changes a budget where limits are given, and returns it.
pub async fn change_budget(api: &Api, path: &str, limits: &LimitArgs) -> Result<Value, ApiFailure> {
    if limits.is_empty() { api.get(path).await } else { api.patch(path, &limits.body()).await }
}
