//! Whether a stream is the one that was published to.

use time::OffsetDateTime;

/// How many events a stream may have taken since it was last looked at: more than fit into one, for
/// nothing is noted while Postgres is away. Ids are never used twice: a stream is recreated so far
/// above.
pub const UNSEEN_MAX: u64 = 1_000_000_000;

/// What Postgres knows of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    pub created_at: OffsetDateTime,
    /// The highest sequence that was seen or persisted.
    pub high_watermark: u64,
}

/// A stream as the server reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub created_at: OffsetDateTime,
    pub last_sequence: u64,
}

/// The state of a stream compared with what Postgres knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    Intact,
    /// Another stream of the same name: the one that was published to was lost or replaced.
    Exchanged,
    /// It ends before what was published: a lost tail, or a restored snapshot.
    SetBack,
}

#[must_use]
pub fn condition(known: Option<Known>, persisted: u64, seen: Seen) -> Condition {
    match known {
        Some(known) if known.created_at != seen.created_at => Condition::Exchanged,
        _ if seen.last_sequence < highest(known, persisted) => Condition::SetBack,
        _ => Condition::Intact,
    }
}

/// Where a stream that is not intact continues: above every id that anyone may have seen, and above
/// all that it holds.
#[must_use]
pub fn first_sequence(known: Option<Known>, persisted: u64, seen: Seen) -> u64 {
    match highest(known, persisted).max(seen.last_sequence) {
        0 => 1,
        highest => highest + UNSEEN_MAX,
    }
}

fn highest(known: Option<Known>, persisted: u64) -> u64 {
    persisted.max(known.map_or(0, |known| known.high_watermark))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(second: i64) -> OffsetDateTime {
        OffsetDateTime::UNIX_EPOCH + time::Duration::seconds(second)
    }

    proptest! {
        #[test]
        fn a_stream_is_intact_only_if_it_holds_everything_published(
            known in proptest::option::of((0_i64..2, 0_u64..5)), persisted in 0_u64..5, seen in (0_i64..2, 0_u64..5),
        ) {
            let known = known.map(|(second, high_watermark)| Known { created_at: at(second), high_watermark });
            let seen = Seen { created_at: at(seen.0), last_sequence: seen.1 };
            let intact = condition(known, persisted, seen) == Condition::Intact;
            let holds_all = seen.last_sequence >= persisted
                && known.is_none_or(|known| known.created_at == seen.created_at && seen.last_sequence >= known.high_watermark);
            prop_assert_eq!(intact, holds_all);
            let first = first_sequence(known, persisted, seen);
            prop_assert!(first > persisted && first > seen.last_sequence && known.is_none_or(|known| first > known.high_watermark));
        }
    }
}
