//! The agent CLIs of the tests, and how many of them one process runs at a time.

use futures::future::join_all;
use tokio::sync::Semaphore;

/// A runtime, a model of it, what it calls its shell, and whether a message can join its turn.
pub const RUNTIMES: [(&str, &str, &str, bool); 4] = [
    ("claude", "anthropic/claude-sonnet-4-5", "Bash", true),
    ("codex", "openai/gpt-5.2-codex", "shell", true),
    ("gemini", "google/gemini-2.5-pro", "run_shell_command", false),
    ("opencode", "openai/gpt-5.2", "bash", false),
];

/// Each CLI takes about a core while it starts: with many more of them than cores, a time limit
/// measures the machine.
static AGENTS: Semaphore = Semaphore::const_new(4);

/// Runs a scenario with an agent for each item, several at a time.
pub async fn for_each_agent<T>(items: impl IntoIterator<Item = T>, scenario: impl AsyncFn(T)) {
    let scenario = &scenario;
    let run = |item| async move {
        // It is never closed.
        let _agent = AGENTS.acquire().await;
        scenario(item).await;
    };
    join_all(items.into_iter().map(run)).await;
}
