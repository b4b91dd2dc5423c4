//! Who owns a turn: claims, leases, heartbeats, releases.

use super::*;

#[tokio::test]
async fn every_claim_raises_the_epoch_until_the_turn_is_settled() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    for expected in 1..=3 {
        assert_eq!(world.run(&session, 1).await.epoch, expected);
    }
    world.complete(&session, 1).await;
    let verdict = world.claim(&session, 1).await;
    assert!(matches!(verdict, Verdict::Settled(settled) if settled.destroy.is_none()));
}

#[tokio::test]
async fn a_turn_that_no_runner_can_run_fails_with_the_last_reason() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    let release = async |epoch, reason: &str| {
        let request = ReleaseTurnRequest {
            session_id: session.clone(),
            turn: 1,
            epoch,
            reason: reason.to_owned(),
        };
        world.runner.call::<rpc::ReleaseTurn>(&request, SOON).await.unwrap();
    };
    let epoch = world.run(&session, 1).await.epoch;
    release(epoch, "no sandbox to be had").await;
    // A stale claim releases nothing.
    release(epoch + 1, "nonsense").await;
    assert_eq!(
        world.get(&session, 0).await.waiting_on.as_deref(),
        Some("another attempt: no sandbox to be had")
    );
    // Takeovers without a failure do not count.
    for _ in 0..110 {
        let epoch = world.run(&session, 1).await.epoch;
        release(epoch, "").await;
    }
    for _ in 0..100 {
        let epoch = world.run(&session, 1).await.epoch;
        release(epoch, "no sandbox to be had").await;
    }
    eventually("the turn is given up", || async {
        world.get(&session, 0).await.status == "failed"
    })
    .await;
    assert!(matches!(world.claim(&session, 1).await, Verdict::Settled(_)));
    let now = world.get(&session, 0).await;
    assert_eq!(
        (now.status.as_str(), now.failure.unwrap().message.as_str()),
        ("failed", "Given up after 100 attempts: no sandbox to be had")
    );
}

#[tokio::test]
async fn a_second_job_for_an_owned_turn_is_ignored_until_its_lease_expires() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    let (first, second) = (Uuid::now_v7(), Uuid::now_v7());
    let _presence = world.runner.hints(subject::lease_presence(first)).await.unwrap();
    assert!(
        matches!(world.claim_with(first, &session, 1).await, Verdict::Run(spec) if spec.epoch == 1)
    );
    assert!(matches!(world.claim_with(second, &session, 1).await, Verdict::Owned(_)));
    // The first runner falls silent: its turn has no owner any more, and is offered again.
    eventually("the turn is offered again", || async { owner(&world, &session).await.is_none() })
        .await;
    assert!(
        matches!(world.claim_with(second, &session, 1).await, Verdict::Run(spec) if spec.epoch == 2)
    );
    assert!(world.heartbeat(first, false, Vec::new()).await.expired);
    let claim = ClaimTurnRequest {
        session_id: session,
        turn: 1,
        runner: "r".to_owned(),
        runner_lease: first.to_string(),
        ..ClaimTurnRequest::default()
    };
    let verdict = world.runner.call::<rpc::ClaimTurn>(&claim, SOON).await.unwrap().verdict.unwrap();
    assert!(matches!(verdict, Verdict::LeaseExpired(_)));
}

/// Its lease is extended as by a heartbeat that was 1.5 s ago, and never ends.
#[tokio::test]
async fn a_runner_that_left_the_bus_loses_its_turns_before_its_lease_ends() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    let lease = Uuid::now_v7();
    world.claim_with(lease, &session, 1).await;
    let owned_while_silent = async || {
        execute(
            &world,
            "update scheduler.runner_lease set expires_at = now() + interval '500 milliseconds'",
        )
        .await;
        owner(&world, &session).await.is_some()
    };
    eventually("its turn is released", async || !owned_while_silent().await).await;
    assert!(world.heartbeat(lease, false, Vec::new()).await.expired);
}

#[tokio::test]
async fn a_heartbeat_finds_turns_that_were_lost_and_turns_that_were_forgotten() {
    let (world, agent) = World::with_agent().await;
    let (mine, others) = (
        world.create(&agent, 10).await.unwrap().session_id,
        world.create(&agent, 10).await.unwrap().session_id,
    );
    world.run(&mine, 1).await;
    world.claim_with(Uuid::now_v7(), &others, 1).await;
    let held =
        |session: &String| HeldTurn { session_id: session.clone(), turn: 1, epoch: 1, ended: None };
    let reply = world.heartbeat(world.lease, false, vec![held(&mine), held(&others)]).await;
    assert_eq!(reply.lost, [held(&others)]);
    // The answer to its claim was lost: this runner does not know that it owns the turn.
    world.heartbeat(world.lease, false, Vec::new()).await;
    assert_eq!(owner(&world, &mine).await, Some(world.lease), "the answer may be on its way");
    execute(&world, "update scheduler.turn set claimed_at = now() - interval '1 minute'").await;
    world.heartbeat(world.lease, false, Vec::new()).await;
    assert_eq!(owner(&world, &mine).await, None);
}

