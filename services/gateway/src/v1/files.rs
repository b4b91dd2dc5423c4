//! Files of `/v1`: uploaded by users, or written by agents. Their bytes go between the client and
//! the store of files; the scheduler knows what they are.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Json,
    body::Body,
    extract::{Request, State},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use contract::{
    common::Empty,
    rpc,
    scheduler::{
        self, CommitFileRequest, CreateFileRequest, Cursor, GetFileRequest, ListFilesRequest,
    },
};
use files::{Files, NotWritten, Written};
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use multer::{Field, Multipart};
use serde::Serialize;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use types::{
    FileId,
    file::{FileKind, is_filename, is_mime, mime_of},
};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::{
    App,
    auth::Caller,
    error::ApiError,
    v1::{
        environments::Deleted,
        error::refused_field,
        ids::{PathId, Prefix},
        page::{Limits, LongPageParams, Order, Start, Wanted},
        path::IdParams,
        query::{Query, bad},
        time,
    },
};

const LIMITS: Limits = Limits { default: 20, max: 1000 };
const IDS_MAX: usize = 100;
/// Parts beside the file, and the heads of parts.
const FRAME_BYTES_MAX: u64 = 64 << 10;
const TEXT_BYTES_MAX: usize = 64;
/// An upload that takes longer is given up, here before the scheduler gives its row up.
const UPLOAD_TIME_MAX: Duration = Duration::from_secs(45 * 60);
const CHUNK_TIME_MAX: Duration = Duration::from_secs(60);
/// Once it took this time, an upload has to come at least this fast.
const SLOW_AFTER: Duration = Duration::from_secs(30);
const BYTES_PER_SECOND_MIN: u64 = 4 << 10;
/// Each holds two parts of an object in memory.
const UPLOADS_MAX: usize = 32;
const UPLOADS_OF_USER_MAX: usize = 8;
/// What the parser may hold of a form that is no data of a part: it searches all of that with each
/// chunk.
const HELD_BYTES_MAX: usize = 1 << 20;
const EXPIRES_SECONDS: std::ops::RangeInclusive<u64> = 3600..=7_776_000;

/// What files need.
#[derive(Clone, Debug)]
pub struct FileStore {
    store: Option<Files>,
    bytes_max: u64,
    uploads: Arc<Semaphore>,
    /// Of users who upload.
    shares: Arc<Mutex<HashMap<String, Arc<Semaphore>>>>,
}

impl FileStore {
    pub fn new(store: Option<Files>, bytes_max: u64) -> Self {
        Self {
            store,
            bytes_max,
            uploads: Arc::new(Semaphore::new(UPLOADS_MAX)),
            shares: Arc::default(),
        }
    }

    /// Finds out whether files can be stored, where that is enabled.
    ///
    /// # Errors
    /// When the store cannot be reached.
    pub async fn check(&self) -> Result<(), files::Unreachable> {
        match &self.store {
            Some(store) => store.check().await,
            None => Ok(()),
        }
    }

    /// Waits until one more upload may begin. A user's share is taken first: who waits for it keeps
    /// no one else from theirs.
    async fn slot(&self, user_id: &str) -> Option<[OwnedSemaphorePermit; 2]> {
        let share = {
            let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
            shares.retain(|_, share| Arc::strong_count(share) > 1);
            shares
                .entry(user_id.to_owned())
                .or_insert_with(|| Arc::new(Semaphore::new(UPLOADS_OF_USER_MAX)))
                .clone()
        };
        let both = async {
            Some([
                share.acquire_owned().await.ok()?,
                self.uploads.clone().acquire_owned().await.ok()?,
            ])
        };
        tokio::time::timeout(crate::RPC_DEADLINE, both).await.ok().flatten()
    }

    fn open(&self) -> Result<&Files, ApiError> {
        let text = "Files are not enabled on this deployment: AOD_FILES_URL is not set";
        self.store.as_ref().ok_or_else(|| ApiError::new(StatusCode::NOT_FOUND, text))
    }
}

/// A file.
#[derive(Serialize, ToSchema)]
#[schema(as = V1File)]
pub struct File {
    #[schema(example = "file_011234567890123456789AbC")]
    id: String,
    #[schema(pattern = "^file$")]
    r#type: &'static str,
    filename: String,
    mime_type: String,
    size_bytes: u64,
    #[schema(format = DateTime)]
    created_at: String,
    downloadable: bool,
    #[schema(format = DateTime)]
    expires_at: Option<String>,
    /// The session whose agent wrote it, or that has it mounted.
    scope: Option<Scope>,
    /// Hexadecimal; an addition to the API.
    sha256: String,
}

