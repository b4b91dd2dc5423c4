//! What is removed when it is old or left over.

use super::*;

#[tokio::test]
async fn old_data_is_removed_and_newer_data_kept() {
    let (world, agent) = World::with_agent().await;
    let (old, new) = (
        world.create(&agent, 10).await.unwrap().session_id,
        world.create(&agent, 10).await.unwrap().session_id,
    );
    let active = world.create(&agent, 10).await.unwrap().session_id;
    for session in [&old, &new] {
        world.complete(session, 1).await;
    }
    let mut admin = world.database.admin().await.unwrap();
    let mut run =
        async |statement: &'static str| sqlx::raw_sql(statement).execute(&mut admin).await.unwrap();
    run("create table scheduler.event_20200101 partition of scheduler.event for values from ('2020-01-01') to ('2020-01-02');
         insert into scheduler.event (session_id, event_id, recorded_on, payload)
         select session_id, event_id - 1000000, '2020-01-01', payload from scheduler.event;
         alter table scheduler.event_20200101 owner to scheduler;
         create table scheduler.event_20200102 (detached_and_not_dropped integer);
         alter table scheduler.event_20200102 owner to scheduler")
    .await;
    let id: Uuid = old.parse().unwrap();
    for session in [id, active.parse().unwrap()] {
        sqlx::query("update scheduler.session set updated_at = now() - interval '4 days' where session_id = $1")
            .bind(session)
            .execute(&mut world.database.admin().await.unwrap())
            .await
            .unwrap();
    }
    // Another replica, which does what is to be done when it starts.
    world.run_scheduler(&Lifecycle::new()).await;
    let get = async |session: &str| {
        let request = GetSessionRequest {
            user_id: world.user.to_string(),
            session_id: session.to_owned(),
            recorded_through: 0,
            v1: false,
        };
        world.gateway.call::<rpc::GetSession>(&request, SOON).await
    };
    eventually("the old session is gone", || async {
        get(&old).await.is_err_and(|failure| failure.code == ErrorCode::NotFound)
    })
    .await;
    eventually("the old day is gone", || async {
        let there: bool = sqlx::query_scalar(
            "select coalesce(to_regclass('scheduler.event_20200101'), to_regclass('scheduler.event_20200102')) is not null",
        )
        .fetch_one(&mut world.database.admin().await.unwrap())
        .await
        .unwrap();
        !there
    })
    .await;
    // An active session is never old, and a stream whose first events were deleted continues with
    // the next one.
    assert!(get(&active).await.is_ok() && get(&new).await.is_ok());
    let read = ReadEventsRequest {
        session_id: new,
        after: 0,
        limit: 100,
        max_bytes: 0,
        before: None,
        without_output: false,
        ..ReadEventsRequest::default()
    };
    assert_eq!(world.gateway.call::<rpc::ReadEvents>(&read, SOON).await.unwrap().events.len(), 2);
}

/// A setting or a clock that is wrong is noticed before everything is gone.
#[tokio::test]
async fn one_day_of_events_is_dropped_in_an_hour_whichever_replica_starts() {
    let world = World::start().await;
    let mut admin = world.database.admin().await.unwrap();
    for day in ["20200103", "20200104", "20200105"] {
        let (year, month, date) = (&day[..4], &day[4..6], day[6..].parse::<u32>().unwrap());
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
            "create table scheduler.event_{day} partition of scheduler.event
                 for values from ('{year}-{month}-{date}') to ('{year}-{month}-{}');
             alter table scheduler.event_{day} owner to scheduler",
            date + 1
        )))
        .execute(&mut admin)
        .await
        .unwrap();
    }
    let days = async || {
        sqlx::query_scalar::<_, String>(
            "select relname::text from pg_class where relname like 'event\\_2020____' order by 1",
        )
        .fetch_all(&mut world.database.admin().await.unwrap())
        .await
        .unwrap()
    };
    for left in [&["event_20200104", "event_20200105"] as &[_], &["event_20200105"]] {
        for _ in 0..3 {
            world.run_scheduler(&Lifecycle::new()).await;
        }
        eventually("the oldest day is gone", || async { days().await == left }).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(days().await, left, "and no other");
        // An hour later.
        sqlx::raw_sql(
            "update scheduler.lease set expires_at = now() where name = 'event-retention'",
        )
        .execute(&mut admin)
        .await
        .unwrap();
    }
}

