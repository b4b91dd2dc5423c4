//! Spares: sandboxes that are prepared for sessions which do not exist yet (ADR 0250). They are
//! made for users who create many sessions alike; a new session adopts one under its id.
//!
//! Every replica compares the spares that there are with recent creations, one at a time. Which are
//! ended and which are made is decided in [`rules::spares`].

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use bus::RpcError;
use contract::{
    common::Empty,
    scheduler::{CreateSessionRequest, EndPreparationRequest},
    subject,
};
use rules::spares::{self, Limits, RECENT, Spare, State, Template};
use sqlx::{PgConnection, PgExecutor};
use tokio_util::sync::CancellationToken;
use types::{Partition, SessionId, SpriteName, UserId};
use uuid::Uuid;

use super::{row::missing, turns};
use crate::{Scheduler, db::idempotency::wait_for_earlier_attempts, dispatch::outbox};

const EVERY: Duration = Duration::from_secs(1);
/// Where no spares are made: those are ended that are there.
const EVERY_WITHOUT: Duration = Duration::from_secs(30);
/// Users whose creations are looked at in one pass; the others' next creations are seen.
const USERS_MAX: usize = 256;
/// Creations of a user that are looked at: more than a user has spares.
const CREATIONS_MAX: i64 = 64;
/// How long an adopted spare is remembered: longer than a request is tried.
const ADOPTED_FOR: Duration = Duration::from_secs(600);

/// What replicas keep in memory about spares.
pub struct Demand {
    pub limits: Limits,
    /// Users who created sessions since the last pass.
    creators: Mutex<BTreeSet<UserId>>,
}

impl Demand {
    pub fn new(limits: Limits) -> Self {
        Self { limits, creators: Mutex::default() }
    }

    pub const fn is_on(&self) -> bool {
        self.limits.all > 0 && self.limits.of_user > 0
    }

    pub fn created(&self, user: UserId) {
        let mut creators = self.creators.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_on() && creators.len() < USERS_MAX {
            creators.insert(user);
        }
    }

