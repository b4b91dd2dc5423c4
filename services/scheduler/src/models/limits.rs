//! Budgets and policies: rows of `model_limit`, with the deployment's defaults where a row or a
//! value is missing.

use std::str::FromStr;

use bus::RpcError;
use rules::budget::{Account, Limits};
use service::Env;
use sqlx::{PgConnection, Row as _, postgres::PgRow};
use uuid::Uuid;

/// Whose limits. In the order in which rows are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    Session,
    Agent,
    User,
    Deployment,
}

impl Scope {
    pub const ALL: [Self; 4] = [Self::Session, Self::Agent, Self::User, Self::Deployment];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Session => "session",
            Self::Agent => "agent",
            Self::User => "user",
            Self::Deployment => "deployment",
        }
    }
}

impl FromStr for Scope {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|scope| scope.as_str() == text).ok_or(())
    }
}

/// What counts where no row says otherwise.
#[derive(Clone, Debug, Default)]
pub struct Defaults {
    pub session: DefaultBudget,
    pub agent: DefaultBudget,
    pub user: DefaultBudget,
    pub deployment: DefaultBudget,
    /// Model requests of one session per minute; 0: no limit.
    pub requests_per_minute: u32,
}

/// Limits as a setting: `usd=20,tokens=5000000,requests=1000,seconds=86400`, each of them optional.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DefaultBudget(pub Limits);

impl FromStr for DefaultBudget {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut limits = Limits::default();
        for part in
            text.split(',').map(str::trim).filter(|part| !part.is_empty() && *part != "none")
        {
            let (name, value) = part.split_once('=').ok_or(())?;
            if name == "usd" {
                let usd: f64 = value.parse().map_err(|_| ())?;
                limits.cost = Some(
                    (0.0..1e9).contains(&usd).then_some((usd * 1e6).round() as u64).ok_or(())?,
                );
                continue;
            }
            let value =
                value.parse::<u64>().ok().filter(|value| i64::try_from(*value).is_ok()).ok_or(())?;
            match name {
                "tokens" => limits.tokens = Some(value),
                "requests" => limits.requests = Some(value),
                "seconds" => limits.seconds = Some(value),
                _ => return Err(()),
            }
        }
        Ok(Self(limits))
    }
}

impl std::fmt::Display for DefaultBudget {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(if self.0.is_none() { "none" } else { "set" })
    }
}

impl Defaults {
    pub fn from_env(env: &mut Env) -> Self {
        let mut budget =
            |name: &str, meaning: &'static str| env.parsed(name, meaning, DefaultBudget::default());
        let session = budget(
            "AOD_BUDGET_SESSION",
            "default budget of each session, e.g. usd=5,tokens=2000000,requests=500,seconds=3600",
        );
        let agent = budget(
            "AOD_BUDGET_AGENT",
            "default budget of all sessions of an agent, like AOD_BUDGET_SESSION",
        );
        let user = budget(
            "AOD_BUDGET_USER",
            "default budget of all sessions of a user, like AOD_BUDGET_SESSION",
        );
        let deployment = budget(
            "AOD_BUDGET_DEPLOYMENT",
            "budget of all sessions together, like AOD_BUDGET_SESSION",
        );
        let requests_per_minute = env.parsed(
            "AOD_MODEL_REQUESTS_PER_MINUTE",
            "maximum number of model requests of a session per minute; 0: no limit",
            0,
        );
        Self { session, agent, user, deployment, requests_per_minute }
    }

    /// Whether a session without a row of its own is limited by nothing.
    pub fn limit_nothing(&self) -> bool {
        self.requests_per_minute == 0
            && Scope::ALL.into_iter().all(|scope| self.of(scope).is_none())
    }

    pub fn of(&self, scope: Scope) -> Limits {
        match scope {
            Scope::Session => self.session.0,
            Scope::Agent => self.agent.0,
            Scope::User => self.user.0,
            Scope::Deployment => self.deployment.0,
        }
    }
}

/// Whose limits a request is under.
#[derive(Clone, Copy, Debug)]
pub struct Owners {
    pub session: Uuid,
    pub agent: Option<Uuid>,
    pub user: Uuid,
}

impl Owners {
    fn id(&self, scope: Scope) -> Option<Uuid> {
        match scope {
            Scope::Session => Some(self.session),
            Scope::Agent => self.agent,
            Scope::User => Some(self.user),
            Scope::Deployment => Some(Uuid::nil()),
        }
    }

    fn ids(&self) -> (Vec<&'static str>, Vec<Uuid>) {
        Scope::ALL.into_iter().filter_map(|scope| Some((scope.as_str(), self.id(scope)?))).unzip()
    }
}

