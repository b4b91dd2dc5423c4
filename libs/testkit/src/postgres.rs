//! A real Postgres.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use sqlx::{Connection as _, PgConnection};
use tempfile::TempDir;

use crate::{
    containers::{Container, Image},
    process::{free_port, spawn_tied},
    tls::Tls,
};

/// Names the server of the run: a URL of its superuser, with no database.
pub const URL_VARIABLE: &str = "AOD_TEST_POSTGRES";
const PASSWORD: &str = "test";
/// Databases are made one after the other: roles belong to the whole server.
const PROVISION_LOCK: i64 = 7_266_837;

/// A server that ends when it is dropped, or with its process.
#[derive(Debug)]
pub struct Server {
    url: String,
    running: Running,
}

#[derive(Debug)]
enum Running {
    Process { child: Child, command: Box<Command>, data: TempDir },
    Container { _container: Container },
}

impl Server {
    /// # Errors
    /// When there is no Postgres on this machine, nor Docker (see [`crate::containers`]).
    pub fn start() -> anyhow::Result<Self> {
        find_bin().map_or_else(Self::start_in_container, |bin| Self::start_with(&bin, None))
    }

    /// A server from an image, whatever is installed.
    ///
    /// # Errors
    /// When Docker does not answer or refuses.
    pub fn start_in_container() -> anyhow::Result<Self> {
        let port = free_port()?;
        let image = Image {
            name: "postgres",
            tag: "17",
            ports: (port, 5432),
            args: Vec::new(),
            variables: vec![("POSTGRES_PASSWORD".into(), PASSWORD.into())],
            volumes: Vec::new(),
            user: None,
        };
        Ok(Self {
            url: format!("postgres://postgres:{PASSWORD}@127.0.0.1:{port}"),
            running: Running::Container { _container: image.start()? },
        })
    }

    /// A server that speaks TLS.
    ///
    /// # Errors
    /// When there is no Postgres on this machine.
    pub fn start_tls(tls: &Tls) -> anyhow::Result<Self> {
        let bin = find_bin().context("PostgreSQL is not installed: run `make setup`")?;
        Self::start_with(&bin, Some(tls))
    }

    fn start_with(bin: &Path, tls: Option<&Tls>) -> anyhow::Result<Self> {
        let data = tempfile::Builder::new().prefix("aod-postgres-").tempdir()?;
        let password_file = data.path().join("password");
        std::fs::write(&password_file, PASSWORD)?;
        let cluster = data.path().join("data");
        // Postgres refuses to run as root.
        let user = if rustix::process::geteuid().is_root() { Some(find_user()?) } else { None };
        if let Some((uid, gid)) = user {
            for path in [data.path(), &password_file] {
                std::os::unix::fs::chown(path, Some(uid), Some(gid))?;
            }
        }
        let as_user = |program: PathBuf| {
            // In one step with the change of user, which would undo an earlier tie to this process.
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", "INT"]);
            if let Some((uid, gid)) = user {
                command.args([
                    "--reuid",
                    &uid.to_string(),
                    "--regid",
                    &gid.to_string(),
                    "--clear-groups",
                ]);
            }
            command.arg("--").arg(program).current_dir("/");
            command
        };
        let mut initdb = as_user(bin.join("initdb"));
        initdb
            .args([
                "--no-sync",
                "-U",
                "postgres",
                "-A",
                "scram-sha-256",
                "-E",
                "UTF8",
                "--locale=C.UTF-8",
                "-D",
            ])
            .arg(&cluster)
            .arg("--pwfile")
            .arg(&password_file);
        let output = initdb.output().context("initdb")?;
        ensure!(output.status.success(), "initdb: {}", String::from_utf8_lossy(&output.stderr));
        let port = free_port()?;
        let mut postgres = as_user(bin.join("postgres"));
        postgres.arg("-D").arg(&cluster).args(["-p", &port.to_string()]);
        for setting in [
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            "fsync=off",
            "full_page_writes=off",
            "max_connections=300",
        ] {
            postgres.args(["-c", setting]);
        }
        if let Some(tls) = tls {
            for (setting, from) in
                [("ssl_cert_file", tls.certificate_file()), ("ssl_key_file", tls.key_file())]
            {
                let path = data.path().join(setting);
                std::fs::copy(from, &path)?;
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
                if let Some((uid, gid)) = user {
                    std::os::unix::fs::chown(&path, Some(uid), Some(gid))?;
                }
                postgres.args(["-c", &format!("{setting}={}", path.display())]);
            }
            postgres.args(["-c", "ssl=on"]);
        }
        let child = spawn_tied(&postgres)?;
        Ok(Self {
            url: format!("postgres://postgres:{PASSWORD}@127.0.0.1:{port}"),
            running: Running::Process { child, command: Box::new(postgres), data },
        })
    }

