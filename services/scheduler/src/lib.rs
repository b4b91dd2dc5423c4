//! Stores agents, environments, sessions, turns and events, and decides what runs next. Schema
//! `scheduler`.
//!
//! Requests change rows and, in the same transaction, write what others must hear of to the outbox;
//! [`relay`] publishes it. What runners report comes back through the EVENTS stream; [`projector`]
//! persists it and advances sessions and turns. [`reconciler`] offers turns that no runner owns;
//! [`ending`] ends those that are overdue.

mod catalog;
mod cleanup;
mod db;
mod dispatch;
mod due;
mod gauges;
mod inputs;
mod log;
pub mod metrics;
mod models;
mod sessions;

use std::{num::NonZeroU8, sync::Arc, time::Duration};

use anyhow::Context as _;
use bus::{Bus, RpcError, responder::Responder};
use contract::{access, common, rpc};
use rules::spares::Limits;
use secrecy::SecretString;
use service::{Env, Lifecycle};
use sqlx::PgPool;
use time::OffsetDateTime;
use tokio::sync::Notify;
use types::{Partition, SecretId, Timestamp};

pub use crate::{
    catalog::files::FileSettings, log::retention::Retention,
    models::limits::Defaults as ModelDefaults,
};
use crate::{
    catalog::{agents, environments, files, vault_credentials, vaults},
    cleanup::{deletion, orphans},
    dispatch::{claims, ending, reconciler, relay},
    log::{positions, projector, retention, streams},
    sessions::{managed, spares, termination},
};

#[derive(Debug)]
pub struct Config {
    pub bus: bus::Config,
    pub store: store::Config,
    pub sprite_name_prefix: String,
    /// Kept outside of the database, to tell a copy of it.
    pub deployment_id: SecretString,
    pub event_partitions: NonZeroU8,
    pub orphan_sweep: Duration,
    pub retention: Retention,
    pub files: FileSettings,
    pub model_defaults: models::limits::Defaults,
    /// How many sessions of a user are prepared and wait for their first message.
    pub prepared_sessions_max: u32,
    /// How many sandboxes are prepared for sessions that do not exist yet.
    pub spares: Limits,
}

impl Config {
    pub fn from_env(env: &mut Env) -> Self {
        let config = Self {
            bus: bus::Config::from_env(env, &access::SCHEDULER),
            store: store::Config::from_env(env),
            deployment_id: env
                .secret("AOD_DEPLOYMENT_ID", "id of this deployment: any unique text, never changed; guards against a copied database"),
            sprite_name_prefix: env.parsed("SPRITE_NAME_PREFIX", "prefix of Sprite names", "aod".to_owned()),
            retention: Retention {
                event_days: Some(env.parsed("EVENT_RETENTION_DAYS", "days that events are kept; 0: forever", 0)).filter(|days| *days > 0),
                session_days: Some(env.parsed("SESSION_RETENTION_DAYS", "days that settled sessions are kept; 0: forever", 0))
                    .filter(|days| *days > 0),
            },
            files: FileSettings {
                store: ::files::Files::from_env(env),
                user_bytes_max: env.parsed("AOD_USER_FILES_MAX_BYTES", "total size of all files of one user", 10 << 30),
                days: Some(env.parsed("FILE_RETENTION_DAYS", "days that uploaded files are kept; 0: forever", 0)).filter(|days| *days > 0),
            },
            orphan_sweep: env.seconds("AOD_ORPHAN_SWEEP_SECONDS", "how often accounts are searched for orphaned Sprites", 900),
            event_partitions: env.parsed(
                "EVENT_PARTITIONS",
                "number of EVENTS streams over which new sessions are spread; at most 8",
                NonZeroU8::MIN,
            ),
            model_defaults: models::limits::Defaults::from_env(env),
            prepared_sessions_max: env.parsed(
                "AOD_PREPARED_SESSIONS_MAX",
                "how many sessions of one user, created within the last hour, have their sandboxes prepared before their first messages; 0: none",
                10,
            ),
            spares: Limits {
                all: env.parsed(
                    "AOD_SPARE_SESSIONS_MAX",
                    "how many sandboxes are prepared for sessions that users are likely to create; 0: none",
                    0,
                ),
                of_user: env.parsed(
                    "AOD_SPARE_SESSIONS_OF_USER_MAX",
                    "how many of the sandboxes of AOD_SPARE_SESSIONS_MAX are for one user",
                    2,
                ),
            },
        };
        if config.event_partitions.get() > Partition::COUNT_MAX {
            env.refuse("EVENT_PARTITIONS has to be 8 or less");
        }
        // A deployment's own eight characters follow the prefix.
        if types::SpriteName::for_session(
            &format!("{}-00000000", config.sprite_name_prefix),
            types::SessionId::new(),
        )
        .is_err()
        {
            env.refuse("SPRITE_NAME_PREFIX may hold lowercase letters, digits and hyphens, and not begin with one");
        }
        config
    }
}

