//! A Sprite's disk: all that it writes. An image of a file system of its own, which cannot grow
//! over its size, where this machine has loop devices; otherwise a directory without a limit.
//!
//! A new disk is a copy of a template, and a checkpoint is a copy of a disk: on file systems that
//! share blocks (Btrfs, XFS) nothing is copied until it is written; elsewhere what was written is
//! copied, and holes are not.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Component, Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use rustix::mount::UnmountFlags;
use tokio::process::Command;

use crate::files::tree;

const COMMAND_MAX: Duration = Duration::from_secs(300);
/// Where a disk's content is found in a Sprite's directory while it is mounted.
const CONTENT: &str = "disk";
/// Where all that a Sprite writes is in the content.
const LAYER: &str = "upper";
const IMAGE: &str = "disk.img";
/// The unit of `st_blocks`.
const BLOCK_BYTES: u64 = 512;

/// How disks are kept here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disks {
    Images,
    Directories,
}

impl Disks {
    /// Makes the template, which `fill` writes the content of, and finds out by it what works here.
    ///
    /// # Errors
    /// When not even a directory works; why there is no limit goes to the log.
    pub async fn prepare(
        template: &Path,
        bytes: Option<u64>,
        fill: impl Fn(&Path) -> io::Result<()>,
    ) -> io::Result<Self> {
        if let Some(bytes) = bytes {
            match Self::prepare_image(template, bytes, &fill).await {
                Ok(()) => return Ok(Self::Images),
                Err(error) => {
                    tracing::warn!(%error, "disks of Sprites are not limited: no file system image can be created and mounted")
                }
            }
        }
        reset(template)?;
        fill(&template.join(CONTENT))?;
        Ok(Self::Directories)
    }

    async fn prepare_image(
        template: &Path,
        bytes: u64,
        fill: &impl Fn(&Path) -> io::Result<()>,
    ) -> io::Result<()> {
        reset(template)?;
        let image = template.join(IMAGE);
        fs::File::create(&image)?.set_len(bytes)?;
        let options =
            ["-q", "-F", "-m", "0", "-J", "size=4", "-E", "lazy_itable_init=1,lazy_journal_init=1"];
        run(Command::new("mkfs.ext4").args(options).arg(&image)).await?;
        Self::Images.mount(template).await?;
        let content = template.join(CONTENT);
        // Written out here: a sandbox that is being made beside this one may hold the mount a
        // moment longer, and the image be copied.
        let filled =
            fill(&content).and_then(|()| Ok(rustix::fs::syncfs(fs::File::open(&content)?)?));
        Self::unmount(template);
        filled
    }

    /// The content of a Sprite's disk, mounted until [`Self::unmount`] or until the last sandbox
    /// that has it ends.
    pub async fn mount(self, dir: &Path) -> io::Result<PathBuf> {
        let content = Self::content(dir);
        if self == Self::Images && !is_mounted(&content)? {
            run(Command::new("mount")
                .args(["-t", "ext4", "-o", "loop,noatime,nosuid,nodev,discard"])
                .arg(dir.join(IMAGE))
                .arg(&content))
            .await?;
        }
        Ok(content)
    }

    /// Where a disk's content is while it is mounted.
    pub fn content(dir: &Path) -> PathBuf {
        dir.join(CONTENT)
    }

    /// The blocks that a disk's image takes on this machine; 0 where disks are directories.
    pub fn image_bytes(dir: &Path) -> u64 {
        fs::metadata(dir.join(IMAGE)).map_or(0, |metadata| metadata.blocks() * BLOCK_BYTES)
    }

    /// As [`Self::unmount`], where disks are mounted.
    pub fn unmount_image(self, dir: &Path) {
        if self == Self::Images {
            Self::unmount(dir);
        }
    }

    /// Takes a disk out of this machine's own table of mounts; sandboxes keep theirs.
    pub fn unmount(dir: &Path) {
        let _ = rustix::mount::unmount(dir.join(CONTENT), UnmountFlags::DETACH);
    }

    /// Copies a disk that no process writes to.
    ///
    /// # Errors
    /// When there is no room for it; what was copied by then is in the way of nothing.
    pub async fn copy(self, from: &Path, to: &Path) -> io::Result<()> {
        match self {
            Self::Images => {
                fs::create_dir_all(to.join(CONTENT))?;
                let mut command = Command::new("cp");
                command
                    .args(["--archive", "--reflink=auto", "--sparse=always"])
                    .arg(from.join(IMAGE))
                    .arg(to.join(IMAGE));
                run(&mut command).await
            }
            Self::Directories => {
                let (from, to) = (from.join(CONTENT), to.join(CONTENT));
                // Not by a program that names files by path: the Sprite may put a link in a
                // directory's place meanwhile.
                tokio::task::spawn_blocking(move || tree::copy(&from, &to)).await?
            }
        }
    }