/// An end that lies below what the projector has passed was lost with its stream.
#[tokio::test]
async fn a_turn_whose_end_was_lost_is_offered_again() {
    let (world, agent) = World::with_agent().await;
    let session = world.create(&agent, 10).await.unwrap().session_id;
    world.run(&session, 1).await;
    let other = world.create(&agent, 10).await.unwrap().session_id;
    world.complete(&other, 1).await;
    let held = HeldTurn { session_id: session.clone(), turn: 1, epoch: 1, ended: Some(1) };
    assert_eq!(
        world.heartbeat(world.lease, false, vec![held.clone()]).await.lost,
        [held].map(|held| HeldTurn { ended: None, ..held })
    );
    assert_eq!(owner(&world, &session).await, None);
}

impl World {
    pub async fn prepare(&self, session: &str) -> Option<TurnSpec> {
        let request = ClaimPreparationRequest {
            session_id: session.to_owned(),
            runner: "r".to_owned(),
            public_key: vec![1; 32],
            ..ClaimPreparationRequest::default()
        };
        self.runner.call::<rpc::ClaimPreparation>(&request, SOON).await.unwrap().spec
    }
}

#[tokio::test]
async fn a_session_without_a_message_is_prepared_once_and_its_first_turn_knows() {
    let world = World::start().await;
    let agent = world.agent().await;
    let session = world.create_idle(&agent).await;
    let spec = world.prepare(&session).await.unwrap();
    assert_eq!((spec.epoch, spec.prompt.as_str(), spec.is_prepared), (1, "", false));
    assert!(!spec.lease_id.is_empty() && !spec.sprite.is_empty());
    assert!(world.prepare(&session).await.is_none(), "another runner has done what it could");
    let now = world.get(&session, 0).await;
    assert_eq!((now.status.as_str(), now.turn_count), ("completed", 0));
    world.send_message(&session, 100).await.unwrap();
    let turn = world.run(&session, 1).await;
    assert_eq!((turn.epoch, turn.prompt.as_str(), turn.is_prepared), (1, "echo", true));
    assert_eq!((turn.sprite, turn.system), (spec.sprite, spec.system));

    let late = world.create_idle(&agent).await;
    world.send_message(&late, 100).await.unwrap();
    assert!(world.prepare(&late).await.is_none(), "its first turn does it");
    assert!(!world.run(&late, 1).await.is_prepared);
}

#[tokio::test]
async fn a_user_has_a_bounded_number_of_prepared_sessions_without_a_message() {
    let world = World::start().await;
    let agent = world.agent().await;
    let mut prepared = Vec::new();
    for _ in 0..10 {
        let session = world.create_idle(&agent).await;
        assert!(world.prepare(&session).await.is_some());
        prepared.push(session);
    }
    let more = world.create_idle(&agent).await;
    assert!(world.prepare(&more).await.is_none());
    world.send_message(&prepared[0], 100).await.unwrap();
    assert!(world.prepare(&more).await.is_some());
    let last = world.create_idle(&agent).await;
    assert!(world.prepare(&last).await.is_none());
    let mut database = world.database.admin().await.unwrap();
    let older = "update scheduler.session set prepared_at = prepared_at - interval '1 hour'";
    sqlx::raw_sql(older).execute(&mut database).await.unwrap();
    assert!(world.prepare(&last).await.is_some(), "those that were abandoned count for an hour");
}

#[tokio::test]
async fn sessions_beyond_their_users_bound_take_no_runners_time_from_those_of_others() {
    let world = World::start().await;
    let agent = world.agent().await;
    let scheduler = world.nats.connect(&access::SCHEDULER).await.unwrap();
    let jobs = async || {
        eventually("all jobs are in the queue", || async {
            let mut database = world.database.admin().await.unwrap();
            let unsent = sqlx::query_scalar("select count(*) from scheduler.outbox");
            unsent.fetch_one(&mut database).await.is_ok_and(|unsent: i64| unsent == 0)
        })
        .await;
        scheduler.backlog(&topology::RUNNER).await.unwrap().waiting
    };
    for _ in 0..10 {
        let session = world.create_idle(&agent).await;
        assert!(world.prepare(&session).await.is_some());
    }
    assert_eq!(jobs().await, 10);
    world.create_idle(&agent).await;
    assert_eq!(jobs().await, 10);
}
