//! Removes what is left of deleted sessions and files, and Sprites that no session knows.

pub mod deletion;
pub mod files;
pub mod orphans;
