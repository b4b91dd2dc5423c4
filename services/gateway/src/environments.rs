//! Environments (docs/api.md §5): how a sandbox is set up.

use std::collections::BTreeMap;

use axum::{Json, extract::State, http::StatusCode};
use bus::RpcError;
use contract::{
    common::Empty,
    rpc,
    scheduler::{
        self, CreateEnvironmentRequest, Cursor, EnvVars, GetEnvironmentRequest,
        UpdateEnvironmentRequest,
    },
};
use serde::Serialize;
use types::{
    EnvironmentId, ErrorCode, Networking, PackageManager,
    environment::{
        HostPattern, NetworkingKind, VARIABLES_BYTES_MAX, check_variable, is_package, is_variable,
    },
    limits::{BODY_BYTES_MAX, NAME_CHARS_MAX, TEXT_CHARS_MAX},
};
use utoipa::ToSchema;

use crate::{
    App,
    agents::{filled, json, time},
    auth::Caller,
    body::{Body, Fields},
    error::{ApiError, Detail},
    idempotency::{Created, IdempotencyKey, IdempotencyParams},
    openapi::Conflict,
    page::{Listed, Page, PageParams, listed},
    path::{Id, IdParams},
    secrets::{Kept, Kind},
};

/// An environment. The values of its variables are never returned.
#[derive(Serialize, ToSchema)]
pub struct Environment {
    #[serde(flatten)]
    snapshot: EnvironmentVersion,
    #[schema(format = DateTime)]
    updated_at: String,
    #[schema(format = DateTime)]
    archived_at: Option<String>,
}

/// An environment as it was at a version.
#[derive(Serialize, ToSchema)]
pub struct EnvironmentVersion {
    /// The environment's id.
    #[schema(format = Uuid)]
    id: String,
    #[schema(pattern = "^environment$")]
    r#type: &'static str,
    name: String,
    /// Packages by their manager: `apt`, `cargo`, `gem`, `go`, `npm`, `pip`.
    packages: BTreeMap<String, Vec<String>>,
    /// A bash script that sets the sandbox up.
    setup_script: Option<String>,
    networking: Networking,
    env_var_names: Vec<String>,
    version: u32,
    #[schema(format = DateTime)]
    created_at: String,
}

impl From<scheduler::Environment> for Environment {
    fn from(environment: scheduler::Environment) -> Self {
        let (updated_at, archived_at) =
            (time(environment.updated_at_us), environment.archived_at_us.map(time));
        Self { snapshot: environment.into(), updated_at, archived_at }
    }
}

impl From<scheduler::Environment> for EnvironmentVersion {
    fn from(environment: scheduler::Environment) -> Self {
        Self {
            id: environment.environment_id,
            r#type: "environment",
            name: environment.name,
            packages: serde_json::from_str(&environment.packages).unwrap_or_default(),
            setup_script: filled(environment.setup_script),
            networking: serde_json::from_str(&environment.networking).unwrap_or_default(),
            env_var_names: environment.env_var_names,
            version: environment.version,
            created_at: time(environment.created_at_us),
        }
    }
}

/// A new environment.
#[derive(ToSchema)]
pub struct CreateEnvironment {
    /// Unique among the user's active environments
    #[schema(max_length = 200)]
    name: String,
    /// Packages by their manager: `apt`, `cargo`, `gem`, `go`, `npm`, `pip`
    packages: Option<BTreeMap<String, Vec<String>>>,
    /// Stored encrypted and never returned
    env_vars: Option<BTreeMap<String, String>>,
    #[schema(max_length = 262_144)]
    setup_script: Option<String>,
    networking: Option<Networking>,
}

impl CreateEnvironment {
    pub(crate) fn read(fields: &mut Fields) -> Self {
        Self {
            name: fields.string("name", NAME_CHARS_MAX),
            packages: read_packages(fields),
            env_vars: read_env_vars(fields, "env_vars"),
            setup_script: fields.optional_string("setup_script", TEXT_CHARS_MAX),
            networking: read_networking(fields),
        }
    }
}

fn read_packages(fields: &mut Fields) -> Option<BTreeMap<String, Vec<String>>> {
    let managers: Vec<String> = fields.object("packages")?.keys().cloned().collect();
    let unknown: Vec<String> =
        managers.iter().filter(|name| name.parse::<PackageManager>().is_err()).cloned().collect();
    fields.refuse_items("packages", unknown.iter().map(String::as_str), |name| {
        format!("Unknown package manager: {name}")
    });
    fields.nested("packages", |packages| {
        let mut by_manager = BTreeMap::new();
        for manager in managers.into_iter().filter(|name| name.parse::<PackageManager>().is_ok()) {
            let Some(names) = packages.strings(&manager) else { continue };
            let bad = names.iter().map(String::as_str).filter(|name| !is_package(name));
            packages.refuse_items(&manager, bad, |name| format!("not a package name: {name:?}"));
            by_manager.insert(manager, names);
        }
        by_manager
    })
}

