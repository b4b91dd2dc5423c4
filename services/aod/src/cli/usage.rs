//! `aod usage`.

use clap::{Args, ValueEnum};

use crate::{
    budget::USAGE,
    cli::call::list,
    client::{Api, ApiFailure, Page},
    output::Output,
};

#[derive(Debug, Args)]
pub struct UsageArgs {
    /// Group sums by this
    #[arg(long, value_enum, default_value_t = GroupBy::Day)]
    by: GroupBy,
    /// Only sessions of this agent
    #[arg(long, value_name = "ID")]
    agent: Option<String>,
    /// First day in UTC, as 2026-01-31; 30 days before the last one by default
    #[arg(long, value_name = "DAY")]
    from: Option<String>,
    /// Last day; today by default
    #[arg(long, value_name = "DAY")]
    to: Option<String>,
    #[command(flatten)]
    page: Page,
}

/// What usage is added up by.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum GroupBy {
    Day,
    Agent,
    Model,
    Key,
    Session,
}

impl UsageArgs {
    pub async fn print(self, api: &Api, output: Output) -> Result<(), ApiFailure> {
        let by = self
            .by
            .to_possible_value()
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default();
        let mut query = format!("group_by={by}");
        for (name, value) in [("agent_id", &self.agent), ("from", &self.from), ("to", &self.to)] {
            if let Some(value) = value {
                query.push_str(&format!("&{name}={}", query_value(value)));
            }
        }
        list(api, &format!("/usage?{query}"), &self.page, output, USAGE).await
    }
}

/// Ids and days need no escapes; the rest is refused by the API.
fn query_value(text: &str) -> String {
    text.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_')).collect()
}
