//! Model requests as the model gateway begins and ends them: entries for the log, totals, budgets.

use std::collections::BTreeSet;

use contract::{
    scheduler::{
        BeginModelRequestRequest, Budget, BudgetChange, EndModelRequestRequest,
        FetchModelRequestsReply, FetchModelRequestsRequest, GetBudgetRequest, LimitChange,
        ListUsageRequest, RecordModelRequestsRequest, RenewModelGatewayRequest, SetBudgetRequest,
        UsageSum, begin_model_request_reply::Verdict as Admission, meter_entry,
    },
    session::Usage,
};

use super::*;

/// A process of the model gateway.
struct Models {
    bus: Bus,
    gateway: Uuid,
}

impl Models {
    async fn start(world: &World) -> Self {
        let models = Self {
            bus: world.nats.connect(&access::MODEL_GATEWAY).await.unwrap(),
            gateway: Uuid::now_v7(),
        };
        let renew = RenewModelGatewayRequest { gateway_id: models.gateway.to_string() };
        models.bus.call::<rpc::RenewModelGateway>(&renew, SOON).await.unwrap();
        models
    }

    fn request(&self, session: &str, tokens: u64) -> BeginModelRequestRequest {
        BeginModelRequestRequest {
            request_id: Uuid::now_v7().to_string(),
            session_id: session.to_owned(),
            gateway_id: self.gateway.to_string(),
            provider: "anthropic".to_owned(),
            model: "claude-x".to_owned(),
            key: "provider:anthropic".to_owned(),
            estimated_tokens: tokens,
            estimated_cost_micro_usd: Some(tokens),
        }
    }

    async fn begin(&self, request: &BeginModelRequestRequest) -> Admission {
        self.bus.call::<rpc::BeginModelRequest>(request, SOON).await.unwrap().verdict.unwrap()
    }

    async fn end(&self, request: &BeginModelRequestRequest, tokens: u64) {
        let usage = Usage {
            input_tokens: Some(tokens),
            output_tokens: Some(0),
            cost_micro_usd: Some(tokens),
            ..Usage::default()
        };
        let end = EndModelRequestRequest {
            begun: Some(request.clone()),
            status: 200,
            usage: Some(usage),
            ..EndModelRequestRequest::default()
        };
        self.bus.call::<rpc::EndModelRequest>(&end, SOON).await.unwrap();
    }
}

impl World {
    /// A session whose first turn runs, and its claim's epoch.
    async fn asking(&self, agent: &str) -> (String, u32) {
        let session = self.create(agent, 1000).await.unwrap().session_id;
        let epoch = self.run(&session, 1).await.epoch;
        let started = self
            .append(
                &session,
                1,
                Kind::TurnStarted(TurnStarted { is_metered: true, ..TurnStarted::default() }),
            )
            .await;
        self.get(&session, started).await;
        (session, epoch)
    }

    async fn entries(&self, session: &str, epoch: u32, after: u64) -> FetchModelRequestsReply {
        let request =
            FetchModelRequestsRequest { session_id: session.to_owned(), turn: 1, epoch, after };
        self.runner.call::<rpc::FetchModelRequests>(&request, SOON).await.unwrap()
    }

    async fn limit(&self, scope: &str, id: Uuid, column: &str, max: i64) {
        let statement = format!(
            "insert into scheduler.model_limit (scope, scope_id, {column}) values ('{scope}', '{id}', {max})
             on conflict (scope, scope_id) do update set {column} = excluded.{column}"
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement))
            .execute(&mut self.database.admin().await.unwrap())
            .await
            .unwrap();
    }

    async fn number(&self, query: &str) -> i64 {
        sqlx::query_scalar(sqlx::AssertSqlSafe(query.to_owned()))
            .fetch_one(&mut self.database.admin().await.unwrap())
            .await
            .unwrap()
    }
}

fn kinds(reply: &FetchModelRequestsReply) -> Vec<&'static str> {
    let name = |kind: &meter_entry::Kind| match kind {
        meter_entry::Kind::Started(_) => "started",
        meter_entry::Kind::Ended(ended) if ended.usage.is_none() => "unknown",
        meter_entry::Kind::Ended(_) => "ended",
        meter_entry::Kind::Notice(notice) if notice.is_reached => "reached",
        meter_entry::Kind::Notice(_) => "warning",
    };
    reply.entries.iter().filter_map(|entry| entry.kind.as_ref()).map(name).collect()
}

