//! The data directory: Postgres' and NATS' files, the Sprites, logs, and the secrets that were
//! generated at the first start.

use std::{
    fs::{self, File},
    io::Write as _,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::fs::{
        DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
    },
    path::{Path, PathBuf},
};

use contract::access;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use types::ApiKey;

use crate::{
    dev::{DevError, tools::Tools},
    random,
};

/// What a running stack is and how it is reached, in its data directory.
pub const READY_FILE: &str = "running.json";

/// A data directory that this process alone uses.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    pub secrets: Secrets,
    /// Who Postgres runs as, where this is root.
    pub postgres_user: Option<User>,
    _lock: File,
}

/// A user of this machine.
#[derive(Clone, Debug)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// In name only: a namespace in which root's id is this one. For a directory that no other user
    /// can enter.
    pub mapped: bool,
}

/// Made once, kept in a file that its owner alone can read.
#[derive(Clone, Serialize, Deserialize)]
pub struct Secrets {
    pub postgres_password: String,
    pub service_passwords: Vec<(String, String)>,
    pub nats_passwords: Vec<(String, String)>,
    pub encryption_key: String,
    /// Empty in a directory of a release before.
    #[serde(default)]
    pub deployment_id: String,
    pub sprites_token: String,
    pub api_key: String,
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secrets")
    }
}

impl DataDir {
    /// Opens or makes the directory, and locks it.
    pub fn open(path: Option<PathBuf>, _: &Tools) -> Result<Self, DevError> {
        let root = rustix::process::geteuid().is_root();
        let path = path.map_or_else(default_dir, Ok)?;
        let unfit = |what: &str, error: &dyn std::fmt::Display| {
            DevError::Unfit(format!("data directory {} {what}: {error}", path.display()))
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(&path)
            .map_err(|error| unfit("cannot be made", &error))?;
        let path = path.canonicalize().map_err(|error| unfit("cannot be found", &error))?;
        let lock = fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path.join("lock"));
        let lock = lock.map_err(|error| unfit("cannot be written", &error))?;
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(DevError::Unfit(format!(
                "data directory {} is in use by another aod dev",
                path.display()
            )));
        }
        let mut postgres_user = if root { Some(find_user()?) } else { None };
        if let Some(user) = &mut postgres_user {
            // The other user may traverse it, and no one may list it.
            let _ = fs::set_permissions(&path, fs::Permissions::from_mode(0o711));
            let closed = |dir: &&Path| {
                dir.metadata().is_ok_and(|metadata| {
                    metadata.mode() & 0o001 == 0 && metadata.uid() != user.uid
                })
            };
            user.mapped = path.ancestors().skip(1).any(|dir| closed(&dir));
        }
        for dir in ["logs", "nats", "sprites"] {
            fs::create_dir_all(path.join(dir))
                .map_err(|error| unfit("cannot be written", &error))?;
        }
        let secrets = Secrets::load(&path.join("secrets.json"))
            .map_err(|error| unfit("cannot keep its secrets", &error))?;
        Ok(Self { path, secrets, postgres_user, _lock: lock })
    }

    /// Puts a service's secret into a file that the owner alone can read; the variable that names
    /// the file.
    pub fn write_secret(
        &self,
        service: &str,
        variable: &str,
        value: &str,
    ) -> Result<(String, String), DevError> {
        let dir = self.join("secrets").join(service);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(DevError::broken)?;
        let path = dir.join(variable);
        let mut file = fs::OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(DevError::broken)?;
        file.write_all(value.as_bytes()).map_err(DevError::broken)?;
        Ok((format!("{variable}_FILE"), path.display().to_string()))
    }

    /// The port of loopback that an earlier start kept in a file, or this one where none did or
    /// another program has it.
    pub fn kept_port(&self, file: &str, otherwise: SocketAddr) -> Result<SocketAddr, DevError> {
        let path = self.join(file);
        let kept: Option<u16> =
            fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
        let kept = kept
            .map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
            .filter(|addr| TcpListener::bind(addr).is_ok());
        let addr = kept.unwrap_or(otherwise);
        fs::write(&path, addr.port().to_string()).map_err(DevError::broken)?;
        Ok(addr)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

pub fn default_dir() -> Result<PathBuf, DevError> {
    if rustix::process::geteuid().is_root() {
        return Ok("/var/lib/aod/dev".into());
    }
    let home = std::env::home_dir().ok_or_else(|| {
        DevError::Unfit("there is no home directory; choose a place with --data-dir".to_owned())
    })?;
    Ok(home.join(".local/share/aod/dev"))
}

/// `postgres`, as the distribution's package makes it; else `nobody`.
fn find_user() -> Result<User, DevError> {
    let users = fs::read_to_string("/etc/passwd").map_err(DevError::broken)?;
    ["postgres", "nobody"]
        .into_iter()
        .find_map(|wanted| {
            let fields: Vec<&str> = users
                .lines()
                .map(|line| line.split(':').collect::<Vec<_>>())
                .find(|fields| fields.first() == Some(&wanted))?;
            Some(User {
                uid: fields.get(2)?.parse().ok()?,
                gid: fields.get(3)?.parse().ok()?,
                mapped: false,
            })
        })
        .ok_or_else(|| {
            DevError::Unfit(
                "Postgres does not run as root, and there is no user postgres or nobody".to_owned(),
            )
        })
}

impl Secrets {
    fn load(path: &Path) -> anyhow::Result<Self> {
        if let Ok(text) = fs::read_to_string(path) {
            let mut secrets: Self = serde_json::from_str(&text)?;
            let known = secrets.nats_passwords.len();
            for user in access::users() {
                if secrets.nats_password(user).is_empty() {
                    secrets.nats_passwords.push((user.to_owned(), random::secret()?));
                }
            }
            let identified = !secrets.deployment_id.is_empty();
            if !identified {
                secrets.deployment_id = random::secret()?;
            }
            if secrets.nats_passwords.len() > known || !identified {
                secrets.save(path)?;
            }
            return Ok(secrets);
        }
        let secrets = Self {
            postgres_password: random::secret()?,
            service_passwords: store::provision::SERVICES
                .iter()
                .map(|name| Ok((String::from(*name), random::secret()?)))
                .collect::<anyhow::Result<_>>()?,
            nats_passwords: access::users()
                .map(|user| Ok((user.to_owned(), random::secret()?)))
                .collect::<anyhow::Result<_>>()?,
            encryption_key: random::secret()?,
            deployment_id: random::secret()?,
            sprites_token: random::secret()?,
            api_key: ApiKey::generate()?.reveal().to_owned(),
        };
        secrets.save(path)?;
        Ok(secrets)
    }

    fn save(&self, path: &Path) -> anyhow::Result<()> {
        Ok(write_privately(path, serde_json::to_string_pretty(self)?.as_bytes())?)
    }

    pub fn service_password(&self, service: &str) -> &str {
        find(&self.service_passwords, service)
    }

    pub fn nats_password(&self, user: &str) -> &str {
        find(&self.nats_passwords, user)
    }
}

fn find<'a>(pairs: &'a [(String, String)], name: &str) -> &'a str {
    pairs.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value)
}

/// Writes a file that only its owner can read, whole or not at all.
pub fn write_privately(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let draft = path.with_extension("draft");
    let mut file =
        fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&draft)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(draft, path)
}
