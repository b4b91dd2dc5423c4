//! The file API (docs/sprites-api.md §6). Every path is resolved by the kernel inside the Sprite's
//! root, so that neither `..` nor a symlink nor a race leads out of it.

pub mod tree;
pub mod watch;

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, RawMode, ResolveFlags, Stat},
    io::Errno,
    process::{Gid, Uid},
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// Entries of one answer. A tree that has more is an error, not an answer that lacks some.
const ENTRIES_MAX: usize = 100_000;

/// A Sprite's root, and whom new files are for.
#[derive(Debug)]
pub struct Root {
    dir: File,
    owner: Option<u32>,
}

/// An entry of a directory, or a file that lists itself.
#[derive(Debug, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    pub name: String,
    pub path: String,
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub size: i64,
    pub mode: String,
    pub mod_time: String,
    pub is_dir: bool,
}

/// Absolute, or relative to the working directory; normal, without touching the disk.
pub fn absolute(working_dir: &str, path: &str) -> PathBuf {
    let mut normal = PathBuf::from("/");
    for component in Path::new("/").join(working_dir).join(path).components() {
        match component {
            Component::Normal(part) => normal.push(part),
            Component::ParentDir => {
                normal.pop();
            }
            _ => {}
        }
    }
    normal
}

impl Root {
    /// `owner` as this machine names it; this server itself where none.
    pub fn new(dir: File, owner: Option<u32>) -> Self {
        Self { dir, owner }
    }

    pub fn open(&self, path: &Path, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
        let relative = path.strip_prefix("/").unwrap_or(path);
        let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(rustix::fs::openat2(self.dir.as_fd(), relative, flags | OFlags::CLOEXEC, mode, resolve)?)
    }

