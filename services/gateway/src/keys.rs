//! API keys (contract §2). Made here and shown once; only the hash travels on.

use axum::{
    Json,
    extract::{Path, State},
    http::StatusCode,
};
use contract::{
    auth::{CreateKeyRequest, DeactivateKeyRequest, Key, ListKeysRequest},
    rpc,
};
use serde_json::{Value, json};
use types::{ApiKey, Timestamp};

use crate::{
    App,
    agents::time,
    auth::Caller,
    body::{Body, FieldError},
    error::ApiError,
};

pub async fn create(State(app): State<App>, caller: Caller, body: Body) -> Result<(StatusCode, Json<Value>), ApiError> {
    let mut fields = body.fields()?;
    let name = fields.string("name", 100);
    let expires_at = fields.optional_string("expires_at", 64);
    let expires_at = expires_at.and_then(|text| match text.parse::<Timestamp>() {
        Ok(time) => Some(time),
        Err(error) => {
            fields.add(FieldError::value("expires_at", &error.to_string(), text.into()));
            None
        }
    });
    if name.contains('\0') {
        fields.add(FieldError::value("name", "text must not contain NUL", Value::Null));
    }
    fields.finish()?;
    let failed = |_| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "Internal error");
    let key = ApiKey::generate().map_err(failed)?;
    let request = CreateKeyRequest {
        user_id: caller.user_id,
        name,
        key_hash: key.hash().as_bytes().to_vec(),
        prefix: key.display_prefix(),
        expires_at_us: expires_at.map(Timestamp::unix_micros),
    };
    let mut answer = describe(app.call::<rpc::CreateKey>(&request).await?);
    if let Some(object) = answer.as_object_mut() {
        object.insert("key".to_owned(), key.reveal().into());
    }
    Ok((StatusCode::CREATED, Json(answer)))
}

pub async fn list(State(app): State<App>, caller: Caller) -> Result<Json<Value>, ApiError> {
    let reply = app.call::<rpc::ListKeys>(&ListKeysRequest { user_id: caller.user_id }).await?;
    Ok(Json(json!({ "data": reply.keys.into_iter().map(describe).collect::<Vec<_>>() })))
}

pub async fn deactivate(State(app): State<App>, caller: Caller, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let key = app.call::<rpc::DeactivateKey>(&DeactivateKeyRequest { user_id: caller.user_id, key_id: id }).await?;
    Ok(Json(describe(key)))
}

fn describe(key: Key) -> Value {
    json!({
        "id": key.key_id,
        "name": key.name,
        "prefix": key.prefix,
        "is_active": key.is_active,
        "created_at": time(key.created_at_us),
        "expires_at": key.expires_at_us.map(time),
        "last_used_at": key.last_used_at_us.map(time),
    })
}
