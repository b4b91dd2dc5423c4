//! Agents: templates that sessions run. Every version is kept.

use bus::RpcError;
use contract::scheduler::{
    Agent, CreateAgentReply, CreateAgentRequest, GetAgentRequest, ListAgentsReply,
    ListPartsRequest, ListRequest, UpdateAgentRequest,
};
use serde_json::{Map, Value};
use sqlx::PgConnection;
use time::OffsetDateTime;
use types::{
    AgentId, EnvironmentId, ErrorCode, ModelRef, Permissions, Runtime, SessionId, UserId,
    agent::merge_metadata, model::ModelError,
};
use uuid::Uuid;

use crate::{
    Scheduler,
    catalog::environments,
    db::{
        idempotency,
        page::{List, OwnedList, PageStart, check_size},
    },
    micros,
    models::{budgets, limits::Scope},
    now, parsed_json, secret_id, unsigned, version_mismatch,
};

#[derive(Clone, PartialEq, sqlx::FromRow)]
pub struct AgentRow {
    agent_id: Uuid,
    name: String,
    description: String,
    system: String,
    pub model: String,
    pub runtime: String,
    environment_id: Option<Uuid>,
    metadata: Value,
    skills: Value,
    mcp_servers: Value,
    mcp_secret_id: Option<Uuid>,
    permissions: Option<Value>,
    tools: Option<Value>,
    pub version: i32,
    #[sqlx(default)]
    base_version: Option<i32>,
    created_at: OffsetDateTime,
    updated_at: OffsetDateTime,
    pub archived_at: Option<OffsetDateTime>,
}

impl From<AgentRow> for Agent {
    fn from(row: AgentRow) -> Self {
        Self {
            agent_id: row.agent_id.to_string(),
            name: row.name,
            description: row.description,
            system: row.system,
            model: row.model,
            runtime: row.runtime,
            environment_id: row.environment_id.map(|id| id.to_string()),
            version: unsigned(row.base_version.unwrap_or(row.version)),
            row_version: row.version,
            created_at_us: micros(row.created_at),
            updated_at_us: micros(row.updated_at),
            archived_at_us: row.archived_at.map(micros),
            metadata: row.metadata.to_string(),
            skills: row.skills.to_string(),
            mcp_servers: row.mcp_servers.to_string(),
            mcp_secret_id: row.mcp_secret_id.map(|id| id.to_string()),
            permissions: row
                .permissions
                .map(|permissions| permissions.to_string())
                .unwrap_or_default(),
            tools: row.tools.map(|tools| tools.to_string()).unwrap_or_default(),
        }
    }
}

fn missing() -> RpcError {
    RpcError::not_found("Agent not found")
}

/// An environment that an agent may be given.
async fn usable_environment(
    tx: &mut PgConnection,
    user: UserId,
    id: &str,
) -> Result<Uuid, RpcError> {
    let id: EnvironmentId = id.parse().map_err(|_| environments::missing())?;
    let archived =
        environments::find_archived(tx, user, id).await?.ok_or_else(environments::missing)?;
    if archived {
        return Err(RpcError::conflict("Cannot assign an archived environment to an agent"));
    }
    Ok(id.uuid())
}

/// As a column has them: null where they allow everything.
fn permissions(text: &str) -> Result<Option<Value>, RpcError> {
    if text.is_empty() {
        return Ok(None);
    }
    let permissions: Permissions =
        serde_json::from_str(text).map_err(|_| RpcError::invalid("Malformed permissions"))?;
    if permissions == Permissions::default() {
        return Ok(None);
    }
    serde_json::to_value(permissions).map(Some).map_err(RpcError::internal)
}

/// As a column has them: null where they follow from the permissions.
fn tools(text: &str) -> Result<Option<Value>, RpcError> {
    if text.is_empty() { Ok(None) } else { parsed_json(text).map(Some) }
}

