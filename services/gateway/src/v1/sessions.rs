//! Sessions under `/v1`.

use std::collections::HashMap;

use axum::{Json, extract::State, http::StatusCode};
use bus::RpcError;
use contract::{
    common::Empty,
    rpc,
    scheduler::{
        self, ArchiveSessionRequest, CreateSessionRequest, Cursor, DeleteSessionRequest,
        GetAgentRequest, GetSessionRequest, ListRequest, TerminateRequest, UpdateSessionRequest,
    },
    session::Usage as Used,
};
use serde::Serialize;
use serde_json::{Map, Value, json};
use types::{
    ErrorCode, SessionId, Timestamp,
    limits::{BODY_BYTES_MAX, TIMEOUT_SECONDS_MAX},
    vault::VAULTS_OF_SESSION_MAX,
};
use utoipa::{IntoParams, ToSchema};

use crate::{
    App,
    agents::json as text,
    auth::Caller,
    body::{Body, Fields},
    error::ApiError,
    idempotency::{IdempotencyKey, IdempotencyParams},
    sessions::{SessionSecrets, keep, split_tokens},
    v1::{
        agents::{AgentFields, Snapshot, overridden},
        environments::Deleted,
        error::refused_field,
        ids::{PathId, Prefix},
        metadata,
        page::{Limits, LongPageParams, Order, Start, Wanted},
        path::IdParams,
        query::{Query, bad},
        resources::{self, Resource, WantedFile},
        time,
    },
};

const TITLE_CHARS_MAX: usize = 500;
const INITIAL_EVENTS_MAX: usize = 50;
const UPDATE_ATTEMPTS: u32 = 5;
const LIMITS: Limits = Limits { default: 20, max: 1000 };
const STATUSES: [&str; 4] = ["idle", "running", "rescheduling", "terminated"];

/// A session.
#[derive(Serialize, ToSchema)]
#[schema(as = V1Session)]
pub struct Session {
    #[schema(example = "sesn_011234567890123456789AbC")]
    id: String,
    #[schema(pattern = "^session$")]
    r#type: &'static str,
    /// `idle`, `running`, `rescheduling` or `terminated`.
    status: String,
    /// As it was when the session was created, with the session's own changes.
    agent: Option<Snapshot>,
    environment_id: Option<String>,
    title: Option<String>,
    metadata: Map<String, Value>,
    resources: Vec<Resource>,
    vault_ids: Vec<String>,
    #[schema(value_type = Vec<Object>)]
    outcome_evaluations: Vec<Value>,
    stats: Stats,
    #[schema(value_type = Object)]
    usage: Value,
    #[schema(value_type = Option<Object>)]
    budget: Value,
    #[schema(value_type = Option<String>)]
    deployment_id: Value,
    #[schema(format = DateTime)]
    created_at: String,
    #[schema(format = DateTime)]
    updated_at: String,
    #[schema(format = DateTime)]
    archived_at: Option<String>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = V1SessionStats)]
pub struct Stats {
    /// How long its turns ran.
    active_seconds: f64,
    /// Since its creation; of an archived session until then.
    duration_seconds: f64,
}

/// What a session has used so far, as `session.usage` shows it too.
pub fn usage(used: &Used, active_us: i64) -> Value {
    let mut usage = json!({
        "input_tokens": used.input_tokens.unwrap_or_default(),
        "output_tokens": used.output_tokens.unwrap_or_default(),
        "cache_read_input_tokens": used.cache_read_tokens.unwrap_or_default(),
        "cache_creation": {
            "ephemeral_5m_input_tokens": used.cache_write_tokens.unwrap_or_default(),
            "ephemeral_1h_input_tokens": 0,
        },
    });
    if let Some(cost) = used.cost_micro_usd.filter(|cost| *cost > 0) {
        // Whole cents, as text.
        usage["list_cost"] =
            json!({ "amount": cost.div_ceil(10_000).to_string(), "currency": "USD" });
    }
    if active_us > 0 {
        usage["active_seconds"] = json!(seconds(active_us));
    }
    usage
}

fn seconds(micros: i64) -> f64 {
    (micros / 1000) as f64 / 1e3
}

