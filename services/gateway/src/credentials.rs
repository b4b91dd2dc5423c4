//! Stored credentials (contract §3). A value goes to the vault and never comes back.

use axum::{
    Json,
    extract::{Path, State},
};
use contract::{
    rpc,
    vault::{Credential, DeleteCredentialRequest, ListCredentialsRequest, PutCredentialRequest},
};
use serde_json::{Value, json};
use types::{CredentialKind, limits::BODY_BYTES_MAX};

use crate::{
    App,
    agents::time,
    auth::Caller,
    body::Body,
    error::{ApiError, detail},
};

fn known(kind: &str) -> Result<CredentialKind, ApiError> {
    kind.parse().map_err(|_| ApiError::not_found("Credential"))
}

pub async fn put(State(app): State<App>, caller: Caller, Path(kind): Path<String>, body: Body) -> Result<Json<Value>, ApiError> {
    let kind = known(&kind)?;
    let mut fields = body.fields()?;
    let value = fields.string("value", BODY_BYTES_MAX);
    fields.finish()?;
    let request = PutCredentialRequest { user_id: caller.user_id, kind: kind.as_str().to_owned(), value: value.into_bytes() };
    Ok(Json(describe(&app.call::<rpc::PutCredential>(&request).await?)))
}

pub async fn list(State(app): State<App>, caller: Caller) -> Result<Json<Value>, ApiError> {
    let reply = app.call::<rpc::ListCredentials>(&ListCredentialsRequest { user_id: caller.user_id }).await?;
    // The deployment's own Sprites token is no user's: it has no date.
    let own = reply.credentials.iter().filter(|credential| credential.created_at_us > 0);
    Ok(Json(json!({ "data": own.map(describe).collect::<Vec<_>>() })))
}

pub async fn delete(State(app): State<App>, caller: Caller, Path(kind): Path<String>) -> Result<Json<Value>, ApiError> {
    let kind = known(&kind)?;
    app.call::<rpc::DeleteCredential>(&DeleteCredentialRequest { user_id: caller.user_id, kind: kind.as_str().to_owned() }).await?;
    Ok(detail("Credential deleted"))
}

fn describe(credential: &Credential) -> Value {
    json!({
        "kind": credential.kind,
        "created_at": time(credential.created_at_us),
        "updated_at": time(credential.updated_at_us),
        "hint": credential.hint,
    })
}
