//! Sessions and turns: created, read, prompted again.

use std::{collections::HashMap, time::Duration};

use bus::{Failure, trace};
use contract::{
    runner::RunTurn,
    scheduler::{
        CreateSessionReply, CreateSessionRequest, GetSessionRequest, ListPartsRequest, ListRequest, ListSessionsReply, ListTurnsReply,
        PromptRequest, ReadEventsReply, ReadEventsRequest, RecordedEvent, Session, Turn,
    },
    session, subject,
};
use serde_json::Value;
use sqlx::{PgConnection, Row as _};
use time::OffsetDateTime;
use types::{
    AgentId, CredentialKind, EnvironmentId, ErrorCode, ModelRef, Partition, Runtime, SessionId, SessionStatus, SpriteName, UserId,
    WhenBusy,
    limits::{PROVISIONING_MAX, SETTLE_GRACE},
};
use uuid::Uuid;

use crate::{
    Scheduler, agents, environments, event_log, inputs, micros, once,
    page::{Filters, List, Window},
    parsed_json, quota, secret_id, unsigned, usage,
};

/// The columns of a [`SessionRow`], by name: a migration then changes no statement that a running replica has prepared.
macro_rules! session_columns {
    () => {
        "session_id, user_id, agent_id, environment_id, runtime, provider, sprite, status, exit_code, failure_stage, failure_message,
         turn_count, metadata, resources, working_directory, sprite_destroyed_at, event_partition, created_at, updated_at, agent_version,
         title, archived_at, vault_ids"
    };
}
pub(crate) use session_columns;

/// How much of a prompt a list of sessions shows.
const LISTED_PROMPT_CHARS: i32 = 200;

pub fn missing() -> Failure {
    Failure::not_found("Session not found")
}

#[derive(sqlx::FromRow)]
pub struct SessionRow {
    pub session_id: Uuid,
    pub user_id: Uuid,
    pub agent_id: Option<Uuid>,
    pub environment_id: Option<Uuid>,
    pub runtime: String,
    pub provider: Option<String>,
    pub sprite: String,
    pub status: String,
    pub exit_code: Option<i32>,
    pub failure_stage: Option<String>,
    pub failure_message: Option<String>,
    pub turn_count: i32,
    pub metadata: Value,
    pub resources: Value,
    pub working_directory: Option<String>,
    pub sprite_destroyed_at: Option<OffsetDateTime>,
    pub event_partition: i16,
    pub created_at: OffsetDateTime,
    pub updated_at: OffsetDateTime,
    /// The row of its agent's version: a negative number where the session has one of its own.
    pub agent_version: i32,
    pub title: Option<String>,
    pub archived_at: Option<OffsetDateTime>,
    pub vault_ids: Value,
    /// Where the Managed Agents API asks.
    #[sqlx(default)]
    pub v1_status: Option<String>,
}

impl SessionRow {
    pub fn status(&self) -> Result<SessionStatus, Failure> {
        self.status.parse().map_err(|()| Failure::internal(format!("session {} has status {}", self.session_id, self.status)))
    }

    pub fn partition(&self) -> Result<Partition, Failure> {
        partition(self.event_partition)
    }
}

/// As a column holds it.
pub fn partition(number: i16) -> Result<Partition, Failure> {
    let known = u32::try_from(number).ok().and_then(Partition::new);
    known.ok_or_else(|| Failure::internal(format!("this release knows no partition {number}")))
}

impl From<SessionRow> for Session {
    fn from(row: SessionRow) -> Self {
        let failure = row.failure_message.map(|message| session::Failure { stage: row.failure_stage.unwrap_or_default(), message });
        Self {
            session_id: row.session_id.to_string(),
            agent_id: row.agent_id.map(|id| id.to_string()),
            environment_id: row.environment_id.map(|id| id.to_string()),
            runtime: row.runtime,
            provider: row.provider,
            status: row.status,
            exit_code: row.exit_code,
            created_at_us: micros(row.created_at),
            updated_at_us: micros(row.updated_at),
            turn_count: unsigned(row.turn_count),
            failure,
            metadata: row.metadata.to_string(),
            resources: row.resources.to_string(),
            working_directory: row.working_directory,
            waiting_on: None,
            event_partition: u32::try_from(row.event_partition).unwrap_or(u32::MAX),
            v1_status: row.v1_status.unwrap_or_default(),
            title: row.title,
            archived_at_us: row.archived_at.map(micros),
            vault_ids: row.vault_ids.to_string(),
            agent_row_version: row.agent_version,
            ..Self::default()
        }
    }
}

