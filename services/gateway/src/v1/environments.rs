//! Environments under `/v1`, which have no versions: a change applies to sessions that are created
//! later.

use std::collections::BTreeMap;

use axum::{Json, extract::State};
use bus::RpcError;
use contract::{
    common::Empty,
    rpc,
    scheduler::{
        self, CreateEnvironmentRequest, Cursor, GetEnvironmentRequest, UpdateEnvironmentRequest,
    },
};
use serde::Serialize;
use serde_json::{Map, Value};
use types::{
    EnvironmentId, ErrorCode, Networking, PackageManager,
    environment::{HostPattern, NetworkingKind, is_package},
    limits::{BODY_BYTES_MAX, NAME_CHARS_MAX},
};
use utoipa::ToSchema;

use crate::{
    App,
    agents::json as text,
    auth::Caller,
    body::{Body, Fields},
    error::ApiError,
    idempotency::{IdempotencyKey, IdempotencyParams},
    v1::{
        agents::{ListParams, list_request},
        error::refused_field,
        ids::{PathId, Prefix},
        metadata,
        page::{LIMITS, Page, PageParams, Wanted, page},
        path::IdParams,
        query::Query,
        time,
    },
};

const DESCRIPTION_CHARS_MAX: usize = 2048;
const ATTEMPTS: u32 = 5;

/// An environment. Its variables and its set-up script are shown by the original API.
#[derive(Serialize, ToSchema)]
#[schema(as = V1Environment)]
pub struct Environment {
    #[schema(example = "env_011234567890123456789AbC")]
    id: String,
    #[schema(pattern = "^environment$")]
    r#type: &'static str,
    name: String,
    description: Option<String>,
    config: Config,
    metadata: Map<String, Value>,
    #[schema(value_type = Option<String>)]
    scope: Value,
    /// `active` or `archived`.
    state: &'static str,
    #[schema(format = DateTime)]
    created_at: String,
    #[schema(format = DateTime)]
    updated_at: String,
    #[schema(format = DateTime)]
    archived_at: Option<String>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = V1EnvironmentConfig)]
pub struct Config {
    #[schema(pattern = "^cloud$")]
    r#type: &'static str,
    networking: Network,
    packages: Packages,
}

#[derive(Serialize, ToSchema)]
#[schema(as = V1Networking)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Network {
    Unrestricted,
    Limited { allowed_hosts: Vec<String>, allow_mcp_servers: bool, allow_package_managers: bool },
}

/// Packages by their manager.
#[derive(Serialize, ToSchema)]
#[schema(as = V1Packages)]
pub struct Packages {
    #[schema(pattern = "^packages$")]
    r#type: &'static str,
    #[serde(flatten)]
    by_manager: BTreeMap<&'static str, Vec<String>>,
}

