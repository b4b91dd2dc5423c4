//! Memory and descriptors of each process of the stack over time, and how fast they grow.

use std::{fs, time::Duration};

use serde_json::{Value, json};

use crate::{Stack, faults::with_children};

/// What a process takes just after its start is not growth.
const WARM_UP_SECONDS: f64 = 60.0;
/// Growth is judged where one process lived so long: a fit over minutes shows caches that fill.
const JUDGED_SECONDS: f64 = 7200.0;
const MEMORY_GROWTH_MAX: f64 = 16.0 * 1024.0 * 1024.0;
const DESCRIPTORS_GROWTH_MAX: f64 = 30.0;

#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    /// Seconds since the beginning.
    pub at: f64,
    pub memory_bytes: u64,
    pub descriptors: u64,
}

/// One process, from its start to its end.
#[derive(Debug)]
pub(super) struct Process {
    pub service: String,
    pid: u32,
    pub samples: Vec<Sample>,
}

impl Process {
    pub fn new(service: &str, pid: u32, samples: Vec<Sample>) -> Self {
        Self { service: service.to_owned(), pid, samples }
    }
}

#[derive(Debug, Default)]
pub(super) struct Usage(pub Vec<Process>);

/// What the processes of a service took.
#[derive(Debug)]
pub struct ServiceUsage {
    pub service: String,
    pub processes: usize,
    /// Of the processes that were there at the end, together.
    pub memory_bytes: u64,
    pub descriptors: u64,
    /// The most that one process had.
    pub memory_bytes_max: u64,
    pub descriptors_max: u64,
    /// In an hour, over the second half of the run; none where no process lived long enough.
    pub memory_growth: Option<f64>,
    pub descriptors_growth: Option<f64>,
    pub longest_life: Duration,
}

impl ServiceUsage {
    /// Whether it grew without an end, as far as that can be told.
    #[must_use]
    pub fn grows(&self) -> bool {
        let exceeds = |growth: Option<f64>, max: f64| growth.is_some_and(|growth| growth > max);
        let is_judged = self.longest_life.as_secs_f64() >= JUDGED_SECONDS;
        is_judged
            && (exceeds(self.memory_growth, MEMORY_GROWTH_MAX)
                || exceeds(self.descriptors_growth, DESCRIPTORS_GROWTH_MAX))
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "service": self.service,
            "processes": self.processes,
            "memory_bytes": self.memory_bytes,
            "memory_bytes_max": self.memory_bytes_max,
            "memory_bytes_growth_per_hour": self.memory_growth,
            "descriptors": self.descriptors,
            "descriptors_max": self.descriptors_max,
            "descriptors_growth_per_hour": self.descriptors_growth,
            "longest_life_seconds": self.longest_life.as_secs(),
        })
    }
}

impl Usage {
    /// Takes a sample of every process that runs.
    pub fn sample(&mut self, stack: &Stack, at: f64) {
        let services = stack.ready("/services");
        let names = services.as_object().into_iter().flat_map(|services| services.keys());
        let pids = names
            .flat_map(|name| stack.pids(name).into_iter().map(move |pid| (name.as_str(), pid)));
        for (service, pid) in pids.chain([("aod dev", stack.pid())]) {
            let Some((memory_bytes, descriptors)) = takes(service, pid) else { continue };
            let sample = Sample { at, memory_bytes, descriptors };
            match self.0.iter_mut().find(|process| process.pid == pid && process.service == service)
            {
                Some(process) => process.samples.push(sample),
                None => self.0.push(Process::new(service, pid, vec![sample])),
            }
        }
    }

