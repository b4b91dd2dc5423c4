//! The Sprites of this server.
//!
//! A [`sprite`] is what is kept of one and what is attached to its sandbox; the [`registry`] makes,
//! starts, pauses and deletes them; [`checkpoint`] keeps and puts back a disk, [`image`] keeps disks that
//! new Sprites begin from. The [`budget`]
//! limits all of them together, and the [`caretaker`] keeps them within it.

pub mod budget;
pub mod caretaker;
pub mod checkpoint;
pub mod image;
pub mod registry;
pub mod sprite;
