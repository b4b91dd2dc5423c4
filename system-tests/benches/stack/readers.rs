//! Ten thousand readers of one session.

use std::{collections::BTreeSet, convert::Infallible, time::Instant};

use anyhow::{Context as _, Result, ensure};
use axum::response::sse::{Event, Sse};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use system_tests::Stack;
use testkit::bench::{Figure, Measured, Times};
use tokio::task::JoinSet;

use crate::{CALLERS, OPTIONS, client, count, per_second, resident_kb};

const READERS: usize = 10_000;
/// Two hundred lines, when all readers are there.
const CUE: &str = "/home/sprite/cue";
const ON_CUE: &str = "until [ -e /home/sprite/cue ]; do sleep 0.05; done
    perl -MTime::HiRes=sleep -e '$| = 1; for (1..200) { print \"a line that an agent has printed\\n\"; sleep 0.002 }'";

/// Readers of one session, all there before it prints, in a gateway that has seen nothing else.
pub async fn readers() -> Result<()> {
    let stack = Stack::start(OPTIONS).await?;
    let id = stack.session("shell", ON_CUE).await?;
    let mut first = stack.stream(&id, 0).await?;
    while first.next().await?.context("no start")?["stage"] != "runtime_start" {}
    let memory = resident_kb(&stack)?;
    // Each reader has a connection of its own, which ends with it.
    let http = reqwest::Client::builder().pool_max_idle_per_host(0).build()?;
    let (url, key) = (
        format!("{}/sessions/{id}/stream", stack.ready_text("/api_url")),
        stack.ready_text("/api_key"),
    );
    let opened = stream::iter(0..READERS)
        .map(|_| http.get(&url).bearer_auth(&key).send())
        .buffer_unordered(CALLERS);
    let streams = opened.try_collect::<Vec<_>>().await?;
    let grown = (resident_kb(&stack)? - memory) / READERS as f64;

    let client = client(&stack)?;
    let name = client.list("aod-").await?.pop().context("no sandbox")?.parse()?;
    let begun = Instant::now();
    let mut counting: JoinSet<_> = streams.into_iter().map(count).collect();
    client.sprite(name).write(CUE, "", 0o644).await?;
    let (mut counts, mut total) = (BTreeSet::new(), 0);
    while let Some(counted) = counting.join_next().await {
        let events = counted??;
        counts.insert(events);
        total += events;
    }
    let ours = per_second(total, begun);
    let texts: Vec<_> =
        stack.stream(&id, 0).await?.all().await?.iter().map(ToString::to_string).collect();
    ensure!(
        counts.iter().eq([&texts.len()]),
        "some readers missed events: {counts:?} of {}",
        texts.len()
    );

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/", listener.local_addr()?);
    let (cue, waiting) = tokio::sync::watch::channel(());
    let answer = async move || {
        let (texts, mut waiting) = (texts.clone(), waiting.clone());
        let events = stream::once(async move { waiting.changed().await })
            .flat_map(move |_| stream::iter(texts.clone()));
        Sse::new(events.map(|text| Ok::<_, Infallible>(Event::default().data(text))))
    };
    let router = axum::Router::new().route("/", axum::routing::get(answer));
    let mut server = JoinSet::new();
    server.spawn(axum::serve(listener, router).into_future());
    // Both ends of these are in this process: half as many, for the sake of its open files.
    let opened =
        stream::iter(0..READERS / 2).map(|_| http.get(&url).send()).buffer_unordered(CALLERS);
    let streams = opened.try_collect::<Vec<_>>().await?;
    let begun = Instant::now();
    let mut counting: JoinSet<_> = streams.into_iter().map(count).collect();
    cue.send_replace(());
    let mut total = 0;
    while let Some(counted) = counting.join_next().await {
        total += counted??;
    }
    let read = Figure::new(
        "readers: events to 10,000 readers of one session",
        Measured::rate(ours, "events"),
    );
    read.beside("axum, from memory", Measured::rate(per_second(total, begun), "events"))
        .report()?;
    Figure::new("readers: memory of the gateway for each", Measured::amount(grown, "KB"))
        .report()?;
    end(&stack).await
}

/// How long after the first reader of a session the last one learns of its end.
async fn end(stack: &Stack) -> Result<()> {
    const FOLLOWERS: usize = 200;
    let mut spreads = Vec::new();
    for _ in 0..5 {
        let id = stack.session("shell", "sleep 3").await?;
        let opened =
            stream::iter(0..FOLLOWERS).map(|_| stack.open_stream(&id, 0)).buffer_unordered(CALLERS);
        let mut reading: JoinSet<_> =
            opened.try_collect::<Vec<_>>().await?.into_iter().map(last_event).collect();
        let mut ends = Vec::new();
        while let Some(end) = reading.join_next().await {
            ends.push(end??);
        }
        let spread = ends
            .iter()
            .max()
            .zip(ends.iter().min())
            .map(|(last, first)| last.duration_since(*first));
        spreads.push(spread.context("no reader")?);
    }
    Figure::new(
        "readers: a turn's end, from the first of 200 readers to the last",
        &Times::new(spreads),
    )
    .report()
}

/// When a stream's last event came.
async fn last_event(response: reqwest::Response) -> Result<Instant> {
    let mut body = response.bytes_stream();
    let mut last = Instant::now();
    while let Some(bytes) = body.next().await {
        bytes?;
        last = Instant::now();
    }
    Ok(last)
}