#[tokio::test]
async fn a_model_request_is_counted_once_however_often_it_is_reported() {
    let world = World::start().await;
    let models = Models::start(&world).await;
    let (session, epoch) = world.asking(&world.agent().await).await;
    let first = models.request(&session, 50);
    for _ in 0..2 {
        assert!(
            matches!(models.begin(&first).await, Admission::Admitted(admitted) if admitted.is_unlimited)
        );
    }
    assert_eq!(world.entries(&session, epoch, 0).await.open, 1);
    models.end(&first, 30).await;
    models.end(&first, 30).await;
    // Its beginning was lost.
    models.end(&models.request(&session, 50), 12).await;
    let reply = world.entries(&session, epoch, 0).await;
    assert_eq!(kinds(&reply), ["started", "ended", "ended"]);
    assert_eq!((reply.open, reply.turn_usage.unwrap().input_tokens), (0, Some(42)));
    let after = reply.entries[1].number;
    assert_eq!(kinds(&world.entries(&session, epoch, after).await), ["ended"]);
    assert!(world.entries(&session, epoch + 1, 0).await.entries.is_empty(), "of another claim");
    let totals = "select coalesce(sum(input_tokens), 0)::bigint from scheduler.usage_day";
    eventually("the totals have it", || async { world.number(totals).await == 42 }).await;
    // What the agent's CLI reports of the same turn does not count beside it.
    let reported = Usage { input_tokens: Some(9999), ..Usage::default() };
    let ended = TurnEnded { exit_code: Some(0), usage: Some(reported), ..TurnEnded::default() };
    let end = world.append(&session, 1, Kind::TurnEnded(ended)).await;
    world.get(&session, end).await;
    let request = GetSessionRequest {
        user_id: world.user.to_string(),
        session_id: session,
        recorded_through: 0,
        v1: true,
    };
    let session = world.gateway.call::<rpc::GetSession>(&request, SOON).await.unwrap();
    assert_eq!(session.usage.unwrap().input_tokens, Some(42));
}

#[tokio::test]
async fn a_model_request_that_is_asked_twice_at_once_is_admitted_both_times_and_begun_once() {
    let world = World::start().await;
    let models = Models::start(&world).await;
    for is_limited in [false, true] {
        let (session, epoch) = world.asking(&world.agent().await).await;
        if is_limited {
            world.limit("session", session.parse().unwrap(), "max_tokens", 1_000_000).await;
        }
        models.end(&models.request(&session, 1), 1).await;
        let request = models.request(&session, 50);
        // The first attempt takes so long that the gateway sends another.
        let mut admin = world.database.admin().await.unwrap();
        let mut held = admin.begin().await.unwrap();
        sqlx::query("select from scheduler.model_meter where session_id = $1::uuid for update")
            .bind(&session)
            .execute(&mut *held)
            .await
            .unwrap();
        let release = async {
            let waiting = "select count(*) from pg_stat_activity
                           where wait_event_type = 'Lock' and query like any ('{%model_meter%,%model_request%}')";
            testkit::eventually("both attempts wait", async || world.number(waiting).await == 2)
                .await;
            held.commit().await.unwrap();
        };
        let (first, second, ()) =
            tokio::join!(models.begin(&request), models.begin(&request), release);
        for verdict in [first, second] {
            assert!(matches!(verdict, Admission::Admitted(_)), "{verdict:?}");
        }
        let reply = world.entries(&session, epoch, 0).await;
        assert_eq!((kinds(&reply), reply.open), (vec!["ended", "started"], 1));
    }
}

#[tokio::test]
async fn a_budget_that_is_made_while_a_request_begins_and_another_ends_counts_both() {
    let world = World::start().await;
    let models = Models::start(&world).await;
    let (session, _) = world.asking(&world.agent().await).await;
    let (earlier, later) = (models.request(&session, 30), models.request(&session, 500));
    models.begin(&earlier).await;
    // As a budget is made: the meter's row first.
    let mut admin = world.database.admin().await.unwrap();
    let mut making = admin.begin().await.unwrap();
    for statement in [
        "update scheduler.model_meter set number = number where session_id = $1::uuid",
        "insert into scheduler.model_limit (scope, scope_id, max_tokens) values ('session', $1::uuid, 100000)",
    ] {
        sqlx::query(statement).bind(&session).execute(&mut *making).await.unwrap();
    }
    let made = async {
        let waiting = "select count(*) from pg_stat_activity
                       where wait_event_type = 'Lock' and query like any ('{%model_meter%,%model_request%}')";
        testkit::eventually("both wait", async || world.number(waiting).await == 2).await;
        making.commit().await.unwrap();
    };
    let (admission, (), ()) = tokio::join!(models.begin(&later), models.end(&earlier, 30), made);
    assert!(matches!(admission, Admission::Admitted(admitted) if !admitted.is_unlimited));
    assert_eq!(world.number("select used_tokens from scheduler.model_limit").await, 30);
    assert_eq!(world.number("select held_tokens from scheduler.model_limit").await, 500);
}

