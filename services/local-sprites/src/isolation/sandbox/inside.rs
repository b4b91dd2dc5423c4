//! What a Sprite's processes find in their sandbox: its user, where things are, and the
//! environment.

use crate::isolation::holder::{Holder, Network};

/// The user that a Sprite's processes see themselves as (docs/sprites-api.md §11.1).
pub const USER: &str = "sprite";
pub const HOME: &str = "/home/sprite";
/// Where the agent CLIs are mounted.
pub const AGENTS: &str = "/opt/agents";
/// Where the agent host is mounted: one file.
pub const AGENT_HOST: &str = "/opt/aod/agent-host";
pub const PATH: &str =
    "/opt/agents/bin:/.sprite/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The environment that every command has.
pub fn environment(holder: Holder) -> Vec<(String, String)> {
    let own = [
        ("PATH", PATH),
        ("HOME", HOME),
        ("USER", USER),
        ("LOGNAME", USER),
        ("SHELL", "/bin/bash"),
        ("LANG", "C.UTF-8"),
    ];
    let mut environment: Vec<_> =
        own.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    if holder.network() == Network::Limited {
        environment.extend(
            crate::network::proxy::proxy_variables().map(|(name, value)| (name.to_owned(), value)),
        );
    }
    environment
}
