//! What one session may take of a gateway at a time, however many tokens it has: each of its turns' claims registers one.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::sync::Semaphore;

#[derive(Clone, Copy, Debug)]
pub struct ShareLimits {
    pub requests: usize,
    /// Of bodies that are held, in units of [`crate::body::UNIT`].
    pub body_units: usize,
    /// Likewise, of requests to MCP servers and repositories.
    pub routed_units: usize,
    pub connections: usize,
}

/// The part of a gateway that a session has. Ends with the last request or token that uses it.
#[derive(Debug)]
pub struct Share {
    pub requests: Arc<Semaphore>,
    /// Requests to MCP servers and repositories, as many again: some of them stay open.
    pub routed: Arc<Semaphore>,
    pub bodies: Arc<Semaphore>,
    pub routed_bodies: Arc<Semaphore>,
    pub connections: Arc<Semaphore>,
}

impl Share {
    pub fn new(limits: ShareLimits) -> Self {
        let semaphore = |permits: usize| Arc::new(Semaphore::new(permits.clamp(1, Semaphore::MAX_PERMITS)));
        Self {
            requests: semaphore(limits.requests),
            routed: semaphore(limits.requests),
            bodies: semaphore(limits.body_units),
            routed_bodies: semaphore(limits.routed_units),
            connections: semaphore(limits.connections),
        }
    }
}

/// The shares of all sessions. Cheap to clone.
#[derive(Clone)]
pub struct Shares {
    limits: ShareLimits,
    of: Arc<Mutex<HashMap<String, Weak<Share>>>>,
}

impl Shares {
    pub fn new(limits: ShareLimits) -> Self {
        Self { limits, of: Arc::default() }
    }

    pub fn of(&self, session: &str) -> Arc<Share> {
        let mut shares = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(share) = shares.get(session).and_then(Weak::upgrade) {
            return share;
        }
        if shares.len() == shares.capacity() {
            shares.retain(|_, share| share.strong_count() > 0);
        }
        let share = Arc::new(Share::new(self.limits));
        shares.insert(session.to_owned(), Arc::downgrade(&share));
        share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_one_session_have_one_share_and_those_of_others_their_own() {
        let shares = Shares::new(ShareLimits { requests: 1, body_units: 1, routed_units: 1, connections: 1 });
        let (first, second, other) = (shares.of("a"), shares.of("a"), shares.of("b"));
        let held = first.requests.clone().try_acquire_owned();
        assert!(held.is_ok() && second.requests.try_acquire().is_err() && other.requests.try_acquire().is_ok());
        drop((first, second, held));
        assert!(shares.of("a").requests.try_acquire().is_ok());
        for session in 0..1000 {
            drop(shares.of(&session.to_string()));
        }
        assert!(shares.of.lock().unwrap_or_else(PoisonError::into_inner).len() < 500);
    }
}
