//! What the Managed Agents API does with sessions beyond the original one.

use contract::scheduler::{Agent, ListRequest, UpdateSessionRequest};
use serde_json::{Map, Value};

use super::*;

impl World {
    async fn update(
        &self,
        session: &str,
        change: UpdateSessionRequest,
    ) -> Result<Session, RpcError> {
        let request = UpdateSessionRequest {
            user_id: self.user.to_string(),
            session_id: session.to_owned(),
            ..change
        };
        self.gateway.call::<rpc::UpdateSession>(&request, SOON * 2).await
    }

    async fn with_statuses(
        &self,
        statuses: &[&str],
        include_archived: bool,
        limit: u32,
    ) -> Vec<String> {
        let (mut ids, mut after) = (Vec::new(), None);
        loop {
            let request = ListRequest {
                user_id: self.user.to_string(),
                limit,
                after,
                v1_statuses: statuses.iter().map(|status| (*status).to_owned()).collect(),
                include_archived,
                is_v1: true,
                ..ListRequest::default()
            };
            let page = self.gateway.call::<rpc::ListSessions>(&request, SOON).await.unwrap();
            after = page
                .sessions
                .last()
                .map(|last| Cursor { position: last.created_at_us, id: last.session_id.clone() });
            ids.extend(page.sessions.into_iter().map(|session| session.session_id));
            if !page.has_more {
                return ids;
            }
        }
    }
}

#[tokio::test]
async fn sessions_are_listed_by_their_statuses_from_an_index() {
    let (world, agent) = World::with_agent().await;
    let mut all = Vec::new();
    for _ in 0..7 {
        all.push(world.create_idle(&agent).await);
    }
    let mut database = world.database.admin().await.unwrap();
    let changes = [
        "status = 'failed'",
        "status = 'failed', destroy_after = now()",
        "sprite_destroyed_at = now()",
        "status = 'terminated'",
        "status = 'terminated', archived_at = now()",
    ];
    for (session, change) in all.iter().zip(changes) {
        let change =
            format!("update scheduler.session set {change} where session_id = '{session}'");
        sqlx::raw_sql(sqlx::AssertSqlSafe(change)).execute(&mut database).await.unwrap();
    }
    let (waiting, running) = (
        world.create(&agent, 100).await.unwrap().session_id,
        world.create(&agent, 100).await.unwrap().session_id,
    );
    let waits =
        format!("update scheduler.turn set waiting_since = now() where session_id = '{waiting}'");
    sqlx::raw_sql(sqlx::AssertSqlSafe(waits)).execute(&mut database).await.unwrap();
    all.extend([waiting, running]);

    let of = |numbers: &[usize]| {
        numbers.iter().rev().map(|number| all[*number].clone()).collect::<Vec<_>>()
    };
    for (statuses, include_archived, expected) in [
        (&["idle"][..], false, &[0, 5, 6, 7][..]),
        (&["running"], true, &[8]),
        (&["terminated"], false, &[1, 2, 3]),
        (&["terminated"], true, &[1, 2, 3, 4]),
        (&["idle", "running"], false, &[0, 5, 6, 7, 8]),
        (&["running", "terminated", "rescheduling"], false, &[1, 2, 3, 8]),
        (&["rescheduling"], true, &[]),
        (&["idle", "running", "terminated"], true, &[0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (&[], false, &[0, 1, 2, 3, 5, 6, 7, 8]),
    ] {
        for limit in [2, 100] {
            assert_eq!(
                world.with_statuses(statuses, include_archived, limit).await,
                of(expected),
                "{statuses:?} {include_archived}"
            );
        }
    }
    let shown: Vec<(Uuid, String)> =
        sqlx::query_as("select session_id, scheduler.v1_status(s) from scheduler.session s")
            .fetch_all(&mut database)
            .await
            .unwrap();
    for status in ["idle", "running", "terminated"] {
        let listed = world.with_statuses(&[status], true, 100).await;
        let same = shown
            .iter()
            .filter(|(_, is)| is == status)
            .all(|(id, _)| listed.contains(&id.to_string()));
        assert!(
            same && listed.len() == shown.iter().filter(|(_, is)| is == status).count(),
            "{status}"
        );
    }

    // Among many idle ones the few others are found without a look at each.
    let many = format!(
        "insert into scheduler.session (session_id, user_id, agent_id, agent_version, runtime, sprite, conversation_id, metadata, resources,
                                        event_partition, status, turn_count)
         select gen_random_uuid(), user_id, agent_id, agent_version, runtime, 'aod-' || number, conversation_id, metadata, resources,
                event_partition, 'completed', 0
         from scheduler.session, generate_series(1, 5000) as number where session_id = '{}'",
        all[0]
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(many)).execute(&mut database).await.unwrap();
    sqlx::raw_sql("vacuum analyze scheduler.session").execute(&mut database).await.unwrap();
    let explain = format!(
        "explain (analyze, buffers, format json)
         select session_id, created_at from scheduler.session
         where user_id = '{}' and scheduler.v1_class(status, archived_at, sprite_destroyed_at, destroy_after) = 'terminated'
         order by created_at desc, session_id desc limit 21",
        world.user
    );
    let plan: Value =
        sqlx::query_scalar(sqlx::AssertSqlSafe(explain)).fetch_one(&mut database).await.unwrap();
    let text = plan.to_string();
    let pages = plan[0]["Plan"]["Shared Hit Blocks"].as_i64().unwrap()
        + plan[0]["Plan"]["Shared Read Blocks"].as_i64().unwrap();
    assert!(
        text.contains("session_by_class") && !text.contains("Sort") && pages < 20,
        "{pages} {text}"
    );
}

#[tokio::test]
async fn metadata_has_its_limit_whatever_changes_at_once() {
    let world = World::start().await;
    let session = world.create_idle(&world.agent().await).await;
    let change = |number: usize| {
        let keys: Map<String, Value> =
            (0..8).map(|key| (format!("k{number}-{key}"), "x".into())).collect();
        UpdateSessionRequest {
            metadata: Some(Value::Object(keys).to_string()),
            ..UpdateSessionRequest::default()
        }
    };
    let results = join_all((0..6).map(|number| world.update(&session, change(number)))).await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 2);
    let refused = results.into_iter().find_map(Result::err).unwrap();
    assert_eq!(
        (refused.code, refused.message.as_str()),
        (ErrorCode::InvalidArgument, "metadata: must hold at most 16 keys")
    );
    let metadata: Map<String, Value> =
        serde_json::from_str(&world.get(&session, 0).await.metadata).unwrap();
    assert_eq!(metadata.len(), 16);
}

