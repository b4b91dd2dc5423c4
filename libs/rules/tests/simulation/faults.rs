//! Faults: processes that die or pause, messages that are lost or doubled, and a stream that is
//! lost, set back or trimmed.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::{
    model::Scheduler,
    world::{RUNNERS, SCHEDULERS, SESSIONS, World},
};

impl World {
    pub fn something_fails(&mut self) {
        if !self.faulty {
            return;
        }
        match self.rng.u16(..300) {
            0..=29 => {
                let (runner, fresh) = (self.rng.usize(..RUNNERS), self.fresh_runner());
                self.runners[runner] = fresh;
            }
            30..=49 => {
                let (runner, until) = (self.rng.usize(..RUNNERS), self.now + self.rng.u64(1..600));
                self.runners[runner].paused_until = until;
            }
            50..=69 => {
                let scheduler = self.rng.usize(..SCHEDULERS);
                self.schedulers[scheduler] = Scheduler::default();
            }
            70..=79 => self.queue.clear(),
            80..=99 => {
                let session = self.rng.usize(..SESSIONS);
                self.queue.push_back(session);
            }
            100..=104 => self.stream = None,
            105..=134 => self.snapshot = self.stream.clone(),
            135..=164 => {
                if let (Some(snapshot), Some(_)) = (self.snapshot.take(), &self.stream) {
                    self.stream = Some(snapshot);
                }
            }
            165..=169 => self.leases.clear_all(),
            170..=173 => {
                let session = self.rng.usize(..SESSIONS);
                self.terminations[session] = true;
            }
            174..=189 => {
                if let Some(stream) = &mut self.stream {
                    let through = stream.first.midpoint(stream.last).min(self.projected);
                    if through >= stream.first {
                        stream.entries.retain(|(id, _, _)| *id > through);
                        (stream.first, stream.trimmed_through) = (through + 1, through);
                    }
                }
            }
            _ => {}
        }
    }
}

/// A lease that is lost with its row releases its turns, as the foreign key does.
trait ClearAll {
    fn clear_all(&mut self);
}

impl ClearAll for BTreeMap<Uuid, u64> {
    fn clear_all(&mut self) {
        // Expired, and found so by the next pass.
        self.values_mut().for_each(|until| *until = 0);
    }
}
