//! The file API (sprites-api.md §6). Every path is resolved by the kernel inside the Sprite's root, so that neither `..` nor a symlink
//! nor a race leads out of it.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::fd::{AsFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, RawMode, ResolveFlags, Stat};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// A Sprite's root.
#[derive(Debug)]
pub struct Root(File);

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
    pub fn new(root: File) -> Self {
        Self(root)
    }

    fn open(&self, path: &Path, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
        let relative = path.strip_prefix("/").unwrap_or(path);
        let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
        Ok(rustix::fs::openat2(self.0.as_fd(), relative, flags | OFlags::CLOEXEC, mode, ResolveFlags::IN_ROOT)?)
    }

    /// The directory that a path's last name is in, and that name.
    fn parent<'a>(&self, path: &'a Path) -> io::Result<(OwnedFd, &'a Path)> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(io::ErrorKind::InvalidInput.into()) };
        Ok((self.open(parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?, Path::new(name)))
    }

    /// A file to read, from an offset on, and its size.
    pub fn read(&self, path: &Path, offset: u64) -> io::Result<(File, u64)> {
        let mut file = File::from(self.open(path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty())?);
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
        // The SDKs make a directory by writing `.keep` into it (§6): its parent is made whatever they say.
        let depth = if parents { usize::MAX } else { usize::from(path.file_name().is_some_and(|name| name == ".keep")) };
        if let Some(parent) = path.parent() {
            self.make_dirs(parent, depth)?;
        }
        let mode = Mode::from_raw_mode(mode as RawMode);
        // Created with its final mode: a secret is never readable in between.
        let fd = self.open(path, OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NONBLOCK, mode)?;
        rustix::fs::fchmod(&fd, mode)?;
        File::from(fd).write_all(content)
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
            Err(error) if error != rustix::io::Errno::EXIST => Err(error.into()),
            _ => Ok(()),
        }
    }

    pub fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        let fd = self.open(path, OFlags::PATH, Mode::empty())?;
        let stat = rustix::fs::fstat(&fd)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Ok(vec![entry(path, &stat)]);
        }
        let dir = self.open(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
        let mut entries = Vec::new();
        for item in Dir::read_from(&dir)? {
            let item = item?;
            let name = item.file_name().to_string_lossy().into_owned();
            if name == "." || name == ".." {
                continue;
            }
            // One that is deleted meanwhile is not in the list.
            if let Ok(stat) = rustix::fs::statat(&dir, item.file_name(), AtFlags::SYMLINK_NOFOLLOW) {
                entries.push(entry(&path.join(name), &stat));
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    pub fn delete(&self, path: &Path, recursive: bool) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        delete_at(parent.as_fd(), name, recursive)
    }

    pub fn rename(&self, source: &Path, dest: &Path) -> io::Result<()> {
        let ((from, source), (to, dest)) = (self.parent(source)?, self.parent(dest)?);
        Ok(rustix::fs::renameat(&from, source, &to, dest)?)
    }

    /// Copies one file; gives its size.
    pub fn copy(&self, source: &Path, dest: &Path) -> io::Result<u64> {
        let (mut file, size) = self.read(source, 0)?;
        let mode = rustix::fs::fstat(&file)?.st_mode & 0o7777;
        let mut content = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
        file.read_to_end(&mut content)?;
        self.write(dest, &content, mode, true)?;
        Ok(size)
    }

    pub fn chmod(&self, path: &Path, mode: u32) -> io::Result<()> {
        let fd = self.open(path, OFlags::PATH, Mode::empty())?;
        // fchmod refuses O_PATH descriptors; their name under /proc is the same file, resolved already.
        let name = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        Ok(rustix::fs::chmodat(CWD, name, Mode::from_raw_mode(mode as RawMode), AtFlags::empty())?)
    }
}

fn delete_at(parent: impl AsFd, name: &Path, recursive: bool) -> io::Result<()> {
    match rustix::fs::unlinkat(&parent, name, AtFlags::empty()) {
        Err(rustix::io::Errno::ISDIR) => {}
        other => return Ok(other?),
    }
    if recursive {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(&parent, name, flags, Mode::empty())?;
        for item in Dir::read_from(&dir)? {
            let item = item?;
            let name = item.file_name();
            if name != c"." && name != c".." {
                delete_at(&dir, Path::new(std::ffi::OsStr::new(&*name.to_string_lossy())), true)?;
            }
        }
    }
    Ok(rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR)?)
}

fn entry(path: &Path, stat: &Stat) -> Entry {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => "directory",
        FileType::Symlink => "symlink",
        _ => "file",
    };
    let modified = OffsetDateTime::from_unix_timestamp(stat.st_mtime).unwrap_or(OffsetDateTime::UNIX_EPOCH);
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
        std::os::unix::fs::symlink("/../../../../../../etc/passwd", dir.path().join("out")).unwrap();
        let root = Root::new(File::open(dir.path()).unwrap());
        let mut text = String::new();
        root.read(Path::new("/link"), 0).unwrap().0.read_to_string(&mut text).unwrap();
        assert_eq!(text, "yes");
        assert_eq!(root.read(Path::new("/out"), 0).unwrap_err().kind(), io::ErrorKind::NotFound);
        root.write(Path::new("/a/b/c"), b"x", 0o600, true).unwrap();
        assert_eq!(root.list(Path::new("/a/b/c")).unwrap()[0].mode, "0600");
        root.delete(Path::new("/a"), true).unwrap();
        assert_eq!(root.list(Path::new("/a")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(std::fs::read(dir.path().join("inside")).unwrap(), b"yes");
    }
}
