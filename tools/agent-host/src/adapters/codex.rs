//! Codex: `codex app-server`, JSON-RPC without its version field, one object per line. The server
//! asks for approvals with ids of its own.

use std::collections::HashMap;

use contract::host::{
    AgentError, AgentMessage, Capabilities, ContextCompacted, Delta, Evaluation, FileChange,
    ModelRequestEnded, ModelUsage, Plan, PlanEntry, Spec, Thinking, ToolResult, ToolUse,
    agent_error::Retry, capabilities, decision::Verdict, event, turn_ended::Reason,
};
use serde_json::{Value, json};

use super::{Adapter, Ask, CONVERSES, Effect, Launch, Out, Runtime, Stdio, add_usage, json::*};
use crate::{custom_tools, prepare};

pub const RUNTIME: Runtime = Runtime {
    name: "codex",
    version: "0.169.0",
    protocol: "JSON-RPC (`app-server`)",
    tools: "`shell`, `apply_patch`, `web_search`; MCP: `mcp__server__tool`",
    gaps: "output of a command is cut at 1 MiB; a denial's reason is sent as a message that joins the turn",
    capabilities: Capabilities { usage: capabilities::Usage::PerRequest as i32, ..CONVERSES },
    new: |spec| Box::new(Codex { spec: spec.clone(), ..Codex::default() }),
};

/// Tool names in events and rules.
const SHELL: &str = "shell";
const PATCH: &str = "apply_patch";
const ITEMS_MAX: usize = 1000;

/// What a request of ours was for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Request {
    Initialize,
    Start,
    Resume,
    Turn,
    Clean,
    Other,
}

#[derive(Default)]
struct Codex {
    spec: Spec,
    resume: Option<String>,
    last_request: u64,
    requests: HashMap<u64, Request>,
    thread: String,
    turn: Option<String>,
    interrupt_wanted: bool,
    /// An end that waits until the commands of an interrupted turn are ended.
    ending: Option<(Reason, String)>,
    usage: Option<ModelUsage>,
    /// Changes of files by item, for the request that follows.
    changes: HashMap<String, Vec<FileChange>>,
    /// Requests that are answered as elicitations.
    elicitations: Vec<String>,
    /// Calls of MCP tools that run: the item, what the call is known by, the tool. An approval does
    /// not name its item, and either may come first.
    mcp_calls: Vec<McpCall>,
    texts: HashMap<String, u64>,
}

struct McpCall {
    item: Option<String>,
    call: String,
    tool: String,
}

impl Codex {
    /// What an item's call is known by.
    fn mcp_item(&mut self, item: &str, tool: &str) -> String {
        let known = self.mcp_calls.iter().position(|call| call.item.as_deref() == Some(item));
        let asked =
            || self.mcp_calls.iter().position(|call| call.item.is_none() && call.tool == tool);
        if let Some(call) = known.or_else(asked).and_then(|index| self.mcp_calls.get_mut(index)) {
            call.item = Some(item.to_owned());
            return call.call.clone();
        }
        if self.mcp_calls.len() < ITEMS_MAX {
            self.mcp_calls.push(McpCall {
                item: Some(item.to_owned()),
                call: item.to_owned(),
                tool: tool.to_owned(),
            });
        }
        item.to_owned()
    }

    /// Which call an approval is about.
    fn mcp_approval(&mut self, key: &str, tool: &str) -> String {
        if let Some(call) = self.mcp_calls.iter().rev().find(|call| call.tool == tool) {
            return call.call.clone();
        }
        let call = format!("elicitation-{key}");
        if self.mcp_calls.len() < ITEMS_MAX {
            self.mcp_calls.push(McpCall { item: None, call: call.clone(), tool: tool.to_owned() });
        }
        call
    }

