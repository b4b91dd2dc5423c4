//! Bodies of requests, read whole within a bounded memory: a provider's connection is not opened
//! for a client that sends slowly.

use std::{sync::Arc, time::Duration};

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use crate::refusal::Refusal;

/// A body has to be there within this time.
const TIME_MAX: Duration = Duration::from_secs(120);
/// A client that sends nothing for so long has gone.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// How long a body waits for memory that others hold.
const MEMORY_WAIT_MAX: Duration = Duration::from_secs(5);
/// Permits of the memory for bodies are for this many bytes each.
pub const UNIT: usize = 1024;

/// Memory for the bodies that are held at a time. Cheap to clone.
#[derive(Clone)]
pub struct Memory {
    units: Arc<Semaphore>,
    body_bytes_max: usize,
}

/// A body, and the memory that it takes.
#[derive(Debug)]
pub struct HeldBody {
    pub bytes: Bytes,
    pub memory: [Option<OwnedSemaphorePermit>; 3],
}

impl Memory {
    pub fn new(bytes: usize, body_bytes_max: usize) -> Self {
        Self {
            units: Arc::new(Semaphore::new((bytes / UNIT).clamp(1, Semaphore::MAX_PERMITS))),
            body_bytes_max,
        }
    }

    /// Reads a body. Memory is taken as bytes arrive: what a client announces costs nothing.
    /// `shares` are what the body's session and its user may hold.
    pub async fn read(
        &self,
        body: Body,
        announced: Option<usize>,
        shares: &[Arc<Semaphore>; 2],
    ) -> Result<HeldBody, Refusal> {
        if announced.is_some_and(|bytes| bytes > self.body_bytes_max) {
            return Err(Refusal::TooLarge);
        }
        timeout(TIME_MAX, self.fill(body, shares)).await.unwrap_or(Err(Refusal::Body))
    }

    async fn fill(
        &self,
        body: Body,
        [session, user]: &[Arc<Semaphore>; 2],
    ) -> Result<HeldBody, Refusal> {
        let (mut bytes, mut held, mut memory) = (BytesMut::new(), 0, [None, None, None]);
        let mut chunks = body.into_data_stream();
        while let Some(chunk) =
            timeout(SILENCE_MAX, chunks.next()).await.map_err(|_| Refusal::Body)?
        {
            let data = chunk.map_err(|_| Refusal::Body)?;
            let total = bytes.len() + data.len();
            if total > self.body_bytes_max {
                return Err(Refusal::TooLarge);
            }
            let more = total.div_ceil(UNIT) - held;
            let units = u32::try_from(more).unwrap_or(u32::MAX);
            let take = |share: &Arc<Semaphore>| {
                share.clone().try_acquire_many_owned(units).map_err(|_| Refusal::Busy)
            };
            let (of_session, of_user) = (take(session)?, take(user)?);
            let common =
                timeout(MEMORY_WAIT_MAX, self.units.clone().acquire_many_owned(units)).await;
            let common = common.ok().and_then(Result::ok).ok_or(Refusal::Busy)?;
            for (kept, more) in memory.iter_mut().zip([of_session, of_user, common]) {
                match kept {
                    None => *kept = Some(more),
                    Some(permit) => permit.merge(more),
                }
            }
            held += more;
            bytes.extend_from_slice(&data);
        }
        Ok(HeldBody { bytes: bytes.freeze(), memory })
    }
}

#[cfg(test)]
mod tests {
    use futures::stream;

    use super::*;

    /// Of a session, and of a user who has ten such.
    fn shares(permits: usize) -> [Arc<Semaphore>; 2] {
        [permits, permits * 10].map(|permits| Arc::new(Semaphore::new(permits)))
    }

    fn silent() -> Body {
        Body::from_stream(stream::pending::<Result<Bytes, std::io::Error>>())
    }

    #[tokio::test(start_paused = true)]
    async fn a_content_length_reserves_no_memory_and_a_stalled_body_times_out() {
        let memory = Memory::new(64 * UNIT, 64 * UNIT);
        let (first, second) = (shares(64), shares(64));
        let announcing = (0..64).map(|_| memory.read(silent(), Some(64 * UNIT), &first));
        let announcing = futures::future::join_all(announcing);
        let honest = memory.read(Body::from(vec![1; 60 * UNIT]), Some(60 * UNIT), &second);
        let (announcing, honest) = tokio::join!(announcing, honest);
        assert_eq!(honest.map(|held| held.bytes.len()).ok(), Some(60 * UNIT));
        assert!(announcing.iter().all(|body| matches!(body, Err(Refusal::Body))));
    }

    #[tokio::test]
    async fn a_session_holds_its_share_and_no_more() {
        let memory = Memory::new(64 * UNIT, 64 * UNIT);
        let (share, other) = (shares(16), shares(16));
        let kept = memory.read(Body::from(vec![1; 10 * UNIT]), None, &share).await;
        assert!(kept.is_ok());
        assert!(matches!(
            memory.read(Body::from(vec![1; 10 * UNIT]), None, &share).await,
            Err(Refusal::Busy)
        ));
        assert!(memory.read(Body::from(vec![1; 10 * UNIT]), None, &other).await.is_ok());
        drop(kept);
        assert!(memory.read(Body::from(vec![1; 10 * UNIT]), None, &share).await.is_ok());
        assert_eq!((memory.units.available_permits(), share[0].available_permits()), (64, 16));
    }

    #[tokio::test]
    async fn a_body_over_the_limit_is_refused_whatever_it_announces() {
        let memory = Memory::new(64 * UNIT, 4 * UNIT);
        for announced in [Some(5 * UNIT), Some(1), None] {
            let body = memory.read(Body::from(vec![1; 5 * UNIT]), announced, &shares(64)).await;
            assert!(matches!(body, Err(Refusal::TooLarge)), "{announced:?}");
        }
    }
}
