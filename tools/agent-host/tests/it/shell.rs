//! The host with the simplest adapter.

use std::{
    collections::BTreeSet,
    fs::File,
    os::unix::net::{UnixListener, UnixStream},
    process::Command,
    time::{Duration, Instant},
};

use contract::host::{
    HostEnded, Message, Spec, Step, Variable, control, input, input_settled::Outcome, record,
    turn_ended::Reason,
};

use crate::support::{Host, end_sleep, eventually, is_running, message, output};

#[test]
fn turns_run_one_after_another_with_exact_output_and_status() {
    let host = Host::shell();
    host.start();
    let mut attached = host.attach(0);
    let (kinds, ended) = attached.turn(1, "echo one; echo two >&2; printf 'no end'; exit 3");
    assert_eq!(output(&kinds), ("one\nno end".to_owned(), "two\n".to_owned()));
    assert_eq!((ended.reason(), ended.exit_code, ended.turn), (Reason::Failed, Some(3), 1));

    // A repeated delivery is not applied again; standard output may be opened by name; late output
    // is waited for.
    attached.message(1, "echo again");
    let reopened = "echo a >/dev/stdout; echo b | tee /dev/stderr; dd if=/dev/zero of=/dev/stdout bs=2 count=1 status=none; \
                    exec > >(sleep 0.3; tr a-z A-Z); echo late";
    let (kinds, ended) = attached.turn(2, reopened);
    assert_eq!(output(&kinds), ("a\nb\n\0\0LATE\n".to_owned(), "b\n".to_owned()));
    assert_eq!((ended.reason(), ended.turn), (Reason::Completed, 2));

    // A background process that holds the output open does not hold the turn up, and lives on.
    let (kinds, _) = attached.turn(3, "sleep 31.7 & echo done");
    assert_eq!(output(&kinds).0, "done\n");
    assert!(is_running("31.7"));

    // Text of any length and kind.
    let long = format!("cat <<'END'\n{}\nEND\n", "ü".repeat(150_000));
    let (kinds, _) = attached.turn(4, &long);
    assert_eq!(output(&kinds).0.len(), 300_001);
    let (kinds, ended) = attached.turn(5, "no-such-command");
    assert!(output(&kinds).1.contains("line 1: no-such-command: command not found"));
    assert_eq!(ended.exit_code, Some(127));

    attached.stop();
    let (kinds, control) = attached.rest();
    assert!(
        matches!(kinds.last(), Some(record::Kind::HostEnded(HostEnded { reason: 1, .. }))),
        "{kinds:?}"
    );
    assert!(matches!(control.unwrap().kind, Some(control::Kind::Ended(_))));
    end_sleep("31.7");
}

#[test]
fn another_specification_replaces_a_host_that_runs() {
    let mut host = Host::shell();
    let with = |host: &mut Host, revision: &str, value: &str| {
        host.spec.revision = revision.to_owned();
        host.spec.env = vec![Variable { name: "ROTATED".to_owned(), value: value.to_owned() }];
        host.start();
    };
    with(&mut host, "a", "one");
    let mut attached = host.attach(0);
    assert_eq!(output(&attached.turn(1, "echo $ROTATED").0).0, "one\n");
    // The same again changes nothing, as does one without a revision.
    with(&mut host, "a", "ignored");
    with(&mut host, "", "ignored");
    assert_eq!(output(&attached.turn(2, "echo $ROTATED").0).0, "one\n");
    for (turn, revision, value) in [(3, "b", "two"), (4, "a", "three"), (5, "b", "four")] {
        with(&mut host, revision, value);
        attached.until(|kind| matches!(kind, record::Kind::HostEnded(_)));
        attached = host.attach(attached.decoder.offset());
        assert_eq!(output(&attached.turn(turn, "echo $ROTATED").0).0, format!("{value}\n"));
    }
}