/// What policies say.
#[derive(Clone, Debug, Default)]
pub struct Policies {
    pub has_budget: bool,
    /// Of every scope that names some.
    pub allowed_models: Vec<Vec<String>>,
    pub requests_per_minute: u32,
}

impl Policies {
    pub const fn is_unlimited(&self) -> bool {
        !self.has_budget && self.allowed_models.is_empty() && self.requests_per_minute == 0
    }

    pub fn allow(&self, model: &str) -> bool {
        let is_in = |models: &Vec<String>| {
            models.iter().any(|allowed| match allowed.strip_suffix('*') {
                Some(start) => model.starts_with(start),
                None => model == allowed,
            })
        };
        self.allowed_models.iter().all(is_in)
    }
}

/// Reads policies, and makes the rows of default budgets.
pub async fn policies(
    tx: &mut PgConnection,
    owners: &Owners,
    defaults: &Defaults,
) -> Result<Policies, RpcError> {
    let (scopes, ids) = owners.ids();
    let rows = sqlx::query(
        "select scope, allowed_models, requests_per_minute,
                num_nonnulls(max_cost_micro_usd, max_tokens, max_requests, max_seconds) > 0
         from model_limit l join unnest($1::text[], $2::uuid[]) as o (scope, scope_id) using (scope, scope_id)",
    )
    .bind(&scopes)
    .bind(&ids)
    .fetch_all(&mut *tx)
    .await?;
    let mut policies =
        Policies { requests_per_minute: defaults.requests_per_minute, ..Policies::default() };
    let mut known = Vec::new();
    let mut own_rates = Vec::new();
    for row in &rows {
        let scope: String = row.try_get(0)?;
        policies.allowed_models.extend(row.try_get::<Option<Vec<String>>, _>(1)?);
        own_rates.extend(row.try_get::<Option<i32>, _>(2)?.map(crate::unsigned));
        policies.has_budget |= row.try_get::<bool, _>(3)?;
        known.extend(scope.parse::<Scope>());
    }
    if let Some(lowest) = own_rates.into_iter().filter(|rate| *rate > 0).min() {
        policies.requests_per_minute = lowest;
    }
    for scope in Scope::ALL.into_iter().filter(|scope| !defaults.of(*scope).is_none()) {
        let Some(id) = owners.id(scope) else { continue };
        policies.has_budget = true;
        if !known.contains(&scope) {
            make(tx, scope, id).await?;
        }
    }
    Ok(policies)
}

/// Creates the row of a budget if there is none. A session's row includes what the session used
/// before; others start at zero. What open requests reserved in other budgets is reserved in this
/// one too: their ends take it from each.
pub async fn make(tx: &mut PgConnection, scope: Scope, id: Uuid) -> Result<(), RpcError> {
    if scope == Scope::Session {
        // The row that everybody who writes of a session's requests takes first.
        sqlx::query("insert into model_meter (session_id) values ($1) on conflict (session_id) do update set number = model_meter.number")
            .bind(id)
            .execute(&mut *tx)
            .await?;
    }
    sqlx::query(
        "with open as (
             select held_cost_micro_usd, held_tokens
             from model_request
             where status = 'open' and is_budgeted
               and case $1 when 'session' then session_id = $2 when 'agent' then agent_id = $2 when 'user' then user_id = $2 else true end
             -- One that ends meanwhile does not know of this row yet, or waits for it.
             for share
         ), underway as (
             select count(*) as requests, coalesce(sum(held_cost_micro_usd), 0) as cost, coalesce(sum(held_tokens), 0) as tokens
             from open
         ), used as (
             select coalesce(sum(cost_micro_usd), 0) as cost, coalesce(sum(input_tokens + output_tokens), 0) as tokens,
                    coalesce(sum(requests), 0) as requests
             from turn_usage where $1 = 'session' and session_id = $2
         )
         insert into model_limit (scope, scope_id, used_cost_micro_usd, used_tokens, used_requests, used_us,
                                  held_cost_micro_usd, held_tokens)
         select $1, $2, used.cost, used.tokens, used.requests + underway.requests,
                coalesce((select counted_us from model_meter where $1 = 'session' and session_id = $2), 0),
                underway.cost, underway.tokens
         from used, underway
         on conflict (scope, scope_id) do nothing",
    )
    .bind(scope.as_str())
    .bind(id)
    .execute(tx)
    .await?;
    Ok(())
}

