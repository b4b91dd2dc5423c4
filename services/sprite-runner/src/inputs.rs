//! What is sent to a running turn from outside: fetched from the scheduler when it says that something waits.

use std::{sync::Arc, time::Duration};

use bus::Bus;
use contract::{host::Input, rpc, scheduler::FetchInputsRequest, subject};
use futures::{FutureExt as _, Stream, StreamExt as _};
use tokio::{
    sync::{Notify, mpsc},
    task::JoinSet,
};
use tracing::Instrument as _;
use types::{Backoff, ErrorCode, SessionId};

const DEADLINE: Duration = Duration::from_secs(5);
const RETRY: Backoff = Backoff { base: Duration::from_millis(200), max: Duration::from_secs(5), attempts: u32::MAX };
const INPUTS: usize = 16;

/// The inputs of one turn as they come, some of them more than once; fetched by a task that ends with this.
pub struct Inputs {
    inputs: mpsc::Receiver<Input>,
    /// Its only task; it ends with this.
    _task: JoinSet<()>,
}

/// Whose inputs.
pub struct Turn {
    pub session: SessionId,
    pub turn: u32,
    pub epoch: u32,
}

impl Inputs {
    /// Follows hints, and `waiting`, which is notified by heartbeats. A turn that was taken over may have missed a hint: it asks at once.
    ///
    /// # Errors
    /// When hints cannot be subscribed to.
    pub async fn follow(bus: &Bus, turn: Turn, waiting: Arc<Notify>) -> Result<Self, bus::Failure> {
        let hints = bus.hints(subject::inputs_hint(turn.session)).await.map_err(bus::Failure::internal)?;
        let (sender, inputs) = mpsc::channel(INPUTS);
        let mut task = JoinSet::new();
        task.spawn(run(bus.clone(), turn, hints, waiting, sender).in_current_span());
        Ok(Self { inputs, _task: task })
    }

    /// The next one; waits for ever where none comes.
    pub async fn next(&mut self) -> Input {
        match self.inputs.recv().await {
            Some(input) => input,
            None => std::future::pending().await,
        }
    }
}

async fn run(bus: Bus, turn: Turn, mut hints: impl Stream<Item = ()> + Unpin + Send, waiting: Arc<Notify>, sender: mpsc::Sender<Input>) {
    let request = FetchInputsRequest { session_id: turn.session.to_string(), turn: turn.turn, epoch: turn.epoch };
    let (mut due, mut attempt, mut hints_end) = (turn.epoch > 1, 0, false);
    loop {
        if !due {
            tokio::select! {
                hint = hints.next(), if !hints_end => hints_end = hint.is_none(),
                () = waiting.notified() => {}
            }
            // Several hints ask for one answer.
            while !hints_end && matches!(hints.next().now_or_never(), Some(Some(()))) {}
        }
        due = false;
        match bus.call::<rpc::FetchInputs>(&request, DEADLINE).await {
            Ok(reply) => {
                attempt = 0;
                for input in reply.inputs {
                    if sender.send(input).await.is_err() {
                        return;
                    }
                }
            }
            // A scheduler of an earlier release knows no inputs.
            Err(error) if error.code == ErrorCode::NotFound => {}
            Err(error) => {
                attempt += 1;
                tracing::debug!(%error, attempt, "failed to fetch inputs; will retry");
                tokio::time::sleep(RETRY.jittered(attempt)).await;
                due = true;
            }
        }
    }
}
