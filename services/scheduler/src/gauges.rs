//! Gauges of how far behind the queues, the outbox and the projector are.

use std::time::Duration;

use contract::topology;
use sqlx::Row as _;
use tokio_util::sync::CancellationToken;

use crate::{Scheduler, log::positions};

const EVERY: Duration = Duration::from_secs(5);

pub async fn run(scheduler: Scheduler, stop: CancellationToken) {
    service::periodically("gauges", EVERY, stop, || measure(&scheduler)).await;
}

async fn measure(scheduler: &Scheduler) -> anyhow::Result<()> {
    let row = sqlx::query(
        "select count(*) filter (where status = 'pending'),
                coalesce(extract(epoch from now() - min(created_at) filter (where status = 'pending')), 0)::float8,
                count(*) filter (where status = 'running'),
                (select count(*) from outbox),
                (select coalesce(extract(epoch from now() - min(created_at)), 0)::float8 from outbox),
                (select count(*) from deleted_session),
                (select count(*) from outbox_dead)
         from turn
         where status in ('pending', 'running')",
    )
    .fetch_one(&scheduler.pool)
    .await?;
    metrics::gauge!("aod_turns_pending").set(row.try_get::<i64, _>(0)? as f64);
    metrics::gauge!("aod_oldest_pending_turn_seconds").set(row.try_get::<f64, _>(1)?);
    metrics::gauge!("aod_turns_running").set(row.try_get::<i64, _>(2)? as f64);
    metrics::gauge!("aod_outbox_messages").set(row.try_get::<i64, _>(3)? as f64);
    metrics::gauge!("aod_oldest_outbox_message_seconds").set(row.try_get::<f64, _>(4)?);
    metrics::gauge!("aod_deleted_sessions_to_purge").set(row.try_get::<i64, _>(5)? as f64);
    metrics::gauge!("aod_outbox_dead_messages").set(row.try_get::<i64, _>(6)? as f64);
    let spares = sqlx::query(
        "select state, count(spare.state)
         from unnest(array['offered', 'preparing', 'ready', 'failed']) as state left join spare using (state) group by state",
    );
    for row in spares.fetch_all(&scheduler.pool).await? {
        let state: String = row.try_get(0)?;
        metrics::gauge!("aod_spares", "state" => state).set(row.try_get::<i64, _>(1)? as f64);
    }
    let mut lag = 0;
    for spec in topology::streams(positions::partitions(&scheduler.pool).await?) {
        let info = scheduler.bus.stream_info(&spec).await?;
        if let Some(partition) = topology::partition_of(spec.name) {
            lag += info
                .last_sequence
                .saturating_sub(positions::projected_through(&scheduler.pool, partition).await?);
        }
        metrics::gauge!("aod_stream_bytes", "stream" => spec.name).set(info.bytes as f64);
        metrics::gauge!("aod_stream_bytes_max", "stream" => spec.name).set(info.bytes_max as f64);
        if spec.name == topology::DLQ.name {
            metrics::gauge!("aod_dead_letters").set(info.messages as f64);
        }
    }
    metrics::gauge!("aod_recorder_lag_events").set(lag as f64);
    let backlog = scheduler.bus.backlog(&topology::RUNNER).await?;
    metrics::gauge!("aod_jobs_waiting").set(backlog.waiting as f64);
    metrics::gauge!("aod_jobs_in_hand").set(backlog.in_flight as f64);
    Ok(())
}
