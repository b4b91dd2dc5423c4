//! Live fan-out: plain subscriptions to the events that NATS republishes.
//!
//! A subscription costs the server about one kilobyte, a consumer fifty. In exchange messages are
//! delivered at most once. [`Entry::previous`] shows exactly what was missed, and [`Interrupted`]
//! that something may have been missed.

use bytes::Bytes;
use contract::subject;
use futures::StreamExt as _;
use tokio::sync::watch;
use types::{Partition, SessionId};

use crate::{Bus, RpcError, client::reconnected};

/// An entry of a log, as it was stored.
#[derive(Clone, Debug)]
pub struct Entry {
    pub sequence: u64,
    /// The sequence of the subject's entry before this one; 0 where the stream held none.
    pub previous: u64,
    pub payload: Bytes,
}

/// Messages may have been lost: the connection was, or a subscription was too slow. The
/// subscription continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the live subscription was interrupted")]
pub struct Interrupted;

/// A subscription to one session's log.
#[derive(Debug)]
pub struct Live {
    subscription: async_nats::Subscriber,
    connections: watch::Receiver<u64>,
    drops: watch::Receiver<u64>,
    is_closed: bool,
}

impl Bus {
    /// Subscribes to the entries that are appended to a session's log from now on. A request sent
    /// after this one is processed by the server after it too.
    ///
    /// # Errors
    /// When the connection is closed for good.
    pub async fn live(&self, session: SessionId, partition: Partition) -> Result<Live, RpcError> {
        let (connections, mut drops) = (self.next_connection(), self.drops.clone());
        drops.mark_unchanged();
        let subscription = self
            .client
            .subscribe(subject::session_live(session, partition))
            .await
            .map_err(RpcError::internal)?;
        Ok(Live { subscription, connections, drops, is_closed: false })
    }
}

impl Live {
    /// Returns the next entry. Cancel safe.
    ///
    /// # Errors
    /// [`Interrupted`] when entries may be missing from here on.
    pub async fn next(&mut self) -> Result<Entry, Interrupted> {
        loop {
            let message = tokio::select! {
                biased;
                message = self.subscription.next() => message,
                () = reconnected(&mut self.connections) => return Err(Interrupted),
                () = reconnected(&mut self.drops) => return Err(Interrupted),
            };
            let Some(message) = message else {
                self.is_closed = true;
                return Err(Interrupted);
            };
            if let Some(entry) = entry(message) {
                return Ok(entry);
            }
        }
    }

    /// Whether the subscription has ended: subscribe again.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.is_closed
    }
}

/// `None` for what no stream republished: a consumer's deliveries carry a reply subject, and its
/// heartbeats no sequence.
fn entry(message: async_nats::Message) -> Option<Entry> {
    let headers = message.headers.as_ref().filter(|_| message.reply.is_none())?;
    // The server adds its own headers behind those of the writer.
    let number = |name| headers.get_last(name)?.as_str().parse().ok();
    Some(Entry {
        sequence: number(async_nats::header::NATS_SEQUENCE)?,
        previous: number(async_nats::header::NATS_LAST_SEQUENCE)?,
        payload: message.payload,
    })
}
