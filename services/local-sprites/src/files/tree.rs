//! Copies and removes directory trees that a Sprite wrote. Every entry is opened below its parent's
//! descriptor and never through a link, so nothing outside of the tree is read or written, whatever
//! is moved where meanwhile.

use std::{
    collections::HashMap,
    ffi::{CStr, CString},
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, SeekFrom, Stat, Timespec, Timestamps, Uid,
        XattrFlags, fgetxattr, flistxattr, fsetxattr, linkat, mkdirat, mknodat, openat, readlinkat,
        symlinkat, unlinkat,
    },
    io::Errno,
};

/// Deeper trees are refused: each level holds two descriptors.
const DEPTH_MAX: usize = 256;
const XATTRS_BYTES_MAX: usize = 64 * 1024;
const CHUNK_BYTES: usize = 1 << 20;

/// Copies `from` to `to`, which must not exist: content, owners, modes, times, attributes, links
/// between files, holes.
///
/// # Errors
/// When there is no room, or the tree is deeper than 256 directories. An entry that is removed
/// meanwhile is left out.
pub fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let source = openat(CWD, from, directory_flags(), Mode::empty())?;
    rustix::fs::mkdir(to, Mode::RWXU)?;
    let target = openat(CWD, to, directory_flags(), Mode::empty())?;
    let root = target.try_clone()?;
    let mut copier = Copier { root, linked: HashMap::new(), names: 0 };
    copier.directory(source.as_fd(), target.as_fd(), Path::new(""), 0)
}

/// Removes a tree. However deep it is, that takes two descriptors and no recursion: what a Sprite
/// nests must not exhaust this server's descriptors or its stack, as `fs::remove_dir_all` would.
///
/// # Errors
/// When it is no directory, or something cannot be removed.
pub fn remove(dir: &Path) -> io::Result<()> {
    let mut at = openat(CWD, dir, directory_flags(), Mode::empty())?;
    let mut above = Vec::new();
    loop {
        if let Some(below) = empty(&at)? {
            above.push(identity(&at)?);
            at = below;
            continue;
        }
        let Some(parent) = above.pop() else { break };
        at = openat(&at, c"..", directory_flags(), Mode::empty())?;
        if identity(&at)? != parent {
            return Err(io::Error::other("a directory was moved while its tree was removed"));
        }
    }
    std::fs::remove_dir(dir)
}

