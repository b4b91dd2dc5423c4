//! Inputs of a running turn: fetched from the scheduler when it says that some wait, and passed to
//! the agent host.

use std::{collections::VecDeque, sync::Arc, time::Duration};

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
const RETRY: Backoff =
    Backoff { base: Duration::from_millis(200), max: Duration::from_secs(5), attempts: u32::MAX };
const INPUTS: usize = 16;

/// The inputs of one turn as they come, some of them more than once; fetched by a task that ends
/// with this.
pub struct Inputs {
    /// Those that waited when the turn was taken over.
    first: VecDeque<Input>,
    inputs: mpsc::Receiver<Input>,
    /// Its only task; it ends with this.
    _task: JoinSet<()>,
}

/// Whose inputs.
#[derive(Clone, Copy)]
pub struct Turn {
    pub session: SessionId,
    pub turn: u32,
    pub epoch: u32,
}

impl Turn {
    fn request(&self) -> FetchInputsRequest {
        FetchInputsRequest {
            session_id: self.session.to_string(),
            turn: self.turn,
            epoch: self.epoch,
        }
    }
}

impl Inputs {
    /// Follows hints, and `waiting`, which is notified by heartbeats. A turn that was taken over
    /// may have missed a hint, and its journal may settle inputs that the former runner sent: it
    /// asks first.
    ///
    /// # Errors
    /// When hints cannot be subscribed to.
    pub async fn follow(
        bus: &Bus,
        turn: Turn,
        waiting: Arc<Notify>,
    ) -> Result<Self, bus::RpcError> {
        let hints =
            bus.hints(subject::inputs_hint(turn.session)).await.map_err(bus::RpcError::internal)?;
        let (first, due) = match turn.epoch {
            0 | 1 => (VecDeque::new(), false),
            _ => match bus.call::<rpc::FetchInputs>(&turn.request(), DEADLINE).await {
                Ok(reply) => (reply.inputs.into(), false),
                Err(_) => (VecDeque::new(), true),
            },
        };
        let (sender, inputs) = mpsc::channel(INPUTS);
        let mut task = JoinSet::new();
        task.spawn(run(bus.clone(), turn, due, hints, waiting, sender).in_current_span());
        Ok(Self { first, inputs, _task: task })
    }

    /// Those that waited when the turn was taken over; they are returned by [`Self::next`] as well.
    pub fn first(&self) -> impl Iterator<Item = &Input> {
        self.first.iter()
    }

    /// The next one; waits for ever where none comes.
    pub async fn next(&mut self) -> Input {
        if let Some(input) = self.first.pop_front() {
            return input;
        }
        match self.inputs.recv().await {
            Some(input) => input,
            None => std::future::pending().await,
        }
    }
}

async fn run(
    bus: Bus,
    turn: Turn,
    mut due: bool,
    mut hints: impl Stream<Item = ()> + Unpin + Send,
    waiting: Arc<Notify>,
    sender: mpsc::Sender<Input>,
) {
    let request = turn.request();
    let (mut attempt, mut hints_end) = (0, false);
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
