//! What the model gateway does where parts of it die, and what it makes of refusals.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use contract::{auth::SetUserActiveRequest, rpc};
use futures::{StreamExt as _, future::join_all};

#[path = "it/world.rs"]
#[expect(dead_code, reason = "the bench uses the rest")]
mod world;

use world::{Mood, SOON, World, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn twenty_sessions_keep_one_budget_while_gateways_are_killed() {
    const SESSIONS: usize = 20;
    const MAX: u64 = 8_000;
    const KILLS: usize = 5;
    let world = World::start().await;
    world.limit(MAX).await;
    let tokens = join_all((0..SESSIONS).map(|_| world.token())).await;
    let gateways = [world.model_gateway().await, world.model_gateway().await];
    let (mut processes, urls): (Vec<_>, Vec<_>) = gateways.into_iter().unzip();
    let urls = Mutex::new(urls);
    let (broken, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
    let run = async |index: usize, token: &str| {
        for attempt in 0.. {
            let url = {
                let urls = urls.lock().unwrap();
                urls[(index + attempt) % urls.len()].clone()
            };
            match world.send(&url, token).await {
                Ok((200, text)) if text.contains("message_stop") => {}
                Ok((400, text)) if text.contains("Budget reached") => return,
                // What is left is reserved, or the gateway waits for the scheduler: a CLI asks
                // again.
                Ok((429 | 503, _)) => tokio::time::sleep(Duration::from_millis(200)).await,
                Ok((status, text)) => panic!("{status}: {text}"),
                Err(_) => {
                    broken.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    };
    let kill = async {
        let mut kills = 0;
        while !is_over.load(Ordering::Relaxed) {
            // Some have come through since the last one, so that there are requests and responses
            // under way.
            let before = world.provider.requests();
            while kills < KILLS
                && world.provider.requests() < before + 8
                && !is_over.load(Ordering::Relaxed)
            {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            if kills < KILLS {
                // SIGKILL.
                drop(processes.remove(0));
                let (process, url) = world.model_gateway().await;
                processes.push(process);
                let mut urls = urls.lock().unwrap();
                urls.remove(0);
                urls.push(url);
                kills += 1;
            }
            world.forward_lost_gateways().await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let runs = async {
        join_all(tokens.iter().enumerate().map(|(index, token)| run(index, token))).await;
        is_over.store(true, Ordering::Relaxed);
    };
    tokio::join!(runs, kill);
    // Never more than one request each past the cap, by the provider's own count.
    let seen = world.provider.seen.lock().unwrap().clone();
    for token in &tokens {
        let beyond =
            seen.iter().filter(|(sender, before)| sender == token && *before >= MAX).count();
        assert!(beyond <= 1, "{beyond} requests past the cap");
    }
    assert!(broken.into_inner() > 0, "no request was broken by a killed gateway");
    eventually("every request is settled or unknown", || async {
        world.forward_lost_gateways().await;
        world.numbers("select count(*) from scheduler.model_request where status = 'open'").await
            == [0]
    })
    .await;
    // Nothing is billed twice, and nothing is invented: what was counted is what responses said,
    // each at most once.
    let counted = "select output_tokens from scheduler.model_request where status = 'settled' and output_tokens > 0 order by 1";
    let counted = world.numbers(counted).await;
    assert!(counted.array_windows().all(|[one, other]| one < other), "{counted:?}");
    assert!(
        counted.iter().all(|tokens| (1..=world.provider.requests().cast_signed()).contains(tokens))
    );
    let total: i64 = counted.iter().sum();
    assert_eq!(
        world
            .numbers("select coalesce(sum(output_tokens), 0)::bigint from scheduler.turn_usage")
            .await,
        [total]
    );
    let invented = "select count(*) from scheduler.model_request where status = 'unknown' and output_tokens is not null";
    assert_eq!(world.numbers(invented).await, [0]);
    // A request of unknown usage counts as its estimate, so the budget covers everything that was
    // spent.
    let budget = world.operator.call::<rpc::GetBudget>(&world.budget(), SOON).await.unwrap();
    let (used, spent) =
        (budget.used.unwrap().tokens.unwrap(), world.provider.spent.load(Ordering::SeqCst));
    assert!(used >= spent && used >= MAX, "{used} counted of {spent}");
    // Raised, it is one budget again.
    world.limit(used + MAX).await;
    let urls = urls.into_inner().unwrap();
    let send = async |(index, token): (usize, &String)| {
        let (status, text) = world.send(&urls[index % urls.len()], token).await.unwrap();
        assert!(status == 200 && text.contains("message_stop"), "{status}: {text}");
    };
    join_all(tokens.iter().enumerate().map(send)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_killed_in_mid_stream_breaks_the_response_and_the_repeated_request_counts_once() {
    let world = World::start().await;
    let token = world.token().await;
    let (first, url) = world.model_gateway().await;
    world.provider.is(Mood::Hangs);
    let response = world.ask(&url, &token).send().await.unwrap();
    assert_eq!(response.status(), 200);
    let mut body = response.bytes_stream();
    assert!(body.next().await.unwrap().unwrap().starts_with(b"event"));
    drop(first);
    assert!(
        body.any(|chunk| async move { chunk.is_err() }).await,
        "a broken response has to look broken"
    );
    world.provider.is(Mood::Answers);
    let (_second, url) = world.model_gateway().await;
    let (status, text) = world.send(&url, &token).await.unwrap();
    assert!(status == 200 && text.contains("message_stop"), "{status}: {text}");
    eventually("the broken one is unknown and the other one settled", || async {
        world.forward_lost_gateways().await;
        world.numbers("select coalesce(output_tokens, -1) from scheduler.model_request where status <> 'open' order by 1").await == [-1, 2]
    })
    .await;
    assert_eq!(world.numbers("select output_tokens from scheduler.turn_usage").await, [2]);
    assert_eq!(world.numbers("select unknown from scheduler.turn_usage").await, [1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_that_pass_are_retried_and_those_that_stay_end_the_cli_at_once() {
    let world = World::start().await;
    let token = world.token().await;
    let (_gateway, url) = world.model_gateway().await;
    for status in [429, 503, 529] {
        world.provider.is(Mood::RefusesOnce(status));
        assert_eq!(world.send(&url, &token).await.unwrap().0, 200, "after {status}");
    }
    eventually("each counts once", || async {
        world.numbers("select output_tokens from scheduler.model_request where status = 'settled' order by 1").await == [2, 4, 6]
    })
    .await;
    for status in [401, 403] {
        world.provider.is(Mood::Refuses(status));
        let refused = world.ask(&url, &token).send().await.unwrap();
        let header = |name: &str| {
            refused
                .headers()
                .get(name)
                .and_then(|value| value.to_str().ok())
                .unwrap_or_default()
                .to_owned()
        };
        let told =
            (refused.status().as_u16(), header("x-upstream-status"), header("x-should-retry"));
        assert_eq!(told, (400, status.to_string(), "false".to_owned()));
        assert!(refused.text().await.unwrap().contains("so says the provider"));
    }
    world.provider.is(Mood::Answers);
    let stored = world
        .ask(&url, &token)
        .body(r#"{"model":"claude-x","container":"c","messages":[]}"#)
        .send()
        .await
        .unwrap();
    assert_eq!(
        (stored.status().as_u16(), world.provider.requests()),
        (400, 8),
        "it was not passed on"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tokens_of_a_disabled_user_are_refused_until_the_user_is_enabled_again() {
    let world = World::start().await;
    let token = world.token().await;
    let set_active = async |is_active| {
        let request = SetUserActiveRequest { user_id: world.user.clone(), is_active };
        world.operator.call::<rpc::SetUserActive>(&request, SOON).await.unwrap();
    };
    set_active(false).await;
    let (_gateway, url) = world.model_gateway().await;
    assert_eq!(world.send(&url, &token).await.unwrap().0, 401);
    assert_eq!(world.provider.requests(), 0);
    set_active(true).await;
    eventually("it is good again", || async { world.send(&url, &token).await.unwrap().0 == 200 })
        .await;
}
