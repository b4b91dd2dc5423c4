//! Network policies of Sprites (docs/sprites-api.md §8.1).
//!
//! A Sprite with rules has a network namespace of its own, in which there is nothing but a proxy:
//! its environment names it (`HTTP_PROXY`, `HTTPS_PROXY`), and what goes another way has no route.
//! The proxy listens inside of the namespace and connects outside of it, by name, where a rule
//! allows that.

mod authority;
mod head;
pub mod intercept;
pub mod namespace;
pub mod policy;
pub mod ports;
pub mod private_hosts;
pub mod proxy;
pub mod substitution;
pub mod uplink;

use std::time::Duration;

const CONNECT_MAX: Duration = Duration::from_secs(15);
/// Connections of one Sprite at a time.
const CONNECTIONS_MAX: usize = 512;
