//! Claims and heartbeats of runners. A claim says whether a job is still to be done, who owns it,
//! and what is needed for it.

use std::{collections::BTreeSet, time::Duration};

use bus::RpcError;
use contract::{
    common::Empty,
    host::CustomTool,
    rpc,
    scheduler::{
        ClaimPreparationReply, ClaimPreparationRequest, ClaimSpriteRequest, ClaimTurnReply,
        ClaimTurnRequest, EndPreparationRequest, EnvironmentSpec, HeartbeatReply, HeartbeatRequest,
        HeldTurn, LeaseExpired, Owned, ReleaseTurnRequest, Routing, Settled, SpriteClaim, TurnSpec,
        claim_turn_reply::Verdict,
    },
    subject, topology,
    vault::{MintLeaseRequest, Route, RouteKind, Routes},
};
use rules::ownership::{self, Held};
use serde_json::Value;
use sqlx::{PgConnection, Row as _};
use types::{
    CredentialKind, McpServer, Networking, Repository, Runtime, SessionId, SessionStatus, UserId,
    file::FileKind,
    limits::{PROVISIONING_MAX, SETTLE_GRACE},
    route,
};
use uuid::Uuid;

use crate::{
    Scheduler,
    catalog::{files, vaults},
    log::{event_log, positions},
    sessions::{
        row::{SessionRow, lock, missing, partition},
        spares,
    },
    unsigned,
};

const REASON_CHARS_MAX: usize = 1000;
/// How soon a turn is offered again whose secrets could not be leased.
const VAULT_AWAY: Duration = Duration::from_secs(1);
/// For deleting one Sprite.
const DESTROY_LIFE: Duration = Duration::from_secs(300);
/// How long a prepared session without a message counts towards its user's number of them.
const PREPARED_FOR: Duration = Duration::from_secs(3600);
const VAULT_DEADLINE: Duration = Duration::from_secs(5);

#[derive(sqlx::FromRow)]
struct TurnRow {
    user_id: Uuid,
    runtime: String,
    sprite: String,
    event_partition: i16,
    agent_version: i32,
    environment_id: Option<Uuid>,
    vault_ids: Value,
    epoch: i32,
    age_seconds: f64,
    prompt: String,
    timeout_seconds: i32,
    conversation_id: Uuid,
    system: String,
    model: String,
    packages: Option<Value>,
    setup_script: Option<String>,
    networking: Option<Value>,
    environment_version: Option<i32>,
    skills: Value,
    mcp_servers: Value,
    resources: Value,
    working_directory: Option<String>,
    env_vars_secret_id: Option<Uuid>,
    mcp_secret_id: Option<Uuid>,
    secret_id: Option<Uuid>,
    permissions: Option<Value>,
    input_id: Option<Uuid>,
    tools: Option<Value>,
    collects_outputs: bool,
    had_files: bool,
    wants_previews: bool,
    has_changed_tokens: bool,
    is_prepared: bool,
}

