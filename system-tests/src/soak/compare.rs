//! What a reader was shown, beside what is persisted.

use std::{collections::HashMap, ops::AddAssign};

use crate::reader::Seen;

/// How what was shown differs from the event log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Differences {
    /// Events of the log that were not shown.
    pub lost: usize,
    /// Events that were shown again, or out of order.
    pub doubled: usize,
    /// Events that the log has not, or has otherwise.
    pub altered: usize,
}

impl AddAssign for Differences {
    fn add_assign(&mut self, other: Self) {
        self.lost += other.lost;
        self.doubled += other.doubled;
        self.altered += other.altered;
    }
}

/// Compares all events but ends of turns, which a replay shows of the newest turn alone.
pub(crate) fn compare(log: &[Seen], shown: &[Seen]) -> Differences {
    let mut open: HashMap<u64, u64> =
        log.iter().filter(|event| !event.is_end).map(|event| (event.id, event.content)).collect();
    let (mut differences, mut highest) = (Differences::default(), 0);
    for event in shown {
        if event.id <= highest {
            differences.doubled += 1;
            continue;
        }
        highest = event.id;
        if !event.is_end && open.remove(&event.id) != Some(event.content) {
            differences.altered += 1;
        }
    }
    differences.lost = open.len();
    differences
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(id: u64, content: u64) -> Seen {
        Seen { id, content, is_end: false }
    }

    fn end(id: u64) -> Seen {
        Seen { is_end: true, ..seen(id, 0) }
    }

    #[test]
    fn events_that_are_lost_doubled_or_altered_are_counted() {
        let log = [seen(1, 10), seen(2, 20), seen(4, 40), end(5)];
        let differences = |shown: &[Seen]| {
            let Differences { lost, doubled, altered } = compare(&log, shown);
            (lost, doubled, altered)
        };
        assert_eq!(differences(&log), (0, 0, 0));
        assert_eq!(
            differences(&[seen(1, 10), seen(2, 20), end(3), seen(4, 40)]),
            (0, 0, 0),
            "ends are not compared"
        );
        assert_eq!(differences(&[seen(1, 10), seen(4, 40)]), (1, 0, 0));
        assert_eq!(
            differences(&[seen(1, 10), seen(2, 20), seen(1, 10), seen(2, 20), seen(4, 40)]),
            (0, 2, 0)
        );
        assert_eq!(differences(&[seen(1, 10), seen(2, 21), seen(3, 30), seen(4, 40)]), (0, 0, 2));
    }
}
