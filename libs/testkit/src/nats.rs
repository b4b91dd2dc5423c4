//! A real nats-server, with the configuration and permissions of deployments.

use std::{
    io::Read as _,
    net::TcpStream,
    path::PathBuf,
    process::{Child, Command},
    time::Duration,
};

use anyhow::{Context as _, bail};
use bus::Bus;
use contract::{
    access::{self, Access},
    topology,
};
use tempfile::TempDir;
use types::Partition;

use crate::{
    containers::{Container, Image},
    process::{free_port, spawn_tied},
    tls::Tls,
};

const CONF: &str = include_str!("../../../nats/nats-server.conf");
const PERMISSIONS: &str = include_str!("../../../nats/permissions.conf");

/// A server with a store of its own, gone when dropped.
#[derive(Debug)]
pub struct Nats {
    port: u16,
    dir: TempDir,
    running: Option<Running>,
    tls: Option<Tls>,
    /// Absent: the server comes from an image.
    program: Option<PathBuf>,
}

#[derive(Debug)]
enum Running {
    Process(Child),
    Container { _container: Container },
}

impl Nats {
    /// # Errors
    /// When there is no nats-server on this machine, nor Docker (see [`crate::containers`]).
    pub fn start() -> anyhow::Result<Self> {
        Self::start_with(None, find_program())
    }

    /// A server from an image, whatever is installed.
    ///
    /// # Errors
    /// When Docker does not answer or refuses.
    pub fn start_in_container() -> anyhow::Result<Self> {
        Self::start_with(None, None)
    }

    /// A server that takes encrypted connections only.
    ///
    /// # Errors
    /// When there is no nats-server on this machine.
    pub fn start_tls() -> anyhow::Result<Self> {
        let program = find_program().context("nats-server is not installed: run `make setup`")?;
        Self::start_with(Some(Tls::generate()?), Some(program))
    }

    fn start_with(tls: Option<Tls>, program: Option<PathBuf>) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("aod-nats-").tempdir()?;
        std::fs::write(dir.path().join("nats-server.conf"), CONF)?;
        std::fs::write(dir.path().join("permissions.conf"), PERMISSIONS)?;
        let mut nats = Self { port: free_port()?, dir, running: None, tls, program };
        nats.run()?;
        Ok(nats)
    }

    fn run(&mut self) -> anyhow::Result<()> {
        let conf = self.dir.path().join("nats-server.conf");
        let passwords =
            access::users().map(|user| (access::password_variable(user), password(user)));
        let store = self.dir.path().join("store");
        let running = if let Some(program) = &self.program {
            let mut command = Command::new(program);
            command
                .arg("-c")
                .arg(conf)
                .args(["-a", "127.0.0.1", "-p", &self.port.to_string(), "-sd"])
                .arg(store);
            if let Some(tls) = &self.tls {
                command
                    .arg("--tls")
                    .arg("--tlscert")
                    .arg(tls.certificate_file())
                    .arg("--tlskey")
                    .arg(tls.key_file());
            }
            command.envs(passwords);
            Running::Process(spawn_tied(&command)?)
        } else {
            // As this process's user, so that the folder can be removed; its store outlives a
            // restart.
            std::fs::create_dir_all(&store)?;
            let image = Image {
                name: "nats",
                tag: "2.12",
                ports: (self.port, 4222),
                args: ["-c", "/conf/nats-server.conf", "-sd", "/conf/store"]
                    .map(str::to_owned)
                    .into(),
                variables: passwords.collect(),
                volumes: vec![(self.dir.path().display().to_string(), "/conf")],
                user: Some(format!(
                    "{}:{}",
                    rustix::process::geteuid().as_raw(),
                    rustix::process::getegid().as_raw()
                )),
            };
            Running::Container { _container: image.start()? }
        };
        self.running = Some(running);
        for _ in 0..1000 {
            if self.greets() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("nats-server does not take connections")
    }

    /// Whether the server sends its first line. Docker takes connections before the server in its
    /// container does.
    fn greets(&self) -> bool {
        let Ok(mut connection) = TcpStream::connect(("127.0.0.1", self.port)) else { return false };
        let limit = connection.set_read_timeout(Some(Duration::from_secs(1)));
        limit.is_ok() && connection.read(&mut [0]).is_ok_and(|read| read > 0)
    }

    /// Kills the server and starts it again, on the same port and store.
    ///
    /// # Errors
    /// When it does not come back.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.kill();
        self.run()
    }

    fn kill(&mut self) {
        if let Some(Running::Process(mut child)) = self.running.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// The settings of a user of the bus.
    #[must_use]
    pub fn config(&self, access: &Access) -> bus::Config {
        bus::Config {
            url: self.url(),
            user: access.user,
            password: password(access.user).into(),
            ca_file: self.tls.as_ref().map(|tls| tls.ca_file()),
            name: format!("test/{}", access.user),
        }
    }

    /// `NATS_URL`.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "tls" } else { "nats" };
        format!("{scheme}://127.0.0.1:{}", self.port)
    }

    /// `NATS_PASSWORD` of a user.
    #[must_use]
    pub fn password(&self, user: &str) -> String {
        password(user)
    }

    /// Connects as a user of the bus.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn connect(&self, access: &Access) -> anyhow::Result<Bus> {
        Ok(Bus::connect(&self.config(access)).await?)
    }

    /// Creates the contract's streams, as a deployment does.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn create_streams(
        &self,
        partitions: impl IntoIterator<Item = Partition>,
    ) -> anyhow::Result<()> {
        let bus = self.connect(&access::STREAMS).await?;
        let partitions: Vec<_> = partitions.into_iter().collect();
        for stream in topology::sized_streams(&partitions, topology::EVENTS.max_bytes) {
            bus.ensure_stream(&stream, 1).await?;
        }
        Ok(())
    }

    /// Creates the contract's streams and consumers. Returns the scheduler's connection.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn with_streams(&self) -> anyhow::Result<Bus> {
        self.create_streams([Partition::FIRST]).await?;
        let bus = self.connect(&access::SCHEDULER).await?;
        for consumer in &topology::CONSUMERS {
            bus.ensure_consumer(consumer).await?;
        }
        Ok(bus)
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        self.kill();
    }
}

fn password(user: &str) -> String {
    format!("test-{user}")
}

/// The one that was asked for, the set-up script's, or the one on PATH; new enough, or none.
fn find_program() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("NATS_SERVER_BIN") {
        return Some(path.into());
    }
    let candidates = crate::programs("nats-server");
    candidates.into_iter().find(|program| new_enough(program).unwrap_or(false))
}

fn new_enough(program: &PathBuf) -> anyhow::Result<bool> {
    let output = Command::new(program).arg("--version").output()?;
    let text = String::from_utf8(output.stdout)?;
    let version = text
        .split_whitespace()
        .map(|word| word.trim_start_matches('v'))
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    let mut parts = version.context("no version")?.split('.');
    let (major, minor): (u32, u32) =
        (parts.next().context("major")?.parse()?, parts.next().context("minor")?.parse()?);
    Ok((major, minor) >= (2, 12))
}