/// A runtime that cannot ask cannot be restricted either.
fn check_permissions(agent: &AgentRow) -> Result<(), RpcError> {
    let permissions = agent
        .permissions
        .clone()
        .map(serde_json::from_value::<Permissions>)
        .transpose()
        .map_err(RpcError::internal)?;
    let can_ask = agent
        .runtime
        .parse::<Runtime>()
        .is_ok_and(|runtime| runtime.capabilities().permission_requests);
    if can_ask || !permissions.is_some_and(|permissions| permissions.restrict()) {
        return Ok(());
    }
    let message = format!(
        "Runtime {} cannot ask before it uses a tool: its permissions have to be 'allow'",
        agent.runtime
    );
    Err(RpcError::new(ErrorCode::Unprocessable, message))
}

pub async fn create(
    scheduler: Scheduler,
    request: CreateAgentRequest,
) -> Result<CreateAgentReply, RpcError> {
    let outcome = idempotency::retried(|| async {
        let mut tx = scheduler.pool.begin().await?;
        let outcome = create_in(&mut tx, request.clone()).await;
        idempotency::finish(tx, outcome).await
    })
    .await;
    let (user_id, agent_id) = (request.user_id, request.agent_id.clone());
    let earlier = async {
        let agent =
            get(scheduler.clone(), GetAgentRequest { user_id, agent_id, version: None }).await?;
        Ok(CreateAgentReply { agent: Some(agent), replayed: false })
    };
    idempotency::or_created_earlier(outcome, &request.agent_id, earlier).await
}

/// The route of idempotency keys of creations.
const ROUTE: &str = "agents";

async fn create_in(
    tx: &mut PgConnection,
    request: CreateAgentRequest,
) -> Result<CreateAgentReply, RpcError> {
    let user: UserId =
        request.user_id.parse().map_err(|_| RpcError::not_found("User not found"))?;
    let id = idempotency::chosen(&request.agent_id, AgentId::new)?;
    let earlier = idempotency::earlier_creation::<Agent>(
        tx,
        user,
        ROUTE,
        request.once.as_ref(),
        &request.agent_id,
    );
    if let Some(agent) = earlier.await? {
        return Ok(CreateAgentReply {
            replayed: agent.agent_id != request.agent_id,
            agent: Some(agent),
        });
    }
    let environment_id = match &request.environment_id {
        None => None,
        Some(id) => Some(usable_environment(tx, user, id).await?),
    };
    let now = now();
    let row = AgentRow {
        agent_id: id.uuid(),
        name: request.name,
        description: request.description,
        system: request.system,
        model: request.model,
        runtime: request.runtime,
        environment_id,
        metadata: parsed_json(&request.metadata)?,
        skills: parsed_json(&request.skills)?,
        mcp_servers: parsed_json(&request.mcp_servers)?,
        mcp_secret_id: secret_id(request.mcp_secret_id.as_deref())?,
        permissions: permissions(&request.permissions)?,
        tools: tools(&request.tools)?,
        version: 1,
        base_version: None,
        created_at: now,
        updated_at: now,
        archived_at: None,
    };
    check_permissions(&row)?;
    sqlx::query("insert into agent (agent_id, user_id, environment_id, created_at, updated_at) values ($1, $2, $3, $4, $4)")
        .bind(row.agent_id)
        .bind(user.uuid())
        .bind(environment_id)
        .bind(now)
        .execute(&mut *tx)
        .await
        .map_err(|error| idempotency::not_inserted(error, "agent_pkey"))?;
    insert_version(tx, &row).await?;
    if let Some(budget) = &request.budget {
        budgets::write(tx, Scope::Agent, row.agent_id, budget).await?;
    }
    let agent = Agent::from(row);
    idempotency::remember(tx, user, ROUTE, request.once.as_ref(), &agent).await?;
    Ok(CreateAgentReply { agent: Some(agent), replayed: false })
}

