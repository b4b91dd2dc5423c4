//! What kinds of credentials a user can store (docs/api.md §3).

use std::{fmt, str::FromStr};

use crate::model::{Provider, Runtime};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CredentialKind {
    Provider(Provider),
    /// A Claude subscription's OAuth token.
    ClaudeOauth,
    /// The account that Sprites are made in.
    Sprites,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown credential kind")]
pub struct UnknownKind;

impl CredentialKind {
    pub const ALL: [Self; 5] = [
        Self::Provider(Provider::Anthropic),
        Self::Provider(Provider::Openai),
        Self::Provider(Provider::Google),
        Self::ClaudeOauth,
        Self::Sprites,
    ];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Provider(Provider::Anthropic) => "provider:anthropic",
            Self::Provider(Provider::Openai) => "provider:openai",
            Self::Provider(Provider::Google) => "provider:google",
            Self::ClaudeOauth => "runtime_token:claude-oauth",
            Self::Sprites => "backend:sprites",
        }
    }

    /// The variable that carries it into a session; none for what only the runner uses.
    #[must_use]
    pub const fn env_var(self) -> Option<&'static str> {
        match self {
            Self::Provider(provider) => Some(provider.env_var()),
            Self::ClaudeOauth => Some("CLAUDE_CODE_OAUTH_TOKEN"),
            Self::Sprites => None,
        }
    }

    /// The kinds of which one suffices to run `runtime`; empty where none is needed.
    #[must_use]
    pub fn serving(runtime: Runtime) -> Vec<Self> {
        let mut kinds: Vec<_> = runtime.providers().iter().copied().map(Self::Provider).collect();
        if runtime == Runtime::Claude {
            kinds.push(Self::ClaudeOauth);
        }
        kinds
    }
}

impl fmt::Display for CredentialKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for CredentialKind {
    type Err = UnknownKind;

    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text).ok_or(UnknownKind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_its_name() {
        for kind in CredentialKind::ALL {
            assert_eq!(kind.as_str().parse(), Ok(kind));
        }
        assert_eq!("provider:acme".parse::<CredentialKind>(), Err(UnknownKind));
    }
}
