//! The real CLIs of the pinned versions, against the scripted model. Each CLI's test is one
//! conversation in few processes: their starts are what takes time.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::LazyLock,
};

use contract::host::{
    Evaluation, Event, Message, PermissionRule, Permissions, Spec, StartCli, ToolResult, ToolUse,
    TurnEnded, Variable, WhenBusy, decision::Verdict, decision_settled::How, event, input,
    input_settled::Outcome, record, turn_ended::Reason,
};

use crate::support::{Attached, Host, eventually, is_running, output, show};

struct Model {
    process: Child,
    port: u16,
}

impl Drop for Model {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Model {
    fn start() -> Self {
        let program = Path::new(env!("CARGO_BIN_EXE_agent-host")).with_file_name("scripted-model");
        assert!(program.exists(), "build scripted-model first: cargo build");
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut command = Command::new(program);
        command
            .env("SCRIPTED_MODEL_ADDR", format!("127.0.0.1:{port}"))
            .env("AOD_ADMIN_ADDR", "127.0.0.1:0");
        let process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let model = Self { process, port };
        eventually(|| std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        model
    }
}

/// Where scripts/setup.sh installs the CLIs.
static AGENTS: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = |name: &str, rest: &str| {
        std::env::var_os(name).map(|folder| PathBuf::from(folder).join(rest))
    };
    let tools = folder("AOD_TOOLS_DIR", "").or_else(|| folder("XDG_DATA_HOME", "aod/tools"));
    let tools = tools.or_else(|| folder("HOME", ".local/share/aod/tools")).unwrap();
    tools.join("agents/bin")
});

/// A host of a CLI, with the model's addresses and keys; none where the CLI is not installed.
fn host(runtime: &str, model: &Model, ask_for: &[&str]) -> Option<Host> {
    if !AGENTS.join(runtime).exists() {
        eprintln!("skipped: {runtime} is not installed (scripts/setup.sh {runtime})");
        return None;
    }
    let rules = ask_for.iter().map(|tool| PermissionRule {
        tool: (*tool).to_owned(),
        evaluation: Evaluation::Ask.into(),
    });
    let mut host = Host::new(Spec {
        runtime: runtime.to_owned(),
        model: if runtime == "opencode" { "anthropic/claude-sonnet-4-5" } else { "scripted-1" }
            .to_owned(),
        conversation_id: "c0ffee00-0000-4000-8000-000000000001".to_owned(),
        idle_seconds: 300,
        partial_messages: true,
        permissions: Some(Permissions { rules: rules.collect(), otherwise: 0 }),
        system: "Remember MARK-4711.".to_owned(),
        ..Spec::default()
    });
    let home = host.folder.path().join("home");
    let work = host.folder.path().join("work");
    std::fs::create_dir_all(&home).unwrap();
    std::fs::create_dir_all(&work).unwrap();
    let url = format!("http://127.0.0.1:{}", model.port);
    let path = format!("{}:/usr/local/bin:/usr/bin:/bin", AGENTS.display());
    let env = [
        ("HOME", home.to_str().unwrap()),
        ("PATH", &path),
        ("ANTHROPIC_BASE_URL", &url),
        ("ANTHROPIC_API_KEY", "key"),
        ("OPENAI_API_KEY", "key"),
        ("GOOGLE_GEMINI_BASE_URL", &url),
        ("GEMINI_API_KEY", "key"),
        ("IS_SANDBOX", "1"),
    ];
    host.spec.env =
        env.map(|(name, value)| Variable { name: name.to_owned(), value: value.to_owned() }).into();
    host.spec.working_directories = vec![work.to_str().unwrap().to_owned()];
    host.spec.mcp_servers = vec!["echo".to_owned()];
    let echo = work.join("echo.py");
    std::fs::write(&echo, MCP_SERVER).unwrap();
    configure(runtime, &home, &url, echo.to_str().unwrap());
    Some(host)
}

/// An MCP server that any CLI can start: JSON-RPC, a message a line.
const MCP_SERVER: &str = r#"import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message: continue
    method, params = message["method"], message.get("params") or {}
    if method == "initialize":
        result = {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}}, "serverInfo": {"name": "echo", "version": "1"}}
    elif method == "tools/list":
        schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
        result = {"tools": [{"name": "say", "description": "Says it again", "inputSchema": schema}]}
    elif method == "tools/call":
        text = params["arguments"]["text"] + " by MCP"
        result = {"content": [{"type": "text", "text": text}]}
    else:
        result = {}
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
"#;

