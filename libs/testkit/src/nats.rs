//! A real nats-server, with the very configuration and permissions that deployments have.

use std::{
    net::TcpStream,
    path::PathBuf,
    process::{Child, Command},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use bus::Bus;
use contract::{
    access::{self, Access},
    topology,
};
use tempfile::TempDir;
use types::Partition;

use crate::{
    docker::Container,
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
}

#[derive(Debug)]
enum Running {
    Process(Child),
    Container { _container: Container },
}

impl Nats {
    /// # Errors
    /// When there is no nats-server on this machine, nor Docker.
    pub fn start() -> anyhow::Result<Self> {
        Self::start_with(None)
    }

    /// A server that takes encrypted connections only.
    ///
    /// # Errors
    /// When there is no nats-server on this machine.
    pub fn start_tls() -> anyhow::Result<Self> {
        Self::start_with(Some(Tls::generate()?))
    }

    fn start_with(tls: Option<Tls>) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("aod-nats-").tempdir()?;
        std::fs::write(dir.path().join("nats-server.conf"), CONF)?;
        std::fs::write(dir.path().join("permissions.conf"), PERMISSIONS)?;
        let mut nats = Self { port: free_port()?, dir, running: None, tls };
        nats.run()?;
        Ok(nats)
    }

    fn run(&mut self) -> anyhow::Result<()> {
        let conf = self.dir.path().join("nats-server.conf");
        let passwords = access::users().map(|user| (access::password_variable(user), password(user)));
        let running = if let Some(program) = find_program() {
            let mut command = Command::new(program);
            command.arg("-c").arg(conf).args(["-a", "127.0.0.1", "-p", &self.port.to_string(), "-sd"]).arg(self.dir.path().join("store"));
            if let Some(tls) = &self.tls {
                command.arg("--tls").arg("--tlscert").arg(tls.certificate_file()).arg("--tlskey").arg(tls.key_file());
            }
            command.envs(passwords);
            Running::Process(spawn_tied(command)?)
        } else {
            ensure!(Container::available(), "neither nats-server nor Docker is on this machine; `make setup` installs the first");
            // As its own user, so that the folder can be removed; its store outlives a restart.
            let store = self.dir.path().join("store");
            std::fs::create_dir_all(&store)?;
            let user = format!("{}:{}", rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
            let (publish, volume) = (format!("127.0.0.1:{}:4222", self.port), format!("{}:/conf:ro", self.dir.path().display()));
            let data = format!("{}:/store", store.display());
            let variables: Vec<_> = passwords.map(|(name, value)| format!("{name}={value}")).collect();
            let mut options =
                vec!["--publish", publish.as_str(), "--volume", volume.as_str(), "--volume", data.as_str(), "--user", user.as_str()];
            options.extend(variables.iter().flat_map(|variable| ["--env", variable.as_str()]));
            Running::Container { _container: Container::run(&options, "nats:2.12", &["-c", "/conf/nats-server.conf", "-sd", "/store"])? }
        };
        self.running = Some(running);
        for _ in 0..1000 {
            if TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("nats-server does not take connections")
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

    /// The contract's streams and consumers, made as the scheduler makes them.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn with_streams(&self) -> anyhow::Result<Bus> {
        let bus = self.connect(&access::SCHEDULER).await?;
        for stream in topology::streams([Partition::FIRST]) {
            bus.ensure_stream(&stream, 1, 1).await?;
        }
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
    let var = |wanted: &str| std::env::vars().find(|(name, _)| name == wanted).map(|(_, value)| value);
    if let Some(path) = var("NATS_SERVER_BIN") {
        return Some(path.into());
    }
    let data = var("XDG_DATA_HOME").map(PathBuf::from).or_else(|| Some(PathBuf::from(var("HOME")?).join(".local/share")));
    let tools = var("AOD_TOOLS_DIR").map(PathBuf::from).or_else(|| Some(data?.join("aod/tools")))?;
    let path = var("PATH").unwrap_or_default();
    let candidates = [tools.join("bin")].into_iter().chain(path.split(':').map(PathBuf::from)).map(|dir| dir.join("nats-server"));
    candidates.into_iter().find(|program| new_enough(program).unwrap_or(false))
}

fn new_enough(program: &PathBuf) -> anyhow::Result<bool> {
    let output = Command::new(program).arg("--version").output()?;
    let text = String::from_utf8(output.stdout)?;
    let version =
        text.split_whitespace().map(|word| word.trim_start_matches('v')).find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    let mut parts = version.context("no version")?.split('.');
    let (major, minor): (u32, u32) = (parts.next().context("major")?.parse()?, parts.next().context("minor")?.parse()?);
    Ok((major, minor) >= (2, 12))
}
