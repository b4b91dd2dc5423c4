//! What the benches measure with. Machines differ and are noisy: each figure stands beside a floor of the same run, and their ratio.

use std::{
    fmt,
    time::{Duration, Instant},
};

/// How long something took, many times over.
#[derive(Clone, Debug)]
pub struct Times(Vec<Duration>);

impl Times {
    #[must_use]
    pub fn new(mut all: Vec<Duration>) -> Self {
        all.sort_unstable();
        Self(all)
    }

    /// Measures work that is done so often, one after the other.
    ///
    /// # Errors
    /// With the work's first.
    pub async fn of(count: usize, mut work: impl AsyncFnMut() -> anyhow::Result<()>) -> anyhow::Result<Self> {
        let mut all = Vec::new();
        for _ in 0..count {
            let begun = Instant::now();
            work().await?;
            all.push(begun.elapsed());
        }
        Ok(Self::new(all))
    }

    fn percentile(&self, percent: usize) -> Duration {
        self.0.get(self.0.len() * percent / 100).copied().unwrap_or_default()
    }

    /// As a line: these times, those of the floor, and the ratio of the medians.
    pub fn report(&self, what: &str, floor_name: &str, floor: &Self) {
        let ratio = self.percentile(50).as_secs_f64() / floor.percentile(50).as_secs_f64();
        println!("{what}: {self}; {floor_name}: {floor}; ratio {ratio:.1}");
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let milliseconds = |percent| self.percentile(percent).as_secs_f64() * 1e3;
        write!(f, "p50 {:.2} ms, p99 {:.2} ms", milliseconds(50), milliseconds(99))
    }
}

/// As a line: so many a second, so many of the floor, and the ratio.
pub fn report_rate(what: &str, unit: &str, ours: f64, floor_name: &str, floor: f64) {
    println!("{what}: {ours:.0} {unit}/s; {floor_name}: {floor:.0} {unit}/s; ratio {:.2}", ours / floor);
}
