//! Sprites that no session knows: made by a runner that died at the wrong moment, or outlived by their sessions' rows. They cost money.
//!
//! A runner lists what an account holds under this deployment's prefix; what is an orphan is decided here, where sessions are known. A
//! session's row is there before its Sprite is made, so that a Sprite without one has lost it.

use std::time::Duration;

use bus::Failure;
use contract::{
    runner::SweepSprites,
    scheduler::{ClaimSweepReply, ClaimSweepRequest, FindOrphansReply, FindOrphansRequest},
    subject,
};
use tokio_util::sync::CancellationToken;
use types::{CredentialKind, SessionId, UserId};
use uuid::Uuid;

use crate::{
    Scheduler,
    claims::{self, Grant},
    sessions::enqueue,
};

const LEASE: Duration = Duration::from_secs(300);

/// Queues a search of every user's account, once in a while, whichever replica comes first.
pub async fn run(scheduler: Scheduler, every: Duration, stop: CancellationToken) {
    service::periodically("orphans", every, stop, || queue(&scheduler, every)).await;
}

async fn queue(scheduler: &Scheduler, every: Duration) -> Result<(), Failure> {
    let mut tx = scheduler.pool.begin().await?;
    let users: Vec<Uuid> = sqlx::query_scalar(
        "insert into sprite_sweep (user_id, queued_at)
         select user_id, now()
         from (select user_id from session union select user_id from deleted_session union select user_id from sprite_sweep) known
         on conflict (user_id) do update set queued_at = now() where sprite_sweep.queued_at < now() - make_interval(secs => $1)
         returning user_id",
    )
    .bind(every.as_secs_f64() / 2.0)
    .fetch_all(&mut *tx)
    .await?;
    for user in users {
        let user = UserId::from_uuid(user);
        enqueue(&mut tx, &subject::sprite_sweep(user), &SweepSprites { user_id: user.to_string() }).await?;
    }
    tx.commit().await?;
    scheduler.outbox.notify_one();
    Ok(())
}

/// What it takes to search a user's account.
pub async fn claim(scheduler: Scheduler, request: ClaimSweepRequest) -> Result<ClaimSweepReply, Failure> {
    let user: UserId = request.user_id.parse().map_err(|_| Failure::not_found("User not found"))?;
    // No session's: an id of its own, that the audit shows.
    let kinds = &[CredentialKind::Sprites];
    let grant = Grant { user, session: SessionId::new(), purpose: "sweep", epoch: 0, kinds, secret_ids: Vec::new(), life: LEASE };
    let lease_id = claims::mint(&scheduler, grant).await?;
    Ok(ClaimSweepReply { lease_id, name_prefix: format!("{}-", scheduler.sprite_name_prefix) })
}

/// Those of an account's Sprites that have to go.
pub async fn find(scheduler: Scheduler, request: FindOrphansRequest) -> Result<FindOrphansReply, Failure> {
    let prefix = format!("{}-", scheduler.sprite_name_prefix);
    let ours: Vec<String> = request.names.into_iter().filter(|name| name.starts_with(&prefix)).collect();
    let names = sqlx::query_scalar(
        "select name
         from unnest($1::text[]) as found (name)
         where not exists (select from session where sprite = name and sprite_destroyed_at is null)
           and not exists (select from deleted_session where sprite = name and sprite_destroyed_at is null)",
    )
    .bind(ours)
    .fetch_all(&scheduler.pool)
    .await?;
    Ok(FindOrphansReply { names })
}

/// Which deployment this is.
pub async fn deployment(pool: &sqlx::PgPool) -> Result<String, sqlx::Error> {
    sqlx::query_scalar("select deployment_id from deployment").fetch_one(pool).await
}
