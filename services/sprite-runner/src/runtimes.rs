//! What each agent CLI needs in its Sprite before the agent host starts it: one file each, behind
//! one small trait. A new one is a file here, a line in [`adapter`], and an adapter of the agent
//! host.

mod claude;
mod codex;
mod gemini;
mod opencode;
mod shell;

use std::{collections::BTreeSet, time::Duration};

use types::{McpServer, Runtime};

use crate::ModelEndpoints;

/// An MCP server that has not started by then is left out if the CLI supports that, so that a turn
/// does not wait for it.
pub const MCP_START_LIMIT: Duration = Duration::from_secs(20);

/// Runs an MCP server that has to answer within a limit.
pub const MCP_START_PATH: &str = "/var/lib/aod/mcp-start.pl";
/// Where that program writes which servers did not start.
pub const MCP_FAILURES: &str = "/home/sprite/.aod/mcp-failures";
pub const MCP_START: &str = include_str!("../scripts/mcp-start.pl");

/// An MCP server's command, under [`MCP_START_LIMIT`]: for CLIs whose own limit is as long as that
/// of a call.
fn limited_command(command: &str, args: &[String]) -> Vec<String> {
    let limited =
        ["perl", MCP_START_PATH, MCP_FAILURES, &MCP_START_LIMIT.as_secs().to_string(), command]
            .map(str::to_owned);
    limited.into_iter().chain(args.iter().cloned()).collect()
}

/// Names as every CLI takes them: ASCII letters, digits, `_` and `-`. Names that become the same
/// get numbers.
pub fn mcp_names(mut servers: Vec<McpServer>) -> Vec<McpServer> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    // Names that need no change have the first right to them.
    let mut taken: BTreeSet<String> = servers
        .iter()
        .filter(|server| server.name.chars().all(allowed))
        .map(|server| server.name.clone())
        .collect();
    for server in servers.iter_mut().filter(|server| !server.name.chars().all(allowed)) {
        let plain: String = server.name.chars().map(|c| if allowed(c) { c } else { '_' }).collect();
        let numbered = (2_u32..).map(|number| format!("{plain}_{number}"));
        let name = std::iter::once(plain.clone())
            .chain(numbered)
            .find(|name| !taken.contains(name))
            .unwrap_or_default();
        taken.insert(name.clone());
        server.name = name;
    }
    servers
}

/// Where skills go.
#[derive(Clone, Copy, Debug)]
pub struct Skills {
    /// One folder for each skill, with its `SKILL.md`.
    pub folder: &'static str,
    /// What the installer of skills from GitHub calls the CLI.
    pub installer_name: &'static str,
}

/// How one CLI is set up; the agent host runs it.
pub trait Adapter: Sync {
    /// What must be on the Sprite's PATH, where anything must.
    fn executable(&self) -> Option<&'static str>;
    /// Variables that are no secrets.
    fn env(&self, _: &ModelEndpoints) -> Vec<(String, String)> {
        Vec::new()
    }
    /// Files to write before the first turn, by absolute path. They may hold the secrets of MCP
    /// servers.
    fn config_files(
        &self,
        mcp_servers: &[McpServer],
        models: &ModelEndpoints,
    ) -> Vec<(&'static str, String)>;
    /// Whether its protocol reports which MCP servers did not start.
    fn tells_of_mcp_servers(&self) -> bool {
        true
    }
    /// Where the CLI finds skills, if it knows any.
    fn skills(&self) -> Option<Skills>;
}

/// The adapter of a runtime.
#[must_use]
pub fn adapter(runtime: Runtime) -> &'static dyn Adapter {
    match runtime {
        Runtime::Claude => &claude::Claude,
        Runtime::Codex => &codex::Codex,
        Runtime::Gemini => &gemini::Gemini,
        Runtime::Opencode => &opencode::Opencode,
        Runtime::Shell => &shell::Shell,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use types::agent::McpTransport;

    use super::*;

    fn named(names: &[String]) -> Vec<String> {
        let transport =
            McpTransport::Url { url: String::new(), headers: std::collections::BTreeMap::new() };
        let servers = names
            .iter()
            .map(|name| McpServer { name: name.clone(), transport: transport.clone() })
            .collect();
        mcp_names(servers).into_iter().map(|server| server.name).collect()
    }

    #[test]
    fn mcp_servers_get_names_that_every_cli_accepts() {
        let names =
            ["Salesforce DX", "na\u{ef}ve", "a_b", "a b", "a.b", "\u{6d77}"].map(str::to_owned);
        assert_eq!(named(&names), ["Salesforce_DX", "na_ve", "a_b", "a_b_2", "a_b_3", "_"]);
    }

    proptest! {
        #[test]
        fn mapped_names_are_plain_and_unique(names in proptest::collection::btree_set("[ab _.é2]{1,4}", 0..20)) {
            let names: Vec<String> = names.into_iter().collect();
            let mapped = named(&names);
            prop_assert_eq!(mapped.iter().collect::<BTreeSet<_>>().len(), names.len());
            prop_assert!(mapped.iter().all(|name| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')));
        }
    }
}
