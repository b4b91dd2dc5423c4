//! What the model gateway adds to a provider's responses, beside direct calls of the same run:
//! `make bench ARGS=model-gateway`.
//!
//! Postgres, NATS, the scheduler, the provider and this load share the machine: read the ratios.

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::time::{Duration, Instant};

use futures::{StreamExt as _, future::join_all};
use testkit::bench::{Figure, Measured, Times};

#[path = "../tests/it/world.rs"]
#[expect(dead_code, reason = "the tests use the rest")]
mod world;

use world::{Mood, World};

const REQUESTS: usize = 500;
/// An agent does something between two requests: the end of one is recorded when the next begins.
const PAUSE: Duration = Duration::from_millis(5);
const ANSWER_BYTES: usize = 4_000;
const BULK_BYTES: usize = 50_000_000;
const SESSIONS: usize = 200;
/// Fewer than a session sends that does any work, but so many that most find its token known.
const REQUESTS_OF_EACH: usize = 20;

#[tokio::main]
async fn main() {
    let wanted = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    if !"model-gateway".contains(&wanted) {
        return;
    }
    let world = World::start().await;
    let (_gateway, through) = world.model_gateway().await;
    let direct = format!("{}/v1/messages", world.upstream);
    let token = world.token().await;
    latency(&world, &direct, &through, &token).await;
    bulk(&world, &direct, &through, &token).await;
    crowd(&world, &direct, &through).await;
}

/// Sends a request over a connection that is open, and reads the response to its end.
async fn ask(world: &World, http: &reqwest::Client, url: &str, token: &str) -> usize {
    // The provider takes the user's key alone.
    let shown = if url.starts_with(&world.upstream) { world::KEY } else { token };
    let body = world::body(token);
    let response = http.post(url).header("x-api-key", shown).body(body).send().await.unwrap();
    assert_eq!(response.status(), 200);
    let mut chunks = response.bytes_stream();
    let mut bytes = 0;
    while let Some(chunk) = chunks.next().await {
        bytes += chunk.unwrap().len();
    }
    bytes
}

/// Of requests one after the other, each so long after the end of the one before.
async fn times(world: &World, url: &str, token: &str, pause: Duration) -> Times {
    let http = client();
    for _ in 0..20 {
        ask(world, &http, url, token).await;
    }
    let mut times = Vec::new();
    for _ in 0..REQUESTS {
        tokio::time::sleep(pause).await;
        let begun = Instant::now();
        ask(world, &http, url, token).await;
        times.push(begun.elapsed());
    }
    Times::new(times)
}

fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().tcp_nodelay(true).build().unwrap()
}

async fn latency(world: &World, direct: &str, through: &str, token: &str) {
    world.provider.is(Mood::Streams(ANSWER_BYTES));
    let floor = times(world, direct, token, Duration::ZERO).await;
    let metered = times(world, through, token, Duration::ZERO).await;
    Figure::new("model-gateway: a request", &metered).beside("direct", &floor).report().unwrap();
    let paused_floor = times(world, direct, token, PAUSE).await;
    let paused = times(world, through, token, PAUSE).await;
    Figure::new("model-gateway: a request, 5 ms after the one before", &paused)
        .beside("direct", &paused_floor)
        .report()
        .unwrap();
    // What counts tokens is passed on without metering.
    let unmetered = times(world, &format!("{through}/count_tokens"), token, Duration::ZERO).await;
    Figure::new("model-gateway: a request without metering", &unmetered)
        .beside("direct", &floor)
        .report()
        .unwrap();
}

async fn bulk(world: &World, direct: &str, through: &str, token: &str) {
    world.provider.is(Mood::Streams(BULK_BYTES));
    let http = client();
    let rate = async |url: &str| {
        let begun = Instant::now();
        let bytes = ask(world, &http, url, token).await;
        bytes as f64 / 1e6 / begun.elapsed().as_secs_f64()
    };
    let floor = rate(direct).await;
    let ours = Measured::rate(rate(through).await, "MB");
    Figure::new("model-gateway: one streamed answer of 50 MB", ours)
        .beside("direct", Measured::rate(floor, "MB"))
        .report()
        .unwrap();
}

async fn crowd(world: &World, direct: &str, through: &str) {
    world.provider.is(Mood::Streams(ANSWER_BYTES));
    let mut tokens = Vec::new();
    for _ in 0..SESSIONS {
        tokens.push(world.token().await);
    }
    let rate = async |url: &str| {
        // Before the clock runs: making one takes longer than all of its requests.
        let clients: Vec<_> = tokens.iter().map(|_| client()).collect();
        let begun = Instant::now();
        let of_session = async |(token, http): (&String, &reqwest::Client)| {
            let mut slowest = Duration::ZERO;
            for _ in 0..REQUESTS_OF_EACH {
                let begun = Instant::now();
                ask(world, http, url, token).await;
                slowest = slowest.max(begun.elapsed());
            }
            slowest
        };
        let of_all = tokens.iter().zip(&clients).map(of_session);
        let slowest = join_all(of_all).await.into_iter().max().unwrap_or_default();
        ((SESSIONS * REQUESTS_OF_EACH) as f64 / begun.elapsed().as_secs_f64(), slowest)
    };
    let (floor, _) = rate(direct).await;
    let (ours, slowest) = rate(through).await;
    let (unmetered, _) = rate(&format!("{through}/count_tokens")).await;
    Figure::new(
        "model-gateway: requests of 200 sessions at once, without metering",
        Measured::rate(unmetered, "requests"),
    )
    .beside("direct", Measured::rate(floor, "requests"))
    .report()
    .unwrap();
    let crowd = Figure::new(
        "model-gateway: requests of 200 sessions at once",
        Measured::rate(ours, "requests"),
    );
    crowd.beside("direct", Measured::rate(floor, "requests")).report().unwrap();
    let slowest = Measured::amount(slowest.as_secs_f64() * 1e3, "ms");
    Figure::new("model-gateway: the slowest of them", slowest).report().unwrap();
}