/// What the runner writes into the home: see its `runtimes`.
fn configure(runtime: &str, home: &Path, url: &str, echo: &str) {
    let (path, text) = match runtime {
        "claude" => (
            ".claude.json",
            format!(
                r#"{{"hasCompletedOnboarding":true,"mcpServers":{{"echo":{{"type":"stdio","command":"python3","args":["{echo}"]}}}}}}"#
            ),
        ),
        "codex" => (
            ".codex/config.toml",
            format!(
                "check_for_update_on_startup = false\nmodel_provider = \"scripted\"\n[analytics]\nenabled = false\n\
                 [model_providers.scripted]\nname = \"scripted\"\nbase_url = \"{url}/v1\"\nwire_api = \"responses\"\n\
                 requires_openai_auth = true\nsupports_websockets = false\n\
                 [mcp_servers.echo]\ncommand = \"python3\"\nargs = [\"{echo}\"]\n"
            ),
        ),
        "gemini" => (
            ".gemini/settings.json",
            format!(
                r#"{{"security":{{"auth":{{"selectedType":"gemini-api-key"}}}},"general":{{"enableAutoUpdate":false}},
                   "privacy":{{"usageStatisticsEnabled":false}},"mcpServers":{{"echo":{{"command":"python3","args":["{echo}"]}}}}}}"#
            ),
        ),
        _ => (
            ".config/opencode/opencode.json",
            format!(
                r#"{{"share":"disabled","autoupdate":false,"provider":{{"anthropic":{{"options":{{"baseURL":"{url}/v1"}}}}}},
                   "mcp":{{"echo":{{"type":"local","command":["python3","{echo}"],"enabled":true}}}}}}"#
            ),
        ),
    };
    let path = home.join(path);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn events(kinds: &[record::Kind]) -> Vec<Event> {
    let events = kinds.iter().filter_map(|kind| match kind {
        record::Kind::Event(event) => Some(event.clone()),
        _ => None,
    });
    events.collect()
}

/// What the agent said, in one text.
fn said(kinds: &[record::Kind]) -> String {
    let texts = events(kinds).into_iter().filter_map(|event| match event.kind {
        Some(event::Kind::Message(message)) => Some(message.text),
        _ => None,
    });
    texts.collect::<Vec<_>>().join("\n")
}

fn deltas(kinds: &[record::Kind]) -> String {
    let texts = events(kinds).into_iter().filter_map(|event| match event.kind {
        Some(event::Kind::Delta(delta)) if !delta.thinking => Some(delta.content),
        _ => None,
    });
    texts.collect()
}

/// Each tool use with its result, paired by event id.
fn tools(kinds: &[record::Kind]) -> Vec<(ToolUse, Option<ToolResult>)> {
    let all = events(kinds);
    let result = |id: u64| {
        all.iter().find_map(|event| match &event.kind {
            Some(event::Kind::ToolResult(result)) if result.tool_use == id => Some(result.clone()),
            _ => None,
        })
    };
    let uses = all.iter().filter_map(|event| match &event.kind {
        Some(event::Kind::ToolUse(tool)) => Some((tool.clone(), result(event.id))),
        _ => None,
    });
    uses.collect()
}

struct Chat {
    host: Host,
    attached: Attached,
    turn: u32,
}

impl Chat {
    fn new(host: Host) -> Self {
        host.start();
        let attached = host.attach(0);
        Self { host, attached, turn: 0 }
    }

    fn send(&mut self, text: &str) {
        self.turn += 1;
        self.attached.message(self.turn, text);
    }

    #[track_caller]
    fn completed(&mut self, text: &str) -> Vec<record::Kind> {
        self.send(text);
        let (kinds, ended) = self.attached.turn_ended();
        assert_eq!(
            (ended.reason(), ended.turn),
            (Reason::Completed, self.turn),
            "{}",
            show(&kinds)
        );
        kinds
    }

    fn until_event(&mut self, mut found: impl FnMut(&event::Kind) -> bool) -> Vec<record::Kind> {
        self.attached.until(|kind| match kind {
            record::Kind::Event(event) => event.kind.as_ref().is_some_and(&mut found),
            _ => false,
        })
    }

