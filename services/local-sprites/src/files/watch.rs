//! Changes of a Sprite's files as they happen (docs/sprites-api.md §6), by inotify, which sees what
//! passes through the Sprite's own mounts.

use std::{
    collections::HashMap,
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::fs::{
    Mode, OFlags,
    inotify::{self, CreateFlags, ReadFlags, WatchFlags},
};
use tokio::io::unix::AsyncFd;

use crate::{files::Root, run::terminal::async_fd};

/// Directories watched by one client.
const WATCHES_MAX: usize = 10_000;
const BUFFER_BYTES: usize = 64 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Create,
    Write,
    Remove,
    Rename,
    Chmod,
}

impl Change {
    pub fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Write => "write",
            Self::Remove => "remove",
            Self::Rename => "rename",
            Self::Chmod => "chmod",
        }
    }

    fn of(flags: ReadFlags) -> Option<Self> {
        let kinds = [
            (ReadFlags::CREATE | ReadFlags::MOVED_TO, Self::Create),
            (ReadFlags::MODIFY, Self::Write),
            (ReadFlags::DELETE | ReadFlags::DELETE_SELF, Self::Remove),
            (ReadFlags::MOVED_FROM | ReadFlags::MOVE_SELF, Self::Rename),
            (ReadFlags::ATTRIB, Self::Chmod),
        ];
        kinds.into_iter().find_map(|(kind, change)| flags.intersects(kind).then_some(change))
    }
}

#[derive(Debug)]
pub struct Event {
    pub path: PathBuf,
    pub change: Change,
    pub is_dir: bool,
}

/// What one client watches.
#[derive(Debug)]
pub struct Watcher {
    inotify: AsyncFd<OwnedFd>,
    root: Root,
    recursive: bool,
    watched: HashMap<i32, PathBuf>,
}

impl Watcher {
    pub fn new(root: Root, recursive: bool) -> io::Result<Self> {
        let inotify = async_fd(inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?)?;
        Ok(Self { inotify, root, recursive, watched: HashMap::new() })
    }

    /// Watches a file or a directory, and with `recursive` the directories below it.
    pub fn add(&mut self, path: &Path) -> io::Result<()> {
        if self.watched.len() >= WATCHES_MAX {
            return Err(io::Error::other(format!("more than {WATCHES_MAX} directories")));
        }
        let flags = WatchFlags::CREATE
            | WatchFlags::MODIFY
            | WatchFlags::DELETE
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE
            | WatchFlags::MOVE_SELF
            | WatchFlags::ATTRIB;
        // Resolved inside the Sprite's root; the name under /proc is the same file.
        let target = self.root.open(path, OFlags::PATH, Mode::empty())?;
        let id = inotify::add_watch(
            &self.inotify,
            format!("/proc/self/fd/{}", target.as_raw_fd()),
            flags,
        )?;
        self.watched.insert(id, path.to_owned());
        if self.recursive {
            for entry in self.root.list(path, false)? {
                if entry.is_dir {
                    self.add(Path::new(&entry.path))?;
                }
            }
        }
        Ok(())
    }

    /// What changed, at least one thing.
    pub async fn next(&mut self) -> io::Result<Vec<Event>> {
        let mut buffer = vec![MaybeUninit::uninit(); BUFFER_BYTES];
        let (mut events, mut new_dirs) = (Vec::new(), Vec::new());
        while events.is_empty() {
            let mut ready = self.inotify.readable().await?;
            let mut reader = inotify::Reader::new(ready.get_inner(), &mut buffer);
            loop {
                let event = match reader.next() {
                    Ok(event) => event,
                    Err(rustix::io::Errno::AGAIN) => {
                        ready.clear_ready();
                        break;
                    }
                    Err(error) => return Err(error.into()),
                };
                let (Some(dir), Some(change)) =
                    (self.watched.get(&event.wd()), Change::of(event.events()))
                else {
                    continue;
                };
                let name = event.file_name().map(|name| {
                    Path::new(std::ffi::OsStr::new(&*name.to_string_lossy())).to_owned()
                });
                let path = name.map_or_else(|| dir.clone(), |name| dir.join(name));
                let is_dir = event.events().contains(ReadFlags::ISDIR);
                if self.recursive && is_dir && change == Change::Create {
                    new_dirs.push(path.clone());
                }
                events.push(Event { path, change, is_dir });
                if reader.is_buffer_empty() {
                    break;
                }
            }
        }
        for dir in new_dirs {
            // One that is gone already has nothing to watch.
            let _ = self.add(&dir);
        }
        Ok(events)
    }
}
