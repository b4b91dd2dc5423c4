//! Appends to a session's event log, as its only writer.
//!
//! Every append names the sequence that it follows. The stream refuses a runner that lost its turn;
//! it then reads who wrote, and stops. Each event contains a checkpoint of its writer, so that a
//! successor needs only the newest event.

use std::time::{Duration, Instant};

use bus::{
    Bus,
    log::{AppendError, Entry, ReadError},
    topology::TopologyError,
};
use bytes::Bytes;
use contract::{
    scheduler::{MeterEntry, QueuedInputs, TurnSpec, meter_entry},
    session::{
        Checkpoint, OpenModelRequest, Preview, SessionEvent, StageChanged, TakenOver, TurnEnded,
        TurnStarted, session_event::Kind,
    },
    subject, topology,
};
use prost::Message as _;
use rules::{
    chain::{self, Mark},
    position::Newest,
};
use types::{Backoff, Partition, SessionId, Stage, StageState, Timestamp};
use uuid::Uuid;

use crate::{
    mask::Masker,
    playback::{self, Emitted, Place},
};

/// How often a log is read again whose newest message no service wrote: for about ten seconds.
const FOREIGN_ATTEMPTS: u32 = 12;
/// Model requests without an end that are remembered.
const OPEN_REQUESTS_MAX: usize = 64;
const RETRY: Backoff =
    Backoff { base: Duration::from_millis(50), max: Duration::from_secs(2), attempts: u32::MAX };

/// Why a writer has to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fenced {
    /// The session was terminated.
    Terminated,
    /// Another runner has the turn, or the scheduler settled it.
    Superseded,
    /// The stream was trimmed, recreated or set back: the log continues from what is persisted.
    Forgotten,
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    StreamInfo(#[from] TopologyError),
    #[error("the stream was trimmed since the turn was claimed")]
    Trimmed,
    #[error("the newest event cannot be read by this release")]
    Unreadable,
    #[error("this release knows no partition {0}")]
    UnknownPartition(u32),
}

/// How far the turn got, according to the newest event.
#[derive(Debug)]
pub enum Position {
    /// Continue from here.
    Open(Box<EventLog>),
    /// The turn's end is in the log, with this id.
    Ended(u64),
    Fenced(Fenced),
}

/// The event log of one turn's session, and this runner's place in it.
#[derive(Debug)]
pub struct EventLog {
    bus: Bus,
    session: SessionId,
    /// The stream and the subject in it.
    stream: &'static str,
    log: String,
    turn: u32,
    epoch: u32,
    /// The subject's last sequence, as far as this writer knows.
    last_sequence: u64,
    /// The newest event of the session, which the next one continues.
    follows: Mark,
    /// The earliest time of the next event, in microseconds.
    next_at_us: i64,
    /// Ids up to this one were persisted when the turn was claimed: an event that gets one of them
    /// is in a stream that was set back.
    floor: u64,
    pub checkpoint: Checkpoint,
    /// Masks secrets in our own messages.
    pub secrets: Masker,
    /// Masks secrets in the agent's output.
    pub masker: Masker,
    /// Whether nothing is appended: see [`Self::unwritten`].
    is_unwritten: bool,
    /// When this runner took the turn, until the agent's first output.
    silent_since: Option<Instant>,
}

