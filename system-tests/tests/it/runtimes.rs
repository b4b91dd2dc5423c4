//! Every agent CLI, for real, against the scripted model: a tool, a conversation that continues, an
//! MCP server, a key that is refused.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use system_tests::{Options, Stack, for_each_agent};
use tokio::task::JoinSet;

use crate::git::GitServer;

const RUNTIMES: [(&str, &str); 4] = [
    ("claude", "anthropic/claude-sonnet-4-5"),
    ("codex", "openai/gpt-5.2-codex"),
    ("gemini", "google/gemini-2.5-pro"),
    ("opencode", "openai/gpt-5.2"),
];
const MODEL: Options = Options {
    scripted_model: true,
    runners: 1,
    replicas: 1,
    nats_servers: 1,
    no_restart: false,
    settings: &[],
};

/// An MCP server that any CLI can start: JSON-RPC, a message a line.
const MCP_SERVER: &str = r#"cat >/workspace/echo.py <<'END'
import json, os, sys
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
        text = params["arguments"]["text"] + " " + os.environ["SUFFIX"]
        result = {"content": [{"type": "text", "text": text}]}
    else:
        result = {}
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
END
"#;

struct Turn {
    output: String,
    end: Value,
}

async fn turn(stack: &Stack, session: &str, since: u64) -> Turn {
    let events = stack.stream(session, since).await.unwrap().all().await.unwrap();
    let output = events.iter().filter_map(|event| event["data"].as_str()).collect();
    Turn { output, end: events.last().unwrap().clone() }
}

impl Turn {
    #[track_caller]
    fn succeeded_saying(&self, runtime: &str, text: &str) {
        assert_eq!(
            (&self.end["type"], &self.end["code"]),
            (&json!("exit"), &json!(0)),
            "{runtime}: {} {}",
            self.end,
            self.output
        );
        assert!(self.output.contains(text), "{runtime}: {text:?} is not in {}", self.output);
    }
}

async fn prompt(stack: &Stack, session: &str, before: &Turn, text: &str) -> Turn {
    let answer = stack
        .post(&format!("/sessions/{session}/prompt"), json!({ "prompt": text }))
        .await
        .unwrap();
    assert_eq!(answer.status, 202, "{answer:?}");
    turn(stack, session, before.end["id"].as_u64().unwrap()).await
}

#[tokio::test]
async fn every_cli_runs_a_tool_remembers_its_first_turn_and_calls_an_mcp_server() {
    let stack = Stack::start(MODEL).await.unwrap();
    let environment = json!({ "name": "e", "setup_script": MCP_SERVER });
    let environment = stack.post("/environments", environment).await.unwrap().text("id").to_owned();
    // opencode speaks to each provider in that provider's own way.
    let more = [("opencode", "anthropic/claude-sonnet-4-5"), ("opencode", "google/gemini-2.5-pro")];
    for_each_agent(RUNTIMES.into_iter().chain(more), async |(runtime, model)| {
        let servers = json!([{ "name": "echo", "type": "stdio", "command": "python3", "args": ["/workspace/echo.py"], "env": { "SUFFIX": "by MCP" } }]);
        let agent = json!({ "name": format!("{runtime} {model}"), "model": model, "runtime": runtime, "system": "Be brief. MARK-4711", "mcp_servers": servers });
        let agent = stack.post("/agents", agent).await.unwrap();
        assert_eq!(agent.status, 201, "{agent:?}");
        let request = "run: echo made by $AOD_MODEL >/workspace/made; cat /workspace/made";
        let body = json!({ "agent_id": agent.text("id"), "prompt": request, "environment_id": environment });
        let session = stack.post("/sessions", body).await.unwrap().text("id").to_owned();
        let first = turn(&stack, &session, 0).await;
        first.succeeded_saying(runtime, &format!("made by {model}"));
        let second = prompt(&stack, &session, &first, "what was my first message?").await;
        second.succeeded_saying(runtime, "Your first message was: run: echo made");
        // What the agent is told beside its prompts reaches the model in every turn.
        let marked = prompt(&stack, &session, &second, "say the mark").await;
        marked.succeeded_saying(runtime, "MARK-4711");
        let third = prompt(&stack, &session, &marked, "echo by MCP: seven").await;
        third.succeeded_saying(runtime, "seven by MCP");
        let turns = stack.get(&format!("/sessions/{session}/turns")).await.unwrap();
        for turn in turns.body["data"].as_array().unwrap() {
            let usage = &turn["usage"];
            assert!(usage["input_tokens"].as_u64() >= Some(100) && usage["output_tokens"].as_u64() >= Some(1), "{runtime}: {usage}");
            // opencode names its sessions with a model of its own choice, which may have no price
            // in the table.
            let has_price = runtime != "opencode" || turn["turn_number"] != 1;
            assert!(!has_price || usage["cost_usd"].as_f64() > Some(0.0), "{runtime}: {usage}");
        }
        let events = typed_events(&stack, &session).await;
        every_model_request_is_counted(runtime, turns.body["data"].as_array().unwrap(), &events);
        tells_the_same_story(runtime, model, &events);
        ends_at_its_budget_and_goes_on_when_it_is_raised(&stack, runtime, &session, &third).await;
    })
    .await;
}

