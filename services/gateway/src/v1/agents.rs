//! Agents under `/v1`.

use axum::{Json, extract::State};
use bus::RpcError;
use contract::{
    rpc,
    scheduler::{
        self, CreateAgentRequest, Cursor, GetAgentRequest, ListPartsRequest, ListRequest,
        UpdateAgentRequest,
    },
};
use serde::Serialize;
use serde_json::{Map, Value, json};
use types::{
    AgentId, ErrorCode, McpServer, Permissions, Runtime, Skill,
    agent::{McpTransport, REDACTED},
    limits::{AGENT_ITEMS_MAX, NAME_CHARS_MAX},
};
use utoipa::{IntoParams, ToSchema};

use crate::{
    App,
    agents::{filled, json as text, keep_servers, mcp},
    auth::Caller,
    body::{Body, Fields},
    error::ApiError,
    idempotency::{IdempotencyKey, IdempotencyParams},
    secrets::Kept,
    v1::{
        error::refused_field,
        ids::{PathId, Prefix},
        metadata,
        model::{self, Model, RUNTIME_KEY},
        page::{LIMITS, Page, PageParams, Wanted, page},
        path::IdParams,
        query::Query,
        time,
        tools::{self, Tool, is_word},
    },
};

const SYSTEM_CHARS_MAX: usize = 100_000;
const DESCRIPTION_CHARS_MAX: usize = 2048;
const URL_CHARS_MAX: usize = 2048;
/// Changes that were overtaken by another, where no version was named: the last one wins.
const ATTEMPTS: u32 = 5;

/// An agent.
#[derive(Serialize, ToSchema)]
#[schema(as = V1Agent)]
pub struct Agent {
    #[serde(flatten)]
    snapshot: Snapshot,
    metadata: Map<String, Value>,
    /// The CLI that runs it: an addition to the API.
    #[schema(example = "claude")]
    runtime: String,
    #[schema(format = DateTime)]
    created_at: String,
    #[schema(format = DateTime)]
    updated_at: String,
    #[schema(format = DateTime)]
    archived_at: Option<String>,
}

/// The settings of an agent, which a session shows too.
#[derive(Serialize, ToSchema)]
#[schema(as = V1AgentSnapshot)]
pub struct Snapshot {
    #[schema(example = "agent_011234567890123456789AbC")]
    id: String,
    #[schema(pattern = "^agent$")]
    r#type: &'static str,
    version: u32,
    name: String,
    description: Option<String>,
    system: Option<String>,
    model: Model,
    tools: Vec<Tool>,
    mcp_servers: Vec<ServerUrl>,
    skills: Vec<SkillRef>,
    #[schema(value_type = Option<Object>)]
    multiagent: Value,
    #[schema(value_type = Object)]
    execution_identity: Value,
}

/// An MCP server: its headers are shown by the original API alone, and without their values.
#[derive(Serialize, ToSchema)]
#[schema(as = V1McpServer)]
pub struct ServerUrl {
    #[schema(pattern = "^url$")]
    r#type: &'static str,
    name: String,
    url: String,
}

/// A skill of the original API.
#[derive(Serialize, ToSchema)]
#[schema(as = V1Skill)]
pub struct SkillRef {
    #[schema(pattern = "^custom$")]
    r#type: &'static str,
    skill_id: String,
    version: &'static str,
}

/// An agent's parts, as the scheduler has them.
struct Parts {
    runtime: Runtime,
    servers: Vec<McpServer>,
    permissions: Permissions,
    tools: Vec<Tool>,
}

impl Parts {
    fn of(agent: &scheduler::Agent) -> Self {
        let runtime = agent.runtime.parse().unwrap_or(Runtime::Shell);
        let servers: Vec<McpServer> = serde_json::from_str(&agent.mcp_servers).unwrap_or_default();
        let permissions = serde_json::from_str(&agent.permissions).unwrap_or_default();
        let tools = tools::shown(runtime, &agent.tools, &permissions, &servers);
        Self { runtime, servers, permissions, tools }
    }
}

