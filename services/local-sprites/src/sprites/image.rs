//! Images: kept disks that new Sprites begin from (docs/sprites-api.md §8.5).
//!
//! A caller drafts an image, which is a copy of a Sprite's disk as it is then, and keeps the draft
//! once it knows that the copy is what it wanted. Paths that the caller named are removed from the
//! copy first, and what was deleted before too: nothing of them is on an image. Images that are too
//! old, or of another root file system, are deleted, and those that were not used for longest where
//! all together are too large.

use std::{
    collections::HashMap,
    fmt,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use serde::{Deserialize, Serialize};
use types::Timestamp;
use uuid::Uuid;

use crate::{
    atomic::write_atomically,
    files::tree,
    isolation::disk::Disks,
    sprites::{registry::Registry, sprite::RegistryError},
    sync::locked,
};

/// A draft that is not kept by then is deleted.
const DRAFT_MAX: Duration = Duration::from_secs(120);
const DRAFT_PREFIX: &str = "draft.";
const KEY_BYTES_MAX: usize = 64;

/// The name of an image: lower-case letters, digits and dashes, so never a path, nor a draft's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageKey(String);

impl FromStr for ImageKey {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let is_plain =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let is_key = (1..=KEY_BYTES_MAX).contains(&text.len()) && text.bytes().all(is_plain);
        is_key.then(|| Self(text.to_owned())).ok_or(())
    }
}

impl fmt::Display for ImageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What images may take.
#[derive(Clone, Copy, Debug)]
pub struct ImageLimits {
    /// Of all together; 0: there are none.
    pub bytes_max: u64,
    pub age_max: Duration,
}

/// What is kept of an image beside its disk. When the file was written last is when the image was
/// used last.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    created_at_us: i64,
    bytes: u64,
}

#[derive(Debug)]
struct Draft {
    sprite: Uuid,
    key: ImageKey,
    /// Paths in the Sprite that are not part of the image.
    without: Vec<PathBuf>,
    at: Instant,
}

/// The images of one root file system.
#[derive(Debug)]
pub struct Images {
    dir: PathBuf,
    limits: ImageLimits,
    disks: Disks,
    drafts: Mutex<HashMap<Uuid, Draft>>,
}

impl Images {
    /// Takes up the images that are there, and deletes drafts and images of other root file
    /// systems. None where there are to be none.
    pub fn load(
        data_dir: &Path,
        fingerprint: &str,
        limits: ImageLimits,
        disks: Disks,
    ) -> io::Result<Option<Self>> {
        let (all, dir) = (data_dir.join("images"), data_dir.join("images").join(fingerprint));
        let is_kept = limits.bytes_max > 0;
        for entry in entries(&all) {
            for image in entries(&entry) {
                if entry != dir || !is_kept || is_draft(&image) {
                    discard(&image)?;
                }
            }
            if entry != dir || !is_kept {
                fs::remove_dir_all(entry)?;
            }
        }
        if !is_kept {
            return Ok(None);
        }
        fs::create_dir_all(&dir)?;
        let images = Self { dir, limits, disks, drafts: Mutex::default() };
        images.expire();
        Ok(Some(images))
    }

    /// The disk of an image, which counts as used now.
    pub fn find(&self, key: &ImageKey) -> Option<PathBuf> {
        let dir = self.dir.join(&key.0);
        if self.age(&dir)? > self.limits.age_max {
            return None;
        }
        let _ = File::open(record(&dir)).and_then(|file| file.set_modified(SystemTime::now()));
        Some(dir)
    }

    pub fn remove(&self, key: &ImageKey) {
        remove(&self.dir.join(&key.0));
    }

    /// What the copy of an image takes.
    pub fn bytes_of(&self, image: &Path) -> u64 {
        read(image).map_or(0, |record| record.bytes)
    }

    /// Deletes what is too old.
    pub fn expire(&self) {
        for image in self.all() {
            if self.age(&image).is_none_or(|age| age > self.limits.age_max) {
                remove(&image);
            }
        }
        let mut drafts = locked(&self.drafts);
        for (id, _) in drafts.extract_if(|_, draft| draft.at.elapsed() > DRAFT_MAX) {
            remove(&self.draft_dir(id));
        }
    }

    /// Deletes the image that was not used for longest. Returns whether there was one.
    pub fn remove_oldest(&self) -> bool {
        let oldest = self.all().into_iter().min_by_key(|image| used_at(image));
        if let Some(image) = &oldest {
            remove(image);
        }
        oldest.is_some()
    }

    /// The bytes of all images.
    pub fn bytes(&self) -> u64 {
        self.all().iter().filter_map(|image| Some(read(image)?.bytes)).sum()
    }

    fn all(&self) -> Vec<PathBuf> {
        entries(&self.dir).into_iter().filter(|image| !is_draft(image)).collect()
    }

    fn age(&self, image: &Path) -> Option<Duration> {
        let age_us = Timestamp::now().unix_micros().saturating_sub(read(image)?.created_at_us);
        Some(Duration::from_micros(u64::try_from(age_us).unwrap_or_default()))
    }

    fn draft_dir(&self, id: Uuid) -> PathBuf {
        self.dir.join(format!("{DRAFT_PREFIX}{}", id.simple()))
    }

    /// A draft in place of the Sprite's earlier one.
    fn add_draft(&self, id: Uuid, draft: Draft) {
        let mut drafts = locked(&self.drafts);
        for (earlier, _) in drafts.extract_if(|_, earlier| earlier.sprite == draft.sprite) {
            remove(&self.draft_dir(earlier));
        }
        drafts.insert(id, draft);
    }

