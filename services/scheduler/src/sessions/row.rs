//! The row of a session.

use bus::RpcError;
use contract::{scheduler::Session, session};
use serde_json::Value;
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use types::{Partition, SessionId, SessionStatus, UserId};
use uuid::Uuid;

use crate::{micros, unsigned};

/// The columns of a [`SessionRow`], by name: a migration then changes no statement that a running
/// replica has prepared.
macro_rules! session_columns {
    () => {
        "session_id, user_id, agent_id, environment_id, runtime, provider, sprite, status, exit_code, failure_stage, failure_message,
         turn_count, metadata, resources, working_directory, sprite_destroyed_at, event_partition, created_at, updated_at, agent_version,
         title, archived_at, vault_ids, tokens_changed_at"
    };
}
pub(crate) use session_columns;

pub fn missing() -> RpcError {
    RpcError::not_found("Session not found")
}

#[derive(sqlx::FromRow)]
pub struct SessionRow {
    pub session_id: Uuid,
    pub user_id: Uuid,
    pub agent_id: Option<Uuid>,
    pub environment_id: Option<Uuid>,
    pub runtime: String,
    pub provider: Option<String>,
    pub sprite: String,
    pub status: String,
    pub exit_code: Option<i32>,
    pub failure_stage: Option<String>,
    pub failure_message: Option<String>,
    pub turn_count: i32,
    pub metadata: Value,
    pub resources: Value,
    pub working_directory: Option<String>,
    pub sprite_destroyed_at: Option<OffsetDateTime>,
    pub event_partition: i16,
    pub created_at: OffsetDateTime,
    pub updated_at: OffsetDateTime,
    /// The row of its agent's version: a negative number where the session has one of its own.
    pub agent_version: i32,
    pub title: Option<String>,
    pub archived_at: Option<OffsetDateTime>,
    pub vault_ids: Value,
    pub tokens_changed_at: Option<OffsetDateTime>,
    /// Where the Managed Agents API asks.
    #[sqlx(default)]
    pub v1_status: Option<String>,
}

impl SessionRow {
    pub fn status(&self) -> Result<SessionStatus, RpcError> {
        self.status.parse().map_err(|()| {
            RpcError::internal(format!("session {} has status {}", self.session_id, self.status))
        })
    }

    pub fn partition(&self) -> Result<Partition, RpcError> {
        partition(self.event_partition)
    }
}

/// As a column holds it.
pub fn partition(number: i16) -> Result<Partition, RpcError> {
    let known = u32::try_from(number).ok().and_then(Partition::new);
    known.ok_or_else(|| RpcError::internal(format!("this release knows no partition {number}")))
}

impl From<SessionRow> for Session {
    fn from(row: SessionRow) -> Self {
        let failure = row.failure_message.map(|message| session::Failure {
            stage: row.failure_stage.unwrap_or_default(),
            message,
        });
        Self {
            session_id: row.session_id.to_string(),
            agent_id: row.agent_id.map(|id| id.to_string()),
            environment_id: row.environment_id.map(|id| id.to_string()),
            runtime: row.runtime,
            provider: row.provider,
            status: row.status,
            exit_code: row.exit_code,
            created_at_us: micros(row.created_at),
            updated_at_us: micros(row.updated_at),
            turn_count: unsigned(row.turn_count),
            failure,
            metadata: row.metadata.to_string(),
            resources: row.resources.to_string(),
            working_directory: row.working_directory,
            waiting_on: None,
            event_partition: u32::try_from(row.event_partition).unwrap_or(u32::MAX),
            v1_status: row.v1_status.unwrap_or_default(),
            title: row.title,
            archived_at_us: row.archived_at.map(micros),
            vault_ids: row.vault_ids.to_string(),
            tokens_changed_at_us: row.tokens_changed_at.map(micros),
            agent_row_version: row.agent_version,
            ..Self::default()
        }
    }
}

/// A session of a user.
pub async fn find(pool: &PgPool, session: SessionId, user: UserId) -> Result<SessionRow, RpcError> {
    let row = sqlx::query_as(concat!(
        "select ",
        session_columns!(),
        " from session where session_id = $1 and user_id = $2"
    ))
    .bind(session.uuid())
    .bind(user.uuid())
    .fetch_optional(pool)
    .await?;
    row.ok_or_else(missing)
}

/// A session's row, locked; of one user, or of any where none is given.
pub async fn lock(
    tx: &mut PgConnection,
    session: SessionId,
    user: Option<UserId>,
) -> Result<Option<SessionRow>, RpcError> {
    sqlx::query_as(concat!(
        "select ",
        session_columns!(),
        "
         from session
         where session_id = $1 and ($2::uuid is null or user_id = $2)
         for update"
    ))
    .bind(session.uuid())
    .bind(user.map(UserId::uuid))
    .fetch_optional(tx)
    .await
    .map_err(RpcError::from)
}
