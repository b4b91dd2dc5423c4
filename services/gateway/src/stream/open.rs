//! The open streams of each API key: limits their number, and ends them when the key is
//! deactivated.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;
use tokio_util::task::TaskTracker;
use types::{ErrorCode, KeyHash};

use crate::{App, auth};

/// Keys with open streams are verified this often: with what is remembered of a key, a stream ends
/// within 5 s.
const VERIFY_INTERVAL: Duration = Duration::from_secs(3);

/// Why a key does not work any more, once it does not.
type Refusal = watch::Sender<Option<String>>;

#[derive(Clone)]
pub struct OpenStreams(Arc<Shared>);

struct Shared {
    max_per_key: usize,
    tasks: TaskTracker,
    /// Streams of all keys.
    streams: AtomicUsize,
    keys: Mutex<HashMap<KeyHash, OpenKey>>,
}

struct OpenKey {
    streams: usize,
    refusal: Refusal,
}

/// More streams than a key may have open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooManyStreams {
    pub max: usize,
}

/// One open stream, until it is dropped.
pub struct OpenStream {
    open: OpenStreams,
    key: KeyHash,
    refusal: watch::Receiver<Option<String>>,
}

impl OpenStreams {
    pub fn new(max_per_key: usize, tasks: TaskTracker) -> Self {
        Self(Arc::new(Shared {
            max_per_key,
            tasks,
            streams: AtomicUsize::new(0),
            keys: Mutex::default(),
        }))
    }

    fn keys(&self) -> MutexGuard<'_, HashMap<KeyHash, OpenKey>> {
        self.0.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many streams are open, of all keys.
    pub fn count(&self) -> usize {
        self.0.streams.load(Ordering::Relaxed)
    }

    /// Counts a stream of a key that was just verified, and verifies the key from time to time
    /// while it has any.
    ///
    /// # Errors
    /// [`TooManyStreams`].
    pub fn open(&self, app: &App, key: KeyHash) -> Result<OpenStream, TooManyStreams> {
        let (stream, is_first) = self.count_one(key)?;
        if is_first {
            self.0.tasks.spawn(self.clone().verify(app.clone(), key));
        }
        Ok(stream)
    }

    fn count_one(&self, key: KeyHash) -> Result<(OpenStream, bool), TooManyStreams> {
        let mut keys = self.keys();
        let is_first = !keys.contains_key(&key);
        let entry = keys
            .entry(key)
            .or_insert_with(|| OpenKey { streams: 0, refusal: watch::Sender::new(None) });
        if entry.streams >= self.0.max_per_key {
            return Err(TooManyStreams { max: self.0.max_per_key });
        }
        entry.streams += 1;
        self.0.streams.fetch_add(1, Ordering::Relaxed);
        metrics::gauge!("aod_stream_clients").increment(1);
        Ok((OpenStream { open: self.clone(), key, refusal: entry.refusal.subscribe() }, is_first))
    }

    async fn verify(self, app: App, key: KeyHash) {
        loop {
            let _ =
                app.shutdown.closing.run_until_cancelled(tokio::time::sleep(VERIFY_INTERVAL)).await;
            if app.shutdown.closing.is_cancelled() || !self.is_open(key) {
                return;
            }
            // Without an answer, streams continue: they were allowed when they were opened.
            let Err(failure) = auth::verify(&app, key).await else { continue };
            if failure.code == ErrorCode::Unauthenticated
                && let Some(key) = self.keys().get(&key)
            {
                key.refusal.send_replace(Some(failure.message));
            }
        }
    }

    /// Whether a key has streams; one that has none any more is forgotten.
    fn is_open(&self, key: KeyHash) -> bool {
        let mut keys = self.keys();
        let is_open = keys.get(&key).is_some_and(|key| key.streams > 0);
        if !is_open {
            keys.remove(&key);
        }
        is_open
    }
}

impl OpenStream {
    /// How many streams this gateway has open.
    pub fn count_all(&self) -> usize {
        self.open.count()
    }

    /// Returns once the key does not work any more, with the reason. Cancel safe.
    pub async fn refused(&mut self) -> String {
        match self.refusal.wait_for(Option::is_some).await.map(|refusal| refusal.clone()) {
            Ok(Some(reason)) => reason,
            _ => std::future::pending().await,
        }
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        metrics::gauge!("aod_stream_clients").decrement(1);
        self.open.0.streams.fetch_sub(1, Ordering::Relaxed);
        if let Some(key) = self.open.keys().get_mut(&self.key) {
            key.streams = key.streams.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use types::ApiKey;

    use super::*;

    #[test]
    fn each_key_has_its_own_number_of_streams() {
        let open = OpenStreams::new(2, TaskTracker::new());
        let (one, other) = (ApiKey::generate().unwrap().hash(), ApiKey::generate().unwrap().hash());
        let streams = [open.count_one(one).unwrap().0, open.count_one(one).unwrap().0];
        assert_eq!(open.count_one(one).err(), Some(TooManyStreams { max: 2 }));
        let _other = open.count_one(other).unwrap();
        assert_eq!(open.count(), 3);
        drop(streams);
        assert!(open.count_one(one).is_ok());
        assert_eq!(open.count(), 1);
        assert!(!open.is_open(one) && open.is_open(other));
    }
}