impl EventLog {
    /// Finds the end of the log: the newest event in the stream, or the newest one in Postgres,
    /// which the claim contains, if the stream has none and was not trimmed beyond what was
    /// persisted then.
    ///
    /// # Errors
    /// When the stream does not answer, or was trimmed further.
    pub async fn open(
        bus: &Bus,
        session: SessionId,
        turn: u32,
        spec: &TurnSpec,
    ) -> Result<Position, OpenError> {
        let epoch = spec.epoch;
        let partition = Partition::new(spec.event_partition)
            .ok_or(OpenError::UnknownPartition(spec.event_partition))?;
        let (stream, log) = (topology::events(partition), subject::session_log(session, partition));
        let last = newest_written(bus, stream.name, &log).await?;
        let may_have_more = (turn, epoch) != (1, 1);
        if last.is_none()
            && may_have_more
            && bus.stream_info(stream).await?.trimmed_through > spec.recorded_through
        {
            return Err(OpenError::Trimmed);
        }
        let decode = |id: u64, payload: Bytes| Some((id, SessionEvent::decode(payload).ok()?));
        let streamed = match last {
            // A runner that cannot read another runner's event must not start over at offset 0.
            Some(entry) => {
                Some(decode(entry.sequence, entry.payload).ok_or(OpenError::Unreadable)?)
            }
            None => None,
        };
        let persisted = match &spec.last_event {
            Some(event) => {
                Some(decode(event.event_id, event.payload.clone()).ok_or(OpenError::Unreadable)?)
            }
            None => None,
        };
        let (last_sequence, follows, mut checkpoint, last_at_us) =
            match rules::position::position(newest(&streamed), newest(&persisted), turn, epoch) {
                rules::position::Position::Open { expected, follows, checkpoint, at_us } => {
                    (expected, follows, checkpoint, at_us)
                }
                rules::position::Position::Ended { id } => return Ok(Position::Ended(id)),
                rules::position::Position::Terminated => {
                    return Ok(Position::Fenced(Fenced::Terminated));
                }
                rules::position::Position::Superseded => {
                    return Ok(Position::Fenced(Fenced::Superseded));
                }
            };
        let newest = [&streamed, &persisted]
            .into_iter()
            .flatten()
            .find(|(id, event)| *id == follows.id && event.turn == turn);
        if let Some((id, event)) = newest {
            playback::own_tool(event.kind.as_ref(), *id, &mut checkpoint);
            if let Some(Kind::ModelRequestStarted(started)) = &event.kind {
                open_request(
                    &mut checkpoint,
                    OpenModelRequest { request_id: started.request_id.clone(), event_id: *id },
                );
            }
        }
        Ok(Position::Open(Box::new(Self {
            bus: bus.clone(),
            session,
            stream: stream.name,
            log,
            turn,
            epoch,
            last_sequence,
            follows,
            next_at_us: last_at_us.saturating_add(chain::PARTS_MAX),
            floor: spec.recorded_through,
            checkpoint: *checkpoint,
            secrets: Masker::default(),
            masker: Masker::default(),
            is_unwritten: false,
            silent_since: (epoch == 1).then(Instant::now),
        })))
    }

    /// The log of a session that is prepared for its first turn, which alone writes it.
    ///
    /// # Errors
    /// When this release does not know the session's partition.
    pub fn unwritten(bus: &Bus, session: SessionId, spec: &TurnSpec) -> Result<Self, OpenError> {
        let partition = Partition::new(spec.event_partition)
            .ok_or(OpenError::UnknownPartition(spec.event_partition))?;
        Ok(Self {
            bus: bus.clone(),
            session,
            stream: topology::events(partition).name,
            log: subject::session_log(session, partition),
            turn: 0,
            epoch: 0,
            last_sequence: 0,
            follows: Mark::default(),
            next_at_us: 0,
            floor: spec.recorded_through,
            checkpoint: Checkpoint::default(),
            secrets: Masker::default(),
            masker: Masker::default(),
            is_unwritten: true,
            silent_since: None,
        })
    }

    pub const fn is_unwritten(&self) -> bool {
        self.is_unwritten
    }

    /// Whether no other writer had begun by now. A log that is written knows by its appends.
    pub async fn is_undisturbed(&self) -> bool {
        if !self.is_unwritten {
            return true;
        }
        let is_untrimmed = async {
            let partition = topology::partition_of(self.stream)?;
            let info = self.bus.stream_info(topology::events(partition)).await.ok()?;
            Some(info.trimmed_through <= self.floor)
        };
        // In this order: what was trimmed in between is found.
        matches!(self.bus.last(self.stream, &self.log).await, Ok(None))
            && is_untrimmed.await == Some(true)
    }

