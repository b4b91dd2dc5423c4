use std::collections::HashMap;

use contract::{
    host::{
        self as agent_host, AgentMessage, Decision, DecisionRequested, DecisionSettled, Input,
        InputAccepted, InputSettled, Record, StepEnded, StepStarted, ToolResult, ToolUse,
        TurnEnded, TurnStarted, event, input, record,
    },
    session::{Checkpoint, OutputDropped, Preview, session_event::Kind},
};
use proptest::{collection::vec, prelude::*, sample::Index};
use types::limits::OUTPUT_EVENT_BYTES_MAX;

use crate::{
    mask::Masker,
    playback::{
        Emitted, Place, Playback, Scope, own_tool, place::EVENT_BYTES_MIN, sent_bytes,
        streams::TAIL_BYTES,
    },
};

const TURN: u32 = 7;
const SECRET: &str = "sk-sentinel-12345";

/// A journal: each record with its offset and the next one's.
type Journal = Vec<(u64, u64, Record)>;

fn journal(kinds: Vec<record::Kind>) -> Journal {
    let mut offset = 3;
    let place = |kind: record::Kind| {
        let record = Record { at_us: 1, kind: Some(kind) };
        let from = offset;
        offset += 16 + prost::Message::encoded_len(&record) as u64;
        (from, offset, record)
    };
    kinds.into_iter().map(place).collect()
}

fn output(stderr: bool, data: &[u8]) -> record::Kind {
    record::Kind::Output(agent_host::Output {
        stream: i32::from(stderr),
        data: data.to_vec().into(),
    })
}

fn event(id: u64, kind: event::Kind) -> record::Kind {
    record::Kind::Event(agent_host::Event { id, parent: 0, kind: Some(kind) })
}

fn tool_use(id: u64, server: &str) -> record::Kind {
    event(id, event::Kind::ToolUse(ToolUse { mcp_server: server.to_owned(), ..ToolUse::default() }))
}

fn tool_result(id: u64, of: u64) -> record::Kind {
    event(id, event::Kind::ToolResult(ToolResult { tool_use: of, ..ToolResult::default() }))
}

fn started(turn: u32) -> record::Kind {
    record::Kind::TurnStarted(TurnStarted { turn, ..TurnStarted::default() })
}

fn ended(turn: u32) -> record::Kind {
    record::Kind::TurnEnded(TurnEnded { turn, ..TurnEnded::default() })
}

/// What may stand in a turn, of whatever the agent does.
fn inside() -> impl Strategy<Value = Vec<record::Kind>> {
    let text = prop_oneof![
        "[a-z\u{e9}\u{1f600}\n]{0,12}",
        Just(format!("<{SECRET}>")),
        Just("sk-sentinel-1".to_owned())
    ];
    let bytes = prop_oneof![4 => text.prop_map(String::into_bytes), 1 => vec(any::<u8>(), 0..6)];
    let piece = prop_oneof![
        6 => (any::<bool>(), bytes).prop_map(|(stderr, data)| (0, stderr, data)),
        4 => (1_u8..7).prop_map(|kind| (kind, false, Vec::new())),
    ];
    (vec(piece, 0..24), vec(any::<Index>(), 0..24)).prop_map(|(pieces, cuts)| {
        let (mut kinds, mut id, mut open, mut asked) = (Vec::new(), 10, Vec::new(), Vec::new());
        for (number, (kind, stderr, data)) in pieces.into_iter().enumerate() {
            id += 1;
            match kind {
                // Cut anywhere, within characters and secrets.
                0 => {
                    let cut = cuts.get(number).map_or(0, |cut| cut.index(data.len() + 1));
                    kinds.extend([output(stderr, &data[..cut]), output(stderr, &data[cut..])]);
                }
                1 => {
                    open.push(id);
                    kinds.push(tool_use(id, if id % 2 == 0 { "server" } else { "" }));
                }
                2 => kinds.extend(open.pop().map(|of| tool_result(id, of))),
                3 => {
                    let id = format!("input-{id}");
                    let decision = Some(input::Kind::Decision(Decision::default()));
                    let accepted =
                        InputAccepted { input: Some(Input { id: id.clone(), kind: decision }) };
                    kinds.push(record::Kind::InputAccepted(accepted));
                    kinds.push(record::Kind::InputSettled(InputSettled {
                        id,
                        ..InputSettled::default()
                    }));
                }
                4 => kinds.extend(open.last().map(|id| {
                    asked.push(*id);
                    record::Kind::DecisionRequested(DecisionRequested {
                        id: *id,
                        ..DecisionRequested::default()
                    })
                })),
                // A custom tool's, which no event shows but this one.
                5 => {
                    asked.push(id);
                    let request = DecisionRequested {
                        id,
                        is_custom_tool: true,
                        ..DecisionRequested::default()
                    };
                    kinds.push(record::Kind::DecisionRequested(request));
                }
                _ => kinds.extend(asked.pop().map(|id| {
                    record::Kind::DecisionSettled(DecisionSettled {
                        id,
                        ..DecisionSettled::default()
                    })
                })),
            }
        }
        kinds
    })
}

