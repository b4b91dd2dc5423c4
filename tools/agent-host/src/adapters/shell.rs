//! The message as a bash script: one process per turn.

use contract::host::{Capabilities, Spec, turn_ended::Reason};

use super::{Adapter, Effect, Launch, Out, Runtime, Stdio};

pub const RUNTIME: Runtime = Runtime {
    name: "shell",
    version: "",
    protocol: "a bash script per turn",
    tools: "none",
    gaps: "no conversation",
    capabilities: Capabilities {
        steer: false,
        permission_requests: false,
        deny_with_message: false,
        partial_messages: false,
        usage: 0,
        fork: false,
        interrupt: true,
        stays_alive: false,
    },
    new: |_: &Spec| Box::new(Shell),
};

struct Shell;

impl Adapter for Shell {
    fn launch(&mut self, _: Option<&str>, first_message: &str) -> Launch {
        script(first_message, true)
    }

    fn started(&mut self, _: &str, out: &mut Out) {
        out.push(Effect::Ready);
    }

    fn message(&mut self, _: &str, _: &mut Out) {}

    fn exited(&mut self, code: i32, out: &mut Out) {
        let reason = if code == 0 { Reason::Completed } else { Reason::Failed };
        out.push(Effect::TurnEnded { reason, message: String::new(), usage: None });
    }
}

/// A script for bash.
pub fn script(text: &str, belongs_to_turns: bool) -> Launch {
    Launch {
        argv: vec!["bash".to_owned()],
        script: Some(text.to_owned()),
        env: Vec::new(),
        stdio: Stdio::Output,
        prepare: Vec::new(),
        belongs_to_turns,
    }
}
