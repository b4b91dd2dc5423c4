//! Credentials in vaults of `/v1`. Secrets go to the credential vault and never come back.

mod auth;

use axum::{Json, extract::State};
use contract::{
    common::Empty,
    rpc,
    scheduler::{
        self, CreateVaultCredentialRequest, Cursor, GetVaultCredentialRequest,
        ListVaultCredentialsRequest, UpdateVaultCredentialRequest,
    },
};
use serde::Serialize;
use serde_json::{Map, Value};
use types::VaultCredentialId;
use utoipa::{IntoParams, ToSchema};

use crate::{
    App,
    agents::json as text,
    auth::Caller,
    body::Body,
    error::ApiError,
    secrets::Kind,
    v1::{
        environments::Deleted,
        error::refused_field,
        ids::{PathId, Prefix},
        metadata,
        page::{LIMITS, Page, PageParams, Wanted, page},
        path::IdParams,
        query::Query,
        time,
        vault_credentials::auth::SecretUpdate,
        vaults::NAME_CHARS_MAX,
    },
};

/// A credential of a vault: all but its secret.
#[derive(Serialize, ToSchema)]
#[schema(as = V1Credential)]
pub struct Credential {
    #[schema(example = "vcrd_011234567890123456789AbC")]
    id: String,
    #[schema(pattern = "^vault_credential$")]
    r#type: &'static str,
    vault_id: String,
    display_name: Option<String>,
    /// `environment_variable` with `secret_name`; `static_bearer` with `mcp_server_url`; or
    /// `mcp_oauth` with `mcp_server_url`, `expires_at` and `refresh`.
    #[schema(value_type = Object)]
    auth: Value,
    metadata: Map<String, Value>,
    #[schema(format = DateTime)]
    created_at: String,
    #[schema(format = DateTime)]
    updated_at: String,
    #[schema(format = DateTime)]
    archived_at: Option<String>,
}

impl From<scheduler::VaultCredential> for Credential {
    fn from(credential: scheduler::VaultCredential) -> Self {
        Self {
            id: Prefix::Credential.of(&credential.credential_id),
            r#type: "vault_credential",
            vault_id: Prefix::Vault.of(&credential.vault_id),
            display_name: credential.display_name,
            auth: serde_json::from_str(&credential.auth).unwrap_or_default(),
            metadata: metadata::shown(&credential.metadata),
            created_at: time(credential.created_at_us),
            updated_at: time(credential.updated_at_us),
            archived_at: credential.archived_at_us.map(time),
        }
    }
}

/// A new credential. In an update, every field may be absent.
#[derive(ToSchema)]
#[schema(as = V1CredentialBody)]
#[expect(dead_code, reason = "describes a body")]
pub struct CredentialBody {
    /// `{"type": "environment_variable", "secret_name", "secret_value", "networking": {"type":
    /// "limited", "allowed_hosts": ["api.example.com"]}}`, `{"type": "static_bearer", "mcp_server_url", "token"}`, or `{"type":
    /// "mcp_oauth", "mcp_server_url", "access_token", "expires_at", "refresh": {"client_id",
    /// "refresh_token", "token_endpoint", "token_endpoint_auth": {"type": "none"}}}`
    ///
    /// The value of an `environment_variable` with `limited` networking stays outside of the
    /// sandbox: the agent has a placeholder, which is replaced in headers of HTTPS requests to the
    /// allowed hosts. This takes `local-sprites`; on Fly.io's Sprites, turns with such a credential
    /// fail. With `unrestricted` networking the real value is in the sandbox.
    #[schema(value_type = Object)]
    auth: Value,
    #[schema(max_length = 255)]
    display_name: Option<String>,
    #[schema(value_type = Option<Object>)]
    metadata: Option<Value>,
}

/// The ids of a vault and of a credential in it, as they are in a route's path.
type CredentialPath = PathId<(String, String)>;

fn request(
    caller: &Caller,
    PathId((vault, credential)): &CredentialPath,
) -> Result<GetVaultCredentialRequest, ApiError> {
    Ok(GetVaultCredentialRequest {
        user_id: caller.user_id.clone(),
        vault_id: Prefix::Vault.find(vault)?,
        credential_id: Prefix::Credential.find(credential)?,
    })
}

#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "describes a path")]
pub struct CredentialParams {
    /// The vault's id
    id: String,
    /// The credential's id
    credential_id: String,
}

/// Add a credential to a vault
///
/// Its secret is encrypted by the vault and never shown.
#[utoipa::path(post, path = "/v1/vaults/{id}/credentials", tag = "managed-agents", operation_id = "vault_credentials_create", params(IdParams), request_body = CredentialBody,
    responses((status = 200, description = "The credential", body = Credential)))]
pub async fn create(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
    body: Body,
) -> Result<Json<Credential>, ApiError> {
    let vault_id = Prefix::Vault.find(&id)?;
    let mut fields = body.fields()?;
    fields.allow_only(&["auth", "display_name", "metadata"]);
    if fields.value("auth").is_none() {
        fields.refuse("auth", "auth is required");
    }
    let auth = fields.nested("auth", |auth| auth::read(auth, true)).flatten();
    let display_name = fields.optional_string("display_name", NAME_CHARS_MAX);
    let patch = metadata::read(&mut fields);
    fields.finish()?;
    let Some(auth) = auth else { return Err(refused_field("auth", "is incomplete")) };
    let (shown, document) = auth.created()?;
    let metadata = metadata::merged("{}", &patch.unwrap_or_default())
        .map_err(|why| refused_field("metadata", &why))?;
    let kept = app.keep(&caller.user_id, Kind::VaultCredential, &document, None).await?;
    let request = CreateVaultCredentialRequest {
        user_id: caller.user_id,
        vault_id,
        credential_id: VaultCredentialId::new().to_string(),
        display_name,
        metadata: text(&metadata),
        auth: shown.to_string(),
        kind: document.kind.as_str().to_owned(),
        key: document.key.clone(),
        secret_id: kept.id.clone(),
    };
    let reply = app.bus.call::<rpc::CreateVaultCredential>(&request, crate::RPC_DEADLINE).await;
    app.forget_unless_used(Some(kept), &reply, |_| true).await;
    Ok(Json(reply?.into()))
}

