//! Checkpoints: numbered copies of what a Sprite has written to its disk, and their restore
//! (docs/sprites-api.md §7).

use std::{fs, io, path::Path, sync::Arc};

use serde::{Deserialize, Serialize};
use types::Timestamp;

use crate::{
    atomic::write_atomically,
    files::tree,
    isolation::disk::Disks,
    sprites::{
        registry::Registry,
        sprite::{CHECKPOINTS_MAX, RegistryError, Sprite},
    },
};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Checkpoint {
    pub id: String,
    pub created_at_us: i64,
    pub comment: Option<String>,
}

/// A checkpoint's name: `v` and a number, so never a path.
fn is_id(id: &str) -> bool {
    id.strip_prefix('v').is_some_and(|number| {
        !number.is_empty() && number.len() < 10 && number.bytes().all(|byte| byte.is_ascii_digit())
    })
}

fn read(sprite: &Sprite, id: &str) -> Result<Checkpoint, RegistryError> {
    let found = || {
        serde_json::from_slice(
            &fs::read(sprite.checkpoints_dir().join(id).join("checkpoint.json")).ok()?,
        )
        .ok()
    };
    if is_id(id) {
        found().ok_or(RegistryError::NoCheckpoint)
    } else {
        Err(RegistryError::NoCheckpoint)
    }
}

/// All of a Sprite's, the oldest first.
pub fn list(sprite: &Sprite) -> Vec<Checkpoint> {
    let entries = fs::read_dir(sprite.checkpoints_dir()).into_iter().flatten().flatten();
    let mut all: Vec<_> =
        entries.filter_map(|entry| read(sprite, entry.file_name().to_str()?).ok()).collect();
    all.sort_by_key(|checkpoint| checkpoint.created_at_us);
    all
}

pub fn get(sprite: &Sprite, id: &str) -> Result<Checkpoint, RegistryError> {
    read(sprite, id)
}

impl Registry {
    /// Keeps a Sprite's disk as it is now. What runs in it waits meanwhile.
    pub async fn make_checkpoint(
        self: &Arc<Self>,
        sprite: &Arc<Sprite>,
        comment: Option<String>,
    ) -> Result<Checkpoint, RegistryError> {
        let (registry, sprite) = (self.clone(), sprite.clone());
        self.uninterrupted(async move {
            let _hold = sprite.hold().await?;
            if list(&sprite).len() >= CHECKPOINTS_MAX {
                return Err(RegistryError::TooManyCheckpoints);
            }
            registry.check_room(&sprite).await?;
            let number = sprite.record().checkpoints_made;
            // Its number is used up before it is there: a later one never takes its place.
            sprite.change(|record| record.checkpoints_made += 1)?;
            let checkpoint = Checkpoint {
                id: format!("v{number}"),
                created_at_us: Timestamp::now().unix_micros(),
                comment,
            };
            let draft = sprite.checkpoints_dir().join("draft");
            let copy = async {
                remove(&draft)?;
                fs::create_dir_all(&draft)?;
                registry.sandboxes.snapshot(sprite.dir(), sprite.holder(), &draft).await?;
                write_atomically(
                    &draft.join("checkpoint.json"),
                    &serde_json::to_vec(&checkpoint)?,
                )?;
                fs::rename(&draft, sprite.checkpoints_dir().join(&checkpoint.id))
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
    async fn check_room(&self, sprite: &Arc<Sprite>) -> Result<(), RegistryError> {
        let Some(limit) = self.sandboxes.disk_bytes() else { return Ok(()) };
        let sprite = sprite.clone();
        let used = tokio::task::spawn_blocking(move || {
            Disks::image_bytes(sprite.dir()) + sprite.disk_bytes()
        });
        let used = used.await.map_err(|_| RegistryError::Closed)?;
        if used > limit { Err(RegistryError::CheckpointsTooLarge) } else { Ok(()) }
    }

    /// Puts a Sprite's disk back as it was. All that runs in the Sprite ends, and it is restarted.
    pub async fn restore_checkpoint(
        self: &Arc<Self>,
        sprite: &Arc<Sprite>,
        id: &str,
    ) -> Result<(), RegistryError> {
        let checkpoint = read(sprite, id)?;
        let (registry, sprite) = (self.clone(), sprite.clone());
        self.uninterrupted(async move {
            let hold = sprite.hold().await?;
            let disks = registry.sandboxes.disks();
            let draft = sprite.checkpoints_dir().join("draft");
            let copy = async {
                remove(&draft)?;
                fs::create_dir_all(&draft)?;
                disks.copy(&sprite.checkpoints_dir().join(&checkpoint.id), &draft).await
            };
            copy.await.map_err(RegistryError::Checkpoint)?;
            registry.end(&hold).await;
            disks
                .replace(sprite.dir(), &draft)
                .and_then(|()| remove(&draft))
                .map_err(RegistryError::Checkpoint)?;
            registry.boot(&hold).await.map(|_| ())
        })
        .await
    }

    pub async fn delete_checkpoint(
        &self,
        sprite: &Arc<Sprite>,
        id: &str,
    ) -> Result<(), RegistryError> {
        let checkpoint = read(sprite, id)?;
        let _hold = sprite.hold().await?;
        // Not in the list from here on, even when it is left half deleted.
        fs::remove_file(sprite.checkpoints_dir().join(&checkpoint.id).join("checkpoint.json"))
            .map_err(RegistryError::Checkpoint)?;
        remove(&sprite.checkpoints_dir().join(&checkpoint.id)).map_err(RegistryError::Checkpoint)
    }
}

fn remove(dir: &Path) -> io::Result<()> {
    match tree::remove(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