#[derive(Serialize, ToSchema)]
#[schema(as = V1FileScope)]
pub struct Scope {
    #[schema(pattern = "^session$")]
    r#type: &'static str,
    id: String,
}

impl From<scheduler::File> for File {
    fn from(file: scheduler::File) -> Self {
        // An agent's file is called as it lies below its folder.
        let is_output = file.kind.parse() == Ok(FileKind::Output);
        Self {
            id: Prefix::File.of(&file.file_id),
            r#type: "file",
            filename: if is_output { file.path } else { file.filename },
            mime_type: file.mime_type,
            size_bytes: file.size_bytes,
            created_at: time(file.created_at_us),
            downloadable: true,
            expires_at: file.expires_at_us.map(time),
            scope: file
                .session_id
                .map(|id| Scope { r#type: "session", id: Prefix::Session.of(&id) }),
            sha256: file.sha256.iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }
}

/// A form with the file.
#[derive(ToSchema)]
#[schema(as = V1Upload)]
#[expect(dead_code, reason = "describes a body")]
pub struct Upload {
    #[schema(value_type = String, format = Binary)]
    file: Vec<u8>,
    /// How long it is kept
    #[schema(minimum = 3600, maximum = 7_776_000)]
    expires_in_seconds: Option<u64>,
}

/// Upload a file
#[utoipa::path(post, path = "/v1/files", tag = "managed-agents", operation_id = "files_upload",
    request_body(content = Upload, content_type = "multipart/form-data"),
    responses((status = 200, description = "The file", body = File)))]
pub async fn upload(
    State(app): State<App>,
    caller: Caller,
    request: Request,
) -> Result<Json<File>, ApiError> {
    let store = app.files.open()?;
    let content_type = request
        .headers()
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let boundary = multer::parse_boundary(content_type)
        .map_err(|_| bad("The body must be multipart/form-data with a part 'file'"))?;
    let announced = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|bytes| bytes > app.files.bytes_max + FRAME_BYTES_MAX) {
        return Err(too_large(app.files.bytes_max));
    }
    let slot = app.files.slot(&caller.user_id).await;
    let Some(_slot) = slot else {
        return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "Too many uploads at a time"));
    };
    let held = Held::default();
    let form = Multipart::new(chunks(request.into_body(), held.clone()), boundary);
    let file_id = FileId::new();
    let received =
        tokio::time::timeout(UPLOAD_TIME_MAX, receive(&app, store, &caller, file_id, (form, held)))
            .await;
    let stored = match received.unwrap_or_else(|_| Err(slow())) {
        Ok(form) => commit(&app, &caller, file_id, form).await,
        Err(refused) => Err(refused),
    };
    if stored.is_err() {
        // Where that fails too, the scheduler gives it up.
        let request = GetFileRequest { user_id: caller.user_id, file_id: file_id.to_string() };
        let _ = app.call::<rpc::DeleteFile>(&request).await;
    }
    stored.map(Json)
}

/// A form that was read to its end.
struct Form {
    written: Written,
    expires_in_seconds: Option<u64>,
}

async fn receive(
    app: &App,
    store: &Files,
    caller: &Caller,
    file_id: FileId,
    (mut form, held): (Multipart<'_>, Held),
) -> Result<Form, ApiError> {
    let (mut written, mut expires_in_seconds) = (None, None);
    while let Some(field) = form.next_field().await.map_err(broken)? {
        match field.name() {
            Some("file") if written.is_none() => {
                let name = field.file_name().unwrap_or_default().to_owned();
                if !is_filename(&name) {
                    return Err(refused_field(
                        "file",
                        "needs a filename of 1 to 255 bytes without slashes and control characters",
                    ));
                }
                let given = field.content_type().map(|mime| mime.essence_str().to_owned());
                let given =
                    given.filter(|mime| is_mime(mime) && mime != "application/octet-stream");
                let request = CreateFileRequest {
                    user_id: caller.user_id.clone(),
                    file_id: file_id.to_string(),
                    mime_type: given.unwrap_or_else(|| mime_of(&name).to_owned()),
                    filename: name,
                };
                let file = app.call::<rpc::CreateFile>(&request).await?;
                written =
                    Some(write(app, store, &file.object_id, data(field, held.clone())).await?);
            }
            Some("expires_in_seconds") if expires_in_seconds.is_none() => {
                let text = text(field).await?;
                let seconds =
                    text.trim().parse().ok().filter(|seconds| EXPIRES_SECONDS.contains(seconds));
                expires_in_seconds = Some(seconds.ok_or_else(|| {
                    refused_field("expires_in_seconds", "must be from 3600 to 7776000")
                })?);
            }
            name => {
                return Err(refused_field(
                    name.unwrap_or("body"),
                    "this field is not supported, or was sent twice",
                ));
            }
        }
    }
    let written = written.ok_or_else(|| refused_field("file", "is required"))?;
    Ok(Form { written, expires_in_seconds })
}

async fn write(
    app: &App,
    store: &Files,
    object: &str,
    data: impl Stream<Item = Result<Bytes, multer::Error>>,
) -> Result<Written, ApiError> {
    let object: Uuid = object.parse().map_err(|_| ApiError::not_found("File"))?;
    match store.write(object, app.files.bytes_max, data).await {
        Ok(written) => Ok(written),
        Err(NotWritten::TooLarge(max)) => Err(too_large(max)),
        Err(NotWritten::Source(error)) => Err(broken(error)),
        Err(NotWritten::Store(error)) => {
            tracing::error!(%error, "failed to store a file");
            Err(ApiError::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "The file cannot be stored; try again later",
            ))
        }
    }
}

