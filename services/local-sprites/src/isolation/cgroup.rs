//! Limits of memory, CPU and processes, by control groups of version 1 or 2; and the freezer, by
//! which a Sprite is paused.
//!
//! Each Sprite has a group below this server's own. Limits that a machine does not support are
//! logged at the start and not applied.

use std::{
    fmt,
    fs::{self, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

/// Where Linux shows control groups.
const MOUNT: &str = "/sys/fs/cgroup";
/// The scheduler's period, in microseconds; a limit of CPUs is a part of it.
const CPU_PERIOD_US: u64 = 100_000;

/// Where a Sprite's processes are, below the group that has its limits: a Sprite may become root
/// over what it sees of its own group.
const INSIDE: &str = "inside";

/// What one Sprite may use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub memory_bytes: u64,
    /// In thousandths of a CPU; all of them where none.
    pub cpu_milli: Option<u64>,
    pub processes: u64,
}

/// What all Sprites together may use; nothing is limited where none.
#[derive(Clone, Copy, Debug, Default)]
pub struct SharedLimits {
    pub memory_bytes: Option<u64>,
    pub cpu_milli: Option<u64>,
    pub processes: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Controller {
    Memory,
    Processes,
    Cpu,
    Freezer,
}

impl Controller {
    const ALL: [Self; 4] = [Self::Memory, Self::Processes, Self::Cpu, Self::Freezer];

    /// Its name in both versions.
    fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Processes => "pids",
            Self::Cpu => "cpu",
            Self::Freezer => "freezer",
        }
    }
}

impl fmt::Display for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memory => "memory",
            Self::Processes => "processes",
            Self::Cpu => "CPU",
            Self::Freezer => "pausing",
        })
    }
}

/// The groups of this server's Sprites: a directory for each controller that works here. With
/// version 2 it is the same for all.
#[derive(Debug)]
pub struct Cgroups {
    unified: bool,
    parents: Vec<(Controller, PathBuf)>,
    limits: Limits,
}

impl Cgroups {
    /// Finds what this machine supports. `instance` distinguishes servers on one machine.
    pub fn find(instance: &str, limits: Limits) -> Self {
        let membership = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let unified = Path::new(MOUNT).join("cgroup.controllers").exists();
        let parents = match unified {
            true => Self::delegate(&membership, instance),
            false => Controller::ALL
                .into_iter()
                .filter_map(|one| Some((one, Self::hierarchy(&membership, one, instance)?)))
                .collect(),
        };
        Self { unified, parents, limits }
    }

    /// What cannot be limited here.
    pub fn missing(&self) -> Vec<String> {
        let there = |one: &Controller| self.parents.iter().any(|(controller, _)| controller == one);
        Controller::ALL.iter().filter(|one| !there(one)).map(Controller::to_string).collect()
    }

    /// Limits all Sprites together.
    ///
    /// # Errors
    /// When a limit cannot be set, such as less memory than they use already.
    pub fn limit_all(&self, limits: SharedLimits) -> io::Result<()> {
        let all = Cgroup { unified: self.unified, groups: self.parents.clone() };
        if let Some(bytes) = limits.memory_bytes {
            all.limit_memory(bytes)?;
        }
        if let Some(processes) = limits.processes {
            all.set(Controller::Processes, "pids.max", "pids.max", &processes.to_string())?;
        }
        limits.cpu_milli.map_or(Ok(()), |milli| all.limit_cpus(milli))
    }

    /// The memory that the server's own group allows it and its Sprites; none where that is not
    /// limited.
    pub fn own_memory_limit(&self) -> Option<u64> {
        let file = if self.unified { "memory.max" } else { "memory.limit_in_bytes" };
        fs::read_to_string(self.parent(Controller::Memory)?.parent()?.join(file))
            .ok()?
            .trim()
            .parse()
            .ok()
    }

    /// The memory that all Sprites together use, without what the kernel can take back at once.
    pub fn memory_used(&self) -> Option<u64> {
        let parent = self.parent(Controller::Memory)?;
        let (used, reclaimable) = if self.unified {
            ("memory.current", "inactive_file ")
        } else {
            ("memory.usage_in_bytes", "total_inactive_file ")
        };
        let used: u64 = fs::read_to_string(parent.join(used)).ok()?.trim().parse().ok()?;
        let stat = fs::read_to_string(parent.join("memory.stat")).ok()?;
        let reclaimable =
            stat.lines().find_map(|line| line.strip_prefix(reclaimable)?.parse::<u64>().ok());
        Some(used.saturating_sub(reclaimable.unwrap_or_default()))
    }

