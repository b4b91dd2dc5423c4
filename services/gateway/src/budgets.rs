//! Budgets of sessions and agents, and what was used (docs/budgets.md).

use axum::{
    Json,
    extract::{FromRequestParts, Query, State},
    http::request::Parts,
};
use contract::{
    rpc,
    scheduler::{
        self, BudgetChange, BudgetLimits, Cursor, GetBudgetRequest, LimitChange, ListUsageRequest,
        SetBudgetRequest,
    },
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};

use crate::{
    App,
    auth::Caller,
    body::{Body, Fields},
    error::ApiError,
    page::{Listed, Page, PageParams, bad_query, listed},
    path::{Id, IdParams},
    v1::ids::Prefix,
};

/// A billion dollars is a mistake.
const USD_MAX: f64 = 1e9;
/// So are more tokens, requests or seconds than this.
const COUNT_MAX: u64 = 1_000_000_000_000_000;

/// Limits of a budget. What is absent or null has the deployment's default, if there is one, and
/// otherwise no limit.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes a field")]
pub struct NewBudget {
    /// US dollars at list prices
    #[schema(minimum = 0, example = 5)]
    usd: Option<f64>,
    /// Tokens of input and output
    #[schema(minimum = 0, maximum = 1_000_000_000_000_000_u64)]
    tokens: Option<u64>,
    /// Model requests
    #[schema(minimum = 0, maximum = 1_000_000_000_000_000_u64)]
    requests: Option<u64>,
    /// Seconds that turns run
    #[schema(minimum = 0, maximum = 1_000_000_000_000_000_u64)]
    seconds: Option<u64>,
}

/// A change of a budget. What is absent stays as it is; null falls back to the deployment's
/// default.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes a body")]
pub struct ChangeBudget {
    #[schema(minimum = 0, example = 10)]
    usd: Option<f64>,
    #[schema(minimum = 0, maximum = 1_000_000_000_000_000_u64)]
    tokens: Option<u64>,
    #[schema(minimum = 0, maximum = 1_000_000_000_000_000_u64)]
    requests: Option<u64>,
    #[schema(minimum = 0, maximum = 1_000_000_000_000_000_u64)]
    seconds: Option<u64>,
}

/// Reads the field `budget` of a new session or agent.
pub fn read(fields: &mut Fields) -> Option<BudgetChange> {
    fields.nested("budget", read_change)
}

fn read_change(fields: &mut Fields) -> BudgetChange {
    fields.allow_only(&["usd", "tokens", "requests", "seconds"]);
    let usd = fields.value("usd").cloned();
    let cost_micro_usd = match usd {
        None => fields.is_null("usd").then_some(LimitChange { max: None }),
        Some(value) => {
            let usd = value.as_f64().filter(|usd| (0.0..USD_MAX).contains(usd));
            if usd.is_none() {
                fields.refuse("usd", "usd must be a number from 0 to less than 1000000000");
            }
            Some(LimitChange { max: usd.map(|usd| (usd * 1e6).round() as u64) })
        }
    };
    let mut count = |name: &str| match fields.value(name).cloned() {
        None => fields.is_null(name).then_some(LimitChange { max: None }),
        Some(value) => {
            let max = whole_number(&value);
            if max.is_none() {
                fields
                    .refuse(name, &format!("{name} must be a whole number from 0 to {COUNT_MAX}"));
            }
            Some(LimitChange { max })
        }
    };
    BudgetChange {
        cost_micro_usd,
        tokens: count("tokens"),
        requests: count("requests"),
        seconds: count("seconds"),
        ..BudgetChange::default()
    }
}

/// Numbers alone: a limit is no place for guesses about texts or truth values.
fn whole_number(value: &Value) -> Option<u64> {
    let of_float = || {
        value
            .as_f64()
            .filter(|number| number.fract() == 0.0 && *number >= 0.0)
            .map(|number| number as u64)
    };
    value.as_u64().or_else(of_float).filter(|number| *number <= COUNT_MAX)
}

/// A budget.
#[derive(Serialize, ToSchema)]
pub struct Budget {
    #[schema(pattern = "^(session|agent)$")]
    scope: String,
    /// Of the session or agent.
    #[schema(format = Uuid)]
    id: String,
    /// What may be used: its own limits, else the deployment's defaults. Null: no limit.
    limits: Amounts,
    /// What counts towards them.
    used: Amounts,
    /// What requests under way may use.
    reserved: Amounts,
    /// The limits that were set here.
    own_limits: Amounts,
    /// Null: the deployment's default.
    requests_per_minute: Option<u32>,
    /// Empty: every model.
    allowed_models: Vec<String>,
}

