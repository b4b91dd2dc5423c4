//! Budgets as users and operators set them, and what was used.

use std::ops::RangeInclusive;

use bus::RpcError;
use contract::scheduler::{
    Budget, BudgetChange, BudgetLimits, GetBudgetRequest, LimitChange, ListUsageReply,
    ListUsageRequest, ModelsChange, SetBudgetRequest, UsageSum,
};
use sqlx::{PgConnection, Row as _, postgres::PgRow};
use time::{Date, Duration, OffsetDateTime, macros::format_description};
use types::limits::PAGE_MAX;
use uuid::Uuid;

use crate::{
    Scheduler,
    db::idempotency,
    models::limits::{self, Defaults, Scope},
    sessions::row::missing,
    unsigned, without_nul,
};

/// A page of sums covers at most so many days.
const DAYS_MAX: i64 = 366;
const DAYS: i64 = 31;
const MODELS_MAX: usize = 100;
const MODEL_CHARS_MAX: usize = 100;

pub async fn get(scheduler: Scheduler, request: GetBudgetRequest) -> Result<Budget, RpcError> {
    let mut connection = scheduler.pool.acquire().await?;
    let (scope, id) = find(&mut connection, &request).await?;
    read(&mut connection, &scheduler.model_defaults, scope, id).await
}

pub async fn set(scheduler: Scheduler, request: SetBudgetRequest) -> Result<Budget, RpcError> {
    let of = request.of.unwrap_or_default();
    let change = request.change.unwrap_or_default();
    idempotency::retried(|| async {
        let mut tx = scheduler.pool.begin().await?;
        let (scope, id) = find(&mut tx, &of).await?;
        write(&mut tx, scope, id, &change).await?;
        let budget = read(&mut tx, &scheduler.model_defaults, scope, id).await?;
        tx.commit().await?;
        Ok(budget)
    })
    .await
}

pub async fn clear(scheduler: Scheduler, request: GetBudgetRequest) -> Result<Budget, RpcError> {
    let mut tx = scheduler.pool.begin().await?;
    let (scope, id) = find(&mut tx, &request).await?;
    // Reservations of requests in flight stay: their ends release them.
    sqlx::query(
        "update model_limit
         set max_cost_micro_usd = null, max_tokens = null, max_requests = null, max_seconds = null, used_cost_micro_usd = 0,
             used_tokens = 0, used_requests = 0, used_us = 0, has_warned = false, allowed_models = null, requests_per_minute = null
         where scope = $1 and scope_id = $2",
    )
    .bind(scope.as_str())
    .bind(id)
    .execute(&mut *tx)
    .await?;
    let budget = read(&mut tx, &scheduler.model_defaults, scope, id).await?;
    tx.commit().await?;
    Ok(budget)
}

/// Whose budget is meant. A user reaches those of their own sessions and agents.
async fn find(
    connection: &mut PgConnection,
    request: &GetBudgetRequest,
) -> Result<(Scope, Uuid), RpcError> {
    let scope: Scope =
        request.scope.parse().map_err(|()| RpcError::invalid("Unknown scope of a budget"))?;
    if scope == Scope::Deployment && request.user_id.is_none() {
        return Ok((scope, Uuid::nil()));
    }
    let absent = || match scope {
        Scope::Agent => RpcError::not_found("Agent not found"),
        Scope::User | Scope::Deployment => RpcError::not_found("User not found"),
        Scope::Session => missing(),
    };
    let id: Uuid = request.scope_id.parse().map_err(|_| absent())?;
    let owner = match &request.user_id {
        None => None,
        Some(user) => Some(user.parse::<Uuid>().map_err(|_| absent())?),
    };
    let statement = match scope {
        Scope::Session => {
            "select from session where session_id = $1 and ($2::uuid is null or user_id = $2)"
        }
        Scope::Agent => {
            "select from agent where agent_id = $1 and ($2::uuid is null or user_id = $2)"
        }
        // Another service knows which users exist; the operator's command asks it first.
        Scope::User | Scope::Deployment if owner.is_none() => return Ok((scope, id)),
        Scope::User | Scope::Deployment => {
            return Err(RpcError::invalid("The operator sets this budget"));
        }
    };
    let found = sqlx::query(statement).bind(id).bind(owner).fetch_optional(connection).await?;
    found.map(|_| (scope, id)).ok_or_else(absent)
}