    fn is_new(&self) -> bool {
        !self.creators.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    fn take(&self) -> BTreeSet<UserId> {
        std::mem::take(&mut *self.creators.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What belongs to a session before there is one.
#[derive(sqlx::FromRow)]
pub struct Sandbox {
    pub session_id: Uuid,
    pub sprite: String,
    pub conversation_id: Uuid,
    pub event_partition: i16,
    pub is_prepared: bool,
}

impl Sandbox {
    pub fn of_new(scheduler: &Scheduler, id: SessionId) -> Result<Self, RpcError> {
        let sprite = SpriteName::for_session(&scheduler.sprite_name_prefix, id);
        Ok(Self {
            session_id: id.uuid(),
            sprite: sprite.map_err(RpcError::internal)?.to_string(),
            conversation_id: Uuid::new_v4(),
            event_partition: Partition::of_new(id, scheduler.event_partitions).number().into(),
            is_prepared: false,
        })
    }
}

/// A spare for a new session, if there is one. Of those that are created at once each gets another.
///
/// # Errors
/// When another attempt of the same request has created its session.
pub async fn adopt(
    scheduler: &Scheduler,
    tx: &mut PgConnection,
    request: &CreateSessionRequest,
    template: Template,
) -> Result<Option<Sandbox>, RpcError> {
    let is_none = |json: &str| json.is_empty() || json == "[]";
    let is_plain = request.secret_id.is_none()
        && request.agent_override.is_none()
        && request.files.is_empty()
        && is_none(&request.resources)
        && is_none(&request.vault_ids);
    if !scheduler.spares.is_on() || !is_plain {
        return Ok(None);
    }
    let requested = uuid_of(&request.session_id);
    if requested.is_some() {
        wait_for_earlier_attempts(tx, &request.session_id).await?;
        let is_created = sqlx::query_scalar(
            "select exists (select from spare where requested_id = $1) or exists (select from session where session_id = $1)",
        );
        if is_created.bind(requested).fetch_one(&mut *tx).await? {
            return Err(RpcError::conflict("It exists already"));
        }
    }
    let (environment, environment_version) = template.environment.unzip();
    let adopted: Option<Sandbox> = sqlx::query_as(
        "update spare set state = 'adopted', state_since = now(), requested_id = $1
         where session_id = (
             select session_id from spare
             where user_id = $2 and agent_id = $3 and agent_version = $4 and environment_id is not distinct from $5
               and environment_version is not distinct from $6 and working_directory is not distinct from $7
               and collects_outputs = $8 and state = 'ready' and state_since > now() - make_interval(secs => $9)
             order by state_since limit 1 for update skip locked
         )
         returning session_id, sprite, conversation_id, event_partition, true as is_prepared",
    )
    .bind(requested)
    .bind(template.user)
    .bind(template.agent)
    .bind(template.agent_version)
    .bind(environment)
    .bind(environment_version)
    .bind(template.working_directory)
    .bind(template.collects_outputs)
    .bind(State::Ready.life().as_secs_f64())
    .fetch_optional(tx)
    .await?;
    if adopted.is_some() {
        metrics::counter!("aod_spares_adopted_total").increment(1);
    }
    Ok(adopted)
}

/// The session that was created under a spare's id instead of the requested one.
pub async fn adopted_for(
    executor: impl PgExecutor<'_>,
    requested: &str,
) -> Result<Option<SessionId>, RpcError> {
    let session: Option<Uuid> =
        sqlx::query_scalar("select session_id from spare where requested_id = $1")
            .bind(uuid_of(requested))
            .fetch_optional(executor)
            .await?;
    Ok(session.map(SessionId::from_uuid))
}

/// Of an id that a request may name.
fn uuid_of(id: &str) -> Option<Uuid> {
    id.parse::<SessionId>().ok().map(SessionId::uuid)
}

/// How the preparation of a spare ended. What a failed one has made is destroyed.
pub async fn end_preparation(
    scheduler: Scheduler,
    request: EndPreparationRequest,
) -> Result<Empty, RpcError> {
    let id: SessionId = request.session_id.parse().map_err(|_| missing())?;
    let state = if request.is_ready { "ready" } else { "failed" };
    let mut tx = scheduler.pool.begin().await?;
    let ended: Option<Gone> = sqlx::query_as(
        "update spare set state = $2, state_since = now() where session_id = $1 and state = 'preparing'
         returning session_id, user_id, sprite, event_partition, state",
    )
    .bind(id.uuid())
    .bind(state)
    .fetch_optional(&mut *tx)
    .await?;
    if let Some(spare) = ended.filter(|_| !request.is_ready) {
        destroy(&mut tx, &spare).await?;
    }
    tx.commit().await?;
    scheduler.due.outbox.notify_one();
    Ok(Empty {})
}

/// A spare that no session gets.
#[derive(sqlx::FromRow)]
struct Gone {
    session_id: Uuid,
    user_id: Uuid,
    sprite: String,
    event_partition: i16,
    state: String,
}

/// Has a spare's Sprite destroyed as that of a deleted session, of which no events are to be purged
/// and no one is told.
async fn destroy(tx: &mut PgConnection, spare: &Gone) -> Result<(), RpcError> {
    sqlx::query(
        "insert into deleted_session (session_id, user_id, sprite, event_partition, purged_at) values ($1, $2, $3, $4, now())
         on conflict do nothing",
    )
    .bind(spare.session_id)
    .bind(spare.user_id)
    .bind(&spare.sprite)
    .bind(spare.event_partition)
    .execute(&mut *tx)
    .await?;
    outbox::enqueue_destroy(tx, SessionId::from_uuid(spare.session_id), &spare.sprite).await
}

pub async fn run(scheduler: Scheduler, stop: CancellationToken) {
    let every = if scheduler.spares.is_on() { EVERY } else { EVERY_WITHOUT };
    service::periodically("spares", every, stop, || pass(&scheduler)).await;
}

/// Ends and makes spares. Should this replica die in between, another does what is missing.
async fn pass(scheduler: &Scheduler) -> Result<(), RpcError> {
    let any = sqlx::query_scalar("select exists (select from spare)").fetch_one(&scheduler.pool);
    if !scheduler.spares.is_new() && !any.await? {
        return Ok(());
    }
    let mut tx = scheduler.pool.begin().await?;
    let alone =
        sqlx::query_scalar("select pg_try_advisory_xact_lock(hashtextextended('spares', 0))")
            .fetch_one(&mut *tx);
    if !alone.await? {
        return Ok(());
    }
    let spares = all(&mut tx).await?;
    let mut users = scheduler.spares.take();
    users.extend(spares.iter().map(|spare| UserId::from_uuid(spare.template.user)));
    let mut recent = BTreeMap::new();
    for user in users {
        recent.extend(recent_creations(&mut tx, user).await?);
    }
    let plan = spares::plan(&spares, &recent, scheduler.spares.limits);
    let gone = end(&mut tx, plan.ended).await?;
    for template in &plan.ordered {
        order(scheduler, &mut tx, template).await?;
    }
    sqlx::query("delete from spare where state = 'adopted' and state_since < now() - make_interval(secs => $1)")
        .bind(ADOPTED_FOR.as_secs_f64())
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    if !gone.is_empty() || !plan.ordered.is_empty() {
        scheduler.due.outbox.notify_one();
    }
    for session in gone {
        // It may be in preparation.
        scheduler.bus.hint(subject::terminate_hint(session)).await;
    }
    Ok(())
}

#[derive(sqlx::FromRow)]
struct TemplateRow {
    user_id: Uuid,
    agent_id: Uuid,
    agent_version: i32,
    environment_id: Option<Uuid>,
    environment_version: Option<i32>,
    working_directory: Option<String>,
    collects_outputs: bool,
}

impl From<TemplateRow> for Template {
    fn from(row: TemplateRow) -> Self {
        Self {
            user: row.user_id,
            agent: row.agent_id,
            agent_version: row.agent_version,
            environment: row.environment_id.zip(row.environment_version),
            working_directory: row.working_directory,
            collects_outputs: row.collects_outputs,
        }
    }
}

/// Whether `s` has what a session that is created now would have.
macro_rules! is_current {
    () => {
        "exists (select from agent a where a.agent_id = s.agent_id and a.version = s.agent_version and a.archived_at is null)
         and (s.environment_id is null
              or exists (select from environment e where e.environment_id = s.environment_id
                         and e.version = s.environment_version and e.archived_at is null))"
    };
}

/// Those that no session has, oldest first.
async fn all(tx: &mut PgConnection) -> Result<Vec<Spare>, RpcError> {
    #[derive(sqlx::FromRow)]
    struct SpareRow {
        session_id: Uuid,
        #[sqlx(flatten)]
        template: TemplateRow,
        is_current: bool,
        state: String,
        age_seconds: f64,
    }
    let rows: Vec<SpareRow> = sqlx::query_as(concat!(
        "select session_id, user_id, agent_id, agent_version, environment_id, environment_version, working_directory,
                collects_outputs, state, extract(epoch from now() - state_since)::float8 as age_seconds, ",
        is_current!(),
        " as is_current
         from spare s
         where state <> 'adopted'
         order by session_id"
    ))
    .fetch_all(tx)
    .await?;
    let spare = |row: SpareRow| {
        Ok(Spare {
            id: row.session_id,
            template: row.template.into(),
            is_current: row.is_current,
            state: match row.state.as_str() {
                "offered" => State::Offered,
                "preparing" => State::Preparing,
                "ready" => State::Ready,
                "failed" => State::Failed,
                state => return Err(RpcError::internal(format!("a spare has the state {state}"))),
            },
            age: Duration::try_from_secs_f64(row.age_seconds).unwrap_or_default(),
        })
    };
    rows.into_iter().map(spare).collect()
}

/// How many sessions of each template a user has created recently, of those that spares are made
/// for.
async fn recent_creations(
    tx: &mut PgConnection,
    user: UserId,
) -> Result<BTreeMap<Template, u32>, RpcError> {
    let rows: Vec<TemplateRow> = sqlx::query_as(concat!(
        "with recent as (
             select * from session
             where user_id = $1 and created_at > now() - make_interval(secs => $2)
             order by created_at desc, session_id desc limit $3
         )
         select user_id, agent_id, agent_version, environment_id, environment_version, working_directory, collects_outputs
         from recent s
         where secret_id is null and resources = '[]' and vault_ids = '[]' and not had_files and ",
        is_current!()
    ))
    .bind(user.uuid())
    .bind(RECENT.as_secs_f64())
    .bind(CREATIONS_MAX)
    .fetch_all(tx)
    .await?;
    let mut recent = BTreeMap::new();
    for row in rows {
        *recent.entry(row.into()).or_default() += 1;
    }
    Ok(recent)
}

/// Returns those that a runner may be preparing.
async fn end(tx: &mut PgConnection, ended: BTreeSet<Uuid>) -> Result<Vec<SessionId>, RpcError> {
    if ended.is_empty() {
        return Ok(Vec::new());
    }
    // One may have been adopted, or claimed, meanwhile.
    let gone: Vec<Gone> = sqlx::query_as(
        "delete from spare where session_id = any($1) and state <> 'adopted'
         returning session_id, user_id, sprite, event_partition, state",
    )
    .bind(ended.into_iter().collect::<Vec<_>>())
    .fetch_all(&mut *tx)
    .await?;
    let mut prepared = Vec::new();
    for spare in gone.iter().filter(|spare| matches!(&*spare.state, "preparing" | "ready")) {
        destroy(tx, spare).await?;
        prepared.push(SessionId::from_uuid(spare.session_id));
    }
    metrics::counter!("aod_spares_ended_total").increment(gone.len() as u64);
    Ok(prepared)
}

/// A new spare, and the job that prepares it.
async fn order(
    scheduler: &Scheduler,
    tx: &mut PgConnection,
    template: &Template,
) -> Result<(), RpcError> {
    let id = SessionId::new();
    let sandbox = Sandbox::of_new(scheduler, id)?;
    let (environment, environment_version) = template.environment.unzip();
    sqlx::query(
        "insert into spare (session_id, user_id, agent_id, agent_version, environment_id, environment_version, working_directory,
                            collects_outputs, runtime, sprite, conversation_id, event_partition, state)
         select $1, $2, agent_id, version, $5, $6, $7, $8, runtime, $9, $10, $11, 'offered'
         from agent_version where agent_id = $3 and version = $4",
    )
    .bind(id.uuid())
    .bind(template.user)
    .bind(template.agent)
    .bind(template.agent_version)
    .bind(environment)
    .bind(environment_version)
    .bind(&template.working_directory)
    .bind(template.collects_outputs)
    .bind(sandbox.sprite)
    .bind(sandbox.conversation_id)
    .bind(sandbox.event_partition)
    .execute(&mut *tx)
    .await?;
    turns::prepare(tx, id).await
}
