//! Deadlines: of turns and steps, of a CLI that is slow to start or to end, and of a host that no
//! one uses.

use contract::host::{HostEnded, host_ended, record, turn_ended::Reason};

use super::{Action, Core, KILLED_MS, Program};

impl Core {
    /// `has_clients`: someone reads the journal.
    pub fn tick(&mut self, has_clients: bool, now: u64) {
        let due = |at: Option<u64>| at.is_some_and(|at| at <= now);
        let turn_deadline = self
            .turn
            .as_ref()
            .and_then(|turn| turn.deadline)
            .filter(|_| self.waiting_since.is_none());
        if due(turn_deadline) || due(self.step.as_ref().and_then(|step| step.deadline)) {
            self.end_work(Reason::TimedOut, now);
        }
        if due(self.kill_at) {
            self.kill_at = None;
            if !matches!(self.program, Program::None) {
                self.give_up_at = Some(now + KILLED_MS);
                self.actions.push(Action::Kill);
            }
        }
        if due(self.ready_by) {
            self.ready_by = None;
            self.end_cli(now);
        }
        if due(self.give_up_at) {
            self.exited(137, now);
        }
        if due(self.idle_at) && !self.is_working() {
            self.close(now);
        }
        let linger =
            if self.spec.linger_seconds == 0 { 600 } else { u64::from(self.spec.linger_seconds) }
                * 1000;
        let is_idle =
            !self.is_working() && self.state.queued.is_empty() && self.program == Program::None;
        if has_clients {
            self.quiet_since = now;
        } else if is_idle && !self.exited && now.saturating_sub(self.quiet_since) >= linger {
            self.exit(host_ended::Reason::Lingered);
        }
    }

    /// When [`Self::tick`] has something to do, at the latest.
    pub fn next_tick(&self) -> Option<u64> {
        let turn =
            self.turn.as_ref().filter(|turn| turn.ending.is_none()).and_then(|turn| turn.deadline);
        let turn = turn.filter(|_| self.waiting_since.is_none());
        let step =
            self.step.as_ref().filter(|step| step.ending.is_none()).and_then(|step| step.deadline);
        [turn, step, self.kill_at, self.give_up_at, self.idle_at, self.ready_by]
            .into_iter()
            .flatten()
            .min()
    }

    pub(super) fn exit(&mut self, reason: host_ended::Reason) {
        self.exited = true;
        self.record(record::Kind::HostEnded(HostEnded {
            reason: reason.into(),
            message: String::new(),
        }));
        self.actions.push(Action::Exit);
    }

    /// The journal cannot take what the program writes, and no room came: what is running ends.
    pub fn journal_is_full(&mut self, now: u64) {
        self.end_work(Reason::Failed, now);
    }
}