impl From<scheduler::Session> for Session {
    fn from(session: scheduler::Session) -> Self {
        let end = session.archived_at_us.unwrap_or_else(|| Timestamp::now().unix_micros());
        let vault_ids: Vec<String> = serde_json::from_str(&session.vault_ids).unwrap_or_default();
        Self {
            id: Prefix::Session.of(&session.session_id),
            r#type: "session",
            agent: session.agent.as_ref().map(Snapshot::from),
            resources: Resource::all_of(&session),
            environment_id: session.environment_id.map(|id| Prefix::Environment.of(&id)),
            title: session.title,
            metadata: metadata::shown(&session.metadata),
            vault_ids: vault_ids.iter().map(|id| Prefix::Vault.of(id)).collect(),
            outcome_evaluations: Vec::new(),
            stats: Stats {
                active_seconds: seconds(session.active_us),
                duration_seconds: seconds(end.saturating_sub(session.created_at_us).max(0)),
            },
            usage: usage(&session.usage.unwrap_or_default(), session.active_us),
            budget: Value::Null,
            deployment_id: Value::Null,
            status: session.v1_status,
            created_at: time(session.created_at_us),
            updated_at: time(session.updated_at_us),
            archived_at: session.archived_at_us.map(time),
        }
    }
}

// --- creating ----------------------------------------------------------------------------------

/// A new session.
#[derive(ToSchema)]
#[schema(as = V1SessionBody)]
#[expect(dead_code, reason = "describes a body")]
pub struct SessionBody {
    /// An agent's id, `{"type": "agent", "id", "version"}`, or `{"type": "agent_with_overrides",
    /// "id", ...}`
    #[schema(value_type = String)]
    agent: Value,
    environment_id: String,
    #[schema(max_length = 500)]
    title: Option<String>,
    #[schema(value_type = Option<Object>)]
    metadata: Option<Value>,
    /// Repositories of GitHub, and files
    #[schema(max_items = 510, value_type = Option<Vec<Object>>)]
    resources: Option<Value>,
    vault_ids: Option<Vec<String>>,
    /// Messages to begin with
    #[schema(max_items = 50, value_type = Option<Vec<Object>>)]
    initial_events: Option<Value>,
}

/// Which agent a session is to run.
struct ChosenAgent {
    id: String,
    version: Option<u32>,
    overrides: Option<AgentFields>,
}

fn read_agent(fields: &mut Fields) -> Option<ChosenAgent> {
    if !fields.value("agent").is_some_and(Value::is_object) {
        return Some(ChosenAgent {
            id: fields.string("agent", BODY_BYTES_MAX),
            version: None,
            overrides: None,
        });
    }
    fields.nested("agent", |agent| {
        let kind = agent.named_string("type", BODY_BYTES_MAX)?;
        let id = agent.named_string("id", BODY_BYTES_MAX)?;
        let version = agent
            .integer("version", 1, i64::from(u32::MAX))
            .and_then(|version| u32::try_from(version).ok());
        let overrides = match kind.as_str() {
            "agent" => {
                agent.allow_only(&["type", "id", "version"]);
                None
            }
            "agent_with_overrides" => {
                agent.allow_only(&[
                    "type",
                    "id",
                    "version",
                    "model",
                    "system",
                    "tools",
                    "mcp_servers",
                    "skills",
                ]);
                Some(AgentFields::read(agent))
            }
            _ => {
                agent.refuse("type", "must be 'agent' or 'agent_with_overrides'");
                None
            }
        };
        Some(ChosenAgent { id, version, overrides })
    })?
}

/// The texts of the messages that a session begins with.
fn read_initial_events(fields: &mut Fields) -> Vec<String> {
    let events = fields.objects("initial_events", INITIAL_EVENTS_MAX, |event| {
        match event.named_string("type", BODY_BYTES_MAX)?.as_str() {
            "user.message" => {}
            "user.define_outcome" => event.refuse("type", "user.define_outcome is not supported"),
            _ => event.refuse("type", "must be 'user.message'"),
        }
        event.allow_only(&["type", "content"]);
        let blocks = event.objects("content", INITIAL_EVENTS_MAX, |block| {
            if block.named_string("type", BODY_BYTES_MAX)? != "text" {
                block.refuse("type", "only text is supported");
            }
            block.allow_only(&["type", "text"]);
            block.named_string("text", BODY_BYTES_MAX)
        });
        let text =
            blocks.unwrap_or_default().into_iter().flatten().collect::<Vec<_>>().join("\n\n");
        if text.trim().is_empty() {
            event.refuse("content", "must hold some text");
        }
        Some(text)
    });
    events.unwrap_or_default().into_iter().flatten().collect()
}

