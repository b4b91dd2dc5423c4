//! Removes the bytes of files that were deleted, and what a process that died left of others.

use std::time::Duration;

use bus::RpcError;
use futures::StreamExt as _;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{Scheduler, catalog::files::FileSettings};

const EVERY: Duration = Duration::from_secs(2);
const SEARCH_EVERY: Duration = Duration::from_secs(60 * 60);
const AT_A_TIME: i64 = 100;
/// A file that is not finished by then never will be: gateways and runners give up earlier.
const PENDING_SECONDS_MAX: f64 = 60.0 * 60.0;
/// Objects are looked for in the table once they are this old: their rows are older.
const OBJECT_AGE_MIN: Duration = Duration::from_secs(2 * 60 * 60);
const OBJECTS_AT_A_TIME: usize = 1000;

pub fn due(settings: &FileSettings) -> String {
    let old = settings.days.map(|days| {
        format!(
            "or (select min(created_at) from file where state = 'ready' and kind = 'upload')
                 < now() - make_interval(days => {days})"
        )
    });
    format!(
        "exists (select from file where state <> 'ready' and state = 'deleted')
         or exists (select from file
                    where state = 'pending' and state <> 'ready' and state_since < now() - make_interval(secs => {PENDING_SECONDS_MAX}))
         or (select min(expires_at) from file where state = 'ready') < now()
         {}",
        old.unwrap_or_default()
    )
}

/// Removes the bytes of deleted files, gives up what was never finished, and ends files whose time
/// is over.
pub async fn run(scheduler: Scheduler, stop: CancellationToken) {
    service::whenever("files", &scheduler.due.files, EVERY, stop, || async {
        end_some(&scheduler).await?;
        while remove_some(&scheduler).await? == AT_A_TIME {}
        Ok::<_, RpcError>(())
    })
    .await;
}

/// Looks for bytes without a row.
pub async fn search(scheduler: Scheduler, stop: CancellationToken) {
    service::periodically("objects of files", SEARCH_EVERY, stop, || {
        remove_lost_objects(&scheduler)
    })
    .await;
}

async fn end_some(scheduler: &Scheduler) -> Result<(), RpcError> {
    // Each by its own index.
    let given_up = sqlx::query(
        "update file set state = 'deleted', state_since = now()
         where state = 'pending' and state <> 'ready' and state_since < now() - make_interval(secs => $1)",
    );
    given_up.bind(PENDING_SECONDS_MAX).execute(&scheduler.pool).await?;
    sqlx::query("update file set state = 'deleted', state_since = now() where state = 'ready' and expires_at < now()")
        .execute(&scheduler.pool)
        .await?;
    if let Some(days) = scheduler.files.days {
        sqlx::query(
            "update file set state = 'deleted', state_since = now()
             where state = 'ready' and kind = 'upload' and created_at < now() - make_interval(days => $1)",
        )
        .bind(i32::from(days))
        .execute(&scheduler.pool)
        .await?;
    }
    Ok(())
}

async fn remove_some(scheduler: &Scheduler) -> Result<i64, RpcError> {
    let Some(store) = &scheduler.files.store else { return Ok(0) };
    let mut tx = scheduler.pool.begin().await?;
    let rows: Vec<(Uuid, Uuid)> =
        sqlx::query_as("select file_id, object_id from file where state = 'deleted' order by state_since limit $1 for update skip locked")
            .bind(AT_A_TIME)
            .fetch_all(&mut *tx)
            .await?;
    let objects: Vec<Uuid> = rows.iter().map(|(_, object)| *object).collect();
    let used: Vec<Uuid> = sqlx::query_scalar(
        "select object_id from file where object_id = any($1) and state <> 'deleted'",
    )
    .bind(&objects)
    .fetch_all(&mut *tx)
    .await?;
    let mut removed = Vec::new();
    for (file, object) in rows {
        if used.contains(&object) {
            removed.push(file);
            continue;
        }
        match store.delete(object).await {
            Ok(()) => removed.push(file),
            Err(error) => {
                tracing::warn!(%error, %file, "failed to delete a file's bytes; will retry")
            }
        }
    }
    sqlx::query("delete from file where file_id = any($1)")
        .bind(&removed)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(removed.len() as i64)
}

async fn remove_lost_objects(scheduler: &Scheduler) -> anyhow::Result<()> {
    let Some(store) = &scheduler.files.store else { return Ok(()) };
    let abandoned = store.remove_abandoned().await?;
    let (mut chunks, mut lost) = (store.older_than(OBJECT_AGE_MIN, OBJECTS_AT_A_TIME), 0);
    while let Some(objects) = chunks.next().await {
        let objects = objects?;
        let known: Vec<Uuid> =
            sqlx::query_scalar("select distinct object_id from file where object_id = any($1)")
                .bind(&objects)
                .fetch_all(&scheduler.pool)
                .await?;
        for object in objects.into_iter().filter(|object| !known.contains(object)) {
            store.delete(object).await?;
            lost += 1;
        }
    }
    if lost + abandoned > 0 {
        tracing::warn!(
            objects = lost,
            parts = abandoned,
            "removed stored objects that no file refers to"
        );
    }
    Ok(())
}
