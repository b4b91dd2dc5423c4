//! Limits the rate at which one session's output is appended to the log, so that it does not starve
//! other sessions.

use std::time::Duration;

use tokio::time::Instant;

/// How much of its agent's output a session's log takes.
#[derive(Clone, Copy, Debug)]
pub struct OutputLimits {
    /// Of one turn. Beyond it only the end is kept.
    pub bytes_max: u64,
    /// Sustained. 0: as fast as it goes.
    pub bytes_per_second: u64,
}

/// What may be written at once before the rate counts: a turn that prints less is never slowed
/// down.
const BURST: Duration = Duration::from_secs(8);

/// A token bucket.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: u64,
    /// When what was written would have been written at the sustained rate.
    paid_until: Instant,
    /// When more may be read.
    pub ready_at: Instant,
}

impl Pace {
    pub fn new(limits: &OutputLimits) -> Self {
        let now = Instant::now();
        Self { bytes_per_second: limits.bytes_per_second, paid_until: now, ready_at: now }
    }

    /// Notes bytes that were written.
    pub fn spend(&mut self, bytes: usize, now: Instant) {
        if bytes == 0 || self.bytes_per_second == 0 {
            return;
        }
        self.paid_until = self.paid_until.max(now)
            + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        self.ready_at = self.paid_until.checked_sub(BURST).unwrap_or(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_the_sustained_rate_holds_after_it() {
        let limits = OutputLimits { bytes_max: u64::MAX, bytes_per_second: 1_000_000 };
        let mut pace = Pace::new(&limits);
        let start = pace.ready_at;
        let (mut now, mut written) = (start, 0_u64);
        while written < 100_000_000 {
            now = now.max(pace.ready_at);
            pace.spend(100_000, now);
            written += 100_000;
            if written <= 8_000_000 {
                assert_eq!(now, start, "a burst waits for nothing");
            }
        }
        let took = (now - start).as_secs_f64();
        assert!((91.0..92.5).contains(&took), "{took}");

        // Silence earns the burst again, and no more than that.
        now += Duration::from_secs(3600);
        let from = now;
        for _ in 0..160 {
            now = now.max(pace.ready_at);
            pace.spend(100_000, now);
        }
        assert!((now - from).as_secs_f64() > 7.0);

        let mut unlimited = Pace::new(&OutputLimits { bytes_per_second: 0, ..limits });
        unlimited.spend(usize::MAX, start);
        assert!(unlimited.ready_at <= now);
    }
}
