//! `aod deploy`: generates a deployment's secrets, creates roles and schemas in Postgres and streams
//! in NATS. Safe to rerun.

pub mod streams;

use std::{
    fs::{self, OpenOptions, Permissions},
    io::{ErrorKind, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::Subcommand;
use contract::access;
use secrecy::ExposeSecret as _;
use sqlx::{Connection as _, PgConnection};

use crate::random;

/// How long a database may take to come up.
const DATABASE_WAIT: Duration = Duration::from_secs(60);

#[derive(Debug, Subcommand)]
pub enum DeployArgs {
    /// Generate the secrets of a deployment, one folder of files for each service; existing files
    /// are kept
    #[command(
        after_help = "Each file is named after the setting that it is for. Mount a service's folder, and set \
                            NATS_PASSWORD_FILE=…/NATS_PASSWORD and so on. `nats/passwords.env` is for the server's environment, `database/` for \
                            `aod deploy database` and for Postgres' own first start."
    )]
    Secrets {
        /// Directory to create the folders in
        dir: PathBuf,
        /// Host, port and name of the database
        #[arg(long, default_value = "postgres:5432/aod")]
        database: String,
        /// User id that the services run as; it owns the files
        #[arg(long)]
        owner: Option<u32>,
    },
    /// Create each service's role and schema in a database, or reset the passwords of existing
    /// roles
    #[command(
        after_help = "Connects to DATABASE_URL (or to the URL in DATABASE_URL_FILE) as the owner of the database."
    )]
    Database {
        /// Folder of passwords, one file for each role
        #[arg(long)]
        passwords: PathBuf,
    },
    /// Create the streams in NATS, or bring existing ones up to date
    #[command(after_help = format!(
        "Connects to NATS as the user `streams`. Run it before the services start, and again after an upgrade.\n\n\
         Example:\n  NATS_PASSWORD_FILE=secrets/streams/NATS_PASSWORD aod deploy streams --watch\n\n{}",
        streams::settings_table()
    ))]
    Streams {
        /// Keep running, and create streams again that the NATS servers have lost
        #[arg(long)]
        watch: bool,
    },
    /// Make a copy of another deployment's database this deployment's own
    #[command(
        after_help = "For staging systems and restore drills: run it on the copy, after `aod deploy database` and before the first \
                            scheduler starts. The other deployment's sandboxes are then left alone; the sessions of the copy can be read and not \
                            prompted. Do not run it on a backup that replaces its deployment: keep AOD_DEPLOYMENT_ID instead.\n\nConnects to \
                            DATABASE_URL (or to the URL in DATABASE_URL_FILE) as the owner of the database."
    )]
    Adopt,
}

impl DeployArgs {
    /// # Errors
    /// As the command prints it.
    pub async fn run(self) -> Result<(), String> {
        match self {
            Self::Secrets { dir, database, owner } => Secrets { dir, owner }.make(&database),
            Self::Database { passwords } => provision(&passwords).await,
            Self::Streams { watch } => streams::run(watch).await,
            Self::Adopt => {
                let mut owner = connect("aod deploy adopt").await?;
                store::provision::adopt(&mut owner)
                    .await
                    .map_err(|error| format!("the database cannot be adopted: {error}"))?;
                note!("the database is this deployment's own");
                Ok(())
            }
        }
    }
}

/// The folder of a service, by the name of its user on the bus or its role in Postgres.
fn folder(user: &str) -> &str {
    match user {
        "vault" => "credential-vault",
        "runner" => "sprite-runner",
        "model_gateway" => "model-gateway",
        user => user,
    }
}

struct Secrets {
    dir: PathBuf,
    owner: Option<u32>,
}

impl Secrets {
    fn make(&self, database: &str) -> Result<(), String> {
        let mut nats = String::from(
            "# Made by `aod deploy secrets`: what nats/permissions.conf takes from the server's environment.\n",
        );
        for user in access::users() {
            let password = self.keep(folder(user), "NATS_PASSWORD")?;
            nats.push_str(&format!("{}={password}\n", access::password_variable(user)));
        }
        self.put("nats", "passwords.env", &nats)?;
        for role in store::provision::SERVICES {
            let password = self.keep("database", role)?;
            self.put(
                folder(role),
                "DATABASE_URL",
                &format!("postgres://{role}:{password}@{database}"),
            )?;
        }
        let password = self.keep("database", "postgres")?;
        self.put(
            "database",
            "DATABASE_URL",
            &format!("postgres://postgres:{password}@{database}"),
        )?;
        self.keep("credential-vault", "FIELD_ENCRYPTION_KEY")?;
        self.keep("scheduler", "AOD_DEPLOYMENT_ID")?;
        let token = self.keep("local-sprites", "LOCAL_SPRITES_TOKEN")?;
        self.put("credential-vault", "SPRITES_API_KEY", &token)
    }

