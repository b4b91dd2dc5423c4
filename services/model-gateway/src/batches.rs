//! Tells the scheduler of many requests at a time, where nothing limits their sessions: what comes
//! while one message is under way is in the next one, so that requests of one session do not meet.

use std::{collections::HashSet, time::Duration};

use bus::{Bus, RpcError};
use contract::{
    rpc,
    scheduler::{
        BeginModelRequestRequest, EndModelRequestRequest, RecordModelRequestsReply,
        RecordModelRequestsRequest,
    },
};
use prost::Message as _;
use service::Lifecycle;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use types::limits::MESSAGE_BYTES_MAX;

/// What takes longer is asked for again, one by one.
const DEADLINE: Duration = Duration::from_secs(1);
/// For the message that is under way, and the next one. Where more wait than that takes, they are
/// asked for one by one: a scheduler that is slow is to delay none longer.
const WAIT_MAX: Duration = Duration::from_secs(2);
const BATCH_MAX: usize = 256;
/// Most have some hundred bytes.
const ITEM_BYTES_MAX: usize = 4096;
const WAITING_MAX: usize = 4096;
const _: () = assert!(BATCH_MAX * ITEM_BYTES_MAX <= MESSAGE_BYTES_MAX / 2);

#[derive(Debug)]
enum Item {
    Begin(BeginModelRequestRequest),
    End(EndModelRequestRequest),
}

impl Item {
    fn bytes(&self) -> usize {
        match self {
            Self::Begin(begin) => begin.encoded_len(),
            Self::End(end) => end.encoded_len(),
        }
    }
}

/// An item, and who waits to hear whether it was recorded.
type Waiting = (Item, oneshot::Sender<bool>);

/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct Batches(mpsc::Sender<Waiting>);

impl Batches {
    pub fn start(bus: Bus, lifecycle: &Lifecycle) -> Self {
        let (sender, waiting) = mpsc::channel(WAITING_MAX);
        lifecycle.spawn("batches", run(bus, waiting, lifecycle.stop_token()));
        Self(sender)
    }

    /// Returns whether the beginning was recorded. If not, it is to be asked for alone.
    pub async fn begin(&self, begin: BeginModelRequestRequest) -> bool {
        self.record(Item::Begin(begin)).await
    }

    /// Returns whether the end was recorded. If not, it is to be told alone.
    pub async fn end(&self, end: EndModelRequestRequest) -> bool {
        self.record(Item::End(end)).await
    }

    async fn record(&self, item: Item) -> bool {
        if item.bytes() > ITEM_BYTES_MAX {
            return false;
        }
        let (waiting, recorded) = oneshot::channel();
        // Where too much waits, or after the stop, nothing of it is.
        self.0.try_send((item, waiting)).is_ok()
            && matches!(tokio::time::timeout(WAIT_MAX, recorded).await, Ok(Ok(true)))
    }
}

/// Sends one message after another until the stop. What is not recorded by then is told alone.
async fn run(bus: Bus, mut waiting: mpsc::Receiver<Waiting>, stop: CancellationToken) {
    let mut batch = Vec::with_capacity(BATCH_MAX);
    while stop
        .run_until_cancelled(waiting.recv_many(&mut batch, BATCH_MAX))
        .await
        .is_some_and(|count| count > 0)
    {
        // Whose client is gone has ended meanwhile; who waited too long asks alone.
        batch.retain(|(_, waiting)| !waiting.is_closed());
        if batch.is_empty() {
            continue;
        }
        let Some(sent) = stop.run_until_cancelled(send(&bus, &batch)).await else { return };
        let recorded = sent.unwrap_or_else(|error| {
            // What came meanwhile waits for no second failure.
            batch.extend(std::iter::from_fn(|| waiting.try_recv().ok()));
            tracing::debug!(%error, requests = batch.len(), "model requests are told one by one");
            RecordModelRequestsReply::default()
        });
        let ids = |ids: Vec<String>| ids.into_iter().collect::<HashSet<_>>();
        let (begun, ended) = (ids(recorded.begun), ids(recorded.ended));
        for (item, waiting) in batch.drain(..) {
            let is_recorded = match item {
                Item::Begin(begin) => begun.contains(&begin.request_id),
                Item::End(end) => end.begun.is_some_and(|begun| ended.contains(&begun.request_id)),
            };
            let _ = waiting.send(is_recorded);
        }
    }
}

async fn send(bus: &Bus, batch: &[Waiting]) -> Result<RecordModelRequestsReply, RpcError> {
    let mut request = RecordModelRequestsRequest::default();
    for (item, _) in batch {
        match item {
            Item::Begin(begin) => request.begins.push(begin.clone()),
            Item::End(end) => request.ends.push(end.clone()),
        }
    }
    bus.call::<rpc::RecordModelRequests>(&request, DEADLINE).await
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use bus::responder::Responder;
    use contract::access;
    use futures::future::join_all;
    use testkit::Nats;

    use super::*;

    #[tokio::test]
    async fn a_request_does_not_wait_for_all_messages_before_its_own_to_a_slow_scheduler() {
        let nats = Nats::start().unwrap();
        let lifecycle = Lifecycle::new();
        let scheduler = nats.connect(&access::SCHEDULER).await.unwrap();
        let responder = Responder::new(
            &scheduler,
            "scheduler",
            (),
            lifecycle.tracker(),
            lifecycle.stop_token(),
        );
        let slow = async |(), _: RecordModelRequestsRequest| {
            tokio::time::sleep(DEADLINE * 9 / 10).await;
            Ok(RecordModelRequestsReply::default())
        };
        responder.serve::<rpc::RecordModelRequests, _, _>(slow).await.unwrap();
        let gateway = nats.connect(&access::MODEL_GATEWAY).await.unwrap();
        let batches = Batches::start(gateway, &lifecycle);
        let begun = Instant::now();
        let begins = (0..BATCH_MAX * 6).map(|_| batches.begin(BeginModelRequestRequest::default()));
        join_all(begins).await;
        let waited = begun.elapsed();
        assert!(waited < WAIT_MAX + DEADLINE / 2, "{waited:?}");
    }
}
