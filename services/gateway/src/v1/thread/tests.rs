use std::collections::BTreeSet;

use contract::{
    host::{
        AgentError, AgentMessage, CustomToolResult, DecisionRequested, DecisionSettled, Evaluation,
        Event, InputSettled, Thinking, ToolResult, ToolUse, agent_error::Retry,
        decision_settled::How, event, input_settled::Outcome,
    },
    scheduler::FindTurnReply,
    session::{
        self, AgentEvent, ModelRequestEnded, SessionEvent, StopReason, TurnEnded, TurnStarted,
        session_event::Kind,
    },
};
use proptest::prelude::*;
use serde_json::json;
use types::{InputId, SessionId};

use crate::v1::{
    ids::EventId,
    thread::{
        Thread,
        entry::{Shown, main_id, request_of, sent_id, text},
        names::TYPES,
    },
};

fn thread() -> Thread {
    Thread::at(
        SessionId::new(),
        &FindTurnReply { turn: 1, agent_name: "a".to_owned(), ..FindTurnReply::default() },
    )
}

fn agent(kind: event::Kind, tool_use: u64) -> Kind {
    Kind::Agent(AgentEvent {
        event: Some(Event { id: 1, parent: 0, kind: Some(kind) }),
        tool_use,
        ..AgentEvent::default()
    })
}

fn started() -> Kind {
    Kind::TurnStarted(TurnStarted { prompt: "hi".to_owned(), ..TurnStarted::default() })
}

fn tool(evaluation: Evaluation) -> Kind {
    agent(
        event::Kind::ToolUse(ToolUse {
            name: "Bash".to_owned(),
            evaluation: evaluation.into(),
            ..ToolUse::default()
        }),
        0,
    )
}

fn said(text: &str) -> Kind {
    agent(
        event::Kind::Message(AgentMessage { text: text.to_owned(), ..AgentMessage::default() }),
        0,
    )
}

fn ended(exit_code: i32, reason: StopReason) -> Kind {
    let usage = Some(session::Usage {
        input_tokens: Some(9),
        output_tokens: Some(4),
        ..session::Usage::default()
    });
    Kind::TurnEnded(TurnEnded {
        exit_code: Some(exit_code),
        stop_reason: reason.into(),
        usage,
        ..TurnEnded::default()
    })
}

fn asked(tool_use: u64) -> Kind {
    Kind::DecisionRequested(session::DecisionRequested {
        request: Some(DecisionRequested::default()),
        tool_use,
    })
}

fn decided(tool_use: u64, input: InputId) -> Kind {
    let settled = DecisionSettled {
        how: How::Allowed.into(),
        input_id: input.to_string(),
        ..DecisionSettled::default()
    };
    Kind::DecisionSettled(session::DecisionSettled {
        settled: Some(settled),
        tool_use,
        ..session::DecisionSettled::default()
    })
}

/// Entries 10, 11, … of turn 1, a millisecond apart.
fn play(thread: &mut Thread, kinds: Vec<Kind>) -> Vec<Shown> {
    let mut shown = Vec::new();
    for (index, kind) in kinds.into_iter().enumerate() {
        let at_us = 1_000_000 + 1000 * index as i64;
        thread.apply(
            10 + index as u64,
            &SessionEvent { turn: 1, at_us, kind: Some(kind), ..SessionEvent::default() },
            &mut shown,
        );
    }
    shown
}

fn kinds(shown: &[Shown]) -> Vec<&'static str> {
    shown.iter().map(|event| event.kind).collect()
}

#[test]
fn a_plain_turn_shows_in_the_order_of_the_reference() {
    let shown = play(&mut thread(), vec![started(), said("Hi."), ended(0, StopReason::EndTurn)]);
    assert_eq!(
        kinds(&shown),
        [
            "user.message",
            "session.status_running",
            "session.thread_status_running",
            "span.model_request_start",
            "agent.message",
            "span.model_request_end",
            "session.thread_status_idle",
            "session.usage",
            "session.status_idle"
        ]
    );
    assert_eq!(shown[5].value()["model_request_start_id"], shown[3].id);
    assert_eq!(shown[5].value()["model_usage"]["output_tokens"], 4);
    assert_eq!(shown[7].value()["usage"]["input_tokens"], 9);
    assert_eq!(shown[8].value()["stop_reason"], json!({ "type": "end_turn" }));
}

