//! Settles model requests, each once, with what they used, and those of gateways that are gone as
//! unknown.

use bus::RpcError;
use contract::{
    common::Empty,
    scheduler::{EndModelRequestRequest, meter_entry},
    session::{ModelRequestEnded, Usage},
};
use rules::budget::charge;
use sqlx::{PgConnection, Row as _};
use types::SessionId;
use uuid::Uuid;

use crate::{
    Scheduler,
    db::idempotency,
    models::{
        entries,
        limits::{self, Change, Owners},
        requests::{COUNT_MAX, GATEWAY_LEASE, Named, insert},
        unlimited,
    },
    without_nul,
};

const LOST_AT_A_TIME: i64 = 100;
/// See [`counts`].
pub(super) const COUNTS: usize = 6;

pub async fn end(scheduler: Scheduler, request: EndModelRequestRequest) -> Result<Empty, RpcError> {
    let named = Named::read(request.begun.clone().unwrap_or_default())?;
    idempotency::retried(|| async {
        if scheduler.model_defaults.limit_nothing()
            && unlimited::end(&scheduler.pool, &[(&named, &request)]).await?.contains(&named.id)
        {
            return Ok(());
        }
        let mut tx = scheduler.pool.begin().await?;
        if settle(&mut tx, named.session, named.id, &request).await? {
            tx.commit().await?;
            return Ok(());
        }
        tx.rollback().await?;
        end_unknown(&scheduler, &named, &request).await
    })
    .await?;
    entries::hint(&scheduler, named.session).await;
    Ok(Empty {})
}

/// Settles a request whose beginning was not recorded. One that was settled before stays as it is.
async fn end_unknown(
    scheduler: &Scheduler,
    named: &Named,
    request: &EndModelRequestRequest,
) -> Result<(), RpcError> {
    let mut tx = scheduler.pool.begin().await?;
    let status: Option<String> =
        sqlx::query_scalar("select status from model_request where request_id = $1")
            .bind(named.id)
            .fetch_optional(&mut *tx)
            .await?;
    match status.as_deref() {
        None => {}
        // It began since it was looked for.
        Some("open") => {
            let failure = RpcError::conflict("The request began meanwhile");
            return Err(RpcError { rolled_back: true, ..failure });
        }
        Some(_) => return Ok(()),
    }
    if is_unsent(request) {
        insert_unsent(&mut tx, named).await?;
    } else if insert_late(&mut tx, named).await? {
        settle(&mut tx, named.session, named.id, request).await?;
    }
    tx.commit().await?;
    Ok(())
}

/// The provider did not get it: its client was gone, or the gateway was refused an answer.
fn is_unsent(request: &EndModelRequestRequest) -> bool {
    request.status == 0 && !request.is_partial && request.usage.is_none()
}

/// A request that ended before its beginning came, if that comes at all: it is to reserve nothing
/// then. No total counts it.
async fn insert_unsent(tx: &mut PgConnection, named: &Named) -> Result<(), RpcError> {
    if insert_late(tx, named).await? {
        sqlx::query("update model_request set status = 'settled', ended_at = now(), is_summed = true where request_id = $1")
            .bind(named.id)
            .execute(tx)
            .await?;
    }
    Ok(())
}

/// A request whose beginning was not recorded: the gateway sent it while this service was away, for
/// nothing limits the session.
async fn insert_late(tx: &mut PgConnection, named: &Named) -> Result<bool, RpcError> {
    let row =
        sqlx::query("select user_id, agent_id, turn_count from session where session_id = $1")
            .bind(named.session.uuid())
            .fetch_optional(&mut *tx)
            .await?;
    let Some(row) = row else { return Ok(false) };
    let owners =
        Owners { session: named.session.uuid(), user: row.try_get(0)?, agent: row.try_get(1)? };
    insert(tx, named, &owners, row.try_get(2)?, false).await?;
    Ok(true)
}

/// What a request used, if that is known. A response that says nothing of usage used nothing where
/// it is a refusal.
pub(super) fn known_usage(request: &EndModelRequestRequest) -> Option<Usage> {
    let is_known = request.usage.is_some() || request.status >= 400 || is_unsent(request);
    is_known.then(|| request.usage.clone().unwrap_or_else(nothing))
}

pub(super) fn is_unpriced(usage: Option<&Usage>) -> i64 {
    i64::from(usage.is_some_and(|usage| usage.cost_micro_usd.is_none()))
}