    /// Sums up each service of a run that lasted so long.
    pub fn by_service(&self, seconds: f64) -> Vec<ServiceUsage> {
        let mut names: Vec<&str> = self.0.iter().map(|process| process.service.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        names.into_iter().map(|name| self.of(name, seconds)).collect()
    }

    fn of(&self, service: &str, seconds: f64) -> ServiceUsage {
        let processes: Vec<&Process> =
            self.0.iter().filter(|process| process.service == service).collect();
        let newest = self
            .0
            .iter()
            .filter_map(|process| process.samples.last())
            .map(|sample| sample.at)
            .fold(0.0, f64::max);
        let at_the_end = processes
            .iter()
            .filter_map(|process| process.samples.last())
            .filter(|sample| sample.at >= newest);
        let (memory_bytes, descriptors) =
            at_the_end.fold((0, 0), |(memory, descriptors), sample| {
                (memory + sample.memory_bytes, descriptors + sample.descriptors)
            });
        let samples = || processes.iter().flat_map(|process| &process.samples);
        let series = |value: fn(&Sample) -> u64| -> Vec<Vec<(f64, f64)>> {
            processes
                .iter()
                .map(|process| {
                    settled(process, seconds)
                        .map(|sample| (sample.at, value(sample) as f64))
                        .collect()
                })
                .collect()
        };
        let life = |process: &&Process| {
            process
                .samples
                .last()
                .zip(process.samples.first())
                .map_or(0.0, |(last, first)| last.at - first.at)
        };
        ServiceUsage {
            service: service.to_owned(),
            processes: processes.len(),
            memory_bytes,
            descriptors,
            memory_bytes_max: samples().map(|sample| sample.memory_bytes).max().unwrap_or_default(),
            descriptors_max: samples().map(|sample| sample.descriptors).max().unwrap_or_default(),
            memory_growth: slope(&series(|sample| sample.memory_bytes)).map(|slope| slope * 3600.0),
            descriptors_growth: slope(&series(|sample| sample.descriptors))
                .map(|slope| slope * 3600.0),
            longest_life: Duration::from_secs_f64(processes.iter().map(life).fold(0.0, f64::max)),
        }
    }

    pub fn json(&self) -> Value {
        let samples = |process: &Process| -> Vec<Value> {
            process
                .samples
                .iter()
                .map(|sample| {
                    json!([
                        (sample.at * 10.0).round() / 10.0,
                        sample.memory_bytes,
                        sample.descriptors
                    ])
                })
                .collect()
        };
        self.0.iter().map(|process| json!({ "service": process.service, "pid": process.pid, "samples": samples(process) })).collect()
    }
}

/// The samples of a process that has warmed up, in the second half of the run.
fn settled(process: &Process, seconds: f64) -> impl Iterator<Item = &Sample> {
    let begun = process.samples.first().map_or(0.0, |sample| sample.at);
    process
        .samples
        .iter()
        .filter(move |sample| sample.at >= seconds / 2.0 && sample.at >= begun + WARM_UP_SECONDS)
}

/// The common slope of several series, each with a level of its own, by least squares.
fn slope(series: &[Vec<(f64, f64)>]) -> Option<f64> {
    let (mut products, mut squares) = (0.0, 0.0);
    for points in series.iter().filter(|points| points.len() > 2) {
        let count = points.len() as f64;
        let x_mean = points.iter().map(|(x, _)| x).sum::<f64>() / count;
        let y_mean = points.iter().map(|(_, y)| y).sum::<f64>() / count;
        products += points.iter().map(|(x, y)| (x - x_mean) * (y - y_mean)).sum::<f64>();
        squares += points.iter().map(|(x, _)| (x - x_mean).powi(2)).sum::<f64>();
    }
    (squares > 0.0).then(|| products / squares)
}

/// The resident memory and the number of descriptors of a process. Postgres works in child
/// processes: they are counted with it, and what they share once.
fn takes(service: &str, pid: u32) -> Option<(u64, u64)> {
    if service != "postgres" {
        return field_kib(&format!("/proc/{pid}/status"), "VmRSS:").zip(descriptors(pid));
    }
    // A child may have ended meanwhile.
    let tree = with_children(pid);
    let memory =
        tree.iter().filter_map(|pid| field_kib(&format!("/proc/{pid}/smaps_rollup"), "Pss:")).sum();
    let descriptors = tree.iter().filter_map(|pid| descriptors(*pid)).sum();
    (memory > 0).then_some((memory, descriptors))
}

fn field_kib(path: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(value.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
}

fn descriptors(pid: u32) -> Option<u64> {
    Some(fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(begun: u32, ended: u32, memory: impl Fn(f64) -> f64) -> Process {
        let samples = (begun..ended).step_by(10).map(|at| {
            let at = f64::from(at);
            Sample { at, memory_bytes: memory(at) as u64, descriptors: 20 }
        });
        Process::new("gateway", begun, samples.collect())
    }

    #[test]
    fn growth_is_that_within_processes_and_not_from_one_to_the_next() {
        // Each process starts larger than its predecessor, and none grows.
        let steps = Usage(
            (0..6)
                .map(|number| {
                    process(number * 600, number * 600 + 600, |_| 1e6 * f64::from(number))
                })
                .collect(),
        );
        let [usage] = &steps.by_service(3600.0)[..] else { panic!("one service") };
        assert_eq!((usage.processes, usage.memory_bytes, usage.descriptors), (6, 5_000_000, 20));
        assert!(usage.memory_growth.unwrap().abs() < 1.0 && !usage.grows(), "{usage:?}");
        // Each grows by 1 KB a second.
        let leaks = Usage(
            (0..6)
                .map(|number| process(number * 600, number * 600 + 600, |at| 1000.0 * (at % 600.0)))
                .collect(),
        );
        let growth = leaks.by_service(3600.0)[0].memory_growth.unwrap();
        assert!((growth - 3.6e6).abs() < 1e3, "{growth}");
    }

    #[test]
    fn a_process_that_grew_for_hours_is_found() {
        let usage = |per_second: f64| {
            let leak = Usage(vec![process(0, 8 * 3600, |at| 1e7 + per_second * at)]);
            leak.by_service(8.0 * 3600.0).remove(0)
        };
        assert!(usage(10_000.0).grows() && !usage(100.0).grows());
        let short = Usage(vec![process(0, 600, |at| 10_000.0 * at)]).by_service(600.0).remove(0);
        assert!(!short.grows() && short.memory_growth.is_some(), "{short:?}");
    }
}
