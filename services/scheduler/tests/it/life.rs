//! The life of a session: how it ends, is archived and deleted, and what its next turn is given.

use super::*;

#[tokio::test]
async fn a_turns_end_completes_the_session_and_one_of_racing_prompts_wins() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    assert_eq!(world.complete(&session, 1).await.status, "completed");
    let request = world.prompt_of(&session);
    let results =
        join_all((0..20).map(|_| world.gateway.call::<rpc::Prompt>(&request, SOON))).await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    let refused = results.into_iter().find_map(Result::err).unwrap();
    assert_eq!(
        (refused.code, refused.message.as_str()),
        (ErrorCode::Conflict, "Session already has a pending turn")
    );
    let now = world.get(&session, 0).await;
    assert_eq!((now.turn_count, now.status.as_str(), now.exit_code), (2, "pending", None));
}

/// No sandbox is deleted here: there is no runner.
#[tokio::test]
async fn a_terminated_session_loses_its_model_tokens_before_its_sandbox() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    world.heartbeat(world.lease, true, Vec::new()).await;
    let claim = ClaimTurnRequest {
        session_id: session.clone(),
        turn: 1,
        runner: "r".to_owned(),
        runner_lease: world.lease.to_string(),
        public_key: vec![9; 32],
        model_token_hash: vec![7; 32],
        routing: None,
    };
    world.runner.call::<rpc::ClaimTurn>(&claim, SOON).await.unwrap();
    let revoked = async || {
        let revoked =
            sqlx::query_scalar::<_, bool>("select revoked_at is not null from vault.model_token");
        revoked.fetch_all(&mut world.database.admin().await.unwrap()).await.unwrap()
    };
    assert_eq!(revoked().await, [false]);
    let request = TerminateRequest { user_id: world.user.to_string(), session_id: session };
    world.gateway.call::<rpc::Terminate>(&request, SOON).await.unwrap();
    eventually("the token is revoked", || async { revoked().await == [true] }).await;
}

#[tokio::test]
async fn a_session_without_a_turn_can_be_terminated_archived_and_deleted() {
    let (world, agent) = World::with_agent().await;
    let (terminated, archived) = (world.create_idle(&agent).await, world.create_idle(&agent).await);
    let request =
        TerminateRequest { user_id: world.user.to_string(), session_id: terminated.clone() };
    assert_eq!(
        world.gateway.call::<rpc::Terminate>(&request, SOON).await.unwrap().status,
        "terminated"
    );
    let reply = world.archive(&archived).await.unwrap();
    assert_eq!((reply.status.as_str(), reply.archived_at_us.is_some()), ("terminated", true));
    // Again, and of one that was terminated, it is no error.
    assert!(world.archive(&archived).await.is_ok() && world.archive(&terminated).await.is_ok());
    for session_id in [terminated, archived] {
        assert_eq!(world.send_message(&session_id, 10).await, Err(ErrorCode::Conflict));
        let delete = DeleteSessionRequest { user_id: world.user.to_string(), session_id };
        world.gateway.call::<rpc::DeleteSession>(&delete, SOON).await.unwrap();
    }
}

/// An accepted message is never killed by an archiving that was accepted too.
#[tokio::test]
async fn of_a_message_and_an_archiving_at_once_one_is_accepted() {
    let (world, agent) = World::with_agent().await;
    for _ in 0..20 {
        let session = world.create_idle(&agent).await;
        let (sent, archived) =
            tokio::join!(world.send_message(&session, 100), world.archive(&session));
        let status = world.get(&session, 0).await.status;
        match (sent, archived) {
            (Ok(()), Err(failure)) => {
                assert_eq!((failure.code, status.as_str()), (ErrorCode::Conflict, "pending"))
            }
            (Err(code), Ok(_)) => {
                assert_eq!((code, status.as_str()), (ErrorCode::Conflict, "terminated"))
            }
            both => unreachable!("{both:?}"),
        }
    }
}

#[tokio::test]
async fn terminate_wins_over_a_late_completion_and_only_once() {
    let world = World::start().await;
    let session = world.create(&world.agent().await, 10).await.unwrap().session_id;
    let request = TerminateRequest { user_id: world.user.to_string(), session_id: session.clone() };
    assert_eq!(
        world.gateway.call::<rpc::Terminate>(&request, SOON).await.unwrap().status,
        "terminated"
    );
    assert_eq!(
        world.gateway.call::<rpc::Terminate>(&request, SOON).await.unwrap_err().message,
        "Session is already terminated"
    );
    assert_eq!(world.complete(&session, 1).await.status, "terminated");
    let verdict = world.claim(&session, 1).await;
    assert!(
        matches!(verdict, Verdict::Settled(settled) if settled.destroy.is_some()),
        "what exists of its Sprite has to go"
    );
}

#[tokio::test]
async fn a_sprite_may_be_deleted_of_a_terminated_failed_or_deleted_session_alone() {
    let (world, agent) = World::with_agent().await;
    let claim = async |session: &str| {
        let request = ClaimSpriteRequest {
            session_id: session.to_owned(),
            runner: "r".to_owned(),
            ..ClaimSpriteRequest::default()
        };
        world.runner.call::<rpc::ClaimSprite>(&request, SOON).await.map(|claim| claim.sprite)
    };
    let session = world.create(&agent, 10).await.unwrap().session_id;
    let refused =
        async |session: &str| claim(session).await.unwrap_err().code == ErrorCode::NotFound;
    assert!(refused(&session).await, "pending");
    world.run(&session, 1).await;
    world.append(&session, 1, Kind::TurnStarted(TurnStarted::default())).await;
    eventually("it runs", || async { world.get(&session, 0).await.status == "running" }).await;
    assert!(refused(&session).await, "running");
    // Whatever else may be wrong: the status decides.
    execute(&world, "update scheduler.session set destroy_after = now() + interval '1 day'").await;
    assert!(refused(&session).await, "running, marked by mistake");
    execute(&world, "update scheduler.session set destroy_after = null").await;
    world.complete(&session, 1).await;
    assert!(refused(&session).await, "completed");
    let delete =
        DeleteSessionRequest { user_id: world.user.to_string(), session_id: session.clone() };
    world.gateway.call::<rpc::DeleteSession>(&delete, SOON).await.unwrap();
    assert!(claim(&session).await.is_ok(), "deleted");

    let terminated = world.create(&agent, 10).await.unwrap().session_id;
    let request =
        TerminateRequest { user_id: world.user.to_string(), session_id: terminated.clone() };
    world.gateway.call::<rpc::Terminate>(&request, SOON).await.unwrap();
    assert!(claim(&terminated).await.is_ok(), "terminated");
}

#[tokio::test]
async fn a_later_edit_changes_nothing_for_a_sessions_next_turn() {
    let (world, agent) = World::with_agent().await;
    let session = world.create(&agent, 10).await.unwrap().session_id;
    world.complete(&session, 1).await;
    let change = UpdateAgentRequest {
        user_id: world.user.to_string(),
        agent_id: agent,
        version: 1,
        model: Some("newer".to_owned()),
        ..UpdateAgentRequest::default()
    };
    assert_eq!(world.gateway.call::<rpc::UpdateAgent>(&change, SOON).await.unwrap().version, 2);
    let prompt = world.prompt_of(&session);
    world.gateway.call::<rpc::Prompt>(&prompt, SOON).await.unwrap();
    let spec = world.run(&session, 2).await;
    assert_eq!(
        (spec.model.as_str(), spec.prompt.as_str(), spec.system.as_str()),
        ("none", "again", "")
    );
}