async fn ends_at_its_budget_and_goes_on_when_it_is_raised(
    stack: &Stack,
    runtime: &str,
    session: &str,
    before: &Turn,
) {
    let path = format!("/sessions/{session}/budget");
    let set = async |limits: Value| {
        stack.call(reqwest::Method::PATCH, &path, Some(limits)).await.unwrap()
    };
    let budget = set(json!({ "requests": 1 })).await;
    assert!(budget.body["used"]["requests"].as_u64() > Some(4), "{runtime}: {budget:?}");
    let refused = prompt(stack, session, before, "say the mark").await;
    let told = stack.get(&format!("/sessions/{session}")).await.unwrap();
    assert_eq!(
        (&told.body["status"], &told.body["failure"]["stage"]),
        (&json!("completed"), &json!("budget")),
        "{runtime}: {told:?}"
    );
    let events = typed_events(stack, session).await;
    let reached = events
        .iter()
        .filter(|event| event["type"] == "session.budget" && event["state"] == "reached")
        .count();
    let end = events.iter().rfind(|event| event["type"] == "session.status_idle").unwrap();
    assert_eq!(
        (reached, &end["stop_reason"]["type"]),
        (1, &json!("budget_reached")),
        "{runtime}: {events:#?}"
    );
    set(json!({ "requests": 1000 })).await;
    prompt(stack, session, &refused, "say the mark").await.succeeded_saying(runtime, "MARK-4711");
}

async fn typed_events(stack: &Stack, session: &str) -> Vec<Value> {
    let page = stack.get(&format!("/sessions/{session}/events")).await.unwrap();
    assert_eq!(page.body["has_more"], false);
    page.body["data"].as_array().unwrap().clone()
}

/// Each request has a start and an end with what the provider reported, within its turn, and their
/// sum is what the turn used.
#[track_caller]
fn every_model_request_is_counted(runtime: &str, turns: &[Value], events: &[Value]) {
    for turn in turns {
        let of_turn: Vec<_> =
            events.iter().filter(|event| event["turn"] == turn["turn_number"]).collect();
        let starts: Vec<_> =
            of_turn.iter().filter(|event| event["type"] == "span.model_request_start").collect();
        let ends: Vec<_> =
            of_turn.iter().filter(|event| event["type"] == "span.model_request_end").collect();
        assert!(!starts.is_empty() && starts.len() == ends.len(), "{runtime}: {of_turn:#?}");
        let sum = |name: &str| {
            ends.iter().map(|end| end["model_usage"][name].as_u64().unwrap()).sum::<u64>()
        };
        assert_eq!(turn["usage"]["input_tokens"], sum("input_tokens"), "{runtime}: {of_turn:#?}");
        assert_eq!(turn["usage"]["output_tokens"], sum("output_tokens"), "{runtime}: {of_turn:#?}");
        assert!(
            ends.iter()
                .all(|end| starts.iter().any(|start| start["id"] == end["model_request_start_id"])),
            "{runtime}: {ends:#?}"
        );
        let place = |kind: &str| of_turn.iter().position(|event| event["type"] == kind).unwrap();
        let order = [
            "session.status_running",
            "span.model_request_start",
            "agent.message",
            "session.status_idle",
        ]
        .map(place);
        assert!(order.is_sorted(), "{runtime}: {of_turn:#?}");
        assert!(
            of_turn.iter().rposition(|event| event["type"] == "span.model_request_end").unwrap()
                < order[3],
            "{runtime}"
        );
    }
}