    /// Removes paths of the Sprite from a disk that no sandbox has, with all that can still be found
    /// of what was deleted. Returns what the disk takes on this machine.
    ///
    /// # Errors
    /// Also where a link is in the way of a path.
    pub async fn strip(self, dir: &Path, paths: &[PathBuf]) -> io::Result<u64> {
        let content = self.mount(dir).await?;
        let (layer, paths) = (content.join(LAYER), paths.to_vec());
        let stripped = async {
            let remove = move || paths.iter().try_for_each(|path| remove_below(&layer, path));
            tokio::task::spawn_blocking(remove).await??;
            // Blocks are free once the deletions are written out.
            rustix::fs::syncfs(fs::File::open(&content)?)?;
            match self {
                Self::Images => run(Command::new("fstrim").arg(&content)).await,
                Self::Directories => Ok(()),
            }
        };
        let stripped = stripped.await;
        self.unmount_image(dir);
        stripped?;
        match self {
            Self::Images => {
                fs::File::open(dir.join(IMAGE))?.sync_all()?;
                Ok(Self::image_bytes(dir))
            }
            Self::Directories => tokio::task::spawn_blocking(move || tree_bytes(&content)).await?,
        }
    }

    /// Puts a copy in a disk's place. Whenever it is interrupted, [`Self::recover`] finds one or
    /// the other whole.
    pub fn replace(self, dir: &Path, by: &Path) -> io::Result<()> {
        match self {
            Self::Images => fs::rename(by.join(IMAGE), dir.join(IMAGE)),
            Self::Directories => {
                let old = dir.join("disk.old");
                fs::rename(dir.join(CONTENT), &old)?;
                fs::rename(by.join(CONTENT), dir.join(CONTENT))?;
                tree::remove(&old)
            }
        }
    }

    /// Repairs what a server left that was killed.
    pub fn recover(self, dir: &Path) -> io::Result<()> {
        let (content, old) = (dir.join(CONTENT), dir.join("disk.old"));
        if self == Self::Directories && old.exists() {
            if content.exists() { tree::remove(&old)? } else { fs::rename(old, content)? }
        }
        Ok(())
    }
}

/// What is written waits until the returned guard's [`Frozen::thaw`], so that a copy is whole.
#[derive(Debug)]
pub struct Frozen(PathBuf);

impl Frozen {
    /// `root` is where the disk is mounted.
    pub async fn freeze(root: PathBuf) -> io::Result<Self> {
        run(Command::new("fsfreeze").arg("--freeze").arg(&root)).await?;
        Ok(Self(root))
    }

    pub async fn thaw(self) -> io::Result<()> {
        run(Command::new("fsfreeze").arg("--unfreeze").arg(&self.0)).await
    }

    /// Thaws what a killed server left frozen.
    pub async fn release(root: PathBuf) {
        let _ = Self(root).thaw().await;
    }
}

fn reset(template: &Path) -> io::Result<()> {
    Disks::unmount(template);
    match fs::remove_dir_all(template) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::create_dir_all(template.join(CONTENT))
}

/// Removes a path of a tree that nothing changes meanwhile. Follows no links.
fn remove_below(layer: &Path, path: &Path) -> io::Result<()> {
    let below = path.strip_prefix("/").map_err(io::Error::other)?;
    let mut at = layer.to_owned();
    for part in below.components() {
        let Component::Normal(name) = part else {
            return Err(io::Error::other("the path is not a normal one"));
        };
        at.push(name);
        match fs::symlink_metadata(&at) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
            Ok(found) if found.is_dir() => {}
            Ok(_) => return Err(io::Error::other(format!("{} is no directory", at.display()))),
        }
    }
    tree::remove(&at)
}

/// The blocks of all files of a tree.
fn tree_bytes(dir: &Path) -> io::Result<u64> {
    fs::read_dir(dir)?.try_fold(0, |sum, entry| {
        let entry = entry?;
        let metadata = entry.metadata()?;
        let below = if metadata.is_dir() { tree_bytes(&entry.path())? } else { 0 };
        Ok(sum + metadata.blocks() * BLOCK_BYTES + below)
    })
}

fn is_mounted(content: &Path) -> io::Result<bool> {
    let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev());
    Ok(device(content)? != device(content.parent().unwrap_or(content))?)
}

/// Runs one of the system's tools to its end.
async fn run(command: &mut Command) -> io::Result<()> {
    let name = command.as_std().get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(COMMAND_MAX, output)
        .await
        .map_err(|_| io::Error::other(format!("{name} does not end")))?;
    let output =
        output.map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!(
        "{name}: {}",
        said.trim().lines().last().unwrap_or("failed without a word")
    )))
}
