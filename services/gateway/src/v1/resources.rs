//! Resources of sessions under `/v1`: repositories, given when a session is created, and files,
//! which may be added later.

use std::collections::{BTreeMap, BTreeSet};

use axum::{Json, extract::State};
use contract::{
    common::Empty,
    rpc,
    scheduler::{
        self, AddSessionFileRequest, EnsureSessionSecretRequest, GetSessionRequest, NewSessionFile,
        RemoveSessionFileRequest,
    },
};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use types::{
    FileId, Repository, SecretId,
    file::{FILES_OF_SESSION_MAX, UPLOADS, mount_path},
    limits::{BODY_BYTES_MAX, RESOURCES_MAX},
};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::{
    App,
    auth::Caller,
    body::{Body, Fields},
    error::ApiError,
    secrets::Kind,
    sessions::{Resource as NewRepository, SessionSecrets, read_resource, read_token},
    v1::{
        environments::Deleted,
        error::refused_field,
        ids::{PathId, Prefix},
        path::IdParams,
        time,
    },
};

/// A file or a repository of a session. A repository's token is never shown.
#[derive(Serialize, ToSchema)]
#[schema(as = V1SessionResource)]
pub struct Resource {
    #[schema(example = "sesrsc_011234567890123456789AbC")]
    id: String,
    #[serde(flatten)]
    given: Given,
    #[schema(format = DateTime)]
    created_at: String,
    #[schema(format = DateTime)]
    updated_at: String,
}

#[derive(Serialize, ToSchema)]
#[schema(as = V1SessionResourceKind)]
#[serde(untagged)]
pub enum Given {
    Repository(Repository),
    File {
        #[schema(pattern = "^file$")]
        r#type: &'static str,
        /// The session's own copy.
        file_id: String,
        mount_path: String,
    },
}

impl Resource {
    /// Repositories have no ids of their own: a path names one in its session.
    fn id_of_repository(session: &str, mount_path: &str) -> String {
        let digest = Sha256::new()
            .chain_update(session)
            .chain_update(b"\0")
            .chain_update(mount_path)
            .finalize();
        let bytes = digest.first_chunk::<16>().copied().unwrap_or_default();
        Prefix::Resource.encode(Uuid::from_bytes(bytes))
    }

    pub fn all_of(session: &scheduler::Session) -> Vec<Self> {
        let repositories: Vec<Repository> =
            serde_json::from_str(&session.resources).unwrap_or_default();
        let repository = |repository: Repository| Self {
            id: Self::id_of_repository(&session.session_id, &repository.mount_path),
            given: Given::Repository(repository),
            created_at: time(session.created_at_us),
            updated_at: time(session.tokens_changed_at_us.unwrap_or(session.created_at_us)),
        };
        repositories
            .into_iter()
            .map(repository)
            .chain(session.files.iter().map(Self::from))
            .collect()
    }
}

impl From<&scheduler::File> for Resource {
    fn from(file: &scheduler::File) -> Self {
        let file_id = Prefix::File.of(&file.file_id);
        Self {
            id: Prefix::Resource.of(&file.file_id),
            given: Given::File { r#type: "file", file_id, mount_path: file.path.clone() },
            created_at: time(file.created_at_us),
            updated_at: time(file.created_at_us),
        }
    }
}

// --- reading bodies ------------------------------------------------------------------------------

/// A file that a session is to have, as a body names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedFile {
    file_id: String,
    path: String,
}

impl WantedFile {
    /// # Errors
    /// 404 for what is no id of a file.
    pub fn copy(self) -> Result<NewSessionFile, ApiError> {
        Ok(NewSessionFile {
            copy_id: FileId::new().to_string(),
            file_id: Prefix::File.find(&self.file_id)?,
            path: self.path,
        })
    }
}

/// The resources of a new session.
#[derive(Default)]
pub struct Wanted {
    pub repositories: Vec<NewRepository>,
    pub files: Vec<WantedFile>,
}

enum Item {
    Repository(NewRepository),
    File(WantedFile),
}

pub fn read(fields: &mut Fields) -> Wanted {
    let items =
        fields.objects("resources", RESOURCES_MAX + FILES_OF_SESSION_MAX, |item| {
            match item.value("type").and_then(|kind| kind.as_str()) {
                Some("file") => read_file(item).map(Item::File),
                Some("memory_store") => {
                    item.refuse("type", "memory_store is not supported");
                    None
                }
                _ => Some(Item::Repository(read_resource(item))),
            }
        });
    let mut wanted = Wanted::default();
    for item in items.unwrap_or_default().into_iter().flatten() {
        match item {
            Item::Repository(repository) => wanted.repositories.push(repository),
            Item::File(file) => wanted.files.push(file),
        }
    }
    for (count, max, what) in [
        (wanted.repositories.len(), RESOURCES_MAX, "repositories"),
        (wanted.files.len(), FILES_OF_SESSION_MAX, "files"),
    ] {
        if count > max {
            fields.refuse("resources", &format!("holds {count} {what}; at most {max} are allowed"));
        }
    }
    let paths =
        wanted.repositories.iter().filter_map(|repository| repository.mount_path.as_deref());
    let mut seen = BTreeSet::new();
    let twice = paths
        .chain(wanted.files.iter().map(|file| file.path.as_str()))
        .find(|path| !seen.insert(*path))
        .map(str::to_owned);
    if let Some(path) = twice {
        fields.refuse("resources", &format!("duplicate mount_path: {path}"));
    }
    wanted
}