/// Changes a budget within the transaction of the caller, who has checked whose it is. What a
/// session used before counts.
pub async fn write(
    tx: &mut PgConnection,
    scope: Scope,
    id: Uuid,
    change: &BudgetChange,
) -> Result<(), RpcError> {
    limits::make(tx, scope, id).await?;
    let models = change.allowed_models.as_ref().map(allowed_models).transpose()?;
    let rate = limit(change.requests_per_minute)?;
    let rate = (rate.0, rate.1.map(|rate| i32::try_from(rate).unwrap_or(i32::MAX)));
    let (cost, tokens) = (limit(change.cost_micro_usd)?, limit(change.tokens)?);
    let (requests, seconds) = (limit(change.requests)?, limit(change.seconds)?);
    // A changed limit warns again.
    let is_raised = cost.0 || tokens.0 || requests.0 || seconds.0;
    sqlx::query(
        "update model_limit
         set max_cost_micro_usd = case when $3 then $4 else max_cost_micro_usd end,
             max_tokens = case when $5 then $6 else max_tokens end,
             max_requests = case when $7 then $8 else max_requests end,
             max_seconds = case when $9 then $10 else max_seconds end,
             requests_per_minute = case when $11 then $12 else requests_per_minute end,
             allowed_models = case when $13 then $14 else allowed_models end,
             has_warned = has_warned and not $15
         where scope = $1 and scope_id = $2",
    )
    .bind(scope.as_str())
    .bind(id)
    .bind(cost.0)
    .bind(cost.1)
    .bind(tokens.0)
    .bind(tokens.1)
    .bind(requests.0)
    .bind(requests.1)
    .bind(seconds.0)
    .bind(seconds.1)
    .bind(rate.0)
    .bind(rate.1)
    .bind(models.is_some())
    .bind(models.flatten())
    .bind(is_raised)
    .execute(tx)
    .await?;
    Ok(())
}

/// Whether it changes, and to what.
fn limit(change: Option<LimitChange>) -> Result<(bool, Option<i64>), RpcError> {
    let Some(change) = change else { return Ok((false, None)) };
    let max = change
        .max
        .map(|max| i64::try_from(max).map_err(|_| RpcError::invalid("The limit is too large")));
    Ok((true, max.transpose()?))
}

fn allowed_models(change: &ModelsChange) -> Result<Option<Vec<String>>, RpcError> {
    let is_short = |model: &String| (1..=MODEL_CHARS_MAX).contains(&model.chars().count());
    if change.models.len() > MODELS_MAX || !change.models.iter().all(is_short) {
        return Err(RpcError::invalid(format!(
            "At most {MODELS_MAX} models of at most {MODEL_CHARS_MAX} characters may be named"
        )));
    }
    Ok(Some(change.models.iter().map(|model| without_nul(model)).collect::<Vec<_>>())
        .filter(|models| !models.is_empty()))
}

async fn read(
    connection: &mut PgConnection,
    defaults: &Defaults,
    scope: Scope,
    id: Uuid,
) -> Result<Budget, RpcError> {
    let row = sqlx::query(
        "select max_cost_micro_usd, max_tokens, max_requests, max_seconds, used_cost_micro_usd, used_tokens, used_requests,
                used_us / 1000000, held_cost_micro_usd, held_tokens, allowed_models, requests_per_minute
         from model_limit where scope = $1 and scope_id = $2",
    )
    .bind(scope.as_str())
    .bind(id)
    .fetch_optional(connection)
    .await?;
    let whole = |row: &PgRow, index: usize| {
        row.try_get::<Option<i64>, _>(index).map(|count| count.map(i64::unsigned_abs))
    };
    let limits = |row: &PgRow, first: usize| -> Result<BudgetLimits, RpcError> {
        Ok(BudgetLimits {
            cost_micro_usd: whole(row, first)?,
            tokens: whole(row, first + 1)?,
            requests: whole(row, first + 2)?,
            seconds: whole(row, first + 3)?,
        })
    };
    let zero = BudgetLimits {
        cost_micro_usd: Some(0),
        tokens: Some(0),
        requests: Some(0),
        seconds: Some(0),
    };
    let (own, used, reserved) = match &row {
        None => (
            BudgetLimits::default(),
            zero,
            BudgetLimits { cost_micro_usd: Some(0), tokens: Some(0), ..BudgetLimits::default() },
        ),
        Some(row) => {
            let reserved = BudgetLimits {
                cost_micro_usd: whole(row, 8)?,
                tokens: whole(row, 9)?,
                ..BudgetLimits::default()
            };
            (limits(row, 0)?, limits(row, 4)?, reserved)
        }
    };
    let default = defaults.of(scope);
    let max = BudgetLimits {
        cost_micro_usd: own.cost_micro_usd.or(default.cost),
        tokens: own.tokens.or(default.tokens),
        requests: own.requests.or(default.requests),
        seconds: own.seconds.or(default.seconds),
    };
    let (allowed_models, rate) = match &row {
        None => (Vec::new(), None),
        Some(row) => (
            row.try_get::<Option<Vec<String>>, _>(10)?.unwrap_or_default(),
            row.try_get::<Option<i32>, _>(11)?,
        ),
    };
    Ok(Budget {
        scope: scope.as_str().to_owned(),
        scope_id: if scope == Scope::Deployment { String::new() } else { id.to_string() },
        max: Some(max),
        own: Some(own),
        used: Some(used),
        reserved: Some(reserved),
        requests_per_minute: rate.map(unsigned),
        allowed_models,
    })
}