/// A session's own version of its agent.
fn own(agent: &str, description: &str, secret: Uuid) -> Agent {
    Agent {
        agent_id: agent.to_owned(),
        name: "a".to_owned(),
        description: description.to_owned(),
        model: "none".to_owned(),
        runtime: "shell".to_owned(),
        metadata: "{}".to_owned(),
        skills: "[]".to_owned(),
        mcp_servers: "[]".to_owned(),
        mcp_secret_id: Some(secret.to_string()),
        version: 1,
        ..Agent::default()
    }
}

#[tokio::test]
async fn changes_of_an_agent_follow_each_other_and_go_with_their_session() {
    let world = World::start().await;
    let (shared, first, second) = (Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7());
    let new = CreateAgentRequest { mcp_secret_id: Some(shared.to_string()), ..world.new_agent() };
    let agent =
        world.gateway.call::<rpc::CreateAgent>(&new, SOON).await.unwrap().agent.unwrap().agent_id;
    let create = CreateSessionRequest {
        is_v1: true,
        prompt: String::new(),
        agent_override: Some(own(&agent, "at creation", shared)),
        ..world.session_of(&agent, 100)
    };
    let session =
        world.gateway.call::<rpc::CreateSession>(&create, SOON).await.unwrap().session.unwrap();
    let (id, mut read) = (session.session_id, session.agent_row_version);
    for secret in [first, second] {
        let change = UpdateSessionRequest {
            agent: Some(own(&agent, &secret.to_string(), secret)),
            agent_row_version: Some(read),
            ..UpdateSessionRequest::default()
        };
        let changed = world.update(&id, change.clone()).await.unwrap().agent_row_version;
        // Another that was made from the same version would undo this one.
        let late = world.update(&id, change).await.unwrap_err();
        assert_eq!((late.code, late.reason), (ErrorCode::Conflict, None));
        read = changed;
    }

    let mut database = world.database.admin().await.unwrap();
    sqlx::raw_sql(
        "create table public.forgotten (secret_id uuid);
         create function public.note() returns trigger language plpgsql security definer as
             $$ begin insert into public.forgotten values (new.secret_id); return new; end $$;
         create trigger note before insert on scheduler.unused_secret for each row execute function public.note()",
    )
    .execute(&mut database)
    .await
    .unwrap();
    let own_versions = "select count(*) from scheduler.agent_version where version < 0";
    assert_eq!(
        sqlx::query_scalar::<_, i64>(own_versions).fetch_one(&mut database).await.unwrap(),
        3
    );
    let delete = DeleteSessionRequest { user_id: world.user.to_string(), session_id: id };
    world.gateway.call::<rpc::DeleteSession>(&delete, SOON).await.unwrap();
    assert_eq!(
        sqlx::query_scalar::<_, i64>(own_versions).fetch_one(&mut database).await.unwrap(),
        0
    );
    let mut forgotten: Vec<Uuid> = sqlx::query_scalar("select secret_id from public.forgotten")
        .fetch_all(&mut database)
        .await
        .unwrap();
    forgotten.sort();
    assert_eq!(forgotten, [first, second], "not the one that the agent itself has");
}

#[tokio::test]
async fn a_new_session_is_answered_with_the_agent_that_reading_it_shows() {
    let (world, agent) = World::with_agent().await;
    let change = UpdateAgentRequest {
        user_id: world.user.to_string(),
        agent_id: agent.clone(),
        version: 1,
        name: Some("renamed".to_owned()),
        model: Some("newer".to_owned()),
        ..UpdateAgentRequest::default()
    };
    world.gateway.call::<rpc::UpdateAgent>(&change, SOON).await.unwrap();
    for version in [None, Some(1), Some(2)] {
        let once = Once { key: format!("{version:?}"), body_hash: vec![1], ..Once::default() };
        let create = CreateSessionRequest {
            is_v1: true,
            prompt: String::new(),
            agent_version: version,
            session_id: SessionId::new().to_string(),
            once: Some(once),
            ..world.session_of(&agent, 100)
        };
        let created = world.gateway.call::<rpc::CreateSession>(&create, SOON).await.unwrap();
        let session = created.session.unwrap();
        let shown = session.agent.unwrap();
        assert_eq!(shown.version, version.unwrap_or(2));
        let get = GetSessionRequest {
            user_id: world.user.to_string(),
            session_id: session.session_id,
            recorded_through: 0,
            v1: true,
        };
        let read = world.gateway.call::<rpc::GetSession>(&get, SOON).await.unwrap();
        assert_eq!(read.agent.as_ref(), Some(&shown));
        let again = CreateSessionRequest { session_id: SessionId::new().to_string(), ..create };
        let again = world.gateway.call::<rpc::CreateSession>(&again, SOON).await.unwrap();
        assert!(again.replayed);
        assert_eq!(again.session.unwrap().agent, Some(shown));
    }
}