/// Takes the rows of budgets until the transaction ends.
pub async fn lock(
    tx: &mut PgConnection,
    owners: &Owners,
    defaults: &Defaults,
) -> Result<Vec<(Scope, Account)>, RpcError> {
    let (scopes, ids) = owners.ids();
    let rows = sqlx::query(
        "select scope, max_cost_micro_usd, max_tokens, max_requests, max_seconds, used_cost_micro_usd, used_tokens, used_requests,
                used_us, held_cost_micro_usd, held_tokens, has_warned
         from model_limit l
         join unnest($1::text[], $2::uuid[]) as o (scope, scope_id) using (scope, scope_id)
         order by array_position(array['session', 'agent', 'user', 'deployment'], scope)
         for update of l",
    )
    .bind(&scopes)
    .bind(&ids)
    .fetch_all(tx)
    .await?;
    let account = |row: &PgRow| -> Result<Option<(Scope, Account)>, RpcError> {
        let Ok(scope) = row.try_get::<&str, _>(0)?.parse::<Scope>() else { return Ok(None) };
        let count = |index: usize| row.try_get::<i64, _>(index).map(i64::unsigned_abs);
        let max = |index: usize| {
            row.try_get::<Option<i64>, _>(index).map(|max| max.map(i64::unsigned_abs))
        };
        let own = Limits { cost: max(1)?, tokens: max(2)?, requests: max(3)?, seconds: max(4)? };
        let account = Account {
            limits: own.or(defaults.of(scope)),
            used_cost: count(5)?,
            used_tokens: count(6)?,
            used_requests: count(7)?,
            used_us: count(8)?,
            held_cost: count(9)?,
            held_tokens: count(10)?,
            has_warned: row.try_get(11)?,
        };
        Ok(Some((scope, account)))
    };
    rows.iter().filter_map(|row| account(row).transpose()).collect()
}

/// How long a session's turns ran since that was counted last, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ran {
    /// What the session's own budget counts.
    pub own: u64,
    /// What budgets count that it shares with other sessions.
    pub shared: u64,
}

impl Ran {
    pub const fn of(self, scope: Scope) -> u64 {
        if matches!(scope, Scope::Session) { self.own } else { self.shared }
    }
}

/// What a request changes in every budget that it is under.
#[derive(Clone, Copy, Debug, Default)]
pub struct Change {
    pub used_cost: u64,
    pub used_tokens: u64,
    pub used_requests: u64,
    pub ran: Ran,
    /// More is held, or less.
    pub held_cost: i64,
    pub held_tokens: i64,
}

pub async fn apply(
    tx: &mut PgConnection,
    owners: &Owners,
    change: Change,
    warned: &[Scope],
) -> Result<(), RpcError> {
    let (scopes, ids) = owners.ids();
    let warned: Vec<&str> = warned.iter().map(|scope| scope.as_str()).collect();
    let number = |count: u64| count.min(super::requests::COUNT_MAX).cast_signed();
    sqlx::query(
        "with taken as (
             select scope, scope_id
             from model_limit l
             join unnest($1::text[], $2::uuid[]) as o (scope, scope_id) using (scope, scope_id)
             order by array_position(array['session', 'agent', 'user', 'deployment'], scope)
             for update of l
         )
         update model_limit l
         set used_cost_micro_usd = used_cost_micro_usd + $3, used_tokens = used_tokens + $4, used_requests = used_requests + $5,
             used_us = used_us + case when l.scope = 'session' then $6 else $10 end, held_cost_micro_usd = greatest(0, held_cost_micro_usd + $7),
             held_tokens = greatest(0, held_tokens + $8), has_warned = has_warned or l.scope = any($9)
         from taken
         where l.scope = taken.scope and l.scope_id = taken.scope_id",
    )
    .bind(&scopes)
    .bind(&ids)
    .bind(number(change.used_cost))
    .bind(number(change.used_tokens))
    .bind(number(change.used_requests))
    .bind(number(change.ran.own))
    .bind(change.held_cost)
    .bind(change.held_tokens)
    .bind(&warned)
    .bind(number(change.ran.shared))
    .execute(tx)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_read_from_a_setting() {
        let limits =
            Limits { cost: Some(2_500_000), tokens: None, requests: Some(10), seconds: Some(60) };
        assert_eq!("usd=2.5, requests=10,seconds=60".parse(), Ok(DefaultBudget(limits)));
        assert_eq!("".parse(), Ok(DefaultBudget::default()));
        for wrong in ["usd", "usd=-1", "euro=5", "tokens=1.5", "tokens=99999999999999999999"] {
            assert_eq!(wrong.parse::<DefaultBudget>(), Err(()), "{wrong}");
        }
    }

    #[test]
    fn a_model_has_to_be_allowed_by_every_scope_that_names_some() {
        let policies = Policies {
            allowed_models: vec![
                vec!["claude-*".to_owned()],
                vec!["claude-haiku-4-5".to_owned(), "gpt-5".to_owned()],
            ],
            ..Policies::default()
        };
        assert!(policies.allow("claude-haiku-4-5"));
        assert!(
            !policies.allow("claude-opus-4-5") && !policies.allow("gpt-5") && !policies.allow("")
        );
        assert!(Policies::default().allow("anything"));
    }
}
