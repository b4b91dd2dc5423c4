//! What all Sprites together may take of this machine, and how long an idle one keeps its part.
//!
//! Memory, CPUs and processes are limits of the control group above all Sprites. The disk is watched: when less than the reserve is
//! free, the running Sprite whose disk grew most is stopped, and Sprites with more than the average do not start.

use std::{collections::HashMap, fs, path::PathBuf, sync::Arc, time::Duration};

use service::Lifecycle;

use crate::{
    checkpoint,
    registry::{Registry, Sprite, Status},
};

/// Memory that stays with the machine's own programs.
const MEMORY_RESERVE_BYTES: u64 = 2 << 30;
const CHECK: Duration = Duration::from_secs(1);
/// Above so many hundredths of the memory for all Sprites, frozen ones are stopped.
const MEMORY_FULL_PERCENT: u64 = 90;

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

/// After how long without use a Sprite is frozen, and after how long frozen it is stopped; never where none.
#[derive(Clone, Copy, Debug)]
pub struct Idle {
    pub freeze_after: Option<Duration>,
    pub stop_after: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Freeze,
    Stop,
}

impl Budget {
    /// The memory of all Sprites together, on a machine or in a container that has `total`. At least half of it: on a small machine the
    /// reserve would leave nothing.
    pub fn memory(&self, total: u64) -> u64 {
        self.memory_bytes.unwrap_or_else(|| total.saturating_sub(MEMORY_RESERVE_BYTES).max(total / 2)).min(total)
    }

    pub fn disk_reserve(&self, disk: Space) -> u64 {
        self.disk_reserve_bytes.min(disk.total_bytes / 4)
    }

    pub fn is_full(&self, disk: Space) -> bool {
        disk.free_bytes < self.disk_reserve(disk)
    }

    /// Whether a Sprite may start: with room left, any; with little, those that hold no more than the average.
    pub fn may_start(&self, disk: Space, own: u64, average: u64) -> bool {
        !self.is_full(disk) || (disk.free_bytes >= self.disk_reserve(disk) / 2 && own <= average)
    }
}

impl Idle {
    fn step(self, status: Status, idle: Duration) -> Option<Step> {
        let freeze_after = self.freeze_after?;
        match status {
            Status::Running if idle > freeze_after => Some(Step::Freeze),
            Status::Warm if self.stop_after.is_some_and(|after| idle > freeze_after + after) => Some(Step::Stop),
            _ => None,
        }
    }
}

/// The machine's memory.
pub fn machine_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let kib = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?.trim().strip_suffix("kB")?;
    Some(kib.trim().parse::<u64>().ok()? << 10)
}

/// Half of the processes and threads that this machine can have.
pub fn processes() -> Option<u64> {
    let limit = |file: &str| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
    let limits = ["/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"].into_iter().filter_map(limit);
    limits.min().map(|limit| limit / 2)
}

/// Which of the disks grew most, of those that grew.
fn fastest<'a, T>(growth: impl Iterator<Item = (&'a T, u64)>) -> Option<&'a T> {
    growth.filter(|(_, bytes)| *bytes > 0).max_by_key(|(_, bytes)| *bytes).map(|(one, _)| one)
}

/// Keeps the Sprites within the budget until the server stops.
pub async fn keep(registry: Arc<Registry>, lifecycle: Lifecycle) {
    let stop = lifecycle.stop_token();
    let mut disks = HashMap::new();
    while stop.run_until_cancelled(tokio::time::sleep(CHECK)).await.is_some() {
        keep_disk_free(&registry, &mut disks).await;
        free_memory(&registry).await;
        end_idle(&registry).await;
    }
}

async fn end_idle(registry: &Registry) {
    let idle = registry.budget().idle;
    for sprite in registry.all().into_iter().filter(|sprite| !sprite.is_in_use()) {
        let done = match idle.step(sprite.status(), sprite.idle()) {
            Some(Step::Freeze) => registry.pause_unused(&sprite, idle.freeze_after.unwrap_or_default()).await,
            Some(Step::Stop) => registry.stop_unused(&sprite).await,
            None => continue,
        };
        if let Err(error) = done {
            tracing::debug!(%error, sprite = sprite.name(), "failed to pause an idle Sprite");
        }
    }
}

/// Stops the frozen Sprite that has been idle for longest, when memory is short.
async fn free_memory(registry: &Registry) {
    let Some((used, limit)) = registry.memory() else { return };
    if used < limit / 100 * MEMORY_FULL_PERCENT {
        return;
    }
    let frozen = registry.all().into_iter().filter(|sprite| sprite.status() == Status::Warm && !sprite.is_in_use());
    if let Some(sprite) = frozen.max_by_key(|sprite| sprite.idle()) {
        tracing::info!(sprite = sprite.name(), used_bytes = used, limit_bytes = limit, "stopping an idle Sprite: memory is short");
        let _ = registry.stop_unused(&sprite).await;
    }
}

/// Stops the Sprite that fills the disk. What it has written to memory by then still arrives: that is what the reserve is for.
async fn keep_disk_free(registry: &Registry, before: &mut HashMap<PathBuf, u64>) {
    let running: Vec<Arc<Sprite>> = registry.all().into_iter().filter(|sprite| sprite.status() == Status::Running).collect();
    let now: HashMap<PathBuf, u64> =
        running.iter().map(|sprite| (sprite.dir().to_path_buf(), checkpoint::disk_bytes(sprite.dir()))).collect();
    let before = std::mem::replace(before, now);
    let Some(disk) = registry.disk_space().filter(|disk| registry.budget().is_full(*disk)) else { return };
    let growth =
        |sprite: &Sprite| checkpoint::disk_bytes(sprite.dir()).saturating_sub(before.get(sprite.dir()).copied().unwrap_or_default());
    if let Some(sprite) = fastest(running.iter().map(|sprite| (sprite, growth(sprite)))) {
        tracing::warn!(
            sprite = sprite.name(),
            free_bytes = disk.free_bytes,
            "stopping the Sprite whose disk grows most: the machine's disk is full"
        );
        if let Err(error) = registry.stop(sprite).await {
            tracing::warn!(%error, sprite = sprite.name(), "failed to stop the Sprite that fills the disk");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn budget(memory_bytes: Option<u64>) -> Budget {
        let idle = Idle { freeze_after: Some(Duration::from_secs(300)), stop_after: Some(Duration::from_secs(3600)) };
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
    fn the_disk_that_grows_most_is_found_and_one_that_does_not_grow_is_not() {
        assert_eq!(fastest([(&"a", 0), (&"b", 0)].into_iter()), None);
        assert_eq!(fastest([(&"a", 5), (&"b", 9), (&"c", 0)].into_iter()), Some(&"b"));
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