    /// The directory that a path's last name is in, and that name.
    fn parent<'a>(&self, path: &'a Path) -> io::Result<(OwnedFd, &'a Path)> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        Ok((self.open(parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?, Path::new(name)))
    }

    /// A file to read, from an offset on, and its size.
    pub fn read(&self, path: &Path, offset: u64) -> io::Result<(File, u64)> {
        let mut file =
            File::from(self.open(path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty())?);
        let metadata = file.metadata()?;
        if metadata.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        if !metadata.is_file() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        file.seek(SeekFrom::Start(offset))?;
        Ok((file, metadata.len()))
    }

    pub fn write(&self, path: &Path, content: &[u8], mode: u32, parents: bool) -> io::Result<()> {
        // The SDKs make a directory by writing `.keep` into it (docs/sprites-api.md §6): its parent
        // is made whatever they say.
        let depth = if parents {
            usize::MAX
        } else {
            usize::from(path.file_name().is_some_and(|name| name == ".keep"))
        };
        if let Some(parent) = path.parent() {
            self.make_dirs(parent, depth)?;
        }
        let mode = Mode::from_raw_mode(mode as RawMode);
        let flags = OFlags::WRONLY | OFlags::TRUNC | OFlags::NONBLOCK;
        let fd = match self.open(path, flags, Mode::empty()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // Created with its final mode: a secret is never readable in between.
                let fd = self.open(path, flags | OFlags::CREATE, mode)?;
                self.give(&fd)?;
                fd
            }
            there => there?,
        };
        refuse_device(&fd)?;
        rustix::fs::fchmod(&fd, mode)?;
        File::from(fd).write_all(content)
    }

    /// A new file or directory is its owner's.
    fn give(&self, fd: impl AsFd) -> io::Result<()> {
        match self.owner {
            Some(owner) => {
                Ok(rustix::fs::fchown(fd, Some(Uid::from_raw(owner)), Some(Gid::from_raw(owner)))?)
            }
            None => Ok(()),
        }
    }

    fn make_dirs(&self, path: &Path, depth: usize) -> io::Result<()> {
        if depth == 0 || self.open(path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).is_ok() {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            self.make_dirs(parent, depth - 1)?;
        }
        let (parent, name) = self.parent(path)?;
        match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => self.give(rustix::fs::openat(
                &parent,
                name,
                OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
            )?),
            Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// What is in a directory, or the file itself; with `recursive`, what is below it too.
    pub fn list(&self, path: &Path, recursive: bool) -> io::Result<Vec<Entry>> {
        let fd = self.open(path, OFlags::PATH, Mode::empty())?;
        let stat = rustix::fs::fstat(&fd)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Ok(vec![entry(path, &stat)]);
        }
        let dir = self.open(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
        let mut entries = Vec::new();
        list_into(&dir, path, recursive, &mut entries)?;
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(entries)
    }

    /// Gives what was deleted.
    pub fn delete(&self, path: &Path, recursive: bool) -> io::Result<Vec<PathBuf>> {
        let (parent, name) = self.parent(path)?;
        let mut deleted = Vec::new();
        delete_at(parent.as_fd(), name, path, recursive, &mut deleted)?;
        Ok(deleted)
    }

    pub fn rename(&self, source: &Path, dest: &Path) -> io::Result<()> {
        let ((from, source), (to, dest)) = (self.parent(source)?, self.parent(dest)?);
        Ok(rustix::fs::renameat(&from, source, &to, dest)?)
    }

    /// Copies a file, or with `recursive` a directory; gives what was copied where, and how many
    /// bytes.
    pub fn copy(
        &self,
        source: &Path,
        dest: &Path,
        recursive: bool,
    ) -> io::Result<(Vec<(PathBuf, PathBuf)>, u64)> {
        let stat = rustix::fs::fstat(self.open(source, OFlags::PATH, Mode::empty())?)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            let bytes = self.copy_file(source, dest)?;
            return Ok((vec![(source.to_owned(), dest.to_owned())], bytes));
        }
        if !recursive {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        if dest.starts_with(source) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.make_dirs(dest, usize::MAX)?;
        let (mut copied, mut bytes) = (vec![(source.to_owned(), dest.to_owned())], 0);
        for entry in self.list(source, true)? {
            let from = PathBuf::from(&entry.path);
            let to = dest.join(from.strip_prefix(source).unwrap_or(&from));
            match entry.kind {
                "directory" => self.make_dirs(&to, usize::MAX)?,
                "symlink" => {
                    let (parent, name) = self.parent(&from)?;
                    let target = rustix::fs::readlinkat(&parent, name, Vec::new())?;
                    let (parent, name) = self.parent(&to)?;
                    rustix::fs::symlinkat(target.as_c_str(), &parent, name)?;
                }
                _ => bytes += self.copy_file(&from, &to)?,
            }
            copied.push((from, to));
        }
        Ok((copied, bytes))
    }

    fn copy_file(&self, source: &Path, dest: &Path) -> io::Result<u64> {
        let (mut file, size) = self.read(source, 0)?;
        let mode = rustix::fs::fstat(&file)?.st_mode & 0o7777;
        let mut content = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
        file.read_to_end(&mut content)?;
        self.write(dest, &content, mode, true)?;
        Ok(size)
    }

    /// Gives what was changed.
    pub fn chmod(&self, path: &Path, mode: u32, recursive: bool) -> io::Result<Vec<PathBuf>> {
        let mode = Mode::from_raw_mode(mode as RawMode);
        self.change(path, recursive, |fd| {
            Ok(rustix::fs::chmodat(CWD, named(fd), mode, AtFlags::empty())?)
        })
    }

    /// Gives what was changed. Owners as this machine names them.
    pub fn chown(
        &self,
        path: &Path,
        uid: Option<u32>,
        gid: Option<u32>,
        recursive: bool,
    ) -> io::Result<Vec<PathBuf>> {
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        self.change(path, recursive, |fd| {
            Ok(rustix::fs::chownat(CWD, named(fd), uid, gid, AtFlags::empty())?)
        })
    }

    /// Does something to a file, and with `recursive` to all below it that are no symlinks.
    fn change(
        &self,
        path: &Path,
        recursive: bool,
        change: impl Fn(&OwnedFd) -> io::Result<()>,
    ) -> io::Result<Vec<PathBuf>> {
        let mut changed = vec![path.to_owned()];
        let top = self.open(path, OFlags::PATH, Mode::empty())?;
        let is_dir =
            FileType::from_raw_mode(rustix::fs::fstat(&top)?.st_mode) == FileType::Directory;
        if recursive && is_dir {
            let below = self
                .list(path, true)?
                .into_iter()
                .filter(|entry| entry.kind != "symlink")
                .map(|entry| entry.path.into());
            changed.extend(below);
        }
        for path in &changed {
            let file = self.open(path, OFlags::PATH, Mode::empty())?;
            refuse_device(&file)?;
            change(&file)?;
        }
        Ok(changed)
    }
}

