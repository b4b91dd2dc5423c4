//! Writes new sessions.

use bus::RpcError;
use serde_json::Value;
use sqlx::PgConnection;
use types::{InputId, Provider, Runtime, SessionId, UserId};
use uuid::Uuid;

use super::{
    quota::{self, has_room},
    row::SessionRow,
    spares::Sandbox,
    turns::{NewTurn, beginning_turn},
};
use crate::{catalog::environments, db::idempotency};

/// A session that is to be written.
pub struct NewSession<'a> {
    pub user: UserId,
    pub agent: Uuid,
    pub agent_version: i32,
    pub environment: Option<Uuid>,
    pub environment_version: Option<i32>,
    pub runtime: Runtime,
    pub provider: Option<Provider>,
    pub sandbox: Sandbox,
    pub metadata: Value,
    pub resources: Value,
    pub secret: Option<Uuid>,
    pub vault_ids: Value,
    pub working_directory: Option<&'a str>,
    pub title: Option<&'a str>,
    pub collects_outputs: bool,
    pub first: Option<FirstTurn<'a>>,
}

/// What a session begins with.
pub struct FirstTurn<'a> {
    pub prompt: &'a str,
    pub timeout_seconds: u32,
    /// The message that is the prompt, and the API key that sent it: of the Managed Agents API.
    pub message: Option<(InputId, Option<Uuid>)>,
}

const INSERT: &str = beginning_turn!(
    concat!(
        "insert into session (session_id, user_id, agent_id, agent_version, environment_id, environment_version, runtime, provider,
                              sprite, conversation_id, metadata, resources, secret_id, vault_ids, event_partition, working_directory,
                              title, collects_outputs, prepared_at, status, turn_count)
         select $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23, $24, $25, $26, $27, case when $28 then now() end,
                case when $1 is null then 'completed' else 'pending' end, case when $1 is null then 0 else 1 end
         where $29 is null or ", has_room!("$11", "$29", "$30")
    ),
    ", message as (
         insert into input (input_id, session_id, kind, text, timeout_seconds, turn_number, key_id, status, sent_after, delivered_at)
         select $5, session_id, 'message', $1, $2, turn_number, $31, 'delivered', begun_after, now() from turn where $5 is not null
     )"
);

impl NewSession<'_> {
    pub fn id(&self) -> SessionId {
        SessionId::from_uuid(self.sandbox.session_id)
    }

    /// Writes the session, its first turn with the job that runs it, and the message that is its
    /// prompt: one statement, which is a transaction where none surrounds it.
    ///
    /// Within the user's `limit`, if one is given. Returns `None` if there may be no room.
    pub async fn insert(
        &self,
        connection: &mut PgConnection,
        limit: Option<u32>,
    ) -> Result<Option<SessionRow>, RpcError> {
        let turn = self.first.as_ref().map(|first| NewTurn {
            session: self.id(),
            number: 1,
            prompt: first.prompt,
            timeout_seconds: first.timeout_seconds,
            input: first.message.map(|(input, _)| input.uuid()),
        });
        let key = self.first.as_ref().and_then(|first| first.message).and_then(|(_, key)| key);
        NewTurn::bind(turn.as_ref(), INSERT)
            .bind(self.sandbox.session_id)
            .bind(self.user.uuid())
            .bind(self.agent)
            .bind(self.agent_version)
            .bind(self.environment)
            .bind(self.environment_version)
            .bind(self.runtime.as_str())
            .bind(self.provider.map(Provider::as_str))
            .bind(&self.sandbox.sprite)
            .bind(self.sandbox.conversation_id)
            .bind(&self.metadata)
            .bind(&self.resources)
            .bind(self.secret)
            .bind(&self.vault_ids)
            .bind(self.sandbox.event_partition)
            .bind(self.working_directory)
            .bind(self.title)
            .bind(self.collects_outputs)
            .bind(self.sandbox.is_prepared)
            .bind(limit.map(i64::from))
            .bind(limit.is_some_and(quota::is_alone))
            .bind(key)
            .fetch_optional(connection)
            .await
            .map_err(|error| {
                // Deleted a moment ago.
                if store::violates(&error, "session_environment_id_fkey") {
                    environments::missing()
                } else {
                    idempotency::not_inserted(error, "session_pkey")
                }
            })
    }
}