const MIGRATIONS: &[store::Step] = &[
    (1, "sessions", include_str!("../../../migrations/scheduler/0001_sessions.sql")),
    (2, "whole contract", include_str!("../../../migrations/scheduler/0002_whole_contract.sql")),
    (3, "handed back", include_str!("../../../migrations/scheduler/0003_handed_back.sql")),
    (4, "orphans", include_str!("../../../migrations/scheduler/0004_orphans.sql")),
    (5, "events by day", include_str!("../../../migrations/scheduler/0005_events_by_day.sql")),
    (6, "usage", include_str!("../../../migrations/scheduler/0006_usage.sql")),
    (
        7,
        "event partitions",
        include_str!("../../../migrations/scheduler/0007_event_partitions.sql"),
    ),
    (8, "active sessions", include_str!("../../../migrations/scheduler/0008_active_sessions.sql")),
    (9, "runner leases", include_str!("../../../migrations/scheduler/0009_runner_leases.sql")),
    (
        10,
        "turn without owner",
        include_str!("../../../migrations/scheduler/0010_turn_without_owner.sql"),
    ),
    (11, "due work", include_str!("../../../migrations/scheduler/0011_due_work.sql")),
    (
        12,
        "session by agent",
        include_str!("../../../migrations/scheduler/0012_session_by_agent.sql"),
    ),
    (
        13,
        "session by environment",
        include_str!("../../../migrations/scheduler/0013_session_by_environment.sql"),
    ),
    (
        14,
        "session by change",
        include_str!("../../../migrations/scheduler/0014_session_by_change.sql"),
    ),
    (15, "turn by owner", include_str!("../../../migrations/scheduler/0015_turn_by_owner.sql")),
    (
        16,
        "sprite to destroy",
        include_str!("../../../migrations/scheduler/0016_sprite_to_destroy.sql"),
    ),
    (
        17,
        "tag of the last event",
        include_str!("../../../migrations/scheduler/0017_tag_of_the_last_event.sql"),
    ),
    (
        20,
        "deployment owner",
        include_str!("../../../migrations/scheduler/0020_deployment_owner.sql"),
    ),
    (50, "inputs", include_str!("../../../migrations/scheduler/0050_inputs.sql")),
    (60, "managed agents", include_str!("../../../migrations/scheduler/0060_managed_agents.sql")),
    (61, "session updates", include_str!("../../../migrations/scheduler/0061_session_updates.sql")),
    (
        70,
        "where turns begin",
        include_str!("../../../migrations/scheduler/0070_where_turns_begin.sql"),
    ),
    (
        90,
        "working directory",
        include_str!("../../../migrations/scheduler/0090_working_directory.sql"),
    ),
    (110, "custom tools", include_str!("../../../migrations/scheduler/0110_custom_tools.sql")),
    (120, "vaults", include_str!("../../../migrations/scheduler/0120_vaults.sql")),
    (121, "files", include_str!("../../../migrations/scheduler/0121_files.sql")),
    (130, "model requests", include_str!("../../../migrations/scheduler/0130_model_requests.sql")),
    (131, "model limits", include_str!("../../../migrations/scheduler/0131_model_limits.sql")),
    (
        140,
        "model tokens to revoke",
        include_str!("../../../migrations/scheduler/0140_model_tokens_to_revoke.sql"),
    ),
    (
        150,
        "events that show",
        include_str!("../../../migrations/scheduler/0150_events_that_show.sql"),
    ),
    (
        151,
        "places of inputs",
        include_str!("../../../migrations/scheduler/0151_places_of_inputs.sql"),
    ),
    (152, "usage by day", include_str!("../../../migrations/scheduler/0152_usage_by_day.sql")),
    (
        170,
        "session classes",
        include_str!("../../../migrations/scheduler/0170_session_classes.sql"),
    ),
    (
        171,
        "session by class",
        include_str!("../../../migrations/scheduler/0171_session_by_class.sql"),
    ),
    (172, "previews", include_str!("../../../migrations/scheduler/0172_previews.sql")),
    (180, "upload of user", include_str!("../../../migrations/scheduler/0180_upload_of_user.sql")),
    (181, "upload by age", include_str!("../../../migrations/scheduler/0181_upload_by_age.sql")),
    (
        190,
        "exchanged tokens",
        include_str!("../../../migrations/scheduler/0190_exchanged_tokens.sql"),
    ),
    (200, "events in lz4", include_str!("../../../migrations/scheduler/0200_events_in_lz4.sql")),
    (210, "credentials of oauth", include_str!("../../../migrations/scheduler/0210_mcp_oauth.sql")),
    (
        220,
        "deleted sprite to destroy",
        include_str!("../../../migrations/scheduler/0220_deleted_sprite_to_destroy.sql"),
    ),
    (
        240,
        "prepared sessions",
        include_str!("../../../migrations/scheduler/0240_prepared_sessions.sql"),
    ),
    (
        241,
        "prepared sessions of a user",
        include_str!("../../../migrations/scheduler/0241_prepared_sessions_of_user.sql"),
    ),
    (250, "spares", include_str!("../../../migrations/scheduler/0250_spares.sql")),
    (
        260,
        "open model requests",
        include_str!("../../../migrations/scheduler/0260_open_model_requests.sql"),
    ),
    (270, "locked quota", include_str!("../../../migrations/scheduler/0270_locked_quota.sql")),
];

