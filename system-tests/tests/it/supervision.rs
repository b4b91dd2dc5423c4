//! What users' scripts and agents do to their supervisor and to its files, and what a takeover does
//! to a set-up step: nothing is lost, and nothing runs twice.

use futures::future::join_all;
use rustix::process::Signal;
use serde_json::{Value, json};
use system_tests::{Options, Stack, faults::file_in_sandbox};

struct Ended {
    stdout: String,
    stderr: String,
    end: Value,
}

/// Creates a session from these fields and follows it to its end.
async fn run(stack: &Stack, body: Value) -> Ended {
    let mut request = json!({ "agent_id": stack.agent("shell").await.unwrap() });
    request.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
    let session = stack.post("/sessions", request).await.unwrap();
    assert_eq!(session.status, 202, "{session:?}");
    follow(stack, session.text("id")).await
}

async fn follow(stack: &Stack, session: &str) -> Ended {
    let events = stack.stream(session, 0).await.unwrap().all().await.unwrap();
    let said = |stream: &str| {
        let pieces = events.iter().filter(|event| event["stream"] == stream);
        pieces.filter_map(|event| event["data"].as_str()).collect::<String>()
    };
    Ended { stdout: said("stdout"), stderr: said("stderr"), end: events.last().unwrap().clone() }
}

async fn environment(stack: &Stack, setup_script: &str) -> String {
    let body = json!({ "name": format!("e-{}", fastrand::u64(..)), "setup_script": setup_script });
    stack.post("/environments", body).await.unwrap().text("id").to_owned()
}

/// Each prompt, what it prints and its exit code.
const PROMPTS: [(&str, &str, i64); 12] = [
    (
        "echo one; echo two >/dev/stdout; echo three | tee /dev/stderr 2>/dev/null; echo four",
        "one\ntwo\nthree\nfour\n",
        0,
    ),
    (
        "echo one; echo two | dd of=/dev/stdout 2>/dev/null; echo three >>/dev/stdout",
        "one\ntwo\nthree\n",
        0,
    ),
    ("echo one; echo two >/proc/self/fd/1; : >/dev/stderr; echo three", "one\ntwo\nthree\n", 0),
    ("exec > >(sed -u s/^/x:/); echo a; echo b", "x:a\nx:b\n", 0),
    ("(sleep 1; echo late) & echo first; exit 4", "first\nlate\n", 4),
    ("(sleep 60; echo too late) & echo first; exit 4", "first\n", 4),
    ("pkill perl; pkill -f supervise; pkill -x aod; sleep 0.3; echo after; exit 5", "after\n", 5),
    ("kill -9 $PPID 2>/dev/null; echo after; exit 5", "after\n", 5),
    ("kill -9 -1; echo after; exit 6", "after\n", 6),
    ("rm -rf ~ 2>/dev/null; echo after; exit 7", "after\n", 7),
    ("if true; then\r\n  echo ok\r\nfi\r\n", "ok\n", 0),
    ("echo out; kill -SEGV $$", "out\n", 139),
];

