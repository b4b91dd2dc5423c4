//! Codex CLI.

use serde_json::{Map, Value, json};
use types::{McpServer, Provider, agent::McpTransport};

use super::{Adapter, MCP_START_LIMIT, Skills};
use crate::ModelEndpoints;

pub struct Codex;

/// What the configured base URL is called.
const PROVIDER: &str = "configured";

impl Adapter for Codex {
    fn executable(&self) -> Option<&'static str> {
        Some("codex")
    }

    fn config_files(
        &self,
        mcp_servers: &[McpServer],
        models: &ModelEndpoints,
    ) -> Vec<(&'static str, String)> {
        let mut config = Map::from_iter([
            ("check_for_update_on_startup".to_owned(), json!(false)),
            ("analytics".to_owned(), json!({ "enabled": false })),
        ]);
        if let Some(url) = models.base_url(Provider::Openai) {
            // A provider of its own: with the built-in one it tries WebSockets first, for seconds
            // where there are none.
            let provider = json!({
                "name": PROVIDER,
                "base_url": format!("{}/v1", url.trim_end_matches('/')),
                "wire_api": "responses",
                "requires_openai_auth": true,
                "supports_websockets": false,
            });
            config.insert("model_provider".to_owned(), PROVIDER.into());
            config.insert("model_providers".to_owned(), json!({ PROVIDER: provider }));
        }
        let servers: Map<String, Value> = mcp_servers
            .iter()
            .map(|server| (server.name.clone(), mcp_server(&server.transport)))
            .collect();
        if !servers.is_empty() {
            config.insert("mcp_servers".to_owned(), servers.into());
        }
        // Text, numbers and tables of them: all of it can be TOML.
        vec![("/home/sprite/.codex/config.toml", toml::to_string(&config).unwrap_or_default())]
    }

    fn skills(&self) -> Option<Skills> {
        Some(Skills { folder: "/home/sprite/.codex/skills", installer_name: "codex" })
    }
}

/// `${NAME}` alone, which Codex reads from its environment.
fn variable(value: &str) -> Option<&str> {
    value.strip_prefix("${")?.strip_suffix('}')
}

fn mcp_server(transport: &McpTransport) -> Value {
    let limit = MCP_START_LIMIT.as_secs();
    match transport {
        McpTransport::Stdio { command, args, env } => {
            json!({ "command": command, "args": args, "env": env, "startup_timeout_sec": limit })
        }
        McpTransport::Url { url, headers } => {
            let mut server = Map::from_iter([
                ("url".to_owned(), json!(url)),
                ("startup_timeout_sec".to_owned(), json!(limit)),
            ]);
            let (mut literal, mut variables) = (Map::new(), Map::new());
            for (name, value) in headers {
                let bearer = value
                    .strip_prefix("Bearer ")
                    .and_then(variable)
                    .filter(|_| name.eq_ignore_ascii_case("authorization"));
                match (bearer, variable(value)) {
                    (Some(variable), _) => {
                        drop(server.insert("bearer_token_env_var".to_owned(), variable.into()))
                    }
                    (None, Some(variable)) => drop(variables.insert(name.clone(), variable.into())),
                    (None, None) => drop(literal.insert(name.clone(), json!(value))),
                }
            }
            for (name, headers) in [("http_headers", literal), ("env_http_headers", variables)] {
                if !headers.is_empty() {
                    server.insert(name.to_owned(), headers.into());
                }
            }
            server.into()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn mcp_servers_are_toml() {
        let headers =
            [("Authorization", "Bearer ${TOKEN}"), ("X-Key", "${KEY}"), ("X-Plain", "a \"b\"")];
        let headers = headers
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect::<BTreeMap<_, _>>();
        let transport = McpTransport::Url { url: "https://mcp.example".to_owned(), headers };
        let server = McpServer { name: "one".to_owned(), transport };
        let files = Codex.config_files(
            &[server],
            &ModelEndpoints { openai: Some("http://m/".to_owned()), ..ModelEndpoints::default() },
        );
        let config: Value = toml::from_str(&files[0].1).unwrap();
        let provider = &config["model_providers"][config["model_provider"].as_str().unwrap()];
        assert_eq!(
            (&provider["base_url"], &provider["supports_websockets"]),
            (&json!("http://m/v1"), &json!(false))
        );
        let expected = json!({ "url": "https://mcp.example", "startup_timeout_sec": 20, "bearer_token_env_var": "TOKEN", "env_http_headers": { "X-Key": "KEY" },
                               "http_headers": { "X-Plain": "a \"b\"" } });
        assert_eq!(config["mcp_servers"]["one"], expected);
    }
}