    /// As [`URL_VARIABLE`] has it.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Waits until the server takes connections.
    ///
    /// # Errors
    /// When it does not within a minute.
    pub async fn ready(&self) -> anyhow::Result<()> {
        connect(&self.url).await.map(|_| ())
    }

    /// Restarts the server as a standby, as after a failover. `pg_promote()` makes it a primary.
    ///
    /// # Errors
    /// When it runs in a container, or does not start.
    pub fn demote(&mut self) -> anyhow::Result<()> {
        let Running::Process { child, command, data } = &mut self.running else {
            bail!("the server runs in a container");
        };
        interrupt(child);
        std::fs::write(data.path().join("data/standby.signal"), "")?;
        *child = spawn_tied(command)?;
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Running::Process { child, .. } = &mut self.running {
            interrupt(child);
        }
    }
}

/// Closes all connections and waits until the server has exited.
fn interrupt(child: &mut Child) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
    }
    let _ = child.wait();
}

async fn connect(url: &str) -> anyhow::Result<PgConnection> {
    let mut last = None;
    for _ in 0..600 {
        match PgConnection::connect(&format!("{url}/postgres")).await {
            Ok(connection) => return Ok(connection),
            Err(error) => last = Some(error),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    bail!("Postgres does not take connections: {last:?}")
}

/// A database with the roles and schemas of the services, gone with its server.
#[derive(Debug)]
pub struct Database {
    url: String,
    name: String,
}

impl Database {
    /// # Errors
    /// When the server cannot be started or reached.
    pub async fn create() -> anyhow::Result<Self> {
        Self::create_on(server_url()?).await
    }

    /// A database of another server.
    ///
    /// # Errors
    /// When it cannot be reached.
    pub async fn create_on(url: String) -> anyhow::Result<Self> {
        let name = format!("test_{}", uuid::Uuid::new_v4().simple());
        let mut admin = connect(&url).await?;
        sqlx::query("select pg_advisory_lock($1)").bind(PROVISION_LOCK).execute(&mut admin).await?;
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!("create database {name}")))
            .execute(&mut admin)
            .await?;
        let mut database = PgConnection::connect(&format!("{url}/{name}")).await?;
        for service in store::provision::SERVICES {
            store::provision::provision(&mut database, service, PASSWORD).await?;
        }
        admin.close().await?;
        Ok(Self { url, name })
    }

    /// The settings of a service.
    #[must_use]
    pub fn config(&self, service: &str) -> store::Config {
        store::Config { url: self.url(service).into(), max_connections: 8 }
    }

    /// `DATABASE_URL` of a service.
    #[must_use]
    pub fn url(&self, service: &str) -> String {
        let url = self.url.replacen("postgres://postgres:", &format!("postgres://{service}:"), 1);
        format!("{url}/{}", self.name)
    }

    /// A superuser's connection, for looking behind the services.
    ///
    /// # Errors
    /// When the server is gone.
    pub async fn admin(&self) -> anyhow::Result<PgConnection> {
        Ok(PgConnection::connect(&format!("{}/{}", self.url, self.name)).await?)
    }
}

/// The run's server, or one for this process.
fn server_url() -> anyhow::Result<String> {
    static OWN: Mutex<Option<Server>> = Mutex::new(None);
    if let Some((_, url)) = std::env::vars().find(|(name, _)| name == URL_VARIABLE) {
        return Ok(url);
    }
    let mut own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
    if own.is_none() {
        *own = Some(Server::start()?);
    }
    own.as_ref().map(|server| server.url.clone()).context("no server")
}

fn find_bin() -> Option<PathBuf> {
    let packaged = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("bin"));
    let path =
        std::env::vars().find(|(name, _)| name == "PATH").map(|(_, path)| path).unwrap_or_default();
    let on_path = path.split(':').map(|dir| Path::new(dir).to_path_buf()).collect::<Vec<_>>();
    let mut bins: Vec<PathBuf> = packaged
        .chain(on_path)
        .filter(|bin| bin.join("initdb").exists() && bin.join("postgres").exists())
        .collect();
    bins.sort();
    bins.pop()
}

fn find_user() -> anyhow::Result<(u32, u32)> {
    let users = std::fs::read_to_string("/etc/passwd")?;
    for wanted in ["postgres", "nobody"] {
        for line in users.lines() {
            if let [name, _, uid, gid, ..] = line.split(':').collect::<Vec<_>>().as_slice()
                && *name == wanted
            {
                return Ok((uid.parse()?, gid.parse()?));
            }
        }
    }
    bail!("no user postgres or nobody")
}
