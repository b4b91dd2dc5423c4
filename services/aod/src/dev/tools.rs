//! The programs that the stack is made of, found on this machine.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use crate::dev::{DevError, data::User};

const POSTGRES_MIN: u32 = 14;
const NATS_MIN: (u32, u32) = (2, 12);
const SET_UP: &str = "`make setup` in the repository puts it there";

/// Where the programs are.
#[derive(Clone, Debug)]
pub struct Tools {
    /// Our own, beside this one.
    pub services: PathBuf,
    pub postgres: PathBuf,
    pub initdb: PathBuf,
    pub nats_server: PathBuf,
    /// The agent CLIs, where any are installed.
    pub agents: Option<PathBuf>,
    /// What runs agents in Sprites.
    pub agent_host: PathBuf,
    /// The root file system of Sprites.
    pub rootfs: PathBuf,
    /// Runs a program as another user, and lets it end with this one.
    pub setpriv: PathBuf,
    /// Puts a program into namespaces of its own.
    pub unshare: PathBuf,
}

pub fn env(name: &str) -> Option<String> {
    std::env::var_os(name)
        .and_then(|value| value.into_string().ok())
        .filter(|value| !value.is_empty())
}

/// Where the set-up script puts what the distribution does not have.
pub fn tools_dir() -> PathBuf {
    if let Some(dir) = env("AOD_TOOLS_DIR") {
        return dir.into();
    }
    let data = env("XDG_DATA_HOME")
        .map(PathBuf::from)
        .or_else(|| env("HOME").map(|home| Path::new(&home).join(".local/share")));
    data.unwrap_or_else(|| "/var/lib".into()).join("aod/tools")
}

impl Tools {
    pub fn find(scripted_model: bool) -> Result<Self, DevError> {
        let own = std::env::current_exe().map_err(DevError::broken)?;
        let services = own.parent().map(Path::to_path_buf).unwrap_or_default();
        let mut needed = vec![
            "auth",
            "credential-vault",
            "scheduler",
            "sprite-runner",
            "gateway",
            "model-gateway",
            "local-sprites",
        ];
        needed.extend(scripted_model.then_some("scripted-model"));
        for service in needed {
            if !is_executable(&services.join(service)) {
                return Err(DevError::Unfit(format!(
                    "{service} is not beside {}; `cargo build` makes all of them",
                    own.display()
                )));
            }
        }
        let agent_host = find_agent_host(&services)?;
        let rootfs =
            env("LOCAL_SPRITES_ROOTFS").map_or_else(|| tools_dir().join("rootfs"), PathBuf::from);
        if !rootfs.join("bin/sh").exists() {
            return Err(DevError::Unfit(format!(
                "{} holds no root file system for Sprites; {SET_UP}",
                rootfs.display()
            )));
        }
        for tool in if rustix::process::geteuid().is_root() {
            ["runc", "pasta"]
        } else {
            ["bwrap", "nsenter"]
        } {
            on_path(tool).ok_or_else(|| missing(tool))?;
        }
        let postgres = find_postgres()?;
        let initdb = postgres.with_file_name("initdb");
        let nats_server = find_nats()?;
        let agents = tools_dir().join("agents");
        let agents = agents.is_dir().then_some(agents);
        Ok(Self {
            services,
            postgres,
            initdb,
            nats_server,
            agents,
            agent_host,
            rootfs,
            setpriv: on_path("setpriv").ok_or_else(|| missing("setpriv"))?,
            unshare: on_path("unshare").ok_or_else(|| missing("unshare"))?,
        })
    }
}

impl Tools {
    /// A command that runs a program as a user, where one is given, and sends it a signal when this
    /// process is gone.
    pub fn tied(&self, program: &Path, user: Option<&User>, signal: &str) -> Command {
        let (uid, gid) =
            user.map(|user| (user.uid.to_string(), user.gid.to_string())).unwrap_or_default();
        let mut command = match user {
            Some(user) if user.mapped => {
                let mut command = Command::new(&self.unshare);
                command
                    .args(["--user", "--map-user", &uid, "--map-group", &gid, "--"])
                    .arg(&self.setpriv);
                command
            }
            _ => Command::new(&self.setpriv),
        };
        command.args(["--pdeathsig", signal]);
        if user.is_some_and(|user| !user.mapped) {
            command.args(["--reuid", &uid, "--regid", &gid, "--clear-groups"]);
        }
        command.arg("--").arg(program);
        command
    }
}

