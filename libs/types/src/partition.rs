//! Partitions of the event log: which stream holds a session's events (ARCHITECTURE.md).

use std::num::NonZeroU8;

use crate::SessionId;

/// One of the streams that the sessions' records are spread over. A session stays in the one that
/// it was born in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Partition(u8);

impl Partition {
    pub const COUNT_MAX: u8 = 8;
    /// The one that every deployment has.
    pub const FIRST: Self = Self(0);

    /// None where there is no such partition.
    #[must_use]
    pub fn new(number: u32) -> Option<Self> {
        u8::try_from(number).ok().filter(|number| *number < Self::COUNT_MAX).map(Self)
    }

    /// Of a session that is made while there are so many.
    #[must_use]
    pub fn of_new(session: SessionId, count: NonZeroU8) -> Self {
        // The last byte of an id is random.
        let [.., last] = *session.uuid().as_bytes();
        Self(last % count.get().min(Self::COUNT_MAX))
    }

    pub fn all() -> impl Iterator<Item = Self> {
        (0..Self::COUNT_MAX).map(Self)
    }

    #[must_use]
    pub fn number(self) -> u8 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn sessions_are_spread_evenly() {
        for count in 1..=Partition::COUNT_MAX {
            let mut born = BTreeMap::<_, u32>::new();
            for _ in 0..8000 {
                *born
                    .entry(Partition::of_new(SessionId::new(), NonZeroU8::new(count).unwrap()))
                    .or_default() += 1;
            }
            assert!(born.keys().copied().eq(Partition::all().take(count.into())), "{born:?}");
            let fair = 8000 / u32::from(count);
            assert!(
                born.values().all(|sessions| (fair * 3 / 4..=fair * 5 / 4).contains(sessions)),
                "{born:?}"
            );
        }
    }

    #[test]
    fn numbers_beyond_the_last_are_refused() {
        assert_eq!(Partition::new(0), Some(Partition::FIRST));
        assert_eq!(Partition::new(7).map(Partition::number), Some(7));
        assert_eq!((Partition::new(8), Partition::new(256)), (None, None));
    }
}