/// What a new session takes from its agent and environment.
#[derive(sqlx::FromRow)]
struct Template {
    agent_version: i32,
    agent_archived: bool,
    runtime: String,
    model: String,
    environment_id: Option<Uuid>,
    environment_version: Option<i32>,
    environment_archived: Option<bool>,
    env_var_names: Option<Vec<String>>,
}

/// Checks in the contract's order (docs/api.md §6), then one transaction: session, turn 1, job.
pub async fn create(scheduler: Scheduler, request: CreateSessionRequest) -> Result<CreateSessionReply, Failure> {
    let outcome = once::retried(|| async {
        let mut tx = scheduler.pool.begin().await?;
        let outcome = create_in(&scheduler, &mut tx, request.clone()).await;
        once::finish(tx, outcome).await
    })
    .await;
    let (user_id, session_id) = (request.user_id, request.session_id.clone());
    let earlier = async {
        let session = get(scheduler.clone(), GetSessionRequest { user_id, session_id, recorded_through: 0, v1: request.is_v1 }).await?;
        Ok(CreateSessionReply { session: Some(session), replayed: false })
    };
    let mut reply = Box::pin(once::or_created_earlier(outcome, &request.session_id, earlier)).await?;
    scheduler.outbox.notify_one();
    if let Some(session) = reply.session.as_mut().filter(|_| request.is_v1) {
        session.agent = agent_of(&scheduler, session).await?;
    }
    Ok(reply)
}

