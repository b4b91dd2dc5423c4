//! Starts a sandbox as root: a container, over a layer of the Sprite's own.

use std::{fs, io, path::Path};

use rustix::{fs::StatVfsMountFlags, mount::MountFlags};

use crate::{
    isolation::{
        holder::{Holder, Network},
        launch,
        oci::{self, Access},
        owners::OwnerMap,
        process::Process,
        runtime::Program,
        sandbox::{
            Sandboxes,
            containers::{Containers, conceal, container_id, expose, expose_mapped},
            error::{SandboxError, io_error},
            files::{give, hosts},
            inside::{AGENT_HOST, AGENTS, PATH},
        },
    },
    network::uplink::{self, Namespace},
};

/// Keeps the namespaces, and reaps every process of the Sprite that ends.
const HOLDER: [&str; 3] = ["/bin/sh", "-c", "trap '' CHLD; exec sleep infinity"];

impl Sandboxes {
    pub(super) async fn boot_container(
        &self,
        containers: &Containers,
        dir: &Path,
        hostname: &str,
        network: Network,
        first_user: u32,
    ) -> Result<Holder, SandboxError> {
        let id = container_id(dir);
        let place = containers.place(dir);
        let root = place.join("root");
        fs::create_dir_all(&root).map_err(io_error("/run cannot be written to"))?;
        let mount = async {
            let map = async {
                let map = match first_user == containers.users.image() {
                    true => Ok(None),
                    false => containers.owners.to(first_user).await.map(Some),
                };
                map.map_err(io_error("the owners of files cannot be mapped"))
            };
            let (content, map) = tokio::try_join!(self.mount_disk(dir), map)?;
            self.mount_root(&content, &place, &root, map.as_deref())
                .map_err(io_error("the root file system cannot be mounted"))
        };
        let addresses = self.kind.forwards.iter().map(|forward| forward.address).collect();
        let (mounted, namespace) =
            tokio::join!(mount, Namespace::make(place.join("net"), addresses));
        mounted?;
        let namespace = namespace.map_err(io_error("a network namespace cannot be made"))?;
        let bundle = dir.join("bundle");
        fs::create_dir_all(&bundle).map_err(io_error("a Sprite's files cannot be made"))?;
        let resolver = if network == Network::Public {
            format!("nameserver {}\n", uplink::NAME_SERVER)
        } else {
            String::new()
        };
        for (file, text) in
            [("hosts", hosts(hostname, &self.kind.forwards)), ("resolv.conf", resolver)]
        {
            let write = || {
                fs::write(bundle.join(file), text)
                    .and_then(|()| give(&bundle.join(file), first_user))
            };
            write().map_err(io_error("a Sprite's files cannot be made"))?;
        }
        let mut binds = vec![
            ("/.sprite", dir.join("inside"), Access::ReadOnly),
            ("/etc/hosts", bundle.join("hosts"), Access::ReadWrite),
            ("/etc/resolv.conf", bundle.join("resolv.conf"), Access::ReadWrite),
        ];
        binds.extend(self.kind.agents_dir.clone().map(|agents| (AGENTS, agents, Access::ReadOnly)));
        binds.extend(self.kind.agent_host.clone().map(|file| (AGENT_HOST, file, Access::ReadOnly)));
        let has_own_kernel = containers.runtime.program() == Program::Runsc;
        if has_own_kernel {
            expose(&place, &mut binds).map_err(io_error("a Sprite's files cannot be mounted"))?;
            // Otherwise `/tmp` would be in the memory of its kernel, where the file API does not
            // see it.
            binds.push(("/tmp", root.join("tmp"), Access::ReadWrite));
        }
        let cgroups = self.kind.cgroups.then(|| format!("/{}-containers/{id}", self.kind.instance));
        let config = oci::Sandbox {
            root: &root,
            hostname,
            users: (first_user, Holder::UIDS),
            network: (!has_own_kernel).then(|| namespace.path()),
            cgroups: cgroups.as_deref(),
            memory_files_bytes: self.memory_files_bytes,
            binds,
            command: &HOLDER,
            path: PATH,
        };
        let config = config.config();
        let connect = async {
            match network {
                Network::Public => namespace
                    .connect(&self.kind.loopback_ports, bundle.join("uplink"))
                    .await
                    .map(Some),
                Network::Machine | Network::Limited => Ok(None),
            }
        };
        // The overlay keeps its layers: nothing is left mounted when this server is killed. Here,
        // where no one waits for it, since the kernel takes milliseconds. With a kernel of its own
        // the sandbox still needs what is exposed; a mount that stays is reported later.
        let layers = {
            let (place, dir, disks) = (place.clone(), dir.to_owned(), self.disks);
            tokio::task::spawn_blocking(move || {
                if !has_own_kernel {
                    let _ = conceal(&place);
                }
                disks.unmount_image(&dir);
            })
        };
        let (started, uplink, _) = tokio::join!(
            containers.runtime.start(&id, &bundle, &config, namespace.path()),
            connect,
            layers
        );
        let end_uplink = |error: io::Error| {
            if let Ok(Some(uplink)) = &uplink {
                uplink.kill();
            }
            SandboxError::Boot(error.to_string())
        };
        let pid = started.map_err(end_uplink)?;
        let uplink = uplink.map_err(|error| SandboxError::Boot(error.to_string()))?;
        let gone = || SandboxError::Boot("it ended at once".to_owned());
        let process = Process::find(pid).ok_or_else(gone)?;
        let gofer = match has_own_kernel {
            true => Some(
                containers.runtime.guest(&id).gofer().and_then(Process::find).ok_or_else(gone)?,
            ),
            false => {
                let limited = launch::limit_namespace(pid).await;
                limited.map_err(io_error("the user namespace cannot be limited"))?;
                None
            }
        };
        Ok(Holder { process, network, uplink, first_user: Some(first_user), gofer })
    }

    /// Lays a Sprite's own layer over the image.
    fn mount_root(
        &self,
        content: &Path,
        place: &Path,
        root: &Path,
        map: Option<&OwnerMap>,
    ) -> io::Result<()> {
        let (image, content) = match map {
            Some(map) => (
                expose_mapped(place, "image", &self.kind.rootfs, map, Access::ReadOnly)?,
                expose_mapped(place, "disk", content, map, Access::ReadWrite)?,
            ),
            None => (self.kind.rootfs.clone(), content.to_owned()),
        };
        let (upper, work) = (content.join("upper"), content.join("work"));
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            image.display(),
            upper.display(),
            work.display()
        );
        let options = std::ffi::CString::new(options).map_err(io::Error::other)?;
        rustix::mount::mount(
            "overlay",
            root,
            "overlay",
            MountFlags::NODEV | MountFlags::NOSUID,
            options.as_c_str(),
        )?;
        // Where it cannot use its work directory, the kernel mounts it all the same.
        if rustix::fs::statvfs(root)?.f_flag.contains(StatVfsMountFlags::RDONLY) {
            return Err(io::Error::other("the overlay is read-only"));
        }
        Ok(())
    }
}