/// A request's end as its session's log shows it.
pub(super) fn ended(
    id: Uuid,
    (provider, model): (&str, &str),
    request: &EndModelRequestRequest,
    usage: Option<&Usage>,
) -> ModelRequestEnded {
    ModelRequestEnded {
        request_id: id.to_string(),
        started: 0,
        provider: provider.to_owned(),
        model: model.to_owned(),
        status: request.status,
        usage: usage.cloned(),
        is_partial: request.is_partial,
        duration_ms: request.duration_ms,
        error: without_nul(&request.error),
        error_kind: request.error_kind.clone(),
    }
}

/// Settles a request, once; one that was unknown may be settled later. Returns whether there was
/// one to settle.
async fn settle(
    tx: &mut PgConnection,
    session: SessionId,
    id: Uuid,
    request: &EndModelRequestRequest,
) -> Result<bool, RpcError> {
    // None: the session was deleted, and nothing is kept of it but what counts for others.
    let number: Option<i64> = sqlx::query_scalar(
        "insert into model_meter as m (session_id, number) select session_id, 1 from session where session_id = $1
         on conflict (session_id) do update set number = m.number + 1 returning number",
    )
    .bind(session.uuid())
    .fetch_optional(&mut *tx)
    .await?;
    let usage = known_usage(request);
    let is_known = usage.is_some();
    let query = sqlx::query(
        "with old as (
             select * from model_request where request_id = $1 and (status = 'open' or (status = 'unknown' and $2 and not is_summed))
             for update
         )
         update model_request r
         set status = case when $2 then 'settled' else 'unknown' end, ended_at = now(), http_status = $3, is_partial = $4,
             input_tokens = $5, output_tokens = $6, cache_read_tokens = $7, cache_write_tokens = $8, reasoning_tokens = $9,
             cost_micro_usd = $10
         from old where r.request_id = old.request_id
         returning old.status = 'unknown', r.user_id, r.agent_id, r.turn_number, r.provider, r.model, r.is_budgeted, r.held_tokens,
                   r.held_cost_micro_usd",
    )
    .bind(id)
    .bind(is_known)
    .bind(i32::try_from(request.status).unwrap_or_default())
    .bind(request.is_partial);
    let query = counts(usage.as_ref()).into_iter().fold(query, |query, count| query.bind(count));
    let row = query.fetch_optional(&mut *tx).await?;
    let Some(row) = row else { return Ok(false) };
    let was_unknown: bool = row.try_get(0)?;
    let owners = Owners { session: session.uuid(), user: row.try_get(1)?, agent: row.try_get(2)? };
    let (turn, provider, model): (i32, String, String) =
        (row.try_get(3)?, row.try_get(4)?, row.try_get(5)?);
    let (is_budgeted, held_tokens, held_cost): (bool, i64, i64) =
        (row.try_get(6)?, row.try_get(7)?, row.try_get(8)?);
    if let Some(number) = number {
        let used =
            Used { owners, turn, number, provider, model, was_unknown, usage: usage.as_ref() };
        show(tx, used, id, request).await?;
    }
    let sum = |usage: &Usage| {
        usage
            .input_tokens
            .unwrap_or_default()
            .saturating_add(usage.output_tokens.unwrap_or_default())
    };
    let (tokens, cost) =
        (usage.as_ref().map(sum), usage.as_ref().and_then(|usage| usage.cost_micro_usd));
    let is_whole = is_known && !request.is_partial;
    let (held_tokens, held_cost) = (held_tokens.unsigned_abs(), held_cost.unsigned_abs());
    // A gateway that saw more generated than was reserved says so.
    let least = request
        .begun
        .as_ref()
        .map(|begun| (begun.estimated_tokens, begun.estimated_cost_micro_usd.unwrap_or_default()));
    let (least_tokens, least_cost) = least.unwrap_or_default();
    let used_tokens = charge(held_tokens.max(least_tokens), tokens, is_whole);
    let used_cost = charge(held_cost.max(least_cost), cost, is_whole);
    let change = match was_unknown {
        // Its reservation was counted when it became unknown.
        true => Change {
            used_tokens: used_tokens.saturating_sub(held_tokens),
            used_cost: used_cost.saturating_sub(held_cost),
            ..Change::default()
        },
        false => Change {
            used_tokens,
            used_cost,
            held_tokens: -held_tokens.cast_signed(),
            held_cost: -held_cost.cast_signed(),
            // One that began before there was a budget is counted by the one that was set
            // meanwhile.
            used_requests: u64::from(!is_budgeted),
            ..Change::default()
        },
    };
    limits::apply(tx, &owners, change, &[]).await?;
    Ok(true)
}

