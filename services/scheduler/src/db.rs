//! What queries share: pages of lists, and idempotency keys.

pub mod idempotency;
pub mod page;
