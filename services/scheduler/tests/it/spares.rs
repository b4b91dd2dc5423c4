//! Sandboxes that are prepared for sessions which do not exist yet.

use super::*;

const LIMITS: Limits = Limits { all: 4, of_user: 2 };

impl World {
    /// The spares that no session has, by their state.
    async fn spares(&self, state: &str) -> Vec<String> {
        let spares: Vec<Uuid> = sqlx::query_scalar(
            "select session_id from scheduler.spare where state = $1 order by 1",
        )
        .bind(state)
        .fetch_all(&mut self.database.admin().await.unwrap())
        .await
        .unwrap();
        spares.iter().map(Uuid::to_string).collect()
    }

    async fn wait_for_spares(&self, state: &str, number: usize) -> Vec<String> {
        let what = format!("there are {number} spares that are {state}");
        eventually(&what, || async { self.spares(state).await.len() == number }).await;
        self.spares(state).await
    }

    async fn end_preparation(&self, session: &str, is_ready: bool) {
        let request = EndPreparationRequest { session_id: session.to_owned(), is_ready };
        self.runner.call::<rpc::EndPreparation>(&request, SOON).await.unwrap();
    }

    /// Has spares made by creations, and prepares them.
    async fn prepare_spares(&self, agent: &str, number: usize) -> Vec<String> {
        for _ in 0..=number {
            self.create(agent, 1000).await.unwrap();
        }
        let spares = self.wait_for_spares("offered", number).await;
        for spare in &spares {
            assert!(self.prepare(spare).await.is_some());
            self.end_preparation(spare, true).await;
        }
        spares
    }

    async fn listed(&self) -> Vec<String> {
        let request =
            ListRequest { user_id: self.user.to_string(), limit: 100, ..ListRequest::default() };
        let page = self.gateway.call::<rpc::ListSessions>(&request, SOON).await.unwrap();
        page.sessions.into_iter().map(|session| session.session_id).collect()
    }

    /// Sessions whose Sprites are to be destroyed.
    async fn to_destroy(&self) -> Vec<String> {
        let sessions: Vec<Uuid> = sqlx::query_scalar(
            "select session_id from scheduler.deleted_session where destroy_after is not null",
        )
        .fetch_all(&mut self.database.admin().await.unwrap())
        .await
        .unwrap();
        sessions.iter().map(Uuid::to_string).collect()
    }

    async fn change_agent(&self, agent: &str) {
        let change = UpdateAgentRequest {
            user_id: self.user.to_string(),
            agent_id: agent.to_owned(),
            version: 1,
            model: Some("newer".to_owned()),
            ..UpdateAgentRequest::default()
        };
        self.gateway.call::<rpc::UpdateAgent>(&change, SOON).await.unwrap();
    }
}

#[tokio::test]
async fn the_third_session_of_a_user_gets_a_sandbox_that_was_prepared_before() {
    let world = World::start_with(LIMITS).await;
    let agent = world.agent().await;
    let first = world.create(&agent, 1000).await.unwrap().session_id;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(world.spares("offered").await.is_empty(), "one creation may be the last one");
    let second = world.create(&agent, 1000).await.unwrap().session_id;
    let spare = world.wait_for_spares("offered", 1).await.remove(0);
    let unprepared = world.create(&agent, 1000).await.unwrap().session_id;
    assert_ne!(unprepared, spare, "no one prepared it");
    let prepared = world.prepare(&spare).await.unwrap();
    assert!(world.prepare(&spare).await.is_none(), "another runner prepares it");
    assert!(!prepared.lease_id.is_empty());
    world.end_preparation(&spare, true).await;

    let get = GetSessionRequest {
        user_id: world.user.to_string(),
        session_id: spare.clone(),
        ..GetSessionRequest::default()
    };
    let failure = world.gateway.call::<rpc::GetSession>(&get, SOON).await.unwrap_err();
    assert_eq!(failure.code, ErrorCode::NotFound);
    assert_eq!(world.listed().await, [unprepared.clone(), second.clone(), first.clone()]);
    let orphans = FindOrphansRequest { names: vec![prepared.sprite.clone()] };
    let orphans = world.runner.call::<rpc::FindOrphans>(&orphans, SOON).await.unwrap();
    assert_eq!(orphans.names, [""; 0]);

    let adopted = world.create(&agent, 1000).await.unwrap();
    assert_eq!((&*adopted.session_id, &*adopted.status), (&*spare, "pending"));
    assert_eq!(world.listed().await, [spare.clone(), unprepared, second, first]);
    let turn = world.run(&spare, 1).await;
    assert_eq!((turn.epoch, turn.prompt.as_str(), turn.is_prepared), (1, "echo", true));
    assert_eq!((turn.sprite, turn.conversation_id), (prepared.sprite, prepared.conversation_id));
    assert_eq!(world.complete(&spare, 1).await.status, "completed");
    world.counts_are_right().await;
    let another = world.wait_for_spares("offered", 2).await;
    assert!(!another.contains(&spare));
}

