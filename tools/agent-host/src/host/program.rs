//! The running program: its start, its input and output, its end and what it leaves running.

use std::{collections::VecDeque, path::Path, time::Duration};

use contract::host::output::Stream;
use rustix::process::{Pid, Signal};

use super::{DRAIN_MS, Host, Running};
use crate::{adapters::Launch, client, monotonic_ms, process};

const READ_BYTES: usize = 256 << 10;
/// Lines of one read that become events.
const MCP_FAILURES_MAX: usize = 20;
/// Outputs of finished programs that background processes still hold open.
const LATE_MAX: usize = 64;
const AWAKE_MS: u64 = 60_000;

impl Host {
    pub(super) fn start_program(&mut self, launch: &Launch) {
        let folder = process::folder(&self.spec, &self.user);
        let prepared = process::prepare(&self.spec, &self.user, launch);
        let started =
            prepared.and_then(|()| process::start(&self.spec, &self.user, &folder, launch));
        let now = monotonic_ms();
        match started {
            Ok(program) => {
                let pid = program.pid.as_raw_nonzero().get().unsigned_abs();
                self.running = Some(Running {
                    program,
                    to_cli: VecDeque::new(),
                    close_input: false,
                    input_closed: false,
                    stdout_open: true,
                    stderr_open: true,
                    exit: None,
                    quiet_since: now,
                    gone_since: now,
                });
                self.core.started(pid, &folder, now);
            }
            Err(error) => self
                .core
                .start_failed(&format!("{} could not be started: {error}", self.spec.runtime), now),
        }
    }

    pub(super) fn write_to_program(&mut self) {
        let Some(running) = &mut self.running else { return };
        if !running.program.has_stdin {
            running.to_cli.clear();
            return;
        }
        while !running.to_cli.is_empty() && !running.input_closed {
            let (part, _) = running.to_cli.as_slices();
            match rustix::net::send(&running.program.stdout, part, rustix::net::SendFlags::NOSIGNAL)
            {
                Ok(sent) => drop(running.to_cli.drain(..sent)),
                Err(rustix::io::Errno::AGAIN) => return,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => running.input_closed = true,
            }
        }
        if running.close_input && !running.input_closed {
            running.input_closed = true;
            let _ = rustix::net::shutdown(&running.program.stdout, rustix::net::Shutdown::Write);
        }
    }

    pub(super) fn read_output(&mut self, stream: Stream) {
        self.read_refusals();
        self.read_mcp_failures();
        let Some(running) = &mut self.running else { return };
        let (fd, open) = match stream {
            Stream::Stdout => (&running.program.stdout, &mut running.stdout_open),
            Stream::Stderr => (&running.program.stderr, &mut running.stderr_open),
        };
        if !*open {
            return;
        }
        let mut buffer = vec![0; READ_BYTES];
        match rustix::io::read(fd, &mut buffer) {
            // A socket whose other end is closed with data unread resets.
            Ok(0) | Err(rustix::io::Errno::CONNRESET) => *open = false,
            Ok(bytes) => {
                buffer.truncate(bytes);
                running.quiet_since = monotonic_ms();
                self.core.output(stream, buffer, monotonic_ms());
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(_) => *open = false,
        }
    }

    /// What the sandbox's network refused is told as errors of the program's.
    fn read_refusals(&mut self) {
        if self.spec.refused_log.is_empty() || self.running.is_none() {
            return;
        }
        let added = process::read_from(Path::new(&self.spec.refused_log), self.refused_bytes);
        let Some(end) = added.iter().rposition(|byte| *byte == b'\n') else { return };
        self.refused_bytes += end as u64 + 1;
        let text = String::from_utf8_lossy(added.get(..end).unwrap_or_default()).into_owned();
        let told: String =
            text.lines().map(|line| format!("refused by the network policy: {line}\n")).collect();
        self.core.output(Stream::Stderr, told.into_bytes(), monotonic_ms());
    }

    /// Which MCP servers did not start, where their CLI does not say so.
    fn read_mcp_failures(&mut self) {
        if self.spec.mcp_failures.is_empty() || self.running.is_none() {
            return;
        }
        let added = process::read_own(
            Path::new(&self.spec.mcp_failures),
            self.user.uid,
            self.mcp_failures_bytes,
        );
        let Some(end) = added.iter().rposition(|byte| *byte == b'\n') else { return };
        self.mcp_failures_bytes += end as u64 + 1;
        let text = String::from_utf8_lossy(added.get(..end).unwrap_or_default()).into_owned();
        text.lines()
            .filter(|line| !line.is_empty())
            .take(MCP_FAILURES_MAX)
            .for_each(|line| self.core.mcp_failed(line));
    }

    pub(super) fn reap(&mut self) {
        for (pid, code) in process::reap() {
            self.spared.retain(|spared| *spared != pid);
            if let Some(running) =
                self.running.as_mut().filter(|running| running.program.pid == pid)
            {
                running.exit = Some(code);
                running.gone_since = monotonic_ms();
                running.quiet_since = running.gone_since;
            }
        }
    }

    /// Tells of a program's exit once its output is read: to its end, or until background processes
    /// are quiet.
    pub(super) fn finish_program(&mut self) {
        let Some(running) = &self.running else { return };
        let Some(code) = running.exit else { return };
        let now = monotonic_ms();
        let is_read = !running.stdout_open && !running.stderr_open;
        let is_quiet =
            now >= (running.quiet_since + self.drain_quiet_ms()).min(running.gone_since + DRAIN_MS);
        if self.takes_output() && (is_read || is_quiet) {
            self.read_refusals();
            if !is_read && self.core.spares_leftovers() {
                const NOTE: &str = "[aod] processes that were left running still write to this output; what they write from now on is lost\n";
                self.core.output(Stream::Stderr, NOTE.as_bytes().to_vec(), now);
            }
            if let Some(running) = self.running.take() {
                let open = [
                    (running.stdout_open, running.program.stdout),
                    (running.stderr_open, running.program.stderr),
                ];
                self.late.extend(open.into_iter().filter(|(open, _)| *open).map(|(_, fd)| fd));
                self.late.drain(..self.late.len().saturating_sub(LATE_MAX));
            }
            self.core.exited(code, now);
        }
    }

    pub(super) fn tree(&self) -> Vec<Pid> {
        process::descendants(rustix::process::getpid(), &self.spared)
    }

    /// Ends everything that belongs to turns; a process that forks all the time is caught by
    /// repetition.
    pub(super) fn kill(&mut self) {
        for _ in 0..200 {
            let tree = self.tree();
            if tree.is_empty() {
                break;
            }
            // Stopped first: what is stopped starts nothing new while the others are found.
            process::signal(&tree, Signal::STOP);
            process::signal(&tree, Signal::KILL);
            std::thread::sleep(Duration::from_millis(2));
            self.reap();
        }
    }

    pub(super) fn stay_awake(&mut self) {
        let now = monotonic_ms();
        if self.awake && now >= self.awake_at && !self.spec.tasks_socket.is_empty() {
            self.awake_at = now + AWAKE_MS;
            client::stay_awake(&self.spec.tasks_socket);
        }
    }
}