#[tokio::test]
async fn an_agent_that_attacks_its_supervisor_keeps_its_output_and_exit_code() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let ended = join_all(
        PROMPTS.map(|(prompt, ..)| run(&stack, json!({ "prompt": prompt, "timeout": 300 }))),
    )
    .await;
    for ((prompt, stdout, code), ended) in PROMPTS.iter().zip(ended) {
        assert_eq!(
            (ended.stdout.as_str(), ended.end["code"].as_i64()),
            (*stdout, Some(*code)),
            "{prompt}: {}",
            ended.end
        );
        assert_eq!(
            ended.stderr.contains("left running still write"),
            prompt.contains("too late"),
            "{prompt}: {}",
            ended.stderr
        );
    }
    let variables = [
        (
            json!({ "TIMEOUT": "1", "KILL_GRACE": "x", "MARK": "", "spool": "/tmp", "dir": "/tmp" }),
            "sleep 2; echo $TIMEOUT",
            "1\n",
        ),
        (json!({ "STDIN": "/etc/hostname" }), "cat; echo ran", "ran\n"),
        (json!({ "TRACE": "1" }), "echo ${TRACEPARENT:0:3}", "00-\n"),
        (json!({ "UID": "1000", "POSIXLY_CORRECT": "1" }), "env | grep ^UID=", "UID=1000\n"),
        (
            json!({ "PATH": "/opt/tools/bin:$PATH" }),
            "echo ${PATH%%:*}; cat /dev/null && echo ran",
            "/opt/tools/bin\nran\n",
        ),
        (json!({ "PATH": "/home/sprite/bin" }), "cat /dev/null && echo ran", "ran\n"),
        (
            json!({ "CONVERSATION": "mine", "said": "mine too" }),
            "echo $CONVERSATION $said",
            "mine mine too\n",
        ),
        (json!({ "BIG": "x".repeat(131_072 - "BIG=".len() - 1) }), "echo ${#BIG}", "131067\n"),
        (json!({ "PERL5OPT": "-Mnosuch", "PERL5LIB": "/tmp" }), "echo $PERL5OPT", "-Mnosuch\n"),
    ];
    let runs = variables.iter().map(|(vars, prompt, _)| {
        run(&stack, json!({ "prompt": prompt, "secret_env_vars": vars, "timeout": 300 }))
    });
    for ((vars, _, stdout), ended) in variables.iter().zip(join_all(runs).await) {
        assert_eq!(
            (ended.stdout.as_str(), &ended.end["code"]),
            (*stdout, &json!(0)),
            "{vars}: {}{}",
            ended.stderr,
            ended.end
        );
    }
    let agent = stack.agent("shell").await.unwrap();
    for vars in
        [json!({ "BIG": "x".repeat(131_072) }), json!({ "AOD_TURN": "x" }), json!({ "_": "x" })]
    {
        let refused = stack
            .post(
                "/sessions",
                json!({ "agent_id": agent, "prompt": "true", "secret_env_vars": vars }),
            )
            .await
            .unwrap();
        assert_eq!(refused.status, 422, "{refused:?}");
    }
    let skill = json!([{ "name": "s", "description": "d", "content": "---\nname: x\ndescription: when: asked\n---\n" }]);
    let refused =
        json!({ "name": "a", "model": "claude-sonnet-4-5", "runtime": "claude", "skills": skill });
    assert_eq!(stack.post("/agents", refused).await.unwrap().status, 422);
}

/// Services that a script starts live on; line ends of Windows are read as such; and of a failure
/// both streams are told.
#[tokio::test]
async fn a_setup_step_ends_with_its_script_and_leaves_its_services_running() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let scripts = [
        "(while :; do echo tick; echo x >>/tmp/ticks; sleep 0.1; done) &\nsleep 0.3",
        "nohup sleep 900 >/dev/null 2>&1 </dev/null &\n(while :; do echo x >>/tmp/ticks; sleep 0.1; done) >&2 &\nsleep 0.3",
        "set -e\r\nmkdir -p /workspace/x\r\n(while :; do echo x >>/tmp/ticks; sleep 0.1; done) &\r\nsleep 0.3\r\n",
    ];
    let prompt = "a=$(wc -l </tmp/ticks); sleep 1; [ $(wc -l </tmp/ticks) -gt $a ] && echo alive; ls -b /workspace";
    let runs = scripts.map(async |script| {
        let environment = environment(&stack, script).await;
        run(&stack, json!({ "prompt": prompt, "environment_id": environment })).await
    });
    for (script, ended) in scripts.iter().zip(join_all(runs).await) {
        let expected = if script.contains("mkdir") { "alive\nx\n" } else { "alive\n" };
        assert_eq!(ended.stdout, expected, "{script}: {}", ended.end);
    }
    let environment = environment(
        &stack,
        "echo 'npm warn deprecated' >&2; echo 'FAILED: connection refused'; exit 1",
    )
    .await;
    let failed = run(&stack, json!({ "prompt": "true", "environment_id": environment })).await;
    let message = failed.end["message"].as_str().unwrap();
    assert!(message.contains("npm warn") && message.contains("connection refused"), "{message}");
}

/// Runners are stopped, killed, and lose their sockets while a script runs that may run only once.
#[tokio::test]
async fn a_setup_script_runs_once_however_often_its_runner_is_replaced() {
    let settings = &[("LOCAL_SPRITES_CHAOS", "drop-sockets=40")];
    let stack = Stack::start(Options { runners: 2, settings, ..Options::default() }).await.unwrap();
    let environment = environment(
        &stack,
        "set -e; mkdir /home/sprite/once; sleep 9; echo done >/home/sprite/once/done",
    )
    .await;
    let agent = stack.agent("shell").await.unwrap();
    let body =
        json!({ "agent_id": agent, "environment_id": environment, "prompt": "cat ~/once/done" });
    let session = stack.post("/sessions", body).await.unwrap().text("id").to_owned();
    stack.runner_of(&session).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    for signal in [Signal::TERM, Signal::KILL, Signal::TERM] {
        for runner in stack.pids("sprite-runner") {
            Stack::signal(&[runner], signal);
            tokio::time::sleep(std::time::Duration::from_millis(800)).await;
        }
    }
    let ended = follow(&stack, &session).await;
    assert_eq!(ended.stdout, "done\n", "{} {}", ended.stderr, ended.end);
    assert_eq!(ended.end["code"], 0);
}

