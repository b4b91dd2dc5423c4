//! Inputs and permission requests of running turns.

use super::*;

impl World {
    /// A session of a runtime, its first turn running; the claim's epoch.
    async fn running(&self, runtime: &str, permissions: &str) -> (String, TurnSpec) {
        let request = CreateAgentRequest {
            user_id: self.user.to_string(),
            name: "a".to_owned(),
            system: "be brief".to_owned(),
            model: if runtime == "gemini" { "google/g" } else { "anthropic/c" }.to_owned(),
            runtime: runtime.to_owned(),
            metadata: "{}".to_owned(),
            skills: "[]".to_owned(),
            mcp_servers: "[]".to_owned(),
            permissions: permissions.to_owned(),
            ..CreateAgentRequest::default()
        };
        let agent = self
            .gateway
            .call::<rpc::CreateAgent>(&request, SOON)
            .await
            .unwrap()
            .agent
            .unwrap()
            .agent_id;
        let request = CreateSessionRequest {
            user_id: self.user.to_string(),
            agent_id: agent,
            prompt: "first".to_owned(),
            timeout_seconds: 60,
            credential_kinds: vec![
                "backend:sprites".to_owned(),
                "provider:anthropic".to_owned(),
                "provider:google".to_owned(),
            ],
            session_limit: 100,
            metadata: "{}".to_owned(),
            resources: "[]".to_owned(),
            ..CreateSessionRequest::default()
        };
        let session = self
            .gateway
            .call::<rpc::CreateSession>(&request, SOON)
            .await
            .unwrap()
            .session
            .unwrap()
            .session_id;
        let spec = self.begin(&session, 1).await;
        (session, spec)
    }

    pub(super) async fn begin(&self, session: &str, turn: u32) -> TurnSpec {
        let spec = self.run(session, turn).await;
        let started = self.append(session, turn, Kind::TurnStarted(TurnStarted::default())).await;
        self.get(session, started).await;
        spec
    }

    async fn prompt(
        &self,
        session: &str,
        prompt: &str,
        when_busy: &str,
    ) -> Result<Session, RpcError> {
        let request = PromptRequest {
            user_id: self.user.to_string(),
            session_id: session.to_owned(),
            prompt: prompt.to_owned(),
            timeout_seconds: 60,
            when_busy: when_busy.to_owned(),
            key_id: KEY.to_owned(),
            ..PromptRequest::default()
        };
        Ok(self.gateway.call::<rpc::Prompt>(&request, SOON).await?.session.unwrap())
    }

    async fn fetch(&self, session: &str, turn: u32, epoch: u32) -> Vec<host::Input> {
        let request = FetchInputsRequest { session_id: session.to_owned(), turn, epoch };
        self.runner.call::<rpc::FetchInputs>(&request, SOON).await.unwrap().inputs
    }

    /// Inputs by their texts, and what became of them, oldest first.
    async fn inputs(&self, session: &str) -> Vec<(String, String, String)> {
        let request = ListPartsRequest {
            user_id: self.user.to_string(),
            id: session.to_owned(),
            limit: 100,
            after: None,
        };
        let inputs = self.gateway.call::<rpc::ListInputs>(&request, SOON).await.unwrap().inputs;
        let describe = |input: scheduler_messages::Input| {
            assert!(input.key_id == KEY || input.key_id.is_empty(), "{input:?}");
            (
                if input.text.is_empty() { input.kind } else { input.text },
                input.status,
                input.message,
            )
        };
        inputs.into_iter().rev().map(describe).collect()
    }

    async fn requests(&self, session: &str) -> Vec<PermissionRequest> {
        let request = ListPermissionRequestsRequest {
            user_id: self.user.to_string(),
            session_id: session.to_owned(),
            limit: 100,
            ..ListPermissionRequestsRequest::default()
        };
        self.gateway.call::<rpc::ListPermissionRequests>(&request, SOON).await.unwrap().requests
    }

    async fn decide(
        &self,
        session: &str,
        request_id: u64,
        verdict: &str,
        message: &str,
    ) -> Result<PermissionRequest, RpcError> {
        let request = DecideRequest {
            user_id: self.user.to_string(),
            session_id: session.to_owned(),
            request_id,
            verdict: verdict.to_owned(),
            message: message.to_owned(),
            key_id: KEY.to_owned(),
        };
        self.gateway.call::<rpc::Decide>(&request, SOON).await
    }

