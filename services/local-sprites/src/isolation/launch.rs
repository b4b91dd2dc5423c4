//! The way into a sandbox. This program, started again as `local-sprites launch`, joins the
//! sandbox's limits and namespaces, gives up what a Sprite's processes are not to have, and only
//! then runs the command: nothing of the Sprite runs with more.

use std::{
    ffi::{OsStr, OsString},
    fs,
    io::{self, Read as _},
    os::{
        fd::AsFd as _,
        unix::{ffi::OsStrExt as _, process::CommandExt as _, process::ExitStatusExt as _},
    },
    path::PathBuf,
    process::{Command, ExitCode, ExitStatus, Stdio},
};

use rustix::{
    fs::Mode,
    process::{Gid, Pid, PidfdFlags, Uid, pidfd_open, umask},
    thread::{
        CapabilitySet, CapabilitySets, ThreadNameSpaceType, configure_capability_in_ambient_set,
        move_into_thread_name_spaces, remove_capability_from_bounding_set, set_capabilities,
        set_keep_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid,
        set_thread_res_uid,
    },
};
use serde::{Deserialize, Serialize};

use crate::isolation::{
    holder::Holder,
    runsc::{self, Guest},
    seccomp,
};

/// The first argument of this program as a launcher.
pub const COMMAND: &str = "launch";
/// The command was not started: the sandbox could not be entered.
const EXIT_NOT_ENTERED: u8 = 125;
/// As a shell says it.
const EXIT_NOT_EXECUTABLE: u8 = 126;
const EXIT_NOT_FOUND: u8 = 127;

/// The first argument of this program as what sets a sandbox's own limits.
pub const LIMIT_COMMAND: &str = "limit-namespace";
/// What a user namespace's own limits are: no namespaces within, and of what the whole machine
/// shares a part.
const NAMESPACE_LIMITS: [(&str, &str); 9] = [
    ("max_cgroup_namespaces", "0"),
    ("max_inotify_instances", "64"),
    ("max_inotify_watches", "65536"),
    ("max_ipc_namespaces", "0"),
    ("max_mnt_namespaces", "0"),
    ("max_net_namespaces", "0"),
    ("max_pid_namespaces", "0"),
    ("max_user_namespaces", "0"),
    ("max_uts_namespaces", "0"),
];
const LIMIT_MAX: std::time::Duration = std::time::Duration::from_secs(10);

/// Sets the limits of a sandbox's user namespace.
///
/// # Errors
/// When not all of them are in force.
pub async fn limit_namespace(pid: i32) -> io::Result<()> {
    let mut command = tokio::process::Command::new("/proc/self/exe");
    command
        .args([LIMIT_COMMAND, &pid.to_string()])
        .env_clear()
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(LIMIT_MAX, command.output())
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    if output.status.success() {
        Ok(())
    } else {
        Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }
}

/// Joins the user namespace of a process, and no other, and sets its limits there: each such
/// namespace has its own.
pub fn limit_main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let mut set = || {
        let pid = arguments
            .next()
            .and_then(|text| Pid::from_raw(text.to_str()?.parse().ok()?))
            .ok_or(rustix::io::Errno::INVAL)?;
        let sandbox = pidfd_open(pid, PidfdFlags::empty())?;
        move_into_thread_name_spaces(sandbox.as_fd(), ThreadNameSpaceType::USER)?;
        NAMESPACE_LIMITS.iter().try_for_each(|(name, value)| {
            let file = format!("/proc/sys/user/{name}");
            fs::write(&file, value)
                .map_err(|error| io::Error::new(error.kind(), format!("{file}: {error}")))
        })
    };
    match set() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("local-sprites: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A command's variables travel through the launcher under names with this prefix. The launcher
/// runs on the machine as root until it has entered: under their own names some variables, such as
/// `LD_PRELOAD`, would have its dynamic linker load and write files of the Sprite's choice.
const VARIABLE_PREFIX: &str = "sprite:";

/// The variables of the command that this launcher is to start.
pub(super) fn variables() -> impl Iterator<Item = (OsString, OsString)> {
    std::env::vars_os().filter_map(|(name, value)| {
        let name = name.as_bytes().strip_prefix(VARIABLE_PREFIX.as_bytes())?;
        Some((OsStr::from_bytes(name).to_owned(), value))
    })
}

/// What a command of a Sprite starts as.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Launch {
    pub holder: Holder,
    /// The container, as the runtime finds it; for a sandbox with a kernel of its own.
    pub guest: Option<Guest>,
    /// The `cgroup.procs` files of the Sprite's limits.
    pub limits: Vec<PathBuf>,
    pub privileges: Privileges,
    pub dir: PathBuf,
    /// Whether standard input is a terminal that the command is to control.
    pub terminal: bool,
    /// Whether it waits for a byte on standard input, which the command then does not have. It is
    /// sent once the process is noted on disk; where this server died before, the command never
    /// begins.
    pub held: bool,
}

