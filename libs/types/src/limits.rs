//! Bounds that several services share. Each is a promise of the contract or a guard of the bus.

use std::time::Duration;

/// Largest request body the gateway reads (docs/api.md §1).
pub const BODY_BYTES_MAX: usize = 2_621_440;
/// Largest message on the bus: a request body, its envelope and some room. `nats/` sets the same.
pub const MESSAGE_BYTES_MAX: usize = 8 * 1024 * 1024;
pub const NAME_CHARS_MAX: usize = 200;
pub const MODEL_CHARS_MAX: usize = 100;
/// An agent's system prompt and an environment's setup script.
pub const TEXT_CHARS_MAX: usize = 256 * 1024;
/// Items of a list or an object that has no limit of its own: hosts, packages of one manager,
/// variables, metadata.
pub const ITEMS_MAX: usize = 1000;
/// Metadata as JSON.
pub const METADATA_BYTES_MAX: usize = 2 << 20;
/// Skills, and MCP servers, of an agent.
pub const AGENT_ITEMS_MAX: usize = 20;
pub const SKILL_DESCRIPTION_CHARS_MAX: usize = 1024;
pub const SKILL_CONTENT_BYTES_MAX: usize = 65_536;
/// Repositories of a session.
pub const RESOURCES_MAX: usize = 10;
/// Of a repository's token. A session's tokens are read together, in one message.
pub const TOKEN_CHARS_MAX: usize = 8192;
pub const URL_CHARS_MAX: usize = 500;
pub const IDEMPOTENCY_KEY_CHARS_MAX: usize = 255;
pub const TIMEOUT_SECONDS_MIN: u32 = 10;
pub const TIMEOUT_SECONDS_MAX: u32 = 3600;
pub const PAGE_MAX: u32 = 1000;
/// Rules of an agent's permissions.
pub const PERMISSION_RULES_MAX: usize = 100;
/// The longest that a permission request may wait before its default applies.
pub const DECISION_SECONDS_MAX: u32 = 7 * 24 * 3600;
/// Messages that wait for a session's turn to end, and their bytes together: those of one answer to
/// a runner.
pub const QUEUED_INPUTS_MAX: usize = 100;
pub const QUEUED_BYTES_MAX: usize = 6 * 1024 * 1024;
/// The reason of a denial, which the model reads.
pub const DENY_MESSAGE_CHARS_MAX: usize = 4096;

/// Output of one event: large enough to carry a burst cheaply, small enough for every SSE client's
/// buffers.
pub const OUTPUT_EVENT_BYTES_MAX: usize = 128 * 1024;

/// How long provisioning may take before the turn is settled without its runner.
pub const PROVISIONING_MAX: Duration = Duration::from_secs(900);
/// How long after a turn's own timeout the scheduler settles it without its runner.
pub const SETTLE_GRACE: Duration = Duration::from_secs(60);
/// How long a process tree has between TERM and KILL.
pub const KILL_GRACE: Duration = Duration::from_secs(5);
/// A runner that is silent for this long has lost its job.
pub const JOB_LEASE: Duration = Duration::from_secs(2);