    fn request(&mut self, kind: Request, method: &str, params: Value, out: &mut Out) {
        self.last_request += 1;
        self.requests.insert(self.last_request, kind);
        out.push(Effect::Send(
            json!({ "id": self.last_request, "method": method, "params": params }).to_string(),
        ));
    }

    /// What a thread runs under, in its own words.
    fn settings(&self) -> Value {
        let permissions = self.spec.permissions.clone().unwrap_or_default();
        let decides =
            |evaluation: Evaluation| matches!(evaluation, Evaluation::Ask | Evaluation::Deny);
        let asks = permissions.rules.iter().any(|rule| decides(rule.evaluation()))
            || decides(permissions.otherwise());
        // Without any policy it refuses commands like `rm -rf` by itself: such requests are
        // answered by the session's rules.
        let policy = if asks { "untrusted" } else { "on-request" };
        let mut settings = json!({ "approvalPolicy": policy, "sandbox": "danger-full-access" });
        if let Some(settings) = settings.as_object_mut() {
            for (name, value) in
                [("model", &self.spec.model), ("developerInstructions", &self.spec.system)]
            {
                if !value.is_empty() {
                    settings.insert(name.to_owned(), value.as_str().into());
                }
            }
        }
        settings
    }

    fn open_thread(&mut self, out: &mut Out) {
        let mut params = self.settings();
        match (self.resume.clone(), params.as_object_mut()) {
            (Some(thread), Some(fields)) => {
                fields.insert("threadId".to_owned(), thread.into());
                fields.insert("excludeTurns".to_owned(), true.into());
                self.request(Request::Resume, "thread/resume", params, out);
            }
            _ => self.request(Request::Start, "thread/start", params, out),
        }
    }

    fn reply(&mut self, line: &Value, out: &mut Out) {
        let Some(kind) =
            line.get("id").and_then(Value::as_u64).and_then(|id| self.requests.remove(&id))
        else {
            return;
        };
        let failed = line.get("error").is_some();
        match kind {
            Request::Initialize => {
                out.push(Effect::Send(json!({ "method": "initialized" }).to_string()));
                self.open_thread(out);
            }
            Request::Start | Request::Resume if !failed => {
                self.thread = text(line, "/result/thread/id").to_owned();
                let model = text(line, "/result/model").to_owned();
                out.push(Effect::Conversation { id: self.thread.clone(), model });
                out.push(Effect::Ready);
            }
            // Killed before anything was written: there is nothing to resume.
            Request::Resume if text(line, "/error/message").contains("no rollout found") => {
                self.resume = None;
                self.open_thread(out);
            }
            // The turn cannot begin; without it the process has no use, and the host takes its exit
            // for the turn's end.
            Request::Start | Request::Resume => self.fail(line, out),
            Request::Turn if failed => {
                out.push(Effect::TurnEnded {
                    reason: Reason::Failed,
                    message: text(line, "/error/message").to_owned(),
                    usage: None,
                });
            }
            Request::Turn => self.turn_is(text(line, "/result/turn/id"), out),
            Request::Clean => self.end_turn(out),
            Request::Other => {}
        }
    }

    fn fail(&mut self, line: &Value, out: &mut Out) {
        out.event(event::Kind::Error(AgentError {
            kind: "unknown_error".to_owned(),
            message: format!(
                "Codex could not open the conversation: {}",
                text(line, "/error/message")
            ),
            retry: Retry::Exhausted.into(),
        }));
        out.push(Effect::Unusable);
    }

    fn turn_is(&mut self, turn: &str, out: &mut Out) {
        if !turn.is_empty() {
            self.turn = Some(turn.to_owned());
            if std::mem::take(&mut self.interrupt_wanted) {
                self.interrupt(out);
            }
        }
    }

    fn end_turn(&mut self, out: &mut Out) {
        if let Some((reason, message)) = self.ending.take() {
            out.push(Effect::TurnEnded { reason, message, usage: self.usage.take() });
        }
    }

