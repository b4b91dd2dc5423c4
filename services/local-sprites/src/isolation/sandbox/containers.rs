//! The directory of bundles and the OCI runtime that creates containers from them, as root.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use rustix::mount::UnmountFlags;

use crate::{
    isolation::{
        holder::Holder,
        oci::Access,
        owners::{OwnerMap, OwnerMaps},
        runtime::{Program, Runtime},
        sandbox::{
            error::{SandboxError, io_error},
            kind::Kind,
        },
        users::UserRanges,
    },
    network::uplink::Namespace,
};

/// Where sandboxes are put together: users that this machine does not know have to reach their
/// roots.
const RUN_DIR: &str = "/run";

/// Where [`expose`] and [`expose_mapped`] mount, in a sandbox's place.
const EXPOSED: &str = "exposed";

/// The containers of this server.
#[derive(Debug)]
pub struct Containers {
    pub runtime: Runtime,
    pub users: UserRanges,
    pub owners: OwnerMaps,
    /// Where sandboxes are put together.
    run_dir: PathBuf,
}

impl Containers {
    pub fn prepare(kind: &Kind, rootfs: &Path) -> Result<Self, SandboxError> {
        let owner =
            fs::metadata(rootfs).map_err(io_error("LOCAL_SPRITES_ROOTFS cannot be read"))?.uid();
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
        Ok(Self {
            runtime: Runtime::new(
                kind.runtime,
                run_dir.join(state_dir(kind.runtime)),
                kind.cgroups,
            ),
            users: UserRanges::of_image(owner),
            owners: OwnerMaps::new(owner),
            run_dir,
        })
    }

    /// Where a sandbox is put together, and its network is while it lives.
    pub fn place(&self, dir: &Path) -> PathBuf {
        self.run_dir.join(container_id(dir))
    }

    /// Where it is noted that a sandbox worked.
    pub fn proof(&self) -> PathBuf {
        self.run_dir.with_extension("proof")
    }

    /// Whether sandboxes may have user ids of their own: with gVisor this was not tried.
    pub fn may_separate(&self) -> bool {
        self.runtime.program() != Program::Runsc
    }

    /// The containers that the runtime knows, and those that something is left of.
    pub fn list(&self) -> Vec<String> {
        let mut found = self.runtime.list();
        let entries = fs::read_dir(&self.run_dir).into_iter().flatten().flatten();
        let places = entries.filter_map(|entry| entry.file_name().into_string().ok());
        found.extend(places.filter(|place| !STATE_DIRS.contains(&place.as_str())));
        found
    }

    /// Removes a container and the mounts that it was put together with.
    pub async fn remove(&self, id: &str) {
        let _ = self.runtime.delete(id).await;
        let place = self.run_dir.join(id);
        Namespace::remove(&place.join("net"));
        if let Err(error) = clear(&place) {
            tracing::warn!(%error, place = %place.display(), "failed to unmount what a Sprite saw of the machine");
        }
    }
}

/// Removes a sandbox's place. Never what is in a directory: were something still mounted there, it
/// would be files of the image, which all Sprites share.
fn clear(place: &Path) -> io::Result<()> {
    let root = place.join("root");
    while rustix::mount::unmount(&root, UnmountFlags::DETACH).is_ok() {}
    conceal(place)?;
    for dir in [root.as_path(), place] {
        match fs::remove_dir(dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Mounts what a sandbox sees of the machine where its users reach it: `runsc` looks for it as one
/// of them, and the server's directories are closed to them.
pub fn expose(place: &Path, binds: &mut [(&str, PathBuf, Access)]) -> io::Result<()> {
    let exposed = place.join(EXPOSED);
    fs::create_dir_all(&exposed)?;
    for (number, (_, source, _)) in binds.iter_mut().enumerate() {
        let target = exposed.join(number.to_string());
        if source.is_dir() {
            fs::create_dir_all(&target)?;
        } else {
            fs::write(&target, "")?;
        }
        rustix::mount::mount_bind(&*source, &target)?;
        *source = target;
    }
    Ok(())
}

/// Mounts a layer of a sandbox's root with the owners of its files mapped, and returns where.
pub fn expose_mapped(
    place: &Path,
    name: &str,
    source: &Path,
    map: &OwnerMap,
    access: Access,
) -> io::Result<PathBuf> {
    let target = place.join(EXPOSED).join(name);
    fs::create_dir_all(&target)?;
    map.mount(source, &target, access)?;
    Ok(target)
}

/// Takes these mounts away; sandboxes keep theirs. Deletes nothing that is still mounted.
pub fn conceal(place: &Path) -> io::Result<()> {
    let exposed = place.join(EXPOSED);
    for entry in fs::read_dir(&exposed).into_iter().flatten() {
        let target = entry?.path();
        while rustix::mount::unmount(&target, UnmountFlags::DETACH).is_ok() {}
        if target.is_dir() { fs::remove_dir(&target)? } else { fs::remove_file(&target)? }
    }
    match fs::remove_dir(exposed) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// What runtimes know of their containers, beside the places of these.
const STATE_DIRS: [&str; 2] = ["runtime", "runsc"];

/// Runtimes of one kind read each other's containers.
fn state_dir(runtime: Program) -> &'static str {
    match runtime {
        Program::Runc | Program::Crun => STATE_DIRS[0],
        Program::Runsc => STATE_DIRS[1],
    }
}

/// Inotify instances count against the creator of the user namespace, which is root for all
/// Sprites. Each Sprite has a limit of its own; this is so that they do not take them from each
/// other.
fn share_inotify() {
    const FILE: &str = "/proc/sys/fs/inotify/max_user_instances";
    const INSTANCES: u32 = 8192;
    let now = fs::read_to_string(FILE).ok().and_then(|text| text.trim().parse::<u32>().ok());
    if now.is_some_and(|now| now < INSTANCES) {
        match fs::write(FILE, INSTANCES.to_string()) {
            Ok(()) => tracing::info!(
                instances = INSTANCES,
                "raised this machine's limit of inotify instances"
            ),
            Err(error) => {
                tracing::warn!(%error, "Sprites share the inotify instances that this machine allows its root")
            }
        }
    }
}

/// A container is called as its Sprite's directory: by something that no other ever has.
pub fn container_id(dir: &Path) -> String {
    let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    name.rsplit('.').next().unwrap_or_default().to_owned()
}
