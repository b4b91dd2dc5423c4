//! Files of the Managed Agents API: their names, owners and states, and where their bytes are
//! (docs/adr/0120-files.md).
//!
//! A row is `pending` before its bytes are written, `ready` once they are, and `deleted` until they
//! are gone: there are no bytes without a row, and no row that can be read without its bytes.
//! [`crate::cleanup::files`] finishes what a process that died left.

use ::files::Files;
use bus::RpcError;
use contract::{
    common::Empty,
    scheduler::{
        AddSessionFileRequest, BeginOutputRequest, CommitFileRequest, CommitOutputRequest,
        CreateFileRequest, File, GetFileRequest, ListFilesReply, ListFilesRequest, NewSessionFile,
        RemoveSessionFileRequest,
    },
};
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use types::{
    FileId, SessionId, UserId,
    file::{FILES_OF_SESSION_MAX, FileKind, OUTPUTS_OF_SESSION_MAX},
};
use uuid::Uuid;

use crate::{
    Scheduler,
    db::page::{List, PageStart},
    micros,
    sessions::row::{lock, missing as session_missing},
};

/// Where files are kept, and how many.
#[derive(Clone, Debug)]
pub struct FileSettings {
    pub store: Option<Files>,
    /// Of one user's files together.
    pub user_bytes_max: u64,
    /// How long uploaded files are kept; none: forever.
    pub days: Option<u16>,
}

macro_rules! columns {
    () => {
        "file_id, kind, filename, mime_type, size_bytes, sha256, object_id, session_id, path, created_at, expires_at, modified_us"
    };
}

#[derive(sqlx::FromRow)]
struct FileRow {
    file_id: Uuid,
    kind: String,
    filename: String,
    mime_type: String,
    size_bytes: i64,
    sha256: Vec<u8>,
    object_id: Uuid,
    session_id: Option<Uuid>,
    path: String,
    created_at: OffsetDateTime,
    expires_at: Option<OffsetDateTime>,
    modified_us: i64,
}

impl From<FileRow> for File {
    fn from(row: FileRow) -> Self {
        Self {
            file_id: row.file_id.to_string(),
            kind: row.kind,
            filename: row.filename,
            mime_type: row.mime_type,
            size_bytes: row.size_bytes.unsigned_abs(),
            sha256: row.sha256,
            object_id: row.object_id.to_string(),
            session_id: row.session_id.map(|id| id.to_string()),
            path: row.path,
            created_at_us: micros(row.created_at),
            expires_at_us: row.expires_at.map(micros),
            modified_us: row.modified_us,
        }
    }
}

fn missing() -> RpcError {
    RpcError::not_found("File not found")
}

fn ids(user: &str, file: &str) -> Result<(UserId, FileId), RpcError> {
    Ok((user.parse().map_err(|_| missing())?, file.parse().map_err(|_| missing())?))
}

fn size(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

// --- uploaded files ---

pub async fn create(scheduler: Scheduler, request: CreateFileRequest) -> Result<File, RpcError> {
    let (user, file) = ids(&request.user_id, &request.file_id)?;
    let mut tx = scheduler.pool.begin().await?;
    check_quota(&mut tx, &scheduler.files, user, 0).await?;
    let new = NewFile {
        file,
        user,
        kind: FileKind::Upload,
        filename: &request.filename,
        mime_type: &request.mime_type,
        size_bytes: 0,
        session: None,
        path: "",
        modified_us: 0,
    };
    let row = new.insert(&mut tx).await?;
    tx.commit().await?;
    Ok(row.into())
}

/// A file whose bytes are about to be written.
struct NewFile<'a> {
    file: FileId,
    user: UserId,
    kind: FileKind,
    filename: &'a str,
    mime_type: &'a str,
    size_bytes: u64,
    session: Option<SessionId>,
    path: &'a str,
    modified_us: i64,
}

impl NewFile<'_> {
    async fn insert(self, tx: &mut PgConnection) -> Result<FileRow, RpcError> {
        let row = sqlx::query_as(concat!(
            "insert into file (file_id, user_id, kind, state, object_id, filename, mime_type, size_bytes, session_id, path, modified_us)
             values ($1, $2, $3, 'pending', $1, $4, $5, $6, $7, $8, $9)
             on conflict (file_id) do update set file_id = excluded.file_id
             returning ",
            columns!()
        ))
        .bind(self.file.uuid())
        .bind(self.user.uuid())
        .bind(self.kind.as_str())
        .bind(self.filename)
        .bind(self.mime_type)
        .bind(size(self.size_bytes))
        .bind(self.session.map(SessionId::uuid))
        .bind(self.path)
        .bind(self.modified_us)
        .fetch_one(tx)
        .await?;
        Ok(row)
    }
}

