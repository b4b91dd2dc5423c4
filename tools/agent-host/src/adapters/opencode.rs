//! opencode: its HTTP server on the loopback interface, and the server's stream of events, which
//! are not replayed.

use std::collections::{HashMap, HashSet};

use contract::host::{
    AgentError, AgentMessage, Capabilities, ContextCompacted, Delta, Evaluation, FileChange,
    ModelRequestEnded, ModelUsage, Plan, PlanEntry, Spec, Thinking, ToolResult, ToolUse,
    agent_error::Retry, capabilities, decision::Verdict, event, turn_ended::Reason,
};
use serde_json::{Map, Value, json};

use super::{
    Adapter, Ask, CONVERSES, Close, Effect, Launch, Out, Runtime, Stdio, add_usage, json::*,
};
use crate::{
    custom_tools,
    http::{Reply, Request},
};

pub const RUNTIME: Runtime = Runtime {
    name: "opencode",
    version: "1.18.33",
    protocol: "HTTP and server-sent events (`serve`)",
    tools: "the CLI's own (`bash`, `edit`, ...); MCP: `server_tool`",
    gaps: "its password is visible to commands that the agent runs: permission requests guard against mistakes, not against the agent",
    capabilities: Capabilities {
        steer: false,
        usage: capabilities::Usage::PerRequest as i32,
        ..CONVERSES
    },
    new: |spec| Box::new(Opencode { spec: spec.clone(), ..Opencode::default() }),
};

const LISTENING: &str = "opencode server listening on http://127.0.0.1:";
/// Tags of requests.
const EVENTS: &str = "events";
const CREATE: &str = "create";
const RESUME: &str = "resume";
const PROMPT: &str = "prompt";
const MCP: &str = "mcp";
const OTHER: &str = "other";
const REMEMBERED_MAX: usize = 10_000;

#[derive(Default)]
struct Opencode {
    spec: Spec,
    password: String,
    resume: Option<String>,
    port: u16,
    session: String,
    opened: bool,
    /// A prompt was sent, and its work has begun.
    prompted: bool,
    busy: bool,
    error: Option<(Reason, String)>,
    finish: String,
    usage: Option<ModelUsage>,
    /// Messages that the model wrote.
    answers: HashSet<String>,
    /// Kinds of parts by id, and the number of their text in deltas.
    parts: HashMap<String, (String, u64)>,
    told: HashSet<String>,
    /// Tools by call id.
    calls: HashMap<String, String>,
    asks: Vec<String>,
}

impl Opencode {
    fn request(
        &self,
        tag: &str,
        method: &'static str,
        path: String,
        body: Option<Value>,
        out: &mut Out,
    ) {
        out.push(Effect::Http(Request {
            tag: tag.to_owned(),
            port: self.port,
            method,
            path,
            body: body.map(|body| body.to_string()),
            password: self.password.clone(),
            stream: tag == EVENTS,
        }));
    }

    fn open_session(&mut self, out: &mut Out) {
        match self.resume.clone() {
            Some(session) => self.request(RESUME, "GET", format!("/session/{session}"), None, out),
            None => self.request(CREATE, "POST", "/session".to_owned(), Some(json!({})), out),
        }
    }

    fn answer(&mut self, tag: &str, status: u16, body: &str, out: &mut Out) {
        let ok = (200..300).contains(&status);
        let reply: Value = serde_json::from_str(body).unwrap_or_default();
        match tag {
            CREATE | RESUME if ok => {
                self.session = text(&reply, "/id").to_owned();
                out.push(Effect::Conversation {
                    id: self.session.clone(),
                    model: self.spec.model.clone(),
                });
                out.push(Effect::Ready);
                if !self.spec.mcp_servers.is_empty() {
                    self.request(MCP, "GET", "/mcp".to_owned(), None, out);
                }
            }
            MCP => {
                for (name, server) in reply.as_object().into_iter().flatten() {
                    let status = text(server, "/status");
                    if matches!(status, "failed" | "needs_auth" | "needs_client_registration") {
                        out.event(mcp_failed(name, text(server, "/error"), status != "failed"));
                    }
                }
            }
            RESUME => {
                self.resume = None;
                self.open_session(out);
            }
            CREATE => {
                out.event(event::Kind::Error(AgentError {
                    kind: "unknown_error".to_owned(),
                    message: format!("opencode could not open a conversation: {status} {body}"),
                    retry: Retry::Exhausted.into(),
                }));
                out.push(Effect::Unusable);
            }
            PROMPT if !ok => {
                self.prompted = false;
                let message = format!("opencode refused the message: {status} {body}");
                out.push(Effect::TurnEnded { reason: Reason::Failed, message, usage: None });
            }
            _ => {}
        }
    }

