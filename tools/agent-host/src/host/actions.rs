//! Carries out what the core decides, in order.

use std::io;

use contract::host::record;
use rustix::process::Signal;

use super::Host;
use crate::{client, core::Action, monotonic_ms, process, store::NotWritten};

/// How long output waits for room on the disk.
const FULL_MS: u64 = 30_000;

impl Host {
    pub(super) fn carry_out(&mut self) -> io::Result<()> {
        loop {
            for action in self.core.take_actions() {
                match action {
                    // Neither waits for room: they make it, or end what takes it.
                    Action::Persisted(offset) => self.store.delete_below(offset)?,
                    Action::Terminate => process::signal(&self.tree(), Signal::TERM),
                    Action::Kill => self.kill(),
                    action => self.actions.push_back(action),
                }
            }
            let Some(action) = self.actions.pop_front() else { return Ok(()) };
            if let Some(unwritten) = self.carry_out_one(action)? {
                self.actions.push_front(unwritten);
                return Ok(());
            }
        }
    }

    /// Gives the action back where the disk has no room for its record.
    fn carry_out_one(&mut self, action: Action) -> io::Result<Option<Action>> {
        match action {
            Action::Record(kind) => return self.write(kind),
            Action::Start(launch) => self.start_program(&launch),
            Action::Send(line) => {
                if let Some(running) = &mut self.running {
                    running.to_cli.extend(line);
                }
            }
            Action::CloseInput => {
                if let Some(running) = &mut self.running {
                    running.close_input = true;
                }
            }
            Action::Http(request) => client::send(
                request,
                client::Replies { sender: self.http.0.clone(), wake: self.wake.try_clone()? },
            ),
            Action::CustomToolResult { call, text, is_error } => {
                self.tools_clients
                    .iter_mut()
                    .for_each(|client| client.answer(&call, &text, is_error));
            }
            Action::SpareLeftovers => {
                self.spared = process::descendants(rustix::process::getpid(), &[])
            }
            Action::Awake(awake) => {
                self.awake = awake;
                self.awake_at = 0;
                if !awake && !self.spec.tasks_socket.is_empty() {
                    client::let_sleep(&self.spec.tasks_socket);
                }
            }
            Action::Exit => self.exit = true,
            Action::Persisted(_) | Action::Terminate | Action::Kill => {}
        }
        self.write_to_program();
        Ok(None)
    }

    fn write(&mut self, kind: record::Kind) -> io::Result<Option<Action>> {
        let is_bulk = matches!(kind, record::Kind::Output(_) | record::Kind::Event(_));
        let now = monotonic_ms();
        let give_up = self.full_since.is_some_and(|since| now - since > FULL_MS);
        let written = if is_bulk && !give_up {
            self.store.append(kind.clone())
        } else {
            self.store.append_last(kind.clone())
        };
        match written {
            Ok(()) => {
                if !give_up {
                    self.full_since = None;
                }
                Ok(None)
            }
            Err(NotWritten::Failed(error)) => Err(error),
            Err(NotWritten::Full) if give_up && is_bulk => Ok(None),
            Err(NotWritten::Full) => {
                let since = *self.full_since.get_or_insert(now);
                if now - since > FULL_MS {
                    self.core.journal_is_full(now);
                }
                Ok(Some(Action::Record(kind)))
            }
        }
    }
}
