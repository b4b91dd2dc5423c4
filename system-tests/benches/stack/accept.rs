//! Sessions accepted.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use futures::future::try_join_all;
use rustix::process::Signal;
use serde_json::json;
use sqlx::types::Uuid;
use system_tests::Stack;
use testkit::bench::{Figure, Measured, Times};
use tokio::time::{Instant as Tick, sleep_until};

use crate::{CALLERS, LOAD, OPTIONS, database, per_second};

/// Sessions accepted while no runner takes any.
pub async fn accept() -> Result<()> {
    let stack = Stack::start(OPTIONS).await?;
    let body = json!({ "agent_id": stack.agent("shell").await?, "prompt": "true" });
    Stack::signal(&stack.pids("sprite-runner"), Signal::STOP);
    let sessions = Mutex::new(Vec::new());
    let post = async || {
        let answer = stack.post("/sessions", body.clone()).await?;
        ensure!(answer.status == 202, "{answer:?}");
        let session: Uuid = answer.text("id").parse()?;
        sessions.lock().map_err(|_| anyhow::anyhow!("a caller panicked"))?.push(session);
        Ok(())
    };
    let begun = Instant::now();
    let callers = (0..CALLERS).map(async |_| {
        while begun.elapsed() < LOAD {
            post().await?;
        }
        anyhow::Ok(())
    });
    try_join_all(callers).await?;
    let accepted = sessions.lock().map_err(|_| anyhow::anyhow!("a caller panicked"))?.clone();
    let rate = per_second(accepted.len(), begun);

    let begun = Tick::now();
    let half = (0..(rate / 2.0 * LOAD.as_secs_f64()) as usize).map(async |number| {
        let due = begun + Duration::from_secs_f64(number as f64 / (rate / 2.0));
        sleep_until(due).await;
        post().await?;
        anyhow::Ok(due.elapsed())
    });
    let half = Times::new(try_join_all(half).await?);
    let floor = inserts(&stack, &accepted).await?;
    let accepted =
        Figure::new("accept: sessions accepted, durably", Measured::rate(rate, "sessions"));
    accepted
        .beside("the same rows straight into Postgres", Measured::rate(floor, "sessions"))
        .report()?;
    Figure::new("accept: the same, at half of that rate", &half).report()
}

/// How often a caller's request is answered, with so many callers.
pub async fn rate(stack: &Stack, path: &str, body: &serde_json::Value, status: u16) -> Result<f64> {
    let begun = Instant::now();
    let callers = (0..CALLERS).map(async |_| {
        let mut count = 0;
        while begun.elapsed() < LOAD {
            let answer = stack.post(path, body.clone()).await?;
            ensure!(answer.status == status, "{answer:?}");
            count += 1;
        }
        anyhow::Ok(count)
    });
    let counts: Vec<usize> = try_join_all(callers).await?;
    Ok(per_second(counts.into_iter().sum(), begun))
}

/// The rows of sessions that were accepted, written once more.
async fn inserts(stack: &Stack, sessions: &[Uuid]) -> Result<f64> {
    let pool = database(stack).await?;
    sqlx::raw_sql(
        "create schema bench;
         create table bench.session (like scheduler.session including all);
         create table bench.turn (like scheduler.turn including all);
         create table bench.outbox (like scheduler.outbox including all)",
    )
    .execute(&pool)
    .await?;
    let begun = Instant::now();
    let callers = sessions.chunks(sessions.len().div_ceil(CALLERS)).map(async |sessions| {
        for session in sessions {
            let mut tx = pool.begin().await?;
            for insert in [
                "insert into bench.session select * from scheduler.session where session_id = $1",
                "insert into bench.turn select * from scheduler.turn where session_id = $1",
                "insert into bench.outbox (outbox_id, subject, payload) values ($1, 'aod.cmd.runner.v1.turn.run', decode(repeat('00', 300), 'hex'))",
            ] {
                sqlx::query(insert).bind(session).execute(&mut *tx).await?;
            }
            tx.commit().await?;
        }
        anyhow::Ok(())
    });
    try_join_all(callers).await?;
    Ok(per_second(sessions.len(), begun))
}
