//! Starts a sandbox as root: a container, over a layer of the Sprite's own.

use std::{fs, io, path::Path};

use rustix::mount::MountFlags;

use crate::{
    isolation::{
        holder::{Holder, Network},
        launch,
        oci::{self, Access},
        process::Process,
        runtime::Program,
        sandbox::{
            Sandboxes,
            containers::{Containers, container_id, expose},
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
    ) -> Result<Holder, SandboxError> {
        let id = container_id(dir);
        let place = containers.place(dir);
        let root = place.join("root");
        fs::create_dir_all(&root).map_err(io_error("/run cannot be written to"))?;
        let mount = async {
            let content = self.mount_disk(dir).await?;
            self.mount_root(&content, &root)
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
                    .and_then(|()| give(&bundle.join(file), containers.first_user))
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
            users: (containers.first_user, Holder::UIDS),
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
        let (started, uplink) = tokio::join!(
            containers.runtime.start(&id, &bundle, &config, namespace.path()),
            connect
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
        Ok(Holder { process, network, uplink, first_user: Some(containers.first_user), gofer })
    }

    /// Lays a Sprite's own layer over the image.
    fn mount_root(&self, content: &Path, root: &Path) -> io::Result<()> {
        let (upper, work) = (content.join("upper"), content.join("work"));
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            self.kind.rootfs.display(),
            upper.display(),
            work.display()
        );
        let options = std::ffi::CString::new(options).map_err(io::Error::other)?;
        Ok(rustix::mount::mount(
            "overlay",
            root,
            "overlay",
            MountFlags::NODEV | MountFlags::NOSUID,
            options.as_c_str(),
        )?)
    }
}