async fn create_in(scheduler: &Scheduler, tx: &mut PgConnection, request: CreateSessionRequest) -> Result<CreateSessionReply, Failure> {
    const ROUTE: &str = "sessions";
    let user: UserId = request.user_id.parse().map_err(|_| Failure::not_found("User not found"))?;
    let id = once::chosen(&request.session_id, SessionId::new)?;
    if request.once.is_some() {
        once::wait_for_earlier_attempts(tx, &request.session_id).await?;
    }
    if let Some(session) = once::earlier::<Session>(tx, user, ROUTE, request.once.as_ref()).await? {
        let replayed = session.session_id != request.session_id;
        return Ok(CreateSessionReply { session: Some(session), replayed });
    }
    let agent: AgentId = request.agent_id.parse().map_err(|_| Failure::not_found("Agent not found"))?;
    let override_id = request.environment_id.as_deref().map(str::parse::<EnvironmentId>);
    let template: Template = sqlx::query_as(
        "select av.version as agent_version, a.archived_at is not null as agent_archived, av.runtime, av.model,
                e.environment_id, e.version as environment_version, e.archived_at is not null as environment_archived, ev.env_var_names
         from agent a
         join agent_version av on av.agent_id = a.agent_id and av.version = coalesce($4, a.version) and av.version > 0
         left join environment e on e.environment_id = coalesce($3, a.environment_id) and e.user_id = $2
         left join environment_version ev on ev.environment_id = e.environment_id and ev.version = e.version
         where a.agent_id = $1 and a.user_id = $2",
    )
    .bind(agent.uuid())
    .bind(user.uuid())
    .bind(override_id.as_ref().and_then(|id| id.as_ref().ok()).map(|id| id.uuid()))
    .bind(request.agent_version.map(|version| i32::try_from(version).unwrap_or(i32::MAX)))
    .fetch_optional(&mut *tx)
    .await?
    .ok_or_else(|| Failure::not_found("Agent not found"))?;
    if template.agent_archived {
        return Err(Failure::conflict("Cannot create session with archived agent").because("agent_archived"));
    }
    if matches!(override_id, Some(Err(_))) || (override_id.is_some() && template.environment_id.is_none()) {
        return Err(environments::missing().because("environment_not_found"));
    }
    if template.environment_id.is_some() && template.environment_archived == Some(true) {
        return Err(Failure::conflict("Cannot create session with archived environment").because("environment_archived"));
    }
    let own = request.agent_override.as_ref();
    let (runtime, model) = own.map_or((&template.runtime, &template.model), |own| (&own.runtime, &own.model));
    let runtime: Runtime = runtime.parse().map_err(|()| Failure::internal(format!("agent {agent} has an unknown runtime")))?;
    let mut brought = template.env_var_names.unwrap_or_default();
    brought.extend(request.secret_env_var_names);
    check_credentials(runtime, &request.credential_kinds, &brought)?;
    let model = ModelRef::parse(runtime, model).map_err(Failure::internal)?;
    let agent_version = match own {
        None => template.agent_version,
        Some(own) => agents::override_agent(tx, agent.uuid(), own).await?,
    };
    let (messages, begins) = (&request.initial_messages, !request.is_v1);
    let (status, turn_count) = if begins { (SessionStatus::Pending, 1) } else { (SessionStatus::Completed, 0) };

    let sprite = SpriteName::for_session(&scheduler.sprite_name_prefix, id).map_err(Failure::internal)?;
    if begins || !messages.is_empty() {
        quota::enforce(tx, user, request.session_limit).await?;
    }
    let row: SessionRow = sqlx::query_as(concat!(
        "insert into session (session_id, user_id, agent_id, agent_version, environment_id, environment_version, runtime, provider,
                              sprite, conversation_id, metadata, resources, secret_id, event_partition, working_directory, status, turn_count,
                              title, vault_ids)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19)
         returning ",
        session_columns!()
    ))
    .bind(id.uuid())
    .bind(user.uuid())
    .bind(agent.uuid())
    .bind(agent_version)
    .bind(template.environment_id)
    .bind(template.environment_version)
    .bind(runtime.as_str())
    .bind(model.provider().map(types::Provider::as_str))
    .bind(sprite.as_str())
    .bind(Uuid::new_v4())
    .bind(parsed_json(&request.metadata)?)
    .bind(parsed_json(&request.resources)?)
    .bind(secret_id(request.secret_id.as_deref())?)
    .bind(i16::from(Partition::of_new(id, scheduler.event_partitions).number()))
    .bind(request.working_directory.as_deref())
    .bind(status.as_str())
    .bind(turn_count)
    .bind(&request.title)
    .bind(if request.vault_ids.is_empty() { Value::Array(Vec::new()) } else { parsed_json(&request.vault_ids)? })
    .fetch_one(&mut *tx)
    .await
    .map_err(|error| {
        // Deleted a moment ago.
        if store::violates(&error, "session_environment_id_fkey") {
            environments::missing()
        } else {
            once::not_inserted(error, "session_pkey")
        }
    })?;
    let mut session = if begins {
        insert_turn(tx, id, 1, &request.prompt, request.timeout_seconds, None).await?;
        Session::from(row)
    } else {
        Session::from(inputs::begin_with(tx, row, messages, request.timeout_seconds, &request.key_id).await?)
    };
    if request.is_v1 {
        session.v1_status = if messages.is_empty() { "idle" } else { "running" }.to_owned();
    }
    once::remember(tx, user, ROUTE, request.once.as_ref(), &session).await?;
    Ok(CreateSessionReply { session: Some(session), replayed: false })
}

/// One of the runtime's credentials is stored, or the environment brings it; and there is an account to make Sprites in.
fn check_credentials(runtime: Runtime, stored: &[String], env_vars: &[String]) -> Result<(), Failure> {
    let has = |kind: CredentialKind| stored.iter().any(|stored| stored == kind.as_str());
    let brings = |kind: CredentialKind| kind.env_var().is_some_and(|name| env_vars.iter().any(|var| var == name));
    let serving = CredentialKind::serving(runtime);
    if !serving.is_empty() && !serving.into_iter().any(|kind| has(kind) || brings(kind)) {
        return Err(Failure::invalid(format!("No API key configured for runtime: {runtime}")));
    }
    if !has(CredentialKind::Sprites) {
        return Err(Failure::invalid("No backend credentials configured"));
    }
    Ok(())
}

