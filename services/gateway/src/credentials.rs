//! Stored credentials (docs/api.md §3). A value goes to the vault and never comes back.

use axum::{Json, extract::State};
use contract::{
    rpc,
    vault::{self, DeleteCredentialRequest, ListCredentialsRequest, PutCredentialRequest},
};
use serde::Serialize;
use types::{CredentialKind, limits::BODY_BYTES_MAX};
use utoipa::{IntoParams, ToSchema};

use crate::{
    App,
    agents::time,
    auth::Caller,
    body::Body,
    error::{ApiError, Detail},
    path::Id,
};

/// A stored credential: all but its value.
#[derive(Serialize, ToSchema)]
pub struct Credential {
    #[schema(example = "provider:anthropic")]
    kind: String,
    #[schema(format = DateTime)]
    created_at: String,
    #[schema(format = DateTime)]
    updated_at: String,
    /// The last four characters; empty for short values.
    hint: String,
}

impl From<vault::Credential> for Credential {
    fn from(credential: vault::Credential) -> Self {
        Self {
            created_at: time(credential.created_at_us),
            updated_at: time(credential.updated_at_us),
            kind: credential.kind,
            hint: credential.hint,
        }
    }
}

/// All of a user's credentials: one of each kind at most.
#[derive(Serialize, ToSchema)]
pub struct Credentials {
    data: Vec<Credential>,
}

#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "describes a path")]
pub struct KindParams {
    /// `provider:anthropic`, `provider:openai`, `provider:google`, `runtime_token:claude-oauth` or
    /// `backend:sprites`
    #[param(example = "provider:anthropic")]
    kind: String,
}

/// A credential's value.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes a body that is never kept in this form")]
pub struct PutCredential {
    /// One line, at most 16 KiB
    #[schema(min_length = 1)]
    value: String,
}

fn known(kind: &str) -> Result<CredentialKind, ApiError> {
    kind.parse().map_err(|_| ApiError::not_found("Credential"))
}

/// Store a credential
#[utoipa::path(put, path = "/credentials/{kind}", tag = "credentials", params(KindParams), request_body = PutCredential,
    responses((status = 200, description = "The credential was stored", body = Credential)))]
pub async fn put(
    State(app): State<App>,
    caller: Caller,
    Id(kind): Id,
    body: Body,
) -> Result<Json<Credential>, ApiError> {
    let kind = known(&kind)?;
    let mut fields = body.fields()?;
    let value = fields.string("value", BODY_BYTES_MAX);
    fields.finish()?;
    let sealed = Some(app.seal(&caller.user_id, kind.as_str(), value.as_bytes()).await?);
    let request = PutCredentialRequest {
        user_id: caller.user_id,
        kind: kind.as_str().to_owned(),
        sealed,
        ..PutCredentialRequest::default()
    };
    Ok(Json(app.call::<rpc::PutCredential>(&request).await?.into()))
}

/// List stored credentials
#[utoipa::path(get, path = "/credentials", tag = "credentials",
    responses((status = 200, description = "The stored credentials, without their values", body = Credentials)))]
pub async fn list(State(app): State<App>, caller: Caller) -> Result<Json<Credentials>, ApiError> {
    let reply = app
        .call::<rpc::ListCredentials>(&ListCredentialsRequest { user_id: caller.user_id })
        .await?;
    // The deployment's own Sprites token is no user's: it has no date.
    let own = reply.credentials.into_iter().filter(|credential| credential.created_at_us > 0);
    Ok(Json(Credentials { data: own.map(Credential::from).collect() }))
}

/// Delete a credential
#[utoipa::path(delete, path = "/credentials/{kind}", tag = "credentials", params(KindParams),
    responses((status = 200, description = "The credential was deleted", body = Detail)))]
pub async fn delete(
    State(app): State<App>,
    caller: Caller,
    Id(kind): Id,
) -> Result<Json<Detail>, ApiError> {
    let kind = known(&kind)?;
    app.call::<rpc::DeleteCredential>(&DeleteCredentialRequest {
        user_id: caller.user_id,
        kind: kind.as_str().to_owned(),
    })
    .await?;
    Ok(Detail::new("Credential deleted"))
}
