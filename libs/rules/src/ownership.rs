//! Who owns a turn. The rows are read and written by the scheduler's `claims` and `reconciler`.
//!
//! A turn is owned by a runner's lease. The lease's heartbeats say which turns the runner works on;
//! whatever the two sides disagree about is put right by the next one. A job in the queue is a
//! hint: losing it or delivering it twice costs latency alone.

use std::time::Duration;

use types::{Backoff, SessionStatus, TurnStatus};
use uuid::Uuid;

/// A runner that sends no heartbeat for this long has lost its turns.
pub const LEASE: Duration = Duration::from_secs(2);
/// After so long without a heartbeat, a runner that is not connected to the bus either has lost
/// them already. It sends a heartbeat more often than this.
pub const SILENCE: Duration = Duration::from_secs(1);
/// How long a claimed turn may be missing in its owner's heartbeats: the answer to the claim may be
/// on its way.
pub const CLAIM_GRACE: Duration = Duration::from_secs(12);
/// An attempt that failed this often will not go better the next time.
pub const FAILURES_MAX: u32 = 100;
/// When a turn is offered again that was offered so often and has no owner. It may well be waiting
/// in the queue: then less and less often.
pub const OFFERS: Backoff =
    Backoff { base: Duration::from_secs(2), max: Duration::from_secs(30), attempts: u32::MAX };
/// When a turn is offered again after so many failed attempts.
pub const RETRIES: Backoff =
    Backoff { base: Duration::from_millis(200), max: Duration::from_secs(10), attempts: u32::MAX };

/// A turn as a claim finds it.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    pub status: TurnStatus,
    /// Whether it is its session's newest.
    pub is_current: bool,
    /// The lease that owns it. An expired lease is deleted, and owns nothing from then on.
    pub owner: Option<Uuid>,
}

/// The answer to a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The claimant owns the turn from now on, with the next epoch.
    Run,
    /// Another lease owns it.
    Owned,
    Settled,
}

/// Decides a claim. The owner itself may claim again: the answer to its earlier claim was lost.
#[must_use]
pub fn claim(session: SessionStatus, turn: Turn, claimant: Uuid) -> Verdict {
    if !session.is_active()
        || !turn.is_current
        || !matches!(turn.status, TurnStatus::Pending | TurnStatus::Running)
    {
        return Verdict::Settled;
    }
    match turn.owner {
        Some(owner) if owner != claimant => Verdict::Owned,
        _ => Verdict::Run,
    }
}

/// A turn in a heartbeat, or in the rows of its lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Held {
    pub session: Uuid,
    pub turn: u32,
    pub epoch: u32,
}

/// Differences between the turns that a runner holds and those that it owns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// Held by the runner and not its own: it stops.
    pub lost: Vec<Held>,
    /// Owned by the runner, and it does not work on them: they are offered to others.
    pub forgotten: Vec<Held>,
}

/// Compares the turns that a runner holds with those it owns; `true` beside an owned one that was
/// claimed a moment ago.
#[must_use]
pub fn compare(held: &[Held], owned: &[(Held, bool)]) -> Differences {
    let lost = held
        .iter()
        .filter(|held| !owned.iter().any(|(owned, _)| owned == *held))
        .copied()
        .collect();
    let forgotten = owned
        .iter()
        .filter(|(owned, fresh)| !fresh && !held.contains(owned))
        .map(|(owned, _)| *owned)
        .collect();
    Differences { lost, forgotten }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_second_job_for_an_owned_turn_changes_nothing() {
        let (owner, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let turn = Turn { status: TurnStatus::Running, is_current: true, owner: Some(owner) };
        assert_eq!(claim(SessionStatus::Running, turn, other), Verdict::Owned);
        assert_eq!(claim(SessionStatus::Running, turn, owner), Verdict::Run);
        assert_eq!(
            claim(SessionStatus::Running, Turn { owner: None, ..turn }, other),
            Verdict::Run
        );
        assert_eq!(
            claim(SessionStatus::Terminated, Turn { owner: None, ..turn }, other),
            Verdict::Settled
        );
        assert_eq!(
            claim(SessionStatus::Running, Turn { is_current: false, owner: None, ..turn }, other),
            Verdict::Settled
        );
    }

    proptest! {
        #[test]
        fn comparing_finds_every_difference_once(
            held in proptest::collection::btree_set((0_u128..6, 1_u32..3), 0..8),
            owned in proptest::collection::btree_map((0_u128..6, 1_u32..3), any::<bool>(), 0..8),
        ) {
            let to_held = |(session, epoch): (u128, u32)| Held { session: Uuid::from_u128(session), turn: 1, epoch };
            let held: Vec<_> = held.into_iter().map(to_held).collect();
            let owned: Vec<_> = owned.into_iter().map(|(key, fresh)| (to_held(key), fresh)).collect();
            let differences = compare(&held, &owned);
            for each in &held {
                prop_assert_eq!(differences.lost.contains(each), !owned.iter().any(|(owned, _)| owned == each));
            }
            for (each, fresh) in &owned {
                prop_assert_eq!(differences.forgotten.contains(each), !fresh && !held.contains(each));
            }
        }
    }
}
