//! Names of Sprites: a DNS label (docs/sprites-api.md §2.5), ours by its prefix.

use std::{fmt, str::FromStr};

use crate::id::SessionId;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SpriteName(String);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a Sprite's name is 1 to 63 lowercase letters, digits and inner hyphens")]
pub struct InvalidSpriteName;

impl SpriteName {
    /// The name of a session's Sprite. Derived from the session, so that making it again finds the
    /// first one.
    ///
    /// # Errors
    /// When `prefix` cannot begin a name.
    pub fn for_session(prefix: &str, session: SessionId) -> Result<Self, InvalidSpriteName> {
        // The random tail of the id: its head is a clock and would collide under a short name.
        let simple = session.uuid().simple().to_string();
        let tail = simple.get(12..).unwrap_or_default();
        format!("{prefix}-{tail}").parse()
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SpriteName {
    type Err = InvalidSpriteName;

    fn from_str(text: &str) -> Result<Self, InvalidSpriteName> {
        let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        let ok = (1..=63).contains(&text.len())
            && text.bytes().all(inner)
            && !text.starts_with('-')
            && !text.ends_with('-');
        if ok { Ok(Self(text.to_owned())) } else { Err(InvalidSpriteName) }
    }
}

impl fmt::Display for SpriteName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_dns_label() {
        for good in ["a", "aod-1", &"a".repeat(63)] {
            assert!(good.parse::<SpriteName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "../x", &"a".repeat(64)] {
            assert!(bad.parse::<SpriteName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_session_always_gets_the_same_name() {
        let session = SessionId::new();
        assert_eq!(
            SpriteName::for_session("aod", session),
            SpriteName::for_session("aod", session)
        );
        assert_ne!(
            SpriteName::for_session("aod", session),
            SpriteName::for_session("aod", SessionId::new())
        );
    }
}
