//! Sessions and prompts that are created at once or twice, and quotas.

use super::*;

#[tokio::test]
async fn of_concurrent_creates_exactly_the_quota_gets_through() {
    let (world, agent) = World::with_agent().await;
    let results = join_all((0..50).map(|_| world.create(&agent, 10))).await;
    let (created, refused): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    assert_eq!((created.len(), refused.len()), (10, 40));
    let failure = refused.into_iter().next().unwrap().unwrap_err();
    assert_eq!(
        failure.message,
        "Concurrent session limit reached (10/10). Terminate an active session before starting a new one."
    );
    assert_eq!(
        (failure.code, failure.numbers["limit"], failure.numbers["active"]),
        (ErrorCode::ResourceExhausted, 10, 10)
    );
}

/// What a gateway does whose scheduler dies with a request, or is slow: the same is asked of
/// another, also while the first is at it.
#[tokio::test]
async fn a_creation_that_is_asked_of_two_schedulers_takes_effect_once() {
    let world = World::start().await;
    world.run_scheduler(&Lifecycle::new()).await;
    let agent_id = Uuid::now_v7().to_string();
    let agent = CreateAgentRequest { agent_id: agent_id.clone(), ..world.new_agent() };
    let key = |key: &str| {
        Some(Once { key: key.to_owned(), body_hash: vec![1], is_of_one_request: false })
    };
    // The gateway's own, of a request without a key of its client's.
    let own = |key: &str| {
        Some(Once { key: key.to_owned(), body_hash: Vec::new(), is_of_one_request: true })
    };
    let json = "{}".to_owned();
    let environment = CreateEnvironmentRequest {
        user_id: world.user.to_string(),
        name: "e".to_owned(),
        packages: json.clone(),
        networking: json,
        environment_id: Uuid::now_v7().to_string(),
        ..CreateEnvironmentRequest::default()
    };
    for once in [None, key("a"), own("own")] {
        let agent = CreateAgentRequest { once: once.clone(), ..agent.clone() };
        for created in
            join_all((0..5).map(|_| world.gateway.call::<rpc::CreateAgent>(&agent, SOON))).await
        {
            let created = created.unwrap();
            assert_eq!(
                (created.agent.unwrap().agent_id, created.replayed),
                (agent_id.clone(), false)
            );
        }
        // Its name is taken: by itself.
        let environment = CreateEnvironmentRequest { once, ..environment.clone() };
        for created in join_all(
            (0..5).map(|_| world.gateway.call::<rpc::CreateEnvironment>(&environment, SOON)),
        )
        .await
        {
            let created = created.unwrap();
            assert_eq!(
                (created.environment.unwrap().environment_id, created.replayed),
                (environment.environment_id.clone(), false)
            );
        }
    }
    for (limit, once) in [(1, None), (2, key("b")), (3, own("own")), (5000, None)] {
        let session_id = Uuid::now_v7().to_string();
        let request = CreateSessionRequest {
            session_id: session_id.clone(),
            once: once.clone(),
            ..world.session_of(&agent_id, limit)
        };
        for created in
            join_all((0..5).map(|_| world.gateway.call::<rpc::CreateSession>(&request, SOON))).await
        {
            let created = created.unwrap();
            assert_eq!(
                (created.session.unwrap().session_id, created.replayed),
                (session_id.clone(), false)
            );
        }
        if once.is_some_and(|once| !once.is_of_one_request) {
            let of_the_client =
                CreateSessionRequest { session_id: Uuid::now_v7().to_string(), ..request };
            let replay =
                world.gateway.call::<rpc::CreateSession>(&of_the_client, SOON).await.unwrap();
            assert_eq!((replay.session.unwrap().session_id, replay.replayed), (session_id, true));
        }
    }
    let turns: Vec<(i64, i64)> = sqlx::query_as(
        "select (select count(*) from scheduler.session), count(*) from scheduler.turn",
    )
    .fetch_all(&mut world.database.admin().await.unwrap())
    .await
    .unwrap();
    assert_eq!(turns, [(4, 4)]);
    world.counts_are_right().await;

    // The id of another's is refused, and tells nothing.
    let stranger = CreateAgentRequest { user_id: UserId::new().to_string(), ..agent };
    let failure = world.gateway.call::<rpc::CreateAgent>(&stranger, SOON).await.unwrap_err();
    assert_eq!(failure.code, ErrorCode::Conflict);
}

#[tokio::test]
async fn a_prompt_that_is_asked_of_two_schedulers_is_one_turn() {
    let world = World::start().await;
    world.run_scheduler(&Lifecycle::new()).await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    world.complete(&session, 1).await;
    let prompt = |key: &str| PromptRequest {
        user_id: world.user.to_string(),
        session_id: session.clone(),
        prompt: "again".to_owned(),
        timeout_seconds: 60,
        once: Some(Once { key: key.to_owned(), body_hash: Vec::new(), is_of_one_request: true }),
        ..PromptRequest::default()
    };
    let request = prompt("one");
    for prompted in
        join_all((0..5).map(|_| world.gateway.call::<rpc::Prompt>(&request, SOON))).await
    {
        assert_eq!(prompted.unwrap().session.unwrap().turn_count, 2);
    }
    let failure = world.gateway.call::<rpc::Prompt>(&prompt("two"), SOON).await.unwrap_err();
    assert_eq!(
        (failure.code, failure.message.as_str()),
        (ErrorCode::Conflict, "Session already has a pending turn")
    );
}

/// Concurrent creations never exceed a quota: neither far below a large one, where they share a
/// lock, nor near it.
#[tokio::test]
async fn a_large_quota_holds_and_ended_sessions_free_it() {
    const LIMIT: u32 = 1200;
    let (world, agent) = World::with_agent().await;
    let mut sessions = Vec::new();
    for _ in 0..27 {
        let created = join_all((0..50).map(|_| world.create(&agent, LIMIT))).await;
        sessions.extend(created.into_iter().flatten());
    }
    assert_eq!(sessions.len(), LIMIT as usize);
    assert!(world.create(&agent, LIMIT).await.is_err());
    for session in &sessions[..3] {
        assert_eq!(world.complete(&session.session_id, 1).await.status, "completed");
    }
    let created = join_all((0..20).map(|_| world.create(&agent, LIMIT))).await;
    assert_eq!(created.iter().filter(|created| created.is_ok()).count(), 3);
    world.counts_are_right().await;
}

/// A message that wakes an idle session counts as a creation does.
#[tokio::test]
async fn messages_to_idle_sessions_are_subject_to_the_quota() {
    let (world, agent) = World::with_agent().await;
    let mut replies = Vec::new();
    for _ in 0..3 {
        let session = world.create_idle(&agent).await;
        // The second message of a session is queued: it is active already.
        for _ in 0..2 {
            replies.push(world.send_message(&session, 2).await);
        }
    }
    assert_eq!(
        replies,
        [
            Ok(()),
            Ok(()),
            Ok(()),
            Ok(()),
            Err(ErrorCode::ResourceExhausted),
            Err(ErrorCode::ResourceExhausted)
        ]
    );
    world.counts_are_right().await;
}