/// Create a session
///
/// Without `initial_events` it is idle. With them its first turn begins; all of them are stored, or
/// none is.
#[utoipa::path(post, path = "/v1/sessions", tag = "managed-agents", operation_id = "sessions_create", params(IdempotencyParams), request_body = SessionBody,
    responses((status = 200, description = "The session", body = Session)))]
pub async fn create(
    State(app): State<App>,
    caller: Caller,
    key: IdempotencyKey,
    body: Body,
) -> Result<Json<Session>, ApiError> {
    let mut fields = body.fields()?;
    fields.allow_only(&[
        "agent",
        "environment_id",
        "title",
        "metadata",
        "resources",
        "vault_ids",
        "initial_events",
    ]);
    let agent = read_agent(&mut fields);
    let environment_id = fields.string("environment_id", BODY_BYTES_MAX);
    let title = fields.optional_string("title", TITLE_CHARS_MAX);
    let patch = metadata::read(&mut fields).unwrap_or_default();
    let resources = resources::read(&mut fields);
    let vault_ids = fields.strings("vault_ids").unwrap_or_default();
    let messages = read_initial_events(&mut fields);
    let is_object = fields.value("agent").is_some_and(Value::is_object);
    if is_object && fields.nested("agent", |agent| agent.is_null("model")) == Some(true) {
        return Err(refused_field("agent.model", "cannot be null").because("agent_model_required"));
    }
    fields.finish()?;
    if vault_ids.len() > VAULTS_OF_SESSION_MAX {
        return Err(refused_field(
            "vault_ids",
            &format!("must hold at most {VAULTS_OF_SESSION_MAX} ids"),
        ));
    }
    let vault_ids =
        vault_ids.iter().map(|id| Prefix::Vault.find(id)).collect::<Result<Vec<_>, _>>()?;
    let files = resources.files.into_iter().map(WantedFile::copy).collect::<Result<Vec<_>, _>>()?;
    let metadata = metadata::merged("{}", &patch).map_err(|why| refused_field("metadata", &why))?;
    let Some(ChosenAgent { id, version, overrides }) = agent else {
        return Err(refused_field("agent", "is required"));
    };
    let agent_id = Prefix::Agent.find(&id)?;
    let environment_id = Prefix::Environment
        .find(&environment_id)
        .map_err(|not_found| not_found.because("environment_not_found"))?;
    let mut kept_servers = None;
    let changed = match overrides {
        None => None,
        Some(overrides) => {
            let request = GetAgentRequest {
                user_id: caller.user_id.clone(),
                agent_id: agent_id.clone(),
                version,
            };
            let agent = app.call::<rpc::GetAgent>(&request).await?;
            let changed;
            (changed, kept_servers) = overridden(&app, &caller, agent, overrides).await?;
            Some(changed)
        }
    };
    let credential_kinds = app.credential_kinds.of(&app.bus, &caller.user_id).await?;
    let (repositories, tokens) = split_tokens(resources.repositories);
    let secrets = SessionSecrets { env: Default::default(), tokens };
    let kept = keep(&app, &caller, &secrets).await?;
    let request = CreateSessionRequest {
        user_id: caller.user_id.clone(),
        agent_id,
        timeout_seconds: TIMEOUT_SECONDS_MAX,
        environment_id: Some(environment_id),
        credential_kinds,
        session_limit: caller.session_limit.unwrap_or(app.config.default_session_limit),
        metadata: text(&metadata),
        resources: text(&repositories),
        files,
        secret_id: kept.as_ref().map(|kept| kept.id.clone()),
        once: key.once(&body),
        session_id: SessionId::new().to_string(),
        is_v1: true,
        agent_version: version,
        agent_override: changed,
        initial_messages: messages,
        title,
        vault_ids: text(&vault_ids),
        key_id: caller.key_id.clone(),
        ..CreateSessionRequest::default()
    };
    let reply = app.bus.call::<rpc::CreateSession>(&request, crate::RPC_DEADLINE).await;
    app.forget_unless_used(kept, &reply, |reply| !reply.replayed).await;
    app.forget_unless_used(kept_servers, &reply, |reply| !reply.replayed).await;
    Ok(Json(reply?.session.unwrap_or_default().into()))
}

