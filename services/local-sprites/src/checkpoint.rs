//! Checkpoints of a Sprite's disk: what it has written, kept under a number, and put back (docs/sprites-api.md §7).

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use types::Timestamp;

use crate::{
    disk::Disks,
    registry::{Registry, RegistryError, Sprite},
    sandbox::write_atomically,
};

/// Checkpoints of one Sprite at a time.
pub const CHECKPOINTS_MAX: usize = 5;

/// Where they are in a Sprite's directory.
const DIRECTORY: &str = "checkpoints";

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Checkpoint {
    pub id: String,
    pub created_at_us: i64,
    pub comment: Option<String>,
}

/// A checkpoint's name: `v` and a number, so never a path.
fn is_id(id: &str) -> bool {
    id.strip_prefix('v').is_some_and(|number| !number.is_empty() && number.len() < 10 && number.bytes().all(|byte| byte.is_ascii_digit()))
}

fn dir(sprite: &Sprite) -> PathBuf {
    sprite.dir().join(DIRECTORY)
}

/// The blocks of this machine that a Sprite's disk and its checkpoints take; 0 where disks are directories.
pub fn disk_bytes(sprite_dir: &Path) -> u64 {
    let copies = fs::read_dir(sprite_dir.join(DIRECTORY)).into_iter().flatten().flatten();
    Disks::image_bytes(sprite_dir) + copies.map(|copy| Disks::image_bytes(&copy.path())).sum::<u64>()
}

fn read(sprite: &Sprite, id: &str) -> Result<Checkpoint, RegistryError> {
    let found = || serde_json::from_slice(&fs::read(dir(sprite).join(id).join("checkpoint.json")).ok()?).ok();
    if is_id(id) { found().ok_or(RegistryError::NoCheckpoint) } else { Err(RegistryError::NoCheckpoint) }
}

/// All of a Sprite's, the oldest first.
pub fn list(sprite: &Sprite) -> Vec<Checkpoint> {
    let entries = fs::read_dir(dir(sprite)).into_iter().flatten().flatten();
    let mut all: Vec<_> = entries.filter_map(|entry| read(sprite, entry.file_name().to_str()?).ok()).collect();
    all.sort_by_key(|checkpoint| checkpoint.created_at_us);
    all
}

pub fn get(sprite: &Sprite, id: &str) -> Result<Checkpoint, RegistryError> {
    read(sprite, id)
}

impl Registry {
    /// Keeps a Sprite's disk as it is now. What runs in it waits meanwhile.
    pub async fn make_checkpoint(self: &Arc<Self>, sprite: &Arc<Sprite>, comment: Option<String>) -> Result<Checkpoint, RegistryError> {
        let (registry, sprite) = (self.clone(), sprite.clone());
        self.uninterrupted(async move {
            let _life = sprite.hold().await?;
            if list(&sprite).len() >= CHECKPOINTS_MAX {
                return Err(RegistryError::TooManyCheckpoints);
            }
            registry.check_room(&sprite).await?;
            let number = sprite.record().checkpoints_made;
            // Its number is used up before it is there: a later one never takes its place.
            sprite.change(|record| record.checkpoints_made += 1)?;
            let checkpoint = Checkpoint { id: format!("v{number}"), created_at_us: Timestamp::now().unix_micros(), comment };
            let draft = dir(&sprite).join("draft");
            let copy = async {
                remove(&draft)?;
                fs::create_dir_all(&draft)?;
                registry.sandboxes.snapshot(sprite.dir(), sprite.holder(), &draft).await?;
                write_atomically(&draft.join("checkpoint.json"), &serde_json::to_vec(&checkpoint)?)?;
                fs::rename(&draft, dir(&sprite).join(&checkpoint.id))
            };
            if let Err(error) = copy.await {
                let _ = remove(&draft);
                return Err(RegistryError::Checkpoint(error));
            }
            Ok(checkpoint)
        })
        .await
    }

    /// Refuses a checkpoint that would have the disk and its copies hold more than the disk may.
    async fn check_room(&self, sprite: &Sprite) -> Result<(), RegistryError> {
        let Some(limit) = self.sandboxes.disk_bytes() else { return Ok(()) };
        let disk = sprite.dir().to_path_buf();
        let used = tokio::task::spawn_blocking(move || Disks::image_bytes(&disk) + disk_bytes(&disk));
        let used = used.await.map_err(|_| RegistryError::Closed)?;
        if used > limit { Err(RegistryError::CheckpointsTooLarge) } else { Ok(()) }
    }

    /// Puts a Sprite's disk back as it was. All that runs in the Sprite ends, and it is started anew.
    pub async fn restore_checkpoint(self: &Arc<Self>, sprite: &Arc<Sprite>, id: &str) -> Result<(), RegistryError> {
        let checkpoint = read(sprite, id)?;
        let (registry, sprite) = (self.clone(), sprite.clone());
        self.uninterrupted(async move {
            let _life = sprite.hold().await?;
            let disks = registry.sandboxes.disks();
            let draft = dir(&sprite).join("draft");
            let copy = async {
                remove(&draft)?;
                fs::create_dir_all(&draft)?;
                disks.copy(&dir(&sprite).join(&checkpoint.id), &draft).await
            };
            copy.await.map_err(RegistryError::Checkpoint)?;
            registry.end(&sprite).await;
            disks.replace(sprite.dir(), &draft).and_then(|()| remove(&draft)).map_err(RegistryError::Checkpoint)?;
            registry.boot(&sprite).await.map(|_| ())
        })
        .await
    }

    pub async fn delete_checkpoint(&self, sprite: &Sprite, id: &str) -> Result<(), RegistryError> {
        let checkpoint = read(sprite, id)?;
        let _life = sprite.hold().await?;
        // Not in the list from here on, even when it is left half deleted.
        fs::remove_file(dir(sprite).join(&checkpoint.id).join("checkpoint.json")).map_err(RegistryError::Checkpoint)?;
        remove(&dir(sprite).join(&checkpoint.id)).map_err(RegistryError::Checkpoint)
    }
}

fn remove(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