impl From<&scheduler::Agent> for Snapshot {
    fn from(agent: &scheduler::Agent) -> Self {
        let Parts { servers, tools, .. } = Parts::of(agent);
        let skills: Vec<Skill> = serde_json::from_str(&agent.skills).unwrap_or_default();
        let skill = |skill: &Skill| SkillRef {
            r#type: "custom",
            skill_id: skill.identity().1.to_owned(),
            version: "1",
        };
        let server = |McpServer { name, transport }: McpServer| {
            let url = match transport {
                McpTransport::Url { url, .. } => url,
                McpTransport::Stdio { command, .. } => format!("stdio:{command}"),
            };
            ServerUrl { r#type: "url", name, url }
        };
        Self {
            id: Prefix::Agent.of(&agent.agent_id),
            r#type: "agent",
            version: agent.version,
            name: agent.name.clone(),
            description: filled(agent.description.clone()),
            system: filled(agent.system.clone()),
            model: Model::of(&agent.runtime, &agent.model),
            tools,
            mcp_servers: servers.into_iter().map(server).collect(),
            skills: skills.iter().map(skill).collect(),
            multiagent: Value::Null,
            execution_identity: json!({ "type": "service_account" }),
        }
    }
}

impl From<scheduler::Agent> for Agent {
    fn from(agent: scheduler::Agent) -> Self {
        Self {
            snapshot: Snapshot::from(&agent),
            metadata: metadata::shown(&agent.metadata),
            runtime: agent.runtime,
            created_at: time(agent.created_at_us),
            updated_at: time(agent.updated_at_us),
            archived_at: agent.archived_at_us.map(time),
        }
    }
}

// --- reading -----------------------------------------------------------------------------------

/// A new agent. In an update, every field may be absent; null clears.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes a body")]
pub struct AgentBody {
    #[schema(min_length = 1, max_length = 200)]
    name: String,
    /// A model's id, or an object with one: `claude-*`, `gpt-*`, `o*`, `codex-*`, `gemini-*`, or
    /// `provider/model` for opencode
    #[schema(value_type = String)]
    model: Value,
    #[schema(max_length = 100_000)]
    system: Option<String>,
    #[schema(max_length = 2048)]
    description: Option<String>,
    tools: Option<Vec<Tool>>,
    #[schema(max_items = 20)]
    mcp_servers: Option<Vec<ServerUrl>>,
    /// `aod.runtime` names the CLI where the model does not
    #[schema(value_type = Option<Object>)]
    metadata: Option<Value>,
    /// In an update: the version that it changes; without it the last change wins
    version: Option<u32>,
}

/// What a body says of an agent: a field is absent, cleared, or has a value.
#[derive(Clone)]
pub struct AgentFields {
    pub name: Option<String>,
    pub model: Option<String>,
    pub system: Option<String>,
    pub description: Option<String>,
    pub tools: Option<Vec<Tool>>,
    pub servers: Option<Vec<McpServer>>,
    pub metadata: Option<Map<String, Value>>,
    pub clear_skills: bool,
}

const KNOWN: [&str; 10] = [
    "name",
    "model",
    "system",
    "description",
    "tools",
    "mcp_servers",
    "metadata",
    "skills",
    "multiagent",
    "execution_identity",
];

impl AgentFields {
    /// Null clears what may be cleared.
    pub fn read(fields: &mut Fields) -> Self {
        let cleared = |fields: &Fields, name: &str| fields.is_null(name);
        let text = |fields: &mut Fields, name: &str, max: usize| {
            let null = cleared(fields, name).then(String::new);
            fields.optional_string(name, max).or(null)
        };
        let name = fields.optional_string("name", NAME_CHARS_MAX);
        fields.refuse_blank("name");
        for required in ["name", "model"] {
            if fields.is_null(required) {
                fields.refuse(required, "cannot be null");
            }
        }
        let agent = Self {
            name,
            model: model::read(fields),
            system: text(fields, "system", SYSTEM_CHARS_MAX),
            description: text(fields, "description", DESCRIPTION_CHARS_MAX),
            tools: tools::read(fields).or_else(|| cleared(fields, "tools").then(Vec::new)),
            servers: read_servers(fields).or_else(|| cleared(fields, "mcp_servers").then(Vec::new)),
            metadata: metadata::read(fields),
            clear_skills: fields.is_null("skills")
                || fields.value("skills").is_some_and(|skills| *skills == json!([])),
        };
        if fields.value("skills").is_some_and(|skills| *skills != json!([])) {
            fields.refuse("skills", "skills of this form are not supported: POST /agents takes inline and GitHub skills");
        }
        if fields.value("multiagent").is_some() {
            fields.refuse("multiagent", "is not supported");
        }
        let identity = fields.value("execution_identity");
        if identity.is_some_and(|identity| *identity != json!({ "type": "service_account" })) {
            fields.refuse("execution_identity", "can only be {\"type\": \"service_account\"}");
        }
        agent
    }
}

fn read_servers(fields: &mut Fields) -> Option<Vec<McpServer>> {
    let servers: Vec<McpServer> = fields
        .objects("mcp_servers", AGENT_ITEMS_MAX, |item| {
            item.allow_only(&["type", "name", "url"]);
            item.literal("type", "url");
            let name = item.named_string("name", NAME_CHARS_MAX)?;
            if !is_word(&name) {
                item.refuse("name", "may hold 1 to 128 letters, digits, '_' and '-'");
            }
            let url = item.named_string("url", URL_CHARS_MAX)?;
            if !url.starts_with("https://") && !url.starts_with("http://") {
                item.refuse("url", "must be an http or https URL");
            }
            Some(McpServer {
                name,
                transport: McpTransport::Url { url, headers: Default::default() },
            })
        })?
        .into_iter()
        .flatten()
        .collect();
    let mut names: Vec<_> = servers.iter().map(|server| server.name.clone()).collect();
    names.sort_unstable();
    if let Some([name, _]) = names.array_windows().find(|[one, other]| one == other) {
        fields.refuse("mcp_servers", &format!("duplicate name: {name}"));
    }
    Some(servers)
}

/// The permissions of tools, or why the runtime cannot enforce them.
pub fn permissions(
    runtime: Runtime,
    tools: &[Tool],
    servers: &[McpServer],
    current: &Permissions,
) -> Result<Permissions, ApiError> {
    tools::permissions(runtime, tools, servers, current)
        .map_err(|refused| refused_field(&refused.field, &refused.why))
}

// --- handlers ----------------------------------------------------------------------------------

/// Create an agent
#[utoipa::path(post, path = "/v1/agents", tag = "managed-agents", operation_id = "agents_create", params(IdempotencyParams), request_body = AgentBody,
    responses((status = 200, description = "The agent, at version 1", body = Agent)))]