/// The log: each event with its checkpoint. Ids are positions in it.
#[derive(Clone, Default)]
struct Log(Vec<(Kind, Checkpoint)>);

impl Log {
    /// What a successor finds: the newest event's checkpoint and, where that shows a tool use, its
    /// own.
    fn checkpoint(&self, beginning: &Checkpoint) -> Checkpoint {
        let Some((kind, checkpoint)) = self.0.last() else { return beginning.clone() };
        let mut checkpoint = checkpoint.clone();
        own_tool(Some(kind), self.0.len() as u64, &mut checkpoint);
        checkpoint
    }

    fn append(&mut self, playback: &mut Playback, most: usize) {
        for _ in 0..most {
            let Some(emitted) = playback.next() else { return };
            let mut checkpoint = Checkpoint { started: true, ..Checkpoint::default() };
            emitted.place.apply(&mut checkpoint);
            self.0.push((emitted.kind, checkpoint));
            playback.appended(self.0.len() as u64);
        }
    }

    /// What a reader sees: both streams as they are joined, and the other events, whose references
    /// are to positions among themselves.
    fn seen(&self) -> ([Vec<u8>; 2], Vec<String>) {
        let (mut streams, mut events, mut numbers) =
            ([Vec::new(), Vec::new()], Vec::new(), HashMap::from([(0, 0)]));
        for (index, (kind, _)) in self.0.iter().enumerate() {
            match kind {
                Kind::Output(output) => {
                    streams[usize::from(output.stderr)].extend_from_slice(&output.data)
                }
                kind => {
                    numbers.insert(index as u64 + 1, events.len() as u64 + 1);
                    let mut kind = kind.clone();
                    match &mut kind {
                        Kind::Agent(event) => event.tool_use = numbers[&event.tool_use],
                        Kind::DecisionRequested(event) => event.tool_use = numbers[&event.tool_use],
                        Kind::DecisionSettled(event) => event.tool_use = numbers[&event.tool_use],
                        _ => {}
                    }
                    events.push(format!("{kind:?}"));
                }
            }
        }
        (streams, events)
    }
}

