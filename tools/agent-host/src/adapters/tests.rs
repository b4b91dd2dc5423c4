//! Every adapter against what its CLI's pinned version wrote: two turns, the first with a command.
//! Recorded by `AOD_RECORD_TRANSCRIPTS=1 cargo test -p agent-host --test it clis`.

use proptest::prelude::*;

use super::*;

/// A runtime, its transcript, and what every line has that ends a turn.
const TRANSCRIPTS: [(&str, &str, &[&str]); 4] = [
    ("claude", include_str!("../../transcripts/claude.jsonl"), &["\"state\":\"idle\""]),
    ("codex", include_str!("../../transcripts/codex.jsonl"), &["turn/completed"]),
    ("gemini", include_str!("../../transcripts/gemini.jsonl"), &["stopReason"]),
    (
        "opencode",
        include_str!("../../transcripts/opencode.jsonl"),
        &["session.idle", "\"type\":\"idle\"", "session.error"],
    ),
];

/// Feeds lines to a fresh adapter as the host would; what came out, without what was sent.
fn replay(name: &str, lines: &[Vec<u8>], session: &str) -> Vec<Effect> {
    let spec = Spec { runtime: name.to_owned(), ..Spec::default() };
    let mut adapter = (find(name).unwrap().new)(&spec);
    adapter.launch(None, "first");
    let mut all = Vec::new();
    let mut out = Out::default();
    adapter.started("/", &mut out);
    let mut lines = lines.iter();
    loop {
        let mut more = Out::default();
        for effect in std::mem::take(&mut out.0) {
            match &effect {
                Effect::Ready | Effect::TurnEnded { .. } => adapter.message("next", &mut more),
                Effect::Ask(ask) => adapter.decide(&ask.key, Verdict::Allow, "", &mut more),
                Effect::Http(request) if request.path == "/session" => {
                    let body = format!("{{\"id\":\"{session}\"}}");
                    adapter.http(
                        &http::Reply::Answer { tag: request.tag.clone(), status: 200, body },
                        &mut more,
                    );
                }
                _ => {}
            }
            all.push(effect);
        }
        out = more;
        if !out.0.is_empty() {
            continue;
        }
        let Some(line) = lines.next() else { return all };
        if line.starts_with(b"{\"id\":\"evt_") {
            let data = String::from_utf8_lossy(line).into_owned();
            adapter.http(&http::Reply::Event { tag: "events".to_owned(), data }, &mut out);
        } else {
            adapter.line(line, &mut out);
        }
    }
}

fn lines(transcript: &str) -> Vec<Vec<u8>> {
    transcript.lines().map(|line| line.as_bytes().to_vec()).collect()
}

fn session(transcript: &str) -> String {
    let after = transcript.split_once("\"sessionID\":\"").map_or("", |(_, after)| after);
    after.split('"').next().unwrap_or_default().to_owned()
}

fn ends(effects: &[Effect]) -> usize {
    effects.iter().filter(|effect| matches!(effect, Effect::TurnEnded { .. })).count()
}

#[test]
fn transcripts_become_typed_events() {
    for (name, transcript, _) in TRANSCRIPTS {
        let effects = replay(name, &lines(transcript), &session(transcript));
        let calls: Vec<&str> = effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::ToolUse { tool, .. } => Some(tool.call_id.as_str()),
                Effect::Ask(ask) => Some(ask.call.as_str()),
                _ => None,
            })
            .collect();
        let result = effects.iter().find_map(|effect| match effect {
            Effect::ToolResult { call, result } => Some((call.as_str(), result)),
            _ => None,
        });
        let (call, result) = result.unwrap_or_else(|| panic!("{name}: no result in {effects:#?}"));
        assert!(calls.contains(&call) && !result.is_error, "{name}: {calls:?} {result:?}");
        let messages: Vec<&str> = effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Event { kind: event::Kind::Message(message), .. } => {
                    Some(message.text.as_str())
                }
                _ => None,
            })
            .collect();
        assert!(
            messages.iter().any(|text| text.starts_with("The command said:")),
            "{name}: {messages:?}"
        );
        assert_eq!(messages.last(), Some(&"The mark is MARK-4711."), "{name}");
        let turns: Vec<&Effect> =
            effects.iter().filter(|effect| matches!(effect, Effect::TurnEnded { .. })).collect();
        for turn in &turns {
            let Effect::TurnEnded { reason, usage: Some(usage), .. } = turn else {
                panic!("{name}: {turn:?}")
            };
            assert_eq!(*reason, turn_ended::Reason::Completed, "{name}");
            assert!(usage.input_tokens > 0 && usage.output_tokens > 0, "{name}: {usage:?}");
        }
        assert_eq!(turns.len(), 2, "{name}");
        assert!(
            effects
                .iter()
                .any(|effect| matches!(effect, Effect::Conversation { id, .. } if !id.is_empty())),
            "{name}"
        );
    }
}

