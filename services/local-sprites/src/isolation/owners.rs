//! Mounts that show the files of one range of users as those of another (idmapped mounts).

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use composefs_ioctls::mount::mount_setattr_idmap;
use rustix::{
    fs::CWD,
    mount::{MountFlags, MoveMountFlags, OpenTreeFlags, mount_remount, move_mount, open_tree},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    process::Command,
};

use crate::{
    isolation::{holder::Holder, oci::Access},
    sync::locked,
};

const START_MAX: Duration = Duration::from_secs(10);

/// The maps of the ranges that sandboxes have had: a range is given again, and its map with it.
#[derive(Debug)]
pub struct OwnerMaps {
    on_disk: u32,
    made: Mutex<BTreeMap<u32, Arc<OwnerMap>>>,
}

impl OwnerMaps {
    /// Files belong to the users from `on_disk` on.
    pub fn new(on_disk: u32) -> Self {
        Self { on_disk, made: Mutex::default() }
    }

    /// The map to the users from `shown` on.
    ///
    /// # Errors
    /// As [`OwnerMap::new`].
    pub async fn to(&self, shown: u32) -> io::Result<Arc<OwnerMap>> {
        let made = locked(&self.made).get(&shown).cloned();
        if let Some(map) = made {
            return Ok(map);
        }
        let map = Arc::new(OwnerMap::new(self.on_disk, shown).await?);
        locked(&self.made).insert(shown, map.clone());
        Ok(map)
    }
}

/// Which users' files show as whose: a user namespace, which no process has to stay in.
#[derive(Debug)]
pub struct OwnerMap(File);

impl OwnerMap {
    /// Files of the [`Holder::UIDS`] users from `on_disk` on show as those of the users from `shown`
    /// on, and what these write is the others' on the disk. Root's stay root's: an overlay creates
    /// files in its work directory as root, and is read-only where it cannot.
    ///
    /// # Errors
    /// Where this machine makes no user namespaces.
    pub async fn new(on_disk: u32, shown: u32) -> io::Result<Self> {
        let made = tokio::time::timeout(START_MAX, Self::make(on_disk, shown)).await;
        made.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }

    async fn make(on_disk: u32, shown: u32) -> io::Result<Self> {
        let mut process = Command::new("unshare")
            .args(["--user", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| {
                io::Error::new(error.kind(), format!("unshare (of util-linux): {error}"))
            })?;
        let ended = || io::Error::other("unshare ended at once");
        let (pid, stdin, stdout) = (process.id(), process.stdin.as_mut(), process.stdout.as_mut());
        let (pid, stdin, stdout) =
            (pid.ok_or_else(ended)?, stdin.ok_or_else(ended)?, stdout.ok_or_else(ended)?);
        // What comes back says that the process is in its namespace.
        stdin.write_all(b"\n").await?;
        stdout.read_exact(&mut [0]).await?;
        let map = format!("0 0 1\n{on_disk} {shown} {}\n", Holder::UIDS);
        for file in ["uid_map", "gid_map"] {
            fs::write(format!("/proc/{pid}/{file}"), &map)?;
        }
        Ok(Self(File::open(format!("/proc/{pid}/ns/user"))?))
    }

    /// Mounts a directory once more at `target`, with the owners of its files mapped.
    ///
    /// # Errors
    /// Where the kernel or the file system cannot do that.
    pub fn mount(&self, source: &Path, target: &Path, access: Access) -> io::Result<()> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let mount = open_tree(CWD, source, flags)?;
        mount_setattr_idmap(&mount, &self.0).map_err(|error| {
            let why =
                format!("the owners of files in {} cannot be mapped: {error}", source.display());
            io::Error::new(error.kind(), why)
        })?;
        move_mount(&mount, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        if access == Access::ReadOnly {
            let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
            mount_remount(target, MountFlags::BIND | flags, c"")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rustix::mount::UnmountFlags;

    use super::*;

    #[tokio::test]
    async fn what_is_mounted_read_only_cannot_be_deleted_by_its_mount() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(source.path().join("file"), "").unwrap();
        let map = OwnerMap::new(1_895_825_408, 2_000_224_256).await.unwrap();
        map.mount(source.path(), target.path(), Access::ReadOnly).unwrap();
        let removed = fs::remove_file(target.path().join("file"));
        rustix::mount::unmount(target.path(), UnmountFlags::DETACH).unwrap();
        assert_eq!(removed.unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
    }
}
