//! The files of sandboxes: what all Sprites share, and what is a new Sprite's own.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, lchown},
    path::{Path, PathBuf},
};

use uuid::Uuid;

use crate::{
    isolation::{
        disk::Disks,
        holder::Holder,
        runtime::Program,
        sandbox::{
            Sandboxes,
            error::{SandboxError, io_error},
            inside::{AGENTS, HOME, USER},
        },
        seccomp,
    },
    network::private_hosts::Forward,
};

/// Directories of the Sprite's user.
const USERS_DIRECTORIES: [&str; 3] = ["home/sprite", "workspace", "srv"];

/// Where the agent host keeps its journal. It makes the directory as root, where a Sprite has
/// `sudo`.
const AGENT_HOSTS_DIRECTORY: &str = "var/lib/aod-host";

/// Without root: what can be written to.
pub const WRITABLE: [&str; 5] = ["home/sprite", "workspace", "srv", "tmp", "var/tmp"];

/// What something is mounted on.
const MOUNT_POINTS: [&str; 5] = [".sprite", "opt/agents", "opt/aod", "dev", "proc"];

impl Sandboxes {
    /// What is the same for all Sprites, and theirs to read only.
    pub(super) fn share(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.shared)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with("spare") {
                // Another server's, of another template perhaps.
                fs::remove_dir_all(entry.path())?;
            }
        }
        for (file, entry) in [
            ("passwd", format!("{USER}:x:{uid}:{uid}::{HOME}:/bin/bash\n", uid = Holder::UID)),
            ("group", format!("{USER}:x:{}:\n", Holder::UID)),
        ] {
            let mut text =
                fs::read_to_string(self.kind.rootfs.join("etc").join(file)).unwrap_or_default();
            if !text.contains(&format!("\n{USER}:")) {
                text.push_str(&entry);
            }
            fs::write(self.shared.join(file), text)?;
        }
        if self.containers.is_none() {
            fs::write(self.shared.join("seccomp.bpf"), seccomp::program()?)?;
            fs::write(self.shared.join("hosts"), hosts("sprite", &[]))?;
        }
        script(&self.shared.join("sprite-env"), include_str!("../../../scripts/sprite-env.sh"))
    }

    /// The content of a new Sprite's disk: the layer over the image, or, without root, the
    /// directories that can be written to.
    pub(super) fn fill(&self, content: &Path) -> io::Result<()> {
        let upper = content.join("upper");
        let Some(containers) = &self.containers else {
            return WRITABLE.iter().try_for_each(|own| fs::create_dir_all(upper.join(own)));
        };
        fs::create_dir_all(content.join("work"))?;
        for own in USERS_DIRECTORIES.iter().chain(&MOUNT_POINTS).chain(&["etc", "usr/local/bin"]) {
            fs::create_dir_all(upper.join(own))?;
        }
        if containers.runtime.program() == Program::Runsc {
            fs::create_dir_all(upper.join(AGENT_HOSTS_DIRECTORY))?;
        }
        for file in ["passwd", "group"] {
            fs::copy(self.shared.join(file), upper.join("etc").join(file))?;
        }
        let bin = upper.join("usr/local/bin");
        self.link_agents(&bin)?;
        let sudo = match containers.runtime.program() {
            Program::Runc | Program::Crun => include_str!("../../../scripts/sudo.sh"),
            Program::Runsc => include_str!("../../../scripts/sudo-runsc.sh"),
        };
        script(&bin.join("sudo"), sudo)?;
        give(&upper, containers.users.image())?;
        let user = Some(containers.users.image() + Holder::UID);
        let mut own = USERS_DIRECTORIES.to_vec();
        if containers.runtime.program() == Program::Runsc {
            own.push(AGENT_HOSTS_DIRECTORY);
        }
        own.iter().try_for_each(|own| lchown(upper.join(own), user, user))
    }

    /// Writes a new Sprite's files, with a disk where it has none yet.
    pub async fn make_files(&self, dir: &Path) -> Result<(), SandboxError> {
        let make = async {
            let has_disk = Disks::content(dir).exists();
            if !has_disk && fs::rename(self.spare(), dir).is_err() {
                self.copy_disk(&self.template(), dir).await?;
            }
            // What the server tells the Sprite; nothing that the Sprite writes is there.
            for part in ["inside/bin", "inside/policy", "inside/logs/services"] {
                fs::create_dir_all(dir.join(part))?;
            }
            fs::copy(self.shared.join("sprite-env"), dir.join("inside/bin/sprite-env"))?;
            fs::write(dir.join("inside/version.txt"), concat!(env!("CARGO_PKG_VERSION"), "\n"))
        };
        make.await.map_err(io_error("a Sprite's files cannot be made"))
    }

    /// Gives a new Sprite a copy of a disk that no sandbox has.
    pub async fn copy_disk(&self, from: &Path, dir: &Path) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        self.disks.copy(from, dir).await
    }

    pub(super) fn template(&self) -> PathBuf {
        self.shared.join("template")
    }

    fn spare(&self) -> PathBuf {
        self.shared.join("spare")
    }

    /// Copies a disk and maps owners ahead, so that the next Sprite does not wait for that. Not
    /// having them is no harm.
    pub async fn make_spare(&self) {
        if let Some(containers) = &self.containers
            && let Some(first_user) = containers.users.next()
            && let Err(error) = containers.owners.to(first_user).await
        {
            tracing::debug!(%error, "no map of owners");
        }
        if self.spare().exists() {
            return;
        }
        let draft = self.shared.join(format!("spare.{}", Uuid::new_v4().simple()));
        let copied = self
            .copy_disk(&self.template(), &draft)
            .await
            .and_then(|()| fs::rename(&draft, self.spare()));
        if let Err(error) = copied {
            // Another request's may be there by now.
            tracing::debug!(%error, "no spare disk");
            let _ = fs::remove_dir_all(draft);
        }
    }

    /// Login shells set a PATH of their own: there the CLIs are found too.
    fn link_agents(&self, bin: &Path) -> io::Result<()> {
        let Some(agents) = &self.kind.agents_dir else { return Ok(()) };
        fs::create_dir_all(bin)?;
        for entry in fs::read_dir(agents.join("bin"))? {
            let name = entry?.file_name();
            std::os::unix::fs::symlink(Path::new(AGENTS).join("bin").join(&name), bin.join(&name))?;
        }
        Ok(())
    }
}

pub fn hosts(hostname: &str, forwards: &[Forward]) -> String {
    let named = forwards.iter().filter(|forward| forward.address.is_loopback());
    let named: String =
        named.map(|forward| format!("{} {}\n", forward.address, forward.host)).collect();
    format!("127.0.0.1 localhost\n::1 localhost ip6-localhost\n127.0.1.1 {hostname}\n{named}")
}

/// Gives a tree to a sandbox's root.
pub fn give(path: &Path, owner: u32) -> io::Result<()> {
    lchown(path, Some(owner), Some(owner))?;
    if fs::symlink_metadata(path)?.is_dir() {
        for entry in fs::read_dir(path)? {
            give(&entry?.path(), owner)?;
        }
    }
    Ok(())
}

fn script(path: &Path, text: &str) -> io::Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}