#[derive(Debug, Clone)]
enum Damage {
    Drop(prop::sample::Index),
    Cut(prop::sample::Index, prop::sample::Index),
    Swap(prop::sample::Index, prop::sample::Index),
    Repeat(prop::sample::Index),
    Garbage(prop::sample::Index, Vec<u8>),
    /// JSON of the right keys and the wrong types.
    Retype(prop::sample::Index),
}

fn damage() -> impl Strategy<Value = Damage> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        index().prop_map(Damage::Drop),
        (index(), index()).prop_map(|(line, at)| Damage::Cut(line, at)),
        (index(), index()).prop_map(|(one, other)| Damage::Swap(one, other)),
        index().prop_map(Damage::Repeat),
        (index(), proptest::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(line, bytes)| Damage::Garbage(line, bytes)),
        index().prop_map(Damage::Retype),
    ]
}

fn apply(damage: &Damage, lines: &mut Vec<Vec<u8>>) {
    let length = lines.len();
    match damage {
        Damage::Drop(line) => drop(lines.remove(line.index(length))),
        Damage::Cut(line, at) => {
            let line = &mut lines[line.index(length)];
            line.truncate(at.index(line.len() + 1));
        }
        Damage::Swap(one, other) => lines.swap(one.index(length), other.index(length)),
        Damage::Repeat(line) => lines.push(lines[line.index(length)].clone()),
        Damage::Garbage(line, bytes) => lines.insert(line.index(length), bytes.clone()),
        Damage::Retype(line) => {
            let line = &mut lines[line.index(length)];
            *line = String::from_utf8_lossy(line)
                .replace(":\"", ":[\"")
                .replace("\",", "\"],")
                .into_bytes();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn damaged_lines_never_panic_and_never_invent_an_end(which in 0..TRANSCRIPTS.len(), damages in proptest::collection::vec(damage(), 1..12)) {
        let (name, transcript, marks) = TRANSCRIPTS[which];
        let mut lines = lines(transcript);
        damages.iter().for_each(|damage| apply(damage, &mut lines));
        let marked = lines.iter().filter(|line| marks.iter().any(|mark| String::from_utf8_lossy(line).contains(mark))).count();
        let ends = ends(&replay(name, &lines, &session(transcript)));
        prop_assert!(ends <= marked, "{name}: {ends} ends of {marked}");
    }

    #[test]
    fn a_transcript_that_is_cut_ends_no_more_turns_than_it_says(which in 0..TRANSCRIPTS.len(), cut in any::<prop::sample::Index>()) {
        let (name, transcript, marks) = TRANSCRIPTS[which];
        let session = session(transcript);
        let mut cut = cut.index(transcript.len());
        while !transcript.is_char_boundary(cut) {
            cut -= 1;
        }
        let transcript = &transcript[..cut];
        let whole = transcript.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let marked = whole.lines().filter(|line| marks.iter().any(|mark| line.contains(mark))).count();
        prop_assert!(ends(&replay(name, &lines(transcript), &session)) <= marked);
    }
}

#[test]
fn the_document_of_runtimes_is_up_to_date() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/runtimes.md");
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert!(committed == document(), "run: cargo run -p agent-host -- runtimes > docs/runtimes.md");
}

#[test]
fn the_api_knows_what_each_adapter_supports() {
    for declared in ALL {
        let runtime: types::Runtime = declared.name.parse().unwrap();
        let known = runtime.capabilities();
        let Capabilities { steer, permission_requests, deny_with_message, interrupt, .. } =
            declared.capabilities;
        let declared = types::model::RuntimeCapabilities {
            steer,
            permission_requests,
            deny_with_message,
            interrupt,
        };
        assert_eq!(known, declared, "{runtime}");
    }
    assert_eq!(types::Runtime::ALL.len(), ALL.len());
}
