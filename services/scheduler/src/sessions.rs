//! Sessions: created, read, prompted again.

pub mod list;
pub mod managed;
mod new;
pub mod quota;
pub mod row;
pub mod spares;
pub mod termination;
pub mod turns;
pub mod usage;

use bus::RpcError;
use contract::{
    scheduler::{
        CreateSessionReply, CreateSessionRequest, GetSessionRequest, PromptRequest,
        ReadEventsReply, ReadEventsRequest, Session,
    },
    subject,
};
use serde_json::Value;
use sqlx::{PgConnection, Row as _};
use types::{
    AgentId, CredentialKind, EnvironmentId, ErrorCode, InputId, ModelRef, Partition, Runtime,
    SessionId, SessionStatus, UserId, WhenBusy, file::FileKind,
};
use uuid::Uuid;

use self::{
    new::{FirstTurn, NewSession},
    row::{SessionRow, find, lock, missing, partition, session_columns},
    spares::Sandbox,
};
use crate::{
    Scheduler,
    catalog::{
        agents::{self, AgentRow},
        environments, files, vaults,
    },
    db::idempotency,
    dispatch::claims,
    inputs,
    log::{
        event_log,
        positions::{projected_through, wait_until_projected},
    },
    models::{budgets, limits::Scope},
    parsed_json, secret_id,
};

/// What a new session takes from its agent and environment.
#[derive(sqlx::FromRow)]
struct Template {
    #[sqlx(flatten)]
    agent: AgentRow,
    session_environment_id: Option<Uuid>,
    environment_version: Option<i32>,
    environment_archived: Option<bool>,
    env_var_names: Option<Vec<String>>,
}

/// Checks in the contract's order (docs/api.md §6), then one transaction: session, turn 1, job.
pub async fn create(
    scheduler: Scheduler,
    request: CreateSessionRequest,
) -> Result<CreateSessionReply, RpcError> {
    let outcome = idempotency::retried(|| async {
        if is_one_statement(&scheduler, &request)
            && let Some(reply) = create_at_once(&scheduler, &request).await?
        {
            return Ok(reply);
        }
        let mut tx = scheduler.pool.begin().await?;
        let outcome = create_in(&scheduler, &mut tx, &request).await;
        idempotency::finish(tx, outcome).await
    })
    .await;
    let (user_id, mut session_id) = (request.user_id.clone(), request.session_id.clone());
    let earlier = async {
        if let Some(adopted) = spares::adopted_for(&scheduler.pool, &session_id).await? {
            session_id = adopted.to_string();
        }
        let session = get(
            scheduler.clone(),
            GetSessionRequest { user_id, session_id, recorded_through: 0, v1: request.is_v1 },
        )
        .await?;
        Ok(CreateSessionReply { session: Some(session), replayed: false })
    };
    let mut reply =
        Box::pin(idempotency::or_created_earlier(outcome, &request.session_id, earlier)).await?;
    scheduler.due.outbox.notify_one();
    if let Ok(user) = request.user_id.parse() {
        scheduler.spares.created(user);
    }
    if let Some(session) = reply.session.as_mut().filter(|_| request.is_v1) {
        if session.agent.is_none() {
            session.agent = agent_of(&scheduler, session).await?;
        }
        let id = session.session_id.parse::<SessionId>();
        if let Ok(id) = id
            && !request.files.is_empty()
        {
            session.files =
                files::of_sessions(&scheduler.pool, &[id.uuid()], FileKind::Copy).await?;
        }
    }
    Ok(reply)
}

/// The route of idempotency keys of creations.
const ROUTE: &str = "sessions";

/// Whether a session begins with a turn and nothing but the two is written or locked.
fn is_one_statement(scheduler: &Scheduler, request: &CreateSessionRequest) -> bool {
    let begins_alone = !request.is_v1 || request.initial_messages.len() == 1;
    begins_alone
        && request.once.is_none()
        && request.agent_override.is_none()
        && request.budget.is_none()
        && request.files.is_empty()
        && matches!(&*request.vault_ids, "" | "[]")
        && !scheduler.spares.is_on()
}

