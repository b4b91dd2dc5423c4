use std::cell::RefCell;

use contract::{
    host::{
        AgentError, AgentMessage, Event, ModelRequestEnded, ModelUsage, ToolResult, ToolUse,
        decision_settled::How,
    },
    session::{
        AgentEvent, DecisionRequested, DecisionSettled, OpenTool, Output, StopReason, TurnEnded,
        TurnStarted, Usage,
    },
};
use futures::FutureExt as _;
use proptest::prelude::*;
use serde_json::Value;
use types::InputId;

use super::*;

/// A session whose queue drains while it is read. Its log is as a runner writes it.
#[derive(Default)]
struct Session {
    log: Vec<(u64, SessionEvent)>,
    /// After which entry each turn begins.
    turns: Vec<u64>,
    runtime: &'static str,
    checkpoint: Checkpoint,
    queue: Vec<Input>,
    page: usize,
    /// Requests until the next message leaves the queue, again and again; 0: none does.
    drain_every: usize,
    requests: usize,
    entries_read: usize,
}

/// What an agent does.
#[derive(Clone, Copy, Debug)]
enum Step {
    Say,
    Print,
    Use,
    /// The result of one of the tool uses that are open.
    Result(usize),
    /// Whether the tool use is shown by the request alone.
    Ask(bool),
    Custom,
    Answer,
    Report,
    Fail,
}

fn agent(kind: event::Kind, tool_use: u64) -> Kind {
    Kind::Agent(AgentEvent {
        event: Some(Event { id: 1, parent: 0, kind: Some(kind) }),
        tool_use,
        ..AgentEvent::default()
    })
}

fn said() -> Kind {
    agent(
        event::Kind::Message(AgentMessage { text: "ok".to_owned(), ..AgentMessage::default() }),
        0,
    )
}

impl Session {
    fn append(&mut self, kind: Kind) -> u64 {
        let (id, at_us) =
            self.log.last().map_or((7, 1_000_000), |(id, event)| (id + 3, event.at_us + 1000));
        let (turn, checkpoint) = (self.turns.len() as u32, Some(self.checkpoint.clone()));
        self.log.push((
            id,
            SessionEvent { turn, at_us, checkpoint, kind: Some(kind), ..SessionEvent::default() },
        ));
        id
    }

    fn begin(&mut self, input_id: String, is_metered: bool) {
        self.turns.push(self.log.last().map_or(0, |(id, _)| *id));
        self.checkpoint = Checkpoint::default();
        self.append(Kind::Stage(contract::session::StageChanged::default()));
        self.checkpoint.started = true;
        self.append(Kind::TurnStarted(TurnStarted {
            prompt: "hi".to_owned(),
            input_id,
            is_metered,
        }));
    }

    fn end(&mut self, fails: bool) {
        let (exit_code, stop_reason) = (Some(i32::from(fails)), StopReason::EndTurn.into());
        let usage = Some(Usage { output_tokens: Some(1000), ..Usage::default() });
        self.append(Kind::TurnEnded(TurnEnded {
            exit_code,
            stop_reason,
            usage,
            ..TurnEnded::default()
        }));
    }

    fn turn(&mut self, input_id: String, outputs: usize, messages: usize) {
        self.begin(input_id, false);
        for _ in 0..messages {
            (0..outputs).for_each(|_| self.step(Step::Print));
            self.step(Step::Say);
        }
        (0..outputs).for_each(|_| self.step(Step::Print));
        self.end(false);
    }