    fn event(&mut self, event: &Value, out: &mut Out) {
        let properties = event.get("properties").unwrap_or(&Value::Null);
        let kind = text(event, "/type");
        if kind == "server.connected" && !self.opened {
            self.opened = true;
            return self.open_session(out);
        }
        let sessions = ["/sessionID", "/part/sessionID", "/info/sessionID"]
            .map(|pointer| text(properties, pointer));
        if self.session.is_empty() || !sessions.contains(&self.session.as_str()) {
            return;
        }
        match kind {
            "session.status" => match text(properties, "/status/type") {
                "busy" => self.busy = self.prompted,
                "retry" => out.event(event::Kind::Error(AgentError {
                    kind: "model_request_failed_error".to_owned(),
                    message: text(properties, "/status/message").to_owned(),
                    retry: Retry::Retrying.into(),
                })),
                "idle" => self.idle(out),
                _ => {}
            },
            "session.idle" => self.idle(out),
            "session.error" => self.failed(properties, out),
            "session.compacted" => out.event(event::Kind::ContextCompacted(ContextCompacted {})),
            "message.updated"
                if text(properties, "/info/role") == "assistant"
                    && self.answers.len() < REMEMBERED_MAX =>
            {
                self.answers.insert(text(properties, "/info/id").to_owned());
            }
            "message.part.delta" if text(properties, "/field") == "text" => {
                self.delta(properties, out)
            }
            "message.part.updated" => {
                self.part(properties.get("part").unwrap_or(&Value::Null), out)
            }
            "permission.asked" => self.asked(properties, out),
            "permission.replied" => {
                let key = ["/requestID", "/permissionID", "/id"]
                    .map(|pointer| text(properties, pointer))
                    .concat();
                self.asks.retain(|open| *open != key);
                out.push(Effect::Unask { key });
            }
            "todo.updated" => {
                let entries = array(properties, "/todos").iter();
                let entries = entries.map(|todo| PlanEntry {
                    text: text(todo, "/content").to_owned(),
                    status: text(todo, "/status").to_owned(),
                });
                out.event(event::Kind::Plan(Plan { entries: entries.collect() }));
            }
            _ => {}
        }
    }

    fn failed(&mut self, properties: &Value, out: &mut Out) {
        let message = text(properties, "/error/data/message");
        if text(properties, "/error/name") == "MessageAbortedError" {
            self.error = Some((Reason::Interrupted, String::new()));
            return;
        }
        let message = if message.is_empty() { text(properties, "/error/name") } else { message };
        let status =
            properties.pointer("/error/data/statusCode").map(Value::to_string).unwrap_or_default();
        let error = AgentError {
            kind: error_kind(&status).to_owned(),
            message: message.to_owned(),
            retry: Retry::Exhausted.into(),
        };
        out.event(event::Kind::Error(error));
        self.error = Some((Reason::Failed, message.to_owned()));
    }

    /// It says so twice, and also of what came before the message.
    fn idle(&mut self, out: &mut Out) {
        if !(self.prompted && (self.busy || self.error.is_some())) {
            return;
        }
        (self.prompted, self.busy) = (false, false);
        let (reason, message) = self.error.take().unwrap_or_else(|| {
            let reason = match self.finish.as_str() {
                "length" => Reason::Limit,
                "content-filter" => Reason::Refused,
                _ => Reason::Completed,
            };
            (reason, String::new())
        });
        out.push(Effect::TurnEnded { reason, message, usage: self.usage.take() });
    }

    fn delta(&mut self, properties: &Value, out: &mut Out) {
        let Some((kind, number)) = self.parts.get(text(properties, "/partID")) else { return };
        if self.answers.contains(text(properties, "/messageID")) {
            let content = text(properties, "/delta").to_owned();
            out.event(event::Kind::Delta(Delta {
                text: *number,
                content,
                thinking: kind == "reasoning",
            }));
        }
    }

    fn part(&mut self, part: &Value, out: &mut Out) {
        let (id, kind) = (text(part, "/id").to_owned(), text(part, "/type"));
        if self.parts.len() < REMEMBERED_MAX {
            let next = self.parts.len() as u64 + 1;
            self.parts.entry(id.clone()).or_insert_with(|| (kind.to_owned(), next));
        }
        // The user's own messages have parts as well.
        if !self.answers.contains(text(part, "/messageID")) {
            return;
        }
        let is_whole = part.pointer("/time/end").is_some_and(|end| !end.is_null());
        match kind {
            "text" | "reasoning" if is_whole && self.told.insert(id.clone()) => {
                let text = text(part, "/text").to_owned();
                if kind == "reasoning" {
                    out.event(event::Kind::Thinking(Thinking { text }));
                } else if !text.is_empty() {
                    let aborted = self
                        .error
                        .as_ref()
                        .is_some_and(|(reason, _)| *reason == Reason::Interrupted);
                    out.event(event::Kind::Message(AgentMessage { text, aborted }));
                }
            }
            "tool" => self.tool(part, &id, out),
            "step-finish" if self.told.insert(id.clone()) => {
                text(part, "/reason").clone_into(&mut self.finish);
                let usage = step_usage(part, &self.spec.model);
                out.event(event::Kind::ModelRequestEnded(ModelRequestEnded {
                    usage: Some(usage.clone()),
                }));
                add_usage(self.usage.get_or_insert_default(), &usage);
            }
            _ => {}
        }
    }