/// Removes what is in a directory, up to the first directory that is not empty, and opens that.
fn empty(dir: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let removed = match unlinkat(dir, name, AtFlags::empty()) {
            Err(Errno::ISDIR | Errno::PERM) => unlinkat(dir, name, AtFlags::REMOVEDIR),
            removed => removed,
        };
        match removed {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::NOTEMPTY | Errno::EXIST) => {
                return Ok(Some(openat(dir, name, directory_flags(), Mode::empty())?));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

fn identity(dir: &OwnedFd) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::fstat(dir)?;
    Ok((stat.st_dev, stat.st_ino))
}

fn directory_flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

struct Copier {
    root: OwnedFd,
    /// Where the first name of a file with several names was copied to, by device and inode.
    linked: HashMap<(u64, u64), std::path::PathBuf>,
    names: usize,
}

impl Copier {
    /// Files with several names that are kept in mind; beyond it each name becomes a file of its
    /// own.
    const LINKED_MAX: usize = 1 << 20;

    fn directory(
        &mut self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        path: &Path,
        depth: usize,
    ) -> io::Result<()> {
        if depth > DEPTH_MAX {
            return Err(io::Error::other(format!("directories are more than {DEPTH_MAX} deep")));
        }
        for entry in Dir::read_from(from)? {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            match self.entry(from, to, name, path, depth) {
                // Gone meanwhile, or seen under its name twice.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists
                    ) => {}
                other => other?,
            }
        }
        let stat = rustix::fs::fstat(from)?;
        attributes(from, to)?;
        own(to, &stat)
    }

    fn entry(
        &mut self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        name: &CStr,
        path: &Path,
        depth: usize,
    ) -> io::Result<()> {
        use std::os::unix::ffi::OsStrExt as _;
        let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let below = path.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind != FileType::Directory && stat.st_nlink > 1 {
            let identity = (stat.st_dev, stat.st_ino);
            if let Some(first) = self.linked.get(&identity) {
                return Ok(linkat(&self.root, first, to, name, AtFlags::empty())?);
            }
            if self.names < Self::LINKED_MAX {
                self.names += 1;
                self.linked.insert(identity, below.clone());
            }
        }
        match kind {
            FileType::Directory => {
                let source = match openat(from, name, directory_flags(), Mode::empty()) {
                    // Something else is there by now.
                    Err(Errno::NOTDIR | Errno::LOOP) => return Ok(()),
                    opened => opened?,
                };
                mkdirat(to, name, Mode::RWXU)?;
                let target = openat(to, name, directory_flags(), Mode::empty())?;
                self.directory(source.as_fd(), target.as_fd(), &below, depth + 1)
            }
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let source = match openat(from, name, flags, Mode::empty()) {
                    Err(Errno::LOOP | Errno::NXIO) => return Ok(()),
                    opened => opened?,
                };
                let opened = rustix::fs::fstat(&source)?;
                if FileType::from_raw_mode(opened.st_mode) != FileType::RegularFile {
                    return Ok(());
                }
                let flags = OFlags::WRONLY
                    | OFlags::CREATE
                    | OFlags::EXCL
                    | OFlags::NOFOLLOW
                    | OFlags::CLOEXEC;
                let target = openat(to, name, flags, Mode::RUSR | Mode::WUSR)?;
                content(&source, &target)?;
                attributes(source.as_fd(), target.as_fd())?;
                own(target.as_fd(), &opened)
            }
            FileType::Symlink => {
                let link = match readlinkat(from, name, Vec::new()) {
                    Err(Errno::INVAL) => return Ok(()),
                    read => read?,
                };
                symlinkat(link.as_c_str(), to, name)?;
                owner_at(to, name, &stat)
            }
            // What an overlay marks as removed is a device of number 0; others are opened by
            // nothing.
            kind => {
                mknodat(to, name, kind, Mode::from_raw_mode(stat.st_mode & 0o7777), stat.st_rdev)?;
                owner_at(to, name, &stat)
            }
        }
    }
}

fn owner_at(dir: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> io::Result<()> {
    let (owner, group) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::chownat(dir, name, Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(rustix::fs::utimensat(dir, name, &times(stat), AtFlags::SYMLINK_NOFOLLOW)?)
}

/// The owner first: a change of it takes the set-user-ID bit away.
fn own(file: BorrowedFd<'_>, stat: &Stat) -> io::Result<()> {
    rustix::fs::fchown(file, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    rustix::fs::fchmod(file, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    Ok(rustix::fs::futimens(file, &times(stat))?)
}

fn times(stat: &Stat) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: stat.st_atime, tv_nsec: stat.st_atime_nsec as _ },
        last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ },
    }
}

/// Extended attributes: an overlay keeps what it knows of a directory there, and programs their
/// capabilities.
fn attributes(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let mut names = vec![0; XATTRS_BYTES_MAX];
    let length = match flistxattr(from, &mut names) {
        Err(Errno::NOTSUP) => return Ok(()),
        listed => listed?,
    };
    let mut value = vec![0; XATTRS_BYTES_MAX];
    for name in names
        .get(..length)
        .unwrap_or_default()
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let name = CString::new(name)?;
        let length = fgetxattr(from, name.as_c_str(), &mut value)?;
        fsetxattr(
            to,
            name.as_c_str(),
            value.get(..length).unwrap_or_default(),
            XattrFlags::empty(),
        )?;
    }
    Ok(())
}