    fn step(&mut self, step: Step) {
        let opened = |event_id| OpenTool { journal_id: event_id, event_id, is_mcp: false };
        match step {
            Step::Say => _ = self.append(said()),
            Step::Print => _ = self.append(Kind::Output(Output::default())),
            Step::Use => {
                let id = self.append(agent(
                    event::Kind::ToolUse(ToolUse { name: "Bash".to_owned(), ..ToolUse::default() }),
                    0,
                ));
                self.checkpoint.open_tools.push(opened(id));
            }
            Step::Result(index) if !self.checkpoint.open_tools.is_empty() => {
                let tool =
                    self.checkpoint.open_tools.remove(index % self.checkpoint.open_tools.len());
                self.append(agent(event::Kind::ToolResult(ToolResult::default()), tool.event_id));
            }
            Step::Ask(_) | Step::Custom => {
                let is_own = matches!(step, Step::Ask(true) | Step::Custom)
                    || self.checkpoint.open_tools.is_empty();
                let id = self.log.len() as u64;
                let tool_use = if is_own { 0 } else { self.checkpoint.open_tools[0].event_id };
                let asked = contract::host::DecisionRequested {
                    id,
                    is_custom_tool: matches!(step, Step::Custom),
                    ..Default::default()
                };
                self.checkpoint.open_requests.push(id);
                let event = self.append(Kind::DecisionRequested(DecisionRequested {
                    request: Some(asked),
                    tool_use,
                }));
                if is_own {
                    self.checkpoint.open_tools.push(OpenTool {
                        journal_id: id,
                        event_id: event,
                        is_mcp: false,
                    });
                }
            }
            Step::Answer if !self.checkpoint.open_requests.is_empty() => {
                let id = self.checkpoint.open_requests.remove(0);
                let asked = self.log.iter().find_map(|(event, entry)| match &entry.kind {
                    Some(Kind::DecisionRequested(asked)) if asked.request.as_ref()?.id == id => {
                        Some((*event, asked.tool_use))
                    }
                    _ => None,
                });
                let (event, tool_use) = asked.unwrap();
                let how = How::Allowed.into();
                let settled = contract::host::DecisionSettled {
                    id,
                    how,
                    input_id: InputId::new().to_string(),
                };
                let tool_use = if tool_use == 0 { event } else { tool_use };
                self.append(Kind::DecisionSettled(DecisionSettled {
                    settled: Some(settled),
                    tool_use,
                    ..DecisionSettled::default()
                }));
            }
            Step::Report if self.runtime == "codex" => {
                let usage = Some(ModelUsage { output_tokens: 10, ..ModelUsage::default() });
                self.append(agent(event::Kind::ModelRequestEnded(ModelRequestEnded { usage }), 0));
            }
            Step::Fail => _ = self.append(agent(event::Kind::Error(AgentError::default()), 0)),
            Step::Result(_) | Step::Answer | Step::Report => {}
        }
    }

    fn requested(&mut self) {
        self.requests += 1;
        if self.drain_every > 0
            && self.requests.is_multiple_of(self.drain_every)
            && !self.queue.is_empty()
        {
            let input = self.queue.remove(0);
            self.turn(input.input_id, 1, 1);
        }
    }
}

/// Rows of an earlier release: a page may hold nothing but output.
fn read(page: Vec<(u64, SessionEvent)>, through: Option<u64>) -> Read {
    let Some(through) = through else { return Read::End };
    let shown = page.into_iter().filter(|(_, event)| !matches!(event.kind, Some(Kind::Output(_))));
    let entries: Vec<Entry> = shown.map(|(id, event)| (id, event, 100)).collect();
    if entries.is_empty() { Read::Output { through } } else { Read::Entries(entries) }
}

impl Log for &RefCell<Session> {
    async fn find(&self, before: u64) -> Result<FindTurnReply, ApiError> {
        self.borrow_mut().requested();
        let session = self.borrow();
        let found = session
            .turns
            .iter()
            .enumerate()
            .rev()
            .find(|(_, begun_after)| before == 0 || **begun_after < before);
        let (turn, begun_after) =
            found.map_or((0, 0), |(index, begun_after)| (index as u32 + 1, *begun_after));
        let usage_before = Some(Usage {
            output_tokens: Some(1000 * u64::from(turn.saturating_sub(1))),
            ..Usage::default()
        });
        Ok(FindTurnReply {
            turn,
            begun_after,
            usage_before,
            runtime: session.runtime.to_owned(),
            ..FindTurnReply::default()
        })
    }