    fn tool(&mut self, part: &Value, id: &str, out: &mut Out) {
        let (name, call, status) =
            (text(part, "/tool"), text(part, "/callID"), text(part, "/state/status"));
        if self.calls.len() < REMEMBERED_MAX {
            self.calls.insert(call.to_owned(), name.to_owned());
        }
        // While it is pending its input is not whole.
        if status == "pending" {
            return;
        }
        let input = part.pointer("/state/input").cloned().unwrap_or_default();
        out.push(Effect::ToolUse { parent: None, tool: self.tool_use(name, call, &input) });
        if !matches!(status, "completed" | "error") || !self.told.insert(id.to_owned()) {
            return;
        }
        let exit_code = part
            .pointer("/state/metadata/exit")
            .and_then(Value::as_i64)
            .and_then(|code| i32::try_from(code).ok());
        let diff = text(part, "/state/metadata/diff");
        let change =
            FileChange { path: text(&input, "/filePath").to_owned(), diff: diff.to_owned() };
        let result = ToolResult {
            content: text(part, if status == "error" { "/state/error" } else { "/state/output" })
                .to_owned(),
            is_error: status == "error" || exit_code.is_some_and(|code| code != 0),
            exit_code,
            changes: if diff.is_empty() { Vec::new() } else { vec![change] },
            ..ToolResult::default()
        };
        out.push(Effect::ToolResult { call: call.to_owned(), result });
    }

    /// Tools of an MCP server have its name in front.
    fn tool_use(&self, name: &str, call: &str, input: &Value) -> ToolUse {
        let server = self.spec.mcp_servers.iter().find(|server| {
            name.strip_prefix(server.as_str()).is_some_and(|rest| rest.starts_with('_'))
        });
        ToolUse {
            name: name.to_owned(),
            mcp_server: server.cloned().unwrap_or_default(),
            input_json: input.to_string(),
            call_id: call.to_owned(),
            evaluation: 0,
        }
    }

    fn asked(&mut self, properties: &Value, out: &mut Out) {
        let (key, call) =
            (text(properties, "/id").to_owned(), text(properties, "/tool/callID").to_owned());
        let permission = text(properties, "/permission");
        let tool = self.calls.get(&call).cloned().unwrap_or_else(|| permission.to_owned());
        let metadata = properties.get("metadata").cloned().unwrap_or_default();
        let diff = text(&metadata, "/diff").to_owned();
        self.asks.push(key.clone());
        let tool = self.tool_use(&tool, &call, &metadata);
        out.push(Effect::Ask(Ask {
            key,
            call,
            tool: tool.name,
            mcp_server: tool.mcp_server,
            input_json: tool.input_json,
            diff,
            reason: permission.to_owned(),
        }));
    }

    fn reply(&self, key: &str, reply: &str, message: &str, out: &mut Out) {
        let mut body = Map::from_iter([("reply".to_owned(), Value::from(reply))]);
        if !message.is_empty() {
            body.insert("message".to_owned(), message.into());
        }
        self.request(OTHER, "POST", format!("/permission/{key}/reply"), Some(body.into()), out);
    }
}

/// It counts reasoning beside the output.
fn step_usage(part: &Value, model: &str) -> ModelUsage {
    let reasoning = number(part, "/tokens/reasoning");
    ModelUsage {
        input_tokens: number(part, "/tokens/input"),
        output_tokens: number(part, "/tokens/output") + reasoning,
        cache_read_tokens: number(part, "/tokens/cache/read"),
        cache_write_tokens: number(part, "/tokens/cache/write"),
        reasoning_tokens: reasoning,
        cost_micro_usd: micro_dollars(part, "/cost"),
        model: model.to_owned(),
    }
}

