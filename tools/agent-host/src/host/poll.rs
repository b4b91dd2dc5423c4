//! Waits for clients, the program and replies, and reads what they send.

use std::{
    io::{self, ErrorKind, Read as _},
    os::{fd::AsFd as _, unix::net::UnixListener},
};

use contract::host::output::Stream;
use journal::{Decoder, Frame};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Client, DRAIN_MS, Host};
use crate::{
    custom_tools::{self, Told},
    monotonic_ms,
};

const CLIENTS_MAX: usize = 16;
const JOURNAL_BYTES_MAX: u64 = 1 << 30;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    Listener,
    Wake,
    Client(usize),
    Tools,
    ToolsClient(usize),
    Stdout,
    Stderr,
    Exit,
    Late(usize),
}

impl Host {
    /// Whether the program's output may be read: what was read is written, and the journal has
    /// room.
    pub(super) fn takes_output(&self) -> bool {
        let max = if self.spec.journal_bytes_max == 0 {
            JOURNAL_BYTES_MAX
        } else {
            self.spec.journal_bytes_max
        };
        let is_gone = self.running.as_ref().is_some_and(|running| running.exit.is_some());
        self.actions.is_empty() && (is_gone || self.store.bytes() < max)
    }

    pub(super) fn wait(&self) -> io::Result<Vec<(Source, PollFlags)>> {
        let mut waited = vec![
            (Source::Listener, self.listener.as_fd(), PollFlags::IN),
            (Source::Wake, self.wake.as_fd(), PollFlags::IN),
        ];
        waited.extend(
            self.clients.iter().enumerate().map(|(index, client)| {
                (Source::Client(index), client.stream.as_fd(), PollFlags::IN)
            }),
        );
        waited.extend(
            self.tools.iter().map(|listener| (Source::Tools, listener.as_fd(), PollFlags::IN)),
        );
        waited.extend(self.tools_clients.iter().enumerate().map(|(index, client)| {
            let write = if client.has_more() { PollFlags::OUT } else { PollFlags::empty() };
            (Source::ToolsClient(index), client.stream.as_fd(), PollFlags::IN | write)
        }));
        waited.extend(
            self.late
                .iter()
                .enumerate()
                .map(|(index, fd)| (Source::Late(index), fd.as_fd(), PollFlags::IN)),
        );
        if let Some(running) = &self.running {
            let read = if self.takes_output() { PollFlags::IN } else { PollFlags::empty() };
            let write = if running.to_cli.is_empty() || running.input_closed {
                PollFlags::empty()
            } else {
                PollFlags::OUT
            };
            if running.stdout_open && !(read | write).is_empty() {
                waited.push((Source::Stdout, running.program.stdout.as_fd(), read | write));
            }
            if running.stderr_open && !read.is_empty() {
                waited.push((Source::Stderr, running.program.stderr.as_fd(), read));
            }
            if running.exit.is_none() {
                waited.push((Source::Exit, running.program.exited.as_fd(), PollFlags::IN));
            }
        }
        let mut fds: Vec<PollFd<'_>> =
            waited.iter().map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
        let now = monotonic_ms();
        let mut timeout = self.core.next_tick().map_or(1000, |at| at.saturating_sub(now)).min(1000);
        if let Some(running) = self.running.as_ref().filter(|running| running.exit.is_some()) {
            let quiet =
                (running.quiet_since + self.drain_quiet_ms()).min(running.gone_since + DRAIN_MS);
            timeout = timeout.min(quiet.saturating_sub(now));
        }
        if !self.actions.is_empty() {
            timeout = timeout.min(250);
        }
        let timespec = Timespec {
            tv_sec: i64::try_from(timeout / 1000).unwrap_or(1),
            tv_nsec: i64::try_from(timeout % 1000).unwrap_or(0) * 1_000_000,
        };
        match poll(&mut fds, Some(&timespec)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let events = waited.iter().zip(&fds).map(|((source, ..), fd)| (*source, fd.revents()));
        Ok(events.filter(|(_, events)| !events.is_empty()).collect())
    }

    pub(super) fn drain_quiet_ms(&self) -> u64 {
        if self.spec.drain_quiet_ms == 0 { 500 } else { u64::from(self.spec.drain_quiet_ms) }
    }

    pub(super) fn handle(&mut self, ready: &[(Source, PollFlags)]) {
        let (mut gone, mut silent, mut tools_gone) = (Vec::new(), Vec::new(), Vec::new());
        for (source, events) in ready {
            match source {
                Source::Listener => {
                    while let Ok((stream, _)) = self.listener.accept() {
                        if stream.set_nonblocking(true).is_ok() {
                            self.clients.push(Client { stream, decoder: Decoder::of_inputs() });
                        }
                    }
                }
                Source::Tools => self.accept_tools_clients(),
                Source::ToolsClient(index) => {
                    if !self.read_tools_client(*index) {
                        tools_gone.push(*index);
                    }
                }
                Source::Wake => {
                    let _ = rustix::io::read(&self.wake, &mut [0; 8]);
                }
                Source::Client(index) => {
                    if !self.read_client(*index) {
                        gone.push(*index);
                    }
                }
                Source::Stdout => {
                    if events.contains(PollFlags::OUT) {
                        self.write_to_program();
                    }
                    if self.takes_output() {
                        self.read_output(Stream::Stdout);
                    }
                }
                Source::Stderr => self.read_output(Stream::Stderr),
                Source::Late(index) => {
                    let read =
                        self.late.get(*index).map(|fd| rustix::io::read(fd, &mut [0; 64 << 10]));
                    if !matches!(
                        read,
                        Some(Ok(1..) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR))
                    ) {
                        silent.push(*index);
                    }
                }
                Source::Exit => {}
            }
        }
        if self.takes_output()
            && let Ok(reply) = self.http.1.try_recv()
        {
            self.core.http(&reply, monotonic_ms());
            while let Ok(reply) = self.http.1.try_recv() {
                self.core.http(&reply, monotonic_ms());
            }
        }
        for index in silent.into_iter().rev() {
            self.late.remove(index);
        }
        for index in gone.into_iter().rev() {
            self.clients.remove(index);
        }
        for index in tools_gone.into_iter().rev() {
            self.core.custom_tools_gone(self.tools_clients.remove(index).number, monotonic_ms());
        }
        let surplus = self.clients.len().saturating_sub(CLIENTS_MAX);
        self.clients.drain(..surplus);
    }

