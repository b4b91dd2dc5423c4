//! Removes what is left of deleted sessions, and Sprites that no session knows.

pub mod deletion;
pub mod orphans;
