//! Agents as `/v1` shows them.

use axum::{Json, extract::State};
use contract::{
    rpc,
    scheduler::{self, Cursor, ListRequest},
};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    App,
    auth::Caller,
    error::ApiError,
    v1::{
        ids::Prefix,
        page::{LIMITS, Page, PageParams, Wanted, page},
        query::Query,
        time,
    },
};

/// An agent.
#[derive(Serialize, ToSchema)]
#[schema(as = V1Agent)]
pub struct Agent {
    id: String,
    #[schema(pattern = "^agent$")]
    r#type: &'static str,
    version: u32,
    name: String,
    #[schema(format = DateTime)]
    created_at: String,
    #[schema(format = DateTime)]
    updated_at: String,
}

impl From<scheduler::Agent> for Agent {
    fn from(agent: scheduler::Agent) -> Self {
        Self {
            id: Prefix::Agent.of(&agent.agent_id),
            r#type: "agent",
            version: agent.version,
            name: agent.name,
            created_at: time(agent.created_at_us),
            updated_at: time(agent.updated_at_us),
        }
    }
}

/// List agents, newest first
#[utoipa::path(get, path = "/v1/agents", tag = "managed-agents", operation_id = "agents_list", params(PageParams),
    responses((status = 200, description = "A page of agents", body = Page<Agent>)))]
pub async fn list(State(app): State<App>, caller: Caller, query: Query) -> Result<Json<Page<Agent>>, ApiError> {
    let wanted = Wanted::of_fixed_order(&query, LIMITS)?;
    let request = ListRequest { user_id: caller.user_id, limit: wanted.limit, after: wanted.after(), ..ListRequest::default() };
    let reply = app.call::<rpc::ListAgents>(&request).await?;
    let cursor = |agent: &scheduler::Agent| Cursor { position: agent.created_at_us, id: agent.agent_id.clone() };
    Ok(page(reply.agents, reply.has_more, cursor, Agent::from))
}