/// Whatever the CLI's protocol: the turns with their prompts, a tool and its result, an MCP
/// server's tool and its result, the answers.
#[track_caller]
fn tells_the_same_story(runtime: &str, model: &str, events: &[Value]) {
    let of_type =
        |name: &str| events.iter().filter(|event| event["type"] == name).collect::<Vec<_>>();
    let prompts: Vec<_> = of_type("session.status_running")
        .into_iter()
        .map(|event| event["prompt"].as_str().unwrap())
        .collect();
    let request = "run: echo made by $AOD_MODEL >/workspace/made; cat /workspace/made";
    assert_eq!(
        prompts,
        [request, "what was my first message?", "say the mark", "echo by MCP: seven"],
        "{runtime}"
    );
    assert!(
        of_type("session.status_idle")
            .iter()
            .all(|event| event["stop_reason"]["type"] == "end_turn"),
        "{runtime}"
    );
    let uses: Vec<_> = of_type("agent.tool_use")
        .into_iter()
        .filter(|event| event["input"].to_string().contains("made by"))
        .collect();
    assert_eq!(uses.len(), 1, "{runtime}: {events:#?}");
    let results = of_type("agent.tool_result");
    let result = results
        .iter()
        .find(|event| event["tool_use_id"] == uses[0]["id"])
        .unwrap_or_else(|| panic!("{runtime}: {events:#?}"));
    // Gemini's protocol does not tell what a command printed (docs/runtimes.md).
    let is_told =
        runtime == "gemini" || result["content"].to_string().contains(&format!("made by {model}"));
    assert!(is_told && result["is_error"] == false, "{runtime}: {result}");
    let mcp = of_type("agent.mcp_tool_use");
    assert_eq!(mcp.len(), 1, "{runtime}: {events:#?}");
    assert_eq!(
        (&mcp[0]["mcp_server_name"], &mcp[0]["name"]),
        (&json!("echo"), &json!("say")),
        "{runtime}: {mcp:?}"
    );
    let answer = of_type("agent.mcp_tool_result");
    assert_eq!(answer[0]["mcp_tool_use_id"], mcp[0]["id"], "{runtime}");
    assert!(answer[0]["content"].to_string().contains("seven by MCP"), "{runtime}: {answer:?}");
    let said: String =
        of_type("agent.message").iter().map(|event| event["content"].to_string()).collect();
    assert!(
        said.contains("Your first message was: run: echo made") && said.contains("MARK-4711"),
        "{runtime}: {said}"
    );
}

#[tokio::test]
async fn a_key_that_is_refused_fails_the_turn_in_the_clis_own_words() {
    let stack = Stack::start(MODEL).await.unwrap();
    // Of the session's own, which goes to the provider directly; and stored, which the model
    // gateway sends.
    let own = json!({ "ANTHROPIC_API_KEY": "invalid", "OPENAI_API_KEY": "invalid", "GEMINI_API_KEY": "invalid" });
    for keys in [own, json!({})] {
        if keys == json!({}) {
            for provider in ["anthropic", "openai", "google"] {
                let path = format!("/credentials/provider:{provider}");
                let stored = stack
                    .call(reqwest::Method::PUT, &path, Some(json!({ "value": "invalid" })))
                    .await
                    .unwrap();
                assert!(stored.status < 300, "{stored:?}");
            }
        }
        every_cli_is_refused(&stack, &keys, keys == json!({})).await;
    }
}

