//! What users do to a turn that runs, with every agent CLI for real: interrupt it, queue a message
//! behind it, join it, answer what it asks.

use std::{
    fs::File,
    io::{Read as _, Seek as _},
    process::Stdio,
    time::Duration,
};

use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};
use system_tests::{Options, RUNTIMES, Stack, for_each_agent};

const MODEL: Options = Options {
    scripted_model: true,
    runners: 1,
    replicas: 1,
    nats_servers: 1,
    no_restart: false,
    settings: &[],
};
const PATIENCE: Duration = Duration::from_secs(120);

struct Chat<'a> {
    stack: &'a Stack,
    runtime: &'static str,
    session: String,
    /// The last typed event that was read.
    after: u64,
}

impl<'a> Chat<'a> {
    async fn begin(
        stack: &'a Stack,
        (runtime, model): (&'static str, &str),
        permissions: Value,
        prompt: &str,
    ) -> Self {
        let agent = json!({ "name": runtime, "model": model, "runtime": runtime, "system": "Be brief. MARK-4711", "permissions": permissions });
        let agent = stack.post("/agents", agent).await.unwrap();
        assert_eq!(agent.status, 201, "{agent:?}");
        let session = stack
            .post("/sessions", json!({ "agent_id": agent.text("id"), "prompt": prompt }))
            .await
            .unwrap();
        assert_eq!(session.status, 202, "{session:?}");
        Self { stack, runtime, session: session.text("id").to_owned(), after: 0 }
    }

    async fn post(&self, route: &str, body: Value, status: u16) -> Value {
        let answer =
            self.stack.post(&format!("/sessions/{}/{route}", self.session), body).await.unwrap();
        if answer.status != status {
            let newest = self.get("/events?order=desc&limit=20").await["data"].clone();
            panic!("{} {route}: {answer:?}, not {status}, after {newest}", self.runtime);
        }
        answer.body
    }

    async fn get(&self, route: &str) -> Value {
        self.stack.get(&format!("/sessions/{}{route}", self.session)).await.unwrap().body
    }

    /// Reads typed events up to the first of this type; all that were read.
    async fn until(&mut self, kind: &str) -> Vec<Value> {
        let mut read = Vec::new();
        let found = tokio::time::timeout(PATIENCE, async {
            loop {
                let page = self.get(&format!("/events?after={}&limit=1", self.after)).await;
                self.after = page["last_id"].as_u64().unwrap_or(self.after);
                for event in page["data"].as_array().into_iter().flatten() {
                    read.push(event.clone());
                    if event["type"] == kind {
                        return;
                    }
                }
                if page["has_more"] != true {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        });
        assert!(
            found.await.is_ok(),
            "{}: no {kind} in {read:?} of {}",
            self.runtime,
            self.get("").await
        );
        read
    }

    /// Reads to the turn's end; what the agent said, and why the turn ended.
    async fn ended(&mut self) -> (String, String) {
        let events = self.until("session.status_idle").await;
        let reason = events.last().unwrap()["stop_reason"]["type"].as_str().unwrap().to_owned();
        (said(&events), reason)
    }

    /// The permission request that is open.
    async fn asked(&mut self) -> u64 {
        let events = self.until("session.permission_requested").await;
        let request = events.last().unwrap()["tool_use_id"].as_u64().unwrap();
        let open = self.get("/requests?status=open").await;
        assert_eq!(open["data"][0]["id"], request, "{}: {open}", self.runtime);
        assert!(
            self.get("").await["waiting_on"]
                .as_str()
                .is_some_and(|text| text.starts_with("a decision on ")),
            "{}",
            self.runtime
        );
        request
    }

    /// What was sent while turns ran, and what became of it, oldest first.
    async fn inputs(&self) -> Vec<(String, String)> {
        let inputs = self.get("/inputs").await;
        let inputs = inputs["data"].as_array().unwrap().iter().rev();
        let text = |input: &Value, name: &str| input[name].as_str().unwrap_or_default().to_owned();
        inputs.map(|input| (text(input, "kind"), text(input, "status"))).collect()
    }
}

fn said(events: &[Value]) -> String {
    let contents = events
        .iter()
        .filter(|event| event["type"].as_str().is_some_and(|kind| kind.starts_with("agent.")));
    let texts = contents.flat_map(|event| event["content"].as_array().cloned().unwrap_or_default());
    texts.filter_map(|block| block["text"].as_str().map(|text| format!("{text}\n"))).collect()
}

fn pair(kind: &str, status: &str) -> (String, String) {
    (kind.to_owned(), status.to_owned())
}

#[tokio::test]
async fn a_running_turn_is_interrupted_joined_and_followed_by_a_queued_message() {
    let stack = Stack::start(MODEL).await.unwrap();
    for_each_agent(RUNTIMES, async |(runtime, model, _, steers)| {
        let mut chat = Chat::begin(&stack, (runtime, model), Value::Null, "slowly").await;
        // While the model streams.
        chat.until("session.status_running").await;
        tokio::time::sleep(Duration::from_millis(700)).await;
        let interrupt = chat.post("interrupt", Value::Null, 202).await;
        assert_eq!(interrupt["kind"], "interrupt");
        assert_eq!(chat.ended().await.1, "interrupted", "{runtime}");
        let session = chat.get("").await;
        assert_eq!(
            (&session["status"], &session["exit_code"]),
            (&json!("completed"), &json!(0)),
            "{runtime}: {session}"
        );
        chat.post("interrupt", Value::Null, 409).await;

        // While a tool runs; a message waits for the end, and another one behind it.
        // Claude Code refuses some commands that begin with `sleep`.
        let long = "run: timeout 61 tail -f /dev/null; echo never";
        chat.post("prompt", json!({ "prompt": long }), 202).await;
        chat.until("agent.tool_use").await;
        chat.post("prompt", json!({ "prompt": "no" }), 409).await;
        let first = chat
            .post(
                "prompt",
                json!({ "prompt": "what was my first message?", "when_busy": "interrupt" }),
                202,
            )
            .await;
        chat.post("prompt", json!({ "prompt": "say the mark", "when_busy": "queue" }), 202).await;
        let (_, reason) = chat.ended().await;
        assert_eq!(reason, "interrupted", "{runtime}");
        let began = chat.until("session.status_running").await;
        assert_eq!(began.last().unwrap()["input_id"], first["input"]["id"], "{runtime}");
        let (text, reason) = chat.ended().await;
        assert!(
            text.contains("Your first message was:") && reason == "end_turn",
            "{runtime}: {reason} {text}"
        );
        let (text, _) = chat.ended().await;
        assert!(text.contains("MARK-4711"), "{runtime}: {text}");
        let expected = [
            pair("interrupt", "applied"),
            pair("message", "applied"),
            pair("interrupt", "applied"),
            pair("message", "applied"),
        ];
        let mut inputs = chat.inputs().await;
        inputs[1..].sort();
        let mut expected = expected.to_vec();
        expected[1..].sort();
        assert_eq!(inputs, expected, "{runtime}");

        // A message that joins the turn.
        chat.post("prompt", json!({ "prompt": "slowly" }), 202).await;
        chat.until("session.status_running").await;
        tokio::time::sleep(Duration::from_millis(700)).await;
        let steer = json!({ "prompt": "say the mark", "when_busy": "steer" });
        if !steers {
            let refused = chat.post("prompt", steer, 422).await;
            assert!(refused["detail"].as_str().unwrap().contains(runtime), "{refused}");
            chat.ended().await;
            return;
        }
        let sent = chat.post("prompt", steer, 202).await;
        let (mut text, _) = chat.ended().await;
        // It may come too late for the turn: then it begins the next one.
        if chat.get("").await["status"] != "completed" {
            text = chat.ended().await.0;
        }
        assert!(text.contains("MARK-4711"), "{runtime}: {text}");
        let inputs = chat.get("/inputs").await;
        assert_eq!(
            (&inputs["data"][0]["id"], &inputs["data"][0]["status"]),
            (&sent["input"]["id"], &json!("applied")),
            "{runtime}"
        );
    })
    .await;
}

#[tokio::test]
async fn a_permission_request_is_allowed_or_denied_with_a_message() {
    let stack = Stack::start(MODEL).await.unwrap();
    for_each_agent(RUNTIMES, async |(runtime, model, shell, _)| {
        let permissions = json!({ "rules": [{ "tool": shell, "evaluation": "ask" }] });
        let mut chat = Chat::begin(
            &stack,
            (runtime, model),
            permissions,
            "run: echo allowed >/workspace/made; cat /workspace/made",
        )
        .await;
        let request = chat.asked().await;
        let answered =
            chat.post(&format!("requests/{request}"), json!({ "decision": "allow" }), 200).await;
        assert_eq!(answered["answer"]["decision"], "allow", "{runtime}: {answered}");
        chat.post(&format!("requests/{request}"), json!({ "decision": "deny" }), 409).await;
        let (text, reason) = chat.ended().await;
        assert!(text.contains("allowed") && reason == "end_turn", "{runtime}: {reason} {text}");

        chat.post("prompt", json!({ "prompt": "run: echo denied >/workspace/not-made" }), 202)
            .await;
        let request = chat.asked().await;
        let message = if runtime == "gemini" { Value::Null } else { "use the copy instead".into() };
        let mut denial = json!({ "decision": "deny" });
        if !message.is_null() {
            denial["message"] = message.clone();
        }
        chat.post(&format!("requests/{request}"), denial, 200).await;
        let (text, _) = chat.ended().await;
        if let Some(message) = message.as_str() {
            assert!(text.contains(message), "{runtime}: the model did not read why: {text}");
        }
        let requests = chat.get("/requests").await;
        let statuses: Vec<_> = requests["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(|request| request["status"].clone())
            .collect();
        assert_eq!(statuses, ["denied", "allowed"], "{runtime}");
        assert!(requests["data"][0]["answer"]["key_id"].is_string(), "{runtime}: {requests}");
    })
    .await;
}

#[tokio::test]
async fn an_answer_is_applied_after_everything_around_the_agent_was_killed() {
    let stack = Stack::start(MODEL).await.unwrap();
    let permissions = json!({ "default": "ask" });
    let claude = ("claude", "anthropic/claude-sonnet-4-5");
    let mut chat = Chat::begin(
        &stack,
        claude,
        permissions,
        "run: echo done >>/workspace/times; wc -l </workspace/times",
    )
    .await;
    let request = chat.asked().await;
    for service in ["sprite-runner", "scheduler", "gateway", "local-sprites"] {
        let pids = stack.pids(service);
        assert!(!pids.is_empty(), "{service}");
        Stack::signal(&pids, Signal::KILL);
    }
    let body = json!({ "decision": "allow" });
    let route = format!("/sessions/{}/requests/{request}", chat.session);
    let answered = tokio::time::timeout(PATIENCE, async {
        loop {
            match stack.call(Method::POST, &route, Some(body.clone())).await {
                Ok(answer) if answer.status == 200 => return,
                // The first one may have been heard by a gateway that could not answer any more.
                Ok(answer) if answer.status == 409 => return,
                _ => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    });
    answered.await.unwrap();
    let (text, reason) = chat.ended().await;
    assert!(text.contains("The command said:\n1") && reason == "end_turn", "{reason} {text}");
    assert_eq!(chat.inputs().await, [pair("decision", "applied")]);
}

/// Its sandbox, with the agent, is frozen while the request is open. `PAUSED_SECONDS`: for
/// how long; `make test-paused` waits ten minutes.
#[tokio::test]
async fn a_permission_request_stays_open_while_its_sandbox_is_paused() {
    #[expect(clippy::disallowed_methods, reason = "a test has no settings of its own")]
    let seconds = std::env::var("PAUSED_SECONDS").map_or(4, |text| text.parse().unwrap());
    let settings = &[("LOCAL_SPRITES_FREEZE_AFTER_S", "2")];
    let stack = Stack::start(Options { settings, ..MODEL }).await.unwrap();
    for_each_agent(RUNTIMES, async |(runtime, model, shell, _)| {
        let permissions = json!({ "rules": [{ "tool": shell, "evaluation": "ask" }] });
        let mut chat = Chat::begin(
            &stack,
            (runtime, model),
            permissions,
            "run: echo done >>/workspace/times; wc -l </workspace/times",
        )
        .await;
        let request = chat.asked().await;
        testkit::eventually("the sandbox is frozen", async || {
            sprite_status(&stack, &chat.session).await == "warm"
        })
        .await;
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        assert_eq!(
            sprite_status(&stack, &chat.session).await,
            "warm",
            "{runtime}: the open request wakes its sandbox"
        );
        let session = chat.get("").await;
        assert_eq!(session["status"], "running", "{runtime}: {session}");
        chat.post(&format!("requests/{request}"), json!({ "decision": "allow" }), 200).await;
        let (text, reason) = chat.ended().await;
        assert!(
            reason == "end_turn" && (runtime == "gemini" || text.contains('1')),
            "{runtime}: {reason} {text}"
        );
        assert_eq!(chat.inputs().await, [pair("decision", "applied")], "{runtime}");
    })
    .await;
}

/// As the sandbox's server tells it; asking does not wake the sandbox.
async fn sprite_status(stack: &Stack, session: &str) -> String {
    let request = stack
        .http
        .get(format!("{}/v1/sprites", stack.ready_text("/sprites_url")))
        .bearer_auth(stack.ready_text("/sprites_token"));
    let list: Value = request.send().await.unwrap().json().await.unwrap();
    let tail = session.replace('-', "").split_off(12);
    let sprites = list["sprites"].as_array().unwrap();
    let sprite = sprites.iter().find(|sprite| sprite["name"].as_str().unwrap().ends_with(&tail));
    sprite.map(|sprite| sprite["status"].as_str().unwrap().to_owned()).unwrap_or_default()
}

/// Rules with patterns: what each command is asked about, allowed or denied by.
#[tokio::test]
async fn a_rule_may_name_the_calls_of_a_tool_that_it_is_about() {
    let stack = Stack::start(MODEL).await.unwrap();
    for_each_agent(RUNTIMES, async |(runtime, model, shell, _)| {
        let rule = |pattern: &str, evaluation: &str| json!({ "tool": format!("{shell}({pattern})"), "evaluation": evaluation });
        let permissions = json!({ "default": "ask", "rules": [rule("rm *", "deny"), rule("echo *", "allow")] });
        let mut chat = Chat::begin(&stack, (runtime, model), permissions, "run: echo allowed").await;
        let events = chat.until("session.status_idle").await;
        assert!(!events.iter().any(|event| event["type"] == "session.permission_requested"), "{runtime}: {events:?}");
        assert_eq!(events.last().unwrap()["stop_reason"]["type"], "end_turn", "{runtime}");
        chat.post("prompt", json!({ "prompt": "run: rm -f /workspace/x" }), 202).await;
        let events = chat.until("session.status_idle").await;
        assert!(!events.iter().any(|event| event["type"] == "session.permission_requested"), "{runtime}: {events:?}");
        let denied = events.iter().any(|event| event["type"] == "agent.tool_use" && event["evaluated_permission"] == "deny");
        assert!(denied, "{runtime}: {events:?}");
        // An allowed program followed by another is none that was allowed.
        chat.post("prompt", json!({ "prompt": "run: echo one; touch /workspace/two" }), 202).await;
        let request = chat.asked().await;
        chat.post(&format!("requests/{request}"), json!({ "decision": "allow" }), 200).await;
        assert_eq!(chat.ended().await.1, "end_turn", "{runtime}");
    })
    .await;
}

#[tokio::test]
async fn the_command_line_shows_what_the_agent_does_approves_and_interrupts() {
    let stack = Stack::start(MODEL).await.unwrap();
    let run = |args: &[&str]| {
        let output = stack.aod(args).unwrap().output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let start = |args: &[&str]| {
        let (out, err) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let mut command = stack.aod(args).unwrap();
        let command = command
            .stdin(Stdio::null())
            .stdout(out.try_clone().unwrap())
            .stderr(err.try_clone().unwrap());
        (command.spawn().unwrap(), out, err)
    };
    let written = |mut file: File| {
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    };
    let model = "anthropic/claude-sonnet-4-5";
    let agent = run(&[
        "--output",
        "json",
        "agents",
        "create",
        "--name",
        "a",
        "--runtime",
        "claude",
        "--model",
        model,
        "--permission",
        "Bash=ask",
    ]);
    let agent: Value = serde_json::from_str(&agent).unwrap();
    assert_eq!(
        agent["permissions"],
        json!({ "default": "allow", "rules": [{ "tool": "Bash", "evaluation": "ask" }] })
    );
    let id = agent["id"].as_str().unwrap();
    let (mut child, out, err) = start(&["run", "--agent", id, "run: echo shown"]);
    testkit::eventually("the agent asks", || async {
        written(err.try_clone().unwrap()).contains("aod sessions approve")
    })
    .await;
    let sessions: Value =
        serde_json::from_str(&run(&["--output", "json", "sessions", "list"])).unwrap();
    let session = sessions[0]["id"].as_str().unwrap().to_owned();
    run(&["sessions", "approve", &session]);
    assert_eq!(child.wait().unwrap().code(), Some(0), "{}", written(err));
    let shown = written(out);
    for line in ["→ Bash ", "? Bash ", "← shown", "The command said:"] {
        assert!(shown.contains(line), "{line:?} is not in {shown}");
    }
    assert_eq!(run(&["logs", &session]), shown, "what was shown live is shown again");

    let (mut child, _out, err) = start(&["run", "--session", &session, "slowly"]);
    testkit::eventually("the turn runs", || async {
        stack.get(&format!("/sessions/{session}")).await.unwrap().body["status"] == "running"
    })
    .await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    Stack::signal(&[child.id()], Signal::INT);
    assert_eq!(child.wait().unwrap().code(), Some(0), "an interrupted turn has not failed");
    let said = written(err);
    assert!(said.contains("Interrupting the turn") && said.contains("\ninterrupted"), "{said}");
}

/// From the command line, and with a shell, whose turns need no model.
#[tokio::test]
async fn the_command_line_queues_prompts_and_follows_them() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let session = stack.session("shell", "sleep 2; echo one").await.unwrap();
    let run = |args: &[&str]| {
        let output = stack.aod(args).unwrap().output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (code, _, error) = run(&["sessions", "prompt", &session, "echo no"]);
    assert!(
        code == Some(1) && error.contains("Session already has a pending turn")
            || error.contains("is already running"),
        "{error}"
    );
    let (code, _, error) =
        run(&["sessions", "prompt", &session, "--when-busy", "steer", "echo no"]);
    assert!(
        code == Some(1) && error.contains("Runtime shell takes no message while a turn runs"),
        "{error}"
    );
    let (code, output, error) = run(&[
        "--output",
        "json",
        "sessions",
        "prompt",
        &session,
        "--when-busy",
        "queue",
        "echo two",
    ]);
    assert_eq!(code, Some(0), "{error}");
    let queued: Value = serde_json::from_str(&output).unwrap();
    assert_eq!(
        (&queued["current_turn"], &queued["input"]["status"]),
        (&json!(1), &json!("queued")),
        "{queued}"
    );
    let id = queued["input"]["id"].as_str().unwrap();
    let (code, output, error) =
        run(&["sessions", "edit", &session, id, "echo two, changed; exit 0"]);
    assert!(code == Some(0) && output.contains("echo two, changed"), "{output}{error}");
    // Its own turn is followed, and neither the one before it nor the one after.
    let (code, output, error) =
        run(&["run", "--session", &session, "--when-busy", "queue", "echo three; exit 3"]);
    assert_eq!((code, output.as_str()), (Some(3), "three\n"), "{error}");
    let turns = stack.get(&format!("/sessions/{session}/turns")).await.unwrap();
    let prompts: Vec<_> =
        turns.body["data"].as_array().unwrap().iter().map(|turn| turn["prompt"].clone()).collect();
    assert_eq!(prompts, ["sleep 2; echo one", "echo two, changed; exit 0", "echo three; exit 3"]);
    let (_, output, _) = run(&["sessions", "inputs", &session]);
    assert_eq!(output.matches("applied").count(), 2, "{output}");
    let (code, _, error) = run(&["sessions", "approve", &session]);
    assert!(code == Some(1) && error.contains("no permission request is open"), "{error}");
}
