//! Kinds of credentials, as arguments.

use clap::ValueEnum;

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Kind {
    /// Anthropic API key (ANTHROPIC_API_KEY)
    #[value(name = "provider:anthropic")]
    Anthropic,
    /// OpenAI API key (OPENAI_API_KEY)
    #[value(name = "provider:openai")]
    Openai,
    /// Google API key (GEMINI_API_KEY)
    #[value(name = "provider:google")]
    Google,
    /// Claude Code OAuth token (CLAUDE_CODE_OAUTH_TOKEN)
    #[value(name = "runtime_token:claude-oauth")]
    ClaudeOauth,
    /// Token of the Sprites API
    #[value(name = "backend:sprites")]
    Sprites,
}

impl Kind {
    pub fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}