async fn insert_version(tx: &mut PgConnection, row: &AgentRow) -> Result<(), RpcError> {
    // Fields that are changed one by one could add up to more than an answer may hold.
    let texts =
        [&row.name, &row.description, &row.system].map(String::len).into_iter().sum::<usize>();
    let documents = [
        Some(&row.metadata),
        Some(&row.skills),
        Some(&row.mcp_servers),
        row.permissions.as_ref(),
        row.tools.as_ref(),
    ];
    let documents =
        documents.into_iter().flatten().map(|value| value.to_string().len()).sum::<usize>();
    check_size("agent", texts + documents)?;
    sqlx::query(
        "insert into agent_version (agent_id, version, name, description, system, model, runtime, environment_id, metadata, skills,
                                    mcp_servers, mcp_secret_id, created_at, permissions, tools, base_version)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)",
    )
    .bind(row.agent_id)
    .bind(row.version)
    .bind(&row.name)
    .bind(&row.description)
    .bind(&row.system)
    .bind(&row.model)
    .bind(&row.runtime)
    .bind(row.environment_id)
    .bind(&row.metadata)
    .bind(&row.skills)
    .bind(&row.mcp_servers)
    .bind(row.mcp_secret_id)
    .bind(row.updated_at)
    .bind(&row.permissions)
    .bind(&row.tools)
    .bind(row.base_version)
    .execute(tx)
    .await?;
    Ok(())
}

/// A session's own version of its agent: a row like the others, of a negative number, that no list
/// shows.
pub async fn override_agent(
    tx: &mut PgConnection,
    agent: Uuid,
    session: SessionId,
    changed: &Agent,
) -> Result<i32, RpcError> {
    let number: i32 = sqlx::query_scalar("select -nextval('agent_override_number')::integer")
        .fetch_one(&mut *tx)
        .await?;
    insert_override(tx, agent, number, changed).await?;
    // They go together.
    sqlx::query("update agent_version set session_id = $3 where agent_id = $1 and version = $2")
        .bind(agent)
        .bind(number)
        .bind(session.uuid())
        .execute(tx)
        .await?;
    Ok(number)
}

/// Writes a session's own version of an agent.
async fn insert_override(
    tx: &mut PgConnection,
    agent: Uuid,
    number: i32,
    changed: &Agent,
) -> Result<(), RpcError> {
    let now = now();
    let row = AgentRow {
        agent_id: agent,
        name: changed.name.clone(),
        description: changed.description.clone(),
        system: changed.system.clone(),
        model: changed.model.clone(),
        runtime: changed.runtime.clone(),
        environment_id: None,
        metadata: parsed_json(&changed.metadata)?,
        skills: parsed_json(&changed.skills)?,
        mcp_servers: parsed_json(&changed.mcp_servers)?,
        mcp_secret_id: secret_id(changed.mcp_secret_id.as_deref())?,
        permissions: permissions(&changed.permissions)?,
        tools: tools(&changed.tools)?,
        version: number,
        base_version: Some(i32::try_from(changed.version).unwrap_or(i32::MAX)),
        created_at: now,
        updated_at: now,
        archived_at: None,
    };
    check_permissions(&row)?;
    insert_version(tx, &row).await
}

/// The rows of versions, also of sessions' own ones: pairs of an agent and a row's number.
pub async fn find_versions(
    connection: &mut PgConnection,
    agents: &[Uuid],
    versions: &[i32],
) -> Result<Vec<Agent>, RpcError> {
    let rows: Vec<AgentRow> = sqlx::query_as(
        "select a.agent_id, v.name, v.description, v.system, v.model, v.runtime, a.environment_id, v.metadata, v.skills,
                v.mcp_servers, v.mcp_secret_id, v.permissions, v.tools, v.version, v.base_version, a.created_at, a.updated_at,
                a.archived_at
         from (select distinct * from unnest($1::uuid[], $2::integer[]) as asked (agent_id, version)) asked
         join agent a using (agent_id)
         join agent_version v on v.agent_id = asked.agent_id and v.version = asked.version",
    )
    .bind(agents)
    .bind(versions)
    .fetch_all(connection)
    .await?;
    Ok(rows.into_iter().map(Agent::from).collect())
}

