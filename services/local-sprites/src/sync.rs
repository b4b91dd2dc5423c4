//! Helpers for the standard library's locks.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks. What a panic left is as good as any: no invariant spans two statements.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