/// A pending turn, and the job that runs it.
async fn insert_turn(
    tx: &mut PgConnection,
    session: SessionId,
    number: i32,
    prompt: &str,
    timeout_seconds: u32,
    input: Option<Uuid>,
) -> Result<(), Failure> {
    let deadline = PROVISIONING_MAX + Duration::from_secs(u64::from(timeout_seconds)) + SETTLE_GRACE;
    sqlx::query(
        "insert into turn (session_id, turn_number, prompt, timeout_seconds, status, deadline_at, offers, offer_after, input_id, begun_after)
         values ($1, $2, $3, $4, 'pending', now() + make_interval(secs => $5), 1, now() + make_interval(secs => $6), $7,
                 coalesce((select last_event_id from event_log where session_id = $1), 0))",
    )
    .bind(session.uuid())
    .bind(number)
    .bind(prompt)
    .bind(i32::try_from(timeout_seconds).unwrap_or(i32::MAX))
    .bind(deadline.as_secs_f64())
    .bind(rules::ownership::next_offer(1).as_secs_f64())
    .bind(input)
    .execute(&mut *tx)
    .await?;
    let job = RunTurn { session_id: session.to_string(), turn: unsigned(number) };
    enqueue(tx, &subject::turn_run(session), &job).await
}

/// Adds a message to the transaction, as part of the trace at hand.
pub async fn enqueue(tx: &mut PgConnection, subject: &str, message: &impl prost::Message) -> Result<(), Failure> {
    let traceparent = trace::traceparent();
    store::outbox::enqueue(tx, subject, &message.encode_to_vec(), traceparent.as_deref()).await.map_err(Failure::from)
}

pub async fn get(scheduler: Scheduler, request: GetSessionRequest) -> Result<Session, Failure> {
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    let id: SessionId = request.session_id.parse().map_err(|_| missing())?;
    if request.recorded_through > 0 {
        wait_until_recorded(&scheduler, id, request.recorded_through).await?;
    }
    if request.v1 {
        return get_v1(&scheduler, user, id).await;
    }
    let row: Option<SessionRow> = sqlx::query_as(concat!(
        "select ",
        session_columns!(),
        "
         from session
         where session_id = $1 and user_id = $2"
    ))
    .bind(id.uuid())
    .bind(user.uuid())
    .fetch_optional(&scheduler.pool)
    .await?;
    let mut session = row.map(Session::from).ok_or_else(missing)?;
    match session.status.parse() {
        Ok(SessionStatus::Pending) => {
            session.waiting_on = waiting_on(&scheduler, &session).await?;
            session.queued_inputs = Some(inputs::waiting(&scheduler, id).await?.0);
        }
        Ok(SessionStatus::Running) => {
            let (queued, request) = inputs::waiting(&scheduler, id).await?;
            session.waiting_on = request.map(|(request, tool)| decision(request, &tool));
            session.queued_inputs = Some(queued);
        }
        _ => session.queued_inputs = Some(0),
    }
    Ok(session)
}

/// A session with all that the Managed Agents API shows, as it is at one moment.
async fn get_v1(scheduler: &Scheduler, user: UserId, id: SessionId) -> Result<Session, Failure> {
    let row: Option<SessionRow> = sqlx::query_as(concat!(
        "select ",
        session_columns!(),
        ", v1_status(session) as v1_status from session where session_id = $1 and user_id = $2"
    ))
    .bind(id.uuid())
    .bind(user.uuid())
    .fetch_optional(&scheduler.pool)
    .await?;
    let mut session = row.map(Session::from).ok_or_else(missing)?;
    usage::complete(scheduler, std::slice::from_mut(&mut session)).await?;
    session.agent = agent_of(scheduler, &session).await?;
    Ok(session)
}

/// The agent as a session has it.
async fn agent_of(scheduler: &Scheduler, session: &Session) -> Result<Option<contract::scheduler::Agent>, Failure> {
    let Some(agent) = session.agent_id.as_deref().and_then(|id| id.parse().ok()) else { return Ok(None) };
    let mut connection = scheduler.pool.acquire().await?;
    Ok(agents::find_versions(&mut connection, &[agent], &[session.agent_row_version]).await?.pop())
}

