//! Agents: templates that sessions run. Every version is kept.

use bus::Failure;
use contract::scheduler::{Agent, CreateAgentRequest, GetAgentRequest, ListAgentsReply, ListRequest};
use serde_json::Value;
use time::OffsetDateTime;
use types::{AgentId, EnvironmentId, UserId};
use uuid::Uuid;

use crate::{Scheduler, environments, micros, page_size, page_start, unsigned};

#[derive(sqlx::FromRow)]
struct AgentRow {
    agent_id: Uuid,
    name: String,
    description: String,
    system: String,
    model: String,
    runtime: String,
    environment_id: Option<Uuid>,
    metadata: Value,
    version: i32,
    created_at: OffsetDateTime,
    updated_at: OffsetDateTime,
    archived_at: Option<OffsetDateTime>,
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
            version: unsigned(row.version),
            created_at_us: micros(row.created_at),
            updated_at_us: micros(row.updated_at),
            archived_at_us: row.archived_at.map(micros),
            metadata: row.metadata.to_string(),
        }
    }
}

pub async fn create(scheduler: Scheduler, request: CreateAgentRequest) -> Result<Agent, Failure> {
    let user: UserId = request.user_id.parse().map_err(|_| Failure::not_found("User not found"))?;
    let metadata: Value = serde_json::from_str(&request.metadata).map_err(|_| Failure::invalid("Malformed metadata"))?;
    let environment = match &request.environment_id {
        None => None,
        Some(id) => {
            let id: EnvironmentId = id.parse().map_err(|_| environments::missing())?;
            let archived = environments::find_archived(&scheduler.pool, user, id).await?.ok_or_else(environments::missing)?;
            if archived {
                return Err(Failure::conflict("Cannot assign an archived environment to an agent"));
            }
            Some(id.uuid())
        }
    };
    let row: AgentRow = sqlx::query_as(
        "with a as (
            insert into agent (agent_id, user_id, environment_id) values ($1, $2, $3)
            returning *
         ), v as (
            insert into agent_version (agent_id, version, name, description, system, model, runtime, environment_id, metadata)
            values ($1, 1, $4, $5, $6, $7, $8, $3, $9)
            returning *
         )
         select a.agent_id, v.name, v.description, v.system, v.model, v.runtime, a.environment_id, v.metadata,
                a.version, a.created_at, a.updated_at, a.archived_at
         from a, v",
    )
    .bind(AgentId::new().uuid())
    .bind(user.uuid())
    .bind(environment)
    .bind(request.name)
    .bind(request.description)
    .bind(request.system)
    .bind(request.model)
    .bind(request.runtime)
    .bind(metadata)
    .fetch_one(&scheduler.pool)
    .await
    .map_err(Failure::internal)?;
    Ok(row.into())
}

pub async fn get(scheduler: Scheduler, request: GetAgentRequest) -> Result<Agent, Failure> {
    let missing = || Failure::not_found("Agent not found");
    let user: UserId = request.user_id.parse().map_err(|_| missing())?;
    let agent: AgentId = request.agent_id.parse().map_err(|_| missing())?;
    let row: Option<AgentRow> = sqlx::query_as(
        "select a.agent_id, v.name, v.description, v.system, v.model, v.runtime, a.environment_id, v.metadata,
                a.version, a.created_at, a.updated_at, a.archived_at
         from agent a
         join agent_version v using (agent_id, version)
         where a.agent_id = $1 and a.user_id = $2",
    )
    .bind(agent.uuid())
    .bind(user.uuid())
    .fetch_optional(&scheduler.pool)
    .await
    .map_err(Failure::internal)?;
    row.map(Agent::from).ok_or_else(missing)
}

pub async fn list(scheduler: Scheduler, request: ListRequest) -> Result<ListAgentsReply, Failure> {
    let user: UserId = request.user_id.parse().map_err(|_| Failure::not_found("User not found"))?;
    let (limit, (time, id)) = (page_size(request.limit), page_start(request.before.as_ref())?);
    let mut rows: Vec<AgentRow> = sqlx::query_as(
        "select a.agent_id, v.name, v.description, v.system, v.model, v.runtime, a.environment_id, v.metadata,
                a.version, a.created_at, a.updated_at, a.archived_at
         from agent a
         join agent_version v using (agent_id, version)
         where a.user_id = $1 and a.archived_at is null and (a.created_at, a.agent_id) < ($2, $3)
         order by a.created_at desc, a.agent_id desc
         limit $4",
    )
    .bind(user.uuid())
    .bind(time)
    .bind(id)
    .bind(limit as i64 + 1)
    .fetch_all(&scheduler.pool)
    .await
    .map_err(Failure::internal)?;
    let has_more = rows.len() > limit;
    rows.truncate(limit);
    Ok(ListAgentsReply { agents: rows.into_iter().map(Agent::from).collect(), has_more })
}
