//! Bounded, jittered retry delays: one way to wait between attempts.

use std::time::Duration;

/// Exponential delays with equal jitter: attempt `n` waits between half of `base * 2^(n-1)` and all
/// of it, at most `max`.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    pub base: Duration,
    pub max: Duration,
    /// How many attempts there are in all, the first one included.
    pub attempts: u32,
}

impl Backoff {
    /// The wait after failed attempt `attempt` (1 is the first), or `None` when that was the last
    /// one.
    #[must_use]
    pub fn delay(&self, attempt: u32) -> Option<Duration> {
        (attempt < self.attempts).then(|| self.jittered(attempt))
    }

    /// The wait after failed attempt `attempt` for loops that never give up.
    #[must_use]
    pub fn jittered(&self, attempt: u32) -> Duration {
        self.spread(attempt, random_fraction())
    }

    /// The wait after failed attempt `attempt`, for a random fraction that the caller drew.
    #[must_use]
    pub fn spread(&self, attempt: u32, fraction: f64) -> Duration {
        let ceiling =
            self.base.saturating_mul(1_u32 << attempt.saturating_sub(1).min(16)).min(self.max);
        // Half fixed, half random: never zero, so that a failing peer is not hammered.
        ceiling / 2 + ceiling.mul_f64(fraction / 2.0)
    }
}

/// A random number in `[0, 1)`, for jitter; 0.5 where the system gives no randomness, for jitter
/// needs no secrecy.
#[must_use]
pub fn random_fraction() -> f64 {
    getrandom::u32().map_or(0.5, |bits| f64::from(bits) / (f64::from(u32::MAX) + 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_the_maximum_and_end() {
        let backoff =
            Backoff { base: Duration::from_millis(100), max: Duration::from_secs(1), attempts: 6 };
        for attempt in 1..6 {
            let delay = backoff.delay(attempt).unwrap();
            let ceiling =
                Duration::from_millis(100 * (1 << (attempt - 1))).min(Duration::from_secs(1));
            assert!(delay >= ceiling / 2 && delay <= ceiling, "{attempt}: {delay:?}");
        }
        assert_eq!(backoff.delay(6), None);
        assert!(backoff.jittered(u32::MAX) <= Duration::from_secs(1));
    }
}