/// What a Sprite's processes may do beside what their user may
/// (docs/sprites-api.md §8.2 and §11.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Privileges {
    /// Nothing.
    Minimal,
    /// What containers usually may: files of other users, other users' names, low ports.
    #[default]
    #[serde(alias = "")]
    Standard,
    /// Its own network too. Not what would let it undo its sandbox: mounts, and looking into the
    /// processes that hold it.
    Privileged,
}

impl Privileges {
    fn capabilities(self) -> CapabilitySet {
        let standard = CapabilitySet::CHOWN
            | CapabilitySet::DAC_OVERRIDE
            | CapabilitySet::FOWNER
            | CapabilitySet::FSETID
            | CapabilitySet::KILL
            | CapabilitySet::SETGID
            | CapabilitySet::SETUID
            | CapabilitySet::SETPCAP
            | CapabilitySet::NET_BIND_SERVICE
            | CapabilitySet::NET_RAW
            | CapabilitySet::SYS_CHROOT
            | CapabilitySet::MKNOD
            | CapabilitySet::AUDIT_WRITE
            | CapabilitySet::SETFCAP;
        match self {
            Self::Minimal => CapabilitySet::empty(),
            Self::Standard => standard,
            Self::Privileged => {
                standard
                    | CapabilitySet::NET_ADMIN
                    | CapabilitySet::IPC_LOCK
                    | CapabilitySet::SYS_NICE
            }
        }
    }
}

