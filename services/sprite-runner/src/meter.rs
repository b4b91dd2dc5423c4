//! Model requests of a session as the model gateway recorded them: fetched from the scheduler, and
//! appended to the session's log in the order of their numbers.

use std::{collections::VecDeque, time::Duration};

use bus::{Bus, RpcError};
use contract::{
    host::event,
    rpc,
    scheduler::{FetchModelRequestsReply, FetchModelRequestsRequest, MeterEntry, meter_entry},
    session::{AgentEvent, session_event::Kind},
    subject,
};
use futures::{FutureExt as _, Stream, StreamExt as _};
use tokio::{sync::mpsc, task::JoinSet, time::Instant};
use tracing::Instrument as _;
use types::{Backoff, ErrorCode};

use crate::{event_log::EventLog, inputs::Turn};

const DEADLINE: Duration = Duration::from_secs(5);
const RETRY: Backoff =
    Backoff { base: Duration::from_millis(200), max: Duration::from_secs(5), attempts: u32::MAX };
const ENTRIES: usize = 256;
/// How long the end of a request is held back after the agent has reported a result of it, because
/// more may follow.
const HELD: Duration = Duration::from_millis(400);
/// How long it is held back for a CLI that has reported nothing yet, since CLIs are slow on a busy
/// machine. An event that shows that the agent continued ends the wait: a result of a tool, the
/// next request, the end of the turn.
const HELD_MAX: Duration = Duration::from_secs(10);
/// How long an event waits for the start of the request that it came of.
const PRECEDE_DEADLINE: Duration = Duration::from_secs(1);
/// How long the end of a turn waits for requests that are still open.
const SETTLED_WITHIN: Duration = Duration::from_secs(2);
const SETTLED_EVERY: Duration = Duration::from_millis(50);
/// How long the end of a turn waits at most: for a scheduler that is away, or while background
/// processes ask models without end.
const FINISH_MAX: Duration = Duration::from_secs(30);

/// The entries of one turn, fetched by a task that ends with this.
pub struct Meter {
    bus: Bus,
    request: FetchModelRequestsRequest,
    entries: mpsc::Receiver<MeterEntry>,
    /// Those that came and are not in the log, in order, and when the first of them came.
    held: VecDeque<MeterEntry>,
    held_since: Instant,
    /// The agent has reported something since the newest request began.
    has_told: bool,
    /// It was asked for the request that the newest event came of, and nothing was appended since.
    is_preceded: bool,
    _task: JoinSet<()>,
}

impl Meter {
    /// # Errors
    /// When hints cannot be subscribed to.
    pub async fn follow(bus: &Bus, turn: &Turn, after: u64) -> Result<Self, RpcError> {
        let hints =
            bus.hints(subject::models_hint(turn.session)).await.map_err(RpcError::internal)?;
        let request = FetchModelRequestsRequest {
            session_id: turn.session.to_string(),
            turn: turn.turn,
            epoch: turn.epoch,
            after,
        };
        let (sender, entries) = mpsc::channel(ENTRIES);
        let mut task = JoinSet::new();
        task.spawn(run(bus.clone(), request.clone(), hints, sender).in_current_span());
        Ok(Self {
            bus: bus.clone(),
            request,
            entries,
            held: VecDeque::new(),
            held_since: Instant::now(),
            has_told: false,
            is_preceded: false,
            _task: task,
        })
    }

    /// Waits until something is to be appended; for ever where nothing comes.
    pub async fn due(&mut self) {
        loop {
            let until = self.held_since + if self.has_told { HELD } else { HELD_MAX };
            let came = match self.held.is_empty() {
                true => self.entries.recv().await,
                false => tokio::select! {
                    came = self.entries.recv() => came,
                    () = tokio::time::sleep_until(until) => return,
                },
            };
            match came {
                Some(entry) => {
                    let waits = matches!(entry.kind, Some(meter_entry::Kind::Ended(_)));
                    self.hold(entry);
                    if !waits {
                        return;
                    }
                }
                None if self.held.is_empty() => std::future::pending().await,
                None => return,
            }
        }
    }

    fn hold(&mut self, entry: MeterEntry) {
        if self.held.is_empty() {
            self.held_since = Instant::now();
        }
        if self.held.back().is_none_or(|last| last.number < entry.number) {
            self.held.push_back(entry);
        }
    }

    /// Whether what is held is to be appended before this event: it did not come of the request
    /// that ended.
    pub fn precedes(&self, kind: &Kind) -> bool {
        let follows_from_request =
            matches!(kind, Kind::Output(_) | Kind::OutputDropped(_)) || is_told(kind);
        !self.held.is_empty() && !follows_from_request
    }

    /// Called before an event is appended: the request that it came of stands before it in the log.
    /// The scheduler recorded that request before it was sent, but the agent's output may arrive
    /// first. Asks once per request at most.
    pub async fn precede(
        &mut self,
        kind: &Kind,
        log: &mut EventLog,
    ) -> Result<(), crate::event_log::Fenced> {
        if !is_told(kind) {
            return Ok(());
        }
        if !self.is_preceded && log.checkpoint.open_model_requests.is_empty() {
            let request = FetchModelRequestsRequest {
                after: log.checkpoint.metered_through,
                ..self.request.clone()
            };
            match self.bus.call::<rpc::FetchModelRequests>(&request, PRECEDE_DEADLINE).await {
                Ok(reply) => reply.entries.into_iter().for_each(|entry| self.hold(entry)),
                Err(error) => {
                    tracing::debug!(%error, "failed to fetch model requests; an event may precede its request")
                }
            }
            let begun = newest_start(&self.held);
            self.append_first(begun, log).await?;
        }
        (self.has_told, self.is_preceded) = (true, true);
        Ok(())
    }