#[tokio::test]
async fn sessions_that_are_created_at_once_get_different_spares_and_another_attempt_none() {
    let world = World::start_with(LIMITS).await;
    world.run_scheduler(&Lifecycle::new()).await;
    let agent = world.agent().await;
    let spares = world.prepare_spares(&agent, 2).await;
    let key = Once { key: "a".to_owned(), body_hash: vec![1], is_of_one_request: false };
    let mut sessions = Vec::new();
    for once in [None, Some(key)] {
        let request = CreateSessionRequest {
            session_id: Uuid::now_v7().to_string(),
            once: once.clone(),
            ..world.session_of(&agent, 1000)
        };
        let attempts = (0..5).map(|_| world.gateway.call::<rpc::CreateSession>(&request, SOON));
        let mut replies = join_all(attempts).await.into_iter().map(|reply| {
            let reply = reply.unwrap();
            (reply.session.unwrap().session_id, reply.replayed)
        });
        let (session, replayed) = replies.next().unwrap();
        assert!(!replayed && replies.all(|other| other == (session.clone(), false)));
        sessions.push(session);
        if once.is_some() {
            let of_the_client =
                CreateSessionRequest { session_id: Uuid::now_v7().to_string(), ..request };
            let replay =
                world.gateway.call::<rpc::CreateSession>(&of_the_client, SOON).await.unwrap();
            assert_eq!(
                (replay.session.unwrap().session_id, replay.replayed),
                (sessions[1].clone(), true)
            );
        }
    }
    sessions.sort_unstable();
    assert_eq!(sessions, spares);

    let spares = world.wait_for_spares("offered", 2).await;
    for spare in &spares {
        assert!(world.prepare(spare).await.is_some());
        world.end_preparation(spare, true).await;
    }
    let created = join_all((0..6).map(|_| world.create(&agent, 1000))).await;
    let mut created: Vec<String> =
        created.into_iter().map(|session| session.unwrap().session_id).collect();
    created.sort_unstable();
    created.dedup();
    assert_eq!(created.len(), 6);
    assert!(spares.iter().all(|spare| created.contains(spare)), "{spares:?} {created:?}");
}

#[tokio::test]
async fn a_spare_is_ended_when_its_agent_changes_and_goes_to_no_other_template() {
    let world = World::start_with(LIMITS).await;
    let agent = world.agent().await;
    let spare = world.prepare_spares(&agent, 1).await.remove(0);
    let elsewhere = CreateSessionRequest {
        working_directory: Some("/elsewhere".to_owned()),
        ..world.session_of(&agent, 1000)
    };
    let other = world.gateway.call::<rpc::CreateSession>(&elsewhere, SOON).await.unwrap();
    assert_ne!(other.session.unwrap().session_id, spare);
    let mut with_secret = world.session_of(&agent, 1000);
    with_secret.secret_id = Some(Uuid::now_v7().to_string());
    let other = world.gateway.call::<rpc::CreateSession>(&with_secret, SOON).await.unwrap();
    assert_ne!(other.session.unwrap().session_id, spare);
    let of_a_stranger = CreateSessionRequest {
        user_id: UserId::new().to_string(),
        ..world.session_of(&agent, 1000)
    };
    let refused = world.gateway.call::<rpc::CreateSession>(&of_a_stranger, SOON).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::NotFound);
    world.change_agent(&agent).await;
    let changed = world.create(&agent, 1000).await.unwrap().session_id;
    assert_ne!(changed, spare, "it has the agent as it was");
    world.wait_for_spares("ready", 0).await;
    assert_eq!(world.to_destroy().await, [spare]);
}

