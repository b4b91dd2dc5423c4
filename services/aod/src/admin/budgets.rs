//! Budgets and usage of model requests.

use clap::{Args, Subcommand};
use contract::{
    rpc,
    scheduler::{
        Budget, BudgetLimits, GetBudgetRequest, ListUsageRequest, ModelsChange, SetBudgetRequest,
        UsageSum,
    },
};
use serde_json::{Value, json};
use types::limits::PAGE_MAX;

use crate::{
    admin::operator::{AdminError, Operator},
    budget::{Limit, LimitArgs, USAGE, count},
};

#[derive(Debug, Subcommand)]
pub enum Budgets {
    /// Print a budget: its limits and what was used
    #[command(after_help = "Example:\n  aod admin budget get user alice")]
    Get(BudgetOf),
    /// Set limits of a budget; limits that are not named stay unchanged
    #[command(
        after_help = "Examples:\n  aod admin budget set user alice --usd 100\n  aod admin budget set deployment --usd 2000 --tokens default\n  aod admin budget set user alice --allow-model 'claude-*' --requests-per-minute 60"
    )]
    Set {
        #[command(flatten)]
        of: BudgetOf,
        #[command(flatten)]
        limits: LimitArgs,
        /// Limit of model requests per session and minute, or `default`
        #[arg(long, value_parser = count)]
        requests_per_minute: Option<Limit>,
        /// Allow only this model; `*` at the end matches any rest; repeatable
        #[arg(long, value_name = "MODEL")]
        allow_model: Vec<String>,
        /// Allow every model again
        #[arg(long, conflicts_with = "allow_model")]
        allow_all_models: bool,
    },
    /// Remove the limits of a budget and reset its counts; the deployment's defaults apply
    Clear(BudgetOf),
}

#[derive(Debug, Args)]
pub struct BudgetOf {
    /// Whose budget
    #[arg(value_enum)]
    scope: Scope,
    /// Name of the user, or id of the agent or session; none for the deployment
    #[arg(required_if_eq_any([("scope", "user"), ("scope", "agent"), ("scope", "session")]))]
    name: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Scope {
    Session,
    Agent,
    User,
    Deployment,
}

impl Scope {
    const fn name(self) -> &'static str {
        match self {
            Self::Session => "session",
            Self::Agent => "agent",
            Self::User => "user",
            Self::Deployment => "deployment",
        }
    }
}

#[derive(Debug, Args)]
pub struct UsageArgs {
    /// Group sums by day, agent, model, key, session or user
    #[arg(long, default_value = "user")]
    by: String,
    /// Only requests of this user
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// First day in UTC, as 2026-01-31; 30 days before the last one by default
    #[arg(long, value_name = "DAY")]
    from: Option<String>,
    /// Last day; today by default
    #[arg(long, value_name = "DAY")]
    to: Option<String>,
    /// Print at most this many sums
    #[arg(long, default_value_t = 100)]
    limit: u32,
}

impl Operator {
    pub(super) async fn budget(&self, command: Budgets) -> Result<(), AdminError> {
        let budget = match command {
            Budgets::Get(of) => self.call::<rpc::GetBudget>(&self.budget_of(of).await?).await?,
            Budgets::Clear(of) => self.call::<rpc::ClearBudget>(&self.budget_of(of).await?).await?,
            Budgets::Set { of, limits, requests_per_minute, allow_model, allow_all_models } => {
                let mut change = limits.change();
                change.requests_per_minute = requests_per_minute.map(Limit::change);
                let names_models = allow_all_models || !allow_model.is_empty();
                change.allowed_models =
                    names_models.then_some(ModelsChange { models: allow_model });
                let request =
                    SetBudgetRequest { of: Some(self.budget_of(of).await?), change: Some(change) };
                self.call::<rpc::SetBudget>(&request).await?
            }
        };
        self.output.one(&describe_budget(&budget));
        Ok(())
    }

    async fn budget_of(&self, of: BudgetOf) -> Result<GetBudgetRequest, AdminError> {
        let scope_id = match (of.scope, of.name) {
            (Scope::User, Some(name)) => self.user(name).await?,
            (Scope::Deployment, Some(_)) => {
                return Err(AdminError::Local("the deployment has no name".to_owned()));
            }
            (_, name) => name.unwrap_or_default(),
        };
        Ok(GetBudgetRequest { scope: of.scope.name().to_owned(), scope_id, user_id: None })
    }

    pub(super) async fn usage(&self, args: UsageArgs) -> Result<(), AdminError> {
        let user_id = match args.user {
            Some(name) => Some(self.user(name).await?),
            None => None,
        };
        let (mut sums, mut after) = (Vec::new(), None);
        while sums.len() < args.limit as usize {
            let limit =
                (args.limit - u32::try_from(sums.len()).unwrap_or(args.limit)).min(PAGE_MAX);
            let (from_day, to_day) = (args.from.clone(), args.to.clone());
            let (user_id, group_by) = (user_id.clone(), args.by.clone());
            let request = ListUsageRequest {
                user_id,
                group_by,
                from_day,
                to_day,
                limit,
                after,
                ..ListUsageRequest::default()
            };
            let page = self.call::<rpc::ListUsage>(&request).await?;
            after = page.sums.last().map(|sum| sum.group.clone());
            sums.extend(page.sums.iter().map(describe_sum));
            if !page.has_more {
                break;
            }
        }
        self.output.list(&sums, USAGE);
        Ok(())
    }
}

fn describe_limits(limits: Option<&BudgetLimits>) -> Value {
    let limits = limits.copied().unwrap_or_default();
    json!({
        "usd": limits.cost_micro_usd.map(|micro| micro as f64 / 1e6),
        "tokens": limits.tokens,
        "requests": limits.requests,
        "seconds": limits.seconds,
    })
}

fn describe_budget(budget: &Budget) -> Value {
    json!({
        "scope": budget.scope,
        "id": budget.scope_id,
        "limits": describe_limits(budget.max.as_ref()),
        "used": describe_limits(budget.used.as_ref()),
        "reserved": describe_limits(budget.reserved.as_ref()),
        "own_limits": describe_limits(budget.own.as_ref()),
        "requests_per_minute": budget.requests_per_minute,
        "allowed_models": budget.allowed_models,
    })
}

fn describe_sum(sum: &UsageSum) -> Value {
    json!({
        "group": sum.group,
        "requests": sum.requests,
        "unknown": sum.unknown,
        "unpriced": sum.unpriced,
        "input_tokens": sum.input_tokens,
        "output_tokens": sum.output_tokens,
        "cache_read_tokens": sum.cache_read_tokens,
        "cache_write_tokens": sum.cache_write_tokens,
        "cost_usd": sum.cost_micro_usd as f64 / 1e6,
    })
}