fn play_on(
    log: &mut Log,
    journal: &Journal,
    beginning: &Checkpoint,
    (masker, output_bytes_max): (&Masker, u64),
    records: usize,
    events: usize,
    settle: &[bool],
) -> bool {
    let checkpoint = log.checkpoint(beginning);
    let mut playback =
        Playback::new(Scope::Turn(TURN), masker.clone(), output_bytes_max, &checkpoint);
    // A runner that takes over fetches what is not settled.
    for (_, _, record) in journal {
        if let Some(record::Kind::InputAccepted(InputAccepted { input: Some(input) })) =
            &record.kind
        {
            playback.knows(input);
        }
    }
    let from = journal
        .iter()
        .position(|(offset, ..)| *offset == checkpoint.journal_offset)
        .unwrap_or(journal.len());
    for (number, (offset, next, record)) in journal.iter().skip(from).take(records).enumerate() {
        playback.push(*offset, *next, record.clone());
        if settle.get(number % settle.len().max(1)).copied().unwrap_or_default() {
            playback.settle();
            log.append(&mut playback, events);
        }
    }
    log.append(&mut playback, events);
    playback.ended().is_some() && playback.is_drained()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// Runners that are cut off after any record and any append, one after the other, write what
    /// one alone writes: each thing once.
    #[test]
    fn takeovers_at_any_checkpoint_yield_the_same_events_once(
        inside in inside(),
        before in inside(),
        masked: bool,
        runs in vec((0_usize..12, 0_usize..6, vec(any::<bool>(), 1..5)), 0..12),
    ) {
        // An earlier turn, and what an idle CLI says between turns, are no part of this one.
        let kinds = [vec![started(TURN - 1)], before.clone(), vec![ended(TURN - 1)], before, vec![started(TURN)], inside, vec![ended(TURN)]];
        let journal = journal(kinds.concat());
        let masker = if masked { Masker::new([SECRET]) } else { Masker::default() };
        let beginning = Checkpoint { started: true, journal_offset: 3, ..Checkpoint::default() };
        let (mut whole, mut cut) = (Log::default(), Log::default());
        prop_assert!(play_on(&mut whole, &journal, &beginning, (&masker, u64::MAX), usize::MAX, usize::MAX, &[false]));
        for (records, events, settle) in runs {
            play_on(&mut cut, &journal, &beginning, (&masker, u64::MAX), records, events, &settle);
        }
        prop_assert!(play_on(&mut cut, &journal, &beginning, (&masker, u64::MAX), usize::MAX, usize::MAX, &[true]));
        prop_assert_eq!(whole.seen(), cut.seen());
        if masked {
            let (streams, _) = whole.seen();
            prop_assert!(streams.iter().all(|stream| !String::from_utf8_lossy(stream).contains(SECRET)));
        }
        // No piece ends inside a character, nor is one too large for an event.
        for (kind, _) in &cut.0 {
            if let Kind::Output(output) = kind {
                prop_assert!(output.data.len() <= OUTPUT_EVENT_BYTES_MAX && !output.data.is_empty());
            }
        }
    }

    /// What a checkpoint says is in the log is in the log: the journal below it is not needed any
    /// more.
    #[test]
    fn everything_below_a_checkpoint_is_in_the_log(inside in inside()) {
        let journal = journal([vec![started(TURN)], inside, vec![ended(TURN)]].concat());
        let beginning = Checkpoint { started: true, journal_offset: 3, ..Checkpoint::default() };
        let masker = Masker::new([SECRET]);
        let mut whole = Log::default();
        play_on(&mut whole, &journal, &beginning, (&masker, u64::MAX), usize::MAX, usize::MAX, &[true]);
        for kept in 0..whole.0.len() {
            let mut log = Log(whole.0[..kept].to_vec());
            let below = log.checkpoint(&beginning).journal_offset;
            let rest: Journal = journal.iter().filter(|(offset, ..)| *offset >= below).cloned().collect();
            play_on(&mut log, &rest, &beginning, (&masker, u64::MAX), usize::MAX, usize::MAX, &[false]);
            prop_assert_eq!(log.seen(), whole.seen(), "from event {}", kept);
        }
    }
}

#[test]
fn neighbouring_output_is_one_event_as_large_as_events_may_be() {
    let data = vec![b'x'; OUTPUT_EVENT_BYTES_MAX / 2 + 1];
    let journal = journal(vec![
        started(TURN),
        output(false, &data),
        output(false, &data),
        output(true, b"e"),
        ended(TURN),
    ]);
    let beginning = Checkpoint { started: true, journal_offset: 3, ..Checkpoint::default() };
    let mut log = Log::default();
    play_on(
        &mut log,
        &journal,
        &beginning,
        (&Masker::default(), u64::MAX),
        usize::MAX,
        usize::MAX,
        &[false],
    );
    let sizes: Vec<usize> = log
        .0
        .iter()
        .map(|(kind, _)| if let Kind::Output(output) = kind { output.data.len() } else { 0 })
        .collect();
    assert_eq!(sizes, [OUTPUT_EVENT_BYTES_MAX, 2, 1]);
}

