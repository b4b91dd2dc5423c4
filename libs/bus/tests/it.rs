//! The bus library against a real nats-server.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_nats::jetstream::consumer::{AckPolicy, push};
use bus::{
    RpcError,
    log::AppendError,
    responder::Responder,
    work::{self, Outcome},
};
use contract::{access, auth, rpc, subject, topology, vault};
use futures::{FutureExt as _, StreamExt as _};
use secrecy::ExposeSecret as _;
use testkit::{Nats, eventually};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use types::{ErrorCode, Partition, SessionId};

const SOON: Duration = Duration::from_secs(15);

#[tokio::test]
async fn a_failure_arrives_as_it_was_meant() {
    let nats = Nats::start().unwrap();
    let (server, client) =
        (nats.connect(&access::AUTH).await.unwrap(), nats.connect(&access::GATEWAY).await.unwrap());
    let responder =
        Responder::new(&server, "auth", (), TaskTracker::new(), CancellationToken::new());
    let fail = |(), _: auth::VerifyKeyRequest| async {
        Err(RpcError::new(ErrorCode::Unauthenticated, "Invalid API key").with_number("n", 1))
    };
    responder.serve::<rpc::VerifyKey, _, _>(fail).await.unwrap();
    let failure =
        client.call::<rpc::VerifyKey>(&auth::VerifyKeyRequest::default(), SOON).await.unwrap_err();
    assert_eq!(
        failure,
        RpcError::new(ErrorCode::Unauthenticated, "Invalid API key").with_number("n", 1)
    );
}

#[tokio::test]
async fn a_missing_responder_is_reported_at_once_and_a_slow_one_by_its_deadline() {
    let nats = Nats::start().unwrap();
    let (server, client) =
        (nats.connect(&access::AUTH).await.unwrap(), nats.connect(&access::GATEWAY).await.unwrap());
    let begun = std::time::Instant::now();
    let failure =
        client.call::<rpc::VerifyKey>(&auth::VerifyKeyRequest::default(), SOON).await.unwrap_err();
    assert_eq!(failure.code, ErrorCode::Unavailable);
    assert!(begun.elapsed() < Duration::from_secs(1));
    let responder =
        Responder::new(&server, "auth", (), TaskTracker::new(), CancellationToken::new());
    let hang = |(), _: auth::VerifyKeyRequest| async { std::future::pending().await };
    responder.serve::<rpc::VerifyKey, _, _>(hang).await.unwrap();
    let failure = client
        .call::<rpc::VerifyKey>(&auth::VerifyKeyRequest::default(), Duration::from_millis(300))
        .await
        .unwrap_err();
    assert_eq!(failure.code, ErrorCode::DeadlineExceeded);
}