    /// Makes this runner the writer: earlier writers are refused from here on.
    pub async fn take_over(&mut self) -> Result<(), Fenced> {
        self.append(Kind::TakenOver(TakenOver {})).await
    }

    pub async fn stage(
        &mut self,
        stage: Stage,
        state: StageState,
        took: Option<Duration>,
        message: Option<String>,
    ) -> Result<(), Fenced> {
        // Should the hint of a message be lost, this stops what would write old configuration.
        if self.is_unwritten && matches!(self.bus.last(self.stream, &self.log).await, Ok(Some(_))) {
            return Err(Fenced::Superseded);
        }
        if state == StageState::Done {
            self.checkpoint.stages_done.push(stage.as_str().to_owned());
        }
        let duration_ms = took.map(|took| u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
        let changed = StageChanged {
            stage: stage.as_str().to_owned(),
            state: state.as_str().to_owned(),
            duration_ms,
            message,
            restored: false,
        };
        self.append(Kind::Stage(changed)).await
    }

    /// A stage is done by what the Sprite began from.
    pub async fn restored(&mut self, stage: Stage, took_ms: u64) -> Result<(), Fenced> {
        self.checkpoint.stages_done.push(stage.as_str().to_owned());
        let changed = StageChanged {
            stage: stage.as_str().to_owned(),
            state: StageState::Done.as_str().to_owned(),
            duration_ms: Some(took_ms),
            message: None,
            restored: true,
        };
        self.append(Kind::Stage(changed)).await
    }

    pub fn is_done(&self, stage: Stage) -> bool {
        self.checkpoint.stages_done.iter().any(|done| done == stage.as_str())
    }

    /// The turn's message is about to be sent to the agent host, whose journal is read from this
    /// offset.
    pub async fn started(
        &mut self,
        started: TurnStarted,
        journal_offset: u64,
    ) -> Result<(), Fenced> {
        let former = std::mem::take(&mut self.checkpoint);
        self.checkpoint = Checkpoint {
            stages_done: former.stages_done,
            metered_through: former.metered_through,
            open_model_requests: former.open_model_requests,
            started: true,
            journal_offset,
            ..Checkpoint::default()
        };
        self.append(Kind::TurnStarted(started)).await
    }

    /// Appends what the model gateway recorded, unless it is in the log.
    pub async fn metered(&mut self, entry: MeterEntry) -> Result<(), Fenced> {
        if entry.number <= self.checkpoint.metered_through {
            return Ok(());
        }
        self.checkpoint.metered_through = entry.number;
        let open = &mut self.checkpoint.open_model_requests;
        match entry.kind {
            Some(meter_entry::Kind::Started(started)) => {
                let request_id = started.request_id.clone();
                // Its own id is known only when it is in the log: it is in the checkpoints from the
                // next event on.
                self.append(Kind::ModelRequestStarted(started)).await?;
                let event_id = self.last_sequence;
                open_request(&mut self.checkpoint, OpenModelRequest { request_id, event_id });
                Ok(())
            }
            Some(meter_entry::Kind::Ended(mut ended)) => {
                if let Some(at) = open.iter().position(|open| open.request_id == ended.request_id) {
                    ended.started = open.remove(at).event_id;
                }
                self.append(Kind::ModelRequestEnded(ended)).await
            }
            Some(meter_entry::Kind::Notice(notice)) => {
                self.append(Kind::BudgetNotice(notice)).await
            }
            // Of a later release.
            None => Ok(()),
        }
    }

    /// Appends an event from the journal; returns the event's id.
    pub async fn play(&mut self, emitted: Emitted) -> Result<u64, Fenced> {
        emitted.place.apply(&mut self.checkpoint);
        if let Kind::Output(output) = &emitted.kind
            && !self.is_unwritten
        {
            if let Some(opened) = self.silent_since.take() {
                metrics::histogram!("aod_first_output_seconds").record(opened.elapsed());
            }
            metrics::counter!("aod_output_bytes_total").increment(output.data.len() as u64);
        }
        self.append(emitted.kind).await?;
        Ok(self.last_sequence)
    }

    /// Continues from there in the journal, with the next event.
    pub fn continue_from(&mut self, place: Place) {
        place.apply(&mut self.checkpoint);
    }

    /// Publishes what the agent is writing to gateways that follow the session. It is not part of
    /// the log.
    pub async fn preview(&self, previews: Vec<Preview>) {
        let previews =
            previews.into_iter().map(|preview| Preview { turn: self.turn, ..preview }).collect();
        let told = QueuedInputs { previews, ..QueuedInputs::default() };
        self.bus
            .publish_hint(subject::queued_inputs(self.session), told.encode_to_vec().into())
            .await;
    }

    /// Ends the turn. Returns the id of its end.
    pub async fn ended(&mut self, ended: TurnEnded) -> Result<u64, Fenced> {
        self.append(Kind::TurnEnded(ended)).await?;
        Ok(self.last_sequence)
    }

    /// Appends and waits for the acknowledgement, for as long as it takes: nothing is dropped
    /// because the bus is slow or full. The task's owner ends the wait.
    async fn append(&mut self, kind: Kind) -> Result<(), Fenced> {
        if self.is_unwritten {
            return Ok(());
        }
        let tag = Uuid::new_v4().as_u64_pair().1;
        let at_us = Timestamp::now().unix_micros().max(self.next_at_us);
        self.next_at_us = at_us.saturating_add(chain::step(Some(&kind)));
        let event = SessionEvent {
            turn: self.turn,
            epoch: self.epoch,
            checkpoint: Some(self.checkpoint.clone()),
            follows: Some(self.follows.id),
            follows_tag: self.follows.tag,
            tag,
            at_us,
            kind: Some(kind),
        };
        let payload = Bytes::from(event.encode_to_vec());
        let mut attempt = 0;
        let sequence = loop {
            match self.bus.append(self.log.clone(), payload.clone(), self.last_sequence).await {
                Ok(sequence) => break sequence,
                Err(AppendError::Superseded) => match self.who_wrote(&payload).await {
                    // Stored by an earlier attempt whose acknowledgement was lost.
                    Writer::Ourselves(sequence) => break sequence,
                    Writer::Other(fenced) => return Err(fenced),
                    Writer::Nobody => return Err(Fenced::Forgotten),
                    Writer::Unknown => {
                        attempt += 1;
                        tokio::time::sleep(RETRY.jittered(attempt)).await;
                    }
                },
                Err(AppendError::Unacknowledged(error)) => {
                    attempt += 1;
                    tracing::warn!(session = %self.session, %error, attempt, "event not acknowledged; will retry");
                    tokio::time::sleep(RETRY.jittered(attempt)).await;
                }
            }
        };
        if sequence <= self.floor {
            return Err(Fenced::Forgotten);
        }
        (self.last_sequence, self.follows) = (sequence, Mark { id: sequence, tag });
        Ok(())
    }

    async fn who_wrote(&self, payload: &[u8]) -> Writer {
        let last = match self.bus.last(self.stream, &self.log).await {
            Ok(Some(last)) => last,
            Ok(None) => return Writer::Nobody,
            Err(_) => return Writer::Unknown,
        };
        // Until the scheduler has removed it.
        if last.is_foreign {
            return Writer::Unknown;
        }
        // It contains its tag, so no two events are equal.
        if last.payload == payload {
            return Writer::Ourselves(last.sequence);
        }
        if last.sequence < self.last_sequence {
            return Writer::Nobody;
        }
        match SessionEvent::decode(last.payload).ok().and_then(|event| event.kind) {
            Some(Kind::Terminated(_)) => Writer::Other(Fenced::Terminated),
            _ => Writer::Other(Fenced::Superseded),
        }
    }
}

/// Forgets the oldest if there are too many: then its end names no start.
fn open_request(checkpoint: &mut Checkpoint, request: OpenModelRequest) {
    let open = &mut checkpoint.open_model_requests;
    if open.len() >= OPEN_REQUESTS_MAX {
        open.remove(0);
    }
    open.push(request);
}

/// The newest entry of a log, once the scheduler has removed what no service wrote.
async fn newest_written(
    bus: &Bus,
    stream: &'static str,
    log: &str,
) -> Result<Option<Entry>, OpenError> {
    for attempt in 1..=FOREIGN_ATTEMPTS {
        match bus.last(stream, log).await? {
            Some(last) if last.is_foreign => tokio::time::sleep(RETRY.jittered(attempt)).await,
            last => return Ok(last),
        }
    }
    Err(OpenError::Unreadable)
}

fn newest(event: &Option<(u64, SessionEvent)>) -> Option<Newest<'_>> {
    event.as_ref().map(|(id, event)| Newest { id: *id, event })
}