    /// The secret that is there, or a new one.
    fn keep(&self, folder: &str, name: &str) -> Result<String, String> {
        let path = self.dir.join(folder).join(name);
        match fs::read_to_string(&path) {
            Ok(secret) if !secret.is_empty() => Ok(secret),
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(format!("{} cannot be read: {error}", path.display()))
            }
            _ => {
                let fresh = random::secret().map_err(|error| format!("no randomness: {error}"))?;
                self.put(folder, name, &fresh).map(|()| fresh)
            }
        }
    }

    /// Written whole or not at all.
    fn put(&self, folder: &str, name: &str, content: &str) -> Result<(), String> {
        let dir = self.dir.join(folder);
        let draft = dir.join(format!(".{name}.draft"));
        let write = || -> std::io::Result<()> {
            fs::create_dir_all(&dir)?;
            // A volume is there already, open to all.
            fs::set_permissions(&dir, Permissions::from_mode(0o700))?;
            let mut file = OpenOptions::new()
                .create(true)
                .truncate(true)
                .write(true)
                .mode(0o400)
                .open(&draft)?;
            file.write_all(content.as_bytes())?;
            file.sync_all()?;
            for path in [&dir, &draft] {
                chown(path, self.owner, self.owner)?;
            }
            fs::rename(&draft, dir.join(name))
        };
        write().map_err(|error| {
            let _ = fs::remove_file(&draft);
            format!("{} cannot be written: {error}", dir.join(name).display())
        })
    }
}

/// Connects as the database's owner, for a command.
async fn connect(command: &'static str) -> Result<PgConnection, String> {
    let mut env = service::Env::from_process(command, "");
    let url = env.secret("DATABASE_URL", "postgres:// URL of the database's owner");
    if let settings::Verdict::Refused(problems) = env.finish() {
        return Err(problems);
    }
    let begun = Instant::now();
    loop {
        match PgConnection::connect(url.expose_secret()).await {
            Ok(connection) => return Ok(connection),
            Err(error) if begun.elapsed() > DATABASE_WAIT => {
                return Err(format!("Postgres does not take connections: {error}"));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(500)).await,
        }
    }
}

async fn provision(passwords: &Path) -> Result<(), String> {
    let mut owner = connect("aod deploy database").await?;
    for role in store::provision::SERVICES {
        let path = passwords.join(role);
        let password = fs::read_to_string(&path)
            .map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
        let provisioned = store::provision::provision(&mut owner, role, password.trim_end()).await;
        provisioned.map_err(|error| format!("role {role} cannot be made: {error}"))?;
        note!("role and schema {role}: ready");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_made_once_and_only_their_owner_reads_them() {
        let dir = std::env::temp_dir().join(format!("aod-deploy-{}", std::process::id()));
        let secrets = Secrets { dir: dir.clone(), owner: None };
        secrets.make("db:5432/aod").unwrap();
        let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap();
        let (key, url) = (read("credential-vault/FIELD_ENCRYPTION_KEY"), read("auth/DATABASE_URL"));
        secrets.make("elsewhere:5432/aod").unwrap();
        assert_eq!(read("credential-vault/FIELD_ENCRYPTION_KEY"), key);
        assert_eq!(read("auth/DATABASE_URL"), url.replace("db:", "elsewhere:"));
        assert_eq!(
            read("local-sprites/LOCAL_SPRITES_TOKEN"),
            read("credential-vault/SPRITES_API_KEY")
        );
        assert!(
            read("nats/passwords.env").contains(&format!(
                "NATS_PASSWORD_RUNNER={}\n",
                read("sprite-runner/NATS_PASSWORD")
            ))
        );
        assert_eq!(
            fs::metadata(dir.join("auth/DATABASE_URL")).unwrap().permissions().mode() & 0o777,
            0o400
        );
        fs::remove_dir_all(dir).unwrap();
    }
}