/// What a pending turn waits for, in words for its user.
async fn waiting_on(scheduler: &Scheduler, session: &Session) -> Result<Option<String>, Failure> {
    let id: SessionId = session.session_id.parse().map_err(|_| missing())?;
    let row = sqlx::query("select epoch, handed_back_reason from turn where session_id = $1 and turn_number = $2")
        .bind(id.uuid())
        .bind(i32::try_from(session.turn_count).unwrap_or(i32::MAX))
        .fetch_optional(&scheduler.pool)
        .await?;
    let Some(row) = row else { return Ok(None) };
    let (epoch, reason): (i32, Option<String>) = (row.try_get(0)?, row.try_get(1)?);
    Ok(Some(match (epoch, reason) {
        (0, _) => "a free runner".to_owned(),
        (_, Some(reason)) => format!("another attempt: {reason}"),
        (_, None) => "its sandbox".to_owned(),
    }))
}

/// Waits for the recorder, here or in another replica. The caller's deadline ends it.
pub async fn wait_until_recorded(scheduler: &Scheduler, session: SessionId, event_id: u64) -> Result<(), Failure> {
    let number: Option<i16> = sqlx::query_scalar("select event_partition from session where session_id = $1")
        .bind(session.uuid())
        .fetch_optional(&scheduler.pool)
        .await?;
    let partition = partition(number.ok_or_else(missing)?)?;
    Ok(scheduler.projected.wait(&scheduler.pool, partition, event_id).await?)
}

pub async fn list(scheduler: Scheduler, request: ListRequest) -> Result<ListSessionsReply, Failure> {
    let user: UserId = request.user_id.parse().map_err(|_| Failure::not_found("User not found"))?;
    let window = Window::by_time(request.limit, request.after.as_ref())?;
    let agent =
        request.agent_id.as_deref().map(str::parse::<AgentId>).transpose().map_err(|_| Failure::invalid("agent_id must be an id"))?;
    let environment = request.environment_id.as_deref().map(str::parse::<EnvironmentId>).transpose();
    let environment = environment.map_err(|_| Failure::invalid("environment_id must be an id"))?;
    let filters = Filters::of(&request)?;
    // The original API knows no archived sessions.
    let not_archived = if request.is_v1 { "archived_at is null" } else { "true" };
    // A filter that is not asked for is not in the statement: a plan that is kept would have to suit it.
    let filter = |asked: bool, with: &'static str, without: &'static str| if asked { with } else { without };
    let (from, order) = match (request.ascending, request.after.is_some()) {
        (false, _) => ("(created_at, session_id) < ($3, $4)", "created_at desc, session_id desc"),
        (true, true) => ("(created_at, session_id) > ($3, $4)", "created_at, session_id"),
        (true, false) => ("($3::timestamptz, $4::uuid) is not null", "created_at, session_id"),
    };
    let keys = format!(
        "select session_id from session where user_id = $1 and {from} and {} and {} and {} and {} and {} and {}
         order by {order} limit $2 + 1",
        filter(request.status.is_some(), "status = $5", "$5::text is null"),
        filter(agent.is_some(), "agent_id = $6", "$6::uuid is null"),
        filter(environment.is_some(), "environment_id = $7", "$7::uuid is null"),
        filters.conditions(not_archived, 8),
        filter(!request.v1_statuses.is_empty(), "v1_status(session) = any($10)", "$10::text[] is not null"),
        filter(
            request.agent_version.is_some(),
            "$11 = (select coalesce(v.base_version, v.version) from agent_version v
                    where v.agent_id = session.agent_id and v.version = session.agent_version)",
            "$11::integer is null"
        ),
    );
    let v1_columns = concat!(session_columns!(), ", v1_status(session) as v1_status");
    let list = List {
        keys: &keys,
        table: "session",
        by_key: "session_id",
        bytes: "octet_length(metadata::text) + octet_length(resources::text) + coalesce(octet_length(failure_message), 0) + 4000",
        columns: if request.is_v1 { v1_columns } else { session_columns!() },
    };
    let page = list.read(&scheduler.pool, |query| {
        let query = query.bind(user.uuid()).bind(window.limit).bind(window.time).bind(window.id);
        let query = query.bind(request.status.clone()).bind(agent.map(AgentId::uuid)).bind(environment.map(EnvironmentId::uuid));
        let query = query.bind(filters.from).bind(filters.before).bind(request.v1_statuses.clone());
        query.bind(request.agent_version.map(|version| i32::try_from(version).unwrap_or(i32::MAX)))
    });
    let (rows, has_more): (Vec<SessionRow>, _) = page.await?;
    let mut sessions: Vec<Session> = rows.into_iter().map(Session::from).collect();
    if !request.is_v1 {
        summarise(&scheduler, &mut sessions).await?;
        return Ok(ListSessionsReply { sessions, has_more, agents: Vec::new() });
    }
    with_agents(&scheduler, ListSessionsReply { sessions, has_more, agents: Vec::new() }).await
}

