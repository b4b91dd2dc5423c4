//! What runs in a Sprite for a client: [`exec`] commands, some in a [`terminal`]; [`tasks`] hold
//! the Sprite awake.

pub mod exec;
pub mod tasks;
pub mod terminal;
