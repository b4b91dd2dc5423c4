//! Ids as `/v1` shows them: a prefix, and the 128 bits of ours in base 58. Nothing is stored:
//! either form follows from the other.

use axum::{
    extract::{FromRequestParts, Path},
    http::request::Parts,
};
use serde::de::DeserializeOwned;
use types::InputId;
use uuid::Uuid;

use crate::error::ApiError;

/// What an id is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefix {
    Agent,
    Environment,
    Session,
    Event,
    Thread,
    Resource,
    Vault,
    Credential,
    File,
}

impl Prefix {
    pub const ALL: [Self; 9] = [
        Self::Agent,
        Self::Environment,
        Self::Session,
        Self::Event,
        Self::Thread,
        Self::Resource,
        Self::Vault,
        Self::Credential,
        Self::File,
    ];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "agent_01",
            Self::Environment => "env_01",
            Self::Session => "sesn_01",
            Self::Event => "sevt_01",
            Self::Thread => "sthr_01",
            Self::Resource => "sesrsc_01",
            Self::Vault => "vlt_01",
            Self::Credential => "vcrd_01",
            Self::File => "file_01",
        }
    }

    /// The word for it in messages.
    const fn noun(self) -> &'static str {
        match self {
            Self::Agent => "Agent",
            Self::Environment => "Environment",
            Self::Session => "Session",
            Self::Event => "Event",
            Self::Thread => "Thread",
            Self::Resource => "Resource",
            Self::Vault => "Vault",
            Self::Credential => "Credential",
            Self::File => "File",
        }
    }

    pub fn encode(self, uuid: Uuid) -> String {
        self.encode_bits(uuid.as_u128())
    }

    /// The prefixed form of one of our ids, as other services write it.
    pub fn of(self, id: &str) -> String {
        id.parse().map_or_else(|_| id.to_owned(), |uuid| self.encode(uuid))
    }

    pub fn decode(self, text: &str) -> Option<Uuid> {
        self.decode_bits(text).map(Uuid::from_u128)
    }

    /// Our form of an id that names a resource.
    ///
    /// # Errors
    /// 404: a text that is no such id names nothing.
    pub fn find(self, text: &str) -> Result<String, ApiError> {
        self.decode(text)
            .map(|uuid| uuid.hyphenated().to_string())
            .ok_or_else(|| ApiError::not_found(self.noun()))
    }

    fn encode_bits(self, mut bits: u128) -> String {
        let mut digits = [DIGITS[0]; LENGTH];
        // Lists show hundreds of thousands of ids a second: few divisions are of 128 bits.
        for chunk in digits.rchunks_mut(CHUNK) {
            let mut part = (bits % CHUNK_RADIX) as u64;
            bits /= CHUNK_RADIX;
            for digit in chunk.iter_mut().rev() {
                *digit = DIGITS[(part % RADIX) as usize];
                part /= RADIX;
            }
        }
        let mut text = String::with_capacity(self.as_str().len() + LENGTH);
        text.push_str(self.as_str());
        text.extend(digits.map(char::from));
        text
    }

    fn decode_bits(self, text: &str) -> Option<u128> {
        let digits = text.strip_prefix(self.as_str()).filter(|digits| digits.len() == LENGTH)?;
        digits.bytes().try_fold(0_u128, |bits, byte| {
            let digit = DIGITS.iter().position(|digit| *digit == byte)?;
            bits.checked_mul(u128::from(RADIX))?.checked_add(digit as u128)
        })
    }
}

/// Ascending, so that the order of ids is the order of what they stand for.
const DIGITS: &[u8; 58] = b"123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";
const RADIX: u64 = DIGITS.len() as u64;
/// As many digits as 64 bits hold.
const CHUNK: usize = 10;
const CHUNK_RADIX: u128 = RADIX.pow(CHUNK as u32) as u128;
/// 58^22 is more than 2^128.
const LENGTH: usize = 22;