#[tokio::test]
async fn an_answer_larger_than_a_message_is_an_error_at_once() {
    let nats = Nats::start().unwrap();
    let (server, client) =
        (nats.connect(&access::AUTH).await.unwrap(), nats.connect(&access::GATEWAY).await.unwrap());
    let responder =
        Responder::new(&server, "auth", (), TaskTracker::new(), CancellationToken::new());
    let huge = |(), _: auth::VerifyKeyRequest| async {
        Ok(auth::VerifyKeyReply {
            user_id: "x".repeat(9 * 1024 * 1024),
            ..auth::VerifyKeyReply::default()
        })
    };
    responder.serve::<rpc::VerifyKey, _, _>(huge).await.unwrap();
    let begun = std::time::Instant::now();
    let failure = client
        .call::<rpc::VerifyKey>(&auth::VerifyKeyRequest::default(), SOON * 4)
        .await
        .unwrap_err();
    assert_eq!(failure.code, ErrorCode::Internal);
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_request_that_died_with_its_service_is_sent_again_where_that_is_safe() {
    let nats = Nats::start().unwrap();
    let (server, client) = (
        nats.connect(&access::AUTH).await.unwrap(),
        nats.connect(&access::OPERATOR).await.unwrap(),
    );
    let calls = Arc::new(AtomicUsize::new(0));
    let responder = Responder::new(
        &server,
        "auth",
        calls.clone(),
        TaskTracker::new(),
        CancellationToken::new(),
    );
    let first_is_lost = |calls: Arc<AtomicUsize>| async move {
        if calls.fetch_add(1, Ordering::SeqCst) == 0 {
            std::future::pending::<()>().await;
        }
    };
    let found = move |calls, _: auth::FindUserRequest| async move {
        first_is_lost(calls).await;
        Ok(auth::User::default())
    };
    let created = move |calls, _: auth::CreateUserRequest| async move {
        first_is_lost(calls).await;
        Ok(auth::User::default())
    };
    responder.serve::<rpc::FindUser, _, _>(found).await.unwrap();
    responder.serve::<rpc::CreateUser, _, _>(created).await.unwrap();
    let begun = std::time::Instant::now();
    assert!(
        client
            .call::<rpc::FindUser>(&auth::FindUserRequest::default(), Duration::from_secs(3))
            .await
            .is_ok()
    );
    assert!(begun.elapsed() < Duration::from_secs(2));
    assert_eq!(calls.swap(0, Ordering::SeqCst), 2);
    let failure = client
        .call::<rpc::CreateUser>(&auth::CreateUserRequest::default(), Duration::from_secs(1))
        .await
        .unwrap_err();
    assert_eq!((failure.code, calls.load(Ordering::SeqCst)), (ErrorCode::DeadlineExceeded, 1));
}

#[tokio::test]
async fn the_server_refuses_what_a_user_may_not_do() {
    let nats = Nats::start().unwrap();
    let gateway = nats.connect(&access::GATEWAY).await.unwrap();
    // Served by no one, so that a call which got through would fail at once, and not by its
    // deadline.
    let failure = gateway
        .call::<rpc::RedeemLease>(&vault::RedeemLeaseRequest::default(), Duration::from_millis(500))
        .await
        .unwrap_err();
    assert_eq!(failure.code, ErrorCode::DeadlineExceeded);
}

#[tokio::test]
async fn a_log_has_one_writer() {
    let nats = Nats::start().unwrap();
    nats.with_streams().await.unwrap();
    let runner = nats.connect(&access::RUNNER).await.unwrap();
    let log = subject::session_log(SessionId::new(), Partition::FIRST);
    let first = runner.append(log.clone(), "one".into(), 0).await.unwrap();
    let repeated = runner.append(log.clone(), "one".into(), 0).await;
    assert!(
        matches!(repeated, Err(AppendError::Superseded)),
        "the expectation is looked at first: {repeated:?}"
    );
    assert!(matches!(
        runner.append(log.clone(), "two".into(), 0).await,
        Err(AppendError::Superseded)
    ));
    let second = runner.append(log.clone(), "two".into(), first).await.unwrap();
    let last = runner.last(topology::EVENTS.name, &log).await.unwrap().unwrap();
    assert_eq!((last.sequence, last.payload.as_ref()), (second, b"two".as_slice()));
    assert!(
        runner
            .last(topology::EVENTS.name, &subject::session_log(SessionId::new(), Partition::FIRST))
            .await
            .unwrap()
            .is_none()
    );
}

#[tokio::test]
async fn following_continues_after_the_server_was_killed() {
    let mut nats = Nats::start().unwrap();
    nats.with_streams().await.unwrap();
    let (runner, projector) = (
        nats.connect(&access::RUNNER).await.unwrap(),
        nats.connect(&access::SCHEDULER).await.unwrap(),
    );
    let log = subject::session_log(SessionId::new(), Partition::FIRST);
    let first = runner.publish(log.clone(), "1".into(), "1").await.unwrap();
    let mut entries = projector.follow(topology::EVENTS.name, log.clone(), first).await.unwrap();
    assert_eq!(entries.next().await.unwrap().unwrap().payload, "1");
    nats.restart().unwrap();
    let mut appended = false;
    for _ in 0..100 {
        if runner.publish(log.clone(), "2".into(), "2").await.is_ok() {
            appended = true;
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(appended);
    // The consumer may have ended with an error: then it is followed again from there.
    let next = tokio::time::timeout(Duration::from_secs(15), entries.next()).await;
    let entry = match next {
        Ok(Some(Ok(entry))) => entry,
        _ => projector
            .follow(topology::EVENTS.name, log, first + 1)
            .await
            .unwrap()
            .next()
            .await
            .unwrap()
            .unwrap(),
    };
    assert_eq!(entry.payload, "2");
}

#[tokio::test]
async fn a_job_handed_back_comes_again_and_one_done_does_not() {
    let nats = Nats::start().unwrap();
    let scheduler = nats.with_streams().await.unwrap();
    let runner = nats.connect(&access::RUNNER).await.unwrap();
    let (stop, seen) = (CancellationToken::new(), Arc::new(AtomicUsize::new(0)));
    let counter = seen.clone();
    let handler = move |job: work::Job| {
        let counter = counter.clone();
        async move {
            counter.fetch_add(1, Ordering::SeqCst);
            match job.delivery {
                1 => Outcome::Retry(Duration::ZERO),
                // Longer than the lease: progress acks keep it.
                2 => {
                    tokio::time::sleep(types::limits::JOB_LEASE * 2).await;
                    Outcome::Done
                }
                _ => Outcome::Reject("delivered too often".to_owned()),
            }
        }
    };
    let tasks = TaskTracker::new();
    tasks.spawn(work::run(runner, &topology::RUNNER, 4, stop.clone(), handler));
    scheduler.publish(subject::turn_run(SessionId::new()), "job".into(), "job-1").await.unwrap();
    eventually("two deliveries", || async { seen.load(Ordering::SeqCst) == 2 }).await;
    tokio::time::sleep(types::limits::JOB_LEASE * 3).await;
    assert_eq!(seen.load(Ordering::SeqCst), 2);
    stop.cancel();
    tasks.close();
    tasks.wait().await;
}

#[tokio::test]
async fn a_live_subscription_carries_each_entrys_sequence_and_the_one_before_it() {
    let mut nats = Nats::start().unwrap();
    nats.create_streams([Partition::FIRST, Partition::new(3).unwrap()]).await.unwrap();
    let (runner, gateway) = (
        nats.connect(&access::RUNNER).await.unwrap(),
        nats.connect(&access::GATEWAY).await.unwrap(),
    );
    for partition in [Partition::new(3).unwrap(), Partition::FIRST] {
        let session = SessionId::new();
        let log = subject::session_log(session, partition);
        let first = runner.append(log.clone(), "1".into(), 0).await.unwrap();
        let mut live = gateway.live(session, partition).await.unwrap();
        // Also orders the subscription before what is appended next.
        assert_eq!(
            gateway.last(topology::events(partition).name, &log).await.unwrap().unwrap().sequence,
            first
        );
        runner
            .append(subject::session_log(SessionId::new(), partition), "x".into(), 0)
            .await
            .unwrap();
        let second = runner.append(log.clone(), "2".into(), first).await.unwrap();
        let entry = live.next().await.unwrap();
        assert_eq!(
            (entry.sequence, entry.previous, entry.payload.as_ref()),
            (second, first, b"2".as_slice())
        );
        if partition != Partition::FIRST {
            continue;
        }
        nats.restart().unwrap();
        assert_eq!(live.next().await.unwrap_err(), bus::live::Interrupted);
        // Each connection notices the restart by itself.
        for bus in [&gateway, &runner] {
            eventually("the stream is back", || async {
                bus.last(topology::EVENTS.name, &log).await.is_ok()
            })
            .await;
        }
        let third = runner.append(log.clone(), "3".into(), second).await.unwrap();
        let entry = live.next().await.unwrap();
        assert_eq!((entry.sequence, entry.previous), (third, second));
    }
}

#[tokio::test]
async fn a_stream_of_an_earlier_release_is_brought_up_to_date() {
    let nats = Nats::start().unwrap();
    let config = nats.config(&access::STREAMS);
    let options = async_nats::ConnectOptions::with_user_and_password(
        config.user.to_owned(),
        config.password.expose_secret().to_owned(),
    )
    .custom_inbox_prefix(access::STREAMS.inbox());
    let jetstream = async_nats::jetstream::new(options.connect(config.url).await.unwrap());
    let earlier = async_nats::jetstream::stream::Config {
        name: topology::EVENTS.name.to_owned(),
        subjects: topology::EVENTS.subjects.iter().map(ToString::to_string).collect(),
        max_bytes: topology::EVENTS.max_bytes,
        max_consumers: -1,
        ..Default::default()
    };
    jetstream.create_stream(earlier).await.unwrap();
    nats.with_streams().await.unwrap();
    let kept =
        jetstream.get_stream(topology::EVENTS.name).await.unwrap().cached_info().config.clone();
    assert_eq!(kept.max_consumers, topology::CONSUMERS_MAX);
    assert!(kept.republish.is_some());
}

/// A connection that does what its thief wants.
async fn raw(nats: &Nats, access: &access::Access) -> async_nats::Client {
    let config = nats.config(access);
    let options = async_nats::ConnectOptions::with_user_and_password(
        config.user.to_owned(),
        config.password.expose_secret().to_owned(),
    );
    options.custom_inbox_prefix(access.inbox()).connect(config.url).await.unwrap()
}

#[tokio::test]
async fn a_request_makes_a_service_publish_nowhere_but_to_a_callers_inbox() {
    let nats = Nats::start().unwrap();
    nats.with_streams().await.unwrap();
    let (server, runner) =
        (nats.connect(&access::AUTH).await.unwrap(), nats.connect(&access::RUNNER).await.unwrap());
    let calls = Arc::new(AtomicUsize::new(0));
    let responder = Responder::new(
        &server,
        "auth",
        calls.clone(),
        TaskTracker::new(),
        CancellationToken::new(),
    );
    let count = |calls: Arc<AtomicUsize>, _: contract::common::Empty| async move {
        calls.fetch_add(1, Ordering::SeqCst);
        Ok(contract::common::Empty {})
    };
    responder.serve::<rpc::AuthHealth, _, _>(count).await.unwrap();
    let session = SessionId::new();
    let log = subject::session_log(session, Partition::FIRST);
    let mut hints = runner.hints(subject::terminate_hint(session)).await.unwrap();
    let mut events_inbox =
        raw(&nats, &access::EVENTS).await.subscribe("_INBOX_events.>").await.unwrap();
    for thief in [&access::OPERATOR, &access::GATEWAY] {
        let client = raw(&nats, thief).await;
        for reply in [
            subject::terminate_hint(session),
            log.clone(),
            subject::turn_run(session),
            "_INBOX_events.x".to_owned(),
        ] {
            client
                .publish_with_reply("aod.rpc.auth.v1.health.check", reply, "".into())
                .await
                .unwrap();
        }
        // Processed behind those.
        let answer = client.request("aod.rpc.auth.v1.health.check", "".into()).await.unwrap();
        assert!(
            answer.headers.is_none_or(|headers| headers.get(contract::header::ERROR).is_none())
        );
    }
    assert_eq!(
        calls.load(Ordering::SeqCst),
        2,
        "requests with such reply subjects are not even served"
    );
    assert!(tokio::time::timeout(Duration::from_millis(300), hints.next()).await.is_err());
    assert!(tokio::time::timeout(Duration::from_millis(10), events_inbox.next()).await.is_err());
    assert!(runner.last(topology::EVENTS.name, &log).await.unwrap().is_none());
    // And the server would not have let the service.
    let stolen = raw(&nats, &access::AUTH).await;
    for subject in [subject::terminate_hint(session), log.clone(), "_INBOX_events.x".to_owned()] {
        stolen.publish(subject, "".into()).await.unwrap();
    }
    stolen.flush().await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(300), hints.next()).await.is_err());
    assert!(tokio::time::timeout(Duration::from_millis(10), events_inbox.next()).await.is_err());
    assert!(runner.last(topology::EVENTS.name, &log).await.unwrap().is_none());
}

/// A consumer whose deliveries, and heartbeats, go to a subject of its user's choice.
fn deliveries_to(subject: &str) -> push::Config {
    push::Config {
        name: Some("a".to_owned()),
        deliver_subject: subject.to_owned(),
        ack_policy: AckPolicy::None,
        idle_heartbeat: Duration::from_millis(100),
        ..push::Config::default()
    }
}

#[tokio::test]
async fn nothing_that_a_stream_or_the_server_sends_to_its_subject_is_a_hint() {
    let nats = Nats::start().unwrap();
    let scheduler = nats.with_streams().await.unwrap();
    let runner = nats.connect(&access::RUNNER).await.unwrap();
    let session = SessionId::new();
    let hint = subject::terminate_hint(session);
    let mut hints = runner.hints(hint.clone()).await.unwrap();
    let mut seen = raw(&nats, &access::RUNNER).await.subscribe(hint.clone()).await.unwrap();
    scheduler
        .publish("aod.evt.scheduler.v1.session.completed.x".to_owned(), "1".into(), "1")
        .await
        .unwrap();
    let events = raw(&nats, &access::EVENTS).await;
    let stream =
        async_nats::jetstream::new(events.clone()).get_stream_no_info("LIFECYCLE").await.unwrap();
    stream.create_consumer(deliveries_to(&hint)).await.unwrap();
    events.publish_with_reply("$JS.API.INFO", hint.clone(), "".into()).await.unwrap();
    let pull = async_nats::jetstream::consumer::pull::Config {
        name: Some("b".to_owned()),
        ..Default::default()
    };
    stream.create_consumer(pull).await.unwrap();
    events
        .publish_with_reply("$JS.API.CONSUMER.MSG.NEXT.LIFECYCLE.b", hint.clone(), "2".into())
        .await
        .unwrap();
    // A delivery, an answer, two more deliveries or a status, and heartbeats.
    for kind in 0..6 {
        assert!(
            tokio::time::timeout(SOON, seen.next()).await.is_ok(),
            "the check checks nothing: {kind}"
        );
    }
    assert!(tokio::time::timeout(Duration::from_millis(300), hints.next()).await.is_err());
    scheduler.hint(hint).await;
    assert!(tokio::time::timeout(SOON, hints.next()).await.is_ok());
}

#[tokio::test]
async fn another_process_of_the_same_user_cannot_read_a_runners_replies() {
    let nats = Nats::start().unwrap();
    let (server, runner) = (
        nats.connect(&access::SCHEDULER).await.unwrap(),
        nats.connect(&access::RUNNER).await.unwrap(),
    );
    let responder =
        Responder::new(&server, "scheduler", (), TaskTracker::new(), CancellationToken::new());
    let tell = |(), _: contract::scheduler::ClaimSpriteRequest| async {
        Ok(contract::scheduler::SpriteClaim {
            lease_id: "sentinel-of-another".to_owned(),
            ..Default::default()
        })
    };
    responder.serve::<rpc::ClaimSprite, _, _>(tell).await.unwrap();
    let mut heard = raw(&nats, &access::RUNNER).await.subscribe("_INBOX_runner.>").await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let claim = runner.call::<rpc::ClaimSprite>(&Default::default(), SOON).await.unwrap();
    assert_eq!(claim.lease_id, "sentinel-of-another");
    let message = tokio::time::timeout(SOON, heard.next()).await.unwrap().unwrap();
    assert!(
        !message.payload.is_empty()
            && !message.payload.windows(8).any(|window| window == b"sentinel")
    );
}

/// One of two replicas is restarted again and again under load.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_fails_no_request_and_delays_none_to_its_timeout() {
    let nats = Nats::start().unwrap();
    let client = nats.connect(&access::GATEWAY).await.unwrap();
    let start = async || {
        let bus = nats.connect(&access::AUTH).await.unwrap();
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let responder = Responder::new(&bus, "auth", (), tasks.clone(), stop.clone());
        // Not retried by callers: one that is lost is an error.
        let create = |(), _: auth::CreateKeyRequest| async {
            tokio::time::sleep(Duration::from_millis(2)).await;
            Ok(auth::Key::default())
        };
        responder.serve::<rpc::CreateKey, _, _>(create).await.unwrap();
        (tasks, stop)
    };
    let _steady = start().await;
    let done = CancellationToken::new();
    let mut load = tokio::task::JoinSet::new();
    for _ in 0..64 {
        let (client, done) = (client.clone(), done.clone());
        load.spawn(async move {
            let (mut requests, mut failures, mut slowest) = (0_u32, Vec::new(), Duration::ZERO);
            while !done.is_cancelled() {
                let begun = std::time::Instant::now();
                if let Err(failure) =
                    client.call::<rpc::CreateKey>(&auth::CreateKeyRequest::default(), SOON).await
                {
                    failures.push(failure);
                }
                (requests, slowest) = (requests + 1, slowest.max(begun.elapsed()));
            }
            (requests, failures, slowest)
        });
    }
    for _ in 0..25 {
        let (tasks, stop) = start().await;
        tokio::time::sleep(Duration::from_millis(60)).await;
        stop.cancel();
        tasks.close();
        tokio::time::timeout(SOON, tasks.wait()).await.unwrap();
        // The connection is gone with its responder, as at a process' exit.
    }
    done.cancel();
    let (mut requests, mut slowest) = (0, Duration::ZERO);
    for (count, failures, worst) in load.join_all().await {
        assert_eq!(failures, [], "lost requests");
        (requests, slowest) = (requests + count, slowest.max(worst));
    }
    println!("{requests} requests, the slowest took {slowest:?}");
    assert!(
        requests > 1000 && slowest < Duration::from_secs(10),
        "{requests} requests, the slowest took {slowest:?}"
    );
}

