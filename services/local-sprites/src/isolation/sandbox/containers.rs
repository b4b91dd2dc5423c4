//! The directory of bundles and the OCI runtime that creates containers from them, as root.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use crate::isolation::{
    holder::Holder,
    runtime::Runtime,
    sandbox::{
        error::{SandboxError, io_error},
        kind::Kind,
    },
};

/// Where sandboxes are put together: users that this machine does not know have to reach their roots.
const RUN_DIR: &str = "/run";

/// The containers of this server.
#[derive(Debug)]
pub struct Containers {
    pub runtime: Runtime,
    pub first_user: u32,
    /// Where sandboxes are put together.
    run_dir: PathBuf,
}

impl Containers {
    pub fn prepare(kind: &Kind, rootfs: &Path) -> Result<Self, SandboxError> {
        let owner = fs::metadata(rootfs).map_err(io_error("LOCAL_SPRITES_ROOTFS cannot be read"))?.uid();
        if owner < Holder::UIDS {
            let why = "LOCAL_SPRITES_ROOTFS belongs to users of this machine; scripts/rootfs.sh gives its files to users that this machine does not have";
            return Err(SandboxError::Boot(why.to_owned()));
        }
        let run_dir = Path::new(RUN_DIR).join(&kind.instance);
        let make = || {
            fs::create_dir_all(&run_dir)?;
            // Traversable, and no more, for users that this machine does not know.
            fs::set_permissions(&run_dir, fs::Permissions::from_mode(0o711))
        };
        make().map_err(io_error("/run cannot be written to"))?;
        share_inotify();
        Ok(Self { runtime: Runtime::new(kind.runtime, run_dir.join("runtime"), kind.cgroups), first_user: owner, run_dir })
    }

    /// Where a sandbox is put together, and its network is while it lives.
    pub fn place(&self, dir: &Path) -> PathBuf {
        self.run_dir.join(container_id(dir))
    }
}

/// Inotify instances count against the creator of the user namespace, which is root for all Sprites. Each Sprite has a limit of its own; this
/// is so that they do not take them from each other.
fn share_inotify() {
    const FILE: &str = "/proc/sys/fs/inotify/max_user_instances";
    const INSTANCES: u32 = 8192;
    let now = fs::read_to_string(FILE).ok().and_then(|text| text.trim().parse::<u32>().ok());
    if now.is_some_and(|now| now < INSTANCES) {
        match fs::write(FILE, INSTANCES.to_string()) {
            Ok(()) => tracing::info!(instances = INSTANCES, "raised this machine's limit of inotify instances"),
            Err(error) => tracing::warn!(%error, "Sprites share the inotify instances that this machine allows its root"),
        }
    }
}

/// A container is called as its Sprite's directory: by something that no other ever has.
pub fn container_id(dir: &Path) -> String {
    let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    name.rsplit('.').next().unwrap_or_default().to_owned()
}