async fn commit(app: &App, caller: &Caller, file_id: FileId, form: Form) -> Result<File, ApiError> {
    let request = CommitFileRequest {
        user_id: caller.user_id.clone(),
        file_id: file_id.to_string(),
        size_bytes: form.written.bytes,
        sha256: form.written.sha256,
        expires_in_seconds: form.expires_in_seconds,
    };
    Ok(app.call::<rpc::CommitFile>(&request).await?.into())
}

/// How many bytes the parser of a form has taken since it gave some data.
#[derive(Clone, Default)]
struct Held(Arc<AtomicUsize>);

/// A part's data.
fn data(field: Field<'_>, held: Held) -> impl Stream<Item = Result<Bytes, multer::Error>> {
    field.inspect_ok(move |_| held.0.store(0, Ordering::Relaxed))
}

fn is_too_slow(bytes: u64, waited: Duration) -> bool {
    waited > SLOW_AFTER && bytes < waited.as_secs() * BYTES_PER_SECOND_MIN
}

/// A body's chunks. Each has a deadline, and together they have a minimum rate. They are yielded
/// one at a time, because the parser buffers all it can get.
fn chunks(
    body: Body,
    held: Held,
) -> impl Stream<Item = Result<Bytes, std::io::Error>> + Send + 'static {
    let state = (body.into_data_stream(), held, 0_u64, Duration::ZERO);
    futures::stream::try_unfold(state, |(mut body, held, mut bytes, mut waited)| async move {
        tokio::task::yield_now().await;
        let since = Instant::now();
        let next = tokio::time::timeout(CHUNK_TIME_MAX, body.next()).await;
        // Not the time that the store took.
        waited += since.elapsed();
        let late = || std::io::Error::from(std::io::ErrorKind::TimedOut);
        let chunk = match next {
            Ok(Some(Ok(chunk))) => chunk,
            Ok(Some(Err(error))) => return Err(std::io::Error::other(error)),
            Ok(None) => return Ok(None),
            Err(_) => return Err(late()),
        };
        bytes += chunk.len() as u64;
        if is_too_slow(bytes, waited) {
            return Err(late());
        }
        if held.0.fetch_add(chunk.len(), Ordering::Relaxed) + chunk.len() > HELD_BYTES_MAX {
            return Err(std::io::Error::other("a boundary or the head of a part is missing"));
        }
        Ok(Some((chunk, (body, held, bytes, waited))))
    })
}

async fn text(mut field: Field<'_>) -> Result<String, ApiError> {
    let mut text = Vec::new();
    while let Some(chunk) = field.chunk().await.map_err(broken)? {
        text.extend_from_slice(&chunk);
        if text.len() > TEXT_BYTES_MAX {
            return Err(refused_field(field.name().unwrap_or("body"), "is too long"));
        }
    }
    String::from_utf8(text).map_err(|_| bad("A part of the form is no text"))
}

fn broken(error: multer::Error) -> ApiError {
    if let multer::Error::StreamReadFailed(cause) = &error
        && cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|cause| cause.kind() == std::io::ErrorKind::TimedOut)
    {
        return slow();
    }
    bad(&format!("The form cannot be read: {error}"))
}

fn slow() -> ApiError {
    ApiError::new(StatusCode::REQUEST_TIMEOUT, "The upload took too long")
}