#[test]
fn the_newest_of_many_connections_is_heard_and_those_before_it_end() {
    let host = Host::shell();
    host.start();
    let mut older: Vec<_> = (0..20).map(|_| host.attach(0)).collect();
    let mut newest = host.attach(0);
    assert_eq!(output(&newest.turn(1, "echo heard").0).0, "heard\n");
    // Its sender has to learn that what it passed on may be lost.
    eventually(|| older[0].child.try_wait().unwrap().is_some_and(|status| !status.success()));
    assert_eq!(output(&newest.turn(2, "echo heard again").0).0, "heard again\n");
    for attached in &mut older {
        let _ = attached.child.kill();
        let _ = attached.child.wait();
    }
}

#[test]
fn a_reader_that_is_killed_loses_nothing() {
    let host = Host::shell();
    host.start();
    let mut attached = host.attach(0);
    attached.message(1, "seq 1 100000");
    let (mut kinds, mut rounds) = (Vec::new(), 0);
    loop {
        let mut records = 0;
        kinds.extend(attached.until(|kind| {
            records += 1;
            records == 3 || matches!(kind, record::Kind::TurnEnded(_))
        }));
        if matches!(kinds.last(), Some(record::Kind::TurnEnded(_))) {
            break;
        }
        let from = attached.decoder.offset();
        drop(attached);
        attached = host.attach(from);
        rounds += 1;
    }
    assert!(rounds > 1);
    let expected: String = (1..=100_000).map(|number| format!("{number}\n")).collect();
    assert!(output(&kinds).0 == expected);
}

#[test]
fn a_killed_host_leaves_a_whole_journal_and_the_next_one_says_so() {
    let host = Host::shell();
    let mut from = 0;
    for (round, wait) in [0, 1, 5, 20, 60].into_iter().enumerate() {
        let turn = u32::try_from(round).unwrap() + 1;
        host.start();
        let mut attached = host.attach(from);
        let script =
            "setsid sleep 87.3 & for i in $(seq 1 100000); do echo line $i; done; sleep 30";
        attached.message(turn, script);
        let mut kinds = attached.until(|kind| matches!(kind, record::Kind::CliStarted(_)));
        std::thread::sleep(std::time::Duration::from_millis(wait));
        host.kill();
        let (rest, control) = attached.rest();
        kinds.extend(rest);
        assert!(matches!(control.unwrap().kind, Some(control::Kind::HostLost(_))));
        assert_eq!(attached.child.wait().unwrap().code(), Some(3));
        let text = output(&kinds).0;
        let whole: String =
            text.lines().enumerate().map(|(index, _)| format!("line {}\n", index + 1)).collect();
        assert!(whole.starts_with(&text), "{text}");
        let read_to = attached.decoder.offset();

        host.start();
        let mut attached = host.attach(read_to);
        let (_, ended) = attached.turn_ended();
        assert_eq!((ended.turn, ended.reason()), (turn, Reason::HostLost));
        assert!(!is_running("87.3"));
        from = attached.decoder.offset();
        let (kinds, ended) = attached.turn(turn + 100, "echo after");
        assert_eq!((output(&kinds).0.as_str(), ended.reason()), ("after\n", Reason::Completed));
        from = attached.decoder.offset().max(from);
        host.kill();
    }
}

#[test]
fn a_message_that_waits_outlives_the_host() {
    let host = Host::shell();
    host.start();
    let mut attached = host.attach(0);
    attached.message(1, "sleep 60");
    attached.message(2, "echo second");
    let mut accepted = 0;
    attached.until(|kind| {
        accepted += usize::from(matches!(kind, record::Kind::InputAccepted(_)));
        accepted == 2
    });
    host.kill();
    attached.rest();
    host.start();
    let mut attached = host.attach(attached.decoder.offset());
    attached.message(2, "echo twice");
    assert_eq!(attached.turn_ended().1.reason(), Reason::HostLost);
    let (kinds, ended) = attached.turn_ended();
    assert_eq!((output(&kinds).0.as_str(), ended.turn), ("second\n", 2));
}

