//! A running sandbox, as the rest of this server knows it.

use std::{
    fs::{self, File},
    io,
    path::PathBuf,
    time::Duration,
};

use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};

use crate::isolation::process::Process;

/// The process that keeps a sandbox alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub process: Process,
    pub(super) network: Network,
    /// The process that carries its traffic to public addresses.
    pub(super) uplink: Option<Process>,
    /// The first of this machine's user ids that its users are; none where it has one user, who is
    /// this server's.
    pub(super) first_user: Option<u32>,
    /// Serves the sandbox's files, where the sandbox has a kernel of its own (gVisor) and commands
    /// cannot join its namespaces.
    #[serde(default)]
    pub(super) gofer: Option<Process>,
}

/// What a sandbox's network is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// This machine's own: all that there is without root.
    Machine,
    /// One of its own, with a way to public addresses.
    Public,
    /// One of its own, with nothing but a proxy.
    Limited,
}

impl Holder {
    /// The user that commands run as, within.
    pub const UID: u32 = 1001;
    /// Users that a sandbox has, numbered from 0, where it has users of its own.
    pub const UIDS: u32 = 65_536;

    /// Whether the sandbox still runs.
    pub fn is_alive(self) -> bool {
        self.process.is_alive()
    }

    /// The Sprite's root, as this server can open it.
    pub fn root(self) -> io::Result<File> {
        File::open(self.root_path())
    }

    pub fn root_path(self) -> PathBuf {
        let files = self.gofer.unwrap_or(self.process);
        PathBuf::from(format!("/proc/{}/root", files.pid))
    }

    /// Whether this is the sandbox that a policy asks for.
    pub fn network(self) -> Network {
        self.network
    }

    pub fn has_own_network(self) -> bool {
        self.network != Network::Machine
    }

    pub fn has_users(self) -> bool {
        self.first_user.is_some()
    }

    /// A user of the sandbox, numbered as within, as this machine names it; none where the sandbox
    /// has one user.
    pub fn user(self, within: u32) -> Option<u32> {
        Some(self.first_user? + within)
    }

    /// Whether the sandbox has a kernel of its own, which the machine's system calls do not reach.
    pub fn has_own_kernel(self) -> bool {
        self.gofer.is_some()
    }

    /// Whether a process, as this server numbers them, is one of the sandbox's.
    pub fn contains(self, pid: i32) -> bool {
        if self.has_own_kernel() {
            // Sockets of all its programs are its kernel's.
            return pid == self.process.pid;
        }
        let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        namespace(self.process.pid).is_some_and(|own| namespace(pid) == Some(own))
    }

    /// The machine's processes that the sandbox consists of when it starts.
    pub fn processes(self) -> Vec<i32> {
        let mut processes = vec![self.process.pid];
        if let Some(gofer) = self.gofer {
            processes.push(gofer.pid);
            processes.extend(self.process.descendants());
        }
        processes
    }

    /// Kills every process of the sandbox and waits until they are gone.
    pub async fn kill(self) {
        if let Some(uplink) = self.uplink {
            uplink.kill();
        }
        if !self.is_alive() {
            return;
        }
        if let Some(pid) = Pid::from_raw(self.process.pid) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        for _ in 0..200 {
            if !self.is_alive() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tracing::warn!(pid = self.process.pid, "a sandbox cannot be killed");
    }
}
