//! The event log: what is persisted, in which order, and what is refused.

use super::*;

#[tokio::test]
async fn two_schedulers_record_every_event_once_and_in_order() {
    let world = World::start().await;
    world.run_scheduler(&Lifecycle::new()).await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    let mut ids = Vec::new();
    for n in 0..300 {
        ids.push(
            world
                .append(
                    &session,
                    1,
                    Kind::Output(Output { stderr: false, data: format!("{n}").into() }),
                )
                .await,
        );
    }
    world.get(&session, *ids.last().unwrap()).await;
    let mut read = Vec::new();
    loop {
        let request = ReadEventsRequest {
            session_id: session.clone(),
            after: read.last().copied().unwrap_or(0),
            limit: 64,
            ..ReadEventsRequest::default()
        };
        let page = world.gateway.call::<rpc::ReadEvents>(&request, SOON).await.unwrap().events;
        if page.is_empty() {
            break;
        }
        read.extend(page.into_iter().map(|event| event.event_id));
    }
    assert_eq!(read, ids);
}

#[tokio::test]
async fn an_unreadable_event_does_not_block_later_events() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    let id: SessionId = session.parse().unwrap();
    world
        .runner
        .publish(subject::session_log(id, Partition::FIRST), vec![0xff; 20].into(), "garbage")
        .await
        .unwrap();
    // One of an unknown session.
    world.append(&SessionId::new().to_string(), 1, Kind::TurnStarted(TurnStarted::default())).await;
    assert_eq!(world.complete(&session, 1).await.status, "completed");
}

/// Who may ask JetStream chooses where the server puts its answer.
#[tokio::test]
async fn an_entry_that_no_service_wrote_is_removed_and_fences_off_no_writer() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    let log = subject::session_log(session.parse().unwrap(), Partition::FIRST);
    let started = world.append(&session, 1, Kind::TurnStarted(TurnStarted::default())).await;
    let reader = access::EVENTS;
    let options = async_nats::ConnectOptions::with_user_and_password(
        reader.user.to_owned(),
        world.nats.password(reader.user),
    );
    let reader =
        options.custom_inbox_prefix(reader.inbox()).connect(world.nats.url()).await.unwrap();
    for _ in 0..3 {
        reader.publish_with_reply("$JS.API.INFO", log.clone(), "".into()).await.unwrap();
    }
    reader.flush().await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    eventually("the log ends where it did", || async {
        world
            .runner
            .last("EVENTS", &log)
            .await
            .unwrap()
            .is_some_and(|last| last.sequence == started)
    })
    .await;
    let end = Kind::TurnEnded(TurnEnded { exit_code: Some(0), ..TurnEnded::default() });
    let end = world.append(&session, 1, end).await;
    assert_eq!(world.get(&session, end).await.status, "completed");
}

#[tokio::test]
async fn an_event_that_does_not_continue_the_log_is_not_persisted_and_its_turn_is_released() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    world.run(&session, 1).await;
    let log = subject::session_log(session.parse().unwrap(), Partition::FIRST);
    let event = |follows, text: &str| SessionEvent {
        turn: 1,
        epoch: 1,
        follows: Some(follows),
        checkpoint: None,
        kind: Some(Kind::Output(Output { stderr: false, data: text.to_owned().into() })),
        ..SessionEvent::default()
    };
    let first =
        world.runner.append(log.clone(), event(0, "one").encode_to_vec().into(), 0).await.unwrap();
    // Something is missing between the two.
    let broken = world
        .runner
        .append(log.clone(), event(first + 1, "three").encode_to_vec().into(), first)
        .await
        .unwrap();
    world.get(&session, broken).await;
    let read = ReadEventsRequest {
        session_id: session.clone(),
        after: 0,
        limit: 10,
        max_bytes: 0,
        before: None,
        without_output: false,
        ..ReadEventsRequest::default()
    };
    let events = world.gateway.call::<rpc::ReadEvents>(&read, SOON).await.unwrap().events;
    assert_eq!(events.iter().map(|event| event.event_id).collect::<Vec<_>>(), [first]);
    assert_eq!(owner(&world, &session).await, None, "the next claimant reads the output again");
    assert!(
        world.runner.last("EVENTS", &log).await.unwrap().is_none(),
        "and continues the persisted log"
    );
    let again =
        world.runner.append(log, event(first, "two").encode_to_vec().into(), 0).await.unwrap();
    world.get(&session, again).await;
    assert_eq!(world.gateway.call::<rpc::ReadEvents>(&read, SOON).await.unwrap().events.len(), 2);
}

/// A store that lost its tail, or that was exchanged for another: the stream is recreated above
/// every id that was used.
#[tokio::test]
async fn a_stream_that_is_not_the_one_that_was_published_to_is_recreated() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    world.complete(&session, 1).await;
    let scheduler = world.nats.connect(&access::SCHEDULER).await.unwrap();
    let begins_at = async || {
        scheduler
            .stream_info(&contract::topology::EVENTS)
            .await
            .map_or(0, |info| info.last_sequence + 1)
    };
    for statement in [
        "update scheduler.stream_generation set high_watermark = high_watermark + 30",
        "update scheduler.stream_generation set created_at = created_at - interval '1 second'",
    ] {
        let before = begins_at().await;
        execute(&world, statement).await;
        eventually("the stream begins far above", || async {
            begins_at().await > before + 900_000
        })
        .await;
        let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
        assert_eq!(world.complete(&session, 1).await.status, "completed", "and is projected");
    }
}

/// As everything else does: two that lock in opposite orders are ended by Postgres, a termination
/// or a whole batch.
#[tokio::test]
async fn the_projector_locks_a_session_before_its_turn() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    world.run(&session, 1).await;
    let id: Uuid = session.parse().unwrap();
    let (mut locker, mut watcher) =
        (world.database.admin().await.unwrap(), world.database.admin().await.unwrap());
    for kind in [
        Kind::TurnStarted(TurnStarted::default()),
        Kind::TurnEnded(TurnEnded { exit_code: Some(0), ..TurnEnded::default() }),
    ] {
        let mut tx = locker.begin().await.unwrap();
        sqlx::query("select from scheduler.session where session_id = $1 for update")
            .bind(id)
            .execute(&mut *tx)
            .await
            .unwrap();
        let event = world.append(&session, 1, kind).await;
        let waits = "select exists (select from pg_stat_activity where wait_event_type = 'Lock' and application_name like 'scheduler projector%')";
        let mut is_waiting = false;
        for _ in 0..100 {
            is_waiting = sqlx::query_scalar(waits).fetch_one(&mut watcher).await.unwrap();
            if is_waiting {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(is_waiting, "the projector does not wait for the session");
        // It holds no lock on the turn: the transaction that holds the session can take it.
        let turn = "select from scheduler.turn where session_id = $1 and turn_number = 1 for update nowait";
        sqlx::query(turn).bind(id).execute(&mut *tx).await.unwrap();
        tx.commit().await.unwrap();
        world.get(&session, event).await;
    }
    assert_eq!(world.get(&session, 0).await.status, "completed");
}
