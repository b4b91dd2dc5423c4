//! Turns that are ended because their time is over.

use super::*;

#[tokio::test]
async fn an_overdue_turn_is_settled_with_a_reason() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    let mut admin = world.database.admin().await.unwrap();
    sqlx::query("update scheduler.turn set deadline_at = now() - interval '1 second'")
        .execute(&mut admin)
        .await
        .unwrap();
    eventually("the session fails", || async { world.get(&session, 0).await.status == "failed" })
        .await;
    assert_eq!(
        world.get(&session, 0).await.failure.unwrap().message,
        "Turn could not be started in time: no runner finished setting it up"
    );
}

#[tokio::test]
async fn a_deadline_never_overrules_an_end_that_waits_to_be_projected() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    world.append(&session, 1, Kind::TurnStarted(TurnStarted::default())).await;
    eventually("it runs", || async { world.get(&session, 0).await.status == "running" }).await;
    // Nothing is projected while another replica seems to lead.
    execute(&world, "update scheduler.lease set epoch = epoch + 1, owner = gen_random_uuid(), expires_at = now() + interval '4 seconds' where name like 'projector%'").await;
    world
        .append(
            &session,
            1,
            Kind::TurnEnded(TurnEnded { exit_code: Some(0), ..TurnEnded::default() }),
        )
        .await;
    execute(&world, "update scheduler.turn set deadline_at = now() - interval '1 minute'").await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(world.get(&session, 0).await.status, "running");
    eventually("the end is projected", || async {
        world.get(&session, 0).await.status != "running"
    })
    .await;
    let now = world.get(&session, 0).await;
    assert_eq!((now.status.as_str(), now.exit_code), ("completed", Some(0)));
}

/// The deadline is the last resort of all turns: one that cannot be ended keeps none of the others.
#[tokio::test]
async fn a_turn_that_cannot_be_ended_delays_no_other_deadline() {
    let (world, agent) = World::with_agent().await;
    let mut sessions = Vec::new();
    for _ in 0..3 {
        let session = world.create(&agent, 10).await.unwrap().session_id;
        world.run(&session, 1).await;
        let started = world.append(&session, 1, Kind::TurnStarted(TurnStarted::default())).await;
        assert_eq!(world.get(&session, started).await.status, "running");
        sessions.push(session);
    }
    // The newest event of the first, as a later release might write it.
    let log = subject::session_log(sessions[0].parse().unwrap(), Partition::FIRST);
    world.runner.publish(log, vec![0xff; 9].into(), "unreadable").await.unwrap();
    execute(&world, "update scheduler.turn set deadline_at = now() - interval '1 minute'").await;
    let first: Uuid = sessions[0].parse().unwrap();
    sqlx::query("update scheduler.turn set deadline_at = now() - interval '2 minutes' where session_id = $1")
        .bind(first)
        .execute(&mut world.database.admin().await.unwrap())
        .await
        .unwrap();
    for session in &sessions[1..] {
        eventually("the others end", || async { world.get(session, 0).await.status == "failed" })
            .await;
        let failure = world.get(session, 0).await.failure.unwrap();
        assert_eq!(failure.message, "Turn timed out after 60s");
    }
}
