use contract::host::{
    CustomToolResult, InputAccepted, Interrupt, Message, Spec, StartCli, TurnEnded, WhenBusy,
    Withdraw, decision::Verdict, event, input, input_settled::Outcome, record, turn_ended::Reason,
};
use proptest::prelude::*;

use super::{Action, CUSTOM_CALLS_MAX, Core, Input};
use crate::{
    adapters::{Adapter, Effect, Launch, Out, find, script},
    state::State,
};

fn core(state: State) -> Core {
    let spec = Spec { runtime: "shell".to_owned(), ..Spec::default() };
    let runtime = find("shell").unwrap();
    Core::new(spec.clone(), (runtime.new)(&spec), runtime.capabilities, state, Reason::HostLost, 0)
}

fn message(id: u32, when_busy: WhenBusy) -> Input {
    let message = Message {
        turn: id,
        text: format!("echo {id}"),
        when_busy: when_busy.into(),
        ..Message::default()
    };
    Input { id: format!("m{id}"), kind: Some(input::Kind::Message(message)) }
}

/// A CLI whose turn ends as soon as it is interrupted.
struct Prompt;

impl Adapter for Prompt {
    fn launch(&mut self, _: Option<&str>, _: &str) -> Launch {
        script("", false)
    }

    fn started(&mut self, _: &str, out: &mut Out) {
        out.push(Effect::Conversation { id: "c".to_owned(), model: "m".to_owned() });
        out.push(Effect::Ready);
    }

    fn message(&mut self, _: &str, _: &mut Out) {}

    fn interrupt(&mut self, out: &mut Out) -> bool {
        out.push(Effect::TurnEnded {
            reason: Reason::Interrupted,
            message: String::new(),
            usage: None,
        });
        true
    }
}

/// A host of [`Prompt`], whose process serves several turns.
fn converses() -> Core {
    let tools = vec![contract::host::CustomTool { name: "ask".to_owned(), ..Default::default() }];
    let spec = Spec { runtime: "shell".to_owned(), custom_tools: tools, ..Spec::default() };
    let capabilities = find("claude").unwrap().capabilities;
    Core::new(spec, Box::new(Prompt), capabilities, State::default(), Reason::HostLost, 0)
}

/// A turn of [`Prompt`] that has the message.
fn running() -> Core {
    let mut core = converses();
    core.input(message(1, WhenBusy::Queue), 0);
    core.started(1, "/", 0);
    core.take_actions();
    core
}

fn records(core: &mut Core) -> Vec<record::Kind> {
    let record = |action| if let Action::Record(kind) = action { Some(kind) } else { None };
    core.take_actions().into_iter().filter_map(record).collect()
}

#[test]
fn an_interrupt_is_settled_before_the_turn_that_it_ends() {
    let mut core = running();
    core.input(
        Input { id: "i".to_owned(), kind: Some(input::Kind::Interrupt(Interrupt::default())) },
        1,
    );
    let records = records(&mut core);
    let settled = records
        .iter()
        .position(|kind| matches!(kind, record::Kind::InputSettled(settled) if settled.id == "i"));
    let ended = records.iter().position(|kind| matches!(kind, record::Kind::TurnEnded(_)));
    assert!(settled.is_some() && settled < ended, "{records:?}");
}

fn start_cli(id: &str) -> Input {
    Input { id: id.to_owned(), kind: Some(input::Kind::StartCli(StartCli {})) }
}

fn outcome(records: &[record::Kind], id: &str) -> Option<Outcome> {
    records.iter().find_map(|kind| match kind {
        record::Kind::InputSettled(settled) if settled.id == id => Some(settled.outcome()),
        _ => None,
    })
}

