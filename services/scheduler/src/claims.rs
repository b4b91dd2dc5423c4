//! What runners ask before they touch anything: is this still to be done, and with what.

use std::time::Duration;

use bus::Failure;
use contract::{
    common::Empty,
    rpc,
    scheduler::{
        ClaimSpriteRequest, ClaimTurnReply, ClaimTurnRequest, EnvironmentSpec, ReleaseTurnRequest, Settled, SpriteClaim, TurnSpec,
        claim_turn_reply::Verdict,
    },
    vault::MintLeaseRequest,
};
use serde_json::Value;
use sqlx::Row as _;
use types::{
    CredentialKind, Runtime, SessionId, SessionStatus, UserId,
    limits::{PROVISIONING_MAX, SETTLE_GRACE},
};
use uuid::Uuid;

use crate::{
    Scheduler, deadlines, recorder,
    sessions::{lock, missing, newest_event},
    unsigned,
};

/// A job that came back this often will not go better the next time.
const EPOCH_MAX: i32 = 100;
const REASON_CHARS_MAX: usize = 1000;
/// For deleting one Sprite.
const DESTROY_LIFE: Duration = Duration::from_secs(300);
const VAULT_DEADLINE: Duration = Duration::from_secs(5);

#[derive(sqlx::FromRow)]
struct TurnRow {
    epoch: i32,
    age_seconds: f64,
    handed_back_reason: Option<String>,
    prompt: String,
    timeout_seconds: i32,
    conversation_id: Uuid,
    system: String,
    model: String,
    packages: Option<Value>,
    setup_script: Option<String>,
    networking: Option<Value>,
    skills: Value,
    mcp_servers: Value,
    resources: Value,
    env_vars_secret_id: Option<Uuid>,
    mcp_secret_id: Option<Uuid>,
    secret_id: Option<Uuid>,
}

/// Raises the turn's epoch, so that an earlier claimant is fenced off, and gives all that running it takes.
pub async fn turn(scheduler: Scheduler, request: ClaimTurnRequest) -> Result<ClaimTurnReply, Failure> {
    let id: SessionId = request.session_id.parse().map_err(|_| missing())?;
    let number = i32::try_from(request.turn).map_err(|_| missing())?;
    let mut tx = scheduler.pool.begin().await.map_err(Failure::internal)?;
    let Some(session) = lock(&mut tx, id, None).await? else {
        return Ok(ClaimTurnReply { verdict: Some(Verdict::Settled(Settled { destroy: None })) });
    };
    if session.status()? == SessionStatus::Terminated {
        drop(tx);
        let destroy = Some(sprite_claim(&scheduler, UserId::from_uuid(session.user_id), id, session.sprite).await?);
        return Ok(ClaimTurnReply { verdict: Some(Verdict::Settled(Settled { destroy })) });
    }
    let turn: Option<TurnRow> = sqlx::query_as(
        "with claimed as (
            update turn
            set epoch = epoch + 1
            where session_id = $1 and turn_number = $2 and status in ('pending', 'running')
            returning session_id, epoch, extract(epoch from now() - created_at)::float8 as age_seconds, handed_back_reason, prompt,
                      timeout_seconds
         )
         select c.epoch, c.age_seconds, c.handed_back_reason, c.prompt, c.timeout_seconds, s.conversation_id, av.system, av.model,
                ev.packages, ev.setup_script, ev.networking, ev.env_vars_secret_id, av.skills, av.mcp_servers, av.mcp_secret_id,
                s.resources, s.secret_id
         from claimed c
         join session s using (session_id)
         join agent_version av on av.agent_id = s.agent_id and av.version = s.agent_version
         left join environment_version ev on ev.environment_id = s.environment_id and ev.version = s.environment_version",
    )
    .bind(id.uuid())
    .bind(number)
    .fetch_optional(&mut *tx)
    .await
    .map_err(Failure::internal)?;
    let Some(turn) = turn.filter(|_| number == session.turn_count) else {
        return Ok(ClaimTurnReply { verdict: Some(Verdict::Settled(Settled { destroy: None })) });
    };
    if turn.epoch > EPOCH_MAX {
        let reason = turn.handed_back_reason.map(|reason| format!(": {reason}")).unwrap_or_default();
        deadlines::settle(&mut tx, session, number, &format!("Given up after {EPOCH_MAX} attempts{reason}")).await?;
        tx.commit().await.map_err(Failure::internal)?;
        scheduler.outbox.notify_one();
        return Ok(ClaimTurnReply { verdict: Some(Verdict::Settled(Settled { destroy: None })) });
    }
    tx.commit().await.map_err(Failure::internal)?;
    if turn.epoch == 1 {
        metrics::histogram!("aod_turn_wait_seconds").record(turn.age_seconds);
    }
    let partition = session.partition()?;
    let recorded_through = recorder::recorded_through(&scheduler.pool, partition).await.map_err(Failure::internal)?;
    let last_event = newest_event(&scheduler, id).await?;

    let runtime: Runtime = session.runtime.parse().map_err(|()| Failure::internal(format!("session {id} has an unknown runtime")))?;
    let timeout_seconds = unsigned(turn.timeout_seconds);
    let kinds = CredentialKind::serving(runtime).into_iter().chain([CredentialKind::Sprites]).collect::<Vec<_>>();
    let secrets = [turn.env_vars_secret_id, turn.mcp_secret_id, turn.secret_id];
    let secrets = secrets.iter().flatten().map(ToString::to_string).collect();
    let life = PROVISIONING_MAX + SETTLE_GRACE + Duration::from_secs(u64::from(timeout_seconds));
    let grant = Grant {
        user: UserId::from_uuid(session.user_id),
        session: id,
        purpose: &format!("turn {number}"),
        epoch: unsigned(turn.epoch),
        kinds: &kinds,
        secret_ids: secrets,
        life,
    };
    let lease_id = mint(&scheduler, grant).await?;
    let empty = || Value::Object(serde_json::Map::new());
    Ok(ClaimTurnReply {
        verdict: Some(Verdict::Run(TurnSpec {
            sprite: session.sprite,
            epoch: unsigned(turn.epoch),
            lease_id,
            runtime: session.runtime,
            model: turn.model,
            system: if number == 1 { turn.system } else { String::new() },
            prompt: turn.prompt,
            timeout_seconds,
            conversation_id: turn.conversation_id.to_string(),
            environment: Some(EnvironmentSpec {
                packages: turn.packages.unwrap_or_else(empty).to_string(),
                setup_script: turn.setup_script.unwrap_or_default(),
                networking: turn.networking.unwrap_or_else(empty).to_string(),
            }),
            last_event,
            recorded_through,
            event_partition: partition.number().into(),
            skills: turn.skills.to_string(),
            mcp_servers: turn.mcp_servers.to_string(),
            resources: turn.resources.to_string(),
        })),
    })
}