/// Between any two steps of a gateway: a row without bytes, bytes with a row that was never
/// finished, bytes that no row knows.
#[tokio::test]
async fn partial_files_of_killed_processes_are_removed() {
    let world = World::start().await;
    let directory = tempfile::tempdir().unwrap();
    let store = files::Files::open(&format!("file://{}", directory.path().display())).unwrap();
    let chunk = || futures::stream::iter([Ok::<_, ()>(bytes::Bytes::from_static(b"bytes"))]);
    let request = |id: &str| scheduler_messages::GetFileRequest {
        user_id: world.user.to_string(),
        file_id: id.to_owned(),
    };
    let mut ids = Vec::new();
    for _ in 0..4 {
        let create = scheduler_messages::CreateFileRequest {
            user_id: world.user.to_string(),
            file_id: types::FileId::new().to_string(),
            filename: "f".to_owned(),
            mime_type: "text/plain".to_owned(),
        };
        ids.push(world.gateway.call::<rpc::CreateFile>(&create, SOON).await.unwrap().file_id);
    }
    let [whole, deleted, unfinished, without_bytes] = [&ids[0], &ids[1], &ids[2], &ids[3]];
    for id in [whole, deleted, unfinished] {
        store.write(id.parse().unwrap(), 100, chunk()).await.unwrap();
    }
    for id in [whole, deleted] {
        let commit = scheduler_messages::CommitFileRequest {
            user_id: world.user.to_string(),
            file_id: id.clone(),
            size_bytes: 5,
            sha256: vec![1; 32],
            expires_in_seconds: None,
        };
        for _ in 0..2 {
            world.gateway.call::<rpc::CommitFile>(&commit, SOON).await.unwrap();
        }
    }
    world.gateway.call::<rpc::DeleteFile>(&request(deleted), SOON).await.unwrap();
    // A row is pending for an hour, and bytes without a row are looked for after two.
    let mut connection = world.database.admin().await.unwrap();
    for id in [unfinished, without_bytes] {
        let age = sqlx::query("update scheduler.file set state_since = now() - interval '2 hours' where file_id = $1::uuid").bind(id);
        age.execute(&mut connection).await.unwrap();
    }
    let lost = Uuid::now_v7();
    store.write(lost, 100, chunk()).await.unwrap();
    let name = lost.simple().to_string();
    let path = directory.path().join("objects").join(&name[name.len() - 2..]).join(&name);
    let three_hours_ago = std::time::SystemTime::now() - Duration::from_secs(3 * 60 * 60);
    std::fs::File::options().write(true).open(path).unwrap().set_modified(three_hours_ago).unwrap();

    world.run_scheduler_with(&Lifecycle::new(), Some(store.clone())).await;
    eventually("one object and one row are left", || async {
        use futures::TryStreamExt as _;
        let objects: Vec<Uuid> = store.older_than(Duration::ZERO, 10).try_concat().await.unwrap();
        let mut connection = world.database.admin().await.unwrap();
        let rows: Vec<Uuid> = sqlx::query_scalar("select file_id from scheduler.file")
            .fetch_all(&mut connection)
            .await
            .unwrap();
        objects == [whole.parse::<Uuid>().unwrap()] && rows == objects
    })
    .await;
    assert!(world.gateway.call::<rpc::GetFile>(&request(whole), SOON).await.is_ok());
    assert_eq!(
        world.gateway.call::<rpc::GetFile>(&request(unfinished), SOON).await.unwrap_err().code,
        ErrorCode::NotFound
    );
}
