//! opencode: models of every provider.

use serde_json::{Map, Value, json};
use types::{McpServer, Provider, agent::McpTransport};

use super::{Adapter, Skills, limited_command};
use crate::ModelEndpoints;

pub struct Opencode;

impl Adapter for Opencode {
    fn executable(&self) -> Option<&'static str> {
        Some("opencode")
    }

    fn config_files(
        &self,
        mcp_servers: &[McpServer],
        models: &ModelEndpoints,
    ) -> Vec<(&'static str, String)> {
        let versions = [
            (Provider::Anthropic, "anthropic", "v1"),
            (Provider::Openai, "openai", "v1"),
            (Provider::Google, "google", "v1beta"),
        ];
        let providers = versions.into_iter().filter_map(|(provider, name, version)| {
            let url = models.base_url(provider)?.trim_end_matches('/');
            Some((name.to_owned(), json!({ "options": { "baseURL": format!("{url}/{version}") } })))
        });
        let servers: Map<String, Value> = mcp_servers
            .iter()
            .map(|server| (server.name.clone(), mcp_server(&server.transport)))
            .collect();
        let config = json!({
            "$schema": "https://opencode.ai/config.json",
            "share": "disabled",
            "autoupdate": false,
            "provider": Map::from_iter(providers),
            "mcp": servers,
        });
        vec![("/home/sprite/.config/opencode/opencode.json", config.to_string())]
    }

    fn skills(&self) -> Option<Skills> {
        Some(Skills { folder: "/home/sprite/.config/opencode/skills", installer_name: "opencode" })
    }
}

/// It writes variables as `{env:NAME}`.
fn env_references(text: &str) -> String {
    let mut parts = text.split("${");
    let mut replaced = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.split_once('}') {
            Some((name, rest)) => replaced.push_str(&format!("{{env:{name}}}{rest}")),
            None => replaced.push_str(&format!("${{{part}")),
        }
    }
    replaced
}

fn mcp_server(transport: &McpTransport) -> Value {
    match transport {
        McpTransport::Url { url, headers } => {
            let headers: Map<String, Value> = headers
                .iter()
                .map(|(name, value)| (name.clone(), env_references(value).into()))
                .collect();
            json!({ "type": "remote", "url": url, "headers": headers, "enabled": true, "oauth": false })
        }
        McpTransport::Stdio { command, args, env } => {
            json!({ "type": "local", "command": limited_command(command, args), "environment": env, "enabled": true })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_written_its_way() {
        assert_eq!(env_references("Bearer ${A}-${B} $C ${"), "Bearer {env:A}-{env:B} $C ${");
    }
}