fn too_large(max: u64) -> ApiError {
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, &format!("A file may hold {max} bytes"))
}

// --- reading -----------------------------------------------------------------------------------

async fn find(app: &App, caller: &Caller, id: &str) -> Result<scheduler::File, ApiError> {
    app.files.open()?;
    app.call::<rpc::GetFile>(&GetFileRequest {
        user_id: caller.user_id.clone(),
        file_id: Prefix::File.find(id)?,
    })
    .await
}

/// Get a file's metadata
#[utoipa::path(get, path = "/v1/files/{id}", tag = "managed-agents", operation_id = "files_retrieve_metadata", params(IdParams),
    responses((status = 200, description = "The file, without its bytes", body = File)))]
pub async fn get(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
) -> Result<Json<File>, ApiError> {
    Ok(Json(find(&app, &caller, &id).await?.into()))
}

/// Download a file
#[utoipa::path(get, path = "/v1/files/{id}/content", tag = "managed-agents", operation_id = "files_download", params(IdParams),
    responses((status = 200, description = "Its bytes", body = Vec<u8>, content_type = "application/octet-stream")))]
pub async fn download(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
) -> Result<Response, ApiError> {
    let file = find(&app, &caller, &id).await?;
    let object: Uuid = file.object_id.parse().map_err(|_| ApiError::not_found("File"))?;
    let chunks = app.files.open()?.read(object).await.map_err(|error| {
        tracing::error!(%error, file_id = file.file_id, "a file's bytes cannot be read");
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "The file cannot be read; try again later")
    })?;
    let mut response = Body::from_stream(chunks.map_err(std::io::Error::other)).into_response();
    let headers = response.headers_mut();
    // Browsers save it, whatever it is.
    headers.insert(header::CONTENT_DISPOSITION, HeaderValue::from_static("attachment"));
    headers.insert(header::CONTENT_LENGTH, file.size_bytes.into());
    let octets = HeaderValue::from_static("application/octet-stream");
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_str(&file.mime_type).unwrap_or(octets));
    Ok(response)
}

/// Delete a file
///
/// Sessions that have it mounted keep their copy.
#[utoipa::path(delete, path = "/v1/files/{id}", tag = "managed-agents", operation_id = "files_delete", params(IdParams),
    responses((status = 200, description = "The file was deleted", body = Deleted)))]
