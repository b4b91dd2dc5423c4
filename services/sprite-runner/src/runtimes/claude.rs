//! Claude Code.

use serde_json::{Map, Value, json};
use types::{McpServer, Provider, agent::McpTransport};

use super::{Adapter, Launch, Skills, Stdin};
use crate::ModelEndpoints;

pub struct Claude;

impl Adapter for Claude {
    fn executable(&self) -> Option<&'static str> {
        Some("claude")
    }

    fn argv(&self, launch: &Launch<'_>) -> Vec<String> {
        let conversation = if launch.first_turn { "--session-id" } else { "--resume" };
        let mut argv: Vec<String> = ["claude", "--dangerously-skip-permissions", "--print", "--verbose", "--output-format", "stream-json"]
            .map(str::to_owned)
            .into();
        argv.extend(["--model", launch.model_id, conversation, launch.conversation_id].map(str::to_owned));
        argv
    }

    fn stdin(&self) -> Stdin {
        Stdin::Prompt
    }

    fn env(&self, models: &ModelEndpoints) -> Vec<(String, String)> {
        let mut env = vec![
            // A sandbox has no use for updates, telemetry and surveys, and may not reach them.
            ("DISABLE_AUTOUPDATER".to_owned(), "1".to_owned()),
            ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC".to_owned(), "1".to_owned()),
        ];
        if let Some(url) = models.base_url(Provider::Anthropic) {
            env.push(("ANTHROPIC_BASE_URL".to_owned(), url.to_owned()));
        }
        env
    }

    fn config_files(&self, mcp_servers: &[McpServer]) -> Vec<(&'static str, String)> {
        // Asked nothing at its first start.
        let mut config = json!({ "hasCompletedOnboarding": true });
        let servers: Map<String, Value> = mcp_servers.iter().map(|server| (server.name.clone(), mcp_server(&server.transport))).collect();
        if let (Some(config), false) = (config.as_object_mut(), servers.is_empty()) {
            config.insert("mcpServers".to_owned(), servers.into());
        }
        vec![("/home/sprite/.claude.json", config.to_string())]
    }

    fn skills(&self) -> Option<Skills> {
        Some(Skills { folder: "/home/sprite/.claude/skills", installer_name: "claude-code" })
    }
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
        let mut launch = Launch { first_turn: true, model_id: "claude-x", conversation_id: "c0ffee", prompt_path: "/p" };
        assert!(Claude.argv(&launch).join(" ").ends_with("--model claude-x --session-id c0ffee"));
        launch.first_turn = false;
        assert!(Claude.argv(&launch).join(" ").ends_with("--model claude-x --resume c0ffee"));
    }
}