pub async fn create(
    State(app): State<App>,
    caller: Caller,
    key: IdempotencyKey,
    body: Body,
) -> Result<Json<Agent>, ApiError> {
    let mut fields = body.fields()?;
    fields.allow_only(&KNOWN);
    fields.require(&["name", "model"]);
    let agent = AgentFields::read(&mut fields);
    fields.finish()?;
    let metadata = metadata::merged("{}", &agent.metadata.unwrap_or_default())
        .map_err(|why| refused_field("metadata", &why))?;
    let (runtime, model) =
        model::choose(&agent.model.unwrap_or_default(), &metadata, app.runtimes())
            .map_err(|why| refused_field("model", &why))?;
    let (tools, servers) = (agent.tools.unwrap_or_default(), agent.servers.unwrap_or_default());
    let permissions = permissions(runtime, &tools, &servers, &Permissions::default())?;
    let request = CreateAgentRequest {
        user_id: caller.user_id,
        name: agent.name.unwrap_or_default(),
        description: agent.description.unwrap_or_default(),
        system: agent.system.unwrap_or_default(),
        model,
        runtime: runtime.as_str().to_owned(),
        metadata: text(&metadata),
        skills: "[]".to_owned(),
        mcp_servers: mcp::redacted(servers),
        permissions: text(&permissions),
        tools: text(&tools),
        once: key.once(&body),
        agent_id: AgentId::new().to_string(),
        ..CreateAgentRequest::default()
    };
    let reply = app.call::<rpc::CreateAgent>(&request).await?;
    Ok(Json(reply.agent.unwrap_or_default().into()))
}