impl Launch {
    /// A command of this server that runs `argv` inside, with these variables; of those of one
    /// name the last holds.
    ///
    /// # Errors
    /// When the launch cannot be written down, which does not happen.
    pub fn command(
        &self,
        argv: &[String],
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> io::Result<tokio::process::Command> {
        let mut command = tokio::process::Command::new("/proc/self/exe");
        command.args([COMMAND, &serde_json::to_string(self)?]).args(argv).env_clear();
        let variables =
            variables.into_iter().map(|(name, value)| (format!("{VARIABLE_PREFIX}{name}"), value));
        command.envs(variables);
        // What the launcher starts on the machine, it finds as this server does.
        command.envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        // A group of its own: a signal to the server's group does not reach it.
        command.process_group(0);
        Ok(command)
    }

    fn enter(&self) -> io::Result<()> {
        let gone = || io::Error::other("the sandbox is gone");
        let sandbox = pidfd_open(
            Pid::from_raw(self.holder.process.pid).ok_or_else(gone)?,
            PidfdFlags::empty(),
        )
        .map_err(|_| gone())?;
        // The number may be another process's by now; the descriptor stays what it is.
        if !self.holder.is_alive() {
            return Err(gone());
        }
        let mut namespaces = ThreadNameSpaceType::USER
            | ThreadNameSpaceType::MOUNT
            | ThreadNameSpaceType::PROCESS_ID
            | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
            | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME;
        namespaces.set(ThreadNameSpaceType::NETWORK, self.holder.has_own_network());
        move_into_thread_name_spaces(sandbox.as_fd(), namespaces)?;
        self.give_up_privileges()?;
        umask(Mode::from_raw_mode(0o022));
        std::env::set_current_dir(&self.dir).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("cannot change to {}: {error}", self.dir.display()),
            )
        })
    }

    fn limit(&self) -> io::Result<()> {
        self.limits.iter().try_for_each(|limit| fs::write(limit, "0"))
    }

    /// Runs a command by the runtime, in a sandbox that cannot be entered.
    fn run_by_runtime(&self, program: OsString, arguments: Vec<OsString>) -> io::Result<u8> {
        let guest = self.guest.as_ref().filter(|_| self.holder.is_alive());
        let guest = guest.ok_or_else(|| io::Error::other("the sandbox is gone"))?;
        let (dir, terminal) = (self.dir.as_path(), self.terminal);
        runsc::run(&runsc::Start { guest, holder: self.holder, dir, terminal, program, arguments })
    }

    /// The order matters: each step takes away what a later one would have needed.
    fn give_up_privileges(&self) -> io::Result<()> {
        let kept = if self.holder.has_users() {
            self.privileges.capabilities()
        } else {
            CapabilitySet::empty()
        };
        let known = CapabilitySet::from_bits_truncate((1 << 41) - 1);
        for capability in (known - kept).iter() {
            // One that this kernel does not know cannot be had either.
            let _ = remove_capability_from_bounding_set(capability);
        }
        if self.holder.has_users() {
            let (user, group) = (Uid::from_raw(Holder::UID), Gid::from_raw(Holder::UID));
            set_thread_groups(&[])?;
            set_keep_capabilities(true)?;
            set_thread_res_gid(group, group, group)?;
            set_thread_res_uid(user, user, user)?;
        }
        set_capabilities(
            None,
            CapabilitySets { effective: kept, permitted: kept, inheritable: kept },
        )?;
        for capability in kept.iter() {
            configure_capability_in_ambient_set(capability, true)?;
        }
        set_no_new_privs(true)?;
        seccomp::apply()
    }
}

/// Runs the launcher: its arguments are a [`Launch`] and the command. Ends as the command does.
pub fn main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let launch =
        arguments.next().and_then(|text| serde_json::from_str::<Launch>(text.to_str()?).ok());
    let (Some(launch), Some(program)) = (launch, arguments.next()) else {
        eprintln!("local-sprites: {COMMAND} is for the server itself");
        return ExitCode::from(2);
    };
    if launch.held && io::stdin().read_exact(&mut [0]).is_err() {
        return ExitCode::from(EXIT_NOT_ENTERED);
    }
    let not_entered = |error: io::Error| {
        eprintln!("local-sprites: {error}");
        ExitCode::from(EXIT_NOT_ENTERED)
    };
    if launch.holder.has_own_kernel() {
        let ran = launch.limit().and_then(|()| launch.run_by_runtime(program, arguments.collect()));
        return ran.map_or_else(not_entered, ExitCode::from);
    }
    if let Err(error) = launch.limit().and_then(|()| launch.enter()) {
        return not_entered(error);
    }
    let mut command = if launch.terminal {
        // The command leads a session of its own, and the terminal is that session's.
        let mut command = Command::new("/usr/bin/setsid");
        command.args(["--ctty", "--"]).arg(&program);
        command
    } else {
        let mut command = Command::new(&program);
        command.process_group(0);
        command
    };
    command.env_clear().envs(variables());
    if launch.held {
        command.stdin(Stdio::null());
    }
    let status = command.args(arguments).spawn().and_then(|mut child| child.wait());
    match status {
        Ok(status) => ExitCode::from(exit_code(status)),
        Err(error) => {
            eprintln!("local-sprites: {}: {error}", program.display());
            let found = error.kind() != io::ErrorKind::NotFound;
            ExitCode::from(if found { EXIT_NOT_EXECUTABLE } else { EXIT_NOT_FOUND })
        }
    }
}

/// The one-byte status: signals are 128 + n.
pub fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    u8::try_from(code).unwrap_or(u8::MAX)
}
