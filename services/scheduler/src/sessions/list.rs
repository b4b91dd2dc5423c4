//! The list of a user's sessions.

use std::collections::HashMap;

use bus::RpcError;
use contract::scheduler::{ListRequest, ListSessionsReply, Session};
use types::{AgentId, EnvironmentId, SessionId, UserId, file::FileKind};
use uuid::Uuid;

use super::row::{SessionRow, session_columns};
use crate::{
    Scheduler,
    catalog::{agents, files},
    db::page::{Filters, List, PageStart},
    sessions::usage,
};

/// How much of a prompt a list of sessions shows.
const LISTED_PROMPT_CHARS: i32 = 200;

pub async fn list(
    scheduler: Scheduler,
    request: ListRequest,
) -> Result<ListSessionsReply, RpcError> {
    let user: UserId =
        request.user_id.parse().map_err(|_| RpcError::not_found("User not found"))?;
    let start = PageStart::by_time(request.limit, request.after.as_ref())?;
    let agent = request
        .agent_id
        .as_deref()
        .map(str::parse::<AgentId>)
        .transpose()
        .map_err(|_| RpcError::invalid("agent_id must be an id"))?;
    let environment =
        request.environment_id.as_deref().map(str::parse::<EnvironmentId>).transpose();
    let environment = environment.map_err(|_| RpcError::invalid("environment_id must be an id"))?;
    let filters = Filters::of(&request)?;
    // The original API knows no archived sessions.
    let not_archived = if request.is_v1 { "archived_at is null" } else { "true" };
    // A filter that is not asked for is not in the statement: a plan that is kept would have to
    // suit it.
    let filter =
        |asked: bool, with: &'static str, without: &'static str| if asked { with } else { without };
    let (from, order) = match (request.ascending, request.after.is_some()) {
        (false, _) => ("(created_at, session_id) < ($3, $4)", "created_at desc, session_id desc"),
        (true, true) => ("(created_at, session_id) > ($3, $4)", "created_at, session_id"),
        (true, false) => ("($3::timestamptz, $4::uuid) is not null", "created_at, session_id"),
    };
    let conditions = format!(
        "user_id = $1 and {from} and {} and {} and {} and {} and {}",
        filter(request.status.is_some(), "status = $5", "$5::text is null"),
        filter(agent.is_some(), "agent_id = $6", "$6::uuid is null"),
        filter(environment.is_some(), "environment_id = $7", "$7::uuid is null"),
        filters.conditions(not_archived, 8),
        filter(
            request.agent_version.is_some(),
            "$10 = (select coalesce(v.base_version, v.version) from agent_version v
                    where v.agent_id = session.agent_id and v.version = session.agent_version)",
            "$10::integer is null"
        ),
    );
    let page_of = |class: &str| {
        format!(
            "select session_id, created_at from session where {conditions} and {class} order by {order} limit $2 + 1"
        )
    };
    // One part for each class: its rows are in the list's order in an index, and no others are
    // looked at.
    let parts: Vec<String> = match request.v1_statuses.is_empty() {
        true => vec![page_of("true")],
        false => classes(&request.v1_statuses).into_iter().map(|class| page_of(&class)).collect(),
    };
    if parts.is_empty() {
        return Ok(ListSessionsReply::default());
    }
    let parts =
        parts.iter().map(|part| format!("({part})")).collect::<Vec<_>>().join(" union all ");
    let keys = format!("select session_id from ({parts}) parts order by {order} limit $2 + 1");
    let v1_columns = concat!(session_columns!(), ", v1_status(session) as v1_status");
    let list = List {
        keys: &keys,
        table: "session",
        by_key: "session_id",
        bytes: "octet_length(metadata::text) + octet_length(resources::text) + coalesce(octet_length(failure_message), 0) + 4000",
        columns: if request.is_v1 { v1_columns } else { session_columns!() },
    };
    let page = list.read(&scheduler.pool, |query| {
        let query = query.bind(user.uuid()).bind(start.limit).bind(start.time).bind(start.id);
        let query = query
            .bind(request.status.clone())
            .bind(agent.map(AgentId::uuid))
            .bind(environment.map(EnvironmentId::uuid));
        let query = query.bind(filters.from).bind(filters.before);
        query.bind(request.agent_version.map(|version| i32::try_from(version).unwrap_or(i32::MAX)))
    });
    let (rows, has_more): (Vec<SessionRow>, _) = page.await?;
    let ids: Vec<Uuid> = rows.iter().map(|row| row.session_id).collect();
    let mut sessions: Vec<Session> = rows.into_iter().map(Session::from).collect();
    if !request.is_v1 {
        summarise(&scheduler, &mut sessions).await?;
        return Ok(ListSessionsReply { sessions, has_more, agents: Vec::new() });
    }
    for file in files::of_sessions(&scheduler.pool, &ids, FileKind::Copy).await? {
        let session = sessions
            .iter_mut()
            .find(|session| Some(&session.session_id) == file.session_id.as_ref());
        session.into_iter().for_each(|session| session.files.push(file.clone()));
    }
    with_agents(&scheduler, ListSessionsReply { sessions, has_more, agents: Vec::new() }).await
}