/// Who wrote the newest entry.
enum Writer {
    Ourselves(u64),
    Other(Fenced),
    /// The stream does not have what this writer appended: it was trimmed, recreated or set back.
    Nobody,
    /// The stream does not answer.
    Unknown,
}

#[cfg(test)]
mod tests {
    use testkit::Nats;

    use super::*;

    #[tokio::test]
    async fn a_runner_that_cannot_read_the_newest_event_stops_and_does_not_begin_again() {
        let nats = Nats::start().unwrap();
        nats.with_streams().await.unwrap();
        let bus = nats.connect(&contract::access::RUNNER).await.unwrap();
        let (session, spec) = (SessionId::new(), TurnSpec { epoch: 2, ..TurnSpec::default() });
        let log = subject::session_log(session, Partition::FIRST);
        let checkpoint = Checkpoint { stdout_offset: 70, ..Checkpoint::default() };
        let event = SessionEvent {
            turn: 1,
            epoch: 1,
            checkpoint: Some(checkpoint),
            tag: 1,
            ..SessionEvent::default()
        };
        let first = bus.append(log.clone(), event.encode_to_vec().into(), 0).await.unwrap();
        let Ok(Position::Open(opened)) = EventLog::open(&bus, session, 1, &spec).await else {
            unreachable!("it continues")
        };
        assert_eq!(opened.checkpoint.stdout_offset, 70);
        bus.append(log, vec![0xff; 20].into(), first).await.unwrap();
        assert!(matches!(
            EventLog::open(&bus, session, 1, &spec).await,
            Err(OpenError::Unreadable)
        ));
    }

    #[tokio::test]
    async fn a_preparation_ends_with_its_stage_once_the_log_is_written() {
        let nats = Nats::start().unwrap();
        nats.with_streams().await.unwrap();
        let bus = nats.connect(&contract::access::RUNNER).await.unwrap();
        let (session, spec) = (SessionId::new(), TurnSpec { epoch: 1, ..TurnSpec::default() });
        let mut unwritten = EventLog::unwritten(&bus, session, &spec).unwrap();
        let stage = async |log: &mut EventLog, state| {
            log.stage(Stage::RuntimeConfig, state, None, None).await.is_ok()
        };
        assert!(stage(&mut unwritten, StageState::Started).await);
        let Ok(Position::Open(mut turn)) = EventLog::open(&bus, session, 1, &spec).await else {
            unreachable!("its first turn begins")
        };
        assert!(stage(&mut turn, StageState::Started).await);
        assert!(!stage(&mut unwritten, StageState::Done).await);
        assert!(stage(&mut turn, StageState::Done).await);
    }
}
