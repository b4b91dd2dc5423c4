//! Runs the servers from images, with the crate `testcontainers`, where Docker is installed and
//! they are not (feature `containers`).

use anyhow::ensure;

/// A server to start from an image.
#[derive(Debug)]
#[cfg_attr(
    not(feature = "containers"),
    expect(dead_code, reason = "read by what starts containers")
)]
pub(crate) struct Image {
    pub name: &'static str,
    pub tag: &'static str,
    /// The port of loopback that leads to the server's own port.
    pub ports: (u16, u16),
    /// Arguments of the image's entry point.
    pub args: Vec<String>,
    pub variables: Vec<(String, String)>,
    /// Directories of this machine with their places in the container.
    pub volumes: Vec<(String, &'static str)>,
    /// `UID:GID` to run as instead of the image's own user.
    pub user: Option<String>,
}

impl Image {
    /// Starts the server. It may not take connections yet.
    pub fn start(self) -> anyhow::Result<Container> {
        ensure!(
            available(),
            "{} is not installed: run `make setup`, or with Docker `cargo test --features testkit/containers`",
            self.name
        );
        Container::start(self)
    }
}

#[cfg(feature = "containers")]
pub use docker::{Container, available};

#[cfg(not(feature = "containers"))]
pub use absent::{Container, available};

#[cfg(not(feature = "containers"))]
mod absent {
    use super::Image;

    /// Never exists: this build has no way to start a container.
    #[derive(Debug)]
    pub enum Container {}

    impl Container {
        pub(super) fn start(image: Image) -> anyhow::Result<Self> {
            anyhow::bail!("no way to start {image:?}")
        }
    }

    /// Whether servers can be started from images.
    #[must_use]
    pub fn available() -> bool {
        false
    }
}

#[cfg(feature = "containers")]
mod docker {
    use std::{
        collections::HashMap,
        process::{Child, Command, Stdio},
        sync::mpsc,
        thread::JoinHandle,
        time::Duration,
    };

    use anyhow::Context as _;
    use testcontainers::{
        ContainerAsync, ContainerRequest, GenericImage, ImageExt as _,
        bollard::{Docker, models::PortBinding},
        core::Mount,
        runners::AsyncRunner as _,
    };
    use tokio::runtime::{Builder, Runtime};

    use super::Image;

    /// A container that is removed when dropped, and when this process ends without that.
    #[derive(Debug)]
    pub struct Container {
        stop: Option<mpsc::Sender<()>>,
        /// Owns the container and the runtime that speaks to Docker, since tests drop servers
        /// inside runtimes of their own.
        owner: Option<JoinHandle<()>>,
        backstop: Child,
    }

    impl Container {
        pub(super) fn start(image: Image) -> anyhow::Result<Self> {
            let (started, start) = mpsc::channel();
            let (stop, stopped) = mpsc::channel();
            let owner = std::thread::spawn(move || {
                let runtime = match runtime() {
                    Ok(runtime) => runtime,
                    Err(error) => return drop(started.send(Err(error))),
                };
                match runtime.block_on(request(image).start()) {
                    Err(error) => drop(started.send(Err(error.into()))),
                    Ok(container) => {
                        let _ = started.send(Ok(container.id().to_owned()));
                        let _ = stopped.recv();
                        // Removing it is all that is left to do, and the backstop tries again.
                        let _ = runtime.block_on(ContainerAsync::rm(container));
                    }
                }
            });
            let id = start.recv()??;
            Ok(Self { stop: Some(stop), owner: Some(owner), backstop: backstop(&id)? })
        }
    }

    impl Drop for Container {
        fn drop(&mut self) {
            drop(self.stop.take());
            let _ = self.owner.take().map(JoinHandle::join);
            drop(self.backstop.stdin.take());
            let _ = self.backstop.wait();
        }
    }

    /// Starts a process that removes the container when its standard input ends: with this process
    /// at the latest. The one Postgres of a process is a static, which is never dropped, and
    /// testcontainers removes only what is.
    fn backstop(id: &str) -> anyhow::Result<Child> {
        let mut command = Command::new("sh");
        command.args(["-c", "read -r _; exec docker rm --force \"$0\"", id]);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().context("sh")
    }

    fn request(image: Image) -> ContainerRequest<GenericImage> {
        let (outside, inside) = image.ports;
        let mut request = GenericImage::new(image.name, image.tag)
            .with_cmd(image.args)
            // Pulling an image is part of the start.
            .with_startup_timeout(Duration::from_secs(300))
            .with_host_config_modifier(move |config| {
                let binding = PortBinding {
                    host_ip: Some("127.0.0.1".into()),
                    host_port: Some(outside.to_string()),
                };
                config.port_bindings =
                    Some(HashMap::from([(format!("{inside}/tcp"), Some(vec![binding]))]));
                config.publish_all_ports = None;
            });
        for (name, value) in image.variables {
            request = request.with_env_var(name, value);
        }
        for (from, to) in image.volumes {
            request = request.with_mount(Mount::bind_mount(from, to));
        }
        match image.user {
            Some(user) => request.with_user(user),
            None => request,
        }
    }

    fn runtime() -> anyhow::Result<Runtime> {
        Ok(Builder::new_current_thread().enable_all().build()?)
    }

    /// Whether servers can be started from images: whether a Docker engine answers.
    #[must_use]
    pub fn available() -> bool {
        let ping = || -> anyhow::Result<()> {
            runtime()?.block_on(async {
                let docker = Docker::connect_with_local_defaults()?;
                tokio::time::timeout(Duration::from_secs(5), docker.ping()).await??;
                Ok(())
            })
        };
        // In a thread of its own: tests ask inside runtimes.
        std::thread::spawn(move || ping().is_ok()).join().unwrap_or(false)
    }
}
