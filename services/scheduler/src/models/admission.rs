//! Admits model requests: checks policies and budgets, and reserves what a request may use, before
//! it is sent.

use bus::RpcError;
use contract::{
    scheduler::{
        BeginModelRequestReply, BeginModelRequestRequest, ModelRequestAdmitted,
        ModelRequestRefused, ModelRequestWaits, begin_model_request_reply::Verdict, meter_entry,
    },
    session::{BudgetNotice, ModelRequestStarted},
};
use prost::Message as _;
use rules::budget::{self, Notice};
use sqlx::{PgConnection, Row as _};
use types::SessionStatus;
use uuid::Uuid;

use crate::{
    Scheduler,
    db::idempotency,
    models::{
        entries,
        limits::{self, Change, Owners, Ran, Scope},
        requests::{Named, insert},
        unlimited,
    },
    unsigned,
};

fn admitted(is_unlimited: bool) -> Verdict {
    Verdict::Admitted(ModelRequestAdmitted { is_unlimited })
}

fn refused(reason: &str, message: impl Into<String>) -> Verdict {
    Verdict::Refused(ModelRequestRefused {
        reason: reason.to_owned(),
        message: message.into(),
        retry_after_seconds: 0,
    })
}

pub async fn begin(
    scheduler: Scheduler,
    request: BeginModelRequestRequest,
) -> Result<BeginModelRequestReply, RpcError> {
    let named = Named::read(request)?;
    let (verdict, has_entries) = idempotency::retried(|| begin_once(&scheduler, &named)).await?;
    if has_entries {
        entries::hint(&scheduler, named.session).await;
    }
    let outcome = match &verdict {
        Verdict::Admitted(_) => "admitted",
        Verdict::Waits(_) => "waits",
        Verdict::Refused(refused) => match refused.reason.as_str() {
            "budget" => "budget",
            "rate" => "rate",
            _ => "refused",
        },
    };
    metrics::counter!("aod_model_admissions_total", "outcome" => outcome).increment(1);
    Ok(BeginModelRequestReply { verdict: Some(verdict) })
}

/// Tells too whether the session's log has something to show.
async fn begin_once(scheduler: &Scheduler, named: &Named) -> Result<(Verdict, bool), RpcError> {
    if scheduler.model_defaults.limit_nothing()
        && !unlimited::begin(&scheduler.pool, std::slice::from_ref(named)).await?.is_empty()
    {
        return Ok((admitted(true), true));
    }
    let mut tx = scheduler.pool.begin().await?;
    let row = sqlx::query(
        "select user_id, agent_id, turn_count, status, exists (select from model_request where request_id = $2) from session
         where session_id = $1",
    )
    .bind(named.session.uuid())
    .bind(named.id)
    .fetch_optional(&mut *tx)
    .await?;
    let Some(row) = row else { return Ok((refused("session", "The session was deleted"), false)) };
    let owners =
        Owners { session: named.session.uuid(), user: row.try_get(0)?, agent: row.try_get(1)? };
    let (turn, status): (i32, &str) = (row.try_get(2)?, row.try_get(3)?);
    if status == SessionStatus::Terminated.as_str() {
        return Ok((refused("session", "The session was terminated"), false));
    }
    let defaults = &scheduler.model_defaults;
    let policies = limits::policies(&mut tx, &owners, defaults).await?;
    if row.try_get(4)? {
        return Ok((admitted(policies.is_unlimited()), false));
    }
    if !policies.allow(&named.model) {
        return Ok((
            refused("model", format!("The model {} is not allowed for this session", named.model)),
            false,
        ));
    }
    let meter = sqlx::query(
        "insert into model_meter as m (session_id, number, minute_requests) values ($1, 1, 1)
         on conflict (session_id) do update
         set number = m.number + 1,
             minute_began_at = case when m.minute_began_at < now() - interval '1 minute' then now() else m.minute_began_at end,
             minute_requests = case when m.minute_began_at < now() - interval '1 minute' then 1 else m.minute_requests + 1 end
         returning number, minute_requests, extract(epoch from minute_began_at + interval '1 minute' - now())::float8, has_overdrawn,
                   reached_turn, counted_us",
    )
    .bind(owners.session)
    .fetch_one(&mut *tx)
    .await?;
    let (number, in_minute, left): (i64, i32, f64) =
        (meter.try_get(0)?, meter.try_get(1)?, meter.try_get(2)?);
    if policies.requests_per_minute > 0 && unsigned(in_minute) > policies.requests_per_minute {
        let message = format!(
            "The session may send {} model requests per minute",
            policies.requests_per_minute
        );
        let retry_after_seconds = left.ceil().clamp(1.0, 60.0) as u32;
        return Ok((
            Verdict::Refused(ModelRequestRefused {
                reason: "rate".to_owned(),
                message,
                retry_after_seconds,
            }),
            false,
        ));
    }
    let mut next = number;
    if policies.has_budget {
        let (has_overdrawn, reached, counted): (bool, Option<i32>, i64) =
            (meter.try_get(3)?, meter.try_get(4)?, meter.try_get(5)?);
        // How long its turns ran is counted when a model is asked.
        let (ran_us, ran) = ran(&mut tx, owners.session, turn, counted).await?;
        let taken = limits::lock(&mut tx, &owners, defaults).await?;
        let scopes: Vec<Scope> = taken.iter().map(|(scope, _)| *scope).collect();
        let with_time = |(scope, account): (Scope, budget::Account)| budget::Account {
            used_us: account.used_us.saturating_add(ran.of(scope)),
            ..account
        };
        let accounts: Vec<budget::Account> = taken.into_iter().map(with_time).collect();
        let time = Change { ran, ..Change::default() };
        match budget::admit(&accounts, named.estimate, has_overdrawn) {
            budget::Verdict::Admitted { warnings, overdraws } => {
                let hold = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
                let change = Change {
                    used_requests: 1,
                    held_cost: hold(named.estimate.cost.unwrap_or_default()),
                    held_tokens: hold(named.estimate.tokens),
                    ..time
                };
                let warned: Vec<Scope> = warnings
                    .iter()
                    .filter_map(|warning| scopes.get(warning.account).copied())
                    .collect();
                for warning in &warnings {
                    entries::add(
                        &mut tx,
                        owners.session,
                        next,
                        meter_entry::Kind::Notice(notice(warning, &scopes, false)),
                    )
                    .await?;
                    metrics::counter!("aod_budget_warnings_total").increment(1);
                    next += 1;
                }
                settle_meter(
                    &mut tx,
                    &owners,
                    Meter { number: next, counted: ran_us, overdraws, reached: None },
                )
                .await?;
                limits::apply(&mut tx, &owners, change, &warned).await?;
            }
            budget::Verdict::Reached(reached_limit) => {
                let reached_notice = notice(&reached_limit, &scopes, true);
                let message = budget::message(&reached_notice);
                let is_new = reached != Some(turn);
                if is_new {
                    entries::add(
                        &mut tx,
                        owners.session,
                        number,
                        meter_entry::Kind::Notice(reached_notice.clone()),
                    )
                    .await?;
                    metrics::counter!("aod_budgets_reached_total", "scope" => scopes.get(reached_limit.account).map_or("", |s| s.as_str()))
                        .increment(1);
                }
                let meter = Meter {
                    number,
                    counted: ran_us,
                    overdraws: has_overdrawn,
                    reached: Some((turn, reached_notice)),
                };
                settle_meter(&mut tx, &owners, meter).await?;
                limits::apply(&mut tx, &owners, time, &[]).await?;
                tx.commit().await?;
                return Ok((refused("budget", message), is_new));
            }
            budget::Verdict::Unpriced => {
                let message = format!(
                    "The model {} has no price, and a budget of money applies to the session",
                    named.model
                );
                return Ok((refused("price", message), false));
            }
            budget::Verdict::Waits => return Ok((Verdict::Waits(ModelRequestWaits {}), false)),
        }
    } else {
        count_time(&mut tx, owners.session).await?;
    }
    insert(&mut tx, named, &owners, turn, policies.has_budget).await?;
    let started = ModelRequestStarted {
        request_id: named.id.to_string(),
        provider: named.provider.clone(),
        model: named.model.clone(),
    };
    entries::add(&mut tx, owners.session, next, meter_entry::Kind::Started(started)).await?;
    tx.commit().await?;
    Ok((admitted(policies.is_unlimited()), true))
}

