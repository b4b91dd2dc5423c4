//! The stack's Postgres server, with the services' roles and schemas.

use std::{fs, path::Path, time::Duration};

use contract::topology;
use rustix::process::Signal;
use sqlx::{Connection as _, PgConnection};

use crate::dev::{
    DevError,
    stack::{DATABASE, START_MAX, Stack},
    supervisor::{Probe, Process, Spec},
};

impl Stack {
    pub(super) async fn start_postgres(&mut self) -> Result<(), DevError> {
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
            // Nothing here replicates.
            "max_logical_replication_workers=0",
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

    /// How many partitions the sessions of earlier starts have, whatever the setting says by now.
    pub(super) async fn partitions(&self) -> Result<u8, DevError> {
        let mut admin = self.connect_admin(DATABASE).await?;
        let is_new: bool = sqlx::query_scalar("select to_regclass('scheduler.recorded') is null")
            .fetch_one(&mut admin)
            .await
            .map_err(DevError::broken)?;
        if is_new {
            return Ok(0);
        }
        let streams: Vec<String> = sqlx::query_scalar("select stream from scheduler.recorded")
            .fetch_all(&mut admin)
            .await
            .map_err(DevError::broken)?;
        let counts = streams
            .iter()
            .filter_map(|stream| topology::partition_of(stream))
            .map(|partition| partition.number() + 1);
        Ok(counts.max().unwrap_or_default())
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

    pub(super) fn database_url(&self, user: &str, password: &str, database: &str) -> String {
        format!("postgres://{user}:{password}@{}/{database}", self.postgres)
    }
}
