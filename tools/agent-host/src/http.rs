//! Requests to a CLI that serves HTTP on the loopback interface, as adapters make them, and the
//! replies.

/// A request whose answer comes as [`Reply::Answer`], or a stream of server-sent events.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Request {
    /// The adapter's name for it.
    pub tag: String,
    pub port: u16,
    pub method: &'static str,
    pub path: String,
    pub body: Option<String>,
    /// For basic authentication.
    pub password: String,
    /// The answer is a stream of events, which lasts as long as the CLI.
    pub stream: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Answer {
        tag: String,
        status: u16,
        body: String,
    },
    /// One event's data.
    Event {
        tag: String,
        data: String,
    },
    /// No answer came, or the stream ended.
    Failed {
        tag: String,
        message: String,
    },
}