    /// Appends what is held.
    pub async fn append(&mut self, log: &mut EventLog) -> Result<(), crate::event_log::Fenced> {
        self.append_first(self.held.len(), log).await
    }

    async fn append_first(
        &mut self,
        count: usize,
        log: &mut EventLog,
    ) -> Result<(), crate::event_log::Fenced> {
        for entry in self.held.drain(..count) {
            self.has_told &= !matches!(entry.kind, Some(meter_entry::Kind::Started(_)));
            self.is_preceded = false;
            log.metered(entry).await?;
        }
        Ok(())
    }

    /// Appends all that there is once the agent is done, and waits a moment for requests that it
    /// left open. Returns what the turn used.
    pub async fn finish(
        &mut self,
        log: &mut EventLog,
    ) -> Result<FetchModelRequestsReply, crate::event_log::Fenced> {
        let (begun, mut attempt) = (Instant::now(), 0);
        loop {
            self.append(log).await?;
            let request = FetchModelRequestsRequest {
                after: log.checkpoint.metered_through,
                ..self.request.clone()
            };
            let reply = match self.bus.call::<rpc::FetchModelRequests>(&request, DEADLINE).await {
                Ok(reply) => reply,
                Err(error) if error.code != ErrorCode::NotFound && begun.elapsed() < FINISH_MAX => {
                    attempt += 1;
                    tracing::debug!(%error, attempt, "failed to fetch model requests; will retry");
                    tokio::time::sleep(RETRY.jittered(attempt)).await;
                    continue;
                }
                Err(error) => {
                    tracing::warn!(%error, "failed to fetch model requests; the turn ends without their usage");
                    return Ok(FetchModelRequestsReply::default());
                }
            };
            if is_done(&reply, begun.elapsed()) {
                return Ok(reply);
            }
            if reply.entries.is_empty() {
                tokio::time::sleep(SETTLED_EVERY).await;
            }
            for entry in reply.entries {
                self.hold(entry);
            }
        }
    }
}

/// Counts the entries up to the newest start. The end of that request, if it is held, stays held.
fn newest_start(held: &VecDeque<MeterEntry>) -> usize {
    held.iter()
        .rposition(|entry| matches!(entry.kind, Some(meter_entry::Kind::Started(_))))
        .map_or(0, |at| at + 1)
}

/// Whether an event came of a model request.
fn is_told(kind: &Kind) -> bool {
    let Kind::Agent(AgentEvent { event: Some(event), .. }) = kind else { return false };
    matches!(
        event.kind,
        Some(event::Kind::Message(_) | event::Kind::Thinking(_) | event::Kind::ToolUse(_))
    )
}

/// Whether a turn's end waits no longer. What comes later is in the log with the next turn.
fn is_done(reply: &FetchModelRequestsReply, waited: Duration) -> bool {
    let is_settled = reply.entries.is_empty() && (reply.open == 0 || waited >= SETTLED_WITHIN);
    is_settled || waited >= FINISH_MAX
}

async fn run(
    bus: Bus,
    mut request: FetchModelRequestsRequest,
    mut hints: impl Stream<Item = ()> + Unpin + Send,
    sender: mpsc::Sender<MeterEntry>,
) {
    // A runner that takes a turn over may have missed a hint, as may one whose session's last turn
    // left a request open.
    let (mut due, mut attempt) = (true, 0);
    loop {
        if !due && hints.next().await.is_none() {
            return;
        }
        // Several hints ask for one answer.
        while matches!(hints.next().now_or_never(), Some(Some(()))) {}
        due = false;
        match bus.call::<rpc::FetchModelRequests>(&request, DEADLINE).await {
            Ok(reply) => {
                attempt = 0;
                for entry in reply.entries {
                    due = true;
                    request.after = request.after.max(entry.number);
                    if sender.send(entry).await.is_err() {
                        return;
                    }
                }
            }
            Err(error) if error.code == ErrorCode::NotFound => {}
            Err(error) => {
                attempt += 1;
                tracing::debug!(%error, attempt, "failed to fetch model requests; will retry");
                tokio::time::sleep(RETRY.jittered(attempt)).await;
                due = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_preceded_by_starts_and_not_by_the_end_of_its_own_request() {
        let entry = |kind| MeterEntry { number: 1, kind: Some(kind) };
        let started = || entry(meter_entry::Kind::Started(Default::default()));
        let ended = || entry(meter_entry::Kind::Ended(Default::default()));
        assert_eq!(newest_start(&[].into()), 0);
        assert_eq!(newest_start(&[ended()].into()), 0);
        assert_eq!(newest_start(&[started(), ended()].into()), 1);
        assert_eq!(newest_start(&[ended(), started()].into()), 2);
    }

    #[test]
    fn a_turns_end_waits_for_its_requests_and_not_for_ever() {
        let reply = |entries, open| FetchModelRequestsReply {
            entries: vec![MeterEntry::default(); entries],
            open,
            ..Default::default()
        };
        let (soon, later) = (Duration::from_millis(1), SETTLED_WITHIN + Duration::from_secs(1));
        assert!(is_done(&reply(0, 0), soon) && is_done(&reply(0, 1), later));
        assert!(!is_done(&reply(0, 1), soon) && !is_done(&reply(3, 0), later));
        // A background process keeps sending model requests.
        assert!(is_done(&reply(200, 5), FINISH_MAX));
    }
}