#[tokio::test]
async fn a_spare_whose_preparation_fails_is_destroyed_and_not_repeated_at_once() {
    let world = World::start_with(LIMITS).await;
    let agent = world.agent().await;
    for _ in 0..2 {
        world.create(&agent, 1000).await.unwrap();
    }
    let spare = world.wait_for_spares("offered", 1).await.remove(0);
    assert!(world.prepare(&spare).await.is_some());
    world.end_preparation(&spare, false).await;
    assert_eq!(world.to_destroy().await, std::slice::from_ref(&spare));
    let claim = ClaimSpriteRequest {
        session_id: spare.clone(),
        public_key: vec![1; 32],
        ..ClaimSpriteRequest::default()
    };
    assert!(world.runner.call::<rpc::ClaimSprite>(&claim, SOON).await.is_ok());
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(world.spares("offered").await.is_empty());
    assert_ne!(world.create(&agent, 1000).await.unwrap().session_id, spare);
}

#[tokio::test]
async fn a_spare_whose_secrets_cannot_be_leased_is_not_taken_to_be_in_preparation() {
    let world = World::start_with(LIMITS).await;
    let agent = world.agent().await;
    for _ in 0..2 {
        world.create(&agent, 1000).await.unwrap();
    }
    let spare = world.wait_for_spares("offered", 1).await.remove(0);
    let claim = ClaimPreparationRequest {
        session_id: spare.clone(),
        runner: "r".to_owned(),
        public_key: vec![1; 32],
        // The vault refuses it.
        model_token_hash: vec![1],
        ..ClaimPreparationRequest::default()
    };
    assert!(world.runner.call::<rpc::ClaimPreparation>(&claim, SOON).await.is_err());
    assert_eq!(world.spares("failed").await, [spare]);
}

#[tokio::test]
async fn spares_are_ended_where_no_one_wants_them_any_more() {
    let world = World::start_with(LIMITS).await;
    let agent = world.agent().await;
    let spares = world.prepare_spares(&agent, 2).await;
    execute(&world, "update scheduler.session set created_at = created_at - interval '5 minutes'")
        .await;
    world.wait_for_spares("ready", 0).await;
    let mut destroyed = world.to_destroy().await;
    destroyed.sort_unstable();
    assert_eq!(destroyed, spares);
}

#[tokio::test]
async fn a_scheduler_that_is_set_to_have_no_spares_ends_those_that_are_there() {
    let mut world = World::start_with(LIMITS).await;
    let agent = world.agent().await;
    let spares = world.prepare_spares(&agent, 1).await;
    world.spares = Limits::default();
    world.run_scheduler(&Lifecycle::new()).await;
    eventually("it is ended", || async { world.to_destroy().await == spares }).await;
}

#[tokio::test]
async fn a_creation_that_is_sent_again_finds_its_session_also_when_spares_came_or_went() {
    let world = World::start_with(LIMITS).await;
    let agent = world.agent().await;
    let request = || CreateSessionRequest {
        session_id: Uuid::now_v7().to_string(),
        ..world.session_of(&agent, 1000)
    };
    let create = async |request: &CreateSessionRequest| {
        let reply = world.gateway.call::<rpc::CreateSession>(request, SOON).await.unwrap();
        reply.session.unwrap().session_id
    };
    let unprepared = request();
    let cold = create(&unprepared).await;
    let spares = world.prepare_spares(&agent, 2).await;
    assert_eq!(create(&unprepared).await, cold);
    let (first, second) = (request(), request());
    let mut adopted = [create(&first).await, create(&second).await];
    assert_eq!([create(&first).await, create(&second).await], adopted);
    adopted.sort_unstable();
    assert_eq!(spares, adopted);
}