    async fn read(&self, after: u64, limit: usize) -> Result<Read, ApiError> {
        self.borrow_mut().requested();
        let mut session = self.borrow_mut();
        let limit = session.page.min(limit);
        let page: Vec<_> =
            session.log.iter().filter(|(id, _)| *id > after).take(limit).cloned().collect();
        session.entries_read += page.len();
        let page: Vec<_> = page
            .into_iter()
            .map(|(id, event)| (id, SessionEvent { checkpoint: None, ..event }))
            .collect();
        let through = page.last().map(|(id, _)| *id);
        Ok(read(page, through))
    }

    async fn read_before(&self, before: u64, limit: usize) -> Result<Read, ApiError> {
        self.borrow_mut().requested();
        let mut session = self.borrow_mut();
        let limit = session.page.min(limit);
        let mut page: Vec<_> =
            session.log.iter().rev().filter(|(id, _)| *id < before).take(limit).cloned().collect();
        session.entries_read += page.len();
        page.reverse();
        let through = page.first().map(|(id, _)| *id);
        Ok(read(page, through))
    }

    async fn queue(&self) -> Result<Vec<Input>, ApiError> {
        let queue = self.borrow().queue.clone();
        self.borrow_mut().requested();
        Ok(queue)
    }
}

fn input(created_at_us: i64) -> Input {
    Input {
        input_id: InputId::new().to_string(),
        kind: "message".to_owned(),
        created_at_us,
        ..Input::default()
    }
}

fn every(types: &[&str]) -> Filter {
    Filter {
        types: types.iter().map(|name| (*name).to_owned()).collect(),
        times: i64::MIN..=i64::MAX,
    }
}

fn page(
    session: &RefCell<Session>,
    (limit, types, is_ascending): (usize, &[&str], bool),
    from: Option<&Cursor>,
) -> (Vec<String>, Option<Cursor>) {
    let mut listing =
        Listing::new(session, SessionId::from_uuid(uuid::Uuid::nil()), every(types), limit);
    let next = match is_ascending {
        true => listing.ascending(from).now_or_never(),
        false => listing.descending(from).now_or_never(),
    };
    (listing.data, next.unwrap().ok().unwrap())
}

/// Follows the cursors as an SDK does: to the first page that is empty or the last.
fn pages(
    session: &RefCell<Session>,
    limit: usize,
    types: &[&str],
    is_ascending: bool,
) -> Vec<String> {
    let (mut all, mut from) = (Vec::new(), None);
    for _ in 0..10_000 {
        let (data, next) = page(session, (limit, types, is_ascending), from.as_ref());
        assert!(
            data.len() <= limit && (next.is_none() || !data.is_empty()),
            "an empty page with a cursor"
        );
        all.extend(data);
        from = next;
        if from.is_none() {
            return all;
        }
    }
    panic!("the pages do not end");
}

fn ids(events: &[String]) -> Vec<String> {
    let id = |event: &String| {
        serde_json::from_str::<Value>(event).unwrap()["id"].as_str().unwrap().to_owned()
    };
    events.iter().map(id).collect()
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => Just(Step::Say),
        1 => Just(Step::Print),
        3 => Just(Step::Use),
        4 => any::<usize>().prop_map(Step::Result),
        1 => any::<bool>().prop_map(Step::Ask),
        1 => Just(Step::Custom),
        3 => Just(Step::Answer),
        2 => Just(Step::Report),
        1 => Just(Step::Fail),
    ]
}