impl From<scheduler::Environment> for Environment {
    fn from(environment: scheduler::Environment) -> Self {
        let networking: Networking =
            serde_json::from_str(&environment.networking).unwrap_or_default();
        let networking = match networking.kind {
            NetworkingKind::Unrestricted => Network::Unrestricted,
            NetworkingKind::Limited => Network::Limited {
                allowed_hosts: networking.allowed_hosts.unwrap_or_default(),
                allow_mcp_servers: networking.allow_mcp_servers,
                allow_package_managers: networking.allow_package_managers,
            },
        };
        let mut packages: BTreeMap<String, Vec<String>> =
            serde_json::from_str(&environment.packages).unwrap_or_default();
        let by_manager = PackageManager::ALL.map(|manager| {
            (manager.as_str(), packages.remove(manager.as_str()).unwrap_or_default())
        });
        Self {
            id: Prefix::Environment.of(&environment.environment_id),
            r#type: "environment",
            name: environment.name,
            description: environment.description,
            config: Config {
                r#type: "cloud",
                networking,
                packages: Packages { r#type: "packages", by_manager: by_manager.into() },
            },
            metadata: metadata::shown(&environment.metadata),
            scope: Value::Null,
            state: if environment.archived_at_us.is_some() { "archived" } else { "active" },
            created_at: time(environment.created_at_us),
            updated_at: time(environment.updated_at_us),
            archived_at: environment.archived_at_us.map(time),
        }
    }
}

/// A new environment. In an update, every field may be absent.
#[derive(ToSchema)]
#[schema(as = V1EnvironmentBody)]
#[expect(dead_code, reason = "describes a body")]
pub struct EnvironmentBody {
    #[schema(min_length = 1, max_length = 200)]
    name: String,
    #[schema(max_length = 2048)]
    description: Option<String>,
    config: Option<Config>,
    #[schema(value_type = Option<Object>)]
    metadata: Option<Value>,
}

/// What a body says of an environment.
#[derive(Debug)]
struct EnvironmentFields {
    name: Option<String>,
    description: Option<String>,
    clear_description: bool,
    networking: Option<Networking>,
    packages: Option<BTreeMap<String, Vec<String>>>,
    metadata: Option<Map<String, Value>>,
}

impl EnvironmentFields {
    fn read(fields: &mut Fields) -> Self {
        fields.allow_only(&["name", "description", "config", "metadata"]);
        let name = fields.optional_string("name", NAME_CHARS_MAX);
        fields.refuse_blank("name");
        if fields.is_null("name") {
            fields.refuse("name", "cannot be null");
        }
        let config = fields.nested("config", |config| {
            match config.named_string("type", BODY_BYTES_MAX).as_deref() {
                None | Some("cloud") => {}
                Some("self_hosted") => config.refuse(
                    "type",
                    "self_hosted environments are not supported: the sandboxes are this server's",
                ),
                Some(_) => config.refuse("type", "must be 'cloud'"),
            }
            config.allow_only(&["type", "networking", "packages"]);
            (config.nested("networking", read_networking), config.nested("packages", read_packages))
        });
        let (networking, packages) = config.unwrap_or_default();
        Self {
            name,
            description: fields.optional_string("description", DESCRIPTION_CHARS_MAX),
            clear_description: fields.is_null("description"),
            networking,
            packages,
            metadata: metadata::read(fields),
        }
    }
}

fn read_networking(networking: &mut Fields) -> Networking {
    match networking.named_string("type", BODY_BYTES_MAX).as_deref() {
        Some("limited") => {}
        Some("unrestricted") => {
            networking.allow_only(&["type"]);
            return Networking::default();
        }
        None => return Networking::default(),
        Some(_) => {
            networking.refuse("type", "must be 'unrestricted' or 'limited'");
            return Networking::default();
        }
    }
    networking.allow_only(&[
        "type",
        "allowed_hosts",
        "allow_mcp_servers",
        "allow_package_managers",
    ]);
    let hosts = networking.strings("allowed_hosts").unwrap_or_default();
    let bad = hosts.iter().map(String::as_str).filter(|host| HostPattern::parse(host).is_none());
    networking.refuse_items("allowed_hosts", bad, |host| format!("not a host name: {host:?}"));
    Networking {
        kind: NetworkingKind::Limited,
        allowed_hosts: Some(hosts),
        allow_package_managers: read_flag(networking, "allow_package_managers"),
        allow_mcp_servers: read_flag(networking, "allow_mcp_servers"),
    }
}

fn read_flag(fields: &mut Fields, name: &str) -> bool {
    match fields.value(name) {
        None => false,
        Some(Value::Bool(flag)) => *flag,
        Some(_) => {
            fields.refuse(name, "must be true or false");
            false
        }
    }
}

fn read_packages(packages: &mut Fields) -> BTreeMap<String, Vec<String>> {
    if packages.optional_string("type", BODY_BYTES_MAX).is_some_and(|kind| kind != "packages") {
        packages.refuse("type", "must be 'packages'");
    }
    let managers = PackageManager::ALL.map(PackageManager::as_str);
    packages.allow_only(&[managers.as_slice(), &["type"]].concat());
    let mut by_manager = BTreeMap::new();
    for manager in managers {
        let Some(names) = packages.strings(manager) else { continue };
        let bad = names.iter().map(String::as_str).filter(|name| !is_package(name));
        packages.refuse_items(manager, bad, |name| format!("not a package name: {name:?}"));
        if !names.is_empty() {
            by_manager.insert(manager.to_owned(), names);
        }
    }
    by_manager
}

/// Packages come from the registries, which a limited network has to let through.
fn check_packages(
    networking: &Networking,
    packages: &BTreeMap<String, Vec<String>>,
) -> Result<(), ApiError> {
    let limited = networking.kind == NetworkingKind::Limited && !networking.allow_package_managers;
    if limited && packages.values().any(|names| !names.is_empty()) {
        return Err(refused_field(
            "config.packages",
            "packages in a limited network need networking.allow_package_managers",
        ));
    }
    Ok(())
}

/// Create an environment
#[utoipa::path(post, path = "/v1/environments", tag = "managed-agents", operation_id = "environments_create", params(IdempotencyParams), request_body = EnvironmentBody,
    responses((status = 200, description = "The environment", body = Environment)))]
pub async fn create(
    State(app): State<App>,
    caller: Caller,
    key: IdempotencyKey,
    body: Body,
) -> Result<Json<Environment>, ApiError> {
    let mut fields = body.fields()?;
    fields.require(&["name"]);
    let environment = EnvironmentFields::read(&mut fields);
    fields.finish()?;
    let (networking, packages) =
        (environment.networking.unwrap_or_default(), environment.packages.unwrap_or_default());
    check_packages(&networking, &packages)?;
    let metadata = metadata::merged("{}", &environment.metadata.unwrap_or_default())
        .map_err(|why| refused_field("metadata", &why))?;
    let request = CreateEnvironmentRequest {
        user_id: caller.user_id,
        name: environment.name.unwrap_or_default(),
        packages: text(&packages),
        networking: text(&networking),
        description: environment.description,
        metadata: text(&metadata),
        once: key.once(&body),
        environment_id: EnvironmentId::new().to_string(),
        ..CreateEnvironmentRequest::default()
    };
    let reply = app.call::<rpc::CreateEnvironment>(&request).await?;
    Ok(Json(reply.environment.unwrap_or_default().into()))
}