/// Checks in the contract's order (docs/api.md §4); a real change is a new version.
pub async fn update(scheduler: Scheduler, request: UpdateAgentRequest) -> Result<Agent, RpcError> {
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    let mut tx = scheduler.pool.begin().await?;
    let environment_id = match &request.environment_id {
        None => None,
        Some(id) => Some(usable_environment(&mut tx, user, id).await?),
    };
    let agent: AgentId = request.agent_id.parse().map_err(|_| missing())?;
    // Locked by itself: a lock within the join below would see the row's newest version beside the
    // join's older one.
    sqlx::query("select from agent where agent_id = $1 and user_id = $2 for update")
        .bind(agent.uuid())
        .bind(user.uuid())
        .execute(&mut *tx)
        .await?;
    let current: AgentRow = sqlx::query_as(
        "select a.agent_id, v.name, v.description, v.system, v.model, v.runtime, a.environment_id, v.metadata, v.skills,
                v.mcp_servers, v.mcp_secret_id, v.permissions, v.tools, a.version, a.created_at, a.updated_at, a.archived_at
         from agent a
         join agent_version v using (agent_id, version)
         where a.agent_id = $1 and a.user_id = $2",
    )
    .bind(agent.uuid())
    .bind(user.uuid())
    .fetch_optional(&mut *tx)
    .await?
    .ok_or_else(missing)?;
    if current.archived_at.is_some() {
        return Err(RpcError::conflict("Cannot update an archived agent").because("agent_archived"));
    }
    version_mismatch(current.version, request.version, request.secrets_of_version)?;

    let mut new = current.clone();
    new.name = request.name.unwrap_or(new.name);
    new.description = request.description.unwrap_or(new.description);
    new.system = request.system.unwrap_or(new.system);
    if request.model.is_some() || request.runtime.is_some() {
        let runtime = request.runtime.unwrap_or(new.runtime);
        let parsed: Runtime = runtime
            .parse()
            .map_err(|()| RpcError::internal(format!("agent {agent} has runtime {runtime}")))?;
        let model = request.model.unwrap_or(new.model);
        new.model = ModelRef::parse(parsed, &model)
            .map_err(|error| unservable(&error, &model))?
            .as_str()
            .to_owned();
        new.runtime = runtime;
    }
    if request.detach_environment || environment_id.is_some() {
        new.environment_id = environment_id;
    }
    if let Some(change) = &request.metadata {
        let change: Map<String, Value> =
            serde_json::from_str(change).map_err(|_| RpcError::invalid("Malformed metadata"))?;
        let old = current.metadata.as_object().cloned().unwrap_or_default();
        new.metadata = Value::Object(merge_metadata(old, change));
    }
    if let Some(skills) = &request.skills {
        new.skills = parsed_json(skills)?;
    }
    if let Some(servers) = &request.mcp_servers {
        new.mcp_servers = parsed_json(servers)?;
        new.mcp_secret_id = secret_id(request.mcp_secret_id.as_deref())?;
    }
    if let Some(change) = &request.permissions {
        new.permissions = permissions(change)?;
    }
    if let Some(change) = &request.tools {
        new.tools = tools(change)?;
    }
    check_permissions(&new)?;
    if new == current {
        return Ok(current.into());
    }
    new.version += 1;
    new.updated_at = now();
    insert_version(&mut tx, &new).await?;
    sqlx::query(
        "update agent set version = $2, environment_id = $3, updated_at = $4 where agent_id = $1",
    )
    .bind(new.agent_id)
    .bind(new.version)
    .bind(new.environment_id)
    .bind(new.updated_at)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(new.into())
}

fn unservable(error: &ModelError, model: &str) -> RpcError {
    let failure = RpcError::new(ErrorCode::Unprocessable, error.to_string());
    match error {
        ModelError::Unknown(_) => failure.at_field("model", model),
        ModelError::NotServed { .. } => failure,
    }
}