/// The state of the handlers.
#[derive(Clone)]
struct Scheduler {
    pool: PgPool,
    bus: Bus,
    sprite_name_prefix: Arc<str>,
    due: due::Due,
    /// Wakes the reconciler when a turn was released.
    released: Arc<Notify>,
    projected: positions::Projected,
    event_partitions: NonZeroU8,
    files: Arc<FileSettings>,
    model_defaults: Arc<models::limits::Defaults>,
    prepared_sessions_max: u32,
    spares: Arc<spares::Demand>,
}

/// Connects, makes the streams, and begins to serve.
///
/// # Errors
/// When Postgres or the bus cannot be reached, or a stream cannot be made as it was declared.
pub async fn run(config: Config, lifecycle: Lifecycle) -> anyhow::Result<()> {
    crate::metrics::describe();
    let pool = store::open(&config.store, "scheduler", MIGRATIONS).await?;
    lifecycle.spawn("pool", store::observe(pool.clone(), lifecycle.stop_token()));
    if let Some(files) = &config.files.store {
        files.check().await?;
    }
    let bus = Bus::connect(&config.bus).await.context("bus")?;
    let connection = bus.clone();
    lifecycle.add_check("bus", move || connection.is_connected());
    let scheduler = Scheduler {
        bus: bus.clone(),
        sprite_name_prefix: format!(
            "{}-{}",
            config.sprite_name_prefix,
            orphans::deployment(&pool, &config.deployment_id).await?
        )
        .into(),
        due: due::Due::default(),
        released: Arc::new(Notify::new()),
        projected: positions::Projected::default(),
        event_partitions: config.event_partitions,
        files: Arc::new(config.files),
        model_defaults: Arc::new(config.model_defaults),
        prepared_sessions_max: config.prepared_sessions_max,
        spares: Arc::new(spares::Demand::new(config.spares)),
        pool,
    };
    retention::make_days(&scheduler.pool).await?;
    streams::ready(&scheduler).await?;
    lifecycle.spawn("streams", streams::run(scheduler.clone(), lifecycle.stop_token()));
    lifecycle.spawn("due work", due::run(scheduler.clone(), lifecycle.stop_token()));
    lifecycle.spawn("relay", relay::run(scheduler.clone(), lifecycle.stop_token()));
    lifecycle.spawn("projectors", projector::run(scheduler.clone(), lifecycle.stop_token()));
    lifecycle.spawn("reconciler", reconciler::run(scheduler.clone(), lifecycle.stop_token()));
    lifecycle.spawn("spares", spares::run(scheduler.clone(), lifecycle.stop_token()));
    lifecycle.spawn("deletion", deletion::run(scheduler.clone(), lifecycle.stop_token()));
    lifecycle.spawn(
        "orphans",
        orphans::run(scheduler.clone(), config.orphan_sweep, lifecycle.stop_token()),
    );
    lifecycle.spawn(
        "retention",
        retention::run(scheduler.clone(), config.retention, lifecycle.stop_token()),
    );
    lifecycle.spawn("session updates", managed::run(scheduler.clone(), lifecycle.stop_token()));
    lifecycle.spawn("files", cleanup::files::run(scheduler.clone(), lifecycle.stop_token()));
    lifecycle.spawn(
        "objects of files",
        cleanup::files::search(scheduler.clone(), lifecycle.stop_token()),
    );
    lifecycle.spawn("model requests", models::run(scheduler.clone(), lifecycle.stop_token()));
    lifecycle.spawn("gauges", gauges::run(scheduler.clone(), lifecycle.stop_token()));
    lifecycle.spawn("deadlines", ending::run_deadlines(scheduler.clone(), lifecycle.stop_token()));

    let responder =
        Responder::new(&bus, "scheduler", scheduler, lifecycle.tracker(), lifecycle.stop_token());
    responder.serve::<rpc::CreateAgent, _, _>(agents::create).await?;
    responder.serve::<rpc::GetAgent, _, _>(agents::get).await?;
    responder.serve::<rpc::UpdateAgent, _, _>(agents::update).await?;
    responder.serve::<rpc::ArchiveAgent, _, _>(agents::archive).await?;
    responder.serve::<rpc::ListAgentVersions, _, _>(agents::versions).await?;
    responder.serve::<rpc::ListAgents, _, _>(agents::list).await?;
    responder.serve::<rpc::CreateEnvironment, _, _>(environments::create).await?;
    responder.serve::<rpc::GetEnvironment, _, _>(environments::get).await?;
    responder.serve::<rpc::UpdateEnvironment, _, _>(environments::update).await?;
    responder.serve::<rpc::ArchiveEnvironment, _, _>(environments::archive).await?;
    responder.serve::<rpc::DeleteEnvironment, _, _>(environments::delete).await?;
    responder.serve::<rpc::ListEnvironmentVersions, _, _>(environments::versions).await?;
    responder.serve::<rpc::ListEnvironments, _, _>(environments::list).await?;
    responder.serve::<rpc::CreateSession, _, _>(sessions::create).await?;
    responder.serve::<rpc::GetSession, _, _>(sessions::get).await?;
    responder.serve::<rpc::ListSessions, _, _>(sessions::list::list).await?;
    responder.serve::<rpc::UpdateSession, _, _>(managed::update).await?;
    responder.serve::<rpc::ArchiveSession, _, _>(managed::archive).await?;
    responder.serve::<rpc::ListTurns, _, _>(sessions::turns::list).await?;
    responder.serve::<rpc::Prompt, _, _>(sessions::prompt).await?;
    responder.serve::<rpc::ReadEvents, _, _>(sessions::events).await?;
    responder.serve::<rpc::DeleteSession, _, _>(deletion::delete).await?;
    responder.serve::<rpc::ListInputs, _, _>(inputs::list::list).await?;
    responder.serve::<rpc::ListOpenInputs, _, _>(inputs::list::list_open).await?;
    responder.serve::<rpc::ChangeInput, _, _>(inputs::queue::change_text).await?;
    responder.serve::<rpc::WithdrawInput, _, _>(inputs::queue::withdraw).await?;
    responder.serve::<rpc::SendEvents, _, _>(inputs::send::send).await?;
    responder.serve::<rpc::FindTurn, _, _>(inputs::find::find_turn).await?;
    responder.serve::<rpc::Interrupt, _, _>(inputs::interrupts::interrupt).await?;
    responder.serve::<rpc::ListPermissionRequests, _, _>(inputs::requests::list).await?;
    responder.serve::<rpc::Decide, _, _>(inputs::requests::decide).await?;
    responder.serve::<rpc::FetchInputs, _, _>(inputs::delivery::fetch).await?;
    responder.serve::<rpc::BeginModelRequest, _, _>(models::admission::begin).await?;
    responder.serve::<rpc::EndModelRequest, _, _>(models::settlement::end).await?;
    responder.serve::<rpc::RecordModelRequests, _, _>(models::unlimited::record).await?;
    responder.serve::<rpc::RenewModelGateway, _, _>(models::requests::renew).await?;
    responder.serve::<rpc::FetchModelRequests, _, _>(models::entries::fetch).await?;
    responder.serve::<rpc::GetBudget, _, _>(models::budgets::get).await?;
    responder.serve::<rpc::SetBudget, _, _>(models::budgets::set).await?;
    responder.serve::<rpc::ClearBudget, _, _>(models::budgets::clear).await?;
    responder.serve::<rpc::ListUsage, _, _>(models::budgets::usage).await?;
    responder.serve::<rpc::Terminate, _, _>(termination::terminate).await?;
    responder.serve::<rpc::CreateVault, _, _>(vaults::create).await?;
    responder.serve::<rpc::GetVault, _, _>(vaults::get).await?;
    responder.serve::<rpc::UpdateVault, _, _>(vaults::update).await?;
    responder.serve::<rpc::ListVaults, _, _>(vaults::list).await?;
    responder.serve::<rpc::ArchiveVault, _, _>(vaults::archive).await?;
    responder.serve::<rpc::DeleteVault, _, _>(vaults::delete).await?;
    responder.serve::<rpc::CreateVaultCredential, _, _>(vault_credentials::create).await?;
    responder.serve::<rpc::GetVaultCredential, _, _>(vault_credentials::get).await?;
    responder.serve::<rpc::UpdateVaultCredential, _, _>(vault_credentials::update).await?;
    responder.serve::<rpc::ListVaultCredentials, _, _>(vault_credentials::list).await?;
    responder.serve::<rpc::ArchiveVaultCredential, _, _>(vault_credentials::archive).await?;
    responder.serve::<rpc::DeleteVaultCredential, _, _>(vault_credentials::delete).await?;
    responder.serve::<rpc::CreateFile, _, _>(files::create).await?;
    responder.serve::<rpc::CommitFile, _, _>(files::commit).await?;
    responder.serve::<rpc::GetFile, _, _>(files::get).await?;
    responder.serve::<rpc::ListFiles, _, _>(files::list).await?;
    responder.serve::<rpc::DeleteFile, _, _>(files::delete).await?;
    responder.serve::<rpc::AddSessionFile, _, _>(files::add).await?;
    responder.serve::<rpc::EnsureSessionSecret, _, _>(managed::ensure_secret).await?;
    responder.serve::<rpc::RemoveSessionFile, _, _>(files::remove).await?;
    responder.serve::<rpc::BeginOutput, _, _>(files::begin_output).await?;
    responder.serve::<rpc::CommitOutput, _, _>(files::commit_output).await?;
    responder.serve::<rpc::ClaimTurn, _, _>(claims::turn).await?;
    responder.serve::<rpc::ClaimPreparation, _, _>(claims::preparation).await?;
    responder.serve::<rpc::EndPreparation, _, _>(spares::end_preparation).await?;
    responder.serve::<rpc::Heartbeat, _, _>(claims::heartbeat).await?;
    responder.serve::<rpc::ReleaseTurn, _, _>(claims::release).await?;
    responder.serve::<rpc::ClaimSprite, _, _>(claims::sprite).await?;
    responder.serve::<rpc::ClaimSweep, _, _>(orphans::claim).await?;
    responder.serve::<rpc::FindOrphans, _, _>(orphans::find).await?;
    responder.serve::<rpc::SpriteDestroyed, _, _>(termination::sprite_destroyed).await?;
    // Last, so that every other request is served once this check answers.
    responder.serve::<rpc::SchedulerHealth, _, _>(health).await?;
    Ok(())
}