/// An amount of each kind.
#[derive(Serialize, ToSchema)]
pub struct Amounts {
    usd: Option<f64>,
    tokens: Option<u64>,
    requests: Option<u64>,
    seconds: Option<u64>,
}

impl From<Option<BudgetLimits>> for Amounts {
    fn from(limits: Option<BudgetLimits>) -> Self {
        let BudgetLimits { cost_micro_usd, tokens, requests, seconds } = limits.unwrap_or_default();
        Self { usd: cost_micro_usd.map(dollars), tokens, requests, seconds }
    }
}

fn dollars(micro: u64) -> f64 {
    micro as f64 / 1e6
}

impl From<scheduler::Budget> for Budget {
    fn from(budget: scheduler::Budget) -> Self {
        Self {
            scope: budget.scope,
            id: budget.scope_id,
            limits: budget.max.into(),
            used: budget.used.into(),
            reserved: budget.reserved.into(),
            own_limits: budget.own.into(),
            requests_per_minute: budget.requests_per_minute,
            allowed_models: budget.allowed_models,
        }
    }
}

/// Ids may have the form that `/v1` shows them in.
fn of(caller: Caller, prefix: Prefix, id: String) -> GetBudgetRequest {
    let scope = if prefix == Prefix::Agent { "agent" } else { "session" };
    let scope_id = prefix.find(&id).unwrap_or(id);
    GetBudgetRequest { scope: scope.to_owned(), scope_id, user_id: Some(caller.user_id) }
}

async fn change(app: &App, of: GetBudgetRequest, body: &Body) -> Result<Json<Budget>, ApiError> {
    let mut fields = body.fields()?;
    let change = read_change(&mut fields);
    fields.finish()?;
    let request = SetBudgetRequest { of: Some(of), change: Some(change) };
    Ok(Json(app.call::<rpc::SetBudget>(&request).await?.into()))
}

/// Get the budget of a session
#[utoipa::path(get, path = "/sessions/{id}/budget", tag = "sessions", params(IdParams),
    responses((status = 200, description = "The budget", body = Budget)))]
pub async fn of_session(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<Json<Budget>, ApiError> {
    Ok(Json(app.call::<rpc::GetBudget>(&of(caller, Prefix::Session, id)).await?.into()))
}

/// Change the budget of a session
///
/// It holds from the next model request on. What the session used before counts.
#[utoipa::path(patch, path = "/sessions/{id}/budget", tag = "sessions", params(IdParams), request_body = ChangeBudget,
    responses((status = 200, description = "The budget", body = Budget)))]
pub async fn change_of_session(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
    body: Body,
) -> Result<Json<Budget>, ApiError> {
    change(&app, of(caller, Prefix::Session, id), &body).await
}

/// Get the budget of an agent, which all its sessions share
#[utoipa::path(get, path = "/agents/{id}/budget", tag = "agents", params(IdParams),
    responses((status = 200, description = "The budget", body = Budget)))]
pub async fn of_agent(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<Json<Budget>, ApiError> {
    Ok(Json(app.call::<rpc::GetBudget>(&of(caller, Prefix::Agent, id)).await?.into()))
}

/// Change the budget of an agent, which all its sessions share
///
/// It holds from the next model request on.
#[utoipa::path(patch, path = "/agents/{id}/budget", tag = "agents", params(IdParams), request_body = ChangeBudget,
    responses((status = 200, description = "The budget", body = Budget)))]
pub async fn change_of_agent(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
    body: Body,
) -> Result<Json<Budget>, ApiError> {
    change(&app, of(caller, Prefix::Agent, id), &body).await
}

/// What is added up.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct UsageParams {
    /// `day` (the default), `agent`, `model`, `key` (the kind of the credential) or `session`
    group_by: Option<String>,
    /// Only sessions of this agent
    #[param(format = Uuid)]
    agent_id: Option<String>,
    /// Only this session; with `group_by=session`
    #[param(format = Uuid)]
    session_id: Option<String>,
    /// The first day, in UTC; 30 days before the last one by default
    #[param(format = Date, example = "2026-01-01")]
    from: Option<String>,
    /// The last day; today by default. Of sessions: the days on which they were created
    #[param(format = Date, example = "2026-01-31")]
    to: Option<String>,
}