#[tokio::test]
async fn requests_of_many_sessions_are_recorded_at_once_and_none_of_a_session_with_limits_among_them()
 {
    let world = World::start().await;
    let models = Models::start(&world).await;
    let (agent, limited_agent) = (world.agent().await, world.agent().await);
    let (session, epoch) = world.asking(&agent).await;
    let (other, other_epoch) = world.asking(&agent).await;
    let (limited, _) = world.asking(&limited_agent).await;
    world.limit("agent", limited_agent.parse().unwrap(), "max_tokens", 1_000_000).await;
    let terminated = world.create(&agent, 1000).await.unwrap().session_id;
    let terminate =
        TerminateRequest { user_id: world.user.to_string(), session_id: terminated.clone() };
    world.gateway.call::<rpc::Terminate>(&terminate, SOON).await.unwrap();
    let ended = |begun: &BeginModelRequestRequest, tokens: Option<u64>| EndModelRequestRequest {
        begun: Some(begun.clone()),
        status: 200,
        usage: tokens.map(|tokens| Usage {
            input_tokens: Some(tokens),
            cost_micro_usd: Some(tokens),
            ..Usage::default()
        }),
        error: if tokens.is_none() { "broken off".to_owned() } else { String::new() },
        ..EndModelRequestRequest::default()
    };
    let record = async |begins: &[&BeginModelRequestRequest], ends: &[EndModelRequestRequest]| {
        let begins = begins.iter().map(|begin| (*begin).clone()).collect();
        let request = RecordModelRequestsRequest { begins, ends: ends.to_vec() };
        let reply = models.bus.call::<rpc::RecordModelRequests>(&request, SOON).await.unwrap();
        let sorted = |ids: Vec<String>| ids.into_iter().collect::<BTreeSet<_>>();
        (sorted(reply.begun), sorted(reply.ended))
    };
    let ids = |requests: &[&BeginModelRequestRequest]| {
        requests.iter().map(|request| request.request_id.clone()).collect::<BTreeSet<_>>()
    };
    let none = BTreeSet::new();

    let earlier = models.request(&session, 50);
    models.begin(&earlier).await;
    let [first, second, of_other, of_limited, of_terminated, of_none] =
        [&session, &session, &other, &limited, &terminated, &Uuid::now_v7().to_string()]
            .map(|session| models.request(session, 50));
    let begins =
        [&first, &of_limited, &of_other, &earlier, &of_terminated, &second, &of_none, &first];
    let begun = ids(&[&first, &second, &of_other]);
    assert_eq!(record(&begins, &[]).await, (begun, none.clone()));
    assert_eq!(record(&begins, &[]).await, (none.clone(), none.clone()), "once more");
    models.begin(&of_limited).await;

    let third = models.request(&session, 50);
    let ends = [
        ended(&second, None),
        ended(&of_limited, Some(1)),
        ended(&of_other, Some(7)),
        ended(&earlier, Some(30)),
        ended(&models.request(&other, 1), Some(1)),
        ended(&first, Some(12)),
        ended(&first, Some(12)),
    ];
    let settled = ids(&[&earlier, &first, &second, &of_other]);
    assert_eq!(record(&[&third], &ends).await, (ids(&[&third]), settled));
    assert_eq!(record(&[], &ends).await, (none.clone(), none), "once more");

    let reply = world.entries(&session, epoch, 0).await;
    assert_eq!(
        kinds(&reply),
        ["started", "started", "started", "unknown", "ended", "ended", "started"]
    );
    assert_eq!(
        reply.entries.iter().map(|entry| entry.number).collect::<Vec<_>>(),
        (1..=7).collect::<Vec<_>>()
    );
    assert_eq!((reply.open, reply.turn_usage.unwrap().input_tokens), (1, Some(42)));
    assert_eq!(reply.failure, "", "its newest end is no failure");
    let reply = world.entries(&other, other_epoch, 0).await;
    assert_eq!((kinds(&reply), reply.open), (vec!["started", "ended"], 0));
    let used =
        "select requests * 1000 + unknown from scheduler.turn_usage order by requests desc limit 1";
    assert_eq!(world.number(used).await, 3001);
}

/// A client that goes away while its request is being asked for: beginning and end reach different
/// schedulers.
#[tokio::test]
async fn a_request_whose_end_comes_with_its_beginning_is_not_left_open() {
    let world = World::start().await;
    world.run_scheduler(&Lifecycle::new()).await;
    let models = Models::start(&world).await;
    let (session, epoch) = world.asking(&world.agent().await).await;
    for _ in 0..200 {
        let request = models.request(&session, 50);
        let end = EndModelRequestRequest {
            begun: Some(request.clone()),
            ..EndModelRequestRequest::default()
        };
        let (_, ended) = tokio::join!(
            models.begin(&request),
            models.bus.call::<rpc::EndModelRequest>(&end, SOON)
        );
        ended.unwrap();
    }
    assert_eq!(world.entries(&session, epoch, 0).await.open, 0);
}

