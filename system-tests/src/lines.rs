//! Output that can be checked to the end: programs print numbered lines, and what arrives is
//! counted.

use std::{collections::BTreeMap, ops::Range};

use fastrand::Rng;

/// Where a program keeps a copy of its output.
pub(crate) const OWN_COPY: &str = "/home/sprite/written";

/// A program that prints numbered lines of varied size at varied speed, and exits with a code of
/// its own.
pub(crate) struct Program {
    pub text: String,
    pub numbers: Range<usize>,
    pub code: i64,
}

impl Program {
    /// Creates a program that prints for about so many seconds. Its copy of a line is written after
    /// the line: a program that is killed leaves out at most the last one.
    pub fn new(rng: &mut Rng, first: usize, seconds: u64, code: i64) -> Self {
        let pause_ms = rng.u64(5..60);
        let lines = usize::try_from(seconds * 1000 / (pause_ms + 1)).unwrap_or(1);
        let (width, seed, last) = (rng.usize(1..400), rng.u32(..), first + lines - 1);
        let text = format!(
            "exec perl -e '$|=1; srand({seed}); open($own, \">>\", \"{OWN_COPY}\"); select((select($own), $|=1)[0]); for $i ({first}..{last}) {{ $line = \"$i \" . \"x\" x int(rand({width})) . \"\\n\"; print $line; print $own $line; select(undef, undef, undef, rand({}) / 1000) }} close $own; exit {code}'",
            pause_ms * 2
        );
        Self { text, numbers: first..first + lines, code }
    }
}

/// How often each number begins a line.
pub(crate) struct Counted(BTreeMap<usize, usize>);

impl Counted {
    pub fn of(text: &str) -> Self {
        let mut times = BTreeMap::new();
        for number in text.lines().filter_map(|line| line.split(' ').next()?.parse().ok()) {
            *times.entry(number).or_default() += 1;
        }
        Self(times)
    }

    pub fn numbers(&self) -> impl Iterator<Item = usize> {
        self.0.keys().copied()
    }

    pub fn contains(&self, number: usize) -> bool {
        self.0.contains_key(&number)
    }

    /// How many different numbers there are.
    pub fn lines(&self) -> usize {
        self.0.len()
    }

    pub fn missing(&self, expected: Range<usize>) -> Vec<usize> {
        expected.filter(|number| !self.contains(*number)).collect()
    }

    pub fn doubled(&self) -> usize {
        self.0.values().filter(|times| **times > 1).count()
    }

    /// The largest number within a range.
    pub fn last(&self, within: Range<usize>) -> Option<usize> {
        self.0.range(within).next_back().map(|(number, _)| *number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_are_missing_or_doubled_are_counted() {
        let counted = Counted::of("1 x\n2 xx\n2 xx\n4 \nsomething else\n");
        assert_eq!((counted.lines(), counted.missing(1..5), counted.doubled()), (3, vec![3], 1));
        assert_eq!(
            (counted.last(1..4), counted.last(1..5), counted.last(7..9)),
            (Some(2), Some(4), None)
        );
    }
}
