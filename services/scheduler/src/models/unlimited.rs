//! Begins and settles requests of sessions that nothing limits: any number in one statement, for
//! agents wait for it.
//!
//! A statement leaves out, unchanged, each request that it cannot answer for: of sessions that have
//! a limit, of those whose meter was written since the statement's snapshot (what creates a
//! session's budget writes it), and what is not as it should be. Those are for [`super::admission`]
//! and [`super::settlement`], one by one. Meters are locked in the order of their sessions.
//!
//! `offset 0` and subqueries that yield a value have each row found by its key: Postgres plans a
//! statement once, maybe while its tables are so small that reading all of them is faster.

use std::collections::{BTreeSet, HashSet};

use bus::RpcError;
use contract::{
    scheduler::{
        EndModelRequestRequest, RecordModelRequestsReply, RecordModelRequestsRequest, meter_entry,
    },
    session::{ModelRequestEnded, ModelRequestStarted},
};
use sqlx::PgPool;
use types::{SessionId, SessionStatus};
use uuid::Uuid;

use crate::{
    Scheduler,
    models::{
        entries,
        requests::{Named, not_inserted},
        settlement::{COUNTS, counts, ended, is_unpriced, known_usage},
    },
};

/// No budget and no policy applies to a session `s`, of the agent and user of `$row`.
macro_rules! is_unlimited {
    ($row:literal, $deployment:literal) => {
        concat!(
            "not exists (
                 select from (values ('session', s.session_id), ('agent', ", $row, ".agent_id), ('user', ", $row, ".user_id),
                                     ('deployment', ", $deployment, "::uuid)) as o (scope, scope_id)
                 where (select true from model_limit l where l.scope = o.scope and l.scope_id = o.scope_id))"
        )
    };
}

/// The meter of a session whose row of this statement's snapshot is still the newest.
macro_rules! is_unchanged {
    () => {
        "m.xmin = (select xmin from model_meter known where known.session_id = excluded.session_id)"
    };
}

