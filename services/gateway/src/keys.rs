//! API keys (docs/api.md §2). Made here and shown once; only the hash travels on.

use axum::{Json, extract::State, http::StatusCode};
use bus::RpcError;
use contract::{
    auth::{self, CreateKeyRequest, DeactivateKeyRequest, ListKeysRequest},
    rpc,
    scheduler::Cursor,
};
use serde::Serialize;
use types::{ApiKey, Timestamp};
use utoipa::ToSchema;

use crate::{
    App,
    agents::time,
    auth::Caller,
    body::Body,
    error::{ApiError, Detail},
    page::{Listed, Page, PageParams, listed},
    path::{Id, IdParams},
};

/// An API key: all but the key itself.
#[derive(Serialize, ToSchema)]
pub struct Key {
    #[schema(format = Uuid)]
    id: String,
    name: String,
    /// The key's first 12 characters.
    prefix: String,
    is_active: bool,
    #[schema(format = DateTime)]
    created_at: String,
    #[schema(format = DateTime)]
    expires_at: Option<String>,
    #[schema(format = DateTime)]
    last_used_at: Option<String>,
}

/// A new API key. It is shown only once.
#[derive(Serialize, ToSchema)]
pub struct NewKey {
    #[serde(flatten)]
    described: Key,
    #[schema(pattern = "^aod_[A-Za-z0-9_-]{43}$")]
    key: String,
}

impl From<auth::Key> for Key {
    fn from(key: auth::Key) -> Self {
        Self {
            id: key.key_id,
            name: key.name,
            prefix: key.prefix,
            is_active: key.is_active,
            created_at: time(key.created_at_us),
            expires_at: key.expires_at_us.map(time),
            last_used_at: key.last_used_at_us.map(time),
        }
    }
}

/// What a new key is called.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes a body")]
pub struct CreateKey {
    #[schema(max_length = 100)]
    name: String,
    /// When the key expires; at the latest, and by default, with the key that creates it
    #[schema(format = DateTime)]
    expires_at: Option<String>,
}

/// Create an API key
///
/// Needs an API key in the `Authorization` header: a browser's sign-in is not enough.
#[utoipa::path(post, path = "/api-keys", tag = "api-keys", request_body = CreateKey,
    responses((status = 201, description = "The key; its value is shown only in this response", body = NewKey)))]
pub async fn create(
    State(app): State<App>,
    caller: Caller,
    body: Body,
) -> Result<(StatusCode, Json<NewKey>), ApiError> {
    // A key would outlive the cookie.
    if caller.is_browser {
        let detail = "Signing in does not allow creating API keys: send an API key in the Authorization header";
        return Err(ApiError::new(StatusCode::FORBIDDEN, detail));
    }
    let mut fields = body.fields()?;
    let name = fields.string("name", 100);
    let expires_at =
        match fields.optional_string("expires_at", 64).map(|text| text.parse::<Timestamp>()) {
            None => None,
            Some(Ok(time)) => Some(time),
            Some(Err(error)) => {
                fields.refuse("expires_at", &error.to_string());
                None
            }
        };
    fields.finish()?;
    let key = ApiKey::generate().map_err(RpcError::internal)?;
    let request = CreateKeyRequest {
        user_id: caller.user_id,
        name,
        key_hash: key.hash().as_bytes().to_vec(),
        prefix: key.display_prefix(),
        expires_at_us: expires_at.map(Timestamp::unix_micros),
        created_by_key_id: caller.key_id,
    };
    let described = app.call::<rpc::CreateKey>(&request).await?.into();
    Ok((StatusCode::CREATED, Json(NewKey { described, key: key.reveal().to_owned() })))
}

/// List API keys, newest first
#[utoipa::path(get, path = "/api-keys", tag = "api-keys", params(PageParams),
    responses((status = 200, description = "A page of keys", body = Listed<Key>)))]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    page: Page,
) -> Result<Json<Listed<Key>>, ApiError> {
    let after_key_id = page.after.map(|cursor| cursor.id);
    let reply = app
        .call::<rpc::ListKeys>(&ListKeysRequest {
            user_id: caller.user_id,
            limit: page.limit,
            after_key_id,
        })
        .await?;
    let cursor = |key: &auth::Key| Cursor { position: key.created_at_us, id: key.key_id.clone() };
    Ok(listed(reply.keys, reply.has_more, cursor, Key::from))
}

/// Deactivate an API key
#[utoipa::path(delete, path = "/api-keys/{id}", tag = "api-keys", params(IdParams),
    responses((status = 200, description = "API key deactivated", body = Detail)))]
pub async fn deactivate(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<Json<Detail>, ApiError> {
    app.call::<rpc::DeactivateKey>(&DeactivateKeyRequest { user_id: caller.user_id, key_id: id })
        .await?;
    Ok(Detail::new("API key deactivated"))
}