// --- reading -----------------------------------------------------------------------------------

async fn find(app: &App, caller: &Caller, id: &str) -> Result<scheduler::Session, ApiError> {
    let request = GetSessionRequest {
        user_id: caller.user_id.clone(),
        session_id: Prefix::Session.find(id)?,
        recorded_through: 0,
        v1: true,
    };
    app.call::<rpc::GetSession>(&request).await
}

/// Get a session
#[utoipa::path(get, path = "/v1/sessions/{id}", tag = "managed-agents", operation_id = "sessions_retrieve", params(IdParams),
    responses((status = 200, description = "The session, archived or not", body = Session)))]
pub async fn get(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
) -> Result<Json<Session>, ApiError> {
    Ok(Json(find(&app, &caller, &id).await?.into()))
}

/// A page of sessions, with a cursor of the page before.
#[derive(Serialize, ToSchema)]
pub struct SessionPage {
    data: Vec<Session>,
    /// Where the next page begins; null on the last.
    next_page: Option<String>,
    /// Where the page before begins; null on the first.
    prev_page: Option<String>,
}

#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes a query")]
pub struct ListParams {
    /// `desc` by default
    #[param(pattern = "^(asc|desc)$")]
    order: Option<String>,
    agent_id: Option<String>,
    /// Together with `agent_id`
    agent_version: Option<u32>,
    /// `idle`, `running`, `rescheduling` or `terminated`
    #[param(rename = "statuses[]")]
    statuses: Option<Vec<String>>,
    /// Also `gte`, `lt` and `lte`
    #[param(rename = "created_at[gt]")]
    created_at_gt: Option<String>,
    include_archived: Option<bool>,
}

/// List sessions
#[utoipa::path(get, path = "/v1/sessions", tag = "managed-agents", operation_id = "sessions_list", params(LongPageParams, ListParams),
    responses((status = 200, description = "A page of sessions", body = SessionPage)))]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    query: Query,
) -> Result<Json<SessionPage>, ApiError> {
    let wanted = Wanted::read(&query, LIMITS, Order::Descending)?;
    let backwards = wanted.start.as_ref().is_some_and(|start| start.backwards);
    let mut request = super::agents::list_request(&query, &wanted, caller.user_id)?;
    let from_excludes =
        |row: &Cursor| request.created_from_us.is_some_and(|from| row.position < from);
    let before_excludes =
        |row: &Cursor| request.created_before_us.is_some_and(|before| row.position >= before);
    if request.after.as_ref().is_some_and(|row| from_excludes(row) || before_excludes(row)) {
        return Err(bad("page: the cursor lies outside of created_at"));
    }
    request.is_v1 = true;
    request.ascending = (wanted.order == Order::Ascending) != backwards;
    request.agent_id = query.one("agent_id").map(|id| Prefix::Agent.find(id)).transpose()?;
    request.agent_version = query.number("agent_version", u32::MAX)?;
    if request.agent_version.is_some() && request.agent_id.is_none() {
        return Err(bad("agent_version: needs agent_id"));
    }
    request.v1_statuses = query.all("statuses").map(str::to_owned).collect();
    if let Some(unknown) =
        request.v1_statuses.iter().find(|status| !STATUSES.contains(&status.as_str()))
    {
        return Err(bad(&format!("statuses: '{unknown}' is none of {}", STATUSES.join(", "))));
    }
    // No session belongs to one.
    if query.one("deployment_id").or_else(|| query.one("memory_store_id")).is_some() {
        return Ok(Json(SessionPage { data: Vec::new(), next_page: None, prev_page: None }));
    }
    Ok(Json(read_page(&app, &wanted, backwards, &request).await?))
}

