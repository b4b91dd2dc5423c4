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
    /// Never created before.
    New,
    /// The server does not have it any more.
    Lost,
    /// Another stream of the same name.
    Exchanged,
    /// It ends before what was published: a lost tail, or a restored snapshot.
    SetBack,
}

#[must_use]
pub fn condition(known: Option<Known>, persisted: u64, seen: Option<Seen>) -> Condition {
    match (known, seen) {
        (None, None) if persisted == 0 => Condition::New,
        (_, None) => Condition::Lost,
        (Some(known), Some(seen)) if known.created_at != seen.created_at => Condition::Exchanged,
        (known, Some(seen))
            if seen.last_sequence
                < persisted.max(known.map_or(0, |known| known.high_watermark)) =>
        {
            Condition::SetBack
        }
        (_, Some(_)) => Condition::Intact,
    }
}

/// Where a recreated stream begins: above every id that anyone may have seen.
#[must_use]
pub fn first_sequence(known: Option<Known>, persisted: u64) -> u64 {
    match persisted.max(known.map_or(0, |known| known.high_watermark)) {
        0 => 1,
        highest => highest + UNSEEN_MAX,
    }
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
            known in proptest::option::of((0_i64..2, 0_u64..5)), persisted in 0_u64..5, seen in proptest::option::of((0_i64..2, 0_u64..5)),
        ) {
            let known = known.map(|(second, high_watermark)| Known { created_at: at(second), high_watermark });
            let seen = seen.map(|(second, last_sequence)| Seen { created_at: at(second), last_sequence });
            let intact = condition(known, persisted, seen) == Condition::Intact;
            let holds_all = seen.is_some_and(|seen| {
                seen.last_sequence >= persisted && known.is_none_or(|known| known.created_at == seen.created_at && seen.last_sequence >= known.high_watermark)
            });
            prop_assert_eq!(intact, holds_all);
            let first = first_sequence(known, persisted);
            prop_assert!(first > persisted && known.is_none_or(|known| first > known.high_watermark));
        }
    }
}