#[derive(sqlx::FromRow)]
struct Summary {
    session_id: String,
    last_prompt: Option<String>,
    cost_micro_usd: Option<i64>,
    request_id: Option<i64>,
    tool: Option<String>,
}

/// Adds what a list shows of each session beside its row: its last prompt, its cost, and the decision it waits for.
async fn summarise(scheduler: &Scheduler, sessions: &mut [Session]) -> Result<(), Failure> {
    let ids: Vec<Uuid> = sessions.iter().filter_map(|session| session.session_id.parse::<SessionId>().ok()).map(SessionId::uuid).collect();
    let summaries: Vec<Summary> = sqlx::query_as(
        "select s.session_id::text, left(last.prompt, $2) as last_prompt, cost.cost_micro_usd, r.request_id, r.tool
         from session s
         left join turn last on last.session_id = s.session_id and last.turn_number = s.turn_count
         left join lateral (
             select sum(cost_micro_usd)::bigint as cost_micro_usd from turn where turn.session_id = s.session_id
         ) cost on true
         left join lateral (
             select request_id, tool from permission_request p
             where s.status = 'running' and p.session_id = s.session_id and p.status = 'open' and p.answer_id is null
             order by request_id limit 1
         ) r on true
         where s.session_id = any($1)",
    )
    .bind(&ids)
    .bind(LISTED_PROMPT_CHARS)
    .fetch_all(&scheduler.pool)
    .await?;
    let mut summaries: HashMap<String, Summary> = summaries.into_iter().map(|summary| (summary.session_id.clone(), summary)).collect();
    for session in sessions {
        let Some(summary) = summaries.remove(&session.session_id) else { continue };
        session.last_prompt = summary.last_prompt;
        session.cost_micro_usd = summary.cost_micro_usd;
        session.waiting_on = summary.request_id.zip(summary.tool).map(|(request, tool)| decision(request.unsigned_abs(), &tool));
    }
    Ok(())
}

fn decision(request: u64, tool: &str) -> String {
    format!("a decision on {tool} (request {request})")
}

