//! What one session may take of a gateway at a time, however many tokens it has: each of its turns'
//! claims registers one.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::sync::Semaphore;

#[derive(Clone, Copy, Debug)]
pub struct ShareLimits {
    pub requests: usize,
    pub session: Pools,
    /// All sessions of a user together.
    pub user: Pools,
}

/// How much of what everybody shares.
#[derive(Clone, Copy, Debug)]
pub struct Pools {
    /// Of bodies that are held, in units of [`crate::body::UNIT`].
    pub body_units: usize,
    /// Likewise, of requests to MCP servers and repositories.
    pub routed_units: usize,
    pub connections: usize,
}

/// The part of a gateway that a user has.
#[derive(Debug)]
struct UserShare {
    bodies: Arc<Semaphore>,
    routed_bodies: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

/// The part of a gateway that a session has, and within which it has it: its own, and its user's.
/// Ends with the last request or token that uses it.
#[derive(Debug)]
pub struct Share {
    pub requests: Arc<Semaphore>,
    /// Requests to MCP servers and repositories, as many again: some of them stay open.
    pub routed: Arc<Semaphore>,
    pub bodies: [Arc<Semaphore>; 2],
    pub routed_bodies: [Arc<Semaphore>; 2],
    pub connections: [Arc<Semaphore>; 2],
    _user: Arc<UserShare>,
}

fn semaphore(permits: usize) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(permits.clamp(1, Semaphore::MAX_PERMITS)))
}

impl UserShare {
    fn new(limits: Pools) -> Self {
        Self {
            bodies: semaphore(limits.body_units),
            routed_bodies: semaphore(limits.routed_units),
            connections: semaphore(limits.connections),
        }
    }
}

impl Share {
    fn new(limits: ShareLimits, user: Arc<UserShare>) -> Self {
        Self {
            requests: semaphore(limits.requests),
            routed: semaphore(limits.requests),
            bodies: [semaphore(limits.session.body_units), user.bodies.clone()],
            routed_bodies: [semaphore(limits.session.routed_units), user.routed_bodies.clone()],
            connections: [semaphore(limits.session.connections), user.connections.clone()],
            _user: user,
        }
    }
}

type Known<T> = Arc<Mutex<HashMap<String, Weak<T>>>>;

/// What is known under a name, or is made now. Forgets what no one has any more.
fn find<T>(known: &Known<T>, name: &str, make: impl FnOnce() -> T) -> Arc<T> {
    let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(share) = known.get(name).and_then(Weak::upgrade) {
        return share;
    }
    if known.len() == known.capacity() {
        known.retain(|_, share| share.strong_count() > 0);
    }
    let share = Arc::new(make());
    known.insert(name.to_owned(), Arc::downgrade(&share));
    share
}

/// The shares of all sessions. Cheap to clone.
#[derive(Clone)]
pub struct Shares {
    limits: ShareLimits,
    sessions: Known<Share>,
    users: Known<UserShare>,
}

impl Shares {
    pub fn new(limits: ShareLimits) -> Self {
        Self { limits, sessions: Arc::default(), users: Arc::default() }
    }

    pub fn of(&self, session: &str, user: &str) -> Arc<Share> {
        let of_user = find(&self.users, user, || UserShare::new(self.limits.user));
        find(&self.sessions, session, || Share::new(self.limits, of_user))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Pools = Pools { body_units: 1, routed_units: 1, connections: 1 };

    #[test]
    fn tokens_of_one_session_have_one_share_and_those_of_others_their_own() {
        let shares = Shares::new(ShareLimits {
            requests: 1,
            session: ONE,
            user: Pools { body_units: 2, ..ONE },
        });
        let (first, second, other) =
            (shares.of("a", "u"), shares.of("a", "u"), shares.of("b", "u"));
        let held = first.requests.clone().try_acquire_owned();
        assert!(
            held.is_ok()
                && second.requests.try_acquire().is_err()
                && other.requests.try_acquire().is_ok()
        );
        drop((first, second, held));
        assert!(shares.of("a", "u").requests.try_acquire().is_ok());
        for session in 0..1000 {
            drop(shares.of(&session.to_string(), &session.to_string()));
        }
        let known = |shares: &Shares| {
            (shares.sessions.lock().unwrap().len(), shares.users.lock().unwrap().len())
        };
        assert!(known(&shares).0 < 500 && known(&shares).1 < 500);
    }

    #[test]
    fn sessions_of_one_user_leave_something_to_others() {
        let shares = Shares::new(ShareLimits {
            requests: 1,
            session: ONE,
            user: Pools { body_units: 2, ..ONE },
        });
        let takes = |share: &Share| {
            share
                .bodies
                .iter()
                .map(|pool| pool.clone().try_acquire_owned())
                .collect::<Result<Vec<_>, _>>()
        };
        let sessions: Vec<_> = ["a", "b", "c"].map(|session| shares.of(session, "u")).into();
        let held: Vec<_> = sessions.iter().map(|share| takes(share)).collect();
        assert_eq!(held.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, true, false]);
        assert!(takes(&shares.of("d", "another")).is_ok());
        drop(held);
        assert!(takes(&sessions[2]).is_ok());
    }
}