/// Refuses what would be more than a user may have. Held until the transaction ends, so that two
/// files do not both fit alone.
async fn check_quota(
    tx: &mut PgConnection,
    settings: &FileSettings,
    user: UserId,
    more: u64,
) -> Result<(), RpcError> {
    sqlx::query("select pg_advisory_xact_lock(hashtextextended($1, 3))")
        .bind(format!("files of {user}"))
        .execute(&mut *tx)
        .await?;
    let used: i64 = sqlx::query_scalar(
        "select coalesce(sum(size_bytes), 0)::bigint from file where user_id = $1 and state = 'ready' and kind in ('upload', 'output')",
    )
    .bind(user.uuid())
    .fetch_one(tx)
    .await?;
    let limit = settings.user_bytes_max;
    if used.unsigned_abs().saturating_add(more) > limit
        || (more == 0 && used.unsigned_abs() >= limit)
    {
        return Err(RpcError::conflict(format!("Your files may hold {limit} bytes together"))
            .because("storage_quota_exceeded"));
    }
    Ok(())
}

pub async fn commit(scheduler: Scheduler, request: CommitFileRequest) -> Result<File, RpcError> {
    let (user, file) = ids(&request.user_id, &request.file_id)?;
    let mut tx = scheduler.pool.begin().await?;
    check_quota(&mut tx, &scheduler.files, user, request.size_bytes).await?;
    let row = finish(
        &mut tx,
        user,
        file,
        request.size_bytes,
        &request.sha256,
        request.expires_in_seconds,
    )
    .await?;
    tx.commit().await?;
    Ok(row.into())
}

/// Doing it again is no error.
async fn finish(
    tx: &mut PgConnection,
    user: UserId,
    file: FileId,
    bytes: u64,
    sha256: &[u8],
    expires_in_seconds: Option<u64>,
) -> Result<FileRow, RpcError> {
    let row: Option<FileRow> = sqlx::query_as(concat!(
        "update file set state = 'ready', state_since = now(), size_bytes = $3, sha256 = $4,
                        expires_at = coalesce(expires_at, now() + make_interval(secs => $5))
         where file_id = $1 and user_id = $2 and (state = 'pending' or (state = 'ready' and sha256 = $4))
         returning ",
        columns!()
    ))
    .bind(file.uuid())
    .bind(user.uuid())
    .bind(size(bytes))
    .bind(sha256)
    .bind(expires_in_seconds.map(|seconds| seconds as f64))
    .fetch_optional(tx)
    .await?;
    row.ok_or_else(|| RpcError::conflict("The upload took too long, and was given up"))
}

pub async fn get(scheduler: Scheduler, request: GetFileRequest) -> Result<File, RpcError> {
    let (user, file) = ids(&request.user_id, &request.file_id)?;
    let row: Option<FileRow> = sqlx::query_as(concat!(
        "select ",
        columns!(),
        " from file where file_id = $1 and user_id = $2 and state = 'ready'"
    ))
    .bind(file.uuid())
    .bind(user.uuid())
    .fetch_optional(&scheduler.pool)
    .await?;
    let row = row.ok_or_else(missing)?;
    if row.expires_at.is_some_and(|at| at <= OffsetDateTime::now_utc()) {
        return Err(missing().because("file_expired"));
    }
    Ok(row.into())
}

pub async fn list(
    scheduler: Scheduler,
    request: ListFilesRequest,
) -> Result<ListFilesReply, RpcError> {
    let user: UserId =
        request.user_id.parse().map_err(|_| RpcError::not_found("User not found"))?;
    let session = request
        .session_id
        .as_deref()
        .map(str::parse::<SessionId>)
        .transpose()
        .map_err(|_| session_missing())?;
    let wanted: Vec<Uuid> = request
        .file_ids
        .iter()
        .filter_map(|id| id.parse::<FileId>().ok())
        .map(FileId::uuid)
        .collect();
    let start = PageStart::by_time(request.limit, request.after.as_ref())?;
    // A filter that is not asked for is not in the statement: a plan that is kept would have to
    // suit it.
    let whose = match (session.is_some(), request.file_ids.is_empty()) {
        (true, _) => "session_id = $5 and kind = 'output' and $6::uuid[] is not null",
        (false, true) => "kind = 'upload' and $5::uuid is null and $6::uuid[] is not null",
        (false, false) => "file_id = any($6) and $5::uuid is null",
    };
    let keys = format!(
        "select file_id from file
         where user_id = $1 and state <> 'deleted' and state = 'ready' and (expires_at is null or expires_at > now()) and {whose}
           and (created_at, file_id) < ($3, $4)
         order by created_at desc, file_id desc limit $2 + 1"
    );
    let list = List {
        keys: &keys,
        table: "file",
        by_key: "file_id",
        bytes: "octet_length(filename) + octet_length(path) + 800",
        columns: columns!(),
    };
    let page = list.read(&scheduler.pool, |query| {
        let query = query.bind(user.uuid()).bind(start.limit).bind(start.time).bind(start.id);
        query.bind(session.map(SessionId::uuid)).bind(wanted)
    });
    let (rows, has_more): (Vec<FileRow>, _) = page.await?;
    Ok(ListFilesReply { files: rows.into_iter().map(File::from).collect(), has_more })
}