/// Creates a session without a transaction around its statement. Returns `None` if its user's quota
/// may leave no room.
async fn create_at_once(
    scheduler: &Scheduler,
    request: &CreateSessionRequest,
) -> Result<Option<CreateSessionReply>, RpcError> {
    let mut connection = scheduler.pool.acquire().await?;
    let (new, agent) = plan(scheduler, &mut connection, owner(request)?, request).await?;
    let row = new.insert(&mut connection, Some(request.session_limit)).await?;
    Ok(row.map(|row| {
        let session = Session { agent: shown_agent(request, agent), ..created(row, request) };
        CreateSessionReply { session: Some(session), replayed: false }
    }))
}

async fn create_in(
    scheduler: &Scheduler,
    tx: &mut PgConnection,
    request: &CreateSessionRequest,
) -> Result<CreateSessionReply, RpcError> {
    let user = owner(request)?;
    let earlier = idempotency::earlier_creation::<Session>(
        tx,
        user,
        ROUTE,
        request.once.as_ref(),
        &request.session_id,
    );
    if let Some(session) = earlier.await? {
        let adopted = spares::adopted_for(&mut *tx, &request.session_id).await?;
        let first = adopted.map_or_else(|| request.session_id.clone(), |id| id.to_string());
        let replayed = session.session_id != first;
        return Ok(CreateSessionReply { session: Some(session), replayed });
    }
    let (new, agent) = plan(scheduler, tx, user, request).await?;
    let begins = new.first.is_some();
    if begins {
        quota::enforce(tx, user, request.session_limit).await?;
    }
    let id = new.id();
    let row = new.insert(tx, None).await?;
    let row = row.ok_or_else(|| RpcError::internal("a session was not written"))?;
    files::give(tx, user, id, &request.files).await?;
    if let Some(budget) = &request.budget {
        budgets::write(tx, Scope::Session, id.uuid(), budget).await?;
    }
    if let [_, others @ ..] = &*request.initial_messages {
        let (seconds, key) = (request.timeout_seconds, &request.key_id);
        inputs::queue::enqueue_others(tx, id, others, seconds, key).await?;
    }
    let max = scheduler.prepared_sessions_max;
    // The claim asks again. A job that it refuses would keep others from being prepared: their
    // runner waits for a message before it claims.
    if !begins && !new.sandbox.is_prepared && max > 0 && claims::may_prepare(tx, user, max).await? {
        turns::prepare(tx, id).await?;
    }
    let mut session = created(row, request);
    idempotency::remember(tx, user, ROUTE, request.once.as_ref(), &session).await?;
    session.agent = shown_agent(request, agent);
    Ok(CreateSessionReply { session: Some(session), replayed: false })
}

fn owner(request: &CreateSessionRequest) -> Result<UserId, RpcError> {
    request.user_id.parse().map_err(|_| RpcError::not_found("User not found"))
}

/// A session that was written, as its creator sees it.
fn created(row: SessionRow, request: &CreateSessionRequest) -> Session {
    let mut session = Session::from(row);
    if request.is_v1 {
        let begins = !request.initial_messages.is_empty();
        session.v1_status = if begins { "running" } else { "idle" }.to_owned();
    }
    session
}

/// The agent of a new session, where the Managed Agents API asks. One of its own is read later.
fn shown_agent(
    request: &CreateSessionRequest,
    agent: AgentRow,
) -> Option<contract::scheduler::Agent> {
    (request.is_v1 && request.agent_override.is_none()).then(|| agent.into())
}