    async fn ended(&self, session: &str, turn: u32, code: i32, stop_reason: StopReason) -> Session {
        let ended = TurnEnded {
            exit_code: Some(code),
            stop_reason: stop_reason.into(),
            ..TurnEnded::default()
        };
        let end = self.append(session, turn, Kind::TurnEnded(ended)).await;
        self.get(session, end).await
    }

    async fn settled(
        &self,
        session: &str,
        turn: u32,
        input: &str,
        outcome: Outcome,
        message: &str,
    ) {
        let settled = host::InputSettled {
            id: input.to_owned(),
            outcome: outcome.into(),
            message: message.to_owned(),
        };
        let event = InputSettled { settled: Some(settled), ..InputSettled::default() };
        let id = self.append(session, turn, Kind::InputSettled(event)).await;
        self.get(session, id).await;
    }

    /// The agent asks; the id of its tool use is 1000 and the journal's id of the request.
    async fn asks(&self, session: &str, turn: u32, journal_id: u64) -> u64 {
        let request = host::DecisionRequested {
            id: journal_id,
            tool: "Bash".to_owned(),
            input_json: r#"{"command":"rm x"}"#.to_owned(),
            ..host::DecisionRequested::default()
        };
        let tool_use = 1000 + journal_id;
        let id = self
            .append(
                session,
                turn,
                Kind::DecisionRequested(DecisionRequested { request: Some(request), tool_use }),
            )
            .await;
        self.get(session, id).await;
        tool_use
    }

    async fn answered(&self, session: &str, turn: u32, journal_id: u64, how: How, input: &str) {
        let settled =
            host::DecisionSettled { id: journal_id, how: how.into(), input_id: input.to_owned() };
        let event = DecisionSettled {
            settled: Some(settled),
            tool_use: 1000 + journal_id,
            ..DecisionSettled::default()
        };
        let id = self.append(session, turn, Kind::DecisionSettled(event)).await;
        self.get(session, id).await;
    }
}

const KEY: &str = "0190a0b0-0000-7000-8000-000000000001";

fn row(text: &str, status: &str, reason: &str) -> (String, String, String) {
    (text.to_owned(), status.to_owned(), reason.to_owned())
}

#[tokio::test]
async fn queued_messages_begin_the_next_turns_in_order_and_can_be_changed_until_then() {
    let world = World::start().await;
    let (session, spec) = world.running("claude", "").await;
    assert_eq!(spec.system, "be brief");
    let refused = world.prompt(&session, "no", "").await.unwrap_err();
    assert_eq!(
        (refused.code, refused.message.as_str()),
        (ErrorCode::Conflict, "Session is already running")
    );
    let mut ids = Vec::new();
    for text in ["second", "third", "fourth"] {
        let accepted = world.prompt(&session, text, "queue").await.unwrap();
        assert_eq!((accepted.status.as_str(), accepted.turn_count), ("running", 1));
        ids.push(accepted.input.unwrap().input_id);
    }
    assert_eq!(world.get(&session, 0).await.queued_inputs, Some(3));
    assert!(
        world.fetch(&session, 1, spec.epoch).await.is_empty(),
        "a queued message waits in the scheduler"
    );

    let (user_id, session_id) = (world.user.to_string(), session.clone());
    let change = ChangeInputRequest {
        user_id,
        session_id,
        input_id: ids[0].clone(),
        text: "second, changed".to_owned(),
    };
    world.gateway.call::<rpc::ChangeInput>(&change, SOON).await.unwrap();
    let (user_id, session_id) = (world.user.to_string(), session.clone());
    let withdraw = WithdrawInputRequest { user_id, session_id, input_id: ids[1].clone() };
    assert_eq!(
        world.gateway.call::<rpc::WithdrawInput>(&withdraw, SOON).await.unwrap().status,
        "withdrawn"
    );
    let again = world.gateway.call::<rpc::WithdrawInput>(&withdraw, SOON).await.unwrap_err();
    assert_eq!(
        (again.code, again.message.as_str()),
        (ErrorCode::Conflict, "Input is not queued any more")
    );

    let after = world.ended(&session, 1, 0, StopReason::EndTurn).await;
    assert_eq!(
        (after.status.as_str(), after.turn_count),
        ("pending", 2),
        "the next turn begins in the transaction of the end"
    );
    let spec = world.begin(&session, 2).await;
    assert_eq!(
        (spec.prompt.as_str(), spec.input_id.as_str(), spec.system.as_str()),
        ("second, changed", ids[0].as_str(), "be brief")
    );
    let refused = world.gateway.call::<rpc::ChangeInput>(&change, SOON).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Conflict);

    // A turn that fails refuses the queued messages.
    assert_eq!(world.ended(&session, 2, 1, StopReason::Unspecified).await.status, "failed");
    let expected = [
        row("second, changed", "applied", ""),
        row("third", "withdrawn", ""),
        row("fourth", "refused", "the session failed"),
    ];
    assert_eq!(world.inputs(&session).await, expected);
    assert_eq!(world.prompt(&session, "no", "queue").await.unwrap_err().code, ErrorCode::Conflict);
    world.counts_are_right().await;
}

