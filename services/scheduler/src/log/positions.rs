//! How far the partitions of the event log are projected.

use std::{sync::Arc, time::Duration};

use bus::RpcError;
use contract::topology;
use sqlx::{PgConnection, PgPool};
use tokio::sync::{Mutex, watch};
use types::{Partition, SessionId};

use crate::{
    Scheduler,
    sessions::row::{missing, partition},
};

/// How far this replica has projected each partition: the id of its newest event.
#[derive(Clone, Default)]
pub struct Projected(Arc<[Position; Partition::COUNT_MAX as usize]>);

#[derive(Default)]
struct Position {
    newest: watch::Sender<u64>,
    /// Held by the one of those who wait that asks Postgres, on behalf of all.
    poll: Mutex<()>,
}

/// How often Postgres is asked how far another replica has projected a partition.
const POLL: Duration = Duration::from_millis(50);

impl Projected {
    pub fn of(&self, partition: Partition) -> &watch::Sender<u64> {
        &self.0[usize::from(partition.number())].newest
    }

    /// Returns when an event of the partition is persisted, by this replica or another. However
    /// many wait, one asks Postgres.
    pub async fn wait(
        &self,
        pool: &PgPool,
        partition: Partition,
        event_id: u64,
    ) -> Result<(), sqlx::Error> {
        let Position { newest, poll } = &self.0[usize::from(partition.number())];
        let mut news = newest.subscribe();
        while *news.borrow_and_update() < event_id {
            let polled = async {
                let _polling = poll.lock().await;
                let through = projected_through(pool, partition).await?;
                newest.send_if_modified(|newest| {
                    through > std::mem::replace(newest, through.max(*newest))
                });
                if through < event_id {
                    tokio::time::sleep(POLL).await;
                }
                Ok::<_, sqlx::Error>(())
            };
            tokio::select! {
                // This replica's projector tells at once.
                _ = news.changed() => {}
                polled = polled => polled?,
            }
        }
        Ok(())
    }
}

/// Persists that a partition has sessions, for every replica to see.
pub async fn begin_partition(pool: &PgPool, partition: Partition) -> Result<(), sqlx::Error> {
    sqlx::query("insert into recorded (stream, event_id) values ($1, 0) on conflict do nothing")
        .bind(topology::events(partition).name)
        .execute(pool)
        .await?;
    Ok(())
}

/// Persists that nothing up to an event is going to be projected any more.
pub async fn pass(
    connection: &mut PgConnection,
    stream: &str,
    event_id: u64,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into recorded (stream, event_id) values ($1, $2)
         on conflict (stream) do update set event_id = greatest(recorded.event_id, excluded.event_id)",
    )
    .bind(stream)
    .bind(event_id.cast_signed())
    .execute(connection)
    .await?;
    Ok(())
}

/// The partitions in which sessions were created so far.
pub async fn partitions(pool: &PgPool) -> Result<Vec<Partition>, sqlx::Error> {
    let streams: Vec<String> =
        sqlx::query_scalar("select stream from recorded order by stream").fetch_all(pool).await?;
    Ok(streams.iter().filter_map(|stream| topology::partition_of(stream)).collect())
}

/// The id of a partition's newest persisted event.
pub async fn projected_through(pool: &PgPool, partition: Partition) -> Result<u64, sqlx::Error> {
    let stream = topology::events(partition).name;
    let through: Option<i64> =
        sqlx::query_scalar("select event_id from recorded where stream = $1")
            .bind(stream)
            .fetch_optional(pool)
            .await?;
    Ok(through.map_or(0, i64::unsigned_abs))
}

/// Waits for the projector, in this replica or another. The caller's deadline ends it.
pub async fn wait_until_projected(
    scheduler: &Scheduler,
    session: SessionId,
    event_id: u64,
) -> Result<(), RpcError> {
    let number: Option<i16> =
        sqlx::query_scalar("select event_partition from session where session_id = $1")
            .bind(session.uuid())
            .fetch_optional(&scheduler.pool)
            .await?;
    let partition = partition(number.ok_or_else(missing)?)?;
    Ok(scheduler.projected.wait(&scheduler.pool, partition, event_id).await?)
}
