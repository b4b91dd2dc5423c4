//! The processes of the stack, in the order in which they start, with their settings.

use std::{
    fs,
    io::Write as _,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    time::Duration,
};

use contract::access;
use rustix::process::Signal;
use serde_json::{Map, Value, json};
use sqlx::{Connection as _, PgConnection};

use crate::{
    dev::{
        DevArgs, DevError, bootstrap,
        data::{DataDir, READY_FILE},
        settings::Settings,
        supervisor::{Probe, Process, Spec},
        tools::Tools,
    },
    random,
};

const NATS_CONF: &str = include_str!("../../../../nats/nats-server.conf");
const NATS_CLUSTER_CONF: &str = include_str!("../../../../nats/cluster.conf");
const NATS_PERMISSIONS: &str = include_str!("../../../../nats/permissions.conf");
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

/// Ports for one stack. Its services may be started again at any time, and their ports are free
/// meanwhile: so a stack has a block of ports to itself, for as long as it holds the block's first.
/// Not from the range that the kernel gives to outgoing connections.
struct Ports {
    _block: TcpListener,
    addrs: Vec<SocketAddr>,
}

impl Ports {
    const FIRST: u16 = 20_000;
    const BLOCK: u16 = 128;
    const BLOCKS: u32 = 80;
    const ATTEMPTS: u32 = 400;

    fn claim(count: usize) -> Result<Self, DevError> {
        for _ in 0..Self::ATTEMPTS {
            let number = getrandom::u32().map_err(DevError::broken)? % Self::BLOCKS;
            let first = Self::FIRST + u16::try_from(number).unwrap_or_default() * Self::BLOCK;
            let Ok(block) = TcpListener::bind((Ipv4Addr::LOCALHOST, first)) else { continue };
            // A process that knows nothing of blocks may have taken one.
            let free = |port: &u16| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok();
            let addrs = (first + 1..first + Self::BLOCK)
                .filter(free)
                .take(count)
                .map(|port| (Ipv4Addr::LOCALHOST, port).into());
            let addrs: Vec<SocketAddr> = addrs.collect();
            if addrs.len() == count {
                return Ok(Self { _block: block, addrs });
            }
        }
        Err(DevError::Broken("no free ports".to_owned()))
    }
}

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

