//! Runners that die, and runners that are told to go.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use system_tests::{
    Options, Stack,
    faults::{self, Plan},
};

const TWO_RUNNERS: Options = Options {
    scripted_model: false,
    runners: 2,
    replicas: 1,
    nats_servers: 1,
    no_restart: false,
    settings: &[],
};
const LINES: usize = 100;

/// Runs a turn that prints numbered lines, disturbs it after the twentieth, and gives the longest
/// pause in its output.
async fn disturbed(stack: &Stack, disturb: impl AsyncFnOnce(&str)) -> Duration {
    let session = stack
        .session(
            "shell",
            &format!("for i in $(seq {LINES}); do echo line $i; sleep 0.04; done; exit 7"),
        )
        .await
        .unwrap();
    let mut events = stack.stream(&session, 0).await.unwrap();
    let mut output = events.until_output("line 20\n").await.unwrap();
    disturb(&session).await;
    let (mut last, mut longest, mut end) = (Instant::now(), Duration::ZERO, Value::Null);
    while let Some(event) = events.next().await.unwrap() {
        if let Some(data) = event["data"].as_str() {
            output.push_str(data);
            longest = longest.max(last.elapsed());
            last = Instant::now();
        }
        end = event;
    }
    let expected: String = (1..=LINES).map(|i| format!("line {i}\n")).collect();
    assert_eq!(output, expected, "every line once, in order");
    assert_eq!((&end["type"], &end["code"]), (&json!("exit"), &json!(7)));
    let replay = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let replayed: String = replay.iter().filter_map(|event| event["data"].as_str()).collect();
    assert_eq!(replayed, expected, "and the same again in a replay");
    longest
}

/// The runner that has the turn is gone for good: the other one takes over.
#[tokio::test]
async fn a_second_runner_takes_over_from_one_that_was_killed_and_no_line_is_lost_or_doubled() {
    let stack = Stack::start(Options { no_restart: true, ..TWO_RUNNERS }).await.unwrap();
    let pause = disturbed(&stack, async |session| {
        Stack::signal(&[stack.runner_of(session).await.unwrap()], Signal::KILL)
    })
    .await;
    println!("killed, taken over by the other: output paused for {pause:?}");
    assert!(pause < Duration::from_secs(30), "{pause:?}");
}

#[tokio::test]
async fn a_stopping_runner_releases_its_turns_at_once() {
    let stack = Stack::start(Options { no_restart: true, ..TWO_RUNNERS }).await.unwrap();
    let pause = disturbed(&stack, async |session| {
        Stack::signal(&[stack.runner_of(session).await.unwrap()], Signal::TERM);
        let runners = || logs_of(&stack, "sprite-runner");
        let claimed = async || runners().iter().filter(|log| log.contains(session)).count() == 2;
        testkit::eventually("the other runner has the turn", claimed).await;
        // Lines begin with their time.
        let second_claim = lines(&runners(), "turn claimed").into_iter().max();
        let first_expired =
            lines(&logs_of(&stack, "scheduler"), "runner lease expired").into_iter().min();
        assert!(
            first_expired.is_none_or(|expired| Some(expired) > second_claim),
            "the turn was not handed over, but taken"
        );
    });
    println!("stopped, handed over to the other: output paused for {:?}", pause.await);
}

/// The lines of all logs that contain a text.
fn lines(logs: &[String], with: &str) -> Vec<String> {
    let lines = logs.iter().flat_map(|log| log.lines()).filter(|line| line.contains(with));
    lines.map(str::to_owned).collect()
}

fn logs_of(stack: &Stack, service: &str) -> Vec<String> {
    let logs = std::fs::read_dir(stack.data_dir().join("logs")).unwrap().flatten();
    let of_service = logs.filter(|entry| entry.file_name().to_string_lossy().starts_with(service));
    of_service.map(|entry| std::fs::read_to_string(entry.path()).unwrap()).collect()
}

