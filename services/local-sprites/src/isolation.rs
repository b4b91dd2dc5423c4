//! Isolates a Sprite from this machine and from other Sprites.
//!
//! [`sandbox`] puts a Sprite's root together over its [`disk`] and starts it, by a [`runtime`] that
//! reads an [`oci`] bundle; [`holder`] is the running sandbox. [`users`] says which of the machine's
//! users its users are, whose files [`owners`] shows them as theirs. [`launch`] is how commands get in,
//! less what [`seccomp`] refuses, and [`runsc`] where the sandbox has a kernel of its own;
//! [`cgroup`] limits what they use.

pub mod cgroup;
pub mod disk;
pub mod holder;
pub mod launch;
pub mod oci;
pub mod owners;
pub mod process;
pub mod runsc;
pub mod runtime;
pub mod sandbox;
pub mod seccomp;
pub mod users;