/// What a request used, in the order of the columns: input, output, cache read, cache write and
/// reasoning tokens, and the cost.
pub(super) fn counts(usage: Option<&Usage>) -> [Option<i64>; COUNTS] {
    let Some(usage) = usage else { return [None; COUNTS] };
    let Usage {
        input_tokens,
        output_tokens,
        cache_read_tokens,
        cache_write_tokens,
        reasoning_tokens,
        cost_micro_usd,
        ..
    } = *usage;
    [
        input_tokens,
        output_tokens,
        cache_read_tokens,
        cache_write_tokens,
        reasoning_tokens,
        cost_micro_usd,
    ]
    .map(|count| count.map(|count| count.min(COUNT_MAX).cast_signed()))
}

/// A request that was settled, for its turn's usage and its session's log.
struct Used<'a> {
    owners: Owners,
    turn: i32,
    number: i64,
    provider: String,
    model: String,
    was_unknown: bool,
    usage: Option<&'a Usage>,
}

async fn show(
    tx: &mut PgConnection,
    used: Used<'_>,
    id: Uuid,
    request: &EndModelRequestRequest,
) -> Result<(), RpcError> {
    let Used { owners, turn, number, provider, model, was_unknown, usage } = used;
    let ended = ended(id, (&provider, &model), request, usage);
    let failure = (!ended.error.is_empty()).then_some(ended.error.as_str());
    let query = sqlx::query(concat!(
        "with failed as (update model_meter set failed_turn = $13, failure = $14 where session_id = $1)
         insert into turn_usage as u (session_id, turn_number, requests, unknown, unpriced, input_tokens, output_tokens,
                                      cache_read_tokens, cache_write_tokens, reasoning_tokens, cost_micro_usd, model)
         values ($1, $2, case when $3 then 0 else 1 end, case when $4 then 1 when $3 then -1 else 0 end, $5, $6, $7, $8, $9, $10, $11, $12)
         ",
        add_up!(),
    ))
    .bind(owners.session)
    .bind(turn)
    .bind(was_unknown)
    .bind(usage.is_none())
    .bind(is_unpriced(usage));
    let query =
        counts(usage).into_iter().fold(query, |query, count| query.bind(count.unwrap_or_default()));
    let query = query.bind(&model).bind(failure.is_some().then_some(turn)).bind(failure);
    query.execute(&mut *tx).await?;
    if !was_unknown {
        entries::add(tx, owners.session, number, meter_entry::Kind::Ended(ended)).await?;
    }
    Ok(())
}

fn nothing() -> Usage {
    let none = Some(0);
    Usage {
        input_tokens: none,
        output_tokens: none,
        cost_micro_usd: none,
        cache_read_tokens: none,
        cache_write_tokens: none,
        reasoning_tokens: none,
        model: None,
    }
}

/// Whether there are requests of gateways that are gone.
pub fn lost() -> String {
    format!(
        "exists (select from model_request r left join model_gateway g using (gateway_id)
                 where r.status = 'open' and (g.gateway_id is null or g.expires_at < now())
                   and r.started_at < now() - make_interval(secs => {}))",
        GATEWAY_LEASE.as_secs_f64()
    )
}

/// Settles the requests of gateways that are gone: what they used is not known.
pub async fn settle_lost(scheduler: &Scheduler) -> Result<(), RpcError> {
    let rows: Vec<(Uuid, Uuid)> = sqlx::query_as(
        "select r.request_id, r.session_id
         from model_request r left join model_gateway g using (gateway_id)
         where r.status = 'open' and (g.gateway_id is null or g.expires_at < now()) and r.started_at < now() - make_interval(secs => $1)
         limit $2",
    )
    .bind(GATEWAY_LEASE.as_secs_f64())
    .bind(LOST_AT_A_TIME)
    .fetch_all(&scheduler.pool)
    .await?;
    // One that cannot be settled does not hold up others.
    let mut outcome = Ok(());
    for (id, session) in rows {
        outcome = settle_one_lost(scheduler, id, SessionId::from_uuid(session)).await.and(outcome);
    }
    outcome
}

async fn settle_one_lost(
    scheduler: &Scheduler,
    id: Uuid,
    session: SessionId,
) -> Result<(), RpcError> {
    let error = "The model gateway that sent it is gone".to_owned();
    let lost =
        EndModelRequestRequest { is_partial: true, error, ..EndModelRequestRequest::default() };
    let mut tx = scheduler.pool.begin().await?;
    settle(&mut tx, session, id, &lost).await?;
    tx.commit().await?;
    metrics::counter!("aod_model_requests_lost_total").increment(1);
    tracing::warn!(%session, request = %id, "the gateway of a model request was lost; its usage is unknown");
    entries::hint(scheduler, session).await;
    Ok(())
}
