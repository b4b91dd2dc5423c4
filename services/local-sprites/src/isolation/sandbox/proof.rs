//! Notes that a first sandbox worked, so that a server that starts again does not try one again:
//! until it serves, no one reaches what runs in its Sprites.
//!
//! The note is below `/run`, which another container does not have, and names the start of the
//! machine. A sandbox that does not start takes it back.

use std::{
    env, fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use crate::{atomic::write_atomically, isolation::runtime::Program};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The note of sandboxes of one kind.
#[derive(Debug)]
pub struct Proof {
    file: PathBuf,
    /// What it was made for.
    subject: String,
}

impl Proof {
    /// `kind` is another for each kind of sandboxes. The server's and the runtime's programs are
    /// told apart by their files. None where the start of the machine has no name.
    pub fn new(file: PathBuf, kind: &str, runtime: Program) -> Option<Self> {
        let boot = fs::read_to_string(BOOT_ID).ok()?;
        let mut hasher = DefaultHasher::new();
        kind.hash(&mut hasher);
        for program in [env::current_exe().ok(), find(runtime.name())] {
            let metadata = program.and_then(|path| fs::metadata(path).ok());
            metadata
                .map(|file| (file.dev(), file.ino(), file.mtime(), file.mtime_nsec()))
                .hash(&mut hasher);
        }
        Some(Self { file, subject: format!("{} {:016x}\n", boot.trim(), hasher.finish()) })
    }

    pub fn holds(&self) -> bool {
        fs::read_to_string(&self.file).is_ok_and(|text| text == self.subject)
    }

    pub fn write(&self) -> io::Result<()> {
        write_atomically(&self.file, self.subject.as_bytes())
    }

    /// Has the next server try a sandbox.
    pub fn take_back(&self) {
        let _ = fs::remove_file(&self.file);
    }
}

fn find(program: &str) -> Option<PathBuf> {
    let dirs = env::var_os("PATH")?;
    env::split_paths(&dirs).map(|dir| dir.join(program)).find(|path| Path::is_file(path))
}