#[test]
fn a_text_that_was_shown_while_it_was_written_has_the_id_that_was_shown() {
    let written = |kind, text| match agent(kind, 0) {
        Kind::Agent(event) => Kind::Agent(AgentEvent { text, ..event }),
        other => other,
    };
    let message =
        event::Kind::Message(AgentMessage { text: "Hi.".to_owned(), ..AgentMessage::default() });
    let thought = event::Kind::Thinking(Thinking::default());
    let shown = play(
        &mut thread(),
        vec![started(), written(thought, 4), written(message, 5), said("whole")],
    );
    let [.., thought, message, whole] = &shown[..] else { unreachable!() };
    assert_eq!(thought.id, EventId::Text { turn: 1, text: 4 }.encode());
    assert_eq!(
        (message.kind, &message.id),
        ("agent.message", &EventId::Text { turn: 1, text: 5 }.encode())
    );
    assert_eq!(message.resume_id(), main_id(12));
    assert_eq!((whole.id.as_str(), whole.resume_id()), (main_id(13).as_str(), main_id(13)));
}

#[test]
fn an_error_that_passes_reschedules() {
    let failed = |kind: &str, retry: Retry| {
        agent(
            event::Kind::Error(AgentError {
                kind: kind.to_owned(),
                retry: retry.into(),
                ..AgentError::default()
            }),
            0,
        )
    };
    let entries = vec![
        started(),
        failed("model_overloaded_error", Retry::Retrying),
        failed("unknown_error", Retry::Retrying),
        failed("model_overloaded_error", Retry::Exhausted),
    ];
    let shown = play(&mut thread(), entries);
    let after: Vec<_> =
        shown.iter().filter(|event| event.place.entry > 10).map(|event| event.kind).collect();
    assert_eq!(
        after,
        [
            "session.error",
            "session.status_rescheduled",
            "session.status_running",
            "session.error",
            "session.error"
        ]
    );
}

#[test]
fn usage_adds_up_over_turns() {
    let mut thread = thread();
    play(&mut thread, vec![started(), ended(0, StopReason::EndTurn)]);
    let shown = play(&mut thread, vec![started(), ended(0, StopReason::EndTurn)]);
    let usage = shown.iter().find(|event| event.kind == "session.usage").unwrap();
    assert_eq!(usage.value()["usage"]["output_tokens"], 8);
}

#[test]
fn two_asks_are_answered_one_after_the_other() {
    let input = InputId::new();
    let shown = play(
        &mut thread(),
        vec![
            started(),
            tool(Evaluation::Ask),
            tool(Evaluation::Ask),
            asked(11),
            asked(12),
            decided(11, input),
            decided(12, InputId::new()),
        ],
    );
    let idle: Vec<_> = shown.iter().filter(|event| event.kind == "session.status_idle").collect();
    let ids = |index: usize| idle[index].value()["stop_reason"]["event_ids"].clone();
    let (one, two) = (main_id(11), main_id(12));
    assert_eq!([ids(0), ids(1), ids(2)], [json!([one]), json!([one, two]), json!([two])]);
    let confirmation = shown.iter().find(|event| event.kind == "user.tool_confirmation").unwrap();
    assert_eq!(
        (confirmation.id.as_str(), &confirmation.value()["tool_use_id"]),
        (sent_id(&input.to_string()).as_str(), &json!(one))
    );
    assert_eq!(shown.last().unwrap().kind, "session.thread_status_running");
    let used = shown.iter().find(|event| event.kind == "agent.tool_use").unwrap();
    assert_eq!(
        (&used.value()["name"], &used.value()["evaluated_permission"]),
        (&json!("bash"), &json!("ask"))
    );
    assert_eq!(request_of(&used.id), Some(11));
}

#[test]
fn a_request_without_a_tool_use_is_settled_by_the_id_that_the_host_gave_it() {
    let asked = |id| {
        let request = Some(DecisionRequested { id, ..DecisionRequested::default() });
        Kind::DecisionRequested(session::DecisionRequested { request, tool_use: 0 })
    };
    let settled = |id, input: InputId| {
        let settled =
            Some(DecisionSettled { id, how: How::Denied.into(), input_id: input.to_string() });
        Kind::DecisionSettled(session::DecisionSettled {
            settled,
            ..session::DecisionSettled::default()
        })
    };
    let entries = vec![
        started(),
        asked(5),
        asked(6),
        settled(6, InputId::new()),
        settled(5, InputId::of_timeout()),
    ];
    let shown = play(&mut thread(), entries);
    let used = shown
        .iter()
        .filter(|event| event.kind == "agent.tool_use")
        .map(|event| &event.id)
        .collect::<Vec<_>>();
    let after: Vec<_> = shown.iter().filter(|event| event.place.entry >= 13).collect();
    assert_eq!(
        (after[0].kind, &after[0].value()["tool_use_id"]),
        ("user.tool_confirmation", &json!(used[1]))
    );
    assert_eq!(after[3].value()["stop_reason"]["event_ids"], json!([used[0]]));
    // No one sent the decision of a time-out.
    let last: Vec<_> =
        after.iter().filter(|event| event.place.entry == 14).map(|event| event.kind).collect();
    assert_eq!(last, ["session.status_running", "session.thread_status_running"]);
}

