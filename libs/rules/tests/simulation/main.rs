//! A deterministic simulation of the core: the decisions of this crate, around models of Postgres,
//! the stream, the queue, runners, schedulers and agents. Every step of every process may be the
//! last before a crash; messages are lost, late and doubled; the stream is lost, set back to a
//! snapshot and trimmed. All waiting is by the database's clock, so that clocks of processes do not
//! matter.
//!
//! Safety is checked after each step, liveness after a time without faults. A failure prints its
//! seed: `SIMULATION_SEED=n cargo test -p rules --test simulation` repeats it; `SIMULATION_STEPS=n`
//! runs longer.

mod checks;
mod decisions;
mod faults;
mod model;
mod runner;
mod scheduler;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use rules::{
    chain::{self, Link, Mark},
    ending::Step,
    position,
};

use crate::{
    decisions::{Decisions, RIGHT},
    world::World,
};

const FAULTY_STEPS: usize = 6_000;

/// Runs worlds until so many steps were made. Returns the steps, and the first failure with its
/// seed.
fn run(decisions: Decisions, first_seed: u64, steps: usize) -> (usize, u64, Option<(u64, String)>) {
    let (mut done, mut gaps, mut seed) = (0, 0, first_seed);
    while done < steps {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let mut world = World::new(seed, decisions);
            for _ in 0..FAULTY_STEPS {
                world.step();
            }
            (FAULTY_STEPS + world.heal(), world.gaps)
        }));
        match outcome {
            Ok((steps, found)) => (done, gaps) = (done + steps, gaps + found),
            Err(panic) => {
                let text = panic
                    .downcast_ref::<String>()
                    .cloned()
                    .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                return (done, gaps, Some((seed, text.unwrap_or_default())));
            }
        }
        seed += 1;
    }
    (done, gaps, None)
}

fn setting(name: &str) -> Option<u64> {
    #[expect(clippy::disallowed_methods, reason = "a test's own settings")]
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn nothing_is_lost_doubled_or_stuck_whatever_fails() {
    let seed = setting("SIMULATION_SEED").unwrap_or_else(|| fastrand::u64(..1 << 40));
    let steps = setting("SIMULATION_STEPS").unwrap_or(1_000_000) as usize;
    let (done, gaps, failure) = run(RIGHT, seed, steps);
    println!("{done} steps from seed {seed}; {gaps} gaps were found and repaired");
    assert!(
        failure.is_none(),
        "SIMULATION_SEED={} repeats it: {}",
        failure.as_ref().map_or(0, |(seed, _)| *seed),
        failure.map(|(_, text)| text).unwrap_or_default()
    );
    assert!(gaps > 0 || steps < 1_000_000, "the faults did not break a single chain");
}

#[test]
fn a_seed_repeats_its_worlds() {
    assert_eq!(run(RIGHT, 7, 100_000), run(RIGHT, 7, 100_000));
}

/// Each of these mistakes was made, or nearly. The simulation has to notice it.
#[test]
fn a_planted_mistake_is_found() {
    let mistakes: [(&str, Decisions); 4] = [
        (
            "events are persisted whatever they follow",
            Decisions { link: |_, _, _| Link::Continues, ..RIGHT },
        ),
        (
            "a deadline does not look whether the turn has ended",
            Decisions {
                ending: |_, log| {
                    let newest = log.streamed.map_or(0, |(id, _)| id);
                    Step::Append {
                        expected: newest,
                        follows: log
                            .streamed
                            .or(log.persisted)
                            .map_or(Mark::default(), |(id, event)| Mark::of(id, event)),
                    }
                },
                ..RIGHT
            },
        ),
        (
            "events are told apart by their ids alone",
            Decisions {
                link: |persisted, id, follows| {
                    let by_id = |mark: Mark| Mark { tag: 0, ..mark };
                    chain::link(persisted.map(by_id), id, follows.map(by_id))
                },
                ..RIGHT
            },
        ),
        (
            "a runner always continues from the stream",
            Decisions {
                position: |streamed, _, turn, epoch| {
                    position::position(streamed, None, turn, epoch)
                },
                ..RIGHT
            },
        ),
    ];
    let found: Vec<_> = mistakes
        .iter()
        .map(|(mistake, decisions)| (*mistake, run(*decisions, 1, 3_000_000).2))
        .collect();
    for (mistake, failure) in found {
        assert!(failure.is_some(), "not noticed: {mistake}");
    }
}
