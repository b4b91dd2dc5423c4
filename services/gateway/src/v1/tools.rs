//! `tools` of an agent: toolsets with policies, in and out, and the permissions that they become
//! (docs/managed-agents-api.md).
//!
//! Permissions name tools as each CLI does, and are what is enforced. A policy that a CLI cannot
//! enforce is refused. Pure.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use types::{
    McpServer, Permissions, Runtime,
    limits::BODY_BYTES_MAX,
    permissions::{Evaluation, PermissionRule},
};
use utoipa::ToSchema;

use crate::body::Fields;

/// Toolsets and custom tools of an agent.
const TOOLS_MAX: usize = 128;
const DESCRIPTION_CHARS_MAX: usize = 4096;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type")]
pub enum Tool {
    /// The tools of the CLI itself.
    #[serde(rename = "agent_toolset_20260401")]
    Agent { configs: Vec<AgentToolConfig>, default_config: Settings },
    /// The tools of one of the agent's MCP servers.
    #[serde(rename = "mcp_toolset")]
    Mcp { mcp_server_name: String, configs: Vec<McpToolConfig>, default_config: Settings },
    /// A tool that the client runs.
    #[serde(rename = "custom")]
    Custom {
        name: String,
        description: String,
        #[schema(value_type = Object)]
        input_schema: Map<String, Value>,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AgentToolConfig {
    name: String,
    /// The same as its name.
    r#type: String,
    #[serde(flatten)]
    settings: Settings,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct McpToolConfig {
    name: String,
    #[serde(flatten)]
    settings: Settings,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Settings {
    enabled: bool,
    permission_policy: Policy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Policy {
    AlwaysAllow,
    AlwaysAsk,
}

impl Settings {
    const ALLOW: Self = Self { enabled: true, permission_policy: Policy::AlwaysAllow };
    const ASK: Self = Self { enabled: true, permission_policy: Policy::AlwaysAsk };

    const fn evaluation(self) -> Evaluation {
        match self {
            Self { enabled: false, .. } => Evaluation::Deny,
            Self { permission_policy: Policy::AlwaysAsk, .. } => Evaluation::Ask,
            Self { permission_policy: Policy::AlwaysAllow, .. } => Evaluation::Allow,
        }
    }

    const fn of(evaluation: Evaluation) -> Self {
        match evaluation {
            Evaluation::Allow => Self::ALLOW,
            Evaluation::Ask => Self::ASK,
            Evaluation::Deny => Self { enabled: false, ..Self::ALLOW },
        }
    }
}

// --- reading -----------------------------------------------------------------------------------

/// The tools of a body, every field filled in.
pub fn read(fields: &mut Fields) -> Option<Vec<Tool>> {
    let tools: Vec<Tool> =
        fields.objects("tools", TOOLS_MAX, read_one)?.into_iter().flatten().collect();
    let identity = |tool: &Tool| match tool {
        Tool::Agent { .. } => ("agent_toolset_20260401", String::new()),
        Tool::Mcp { mcp_server_name, .. } => ("mcp_toolset", mcp_server_name.clone()),
        Tool::Custom { name, .. } => ("custom", name.clone()),
    };
    let mut identities: Vec<_> = tools.iter().map(identity).collect();
    identities.sort_unstable();
    if let Some([(kind, name), _]) = identities.array_windows().find(|[one, other]| one == other) {
        fields.refuse("tools", &format!("{kind} {name} is given twice"));
    }
    Some(tools)
}

fn read_one(item: &mut Fields) -> Option<Tool> {
    match item.named_string("type", BODY_BYTES_MAX)?.as_str() {
        "agent_toolset_20260401" => {
            item.allow_only(&["type", "configs", "default_config"]);
            let default_config = read_default(item, Settings::ALLOW);
            let configs = item.objects("configs", BUILT_IN.len(), |config| {
                config.allow_only(&["name", "type", "enabled", "permission_policy"]);
                let name = config.named_string("name", BODY_BYTES_MAX)?;
                if !BUILT_IN.contains(&name.as_str()) {
                    config.refuse("name", &format!("must be one of: {}", BUILT_IN.join(", ")));
                }
                if config.optional_string("type", BODY_BYTES_MAX).is_some_and(|kind| kind != name) {
                    config.refuse("type", "must be the same as name");
                }
                Some(AgentToolConfig {
                    r#type: name.clone(),
                    name,
                    settings: read_settings(config, default_config),
                })
            });
            let configs: Vec<_> = configs.unwrap_or_default().into_iter().flatten().collect();
            refuse_twice(item, configs.iter().map(|config| config.name.as_str()));
            Some(Tool::Agent { configs, default_config })
        }
        "mcp_toolset" => {
            item.allow_only(&["type", "mcp_server_name", "configs", "default_config"]);
            let mcp_server_name = item.named_string("mcp_server_name", BODY_BYTES_MAX)?;
            let default_config = read_default(item, Settings::ASK);
            let configs = item.objects("configs", TOOLS_MAX, |config| {
                config.allow_only(&["name", "enabled", "permission_policy"]);
                let name = config.named_string("name", BODY_BYTES_MAX)?;
                if !is_word(&name) {
                    config.refuse("name", "may hold 1 to 128 letters, digits, '_' and '-'");
                }
                Some(McpToolConfig { name, settings: read_settings(config, default_config) })
            });
            let configs: Vec<_> = configs.unwrap_or_default().into_iter().flatten().collect();
            refuse_twice(item, configs.iter().map(|config| config.name.as_str()));
            Some(Tool::Mcp { mcp_server_name, configs, default_config })
        }
        "custom" => {
            item.allow_only(&["type", "name", "description", "input_schema"]);
            let name = item.named_string("name", BODY_BYTES_MAX)?;
            if !is_word(&name) {
                item.refuse("name", "may hold 1 to 128 letters, digits, '_' and '-'");
            }
            let description =
                item.named_string("description", DESCRIPTION_CHARS_MAX).unwrap_or_default();
            let input_schema = item.object("input_schema").unwrap_or_default();
            if input_schema.get("type").and_then(Value::as_str) != Some("object") {
                item.refuse("input_schema", "its type must be 'object'");
            }
            Some(Tool::Custom { name, description, input_schema })
        }
        _ => {
            item.refuse("type", "must be 'agent_toolset_20260401', 'mcp_toolset' or 'custom'");
            None
        }
    }
}

fn refuse_twice<'a>(item: &mut Fields, names: impl Iterator<Item = &'a str>) {
    let mut names: Vec<_> = names.collect();
    names.sort_unstable();
    if let Some([name, _]) = names.array_windows().find(|[one, other]| one == other) {
        item.refuse("configs", &format!("{name} is given twice"));
    }
}

/// `^[A-Za-z0-9_-]{1,128}$`: CLIs build the names of tools from such words without changing them.
pub fn is_word(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && text.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_' || c == b'-')
}

fn read_default(item: &mut Fields, default: Settings) -> Settings {
    let read = item.nested("default_config", |config| {
        config.allow_only(&["enabled", "permission_policy"]);
        read_settings(config, default)
    });
    read.unwrap_or(default)
}

fn read_settings(config: &mut Fields, default: Settings) -> Settings {
    let enabled = match config.value("enabled") {
        None => default.enabled,
        Some(Value::Bool(enabled)) => *enabled,
        Some(_) => {
            config.refuse("enabled", "must be true or false");
            default.enabled
        }
    };
    let policy = config.nested("permission_policy", |policy| {
        policy.allow_only(&["type"]);
        match policy.named_string("type", BODY_BYTES_MAX)?.as_str() {
            "always_allow" => Some(Policy::AlwaysAllow),
            "always_ask" => Some(Policy::AlwaysAsk),
            "auto" => {
                policy.refuse("type", "the policy 'auto' is not supported");
                None
            }
            _ => {
                policy.refuse("type", "must be 'always_allow' or 'always_ask'");
                None
            }
        }
    });
    Settings { enabled, permission_policy: policy.flatten().unwrap_or(default.permission_policy) }
}

// --- permissions -------------------------------------------------------------------------------

/// The names of built-in tools in the API.
const BUILT_IN: [&str; 8] =
    ["bash", "read", "write", "edit", "glob", "grep", "web_fetch", "web_search"];

/// What a CLI has for a built-in tool of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counterpart {
    /// Tools of these names, each of which it can be asked about.
    Named(&'static [&'static str]),
    /// It does this by another tool of the API: what that one may do, this one may.
    PartOf(&'static str),
    /// A tool that is used without being asked about.
    Unasked,
}

/// A test of the agent host proves the names (`tools/agent-host/tests/it/clis.rs`);
/// docs/managed-agents-api.md shows this table.
pub fn counterpart(runtime: Runtime, tool: &str) -> Counterpart {
    use Counterpart::{Named, PartOf, Unasked};
    match (runtime, tool) {
        (Runtime::Claude, "bash") => Named(&["Bash"]),
        (Runtime::Claude, "read") => Named(&["Read"]),
        (Runtime::Claude, "write") => Named(&["Write"]),
        (Runtime::Claude, "edit") => Named(&["Edit", "MultiEdit", "NotebookEdit"]),
        (Runtime::Claude, "glob") => Named(&["Glob"]),
        (Runtime::Claude, "grep") => Named(&["Grep"]),
        (Runtime::Claude, "web_fetch") => Named(&["WebFetch"]),
        (Runtime::Claude, "web_search") => Named(&["WebSearch"]),
        (Runtime::Codex, "bash") => Named(&["shell"]),
        (Runtime::Codex, "write" | "edit") => Named(&["apply_patch"]),
        (Runtime::Codex, "read" | "glob" | "grep" | "web_fetch") => PartOf("bash"),
        (Runtime::Gemini, "bash") => Named(&["run_shell_command"]),
        (Runtime::Gemini, "write") => Named(&["write_file"]),
        (Runtime::Gemini, "edit") => Named(&["replace"]),
        (Runtime::Gemini, "web_fetch") => Named(&["web_fetch"]),
        (Runtime::Opencode, "bash") => Named(&["bash"]),
        (Runtime::Opencode, "read") => Named(&["read"]),
        (Runtime::Opencode, "write") => Named(&["write"]),
        (Runtime::Opencode, "edit") => Named(&["edit", "patch", "multiedit"]),
        (Runtime::Opencode, "glob") => Named(&["glob"]),
        (Runtime::Opencode, "grep") => Named(&["grep"]),
        (Runtime::Opencode, "web_fetch") => Named(&["webfetch"]),
        (Runtime::Opencode, "web_search") => Named(&["websearch"]),
        _ => Unasked,
    }
}

/// How a CLI begins the names of a server's tools.
fn prefix(runtime: Runtime, server: &str) -> String {
    match runtime {
        Runtime::Claude | Runtime::Codex | Runtime::Shell => format!("mcp__{server}__"),
        Runtime::Gemini => format!("mcp_{server}_"),
        Runtime::Opencode => format!("{server}_"),
    }
}

/// Why tools cannot be given to an agent: the field, and a sentence that names the runtime.
#[derive(Debug, PartialEq, Eq)]
pub struct Unenforceable {
    pub field: String,
    pub why: String,
}

/// The permissions that tools become; their time-out stays as it is in `current`.
///
/// # Errors
/// When a toolset names no server, a server has no toolset, or the runtime cannot enforce a policy.
pub fn permissions(
    runtime: Runtime,
    tools: &[Tool],
    servers: &[McpServer],
    current: &Permissions,
) -> Result<Permissions, Unenforceable> {
    let refused = |field: String, why: String| Err(Unenforceable { field, why });
    let toolset = tools.iter().enumerate().find_map(|(at, tool)| match tool {
        Tool::Agent { configs, default_config } => Some((at, configs, *default_config)),
        _ => None,
    });
    // An agent without the toolset has none of the CLI's tools, as far as the CLI asks about them.
    let without = if runtime.capabilities().permission_requests {
        Evaluation::Deny
    } else {
        Evaluation::Allow
    };
    let default = toolset.map_or(without, |(_, _, default)| default.evaluation());
    let mut rules: Vec<PermissionRule> = Vec::new();
    if let Some((at, configs, _)) = toolset {
        let config = |tool: &str| configs.iter().position(|config| config.name == tool);
        let evaluation = |tool: &str| {
            config(tool)
                .and_then(|at| configs.get(at))
                .map_or(default, |config| config.settings.evaluation())
        };
        for tool in BUILT_IN {
            let wanted = evaluation(tool);
            let field = match config(tool) {
                Some(config) => format!("tools[{at}].configs[{config}]"),
                None => format!("tools[{at}].default_config"),
            };
            match counterpart(runtime, tool) {
                Counterpart::Named(names) => {
                    for name in names {
                        let rule = PermissionRule { tool: (*name).to_owned(), evaluation: wanted };
                        match rules.iter().find(|earlier| earlier.tool == *name) {
                            Some(earlier) if earlier.evaluation != wanted => {
                                let why = format!(
                                    "runtime {runtime} has one tool, {name}, for {tool} and another: give both the same policy"
                                );
                                return refused(field, why);
                            }
                            Some(_) => {}
                            None => rules.push(rule),
                        }
                    }
                }
                Counterpart::PartOf(other)
                    if strictness(wanted) > strictness(evaluation(other)) =>
                {
                    return refused(
                        field,
                        format!(
                            "runtime {runtime} does {tool} by {other}, which has a weaker policy"
                        ),
                    );
                }
                Counterpart::PartOf(_) => {}
                Counterpart::Unasked if wanted != Evaluation::Allow => {
                    let why = format!(
                        "runtime {runtime} does not ask about {tool}: its policy can only be always_allow"
                    );
                    return refused(field, why);
                }
                Counterpart::Unasked => {}
            }
        }
        rules.retain(|rule| rule.evaluation != default);
    }
    for (at, tool) in tools.iter().enumerate() {
        let Tool::Mcp { mcp_server_name, configs, default_config } = tool else { continue };
        if !servers.iter().any(|server| server.name == *mcp_server_name) {
            return refused(
                format!("tools[{at}].mcp_server_name"),
                format!("no entry of mcp_servers has the name {mcp_server_name}"),
            );
        }
        let prefix = prefix(runtime, mcp_server_name);
        let exact =
            configs.iter().map(|config| (format!("{prefix}{}", config.name), config.settings));
        let rest = (format!("{prefix}*"), *default_config);
        rules.extend(
            exact
                .chain([rest])
                .map(|(tool, settings)| PermissionRule { tool, evaluation: settings.evaluation() }),
        );
    }
    if let Some(at) = tools
        .iter()
        .position(|tool| matches!(tool, Tool::Custom { .. }))
        .filter(|_| runtime == Runtime::Shell)
    {
        return refused(
            format!("tools[{at}].type"),
            format!("runtime {runtime} has no model that could use a custom tool"),
        );
    }
    let has_toolset = |name: &str| {
        tools.iter().any(
            |tool| matches!(tool, Tool::Mcp { mcp_server_name, .. } if mcp_server_name == name),
        )
    };
    if let Some((at, server)) =
        servers.iter().enumerate().find(|(_, server)| !has_toolset(&server.name))
    {
        return refused(
            format!("mcp_servers[{at}]"),
            format!("{} has no mcp_toolset in tools", server.name),
        );
    }
    if default == Evaluation::Allow && rules.iter().all(|rule| rule.evaluation == Evaluation::Allow)
    {
        rules.clear();
    }
    Ok(Permissions {
        default,
        rules,
        timeout_seconds: current.timeout_seconds,
        on_timeout: current.on_timeout,
    })
}

fn strictness(evaluation: Evaluation) -> u8 {
    match evaluation {
        Evaluation::Allow => 0,
        Evaluation::Ask => 1,
        Evaluation::Deny => 2,
    }
}

/// An agent's tools: the list that was sent, while it still means the agent's permissions;
/// otherwise the one that they mean.
pub fn shown(
    runtime: Runtime,
    sent: &str,
    permissions: &Permissions,
    servers: &[McpServer],
) -> Vec<Tool> {
    let sent: Vec<Tool> = serde_json::from_str(sent).unwrap_or_default();
    let means = |tools: &[Tool]| {
        self::permissions(runtime, tools, servers, permissions)
            .is_ok_and(|meant| meant == *permissions)
    };
    if !sent.is_empty() && means(&sent) {
        return sent;
    }
    let mut tools = derived(runtime, permissions, servers);
    tools.extend(sent.into_iter().filter(|tool| matches!(tool, Tool::Custom { .. })));
    tools
}

fn derived(runtime: Runtime, permissions: &Permissions, servers: &[McpServer]) -> Vec<Tool> {
    let named = BUILT_IN.into_iter().filter_map(|tool| match counterpart(runtime, tool) {
        Counterpart::Named(names) => Some((tool, permissions.evaluate(names.first()?))),
        _ => None,
    });
    let configs: Vec<_> = named
        .filter(|(_, evaluation)| *evaluation != permissions.default)
        .map(|(tool, evaluation)| AgentToolConfig {
            name: tool.to_owned(),
            r#type: tool.to_owned(),
            settings: Settings::of(evaluation),
        })
        .collect();
    let mut tools = Vec::new();
    if permissions.default != Evaluation::Deny || !configs.is_empty() {
        tools.push(Tool::Agent { configs, default_config: Settings::of(permissions.default) });
    }
    tools.extend(servers.iter().map(|server| {
        let prefix = prefix(runtime, &server.name);
        let default = permissions.evaluate(&prefix);
        let configs = permissions.rules.iter().filter_map(|rule| {
            let name = rule
                .tool
                .strip_prefix(&prefix)
                .filter(|name| !name.is_empty() && !name.ends_with('*'))?;
            let evaluation = permissions.evaluate(&rule.tool);
            (evaluation != default).then(|| McpToolConfig {
                name: name.to_owned(),
                settings: Settings::of(evaluation),
            })
        });
        Tool::Mcp {
            mcp_server_name: server.name.clone(),
            configs: configs.collect(),
            default_config: Settings::of(default),
        }
    }));
    tools
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::body::Body;

    fn parsed(tools: Value) -> Result<Vec<Tool>, ()> {
        let mut fields = Body::from_json(&json!({ "tools": tools })).fields().unwrap();
        let tools = read(&mut fields).unwrap_or_default();
        fields.finish().map(|()| tools).map_err(|_| ())
    }

    fn servers(names: &[&str]) -> Vec<McpServer> {
        let server = |name: &&str| {
            serde_json::from_value(json!({ "name": name, "type": "url", "url": "https://x" }))
                .unwrap()
        };
        names.iter().map(server).collect()
    }

    fn meant(runtime: Runtime, tools: Value, names: &[&str]) -> Result<Value, String> {
        let tools = parsed(tools).unwrap();
        let permissions = permissions(runtime, &tools, &servers(names), &Permissions::default());
        permissions
            .map(|meant| serde_json::to_value(meant).unwrap())
            .map_err(|refused| format!("{}: {}", refused.field, refused.why))
    }

    /// What docs/managed-agents-api.md says of tools, from what is enforced.
    fn table() -> String {
        let cell = |runtime: Runtime, name: &str| match counterpart(runtime, name) {
            Counterpart::Named(names) => {
                names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
            }
            Counterpart::PartOf(other) => format!("as `{other}`"),
            Counterpart::Unasked if runtime == Runtime::Shell => "-".to_owned(),
            Counterpart::Unasked => "`always_allow` only".to_owned(),
        };
        let takes = |runtime: Runtime, tools: Value, names: &[&str]| {
            if meant(runtime, tools, names).is_ok() { "yes" } else { "no" }
        };
        let custom = json!([{ "type": "custom", "name": "a", "description": "b", "input_schema": { "type": "object" } }]);
        let asks = json!([{ "type": "mcp_toolset", "mcp_server_name": "a" }]);
        let mut rows = vec![("|".to_owned(), Runtime::ALL.map(|runtime| runtime.to_string()))];
        rows.push(("|".to_owned() + " ---", Runtime::ALL.map(|_| "---".to_owned())));
        rows.extend(
            BUILT_IN.map(|name| {
                (format!("| `{name}`"), Runtime::ALL.map(|runtime| cell(runtime, name)))
            }),
        );
        let mut row = |what: &str, says: &dyn Fn(Runtime) -> &'static str| {
            rows.push((format!("| {what}"), Runtime::ALL.map(|runtime| says(runtime).to_owned())));
        };
        row("custom tools", &|runtime| takes(runtime, custom.clone(), &[]));
        row("`always_ask` for an MCP server's tools", &|runtime| match runtime {
            Runtime::Shell => "-",
            _ => takes(runtime, asks.clone(), &["a"]),
        });
        row("`deny_message`", &|runtime| {
            if runtime.capabilities().deny_with_message { "yes" } else { "no" }
        });
        rows.into_iter()
            .map(|(what, cells)| format!("{what} | {} |\n", cells.join(" | ")))
            .collect()
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "what insta reads too")]
    fn the_table_of_tools_matches_the_code_that_enforces_it() {
        const MARKERS: [&str; 2] = ["<!-- tools: begin -->\n", "<!-- tools: end -->"];
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/managed-agents-api.md");
        let document = std::fs::read_to_string(path).unwrap();
        let (before, rest) = document.split_once(MARKERS[0]).unwrap();
        let (_, after) = rest.split_once(MARKERS[1]).unwrap();
        let expected = [before, MARKERS[0], &table(), MARKERS[1], after].concat();
        if std::env::var("INSTA_UPDATE").is_ok_and(|update| update == "always") {
            std::fs::write(path, expected).unwrap();
        } else {
            assert!(
                document == expected,
                "run: INSTA_UPDATE=always cargo test -p gateway the_document"
            );
        }
    }

    #[test]
    fn every_field_is_filled_in() {
        let tools = parsed(
            json!([{ "type": "agent_toolset_20260401", "configs": [{ "name": "bash", "enabled": false }] },
                                  { "type": "mcp_toolset", "mcp_server_name": "a" }]),
        );
        let (allow, ask) = (json!({ "type": "always_allow" }), json!({ "type": "always_ask" }));
        let expected = json!([
            { "type": "agent_toolset_20260401", "default_config": { "enabled": true, "permission_policy": allow },
              "configs": [{ "name": "bash", "type": "bash", "enabled": false, "permission_policy": allow }] },
            { "type": "mcp_toolset", "mcp_server_name": "a", "configs": [],
              "default_config": { "enabled": true, "permission_policy": ask } },
        ]);
        assert_eq!(serde_json::to_value(tools.unwrap()).unwrap(), expected);
    }

    #[test]
    fn unknown_values_are_refused() {
        for tools in [
            json!([{ "type": "nope" }]),
            json!([{}]),
            json!([5]),
            json!([{ "type": "agent_toolset_20260401" }, { "type": "agent_toolset_20260401" }]),
            json!([{ "type": "agent_toolset_20260401", "x": 1 }]),
            json!([{ "type": "agent_toolset_20260401", "configs": [{ "name": "nope" }] }]),
            json!([{ "type": "agent_toolset_20260401", "configs": [{ "name": "bash" }, { "name": "bash" }] }]),
            json!([{ "type": "agent_toolset_20260401", "configs": [{ "name": "web_search", "allowed_domains": ["x.org"] }] }]),
            json!([{ "type": "agent_toolset_20260401", "default_config": { "permission_policy": { "type": "auto" } } }]),
            json!([{ "type": "agent_toolset_20260401", "default_config": { "enabled": "yes" } }]),
        ] {
            assert!(parsed(tools.clone()).is_err(), "{tools}");
        }
    }

    #[test]
    fn a_policy_becomes_rules_in_the_words_of_the_cli() {
        let ask = |name: &str| {
            json!([{ "type": "agent_toolset_20260401",
                                        "configs": [{ "name": name, "permission_policy": { "type": "always_ask" } }] }])
        };
        let rules = |names: &[&str]| {
            let rules: Vec<_> =
                names.iter().map(|name| json!({ "tool": name, "evaluation": "ask" })).collect();
            Ok(json!({ "default": "allow", "rules": rules }))
        };
        assert_eq!(meant(Runtime::Claude, ask("bash"), &[]), rules(&["Bash"]));
        assert_eq!(meant(Runtime::Codex, ask("bash"), &[]), rules(&["shell"]));
        assert_eq!(meant(Runtime::Gemini, ask("bash"), &[]), rules(&["run_shell_command"]));
        assert_eq!(meant(Runtime::Opencode, ask("bash"), &[]), rules(&["bash"]));
        let everything = json!([{ "type": "agent_toolset_20260401" }]);
        for runtime in Runtime::ALL {
            assert_eq!(
                meant(runtime, everything.clone(), &[]),
                Ok(json!({ "default": "allow", "rules": [] }))
            );
        }
        let refused = meant(Runtime::Gemini, ask("read"), &[]).unwrap_err();
        assert!(refused.starts_with("tools[0].configs[0]: runtime gemini"), "{refused}");
        let refused = meant(Runtime::Codex, ask("write"), &[]).unwrap_err();
        assert!(refused.contains("runtime codex has one tool, apply_patch"), "{refused}");
        assert!(meant(Runtime::Codex, ask("read"), &[]).unwrap_err().contains("by bash"));
        assert!(
            meant(Runtime::Codex, ask("web_search"), &[]).unwrap_err().contains("runtime codex")
        );
    }

    #[test]
    fn a_servers_tools_are_asked_about_unless_the_toolset_says_otherwise() {
        let tools = json!([{ "type": "agent_toolset_20260401" },
            { "type": "mcp_toolset", "mcp_server_name": "a", "configs": [{ "name": "x", "permission_policy": { "type": "always_allow" } }] }]);
        let rules = json!([{ "tool": "mcp__a__x", "evaluation": "allow" }, { "tool": "mcp__a__*", "evaluation": "ask" }]);
        assert_eq!(
            meant(Runtime::Claude, tools.clone(), &["a"]),
            Ok(json!({ "default": "allow", "rules": rules }))
        );
        assert!(
            meant(Runtime::Claude, tools.clone(), &[])
                .unwrap_err()
                .starts_with("tools[1].mcp_server_name")
        );
        assert!(
            meant(Runtime::Claude, tools, &["a", "b"]).unwrap_err().starts_with("mcp_servers[1]")
        );
    }

    #[test]
    fn tools_that_no_longer_mean_the_permissions_are_shown_as_the_permissions_are() {
        let sent = r#"[{"type":"agent_toolset_20260401","configs":[],"default_config":{"enabled":true,"permission_policy":{"type":"always_allow"}}}]"#;
        let permissions = |text: &str| serde_json::from_str::<Permissions>(text).unwrap();
        let all = shown(Runtime::Claude, sent, &permissions("{}"), &[]);
        assert_eq!(serde_json::to_string(&all).unwrap(), sent);
        let some = shown(
            Runtime::Claude,
            sent,
            &permissions(r#"{"rules":[{"tool":"Ba*","evaluation":"deny"}]}"#),
            &[],
        );
        assert_eq!(serde_json::to_value(some).unwrap()[0]["configs"][0]["enabled"], false);
        assert_eq!(shown(Runtime::Claude, "", &permissions(r#"{"default":"deny"}"#), &[]), []);
    }

    fn settings() -> impl Strategy<Value = Value> {
        (any::<bool>(), any::<bool>())
            .prop_map(|(enabled, ask)| json!({ "enabled": enabled, "permission_policy": { "type": if ask { "always_ask" } else { "always_allow" } } }))
    }

    proptest! {
        /// Whatever is enforced is shown as it is enforced.
        #[test]
        fn derived_tools_mean_the_same_permissions(default in settings(), configs in prop::collection::btree_map(0..8_usize, settings(), 0..8),
                                                   server in settings(), runtime in 0..4_usize) {
            let runtime = Runtime::AGENTS[runtime];
            let configs: Vec<_> = configs.into_iter().map(|(at, mut config)| { config["name"] = BUILT_IN[at].into(); config }).collect();
            let tools = parsed(json!([{ "type": "agent_toolset_20260401", "default_config": default, "configs": configs },
                                      { "type": "mcp_toolset", "mcp_server_name": "a", "default_config": server }])).unwrap();
            let servers = servers(&["a"]);
            if let Ok(meant) = permissions(runtime, &tools, &servers, &Permissions::default()) {
                let shown = shown(runtime, "", &meant, &servers);
                let again = permissions(runtime, &shown, &servers, &Permissions::default());
                for tool in BUILT_IN {
                    if let (Counterpart::Named(names), Ok(again)) = (counterpart(runtime, tool), &again) {
                        prop_assert_eq!(again.evaluate(names[0]), meant.evaluate(names[0]), "{} {}", runtime, tool);
                    }
                }
                let name = format!("{}x", prefix(runtime, "a"));
                prop_assert!(again.is_err() || again.unwrap().evaluate(&name) == meant.evaluate(&name));
            }
        }
    }
}