/// Copies what is between the holes.
fn content(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    let (mut source, mut target) = (File::from(from.try_clone()?), File::from(to.try_clone()?));
    let size = source.metadata()?.len();
    let mut at = 0;
    while at < size {
        let begin = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            // Only a hole is left.
            Err(Errno::NXIO) => break,
            found => found?,
        };
        let end = rustix::fs::seek(from, SeekFrom::Hole(begin))?.min(size);
        let mut left = end.saturating_sub(begin);
        rustix::fs::seek(from, SeekFrom::Start(begin))?;
        rustix::fs::seek(to, SeekFrom::Start(begin))?;
        while left > 0 {
            let chunk = left.min(CHUNK_BYTES as u64);
            let copied = io::copy(&mut io::Read::take(&mut source, chunk), &mut target)?;
            if copied == 0 {
                // Cut short meanwhile.
                break;
            }
            left -= copied;
        }
        at = end.max(begin + 1);
    }
    target.set_len(size)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
    };

    use super::*;

    #[test]
    fn a_copy_has_content_modes_links_and_holes() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        fs::create_dir_all(from.join("a/b")).unwrap();
        fs::write(from.join("a/b/file"), "content").unwrap();
        fs::set_permissions(from.join("a/b/file"), fs::Permissions::from_mode(0o4750)).unwrap();
        fs::hard_link(from.join("a/b/file"), from.join("a/same")).unwrap();
        symlink("/etc/passwd", from.join("link")).unwrap();
        let sparse = File::create(from.join("sparse")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&sparse, b"end", (1 << 30) - 3).unwrap();
        let to = dir.path().join("to");
        copy(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(to.join("a/b/file")).unwrap(), "content");
        let copied = fs::metadata(to.join("a/b/file")).unwrap();
        assert_eq!(copied.permissions().mode() & 0o7777, 0o4750);
        assert_eq!(copied.ino(), fs::metadata(to.join("a/same")).unwrap().ino());
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("/etc/passwd"));
        let sparse = fs::metadata(to.join("sparse")).unwrap();
        assert!(sparse.len() == 1 << 30 && sparse.blocks() < 1000, "{}", sparse.blocks());
    }

    #[test]
    fn a_tree_of_any_depth_is_removed_and_nothing_that_it_links_to() {
        let dir = tempfile::tempdir().unwrap();
        let (outside, tree) = (dir.path().join("outside"), dir.path().join("tree"));
        fs::create_dir_all(outside.join("kept")).unwrap();
        fs::create_dir_all(tree.join("b/c")).unwrap();
        fs::write(tree.join("b/file"), "x").unwrap();
        symlink(&outside, tree.join("b/link")).unwrap();
        for number in 0..300 {
            fs::create_dir_all(tree.join(format!("wide/{number}/below"))).unwrap();
        }
        let mut at = openat(CWD, &tree, directory_flags(), Mode::empty()).unwrap();
        for _ in 0..20_000 {
            mkdirat(&at, "a", Mode::RWXU).unwrap();
            at = openat(&at, "a", directory_flags(), Mode::empty()).unwrap();
        }
        remove(&tree).unwrap();
        assert!(!tree.exists() && outside.join("kept").exists());
        assert_eq!(remove(&tree).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(remove(Path::new("/dev/null")).is_err());
    }

    #[test]
    fn a_directory_that_becomes_a_link_during_the_copy_leads_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let (outside, from) = (dir.path().join("outside"), dir.path().join("from"));
        fs::create_dir_all(&outside).unwrap();
        fs::write(outside.join("marker"), "the machine's").unwrap();
        fs::create_dir_all(from.join("d")).unwrap();
        fs::write(from.join("d/marker"), "its own").unwrap();
        let (stop, swapped) = (Arc::new(AtomicBool::new(false)), from.clone());
        let stopped = stop.clone();
        let swapper = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let _ = fs::rename(swapped.join("d"), swapped.join("old"));
                let _ = symlink(&outside, swapped.join("d"));
                let _ = fs::remove_file(swapped.join("d"));
                let _ = fs::rename(swapped.join("old"), swapped.join("d"));
            }
        });
        for number in 0..500 {
            let to = dir.path().join(format!("to-{number}"));
            copy(&from, &to).unwrap();
            let copied = [to.join("d"), to.join("old")]
                .into_iter()
                .filter(|dir| dir.is_dir() && !dir.is_symlink());
            for marker in copied.map(|dir| dir.join("marker")) {
                assert_eq!(fs::read_to_string(marker).unwrap(), "its own");
            }
        }
        stop.store(true, Ordering::Relaxed);
        swapper.join().unwrap();
    }
}