#[tokio::test]
async fn a_request_of_a_lost_gateway_is_unknown_until_it_is_told_and_budgets_count_its_estimate() {
    let world = World::start().await;
    let models = Models::start(&world).await;
    let (session, epoch) = world.asking(&world.agent().await).await;
    world.limit("user", world.user.uuid(), "max_tokens", 1000).await;
    let request = models.request(&session, 400);
    assert!(
        matches!(models.begin(&request).await, Admission::Admitted(admitted) if !admitted.is_unlimited)
    );
    let lost = "update scheduler.model_gateway set expires_at = now() - interval '1 second';
                update scheduler.model_request set started_at = now() - interval '1 hour'";
    sqlx::raw_sql(lost).execute(&mut world.database.admin().await.unwrap()).await.unwrap();
    eventually("it is settled", || async {
        kinds(&world.entries(&session, epoch, 0).await) == ["started", "unknown"]
    })
    .await;
    assert_eq!(world.number("select used_tokens from scheduler.model_limit").await, 400);
    assert_eq!(world.number("select held_tokens from scheduler.model_limit").await, 0);
    let used = "select input_tokens + 1000 * unknown from scheduler.turn_usage";
    assert_eq!(world.number(used).await, 1000, "nothing is invented");
    models.end(&request, 7).await;
    assert_eq!(world.number(used).await, 7);
    let used_tokens = "select used_tokens from scheduler.model_limit";
    assert_eq!(world.number(used_tokens).await, 400, "a budget does not get back what it counted");
    let larger = models.request(&session, 10);
    models.begin(&larger).await;
    sqlx::raw_sql(lost).execute(&mut world.database.admin().await.unwrap()).await.unwrap();
    eventually("it is settled", || async { world.number(used_tokens).await == 410 }).await;
    models.end(&larger, 500).await;
    assert_eq!(
        world.number(used_tokens).await,
        900,
        "what it used beyond its estimate is counted later"
    );
}

#[tokio::test]
async fn a_request_that_was_not_sent_reserves_nothing_whether_its_beginning_or_its_end_comes_first()
{
    let world = World::start().await;
    let models = Models::start(&world).await;
    let (session, epoch) = world.asking(&world.agent().await).await;
    world.limit("user", world.user.uuid(), "max_tokens", 1000).await;
    let unsent = async |request: &BeginModelRequestRequest| {
        let end = EndModelRequestRequest {
            begun: Some(request.clone()),
            error: "broken off".to_owned(),
            ..Default::default()
        };
        models.bus.call::<rpc::EndModelRequest>(&end, SOON).await.unwrap();
    };
    let held = "select held_tokens + used_tokens from scheduler.model_limit";
    let first = models.request(&session, 400);
    models.begin(&first).await;
    unsent(&first).await;
    assert_eq!(world.number(held).await, 0);
    let second = models.request(&session, 400);
    unsent(&second).await;
    assert!(matches!(models.begin(&second).await, Admission::Admitted(_)));
    assert_eq!(world.number(held).await, 0);
    let reply = world.entries(&session, epoch, 0).await;
    assert_eq!(
        (kinds(&reply), reply.open),
        (vec!["started", "ended"], 0),
        "of the one that was begun"
    );
}

#[tokio::test]
async fn a_response_that_was_cut_counts_as_what_was_generated_where_that_is_more_than_its_estimate()
{
    let world = World::start().await;
    let models = Models::start(&world).await;
    let (session, _) = world.asking(&world.agent().await).await;
    world.limit("user", world.user.uuid(), "max_tokens", 1000).await;
    let request = models.request(&session, 50);
    models.begin(&request).await;
    let begun = BeginModelRequestRequest { estimated_tokens: 700, ..request };
    let usage = Usage { input_tokens: Some(5), output_tokens: Some(1), ..Usage::default() };
    let end = EndModelRequestRequest {
        begun: Some(begun),
        status: 200,
        usage: Some(usage),
        is_partial: true,
        ..EndModelRequestRequest::default()
    };
    models.bus.call::<rpc::EndModelRequest>(&end, SOON).await.unwrap();
    assert_eq!(world.number("select used_tokens from scheduler.model_limit").await, 700);
}

#[tokio::test]
async fn no_name_and_no_count_of_one_request_stops_the_totals_of_all() {
    let world = World::start().await;
    let models = Models::start(&world).await;
    let (session, _) = world.asking(&world.agent().await).await;
    world.limit("user", world.user.uuid(), "max_tokens", i64::MAX).await;
    let long: String = (0..6000_u32)
        .map(|number| char::from(b'a' + (number.wrapping_mul(2_654_435_761) >> 24) as u8 % 26))
        .collect();
    let named = BeginModelRequestRequest { model: long.clone(), ..models.request(&session, 5) };
    models.begin(&named).await;
    assert_eq!(
        world.number("select length(model)::bigint from scheduler.model_request").await,
        200
    );
    // As an earlier release kept it.
    let stored = format!("update scheduler.model_request set model = '{long}'");
    sqlx::raw_sql(sqlx::AssertSqlSafe(stored))
        .execute(&mut world.database.admin().await.unwrap())
        .await
        .unwrap();
    models.end(&named, 1).await;
    for _ in 0..2 {
        let absurd = models.request(&session, 5);
        models.begin(&absurd).await;
        models.end(&absurd, u64::MAX).await;
    }
    eventually("all of them are in the totals", || async {
        world.number("select coalesce(sum(requests), 0)::bigint from scheduler.usage_day").await
            == 3
    })
    .await;
}