    fn parent(&self, controller: Controller) -> Option<&Path> {
        self.parents.iter().find(|(one, _)| *one == controller).map(|(_, path)| path.as_path())
    }

    /// Whether anything can be limited here.
    pub fn any(&self) -> bool {
        !self.parents.is_empty()
    }

    pub fn can_freeze(&self) -> bool {
        self.parents.iter().any(|(controller, _)| *controller == Controller::Freezer)
    }

    /// Version 1: a controller's own hierarchy. A container sees its own part of it as the whole.
    fn hierarchy(membership: &str, controller: Controller, instance: &str) -> Option<PathBuf> {
        let own = own_group(membership, controller)?;
        let mount = Path::new(MOUNT).join(controller.name());
        let parent =
            [mount.join(own), mount].into_iter().find(|path| path.is_dir())?.join(instance);
        make(&parent).ok()?;
        Some(parent)
    }

    /// Version 2: controllers are given to groups below only by a group that holds no process
    /// itself, so this server moves into one of its own beside its Sprites'.
    fn delegate(membership: &str, instance: &str) -> Vec<(Controller, PathBuf)> {
        let own = Path::new(MOUNT).join(own_unified_group(membership));
        let parent = own.join(instance);
        let give = |group: &Path, controller: Controller| {
            put(&group.join("cgroup.subtree_control"), &format!("+{}", controller.name()))
        };
        if !own.join("cgroup.type").exists()
            || make(&own.join("server"))
                .is_ok_and(|()| put(&own.join("server/cgroup.procs"), "0").is_ok())
        {
            let _ = make(&parent);
        }
        let given = Controller::ALL.into_iter().filter(|one| match one {
            // Part of every group.
            Controller::Freezer => parent.join("cgroup.freeze").exists(),
            other => give(&own, *other).and_then(|()| give(&parent, *other)).is_ok(),
        });
        given.map(|one| (one, parent.clone())).collect()
    }

    /// A Sprite's group, with this server's limits; one that is there is taken up as it is.
    ///
    /// # Errors
    /// When a limit cannot be set.
    pub fn group(&self, id: &str) -> io::Result<Cgroup> {
        let groups: Vec<_> = self
            .parents
            .iter()
            .map(|(controller, parent)| (*controller, parent.join(id)))
            .collect();
        let group = Cgroup { unified: self.unified, groups };
        for (_, path) in &group.groups {
            make(path)?;
            make(&path.join(INSIDE))?;
        }
        group.limit_memory(self.limits.memory_bytes)?;
        group.set(
            Controller::Processes,
            "pids.max",
            "pids.max",
            &self.limits.processes.to_string(),
        )?;
        if let Some(milli) = self.limits.cpu_milli {
            group.limit_cpus(milli)?;
        }
        Ok(group)
    }

    pub fn default_memory_bytes(&self) -> u64 {
        self.limits.memory_bytes
    }

    /// Takes the server's own directories away, where no Sprite runs any more.
    pub fn remove(&self) {
        for (_, parent) in &self.parents {
            let _ = fs::remove_dir(parent);
        }
    }
}

/// The limits of one Sprite.
#[derive(Clone, Debug)]
pub struct Cgroup {
    unified: bool,
    groups: Vec<(Controller, PathBuf)>,
}

impl Cgroup {
    /// The files that a process writes `0` to in order to be limited.
    pub fn entrances(&self) -> Vec<PathBuf> {
        let mut files: Vec<_> =
            self.groups.iter().map(|(_, path)| path.join(INSIDE).join("cgroup.procs")).collect();
        files.dedup();
        files
    }

    /// Adds processes until there are no others: those that are added start theirs in the group.
    ///
    /// # Errors
    /// When the first of them cannot be added; others may have ended by now.
    pub fn add_all(&self, processes: impl Fn() -> Vec<i32>) -> io::Result<()> {
        let mut added = Vec::new();
        loop {
            let new: Vec<i32> =
                processes().into_iter().filter(|pid| !added.contains(pid)).collect();
            if new.is_empty() {
                return Ok(());
            }
            for pid in new {
                let entered =
                    self.entrances().iter().try_for_each(|file| put(file, &pid.to_string()));
                if added.is_empty() {
                    entered?;
                }
                added.push(pid);
            }
        }
    }

