//! Gemini CLI: the Agent Client Protocol, version 1: JSON-RPC, one object per line.
//!
//! The protocol reports little about tools: a call that needs permission first appears as a
//! request, and a command's output is missing.

use std::collections::HashMap;

use contract::host::{
    AgentError, AgentMessage, Capabilities, Delta, FileChange, ModelUsage, Plan, PlanEntry, Spec,
    Thinking, ToolResult, ToolUse, agent_error::Retry, decision::Verdict, event,
    turn_ended::Reason,
};
use serde_json::{Value, json};

use super::{Adapter, Ask, CONVERSES, Effect, Launch, Out, Runtime, Stdio, json::*};
use crate::{custom_tools, prepare};

pub const RUNTIME: Runtime = Runtime {
    name: "gemini",
    version: "0.61.0",
    protocol: "Agent Client Protocol",
    tools: "the CLI's own (`run_shell_command`, ...)",
    gaps: "no output of commands; inputs of tools only as titles and diffs; an interrupted message is left out of the conversation",
    capabilities: Capabilities { steer: false, deny_with_message: false, fork: false, ..CONVERSES },
    new: |spec| Box::new(Gemini { spec: spec.clone(), ..Gemini::default() }),
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Request {
    Initialize,
    New,
    Load,
    Prompt,
}

#[derive(Default)]
struct Gemini {
    spec: Spec,
    cwd: String,
    resume: Option<String>,
    last_request: u64,
    requests: HashMap<u64, Request>,
    session: String,
    /// The CLI repeats a conversation that it loads: these messages are skipped.
    loading: bool,
    texts: u64,
    /// What of a message or thought has come, and whether it is a thought.
    chunks: Option<(String, bool)>,
    /// Ids of the options of each open request: once, always, reject.
    asks: HashMap<String, [Option<String>; 3]>,
}

impl Gemini {
    fn request(&mut self, kind: Request, method: &str, params: Value, out: &mut Out) {
        self.last_request += 1;
        self.requests.insert(self.last_request, kind);
        let line = json!({ "jsonrpc": "2.0", "id": self.last_request, "method": method, "params": params });
        out.push(Effect::Send(line.to_string()));
    }

    fn open_session(&mut self, out: &mut Out) {
        let server = |(command, args)| json!({ "name": custom_tools::SERVER, "command": command, "args": args, "env": [] });
        let servers: Vec<Value> =
            self.spec.tools_command.split_first().map(server).into_iter().collect();
        match self.resume.clone() {
            Some(session) => {
                self.loading = true;
                let params =
                    json!({ "sessionId": session, "cwd": self.cwd, "mcpServers": servers });
                self.request(Request::Load, "session/load", params, out);
            }
            None => self.request(
                Request::New,
                "session/new",
                json!({ "cwd": self.cwd, "mcpServers": servers }),
                out,
            ),
        }
    }

    fn reply(&mut self, line: &Value, out: &mut Out) {
        let Some(kind) =
            line.get("id").and_then(Value::as_u64).and_then(|id| self.requests.remove(&id))
        else {
            return;
        };
        let error = line.get("error");
        match (kind, error) {
            (Request::Initialize, _) => self.open_session(out),
            (Request::New, None) => self.opened(text(line, "/result/sessionId").to_owned(), out),
            (Request::Load, None) => {
                let session = self.resume.clone().unwrap_or_default();
                self.opened(session, out);
            }
            (Request::Load, Some(error)) => {
                self.loading = false;
                self.resume = None;
                out.event(event::Kind::Error(AgentError {
                    kind: "unknown_error".to_owned(),
                    message: format!(
                        "The conversation could not be loaded, and a new one begins: {}",
                        text(error, "/message")
                    ),
                    retry: Retry::Retrying.into(),
                }));
                self.open_session(out);
            }
            (Request::New, Some(error)) => {
                out.event(event::Kind::Error(AgentError {
                    kind: "unknown_error".to_owned(),
                    message: format!(
                        "Gemini could not open a conversation: {}",
                        text(error, "/message")
                    ),
                    retry: Retry::Exhausted.into(),
                }));
                out.push(Effect::Unusable);
            }
            (Request::Prompt, None) => {
                self.flush(out);
                let result = line.get("result").unwrap_or(&Value::Null);
                let reason = match text(result, "/stopReason") {
                    "end_turn" => Reason::Completed,
                    "cancelled" => Reason::Interrupted,
                    "max_tokens" | "max_turn_requests" => Reason::Limit,
                    "refusal" => Reason::Refused,
                    _ => Reason::Failed,
                };
                let message =
                    if reason == Reason::Completed { "" } else { text(result, "/stopReason") };
                out.push(Effect::TurnEnded {
                    reason,
                    message: message.to_owned(),
                    usage: usage(result),
                });
            }
            (Request::Prompt, Some(error)) => {
                self.flush(out);
                // The code is the provider's HTTP status, the message its body.
                let code = error.get("code").map(Value::to_string).unwrap_or_default();
                let message = match text(error, "/data/details") {
                    "" => text(error, "/message"),
                    details => details,
                };
                let error = AgentError {
                    kind: error_kind(&code).to_owned(),
                    message: message.to_owned(),
                    retry: Retry::Exhausted.into(),
                };
                out.push(Effect::TurnEnded {
                    reason: Reason::Failed,
                    message: error.message.clone(),
                    usage: None,
                });
                out.0.insert(
                    out.0.len() - 1,
                    Effect::Event { parent: None, kind: event::Kind::Error(error) },
                );
            }
        }
    }

    fn opened(&mut self, session: String, out: &mut Out) {
        self.loading = false;
        self.session.clone_from(&session);
        out.push(Effect::Conversation { id: session, model: self.spec.model.clone() });
        out.push(Effect::Ready);
    }

    /// What came in chunks is whole when something else follows.
    fn flush(&mut self, out: &mut Out) {
        match self.chunks.take() {
            Some((text, true)) => out.event(event::Kind::Thinking(Thinking { text })),
            Some((text, false)) if !text.is_empty() => {
                out.event(event::Kind::Message(AgentMessage { text, aborted: false }))
            }
            _ => {}
        }
    }

    fn chunk(&mut self, content: &str, thinking: bool, out: &mut Out) {
        if self.chunks.as_ref().is_none_or(|(_, thought)| *thought != thinking) {
            self.flush(out);
            self.texts += 1;
            self.chunks = Some((String::new(), thinking));
        }
        if let Some((text, _)) = &mut self.chunks {
            text.push_str(content);
        }
        out.event(event::Kind::Delta(Delta {
            text: self.texts,
            content: content.to_owned(),
            thinking,
        }));
    }

    fn update(&mut self, update: &Value, out: &mut Out) {
        if self.loading {
            return;
        }
        let kind = text(update, "/sessionUpdate");
        match kind {
            "agent_message_chunk" => self.chunk(text(update, "/content/text"), false, out),
            "agent_thought_chunk" => self.chunk(text(update, "/content/text"), true, out),
            "tool_call" | "tool_call_update" => {
                self.flush(out);
                let call = text(update, "/toolCallId").to_owned();
                if kind == "tool_call" {
                    out.push(Effect::ToolUse { parent: None, tool: tool_use(update) });
                }
                let status = text(update, "/status");
                if matches!(status, "completed" | "failed") {
                    let result = ToolResult {
                        content: content(update.get("content")),
                        is_error: status == "failed",
                        changes: changes(update),
                        ..ToolResult::default()
                    };
                    out.push(Effect::ToolResult { call, result });
                }
            }
            "plan" => {
                self.flush(out);
                let entries = array(update, "/entries").iter();
                let entries = entries.map(|entry| PlanEntry {
                    text: text(entry, "/content").to_owned(),
                    status: text(entry, "/status").to_owned(),
                });
                out.event(event::Kind::Plan(Plan { entries: entries.collect() }));
            }
            _ => {}
        }
    }

    fn server_request(&mut self, id: &Value, method: &str, params: &Value, out: &mut Out) {
        if method != "session/request_permission" {
            let error = json!({ "code": -32601, "message": format!("the agent host does not answer {method}") });
            out.push(Effect::Send(
                json!({ "jsonrpc": "2.0", "id": id, "error": error }).to_string(),
            ));
            return;
        }
        self.flush(out);
        let call = params.get("toolCall").unwrap_or(&Value::Null);
        let option = |kind: &str| {
            let options = array(params, "/options").iter();
            options
                .into_iter()
                .find(|option| text(option, "/kind") == kind)
                .map(|option| text(option, "/optionId").to_owned())
        };
        let key = id.to_string();
        self.asks.insert(
            key.clone(),
            [option("allow_once"), option("allow_always"), option("reject_once")],
        );
        let tool = tool_use(call);
        let diff =
            changes(call).into_iter().map(|change| change.diff).collect::<Vec<_>>().join("\n");
        out.push(Effect::Ask(Ask {
            key,
            call: tool.call_id,
            tool: tool.name,
            mcp_server: tool.mcp_server,
            input_json: tool.input_json,
            diff,
            ..Ask::default()
        }));
    }

    fn answer(key: &str, outcome: &Value, out: &mut Out) {
        let id: Value = serde_json::from_str(key).unwrap_or_default();
        out.push(Effect::Send(
            json!({ "jsonrpc": "2.0", "id": id, "result": { "outcome": outcome } }).to_string(),
        ));
    }
}

/// All that the protocol says of a call: its id begins with the tool's name, its title is the
/// command or the file.
fn tool_use(call: &Value) -> ToolUse {
    let (id, title) = (text(call, "/toolCallId"), text(call, "/title"));
    let name = id.split("__").next().unwrap_or_default();
    let name = name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '-');
    // "tool (server MCP Server)"
    let mcp = title.strip_suffix(" MCP Server)").and_then(|title| title.rsplit_once(" ("));
    let key = if text(call, "/kind") == "execute" { "command" } else { "title" };
    let input = call
        .get("rawInput")
        .filter(|input| !input.is_null())
        .cloned()
        .unwrap_or_else(|| json!({ key: title }));
    ToolUse {
        name: if name.is_empty() { text(call, "/kind").to_owned() } else { name.to_owned() },
        mcp_server: mcp.map(|(_, server)| server.to_owned()).unwrap_or_default(),
        input_json: input.to_string(),
        call_id: id.to_owned(),
        evaluation: 0,
    }
}