#[tokio::test]
async fn the_end_of_a_request_of_a_deleted_session_frees_budgets_and_leaves_nothing() {
    let world = World::start().await;
    let models = Models::start(&world).await;
    let (session, _) = world.asking(&world.agent().await).await;
    world.limit("user", world.user.uuid(), "max_tokens", 1000).await;
    let request = models.request(&session, 400);
    models.begin(&request).await;
    let delete = format!(
        "set session_replication_role = replica;
         delete from scheduler.session where session_id = '{session}';
         delete from scheduler.model_meter; delete from scheduler.turn_usage; delete from scheduler.model_entry;"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(delete))
        .execute(&mut world.database.admin().await.unwrap())
        .await
        .unwrap();
    models.end(&request, 7).await;
    assert_eq!(
        world.number("select 1000 * held_tokens + used_tokens from scheduler.model_limit").await,
        7
    );
    let left = "select (select count(*) from scheduler.model_meter) + (select count(*) from scheduler.turn_usage)
                + (select count(*) from scheduler.model_entry)";
    assert_eq!(world.number(left).await, 0);
}

#[tokio::test]
async fn sessions_of_one_user_share_a_budget_and_each_passes_it_by_one_request_at_most() {
    const SESSIONS: usize = 20;
    const MAX: u64 = 3000;
    let world = World::start().await;
    world.run_scheduler(&Lifecycle::new()).await;
    let agent = world.agent().await;
    let mut sessions = Vec::new();
    for _ in 0..SESSIONS {
        sessions.push(world.asking(&agent).await);
    }
    world.limit("user", world.user.uuid(), "max_tokens", MAX as i64).await;
    let models = Models::start(&world).await;
    // The provider's own count: what was sent while it was at or beyond the budget.
    let sent = std::sync::atomic::AtomicU64::new(0);
    let runs = sessions.iter().enumerate().map(async |(index, (session, _))| {
        let (mut beyond, mut requests) = (0, 0);
        loop {
            let tokens = 20 + 7 * (index as u64 % 5);
            let request = models.request(session, 40 + tokens);
            match models.begin(&request).await {
                Admission::Admitted(_) => {
                    let before = sent.fetch_add(tokens, std::sync::atomic::Ordering::SeqCst);
                    (beyond, requests) = (beyond + u32::from(before >= MAX), requests + 1);
                    models.end(&request, tokens).await;
                }
                Admission::Waits(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                Admission::Refused(refused) => {
                    assert_eq!(refused.reason, "budget", "{refused:?}");
                    return (beyond, requests);
                }
            }
        }
    });
    let counts = join_all(runs).await;
    assert!(counts.iter().all(|(beyond, _)| *beyond <= 1), "{counts:?}");
    assert!(counts.iter().map(|(_, requests)| requests).sum::<u32>() >= 60);
    let used = world.number("select used_tokens from scheduler.model_limit").await.unsigned_abs();
    assert_eq!(used, sent.into_inner());
    assert_eq!(
        world.number("select held_tokens + held_cost_micro_usd from scheduler.model_limit").await,
        0
    );
    // Each session is told once, with a warning before it, and continues once the budget is raised.
    let mut warnings = 0;
    for (session, epoch) in &sessions {
        let reply = world.entries(session, *epoch, 0).await;
        assert_eq!(kinds(&reply).iter().filter(|kind| **kind == "reached").count(), 1);
        warnings += kinds(&reply).iter().filter(|kind| **kind == "warning").count();
        assert_eq!(reply.budget_reached.unwrap().scope, "user");
    }
    assert_eq!(warnings, 1);
    world.limit("user", world.user.uuid(), "max_tokens", 2 * MAX as i64).await;
    let (session, epoch) = &sessions[0];
    assert!(matches!(models.begin(&models.request(session, 10)).await, Admission::Admitted(_)));
    assert!(world.entries(session, *epoch, 0).await.budget_reached.is_none());
}

#[tokio::test]
async fn policies_and_every_kind_of_budget_are_kept() {
    let world = World::start().await;
    let models = Models::start(&world).await;
    let agent = world.agent().await;
    let refused = async |session: &str| match models.begin(&models.request(session, 5)).await {
        Admission::Refused(refused) => refused.reason,
        other => format!("{other:?}"),
    };
    let (session, _) = world.asking(&agent).await;
    let id: Uuid = session.parse().unwrap();
    world.limit("session", id, "max_requests", 1).await;
    let request = models.request(&session, 5);
    assert!(matches!(models.begin(&request).await, Admission::Admitted(_)));
    assert_eq!(refused(&session).await, "budget");
    let (session, _) = world.asking(&agent).await;
    world.limit("session", session.parse().unwrap(), "max_seconds", 0).await;
    assert_eq!(refused(&session).await, "budget");
    let (session, _) = world.asking(&agent).await;
    world.limit("session", session.parse().unwrap(), "max_cost_micro_usd", 100).await;
    let unpriced =
        BeginModelRequestRequest { estimated_cost_micro_usd: None, ..models.request(&session, 5) };
    assert!(
        matches!(models.begin(&unpriced).await, Admission::Refused(refused) if refused.reason == "price")
    );
    let (session, _) = world.asking(&agent).await;
    world.limit("session", session.parse().unwrap(), "requests_per_minute", 2).await;
    for _ in 0..2 {
        assert!(matches!(models.begin(&models.request(&session, 5)).await, Admission::Admitted(_)));
    }
    let Admission::Refused(rate) = models.begin(&models.request(&session, 5)).await else {
        panic!("not refused")
    };
    assert!(rate.reason == "rate" && (1..=60).contains(&rate.retry_after_seconds), "{rate:?}");
    world.limit("agent", agent.parse().unwrap(), "max_tokens", 0).await;
    assert_eq!(refused(&session).await, "rate");
    let (session, _) = world.asking(&agent).await;
    assert_eq!(refused(&session).await, "budget");
    let only = format!(
        "update scheduler.model_limit set max_tokens = null, allowed_models = '{{gpt-*}}' where scope_id = '{agent}'"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(only))
        .execute(&mut world.database.admin().await.unwrap())
        .await
        .unwrap();
    assert_eq!(refused(&session).await, "model");
}

impl World {
    fn owned(&self, scope: &str, id: &str) -> GetBudgetRequest {
        GetBudgetRequest {
            scope: scope.to_owned(),
            scope_id: id.to_owned(),
            user_id: Some(self.user.to_string()),
        }
    }

    async fn set_budget(
        &self,
        of: GetBudgetRequest,
        tokens: Option<u64>,
    ) -> Result<Budget, RpcError> {
        let change =
            BudgetChange { tokens: Some(LimitChange { max: tokens }), ..BudgetChange::default() };
        self.gateway
            .call::<rpc::SetBudget>(&SetBudgetRequest { of: Some(of), change: Some(change) }, SOON)
            .await
    }

    async fn usage(&self, request: ListUsageRequest) -> Vec<UsageSum> {
        let request =
            ListUsageRequest { user_id: Some(self.user.to_string()), limit: 1, ..request };
        let mut sums: Vec<UsageSum> = Vec::new();
        loop {
            let after = sums.last().map(|sum| sum.group.clone());
            let page = self
                .gateway
                .call::<rpc::ListUsage>(&ListUsageRequest { after, ..request.clone() }, SOON)
                .await
                .unwrap();
            sums.extend(page.sums);
            if !page.has_more {
                return sums;
            }
        }
    }
}

#[tokio::test]
async fn a_budget_counts_earlier_usage_and_raising_it_continues_with_a_new_warning() {
    let world = World::start().await;
    let models = Models::start(&world).await;
    let budget =
        BudgetChange { requests: Some(LimitChange { max: Some(100) }), ..BudgetChange::default() };
    let agent = CreateAgentRequest { budget: Some(budget), ..world.new_agent() };
    let agent =
        world.gateway.call::<rpc::CreateAgent>(&agent, SOON).await.unwrap().agent.unwrap().agent_id;
    let (session, epoch) = world.asking(&agent).await;
    let used = models.request(&session, 50);
    models.begin(&used).await;
    models.end(&used, 85).await;
    // One that is under way while the budget is set is counted by it as a request, and its tokens
    // when it ends.
    let open = models.request(&session, 10);
    models.begin(&open).await;
    let of = world.owned("session", &session);
    let set = world.set_budget(of.clone(), Some(100)).await.unwrap();
    assert_eq!(
        (set.max.unwrap().tokens, set.used.unwrap().tokens, set.used.unwrap().requests),
        (Some(100), Some(85), Some(2))
    );
    let warned = models.request(&session, 5);
    assert!(matches!(models.begin(&warned).await, Admission::Admitted(_)));
    models.end(&warned, 5).await;
    models.end(&open, 10).await;
    assert!(
        matches!(models.begin(&models.request(&session, 5)).await, Admission::Refused(refused) if refused.reason == "budget")
    );
    assert!(world.entries(&session, epoch, 0).await.budget_reached.is_some());
    // Raised: the session continues, and is warned of the new limit once.
    world.set_budget(of.clone(), Some(120)).await.unwrap();
    for _ in 0..2 {
        let request = models.request(&session, 5);
        assert!(matches!(models.begin(&request).await, Admission::Admitted(_)));
        models.end(&request, 5).await;
    }
    let entries = world.entries(&session, epoch, 0).await;
    assert!(entries.budget_reached.is_none());
    assert_eq!(kinds(&entries).iter().filter(|kind| **kind == "warning").count(), 2);
    // The agent's budget counted all of it; the operator removes what its owner set.
    let of_agent =
        world.gateway.call::<rpc::GetBudget>(&world.owned("agent", &agent), SOON).await.unwrap();
    assert_eq!(
        (
            of_agent.max.unwrap().requests,
            of_agent.used.unwrap().requests,
            of_agent.used.unwrap().tokens
        ),
        (Some(100), Some(5), Some(110))
    );
    let operator = world.nats.connect(&access::OPERATOR).await.unwrap();
    let cleared = GetBudgetRequest { user_id: None, ..of };
    let cleared = operator.call::<rpc::ClearBudget>(&cleared, SOON).await.unwrap();
    assert_eq!((cleared.max.unwrap().tokens, cleared.used.unwrap().tokens), (None, Some(0)));
    let again = world.set_budget(world.owned("session", &session), Some(100)).await.unwrap();
    assert_eq!(
        (again.max.unwrap().tokens, again.used.unwrap().tokens),
        (Some(100), Some(0)),
        "its counts start over"
    );
}

#[tokio::test]
async fn a_budget_of_time_does_not_count_what_sessions_ran_before_it_unless_it_is_their_own() {
    let world = World::start().await;
    let models = Models::start(&world).await;
    let agent = world.agent().await;
    let sql = async |statement: String| {
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement))
            .execute(&mut world.database.admin().await.unwrap())
            .await
            .unwrap();
    };
    let (asked, _) = world.asking(&agent).await;
    sql(format!("update scheduler.turn set started_at = now() - interval '1 hour' where session_id = '{asked}'")).await;
    assert!(matches!(models.begin(&models.request(&asked, 5)).await, Admission::Admitted(_)));
    // One of which no time was counted: an earlier turn of it ran for two hours.
    let (uncounted, _) = world.asking(&agent).await;
    sql(format!(
        "insert into scheduler.turn (session_id, turn_number, prompt, timeout_seconds, status, started_at, ended_at, deadline_at)
         select session_id, 1000, '', 60, 'completed', now() - interval '3 hours', now() - interval '1 hour', now()
         from scheduler.turn where session_id = '{uncounted}'"
    ))
    .await;
    let seconds = async |scope: &str, id: &str, max: u64| {
        let change = BudgetChange {
            seconds: Some(LimitChange { max: Some(max) }),
            ..BudgetChange::default()
        };
        let set = SetBudgetRequest { of: Some(world.owned(scope, id)), change: Some(change) };
        world
            .gateway
            .call::<rpc::SetBudget>(&set, SOON)
            .await
            .unwrap()
            .used
            .unwrap()
            .seconds
            .unwrap()
    };
    assert_eq!(seconds("agent", &agent, 1800).await, 0);
    assert!((3600..4000).contains(&seconds("session", &asked, 20_000).await));
    seconds("session", &uncounted, 20_000).await;
    for session in [&asked, &uncounted] {
        let admitted = models.begin(&models.request(session, 5)).await;
        assert!(matches!(admitted, Admission::Admitted(_)), "{admitted:?}");
    }
    assert!(seconds("agent", &agent, 1800).await < 600);
    assert!((3600..4000).contains(&seconds("session", &asked, 20_000).await));
    assert!((7200..7800).contains(&seconds("session", &uncounted, 20_000).await));
}

