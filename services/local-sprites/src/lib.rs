//! A server of the Sprites API for this machine, so that no account is needed.
//!
//! Rooms: [`isolation`] keeps a Sprite apart, [`network`] decides whom it reaches, [`sprites`]
//! keeps them all, [`run`] runs commands in them, [`services`] keeps programs running, [`files`] is
//! the file API. [`api`] speaks the wire format of the Sprites API over all of it; what is not
//! served answers 404. [`chaos`] makes trouble for tests.

mod api;
mod atomic;
mod chaos;
mod files;
pub mod isolation;
pub mod metrics;
mod network;
mod run;
mod services;
mod sprites;
mod sync;

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use axum::serve::ListenerExt as _;
use secrecy::SecretString;
use service::{Env, Lifecycle};
use tokio::net::TcpListener;

use crate::{
    api::Api,
    chaos::{Chaos, FaultInjector},
    isolation::{
        cgroup::{Cgroups, Limits},
        runtime::Program,
        sandbox::{Isolation, Sandboxes},
    },
    sprites::{
        budget::{Budget, Idle},
        image::ImageLimits,
        registry::Registry,
    },
};

/// Where the root file system of Sprites is, where nothing else is said.
const ROOTFS: &str = "/usr/lib/local-sprites/rootfs";

#[derive(Debug)]
pub struct Config {
    addr: SocketAddr,
    token: SecretString,
    data_dir: PathBuf,
    agents_dir: Option<PathBuf>,
    agent_host: Option<PathBuf>,
    isolation: Isolation,
    runtime: Program,
    rootfs: PathBuf,
    private_hosts: Vec<String>,
    ca_file: Option<PathBuf>,
    limits: Limits,
    disk_bytes: Option<u64>,
    budget: Budget,
    images: ImageLimits,
    chaos: Chaos,
}

impl Config {
    pub fn from_env(env: &mut Env) -> Self {
        Self {
            addr: env.parsed("LOCAL_SPRITES_ADDR", "listen address of the API", ([127, 0, 0, 1], 8778).into()),
            token: env.secret("LOCAL_SPRITES_TOKEN", "the bearer token that callers must send"),
            data_dir: env.required("LOCAL_SPRITES_DATA_DIR", "directory of the Sprites' disks and state").into(),
            agents_dir: env.optional("LOCAL_SPRITES_AGENTS_DIR", "installed agent CLIs, mounted read-only at /opt/agents").map(Into::into),
            agent_host: env
                .optional("LOCAL_SPRITES_AGENT_HOST", "a static agent-host, mounted read-only at /opt/aod/agent-host")
                .map(Into::into),
            isolation: env.parsed("LOCAL_SPRITES_ISOLATION", "overlay (as root), readonly, or auto", Isolation::Auto),
            runtime: env.parsed(
                "LOCAL_SPRITES_RUNTIME",
                "OCI runtime that creates sandboxes, as root: runc, crun, or runsc (gVisor)",
                Program::default(),
            ),
            rootfs: env
                .optional("LOCAL_SPRITES_ROOTFS", "root file system of Sprites, created by scripts/rootfs.sh")
                .map_or_else(|| PathBuf::from(ROOTFS), Into::into),
            private_hosts: {
                let hosts = env.optional(
                    "LOCAL_SPRITES_PRIVATE_HOSTS",
                    "comma-separated host:port: private addresses that Sprites may reach; 127.0.0.1:port appears on a Sprite's own loopback",
                );
                hosts.unwrap_or_default().split(',').map(|host| host.trim().to_owned()).filter(|host| !host.is_empty()).collect()
            },
            ca_file: env
                .optional(
                    "LOCAL_SPRITES_CA_FILE",
                    "PEM file of authorities, beside the machine's own, by which hosts of vault credentials are verified",
                )
                .map(Into::into),
            limits: Limits {
                memory_bytes: env.parsed(
                    "LOCAL_SPRITES_MEMORY_MB",
                    "memory of a Sprite, in MiB; /dev/shm and /run may each use a quarter of it",
                    4096_u64,
                ) << 20,
                cpu_milli: {
                    let cpus = env.parsed("LOCAL_SPRITES_CPUS", "CPUs of a Sprite, such as 1.5; 0: all", 0.0_f64);
                    (cpus.is_finite() && cpus > 0.0).then_some((cpus * 1000.0) as u64)
                },
                processes: env.parsed("LOCAL_SPRITES_PROCESSES", "maximum number of processes and threads of a Sprite", 4096),
            },
            disk_bytes: {
                let mb = env.parsed("LOCAL_SPRITES_DISK_MB", "disk of a Sprite, in MiB, allocated as it is used; 0: no limit", 20_480_u64);
                (mb > 0).then_some(mb << 20)
            },
            budget: Budget {
                memory_bytes: {
                    let mb = env.parsed(
                        "LOCAL_SPRITES_TOTAL_MEMORY_MB",
                        "memory of all Sprites together, in MiB; 0: the machine's memory except 2 GiB",
                        0_u64,
                    );
                    (mb > 0).then_some(mb << 20)
                },
                cpu_milli: {
                    let cpus = env.parsed("LOCAL_SPRITES_TOTAL_CPUS", "CPUs of all Sprites together, such as 1.5; 0: all", 0.0_f64);
                    (cpus.is_finite() && cpus > 0.0).then_some((cpus * 1000.0) as u64)
                },
                disk_reserve_bytes: env.parsed(
                    "LOCAL_SPRITES_DISK_RESERVE_MB",
                    "free space that Sprites leave on the disk of LOCAL_SPRITES_DATA_DIR, in MiB; at most a quarter of the disk",
                    4096_u64,
                ) << 20,
                idle: Idle {
                    freeze_after: {
                        let seconds =
                            env.parsed("LOCAL_SPRITES_FREEZE_AFTER_S", "seconds after which an idle Sprite is frozen, longer than AOD_AGENT_IDLE_SECONDS so that an idle agent has ended; 0: never", 360);
                        (seconds > 0).then_some(Duration::from_secs(seconds))
                    },
                    stop_after: {
                        let seconds =
                            env.parsed("LOCAL_SPRITES_STOP_AFTER_S", "seconds after which a frozen Sprite is stopped; 0: never", 3600);
                        (seconds > 0).then_some(Duration::from_secs(seconds))
                    },
                },
            },
            images: ImageLimits {
                bytes_max: env.parsed(
                    "LOCAL_SPRITES_IMAGES_MB",
                    "disks with installed packages that are kept for new Sprites, in MiB together; 0: none",
                    10_240_u64,
                ) << 20,
                age_max: Duration::from_secs(
                    3600 * env.parsed("LOCAL_SPRITES_IMAGE_HOURS", "hours after which such a disk is deleted, so that packages are updated", 72_u64),
                ),
            },
            chaos: {
                let argument = std::env::args().skip_while(|argument| argument != "--chaos").nth(1);
                let chaos = env.parsed("LOCAL_SPRITES_CHAOS", chaos::HELP, Chaos::default());
                argument.map_or(Some(chaos), |text| text.parse().ok()).unwrap_or_else(|| {
                    env.refuse(format!("--chaos is not valid ({})", chaos::HELP));
                    Chaos::default()
                })
            },
        }
    }
}