    /// Reads until a decision is asked for.
    fn asked(&mut self) -> (u64, Vec<record::Kind>) {
        let kinds = self.attached.until(|kind| {
            matches!(kind, record::Kind::DecisionRequested(_) | record::Kind::TurnEnded(_))
        });
        let Some(record::Kind::DecisionRequested(request)) = kinds.last() else {
            panic!("{}", show(&kinds))
        };
        (request.id, kinds)
    }

    fn ended(&mut self) -> (Vec<record::Kind>, TurnEnded) {
        self.attached.turn_ended()
    }

    fn restart_host(&mut self) {
        self.host.kill();
        self.attached.rest();
        self.host.start();
        self.attached = self.host.attach(self.attached.decoder.offset());
    }
}

/// With `AOD_RECORD_TRANSCRIPTS=1`: keeps what the CLI wrote in two turns for the adapters' own
/// tests.
fn record_transcript(chat: &Chat) {
    if std::env::var_os("AOD_RECORD_TRANSCRIPTS").is_none() {
        return;
    }
    let (kinds, _) = chat.host.whole_journal();
    let name = format!("{}.jsonl", chat.host.spec.runtime);
    std::fs::write(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("transcripts").join(name),
        output(&kinds).0,
    )
    .unwrap();
}

const ENDLESS: &str = "run: while :; do sleep 1.375; done";