#[tokio::test]
async fn a_budget_that_is_set_under_way_reserves_what_open_requests_reserve_elsewhere() {
    let world = World::start().await;
    let models = Models::start(&world).await;
    let (session, _) = world.asking(&world.agent().await).await;
    world.limit("user", world.user.uuid(), "max_tokens", 100_000).await;
    let first = models.request(&session, 400);
    models.begin(&first).await;
    let own = GetBudgetRequest {
        scope: "session".to_owned(),
        scope_id: session.clone(),
        user_id: Some(world.user.to_string()),
    };
    let budget = world.set_budget(own.clone(), Some(1000)).await.unwrap();
    assert_eq!(budget.reserved.unwrap().tokens, Some(400));
    let second = models.request(&session, 400);
    assert!(matches!(models.begin(&second).await, Admission::Admitted(_)));
    models.end(&first, 300).await;
    let budget = world.set_budget(own, Some(1000)).await.unwrap();
    let (used, reserved) = (budget.used.unwrap(), budget.reserved.unwrap());
    assert_eq!((used.tokens, used.requests), (Some(300), Some(2)));
    assert_eq!(reserved.tokens, Some(400), "the second one is under way");
    models.end(&second, 300).await;
    for scope in ["session", "user"] {
        let held = format!("select held_tokens from scheduler.model_limit where scope = '{scope}'");
        assert_eq!(world.number(&held).await, 0, "{scope}");
    }
}