/// Variables, by names that shells take.
pub fn read_env_vars(fields: &mut Fields, name: &str) -> Option<BTreeMap<String, String>> {
    let vars = fields.string_map(name)?;
    let bad = vars.keys().map(String::as_str).filter(|key| !is_variable(key));
    fields.refuse_items(name, bad, |key| format!("Invalid environment variable name: {key}"));
    for (key, error) in
        vars.iter().filter_map(|(key, value)| Some((key, check_variable(key, value).err()?)))
    {
        fields.refuse(name, &format!("The variable {key} {error}"));
    }
    if vars.iter().map(|(key, value)| key.len() + value.len() + 2).sum::<usize>()
        > VARIABLES_BYTES_MAX
    {
        fields.refuse(
            name,
            &format!("The variables are too large: at most {VARIABLES_BYTES_MAX} bytes together"),
        );
    }
    Some(vars)
}

fn read_networking(fields: &mut Fields) -> Option<Networking> {
    fields.nested("networking", |networking| {
        let kind = match networking.optional_string("type", BODY_BYTES_MAX).as_deref() {
            None | Some("unrestricted") => NetworkingKind::Unrestricted,
            Some("limited") => NetworkingKind::Limited,
            Some(_) => {
                networking.refuse("type", "type must be 'unrestricted' or 'limited'");
                NetworkingKind::Limited
            }
        };
        let hosts = networking.strings("allowed_hosts");
        let bad = hosts
            .iter()
            .flatten()
            .map(String::as_str)
            .filter(|host| HostPattern::parse(host).is_none());
        networking.refuse_items("allowed_hosts", bad, |host| format!("not a host name: {host:?}"));
        let allowed_hosts = match kind {
            NetworkingKind::Unrestricted => None,
            NetworkingKind::Limited => Some(hosts.unwrap_or_default()),
        };
        Networking { kind, allowed_hosts, ..Networking::default() }
    })
}

/// Create an environment
#[utoipa::path(post, path = "/environments", tag = "environments", params(IdempotencyParams), request_body = CreateEnvironment,
    responses((status = 201, description = "The environment, at version 1", body = Environment), Conflict))]
pub async fn create(
    State(app): State<App>,
    caller: Caller,
    key: IdempotencyKey,
    body: Body,
) -> Result<Created<Environment>, ApiError> {
    let mut fields = body.fields()?;
    let environment = CreateEnvironment::read(&mut fields);
    fields.finish()?;
    let vars = environment.env_vars.unwrap_or_default();
    let kept = if vars.is_empty() {
        None
    } else {
        Some(app.keep(&caller.user_id, Kind::EnvVars, &vars, None).await?)
    };
    let request = CreateEnvironmentRequest {
        user_id: caller.user_id,
        name: environment.name,
        packages: json(&environment.packages.unwrap_or_default()),
        setup_script: environment.setup_script.unwrap_or_default(),
        networking: json(&environment.networking.unwrap_or_default()),
        env_var_names: vars.into_keys().collect(),
        env_vars_secret_id: kept.as_ref().map(|kept| kept.id.clone()),
        once: key.once(&body),
        environment_id: EnvironmentId::new().to_string(),
        ..CreateEnvironmentRequest::default()
    };
    let reply = app.bus.call::<rpc::CreateEnvironment>(&request, crate::RPC_DEADLINE).await;
    app.forget_unless_used(kept, &reply, |reply| !reply.replayed).await;
    let reply = reply?;
    Ok(Created {
        status: StatusCode::CREATED,
        body: reply.environment.unwrap_or_default().into(),
        replayed: reply.replayed,
    })
}

/// A change of an environment. What is absent or null stays as it is.
#[derive(ToSchema)]
pub struct UpdateEnvironment {
    /// The version that the change is made to
    version: i64,
    #[schema(max_length = 200)]
    name: Option<String>,
    /// Replaces all packages
    packages: Option<BTreeMap<String, Vec<String>>>,
    /// Replaces all variables
    env_vars: Option<BTreeMap<String, String>>,
    #[schema(max_length = 262_144)]
    setup_script: Option<String>,
    networking: Option<Networking>,
}

impl UpdateEnvironment {
    pub(crate) fn read(fields: &mut Fields) -> Self {
        Self {
            version: fields.required_integer("version"),
            name: fields.optional_string("name", NAME_CHARS_MAX),
            packages: read_packages(fields),
            env_vars: read_env_vars(fields, "env_vars"),
            setup_script: fields.optional_string("setup_script", TEXT_CHARS_MAX),
            networking: read_networking(fields),
        }
    }
}

/// Change an environment
#[utoipa::path(put, path = "/environments/{id}", tag = "environments", params(IdParams), request_body = UpdateEnvironment,
    responses((status = 200, description = "The environment; its version is raised if anything changed", body = Environment), Conflict))]