async fn every_cli_is_refused(stack: &Stack, keys: &Value, are_stored: bool) {
    for_each_agent(RUNTIMES, async |(runtime, model)| {
        let agent = json!({ "name": runtime, "model": model, "runtime": runtime });
        let agent = stack.post("/agents", agent).await.unwrap().text("id").to_owned();
        // Claude Code tries a refused key again for minutes, and says so; the model gateway tells
        // it not to.
        let tries_again = runtime == "claude" && !are_stored;
        let timeout = if tries_again { 40 } else { 600 };
        let body = json!({ "agent_id": agent, "prompt": "hello", "secret_env_vars": keys, "timeout": timeout });
        let session = stack.post("/sessions", body).await.unwrap().text("id").to_owned();
        let ended = turn(stack, &session, 0).await;
        let said = ended.output.to_lowercase();
        assert!(said.contains("api key") || said.contains("401"), "{runtime}: {}", ended.output);
        assert_eq!(ended.end["type"], if tries_again { "error" } else { "exit" }, "{runtime}: {} {}", ended.end, ended.output);
        assert_ne!(ended.end["code"], 0, "{runtime}: {} {}", ended.end, ended.output);
        let session = stack.get(&format!("/sessions/{session}")).await.unwrap();
        let told = session.body["failure"]["message"].as_str().unwrap_or_default();
        assert!(told.ends_with("the model's provider refused the API key"), "{runtime}: {told}: {}", ended.output);
    })
    .await;
}

/// An MCP server over HTTP, outside of the sandbox, that wants a header with this token.
pub async fn mcp_over_http(
    token: Arc<Mutex<String>>,
) -> (String, u16, JoinSet<std::io::Result<()>>) {
    use axum::{
        Json, extract::State, http::HeaderMap, http::StatusCode, response::IntoResponse as _,
        routing::post,
    };
    let answer = async |State(token): State<Arc<Mutex<String>>>,
                        headers: HeaderMap,
                        Json(message): Json<Value>| {
        let expected = format!("Bearer {}", token.lock().unwrap());
        if headers.get("authorization").and_then(|value| value.to_str().ok()) != Some(&expected) {
            return StatusCode::UNAUTHORIZED.into_response();
        }
        if message.get("id").is_none() {
            return StatusCode::ACCEPTED.into_response();
        }
        let result = match message["method"].as_str().unwrap() {
            "initialize" => json!({
                "protocolVersion": message["params"]["protocolVersion"],
                "capabilities": { "tools": {} },
                "serverInfo": { "name": "echo", "version": "1" },
            }),
            "tools/list" => {
                let schema = json!({ "type": "object", "properties": { "text": { "type": "string" } }, "required": ["text"] });
                json!({ "tools": [{ "name": "say", "description": "Says it again", "inputSchema": schema }] })
            }
            "tools/call" => {
                let text = format!(
                    "{} over HTTP",
                    message["params"]["arguments"]["text"].as_str().unwrap()
                );
                json!({ "content": [{ "type": "text", "text": text }] })
            }
            _ => json!({}),
        };
        Json(json!({ "jsonrpc": "2.0", "id": message["id"], "result": result })).into_response()
    };
    let router = axum::Router::new().route("/mcp", post(answer)).with_state(token);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut server = JoinSet::new();
    server.spawn(axum::serve(listener, router).into_future());
    (format!("http://{address}/mcp"), address.port(), server)
}

#[tokio::test]
async fn every_cli_calls_an_mcp_server_over_http_and_knows_its_skills() {
    let (url, port, _server) =
        mcp_over_http(Arc::new(Mutex::new("a-secret-token".to_owned()))).await;
    let stack = Stack::start(MODEL.reaching(&[port])).await.unwrap();
    for_each_agent(RUNTIMES, async |(runtime, model)| {
        let servers = json!([{ "name": "echo", "type": "url", "url": url, "headers": { "Authorization": "Bearer a-secret-token" } }]);
        let content = "Look at the sea and say what colour it has.";
        let skills = json!([{ "name": "sea-colour", "description": "Knows the colour of the sea, MARK-4711", "content": content }]);
        let agent = json!({ "name": runtime, "model": model, "runtime": runtime, "mcp_servers": servers, "skills": skills });
        let agent = stack.post("/agents", agent).await.unwrap();
        assert_eq!(agent.status, 201, "{agent:?}");
        let body = json!({ "agent_id": agent.text("id"), "prompt": "echo by MCP: seven" });
        let session = stack.post("/sessions", body).await.unwrap().text("id").to_owned();
        let first = turn(&stack, &session, 0).await;
        first.succeeded_saying(runtime, "seven over HTTP");
        // A skill's description is in what the CLI tells its model.
        prompt(&stack, &session, &first, "say the mark").await.succeeded_saying(runtime, "The mark is MARK-4711");
    })
    .await;
}