#[test]
fn a_cli_that_was_started_ahead_takes_its_first_message_and_is_closed_when_none_comes() {
    let mut core = converses();
    core.spec.idle_seconds = 300;
    core.input(start_cli("s"), 0);
    let starts = core.take_actions();
    assert_eq!(starts.iter().filter(|action| matches!(action, Action::Start(_))).count(), 1);
    core.started(1, "/", 10);
    assert_eq!(outcome(&records(&mut core), "s"), Some(Outcome::Applied));
    assert_eq!(core.next_tick(), Some(300_010), "an idle CLI is closed");
    core.input(message(1, WhenBusy::Queue), 20);
    let actions = core.take_actions();
    assert!(!actions.iter().any(|action| matches!(action, Action::Start(_))), "{actions:?}");
    assert!(core.turn.as_ref().is_some_and(|turn| turn.delivered));
    core.input(start_cli("late"), 30);
    assert_eq!(outcome(&records(&mut core), "late"), Some(Outcome::Refused));
}

#[test]
fn a_conversation_that_was_opened_ahead_is_reported_with_its_first_message_or_forgotten() {
    let is_opened = |kind: &record::Kind| {
        matches!(kind, record::Kind::Event(event)
            if matches!(event.kind, Some(event::Kind::ConversationStarted(_))))
    };
    for is_closed in [false, true] {
        let mut core = converses();
        core.input(start_cli("s"), 0);
        core.started(1, "/", 10);
        assert!(!records(&mut core).iter().any(is_opened), "no turn would report it");
        if is_closed {
            core.exited(0, 20);
        }
        core.input(message(1, WhenBusy::Queue), 30);
        assert_eq!(core.state().conversation_id.is_empty(), is_closed, "nothing to resume");
        if is_closed {
            core.started(2, "/", 40);
        }
        let records = records(&mut core);
        let begun =
            records.iter().position(|kind| matches!(kind, record::Kind::TurnStarted(_))).unwrap();
        assert_eq!(records[begun..].iter().filter(|kind| is_opened(kind)).count(), 1);
    }
}

#[test]
fn a_message_that_comes_while_the_cli_starts_ahead_waits_for_no_second_start() {
    let mut core = converses();
    core.input(start_cli("s"), 0);
    core.input(message(1, WhenBusy::Queue), 1);
    core.started(1, "/", 2);
    let actions = core.take_actions();
    assert_eq!(actions.iter().filter(|action| matches!(action, Action::Start(_))).count(), 1);
    assert!(core.turn.as_ref().is_some_and(|turn| turn.delivered), "{actions:?}");
}

#[test]
fn a_cli_that_cannot_be_started_ahead_costs_its_first_message_nothing() {
    let mut core = converses();
    core.input(start_cli("s"), 0);
    core.take_actions();
    core.start_failed("no such file", 1);
    assert_eq!(outcome(&records(&mut core), "s"), Some(Outcome::Refused));
    core.input(message(1, WhenBusy::Queue), 2);
    core.started(1, "/", 3);
    assert!(core.turn.as_ref().is_some_and(|turn| turn.delivered));
    // A shell has no process that waits.
    let mut core = self::core(State::default());
    core.input(start_cli("s"), 0);
    assert_eq!(outcome(&records(&mut core), "s"), Some(Outcome::Refused));
}

#[test]
fn an_error_between_turns_is_reported_in_the_next_turn() {
    let mut core = running();
    core.input(
        Input { id: "i".to_owned(), kind: Some(input::Kind::Interrupt(Interrupt::default())) },
        1,
    );
    core.take_actions();
    let is_error = |kind: &record::Kind| matches!(kind, record::Kind::Event(event) if matches!(event.kind, Some(event::Kind::Error(_))));
    core.mcp_failed("slow");
    assert!(!records(&mut core).iter().any(is_error));
    core.input(message(2, WhenBusy::Queue), 2);
    let told = records(&mut core);
    let started = told.iter().position(|kind| matches!(kind, record::Kind::TurnStarted(_)));
    assert!(started.is_some() && started < told.iter().position(is_error), "{told:?}");
    assert_eq!(told.iter().filter(|kind| is_error(kind)).count(), 1);
}

