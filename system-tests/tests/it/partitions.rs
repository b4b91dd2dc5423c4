//! EVENT_PARTITIONS: sessions are spread over several streams, and clients see no difference.

use std::{collections::BTreeMap, fs};

use futures::future::join_all;
use rustix::process::Signal;
use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};
use system_tests::{Options, Stack};

const LINES: usize = 150;
const PROMPT: &str = "for i in $(seq 150); do echo $i; sleep 0.01; done";

async fn partitions(stack: &Stack) -> BTreeMap<i16, Vec<String>> {
    let mut database = PgConnection::connect(&stack.ready_text("/database_url")).await.unwrap();
    let rows: Vec<(i16, String)> =
        sqlx::query_as("select event_partition, session_id::text from scheduler.session")
            .fetch_all(&mut database)
            .await
            .unwrap();
    let mut partitions = BTreeMap::<_, Vec<_>>::new();
    for (partition, session) in rows {
        partitions.entry(partition).or_default().push(session);
    }
    partitions
}

fn output(events: &[Value]) -> String {
    events.iter().filter_map(|event| event["data"].as_str()).collect()
}

/// A session of each of three partitions, and its events from the first to the last of its turn.
async fn one_of_each(stack: &Stack) -> Vec<String> {
    for _ in 0..200 {
        stack.session("shell", "true").await.unwrap();
        if partitions(stack).await.len() == 3 {
            break;
        }
    }
    let sessions = partitions(stack).await;
    assert_eq!(sessions.keys().copied().collect::<Vec<_>>(), [0, 1, 2]);
    let sessions =
        sessions.into_values().map(|mut sessions| sessions.remove(0)).collect::<Vec<_>>();
    let ends = join_all(
        sessions
            .iter()
            .map(async |session| stack.stream(session, 0).await.unwrap().all().await.unwrap()),
    )
    .await;
    assert!(ends.iter().all(|events| events.last().unwrap()["code"] == 0), "{ends:?}");
    sessions
}

async fn prompt(stack: &Stack, session: &str) -> u64 {
    let before = stack.stream(session, 0).await.unwrap().all().await.unwrap();
    let last = before.iter().filter_map(|event| event["id"].as_u64()).max().unwrap();
    let answer = stack
        .post(&format!("/sessions/{session}/prompt"), json!({ "prompt": PROMPT }))
        .await
        .unwrap();
    assert_eq!(answer.status, 202, "{answer:?}");
    last
}

/// A stream, also where the scheduler that was asked has just been killed: 503, and the next
/// request goes to another.
async fn follow(stack: &Stack, session: &str, since: u64) -> Vec<Value> {
    for _ in 0..5 {
        match stack.stream(session, since).await {
            Ok(events) => return events.all().await.unwrap(),
            Err(error) => assert!(error.to_string().contains("503"), "{error}"),
        }
    }
    panic!("no scheduler answers");
}

/// Every line once, live and replayed alike, with ids that grow.
async fn check(stack: &Stack, session: &str, since: u64) {
    let expected: String = (1..=LINES).map(|line| format!("{line}\n")).collect();
    let live = follow(stack, session, since).await;
    assert_eq!(output(&live), expected, "{:?}", live.last());
    assert_eq!(live.last().unwrap()["code"], 0);
    let ids: Vec<u64> = live
        .iter()
        .filter(|event| event["type"] != "turn_start")
        .filter_map(|event| event["id"].as_u64())
        .collect();
    assert!(
        ids.first().is_some_and(|id| *id > since) && ids.is_sorted_by(|a, b| a < b),
        "{since}: {ids:?}"
    );
    assert!(follow(stack, session, since).await == live, "a replay is another");
}

#[tokio::test]
async fn sessions_of_all_partitions_survive_kills_fewer_partitions_and_the_loss_of_their_streams() {
    let spread = Options {
        runners: 2,
        replicas: 2,
        settings: &[("EVENT_PARTITIONS", "3")],
        ..Options::default()
    };
    let stack = Stack::start(spread).await.unwrap();
    let sessions = one_of_each(&stack).await;

    let prompted =
        join_all(sessions.iter().map(async |session| (session, prompt(&stack, session).await)))
            .await;
    let checks = prompted.into_iter().map(|(session, since)| check(&stack, session, since));
    let kill = async {
        tokio::time::sleep(std::time::Duration::from_millis(700)).await;
        for service in ["sprite-runner", "scheduler"] {
            Stack::signal(&stack.pids(service)[..1], Signal::KILL);
        }
    };
    tokio::join!(join_all(checks), kill);

    // A reader on the bus finds each session, whichever stream it is in.
    let url: url::Url = stack.ready_text("/events_url").parse().unwrap();
    for session in &sessions {
        let mut example =
            tokio::process::Command::new(testkit::services::binary("session-events").unwrap());
        example
            .arg(session)
            .env("NATS_URL", format!("nats://{}:{}", url.host_str().unwrap(), url.port().unwrap()));
        let output = example.env("NATS_PASSWORD", url.password().unwrap()).output().await.unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    // Where there are fewer partitions now, and the streams are lost too, older sessions stay where
    // they were born.
    let born = partitions(&stack).await;
    let data = stack.stop().unwrap();
    fs::remove_dir_all(data.path().join("nats")).unwrap();
    let stack = Stack::start_in(data, Options::default()).await.unwrap();
    join_all(sessions.iter().map(async |session| {
        let since = prompt(&stack, session).await;
        check(&stack, session, since).await;
    }))
    .await;
    for _ in 0..8 {
        stack.session("shell", "true").await.unwrap();
    }
    let now = partitions(&stack).await;
    assert_eq!((&now[&1], &now[&2], now[&0].len()), (&born[&1], &born[&2], born[&0].len() + 8));

    // Nothing is left of one that is deleted.
    let last = sessions.last().unwrap();
    let deleted = stack
        .call(reqwest::Method::DELETE, &format!("/sessions/{last}/delete"), None)
        .await
        .unwrap();
    assert_eq!(deleted.status, 200, "{deleted:?}");
    let mut database = PgConnection::connect(&stack.ready_text("/database_url")).await.unwrap();
    let mut left = async || {
        let purged = "select count(*) from scheduler.deleted_session where session_id::text = $1";
        let deleted: i64 =
            sqlx::query_scalar(purged).bind(last).fetch_one(&mut database).await.unwrap();
        let events = "select count(*) from scheduler.event where session_id::text = $1";
        deleted
            + sqlx::query_scalar::<_, i64>(events)
                .bind(last)
                .fetch_one(&mut database)
                .await
                .unwrap()
    };
    let begun = std::time::Instant::now();
    while left().await > 0 {
        assert!(begun.elapsed().as_secs() < 20, "the deleted session is still there");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}
