//! A session with a million events.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use futures::StreamExt as _;
use serde_json::json;
use system_tests::Stack;
use testkit::bench::{Figure, Measured, Times};

use crate::{count_events, database, per_second};

const EVENTS: usize = 1_000_000;

/// A session with a million events, from the first and from the last but one. It ends with a
/// termination: for a turn's end the stream waits until the recorder has come to its id, which it
/// never does to one that is made up.
pub async fn replay(stack: &Stack) -> Result<()> {
    let id = stack.session("shell", "echo a line that an agent has printed").await?;
    stack.stream(&id, 0).await?.all().await?;
    let terminated = stack.post(&format!("/sessions/{id}/terminate"), json!({})).await?;
    ensure!(terminated.status == 200, "{terminated:?}");
    let events = stack.stream(&id, 0).await?.all().await?;
    let output = events
        .iter()
        .find(|event| event["type"] == "output")
        .and_then(|event| event["id"].as_i64())
        .context("no output")?;
    let end = events.last().and_then(|event| event["id"].as_i64()).context("no end")?;
    let pool = database(stack).await?;
    // The recorder may be a moment behind the stream.
    testkit::eventually("the session is persisted", async || {
        let count = sqlx::query_scalar::<_, i64>(
            "select count(*) from scheduler.event where event_id = $1",
        )
        .bind(end);
        count.fetch_one(&pool).await.is_ok_and(|count| count == 1)
    })
    .await;
    let last = end + i64::try_from(EVENTS)?;
    let mut tx = pool.begin().await?;
    sqlx::query("update scheduler.event set event_id = $1 where event_id = $2")
        .bind(last)
        .bind(end)
        .execute(&mut *tx)
        .await?;
    sqlx::query(
        "insert into scheduler.event (session_id, event_id, payload)
         select session_id, number, payload from scheduler.event, generate_series($1::bigint, $2::bigint - 1) as number where event_id = $3",
    )
    .bind(end)
    .bind(last)
    .bind(output)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    sqlx::query("analyze scheduler.event").execute(&pool).await?;

    let begun = Instant::now();
    let count = count_events(stack, &id, 0).await?;
    let ours = per_second(count, begun);
    ensure!(count == EVENTS + events.len(), "{count} events");
    let begun = Instant::now();
    let mut connection = pool.acquire().await?;
    let copy = format!(
        "copy (select event_id, payload from scheduler.event where session_id = '{id}' order by event_id) to stdout (format binary)"
    );
    let mut copied = connection.copy_out_raw(&copy).await?;
    while let Some(data) = copied.next().await {
        data?;
    }
    let replayed = Figure::new("replay: a million events", Measured::rate(ours, "events"));
    replayed
        .beside(
            "COPY of the rows out of Postgres",
            Measured::rate(per_second(count, begun), "events"),
        )
        .report()?;
    let resume = Times::of(100, async || {
        // The stream's start and the last.
        ensure!(count_events(stack, &id, u64::try_from(last - 1)?).await? == 2);
        Ok(())
    });
    Figure::new("replay: resuming at the end of them", &resume.await?).report()
}
