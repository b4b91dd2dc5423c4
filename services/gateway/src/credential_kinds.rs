//! The kinds of a user's stored credentials, which each new session is checked by.

use std::{sync::Arc, time::Duration};

use bus::{Bus, RpcError};
use contract::{rpc, vault::ListCredentialsRequest};
use moka::future::Cache;
use tokio::{
    sync::Mutex,
    time::{Instant, timeout_at},
};
use types::ErrorCode;

use crate::RPC_DEADLINE;

const USERS_MAX: u64 = 100_000;
const REMEMBERED: Duration = Duration::from_secs(1);

/// Asks the vault, once for all requests of a user that wait at the same time. No answer is older
/// than the request that gets it: what the vault was asked before a request came does not count.
#[derive(Clone)]
pub struct CredentialKinds(Cache<String, Arc<Mutex<Option<Answer>>>>);

struct Answer {
    asked_at: Instant,
    kinds: Result<Vec<String>, RpcError>,
}

impl CredentialKinds {
    pub fn new() -> Self {
        Self(Cache::builder().max_capacity(USERS_MAX).time_to_idle(REMEMBERED).build())
    }

    /// # Errors
    /// When the vault does not answer within the deadline, or refuses.
    pub async fn of(&self, bus: &Bus, user_id: &str) -> Result<Vec<String>, RpcError> {
        let came_at = Instant::now();
        let late =
            |_| RpcError::new(ErrorCode::Unavailable, "The credential vault does not answer");
        let newest = self.0.get_with_by_ref(user_id, async { Arc::default() }).await;
        let mut newest = timeout_at(came_at + RPC_DEADLINE, newest.lock()).await.map_err(late)?;
        if let Some(answer) = newest.as_ref().filter(|answer| answer.asked_at >= came_at) {
            return answer.kinds.clone();
        }
        let asked_at = Instant::now();
        let request = ListCredentialsRequest { user_id: user_id.to_owned() };
        let left = RPC_DEADLINE.saturating_sub(came_at.elapsed());
        let reply = bus.call::<rpc::ListCredentials>(&request, left).await;
        let kinds = reply.map(|reply| {
            reply.credentials.into_iter().map(|credential| credential.kind).collect::<Vec<_>>()
        });
        // Those that came later have more time left. Other failures are theirs too: one after the
        // other, each would wait for its own.
        if !matches!(&kinds, Err(failure) if failure.code == ErrorCode::DeadlineExceeded) {
            *newest = Some(Answer { asked_at, kinds: kinds.clone() });
        }
        kinds
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use bus::responder::Responder;
    use contract::{
        access,
        vault::{Credential, ListCredentialsReply},
    };
    use futures::future::join_all;
    use service::Lifecycle;
    use testkit::Nats;

    use super::*;

    #[tokio::test]
    async fn requests_that_wait_share_an_answer_that_is_newer_than_each() {
        let nats = Nats::start().unwrap();
        let lifecycle = Lifecycle::new();
        let vault = nats.connect(&access::VAULT).await.unwrap();
        let asked = Arc::new(AtomicUsize::new(0));
        let (tracker, stop) = (lifecycle.tracker(), lifecycle.stop_token());
        let responder = Responder::new(&vault, "vault", asked.clone(), tracker, stop);
        let slow = async |asked: Arc<AtomicUsize>, _: ListCredentialsRequest| {
            let kind = asked.fetch_add(1, Ordering::SeqCst).to_string();
            tokio::time::sleep(Duration::from_millis(300)).await;
            let credentials = vec![Credential { kind, ..Credential::default() }];
            Ok(ListCredentialsReply { credentials })
        };
        responder.serve::<rpc::ListCredentials, _, _>(slow).await.unwrap();
        let gateway = nats.connect(&access::GATEWAY).await.unwrap();
        let kinds = CredentialKinds::new();
        let ask = async |after| {
            tokio::time::sleep(Duration::from_millis(after)).await;
            kinds.of(&gateway, "user").await.unwrap()
        };
        let answers = join_all([0, 100, 150, 200].map(ask)).await;
        assert_eq!(answers, [["0"], ["1"], ["1"], ["1"]]);
        assert_eq!(ask(0).await, ["2"], "nothing waits");
        assert_eq!(asked.load(Ordering::SeqCst), 3);
    }
}
