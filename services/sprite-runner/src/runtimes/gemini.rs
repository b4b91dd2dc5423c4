//! Gemini CLI.

use serde_json::{Map, Value, json};
use types::{McpServer, Provider, agent::McpTransport};

use super::{Adapter, Skills, limited_command};
use crate::ModelEndpoints;

pub struct Gemini;

impl Adapter for Gemini {
    fn executable(&self) -> Option<&'static str> {
        Some("gemini")
    }

    fn env(&self, models: &ModelEndpoints) -> Vec<(String, String)> {
        let url = models.base_url(Provider::Google);
        url.map(|url| ("GOOGLE_GEMINI_BASE_URL".to_owned(), url.to_owned())).into_iter().collect()
    }

    fn config_files(
        &self,
        mcp_servers: &[McpServer],
        _: &ModelEndpoints,
    ) -> Vec<(&'static str, String)> {
        let servers: Map<String, Value> = mcp_servers
            .iter()
            .map(|server| (server.name.clone(), mcp_server(&server.transport)))
            .collect();
        // A sandbox has no use for updates and telemetry, and may not reach them. It says nothing
        // while it asks a failing model again: a few attempts, then the reason.
        let settings = json!({
            "security": { "auth": { "selectedType": "gemini-api-key" } },
            "general": { "enableAutoUpdate": false, "enableAutoUpdateNotification": false, "maxAttempts": 3 },
            "privacy": { "usageStatisticsEnabled": false },
            "mcpServers": servers,
        });
        vec![("/home/sprite/.gemini/settings.json", settings.to_string())]
    }

    fn tells_of_mcp_servers(&self) -> bool {
        false
    }

    fn skills(&self) -> Option<Skills> {
        Some(Skills { folder: "/home/sprite/.gemini/skills", installer_name: "gemini-cli" })
    }
}

fn mcp_server(transport: &McpTransport) -> Value {
    match transport {
        McpTransport::Url { url, headers } => json!({ "httpUrl": url, "headers": headers }),
        McpTransport::Stdio { command, args, env } => {
            let argv = limited_command(command, args);
            let (command, args) = argv.split_first().unwrap_or((command, args));
            json!({ "command": command, "args": args, "env": env })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gemini CLI asks about no tool of a server that it trusts, whatever the agent's policy says.
    #[test]
    fn tools_of_mcp_servers_are_asked_about() {
        let remote = McpTransport::Url {
            url: "https://mcp.example/mcp".to_owned(),
            headers: Default::default(),
        };
        let local = McpTransport::Stdio {
            command: "true".to_owned(),
            args: Vec::new(),
            env: Default::default(),
        };
        for transport in [remote, local] {
            assert_eq!(mcp_server(&transport).get("trust"), None);
        }
    }
}
