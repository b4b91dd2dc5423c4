//! Claude Code: newline-delimited JSON in both directions, with control requests either way.
//!
//! Every tool call is asked about by a `PreToolUse` hook, in every mode and before all rules;
//! `can_use_tool` is the net below it.

use contract::host::{
    AgentError, AgentMessage, ContextCompacted, Delta, FileChange, ModelUsage, Plan, PlanEntry,
    Spec, Thinking, ToolResult, ToolUse, agent_error::Retry, decision::Verdict, event,
    turn_ended::Reason,
};
use serde_json::{Value, json};

use super::{Adapter, Ask, CONVERSES, Effect, Launch, Out, Runtime, Stdio, json::*};
use crate::custom_tools;

pub const RUNTIME: Runtime = Runtime {
    name: "claude",
    version: "2.1.330",
    protocol: "newline-delimited JSON (`stream-json`)",
    tools: "the CLI's own (`Bash`, `Edit`, ...); MCP: `mcp__server__tool`",
    gaps: "the interrupted command's output is not in its result",
    capabilities: CONVERSES,
    new: |spec| Box::new(Claude { spec: spec.clone(), ..Claude::default() }),
};

const INITIALIZE: &str = "initialize";
/// A conversation that was never written cannot be resumed, and one that was cannot be begun.
const BEGIN_OR_RESUME: &str = r#"id=$1 && shift
[ -n "$id" ] || exec claude "$@"
for file in "${CLAUDE_CONFIG_DIR:-$HOME/.claude}"/projects/*/"$id".jsonl; do
    [ ! -e "$file" ] || exec claude --resume "$id" "$@"
done
exec claude --session-id "$id" "$@""#;

#[derive(Default)]
struct Claude {
    spec: Spec,
    /// Name of the request, by which its answer is recognized.
    requests: u64,
    ready: bool,
    conversation: String,
    result: Option<(Reason, String)>,
    usage: Option<ModelUsage>,
    /// Running total of the process, in millionths of a dollar.
    cost: u64,
    open_calls: Vec<String>,
    texts: u64,
    mcp_is_pending: bool,
    told_of_mcp: Vec<String>,
}

impl Claude {
    fn control(&mut self, request: &Value, out: &mut Out) {
        self.requests += 1;
        let id = format!("host-{}", self.requests);
        out.push(Effect::Send(
            json!({ "type": "control_request", "request_id": id, "request": request }).to_string(),
        ));
    }

    fn system(&mut self, line: &Value, out: &mut Out) {
        match text(line, "/subtype") {
            // Once per turn.
            "init" => {
                if self.conversation != text(line, "/session_id") {
                    self.conversation = text(line, "/session_id").to_owned();
                    out.push(Effect::Conversation {
                        id: self.conversation.clone(),
                        model: text(line, "/model").to_owned(),
                    });
                }
                self.mcp_servers(array(line, "/mcp_servers"), out);
            }
            "session_state_changed" if text(line, "/state") == "idle" => self.end_turn(out),
            "api_retry" => {
                let status =
                    line.pointer("/error_status").map(Value::to_string).unwrap_or_default();
                out.event(event::Kind::Error(AgentError {
                    kind: error_kind(&status).to_owned(),
                    message: format!(
                        "The model API failed with status {status}: {}",
                        text(line, "/error")
                    ),
                    retry: Retry::Retrying.into(),
                }));
            }
            "compact_boundary" => out.event(event::Kind::ContextCompacted(ContextCompacted {})),
            _ => {}
        }
    }

    /// Tells once of each MCP server that failed. Turns do not wait for servers that are slow.
    fn mcp_servers(&mut self, servers: &[Value], out: &mut Out) {
        self.mcp_is_pending = servers.iter().any(|server| text(server, "/status") == "pending");
        for server in servers {
            let (name, status) = (text(server, "/name"), text(server, "/status"));
            if matches!(status, "failed" | "needs-auth")
                && !self.told_of_mcp.iter().any(|told| told == name)
            {
                self.told_of_mcp.push(name.to_owned());
                out.event(mcp_failed(name, text(server, "/error"), status == "needs-auth"));
            }
        }
    }

    fn assistant(&mut self, line: &Value, out: &mut Out) {
        // What the CLI writes for the model when the API failed; the result has it as an error.
        if line.get("error").is_some_and(|error| !error.is_null()) {
            return;
        }
        let parent = line.pointer("/parent_tool_use_id").and_then(Value::as_str).map(str::to_owned);
        for block in array(line, "/message/content") {
            let kind = match text(block, "/type") {
                "text" => {
                    let aborted = line.get("aborted").and_then(Value::as_bool) == Some(true);
                    event::Kind::Message(AgentMessage {
                        text: text(block, "/text").to_owned(),
                        aborted,
                    })
                }
                "thinking" => {
                    event::Kind::Thinking(Thinking { text: text(block, "/thinking").to_owned() })
                }
                "tool_use" => {
                    let (name, call) = (text(block, "/name"), text(block, "/id"));
                    self.open_calls.push(call.to_owned());
                    let input = block.get("input").cloned().unwrap_or_default();
                    let tool = tool_use(name, call, &input);
                    out.push(Effect::ToolUse { parent: parent.clone(), tool });
                    if name != "TodoWrite" {
                        continue;
                    }
                    let entries = array(&input, "/todos").iter();
                    let entries = entries.map(|todo| PlanEntry {
                        text: text(todo, "/content").to_owned(),
                        status: text(todo, "/status").to_owned(),
                    });
                    event::Kind::Plan(Plan { entries: entries.collect() })
                }
                _ => continue,
            };
            out.push(Effect::Event { parent: parent.clone(), kind });
        }
    }

    fn user(&mut self, line: &Value, out: &mut Out) {
        for block in array(line, "/message/content")
            .iter()
            .filter(|block| text(block, "/type") == "tool_result")
        {
            let call = text(block, "/tool_use_id").to_owned();
            self.open_calls.retain(|open| *open != call);
            let result = ToolResult {
                content: content(block.get("content")),
                is_error: block.get("is_error").and_then(Value::as_bool) == Some(true),
                changes: change(line.get("tool_use_result")).into_iter().collect(),
                ..ToolResult::default()
            };
            out.push(Effect::ToolResult { call, result });
        }
    }

    fn stream_event(&mut self, line: &Value, out: &mut Out) {
        match text(line, "/event/type") {
            "content_block_start" => self.texts += 1,
            "content_block_delta" => {
                let (words, thought) =
                    (text(line, "/event/delta/text"), text(line, "/event/delta/thinking"));
                let (content, thinking) =
                    if thought.is_empty() { (words, false) } else { (thought, true) };
                if !content.is_empty() && line.get("parent_tool_use_id").is_none_or(Value::is_null)
                {
                    out.event(event::Kind::Delta(Delta {
                        text: self.texts,
                        content: content.to_owned(),
                        thinking,
                    }));
                }
            }
            _ => {}
        }
    }

    /// One turn of the model's main loop is over; the CLI may continue by itself.
    fn result(&mut self, line: &Value, out: &mut Out) {
        let is_error = line.get("is_error").and_then(Value::as_bool) == Some(true);
        let message = match array(line, "/errors").first().and_then(Value::as_str) {
            Some(error) => error.to_owned(),
            None => text(line, "/result").to_owned(),
        };
        let reason = match text(line, "/terminal_reason") {
            "aborted_streaming" | "aborted_tools" => Reason::Interrupted,
            "max_turns" | "budget_exhausted" | "prompt_too_long" => Reason::Limit,
            _ if text(line, "/stop_reason") == "refusal" => Reason::Refused,
            _ if is_error => Reason::Failed,
            _ => Reason::Completed,
        };
        if reason == Reason::Failed {
            let status =
                line.pointer("/api_error_status").map(Value::to_string).unwrap_or_default();
            let error = AgentError {
                kind: error_kind(&status).to_owned(),
                message: message.clone(),
                retry: Retry::Exhausted.into(),
            };
            out.event(event::Kind::Error(error));
        }
        let usage = self.usage.get_or_insert_default();
        usage.input_tokens += number(line, "/usage/input_tokens");
        usage.output_tokens += number(line, "/usage/output_tokens");
        usage.cache_read_tokens += number(line, "/usage/cache_read_input_tokens");
        usage.cache_write_tokens += number(line, "/usage/cache_creation_input_tokens");
        usage.reasoning_tokens += number(line, "/usage/output_tokens_details/thinking_tokens");
        usage.model = greatest(line.get("modelUsage"), "outputTokens").unwrap_or_default();
        if let Some(total) = micro_dollars(line, "/total_cost_usd") {
            // The total continues from the transcript's, or begins at nothing where that was not
            // written.
            let cost = if total >= self.cost { total - self.cost } else { total };
            *usage.cost_micro_usd.get_or_insert_default() += cost;
            self.cost = total;
        }
        if std::mem::take(&mut self.mcp_is_pending) {
            self.control(&json!({ "subtype": "mcp_status" }), out);
        }
        let message = if reason == Reason::Completed { String::new() } else { message };
        self.result = Some((reason, message));
    }

    fn end_turn(&mut self, out: &mut Out) {
        self.open_calls.clear();
        if let Some((reason, message)) = self.result.take() {
            out.push(Effect::TurnEnded { reason, message, usage: self.usage.take() });
        }
    }

    fn control_request(line: &Value, out: &mut Out) {
        let (id, request) =
            (text(line, "/request_id"), line.get("request").unwrap_or(&Value::Null));
        let (input, tool, call) = match text(request, "/subtype") {
            "hook_callback" => (
                request.pointer("/input/tool_input"),
                text(request, "/input/tool_name"),
                text(request, "/input/tool_use_id"),
            ),
            "can_use_tool" => {
                (request.get("input"), text(request, "/tool_name"), text(request, "/tool_use_id"))
            }
            other => {
                let error = format!("the agent host does not answer {other}");
                let response = json!({ "subtype": "error", "request_id": id, "error": error });
                out.push(Effect::Send(
                    json!({ "type": "control_response", "response": response }).to_string(),
                ));
                return;
            }
        };
        let hook = text(request, "/subtype") == "hook_callback";
        let tool_use = tool_use(tool, call, input.unwrap_or(&Value::Null));
        out.push(Effect::Ask(Ask {
            key: format!("{}{id}", if hook { HOOK } else { TOOL }),
            call: tool_use.call_id,
            tool: tool_use.name,
            mcp_server: tool_use.mcp_server,
            input_json: tool_use.input_json,
            reason: text(request, "/decision_reason").to_owned(),
            ..Ask::default()
        }));
    }
}

/// In front of request ids in the keys of asks.
const HOOK: &str = "hook:";
const TOOL: &str = "tool:";

fn tool_use(name: &str, call: &str, input: &Value) -> ToolUse {
    let server = name
        .strip_prefix("mcp__")
        .and_then(|rest| rest.split_once("__"))
        .map(|(server, _)| server)
        .unwrap_or_default();
    ToolUse {
        name: name.to_owned(),
        mcp_server: server.to_owned(),
        input_json: input.to_string(),
        call_id: call.to_owned(),
        evaluation: 0,
    }
}

/// What a tool did to a file.
fn change(result: Option<&Value>) -> Option<FileChange> {
    let result = result?;
    let path = result.get("filePath")?.as_str()?;
    // The CLI compares a file with nothing only if there was one.
    if text(result, "/type") == "create" {
        let content = text(result, "/content");
        let lines: String = content.lines().map(|line| format!("+{line}\n")).collect();
        let diff = format!("@@ -0,0 +1,{} @@\n{lines}", content.lines().count());
        return Some(FileChange { path: path.to_owned(), diff });
    }
    let hunks = array(result, "/structuredPatch").iter().map(|hunk| {
        let lines: String = array(hunk, "/lines")
            .iter()
            .filter_map(Value::as_str)
            .map(|line| format!("{line}\n"))
            .collect();
        let at = |name: &str| number(hunk, name);
        format!(
            "@@ -{},{} +{},{} @@\n{lines}",
            at("/oldStart"),
            at("/oldLines"),
            at("/newStart"),
            at("/newLines")
        )
    });
    Some(FileChange { path: path.to_owned(), diff: hunks.collect() })
}

impl Adapter for Claude {
    fn launch(&mut self, conversation: Option<&str>, _: &str) -> Launch {
        let cost = self.cost;
        *self = Self { spec: std::mem::take(&mut self.spec), cost, ..Self::default() };
        let id = conversation.unwrap_or(&self.spec.conversation_id);
        let mut argv: Vec<String> =
            ["sh", "-c", BEGIN_OR_RESUME, "claude", id].map(str::to_owned).into();
        let words = "--print --verbose --input-format stream-json --output-format stream-json --permission-prompt-tool stdio \
                     --permission-mode manual --disallowedTools AskUserQuestion,EnterPlanMode,ExitPlanMode";
        argv.extend(words.split_ascii_whitespace().map(str::to_owned));
        if self.spec.partial_messages {
            argv.push("--include-partial-messages".to_owned());
        }
        if let Some((command, args)) = self.spec.tools_command.split_first() {
            let server = json!({ "type": "stdio", "command": command, "args": args });
            argv.extend([
                "--mcp-config".to_owned(),
                json!({ "mcpServers": { custom_tools::SERVER: server } }).to_string(),
            ]);
        }
        if !self.spec.model.is_empty() {
            argv.extend(["--model".to_owned(), self.spec.model.clone()]);
        }
        if !self.spec.system.is_empty() {
            // An argument that is too long is passed as a file.
            let is_long = self.spec.system.len() > crate::process::ARGUMENT_BYTES_MAX;
            argv.push(
                if is_long { "--append-system-prompt-file" } else { "--append-system-prompt" }
                    .to_owned(),
            );
            argv.push(self.spec.system.clone());
        }
        let env = [
            ("DISABLE_AUTOUPDATER", "1"),
            ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1"),
            ("CLAUDE_CODE_EMIT_SESSION_STATE_EVENTS", "1"),
        ];
        let mut env: Vec<_> = env.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        if !self.spec.tools_command.is_empty() {
            env.push((
                "MCP_TOOL_TIMEOUT".to_owned(),
                (custom_tools::TIMEOUT_SECONDS * 1000).to_string(),
            ));
            // Tools that have to be searched for cannot be had without the tool that searches,
            // which an agent may not have.
            env.push(("ENABLE_TOOL_SEARCH".to_owned(), "false".to_owned()));
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

    fn started(&mut self, _: &str, out: &mut Out) {
        let hook = json!({ "matcher": "*", "hookCallbackIds": ["gate"], "timeout": 31_536_000 });
        let request = json!({ "subtype": "initialize", "hooks": { "PreToolUse": [hook] } });
        out.push(Effect::Send(
            json!({ "type": "control_request", "request_id": INITIALIZE, "request": request })
                .to_string(),
        ));
    }

    fn message(&mut self, text: &str, out: &mut Out) {
        (self.result, self.usage) = (None, None);
        out.push(Effect::Send(user_line(text, false)));
    }

    fn steer(&mut self, text: &str, out: &mut Out) -> bool {
        // While a tool runs it joins the tool's result; while the model writes it would wait for
        // the end.
        out.push(Effect::Send(user_line(text, self.open_calls.is_empty())));
        true
    }

    fn interrupt(&mut self, out: &mut Out) -> bool {
        self.control(&json!({ "subtype": "interrupt", "cancel_queued": true }), out);
        true
    }

    fn decide(&mut self, key: &str, verdict: Verdict, message: &str, out: &mut Out) {
        let allow = matches!(verdict, Verdict::Allow | Verdict::AllowForSession);
        let message = if message.is_empty() { "The user does not permit this" } else { message };
        let (id, response) = if let Some(id) = key.strip_prefix(HOOK) {
            let mut decision = json!({ "hookEventName": "PreToolUse", "permissionDecision": if allow { "allow" } else { "deny" } });
            if let (false, Some(decision)) = (allow, decision.as_object_mut()) {
                decision.insert("permissionDecisionReason".to_owned(), message.into());
            }
            (id, json!({ "hookSpecificOutput": decision }))
        } else {
            let id = key.strip_prefix(TOOL).unwrap_or(key);
            (
                id,
                if allow {
                    json!({ "behavior": "allow" })
                } else {
                    json!({ "behavior": "deny", "message": message, "interrupt": false })
                },
            )
        };
        let response = json!({ "subtype": "success", "request_id": id, "response": response });
        out.push(Effect::Send(
            json!({ "type": "control_response", "response": response }).to_string(),
        ));
    }

    fn line(&mut self, line: &[u8], out: &mut Out) {
        let Ok(line) = serde_json::from_slice::<Value>(line) else { return };
        match text(&line, "/type") {
            "system" => self.system(&line, out),
            "assistant" => self.assistant(&line, out),
            "user" => self.user(&line, out),
            "stream_event" => self.stream_event(&line, out),
            "result" => self.result(&line, out),
            "control_request" => Self::control_request(&line, out),
            "control_cancel_request" => {
                for prefix in [HOOK, TOOL] {
                    out.push(Effect::Unask {
                        key: format!("{prefix}{}", text(&line, "/request_id")),
                    });
                }
            }
            "control_response"
                if text(&line, "/response/request_id") == INITIALIZE && !self.ready =>
            {
                self.ready = true;
                out.push(Effect::Ready);
            }
            "control_response" => {
                self.mcp_servers(array(&line, "/response/response/mcpServers"), out)
            }
            _ => {}
        }
    }

    fn exited(&mut self, _: i32, out: &mut Out) {
        // A result is the model's end of the turn, though the CLI did not live to say that it is
        // idle.
        self.end_turn(out);
    }
}

fn user_line(text: &str, now: bool) -> String {
    let message = json!({ "role": "user", "content": text });
    let mut line =
        json!({ "type": "user", "message": message, "parent_tool_use_id": null, "session_id": "" });
    if let (true, Some(line)) = (now, line.as_object_mut()) {
        line.insert("priority".to_owned(), "now".into());
    }
    line.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_created_file_is_a_change_that_adds_all_of_it() {
        let created = json!({
            "type": "create", "filePath": "/w/a", "content": "one\ntwo\n", "structuredPatch": [],
        });
        let change = change(Some(&created)).unwrap();
        assert_eq!(
            (change.path.as_str(), change.diff.as_str()),
            ("/w/a", "@@ -0,0 +1,2 @@\n+one\n+two\n")
        );
    }
}