/// A Sprite's devices are the machine's own: what changes one changes it for everybody.
fn refuse_device(file: &OwnedFd) -> io::Result<()> {
    match FileType::from_raw_mode(rustix::fs::fstat(file)?.st_mode) {
        FileType::CharacterDevice | FileType::BlockDevice => {
            Err(io::ErrorKind::PermissionDenied.into())
        }
        _ => Ok(()),
    }
}

/// Some calls refuse `O_PATH` descriptors; their name under `/proc` is the same file, resolved
/// already.
fn named(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(fd))
}

fn list_into(
    dir: impl AsFd,
    path: &Path,
    recursive: bool,
    entries: &mut Vec<Entry>,
) -> io::Result<()> {
    for item in Dir::read_from(&dir)? {
        let item = item?;
        let name = Path::new(OsStr::from_bytes(item.file_name().to_bytes()));
        if item.file_name() == c"." || item.file_name() == c".." {
            continue;
        }
        // One that is deleted meanwhile is not in the list.
        let Ok(stat) = rustix::fs::statat(&dir, item.file_name(), AtFlags::SYMLINK_NOFOLLOW) else {
            continue;
        };
        if entries.len() >= ENTRIES_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("more than {ENTRIES_MAX} entries"),
            ));
        }
        let path = path.join(name);
        entries.push(entry(&path, &stat));
        if recursive && FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            if let Ok(below) = rustix::fs::openat(&dir, item.file_name(), flags, Mode::empty()) {
                list_into(&below, &path, recursive, entries)?;
            }
        }
    }
    Ok(())
}

fn delete_at(
    parent: impl AsFd,
    name: &Path,
    path: &Path,
    recursive: bool,
    deleted: &mut Vec<PathBuf>,
) -> io::Result<()> {
    match rustix::fs::unlinkat(&parent, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => {}
        other => {
            other?;
            deleted.push(path.to_owned());
            return Ok(());
        }
    }
    if recursive {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(&parent, name, flags, Mode::empty())?;
        for item in Dir::read_from(&dir)? {
            let item = item?;
            if item.file_name() != c"." && item.file_name() != c".." {
                let name = Path::new(OsStr::from_bytes(item.file_name().to_bytes()));
                delete_at(&dir, name, &path.join(name), true, deleted)?;
            }
        }
    }
    rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR)?;
    deleted.push(path.to_owned());
    Ok(())
}

fn entry(path: &Path, stat: &Stat) -> Entry {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => "directory",
        FileType::Symlink => "symlink",
        _ => "file",
    };
    let modified =
        OffsetDateTime::from_unix_timestamp(stat.st_mtime).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    Entry {
        name: path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        path: path.to_string_lossy().into_owned(),
        kind,
        size: stat.st_size,
        mode: format!("{:04o}", stat.st_mode & 0o7777),
        mod_time: modified.format(&Rfc3339).unwrap_or_default(),
        is_dir: kind == "directory",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_never_climbs_above_the_root() {
        assert_eq!(absolute("/home/sprite", "a/../b"), Path::new("/home/sprite/b"));
        assert_eq!(absolute("/home", "../../../etc/x"), Path::new("/etc/x"));
        assert_eq!(absolute("", "/a//b/."), Path::new("/a/b"));
    }

    #[test]
    fn a_symlink_is_followed_within_the_root_only() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("inside"), "yes").unwrap();
        std::os::unix::fs::symlink("/inside", dir.path().join("link")).unwrap();
        std::os::unix::fs::symlink("/../../../../../../etc/passwd", dir.path().join("out"))
            .unwrap();
        let root = Root::new(File::open(dir.path()).unwrap(), None);
        let mut text = String::new();
        root.read(Path::new("/link"), 0).unwrap().0.read_to_string(&mut text).unwrap();
        assert_eq!(text, "yes");
        assert_eq!(root.read(Path::new("/out"), 0).unwrap_err().kind(), io::ErrorKind::NotFound);
        root.write(Path::new("/a/b/c"), b"x", 0o600, true).unwrap();
        assert_eq!(root.list(Path::new("/a/b/c"), false).unwrap()[0].mode, "0600");
        root.delete(Path::new("/a"), true).unwrap();
        assert_eq!(root.list(Path::new("/a"), false).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(std::fs::read(dir.path().join("inside")).unwrap(), b"yes");
    }
}