#[test]
fn interrupts_and_time_limits_end_whole_process_trees() {
    let mut host = Host::shell();
    host.spec.kill_grace_ms = 300;
    host.start();
    let mut attached = host.attach(0);
    // In a session of its own, deaf to SIGTERM, without the mark.
    let tree = "trap '' TERM; env -i setsid bash -c 'trap \"\" TERM; sleep 77.1' & echo up; wait; sleep 77.2";
    attached.message(1, tree);
    attached.until(|kind| matches!(kind, record::Kind::Output(_)));
    attached.interrupt("interrupt-1");
    assert_eq!(attached.turn_ended().1.reason(), Reason::Interrupted);
    eventually(|| !is_running("77.1") && !is_running("77.2"));

    attached.send("limited", message(2, tree, 1));
    assert_eq!(attached.turn_ended().1.reason(), Reason::TimedOut);
    eventually(|| !is_running("77.1") && !is_running("77.2"));

    // An interrupt between turns changes nothing.
    attached.interrupt("interrupt-2");
    assert_eq!(output(&attached.turn(3, "echo on").0).0, "on\n");
}

#[test]
fn the_journal_is_bounded_and_gives_way_as_it_is_persisted() {
    let mut host = Host::shell();
    host.spec.journal_bytes_max = 12 << 20;
    host.start();
    let mut attached = host.attach(0);
    attached.message(1, "head -c 60000000 /dev/zero | tr '\\0' x; echo end");
    let journal = host.dir().join("journal");
    // A segment may be removed between the listing and the look at its size.
    let size = || -> u64 {
        let segments = std::fs::read_dir(&journal).unwrap().flatten();
        segments.filter_map(|segment| segment.metadata().ok()).map(|metadata| metadata.len()).sum()
    };
    eventually(|| size() >= 12 << 20);
    let mut bytes = 0;
    loop {
        let kinds = attached
            .until(|kind| matches!(kind, record::Kind::Output(_) | record::Kind::TurnEnded(_)));
        bytes += output(&kinds).0.len();
        assert!(size() < 14 << 20);
        attached.persisted();
        if matches!(kinds.last(), Some(record::Kind::TurnEnded(_))) {
            break;
        }
    }
    assert_eq!(bytes, 60_000_004);
    // What is gone is said to be gone.
    let mut late = host.attach(0);
    assert!(
        matches!(late.rest().1.unwrap().kind, Some(control::Kind::Unreadable(gone)) if gone.first > 0)
    );
}

#[test]
fn set_up_steps_run_once_and_their_services_live_on() {
    let host = Host::shell();
    host.start();
    let file = host.folder.path().join("count");
    let mut attached = host.attach(0);
    let script = format!(
        "echo x >>{}; sleep 45.5 >/dev/null 2>&1 & echo installing; exit 4",
        file.display()
    );
    attached.step("install", &script, 0);
    let kinds = attached.until(|kind| matches!(kind, record::Kind::StepEnded(_)));
    let Some(record::Kind::StepEnded(ended)) = kinds.last() else { panic!("no end") };
    assert_eq!(
        (ended.exit_code, ended.reason(), output(&kinds).0.as_str()),
        (Some(4), Reason::Failed, "installing\n")
    );
    attached.step("install", &script, 0);
    attached.step("slow", "echo begun; sleep 60", 1);
    let kinds = attached.until(|kind| matches!(kind, record::Kind::StepEnded(_)));
    let Some(record::Kind::StepEnded(ended)) = kinds.last() else { panic!("no end") };
    assert_eq!((ended.name.as_str(), ended.reason()), ("slow", Reason::TimedOut));
    attached.message(1, "sleep 60");
    attached.until(|kind| matches!(kind, record::Kind::CliStarted(_)));
    attached.interrupt("i");
    attached.turn_ended();
    assert!(is_running("45.5"));
    assert_eq!(std::fs::read_to_string(file).unwrap(), "x\n");
    attached.stop();
    attached.rest();
    end_sleep("45.5");
}