/// What a turn takes, from a `with` that names the session, the epoch and what the turn itself says
/// as `claimed`, and from the relation that has the session.
macro_rules! turn_columns {
    ($sessions:literal) => {
        concat!("
         select s.user_id, s.runtime, s.sprite, s.event_partition, s.agent_version, s.environment_id, s.vault_ids,
                c.epoch, c.age_seconds, c.prompt, c.timeout_seconds, s.conversation_id, av.system, av.model,
                ev.packages, ev.setup_script, ev.networking, ev.version as environment_version, ev.env_vars_secret_id, av.skills, av.mcp_servers, av.mcp_secret_id,
                s.resources, s.working_directory, s.secret_id, av.permissions, c.input_id, av.tools,
                s.collects_outputs, s.had_files, s.wants_previews, s.tokens_changed_at is not null as has_changed_tokens,
                s.prepared_at is not null as is_prepared
         from claimed c
         join ", $sessions, " s using (session_id)
         join agent_version av on av.agent_id = s.agent_id and av.version = s.agent_version
         left join environment_version ev on ev.environment_id = s.environment_id and ev.version = s.environment_version")
    };
}

/// Makes a runner's lease the owner of a turn, raises the turn's epoch, so that an earlier claimant
/// is fenced off, and returns all that running it takes.
pub async fn turn(
    scheduler: Scheduler,
    request: ClaimTurnRequest,
) -> Result<ClaimTurnReply, RpcError> {
    let id: SessionId = request.session_id.parse().map_err(|_| missing())?;
    let number = i32::try_from(request.turn).map_err(|_| missing())?;
    let claimant: Uuid =
        request.runner_lease.parse().map_err(|_| RpcError::invalid("Malformed runner lease"))?;
    let answer = |verdict| Ok(ClaimTurnReply { verdict: Some(verdict) });
    let mut tx = scheduler.pool.begin().await?;
    // The lease first, as where it is deleted: then its turns.
    let valid = sqlx::query("select from runner_lease where lease_id = $1 for key share")
        .bind(claimant)
        .fetch_optional(&mut *tx);
    if valid.await?.is_none() {
        return answer(Verdict::LeaseExpired(LeaseExpired {}));
    }
    let Some(session) = lock(&mut tx, id, None).await? else {
        return answer(Verdict::Settled(Settled { destroy: None }));
    };
    let status = session.status()?;
    if status == SessionStatus::Terminated {
        drop(tx);
        let destroy = Some(
            sprite_claim(
                &scheduler,
                UserId::from_uuid(session.user_id),
                id,
                session.sprite,
                request.public_key,
            )
            .await?,
        );
        return answer(Verdict::Settled(Settled { destroy }));
    }
    let verdict = match turn_to_claim(&mut tx, &session, number).await? {
        Some(turn) => ownership::claim(status, turn, claimant),
        None => ownership::Verdict::Settled,
    };
    match verdict {
        ownership::Verdict::Run => {}
        ownership::Verdict::Owned => return answer(Verdict::Owned(Owned {})),
        ownership::Verdict::Settled => return answer(Verdict::Settled(Settled { destroy: None })),
    }
    let turn: TurnRow = sqlx::query_as(concat!(
        "with claimed as (
            update turn
            set epoch = epoch + 1, owner = $3, claimed_at = now(), offer_after = now(), offers = 0
            where session_id = $1 and turn_number = $2
            returning session_id, epoch, extract(epoch from now() - created_at)::float8 as age_seconds, prompt, timeout_seconds, input_id
         )",
        turn_columns!("session")
    ))
    .bind(id.uuid())
    .bind(number)
    .bind(claimant)
    .fetch_one(&mut *tx)
    .await?;
    let (epoch, is_first, waited) = (unsigned(turn.epoch), turn.epoch == 1, turn.age_seconds);
    // The vault answers while the claim is committed. A lease of a claim that was not is a lease
    // for the key of a runner that does not get to know of it.
    let secrets = (request.public_key, request.model_token_hash, request.routing);
    let purpose = format!("turn {number}");
    let (committed, spec) =
        tokio::join!(tx.commit(), specification(&scheduler, id, (number, &purpose), turn, secrets));
    committed?;
    if is_first {
        metrics::histogram!("aod_turn_wait_seconds").record(waited);
    }
    match spec {
        Ok(spec) => answer(Verdict::Run(spec)),
        Err(failure) => {
            // Not the turn's fault, and no failed attempt: the vault is away, say.
            release_claim(&scheduler, id, number, epoch, None, VAULT_AWAY).await?;
            Err(failure)
        }
    }
}

