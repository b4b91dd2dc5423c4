//! Agents (contract §4): create, get, list.

use axum::{
    Json,
    extract::{Path, State},
    http::StatusCode,
};
use contract::{
    rpc,
    scheduler::{Agent, CreateAgentRequest, GetAgentRequest},
};
use serde_json::{Value, json};
use types::{
    ModelRef, Provider, Runtime, Timestamp,
    limits::{BODY_BYTES_MAX, MODEL_CHARS_MAX, NAME_CHARS_MAX},
    model::{ModelError, quoted},
};

use crate::{
    App,
    auth::Caller,
    body::{Body, FieldError},
    error::ApiError,
    page::{Page, envelope},
};

pub async fn create(State(app): State<App>, caller: Caller, body: Body) -> Result<(StatusCode, Json<Value>), ApiError> {
    let mut fields = body.fields()?;
    let name = fields.string("name", NAME_CHARS_MAX);
    let model = fields.string("model", MODEL_CHARS_MAX);
    let provider = fields.optional_string("provider", 32);
    let runtime =
        if provider.is_some() { fields.optional_string("runtime", BODY_BYTES_MAX) } else { Some(fields.string("runtime", BODY_BYTES_MAX)) };
    let system = fields.optional_string("system", BODY_BYTES_MAX).unwrap_or_default();
    let description = fields.optional_string("description", BODY_BYTES_MAX).unwrap_or_default();
    let environment_id = fields.optional_string("environment_id", BODY_BYTES_MAX);
    fields.not_yet("skills");
    fields.not_yet("mcp_servers");
    let metadata = fields.object("metadata");
    let without_nul = !system.contains('\0') && !description.contains('\0') && !name.contains('\0') && !model.contains('\0');
    if !without_nul || Value::Object(metadata.clone()).to_string().contains("\\u0000") {
        fields.add(FieldError::value("name", "text must not contain NUL", Value::Null));
    }
    fields.finish()?;
    let runtime = choose_runtime(&app, runtime.as_deref(), provider.as_deref())?;
    let model = ModelRef::parse(runtime, &model).map_err(|error| match error {
        ModelError::Unknown(_) => ApiError::fields(vec![FieldError::value("model", &error.to_string(), model.into())]),
        ModelError::NotServed { .. } => ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, &error.to_string()),
    })?;
    let request = CreateAgentRequest {
        user_id: caller.user_id,
        name,
        description,
        system,
        model: model.as_str().to_owned(),
        runtime: runtime.as_str().to_owned(),
        environment_id,
        metadata: Value::Object(metadata).to_string(),
    };
    let agent = app.call::<rpc::CreateAgent>(&request).await?;
    Ok((StatusCode::CREATED, Json(describe(agent))))
}

/// The runtime by its name, or the one that a provider stands for.
fn choose_runtime(app: &App, runtime: Option<&str>, provider: Option<&str>) -> Result<Runtime, ApiError> {
    let bad = |text: String| ApiError::new(StatusCode::BAD_REQUEST, &text);
    let known = app.runtimes();
    if let Some(name) = runtime {
        let found = name.parse().ok().filter(|runtime| known.contains(runtime));
        return found.ok_or_else(|| bad(format!("Unknown runtime: {name}. Must be one of: {}", quoted(known.iter().map(|r| r.as_str())))));
    }
    let name = provider.unwrap_or_default();
    match name.parse() {
        Ok(Provider::Anthropic) => Ok(Runtime::Claude),
        Ok(Provider::Openai) => Ok(Runtime::Codex),
        Ok(Provider::Google) => Ok(Runtime::Gemini),
        Err(()) => Err(bad(format!("Unknown provider: {name}. Must be one of: {}", quoted(Provider::ALL.iter().map(|p| p.as_str()))))),
    }
}

pub async fn get(State(app): State<App>, caller: Caller, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let agent = app.call::<rpc::GetAgent>(&GetAgentRequest { user_id: caller.user_id, agent_id: id }).await?;
    Ok(Json(describe(agent)))
}

pub async fn list(State(app): State<App>, caller: Caller, page: Page) -> Result<Json<Value>, ApiError> {
    let reply = app.call::<rpc::ListAgents>(&page.request(caller)).await?;
    let last = reply.agents.last().map(|agent| (agent.created_at_us, agent.agent_id.clone()));
    Ok(envelope(reply.agents.into_iter().map(describe).collect(), reply.has_more, last))
}

fn describe(agent: Agent) -> Value {
    let provider = agent.runtime.parse().ok().and_then(|runtime| ModelRef::parse(runtime, &agent.model).ok()?.provider());
    let filled = |text: String| Some(text).filter(|text| !text.is_empty());
    json!({
        "id": agent.agent_id,
        "type": "agent",
        "name": agent.name,
        "description": filled(agent.description),
        "system": filled(agent.system),
        "model": agent.model,
        "runtime": agent.runtime,
        "provider": provider.map(Provider::as_str),
        "environment_id": agent.environment_id,
        "skills": [],
        "mcp_servers": [],
        "metadata": serde_json::from_str::<Value>(&agent.metadata).unwrap_or_else(|_| json!({})),
        "version": agent.version,
        "created_at": time(agent.created_at_us),
        "updated_at": time(agent.updated_at_us),
        "archived_at": agent.archived_at_us.map(time),
    })
}

/// A time as the contract writes it.
pub fn time(micros: i64) -> String {
    Timestamp::from_unix_micros(micros).to_string()
}