impl Adapter for Opencode {
    fn launch(&mut self, conversation: Option<&str>, _: &str) -> Launch {
        let password = crate::random_hex();
        *self = Self {
            spec: std::mem::take(&mut self.spec),
            password,
            resume: conversation.map(str::to_owned),
            ..Self::default()
        };
        let argv = ["opencode", "serve", "--hostname", "127.0.0.1", "--port", "0"]
            .map(str::to_owned)
            .into();
        let mut env: Vec<(String, String)> =
            ["OPENCODE_DISABLE_MODELS_FETCH", "OPENCODE_DISABLE_AUTOUPDATE"]
                .map(|name| (name.to_owned(), "1".to_owned()))
                .into();
        env.push(("OPENCODE_SERVER_PASSWORD".to_owned(), self.password.clone()));
        // It knows Google's key by another name.
        if let Some(key) =
            self.spec.env.iter().rev().find(|variable| variable.name == "GEMINI_API_KEY")
        {
            env.push(("GOOGLE_GENERATIVE_AI_API_KEY".to_owned(), key.value.clone()));
        }
        if !self.spec.tools_command.is_empty() {
            let server = json!({ "type": "local", "command": self.spec.tools_command, "enabled": true, "timeout": 20_000 });
            let limit = custom_tools::TIMEOUT_SECONDS * 1000;
            let config = json!({ "mcp": { custom_tools::SERVER: server }, "experimental": { "mcp_timeout": limit } });
            env.push(("OPENCODE_CONFIG_CONTENT".to_owned(), config.to_string()));
        }
        let permissions = self.spec.permissions.clone().unwrap_or_default();
        let decides =
            |evaluation: Evaluation| matches!(evaluation, Evaluation::Ask | Evaluation::Deny);
        if permissions.rules.iter().any(|rule| decides(rule.evaluation()))
            || decides(permissions.otherwise())
        {
            env.push(("OPENCODE_PERMISSION".to_owned(), json!({ "*": "ask" }).to_string()));
        }
        Launch {
            argv,
            script: None,
            env,
            stdio: Stdio::Protocol,
            prepare: Vec::new(),
            belongs_to_turns: true,
        }
    }

    /// It is ready when it says where it listens: a request before that is never answered.
    fn started(&mut self, _: &str, _: &mut Out) {}

    fn message(&mut self, text: &str, out: &mut Out) {
        self.prompted = true;
        (self.busy, self.error, self.usage) = (false, None, None);
        self.finish.clear();
        let mut body = json!({ "parts": [{ "type": "text", "text": text }] });
        if let Some(body) = body.as_object_mut() {
            if let Some((provider, model)) = self.spec.model.split_once('/') {
                body.insert(
                    "model".to_owned(),
                    json!({ "providerID": provider, "modelID": model }),
                );
            }
            if !self.spec.system.is_empty() {
                body.insert("system".to_owned(), self.spec.system.as_str().into());
            }
        }
        self.request(
            PROMPT,
            "POST",
            format!("/session/{}/prompt_async", self.session),
            Some(body),
            out,
        );
    }

    fn interrupt(&mut self, out: &mut Out) -> bool {
        self.request(OTHER, "POST", format!("/session/{}/abort", self.session), None, out);
        // Requests that were open stay open for it, without effect.
        for key in std::mem::take(&mut self.asks) {
            self.reply(&key, "reject", "", out);
            out.push(Effect::Unask { key });
        }
        true
    }

    fn decide(&mut self, key: &str, verdict: Verdict, message: &str, out: &mut Out) {
        self.asks.retain(|open| open != key);
        // A denial without a reason would end the turn.
        match verdict {
            Verdict::Allow => self.reply(key, "once", "", out),
            Verdict::AllowForSession => self.reply(key, "always", "", out),
            Verdict::Deny | Verdict::Unspecified if message.is_empty() => {
                self.reply(key, "reject", "The user does not permit this", out)
            }
            Verdict::Deny | Verdict::Unspecified => self.reply(key, "reject", message, out),
        }
    }

    fn line(&mut self, line: &[u8], out: &mut Out) {
        let line = String::from_utf8_lossy(line);
        if let (0, Some(port)) =
            (self.port, line.trim().strip_prefix(LISTENING).and_then(|port| port.parse().ok()))
        {
            self.port = port;
            self.request(EVENTS, "GET", "/event".to_owned(), None, out);
        }
    }

    fn http(&mut self, reply: &Reply, out: &mut Out) {
        match reply {
            Reply::Event { data, .. } => {
                let event = serde_json::from_str::<Value>(data).unwrap_or_default();
                self.event(&event, out);
            }
            Reply::Answer { tag, status, body } => self.answer(tag, *status, body, out),
            // Without its events, or with a message that may or may not have come, the process is
            // of no use.
            Reply::Failed { tag, .. } if tag == OTHER => {}
            Reply::Failed { .. } => out.push(Effect::Unusable),
        }
    }

    fn close(&self) -> Close {
        Close::Terminate
    }
}