/// A runner could not go on: why is kept for the turn's user. A claim that was overtaken has no say.
pub async fn hand_back(scheduler: Scheduler, request: ReleaseTurnRequest) -> Result<Empty, Failure> {
    let id: SessionId = request.session_id.parse().map_err(|_| missing())?;
    let reason: String = request.reason.chars().filter(|c| *c != '\0').take(REASON_CHARS_MAX).collect();
    sqlx::query("update turn set handed_back_reason = $4 where session_id = $1 and turn_number = $2 and epoch = $3")
        .bind(id.uuid())
        .bind(i32::try_from(request.turn).map_err(|_| missing())?)
        .bind(i32::try_from(request.epoch).map_err(|_| missing())?)
        .bind(reason)
        .execute(&scheduler.pool)
        .await
        .map_err(Failure::internal)?;
    Ok(Empty {})
}

/// What it takes to delete a session's Sprite; also when the session itself is deleted.
pub async fn sprite(scheduler: Scheduler, request: ClaimSpriteRequest) -> Result<SpriteClaim, Failure> {
    let id: SessionId = request.session_id.parse().map_err(|_| missing())?;
    let row = sqlx::query(
        "select user_id, sprite from session where session_id = $1
         union all
         select user_id, sprite from deleted_session where session_id = $1
         limit 1",
    )
    .bind(id.uuid())
    .fetch_optional(&scheduler.pool)
    .await
    .map_err(Failure::internal)?
    .ok_or_else(missing)?;
    let user = UserId::from_uuid(row.try_get(0).map_err(Failure::internal)?);
    sprite_claim(&scheduler, user, id, row.try_get(1).map_err(Failure::internal)?).await
}

async fn sprite_claim(scheduler: &Scheduler, user: UserId, session: SessionId, sprite: String) -> Result<SpriteClaim, Failure> {
    let kinds = &[CredentialKind::Sprites];
    let grant = Grant { user, session, purpose: "destroy", epoch: 0, kinds, secret_ids: Vec::new(), life: DESTROY_LIFE };
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
}

pub async fn mint(scheduler: &Scheduler, grant: Grant<'_>) -> Result<String, Failure> {
    let request = MintLeaseRequest {
        user_id: grant.user.to_string(),
        session_id: grant.session.to_string(),
        purpose: grant.purpose.to_owned(),
        credential_kinds: grant.kinds.iter().map(|kind| kind.as_str().to_owned()).collect(),
        secret_ids: grant.secret_ids,
        ttl_seconds: u32::try_from(grant.life.as_secs()).unwrap_or(u32::MAX),
        epoch: grant.epoch,
    };
    Ok(scheduler.bus.call::<rpc::MintLease>(&request, VAULT_DEADLINE).await?.lease_id)
}