/// A long turn is listed from its end: the last page costs what it shows.
#[test]
fn a_descending_page_reads_what_it_shows() {
    for (runtime, is_metered) in [("claude", false), ("codex", false), ("codex", true)] {
        let session = RefCell::new(Session { page: 2000, runtime, ..Session::default() });
        session.borrow_mut().begin(String::new(), is_metered);
        for _ in 0..5000 {
            for step in [Step::Say, Step::Use, Step::Result(0), Step::Report] {
                if !(is_metered && matches!(step, Step::Report)) {
                    session.borrow_mut().step(step);
                }
            }
        }
        session.borrow_mut().end(false);
        let whole = pages(&session, 100_000, &[], true);
        let mut from = None;
        for number in 0..5 {
            (session.borrow_mut().entries_read, session.borrow_mut().requests) = (0, 0);
            let (data, next) = page(&session, (100, &[], false), from.as_ref());
            let begin = whole.len() - 100 * (number + 1);
            assert!(data.iter().rev().eq(&whole[begin..begin + 100]));
            let (read, requests) = (session.borrow().entries_read, session.borrow().requests);
            assert!(
                read <= 101 + MARGIN + HEAD && requests <= 5,
                "{runtime} {number}: {read} entries, {requests} requests"
            );
            from = next;
        }
    }
}

proptest! {
    /// Whatever an agent does, and wherever a page begins in its turn.
    #[test]
    fn descending_pages_are_ascending_ones_reversed(
        turns in proptest::collection::vec((proptest::collection::vec(any_step(), 0..120), any::<bool>(), any::<bool>()), 1..3),
        (runtime, limit, page) in (prop_oneof![Just("claude"), Just("codex")], 1_usize..25, 1_usize..60),
    ) {
        let session = RefCell::new(Session { page, runtime, ..Session::default() });
        for (steps, is_metered, fails) in turns {
            session.borrow_mut().begin(String::new(), is_metered);
            for step in steps {
                // The model gateway counts then.
                if !(is_metered && matches!(step, Step::Report)) {
                    session.borrow_mut().step(step);
                }
            }
            session.borrow_mut().end(fails);
        }
        let whole = pages(&session, 100_000, &[], true);
        let mut backwards = pages(&session, limit, &[], false);
        backwards.reverse();
        prop_assert_eq!(&backwards, &whole);
    }

    /// Whatever the size of pages, and however much output lies between events: all pages
    /// together are one long page, in both orders.
    #[test]
    fn pages_together_hold_every_event_once(
        turns in proptest::collection::vec((0_usize..12, 0_usize..3), 0..4),
        (queued, limit, page) in (0_i64..4, 1_usize..12, 1_usize..6),
    ) {
        let session = RefCell::new(Session { page, queue: (0..queued).map(input).collect(), ..Session::default() });
        for (outputs, messages) in turns {
            session.borrow_mut().turn(String::new(), outputs, messages);
        }
        for types in [&[][..], &["session.status_idle"], &["user.message", "session.error"]] {
            let whole = pages(&session, 100_000, types, true);
            prop_assert_eq!(&pages(&session, limit, types, true), &whole);
            let mut backwards = pages(&session, limit, types, false);
            backwards.reverse();
            prop_assert_eq!(&backwards, &whole);
        }
    }

    /// Messages leave the queue between pages, and while a page is made: each event is in some
    /// page.
    #[test]
    fn every_message_that_leaves_the_queue_is_in_a_page(
        (turns, queued, limit, page, drain_every) in (0_usize..3, 1_i64..6, 1_usize..8, 1_usize..8, 1_usize..9),
        is_ascending: bool,
    ) {
        let session = RefCell::new(Session { page, queue: (0..queued).map(input).collect(), ..Session::default() });
        for _ in 0..turns {
            session.borrow_mut().turn(String::new(), 2, 1);
        }
        let before = ids(&pages(&session, 100_000, &[], true));
        session.borrow_mut().drain_every = drain_every;
        let seen: HashSet<_> = ids(&pages(&session, limit, &[], is_ascending)).into_iter().collect();
        prop_assert!(before.iter().all(|id| seen.contains(id)));
        if is_ascending {
            // What is queued last needs no second look; everything that was processed before it
            // was read does.
            session.borrow_mut().drain_every = 0;
            let left: HashSet<_> = session.borrow().queue.iter().map(|input| send::queued(input).unwrap()["id"].as_str().unwrap().to_owned()).collect();
            let missing = ids(&pages(&session, 100_000, &["user.message"], true)).into_iter();
            prop_assert!(missing.filter(|id| !left.contains(id)).all(|id| seen.contains(&id)));
        }
    }
}
