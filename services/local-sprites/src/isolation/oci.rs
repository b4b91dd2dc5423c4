//! Describes a sandbox for an OCI runtime: the `config.json` of a bundle.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::isolation::seccomp;

/// Entries of `/proc` that tell about the machine, or change it: they look empty.
const MASKED: [&str; 16] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kallsyms",
    "/proc/kcore",
    "/proc/keys",
    "/proc/kpagecgroup",
    "/proc/kpagecount",
    "/proc/kpageflags",
    "/proc/latency_stats",
    "/proc/pagetypeinfo",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/slabinfo",
    "/proc/timer_list",
    "/proc/vmallocinfo",
];
const READ_ONLY: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// What differs between sandboxes.
#[derive(Debug)]
pub struct Sandbox<'a> {
    pub root: &'a Path,
    pub hostname: &'a str,
    /// The first of the machine's user ids that the sandbox's are, and how many there are.
    pub users: (u32, u32),
    /// The network namespace that it joins; none where the runtime is started in it.
    pub network: Option<&'a Path>,
    /// Where its control groups are; where the runtime chooses, if none.
    pub cgroups: Option<&'a str>,
    /// How much a file system in memory holds.
    pub memory_files_bytes: u64,
    /// What of the machine it sees: where there, where here, and whether it may write.
    pub binds: Vec<(&'a str, PathBuf, Access)>,
    pub command: &'a [&'a str],
    pub path: &'a str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    ReadOnly,
    ReadWrite,
}

impl Sandbox<'_> {
    /// The bundle's `config.json`.
    pub fn config(&self) -> Value {
        let (first, count) = self.users;
        let map = json!([{ "containerID": 0, "hostID": first, "size": count }]);
        let none: [&str; 0] = [];
        let size = format!("size={}", self.memory_files_bytes);
        let tmpfs = |at: &str, mode: &str| json!({ "destination": at, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", mode, size] });
        let mut mounts = vec![
            json!({ "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] }),
            json!({ "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "noexec", "mode=755", "size=65536"] }),
            json!({
                "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
            }),
            tmpfs("/dev/shm", "mode=1777"),
            tmpfs("/run", "mode=755"),
            json!({ "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"] }),
        ];
        let mut namespaces: Vec<Value> =
            ["user", "mount", "pid", "ipc", "uts"].map(|kind| json!({ "type": kind })).into();
        namespaces.extend(self.network.map(|path| json!({ "type": "network", "path": path })));
        mounts.extend(self.binds.iter().map(|(there, here, access)| {
            let access = if *access == Access::ReadOnly { "ro" } else { "rw" };
            json!({ "destination": there, "type": "bind", "source": here, "options": ["bind", "nosuid", "nodev", access] })
        }));
        let mut linux = json!({
            "namespaces": namespaces,
            "uidMappings": map,
            "gidMappings": map,
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
            "seccomp": seccomp::holder_profile(),
        });
        if let Some(cgroups) = self.cgroups {
            linux["cgroupsPath"] = json!(cgroups);
        }
        json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": { "uid": 0, "gid": 0 },
                "args": self.command,
                "env": [format!("PATH={}", self.path)],
                "cwd": "/",
                "capabilities": { "bounding": none, "effective": none, "permitted": none, "inheritable": none, "ambient": none },
                "noNewPrivileges": true,
            },
            "root": { "path": self.root, "readonly": false },
            "hostname": self.hostname,
            "mounts": mounts,
            "linux": linux,
        })
    }
}
