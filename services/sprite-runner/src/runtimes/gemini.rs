//! Gemini CLI.

use contract::session::Usage;
use serde_json::{Map, Value, json};
use types::{McpServer, Provider, agent::McpTransport};

use super::{Adapter, CONVERSATION, Launch, Skills, SystemPrompt, limited_command};
use crate::{
    ModelEndpoints,
    agent::quote,
    usage::{Printed, Reader, greatest, number},
};

pub struct Gemini;

fn argv(launch: &Launch<'_>, option: &str, conversation: &str) -> Vec<String> {
    let words = ["gemini", "--yolo", "--skip-trust", "--output-format", "stream-json", "--model", launch.model_id, option, conversation];
    words.map(str::to_owned).into()
}

impl Adapter for Gemini {
    fn executable(&self) -> Option<&'static str> {
        Some("gemini")
    }

    fn begin(&self, launch: &Launch<'_>) -> Vec<String> {
        argv(launch, "--session-id", launch.conversation_id)
    }

    fn resume(&self, launch: &Launch<'_>) -> Vec<String> {
        argv(launch, "--resume", CONVERSATION)
    }

    /// A conversation's file has the beginning of its id in its name.
    fn find_conversation(&self, launch: &Launch<'_>) -> String {
        let beginning = launch.conversation_id.get(..8).unwrap_or(launch.conversation_id);
        let id = quote(launch.conversation_id);
        format!("compgen -G \"$HOME/.gemini/tmp/*/chats/session-*-{beginning}.json*\" >/dev/null && echo {id}")
    }

    fn system_prompt(&self) -> SystemPrompt {
        SystemPrompt::Instructions("/home/sprite/.gemini/GEMINI.md")
    }

    fn env(&self, models: &ModelEndpoints) -> Vec<(String, String)> {
        let url = models.base_url(Provider::Google);
        url.map(|url| ("GOOGLE_GEMINI_BASE_URL".to_owned(), url.to_owned())).into_iter().collect()
    }

    fn config_files(&self, mcp_servers: &[McpServer], _: &ModelEndpoints, _: &str) -> Vec<(&'static str, String)> {
        let servers: Map<String, Value> = mcp_servers.iter().map(|server| (server.name.clone(), mcp_server(&server.transport))).collect();
        // A sandbox has no use for updates and telemetry, and may not reach them.
        let settings = json!({
            "security": { "auth": { "selectedType": "gemini-api-key" } },
            "general": { "enableAutoUpdate": false, "enableAutoUpdateNotification": false },
            "privacy": { "usageStatisticsEnabled": false },
            "mcpServers": servers,
        });
        vec![("/home/sprite/.gemini/settings.json", settings.to_string())]
    }

    fn usage(&self) -> Option<Reader> {
        Some(usage)
    }

    fn skills(&self) -> Option<Skills> {
        Some(Skills { folder: "/home/sprite/.gemini/skills", installer_name: "gemini-cli" })
    }
}

fn usage(printed: &Printed) -> Option<Usage> {
    let stats = printed.last("result")?.get("stats")?;
    Some(Usage {
        input_tokens: number(stats, "/input_tokens"),
        output_tokens: number(stats, "/output_tokens"),
        cost_micro_usd: None,
        model: greatest(stats.get("models"), "total_tokens"),
        ..Usage::default()
    })
}

fn mcp_server(transport: &McpTransport) -> Value {
    match transport {
        McpTransport::Url { url, headers } => json!({ "httpUrl": url, "headers": headers, "trust": true }),
        McpTransport::Stdio { command, args, env } => {
            let argv = limited_command(command, args);
            let (command, args) = argv.split_first().unwrap_or((command, args));
            json!({ "command": command, "args": args, "env": env, "trust": true })
        }
    }
}