#[tokio::test]
async fn an_interrupt_reaches_the_turns_owner_alone_until_the_log_settles_it() {
    let world = World::start().await;
    let (session, spec) = world.running("shell", "").await;
    let interrupt = InterruptRequest {
        user_id: world.user.to_string(),
        session_id: session.clone(),
        key_id: KEY.to_owned(),
    };
    let input = world.gateway.call::<rpc::Interrupt>(&interrupt, SOON).await.unwrap();
    let again = world.gateway.call::<rpc::Interrupt>(&interrupt, SOON).await.unwrap();
    assert_eq!(input.input_id, again.input_id, "one interrupt at a time");

    let held = HeldTurn { session_id: session.clone(), turn: 1, epoch: spec.epoch, ended: None };
    assert_eq!(world.heartbeat(world.lease, false, vec![held.clone()]).await.with_inputs, [held]);
    assert!(
        world.fetch(&session, 1, spec.epoch + 1).await.is_empty()
            && world.fetch(&session, 2, spec.epoch).await.is_empty()
    );
    for _ in 0..2 {
        let fetched = world.fetch(&session, 1, spec.epoch).await;
        assert_eq!(
            fetched,
            [host::Input {
                id: input.input_id.clone(),
                kind: Some(host::input::Kind::Interrupt(host::Interrupt { turn: 1 }))
            }]
        );
    }
    assert_eq!(world.inputs(&session).await, [row("interrupt", "delivered", "")]);
    assert_eq!(world.ended(&session, 1, 0, StopReason::Interrupted).await.status, "completed");
    assert_eq!(world.inputs(&session).await, [row("interrupt", "applied", "")]);
    let refused = world.gateway.call::<rpc::Interrupt>(&interrupt, SOON).await.unwrap_err();
    assert_eq!(
        (refused.code, refused.message.as_str()),
        (ErrorCode::Conflict, "No turn is running")
    );

    // One that comes too late, together with a message that waits for the end.
    world.prompt(&session, "next", "").await.unwrap();
    world.begin(&session, 2).await;
    world.prompt(&session, "after", "interrupt").await.unwrap();
    let after = world.ended(&session, 2, 0, StopReason::EndTurn).await;
    assert_eq!((after.status.as_str(), after.turn_count), ("pending", 3));
    let inputs = world.inputs(&session).await;
    assert_eq!(
        inputs[1..],
        [row("after", "delivered", ""), row("interrupt", "refused", "the turn had ended")]
    );
}

