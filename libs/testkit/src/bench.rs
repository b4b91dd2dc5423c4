//! Helpers of the benchmarks. Machines differ and are noisy: each figure stands beside a floor of
//! the same run, and their ratio.
//!
//! Each figure is printed, and added to the file that `BENCH_FIGURES` names, from which
//! `bench-table` makes the table.

use std::{
    fmt,
    fs::OpenOptions,
    io::Write as _,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

/// A measured value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Measured {
    Times { p50_ms: f64, p99_ms: f64, count: usize },
    Rate { per_second: f64, unit: String },
    Amount { value: f64, unit: String },
}

impl Measured {
    #[must_use]
    pub fn rate(per_second: f64, unit: &str) -> Self {
        Self::Rate { per_second, unit: unit.to_owned() }
    }

    #[must_use]
    pub fn amount(value: f64, unit: &str) -> Self {
        Self::Amount { value, unit: unit.to_owned() }
    }

    /// What ratios compare: of times the median.
    fn value(&self) -> f64 {
        match self {
            Self::Times { p50_ms: value, .. }
            | Self::Rate { per_second: value, .. }
            | Self::Amount { value, .. } => *value,
        }
    }
}

impl From<&Times> for Measured {
    fn from(times: &Times) -> Self {
        let milliseconds = |percent| times.percentile(percent).as_secs_f64() * 1e3;
        Self::Times { p50_ms: milliseconds(50), p99_ms: milliseconds(99), count: times.0.len() }
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Runs(vec![self]).fmt(f)
    }
}

/// The same figure in each of several runs, shown as the lowest and the highest of them.
#[derive(Clone, Debug)]
pub struct Runs<'a>(pub Vec<&'a Measured>);

impl Runs<'_> {
    /// From the lowest to the highest of what `of` takes from each run.
    fn span(&self, of: impl Fn(&Measured) -> f64) -> String {
        span(self.0.iter().map(|measured| of(measured)), three_digits)
    }
}

impl fmt::Display for Runs<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.span(Measured::value);
        match self.0.first() {
            Some(Measured::Times { .. }) => {
                let p99 = self.span(|measured| match measured {
                    Measured::Times { p99_ms, .. } => *p99_ms,
                    other => other.value(),
                });
                write!(f, "p50 {value} ms, p99 {p99} ms")
            }
            Some(Measured::Rate { unit, .. }) => write!(f, "{value} {unit}/s"),
            Some(Measured::Amount { unit, .. }) => write!(f, "{value} {unit}"),
            None => Ok(()),
        }
    }
}

/// The lowest and the highest of the values, or one of them if they read the same.
#[must_use]
pub fn span(values: impl Iterator<Item = f64>, read: impl Fn(f64) -> String) -> String {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    let (Some(low), Some(high)) = (values.first(), values.last()) else { return String::new() };
    let (low, high) = (read(*low), read(*high));
    if low == high { low } else { format!("{low} to {high}") }
}

/// Three digits say enough.
fn three_digits(value: f64) -> String {
    let magnitude = value.abs().max(0.1).log10().floor() as i32;
    if magnitude < 2 {
        return format!("{value:.*}", if magnitude < 0 { 3 } else { 2 - magnitude as usize });
    }
    let unit = 10_f64.powi(magnitude - 2);
    let digits = format!("{:.0}", (value / unit).round() * unit);
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// What the same machine does without our code.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Floor {
    pub what: String,
    pub measured: Measured,
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    pub what: String,
    pub measured: Measured,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub floor: Option<Floor>,
}

impl Figure {
    #[must_use]
    pub fn new(what: &str, measured: impl Into<Measured>) -> Self {
        Self { what: what.to_owned(), measured: measured.into(), floor: None }
    }

    #[must_use]
    pub fn beside(self, what: &str, measured: impl Into<Measured>) -> Self {
        Self { floor: Some(Floor { what: what.to_owned(), measured: measured.into() }), ..self }
    }

    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        self.floor.as_ref().map(|floor| self.measured.value() / floor.measured.value())
    }

    /// Prints it, and adds it to the file of this run.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn report(&self) -> anyhow::Result<()> {
        println!("{self}");
        let Some(path) = std::env::var_os("BENCH_FIGURES") else { return Ok(()) };
        let line = serde_json::to_string(self)? + "\n";
        let file = OpenOptions::new().append(true).create(true).open(&path);
        file.and_then(|mut file| file.write_all(line.as_bytes()))
            .with_context(|| format!("writing {}", path.display()))
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.measured)?;
        if let (Some(floor), Some(ratio)) = (&self.floor, self.ratio()) {
            write!(f, "; {}: {}; ratio {ratio:.2}", floor.what, floor.measured)?;
        }
        Ok(())
    }
}

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
    pub async fn of(
        count: usize,
        mut work: impl AsyncFnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_read_as_it_was_written() {
        let times = Times::new((1..=100).map(Duration::from_millis).collect());
        let figure = Figure::new("a run", &times)
            .beside("by hand", &Times::new(vec![Duration::from_millis(17)]));
        assert_eq!(
            figure.to_string(),
            "a run: p50 51.0 ms, p99 100 ms; by hand: p50 17.0 ms, p99 17.0 ms; ratio 3.00"
        );
        let alone = Figure::new("memory", Measured::amount(0.0321, "MB"));
        assert_eq!(alone.to_string(), "memory: 0.032 MB");
        for figure in [figure, alone, Figure::new("replay", Measured::rate(224_000.4, "events"))] {
            let text = serde_json::to_string(&figure).unwrap();
            assert_eq!(serde_json::from_str::<Figure>(&text).unwrap(), figure, "{text}");
        }
    }

    #[test]
    fn values_read_with_three_digits() {
        let read = [0.0, 0.03214, 1.0, 9.876, 70.14, 999.6, 1_422_499.0].map(three_digits);
        assert_eq!(read, ["0.000", "0.032", "1.00", "9.88", "70.1", "1,000", "1,420,000"]);
    }

    #[test]
    fn several_runs_show_the_lowest_and_the_highest() {
        let times = |p50_ms, p99_ms| Measured::Times { p50_ms, p99_ms, count: 9 };
        let runs = [times(2.0, 9.5), times(1.5, 9.5), times(1.75, 9.5)];
        assert_eq!(Runs(runs.iter().collect()).to_string(), "p50 1.50 to 2.00 ms, p99 9.50 ms");
        let runs = [Measured::rate(1_250.0, "sessions"), Measured::rate(990.4, "sessions")];
        assert_eq!(Runs(runs.iter().collect()).to_string(), "990 to 1,250 sessions/s");
    }
}