    fn accept_tools_clients(&mut self) {
        while let Some(Ok((stream, _))) = self.tools.as_ref().map(UnixListener::accept) {
            self.tools_accepted += 1;
            let client =
                custom_tools::Client::new(stream, self.tools_accepted, &self.spec.custom_tools);
            // Each process of the CLI has one.
            if self.tools_clients.len() < CLIENTS_MAX {
                self.tools_clients.extend(client);
            }
        }
    }

    /// False: the server is gone.
    fn read_tools_client(&mut self, index: usize) -> bool {
        let Some(client) = self.tools_clients.get_mut(index) else { return true };
        client.write();
        let Some(told) = client.read() else { return false };
        for told in told {
            let now = monotonic_ms();
            match told {
                Told::Called { call, name, input_json } => {
                    self.core.custom_tool_called(call, name, input_json, now)
                }
                Told::Cancelled { call } => self.core.custom_tool_cancelled(&call, now),
            }
        }
        true
    }

    /// False: the client is gone, or sends what is no input.
    fn read_client(&mut self, index: usize) -> bool {
        let Some(client) = self.clients.get_mut(index) else { return true };
        let mut buffer = vec![0; 64 << 10];
        match client.stream.read(&mut buffer) {
            Ok(0) => return false,
            Ok(bytes) => client.decoder.push(buffer.get(..bytes).unwrap_or_default()),
            Err(error) => {
                return matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted);
            }
        }
        loop {
            match client.decoder.next() {
                Ok(Some(Frame::Input(input))) => self.core.input(input, monotonic_ms()),
                Ok(Some(_)) => {}
                Ok(None) => return true,
                Err(_) => return false,
            }
        }
    }
}