#[tokio::test]
async fn a_reader_finds_its_place_after_whatever_was_sent() {
    let world = World::start().await;
    let (session, _) = world.running("shell", "").await;
    let find = async |input_id: &str| {
        let (user_id, session_id, input_id) =
            (world.user.to_string(), session.clone(), input_id.to_owned());
        let found = world
            .gateway
            .call::<rpc::FindTurn>(
                &FindTurnRequest { user_id, session_id, input_id, ..FindTurnRequest::default() },
                SOON,
            )
            .await?;
        Ok::<_, RpcError>((found.turn, found.after, found.is_within))
    };
    let mut queued = Vec::new();
    for _ in 0..3 {
        queued.push(
            world
                .prompt(&session, &"x".repeat(2_000_000), "queue")
                .await
                .unwrap()
                .input
                .unwrap()
                .input_id,
        );
    }
    let interrupt = InterruptRequest {
        user_id: world.user.to_string(),
        session_id: session.clone(),
        key_id: KEY.to_owned(),
    };
    let late = world.gateway.call::<rpc::Interrupt>(&interrupt, SOON).await.unwrap().input_id;

    // No reader waits for those who write, and a queue of many bytes is read in pages.
    let mut writer = world.database.admin().await.unwrap();
    let mut tx = writer.begin().await.unwrap();
    sqlx::query("select from scheduler.input for update").execute(&mut *tx).await.unwrap();
    let (mut open, mut after, mut pages) = (Vec::new(), None, 0);
    loop {
        let list = ListPartsRequest {
            user_id: world.user.to_string(),
            id: session.clone(),
            limit: 100,
            after,
        };
        let page = world.gateway.call::<rpc::ListOpenInputs>(&list, SOON).await.unwrap();
        open.extend(page.inputs.iter().map(|input| input.input_id.clone()));
        after = page
            .inputs
            .last()
            .map(|last| Cursor { position: last.created_at_us, id: last.input_id.clone() });
        pages += 1;
        if !page.has_more {
            break;
        }
    }
    assert_eq!((&open[..3], open.get(3), pages > 1), (&queued[..], Some(&late), true));
    let (turn, newest, is_within) = find(&queued[0]).await.unwrap();
    assert_eq!((turn, is_within), (1, false), "what is queued follows all that is in the log");
    tx.rollback().await.unwrap();

    let ended = TurnEnded {
        exit_code: Some(0),
        stop_reason: StopReason::EndTurn.into(),
        ..TurnEnded::default()
    };
    let end = world.append(&session, 1, Kind::TurnEnded(ended)).await;
    world.get(&session, end).await;
    assert!(newest < end);
    assert_eq!(
        find(&late).await.unwrap(),
        (1, end, true),
        "the turn's end refused it, and nothing shows it"
    );
    assert_eq!(find(&queued[2]).await.unwrap(), (2, end, false));
    world.run(&session, 2).await;
    let started = world.append(&session, 2, Kind::TurnStarted(TurnStarted::default())).await;
    world.get(&session, started).await;
    assert_eq!(find(&queued[0]).await.unwrap(), (2, started, true));
    let (user_id, session_id, input_id) =
        (world.user.to_string(), session.clone(), queued[1].clone());
    world
        .gateway
        .call::<rpc::WithdrawInput>(&WithdrawInputRequest { user_id, session_id, input_id }, SOON)
        .await
        .unwrap();
    assert_eq!(
        find(&queued[1]).await.unwrap(),
        (1, newest, false),
        "where it was when it was sent"
    );
    assert_eq!(find(KEY).await.unwrap_err().code, ErrorCode::NotFound);
}

#[tokio::test]
async fn a_message_that_cannot_join_its_turn_begins_the_next_one() {
    let world = World::start().await;
    let (session, _) = world.running("gemini", "").await;
    let refused = world.prompt(&session, "no", "steer").await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Unprocessable);
    assert!(refused.message.contains("gemini"), "{refused:?}");

    let (session, spec) = world.running("claude", "").await;
    world.prompt(&session, "joins", "steer").await.unwrap();
    world.prompt(&session, "too late", "steer").await.unwrap();
    let fetched = world.fetch(&session, 1, spec.epoch).await;
    let joins = |input: &host::Input| matches!(&input.kind, Some(host::input::Kind::Message(message)) if message.when_busy() == WhenBusy::Join);
    assert!(fetched.len() == 2 && fetched.iter().all(joins), "{fetched:?}");
    world.settled(&session, 1, &fetched[0].id, Outcome::Applied, "").await;
    // Twice: a runner that took over wrote it again.
    world.settled(&session, 1, &fetched[0].id, Outcome::Refused, "late").await;
    world
        .settled(&session, 1, &fetched[1].id, Outcome::Refused, "no running turn takes a message")
        .await;
    assert_eq!(
        world.inputs(&session).await,
        [row("joins", "applied", ""), row("too late", "queued", "")]
    );
    world.ended(&session, 1, 0, StopReason::EndTurn).await;
    let spec = world.begin(&session, 2).await;
    assert_eq!(
        (spec.prompt.as_str(), spec.input_id.as_str()),
        ("too late", ""),
        "a host knows that id already"
    );
    assert_eq!(
        world.inputs(&session).await,
        [row("joins", "applied", ""), row("too late", "applied", "")]
    );
}

