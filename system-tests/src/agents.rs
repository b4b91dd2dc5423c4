//! How many agents the tests of one process run at a time.

use futures::future::join_all;
use tokio::sync::Semaphore;

/// Each CLI takes about a core while it starts: with many more of them than cores, a time limit measures the machine.
static AGENTS: Semaphore = Semaphore::const_new(4);

/// Runs a scenario with an agent for each item, several at a time.
pub async fn for_each_agent<T>(items: impl IntoIterator<Item = T>, scenario: impl AsyncFn(T)) {
    let scenario = &scenario;
    let run = |item| async move {
        // It is never closed.
        let _agent = AGENTS.acquire().await;
        scenario(item).await;
    };
    join_all(items.into_iter().map(run)).await;
}