#[test]
fn queued_messages_can_be_withdrawn_and_unknown_requests_are_refused() {
    let host = Host::shell();
    host.start();
    let mut attached = host.attach(0);
    attached.message(1, "sleep 60");
    attached.message(2, "echo two");
    attached.message(3, "echo three");
    let withdraw = contract::host::Withdraw { input_id: "message-2".to_owned() };
    attached.send("withdraw", contract::host::input::Kind::Withdraw(withdraw));
    attached.decide("decision", 99, contract::host::decision::Verdict::Allow, "");
    attached.interrupt("interrupt");
    let (kinds, _) = attached.turn_ended();
    let outcome = |id: &str| {
        kinds.iter().find_map(|kind| match kind {
            record::Kind::InputSettled(settled) if settled.id == id => Some(settled.outcome()),
            _ => None,
        })
    };
    assert_eq!(outcome("message-2"), Some(Outcome::Withdrawn));
    assert_eq!(outcome("decision"), Some(Outcome::Refused));
    assert_eq!(
        (outcome("withdraw"), outcome("interrupt")),
        (Some(Outcome::Applied), Some(Outcome::Applied))
    );
    assert_eq!(attached.turn_ended().1.turn, 3);
}

/// Needs root, as the host does to become another user.
#[test]
fn the_agents_user_reaches_neither_the_host_nor_its_state() {
    if !rustix::process::getuid().is_root() {
        return;
    }
    let mut host = Host::shell();
    // A user of the test's own: it kills all that it may.
    let user = (61_000 + std::process::id() % 1000).to_string();
    host.spec.user.clone_from(&user);
    host.spec.env = [("TIMEOUT", "1"), ("PATH", "/usr/bin:/bin"), ("BASH_ENV", "/nonexistent")]
        .map(|(name, value)| contract::host::Variable {
            name: name.to_owned(),
            value: value.to_owned(),
        })
        .into();
    host.start();
    let mut attached = host.attach(0);
    let script = format!(
        "id -u; ls {0} 2>/dev/null; rm -rf {0} 2>/dev/null; echo x >/dev/stdout; pkill -9 agent-host; kill -9 -1",
        host.dir().display()
    );
    let (kinds, ended) = attached.turn(1, &script);
    assert_eq!(output(&kinds).0, format!("{user}\nx\n"));
    assert_eq!((ended.reason(), ended.exit_code), (Reason::Completed, Some(0)));
    assert_eq!(output(&attached.turn(2, "echo still here").0).0, "still here\n");
}

/// Needs root, to mount a small file system.
#[test]
fn a_turns_end_is_written_when_the_disk_is_full() {
    let host = Host::shell();
    let state = host.dir();
    std::fs::create_dir_all(&state).unwrap();
    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=24m", "tmpfs"]).arg(&state).status();
    if !mounted.is_ok_and(|status| status.success()) {
        return;
    }
    host.start();
    let mut attached = host.attach(0);
    let fill = format!(
        "head -c 100000000 /dev/zero >{}/fill 2>/dev/null; echo filled; exit 5",
        state.display()
    );
    let (kinds, ended) = attached.turn(1, &fill);
    assert_eq!((output(&kinds).0.as_str(), ended.exit_code), ("filled\n", Some(5)));
    // More output than there is room for waits until there is some.
    attached.message(2, "head -c 9000000 /dev/zero | tr '\\0' y; exit 6");
    attached.until(|kind| matches!(kind, record::Kind::CliStarted(_)));
    let full_until = std::time::Instant::now() + std::time::Duration::from_millis(1500);
    let mut seen = BTreeSet::new();
    while std::time::Instant::now() < full_until {
        let names: BTreeSet<_> = std::fs::read_dir(state.join("journal"))
            .unwrap()
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        let segments: BTreeSet<_> =
            names.into_iter().filter(|name| name.to_string_lossy().ends_with(".seg")).collect();
        // A reader keeps a segment open that it found.
        assert!(seen.is_subset(&segments), "a segment was taken back: {seen:?} {segments:?}");
        seen = segments;
    }
    std::fs::remove_file(state.join("fill")).unwrap();
    let (kinds, ended) = attached.turn_ended();
    assert_eq!((output(&kinds).0.len(), ended.exit_code), (9_000_000, Some(6)));
    drop(attached);
    if let Some(pid) = host.pid() {
        crate::support::kill(pid);
    }
    let _ = Command::new("umount").arg("-l").arg(&state).status();
}

