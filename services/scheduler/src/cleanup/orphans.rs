//! Orphaned Sprites: created by a runner that died before it reported them, or left when their
//! session's row was deleted. They cost money.
//!
//! A runner lists what an account holds under this deployment's prefix; what is an orphan is
//! decided here, where sessions are known. The row of a session, or of a spare, is there before its
//! Sprite is made, so that a Sprite without one has lost it.

use std::time::Duration;

use bus::RpcError;
use contract::{
    rpc,
    runner::SweepSprites,
    scheduler::{ClaimSweepReply, ClaimSweepRequest, FindOrphansReply, FindOrphansRequest},
    subject,
    vault::FindAccountsRequest,
};
use secrecy::{ExposeSecret as _, SecretString};
use tokio_util::sync::CancellationToken;
use types::{CredentialKind, SessionId, UserId};
use uuid::Uuid;

use crate::{
    Scheduler,
    dispatch::{
        claims::{self, Grant},
        outbox::enqueue,
    },
};

const LEASE: Duration = Duration::from_secs(300);

/// A user's account is searched until this many intervals after the last change of a session: a
/// Sprite that is made late, by a runner that was paused for instance, is found too.
const INTERVALS: f64 = 4.0;
/// A question about so many users fits a message.
const USERS_AT_A_TIME: usize = 50_000;
const VAULT_DEADLINE: Duration = Duration::from_secs(3);
/// Users whose accounts have not been searched for so long are forgotten here.
const FORGET_AFTER_DAYS: i32 = 7;

/// Queues a search of the accounts of users whose sessions changed, once in a while, whichever
/// replica comes first.
pub async fn run(scheduler: Scheduler, every: Duration, stop: CancellationToken) {
    service::periodically("orphans", every, stop, || queue(&scheduler, every)).await;
}

async fn queue(scheduler: &Scheduler, every: Duration) -> Result<(), RpcError> {
    let mut tx = scheduler.pool.begin().await?;
    // Where none was searched for longer than that, as after a restore, what changed meanwhile may
    // not be known: then everyone's.
    let users: Vec<Uuid> = sqlx::query_scalar(
        "with since as (
             select now() - make_interval(secs => $1 * $2) as time,
                    coalesce((select max(queued_at) from sprite_sweep), '-infinity') < now() - make_interval(secs => $1 * $2) as is_unknown
         ), changed as (
             select distinct user_id from session, since where updated_at > since.time
             union select user_id from deleted_session, since where deleted_at > since.time
             union select user_id from sprite_sweep, since where changed_at > since.time
             union select user_id from agent, since where since.is_unknown
         )
         insert into sprite_sweep (user_id, queued_at)
         select user_id, now() from changed
         on conflict (user_id) do update set queued_at = now() where sprite_sweep.queued_at < now() - make_interval(secs => $1 / 2)
         returning user_id",
    )
    .bind(every.as_secs_f64())
    .bind(INTERVALS)
    .fetch_all(&mut *tx)
    .await?;
    for user in one_of_each_account(scheduler, users).await {
        enqueue(&mut tx, &subject::sprite_sweep(user), &SweepSprites { user_id: user.to_string() })
            .await?;
    }
    // The newest stays: it says when was searched last.
    sqlx::query(
        "delete from sprite_sweep
         where greatest(queued_at, changed_at) < now() - make_interval(days => $1)
           and queued_at < (select max(queued_at) from sprite_sweep)",
    )
    .bind(FORGET_AFTER_DAYS)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    scheduler.due.outbox.notify_one();
    Ok(())
}

/// One of the users of each account: users without a token of their own share the deployment's,
/// which is searched once for all of them.
async fn one_of_each_account(scheduler: &Scheduler, users: Vec<Uuid>) -> Vec<UserId> {
    let users: Vec<UserId> = users.into_iter().map(UserId::from_uuid).collect();
    let mut found = Vec::new();
    for users in users.chunks(USERS_AT_A_TIME) {
        let request =
            FindAccountsRequest { user_ids: users.iter().map(UserId::to_string).collect() };
        match scheduler.bus.call::<rpc::FindAccounts>(&request, VAULT_DEADLINE).await {
            Ok(reply) => {
                found.extend(reply.user_ids.iter().filter_map(|id| id.parse::<UserId>().ok()))
            }
            // Then each is searched as if it were an account of its own.
            Err(error) => {
                tracing::warn!(%error, "the vault did not say who shares a Sprites account");
                found.extend(users);
            }
        }
    }
    found
}

/// Returns what is needed to search a user's account.
pub async fn claim(
    scheduler: Scheduler,
    request: ClaimSweepRequest,
) -> Result<ClaimSweepReply, RpcError> {
    let user: UserId =
        request.user_id.parse().map_err(|_| RpcError::not_found("User not found"))?;
    // No session's: an id of its own, that the audit shows.
    let kinds = &[CredentialKind::Sprites];
    let grant = Grant {
        user,
        session: SessionId::new(),
        purpose: "sweep",
        epoch: 0,
        kinds,
        secret_ids: Vec::new(),
        life: LEASE,
        public_key: request.public_key,
        model_token_hash: Vec::new(),
        routes: None,
    };
    let lease_id = claims::mint(&scheduler, grant).await?;
    Ok(ClaimSweepReply { lease_id, name_prefix: format!("{}-", scheduler.sprite_name_prefix) })
}

/// Those of an account's Sprites that have to go.
pub async fn find(
    scheduler: Scheduler,
    request: FindOrphansRequest,
) -> Result<FindOrphansReply, RpcError> {
    let prefix = format!("{}-", scheduler.sprite_name_prefix);
    let ours: Vec<String> =
        request.names.into_iter().filter(|name| name.starts_with(&prefix)).collect();
    let names = sqlx::query_scalar(
        "select name
         from unnest($1::text[]) as found (name)
         where not exists (select from session where sprite = name and sprite_destroyed_at is null)
           and not exists (select from deleted_session where sprite = name and sprite_destroyed_at is null)
           and not exists (select from spare where sprite = name and state <> 'adopted')",
    )
    .bind(ours)
    .fetch_all(&scheduler.pool)
    .await?;
    Ok(FindOrphansReply { names })
}

/// The name of this deployment in those of its Sprites.
///
/// `id` is the setting AOD_DEPLOYMENT_ID. The first scheduler that has one puts it into the
/// database; in another deployment, which has a copy of that database, it differs.
///
/// # Errors
/// When it differs: everything that a scheduler does with Sprites would be done to those of the
/// other deployment.
pub async fn deployment(pool: &sqlx::PgPool, id: &SecretString) -> anyhow::Result<String> {
    let id = id.expose_secret();
    sqlx::query("update deployment set owner = $1 where owner is null")
        .bind(id)
        .execute(pool)
        .await?;
    let (name, owner): (String, String) =
        sqlx::query_as("select deployment_id, owner from deployment").fetch_one(pool).await?;
    anyhow::ensure!(
        owner == id,
        "this database belongs to another deployment: its AOD_DEPLOYMENT_ID is not this one's. Set AOD_DEPLOYMENT_ID to that deployment's where \
         this is a restored backup of it; run `aod deploy adopt` where this is a copy beside it, so that its sandboxes are left alone"
    );
    Ok(name)
}
