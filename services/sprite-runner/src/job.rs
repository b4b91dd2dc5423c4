//! Jobs in a Sprite: an agent's turn, or a step of the set-up.
//!
//! `supervise.pl` runs a job detached, spools what it writes to files, then writes its status, atomically. It depends on nobody who
//! watches, starts a job at most once however often it is called, and enforces the job's time limit itself. `follow.pl` reports on it.

use std::{fmt::Write as _, time::Duration};

use futures::future::try_join_all;
use sprites::Sprite;
use types::limits::KILL_GRACE;

/// Out of the agent's way: not in its home, which it may well delete.
pub const ROOT: &str = "/var/lib/aod";
/// What the session's processes find in their environment: `NAME=value`, each ended by a NUL.
pub const ENV_FILE: &str = "/var/lib/aod/env";

const SUPERVISE: &str = include_str!("../scripts/supervise.pl");
const MCP_START: &str = include_str!("../scripts/mcp-start.pl");
/// Runs an MCP server that has to answer within a limit.
pub const MCP_START_PATH: &str = "/var/lib/aod/mcp-start.pl";
const FOLLOW: &str = include_str!("../scripts/follow.pl");

/// What `supervise.pl` reads.
#[derive(Debug)]
pub struct Job<'a> {
    /// In the environment of all that the job starts, by which it is found when its time is up. Without spaces.
    pub mark: String,
    pub timeout: Duration,
    /// How long output is waited for that children of the job still write when it has ended.
    pub drain: Duration,
    pub stdin: &'a str,
    /// The first of these directories that is there.
    pub working_dirs: Vec<&'a str>,
    /// Variables that the session's own override.
    pub vars: Vec<(&'a str, &'a str)>,
    pub argv: Vec<&'a str>,
}

impl Job<'_> {
    /// A setting a line; no value holds a line end.
    pub fn settings(&self) -> String {
        let mut text = format!(
            "mark {}\ntimeout {}\nkill_grace {}\ndrain {}\nenv {ENV_FILE}\nstdin {}\n",
            self.mark,
            self.timeout.as_secs(),
            KILL_GRACE.as_secs(),
            self.drain.as_secs(),
            self.stdin
        );
        let vars = self.vars.iter().map(|(name, value)| ("var", format!("{name} {value}")));
        let dirs = self.working_dirs.iter().map(|dir| ("cwd", (*dir).to_owned()));
        for (name, value) in vars.chain(dirs).chain(self.argv.iter().map(|arg| ("argv", (*arg).to_owned()))) {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name} {value}");
        }
        text
    }
}

/// How a job ended, by its status file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Exited {
        code: u8,
        /// Bytes of output that found no room on the disk.
        dropped: u64,
    },
    TimedOut,
    /// Its supervisor was killed, and with it what was left of the job.
    Killed,
    /// The sandbox restarted under it.
    Lost,
}

impl Status {
    pub fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        match (words.next()?, words.next()) {
            ("timeout", _) => Some(Self::TimedOut),
            ("killed", _) => Some(Self::Killed),
            ("lost", _) => Some(Self::Lost),
            ("exit", Some(code)) => {
                let dropped = words.find_map(|word| word.strip_prefix("dropped=")).map_or(Some(0), |bytes| bytes.parse().ok())?;
                Some(Self::Exited { code: code.parse().ok()?, dropped })
            }
            _ => None,
        }
    }
}

/// Writes what every job of a session needs.
pub async fn write_tools(sprite: &Sprite) -> Result<(), sprites::Error> {
    let tools = [("supervise.pl", SUPERVISE, 0o700), ("follow.pl", FOLLOW, 0o700), ("mcp-start.pl", MCP_START, 0o755)];
    let written = tools.map(async |(name, text, mode)| sprite.write(&format!("{ROOT}/{name}"), text, mode).await);
    try_join_all(written).await.map(drop)
}

/// Shell: starts the job if it was not started, then reports on it from the given offsets of its spool; on its end alone without them.
pub fn follow_command(dir: &str, job: &str, offsets: Option<(u64, u64)>) -> String {
    let offsets = offsets.map(|(stdout, stderr)| format!(" {stdout} {stderr}")).unwrap_or_default();
    format!("perl {ROOT}/supervise.pl {dir} {job} && exec perl {ROOT}/follow.pl {dir}{offsets}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_one_line_of_words() {
        assert_eq!(Status::parse("exit 3"), Some(Status::Exited { code: 3, dropped: 0 }));
        assert_eq!(Status::parse("exit 0 dropped=12\n"), Some(Status::Exited { code: 0, dropped: 12 }));
        assert_eq!(Status::parse("timeout dropped=12"), Some(Status::TimedOut));
        for wrong in ["", "exit", "exit 256", "exit x", "exit 0 dropped=x", "exitt 0"] {
            assert_eq!(Status::parse(wrong), None, "{wrong}");
        }
    }
}