fn changes(call: &Value) -> Vec<FileChange> {
    let diffs = array(call, "/content").iter().filter(|block| text(block, "/type") == "diff");
    let lines = |sign: char, text: &str| {
        text.lines().map(|line| format!("{sign}{line}\n")).collect::<String>()
    };
    let change = |diff: &Value| FileChange {
        path: text(diff, "/path").to_owned(),
        diff: lines('-', text(diff, "/oldText")) + &lines('+', text(diff, "/newText")),
    };
    diffs.map(change).collect()
}

fn usage(result: &Value) -> Option<ModelUsage> {
    let counts = result.pointer("/_meta/quota/token_count")?;
    Some(ModelUsage {
        input_tokens: number(counts, "/input_tokens"),
        output_tokens: number(counts, "/output_tokens"),
        model: array(result, "/_meta/quota/model_usage")
            .first()
            .map(|model| text(model, "/model").to_owned())
            .unwrap_or_default(),
        ..ModelUsage::default()
    })
}

impl Adapter for Gemini {
    fn launch(&mut self, conversation: Option<&str>, _: &str) -> Launch {
        *self = Self {
            spec: std::mem::take(&mut self.spec),
            resume: conversation.map(str::to_owned),
            ..Self::default()
        };
        let mut argv: Vec<String> = ["gemini", "--acp", "--skip-trust"].map(str::to_owned).into();
        if !self.spec.model.is_empty() {
            argv.extend(["--model".to_owned(), self.spec.model.clone()]);
        }
        let mut prepare = Vec::new();
        if !self.spec.system.is_empty() {
            prepare.push(prepare::Action::Write {
                path: ".gemini/GEMINI.md".to_owned(),
                text: self.spec.system.clone(),
            });
        }
        // Loading a conversation begins a file of the current minute, and destroys what it finds
        // there.
        if let Some(id) = conversation.and_then(|id| id.get(..8)) {
            prepare.push(prepare::Action::KeepLargest {
                folder: ".gemini/tmp".to_owned(),
                suffix: format!("-{id}.jsonl"),
                name: format!("session-2020-01-01T00-00-{id}.jsonl"),
            });
        }
        // Its second process costs as much memory again.
        let env = vec![("GEMINI_CLI_NO_RELAUNCH".to_owned(), "true".to_owned())];
        Launch { argv, script: None, env, stdio: Stdio::Protocol, prepare, belongs_to_turns: true }
    }

