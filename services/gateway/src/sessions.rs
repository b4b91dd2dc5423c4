//! Sessions and turns (contract §6).

use axum::{
    Json,
    extract::{Path, State},
    http::StatusCode,
};
use contract::{
    rpc,
    scheduler::{CreateSessionRequest, GetSessionRequest, PromptRequest, Session, TerminateRequest, Turn},
    vault::ListCredentialsRequest,
};
use serde_json::{Value, json};
use types::{
    SessionStatus,
    limits::{BODY_BYTES_MAX, TIMEOUT_SECONDS_MAX, TIMEOUT_SECONDS_MIN},
};

use crate::{
    App,
    agents::time,
    auth::Caller,
    body::{Body, Fields},
    error::ApiError,
    page::{Page, envelope},
};

pub async fn create(State(app): State<App>, caller: Caller, body: Body) -> Result<(StatusCode, Json<Value>), ApiError> {
    let mut fields = body.fields()?;
    let agent_id = fields.string("agent_id", BODY_BYTES_MAX);
    let prompt = fields.string("prompt", BODY_BYTES_MAX);
    let timeout_seconds = timeout(&app, &mut fields);
    let environment_id = fields.optional_string("environment_id", BODY_BYTES_MAX);
    fields.not_yet("resources");
    fields.not_yet("secret_env_vars");
    let metadata = fields.string_map("metadata");
    fields.finish()?;
    let stored = app.call::<rpc::ListCredentials>(&ListCredentialsRequest { user_id: caller.user_id.clone() }).await?;
    let request = CreateSessionRequest {
        user_id: caller.user_id,
        agent_id,
        prompt,
        timeout_seconds,
        environment_id,
        credential_kinds: stored.credentials.into_iter().map(|credential| credential.kind).collect(),
        session_limit: caller.session_limit.unwrap_or(app.config.default_session_limit),
        // Postgres' JSON keeps no NUL.
        metadata: Value::Object(metadata).to_string().replace("\\u0000", "\\ufffd"),
    };
    let session = app.call::<rpc::CreateSession>(&request).await?;
    let mut answer = accepted(&session);
    if let Some(object) = answer.as_object_mut() {
        object.insert("environment_id".to_owned(), session.environment_id.into());
        object.insert("resources".to_owned(), json!([]));
    }
    Ok((StatusCode::ACCEPTED, Json(answer)))
}

fn timeout(app: &App, fields: &mut Fields) -> u32 {
    let seconds = fields.integer("timeout", i64::from(TIMEOUT_SECONDS_MIN), i64::from(TIMEOUT_SECONDS_MAX));
    seconds.and_then(|seconds| u32::try_from(seconds).ok()).unwrap_or(app.config.default_timeout_seconds)
}

fn accepted(session: &Session) -> Value {
    json!({
        "id": session.session_id,
        "status": session.status,
        "stream_url": format!("/sessions/{}/stream", session.session_id),
        "current_turn": session.turn_count,
    })
}

async fn find(app: &App, caller: &Caller, id: &str) -> Result<Session, ApiError> {
    let request = GetSessionRequest { user_id: caller.user_id.clone(), session_id: id.to_owned(), recorded_through: 0 };
    app.call::<rpc::GetSession>(&request).await
}

pub async fn get(State(app): State<App>, caller: Caller, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    Ok(Json(describe(find(&app, &caller, &id).await?)))
}

pub async fn list(State(app): State<App>, caller: Caller, page: Page) -> Result<Json<Value>, ApiError> {
    let reply = app.call::<rpc::ListSessions>(&page.request(caller)).await?;
    let last = reply.sessions.last().map(|session| (session.created_at_us, session.session_id.clone()));
    Ok(envelope(reply.sessions.into_iter().map(describe).collect(), reply.has_more, last))
}

pub async fn turns(State(app): State<App>, caller: Caller, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let request = GetSessionRequest { user_id: caller.user_id, session_id: id, recorded_through: 0 };
    let reply = app.call::<rpc::ListTurns>(&request).await?;
    Ok(Json(json!({ "data": reply.turns.into_iter().map(describe_turn).collect::<Vec<_>>() })))
}

/// The state is checked before the body; the scheduler checks it again, where it counts.
pub async fn prompt(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
    body: Body,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let session = find(&app, &caller, &id).await?;
    if let Some(refusal) = session.status.parse::<SessionStatus>().ok().and_then(SessionStatus::prompt_refusal) {
        return Err(ApiError::new(StatusCode::CONFLICT, refusal));
    }
    let mut fields = body.fields()?;
    let prompt = fields.string("prompt", BODY_BYTES_MAX);
    let timeout_seconds = timeout(&app, &mut fields);
    fields.finish()?;
    let request = PromptRequest { user_id: caller.user_id, session_id: id, prompt, timeout_seconds };
    let session = app.call::<rpc::Prompt>(&request).await?;
    Ok((StatusCode::ACCEPTED, Json(accepted(&session))))
}

pub async fn terminate(State(app): State<App>, caller: Caller, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let session = app.call::<rpc::Terminate>(&TerminateRequest { user_id: caller.user_id, session_id: id }).await?;
    Ok(Json(json!({ "id": session.session_id, "status": session.status })))
}

fn describe(session: Session) -> Value {
    let failure = session.failure.map(|failure| json!({ "stage": failure.stage, "message": failure.message }));
    json!({
        "id": session.session_id,
        "agent_id": session.agent_id,
        "environment_id": session.environment_id,
        "runtime": session.runtime,
        "provider": session.provider,
        "status": session.status,
        "exit_code": session.exit_code,
        "created_at": time(session.created_at_us),
        "updated_at": time(session.updated_at_us),
        "resources": [],
        "turn_count": session.turn_count,
        "current_turn": session.turn_count,
        "metadata": serde_json::from_str::<Value>(&session.metadata).unwrap_or_else(|_| json!({})),
        "failure": failure,
    })
}

fn describe_turn(turn: Turn) -> Value {
    json!({
        "turn_number": turn.turn_number,
        "prompt": turn.prompt,
        "status": turn.status,
        "exit_code": turn.exit_code,
        "created_at": time(turn.created_at_us),
        "started_at": turn.started_at_us.map(time),
        "ended_at": turn.ended_at_us.map(time),
    })
}