/// What services get from files of their own: other processes of the user may read an environment.
const SECRETS: &[&str] = &[
    "AOD_DEPLOYMENT_ID",
    "DATABASE_URL",
    "FIELD_ENCRYPTION_KEY",
    "LOCAL_SPRITES_TOKEN",
    "NATS_PASSWORD",
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
        let mut ticks = tokio::time::interval(Duration::from_millis(25));
        loop {
            ticks.tick().await;
            let mut changed = false;
            for process in &mut self.processes {
                changed |= process.tend(self.restart, &self.tools);
            }
            if changed && let Err(error) = self.write_ready_file() {
                return error;
            }
        }
    }

    /// Ends every child.
    pub async fn stop(&mut self) {
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

    async fn start_postgres(&mut self) -> Result<(), DevError> {
        let dir = self.data.join("postgres");
        let user = self.data.postgres_user.clone();
        if !dir.join("PG_VERSION").exists() {
            self.init_postgres(&dir)?;
        }
        let port = self.postgres.port().to_string();
        let mut args: Vec<String> = vec!["-D".into(), dir.display().to_string(), "-p".into(), port];
        for setting in [
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            "max_connections=200",
            "shared_buffers=64MB",
        ] {
            args.extend(["-c".to_owned(), setting.to_owned()]);
        }
        let spec = Spec {
            name: "postgres".to_owned(),
            service: "postgres",
            program: self.tools.postgres.clone(),
            args,
            env: vec![
                ("PATH".to_owned(), "/usr/bin:/bin".to_owned()),
                ("LC_ALL".to_owned(), "C.UTF-8".to_owned()),
            ],
            user,
            // Fast shutdown: it does not wait for clients.
            stop_signal: Signal::INT,
            probe: Probe::Connect(self.postgres),
            log: self.data.join("logs/postgres.log"),
        };
        let mut process = Process::start(spec, &self.tools)?;
        let ready = process.ready(START_MAX).await;
        self.processes.push(process);
        ready?;
        self.provision_postgres().await
    }

    fn init_postgres(&self, dir: &Path) -> Result<(), DevError> {
        // What a first start left half made.
        let _ = fs::remove_dir_all(dir);
        fs::create_dir_all(dir).map_err(DevError::broken)?;
        let password_file = self.data.join("postgres-password");
        fs::write(&password_file, &self.data.secrets.postgres_password)
            .map_err(DevError::broken)?;
        if let Some(user) = self.data.postgres_user.as_ref().filter(|user| !user.mapped) {
            for path in [dir, &password_file] {
                std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid))
                    .map_err(DevError::broken)?;
            }
        }
        let mut command =
            self.tools.tied(&self.tools.initdb, self.data.postgres_user.as_ref(), "TERM");
        command
            .args(["-U", "postgres", "-A", "scram-sha-256", "-E", "UTF8", "--locale=C.UTF-8", "-D"])
            .arg(dir);
        command.arg("--pwfile").arg(&password_file).current_dir("/").env_remove("LC_ALL");
        let output = command.output().map_err(DevError::broken)?;
        let _ = fs::remove_file(&password_file);
        if output.status.success() {
            return Ok(());
        }
        let _ = fs::remove_dir_all(dir);
        Err(DevError::Broken(format!(
            "initdb failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )))
    }

    async fn provision_postgres(&self) -> Result<(), DevError> {
        let mut admin = self.connect_admin("postgres").await?;
        let exists = sqlx::query("select 1 from pg_database where datname = $1")
            .bind(DATABASE)
            .fetch_optional(&mut admin)
            .await;
        if exists.map_err(DevError::broken)?.is_none() {
            sqlx::query("create database aod")
                .execute(&mut admin)
                .await
                .map_err(DevError::broken)?;
        }
        let mut admin = self.connect_admin(DATABASE).await?;
        for service in store::provision::SERVICES {
            let password = self.data.secrets.service_password(service);
            store::provision::provision(&mut admin, service, password)
                .await
                .map_err(DevError::broken)?;
        }
        Ok(())
    }

    /// Right after its start Postgres takes connections and still refuses them.
    async fn connect_admin(&self, database: &str) -> Result<PgConnection, DevError> {
        let url = self.database_url("postgres", &self.data.secrets.postgres_password, database);
        let mut attempt = 0;
        loop {
            match PgConnection::connect(&url).await {
                Ok(connection) => return Ok(connection),
                Err(error) if attempt > 200 => {
                    return Err(DevError::Broken(format!(
                        "Postgres does not take connections: {error}"
                    )));
                }
                Err(_) => attempt += 1,
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn database_url(&self, user: &str, password: &str, database: &str) -> String {
        format!("postgres://{user}:{password}@{}/{database}", self.postgres)
    }

    async fn start_nats(&mut self) -> Result<(), DevError> {
        let dir = self.data.join("nats");
        let confs = [
            ("nats-server.conf", NATS_CONF),
            ("cluster.conf", NATS_CLUSTER_CONF),
            ("permissions.conf", NATS_PERMISSIONS),
        ];
        for (name, text) in confs {
            fs::write(dir.join(name), text).map_err(DevError::broken)?;
        }
        // Known to these servers alone, for as long as they run.
        let cluster_password = random::secret().map_err(DevError::broken)?;
        let routes: Vec<String> = self
            .nats
            .iter()
            .map(|addrs| format!("nats://cluster:{cluster_password}@{}", addrs.peer))
            .collect();
        let first = self.processes.len();
        for (number, addrs) in (1..).zip(&self.nats) {
            let (name, alone) = (
                if number == 1 { "nats".to_owned() } else { format!("nats-{number}") },
                self.nats.len() == 1,
            );
            let conf = dir.join(if alone { "nats-server.conf" } else { "cluster.conf" });
            let store =
                dir.join(if number == 1 { "store".to_owned() } else { format!("store-{number}") });
            let mut args = vec![
                "-c".to_owned(),
                conf.display().to_string(),
                "-a".to_owned(),
                "127.0.0.1".to_owned(),
            ];
            args.extend([
                "-p".to_owned(),
                addrs.client.port().to_string(),
                "-sd".to_owned(),
                store.display().to_string(),
            ]);
            if !alone {
                args.extend(["--cluster".to_owned(), format!("nats://{}", addrs.peer)]);
            }
            let password = |user| {
                (access::password_variable(user), self.data.secrets.nats_password(user).to_owned())
            };
            let peer = [
                ("NATS_SERVER_NAME".to_owned(), name.clone()),
                ("NATS_CLUSTER_PASSWORD".to_owned(), cluster_password.clone()),
                ("NATS_ROUTES".to_owned(), json!(routes).to_string()),
            ];
            let spec = Spec {
                log: self.data.join(&format!("logs/{name}.log")),
                name,
                service: "nats",
                program: self.tools.nats_server.clone(),
                args,
                env: access::users().map(password).chain(peer).collect(),
                user: None,
                stop_signal: Signal::TERM,
                probe: Probe::Connect(addrs.client),
            };
            self.processes.push(Process::start(spec, &self.tools)?);
        }
        for process in &mut self.processes[first..] {
            process.ready(START_MAX).await?;
        }
        Ok(())
    }

    fn nats_url(&self) -> String {
        self.nats
            .iter()
            .map(|addrs| format!("nats://{}", addrs.client))
            .collect::<Vec<_>>()
            .join(",")
    }

    fn nats_config(&self, user: &'static str) -> bus::Config {
        bus::Config {
            url: self.nats_url(),
            user,
            password: self.data.secrets.nats_password(user).to_owned().into(),
            ca_file: None,
            name: format!("aod-dev/{user}"),
        }
    }

    /// The services, their settings and where they tell that they are ready.
    fn services(&self) -> Result<Vec<Spec>, DevError> {
        let secrets = &self.data.secrets;
        let settings = &self.settings;
        let mut ports = self.admin.iter().copied();
        let mut specs = Vec::new();
        let mut add = |name: String,
                       program: &'static str,
                       env: Vec<(&str, String)>|
         -> Result<(), DevError> {
            let admin = ports.next().ok_or_else(|| DevError::Broken("no free port".to_owned()))?;
            let given = |(variable, value): (&str, String)| match SECRETS.contains(&variable) {
                true => self.data.write_secret(&name, variable, &value),
                false => Ok((variable.to_owned(), value)),
            };
            let set_here: Vec<&str> =
                env.iter().map(|(variable, _)| *variable).chain(["AOD_ADMIN_ADDR"]).collect();
            let defaults = [("AOD_STOP_GRACE_SECONDS", "3"), ("AOD_DRAIN_SECONDS", "0")];
            let defaults =
                defaults.map(|(variable, value)| (variable.to_owned(), value.to_owned()));
            let from_environment = settings.of(program, &set_here);
            let own = env.into_iter().map(given).collect::<Result<Vec<_>, _>>()?;
            let admin_addr = ("AOD_ADMIN_ADDR".to_owned(), admin.to_string());
            let env = defaults
                .into_iter()
                .chain(from_environment)
                .chain(own)
                .chain([admin_addr])
                .collect();
            specs.push(Spec {
                log: self.data.join(&format!("logs/{name}.log")),
                name,
                service: program,
                program: self.tools.services.join(program),
                args: Vec::new(),
                env,
                user: None,
                // It ends what runs in the Sprites too.
                stop_signal: if program == "local-sprites" { Signal::INT } else { Signal::TERM },
                probe: Probe::Ready(admin),
            });
            Ok(())
        };
        let nats = |user: &str| {
            vec![
                ("NATS_URL", self.nats_url()),
                ("NATS_PASSWORD", secrets.nats_password(user).to_owned()),
            ]
        };
        let database = |service: &str| {
            (
                "DATABASE_URL",
                self.database_url(service, secrets.service_password(service), DATABASE),
            )
        };

        let mut sprites = vec![
            ("LOCAL_SPRITES_ADDR", self.sprites.to_string()),
            ("LOCAL_SPRITES_TOKEN", secrets.sprites_token.clone()),
            ("LOCAL_SPRITES_DATA_DIR", self.data.join("sprites").display().to_string()),
        ];
        // What Sprites reach of this machine: the model gateway, the model, and what the user
        // names.
        let named = super::tools::env("LOCAL_SPRITES_PRIVATE_HOSTS").unwrap_or_default();
        let own = self.model_gateways().chain(self.model).map(|addr| addr.to_string());
        // The model gateway reaches these for them, where they are MCP servers.
        let private_hosts = (!settings.has("AOD_MODEL_GATEWAY_PRIVATE_HOSTS"))
            .then(|| ("AOD_MODEL_GATEWAY_PRIVATE_HOSTS", named.clone()));
        let private: Vec<String> = own.chain([named]).filter(|host| !host.is_empty()).collect();
        sprites.push(("LOCAL_SPRITES_PRIVATE_HOSTS", private.join(",")));
        sprites.push(("LOCAL_SPRITES_ROOTFS", self.tools.rootfs.display().to_string()));
        sprites.extend(
            self.tools
                .agents
                .as_ref()
                .map(|dir| ("LOCAL_SPRITES_AGENTS_DIR", dir.display().to_string())),
        );
        sprites.push(("LOCAL_SPRITES_AGENT_HOST", self.tools.agent_host.display().to_string()));
        add("local-sprites".to_owned(), "local-sprites", sprites)?;
        if let Some(model) = self.model {
            add(
                "scripted-model".to_owned(),
                "scripted-model",
                vec![("SCRIPTED_MODEL_ADDR", model.to_string())],
            )?;
        }
        for name in self.replicas_of("auth") {
            add(name, "auth", [nats("auth"), vec![database("auth")]].concat())?;
        }
        for name in self.replicas_of("credential-vault") {
            let vault =
                vec![database("vault"), ("FIELD_ENCRYPTION_KEY", secrets.encryption_key.clone())];
            add(name, "credential-vault", [nats("vault"), vault].concat())?;
        }
        let files = (!settings.has("AOD_FILES_URL"))
            .then(|| ("AOD_FILES_URL", format!("file://{}", self.data.join("files").display())));
        for name in self.replicas_of("scheduler") {
            let copies = ("AOD_STREAM_REPLICAS", self.nats.len().min(3).to_string());
            let deployment = ("AOD_DEPLOYMENT_ID", secrets.deployment_id.clone());
            add(
                name,
                "scheduler",
                [
                    nats("scheduler"),
                    vec![database("scheduler"), deployment, copies],
                    files.clone().into_iter().collect(),
                ]
                .concat(),
            )?;
        }
        let models = [
            "AOD_MODEL_BASE_URL_ANTHROPIC",
            "AOD_MODEL_BASE_URL_OPENAI",
            "AOD_MODEL_BASE_URL_GOOGLE",
        ];
        let scripted = self.model.map(|model| format!("http://{model}"));
        let scripted: Vec<(&str, String)> = models
            .into_iter()
            .filter(|name| !settings.has(name))
            .filter_map(|name| Some((name, scripted.clone()?)))
            .collect();
        for (name, addr) in self.replicas_of("model-gateway").zip(self.model_gateways()) {
            let listen = vec![("AOD_MODEL_GATEWAY_ADDR", addr.to_string())];
            let private = private_hosts.clone().into_iter().collect();
            add(
                name,
                "model-gateway",
                [nats("model_gateway"), listen, scripted.clone(), private].concat(),
            )?;
        }
        for number in 1..=self.runners {
            let mut runner = nats("runner");
            runner.extend(files.clone());
            let sprites =
                self.other_sprites.clone().unwrap_or_else(|| format!("http://{}", self.sprites));
            runner.push(("SPRITES_BASE_URL", sprites));
            runner.push(("AOD_AGENT_HOST", self.tools.agent_host.display().to_string()));
            runner.extend(scripted.clone());
            // The user's own names a balancer in front of these.
            runner.extend(
                self.model_gateway
                    .filter(|_| !settings.has("AOD_MODEL_GATEWAY_URL"))
                    .map(|addr| ("AOD_MODEL_GATEWAY_URL", format!("http://{addr}"))),
            );
            runner.extend(private_hosts.clone());
            add(format!("sprite-runner-{number}"), "sprite-runner", runner)?;
        }
        for (name, addr) in self.replicas_of("gateway").zip(self.apis()) {
            let gateway = vec![
                ("AOD_LISTEN_ADDR", addr.to_string()),
                ("ENABLE_SHELL_RUNTIME", "true".to_owned()),
            ];
            let files = files.clone().into_iter().collect();
            add(name, "gateway", [nats("gateway"), gateway, files].concat())?;
        }
        Ok(specs)
    }

    /// `auth`, `auth-2` and so on.
    fn replicas_of(&self, service: &'static str) -> impl Iterator<Item = String> + use<> {
        (1..=self.replicas).map(move |number| {
            if number == 1 { service.to_owned() } else { format!("{service}-{number}") }
        })
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

    /// In the data directory, where `aod admin` finds it; and where it was asked for.
    fn ready_files(&self) -> impl Iterator<Item = PathBuf> {
        [self.data.join(READY_FILE)].into_iter().chain(self.ready_file.clone())
    }

    /// What was started, for programs: written whole or not at all.
    fn write_ready_file(&self) -> Result<(), DevError> {
        let mut services: Map<String, Value> = Map::new();
        for process in &self.processes {
            let list = services.entry(process.spec.service).or_insert_with(|| json!([]));
            if let (Some(list), Some(pid)) = (list.as_array_mut(), process.pid()) {
                let mut service = json!({ "pid": pid, "log": process.spec.log });
                if let (Some(service), Probe::Ready(admin)) =
                    (service.as_object_mut(), &process.spec.probe)
                {
                    service.insert("admin_url".to_owned(), format!("http://{admin}").into());
                }
                list.push(service);
            }
        }
        let secrets = &self.data.secrets;
        let nats = self.nats.first().map(|addrs| addrs.client.to_string()).unwrap_or_default();
        let urls = |addrs: &mut dyn Iterator<Item = SocketAddr>| {
            addrs.map(|addr| format!("http://{addr}")).collect::<Vec<_>>()
        };
        let ready = json!({
            "api_url": self.api_url(),
            "api_urls": urls(&mut self.apis()),
            "api_key": secrets.api_key,
            "sprites_url": format!("http://{}", self.sprites),
            "sprites_token": secrets.sprites_token,
            "nats_url": format!("nats://operator:{}@{nats}", secrets.nats_password("operator")),
            "events_url": format!("nats://events:{}@{nats}", secrets.nats_password("events")),
            "database_url": self.database_url("postgres", &secrets.postgres_password, DATABASE),
            "model_gateway_urls": urls(&mut self.model_gateways()),
            "model_url": self.model.map(|addr| format!("http://{addr}")),
            "services": services,
        });
        let write = |path: &Path| -> std::io::Result<()> {
            use std::os::unix::fs::OpenOptionsExt as _;
            let draft = path.with_extension("draft");
            let mut file = fs::OpenOptions::new()
                .create(true)
                .truncate(true)
                .write(true)
                .mode(0o600)
                .open(&draft)?;
            file.write_all(format!("{ready:#}\n").as_bytes())?;
            fs::rename(draft, path)
        };
        for path in self.ready_files() {
            write(&path).map_err(|error| {
                DevError::Unfit(format!("ready file {} cannot be written: {error}", path.display()))
            })?;
        }
        Ok(())
    }
}