/// What every CLI does: tools, a second turn in the living process, interrupts, a resumed
/// conversation, allow and deny.
fn conversation(runtime: &str, shell: &str, has_output: bool, steers: bool) {
    let model = Model::start();
    let Some(host) = host(runtime, &model, &[]) else { return };
    let mut chat = Chat::new(host);
    let file = chat.host.folder.path().join("work/file");

    let kinds = chat.completed(&format!("run: echo one >{0}; cat {0}", file.display()));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "one\n");
    let tools = tools(&kinds);
    let [(tool, result)] = tools.as_slice() else { panic!("{tools:?}\n{}", show(&kinds)) };
    assert_eq!(tool.name, shell);
    assert!(tool.input_json.contains("echo one"), "{tool:?}");
    let result = result.as_ref().unwrap_or_else(|| panic!("no result\n{}", show(&kinds)));
    assert!(
        !result.is_error && result.content.contains("one") == has_output,
        "{result:?}\n{}",
        show(&kinds)
    );
    assert!(said(&kinds).contains("The command said:"), "{}", show(&kinds));
    assert!(deltas(&kinds).contains(&said(&kinds)), "{}", show(&kinds));
    let Some(record::Kind::TurnEnded(ended)) = kinds.last() else { panic!("no end") };
    assert!(
        ended.usage.as_ref().is_some_and(|usage| usage.input_tokens > 0 && usage.output_tokens > 0),
        "{ended:?}"
    );
    let started = |kinds: &[record::Kind]| {
        kinds.iter().any(|kind| matches!(kind, record::Kind::CliStarted(_)))
    };
    assert!(started(&kinds));

    // The living process takes the next turn; instructions reach the model.
    let kinds = chat.completed("say the mark");
    assert!(!started(&kinds) && said(&kinds).contains("MARK-4711"), "{}", show(&kinds));

    record_transcript(&chat);

    // A tool of an MCP server, whose name is told apart from the tool's.
    let kinds = chat.completed("echo by MCP: seven");
    let tools = self::tools(&kinds);
    let Some((tool, result)) = tools.iter().find(|(tool, _)| tool.mcp_server == "echo") else {
        panic!("{tools:?}\n{}", show(&kinds))
    };
    assert!(
        tool.name.contains("say") && tool.input_json.contains("seven") | !has_output,
        "{tool:?}"
    );
    assert!(result.as_ref().is_some_and(|result| !result.is_error), "{tools:?}\n{}", show(&kinds));
    assert!(said(&kinds).contains("seven by MCP"), "{}", show(&kinds));

    // Interrupted while the model writes.
    chat.send("slowly");
    chat.until_event(|kind| matches!(kind, event::Kind::Delta(_)));
    chat.attached.interrupt("interrupt-1");
    let (kinds, ended) = chat.ended();
    assert_eq!(ended.reason(), Reason::Interrupted, "{}", show(&kinds));

    // Interrupted while a tool runs: nothing of it is left.
    chat.send(ENDLESS);
    eventually(|| is_running("sleep\u{0}1.375"));
    chat.attached.interrupt("interrupt-2");
    let (kinds, ended) = chat.ended();
    assert_eq!(ended.reason(), Reason::Interrupted, "{}", show(&kinds));
    eventually(|| !is_running("sleep\u{0}1.375"));

    // A message for the running turn: part of it where the CLI can, else the next turn in place of
    // this one.
    chat.send("slowly");
    chat.until_event(|kind| matches!(kind, event::Kind::Delta(_)));
    let message = Message {
        turn: 90,
        text: "say the mark".to_owned(),
        when_busy: WhenBusy::Steer.into(),
        ..Message::default()
    };
    chat.attached.send("steered", input::Kind::Message(message));
    let (mut kinds, mut ended) = chat.ended();
    if !steers {
        assert_eq!(ended.reason(), Reason::Interrupted, "{}", show(&kinds));
        (kinds, ended) = chat.ended();
        assert_eq!(ended.turn, 90);
    }
    assert_eq!(ended.reason(), Reason::Completed, "{}", show(&kinds));
    assert!(said(&kinds).contains("MARK-4711"), "{}", show(&kinds));

    // A model that refuses the request is an error, and the CLI continues.
    chat.send("fail with 400");
    let (kinds, ended) = chat.ended();
    assert_eq!(ended.reason(), Reason::Failed, "{}", show(&kinds));
    assert!(ended.message.contains("The script says so"), "{ended:?}");

    // The host and the CLI are killed; the conversation continues by its id, and now asks. What
    // began was marked and is gone.
    let rules = vec![PermissionRule { tool: shell.to_owned(), evaluation: Evaluation::Ask.into() }];
    chat.host.spec.permissions = Some(Permissions { rules, otherwise: 0 });
    chat.restart_host();
    let kinds = chat.completed("What was my first message");
    assert!(said(&kinds).contains("echo one"), "{}", show(&kinds));
    assert!(
        kinds
            .iter()
            .any(|kind| matches!(kind, record::Kind::CliStarted(started) if started.resumed))
    );

    let (allowed, denied) =
        (chat.host.folder.path().join("allowed"), chat.host.folder.path().join("denied"));
    chat.send(&format!("run: touch {}", allowed.display()));
    let (request, _) = chat.asked();
    assert!(!allowed.exists());
    chat.attached.decide("decision-1", request, Verdict::Allow, "");
    let (kinds, ended) = chat.ended();
    assert_eq!(ended.reason(), Reason::Completed, "{}", show(&kinds));
    assert!(allowed.exists());

    chat.send(&format!("run: touch {}", denied.display()));
    let (request, _) = chat.asked();
    chat.attached.decide("decision-2", request, Verdict::Deny, "Not here, says MARK-0815");
    let (kinds, ended) = chat.ended();
    assert!(!denied.exists());
    assert_eq!(ended.reason(), Reason::Completed, "{}", show(&kinds));

    // An open request of a host that is killed is void, and said to be.
    chat.send(&format!("run: touch {}", denied.display()));
    let (request, _) = chat.asked();
    chat.restart_host();
    let (kinds, ended) = chat.ended();
    assert_eq!(ended.reason(), Reason::HostLost);
    let void = kinds
        .iter()
        .any(|kind| matches!(kind, record::Kind::DecisionSettled(settled) if settled.id == request && settled.how() == How::Void));
    assert!(void && !denied.exists(), "{}", show(&kinds));

    chat.attached.stop();
    let (kinds, _) = chat.attached.rest();
    assert!(matches!(kinds.last(), Some(record::Kind::HostEnded(_))));
}

#[test]
fn claude() {
    conversation("claude", "Bash", true, true);
}

#[test]
fn codex() {
    conversation("codex", "shell", true, true);
}

#[test]
fn gemini() {
    conversation("gemini", "run_shell_command", false, false);
}

#[test]
fn opencode() {
    conversation("opencode", "bash", true, false);
}