fn request(caller: &Caller, id: &str) -> Result<GetEnvironmentRequest, ApiError> {
    Ok(GetEnvironmentRequest {
        user_id: caller.user_id.clone(),
        environment_id: Prefix::Environment.find(id)?,
    })
}

/// Update an environment
#[utoipa::path(post, path = "/v1/environments/{id}", tag = "managed-agents", operation_id = "environments_update", params(IdParams), request_body = EnvironmentBody,
    responses((status = 200, description = "The environment", body = Environment)))]
pub async fn update(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
    body: Body,
) -> Result<Json<Environment>, ApiError> {
    let request = request(&caller, &id)?;
    let mut fields = body.fields()?;
    let change = EnvironmentFields::read(&mut fields);
    fields.finish()?;
    for attempt in 1.. {
        let current = app.call::<rpc::GetEnvironment>(&request).await?;
        let networking = change
            .networking
            .clone()
            .unwrap_or_else(|| serde_json::from_str(&current.networking).unwrap_or_default());
        let packages = change
            .packages
            .clone()
            .unwrap_or_else(|| serde_json::from_str(&current.packages).unwrap_or_default());
        if change.networking.is_some() || change.packages.is_some() {
            check_packages(&networking, &packages)?;
        }
        let metadata = change
            .metadata
            .as_ref()
            .map(|patch| metadata::merged(&current.metadata, patch))
            .transpose();
        let update = UpdateEnvironmentRequest {
            user_id: caller.user_id.clone(),
            environment_id: request.environment_id.clone(),
            version: current.version.into(),
            name: change.name.clone(),
            packages: change.packages.as_ref().map(text),
            networking: change.networking.as_ref().map(text),
            description: change.description.clone(),
            clear_description: change.clear_description,
            metadata: metadata.map_err(|why| refused_field("metadata", &why))?.as_ref().map(text),
            ..UpdateEnvironmentRequest::default()
        };
        match app.bus.call::<rpc::UpdateEnvironment>(&update, crate::RPC_DEADLINE).await {
            // Overtaken by another change: the last one wins. A name that is taken stays taken.
            Err(RpcError { code: ErrorCode::Conflict, reason: None, .. }) if attempt < ATTEMPTS => {
            }
            reply => return Ok(Json(reply?.into())),
        }
    }
    Err(ApiError::not_found("Environment"))
}

/// Get an environment
#[utoipa::path(get, path = "/v1/environments/{id}", tag = "managed-agents", operation_id = "environments_retrieve", params(IdParams),
    responses((status = 200, description = "The environment, archived or not", body = Environment)))]
pub async fn get(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
) -> Result<Json<Environment>, ApiError> {
    Ok(Json(app.call::<rpc::GetEnvironment>(&request(&caller, &id)?).await?.into()))
}

/// Archive an environment
#[utoipa::path(post, path = "/v1/environments/{id}/archive", tag = "managed-agents", operation_id = "environments_archive", params(IdParams),
    responses((status = 200, description = "The environment, archived now or before", body = Environment)))]
pub async fn archive(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
) -> Result<Json<Environment>, ApiError> {
    let request = request(&caller, &id)?;
    match app.bus.call::<rpc::ArchiveEnvironment>(&request, crate::RPC_DEADLINE).await {
        // Archived before.
        Err(RpcError { code: ErrorCode::Conflict, .. }) => {
            Ok(Json(app.call::<rpc::GetEnvironment>(&request).await?.into()))
        }
        reply => Ok(Json(reply?.into())),
    }
}

/// The answer to a deletion.
#[derive(Serialize, ToSchema)]
#[schema(as = V1Deleted)]
pub struct Deleted {
    pub id: String,
    #[schema(example = "environment_deleted")]
    pub r#type: &'static str,
}

/// Delete an environment that no session uses
#[utoipa::path(delete, path = "/v1/environments/{id}", tag = "managed-agents", operation_id = "environments_delete", params(IdParams),
    responses((status = 200, description = "The environment was deleted", body = Deleted)))]
pub async fn delete(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
) -> Result<Json<Deleted>, ApiError> {
    let Empty {} = app.call::<rpc::DeleteEnvironment>(&request(&caller, &id)?).await?;
    Ok(Json(Deleted { id, r#type: "environment_deleted" }))
}

/// List environments, newest first
#[utoipa::path(get, path = "/v1/environments", tag = "managed-agents", operation_id = "environments_list", params(PageParams, ListParams),
    responses((status = 200, description = "A page of environments", body = Page<Environment>)))]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    query: Query,
) -> Result<Json<Page<Environment>>, ApiError> {
    let wanted = Wanted::of_fixed_order(&query, LIMITS)?;
    let reply =
        app.call::<rpc::ListEnvironments>(&list_request(&query, &wanted, caller.user_id)?).await?;
    let cursor = |row: &scheduler::Environment| Cursor {
        position: row.created_at_us,
        id: row.environment_id.clone(),
    };
    Ok(page(reply.environments, reply.has_more, cursor, Environment::from))
}