/// Serves until a signal: on SIGINT (Ctrl-C) what runs in the Sprites is ended too; on SIGTERM, as
/// for a restart, it runs on.
///
/// Proves first that a sandbox can be made here, and takes up the Sprites that are there.
///
/// # Errors
/// When this machine cannot isolate a Sprite, or the address cannot be bound.
pub async fn run(config: Config, lifecycle: Lifecycle) -> anyhow::Result<()> {
    crate::metrics::describe();
    std::fs::create_dir_all(&config.data_dir).context("LOCAL_SPRITES_DATA_DIR")?;
    let instance = instance(&config.data_dir);
    let cgroups = Cgroups::find(&instance, config.limits);
    let missing = cgroups.missing();
    let kind = isolation::sandbox::Kind {
        isolation: config.isolation,
        runtime: config.runtime,
        rootfs: config.rootfs,
        agents_dir: config.agents_dir,
        agent_host: config.agent_host,
        disk_bytes: config.disk_bytes,
        memory_bytes: config.limits.memory_bytes,
        forwards: network::private_hosts::Forward::of(&config.private_hosts),
        loopback_ports: network::private_hosts::loopback_ports(&config.private_hosts),
        instance,
        cgroups: cgroups.any(),
    };
    let sandboxes = Sandboxes::prepare(kind, &config.data_dir).await?;
    if !missing.is_empty() {
        tracing::warn!(
            missing = missing.join(", "),
            "no limits: this machine has no writable control groups"
        );
    }
    let faults = Arc::new(FaultInjector::new(config.chaos));
    anyhow::ensure!(
        !faults.pauses() || cgroups.can_freeze(),
        "LOCAL_SPRITES_CHAOS: no Sprite can be paused here"
    );
    let reach = network::proxy::Reach {
        private_hosts: config.private_hosts.into(),
        tls: network::intercept::trusting(config.ca_file.as_deref())
            .context("LOCAL_SPRITES_CA_FILE")?,
    };
    let registry = Registry::load(
        &config.data_dir,
        sandboxes,
        cgroups,
        (config.budget, config.images),
        reach,
        lifecycle.clone(),
    )
    .await;
    let api = Api { registry: registry.context("LOCAL_SPRITES_DATA_DIR")?, faults };
    api.registry.prepare_next();
    for sprite in api.registry.all() {
        api::inside::open(&api, &sprite);
    }
    let listener = TcpListener::bind(config.addr)
        .await
        .with_context(|| format!("cannot listen on LOCAL_SPRITES_ADDR {}", config.addr))?;
    let router = api::router(&api, config.token);
    if api.faults.pauses() {
        lifecycle.spawn(
            "pauses",
            api.faults.clone().pause_idle(api.registry.clone(), lifecycle.clone()),
        );
    }
    lifecycle.spawn("budget", sprites::caretaker::keep(api.registry.clone(), lifecycle.clone()));
    let (stop, life) = (lifecycle.stop_token(), lifecycle.clone());
    lifecycle.spawn("api", async move {
        // Small frames leave at once.
        let listener = listener.tap_io(|stream| {
            let _ = stream.set_nodelay(true);
        });
        let serve = axum::serve(listener, router);
        // Open sockets are not waited for: their clients attach again.
        tokio::select! {
            () = stop.cancelled() => {}
            served = serve => if let Err(error) = served { tracing::error!(%error, "api ended") },
        }
        // Otherwise they run on, and the next server takes them up.
        if life.was_interrupted() {
            api.registry.kill_all().await;
        }
    });
    Ok(())
}

/// Tells this server's control groups from those of others on the machine, and is the same after a
/// restart.
fn instance(data_dir: &std::path::Path) -> String {
    let mut hasher = DefaultHasher::new();
    data_dir.canonicalize().unwrap_or_else(|_| data_dir.to_owned()).hash(&mut hasher);
    format!("local-sprites-{:016x}", hasher.finish())
}
