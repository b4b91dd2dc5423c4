//! Claude Code.

use contract::session::Usage;
use serde_json::{Map, Value, json};
use types::{McpServer, Provider, agent::McpTransport};

use super::{Adapter, CONVERSATION, Launch, MCP_START_LIMIT, Skills, SystemPrompt};
use crate::{
    ModelEndpoints,
    agent::quote,
    usage::{Printed, Reader, greatest, micro_dollars, number},
};

pub struct Claude;

fn argv(launch: &Launch<'_>, option: &str, conversation: &str) -> Vec<String> {
    let words = ["claude", "--dangerously-skip-permissions", "--print", "--verbose", "--output-format", "stream-json", "--model"];
    words.into_iter().chain([launch.model_id, option, conversation]).map(str::to_owned).collect()
}

impl Adapter for Claude {
    fn executable(&self) -> Option<&'static str> {
        Some("claude")
    }

    fn begin(&self, launch: &Launch<'_>) -> Vec<String> {
        argv(launch, "--session-id", launch.conversation_id)
    }

    fn resume(&self, launch: &Launch<'_>) -> Vec<String> {
        argv(launch, "--resume", CONVERSATION)
    }

    /// A first turn that was killed early may have begun none.
    fn find_conversation(&self, launch: &Launch<'_>) -> String {
        let id = quote(launch.conversation_id);
        format!("compgen -G \"${{CLAUDE_CONFIG_DIR:-$HOME/.claude}}/projects/*/\"{id}.jsonl >/dev/null && echo {id}")
    }

    fn system_prompt(&self) -> SystemPrompt {
        SystemPrompt::Option { option: "--append-system-prompt-file", path: "/var/lib/aod/system" }
    }

    fn env(&self, models: &ModelEndpoints) -> Vec<(String, String)> {
        let mut env = vec![
            // A sandbox has no use for updates, telemetry and surveys, and may not reach them.
            ("DISABLE_AUTOUPDATER".to_owned(), "1".to_owned()),
            ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC".to_owned(), "1".to_owned()),
            ("MCP_TIMEOUT".to_owned(), MCP_START_LIMIT.as_millis().to_string()),
        ];
        if let Some(url) = models.base_url(Provider::Anthropic) {
            env.push(("ANTHROPIC_BASE_URL".to_owned(), url.to_owned()));
        }
        env
    }

    fn config_files(&self, mcp_servers: &[McpServer], _: &ModelEndpoints, _: &str) -> Vec<(&'static str, String)> {
        // Asked nothing at its first start.
        let mut config = json!({ "hasCompletedOnboarding": true });
        let servers: Map<String, Value> = mcp_servers.iter().map(|server| (server.name.clone(), mcp_server(&server.transport))).collect();
        if let (Some(config), false) = (config.as_object_mut(), servers.is_empty()) {
            config.insert("mcpServers".to_owned(), servers.into());
        }
        vec![("/home/sprite/.claude.json", config.to_string())]
    }

    fn usage(&self) -> Option<Reader> {
        Some(usage)
    }

    fn skills(&self) -> Option<Skills> {
        Some(Skills { folder: "/home/sprite/.claude/skills", installer_name: "claude-code" })
    }
}

fn usage(printed: &Printed) -> Option<Usage> {
    let result = printed.last("result")?;
    let read = ["input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"];
    let read: Vec<u64> = read.iter().filter_map(|name| number(result, &format!("/usage/{name}"))).collect();
    Some(Usage {
        input_tokens: (!read.is_empty()).then(|| read.iter().sum()),
        output_tokens: number(result, "/usage/output_tokens"),
        cost_micro_usd: micro_dollars(result, "/total_cost_usd"),
        model: greatest(result.get("modelUsage"), "outputTokens"),
        ..Usage::default()
    })
}

fn mcp_server(transport: &McpTransport) -> Value {
    match transport {
        McpTransport::Url { url, headers } => json!({ "type": "http", "url": url, "headers": headers }),
        McpTransport::Stdio { command, args, env } => json!({ "type": "stdio", "command": command, "args": args, "env": env }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_turn_resumes_the_conversation_by_its_id() {
        let launch = Launch { model: "anthropic/claude-x", model_id: "claude-x", conversation_id: "c0ffee", prompt_path: "/p" };
        assert!(Claude.begin(&launch).join(" ").ends_with("--model claude-x --session-id c0ffee"));
        assert!(Claude.resume(&launch).join(" ").ends_with("--model claude-x --resume $1"));
    }
}