pub async fn delete(
    State(app): State<App>,
    caller: Caller,
    PathId(id): PathId,
) -> Result<Json<Deleted>, ApiError> {
    app.files.open()?;
    let request = GetFileRequest { user_id: caller.user_id, file_id: Prefix::File.find(&id)? };
    let Empty {} = app.call::<rpc::DeleteFile>(&request).await?;
    Ok(Json(Deleted { id, r#type: "file_deleted" }))
}

/// A page of files.
#[derive(Serialize, ToSchema)]
#[schema(as = V1FilePage)]
pub struct FilePage {
    data: Vec<File>,
    next_page: Option<String>,
    /// Pages of earlier SDK releases.
    has_more: bool,
    first_id: Option<String>,
    last_id: Option<String>,
}

#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes a query")]
pub struct ListParams {
    /// Files that the agent of this session wrote; without it, files that were uploaded
    scope_id: Option<String>,
    /// These alone, at most 100
    #[param(rename = "ids[]")]
    ids: Option<Vec<String>>,
    /// Pages of earlier SDK releases: only files after this one
    after_id: Option<String>,
}

/// List files, newest first
#[utoipa::path(get, path = "/v1/files", tag = "managed-agents", operation_id = "files_list", params(LongPageParams, ListParams),
    responses((status = 200, description = "A page of files", body = FilePage)))]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    query: Query,
) -> Result<Json<FilePage>, ApiError> {
    app.files.open()?;
    let wanted = Wanted::of_fixed_order(&query, LIMITS)?;
    let ids: Vec<&str> = query.all("ids").collect();
    let alone =
        ["limit", "page", "scope_id", "after_id"].iter().all(|name| query.one(name).is_none());
    if ids.len() > IDS_MAX || (!ids.is_empty() && !alone) {
        return Err(bad(&format!("ids: at most {IDS_MAX}, and no other parameter beside them")));
    }
    if query.one("before_id").is_some() {
        return Err(bad("before_id: not supported; use page"));
    }
    let mut after = wanted.after();
    if let Some(id) = query.one("after_id") {
        let file = find(&app, &caller, id).await?;
        after = Some(Cursor { position: file.created_at_us, id: file.file_id });
    }
    let session_id = query.one("scope_id").map(|id| Prefix::Session.find(id)).transpose()?;
    // What is no id names nothing.
    let file_ids: Vec<String> = ids.iter().filter_map(|id| Prefix::File.find(id).ok()).collect();
    if file_ids.is_empty() && !ids.is_empty() {
        return Ok(Json(FilePage {
            data: Vec::new(),
            next_page: None,
            has_more: false,
            first_id: None,
            last_id: None,
        }));
    }
    let limit =
        if ids.is_empty() { wanted.limit } else { u32::try_from(IDS_MAX).unwrap_or(u32::MAX) };
    let request = ListFilesRequest { user_id: caller.user_id, limit, after, session_id, file_ids };
    let reply = app.call::<rpc::ListFiles>(&request).await?;
    let cursor =
        |file: &scheduler::File| Cursor { position: file.created_at_us, id: file.file_id.clone() };
    let next = reply.files.last().filter(|_| reply.has_more);
    let next_page = next.map(|file| {
        Start { order: Order::Descending, backwards: false, row: cursor(file) }.encode()
    });
    let id = |file: Option<&scheduler::File>| file.map(|file| Prefix::File.of(&file.file_id));
    let (first_id, last_id) = (id(reply.files.first()), id(reply.files.last()));
    Ok(Json(FilePage {
        data: reply.files.into_iter().map(File::from).collect(),
        next_page,
        has_more: reply.has_more,
        first_id,
        last_id,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &[u8] =
        b"--xx\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\n";

    /// A body that starts with the given bytes, followed by `count` chunks, and how many of them
    /// were read.
    fn form(
        begin: &'static [u8],
        chunk: Vec<u8>,
        count: usize,
    ) -> (Multipart<'static>, Held, Arc<AtomicUsize>) {
        let (taken, held) = (Arc::new(AtomicUsize::new(0)), Held::default());
        let (counted, chunk) = (taken.clone(), Bytes::from(chunk));
        let chunks_of_body =
            std::iter::once(Bytes::from_static(begin)).chain((0..count).map(move |_| {
                counted.fetch_add(1, Ordering::Relaxed);
                chunk.clone()
            }));
        let body =
            Body::from_stream(futures::stream::iter(chunks_of_body.map(Ok::<_, std::io::Error>)));
        (Multipart::new(chunks(body, held.clone()), "xx"), held, taken)
    }

    #[tokio::test]
    async fn a_form_without_a_boundary_or_with_an_endless_head_is_not_held_in_memory() {
        for begin in [&b"preamble"[..], b"--xx\r\ncontent-disposition: "] {
            let (mut form, _, taken) = form(begin, vec![b'x'; 64 << 10], 10_000);
            assert!(form.next_field().await.is_err());
            assert!(
                taken.load(Ordering::Relaxed) <= HELD_BYTES_MAX / (64 << 10) + 1,
                "{taken:?} chunks"
            );
        }
    }

    #[tokio::test]
    async fn a_file_may_be_larger_than_the_buffer() {
        let (mut form, held, _) = form(HEAD, vec![b'\r'; 64 << 10], 100);
        let field = form.next_field().await.unwrap().unwrap();
        let mut data = std::pin::pin!(data(field, held));
        let mut bytes = 0;
        // Its end is missing.
        while let Some(Ok(chunk)) = data.next().await {
            bytes += chunk.len();
        }
        assert!(bytes > (6 << 20) - 100, "{bytes}");
    }

    #[test]
    fn a_trickle_ends_and_a_slow_line_does_not() {
        let minute = Duration::from_secs(60);
        assert!(!is_too_slow(1, SLOW_AFTER) && is_too_slow(2, minute));
        assert!(!is_too_slow(60 * BYTES_PER_SECOND_MIN, minute));
    }

    #[tokio::test]
    async fn one_user_does_not_occupy_every_upload() {
        let files = FileStore::new(None, 0);
        let mut slots = Vec::new();
        for _ in 0..UPLOADS_OF_USER_MAX {
            slots.push(files.slot("one").await.unwrap());
        }
        let next = tokio::time::timeout(Duration::from_millis(50), files.slot("one"));
        assert!(next.await.is_err(), "it waits");
        assert!(files.slot("other").await.is_some());
        drop(slots);
        assert!(files.slot("one").await.is_some());
        let _kept = files.slot("third").await;
        assert_eq!(files.shares.lock().unwrap().len(), 1, "shares that no one uses are forgotten");
    }
}
