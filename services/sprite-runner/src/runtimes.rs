//! The agent CLIs: one file each, behind one small trait. A new one is a file here and a line in [`adapter`].

mod claude;
mod codex;
mod gemini;
mod opencode;
mod shell;

use types::{McpServer, Runtime};

use crate::{ModelEndpoints, usage};

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

/// Stands in an argument list for what [`Adapter::find_conversation`] found.
pub const CONVERSATION: &str = "$CONVERSATION";

/// Shell: the first value of a field in the JSON that the earlier turns have printed.
fn first_id(field: &str) -> String {
    format!("grep -hom1 '\"{field}\":\"[A-Za-z0-9_-]*\"' /home/sprite/.aod/turn-*/stdout | head -n 1 | cut -d '\"' -f 4")
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
    /// Begins a conversation.
    fn begin(&self, launch: &Launch<'_>) -> Vec<String>;
    /// Goes on with the conversation [`CONVERSATION`].
    fn resume(&self, launch: &Launch<'_>) -> Vec<String>;
    /// Shell: prints the id of the conversation that an earlier turn began; nothing where none did. Never "the last one": an agent may
    /// start others of its kind.
    fn find_conversation(&self, launch: &Launch<'_>) -> String;
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
    fn config_files(&self, mcp_servers: &[McpServer], models: &ModelEndpoints) -> Vec<(&'static str, String)>;
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
