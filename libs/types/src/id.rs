//! Typed ids: lowercase UUIDs on the wire (docs/api.md §1), never mixed up in code.

use std::{fmt, str::FromStr};

use uuid::Uuid;

/// The text is not a UUID in its lowercase hyphenated form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a lowercase UUID")]
pub struct InvalidId;

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Uuid);

        impl $name {
            /// A fresh id. Version 7, so that index pages fill in order of creation.
            #[must_use]
            #[expect(clippy::new_without_default, reason = "every call gives another value")]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }

            #[must_use]
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            #[must_use]
            pub const fn uuid(self) -> Uuid {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let uuid = Uuid::try_parse(text).map_err(|_| InvalidId)?;
                // Only the form that we hand out is an id: one spelling, one resource.
                if uuid.hyphenated().encode_lower(&mut Uuid::encode_buffer()) == text {
                    Ok(Self(uuid))
                } else {
                    Err(InvalidId)
                }
            }
        }
    )*};
}

ids! {
    /// Owner of everything else.
    UserId,
    /// An API key's row; not the key.
    KeyId,
    /// A template that sessions run.
    AgentId,
    /// A sandbox set-up.
    EnvironmentId,
    /// An agent running, turn after turn, in one Sprite.
    SessionId,
    /// A message, an interrupt or a decision.
    InputId,
    /// A row of the vault.
    SecretId,
    /// A vault of the Managed Agents API.
    VaultId,
    /// A credential in such a vault.
    VaultCredentialId,
    /// An uploaded file, or one that an agent wrote.
    FileId,
    /// The right to have some secrets unsealed for one piece of work.
    LeaseId,
}

impl InputId {
    /// The id of a decision that no user sent. It is of version 8, and else like the others.
    #[must_use]
    pub fn of_timeout() -> Self {
        let id = *Self::new().uuid().as_bytes();
        Self(uuid::Builder::from_bytes(id).with_version(uuid::Version::Custom).into_uuid())
    }

    /// Whether a user sent the input.
    #[must_use]
    pub fn is_sent(self) -> bool {
        self.0.get_version_num() != uuid::Version::Custom as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_lowercase_hyphenated_form_is_an_id() {
        let id = SessionId::new();
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(id.to_string().to_uppercase().parse::<SessionId>(), Err(InvalidId));
        assert_eq!(id.uuid().simple().to_string().parse::<SessionId>(), Err(InvalidId));
        assert_eq!("a.b".parse::<SessionId>(), Err(InvalidId));
    }

    #[test]
    fn ids_distinguish_decisions_of_users_from_those_of_timeouts() {
        let (sent, timeout) = (InputId::new(), InputId::of_timeout());
        assert!(sent.is_sent() && !timeout.is_sent() && sent < timeout);
        assert_eq!(timeout.to_string().parse(), Ok(timeout));
    }
}