#[tokio::test]
async fn all_runners_may_die_at_once_and_are_started_again() {
    let stack = Stack::start(TWO_RUNNERS).await.unwrap();
    let runners = stack.pids("sprite-runner");
    assert_eq!(runners.len(), 2);
    let pause = disturbed(&stack, async |_| Stack::signal(&runners, Signal::KILL)).await;
    println!("all killed: output paused for {pause:?}");
    testkit::eventually("the ready file tells of the new runners", || async {
        let now = stack.pids("sprite-runner");
        now.len() == 2 && now.iter().all(|pid| !runners.contains(pid))
    })
    .await;
    let pause =
        disturbed(&stack, async |_| Stack::signal(&stack.pids("sprite-runner"), Signal::TERM))
            .await;
    println!("all restarted: output paused for {pause:?}");
}

#[tokio::test]
async fn the_other_services_may_die_while_a_turn_runs() {
    let stack = Stack::start(TWO_RUNNERS).await.unwrap();
    let pause = disturbed(&stack, async |_| {
        for service in ["scheduler", "auth", "credential-vault"] {
            Stack::signal(&stack.pids(service), Signal::KILL);
        }
    })
    .await;
    println!("scheduler, auth and vault killed: output paused for {pause:?}");
}

#[tokio::test]
async fn an_agent_in_a_sprite_that_dies_ends_its_turn_with_a_reason() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let session = stack.session("shell", "echo begun; sleep 600").await.unwrap();
    let mut events = stack.stream(&session, 0).await.unwrap();
    events.until_output("begun").await.unwrap();
    let sprites = format!("{}/v1/sprites", stack.ready_text("/sprites_url"));
    let token = stack.ready_text("/sprites_token");
    let list: Value =
        stack.http.get(&sprites).bearer_auth(&token).send().await.unwrap().json().await.unwrap();
    let name = list["sprites"][0]["name"].as_str().unwrap();
    assert_eq!(
        stack
            .http
            .delete(format!("{sprites}/{name}"))
            .bearer_auth(&token)
            .send()
            .await
            .unwrap()
            .status(),
        204
    );
    let rest = events.all().await.unwrap();
    assert_eq!(
        rest.last().unwrap()["message"],
        "The sandbox disappeared while the agent was running"
    );
}

/// A short run of `make faults`.
#[tokio::test]
async fn a_mix_of_faults_loses_doubles_and_fails_nothing() {
    let stack = faults::stack().await.unwrap();
    let plan = Plan { seed: 5, sessions: 8, seconds: 8, injections: 5 };
    let outcome = faults::attack(&stack, &faults::harmless(), "a mix", plan).await.unwrap();
    println!("{outcome}");
    assert!(outcome.is_good() && outcome.failed == 0, "{outcome}");
}

#[tokio::test]
async fn the_store_of_the_streams_may_be_lost() {
    let stack = faults::stack().await.unwrap();
    let fault = faults::named("the JetStream store lost").unwrap();
    let plan = Plan { seed: 6, sessions: 5, seconds: 6, injections: 1 };
    let outcome = faults::attack(&stack, &[fault], fault.name, plan).await.unwrap();
    println!("{outcome}");
    assert!(outcome.is_good() && outcome.failed == 0, "{outcome}");
}