/// The sessions that have one of some statuses of the Managed Agents API, as conditions of SQL on
/// disjoint sets: by what the row tells (`v1_class` in the migrations, which has an index), and of
/// the few active ones by whether their turn waits.
fn classes(statuses: &[String]) -> Vec<String> {
    const WAITS: &str = "exists (select from turn t
        where t.session_id = session.session_id and t.turn_number = session.turn_count and t.waiting_since is not null)";
    let has = |status: &str| statuses.iter().any(|asked| asked == status);
    let is = |class: &str| {
        format!("v1_class(status, archived_at, sprite_destroyed_at, destroy_after) = '{class}'")
    };
    let mut classes = Vec::new();
    if has("idle") {
        classes.push(is("idle"));
    }
    match (has("idle"), has("running")) {
        (true, true) => classes.push(is("active")),
        (true, false) => classes.push(format!("{} and {WAITS}", is("active"))),
        (false, true) => classes.push(format!("{} and not {WAITS}", is("active"))),
        (false, false) => {}
    }
    if has("terminated") {
        classes.extend([is("terminated"), is("archived")]);
    }
    // No session is ever `rescheduling`.
    classes
}

#[derive(sqlx::FromRow)]
struct Summary {
    session_id: String,
    last_prompt: Option<String>,
    cost_micro_usd: Option<i64>,
    request_id: Option<i64>,
    tool: Option<String>,
}

/// Adds what a list shows of each session beside its row: its last prompt, its cost, and the
/// decision it waits for.
async fn summarise(scheduler: &Scheduler, sessions: &mut [Session]) -> Result<(), RpcError> {
    let ids: Vec<Uuid> = sessions
        .iter()
        .filter_map(|session| session.session_id.parse::<SessionId>().ok())
        .map(SessionId::uuid)
        .collect();
    let summaries: Vec<Summary> = sqlx::query_as(
        "select s.session_id::text, left(last.prompt, $2) as last_prompt, cost.cost_micro_usd, r.request_id, r.tool
         from session s
         left join turn last on last.session_id = s.session_id and last.turn_number = s.turn_count
         left join lateral (
             select sum(cost_micro_usd)::bigint as cost_micro_usd from turn_used t where t.session_id = s.session_id
         ) cost on true
         left join lateral (
             select request_id, tool from permission_request p
             where s.status = 'running' and p.session_id = s.session_id and p.status = 'open' and p.answer_id is null
                 and not p.is_custom_tool
             order by request_id limit 1
         ) r on true
         where s.session_id = any($1)",
    )
    .bind(&ids)
    .bind(LISTED_PROMPT_CHARS)
    .fetch_all(&scheduler.pool)
    .await?;
    let mut summaries: HashMap<String, Summary> =
        summaries.into_iter().map(|summary| (summary.session_id.clone(), summary)).collect();
    for session in sessions {
        let Some(summary) = summaries.remove(&session.session_id) else { continue };
        session.last_prompt = summary.last_prompt;
        session.cost_micro_usd = summary.cost_micro_usd;
        session.waiting_on = summary
            .request_id
            .zip(summary.tool)
            .map(|(request, tool)| decision(request.unsigned_abs(), &tool));
    }
    Ok(())
}

pub fn decision(request: u64, tool: &str) -> String {
    format!("a decision on {tool} (request {request})")
}

/// Adds the agents of a page's sessions, and ends the page where they would be too large together.
async fn with_agents(
    scheduler: &Scheduler,
    mut reply: ListSessionsReply,
) -> Result<ListSessionsReply, RpcError> {
    usage::complete(scheduler, &mut reply.sessions).await?;
    let key = |session: &Session| {
        Some((session.agent_id.as_deref()?.parse::<Uuid>().ok()?, session.agent_row_version))
    };
    let (ids, versions): (Vec<_>, Vec<_>) = reply.sessions.iter().filter_map(key).unzip();
    let mut connection = scheduler.pool.acquire().await?;
    let mut found = agents::find_versions(&mut connection, &ids, &versions).await?;
    let mut bytes = 0;
    for (at, session) in reply.sessions.iter().enumerate() {
        let Some(agent) = found.iter().position(|agent| {
            Some(&agent.agent_id) == session.agent_id.as_ref()
                && agent.row_version == session.agent_row_version
        }) else {
            continue;
        };
        let agent = found.swap_remove(agent);
        bytes += prost::Message::encoded_len(&agent);
        if bytes > AGENTS_BYTES_MAX && at > 0 {
            reply.sessions.truncate(at);
            reply.has_more = true;
            break;
        }
        reply.agents.push(agent);
    }
    Ok(reply)
}

/// Beside the sessions themselves, in a message.
const AGENTS_BYTES_MAX: usize = types::limits::MESSAGE_BYTES_MAX / 2;
