//! The agent CLIs: one file each, behind one small trait. A new one is a file here and a line in [`adapter`].

mod claude;
mod codex;
mod gemini;
mod opencode;
mod shell;

use std::{collections::BTreeSet, time::Duration};

use types::{McpServer, Runtime};

use crate::{
    ModelEndpoints,
    job::{MCP_START_PATH, ROOT},
    usage,
};

/// What a CLI needs to know about a turn.
#[derive(Debug)]
pub struct Launch<'a> {
    /// With its provider: `openai/gpt-5`.
    pub model: &'a str,
    /// Without the provider.
    pub model_id: &'a str,
    /// For CLIs that let others choose: the same in every turn.
    pub conversation_id: &'a str,
    /// Where the prompt lies in the Sprite.
    pub prompt_path: &'a str,
}

/// An MCP server that is not there by then is left out, where the CLI can be told so: a turn does not wait for it.
pub const MCP_START_LIMIT: Duration = Duration::from_secs(20);

/// An MCP server's command, under [`MCP_START_LIMIT`]: for CLIs whose own limit is as long as that of a call.
fn limited_command(command: &str, args: &[String]) -> Vec<String> {
    let limited = ["perl", MCP_START_PATH, &MCP_START_LIMIT.as_secs().to_string(), command].map(str::to_owned);
    limited.into_iter().chain(args.iter().cloned()).collect()
}

/// Stands in an argument list for what [`Adapter::find_conversation`] found.
pub const CONVERSATION: &str = "$1";

/// Shell: the first value of a field in the JSON that the earlier turns have printed.
fn first_id(field: &str) -> String {
    format!("grep -hom1 '\"{field}\":\"[A-Za-z0-9_-]*\"' {ROOT}/turn-*/stdout | head -n 1 | cut -d '\"' -f 4")
}

/// What the CLI reads on standard input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stdin {
    Prompt,
    Empty,
}

/// How a CLI takes an agent's `system`, so that prompts arrive as they were typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SystemPrompt {
    /// From a file that an option names.
    Option { option: &'static str, path: &'static str },
    /// From a file of instructions that it reads by itself.
    Instructions(&'static str),
    /// In its settings.
    Settings,
    /// Not at all.
    BeforeThePrompt,
}

impl SystemPrompt {
    /// The file to write before the first turn.
    pub fn path(self) -> Option<&'static str> {
        match self {
            Self::Option { path, .. } | Self::Instructions(path) => Some(path),
            Self::Settings | Self::BeforeThePrompt => None,
        }
    }
}

/// Names as every CLI takes them: ASCII letters, digits, `_` and `-`. Names that become the same get numbers.
pub fn mcp_names(mut servers: Vec<McpServer>) -> Vec<McpServer> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    // Names that need no change have the first right to them.
    let mut taken: BTreeSet<String> =
        servers.iter().filter(|server| server.name.chars().all(allowed)).map(|server| server.name.clone()).collect();
    for server in servers.iter_mut().filter(|server| !server.name.chars().all(allowed)) {
        let plain: String = server.name.chars().map(|c| if allowed(c) { c } else { '_' }).collect();
        let numbered = (2_u32..).map(|number| format!("{plain}_{number}"));
        let name = std::iter::once(plain.clone()).chain(numbered).find(|name| !taken.contains(name)).unwrap_or_default();
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

/// How to run one CLI. Prompts never go into arguments: those are seen by whoever lists processes.
pub trait Adapter: Sync {
    /// What must be on the Sprite's PATH, where anything must.
    fn executable(&self) -> Option<&'static str>;
    /// Begins a conversation.
    fn begin(&self, launch: &Launch<'_>) -> Vec<String>;
    /// Goes on with the conversation [`CONVERSATION`].
    fn resume(&self, launch: &Launch<'_>) -> Vec<String>;
    /// Shell: prints the id of the conversation that an earlier turn began; nothing where none did. Never "the last one": an agent may
    /// start others of its kind.
    fn find_conversation(&self, launch: &Launch<'_>) -> String;
    fn system_prompt(&self) -> SystemPrompt;
    /// Whether a prompt is a script.
    fn is_shell(&self) -> bool {
        false
    }
    fn stdin(&self) -> Stdin {
        Stdin::Prompt
    }
    /// Shell: run before the CLI, in its environment.
    fn prepare(&self) -> &'static str {
        ""
    }
    /// Variables that are no secrets.
    fn env(&self, models: &ModelEndpoints) -> Vec<(String, String)>;
    /// Files to write before the first turn, by absolute path. They may hold the secrets of MCP servers.
    fn config_files(&self, mcp_servers: &[McpServer], models: &ModelEndpoints, system: &str) -> Vec<(&'static str, String)>;
    /// How to read what a turn used, where the CLI says so.
    fn usage(&self) -> Option<usage::Reader> {
        None
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
        let transport = McpTransport::Url { url: String::new(), headers: std::collections::BTreeMap::new() };
        let servers = names.iter().map(|name| McpServer { name: name.clone(), transport: transport.clone() }).collect();
        mcp_names(servers).into_iter().map(|server| server.name).collect()
    }

    #[test]
    fn mcp_servers_get_names_that_every_cli_takes() {
        let names = ["Salesforce DX", "na\u{ef}ve", "a_b", "a b", "a.b", "\u{6d77}"].map(str::to_owned);
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