/// The server answers requests to any reply subject, also to one that its caller may not publish
/// to.
#[tokio::test]
async fn messages_of_the_server_in_a_log_are_recognized_and_removed() {
    let nats = Nats::start().unwrap();
    let scheduler = nats.with_streams().await.unwrap();
    let runner = nats.connect(&access::RUNNER).await.unwrap();
    let log = subject::session_log(SessionId::new(), Partition::FIRST);
    let first = runner.append(log.clone(), "1".into(), 0).await.unwrap();
    scheduler
        .publish("aod.evt.scheduler.v1.session.completed.x".to_owned(), "1".into(), "1")
        .await
        .unwrap();
    let events = raw(&nats, &access::EVENTS).await;
    // A consumer's deliveries are in no other stream.
    let stream =
        async_nats::jetstream::new(events.clone()).get_stream_no_info("LIFECYCLE").await.unwrap();
    stream.create_consumer(deliveries_to(&log)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(runner.last(topology::EVENTS.name, &log).await.unwrap().unwrap().sequence, first);
    events.publish_with_reply("$JS.API.INFO", log.clone(), "".into()).await.unwrap();
    let last = async || runner.last(topology::EVENTS.name, &log).await.unwrap().unwrap();
    eventually("an answer is in the log", || async { last().await.sequence > first }).await;
    assert!(last().await.is_foreign);
    assert!(matches!(
        runner.append(log.clone(), "2".into(), first).await,
        Err(AppendError::Superseded)
    ));
    for _ in 0..2 {
        scheduler
            .remove(topology::EVENTS.name, last().await.sequence.max(first + 1))
            .await
            .unwrap();
    }
    let entry = last().await;
    assert!(!entry.is_foreign && entry.sequence == first);
    runner.append(log.clone(), "2".into(), first).await.unwrap();
}

#[tokio::test]
async fn a_subject_counts_as_followed_until_its_only_subscriber_is_gone() {
    let nats = Nats::start().unwrap();
    let scheduler = nats.connect(&access::SCHEDULER).await.unwrap();
    let runner = nats.connect(&access::RUNNER).await.unwrap();
    let presence = subject::lease_presence("a");
    let limit = Duration::from_secs(5);
    assert!(!scheduler.may_be_followed(presence.clone(), limit).await);
    let mut hints = runner.hints(presence.clone()).await.unwrap();
    // The question is no hint, and gets no answer.
    eventually("the server has the subscription", || async {
        scheduler.may_be_followed(presence.clone(), Duration::from_millis(100)).await
    })
    .await;
    assert!(hints.next().now_or_never().is_none());
    drop((hints, runner));
    eventually("the server reports no subscriber", || async {
        !scheduler.may_be_followed(presence.clone(), limit).await
    })
    .await;
}