fn read_file(item: &mut Fields) -> Option<WantedFile> {
    item.allow_only(&["type", "file_id", "mount_path"]);
    let file_id = item.named_string("file_id", BODY_BYTES_MAX)?;
    let path = match item.optional_string("mount_path", BODY_BYTES_MAX) {
        None => format!("{UPLOADS}/{file_id}"),
        Some(text) => match mount_path(&text) {
            Some(path) => path,
            None => {
                item.refuse("mount_path", &format!("must name a file below {UPLOADS}"));
                return None;
            }
        },
    };
    Some(WantedFile { file_id, path })
}

// --- routes --------------------------------------------------------------------------------------

async fn find(app: &App, caller: &Caller, id: &str) -> Result<scheduler::Session, ApiError> {
    let request = GetSessionRequest {
        user_id: caller.user_id.clone(),
        session_id: Prefix::Session.find(id)?,
        recorded_through: 0,
        v1: true,
    };
    app.call::<rpc::GetSession>(&request).await
}

/// The resources of a session.
#[derive(Serialize, ToSchema)]
pub struct Resources {
    data: Vec<Resource>,
    next_page: Option<String>,
}

/// List the resources of a session
#[utoipa::path(get, path = "/v1/sessions/{id}/resources", tag = "managed-agents", operation_id = "session_resources_list", params(IdParams),
    responses((status = 200, description = "All of them", body = Resources)))]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
) -> Result<Json<Resources>, ApiError> {
    let session = find(&app, &caller, &id).await?;
    Ok(Json(Resources { data: Resource::all_of(&session), next_page: None }))
}

/// A file for a session.
#[derive(ToSchema)]
#[schema(as = V1SessionResourceBody)]
#[expect(dead_code, reason = "describes a body")]
pub struct ResourceBody {
    #[schema(pattern = "^file$")]
    r#type: String,
    file_id: String,
    /// Below `/mnt/session/uploads`
    mount_path: Option<String>,
}

/// Give a session a file
///
/// Its sandbox has it from the next turn on.
#[utoipa::path(post, path = "/v1/sessions/{id}/resources", tag = "managed-agents", operation_id = "session_resources_add", params(IdParams), request_body = ResourceBody,
    responses((status = 200, description = "The resource", body = Resource)))]
pub async fn add(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
    body: Body,
) -> Result<Json<Resource>, ApiError> {
    let session_id = Prefix::Session.find(&id)?;
    let mut fields = body.fields()?;
    if fields.named_string("type", BODY_BYTES_MAX).is_some_and(|kind| kind != "file") {
        fields.refuse("type", "must be 'file': a session has its repositories from its creation");
    }
    let wanted = read_file(&mut fields);
    fields.finish()?;
    let Some(wanted) = wanted else { return Err(refused_field("file_id", "is required")) };
    let request =
        AddSessionFileRequest { user_id: caller.user_id, session_id, file: Some(wanted.copy()?) };
    let file = app.call::<rpc::AddSessionFile>(&request).await?;
    Ok(Json(Resource::from(&file)))
}

#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "describes a path")]
pub struct ResourceParams {
    /// The session's id
    id: String,
    /// The resource's id
    resource_id: String,
}

/// A session and one of its resources.
async fn find_resource(
    app: &App,
    caller: &Caller,
    id: &str,
    resource_id: &str,
) -> Result<(scheduler::Session, Resource), ApiError> {
    let session = find(app, caller, id).await?;
    let found = Resource::all_of(&session).into_iter().find(|resource| resource.id == resource_id);
    found.map(|resource| (session, resource)).ok_or_else(|| ApiError::not_found("Resource"))
}

/// Get a resource of a session
#[utoipa::path(get, path = "/v1/sessions/{id}/resources/{resource_id}", tag = "managed-agents", operation_id = "session_resources_retrieve", params(ResourceParams),
    responses((status = 200, description = "The resource", body = Resource)))]
pub async fn get(
    State(app): State<App>,
    caller: Caller,
    PathId((id, resource_id)): PathId<(String, String)>,
) -> Result<Json<Resource>, ApiError> {
    let (_, resource) = find_resource(&app, &caller, &id, &resource_id).await?;
    Ok(Json(resource))
}