const GROUPS: [&str; 5] = ["day", "agent", "model", "key", "session"];

impl<S: Send + Sync> FromRequestParts<S> for UsageParams {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let params = Query::<Self>::from_request_parts(parts, state).await;
        let Query(params) = params.map_err(|_| bad_query("Malformed query"))?;
        if params.group_by.as_deref().is_some_and(|group| !GROUPS.contains(&group)) {
            return Err(bad_query("group_by must be one of: day, agent, model, key, session"));
        }
        Ok(params)
    }
}

/// What model requests used together.
#[derive(Serialize, ToSchema)]
pub struct UsageSum {
    /// A day, the id of an agent or session, a model as `provider/model`, or the kind of a
    /// credential.
    group: String,
    requests: u64,
    /// Requests whose usage is unknown: no other count includes them.
    unknown: u64,
    /// Requests of models without a price: the cost does not include them.
    unpriced: u64,
    /// Includes tokens that were read from and written to caches.
    input_tokens: u64,
    output_tokens: u64,
    cache_read_tokens: u64,
    cache_write_tokens: u64,
    cost_usd: f64,
}

impl From<scheduler::UsageSum> for UsageSum {
    fn from(sum: scheduler::UsageSum) -> Self {
        Self {
            group: sum.group,
            requests: sum.requests,
            unknown: sum.unknown,
            unpriced: sum.unpriced,
            input_tokens: sum.input_tokens,
            output_tokens: sum.output_tokens,
            cache_read_tokens: sum.cache_read_tokens,
            cache_write_tokens: sum.cache_write_tokens,
            cost_usd: dollars(sum.cost_micro_usd),
        }
    }
}

/// Add up what model requests used
///
/// Days and sessions come newest first. A request appears here a moment after it ends.
#[utoipa::path(get, path = "/usage", tag = "usage", params(PageParams, UsageParams),
    responses((status = 200, description = "A page of sums", body = Listed<UsageSum>)))]
pub async fn usage(
    State(app): State<App>,
    caller: Caller,
    page: Page,
    params: UsageParams,
) -> Result<Json<Listed<UsageSum>>, ApiError> {
    let by_session = params.session_id.is_some();
    let request = ListUsageRequest {
        user_id: Some(caller.user_id),
        group_by: params
            .group_by
            .unwrap_or_else(|| if by_session { "session" } else { "day" }.to_owned()),
        agent_id: params.agent_id,
        session_id: params.session_id,
        from_day: params.from,
        to_day: params.to,
        limit: page.limit,
        after: page.after.map(|cursor| cursor.id),
    };
    let reply = app.call::<rpc::ListUsage>(&request).await?;
    let cursor = |sum: &scheduler::UsageSum| Cursor { position: 0, id: sum.group.clone() };
    Ok(listed(reply.sums, reply.has_more, cursor, UsageSum::from))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn change_of(body: Value) -> Result<BudgetChange, ()> {
        let mut fields = Body::from_json(&body).fields().map_err(|_| ())?;
        let change = read_change(&mut fields);
        fields.finish().map(|()| change).map_err(|_| ())
    }

    #[test]
    fn a_limit_is_kept_cleared_or_set() {
        let max = |max| Some(LimitChange { max });
        let change = change_of(json!({ "usd": 2.5, "tokens": null, "requests": 10 })).unwrap();
        assert_eq!((change.cost_micro_usd, change.tokens), (max(Some(2_500_000)), max(None)));
        assert_eq!((change.requests, change.seconds), (max(Some(10)), None));
        assert_eq!(change_of(json!({})), Ok(BudgetChange::default()));
    }

    #[test]
    fn invalid_limits_are_refused() {
        for wrong in [
            json!({ "usd": -1 }),
            json!({ "usd": "5" }),
            json!({ "usd": 1e9 }),
            json!({ "euro": 5 }),
        ] {
            assert!(change_of(wrong.clone()).is_err(), "{wrong}");
        }
        for count in [
            json!(-1),
            json!(false),
            json!("5"),
            json!(0.5),
            json!([]),
            json!(COUNT_MAX + 1),
            json!(u64::MAX),
            json!(1e300),
        ] {
            assert!(change_of(json!({ "seconds": count })).is_err(), "{count}");
        }
        for count in [json!(0), json!(2.0), json!(COUNT_MAX)] {
            assert!(change_of(json!({ "seconds": count })).is_ok(), "{count}");
        }
    }
}