/// Returns what it takes to prepare the sandbox of a session for its first turn, or a spare; nothing
/// where that was begun before, where the session has had a message, or where its user has enough
/// sessions that wait for theirs. No one owns a preparation: one that is lost is done by the first
/// turn, or by another spare.
pub async fn preparation(
    scheduler: Scheduler,
    request: ClaimPreparationRequest,
) -> Result<ClaimPreparationReply, RpcError> {
    let id: SessionId = request.session_id.parse().map_err(|_| missing())?;
    let nothing = Ok(ClaimPreparationReply::default());
    let mut tx = scheduler.pool.begin().await?;
    let session = lock(&mut tx, id, None).await?;
    let is_spare = session.is_none();
    if let Some(session) = session {
        let user = UserId::from_uuid(session.user_id);
        if !may_prepare(&mut tx, user, scheduler.prepared_sessions_max).await? {
            return nothing;
        }
    }
    let claim = if is_spare { CLAIM_SPARE } else { CLAIM_UNPREPARED };
    let turn: Option<TurnRow> =
        sqlx::query_as(claim).bind(id.uuid()).fetch_optional(&mut *tx).await?;
    tx.commit().await?;
    let Some(turn) = turn else { return nothing };
    let claimant = (request.public_key, request.model_token_hash, request.routing);
    let spec = specification(&scheduler, id, (0, "preparation"), turn, claimant).await;
    if spec.is_err() && is_spare {
        // Its runner does not get to know that it claimed one.
        let ended = EndPreparationRequest { session_id: request.session_id, is_ready: false };
        spares::end_preparation(scheduler, ended).await?;
    }
    Ok(ClaimPreparationReply { spec: Some(spec?), is_spare })
}

const CLAIM_UNPREPARED: &str = concat!(
    "with claimed as (
        update session set prepared_at = now()
        where session_id = $1 and turn_count = 0 and status = 'completed' and prepared_at is null
        returning session_id, 1 as epoch, 0::float8 as age_seconds, '' as prompt, 0 as timeout_seconds, null::uuid as input_id
     )",
    turn_columns!("session")
);

const CLAIM_SPARE: &str = concat!(
    "with claimed as (
        update spare set state = 'preparing', state_since = now()
        where session_id = $1 and state = 'offered'
        returning session_id, 1 as epoch, 0::float8 as age_seconds, '' as prompt, 0 as timeout_seconds, null::uuid as input_id
     )",
    turn_columns!("spare_session")
);

/// Whether a user has fewer prepared sessions that wait for their first message than `max`.
pub async fn may_prepare(tx: &mut PgConnection, user: UserId, max: u32) -> Result<bool, RpcError> {
    let waiting: i64 = sqlx::query_scalar(
        "select count(*) from session
         where user_id = $1 and prepared_at > now() - make_interval(secs => $2) and turn_count = 0",
    )
    .bind(user.uuid())
    .bind(PREPARED_FOR.as_secs_f64())
    .fetch_one(tx)
    .await?;
    Ok(waiting < i64::from(max))
}

async fn turn_to_claim(
    tx: &mut PgConnection,
    session: &SessionRow,
    number: i32,
) -> Result<Option<ownership::Turn>, RpcError> {
    let row = sqlx::query(
        "select status, owner from turn where session_id = $1 and turn_number = $2 for update",
    )
    .bind(session.session_id)
    .bind(number)
    .fetch_optional(tx)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let status: &str = row.try_get(0)?;
    Ok(Some(ownership::Turn {
        status: status
            .parse()
            .map_err(|()| RpcError::internal(format!("a turn has the status {status}")))?,
        is_current: number == session.turn_count,
        owner: row.try_get(1)?,
    }))
}

