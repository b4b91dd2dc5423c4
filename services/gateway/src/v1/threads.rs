//! `/v1/sessions/{id}/threads`: the primary thread, the only one that a session has.

use axum::{
    Json,
    extract::{Path, State},
    http::HeaderMap,
    response::Response,
};
use contract::{rpc, scheduler::GetSessionRequest};
use serde_json::{Value, json};

use crate::{
    App,
    auth::Caller,
    error::ApiError,
    v1::{
        events,
        ids::{PathId, Prefix},
        page::{LongPageParams, Page},
        query::Query,
        sessions::Session,
    },
};

/// The primary thread of a session, whose id is the session's under another prefix.
async fn primary(app: &App, caller: &Caller, id: &str) -> Result<Value, ApiError> {
    let session_id = Prefix::Session.find(id)?;
    let request = GetSessionRequest {
        user_id: caller.user_id.clone(),
        session_id,
        recorded_through: 0,
        v1: true,
    };
    let session = app.call::<rpc::GetSession>(&request).await?;
    let thread = Prefix::Thread.of(&session.session_id);
    let session = serde_json::to_value(Session::from(session)).unwrap_or_default();
    Ok(json!({
        "id": thread,
        "type": "session_thread",
        "session_id": session["id"],
        "parent_thread_id": null,
        "agent": session["agent"],
        "status": session["status"],
        "stats": session["stats"],
        "usage": session["usage"],
        "workflow_run_id": null,
        "archived_at": session["archived_at"],
        "created_at": session["created_at"],
        "updated_at": session["updated_at"],
    }))
}

/// # Errors
/// 404 for any other thread.
fn check(id: &str, thread: &str) -> Result<(), ApiError> {
    let is_primary = Prefix::Session
        .decode(id)
        .is_some_and(|session| Prefix::Thread.decode(thread) == Some(session));
    if is_primary { Ok(()) } else { Err(ApiError::not_found("Thread")) }
}

/// List the threads of a session
#[utoipa::path(get, path = "/v1/sessions/{id}/threads", tag = "managed-agents", operation_id = "sessions_threads_list",
    params(("id" = String, Path, description = "The session's id")),
    responses((status = 200, description = "The primary thread", body = Page<Object>)))]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
    query: Query,
) -> Result<Json<Page<Value>>, ApiError> {
    let thread = primary(&app, &caller, &id).await?;
    let mut statuses = query.all("statuses").peekable();
    let is_wanted = statuses.peek().is_none() || statuses.any(|status| thread["status"] == status);
    Ok(Json(Page { data: if is_wanted { vec![thread] } else { Vec::new() }, next_page: None }))
}

/// Get a thread
#[utoipa::path(get, path = "/v1/sessions/{id}/threads/{thread}", tag = "managed-agents", operation_id = "sessions_threads_get",
    params(("id" = String, Path, description = "The session's id"), ("thread" = String, Path, description = "The thread's id")),
    responses((status = 200, description = "The thread", body = Object)))]
pub async fn get(
    State(app): State<App>,
    caller: Caller,
    Path((id, thread)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    check(&id, &thread)?;
    primary(&app, &caller, &id).await.map(Json)
}

/// List the events of a thread
#[utoipa::path(get, path = "/v1/sessions/{id}/threads/{thread}/events", tag = "managed-agents", operation_id = "sessions_threads_events_list",
    params(("id" = String, Path, description = "The session's id"), ("thread" = String, Path, description = "The thread's id"),
           LongPageParams, events::ListParams),
    responses((status = 200, description = "A page of events", body = Page<Object>)))]
pub async fn list_events(
    app: State<App>,
    caller: Caller,
    Path((id, thread)): Path<(String, String)>,
    query: Query,
) -> Result<events::Events, ApiError> {
    check(&id, &thread)?;
    events::list(app, caller, PathId(id), query).await
}

/// Follow the events of a thread
#[utoipa::path(get, path = "/v1/sessions/{id}/threads/{thread}/stream", tag = "managed-agents", operation_id = "sessions_threads_stream",
    params(("id" = String, Path, description = "The session's id"), ("thread" = String, Path, description = "The thread's id"),
           events::StreamParams),
    responses((status = 200, description = "As the stream of the session", body = String, content_type = "text/event-stream")))]
pub async fn stream(
    app: State<App>,
    caller: Caller,
    Path((id, thread)): Path<(String, String)>,
    query: Query,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    check(&id, &thread)?;
    events::stream(app, caller, PathId(id), query, headers).await
}
