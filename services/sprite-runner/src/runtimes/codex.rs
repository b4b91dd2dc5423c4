//! Codex CLI.

use contract::session::Usage;
use serde_json::{Map, Value, json};
use types::{McpServer, Provider, agent::McpTransport};

use super::{Adapter, CONVERSATION, Launch, MCP_START_LIMIT, Skills, SystemPrompt, first_id};
use crate::{
    ModelEndpoints,
    usage::{Printed, Reader, number},
};

pub struct Codex;

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

impl Adapter for Codex {
    fn executable(&self) -> Option<&'static str> {
        Some("codex")
    }

    fn begin(&self, launch: &Launch<'_>) -> Vec<String> {
        words(&[
            "codex",
            "exec",
            "-m",
            launch.model_id,
            "--dangerously-bypass-approvals-and-sandbox",
            "--skip-git-repo-check",
            "--json",
            "-",
        ])
    }

    fn resume(&self, launch: &Launch<'_>) -> Vec<String> {
        let mut argv = self.begin(launch);
        argv.splice(2..2, words(&["resume"]));
        argv.splice(argv.len() - 1.., words(&[CONVERSATION, "-"]));
        argv
    }

    /// It chooses the id itself, and says it first.
    fn find_conversation(&self, _: &Launch<'_>) -> String {
        first_id("thread_id")
    }

    /// It takes its key from a file of its own, which it writes with mode 0600.
    fn prepare(&self) -> &'static str {
        "[ -z \"$OPENAI_API_KEY\" ] || (said=$(printenv OPENAI_API_KEY | codex login --with-api-key 2>&1) || echo \"$said\" >&2)"
    }

    fn system_prompt(&self) -> SystemPrompt {
        SystemPrompt::Settings
    }

    fn env(&self, _: &ModelEndpoints) -> Vec<(String, String)> {
        Vec::new()
    }

    fn config_files(&self, mcp_servers: &[McpServer], models: &ModelEndpoints, system: &str) -> Vec<(&'static str, String)> {
        let mut config = Map::from_iter([
            ("check_for_update_on_startup".to_owned(), json!(false)),
            ("analytics".to_owned(), json!({ "enabled": false })),
        ]);
        if !system.is_empty() {
            config.insert("developer_instructions".to_owned(), system.into());
        }
        if let Some(url) = models.base_url(Provider::Openai) {
            config.insert("openai_base_url".to_owned(), format!("{}/v1", url.trim_end_matches('/')).into());
        }
        let servers: Map<String, Value> = mcp_servers.iter().map(|server| (server.name.clone(), mcp_server(&server.transport))).collect();
        if !servers.is_empty() {
            config.insert("mcp_servers".to_owned(), servers.into());
        }
        // Text, numbers and tables of them: all of it can be TOML.
        vec![("/home/sprite/.codex/config.toml", toml::to_string(&config).unwrap_or_default())]
    }

    fn usage(&self) -> Option<Reader> {
        Some(usage)
    }

    fn skills(&self) -> Option<Skills> {
        Some(Skills { folder: "/home/sprite/.codex/skills", installer_name: "codex" })
    }
}

fn usage(printed: &Printed) -> Option<Usage> {
    let completed = printed.last("turn.completed")?;
    Some(Usage {
        input_tokens: number(completed, "/usage/input_tokens"),
        output_tokens: number(completed, "/usage/output_tokens"),
        ..Usage::default()
    })
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
            let mut server = Map::from_iter([("url".to_owned(), json!(url)), ("startup_timeout_sec".to_owned(), json!(limit))]);
            let (mut literal, mut variables) = (Map::new(), Map::new());
            for (name, value) in headers {
                let bearer = value.strip_prefix("Bearer ").and_then(variable).filter(|_| name.eq_ignore_ascii_case("authorization"));
                match (bearer, variable(value)) {
                    (Some(variable), _) => drop(server.insert("bearer_token_env_var".to_owned(), variable.into())),
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
    fn a_later_turn_resumes_the_conversation_by_its_id() {
        let launch = Launch { model_id: "gpt-x", model: "openai/gpt-x", conversation_id: "c0ffee", prompt_path: "/p" };
        assert!(Codex.begin(&launch).join(" ").starts_with("codex exec -m gpt-x "));
        let resumed = Codex.resume(&launch).join(" ");
        assert!(resumed.starts_with("codex exec resume -m gpt-x ") && resumed.ends_with(&format!("{CONVERSATION} -")), "{resumed}");
    }

    #[test]
    fn mcp_servers_are_toml() {
        let headers = [("Authorization", "Bearer ${TOKEN}"), ("X-Key", "${KEY}"), ("X-Plain", "a \"b\"")];
        let headers = headers.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect::<BTreeMap<_, _>>();
        let transport = McpTransport::Url { url: "https://mcp.example".to_owned(), headers };
        let server = McpServer { name: "one".to_owned(), transport };
        let files = Codex.config_files(
            &[server],
            &ModelEndpoints { openai: Some("http://m/".to_owned()), ..ModelEndpoints::default() },
            "Be \"brief\".\n",
        );
        let config: Value = toml::from_str(&files[0].1).unwrap();
        assert_eq!(config["developer_instructions"], "Be \"brief\".\n");
        assert_eq!(config["openai_base_url"], "http://m/v1");
        let expected = json!({ "url": "https://mcp.example", "startup_timeout_sec": 20, "bearer_token_env_var": "TOKEN", "env_http_headers": { "X-Key": "KEY" },
                               "http_headers": { "X-Plain": "a \"b\"" } });
        assert_eq!(config["mcp_servers"]["one"], expected);
    }
}
