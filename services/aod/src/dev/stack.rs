//! The processes of the stack, in the order in which they start.

mod nats;
mod ports;
mod postgres;
mod ready_file;
mod services;

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use futures::future::select_all;
use tokio::task::JoinSet;

use crate::dev::{
    DevArgs, DevError, bootstrap, data::DataDir, settings::Settings, stack::ports::Ports,
    supervisor::Process, tools::Tools,
};

const START_MAX: Duration = Duration::from_secs(60);
/// All children are gone within 10 s of a signal: the services first, then what they need.
const SERVICES_STOP: Duration = Duration::from_secs(5);
const SERVERS_STOP: Duration = Duration::from_secs(4);
const DATABASE: &str = "aod";
/// The file that keeps the model gateway's port: what was written into sandboxes names it.
const MODEL_GATEWAY_PORT: &str = "model-gateway-port";

/// The running stack.
pub struct Stack {
    tools: Tools,
    data: DataDir,
    api: SocketAddr,
    /// Whether the API's port is one of the stack's block (`--port 0`).
    chooses_api_port: bool,
    settings: Settings,
    /// The gateways beyond the first.
    other_apis: Vec<SocketAddr>,
    postgres: SocketAddr,
    nats: Vec<NatsAddrs>,
    sprites: SocketAddr,
    /// The Sprites API that the runners use instead of our own.
    other_sprites: Option<String>,
    model: Option<SocketAddr>,
    /// Where sandboxes reach the model gateway, unless they get providers' keys.
    model_gateway: Option<SocketAddr>,
    /// The model gateways beyond the first.
    other_model_gateways: Vec<SocketAddr>,
    admin: Vec<SocketAddr>,
    /// Held for as long as the stack is there.
    ports: Option<Ports>,
    runners: u16,
    replicas: u16,
    restart: bool,
    ready_file: Option<PathBuf>,
    processes: Vec<Process>,
    /// Creates streams again that the servers have lost.
    streams: JoinSet<()>,
}

/// Where a NATS server listens, for clients and for its peers.
#[derive(Clone, Copy)]
struct NatsAddrs {
    client: SocketAddr,
    peer: SocketAddr,
}

const START_ATTEMPTS: u32 = 5;

/// The services that there is one of, and those that there may be more of, beside the runners. Each
/// has a port for its health.
const SINGLE: usize = 2;
const REPLICATED: usize = 5;

/// The programs that are asked for their settings.
const PROGRAMS: &[&str] = &[
    "gateway",
    "auth",
    "credential-vault",
    "scheduler",
    "sprite-runner",
    "model-gateway",
    "local-sprites",
    "scripted-model",
];

impl Stack {
    pub fn new(
        tools: Tools,
        data: DataDir,
        api: SocketAddr,
        args: DevArgs,
    ) -> Result<Self, DevError> {
        let nowhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        // Sandboxes elsewhere do not reach a port of this machine.
        let has_model_gateway = !args.no_model_gateway && args.sprites_url.is_none();
        let mut stack = Self {
            postgres: nowhere,
            nats: vec![
                NatsAddrs { client: nowhere, peer: nowhere };
                usize::from(args.nats_servers)
            ],
            sprites: nowhere,
            other_sprites: args.sprites_url,
            model: args.scripted_model.then_some(nowhere),
            model_gateway: has_model_gateway.then_some(nowhere),
            other_model_gateways: Vec::new(),
            admin: Vec::new(),
            ports: None,
            settings: Settings::load(&tools.services, PROGRAMS)?,
            tools,
            data,
            api,
            chooses_api_port: api.port() == 0,
            other_apis: Vec::new(),
            replicas: args.replicas,
            runners: args.runners.max(1),
            restart: !args.no_restart,
            ready_file: args.ready_file,
            processes: Vec::new(),
            streams: JoinSet::new(),
        };
        stack.choose_ports()?;
        Ok(stack)
    }