/// Checks a request, and returns the session that is to be written, with its agent.
async fn plan<'a>(
    scheduler: &Scheduler,
    connection: &mut PgConnection,
    user: UserId,
    request: &'a CreateSessionRequest,
) -> Result<(NewSession<'a>, AgentRow), RpcError> {
    let id = idempotency::chosen(&request.session_id, SessionId::new)?;
    let agent: AgentId =
        request.agent_id.parse().map_err(|_| RpcError::not_found("Agent not found"))?;
    let override_id = request.environment_id.as_deref().map(str::parse::<EnvironmentId>);
    let template: Template = sqlx::query_as(
        "select a.agent_id, av.name, av.description, av.system, av.model, av.runtime, a.environment_id, av.metadata, av.skills,
                av.mcp_servers, av.mcp_secret_id, av.permissions, av.tools, av.version, a.created_at, a.updated_at, a.archived_at,
                e.environment_id as session_environment_id, e.version as environment_version, e.archived_at is not null as environment_archived, ev.env_var_names
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
    .fetch_optional(&mut *connection)
    .await?
    .ok_or_else(|| RpcError::not_found("Agent not found"))?;
    if template.agent.archived_at.is_some() {
        return Err(RpcError::conflict("Cannot create session with archived agent")
            .because("agent_archived"));
    }
    if matches!(override_id, Some(Err(_)))
        || (override_id.is_some() && template.session_environment_id.is_none())
    {
        return Err(environments::missing().because("environment_not_found"));
    }
    if template.session_environment_id.is_some() && template.environment_archived == Some(true) {
        return Err(RpcError::conflict("Cannot create session with archived environment")
            .because("environment_archived"));
    }
    let own = request.agent_override.as_ref();
    let (runtime, model) = own
        .map_or((&template.agent.runtime, &template.agent.model), |own| (&own.runtime, &own.model));
    let runtime: Runtime = runtime
        .parse()
        .map_err(|()| RpcError::internal(format!("agent {agent} has an unknown runtime")))?;
    let mut brought = template.env_var_names.unwrap_or_default();
    brought.extend(request.secret_env_var_names.iter().cloned());
    let vault_ids = if request.vault_ids.is_empty() {
        Value::Array(Vec::new())
    } else {
        parsed_json(&request.vault_ids)?
    };
    brought.extend(vaults::check(connection, user, &vault_ids).await?);
    check_credentials(runtime, &request.credential_kinds, &brought)?;
    let model = ModelRef::parse(runtime, model).map_err(RpcError::internal)?;
    let collects_outputs = request.is_v1 && scheduler.files.store.is_some();
    let prepared_for = rules::spares::Template {
        user: user.uuid(),
        agent: agent.uuid(),
        agent_version: template.agent.version,
        environment: template.session_environment_id.zip(template.environment_version),
        working_directory: request.working_directory.clone(),
        collects_outputs,
    };
    let sandbox = match spares::adopt(scheduler, connection, request, prepared_for).await? {
        Some(spare) => spare,
        None => Sandbox::of_new(scheduler, id)?,
    };
    let id = SessionId::from_uuid(sandbox.session_id);
    let agent_version = match own {
        None => template.agent.version,
        Some(own) => agents::override_agent(connection, agent.uuid(), id, own).await?,
    };
    let first = if request.is_v1 {
        request.initial_messages.first().map(|text| FirstTurn {
            prompt: text,
            timeout_seconds: request.timeout_seconds,
            message: Some((InputId::new(), request.key_id.parse().ok())),
        })
    } else {
        Some(FirstTurn {
            prompt: &request.prompt,
            timeout_seconds: request.timeout_seconds,
            message: None,
        })
    };
    let new = NewSession {
        user,
        agent: agent.uuid(),
        agent_version,
        environment: template.session_environment_id,
        environment_version: template.environment_version,
        runtime,
        provider: model.provider(),
        sandbox,
        metadata: parsed_json(&request.metadata)?,
        resources: parsed_json(&request.resources)?,
        secret: secret_id(request.secret_id.as_deref())?,
        vault_ids,
        working_directory: request.working_directory.as_deref(),
        title: request.title.as_deref(),
        collects_outputs,
        first,
    };
    Ok((new, template.agent))
}

/// One of the runtime's credentials is stored, or the environment brings it; and there is an
/// account to make Sprites in.
fn check_credentials(
    runtime: Runtime,
    stored: &[String],
    env_vars: &[String],
) -> Result<(), RpcError> {
    let has = |kind: CredentialKind| stored.iter().any(|stored| stored == kind.as_str());
    let brings = |kind: CredentialKind| {
        kind.env_var().is_some_and(|name| env_vars.iter().any(|var| var == name))
    };
    let serving = CredentialKind::serving(runtime);
    if !serving.is_empty() && !serving.into_iter().any(|kind| has(kind) || brings(kind)) {
        return Err(RpcError::invalid(format!("No API key configured for runtime: {runtime}")));
    }
    if !has(CredentialKind::Sprites) {
        return Err(RpcError::invalid("No backend credentials configured"));
    }
    Ok(())
}

pub async fn get(scheduler: Scheduler, request: GetSessionRequest) -> Result<Session, RpcError> {
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    let id: SessionId = request.session_id.parse().map_err(|_| missing())?;
    if request.recorded_through > 0 {
        wait_until_projected(&scheduler, id, request.recorded_through).await?;
    }
    if request.v1 {
        return get_v1(&scheduler, user, id).await;
    }
    let mut session = Session::from(find(&scheduler.pool, id, user).await?);
    match session.status.parse() {
        Ok(SessionStatus::Pending) => {
            session.waiting_on = waiting_on(&scheduler, &session).await?;
            session.queued_inputs = Some(inputs::list::waiting(&scheduler, id).await?.0);
        }
        Ok(SessionStatus::Running) => {
            let (queued, request) = inputs::list::waiting(&scheduler, id).await?;
            session.waiting_on = request.map(|(request, tool)| list::decision(request, &tool));
            session.queued_inputs = Some(queued);
        }
        _ => session.queued_inputs = Some(0),
    }
    Ok(session)
}

/// A session with all that the Managed Agents API shows, as it is at one moment.
async fn get_v1(scheduler: &Scheduler, user: UserId, id: SessionId) -> Result<Session, RpcError> {
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
    session.files = files::of_sessions(&scheduler.pool, &[id.uuid()], FileKind::Copy).await?;
    Ok(session)
}

/// The agent as a session has it.
async fn agent_of(
    scheduler: &Scheduler,
    session: &Session,
) -> Result<Option<contract::scheduler::Agent>, RpcError> {
    let Some(agent) = session.agent_id.as_deref().and_then(|id| id.parse().ok()) else {
        return Ok(None);
    };
    let mut connection = scheduler.pool.acquire().await?;
    Ok(agents::find_versions(&mut connection, &[agent], &[session.agent_row_version]).await?.pop())
}

/// Says for the user what a pending turn waits for.
async fn waiting_on(scheduler: &Scheduler, session: &Session) -> Result<Option<String>, RpcError> {
    let id: SessionId = session.session_id.parse().map_err(|_| missing())?;
    let row = sqlx::query(
        "select epoch, handed_back_reason from turn where session_id = $1 and turn_number = $2",
    )
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

/// The next turn of a completed session. Of two racing prompts one finds the session completed.
pub async fn prompt(
    scheduler: Scheduler,
    request: PromptRequest,
) -> Result<CreateSessionReply, RpcError> {
    let reply = idempotency::retried(|| async {
        let mut tx = scheduler.pool.begin().await?;
        let outcome = prompt_in(&mut tx, request.clone()).await;
        idempotency::finish(tx, outcome).await
    })
    .await?;
    scheduler.due.outbox.notify_one();
    let session = reply.session.as_ref().filter(|session| session.input.is_some());
    if let Some(id) = session.and_then(|session| session.session_id.parse().ok()) {
        scheduler.bus.hint(subject::inputs_hint(id)).await;
    }
    Ok(reply)
}

async fn prompt_in(
    tx: &mut PgConnection,
    request: PromptRequest,
) -> Result<CreateSessionReply, RpcError> {
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    let session: SessionId = request.session_id.parse().map_err(|_| missing())?;
    let route = format!("sessions/{session}/prompt");
    if let Some(session) = idempotency::earlier(tx, user, &route, request.once.as_ref()).await? {
        return Ok(CreateSessionReply { session: Some(session), replayed: true });
    }
    let row = lock(tx, session, Some(user)).await?.ok_or_else(missing)?;
    let when_busy = when_busy(&request, &row)?;
    if row.status()?.is_active() && when_busy != WhenBusy::Reject {
        let input =
            inputs::queue::enqueue(tx, &row, &request, when_busy == WhenBusy::Steer).await?;
        if when_busy == WhenBusy::Interrupt {
            inputs::interrupts::interrupt_in(tx, &row, &request.key_id).await?;
        }
        let session = Session { input: Some(input), ..Session::from(row) };
        idempotency::remember(tx, user, &route, request.once.as_ref(), &session).await?;
        return Ok(CreateSessionReply { session: Some(session), replayed: false });
    }
    if let Some(refusal) = row.status()?.prompt_refusal() {
        return Err(RpcError::conflict(refusal));
    }
    if row.sprite_destroyed_at.is_some() {
        return Err(RpcError::conflict(
            "Session backend is no longer available; start a new session.",
        ));
    }
    let row = turns::begin(tx, &row, &request.prompt, request.timeout_seconds, None).await?;
    let session = Session::from(row);
    idempotency::remember(tx, user, &route, request.once.as_ref(), &session).await?;
    Ok(CreateSessionReply { session: Some(session), replayed: false })
}

fn when_busy(request: &PromptRequest, session: &SessionRow) -> Result<WhenBusy, RpcError> {
    if request.when_busy.is_empty() {
        return Ok(WhenBusy::Reject);
    }
    let when_busy =
        request.when_busy.parse().map_err(|()| RpcError::invalid("Unknown when_busy"))?;
    let runtime: Runtime = session
        .runtime
        .parse()
        .map_err(|()| RpcError::internal("a session has an unknown runtime"))?;
    if when_busy == WhenBusy::Steer && !runtime.capabilities().steer {
        let message = format!(
            "Runtime {runtime} takes no message while a turn runs: when_busy can be 'reject', 'queue' or 'interrupt'"
        );
        return Err(RpcError::new(ErrorCode::Unprocessable, message));
    }
    Ok(when_busy)
}

pub async fn events(
    scheduler: Scheduler,
    request: ReadEventsRequest,
) -> Result<ReadEventsReply, RpcError> {
    let session: SessionId = request.session_id.parse().map_err(|_| missing())?;
    let from =
        request.before.map_or(event_log::From::After(request.after), event_log::From::Before);
    if request.without_output || (request.without_output_before && request.before.is_some()) {
        return shown_events(&scheduler, session, from, &request).await;
    }
    let events =
        event_log::page(&scheduler.pool, session, from, request.limit, request.max_bytes).await?;
    if !events.is_empty() {
        return Ok(ReadEventsReply { events, ..ReadEventsReply::default() });
    }
    let Some(partition) = partition_of(&scheduler, session).await? else { return Ok(deleted()) };
    // In this order: what was persisted up to there is seen by the query after it.
    let projected = projected_through(&scheduler.pool, partition).await?;
    let newest = event_log::newest(&scheduler.pool, session).await?;
    let is_complete = newest.as_ref().is_none_or(|newest| newest.event_id <= request.after);
    Ok(ReadEventsReply {
        newest,
        projected: if is_complete { projected } else { 0 },
        ..ReadEventsReply::default()
    })
}

async fn shown_events(
    scheduler: &Scheduler,
    session: SessionId,
    from: event_log::From,
    request: &ReadEventsRequest,
) -> Result<ReadEventsReply, RpcError> {
    let read =
        || event_log::shown(&scheduler.pool, session, from, request.limit, request.max_bytes);
    let event_log::Shown { mut events, mut read_through } = read().await?;
    let mut projected = 0;
    if events.is_empty() && read_through == 0 {
        let Some(partition) = partition_of(scheduler, session).await? else { return Ok(deleted()) };
        // In this order: what was persisted up to there is seen by the query after it.
        projected = projected_through(&scheduler.pool, partition).await?;
        event_log::Shown { events, read_through } = read().await?;
    }
    Ok(ReadEventsReply { events, read_through, projected, ..ReadEventsReply::default() })
}

fn deleted() -> ReadEventsReply {
    ReadEventsReply { session_deleted: true, ..ReadEventsReply::default() }
}

/// `None` where the session was deleted.
async fn partition_of(
    scheduler: &Scheduler,
    session: SessionId,
) -> Result<Option<Partition>, RpcError> {
    let number: Option<i16> =
        sqlx::query_scalar("select event_partition from session where session_id = $1")
            .bind(session.uuid())
            .fetch_optional(&scheduler.pool)
            .await?;
    number.map(partition).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credential_may_be_stored_or_come_with_the_environment() {
        let sprites = "backend:sprites".to_owned();
        let message = |runtime, stored: &[String], vars: &[String]| {
            check_credentials(runtime, stored, vars).err().map(|f| f.message)
        };
        let missing = Some("No API key configured for runtime: claude".to_owned());
        assert_eq!(message(Runtime::Claude, std::slice::from_ref(&sprites), &[]), missing);
        assert_eq!(
            message(Runtime::Claude, &[sprites.clone(), "provider:openai".into()], &[]),
            missing
        );
        assert_eq!(
            message(Runtime::Claude, &[sprites.clone(), "runtime_token:claude-oauth".into()], &[]),
            None
        );
        assert_eq!(
            message(Runtime::Claude, std::slice::from_ref(&sprites), &["ANTHROPIC_API_KEY".into()]),
            None
        );
        assert_eq!(message(Runtime::Shell, &[sprites], &[]), None);
        assert_eq!(
            message(Runtime::Shell, &[], &[]),
            Some("No backend credentials configured".to_owned())
        );
    }
}
