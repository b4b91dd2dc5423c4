//! Agents (docs/api.md §4): templates that sessions run.

pub mod mcp;
mod permissions;
mod skills;

use axum::{Json, extract::State, http::StatusCode};
use bus::RpcError;
use contract::{
    rpc,
    scheduler::{self, CreateAgentRequest, Cursor, GetAgentRequest, UpdateAgentRequest},
};
use serde::Serialize;
use serde_json::{Map, Value};
use types::{
    AgentId, ErrorCode, McpServer, ModelRef, Permissions, Provider, Runtime, Skill, Timestamp,
    limits::{BODY_BYTES_MAX, MODEL_CHARS_MAX, NAME_CHARS_MAX, TEXT_CHARS_MAX},
    model::{ModelError, quoted},
};
use utoipa::ToSchema;

use crate::{
    App,
    auth::Caller,
    body::{Body, FieldError, Fields},
    error::ApiError,
    idempotency::{Created, IdempotencyKey, IdempotencyParams},
    openapi::Conflict,
    page::{Listed, Page, PageParams, listed},
    path::{Id, IdParams},
    secrets::Kept,
};

/// An agent.
#[derive(Serialize, ToSchema)]
pub struct Agent {
    #[serde(flatten)]
    snapshot: AgentVersion,
    #[schema(format = DateTime)]
    updated_at: String,
    #[schema(format = DateTime)]
    archived_at: Option<String>,
}

/// An agent as it was at a version.
#[derive(Serialize, ToSchema)]
pub struct AgentVersion {
    /// The agent's id.
    #[schema(format = Uuid)]
    id: String,
    #[schema(pattern = "^agent$")]
    r#type: &'static str,
    name: String,
    description: Option<String>,
    /// Instructions that precede the first prompt.
    system: Option<String>,
    /// `provider/model_id`
    #[schema(example = "anthropic/claude-sonnet-4-5")]
    model: String,
    #[schema(example = "claude")]
    runtime: String,
    /// The model's provider.
    provider: Option<&'static str>,
    #[schema(format = Uuid)]
    environment_id: Option<String>,
    skills: Vec<Skill>,
    /// Secret values are returned as `***`.
    mcp_servers: Vec<McpServer>,
    permissions: Permissions,
    metadata: Map<String, Value>,
    version: u32,
    #[schema(format = DateTime)]
    created_at: String,
}

impl From<scheduler::Agent> for Agent {
    fn from(agent: scheduler::Agent) -> Self {
        let (updated_at, archived_at) = (time(agent.updated_at_us), agent.archived_at_us.map(time));
        Self { snapshot: agent.into(), updated_at, archived_at }
    }
}

impl From<scheduler::Agent> for AgentVersion {
    fn from(agent: scheduler::Agent) -> Self {
        let provider = agent
            .runtime
            .parse()
            .ok()
            .and_then(|runtime| ModelRef::parse(runtime, &agent.model).ok()?.provider());
        Self {
            id: agent.agent_id,
            r#type: "agent",
            name: agent.name,
            description: filled(agent.description),
            system: filled(agent.system),
            model: agent.model,
            runtime: agent.runtime,
            provider: provider.map(Provider::as_str),
            environment_id: agent.environment_id,
            skills: serde_json::from_str(&agent.skills).unwrap_or_default(),
            mcp_servers: serde_json::from_str(&agent.mcp_servers).unwrap_or_default(),
            permissions: serde_json::from_str(&agent.permissions).unwrap_or_default(),
            metadata: serde_json::from_str(&agent.metadata).unwrap_or_default(),
            version: agent.version,
            created_at: time(agent.created_at_us),
        }
    }
}

