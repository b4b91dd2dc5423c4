//! States of sessions and turns, and the stages of a Sprite's set-up (docs/api.md §6, §7).

macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $($(#[$vdoc])* $variant),* }

        impl $name {
            pub const ALL: [Self; [$(Self::$variant),*].len()] = [$(Self::$variant),*];

            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),* }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl std::str::FromStr for $name {
            type Err = ();

            fn from_str(text: &str) -> Result<Self, ()> {
                Self::ALL.into_iter().find(|value| value.as_str() == text).ok_or(())
            }
        }
    };
}
pub(crate) use named;

named! {
    /// `pending → running → completed | failed`, `completed → pending` by a new prompt, and
    /// `terminated` from anywhere.
    SessionStatus {
        Pending = "pending",
        Running = "running",
        Completed = "completed",
        Failed = "failed",
        Terminated = "terminated",
    }
}

named! {
    TurnStatus {
        Pending = "pending",
        Running = "running",
        Completed = "completed",
        Failed = "failed",
    }
}

named! {
    /// In the order in which they happen.
    Stage {
        CreateSprite = "create_sprite",
        InstallRuntime = "install_runtime",
        NetworkPolicy = "network_policy",
        EnvFile = "env_file",
        Packages = "packages",
        GitCredentials = "git_credentials",
        ProvisionSetup = "provision_setup",
        RuntimeConfig = "runtime_config",
        Skills = "skills",
        RuntimeStart = "runtime_start",
    }
}

named! {
    StageState {
        Started = "started",
        Done = "done",
        Failed = "failed",
    }
}

impl SessionStatus {
    /// Counts against the owner's quota.
    #[must_use]
    pub const fn is_active(self) -> bool {
        matches!(self, Self::Pending | Self::Running)
    }

    /// Returns why a prompt is refused in this state, in the contract's words; `None` if it is
    /// accepted.
    #[must_use]
    pub const fn prompt_refusal(self) -> Option<&'static str> {
        match self {
            Self::Completed => None,
            Self::Pending => Some("Session already has a pending turn"),
            Self::Running => Some("Session is already running"),
            Self::Failed => Some("Session has failed and cannot be resumed. Start a new session."),
            Self::Terminated => Some("Session has been terminated"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_completed_session_accepts_a_prompt() {
        let welcome: Vec<_> =
            SessionStatus::ALL.iter().filter(|status| status.prompt_refusal().is_none()).collect();
        assert_eq!(welcome, [&SessionStatus::Completed]);
    }

    #[test]
    fn names_are_those_of_the_contract() {
        assert!(Stage::ALL.is_sorted());
        assert_eq!("provision_setup".parse(), Ok(Stage::ProvisionSetup));
        assert_eq!("interrupted".parse::<TurnStatus>(), Err(()));
    }
}