    fn started(&mut self, cwd: &str, out: &mut Out) {
        cwd.clone_into(&mut self.cwd);
        let capabilities =
            json!({ "fs": { "readTextFile": false, "writeTextFile": false }, "terminal": false });
        self.request(
            Request::Initialize,
            "initialize",
            json!({ "protocolVersion": 1, "clientCapabilities": capabilities }),
            out,
        );
    }

    fn message(&mut self, text: &str, out: &mut Out) {
        let params =
            json!({ "sessionId": self.session, "prompt": [{ "type": "text", "text": text }] });
        self.request(Request::Prompt, "session/prompt", params, out);
    }

    fn interrupt(&mut self, out: &mut Out) -> bool {
        let line = json!({ "jsonrpc": "2.0", "method": "session/cancel", "params": { "sessionId": self.session } });
        out.push(Effect::Send(line.to_string()));
        // The turn ends only when its request is answered.
        for (key, _) in self.asks.drain() {
            Self::answer(&key, &json!({ "outcome": "cancelled" }), out);
            out.push(Effect::Unask { key });
        }
        true
    }

    fn decide(&mut self, key: &str, verdict: Verdict, _: &str, out: &mut Out) {
        let [once, always, reject] = self.asks.remove(key).unwrap_or_default();
        let option = match verdict {
            Verdict::Allow => once,
            Verdict::AllowForSession => always.or(once),
            Verdict::Deny | Verdict::Unspecified => reject,
        };
        let outcome = match option {
            Some(option) => json!({ "outcome": "selected", "optionId": option }),
            None => json!({ "outcome": "cancelled" }),
        };
        Self::answer(key, &outcome, out);
    }

    fn line(&mut self, line: &[u8], out: &mut Out) {
        let Ok(line) = serde_json::from_slice::<Value>(line) else { return };
        let params = line.get("params").unwrap_or(&Value::Null);
        match (line.get("id"), line.get("method").and_then(Value::as_str)) {
            (Some(id), Some(method)) => self.server_request(id, method, params, out),
            (Some(_), None) => self.reply(&line, out),
            (None, Some("session/update")) => {
                self.update(params.get("update").unwrap_or(&Value::Null), out)
            }
            (None, _) => {}
        }
    }
}