/// What an event of `/v1` comes from. One entry of the log may show as several events: `part` tells
/// them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventId {
    Log {
        id: u64,
        part: u8,
    },
    /// A text of which parts were shown while the agent wrote it, before its place in the log was
    /// known.
    Text {
        turn: u32,
        text: u32,
    },
    /// An event that its user sent: the same id in the answer, while it waits, on the stream and in
    /// history.
    Input(InputId),
}

/// Ids of inputs are UUIDs of version 7: their first 48 bits are a time, and never zero.
const LOG_BITS: u32 = u64::BITS + u8::BITS;
/// Above the bits of ids of the log, and below those of inputs.
const TEXT: u128 = 1;

impl EventId {
    pub fn encode(self) -> String {
        match self {
            Self::Log { id, part } => {
                Prefix::Event.encode_bits(u128::from(id) << u8::BITS | u128::from(part))
            }
            Self::Text { turn, text } => Prefix::Event
                .encode_bits(TEXT << LOG_BITS | u128::from(turn) << u32::BITS | u128::from(text)),
            Self::Input(input) => Prefix::Event.encode(input.uuid()),
        }
    }

    pub fn decode(text: &str) -> Option<Self> {
        let bits = Prefix::Event.decode_bits(text)?;
        match bits >> LOG_BITS {
            0 => {
                return Some(Self::Log {
                    id: (bits >> u8::BITS) as u64,
                    part: (bits & u128::from(u8::MAX)) as u8,
                });
            }
            TEXT => {
                let turn =
                    u32::try_from((bits >> u32::BITS) & u128::from(u64::MAX >> u32::BITS)).ok()?;
                return Some(Self::Text { turn, text: bits as u32 });
            }
            _ => {}
        }
        Some(Self::Input(InputId::from_uuid(Uuid::from_u128(bits))))
    }
}

/// The id in a route's path, as it came: [`Prefix::find`] reads it. Of a part of a resource, both
/// ids.
pub struct PathId<T = String>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for PathId<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let id = Path::from_request_parts(parts, state).await;
        id.map(|Path(id)| Self(id)).map_err(|_| ApiError::not_found("Resource"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_id_survives_its_text_under_its_own_prefix_alone(bits: u128, other: u128) {
            let uuid = Uuid::from_u128(bits);
            for prefix in Prefix::ALL {
                let text = prefix.encode(uuid);
                prop_assert_eq!(prefix.decode(&text), Some(uuid));
                prop_assert!(Prefix::ALL.into_iter().filter(|other| *other != prefix).all(|other| other.decode(&text).is_none()));
            }
            let (one, two) = (Prefix::Session.encode(uuid), Prefix::Session.encode(Uuid::from_u128(other)));
            prop_assert_eq!(one.cmp(&two), bits.cmp(&other));
        }

        #[test]
        fn an_id_has_one_spelling(text in "agent_01[1-9A-Za-z]{20,24}|\\PC*") {
            if let Some(uuid) = Prefix::Agent.decode(&text) {
                prop_assert_eq!(Prefix::Agent.encode(uuid), text.clone());
            }
            let _ = EventId::decode(&text);
        }

        #[test]
        fn an_event_id_survives_its_text(id: u64, part: u8) {
            let log = EventId::Log { id, part };
            prop_assert_eq!(EventId::decode(&log.encode()), Some(log));
            let text = EventId::Text { turn: id as u32, text: (id >> 32) as u32 };
            prop_assert_eq!(EventId::decode(&text.encode()), Some(text));
            let input = EventId::Input(InputId::new());
            prop_assert_eq!(EventId::decode(&input.encode()), Some(input));
        }

        #[test]
        fn ids_of_the_log_sort_as_the_log(id in 0..u64::MAX, part in 0..u8::MAX) {
            let of = |id, part| EventId::Log { id, part }.encode();
            prop_assert!(of(id, part) < of(id, part + 1) && of(id, u8::MAX) < of(id + 1, 0));
        }
    }
}
