//! A terminal of a Sprite: one of the pseudoterminals of its own `/dev/pts`.

use std::{io, os::fd::OwnedFd, path::Path};

use bytes::BytesMut;
use rustix::{
    fs::{FileType, OFlags},
    io::Errno,
    process::{Gid, Pid, Uid},
    pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{Winsize, tcgetpgrp, tcsetwinsize},
};
use tokio::io::unix::AsyncFd;

use crate::{files::Root, isolation::holder::Holder};

const READ_BYTES: usize = 16 * 1024;

/// Its size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub cols: u16,
    pub rows: u16,
}

impl Default for Size {
    fn default() -> Self {
        Self { cols: 80, rows: 24 }
    }
}

/// The side of a terminal that a person sits at.
#[derive(Debug)]
pub struct Terminal(AsyncFd<OwnedFd>);

impl Terminal {
    /// A new terminal, and the side of it that a command is started with.
    pub fn open(holder: Holder, size: Size) -> io::Result<(Self, OwnedFd)> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let own = if holder.has_own_kernel() { None } else { open_multiplexer(holder).ok() };
        // A Sprite that has no terminals of its own uses this machine's.
        let master = own.map_or_else(|| openpt(flags), Ok)?;
        unlockpt(&master)?;
        let slave = ioctl_tiocgptpeer(&master, flags)?;
        if let Some(owner) = holder.user(Holder::UID) {
            rustix::fs::fchown(&slave, Some(Uid::from_raw(owner)), Some(Gid::from_raw(owner)))?;
        }
        rustix::io::ioctl_fionbio(&master, true)?;
        let terminal = Self(async_fd(master)?);
        terminal.resize(size)?;
        Ok((terminal, slave))
    }

    pub fn resize(&self, size: Size) -> io::Result<()> {
        Ok(tcsetwinsize(
            &self.0,
            Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 },
        )?)
    }

    /// The processes that the keyboard is connected to.
    pub fn foreground(&self) -> Option<Pid> {
        tcgetpgrp(&self.0).ok()
    }

    /// Adds what the command wrote; zero when no process has the terminal open any more.
    pub async fn read(&self, buffer: &mut BytesMut) -> io::Result<usize> {
        let mut chunk = vec![0; READ_BYTES];
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|fd| Ok(rustix::io::read(fd, &mut chunk)?)) {
                Ok(Ok(read)) => {
                    buffer.extend_from_slice(&chunk[..read]);
                    return Ok(read);
                }
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => {
                    return Ok(0);
                }
                Ok(Err(error)) => return Err(error),
                Err(_not_ready) => {}
            }
        }
    }

    /// Types.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.0.writable().await?;
            match ready.try_io(|fd| Ok(rustix::io::write(fd, bytes)?)) {
                Ok(written) => bytes = &bytes[written?..],
                Err(_not_ready) => {}
            }
        }
        Ok(())
    }
}

/// Opens the Sprite's own `/dev/pts/ptmx`, which must be one: what the Sprite put in its place is
/// not used.
fn open_multiplexer(holder: Holder) -> io::Result<OwnedFd> {
    let root = Root::new(holder.root()?, None);
    let multiplexer = root.open(
        Path::new("/dev/pts/ptmx"),
        OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK,
        rustix::fs::Mode::empty(),
    )?;
    let stat = rustix::fs::fstat(&multiplexer)?;
    let device = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    if FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && device == (5, 2) {
        Ok(multiplexer)
    } else {
        Err(io::Error::other("not a terminal multiplexer"))
    }
}

/// A descriptor that the runtime waits for.
#[expect(
    deprecated,
    reason = "sound for an owned descriptor, which stays what it is; the other constructor is unsafe"
)]
pub fn async_fd(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(fd)
}