/// The exit code has its room; and output that is in the log needs none.
#[tokio::test]
async fn an_exit_code_is_kept_when_the_disk_is_full() {
    let settings = &[("LOCAL_SPRITES_DISK_MB", "64")];
    let stack = Stack::start(Options { settings, ..Options::default() }).await.unwrap();
    let prompts = [
        "cat /dev/zero >a 2>/dev/null; for i in $(seq 1 3000); do echo x >f$i || break; done 2>/dev/null; exit 3",
        "echo begun; yes | head -c 100M; exit 3",
        "for d in $(seq 1 40); do mkdir d$d && (cd d$d && python3 -c \"[open(str(i), 'w').close() for i in range(1000)]\"); done 2>/dev/null; exit 3",
    ];
    for (prompt, ended) in prompts.iter().zip(
        join_all(prompts.map(|prompt| run(&stack, json!({ "prompt": prompt, "timeout": 300 }))))
            .await,
    ) {
        assert_eq!(ended.end["code"], 3, "{prompt}: {}", ended.end);
        if prompt.contains("yes") {
            // More than the disk holds.
            assert_eq!(
                (ended.stdout.len(), ended.stdout.starts_with("begun\ny\n")),
                (6 + (100 << 20), true),
                "{}",
                ended.stderr
            );
        }
    }
}

/// By root inside of the sandbox, while a hundred thousand lines are printed: the turn ends at once
/// with the true reason, and what the journal had is in the log without a gap.
#[tokio::test]
async fn a_host_that_is_killed_ends_its_turn_at_once_and_its_journal_is_kept() {
    const LINES: usize = 100_000;
    let stack = Stack::start(Options::default()).await.unwrap();
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let kills: [f64; 8] = std::array::from_fn(|_| 0.02 + 0.8 * rng.f64());
    let agent = stack.agent("shell").await.unwrap();
    let runs = kills.map(async |after| {
        let prompt = format!(
            "(sleep {after:.3}; date +%s.%N >/workspace/killed; sudo pkill -9 -x agent-host) &
             perl -e '$| = 1; open($own, \">\", \"/workspace/written\"); select((select($own), $| = 1)[0]);
                      for (1..{LINES}) {{ print \"$_ a line\\n\"; print $own \"$_\\n\" unless $_ % 100 }}'
             sleep 60"
        );
        let session = stack.post("/sessions", json!({ "agent_id": agent, "prompt": prompt, "timeout": 300 })).await.unwrap();
        let session = session.text("id").to_owned();
        let ended = follow(&stack, &session).await;
        let message = ended.end["message"].as_str().unwrap_or_default();
        assert!(message.contains("The agent host was killed inside the sandbox"), "{after}: {}", ended.end);
        let whole = ended.stdout.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let lines: Vec<&str> = whole.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            assert_eq!(*line, format!("{} a line", at + 1), "{after}: a gap");
        }
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
        let killed: f64 = file_in_sandbox(&stack, &session, "/workspace/killed").await.unwrap().trim().parse().unwrap();
        let written = file_in_sandbox(&stack, &session, "/workspace/written").await.unwrap_or_default();
        let written: usize = written.lines().last().and_then(|line| line.parse().ok()).unwrap_or_default();
        assert!(now - killed < 30.0, "{after}: the end came {} s after the kill", now - killed);
        (after, now - killed, lines.len(), written)
    });
    for (after, took, lines, written) in join_all(runs).await {
        // What was in the pipe between agent and host is lost with the host: at most what the pipe
        // holds.
        println!(
            "killed after {after:.3} s: ended {took:.2} s later, {lines} lines are in the log, {written} were written"
        );
        let pipe = (1 << 20) / "1 a line\n".len();
        assert!(
            written <= lines + pipe,
            "{after}: {written} lines were written, {lines} are in the log"
        );
    }
}
