//! Random courses of events, compared with a model of the contract.

use super::*;

/// What a session is, by the contract alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Model {
    status: &'static str,
    turn: u32,
}

impl Model {
    fn is_active(self) -> bool {
        matches!(self.status, "pending" | "running")
    }
}

/// Random courses of everything that can happen to a session, each step compared with what the
/// contract says of it.
#[tokio::test]
async fn random_event_sequences_match_the_session_model() {
    let seed = fastrand::u64(..);
    let mut rng = fastrand::Rng::with_seed(seed);
    let (world, agent) = World::with_agent().await;
    let user = world.user.to_string();
    for course in 0..40 {
        let session = world.create(&agent, 1000).await.unwrap().session_id;
        let mut model = Some(Model { status: "pending", turn: 1 });
        let mut log = vec![format!("seed {seed}, course {course}")];
        for _ in 0..10 {
            let Some(now) = model else { break };
            let (ids, step) = ((user.clone(), session.clone()), rng.u8(..7));
            log.push(format!("{now:?}, step {step}"));
            match step {
                0 => {
                    let request = PromptRequest {
                        user_id: ids.0,
                        session_id: ids.1,
                        prompt: "p".to_owned(),
                        timeout_seconds: 60,
                        ..PromptRequest::default()
                    };
                    let done = world.gateway.call::<rpc::Prompt>(&request, SOON).await;
                    assert_eq!(done.is_ok(), now.status == "completed", "{log:?}");
                    if done.is_ok() {
                        model = Some(Model { status: "pending", turn: now.turn + 1 });
                    }
                }
                1 => {
                    let done = world
                        .gateway
                        .call::<rpc::Terminate>(
                            &TerminateRequest { user_id: ids.0, session_id: ids.1 },
                            SOON,
                        )
                        .await;
                    assert_eq!(done.is_ok(), now.status != "terminated", "{log:?}");
                    model = Some(Model { status: "terminated", ..now });
                }
                2 => {
                    let request = DeleteSessionRequest { user_id: ids.0, session_id: ids.1 };
                    let done = world.gateway.call::<rpc::DeleteSession>(&request, SOON).await;
                    assert_eq!(done.is_ok(), !now.is_active(), "{log:?}");
                    if done.is_ok() {
                        model = None;
                    }
                }
                3 => {
                    let id = world
                        .append(&session, now.turn, Kind::TurnStarted(TurnStarted::default()))
                        .await;
                    world.get(&session, id).await;
                    if now.status == "pending" {
                        model = Some(Model { status: "running", ..now });
                    }
                }
                // A takeover: another claim, and it changes nothing that a user sees.
                4 => {
                    let verdict = world.claim(&session, now.turn).await;
                    assert_eq!(matches!(verdict, Verdict::Run(_)), now.is_active(), "{log:?}");
                }
                // The end of this turn, or once more that of the one before.
                _ => {
                    let (code, stale) = (i32::from(rng.u8(..2)), now.turn > 1 && rng.bool());
                    let turn = if stale { now.turn - 1 } else { now.turn };
                    let id = world
                        .append(
                            &session,
                            turn,
                            Kind::TurnEnded(TurnEnded {
                                exit_code: Some(code),
                                ..TurnEnded::default()
                            }),
                        )
                        .await;
                    world.get(&session, id).await;
                    if now.is_active() && !stale {
                        model = Some(Model {
                            status: if code == 0 { "completed" } else { "failed" },
                            ..now
                        });
                    }
                }
            }
            let request = GetSessionRequest {
                user_id: user.clone(),
                session_id: session.clone(),
                recorded_through: 0,
                v1: false,
            };
            let seen = world.gateway.call::<rpc::GetSession>(&request, SOON).await.ok();
            let seen = seen.map(|session| (session.status, session.turn_count));
            assert_eq!(seen, model.map(|model| (model.status.to_owned(), model.turn)), "{log:?}");
        }
    }
    world.counts_are_right().await;
}

/// All at once on one session: termination wins over everything but deletion, and nothing is in
/// between.
#[tokio::test]
async fn concurrent_requests_end_in_one_state() {
    let (world, agent) = World::with_agent().await;
    let user = world.user.to_string();
    for round in 0..30 {
        let session = world.create(&agent, 1000).await.unwrap().session_id;
        if round % 2 == 0 {
            world.complete(&session, 1).await;
        }
        let prompt = PromptRequest {
            user_id: user.clone(),
            session_id: session.clone(),
            prompt: "p".to_owned(),
            timeout_seconds: 60,
            ..PromptRequest::default()
        };
        let terminate = TerminateRequest { user_id: user.clone(), session_id: session.clone() };
        let delete = DeleteSessionRequest { user_id: user.clone(), session_id: session.clone() };
        let (prompted, terminated, deleted, _, ended) = tokio::join!(
            world.gateway.call::<rpc::Prompt>(&prompt, SOON),
            world.gateway.call::<rpc::Terminate>(&terminate, SOON),
            world.gateway.call::<rpc::DeleteSession>(&delete, SOON),
            world.claim(&session, 1),
            world.append(
                &session,
                1,
                Kind::TurnEnded(TurnEnded { exit_code: Some(0), ..TurnEnded::default() })
            ),
        );
        assert!(
            terminated.is_ok() || deleted.is_ok(),
            "round {round}: {terminated:?}, {deleted:?}"
        );
        // Written down, whatever became of the session.
        eventually("the end is recorded", || async {
            let through: Option<i64> =
                sqlx::query_scalar("select event_id from scheduler.recorded")
                    .fetch_optional(&mut world.database.admin().await.unwrap())
                    .await
                    .unwrap();
            through.is_some_and(|through| through.unsigned_abs() >= ended)
        })
        .await;
        let request = GetSessionRequest {
            user_id: user.clone(),
            session_id: session.clone(),
            recorded_through: 0,
            v1: false,
        };
        match world.gateway.call::<rpc::GetSession>(&request, SOON).await {
            Ok(now) => {
                assert!(deleted.is_err());
                assert_eq!(
                    (now.status.as_str(), now.turn_count),
                    ("terminated", 1 + u32::from(prompted.is_ok()))
                );
            }
            Err(failure) => assert!(deleted.is_ok() && failure.code == ErrorCode::NotFound),
        }
    }
    world.counts_are_right().await;
}