/// A new token of a repository.
#[derive(ToSchema)]
#[schema(as = V1SessionResourceUpdate)]
#[expect(dead_code, reason = "describes a body")]
pub struct UpdateBody {
    /// Stored encrypted and never returned
    authorization_token: String,
}

/// Exchange the token of a session's repository
///
/// Requests that go through the model gateway are sent with it within a minute, others from the
/// next turn on.
#[utoipa::path(post, path = "/v1/sessions/{id}/resources/{resource_id}", tag = "managed-agents", operation_id = "session_resources_update", params(ResourceParams), request_body = UpdateBody,
    responses((status = 200, description = "The resource", body = Resource)))]
pub async fn update(
    State(app): State<App>,
    caller: Caller,
    PathId((id, resource_id)): PathId<(String, String)>,
    body: Body,
) -> Result<Json<Resource>, ApiError> {
    let mut fields = body.fields()?;
    fields.allow_only(&["authorization_token"]);
    let token = read_token(&mut fields);
    if token.is_none() {
        fields.refuse("authorization_token", "authorization_token is required");
    }
    fields.finish()?;
    let Some(token) = token else {
        return Err(refused_field("authorization_token", "is required"));
    };
    let (session, resource) = find_resource(&app, &caller, &id, &resource_id).await?;
    let Given::Repository(repository) = &resource.given else {
        return Err(refused_field(
            "resource_id",
            "a file does not change: add another, and delete this one",
        ));
    };
    let tokens = BTreeMap::from([(repository.mount_path.clone(), token)]);
    let request = EnsureSessionSecretRequest {
        user_id: caller.user_id.clone(),
        session_id: session.session_id.clone(),
        secret_id: SecretId::new().to_string(),
    };
    let secret = app.call::<rpc::EnsureSessionSecret>(&request).await?.secret_id;
    app.merge(
        &caller.user_id,
        Kind::Session,
        &SessionSecrets { env: BTreeMap::new(), tokens },
        secret.clone(),
    )
    .await?;
    let changed = find_resource(&app, &caller, &id, &resource_id).await;
    // A session that was deleted meanwhile had its secrets deleted before this one was stored.
    if changed.as_ref().is_err_and(ApiError::is_not_found) {
        app.forget(secret).await;
    }
    Ok(Json(changed?.1))
}

/// Take a file from a session
///
/// Its sandbox has it until the next turn.
#[utoipa::path(delete, path = "/v1/sessions/{id}/resources/{resource_id}", tag = "managed-agents", operation_id = "session_resources_delete", params(ResourceParams),
    responses((status = 200, description = "The resource was deleted", body = Deleted)))]
pub async fn remove(
    State(app): State<App>,
    caller: Caller,
    PathId((id, resource_id)): PathId<(String, String)>,
) -> Result<Json<Deleted>, ApiError> {
    let (session, resource) = find_resource(&app, &caller, &id, &resource_id).await?;
    if matches!(resource.given, Given::Repository(_)) {
        return Err(refused_field("resource_id", "a repository stays with its session"));
    }
    let copy_id = Prefix::Resource.find(&resource_id)?;
    let request = RemoveSessionFileRequest {
        user_id: caller.user_id,
        session_id: session.session_id,
        copy_id,
    };
    let Empty {} = app.call::<rpc::RemoveSessionFile>(&request).await?;
    Ok(Json(Deleted { id: resource_id, r#type: "session_resource_deleted" }))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn wanted(resources: Value) -> Result<(usize, Vec<String>), ()> {
        let mut fields = Body::from_json(&json!({ "resources": resources })).fields().unwrap();
        let wanted = read(&mut fields);
        fields.finish().map_err(|_| ())?;
        Ok((wanted.repositories.len(), wanted.files.into_iter().map(|file| file.path).collect()))
    }

    #[test]
    fn files_and_repositories_are_read_together() {
        let repository = json!({ "type": "github_repository", "url": "https://github.com/a/b" });
        let file = |path: Option<&str>| match path {
            Some(path) => json!({ "type": "file", "file_id": "file_x", "mount_path": path }),
            None => json!({ "type": "file", "file_id": "file_x" }),
        };
        let paths = vec![
            "/mnt/session/uploads/file_x".to_owned(),
            "/mnt/session/uploads/data/a".to_owned(),
        ];
        assert_eq!(wanted(json!([repository, file(None), file(Some("data/a"))])), Ok((1, paths)));
        for bad in [
            json!([file(Some("a")), file(Some("/a"))]),
            json!([file(Some("../a"))]),
            json!([{ "type": "file" }]),
            json!([{ "type": "memory_store" }]),
            json!([{ "type": "x" }]),
            json!([{}]),
            json!([{ "type": "file", "file_id": "x", "nope": 1 }]),
            json!(vec![repository; 11]),
            json!([{ "type": "github_repository", "url": "https://github.com/a/b", "authorization_token": "t".repeat(8193) }]),
        ] {
            assert!(wanted(bad.clone()).is_err(), "{bad}");
        }
    }
}