/// A model that is broken, or has had enough: the CLI says so, and the turn ends.
#[tokio::test]
async fn a_failing_model_is_reported_and_ends_the_turn() {
    // What the model gateway waits for is time that a CLI has not to tell it in.
    let stack =
        Stack::start(Options { settings: &[("AOD_MODEL_RETRIES", "1")], ..MODEL }).await.unwrap();
    for_each_agent(RUNTIMES.into_iter().flat_map(|run| [(run, "500"), (run, "429")]), async |((runtime, model), status)| {
        let agent = json!({ "name": format!("{runtime} {status}"), "model": model, "runtime": runtime });
        let agent = stack.post("/agents", agent).await.unwrap().text("id").to_owned();
        let body = json!({ "agent_id": agent, "prompt": format!("fail with {status}"), "timeout": 120 });
        let session = stack.post("/sessions", body).await.unwrap().text("id").to_owned();
        let ended = turn(&stack, &session, 0).await;
        let said = ended.output.to_lowercase();
        let told = [status, "the script says so", "overloaded", "rate limit", "quota", "retry", "high demand"]
            .iter()
            .any(|word| said.contains(word));
        assert!(told, "{runtime} {status}: {} {}", ended.end, ended.output);
        assert_ne!(ended.end["code"], 0, "{runtime} {status}: {} {}", ended.end, ended.output);
        let session = stack.get(&format!("/sessions/{session}")).await.unwrap();
        let message = session.body["failure"]["message"].as_str().unwrap();
        assert!(message.contains("the model's provider"), "{runtime} {status}: {message} {}", ended.output);
    })
    .await;
}

/// By the real installer, from a git server in GitHub's place.
#[tokio::test]
async fn every_cli_knows_a_skill_from_github() {
    let skill = "---\nname: sea-colour\ndescription: Knows the colour of the sea, MARK-815\n---\n\nLook at it.\n";
    let served = GitServer::start("o/skills", "sea-colour/SKILL.md", skill).await;
    let stack = Stack::start(MODEL.reaching(&[served.port])).await.unwrap();
    let environment = stack
        .post("/environments", json!({ "name": "e", "env_vars": served.as_github() }))
        .await
        .unwrap();
    for_each_agent(RUNTIMES, async |(runtime, model)| {
        let skills = json!([{ "type": "github", "source": "o/skills", "name": "sea-colour", "description": "the sea" }]);
        let agent = stack.post("/agents", json!({ "name": runtime, "model": model, "runtime": runtime, "skills": skills })).await.unwrap();
        assert_eq!(agent.status, 201, "{agent:?}");
        let body = json!({ "agent_id": agent.text("id"), "environment_id": environment.text("id"), "prompt": "say the mark" });
        let session = stack.post("/sessions", body).await.unwrap().text("id").to_owned();
        turn(&stack, &session, 0).await.succeeded_saying(runtime, "The mark is MARK-815");
    })
    .await;
}

