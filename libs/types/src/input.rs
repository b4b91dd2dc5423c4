//! What users send to a session while it works, and what agents ask them (docs/api.md §6).

use crate::session::named;

named! {
    /// What a prompt does while a turn runs.
    WhenBusy {
        /// It is refused.
        Reject = "reject",
        /// It begins the next turn.
        Queue = "queue",
        /// It begins the next turn, and the running one is interrupted.
        Interrupt = "interrupt",
        /// It joins the running turn. Where it comes too late for that, it begins the next one.
        Steer = "steer",
    }
}

named! {
    InputKind {
        Message = "message",
        Interrupt = "interrupt",
        Decision = "decision",
        /// What a custom tool returned.
        ToolResult = "tool_result",
    }
}

named! {
    /// `queued → delivered → applied | refused`, or `queued → withdrawn`.
    InputStatus {
        Queued = "queued",
        /// On its way to the agent; may be sent several times, and is applied once.
        Delivered = "delivered",
        Applied = "applied",
        Refused = "refused",
        Withdrawn = "withdrawn",
    }
}

impl InputStatus {
    /// Whether it is not yet known what becomes of the input.
    #[must_use]
    pub const fn is_open(self) -> bool {
        matches!(self, Self::Queued | Self::Delivered)
    }
}

named! {
    /// Of a permission request.
    RequestStatus {
        Open = "open",
        Allowed = "allowed",
        Denied = "denied",
        /// The agent no longer asks, for example because its turn was interrupted.
        Withdrawn = "withdrawn",
        /// The agent was lost while it waited. It asks again where it still needs to know.
        Void = "void",
    }
}

named! {
    /// The answer to a permission request.
    Verdict {
        Allow = "allow",
        /// And do not ask about this tool again in this session.
        AllowForSession = "allow_for_session",
        Deny = "deny",
    }
}
