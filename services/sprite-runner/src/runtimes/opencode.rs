//! opencode: models of every provider.

use contract::session::Usage;
use serde_json::{Map, Value, json};
use types::{McpServer, Provider, agent::McpTransport};

use super::{Adapter, CONVERSATION, Launch, Skills, SystemPrompt, first_id, limited_command};
use crate::{
    ModelEndpoints,
    usage::{Printed, Reader, micro_dollars, number},
};

pub struct Opencode;

impl Adapter for Opencode {
    fn executable(&self) -> Option<&'static str> {
        Some("opencode")
    }

    fn begin(&self, launch: &Launch<'_>) -> Vec<String> {
        // A model that fails is tried again without a word, but in the log.
        ["opencode", "run", "--auto", "--format", "json", "--print-logs", "--log-level", "ERROR", "--model", launch.model]
            .map(str::to_owned)
            .into()
    }

    fn resume(&self, launch: &Launch<'_>) -> Vec<String> {
        let mut argv = self.begin(launch);
        argv.extend(["--session", CONVERSATION].map(str::to_owned));
        argv
    }

    /// It chooses the id itself, and says it with everything it prints.
    fn find_conversation(&self, _: &Launch<'_>) -> String {
        first_id("sessionID")
    }

    /// It knows Google's key by another name.
    fn prepare(&self) -> &'static str {
        "[ -z \"$GEMINI_API_KEY\" ] || export GOOGLE_GENERATIVE_AI_API_KEY=\"${GOOGLE_GENERATIVE_AI_API_KEY:-$GEMINI_API_KEY}\""
    }

    fn system_prompt(&self) -> SystemPrompt {
        SystemPrompt::Instructions("/home/sprite/.config/opencode/AGENTS.md")
    }

    fn env(&self, _: &ModelEndpoints) -> Vec<(String, String)> {
        // Its own list of models, rather than one that a sandbox may not reach.
        ["OPENCODE_DISABLE_MODELS_FETCH", "OPENCODE_DISABLE_AUTOUPDATE"].map(|name| (name.to_owned(), "1".to_owned())).into()
    }

    fn config_files(&self, mcp_servers: &[McpServer], models: &ModelEndpoints, _: &str) -> Vec<(&'static str, String)> {
        let versions =
            [(Provider::Anthropic, "anthropic", "v1"), (Provider::Openai, "openai", "v1"), (Provider::Google, "google", "v1beta")];
        let providers = versions.into_iter().filter_map(|(provider, name, version)| {
            let url = models.base_url(provider)?.trim_end_matches('/');
            Some((name.to_owned(), json!({ "options": { "baseURL": format!("{url}/{version}") } })))
        });
        let servers: Map<String, Value> = mcp_servers.iter().map(|server| (server.name.clone(), mcp_server(&server.transport))).collect();
        let config = json!({
            "$schema": "https://opencode.ai/config.json",
            "share": "disabled",
            "autoupdate": false,
            "provider": Map::from_iter(providers),
            "mcp": servers,
        });
        vec![("/home/sprite/.config/opencode/opencode.json", config.to_string())]
    }

    fn usage(&self) -> Option<Reader> {
        Some(usage)
    }

    fn skills(&self) -> Option<Skills> {
        Some(Skills { folder: "/home/sprite/.config/opencode/skills", installer_name: "opencode" })
    }
}

/// It reports each step, and not their sum.
fn usage(printed: &Printed) -> Option<Usage> {
    let is_step = |record: &&Value| record.get("type").and_then(Value::as_str) == Some("step_finish");
    let steps: Vec<&Value> = printed.records.iter().filter(is_step).collect();
    if steps.is_empty() || !printed.whole {
        return None;
    }
    let total = |name: &str| -> u64 { steps.iter().filter_map(|step| number(step, &format!("/part/tokens/{name}"))).sum() };
    let costs: Vec<u64> = steps.iter().filter_map(|step| micro_dollars(step, "/part/cost")).collect();
    Some(Usage {
        input_tokens: Some(["input", "cache/read", "cache/write"].map(total).iter().sum()),
        output_tokens: Some(["output", "reasoning"].map(total).iter().sum()),
        cost_micro_usd: (!costs.is_empty()).then(|| costs.iter().sum()),
        model: None,
        ..Usage::default()
    })
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
            let headers: Map<String, Value> = headers.iter().map(|(name, value)| (name.clone(), env_references(value).into())).collect();
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