#[test]
fn a_custom_tool_waits_for_its_result() {
    let request = DecisionRequested {
        id: 5,
        tool: "ask".to_owned(),
        is_custom_tool: true,
        ..DecisionRequested::default()
    };
    let asked =
        Kind::DecisionRequested(session::DecisionRequested { request: Some(request), tool_use: 0 });
    let input = InputId::new();
    let settled = DecisionSettled {
        how: How::Allowed.into(),
        input_id: input.to_string(),
        ..DecisionSettled::default()
    };
    let result = Some(CustomToolResult { text: "42".to_owned(), ..CustomToolResult::default() });
    let settled = Kind::DecisionSettled(session::DecisionSettled {
        settled: Some(settled),
        tool_use: 11,
        result,
    });
    let shown = play(
        &mut thread(),
        vec![started(), asked, settled, said("Thanks."), ended(0, StopReason::EndTurn)],
    );
    let of = |kind: &str| shown.iter().find(|event| event.kind == kind).unwrap();
    let used = of("agent.custom_tool_use");
    assert_eq!(request_of(&used.id), Some(11));
    assert_eq!(
        of("session.status_idle").value()["stop_reason"],
        json!({ "type": "requires_action", "event_ids": [used.id] })
    );
    let result = of("user.custom_tool_result");
    assert_eq!(
        (&result.id, &result.value()["custom_tool_use_id"]),
        (&sent_id(&input.to_string()), &json!(used.id))
    );
    assert_eq!(result.value()["content"], text("42"));
    let after: Vec<_> = kinds(&shown)
        .into_iter()
        .skip_while(|kind| *kind != "user.custom_tool_result")
        .take(4)
        .collect();
    assert_eq!(
        after,
        [
            "user.custom_tool_result",
            "session.status_running",
            "session.thread_status_running",
            "agent.message"
        ]
    );
    assert!(!shown.iter().any(|event| event.kind == "agent.tool_result"));
}

#[test]
fn an_interrupt_closes_open_calls_and_spans() {
    let input = InputId::new();
    let settled = InputSettled {
        id: input.to_string(),
        outcome: Outcome::Applied.into(),
        ..InputSettled::default()
    };
    let interrupt = session::InputSettled {
        settled: Some(settled),
        kind: "interrupt".to_owned(),
        ..session::InputSettled::default()
    };
    let entries = vec![
        started(),
        tool(Evaluation::Allow),
        Kind::InputSettled(interrupt),
        ended(0, StopReason::Interrupted),
    ];
    let shown = play(&mut thread(), entries);
    let result = shown.iter().find(|event| event.kind == "agent.tool_result").unwrap();
    assert_eq!(
        (&result.value()["is_error"], &result.value()["tool_use_id"]),
        (&json!(true), &json!(main_id(11)))
    );
    assert!(
        shown
            .iter()
            .any(|event| event.kind == "user.interrupt" && event.id == sent_id(&input.to_string()))
    );
    assert_eq!(shown.last().unwrap().value()["stop_reason"]["type"], "end_turn");
}

#[test]
fn a_failed_turn_has_a_reason_and_leaves_the_session_idle() {
    let shown = play(&mut thread(), vec![started(), ended(1, StopReason::EndTurn)]);
    let error = shown.iter().find(|event| event.kind == "session.error").unwrap();
    assert_eq!(error.value()["error"]["retry_status"]["type"], "exhausted");
    assert_eq!(shown.last().unwrap().value()["stop_reason"]["type"], "retries_exhausted");
}

#[test]
fn a_set_up_that_failed_shows_the_message_and_terminates() {
    failed_before_it_began("provision_setup");
}

#[test]
fn a_first_turn_that_failed_before_its_set_up_terminates() {
    failed_before_it_began("credentials");
}

fn failed_before_it_began(stage: &str) {
    let failure = Some(session::Failure { stage: stage.to_owned(), message: "no".to_owned() });
    let input = InputId::new();
    let unstarted = Some(TurnStarted {
        prompt: "hi".to_owned(),
        input_id: input.to_string(),
        ..TurnStarted::default()
    });
    let shown = play(
        &mut thread(),
        vec![Kind::TurnEnded(TurnEnded { failure, unstarted, ..TurnEnded::default() })],
    );
    assert_eq!(
        kinds(&shown)[..3],
        ["user.message", "session.status_running", "session.thread_status_running"]
    );
    assert_eq!(
        (shown[0].id.as_str(), &shown[0].value()["content"][0]["text"]),
        (sent_id(&input.to_string()).as_str(), &json!("hi"))
    );
    assert!(shown.last().unwrap().is_last());
}