/// How long the turns of a session ran so far, in microseconds, and what of that is new. Budgets
/// that it shares with others do not count turns from before any of its time was counted: an
/// earlier release counted none without a budget.
async fn ran(
    tx: &mut PgConnection,
    session: Uuid,
    turn: i32,
    counted: i64,
) -> Result<(i64, Ran), RpcError> {
    let row = sqlx::query(
        "with ran as (
             select turn_number, extract(epoch from coalesce(ended_at, now()) - started_at) * 1000000 as us
             from turn where session_id = $1 and started_at is not null
         )
         select coalesce(sum(us), 0)::bigint, coalesce(sum(us) filter (where turn_number = $2), 0)::bigint from ran",
    )
    .bind(session)
    .bind(turn)
    .fetch_one(tx)
    .await?;
    let (total, of_turn): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    let own = total.saturating_sub(counted).max(0).unsigned_abs();
    let shared = if counted == 0 { of_turn.max(0).unsigned_abs() } else { own };
    Ok((total, Ran { own, shared }))
}

/// Counts how long a session's turns ran that has no budget: one that is set later for others too
/// is not to count it.
async fn count_time(tx: &mut PgConnection, session: Uuid) -> Result<(), RpcError> {
    sqlx::query(
        "update model_meter
         set counted_us = greatest(counted_us, (
             select coalesce(sum(extract(epoch from coalesce(ended_at, now()) - started_at) * 1000000), 0)::bigint
             from turn where session_id = $1))
         where session_id = $1",
    )
    .bind(session)
    .execute(tx)
    .await?;
    Ok(())
}

struct Meter {
    number: i64,
    counted: i64,
    overdraws: bool,
    reached: Option<(i32, BudgetNotice)>,
}

async fn settle_meter(
    tx: &mut PgConnection,
    owners: &Owners,
    meter: Meter,
) -> Result<(), RpcError> {
    let (turn, reached) =
        meter.reached.map(|(turn, notice)| (turn, notice.encode_to_vec())).unzip();
    sqlx::query(
        "update model_meter set number = $2, counted_us = greatest(counted_us, $3), has_overdrawn = $4, reached_turn = $5, reached = $6
         where session_id = $1",
    )
    .bind(owners.session)
    .bind(meter.number)
    .bind(meter.counted)
    .bind(meter.overdraws)
    .bind(turn)
    .bind(reached)
    .execute(tx)
    .await?;
    Ok(())
}

fn notice(notice: &Notice, scopes: &[Scope], is_reached: bool) -> BudgetNotice {
    BudgetNotice {
        is_reached,
        scope: scopes.get(notice.account).map_or("", |scope| scope.as_str()).to_owned(),
        limit: notice.limit.to_owned(),
        used: notice.used,
        max: notice.max,
    }
}