/// Adds the agents of a page's sessions, and ends the page where they would be too large together.
async fn with_agents(scheduler: &Scheduler, mut reply: ListSessionsReply) -> Result<ListSessionsReply, Failure> {
    usage::complete(scheduler, &mut reply.sessions).await?;
    let key = |session: &Session| Some((session.agent_id.as_deref()?.parse::<Uuid>().ok()?, session.agent_row_version));
    let (ids, versions): (Vec<_>, Vec<_>) = reply.sessions.iter().filter_map(key).unzip();
    let mut connection = scheduler.pool.acquire().await?;
    let mut found = agents::find_versions(&mut connection, &ids, &versions).await?;
    let mut bytes = 0;
    for (at, session) in reply.sessions.iter().enumerate() {
        let Some(agent) = found
            .iter()
            .position(|agent| Some(&agent.agent_id) == session.agent_id.as_ref() && agent.row_version == session.agent_row_version)
        else {
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

#[derive(sqlx::FromRow)]
struct TurnRow {
    turn_number: i32,
    prompt: String,
    status: String,
    exit_code: Option<i32>,
    created_at: OffsetDateTime,
    started_at: Option<OffsetDateTime>,
    ended_at: Option<OffsetDateTime>,
    input_tokens: Option<i64>,
    output_tokens: Option<i64>,
    cost_micro_usd: Option<i64>,
    model_used: Option<String>,
}

impl TurnRow {
    fn usage(&self) -> Option<session::Usage> {
        let count = |count: Option<i64>| count.map(i64::unsigned_abs);
        let usage = session::Usage {
            input_tokens: count(self.input_tokens),
            output_tokens: count(self.output_tokens),
            cost_micro_usd: count(self.cost_micro_usd),
            model: self.model_used.clone(),
            ..session::Usage::default()
        };
        (usage != session::Usage::default()).then_some(usage)
    }
}

pub async fn turns(scheduler: Scheduler, request: ListPartsRequest) -> Result<ListTurnsReply, Failure> {
    let id: SessionId = request.id.parse().map_err(|_| missing())?;
    get(scheduler.clone(), GetSessionRequest { user_id: request.user_id, session_id: request.id, recorded_through: 0, v1: false }).await?;
    let window = Window::by_number_upwards(request.limit, request.after.as_ref());
    let list = List {
        keys: "select turn_number from turn where session_id = $1 and turn_number > $3 order by turn_number limit $2 + 1",
        table: "turn",
        by_key: "session_id = $1 and turn_number",
        bytes: "octet_length(prompt) + 500",
        columns: "turn_number, prompt, status, exit_code, created_at, started_at, ended_at, input_tokens, output_tokens, cost_micro_usd,
                  model_used",
    };
    let page = list.read(&scheduler.pool, |query| query.bind(id.uuid()).bind(window.limit).bind(window.number));
    let (rows, has_more): (Vec<TurnRow>, _) = page.await?;
    let turn = |row: TurnRow| Turn {
        usage: row.usage(),
        turn_number: unsigned(row.turn_number),
        prompt: row.prompt,
        status: row.status,
        exit_code: row.exit_code,
        created_at_us: micros(row.created_at),
        started_at_us: row.started_at.map(micros),
        ended_at_us: row.ended_at.map(micros),
    };
    Ok(ListTurnsReply { turns: rows.into_iter().map(turn).collect(), has_more })
}

/// The next turn of a completed session. Of two racing prompts one finds the session completed.
pub async fn prompt(scheduler: Scheduler, request: PromptRequest) -> Result<CreateSessionReply, Failure> {
    let reply = once::retried(|| async {
        let mut tx = scheduler.pool.begin().await?;
        let outcome = prompt_in(&mut tx, request.clone()).await;
        once::finish(tx, outcome).await
    })
    .await?;
    scheduler.outbox.notify_one();
    let session = reply.session.as_ref().filter(|session| session.input.is_some());
    if let Some(id) = session.and_then(|session| session.session_id.parse().ok()) {
        scheduler.bus.hint(subject::inputs_hint(id)).await;
    }
    Ok(reply)
}

async fn prompt_in(tx: &mut PgConnection, request: PromptRequest) -> Result<CreateSessionReply, Failure> {
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    let session: SessionId = request.session_id.parse().map_err(|_| missing())?;
    let route = format!("sessions/{session}/prompt");
    if let Some(session) = once::earlier(tx, user, &route, request.once.as_ref()).await? {
        return Ok(CreateSessionReply { session: Some(session), replayed: true });
    }
    let row = lock(tx, session, Some(user)).await?.ok_or_else(missing)?;
    let when_busy = when_busy(&request, &row)?;
    if row.status()?.is_active() && when_busy != WhenBusy::Reject {
        let input = inputs::enqueue(tx, &row, &request, when_busy == WhenBusy::Steer).await?;
        if when_busy == WhenBusy::Interrupt {
            inputs::interrupt_in(tx, &row, &request.key_id).await?;
        }
        let session = Session { input: Some(input), ..Session::from(row) };
        once::remember(tx, user, &route, request.once.as_ref(), &session).await?;
        return Ok(CreateSessionReply { session: Some(session), replayed: false });
    }
    if let Some(refusal) = row.status()?.prompt_refusal() {
        return Err(Failure::conflict(refusal));
    }
    if row.sprite_destroyed_at.is_some() {
        return Err(Failure::conflict("Session backend is no longer available; start a new session."));
    }
    let row = begin_turn(tx, &row, &request.prompt, request.timeout_seconds, None).await?;
    let session = Session::from(row);
    once::remember(tx, user, &route, request.once.as_ref(), &session).await?;
    Ok(CreateSessionReply { session: Some(session), replayed: false })
}

/// The next turn of a session whose turn is settled; `input` became it.
pub async fn begin_turn(
    tx: &mut PgConnection,
    session: &SessionRow,
    prompt: &str,
    timeout_seconds: u32,
    input: Option<Uuid>,
) -> Result<SessionRow, Failure> {
    let turn = session.turn_count + 1;
    insert_turn(tx, SessionId::from_uuid(session.session_id), turn, prompt, timeout_seconds, input).await?;
    let row = sqlx::query_as(concat!(
        "update session
         set status = 'pending', exit_code = null, failure_stage = null, failure_message = null, turn_count = $2, updated_at = now()
         where session_id = $1
         returning ",
        session_columns!()
    ))
    .bind(session.session_id)
    .bind(turn)
    .fetch_one(tx)
    .await?;
    Ok(row)
}

fn when_busy(request: &PromptRequest, session: &SessionRow) -> Result<WhenBusy, Failure> {
    if request.when_busy.is_empty() {
        return Ok(WhenBusy::Reject);
    }
    let when_busy = request.when_busy.parse().map_err(|()| Failure::invalid("Unknown when_busy"))?;
    let runtime: Runtime = session.runtime.parse().map_err(|()| Failure::internal("a session has an unknown runtime"))?;
    if when_busy == WhenBusy::Steer && !runtime.capabilities().steer {
        let message = format!("Runtime {runtime} takes no message while a turn runs: when_busy can be 'reject', 'queue' or 'interrupt'");
        return Err(Failure::new(ErrorCode::Unprocessable, message));
    }
    Ok(when_busy)
}

/// A session's row, locked; of one user, or of any where none is given.
pub async fn lock(tx: &mut PgConnection, session: SessionId, user: Option<UserId>) -> Result<Option<SessionRow>, Failure> {
    sqlx::query_as(concat!(
        "select ",
        session_columns!(),
        "
         from session
         where session_id = $1 and ($2::uuid is null or user_id = $2)
         for update"
    ))
    .bind(session.uuid())
    .bind(user.map(UserId::uuid))
    .fetch_optional(tx)
    .await
    .map_err(Failure::from)
}

pub async fn events(scheduler: Scheduler, request: ReadEventsRequest) -> Result<ReadEventsReply, Failure> {
    let session: SessionId = request.session_id.parse().map_err(|_| missing())?;
    let from = request.before.map_or(event_log::From::After(request.after), event_log::From::Before);
    let events = event_log::page(&scheduler.pool, session, from, request.limit, request.max_bytes).await?;
    if !events.is_empty() {
        return Ok(ReadEventsReply { events, ..ReadEventsReply::default() });
    }
    let number: Option<i16> = sqlx::query_scalar("select event_partition from session where session_id = $1")
        .bind(session.uuid())
        .fetch_optional(&scheduler.pool)
        .await?;
    let Some(number) = number else { return Ok(ReadEventsReply { session_deleted: true, ..ReadEventsReply::default() }) };
    // In this order: what was persisted up to there is seen by the query after it.
    let projected = crate::projector::projected_through(&scheduler.pool, partition(number)?).await?;
    let newest = newest_event(&scheduler, session).await?;
    let is_complete = newest.as_ref().is_none_or(|newest| newest.event_id <= request.after);
    Ok(ReadEventsReply { newest, projected: if is_complete { projected } else { 0 }, ..ReadEventsReply::default() })
}

/// The last persisted event of a session.
pub async fn newest_event(scheduler: &Scheduler, session: SessionId) -> Result<Option<RecordedEvent>, Failure> {
    event_log::newest(&scheduler.pool, session).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credential_may_be_stored_or_come_with_the_environment() {
        let sprites = "backend:sprites".to_owned();
        let message = |runtime, stored: &[String], vars: &[String]| check_credentials(runtime, stored, vars).err().map(|f| f.message);
        let missing = Some("No API key configured for runtime: claude".to_owned());
        assert_eq!(message(Runtime::Claude, std::slice::from_ref(&sprites), &[]), missing);
        assert_eq!(message(Runtime::Claude, &[sprites.clone(), "provider:openai".into()], &[]), missing);
        assert_eq!(message(Runtime::Claude, &[sprites.clone(), "runtime_token:claude-oauth".into()], &[]), None);
        assert_eq!(message(Runtime::Claude, std::slice::from_ref(&sprites), &["ANTHROPIC_API_KEY".into()]), None);
        assert_eq!(message(Runtime::Shell, &[sprites], &[]), None);
        assert_eq!(message(Runtime::Shell, &[], &[]), Some("No backend credentials configured".to_owned()));
    }
}