async fn read_page(
    app: &App,
    wanted: &Wanted,
    backwards: bool,
    request: &ListRequest,
) -> Result<SessionPage, ApiError> {
    let reply = app.call::<rpc::ListSessions>(request).await?;
    let mut sessions = reply.sessions;
    if backwards {
        sessions.reverse();
    }
    let cursor = |row: Option<&scheduler::Session>, backwards: bool| {
        let row = row.map(|row| Cursor { position: row.created_at_us, id: row.session_id.clone() });
        row.map(|row| Start { order: wanted.order, backwards, row }.encode())
    };
    // A page that was asked for by a cursor has a neighbour on that side.
    let (follows, precedes) =
        if backwards { (true, reply.has_more) } else { (reply.has_more, wanted.start.is_some()) };
    let next_page = cursor(sessions.last(), false).filter(|_| follows);
    let prev_page = cursor(sessions.first(), true).filter(|_| precedes);
    let agents: HashMap<(String, i32), scheduler::Agent> = reply
        .agents
        .into_iter()
        .map(|agent| ((agent.agent_id.clone(), agent.row_version), agent))
        .collect();
    let with_agent = |session: scheduler::Session| {
        let key = (session.agent_id.clone().unwrap_or_default(), session.agent_row_version);
        scheduler::Session { agent: agents.get(&key).cloned(), ..session }
    };
    Ok(SessionPage {
        data: sessions.into_iter().map(with_agent).map(Session::from).collect(),
        next_page,
        prev_page,
    })
}

// --- changing ----------------------------------------------------------------------------------

/// A change of a session. What is absent stays.
#[derive(ToSchema)]
#[schema(as = V1SessionUpdate)]
#[expect(dead_code, reason = "describes a body")]
pub struct UpdateBody {
    /// Null clears it
    #[schema(max_length = 500)]
    title: Option<String>,
    /// Merged per key; null deletes one
    #[schema(value_type = Option<Object>)]
    metadata: Option<Value>,
    /// `tools` and `mcp_servers` of an idle session, from its next turn on
    #[schema(value_type = Option<Object>)]
    agent: Option<Value>,
}

/// Update a session
#[utoipa::path(post, path = "/v1/sessions/{id}", tag = "managed-agents", operation_id = "sessions_update", params(IdParams), request_body = UpdateBody,
    responses((status = 200, description = "The session", body = Session)))]
pub async fn update(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
    body: Body,
) -> Result<Json<Session>, ApiError> {
    let session_id = Prefix::Session.find(&id)?;
    let mut fields = body.fields()?;
    fields.allow_only(&["title", "metadata", "agent"]);
    let clear_title = fields.is_null("title");
    let title = fields.optional_string("title", TITLE_CHARS_MAX);
    let patch = metadata::read(&mut fields);
    let agent = fields.nested("agent", |agent| {
        agent.allow_only(&["tools", "mcp_servers"]);
        AgentFields::read(agent)
    });
    fields.finish()?;
    let agent = agent.filter(|agent| agent.tools.is_some() || agent.servers.is_some());
    for attempt in 1.. {
        let (mut kept, mut changed, mut agent_row_version) = (None, None, None);
        if let Some(change) = agent.clone() {
            let current = find(&app, &caller, &id).await?;
            let Some(snapshot) = current.agent else {
                return Err(ApiError::new(StatusCode::BAD_REQUEST, "The agent is gone"));
            };
            let new;
            (new, kept) = overridden(&app, &caller, snapshot.clone(), change).await?;
            changed = (new != snapshot).then_some(new);
            agent_row_version = Some(current.agent_row_version);
        }
        let request = UpdateSessionRequest {
            user_id: caller.user_id.clone(),
            session_id: session_id.clone(),
            title: title.clone(),
            clear_title,
            metadata: patch.as_ref().map(text),
            agent: changed,
            agent_row_version,
        };
        let reply = app.bus.call::<rpc::UpdateSession>(&request, crate::RPC_DEADLINE).await;
        app.forget_unless_used(kept, &reply, |_| true).await;
        match reply {
            // Overtaken by another change of the agent: this one is made again from what it left.
            Err(RpcError { code: ErrorCode::Conflict, reason: None, .. })
                if attempt < UPDATE_ATTEMPTS => {}
            reply => return Ok(Json(reply?.into())),
        }
    }
    Err(ApiError::not_found("Session"))
}