async fn find(
    app: &App,
    caller: &Caller,
    agent_id: &str,
    version: Option<u32>,
) -> Result<scheduler::Agent, ApiError> {
    let request =
        GetAgentRequest { user_id: caller.user_id.clone(), agent_id: agent_id.to_owned(), version };
    app.call::<rpc::GetAgent>(&request).await
}

/// Update an agent
#[utoipa::path(post, path = "/v1/agents/{id}", tag = "managed-agents", operation_id = "agents_update", params(IdParams), request_body = AgentBody,
    responses((status = 200, description = "The agent; its version is raised if anything changed", body = Agent)))]
pub async fn update(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
    body: Body,
) -> Result<Json<Agent>, ApiError> {
    let agent_id = Prefix::Agent.find(&id)?;
    for attempt in 1.. {
        let mut fields = body.fields()?;
        fields.allow_only(&[KNOWN.as_slice(), &["version"]].concat());
        let version = fields.integer("version", 1, i64::from(u32::MAX));
        let change = AgentFields::read(&mut fields);
        fields.finish()?;
        let current = find(&app, &caller, &agent_id, None).await?;
        let (request, kept) = changed(&app, &caller, current, change, version).await?;
        let reply = app.bus.call::<rpc::UpdateAgent>(&request, crate::RPC_DEADLINE).await;
        app.forget_unless_used(kept, &reply, |_| true).await;
        match reply {
            Err(RpcError { code: ErrorCode::Conflict, reason: None, .. })
                if version.is_none() && attempt < ATTEMPTS => {}
            reply => return Ok(Json(reply?.into())),
        }
    }
    Err(ApiError::not_found("Agent"))
}

/// The request that changes an agent as a body says.
async fn changed(
    app: &App,
    caller: &Caller,
    current: scheduler::Agent,
    change: AgentFields,
    version: Option<i64>,
) -> Result<(UpdateAgentRequest, Option<Kept>), ApiError> {
    let version = version.unwrap_or_else(|| current.version.into());
    let parts = Parts::of(&current);
    let patch = change.metadata.unwrap_or_default();
    let metadata = metadata::merged(&current.metadata, &patch)
        .map_err(|why| refused_field("metadata", &why))?;
    let shown = Model::of(&current.runtime, &current.model);
    let id = change.model.unwrap_or_else(|| shown.id().to_owned());
    let skills = change.clear_skills.then(|| "[]".to_owned());
    let mut request = UpdateAgentRequest {
        skills,
        user_id: caller.user_id.clone(),
        agent_id: current.agent_id.clone(),
        version,
        name: change.name,
        description: change.description,
        system: change.system,
        metadata: (!patch.is_empty()).then(|| text(&patch)),
        ..UpdateAgentRequest::default()
    };
    let mut runtime = parts.runtime;
    // An agent of the original API may run a model whose name says nothing: what is not changed
    // needs no explanation.
    if id != shown.id() || patch.contains_key(RUNTIME_KEY) {
        let model;
        (runtime, model) = model::choose(&id, &metadata, app.runtimes())
            .map_err(|why| refused_field("model", &why))?;
        request.model = Some(model);
        request.runtime = Some(runtime.as_str().to_owned());
    }
    let mut kept = None;
    let servers = match change.servers {
        None => parts.servers.clone(),
        Some(sent) => {
            let servers: Vec<McpServer> = sent
                .into_iter()
                .map(|server| with_stored_headers(server, &parts.servers))
                .collect();
            let stored =
                keep_servers(app, caller, &current.agent_id, version, servers.clone()).await?;
            request.mcp_servers = Some(stored.redacted);
            request.mcp_secret_id = stored.kept.as_ref().map(|kept| kept.id.clone());
            request.secrets_of_version = Some(stored.version);
            kept = stored.kept;
            servers
        }
    };
    if change.tools.is_some() || request.mcp_servers.is_some() || request.runtime.is_some() {
        let tools = change.tools.unwrap_or_else(|| parts.tools.clone());
        let meant = permissions(runtime, &tools, &servers, &parts.permissions)?;
        request.tools = (tools != parts.tools).then(|| text(&tools));
        request.permissions = Some(text(&meant));
    }
    Ok((request, kept))
}