    fn take_draft(&self, id: Uuid, sprite: Uuid) -> Option<Draft> {
        let mut drafts = locked(&self.drafts);
        drafts.get(&id).filter(|draft| draft.sprite == sprite)?;
        drafts.remove(&id)
    }

    /// Makes a draft an image, unless there is one with its key.
    async fn keep(&self, id: Uuid, draft: Draft) -> io::Result<()> {
        let dir = self.draft_dir(id);
        let kept = async {
            if self.find(&draft.key).is_some() {
                return Ok(false);
            }
            // It may be one that is too old.
            self.remove(&draft.key);
            let bytes = self.disks.strip(&dir, &draft.without).await?;
            if bytes > self.limits.bytes_max {
                let limit = self.limits.bytes_max;
                return Err(io::Error::other(format!("{bytes} bytes are more than {limit}")));
            }
            let image = Record { created_at_us: Timestamp::now().unix_micros(), bytes };
            write_atomically(&record(&dir), &serde_json::to_vec(&image)?)?;
            while self.bytes() + bytes > self.limits.bytes_max && self.remove_oldest() {}
            match fs::rename(&dir, self.dir.join(&draft.key.0)) {
                // Another's, made meanwhile.
                Err(_) if self.find(&draft.key).is_some() => Ok(false),
                renamed => renamed.map(|()| true),
            }
        };
        let kept = kept.await;
        if !matches!(kept, Ok(true)) {
            remove(&dir);
        }
        kept.map(|_| ())
    }
}

impl Registry {
    /// Copies a Sprite's disk as it is now, for an image. What runs in it waits meanwhile.
    pub async fn draft_image(
        self: &Arc<Self>,
        name: &str,
        key: ImageKey,
        without: Vec<PathBuf>,
    ) -> Result<Uuid, RegistryError> {
        let (registry, sprite) = (self.clone(), self.get(name)?);
        self.uninterrupted(async move {
            let images = registry.images.as_ref().ok_or(RegistryError::NoImages)?;
            let _hold = sprite.hold().await?;
            if images.find(&key).is_some() {
                return Err(RegistryError::ImageExists);
            }
            let _room = registry.room_for_copy(Disks::image_bytes(sprite.dir()))?;
            let id = Uuid::new_v4();
            let dir = images.draft_dir(id);
            let copied = async {
                fs::create_dir(&dir)?;
                registry.sandboxes.snapshot(sprite.dir(), sprite.holder(), &dir).await
            };
            if let Err(error) = copied.await {
                remove(&dir);
                return Err(RegistryError::Image(error));
            }
            let sprite = sprite.record().id;
            images.add_draft(id, Draft { sprite, key, without, at: Instant::now() });
            Ok(id)
        })
        .await
    }

    /// Makes a draft an image; the caller does not wait for that.
    pub fn keep_image(self: &Arc<Self>, name: &str, draft: Uuid) -> Result<(), RegistryError> {
        let sprite = self.get(name)?.record().id;
        let images = self.images.as_ref().ok_or(RegistryError::NoImages)?;
        let taken = images.take_draft(draft, sprite).ok_or(RegistryError::NoDraft)?;
        let registry = self.clone();
        self.lifecycle.tracker().spawn(async move {
            let Some(images) = &registry.images else { return };
            let key = taken.key.clone();
            match images.keep(draft, taken).await {
                Ok(()) => tracing::info!(%key, "image kept"),
                Err(error) => tracing::warn!(%error, %key, "an image cannot be kept"),
            }
        });
        Ok(())
    }

    /// Room on the machine's disk for a copy, if that and those under way leave the reserve.
    pub(super) fn room_for_copy(&self, bytes: u64) -> Result<Room<'_>, RegistryError> {
        let room = Room { copying: &self.copying, bytes };
        let copying = self.copying.fetch_add(bytes, Ordering::SeqCst) + bytes;
        let is_full = self.disk_space().is_some_and(|mut disk| {
            disk.free_bytes = disk.free_bytes.saturating_sub(copying);
            self.budget().is_full(disk)
        });
        if is_full { Err(RegistryError::DiskFull) } else { Ok(room) }
    }
}

/// Counts the bytes of a copy until it is dropped.
#[derive(Debug)]
pub(super) struct Room<'a> {
    copying: &'a AtomicU64,
    bytes: u64,
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.copying.fetch_sub(self.bytes, Ordering::SeqCst);
    }
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn is_draft(dir: &Path) -> bool {
    dir.file_name().is_some_and(|name| name.to_string_lossy().starts_with(DRAFT_PREFIX))
}

fn record(image: &Path) -> PathBuf {
    image.join("image.json")
}

fn read(image: &Path) -> Option<Record> {
    serde_json::from_slice(&fs::read(record(image)).ok()?).ok()
}

fn used_at(image: &Path) -> Option<SystemTime> {
    fs::metadata(record(image)).ok()?.modified().ok()
}

/// Deletes an image or a draft. Its record goes first: one that is half deleted is none.
fn discard(dir: &Path) -> io::Result<()> {
    Disks::unmount(dir);
    let _ = fs::remove_file(record(dir));
    tree::remove(dir)
}

fn remove(dir: &Path) {
    match discard(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, dir = %dir.display(), "an image cannot be deleted")
        }
        _ => {}
    }
}