/// What is added up, and in which order: the newest day first, else by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GroupBy {
    Day,
    Agent,
    Model,
    Key,
    User,
    Session,
}

impl GroupBy {
    fn read(text: &str) -> Result<Self, RpcError> {
        Ok(match text {
            "day" => Self::Day,
            "agent" => Self::Agent,
            "model" => Self::Model,
            "key" => Self::Key,
            "user" => Self::User,
            "session" => Self::Session,
            _ => {
                return Err(RpcError::invalid(
                    "group_by must be day, agent, model, key, session or, for the operator, user",
                ));
            }
        })
    }

    /// A page of groups behind `$3`. The days of the table's rows are from `$4` to `$5`; `$6` is
    /// how many.
    const fn statement(self) -> &'static str {
        macro_rules! sums {
            ($group:literal, $behind:literal) => {
                concat!(
                    "select ",
                    $group,
                    " as of_group, sum(requests)::bigint, sum(unknown)::bigint, sum(unpriced)::bigint,
                            sum(input_tokens)::bigint, sum(output_tokens)::bigint, sum(cache_read_tokens)::bigint,
                            sum(cache_write_tokens)::bigint, sum(cost_micro_usd)::bigint
                     from usage_day
                     where ($1::uuid is null or user_id = $1) and ($2::uuid is null or agent_id = $2) and day between $4 and $5
                       and ($3::text is null or ",
                    $group,
                    $behind,
                    " limit $6"
                )
            };
        }
        match self {
            Self::Day => sums!("day::text", " < $3) group by of_group order by of_group desc"),
            Self::Agent => sums!("agent_id::text", " > $3) group by of_group order by of_group"),
            Self::Model => sums!("(provider || '/' || model) collate \"C\"", " > $3) group by of_group order by of_group"),
            Self::Key => sums!("key collate \"C\"", " > $3) group by of_group order by of_group"),
            Self::User => sums!("user_id::text", " > $3) group by of_group order by of_group"),
            // Newest first: ids ascend with time.
            Self::Session => {
                "select s.session_id::text, sum(requests)::bigint, sum(unknown)::bigint, sum(unpriced)::bigint,
                        sum(input_tokens)::bigint, sum(output_tokens)::bigint, sum(cache_read_tokens)::bigint,
                        sum(cache_write_tokens)::bigint, sum(cost_micro_usd)::bigint
                 from session s join turn_usage u using (session_id)
                 where ($1::uuid is null or s.user_id = $1) and ($2::uuid is null or s.agent_id = $2)
                   and ($3::uuid is null or s.session_id < $3) and s.created_at >= $4::date::timestamp at time zone 'utc'
                   and s.created_at < ($5::date + 1)::timestamp at time zone 'utc' and ($7::uuid is null or s.session_id = $7)
                 group by s.session_id order by s.session_id desc limit $6"
            }
        }
    }
}

/// Years before or after cannot be reckoned with.
const YEARS: RangeInclusive<i32> = 2000..=9998;

fn day(text: Option<&str>, otherwise: Date) -> Result<Date, RpcError> {
    let Some(text) = text else { return Ok(otherwise) };
    let day = Date::parse(text, format_description!("[year]-[month]-[day]"))
        .ok()
        .filter(|day| YEARS.contains(&day.year()));
    day.ok_or_else(|| RpcError::invalid("A day must be written as 2026-01-31"))
}