#[test]
fn a_specification_that_cannot_be_followed_is_refused_with_its_reason() {
    let host = Host::new(Spec { runtime: "cobol".to_owned(), ..Spec::default() });
    let spec = host.folder.path().join("spec");
    std::fs::write(&spec, prost::Message::encode_to_vec(&host.spec)).unwrap();
    let mut command = Command::new(crate::support::program());
    let output =
        command.args(["start", "--dir"]).arg(host.dir()).arg("--spec").arg(&spec).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "agent-host: runtime cobol is not known\n");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn a_host_that_runs_is_found_without_a_wait() {
    let host = Host::shell();
    host.start();
    let again = || {
        let begun = Instant::now();
        host.start();
        begun.elapsed()
    };
    let fastest = (0..5).map(|_| again()).min().unwrap();
    assert!(fastest < Duration::from_millis(150), "{fastest:?}");
}

#[test]
fn a_host_that_hangs_and_takes_no_more_connections_does_not_hold_up_a_start() {
    let host = Host::shell();
    std::fs::create_dir(host.dir()).unwrap();
    let lock = File::create(host.dir().join("lock")).unwrap();
    lock.lock().unwrap();
    let listener = UnixListener::bind(host.dir().join("sock")).unwrap();
    // From now on it takes one.
    rustix::net::listen(&listener, 0).unwrap();
    let _waiting = UnixStream::connect(host.dir().join("sock")).unwrap();
    let (sender, started) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            host.start();
            sender.send(()).unwrap();
        });
        let outcome = started.recv_timeout(Duration::from_secs(10));
        drop(listener);
        outcome.expect("the start returns");
    });
}

#[test]
fn each_turn_and_step_has_its_own_trace_unless_the_session_names_one() {
    let traced = |turn: u32| {
        let traceparent = format!("00-{turn:032x}-{turn:016x}-01");
        input::Kind::Message(Message {
            turn,
            text: "echo $TRACEPARENT".to_owned(),
            traceparent,
            ..Message::default()
        })
    };
    for own in [None, Some("mine")] {
        let mut host = Host::shell();
        host.spec.env = own
            .map(|value| Variable { name: "TRACEPARENT".to_owned(), value: value.to_owned() })
            .into_iter()
            .collect();
        host.start();
        let mut attached = host.attach(0);
        for turn in [1, 2] {
            attached.send(&format!("turn-{turn}"), traced(turn));
            let (kinds, _) = attached.turn_ended();
            let expected = own.map_or_else(
                || format!("00-{turn:032x}-{turn:016x}-01\n"),
                |value| format!("{value}\n"),
            );
            assert_eq!(output(&kinds).0, expected);
        }
        let script = "echo $TRACEPARENT".to_owned();
        attached.send(
            "step",
            input::Kind::Step(Step {
                script,
                traceparent: "00-step".to_owned(),
                ..Step::default()
            }),
        );
        let kinds = attached.until(|kind| matches!(kind, record::Kind::StepEnded(_)));
        assert_eq!(output(&kinds).0, format!("{}\n", own.unwrap_or("00-step")));
    }
}
