//! Vaults under `/v1`: collections of credentials that sessions use.

use axum::{Json, extract::State};
use contract::{
    common::Empty,
    rpc,
    scheduler::{self, CreateVaultRequest, Cursor, GetVaultRequest, UpdateVaultRequest},
};
use serde::Serialize;
use serde_json::{Map, Value};
use types::VaultId;
use utoipa::ToSchema;

use crate::{
    App,
    agents::json as text,
    auth::Caller,
    body::{Body, Fields},
    error::ApiError,
    v1::{
        agents::{ListParams, list_request},
        environments::Deleted,
        error::refused_field,
        ids::{PathId, Prefix},
        metadata,
        page::{LIMITS, Page, PageParams, Wanted, page},
        path::IdParams,
        query::Query,
        time,
    },
};

pub const NAME_CHARS_MAX: usize = 255;

/// A vault.
#[derive(Serialize, ToSchema)]
#[schema(as = V1Vault)]
pub struct Vault {
    #[schema(example = "vlt_011234567890123456789AbC")]
    id: String,
    #[schema(pattern = "^vault$")]
    r#type: &'static str,
    display_name: String,
    metadata: Map<String, Value>,
    #[schema(format = DateTime)]
    created_at: String,
    #[schema(format = DateTime)]
    updated_at: String,
    #[schema(format = DateTime)]
    archived_at: Option<String>,
}

impl From<scheduler::Vault> for Vault {
    fn from(vault: scheduler::Vault) -> Self {
        Self {
            id: Prefix::Vault.of(&vault.vault_id),
            r#type: "vault",
            display_name: vault.display_name,
            metadata: metadata::shown(&vault.metadata),
            created_at: time(vault.created_at_us),
            updated_at: time(vault.updated_at_us),
            archived_at: vault.archived_at_us.map(time),
        }
    }
}

/// A new vault. In an update, every field may be absent.
#[derive(ToSchema)]
#[schema(as = V1VaultBody)]
#[expect(dead_code, reason = "describes a body")]
pub struct VaultBody {
    #[schema(min_length = 1, max_length = 255)]
    display_name: String,
    #[schema(value_type = Option<Object>)]
    metadata: Option<Value>,
}

fn read(fields: &mut Fields) -> (Option<String>, Option<Map<String, Value>>) {
    fields.allow_only(&["display_name", "metadata"]);
    let name = fields.optional_string("display_name", NAME_CHARS_MAX);
    fields.refuse_blank("display_name");
    if fields.is_null("display_name") {
        fields.refuse("display_name", "cannot be null");
    }
    (name, metadata::read(fields))
}

/// Create a vault
#[utoipa::path(post, path = "/v1/vaults", tag = "managed-agents", operation_id = "vaults_create", request_body = VaultBody,
    responses((status = 200, description = "The vault", body = Vault)))]
pub async fn create(
    State(app): State<App>,
    caller: Caller,
    body: Body,
) -> Result<Json<Vault>, ApiError> {
    let mut fields = body.fields()?;
    fields.require(&["display_name"]);
    let (name, patch) = read(&mut fields);
    fields.finish()?;
    let metadata = metadata::merged("{}", &patch.unwrap_or_default())
        .map_err(|why| refused_field("metadata", &why))?;
    let request = CreateVaultRequest {
        user_id: caller.user_id,
        vault_id: VaultId::new().to_string(),
        display_name: name.unwrap_or_default(),
        metadata: text(&metadata),
    };
    Ok(Json(app.call::<rpc::CreateVault>(&request).await?.into()))
}

fn request(caller: &Caller, id: &str) -> Result<GetVaultRequest, ApiError> {
    Ok(GetVaultRequest { user_id: caller.user_id.clone(), vault_id: Prefix::Vault.find(id)? })
}

/// Get a vault
#[utoipa::path(get, path = "/v1/vaults/{id}", tag = "managed-agents", operation_id = "vaults_retrieve", params(IdParams),
    responses((status = 200, description = "The vault, archived or not", body = Vault)))]
pub async fn get(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
) -> Result<Json<Vault>, ApiError> {
    Ok(Json(app.call::<rpc::GetVault>(&request(&caller, &id)?).await?.into()))
}

/// Update a vault
#[utoipa::path(post, path = "/v1/vaults/{id}", tag = "managed-agents", operation_id = "vaults_update", params(IdParams), request_body = VaultBody,
    responses((status = 200, description = "The vault", body = Vault)))]
pub async fn update(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
    body: Body,
) -> Result<Json<Vault>, ApiError> {
    let request = request(&caller, &id)?;
    let mut fields = body.fields()?;
    let (display_name, patch) = read(&mut fields);
    fields.finish()?;
    if let Some(patch) = &patch {
        let current = app.call::<rpc::GetVault>(&request).await?;
        metadata::merged(&current.metadata, patch)
            .map_err(|why| refused_field("metadata", &why))?;
    }
    let request = UpdateVaultRequest {
        user_id: request.user_id,
        vault_id: request.vault_id,
        display_name,
        metadata: patch.as_ref().map(text),
    };
    Ok(Json(app.call::<rpc::UpdateVault>(&request).await?.into()))
}

/// List vaults, newest first
#[utoipa::path(get, path = "/v1/vaults", tag = "managed-agents", operation_id = "vaults_list", params(PageParams, ListParams),
    responses((status = 200, description = "A page of vaults", body = Page<Vault>)))]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    query: Query,
) -> Result<Json<Page<Vault>>, ApiError> {
    let wanted = Wanted::of_fixed_order(&query, LIMITS)?;
    let reply =
        app.call::<rpc::ListVaults>(&list_request(&query, &wanted, caller.user_id)?).await?;
    let cursor =
        |row: &scheduler::Vault| Cursor { position: row.created_at_us, id: row.vault_id.clone() };
    Ok(page(reply.vaults, reply.has_more, cursor, Vault::from))
}

/// Archive a vault
///
/// Its credentials are archived too, and their secrets deleted. Sessions that have it continue
/// without them.
#[utoipa::path(post, path = "/v1/vaults/{id}/archive", tag = "managed-agents", operation_id = "vaults_archive", params(IdParams),
    responses((status = 200, description = "The vault, archived now or before", body = Vault)))]
pub async fn archive(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
) -> Result<Json<Vault>, ApiError> {
    Ok(Json(app.call::<rpc::ArchiveVault>(&request(&caller, &id)?).await?.into()))
}

/// Delete a vault with its credentials
#[utoipa::path(delete, path = "/v1/vaults/{id}", tag = "managed-agents", operation_id = "vaults_delete", params(IdParams),
    responses((status = 200, description = "The vault was deleted", body = Deleted)))]
pub async fn delete(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
) -> Result<Json<Deleted>, ApiError> {
    let Empty {} = app.call::<rpc::DeleteVault>(&request(&caller, &id)?).await?;
    Ok(Json(Deleted { id, r#type: "vault_deleted" }))
}
