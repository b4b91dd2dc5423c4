//! Checkpoints (docs/sprites-api.md §7). Progress is sent as it happens; a failure is the last line
//! of a reply with status 200.

use std::sync::Arc;

use axum::{
    Json,
    body::Bytes,
    extract::{Path, State},
    http::StatusCode,
    response::Response,
};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use types::Timestamp;

use super::{Api, ErrorResponse, inside, lines};
use crate::sprites::{
    checkpoint::{self, Checkpoint},
    sprite::{RegistryError, Sprite},
};

const COMMENT_CHARS_MAX: usize = 1000;

fn describe(checkpoint: &Checkpoint) -> Value {
    json!({
        "id": checkpoint.id,
        "create_time": Timestamp::from_unix_micros(checkpoint.created_at_us).to_string(),
        "comment": checkpoint.comment.as_deref().unwrap_or_default(),
        "history": [],
        "is_auto": false,
        "health": "",
    })
}

fn line(kind: &str, text: String) -> Value {
    let field = if kind == "error" { "error" } else { "data" };
    json!({ "type": kind, field: text, "time": Timestamp::now().to_string() })
}

/// Sends that an operation begins, runs it, and sends its result; continues if the client
/// disconnects.
fn tell<F: Future<Output = Result<String, RegistryError>> + Send + 'static>(
    api: &Api,
    begins: String,
    work: F,
) -> Response {
    let (sender, receiver) = mpsc::channel(4);
    api.registry.lifecycle.tracker().spawn(async move {
        let _ = sender.send(line("info", begins)).await;
        let last = match work.await {
            Ok(done) => line("complete", done),
            Err(error) => {
                tracing::error!(%error, "a checkpoint operation failed");
                line("error", error.to_string())
            }
        };
        let _ = sender.send(last).await;
    });
    lines(receiver)
}

fn find(api: &Api, name: &str) -> Result<Arc<Sprite>, ErrorResponse> {
    Ok(api.registry.get(name)?)
}

pub async fn create(
    State(api): State<Api>,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<Response, ErrorResponse> {
    let sprite = find(&api, &name)?;
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let comment = body
        .get("comment")
        .and_then(Value::as_str)
        .map(|comment| comment.chars().take(COMMENT_CHARS_MAX).collect());
    let registry = api.registry.clone();
    Ok(tell(&api, "Creating checkpoint...".to_owned(), async move {
        let checkpoint = registry.make_checkpoint(&sprite, comment).await?;
        Ok(format!("Checkpoint {} created", checkpoint.id))
    }))
}

pub async fn list(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ErrorResponse> {
    let sprite = find(&api, &name)?;
    Ok(Json(checkpoint::list(&sprite).iter().map(describe).collect()))
}

pub async fn get(
    State(api): State<Api>,
    Path((name, id)): Path<(String, String)>,
) -> Result<Json<Value>, ErrorResponse> {
    let sprite = find(&api, &name)?;
    Ok(Json(describe(&checkpoint::get(&sprite, &id)?)))
}

pub async fn restore(
    State(api): State<Api>,
    Path((name, id)): Path<(String, String)>,
) -> Result<Response, ErrorResponse> {
    let sprite = find(&api, &name)?;
    checkpoint::get(&sprite, &id)?;
    let (registry, again) = (api.registry.clone(), api.clone());
    Ok(tell(&api, format!("Restoring to checkpoint {id}..."), async move {
        registry.restore_checkpoint(&sprite, &id).await?;
        inside::open(&again, &sprite);
        Ok(format!("Restored to {id}"))
    }))
}

pub async fn delete(
    State(api): State<Api>,
    Path((name, id)): Path<(String, String)>,
) -> Result<StatusCode, ErrorResponse> {
    let sprite = find(&api, &name)?;
    api.registry.delete_checkpoint(&sprite, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}