fn missing(tool: &str) -> DevError {
    DevError::Unfit(format!("{tool} is not on PATH; {SET_UP}"))
}

fn is_executable(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = env("PATH")?;
    let candidates = path.split(':').map(|dir| Path::new(dir).join(program));
    candidates.chain([Path::new("/usr/sbin").join(program)]).find(|path| is_executable(path))
}

/// The one that was asked for, else the newer one of the usual build and of the static build, which
/// has a profile of its own.
fn find_agent_host(services: &Path) -> Result<PathBuf, DevError> {
    if let Some(path) = env("AOD_AGENT_HOST") {
        return Ok(path.into());
    }
    let built =
        [services.join("agent-host"), services.with_file_name("agent-host").join("agent-host")];
    let newest = built
        .iter()
        .filter(|path| is_executable(path))
        .max_by_key(|path| path.metadata().and_then(|file| file.modified()).ok());
    newest.cloned().ok_or_else(|| {
        DevError::Unfit("agent-host is not built; `cargo xtask agent-host` builds it".to_owned())
    })
}

/// The newest of the distribution's servers, or the one on PATH.
fn find_postgres() -> Result<PathBuf, DevError> {
    let installed = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut servers: Vec<(u32, PathBuf)> = installed
        .filter_map(|entry| {
            Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin/postgres")))
        })
        .filter(|(_, path)| is_executable(path) && is_executable(&path.with_file_name("initdb")))
        .collect();
    servers.sort();
    if let Some((version, path)) = servers.pop() {
        return if version >= POSTGRES_MIN {
            Ok(path)
        } else {
            Err(too_old("PostgreSQL", &version.to_string(), "14"))
        };
    }
    let path = on_path("postgres")
        .filter(|path| is_executable(&path.with_file_name("initdb")))
        .ok_or_else(|| missing("postgres"))?;
    let version = version_of(&path);
    match version.split('.').next().and_then(|major| major.parse::<u32>().ok()) {
        Some(major) if major >= POSTGRES_MIN => Ok(path),
        _ => Err(too_old("PostgreSQL", &version, "14")),
    }
}

/// The one that was asked for, else the first that is new enough: PATH, then the set-up script's.
fn find_nats() -> Result<PathBuf, DevError> {
    let fits = |path: &Path| {
        let version = version_of(path);
        let mut parts = version.split('.').map_while(|part| part.parse::<u32>().ok());
        (
            matches!((parts.next(), parts.next()), (Some(major), Some(minor)) if (major, minor) >= NATS_MIN),
            version,
        )
    };
    if let Some(path) = env("NATS_SERVER_BIN").map(PathBuf::from) {
        let (fits, version) = fits(&path);
        return if fits { Ok(path) } else { Err(too_old("NATS_SERVER_BIN", &version, "2.12")) };
    }
    let candidates: Vec<PathBuf> = on_path("nats-server")
        .into_iter()
        .chain([tools_dir().join("bin/nats-server")])
        .filter(|path| is_executable(path))
        .collect();
    if let Some(path) = candidates.iter().find(|path| fits(path).0) {
        return Ok(path.clone());
    }
    match candidates.first() {
        Some(path) => Err(too_old("nats-server", &fits(path).1, "2.12")),
        None => Err(missing("nats-server")),
    }
}

fn too_old(tool: &str, found: &str, wanted: &str) -> DevError {
    DevError::Unfit(format!("{tool} is version {found}; {wanted} or later is needed; {SET_UP}"))
}

/// The first thing that looks like a version in what `--version` prints.
fn version_of(path: &Path) -> String {
    let output = Command::new(path)
        .arg("--version")
        .output()
        .map(|output| output.stdout)
        .unwrap_or_default();
    let text = String::from_utf8_lossy(&output).into_owned();
    let version = text
        .split_whitespace()
        .map(|word| word.trim_start_matches('v'))
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    version.unwrap_or("unknown").to_owned()
}