/// Also of one that was never finished. Copies that sessions have stay readable.
pub async fn delete(scheduler: Scheduler, request: GetFileRequest) -> Result<Empty, RpcError> {
    let (user, file) = ids(&request.user_id, &request.file_id)?;
    let deleted = sqlx::query(
        "update file set state = 'deleted', state_since = now()
         where file_id = $1 and user_id = $2 and state <> 'deleted' and kind <> 'copy'",
    )
    .bind(file.uuid())
    .bind(user.uuid())
    .execute(&scheduler.pool)
    .await?;
    if deleted.rows_affected() == 0 { Err(missing()) } else { Ok(Empty {}) }
}

// --- what sessions are given ---

/// Copies of a user's files, for a session.
pub async fn give(
    tx: &mut PgConnection,
    user: UserId,
    session: SessionId,
    new: &[NewSessionFile],
) -> Result<(), RpcError> {
    if new.is_empty() {
        return Ok(());
    }
    for file in new {
        let (copy, original): (FileId, FileId) = (
            file.copy_id.parse().map_err(|_| missing())?,
            file.file_id.parse().map_err(|_| missing())?,
        );
        // Held, so that it is not deleted meanwhile.
        let found = sqlx::query(
            "select from file where file_id = $1 and user_id = $2 and state = 'ready' and (expires_at is null or expires_at > now())
             for share",
        );
        if found.bind(original.uuid()).bind(user.uuid()).fetch_optional(&mut *tx).await?.is_none() {
            return Err(missing().because("file_not_found"));
        }
        let inserted = sqlx::query(
            "insert into file (file_id, user_id, kind, state, object_id, filename, mime_type, size_bytes, sha256, session_id, path)
             select $1, user_id, 'copy', 'ready', object_id, filename, mime_type, size_bytes, sha256, $3, $4 from file where file_id = $2
             on conflict (file_id) do nothing",
        )
        .bind(copy.uuid())
        .bind(original.uuid())
        .bind(session.uuid())
        .bind(&file.path)
        .execute(&mut *tx)
        .await;
        inserted.map_err(|error| {
            if store::violates(&error, "one_copy_at_a_path") {
                RpcError::conflict(format!("The session has a file at {}", file.path))
                    .because("mount_path_taken")
            } else {
                error.into()
            }
        })?;
    }
    let count: i64 = sqlx::query_scalar(
        "select count(*) from file where session_id = $1 and kind = 'copy' and state = 'ready'",
    )
    .bind(session.uuid())
    .fetch_one(&mut *tx)
    .await?;
    if count.unsigned_abs() > FILES_OF_SESSION_MAX as u64 {
        let message = format!("A session has at most {FILES_OF_SESSION_MAX} files");
        return Err(RpcError::conflict(message).because("too_many_files"));
    }
    sqlx::query("update session set had_files = true where session_id = $1")
        .bind(session.uuid())
        .execute(tx)
        .await?;
    Ok(())
}

pub async fn add(scheduler: Scheduler, request: AddSessionFileRequest) -> Result<File, RpcError> {
    let (user, session): (UserId, SessionId) = (
        request.user_id.parse().map_err(|_| session_missing())?,
        request.session_id.parse().map_err(|_| session_missing())?,
    );
    let new = request.file.ok_or_else(missing)?;
    let mut tx = scheduler.pool.begin().await?;
    let row = lock(&mut tx, session, Some(user)).await?.ok_or_else(session_missing)?;
    if row.archived_at.is_some() || row.sprite_destroyed_at.is_some() {
        return Err(RpcError::conflict("The session is terminated").because("session_terminated"));
    }
    give(&mut tx, user, session, std::slice::from_ref(&new)).await?;
    let copy: FileId = new.copy_id.parse().map_err(|_| missing())?;
    let file: FileRow =
        sqlx::query_as(concat!("select ", columns!(), " from file where file_id = $1"))
            .bind(copy.uuid())
            .fetch_one(&mut *tx)
            .await?;
    tx.commit().await?;
    Ok(file.into())
}