pub async fn archive(scheduler: Scheduler, request: GetAgentRequest) -> Result<Agent, RpcError> {
    let agent: AgentId = request.agent_id.parse().map_err(|_| missing())?;
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    let archived = sqlx::query(
        "update agent
         set archived_at = now(), updated_at = now()
         where agent_id = $1 and user_id = $2 and archived_at is null",
    )
    .bind(agent.uuid())
    .bind(user.uuid())
    .execute(&scheduler.pool)
    .await?;
    let agent = get(scheduler, request).await?;
    if archived.rows_affected() == 0 {
        Err(RpcError::conflict("Agent is already archived"))
    } else {
        Ok(agent)
    }
}

pub async fn get(scheduler: Scheduler, request: GetAgentRequest) -> Result<Agent, RpcError> {
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    let agent: AgentId = request.agent_id.parse().map_err(|_| missing())?;
    let row: Option<AgentRow> = sqlx::query_as(
        "select a.agent_id, v.name, v.description, v.system, v.model, v.runtime, a.environment_id, v.metadata, v.skills,
                v.mcp_servers, v.mcp_secret_id, v.permissions, v.tools, v.version, a.created_at,
                case when v.version = a.version then a.updated_at else v.created_at end as updated_at, a.archived_at
         from agent a
         join agent_version v on v.agent_id = a.agent_id and v.version = coalesce($3, a.version) and v.version > 0
         where a.agent_id = $1 and a.user_id = $2",
    )
    .bind(agent.uuid())
    .bind(user.uuid())
    .bind(request.version.map(|version| i32::try_from(version).unwrap_or(i32::MAX)))
    .fetch_optional(&scheduler.pool)
    .await?;
    row.map(Agent::from).ok_or_else(missing)
}

pub async fn list(scheduler: Scheduler, request: ListRequest) -> Result<ListAgentsReply, RpcError> {
    let list = OwnedList {
        owned: "agent",
        table: "agent a join agent_version v using (agent_id, version)",
        bytes: VERSION_BYTES,
        columns: "agent_id, v.name, v.description, v.system, v.model, v.runtime, a.environment_id, v.metadata, v.skills, v.mcp_servers,
                  v.mcp_secret_id, v.permissions, v.tools, version, a.created_at, a.updated_at, a.archived_at",
    };
    let (rows, has_more): (Vec<AgentRow>, _) = list.read(&scheduler.pool, &request).await?;
    Ok(ListAgentsReply { agents: rows.into_iter().map(Agent::from).collect(), has_more })
}

/// The size of a version `v` in an answer, at least.
const VERSION_BYTES: &str = "coalesce(octet_length(v.permissions::text), 0) + coalesce(octet_length(v.tools::text), 0) + octet_length(v.name) + octet_length(v.description) + octet_length(v.system) + octet_length(v.metadata::text)
                             + octet_length(v.skills::text) + octet_length(v.mcp_servers::text) + 500";

/// The snapshots of an agent, newest first. Both times of each are the snapshot's.
pub async fn versions(
    scheduler: Scheduler,
    request: ListPartsRequest,
) -> Result<ListAgentsReply, RpcError> {
    let agent: AgentId = request.id.parse().map_err(|_| missing())?;
    let newest = GetAgentRequest { user_id: request.user_id, agent_id: request.id, version: None };
    let archived_at_us = get(scheduler.clone(), newest).await?.archived_at_us;
    let start = PageStart::by_number_downwards(request.limit, request.after.as_ref());
    let list = List {
        keys: "select version from agent_version where agent_id = $1 and version < $3 and version > 0 order by version desc limit $2 + 1",
        table: "agent_version v",
        by_key: "agent_id = $1 and version",
        bytes: VERSION_BYTES,
        columns:
            "agent_id, name, description, system, model, runtime, environment_id, metadata, skills, mcp_servers, mcp_secret_id, permissions,
                  tools, version, created_at, created_at as updated_at, null::timestamptz as archived_at",
    };
    let page = list.read(&scheduler.pool, |query| {
        query.bind(agent.uuid()).bind(start.limit).bind(start.number)
    });
    let (rows, has_more): (Vec<AgentRow>, _) = page.await?;
    Ok(ListAgentsReply {
        agents: rows.into_iter().map(|row| Agent { archived_at_us, ..row.into() }).collect(),
        has_more,
    })
}