    fn notification(&mut self, method: &str, params: &Value, out: &mut Out) {
        match method {
            "mcpServer/startupStatus/updated" if text(params, "/status") == "failed" => {
                let login = text(params, "/failureReason") == "reauthenticationRequired";
                out.event(mcp_failed(text(params, "/name"), text(params, "/error"), login));
            }
            "turn/started" => self.turn_is(text(params, "/turn/id"), out),
            "item/started" => self.item_started(params.get("item").unwrap_or(&Value::Null), out),
            "item/completed" => {
                self.item_completed(params.get("item").unwrap_or(&Value::Null), out)
            }
            "item/agentMessage/delta" | "item/reasoning/summaryTextDelta" => {
                let next = self.texts.len() as u64 + 1;
                let number = *self.texts.entry(text(params, "/itemId").to_owned()).or_insert(next);
                let content = text(params, "/delta").to_owned();
                out.event(event::Kind::Delta(Delta {
                    text: number,
                    content,
                    thinking: method == "item/reasoning/summaryTextDelta",
                }));
            }
            "turn/plan/updated" => {
                let entries = array(params, "/plan").iter().map(|entry| PlanEntry {
                    text: text(entry, "/step").to_owned(),
                    status: match text(entry, "/status") {
                        "inProgress" => "in_progress",
                        status => status,
                    }
                    .to_owned(),
                });
                out.event(event::Kind::Plan(Plan { entries: entries.collect() }));
            }
            "thread/tokenUsage/updated" => {
                let usage = usage(
                    params.pointer("/tokenUsage/last").unwrap_or(&Value::Null),
                    &self.spec.model,
                );
                out.event(event::Kind::ModelRequestEnded(ModelRequestEnded {
                    usage: Some(usage.clone()),
                }));
                add_usage(self.usage.get_or_insert_default(), &usage);
            }
            "error" => {
                let retrying = params.get("willRetry").and_then(Value::as_bool) == Some(true);
                let status = status(params.pointer("/error/codexErrorInfo"));
                out.event(event::Kind::Error(AgentError {
                    kind: error_kind(&status).to_owned(),
                    message: text(params, "/error/message").to_owned(),
                    retry: if retrying { Retry::Retrying } else { Retry::Exhausted }.into(),
                }));
            }
            "serverRequest/resolved" => {
                let key = params.get("requestId").map(Value::to_string).unwrap_or_default();
                self.elicitations.retain(|open| *open != key);
                out.push(Effect::Unask { key });
            }
            "turn/completed" => self.turn_completed(params, out),
            _ => {}
        }
    }

    fn turn_completed(&mut self, params: &Value, out: &mut Out) {
        let turn = text(params, "/turn/id");
        if self.turn.as_deref().is_some_and(|running| running != turn) {
            return;
        }
        self.turn = None;
        self.interrupt_wanted = false;
        let message = text(params, "/turn/error/message").to_owned();
        let info = params.pointer("/turn/error/codexErrorInfo");
        let reason = match (text(params, "/turn/status"), info.and_then(Value::as_str)) {
            ("completed", _) => Reason::Completed,
            ("interrupted", _) => Reason::Interrupted,
            (
                "failed",
                Some("contextWindowExceeded" | "sessionBudgetExceeded" | "usageLimitExceeded"),
            ) => Reason::Limit,
            ("failed", _) => Reason::Failed,
            _ => return,
        };
        self.ending = Some((reason, message));
        if reason == Reason::Completed {
            self.end_turn(out);
        } else {
            // An interrupted turn's commands keep running until they are told to end.
            let thread = self.thread.clone();
            self.request(
                Request::Clean,
                "thread/backgroundTerminals/clean",
                json!({ "threadId": thread }),
                out,
            );
        }
    }

