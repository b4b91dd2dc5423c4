//! Kinds of credentials, as arguments.

use clap::ValueEnum;

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Kind {
    #[value(name = "provider:anthropic")]
    Anthropic,
    #[value(name = "provider:openai")]
    Openai,
    #[value(name = "provider:google")]
    Google,
    #[value(name = "runtime_token:claude-oauth")]
    ClaudeOauth,
    #[value(name = "backend:sprites")]
    Sprites,
}

impl Kind {
    pub fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}