/// The contract writes an empty text as null.
pub fn filled(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

/// A time as the contract writes it.
pub fn time(micros: i64) -> String {
    Timestamp::from_unix_micros(micros).to_string()
}

/// A new agent.
#[derive(ToSchema)]
pub struct CreateAgent {
    #[schema(max_length = 200)]
    name: String,
    /// `provider/model_id`; the provider may be left out where the runtime has just one
    #[schema(max_length = 100, example = "claude-sonnet-4-5")]
    model: String,
    /// `claude`, `codex`, `gemini` or `opencode`. Required unless `provider` is given
    #[schema(example = "claude")]
    runtime: Option<String>,
    /// `anthropic`, `openai` or `google`: selects the provider's own runtime
    provider: Option<String>,
    #[schema(max_length = 262_144)]
    system: Option<String>,
    description: Option<String>,
    environment_id: Option<String>,
    #[schema(max_items = 20)]
    skills: Option<Vec<Skill>>,
    /// `type` may be left out: `url`
    #[schema(max_items = 20)]
    mcp_servers: Option<Vec<McpServer>>,
    /// What it may do without asking; everything if absent
    permissions: Option<Permissions>,
    metadata: Option<Map<String, Value>>,
    /// What its sessions may use together; see docs/budgets.md
    #[schema(value_type = Option<crate::budgets::NewBudget>)]
    budget: Option<scheduler::BudgetChange>,
}

impl CreateAgent {
    pub(crate) fn read(fields: &mut Fields) -> Self {
        let (name, model) =
            (fields.string("name", NAME_CHARS_MAX), fields.string("model", MODEL_CHARS_MAX));
        let provider = fields.optional_string("provider", BODY_BYTES_MAX);
        let runtime = match provider {
            Some(_) => fields.optional_string("runtime", BODY_BYTES_MAX),
            None => Some(fields.string("runtime", BODY_BYTES_MAX)),
        };
        Self {
            name,
            model,
            runtime,
            provider,
            system: fields.optional_string("system", TEXT_CHARS_MAX),
            description: fields.optional_string("description", BODY_BYTES_MAX),
            environment_id: fields.optional_string("environment_id", BODY_BYTES_MAX),
            skills: skills::read(fields),
            mcp_servers: mcp::read(fields),
            permissions: permissions::read(fields),
            metadata: fields.metadata("metadata"),
            budget: crate::budgets::read(fields),
        }
    }
}

/// Create an agent
#[utoipa::path(post, path = "/agents", tag = "agents", params(IdempotencyParams), request_body = CreateAgent,
    responses((status = 201, description = "The agent, at version 1", body = Agent), (status = 404, description = "No such environment", body = crate::error::ErrorBody), Conflict))]
pub async fn create(
    State(app): State<App>,
    caller: Caller,
    key: IdempotencyKey,
    body: Body,
) -> Result<Created<Agent>, ApiError> {
    let mut fields = body.fields()?;
    let agent = CreateAgent::read(&mut fields);
    let servers = agent.mcp_servers.unwrap_or_default();
    // `***` stands for a stored value, and a new agent has none.
    if let Some(error) = mcp::nothing_stored(&servers, &[]) {
        fields.add(error);
    }
    fields.finish()?;
    let runtime = choose_runtime(&app, agent.runtime.as_deref(), agent.provider.as_deref())?;
    let model = ModelRef::parse(runtime, &with_provider(agent.model, agent.provider.as_deref()))
        .map_err(unservable)?;
    let kept = mcp::keep(&app, &caller.user_id, &servers, None).await?;
    let request = CreateAgentRequest {
        user_id: caller.user_id,
        name: agent.name,
        description: agent.description.unwrap_or_default(),
        system: agent.system.unwrap_or_default(),
        model: model.as_str().to_owned(),
        runtime: runtime.as_str().to_owned(),
        environment_id: agent.environment_id,
        metadata: json(&agent.metadata.unwrap_or_default()),
        skills: json(&agent.skills.unwrap_or_default()),
        mcp_servers: mcp::redacted(servers),
        mcp_secret_id: kept.as_ref().map(|kept| kept.id.clone()),
        once: key.once(&body),
        agent_id: AgentId::new().to_string(),
        permissions: agent.permissions.as_ref().map(json).unwrap_or_default(),
        tools: String::new(),
        budget: agent.budget,
    };
    let reply = app.bus.call::<rpc::CreateAgent>(&request, crate::RPC_DEADLINE).await;
    app.forget_unless_used(kept, &reply, |reply| !reply.replayed).await;
    let reply = reply?;
    Ok(Created {
        status: StatusCode::CREATED,
        body: reply.agent.unwrap_or_default().into(),
        replayed: reply.replayed,
    })
}

/// JSON for the bus. Cannot fail: the keys of all our maps are strings.
pub fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// Adds the provider that a request names to a model id without one.
fn with_provider(model: String, provider: Option<&str>) -> String {
    match provider {
        Some(provider) if !model.contains('/') => format!("{provider}/{model}"),
        _ => model,
    }
}