/// An agent as a session has it, with changes of its own. They replace, and never merge.
///
/// # Errors
/// When a change is refused.
pub async fn overridden(
    app: &App,
    caller: &Caller,
    mut agent: scheduler::Agent,
    change: AgentFields,
) -> Result<(scheduler::Agent, Option<Kept>), ApiError> {
    let parts = Parts::of(&agent);
    let mut runtime = parts.runtime;
    if let Some(id) = change.model.filter(|id| id != Model::of(&agent.runtime, &agent.model).id()) {
        let metadata = serde_json::from_str(&agent.metadata).unwrap_or_default();
        (runtime, agent.model) = model::choose(&id, &metadata, app.runtimes())
            .map_err(|why| refused_field("agent.model", &why))?;
        runtime.as_str().clone_into(&mut agent.runtime);
    }
    agent.system = change.system.unwrap_or(agent.system);
    if change.clear_skills {
        "[]".clone_into(&mut agent.skills);
    }
    let mut kept = None;
    let servers = match change.servers {
        None => parts.servers.clone(),
        Some(sent) => {
            let servers: Vec<McpServer> = sent
                .into_iter()
                .map(|server| with_stored_headers(server, &parts.servers))
                .collect();
            kept = mcp::keep(app, &caller.user_id, &servers, agent.mcp_secret_id.clone()).await?;
            agent.mcp_secret_id = kept.as_ref().map(|kept| kept.id.clone());
            agent.mcp_servers = mcp::redacted(servers.clone());
            servers
        }
    };
    let tools = change.tools.unwrap_or_else(|| parts.tools.clone());
    let meant = permissions(runtime, &tools, &servers, &parts.permissions)?;
    if meant != parts.permissions {
        agent.permissions = text(&meant);
    }
    if tools != parts.tools {
        agent.tools = text(&tools);
    }
    Ok((agent, kept))
}

/// Headers are no part of this API: a server that stays keeps those that it has.
fn with_stored_headers(mut server: McpServer, stored: &[McpServer]) -> McpServer {
    let same = stored.iter().find(|stored| match (&stored.transport, &server.transport) {
        (McpTransport::Url { url: one, .. }, McpTransport::Url { url: other, .. }) => {
            stored.name == server.name && one == other
        }
        _ => false,
    });
    for name in same.into_iter().flat_map(|stored| stored.secrets().keys()) {
        server.secrets_mut().insert(name.clone(), REDACTED.to_owned());
    }
    server
}

#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes a query")]
pub struct VersionParams {
    /// The newest where it is absent
    #[param(minimum = 1)]
    version: Option<u32>,
}

/// Get an agent
#[utoipa::path(get, path = "/v1/agents/{id}", tag = "managed-agents", operation_id = "agents_retrieve", params(IdParams, VersionParams),
    responses((status = 200, description = "The agent, archived or not", body = Agent)))]
