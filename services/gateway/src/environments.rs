//! Environments (contract §5): create, get, list.

use axum::{
    Json,
    extract::{Path, State},
    http::StatusCode,
};
use contract::{
    rpc,
    scheduler::{CreateEnvironmentRequest, Environment, GetEnvironmentRequest},
    vault::PutSecretRequest,
};
use serde_json::{Value, json};
use types::limits::{BODY_BYTES_MAX, NAME_CHARS_MAX};

use crate::{
    App,
    agents::time,
    auth::Caller,
    body::{Body, FieldError},
    error::ApiError,
    page::{Page, envelope},
};

pub async fn create(State(app): State<App>, caller: Caller, body: Body) -> Result<(StatusCode, Json<Value>), ApiError> {
    let mut fields = body.fields()?;
    let name = fields.string("name", NAME_CHARS_MAX);
    fields.not_yet("packages");
    let env_vars = fields.string_map("env_vars");
    for key in env_vars.keys().filter(|key| !is_variable(key)) {
        fields.add(FieldError::value("env_vars", &format!("Invalid environment variable name: {key}"), key.as_str().into()));
    }
    let setup_script = fields.optional_string("setup_script", BODY_BYTES_MAX).unwrap_or_default();
    let networking = fields.object("networking");
    match networking.get("type").and_then(Value::as_str) {
        None | Some("unrestricted") => {}
        Some("limited") => {
            fields.add(FieldError::value("networking", "limited networking is not supported by this version", "limited".into()))
        }
        Some(other) => fields.add(FieldError::value("networking", "type must be 'unrestricted' or 'limited'", other.into())),
    }
    if setup_script.contains('\0') || name.contains('\0') || Value::Object(env_vars.clone()).to_string().contains("\\u0000") {
        fields.add(FieldError::value("setup_script", "text must not contain NUL", Value::Null));
    }
    fields.finish()?;
    let mut env_var_names: Vec<String> = env_vars.keys().cloned().collect();
    env_var_names.sort();
    let env_vars_secret_id = if env_vars.is_empty() {
        None
    } else {
        // Handed on as it arrived; from here on there is only a reference.
        let value = Value::Object(env_vars).to_string().into_bytes();
        let secret = PutSecretRequest { user_id: caller.user_id.clone(), kind: "env_vars".to_owned(), value };
        Some(app.call::<rpc::PutSecret>(&secret).await?.secret_id)
    };
    let request = CreateEnvironmentRequest {
        user_id: caller.user_id,
        name,
        packages: "{}".to_owned(),
        setup_script,
        networking: json!({ "type": "unrestricted" }).to_string(),
        env_var_names,
        env_vars_secret_id,
    };
    let environment = app.call::<rpc::CreateEnvironment>(&request).await?;
    Ok((StatusCode::CREATED, Json(describe(environment))))
}

/// `[A-Za-z_][A-Za-z0-9_]*`
fn is_variable(name: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    name.chars().all(word) && name.chars().next().is_some_and(|first| !first.is_ascii_digit())
}

pub async fn get(State(app): State<App>, caller: Caller, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let request = GetEnvironmentRequest { user_id: caller.user_id, environment_id: id };
    Ok(Json(describe(app.call::<rpc::GetEnvironment>(&request).await?)))
}

pub async fn list(State(app): State<App>, caller: Caller, page: Page) -> Result<Json<Value>, ApiError> {
    let reply = app.call::<rpc::ListEnvironments>(&page.request(caller)).await?;
    let last = reply.environments.last().map(|environment| (environment.created_at_us, environment.environment_id.clone()));
    Ok(envelope(reply.environments.into_iter().map(describe).collect(), reply.has_more, last))
}

fn describe(environment: Environment) -> Value {
    let parsed = |text: &str| serde_json::from_str::<Value>(text).unwrap_or_else(|_| json!({}));
    json!({
        "id": environment.environment_id,
        "type": "environment",
        "name": environment.name,
        "packages": parsed(&environment.packages),
        "setup_script": Some(environment.setup_script).filter(|script| !script.is_empty()),
        "networking": parsed(&environment.networking),
        "env_var_names": environment.env_var_names,
        "version": environment.version,
        "created_at": time(environment.created_at_us),
        "updated_at": time(environment.updated_at_us),
        "archived_at": environment.archived_at_us.map(time),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_have_the_names_that_shells_take() {
        assert!(is_variable("_A1") && is_variable("PATH"));
        assert!(!is_variable("") && !is_variable("1A") && !is_variable("A-B") && !is_variable("É"));
    }
}