    /// # Errors
    /// When what the Sprite uses already is more.
    pub fn limit_memory(&self, bytes: u64) -> io::Result<()> {
        let bytes = bytes.to_string();
        // No way around it by swap, where the kernel counts that. In version 1 the sum is never
        // less than the part, so it is raised first, or else lowered last.
        let swap = || {
            self.set(
                Controller::Memory,
                "memory.swap.max",
                "memory.memsw.limit_in_bytes",
                if self.unified { "0" } else { &bytes },
            )
        };
        let _ = swap();
        self.set(Controller::Memory, "memory.max", "memory.limit_in_bytes", &bytes)?;
        let _ = swap();
        Ok(())
    }

    fn limit_cpus(&self, milli: u64) -> io::Result<()> {
        let (quota, period) =
            ((milli * CPU_PERIOD_US / 1000).to_string(), CPU_PERIOD_US.to_string());
        if self.unified {
            return self.set(Controller::Cpu, "cpu.max", "", &format!("{quota} {period}"));
        }
        self.set(Controller::Cpu, "", "cpu.cfs_period_us", &period)?;
        self.set(Controller::Cpu, "", "cpu.cfs_quota_us", &quota)
    }

    /// Freezes all processes, or thaws them.
    pub fn freeze(&self, frozen: bool) -> io::Result<()> {
        let value = match (self.unified, frozen) {
            (true, true) => "1",
            (true, false) => "0",
            (false, true) => "FROZEN",
            (false, false) => "THAWED",
        };
        self.set(Controller::Freezer, "cgroup.freeze", "freezer.state", value)
    }

    fn set(&self, controller: Controller, v2: &str, v1: &str, value: &str) -> io::Result<()> {
        match self.groups.iter().find(|(one, _)| *one == controller) {
            Some((_, path)) => put(&path.join(if self.unified { v2 } else { v1 }), value),
            None => Ok(()),
        }
    }

    /// Takes the group away once its processes are gone; the kernel is a moment behind them.
    pub async fn remove(&self) {
        for path in self.groups.iter().flat_map(|(_, path)| [path.join(INSIDE), path.clone()]) {
            for _ in 0..100 {
                match fs::remove_dir(&path) {
                    Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                        tokio::time::sleep(Duration::from_millis(5)).await
                    }
                    _ => break,
                }
            }
        }
    }
}

fn make(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Control files are written whole, and are never made.
fn put(file: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(file)?.write_all(value.as_bytes())
}

/// The process's group in the hierarchy of a controller, of version 1.
fn own_group(membership: &str, controller: Controller) -> Option<&str> {
    membership.lines().find_map(|line| {
        let [_, controllers, path] = line.splitn(3, ':').collect::<Vec<_>>().try_into().ok()?;
        let is_its = controllers.split(',').any(|name| name == controller.name());
        is_its.then(|| path.trim_start_matches('/'))
    })
}

/// The group of version 2 that this server was started in: it may have moved into `server` below it.
fn own_unified_group(membership: &str) -> &str {
    let own = membership.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let outer = own.strip_suffix("server").filter(|outer| outer.is_empty() || outer.ends_with('/'));
    outer.unwrap_or(own).trim_end_matches('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_controllers_own_group_is_found_in_version_1() {
        let membership = "12:cpu,cpuacct:/system.slice/local-sprites.service\n4:memory:/docker/a:b\n\
                          3:cpuset:/\n1:name=systemd:/x\n0::/y\n";
        let own = |controller| own_group(membership, controller);
        assert_eq!(own(Controller::Cpu), Some("system.slice/local-sprites.service"));
        assert_eq!(own(Controller::Memory), Some("docker/a:b"));
        // "pids" and "freezer" are not mounted, and "cpuset" is not "cpu".
        assert_eq!((own(Controller::Processes), own(Controller::Freezer)), (None, None));
    }

    #[test]
    fn a_restarted_server_finds_the_group_that_it_was_first_started_in() {
        for (membership, group) in [
            ("0::/\n", ""),
            ("0::/server\n", ""),
            ("0::/system.slice/a.service\n", "system.slice/a.service"),
            ("0::/system.slice/a.service/server\n", "system.slice/a.service"),
            ("0::/system.slice/my-server\n", "system.slice/my-server"),
            ("1:name=systemd:/x\n", ""),
        ] {
            assert_eq!(own_unified_group(membership), group, "{membership}");
        }
    }
}