#[test]
fn a_cli_that_was_idle_or_killed_is_started_again_with_its_conversation() {
    let model = Model::start();
    let Some(mut host) = host("claude", &model, &["Bash"]) else { return };
    host.spec.idle_seconds = 1;
    let mut chat = Chat::new(host);
    chat.completed("the first words");
    chat.attached.until(|kind| matches!(kind, record::Kind::CliExited(_)));
    let kinds = chat.completed("What was my first message");
    assert!(said(&kinds).contains("the first words"), "{}", show(&kinds));

    // Killed while it asks: the request is void, the turn ends at once, and nothing ran.
    let file = chat.host.folder.path().join("file");
    chat.send(&format!("run: touch {}", file.display()));
    let (request, asked) = chat.asked();
    let started = [kinds, asked].concat().into_iter().rev().find_map(|kind| match kind {
        record::Kind::CliStarted(started) => Some(started.pid),
        _ => None,
    });
    crate::support::kill(started.unwrap().try_into().unwrap());
    let (kinds, ended) = chat.ended();
    assert_eq!((ended.reason(), ended.exit_code), (Reason::CliLost, Some(137)), "{}", show(&kinds));
    assert!(
        kinds
            .iter()
            .any(|kind| matches!(kind, record::Kind::DecisionSettled(settled) if settled.id == request && settled.how() == How::Void))
    );
    chat.attached.decide("late", request, Verdict::Allow, "");
    let refused = |kind: &record::Kind| matches!(kind, record::Kind::InputSettled(settled) if settled.id == "late" && settled.outcome() == Outcome::Refused);
    chat.attached.until(refused);
    let kinds = chat.completed("What was my first message");
    assert!(said(&kinds).contains("the first words") && !file.exists(), "{}", show(&kinds));
}

/// A CLI that waits for its first message answers it in the same process. One that was closed
/// meanwhile is started again, though its conversation has nothing in it.
#[test]
fn every_cli_can_be_started_ahead_of_its_first_message() {
    for runtime in ["claude", "codex", "gemini", "opencode"] {
        for idle_seconds in [300, 1] {
            let model = Model::start();
            let Some(mut host) = host(runtime, &model, &[]) else { continue };
            host.spec.idle_seconds = idle_seconds;
            let mut chat = Chat::new(host);
            chat.attached.send("ahead", input::Kind::StartCli(StartCli {}));
            let settled = |kind: &record::Kind| matches!(kind, record::Kind::InputSettled(settled) if settled.id == "ahead" && settled.outcome() == Outcome::Applied);
            chat.attached.until(settled);
            if idle_seconds == 1 {
                chat.attached.until(|kind| matches!(kind, record::Kind::CliExited(_)));
            }
            let kinds = chat.completed("the first words");
            let starts =
                kinds.iter().filter(|kind| matches!(kind, record::Kind::CliStarted(_))).count();
            assert_eq!(starts, usize::from(idle_seconds == 1), "{runtime}: {}", show(&kinds));
            let opened = |kind: &record::Kind| {
                matches!(
                    kind,
                    record::Kind::Event(Event {
                        kind: Some(event::Kind::ConversationStarted(_)),
                        ..
                    })
                )
            };
            let failed = |kind: &record::Kind| {
                matches!(kind, record::Kind::Event(Event { kind: Some(event::Kind::Error(_)), .. }))
            };
            assert_eq!(
                kinds.iter().filter(|kind| opened(kind)).count(),
                1,
                "{runtime}: {}",
                show(&kinds)
            );
            assert!(!kinds.iter().any(failed), "{runtime}: {}", show(&kinds));
            let kinds = chat.completed("What was my first message");
            assert!(said(&kinds).contains("the first words"), "{runtime}: {}", show(&kinds));
        }
    }
}

/// Printed: `cargo test -p agent-host --test it warm -- --ignored --nocapture`.
#[test]
#[ignore = "prints figures"]
fn warm_follow_ups() {
    for runtime in ["claude", "codex", "gemini", "opencode"] {
        let model = Model::start();
        let Some(host) = host(runtime, &model, &[]) else { continue };
        let mut chat = Chat::new(host);
        let start = std::time::Instant::now();
        chat.completed("hello");
        let cold = start.elapsed();
        let mut times: Vec<_> = (0..20)
            .map(|number| {
                let start = std::time::Instant::now();
                chat.send(&format!("hello {number}"));
                chat.until_event(|kind| matches!(kind, event::Kind::Delta(_)));
                let elapsed = start.elapsed();
                chat.ended();
                elapsed
            })
            .collect();
        times.sort();
        println!(
            "{runtime}: message to first delta, p50: {:?}; first turn with the CLI's start: {cold:?}",
            times[10]
        );
    }
}