pub async fn update(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
    body: Body,
) -> Result<Json<Environment>, ApiError> {
    let mut fields = body.fields()?;
    let change = UpdateEnvironment::read(&mut fields);
    fields.finish()?;
    let mut kept = None;
    let mut secrets_of_version = None;
    let env_vars = match change.env_vars {
        None => None,
        Some(vars) => {
            let version;
            (kept, version) = keep_vars(&app, &caller, &id, change.version, &vars).await?;
            secrets_of_version = Some(version);
            Some(EnvVars {
                names: vars.into_keys().collect(),
                secret_id: kept.as_ref().map(|kept| kept.id.clone()),
            })
        }
    };
    let request = UpdateEnvironmentRequest {
        user_id: caller.user_id,
        environment_id: id,
        version: change.version,
        name: change.name,
        packages: change.packages.as_ref().map(json),
        setup_script: change.setup_script,
        networking: change.networking.as_ref().map(json),
        env_vars,
        secrets_of_version,
        ..UpdateEnvironmentRequest::default()
    };
    let reply = app.bus.call::<rpc::UpdateEnvironment>(&request, crate::RPC_DEADLINE).await;
    app.forget_unless_used(kept, &reply, |_| true).await;
    Ok(Json(reply?.into()))
}

/// Keeps variables, compared with those of the version that is changed: equal ones are no change.
async fn keep_vars(
    app: &App,
    caller: &Caller,
    id: &str,
    version: i64,
    vars: &BTreeMap<String, String>,
) -> Result<(Option<Kept>, u32), ApiError> {
    let request =
        GetEnvironmentRequest { user_id: caller.user_id.clone(), environment_id: id.to_owned() };
    let current = match app.bus.call::<rpc::GetEnvironment>(&request, crate::RPC_DEADLINE).await {
        Ok(environment) => environment,
        // The scheduler says so itself, when it is the turn of that check.
        Err(RpcError { code: ErrorCode::NotFound, .. }) => scheduler::Environment::default(),
        Err(failure) => return Err(failure.into()),
    };
    let applies = i64::from(current.version) == version
        && current.archived_at_us.is_none()
        && !vars.is_empty();
    let kept = if applies {
        Some(app.keep(&caller.user_id, Kind::EnvVars, vars, current.env_vars_secret_id).await?)
    } else {
        None
    };
    Ok((kept, current.version))
}

/// Get an environment
#[utoipa::path(get, path = "/environments/{id}", tag = "environments", params(IdParams),
    responses((status = 200, description = "The environment, archived or not", body = Environment)))]
pub async fn get(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<Json<Environment>, ApiError> {
    let request = GetEnvironmentRequest { user_id: caller.user_id, environment_id: id };
    Ok(Json(app.call::<rpc::GetEnvironment>(&request).await?.into()))
}

/// Archive an environment
#[utoipa::path(post, path = "/environments/{id}/archive", tag = "environments", params(IdParams),
    responses((status = 200, description = "The environment, archived", body = Environment), Conflict))]
pub async fn archive(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<Json<Environment>, ApiError> {
    let request = GetEnvironmentRequest { user_id: caller.user_id, environment_id: id };
    Ok(Json(app.call::<rpc::ArchiveEnvironment>(&request).await?.into()))
}

/// Delete an environment that no session uses
#[utoipa::path(delete, path = "/environments/{id}/delete", tag = "environments", params(IdParams),
    responses((status = 200, description = "The environment was deleted", body = Detail), Conflict))]
pub async fn delete(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<Json<Detail>, ApiError> {
    let request = GetEnvironmentRequest { user_id: caller.user_id, environment_id: id };
    let Empty {} = app.call::<rpc::DeleteEnvironment>(&request).await?;
    Ok(Detail::new("Environment deleted"))
}

/// List environments that are not archived, newest first
#[utoipa::path(get, path = "/environments", tag = "environments", params(PageParams),
    responses((status = 200, description = "A page of environments", body = Listed<Environment>)))]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    page: Page,
) -> Result<Json<Listed<Environment>>, ApiError> {
    let reply = app.call::<rpc::ListEnvironments>(&page.request(caller)).await?;
    let cursor = |row: &scheduler::Environment| Cursor {
        position: row.created_at_us,
        id: row.environment_id.clone(),
    };
    Ok(listed(reply.environments, reply.has_more, cursor, Environment::from))
}

/// List the versions of an environment, newest first
#[utoipa::path(get, path = "/environments/{id}/versions", tag = "environments", params(IdParams, PageParams),
    responses((status = 200, description = "A page of versions", body = Listed<EnvironmentVersion>)))]
pub async fn versions(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
    page: Page,
) -> Result<Json<Listed<EnvironmentVersion>>, ApiError> {
    let reply = app.call::<rpc::ListEnvironmentVersions>(&page.request_parts(caller, id)).await?;
    let cursor =
        |row: &scheduler::Environment| Cursor { position: row.version.into(), id: String::new() };
    Ok(listed(reply.environments, reply.has_more, cursor, EnvironmentVersion::from))
}