/// The number of a request's entry: after those that its session has in this statement's snapshot,
/// which are all of them where [`is_unchanged`] holds.
macro_rules! number {
    ($row:literal) => {
        concat!(
            "coalesce((select number from model_meter known where known.session_id = ",
            $row,
            ".session_id), 0)
                 + row_number() over (partition by ",
            $row,
            ".session_id order by place)"
        )
    };
}

/// The meter of a row's session counts the row. `is true` keeps Postgres from a join, whose cost
/// grows with the square of the requests: it cannot know how many there are. Like this, it looks
/// each up in a hash table.
macro_rules! is_counted {
    ($row:literal) => {
        concat!("(", $row, ".session_id in (select session_id from meter)) is true")
    };
}

pub async fn record(
    scheduler: Scheduler,
    request: RecordModelRequestsRequest,
) -> Result<RecordModelRequestsReply, RpcError> {
    if !scheduler.model_defaults.limit_nothing() {
        return Ok(RecordModelRequestsReply::default());
    }
    let mut begins = request.begins.into_iter().map(Named::read).collect::<Result<Vec<_>, _>>()?;
    let named = |end: &EndModelRequestRequest| Named::read(end.begun.clone().unwrap_or_default());
    let ends = request.ends.iter().map(named).collect::<Result<Vec<_>, _>>()?;
    let mut ends: Vec<_> = ends.iter().zip(&request.ends).collect();
    // A statement would count one that is named twice as two.
    let mut named_before = HashSet::new();
    begins.retain(|named| named_before.insert(named.id));
    named_before.clear();
    ends.retain(|(named, _)| named_before.insert(named.id));
    // An agent sends its next request when the one before has ended.
    let ended = end(&scheduler.pool, &ends).await?;
    let begun = begin(&scheduler.pool, &begins).await?;
    metrics::counter!("aod_model_admissions_total", "outcome" => "admitted")
        .increment(begun.len() as u64);
    let recorded = |named: &Named| begun.contains(&named.id) || ended.contains(&named.id);
    let all = begins.iter().chain(ends.iter().map(|(named, _)| *named));
    let sessions: BTreeSet<SessionId> =
        all.filter(|named| recorded(named)).map(|named| named.session).collect();
    for session in sessions {
        entries::hint(&scheduler, session).await;
    }
    let texts = |ids: HashSet<Uuid>| ids.iter().map(Uuid::to_string).collect();
    Ok(RecordModelRequestsReply { begun: texts(begun), ended: texts(ended) })
}

/// Returns which of the requests were begun.
pub(super) async fn begin(pool: &PgPool, requests: &[Named]) -> Result<HashSet<Uuid>, RpcError> {
    if requests.is_empty() {
        return Ok(HashSet::new());
    }
    let started = |named: &Named| {
        entries::payload(meter_entry::Kind::Started(ModelRequestStarted {
            request_id: named.id.to_string(),
            provider: named.provider.clone(),
            model: named.model.clone(),
        }))
    };
    let texts = |text: fn(&Named) -> &str| requests.iter().map(text).collect::<Vec<_>>();
    let begun: Vec<Uuid> = sqlx::query_scalar(concat!(
        "with asked as (
             select * from unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::text[], $5::text[], $6::text[], $7::bytea[]) with ordinality
                 as asked (request_id, session_id, gateway_id, provider, model, key, payload, place)
         ), free as (
             select a.*, s.user_id, s.agent_id, s.turn_count, ", number!("a"), " as number
             from asked a
             cross join lateral (select * from session s where s.session_id = a.session_id offset 0) s
             where s.status <> $8
               and (select true from model_request r where r.request_id = a.request_id) is null
               and ", is_unlimited!("s", "$9"), "
         ), asking as (
             select session_id, count(*) as requests from free group by session_id
         ), meter as (
             insert into model_meter as m (session_id, number, minute_requests, counted_us)
             select session_id, requests, requests, (
                        select coalesce(sum(extract(epoch from coalesce(t.ended_at, now()) - t.started_at) * 1000000), 0)::bigint
                        from turn t where t.session_id = asking.session_id)
             from asking order by session_id
             on conflict (session_id) do update
             set number = m.number + excluded.number,
                 minute_began_at = case when m.minute_began_at < now() - interval '1 minute' then now() else m.minute_began_at end,
                 minute_requests = case when m.minute_began_at < now() - interval '1 minute' then 0 else m.minute_requests end
                     + excluded.minute_requests,
                 counted_us = greatest(m.counted_us, excluded.counted_us)
             where ", is_unchanged!(), "
             returning session_id
         ), request as (
             insert into model_request (request_id, session_id, user_id, agent_id, turn_number, gateway_id, provider, model, key, status)
             select request_id, session_id, user_id, agent_id, turn_count, gateway_id, provider, model, key, 'open'
             from free where ", is_counted!("free"), "
             returning request_id
         ), entry as (
             insert into model_entry (session_id, number, payload)
             select session_id, number, payload from free where ", is_counted!("free"), "
         )
         select request_id from request",
    ))
    .bind(requests.iter().map(|named| named.id).collect::<Vec<_>>())
    .bind(requests.iter().map(|named| named.session.uuid()).collect::<Vec<_>>())
    .bind(requests.iter().map(|named| named.gateway).collect::<Vec<_>>())
    .bind(texts(|named| &named.provider))
    .bind(texts(|named| &named.model))
    .bind(texts(|named| &named.key))
    .bind(requests.iter().map(started).collect::<Vec<_>>())
    .bind(SessionStatus::Terminated.as_str())
    .bind(Uuid::nil())
    .fetch_all(pool)
    .await
    .map_err(not_inserted)?;
    Ok(begun.into_iter().collect())
}