#[tokio::test]
async fn a_request_is_answered_once_and_its_turn_waits_without_a_deadline() {
    let mut world = World::start().await;
    let (session, spec) = world.running("claude", r#"{"default":"ask"}"#).await;
    assert_eq!(spec.permissions, r#"{"rules":[],"default":"ask"}"#);
    let request = world.asks(&session, 1, 7).await;
    assert_eq!(
        world.get(&session, 0).await.waiting_on.unwrap(),
        format!("a decision on Bash (request {request})")
    );

    // Far beyond its deadline, the turn waits on.
    execute(
        &world,
        "update scheduler.turn set deadline_at = deadline_at - interval '1 hour', waiting_since = waiting_since - interval '1 hour'",
    )
    .await;
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(world.get(&session, 0).await.status, "running");

    assert_eq!(
        world.decide(&session, request + 1, "allow", "").await.unwrap_err().code,
        ErrorCode::NotFound
    );
    let answers =
        join_all((0..5).map(|_| world.decide(&session, request, "deny", "not that"))).await;
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 1);
    let refused = answers.into_iter().find_map(Result::err).unwrap();
    assert_eq!(
        (refused.code, refused.message.as_str()),
        (ErrorCode::Conflict, "Request has been answered already")
    );
    world.fall_silent();
    eventually("its owner's lease has expired", || async {
        world.fetch(&session, 1, spec.epoch).await.is_empty()
    })
    .await;
    let epoch = world.run(&session, 1).await.epoch;
    let fetched = world.fetch(&session, 1, epoch).await;
    let decision = host::Decision {
        request: 7,
        verdict: host::decision::Verdict::Deny.into(),
        message: "not that".to_owned(),
    };
    assert_eq!(fetched[0].kind, Some(host::input::Kind::Decision(decision)));

    world.answered(&session, 1, 7, How::Denied, &fetched[0].id).await;
    world.settled(&session, 1, &fetched[0].id, Outcome::Applied, "").await;
    let requests = world.requests(&session).await;
    let answer = requests[0].answer.clone().unwrap();
    assert_eq!(
        (requests[0].status.as_str(), answer.status.as_str(), answer.key_id.as_str()),
        ("denied", "applied", KEY)
    );
    let left: f64 = sqlx::query_scalar(
        "select extract(epoch from deadline_at - now())::float8 from scheduler.turn",
    )
    .fetch_one(&mut world.database.admin().await.unwrap())
    .await
    .unwrap();
    assert!(
        (60.0..=121.0).contains(&left),
        "the time that it waited is not its own: {left} s are left"
    );
    assert_eq!(world.ended(&session, 1, 0, StopReason::EndTurn).await.status, "completed");
}

#[tokio::test]
async fn an_answer_that_a_lost_agent_missed_is_sent_again_when_it_asks_again() {
    let world = World::start().await;
    let (session, spec) = world.running("claude", r#"{"default":"ask"}"#).await;
    let request = world.asks(&session, 1, 7).await;
    world.decide(&session, request, "allow", "").await.unwrap();
    world.answered(&session, 1, 7, How::Void, "").await;
    assert_eq!(
        world.inputs(&session).await,
        [row("decision", "refused", "the agent does not ask any more")]
    );
    world.asks(&session, 1, 9).await;
    let fetched = world.fetch(&session, 1, spec.epoch).await;
    let Some(host::input::Kind::Decision(decision)) = &fetched[0].kind else {
        unreachable!("{fetched:?}")
    };
    assert_eq!((decision.request, decision.verdict()), (9, host::decision::Verdict::Allow));
    world.answered(&session, 1, 9, How::Allowed, &fetched[0].id).await;
    world.settled(&session, 1, &fetched[0].id, Outcome::Applied, "").await;
    // The same once more is another question.
    let request = world.asks(&session, 1, 11).await;
    assert!(world.fetch(&session, 1, spec.epoch).await.is_empty());
    world.ended(&session, 1, 0, StopReason::Interrupted).await;
    assert_eq!(world.requests(&session).await[0].status, "void");
    assert_eq!(
        world.decide(&session, request, "allow", "").await.unwrap_err().message,
        "Request is not open any more"
    );
}

#[tokio::test]
async fn an_agent_may_say_how_a_request_is_decided_that_no_one_answers() {
    let world = World::start().await;
    let (session, spec) = world
        .running("claude", r#"{"default":"ask","timeout_seconds":1,"on_timeout":"allow"}"#)
        .await;
    world.asks(&session, 1, 7).await;
    eventually("the request is decided", || async {
        !world.fetch(&session, 1, spec.epoch).await.is_empty()
    })
    .await;
    let fetched = world.fetch(&session, 1, spec.epoch).await;
    let Some(host::input::Kind::Decision(decision)) = &fetched[0].kind else {
        unreachable!("{fetched:?}")
    };
    assert_eq!(decision.verdict(), host::decision::Verdict::Allow);
    assert_eq!(
        world.requests(&session).await[0].answer.as_ref().unwrap().key_id,
        "",
        "no one answered"
    );
}

#[tokio::test]
async fn a_request_is_decided_while_an_earlier_one_cannot_be() {
    let world = World::start().await;
    let policy = r#"{"default":"ask","timeout_seconds":1,"on_timeout":"allow"}"#;
    let (held_up, _) = world.running("claude", policy).await;
    let (session, spec) = world.running("claude", policy).await;
    world.asks(&held_up, 1, 7).await;
    let mut database = world.database.admin().await.unwrap();
    let mut lock = database.begin().await.unwrap();
    sqlx::query("select from scheduler.session where session_id = $1 for update")
        .bind(held_up.parse::<SessionId>().unwrap().uuid())
        .execute(&mut *lock)
        .await
        .unwrap();
    world.asks(&session, 1, 7).await;
    eventually("the later request is decided", || async {
        !world.fetch(&session, 1, spec.epoch).await.is_empty()
    })
    .await;
    lock.commit().await.unwrap();
}

#[tokio::test]
async fn permissions_are_refused_for_a_runtime_that_cannot_ask() {
    let world = World::start().await;
    let request = CreateAgentRequest {
        user_id: world.user.to_string(),
        model: "none".to_owned(),
        runtime: "shell".to_owned(),
        metadata: "{}".to_owned(),
        skills: "[]".to_owned(),
        mcp_servers: "[]".to_owned(),
        permissions: r#"{"rules":[{"tool":"Bash","evaluation":"deny"}]}"#.to_owned(),
        ..CreateAgentRequest::default()
    };
    let refused = world.gateway.call::<rpc::CreateAgent>(&request, SOON).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Unprocessable);
    assert!(refused.message.contains("shell"), "{refused:?}");
}

#[tokio::test]
async fn each_interrupt_has_an_id_of_its_own_and_one_of_them_is_delivered() {
    let world = World::start().await;
    let (session, spec) = world.running("shell", "").await;
    let interrupt =
        || SentEvent { kind: Some(Sent::Interrupt(contract::scheduler::SentInterrupt {})) };
    let send = SendEventsRequest {
        user_id: world.user.to_string(),
        session_id: session.clone(),
        events: vec![interrupt(), interrupt()],
        timeout_seconds: 60,
        ..SendEventsRequest::default()
    };
    let sent = world.gateway.call::<rpc::SendEvents>(&send, SOON).await.unwrap();
    let [first, second] = &sent.inputs[..] else { unreachable!("{sent:?}") };
    assert_ne!(first.input_id, second.input_id);
    assert!(first.settled_at_us.is_none() && second.settled_at_us.is_some());
    assert_eq!(world.fetch(&session, 1, spec.epoch).await.len(), 1);
}