/// Three servers keep three copies of each stream: one after the other is killed while a turn runs,
/// the leaders among them.
#[tokio::test]
async fn any_server_of_a_cluster_may_die() {
    let stack =
        Stack::start(Options { runners: 2, nats_servers: 3, ..Options::default() }).await.unwrap();
    for number in 0..3 {
        let pause = disturbed(&stack, async |_| {
            let servers = stack.pids("nats");
            assert_eq!(servers.len(), 3);
            Stack::signal(&servers[number..=number], Signal::KILL);
        })
        .await;
        println!("server {number} killed: output paused for {pause:?}");
        testkit::eventually("it is back", || async { stack.pids("nats").len() == 3 }).await;
        // Until it has caught up, no other may fail.
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
}

/// What left the agent's process group is the agent's all the same.
#[tokio::test]
async fn a_turn_that_times_out_is_killed_with_its_process_tree() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let stubborn = r#"setsid -f bash -c 'trap "" TERM; while :; do echo >>/home/sprite/alive; sleep 0.1; done'; echo begun; sleep 100"#;
    let agent = stack.agent("shell").await.unwrap();
    let session = stack
        .post("/sessions", json!({ "agent_id": agent, "prompt": stubborn, "timeout": 10 }))
        .await
        .unwrap();
    let events = stack.stream(session.text("id"), 0).await.unwrap().all().await.unwrap();
    assert_eq!(events.last().unwrap()["message"], "Turn timed out after 10s");
    let list = stack
        .http
        .get(format!("{}/v1/sprites", stack.ready_text("/sprites_url")))
        .bearer_auth(stack.ready_text("/sprites_token"));
    let list: Value = list.send().await.unwrap().json().await.unwrap();
    let name = list["sprites"][0]["name"].as_str().unwrap().to_owned();
    let alive = async || {
        let url = format!("{}/v1/sprites/{name}/fs/read", stack.ready_text("/sprites_url"));
        let request =
            stack.http.get(url).query(&[("path", "/home/sprite/alive"), ("workingDir", "/")]);
        request
            .bearer_auth(stack.ready_text("/sprites_token"))
            .send()
            .await
            .unwrap()
            .bytes()
            .await
            .unwrap()
            .len()
    };
    let before = alive().await;
    assert!(before > 0);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(alive().await, before, "it still runs");
}

/// A turn without a runner says what it waits for.
#[tokio::test]
async fn a_waiting_session_has_a_reason() {
    let stack = Stack::start(Options { no_restart: true, ..Options::default() }).await.unwrap();
    Stack::signal(&stack.pids("sprite-runner"), Signal::KILL);
    let session = format!("/sessions/{}", stack.session("shell", "true").await.unwrap());
    assert_eq!(stack.get(&session).await.unwrap().text("waiting_on"), "a free runner");
}