pub async fn get(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
    query: Query,
) -> Result<Json<Agent>, ApiError> {
    let version = query.number("version", u32::MAX)?;
    Ok(Json(find(&app, &caller, &Prefix::Agent.find(&id)?, version).await?.into()))
}

/// Archive an agent
#[utoipa::path(post, path = "/v1/agents/{id}/archive", tag = "managed-agents", operation_id = "agents_archive", params(IdParams),
    responses((status = 200, description = "The agent, archived now or before", body = Agent)))]
pub async fn archive(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
) -> Result<Json<Agent>, ApiError> {
    let request = GetAgentRequest {
        user_id: caller.user_id.clone(),
        agent_id: Prefix::Agent.find(&id)?,
        version: None,
    };
    match app.bus.call::<rpc::ArchiveAgent>(&request, crate::RPC_DEADLINE).await {
        // Archived before.
        Err(RpcError { code: ErrorCode::Conflict, .. }) => {
            Ok(Json(find(&app, &caller, &request.agent_id, None).await?.into()))
        }
        reply => Ok(Json(reply?.into())),
    }
}

#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes a query")]
pub struct ListParams {
    include_archived: Option<bool>,
    /// Created at this time or later
    #[param(rename = "created_at[gte]")]
    created_at_gte: Option<String>,
    /// Created at this time or before
    #[param(rename = "created_at[lte]")]
    created_at_lte: Option<String>,
}

/// A list of agents or environments as a query asks for it.
///
/// # Errors
/// 400 for a bad query.
pub fn list_request(
    query: &Query,
    wanted: &Wanted,
    user_id: String,
) -> Result<ListRequest, ApiError> {
    let after = |time: i64| time.saturating_add(1);
    let from = [query.time("created_at[gte]")?, query.time("created_at[gt]")?.map(after)];
    let before = [query.time("created_at[lt]")?, query.time("created_at[lte]")?.map(after)];
    Ok(ListRequest {
        user_id,
        limit: wanted.limit,
        after: wanted.after(),
        include_archived: query.flag("include_archived")?,
        created_from_us: from.into_iter().flatten().max(),
        created_before_us: before.into_iter().flatten().min(),
        ..ListRequest::default()
    })
}

/// List agents, newest first
#[utoipa::path(get, path = "/v1/agents", tag = "managed-agents", operation_id = "agents_list", params(PageParams, ListParams),
    responses((status = 200, description = "A page of agents", body = Page<Agent>)))]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    query: Query,
) -> Result<Json<Page<Agent>>, ApiError> {
    let wanted = Wanted::of_fixed_order(&query, LIMITS)?;
    let reply =
        app.call::<rpc::ListAgents>(&list_request(&query, &wanted, caller.user_id)?).await?;
    let cursor = |agent: &scheduler::Agent| Cursor {
        position: agent.created_at_us,
        id: agent.agent_id.clone(),
    };
    Ok(page(reply.agents, reply.has_more, cursor, Agent::from))
}

/// List the versions of an agent, newest first
#[utoipa::path(get, path = "/v1/agents/{id}/versions", tag = "managed-agents", operation_id = "agent_versions_list", params(IdParams, PageParams),
    responses((status = 200, description = "A page of versions", body = Page<Agent>)))]
pub async fn versions(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
    query: Query,
) -> Result<Json<Page<Agent>>, ApiError> {
    let wanted = Wanted::of_fixed_order(&query, LIMITS)?;
    let request = ListPartsRequest {
        user_id: caller.user_id,
        id: Prefix::Agent.find(&id)?,
        limit: wanted.limit,
        after: wanted.after(),
    };
    let reply = app.call::<rpc::ListAgentVersions>(&request).await?;
    let cursor =
        |agent: &scheduler::Agent| Cursor { position: agent.version.into(), id: String::new() };
    Ok(page(reply.agents, reply.has_more, cursor, Agent::from))
}