pub async fn remove(
    scheduler: Scheduler,
    request: RemoveSessionFileRequest,
) -> Result<Empty, RpcError> {
    let (user, copy) = ids(&request.user_id, &request.copy_id)?;
    let session: SessionId = request.session_id.parse().map_err(|_| session_missing())?;
    let removed = sqlx::query(
        "update file set state = 'deleted', state_since = now()
         where file_id = $1 and user_id = $2 and session_id = $3 and kind = 'copy' and state = 'ready'",
    )
    .bind(copy.uuid())
    .bind(user.uuid())
    .bind(session.uuid())
    .execute(&scheduler.pool)
    .await?;
    if removed.rows_affected() == 0 {
        Err(RpcError::not_found("Resource not found"))
    } else {
        Ok(Empty {})
    }
}

/// The files of sessions that are mounted, or that their agents wrote; in the order of their
/// creation.
pub async fn of_sessions(
    pool: &PgPool,
    sessions: &[Uuid],
    kind: FileKind,
) -> Result<Vec<File>, RpcError> {
    let rows: Vec<FileRow> = sqlx::query_as(concat!(
        "select ",
        columns!(),
        " from file where session_id = any($1) and kind = $2 and state = 'ready' order by created_at, file_id"
    ))
    .bind(sessions)
    .bind(kind.as_str())
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(File::from).collect())
}

// --- what agents write ---

/// The user of a session whose turn a runner has claimed.
async fn owner(
    tx: &mut PgConnection,
    session: &str,
    turn: u32,
    epoch: u32,
) -> Result<(UserId, SessionId), RpcError> {
    let session: SessionId = session.parse().map_err(|_| session_missing())?;
    let user: Option<Uuid> = sqlx::query_scalar(
        "select s.user_id from session s join turn t using (session_id)
         where s.session_id = $1 and t.turn_number = $2 and t.epoch = $3 and t.owner is not null",
    )
    .bind(session.uuid())
    .bind(i32::try_from(turn).unwrap_or(i32::MAX))
    .bind(i32::try_from(epoch).unwrap_or(i32::MAX))
    .fetch_optional(tx)
    .await?;
    let user = user.ok_or_else(|| RpcError::conflict("The claim is stale"))?;
    Ok((UserId::from_uuid(user), session))
}

pub async fn begin_output(
    scheduler: Scheduler,
    request: BeginOutputRequest,
) -> Result<File, RpcError> {
    let file: FileId = request.file_id.parse().map_err(|_| missing())?;
    let mut tx = scheduler.pool.begin().await?;
    let (user, session) = owner(&mut tx, &request.session_id, request.turn, request.epoch).await?;
    check_quota(&mut tx, &scheduler.files, user, request.size_bytes).await?;
    let others: i64 =
        sqlx::query_scalar("select count(*) from file where session_id = $1 and kind = 'output' and state = 'ready' and path <> $2")
            .bind(session.uuid())
            .bind(&request.path)
            .fetch_one(&mut *tx)
            .await?;
    if others.unsigned_abs() >= OUTPUTS_OF_SESSION_MAX as u64 {
        return Err(RpcError::conflict(format!(
            "{OUTPUTS_OF_SESSION_MAX} files of a session are kept"
        ))
        .because("too_many_files"));
    }
    let new = NewFile {
        file,
        user,
        kind: FileKind::Output,
        filename: request.path.rsplit('/').next().unwrap_or_default(),
        mime_type: &request.mime_type,
        size_bytes: request.size_bytes,
        session: Some(session),
        path: &request.path,
        modified_us: request.modified_us,
    };
    let row = new.insert(&mut tx).await?;
    tx.commit().await?;
    Ok(row.into())
}

/// The file takes the place of the one that the agent wrote at its path before.
pub async fn commit_output(
    scheduler: Scheduler,
    request: CommitOutputRequest,
) -> Result<Empty, RpcError> {
    let file: FileId = request.file_id.parse().map_err(|_| missing())?;
    let mut tx = scheduler.pool.begin().await?;
    let (user, session) = owner(&mut tx, &request.session_id, request.turn, request.epoch).await?;
    check_quota(&mut tx, &scheduler.files, user, request.size_bytes).await?;
    let row = finish(&mut tx, user, file, request.size_bytes, &request.sha256, None).await?;
    sqlx::query(
        "update file set state = 'deleted', state_since = now()
         where session_id = $1 and kind = 'output' and path = $2 and file_id <> $3 and state = 'ready'",
    )
    .bind(session.uuid())
    .bind(&row.path)
    .bind(file.uuid())
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(Empty {})
}