    fn item_started(&mut self, item: &Value, out: &mut Out) {
        let mut call_id = text(item, "/id").to_owned();
        let (name, server, input) = match text(item, "/type") {
            "commandExecution" => (
                SHELL.to_owned(),
                "",
                json!({ "command": command(text(item, "/command")), "cwd": text(item, "/cwd") }),
            ),
            "fileChange" => {
                let changes = changes(item);
                let paths: Vec<&str> = changes.iter().map(|change| change.path.as_str()).collect();
                let input = json!({ "paths": paths });
                if self.changes.len() < ITEMS_MAX {
                    self.changes.insert(text(item, "/id").to_owned(), changes);
                }
                (PATCH.to_owned(), "", input)
            }
            "mcpToolCall" => {
                let server = text(item, "/server");
                let tool = mcp_tool(server, text(item, "/tool"));
                call_id = self.mcp_item(&call_id, &tool);
                (tool, server, item.get("arguments").cloned().unwrap_or_default())
            }
            "webSearch" => ("web_search".to_owned(), "", json!({ "query": text(item, "/query") })),
            _ => return,
        };
        let tool = ToolUse {
            name,
            mcp_server: server.to_owned(),
            input_json: input.to_string(),
            call_id,
            evaluation: 0,
        };
        out.push(Effect::ToolUse { parent: None, tool });
    }

    fn item_completed(&mut self, item: &Value, out: &mut Out) {
        let mut call = text(item, "/id").to_owned();
        let failed = matches!(text(item, "/status"), "failed" | "declined");
        let result = match text(item, "/type") {
            "agentMessage" => {
                return out.event(event::Kind::Message(AgentMessage {
                    text: text(item, "/text").to_owned(),
                    aborted: false,
                }));
            }
            "reasoning" => {
                let summary: Vec<&str> =
                    array(item, "/summary").iter().filter_map(Value::as_str).collect();
                return out.event(event::Kind::Thinking(Thinking { text: summary.join("\n") }));
            }
            "contextCompaction" => {
                return out.event(event::Kind::ContextCompacted(ContextCompacted {}));
            }
            "commandExecution" => {
                let exit_code = item
                    .get("exitCode")
                    .and_then(Value::as_i64)
                    .and_then(|code| i32::try_from(code).ok());
                let content = text(item, "/aggregatedOutput").to_owned();
                ToolResult {
                    content,
                    is_error: failed || exit_code.is_some_and(|code| code != 0),
                    exit_code,
                    ..ToolResult::default()
                }
            }
            "fileChange" => {
                self.changes.remove(&call);
                ToolResult { is_error: failed, changes: changes(item), ..ToolResult::default() }
            }
            "mcpToolCall" => {
                let error = text(item, "/error/message");
                let content = if error.is_empty() {
                    content(item.pointer("/result/content"))
                } else {
                    error.to_owned()
                };
                ToolResult {
                    content,
                    is_error: failed || !error.is_empty(),
                    ..ToolResult::default()
                }
            }
            "webSearch" => ToolResult::default(),
            _ => return,
        };
        // A command that was refused or so short that nothing said it began.
        self.item_started(item, out);
        if let Some(index) =
            self.mcp_calls.iter().position(|known| known.item.as_ref() == Some(&call))
        {
            call = self.mcp_calls.swap_remove(index).call;
        }
        out.push(Effect::ToolResult { call, result });
    }

