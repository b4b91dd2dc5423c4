//! Limits of all Sprites together, and how long an idle Sprite keeps its resources.
//!
//! Memory, CPUs and processes are limits of the control group above all Sprites. While less of the
//! disk is free than the reserve, Sprites with more than the average do not start. The caretaker
//! watches the disk and the idle.

use std::{fs, time::Duration};

use crate::sprites::sprite::Status;

/// Memory that stays with the machine's own programs.
const MEMORY_RESERVE_BYTES: u64 = 2 << 30;

/// What all Sprites together may take.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// All of the machine's memory but [`MEMORY_RESERVE_BYTES`], where none.
    pub memory_bytes: Option<u64>,
    /// In thousandths of a CPU; all of them where none.
    pub cpu_milli: Option<u64>,
    /// What stays free on the file system that holds the Sprites' disks; a quarter of a small one.
    pub disk_reserve_bytes: u64,
    pub idle: Idle,
}

/// The file system that holds the Sprites' disks.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    pub total_bytes: u64,
    pub free_bytes: u64,
}

/// After how long without use a Sprite is frozen, and after how long frozen it is stopped; never
/// where none.
#[derive(Clone, Copy, Debug)]
pub struct Idle {
    pub freeze_after: Option<Duration>,
    pub stop_after: Option<Duration>,
}

/// What an idle Sprite is due for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Freeze,
    Stop,
}

impl Budget {
    /// The memory of all Sprites together, on a machine or in a container that has `total`. At
    /// least half of it: on a small machine the reserve would leave nothing.
    pub fn memory(&self, total: u64) -> u64 {
        self.memory_bytes
            .unwrap_or_else(|| total.saturating_sub(MEMORY_RESERVE_BYTES).max(total / 2))
            .min(total)
    }

    pub fn disk_reserve(&self, disk: Space) -> u64 {
        self.disk_reserve_bytes.min(disk.total_bytes / 4)
    }

    pub fn is_full(&self, disk: Space) -> bool {
        disk.free_bytes < self.disk_reserve(disk)
    }

    /// Whether a Sprite may start: with room left, any; with little, those that hold no more than
    /// the average.
    pub fn may_start(&self, disk: Space, own: u64, average: u64) -> bool {
        !self.is_full(disk) || (disk.free_bytes >= self.disk_reserve(disk) / 2 && own <= average)
    }
}

impl Idle {
    pub fn step(self, status: Status, idle: Duration) -> Option<Step> {
        let freeze_after = self.freeze_after?;
        match status {
            Status::Running if idle > freeze_after => Some(Step::Freeze),
            Status::Warm if self.stop_after.is_some_and(|after| idle > freeze_after + after) => {
                Some(Step::Stop)
            }
            _ => None,
        }
    }
}

/// The machine's memory.
pub fn machine_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let kib =
        text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?.trim().strip_suffix("kB")?;
    Some(kib.trim().parse::<u64>().ok()? << 10)
}

/// Half of the processes and threads that this machine can have.
pub fn processes() -> Option<u64> {
    let limit = |file: &str| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
    let limits =
        ["/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"].into_iter().filter_map(limit);
    limits.min().map(|limit| limit / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn budget(memory_bytes: Option<u64>) -> Budget {
        let idle = Idle {
            freeze_after: Some(Duration::from_secs(300)),
            stop_after: Some(Duration::from_secs(3600)),
        };
        Budget { memory_bytes, cpu_milli: None, disk_reserve_bytes: 4 * GIB, idle }
    }

    #[test]
    fn the_machine_keeps_two_gibibytes_or_half_of_its_memory() {
        assert_eq!(budget(None).memory(16 * GIB), 14 * GIB);
        assert_eq!(budget(None).memory(3 * GIB), 3 * GIB / 2);
        assert_eq!(budget(Some(8 * GIB)).memory(16 * GIB), 8 * GIB);
        assert_eq!(budget(Some(64 * GIB)).memory(16 * GIB), 16 * GIB);
    }

    #[test]
    fn a_full_disk_refuses_the_large_before_the_small() {
        let budget = budget(None);
        let disk = |free| Space { total_bytes: 100 * GIB, free_bytes: free };
        assert!(budget.may_start(disk(5 * GIB), 9 * GIB, GIB));
        assert!(!budget.may_start(disk(3 * GIB), 9 * GIB, GIB));
        assert!(budget.may_start(disk(3 * GIB), 0, GIB));
        assert!(!budget.may_start(disk(GIB), 0, GIB));
        let small = Space { total_bytes: 4 * GIB, free_bytes: 2 * GIB };
        assert!(budget.may_start(small, 2 * GIB, GIB), "the reserve is a quarter of a small disk");
    }

    #[test]
    fn an_idle_sprite_is_frozen_then_stopped() {
        let idle = budget(None).idle;
        let minutes = |number: u64| Duration::from_secs(number * 60);
        assert_eq!(idle.step(Status::Running, minutes(4)), None);
        assert_eq!(idle.step(Status::Running, minutes(6)), Some(Step::Freeze));
        assert_eq!(idle.step(Status::Warm, minutes(64)), None);
        assert_eq!(idle.step(Status::Warm, minutes(66)), Some(Step::Stop));
        assert_eq!(idle.step(Status::Cold, minutes(600)), None);
        assert_eq!(Idle { freeze_after: None, ..idle }.step(Status::Running, minutes(600)), None);
    }
}