async fn health(scheduler: Scheduler, _: common::Empty) -> Result<common::Empty, RpcError> {
    sqlx::query("select 1 from session limit 1").fetch_optional(&scheduler.pool).await?;
    Ok(common::Empty {})
}

/// This moment, as precise as Postgres keeps it.
fn now() -> OffsetDateTime {
    let time = OffsetDateTime::now_utc();
    time.replace_microsecond(time.microsecond()).unwrap_or(time)
}

fn micros(time: OffsetDateTime) -> i64 {
    Timestamp::from(time).unix_micros()
}

/// Columns are of types that Postgres has; a number that does not fit ours was never written by us.
fn unsigned(number: i32) -> u32 {
    u32::try_from(number).unwrap_or_default()
}

/// Postgres keeps no NUL in text.
fn without_nul(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

/// JSON that the gateway has checked.
fn parsed_json(text: &str) -> Result<serde_json::Value, RpcError> {
    serde_json::from_str(text).map_err(|_| RpcError::invalid("Malformed JSON on the bus"))
}

/// A reference to the vault.
fn secret_id(text: Option<&str>) -> Result<Option<uuid::Uuid>, RpcError> {
    let id = text
        .map(str::parse::<SecretId>)
        .transpose()
        .map_err(|_| RpcError::invalid("Malformed secret id"))?;
    Ok(id.map(SecretId::uuid))
}

/// Optimistic concurrency: a change applies to the version that its author saw, and its secrets to
/// the version they were taken from.
fn version_mismatch(current: i32, sent: i64, secrets_of: Option<u32>) -> Result<(), RpcError> {
    let seen = secrets_of.map_or(i64::from(current), i64::from);
    match [i64::from(current), seen].into_iter().find(|version| *version != sent) {
        Some(expected) => {
            Err(RpcError::conflict(format!("Version mismatch: expected {expected}, got {sent}")))
        }
        None => Ok(()),
    }
}