/// A sandbox that no session knows is deleted, and one of another deployment is kept.
#[tokio::test]
async fn orphaned_sandboxes_are_found_and_deleted() {
    let stack = Stack::start(Options {
        settings: &[("AOD_ORPHAN_SWEEP_SECONDS", "1")],
        ..Options::default()
    })
    .await
    .unwrap();
    let session = stack.session("shell", "true").await.unwrap();
    stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let (url, token) = (
        format!("{}/v1/sprites", stack.ready_text("/sprites_url")),
        stack.ready_text("/sprites_token"),
    );
    let names = async || {
        let list: Value =
            stack.http.get(&url).bearer_auth(&token).send().await.unwrap().json().await.unwrap();
        list["sprites"]
            .as_array()
            .unwrap()
            .iter()
            .map(|sprite| sprite["name"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let own = names().await[0].clone();
    let prefix = own.rsplit_once('-').unwrap().0.to_owned();
    let (orphan, foreign) =
        (format!("{prefix}-{}", "0".repeat(20)), format!("aod-ffffffff-{}", "0".repeat(20)));
    for name in [&orphan, &foreign] {
        let made = stack
            .http
            .post(&url)
            .bearer_auth(&token)
            .json(&json!({ "name": name }))
            .send()
            .await
            .unwrap();
        assert!(made.status().is_success(), "{}", made.status());
    }
    testkit::eventually("the orphan is gone", || async { !names().await.contains(&orphan) }).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let mut left = names().await;
    left.sort();
    let mut expected = [own, foreign];
    expected.sort();
    assert_eq!(left, expected);
    assert_eq!(
        stack
            .post(&format!("/sessions/{session}/prompt"), json!({ "prompt": "true" }))
            .await
            .unwrap()
            .status,
        202
    );
}

/// Postgres is away, and the stream that waits for it is full: the runner waits too. What is
/// recorded makes room for what comes.
#[tokio::test]
async fn a_full_stream_of_events_makes_runners_wait_and_loses_nothing() {
    let settings = &[("AOD_EVENTS_MAX_BYTES", "1048576")];
    let stack = Stack::start(Options { settings, ..Options::default() }).await.unwrap();
    let quiet = stack
        .session(
            "shell",
            "echo first; until [ -e /home/sprite/go ]; do sleep 0.2; done; echo second",
        )
        .await
        .unwrap();
    let mut quiet_events = stack.stream(&quiet, 0).await.unwrap();
    quiet_events.until_output("first\n").await.unwrap();
    let loud = stack
        .session("shell", "for i in $(seq 30); do seq 1 20000; sleep 0.1; done")
        .await
        .unwrap();
    let mut loud_events = stack.stream(&loud, 0).await.unwrap();
    let begun = loud_events.until_output("1\n").await.unwrap();

    Stack::signal(&stack.pids("postgres"), Signal::STOP);
    let runner_log =
        || std::fs::read_to_string(stack.data_dir().join("logs/sprite-runner-1.log")).unwrap();
    testkit::eventually("the stream is full", || async {
        runner_log().contains("maximum bytes exceeded")
    })
    .await;
    Stack::signal(&stack.pids("postgres"), Signal::CONT);

    let once: String = (1..=20000).map(|i| format!("{i}\n")).collect();
    let expected = once.repeat(30);
    let text = |events: &[Value]| {
        events.iter().filter_map(|event| event["data"].as_str()).collect::<String>()
    };
    let rest = loud_events.all().await.unwrap();
    assert!(begun + &text(&rest) == expected, "what was streamed is what was printed");
    assert_eq!(rest.last().unwrap()["code"], 0);
    let replay = stack.stream(&loud, 0).await.unwrap().all().await.unwrap();
    assert!(text(&replay) == expected, "and so is what is replayed");

    // Meanwhile nothing of the quiet session is left in the stream: its runner and its reader find
    // their way from the record.
    let sprites = format!("{}/v1/sprites", stack.ready_text("/sprites_url"));
    let token = stack.ready_text("/sprites_token");
    let list: Value =
        stack.http.get(&sprites).bearer_auth(&token).send().await.unwrap().json().await.unwrap();
    for sprite in list["sprites"].as_array().unwrap() {
        let url = format!("{sprites}/{}/fs/write", sprite["name"].as_str().unwrap());
        let request = stack
            .http
            .put(url)
            .query(&[("path", "/home/sprite/go"), ("workingDir", "/")])
            .bearer_auth(&token);
        assert!(request.body("").send().await.unwrap().status().is_success());
    }
    let rest = quiet_events.all().await.unwrap();
    assert_eq!(text(&rest), "second\n");
    assert_eq!(rest.last().unwrap()["code"], 0);
}

/// What a gateway follows is trimmed before it comes to it: it sees that something is missing, and
/// reads the record.
#[tokio::test]
async fn a_gateway_that_was_asleep_shows_what_was_trimmed_meanwhile() {
    let settings = &[("AOD_EVENTS_MAX_BYTES", "1048576")];
    let stack = Stack::start(Options { settings, ..Options::default() }).await.unwrap();
    let session = stack
        .session(
            "shell",
            "perl -e '$|=1; for (1..6000) { print \"$_\\n\"; select undef, undef, undef, 0.001 }'",
        )
        .await
        .unwrap();
    let mut events = stack.stream(&session, 0).await.unwrap();
    let mut output = events.until_output("1\n").await.unwrap();
    let gateway = stack.pids("gateway");
    Stack::signal(&gateway, Signal::STOP);
    tokio::time::sleep(Duration::from_secs(5)).await;
    Stack::signal(&gateway, Signal::CONT);
    while let Some(event) = events.next().await.unwrap() {
        output.push_str(event["data"].as_str().unwrap_or_default());
    }
    let expected: String = (1..=6000).map(|i| format!("{i}\n")).collect();
    assert!(output == expected, "{} bytes of {}", output.len(), expected.len());
}