/// What a turn printed on stdout and on stderr, record by record.
fn printed() -> impl Strategy<Value = Vec<(bool, usize)>> {
    vec((prop::bool::weighted(0.2), 0_usize..90_000), 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Beyond the limit the middle is dropped, and the events say how much, wherever runners are
    /// cut off.
    #[test]
    fn output_beyond_the_limit_keeps_its_beginning_and_its_end(
        printed in printed(),
        limit in prop_oneof![0_u64..2_000_000, 0_u64..4_000],
        runs in vec((0_usize..30, 0_usize..6), 0..8),
    ) {
        let (mut written, mut kinds) = ([Vec::new(), Vec::new()], vec![started(TURN)]);
        for (number, (stderr, length)) in printed.iter().enumerate() {
            let data: Vec<u8> = (0..*length).map(|at| b'a' + ((at + 7 * number) % 26) as u8).collect();
            written[usize::from(*stderr)].extend_from_slice(&data);
            kinds.push(output(*stderr, &data));
            if number % 5 == 4 {
                kinds.push(tool_use(number as u64, ""));
            }
        }
        kinds.push(ended(TURN));
        let journal = journal(kinds);
        let beginning = Checkpoint { started: true, journal_offset: 3, ..Checkpoint::default() };
        let masker = Masker::default();
        let mut log = Log::default();
        for (records, events) in runs {
            play_on(&mut log, &journal, &beginning, (&masker, limit), records, events, &[true]);
        }
        prop_assert!(play_on(&mut log, &journal, &beginning, (&masker, limit), usize::MAX, usize::MAX, &[true, false]));
        let (kept, _) = log.seen();
        let all: usize = written.iter().map(Vec::len).sum();
        let kept_bytes: usize = kept.iter().map(Vec::len).sum();
        let dropped: u64 = log.0.iter().map(|(kind, _)| if let Kind::OutputDropped(dropped) = kind { dropped.bytes } else { 0 }).sum();
        // Typed events have a limit of the same size.
        let kept_events = log.0.iter().filter(|(kind, _)| matches!(kind, Kind::Agent(_))).count();
        let dropped_events = ((printed.len() / 5 - kept_events) * EVENT_BYTES_MIN) as u64;
        prop_assert!((kept_events * EVENT_BYTES_MIN) as u64 <= limit + EVENT_BYTES_MIN as u64);
        prop_assert!(dropped_events == 0 || (kept_events * EVENT_BYTES_MIN) as u64 >= limit);
        let dropped = dropped - dropped_events;
        prop_assert_eq!(kept_bytes as u64 + dropped, all as u64);
        prop_assert_eq!(log.0.last().map_or(0, |(_, checkpoint)| checkpoint.output_dropped), dropped);
        let most = limit + 2 * (TAIL_BYTES + 2 * OUTPUT_EVENT_BYTES_MAX) as u64;
        prop_assert!(kept_bytes as u64 <= most, "{} of {}", kept_bytes, most);
        prop_assert!(dropped == 0 || kept_bytes as u64 >= limit);
        for (kept, written) in kept.iter().zip(&written) {
            let end = kept.len().min(TAIL_BYTES);
            prop_assert!(written.ends_with(&kept[kept.len() - end..]));
            let same = kept.iter().zip(written).take_while(|(kept, written)| kept == written).count();
            prop_assert!(written.ends_with(&kept[same..]));
        }
    }
}

/// An agent that floods is slowed down also where nothing of it is kept.
#[test]
fn what_is_dropped_and_what_is_previewed_counts_in_the_pace() {
    let kind = Kind::OutputDropped(OutputDropped { bytes: 1 << 20 });
    assert_eq!(Emitted { kind, place: Place::default() }.output_bytes(), 1 << 20);
    let part = |content: &str| Preview { content: content.to_owned(), ..Preview::default() };
    assert_eq!(sent_bytes(&[part("a"), part(&"b".repeat(1000))]), EVENT_BYTES_MIN + 1000);
}

#[test]
fn texts_of_events_show_no_secret() {
    let message =
        event::Kind::Message(AgentMessage { text: format!("the key is {SECRET}"), aborted: false });
    let journal = journal(vec![started(TURN), event(1, message), ended(TURN)]);
    let beginning = Checkpoint { started: true, journal_offset: 3, ..Checkpoint::default() };
    let mut log = Log::default();
    play_on(
        &mut log,
        &journal,
        &beginning,
        (&Masker::new([SECRET]), u64::MAX),
        usize::MAX,
        usize::MAX,
        &[false],
    );
    assert!(format!("{:?}", log.0).contains("the key is ***"));
}

/// A successor reads a set-up's journal from its beginning: it knows what was said, and appends
/// what is not in the log.
#[test]
fn a_set_up_that_is_read_again_yields_no_duplicate_events() {
    let step = |id: &str| {
        record::Kind::StepStarted(StepStarted { input_id: id.to_owned(), name: String::new() })
    };
    let end = |id: &str| {
        record::Kind::StepEnded(StepEnded {
            input_id: id.to_owned(),
            exit_code: Some(3),
            ..StepEnded::default()
        })
    };
    let journal = journal(vec![
        step("a"),
        output(false, b"one"),
        end("a"),
        step("b"),
        output(false, b"two"),
        output(true, b"three"),
        end("b"),
    ]);
    let play = |checkpoint: &Checkpoint, records: usize| {
        let scope =
            Scope::SetUp { stage: "provision_setup", logged_below: checkpoint.journal_offset };
        let mut playback = Playback::new(scope, Masker::default(), u64::MAX, checkpoint);
        journal
            .iter()
            .take(records)
            .for_each(|(offset, next, record)| playback.push(*offset, *next, record.clone()));
        playback.settle();
        let (mut said, mut last) = (String::new(), checkpoint.clone());
        while let Some(emitted) = playback.next() {
            if let Kind::StageOutput(output) = &emitted.kind {
                said.push_str(std::str::from_utf8(&output.data).unwrap());
            }
            emitted.place.apply(&mut last);
        }
        (said, last, playback)
    };
    let beginning = Checkpoint::default();
    assert_eq!(play(&beginning, 7).0, "onetwothree");
    for cut in 0..7 {
        let (first, checkpoint, _) = play(&beginning, cut);
        let (second, _, playback) = play(&checkpoint, 7);
        assert_eq!(first + &second, "onetwothree", "cut after {cut}");
        assert_eq!(
            (playback.tail(false), playback.tail(true)),
            ("two".to_owned(), "three".to_owned())
        );
        assert_eq!(playback.step("a", &[]).unwrap().exit_code, Some(3));
    }
}

/// A runner that takes over after the set-up may find the journal's beginning in the checkpoint.
#[test]
fn a_turn_that_is_read_from_before_the_set_up_has_none_of_its_output() {
    let step = StepStarted { input_id: "step".to_owned(), name: String::new() };
    let journal = journal(vec![
        record::Kind::StepStarted(step),
        output(false, b"set-up"),
        record::Kind::StepEnded(StepEnded::default()),
        started(TURN),
        output(false, b"turn"),
        ended(TURN),
    ]);
    let mut log = Log::default();
    let beginning = Checkpoint { journal_offset: 3, ..Checkpoint::default() };
    let all = (&Masker::default(), u64::MAX);
    play_on(&mut log, &journal, &beginning, all, usize::MAX, usize::MAX, &[]);
    assert_eq!(log.seen().0[0], b"turn");
}
