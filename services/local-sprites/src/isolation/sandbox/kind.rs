//! Settings of sandboxes.

use std::{
    fmt, fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    str::FromStr,
};

use crate::{isolation::runtime::Program, network::private_hosts::Forward};

/// How Sprites are kept apart from this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isolation {
    Auto,
    Overlay,
    ReadOnly,
}

impl FromStr for Isolation {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Auto, Self::Overlay, Self::ReadOnly]
            .into_iter()
            .find(|isolation| isolation.to_string() == text)
            .ok_or(())
    }
}

impl fmt::Display for Isolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Overlay => "overlay",
            Self::ReadOnly => "readonly",
        })
    }
}

/// Settings of sandboxes.
#[derive(Clone, Debug)]
pub struct Kind {
    pub isolation: Isolation,
    pub runtime: Program,
    /// The image of a Linux system that all Sprites have.
    pub rootfs: PathBuf,
    pub agents_dir: Option<PathBuf>,
    /// The static program that runs agents inside.
    pub agent_host: Option<PathBuf>,
    pub disk_bytes: Option<u64>,
    pub memory_bytes: u64,
    /// Ports of this machine's loopback that Sprites find at their own.
    pub loopback_ports: Vec<u16>,
    /// Other private services that Sprites reach.
    pub forwards: Vec<Forward>,
    /// Tells servers of one machine apart.
    pub instance: String,
    /// Whether this machine has control groups to write to.
    pub cgroups: bool,
}

/// The file at a path that a sandbox's users, whom this machine does not know, may run.
pub fn program_for_all(path: &Path) -> io::Result<PathBuf> {
    const READ_AND_RUN: u32 = 0o005;
    let path = path.canonicalize()?;
    let metadata = fs::metadata(&path)?;
    let usable = metadata.is_file() && metadata.mode() & READ_AND_RUN == READ_AND_RUN;
    if usable { Ok(path) } else { Err(io::ErrorKind::PermissionDenied.into()) }
}