pub async fn usage(
    scheduler: Scheduler,
    request: ListUsageRequest,
) -> Result<ListUsageReply, RpcError> {
    let id = |text: &Option<String>, what: &str| {
        text.as_ref()
            .map(|text| {
                text.parse::<Uuid>()
                    .map_err(|_| RpcError::invalid(format!("{what} must be a UUID")))
            })
            .transpose()
    };
    let (user, agent) = (id(&request.user_id, "user_id")?, id(&request.agent_id, "agent_id")?);
    let session = id(&request.session_id, "session_id")?;
    let group_by = GroupBy::read(&request.group_by)?;
    if group_by == GroupBy::User && user.is_some()
        || session.is_some() && group_by != GroupBy::Session
    {
        return Err(RpcError::invalid("This cannot be grouped so"));
    }
    let to = day(request.to_day.as_deref(), OffsetDateTime::now_utc().date())?;
    let from = day(request.from_day.as_deref(), to - Duration::days(DAYS - 1))?;
    // One session is found whenever it was created.
    let (from, to) = if session.is_some() {
        (Date::from_calendar_date(2000, time::Month::January, 1).unwrap_or(from), to)
    } else {
        (from, to)
    };
    if session.is_none() && (to - from).whole_days() >= DAYS_MAX {
        return Err(RpcError::invalid(format!(
            "At most {DAYS_MAX} days may be asked for at a time"
        )));
    }
    let limit = request.limit.clamp(1, PAGE_MAX);
    let query = sqlx::query(group_by.statement()).bind(user).bind(agent);
    let query = match group_by {
        GroupBy::Session => query.bind(id(&request.after, "cursor")?),
        _ => query.bind(request.after.as_deref().map(without_nul)),
    };
    let query = query.bind(from).bind(to).bind(i64::from(limit) + 1);
    let query = if group_by == GroupBy::Session { query.bind(session) } else { query };
    let mut rows = query.fetch_all(&scheduler.pool).await?;
    let has_more = rows.len() > limit as usize;
    rows.truncate(limit as usize);
    let sum = |row: &PgRow| -> Result<UsageSum, RpcError> {
        let count = |index: usize| row.try_get::<i64, _>(index).map(i64::unsigned_abs);
        Ok(UsageSum {
            group: row.try_get(0)?,
            requests: count(1)?,
            unknown: count(2)?,
            unpriced: count(3)?,
            input_tokens: count(4)?,
            output_tokens: count(5)?,
            cache_read_tokens: count(6)?,
            cache_write_tokens: count(7)?,
            cost_micro_usd: count(8)?,
        })
    };
    Ok(ListUsageReply { sums: rows.iter().map(sum).collect::<Result<_, _>>()?, has_more })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_stays_changes_or_falls_back_to_the_default() {
        assert_eq!(limit(None).ok(), Some((false, None)));
        assert_eq!(limit(Some(LimitChange { max: None })).ok(), Some((true, None)));
        assert_eq!(limit(Some(LimitChange { max: Some(5) })).ok(), Some((true, Some(5))));
        assert!(limit(Some(LimitChange { max: Some(u64::MAX) })).is_err());
    }

    #[test]
    fn days_are_those_that_can_be_reckoned_with() {
        let today = OffsetDateTime::now_utc().date();
        assert_eq!(day(None, today).ok(), Some(today));
        for good in ["2026-01-31", "2000-01-01", "9998-12-31"] {
            assert_eq!(
                day(Some(good), today).map(|day| (day - Duration::days(DAYS)).year() >= 1999).ok(),
                Some(true),
                "{good}"
            );
        }
        for wrong in
            ["-9999-01-01", "0000-01-01", "1999-12-31", "9999-12-31", "2026-02-30", "2026-1-1", ""]
        {
            assert!(day(Some(wrong), today).is_err(), "{wrong}");
        }
    }

    #[test]
    fn models_are_bounded_and_none_means_every_one() {
        let models = |models: Vec<String>| allowed_models(&ModelsChange { models });
        assert_eq!(models(Vec::new()).ok(), Some(None));
        assert_eq!(models(vec!["gpt-*".to_owned()]).ok(), Some(Some(vec!["gpt-*".to_owned()])));
        assert!(models(vec![String::new()]).is_err() && models(vec!["m".to_owned(); 101]).is_err());
    }
}