/// Archive an idle session
///
/// It is terminated and accepts no further events; its history is kept.
#[utoipa::path(post, path = "/v1/sessions/{id}/archive", tag = "managed-agents", operation_id = "sessions_archive", params(IdParams),
    responses((status = 200, description = "The session, archived now or before", body = Session)))]
pub async fn archive(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
) -> Result<Json<Session>, ApiError> {
    let request =
        ArchiveSessionRequest { user_id: caller.user_id, session_id: Prefix::Session.find(&id)? };
    Ok(Json(app.call::<rpc::ArchiveSession>(&request).await?.into()))
}

/// Delete a session that is not running
#[utoipa::path(delete, path = "/v1/sessions/{id}", tag = "managed-agents", operation_id = "sessions_delete", params(IdParams),
    responses((status = 200, description = "The session was deleted", body = Deleted)))]
pub async fn delete(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
) -> Result<Json<Deleted>, ApiError> {
    let session = find(&app, &caller, &id).await?;
    let (user_id, session_id) = (caller.user_id, session.session_id);
    if session.v1_status == "idle" && ["pending", "running"].contains(&session.status.as_str()) {
        // It waits for an answer that will not come.
        app.call::<rpc::Terminate>(&TerminateRequest {
            user_id: user_id.clone(),
            session_id: session_id.clone(),
        })
        .await?;
    }
    let Empty {} =
        app.call::<rpc::DeleteSession>(&DeleteSessionRequest { user_id, session_id }).await?;
    Ok(Json(Deleted { id, r#type: "session_deleted" }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(body: Value) -> Result<(String, Option<u32>, bool, Vec<String>), ()> {
        let mut fields = Body::from_json(&body).fields().unwrap();
        let (agent, messages) = (read_agent(&mut fields), read_initial_events(&mut fields));
        fields.finish().map_err(|_| ())?;
        let agent = agent.unwrap();
        Ok((agent.id, agent.version, agent.overrides.is_some(), messages))
    }

    #[test]
    fn an_agent_has_three_forms() {
        assert_eq!(sent(json!({ "agent": "a" })), Ok(("a".to_owned(), None, false, vec![])));
        let pinned = json!({ "agent": { "type": "agent", "id": "a", "version": 2 } });
        assert_eq!(sent(pinned), Ok(("a".to_owned(), Some(2), false, vec![])));
        let changed = json!({ "agent": { "type": "agent_with_overrides", "id": "a", "system": null, "tools": [] } });
        assert_eq!(sent(changed), Ok(("a".to_owned(), None, true, vec![])));
        for agent in [
            json!(5),
            json!({}),
            json!({ "type": "agent" }),
            json!({ "type": "x", "id": "a" }),
            json!({ "type": "agent", "id": "a", "model": "m" }),
            json!({ "type": "agent", "id": "a", "version": 0 }),
            Value::Null,
        ] {
            assert!(sent(json!({ "agent": agent })).is_err(), "{agent}");
        }
    }

    #[test]
    fn initial_events_are_messages_of_text() {
        let events = |events: Value| {
            sent(json!({ "agent": "a", "initial_events": events })).map(|sent| sent.3)
        };
        let text = |text: &str| json!({ "type": "text", "text": text });
        let two = json!([{ "type": "user.message", "content": [text("a"), text("b")] }, { "type": "user.message", "content": [text("c")] }]);
        assert_eq!(events(two), Ok(vec!["a\n\nb".to_owned(), "c".to_owned()]));
        for bad in [
            json!([{}]),
            json!([{ "type": "user.interrupt" }]),
            json!([{ "type": "user.message", "content": [] }]),
            json!([{ "type": "user.message", "content": [text(" ")] }]),
            json!([{ "type": "user.message", "content": [{ "type": "image" }] }]),
            json!({}),
            json!([{ "type": "user.define_outcome", "description": "d" }]),
        ] {
            assert!(events(bad.clone()).is_err(), "{bad}");
        }
    }
}