    fn server_request(&mut self, id: &Value, method: &str, params: &Value, out: &mut Out) {
        let key = id.to_string();
        let call = text(params, "/itemId").to_owned();
        let reason = text(params, "/reason").to_owned();
        let ask = match method {
            "item/commandExecution/requestApproval" => {
                let input = json!({ "command": command(text(params, "/command")), "cwd": text(params, "/cwd") });
                Ask {
                    key,
                    call,
                    tool: SHELL.to_owned(),
                    input_json: input.to_string(),
                    reason,
                    ..Ask::default()
                }
            }
            "item/fileChange/requestApproval" => {
                let changes = self.changes.get(&call).cloned().unwrap_or_default();
                let paths: Vec<&str> = changes.iter().map(|change| change.path.as_str()).collect();
                let diff = changes
                    .iter()
                    .map(|change| change.diff.as_str())
                    .collect::<Vec<_>>()
                    .join("\n");
                let input_json = json!({ "paths": paths }).to_string();
                Ask {
                    key,
                    call,
                    tool: PATCH.to_owned(),
                    input_json,
                    diff,
                    reason,
                    ..Ask::default()
                }
            }
            "mcpServer/elicitation/request"
                if text(params, "/_meta/codex_approval_kind") == "mcp_tool_call" =>
            {
                self.elicitations.push(key.clone());
                let server = text(params, "/serverName");
                let input = params.pointer("/_meta/tool_params").cloned().unwrap_or_default();
                let tool = mcp_tool(server, text(params, "/_meta/tool_name"));
                Ask {
                    call: self.mcp_approval(&key, &tool),
                    key,
                    tool,
                    mcp_server: server.to_owned(),
                    input_json: input.to_string(),
                    reason: text(params, "/message").to_owned(),
                    ..Ask::default()
                }
            }
            _ => {
                let error = json!({ "code": -32601, "message": format!("the agent host does not answer {method}") });
                out.push(Effect::Send(json!({ "id": id, "error": error }).to_string()));
                return;
            }
        };
        out.push(Effect::Ask(ask));
    }
}

fn mcp_tool(server: &str, tool: &str) -> String {
    format!("mcp__{server}__{tool}")
}

fn changes(item: &Value) -> Vec<FileChange> {
    let change = |change: &Value| FileChange {
        path: text(change, "/path").to_owned(),
        diff: text(change, "/diff").to_owned(),
    };
    array(item, "/changes").iter().map(change).collect()
}

/// The command without the shell around it.
fn command(line: &str) -> String {
    let Some((_, script)) = line.split_once("bash -lc ") else { return line.to_owned() };
    for quote in ['\'', '"'] {
        if let Some(inner) = script.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote)) {
            return inner.replace(r"'\''", "'");
        }
    }
    script.to_owned()
}

fn status(info: Option<&Value>) -> String {
    match info {
        Some(Value::Object(object)) => object
            .values()
            .next()
            .map(|value| number(value, "/httpStatusCode"))
            .filter(|status| *status > 0)
            .map_or_else(String::new, |status| status.to_string()),
        Some(Value::String(name)) if name == "serverOverloaded" => "503".to_owned(),
        Some(Value::String(_)) => "500".to_owned(),
        _ => String::new(),
    }
}

/// It counts cached tokens as input as well.
fn usage(last: &Value, model: &str) -> ModelUsage {
    let cached = number(last, "/cachedInputTokens");
    ModelUsage {
        input_tokens: number(last, "/inputTokens").saturating_sub(cached),
        output_tokens: number(last, "/outputTokens"),
        cache_read_tokens: cached,
        reasoning_tokens: number(last, "/reasoningOutputTokens"),
        model: model.to_owned(),
        ..ModelUsage::default()
    }
}

impl Adapter for Codex {
    fn launch(&mut self, conversation: Option<&str>, _: &str) -> Launch {
        *self = Self {
            spec: std::mem::take(&mut self.spec),
            resume: conversation.map(str::to_owned),
            ..Self::default()
        };
        // It reads its key from this file alone.
        let key = self
            .spec
            .env
            .iter()
            .rev()
            .find(|variable| variable.name == "OPENAI_API_KEY")
            .map(|variable| &variable.value);
        let prepare = key.map(|key| prepare::Action::Write {
            path: ".codex/auth.json".to_owned(),
            text: json!({ "OPENAI_API_KEY": key }).to_string(),
        });
        let mut argv = vec!["codex".to_owned()];
        if let Some((command, args)) = self.spec.tools_command.split_first() {
            // JSON's strings and lists of them are TOML too.
            let settings = [
                ("command", json!(command)),
                ("args", json!(args)),
                ("startup_timeout_sec", json!(20)),
                ("tool_timeout_sec", json!(custom_tools::TIMEOUT_SECONDS)),
            ];
            for (name, value) in settings {
                argv.extend([
                    "-c".to_owned(),
                    format!("mcp_servers.{}.{name}={value}", custom_tools::SERVER),
                ]);
            }
        }
        argv.push("app-server".to_owned());
        Launch {
            argv,
            script: None,
            env: Vec::new(),
            stdio: Stdio::Protocol,
            prepare: prepare.into_iter().collect(),
            belongs_to_turns: true,
        }
    }

