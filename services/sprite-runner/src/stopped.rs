//! Why a turn cannot continue. Each part of the runner that may stop one converts its own error into
//! [`Stopped`].

use crate::{event_log::Fenced, host::Gone};

#[derive(Debug)]
pub enum Stopped {
    /// The log has another writer.
    Fenced(Fenced),
    /// This runner cannot continue, but another attempt may: its lease of secrets has ended, or the
    /// sandbox does not answer.
    Released(String),
    /// The turn failed at this stage, with this message for its user.
    Failed { stage: String, message: String },
}

impl Stopped {
    pub fn failed(stage: &str, message: impl Into<String>) -> Self {
        Self::Failed { stage: stage.to_owned(), message: message.into() }
    }
}

impl From<Fenced> for Stopped {
    fn from(fenced: Fenced) -> Self {
        Self::Fenced(fenced)
    }
}

impl From<Gone> for Stopped {
    fn from(gone: Gone) -> Self {
        let lost = |message: &str| Self::failed("sandbox", message);
        match gone {
            Gone::Released(reason) => Self::Released(reason),
            Gone::Failed(why) => lost(&format!("The agent can no longer be followed: {why}")),
            Gone::JournalLost => lost("The agent host's journal was deleted inside the sandbox"),
            Gone::SandboxLost => lost("The sandbox disappeared while the agent was running"),
        }
    }
}
