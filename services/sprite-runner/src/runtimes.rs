//! The agent CLIs: one file each, behind one small trait. A new one is a file here and a line in [`adapter`].

mod claude;
mod shell;

use types::{McpServer, Runtime};

use crate::ModelEndpoints;

/// What a CLI needs to know about a turn.
#[derive(Debug)]
pub struct Launch<'a> {
    pub first_turn: bool,
    /// Without the provider.
    pub model_id: &'a str,
    /// The CLI's own conversation, the same in every turn.
    pub conversation_id: &'a str,
    /// Where the prompt lies in the Sprite.
    pub prompt_path: &'a str,
}

/// What the CLI reads on standard input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stdin {
    Prompt,
    Empty,
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
    fn argv(&self, launch: &Launch<'_>) -> Vec<String>;
    fn stdin(&self) -> Stdin;
    /// Variables that are no secrets.
    fn env(&self, models: &ModelEndpoints) -> Vec<(String, String)>;
    /// Files to write before the first turn, by absolute path. They may hold the secrets of MCP servers.
    fn config_files(&self, mcp_servers: &[McpServer]) -> Vec<(&'static str, String)>;
    /// Where the CLI finds skills, if it knows any.
    fn skills(&self) -> Option<Skills>;
}

/// The adapter of a runtime, where this runner has one.
#[must_use]
pub fn adapter(runtime: Runtime) -> Option<&'static dyn Adapter> {
    match runtime {
        Runtime::Claude => Some(&claude::Claude),
        Runtime::Shell => Some(&shell::Shell),
        Runtime::Codex | Runtime::Gemini | Runtime::Opencode => None,
    }
}