fn unservable(error: ModelError) -> ApiError {
    match &error {
        ModelError::Unknown(model) => ApiError::fields(vec![FieldError::value(
            "model",
            &error.to_string(),
            model.as_str().into(),
        )]),
        ModelError::NotServed { .. } => {
            ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, &error.to_string())
        }
    }
}

/// The runtime by its name, or the one that a provider stands for.
fn choose_runtime(
    app: &App,
    runtime: Option<&str>,
    provider: Option<&str>,
) -> Result<Runtime, ApiError> {
    let bad = |text: String| ApiError::new(StatusCode::BAD_REQUEST, &text);
    let known = app.runtimes();
    let provider: Option<Provider> = match provider {
        None => None,
        Some(name) => Some(name.parse().map_err(|()| {
            bad(format!(
                "Unknown provider: {name}. Must be one of: {}",
                quoted(Provider::ALL.iter().map(|p| p.as_str()))
            ))
        })?),
    };
    if let Some(name) = runtime {
        let found = name.parse().ok().filter(|runtime| known.contains(runtime));
        return found.ok_or_else(|| {
            bad(format!(
                "Unknown runtime: {name}. Must be one of: {}",
                quoted(known.iter().map(|r| r.as_str()))
            ))
        });
    }
    Ok(match provider {
        None | Some(Provider::Anthropic) => Runtime::Claude,
        Some(Provider::Openai) => Runtime::Codex,
        Some(Provider::Google) => Runtime::Gemini,
    })
}

/// A change of an agent. What is absent or null stays as it is.
#[derive(ToSchema)]
pub struct UpdateAgent {
    /// The version that the change is made to
    version: i64,
    #[schema(max_length = 200)]
    name: Option<String>,
    #[schema(max_length = 100)]
    model: Option<String>,
    runtime: Option<String>,
    provider: Option<String>,
    #[schema(max_length = 262_144)]
    system: Option<String>,
    description: Option<String>,
    /// Null detaches the environment
    environment_id: Option<String>,
    #[schema(max_items = 20)]
    skills: Option<Vec<Skill>>,
    /// `***` in the place of a header's or variable's value keeps the stored one
    #[schema(max_items = 20)]
    mcp_servers: Option<Vec<McpServer>>,
    /// They replace the earlier ones
    permissions: Option<Permissions>,
    /// Merged per key; `""` deletes one
    metadata: Option<Map<String, Value>>,
}

impl UpdateAgent {
    pub(crate) fn read(fields: &mut Fields) -> Self {
        Self {
            version: fields.required_integer("version"),
            name: fields.optional_string("name", NAME_CHARS_MAX),
            model: fields.optional_string("model", MODEL_CHARS_MAX),
            runtime: fields.optional_string("runtime", BODY_BYTES_MAX),
            provider: fields.optional_string("provider", BODY_BYTES_MAX),
            system: fields.optional_string("system", TEXT_CHARS_MAX),
            description: fields.optional_string("description", BODY_BYTES_MAX),
            environment_id: fields.optional_string("environment_id", BODY_BYTES_MAX),
            skills: skills::read(fields),
            mcp_servers: mcp::read(fields),
            permissions: permissions::read(fields),
            metadata: fields.metadata("metadata"),
        }
    }
}

/// Change an agent
#[utoipa::path(put, path = "/agents/{id}", tag = "agents", params(IdParams), request_body = UpdateAgent,
    responses((status = 200, description = "The agent; its version is raised if anything changed", body = Agent), Conflict))]
pub async fn update(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
    body: Body,
) -> Result<Json<Agent>, ApiError> {
    let mut fields = body.fields()?;
    let detach_environment = fields.is_null("environment_id");
    let change = UpdateAgent::read(&mut fields);
    fields.finish()?;
    let runtime = match (&change.runtime, &change.provider) {
        (None, None) => None,
        (runtime, provider) => Some(choose_runtime(&app, runtime.as_deref(), provider.as_deref())?),
    };
    let servers = match change.mcp_servers {
        None => None,
        Some(servers) => Some(keep_servers(&app, &caller, &id, change.version, servers).await?),
    };
    let (mcp_servers, kept, secrets_of_version) = match servers {
        None => (None, None, None),
        Some(ServersOfVersion { redacted, kept, version }) => (Some(redacted), kept, Some(version)),
    };
    let provider = change.provider;
    let request = UpdateAgentRequest {
        user_id: caller.user_id,
        agent_id: id,
        version: change.version,
        name: change.name,
        description: change.description,
        system: change.system,
        model: change.model.map(|model| with_provider(model, provider.as_deref())),
        runtime: runtime.map(|runtime| runtime.as_str().to_owned()),
        environment_id: change.environment_id,
        detach_environment,
        metadata: change.metadata.as_ref().map(json),
        skills: change.skills.as_ref().map(json),
        mcp_servers,
        mcp_secret_id: kept.as_ref().map(|kept| kept.id.clone()),
        secrets_of_version,
        permissions: change.permissions.as_ref().map(json),
        tools: None,
    };
    let reply = app.bus.call::<rpc::UpdateAgent>(&request, crate::RPC_DEADLINE).await;
    app.forget_unless_used(kept, &reply, |_| true).await;
    Ok(Json(reply?.into()))
}

