//! Runtimes, the providers they serve, and model names (docs/api.md §4).

use crate::session::named;

named! {
    Provider {
        Anthropic = "anthropic",
        Google = "google",
        Openai = "openai",
    }
}

impl Provider {
    /// Returns the host name of the provider's API.
    #[must_use]
    pub const fn host(self) -> &'static str {
        match self {
            Self::Anthropic => "api.anthropic.com",
            Self::Google => "generativelanguage.googleapis.com",
            Self::Openai => "api.openai.com",
        }
    }

    /// The environment variable from which the provider's own tools read a key.
    #[must_use]
    pub const fn env_var(self) -> &'static str {
        match self {
            Self::Anthropic => "ANTHROPIC_API_KEY",
            Self::Google => "GEMINI_API_KEY",
            Self::Openai => "OPENAI_API_KEY",
        }
    }
}

named! {
    Runtime {
        Claude = "claude",
        Codex = "codex",
        Gemini = "gemini",
        Opencode = "opencode",
        /// The prompt is a bash script. Only where the deployment allows it.
        Shell = "shell",
    }
}

impl Runtime {
    /// The four runtimes of every deployment, in the order in which error messages list them.
    pub const AGENTS: [Self; 4] = [Self::Claude, Self::Codex, Self::Gemini, Self::Opencode];

    /// Sorted by name, as messages list them. Empty: no model is called.
    #[must_use]
    pub const fn providers(self) -> &'static [Provider] {
        match self {
            Self::Claude => &[Provider::Anthropic],
            Self::Codex => &[Provider::Openai],
            Self::Gemini => &[Provider::Google],
            Self::Opencode => &Provider::ALL,
            Self::Shell => &[],
        }
    }
}

/// Actions that a runtime's CLI supports while a turn runs. A test of the agent host checks that
/// its adapters declare the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuntimeCapabilities {
    /// A message can join a running turn.
    pub steer: bool,
    /// It asks before it uses a tool.
    pub permission_requests: bool,
    /// The reason of a denial reaches the model.
    pub deny_with_message: bool,
    pub interrupt: bool,
}

impl Runtime {
    #[must_use]
    pub const fn capabilities(self) -> RuntimeCapabilities {
        let (steer, permission_requests, deny_with_message) = match self {
            Self::Claude | Self::Codex => (true, true, true),
            Self::Gemini => (false, true, false),
            Self::Opencode => (false, true, true),
            Self::Shell => (false, false, false),
        };
        RuntimeCapabilities { steer, permission_requests, deny_with_message, interrupt: true }
    }
}

/// A model as it is stored: `provider/model_id`, or any text for the `shell` runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelRef {
    text: String,
    provider: Option<Provider>,
}

/// Why a model cannot be used with a runtime. The texts are fixed by docs/api.md §4.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    #[error("Unknown model: {0}")]
    Unknown(String),
    #[error("Runtime {runtime} cannot serve model {model}: provider {provider} not in {}", quoted(.runtime.providers().iter().map(|p| p.as_str())))]
    NotServed { runtime: Runtime, model: String, provider: Provider },
}

impl ModelRef {
    /// Parses a model. A bare model id belongs to the runtime's provider if the runtime has only
    /// one.
    ///
    /// # Errors
    /// [`ModelError`] when the provider is unknown or not served by the runtime.
    pub fn parse(runtime: Runtime, text: &str) -> Result<Self, ModelError> {
        if runtime == Runtime::Shell {
            return Ok(Self { text: text.to_owned(), provider: None });
        }
        let unknown = || ModelError::Unknown(text.to_owned());
        let Some((provider, model_id)) = text.split_once('/') else {
            return match runtime.providers() {
                [only] if !text.trim().is_empty() => {
                    Ok(Self { text: format!("{only}/{text}"), provider: Some(*only) })
                }
                _ => Err(unknown()),
            };
        };
        let provider: Provider = provider.parse().map_err(|()| unknown())?;
        if model_id.trim().is_empty() {
            return Err(unknown());
        }
        if !runtime.providers().contains(&provider) {
            return Err(ModelError::NotServed { runtime, model: text.to_owned(), provider });
        }
        Ok(Self { text: text.to_owned(), provider: Some(provider) })
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    #[must_use]
    pub const fn provider(&self) -> Option<Provider> {
        self.provider
    }

    /// The id without its provider, as the single-provider CLIs want it.
    #[must_use]
    pub fn model_id(&self) -> &str {
        match self.provider {
            Some(_) => self.text.split_once('/').map_or(&self.text, |(_, id)| id),
            None => &self.text,
        }
    }
}

/// Renders a list as `['a', 'b']`, as the API's error messages do.
pub fn quoted<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.into_iter().map(|name| format!("'{name}'")).collect();
    format!("[{}]", names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_model_gets_the_only_provider_of_its_runtime() {
        let model = ModelRef::parse(Runtime::Claude, "claude-x").unwrap();
        assert_eq!(
            (model.as_str(), model.model_id(), model.provider()),
            ("anthropic/claude-x", "claude-x", Some(Provider::Anthropic))
        );
        assert_eq!(
            ModelRef::parse(Runtime::Opencode, "gpt").unwrap_err().to_string(),
            "Unknown model: gpt"
        );
    }

    #[test]
    fn a_provider_that_the_runtime_does_not_serve_is_named() {
        assert_eq!(
            ModelRef::parse(Runtime::Claude, "openai/o3").unwrap_err().to_string(),
            "Runtime claude cannot serve model openai/o3: provider openai not in ['anthropic']"
        );
        assert_eq!(
            ModelRef::parse(Runtime::Claude, "acme/x").unwrap_err(),
            ModelError::Unknown("acme/x".into())
        );
        assert_eq!(
            ModelRef::parse(Runtime::Claude, "anthropic/").unwrap_err(),
            ModelError::Unknown("anthropic/".into())
        );
    }

    #[test]
    fn shell_accepts_any_model() {
        assert_eq!(ModelRef::parse(Runtime::Shell, "whatever").unwrap().model_id(), "whatever");
    }
}
