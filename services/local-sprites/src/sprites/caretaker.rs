//! Keeps all Sprites together within their limits: freezes and stops idle ones, and stops the one
//! that fills the disk.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use service::Lifecycle;

use crate::sprites::{
    budget::Step,
    image::Images,
    registry::Registry,
    sprite::{Sprite, Status},
};

const CHECK: Duration = Duration::from_secs(1);
/// How often it is looked for images that are too old.
const EXPIRE: Duration = Duration::from_secs(30);
/// Above so many hundredths of the memory for all Sprites, frozen ones are stopped.
const MEMORY_FULL_PERCENT: u64 = 90;

/// Keeps the Sprites within the budget until the server stops.
pub async fn keep(registry: Arc<Registry>, lifecycle: Lifecycle) {
    let stop = lifecycle.stop_token();
    let (mut disks, mut expired) = (HashMap::new(), Instant::now());
    while stop.run_until_cancelled(tokio::time::sleep(CHECK)).await.is_some() {
        keep_disk_free(&registry, &mut disks).await;
        free_memory(&registry).await;
        end_idle(&registry).await;
        if expired.elapsed() > EXPIRE {
            expired = Instant::now();
            if let Some(images) = &registry.images {
                images.expire();
            }
        }
    }
}

async fn end_idle(registry: &Registry) {
    let idle = registry.budget().idle;
    for sprite in registry.all().into_iter().filter(|sprite| !sprite.is_in_use()) {
        let done = match idle.step(sprite.status(), sprite.idle()) {
            Some(Step::Freeze) => {
                registry.pause_unused(&sprite, idle.freeze_after.unwrap_or_default()).await
            }
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
    let frozen = registry
        .all()
        .into_iter()
        .filter(|sprite| sprite.status() == Status::Warm && !sprite.is_in_use());
    if let Some(sprite) = frozen.max_by_key(|sprite| sprite.idle()) {
        tracing::info!(
            sprite = sprite.name(),
            used_bytes = used,
            limit_bytes = limit,
            "stopping an idle Sprite: memory is short"
        );
        let _ = registry.stop_unused(&sprite).await;
    }
}

/// Stops the Sprite that fills the disk. What it has written to memory by then still arrives: that
/// is what the reserve is for.
async fn keep_disk_free(registry: &Registry, before: &mut HashMap<PathBuf, u64>) {
    let running: Vec<Arc<Sprite>> =
        registry.all().into_iter().filter(|sprite| sprite.status() == Status::Running).collect();
    let now: HashMap<PathBuf, u64> =
        running.iter().map(|sprite| (sprite.dir().to_path_buf(), sprite.disk_bytes())).collect();
    let before = std::mem::replace(before, now);
    let full = || registry.disk_space().filter(|disk| registry.budget().is_full(*disk));
    // Before what runs is ended: an image can be made again. As many as it takes at once, since the
    // disk fills meanwhile.
    while let Some(disk) = full()
        && registry.images.as_ref().is_some_and(Images::remove_oldest)
    {
        tracing::warn!(
            free_bytes = disk.free_bytes,
            "deleted the least recently used image: the machine's disk is full"
        );
    }
    let Some(disk) = full() else { return };
    let growth = |sprite: &Sprite| {
        sprite.disk_bytes().saturating_sub(before.get(sprite.dir()).copied().unwrap_or_default())
    };
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

/// Which of the disks grew most, of those that grew.
fn fastest<'a, T>(growth: impl Iterator<Item = (&'a T, u64)>) -> Option<&'a T> {
    growth.filter(|(_, bytes)| *bytes > 0).max_by_key(|(_, bytes)| *bytes).map(|(one, _)| one)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_that_grows_most_is_found_and_one_that_does_not_grow_is_not() {
        assert_eq!(fastest([(&"a", 0), (&"b", 0)].into_iter()), None);
        assert_eq!(fastest([(&"a", 5), (&"b", 9), (&"c", 0)].into_iter()), Some(&"b"));
    }
}
