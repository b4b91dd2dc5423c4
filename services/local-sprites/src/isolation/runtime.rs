//! The OCI runtime: creates the sandbox that a bundle describes, and removes what is left of one.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    str::FromStr,
    time::Duration,
};

use serde_json::Value;
use tokio::process::Command;

use crate::isolation::runsc::{self, Guest};

const START_MAX: Duration = Duration::from_secs(30);
const PID_FILE: &str = "pid";

/// Which runtime it is: they are called alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Program {
    #[default]
    Runc,
    Crun,
    /// gVisor: a kernel of its own for each sandbox.
    Runsc,
}

impl Program {
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Crun => "crun",
            Self::Runsc => runsc::PROGRAM,
        }
    }
}

impl std::fmt::Display for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Program {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Runc, Self::Crun, Self::Runsc]
            .into_iter()
            .find(|program| program.name() == text)
            .ok_or(())
    }
}

#[derive(Debug)]
pub struct Runtime {
    program: Program,
    /// What the runtime knows of its containers.
    state: PathBuf,
    /// Whether it makes control groups of its own.
    cgroups: bool,
}

impl Runtime {
    pub fn new(program: Program, state: PathBuf, cgroups: bool) -> Self {
        Self { program, state, cgroups }
    }

    /// Starts a container and returns the number of its first process. It outlives this server.
    ///
    /// # Errors
    /// With the runtime's own words.
    pub async fn start(
        &self,
        id: &str,
        bundle: &Path,
        config: &Value,
        network: &Path,
    ) -> io::Result<i32> {
        fs::create_dir_all(bundle)?;
        fs::write(bundle.join("config.json"), serde_json::to_vec(config)?)?;
        let (pid_file, log) = (bundle.join(PID_FILE), bundle.join("log"));
        let _ = fs::remove_file(&log);
        let mut command = match self.program {
            Program::Runc | Program::Crun => self.command(id),
            Program::Runsc => self.runsc_in(network, id),
        };
        command
            .arg("--log")
            .arg(&log)
            .args(["run", "--detach", "--pid-file"])
            .arg(&pid_file)
            .arg("--bundle")
            .arg(bundle)
            .arg(id);
        // A group of its own: a signal to the server's group does not reach the container.
        command.process_group(0).stdout(Stdio::null()).stderr(Stdio::null());
        // One that takes too long would start a container later, of which no one knows.
        let status = command.kill_on_drop(true).status();
        let Ok(status) = tokio::time::timeout(START_MAX, status).await else {
            let _ = self.delete(id).await;
            return Err(io::Error::other("the OCI runtime does not end"));
        };
        let status = status
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", self.program)))?;
        let pid = fs::read_to_string(&pid_file).ok().and_then(|text| text.trim().parse().ok());
        match pid {
            Some(pid) if status.success() => Ok(pid),
            _ => {
                let said = fs::read_to_string(&log).unwrap_or_default();
                let _ = self.delete(id).await;
                Err(io::Error::other(format!(
                    "{}: {}",
                    self.program,
                    said.lines().last().unwrap_or("failed and said nothing")
                )))
            }
        }
    }

    /// Removes what the runtime keeps of a container whose processes have ended, and kills those
    /// that have not.
    pub async fn delete(&self, id: &str) -> io::Result<()> {
        // By force takes 100 ms longer.
        for arguments in [&["delete"][..], &["delete", "--force"]] {
            if !self.state.join(id).exists() {
                break;
            }
            let done = self
                .command(id)
                .args(arguments)
                .arg(id)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
            tokio::time::timeout(START_MAX, done)
                .await
                .map_err(|_| io::Error::other("the OCI runtime does not end"))??;
            let guest = self.guest(id);
            if self.program == Program::Runsc && guest.gofer().is_none() {
                // The container is gone; its directory stays.
                fs::remove_dir_all(guest.state)?;
            }
        }
        Ok(())
    }

    pub fn program(&self) -> Program {
        self.program
    }

    /// A container of gVisor's, as `runsc` finds it.
    pub fn guest(&self, id: &str) -> Guest {
        Guest { state: self.state.join(id), id: id.to_owned() }
    }

    /// The containers that the runtime knows.
    pub fn list(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.state).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// `runsc` joins no network namespace that belongs to another user namespace than the
    /// container's, so it is started in it.
    fn runsc_in(&self, network: &Path, id: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", network.display())).arg(runsc::PROGRAM);
        command.arg("--root").arg(self.state.join(id)).args(runsc::FLAGS).stdin(Stdio::null());
        command
    }

    fn command(&self, id: &str) -> Command {
        let mut command = Command::new(self.program.name());
        match self.program {
            Program::Runc | Program::Crun => command.arg("--root").arg(&self.state),
            // A directory for each, so that the names there are the containers'.
            Program::Runsc => command.arg("--root").arg(self.state.join(id)),
        };
        if !self.cgroups && self.program == Program::Runc {
            // It is root all the same; what it does without then is control groups.
            command.arg("--rootless=true");
        }
        command.stdin(Stdio::null());
        command
    }
}