/// Two schedulers, requests that begin and end in any order, and budgets that come and go.
#[tokio::test]
async fn no_reservation_is_left_and_no_request_is_counted_twice_whatever_is_set_meanwhile() {
    const REQUESTS: u64 = 60;
    let world = World::start().await;
    world.run_scheduler(&Lifecycle::new()).await;
    let models = Models::start(&world).await;
    let agent = world.agent().await;
    let sessions = [world.asking(&agent).await.0, world.asking(&agent).await.0];
    let requests = join_all((0..REQUESTS).map(|number| {
        let session = &sessions[number as usize % sessions.len()];
        let request = models.request(session, 10 + number);
        let models = &models;
        async move {
            tokio::time::sleep(Duration::from_millis(number * 20)).await;
            if number % 5 == 0 {
                // Both at once, and one of them again.
                tokio::join!(models.begin(&request), models.end(&request, 1));
            } else if let Admission::Refused(refused) = models.begin(&request).await {
                panic!("{refused:?}");
            }
            tokio::time::sleep(Duration::from_millis(number % 7 * 30)).await;
            tokio::join!(models.end(&request, 1), models.end(&request, 1));
        }
    }));
    let settings = async {
        let user = GetBudgetRequest {
            scope: "user".to_owned(),
            scope_id: world.user.to_string(),
            user_id: None,
        };
        let max = |max| BudgetChange {
            tokens: Some(LimitChange { max: Some(max) }),
            ..BudgetChange::default()
        };
        let operator = world.nats.connect(&access::OPERATOR).await.unwrap();
        for turn in 0..12 {
            let of = match turn % 3 {
                0 => user.clone(),
                1 => world.owned("agent", &agent),
                _ => world.owned("session", &sessions[0]),
            };
            let set = SetBudgetRequest { of: Some(of.clone()), change: Some(max(1_000_000)) };
            operator.call::<rpc::SetBudget>(&set, SOON).await.unwrap();
            tokio::time::sleep(Duration::from_millis(60)).await;
            operator.call::<rpc::ClearBudget>(&of, SOON).await.unwrap();
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    };
    tokio::join!(requests, settings);
    let open = "select count(*) from scheduler.model_request where status <> 'settled'";
    assert_eq!(world.number(open).await, 0);
    let held = "select sum(held_tokens + held_cost_micro_usd)::bigint from scheduler.model_limit";
    assert_eq!(world.number(held).await, 0);
    let counted = "select sum(input_tokens)::bigint from scheduler.turn_usage";
    assert_eq!(world.number(counted).await, REQUESTS.cast_signed());
}

#[tokio::test]
async fn users_change_budgets_of_their_own_sessions_and_agents_alone() {
    let (world, agent) = World::with_agent().await;
    let other = GetBudgetRequest {
        user_id: Some(UserId::new().to_string()),
        ..world.owned("agent", &agent)
    };
    assert_eq!(world.set_budget(other, Some(1)).await.unwrap_err().code, ErrorCode::NotFound);
    for scope in ["user", "deployment"] {
        let own = world.owned(scope, &world.user.to_string());
        assert_eq!(
            world.set_budget(own, Some(1)).await.unwrap_err().code,
            ErrorCode::InvalidArgument,
            "{scope}"
        );
    }
    assert!(world.set_budget(world.owned("agent", &agent), Some(1)).await.is_ok());
    assert!(world.set_budget(world.owned("agent", &agent), Some(u64::MAX)).await.is_err());
}

#[tokio::test]
async fn usage_is_added_up_by_day_agent_model_key_session_and_user() {
    let world = World::start().await;
    let models = Models::start(&world).await;
    let (first, second) = (world.agent().await, world.agent().await);
    let mut sessions = Vec::new();
    for (agent, model, tokens) in
        [(&first, "claude-a", 10), (&first, "claude-b", 20), (&second, "claude-a", 30)]
    {
        let (session, _) = world.asking(agent).await;
        let request =
            BeginModelRequestRequest { model: model.to_owned(), ..models.request(&session, 50) };
        models.begin(&request).await;
        models.end(&request, tokens).await;
        sessions.push(session);
    }
    let by = |group: &str| ListUsageRequest {
        group_by: group.to_owned(),
        ..ListUsageRequest::default()
    };
    let tokens = |sums: &[UsageSum]| {
        sums.iter().map(|sum| (sum.group.clone(), sum.input_tokens)).collect::<Vec<_>>()
    };
    eventually("the totals have it", || async {
        world.usage(by("day")).await.first().is_some_and(|sum| sum.input_tokens == 60)
    })
    .await;
    let models_used =
        [("anthropic/claude-a".to_owned(), 40), ("anthropic/claude-b".to_owned(), 20)];
    assert_eq!(tokens(&world.usage(by("model")).await), models_used);
    let mut agents = vec![(first.clone(), 30), (second, 30)];
    agents.sort();
    assert_eq!(tokens(&world.usage(by("agent")).await), agents);
    assert_eq!(
        tokens(&world.usage(ListUsageRequest { agent_id: Some(first), ..by("key") }).await),
        [("provider:anthropic".to_owned(), 30)]
    );
    let newest_first: Vec<_> = sessions.iter().rev().cloned().zip([30, 20, 10]).collect();
    assert_eq!(tokens(&world.usage(by("session")).await), newest_first);
    let one = ListUsageRequest { session_id: Some(sessions[0].clone()), ..by("session") };
    assert_eq!(tokens(&world.usage(one).await), [(sessions[0].clone(), 10)]);
    let day = |from: &str, to: &str| ListUsageRequest {
        from_day: Some(from.to_owned()),
        to_day: Some(to.to_owned()),
        ..by("day")
    };
    assert!(world.usage(day("2020-01-01", "2020-01-31")).await.is_empty());
    let operator = world.nats.connect(&access::OPERATOR).await.unwrap();
    let users = operator
        .call::<rpc::ListUsage>(&ListUsageRequest { limit: 10, ..by("user") }, SOON)
        .await
        .unwrap();
    assert_eq!(tokens(&users.sums), [(world.user.to_string(), 60)]);
    for wrong in
        [by("user"), by("week"), day("2020-01-01", "2026-01-01"), day("yesterday", "2026-01-01")]
    {
        let request = ListUsageRequest { user_id: Some(world.user.to_string()), ..wrong };
        assert!(world.gateway.call::<rpc::ListUsage>(&request, SOON).await.is_err(), "{request:?}");
    }
}