/// One hangs, one is not a program, one exits at once, and one has no server: the turn continues
/// and reports which are missing.
#[tokio::test]
async fn an_mcp_server_that_does_not_start_is_reported_and_does_not_delay_the_turn() {
    let stack = Stack::start(MODEL).await.unwrap();
    let environment = stack
        .post("/environments", json!({ "name": "e", "setup_script": MCP_SERVER }))
        .await
        .unwrap()
        .text("id")
        .to_owned();
    for_each_agent(RUNTIMES, async |(runtime, model)| {
        let stdio = |name: &str, command: &str, args: &[&str]| json!({ "name": name, "type": "stdio", "command": command, "args": args });
        let mut echo = stdio("echo", "python3", &["/workspace/echo.py"]);
        echo["env"] = json!({ "SUFFIX": "by MCP" });
        let servers =
            json!([stdio("hangs", "sleep", &["4711"]), stdio("missing", "no-such-program", &[]), stdio("ends", "false", &[]), echo,]);
        let agent = json!({ "name": runtime, "model": model, "runtime": runtime, "mcp_servers": servers });
        let agent = stack.post("/agents", agent).await.unwrap();
        let body = json!({ "agent_id": agent.text("id"), "prompt": "run: echo ran", "environment_id": environment });
        let session = stack.post("/sessions", body).await.unwrap().text("id").to_owned();
        let first = turn(&stack, &session, 0).await;
        first.succeeded_saying(runtime, "ran");
        // One that works is there beside them.
        prompt(&stack, &session, &first, "echo by MCP: seven").await.succeeded_saying(runtime, "seven by MCP");
        let events = typed_events(&stack, &session).await;
        let errors: Vec<&Value> = events.iter().filter(|event| event["type"] == "session.error").collect();
        let names: &[&str] = match runtime {
            // Its servers are known by their commands.
            "gemini" => &["\"sleep 4711\"", "\"no-such-program\"", "\"false\""],
            "opencode" => &["hangs", "missing", "ends"],
            // These begin a turn without the servers that are slow: such a one may fail after the
            // turn's end.
            _ => &["missing", "ends"],
        };
        for name in names {
            let told = errors.iter().find(|event| event["error"]["message"].as_str().unwrap().contains(name));
            let told = told.unwrap_or_else(|| panic!("{runtime}: {name} is not told of: {errors:#?}"));
            assert_eq!(told["error"]["type"], "mcp_connection_failed_error", "{runtime}: {told}");
        }
    })
    .await;
}

/// Also beside a system prompt: nothing is put in front of a prompt.
#[tokio::test]
async fn a_slash_command_is_one_for_a_cli_that_has_them() {
    let stack = Stack::start(MODEL).await.unwrap();
    let commands = r#"mkdir -p ~/.claude/commands ~/.gemini/commands
        echo 'say the mark of $ARGUMENTS' >~/.claude/commands/tell.md
        printf 'prompt = "say the mark of {{args}}"\n' >~/.gemini/commands/tell.toml"#;
    let environment = stack
        .post("/environments", json!({ "name": "e", "setup_script": commands }))
        .await
        .unwrap()
        .text("id")
        .to_owned();
    for_each_agent(["claude", "gemini"], async |runtime| {
        let model = RUNTIMES.iter().find(|(name, _)| *name == runtime).unwrap().1;
        let agent = json!({ "name": runtime, "model": model, "runtime": runtime, "system": "Be brief. MARK-4711" });
        let agent = stack.post("/agents", agent).await.unwrap();
        let body = json!({ "agent_id": agent.text("id"), "prompt": "/tell today", "environment_id": environment });
        let session = stack.post("/sessions", body).await.unwrap().text("id").to_owned();
        let first = turn(&stack, &session, 0).await;
        // Gemini CLI has commands of users in its terminal alone: what it gets is what was typed.
        let said = if runtime == "gemini" { "You said: /tell today" } else { "The mark is MARK-4711" };
        first.succeeded_saying(runtime, said);
        // A path is no command, and is not changed on its way.
        let second = prompt(&stack, &session, &first, "what was my first message? /tell").await;
        second.succeeded_saying(runtime, "Your first message was:");
    })
    .await;
}

/// gVisor: no `sudo`, and fewer system calls than Linux.
#[tokio::test]
async fn turns_run_in_a_sandbox_with_a_kernel_of_its_own() {
    if !testkit::has_gvisor() {
        return;
    }
    let stack =
        Stack::start(MODEL.with("LOCAL_SPRITES_RUNTIME", "runsc".to_owned())).await.unwrap();
    let session = stack.session("shell", "uname -r; echo one > kept").await.unwrap();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let output: String = events.iter().filter_map(|event| event["data"].as_str()).collect();
    assert_eq!(output, "4.4.0\n", "{:?}", events.last());
    let prompt = json!({ "prompt": "cat kept; exit 3" });
    let answer = stack.post(&format!("/sessions/{session}/prompt"), prompt).await.unwrap();
    assert_eq!(answer.status, 202, "{answer:?}");
    let since = events.last().unwrap()["id"].as_u64().unwrap_or_default();
    let events = stack.stream(&session, since).await.unwrap().all().await.unwrap();
    let output: String = events.iter().filter_map(|event| event["data"].as_str()).collect();
    assert_eq!(output, "one\n");
    assert_eq!(events.last().unwrap()["code"], 3);
}
