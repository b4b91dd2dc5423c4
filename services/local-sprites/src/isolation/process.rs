//! Processes of this machine that outlive this server: found again by number and start time.

use std::fs;

use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};

/// A process. Its start time distinguishes it from a later process with the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: i32,
    start_time: u64,
}

impl Process {
    /// The process that has this number now; of a child that was not waited for yet, also one that
    /// has ended.
    pub fn find(pid: i32) -> Option<Self> {
        Some(Self { pid, start_time: look(pid)?.1 })
    }

    pub fn is_alive(self) -> bool {
        look(self.pid) == Some((State::Alive, self.start_time))
    }

    /// Ends it for certain.
    pub fn kill(self) {
        if self.is_alive()
            && let Some(pid) = Pid::from_raw(self.pid)
        {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }

    /// The number of its first child, as this server counts.
    pub fn child(self) -> Option<i32> {
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.pid)).ok()?;
        children.split_whitespace().next()?.parse().ok()
    }

    /// Its children and theirs, whichever of its threads started them.
    pub fn descendants(self) -> Vec<i32> {
        let (mut found, mut next) = (Vec::new(), vec![self.pid]);
        while let Some(pid) = next.pop() {
            let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            for thread in threads {
                let children =
                    fs::read_to_string(thread.path().join("children")).unwrap_or_default();
                let children = children.split_whitespace().filter_map(|pid| pid.parse().ok());
                for child in children.filter(|child| !found.contains(child)).collect::<Vec<i32>>() {
                    found.push(child);
                    next.push(child);
                }
            }
        }
        found
    }

    /// Sends a signal to what a launcher started, and all of its group; to the launcher while it
    /// has started nothing.
    pub fn signal_command(self, signal: Signal) {
        if self.is_alive()
            && let Some(command) = Pid::from_raw(self.child().unwrap_or(self.pid))
            && rustix::process::kill_process_group(command, signal).is_err()
        {
            // One that was started just now leads no group yet.
            let _ = rustix::process::kill_process(command, signal);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Alive,
    Ended,
}

/// Whether a process lives, and when it started, in clock ticks since the boot.
fn look(pid: i32) -> Option<(State, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = if matches!(fields.next()?, "Z" | "X") { State::Ended } else { State::Alive };
    Some((state, fields.nth(18)?.parse().ok()?))
}