/// Of the CLI's, that is: what it says late of a turn that was interrupted is no error of the next
/// turn.
#[test]
fn an_error_of_a_turn_that_ended_is_not_told_of_in_the_next_one() {
    let mut core = running();
    core.input(
        Input { id: "i".to_owned(), kind: Some(input::Kind::Interrupt(Interrupt::default())) },
        1,
    );
    let mut late = Out::default();
    late.event(event::Kind::Error(contract::host::AgentError {
        kind: "unknown_error".to_owned(),
        ..Default::default()
    }));
    core.apply(late, 2);
    core.take_actions();
    core.input(message(2, WhenBusy::Queue), 3);
    let told = records(&mut core);
    assert!(told.iter().any(|kind| matches!(kind, record::Kind::TurnStarted(_))), "{told:?}");
    assert!(!told.iter().any(|kind| matches!(kind, record::Kind::Event(_))), "{told:?}");
}

#[test]
fn a_custom_tool_waits_for_its_result_and_takes_the_first() {
    let mut core = running();
    core.custom_tool_called("1:7".to_owned(), "ask".to_owned(), "{}".to_owned(), 1);
    let requested = records(&mut core).into_iter().find_map(|kind| match kind {
        record::Kind::DecisionRequested(request) if request.is_custom_tool => Some(request.id),
        _ => None,
    });
    let request = requested.unwrap();
    let result = |id: &str, text: &str| {
        let result = CustomToolResult { request, text: text.to_owned(), is_error: false };
        Input { id: id.to_owned(), kind: Some(input::Kind::CustomToolResult(result)) }
    };
    // A decision is no result.
    let decision = contract::host::Decision {
        request,
        verdict: Verdict::Allow.into(),
        message: String::new(),
    };
    core.input(Input { id: "d".to_owned(), kind: Some(input::Kind::Decision(decision)) }, 2);
    for (id, text) in [("r", "yes"), ("r", "yes"), ("s", "no")] {
        core.input(result(id, text), 2);
    }
    let answers: Vec<_> = core
        .take_actions()
        .into_iter()
        .filter(|action| matches!(action, Action::CustomToolResult { .. }))
        .collect();
    assert_eq!(
        answers,
        [Action::CustomToolResult {
            call: "1:7".to_owned(),
            text: "yes".to_owned(),
            is_error: false
        }]
    );
    assert!(core.state().requests.is_empty());
}

#[test]
fn calls_of_custom_tools_that_are_withdrawn_at_once_do_not_fill_the_log() {
    let mut core = running();
    for number in 0..CUSTOM_CALLS_MAX + 100 {
        let call = format!("1:{number}");
        core.custom_tool_called(call.clone(), "ask".to_owned(), "{}".to_owned(), 1);
        core.custom_tool_cancelled(&call, 1);
    }
    let requested =
        |action: &Action| matches!(action, Action::Record(record::Kind::DecisionRequested(_)));
    assert_eq!(
        core.take_actions().iter().filter(|action| requested(action)).count(),
        CUSTOM_CALLS_MAX
    );
}

#[test]
fn open_custom_tool_calls_are_withdrawn_with_their_turn_or_server() {
    let mut core = running();
    core.custom_tool_called("1:1".to_owned(), "ask".to_owned(), "{}".to_owned(), 1);
    core.custom_tool_called("2:1".to_owned(), "ask".to_owned(), "{}".to_owned(), 1);
    core.custom_tool_called("2:2".to_owned(), "nope".to_owned(), "{}".to_owned(), 1);
    assert_eq!(core.state().requests.len(), 2, "an unknown tool is refused");
    core.custom_tools_gone(1, 1);
    assert_eq!(core.state().requests.len(), 1);
    core.take_actions();
    core.input(
        Input { id: "i".to_owned(), kind: Some(input::Kind::Interrupt(Interrupt::default())) },
        1,
    );
    assert!(core.state().requests.is_empty());
    let answers = core
        .take_actions()
        .into_iter()
        .filter(|action| matches!(action, Action::CustomToolResult { is_error: true, .. }));
    assert_eq!(answers.count(), 1);
}

#[derive(Debug, Clone)]
enum Happening {
    Deliver(Input),
    ProgramExits,
    HostIsKilled,
    TimePasses(u64),
}