/// Returns which of the requests were settled: those that were open.
pub(super) async fn end(
    pool: &PgPool,
    requests: &[(&Named, &EndModelRequestRequest)],
) -> Result<HashSet<Uuid>, RpcError> {
    if requests.is_empty() {
        return Ok(HashSet::new());
    }
    let usages: Vec<_> = requests.iter().map(|(_, end)| known_usage(end)).collect();
    let shown: Vec<_> = requests
        .iter()
        .zip(&usages)
        .map(|((named, end), usage)| {
            ended(named.id, (&named.provider, &named.model), end, usage.as_ref())
        })
        .collect();
    let failure =
        |ended: &ModelRequestEnded| Some(ended.error.clone()).filter(|error| !error.is_empty());
    let failures: Vec<_> = shown.iter().map(failure).collect();
    let payload = |ended| entries::payload(meter_entry::Kind::Ended(ended));
    let statuses: Vec<_> =
        requests.iter().map(|(_, end)| i32::try_from(end.status).unwrap_or_default()).collect();
    let query = sqlx::query_scalar(concat!(
        "with told as (
             select * from unnest($1::uuid[], $2::uuid[], $4::text[], $5::bool[], $6::int[], $7::bool[], $8::bigint[], $9::text[],
                                  $10::bytea[], $11::bigint[], $12::bigint[], $13::bigint[], $14::bigint[], $15::bigint[], $16::bigint[])
                 with ordinality
                 as told (request_id, session_id, failure, is_known, http_status, is_partial, unpriced, model, payload, input_tokens,
                          output_tokens, cache_read_tokens, cache_write_tokens, reasoning_tokens, cost_micro_usd, place)
         ), open as (
             select told.*, r.turn_number, ", number!("told"), " as number
             from told
             cross join lateral (select * from model_request r where r.request_id = told.request_id offset 0) r
             cross join lateral (select session_id from session s where s.session_id = told.session_id offset 0) s
             where r.session_id = told.session_id and r.status = 'open' and not r.is_budgeted
               and ", is_unlimited!("r", "$3"), "
         ), ending as (
             select session_id, count(*) as requests, max(turn_number) as turn_number,
                    (array_agg(failure order by place desc))[1] as failure
             from open group by session_id
         ), meter as (
             insert into model_meter as m (session_id, number, failed_turn, failure)
             select session_id, requests, case when failure is not null then turn_number end, failure from ending order by session_id
             on conflict (session_id) do update
             set number = m.number + excluded.number, failed_turn = excluded.failed_turn, failure = excluded.failure
             where ", is_unchanged!(), "
             returning session_id
         ), request as (
             update model_request r
             set status = case when is_known then 'settled' else 'unknown' end, ended_at = now(), http_status = open.http_status,
                 is_partial = open.is_partial, input_tokens = open.input_tokens, output_tokens = open.output_tokens,
                 cache_read_tokens = open.cache_read_tokens, cache_write_tokens = open.cache_write_tokens,
                 reasoning_tokens = open.reasoning_tokens, cost_micro_usd = open.cost_micro_usd
             from open where ", is_counted!("open"), " and r.request_id = open.request_id
             returning r.request_id
         ), used as (
             insert into turn_usage as u (session_id, turn_number, requests, unknown, unpriced, input_tokens, output_tokens,
                                          cache_read_tokens, cache_write_tokens, reasoning_tokens, cost_micro_usd, model)
             select session_id, turn_number, count(*), count(*) filter (where not is_known), sum(unpriced),
                    coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0), coalesce(sum(cache_read_tokens), 0),
                    coalesce(sum(cache_write_tokens), 0), coalesce(sum(reasoning_tokens), 0), coalesce(sum(cost_micro_usd), 0),
                    (array_agg(model order by place desc))[1]
             from open where ", is_counted!("open"), " group by session_id, turn_number
             ", add_up!(), "
         ), entry as (
             insert into model_entry (session_id, number, payload)
             select session_id, number, payload from open where ", is_counted!("open"), "
         )
         select request_id from request",
    ))
    .bind(requests.iter().map(|(named, _)| named.id).collect::<Vec<_>>())
    .bind(requests.iter().map(|(named, _)| named.session.uuid()).collect::<Vec<_>>())
    .bind(Uuid::nil())
    .bind(failures)
    .bind(usages.iter().map(Option::is_some).collect::<Vec<_>>())
    .bind(statuses)
    .bind(requests.iter().map(|(_, end)| end.is_partial).collect::<Vec<_>>())
    .bind(usages.iter().map(|usage| is_unpriced(usage.as_ref())).collect::<Vec<_>>())
    .bind(requests.iter().map(|(named, _)| &*named.model).collect::<Vec<_>>())
    .bind(shown.into_iter().map(payload).collect::<Vec<_>>());
    let rows: Vec<_> = usages.iter().map(|usage| counts(usage.as_ref())).collect();
    let columns = (0..COUNTS).map(|column| rows.iter().map(|row| row[column]).collect::<Vec<_>>());
    let settled: Vec<Uuid> =
        columns.fold(query, |query, column| query.bind(column)).fetch_all(pool).await?;
    Ok(settled.into_iter().collect())
}