/// Collects everything that is needed to run a claimed turn, or, under the number 0, to prepare the
/// first one.
async fn specification(
    scheduler: &Scheduler,
    id: SessionId,
    (number, purpose): (i32, &str),
    turn: TurnRow,
    (public_key, model_token_hash, routing): (Vec<u8>, Vec<u8>, Option<Routing>),
) -> Result<TurnSpec, RpcError> {
    let partition = partition(turn.event_partition)?;
    let runtime: Runtime = turn
        .runtime
        .parse()
        .map_err(|()| RpcError::internal(format!("session {id} has an unknown runtime")))?;
    let timeout_seconds = unsigned(turn.timeout_seconds);
    let kinds = CredentialKind::serving(runtime)
        .into_iter()
        .chain([CredentialKind::Sprites])
        .collect::<Vec<_>>();
    let secrets = [turn.env_vars_secret_id, turn.mcp_secret_id, turn.secret_id];
    let of_vaults = vaults::secrets(&scheduler.pool, &turn.vault_ids).await?;
    let secrets = secrets.into_iter().flatten().chain(of_vaults).map(|id| id.to_string()).collect();
    let life = PROVISIONING_MAX + SETTLE_GRACE + Duration::from_secs(u64::from(timeout_seconds));
    let grant = Grant {
        user: UserId::from_uuid(turn.user_id),
        session: id,
        purpose,
        epoch: unsigned(turn.epoch),
        kinds: &kinds,
        secret_ids: secrets,
        life,
        public_key,
        model_token_hash,
        routes: routing.map(|routing| routes(id, &turn, &routing)).transpose()?,
    };
    // In this order: what was persisted up to there is seen by the query after it. The vault
    // answers meanwhile.
    let end_of_log = async {
        let recorded_through = positions::projected_through(&scheduler.pool, partition).await?;
        Ok::<_, RpcError>((recorded_through, event_log::newest(&scheduler.pool, id).await?))
    };
    let (lease_id, (recorded_through, last_event)) =
        tokio::try_join!(mint(scheduler, grant), end_of_log)?;
    let has_vaults = turn.vault_ids.as_array().is_some_and(|vaults| !vaults.is_empty());
    let may_change =
        turn.agent_version < 0 || has_vaults || turn.wants_previews || turn.has_changed_tokens;
    let files_of = async |wanted: bool, kind: FileKind| match wanted {
        true => files::of_sessions(&scheduler.pool, &[id.uuid()], kind).await,
        false => Ok(Vec::new()),
    };
    let empty = || Value::Object(serde_json::Map::new());
    Ok(TurnSpec {
        sprite: turn.sprite,
        epoch: unsigned(turn.epoch),
        lease_id,
        runtime: turn.runtime,
        model: turn.model,
        // What precedes a script is no instruction to an agent: it runs once.
        system: if number <= 1 || runtime != Runtime::Shell { turn.system } else { String::new() },
        prompt: turn.prompt,
        timeout_seconds,
        conversation_id: turn.conversation_id.to_string(),
        environment: Some(EnvironmentSpec {
            packages: turn.packages.unwrap_or_else(empty).to_string(),
            setup_script: turn.setup_script.unwrap_or_default(),
            networking: turn.networking.unwrap_or_else(empty).to_string(),
            user_id: turn.user_id.to_string(),
            environment_id: turn.environment_id.map(|id| id.to_string()).unwrap_or_default(),
            version: turn.environment_version.map(unsigned).unwrap_or_default(),
        }),
        last_event,
        recorded_through,
        event_partition: partition.number().into(),
        skills: turn.skills.to_string(),
        mcp_servers: turn.mcp_servers.to_string(),
        resources: turn.resources.to_string(),
        working_directory: turn.working_directory,
        permissions: turn
            .permissions
            .map(|permissions| permissions.to_string())
            .unwrap_or_default(),
        input_id: turn.input_id.map(|id| id.to_string()).unwrap_or_default(),
        may_change,
        custom_tools: turn.tools.map(custom_tools).unwrap_or_default(),
        previews: turn.wants_previews,
        files: files_of(turn.had_files, FileKind::Copy).await?,
        had_files: turn.had_files,
        collects_outputs: turn.collects_outputs,
        outputs: files_of(turn.collects_outputs, FileKind::Output).await?,
        is_prepared: turn.is_prepared,
    })
}

/// Where the session's requests go by way of the model gateway.
fn routes(id: SessionId, turn: &TurnRow, routing: &Routing) -> Result<Routes, RpcError> {
    let unreadable = |error: serde_json::Error| {
        RpcError::internal(format!("the routes of session {id} cannot be read: {error}"))
    };
    let servers: Vec<McpServer> =
        serde_json::from_value(turn.mcp_servers.clone()).map_err(unreadable)?;
    let repositories: Vec<Repository> =
        serde_json::from_value(turn.resources.clone()).map_err(unreadable)?;
    let networking = turn
        .networking
        .clone()
        .map(serde_json::from_value::<Networking>)
        .transpose()
        .map_err(unreadable)?
        .unwrap_or_default();
    let routes = route::of_session(&servers, &repositories, &networking, &routing.private_hosts)
        .into_iter()
        .map(|route| Route {
            kind: match route.kind {
                route::RouteKind::Mcp => RouteKind::Mcp,
                route::RouteKind::Git => RouteKind::Git,
            }
            .into(),
            path: route.path,
            name: route.name,
            url: route.url,
            is_refused: route.is_refused,
            headers: Vec::new(),
            refreshable: None,
        });
    Ok(Routes { routes: routes.collect() })
}