fn happenings() -> impl Strategy<Value = Vec<Happening>> {
    let busy = prop_oneof![
        Just(WhenBusy::Queue),
        Just(WhenBusy::Interrupt),
        Just(WhenBusy::Steer),
        Just(WhenBusy::Join)
    ];
    let happening = prop_oneof![
        4 => (1_u32..6, busy).prop_map(|(id, busy)| Happening::Deliver(message(id, busy))),
        1 => (0_u32..4).prop_map(|id| Happening::Deliver(Input { id: format!("i{id}"), kind: Some(input::Kind::Interrupt(Interrupt::default())) })),
        1 => (0_u32..4).prop_map(|id| Happening::Deliver(start_cli(&format!("s{id}")))),
        1 => (0_u32..6).prop_map(|id| {
            let withdraw = Withdraw { input_id: format!("m{id}") };
            Happening::Deliver(Input { id: format!("w{id}"), kind: Some(input::Kind::Withdraw(withdraw)) })
        }),
        3 => Just(Happening::ProgramExits),
        1 => Just(Happening::HostIsKilled),
        1 => (1_u64..20_000).prop_map(Happening::TimePasses),
    ];
    proptest::collection::vec(happening, 1..40)
}

proptest! {
    /// Deliveries repeated, late and in any order, exits, kills of the host: each message is one
    /// turn at most, turns follow one another, each that began ends once, and at rest nothing that
    /// was accepted is left over.
    #[test]
    fn every_accepted_message_is_one_turn_or_none(happenings in happenings(), is_shell in any::<bool>()) {
        let new = |state: State| {
            let mut core = core(state);
            core.capabilities.stays_alive = !is_shell;
            core
        };
        let mut core = new(State::default());
        let (mut now, mut records, mut runs) = (0, Vec::new(), false);
        let mut settle = |core: &mut Core, now: u64, runs: &mut bool| {
            loop {
                let actions = core.take_actions();
                if actions.is_empty() {
                    return;
                }
                for action in actions {
                    match action {
                        Action::Record(kind) => records.push(kind),
                        Action::Start(_) => {
                            assert!(!*runs, "two programs");
                            *runs = true;
                            core.started(1, "/", now);
                        }
                        Action::Kill | Action::Terminate if *runs => {
                            *runs = false;
                            core.exited(143, now);
                        }
                        _ => {}
                    }
                }
            }
        };
        let rest = [Happening::TimePasses(1), Happening::ProgramExits].into_iter().cycle().take(40);
        for happening in happenings.into_iter().chain(rest) {
            match happening {
                Happening::Deliver(input) => core.input(input, now),
                Happening::ProgramExits if runs => {
                    runs = false;
                    core.exited(0, now);
                }
                Happening::ProgramExits => {}
                Happening::HostIsKilled => {
                    runs = false;
                    core = new(core.state().clone());
                }
                Happening::TimePasses(ms) => {
                    now += ms;
                    core.tick(true, now);
                }
            }
            settle(&mut core, now, &mut runs);
        }
        let mut open: Option<u32> = None;
        let mut turns = Vec::new();
        for kind in &records {
            match kind {
                record::Kind::TurnStarted(started) => {
                    prop_assert!(open.is_none() && !turns.contains(&started.turn), "{records:?}");
                    open = Some(started.turn);
                    turns.push(started.turn);
                }
                record::Kind::TurnEnded(TurnEnded { turn, .. }) => prop_assert_eq!(open.take(), Some(*turn)),
                _ => {}
            }
        }
        let settled = |id: &str| records.iter().filter(|kind| matches!(kind, record::Kind::InputSettled(settled) if settled.id == id)).count();
        for kind in &records {
            if let record::Kind::InputAccepted(accepted) = kind {
                let id = &accepted.input.as_ref().unwrap().id;
                prop_assert!(settled(id) <= 1, "{id} settled twice");
            }
        }
        prop_assert!(open.is_none() && core.state().queued.is_empty(), "{:?}", core.state());
        let began = |id: &str| records.iter().any(|kind| matches!(kind, record::Kind::TurnStarted(turn) if turn.input_id == id));
        for kind in &records {
            if let record::Kind::InputAccepted(InputAccepted { input: Some(Input { id, kind: Some(input::Kind::Message(message)) }) }) = kind {
                prop_assert!(message.when_busy() != WhenBusy::Join || !began(id), "{id} became a turn");
            }
        }
    }
}