    fn choose_ports(&mut self) -> Result<(), DevError> {
        let (replicas, runners) = (usize::from(self.replicas), usize::from(self.runners));
        let claimed = Ports::claim(
            4 + SINGLE
                + replicas * REPLICATED
                + runners
                + 2 * (replicas - 1)
                + 2 * self.nats.len()
                + 1,
        )?;
        let mut ports = claimed.addrs.clone();
        let api = ports.pop();
        if let Some(api) = api.filter(|_| self.chooses_api_port) {
            self.api = api;
        }
        self.other_apis = ports.split_off(ports.len() - (replicas - 1));
        self.other_model_gateways = ports.split_off(ports.len() - (replicas - 1));
        let nats = ports.split_off(ports.len() - 2 * self.nats.len());
        self.nats =
            nats.chunks_exact(2).map(|pair| NatsAddrs { client: pair[0], peer: pair[1] }).collect();
        let [postgres, sprites, model, model_gateway, admin @ ..] = ports.as_slice() else {
            return Err(DevError::Broken("no free ports".to_owned()));
        };
        (self.postgres, self.sprites) = (*postgres, *sprites);
        self.model = self.model.map(|_| *model);
        self.admin = admin.to_vec();
        match self.model_gateway {
            Some(_) => {
                let kept = self.data.kept_port(MODEL_GATEWAY_PORT, *model_gateway)?;
                self.model_gateway = Some(kept);
            }
            None => self.other_model_gateways.clear(),
        }
        self.ports = Some(claimed);
        Ok(())
    }

    pub fn api_url(&self) -> String {
        format!("http://{}", self.api)
    }

    pub fn api_key(&self) -> &str {
        &self.data.secrets.api_key
    }

    pub fn data_dir(&self) -> &Path {
        self.data.path()
    }

    pub fn has_model(&self) -> bool {
        self.model.is_some()
    }

    /// Starts everything and returns when all of it answers. A port may be taken between its choice
    /// and its use: then others are tried.
    pub async fn start(&mut self) -> Result<(), DevError> {
        let mut attempts = 1;
        loop {
            match self.start_once().await {
                Err(DevError::Broken(error))
                    if attempts < START_ATTEMPTS
                        && error.to_lowercase().contains("address already in use") =>
                {
                    attempts += 1;
                    self.stop().await;
                    self.choose_ports()?;
                }
                started => return started,
            }
        }
    }

    async fn start_once(&mut self) -> Result<(), DevError> {
        self.start_postgres().await?;
        self.start_nats().await?;
        self.start_streams().await?;
        let services = self.services()?;
        for spec in services {
            let process = Process::start(spec, &self.tools)?;
            self.processes.push(process);
        }
        for process in &mut self.processes {
            process.ready(START_MAX).await?;
        }
        let (model, own_sprites) = (self.model.is_some(), self.other_sprites.is_none());
        bootstrap::user(&self.nats_config("operator"), &self.data.secrets, own_sprites, model)
            .await
            .map_err(DevError::broken)?;
        self.write_ready_file()
    }

    /// Keeps the stack running. Returns when that no longer works.
    pub async fn watch(&mut self) -> DevError {
        loop {
            let tended =
                self.processes.iter_mut().map(|process| process.tend(self.restart, &self.tools));
            select_all(tended.map(Box::pin)).await;
            if let Err(error) = self.write_ready_file() {
                return error;
            }
        }
    }

    /// Ends every child.
    pub async fn stop(&mut self) {
        self.streams.abort_all();
        let is_server = |process: &Process| matches!(process.spec.service, "postgres" | "nats");
        let (mut servers, mut services): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.processes).into_iter().partition(is_server);
        futures::future::join_all(services.iter_mut().map(|process| process.stop(SERVICES_STOP)))
            .await;
        futures::future::join_all(servers.iter_mut().map(|process| process.stop(SERVERS_STOP)))
            .await;
        for path in self.ready_files() {
            let _ = fs::remove_file(path);
        }
    }

    /// Where gateways listen.
    fn apis(&self) -> impl Iterator<Item = SocketAddr> {
        [self.api].into_iter().chain(self.other_apis.iter().copied())
    }

    /// Where model gateways listen.
    fn model_gateways(&self) -> impl Iterator<Item = SocketAddr> {
        let others = self.other_model_gateways.iter().copied();
        self.model_gateway.into_iter().chain(others)
    }
}