fn any_kind() -> impl Strategy<Value = Kind> {
    let result = |id| agent(event::Kind::ToolResult(ToolResult::default()), id);
    prop_oneof![
        Just(started()),
        Just(said("x")),
        Just(tool(Evaluation::Ask)),
        (10_u64..40).prop_map(result),
        (10_u64..40).prop_map(asked),
        (10_u64..40).prop_map(|id| decided(id, InputId::new())),
        Just(ended(0, StopReason::EndTurn)),
        Just(ended(1, StopReason::Unspecified)),
        Just(ended(0, StopReason::Interrupted)),
        Just(agent(
            event::Kind::ModelRequestEnded(contract::host::ModelRequestEnded::default()),
            0
        )),
    ]
}

#[test]
fn requests_that_the_model_gateway_counted_are_the_spans_and_no_others() {
    let started =
        TurnStarted { prompt: "hi".to_owned(), is_metered: true, ..TurnStarted::default() };
    let request = |number: u64| format!("request-{number}");
    let begun = |number| {
        Kind::ModelRequestStarted(session::ModelRequestStarted {
            request_id: request(number),
            ..Default::default()
        })
    };
    let usage = session::Usage {
        input_tokens: Some(12),
        output_tokens: Some(5),
        cache_read_tokens: Some(2),
        ..Default::default()
    };
    let ended = |started| {
        Kind::ModelRequestEnded(ModelRequestEnded {
            started,
            usage: Some(usage.clone()),
            ..Default::default()
        })
    };
    let end = TurnEnded {
        stop_reason: StopReason::Budget.into(),
        exit_code: Some(1),
        ..TurnEnded::default()
    };
    let kinds =
        [Kind::TurnStarted(started), begun(1), begun(2), ended(3), ended(2), Kind::TurnEnded(end)];
    let (mut thread, mut shown) =
        (Thread::at(SessionId::new(), &FindTurnReply::default()), Vec::new());
    for (id, kind) in (1..).zip(kinds) {
        thread.apply(
            id,
            &SessionEvent { turn: 1, kind: Some(kind), ..SessionEvent::default() },
            &mut shown,
        );
    }
    let of = |kind: &str| shown.iter().filter(|event| event.kind == kind).collect::<Vec<_>>();
    let starts = of("span.model_request_start");
    let ends = of("span.model_request_end");
    assert_eq!((starts.len(), ends.len()), (2, 2));
    assert_eq!(ends[0].value()["model_request_start_id"], starts[1].id.as_str());
    assert_eq!(ends[1].value()["model_request_start_id"], starts[0].id.as_str());
    let counts = json!({ "input_tokens": 10, "output_tokens": 5, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 2 });
    assert_eq!(ends[0].value()["model_usage"], counts);
    assert_eq!(of("session.status_idle")[0].value()["stop_reason"]["type"], "budget_reached");
    assert!(of("session.error").is_empty());
}

proptest! {
    /// Ids differ, times and places ascend, results follow their uses, and a thread that is resumed
    /// from a kept state shows the same.
    #[test]
    fn random_logs_show_in_order(entries in proptest::collection::vec(any_kind(), 0..30), cut in 0_usize..30) {
        let mut thread = thread();
        let (mut shown, mut resumed) = (Vec::new(), None::<(Thread, Vec<Shown>)>);
        let mut at_us = 0;
        for (index, kind) in entries.iter().enumerate() {
            if index == cut {
                let kept = serde_json::from_str(&serde_json::to_string(&thread.state).unwrap()).unwrap();
                resumed = Some((Thread { state: kept, ..thread.clone() }, Vec::new()));
            }
            let event = SessionEvent { turn: 1, at_us: at_us + 1, kind: Some(kind.clone()), ..SessionEvent::default() };
            at_us += rules::chain::step(Some(kind));
            let id = 10 + index as u64;
            thread.apply(id, &event, &mut shown);
            if let Some((resumed, again)) = &mut resumed {
                resumed.apply(id, &event, again);
            }
        }
        if let Some((_, again)) = resumed {
            let rest: Vec<_> = shown[shown.len() - again.len()..].iter().map(|event| &event.body).collect();
            prop_assert_eq!(rest, again.iter().map(|event| &event.body).collect::<Vec<_>>());
        }
        let ids: BTreeSet<_> = shown.iter().map(|event| &event.id).collect();
        prop_assert_eq!(ids.len(), shown.len());
        prop_assert!(shown.iter().all(|event| TYPES.contains(&event.kind)));
        prop_assert!(shown.windows(2).all(|pair| pair[0].place < pair[1].place && pair[0].at_us < pair[1].at_us));
        for event in shown.iter().filter(|event| event.kind == "agent.tool_result") {
            let used = shown.iter().find(|used| event.value()["tool_use_id"] == used.id).unwrap();
            prop_assert!(used.place < event.place && used.kind == "agent.tool_use");
        }
    }
}
