//! Images, an addition of this server (docs/sprites-api.md §8.5).

use std::path::{Component, PathBuf};

use axum::{
    Json,
    body::Bytes,
    extract::{Path, State},
    http::StatusCode,
};
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Api, ErrorResponse, invalid};
use crate::sprites::{image::ImageKey, sprite::RegistryError};

const PATHS_MAX: usize = 32;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Draft {
    key: String,
    /// Directories that are not part of the image.
    #[serde(default)]
    without: Vec<PathBuf>,
}

pub fn key(text: &str) -> Result<ImageKey, ErrorResponse> {
    text.parse().map_err(|()| {
        invalid("an image's key has 1 to 64 characters: lower-case letters, digits and dashes")
    })
}

pub async fn draft(
    State(api): State<Api>,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<(StatusCode, Json<Value>), ErrorResponse> {
    let draft: Draft = serde_json::from_slice(&body)
        .map_err(|error| invalid(format!("invalid image: {error}")))?;
    let is_normal = |path: &PathBuf| {
        let mut parts = path.components();
        parts.next() == Some(Component::RootDir)
            && parts.clone().next().is_some()
            && parts.all(|part| matches!(part, Component::Normal(_)))
    };
    if draft.without.len() > PATHS_MAX || !draft.without.iter().all(is_normal) {
        return Err(invalid("without has at most 32 paths, absolute and normal"));
    }
    let id = api.registry.draft_image(&name, key(&draft.key)?, draft.without).await?;
    Ok((StatusCode::CREATED, Json(json!({ "draft": id.simple().to_string() }))))
}

pub async fn keep(
    State(api): State<Api>,
    Path((name, draft)): Path<(String, String)>,
) -> Result<StatusCode, ErrorResponse> {
    let draft: Uuid = draft.parse().map_err(|_| RegistryError::NoDraft)?;
    api.registry.keep_image(&name, draft)?;
    Ok(StatusCode::ACCEPTED)
}