/// Those of an agent's tools that the session's user runs.
fn custom_tools(tools: Value) -> Vec<CustomTool> {
    let text = |tool: &Value, field: &str| {
        tool.get(field).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let Value::Array(tools) = tools else { return Vec::new() };
    let custom =
        tools.iter().filter(|tool| text(tool, "type") == "custom").map(|tool| CustomTool {
            name: text(tool, "name"),
            description: text(tool, "description"),
            input_schema_json: tool.get("input_schema").map(Value::to_string).unwrap_or_default(),
        });
    custom.collect()
}

/// Releases a turn to other runners. With a reason it counts as a failed attempt, and the reason is
/// kept for the turn's user. Ignored if the claim is stale.
pub async fn release(scheduler: Scheduler, request: ReleaseTurnRequest) -> Result<Empty, RpcError> {
    let id: SessionId = request.session_id.parse().map_err(|_| missing())?;
    let number = i32::try_from(request.turn).map_err(|_| missing())?;
    let reason: String =
        request.reason.chars().filter(|c| *c != '\0').take(REASON_CHARS_MAX).collect();
    let reason = (!reason.is_empty()).then_some(reason);
    release_claim(&scheduler, id, number, request.epoch, reason, Duration::ZERO).await?;
    Ok(Empty {})
}

async fn release_claim(
    scheduler: &Scheduler,
    id: SessionId,
    number: i32,
    epoch: u32,
    reason: Option<String>,
    wait: Duration,
) -> Result<(), RpcError> {
    let mut tx = scheduler.pool.begin().await?;
    let failed = i32::from(reason.is_some());
    let failures: Option<i32> = sqlx::query_scalar(
        "update turn
         set owner = null, failures = failures + $4, handed_back_reason = coalesce($5, handed_back_reason), offers = 0,
             offer_after = now() + make_interval(secs => $6),
             -- A turn that cannot be started is given up; one whose agent runs has its own deadline.
             -- Nor does one whose request for a decision can no longer be answered wait for ever.
             deadline_at = case when (status = 'pending' or waiting_since is not null) and failures + $4 > $7 then now() else deadline_at end,
             waiting_since = case when failures + $4 > $7 then null else waiting_since end
         where session_id = $1 and turn_number = $2 and epoch = $3 and owner is not null
         returning failures",
    )
    .bind(id.uuid())
    .bind(number)
    .bind(i32::try_from(epoch).map_err(|_| missing())?)
    .bind(failed)
    .bind(reason)
    .bind(wait.as_secs_f64())
    .bind(ownership::FAILURES_MAX as i32)
    .fetch_optional(&mut *tx)
    .await?;
    if let Some(failures) = failures.filter(|_| failed > 0) {
        sqlx::query("update turn set offer_after = now() + make_interval(secs => $3) where session_id = $1 and turn_number = $2")
            .bind(id.uuid())
            .bind(number)
            .bind(ownership::RETRIES.jittered(unsigned(failures)).as_secs_f64())
            .execute(&mut *tx)
            .await?;
    }
    tx.commit().await?;
    scheduler.released.notify_one();
    Ok(())
}

/// Extends a runner's lease, and compares the turns that it holds with those that it owns.
pub async fn heartbeat(
    scheduler: Scheduler,
    request: HeartbeatRequest,
) -> Result<HeartbeatReply, RpcError> {
    let lease: Uuid =
        request.runner_lease.parse().map_err(|_| RpcError::invalid("Malformed runner lease"))?;
    let statement = match request.first {
        true => {
            "insert into runner_lease (lease_id, runner, expires_at) values ($1, $3, now() + make_interval(secs => $2))
             on conflict (lease_id) do update set expires_at = excluded.expires_at"
        }
        false => "update runner_lease set expires_at = now() + make_interval(secs => $2), runner = $3 where lease_id = $1",
    };
    let extended = sqlx::query(statement)
        .bind(lease)
        .bind(ownership::LEASE.as_secs_f64())
        .bind(&request.runner)
        .execute(&scheduler.pool)
        .await?;
    if extended.rows_affected() == 0 {
        return Ok(HeartbeatReply { expired: true, ..HeartbeatReply::default() });
    }
    let held: Vec<Held> = request.held.iter().filter_map(parse_held).collect();
    let ended: Vec<(Held, u64)> =
        request.held.iter().filter_map(|turn| Some((parse_held(turn)?, turn.ended?))).collect();
    let lost_ends = lost_ends(&scheduler, &ended).await?;
    let rows = sqlx::query(
        "select session_id, turn_number, epoch, claimed_at > now() - make_interval(secs => $2),
                    status = 'running' and exists (
                        select from input i
                        where i.session_id = turn.session_id and i.turn_number = turn.turn_number and i.status in ('queued', 'delivered')
                    )
             from turn where owner = $1",
    )
    .bind(lease)
    .bind(ownership::CLAIM_GRACE.as_secs_f64())
    .fetch_all(&scheduler.pool)
    .await?;
    let (mut owned, mut with_inputs) = (Vec::with_capacity(rows.len()), Vec::new());
    for row in rows {
        let read = || -> Result<_, sqlx::Error> {
            let (session, turn, epoch): (Uuid, i32, i32) =
                (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
            Ok((Held { session, turn: unsigned(turn), epoch: unsigned(epoch) }, row.try_get(3)?))
        };
        let turn: (Held, bool) = read()?;
        if row.try_get(4)? {
            with_inputs.push(turn.0);
        }
        owned.push(turn);
    }
    let mut differences = ownership::compare(&held, &owned);
    for turn in lost_ends.into_iter().filter(|turn| owned.iter().any(|(owned, _)| owned == turn)) {
        tracing::error!(session = %turn.session, turn = turn.turn, "the turn's end was lost with its stream; it is offered again");
        purge_log(&scheduler, turn.session).await?;
        differences.forgotten.push(turn);
        differences.lost.push(turn);
    }
    for turn in &differences.forgotten {
        release_claim(
            &scheduler,
            SessionId::from_uuid(turn.session),
            turn.turn as i32,
            turn.epoch,
            None,
            Duration::ZERO,
        )
        .await?;
    }
    let turns = |turns: Vec<Held>| {
        let turn = |held: Held| HeldTurn {
            session_id: SessionId::from_uuid(held.session).to_string(),
            turn: held.turn,
            epoch: held.epoch,
            ended: None,
        };
        turns.into_iter().map(turn).collect()
    };
    Ok(HeartbeatReply {
        expired: false,
        lost: turns(differences.lost),
        with_inputs: turns(with_inputs),
    })
}

fn parse_held(turn: &HeldTurn) -> Option<Held> {
    let session: SessionId = turn.session_id.parse().ok()?;
    Some(Held { session: session.uuid(), turn: turn.turn, epoch: turn.epoch })
}

/// Those of the ended turns whose ends the projector has passed. Read before the turns' owners: an
/// end that was persisted has taken its turn's owner away by then.
async fn lost_ends(
    scheduler: &Scheduler,
    ended: &[(Held, u64)],
) -> Result<BTreeSet<Held>, RpcError> {
    if ended.is_empty() {
        return Ok(BTreeSet::new());
    }
    let sessions: Vec<Uuid> = ended.iter().map(|(held, _)| held.session).collect();
    let rows =
        sqlx::query("select session_id, event_partition from session where session_id = any($1)")
            .bind(sessions)
            .fetch_all(&scheduler.pool)
            .await?;
    let mut lost = BTreeSet::new();
    for row in rows {
        let (session, number): (Uuid, i16) = (row.try_get(0)?, row.try_get(1)?);
        let projected = positions::projected_through(&scheduler.pool, partition(number)?).await?;
        lost.extend(
            ended
                .iter()
                .filter(|(held, id)| held.session == session && *id <= projected)
                .map(|(held, _)| *held),
        );
    }
    Ok(lost)
}

/// Empties a session's subject in its stream, so that the next writer continues the persisted log.
async fn purge_log(scheduler: &Scheduler, session: Uuid) -> Result<(), RpcError> {
    let number: Option<i16> =
        sqlx::query_scalar("select event_partition from session where session_id = $1")
            .bind(session)
            .fetch_optional(&scheduler.pool)
            .await?;
    let Some(number) = number else { return Ok(()) };
    let partition = partition(number)?;
    let log = subject::session_log(SessionId::from_uuid(session), partition);
    scheduler.bus.purge(topology::events(partition).name, &log).await.map_err(RpcError::internal)
}

/// Returns what is needed to delete a session's Sprite, if the session was terminated, failed or
/// was deleted.
pub async fn sprite(
    scheduler: Scheduler,
    request: ClaimSpriteRequest,
) -> Result<SpriteClaim, RpcError> {
    let id: SessionId = request.session_id.parse().map_err(|_| missing())?;
    let row = sqlx::query(
        "select user_id, sprite from session
         where session_id = $1 and destroy_after is not null and status in ('terminated', 'failed')
         union all
         select user_id, sprite from deleted_session where session_id = $1
         limit 1",
    )
    .bind(id.uuid())
    .fetch_optional(&scheduler.pool)
    .await?
    .ok_or_else(missing)?;
    let user = UserId::from_uuid(row.try_get(0)?);
    sprite_claim(&scheduler, user, id, row.try_get(1)?, request.public_key).await
}

async fn sprite_claim(
    scheduler: &Scheduler,
    user: UserId,
    session: SessionId,
    sprite: String,
    public_key: Vec<u8>,
) -> Result<SpriteClaim, RpcError> {
    let kinds = &[CredentialKind::Sprites];
    let grant = Grant {
        user,
        session,
        purpose: "destroy",
        epoch: 0,
        kinds,
        secret_ids: Vec::new(),
        life: DESTROY_LIFE,
        public_key,
        model_token_hash: Vec::new(),
        routes: None,
    };
    let lease_id = mint(scheduler, grant).await?;
    Ok(SpriteClaim { sprite, lease_id })
}

/// The right to have some secrets for a piece of work.
pub struct Grant<'a> {
    pub user: UserId,
    pub session: SessionId,
    pub purpose: &'a str,
    /// Which claim of the work this is for: a later one's lease ends it.
    pub epoch: u32,
    pub kinds: &'a [CredentialKind],
    pub secret_ids: Vec<String>,
    pub life: Duration,
    /// The claimant's: it alone opens the secrets.
    pub public_key: Vec<u8>,
    /// Hash of the session's token for the model gateway; empty if there is none.
    pub model_token_hash: Vec<u8>,
    /// What that token leads to besides model providers.
    pub routes: Option<Routes>,
}

pub async fn mint(scheduler: &Scheduler, grant: Grant<'_>) -> Result<String, RpcError> {
    let request = MintLeaseRequest {
        user_id: grant.user.to_string(),
        session_id: grant.session.to_string(),
        purpose: grant.purpose.to_owned(),
        credential_kinds: grant.kinds.iter().map(|kind| kind.as_str().to_owned()).collect(),
        secret_ids: grant.secret_ids,
        ttl_seconds: u32::try_from(grant.life.as_secs()).unwrap_or(u32::MAX),
        epoch: grant.epoch,
        public_key: grant.public_key,
        model_token_hash: grant.model_token_hash,
        routes: grant.routes,
    };
    Ok(scheduler.bus.call::<rpc::MintLease>(&request, VAULT_DEADLINE).await?.lease_id)
}
