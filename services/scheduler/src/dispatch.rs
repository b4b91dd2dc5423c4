//! What runs next: jobs leave through the outbox, runners claim turns, and turns without an owner
//! or past their deadline are found.

pub mod claims;
pub mod ending;
pub mod outbox;
pub mod reconciler;
pub mod relay;