/// Get a credential
#[utoipa::path(get, path = "/v1/vaults/{id}/credentials/{credential_id}", tag = "managed-agents", operation_id = "vault_credentials_retrieve", params(CredentialParams),
    responses((status = 200, description = "The credential, archived or not", body = Credential)))]
pub async fn get(
    State(app): State<App>,
    caller: Caller,
    path: CredentialPath,
) -> Result<Json<Credential>, ApiError> {
    Ok(Json(app.call::<rpc::GetVaultCredential>(&request(&caller, &path)?).await?.into()))
}

/// Update a credential
///
/// A new secret reaches running sessions with their next turn.
#[utoipa::path(post, path = "/v1/vaults/{id}/credentials/{credential_id}", tag = "managed-agents", operation_id = "vault_credentials_update", params(CredentialParams), request_body = CredentialBody,
    responses((status = 200, description = "The credential", body = Credential)))]
pub async fn update(
    State(app): State<App>,
    caller: Caller,
    path: CredentialPath,
    body: Body,
) -> Result<Json<Credential>, ApiError> {
    let GetVaultCredentialRequest { user_id, vault_id, credential_id } = request(&caller, &path)?;
    let mut fields = body.fields()?;
    fields.allow_only(&["auth", "display_name", "metadata"]);
    let auth = fields.nested("auth", |auth| auth::read(auth, false)).flatten();
    let clear_display_name = fields.is_null("display_name");
    let display_name = fields.optional_string("display_name", NAME_CHARS_MAX);
    let patch = metadata::read(&mut fields);
    fields.finish()?;
    let current = app.call::<rpc::GetVaultCredential>(&request(&caller, &path)?).await?;
    if let Some(patch) = &patch {
        metadata::merged(&current.metadata, patch)
            .map_err(|why| refused_field("metadata", &why))?;
    }
    let shown = serde_json::from_str(&current.auth).unwrap_or_default();
    let update = auth.map(|auth| auth.update(shown)).transpose()?.unwrap_or_default();
    let kept = match update.secret {
        SecretUpdate::Unchanged => None,
        SecretUpdate::Members(members) => {
            if let Some(secret_id) = current.secret_id {
                app.merge(&user_id, Kind::VaultCredential, &members, secret_id).await?;
            }
            None
        }
        SecretUpdate::Document(document) => {
            Some(app.keep(&user_id, Kind::VaultCredential, &document, None).await?)
        }
    };
    let request = UpdateVaultCredentialRequest {
        user_id,
        vault_id,
        credential_id,
        display_name,
        clear_display_name,
        metadata: patch.as_ref().map(text),
        secret_id: kept.as_ref().map(|kept| kept.id.clone()),
        auth: update.shown.map(|shown| shown.to_string()),
    };
    let reply = app.bus.call::<rpc::UpdateVaultCredential>(&request, crate::RPC_DEADLINE).await;
    app.forget_unless_used(kept, &reply, |_| true).await;
    Ok(Json(reply?.into()))
}

/// List the credentials of a vault, newest first
#[utoipa::path(get, path = "/v1/vaults/{id}/credentials", tag = "managed-agents", operation_id = "vault_credentials_list", params(IdParams, PageParams),
    responses((status = 200, description = "A page of credentials", body = Page<Credential>)))]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
    query: Query,
) -> Result<Json<Page<Credential>>, ApiError> {
    let wanted = Wanted::of_fixed_order(&query, LIMITS)?;
    let request = ListVaultCredentialsRequest {
        user_id: caller.user_id,
        vault_id: Prefix::Vault.find(&id)?,
        limit: wanted.limit,
        after: wanted.after(),
        include_archived: query.flag("include_archived")?,
    };
    let reply = app.call::<rpc::ListVaultCredentials>(&request).await?;
    let cursor = |row: &scheduler::VaultCredential| Cursor {
        position: row.created_at_us,
        id: row.credential_id.clone(),
    };
    Ok(page(reply.credentials, reply.has_more, cursor, Credential::from))
}

/// Archive a credential, whose secret is deleted
#[utoipa::path(post, path = "/v1/vaults/{id}/credentials/{credential_id}/archive", tag = "managed-agents", operation_id = "vault_credentials_archive", params(CredentialParams),
    responses((status = 200, description = "The credential, archived now or before", body = Credential)))]
pub async fn archive(
    State(app): State<App>,
    caller: Caller,
    path: CredentialPath,
) -> Result<Json<Credential>, ApiError> {
    Ok(Json(app.call::<rpc::ArchiveVaultCredential>(&request(&caller, &path)?).await?.into()))
}

/// Delete a credential
#[utoipa::path(delete, path = "/v1/vaults/{id}/credentials/{credential_id}", tag = "managed-agents", operation_id = "vault_credentials_delete", params(CredentialParams),
    responses((status = 200, description = "The credential was deleted", body = Deleted)))]
pub async fn delete(
    State(app): State<App>,
    caller: Caller,
    path: CredentialPath,
) -> Result<Json<Deleted>, ApiError> {
    let Empty {} = app.call::<rpc::DeleteVaultCredential>(&request(&caller, &path)?).await?;
    Ok(Json(Deleted { id: path.0.1, r#type: "vault_credential_deleted" }))
}
