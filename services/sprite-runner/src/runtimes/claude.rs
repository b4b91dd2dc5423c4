//! Claude Code.

use serde_json::{Map, Value, json};
use types::{McpServer, Provider, agent::McpTransport};

use super::{Adapter, MCP_START_LIMIT, Skills};
use crate::ModelEndpoints;

pub struct Claude;

impl Adapter for Claude {
    fn executable(&self) -> Option<&'static str> {
        Some("claude")
    }

    fn env(&self, models: &ModelEndpoints) -> Vec<(String, String)> {
        let mut env = vec![("MCP_TIMEOUT".to_owned(), MCP_START_LIMIT.as_millis().to_string())];
        if let Some(url) = models.base_url(Provider::Anthropic) {
            env.push(("ANTHROPIC_BASE_URL".to_owned(), url.to_owned()));
        }
        env
    }

    fn config_files(
        &self,
        mcp_servers: &[McpServer],
        _: &ModelEndpoints,
    ) -> Vec<(&'static str, String)> {
        // Asked nothing at its first start.
        let mut config = json!({ "hasCompletedOnboarding": true });
        let servers: Map<String, Value> = mcp_servers
            .iter()
            .map(|server| (server.name.clone(), mcp_server(&server.transport)))
            .collect();
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
        McpTransport::Url { url, headers } => {
            json!({ "type": "http", "url": url, "headers": headers })
        }
        McpTransport::Stdio { command, args, env } => {
            json!({ "type": "stdio", "command": command, "args": args, "env": env })
        }
    }
}
