//! `aod agents`.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use serde_json::{Value, json};
use types::Evaluation;

use crate::{
    budget::LimitArgs,
    cli::{
        call::{Call, VERSIONS, change_budget, list},
        files::read_file,
    },
    client::{Api, ApiFailure, Page},
    output::{Output, Table},
};

#[derive(Debug, Subcommand)]
pub enum Agents {
    /// List agents that are not archived, newest first
    List(Page),
    /// Print an agent
    Get {
        /// Id of the agent
        id: String,
    },
    /// Create an agent
    #[command(
        after_help = "Example:\n  aod agents create --name reviewer --runtime claude --model claude-sonnet-4-5 --system 'Review code.' --permission Bash=ask"
    )]
    Create {
        /// Name, at most 200 characters
        #[arg(long)]
        name: String,
        /// Model, with or without its provider: claude-sonnet-4-5 or anthropic/claude-sonnet-4-5
        #[arg(long)]
        model: String,
        /// Runtime: claude, codex, gemini, opencode, or shell where the deployment allows it
        #[arg(long)]
        runtime: String,
        /// System prompt
        #[arg(long)]
        system: Option<String>,
        /// Id of the environment that sessions use by default
        #[arg(long, value_name = "ID")]
        environment: Option<String>,
        /// What a tool may do without asking (allow, ask or deny); `*` at a name's end matches any
        /// rest; repeatable, the first match decides
        #[arg(long, value_name = "TOOL=EVALUATION", value_parser = permission, conflicts_with = "permissions")]
        permission: Vec<(String, Evaluation)>,
        /// Read the permissions from a JSON file, as the API takes them
        #[arg(long, value_name = "FILE")]
        permissions: Option<PathBuf>,
        #[command(flatten)]
        budget: LimitArgs,
    },
    /// Print the budget that the sessions of an agent share; limits change it first
    #[command(after_help = "Example:\n  aod agents budget AGENT --usd 20")]
    Budget {
        /// Id of the agent
        id: String,
        #[command(flatten)]
        limits: LimitArgs,
    },
    /// List the versions of an agent, newest first
    Versions {
        /// Id of the agent
        id: String,
        #[command(flatten)]
        page: Page,
    },
    /// Archive an agent: it can no longer be changed or start sessions
    Archive {
        /// Id of the agent
        id: String,
    },
}

fn permission(text: &str) -> Result<(String, Evaluation), String> {
    let rule = text.rsplit_once('=').filter(|(tool, _)| !tool.is_empty());
    let rule =
        rule.and_then(|(tool, evaluation)| Some((tool.to_owned(), evaluation.parse().ok()?)));
    rule.ok_or_else(|| "expected TOOL=allow, TOOL=ask or TOOL=deny".to_owned())
}

/// Returns an agent's permissions as the API takes them; null where none were given.
fn permissions(rules: &[(String, Evaluation)], file: Option<&Path>) -> Result<Value, ApiFailure> {
    if let Some(path) = file {
        let text = read_file(path)?;
        return serde_json::from_str(&text)
            .map_err(|error| ApiFailure::Local(format!("{}: {error}", path.display())));
    }
    let rules: Vec<Value> = rules
        .iter()
        .map(|(tool, evaluation)| json!({ "tool": tool, "evaluation": evaluation.as_str() }))
        .collect();
    Ok(if rules.is_empty() { Value::Null } else { json!({ "rules": rules }) })
}

impl Call for Agents {
    async fn call(self, api: &Api, output: Output) -> Result<(), ApiFailure> {
        const AGENTS: Table = Table(&["id", "name", "runtime", "model", "created_at"]);
        match self {
            Self::List(page) => list(api, "/agents", &page, output, AGENTS).await?,
            Self::Get { id } => output.one(&api.get(&format!("/agents/{id}")).await?),
            Self::Create {
                name,
                model,
                runtime,
                system,
                environment,
                permission,
                permissions: file,
                budget,
            } => {
                let permissions = permissions(&permission, file.as_deref())?;
                let body = json!({
                    "name": name, "model": model, "runtime": runtime, "system": system, "environment_id": environment,
                    "permissions": permissions, "budget": budget.body(),
                });
                output.one(&api.post("/agents", &body).await?);
            }
            Self::Budget { id, limits } => {
                output.one(&change_budget(api, &format!("/agents/{id}/budget"), &limits).await?)
            }
            Self::Versions { id, page } => {
                list(api, &format!("/agents/{id}/versions"), &page, output, VERSIONS).await?
            }
            Self::Archive { id } => {
                output.one(&api.post(&format!("/agents/{id}/archive"), &Value::Null).await?)
            }
        }
        Ok(())
    }
}