    fn started(&mut self, _: &str, out: &mut Out) {
        let params = json!({
            "clientInfo": { "name": "aod", "title": "Agent on Demand", "version": env!("CARGO_PKG_VERSION") },
            "capabilities": { "experimentalApi": true },
        });
        self.request(Request::Initialize, "initialize", params, out);
    }

    fn message(&mut self, text: &str, out: &mut Out) {
        (self.turn, self.ending, self.usage) = (None, None, None);
        let params =
            json!({ "threadId": self.thread, "input": [{ "type": "text", "text": text }] });
        self.request(Request::Turn, "turn/start", params, out);
    }

    fn steer(&mut self, text: &str, out: &mut Out) -> bool {
        let Some(turn) = &self.turn else { return false };
        let params = json!({ "threadId": self.thread, "expectedTurnId": turn, "input": [{ "type": "text", "text": text }] });
        self.request(Request::Other, "turn/steer", params, out);
        true
    }

    fn interrupt(&mut self, out: &mut Out) -> bool {
        match self.turn.clone() {
            Some(turn) => {
                let params = json!({ "threadId": self.thread, "turnId": turn });
                self.request(Request::Other, "turn/interrupt", params, out);
            }
            None => self.interrupt_wanted = true,
        }
        true
    }

    fn decide(&mut self, key: &str, verdict: Verdict, message: &str, out: &mut Out) {
        let id: Value = serde_json::from_str(key).unwrap_or_default();
        let allow = matches!(verdict, Verdict::Allow | Verdict::AllowForSession);
        let elicitation = self.elicitations.iter().any(|open| open == key);
        self.elicitations.retain(|open| open != key);
        let result = if elicitation {
            json!({ "action": if allow { "accept" } else { "decline" }, "content": null, "_meta": null })
        } else {
            json!({ "decision": match verdict {
                Verdict::Allow => "accept",
                Verdict::AllowForSession => "acceptForSession",
                Verdict::Deny | Verdict::Unspecified => "decline",
            } })
        };
        out.push(Effect::Send(json!({ "id": id, "result": result }).to_string()));
        // A denial has no field for its reason.
        if !allow && !message.is_empty() {
            self.steer(message, out);
        }
    }

    fn line(&mut self, line: &[u8], out: &mut Out) {
        let Ok(line) = serde_json::from_slice::<Value>(line) else { return };
        let params = line.get("params").unwrap_or(&Value::Null);
        match (line.get("id"), line.get("method").and_then(Value::as_str)) {
            (Some(id), Some(method)) => self.server_request(id, method, params, out),
            (Some(_), None) => self.reply(&line, out),
            (None, Some(method)) => self.notification(method, params, out),
            (None, None) => {}
        }
    }

    fn exited(&mut self, _: i32, out: &mut Out) {
        // It said that the turn was over, and had only its commands to end.
        self.end_turn(out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_without_its_shell() {
        assert_eq!(command("/bin/bash -lc 'touch x'"), "touch x");
        assert_eq!(command(r"/bin/bash -lc 'echo '\''a'\'''"), "echo 'a'");
        assert_eq!(command("/bin/bash -lc ls"), "ls");
        assert_eq!(command("ls -l"), "ls -l");
    }
}