/// The MCP servers of a change, with their secrets in the vault.
pub struct ServersOfVersion {
    pub redacted: String,
    pub kept: Option<Kept>,
    /// The version whose stored values `***` stands for.
    pub version: u32,
}

pub async fn keep_servers(
    app: &App,
    caller: &Caller,
    id: &str,
    version: i64,
    servers: Vec<McpServer>,
) -> Result<ServersOfVersion, ApiError> {
    let request =
        GetAgentRequest { user_id: caller.user_id.clone(), agent_id: id.to_owned(), version: None };
    let current = match app.bus.call::<rpc::GetAgent>(&request, crate::RPC_DEADLINE).await {
        Ok(agent) => agent,
        // The scheduler answers that itself, after the checks that precede it.
        Err(RpcError { code: ErrorCode::NotFound, .. }) => scheduler::Agent::default(),
        Err(failure) => return Err(failure.into()),
    };
    let seen = current.version;
    let mut kept = None;
    if i64::from(seen) == version && current.archived_at_us.is_none() {
        let stored: Vec<McpServer> = serde_json::from_str(&current.mcp_servers).unwrap_or_default();
        if let Some(error) = mcp::nothing_stored(&servers, &stored) {
            return Err(ApiError::fields(vec![error]));
        }
        kept = mcp::keep(app, &caller.user_id, &servers, current.mcp_secret_id).await?;
    }
    Ok(ServersOfVersion { redacted: mcp::redacted(servers), kept, version: seen })
}

/// Get an agent
#[utoipa::path(get, path = "/agents/{id}", tag = "agents", params(IdParams),
    responses((status = 200, description = "The agent, archived or not", body = Agent)))]
pub async fn get(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<Json<Agent>, ApiError> {
    let agent = app
        .call::<rpc::GetAgent>(&GetAgentRequest {
            user_id: caller.user_id,
            agent_id: id,
            version: None,
        })
        .await?;
    Ok(Json(agent.into()))
}

/// Archive an agent
#[utoipa::path(post, path = "/agents/{id}/archive", tag = "agents", params(IdParams),
    responses((status = 200, description = "The agent, archived", body = Agent), Conflict))]
pub async fn archive(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<Json<Agent>, ApiError> {
    let agent = app
        .call::<rpc::ArchiveAgent>(&GetAgentRequest {
            user_id: caller.user_id,
            agent_id: id,
            version: None,
        })
        .await?;
    Ok(Json(agent.into()))
}

/// List agents that are not archived, newest first
#[utoipa::path(get, path = "/agents", tag = "agents", params(PageParams),
    responses((status = 200, description = "A page of agents", body = Listed<Agent>)))]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    page: Page,
) -> Result<Json<Listed<Agent>>, ApiError> {
    let reply = app.call::<rpc::ListAgents>(&page.request(caller)).await?;
    let cursor = |agent: &scheduler::Agent| Cursor {
        position: agent.created_at_us,
        id: agent.agent_id.clone(),
    };
    Ok(listed(reply.agents, reply.has_more, cursor, Agent::from))
}

/// List the versions of an agent, newest first
#[utoipa::path(get, path = "/agents/{id}/versions", tag = "agents", params(IdParams, PageParams),
    responses((status = 200, description = "A page of versions", body = Listed<AgentVersion>)))]
pub async fn versions(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
    page: Page,
) -> Result<Json<Listed<AgentVersion>>, ApiError> {
    let reply = app.call::<rpc::ListAgentVersions>(&page.request_parts(caller, id)).await?;
    let cursor =
        |agent: &scheduler::Agent| Cursor { position: agent.version.into(), id: String::new() };
    Ok(listed(reply.agents, reply.has_more, cursor, AgentVersion::from))
}
